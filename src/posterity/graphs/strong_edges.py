"""Collapsing strong edges: the coarse graph, the maps between the two, and what the resolvent loses.

Nodes that strong edges join become one, whose weight is the sum of theirs. J copies a value
to all nodes of a cluster, J* takes the mean by node weights. For the resolvents R and R_c of
both graphs, R = s (L + s)^(-1), in the operator norm by node weights,

    ||R - J R_c J*||  <=  d ((1 + a)^2 + a^2 d),      d = 1 / (1 + l),                     (1)

where l is the smallest non-zero eigenvalue of the strong edges' Laplacian and a the norm of
what the weak edges lead out of the signals that are constant on clusters, both over s. So the
change is of first order in the inverse of the strong weights.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from posterity._checks import at_least, floating, has_shape
from posterity._precision import widened
from posterity.graphs.resolvent import _check_symmetric, _Graph

__all__ = ["Coarsening", "CollapseBound", "collapse_bound", "collapse_strong_edges"]


@dataclass(frozen=True)
class Coarsening:
    """A graph whose strong edges are collapsed, and the maps between the two.

    Attributes
    ----------
    cluster : Tensor of shape (nodes,), int64
        The coarse node of each node; numbered by the first of their nodes.
    num_nodes : int
        How many coarse nodes.
    edge_index : Tensor of shape (2, coarse edges)
        Each edge once, sorted, without self-loops.
    edge_weight : Tensor of shape (coarse edges,)
        Sums of weak weights.
    node_weight : Tensor of shape (num_nodes,)
        Sums of node weights.
    fine_node_weight : Tensor of shape (nodes,)
        The weights of the nodes themselves.
    """

    cluster: Int[Tensor, " nodes"]
    num_nodes: int
    edge_index: Int[Tensor, "2 coarse_edges"]
    edge_weight: Float[Tensor, " coarse_edges"]
    node_weight: Float[Tensor, " clusters"]
    fine_node_weight: Float[Tensor, " nodes"]

    def lift(self, f: Float[Tensor, " clusters *features"]) -> Float[Tensor, " nodes *features"]:
        """Return the signal that has on every node its cluster's value: J f.

        Parameters
        ----------
        f : Tensor of shape (num_nodes, ...)
            Values on the coarse graph.

        Returns
        -------
        Tensor
            Shape (nodes, ...).
        """
        has_shape("f", f, (self.num_nodes, *f.shape[1:]), "the coarse graph")
        return f[self.cluster]

    def project(self, f: Float[Tensor, " nodes *features"]) -> Float[Tensor, " clusters *features"]:
        """Return the mean over each cluster, by node weights: J* f.

        Parameters
        ----------
        f : Tensor of shape (nodes, ...)
            Values on the fine graph.

        Returns
        -------
        Tensor
            Shape (num_nodes, ...).
        """
        has_shape("f", floating("f", f), (len(self.cluster), *f.shape[1:]), "the fine graph")
        return _weighted_mean(f, self.fine_node_weight, self.cluster, self.num_nodes)


def collapse_strong_edges(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    edge_weight: Float[Tensor, " edges"] | None,
    strong: Bool[Tensor, " edges"] | float,
    *,
    node_weight: Float[Tensor, " nodes"] | None = None,
) -> Coarsening:
    """Return the graph in which nodes that strong edges connect are one node.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges; the strong ones both ways.
    num_nodes : int
        How many nodes, at least 1.
    edge_weight : Tensor of shape (edges,) or None
        Positive; None is ones.
    strong : Tensor of shape (edges,), bool, or float
        Which edges are strong, or the least weight of those that are.
    node_weight : Tensor of shape (nodes,), optional
        Positive; ones by default.

    Returns
    -------
    Coarsening
        The coarse graph; weak edges inside a cluster vanish.

    Raises
    ------
    ValueError
        If the graph does not fit, or an edge is strong in one direction only.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import collapse_strong_edges
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> coarse = collapse_strong_edges(path, 3, torch.tensor([100.0, 100.0, 1.0, 1.0]), 10.0)
    >>> coarse.cluster, coarse.node_weight
    (tensor([0, 0, 1]), tensor([2., 1.]))
    """
    graph = _Graph.of(edge_index, num_nodes, edge_weight, node_weight, edge_index.device)
    mask, edge_index = _strong(graph, strong), graph.edge_index
    sender, receiver = edge_index[:, mask].cpu().numpy()
    pairs = sparse.coo_matrix((np.ones(len(sender)), (sender, receiver)), (num_nodes, num_nodes))
    size, labels = connected_components(pairs, directed=False)
    cluster = torch.as_tensor(labels, dtype=torch.long, device=edge_index.device)
    weight = torch.ones(edge_index.shape[1], device=edge_index.device) if edge_weight is None else edge_weight
    mu = torch.ones(num_nodes, dtype=weight.dtype, device=weight.device)
    mu = mu if node_weight is None else node_weight
    ends = cluster[edge_index]
    kept = ends[0] != ends[1]
    keys, place = torch.unique(ends[0, kept] * size + ends[1, kept], return_inverse=True)
    return Coarsening(
        cluster,
        int(size),
        torch.stack([keys // size, keys % size]),
        _sums(weight[kept], place, len(keys)),
        _sums(mu, cluster, int(size)),
        mu,
    )


class CollapseBound(NamedTuple):
    """How far the resolvent is from that of the collapsed graph, at most.

    Attributes
    ----------
    value : float
        Bound on ||R - J R_c J*||, the operator norm by node weights.
    gap : float
        Smallest non-zero eigenvalue of the strong edges' Laplacian, over ``shift``.
    coupling : float
        Norm of what the weak edges lead out of the signals that are constant on clusters,
        over ``shift``.
    """

    value: float
    gap: float
    coupling: float


def collapse_bound(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    edge_weight: Float[Tensor, " edges"] | None,
    strong: Bool[Tensor, " edges"] | float,
    *,
    node_weight: Float[Tensor, " nodes"] | None = None,
    shift: float = 1.0,
) -> CollapseBound:
    """Return a certificate of how little collapsing the strong edges changes the resolvent.

    Eliminating what is not constant on clusters from (1 + L/s) R = 1 gives, with gap l,
    coupling a and d = 1/(1 + l), the bound d ((1 + a)^2 + a^2 d): of first order in the
    inverse of the strong weights.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges of an undirected graph, both ways.
    num_nodes : int
        How many nodes, at least 1.
    edge_weight : Tensor of shape (edges,) or None
        Positive and symmetric; None is ones.
    strong : Tensor of shape (edges,), bool, or float
        As for `collapse_strong_edges`.
    node_weight : Tensor of shape (nodes,), optional
        Positive; ones by default.
    shift : float, default=1.0
        As for `ResolventConv`.

    Returns
    -------
    CollapseBound
        The bound and what it is made of; 0 where nothing is collapsed.

    Raises
    ------
    ValueError
        If the graph does not fit or is not symmetric.
    """
    at_least("shift", shift, 0, strict=True)
    coarse = collapse_strong_edges(edge_index, num_nodes, edge_weight, strong, node_weight=node_weight)
    with torch.no_grad():
        graph = _Graph.of(edge_index, num_nodes, edge_weight, node_weight, edge_index.device)
        _check_symmetric(graph)
        mask = _strong(graph, strong)
        root = graph.mu.sqrt()

        def symmetric(rows: Tensor) -> Tensor:
            part = _Graph(graph.edge_index[:, rows], graph.weight[rows], graph.mu)
            return part.stiffness() / (root[:, None] * root)

        count = coarse.num_nodes  # the kernel of the strong Laplacian has exactly this dimension
        spectrum = torch.linalg.eigvalsh(symmetric(mask))
        gap = float(spectrum[count]) / shift if count < num_nodes else math.inf
        basis = torch.nn.functional.one_hot(coarse.cluster, count).to(root) * root[:, None]
        basis = basis / basis.norm(dim=0)
        moved = symmetric(~mask) @ basis
        coupling = float(torch.linalg.matrix_norm(moved - basis @ (basis.T @ moved), 2)) / shift
    d = 1 / (1 + gap)
    return CollapseBound(d * ((1 + coupling) ** 2 + coupling**2 * d), gap, coupling)


def _strong(graph: _Graph, strong: Any) -> Tensor:
    """Return the mask of strong edges, symmetric."""
    n = graph.n
    if isinstance(strong, Tensor):
        if strong.dtype != torch.bool:
            raise ValueError(f"strong must be a mask or a number, got dtype {strong.dtype}")
        mask = has_shape("strong", strong, (len(graph.weight),), "edge_index")
    else:
        mask = graph.weight.detach() >= at_least("strong", strong, 0, strict=True)
    sender, receiver = graph.edge_index[:, mask]
    lonely = ~torch.isin(sender * n + receiver, receiver * n + sender)
    if bool(lonely.any()):
        k = int(lonely.nonzero()[0])
        i, j = int(sender[k]), int(receiver[k])
        raise ValueError(f"strong must be symmetric, got {i} -> {j} without {j} -> {i}")
    return mask


@widened
def _sums(values: Tensor, group: Tensor, size: int) -> Tensor:
    """Return the sums of values by group."""
    return values.new_zeros(size).index_add(0, group, values)


@widened
def _weighted_mean(x: Tensor, mu: Tensor, group: Tensor | None, size: int | None = None) -> Tensor:
    """Return the means of rows by group, (groups, ...)."""
    if group is None:
        group = torch.zeros(len(x), dtype=torch.long, device=x.device)
        size = 1
    if size is None:
        size = int(group.max()) + 1
    mu = mu.to(x.dtype)
    share = mu / _sums(mu, group, size)[group]
    return x.new_zeros(size, *x.shape[1:]).index_add(0, group, x * share.view(-1, *[1] * (x.ndim - 1)))
