"""Parity: a method's outputs on stored inputs against stored outputs of other code."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Parity", "check_parity"]


class Parity(NamedTuple):
    """How far a method agrees.

    Attributes
    ----------
    values : int
        How many numbers were compared.
    largest : float
        The largest absolute difference among them.
    """

    values: int
    largest: float


def check_parity(pairs: Iterable[tuple[str, Any, Any, float]]) -> Parity:
    """Check that outputs agree with those of other code, and say how closely.

    Parameters
    ----------
    pairs : iterable of (str, array, array, float)
        What is compared, our output, the stored one, and the largest absolute difference
        allowed. Outputs are tensors, arrays or numbers of equal shape, all of them finite.

    Returns
    -------
    Parity
    """
    values, largest = 0, 0.0
    for name, ours, theirs, allowed in pairs:
        ours, theirs = (
            np.asarray(each.detach().cpu() if isinstance(each, torch.Tensor) else each, dtype=np.float64)
            for each in (ours, theirs)
        )
        assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, theirs is {theirs.shape}"
        difference = float(np.abs(ours - theirs).max(initial=0.0))
        assert difference <= allowed, (
            f"{name}: differs by {difference:.3g}, allowed is {allowed:g}"
        )  # or is NaN
        values, largest = values + theirs.size, max(largest, difference)
    assert values, "nothing was compared"
    return Parity(values, largest)
