"""FoRDE's step against a deep ensemble's, a loop over members, and a tensor of all differences.

Run from the repository root: ``python -m benchmarks.uncertainty.forde``.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.uncertainty import FoRDELoss, RepulsiveEnsemble, input_gradient_repulsion


def by_differences(gradients: Tensor) -> Tensor:
    """Return R with all pairwise differences in one tensor (members, members, batch, d)."""
    u = gradients.flatten(2)
    u = u / (u.square().sum(2, keepdim=True) + 1e-24).sqrt()
    distance = (u[:, None] - u.detach()).square().sum(3)  # (i, j, batch)
    bandwidth = distance.detach().quantile(0.5, dim=0) / math.log(len(u)) + 1e-12
    kernel = torch.logsumexp(-distance / bandwidth, dim=(1, 2)) - math.log(u.shape[1])
    return kernel.sum() / u.shape[1]


def by_members(members: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss with a forward and an ``autograd.grad`` of each member in turn."""
    fit, gradients = 0.0, []
    for member in members:
        leaf = x.detach().requires_grad_()
        logits = member(leaf)
        fit = fit + F.cross_entropy(logits, y)
        score = logits.gather(1, y[:, None]).sum()
        gradients.append(torch.autograd.grad(score, leaf, create_graph=True)[0])
    return fit + by_differences(torch.stack(gradients))


def stepper(loss, ensemble: RepulsiveEnsemble):
    """Return a function that takes one step of training."""
    opt = torch.optim.SGD(ensemble.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step() -> None:
        opt.zero_grad()
        loss(ensemble).backward()
        opt.step()

    return step


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    repel, plain = FoRDELoss(), FoRDELoss(repulsion=0.0)

    def race_members(width: int, batch: int, target: float) -> None:
        ensemble = RepulsiveEnsemble(
            lambda: nn.Sequential(
                nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
            ),
            10,
        )
        x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
        wanted = by_members(ensemble.members, x, y)
        torch.testing.assert_close(repel(ensemble, x, y), wanted, rtol=1e-4, atol=1e-5)
        name = f"10 members of width {width}, batch {batch}"
        race(
            f"{name}, a step, against a deep ensemble's (at most 3 times)",
            stepper(lambda e: repel(e, x, y), copy.deepcopy(ensemble)),
            stepper(lambda e: plain(e, x, y), copy.deepcopy(ensemble)),
            target=1 / 3,
        )
        race(
            f"{name}, loss and gradient, against a loop over members",
            lambda: repel(ensemble, x, y).backward(),
            lambda: by_members(ensemble.members, x, y).backward(),
            target=target,
        )

    race_members(32, 32, target=2)
    race_members(64, 100, target=2)
    race_members(256, 128, target=0.9)  # arithmetic fills the core: there is nothing to gain, nor to lose
    gradients = torch.randn(10, 128, 3072).requires_grad_()
    race(
        "repulsion of 10 members, 128 images of 32 x 32 x 3, against all differences",
        lambda: torch.autograd.grad(input_gradient_repulsion(gradients), gradients),
        lambda: torch.autograd.grad(by_differences(gradients), gradients),
        target=2,
        rounds=5,
    )


if __name__ == "__main__":
    main()
