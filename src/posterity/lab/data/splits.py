"""Splits: disjoint random parts of rows, alike for the same seed."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

__all__ = ["split"]


def split(
    n: int, fractions: Sequence[float], seed: int, *, stratify: ndarray | None = None
) -> tuple[ndarray, ...]:
    """Return disjoint index arrays of a random split.

    Parameters
    ----------
    n : int
        How many rows.
    fractions : sequence of float
        The share of each part; they sum to at most 1.
    seed : int
    stratify : ndarray of shape (n,), optional
        Labels whose shares each part keeps, as nearly as counts allow.

    Returns
    -------
    tuple of ndarray
        Sorted-at-random indices, one array a part.
    """
    if sum(fractions) > 1 + 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions must be positive and sum to at most 1, got {tuple(fractions)}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if stratify is not None:  # deal each class out evenly: sort by the rank within its class
        labels = np.asarray(stratify)[order]
        place = np.empty(n)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = order[np.argsort(place, kind="stable")]
    cuts = np.round(np.cumsum([0.0, *fractions]) * n).astype(int)
    return tuple(rng.permutation(order[low:high]) for low, high in zip(cuts[:-1], cuts[1:], strict=True))
