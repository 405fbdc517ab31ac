"""Claims about finite width: kernels after training explain networks, and variance takes over as data grow."""

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from posterity.claims import Between, Count, Positive, Several, Trial, comparison, trend
from posterity.dynamics import (
    NTKMLP,
    InitializationVariance,
    RegressionEnsemble,
    initialization_variance,
    ntk_regression,
    onset_exponent,
    sphere_polynomial,
    train_ensemble,
    variance_onset,
)
from posterity.lab.data import Table, dataset, load_table, table_encoder
from posterity.lab.data.needs import require_task
from posterity.lab.data.table import TableData
from posterity.lab.metrics import rank_correlation

Dim = Annotated[int, Between(2, 100)]
Degree = Annotated[int, Between(1, 10)]
N_TEST = 500


@dataset(Table, "sphere-quadratic")
def _sphere(seed: int) -> TableData:
    """Return a polynomial of degree 2 on the sphere in six dimensions."""
    x, y = _draw(2_000, 6, 2, seed)
    return TableData(pd.DataFrame(x.numpy(), columns=list("abcdef")), y[:, 0].numpy(), "regression")


def _draw(n: int, dim: int, degree: int, seed: int) -> tuple[Tensor, Tensor]:
    axis = torch.eye(dim, dtype=torch.float64)[0]
    return sphere_polynomial(n, dim, degree, direction=axis, generator=torch.Generator().manual_seed(seed))


