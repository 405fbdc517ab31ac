"""Sums over neighbours as products with a sparse matrix, differentiable in states and edge weights.

With receivers as rows, the product of the weighted adjacency A with states x sums over
incoming edges. The gradient for the states is a product with the transposed matrix, that of
an edge's weight the scalar product of what is sent and what comes back:

    y = A x,    dx = A^T dy,    dA_uv = <dy_u, x_v>.

Both matrices are CSR, the fastest way on a CPU; each is built once and serves every product. There
is no product of CSR in 16 bits on a CPU, and none on any device under autocast, which would make
its entries so: weights, and what is summed, are in float32 at least.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posterity._precision import wide
from posterity.graphs._graph import csr, csr_order, uncompiled

__all__ = [
    "Adjacency",
    "EdgePattern",
    "SparseMatrix",
    "add_self_loops",
    "copies",
    "edge_dots",
    "edge_pattern",
    "gcn_adjacency",
    "normalised",
    "one_self_loop",
    "row_dots",
    "sparse_product",
    "times",
]


class EdgePattern(NamedTuple):
    """The edges of a graph as places in its adjacency, and how CSR orders them."""

    sender: Tensor  # (edges,), the column of each
    receiver: Tensor  # its row
    rows: tuple[Tensor, Tensor, Tensor | None]  # where each row begins, columns, order of the edges
    columns: tuple[Tensor, Tensor, Tensor]  # the same of the transposed matrix


@uncompiled
def edge_pattern(sender: Tensor, receiver: Tensor, n: int, *, sort: bool = False) -> EdgePattern:
    """Return the pattern of edges among n nodes; sorted, by receiver, it suits weights that change often."""
    rows: tuple[Tensor, Tensor, Tensor | None] = csr_order(receiver, sender, n)
    if sort:
        sender, receiver, rows = rows[1], receiver[rows[2]], (*rows[:2], None)
    return EdgePattern(sender, receiver, rows, csr_order(sender, receiver, n))


def copies(pattern: EdgePattern, k: int) -> EdgePattern:
    """Return k copies of a sorted pattern as one, in which node u of copy c is u + c n."""
    copy = torch.arange(k, device=pattern.sender.device)[:, None]
    n, edges = len(pattern.rows[0]) - 1, len(pattern.sender)

    def repeat(part: Tensor, step: int) -> Tensor:
        return (part + step * copy).flatten()

    sender, receiver, order = (
        repeat(pattern.sender, n), repeat(pattern.receiver, n), repeat(pattern.columns[2], edges)
    )  # fmt: skip
    rows, columns = (
        torch.cat([repeat(begins[:-1], edges), k * begins[-1:]])
        for begins in (pattern.rows[0], pattern.columns[0])
    )
    return EdgePattern(sender, receiver, (rows, sender, None), (columns, receiver[order], order))


class SparseMatrix:
    """A constant matrix as CSR, and its transposed once that is asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @cached_property
    def transposed(self) -> Tensor:
        """The transposed matrix as CSR."""
        return self.matrix.t().to_sparse_csr()


class Adjacency(SparseMatrix):
    """The weighted adjacency: the weights of a pattern's edges, and as CSR without a gradient."""

    def __init__(self, pattern: EdgePattern, weight: Tensor) -> None:
        self.pattern, self.weight = pattern, weight
        self._flat = wide(weight.detach().clone())  # ours, whatever becomes of the caller's
        begins, columns, order = pattern.rows
        super().__init__(csr(begins, columns, self._flat if order is None else self._flat[order]))

    @cached_property
    def transposed(self) -> Tensor:
        """The transposed matrix as CSR."""
        begins, columns, order = self.pattern.columns
        return csr(begins, columns, self._flat[order])


@uncompiled
def sparse_product(matrix: SparseMatrix, x: Tensor) -> Tensor:
    """Return the matrix times x, in the dtype of x, with gradients for x and for the weights of edges."""
    weight = matrix.weight if isinstance(matrix, Adjacency) else None
    return _SparseProduct.apply(x, weight, matrix)  # type: ignore[return-value]


