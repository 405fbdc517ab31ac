"""Time series: a table of numbers, rows in order of time, one column a variable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from numpy import ndarray

from posterity.lab.data import Kind, fetch, resolve
from posterity.lab.data.table import read_frame

__all__ = ["Series", "SeriesData", "load_series"]

Series = Annotated[str, Kind("series", (".csv", ".parquet", ".txt", ".gz"))]


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
    found = resolve(Series, data)
    if callable(found):
        return found(seed)
    return _read(found if isinstance(found, Path) else fetch(found)[0])


def _read(path: Path) -> SeriesData:
    frame, note = read_frame(path)
    lower = {str(name).lower(): name for name in frame}
    if {"time", "variable", "value"} <= set(lower) and len(frame.columns) == 3:
        long = frame.set_axis([str(name).lower() for name in frame], axis=1)
        if long.duplicated(["time", "variable"]).any():
            row = long[long.duplicated(["time", "variable"])].iloc[0]
            raise ValueError(f"{path.name}: {row['variable']} at {row['time']} appears twice")
        frame = long.pivot(index="time", columns="variable", values="value").reset_index()
    done = []
    for name in list(frame):
        column = frame[name]
        if column.dtype.kind in "iufb":
            continue
        try:
            when = pd.to_datetime(column, errors="raise", format="mixed")
        except (ValueError, TypeError):
            frame = frame.drop(columns=name)
            done.append(f"text column {name!r} left out")
            continue
        if not when.is_monotonic_increasing:
            frame = frame.iloc[np.argsort(when.to_numpy(), kind="stable")]
            done.append(f"ordered by {name!r}")
        frame = frame.drop(columns=name)
    if frame.empty or not len(frame.columns):
        raise ValueError(f"{path.name}: no column of numbers")
    values = frame.to_numpy(dtype=np.float64)
    if infinite := np.argwhere(np.isinf(values)).tolist():
        raise ValueError(
            f"{path.name}: row {infinite[0][0] + 1}, column {frame.columns[infinite[0][1]]!r} is infinite"
        )
    if empty := [str(name) for name, gone in zip(frame, np.isnan(values).all(0), strict=True) if gone]:
        raise ValueError(f"{path.name}: column {empty[0]!r} has no observed value")
    note = "; ".join([note, *done])
    return SeriesData(values, tuple(map(str, frame)), note)
