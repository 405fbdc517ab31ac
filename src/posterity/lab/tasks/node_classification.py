"""Classes of nodes: train is (graph, train mask, val mask), predict maps the graph to (nodes, classes)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from posterity._checks import needs
from posterity.lab.data import Graph, load_graph
from posterity.lab.metrics import node_score
from posterity.lab.nets import mlp, weights
from posterity.lab.tasks import Task, entry
from posterity.lab.training import fit_nodes

__all__ = ["best_of"]

Predict = Callable[[Any], Any]


def best_of(nets: Iterable[nn.Module], train: Any, seed: int) -> Predict:
    """Return the predictions of the network that does best on the validation nodes, of several trained in turn.

    Parameters
    ----------
    nets : iterable of torch.nn.Module
        Untrained, called with node features and edges.
    train : tuple
        A graph, and its nodes to train and to validate on.
    seed : int

    Returns
    -------
    callable
        A graph to its scores.
    """
    best: tuple[float, Any] = (-1.0, None)
    for net in nets:
        best = max(best, (fit_nodes(net, train, seed), net), key=lambda pair: pair[0])
    return lambda graph: torch.no_grad()(best[1])(graph.x, graph.edge_index)


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    graph = load_graph(data, seed=seed)
    train, val, test = graph.split(seed)
    scores = torch.as_tensor(fit((graph, train, val), seed)(graph))
    return node_score(scores, graph.y, test)


TASK = Task("node-classification", Graph, "accuracy, or ROC AUC for two classes", "higher", "digits", _score)


class GraphNet(nn.Module):
    """Graph convolutions with residual connections, layer normalisation and a map of a node's own state.

    Parameters
    ----------
    conv : callable
        ``conv(n_in, n_out)`` makes a layer called as ``layer(x, edge_index)``.
    n_in, n_out, width, depth : int
    dropout : float
    """

    def __init__(
        self, conv: Callable[[int, int], nn.Module], n_in: int, n_out: int, width: int = 64, depth: int = 2,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.readout = nn.Linear(n_in, width), nn.Linear(width, n_out)
        self.convs = nn.ModuleList(conv(width, width) for _ in range(depth))
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return scores of shape (nodes, n_out)."""
        x = self.dropout(self.encoder(self.dropout(x)).relu())
        for conv, own, norm in zip(self.convs, self.own, self.norms, strict=True):
            h = norm(x)
            x = x + self.dropout((conv(h, edge_index) + own(h)).relu())
        return self.readout(x)


def _graph_entry(name: str, layer: str) -> None:
    @entry("node-classification", name)
    def _fit(train: Any, seed: int) -> Predict:
        conv = getattr(needs("torch_geometric.nn", "graphs"), layer)
        sizes = train[0].x.shape[1], int(train[0].y.max()) + 1
        nets = (weights(GraphNet, conv, *sizes, depth=depth, seed=seed) for depth in (1, 2, 4))
        return best_of(nets, train, seed)


for _entry, _layer in (("GCN", "GCNConv"), ("GraphSAGE", "SAGEConv"), ("GAT", "GATConv")):
    _graph_entry(_entry, _layer)


@entry("node-classification", "MLP")
def nodes_mlp(train: Any, seed: int) -> Predict:
    """Return a network that sees a node's own features only."""
    graph = train[0]

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(graph.x.shape[1], int(graph.y.max()) + 1, dropout=0.5, seed=seed)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.net(x)

    net = Alone()
    fit_nodes(net, train, seed)
    return lambda graph: torch.no_grad()(net)(graph.x, graph.edge_index)
