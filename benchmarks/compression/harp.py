"""HARP's step against one that sorts all scores in every forward pass, and a compact network against the dense one."""

import io
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.compression import HARP, pack_sparse, robust_loss

RATE, ALPHA, STEPS, EPSILON = 0.1, 0.1, 10, 8 / 255


def network(width: int = 64) -> nn.Sequential:
    """Return a VGG-like network, of which the later layers hold nearly all weights."""
    layers: list[nn.Module] = []
    channels = 3
    for k, wide in enumerate((width, width, 2 * width, 4 * width, 8 * width)):
        layers += [
            nn.Conv2d(channels, wide, 3, stride=1 + (k > 0), padding=1),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        ]
        channels = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class _Sorted(torch.autograd.Function):
    """A mask by a sort of all scores; its gradient passes straight through, to scores and to the rate."""

    @staticmethod
    def forward(ctx, scores: Tensor, rate: Tensor) -> Tensor:
        mask = scores.clone()
        _, order = scores.flatten().sort()
        gone = int((1 - rate) * scores.numel())
        mask.flatten()[order[:gone]] = 0
        mask.flatten()[order[gone:]] = 1
        return mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum()


class Sorting(nn.Module):
    """A layer that makes its mask in each pass, as the definition reads."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.scores = nn.Parameter(layer.weight.detach().clone())
        self.logit = nn.Parameter(torch.tensor(-2.2))

    def forward(self, x: Tensor) -> Tensor:
        rate = ALPHA * RATE + (1 - ALPHA * RATE) * self.logit.sigmoid()
        weight = self.layer.weight * _Sorted.apply(self.scores.abs(), rate)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return F.conv2d(x, weight, self.layer.bias, self.layer.stride, self.layer.padding)


def sorting(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(Sorting(m) if isinstance(m, nn.Conv2d | nn.Linear) else m for m in net))


def by_hand(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss at the point that the attack finds, parameters differentiable all the while."""
    net.eval()
    point = (x + EPSILON * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        point.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(point), y), point)
        point = (x + (point.detach() + 2 / 255 * slope.sign() - x).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    net.train()
    return F.cross_entropy(net(point), y)


def step(net: nn.Module, loss, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    value = loss(net, x, y)
    if isinstance(net, HARP):
        value = value + net.compression_loss()
    value.backward()
    optimizer.step()
    net.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    harp, official, plain = HARP(network(32), RATE), sorting(network(32)), network(32)
    race(
        "prune step, PGD of 10 steps, a mask by sorting in every pass",
        lambda: step(harp, robust_loss, x, y), lambda: step(official, by_hand, x, y), target=1.5, rounds=5,
    )  # fmt: skip
    race(
        "prune step, an adversarial training step of the dense network",
        lambda: step(harp, robust_loss, x, y), lambda: step(plain, robust_loss, x, y), target=1 / 1.15, rounds=9,
    )  # fmt: skip

    net, batch = network().eval(), torch.rand(16, 3, 32, 32)
    channels = HARP(net, 0.25, start=0.25, granularity="channel").eval()
    with torch.no_grad():
        channels(batch)
        small = channels.to_compact()
        race(
            f"forward pass of a compact network at {float(channels.keep_rate()):.2f} of the multiply-adds, the dense one",
            lambda: small(batch), lambda: net(batch), target=1.5, rounds=9,
        )  # fmt: skip
    pruned = HARP(net, 0.01, start=0.011).to_plain()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    start = time.perf_counter()
    data = pack_sparse(pruned)
    print(
        f"pack_sparse at 1.1 %: {len(data)} bytes for {file.tell()} ({file.tell() / len(data):.1f} times smaller), "
        f"{time.perf_counter() - start:.2f} s"
    )


if __name__ == "__main__":
    main()