def _rows(data: str, target: str | None, n_train: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return training rows on the sphere, their standardised targets, and test rows."""
    table = load_table(data, target=target, task="regression", seed=seed)
    order = np.random.default_rng(seed).permutation(len(table.y))
    train = order[:n_train]
    x = table.X.to_numpy() if all(kind.kind == "f" for kind in table.X.dtypes) else np.zeros((1, 1))
    if not np.allclose(np.linalg.norm(x, axis=1), 1):  # those of the generator are on it
        x = np.asarray(table_encoder().fit(table.X.iloc[train]).transform(table.X), dtype=np.float64)
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    y = (table.y - table.y[train].mean()) / (table.y[train].std() or 1.0)
    _, first = np.unique(x[train], axis=0, return_index=True)  # equal rows have no kernel regression
    train = train[np.sort(first)]
    rows, targets, test = (
        torch.from_numpy(part) for part in (x[train], y[train, None], x[order[n_train:][:N_TEST]])
    )
    return rows, targets, test


def _ensemble(
    trial: Trial, x: Tensor, y: Tensor, x_test: Tensor, *, width: int, alpha: float, n_models: int, n_steps: int,
    tol: float,
) -> RegressionEnsemble:  # fmt: skip
    """Train networks of three weight matrices; those of a trial are its own."""
    return train_ensemble(
        lambda seed: _net(trial, x.shape[1], width, alpha, seed), *(part.to(trial.device) for part in (x, y, x_test)),
        n_models=n_models, n_steps=n_steps, tol=tol,
    )  # fmt: skip


def _net(trial: Trial, dim: int, width: int, alpha: float, seed: int) -> NTKMLP:
    generator = torch.Generator().manual_seed(1_000 * trial.seed + seed)
    return NTKMLP(dim, width, alpha=alpha, generator=generator).double().to(trial.device)


def _parts(
    trial: Trial, dim: int, degree: int, n_train: int, **settings: Any
) -> tuple[RegressionEnsemble, InitializationVariance]:
    """Train on the first points of the trial, and return the networks and their error on the last ones."""
    x, y = _draw(10_000, dim, degree, trial.seed)
    found = _ensemble(trial, x[:n_train], y[:n_train], x[-N_TEST:], **settings)
    return found, initialization_variance(found.predictions, y[-N_TEST:])


def _fits(data: TableData, n_train: int, **_: Any) -> None:
    require_task(data.task, "regression")
    if len(data.y) < n_train + 5:
        raise ValueError(f"n_train must leave at least 5 of {len(data.y)} rows to test on, got {n_train}")


@comparison(
    paper="variance-limited",
    says="Regression with the tangent kernel after training is an accurate model of the network, with that before training it is not.",
    where="Atanasov et al., Section 3",
    arms=("initial NTK", "final NTK"),
    metric="mean square of kernel regression less network on test points, over that of the network",
    better="lower",
    smallest={"width": 16, "n_train": 20, "n_models": 2, "n_steps": 50},
    check=_fits,
)
def final_kernel(
    trial: Trial, data: Table = "sphere-quadratic", target: str | None = None, n_train: Annotated[int, Between(5)] = 80,
    width: Count = 64, alpha: Positive = 1.0, n_models: Several = 8, n_steps: Count = 3_000, tol: Positive = 1e-5,
) -> dict[str, float]:  # fmt: skip
    """Train networks, and regress from zero with each one's kernel at its first and at its last weights.

    Both arms solve the same targets with a ridge of 0. Rows of a table are standardised and brought
    to the sphere. The record has the steps and the training loss: on noisy targets it stays above
    ``tol``, the network does not quite interpolate, and both regressions are farther from it.
    """
    x, y, x_test = _rows(data, target, n_train, trial.seed)
    found = _ensemble(
        trial, x, y, x_test, width=width, alpha=alpha, n_models=n_models, n_steps=n_steps, tol=tol
    )
    trial.record("steps of the slowest network", float(found.n_steps.max()))
    trial.record("training loss, mean", float(found.train_loss.mean()))
    net = _net(trial, x.shape[1], width, alpha, 0)
    distance = {}
    for arm, weights in (("initial NTK", found.params0), ("final NTK", found.params)):
        each = []
        for member, values in enumerate(found.predictions):
            params = {name: p[member] for name, p in weights.items()}
            kernel = ntk_regression(
                net, *(part.to(trial.device) for part in (x, y, x_test)), params=params
            ).cpu()
            each.append(float((kernel - values).square().mean() / values.square().mean()))
        distance[arm] = float(np.mean(each))
    return distance


@trend(
    paper="variance-limited",
    says="As data grow, the variance over initialisations takes over the error of a network of fixed width.",
    where="Atanasov et al., Section 3",
    metric="Spearman correlation of the variance's share of the error with the number of samples",
    low=0.8,
    smallest={"width": 16, "n_models": 2, "n_steps": 10},
)
def takes_over(
    trial: Trial, dim: Dim = 6, degree: Degree = 2, width: Count = 32, alpha: Positive = 1.0, n_models: Several = 8,
    n_steps: Count = 2_000, tol: Positive = 1e-4,
) -> float:  # fmt: skip
    """Train on the first 20, 40, 80 and 160 points of one draw and take the error on the same test points."""
    sizes, share = (20, 40, 80, 160), []
    for n in sizes:
        _, parts = _parts(
            trial, dim, degree, n, width=width, alpha=alpha, n_models=n_models, n_steps=n_steps, tol=tol
        )
        share.append(float(parts.fraction))
        trial.track("share of variance in the error", n, share[-1])
        trial.track("error of a network", n, float(parts.error))
        trial.track("error of an infinite ensemble", n, float(parts.infinite_ensemble_error))
    return rank_correlation(sizes, share)


@comparison(
    paper="variance-limited",
    says="Networks that learn features are limited by variance later than lazy ones.",
    where="Atanasov et al., Sections 3 and 4",
    arms=("lazy", "rich"),
    metric="share of the variance over initialisations in the test error",
    better="lower",
    smallest={"width": 16, "n_train": 10, "n_models": 2, "n_steps": 20},
)
def features_postpone(
    trial: Trial, dim: Dim = 6, degree: Degree = 2, n_train: Count = 80, width: Count = 64, lazy: Positive = 5.0,
    rich: Positive = 0.5, n_models: Several = 8, n_steps: Count = 3_000, tol: Positive = 1e-4,
) -> dict[str, float]:  # fmt: skip
    """Train the same draws of weights at a large and at a small output scale, on the same points."""
    share = {}
    for arm, alpha in (("lazy", lazy), ("rich", rich)):
        found, parts = _parts(
            trial, dim, degree, n_train, width=width, alpha=alpha, n_models=n_models, n_steps=n_steps, tol=tol
        )
        share[arm] = float(parts.fraction)
        trial.record(f"error, {arm}", float(parts.error))
        trial.record(f"training loss, {arm}", float(found.train_loss.mean()))
    return share


@comparison(
    paper="variance-limited",
    says="The average of networks has a lower error than one of them, by their variance.",
    where="Atanasov et al., Section 3",
    arms=("one network", "average of networks"),
    metric="mean squared error on test points, target of mean square 1",
    better="lower",
    smallest={"width": 16, "n_train": 10, "n_models": 2, "n_steps": 20},
)
def ensembles(
    trial: Trial, dim: Dim = 6, degree: Degree = 2, n_train: Count = 80, width: Count = 64, alpha: Positive = 1.0,
    n_models: Several = 8, n_steps: Count = 3_000, tol: Positive = 1e-4,
) -> dict[str, float]:  # fmt: skip
    """Train networks on the same points; the error of one is the mean over all of them.

    That the average is no worse is certain, by how much is not. The record has what is left to an
    infinite ensemble.
    """
    settings = {"alpha": alpha, "n_steps": n_steps, "tol": tol}
    _, parts = _parts(trial, dim, degree, n_train, width=width, n_models=n_models, **settings)
    trial.record("error of an infinite ensemble", float(parts.infinite_ensemble_error))
    for size in range(1, n_models + 1):
        trial.track("error over networks averaged", size, float(parts.ensemble(size)))
    return {"one network": float(parts.error), "average of networks": float(parts.ensemble_error)}


def _enough(narrowest: int, n_widths: int, largest: int, **_: Any) -> None:
    if narrowest * 2 ** (n_widths - 1) > 4096:
        raise ValueError(
            f"n_widths must keep the widest network at 4096 or less, got {n_widths} from {narrowest}"
        )
    if largest < 40:
        raise ValueError(f"largest must be at least 40, got {largest}")


@trend(
    paper="variance-limited",
    says="The sample size at which variance is half of the error grows about as the root of the width.",
    where="Atanasov et al., Section 3: the exponent is about 1/2",
    metric="exponent of the onset of variance in width",
    low=0.3,
    high=0.7,
    figure=0.5,
    smallest={"narrowest": 8, "n_widths": 2, "largest": 57, "n_models": 2, "draws": 1},
    check=_enough,
)
def onset(
    trial: Trial, dim: Dim = 6, degree: Degree = 2, narrowest: Annotated[int, Between(4)] = 32,
    n_widths: Annotated[int, Between(2, 8)] = 5, largest: Annotated[int, Between(40)] = 452, alpha: Positive = 1.0,
    n_models: Several = 6, draws: Count = 2, trained: bool = False, n_steps: Count = 3_000, tol: Positive = 1e-4,
) -> float:  # fmt: skip
    """Double the width, and find the onset among sizes from 20 by steps of a root of two, errors averaged over draws.

    By default networks are lazy to the end, which is regression with their initial kernel and costs
    little; ``trained=True`` trains them, at ``alpha``: minutes a trial, and hours at the paper's widths.
    """
    sizes = [round(20 * 2 ** (k / 2)) for k in range(40) if 20 * 2 ** (k / 2) <= largest]
    widths = [narrowest * 2**k for k in range(n_widths)]
    sets = [_draw(largest + N_TEST, dim, degree, 1_000 * trial.seed + k) for k in range(draws)]
    onsets = []
    for width in widths:
        nets = [_net(trial, dim, width, alpha, member) for member in range(n_models)]
        share = []
        for n in sizes:
            error = variance = 0.0
            for x, y in sets:
                if trained:
                    given = {
                        "width": width,
                        "alpha": alpha,
                        "n_models": n_models,
                        "n_steps": n_steps,
                        "tol": tol,
                    }
                    values = _ensemble(trial, x[:n], y[:n], x[-N_TEST:], **given).predictions
                else:
                    x, y = x.to(trial.device), y.to(trial.device)
                    values = torch.stack([ntk_regression(net, x[:n], y[:n], x[-N_TEST:]) for net in nets])
                parts = initialization_variance(values, y[-N_TEST:].to(values.device))
                error, variance = error + float(parts.error), variance + float(parts.variance)
            share.append(min(1.0, variance / error))
            trial.track(f"share of variance: width {width}", n, share[-1])
        onsets.append(variance_onset(sizes, share))
        trial.track("onset over width", width, onsets[-1])
    if np.isfinite(onsets).sum() < 2:
        raise ValueError(
            f"largest must be more than {largest}: the share of variance was below half at all but one width"
        )
    return onset_exponent(widths, onsets).exponent
