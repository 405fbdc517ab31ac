"""Allen-Cahn message passing: neighbours that attract or repel, in a double well.

The state of node i follows, channel by channel,

    dx_i/dt = alpha sum_j (a_ij - beta) (x_j - x_i) + delta x_i (b - x_i^2).       (1)

Neighbours with a_ij > beta pull together, those with a_ij < beta push apart, and the well
of height b (the Allen-Cahn force) keeps what repulsion drives apart from running away.
Plain diffusion (beta = 0, no well) averages connected nodes until all are alike; here the
state stays within a bound and, where repulsion wins, never becomes constant.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer, needs, one_of, within
from posterity._precision import wide
from posterity.graphs._graph import check_graph, ordinary, uncompiled
from posterity.graphs._sparse import (
    Adjacency,
    EdgePattern,
    add_self_loops,
    edge_pattern,
    normalised,
    row_dots,
    times,
)

__all__ = ["ACMP", "ACMPConv"]


class ACMPConv(nn.Module):
    """Equation 1 from time 0, where the state is the input, to ``time``.

    Parameters
    ----------
    channels : int
        Width of the state.
    time : float, default=4.0
        When the state is read, positive.
    beta : float, default=0.0
        What a coefficient must exceed for its edge to attract; finite.
    attention : {"gcn", "rw", "transformer"}, default="gcn"
        Coefficients a_ij: w_ij / sqrt(d_i d_j), or w_ij / d_i, whose rows sum to 1, or a
        softmax over the senders to i of scaled products of ``query`` and ``key``, the mean
        over heads, which reads no edge weights. Nodes without a self-loop get one of weight
        1 first. They are computed from the input and held fixed.
    interaction : {"difference", "operator"}, default="difference"
        Equation 1, or what the official code integrates instead: alpha times
        (sum over j, i included, of (a_ij - beta) x_j) - x_i, in place of the first term.
    barrier : float, default=1.0
        Height b of the well, positive: it draws to plus and minus sqrt(b).
    reaction : bool, default=True
        Whether there is a well. Without, and with beta 0, this is linear diffusion (GRAND).
    source : bool, default=False
        Whether to add ``source_weight`` times the input to the velocity.
    heads : int, default=1
        Of "transformer"; divides ``attention_dim``.
    attention_dim : int, default=16
        Width of queries and keys, all heads together.
    alpha_init, delta_init : float, default=0.5 and 0.1
        First values of alpha and delta, in (0, 1).
    method : {"dopri5", "rk4", "euler"}, default="dopri5"
        Adaptive steps by torchdiffeq, or equal steps: classical Runge-Kutta or Euler.
    step_size : float, default=0.1
        Of "rk4" and "euler", rounded so that steps are equal; positive.
    rtol, atol : float, default=1e-3
        Tolerances of "dopri5", positive; they hold for every entry of the state.
    max_evals : int, default=10000
        Most evaluations of the velocity in one call.
    adjoint : bool, default=False
        Whether gradients come from the adjoint equation, with memory that does not grow
        with the number of steps; "dopri5" only.
    cached : bool, default=False
        Whether to keep the first graph and use it ever after.

    Attributes
    ----------
    alpha_raw, delta_raw : nn.Parameter
        Shape (channels,); alpha and delta are their sigmoids. Without a well delta is idle.
    source_weight : nn.Parameter
        A scalar, 0 at first; only with ``source``.
    query, key : nn.Linear
        Only with "transformer".
    num_evals : int
        Evaluations of the velocity in the last call.

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``x``, ``edge_index`` and ``edge_weight`` do not fit.
    RuntimeError
        If a call needs more than ``max_evals`` evaluations, or the state stops being finite.

    Notes
    -----
    1. Edges point from row 0 of ``edge_index`` to row 1; an undirected graph lists both ways.
    2. Repulsion is stiff at hubs: a node of degree k is pushed away at a rate of about
       alpha beta k. Take "dopri5", or a ``step_size`` below the inverse of a few times that.
    3. "rw" divides by the receiver's degree; the official code divides by the sender's.
    4. delta starts at 0.1; the official code starts it at 4.5e-5, almost without a well,
       where `trapping_radius` says little.
    5. "rk4" is the classical rule; torchdiffeq's, which the official code calls, is the 3/8 rule.

    References
    ----------
    .. [1] Wang, Yi, Liu, Wang, Jin. ACMP: Allen-Cahn Message Passing with Attractive and
       Repulsive Forces for Graph Neural Networks. ICLR 2023.

    Examples
    --------
    Repulsion drives two connected nodes into different wells:

    >>> import torch
    >>> from posterity.graphs import ACMPConv
    >>> x, edge_index = torch.tensor([[0.1], [-0.1]]), torch.tensor([[0, 1], [1, 0]])
    >>> conv = ACMPConv(1, time=50.0, beta=0.6, delta_init=0.5, method="rk4")
    >>> conv(x, edge_index).detach()  # sqrt(1 + 2 * 0.1) on either side
    tensor([[ 1.0954],
            [-1.0954]])
    """

    def __init__(
        self,
        channels: int,
        *,
        time: float = 4.0,
        beta: float = 0.0,
        attention: Literal["gcn", "rw", "transformer"] = "gcn",
        interaction: Literal["difference", "operator"] = "difference",
        barrier: float = 1.0,
        reaction: bool = True,
        source: bool = False,
        heads: int = 1,
        attention_dim: int = 16,
        alpha_init: float = 0.5,
        delta_init: float = 0.1,
        method: Literal["dopri5", "rk4", "euler"] = "dopri5",
        step_size: float = 0.1,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        max_evals: int = 10_000,
        adjoint: bool = False,
        cached: bool = False,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)
        self.time = at_least("time", time, 0, strict=True)
        if isinstance(beta, bool) or not isinstance(beta, Real) or not math.isfinite(beta):
            raise ValueError(f"beta must be a finite number, got {beta!r}")
        self.beta = beta
        self.attention = one_of("attention", attention, ("gcn", "rw", "transformer"))
        self.interaction = one_of("interaction", interaction, ("difference", "operator"))
        self.barrier = at_least("barrier", barrier, 0, strict=True)
        self.reaction, self.source, self.cached = reaction, source, cached
        self.heads = integer("heads", heads, 1)
        if integer("attention_dim", attention_dim, 1) % heads:
            raise ValueError(f"heads must divide attention_dim, got {heads} for {attention_dim}")
        for name, value in (("alpha_init", alpha_init), ("delta_init", delta_init)):
            within(name, value, 0, 1, open_low=True, open_high=True)
        self.method = one_of("method", method, ("dopri5", "rk4", "euler"))
        self.step_size = at_least("step_size", step_size, 0, strict=True)
        self.rtol = at_least("rtol", rtol, 0, strict=True)
        self.atol = at_least("atol", atol, 0, strict=True)
        self.max_evals = integer("max_evals", max_evals, 1)
        if adjoint and method != "dopri5":
            raise ValueError(f'adjoint needs method "dopri5", got {method!r}')
        self.adjoint = adjoint
        self.num_evals = 0
        self.alpha_init, self.delta_init = alpha_init, delta_init
        self.alpha_raw = nn.Parameter(torch.empty(channels))
        self.delta_raw = nn.Parameter(torch.empty(channels))
        if source:
            self.source_weight = nn.Parameter(torch.empty(()))
        if attention == "transformer":
            self.query = nn.Linear(channels, attention_dim)
            self.key = nn.Linear(channels, attention_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters to their first values, and forget a cached graph."""
        nn.init.constant_(self.alpha_raw, math.log(self.alpha_init / (1 - self.alpha_init)))
        nn.init.constant_(self.delta_raw, math.log(self.delta_init / (1 - self.delta_init)))
        if self.source:
            nn.init.zeros_(self.source_weight)
        if self.attention == "transformer":
            for linear in (self.query, self.key):
                linear.reset_parameters()
                nn.init.constant_(linear.weight, 1e-5)  # nearly uniform attention, as the official code
        self._graph: _Graph | None = None

    def forward(
        self,
        x: Float[Tensor, "nodes channels"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> Float[Tensor, "nodes channels"]:
        """Return the state at ``time`` from ``x`` at time 0."""
        edge_index = check_graph(x, edge_index, edge_weight, self.channels)
        field, parts = self._field(x, edge_index, edge_weight, source_state=x)
        start, count = wide(x), 0

        def counted(_: Any, state: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if count > self.max_evals:
                raise RuntimeError(
                    f"more than max_evals = {self.max_evals} evaluations: raise max_evals or lower beta"
                )
            return field(state)

        with torch.autocast(x.device.type, enabled=False):  # steps add up
            if self.method == "dopri5":
                state = self._adaptive(counted, start, parts)
            else:
                n = max(1, round(self.time / self.step_size))
                state = _equal_steps(counted, start, n, self.time / n, self.method)
        self.num_evals, count = count, 0  # an adjoint solve counts anew
        if not torch.isfinite(state).all():
            raise RuntimeError(self._diverged())
        return state.to(x.dtype)

    def _diverged(self) -> str:
        way = 'step_size, or take method "dopri5", or lower beta' if self.method != "dopri5" else "beta"
        return f"the state is not finite before time {self.time:g}: lower {way}, got beta {self.beta:g}"

    @uncompiled
    def _adaptive(self, field: Callable[..., Tensor], x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        solver = needs("torchdiffeq", "graphs")
        if not x.numel():
            return x
        solve, more = solver.odeint, {}
        if self.adjoint:
            solve, more = solver.odeint_adjoint, {"adjoint_params": parts}
        # by the largest error, not the mean: else a few stiff nodes hide in a large graph
        options = {"norm": lambda error: error.abs().max()}
        span = torch.tensor([0.0, self.time], dtype=x.dtype, device=x.device)
        try:
            return solve(
                field, x, span, method="dopri5", rtol=self.rtol, atol=self.atol, options=options, **more
            )[-1]
        except AssertionError as error:  # how torchdiffeq says that steps vanish or the state overflows
            raise RuntimeError(self._diverged()) from error

    def velocity(
        self,
        x: Float[Tensor, "nodes channels"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        *,
        source_state: Float[Tensor, "nodes channels"] | None = None,
    ) -> Float[Tensor, "nodes channels"]:
        """Return dx/dt at a state, the right-hand side of equation 1.

        Parameters
        ----------
        x : Tensor of shape (nodes, channels)
            The state, from which the coefficients are computed too.
        edge_index : Tensor of shape (2, edges)
            Edges.
        edge_weight : Tensor of shape (edges,), optional
            Their weights.
        source_state : Tensor of shape (nodes, channels), optional
            What ``source_weight`` multiplies; by default ``x``.

        Returns
        -------
        Tensor
            Shape (nodes, channels).
        """
        edge_index = check_graph(x, edge_index, edge_weight, self.channels)
        if source_state is not None:
            has_shape("source_state", floating("source_state", source_state), x.shape, "x")
        start = x if source_state is None else source_state
        return self._field(x, edge_index, edge_weight, source_state=start)[0](wide(x)).to(x.dtype)

    def _field(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, *, source_state: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
        """Return the velocity as a function of a state that is not narrow, and what it depends on."""
        operator = self._operator(x, edge_index, edge_weight)
        alpha, delta = self._rates()
        drive = wide(self.source_weight) * wide(source_state) if self.source else None

        def field(state: Tensor) -> Tensor:
            rate = _Velocity.apply(state, operator.weight, alpha, delta, operator, self.barrier)
            return rate if drive is None else rate + drive

        return field, tuple(part for part in (operator.weight, alpha, delta, drive) if part is not None)

    def _rates(self) -> tuple[Tensor, Tensor | None]:
        """Return alpha and, with a well, delta."""
        alpha = wide(self.alpha_raw).sigmoid()
        return alpha, wide(self.delta_raw).sigmoid() if self.reaction else None

    @uncompiled
    def _operator(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Adjacency:
        graph, forces = self._forces(x, edge_index, edge_weight)
        n, n_edges = len(x), len(forces) - len(x)
        if self.interaction == "difference":  # a self-loop's difference is 0; the diagonal is -row sum
            off = torch.where(graph.loop, 0.0, forces)[:n_edges]
            own = -off.new_zeros(n).index_add(0, graph.pattern.receiver[:n_edges], off)
        else:
            off, own = forces[:n_edges], forces[n_edges:] - 1
        return Adjacency(graph.pattern, torch.cat([off, own]))

    def _forces(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None
    ) -> tuple["_Graph", Float[Tensor, " entries"]]:
        """Return a - beta for each edge, then for each self-loop that was added, 0 where none was."""
        graph = self._graph
        if graph is None and not self.cached:
            graph = _graph(x, edge_index, edge_weight, self.attention)
        elif graph is None:
            with torch.inference_mode(False):  # training may follow
                weight = None if edge_weight is None else ordinary(edge_weight.detach())
                self._graph = graph = _graph(x, ordinary(edge_index), weight, self.attention)
        if self.attention == "transformer":
            a = self._attend(x, graph)
        else:
            a = graph.weight.to(torch.promote_types(x.dtype, torch.float32))
        return graph, torch.where(graph.present, a - self.beta, 0.0)

    def _attend(self, x: Tensor, graph: "_Graph") -> Tensor:
        sender, receiver = graph.pattern[:2]
        q = wide(self.query(x)).unflatten(1, (self.heads, -1))
        k = wide(self.key(x)).unflatten(1, (self.heads, -1))
        logits = (q[receiver] * k[sender]).sum(2) / math.sqrt(q.shape[2])  # (entries, heads)
        logits = logits.masked_fill(~graph.present[:, None], -math.inf)
        rows = receiver[:, None].expand_as(logits)
        top = logits.new_full((len(x), self.heads), -math.inf).scatter_reduce(
            0, rows, logits.detach(), "amax"
        )
        share = (logits - top[receiver]).exp()
        total = share.new_zeros(len(x), self.heads).index_add(0, receiver, share)
        return (share / total[receiver]).mean(1)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        return (
            f"{self.channels}, time={self.time}, beta={self.beta}, attention={self.attention!r}, "
            f"interaction={self.interaction!r}, reaction={self.reaction}, method={self.method!r}"
        )


class ACMP(nn.Module):
    """A network for nodes: dropout, linear, `ACMPConv`, ReLU, dropout, linear.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int
        Width of the state.
    out_channels : int
        Outputs of a node.
    input_dropout, dropout : float, default=0.5 and 0.0
        Shares of features, and of the last state, that training drops; in [0, 1).
    **conv : Any
        Options of `ACMPConv`.

    Attributes
    ----------
    encoder, decoder : nn.Linear
        Around the layer.
    conv : ACMPConv
        The layer.

    Raises
    ------
    ValueError
        As for `ACMPConv`, or if a parameter is out of range.
    RuntimeError
        As for `ACMPConv`.

    References
    ----------
    .. [1] Wang, Yi, Liu, Wang, Jin. ACMP. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import ACMP
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> ACMP(4, 16, 3, beta=0.2, method="rk4")(torch.randn(3, 4), edge_index).shape
    torch.Size([3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        input_dropout: float = 0.5,
        dropout: float = 0.0,
        **conv: Any,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        integer("hidden_channels", hidden_channels, 1)
        integer("out_channels", out_channels, 1)
        self.input_dropout = nn.Dropout(within("input_dropout", input_dropout, 0, 1, open_high=True))
        self.dropout = nn.Dropout(within("dropout", dropout, 0, 1, open_high=True))
        self.encoder = nn.Linear(in_channels, hidden_channels)
        self.conv = ACMPConv(hidden_channels, **conv)
        self.decoder = nn.Linear(hidden_channels, out_channels)

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> Float[Tensor, "nodes out"]:
        """Return the output of each node."""
        edge_index = check_graph(x, edge_index, edge_weight, self.in_channels)
        state = self.conv(self.encoder(self.input_dropout(x)), edge_index, edge_weight)
        return self.decoder(self.dropout(state.relu()))


class _Graph(NamedTuple):
    """The entries of the operator: all edges, and then one per node."""

    pattern: EdgePattern
    weight: Tensor  # a_ij of "gcn" and "rw"
    loop: Tensor  # whether sender and receiver are one
    present: Tensor  # whether it takes part: edges do, added self-loops where a node has none


def _graph(x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, attention: str) -> _Graph:
    n, (sender, receiver) = len(x), edge_index
    ones = torch.ones(len(sender), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    weight = ones if edge_weight is None else edge_weight.to(ones)
    sender, receiver, weight, present = add_self_loops(sender, receiver, weight, n)
    if attention != "transformer":
        weight = normalised(sender, receiver, weight, n, symmetric=attention == "gcn")
    return _Graph(edge_pattern(sender, receiver, n), weight, sender == receiver, present)


class _Velocity(torch.autograd.Function):
    """alpha S x + delta x (barrier - x^2); its gradient by the transposed CSR of S."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, delta: Tensor | None, S: Adjacency, barrier: float
    ) -> Tensor:
        flow = times(S.matrix, x)
        ctx.S, ctx.barrier = S, barrier
        ctx.save_for_backward(x, alpha, delta, flow)
        if delta is None:
            return alpha * flow
        return torch.addcmul(alpha * flow, delta * x, barrier - x.square())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, delta, flow = ctx.saved_tensors
        S, need = ctx.S, ctx.needs_input_grad
        pull = alpha * gradient
        to_x = to_weight = to_delta = None
        if need[0]:
            to_x = times(S.transposed, pull)
            if delta is not None:
                to_x = to_x.addcmul(delta * gradient, torch.sub(ctx.barrier, x.square(), alpha=3))
        if need[1]:
            to_weight = row_dots(S.pattern, x, pull)
        if need[3]:
            to_delta = (gradient * x * (ctx.barrier - x.square())).sum(0)
        return to_x, to_weight, (gradient * flow).sum(0) if need[2] else None, to_delta, None, None


def _equal_steps(field: Callable[[Any, Tensor], Tensor], x: Tensor, n: int, h: float, method: str) -> Tensor:
    for _ in range(n):
        k1 = field(None, x)
        if method == "euler":
            x = torch.add(x, k1, alpha=h)
            continue
        k2 = field(None, torch.add(x, k1, alpha=h / 2))
        k3 = field(None, torch.add(x, k2, alpha=h / 2))
        k4 = field(None, torch.add(x, k3, alpha=h))
        x = torch.add(x, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=h / 6)
    return x
