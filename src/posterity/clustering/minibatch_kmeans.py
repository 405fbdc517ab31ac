"""Mini-batch k-means that stops by itself: when a batch no longer improves on itself.

With b_j points of a batch of size b in cluster j, and m_j their mean, a step is

    c_j <- (1 - alpha_j) c_j + alpha_j m_j,    alpha_j = sqrt(b_j / b),        (1)

and the run ends at the first step whose cost on its own batch falls by less than epsilon,

    f_B(C) - f_B(C') < epsilon.                                                (2)

m_j errs like sqrt(d / b_j), so the step errs like sqrt(d / b) in every cluster, however
small: what a step gains on a large enough batch it gains on all the data. For data in
the unit cube each such gain is at least epsilon / 2 of a cost of at most d, so there are
at most 2 d / epsilon of them, from any start. A rate that falls to zero, as scikit-learn's
does, would let (2) happen because the centers no longer move, not because they are good.
"""

import math
import warnings
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import euclidean_distances, pairwise_distances_argmin_min
from sklearn.utils import check_random_state
from sklearn.utils.extmath import row_norms, safe_sparse_dot
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from posterity._checks import at_least, integer, one_of

__all__ = ["EarlyStopMiniBatchKMeans", "iteration_bound", "kmeans_batch_update", "sufficient_batch_size"]


def kmeans_batch_update(
    batch: Float[ndarray, "b d"],
    centers: Float[ndarray, "k d"],
    *,
    learning_rate: Literal["sqrt", "sklearn"] = "sqrt",
    counts: ndarray | None = None,
) -> tuple[Float[ndarray, "k d"], float]:
    """Return the centers after one step, and how much the batch's own cost fell.

    Parameters
    ----------
    batch : ndarray of shape (b, d)
        Points, not empty.
    centers : ndarray of shape (k, d)
        Left as they are.
    learning_rate : {"sqrt", "sklearn"}, default="sqrt"
        Equation 1; or ``b_j`` over all the points that the cluster ever received.
    counts : ndarray of shape (k,), optional
        Those points of each cluster so far, for "sklearn" only: changed in place.

    Returns
    -------
    tuple of ndarray and float
        New centers of shape (k, d); the progress, mean squared distance before less
        after. For rates up to 1 it is at least
        ``sum_j (b_j / b) alpha_j (2 - alpha_j) ||m_j - c_j||^2``, and so never negative.

    Raises
    ------
    ValueError
        If shapes do not fit, or "sklearn" is asked for without ``counts``.

    References
    ----------
    .. [1] Schwartzman. Mini-batch k-means terminates within O(d/epsilon) iterations. ICLR 2023.

    Examples
    --------
    One cluster whose batch is all of it moves to the mean at once:

    >>> import numpy as np
    >>> from posterity.clustering import kmeans_batch_update
    >>> kmeans_batch_update(np.array([[0.0], [2.0]]), np.array([[5.0]]))
    (array([[1.]]), 16.0)
    """
    one_of("learning_rate", learning_rate, ("sqrt", "sklearn"))
    if batch.ndim != 2 or len(batch) == 0:
        raise ValueError(f"batch must be (b, d) with b of at least 1, got {batch.shape}")
    if centers.ndim != 2 or centers.shape[1] != batch.shape[1] or len(centers) == 0:
        raise ValueError(
            f"centers must be (k, {batch.shape[1]}) for batch with k of at least 1, got {centers.shape}"
        )
    if learning_rate == "sklearn" and counts is None:
        raise ValueError('counts must be given with learning_rate="sklearn", got None')
    if counts is not None and counts.shape != (len(centers),):
        raise ValueError(f"counts must have shape ({len(centers)},) for centers, got {counts.shape}")
    origin = batch.mean(0)  # far from the origin |x|^2 - 2 x c + |c|^2 would cancel
    batch, centers = batch - origin, centers - origin
    norms = row_norms(batch, squared=True)
    labels, before = _assign(batch, norms, centers)
    new = _moved(batch, labels, centers, counts if learning_rate == "sklearn" else None)
    _, after = _assign(batch, norms, new)
    return new + origin, float(before - after)


