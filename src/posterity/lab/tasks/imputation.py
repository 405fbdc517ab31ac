"""Gaps: train is a standardised series (time, c), predict fills one that has NaN."""

from collections.abc import Callable
from typing import Any

import numpy as np

from posterity.lab.data import Series
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.forecasting import long_enough, series_parts

__all__: list[str] = []

HIDDEN = 0.25  # share of entries that are hidden

Predict = Callable[[Any], Any]


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    train, test = series_parts(data, seed)
    hidden = np.random.default_rng(seed).random(test.shape) < HIDDEN
    filled = np.asarray(fit(train, seed)(np.where(hidden, np.nan, test)))
    return float(np.mean((filled - test)[hidden] ** 2))


TASK = Task(
    "imputation", Series, "mean squared error of hidden entries", "lower", "two-rhythms", _score,
    needs=long_enough,
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
