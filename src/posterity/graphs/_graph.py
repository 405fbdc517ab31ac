"""What the domain's papers share: checks of a graph's tensors, and its adjacency as CSR.

With receivers as rows, the product with states sums over incoming edges, the fastest way
on a CPU; its gradient needs the transposed matrix, with senders as rows.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from posterity._checks import floating, has_shape, integer

__all__ = ["adjacency", "check_edges", "check_graph", "check_undirected", "csr", "csr_order"]


def check_edges(edge_index: Any, n: int, *, source: str = "", read: bool | None = None) -> Tensor:
    """Return edges of shape (2, edges) that name nodes below n; ``read=None`` looks at values on a CPU only."""
    if not isinstance(edge_index, Tensor):
        raise ValueError(f"edge_index must hold integers, got {type(edge_index).__name__}")
    if edge_index.dtype.is_floating_point or edge_index.dtype.is_complex or edge_index.dtype == torch.bool:
        raise ValueError(f"edge_index must hold integers, got dtype {edge_index.dtype}")
    has_shape("edge_index", edge_index, (2, None))
    if (edge_index.device.type == "cpu" if read is None else read) and edge_index.numel():
        low, high = (int(end) for end in edge_index.aminmax())
        if low < 0 or high >= n:
            tail = f" of {source}" if source else ""
            raise ValueError(
                f"edge_index must name nodes in 0..{n - 1}{tail}, got {low if low < 0 else high}"
            )
    return edge_index


def check_undirected(edge_index: Any, n: int) -> Tensor:
    """Return edges of which each comes with its reverse; reads values everywhere."""
    send, receive = check_edges(edge_index, integer("num_nodes", n, 0), read=True).long()
    there, back = (send * n + receive).sort().values, (receive * n + send).sort().values
    if not torch.equal(there, back):  # or an edge is merely repeated in one direction
        lone = there[~torch.isin(there, back)]
        if len(lone):
            u, v = divmod(int(lone[0]), n)
            raise ValueError(f"edge_index must list both directions: {u} -> {v} lacks its reverse")
    return edge_index


def check_graph(x: Any, edge_index: Any, edge_weight: Any = None, channels: int | None = None) -> None:
    """Check features (nodes, channels), edges between those nodes, and their weights."""
    has_shape("x", floating("x", x), (None, channels), "" if channels is None else "this layer")
    check_edges(edge_index, len(x))
    if edge_weight is not None:
        has_shape("edge_weight", floating("edge_weight", edge_weight), (edge_index.shape[1],), "edge_index")


def csr_order(rows: Tensor, columns: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return how CSR lays entries out: where each row begins, their columns, their order."""
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), columns[order], order


def csr(pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return the square CSR matrix of entries that are in its order."""
    n = len(pointers) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(pointers, columns, values, (n, n), check_invariants=False)


def adjacency(sender: Tensor, receiver: Tensor, weight: Tensor, n: int) -> Tensor:
    """Return the weighted adjacency with receivers as rows; with the ends exchanged, its transposed."""
    pointers, columns, order = csr_order(receiver, sender, n)
    return csr(pointers, columns, weight.detach()[order])
