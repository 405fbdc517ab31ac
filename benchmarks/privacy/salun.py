"""Race unlearning with retraining, the mask with a ranking of all weights a share, and masked steps with plain ones.

Run from the repository root: ``python -m benchmarks.privacy.salun``.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.nets import cnn, mlp
from posterity.privacy import MaskedOptimizer, saliency_mask, salun
from posterity.privacy.salun import _largest

SHARES = [k / 10 for k in range(1, 11)]


def by_ranks(sizes: list[Tensor]) -> list[list[Tensor]]:
    """Return masks of ten shares as the usual program makes them: every weight's rank, by two sorts a share."""
    flat = torch.cat([part.flatten() for part in sizes])
    masks = []
    for share in SHARES:
        ranks = (-flat).argsort().argsort()
        chosen = (ranks < int(len(flat) * share)).split([part.numel() for part in sizes])
        masks.append([mask.view_as(part) for mask, part in zip(chosen, sizes, strict=True)])
    return masks


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            sgd.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            sgd.step()
    return net


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1000, 64), torch.randint(10, (1000,))
    net = train(mlp(64, 10, width=256), x, y, 5)
    for share, target in (
        (0.1, 3),
        (0.3, 3),
    ):  # of the rows; epochs of the latter have but 2.8 times as many of them
        n = int(1000 * share)
        forget, retain = (x[:n], y[:n]), (x[n:], y[n:])
        race(f"ten epochs of unlearning {share:.0%}, the mask included, against forty of retraining",
             lambda: salun(net, forget, retain, n_classes=10),  # noqa: B023
             lambda: train(mlp(64, 10, width=256), *retain, 40), target=target, rounds=5)  # noqa: B023  # fmt: skip

    sizes = [torch.rand(512, 256, 3, 3), torch.rand(512, 1000)]
    for ours, theirs in zip((_largest(sizes, share) for share in SHARES), by_ranks(sizes), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    race("the mask of a gradient of 1.7 million weights, against the ten of the usual program",
         lambda: _largest(sizes, 0.5), lambda: by_ranks(sizes), target=10, rounds=3)  # fmt: skip
    race("ten masks, against the ten of the usual program",
         lambda: [_largest(sizes, share) for share in SHARES], lambda: by_ranks(sizes), target=1, rounds=3)  # fmt: skip

    images, labels = torch.rand(128, 3, 16, 16), torch.randint(10, (128,))
    plain = cnn(3, 10, width=32)
    held = copy.deepcopy(plain)
    mask = saliency_mask(held, (images, labels))

    def step(net: nn.Module, optimizer: torch.optim.Optimizer):
        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()

        return run

    optimizers = [
        torch.optim.SGD(each.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4) for each in (held, plain)
    ]
    masked = MaskedOptimizer(optimizers[0], held.named_parameters(), mask)
    race("a training step under a mask, against one without (within 15 %)",
         step(held, masked), step(plain, optimizers[1]), target=1 / 1.15, rounds=21)  # fmt: skip
    optimizers = [torch.optim.SGD([weight], lr=1e-3, momentum=0.9, weight_decay=5e-4)
                  for weight in (nn.Parameter(torch.rand(2_000_000)), nn.Parameter(torch.rand(2_000_000)))]  # fmt: skip
    for optimizer in optimizers:
        optimizer.param_groups[0]["params"][0].grad = torch.rand(2_000_000)
    weight = optimizers[0].param_groups[0]["params"][0]
    held_step = MaskedOptimizer(optimizers[0], [("w", weight)], {"w": torch.rand(2_000_000) < 0.5})
    race("the optimiser's part of it alone, two million weights",
         held_step.step, optimizers[1].step, target=1 / 2, rounds=21)  # fmt: skip


if __name__ == "__main__":
    main()
