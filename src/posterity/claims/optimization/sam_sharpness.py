"""Claims about SAM: the whole batch's lowers the worst direction's sharpness, single samples' the average one's."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, bound, comparison
from posterity.lab.data import (
    ImageData,
    Images,
    Table,
    TableData,
    load_images,
    load_table,
    split,
    table_encoder,
)
from posterity.lab.data.needs import require_rest, require_task
from posterity.lab.nets import mlp
from posterity.lab.tasks import Training, Walk, entry
from posterity.optimization import SAM, alignment, limit_flow, limiting_sharpness

# Two samples' losses a_i(theta) w_i^2, whose minimisers are w = 0 and differ in curvature:
# a_1 = 4 + (theta - 1)^2 is lambda_1, least at 1; a_1 + a_2, a_2 = 1 + 3/4 (theta + 1)^2, is the trace, least at 1/7
FLOOR = torch.tensor([4.0, 1.0], dtype=torch.float64)
BEND = torch.tensor([1.0, 0.75], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -1.0], dtype=torch.float64)
BOTH = torch.tensor([0.5, 0.5], dtype=torch.float64)
Kind = Literal["worst", "ascent", "average"]
# name, whether each step has one sample, and what the theorem says it lowers
FORMS: tuple[tuple[str, bool, Kind], ...] = (("1-SAM", True, "average"), ("n-SAM", False, "worst"))


def _loss(x: Tensor, weight: Tensor = BOTH) -> Tensor:
    return (weight * (FLOOR + BEND * (x[0] - CENTRE) ** 2)) @ x[1:] ** 2


def _walk(trial: Trial, alone: bool, rho: float, lr: float, time: float) -> Iterator[tuple[float, Tensor]]:
    """Yield tau and the parameters after each step of SAM from theta = 0, with one sample a step or both."""
    generator = torch.Generator().manual_seed(trial.seed)
    w = 0.1 * torch.randn(2, dtype=torch.float64, generator=generator)
    x = torch.cat([torch.zeros(1, dtype=torch.float64), w]).requires_grad_()
    optimizer = SAM([x], torch.optim.SGD, lr=lr, rho=rho)
    n_steps = max(10, round(time / (lr * rho**2)))
    weights = torch.eye(2, dtype=torch.float64)[torch.randint(2, (n_steps,), generator=generator)]
    for step in range(n_steps):
        weight = weights[step] if alone else BOTH

        def closure(weight: Tensor = weight) -> None:
            x.grad = None
            _loss(x, weight).backward()

        optimizer.step(closure)
        yield (step + 1) / n_steps * time, x.detach()


def _ends(trial: Trial, kind: Kind, factor: float, rho: float, lr: float, time: float) -> dict[str, float]:
    """Return for each form of SAM an eigenvalue or the trace, at the minimiser that it is closest to at the end."""
    found = {}
    for name, alone, followed in FORMS:
        tau, x = 0.0, torch.zeros(3, dtype=torch.float64)
        for tau, x in _walk(trial, alone, rho, lr, time):
            if math.floor(tau / time * 50) > math.floor((tau - lr * rho**2) / time * 50):
                trial.track(f"theta of {name}", tau, float(x[0]))
        there = torch.cat([x[:1], torch.zeros_like(x[1:])])
        found[name] = factor * float(limiting_sharpness(_loss, there, kind))
        flow = limit_flow(_loss, torch.zeros_like(x), followed, time=time, n_steps=max(5, round(25 * time)))
        trial.record(f"theta of {name}", float(x[0]))
        trial.record(f"theta of {name}, as its flow predicts", float(flow.params[0]))
    return found


@comparison(
    paper="sam-sharpness",
    says="With the whole batch's gradient SAM lowers the worst direction's sharpness, which single samples do not.",
    where="Wen et al., Section 4, and Section 5 for single samples",
    arms=("1-SAM", "n-SAM"),
    metric="largest eigenvalue of the Hessian at the end",
    better="lower",
    smallest={"time": 0.005},
)
def worst_direction(
    trial: Trial, rho: Positive = 0.2, lr: Positive = 0.01, time: Positive = 4.0
) -> dict[str, float]:
    """Drift along the minimisers of two samples' losses in three parameters, where theory is exact (no real data).

    ``time`` is lr rho^2 times the steps. Plain gradient descent does not move along the minimisers.
    """
    return _ends(trial, "worst", 2.0, rho, lr, time)


@comparison(
    paper="sam-sharpness",
    says="With single samples' gradients SAM lowers the average direction's sharpness, which the whole batch's does not.",
    where="Wen et al., Section 5",
    arms=("n-SAM", "1-SAM"),
    metric="trace of the Hessian at the end",
    better="lower",
    smallest={"time": 0.005},
)
def average_direction(
    trial: Trial, rho: Positive = 0.2, lr: Positive = 0.01, time: Positive = 4.0
) -> dict[str, float]:
    """Drift as in the claim of the worst direction, from the same points (no real data)."""
    found = _ends(trial, "average", 6.0, rho, lr, time)
    return {name: found[name] for name in ("n-SAM", "1-SAM")}


@bound(
    paper="sam-sharpness",
    says="Under the whole batch's SAM the gradient turns to the Hessian's top eigenvector.",
    where="Wen et al., Section 4",
    metric="1 - |cosine of gradient and top eigenvector|, mean of the last tenth of steps",
    limit=0.05,
    smallest={"time": 0.02},
)
def aligns(trial: Trial, rho: Positive = 0.2, lr: Positive = 0.01, time: Positive = 4.0) -> float:
    """Measure the angle every tenth step of the same drift (no real data)."""
    missing = []
    for step, (tau, x) in enumerate(_walk(trial, False, rho, lr, time)):
        if step % 10 == 9 and (tau > 0.9 * time or step % 250 == 249):
            off = 1 - float(alignment(_loss, x))
            trial.track("1 - cosine", tau, off)
            if tau > 0.9 * time:
                missing.append(off)
    return float(np.mean(missing))


# --- interpolators of a table ---

# Each arm's radius, chosen so that it has come to rest: single samples' steps jitter more, and have a smaller one.
REACH = {"n-SAM": 0.2, "1-SAM": 0.05}
PACE = 0.3  # of the reciprocal of the largest curvature that a step meets at the start
SCALE = 0.3  # of the first weights, all alike


class _Diagonal:
    """The mean squared error of y = sum_i (u_i^2 - v_i^2) x_i, its parameters u and v behind each other."""

    def __init__(self, X: ndarray, y: ndarray) -> None:
        self.X, self.y, self.pull = X, y, 4 / len(y) * X.T

    def weights(self, x: ndarray) -> ndarray:
        u, v = np.split(x, 2)
        return u * u - v * v

    def loss(self, x: ndarray) -> float:
        return float(np.mean((self.X @ self.weights(x) - self.y) ** 2))

    def gradient(self, x: ndarray, rho: float = 0.0) -> ndarray:
        """Return the gradient (2 d,), for a positive ``rho`` that of a SAM step."""
        d = len(x) // 2
        u, v = x[:d], x[d:]
        c = self.pull @ (self.X @ (u * u - v * v) - self.y)
        g = np.concatenate([c * u, -c * v])
        return self.gradient(x + rho / (math.sqrt(g @ g) + 1e-12) * g) if rho else g

    def trace(self, x: ndarray) -> float:
        """Return the trace of the Hessian: the residuals' part of it is that of u less that of v, so nothing."""
        u, v = np.split(x, 2)
        return float(8 * (u * u + v * v) @ np.mean(self.X**2, axis=0))

    def top(self, x: ndarray) -> float:
        """Return the largest eigenvalue of the Hessian where the loss is 0."""
        u, v = np.split(x, 2)
        slopes = 2 * self.X * np.sqrt(u * u + v * v)
        return 2 / len(self.y) * float(np.linalg.norm(slopes, 2)) ** 2

    def settled(self, x: ndarray, n_steps: int) -> ndarray:
        """Return where gradient descent leads, which stops at a loss of 1e-10."""
        for step in range(n_steps):
            if step % 100 == 0:
                if self.loss(x) < 1e-10:
                    break
                lr = 1 / max(self.top(x), 1e-9)
            x = x - lr * self.gradient(x)
        return x


