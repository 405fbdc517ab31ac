"""Resolvent filters: a graph convolution that stays finite where edges grow strong without limit.

With edge weights w and node weights mu, the Laplacian (L f)_i = (1/mu_i) sum_{j->i} w_ij (f_i - f_j)
diverges as some edges grow strong, but its resolvent does not:

    R = s (L + s)^(-1),      y = sum_{k=1..K} R^k x W_k + b,      s > 0.           (1)

Each row of R is a weighted mean over nodes, the wider the stronger the edges are against s;
across an edge far stronger than s values become equal. The matrix diag(mu) (1 + L/s) is factored
once a call, and each power costs one substitution.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer
from posterity.graphs._graph import check_edges

__all__ = ["ResolventConv"]

LARGEST_DENSE = 2_000  # nodes; beyond, a sparse factorisation


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
       On a directed graph R is row-stochastic, but `filter_gain` and `stability_bound` do not hold.
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
            resolvent = _Resolvent(graph.kept() if self.cached else graph, self.shift)
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


class _Graph(NamedTuple):
    """Edges, weights and node weights in float64."""

    edge_index: Tensor
    weight: Tensor
    mu: Tensor

    @staticmethod
    def of(edge_index: Any, n: int, edge_weight: Any, node_weight: Any, device: torch.device) -> "_Graph":
        """Check what a user gave."""
        integer("num_nodes", n, 1)
        edge_index = check_edges(edge_index, n)
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

    def kept(self) -> "_Graph":
        """Return a copy, which training may use whatever made this one."""
        with torch.inference_mode(False):
            return _Graph(*(part.detach().clone() for part in self))

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
    if not x.shape[-2]:
        raise ValueError(f"x must have at least one node, got shape {tuple(x.shape)}")
