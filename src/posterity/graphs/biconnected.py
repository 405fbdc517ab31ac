"""Where a graph falls apart: cut vertices, bridges, blocks and their trees, by one search.

A depth-first search numbers the nodes; low(v) is the least number that v and those below it
reach by at most one edge that the search did not take. For a tree edge u -> v,

    low(v) >= number(u): u is a cut vertex (the root: where it has two children or more);
    low(v) >  number(u): the edge is a bridge.                                           (1)

The search keeps its own stack, so that a long path does not exhaust Python's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from posterity._checks import integer
from posterity.graphs._graph import check_undirected

__all__ = ["Biconnectivity", "biconnectivity"]


@dataclass
class Biconnectivity:
    """Where a graph falls apart.

    Attributes
    ----------
    cut_vertex : Tensor of shape (nodes,), bool
        Nodes whose removal disconnects their component.
    bridge : Tensor of shape (edges,), bool
        Edges whose removal does, both directions of them.
    block : Tensor of shape (edges,), int64
        Vertex-biconnected component of each edge; -1 for a self-loop.
    edge_component : Tensor of shape (nodes,), int64
        2-edge-connected component of each node.
    bridge_tree : Tensor of shape (2, 2 * bridges)
        Its nodes are the edge components, joined by bridges.
    block_cut_tree : Tensor of shape (2, any)
        Nodes 0, 1, ... are the blocks, then come the cut vertices in increasing order.
    """

    cut_vertex: Bool[Tensor, " nodes"]
    bridge: Bool[Tensor, " edges"]
    block: Int[Tensor, " edges"]
    edge_component: Int[Tensor, " nodes"]
    bridge_tree: Int[Tensor, "2 tree_edges"]
    block_cut_tree: Int[Tensor, "2 block_edges"]


def biconnectivity(edge_index: Int[Tensor, "2 edges"], num_nodes: int) -> Biconnectivity:
    """Return cut vertices, bridges and blocks, by one depth-first search.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions; repetitions are merged, self-loops ignored.
    num_nodes : int
        How many nodes.

    Returns
    -------
    Biconnectivity
        Cut vertices, bridges, components and their trees.

    References
    ----------
    .. [1] Hopcroft, Tarjan. Efficient algorithms for graph manipulation. Communications of
       the ACM 16, 1973.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import biconnectivity
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> biconnectivity(path, 3).cut_vertex
    tensor([False,  True, False])
    """
    edge_index = check_undirected(edge_index, integer("num_nodes", num_nodes, 0))
    send, receive = edge_index.cpu().numpy()
    low, high = np.minimum(send, receive), np.maximum(send, receive)
    keys, number = np.unique(low * num_nodes + high, return_inverse=True)
    low, high = keys // max(num_nodes, 1), keys % max(num_nodes, 1)
    cut, bridge, block = _search(low, high, num_nodes)
    joined = ~bridge & (low != high)
    matrix = csr_matrix((np.ones(joined.sum()), (low[joined], high[joined])), shape=(num_nodes, num_nodes))
    component = (
        connected_components(matrix, directed=False)[1].astype(np.int64)
        if num_nodes
        else np.zeros(0, np.int64)
    )
    ends = np.stack([component[low[bridge]], component[high[bridge]]])
    cuts = np.flatnonzero(cut)
    rows = np.full(num_nodes, -1)
    rows[cuts] = block.max(initial=-1) + 1 + np.arange(len(cuts))
    real = block >= 0
    pairs = np.concatenate([np.stack([block[real], rows[end[real]]]) for end in (low, high)], 1)
    pairs = np.unique(pairs[:, pairs[1] >= 0], axis=1)
    as_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(edge_index.device)  # noqa: E731
    return Biconnectivity(
        as_tensor(cut), as_tensor(bridge[number]), as_tensor(block[number]), as_tensor(component),
        as_tensor(np.concatenate([ends, ends[::-1]], 1)), as_tensor(np.concatenate([pairs, pairs[::-1]], 1)),
    )  # fmt: skip


def _search(low: ndarray, high: ndarray, n: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return cut vertices, bridges and the block of each undirected edge: Tarjan's lowlink, iterative."""
    near: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    for edge, (u, v) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if u != v:
            near[u].append((v, edge))
            near[v].append((u, edge))
    order, least = [-1] * n, [0] * n
    cut, bridge, block = np.zeros(n, bool), np.zeros(len(low), bool), np.full(len(low), -1, np.int64)
    clock = blocks = 0
    for root in range(n):
        if order[root] >= 0:
            continue
        order[root] = least[root] = clock
        clock += 1
        children, pending = 0, []
        stack: list[tuple[int, int, Any]] = [(root, -1, iter(near[root]))]
        while stack:
            u, entered, ahead = stack[-1]
            for v, edge in ahead:
                if edge == entered:
                    continue
                if order[v] < 0:
                    order[v] = least[v] = clock
                    clock += 1
                    pending.append(edge)
                    stack.append((v, edge, iter(near[v])))
                    break
                if order[v] < order[u]:
                    pending.append(edge)
                    least[u] = min(least[u], order[v])
            else:
                stack.pop()
                if not stack:
                    continue
                parent = stack[-1][0]
                least[parent] = min(least[parent], least[u])
                if least[u] >= order[parent]:  # nothing below u reaches above parent
                    bridge[entered] = least[u] > order[parent]
                    children += parent == root
                    cut[parent] |= parent != root
                    while True:
                        edge = pending.pop()
                        block[edge] = blocks
                        if edge == entered:
                            break
                    blocks += 1
        cut[root] = children > 1
    return cut, bridge, block
