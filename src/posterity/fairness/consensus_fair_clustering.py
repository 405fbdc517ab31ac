"""Consensus fair clustering: learn from many plain clusterings, and from the group labels only how to mix.

A network z and centers c are trained on all samples at once for

    L_con + alpha L_fair + beta L_struct                                               (1)

(`posterity.fairness.consensus_losses`). The first term pulls together what k-means on halves of
the samples and features puts together most of the time,

    A_ij = share of the runs in which i and j have one cluster,                        (2)

and no group label has a part in it. The second wants every cluster to hold some of every group,
the third that who is together within a group stays together. So a tampered group label moves a
sample's account from one group to the other, but not the sample from where its neighbours are.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from posterity._checks import at_least, integer, within
from posterity._random import seeded
from posterity.fairness.consensus_losses import SLACK, contrast, divergence, soft_assignment, structure
from posterity.fairness.fairness_attack import _codes, _groups, cluster_balance

__all__ = ["ConsensusFairClustering", "coassociation_matrix"]

FAIR_ENOUGH = 0.5  # balance at which no other start is tried


def coassociation_matrix(
    X: Any,
    n_clusters: int,
    *,
    n_runs: int = 100,
    sample_fraction: float = 0.5,
    feature_fraction: float = 0.5,
    random_state: Any = None,
) -> Float[ndarray, "n n"]:
    """Return how often two samples share a cluster of k-means, equation 2.

    Parameters
    ----------
    X : array of shape (n, d)
        Samples.
    n_clusters : int
        Clusters of each run, at least 1 and at most n.
    n_runs : int, default=100
        Runs, at least 1.
    sample_fraction, feature_fraction : float, default=0.5
        Share of the samples and features that a run is fitted on, in (0, 1]; at least
        ``n_clusters`` samples and one feature. It assigns all samples.
    random_state : int, RandomState or None, default=None
        Decides samples, features and starts.

    Returns
    -------
    ndarray of shape (n, n)
        Symmetric, in [0, 1], its diagonal 1.

    Raises
    ------
    ValueError
        If the data are no finite numbers or an option is out of range.

    References
    ----------
    .. [1] Fred, Jain. Combining Multiple Clusterings Using Evidence Accumulation. IEEE TPAMI 2005.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.fairness import coassociation_matrix
    >>> coassociation_matrix(np.array([[0.0], [0.1], [9.0]]), 2, sample_fraction=1.0, random_state=0)
    array([[1., 1., 0.],
           [1., 1., 0.],
           [0., 0., 1.]])
    """
    X = check_array(X, dtype=np.float64, input_name="X")
    n, d = X.shape
    k = integer("n_clusters", n_clusters, 1)
    if k > n:
        raise ValueError(f"n_clusters must be at most the number of samples, {n}, got {k}")
    n_runs = integer("n_runs", n_runs, 1)
    n_rows = max(k, round(n * within("sample_fraction", sample_fraction, 0, 1, open_low=True)))
    n_columns = max(1, round(d * within("feature_fraction", feature_fraction, 0, 1, open_low=True)))
    rng = check_random_state(random_state)
    member = np.zeros((n, n_runs * k), dtype=np.float32)  # counts below 2^24 are exact
    for run in range(n_runs):
        rows, columns = rng.permutation(n)[:n_rows], rng.permutation(d)[:n_columns]
        seen = X[:, columns]
        means = KMeans(k, n_init=1, random_state=rng.randint(2**31 - 1)).fit(seen[rows])
        labels = np.asarray(means.predict(seen))
        member[np.arange(n), run * k + labels] = 1
    return (member @ member.T).astype(np.float64) / n_runs


class ConsensusFairClustering(ClusterMixin, BaseEstimator):
    """Deep clustering that mixes the groups, and goes on doing so where some group labels are false.

    Parameters
    ----------
    n_clusters : int, default=8
        Clusters, at least 2.
    alpha, beta : float, default=10.0 and 50.0
        Weights of L_fair and L_struct in equation 1, at least 0. These losses are sums: the one
        grows with the samples, the other with their square. The defaults suit a few thousand;
        for a few hundred take a smaller beta.
    order, temperature : int and float, default=2 and 2.0
        See `consensus_contrastive_loss`.
    hidden, dropout : int and float, default=64 and 0.6
        Width of the network, at least 1, and the share of units it drops, in [0, 1).
    lr, weight_decay : float, default=0.01 and 5e-3
        Of Adam: the first positive, the second at least 0, added to the gradient of all
        parameters.
    epochs : int, default=400
        Steps, each on all samples; at least 1.
    n_init : int, default=3
        Starts at most, at least 1: see Notes.
    reference : "per-group" or array of shape (n,), default="per-group"
        The clustering Y: k-means on each group by itself, or labels of your own.
    coassociation : array of shape (n, n), optional
        A of equation 2, in [0, 1]; by default `coassociation_matrix` of the data. It does not
        depend on the groups: who clusters the same samples often computes it once.
    n_runs : int, default=100
        Runs of k-means for it, at least 1.
    random_state : int, RandomState or None, default=None
        Decides runs, initial weights and dropout.
    device : str, default="cpu"
        Where to train, as torch names it.

    Attributes
    ----------
    labels_ : ndarray of shape (n,)
    loss_ : float
        Equation 1 after training, without dropout.
    balance_ : float
        `cluster_balance` of the labels on the groups that were given.
    coassociation_ : ndarray of shape (n, n)
    net_ : nn.Sequential
    cluster_centers_ : ndarray of shape (n_clusters, hidden)
        Centers of the latent rows.
    n_features_in_ : int

    Raises
    ------
    ValueError
        At ``fit``, if ``sensitive_features`` are missing, of another length, one group, or with
        "per-group" a group smaller than ``n_clusters``; if the data, reference or
        co-association do not fit or a parameter is out of range; if the loss is not finite.

    Notes
    -----
    1. Some starts collapse: a cluster without one of the groups, or none at all. The official
       code trains again until the balance *on the groups that it was given* passes a threshold
       of the data set. Here up to ``n_init`` starts are made, and no more once one uses all
       clusters with a balance of 0.5. Kept is one with all clusters in use, if there is any; of
       those the one of the highest balance; of equals that of the lowest loss. So the groups
       choose among the starts.
    2. The maker of the official reference labels is not public; k-means on each group is how
       the paper is understood here.
    3. Data are centred and divided by one number, their overall standard deviation: results do
       not depend on origin and unit. Features of different units are yours to scale.
    4. Official settings: 3,000 epochs, hidden 256 (36 for digits); alpha, beta and order 1, 100,
       1 for Office-31, 100, 25, 2 for MNIST-USPS, 50, 10, 2 for Yale, 10, 50, 2 for digits.
    5. Memory and time of a step grow like n^2.

    References
    ----------
    .. [1] Chhabra, Li, Mohapatra, Liu. Robust Fair Clustering: A Novel Fairness Attack and
       Defense Framework. ICLR 2023. Section 3.

    Examples
    --------
    Two groups, and three classes that each has:

    >>> import numpy as np
    >>> from posterity.fairness import ConsensusFairClustering
    >>> rng = np.random.default_rng(0)
    >>> groups, classes = np.arange(60) % 2, np.arange(60) % 3
    >>> X = rng.normal(8.0 * np.eye(3)[classes] + 0.5 * groups[:, None])
    >>> model = ConsensusFairClustering(3, beta=5.0, epochs=60, n_runs=20, random_state=0)
    >>> labels = model.fit_predict(X, sensitive_features=groups)
    >>> len(set(zip(labels, classes))), model.balance_ > 0.5
    (3, True)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        alpha: float = 10.0,
        beta: float = 50.0,
        order: int = 2,
        temperature: float = 2.0,
        hidden: int = 64,
        dropout: float = 0.6,
        lr: float = 0.01,
        weight_decay: float = 5e-3,
        epochs: int = 400,
        n_init: int = 3,
        reference: Any = "per-group",
        coassociation: Any = None,
        n_runs: int = 100,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_clusters = n_clusters
        self.alpha = alpha
        self.beta = beta
        self.order = order
        self.temperature = temperature
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.n_init = n_init
        self.reference = reference
        self.coassociation = coassociation
        self.n_runs = n_runs
        self.random_state = random_state
        self.device = device

    @torch.inference_mode(False)  # grad mode too
    def fit(self, X: Any, y: None = None, *, sensitive_features: Any = None) -> "ConsensusFairClustering":
        """Train the network and cluster the samples.

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
        ConsensusFairClustering
            The fitted estimator.
        """
        self._check_parameters()
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        if self.n_clusters > len(X):
            raise ValueError(
                f"n_clusters must be at most the number of samples, {len(X)}, got {self.n_clusters}"
            )
        groups = _groups("sensitive_features", sensitive_features, len(X))
        rng = check_random_state(self.random_state)
        seeds = [int(seed) for seed in rng.randint(2**31 - 1, size=2 + self.n_init)]
        self._origin = X.mean(0)
        X = X - self._origin
        self._unit = float(X.std()) or 1.0
        X = X / self._unit
        reference = self._reference(X, groups, seeds[0])
        if self.coassociation is None:
            self.coassociation_ = coassociation_matrix(
                X, self.n_clusters, n_runs=self.n_runs, random_state=seeds[1]
            )
        else:
            self.coassociation_ = _consensus(self.coassociation, len(X))
        weight = np.linalg.matrix_power(self.coassociation_, self.order)
        parts = [torch.from_numpy(part).to(self.device, torch.float32) for part in (X, weight, reference)]
        rows = [
            torch.from_numpy(np.flatnonzero(groups == g)).to(self.device) for g in range(groups.max() + 1)
        ]
        best: tuple[tuple[int, float, float], Any] | None = None
        for seed in seeds[2:]:
            net, centers, loss = self._train(*parts, rows, seed)
            labels = _assigned(net, parts[0], centers)
            balance, used = cluster_balance(labels, groups), len(np.unique(labels))
            rank = (used, balance, -loss)
            if best is None or rank > best[0]:
                best = rank, (net, centers, labels)
            if used == self.n_clusters and balance >= FAIR_ENOUGH:
                break
        assert best is not None
        (_, self.balance_, loss), (self.net_, centers, self.labels_) = best
        self.loss_ = -loss
        self.cluster_centers_ = centers.cpu().numpy()
        return self

    def predict(self, X: Any) -> ndarray:
        """Return the cluster of each row, shape (n,), whatever its group."""
        check_is_fitted(self)
        X = (validate_data(self, X, reset=False, dtype=np.float64) - self._origin) / self._unit
        weight = next(self.net_.parameters())
        return _assigned(
            self.net_, torch.from_numpy(X).to(weight), torch.as_tensor(self.cluster_centers_).to(weight)
        )

    def _check_parameters(self) -> None:
        for name, low in (
            ("n_clusters", 2), ("order", 1), ("hidden", 1), ("epochs", 1), ("n_init", 1), ("n_runs", 1),
        ):  # fmt: skip
            integer(name, getattr(self, name), low)
        for name in ("alpha", "beta", "weight_decay"):
            at_least(name, getattr(self, name), 0)
        for name in ("temperature", "lr"):
            at_least(name, getattr(self, name), 0, strict=True)
        within("dropout", self.dropout, 0, 1, open_high=True)

    def _reference(self, X: ndarray, groups: ndarray, seed: int) -> ndarray:
        """Return one-hot labels of the reference."""
        n, k = len(X), self.n_clusters
        if not isinstance(self.reference, str):
            codes, names = _codes("reference", self.reference)
            if len(codes) != n:
                raise ValueError(f"reference must have a label for each of the {n} samples, got {len(codes)}")
            return np.eye(len(names))[codes]
        if self.reference != "per-group":
            raise ValueError(f"reference must be 'per-group' or an array of labels, got {self.reference!r}")
        sizes = np.bincount(groups)
        if sizes.min() < k:
            raise ValueError(
                f"sensitive_features must give each group n_clusters={k} samples for the reference 'per-group', "
                f"got a group of {sizes.min()}"
            )
        codes = np.empty(n, dtype=np.int64)
        for g in range(len(sizes)):
            codes[groups == g] = KMeans(k, n_init=10, random_state=seed).fit_predict(X[groups == g])
        return np.eye(k)[codes]

    def _train(
        self, X: Tensor, weight: Tensor, reference: Tensor, rows: list[Tensor], seed: int
    ) -> tuple[nn.Sequential, Tensor, float]:
        """Train from one start; return network, centers and loss."""
        device = X.device

        def loss() -> Tensor:
            z = net(X)
            q = soft_assignment(z, centers)
            value = contrast(z, weight, self.temperature)
            return value + self.alpha * divergence(q, rows) + self.beta * structure(q, reference, rows)

        with seeded(seed, device), torch.autocast(device.type, enabled=False):  # initial weights and dropout
            net = _network(X.shape[1], self.hidden, self.dropout).to(device)
            centers = nn.init.xavier_uniform_(torch.empty(self.n_clusters, self.hidden)).to(device)
            centers.requires_grad_()
            optimizer = torch.optim.Adam(
                [*net.parameters(), centers], lr=self.lr, weight_decay=self.weight_decay, fused=True
            )
            for _ in range(self.epochs):
                value = loss()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            net.eval()
            with torch.no_grad():
                final = float(loss())
        if not np.isfinite(final):
            raise ValueError(f"the loss is {final} after {self.epochs} epochs: lower lr={self.lr}")
        return net.requires_grad_(False), centers.detach(), final


def _network(n_features: int, hidden: int, dropout: float) -> nn.Sequential:
    """Return the network with its initial weights."""
    net = nn.Sequential(
        nn.Linear(n_features, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=1e-6), nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
    return net


@torch.no_grad()
def _assigned(net: nn.Module, X: Tensor, centers: Tensor) -> ndarray:
    """Return the cluster with the largest share: that of the nearest center."""
    with torch.autocast(X.device.type, enabled=False):
        return soft_assignment(net(X), centers).argmax(1).cpu().numpy()


def _consensus(given: Any, n: int) -> ndarray:
    """Return a co-association of n samples."""
    matrix = np.asarray(given)
    if matrix.dtype.kind not in "iufb" or matrix.shape != (n, n):
        raise ValueError(
            f"coassociation must be numbers of shape ({n}, {n}), got {matrix.dtype} {matrix.shape}"
        )
    matrix = matrix.astype(np.float64)
    if not ((matrix >= 0) & (matrix <= 1 + SLACK)).all():
        raise ValueError(
            f"coassociation must be in [0, 1], got values from {matrix.min():g} to {matrix.max():g}"
        )
    return matrix
