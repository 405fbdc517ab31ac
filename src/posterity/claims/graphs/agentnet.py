"""Claims about AgentNet: agents see cycles that message passing cannot, and cost what they walk."""

from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import integer, needs
from posterity.claims import Between, Count, Trial, comparison, trend
from posterity.graphs import AgentNet
from posterity.lab.nets import seeded, weights
from posterity.lab.timing import relative_growth


def _four_cycles(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return n graphs of 16 nodes as one: features, edges, graph of each node, labels.

    Groups A, B, C, D of four nodes; A_i C_i, B_i D_i and, by two permutations, A_i B_a(i),
    C_i D_b(i). There is a cycle of four, and the label is 1, where a(i) = b(i) for some i.
    """
    i, halves, labels = np.arange(4), [], np.arange(n) % 2
    for k in range(n):
        a, b = rng.permutation(4), rng.permutation(4)
        while (a == b).any() != labels[k]:
            a, b = rng.permutation(4), rng.permutation(4)
        ends = [(i, 8 + i), (4 + i, 12 + i), (i, 4 + a), (8 + i, 12 + b)]
        place = rng.permutation(16) + 16 * k
        halves.append(place[np.concatenate([np.stack(pair) for pair in ends], 1)])
    half = torch.from_numpy(np.concatenate(halves, 1))
    batch = torch.arange(n).repeat_interleave(16)
    return torch.ones(16 * n, 1), torch.cat([half, half.flip(0)], 1), batch, torch.from_numpy(labels)


class _GIN(nn.Module):
    """Four layers of GIN with residuals and normalisation, sum and maximum of the nodes read out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        conv = needs("torch_geometric.nn", "graphs").GINConv
        self.encoder = nn.Linear(1, hidden)
        self.convs = nn.ModuleList(
            conv(nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden)))
            for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """Return logits of each graph."""
        x = self.encoder(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + conv(norm(x), edge_index).relu()
        n = int(batch[-1]) + 1
        total = x.new_zeros(n, x.shape[1]).index_add(0, batch, x)
        most = x.new_full(total.shape, -torch.inf).index_reduce(0, batch, x, "amax")
        return self.head(torch.cat([total / torch.bincount(batch)[:, None], most], 1))


def _compete(
    trial: Trial, arms: tuple[str, ...], hidden: int, walk: int, steps: int, n_test: int
) -> dict[str, float]:
    """Train each arm on the same fresh graphs and return its test accuracy."""
    for name, value in (("walk", walk), ("steps", steps), ("n_test", n_test)):
        integer(name, value, 1)
    accuracy = {}
    test = _four_cycles(n_test, np.random.default_rng([trial.seed, 1]))
    test = tuple(part.to(trial.device) for part in test)
    for arm in arms:
        if arm == "gin":
            net = weights(_GIN, hidden, seed=trial.seed)
        else:
            mode = "learned" if arm == "agentnet" else arm
            net = weights(AgentNet, 1, hidden, 2, num_agents=walk, num_steps=walk, mode=mode, seed=trial.seed)
        net, rng = net.to(trial.device), np.random.default_rng([trial.seed, 0])
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
        with seeded(trial.seed):
            for step in range(steps):
                *graphs, y = (part.to(trial.device) for part in _four_cycles(32, rng))
                loss = F.cross_entropy(net(*graphs), y)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                if step % 20 == 0:
                    trial.track(f"training loss, {arm}", step, float(loss.detach()))
            net.eval()
            with torch.no_grad():  # walks are random: four of them vote
                scores = sum(net(*test[:3]) for _ in range(1 if arm == "gin" else 4))
        accuracy[arm] = float((scores.argmax(1) == test[3]).float().mean())  # type: ignore[union-attr]
    return accuracy


@comparison(
    paper="agentnet",
    says="Agents tell apart graphs that message passing cannot.",
    where="Martinkus et al., the synthetic experiments",
    arms=("gin", "agentnet"),
    metric="test accuracy, whether a graph has a cycle of four",
    better="higher",
    smallest={"steps": 3, "n_test": 20, "hidden": 8},
)
def four_cycles(
    trial: Trial, hidden: Count = 32, walk: Count = 8, steps: Count = 400, n_test: Count = 200
) -> dict[str, float]:
    """Say whether a graph of 16 like nodes, each with two neighbours, has a cycle of four.

    Message passing sees the same tree from every node, so a GIN is at chance by theory.
    ``walk`` is both agents and moves. Both arms see the same fresh graphs, 32 a step, with
    AdamW at 1e-3. The paper has ``hidden=128, walk=16`` and 10,000 epochs.
    """
    return _compete(trial, ("gin", "agentnet"), hidden, walk, steps, n_test)


@comparison(
    paper="agentnet",
    says="Walking is learned and not luck.",
    where="Martinkus et al., the ablation of moves",
    arms=("random", "simple", "learned"),
    metric="test accuracy, whether a graph has a cycle of four",
    better="higher",
    smallest={"steps": 3, "n_test": 20, "hidden": 8},
)
def learned_walks(
    trial: Trial, hidden: Count = 32, walk: Count = 8, steps: Count = 250, n_test: Count = 200
) -> dict[str, float]:
    """Do the task of `four_cycles` with uniform moves, with simple and with learned ones.

    Simple moves have four learned numbers, for back, stay, explored and unexplored.
    """
    return _compete(trial, ("random", "simple", "learned"), hidden, walk, steps, n_test)


@trend(
    paper="agentnet",
    says="The time of a forward pass does not grow with the graph.",
    where="Martinkus et al., the analysis of the complexity",
    metric="exponent, in nodes, of seconds over those of matrix products of fixed size",
    high=0.2,
    timed=True,
    smallest={"largest": 10_000, "repeats": 1},
)
def sublinear(
    trial: Trial,
    largest: Annotated[int, Between(4_000)] = 1_000_000,
    walk: Count = 16,
    hidden: Count = 64,
    repeats: Count = 9,
) -> float:
    """Time forward passes on rings of degree 4, the moves of each ring built before."""
    net = weights(AgentNet, 8, hidden, 2, num_agents=walk, num_steps=walk, seed=trial.seed)
    net = net.eval().to(trial.device)
    generator = torch.Generator().manual_seed(trial.seed)
    fixed = torch.randn(256, 256, generator=generator).to(trial.device)

    @torch.no_grad()
    def walks(x: Tensor, edges: Tensor, csr: Any) -> float:
        return net(x, edges, csr=csr, generator=generator).sum().item()

    def products() -> float:
        return torch.linalg.multi_dot([fixed] * 10).sum().item()

    sizes, works, size = [], [], 1_000
    while size <= largest:
        node = torch.arange(size)
        edges = torch.cat([torch.stack([node, (node + hop) % size]) for hop in (1, 2, -1, -2)], 1)
        edges = edges.to(trial.device)
        x = torch.randn(size, 8, generator=generator).to(trial.device)
        works.append(partial(walks, x, edges, AgentNet.csr(edges, size)))
        sizes.append(size)
        size = round(size * 10**0.5)
    return relative_growth(
        trial, sizes, works, [products] * len(sizes), rounds=repeats, name="a forward pass"
    )
