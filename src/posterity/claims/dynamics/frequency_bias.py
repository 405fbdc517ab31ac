"""Claims about frequency bias: a Sobolev index sets which frequencies are learned first, and can leave noise alone."""

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.dynamics import (
    ImageSobolevLoss,
    SobolevLoss,
    frequency_energy,
    learning_rates_by_degree,
    quadrature_weights,
    relu_ntk,
)
from posterity.lab import training
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.lab.nets import seeded

Index = Annotated[float, Between(-4.0, 4.0)]
Points = Annotated[int, Between(32, 2_000)]
Uneven = Annotated[float, Between(0.0, 0.9)]
DEGREES = range(2, 13)
LAZY = 0.1  # amplitude of waves, at which networks of these widths move as their kernel says
STEP = 0.1  # of the longest that is stable along the way, 1 / largest eigenvalue


# --- images ---


def _fits(data: ImageData, n_train: int, cutoff: int, **_: object) -> None:
    require_rest(len(data.y), "n_train", n_train, 30, "images")
    h, w = data.x.shape[2:]
    if _square(h, w).max() < cutoff:
        raise ValueError(
            f"cutoff must be at most {_square(h, w).max():g} for images of {h} x {w}, got {cutoff}"
        )


def _square(h: int, w: int) -> np.ndarray:
    """Return squared frequencies."""
    return (np.fft.fftfreq(h)[:, None] * h) ** 2 + (np.fft.fftfreq(w) * w) ** 2


def _noise(shape: tuple[int, ...], cutoff: int, rng: np.random.Generator) -> np.ndarray:
    """Return white noise without frequencies below the cutoff, of standard deviation 1."""
    drawn = np.fft.fft2(rng.standard_normal(shape)) * (_square(*shape[2:]) >= cutoff)
    found = np.fft.ifft2(drawn).real
    return found / found.std()


@comparison(
    paper="frequency-bias",
    says="A negative Sobolev index makes an autoencoder ignore high-frequency noise that the plain loss learns.",
    where="Yu et al., Section 5",
    arms=("mean squared error", "H^-1"),
    metric="mean squared error of what comes out for noisy test images, to the clean ones",
    better="lower",
    smallest={"n_train": 100, "steps": 30},
    check=_fits,
)
def noise(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_200,
    cutoff: Annotated[int, Between(1)] = 8,
    s: Index = -1.0,
    steps: Count = 1_500,
    lr: Positive = 1e-3,
) -> dict[str, float]:
    """Train an autoencoder on noisy images, as input and as target: nobody has clean ones.

    The noise has no frequencies of square below ``cutoff``, and the images' standard deviation. Arms share noise,
    initial weights and batches, and the weights of frequencies have the mean 1 in both. Where there is more noise
    than the bottleneck holds, neither arm learns it, and the index costs detail: in 32 x 32 photographs with
    ``cutoff=32``. The paper's own images are those of MNIST.
    """
    images = load_images(data)
    n = len(images.y)
    clean = images.x.mean(1, keepdims=True).astype(np.float64)
    noisy = clean + clean.std() * _noise(clean.shape, cutoff, np.random.default_rng(trial.seed))
    train, test = split(n, (n_train / n, 1 - n_train / n), trial.seed)
    x, clean = (torch.from_numpy(part).float().to(trial.device) for part in (noisy, clean))
    pixels, errors = x[0].numel(), {}
    for arm, index in (("mean squared error", 0.0), ("H^-1", s)):
        loss = ImageSobolevLoss(index, normalize=True)
        with seeded(trial.seed):
            net = nn.Sequential(
                nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(),
                nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, pixels), nn.Unflatten(1, x.shape[1:]),
            )  # fmt: skip
        training.fit(
            net, lambda net, x, loss=loss: loss(net(x), x), (x[train],), steps=steps, lr=lr, seed=trial.seed, device=trial.device,
        )  # fmt: skip
        with torch.no_grad():
            out = net.to(trial.device)(x[test])
        errors[arm] = float((out - clean[test]).square().mean())
        trial.record(f"to the noisy images, {arm}", float((out - x[test]).square().mean()))
    return errors


# --- the circle ---


