"""Figures as SVG that follows the page's colours and says in words what it shows."""

import zlib
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np

__all__ = ["alone", "curves", "dots", "ranking", "small", "sweep"]

# Narrow enough that letters can be read on a phone.
WIDTH, LEFT, RIGHT, LETTERS = 480, 62, 18, 60
COLOURS = ("#0b57b7", "#b3261e", "#1b7f3b", "#8a5a00", "#6b3fa0", "#5b6270")
STYLE = (
    "svg{background:#fff;font:12px system-ui,sans-serif}text{fill:#1c1e21}.soft{fill:#5b6270}.axis{stroke:#c9ced6}"
    ".mark{stroke:#5b6270;stroke-dasharray:4 4}.side{fill:#146c2e;fill-opacity:.1}.dot{fill:#0b57b7;fill-opacity:.75}"
    ".mean{fill:#1c1e21}.interval{stroke:#1c1e21;stroke-width:3}polyline{fill:none}.thin{stroke-opacity:.35}.thick{stroke-width:2.2}"
    ".c1.thick,.c4.thick{stroke-dasharray:7 3}.c2.thick,.c5.thick{stroke-dasharray:2 3}.c3.thick{stroke-dasharray:9 3 2 3}"
    + "".join(f".c{k}{{stroke:{colour}}}.c{k}.spot{{fill:{colour}}}" for k, colour in enumerate(COLOURS))
)


def alone(figure: str) -> str:
    """Return a figure as a file of its own, with its style.

    Parameters
    ----------
    figure : str
        What a function of this module returns, not empty.

    Returns
    -------
    str
    """
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="640" '
    head, end, rest = figure.replace("<svg ", head, 1).partition(">")
    return f"{head}{end}<style>{STYLE}</style>{rest}\n"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that cover an interval."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    size = 10 ** np.floor(np.log10(raw))
    step = size * min((m for m in (1, 2, 2.5, 5, 10) if m * size >= raw), default=10)
    start = np.ceil(low / step - 1e-9)
    return [float(k * step) for k in np.arange(start, high / step + 1e-9)]


def _label(value: float) -> str:
    return f"{value + 0.0:.4g}"  # no minus zero


def _svg(body: list[str], height: int, title: str, description: str) -> str:
    name = f"f{zlib.crc32((title + description).encode()):x}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(description)}</desc>'
        + "".join(body) + "</svg>"
    )  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str = "start", soft: bool = True) -> str:
    style = ' class="soft"' if soft else ""
    return f'<text{style} x="{x:.1f}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:g}" y2="{y2:g}"/>'


class _Scale:
    """Places of values between two edges, with room for marks at both ends."""

    def __init__(self, known: Sequence[float], left: float, right: float) -> None:
        self.start, self.end = min(known), max(known)
        pad = 0.08 * (self.end - self.start or abs(self.end) or 1.0)
        self.start, self.end, self.left, self.right = self.start - pad, self.end + pad, left, right

    def __call__(self, x: float) -> float:
        return self.left + (x - self.start) / (self.end - self.start) * (self.right - self.left)

    def axis(self, floor: float, label: Sequence[str]) -> list[str]:
        """Return the line under the values, its ticks, and what is measured."""
        body = [_line("axis", self.left, floor, self.right, floor)]
        for tick in _ticks(self.start, self.end):
            body.append(_line("axis", self(tick), floor, self(tick), floor + 5))
            body.append(_text(self(tick), floor + 19, _label(tick), "middle", soft=False))
        middle = WIDTH / 2
        return body + [_text(middle, floor + 38 + 15 * k, text, "middle") for k, text in enumerate(label)]

    def side(self, ends: Sequence[float | None], top: float, floor: float) -> str:
        """Return the ground on which a claim holds."""
        low = self.left if ends[0] is None else self(ends[0])
        high = self.right if ends[1] is None else self(ends[1])
        return f'<rect class="side" x="{low:.1f}" y="{top:g}" width="{high - low:.1f}" height="{floor - top:g}"/>'


