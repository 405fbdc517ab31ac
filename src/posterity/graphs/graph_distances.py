"""Hops and effective resistance between all pairs of nodes, of one graph or of a padded batch.

Let edges be resistors of conductance w. The voltage between u and v that drives one ampere is

    R_uv = M_uu + M_vv - 2 M_uv,      M = (L + 1 1' / n)^(-1),                              (1)

in each component of n nodes, L its weighted Laplacian. With w = 1 that is the number of hops on
a tree, and less wherever there is a second way; an edge is a bridge exactly where R is 1 / w.
All graphs of a batch are solved at once, by a Cholesky factorisation.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, shortest_path
from torch import Tensor

from posterity._checks import floating, has_shape, integer
from posterity.graphs._graph import check_batch, check_undirected

__all__ = ["resistance_distance", "shortest_path_distance"]

Distance = Literal["spd", "rd", "both"]


def resistance_distance(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, *, edge_weight: Float[Tensor, " edges"] | None = None,
    batch: Int[Tensor, " nodes"] | None = None,
) -> Float[Tensor, "*graphs n n"]:  # fmt: skip
    """Return the effective resistance of every pair of nodes.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions. Self-loops carry no current; conductances of
        repeated edges add.
    num_nodes : int
        How many nodes.
    edge_weight : Tensor, optional
        Conductances, positive and the same in both directions; by default 1.
    batch : Tensor, optional
        Sorted graph of each node; the result is then padded, ``(graphs, n_max, n_max)``.

    Returns
    -------
    Tensor
        In the dtype of ``edge_weight`` or without it in the default dtype (computed in
        float64), inf between components and on padding, 0 on the diagonal; differentiable in
        ``edge_weight``.

    Raises
    ------
    ValueError
        If an edge lacks its reverse, an index is out of range or a conductance is not positive.

    References
    ----------
    .. [1] Klein, Randic. Resistance distance. Journal of Mathematical Chemistry 12, 1993.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import resistance_distance
    >>> triangle = torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]])
    >>> resistance_distance(triangle, 3)[0]
    tensor([0.0000, 0.6667, 0.6667])
    """
    layout = _Layout(edge_index, num_nodes, batch)
    dtype = torch.get_default_dtype() if edge_weight is None else edge_weight.dtype
    out = _resistance(layout, _conductances(layout, edge_weight)).to(dtype)
    return out if batch is not None else out[0]


def shortest_path_distance(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, *, batch: Int[Tensor, " nodes"] | None = None
) -> Float[Tensor, "*graphs n n"]:
    """Return the number of hops between every pair of nodes.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions.
    num_nodes : int
        How many nodes.
    batch : Tensor, optional
        Sorted graph of each node; the result is then padded, ``(graphs, n_max, n_max)``.

    Returns
    -------
    Tensor
        In the default dtype, inf where there is no path and on padding.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import shortest_path_distance
    >>> shortest_path_distance(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 4)[0]
    tensor([0., 1., 2., inf])
    """
    layout = _Layout(edge_index, num_nodes, batch)
    out = _hops(layout).to(torch.get_default_dtype())
    return out if batch is not None else out[0]


class _Layout:
    """Where each node of a batch stands in padded arrays; checks the edges."""

    def __init__(
        self, edge_index: Tensor, num_nodes: int, batch: Tensor | None, name: str = "edge_index"
    ) -> None:
        self.name = name
        self.edges = check_undirected(edge_index, integer("num_nodes", num_nodes, 0), name).cpu().numpy()
        self.num_nodes, self.device = num_nodes, edge_index.device
        if batch is None:
            self.graph = np.zeros(num_nodes, np.int64)
            self.sizes = np.array([num_nodes])
        else:
            self.graph = check_batch(batch, num_nodes, source="the nodes", read=True).cpu().numpy()
            self.sizes = np.bincount(self.graph)
        starts = self.sizes.cumsum() - self.sizes
        self.place = np.arange(num_nodes) - starts[self.graph]
        across = self.graph[self.edges[0]] != self.graph[self.edges[1]]
        if across.any():
            raise ValueError(f"edge_index must stay inside graphs, edge {int(across.argmax())} joins two")
        self.mask = np.arange(self.sizes.max(initial=0)) < self.sizes[:, None]

    @property
    def pairs(self) -> ndarray:
        """Which entries of a padded matrix are pairs of nodes."""
        return self.mask[:, :, None] & self.mask[:, None, :]

    def at(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return graph, row (receiver) and column (sender) of each edge."""
        send, receive = self.edges
        parts = self.graph[send], self.place[receive], self.place[send]
        return tuple(torch.from_numpy(part).to(self.device) for part in parts)  # type: ignore[return-value]


