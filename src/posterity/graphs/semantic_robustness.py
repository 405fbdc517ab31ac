"""Semantic-aware robustness: whether a graph network withstands an attack or ignores a changed class.

In a contextual stochastic block model the true class of a new node is known given its
features and edges: the Bayes classifier g says it. Every edge to the other class lowers its
log-odds by the same step,

    log P(y | x, A) / P(1 - y | x, A)  falls by  c = log( p (1 - q) / (q (1 - p)) ),      (1)

so the number of edges after which the class *is* another one is a formula. A network f that
still answers the old class beyond that number is over-robust; one that changes its answer
before is attacked. With R(f, g) the edges until f and g first disagree,

    over = 1 - R(f, g) / R(f),       adversarial = R(f, g) / R(g).                       (2)

For one added node, g is at once the most accurate and perfectly robust (over 0, adversarial
1): in this sense accuracy and robustness are no trade-off.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, has_shape, integer, needs, one_of, within
from posterity._random import draw_device
from posterity.graphs._graph import csr

__all__ = [
    "CSBM",
    "SemanticRobustness",
    "attack_candidates",
    "bayes_robustness",
    "model_robustness",
    "propagate_labels",
    "semantic_robustness",
    "with_label_propagation",
]

Attack = Literal["l2-weak", "l2", "random"]
Predict = Callable[[Tensor, Tensor], Tensor]


class CSBM:
    """Contextual stochastic block model of two classes, with its Bayes classifier for one node.

    Labels are fair coins, features ``N((2 y - 1) mean, sigma^2 I)``, and an undirected edge
    joins two nodes with probability p inside a class and q across.

    Parameters
    ----------
    n : int, default=1000
        Nodes of a sample, at least 3.
    within_degree, between_degree : float, default=3.16, 0.74
        Expected neighbours of a node in its own and in the other class; the defaults are as
        sparse as Cora. ``p = 2 within_degree / (n - 1)``, q alike.
    K : float, default=1.5
        Distance of the class means in units of ``sigma``.
    sigma : float, default=1.0
        Standard deviation of a feature.
    n_features : int, optional
        By default ``round(n / ln(n)^2)``, 21 for a thousand nodes.

    Attributes
    ----------
    p, q : float
        Edge probabilities.
    mean : Tensor of shape (n_features,)
        Of class 1; that of class 0 is its negative.

    Raises
    ------
    ValueError
        If a probability leaves (0, 1) or a parameter is out of range.

    References
    ----------
    .. [1] Gosch, Sturm, Geisler, Guennemann. Revisiting Robustness in Graph Machine
       Learning. ICLR 2023.
    .. [2] Deshpande, Sen, Montanari, Mossel. Contextual stochastic block models. NeurIPS 2018.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import CSBM
    >>> csbm = CSBM(200, K=3.0)
    >>> generator = torch.Generator().manual_seed(0)
    >>> graph = csbm.sample_node(csbm.sample(generator), generator)
    >>> csbm.bayes_predict(graph.x, graph.edge_index, graph.y, node=200) == int(graph.y[200])
    True
    """

    def __init__(
        self, n: int = 1000, *, within_degree: float = 3.16, between_degree: float = 0.74, K: float = 1.5,
        sigma: float = 1.0, n_features: int | None = None,
    ) -> None:  # fmt: skip
        self.n = integer("n", n, 3)
        self.p, self.q = 2 * within_degree / (n - 1), 2 * between_degree / (n - 1)
        for name, degree, share in (
            ("within_degree", within_degree, self.p),
            ("between_degree", between_degree, self.q),
        ):
            if not 0 < share < 1:
                raise ValueError(
                    f"{name} must give an edge probability in (0, 1), got {degree} for n={n}: 2 * {degree} / ({n} - 1) = {share:g}"
                )
        self.K = at_least("K", K, 0)
        self.sigma = at_least("sigma", sigma, 0, strict=True)
        default = max(1, round(n / math.log(n) ** 2))
        self.n_features = default if n_features is None else integer("n_features", n_features, 1)
        self.mean = torch.full((self.n_features,), K * sigma / (2 * math.sqrt(self.n_features)))

    @property
    def edge_log_odds(self) -> float:
        """What an edge to a class adds to the log-odds of that class, c of (1)."""
        return math.log(self.p * (1 - self.q)) - math.log(self.q * (1 - self.p))

    def sample(self, generator: torch.Generator | None = None) -> Any:
        """Return a graph of n nodes.

        Parameters
        ----------
        generator : torch.Generator, optional
            Decides labels, features and edges.

        Returns
        -------
        torch_geometric.data.Data
            ``x`` (n, n_features), ``edge_index`` with both directions, ``y`` (n,).
        """
        device = draw_device(generator)
        y = torch.randint(2, (self.n,), generator=generator, device=device)
        x = self._features(y, generator)
        pairs, block = [], max(1, 2**22 // self.n)
        for start in range(0, self.n, block):  # a block of rows of the upper triangle
            rows = torch.arange(start, min(start + block, self.n), device=device)
            above = rows[:, None] < torch.arange(self.n, device=device)
            row, column = (self._linked(y[rows, None], y, generator) & above).nonzero().T
            pairs.append(torch.stack([start + row, column]))
        half = torch.cat(pairs, 1)
        edge_index = torch.cat([half, half.flip(0)], 1)
        return needs("torch_geometric.data", "graphs").Data(x=x, edge_index=edge_index, y=y)

    def sample_node(self, data: Any, generator: torch.Generator | None = None) -> Any:
        """Return a graph with one more node, the last, drawn by the model given the others.

        Parameters
        ----------
        data : torch_geometric.data.Data
            A graph of this model.
        generator : torch.Generator, optional
            Decides the node.

        Returns
        -------
        torch_geometric.data.Data
            The old nodes keep their numbers.
        """
        n = len(data.y)
        y = torch.randint(2, (1,), generator=generator, device=draw_device(generator)).to(data.y)
        near = self._linked(y, data.y, generator).nonzero()[:, 0]
        x = torch.cat([data.x, self._features(y, generator).to(data.x)])
        edge_index = _with_edges(data.edge_index, n, near)
        return needs("torch_geometric.data", "graphs").Data(
            x=x, edge_index=edge_index, y=torch.cat([data.y, y])
        )

    def log_likelihood(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"],
        node: int,
    ) -> Float[Tensor, "2"]:  # fmt: skip
        """Return the log-likelihood of a node's features and edges for each class of it.

        Parameters
        ----------
        x : Tensor
            Features.
        edge_index : Tensor
            Undirected edges, once or in both directions.
        y : Tensor
            Labels 0 and 1 of all nodes; that of ``node`` is not looked at.
        node : int
            Whose class is asked for.

        Returns
        -------
        Tensor
            Two float64 numbers; the prior being equal, the larger is the Bayes decision.
        """
        self._check(x, y, node)
        near = _neighbours(edge_index, node)
        own = x[node].double()
        linked = torch.bincount(y[near], minlength=2).double()
        others = torch.bincount(y, minlength=2).double()
        others[y[node]] -= 1
        sign = own.new_tensor([-1.0, 1.0])
        gap = own - sign[:, None] * self.mean.to(own)
        gauss = -gap.square().sum(1) / (2 * self.sigma**2)
        gauss -= self.n_features * math.log(self.sigma * math.sqrt(2 * math.pi))
        inside = linked * math.log(self.p) + (others - linked) * math.log1p(-self.p)
        across = linked * math.log(self.q) + (others - linked) * math.log1p(-self.q)
        return gauss + inside + across.flip(0)

    def bayes_predict(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"],
        node: int,
    ) -> int:  # fmt: skip
        """Return the most probable class of a node given all else.

        Parameters
        ----------
        x, edge_index, y, node
            As for `log_likelihood`.

        Returns
        -------
        int
            0 or 1; a tie is 0.
        """
        low, high = self.log_likelihood(x, edge_index, y, node).tolist()
        return int(high > low)

    def _margin(self, x: Tensor, y: Tensor, near: list[int], label: int) -> float:
        """Return the log-odds of a node's own class, in closed form, from its features and neighbours."""
        labels = y.cpu().numpy()
        linked = 2 * int(labels[near].sum()) - len(near)
        others = 2 * (int(labels.sum()) - label) - (len(labels) - 1)
        odds = 2 * float(x.cpu().numpy() @ self.mean.double().numpy()) / self.sigma**2
        odds += linked * self.edge_log_odds + others * (math.log1p(-self.p) - math.log1p(-self.q))
        return odds if label == 1 else -odds

    def _features(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(len(y), self.n_features, generator=generator, device=draw_device(generator))
        return (2 * y[:, None] - 1) * self.mean.to(y.device) + self.sigma * noise.to(y.device)

    def _linked(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        same = a == b
        u = torch.rand(same.shape, generator=generator, device=draw_device(generator))
        return u.to(same.device) < torch.where(same, self.p, self.q)

    def _check(self, x: Tensor, y: Tensor, node: int) -> None:
        has_shape("x", x, (None, self.n_features))
        _check_labels(y, len(x))
        _check_node(node, len(x))


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
    has_shape("y", y, (len(x),), "x")
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
    csbm._check(x, y, node)
    near = _neighbours(edge_index, node)
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
    _check_node(node, len(x))
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


def propagate_labels(
    scores: Float[Tensor, "nodes classes"], y_known: Int[Tensor, " known"], known: Int[Tensor, " known"],
    edge_index: Int[Tensor, "2 edges"], *, num_layers: int = 50, alpha: float = 0.7, clamp: bool = False,
    normalize: bool = True,
) -> Float[Tensor, "nodes classes"]:  # fmt: skip
    """Return scores mixed with the labels that are known, by diffusion over the graph.

    ``Z <- alpha S Z + (1 - alpha) Z0`` with ``S = D^-1/2 A D^-1/2``; Z0 is the softmax of the
    scores, with the known rows replaced by their labels.

    Parameters
    ----------
    scores : Tensor
        A classifier's scores, or zeros.
    y_known, known : Tensor
        Labels, and the nodes that have them.
    edge_index : Tensor
        Undirected edges in both directions; self-loops and repetitions are dropped.
    num_layers : int, default=50
        Steps, at least 0.
    alpha : float, default=0.7
        Weight of the neighbours, in [0, 1).
    clamp : bool, default=False
        Whether to cut Z to [0, 1] after each step.
    normalize : bool, default=True
        Whether to take the softmax of the scores first.

    Returns
    -------
    Tensor
        Like ``scores``.

    References
    ----------
    .. [1] Zhou, Bousquet, Lal, Weston, Schoelkopf. Learning with local and global
       consistency. NeurIPS 2003.
    .. [2] Huang, He, Singh, Lim, Benson. Combining label propagation and simple models
       out-performs graph neural networks. ICLR 2021.
    """
    integer("num_layers", num_layers, 0)
    within("alpha", alpha, 0, 1, open_high=True)
    start = _start(scores, y_known, known, normalize)
    return _diffuse(start, _normalized(edge_index, scores), num_layers, alpha, clamp)


def with_label_propagation(
    predict: Predict | None, y_known: Int[Tensor, " known"], *, num_classes: int = 2, num_layers: int = 50,
    alpha: float = 0.7,
) -> Predict:  # fmt: skip
    """Return a classifier whose scores are mixed with known labels, see `propagate_labels`.

    Parameters
    ----------
    predict : callable or None
        ``predict(x, edge_index)`` returns scores; None is label propagation alone.
    y_known : Tensor
        Labels of the first ``len(y_known)`` nodes of any graph it is asked about.
    num_classes : int, default=2
        Columns of the scores of label propagation alone.
    num_layers : int, default=50
        Steps.
    alpha : float, default=0.7
        Weight of the neighbours.

    Returns
    -------
    callable
        Like ``predict``; it has ``batched`` where ``predict`` has it or is None.
    """
    integer("num_classes", num_classes, 2)
    integer("num_layers", num_layers, 0)
    within("alpha", alpha, 0, 1, open_high=True)
    single = predict is not None and not hasattr(predict, "batched")
    return (_Propagated if single else _BatchPropagated)(predict, y_known, num_classes, num_layers, alpha)


@dataclass
class SemanticRobustness:
    """Edge counts of a classifier and of the truth, and the shares of (2).

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
    rows = []
    for _ in range(n_nodes):
        graph = csbm.sample_node(data, generator)
        node, label = len(graph.y) - 1, int(graph.y[-1])
        near = _neighbours(graph.edge_index, node)
        candidates = attack_candidates(
            graph.x, graph.y, graph.edge_index, node, kind=attack, generator=generator
        )
        bayes = bayes_robustness(csbm, graph.x, graph.edge_index, graph.y, node, candidates, max_edges)
        model = model_robustness(predict, graph.x, graph.edge_index, node, label, candidates, max_edges)
        rows.append((len(near), model, bayes))
    return SemanticRobustness(*torch.tensor(rows).T)


class _Propagated:
    """A classifier followed by label propagation."""

    def __init__(
        self, predict: Predict | None, y_known: Tensor, num_classes: int, num_layers: int, alpha: float
    ) -> None:
        self.predict, self.y_known, self.num_classes = predict, y_known, num_classes
        self.num_layers, self.alpha = num_layers, alpha

    def __call__(self, x: Tensor, edge_index: Tensor) -> Tensor:
        scores = (
            x.new_zeros(len(x), self.num_classes) if self.predict is None else self.predict(x, edge_index)
        )
        _rows(scores, len(x))
        return _diffuse(
            self._start(scores), _normalized(edge_index, scores), self.num_layers, self.alpha, False
        )

    def _start(self, scores: Tensor) -> Tensor:
        known = torch.arange(len(self.y_known), device=scores.device)
        return _start(scores, self.y_known, known, normalize=self.predict is not None)


class _BatchPropagated(_Propagated):
    """The same for several graphs on the same nodes at once."""

    def batched(self, x: Tensor, edge_indices: list[Tensor]) -> Tensor:
        """Return scores (graphs, nodes, classes)."""
        n = len(x)
        if self.predict is None:
            scores = x.new_zeros(len(edge_indices), n, self.num_classes)
        else:
            scores = self.predict.batched(x, edge_indices)  # type: ignore[attr-defined]
        start = torch.cat([self._start(each) for each in scores])
        edges = torch.cat(
            [edges + k * n for k, edges in enumerate(edge_indices)], 1
        )  # labels go with each copy
        mixed = _diffuse(start, _normalized(edges, start), self.num_layers, self.alpha, False)
        return mixed.view(len(edge_indices), n, -1)


def _start(scores: Tensor, y_known: Tensor, known: Tensor, normalize: bool) -> Tensor:
    n, classes = scores.shape
    has_shape("y_known", y_known, known.shape, "known")
    if len(known) and (int(known.min()) < 0 or int(known.max()) >= n):
        raise ValueError(f"known must be nodes below {n}, got {int(known.min())} to {int(known.max())}")
    if len(known.unique()) < len(known):
        raise ValueError("known must not repeat a node")
    if len(y_known) and (int(y_known.min()) < 0 or int(y_known.max()) >= classes):
        raise ValueError(
            f"y_known must be classes below {classes}, got {int(y_known.min())} to {int(y_known.max())}"
        )
    start = scores.softmax(-1) if normalize else scores
    labels = torch.nn.functional.one_hot(y_known, classes).to(scores)
    return start.index_copy(0, known, labels)


def _normalized(edge_index: Tensor, like: Tensor) -> Tensor:
    """Return D^-1/2 A D^-1/2 as CSR, rows receiving; loops and repetitions dropped."""
    n = len(like)
    key = torch.unique((edge_index[1] * n + edge_index[0])[edge_index[0] != edge_index[1]])
    row, col = key // n, key % n
    degree = torch.bincount(row, minlength=n).to(like.dtype)
    scale = degree.clamp_min(1).rsqrt()
    ends = torch.cat([row.new_zeros(1), torch.bincount(row, minlength=n).cumsum(0)])
    return csr(ends, col, scale[row] * scale[col])


def _diffuse(start: Tensor, smooth: Tensor, num_layers: int, alpha: float, clamp: bool) -> Tensor:
    z = start
    for _ in range(num_layers):
        z = alpha * (smooth @ z) + (1 - alpha) * start
        if clamp:
            z = z.clamp(0, 1)
    return z


def _neighbours(edge_index: Tensor, node: int) -> list[int]:
    """Return the other ends of a node's edges, each once, sorted."""
    sends, gets = edge_index.cpu().numpy()  # as each is looked at twice a node, overhead counts
    ends = {*gets[sends == node].tolist(), *sends[gets == node].tolist()}
    return sorted(ends - {node})


def _with_edges(edge_index: Tensor, node: int, others: Tensor) -> Tensor:
    here = torch.full_like(others, node)
    return torch.cat([edge_index, torch.stack([here, others]), torch.stack([others, here])], 1)


def _answer(scores: Tensor, node: int, n: int) -> int:
    return int(_rows(scores, n)[node].argmax())


def _rows(scores: Tensor, n: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != n:
        came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"predict must return scores ({n}, classes), got {came}")
    return scores


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _limit(candidates: Tensor, max_edges: int | None) -> int:
    return len(candidates) if max_edges is None else min(len(candidates), integer("max_edges", max_edges, 0))


def _check_node(node: int, n: int) -> None:
    if not 0 <= integer("node", node) < n:
        raise ValueError(f"node must be in 0..{n - 1}, got {node}")


def _check_labels(y: Tensor, n: int) -> None:
    has_shape("y", y, (n,), "x")
    low, high = y.aminmax()
    if int(low) < 0 or int(high) > 1:
        raise ValueError(f"y must be 0 or 1, got values from {int(low)} to {int(high)}")


def _check_candidates(candidates: Tensor, near: list[int], node: int, n: int) -> None:
    if len(candidates) == 0:
        return
    listed = candidates.cpu().numpy()
    low, high = listed.min(), listed.max()
    if low < 0 or high >= n:
        raise ValueError(f"candidates must be nodes in 0..{n - 1}, got {low} to {high}")
    given = np.zeros(n, dtype=bool)
    given[listed] = True
    if np.count_nonzero(given) < len(listed):
        raise ValueError("candidates must not repeat a node")
    if given[node]:
        raise ValueError(f"candidates must not hold the node itself, {node}")
    if given[near].any():
        clash = next(other for other in near if given[other])
        raise ValueError(f"candidates must not be neighbours of node {node}, got {clash}")
