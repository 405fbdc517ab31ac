"""Networks against PyG's message passing, duplicates against sets, measures against plain counting."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, homophily, remove_self_loops, softmax, to_undirected

from benchmarks.timing import race
from posterity.graphs import (
    HeterophilyGNN,
    adjusted_homophily,
    edge_homophily,
    find_duplicate_nodes,
    label_informativeness,
    minesweeper,
)


class Passing(MessagePassing):
    """One module's aggregation as PyG passes messages, with the weights of ours."""

    def __init__(self, module: Any, model: str) -> None:
        super().__init__(aggr="mean" if model == "SAGE" else "add", node_dim=0)
        self.ours, self.kind = module, model

    def forward(self, x: Tensor, edges: tuple[Tensor, Tensor | None]) -> Tensor:
        edge_index, weight = edges
        m, n, width = self.ours, *x.shape
        if not hasattr(m, "heads"):
            if hasattr(m, "linear_1"):
                return m(x, None)
            message = self.propagate(edge_index, x=x, weight=weight, u=None, v=None)
            return m.feed_forward_module(torch.cat([x, message], 1) if m.apart else message, None)
        if hasattr(m, "attn_query"):
            q, k, z = (part(x).view(n, m.heads, -1) for part in (m.attn_query, m.attn_key, m.attn_value))
            message = self.propagate(edge_index, x=z, weight=None, u=q, v=k).view(n, width)
            return m.dropout(m.output_linear(torch.cat([x, message], 1) if m.apart else message))
        z = m.input_linear(x)
        u, v = m.attn_linear_u(z), m.attn_linear_v(z)
        message = self.propagate(edge_index, x=z.view(n, -1, m.heads), weight=None, u=u, v=v).view(n, width)
        return m.feed_forward_module(torch.cat([z, message], 1) if m.apart else message, None)

    def message(self, x_j: Tensor, weight: Any, u_j: Any, v_i: Any, index: Tensor, size_i: int) -> Tensor:
        if weight is not None:
            return weight[:, None] * x_j
        if u_j is None:
            return x_j
        if u_j.ndim == 3:
            scores = (u_j * v_i).sum(2) / u_j.shape[2] ** 0.5
            return softmax(scores, index, num_nodes=size_i)[:, :, None] * x_j
        scores = nn.functional.leaky_relu(u_j + v_i, 0.2)
        return softmax(scores, index, num_nodes=size_i)[:, None] * x_j


def passing(net: HeterophilyGNN) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the same network, weights shared, on PyG's message passing."""
    modules = [Passing(block.module, net.model) for block in net.residual_modules]

    def forward(x: Tensor, edge_index: Tensor) -> Tensor:
        weight = None
        edge_index = remove_self_loops(edge_index)[0]
        if net.model in ("GCN", "GAT", "GT"):
            edge_index = add_self_loops(edge_index, num_nodes=len(x))[0]
        if net.model == "GCN":
            edge_index, weight = gcn_norm(edge_index, None, len(x), add_self_loops=False)
        x = nn.functional.gelu(net.dropout(net.input_linear(x)))
        for block, module in zip(net.residual_modules, modules, strict=True):
            x = x + module(block.normalization(x), (edge_index, weight))
        return net.output_linear(net.output_normalization(x))

    return forward


def duplicates_by_sets(edge_index: Tensor, n: int, y: Tensor) -> list[int]:
    """Return groups from a Python loop over sets (the naive version)."""
    near: list[set[int]] = [set() for _ in range(n)]
    for u, v in edge_index.T.tolist():
        near[u].add(v)
    groups: dict[Any, int] = {}
    return [groups.setdefault((frozenset(near[u]) or u, int(y[u])), len(groups)) for u in range(n)]


def wiki(generator: torch.Generator) -> tuple[Tensor, int, Tensor]:
    """Return a directed graph of Squirrel's size and share of copies."""
    n, bare = 5_201, 3_300
    base = torch.cat([torch.arange(bare), torch.randint(bare, (n - bare,), generator=generator)])
    edges = torch.randint(bare, (2, 138_000), generator=generator)
    senders = base.argsort(stable=True)
    count = torch.bincount(base, minlength=bare)
    start = count.cumsum(0) - count
    times = count[edges[0]]
    owner = torch.arange(edges.shape[1]).repeat_interleave(times)
    place = torch.arange(len(owner)) - (times.cumsum(0) - times)[owner]
    y = torch.randint(5, (bare,), generator=generator)[base]
    return torch.stack([senders[start[edges[0, owner]] + place], edges[1, owner]]), n, y


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    board = minesweeper(60, 60, generator=generator)
    for model in ("GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"):
        net: Any = HeterophilyGNN(7, 64, 1, model=model, num_layers=2, dropout=0.0)  # type: ignore[arg-type]
        peer = passing(net)
        torch.testing.assert_close(net(board.x, board.edge_index), peer(board.x, board.edge_index))
        race(
            f"{model}, 60 by 60 board, width 64, 2 layers, forward and backward, against MessagePassing",
            lambda: net(board.x, board.edge_index).sum().backward(),  # noqa: B023
            lambda: peer(board.x, board.edge_index).sum().backward(),  # noqa: B023
            target=1.0,
        )
    edges, n, y = wiki(generator)
    assert find_duplicate_nodes(edges, n, y=y).tolist() == duplicates_by_sets(edges, n, y)
    race(
        f"duplicates, {n:,} nodes, {edges.shape[1]:,} edges, against sets (target also 300 ms)",
        lambda: find_duplicate_nodes(edges, n, y=y),
        lambda: duplicates_by_sets(edges, n, y),
        target=20.0,
        rounds=7,
    )
    n = 100_000
    edges, y = (
        torch.randint(n, (2, 1_000_000), generator=generator),
        torch.randint(5, (n,), generator=generator),
    )
    for measure in (edge_homophily, adjusted_homophily, label_informativeness):
        race(
            f"{measure.__name__}, 1,000,000 edges (target also 200 ms), against PyG's cleaning and homophily",
            lambda: measure(edges, y),  # noqa: B023
            lambda: homophily(to_undirected(remove_self_loops(edges)[0]), y, method="edge"),
            target=1.0,
            rounds=5,
        )


if __name__ == "__main__":
    main()
