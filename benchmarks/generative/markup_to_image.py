"""Race a step of scheduled sampling with a plain one, and the distance of aligned columns with a callback a pair.

Run from the repository root: ``python -m benchmarks.generative.markup_to_image``.
"""

import math

import numpy as np
import torch
from numpy import ndarray
from sklearn.metrics import pairwise_distances
from torch import nn

from benchmarks.timing import race
from posterity.generative import ScheduledSamplingDiffusion, column_dtw
from posterity.lab.nets import TimeMLP

SHAPE = (1, 8, 24)
HEIGHT, WIDTH = 64, 320  # as im2latex-100k


def steps() -> None:
    """Time a training step at m = 1 and one at m = 0; what is extra is a call of the network without gradient."""
    process, x = ScheduledSamplingDiffusion(SHAPE), 2 * torch.rand(64, *SHAPE) - 1
    for width in (256, 1024):
        net = TimeMLP(SHAPE, width=width)
        opt = torch.optim.Adam(net.parameters())

        def step(m: int, net: nn.Module = net, opt: torch.optim.Optimizer = opt) -> None:
            loss = process.loss(net, x, m=m)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()

        race(
            f"a step at m = 1 against a plain one, width {width}",
            lambda: step(1),
            lambda: step(0),
            target=1 / 1.45,
            rounds=101,
        )


def by_callback(pred: ndarray, target: ndarray) -> float:
    """Return the distance of two pictures of ink with a Python callback a pair of columns, as tslearn is called."""
    rows = math.floor(0.1 * HEIGHT)

    def cost(x: ndarray, y: ndarray) -> float:
        least = np.sum((x - y) ** 2)
        for by in range(1, rows + 1):
            if least == 0:
                break
            least = min(least, np.sum((x[by:] - y[:-by]) ** 2), np.sum((x[:-by] - y[by:]) ** 2))
        return least

    costs = pairwise_distances(pred.T, target.T, metric=cost).tolist()
    above = [0.0] + [math.inf] * WIDTH
    for row in costs:
        here = [math.inf]
        for j, each in enumerate(row):
            here.append(each + min(above[j], above[j + 1], here[j]))
        above = here
    return math.sqrt(above[-1])


def columns() -> None:
    """Time one pair of pictures against the callback, and a batch of 64 against its three seconds."""
    draws = torch.Generator().manual_seed(0)
    pred, target = ((torch.rand(64, HEIGHT, WIDTH, generator=draws) > 0.1).float() for _ in range(2))
    found = {}

    def ours(n: int) -> None:
        found["ours"] = column_dtw(pred[:n], target[:n])[0]

    def theirs() -> None:
        found["theirs"] = by_callback((pred[0] == 0).double().numpy(), (target[0] == 0).double().numpy())

    race(
        "columns of a 64 x 320 picture, against a callback a pair",
        lambda: ours(1),
        theirs,
        target=20,
        rounds=1,
    )
    torch.testing.assert_close(float(found["ours"]), found["theirs"], rtol=1e-5, atol=0)
    race(
        "64 such pictures, against a callback a pair for one",
        lambda: ours(64),
        theirs,
        target=20 / 64,
        rounds=1,
    )


def main() -> None:
    torch.set_num_threads(1)
    steps()
    columns()


if __name__ == "__main__":
    main()
