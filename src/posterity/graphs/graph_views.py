"""Views of a graph: some edges and features gone, or so corrupted that little of it is left.

Two thinned views of one graph should get alike embeddings; a corrupted one, of which features
are shuffled or drawn anew and edges drawn at random, should not.
"""

import math
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import floating, has_shape, one_of, within
from posterity._precision import wide
from posterity._random import draw_device
from posterity.graphs._graph import check_edges, uncompiled
from posterity.graphs._sparse import SparseMatrix, sparse_product

__all__ = ["augment_graph", "corrupt_graph"]

CORRUPTIONS = (
    "shuffle-features", "random-features", "random-edges", "shuffle-features+random-edges",
    "random-features+random-edges", "random-features+random-count-edges", "sparsify",
)  # fmt: skip
Corruption = Literal[
    "shuffle-features", "random-features", "random-edges", "shuffle-features+random-edges",
    "random-features+random-edges", "random-features+random-count-edges", "sparsify",
]  # fmt: skip
View = tuple[Any, Tensor]  # features, edges


def augment_graph(
    x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *, drop_edge: float,
    drop_feature: float, generator: torch.Generator | None = None,
) -> View:  # fmt: skip
    """Return a view of a graph: some edges gone, some feature columns zero.

    Parameters
    ----------
    x : Tensor
        Features.
    edge_index : Tensor
        Edges; each listed direction is dropped on its own.
    drop_edge, drop_feature : float
        Probabilities, in [0, 1).
    generator : torch.Generator, optional
        Decides what is dropped.

    Returns
    -------
    tuple of Tensor
        ``(x, edge_index)``.
    """
    within("drop_edge", drop_edge, 0, 1, open_high=True)
    within("drop_feature", drop_feature, 0, 1, open_high=True)
    _check_view(x, edge_index)
    return _augment(x, edge_index, drop_edge, drop_feature, generator)


def corrupt_graph(
    x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *,
    kind: Corruption = "shuffle-features+random-edges", generator: torch.Generator | None = None,
) -> View:  # fmt: skip
    """Return a graph that has little to do with the one given, for the repulsion.

    Parameters
    ----------
    x : Tensor
        Features.
    edge_index : Tensor
        Edges.
    kind : str, default="shuffle-features+random-edges"
        Features are shuffled among nodes or drawn from [0, 1); edges drawn uniformly, as
        many as before or up to a quarter more or fewer (``random-count-edges``);
        ``sparsify`` drops 95 % of edges and columns.
    generator : torch.Generator, optional
        Decides all of it.

    Returns
    -------
    tuple of Tensor
        ``(x, edge_index)``.
    """
    one_of("kind", kind, CORRUPTIONS)
    _check_view(x, edge_index)
    return _corrupt(x, edge_index, kind, generator)


class _SparseFeatures:
    """Features of few nonzeros: a fixed sparse matrix, rows in another order, some columns out.

    ``(P X D) W = P (X (D W))``, so views need no new matrix, and the transposed one, for the
    gradient, is made once.
    """

    def __init__(
        self,
        base: SparseMatrix,
        order: Tensor | None = None,
        kept: Tensor | None = None,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.base, self.order, self.kept, self.dtype = base, order, kept, dtype
        self.shape, self.device, self.ndim = base.matrix.shape, base.matrix.device, 2

    @classmethod
    def of(cls, x: Tensor) -> "_SparseFeatures":
        with warnings.catch_warnings():  # torch calls its CSR tensors beta
            warnings.simplefilter("ignore")
            return cls(SparseMatrix(wide(x).to_sparse_csr()), dtype=x.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, order: Tensor) -> "_SparseFeatures":
        order = order if self.order is None else self.order[order]
        return _SparseFeatures(self.base, order, self.kept, dtype=self.dtype)

    def without_columns(self, kept: Tensor) -> "_SparseFeatures":
        kept = kept if self.kept is None else kept & self.kept
        return _SparseFeatures(self.base, self.order, kept, dtype=self.dtype)

    def times(self, weight: Tensor) -> Tensor:
        if self.kept is not None:
            weight = weight * self.kept[:, None].to(weight)
        out = sparse_product(self.base, weight)
        return out if self.order is None else out[self.order]


def _check_view(x: Any, edge_index: Any) -> None:
    has_shape("x", floating("x", x), (None, None))
    check_edges(edge_index, len(x), source="x")


@uncompiled
def _augment(
    x: Any, edge_index: Tensor, drop_edge: float, drop_feature: float, generator: torch.Generator | None
) -> View:
    kept, columns = (
        torch.rand(size, generator=generator, device=draw_device(generator)).to(edge_index.device) >= share
        for size, share in ((edge_index.shape[1], drop_edge), (x.shape[1], drop_feature))
    )
    view = x.without_columns(columns) if isinstance(x, _SparseFeatures) else x * columns.to(x)
    return view, edge_index[:, kept]


@uncompiled
def _corrupt(x: Any, edge_index: Tensor, kind: str, generator: torch.Generator | None) -> View:
    if kind == "sparsify":
        return _augment(x, edge_index, 0.95, 0.95, generator)
    n, count = len(x), edge_index.shape[1]
    if "shuffle-features" in kind:
        x = x[torch.randperm(n, generator=generator, device=draw_device(generator)).to(x.device)]
    elif "random-features" in kind:
        dtype = torch.promote_types(x.dtype, torch.float32)
        drawn = torch.rand(x.shape, generator=generator, device=draw_device(generator), dtype=dtype)
        x = drawn.to(device=x.device, dtype=x.dtype)
    if "count" in kind:
        low, high = math.ceil(0.75 * count), math.ceil(1.25 * count)
        count = int(torch.randint(low, high + 1, (), generator=generator, device=draw_device(generator)))
    if "edges" in kind and n:
        edge_index = torch.randint(n, (2, count), generator=generator, device=draw_device(generator)).to(
            edge_index
        )
    return x, edge_index
