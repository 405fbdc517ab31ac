"""Weak-label propagation: a few true labels, many unreliable votes and a graph make one answer an example.

Votes of labelling rules become a prior h over classes (`posterity.labels.label_votes`), examples
nearer than a radius are joined, and labels spread over the graph, each example held to its prior
(`posterity.labels.propagation`). With d_ij the distances of all pairs,

    W_ij = 1(d_ij <= r),   r = the (degree / n)-quantile of all n^2 of them,          (1)

which leaves what lies apart unconnected: there the graph says nothing, and the prior decides.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from posterity._checks import at_least, one_of, within
from posterity.labels._arrays import numbers
from posterity.labels.label_votes import _alike, _votes, aggregate_votes
from posterity.labels.propagation import prior_confidence, propagate, smooth_prior

__all__ = ["WeakLabelPropagation", "distance_graph"]

EXACT = 10_000  # points of which all distances are looked at
SAMPLE = 4_473  # points drawn of more: 10^7 pairs give the radius
DISTANCES = 2**20  # distances held at once
TREE = 5  # columns up to which a tree finds neighbours sooner than all distances do
EDGE = 1 + 1e-9  # a pair at the radius stays within it, however its distance is rounded
ALONE = 1e-3  # confidence in a uniform prior


def distance_graph(
    X: Shaped[ndarray, "n d"] | Shaped[Tensor, "n d"] | ArrayLike,
    avg_degree: float = 10,
    *,
    random_state: Any = None,
) -> sparse.csr_matrix:
    """Return the graph of points nearer than a radius, equation 1.

    Parameters
    ----------
    X : array or Tensor of shape (n, d)
        Points, finite, in units that can be compared.
    avg_degree : float, default=10
        Mean number of points within the radius of a point, itself among them; in (0, n].
    random_state : int, RandomState or None, default=None
        Decides the points that give the radius, of more than 10,000.

    Returns
    -------
    csr_matrix of shape (n, n)
        Edges of weight 1, both ways, none of a point to itself.

    Raises
    ------
    ValueError
        If an argument is not as above.

    Notes
    -----
    1. The quantile is numpy's linear one, the zeros of the diagonal count. Of more than 10,000
       points it is that of the 10^7 pairs of 4,473 drawn at random.

    References
    ----------
    .. [1] Pukdee et al. Label Propagation with Weak Supervision. ICLR 2023.

    Examples
    --------
    >>> from posterity.labels import distance_graph
    >>> distance_graph([[0.0], [1.0], [5.0]], avg_degree=1.5).toarray()
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 0., 0.]])
    """
    X, _ = numbers("X", X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must have shape (n, d), n and d at least 1, got {X.shape}")
    within("avg_degree", avg_degree, 0, len(X), open_low=True)
    return _joined(X, _radius(X, avg_degree, random_state))


class WeakLabelPropagation(ClassifierMixin, BaseEstimator):
    """A classifier from a few labels, the votes of unreliable rules, and what is near what.

    Parameters
    ----------
    avg_degree : float, default=10
        Of the graph of `distance_graph`, positive; at most half of the rows is taken.
    smooth_degree : float, default=100
        Of the denser graph on which the prior is smoothed, positive; at most half of the rows.
    vote_weight : float, default=0.0
        Weight of edges between rows with the same votes, of `vote_graph`; at least 0.
    confidence : float, "adaptive" or "step", default=0.1
        How strongly rows are held to the prior beside an edge of weight 1: one number, at least 0, or
        that of `prior_confidence`, by its kind "quadratic" or "step". Without weak labels the
        prior is uniform and the confidence 0.001.
    prune_quantile : float, default=0.0
        Edges of votes join only rows whose smoothed prior is at least as decided as this
        quantile of all; in [0, 1].
    random_state : int, RandomState or None, default=None
        For `distance_graph`, of more than 10,000 rows.

    Attributes
    ----------
    classes_ : ndarray of shape (c,)
        Sorted.
    label_distributions_ : ndarray of shape (n, c)
        Probabilities of the rows of ``fit``, one-hot where they were labelled.
    labels_ : ndarray of shape (n,)
        The most probable class of each of these rows, the first of equals.
    prior_ : ndarray of shape (n, c)
        What the votes said.
    confidence_ : ndarray of shape (n,)
        How strongly each row was held to that.
    radius_ : float
        Of the graph.
    n_features_in_ : int

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range, there are fewer than two classes, or neither a
        label nor weak labels.

    See Also
    --------
    posterity.labels.propagate : The same for any graph.

    Notes
    -----
    1. A new row has the mean distribution of the rows of ``fit`` within the radius, or that of
       the nearest, where there are none; this is ours.
    2. Rules that are near chance, and err together, make a confident wrong prior, and the result
       worse than without it: look at how often rules agree with the labels first.
    3. Edges of votes are not listed: a group of g rows with the same votes is a node more, tied
       to each by a weight g times as large, which is the same for the rows.

    References
    ----------
    .. [1] Pukdee, Sam, Ravikumar, Balcan. Label Propagation with Weak Supervision. ICLR 2023.

    Examples
    --------
    Two groups, a label in one of them, and a rule that speaks for a row of the other:

    >>> import numpy as np
    >>> from posterity.labels import WeakLabelPropagation
    >>> X = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    >>> y = np.array([0, -1, -1, -1, -1, -1])
    >>> votes = np.array([[-1], [-1], [-1], [-1], [1], [-1]])
    >>> WeakLabelPropagation(avg_degree=3).fit(X, y, votes).labels_
    array([0, 0, 0, 1, 1, 1])
    """

    def __init__(
        self,
        *,
        avg_degree: float = 10,
        smooth_degree: float = 100,
        vote_weight: float = 0.0,
        confidence: float | Literal["adaptive", "step"] = 0.1,
        prune_quantile: float = 0.0,
        random_state: Any = None,
    ) -> None:
        self.avg_degree = avg_degree
        self.smooth_degree = smooth_degree
        self.vote_weight = vote_weight
        self.confidence: float | Literal["adaptive", "step"] = confidence
        self.prune_quantile = prune_quantile
        self.random_state = random_state

    def fit(self, X: Any, y: Any, weak_labels: Any = None) -> "WeakLabelPropagation":
        """Find the class of every row.

        Parameters
        ----------
        X : array of shape (n, d)
            Rows, in units that can be compared.
        y : array of shape (n,)
            Labels; -1 where there is none.
        weak_labels : array of shape (n, m), optional
            Votes of m rules, in whole numbers as labels are, -1 where a rule abstains. They may
            name a class without a label.

        Returns
        -------
        WeakLabelPropagation
            The fitted estimator.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        n = len(X)
        at_least("avg_degree", self.avg_degree, 0, strict=True)
        at_least("smooth_degree", self.smooth_degree, 0, strict=True)
        at_least("vote_weight", self.vote_weight, 0)
        within("prune_quantile", self.prune_quantile, 0, 1)
        kinds: dict[str, Any] = {"adaptive": "quadratic", "step": "step"}
        if isinstance(self.confidence, str):
            one_of("confidence", self.confidence, tuple(kinds))
        else:
            at_least("confidence", self.confidence, 0)
        labeled, labels, votes = self._coded(y, weak_labels)
        random_state = check_random_state(self.random_state)

        self.radius_ = _radius(X, min(self.avg_degree, n / 2), random_state)
        graph = _joined(X, self.radius_)
        c = len(self.classes_)
        self.prior_ = np.full((n, c), 1 / c) if votes is None else aggregate_votes(votes, c)
        smoothed = self.prior_
        if votes is not None and (isinstance(self.confidence, str) or self.vote_weight > 0):
            wide = _joined(X, _radius(X, min(self.smooth_degree, n / 2), random_state))
            smoothed = smooth_prior(wide, self.prior_)
        if votes is None:
            self.confidence_ = np.full(n, ALONE)
        elif isinstance(self.confidence, str):
            self.confidence_ = prior_confidence(smoothed, graph, labeled, kind=kinds[self.confidence])
        else:
            self.confidence_ = np.full(n, float(self.confidence))
        prior, confidence = self.prior_, self.confidence_
        if votes is not None and self.vote_weight > 0:
            decided = smoothed.max(1)
            confident = decided >= np.quantile(decided, self.prune_quantile)
            graph, hubs = _with_votes(graph, votes, confident, self.vote_weight)
            prior = np.vstack([prior, np.full((hubs, c), 1 / c)])
            confidence = np.append(confidence, np.zeros(hubs))
        self.label_distributions_ = propagate(graph, prior, labels, labeled, confidence=confidence)[:n]
        self.labels_ = self.classes_[self.label_distributions_.argmax(1)]
        self._origin = X.mean(0)  # far from which distances would cancel
        self._nearest = _neighbors(X - self._origin, self.radius_)
        return self

    def predict_proba(self, X: Any) -> ndarray:
        """Return the probabilities of the classes of new rows, shape (n, c)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False) - self._origin
        near = self._nearest.radius_neighbors_graph(X)
        count = np.asarray(near.sum(1)).ravel()
        mean = near @ self.label_distributions_ / np.maximum(count, 1)[:, None]
        lone = np.flatnonzero(count == 0)
        if len(lone):
            nearest = np.ravel(self._nearest.kneighbors(X[lone], return_distance=False))
            mean[lone] = self.label_distributions_[nearest]
        return mean

    def predict(self, X: Any) -> ndarray:
        """Return the most probable class of new rows, the first of equals, shape (n,)."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _coded(self, y: ndarray, weak_labels: Any) -> tuple[ndarray, ndarray, ndarray | None]:
        """Return the labelled rows, their classes and the votes in 0..c-1; set ``classes_``."""
        known = np.ones(len(y), dtype=bool) if y.dtype.kind in "US" else np.asarray(y != -1, dtype=bool)
        if weak_labels is None:
            if not known.any():
                raise ValueError("y must have a label, or weak_labels be given: all rows are -1")
            votes, named = None, y[known]
        else:
            try:
                votes = _votes(weak_labels)
            except ValueError as error:
                raise ValueError(f"weak_labels: {error}") from error
            if len(votes) != len(y):
                raise ValueError(f"weak_labels must have a row for each of y, {len(y)}, got {len(votes)}")
            if y.dtype.kind not in "iuf":
                raise ValueError(f"y must hold whole numbers where weak_labels do, got {y.dtype}")
            named = np.concatenate([y[known], votes[votes >= 0].astype(y.dtype)])
        self.classes_ = np.unique(named)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y and weak_labels must name at least 2 classes, got {len(self.classes_)} class"
            )
        labels = np.searchsorted(self.classes_, y[known])
        if votes is not None:
            votes = np.where(votes < 0, -1, np.searchsorted(self.classes_, votes))
        return np.flatnonzero(known), labels, votes


