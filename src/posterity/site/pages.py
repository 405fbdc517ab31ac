"""Pages: one self-contained HTML file a paper, and an index that filters and searches."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from posterity.engine.discovery import claim_outlines
from posterity.engine.statistics import describe_range
from posterity.engine.store import Job, Outcome
from posterity.engine.verdicts import agreement, judge, settling
from posterity.papers import papers
from posterity.site import figures

__all__ = ["write_report"]

Group = list[tuple[Job, Outcome]]


def write_report(groups: Iterable[Group], out: Path) -> Path:
    """Write the pages of stored trials into a folder and return the index's path.

    Parameters
    ----------
    groups : iterable of list of (Job, Outcome)
        One a claim and setting.
    out : Path

    Returns
    -------
    Path
    """
    pages = _environment()
    out.mkdir(parents=True, exist_ok=True)
    by_paper: dict[str, list[Group]] = {}
    for group in groups:
        by_paper.setdefault(group[0][0].paper, []).append(group)
    rows = []
    for slug, mine in sorted(by_paper.items()):
        paper = papers()[slug]
        claims = [_claim(slug, group) for group in mine]
        parity = paper.evidence()["parity"]
        page = pages.get_template("paper.html").render(
            paper=paper, claims=claims, parity=parity and agreement(parity), environment=_versions()
        )
        (out / f"{slug}.html").write_text(page, encoding="utf-8")
        for claim in claims:
            row = claim["row"]
            facts = row.get("effect") or row["value"]
            effect = f"{_number(facts['mean'])} {_interval(facts['ci95'])}"
            text = " ".join([slug, paper.title, paper.domain, row["says"], *paper.tags])
            rows.append({"slug": slug, "says": row["says"], "verdict": row["verdict"], "effect": effect,
                         "domain": paper.domain, "text": text})  # fmt: skip
    index = out / "index.html"
    index.write_text(
        pages.get_template("index.html").render(
            rows=rows, n_papers=len(by_paper), domains=sorted({row["domain"] for row in rows})
        ),
        encoding="utf-8",
    )
    return index


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("posterity.site"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    made.filters["number"] = _number
    made.filters["interval"] = _interval
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(ends: list[float | None]) -> str:
    return "-" if ends[0] is None else f"[{_number(ends[0])}, {_number(ends[1])}]"


def _claim(slug: str, group: Group) -> dict[str, Any]:
    """Return what a page shows of one claim at one setting."""
    outline = next(o for o in claim_outlines(papers()[slug]) if o.name == group[0][0].claim)
    row = judge(slug, outline, group)
    row.setdefault("errors", {})
    lines = list(row.get("arms", {}).items()) or [("value", row["value"])]
    if row["form"] == "comparison":
        arms = list(row["arms"])
        pairs = zip(row["arms"][arms[-1]]["values"], row["arms"][arms[0]]["values"], strict=True)
        lines.append((f"{arms[-1]} less {arms[0]}", {**row["effect"], "values": [m - b for m, b in pairs]}))
        side = "left of zero" if row["better"] == "lower" else "right of zero"
        caption = f"{row['metric']}, paired difference; the claim holds when the interval lies {side}."
    elif row["form"] == "bound":
        side = "below" if row["better"] == "lower" else "above"
        caption = f"{row['metric']}; the claim holds when every seed stays {side} the limit {row['limit']:g}."
    else:
        caption = f"{row['metric']}; the claim holds when the interval lies {describe_range(row['range'])}."
    good = [outcome for _, outcome in sorted(group, key=lambda pair: pair[0].seed) if not outcome.error]
    names = list(dict.fromkeys(name for outcome in good for name in outcome.curves))
    # curves named after arms share a chart, as do those named "chart: line"
    charts: dict[str, dict[str, list[Any]]] = {}
    for name in names:
        chart, sign, line = ("by arm", ":", name) if name in row.get("arms", {}) else name.partition(": ")
        seeds = [outcome.curves.get(name, []) for outcome in good]
        charts.setdefault(chart, {})[line if sign else chart] = seeds
    recorded = list(dict.fromkeys(name for outcome in good for name in outcome.records))
    records = [
        (name, float(np.mean([o.records[name] for o in good if name in o.records]))) for name in recorded
    ]
    return {
        "row": row, "lines": lines, "caption": caption, "settling": settling(row), "where": outline.facts.get("where", ""),
        "figure": Markup(figures.dots(row, outline.facts.get("figure"))), "doc": " ".join(outline.doc.split()),
        "charts": [(chart, Markup(figures.curves(chart, lines))) for chart, lines in charts.items()], "records": records,
    }  # fmt: skip


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}", platform.platform(terse=True), platform.machine()]
    for name in ("posterity", "torch", "numpy", "scipy", "scikit-learn"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
