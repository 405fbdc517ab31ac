"""Race SAM with a loop over parameters, its step with the base optimiser's, and gradients of samples with a loop.

Run from the repository root: ``python -m benchmarks.optimization.sam_sharpness``.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.optimization import SAM, limiting_sharpness, sam_gradient


class LoopSAM(torch.optim.Optimizer):
    """SAM as it is usually written: norms, perturbations and copies parameter by parameter."""

    def __init__(self, params: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        closure()
        norms = [p.grad.norm(p=2) for group in self.param_groups for p in group["params"]]
        norm = torch.norm(torch.stack(norms), p=2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad * scale)
        self.zero_grad()
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()


def work(make: Callable[..., Any], net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Return a step on a batch."""
    optimizer = make(net.parameters(), lr=1e-3, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def given(make: Callable[..., Any], count: int, side: int) -> Callable[[], object]:
    """Return a step of tensors whose gradients stand still: what the optimiser alone costs."""
    params = [torch.randn(side, side, requires_grad=True) for _ in range(count)]
    grads = [torch.randn(side, side) for _ in range(count)]
    optimizer = make(params, lr=1e-3, momentum=0.9)

    def closure() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    return lambda: optimizer.step(closure)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x, y = torch.randn(256, 256), torch.randint(10, (256,))
    race("a step, against one of SGD with the same network", work(SAM, net, x, y), work(torch.optim.SGD, net, x, y),
         target=1 / 2.15, rounds=51)  # fmt: skip
    race("the optimiser alone, 100 small tensors, against a loop over parameters", given(SAM, 100, 10), given(LoopSAM, 100, 10),
         target=1.2, rounds=101)  # fmt: skip

    small = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    names = dict(small.named_parameters())
    flat = nn.utils.parameters_to_vector(small.parameters()).detach()
    x, y = torch.randn(64, 20), torch.randn(64)

    def sample_loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in names.values()])
        state = {name: part.view_as(p) for (name, p), part in zip(names.items(), parts, strict=True)}
        return (functional_call(small, state, (x,)).squeeze() - y) ** 2

    def loop() -> Tensor:
        total = torch.zeros_like(flat)
        for k in range(64):
            p = flat.clone().requires_grad_()
            g = torch.autograd.grad(sample_loss(p, x[k], y[k]), p)[0]
            p = (flat + 0.1 * g / (g.norm() + 1e-12)).requires_grad_()
            total += torch.autograd.grad(sample_loss(p, x[k], y[k]), p)[0]
        return total / 64

    def ours() -> Tensor:
        return sam_gradient(sample_loss, flat, x, y, rho=0.1, group_size=1)

    torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-6)
    race("a perturbation for each of 64 samples, against a loop", ours, loop, target=10)

    d = 1_000_000
    curvature = torch.linspace(0, 1, d) ** 8
    start = time.perf_counter()
    limiting_sharpness(
        lambda x: (curvature * x**2).sum() / 2, torch.zeros(d), "worst", method="lanczos", n_probes=20
    )
    print(f"lambda_1 of a million parameters, 20 products: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
