"""Claims about semantic robustness: budgets that change the class, and what known labels do about it."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import needs
from posterity.claims import Count, Positive, Trial, bound, comparison
from posterity.graphs import (
    CSBM,
    SemanticRobustness,
    attack_candidates,
    bayes_robustness,
    model_robustness,
    propagate_labels,
    semantic_robustness,
    with_label_propagation,
)
from posterity.lab.data import Graph, GraphData, load_graph
from posterity.lab.nets import weights
from posterity.lab.training import fit, fit_nodes


class _GCN(nn.Module):
    """Two graph convolutions without bias, 64 units, dropout between them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = needs("torch_geometric.nn", "graphs").GCNConv
        self.first = conv(in_channels, 64, bias=False)
        self.second = conv(64, out_channels, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return scores of shape (nodes, classes)."""
        return self.second(self.dropout(self.first(x, edge_index).relu()), edge_index)


class _Predict:
    """A trained `_GCN` as `model_robustness` asks it; several graphs share what does not depend on edges."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval()

    @torch.no_grad()
    def __call__(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.net(x, edge_index)

    @torch.no_grad()
    def batched(self, x: Tensor, edge_indices: list[Tensor]) -> Tensor:
        """Return scores (graphs, nodes, classes)."""
        first, second = (layer.lin.weight.T for layer in (self.net.first, self.net.second))
        hidden, parts = x @ first, []  # type: ignore[operator]
        for start in range(0, len(edge_indices), 8):  # more at once leave the cache
            graphs = edge_indices[start : start + 8]
            smooth = _block_gcn(graphs, len(x), x.dtype)
            states = (smooth @ hidden.repeat(len(graphs), 1)).relu_()
            parts.append((smooth @ (states @ second)).view(len(graphs), len(x), -1))  # type: ignore[operator]
        return torch.cat(parts)


def _block_gcn(graphs: list[Tensor], n: int, dtype: torch.dtype) -> Tensor:
    """Return the normalised adjacencies of graphs on the same nodes as one CSR block matrix."""
    size = n * len(graphs)
    send, receive = torch.cat([edges + k * n for k, edges in enumerate(graphs)], 1)
    loops = torch.arange(size)
    send, receive = torch.cat([send, loops]), torch.cat([receive, loops])
    degree = torch.bincount(receive, minlength=size)
    scale, order = degree.to(dtype).rsqrt(), receive.argsort()
    ends = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    weight = (scale[send] * scale[receive])[order]
    with warnings.catch_warnings():  # torch calls its CSR tensors beta
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(ends, send[order], weight, (size, size))


def _train(graph: Tensor, n_train: int, epochs: int, seed: int) -> nn.Module:
    """Return a network trained on the graph of the first labelled nodes of each class alone."""
    chosen = torch.cat([(graph.y == label).nonzero()[:n_train, 0] for label in (0, 1)]).sort().values
    held = torch.ones(len(graph.y), dtype=torch.bool)
    held[chosen] = False
    place = torch.full((len(graph.y),), -1)
    place[chosen] = torch.arange(len(chosen))
    inner = place[graph.edge_index]
    inner = inner[:, (inner >= 0).all(0)]
    x, y = graph.x[chosen], graph.y[chosen]
    net = weights(_GCN, graph.x.shape[1], 2, seed=seed)

    def validate(net: nn.Module) -> float:
        return float(F.cross_entropy(net(graph.x, graph.edge_index)[held], graph.y[held]))

    fit(net, lambda net, x, edges, y: F.cross_entropy(net(x[0], edges[0]), y[0]), (x[None], inner[None], y[None]),
        epochs=epochs, lr=1e-2, weight_decay=1e-3, seed=seed, validate=validate)  # fmt: skip
    return net


@comparison(
    paper="semantic-robustness",
    says="Feeding the known labels back by label propagation cuts over-robustness.",
    where="Gosch et al., the experiments on CSBMs",
    arms=("gcn", "gcn + label propagation"),
    metric="share of robustness beyond the change of the true class",
    better="lower",
    smallest={"n": 120, "n_train": 40, "epochs": 30, "n_nodes": 20},
)
def over_robustness(
    trial: Trial,
    n: Count = 500,
    K: Positive = 1.0,
    n_train: Count = 200,
    epochs: Count = 200,
    n_nodes: Count = 60,
) -> dict[str, float]:
    """Attack new nodes of a stochastic block model with edges to the most similar of the other class.

    One network is trained, on ``n_train`` labelled nodes a class; the rest validates and is
    absent from the training graph. The second arm is the same network with the labels of
    the old nodes diffused through the graph. There is no limit of edges. The records have
    the other measures. The paper's setting: n 1000, n_train 400, n_nodes 1000, K 0.1 to 5.
    """
    csbm = CSBM(n, K=K)
    generator = torch.Generator().manual_seed(trial.seed)
    graph = csbm.sample(generator)
    net = _train(graph, n_train, epochs, trial.seed)
    state = generator.get_state()
    over = {}
    arms = {"gcn": _Predict(net), "gcn + label propagation": with_label_propagation(_Predict(net), graph.y)}
    for arm, predict in arms.items():
        generator.set_state(state)  # the same new nodes
        result = semantic_robustness(predict, csbm, graph, n_nodes=n_nodes, generator=generator)
        over[arm] = result.over
        trial.record(f"adversarial, {arm}", result.adversarial)
        trial.record(f"f1, {arm}", result.f1)
        trial.record(f"accuracy, {arm}", result.accuracy)
        for degree, means in result.by_degree().items():
            trial.track(f"edges withstood, {arm}", degree, means["model"])
            trial.track("edges that leave the class", degree, means["bayes"])
    trial.record("accuracy of Bayes", result.bayes_accuracy)
    return over


@bound(
    paper="semantic-robustness",
    says="An attack of as many edges as a node has changes the true class of more than two nodes in five.",
    where="Gosch et al., the experiments on CSBMs",
    metric="share of nodes whose true class changes within a budget of their degree",
    limit=0.4,
    better="higher",
    smallest={"n": 120, "n_nodes": 100},
)
def usual_budgets(trial: Trial, n: Count = 1000, K: Positive = 1.0, n_nodes: Count = 1000) -> float:
    """Draw new nodes and count, by the Bayes classifier alone, whose class an attack changes."""
    csbm = CSBM(n, K=K)
    generator = torch.Generator().manual_seed(trial.seed)
    graph = csbm.sample(generator)
    rows = []
    for _ in range(n_nodes):
        new = csbm.sample_node(graph, generator)
        candidates = attack_candidates(new.x, new.y, new.edge_index, n)
        count = bayes_robustness(csbm, new.x, new.edge_index, new.y, n, candidates)
        rows.append((int((new.edge_index[0] == n).sum()), count))
    degree, bayes = torch.tensor(rows).T
    result = SemanticRobustness(degree, bayes, bayes)
    trial.record("share within the degree plus 2", result.violation_rate("deg+2"))
    trial.record("accuracy of Bayes", result.bayes_accuracy)
    return result.violation_rate("deg")


def _all_known(data: GraphData, **_: object) -> None:
    if bool((data.y < 0).any()):
        node = int((data.y < 0).nonzero()[0])
        raise ValueError(
            f"attacks join nodes by their classes, so every node needs a label; node {node} has none"
        )


@comparison(
    paper="semantic-robustness",
    says="Feeding the known labels back does not cost accuracy on a real graph, it raises it.",
    where="Gosch et al., abstract",
    arms=("gcn", "gcn + label propagation"),
    metric="test accuracy",
    better="higher",
    smallest={"epochs": 5, "n_nodes": 2, "max_edges": 3},
    check=_all_known,
)
def real_graph(
    trial: Trial, data: Graph = "digits", epochs: Count = 200, n_nodes: Count = 10, max_edges: Count = 50
) -> dict[str, float]:
    """Classify the nodes of a real graph, whose training labels the second arm diffuses.

    On real data the true law is not known, so only accuracy and raw robustness can be
    told: the records have the mean number of edges, of at most ``max_edges``, that
    ``n_nodes`` test nodes which both arms get right withstand.
    """
    graph = load_graph(data, seed=trial.seed)
    train, val, test = graph.split(trial.seed)
    net = weights(_GCN, graph.x.shape[1], int(graph.y.max()) + 1, seed=trial.seed)
    fit_nodes(net, (graph, train, val), trial.seed, epochs=epochs, weight_decay=1e-3)
    known = train.nonzero()[:, 0]
    plain = _Predict(net)

    def mixed(x: Tensor, edge_index: Tensor) -> Tensor:
        return propagate_labels(plain(x, edge_index), graph.y[known], known, edge_index)

    arms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"gcn": plain, "gcn + label propagation": mixed}
    answers = {arm: predict(graph.x, graph.edge_index).argmax(1) for arm, predict in arms.items()}
    right = torch.stack([answer == graph.y for answer in answers.values()]).all(0) & test
    generator = torch.Generator().manual_seed(trial.seed)
    targets = right.nonzero()[:, 0]
    targets = targets[torch.randperm(len(targets), generator=generator)[:n_nodes]].tolist()
    for arm, predict in arms.items():
        counts = [
            model_robustness(
                predict, graph.x, graph.edge_index, node, int(graph.y[node]),
                attack_candidates(graph.x, graph.y, graph.edge_index, node), max_edges,
            )
            for node in targets
        ]  # fmt: skip
        trial.record(f"edges withstood, {arm}", sum(counts) / max(1, len(counts)))
    return {arm: float((answer == graph.y)[test].float().mean()) for arm, answer in answers.items()}
