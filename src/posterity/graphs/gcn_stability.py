"""Graph convolutional networks that survive collapsing strong edges, and how far they may move.

A network of resolvent filters, each followed by a 1-Lipschitz activation, gives nearly the same
answer on a graph and on the coarse graph in which nodes joined by strong edges are one node:
their resolvents are epsilon apart. From layer to layer the error e of the features and their
norm n grow by at most

    e <- B e + epsilon C n,      n <- B n + ||b||,                                         (1)

where B, the gain, bounds what the layer's filter does to any frequency and C = sum_k k ||W_k|| its
slope. Polynomials of the Laplacian, and the normalised adjacency, have no such bound.
"""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import widened
from posterity.graphs._graph import check_index
from posterity.graphs.resolvent import ResolventConv, _check_features, _Graph, _Resolvent
from posterity.graphs.strong_edges import _weighted_mean

__all__ = ["StableGCN", "filter_gain", "stability_bound"]

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "abs": torch.abs}


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
            batch = check_index("batch", batch, (x.shape[-2],), source="x")
        graph = _Graph.of(edge_index, x.shape[-2], edge_weight, node_weight, x.device)
        resolvent = _Resolvent(graph, self.shift)
        for conv in self.convs:
            x = ACTIVATIONS[self.act](conv._filter(x, resolvent, self._weight(conv)))  # type: ignore[arg-type]
        if self.pool:
            x = _weighted_mean(x.movedim(-2, 0), graph.mu, batch).movedim(0, -2)
        return self.readout(x)

    def _weight(self, conv: ResolventConv) -> Tensor:
        """Return the layer's weights, scaled down to ``max_gain`` if that is given."""
        if self.max_gain is None:
            return conv.weight
        square = _gain_squared(conv.weight, conv.identity).clamp_min(self.max_gain**2)
        return conv.weight * (self.max_gain / square.sqrt())


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


@widened
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
