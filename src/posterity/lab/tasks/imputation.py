"""Gaps: train is a standardised series (time, c), predict fills one that has NaN.

A quarter of the entries is hidden, by one of three patterns: single points; blocks, in which a
variable is gone for twelve steps; sensors, each gone once, for a quarter of the time.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from posterity.lab.data import Series
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.forecasting import long_enough, series_parts

__all__ = ["Pattern", "hide", "season_of"]

HIDDEN = 0.25  # share of entries that are hidden
BLOCK = 12  # steps
LONGEST = 336  # steps of a season: two weeks of hours

Pattern = Literal["points", "blocks", "sensors"]
Predict = Callable[[Any], Any]


def hide(shape: tuple[int, int], pattern: Pattern, seed: int, share: float = HIDDEN) -> np.ndarray:
    """Return which entries of a series are hidden.

    Parameters
    ----------
    shape : tuple of int
        Steps and variables.
    pattern : {"points", "blocks", "sensors"}
        Entries at random; runs of twelve steps of a variable, that begin at random and may
        touch; one run a variable.
    seed : int
    share : float, default=0.25
        Of each variable's entries: in expectation for points and blocks, exactly for sensors.

    Returns
    -------
    ndarray of bool, of this shape
    """
    rng, (n, c) = np.random.default_rng(seed), shape
    if pattern == "points":
        return rng.random(shape) < share
    if pattern == "sensors":
        length = round(share * n)
        since = np.arange(n)[:, None] - rng.integers(n - length + 1, size=c)
        return (since >= 0) & (since < length)
    begins = rng.random((n + BLOCK - 1, c)) < 1 - (1 - share) ** (1 / BLOCK)
    return np.lib.stride_tricks.sliding_window_view(begins, BLOCK, axis=0).any(-1)


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, pattern: Pattern = "points"
) -> float:
    train, test = series_parts(data, seed)
    hidden = hide(test.shape, pattern, seed)
    filled = np.asarray(fit(train, seed)(np.where(hidden, np.nan, test)))
    return float(np.mean((filled - test)[hidden] ** 2))


def _needs(data: Any, **_: Any) -> None:
    long_enough(data)


TASK = Task(
    "imputation", Series, "mean squared error of hidden entries", "lower", "two-rhythms", _score,
    needs=_needs,
)  # fmt: skip


@entry("imputation", "linear interpolation")
def interpolate(train: Any, seed: int) -> Predict:
    """Return straight lines between the observed neighbours in time."""

    def predict(x: np.ndarray) -> np.ndarray:
        filled = x.copy()
        for column in filled.T:
            gone = np.isnan(column)
            if not gone.all():
                column[gone] = np.interp(np.flatnonzero(gone), np.flatnonzero(~gone), column[~gone])
        return np.nan_to_num(filled)

    return predict


@entry("imputation", "seasonal means")
def seasonal_means(train: Any, seed: int) -> Predict:
    """Return each variable's mean at the same place of its season, the lag at which it is most alike."""
    seasons = [season_of(column) for column in train.T]

    def predict(x: np.ndarray) -> np.ndarray:
        filled = x.copy()
        for column, season in zip(filled.T, seasons, strict=True):
            place = np.arange(len(column)) % season
            known = ~np.isnan(column)
            counts = np.bincount(place[known], minlength=season)
            sums = np.bincount(place[known], column[known], minlength=season)
            level = column[known].mean() if known.any() else 0.0
            means = np.where(counts > 0, sums / np.maximum(counts, 1), level)
            column[~known] = means[place[~known]]
        return filled

    return predict


def season_of(column: np.ndarray) -> int:
    """Return the lag of the highest autocorrelation beyond its first fall below 0; 1 if it never falls.

    Parameters
    ----------
    column : ndarray of shape (n,)
        Without gaps.

    Returns
    -------
    int
        In steps, at most 336.
    """
    centred = column - column.mean()
    spectrum = np.abs(np.fft.rfft(centred, 2 * len(centred))) ** 2
    alike = np.fft.irfft(spectrum)[: min(LONGEST, len(centred) // 2) + 1]
    below = np.flatnonzero(alike < 0)
    return int(below[0] + alike[below[0] :].argmax()) if len(below) else 1


@entry("imputation", "ridge on the neighbours")
def ridge_impute(train: Any, seed: int) -> Predict:
    """Return iterated ridge regression on the other variables and four steps around."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    def around(x: np.ndarray) -> np.ndarray:
        moved = [np.roll(x, k, axis=0) for k in (-2, -1, 1, 2)]
        return np.hstack([x, *moved])

    model = IterativeImputer(max_iter=5, random_state=seed, keep_empty_features=True)
    hidden = np.random.default_rng(seed).random(train.shape) < 0.25
    model.fit(around(np.where(hidden, np.nan, train)[-4000:]))
    return lambda x: np.asarray(model.transform(around(x)))[:, : x.shape[1]]
