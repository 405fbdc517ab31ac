"""Figures as SVG that follows the page's colours and says in words what it shows."""

import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

__all__ = ["alone", "curves", "dots"]

WIDTH, LEFT, RIGHT = 640, 70, 20
COLOURS = ("#0b57b7", "#b3261e", "#1b7f3b", "#8a5a00", "#6b3fa0", "#5b6270")
STYLE = (
    "svg{background:#fff;font:12px system-ui,sans-serif}text{fill:#1c1e21}.soft{fill:#5b6270}.axis{stroke:#c9ced6}"
    ".mark{stroke:#5b6270;stroke-dasharray:4 4}.dot{fill:#0b57b7;fill-opacity:.75}.mean{fill:#1c1e21}"
    ".interval{stroke:#1c1e21;stroke-width:3}polyline{fill:none}.thin{stroke-opacity:.35}.thick{stroke-width:2.2}"
    ".c1.thick,.c4.thick{stroke-dasharray:7 3}.c2.thick,.c5.thick{stroke-dasharray:2 3}.c3.thick{stroke-dasharray:9 3 2 3}"
    + "".join(f".c{k}{{stroke:{colour}}}.c{k}.spot{{fill:{colour}}}" for k, colour in enumerate(COLOURS))
)


def alone(figure: str) -> str:
    """Return a figure as a file of its own, with its style.

    Parameters
    ----------
    figure : str
        What `dots` or `curves` return, not empty.

    Returns
    -------
    str
    """
    head, end, rest = figure.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
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
    return f"{value:.4g}"


