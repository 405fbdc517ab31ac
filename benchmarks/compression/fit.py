"""Sensitivity against a training step, a loop over samples and Hutchinson's Hessian; the quantiser against torch's."""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver

from benchmarks.timing import race
from posterity.compression import Sensitivity, allocate_bits, quantize, sensitivity

N = 64


def network(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * width, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def trained_on(x: Tensor, y: Tensor) -> nn.Sequential:
    """Return a network after an epoch, so that its Hessian has a trace."""
    net = network(8)
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(3):
        for part in zip(x.split(N), y.split(N), strict=True):
            step(net, adam, *part)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def by_samples(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return the weights' traces from one backward pass a sample."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    totals = dict.fromkeys(layers, 0.0)
    for i in range(len(x)):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, [m.weight for m in layers.values()])
        for name, g in zip(layers, grads, strict=True):
            totals[name] += float(g.square().sum()) / len(x)
    return totals


def hutchinson(net: nn.Module, x: Tensor, y: Tensor, probes: int) -> np.ndarray:
    """Return a probe's estimate of each weight's Hessian trace, (probes, layers): one backward pass more each."""
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), weights, create_graph=True)
    found = []
    for _ in range(probes):
        signs = [torch.randint_like(w, 2) * 2 - 1 for w in weights]
        products = torch.autograd.grad(grads, weights, signs, retain_graph=True)
        found.append([float((p * s).sum()) for p, s in zip(products, signs, strict=True)])
    return np.array(found)


def fake_quantized(net: nn.Sequential) -> nn.Sequential:
    """Return the network with torch's quantisers before each layer and on its weight."""
    made: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            made.append(FakeQuantize(MinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8))
            torch.nn.utils.parametrize.register_parametrization(
                layer, "weight", FakeQuantize(MinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8)
            )
        made.append(layer)
    return nn.Sequential(*made)


def main() -> None:
    for width, side in ((8, 16), (32, 16)):
        net, trained = network(width), network(width)
        x, y = torch.randn(N, 3, side, side), torch.randint(10, (N,))
        sgd = torch.optim.SGD(trained.parameters(), 0.0)
        race(
            f"traces of all weights and activations, width {width}, batch {N}, against a training step",
            lambda: sensitivity(net, [(x, y)]),  # noqa: B023
            lambda: step(trained, sgd, x, y),  # noqa: B023
            target=0.5,
        )
        found, want = sensitivity(net, [(x, y)]).weight_trace, by_samples(net, x, y)
        np.testing.assert_allclose(list(found.values()), list(want.values()), rtol=1e-3)
        race(
            f"the same against a loop over {N} samples",
            lambda: sensitivity(net, [(x, y)]),  # noqa: B023
            lambda: by_samples(net, x, y),  # noqa: B023
            target=10, rounds=5,
        )  # fmt: skip
    images = torch.randn(40 * N, 3, 16, 16)
    pool = images, (images.flatten(1) @ torch.randn(768, 10)).argmax(1)  # labels that can be learned
    net = trained_on(*pool)
    x, y = pool[0][:N], pool[1][:N]
    error = 0.1  # relative standard error, ours of the worst layer; both costs grow as its inverse square
    pilot = sensitivity(net, zip(pool[0].split(N), pool[1].split(N), strict=True))
    batches = max(2, math.ceil(40 * (max(pilot.weight_error.values()) / error) ** 2))
    trial = hutchinson(net, x, y, 40).sum(1)  # of all layers together, in which errors even out
    probes = math.ceil((trial.std(ddof=1) / abs(trial.mean()) / error) ** 2)
    race(
        f"traces to {error:.0%} ({batches} batches) against Hutchinson's ({probes} probes)",
        lambda: sensitivity(net, [(x, y)] * batches),
        lambda: hutchinson(net, x, y, probes),
        target=5, rounds=3,
    )  # fmt: skip
    ours, peer = quantize(net, 4, 4, calibration=x), fake_quantized(network(8))
    both = [torch.optim.SGD(m.parameters(), 0.0) for m in (ours, peer)]
    race(
        "a fake-quantised training step against torch.ao.quantization's",
        lambda: step(ours, both[0], x, y),
        lambda: step(peer, both[1], x, y),
        target=0.67,
    )
    rng = np.random.default_rng(0)
    names = [f"layer {i}" for i in range(200)]
    traces = dict(zip(names, np.exp(rng.normal(0, 2, 200)).tolist(), strict=True))
    sizes = dict(zip(names, rng.integers(100, 100_000, 200).tolist(), strict=True))
    made = Sensitivity(traces, {}, dict.fromkeys(names, 1.0), {}, sizes, {}, 1, {}, {})
    race(
        "bits of 200 layers among 5, against half a second",
        lambda: allocate_bits(made, weight_budget=4.0),
        lambda: time.sleep(0.5),
        target=1, rounds=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
