"""Tables: a user's CSV or Parquet file, or a known set, as features and a target."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn import datasets
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from posterity.lab.data import Kind, dataset, fetch, public_sets, resolve

__all__ = ["Table", "TableData", "load_table", "read_frame", "table_encoder"]

Table = Annotated[str, Kind("table", (".csv", ".tsv", ".data", ".parquet"))]

MISSING = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "."]


@dataclass(frozen=True)
class TableData:
    """Features and a target.

    Attributes
    ----------
    X : DataFrame
        Numeric columns as floats, the others as text; missing values as NaN.
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
        A registered name, or a CSV, TSV or Parquet file.
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
    found = resolve(Table, data)
    if callable(found):
        table: TableData = found(seed)
        if target is not None and target != "target":
            table = _retarget(table, target, data)
    elif isinstance(found, Path):
        frame, note = read_frame(found)
        table = _pick(frame, target, found.name, note)
    else:
        facts = public_sets()[found]
        parts = [read_frame(path, columns=facts.get("columns")) for path in fetch(found)]
        frame = pd.concat([frame for frame, _ in parts], ignore_index=True)
        if mark := facts.get("strip"):  # Adult's test part ends its target with a stop
            frame[facts["target"]] = frame[facts["target"]].str.rstrip(mark)
        table = _pick(frame, target or facts["target"], found, parts[0][1])
    return _as_task(table, task)


def read_frame(path: Path, columns: list[str] | None = None) -> tuple[pd.DataFrame, str]:
    """Return a file as a frame and one line that says what was found in it.

    The separator is detected, a header recognised, an index column dropped, and the
    usual marks of a missing value read as NaN.

    Parameters
    ----------
    path : Path
        CSV (possibly gzipped) or Parquet.
    columns : list of str, optional
        Names for a file that is known to have no header.

    Returns
    -------
    tuple of DataFrame and str
    """
    done = []
    if path.suffix == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except ImportError as error:
            raise ValueError(
                f'{path.name}: Parquet needs pyarrow: pip install "posterity[tables]"'
            ) from error
        except Exception as error:
            raise ValueError(f"{path.name} is not a Parquet file") from error
    else:
        options, header = _layout(path)
        if columns:
            header = None
        try:
            frame = pd.read_csv(
                path, header=header, na_values=MISSING, keep_default_na=True, skipinitialspace=True, **options
            )
        except pd.errors.ParserError as error:
            raise ValueError(f"{path.name}: {str(error).strip().splitlines()[-1]}") from error
        if options["sep"] != ",":
            done.append(f"separator {options['sep']!r}")
        if header is None:
            frame.columns = columns or [str(k) for k in range(frame.shape[1])]
            if not columns:
                done.append("no header, columns are numbered from 0")
        if repeated := [str(name) for name in frame.columns[frame.columns.duplicated()]]:
            raise ValueError(f"{path.name}: column {repeated[0]!r} appears twice")
    if frame.empty:
        raise ValueError(f"{path.name} has no rows")
    frame.columns = [str(name) for name in frame.columns]
    first = frame.columns[0]
    if first.lower() in ("unnamed: 0", "index", "id", "no", "") and len(frame) > 1:
        steps = pd.to_numeric(frame[first], errors="coerce").diff().iloc[1:]
        if (steps == 1).all():
            frame = frame.drop(columns=first)
            done.append(f"index column {first!r} left out")
    for name in frame:
        column = frame[name]
        if column.dtype.kind not in "iufbM":
            frame[name] = column.astype(object).where(column.notna(), np.nan)
            frame[name] = frame[name].map(lambda cell: cell.strip() if isinstance(cell, str) else cell)
    gone = int(frame.isna().to_numpy().sum())
    text = sum(frame[name].dtype.kind not in "iufbM" for name in frame)
    counts = f"{len(frame):,} rows, {frame.shape[1] - text} numeric and {text} categorical columns"
    if gone:
        done.append(f"{gone:,} missing values")
    return frame, "; ".join([f"{path.name}: {counts}", *done])


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


def _layout(path: Path) -> tuple[dict[str, Any], int | None]:
    """Return pandas' options and 0 or None for the header, from the first lines."""
    import gzip

    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            head = [line for line in (file.readline() for _ in range(50)) if line.strip()]
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        encoding = "latin-1"
        with opener(path, "rt", encoding=encoding, newline="") as file:
            head = [line for line in (file.readline() for _ in range(50)) if line.strip()]
    if not head:
        raise ValueError(f"{path.name} is empty")
    if "\0" in "".join(head):
        raise ValueError(f"{path.name} is not a text table")
    counts = {mark: [len(next(csv.reader([line], delimiter=mark))) for line in head] for mark in ",;\t|"}
    regular = {mark: n[0] for mark, n in counts.items() if n[0] > 1 and len(set(n)) == 1}
    sep = max(regular, key=lambda mark: regular[mark]) if regular else ","
    rows = list(csv.reader(head, delimiter=sep, skipinitialspace=True))

    def number(cell: str) -> bool:
        try:
            float(cell)
        except ValueError:
            return cell.strip() in MISSING[1:]
        return True

    first, rest = rows[0], rows[1:]
    named = not any(number(cell) for cell in first) and len(set(first)) == len(first)
    below = [{row[k] for row in rest if k < len(row)} for k in range(len(first))]
    told = any(cells and all(map(number, cells)) for cells in below)  # names above numbers
    unseen = all(cell not in cells for cell, cells in zip(first, below, strict=True))
    options = {"sep": sep, "encoding": encoding, "low_memory": False}
    if sep == ";" and any("," in cell for row in rest for cell in row):
        options["decimal"] = ","
    return options, 0 if named and (told or unseen) else None


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
    known = frame[target].notna()
    if dropped := int((~known).sum()):
        note += f"; {dropped:,} rows without a target left out"
    frame = pd.DataFrame(frame[known]).reset_index(drop=True)
    X = frame.drop(columns=target)
    for column in X:
        if X[column].dtype.kind == "M":
            X[column] = X[column].astype("int64") / 8.64e13
            note += f"; dates of {column!r} as days"
        elif X[column].dtype.kind in "iufb":
            X[column] = X[column].astype(float)
            if np.isinf(X[column]).any():
                row = int(np.flatnonzero(np.isinf(X[column]))[0]) + 1
                raise ValueError(f"{name}: column {column!r} is infinite in row {row}")
    return TableData(X, frame[target].to_numpy(), "", note=f"{note}; target {target!r}")


def _retarget(table: TableData, target: str, name: str) -> TableData:
    return _pick(table.X.assign(target=table.y), target, name, table.note)


def _as_task(table: TableData, task: str | None) -> TableData:
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
