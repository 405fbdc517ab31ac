"""Claims about Byz-VR-MARINA: no error floor is left for liars to exploit, and messages may be sparse."""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from posterity.claims import Between, Count, PartOfAll, Positive, Several, Trial, comparison
from posterity.federated import (
    FiniteSum,
    MarinaResult,
    alie,
    bit_flip,
    bucketing,
    byz_sgd,
    byz_vr_marina,
    coordinate_median,
    geometric_median,
    ipm,
    rand_k,
)
from posterity.lab.data import Table, TableData, load_table, table_encoder

RATES = (1.0, 0.5, 0.1, 0.02)  # each arm has the best of them on another seed
SPARSE_RATES = (1.0, 0.5, 0.2, 0.1, 0.05)
ATTACKS = {"alie": alie, "ipm": ipm, "bit_flip": bit_flip}
MEDIANS = {"coordinate": coordinate_median, "geometric": geometric_median}
FLOOR = 1e-15  # what is left of a gap is rounding

Attack = Literal["alie", "ipm", "bit_flip"]
Median = Literal["coordinate", "geometric"]
Liars = Annotated[int, Between(1)]


class _Logistic:
    """Regularised logistic regression of the commonest class against all others, and its optimum."""

    def __init__(self, table: TableData, l2: float, device: str) -> None:
        x = np.asarray(table_encoder().fit_transform(table.X), dtype=np.float64)
        self.X = torch.from_numpy(np.column_stack([x, np.ones(len(x))])).to(device)
        self.y = torch.from_numpy((table.y == np.bincount(table.y).argmax()).astype(np.float64)).to(device)
        self.l2 = l2
        w = torch.zeros(self.X.shape[1], dtype=torch.float64, device=device)
        for _ in range(100):  # Newton's steps, shortened where they would not descend
            p = torch.sigmoid(self.X @ w)
            gradient = self.gradient(w, self.X[None], self.y[None])[0]
            hessian = (self.X.T * (p * (1 - p))) @ self.X / len(self.X)
            hessian += l2 * torch.eye(len(w), dtype=w.dtype, device=device)
            step, size = torch.linalg.solve(hessian, gradient), 1.0
            while self.loss(w - size * step, self.X, self.y) > self.loss(w, self.X, self.y) and size > 1e-9:
                size /= 2
            w = w - size * step
            if gradient.norm() < 1e-14:
                break
        self.least = float(self.loss(w, self.X, self.y))

    def loss(self, w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        margin = X @ w
        return torch.nn.functional.softplus(margin).mean() - (y * margin).mean() + self.l2 / 2 * (w @ w)

    def gradient(self, w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("kb,kbd->kd", torch.sigmoid(X @ w) - y, X) / X.shape[1] + self.l2 * w

    def gap(self, w: Tensor) -> float:
        """Return how far above the optimum, a large number where it is not finite."""
        gap = float(self.loss(w, self.X, self.y)) - self.least
        return max(gap, FLOOR) if math.isfinite(gap) else 1e6

    def shared(self, workers: int) -> FiniteSum:
        return FiniteSum(self.loss, (self.X, self.y), n_workers=workers, gradient=self.gradient)

    @property
    def start(self) -> Tensor:
        return torch.zeros(self.X.shape[1], dtype=torch.float64, device=self.X.device)


def _options(seed: int, liars: int, attack: Attack, median: Median, batch: int) -> dict[str, Any]:
    draws, order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    return {
        "n_byzantine": liars, "attack": ATTACKS[attack], "batch_size": batch, "generator": draws,
        "aggregator": lambda vectors: MEDIANS[median](bucketing(vectors, 2, generator=order), nonfinite="drop"),
    }  # fmt: skip


def _fits(data: TableData, batch: int, **more: Any) -> None:
    if batch > len(data.y):
        raise ValueError(f"batch must be at most the number of rows {len(data.y)}, got {batch}")
    good, liars = more["good"], more["liars"]
    if 4 * liars >= good + liars:
        raise ValueError(
            f"liars must be less than a third of the {good} good workers, so that half of the buckets of two are good, got {liars}"
        )


@comparison(
    paper="byz-vr-marina",
    says="Variance reduction removes the error floor that Byzantine workers exploit.",
    where="Gorbunov et al., Section 3, Figure 1",
    arms=("byz-sgd", "byz-momentum", "byz-vr-marina"),
    metric="logarithm to base 10 of the distance from the least loss",
    better="lower",
    smallest={"steps": 2, "batch": 64},
    check=_fits,
)
def no_floor(
    trial: Trial,
    data: Table = "breast-cancer",
    target: str | None = None,
    attack: Attack = "alie",
    median: Median = "coordinate",
    good: Several = 17,
    liars: Liars = 3,
    batch: Count = 16,
    steps: Count = 700,
    l2: Positive = 0.01,
) -> dict[str, float]:
    """Fit a logistic regression with as many sample gradients a worker in each arm, every worker holding all rows.

    ``steps`` are those of Byz-VR-MARINA, which costs about three batches a step, with the full gradients. Each arm
    has the best of four rates on another seed. Three of twenty lie, so that fewer than half of the buckets
    of two can be bad; with five of twenty, as in the paper, they can, and nothing is guaranteed.
    """
    problem = _Logistic(load_table(data, target=target, task="classification"), l2, trial.device)
    workers, rows = problem.shared(good), len(problem.y)
    p = batch / rows
    budget = rows + round(steps * (2 * batch * (1 - p) + p * rows))

    def marina(lr: float, seed: int, watch: Any = None) -> MarinaResult:
        options = _options(seed, liars, attack, median, batch)
        return byz_vr_marina(workers, problem.start, lr=lr, n_steps=steps, callback=watch, **options)

    def sgd(momentum: float, lr: float, seed: int, watch: Any = None) -> MarinaResult:
        options = _options(seed, liars, attack, median, batch)
        return byz_sgd(workers, problem.start, lr=lr, n_steps=budget // batch, momentum=momentum, callback=watch, **options)  # fmt: skip

    arms: dict[str, Callable[..., MarinaResult]] = {
        "byz-sgd": partial(sgd, 0.0), "byz-momentum": partial(sgd, 0.9), "byz-vr-marina": marina,
    }  # fmt: skip
    gaps = {}
    for arm, solve in arms.items():
        tried = [problem.gap(solve(lr, trial.seed + 10_000).x) for lr in RATES]
        rate = RATES[int(np.argmin(tried))]
        every = (steps if arm == "byz-vr-marina" else budget // batch) // 20 or 1

        def watch(step: int, x: Tensor, arm: str = arm, every: int = every) -> None:
            if step % every == every - 1:
                cost = step * (budget / every / 20)
                trial.track(arm, cost, math.log10(problem.gap(x)))

        found = solve(rate, trial.seed, watch)
        gaps[arm] = math.log10(problem.gap(found.x))
        trial.record(f"rate, {arm}", rate)
        trial.record(f"sample gradients a worker, {arm}", found.n_sample_gradients)
    return gaps


@comparison(
    paper="byz-vr-marina",
    says="With sparse messages fewer numbers are sent until the loss is near its least, under attack.",
    where="Gorbunov et al., Section 3, communication compression",
    arms=("whole vectors", "rand-k"),
    metric="logarithm to base 10 of the numbers a worker sends until the distance from the least loss is 1e-5",
    better="lower",
    smallest={"steps": 3},
    check=_fits,
)
def fewer_numbers(
    trial: Trial,
    data: Table = "breast-cancer",
    target: str | None = None,
    attack: Attack = "alie",
    median: Median = "coordinate",
    good: Several = 17,
    liars: Liars = 3,
    batch: Count = 64,
    steps: Count = 1500,
    share: PartOfAll = 0.1,
    near: Positive = 1e-5,
    l2: Positive = 0.01,
) -> dict[str, float]:
    """Send whole vectors, or a tenth of their coordinates in each step without full gradients.

    Each arm has the best of five rates on another seed; an arm that does not come near within ``steps``
    counts all that it sent. The record has the sample gradients of each.
    """
    problem = _Logistic(load_table(data, target=target, task="classification"), l2, trial.device)
    workers, d = problem.shared(good), problem.X.shape[1]
    k = max(1, round(share * d))

    def sent(arm: str, lr: float, seed: int) -> tuple[float, float]:
        """Return numbers sent until the loss is near, and sample gradients until then."""
        sparse = (
            partial(rand_k, k=k, generator=torch.Generator().manual_seed(seed)) if arm == "rand-k" else None
        )
        reached: list[int] = []

        def watch(step: int, x: Tensor) -> None:
            if not reached and problem.gap(x) <= near:
                reached.append(step)

        found = byz_vr_marina(
            workers, problem.start, lr=lr, n_steps=steps, compressor=sparse, callback=watch,
            **_options(seed, liars, attack, median, batch),
        )  # fmt: skip
        if not reached:
            return found.n_sent + 1, found.n_sample_gradients
        row = found.history[reached[0]]
        return row["sent"], row["sample_gradients"]

    numbers = {}
    for arm in ("whole vectors", "rand-k"):
        tried = [sent(arm, lr, trial.seed + 10_000)[0] for lr in SPARSE_RATES]
        rate = SPARSE_RATES[int(np.argmin(tried))]
        cost, gradients = sent(arm, rate, trial.seed)
        numbers[arm] = math.log10(cost)
        trial.record(f"rate, {arm}", rate)
        trial.record(f"sample gradients a worker, {arm}", gradients)
    return numbers
