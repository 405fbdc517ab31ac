"""Claims about TIDER: time factors with a meaning fill gaps better, and the parts are what they say."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from scipy.signal import lfilter
from torch import Tensor

from posterity.claims import Between, Count, NotNegative, Trial, comparison, trend
from posterity.lab.data import Series, SeriesData, dataset, load_series
from posterity.lab.data.needs import require_rows
from posterity.lab.tasks import entry
from posterity.lab.tasks.imputation import Pattern, hide, interpolate, season_of
from posterity.lab.timing import relative_growth
from posterity.timeseries import TIDER, TiderFactors
from posterity.timeseries.tider import train_factors

LONGEST = 1_440  # steps that are filled: sixty days of hours


def made(seed: int, *, weekly: float = 1.0, walk: float = 0.7) -> tuple[ndarray, ndarray, ndarray]:
    """Return sensors (504 hours, 40), their daily parts and, (504, 1), what disturbs all of them alike.

    ``weekly`` is the strength of a rhythm of 168 hours, ``walk`` the mean loading of a random walk.
    """
    rng, t, channels = np.random.default_rng(seed), np.arange(504)[:, None], 40
    rhythms = np.cos(2 * np.pi * (t / np.array([24, 12, 8, 168]) + rng.random(4)))
    wander = rng.normal(size=(len(t), 1)).cumsum(axis=0)
    wander = 1.5 * (wander - wander.mean()) / wander.std()
    loadings = rng.normal(0, 0.5, size=(5, channels)) + np.array([0.7, 0.7, 0.7, 0.7, walk])[:, None]
    shared = lfilter([0.25], [1, -0.9], rng.normal(size=(len(t), 1)), axis=0)
    daily = rhythms[:, :3] @ loadings[:3]
    slow = weekly * rhythms[:, 3:] @ loadings[3:4] + wander @ loadings[4:]
    return daily + slow + shared + 0.4 * rng.normal(size=daily.shape), daily, shared


@dataset(Series, "sensors")
def sensors(seed: int) -> SeriesData:
    """Return 504 hours of 40 sensors: a daily and a weekly rhythm and a random walk, mixed for each
    by random loadings; a disturbance that all share and that decays by 0.9 an hour; white noise.
    """
    values = made(seed)[0]
    return SeriesData(values, tuple(f"x{k}" for k in range(values.shape[1])))


class SmoothFactors(TiderFactors):
    """The rival: the same product, loss and smoothness, but one free factor of time."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return V, all of it the trend, and U."""
        return self.trend, self.channel


def _fillable(data: SeriesData, period: float = 24, **_: Any) -> None:
    """Refuse a series too short for its rhythm, or a column of which nothing could be hidden."""
    values = data.values[:LONGEST]
    least = max(20, int(2 * period))
    require_rows(len(values), f"rows (two cycles of {period:g})", least)
    for column, seen in zip(data.columns, np.isfinite(values).sum(0), strict=True):
        if seen < least:
            raise ValueError(
                f"column {column!r} must have {least} values in the first {len(values):,} rows, has {seen}"
            )


@comparison(
    paper="tider",
    says="Time factors split into trend, season and local bias impute better than a free time factor.",
    where="Liu et al., imputation experiments",
    arms=("smooth MF", "TIDER"),
    metric="root mean squared error of hidden entries, in deviations of their channel",
    better="lower",
    smallest={"epochs": 3},
    check=_fillable,
)
def imputation(
    trial: Trial,
    data: Series = "sensors",
    missing_rate: Annotated[float, Between(0.01, 0.9)] = 0.8,
    pattern: Pattern = "points",
    period: Annotated[float, Between(1, above=True)] = 24,
    rank: Count = 10,
    epochs: Count = 400,
) -> dict[str, float]:
    """Fit both factorisations to a table with gaps, and compare what they put there.

    Both start at the same scale and have the same rank, loss, optimiser, epochs and entries
    held out, by which each also chooses its weights: l2 of 0.001 or 0.01, trend of 0.01 or
    0.1. Where little is missing (``missing_rate=0.2``) the neighbours of a gap say what was
    there, and the arms are close; where there is no rhythm (``data="exchange-rate"``) the
    season is of no use and the claim fails. The plain factorisation, without smoothness, and
    straight lines are reported beside. Of a longer series the first 1,440 steps count.
    """
    values = load_series(data, seed=trial.seed).values[:LONGEST]
    there = np.isfinite(values)
    scale = np.nanstd(values, axis=0)
    X = (values - np.nanmean(values, axis=0)) / np.where(scale > 0, scale, 1)
    hidden = there & hide(values.shape, pattern, trial.seed, missing_rate)
    for column, gone in enumerate(hidden.T):  # fewer than two known entries have no deviation
        if (there[:, column] & ~gone).sum() < 2:
            gone[np.flatnonzero(there[:, column])[:2]] = False
    gaps = np.where(hidden | ~there, np.nan, X)

    def error(filled: ndarray) -> float:
        return float(np.sqrt(np.mean((filled - X)[hidden] ** 2)))

    def filled(arm: type[TiderFactors], trends: tuple[float, ...]) -> ndarray:
        settings = [(l2, weight) for l2 in (1e-3, 1e-2) for weight in trends]
        fits = [_fit(arm, gaps, trial, period, rank, epochs, l2, weight) for l2, weight in settings]
        return min(fits, key=lambda fit: fit[0])[1]

    trial.record("linear interpolation", error(interpolate(gaps, trial.seed)(gaps)))
    trial.record("plain MF", error(filled(SmoothFactors, (0.0,))))
    return {
        "smooth MF": error(filled(SmoothFactors, (0.01, 0.1))),
        "TIDER": error(filled(TiderFactors, (0.01, 0.1))),
    }


