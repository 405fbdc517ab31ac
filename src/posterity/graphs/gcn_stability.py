"""Graph convolutions that survive collapsing strong edges: filters of the resolvent.

With edge weights w and node weights mu, the Laplacian (L f)_i = (1/mu_i) sum_{j->i} w_ij (f_i - f_j)
diverges as some edges grow strong, but its resolvent does not:

    R = s (L + s)^(-1),      y = sum_{k=1..K} R^k x W_k + b,      s > 0.           (1)

As the strong weights grow, R tends to J R_c J*, the resolvent of the coarse graph in which
nodes joined by strong edges are one node; J copies a value to all nodes of a cluster, J*
takes the mean. So a network of such layers gives the same answer for an object at either
resolution. Polynomials of L, and the normalised adjacency, do not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.polynomial import Polynomial
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity.graphs._graph import check_edges

__all__ = [
    "Coarsening", "CollapseBound", "ResolventConv", "StableGCN", "apply_filter", "collapse_bound",
    "collapse_strong_edges", "filter_gain", "stability_bound",
]  # fmt: skip

LARGEST_DENSE = 2_000  # nodes; beyond, a sparse factorisation
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "abs": torch.abs}


class ResolventConv(nn.Module):
    """A graph convolution whose filter is a polynomial of the resolvent, equation 1.

    Parameters
    ----------
    in_channels, out_channels : int
        Features of a node before and after.
    order : int, default=1
        Highest power of the resolvent, at least 1.
    shift : float, default=1.0
        s in equation 1, positive: edges much stronger than it join their nodes.
    identity : bool, default=False
        Whether to add ``x W_0``, which lets differences inside a cluster pass.
    bias : bool, default=True
        Whether to add b.
    cached : bool, default=False
        Whether to factor the first graph, weights taken as constants, and use it ever after.

    Attributes
    ----------
    weight : nn.Parameter
        Shape (order + identity, in_channels, out_channels); the first is W_0 if ``identity``.
    bias : nn.Parameter or None
        Shape (out_channels,).

    Raises
    ------
    ValueError
        If a parameter is out of range, the graph does not fit, or (on the CPU, where
        reading is free) a weight is not positive and finite.

    Notes
    -----
    1. Edges point from row 0 of ``edge_index`` to row 1; an undirected graph lists both ways.
       On a directed graph R is row-stochastic, but the certificates below do not hold.
    2. The graph is factored once a call, in float64 whatever the dtype of ``x``: dense up to
       2,000 nodes, sparse (on the CPU) above. Gradients reach edge and node weights.

    References
    ----------
    .. [1] Koke. Limitless Stability for Graph Convolutional Networks. ICLR 2023.

    Examples
    --------
    An edge of weight 1e8 makes two nodes one; the third, without edges, keeps its value:

    >>> import torch
    >>> from posterity.graphs import ResolventConv
    >>> conv = ResolventConv(1, 1, bias=False)
    >>> _ = conv.weight.data.fill_(1.0)
    >>> x, edge_index = torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([[0, 1], [1, 0]])
    >>> conv(x, edge_index, torch.tensor([1e8, 1e8])).detach().flatten()
    tensor([2., 2., 7.])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        order: int = 1,
        *,
        shift: float = 1.0,
        identity: bool = False,
        bias: bool = True,
        cached: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.order = integer("order", order, 1)
        self.shift = at_least("shift", shift, 0, strict=True)
        self.identity, self.cached = identity, cached
        self.weight = nn.Parameter(torch.empty(order + identity, in_channels, out_channels))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and forget a cached graph."""
        bound = math.sqrt(6 / (self.in_channels + self.out_channels))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self._resolvent: _Resolvent | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resolvent": None}  # a sparse factorisation cannot be pickled

    def forward(
        self,
        x: Float[Tensor, "*lead nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        node_weight: Float[Tensor, " nodes"] | None = None,
    ) -> Float[Tensor, "*lead nodes out"]:
        """Return the features after the layer; leading axes of ``x`` share the graph."""
        _check_features(x, self.in_channels)
        resolvent = self._resolvent
        if resolvent is None:
            graph = _Graph.of(edge_index, x.shape[-2], edge_weight, node_weight, x.device)
            resolvent = _Resolvent(graph.detach() if self.cached else graph, self.shift)
        elif resolvent.graph.n != x.shape[-2]:
            raise ValueError(f"x must have {resolvent.graph.n} nodes as the cached graph, got {x.shape[-2]}")
        if self.cached:
            self._resolvent = resolvent
        return self._filter(x, resolvent, self.weight)

    def _filter(self, x: Tensor, resolvent: "_Resolvent", weight: Tensor) -> Tensor:
        x = x.movedim(-2, 0)
        rest = weight[1:] if self.identity else weight
        if self.in_channels <= self.out_channels:  # solve for the narrower side
            power = resolvent(x)
            y = power @ rest[0]
            for W in rest[1:]:
                power = resolvent(power)
                y = y + power @ W
        else:  # Horner's rule: R (x W_1 + R (x W_2 + ...))
            y = resolvent(x @ rest[-1])
            for W in rest[:-1].flip(0):
                y = resolvent(x @ W + y)
        y = y + x @ weight[0] if self.identity else y
        return (y if self.bias is None else y + self.bias).movedim(0, -2)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        return (
            f"{self.in_channels}, {self.out_channels}, order={self.order}, shift={self.shift}, "
            f"identity={self.identity}"
        )


class StableGCN(nn.Module):
    """Resolvent convolutions for nodes or graphs, which factor the graph once a call.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels : int
        Features of a node, width, and outputs of a node or graph.
    num_layers : int, default=2
        How many convolutions, at least 1.
    order : int, default=2
        As for `ResolventConv`.
    shift : float, default=1.0
        As for `ResolventConv`.
    identity : bool, default=False
        As for `ResolventConv`.
    act : {"relu", "tanh", "abs"}, default="relu"
        After each convolution: 1-Lipschitz, and 0 at 0.
    pool : {"mean"} or None, default=None
        The mean over each graph's nodes by their weights, before the readout; None keeps nodes.
    max_gain : float, optional
        Positive: each layer's weights are scaled down in the forward pass so that its
        `filter_gain` is at most this. The supremum is found on the CPU.

    Attributes
    ----------
    convs : nn.ModuleList
        The layers.
    readout : nn.Linear
        Maps to the outputs.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.

    References
    ----------
    .. [1] Koke. Limitless Stability for Graph Convolutional Networks. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import StableGCN
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> StableGCN(4, 16, 3)(torch.randn(3, 4), edge_index).shape
    torch.Size([3, 3])
    >>> StableGCN(4, 16, 3, pool="mean")(torch.randn(10, 3, 4), edge_index).shape
    torch.Size([10, 1, 3])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        *,
        order: int = 2,
        shift: float = 1.0,
        identity: bool = False,
        act: Literal["relu", "tanh", "abs"] = "relu",
        pool: Literal["mean"] | None = None,
        max_gain: float | None = None,
    ) -> None:
        super().__init__()
        integer("num_layers", num_layers, 1)
        integer("out_channels", out_channels, 1)
        self.act = one_of("act", act, tuple(ACTIVATIONS))
        self.pool = one_of("pool", pool, ("mean", None))
        self.max_gain = None if max_gain is None else at_least("max_gain", max_gain, 0, strict=True)
        self.in_channels, self.shift = integer("in_channels", in_channels, 1), shift
        self.convs = nn.ModuleList(
            ResolventConv(
                hidden_channels if k else in_channels, integer("hidden_channels", hidden_channels, 1), order,
                shift=shift, identity=identity,
            )
            for k in range(num_layers)
        )  # fmt: skip
        self.readout = nn.Linear(hidden_channels, out_channels)

    def forward(
        self,
        x: Float[Tensor, "*lead nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        node_weight: Float[Tensor, " nodes"] | None = None,
        batch: Int[Tensor, " nodes"] | None = None,
    ) -> Float[Tensor, "*lead rows out"]:
        """Return the output of each node, or with ``pool`` of each graph of ``batch``."""
        _check_features(x, self.in_channels)
        if batch is not None:
            has_shape("batch", batch, (x.shape[-2],), "x")
        graph = _Graph.of(edge_index, x.shape[-2], edge_weight, node_weight, x.device)
        resolvent = _Resolvent(graph, self.shift)
        for conv in self.convs:
            x = ACTIVATIONS[self.act](conv._filter(x, resolvent, self._weight(conv)))  # type: ignore[arg-type]
        if self.pool:
            x = _weighted_mean(x.movedim(-2, 0), graph.mu.to(x.dtype), batch).movedim(0, -2)
        return self.readout(x)

    def _weight(self, conv: ResolventConv) -> Tensor:
        """Return the layer's weights, scaled down to ``max_gain`` if that is given."""
        if self.max_gain is None:
            return conv.weight
        square = _gain_squared(conv.weight, conv.identity).clamp_min(self.max_gain**2)
        return conv.weight * (self.max_gain / square.sqrt())


def _weighted_mean(x: Tensor, mu: Tensor, group: Tensor | None, size: int | None = None) -> Tensor:
    """Return the means of rows by group, (groups, ...)."""
    if group is None:
        group = torch.zeros(len(x), dtype=torch.long, device=x.device)
        size = 1
    if size is None:
        size = int(group.max()) + 1
    total = mu.new_zeros(size).index_add(0, group, mu)
    share = mu / total[group]
    return x.new_zeros(size, *x.shape[1:]).index_add(0, group, x * share.view(-1, *[1] * (x.ndim - 1)))


@dataclass(frozen=True)
class Coarsening:
    """A graph whose strong edges are collapsed, and the maps between the two.

    Attributes
    ----------
    cluster : Tensor of shape (nodes,), int64
        The coarse node of each node; numbered by the first of their nodes.
    num_nodes : int
        How many coarse nodes.
    edge_index : Tensor of shape (2, coarse edges)
        Each edge once, sorted, without self-loops.
    edge_weight : Tensor of shape (coarse edges,)
        Sums of weak weights.
    node_weight : Tensor of shape (num_nodes,)
        Sums of node weights.
    fine_node_weight : Tensor of shape (nodes,)
        The weights of the nodes themselves.
    """

    cluster: Int[Tensor, " nodes"]
    num_nodes: int
    edge_index: Int[Tensor, "2 coarse_edges"]
    edge_weight: Float[Tensor, " coarse_edges"]
    node_weight: Float[Tensor, " clusters"]
    fine_node_weight: Float[Tensor, " nodes"]

    def lift(self, f: Float[Tensor, " clusters *features"]) -> Float[Tensor, " nodes *features"]:
        """Return the signal that has on every node its cluster's value: J f.

        Parameters
        ----------
        f : Tensor of shape (num_nodes, ...)
            Values on the coarse graph.

        Returns
        -------
        Tensor
            Shape (nodes, ...).
        """
        has_shape("f", f, (self.num_nodes, *f.shape[1:]), "the coarse graph")
        return f[self.cluster]

    def project(self, f: Float[Tensor, " nodes *features"]) -> Float[Tensor, " clusters *features"]:
        """Return the mean over each cluster, by node weights: J* f.

        Parameters
        ----------
        f : Tensor of shape (nodes, ...)
            Values on the fine graph.

        Returns
        -------
        Tensor
            Shape (num_nodes, ...).
        """
        has_shape("f", f, (len(self.cluster), *f.shape[1:]), "the fine graph")
        return _weighted_mean(f, self.fine_node_weight.to(f.dtype), self.cluster, self.num_nodes)


def collapse_strong_edges(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    edge_weight: Float[Tensor, " edges"] | None,
    strong: Bool[Tensor, " edges"] | float,
    *,
    node_weight: Float[Tensor, " nodes"] | None = None,
) -> Coarsening:
    """Return the graph in which nodes that strong edges connect are one node.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges; the strong ones both ways.
    num_nodes : int
        How many nodes, at least 1.
    edge_weight : Tensor of shape (edges,) or None
        Positive; None is ones.
    strong : Tensor of shape (edges,), bool, or float
        Which edges are strong, or the least weight of those that are.
    node_weight : Tensor of shape (nodes,), optional
        Positive; ones by default.

    Returns
    -------
    Coarsening
        The coarse graph; weak edges inside a cluster vanish.

    Raises
    ------
    ValueError
        If the graph does not fit, or an edge is strong in one direction only.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import collapse_strong_edges
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> coarse = collapse_strong_edges(path, 3, torch.tensor([100.0, 100.0, 1.0, 1.0]), 10.0)
    >>> coarse.cluster, coarse.node_weight
    (tensor([0, 0, 1]), tensor([2., 1.]))
    """
    graph = _Graph.of(edge_index, num_nodes, edge_weight, node_weight, edge_index.device)
    mask = _strong(graph, strong)
    sender, receiver = edge_index[:, mask].cpu().numpy()
    pairs = sparse.coo_matrix((np.ones(len(sender)), (sender, receiver)), (num_nodes, num_nodes))
    size, labels = connected_components(pairs, directed=False)
    cluster = torch.as_tensor(labels, dtype=torch.long, device=edge_index.device)
    weight = torch.ones(edge_index.shape[1], device=edge_index.device) if edge_weight is None else edge_weight
    mu = torch.ones(num_nodes, dtype=weight.dtype, device=weight.device)
    mu = mu if node_weight is None else node_weight
    ends = cluster[edge_index]
    kept = ends[0] != ends[1]
    keys, place = torch.unique(ends[0, kept] * size + ends[1, kept], return_inverse=True)
    return Coarsening(
        cluster,
        int(size),
        torch.stack([keys // size, keys % size]),
        weight.new_zeros(len(keys)).index_add(0, place, weight[kept]),
        mu.new_zeros(size).index_add(0, cluster, mu),
        mu,
    )


class CollapseBound(NamedTuple):
    """How far the resolvent is from that of the collapsed graph, at most.

    Attributes
    ----------
    value : float
        Bound on ||R - J R_c J*||, the operator norm by node weights.
    gap : float
        Smallest non-zero eigenvalue of the strong edges' Laplacian, over ``shift``.
    coupling : float
        Norm of what the weak edges lead out of the signals that are constant on clusters,
        over ``shift``.
    """

    value: float
    gap: float
    coupling: float


def collapse_bound(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    edge_weight: Float[Tensor, " edges"] | None,
    strong: Bool[Tensor, " edges"] | float,
    *,
    node_weight: Float[Tensor, " nodes"] | None = None,
    shift: float = 1.0,
) -> CollapseBound:
    """Return a certificate of how little collapsing the strong edges changes the resolvent.

    Eliminating what is not constant on clusters from (1 + L/s) R = 1 gives, with gap l,
    coupling a and d = 1/(1 + l), the bound d ((1 + a)^2 + a^2 d): of first order in the
    inverse of the strong weights.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges of an undirected graph, both ways.
    num_nodes : int
        How many nodes, at least 1.
    edge_weight : Tensor of shape (edges,) or None
        Positive and symmetric; None is ones.
    strong : Tensor of shape (edges,), bool, or float
        As for `collapse_strong_edges`.
    node_weight : Tensor of shape (nodes,), optional
        Positive; ones by default.
    shift : float, default=1.0
        As for `ResolventConv`.

    Returns
    -------
    CollapseBound
        The bound and what it is made of; 0 where nothing is collapsed.

    Raises
    ------
    ValueError
        If the graph does not fit or is not symmetric.
    """
    at_least("shift", shift, 0, strict=True)
    coarse = collapse_strong_edges(edge_index, num_nodes, edge_weight, strong, node_weight=node_weight)
    with torch.no_grad():
        graph = _Graph.of(edge_index, num_nodes, edge_weight, node_weight, edge_index.device)
        _check_symmetric(graph)
        mask = _strong(graph, strong)
        root = graph.mu.sqrt()

        def symmetric(rows: Tensor) -> Tensor:
            part = _Graph(edge_index[:, rows], graph.weight[rows], graph.mu)
            return part.stiffness() / (root[:, None] * root)

        count = coarse.num_nodes  # the kernel of the strong Laplacian has exactly this dimension
        spectrum = torch.linalg.eigvalsh(symmetric(mask))
        gap = float(spectrum[count]) / shift if count < num_nodes else math.inf
        basis = torch.nn.functional.one_hot(coarse.cluster, count).to(root) * root[:, None]
        basis = basis / basis.norm(dim=0)
        moved = symmetric(~mask) @ basis
        coupling = float(torch.linalg.matrix_norm(moved - basis @ (basis.T @ moved), 2)) / shift
    d = 1 / (1 + gap)
    return CollapseBound(d * ((1 + coupling) ** 2 + coupling**2 * d), gap, coupling)


def filter_gain(conv: ResolventConv, spectrum: Float[Tensor, " k"] | None = None) -> float:
    """Return by how much a layer can stretch the difference of two inputs.

    On symmetric graphs the layer multiplies a component of eigenvalue lambda by
    G = sum_k r^k W_k, r = s/(s + lambda) in (0, 1]; the gain is the supremum of the
    Frobenius norm of G, exact since its square is a polynomial in r.

    Parameters
    ----------
    conv : ResolventConv
        The layer.
    spectrum : Tensor of shape (k,), optional
        Eigenvalues of the Laplacian, at least 0; by default the supremum is over all graphs.

    Returns
    -------
    float
        The gain; a bound for symmetric graphs only, norms by node weights.

    Raises
    ------
    ValueError
        If ``spectrum`` is empty, negative or not finite.

    Examples
    --------
    G = r - r^2 is largest at r = 1/2:

    >>> import torch
    >>> from posterity.graphs import ResolventConv, filter_gain
    >>> conv = ResolventConv(1, 1, order=2)
    >>> _ = conv.weight.data.copy_(torch.tensor([[[1.0]], [[-1.0]]]))
    >>> filter_gain(conv), filter_gain(conv, torch.tensor([0.0, 3.0]))
    (0.25, 0.1875)
    """
    r = None
    if spectrum is not None:
        has_shape("spectrum", finite("spectrum", floating("spectrum", spectrum)), (None,))
        if spectrum.numel() == 0 or float(spectrum.min()) < 0:
            raise ValueError(f"spectrum must hold eigenvalues of at least 0, got {spectrum.tolist()}")
        r = conv.shift / (conv.shift + spectrum.double())
    with torch.no_grad():
        return math.sqrt(float(_gain_squared(conv.weight.double(), conv.identity, r)))


def _gain_squared(weight: Tensor, identity: bool, r: Tensor | None = None) -> Tensor:
    """Return the largest squared norm of sum_k r^k W_k, over r or over [0, 1]."""
    powers = torch.arange(len(weight), device=weight.device) + (0 if identity else 1)
    gram = torch.einsum("aio,bio->ab", weight, weight)
    if r is None:
        # Where the largest value lies is a constant for the gradient (envelope theorem).
        inner = gram.detach().double().cpu().numpy()
        degree = np.add.outer(powers.cpu().numpy(), powers.cpu().numpy())
        slope = Polynomial(np.bincount(degree.ravel(), inner.ravel())).deriv()
        slope = slope.trim(1e-14 * np.abs(slope.coef).max())  # a vanishing lead would overflow
        ends = np.concatenate([[0.0, 1.0], slope.roots().real.clip(0, 1)])  # more points do no harm
        r = torch.from_numpy(ends)
    basis = r.to(weight)[:, None] ** powers
    return torch.einsum("ka,ab,kb->k", basis, gram, basis).max().clamp_min(0)


def stability_bound(
    model: StableGCN,
    epsilon: float,
    input_norm: float,
    *,
    input_error: float = 0.0,
    measure: float,
) -> float:
    """Return how far the outputs of a network on two graphs can be apart.

    The error grows by each layer's gain, and by epsilon times what its filter can make of a
    change of the resolvent: e <- B e + epsilon C n with C = sum_k k ||W_k||, n <- B n + ||b||.

    Parameters
    ----------
    model : StableGCN
        The network.
    epsilon : float
        Bound on the distance of the resolvents: ``collapse_bound(...).value``, or
        ||L - L'|| / shift for graphs on the same nodes.
    input_norm : float
        Norm of the input on the second (the coarse) graph: root of sum mu |x|^2.
    input_error : float, default=0.0
        Norm of the difference of the inputs, the second one lifted.
    measure : float
        Sum of the node weights, positive.

    Returns
    -------
    float
        Bound on the norm, by node weights, of the difference of the outputs; with ``pool``
        on the Euclidean norm, for one graph. For symmetric graphs only.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    at_least("epsilon", epsilon, 0)
    error, norm = at_least("input_error", input_error, 0), at_least("input_norm", input_norm, 0)
    root = math.sqrt(at_least("measure", measure, 0, strict=True))
    with torch.no_grad():
        for conv in model.convs:
            weight = model._weight(conv).double()  # type: ignore[arg-type]
            gain = math.sqrt(float(_gain_squared(weight, conv.identity)))  # type: ignore[arg-type]
            sizes = torch.linalg.matrix_norm(weight, 2).tolist()
            change = sum(k * size for k, size in enumerate(sizes, 0 if conv.identity else 1))
            error = gain * error + epsilon * change * norm
            norm = gain * norm + float(conv.bias.double().norm()) * root  # type: ignore[union-attr, operator]
        stretch = float(torch.linalg.matrix_norm(model.readout.weight.double(), 2))
    return error * stretch / (root if model.pool else 1.0)


def apply_filter(
    g: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*lead nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
    node_weight: Float[Tensor, " nodes"] | None = None,
    *,
    method: Literal["eig", "contour"] = "eig",
    center: float | None = None,
    radius: float | None = None,
    tol: float = 1e-9,
) -> Float[Tensor, "*lead nodes features"]:
    """Return g(L) x for a function g of the Laplacian.

    On directed graphs L may have no basis of eigenvectors; there g(L) is the mean of
    g(z) (z - c) (z - L)^(-1) over a circle around c that encloses the spectrum.

    Parameters
    ----------
    g : callable
        From a tensor of points (k,) to values (k,), real for real points. "eig" gives it
        eigenvalues, "contour" complex points; there g is holomorphic on the disc.
    x : Tensor of shape (..., nodes, features)
        Signals.
    edge_index : Tensor of shape (2, edges)
        Edges.
    edge_weight : Tensor of shape (edges,), optional
        Positive; ones by default.
    node_weight : Tensor of shape (nodes,), optional
        Positive; ones by default.
    method : {"eig", "contour"}, default="eig"
        "eig" for symmetric graphs, "contour" for any.
    center : float, optional
        Of the circle; by default the largest weighted in-degree over node weight, so that
        the disc by Gershgorin's theorem has the same centre, and this radius.
    radius : float, optional
        Of the circle, larger than that disc; by default 1.25 times what encloses it, plus 0.1.
    tol : float, default=1e-9
        Largest change, relative to the largest value where that is above 1, at which
        doubling the points of the circle stops.

    Returns
    -------
    Tensor
        As ``x``; computed in float64.

    Raises
    ------
    ValueError
        If the graph does not fit or (for "eig") is not symmetric, the circle does not
        enclose the disc, or g returns another shape.
    RuntimeError
        If 4,096 points on the circle are not enough.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import apply_filter
    >>> edge_index = torch.tensor([[0, 1], [1, 0]])
    >>> apply_filter(lambda z: z, torch.tensor([[1.0], [3.0]]), edge_index)
    tensor([[-2.],
            [ 2.]])
    """
    one_of("method", method, ("eig", "contour"))
    at_least("tol", tol, 0, strict=True)
    _check_features(x)
    graph = _Graph.of(edge_index, x.shape[-2], edge_weight, node_weight, x.device)
    f = x.double().movedim(-2, 0).reshape(graph.n, -1)
    if method == "eig":
        _check_symmetric(graph)
        root = graph.mu.sqrt()[:, None]
        spectrum, basis = torch.linalg.eigh(graph.stiffness() / (root * root.T))
        points = spectrum.clamp_min(0)  # rounding may leave the zero below zero
        y = basis @ (_values(g, points).real[:, None] * (basis.T @ (root * f))) / root
    else:
        y = _contour(g, f, graph.stiffness() / graph.mu[:, None], center, radius, tol)
    return y.reshape(graph.n, *x.shape[:-2], x.shape[-1]).movedim(0, -2).to(x.dtype)


def _values(g: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    values = g(points)
    if not isinstance(values, Tensor) or values.shape != points.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"g must return a tensor of the shape it is given, {tuple(points.shape)}, got {got}")
    return values


def _contour(
    g: Callable[[Tensor], Tensor],
    f: Tensor,
    L: Tensor,
    center: float | None,
    radius: float | None,
    tol: float,
) -> Tensor:
    disc = float(L.detach().diagonal().max())  # centre and radius of Gershgorin's disc
    center = disc if center is None else at_least("center", center, -math.inf)
    least = abs(center - disc) + disc
    if radius is None:
        radius = 1.25 * least + 0.1
    elif at_least("radius", radius, 0, strict=True) <= least:
        raise ValueError(
            f"radius must be greater than {least:g} to enclose the spectrum from {center:g}, got {radius}"
        )
    eye = torch.eye(len(L), dtype=torch.complex128, device=L.device)

    def mean(count: int, offset: float) -> Tensor:
        angle = 2 * math.pi * (torch.arange(count, dtype=L.dtype, device=L.device) + offset) / count
        step = radius * torch.exp(1j * angle)
        points = center + step
        share = _values(g, points).to(eye) * step / count
        total = torch.zeros_like(f, dtype=eye.dtype)
        size = max(1, 2**22 // L.numel())  # points whose systems fit into 64 MB together
        for z, c in zip(points.split(size), share.split(size), strict=True):
            solved = torch.linalg.solve(z[:, None, None] * eye - L, f.to(eye).expand(len(z), *f.shape))
            total = total + torch.einsum("k,kij->ij", c, solved)
        return total.real

    count, y = 32, mean(32, 0.0)
    while count < 4096:  # the points of the next rule are the old ones and those halfway
        y, before, count = (y + mean(count, 0.5)) / 2, y, 2 * count
        if float((y - before).detach().abs().max()) <= tol * max(1.0, float(y.detach().abs().max())):
            return y
    raise RuntimeError(f"4096 points on the circle do not reach tol={tol:g}: is g holomorphic on the disc?")


class _Graph(NamedTuple):
    """Edges, weights and node weights in float64."""

    edge_index: Tensor
    weight: Tensor
    mu: Tensor

    @staticmethod
    def of(edge_index: Any, n: int, edge_weight: Any, node_weight: Any, device: torch.device) -> "_Graph":
        """Check what a user gave."""
        integer("num_nodes", n, 1)
        check_edges(edge_index, n, read=device.type == "cpu")  # elsewhere reading would wait
        ones = {"dtype": torch.float64, "device": device}
        if edge_weight is None:
            weight = torch.ones(edge_index.shape[1], **ones)
        else:
            floating("edge_weight", edge_weight)
            weight = has_shape("edge_weight", edge_weight, (edge_index.shape[1],), "edge_index").double()
        if node_weight is None:
            mu = torch.ones(n, **ones)
        else:
            mu = has_shape("node_weight", floating("node_weight", node_weight), (n,), "the nodes").double()
        if device.type == "cpu":
            for name, values in (("edge_weight", weight), ("node_weight", mu)):
                good = (values > 0) & (values < math.inf)  # NaN is neither
                if not bool(good.all()):
                    k = int((~good).nonzero()[0])
                    edge = name == "edge_weight"
                    where = (
                        f"edge {k} ({' -> '.join(map(str, edge_index[:, k].tolist()))})"
                        if edge
                        else f"node {k}"
                    )
                    raise ValueError(f"{name} must be positive and finite, got {float(values[k])} at {where}")
        return _Graph(edge_index, weight, mu)

    @property
    def n(self) -> int:
        return len(self.mu)

    def detach(self) -> "_Graph":
        return _Graph(self.edge_index, self.weight.detach(), self.mu.detach())

    def degree(self) -> Tensor:
        return self.mu.new_zeros(self.n).index_add(0, self.edge_index[1], self.weight)

    def stiffness(self) -> Tensor:
        """Return diag(mu) L, dense: in-degrees less weights, receivers as rows."""
        sender, receiver = self.edge_index
        K = self.mu.new_zeros(self.n, self.n).index_put((receiver, sender), -self.weight, accumulate=True)
        return K + torch.diag(self.degree())


class _Resolvent:
    """x -> R x = B^(-1) diag(mu) x, B = diag(mu) (1 + L/s) factored once.

    In each row of B the diagonal exceeds the sum of the others by the node weight: it is
    invertible, and needs no pivoting. On symmetric graphs it is positive definite.
    """

    def __init__(self, graph: _Graph, shift: float) -> None:
        self.graph, self.shift = graph, shift
        self._inverse: Tensor | None = None
        plain = graph.detach()
        if graph.n > LARGEST_DENSE:
            nodes = torch.arange(graph.n, device=plain.mu.device).expand(2, -1)
            entries = torch.cat([plain.mu + plain.degree() / shift, -plain.weight / shift])
            column, row = torch.cat([nodes, plain.edge_index], 1).cpu().numpy()
            B = sparse.csc_matrix((entries.cpu().numpy(), (row, column)), (graph.n, graph.n))
            lu = splu(B, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
            other = "T" if (B != B.T).nnz else "N"  # the transposed solve is slower
            self._substitute = lambda rhs, transposed: torch.from_numpy(
                lu.solve(rhs.cpu().numpy(), other if transposed else "N")
            ).to(rhs.device)
            return
        B = plain.stiffness() / shift + torch.diag(plain.mu)
        if B.device.type == "cpu" and torch.equal(B, B.T):  # elsewhere asking would wait
            factor = torch.linalg.cholesky(B)
            self._substitute = lambda rhs, transposed: torch.cholesky_solve(rhs, factor)
        else:
            factors, pivots, _ = torch.linalg.lu_factor_ex(B)
            self._substitute = lambda rhs, transposed: torch.linalg.lu_solve(
                factors, pivots, rhs, adjoint=transposed
            )

    def solve(self, rhs: Tensor, transposed: bool) -> Tensor:
        """Return B^(-1) rhs, or with the transpose."""
        n = self.graph.n
        if n > LARGEST_DENSE or rhs.shape[1] <= n:
            return self._substitute(rhs, transposed)
        if self._inverse is None:  # many columns: a product is several times faster
            self._inverse = self._substitute(torch.eye(n, dtype=rhs.dtype, device=rhs.device), False)
        return (self._inverse.T if transposed else self._inverse) @ rhs

    def __call__(self, x: Tensor) -> Tensor:
        """Return R x for x of shape (nodes, ...), in float64 inside."""
        graph = self.graph
        rhs = graph.mu[:, None] * x.double().reshape(graph.n, -1)
        return _Solve.apply(rhs, graph.weight, graph.mu, self, False).view_as(x).to(x.dtype)  # type: ignore[union-attr]


class _Solve(torch.autograd.Function):
    """y = B^(-1) rhs, or with the transpose; gradients by the transposed solve, of any order."""

    @staticmethod
    def forward(
        ctx: Any, rhs: Tensor, weight: Tensor, mu: Tensor, of: _Resolvent, transposed: bool
    ) -> Tensor:
        y = of.solve(rhs, transposed)
        ctx.of, ctx.transposed = of, transposed
        ctx.save_for_backward(y, weight, mu)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, mu = ctx.saved_tensors
        h: Tensor = _Solve.apply(gradient, weight, mu, ctx.of, not ctx.transposed)  # type: ignore[assignment]
        left, right = (y, h) if ctx.transposed else (h, y)  # the gradient of B is -left right^T
        to_weight, to_mu = None, None
        if ctx.needs_input_grad[1]:
            sender, receiver = ctx.of.graph.edge_index
            to_weight = -(left[receiver] * (right[receiver] - right[sender])).sum(1) / ctx.of.shift
        if ctx.needs_input_grad[2]:
            to_mu = -(left * right).sum(1)
        return h, to_weight, to_mu, None, None


def _strong(graph: _Graph, strong: Any) -> Tensor:
    """Return the mask of strong edges, symmetric."""
    n = graph.n
    if isinstance(strong, Tensor):
        if strong.dtype != torch.bool:
            raise ValueError(f"strong must be a mask or a number, got dtype {strong.dtype}")
        mask = has_shape("strong", strong, (len(graph.weight),), "edge_index")
    else:
        mask = graph.weight.detach() >= at_least("strong", strong, 0, strict=True)
    sender, receiver = graph.edge_index[:, mask]
    lonely = ~torch.isin(sender * n + receiver, receiver * n + sender)
    if bool(lonely.any()):
        k = int(lonely.nonzero()[0])
        i, j = int(sender[k]), int(receiver[k])
        raise ValueError(f"strong must be symmetric, got {i} -> {j} without {j} -> {i}")
    return mask


def _check_symmetric(graph: _Graph) -> None:
    sender, receiver = graph.edge_index.cpu().numpy()
    W = sparse.csr_matrix((graph.weight.detach().cpu().numpy(), (sender, receiver)), (graph.n, graph.n))
    excess = (abs(W - W.T) - 1e-9 * (W + W.T)).tocoo()  # repeated edges add up with rounding
    if excess.nnz and excess.data.max() > 0:
        k = int(excess.data.argmax())
        i, j = int(excess.row[k]), int(excess.col[k])
        raise ValueError(f"edge_weight must be symmetric, got {W[i, j]:g} for {i} -> {j}, {W[j, i]:g} back")


def _check_features(x: Any, channels: int | None = None) -> None:
    floating("x", x)
    if x.ndim < 2 or (channels is not None and x.shape[-1] != channels):
        raise ValueError(f"x must have shape (..., nodes, {channels or 'features'}), got {tuple(x.shape)}")
