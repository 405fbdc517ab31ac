"""Race the shared factorisation with inverses, sparse with dense, and the layer with ChebConv.

Run from the repository root: ``python -m benchmarks.graphs.gcn_stability``.
"""

import time
from statistics import median

import torch
from torch_geometric.nn import ChebConv

from benchmarks.timing import race
from posterity.graphs import ResolventConv, StableGCN, resolvent


def grid(side):
    """Return the edges of a square grid, both ways."""
    pixel = torch.arange(side * side).view(side, side)
    half = torch.cat(
        [
            torch.stack([pixel[:, :-1].flatten(), pixel[:, 1:].flatten()]),
            torch.stack([pixel[:-1].flatten(), pixel[1:].flatten()]),
        ],
        1,
    )
    return torch.cat([half, half.flip(0)], 1)


def naive(net, x, edge_index):
    """Return the outputs by an explicit inverse for each layer and power: equation 1 as it stands."""
    n = len(x)
    W = torch.zeros(n, n, dtype=torch.float64)
    W.index_put_((edge_index[1], edge_index[0]), torch.ones(()).double(), accumulate=True)
    for conv in net.convs:
        y = conv.bias
        for k, weight in enumerate(conv.weight, 1):
            R = torch.linalg.inv(torch.eye(n).double() + torch.diag(W.sum(1)) - W)
            y = y + torch.linalg.matrix_power(R, k).float() @ x @ weight
        x = y.relu()
    return net.readout(x)


def dense(conv, x, edge_index):
    """Return the output of the layer by its dense path, however large the graph."""
    limit, resolvent.LARGEST_DENSE = resolvent.LARGEST_DENSE, len(x)
    try:
        return conv(x, edge_index)
    finally:
        resolvent.LARGEST_DENSE = limit


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(1_000, (2, 4_000), generator=generator)
    edges = torch.cat([edges, edges.flip(0)], 1)
    x = torch.randn(1_000, 32, generator=generator, requires_grad=True)
    net = StableGCN(32, 32, 10)
    race(
        "1,000 nodes, two layers of order 2, forward and backward, against an inverse a power",
        lambda: net(x, edges).sum().backward(),
        lambda: naive(net, x, edges).sum().backward(),
        target=3,
        rounds=5,
    )

    edges = grid(100)
    x = torch.randn(10_000, 32, generator=generator, requires_grad=True)
    conv, cheb = ResolventConv(32, 32, 2), ChebConv(32, 32, 3)
    race(
        "grid of 100 x 100, order 2, forward and backward, against PyG's ChebConv",
        lambda: conv(x, edges).sum().backward(),
        lambda: cheb(x, edges).sum().backward(),
        target=0.2,
    )
    fixed = ResolventConv(32, 32, 2, cached=True)
    race(
        "the same with the factorisation cached",
        lambda: fixed(x, edges).sum().backward(),
        lambda: cheb(x, edges).sum().backward(),
        target=0.2,
    )

    for side in (10, 32, 45, 100):
        edges = grid(side)
        x = torch.randn(side * side, 32, generator=generator, requires_grad=True)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            conv(x, edges).sum().backward()
            seconds.append(time.perf_counter() - start)
        print(f"{side * side:,} nodes of a grid, forward and backward: {1e3 * median(seconds):.2f} ms")

    race(
        "grid of 100 x 100, order 2, forward and backward, sparse against dense",
        lambda: conv(x, edges).sum().backward(),
        lambda: dense(conv, x, edges).sum().backward(),
        target=20,
        rounds=1,
    )


if __name__ == "__main__":
    main()