def _fit(
    arm: type[TiderFactors], gaps: ndarray, trial: Trial, period: float, rank: int, epochs: int, l2: float, weight: float
) -> tuple[float, ndarray]:  # fmt: skip
    """Return the squared error of a tenth of the known entries, held out, and the reconstruction."""
    known = ~np.isnan(gaps)
    held = known & (np.random.default_rng(trial.seed + 1).random(gaps.shape) < 0.1)
    if not held.any():
        held[tuple(np.argwhere(known)[0])] = True
    mean, scale = np.nanmean(gaps, axis=0), np.nanstd(gaps, axis=0)
    scale = np.where(scale > 0, scale, 1)
    model = arm(
        *gaps.shape, rank=rank, period=period, generator=torch.Generator().manual_seed(trial.seed)
    ).to(trial.device)  # fmt: skip
    history, best = train_factors(
        model, _tensor(np.nan_to_num((gaps - mean) / scale), trial).float(), _tensor(known & ~held, trial),
        _tensor(held, trial), penalties={"l2": l2, "ar": 2 * weight * (arm is TiderFactors), "trend": weight},
        lr=0.05, max_epochs=epochs, patience=100, batch_size=None,
        generator=torch.Generator().manual_seed(trial.seed),
    )  # fmt: skip
    with torch.no_grad():
        return float(history[best - 1, 1]), model().cpu().numpy() * scale + mean


def _tensor(x: ndarray, trial: Trial) -> Tensor:
    return torch.as_tensor(x, device=trial.device)


@comparison(
    paper="tider",
    says="The parts mean what they say: the bias is what disturbs all channels, the season is theirs.",
    where="Liu et al., disentanglement experiments",
    arms=("STL on interpolated data", "TIDER"),
    metric="mean correlation of bias and season with the true ones",
    better="higher",
    smallest={"epochs": 3},
)
def recovery(
    trial: Trial,
    missing_rate: Annotated[float, Between(0.01, 0.9)] = 0.8,
    epochs: Count = 400,
    l2: NotNegative = 0.001,
    ar: NotNegative = 0.2,
    smooth: NotNegative = 0.1,
) -> dict[str, float]:
    """Take apart 40 sensors, each with a daily rhythm and a walk of its own size, and a shared disturbance.

    The walk has loadings of either sign: one that moves all channels alike is as much bias as
    trend, and nothing could tell. STL takes each channel apart after straight lines filled
    it, its season the same each day; its bias is the mean over channels of all that is not
    season, which is closer to the disturbance than the mean of its remainders. Where half of
    the entries are known (``missing_rate=0.5``), straight lines suffice and STL is as good.
    """
    X, daily, shared = made(trial.seed, weekly=0, walk=0)
    gaps = np.where(hide(X.shape, "points", trial.seed, missing_rate), np.nan, X)
    model = TIDER(24, l2=l2, ar=ar, trend=smooth, max_epochs=epochs, random_state=trial.seed).fit(gaps)
    trend, season, remainder = _stl(interpolate(gaps, trial.seed)(gaps), 24)
    estimates = {
        "STL on interpolated data": (trend + remainder, season),
        "TIDER": (model.components_.bias, model.components_.seasonal),
    }
    scores = {}
    for arm, (bias, seasonal) in estimates.items():
        alike = np.corrcoef(bias.mean(1), shared[:, 0])[0, 1]
        each = [np.corrcoef(pair)[0, 1] for pair in zip(seasonal.T, daily.T, strict=True)]
        trial.record(f"bias, {arm}", alike)
        trial.record(f"season, {arm}", float(np.mean(each)))
        scores[arm] = float(alike + np.mean(each)) / 2
    return scores


