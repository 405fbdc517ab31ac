"""Forecasts: train is a standardised series (time, c), predict maps (n, 96, c) to (n, 24, c)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV

from posterity.lab.data import Series, SeriesData, load_series
from posterity.lab.data.needs import require_rows
from posterity.lab.tasks import Task, entry

__all__ = ["HISTORY", "HORIZON"]

HISTORY, HORIZON = 96, 24  # in steps

Predict = Callable[[Any], Any]


def long_enough(data: SeriesData) -> None:
    """Refuse a series whose last fifth holds no window and what follows it."""
    require_rows(len(data.values), f"rows ({HISTORY} + {HORIZON} in the last fifth)", 5 * (HISTORY + HORIZON))


def series_parts(data: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 80 % and the rest, filled forward and standardised by the first."""
    values = load_series(data, seed=seed).values.copy()
    for column in values.T:
        known = np.flatnonzero(~np.isnan(column))
        column[:] = column[
            known[np.clip(np.searchsorted(known, np.arange(len(column)), "right") - 1, 0, None)]
        ]
    cut = round(0.8 * len(values))
    mean, scale = values[:cut].mean(0), values[:cut].std(0)
    values = (values - mean) / np.where(scale > 0, scale, 1)
    return values[:cut], values[cut:]


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    train, test = series_parts(data, seed)
    windows = np.lib.stride_tricks.sliding_window_view(test, HISTORY + HORIZON, axis=0).swapaxes(1, 2)
    windows = windows[np.linspace(0, len(windows) - 1, min(len(windows), 200)).astype(int)]
    forecast = np.asarray(fit(train, seed)(windows[:, :HISTORY].copy()))
    return float(np.mean((forecast - windows[:, HISTORY:]) ** 2))


TASK = Task(
    "forecasting",
    Series,
    "mean squared error, standardised",
    "lower",
    "two-rhythms",
    _score,
    needs=long_enough,
)


@entry("forecasting", "repeat the last day")
def repeat_last(train: Any, seed: int) -> Predict:
    """Return the last 24 steps again."""
    return lambda x: x[:, -HORIZON:]


@entry("forecasting", "ridge")
def ridge_forecast(train: Any, seed: int) -> Predict:
    """Return a linear map from each variable's history, less its last value, to its future."""
    windows = np.lib.stride_tricks.sliding_window_view(train, HISTORY + HORIZON, axis=0)
    windows = windows[:: max(1, len(windows) // 4000)].reshape(-1, HISTORY + HORIZON)
    last = windows[:, HISTORY - 1 : HISTORY]
    model = RidgeCV(np.logspace(-2, 4, 7)).fit(windows[:, :HISTORY] - last, windows[:, HISTORY:] - last)

    def predict(x: np.ndarray) -> np.ndarray:
        rows = x.swapaxes(1, 2).reshape(-1, HISTORY)
        future = model.predict(rows - rows[:, -1:]) + rows[:, -1:]
        return future.reshape(len(x), x.shape[2], HORIZON).swapaxes(1, 2)

    return predict
