"""Probabilities as integers that sum to a power of two: what an entropy coder writes and reads alike everywhere."""

import numpy as np

__all__ = ["integer_tables"]


def integer_tables(probs: np.ndarray, precision: int) -> np.ndarray:
    """Return each row (the last axis) as int64, at least 1 each, that sum to ``2**precision``.

    Every entry gets 1 and its share of the rest, rounded down; what is left goes, one each, to the entries
    that lost most by rounding, the first among equals. Rows need not sum to 1; a row of zeros is uniform.
    Raises ValueError where a row is negative or not finite, or has more entries than ``2**precision``.
    """
    probs = np.asarray(probs, np.float64)
    n = probs.shape[-1]
    if n > 2**precision:
        raise ValueError(
            f"precision must give each of {n} symbols one of 2**precision shares, got {precision}"
        )
    if not (np.isfinite(probs).all() and (probs >= 0).all()):
        raise ValueError("probs must be finite and not negative")
    total = probs.sum(-1, keepdims=True)
    even = np.full(n, 1 / n)
    shares = np.where(total > 0, probs / np.where(total > 0, total, 1), even) * (2**precision - n)
    whole = np.floor(shares).astype(np.int64)
    left = 2**precision - n - whole.sum(-1, keepdims=True)
    lost = np.argsort(whole - shares, axis=-1, kind="stable")
    rank = np.empty_like(lost)
    np.put_along_axis(rank, lost, np.broadcast_to(np.arange(n), lost.shape), axis=-1)
    return whole + 1 + (rank < left)
