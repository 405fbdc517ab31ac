"""What the domain's papers share: checks of a graph's tensors, and its adjacency as CSR.

With receivers as rows, the product with states sums over incoming edges, the fastest way
on a CPU; its gradient needs the transposed matrix, with senders as rows.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posterity._checks import floating, has_shape
from posterity._precision import NARROW, Function, wide

__all__ = [
    "adjacency",
    "check_batch",
    "check_edges",
    "check_graph",
    "check_index",
    "check_undirected",
    "csr",
    "csr_order",
    "ordinary",
    "trains",
    "uncompiled",
]


def uncompiled(function: Function) -> Function:
    """Let torch.compile call a function as it is: what reads values, or runs scipy, has no graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # asked here, since to mark it beforehand would import the compiler
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@uncompiled
def check_index(
    name: str, index: Any, shape: Sequence[int | None], n: int | None = None, things: str = "nodes", *,
    source: str = "", of: str = "", read: bool | None = None,
) -> Tensor:  # fmt: skip
    """Return integers of a shape as int64; ``read=None`` looks at values on a CPU only.

    They are at least 0, and where ``n`` is given name things below it; ``source`` is who says
    the shape, ``of`` who says n.
    """
    if not isinstance(index, Tensor):
        raise ValueError(f"{name} must hold integers, got {type(index).__name__}")
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got dtype {index.dtype}")
    has_shape(name, index, shape, source)
    if (index.device.type == "cpu" if read is None else read) and index.numel():
        low, high = (end.item() for end in index.aminmax())
        if n is None and low < 0:
            raise ValueError(f"{name} must not be negative, got {low}")
        if n is not None and (low < 0 or high >= n):
            tail = f" of {of}" if of else ""
            rule = f"name {things} in 0..{n - 1}{tail}" if n else f"be empty without {things}"
            raise ValueError(f"{name} must {rule}, got {low if low < 0 else high}")
    return index.long()


def check_edges(
    edge_index: Any, n: int, *, name: str = "edge_index", source: str = "", read: bool | None = None
) -> Tensor:
    """Return edges of shape (2, edges) between nodes below n, as `check_index` does."""
    return check_index(name, edge_index, (2, None), n, of=source, read=read)


@uncompiled
def check_batch(
    batch: Any, n: int, graphs: int | None = None, *, source: str, of: str = "", read: bool | None = None
) -> Tensor:
    """Return the graph of each of n nodes, which must be sorted, as `check_index` does."""
    batch = check_index("batch", batch, (n,), graphs, "graphs", source=source, of=of, read=read)
    if (batch.device.type == "cpu" if read is None else read) and bool((batch.diff() < 0).any()):
        raise ValueError("batch must be sorted")
    return batch


def check_undirected(edge_index: Any, n: int, name: str = "edge_index") -> Tensor:
    """Return edges of which each comes with its reverse; reads values everywhere."""
    send, receive = edges = check_edges(edge_index, n, name=name, read=True)
    there, back = (send * n + receive).sort().values, (receive * n + send).sort().values
    if not torch.equal(there, back):  # or an edge is merely repeated in one direction
        lone = there[~torch.isin(there, back)]
        if len(lone):
            u, v = divmod(int(lone[0]), n)
            raise ValueError(f"{name} must list both directions: {u} -> {v} lacks its reverse")
    return edges


def check_graph(x: Any, edge_index: Any, edge_weight: Any = None, channels: int | None = None) -> Tensor:
    """Check features (nodes, channels) and weights of edges; return the edges, which join those nodes."""
    has_shape("x", floating("x", x), (None, channels), "" if channels is None else "this layer")
    edge_index = check_edges(edge_index, len(x))
    if edge_weight is not None:
        has_shape("edge_weight", floating("edge_weight", edge_weight), (edge_index.shape[1],), "edge_index")
    return edge_index


def ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that training may use: a copy where it was made under inference mode, which is off."""
    return tensor.clone() if tensor.is_inference() else tensor


def trains(function: Function) -> Function:
    """Let a function train the module among its arguments wherever it is called from, and in float32 at least.

    Gradients are on; what inference mode made is copied, or as a module refused, since nobody
    may change its weights. Steps on narrow weights are lost in rounding, so those are widened,
    and cast back at the end.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        modules = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        parts = [part for module in modules for part in (*module.parameters(), *module.buffers())]
        if any(part.is_inference() for part in parts):
            raise ValueError(
                "model must not be made under torch.inference_mode, where nothing can be trained"
            )
        narrow = [(part, part.dtype) for part in parts if part.dtype in NARROW]
        with torch.inference_mode(False), torch.enable_grad():
            args = tuple(map(_usable, args))
            kwargs = {name: _usable(value) for name, value in kwargs.items()}
            for part, _ in narrow:
                part.data, part.grad = part.data.float(), None
            try:
                return function(*args, **kwargs)
            finally:
                for part, dtype in narrow:
                    part.data, part.grad = part.data.to(dtype), None

    return call  # type: ignore[return-value]


def _usable(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return wide(ordinary(value)) if value.is_floating_point() else ordinary(value)


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