class _Judged:
    """What a row is judged by: values, mean and interval, the marks beside them and the claimed side."""

    def __init__(self, row: Mapping[str, Any], figure: float | None = None) -> None:
        self.ends: Sequence[float | None]
        if row["form"] == "comparison":
            arms = list(row["arms"])
            pairs = zip(row["arms"][arms[-1]]["values"], row["arms"][arms[0]]["values"], strict=True)
            self.values, self.facts = [m - b for m, b in pairs], row["effect"]
            self.marks, self.what = {"no difference": 0.0}, f"{arms[-1]} less {arms[0]}"
            self.ends = (None, 0.0) if row["better"] == "lower" else (0.0, None)
        elif row["form"] == "bound":
            self.values, self.facts, self.what = row["value"]["values"], row["value"], "value"
            self.marks = {"limit": row["limit"]}
            self.ends = (None, row["limit"]) if row["better"] == "lower" else (row["limit"], None)
        else:
            self.values, self.facts, self.what = row["value"]["values"], row["value"], "value"
            self.ends = row["range"]
            self.marks = {
                n: x for n, x in zip(("lowest", "highest"), self.ends, strict=True) if x is not None
            }
        if figure is not None:
            self.marks["paper"] = figure

    def scale(self, left: float, right: float) -> _Scale:
        """Return the scale of all that is drawn."""
        ends = [x for x in self.facts["ci95"] if x is not None]
        return _Scale([*self.values, *self.marks.values(), *ends], left, right)


def dots(row: Mapping[str, Any], figure: float | None = None) -> str:
    """Return the plot of a verdict: every seed a dot, the interval a bar, zero or the limit a line.

    Parameters
    ----------
    row : mapping
        As ``posterity run --json`` prints it.
    figure : float, optional
        The paper's own value.

    Returns
    -------
    str
        Empty without a value.
    """
    seen = _Judged(row, figure)
    if not seen.values:
        return ""
    at = seen.scale(LEFT, WIDTH - RIGHT)
    low, high = seen.facts["ci95"]
    floor = 58 + 14 * min(len(seen.values), 12) + 10
    label = wrap(row["metric"], LETTERS)
    if row["form"] == "comparison":
        label += wrap(seen.what, LETTERS)
    body = [at.side(seen.ends, 28, floor), *at.axis(floor, label)]
    taken: list[float] = []
    for name, x in seen.marks.items():
        place = at(x)
        anchor = "end" if place > WIDTH - 90 else "start" if place < 90 else "middle"
        near = sum(abs(place - other) < 90 for other in taken)
        body.append(_line("mark", place, 28, place, floor))
        body.append(_text(place, 24 - 12 * (near % 2), name, anchor))
        taken.append(place)
    for k, x in enumerate(seen.values):
        told = f"<title>seed {row['seeds'][k]}: {_label(x)}</title>"
        body.append(f'<circle class="dot" cx="{at(x):.1f}" cy="{42 + 14 * (k % 12)}" r="4.5">{told}</circle>')
    y = floor - 16
    if low is not None:
        body.append(_line("interval", at(low), y, at(high), y))
    body.append(f'<circle class="mean" cx="{at(seen.facts["mean"]):.1f}" cy="{y}" r="6"/>')
    body += [_text(6, y + 4, "mean"), _text(6, 46, "seeds")]
    spread = "" if low is None else f", 95 % interval {_label(low)} to {_label(high)}"
    said = f"{seen.what} over {len(seen.values)} seeds: mean {_label(seen.facts['mean'])}{spread}; " + ", ".join(
        f"{name} at {_label(x)}" for name, x in seen.marks.items()
    )  # fmt: skip
    return _svg(
        body, floor + 28 + 15 * len(label), f"{row['claim']}: {row['metric']}, {seen.what}", said + "."
    )


def small(row: Mapping[str, Any]) -> str:
    """Return the plot of a verdict for a card: no letter, the words beside it say what it shows.

    Parameters
    ----------
    row : mapping
        As ``posterity run --json`` prints it.

    Returns
    -------
    str
        Empty without a value.
    """
    seen = _Judged(row)
    if not seen.values:
        return ""
    at = seen.scale(0, 240)
    low, high = (None if x is None else at(x) for x in seen.facts["ci95"])
    start, end = (x if x is None else round(at(x)) for x in seen.ends)
    side = f"M{start or 0} 0H{240 if end is None else end}V56H{start or 0}z"
    spots = "".join(f"M{at(x):.0f} {8 + 6 * (k % 5)}h0" for k, x in enumerate(seen.values))
    body = [f'<path class="side" d="{side}"/>']
    body += [f'<path class="mark" d="M{at(x):.0f} 0V56"/>' for x in seen.marks.values()]
    body.append(f'<path class="dots" d="{spots}"/>')
    if low is not None and high is not None:
        body.append(f'<path class="interval" d="M{low:.0f} 46H{high:.0f}"/>')
    body.append(f'<circle class="mean" cx="{at(seen.facts["mean"]):.0f}" cy="46" r="5"/>')
    return f'<svg viewBox="0 0 240 56" aria-hidden="true">{"".join(body)}</svg>'


