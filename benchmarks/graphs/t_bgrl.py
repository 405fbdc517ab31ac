"""Race a step of T-BGRL with one on PyG's layers, with BGRL's and with all pairs.

Run from the repository root: ``python -m benchmarks.graphs.t_bgrl``.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv

from benchmarks.timing import race
from posterity.graphs import TBGRL, GCNEncoder, augment_graph, corrupt_graph, tbgrl_loss
from posterity.graphs.graph_views import _augment, _corrupt, _SparseFeatures

NODES, LINKS, WORDS = 2708, 5278, 1433  # Cora


class Dense(nn.Module):
    """The encoder on PyG's GCNConv and dense features, as the official code has it."""

    def __init__(self, widths):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.convs = nn.ModuleList(GCNConv(a, b) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b, momentum=0.99) for _, b in pairs)
        self.acts = nn.ModuleList(nn.PReLU() for _ in pairs)

    def forward(self, x, edge_index):
        for conv, norm, act in zip(self.convs, self.norms, self.acts, strict=True):
            x = act(norm(conv(x, edge_index)))
        return x


def graph(n, links, words, density):
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(n, (2, links), generator=generator)
    x = (torch.rand(n, words, generator=generator) < density).float()
    return x / x.sum(1, keepdim=True).clamp_min(1), torch.cat([half, half.flip(0)], 1)


def main() -> None:
    torch.set_num_threads(1)
    x, e = graph(NODES, LINKS, WORDS, 0.0127)
    sparse, generator = _SparseFeatures.of(x), torch.Generator().manual_seed(1)
    ours, theirs = TBGRL(GCNEncoder(WORDS), 128), TBGRL(Dense([WORDS, 256, 128]), 128)

    def our_step(corrupt: bool = True) -> None:
        views = [_augment(sparse, e, edge, feature, generator) for edge, feature in ((0.8, 0.8), (0.8, 0.1))]
        third = _corrupt(sparse, e, "shuffle-features+random-edges", generator) if corrupt else None
        ours._loss(*views, third).backward()

    def their_step() -> None:
        views = [augment_graph(x, e, drop_edge=0.8, drop_feature=f, generator=generator) for f in (0.8, 0.1)]
        theirs.loss(*views, corrupt_graph(x, e, generator=generator)).backward()

    race(
        "a step at Cora's size, 256-128, against GCNConv on dense features",
        our_step,
        their_step,
        target=2,
        rounds=7,
    )
    race("a step of T-BGRL against one of BGRL, at most 1.35 times as long", our_step, lambda: our_step(False),
         target=1 / 1.35, rounds=15)  # fmt: skip
    q = [torch.randn(10_000, 64, requires_grad=True) for _ in range(2)]
    y = [torch.randn(10_000, 64) for _ in range(3)]

    def grace() -> None:
        a, b = (F.normalize(each, dim=1) for each in q)
        between, within = (a @ b.T / 0.5).exp(), (a @ a.T / 0.5).exp()
        loss = -(between.diagonal() / (between.sum(1) + within.sum(1) - within.diagonal())).log().mean()
        torch.autograd.grad(loss, q)

    race("the loss of 10,000 nodes against GRACE's on all pairs",
         lambda: torch.autograd.grad(tbgrl_loss(q[0], y[0], q[1], y[1], y[2]), q), grace, target=10, rounds=3)  # fmt: skip


if __name__ == "__main__":
    main()
