"""Claims about the margin bias: flow keeps the fastest-scaling parameters small, and that can cost the margin."""

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Several, Trial, bound, comparison, trend
from posterity.dynamics import (
    MarginFlow,
    PowerDiagonal,
    margin_flow,
    neural_collapse,
    seminorm_max_margin,
    two_balls,
)
from posterity.lab.data import (
    ImageData,
    Images,
    Table,
    TableData,
    dataset,
    load_images,
    load_table,
    table_encoder,
)
from posterity.lab.data.needs import require_rows, require_task
from posterity.lab.nets import seeded

START = 0.5  # of every parameter: flow carries none of a degree of 3 over 0, so columns are turned to need positive ones
SURE = 0.5  # rows are kept that a least-squares fit of -1 and 1 puts this far on their side


def _two_balls(seed: int, each: int, n: int, cost: float, free: float) -> tuple[Tensor, Tensor]:
    """Return n points a class on unit spheres, whose centres have ``each`` penalised and as many free coordinates.

    The centre's directions are random and positive; the lengths of its two parts are ``cost`` and ``free``.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = 0.5 + 0.5 * torch.rand(2, each, generator=generator, dtype=torch.float64)
    parts *= torch.tensor([[cost], [free]]) / parts.norm(dim=1, keepdim=True)
    return two_balls(n, parts.flatten(), generator=generator)


@dataset(Table, "two-balls")
def two_balls_table(seed: int) -> TableData:
    """Return 200 points a class in ten dimensions, on unit spheres around two centres, the last five coordinates less apart."""
    x, y = _two_balls(seed, 5, 200, 2.0, 0.95)
    frame = pd.DataFrame(
        x.numpy(), columns=[f"{kind} {k}" for kind in ("penalised", "free") for k in range(1, 6)]
    )
    return TableData(frame, (y.numpy() > 0).astype(np.int64), "classification", ("-1", "1"))


def _points(table: TableData, data: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return points and -1 or 1: two-balls as they are, else a separable part of two classes, columns in random order."""
    rows = np.flatnonzero(table.y < 2)
    y = 2.0 * table.y[rows] - 1
    if data == "two-balls":
        return torch.tensor(table.X.to_numpy()), torch.tensor(y)
    x = np.asarray(table_encoder().fit_transform(table.X.iloc[rows]), dtype=np.float64)
    x = x[:, np.ptp(x, axis=0) > 0]
    x = x[:, np.random.default_rng(seed).permutation(x.shape[1])]
    x = x * np.where(y @ x < 0, -1.0, 1.0)
    kept = y * (x @ np.linalg.lstsq(x, y, rcond=None)[0]) > SURE
    return torch.tensor(x[kept]), torch.tensor(y[kept])


def _askable(data: TableData, name: str, degree: int, **more: Any) -> None:
    if degree % 2 == 0:
        raise ValueError(f"degree must be odd, got {degree}")
    require_task(data.task, "classification")
    x, y = _points(data, name, 0)
    if x.shape[1] < 2:
        raise ValueError(f"at least 2 columns that vary are needed, has {x.shape[1]}")
    require_rows(len(y), "rows of two classes that a linear fit separates well")
    if len(y.unique()) < 2:
        raise ValueError("a linear fit puts all rows on one side")
    try:
        seminorm_max_margin(x, y, [True] * x.shape[1])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"rows of the first two classes have no margin: {error}") from error


def _followed(x: Tensor, y: Tensor, degrees: list[int], duration: float) -> tuple[MarginFlow, Tensor]:
    """Return flow from equal parameters, and the coefficients at its end."""
    model = PowerDiagonal(degrees)
    nn.init.constant_(model.theta, START)
    flow = margin_flow(model, x, y, duration=duration)
    coef = flow.params[-1] ** torch.tensor(degrees)
    return flow, coef


@comparison(
    paper="margin-bias",
    says="Gradient flow favours a subset of the parameters, and this can cost robustness.",
    where="Kunin et al., Sections 4 and 5",
    arms=("homogeneous (1,...,1)", "quasi-homogeneous (1,...,3)"),
    metric="Euclidean margin of the learned direction, of the widest",
    better="lower",
    smallest={"duration": 2.0},
    check=_askable,
)
def robustness(
    trial: Trial,
    data: Table = "two-balls",
    target: str | None = None,
    degree: Annotated[int, Between(3)] = 3,
    duration: Positive = 7.0,
) -> dict[str, float]:
    """Follow flow of sum_i theta_i^D_i x_i with degrees 1, and with ``degree`` for the second half of the columns.

    Lower is what is claimed of the second arm. Both start from the same parameters and go as far along
    their path. Of a table the first two classes are taken, standardised, without rows near the boundary of a
    least-squares fit or beyond it; its columns come in random order. Free coordinates that separate alone need not
    come to their own widest margin, so that the learned one may be below that of the seminorm's solution.
    """
    x, y = _points(load_table(data, target=target, task="classification", seed=trial.seed), data, trial.seed)
    d = x.shape[1]
    half = d // 2
    widest = seminorm_max_margin(x, y, [True] * d)
    cheap = seminorm_max_margin(x, y, [True] * half + [False] * (d - half))
    trial.record("margin of the seminorm's solution, of the widest", cheap.margin / widest.margin)
    found = {}
    arms = {"homogeneous (1,...,1)": 1, "quasi-homogeneous (1,...,3)": degree}
    for arm, power in arms.items():
        degrees = torch.tensor([1] * half + [power] * (d - half))
        flow, coef = _followed(x, y, degrees.tolist(), duration)
        for time, at in zip(flow.times, flow.params, strict=True):
            b = at**degrees
            trial.track(arm, float(time), float((y * (x @ b)).min() / b.norm()) / widest.margin)
        found[arm] = float(flow.min_margin[-1] / coef.norm()) / widest.margin
    return found


