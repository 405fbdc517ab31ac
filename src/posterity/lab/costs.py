"""What a network costs: bytes on disk, and seconds of works that run in turns."""

import io
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray

__all__ = ["saved_bytes", "seconds_in_turns"]


def saved_bytes(state: Mapping[str, Any], *, deflated: bool = False) -> int:
    """Return the bytes of a state as ``torch.save`` writes it.

    Parameters
    ----------
    state : mapping
        A ``state_dict``.
    deflated : bool, default=False
        Whether zlib packs it, so that zeros are not stored.

    Returns
    -------
    int
    """
    file = io.BytesIO()
    torch.save(state, file)
    return len(zlib.compress(file.getvalue(), 9) if deflated else file.getvalue())


def seconds_in_turns(works: Sequence[Callable[[], object]], rounds: int) -> ndarray:
    """Return the seconds of works, one after the other in each round, after a round that warms up.

    What slows a machine for a while slows all of them: compare within rounds.

    Parameters
    ----------
    works : sequence of callable
    rounds : int

    Returns
    -------
    ndarray of shape (rounds, works)
    """
    seconds = np.empty((rounds + 1, len(works)))
    for row in seconds:
        for who, work in enumerate(works):
            start = time.perf_counter()
            work()
            row[who] = time.perf_counter() - start
    return seconds[1:]
