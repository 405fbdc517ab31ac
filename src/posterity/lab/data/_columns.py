"""Columns of text as numbers, dates or categories: decided on the whole column, and said.

A column is what all of its cells are: numbers in one way of writing them, dates in one order
of day and month, else categories. Where its cells can be read in two ways, the other columns
of the file may tell; where they do not, the reader refuses and names both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

__all__ = ["MISSING", "Column", "Refusal", "settle", "survey"]

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", ".", "#N/A", "<NA>")
NUMBERS = {  # ways of writing numbers that are not Python's: pattern, what is taken out, decimal mark
    "decimal comma": (r"[+-]?(?:\d+(?:,\d*)?|,\d+)(?:[eE][+-]?\d+)?", "", ","),
    "thousands comma": (r"[+-]?\d{1,3}(?:,\d{3})*(?:\.\d+)?", ",", "."),
    "thousands point": (r"[+-]?\d{1,3}(?:\.\d{3})*(?:,\d+)?", ".", ","),
    "thousands space": (r"[+-]?\d{1,3}(?:[\s'’]\d{3})*(?:[.,]\d+)?", r"\s'’", ","),
}
GROUPED = r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+"  # 1.234 is a number here and a thousand there
DAY = r"(\d{1,2})[./-](\d{1,2})[./-](\d{4})(?:[ T](\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?))?"
ISO = r"\d{4}-\d{1,2}(?:-\d{1,2}(?:[ T]\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?)?(?:Z|[+-]\d{2}:?\d{2})?)?"
SLASHED = r"\d{4}[/.]\d{1,2}[/.]\d{1,2}(?:[ T]\d{1,2}:\d{2}(?::\d{2})?)?"
NAMED = ("%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y")
SAMPLE = 1000  # cells that tell whether a column repeats itself
FEW = 3  # different words among numbers that may be marks of something missing


class Refusal(ValueError):
    """A file that can be read in two ways, or in none."""


@dataclass
class Column:
    """What the cells of a column can be.

    Attributes
    ----------
    cells : Series of str
        Stripped; NA where missing.
    kind : {"numbers", "dates", "text", "empty"}
    ways : tuple of str
        How its numbers or dates may be written; several where the column alone does not tell.
    strays : tuple of str
        The few words among numbers.
    """

    cells: pd.Series
    kind: str
    ways: tuple[str, ...] = ()
    strays: tuple[str, ...] = field(default=())

    def fits(self, cell: str) -> bool:
        """Return whether a further cell is of this kind, missing cells being of any."""
        cell = cell.strip()
        if cell in MISSING or (self.kind in ("text", "empty") and not self.strays):
            return True
        if self.strays:
            return cell in self.strays or survey(pd.Series([cell], dtype="str")).kind == "numbers"
        return survey(pd.Series([cell], dtype="str")).kind == self.kind


def survey(cells: pd.Series, missing: tuple[str, ...] = ()) -> Column:
    """Return what the cells of a column can be, looking at all of them."""
    cells = cells.str.strip()
    cells = cells.mask(cells.isin([*MISSING, *missing]))
    known = cells.dropna()
    if known.iloc[:SAMPLE].duplicated().mean() > 0.5:  # else it costs more than it saves
        known = known.drop_duplicates()
    if known.empty:
        return Column(cells, "empty")
    if known.str.endswith("%").all():
        inner = survey(cells.str.removesuffix("%"), missing)
        if inner.kind == "numbers":
            return Column(inner.cells, "numbers", tuple(f"percent, {way}" for way in inner.ways))
        return Column(cells, "text")
    if known.isin(["True", "False", "true", "false", "TRUE", "FALSE"]).all():
        return Column(cells, "numbers", ("true and false",))
    numeric = pd.to_numeric(known, errors="coerce").notna() & ~known.str.contains("_", regex=False)
    if known.str.fullmatch(r"[+-]?0\d+").any() and numeric.all():
        return Column(cells, "text", ("leading zeros",))
    if numeric.all():
        grouped = known.str.fullmatch(GROUPED)
        pointed = known.str.contains(".", regex=False)
        if grouped[pointed].all() and pointed.any() and known.str.len().max() > 4:
            whole = known[~pointed].str.fullmatch(r"[+-]?\d{1,3}").all()
            return Column(cells, "numbers", ("plain", "thousands point") if whole else ("plain",))
        return Column(cells, "numbers", ("plain",) if not pointed.any() else ("plain, decimal point",))
    ways = tuple(way for way, (pattern, _, _) in NUMBERS.items() if known.str.fullmatch(pattern).all())
    marks = {way: gone for way, (_, gone, _) in NUMBERS.items()}
    ways = tuple(way for way in ways if not marks[way] or known.str.contains(f"[{marks[way]}]").any())
    if ways:
        return Column(cells, "numbers", ways)
    dates = _date_ways(known)
    if dates:
        return Column(cells, "dates", dates)
    foreign = (pattern for pattern, _, _ in NUMBERS.values())
    for pattern in ("", *foreign):  # "": numbers as Python writes them
        strays = known[~(numeric | known.str.fullmatch(pattern))].drop_duplicates()
        if len(strays) <= FEW and cells.isin(strays).sum() < 0.5 * cells.notna().sum():
            return Column(cells, "text", strays=tuple(strays))
    return Column(cells, "text")


def _date_ways(known: pd.Series) -> tuple[str, ...]:
    if known.str.fullmatch(ISO).all():
        return ("year first",)
    if known.str.fullmatch(SLASHED).all():
        return ("year first, slashes",)
    if known.str.fullmatch(DAY).all():
        parts = known.str.extract(DAY)
        first, second = (parts[k].astype(int) for k in (0, 1))
        ways = [("day first", first, second), ("month first", second, first)]
        return tuple(way for way, day, month in ways if day.max() <= 31 and month.max() <= 12)
    for form in NAMED:
        if pd.to_datetime(known, format=form, errors="coerce").notna().all():
            return (form,)
    return ()


def settle(
    columns: Mapping[str, Column], name: str, options: Mapping[str, str]
) -> tuple[pd.DataFrame, list[str]]:
    """Return the columns as numbers, dates and text, and what was decided.

    Parameters
    ----------
    columns : mapping of str to Column
    name : str
        Of the file, for messages.
    options : mapping of str to str
        ``decimal``, ``dates`` and ``text``, which settle what a column leaves open.

    Returns
    -------
    tuple of DataFrame and list of str
    """
    text = [each.strip() for each in options.get("text", "").split(",") if each.strip()]
    mark = options.get("decimal")
    marks = (
        {mark}
        if mark
        else {_mark(column.ways[0]) for column in columns.values() if len(column.ways) == 1} - {""}
    )
    done: dict[str, list[str]] = {}
    frame = {}
    for label, column in columns.items():
        if label in text:
            column = Column(column.cells, "text")
        if column.strays:
            words = " and ".join(map(repr, column.strays))
            raise Refusal(
                f"{name}: column {label!r} has numbers and {words}: missing={','.join(column.strays)} reads that "
                f"as missing, text={label} reads all as categories"
            )
        way = _chosen(column, label, name, options, marks)
        frame[label] = _values(column, way)
        if way and way not in ("plain", "plain, decimal point", "year first"):
            done.setdefault(way, []).append(label)
    said = [f"{way} in {_listed(labels)}" for way, labels in done.items()]
    return pd.DataFrame(frame), said


def _listed(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:4])) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")


def _mark(way: str) -> str:
    """Return the decimal mark that a way of writing numbers proves, empty for none."""
    way = way.removeprefix("percent, ")
    if way == "plain, decimal point" or way == "thousands comma":
        return "."
    return "," if way in ("decimal comma", "thousands point") else ""


def _chosen(column: Column, label: str, name: str, options: Mapping[str, str], marks: set[str]) -> str:
    """Return the way in which a column is read, or refuse where nothing tells."""
    ways = list(column.ways)
    if column.kind == "dates" and len(ways) > 1 and "dates" in options:
        ways = [f"{options['dates'].removesuffix('-first')} first"]
    if column.kind == "numbers" and len(ways) > 1 and len(marks) == 1:
        wanted = next(iter(marks))
        ways = [way for way in ways if (_mark(way) or ".") == wanted] or ways
    if len(ways) > 1:
        example = column.cells.dropna().iloc[0]
        first, second = ways[:2]
        how = "dates=day-first or dates=month-first" if column.kind == "dates" else "decimal=. or decimal=,"
        raise Refusal(
            f"{name}: column {label!r} ({example!r}) can be read as {first} or as {second}: say {how}"
        )
    return ways[0] if ways else ""


def _values(column: Column, way: str) -> pd.Series:
    cells = column.cells
    if column.kind == "empty":
        return pd.Series(np.nan, cells.index)
    if column.kind == "text":
        return cells.astype(object).where(cells.notna(), np.nan)
    if column.kind == "dates":
        return _dates(cells, way)
    way = way.removeprefix("percent, ")
    if way == "true and false":
        found = cells.str.lower().map({"true": 1.0, "false": 0.0})
        return found.astype(bool) if found.notna().all() else found
    if way in NUMBERS:
        _, gone, mark = NUMBERS[way]
        if gone:
            cells = cells.str.replace(f"[{gone}]", "", regex=True)
        if mark == ",":
            cells = cells.str.replace(",", ".", regex=False)
    return pd.to_numeric(cells.astype(object).where(cells.notna(), np.nan))


def _dates(cells: pd.Series, way: str) -> pd.Series:
    if way == "year first":
        found = pd.to_datetime(
            cells, format="ISO8601", utc=bool(cells.dropna().str.contains(r"Z$|[+-]\d{2}:?\d{2}$").any())
        )
        return found.dt.tz_localize(None) if found.dt.tz is not None else found
    if way == "year first, slashes":
        return pd.to_datetime(cells.str.replace(r"[/.]", "-", n=2, regex=True), format="ISO8601")
    if way in ("day first", "month first"):
        parts = cells.str.extract(DAY)
        day, month = (0, 1) if way == "day first" else (1, 0)
        whole = parts[2] + "-" + parts[month].str.zfill(2) + "-" + parts[day].str.zfill(2)
        clock = parts[3].fillna("0:00")
        clock = clock.where(clock.str.len() > 0, "0:00").str.replace(r"^(\d):", r"0\1:", regex=True)
        return pd.to_datetime(whole + " " + clock, format="ISO8601", errors="coerce")
    return pd.to_datetime(cells, format=way)
