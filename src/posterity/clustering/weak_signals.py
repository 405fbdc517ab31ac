"""Cheap similarities of items: a matrix, embeddings, or any callable that gives blocks.

Of many items no matrix of all pairs is ever held: nearest neighbours, and sums over pairs across
clusters, are found block by block.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from posterity._checks import integer

__all__ = ["EmbeddingSignal", "WeakSignal"]

BLOCK = 1 << 21  # similarities that are held at once


@runtime_checkable
class WeakSignal(Protocol):
    """A cheap similarity: its length is the number of items, a call gives a block of it."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __call__(self, rows: Int[ndarray, " r"], cols: Int[ndarray, " c"]) -> Float[ndarray, "r c"]:
        """Return the similarity of each of ``rows`` to each of ``cols``, higher for more alike."""
        ...


class EmbeddingSignal:
    """The similarity of embeddings, computed block by block and never as a whole.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Integers and 16-bit floats are widened to float32 or float64.
    normalize : bool, default=True
        Whether similarity is the cosine; else the inner product. A row of zeros is
        similar to nothing.

    Raises
    ------
    ValueError
        If features are not numbers, not finite or not of two dimensions, or there are none.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.clustering import EmbeddingSignal
    >>> signal = EmbeddingSignal(np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]]))
    >>> signal(np.array([0]), np.array([0, 1, 2])).round(3)
    array([[1.   , 0.   , 0.707]])
    """

    def __init__(self, features: Shaped[ndarray, "n d"], *, normalize: bool = True):
        features = _numbers("features", features)
        if not features.size:
            raise ValueError(f"features must not be empty, got shape {features.shape}")
        if normalize:
            largest = np.abs(features).max(1, keepdims=True)  # first, so that no square overflows
            features = features / np.where(largest > 0, largest, 1)
            length = np.linalg.norm(features, axis=1, keepdims=True)
            features = features / np.where(length > 0, length, 1)
        self.features = features

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.features)

    def __call__(self, rows: Int[ndarray, " r"], cols: Int[ndarray, " c"]) -> Float[ndarray, "r c"]:
        """Return the similarity of each of ``rows`` to each of ``cols``.

        Parameters
        ----------
        rows, cols : ndarray of shape (r,) and (c,), int64

        Returns
        -------
        ndarray of shape (r, c)

        Raises
        ------
        IndexError
            If an item is out of range.
        """
        return self.features[rows] @ self.features[cols].T


def as_signal(weak: Any) -> Any:
    if callable(weak):
        n = integer("the length of weak", len(weak) if hasattr(weak, "__len__") else None, 1)
        block = np.asarray(weak(np.arange(1), np.arange(n)))
        if block.shape != (1, n) or block.dtype.kind != "f":
            raise ValueError(
                f"weak must return floats of shape (1, {n}) for a row, got {block.dtype} {block.shape}"
            )
        return weak
    matrix = _numbers("weak", weak)
    if matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"weak must be square and not empty, got shape {matrix.shape}")
    return _Matrix(matrix)


def blocks(n: int, width: int) -> Iterator[ndarray]:
    """Return the numbers below n in parts, so that a part times the width is a block."""
    step = max(1, BLOCK // max(width, 1))
    return (np.arange(start, min(start + step, n)) for start in range(0, n, step))


def neighbours(signal: WeakSignal, k: int) -> ndarray:
    """Return the k most similar other items of each item, the smaller index first among equals."""
    n = len(signal)
    k, everyone = min(k, n - 1), np.arange(n)
    found = np.empty((n, k), dtype=np.int64)
    if not k:
        return found
    for part in blocks(n, n):
        block = np.array(signal(part, everyone))
        if not np.isfinite(block).all():
            raise ValueError("weak must be finite, got NaN or infinity")
        block[np.arange(len(part)), part] = -np.inf
        row, col = np.divmod(np.flatnonzero(block >= _least(block, k)[:, None]), n)
        order = np.lexsort((col, -block[row, col], row))
        start = np.searchsorted(row, np.arange(len(part)))  # rows are sorted, and each has k at least
        found[part] = col[order][start[:, None] + np.arange(k)]
    return found


def _least(block: ndarray, k: int) -> ndarray:
    """Return a bound a row that at least k of its values, and few more, reach.

    The k-th largest of the maxima of groups is one, and groups of 16 are far fewer than values.
    """
    size = 16 if block.shape[1] >= 64 * k else 1
    cut = block.shape[1] // size * size
    maxima = block[:, :cut].reshape(len(block), size, -1).max(1)
    maxima = np.concatenate([maxima, block[:, cut:]], axis=1)
    return np.partition(maxima, -k, axis=1)[:, -k]


def cross_sums(signal: WeakSignal, cluster: ndarray, ends: ndarray) -> ndarray:
    """Return the sum of similarities over all pairs across each of some pairs of clusters."""
    n_clusters = int(cluster.max()) + 1
    if isinstance(signal, EmbeddingSignal):
        centres = np.zeros((n_clusters, signal.features.shape[1]))
        np.add.at(centres, cluster, signal.features)
        return np.einsum("pd,pd->p", centres[ends[0]], centres[ends[1]])
    total, everyone = np.zeros(ends.shape[1]), np.arange(len(cluster))
    starts = np.searchsorted(ends[0], np.arange(n_clusters + 1))  # pairs are sorted by their first
    for a in np.unique(ends[0]):
        pairs = slice(starts[a], starts[a + 1])
        rows = np.flatnonzero(cluster == a)
        sums = sum(
            signal(rows[part], everyone).sum(0, dtype=float) for part in blocks(len(rows), len(cluster))
        )
        total[pairs] = np.bincount(cluster, sums, minlength=n_clusters)[ends[1, pairs]]
    return total


class _Matrix:
    def __init__(self, matrix: ndarray):
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.matrix)

    def __call__(self, rows: ndarray, cols: ndarray) -> ndarray:
        return self.matrix[rows] if len(cols) == len(self.matrix) else self.matrix[np.ix_(rows, cols)]


def _numbers(name: str, values: Any) -> ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must be numbers of two dimensions, got {values.dtype} of shape {values.shape}"
        )
    values = values.astype(np.result_type(values.dtype, np.float32), copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return values
