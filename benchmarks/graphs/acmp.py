"""Fifty Runge-Kutta steps forward and backward against gather and scatter under torchdiffeq.

The peer is the way of the official code, written anew: messages are gathered and scattered
along the edges in every evaluation, and torchdiffeq's fixed grid makes the steps.
"""

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from benchmarks.timing import race
from posterity.graphs import ACMPConv


class Peer(nn.Module):
    """Equation 1 along the edges, "gcn" coefficients computed once a call."""

    def __init__(self, channels: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.alpha_raw, self.delta_raw = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        sender, receiver = edge_index
        degree = 1 + torch.bincount(receiver, minlength=len(x))
        force = (degree[sender] * degree[receiver]).to(x.dtype).rsqrt() - self.beta
        alpha, delta = self.alpha_raw.sigmoid(), self.delta_raw.sigmoid()

        def field(_: Tensor, x: Tensor) -> Tensor:
            message = force[:, None] * (x[sender] - x[receiver])
            pull = torch.zeros_like(x).index_add(0, receiver, message)
            return alpha * pull + delta * x * (1 - x * x)

        grid = {"step_size": 0.1}
        return odeint(field, x, torch.tensor([0.0, 5.0]), method="rk4", options=grid)[-1]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, 64, generator=generator, requires_grad=True)
    edges = torch.randint(2_000, (2, 20_000), generator=generator)
    edges[1] = torch.where(edges[0] == edges[1], (edges[1] + 1) % 2_000, edges[1])  # no self-loops
    ours = ACMPConv(64, time=5.0, beta=0.05, delta_init=0.5, method="rk4", step_size=0.1)
    peer = Peer(64, 0.05)
    with torch.no_grad():
        gap = (ours(x, edges) - peer(x, edges)).abs().max()
    print(f"largest difference between both: {float(gap):.1e}")
    race(
        "2,000 nodes, 20,000 edges, width 64, 50 steps, forward and backward",
        lambda: ours(x, edges).sum().backward(),
        lambda: peer(x, edges).sum().backward(),
        target=2.0,
        rounds=3,
    )


if __name__ == "__main__":
    main()