@bound(
    paper="margin-bias",
    says="The flow's direction is that of the margin problem in which only the largest rate is penalised.",
    where="Kunin et al., the theorem of Section 4",
    metric="1 - cosine of the two directions",
    limit=1e-3,
    smallest={"duration": 2.0, "n": 20},
)
def limit_direction(
    trial: Trial,
    cost: Annotated[float, Between(1.5)] = 2.0,
    free: Annotated[float, Between(0.1, 0.9)] = 0.8,
    each: Count = 2,
    n: Annotated[int, Between(20)] = 200,
    duration: Positive = 11.0,
) -> float:
    """Follow flow on two balls, degrees 1 and 3 for ``each`` coordinates, to margins of e^30 (no real data).

    Where few points leave a free coordinate alone enough, or ask for a negative one, the flow ends
    elsewhere (``each=5``).
    """
    x, y = _two_balls(trial.seed, each, n, cost, free)
    solution = seminorm_max_margin(x, y, [True] * each + [False] * each).coef
    flow, coef = _followed(x, y, [1] * each + [3] * each, duration)
    powers = torch.tensor([1] * each + [3] * each)
    for time, at in zip(flow.times, flow.params, strict=True):
        trial.track("1 - cosine", float(time), 1 - float(F.cosine_similarity(at**powers, solution, dim=0)))
    trial.record("log of the least margin", float(flow.log_margin[-1]))
    return 1 - float(F.cosine_similarity(coef, solution, dim=0))


@trend(
    paper="margin-bias",
    says="Parameters of the largest rate vanish beside the others where these separate the data alone.",
    where="Kunin et al., the conjecture of Section 5",
    metric="slope of log(largest of degree 1 / largest of degree 3) in path time, its second half",
    high=-0.5,
    smallest={"duration": 2.0, "n": 20},
)
def vanishing(
    trial: Trial,
    cost: Positive = 2.0,
    free: Annotated[float, Between(1.1)] = 1.3,
    each: Count = 2,
    n: Annotated[int, Between(20)] = 200,
    duration: Positive = 8.0,
) -> float:
    """Follow flow on two balls that free coordinates separate (no real data).

    A unit of path time multiplies the largest parameter by e: -1 is a part of degree 1 that stands still.
    """
    x, y = _two_balls(trial.seed, each, n, cost, free)
    flow, _ = _followed(x, y, [1] * each + [3] * each, duration)
    top, rest = flow.params.abs().split(each, 1)
    ratio = (top.max(1).values / rest.max(1).values).log()
    for time, value in zip(flow.times, ratio, strict=True):
        trial.track("log ratio", float(time), float(value))
    second = len(ratio) // 2
    return float(np.polyfit(flow.times[second:], ratio[second:], 1)[0])


def _trainable(data: ImageData, n_train: int, **more: Any) -> None:
    if n_train > len(data.y):
        raise ValueError(f"n_train must be at most the number of images {len(data.y)}, got {n_train}")


@trend(
    paper="margin-bias",
    says="Behind a normalisation the features of a class collapse as training goes on.",
    where="Kunin et al., the corollary of Section 6",
    metric="slope of log nc1 in log epochs, from the tenth of all",
    high=-0.1,
    smallest={"n_train": 100, "epochs": 10, "width": 16},
    check=_trainable,
)
def collapse(
    trial: Trial,
    data: Images = "digits",
    n_train: Annotated[int, Between(50)] = 500,
    width: Several = 128,
    epochs: Annotated[int, Between(10)] = 100,
    lr: Positive = 1e-3,
) -> float:
    """Train a network with BatchNorm in front of its last layer by Adam, and measure features of its training images."""
    images = load_images(data)
    rows = np.random.default_rng(trial.seed).permutation(len(images.y))[:n_train]
    x = torch.from_numpy(images.x[rows]).flatten(1).to(trial.device)
    codes = np.unique(images.y[rows], return_inverse=True)[1]
    y = torch.from_numpy(codes.astype(np.int64)).to(trial.device)
    with seeded(trial.seed):
        body = nn.Sequential(
            nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width)
        ).to(trial.device)
        head = nn.Linear(width, int(codes.max()) + 1).to(trial.device)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=lr)
    order, seen = torch.Generator().manual_seed(trial.seed), []
    marks = sorted({round(epochs * 10 ** (k / 10 - 1)) for k in range(11)})
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(y), generator=order).split(64):
            if len(batch) > 1:  # a single image has no variance
                optimizer.zero_grad()
                F.cross_entropy(head(body(x[batch])), y[batch]).backward()
                optimizer.step()
        if epoch in marks:
            with torch.no_grad():
                found = neural_collapse(body.eval()(x), y, head.weight)
            body.train()
            seen.append((np.log(epoch), float(found["nc1"].log())))
            for name, value in found.items():
                trial.track(name, epoch, float(value))
    return float(np.polyfit(*zip(*seen, strict=True), 1)[0])
