"""Anti-symmetric deep graph network: message passing as a stable ODE, for signals that travel far.

The state of node u follows an ODE by forward Euler steps with the same weights,

    x_u <- x_u + epsilon * act( (W - W^T - gamma I) x_u + Phi(x)_u + b ),       (1)

where Phi sums over neighbours. The Jacobian of the field with respect to a node's own
state is diag(act') (W - W^T - gamma I): at gamma = 0 its eigenvalues are imaginary, so what
a node holds is neither forgotten nor blown up, however many steps are taken. A little
gamma > 0 buys back the stability that forward Euler costs.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import wide
from posterity.graphs._graph import check_graph, check_index, ordinary, uncompiled
from posterity.graphs._sparse import (
    Adjacency,
    add_self_loops,
    edge_pattern,
    normalised,
    sparse_product,
)

__all__ = ["ADGN", "AntiSymmetricConv", "euler_step_limit", "local_jacobian_eigenvalues"]


class AntiSymmetricConv(nn.Module):
    """Steps of the anti-symmetric graph ODE, equation 1.

    Parameters
    ----------
    channels : int
        Width of the state.
    num_iters : int, default=1
        Euler steps, all with the same weights.
    epsilon : float, default=0.1
        Step size, positive.
    gamma : float, default=0.1
        Damping, at least 0.
    phi : {"sum", "gcn"} or nn.Module, default="sum"
        Aggregation: the (weighted) sum of ``V x_v`` over senders, or that of a graph
        convolution, with self-loops and symmetric normalisation; or a module called as
        ``phi(x, edge_index)``, with a third argument if there are edge weights.
    act : str, callable or None, default="tanh"
        ``torch.<name>`` or a function; None is the identity.
    bias : bool, default=True
        Whether to add b.
    train_weights : bool, default=True
        Whether W, V and b learn; if not, only what is around the layer does.
    cached : bool, default=False
        Whether to keep the first graph's aggregation and use it ever after.

    Attributes
    ----------
    W, V : nn.Parameter
        Shape (channels, channels); no V where ``phi`` is a module.
    bias : nn.Parameter or None
        Shape (channels,).

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``x``, ``edge_index`` and ``edge_weight`` do not fit.

    Notes
    -----
    1. Edges point from row 0 of ``edge_index`` to row 1; an undirected graph lists both ways.
    2. The official "gcn" normalises the graph anew in every step; here once a call.
    3. The bias starts uniform; PyG's layer starts it at zero.

    References
    ----------
    .. [1] Gravina, Bacciu, Gallicchio. Anti-Symmetric DGN: a stable architecture for Deep
       Graph Networks. ICLR 2023. Equations 5 to 8.

    Examples
    --------
    Without edges, damping or activation, one step of size epsilon turns the state:

    >>> import torch
    >>> from posterity.graphs import AntiSymmetricConv
    >>> conv = AntiSymmetricConv(2, epsilon=0.5, gamma=0.0, act=None, bias=False)
    >>> _ = conv.W.data.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    >>> conv(torch.tensor([[1.0, 0.0]]), torch.empty(2, 0, dtype=torch.long)).detach()
    tensor([[ 1.0000, -0.5000]])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        num_iters: int = 1,
        *,
        epsilon: float = 0.1,
        gamma: float = 0.1,
        phi: Literal["sum", "gcn"] | nn.Module = "sum",
        act: str | Callable[[Tensor], Tensor] | None = "tanh",
        bias: bool = True,
        train_weights: bool = True,
        cached: bool = False,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)
        self.num_iters = integer("num_iters", num_iters, 1)
        self.epsilon = at_least("epsilon", epsilon, 0, strict=True)
        self.gamma = at_least("gamma", gamma, 0)
        self.phi = phi if isinstance(phi, nn.Module) else one_of("phi", phi, ("sum", "gcn"))
        if isinstance(act, str) and not callable(getattr(torch, act, None)):
            raise ValueError(f"act must name a function of torch, be callable or None, got {act!r}")
        self.act = act
        self.cached = cached
        self.W = nn.Parameter(torch.empty(channels, channels), requires_grad=train_weights)
        if not isinstance(phi, nn.Module):
            self.V = nn.Parameter(torch.empty(channels, channels), requires_grad=train_weights)
        own = nn.Parameter(torch.empty(channels), requires_grad=train_weights) if bias else None
        self.register_parameter("bias", own)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and forget a cached graph."""
        bound = self.channels**-0.5
        nn.init.uniform_(self.W, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if isinstance(self.phi, nn.Module):
            if hasattr(self.phi, "reset_parameters"):
                self.phi.reset_parameters()  # type: ignore[operator]
        elif self.phi == "gcn":
            nn.init.xavier_uniform_(self.V)
        else:
            nn.init.uniform_(self.V, -bound, bound)
        self._aggregation: Adjacency | None = None

    def forward(
        self,
        x: Float[Tensor, "nodes channels"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> Float[Tensor, "nodes channels"]:
        """Return the state after ``num_iters`` steps."""
        edge_index = check_graph(x, edge_index, edge_weight, self.channels)
        aggregation = self._aggregate(x, edge_index, edge_weight)
        return self._steps(wide(x), edge_index, edge_weight, aggregation).to(x.dtype)

    def _steps(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, aggregation: Adjacency | None
    ) -> Tensor:
        # x is not narrow: in bfloat16 a step that is a hundredth of the state would be lost
        field, act = self._field(x, edge_index, edge_weight, aggregation), _activation(self.act)
        for _ in range(self.num_iters):
            x = torch.add(x, act(field(x)), alpha=self.epsilon)
        return x

    @uncompiled
    def _aggregate(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Adjacency | None:
        if isinstance(self.phi, nn.Module) or self._aggregation is not None:
            return self._aggregation
        if not self.cached:
            return self._matrix(x, edge_index, edge_weight)
        with torch.inference_mode(False):  # training may follow
            weight = None if edge_weight is None else ordinary(edge_weight.detach())
            self._aggregation = self._matrix(x, ordinary(edge_index), weight)
        return self._aggregation

    def _matrix(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Adjacency:
        n, (sender, receiver) = len(x), edge_index
        ones = torch.ones(len(sender), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        weight = ones if edge_weight is None else edge_weight.to(ones)
        if self.phi == "gcn":
            sender, receiver, weight, _ = add_self_loops(sender, receiver, weight, n)
            weight = normalised(sender, receiver, weight, n)
        return Adjacency(edge_pattern(sender, receiver, n), weight)

    def _field(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, aggregation: Adjacency | None
    ) -> Callable[[Tensor], Tensor]:
        """Return what maps a state to what ``act`` is applied to; the weights are put together once."""
        own, given = self._own().T, (edge_index,) if edge_weight is None else (edge_index, edge_weight)
        bias = None if self.bias is None else wide(self.bias)
        V = None if aggregation is None else wide(self.V).T

        def field(x: Tensor) -> Tensor:
            z = x @ own if bias is None else torch.addmm(bias, x, own)
            if aggregation is not None:
                return torch.addmm(z, sparse_product(aggregation, x), V)
            near = self.phi(x.to(self.W.dtype), *given)  # type: ignore[operator]
            return z + has_shape("phi(x, edge_index)", near, x.shape, "x")

        return field

    def _own(self) -> Tensor:
        """Return W - W^T - gamma I."""
        W = wide(self.W)
        return W - W.T - self.gamma * torch.eye(len(W), dtype=W.dtype, device=W.device)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        return f"{self.channels}, num_iters={self.num_iters}, epsilon={self.epsilon}, gamma={self.gamma}, phi={self.phi}"


class ADGN(nn.Module):
    """A network for nodes or graphs: encoder, anti-symmetric layers, readout.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int or None
        Width of the state; None leaves out the encoder and keeps the features' width.
    out_channels : int
        Outputs of a node or graph.
    num_layers : int
        Euler steps.
    epsilon, gamma : float, default=0.1
        As for `AntiSymmetricConv`.
    phi : {"sum", "gcn"} or nn.Module, default="sum"
        As for `AntiSymmetricConv`.
    act : str, callable or None, default="tanh"
        As for `AntiSymmetricConv`.
    weight_sharing : bool, default=True
        Whether all steps share one layer's weights.
    level : {"node", "graph"}, default="node"
        What has an output; graphs are pooled by sum, maximum and mean, in this order.
    head : {"linear", "mlp"}, default="linear"
        The readout: one map, or two of which the first halves the width.
    train_weights : bool, default=True
        Whether the layers learn, or only encoder and readout.

    Attributes
    ----------
    encoder : nn.Linear or nn.Identity
        No activation.
    convs : nn.ModuleList
        One layer of ``num_layers`` steps, or ``num_layers`` of one.
    readout : nn.Module
        Maps the state, or the pooled states, to the outputs.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.

    Notes
    -----
    1. The official head for graph properties ends in one more LeakyReLU, which distorts
       negative targets and is left out.

    References
    ----------
    .. [1] Gravina, Bacciu, Gallicchio. Anti-Symmetric DGN. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import ADGN
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> ADGN(4, 16, 3, num_layers=20)(torch.randn(3, 4), edge_index).shape
    torch.Size([3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | None,
        out_channels: int,
        num_layers: int,
        *,
        epsilon: float = 0.1,
        gamma: float = 0.1,
        phi: Literal["sum", "gcn"] | nn.Module = "sum",
        act: str | Callable[[Tensor], Tensor] | None = "tanh",
        weight_sharing: bool = True,
        level: Literal["node", "graph"] = "node",
        head: Literal["linear", "mlp"] = "linear",
        train_weights: bool = True,
    ) -> None:
        super().__init__()
        integer("in_channels", in_channels, 1)
        integer("out_channels", out_channels, 1)
        integer("num_layers", num_layers, 1)
        self.level = one_of("level", level, ("node", "graph"))
        one_of("head", head, ("linear", "mlp"))
        width = in_channels if hidden_channels is None else integer("hidden_channels", hidden_channels, 1)
        self.in_channels = in_channels
        self.encoder = nn.Identity() if hidden_channels is None else nn.Linear(in_channels, width)
        n_convs, num_iters = (1, num_layers) if weight_sharing else (num_layers, 1)
        self.convs = nn.ModuleList(
            AntiSymmetricConv(
                width, num_iters, epsilon=epsilon, gamma=gamma, phi=phi, act=act, train_weights=train_weights
            )
            for _ in range(n_convs)
        )
        wide = width if level == "node" else 3 * width
        if head == "linear":
            self.readout: nn.Module = nn.Linear(wide, out_channels)
        else:
            half = max(1, wide // 2)
            self.readout = nn.Sequential(nn.Linear(wide, half), nn.LeakyReLU(), nn.Linear(half, out_channels))

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        batch: Int[Tensor, " nodes"] | None = None,
    ) -> Float[Tensor, "rows out"]:
        """Return the output of each node, or of each graph of ``batch``."""
        edge_index = check_graph(x, edge_index, edge_weight, self.in_channels)
        if batch is not None:
            batch = check_index("batch", batch, (len(x),), source="x")
        encoded = self.encoder(x)
        state, aggregation = wide(encoded), None
        for conv in self.convs:  # all layers aggregate alike
            if aggregation is None:
                aggregation = conv._aggregate(state, edge_index, edge_weight)
            state = conv._steps(state, edge_index, edge_weight, aggregation)
        state = state if self.level == "node" else self.pool(state, batch)
        return self.readout(state.to(encoded.dtype))

    @staticmethod
    def pool(
        x: Float[Tensor, "nodes width"], batch: Int[Tensor, " nodes"] | None
    ) -> Float[Tensor, "graphs wide"]:
        """Return sum, maximum and mean over the nodes of each graph, side by side."""
        dtype, x = has_shape("x", floating("x", x), (None, None)).dtype, wide(x)
        if batch is None:
            batch = torch.zeros(len(x), dtype=torch.long, device=x.device)
        batch = check_index("batch", batch, (len(x),), source="x")
        size = int(batch.max()) + 1 if len(batch) else 1
        total = x.new_zeros(size, x.shape[1]).index_add(0, batch, x)
        count = torch.bincount(batch, minlength=size).clamp_min(1)[:, None]
        rows = batch[:, None].expand_as(x)
        top = x.new_zeros(size, x.shape[1]).scatter_reduce(0, rows, x, "amax", include_self=False)
        return torch.cat([total, top, total / count], 1).to(dtype)


def local_jacobian_eigenvalues(
    conv: AntiSymmetricConv,
    x: Float[Tensor, "nodes channels"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
) -> Complex[Tensor, "nodes channels"]:
    """Return the eigenvalues of each node's Jacobian with respect to its own state.

    The aggregation is held fixed, as in the paper's analysis. (With "gcn", a node is also
    its own neighbour; that term, V / degree in the full Jacobian, is left out.)

    Parameters
    ----------
    conv : AntiSymmetricConv
        A layer whose ``act`` is "tanh", "relu" or None.
    x : Tensor of shape (nodes, channels)
        States.
    edge_index : Tensor of shape (2, edges)
        Edges.
    edge_weight : Tensor of shape (edges,), optional
        Their weights.

    Returns
    -------
    Tensor
        Complex, shape (nodes, channels), in complex64 at least; real parts lie between minus
        gamma times the largest and the smallest slope of ``act``.

    Raises
    ------
    ValueError
        If ``act`` is another, or the graph does not fit.

    References
    ----------
    .. [1] Gravina, Bacciu, Gallicchio. Anti-Symmetric DGN. ICLR 2023. Propositions 1 and 2.
    """
    one_of("act of the layer", conv.act, ("tanh", "relu", None))
    edge_index = check_graph(x, edge_index, edge_weight, conv.channels)
    finite("x", x)
    if edge_weight is not None:
        finite("edge_weight", edge_weight)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = wide(x)
        z = conv._field(x, edge_index, edge_weight, conv._aggregate(x, edge_index, edge_weight))(x)
        if conv.act == "tanh":
            slope = 1 - z.tanh().square()
        else:
            slope = torch.ones_like(z) if conv.act is None else (z > 0).to(z.dtype)
        root = slope.sqrt()  # D A has the eigenvalues of D^(1/2) A D^(1/2), which is better conditioned
        return torch.linalg.eigvals(root[:, :, None] * conv._own() * root[:, None, :])


def euler_step_limit(
    conv: AntiSymmetricConv,
    x: Float[Tensor, "nodes channels"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
) -> float:
    """Return the largest epsilon at which a step is stable for all local eigenvalues, at this state.

    Forward Euler is stable where |1 + epsilon lambda| <= 1, that is for
    epsilon <= -2 Re lambda / |lambda|^2. Without damping that is 0.

    Parameters
    ----------
    conv : AntiSymmetricConv
        A layer whose ``act`` is "tanh", "relu" or None.
    x : Tensor of shape (nodes, channels)
        States.
    edge_index : Tensor of shape (2, edges)
        Edges.
    edge_weight : Tensor of shape (edges,), optional
        Their weights.

    Returns
    -------
    float
        At least 0; infinity where every eigenvalue vanishes.

    Raises
    ------
    ValueError
        As for `local_jacobian_eigenvalues`.
    """
    eigenvalues = local_jacobian_eigenvalues(conv, x, edge_index, edge_weight).to(torch.complex128)
    size = eigenvalues.abs()
    eigenvalues = eigenvalues[size > 1e-12 * size.amax(1, keepdim=True)]  # what is not 0 at its node
    if eigenvalues.numel() == 0:
        return float("inf")
    if conv.gamma == 0:  # real parts are rounding
        return 0.0
    return max(0.0, float((-2 * eigenvalues.real / eigenvalues.abs().square()).min()))


def _activation(act: str | Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    if act is None:
        return lambda z: z
    return getattr(torch, act) if isinstance(act, str) else act