def _svg(body: list[str], height: int, title: str, description: str) -> str:
    name = f"f{zlib.crc32((title + description).encode()):x}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(description)}</desc>'
        + "".join(body) + "</svg>"
    )  # fmt: skip


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
    """
    if row["form"] == "comparison":
        arms = list(row["arms"])
        pairs = zip(row["arms"][arms[-1]]["values"], row["arms"][arms[0]]["values"], strict=True)
        values, facts, marks = [m - b for m, b in pairs], row["effect"], {"no difference": 0.0}
        what = f"{arms[-1]} less {arms[0]}"
    else:
        values, facts, what = row["value"]["values"], row["value"], "value"
        marks = (
            {"limit": row["limit"]}
            if row["form"] == "bound"
            else {n: x for n, x in zip(("lowest", "highest"), row["range"], strict=True) if x is not None}
        )
    if figure is not None:
        marks["paper"] = figure
    low, high = facts["ci95"]
    known = [*values, *marks.values(), *(x for x in (low, high) if x is not None)]
    if not values:
        return ""
    start, end = min(known), max(known)
    pad = 0.08 * (end - start or abs(end) or 1.0)
    start, end = start - pad, end + pad
    height = 64 + 14 * min(len(values), 12) + 40

    def at(x: float) -> float:
        return LEFT + (x - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    floor = height - 36
    body = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>']
    for tick in _ticks(start, end):
        body.append(
            f'<line class="axis" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{floor}" y2="{floor + 5}"/>'
        )
        body.append(f'<text x="{at(tick):.1f}" y="{floor + 19}" text-anchor="middle">{_label(tick)}</text>')
    for k, (name, x) in enumerate(marks.items()):
        body.append(f'<line class="mark" x1="{at(x):.1f}" x2="{at(x):.1f}" y1="26" y2="{floor}"/>')
        body.append(
            f'<text class="soft" x="{at(x):.1f}" y="{14 if k % 2 == 0 else 24}" text-anchor="middle">{name}</text>'
        )
    for k, x in enumerate(values):
        y = 40 + 14 * (k % 12)
        seed = row["seeds"][k]
        body.append(
            f'<circle class="dot" cx="{at(x):.1f}" cy="{y}" r="4.5"><title>seed {seed}: {_label(x)}</title></circle>'
        )
    y = floor - 18
    if low is not None:
        body.append(f'<line class="interval" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y}" y2="{y}"/>')
    body.append(f'<circle class="mean" cx="{at(facts["mean"]):.1f}" cy="{y}" r="6"/>')
    body.append(
        f'<text class="soft" x="8" y="{y + 4}">mean</text><text class="soft" x="8" y="44">seeds</text>'
    )
    spread = "" if low is None else f", 95 % interval {_label(low)} to {_label(high)}"
    said = f"{what} over {len(values)} seeds: mean {_label(facts['mean'])}{spread}; " + ", ".join(
        f"{name} at {_label(x)}" for name, x in marks.items()
    )
    return _svg(body, height, f"{row['claim']}: {what}", said)


def curves(title: str, lines: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> str:
    """Return curves of a trial: each name a colour and a dash, each seed a thin line, their mean a thick one.

    Parameters
    ----------
    title : str
    lines : mapping of str to sequence of curves
        A curve a seed, each a sequence of ``(x, y)``.

    Returns
    -------
    str
    """
    lines = {name: [c for c in seeds if len(c) > 0] for name, seeds in lines.items()}
    points = np.array([p for seeds in lines.values() for c in seeds for p in c], dtype=float)
    points = points[np.isfinite(points).all(1)] if len(points) else points
    if not len(points):
        return ""
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    logs = [bool(a > 0 and b / a > 30) for a, b in ((x0, x1), (y0, y1))]
    height, top, floor = 300, 30, 260

    def scale(value: float, axis: int) -> float:
        low, high = ((x0, x1), (y0, y1))[axis]
        if logs[axis]:
            low, high, value = np.log10(low), np.log10(high), np.log10(max(value, low))
        return (value - low) / (high - low) if high > low else 0.5

    def at(point: Sequence[float]) -> str:
        return f"{LEFT + scale(point[0], 0) * (WIDTH - LEFT - RIGHT):.1f},{floor - scale(point[1], 1) * (floor - top):.1f}"

    body = [f'<path class="axis" fill="none" d="M{LEFT},{top}V{floor}H{WIDTH - RIGHT}"/>']
    for axis, (low, high) in enumerate(((x0, x1), (y0, y1))):
        span = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1) if logs[axis] else ()
        marks = [10.0**k for k in span if low <= 10.0**k <= high] if logs[axis] else _ticks(low, high, 4)
        for mark in marks or [low, high]:
            place = scale(mark, axis)
            if axis == 0:
                body.append(
                    f'<text x="{LEFT + place * (WIDTH - LEFT - RIGHT):.1f}" y="{floor + 18}" text-anchor="middle">{_label(mark)}</text>'
                )
            else:
                body.append(
                    f'<text x="{LEFT - 8}" y="{floor - place * (floor - top) + 4:.1f}" text-anchor="end">{_label(mark)}</text>'
                )
    said = []
    for k, (name, seeds) in enumerate(lines.items()):
        body += [
            f'<polyline class="c{k % 6} thin" points="{" ".join(map(at, c))}"/>' for c in seeds if len(c) > 1
        ]
        grid: dict[float, list[float]] = {}
        for curve in seeds:
            for x, y in curve:
                grid.setdefault(x, []).append(y)
        mean = [(x, float(np.mean(ys))) for x, ys in sorted(grid.items())]
        body.append(f'<polyline class="c{k % 6} thick" points="{" ".join(map(at, mean))}"/>')
        body += [
            f'<circle class="c{k % 6} spot" cx="{at(p).split(",")[0]}" cy="{at(p).split(",")[1]}" r="3"/>'
            for p in mean
            if len(mean) < 30
        ]
        body.append(
            f'<line class="c{k % 6} thick" x1="{LEFT + 10 + 190 * (k % 3)}" x2="{LEFT + 34 + 190 * (k % 3)}" y1="{12 + 14 * (k // 3)}" y2="{12 + 14 * (k // 3)}"/>'
        )
        body.append(f'<text x="{LEFT + 40 + 190 * (k % 3)}" y="{16 + 14 * (k // 3)}">{escape(name)}</text>')
        said.append(
            f"{name} from {_label(mean[0][1])} at {_label(mean[0][0])} to {_label(mean[-1][1])} at {_label(mean[-1][0])}"
        )
    return _svg(
        body, height, title, f"{title}; mean over {max(map(len, lines.values()))} seeds: " + "; ".join(said)
    )
