"""How many edges to other classes leave an answer what it is: a classifier's, and the true one.

An attack joins a node to nodes of other classes, one after the other, and counted are the edges
before the one that changes the answer. In a contextual stochastic block model every such edge
takes the same c from the log-odds M of the true class, so

    t = ceil(M / c) - 1                                                                  (1)

edges leave that class the most probable one: for the truth no edge has to be added. A network
is asked after every edge, since its answer need not change once and for all.
"""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import has_shape, integer, one_of
from posterity._random import draw_device
from posterity.graphs._graph import check_edges, check_index
from posterity.graphs.csbm import CSBM, _check_node, _neighbours, _with_edges
from posterity.graphs.label_propagation import Predict, _rows

__all__ = ["attack_candidates", "bayes_robustness", "model_robustness"]

Attack = Literal["l2-weak", "l2", "random"]


def attack_candidates(
    x: Float[Tensor, "nodes features"], y: Int[Tensor, " nodes"], edge_index: Int[Tensor, "2 edges"], node: int,
    *, kind: Attack = "l2-weak", generator: torch.Generator | None = None,
) -> Int[Tensor, " candidates"]:  # fmt: skip
    """Return the nodes that an attack joins to a node, in the order in which it does.

    They are the nodes of the other class that are no neighbours yet.

    Parameters
    ----------
    x : Tensor
        Features.
    y : Tensor
        Labels of all nodes; more than two classes are allowed.
    edge_index : Tensor
        Undirected edges.
    node : int
        The target.
    kind : {"l2-weak", "l2", "random"}, default="l2-weak"
        Nearest features first, farthest first, or shuffled.
    generator : torch.Generator, optional
        For ``"random"``.

    Returns
    -------
    Tensor
        Node numbers.
    """
    one_of("kind", kind, ("l2-weak", "l2", "random"))
    has_shape("x", x, (None, None))
    y = check_index("y", y, (len(x),), source="x", read=True)
    edge_index = check_edges(edge_index, len(x), source="x", read=True)
    _check_node(node, len(x))
    free = y != y[node]
    free[_neighbours(edge_index, node)] = False
    candidates = free.nonzero()[:, 0]
    if kind == "random":
        order = torch.randperm(len(candidates), generator=generator, device=draw_device(generator))
        return candidates[order.to(candidates.device)]
    distance = (x[candidates].double() - x[node].double()).norm(dim=1)
    order = distance.argsort(stable=True)
    return candidates[order if kind == "l2-weak" else order.flip(0)]


def bayes_robustness(
    csbm: CSBM, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"],
    node: int, candidates: Int[Tensor, " candidates"], max_edges: int | None = None,
) -> int:  # fmt: skip
    """Return how many edges to the other class leave a node's true class what it is.

    Parameters
    ----------
    csbm : CSBM
        The law of the graph.
    x, edge_index, y, node
        As for `CSBM.log_likelihood`.
    candidates : Tensor
        Nodes of the other class, no neighbours; by (1) only their number matters.
    max_edges : int, optional
        Where to stop.

    Returns
    -------
    int
        -1 if the Bayes classifier does not say ``y[node]`` before any edge; the number of
        edges tried if none changes the class, which is always so for p <= q.
    """
    edge_index, y = csbm._check(x, edge_index, y, read=False)
    _check_node(node, len(x))
    near = _neighbours(edge_index, node)
    if near and not 0 <= near[0] <= near[-1] < len(x):  # of other edges nothing is made
        raise ValueError(f"edge_index must name nodes in 0..{len(x) - 1} of x, got {near[0]} to {near[-1]}")
    _check_candidates(candidates, near, node, len(x))
    limit = _limit(candidates, max_edges)
    margin, step = csbm._margin(x[node], y, near, int(y[node])), csbm.edge_log_odds
    if margin <= 0:
        return -1
    return limit if step <= 0 else min(limit, math.ceil(margin / step) - 1)


def model_robustness(
    predict: Predict, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], node: int,
    label: int, candidates: Int[Tensor, " candidates"], max_edges: int | None = None,
) -> int:  # fmt: skip
    """Return how many edges, added in order, leave a classifier's answer at the label.

    Parameters
    ----------
    predict : callable
        ``predict(x, edge_index)`` returns scores (nodes, classes). If it has
        ``batched(x, edge_indices)``, which returns (graphs, nodes, classes), growing blocks
        of graphs are asked for at once.
    x, edge_index : Tensor
        The graph; an edge is added in both directions.
    node, label : int
        The target, and its class.
    candidates : Tensor
        As `attack_candidates` returns them.
    max_edges : int, optional
        Where to stop.

    Returns
    -------
    int
        -1 if the answer is wrong before any edge, the number of edges tried if none
        changes it. Answers need not change once and for all: the first change counts.
    """
    edge_index = check_edges(edge_index, len(x), source="x", read=True)
    _check_node(node, len(x))
    integer("label", label, 0)
    _check_candidates(candidates, _neighbours(edge_index, node), node, len(x))
    limit = _limit(candidates, max_edges)
    batched = getattr(predict, "batched", None)
    done, size = 0, 1
    while done <= limit:
        budgets = range(done, min(done + size, limit + 1))
        graphs = [_with_edges(edge_index, node, candidates[:budget]) for budget in budgets]
        if batched is None:
            right = _answer(predict(x, graphs[0]), node, len(x)) == label
            if not right:
                return done - 1
            done += 1
            continue
        scores = batched(x, graphs)
        if scores.ndim != 3 or scores.shape[:2] != (len(graphs), len(x)):
            raise ValueError(
                f"predict.batched must return ({len(graphs)}, {len(x)}, classes), got {tuple(scores.shape)}"
            )
        wrong = (scores[:, node].argmax(-1) != label).nonzero()[:, 0]
        if len(wrong):
            return done + int(wrong[0]) - 1
        done, size = done + len(graphs), min(2 * size, 32)
    return limit


def _answer(scores: Tensor, node: int, n: int) -> int:
    return int(_rows(scores, n)[node].argmax())


def _limit(candidates: Tensor, max_edges: int | None) -> int:
    return len(candidates) if max_edges is None else min(len(candidates), integer("max_edges", max_edges, 0))


def _check_candidates(candidates: Tensor, near: list[int], node: int, n: int) -> None:
    listed = check_index("candidates", candidates, (None,), n, of="x", read=True).cpu().numpy()
    if len(listed) == 0:
        return
    given = np.zeros(n, dtype=bool)
    given[listed] = True
    if np.count_nonzero(given) < len(listed):
        raise ValueError("candidates must not repeat a node")
    if given[node]:
        raise ValueError(f"candidates must not hold the node itself, {node}")
    if given[near].any():
        clash = next(other for other in near if given[other])
        raise ValueError(f"candidates must not be neighbours of node {node}, got {clash}")
