"""Generalised distance Weisfeiler-Lehman: colours of nodes that see all distances.

Refine the colour of each node by the multiset of distances and colours of *all* nodes of its
graph, not of its neighbours alone:

    c_{t+1}(u) = hash {{ (d(u, v), c_t(v)) : v in V }}.                                  (1)

With hops for d, colours tell bridges from other edges; with the resistance distance, cut
vertices from other nodes; ordinary message passing tells neither. Both lie strictly below
2-FWL.
"""

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from posterity._checks import floating, has_shape, integer, one_of
from posterity.graphs._graph import check_index
from posterity.graphs.graph_distances import Distance, _conductances, _hops, _Layout, _resistance

__all__ = ["gd_wl_colors", "gd_wl_equivalent"]


def gd_wl_colors(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, *, distance: Distance | Tensor = "rd",
    batch: Int[Tensor, " nodes"] | None = None, colors: Int[Tensor, " nodes"] | None = None,
    max_iter: int | None = None, decimals: int = 6,
) -> Int[Tensor, " nodes"]:  # fmt: skip
    """Return the stable colours of (1), comparable across the graphs of a batch.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions.
    num_nodes : int
        How many nodes.
    distance : {"spd", "rd", "both"} or Tensor, default="rd"
        Hops, resistance, the pair of them, or a symmetric matrix of one's own: for one graph
        ``(n, n)``, for a batch padded as `resistance_distance` pads; float64 is advised.
    batch : Tensor, optional
        Sorted graph of each node.
    colors : Tensor, optional
        First colours, such as labels; by default all are equal.
    max_iter : int, optional
        Most rounds; by default until no colour splits.
    decimals : int, default=6
        Distances that follow each other within ``10^-decimals``, times the largest where that
        is below 1, are taken as equal; so are those that rounding may have told apart.

    Returns
    -------
    Tensor
        Numbers from 0.

    References
    ----------
    .. [1] Zhang, Luo, Wang, He. Rethinking the Expressive Power of GNNs via Graph
       Biconnectivity. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import gd_wl_colors
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> gd_wl_colors(path, 3)
    tensor([1, 0, 1])
    """
    integer("decimals", decimals, 0)
    if max_iter is not None:
        integer("max_iter", max_iter, 0)
    layout = _Layout(edge_index, num_nodes, batch)
    if isinstance(distance, Tensor):
        codes = [_own_distance(distance, layout, batch is None)]
    else:
        one_of("distance", distance, ("spd", "rd", "both"))
        codes = [_hops(layout)] if distance != "rd" else []
        codes += [_resistance(layout, _conductances(layout, None))] if distance != "spd" else []
    pairs = layout.pairs
    ranks = [_ranked(code.detach().cpu().numpy(), pairs, decimals) for code in codes]
    code = ranks[0] if len(ranks) == 1 else ranks[0] * (int(ranks[1].max(initial=0)) + 1) + ranks[1]
    small = (int(code.max(initial=0)) + 1) * num_nodes < 2**31  # half the memory sorts in half the time
    code = code.astype(np.int32 if small else np.int64)
    now = np.zeros(num_nodes, np.int64)
    if colors is not None:
        now = _numbered(check_index("colors", colors, (num_nodes,), read=False).cpu().numpy())
    graph, place = layout.graph, layout.place
    rounds, classes = (
        max_iter if max_iter is not None else int(layout.sizes.max(initial=0)),
        now.max(initial=-1) + 1,
    )
    for _ in range(rounds):
        held = np.zeros(layout.mask.shape, code.dtype)
        held[graph, place] = now
        keys = np.where(pairs, code * code.dtype.type(classes) + held[:, None, :], code.dtype.type(-1))[
            graph, place
        ]  # (nodes, n_max)
        keys.sort(axis=1)
        refined = _numbered(
            np.ascontiguousarray(keys).view(np.dtype((np.void, keys.itemsize * keys.shape[1])))[:, 0]
        )
        if refined.max(initial=-1) + 1 == classes:
            break
        now, classes = refined, refined.max() + 1
    return torch.from_numpy(_numbered(now)).to(edge_index.device)


def gd_wl_equivalent(
    edge_index_a: Int[Tensor, "2 edges_a"], num_nodes_a: int, edge_index_b: Int[Tensor, "2 edges_b"],
    num_nodes_b: int, *, distance: Distance = "rd",
) -> bool:  # fmt: skip
    """Return whether the test cannot tell two graphs apart.

    Parameters
    ----------
    edge_index_a : Tensor
        Undirected edges of the first graph, in both directions.
    num_nodes_a : int
        How many nodes it has.
    edge_index_b : Tensor
        Edges of the second graph.
    num_nodes_b : int
        How many nodes it has.
    distance : {"spd", "rd", "both"}, default="rd"
        As for `gd_wl_colors`.

    Returns
    -------
    bool
        True for isomorphic graphs, and for those that the colours confuse.
    """
    one_of("distance", distance, ("spd", "rd", "both"))
    for name, edges, n in (("a", edge_index_a, num_nodes_a), ("b", edge_index_b, num_nodes_b)):
        layout = _Layout(edges, integer(f"num_nodes_{name}", n, 0), None, f"edge_index_{name}")
        if distance != "spd":
            _conductances(layout, None)  # may find what is listed more often one way
    both = torch.cat([edge_index_a, edge_index_b + num_nodes_a], 1)
    batch = torch.arange(2).repeat_interleave(torch.tensor([num_nodes_a, num_nodes_b]))
    colors = gd_wl_colors(both, num_nodes_a + num_nodes_b, distance=distance, batch=batch)
    return torch.equal(colors[:num_nodes_a].sort().values, colors[num_nodes_a:].sort().values)


def _own_distance(distance: Tensor, layout: _Layout, single: bool) -> Tensor:
    floating("distance", distance)
    shape = (*layout.mask.shape, layout.mask.shape[1])
    padded = has_shape("distance", distance, shape[1:] if single else shape, "the nodes")
    padded = padded[None] if single else padded
    pairs = torch.from_numpy(layout.pairs).to(padded.device)
    if bool((torch.isnan(padded) & pairs).any()):
        raise ValueError("distance must not be NaN")
    if not torch.equal(torch.where(pairs, padded, 0), torch.where(pairs, padded, 0).mT):
        raise ValueError("distance must be symmetric")
    return padded.double()


def _ranked(distance: ndarray, pairs: ndarray, decimals: int) -> ndarray:
    """Return the rank of each distance; values in a row that are nearer than 10^-decimals share one."""
    values = np.unique(distance[pairs])
    size = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values))
    near = np.maximum(10.0**-decimals * min(1.0, size.max(initial=0)), 8 * np.finfo(values.dtype).eps * size)
    with np.errstate(invalid="ignore"):  # inf - inf
        rank = np.cumsum(np.concatenate([[0], np.diff(values) > near[1:]]))[: len(values)]
    out = np.zeros(distance.shape, np.int64)
    out[pairs] = rank[np.searchsorted(values, distance[pairs])]
    return out


def _numbered(labels: ndarray) -> ndarray:
    """Return labels numbered 0, 1, ... in sorted order."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
