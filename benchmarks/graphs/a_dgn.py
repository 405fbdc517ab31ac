"""Twenty steps forward and backward against PyG's layer, with either aggregation."""

import torch
from torch import Tensor, nn
from torch_geometric.nn import AntiSymmetricConv as Peer
from torch_geometric.nn import SimpleConv

from benchmarks.timing import race
from posterity.graphs import AntiSymmetricConv


class Sum(nn.Module):
    """The sum of V x over senders as PyG passes messages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.V, self.conv = nn.Linear(channels, channels, bias=False), SimpleConv(aggr="sum")

    def reset_parameters(self) -> None:
        self.V.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(self.V(x), edge_index)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, 64, generator=generator, requires_grad=True)
    edges = torch.randint(2_000, (2, 20_000), generator=generator)
    for phi, target in (("sum", 1.5), ("gcn", 2.3)):
        ours = AntiSymmetricConv(64, 20, phi=phi)
        peer = Peer(64, Sum(64) if phi == "sum" else None, num_iters=20)
        race(
            f'"{phi}", 2,000 nodes, 20,000 edges, width 64, 20 steps',
            lambda: ours(x, edges).sum().backward(),  # noqa: B023
            lambda: peer(x, edges).sum().backward(),  # noqa: B023
            target=target,
        )


if __name__ == "__main__":
    main()
