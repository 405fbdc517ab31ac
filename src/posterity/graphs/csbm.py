"""A contextual stochastic block model with its Bayes classifier: graphs whose true classes are known.

Nodes have a label y, features around plus or minus a mean, and edges with probability p inside
a class, q across. The class of a node given all else is then a formula, the one whose features
and edges have the higher likelihood, and every edge to the other class lowers its log-odds by

    log P(y | x, A) / P(1 - y | x, A)  falls by  c = log( p (1 - q) / (q (1 - p)) ),      (1)

the same step whichever node it leads to.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer, needs
from posterity._random import draw_device
from posterity.graphs._graph import check_edges, check_index

__all__ = ["CSBM"]


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
        self._check(data.x, data.edge_index, data.y, "data.")
        return self._with_node(data, generator)

    def _with_node(self, data: Any, generator: torch.Generator | None) -> Any:
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
        edge_index, y = self._check(x, edge_index, y)
        _check_node(node, len(x))
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
        odds = 2 * float(x.double().cpu().numpy() @ self.mean.double().numpy()) / self.sigma**2
        odds += linked * self.edge_log_odds + others * (math.log1p(-self.p) - math.log1p(-self.q))
        return odds if label == 1 else -odds

    def _features(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(len(y), self.n_features, generator=generator, device=draw_device(generator))
        return (2 * y[:, None] - 1) * self.mean.to(y.device) + self.sigma * noise.to(y.device)

    def _linked(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        same = a == b
        u = torch.rand(same.shape, generator=generator, device=draw_device(generator))
        return u.to(same.device) < torch.where(same, self.p, self.q)

    def _check(
        self, x: Any, edge_index: Any, y: Any, of: str = "", read: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return edges and labels of a graph; ``of`` is what has them, ``read`` whether to look at all edges."""
        has_shape(f"{of}x", floating(f"{of}x", x), (None, self.n_features), "this model")
        edge_index = check_edges(edge_index, len(x), name=f"{of}edge_index", read=read)
        return edge_index, check_index(f"{of}y", y, (len(x),), 2, "classes", source=f"{of}x", read=True)


def _neighbours(edge_index: Tensor, node: int) -> list[int]:
    """Return the other ends of a node's edges, each once, sorted."""
    sends, gets = edge_index.cpu().numpy()  # as each is looked at twice a node, overhead counts
    ends = {*gets[sends == node].tolist(), *sends[gets == node].tolist()}
    return sorted(ends - {node})


def _with_edges(edge_index: Tensor, node: int, others: Tensor) -> Tensor:
    here = torch.full_like(others, node)
    return torch.cat([edge_index, torch.stack([here, others]), torch.stack([others, here])], 1)


def _check_node(node: int, n: int) -> None:
    if not 0 <= integer("node", node) < n:
        raise ValueError(f"node must be in 0..{n - 1}, got {node}")
