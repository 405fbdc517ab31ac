"""Splits: disjoint random parts of rows, and wrong labels in them, alike for the same seed."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

__all__ = ["flip_labels", "split"]


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


def flip_labels(
    y: ndarray, share: float, seed: int, *, n_classes: int | None = None
) -> tuple[ndarray, ndarray]:
    """Return labels of which a share, drawn at random, is wrong.

    Parameters
    ----------
    y : ndarray of shape (n,), integer
        Codes from 0; left as they are.
    share : float
        Of all labels, in [0, 1]; the number of wrong ones is rounded.
    seed : int
        Decides which, and what they become: any other class, each alike.
    n_classes : int, optional
        At least 2; by default, one more than the largest label.

    Returns
    -------
    tuple of ndarray
        The labels, of the dtype of ``y``, and which of them are wrong, bool; of shape (n,).
    """
    y = np.asarray(y)
    if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0:
        raise ValueError(f"y must be codes from 0 of shape (n,), got {y.dtype} of shape {y.shape}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    n_classes = int(y.max()) + 1 if n_classes is None else n_classes
    if n_classes < max(2, int(y.max()) + 1):
        raise ValueError(f"n_classes must be at least {max(2, int(y.max()) + 1)} for y, got {n_classes}")
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(y), round(share * len(y)), replace=False)
    noisy, wrong = y.copy(), np.zeros(len(y), dtype=bool)
    noisy[rows] = (y[rows].astype(np.int64) + rng.integers(1, n_classes, len(rows))) % n_classes
    wrong[rows] = True
    return noisy, wrong
