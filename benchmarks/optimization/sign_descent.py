"""Race the optimisers with torch's SGD and Adam, and with norms of all gradients put into one vector.

Run from the repository root: ``python -m benchmarks.optimization.sign_descent``.
"""

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from benchmarks.timing import race
from posterity.optimization import NormalizedGD, SignDescent


def parameters(count: int = 100, side: int = 100) -> list[Tensor]:
    """Return square matrices with gradients: a million entries by default."""
    params = [torch.randn(side, side, requires_grad=True) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(side, side)
    return params


class OneVector(Optimizer):
    """Normalised descent that makes one vector of all gradients for their norm, tensor by tensor else."""

    def __init__(self, params: list[Tensor], lr: float = 1e-2, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        norm = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm(2)
        for group in self.param_groups:
            for p in group["params"]:
                direction = p.grad / norm
                state = self.state[p]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(p)
                state["buffer"].mul_(group["momentum"]).add_(direction)
                p.add_(state["buffer"], alpha=-group["lr"])


def main() -> None:
    torch.set_num_threads(1)
    large = torch.zeros(
        4_000_000
    )  # as activations do: after it is freed the allocator keeps what small tensors leave
    del large
    sign, normalised = SignDescent(parameters(), momentum=0.9), NormalizedGD(parameters(), momentum=0.9)
    adam, sgd = Adam(parameters(), foreach=True), SGD(parameters(), lr=1e-3, momentum=0.9)
    race("a step of signs, a million parameters, against Adam", sign.step, adam.step, target=1 / 0.7)
    race("a step of signs, against SGD with momentum", sign.step, sgd.step, target=1 / 1.3)
    race("a normalised step, against SGD with momentum", normalised.step, sgd.step, target=1 / 1.6)
    peer = OneVector(parameters())
    race("a normalised step, against all gradients in one vector", normalised.step, peer.step, target=3)
    small, peer = NormalizedGD(parameters(1000, 10), momentum=0.9), OneVector(parameters(1000, 10))
    race("the same of a thousand small tensors", small.step, peer.step, target=3)


if __name__ == "__main__":
    main()
