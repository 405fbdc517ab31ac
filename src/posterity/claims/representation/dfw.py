"""Claims about DFW: it finds the subspace of unlike tasks, better with more of them, and a new site needs few rows."""

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from sklearn.linear_model import RidgeCV
from torch import Tensor

from posterity.claims import Between, Count, Positive, Several, Trial, comparison, trend
from posterity.lab.data import Table, TableData, dataset, load_images, load_table, table_encoder
from posterity.lab.data.needs import require_task
from posterity.representation import dfw

DX, DY, R = 20, 10, 4  # inputs and outputs of a task, shared directions
LAST = 10  # rounds whose mean distance counts
MEMORY, GAP = 0.7, 10  # of a series: what a step keeps of the one before, and rows after which little is left
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
ARMS = {
    "AMD": (False, False),
    "AMD + split": (True, False),
    "AMD + whitening": (False, True),
    "DFW": (True, True),
}
SITES, SPREAD = 10, 0.5
ALPHAS = np.logspace(-2, 3, 21)  # of every ridge regression, chosen by leaving one out
LEAST = 30  # rows of a site to test on


def _tasks(
    tasks: int, rows: int, skew: float, rng: torch.Generator, series: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, outputs with noise of deviation 1, and the directions that tasks share.

    Heads lie 0.5 about a common one; the deviations of a task's inputs are exp(skew N) along axes of its own.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    phi = torch.linalg.qr(normal(DX, R)).Q.T
    heads = normal(DY, R) + 0.5 * normal(tasks, DY, R)
    axes, scale = torch.linalg.qr(normal(tasks, DX, DX)).Q, (skew * normal(tasks, 1, DX)).exp()
    x = normal(tasks, rows, DX)
    if series:
        for k in range(1, rows):
            x[:, k] = MEMORY * x[:, k - 1] + (1 - MEMORY**2) ** 0.5 * x[:, k]
    x = x * scale @ axes.mT
    return x, x @ phi.T @ heads.mT + normal(tasks, rows, DY), phi


def _error(distances: Tensor | None) -> float:
    assert distances is not None
    return float(distances[-LAST:].mean())


@comparison(
    paper="dfw",
    says="Where inputs are distributed unlike, plain alternating descent at a safe rate does not find the shared subspace; with split and whitening it is found.",
    where="Zhang et al., the experiment on linear regression",
    arms=("AMD", "AMD + split", "AMD + whitening", "DFW"),
    metric="distance of the subspace from the true one, mean of the last 10 rounds",
    better="lower",
    smallest={"rounds": 12, "rows": 60},
)
def unlike_tasks(
    trial: Trial,
    tasks: Several = 25,
    rows: Annotated[int, Between(60)] = 100,
    skew: Annotated[float, Between(0, 2)] = 0.5,
    rounds: Annotated[int, Between(LAST)] = 150,
    series: bool = False,
) -> dict[str, float]:
    """Learn 4 of 20 directions from tasks with 10 outputs, by DFW, without each of its halves, and without both.

    All start alike, and each takes the largest step that is safe by its own curvature, as one who has no truth to
    compare with must. Whitening carries the effect: at this size the bias that the split takes away does not show, and
    halves of the rows cost a little precision. It is an effect of the rate: a whitened step is as long in every
    direction, a gradient's is short where a task's inputs are. The record has AMD at the best of five fixed rates, known
    only afterwards: there it finds the subspace too, and more precisely than DFW, since it weighs directions by how
    well they were seen; at twice or half that rate it may not. With ``skew=0.25`` the four are level.
    ``series=True`` makes the rows of a task a series, and the parts contiguous with a gap.
    """
    x, y, phi = _tasks(tasks, rows, skew, torch.Generator().manual_seed(trial.seed), series)
    errors = {}
    for arm, (debias, whiten) in ARMS.items():
        found = dfw(x, y, R, max_iter=rounds, debias=debias, whiten=whiten, partition="blocks" if series else "shuffle",
                    gap=GAP if series else 0, tol=0, phi_true=phi, random_state=trial.seed)  # fmt: skip
        errors[arm] = _error(found.distances)
        assert found.distances is not None
        for step in range(0, rounds, 5):
            trial.track(arm, step + 1, float(found.distances[step]))
    plain = [dfw(x, y, R, max_iter=rounds, lr=lr, debias=False, whiten=False, tol=0, phi_true=phi, random_state=trial.seed)
             for lr in RATES]  # fmt: skip
    for lr, found in zip(RATES, plain, strict=True):
        trial.track("AMD by its rate", lr, _error(found.distances))
    trial.record("AMD at the best rate", min(_error(found.distances) for found in plain))
    return errors


@trend(
    paper="dfw",
    says="The error falls with the number of tasks as one over its square root.",
    where="Zhang et al., the main theorem: noise over the square root of all rows",
    metric="slope of the logarithm of the distance on that of the number of tasks, 5 to 100",
    low=-0.65,
    high=-0.35,
    smallest={"rounds": 12, "problems": 1},
)
def more_tasks(
    trial: Trial,
    rows: Annotated[int, Between(60)] = 100,
    skew: Annotated[float, Between(0, 2)] = 0.5,
    rounds: Annotated[int, Between(LAST)] = 120,
    problems: Count = 3,
) -> float:
    """Take the geometric mean of the distance over some problems for each number of tasks."""
    sizes, logs = (5, 10, 25, 50, 100), []
    rng = torch.Generator().manual_seed(trial.seed)
    for size in sizes:
        each = []
        for _ in range(problems):
            x, y, phi = _tasks(size, rows, skew, rng)
            found = dfw(x, y, R, max_iter=rounds, phi_true=phi, random_state=trial.seed)
            each.append(np.log(_error(found.distances)))
        logs.append(float(np.mean(each)))
        trial.track("distance by tasks", size, float(np.exp(logs[-1])))
    return float(np.polyfit(np.log(sizes), logs, 1)[0])


@dataset(Table, "digit-sites")
def digit_sites(seed: int) -> TableData:
    """Return scikit-learn's digits dealt out to ten sites: what each records of the right half, and the left half.

    A site sees images at a brightness of its own, exp(0.5 N), and records 32 random mixtures of the pixels of the
    right half, in the columns "right 1" to "right 32", of which the first is the target.
    """
    rng = np.random.default_rng(seed)
    images = load_images("digits").x[:, 0]
    site = rng.permutation(np.arange(len(images)) % SITES)
    left, right = (images[:, :, part].reshape(len(images), -1) for part in (slice(4), slice(4, None)))
    mixing = rng.standard_normal((SITES, right.shape[1], right.shape[1])) / right.shape[1] ** 0.5
    left = left * np.exp(SPREAD * rng.standard_normal((SITES, 1)))[site]
    right = np.einsum("np,npq->nq", right, mixing[site])
    table = pd.DataFrame({f"{name} {k + 1}": half[:, k].astype(float) for name, half in (("left", left), ("right", right))
                          for k in range(half.shape[1])})  # fmt: skip
    table["site"] = [f"site {k + 1}" for k in site]
    return TableData(
        table.drop(columns="right 1"),
        table["right 1"].to_numpy(),
        "regression",
        note="digits, dealt out to ten sites",
    )


def _fits(
    data: TableData,
    site: str,
    n_new: int,
    outputs: str = "",
    standardize: bool = False,
    name: str = "",
    **_: Any,
) -> None:
    require_task(data.task, "regression")
    if site not in data.X.columns:
        raise ValueError(f"site must name a column of {name}: {', '.join(data.X.columns)}; got {site!r}")
    inputs = data.X.drop(columns=site)
    inputs = inputs[[c for c in inputs if not (outputs and c.startswith(outputs))]]
    if not standardize and (
        inputs.select_dtypes(exclude="number").shape[1] or inputs.isna().to_numpy().any()
    ):
        raise ValueError(f"standardize must be true for {name}: some columns are text, or have gaps")
    if not inputs.shape[1]:
        raise ValueError(f"outputs={outputs!r} leaves no column of {name} to predict from")
    counts = data.X[site].value_counts()
    if len(counts) < 3 or counts.iloc[2] < n_new + LEAST:
        raise ValueError(
            f"site must name a column with at least 3 values of {n_new + LEAST} rows or more, {n_new} to learn from and "
            f"{LEAST} to test on; {site!r} has {', '.join(f'{v} {n}' for v, n in counts.iloc[:4].items())}"
        )


def _sites(
    table: TableData, site: str, outputs: str, rows: int, seed: int, least: int, standardize: bool
) -> list[tuple[ndarray, ndarray]]:
    """Return inputs and outputs of each site that has rows enough, in random order."""
    also = [c for c in table.X.columns if c.startswith(outputs)] if outputs else []
    inputs = table.X.drop(columns=[site, *also])
    x = np.asarray(table_encoder().fit_transform(inputs) if standardize else inputs, float)
    y = np.column_stack([table.y, *(table.X[c].fillna(0) for c in also)]).astype(float)
    labels, rng = table.X[site].to_numpy(), np.random.default_rng(seed)
    parts = []
    for label, n in table.X[site].value_counts().items():
        if n >= least:
            own = rng.permutation(np.flatnonzero(labels == label))[:rows]
            parts.append((x[own], y[own]))
    return parts


@comparison(
    paper="dfw",
    says="A new site needs few rows, once the directions that count are known from other sites.",
    where="Zhang et al., the motivation",
    arms=("ridge regression", "AMD", "DFW"),
    metric="R squared on rows of a new site, mean over sites",
    better="higher",
    smallest={"rounds": 2},
    check=_fits,
)
def new_site(
    trial: Trial,
    data: Table = "digit-sites",
    target: str | None = None,
    site: str = "site",
    outputs: str = "right ",
    n_new: Annotated[int, Between(5)] = 20,
    r: Count = 8,
    rows: Annotated[int, Between(50)] = 400,
    rounds: Count = 60,
    ridge: Positive = 1.0,
    standardize: bool = False,
) -> dict[str, float]:
    """Leave out each site in turn, learn a representation from the others, and fit a head to a few of its rows.

    The first arm is ridge regression on the inputs, and the heads are ridge regressions on features, each with a
    penalty that leaving one row out chooses. ``outputs`` begins the names of columns that are outputs beside the
    target. A site is centred before its part in the representation. ``standardize`` is for columns of unlike units,
    of text, or with gaps.
    """
    table = load_table(data, target=target, task="regression", seed=trial.seed)
    parts = _sites(table, site, outputs, rows, trial.seed, n_new + LEAST, standardize)
    centred = [[torch.from_numpy(v - v.mean(0)) for v in part] for part in parts]
    found: dict[str, list[float]] = {"ridge regression": [], "AMD": [], "DFW": []}
    for k, (x, y) in enumerate(parts):
        others = centred[:k] + centred[k + 1 :]
        dims = min(r, x.shape[1], len(others) * y.shape[1])
        maps = {"ridge regression": np.eye(x.shape[1])}
        for arm in ("AMD", "DFW"):
            debias, whiten = ARMS[arm]
            learned = dfw([x for x, _ in others], [y for _, y in others], dims, max_iter=rounds, debias=debias,
                          whiten=whiten, ridge=ridge, random_state=trial.seed)  # fmt: skip
            maps[arm] = learned.phi.T.numpy()
        for arm, phi in maps.items():
            model = RidgeCV(ALPHAS).fit(x[:n_new] @ phi, y[:n_new])
            left = np.square(y[n_new:] - model.predict(x[n_new:] @ phi).reshape(-1, y.shape[1])).sum()
            found[arm].append(float(1 - left / np.square(y[n_new:] - y[n_new:].mean(0)).sum()))
    return {arm: float(np.mean(values)) for arm, values in found.items()}
