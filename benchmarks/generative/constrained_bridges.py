"""Race the force into a mixed domain with autograd column by column, and with the step it is part of.

Run from the repository root: ``python -m benchmarks.generative.constrained_bridges``.
"""

import torch
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.generative import Categorical, ConstrainedBridge, Interval, Product
from posterity.lab.nets import TimeMLP, seeded

BATCH = 128
CLASSES = (9, 16, 7, 15, 6, 5, 2, 42, 2)  # of Adult, its target among them
WIDTH = 512


def adult_like() -> tuple[ConstrainedBridge, Tensor, Tensor, Tensor]:
    """Return a bridge of 5 intervals and 9 categories, 109 columns, with states, times and data."""
    domain = Product([*[Interval(-1.0, 1.0)] * 5, *map(Categorical, CLASSES)])
    draws = torch.Generator().manual_seed(0)
    x1 = domain.project(torch.randn(BATCH, domain.dim, generator=draws))
    t = 0.9 * torch.rand(BATCH, generator=draws)
    bridge = ConstrainedBridge(domain, domain.dim)
    return bridge, bridge.interpolate(torch.zeros_like(x1), x1, t, generator=draws), t, x1


def by_autograd(bridge: ConstrainedBridge, z: Tensor, t: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Return target and force, the force as the gradient of the log mass of each column or category."""
    sigma2 = bridge.sigma2(t)[:, None]
    left = (bridge.beta(torch.ones_like(t)) - bridge.beta(t))[:, None]
    slopes, start = [], 0
    for k in (*[0] * 5, *CLASSES):
        own = z[:, start : start + max(k, 1)].detach().requires_grad_()
        if k:
            corners = torch.eye(k)
            log_h = (-(own[:, None] - corners).square().sum(2) / (2 * left)).logsumexp(1)
        else:
            high, low = (torch.special.ndtr((end - own) / left.sqrt()) for end in (1.0, -1.0))
            log_h = (high - low).clamp_min(1e-9).log()
        slopes.append(torch.autograd.grad(log_h.sum(), own)[0])
        start += max(k, 1)
    force = sigma2 * torch.cat(slopes, 1)
    return sigma2 * (x1 - z) / left - force, force


def forces() -> None:
    """Time target and force against autograd, and against the training step that they are part of."""
    bridge, z, t, x1 = adult_like()

    def ours() -> tuple[Tensor, Tensor]:
        return bridge.target(z, t, x1), bridge.singular_force(z, t)

    for mine, theirs in zip(ours(), by_autograd(bridge, z, t, x1), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    race(
        "the force, 109 columns, against autograd by column",
        lambda: bridge.singular_force(z, t), lambda: by_autograd(bridge, z, t, x1), target=10, rounds=31,
    )  # fmt: skip
    # Two calls of ours here, each with a mean of its own; autograd once for both, the target by subtraction.
    race(
        "target and force, 109 columns, against autograd by column",
        ours, lambda: by_autograd(bridge, z, t, x1), target=10, rounds=31,
    )  # fmt: skip

    with seeded(0):
        net = nn.Sequential(
            nn.Linear(110, WIDTH), nn.BatchNorm1d(WIDTH), nn.LeakyReLU(),
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, 109),
        )  # fmt: skip
    opt = torch.optim.Adam(net.parameters())

    def step() -> None:
        loss = bridge.loss(lambda x, t: net(torch.cat([x, t[:, None]], 1)), x1)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()

    race("target and force, against a training step of 512 units", ours, step, target=1 / 0.15, rounds=31)


def sampling() -> None:
    """Time 50 steps of the bridge against 1,000 of Euler, the official sampler, on a network that is not trained."""
    bridge, net = ConstrainedBridge(Categorical(4), (16, 4)), TimeMLP((16, 4))
    outcomes = {}

    def sample(method: str, n_steps: int) -> None:
        draws = torch.Generator().manual_seed(0)
        outcomes[method] = bridge.sample(
            net, 200, n_steps=n_steps, method=method, project=False, generator=draws
        )

    race(
        "50 steps of the bridge, against 1,000 of Euler",
        lambda: sample("bridge", 50), lambda: sample("euler", 1_000), target=10, rounds=3,
    )  # fmt: skip
    for method, raw in outcomes.items():
        away = (raw - bridge.domain.project(raw)).norm(dim=-1).mean()
        print(f"  distance of raw outcomes to the domain, {method}: {float(away):.2g}")


def main() -> None:
    torch.set_num_threads(1)
    forces()
    sampling()


if __name__ == "__main__":
    main()
