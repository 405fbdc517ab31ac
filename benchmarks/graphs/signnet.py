"""Race BasisNet with its dense form, and SignNet with two passes of phi on PyG's layers.

Run from the repository root: ``python -m benchmarks.graphs.signnet``.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch_geometric.nn import GINConv
from torch_geometric.utils import grid

from benchmarks.timing import race
from posterity.graphs import BasisNet, SignNet, eigenspaces, ign_2to1, laplacian_eigs


class Dense(BasisNet):
    """BasisNet as its formula says: build the projectors, then take the five maps of each."""

    def _operations(self, eigvecs: Tensor) -> Tensor:
        parts = eigvecs.split(self.multiplicities, 1)
        return ign_2to1(torch.stack([v @ v.T for v in parts])[:, None])


class TwoPasses(nn.Module):
    """SignNet in the official form: phi on v, phi on -v, messages gathered and scattered."""

    def __init__(self, k: int, width: int, out: int) -> None:
        super().__init__()
        sizes = [1, width, width, width]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        nets = [nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b)) for a, b in pairs]
        self.convs = nn.ModuleList(GINConv(net, train_eps=True, node_dim=0) for net in nets)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))
        self.rho = nn.Sequential(nn.Linear(k * (width + 1), width), nn.ReLU(), nn.Linear(width, out))

    def phi(self, h: Tensor, edge_index: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            z = conv(h, edge_index)
            z = norm(z.flatten(0, 1)).view_as(z).relu()
            h = h + z if i else z
        return h

    def forward(self, eigvecs: Tensor, eigvals: Tensor, edge_index: Tensor) -> Tensor:
        v = eigvecs[..., None]
        h = self.phi(v, edge_index) + self.phi(-v, edge_index)
        return self.rho(torch.cat([h.flatten(1), eigvals.expand_as(eigvecs)], 1))


class OurLayers(TwoPasses):
    """Two passes again, but of this library's own phi: what the single pass alone is worth."""

    def __init__(self, net: SignNet) -> None:
        nn.Module.__init__(self)
        self.net = net
        self.rho = net.rho

    def phi(self, h: Tensor, edge_index: Tensor) -> Tensor:
        return self.net.phi(h, edge_index, None, 1, None)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that a call had allocated at once, as torch counts it."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    edges, _ = grid(32, 32)  # 8 neighbours and itself
    edges = edges[:, torch.isin((edges[0] - edges[1]).abs(), torch.tensor([1, 32]))]  # 4 neighbours
    eigvals, eigvecs = laplacian_eigs(edges, 1024)
    sizes = torch.bincount(eigenspaces(eigvals)).tolist()
    for width in (8, 16):
        ours, dense = BasisNet(sizes, width, 16), Dense(sizes, width, 16)
        race(
            f"BasisNet, grid of 1,024 nodes, {len(sizes)} eigenspaces, width {width}, forward and backward",
            lambda: ours(eigvecs, eigvals).sum().backward(),  # noqa: B023
            lambda: dense(eigvecs, eigvals).sum().backward(),  # noqa: B023
            target=20, rounds=3,
        )  # fmt: skip
    race(
        "BasisNet, what its first layer needs of the projectors",
        lambda: ours._operations(eigvecs), lambda: dense._operations(eigvecs), target=20, rounds=3,
    )  # fmt: skip

    for name, work in (
        ("first layer", lambda net: net._operations(eigvecs)),
        ("forward and backward, width 16", lambda net: net(eigvecs, eigvals).sum().backward()),
    ):
        a, b = (peak_bytes(partial(work, net)) for net in (ours, dense))
        print(f"peak memory, {name}: dense {b >> 20} MiB, ours {a >> 20} MiB, ratio {b / a:.1f} (target 50)")

    ring = torch.stack([torch.arange(24), torch.arange(1, 25) % 24])  # the size of a molecule
    for n, k, edge_index in ((1024, 32, edges), (24, 8, torch.cat([ring, ring.flip(0)], 1))):
        values, vectors = laplacian_eigs(edge_index, n, k)
        net = SignNet(k, 16, 16)
        for name, peer in (("on PyG's layers", TwoPasses(k, 16, 16)), ("of our own phi", OurLayers(net))):
            race(
                f"SignNet, {n} nodes, {k} eigenvectors, width 16, against two passes {name}",
                lambda: net(vectors, values, edge_index).sum().backward(),  # noqa: B023
                lambda: peer(vectors, values, edge_index).sum().backward(),  # noqa: B023
                target=1.3,
                why="Both signs go through phi in any way: one batch of them saves calls, not arithmetic.",
            )


if __name__ == "__main__":
    main()
