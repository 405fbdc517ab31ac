"""Race gradients of stacked checkpoints with loading one state after the other, as the usual program does.

Run from the repository root: ``python -m benchmarks.robustness.self_ensemble_protection``.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.nets import cnn, mlp
from posterity.robustness import SelfEnsembleProtector

EPS, STEPS = 0.1, 10


def by_reloading(
    net: nn.Module, states: list[dict], x: Tensor, y: Tensor, shift: int, batch_size: int
) -> Tensor:
    """Return the protected batches, with one model into which each state is loaded for each gradient."""
    parts = []
    for clean, target in zip(x.split(batch_size), ((y + shift) % 10).split(batch_size), strict=True):
        now = clean
        for _ in range(STEPS):
            total = torch.zeros_like(now)
            for state in states:
                net.load_state_dict(state)
                net.zero_grad()
                leaf = now.clone().requires_grad_()
                F.cross_entropy(net(leaf), target).backward()
                assert leaf.grad is not None
                total = total + leaf.grad
            now = (now - EPS / 4 * total.sign()).clamp(clean - EPS, clean + EPS).clamp(0, 1)
        parts.append(now)
    return torch.cat(parts)


def main() -> None:
    cases = (
        ("small fully connected networks, 64 images", [mlp(64, 10, width=32, seed=k) for k in range(10)], (64, 1, 8, 8), 2),
        ("small convolutional networks, 16 images", [cnn(1, 10, width=8, seed=k) for k in range(10)], (16, 1, 8, 8), 2),
        ("convolutional networks on larger images, never slower", [cnn(3, 10, width=8, seed=k) for k in range(10)], (64, 3, 32, 32), 1),
    )  # fmt: skip
    for name, nets, shape, target in cases:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        y = torch.arange(len(x)) % 10
        spare = copy.deepcopy(nets[0]).eval()
        states = [net.state_dict() for net in nets]
        protector = SelfEnsembleProtector(nets, epsilon=EPS, step_size=EPS / 4, n_steps=STEPS, mode="ce")
        ours, theirs = protector.protect(x, y), by_reloading(spare, states, x, y, 5, 512)
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 0.01  # signs of gradients near 0
        race(f"ten checkpoints: {name}", lambda: protector.protect(x, y),  # noqa: B023
             lambda: by_reloading(spare, states, x, y, 5, 512), target=target, rounds=7)  # noqa: B023  # fmt: skip


if __name__ == "__main__":
    main()
