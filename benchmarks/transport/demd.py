"""Race the closed form with the walk over the bins and with a barycentre; draw the growth.

Run from the repository root: ``python -m benchmarks.transport.demd``.
"""

import time
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.timing import race
from posterity.transport import DEMDLoss


def walk(histograms):
    """Return value and prices by shipping the least remaining mass, step by step (Kline 2019).

    The price of a bin is set when its histogram is the one that runs out. Works on lists of
    numbers and on tensors, as the published layer does.
    """
    left = [list(row) for row in histograms]
    d, n = len(left), len(left[0])
    at, value = [0] * d, 0.0
    prices = [[0.0] * n for _ in range(d)]
    while True:
        here = min(range(d), key=lambda r: left[r][at[r]])
        mass = left[here][at[here]]
        value = value + mass * (max(at) - min(at))
        for r in range(d):
            left[r][at[r]] = left[r][at[r]] - mass
        if at[here] == n - 1:
            return value, prices
        before = max(at) - min(at)
        at[here] += 1
        prices[here][at[here]] = prices[here][at[here] - 1] + max(at) - min(at) - before


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(10, 100, generator=generator, dtype=torch.float64)
    p = (p / p.sum(-1, keepdim=True)).requires_grad_()
    numbers, entries = p.detach().numpy(), p.detach()
    loss = DEMDLoss()
    assert abs(walk(numbers)[0] - float(loss(p).detach())) < 1e-9

    def ours() -> None:
        torch.autograd.grad(loss(p), p)

    name = "10 histograms of 100 bins, value and gradient, against the walk"
    race(f"{name} on tensors", ours, lambda: walk(entries), target=100, rounds=9)
    race(f"{name} on plain numbers", ours, lambda: walk(numbers.tolist()), target=1, rounds=15)
    if find_spec("ot"):
        import ot

        bins = np.arange(100, dtype=float)[:, None]
        cost = np.abs(bins - bins.T) / 99
        race("the same, against POT's entropic barycentre, reg 0.01", ours,
             lambda: ot.barycenter(numbers.T.copy(), cost, reg=1e-2), target=20, rounds=5)  # fmt: skip
    else:
        print("against POT's barycentre: skipped, POT is not installed")
    many = torch.rand(64, 10, 100, generator=generator).softmax(-1).requires_grad_()
    race("64 problems at once, against a loop over them", lambda: torch.autograd.grad(loss(many), many),
         lambda: [torch.autograd.grad(loss(one), many) for one in many], target=5)  # fmt: skip
    for d, n in (
        (10, 100),
        (10, 1_000),
        (10, 10_000),
        (10, 100_000),
        (100, 100),
        (1_000, 100),
        (10_000, 100),
    ):
        p = torch.rand(d, n, generator=generator).softmax(-1).requires_grad_()
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.autograd.grad(loss(p), p)
            times.append(time.perf_counter() - start)
        print(f"{d} histograms of {n} bins: {1e3 * min(times):.3f} ms")


if __name__ == "__main__":
    main()
