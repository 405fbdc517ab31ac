"""Claims about adaptive width: who learns features in the limit, which rates transfer, how fast the limit comes."""

import functools
import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.lab import nets
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.optimization import TangentLimit, coordinate_check, param_groups, parametrize

Power = Annotated[int, Between(-24, 8)]


def _fits(data: ImageData, n: int, narrow: int, wide: int, **_: object) -> None:
    require_rest(len(data.y), "n", n, 1, "images")
    _wider(narrow, wide)


def _wider(narrow: int, wide: int, **_: object) -> None:
    if wide < 2 * narrow:
        raise ValueError(f"wide must be at least twice narrow, got {wide} for {narrow}")


def _images(trial: Trial, data: str, n: int) -> tuple[Tensor, Tensor, int]:
    """Return n images as vectors, their labels and the number of classes."""
    images = load_images(data)
    rows, _ = split(len(images.y), (n / len(images.y), 1 - n / len(images.y)), trial.seed)
    x = torch.from_numpy(images.x[rows]).flatten(1)
    return x.to(trial.device), torch.from_numpy(images.y[rows]).to(trial.device), len(images.classes)


def _mlp(n_in: int, n_out: int, width: int, depth: int = 2) -> nn.Sequential:
    """Return hidden layers without biases, initialised by torch."""
    sizes = [n_in, *[width] * depth, n_out]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@comparison(
    paper="adaptive-width",
    says="Trained by Adam, a wide network in the NTK parametrisation does not learn features, in muP it does.",
    where="the main result on adaptive optimisers",
    arms=("ntk", "mu"),
    metric="movement of the last hidden layer in the wide network, over that in the narrow one",
    better="higher",
    smallest={"wide": 256, "n": 64},
    check=_fits,
)
def feature_learning(
    trial: Trial, data: Images = "digits", n: Count = 256, narrow: Count = 64, wide: Count = 1024, lr: Positive = 0.001,
    n_steps: Count = 5,
) -> dict[str, float]:  # fmt: skip
    """Train a bias-free MLP on full batches by Adam, and see how far its features have gone.

    Theory gives the root of narrow / wide, 1/4 at the defaults, and 1. The record has the
    slopes against width, and the movement under PyTorch's own parametrisation, which grows.
    The rate is the narrow network's in all.
    """
    x, y, n_classes = _images(trial, data, n)
    widths = sorted({narrow, round(math.sqrt(narrow * wide)), wide})
    adam = functools.partial(torch.optim.Adam, eps=1e-20)
    ratio = {}
    for arm in ("ntk", "mu", "standard"):
        table = coordinate_check(
            functools.partial(_mlp, x.shape[1], n_classes), widths, (x, y), F.cross_entropy, lr=lr, optimizer=adam,
            parametrization=arm, n_steps=n_steps, seeds=[trial.seed],
        )  # fmt: skip
        last = table.names[-2]
        moved = table.change[-2, :, -1, 0]
        for width, value in zip(widths, moved, strict=True):
            trial.track(f"movement of the last hidden layer: {arm}", width, value)
        trial.record(f"slope against width, {arm}", table.slopes[last])
        ratio[arm] = float(moved[-1] / moved[0])
    trial.record("movement wide over narrow, standard", ratio.pop("standard"))
    return ratio


def _final_loss(
    trial: Trial, x: Tensor, y: Tensor, n_out: int, width: int, narrow: int, arm: Literal["standard", "mu"], lr: float,
    steps: int, batch_size: int,
) -> float:  # fmt: skip
    """Train by Adam for some steps and return the loss on all rows; infinite where it is not a number."""
    with nets.seeded(trial.seed):
        net = _mlp(x.shape[1], n_out, width).to(trial.device)
        base = _mlp(x.shape[1], n_out, narrow)
    if width != narrow:
        parametrize(net, base, parametrization=arm)
        groups = param_groups(net, lr)
    else:
        groups = [{"params": list(net.parameters())}]
    adam = torch.optim.Adam(groups, lr=lr)
    order = torch.Generator().manual_seed(trial.seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=order).to(x.device)
        adam.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        adam.step()
    with torch.no_grad():
        loss = float(F.cross_entropy(net(x), y))
    return loss if math.isfinite(loss) else math.inf