@uncompiled
def edge_dots(pattern: EdgePattern, q: Tensor, k: Tensor) -> Tensor:
    """Return for each edge the scalar product of the sender's row of q and the receiver's of k, not narrow."""
    return _EdgeDots.apply(wide(q), wide(k), pattern)  # type: ignore[return-value]


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return a CSR matrix times x, in the dtype of x and without a gradient."""
    if x.dtype != matrix.dtype:
        dtype = torch.promote_types(x.dtype, matrix.dtype)
        return times(matrix.to(dtype), x.to(dtype)).to(x.dtype)
    if not matrix.values().numel():  # which not every backend takes
        return x.new_zeros(len(matrix), x.shape[1])
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return matrix @ x
    return matrix @ x


def row_dots(pattern: EdgePattern, q: Tensor, k: Tensor) -> Tensor:
    """Return `edge_dots`, without a gradient."""
    sent = wide(q).index_select(0, pattern.sender)  # copies whole rows, which indexing by [] does not on CPU
    return sent.mul_(wide(k).index_select(0, pattern.receiver)).sum(1)


def add_self_loops(
    sender: Tensor, receiver: Tensor, weight: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return senders, receivers, weights and presence with one more edge a node, to itself.

    It weighs 1 where the node has no self-loop yet; else it weighs 0 and is not present.
    """
    own = (sender == receiver).float()
    loops = own.new_zeros(n).index_add(0, receiver, own)
    missing, nodes = loops == 0, torch.arange(n, device=weight.device)
    return (
        torch.cat([sender, nodes]),
        torch.cat([receiver, nodes]),
        torch.cat([weight, missing.to(weight.dtype)]),
        torch.cat([torch.ones_like(sender, dtype=torch.bool), missing]),
    )


def one_self_loop(edge_index: Tensor, n: int) -> Tensor:
    """Return the edges with one self-loop a node, however many are listed."""
    nodes = torch.arange(n, device=edge_index.device)
    return torch.cat([edge_index[:, edge_index[0] != edge_index[1]], nodes.expand(2, n)], 1)


def normalised(sender: Tensor, receiver: Tensor, weight: Tensor, n: int, *, symmetric: bool = True) -> Tensor:
    """Return w_uv / sqrt(d_u d_v), or w_uv / d_v, for edges from u to v; d sums incoming weights.

    A node whose sum is not positive sends and gets nothing. The result is not narrow.
    """
    weight = wide(weight)
    degree = weight.new_zeros(n).index_add(0, receiver, weight)
    positive = degree > 0
    scale = torch.where(positive, torch.where(positive, degree, 1.0).rsqrt(), 0.0)
    return scale[receiver] * weight * scale[sender if symmetric else receiver]


@uncompiled
def gcn_adjacency(edge_index: Tensor, n: int, dtype: torch.dtype) -> Adjacency:
    """Return the adjacency with one self-loop a node, symmetrically normalised."""
    sender, receiver = one_self_loop(edge_index, n)
    weight = normalised(sender, receiver, torch.ones_like(sender, dtype=dtype), n)
    return Adjacency(edge_pattern(sender, receiver, n), weight)


class _SparseProduct(torch.autograd.Function):
    """y = A x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return times(matrix.matrix, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        matrix, (x,) = ctx.matrix, ctx.saved_tensors
        to_x = times(matrix.transposed, gradient) if ctx.needs_input_grad[0] else None
        to_weight = row_dots(matrix.pattern, x, gradient) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None


class _EdgeDots(torch.autograd.Function):
    """s_uv = <q_u, k_v>; its gradients are sums over edges, weighted by that of s."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, pattern: EdgePattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(q, k)
        return row_dots(pattern, q, k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k = ctx.saved_tensors
        weighted = Adjacency(ctx.pattern, gradient)
        return times(weighted.transposed, k), times(weighted.matrix, q), None