def _conductances(layout: _Layout, edge_weight: Tensor | None) -> Tensor:
    """Return symmetric padded conductances, float64, without loops."""
    graph, row, column = layout.at()
    shape = (*layout.mask.shape, layout.mask.shape[1])
    if edge_weight is None:
        weight = torch.ones(len(graph), dtype=torch.float64, device=layout.device)
    else:
        weight = has_shape(
            "edge_weight", floating("edge_weight", edge_weight), (len(graph),), "edge_index"
        ).double()
        fixed = weight.detach()
        bad = ~((fixed > 0) & torch.isfinite(fixed))
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"edge_weight must be positive and finite, got {float(fixed[at])} for edge {at}")
    weight = weight * (row != column)
    out = torch.zeros(shape, dtype=torch.float64, device=layout.device)
    out = out.index_put((graph, row, column), weight, accumulate=True)
    fixed = out.detach()
    if torch.equal(fixed, fixed.mT):
        return out
    uneven = (fixed - fixed.mT).abs() > 1e-9 * fixed.abs()
    if bool(uneven.any()):
        g, i, j = uneven.nonzero()[0].tolist()
        rule = "list an edge as often" if edge_weight is None else "be the same"
        raise ValueError(
            f"{layout.name if edge_weight is None else 'edge_weight'} must {rule} in both directions, "
            f"got {float(fixed[g, i, j]):g} and {float(fixed[g, j, i]):g}"
        )
    return out


def _components(layout: _Layout) -> Tensor:
    """Return the padded component of each node, -1 on padding."""
    send, receive = layout.edges
    n = layout.num_nodes
    matrix = csr_matrix((np.ones(len(send)), (send, receive)), shape=(n, n))
    out = np.full(layout.mask.shape, -1)
    if n:
        out[layout.graph, layout.place] = connected_components(matrix, directed=False)[1]
    return torch.from_numpy(out).to(layout.device)


def _resistance(layout: _Layout, conductance: Tensor) -> Tensor:
    """Return padded resistances: M_ii + M_jj - 2 M_ij, M = (L + c 1 1' / n of each component)^-1.

    Any c > 0 gives the same; near the largest conductance both parts are of one size, and as a
    power of two it rounds nothing.
    """
    if not conductance.numel():
        return conductance
    component = _components(layout)
    mask = component >= 0
    same = (component[:, :, None] == component[:, None, :]) & mask[:, :, None]
    size = same.sum(-1, keepdim=True).clamp_min(1)
    top = (same * conductance.detach().amax(-1)[:, None, :]).amax(-1, keepdim=True)
    unit = torch.where(top > 0, torch.where(top > 0, top, 1.0).log2().floor().exp2(), 1.0)
    matrix = same * unit / size - conductance
    matrix.diagonal(dim1=-2, dim2=-1).add_(conductance.sum(-1) + ~mask)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    return torch.where(same, diagonal[..., :, None] + diagonal[..., None, :] - 2 * inverse, torch.inf)


def _hops(layout: _Layout) -> Tensor:
    """Return padded hops, float64; small graphs all at once, large ones by searches from each node."""
    n = layout.mask.shape[1]
    mask = torch.from_numpy(layout.mask).to(layout.device)
    distance = torch.full((*mask.shape, n), torch.inf, dtype=torch.float64, device=layout.device)
    if n > 64:
        starts = layout.sizes.cumsum() - layout.sizes
        send, receive = layout.edges
        matrix = csr_matrix((np.ones(len(send)), (send, receive)), shape=(layout.num_nodes,) * 2)
        for g, (start, size) in enumerate(zip(starts, layout.sizes, strict=True)):
            part = matrix[start : start + size, start : start + size]
            distance[g, :size, :size] = torch.from_numpy(shortest_path(part, unweighted=True))
        return distance
    linked = torch.zeros(distance.shape, dtype=torch.float32, device=layout.device)
    linked[layout.at()] = 1
    reached = torch.diag_embed(mask.float())
    distance[reached > 0] = 0
    for hop in range(1, n):
        wider = ((reached @ linked + reached) > 0).float()
        fresh = wider > reached
        if not bool(fresh.any()):
            break
        distance[fresh] = hop
        reached = wider
    return distance
