"""Claims about GD-WL: with resistance distances a network learns where a graph falls apart."""

from typing import Literal

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import needs
from posterity.claims import Count, Trial, comparison
from posterity.graphs import GraphormerGD, biconnectivity, resistance_distance, shortest_path_distance
from posterity.lab.nets import seeded, weights

Family = Literal["counterexamples", "les-miserables"]
DEGREES = 40  # most neighbours that the GIN tells apart


def _counterexample(rng: np.random.Generator) -> nx.Graph:
    """Return a graph of one of the paper's two families, of pairs that message passing confuses."""
    one = bool(rng.integers(2))
    if rng.integers(2):  # a hub joined to every m-th node of one cycle, or of two
        k, m = int(rng.integers(1, 3)), int(rng.integers(3, 6))
        cycles = [2 * k * m] if one else [k * m, k * m]
        graph = nx.disjoint_union_all([nx.cycle_graph(size) for size in cycles])
        graph.add_edges_from(("hub", node) for node in range(0, 2 * k * m, m))
        return graph
    m = int(rng.integers(3, 9))  # a long cycle with a chord, or two cycles joined by an edge
    graph = nx.cycle_graph(2 * m) if one else nx.disjoint_union(nx.cycle_graph(m), nx.cycle_graph(m))
    graph.add_edge(0, m)
    return graph


def _piece(novel: nx.Graph, rng: np.random.Generator) -> nx.Graph:
    """Return a connected piece of 10 to 19 nodes, without half of the edges that it can miss."""
    size = int(rng.integers(10, 20))
    chosen = [list(novel)[int(rng.integers(len(novel)))]]
    while len(chosen) < size:
        border = sorted({v for u in chosen for v in novel[u]} - set(chosen))
        chosen.append(border[int(rng.integers(len(border)))])
    graph = nx.Graph(novel.subgraph(chosen))
    every = list(graph.edges)
    for index in rng.permutation(len(every)):
        if rng.integers(2):
            graph.remove_edge(*every[index])
            if not nx.is_connected(graph):
                graph.add_edge(*every[index])
    return graph