def iteration_bound(n_features: int, epsilon: float) -> int:
    """Return the number of steps that each improve by epsilon / 2 at most: 2 d / epsilon.

    Parameters
    ----------
    n_features : int
        Columns d, at least 1.
    epsilon : float
        The threshold for data in the unit cube, in (0, d).

    Returns
    -------
    int
        ``ceil(2 d / epsilon)``.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    integer("n_features", n_features, 1)
    return math.ceil(2 * n_features / _threshold(epsilon, n_features))


def sufficient_batch_size(
    n_samples: int, n_features: int, n_clusters: int, epsilon: float, *, constant: float = 1.0
) -> int:
    """Return a batch size for which the theorem speaks: of order (d / epsilon)^2 log(n k d / epsilon).

    It is far larger than practice needs; the paper leaves its constant open.

    Parameters
    ----------
    n_samples, n_features, n_clusters : int
        n, d and k, at least 1.
    epsilon : float
        The threshold for data in the unit cube, in (0, d).
    constant : float, default=1.0
        Factor in front, positive.

    Returns
    -------
    int
        The batch size.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    n, d, k = (
        integer(name, value, 1)
        for name, value in (("n_samples", n_samples), ("n_features", n_features), ("n_clusters", n_clusters))
    )
    at_least("constant", constant, 0, strict=True)
    ratio = d / _threshold(epsilon, d)
    return math.ceil(constant * ratio**2 * math.log(n * k * ratio))