class _Wide(nn.Module):
    """The network that the theory is of: signs in the second layer, each neuron twice, so that it starts at 0."""

    signs: Tensor

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        half = torch.randn(
            -(-width // 2), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        self.weight = nn.Parameter(half.repeat(2, 1))
        self.bias = nn.Parameter(half.new_zeros(2 * len(half)))
        ones = half.new_ones(len(half)) / math.sqrt(4 * len(half))  # with the root of 2 of relu_ntk
        self.register_buffer("signs", torch.cat([ones, -ones]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.T).relu() @ self.signs


def _circle(n: int, uneven: float, trial: Trial) -> tuple[Tensor, Tensor]:
    """Return angles, one at random in each of n parts and these drawn to one side, and their points."""
    drawn = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(trial.seed))
    t = 2 * math.pi * (torch.arange(n) + drawn) / n
    t = (t + uneven * t.sin()).to(trial.device)
    return t, torch.stack([t.cos(), t.sin()], 1)


def _descent(
    x: Tensor, target: Tensor, loss: SobolevLoss, width: int, seed: int
) -> Iterator[tuple[float, Tensor]]:
    """Yield time and energies of the residual by degree, before each step of full-batch gradient descent."""
    net = _Wide(width, seed).to(x.device)
    lr = STEP / float(torch.linalg.eigvals(relu_ntk(x, x) @ loss.matrix).real.max())
    optimizer, time, weights = torch.optim.SGD(net.parameters(), lr=lr), 0.0, quadrature_weights(x)
    while True:
        out = net(x)
        yield time, frequency_energy(out - target, x, max_degree=DEGREES[-1], weights=weights)
        optimizer.zero_grad()
        loss(out, target).backward()
        optimizer.step()
        time += lr


def _rates(t: Tensor, x: Tensor, loss: SobolevLoss, width: int, steps: int, seed: int) -> np.ndarray:
    """Return at which rate a wave of each degree decays, each learned by a network of its own."""
    found = []
    for degree in DEGREES:
        curve = _descent(x, LAZY * (degree * t + seed).sin(), loss, width, seed)
        (_, first), (time, last) = next(curve), [next(curve) for _ in range(steps)][-1]
        found.append(float((first[degree] / last[degree]).log()) / (2 * time))
    return np.array(found)


@trend(
    paper="frequency-bias",
    says="The Sobolev index sets the order in which a wide network learns frequencies: degree l at the rate mu_l (1 + l)^(2s).",
    where="Yu et al., Section 4",
    metric="measured over predicted change with s of the slope of log decay rate in log(1 + degree)",
    low=0.8,
    high=1.2,
    smallest={"n": 64, "width": 200, "steps": 3},
)
def order(
    trial: Trial, n: Points = 128, uneven: Uneven = 0.5, width: Count = 2_000, steps: Count = 20
) -> float:
    """Train wide networks on waves of degree 2 .. 12 at s = -1, 0 and 1, on a circle denser on one side (no real data).

    The metric is the least-squares slope of the three measured slopes on the predicted ones, near 2s - 2. Rates are
    those of the first steps. At waves of amplitude 1 networks of this width are not lazy: high degrees at s = 1
    are learned more slowly than the kernel says.
    """
    t, x = _circle(n, uneven, trial)
    at, slopes = np.log(1.0 + np.array(DEGREES)), []
    for s in (-1.0, 0.0, 1.0):
        measured = _rates(t, x, SobolevLoss(x, s, max_degree=DEGREES[-1]), width, steps, trial.seed)
        predicted = learning_rates_by_degree(DEGREES[-1], 2, s).numpy()[DEGREES[0] :]
        for degree, rate, theirs in zip(DEGREES, measured, predicted, strict=True):
            trial.track(f"rate, s = {s:g}", degree, rate)
            trial.track(f"predicted rate, s = {s:g}", degree, theirs)
        slopes.append([np.polyfit(at, np.log(rates), 1)[0] for rates in (predicted, measured.clip(1e-9))])
        trial.record(f"slope, s = {s:g}", slopes[-1][1])
    theirs, ours = np.transpose(slopes)
    return float(np.polyfit(theirs, ours, 1)[0])


@comparison(
    paper="frequency-bias",
    says="An index beyond half the dimension reverses the bias: the finer wave is learned before the coarser one.",
    where="Yu et al., Section 5",
    arms=("s = 0", "s = 1.5"),
    metric="degree-9 over degree-5 residual, when that of degree 5 is halved",
    better="lower",
    smallest={"n": 64, "width": 200, "n_steps": 50},
)
def reversed_order(
    trial: Trial, n: Points = 128, uneven: Uneven = 0.5, width: Count = 1_000, n_steps: Count = 2_000
) -> dict[str, float]:
    """Train a wide network on sin t + sin 5t + sin 9t, on a circle denser on one side (no real data).

    Full-batch gradient descent goes as far as half of degree 5, in both arms, or for ``n_steps``. Theory says 1.6 and 0.8.
    Much later both degrees are down to what quadrature leaves of them, and their ratio says little.
    """
    t, x = _circle(n, uneven, trial)
    target, found = LAZY * (t.sin() + (5 * t).sin() + (9 * t).sin()), {}
    for arm, s in (("s = 0", 0.0), ("s = 1.5", 1.5)):
        loss = SobolevLoss(x, s, max_degree=DEGREES[-1])
        start, steps = None, 0
        for steps, (time, energy) in enumerate(_descent(x, target, loss, width, trial.seed)):
            start = energy if start is None else start
            for degree in (5, 9):
                trial.track(
                    f"residual of degree {degree}, {arm}", time, float((energy / start)[degree].sqrt())
                )
            if steps == n_steps or energy[5] < start[5] / 4:
                break
        trial.record(f"steps, {arm}", steps)
        found[arm] = float((energy[9] / energy[5]).sqrt())
    return found


@comparison(
    paper="frequency-bias",
    says="On points that are not uniform, quadrature weights give frequencies the rates that theory says; equal weights do not.",
    where="Yu et al., Section 3",
    arms=("equal weights", "quadrature weights"),
    metric="mean distance of decay rates from mu_l, as a share of it, degrees 2 to 12",
    better="lower",
    smallest={"n": 64, "width": 200, "steps": 3},
)
def weighed(
    trial: Trial, n: Points = 128, uneven: Uneven = 0.5, width: Count = 2_000, steps: Count = 20
) -> dict[str, float]:
    """Train wide networks on waves at s = 0, on a circle denser on one side (no real data); both arms measure alike."""
    t, x = _circle(n, uneven, trial)
    predicted, found = learning_rates_by_degree(DEGREES[-1], 2).numpy()[DEGREES[0] :], {}
    for arm, weights in (
        ("equal weights", torch.full_like(t, 2 * math.pi / n)),
        ("quadrature weights", None),
    ):
        loss = SobolevLoss(x, max_degree=DEGREES[-1], weights=weights)
        measured = _rates(t, x, loss, width, steps, trial.seed)
        for degree, share in zip(DEGREES, measured / predicted, strict=True):
            trial.track(f"rate over mu, {arm}", degree, share)
        found[arm] = float(np.abs(measured / predicted - 1).mean())
    return found