def _wide(data: str, target: str | None, n: int, seed: int) -> _Diagonal:
    """Return n rows of a table, with permuted columns up to twice as many as rows; all is standardised."""
    table, rng = load_table(data, target=target, task="regression"), np.random.default_rng(seed)
    rows = rng.choice(len(table.y), n, replace=False)
    own = np.asarray(table_encoder().fit_transform(table.X.iloc[rows]), dtype=np.float64)
    own = own[:, np.ptp(own, axis=0) > 0]
    if not own.shape[1]:
        raise ValueError(f"rows must be enough for a column to vary within them, got {n}")
    more = own[:, rng.integers(own.shape[1], size=max(0, 2 * n - own.shape[1]))]
    X, y = np.hstack([own, rng.permuted(more, axis=0)]), table.y[rows]
    return _Diagonal((X - X.mean(0)) / X.std(0), (y - y.mean()) / (np.std(y) or 1.0))


def _has_rows(data: TableData, rows: int, **more: Any) -> None:
    require_task(data.task, "regression")
    if rows > len(data.y):
        raise ValueError(f"rows must be at most the number of rows {len(data.y)}, got {rows}")


@comparison(
    paper="sam-sharpness",
    says="Of the interpolators of a table, single samples' SAM finds one of a smaller trace than the whole batch's.",
    where="Wen et al., Section 5, for a diagonal linear network",
    arms=("n-SAM", "1-SAM"),
    metric="trace of the Hessian of the training loss at the end",
    better="lower",
    smallest={"steps": 200},
    check=_has_rows,
)
def interpolators(
    trial: Trial,
    data: Table = "diabetes",
    target: str | None = None,
    rows: Annotated[int, Between(4)] = 40,
    steps: Annotated[int, Between(20)] = 100_000,
) -> dict[str, float]:
    """Fit y = sum_i (u_i^2 - v_i^2) x_i with permuted columns among the x_i, twice as many as rows.

    Both arms start where gradient descent has brought the loss to 0, make as many steps, until they move no more,
    and end with gradient descent to a loss of 0 again. The trace is 8 sum_i (u_i^2 + v_i^2), so
    least at the interpolator of the smallest l1 norm. The whole batch's SAM lowers lambda_1.
    """
    net = _wide(data, target, rows, trial.seed)
    alone = [_Diagonal(net.X[k : k + 1], net.y[k : k + 1]) for k in range(rows)]
    drawn = np.random.default_rng(trial.seed).integers(rows, size=steps)
    first = net.settled(np.full(2 * net.X.shape[1], SCALE), steps)
    found, every = {}, steps // 20
    for arm, rho in REACH.items():
        met = alone if arm == "1-SAM" else [net]
        lr = PACE / max(each.top(first) for each in met)
        x = first
        for step in range(steps):
            if step % every == 0:
                trial.track(f"trace of {arm}", step, net.trace(x))
            x = x - lr * met[drawn[step] % len(met)].gradient(x, rho)
        x = net.settled(x, steps)
        found[arm] = net.trace(x)
        trial.track(f"trace of {arm}", steps, found[arm])
        trial.record(f"lambda_1 of {arm}", net.top(x))
        trial.record(f"training loss of {arm}", net.loss(x))
        trial.record(f"l1 norm of {arm}", float(np.abs(net.weights(x)).sum()))
    return found