def _stl(X: ndarray, period: int, rounds: int = 5) -> tuple[ndarray, ndarray, ndarray]:
    """Return trend, season and remainder by STL (Cleveland et al. 1990) with a season that does not change."""
    time, trend, season = len(X), np.zeros_like(X), np.zeros_like(X)
    smoother = _loess(time, 3 * period // 2 + 1)
    for _ in range(rounds):
        rough = X - trend
        for phase in range(period):
            season[phase::period] = rough[phase::period].mean(0)
        season -= season[:period].mean(0)
        trend = smoother @ (X - season)
    return trend, season, X - trend - season


def _loess(time: int, width: int) -> ndarray:
    """Return the matrix of local lines, fitted to ``width`` neighbours with tricube weights."""
    matrix, at = np.zeros((time, time)), np.arange(time)
    for t in at:
        near = np.argsort(np.abs(at - t), kind="stable")[:width]
        far = np.abs(near - t)
        root = np.sqrt((1 - (far / (far.max() + 1)) ** 3) ** 3)
        line = np.column_stack([np.ones(len(near)), near - t])
        matrix[t, near] = np.linalg.pinv(root[:, None] * line)[0] * root
    return matrix


@trend(
    paper="tider",
    says="The time of an epoch grows with the length of the series, and no faster.",
    where="Liu et al., scalability experiments",
    metric="exponent, in time steps, of seconds an epoch, where passes over the table have 1",
    low=0.7,
    high=1.2,
    smallest={"largest": 16_000, "channels": 5, "repeats": 1},
    timed=True,
)
def long_series(
    trial: Trial,
    largest: Annotated[int, Between(16_000)] = 64_000,
    channels: Count = 50,
    repeats: Count = 7,
) -> float:
    """Time epochs on 50 channels of 8,000 to 64,000 steps, a quarter of their entries missing."""
    sizes = [n for n in (8_000, 16_000, 32_000, 64_000) if n <= largest]
    return _growth(trial, sizes, [(n, channels) for n in sizes], repeats)


@trend(
    paper="tider",
    says="The time of an epoch grows with the number of channels, and no faster.",
    where="Liu et al., scalability experiments",
    metric="exponent, in channels, of seconds an epoch, where passes over the table have 1",
    low=0.7,
    high=1.2,
    smallest={"largest": 1_600, "steps": 100, "repeats": 1},
    timed=True,
)
def many_channels(
    trial: Trial,
    largest: Annotated[int, Between(1_600)] = 6_400,
    steps: Annotated[int, Between(24)] = 1_000,
    repeats: Count = 7,
) -> float:
    """Time epochs on 1,000 steps of 800 to 6,400 channels, a quarter of their entries missing."""
    sizes = [n for n in (800, 1_600, 3_200, 6_400) if n <= largest]
    return _growth(trial, sizes, [(steps, n) for n in sizes], repeats)


def _growth(trial: Trial, sizes: list[int], shapes: list[tuple[int, int]], repeats: int) -> float:
    works: list[Callable[[], object]] = []
    yardsticks: list[Callable[[], object]] = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(trial.seed)
        X, model = torch.randn(shape, generator=generator), TiderFactors(*shape, generator=generator)
        known = torch.rand(shape, generator=generator) < 0.75
        fixed = {"penalties": {}, "lr": 1e-3, "max_epochs": 4, "patience": 9, "batch_size": None}
        works.append(
            lambda m=model, x=X, k=known, g=generator, f=fixed: train_factors(
                m, x, k, ~k & k, **f, generator=g
            )
        )
        yardsticks.append(lambda x=X: [x.sin().square().sum() for _ in range(8)])
    return 1 + relative_growth(trial, sizes, works, yardsticks, rounds=repeats, name="four epochs")


@entry("imputation", "TIDER", paper="tider")
def impute_entry(train: ndarray, seed: int) -> Callable[[ndarray], ndarray]:
    """Return factors of training part and gaps together, their period the longest season of the first."""
    season = max(season_of(column) for column in train.T)

    def predict(x: ndarray) -> ndarray:
        whole = np.concatenate([train, x])
        model = TIDER(
            season if season > 1 else "auto", n_harmonics=season // 2 + 1, trend=0.03, ar=0.06, random_state=seed
        )  # fmt: skip
        return model.fit_transform(whole)[len(train) :]

    return predict