def _with_votes(
    graph: sparse.csr_matrix, votes: ndarray, confident: ndarray, weight: float
) -> tuple[sparse.csr_matrix, int]:
    """Return the graph with edges of ``weight`` between rows that vote alike, and how many nodes it has more.

    Eliminating a node tied to g others by c each joins them all by c / g: so c = g weight.
    """
    members, alike = _alike(votes, confident)
    size = members.sum(0)
    several = np.flatnonzero(size > 1)
    ties = weight * (members[:, several] * size[several])
    rows = graph + weight * (members @ alike @ members.T)
    return sparse.csr_matrix(sparse.block_array([[rows, ties], [ties.T, None]])), len(several)


def _blocks(X: ndarray) -> Iterator[tuple[int, ndarray, ndarray]]:
    """Yield, some rows at a time, the first of them, distances to it and what comes after, which are of pairs i < j."""
    n, start = len(X), 0
    scale = 2.0 ** np.frexp(np.abs(X).max())[1]  # exact, and nothing overflows
    X = X / scale if np.isfinite(scale) and scale > 0 else X
    while start < n:
        rows = max(1, DISTANCES // (n - start))
        distances = scale * cdist(X[start : start + rows], X[start:])
        yield start, distances, np.arange(n - start) > np.arange(len(distances))[:, None]
        start += rows


def _radius(X: ndarray, avg_degree: float, random_state: Any) -> float:
    """Return the (degree / n)-quantile of all n^2 distances, of many points by a sample."""
    n = len(X)
    if n > EXACT:
        drawn = check_random_state(random_state).choice(n, SAMPLE, replace=False)
        others = (avg_degree - 1) * (SAMPLE - 1) / (n - 1)
        return _radius(X[drawn], max(0.0, 1 + others), None)
    # of all n^2, sorted: n zeros, then each pair twice
    low, part = divmod(avg_degree / n * (n * n - 1), 1)
    ends = [(int(at) - n) // 2 for at in (low, min(low + 1, n * n - 1))]
    if ends[1] < 0:
        return 0.0
    smallest = np.empty(0)
    for _, distances, pairs in _blocks(X):
        smallest = np.concatenate([smallest, distances[pairs]])
        if len(smallest) > ends[1] + 1:
            smallest = np.partition(smallest, ends[1])[: ends[1] + 1]
    smallest = np.sort(smallest)
    first, second = (smallest[k] if k >= 0 else 0.0 for k in ends)
    return float(first + part * (second - first))


def _neighbors(X: ndarray, radius: float) -> NearestNeighbors:
    algorithm = "kd_tree" if X.shape[1] <= TREE else "brute"
    return NearestNeighbors(n_neighbors=1, radius=EDGE * radius, algorithm=algorithm).fit(X)


def _joined(X: ndarray, radius: float) -> sparse.csr_matrix:
    """Return edges of weight 1 between points within the radius."""
    n = len(X)
    if n > EXACT:
        near = _neighbors(X - X.mean(0), radius).radius_neighbors_graph()
        return sparse.csr_matrix(near.maximum(near.T))  # rounding may let one see the other only
    found = [np.zeros((2, 0), dtype=np.int64)]
    for start, distances, pairs in _blocks(X):
        found.append(np.stack(np.nonzero(pairs & (distances <= radius))) + start)
    i, j = np.concatenate(found, axis=1)
    graph = sparse.csr_matrix((np.ones(len(i)), (i, j)), shape=(n, n))
    return sparse.csr_matrix(graph + graph.T)
