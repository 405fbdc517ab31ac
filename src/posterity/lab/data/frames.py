"""Frames: a text table or Parquet file as named columns of numbers, dates and categories.

Delimiter, header, index and the kinds of columns are decided on the whole file and said in
one line; what can be read in two ways is refused with both readings and the option that
settles it, given after the file: ``houses.csv?header=no&decimal=,``.
"""

import csv
import gzip
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from posterity.lab.data._columns import MISSING, Column, Refusal, settle, survey

__all__ = ["READING", "read_frame"]

READING = {  # options of a text table, and what they may be: None is anything
    "delimiter": None, "decimal": (".", ","), "header": ("yes", "no"), "index": ("yes", "no"),
    "dates": ("day-first", "month-first"), "missing": None, "text": None,
}  # fmt: skip
SAMPLE = 1 << 20  # characters from which the delimiter is taken
INDEX_NAMES = ("", "unnamed: 0", "index", "id", "no", "rownames", "row")
LIKE_A_NUMBER = re.compile(r"[+-]?\d[\d.,' ]*%?|[+-]?[.,]\d+")


def read_frame(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    wanted: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
) -> tuple[pd.DataFrame, str]:
    """Return a file as a frame and one line that says how it was read.

    Parameters
    ----------
    path : Path
        CSV (possibly gzipped) or Parquet.
    columns : sequence of str, optional
        Names for a file that is known to have no header.
    wanted : sequence of str
        Names that the user gave, such as the target's: a first row that holds them is a header.
    options : mapping of str to str, optional
        Of `READING`.

    Returns
    -------
    tuple of DataFrame and str
        Numbers are floats or integers, dates ``datetime64``, categories strings; what is
        missing is NaN or NaT.

    Raises
    ------
    ValueError
        If the file cannot be read, or can be read in two ways.
    """
    options = dict(options or {})
    if path.suffix == ".parquet":
        frame, done = _parquet(path)
    else:
        frame, done = _text(path, columns, wanted, options)
    if frame.empty:
        raise ValueError(f"{path.name} has no rows")
    gone = int(frame.isna().to_numpy().sum())
    text = sum(frame[name].dtype.kind not in "iufbM" for name in frame)
    counts = f"{len(frame):,} rows, {frame.shape[1] - text} numeric and {text} categorical columns"
    if gone:
        done.append(f"{gone:,} missing values")
    return frame, "; ".join([f"{path.name}: {counts}", *done])


def _text(
    path: Path, columns: Sequence[str] | None, wanted: Sequence[str], options: Mapping[str, str]
) -> tuple[pd.DataFrame, list[str]]:
    text, done = _decoded(path)
    sep = {"tab": "\t", "space": r"\s+"}.get(options.get("delimiter", ""), options.get("delimiter"))
    sep = sep or _delimiter(text, wanted, path.name)
    if sep != ",":
        done.append("separated by spaces" if sep == r"\s+" else f"separator {sep!r}")
    cells, labels = _cells(text, sep, path.name, done)
    missing = tuple(each.strip() for each in options.get("missing", "").split(",") if each.strip())
    body = [survey(cells[k].iloc[1:], missing) for k in cells]
    named = columns is None and _has_header(cells, body, labels, wanted, options, path.name)
    if named:
        names = list(labels)
    else:
        body = [survey(cells[k], missing) for k in cells]
        names = list(columns or (str(k) for k in range(len(body))))
        if columns is None:
            done.append("no header, columns are numbered from 0")
        elif len(names) != len(body):
            raise ValueError(f"{path.name}: {len(names)} columns are expected, has {len(body)}")
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise ValueError(f"{path.name}: column {twice[0]!r} appears twice")
    found = dict(zip(names, body, strict=True))
    if columns is None and options.get("index") != "no":
        _without_index(found, named, options.get("index") == "yes", done)
    for name in [name for name in found if not name]:
        found[f"column {names.index(name)}"] = found.pop(name)
    if not found:
        raise ValueError(f"{path.name} has no column beside its index")
    frame, said = settle(found, path.name, options)
    return frame.reset_index(drop=True), [*done, *said]


