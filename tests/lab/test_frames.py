"""A table written in any dialect is read as it was, or refused; never as a third thing."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posterity.lab.data.frames import read_frame

WORDS = st.sampled_from(["ab", "Doe, J", "x;y", "été", 'say "so"', "u", "007", "12a", "2024", "it's", "a|b"])
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))
DAYS = st.dates(pd.Timestamp("1950-01-01").date(), pd.Timestamp("2040-01-01").date())
FORMS = {"iso": "%Y-%m-%d", "day first": "%d/%m/%Y", "month first": "%m/%d/%Y", "dots": "%d.%m.%Y"}


@st.composite
def frames(draw):
    """Return a frame of numbers, whole numbers, words and days, some of them missing."""
    rows = draw(st.integers(2, 12))
    kinds = draw(st.lists(st.sampled_from(["number", "whole", "word", "day"]), min_size=1, max_size=4))
    cells = {"number": NUMBERS, "whole": st.integers(-99_999, 9_999_999), "word": WORDS, "day": DAYS}
    gaps = draw(st.sampled_from([0.0, 0.2]))
    frame = {}
    for k, kind in enumerate(kinds):
        values = draw(st.lists(cells[kind], min_size=rows, max_size=rows))
        holes = [draw(st.floats(0, 1)) < gaps for _ in values]
        holes[k % rows] = False  # a column without any value may as well be a delimiter at the end
        frame[f"{kind}_{k}"] = [None if hole else value for value, hole in zip(values, holes, strict=True)]
    return frame


@st.composite
def dialects(draw):
    decimal = draw(st.sampled_from([".", ","]))
    return {
        "sep": draw(st.sampled_from([",", ";", "\t", "|"])), "decimal": decimal, "header": draw(st.booleans()),
        "thousands": draw(st.sampled_from(["", "," if decimal == "." else ".", " "])),
        "index": draw(st.sampled_from([None, "counted", "shuffled"])), "bom": draw(st.booleans()),
        "end": draw(st.sampled_from(["\n", "\r\n"])), "quote": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        "missing": draw(st.sampled_from(["", "NA", "?"])), "date": draw(st.sampled_from(sorted(FORMS))),
        "trailing": draw(st.booleans()),
    }  # fmt: skip


def written(frame, dialect):
    def cell(value):
        if value is None:
            return dialect["missing"]
        if isinstance(value, float | int):
            marks = str.maketrans({",": dialect["thousands"], ".": dialect["decimal"]})
            return (f"{value:,.3f}" if isinstance(value, float) else f"{value:,d}").translate(marks)
        return value.strftime(FORMS[dialect["date"]]) if hasattr(value, "strftime") else value

    rows = [list(map(cell, row)) for row in zip(*frame.values(), strict=True)]
    if dialect["index"]:
        order = (
            np.arange(len(rows))
            if dialect["index"] == "counted"
            else np.random.default_rng(0).permutation(len(rows))
        )
        rows = [[str(number), *row] for number, row in zip(order, rows, strict=True)]
    if dialect["header"]:
        rows.insert(0, ["", *frame] if dialect["index"] else list(frame))
    if dialect["trailing"]:
        rows = [[*row, ""] for row in rows]
    out = io.StringIO()
    csv.writer(
        out, delimiter=dialect["sep"], lineterminator=dialect["end"], quoting=dialect["quote"]
    ).writerows(rows)
    return ("\ufeff" if dialect["bom"] else "") + out.getvalue()


def same(found, value):
    if value is None:
        return pd.isna(found)
    if isinstance(value, float | int):
        return found == pytest.approx(value, abs=1e-9, rel=1e-12)
    return found == (pd.Timestamp(value) if hasattr(value, "strftime") else value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(frames(), dialects())
def test_a_frame_comes_back_or_is_refused(tmp_path_factory, frame, dialect):
    assume(dialect["header"] or not _seems_headed(frame))
    path = tmp_path_factory.mktemp("dialect") / "t.csv"
    path.write_bytes(written(frame, dialect).encode())
    try:
        found, note = read_frame(path)
    except ValueError as error:
        if path.name not in str(error):
            raise
        return
    assert "\n" not in note
    if not dialect["header"] and dialect["index"]:
        found = found.iloc[:, 1:]  # numbers without a name are a column like others
    assert found.shape[1] == len(frame), (found, note)
    if dialect["header"]:
        assert list(found) == list(frame)
    for column, values in zip(found, frame.values(), strict=True):
        known = [value for value in values if value is not None]
        assert len(found) == len(values), (found, note)
        assert all(same(got, value) for got, value in zip(found[column], values, strict=True)) or _text(
            found[column], known
        ), (
            found,
            note,
        )


def _seems_headed(frame):
    """Whether the first row of a table without a header reads as one: a word above numbers alone."""
    return any(
        isinstance(first, str) and not first.isdigit() and all(str(value).isdigit() for value in rest if value is not None)
        for first, *rest in frame.values()
    )  # fmt: skip


def _text(column, known):
    """Whether words that look like numbers or dates were read as such, which they are."""
    return all(isinstance(value, str) for value in known) and column.dtype.kind in "iufM"


@pytest.mark.parametrize("numbers", ["1,5;2,25;-3,75", "1.500,5;22.000,0;-3.000,25", "1.5;2.25;-3.75"])
def test_a_word_among_numbers_of_any_country_is_asked_for(tmp_path, numbers):
    path = tmp_path / "mixed.csv"
    cells = [*(9 * numbers.split(";")), "k.A."]
    path.write_text("a;b\n" + "\n".join(f"{k};{cell}" for k, cell in enumerate(cells)), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"column 'b' has numbers and 'k.A.': missing=k.A. reads that as missing"
    ):
        read_frame(path)
    frame, _ = read_frame(path, options={"missing": "k.A."})
    assert frame["b"].dtype == float and frame["b"].isna().tolist() == [False] * 27 + [True]
