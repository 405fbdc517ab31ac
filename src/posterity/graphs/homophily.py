"""Homophily: what the labels of a graph's nodes say of their neighbours' labels.

The share of edges inside classes, h_edge, depends on how many classes there are and how
large. With p_k the share of edge ends in class k,

    adjusted homophily = (h_edge - sum_k p_k^2) / (1 - sum_k p_k^2)                  (1)

is 0 when ends are independent, and label informativeness I(y_u; y_v) / H(y_u) is 1 also
where unlike labels determine each other.
"""

from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor

from posterity.graphs._graph import check_edges, check_index

__all__ = ["adjusted_homophily", "edge_homophily", "label_informativeness", "node_homophily"]


def edge_homophily(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return the share of edges whose ends have one label.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Read as undirected: each edge once or in both directions, self-loops ignored.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If there is no edge, or ``edge_index`` or ``y`` does not fit.
    """
    return float(_joint(edge_index, y).trace())


def node_homophily(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return the mean over nodes with neighbours of the share of these that have the node's label.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        As for `edge_homophily`.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        As for `edge_homophily`.
    """
    u, v, label = _undirected(edge_index, y)
    ends = np.concatenate([u, v])
    degree = np.bincount(ends)
    same = np.bincount(ends, np.tile(label[u] == label[v], 2))
    return float((same[degree > 0] / degree[degree > 0]).mean())


def adjusted_homophily(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return edge homophily less what chance gives, equation 1.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        As for `edge_homophily`.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        At most 1, which means that no edge leaves a class; may be negative.

    Raises
    ------
    ValueError
        As for `edge_homophily`, or if all edges join one class to itself.

    References
    ----------
    .. [1] Platonov et al. A critical look at the evaluation of GNNs under heterophily. ICLR 2023.

    Examples
    --------
    Two edges inside classes, one between them, and equal shares of edge ends:

    >>> import torch
    >>> from posterity.graphs import adjusted_homophily, edge_homophily
    >>> path, y = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 0, 1, 1])
    >>> round(edge_homophily(path, y), 4), round(adjusted_homophily(path, y), 4)
    (0.6667, 0.3333)
    """
    joint = _joint(edge_index, y, classes=2)
    chance = float(np.square(joint.sum(axis=1)).sum())
    return (float(joint.trace()) - chance) / (1 - chance)


def label_informativeness(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return how much of a label's entropy its neighbour's label removes.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        As for `edge_homophily`.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        In [0, 1] up to rounding: 0 for independent ends, 1 if each label determines the other.

    Raises
    ------
    ValueError
        As for `adjusted_homophily`.

    Examples
    --------
    Ends that always differ are as informative as ends that always agree:

    >>> import torch
    >>> from posterity.graphs import label_informativeness
    >>> label_informativeness(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 1, 0, 1]))
    1.0
    """
    joint = _joint(edge_index, y, classes=2)
    return 2 - _entropy(joint.data) / _entropy(joint.sum(axis=1))


def _undirected(edge_index: Tensor, y: Tensor) -> tuple[ndarray, ndarray, ndarray]:
    """Return both ends of each undirected edge, once, and the labels counted from 0."""
    label = np.unique(check_index("y", y, (None,), read=True).cpu().numpy(), return_inverse=True)[1]
    u, v = check_edges(edge_index, len(y), source="y", read=True).cpu().numpy()
    pairs = (np.minimum(u, v) * len(y) + np.maximum(u, v))[u != v]
    if not len(pairs):
        raise ValueError("edge_index must hold an edge between two nodes, got none")
    pairs, _ = np.unique(pairs, return_counts=True)  # asked for counts, numpy sorts; else it hashes, slowly
    u = pairs // len(y)
    return u, pairs - u * len(y), label


def _joint(edge_index: Tensor, y: Tensor, classes: int = 1) -> Any:
    """Return the shares of pairs of labels over the ordered ends of edges, sparse."""
    u, v, label = _undirected(edge_index, y)
    k = int(label.max()) + 1
    code, count = np.unique(label[u] * k + label[v], return_counts=True)
    pairs = sparse.csr_array((count / (2 * len(u)), (code // k, code % k)), shape=(k, k))
    joint = pairs + pairs.T
    present = int((joint.sum(axis=1) > 0).sum())
    if present < classes:
        raise ValueError(f"y must have at least {classes} classes at the ends of edges, got {present}")
    return joint


def _entropy(shares: ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
