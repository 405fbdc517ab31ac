"""Pictures that a renderer draws of markup: strings of digits, tables by their spans, and formulas.

The markup says exactly what the picture is, so that a model which draws it can be held against the truth. A set is
labelled images whose classes are the markup, a picture each; `tokens` reads markup as a network takes it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.datasets import load_digits
from torch import Tensor

from posterity._checks import needs
from posterity.lab.data.images import ImageData

__all__ = ["formulas", "glyphs", "tables", "tokens"]

SIDE = 8  # pixels of a digit


def glyphs(seed: int, n: int = 1_000, length: int = 3) -> ImageData:
    """Return strings of digits, each digit drawn by an image of scikit-learn's that the seed picks.

    Parameters
    ----------
    seed : int
    n : int, default=1000
        How many, at most ``10 ** length``; where they are all, in order.
    length : int, default=3
        Digits of a string.

    Returns
    -------
    ImageData
        Light ink on black, 8 x 8 ``length`` pixels.
    """
    rng = np.random.default_rng(seed)
    bunch: Any = load_digits()
    drawn = [bunch.images[rng.choice(np.flatnonzero(bunch.target == digit))] / 16 for digit in range(10)]
    codes = np.arange(n) if n == 10**length else rng.choice(10**length, n, replace=False)
    markup = [f"{code:0{length}}" for code in codes]
    pictures = [np.concatenate([drawn[int(digit)] for digit in each], 1) for each in markup]
    return _set(np.stack(pictures), markup)


def tables(seed: int, n: int = 1_000, side: int = 32) -> ImageData:
    """Return tables of rows that are divided into cells, a cell empty, grey or white.

    Parameters
    ----------
    seed : int
    n : int, default=1000
    side : int, default=32
        Pixels, at least 16.

    Returns
    -------
    ImageData
        The markup has a letter a cell, e, g or w, as often as the cell spans columns, and ``/`` between rows:
        ``eegg/wwwe`` is two cells over two.
    """
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        rows, columns = rng.integers(1, 4), rng.integers(2, 5)
        lines = []
        for _ in range(rows):
            begins = np.r_[True, rng.random(columns - 1) < 0.5]
            fills = rng.permutation(3)  # neighbours differ, so that letters say where a cell ends
            lines.append("".join("egw"[fills[k % 3]] for k in begins.cumsum()))
        markup = "/".join(lines)
        found.setdefault(markup, _table(lines, side))
    return _set(np.stack(list(found.values())), list(found))


def _table(lines: Sequence[str], side: int) -> ndarray:
    picture = np.zeros((side, side))
    tops = np.linspace(0, side, len(lines) + 1).round().astype(int)
    lefts = np.linspace(0, side, len(lines[0]) + 1).round().astype(int)
    for line, top, bottom in zip(lines, tops[:-1], tops[1:], strict=True):
        for letter, left, right in zip(line, lefts[:-1], lefts[1:], strict=True):
            picture[top:bottom, left:right] = {"e": 0.0, "g": 0.5, "w": 1.0}[letter]
        for at, (one, other) in enumerate(pairwise(line), 1):
            if one != other:
                picture[top:bottom, lefts[at]] = 1.0
        picture[top] = 1.0
    picture[:, [0, -1]] = picture[-1] = 1.0
    return picture


def formulas(seed: int, n: int = 500, height: int = 32, width: int = 96) -> ImageData:
    """Return formulas of fractions, powers, roots and sums, drawn by matplotlib's mathtext.

    Parameters
    ----------
    seed : int
    n : int, default=500
    height, width : int, default=32 and 96
        Pixels.

    Returns
    -------
    ImageData
        Light ink on black, in the middle.
    """
    parser = needs("matplotlib.mathtext", "plot").MathTextParser("agg")
    font = needs("matplotlib.font_manager", "plot").FontProperties(size=10)
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        markup = _formula(rng, 2)
        ink = np.asarray(parser.parse(f"${markup}$", dpi=100, prop=font).image) / 255
        top, left = ((room - size) // 2 for room, size in zip((height, width), ink.shape, strict=True))
        if min(top, left) >= 0:
            picture = np.zeros((height, width))
            picture[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
            found.setdefault(markup, picture)
    return _set(np.stack(list(found.values())), list(found))


def _formula(rng: np.random.Generator, depth: int) -> str:
    """Return a formula nested so deep."""
    kind = rng.integers(5) if depth else 0
    if kind == 0:
        return str(rng.choice(list("abcxyz123")))
    left, right = (_formula(rng, depth - 1) for _ in range(2))
    shapes = {1: r"\frac{%s}{%s}", 2: "{%s}^{%s}", 3: "%s+%s", 4: r"\sqrt{%s}%s"}
    return shapes[int(kind)] % (left, right)


def _set(pictures: ndarray, markup: Sequence[str]) -> ImageData:
    x = pictures[:, None].astype(np.float32)
    return ImageData(x, np.arange(len(x)), tuple(markup))


def tokens(markup: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return markup as numbers, a character a token.

    Parameters
    ----------
    markup : sequence of str

    Returns
    -------
    tuple
        Long tensor of shape (n, longest), from 1, with 0 behind the end; and the characters by number, the first of
        them empty.
    """
    known = ("", *sorted(set("".join(markup))))
    number = {character: k for k, character in enumerate(known)}
    longest = max(map(len, markup))
    rows = [[number[c] for c in each] + [0] * (longest - len(each)) for each in markup]
    return torch.tensor(rows, dtype=torch.long), known
