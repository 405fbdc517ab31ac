"""Claims about grokking: a large norm makes it, the norm of the landscape's valley ends it, decay times it."""

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Positive, Share, Trial, comparison, trend
from posterity.dynamics import (
    GrokkingDelay,
    constrain_norm,
    generalization_time,
    grokking_delay,
    reduced_landscape,
    scale_weights_,
    weight_norm,
)
from posterity.lab import nets
from posterity.lab.data import ImageData, Images, dataset, load_images, split
from posterity.lab.data.needs import require_rest

ALPHAS = (0.1, 0.32, 0.56, 1.0, 1.8, 3.2, 5.6)
EVERY = 10  # steps between evaluations
P = 41


@dataset(Images, "modular-addition")
def modular_addition(seed: int) -> ImageData:
    """Return all sums of two numbers modulo 41: each pair a picture of two rows, a pixel lit in each."""
    a, b = (part.ravel() for part in np.meshgrid(np.arange(P), np.arange(P), indexing="ij"))
    x = np.eye(P, dtype=np.float32)[np.stack([a, b], 1)][:, None]
    return ImageData(x, (a + b) % P, tuple(map(str, range(P))))


class _Parts(NamedTuple):
    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor


def _fits(data: ImageData, n_train: int, lr: float, weight_decay: float, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, 30, "images")
    if lr * 4 * weight_decay >= 1:
        raise ValueError(
            f"weight_decay must be less than a fourth of 1 / lr, {1 / (4 * lr):g}, got {weight_decay}"
        )


def _parts(data: str, n_train: int, trial: Trial) -> _Parts:
    """Return pictures as vectors and one-hot labels: to train on, to choose a norm by, to test on."""
    images = load_images(data)
    n = len(images.y)
    share = (1 - n_train / n) / 3
    chosen = split(n, (n_train / n, share, 1 - n_train / n - share), trial.seed)
    x = torch.from_numpy(images.x).flatten(1)
    hot = F.one_hot(torch.from_numpy(images.y), len(images.classes)).float()
    return _Parts(*(part[rows].to(trial.device) for rows in chosen for part in (x, hot)))


def _net(parts: _Parts, width: int, trial: Trial) -> nn.Module:
    made = nets.mlp(parts.x.shape[1], parts.y.shape[1], width=width, depth=2, seed=trial.seed)
    return made.to(trial.device)


def _accuracy(out: Tensor, hot: Tensor) -> Tensor:
    return (out.argmax(1) == hot.argmax(1)).double().mean()