def _decoded(path: Path) -> tuple[str, list[str]]:
    """Return a file's text, and its encoding where that is not UTF-8."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        raw = file.read()
    done = []
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = raw.decode("utf-16")
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text, done = raw.decode("cp1252", errors="replace"), ["encoding Windows-1252"]
    if not text.strip():
        raise ValueError(f"{path.name} is empty")
    if "\0" in text[:SAMPLE]:
        raise ValueError(f"{path.name} is not a text table")
    return text, done


def _delimiter(text: str, wanted: Sequence[str], name: str) -> str:
    """Return the mark that gives every row as many fields, most of them like numbers."""
    sample = text[:SAMPLE]
    if len(text) > SAMPLE:
        sample = sample[: sample.rfind("\n")]
    scores: dict[str, tuple[float, bool]] = {}
    for mark in ",;\t|":
        rows = [row for row in csv.reader(io.StringIO(sample), delimiter=mark) if row]
        if mark == "," and not wanted and _decimals(rows):
            raise Refusal(
                f"{name}: a comma may separate two columns or be a decimal mark: say delimiter=, or delimiter=;"
            )
        widths = {len(row) for row in rows[1:] or rows}
        if len(widths) == 1 and (width := widths.pop()) > 1 and len(rows[0]) in (width, width - 1):
            fields = [field.strip() for row in rows[1:] or rows for field in row]
            share = sum(map(bool, map(LIKE_A_NUMBER.fullmatch, fields))) / len(fields)
            scores[mark] = share, len(rows[0]) == width
    if not scores:
        rows = [line.split() for line in sample.splitlines() if line.strip()]
        spaced = len({len(row) for row in rows}) == 1 and len(rows[0]) > 1 and not set(sample) & set(',;\t|"')
        return r"\s+" if spaced and all(LIKE_A_NUMBER.match(field) for field in rows[-1]) else ","
    best = max(scores.values())
    likely = [mark for mark, score in scores.items() if score == best]
    if len(likely) > 1:
        raise Refusal(
            f"{name}: {likely[0]!r} or {likely[1]!r} may separate its fields: say delimiter={likely[0]}"
        )
    return likely[0]


def _decimals(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether all rows are two groups of digits, the second always as long."""
    named = not rows or (len(rows[0]) == 2 and not any(map(LIKE_A_NUMBER.fullmatch, rows[0])))
    pairs = rows[1:] if rows and len(rows[0]) == 1 else rows
    if named or not pairs or any(len(row) != 2 for row in pairs):
        return False
    whole = all(re.fullmatch(r"[+-]?\d{1,3}([ .]?\d{3})*", row[0]) and row[1].isdigit() for row in pairs)
    return whole and len({len(row[1]) for row in pairs}) == 1


