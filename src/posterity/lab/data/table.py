"""Tables: a user's CSV or Parquet file, or a known set, as features and a target."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn import datasets
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data.frames import READING, read_frame
from posterity.lab.data.needs import require_classes, require_rows

__all__ = ["Table", "TableData", "load_table", "table_encoder"]

Table = Annotated[str, Kind("table", (".csv", ".tsv", ".data", ".parquet"))]


@dataclass(frozen=True)
class TableData:
    """Features and a target.

    Attributes
    ----------
    X : DataFrame
        Numeric columns as floats, the others as text; missing values as NaN. The index is the
        row in the file, from 0.
    y : ndarray of shape (n,)
        Floats for regression, codes from 0 for classification.
    task : {"regression", "classification"}
    classes : tuple of str
        Names of the codes; empty for regression.
    note : str
        What was read and what was done to it.
    """

    X: pd.DataFrame
    y: ndarray
    task: str
    classes: tuple[str, ...] = ()
    note: str = ""


def load_table(data: str, *, target: str | None = None, task: str | None = None, seed: int = 0) -> TableData:
    """Return the table of a name or file.

    Parameters
    ----------
    data : str
        A registered name, or a CSV, TSV or Parquet file, with options of `read_frame` behind
        it: ``houses.csv?header=no&decimal=,``.
    target : str, optional
        The column to predict: its name, or for a file without a header its number, from
        0 or from -1 backwards. A known set has its own.
    task : {"regression", "classification"}, optional
        What the target must serve; by default text and targets of at most 20 whole
        values are classes.
    seed : int, default=0
        For generated tables.

    Returns
    -------
    TableData

    Raises
    ------
    ValueError
        If file, column or row is not what it must be; the message names it.
    """
    table: TableData = load(Table, data, seed=seed, target=target)
    if table.task and target is not None and target != "target":  # of a set that is made or ships
        table = _pick(table.X.assign(target=table.y), target, data, table.note)
    return as_task(table, task)


def read_table(source: Source, *, target: str | None = None) -> TableData:
    """Return the table in a file, or in the files of a public set, its task still open.

    Parameters
    ----------
    source : Source
    target : str, optional
        As `load_table` takes it.

    Returns
    -------
    TableData
    """
    options, facts = source.option(READING), source.facts
    wanted = [] if target is None else [target]
    parts = [read_frame(path, facts.get("columns"), wanted=wanted, options=options) for path in source.paths]
    frame = pd.concat([frame for frame, _ in parts], ignore_index=True)
    if mark := facts.get("strip"):  # Adult's test part ends its target with a stop
        frame[facts["target"]] = frame[facts["target"]].str.rstrip(mark)
    return _pick(frame, target or facts.get("target"), source.name, parts[0][1])


def require_table(table: TableData) -> None:
    """Refuse a table from which nothing can be learned."""
    require_rows(len(table.y), "rows with a target")
    if not table.X.notna().to_numpy().any():
        raise ValueError("no column beside the target has a value")
    if table.classes:
        require_classes(table.y, table.classes, "rows")
    elif np.ptp(table.y) == 0:
        raise ValueError(f"the target is always {table.y[0]:g}")


def table_encoder() -> Any:
    """Return the ordinary preparation of mixed columns, fitted on training rows only.

    Returns
    -------
    ColumnTransformer
        Numbers: median for what is missing, then standardised. Categories: the most
        frequent, then one column each (the 20 commonest).
    """
    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    categories = make_pipeline(
        SimpleImputer(strategy="most_frequent", keep_empty_features=True),
        OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=20, sparse_output=False),
    )
    return make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        (categories, make_column_selector(dtype_exclude="number")),
    )


def _pick(frame: pd.DataFrame, target: str | None, name: str, note: str) -> TableData:
    columns = list(frame.columns)
    if target is None:
        raise ValueError(f"{name}: say which column is the target: {', '.join(columns)}")
    numbered = columns == [str(k) for k in range(len(columns))]
    if (
        target not in columns
        and numbered
        and target.lstrip("-").isdigit()
        and -len(columns) <= int(target) < 0
    ):
        target = columns[int(target)]
    if target not in columns:
        raise ValueError(f"{name}: target must be one of {', '.join(columns)}, got {target!r}")
    if frame.shape[1] < 2:
        raise ValueError(f"{name}: nothing is left to predict {target!r} from")
    if len(unknown := np.flatnonzero(np.isinf(pd.to_numeric(frame[target], errors="coerce")))):
        raise ValueError(f"{name}: target {target!r} is infinite in row {unknown[0] + 1}")
    known = frame[target].notna()
    if not known.to_numpy().any():
        raise ValueError(f"{name}: target {target!r} has no value in any row")
    if dropped := int((~known).sum()):
        note += f"; {dropped:,} rows without a target left out"
    frame = pd.DataFrame(frame[known])
    X = frame.drop(columns=target)
    for column in X:
        if X[column].dtype.kind == "M":
            X[column] = (X[column] - pd.Timestamp(0)) / pd.Timedelta(days=1)
            note += f"; dates of {column!r} as days"
        elif X[column].dtype.kind in "iufb":
            X[column] = X[column].astype(float)
            if np.isinf(X[column]).any():
                row = int(np.flatnonzero(np.isinf(X[column]))[0]) + 1
                raise ValueError(f"{name}: column {column!r} is infinite in row {row}")
    return TableData(X, frame[target].to_numpy(), "", note=f"{note}; target {target!r}")


def as_task(table: TableData, task: str | None) -> TableData:
    """Return a table whose target serves a task, by default the one that its values look like."""
    if table.task and task in (None, table.task):
        return table
    y = table.y
    text = y.dtype.kind not in "iuf"
    values = np.unique(y.astype(str) if text else y)
    if task is None:
        whole = not text and bool(np.all(values == np.round(values.astype(float))))
        task = "classification" if text or (whole and len(values) <= 20) else "regression"
    if task == "regression":
        if text:
            raise ValueError(f"{table.note}: regression needs a target of numbers, got {str(values[0])!r}")
        return replace(table, y=y.astype(float), task=task, classes=())
    if len(values) < 2:
        raise ValueError(
            f"{table.note}: classification needs two classes, the target is always {str(values[0])!r}"
        )
    if len(values) > max(20, len(y) // 2):
        raise ValueError(f"{table.note}: {len(values)} different values in {len(y)} rows are no classes")
    codes = np.searchsorted(values, y.astype(str) if text else y)
    return replace(table, y=codes.astype(np.int64), task=task, classes=tuple(map(str, values)))


@dataset(Table, "long-tailed")
def long_tailed(seed: int, n: int = 22_000, d: int = 10) -> TableData:
    """Return log-normal features of units that differ, and a line with noise of half its spread."""
    rng = np.random.default_rng(seed)
    X = rng.lognormal(size=(n, d)) * rng.lognormal(sigma=2.0, size=d)
    line = X @ (rng.normal(size=d) / X.std(0))
    y = line + 0.5 * line.std() * rng.normal(size=n)
    return TableData(pd.DataFrame(X, columns=[f"x{k}" for k in range(d)]), y, "regression")


def _bundled(load: Any, task: str) -> Any:
    def make(seed: int) -> TableData:
        bunch = load(as_frame=True)
        y = bunch.target.to_numpy()
        classes = tuple(map(str, bunch.target_names)) if task == "classification" else ()
        y = y.astype(np.int64 if classes else float)
        return TableData(bunch.data.astype(float), y, task, classes)

    return make


for _name, _load, _task in (
    ("diabetes", datasets.load_diabetes, "regression"),
    ("wine", datasets.load_wine, "classification"),
    ("breast-cancer", datasets.load_breast_cancer, "classification"),
    ("iris", datasets.load_iris, "classification"),
    ("digits", datasets.load_digits, "classification"),
):
    dataset(Table, _name)(_bundled(_load, _task))
