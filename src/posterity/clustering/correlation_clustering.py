"""Correlation clustering by an oracle alone: the pivot algorithm, and what a clustering has wrong.

An oracle says of two items whether they belong together, not always consistently. The cost of
a clustering is the number of pairs on which it differs from the oracle. A pivot drawn at
random takes all items that belong to it, then one of the rest, and so on: the expected cost is
at most three times the least.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray
from sklearn.utils import check_random_state

from posterity._checks import integer

__all__ = ["KwikBucksResult", "correlation_clustering_cost", "kwik_cluster", "pairwise_f1"]

Strong = Callable[[Int[ndarray, "q 2"]], Bool[ndarray, " q"]] | Bool[ndarray, "n n"]


@dataclass(frozen=True)
class KwikBucksResult:
    """A clustering, and what it cost.

    Attributes
    ----------
    labels : ndarray of shape (n,), int64
        From 0, numbered by first appearance.
    pivots : ndarray of shape (p,), int64
        The pivots, in the order in which they became one.
    n_queries : int
        Different pairs that the oracle was asked, merging aside.
    n_merge_queries : int
        Those that merging asked beside.
    exhausted : bool
        Whether the budget ended before every item had asked what it would; the items that
        had not are clusters of their own.
    """

    labels: Int[ndarray, " n"]
    pivots: Int[ndarray, " p"]
    n_queries: int
    n_merge_queries: int
    exhausted: bool


def kwik_cluster(
    strong: Strong, n: int, *, budget: int | None = None, random_state: Any = None
) -> KwikBucksResult:
    """Cluster by the expensive oracle alone: a random pivot takes all that belong to it, until none is left.

    Parameters
    ----------
    strong : callable or ndarray of shape (n, n), bool
        As `kwikbucks` takes it.
    n : int
        Number of items.
    budget : int, optional
        Most pairs to ask; what is left then are clusters of their own. By default no limit.
    random_state : int, RandomState or None, default=None
        The order of the items.

    Returns
    -------
    KwikBucksResult
        Without a budget its expected cost is at most 3 times that of the best clustering.

    Raises
    ------
    ValueError
        As `kwikbucks`.

    References
    ----------
    .. [1] Ailon, Charikar, Newman. Aggregating inconsistent information: ranking and
       clustering. J. ACM 2008.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.clustering import kwik_cluster
    >>> together = np.kron(np.eye(2, dtype=bool), np.ones((3, 3), dtype=bool))
    >>> kwik_cluster(together, 6, random_state=0).labels
    array([0, 0, 0, 1, 1, 1])
    """
    integer("n", n, 1)
    most = n * (n - 1) // 2
    oracle = Oracle(strong, n, most if budget is None else integer("budget", budget, 0))
    rest = check_random_state(random_state).permutation(n)
    own, pivots = np.arange(n), []
    while len(rest):
        pivot, rest = rest[0], rest[1:]
        pivots.append(pivot)
        asked = rest[: oracle.left]
        yes = oracle.ask(np.stack([np.full(len(asked), pivot), asked], axis=1))
        own[asked[yes]] = pivot
        if len(asked) < len(rest):
            oracle.exhausted = True
            break
        rest = asked[~yes]
    return KwikBucksResult(by_appearance(own), np.array(pivots), oracle.n_queries, 0, oracle.exhausted)


def correlation_clustering_cost(labels: Int[ndarray, " n"], strong_matrix: Bool[ndarray, "n n"]) -> int:
    """Return how many pairs a clustering has wrong: joined but not together, or together but not joined.

    Parameters
    ----------
    labels : ndarray of shape (n,), integer
        Equal for items that are joined.
    strong_matrix : ndarray of shape (n, n), bool
        Which items belong together, symmetric; the diagonal does not count.

    Returns
    -------
    int
        Over unordered pairs.

    Raises
    ------
    ValueError
        If shapes do not fit, or the matrix is not of truth values or not symmetric.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.clustering import correlation_clustering_cost
    >>> correlation_clustering_cost(np.array([0, 0, 1]), np.ones((3, 3), dtype=bool))
    2
    """
    _, false, missed = _pairs(labels, strong_matrix)
    return false + missed


def pairwise_f1(labels: Int[ndarray, " n"], strong_matrix: Bool[ndarray, "n n"]) -> float:
    """Return the harmonic mean of precision and recall of the pairs that a clustering joins.

    Parameters
    ----------
    labels : ndarray of shape (n,), integer
        Equal for items that are joined.
    strong_matrix : ndarray of shape (n, n), bool
        Which items belong together, symmetric; the diagonal does not count.

    Returns
    -------
    float
        1 if no pair is together and none is joined.

    Raises
    ------
    ValueError
        As `correlation_clustering_cost`.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.clustering import pairwise_f1
    >>> pairwise_f1(np.array([0, 0, 1]), np.ones((3, 3), dtype=bool))
    0.5
    """
    right, false, missed = _pairs(labels, strong_matrix)
    return 2 * right / (2 * right + false + missed) if right + false + missed else 1.0


class Oracle:
    """The strong signal, its answers so far, and how many it may still be asked."""

    def __init__(self, strong: Any, n: int, budget: int):
        self.n, self.budget, self.n_queries, self.exhausted = n, budget, 0, False
        self._answered: list[tuple[ndarray, ndarray]] = []
        if callable(strong):
            self._strong = strong
        else:
            matrix = _truth("strong", strong, n)
            self._strong = lambda pairs: matrix[pairs[:, 0], pairs[:, 1]]

    @property
    def left(self) -> int:
        return self.budget - self.n_queries

    def keys(self, pairs: ndarray) -> list[int]:
        """Return a number a pair, whichever of the two comes first."""
        return (pairs.min(1) * self.n + pairs.max(1)).tolist()

    def answers(self) -> dict[int, bool]:
        """Return what is known, by the keys of pairs."""
        known: dict[int, bool] = {}
        for pairs, found in self._answered:
            known.update(zip(self.keys(pairs), found.tolist(), strict=True))
        return known

    def ask(self, pairs: ndarray) -> ndarray:
        """Return whether pairs that were never asked belong together."""
        if not len(pairs):
            return np.zeros(0, dtype=bool)
        found = np.asarray(self._strong(pairs))
        if found.shape != (len(pairs),) or found.dtype != bool:
            raise ValueError(
                f"strong must return a truth value for each of {len(pairs)} pairs, first {tuple(pairs[0].tolist())}, "
                f"got {found.dtype} of shape {found.shape}"
            )
        self._answered.append((pairs, found))
        self.n_queries += len(pairs)
        return found


def by_appearance(own: ndarray) -> ndarray:
    """Return labels numbered in the order in which they first appear."""
    _, first, inverse = np.unique(own, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _pairs(labels: Any, strong_matrix: Any) -> tuple[int, int, int]:
    """Return how many unordered pairs are rightly joined, falsely joined and missed."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers of shape (n,), got {labels.dtype} of shape {labels.shape}")
    together = _truth("strong_matrix", strong_matrix, len(labels))
    joined = labels[:, None] == labels
    diagonal = int(np.diagonal(together).sum())
    right = (int((joined & together).sum()) - diagonal) // 2
    n_joined, n_together = (int(joined.sum()) - len(labels)) // 2, (int(together.sum()) - diagonal) // 2
    return right, n_joined - right, n_together - right


def _truth(name: str, matrix: Any, n: int) -> ndarray:
    """Return a symmetric matrix of truth values of this size."""
    matrix = np.asarray(matrix)
    if matrix.shape != (n, n) or matrix.dtype != bool:
        raise ValueError(
            f"{name} must be a bool array of shape ({n}, {n}), got {matrix.dtype} of shape {matrix.shape}"
        )
    unlike = matrix != matrix.T
    if unlike.any():
        i, j = np.argwhere(unlike)[0].tolist()
        raise ValueError(f"{name} must be symmetric, got {matrix[i, j]} for {(i, j)} and not for {(j, i)}")
    return matrix
