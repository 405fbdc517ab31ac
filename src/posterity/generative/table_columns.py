"""Columns of a table as factors of a product: how each is read, encoded and given back as it came."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from posterity._checks import needs
from posterity.generative.finite_sets import Categorical, Grid
from posterity.generative.intervals import Interval

__all__: list[str] = []

MOST_LEVELS = 64  # of an integer column that is a grid


@dataclass
class _Layout:
    """How columns were given, and are given back."""

    names: Any = None  # of a DataFrame
    dtype: Any = None  # of an array
    y: Any = None  # what y is called, where it was given

    def join(self, made: list[ndarray], dtypes: list[Any]) -> Any:
        """Return columns in the form of the table."""
        if self.names is None:
            every = {self.dtype, *dtypes}
            plain = np.result_type(*every) if all(d.kind in "iuf" for d in every) else np.dtype(object)
            table = np.empty((len(made[0]), len(made)), dtype=self.dtype if len(every) == 1 else plain)
            for j, values in enumerate(made):
                table[:, j] = values
            return table
        pd = needs("pandas", "tables")
        frame = pd.concat([pd.Series(v, dtype=d) for v, d in zip(made, dtypes, strict=True)], axis=1)
        frame.columns = self.names if self.y is None else self.names.append(pd.Index([self.y]))
        return frame


@dataclass
class _Column:
    """One column: what it holds, and how that is encoded.

    ``values`` are the categories, the whole numbers of a grid, or the one value there is.
    """

    name: Any
    kind: str
    dtype: Any
    factor: Any = None
    values: Any = None
    low: Any = None
    high: Any = None

    def encode(self, values: list[Any]) -> ndarray:
        """Return columns (n, width) in the domain."""
        if self.kind == "categorical":
            place = {_key(value): k for k, value in enumerate(self.values)}
            return np.eye(len(place))[[place[_key(value)] for value in values]]
        return _scaled(values, self.low, self.high)[:, None]

    def decode(self, block: ndarray) -> ndarray:
        """Return values of members of the domain."""
        if self.kind == "categorical":
            return _objects(self.values)[block.argmax(1)]
        if self.values is not None:
            levels = _scaled(self.values, self.low, self.high)
            return _objects(self.values)[np.abs(block - levels).argmin(1)]
        share = (block[:, 0] + 1) / 2
        if self.kind == "integer":  # in Python's integers, exact for any
            return _objects([self.low + round(float(s) * (self.high - self.low)) for s in share])
        made = np.clip(self.low * (1 - share) + self.high * share, self.low, self.high)
        return np.rint(made) if getattr(self.dtype, "kind", "O") in "iu" else made


def _scaled(values: Sequence[Any], low: Any, high: Any) -> ndarray:
    """Return numbers from low to high on [-1, 1]."""
    if isinstance(low, int):  # exact, however large
        return np.array([2 * ((value - low) / (high - low)) - 1 for value in values])
    most = max(abs(low), abs(high))  # or the range itself may overflow
    return np.clip(2 * (np.array(values) / most - low / most) / (high / most - low / most) - 1, -1, 1)


def _objects(values: Sequence[Any]) -> ndarray:
    """Return a vector of Python objects, tuples and strings among them."""
    made = np.empty(len(values), dtype=object)
    for k, value in enumerate(values):
        made[k] = value
    return made


def _missing(value: Any) -> bool:
    """Return whether a value is None, NaN, NaT, or pandas' NA, which is neither equal to itself nor not."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, float | np.floating) and value != value
    )  # fmt: skip


def _key(value: Any) -> Any:
    """Return what a category is known by: all that is missing is one."""
    return _Column if _missing(value) else value


def _column(name: Any, given: Any, kinds: Callable[[Any, str], str]) -> tuple["_Column", list[Any]]:
    """Return what a column holds, and its values as Python's objects."""
    dtype, series = given.dtype, hasattr(given, "iloc")
    looks = {"i": "integer", "u": "integer", "f": "continuous"}.get(
        getattr(dtype, "kind", "O"), "categorical"
    )
    values = (given.to_numpy(dtype=object) if series else given).tolist()
    if not series and dtype.kind == "O":
        looks = _looks([value for value in values if not _missing(value)])
    if getattr(dtype, "kind", "O") in "mM" or str(dtype).startswith("period"):
        raise ValueError(
            f"column {name!r} must hold numbers, text or categories, got {dtype}: cast it to one"
        )
    kind = kinds(name, looks)
    if kind == "categorical":
        return _classes(name, dtype, values), values
    numbers = [_finite_number(name, value, k, whole=kind == "integer") for k, value in enumerate(values)]
    low, high = min(numbers), max(numbers)
    if low == high:
        return _Column(name, "constant", dtype, values=[low]), numbers
    if kind == "integer":
        levels = sorted(set(numbers))
        scaled = torch.from_numpy(_scaled(levels[: MOST_LEVELS + 1], low, high))
        if len(levels) <= MOST_LEVELS and bool((scaled.diff() > 1e-6).all()):  # apart in float32
            return _Column(name, kind, dtype, Grid(scaled), levels, low, high), numbers
    return _Column(name, kind, dtype, Interval(-1.0, 1.0), None, low, high), numbers


def _finite_number(name: Any, value: Any, row: int, *, whole: bool) -> int | float:
    """Return a number of a column, an integer where it must be whole."""
    what = ""
    if _missing(value):
        what = "NaN, a missing number"
    elif not _real(value):
        what = repr(value)
    elif value == math.inf or value == -math.inf:
        what = "infinity"
    if what:
        raise ValueError(
            f"column {name!r} must hold finite numbers or be named in categorical, got {what}, in row {row}"
        )
    if not whole:
        return float(value)
    if value % 1:
        raise ValueError(f"column {name!r} must hold whole numbers, got {value} in row {row}")
    return int(value)


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _looks(values: list[Any]) -> str:
    """Return what a column of objects looks like."""
    if not values or not all(map(_real, values)):
        return "categorical"
    return "integer" if all(isinstance(value, Integral) for value in values) else "continuous"


def _classes(name: Any, dtype: Any, values: list[Any]) -> _Column:
    """Return a column of categories, in the order in which they are first seen."""
    try:
        found = list({_key(value): value for value in reversed(values)}.values())[::-1]
    except TypeError:
        raise ValueError(f"column {name!r} must hold categories, got {type(values[0]).__name__}") from None
    if len(found) == 1:
        return _Column(name, "constant", dtype, values=found)
    return _Column(name, "categorical", dtype, Categorical(len(found)), found)
