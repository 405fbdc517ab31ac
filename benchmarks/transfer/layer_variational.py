"""LVA against gradient descent through the network, the pseudo-inverse of numpy, and differences of each input."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.transfer import layer_variation, transfer_last_layer, transferal_residue

STEPS = 2_000


def network(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-2], nn.Linear(*sizes[-2:], bias=False))


def descend(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, cached: bool = False) -> nn.Module:
    """Return the network after full-batch Adam on its last layer, through the whole of it or on stored latents."""
    net = copy.deepcopy(net).requires_grad_(False)
    last = net[-1].requires_grad_(True)
    optimizer = torch.optim.Adam(last.parameters(), lr=lr)
    part, given = (last, net[:-1](x)) if cached else (net, x)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(part(given), y).backward()
        optimizer.step()
    return net


def adapted(net: nn.Sequential, x: Tensor, y: Tensor) -> nn.Module:
    net = copy.deepcopy(net)
    transfer_last_layer(net, None, x, y)
    return net


@torch.no_grad()
def by_pinv(net: nn.Sequential, x: Tensor, y: Tensor) -> np.ndarray:
    """Return the change by numpy's pseudo-inverse of all latents, as the official code does, in float64."""
    latent, left = net[:-1](x), y - net(x)
    return np.linalg.pinv(latent.double().numpy()) @ left.double().numpy()


@torch.no_grad()
def by_differences(net: nn.Module, x: Tensor, new: Tensor, label: Tensor, h: float = 1e-3) -> Tensor:
    """Return the residue with a finite difference for each input coordinate, samples together."""
    out = net(x)
    reaction = torch.zeros_like(out)
    for k in range(x.shape[1]):
        ahead = x.clone()
        ahead[:, k] += h
        reaction += (net(ahead) - out) / h * (new - x)[:, k : k + 1]
    return label - out - reaction


@torch.no_grad()
def by_differences_of_each(net: nn.Module, x: Tensor, new: Tensor, label: Tensor, h: float = 1e-3) -> Tensor:
    """Return the same as the official code does: sample by sample, the coordinates of one together."""
    steps, rows = h * torch.eye(x.shape[1]), []
    for one, other in zip(x, new, strict=True):
        slopes = (net(one + steps) - net(one)) / h
        rows.append((other - one) @ slopes)
    return label - net(x) - torch.stack(rows)


def main() -> None:
    torch.set_num_threads(1)
    net, rng = network(1, 64, 64, 1), torch.Generator().manual_seed(0)
    x = torch.rand(2_000, 1, generator=rng) * 2 - 1
    y = torch.sin(9 * x)
    ours = F.mse_loss(adapted(net, x, y)(x), y)
    assert all(ours <= F.mse_loss(descend(net, x, y, lr)(x), y) for lr in (1e-1, 1e-2, 1e-3))
    race("2,000 samples, 64 latents, against 2,000 steps of Adam through the network",
         lambda: adapted(net, x, y), lambda: descend(net, x, y, 1e-2), target=200, rounds=5)  # fmt: skip
    race("the same, against Adam on latents that are stored once",
         lambda: adapted(net, x, y), lambda: descend(net, x, y, 1e-2, cached=True), target=20, rounds=5)  # fmt: skip

    net = network(16, 256, 4)
    x = torch.randn(50_000, 16, generator=rng)
    y = torch.randn(50_000, 4, generator=rng)
    mine = layer_variation(net, None, x, y).weight.double().T.numpy()
    theirs = by_pinv(net, x, y)
    assert np.linalg.norm(mine - theirs) < 1e-6 * np.linalg.norm(theirs)
    race("50,000 samples, 256 latents, against numpy's pseudo-inverse",
         lambda: layer_variation(net, None, x, y), lambda: by_pinv(net, x, y), target=5, rounds=3)  # fmt: skip

    net = network(64, 128, 128, 1)
    x = torch.randn(1_000, 64, generator=rng)
    new, y = x + 0.01 * torch.randn(1_000, 64, generator=rng), torch.randn(1_000, 1, generator=rng)
    torch.testing.assert_close(
        transferal_residue(net, x, y, new, y, method="perturb"),
        by_differences(net, x, new, y),
        rtol=0,
        atol=1e-2,
    )
    for name, peer, target in (
        ("each, as the official code takes them", by_differences_of_each, 20),
        ("each, all samples together", by_differences, 5),
    ):
        race(
            f"residue by the derivative along the shift of 64 inputs, against differences of {name}",
            lambda: transferal_residue(net, x, y, new, y, method="perturb"),
            lambda: peer(net, x, new, y),  # noqa: B023
            target=target,
        )


if __name__ == "__main__":
    main()