@comparison(
    paper="adaptive-width",
    says="The learning rate of Adam that is best for a narrow network suits a wide one in muP, and is far too high for it in PyTorch's parametrisation.",
    where="what the muP limit is for",
    arms=("standard", "mu"),
    metric="log training loss of the wide network: at the narrow one's best rate, less at its own",
    better="lower",
    smallest={"wide": 128, "steps": 10, "lowest": -5, "n": 200, "batch_size": 32},
    seeds=10,
    check=_fits,
)
def transfer(
    trial: Trial, data: Images = "digits", n: Count = 1000, narrow: Count = 16, wide: Count = 1024, steps: Count = 60,
    batch_size: Count = 128, lowest: Power = -9, highest: Power = -2,
) -> dict[str, float]:  # fmt: skip
    """Train at every rate of a grid of powers of two, narrow and wide, and take the narrow one's best.

    Initial weights and batches are the same at all rates, and the two arms are one at the narrow
    width. It is 64 times narrower so that its best rate is clear: at a quarter of the gap best
    rates of single seeds are often neighbours on the grid. The record has the best powers.
    """
    x, y, n_classes = _images(trial, data, n)
    powers = range(min(lowest, highest), max(lowest, highest) + 1)

    def losses(width: int, arm: Literal["standard", "mu"]) -> list[float]:
        line = []
        for power in powers:
            line.append(
                _final_loss(trial, x, y, n_classes, width, narrow, arm, 2.0**power, steps, batch_size)
            )
            if math.isfinite(line[-1]):
                name = f"{arm}, width {width}" if width != narrow else f"width {width}"
                trial.track(f"training loss over log2 rate: {name}", power, line[-1])
        return line

    at_narrow = losses(narrow, "mu")
    best = at_narrow.index(min(at_narrow))
    trial.record("log2 of the best rate, narrow", powers[best])
    regret = {}
    for arm in ("standard", "mu"):
        line = losses(wide, arm)
        trial.record(f"log2 of the best rate, wide, {arm}", powers[line.index(min(line))])
        trial.record(f"loss at the narrow one's best rate, {arm}", line[best])
        regret[arm] = math.log(line[best] / min(line))
    return regret


@trend(
    paper="adaptive-width",
    says="One sign step of a finite network comes to the nonlinear operator of the tangent limit like the root of its width.",
    where="the neural tangent limit",
    metric="exponent of the relative distance from the limit in width",
    low=-0.6,
    high=-0.4,
    smallest={"wide": 128, "repeats": 2, "n_samples": 2_000},
    check=_wider,
)
def operator_limit(
    trial: Trial, narrow: Count = 64, wide: Count = 1024, depth: Count = 2, d: Count = 16, n_train: Count = 8,
    n_test: Count = 8, repeats: Count = 32, n_samples: Count = 50_000,
) -> float:  # fmt: skip
    """Draw Gaussian points, take the step at doubling widths, and fit the exponent of its mean error.

    The operator's own error, by ``n_samples``, stays well below the networks'.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    x, x_test = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n_train, n_test))
    chi = torch.randn(n_train, generator=generator, dtype=torch.float64)
    omega = TangentLimit(depth, n_samples=n_samples, generator=generator).operator(x, x_test, chi)
    widths = [narrow * 2**k for k in range(int(math.log2(wide / narrow)) + 1)]
    errors = []
    for width in widths:
        each = []
        for repeat in range(repeats):
            moved = _sign_step(x, x_test, chi, width, depth, 1000 * trial.seed + repeat)
            each.append(float((moved - omega).norm() / omega.norm()))
        errors.append(sum(each) / repeats)
        trial.track("distance from the limit", width, errors[-1])
    logs = torch.tensor([[math.log(w), math.log(e)] for w, e in zip(widths, errors, strict=True)])
    logs = logs - logs.mean(0)
    return float((logs[:, 0] * logs[:, 1]).sum() / logs[:, 0].square().sum())


def _sign_step(
    x: Tensor, x_test: Tensor, chi: Tensor, width: int, depth: int, seed: int, lr: float = 1e-5
) -> Tensor:
    """Return minus the change of a network's values per unit of rate, after one step by signs."""
    with nets.seeded(seed):
        net, base = (_mlp(x.shape[1], 1, n, depth).double() for n in (width, 1))
        for weight in net.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    parametrize(net, base, parametrization="ntk", rescale_init=False)
    steps = torch.optim.Adam(param_groups(net, lr, eps=1e-30))  # whose first step is by signs
    before = net(x_test).detach()
    (net(x)[:, 0] @ chi).backward()
    steps.step()
    return (before - net(x_test).detach())[:, 0] / lr