class EarlyStopMiniBatchKMeans(
    ClusterMixin, TransformerMixin, ClassNamePrefixFeaturesOutMixin, BaseEstimator
):
    """Mini-batch k-means whose number of iterations follows from the data and epsilon.

    Parameters
    ----------
    n_clusters : int, default=8
        Clusters, at least 1.
    epsilon : float, default=0.01
        Stop when the mean squared distance of a batch to its centers falls by less, in
        units of R^2, where R is the largest range of a feature. In (0, n_features).
    batch_size : int or "theory", default=1024
        Points drawn with replacement at each step. "theory" takes `sufficient_batch_size`;
        where that exceeds the data, every step sees all of it and progress is exact.
    learning_rate : {"sqrt", "sklearn"}, default="sqrt"
        See `kmeans_batch_update`; the guarantee is for "sqrt".
    stop : {"progress", "movement"}, default="progress"
        Equation 2; or, as scikit-learn's tolerance does, the summed squared movement of the
        centers against ``epsilon`` R^2.
    init : {"k-means++", "random"}, ndarray of shape (k, d) or callable, default="k-means++"
        As for scikit-learn's ``KMeans``; a callable gets ``(X, n_clusters, random_state)``.
    n_init : int, default=1
        Runs, of which the one with the lowest cost on all data is kept.
    max_iter : int, optional
        Largest number of steps; by default the theorem's bound and one more.
    random_state : int, RandomState or None, default=None
        Decides starts and batches.

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (k, d)
    labels_ : ndarray of shape (n,)
    inertia_ : float
        Sum over all points of the (weighted) squared distance to the nearest center.
    n_iter_ : int
        Steps taken; the one that stopped counts, and its centers are the result.
    progress_ : ndarray of shape (n_iter_,)
        How much each step's batch improved, in the units of the data.
    converged_ : bool
        Whether the run stopped by itself.
    n_features_in_ : int
    scale_ : float
        R.

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range or the data or its weights do not fit.

    Notes
    -----
    1. The theorem is for data in the unit cube. Data are not transformed: shifting and
       dividing by R changes the problem by one factor, so epsilon is in units of R^2.
    2. ``stop="movement"`` is ours, unsmoothed; that movement small means progress small
       follows from the inequality in `kmeans_batch_update`.
    3. A cluster that receives no point stays where it is; none is reassigned at random.

    References
    ----------
    .. [1] Schwartzman. Mini-batch k-means terminates within O(d/epsilon) iterations. ICLR
       2023. Algorithm 1, Theorem 1.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.clustering import EarlyStopMiniBatchKMeans
    >>> X = np.repeat([[0.0, 0.0], [4.0, 4.0]], 50, axis=0)
    >>> model = EarlyStopMiniBatchKMeans(2, random_state=0).fit(X)
    >>> model.inertia_, model.n_iter_, bool(model.converged_)
    (0.0, 1, True)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        epsilon: float = 0.01,
        batch_size: int | Literal["theory"] = 1024,
        learning_rate: Literal["sqrt", "sklearn"] = "sqrt",
        stop: Literal["progress", "movement"] = "progress",
        init: Any = "k-means++",
        n_init: int = 1,
        max_iter: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.epsilon = epsilon
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.stop = stop
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> "EarlyStopMiniBatchKMeans":
        """Find the centers.

        Parameters
        ----------
        X : array or CSR matrix of shape (n, d)
            Points; float32 stays float32.
        y : None
            Ignored.
        sample_weight : array of shape (n,), optional
            Weights, none negative, not all zero: batches are drawn in proportion.

        Returns
        -------
        EarlyStopMiniBatchKMeans
            The fitted estimator.
        """
        X = _narrow(validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32]))
        n, d = X.shape
        k = integer("n_clusters", self.n_clusters, 1)
        if k > n:
            raise ValueError(f"n_clusters must be at most the number of samples, n_samples={n}, got {k}")
        epsilon = _threshold(self.epsilon, d)
        one_of("learning_rate", self.learning_rate, ("sqrt", "sklearn"))
        one_of("stop", self.stop, ("progress", "movement"))
        integer("n_init", self.n_init, 1)
        max_iter = (
            iteration_bound(d, epsilon) + 1
            if self.max_iter is None
            else integer("max_iter", self.max_iter, 1)
        )
        share = None  # of the rows, cumulated, where their weights differ
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
        if (weight < 0).any() or not weight.sum() > 0:
            raise ValueError(
                f"sample_weight must be non-negative and not all zero, got a minimum of {weight.min()}"
            )
        if sample_weight is not None:
            share = np.cumsum(weight / weight.sum())
        size: int | None
        if self.batch_size == "theory":
            size = sufficient_batch_size(n, d, k, epsilon)
            size = None if size > n else size
        elif isinstance(self.batch_size, str):
            raise ValueError(
                f'batch_size must be "theory" or an integer of at least 1, got {self.batch_size!r}'
            )
        else:
            size = integer("batch_size", self.batch_size, 1)

        seen = X if share is None else X[weight > 0]
        self.scale_ = _largest_range(seen)
        # far from the origin |x|^2 - 2 x c + |c|^2 would cancel; sparse data stay sparse
        self._origin = (
            np.zeros(d, X.dtype) if sparse.issparse(X) else seen.mean(0, dtype=np.float64).astype(X.dtype)
        )
        X = X if sparse.issparse(X) else X - self._origin
        random_state = check_random_state(self.random_state)
        best: tuple[float, Any] | None = None
        for _ in range(self.n_init):
            centers = self._start(X, k, random_state, weight if share is not None else None)
            threshold = epsilon * self.scale_**2
            run = self._run(
                X, centers, size, max_iter, threshold, weight if share is not None else None, random_state
            )
            labels, nearest = _nearest(X, run[0])
            inertia = float(weight @ nearest)
            if best is None or inertia < best[0]:
                best = inertia, (*run, labels)
        assert best is not None
        self.inertia_, (centers, progress, self.converged_, self.labels_) = best
        self.cluster_centers_ = centers + self._origin
        self.progress_ = np.asarray(progress)
        self.n_iter_ = len(progress)
        self._n_features_out = k
        if not self.converged_:
            warnings.warn(
                f"still improving after max_iter={max_iter} steps: raise max_iter, epsilon or batch_size",
                ConvergenceWarning, stacklevel=2,
            )  # fmt: skip
        return self

    def predict(self, X: Any) -> ndarray:
        """Return the index of the nearest center of each point, shape (n,)."""
        return _nearest(*self._around(X))[0]

    def transform(self, X: Any) -> ndarray:
        """Return the distance of each point to each center, shape (n, k)."""
        return euclidean_distances(*self._around(X))

    def score(self, X: Any, y: None = None, sample_weight: Any = None) -> float:
        """Return minus the cost: the summed squared distances to the nearest centers."""
        X, centers = self._around(X)
        return -float(_check_sample_weight(sample_weight, X, dtype=np.float64) @ _nearest(X, centers)[1])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _around(self, X: Any) -> tuple[Any, ndarray]:
        """Return points and centers, both less what they have in common where that keeps zeros."""
        check_is_fitted(self)
        X = _narrow(validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False))
        if sparse.issparse(X):
            return X, self.cluster_centers_
        return X - self._origin.astype(X.dtype), self.cluster_centers_ - self._origin

    def _start(self, X: Any, k: int, random_state: Any, weight: ndarray | None) -> ndarray:
        if isinstance(self.init, str):
            one_of("init", self.init, ("k-means++", "random"))
            if self.init == "k-means++":
                return kmeans_plusplus(X, k, sample_weight=weight, random_state=random_state)[0]
            share = None if weight is None else weight / weight.sum()
            rows = random_state.choice(
                X.shape[0], k, replace=share is not None and (share > 0).sum() < k, p=share
            )
            return X[rows].toarray() if sparse.issparse(X) else X[rows].copy()
        given = self.init
        if callable(given):
            given = given(X if sparse.issparse(X) else X + self._origin, k, random_state)
        centers = np.array(given, dtype=X.dtype)
        if centers.shape != (k, X.shape[1]):
            raise ValueError(
                f"init must have shape ({k}, {X.shape[1]}) for n_clusters and X, got {centers.shape}"
            )
        if not np.isfinite(centers).all():
            raise ValueError("init must be finite, got NaN or infinity")
        return centers - self._origin

    def _run(
        self, X: Any, centers: ndarray, size: int | None, max_iter: int, threshold: float,
        weight: ndarray | None, random_state: Any,
    ) -> tuple[ndarray, list[float], bool]:  # fmt: skip
        counts = np.zeros(len(centers)) if self.learning_rate == "sklearn" else None
        share = None if weight is None else np.cumsum(weight / weight.sum())
        whole = None if weight is None or size is not None else weight * len(weight) / weight.sum()
        progress: list[float] = []
        for step in range(max_iter):
            if size is not None:
                if share is None:
                    rows = random_state.randint(0, X.shape[0], size)
                else:
                    rows = np.searchsorted(share, random_state.random_sample(size) * share[-1], side="right")
            if step == 0 or size is not None:
                batch = X if size is None else X[rows]
                lengths = row_norms(batch, squared=True)
            labels, before = _assign(batch, lengths, centers, whole)
            new = _moved(batch, labels, centers, counts, whole)
            progress.append(float(before - _assign(batch, lengths, new, whole)[1]))
            moved = float(np.square(new - centers, dtype=np.float64).sum())
            centers = new
            # equal points have R = 0: then the first step is the last
            if (progress[-1] if self.stop == "progress" else moved) < threshold or threshold == 0:
                return centers, progress, True
        return centers, progress, False


def _threshold(epsilon: Any, n_features: int) -> float:
    at_least("epsilon", epsilon, 0, strict=True)
    if epsilon >= n_features:
        raise ValueError(
            f"epsilon must be less than n_features={n_features}, got {epsilon}: no step can improve by "
            "more than that, so the run would stop at once"
        )
    return float(epsilon)


def _assign(
    batch: Any, norms: ndarray, centers: ndarray, weight: ndarray | None = None
) -> tuple[ndarray, float]:
    """Return the nearest center of each point (the lowest index of a tie) and the mean cost."""
    gap = safe_sparse_dot(batch, -2 * centers.T, dense_output=True)
    gap += row_norms(centers, squared=True)
    labels = gap.argmin(1)
    nearest = gap[np.arange(len(gap)), labels].astype(np.float64) + norms  # |x|^2 - 2 x c + |c|^2
    return labels, float(np.average(np.maximum(nearest, 0), weights=weight))


def _moved(
    batch: Any, labels: ndarray, centers: ndarray, counts: ndarray | None, weight: ndarray | None = None
) -> ndarray:
    """Return the centers after the step of equation 1, or at scikit-learn's rate with ``counts``."""
    k, b = len(centers), len(labels)
    members = np.bincount(labels, weight, minlength=k).astype(np.float64)
    # sums of each cluster by one product with a sparse one-hot matrix
    each = np.ones(b, dtype=batch.dtype) if weight is None else weight.astype(batch.dtype)
    one_hot = sparse.csr_matrix((each, labels, np.arange(b + 1)), shape=(b, k))
    sums = safe_sparse_dot(one_hot.T, batch, dense_output=True)
    if counts is None:
        rate = np.sqrt(members / b)
    else:
        np.add(counts, members, out=counts, casting="unsafe")  # whole numbers may be kept as integers
        rate = members / np.maximum(counts, 1)
    means = sums / np.where(members > 0, members, 1)[:, None]
    rate = np.where(members > 0, rate, 0.0)[:, None]
    return ((1 - rate) * centers + rate * means).astype(centers.dtype, copy=False)


def _narrow(X: Any) -> Any:
    """Return sparse data with indices of 32 bits, which scikit-learn's distances ask for."""
    if sparse.issparse(X) and X.indices.dtype == np.int64 and max(X.nnz, *X.shape) < 2**31:
        X = sparse.csr_matrix((X.data, X.indices.astype(np.int32), X.indptr.astype(np.int32)), X.shape)
    return X


def _nearest(X: Any, centers: ndarray) -> tuple[ndarray, ndarray]:
    """Return label and squared distance of every point, in chunks of bounded memory."""
    labels, nearest = pairwise_distances_argmin_min(X, centers, metric="sqeuclidean")
    return labels.astype(np.int32), nearest.astype(np.float64)


def _largest_range(X: Any) -> float:
    if sparse.issparse(X):
        return float((X.max(axis=0) - X.min(axis=0)).max())
    return float(np.ptp(X, axis=0).max())