def _train(
    trial: Trial, arm: str, net: nn.Module, parts: _Parts, *, lr: float, weight_decay: float, n_steps: int,
    threshold: float, held: bool = False,
) -> tuple[GrokkingDelay, float]:  # fmt: skip
    """Train on all rows at once until it generalises; return the delay, and the norm at the end."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    if held:
        constrain_norm(optimizer)
    steps: list[float] = []
    curves: tuple[list[float], list[float]] = [], []
    for step in range(n_steps + 1):
        out = net(parts.x)
        if step % EVERY == 0 or step == n_steps:
            steps.append(step)
            with torch.no_grad():
                curves[0].append(float(_accuracy(out, parts.y)))
                curves[1].append(float(_accuracy(net(parts.x_test), parts.y_test)))
            if step % (20 * EVERY) == 0:
                trial.track(f"training accuracy, {arm}", step, curves[0][-1])
                trial.track(f"test accuracy, {arm}", step, curves[1][-1])
            if min(max(curve) for curve in curves) >= threshold:
                break
        optimizer.zero_grad()
        F.mse_loss(out, parts.y).backward()
        optimizer.step()
    found = grokking_delay(steps, *curves, threshold=threshold)
    trial.record(f"steps to fit, {arm}", min(found.t_train, n_steps))
    trial.record(f"steps to generalise, {arm}", min(found.t_test, n_steps))
    return found, float(weight_norm(net))


@comparison(
    paper="omnigrok",
    says="A large weight norm makes a network generalise late; at the norm of least validation loss there is no delay.",
    where="Liu et al., Sections 2 to 4",
    arms=("large norm, free", "critical norm, held"),
    metric="log10(1 + steps from fitting to generalising)",
    better="lower",
    smallest={"n_train": 50, "n_steps": 20, "landscape_steps": 3},
    check=_fits,
)
def eliminated(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 200,
    width: Count = 100,
    alpha: Positive = 8.0,
    lr: Positive = 1e-3,
    weight_decay: Positive = 0.2,
    n_steps: Count = 6_000,
    landscape_steps: Count = 400,
    threshold: Share = 0.85,
) -> dict[str, float]:
    """Train once from a start that is alpha times larger, and once at the norm that a landscape says.

    Both arms have the same start but for its norm. Fitting and generalising are accuracies that reach the
    threshold on training and on test rows; a run that does not within ``n_steps`` counts as those. The
    landscape is of a third of the other rows, which are not in the test. Beside them, in the records:
    the ordinary start, free. ``data="modular-addition"`` asks for ``n_train=1_177, lr=3e-3, weight_decay=1,
    alpha=2``. The paper's own setting is 1,000 rows of MNIST, width 200, weight decay
    0.01 and 100,000 steps.
    """
    parts = _parts(data, n_train, trial)
    start = _net(parts, width, trial)
    landscape = reduced_landscape(
        start, parts.x, parts.y, parts.x_val, parts.y_val, alphas=ALPHAS, metric=_accuracy,
        n_steps=landscape_steps, lr=lr,
    )  # fmt: skip
    for k, norm in enumerate(landscape.norm.tolist()):
        trial.track("landscape: training loss", norm, float(landscape.train_loss[k]))
        trial.track("landscape: validation loss", norm, float(landscape.test_loss[k]))
    trial.record("norm of least validation loss", landscape.best_norm())
    trial.record("the curves are an L and a U", landscape.is_lu())
    factors = {
        "large norm, free": alpha,
        "critical norm, held": landscape.best_norm() / float(weight_norm(start)),
        "ordinary start, free": 1.0,
    }
    delays = {}
    for arm, factor in factors.items():
        held = arm.endswith("held")
        net = scale_weights_(copy.deepcopy(start), factor)
        found, norm = _train(
            trial, arm, net, parts, lr=lr, weight_decay=0.0 if held else weight_decay, n_steps=n_steps,
            threshold=threshold, held=held,
        )  # fmt: skip
        trial.record(f"norm at the end, {arm}", norm)
        delays[arm] = math.log10(1 + min(max(found.delay, 0.0), n_steps))
    trial.record("delay, ordinary start, free", delays.pop("ordinary start, free"))
    return delays


@trend(
    paper="omnigrok",
    says="The time to generalise falls as the inverse of weight decay.",
    where="Liu et al., Section 2",
    metric="slope of log(steps to generalise) over log(weight decay)",
    low=-1.3,
    high=-0.6,
    figure=-1.0,
    smallest={"n_train": 50, "n_steps": 20, "threshold": 0.2},
    check=_fits,
)
def timed_by_decay(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 200,
    width: Count = 100,
    alpha: Positive = 8.0,
    lr: Positive = 1e-3,
    weight_decay: Positive = 0.1,
    n_steps: Count = 12_000,
    threshold: Share = 0.85,
) -> float:
    """Train from a start that is alpha times larger with the decay, twice and four times it.

    Fitting costs time too, which decay shortens less. The records have what `generalization_time` predicts from the
    norm at the start and that at which the run with the least decay generalises.
    """
    parts = _parts(data, n_train, trial)
    start = scale_weights_(_net(parts, width, trial), alpha)
    before, critical = float(weight_norm(start)), math.nan
    decays, times = [weight_decay * factor for factor in (1, 2, 4)], []
    for decay in decays:
        found, norm = _train(
            trial, f"decay {decay:g}", copy.deepcopy(start), parts, lr=lr, weight_decay=decay, n_steps=n_steps,
            threshold=threshold,
        )  # fmt: skip
        critical = norm if math.isnan(critical) else critical
        times.append(min(max(found.t_test, 1.0), n_steps))
        predicted = generalization_time(before, critical, lr=lr, weight_decay=decay)
        trial.track("steps to generalise", decay, times[-1])
        trial.track("predicted", decay, predicted)
        trial.record(f"norm at the end, decay {decay:g}", norm)
    return float(np.polyfit(np.log(decays), np.log(times), 1)[0])


@comparison(
    paper="omnigrok",
    says="Multiplying the initial weights makes ordinary data grok.",
    where="Liu et al., Section 3",
    arms=("alpha = 1", "alpha = 8"),
    metric="steps from fitting to generalising",
    better="higher",
    smallest={"n_train": 50, "n_steps": 20},
    check=_fits,
)
def induced(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 200,
    width: Count = 100,
    lr: Positive = 1e-3,
    weight_decay: Positive = 0.2,
    n_steps: Count = 6_000,
    threshold: Share = 0.85,
) -> dict[str, float]:
    """Train the same network with the same decay from its ordinary start and from one that is 8 times larger.

    A run that does not generalise within ``n_steps`` counts as those.
    """
    parts = _parts(data, n_train, trial)
    start, delays = _net(parts, width, trial), {}
    for arm, alpha in (("alpha = 1", 1.0), ("alpha = 8", 8.0)):
        net = scale_weights_(copy.deepcopy(start), alpha)
        found, _ = _train(
            trial, arm, net, parts, lr=lr, weight_decay=weight_decay, n_steps=n_steps, threshold=threshold
        )
        delays[arm] = min(found.delay, n_steps)
    return delays
