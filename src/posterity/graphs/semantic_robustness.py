"""Semantic-aware robustness: whether a graph network withstands an attack or ignores a changed class.

In a contextual stochastic block model the true class of a new node is known given its
features and edges: the Bayes classifier g says it, and the number of edges to the other class
after which the class *is* another one is a formula. A network f that still answers the old
class beyond that number is over-robust; one that changes its answer before is attacked. With
R(f) and R(g) the edges that leave their answers right and R(f, g) the edges until f and g
first disagree,

    over = 1 - R(f, g) / R(f),       adversarial = R(f, g) / R(g).                       (1)

For one added node, g is at once the most accurate and perfectly robust (over 0, adversarial
1): in this sense accuracy and robustness are no trade-off.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from posterity._checks import integer, one_of
from posterity.graphs.csbm import CSBM, _neighbours
from posterity.graphs.edge_robustness import Attack, attack_candidates, bayes_robustness, model_robustness
from posterity.graphs.label_propagation import Predict

__all__ = ["SemanticRobustness", "semantic_robustness"]


@dataclass
class SemanticRobustness:
    """Edge counts of a classifier and of the truth, and the shares of (1).

    Means are over the nodes that both classify correctly, each count divided by the node's
    degree before the attack (at least 1).

    Attributes
    ----------
    degree : Tensor of shape (t,)
        Of each attacked node.
    model, bayes : Tensor of shape (t,)
        Edges that leave the answer right, as `model_robustness` and `bayes_robustness`
        return them.
    """

    degree: Int[Tensor, " t"]
    model: Int[Tensor, " t"]
    bayes: Int[Tensor, " t"]

    @property
    def r_model(self) -> float:
        """Mean robustness of the classifier, in edges a neighbour."""
        return self._mean(self.model)

    @property
    def r_bayes(self) -> float:
        """Mean robustness of the truth."""
        return self._mean(self.bayes)

    @property
    def r_joint(self) -> float:
        """Mean number of edges until classifier and truth disagree, or both change."""
        return self._mean(torch.minimum(self.model, self.bayes))

    @property
    def over(self) -> float:
        """Share of the classifier's robustness that lies beyond the change of the class."""
        return 1 - _ratio(self.r_joint, self.r_model)

    @property
    def adversarial(self) -> float:
        """Share of the truth's robustness that the classifier has."""
        return _ratio(self.r_joint, self.r_bayes)

    @property
    def f1(self) -> float:
        """Harmonic mean of ``1 - over`` and ``adversarial``."""
        precise, recall = 1 - self.over, self.adversarial
        return _ratio(2 * precise * recall, precise + recall)

    @property
    def accuracy(self) -> float:
        """Share of nodes that the classifier gets right before any edge."""
        return float((self.model >= 0).double().mean())

    @property
    def bayes_accuracy(self) -> float:
        """Share of nodes that the Bayes classifier gets right."""
        return float((self.bayes >= 0).double().mean())

    def violation_rate(self, budget: int | Literal["deg", "deg+2"]) -> float:
        """Return the share of nodes whose true class an attack within a budget changes.

        Parameters
        ----------
        budget : int or {"deg", "deg+2"}
            Edges: a number, or the node's degree, plus 2.

        Returns
        -------
        float
            Among the nodes that the Bayes classifier gets right.
        """
        if isinstance(budget, str):
            limit = self.degree + {"deg": 0, "deg+2": 2}[one_of("budget", budget, ("deg", "deg+2"))]
        else:
            limit = torch.full_like(self.degree, integer("budget", budget, 0))
        right = self.bayes >= 0
        return float((self.bayes < limit)[right].double().mean())

    def by_degree(self) -> dict[int, dict[str, float]]:
        """Return mean counts, not divided, of the nodes of each degree that both get right.

        Returns
        -------
        dict of int to dict of str to float
            ``nodes``, ``model``, ``bayes`` and ``joint`` of each degree.
        """
        found = {}
        for degree in self.degree[self._both].unique().tolist():
            rows = self._both & (self.degree == degree)
            model, bayes = self.model[rows].double(), self.bayes[rows].double()
            found[degree] = {
                "nodes": int(rows.sum()), "model": float(model.mean()), "bayes": float(bayes.mean()),
                "joint": float(torch.minimum(model, bayes).mean()),
            }  # fmt: skip
        return found

    @property
    def _both(self) -> Tensor:
        return (self.model >= 0) & (self.bayes >= 0)

    def _mean(self, counts: Tensor) -> float:
        return float((counts / self.degree.clamp_min(1))[self._both].double().mean())


def semantic_robustness(
    predict: Predict, csbm: CSBM, data: Any, *, n_nodes: int = 1000, attack: Attack = "l2-weak",
    max_edges: int | None = None, generator: torch.Generator | None = None,
) -> SemanticRobustness:  # fmt: skip
    """Attack new nodes of a graph one by one and compare a classifier with the truth.

    Parameters
    ----------
    predict : callable
        As for `model_robustness`; it sees the graph with the new node last.
    csbm : CSBM
        The law of the graph.
    data : torch_geometric.data.Data
        A sample of it.
    n_nodes : int, default=1000
        New nodes, each added to the same graph alone.
    attack : {"l2-weak", "l2", "random"}, default="l2-weak"
        Order of the edges, see `attack_candidates`.
    max_edges : int, optional
        Most edges a node; by default all candidates.
    generator : torch.Generator, optional
        Draws nodes and, for ``"random"``, orders.

    Returns
    -------
    SemanticRobustness
        Counts of each new node, and measures of them.

    References
    ----------
    .. [1] Gosch, Sturm, Geisler, Guennemann. Revisiting Robustness in Graph Machine
       Learning. ICLR 2023.
    """
    integer("n_nodes", n_nodes, 1)
    csbm._check(data.x, data.edge_index, data.y, "data.")
    rows = []
    for _ in range(n_nodes):
        graph = csbm._with_node(data, generator)
        node, label = len(graph.y) - 1, int(graph.y[-1])
        near = _neighbours(graph.edge_index, node)
        candidates = attack_candidates(
            graph.x, graph.y, graph.edge_index, node, kind=attack, generator=generator
        )
        bayes = bayes_robustness(csbm, graph.x, graph.edge_index, graph.y, node, candidates, max_edges)
        model = model_robustness(predict, graph.x, graph.edge_index, node, label, candidates, max_edges)
        rows.append((len(near), model, bayes))
    return SemanticRobustness(*torch.tensor(rows).T)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
