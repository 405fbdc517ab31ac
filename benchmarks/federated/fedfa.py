"""Race the layer with the usual program's steps, and a training step with it against one without.

Run from the repository root: ``python -m benchmarks.federated.fedfa``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.federated import FFALayer

SHAPE = (32, 64, 32, 32)


class StepByStep(nn.Module):
    """The same augmentation one operation at a time: full-size copies of statistics, a sum in Python."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("var_mean", torch.ones(channels))
        self.register_buffer("var_std", torch.ones(channels))

    def _weight(self, var: Tensor) -> Tensor:
        a = 1 / (1 + 1 / (var + 1e-6))
        return len(a) * a / sum(a)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=[2, 3], keepdim=False)
        std = (x.var(dim=[2, 3], keepdim=False) + 1e-6).sqrt()
        self.running_mean = self.running_mean * 0.99 + mean.mean(0).detach() * 0.01
        self.running_std = self.running_std * 0.99 + std.mean(0).detach() * 0.01
        std_mean = ((self._weight(self.var_mean) + 1) * (mean.var(0) + 1e-6)).sqrt().repeat(len(x), 1)
        std_std = ((self._weight(self.var_std) + 1) * (std.var(0) + 1e-6)).sqrt().repeat(len(x), 1)
        beta = mean + torch.randn_like(std_mean) * std_mean
        gamma = std + torch.randn_like(std_std) * std_std
        size = x.shape
        x = (x - mean.reshape(*size[:2], 1, 1)) / std.reshape(*size[:2], 1, 1)
        return x * gamma.reshape(*size[:2], 1, 1) + beta.reshape(*size[:2], 1, 1)


def main() -> None:
    torch.manual_seed(0)
    x, probe = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layer, peer = FFALayer(64, p=1.0), StepByStep(64)

    def step(module: nn.Module) -> None:
        (module(x) * probe).sum().backward()

    race(
        "layer, forward and backward, 32 x 64 x 32 x 32", lambda: step(layer), lambda: step(peer), target=1.5
    )

    def network(layers: bool) -> nn.Module:
        blocks: list[nn.Module] = []
        for n_in in (3, 64, 64):
            blocks += [nn.Conv2d(n_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
            blocks += [FFALayer(64, p=1.0)] if layers else []
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    images, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    nets = {layers: network(layers) for layers in (True, False)}

    def train(layers: bool) -> None:
        nets[layers].zero_grad()
        F.cross_entropy(nets[layers](images), y).backward()

    # at most 15 % more than without
    race(
        "training step against a network without layers",
        lambda: train(True),
        lambda: train(False),
        target=0.87,
        why="Mean, deviation and noise of each map are passes over activations, which on a CPU cost beside convolutions.",
    )


if __name__ == "__main__":
    main()