def _cells(text: str, sep: str, name: str, done: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return every field as text, the first row among them, and the names that it may hold.

    Rows of other widths are refused; but a first row may lack the name of a column of row
    names, as R writes it, and a delimiter that ends each row is no column.
    """
    widths = _widths(text, sep, name)
    width = int(np.bincount(widths).argmax())
    wrong = np.flatnonzero(widths != width)
    nameless = len(widths) > 1 and wrong.tolist() == [0] and widths[0] == width - 1
    if len(wrong) and not nameless:
        raise ValueError(f"{name}: row {wrong[0] + 1} has {widths[wrong[0]]} fields, others have {width}")
    cells = pd.read_csv(
        io.StringIO(text), sep=sep, header=None, names=range(width), dtype="str", keep_default_na=False,
        na_values=[], skipinitialspace=True, index_col=False, on_bad_lines="error", low_memory=False,
    )  # fmt: skip
    labels = [str(cell).strip() for cell in cells.iloc[0]]
    last = cells.columns[-1]
    if width > 1 and len(cells) > 1 and labels[-1] == "" and (cells[last].iloc[1:].str.strip() == "").all():
        done.append("the delimiter that ends each row left out")
        return cells.drop(columns=last), labels[:-1]
    return cells, (["", *labels[:-1]] if nameless else labels)


def _widths(text: str, sep: str, name: str) -> np.ndarray:
    """Return how many fields each row has that is not empty."""
    if sep == r"\s+":
        return np.array([len(line.split()) for line in text.splitlines() if line.strip()])
    if '"' not in text:  # no field holds the separator
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return np.array([line.count(sep) + 1 for line in lines if line])
    try:
        rows = csv.reader(io.StringIO(text), delimiter=sep, skipinitialspace=True)
        return np.array([len(row) for row in rows if row])
    except csv.Error as error:
        raise ValueError(f"{name}: {error}") from error


def _has_header(
    cells: pd.DataFrame, body: Sequence[Column], labels: Sequence[str], wanted: Sequence[str],
    options: Mapping[str, str], name: str,
) -> bool:  # fmt: skip
    """Return whether the first row names the columns."""
    if "header" in options:
        return options["header"] == "yes"
    names = list(labels)
    typed = [k for k, column in enumerate(body) if column.kind in ("numbers", "dates") or column.strays]
    above = [k for k in typed if names[k] and not body[k].fits(names[k])]
    inside = [k for k in typed if names[k] not in MISSING and body[k].fits(names[k])]
    counted = all(re.fullmatch(r"\d+", names[k]) for k in inside) and _counted(
        [int(names[k]) for k in inside]
    )
    again = any(
        (cells[k].iloc[1:].str.strip() == names[k]).any()
        for k, column in enumerate(body)
        if column.kind == "text"
    )
    unique = len(set(names)) == len(names)
    if above and (not inside or counted):
        return True
    if names[0] == "" and unique and len(names) > 1 and _counts(body[0].cells):
        return True  # as pandas writes an index
    if any(each in names for each in wanted if not re.fullmatch(r"-?\d{1,3}", each)) and unique:
        return True
    if not above and inside and not (counted and unique and len(body) > 1):
        return False
    if not above and not inside and (again or not unique or len(cells) == 1):
        return False
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    raise Refusal(
        f"{name}: its first row ({shown}) may name the columns or be data: say header=yes or header=no"
    )


def _counted(numbers: Sequence[int]) -> bool:
    """Return whether numbers count columns from 0, as pandas does, or years."""
    steps = all(b - a == 1 for a, b in itertools.pairwise(numbers))
    return bool(numbers) and steps and (numbers[0] == 0 or 1800 <= numbers[0] <= 2200)


def _counts(cells: pd.Series) -> bool:
    """Return whether a column numbers its rows, in whatever order."""
    if len(cells) < 2 or not cells.str.fullmatch(r"\d{1,15}").all():
        return False
    return bool((np.diff(np.sort(cells.astype("int64").to_numpy())) == 1).all())


def _without_index(found: dict[str, Column], named: bool, surely: bool, done: list[str]) -> None:
    """Take a column out that only numbers or names the rows, in whatever order they are."""
    first = next(iter(found))
    if not surely and not (named and first.lower() in INDEX_NAMES and len(found) > 1):
        return
    cells = found[first].cells
    if surely or _counts(cells) or (first == "" and cells.is_unique):
        del found[first]
        done.append(f"index column {first!r} left out" if first else "index column without a name left out")


def _parquet(path: Path) -> tuple[pd.DataFrame, list[str]]:
    try:
        frame = pd.read_parquet(path)
    except ImportError as error:
        raise ValueError(f'{path.name}: Parquet needs pyarrow: pip install "posterity[tables]"') from error
    except Exception as error:
        raise ValueError(f"{path.name} is not a Parquet file") from error
    frame.columns = [str(name) for name in frame.columns]
    if twice := frame.columns[frame.columns.duplicated()].tolist():
        raise ValueError(f"{path.name}: column {twice[0]!r} appears twice")
    done = []
    for name in frame:
        column = frame[name]
        kind = column.dtype
        if isinstance(kind, pd.DatetimeTZDtype):
            frame[name] = column.dt.tz_convert("UTC").dt.tz_localize(None)
            done.append(f"times of {name!r} in UTC")
        elif pd.api.types.is_timedelta64_dtype(kind):
            frame[name] = column.dt.total_seconds()
            done.append(f"durations of {name!r} in seconds")
        elif pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_bool_dtype(kind):
            if not isinstance(kind, np.dtype):  # nullable
                frame[name] = column.astype("float64")
        elif not pd.api.types.is_datetime64_dtype(kind):
            frame[name] = _decimals_or_text(column)
    return frame.reset_index(drop=True), done


def _decimals_or_text(column: pd.Series) -> pd.Series:
    """Return a column of Python's own objects as floats, where they are decimals, or as text."""
    known = column.dropna()
    if len(known) and all(isinstance(cell, Decimal) for cell in known):
        return column.map(float, na_action="ignore").astype("float64")
    return column.astype(object).where(column.notna(), np.nan).map(str, na_action="ignore")