class _Graphs:
    """Graphs with labels and distances, given out in padded batches."""

    def __init__(self, family: Family, n: int, task: str, rng: np.random.Generator) -> None:
        novel = nx.convert_node_labels_to_integers(nx.les_miserables_graph())
        self.edges, self.sizes, self.targets, self.distances = [], [], [], []
        for _ in range(n):
            graph = _counterexample(rng) if family == "counterexamples" else _piece(novel, rng)
            names = {name: int(place) for name, place in zip(graph, rng.permutation(len(graph)), strict=True)}
            half = torch.tensor([(names[u], names[v]) for u, v in graph.edges]).T
            edges, size = torch.cat([half, half.flip(0)], 1), len(graph)
            truth = biconnectivity(edges, size)
            self.edges.append(edges)
            self.sizes.append(size)
            self.targets.append((truth.cut_vertex if task == "vertex" else truth.bridge).float())
            self.distances.append((shortest_path_distance(edges, size), resistance_distance(edges, size)))

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return features, edges, graph of each node, distances, targets, graph of each target."""
        sizes = torch.tensor([self.sizes[row] for row in rows])
        starts, wide = sizes.cumsum(0) - sizes, int(sizes.max())
        edges = torch.cat([self.edges[row] + start for row, start in zip(rows, starts, strict=True)], 1)
        pairs = []
        for kind in (0, 1):
            padded = torch.full((len(rows), wide, wide), torch.inf)
            for k, row in enumerate(rows):
                padded[k, : sizes[k], : sizes[k]] = self.distances[row][kind]
            pairs.append(padded)
        targets = [self.targets[row] for row in rows]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(t) for t in targets]))
        nodes = torch.arange(len(rows)).repeat_interleave(sizes)
        return torch.ones(int(sizes.sum()), 1), edges, nodes, (pairs[0], pairs[1]), torch.cat(targets), owner


class _GIN(nn.Module):
    """Graph isomorphism network on degrees, with residuals and normalisation."""

    def __init__(self, width: int, depth: int, level: str) -> None:
        super().__init__()
        conv = needs("torch_geometric.nn", "graphs").GINConv
        self.level = level
        self.degree = nn.Embedding(DEGREES, width)
        self.convs = nn.ModuleList(
            conv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)), train_eps=True)
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        wide = width if level == "node" else 2 * width
        self.head = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, *, distances: object) -> Tensor:
        """Return a score of each node or edge."""
        states = self.degree(torch.bincount(edge_index[1], minlength=len(x)).clamp_max(DEGREES - 1))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            states = states + conv(norm(states), edge_index).relu()
        if self.level == "node":
            return self.head(states)
        u, v = states[edge_index[0]], states[edge_index[1]]
        return (self.head(torch.cat([u, v], 1)) + self.head(torch.cat([v, u], 1))) / 2


@comparison(
    paper="gd-wl",
    says="With resistance distances a transformer learns cut vertices, which message passing cannot.",
    where="Zhang et al., the experiments on biconnectivity",
    arms=("gin", "graphormer-spd", "graphormer-gd"),
    metric="share of test graphs with every node (or edge) right",
    better="higher",
    smallest={"n_train": 40, "n_test": 20, "steps": 5},
)
def biconnected(
    trial: Trial,
    family: Family = "counterexamples",
    task: Literal["vertex", "bridge"] = "vertex",
    n_train: Count = 400,
    n_test: Count = 200,
    steps: Count = 200,
    width: Count = 48,
    num_layers: Count = 3,
) -> dict[str, float]:
    """Label the cut vertices, or the bridges, of small graphs whose nodes look alike.

    The counterexamples are the paper's two families; ``les-miserables`` are random pieces of
    the graph of characters that meet in the novel. Features are constant and every network
    sees degrees. All arms take the same batches, AdamW and one cycle up to 3e-3; the GIN
    has five layers. The paper's models are deeper and wider (12 layers of 80).
    """
    level = "node" if task == "vertex" else "edge"
    rng = np.random.default_rng(trial.seed)
    train, test = (_Graphs(family, n, task, rng) for n in (n_train, n_test))
    order = [rng.permutation(n_train)[:32].tolist() for _ in range(steps)]
    batches = [test.batch(list(range(start, min(start + 50, n_test)))) for start in range(0, n_test, 50)]
    shares = {}
    for arm in ("gin", "graphormer-spd", "graphormer-gd"):
        if arm == "gin":
            net = weights(_GIN, width, 5, level, seed=trial.seed)
        else:
            net = weights(
                GraphormerGD, 1, width, 1, num_layers=num_layers, num_heads=4, ffn_channels=width, num_kernels=32,
                distances="spd" if arm == "graphormer-spd" else "both", level=level, seed=trial.seed,
            )  # fmt: skip
        net = net.to(trial.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        with seeded(trial.seed):
            for step, rows in enumerate(order):
                *inputs, distances, target, _ = _on(train.batch(rows), trial.device)
                loss = F.binary_cross_entropy_with_logits(net(*inputs, distances=distances)[:, 0], target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
                if step % 10 == 0:
                    trial.track(f"training loss, {arm}", step, float(loss.detach()))
        right = [_right(net.eval(), batch, trial.device) for batch in batches]
        shares[arm] = float(torch.cat(right).mean())
    return shares


@torch.no_grad()
def _right(net: nn.Module, batch: tuple, device: str) -> Tensor:
    """Return, for each graph, whether every answer is right."""
    *inputs, distances, target, owner = _on(batch, device)
    wrong = (net(*inputs, distances=distances)[:, 0] > 0) != (target > 0.5)
    return (torch.bincount(owner, wrong.float(), minlength=int(owner.max()) + 1) == 0).float()


def _on(batch: tuple, device: str) -> tuple:
    return tuple(
        tuple(each.to(device) for each in part) if isinstance(part, tuple) else part.to(device)
        for part in batch
    )