def ranking(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the plot of a comparison: an entry a lane, best first, with seeds, mean and interval.

    Parameters
    ----------
    rows : sequence of mapping
        As ``posterity compare --json`` prints them.

    Returns
    -------
    str
        Empty if none has a value.
    """
    rows = [row for row in rows if row["rank"] is not None]
    if not rows:
        return ""
    ends = [x for row in rows for x in row["ci95"] if x is not None]
    at = _Scale([*(x for row in rows for x in row["values"]), *ends], 158, WIDTH - RIGHT)
    floor = 12 + 30 * len(rows)
    label = wrap(f"{rows[0]['metric']}; {rows[0]['better']} is better", LETTERS)
    body, said = at.axis(floor, label), []
    for k, row in enumerate(rows):
        y, (low, high) = 22 + 30 * k, row["ci95"]
        body.append(_text(148, y + 4, f"{row['entry']}", "end", soft=not row["paper"]))
        body += [f'<circle class="dot" cx="{at(x):.1f}" cy="{y - 5}" r="3.5"/>' for x in row["values"]]
        if low is not None:
            body.append(_line("interval", at(low), y + 5, at(high), y + 5))
        body.append(f'<circle class="mean" cx="{at(row["mean"]):.1f}" cy="{y + 5}" r="5"/>')
        said.append(f"{row['rank']}. {row['entry']}: {_label(row['mean'])}")
    return _svg(body, floor + 28 + 15 * len(label), "entries, best first", "; ".join(said) + ".")


class _Plane:
    """Places of points, an axis by powers of ten where its values are positive and span much."""

    def __init__(self, points: np.ndarray, top: float, floor: float, inset: float = 0.0) -> None:
        self.low, self.high = points.min(0), points.max(0)
        self.logs = [bool(a > 0 and b / a > 30) for a, b in zip(self.low, self.high, strict=True)]
        self.top, self.floor, self.inset = top, floor, inset

    def __call__(self, point: Sequence[float]) -> tuple[float, float]:
        x, y = (self._share(value, axis) for axis, value in enumerate(point))
        width, height = WIDTH - LEFT - RIGHT - 2 * self.inset, self.floor - self.top - 2 * self.inset
        return LEFT + self.inset + x * width, self.floor - self.inset - y * height

    def _share(self, value: float, axis: int) -> float:
        low, high = self.low[axis], self.high[axis]
        if self.logs[axis]:
            low, high, value = np.log10(low), np.log10(high), np.log10(max(value, low))
        return (value - low) / (high - low) if high > low else 0.5

    def axes(self, across: str, up: str, xs: Sequence[float] = ()) -> list[str]:
        """Return both lines, their ticks (across at ``xs``, if these are given) and what they show."""
        body = [f'<path class="axis" fill="none" d="M{LEFT},{self.top}V{self.floor}H{WIDTH - RIGHT}"/>']
        for axis, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            log = self.logs[axis]
            span = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1) if log else ()
            marks = [10.0**k for k in span if low <= 10.0**k <= high] if log else _ticks(low, high, 4)
            for mark in (axis == 0 and list(xs)) or marks or [low, high]:
                x, y = self((mark, self.low[1]) if axis == 0 else (self.low[0], mark))
                place = (x, self.floor + 18, "middle") if axis == 0 else (LEFT - 8, round(y + 4, 1), "end")
                told = f"{mark:g}" if axis == 0 and xs else _label(mark)
                body.append(_text(*place[:2], told, place[2], soft=False))
        if up:
            body.append(_text(6, self.top - 10, up))
        if across:
            body.append(_text((LEFT + WIDTH - RIGHT) / 2, self.floor + 36, across, "middle"))
        return body


def sweep(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how what is judged moves with a parameter: seeds, mean and interval at each of its values.

    Parameters
    ----------
    name : str
        The parameter.
    rows : sequence of mapping
        As ``posterity run --json`` prints them, of one claim: one a value.

    Returns
    -------
    str
        Empty with fewer than two values that have a mean.
    """
    seen = sorted(((row["params"][name], _Judged(row)) for row in rows), key=lambda pair: pair[0])
    seen = [(x, each) for x, each in seen if each.values and np.isfinite([*each.values]).all()]
    if len(seen) < 2:
        return ""
    xs, first = [x for x, _ in seen], seen[0][1]
    ends = [(x, y) for x, each in seen for y in (*each.values, *each.facts["ci95"]) if y is not None]
    points = np.array(ends + [(xs[0], y) for y in first.marks.values()], dtype=float)
    label = wrap(rows[0]["metric"] + (f": {first.what}" if first.what != "value" else ""), LETTERS)
    top = 14 + 15 * len(label)
    floor = top + 220
    at = _Plane(points, top, floor, inset=16)
    shown: list[float] = []
    for x in xs:  # as many as do not touch
        if not shown or at((x, at.low[1]))[0] - at((shown[-1], at.low[1]))[0] > 40:
            shown.append(x)
    low, high = (
        edge if y is None else at((xs[0], y))[1] for y, edge in zip(first.ends, (floor, top), strict=True)
    )
    body = [
        f'<rect class="side" x="{LEFT}" y="{high:.1f}" width="{WIDTH - RIGHT - LEFT}" height="{low - high:.1f}"/>'
    ]
    body += [*at.axes(name, "", shown), *(_text(6, 12 + 15 * k, text) for k, text in enumerate(label))]
    means = [(x, each.facts["mean"]) for x, each in seen]
    for mark, y in first.marks.items():
        place = round(at((xs[0], y))[1], 1)
        free = abs(means[0][1] - y) > abs(means[-1][1] - y)  # its letters stand where the points are farther
        body.append(_line("mark", LEFT, place, WIDTH - RIGHT, place))
        body.append(_text(LEFT + 4 if free else WIDTH - RIGHT, place - 4, mark, "start" if free else "end"))
    line = " ".join("{:.1f},{:.1f}".format(*at(point)) for point in means)
    body.append(f'<polyline class="c1 thin" points="{line}"/>')
    said = []
    for x, each in seen:
        place, middle = at((x, each.facts["mean"]))
        body += [
            f'<circle class="dot" cx="{place - 7:.1f}" cy="{at((x, y))[1]:.1f}" r="3"/>' for y in each.values
        ]
        start, end = each.facts["ci95"]
        spread = "" if start is None else f" ({_label(start)} to {_label(end)})"
        if start is not None:
            heights = (round(at((x, y))[1], 1) for y in (start, end))
            body.append(_line("interval", place, next(heights), place, next(heights)))
        body.append(f'<circle class="mean" cx="{place:.1f}" cy="{middle:.1f}" r="5"/>')
        said.append(f"{_label(each.facts['mean'])}{spread} at {_label(x)}")
    marks = ", ".join(f"{mark} at {_label(y)}" for mark, y in first.marks.items())
    return _svg(
        body, floor + 42, f"{rows[0]['claim']} by {name}", f"{first.what} by {name}, mean and 95 % interval: "
        f"{'; '.join(said)}; {marks}."
    )  # fmt: skip


def curves(
    title: str, lines: Mapping[str, Sequence[Sequence[Sequence[float]]]], across: str = "", up: str = ""
) -> str:
    """Return curves of a trial: each name a colour and a dash, each seed a thin line, their mean a thick one.

    Parameters
    ----------
    title : str
    lines : mapping of str to sequence of curves
        A curve a seed, each a sequence of ``(x, y)``.
    across, up : str, default=""
        What the axes show, where it is known.

    Returns
    -------
    str
    """
    lines = {name: [c for c in seeds if len(c) > 0] for name, seeds in lines.items()}
    points = np.array([p for seeds in lines.values() for c in seeds for p in c], dtype=float)
    points = points[np.isfinite(points).all(1)] if len(points) else points
    if not len(points):
        return ""
    keys = list(lines) if len(lines) > 1 else []
    top = 14 + 15 * -(-len(keys) // 2) + (18 if up else 0)
    floor = top + 220
    height = floor + (42 if across else 26)
    at = _Plane(points, top, floor)

    def path(curve: Sequence[Sequence[float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*at(point)) for point in curve)

    body, said = at.axes(across, up), []
    for k, (name, seeds) in enumerate(lines.items()):
        colour = f"c{k % 6}"
        body += [f'<polyline class="{colour} thin" points="{path(c)}"/>' for c in seeds if len(c) > 1]
        grid: dict[float, list[float]] = {}
        for curve in seeds:
            for x, y in curve:
                grid.setdefault(x, []).append(y)
        mean = [(x, float(np.mean(ys))) for x, ys in sorted(grid.items())]
        if len(seeds) > 1 or len(mean) > 1:
            body.append(f'<polyline class="{colour} thick" points="{path(mean)}"/>')
        if len(mean) < 30:
            spots = ("{:.1f}|{:.1f}".format(*at(p)).split("|") for p in mean)
            body += [f'<circle class="{colour} spot" cx="{x}" cy="{y}" r="3"/>' for x, y in spots]
        if keys:
            x, y = 6 + 236 * (k % 2), 8 + 15 * (k // 2)
            body += [_line(f"{colour} thick", x, y, x + 24, y), _text(x + 30, y + 4, name, soft=False)]
        said.append(
            f"{name} from {_label(mean[0][1])} at {_label(mean[0][0])} to {_label(mean[-1][1])} at {_label(mean[-1][0])}"
        )
    return _svg(
        body, height, title, f"{title}; mean over {max(map(len, lines.values()))} seeds: " + "; ".join(said)
    )
