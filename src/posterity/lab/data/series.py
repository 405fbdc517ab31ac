"""Time series: a table of numbers, rows in order of time, one column a variable."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy.signal import lfilter

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data.frames import READING, read_frame
from posterity.lab.data.needs import require_rows

__all__ = ["Series", "SeriesData", "load_series"]

Series = Annotated[str, Kind("series", (".csv", ".parquet", ".txt", ".gz"))]

CLOCK = r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?"


@dataclass(frozen=True)
class SeriesData:
    """A multivariate series.

    Attributes
    ----------
    values : ndarray of shape (time, variables), float64
        NaN where nothing was observed.
    columns : tuple of str
    note : str
        What was read and what was done to it.
    """

    values: ndarray
    columns: tuple[str, ...]
    note: str = ""


def load_series(data: str, *, seed: int = 0) -> SeriesData:
    """Return the series of a name or file; a column of dates orders the rows.

    Parameters
    ----------
    data : str
        A registered name, or a CSV or Parquet file: wide (a column a variable), or long
        with the columns ``time``, ``variable`` and ``value``.
    seed : int, default=0
        For generated series.

    Returns
    -------
    SeriesData
    """
    return load(Series, data, seed=seed)


def read_series(source: Source) -> SeriesData:
    """Return the series in a file, its rows in order of time."""
    (path,), options = source.paths, source.option({**READING, "time": None})
    names = ("time", "variable", "value", *filter(None, [options.get("time")]))
    frame, note = read_frame(path, wanted=names, options={k: v for k, v in options.items() if k != "time"})
    lower = {str(name).lower(): name for name in frame}
    if {"time", "variable", "value"} <= set(lower) and len(frame.columns) == 3:
        frame = _wide(frame.rename(columns={old: new for new, old in lower.items()}), path.name)
    done: list[str] = []
    frame = _in_order(frame, options.get("time"), path.name, done)
    for name in [name for name in frame if frame[name].dtype.kind not in "iufb"]:
        frame = frame.drop(columns=name)
        done.append(f"text column {name!r} left out")
    if frame.empty or not len(frame.columns):
        raise ValueError(f"{path.name}: no column of numbers")
    values = frame.to_numpy(dtype=np.float64)
    if infinite := np.argwhere(np.isinf(values)).tolist():
        raise ValueError(
            f"{path.name}: row {infinite[0][0] + 1}, column {frame.columns[infinite[0][1]]!r} is infinite"
        )
    if empty := [str(name) for name, gone in zip(frame, np.isnan(values).all(0), strict=True) if gone]:
        raise ValueError(f"{path.name}: column {empty[0]!r} has no observed value")
    return SeriesData(values, tuple(map(str, frame)), "; ".join([note, *done]))


def require_series(series: SeriesData) -> None:
    """Refuse a series in which nothing happens."""
    require_rows(len(series.values), "rows (steps of time)")
    low, high = np.nanmin(series.values, axis=0), np.nanmax(series.values, axis=0)
    if (low == high).all():
        raise ValueError("no column of it varies")


def _wide(long: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a column a variable and a row a time."""
    missing = long[["time", "variable"]].isna().to_numpy().any(axis=1)
    if missing.any():
        raise ValueError(f"{name}: row {int(np.flatnonzero(missing)[0]) + 1} lacks its time or variable")
    twice = np.asarray(long.duplicated(["time", "variable"]))
    if twice.any():
        row = long[twice].iloc[0]
        raise ValueError(f"{name}: {row['variable']} at {row['time']} appears twice")
    frame = long.pivot(index="time", columns="variable", values="value").reset_index()
    frame.columns = [str(column) for column in frame.columns]
    return frame if frame["time"].dtype.kind == "M" else frame.drop(columns="time")


def _in_order(frame: pd.DataFrame, given: str | None, name: str, done: list[str]) -> pd.DataFrame:
    """Return the rows in order of their time, without its columns."""
    if given is not None and given not in frame:
        raise ValueError(f"{name}: time must be one of {', '.join(map(str, frame))}, got {given!r}")
    dates = [column for column in frame if frame[column].dtype.kind == "M"]
    clocks = [
        column
        for column in frame
        if frame[column].dtype.kind == "O" and frame[column].astype(str).str.fullmatch(CLOCK).all()
    ]
    if given is not None:
        dates, clocks = [given], [column for column in clocks if given in dates and column != given]
    if len(dates) > 1 or len(clocks) > 1:
        first, second = (dates if len(dates) > 1 else clocks)[:2]
        raise ValueError(
            f"{name}: {first!r} or {second!r} may order the rows: say time={first} or time={second}"
        )
    if not dates:
        if clocks:
            raise ValueError(f"{name}: {clocks[0]!r} is a time of day without a day: leave it out")
        return frame
    when = frame[dates[0]]
    if np.asarray(when.isna()).any():
        raise ValueError(
            f"{name}: column {dates[0]!r} has no time in row {int(np.flatnonzero(when.isna())[0]) + 1}"
        )
    if clocks and bool((when == when.dt.normalize()).all()):
        clock = frame[clocks[0]].where(frame[clocks[0]].str.count(":") == 2, frame[clocks[0]] + ":00")
        when = when + pd.to_timedelta(clock)
        frame = frame.drop(columns=clocks[0])
    said = " and ".join(map(repr, [*dates, *clocks]))
    if not when.is_monotonic_increasing:
        frame = frame.iloc[np.argsort(when.to_numpy(), kind="stable")]
        done.append(f"ordered by {said}")
    if repeated := int(when.duplicated().sum()):
        done.append(f"{repeated:,} times of {said} appear again")
    return frame.drop(columns=dates[0])


@dataset(Series, "two-rhythms")
def two_rhythms(seed: int) -> SeriesData:
    """Return 6,000 hours of seven variables with a daily and a weekly rhythm.

    Each has a daily profile of its own, whose strength drifts slowly and differs by the
    day of the week; a weekly level; noise that decays by 0.9 an hour; and white noise.
    """
    rng, hours, c = np.random.default_rng(seed), np.arange(6_000), 7
    rough = rng.normal(size=(24, c))
    profile = (np.roll(rough, 1, axis=0) + 2 * rough + np.roll(rough, -1, axis=0)) / 4
    profile = (profile - profile.mean(0)) / profile.std(0)
    weekday = rng.uniform(0.4, 1.6, size=(7, c))
    phase = rng.random((2, c))
    drift = np.exp(0.4 * np.sin(2 * np.pi * (hours[:, None] / 1_500 + phase[0])))
    level = 0.5 * np.sin(2 * np.pi * (hours[:, None] / 168 + phase[1]))
    lasting = lfilter([0.2], [1, -0.9], rng.normal(size=(len(hours), c)), axis=0)
    values = profile[hours % 24] * weekday[hours // 24 % 7] * drift + level + lasting
    values += 0.1 * rng.normal(size=values.shape)
    return SeriesData(values, tuple(f"x{k}" for k in range(c)))