# --- practice ---

# as many settings for each
SGD_RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
SAM_RATES = (5e-3, 1e-2, 2e-2)
RADII = (0.1, 0.2)
Part = tuple[Tensor, Tensor]


def _fits(data: ImageData, n_train: int, validation: int, **more: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, validation + 1, "images")


def _parts(images: ImageData, n_train: int, validation: int, noise: float, trial: Trial) -> list[Part]:
    """Return images for training, validation and test; labels of the first two are wrong with a chance of ``noise``."""
    n, rng = len(images.y), np.random.default_rng(trial.seed)
    shift = rng.integers(1, max(2, len(images.classes)), n) * (rng.random(n) < noise)
    wrong = (images.y + shift) % len(images.classes)
    chosen = split(n, (n_train / n, validation / n, 1 - (n_train + validation) / n), trial.seed)
    return [
        (torch.from_numpy(images.x[rows]).to(trial.device), torch.from_numpy(y[rows]).to(trial.device))
        for rows, y in zip(chosen, (wrong, wrong, images.y), strict=True)
    ]


def _accuracies(
    trial: Trial, parts: list[Part], n_classes: int, width: int, batch_size: int, n_steps: int,
    make: Callable[..., Any],
) -> tuple[float, float]:  # fmt: skip
    """Return validation and test accuracy of a network after some steps."""
    (x, y), *rest = parts
    net = mlp(x[0].numel(), n_classes, width=width, depth=2, seed=trial.seed).to(trial.device)
    optimizer, order = make(net.parameters()), torch.Generator().manual_seed(trial.seed)
    done = 0
    while done < n_steps:
        for rows in torch.randperm(len(y), generator=order).split(batch_size)[: n_steps - done]:

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x[rows]), y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
            done += 1
    with torch.no_grad():
        validation, test = (float((net(x).argmax(1) == y).float().mean()) for x, y in rest)
    return validation, test


