"""Fair spectral clustering: the cut of a neighbour graph, among those that mix the groups evenly.

With the Laplacian L of the graph of nearest neighbours, and F the indicators of the groups less
their shares, an assignment H mixes the groups evenly if F'H = 0. So it is sought among

    H = Z Y,    Y = argmin tr(Y' Z' L Z Y)  with  Y'Y = I,                        (1)

Z an orthonormal basis of the vectors that F' maps to 0: Y is the eigenvectors of Z'LZ with the
smallest eigenvalues, and k-means on the rows of H makes clusters of it. That last step knows
nothing of the groups, and where the graph says loudly that they are apart, neither do the
clusters mix. It is the method whose fairness is attacked.
"""

from typing import Any

import numpy as np
from numpy import ndarray
from scipy import linalg
from scipy.sparse.csgraph import laplacian
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.neighbors import kneighbors_graph
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from posterity._checks import integer
from posterity.fairness.fairness_attack import _groups

__all__ = ["FairSpectralClustering"]


class FairSpectralClustering(ClusterMixin, BaseEstimator):
    """Spectral clustering under the linear constraint that clusters mix the groups evenly.

    Parameters
    ----------
    n_clusters : int, default=8
        Clusters, at least 2.
    n_neighbors : int, default=3
        Neighbours of each sample in the graph, at least 1 and fewer than the samples. Two
        samples are joined if either is a neighbour of the other.
    random_state : int, RandomState or None, default=None
        Decides the starts of k-means.

    Attributes
    ----------
    labels_ : ndarray of shape (n,)
    embedding_ : ndarray of shape (n, n_clusters)
        H of equation 1, whose rows k-means groups.
    n_features_in_ : int

    Raises
    ------
    ValueError
        At ``fit``, if ``sensitive_features`` are missing, of another length or one group, or a
        parameter does not fit the number of samples.

    Notes
    -----
    1. Time grows like n^3 and memory like n^2: the eigenvectors are those of a dense matrix.

    References
    ----------
    .. [1] Kleindessner, Samadi, Awasthi, Morgenstern. Guarantees for Spectral Clustering with
       Fairness Constraints. ICML 2019. Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.fairness import FairSpectralClustering
    >>> X = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    >>> model = FairSpectralClustering(2, n_neighbors=2, random_state=0)
    >>> labels = model.fit_predict(X, sensitive_features=[0, 1, 0, 0, 1, 0])
    >>> bool(labels[0] == labels[1] == labels[2] != labels[3] == labels[4] == labels[5])
    True
    """

    def __init__(self, n_clusters: int = 8, *, n_neighbors: int = 3, random_state: Any = None) -> None:
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.random_state = random_state

    def fit(self, X: Any, y: None = None, *, sensitive_features: Any = None) -> "FairSpectralClustering":
        """Cluster the samples.

        Parameters
        ----------
        X : array of shape (n, d)
            Samples.
        y : None
            Ignored.
        sensitive_features : array of shape (n,)
            The group of each sample: at least two.

        Returns
        -------
        FairSpectralClustering
            The fitted estimator.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        n, groups = len(X), _groups("sensitive_features", sensitive_features, len(X))
        k, neighbors = integer("n_clusters", self.n_clusters, 2), integer("n_neighbors", self.n_neighbors, 1)
        if neighbors >= n:
            raise ValueError(f"n_neighbors must be less than the number of samples, {n}, got {neighbors}")
        indicators = np.eye(groups.max() + 1)[groups][:, 1:]  # those of all groups sum to 1: one is dropped
        if k > n - indicators.shape[1]:
            raise ValueError(f"n_clusters must be at most {n - indicators.shape[1]} for {n} samples, got {k}")
        graph = kneighbors_graph(X - X.mean(0), neighbors, include_self=False)
        basis = linalg.qr(indicators - indicators.mean(0))[0][:, indicators.shape[1] :]
        quadratic = basis.T @ (laplacian(graph.maximum(graph.T)) @ basis)
        _, vectors = linalg.eigh(quadratic, subset_by_index=[0, k - 1])
        self.embedding_: ndarray = basis @ vectors
        means = KMeans(k, n_init=10, random_state=check_random_state(self.random_state))
        self.labels_: ndarray = means.fit_predict(self.embedding_)
        return self
