"""Cluster discrimination with random classes and random features: embeddings from clusters that contradict each other.

Each cluster of unlabelled data is a class with a prototype w_k, and a margin softmax tells the classes apart,

    L = - log exp(s f(c_y)) / ( exp(s f(c_y)) + sum_{k in K, k != y} exp(s c_k) ) ,   c_k = cos(z_M, w_k,M),

with f(c) = cos(arccos c + margin). Many clusters show the same thing: that a sample is pushed from them is a
conflict. So each step sees a random part K of the classes, its own among them, and fewer conflicts; and a random
part M of the dimensions, taken before the cosine, so that any part of an embedding has to serve as all of it does.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, finite, floating, has_shape, integer, one_of, within
from posterity._precision import wide, widened
from posterity._random import draw_device
from posterity.representation.retrieval import unit_rows

__all__ = ["ClusterDiscrimination", "cluster_labels"]

MANY = 100_000  # classes from which on none is listed to draw some
EDGE = 1e-7  # how near to 1 a cosine may come where it is differentiated


class ClusterDiscrimination(nn.Module):
    """Margin softmax over a random part of the classes and of the features, called as proxy losses are.

    Parameters
    ----------
    dim, n_classes : int
        Width of embeddings; clusters, at least 2.
    angular_margin : float, default=0.3
        Added to the angle with the own prototype, in radians.
    additive_margin : float, default=0.0
        Taken off the cosine with the own prototype; where it is not 0 it takes the place of the angular one, of
        which then no other than the default may be given.
    scale : float, default=32.0
        s.
    class_rate : float, default=1.0
        Share of the classes that a step sees, in (0, 1]; those of the batch always.
    n_features : int, optional
        Dimensions that a step sees; None: all.
    filter_threshold : float, default=0.0
        Cosines with other prototypes above it count as 0, as of the same content; 0: none.
    margin_gradient : {"straight-through", "exact"}, default="straight-through"
        Whether the gradient takes the margin for a constant, which has no pole at cosines of 1, or
        differentiates it.
    sparse : bool, default=False
        Whether the gradient of prototypes is sparse, for `torch.optim.SparseAdam` and a million classes.

    Attributes
    ----------
    weight : Parameter of shape (n_classes, dim)
        The prototypes; they start normal with a deviation of 0.01. Give them a parameter group with 5 to 10 times
        the network's rate, and no weight decay, which would shrink prototypes that are not seen.

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if embeddings, labels, classes or features do not fit.

    Notes
    -----
    The mean is over a batch whose samples do not meet: with batches of one size on several processes, averaged
    gradients are those of the joint batch, each process with classes of its own. To shard a million classes, the
    log-sum-exp is reduced over shards by ``all_reduce`` of its maximum and then of the sum; not included.

    References
    ----------
    .. [1] An, Deng, Yang, Li, Feng, Guo, Yang, Liu. Unicom: Universal and Compact Representation Learning for
       Image Retrieval. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import ClusterDiscrimination
    >>> loss = ClusterDiscrimination(dim=32, n_classes=100, class_rate=0.1, n_features=16)
    >>> z = torch.randn(8, 32, requires_grad=True)  # your network's, not normalised
    >>> loss(z, torch.arange(8)).backward()
    """

    def __init__(
        self, dim: int, n_classes: int, *, angular_margin: float = 0.3, additive_margin: float = 0.0,
        scale: float = 32.0, class_rate: float = 1.0, n_features: int | None = None, filter_threshold: float = 0.0,
        margin_gradient: Literal["straight-through", "exact"] = "straight-through", sparse: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.n_classes = integer("dim", dim, 1), integer("n_classes", n_classes, 2)
        self.angular_margin = at_least("angular_margin", angular_margin, 0)
        self.additive_margin = at_least("additive_margin", additive_margin, 0)
        if additive_margin and angular_margin not in (0, 0.3):  # another than the default was asked for
            raise ValueError(
                f"choose one margin: got additive_margin={additive_margin} and angular_margin={angular_margin}"
            )
        self.scale = at_least("scale", scale, 0, strict=True)
        self.class_rate = within("class_rate", class_rate, 0, 1, open_low=True)
        self.n_features = dim if n_features is None else integer("n_features", n_features, 1)
        within("n_features", self.n_features, 1, dim)
        self.filter_threshold = at_least("filter_threshold", filter_threshold, 0)
        self.margin_gradient = one_of("margin_gradient", margin_gradient, ("straight-through", "exact"))
        self.sparse = bool(sparse)
        self.weight = nn.Parameter(torch.randn(n_classes, dim) * 0.01)

    def forward(
        self, embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], *,
        classes: Int[Tensor, " k"] | None = None, features: Int[Tensor, " m"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the mean loss of a batch.

        Parameters
        ----------
        embeddings : Tensor of shape (n, dim)
            Of any length.
        labels : Tensor of shape (n,)
            Clusters, int64.
        classes : Tensor of shape (k,), optional
            Sorted different classes that the step sees; None: drawn by ``class_rate``.
        features : Tensor of shape (m,), optional
            Different dimensions that it sees; None: drawn by ``n_features``.
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape ()
        """
        self._check(embeddings, labels)
        if classes is not None:
            classes = self._checked_classes(classes, labels)
        elif self.class_rate < 1:
            classes = self.sample_classes(labels, generator)
        if features is not None:
            features = _checked_features(features, self.dim)
        elif self.n_features < self.dim:
            features = self.sample_features(generator)
        weight, target = self.weight, labels
        if classes is not None:
            weight, target = (
                F.embedding(classes, weight, sparse=self.sparse),
                torch.searchsorted(classes, labels),
            )
        elif self.sparse:
            weight = F.embedding(torch.arange(self.n_classes, device=weight.device), weight, sparse=True)
        if features is not None:
            embeddings, weight = embeddings.index_select(1, features), weight.index_select(1, features)
        return self._value(embeddings, weight, target)

    @torch.no_grad()
    def sample_classes(
        self, labels: Int[Tensor, " n"], generator: torch.Generator | None = None
    ) -> Int[Tensor, " k"]:
        """Return the classes of a step: those of the batch, and others at random up to ``class_rate`` of all.

        Parameters
        ----------
        labels : Tensor of shape (n,)
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape (k,)
            Sorted, different, on the device of the labels. Where the batch has more, exactly those of the batch.
        """
        class_indices("labels", labels, len(labels), self.n_classes)
        own = labels.unique().long()
        missing = int(self.class_rate * self.n_classes) - len(own)
        if missing <= 0:
            return own
        where, rest = draw_device(generator, labels.device), self.n_classes - len(own)
        if self.n_classes <= MANY or missing > rest / 4:
            others = torch.ones(self.n_classes, dtype=torch.bool, device=labels.device).index_fill(
                0, own, False
            )
            order = torch.randperm(rest, generator=generator, device=where)[:missing].to(labels.device)
            drawn = others.nonzero()[:, 0][order]
        else:
            drawn = own.new_empty(0)
            while len(drawn) < missing:
                more = torch.randint(self.n_classes, (2 * missing,), generator=generator, device=where)
                more = more.to(own.device)
                drawn = torch.cat([drawn, more[~torch.isin(more, own)]]).unique()
            order = torch.randperm(len(drawn), generator=generator, device=where)[:missing]
            drawn = drawn[order.to(own.device)]
        return torch.cat([own, drawn]).sort().values

    @torch.no_grad()
    def sample_features(self, generator: torch.Generator | None = None) -> Int[Tensor, " m"]:
        """Return the dimensions of a step, ``n_features`` different ones.

        Parameters
        ----------
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape (n_features,)
        """
        where = draw_device(generator, self.weight.device)
        return torch.randperm(self.dim, generator=generator, device=where)[: self.n_features].to(
            self.weight.device
        )

    @widened
    def _value(self, embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        cosine = unit_rows(embeddings) @ F.normalize(weight.to(embeddings.dtype), dim=1).T
        cosine, own = cosine.clamp(-1, 1), target[:, None]
        kept = cosine.gather(1, own)
        if self.filter_threshold:
            cosine = cosine.masked_fill(cosine.detach() > self.filter_threshold, 0)
        return F.cross_entropy(self.scale * cosine.scatter(1, own, self._with_margin(kept)), target)

    def _with_margin(self, c: Tensor) -> Tensor:
        if self.additive_margin or not self.angular_margin:
            return c - self.additive_margin
        if self.margin_gradient == "exact":
            return (c.clamp(EDGE - 1, 1 - EDGE).acos() + self.angular_margin).cos()
        return c + ((c.detach().acos() + self.angular_margin).cos() - c.detach())

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        has_shape("embeddings", floating("embeddings", embeddings), (None, self.dim))
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64, got {getattr(labels, 'dtype', type(labels).__name__)}")
        class_indices("labels", labels, len(embeddings), self.n_classes)
        if len(labels) == 0:
            raise ValueError("embeddings must have at least one row, got none")

    def _checked_classes(self, classes: Tensor, labels: Tensor) -> Tensor:
        classes = _indices("classes", classes, self.n_classes)
        if classes.device.type != "cpu":
            return classes
        if not bool((classes[1:] > classes[:-1]).all()):
            raise ValueError("classes must be sorted and different")
        lacking = labels[~torch.isin(labels, classes)]
        if len(lacking):
            raise ValueError(f"classes must contain every label, they lack {int(lacking[0])}")
        return classes


def _checked_features(features: Tensor, dim: int) -> Tensor:
    features = _indices("features", features, dim)
    if features.numel() == 0 or (features.device.type == "cpu" and len(features.unique()) < len(features)):
        raise ValueError("features must be different dimensions, one at least")
    return features


def _indices(name: str, value: Tensor, n: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of one axis, got {shape}")
    return class_indices(name, value, len(value), n).long()


@torch.no_grad()
def cluster_labels(
    features: Float[Tensor, "n dim"], n_clusters: int, *, text_features: Float[Tensor, "n dim"] | None = None,
    max_iter: int = 20, batch_size: int = 8192, random_state: int | None = None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n_clusters dim"]]:  # fmt: skip
    """Return clusters of directions: k-means on the sphere, to be told apart by `ClusterDiscrimination`.

    Parameters
    ----------
    features : Tensor of shape (n, dim)
        Rows of any length but 0, as those of CLIP's image encoder.
    n_clusters : int
        At most n.
    text_features : Tensor of shape (n, dim), optional
        Of the captions: the sum of both directions is clustered.
    max_iter : int, default=20
        Rounds, at most; it ends where no label changes.
    batch_size : int, default=8192
        Rows at a time.
    random_state : int, optional
        Decides which rows the centres start at.

    Returns
    -------
    tuple of Tensor of shape (n,) and Tensor of shape (n_clusters, dim)
        Labels and centres of norm 1. A cluster that loses all rows takes the one farthest from its centre in the
        next round; one that the last round empties stays so.

    Raises
    ------
    ValueError
        If an argument does not fit, or a row is 0 or not finite.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import cluster_labels
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> labels, centres = cluster_labels(x, 2, random_state=0)
    >>> bool(labels[0] == labels[1] and labels[2] == labels[3] and labels[0] != labels[2])
    True
    """
    u = _directions("features", features)
    if text_features is not None:
        has_shape(
            "text_features", floating("text_features", text_features), tuple(features.shape), "features"
        )
        u = _directions("features plus text_features", u + _directions("text_features", text_features).to(u))
    if not 1 <= integer("n_clusters", n_clusters) <= len(u):
        raise ValueError(f"n_clusters must be in 1..{len(u)}, got {n_clusters}")
    integer("max_iter", max_iter, 1)
    integer("batch_size", batch_size, 1)
    start = check_random_state(random_state).permutation(len(u))[:n_clusters]
    centres = u[torch.from_numpy(start).to(u.device)]
    labels, near = _assigned(u, centres, batch_size)
    for _ in range(max_iter):
        empty = (labels.bincount(minlength=n_clusters) == 0).nonzero()[:, 0]
        labels[near.topk(len(empty), largest=False).indices] = empty  # what has its centre farthest away
        sums = torch.zeros_like(centres).index_add_(0, labels, u)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
        before = labels
        labels, near = _assigned(u, centres, batch_size)
        if not len(empty) and torch.equal(labels, before):
            break
    return labels, centres.to(features.dtype)


def _assigned(u: Tensor, centres: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the nearest centre of each row, and its cosine."""
    with torch.autocast(u.device.type, enabled=False):
        best = [(part @ centres.T).max(1) for part in u.split(batch_size)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _directions(name: str, x: Tensor) -> Tensor:
    has_shape(name, floating(name, x), (None, None))
    if 0 in x.shape:
        raise ValueError(f"{name} must have a row and a column, got shape {tuple(x.shape)}")
    x = wide(finite(name, x))
    zero = (x == 0).all(1).nonzero()
    if len(zero):
        raise ValueError(f"{name} must have a direction in every row, row {int(zero[0])} is 0")
    return unit_rows(x)