@comparison(
    paper="sam-sharpness",
    says="Where labels are noisy, SAM is more accurate than SGD with as many gradients.",
    where="Wen et al., Section 1, of what SAM is used for; Foret et al., Section 3.3",
    arms=("SGD", "SAM"),
    metric="test accuracy",
    better="higher",
    seeds=10,
    smallest={"epochs": 1, "n_train": 64},
    check=_fits,
)
def noisy_labels(
    trial: Trial,
    data: Images = "digits",
    n_train: Annotated[int, Between(20)] = 400,
    validation: Annotated[int, Between(10)] = 400,
    noise: Annotated[float, Between(0, 0.9)] = 0.5,
    width: Count = 128,
    batch_size: Count = 16,
    epochs: Count = 100,
) -> dict[str, float]:
    """Train from the same weights on the same batches, SAM half the steps.

    Each arm has the best of six settings on validation images, whose labels are as noisy: six rates for
    SGD, three rates with two radii for SAM. Momentum is 0.9. A small rate alone stops SGD before it has
    learnt the wrong labels, so that little is left to gain where few are wrong (``noise=0.3``).
    """
    images = load_images(data)
    parts = _parts(images, n_train, validation, noise, trial)
    n_steps = epochs * math.ceil(n_train / batch_size)
    run = partial(_accuracies, trial, parts, len(images.classes), width, batch_size)
    settings: dict[str, dict[str, Callable[..., Any]]] = {
        "SGD": {f"lr {lr:g}": partial(torch.optim.SGD, lr=lr, momentum=0.9) for lr in SGD_RATES},
        "SAM": {
            f"lr {lr:g}, rho {rho:g}": partial(SAM, lr=lr, rho=rho, momentum=0.9)
            for lr in SAM_RATES
            for rho in RADII
        },
    }
    found = {}
    for arm, makes in settings.items():
        steps = n_steps if arm == "SGD" else max(1, n_steps // 2)
        scores = {name: run(steps, make) for name, make in makes.items()}
        best = max(scores, key=lambda name: scores[name][0])
        trial.record(f"validation accuracy of {arm}, {best}", scores[best][0])
        found[arm] = scores[best][1]
    return found


@entry("optimizer", "SAM", paper="sam-sharpness")
def compared(train: Training, seed: int) -> Walk:
    """Return the best of two rates with two radii, momentum 0.9; a step costs two gradients."""
    settings = [(lr, rho) for lr in (0.1, 0.3) for rho in (0.05, 0.1)]

    def make(net: nn.Module, setting: float) -> SAM:
        lr, rho = settings[round(setting)]
        return SAM(net.parameters(), lr=lr, rho=rho, momentum=0.9)

    return train.tuned(make, range(len(settings)), cost=2.0)
