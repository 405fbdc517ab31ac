"""Pages that report and site share: a paper's, from rows and curves, and the gallery of cards.

Each is one HTML file that asks for nothing from outside; the gallery has its index of words in
a script beside it, since that is read only when somebody types.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from posterity.engine.discovery import Outline
from posterity.engine.statistics import describe_range
from posterity.engine.verdicts import agreement, settling
from posterity.papers import DOMAINS, Paper
from posterity.papers.search import index
from posterity.site import figures, sources

__all__ = ["card", "claim_view", "environment", "write_gallery", "write_paper"]

VERDICTS = {"holds": "hold", "inconclusive": "inconclusive", "fails": "fail", "error": "with an error"}
Curves = Mapping[str, Sequence[Sequence[Sequence[float]]]]
Pictures = Mapping[str, Mapping[int, Sequence[str]]]


def environment(links: Iterable[tuple[str, str]]) -> Environment:
    """Return what fills the templates; ``links`` are name and address of the pages above all others."""
    made = Environment(
        loader=PackageLoader("posterity.site"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": _number, "interval": _interval, "prose": _prose}
    made.globals |= {"links": list(links), "root": ""}
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(ends: list[float | None]) -> str:
    return "-" if ends[0] is None else f"{_number(ends[0])} to {_number(ends[1])}"


def _prose(text: str) -> Markup:
    """Return text as HTML, what stands in backticks as code."""
    return Markup(re.sub(r"(`+)(.+?)\1", r"<code>\2</code>", str(escape(text)), flags=re.DOTALL))


def claim_view(
    paper: Paper,
    outline: Outline,
    row: dict[str, Any] | None,
    curves: Curves,
    records: Mapping[str, float],
    pictures: Pictures,
) -> dict[str, Any]:
    """Return what a page shows of one claim at one setting.

    Parameters
    ----------
    paper : Paper
    outline : Outline
    row : dict, optional
        As ``posterity run --json`` prints it; None for a claim that is not measured yet.
    curves : mapping of str to sequence of curves
        What the trials tracked: a curve a seed.
    records : mapping of str to float
        What they recorded, the mean over seeds.
    pictures : mapping of str to mapping of int
        What they pictured: by name and seed, a PNG file in base64 and what is seen on it.

    Returns
    -------
    dict
    """
    facts = outline.facts
    view: dict[str, Any] = {
        "name": outline.name, "says": facts["says"], "where": facts.get("where", ""), "row": row,
        "sweeps": [], "doc": outline.doc.split("\n\n"), "own": sources.own_data(paper, outline),
    }  # fmt: skip
    if row is None:
        return view
    lines = list(row.get("arms", {}).items()) or [("value", row["value"])]
    if row["form"] == "comparison":
        arms = list(row["arms"])
        pairs = zip(row["arms"][arms[-1]]["values"], row["arms"][arms[0]]["values"], strict=True)
        lines.append((f"{arms[-1]} less {arms[0]}", {**row["effect"], "values": [m - b for m, b in pairs]}))
        side = "left of zero" if row["better"] == "lower" else "right of zero"
        caption = f"Paired differences: the claim holds when the interval lies {side}."
    elif row["form"] == "bound":
        side = "below" if row["better"] == "lower" else "above"
        caption = f"The claim holds when every seed stays {side} the limit {row['limit']:g}."
    else:
        caption = f"The claim holds when the interval lies {describe_range(row['range'])}."
    return {
        **view, "lines": lines, "caption": caption, "settling": settling(row),
        "reason": "" if row["verdict"] == "holds" else facts.get("reason", ""), "errors": row.get("errors", {}),
        "figure": Markup(figures.dots(row, facts.get("figure"))), "records": list(records.items()),
        "charts": _charts(row, curves), "pictures": _pictures(pictures), "settings": _settings(row["params"], outline.defaults),
    }  # fmt: skip


def _settings(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return what is set apart from the defaults, each as it is written after ``--set``."""
    found = {
        name: value for name, value in params.items() if json.dumps(value) != json.dumps(defaults.get(name))
    }
    texts = {name: ",".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in found.items()}
    return [f"{name}={text}" for name, text in texts.items() if name != "target"]


def _pictures(pictures: Pictures) -> list[tuple[str, str, str]]:
    """Return caption, file and text of each picture, seed by seed, so that arms stand below each other."""
    seeds = sorted({seed for found in pictures.values() for seed in found})
    return [
        (f"{name}, seed {seed}", found[seed][0], f"{name}, seed {seed}: {found[seed][1]}")
        for seed in seeds
        for name, found in pictures.items()
        if seed in found
    ]


def _charts(row: dict[str, Any], curves: Curves) -> list[tuple[str, Markup]]:
    """Return what was tracked as charts, each with its caption."""
    begins = [name.partition(", ")[0] for name in curves]
    charts: dict[str, dict[str, Any]] = {}
    for name, seeds in curves.items():
        # curves named after arms share a chart, as do those named "chart: line", and "chart, line" of several
        begin, sign, end = name.partition(": ")
        if name in row.get("arms", {}):
            begin, end = "", name
        elif not sign and begins.count(name.partition(", ")[0]) > 1:
            begin, _, end = name.partition(", ")
        charts.setdefault(begin, {})[end or name] = seeds
    drawn = []
    for chart, lines in charts.items():
        up, across = re.fullmatch(r"(.*?)(?:,? by (.+))?", chart).groups("")  # type: ignore[union-attr]
        several = max(map(len, lines.values())) > 1
        how = (
            "thin lines are seeds, the thick one their mean"
            if several
            else "seed " + str((row["seeds"] or ["-"])[0])
        )
        # named with the claim, since two of them may track the same
        figure = figures.curves(f"{row['claim']}, {chart or 'by arm'}", lines, across, up)
        drawn.append((f"What the trials tracked, {chart or 'by arm'}: {how}.", Markup(figure)))
    return drawn


def write_paper(
    pages: Environment, paper: Paper, claims: list[dict[str, Any]], made_with: list[str], out: Path, manual: str = ""
) -> None:  # fmt: skip
    """Write the page of a paper, ``papers/<slug>.html``.

    Parameters
    ----------
    pages : Environment
    paper : Paper
    claims : list of dict
        What `claim_view` returns.
    made_with : list of str
        Versions and machine.
    out : Path
        The folder of the gallery.
    manual : str, default=""
        Where the manual is, seen from there, empty without one.
    """
    shipped = paper.evidence()
    counts = _counts([claim["row"] for claim in claims if claim["row"]])
    page = pages.get_template("paper.html").render(
        paper=paper, claims=claims, counts=counts, parity=shipped["parity"] and agreement(shipped["parity"]),
        speed=shipped.get("speed", []), api=sources.api(paper) if paper.implemented else [],
        tasks=sources.tasks_of(paper) if paper.implemented else [], made_with=made_with, manual=manual, root="../",
    )  # fmt: skip
    (out / "papers").mkdir(parents=True, exist_ok=True)
    (out / "papers" / f"{paper.slug}.html").write_text(page, encoding="utf-8")


def _counts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each verdict that there is, with how many claims have it in words."""
    found = [row["verdict"] for row in rows]
    return [
        (verdict, f"{count} {verdict if count == 1 and verdict != 'error' else several}")
        for verdict, several in VERDICTS.items()
        if (count := found.count(verdict))
    ]


def card(paper: Paper, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the gallery shows of a paper: its facts, its verdicts, the picture of the first."""
    fits = {
        "now": paper.implemented, "no-labels": paper.labels.startswith("not needed"),
        "no-gpu": paper.implemented and paper.gpu == "not needed", "no-extra": paper.implemented and not paper.extra,
    }  # fmt: skip
    picture = next(filter(None, map(figures.small, rows)), "")
    return {
        "paper": paper, "counts": _counts(rows), "picture": Markup(picture), "kinds": _kinds(paper),
        "fits": [name for name, does in fits.items() if does],
    }  # fmt: skip


def _kinds(paper: Paper) -> list[str]:
    return [kind.replace(" ", "-") for kind in paper.kind.split(", ") if kind]


def write_gallery(pages: Environment, cards: list[dict[str, Any]], out: Path, title: str, intro: str) -> Path:
    """Write ``index.html`` of these cards, those that can be used first, and ``search.js``.

    Parameters
    ----------
    pages : Environment
    cards : list of dict
        What `card` returns.
    out : Path
    title, intro : str

    Returns
    -------
    Path
        The page.
    """
    order = {domain: number for number, domain in enumerate(DOMAINS)}
    cards = sorted(
        cards,
        key=lambda each: (
            not each["paper"].implemented, order.get(each["paper"].domain, len(order)), each["paper"].slug
        ),
    )  # fmt: skip
    domains = [d for d in order if any(each["paper"].domain == d for each in cards)]
    kinds = sorted({kind for each in cards for kind in each["kinds"]})
    verdicts = [v for v in VERDICTS if any(v in dict(each["counts"]) for each in cards)]
    page = pages.get_template("index.html").render(
        cards=cards, domains=domains, kinds=kinds, verdicts=verdicts, title=title, intro=intro
    )
    words = json.dumps(index(), separators=(",", ":"), ensure_ascii=False)
    code = pages.get_template("search.js").render(index=Markup(words))
    out.mkdir(parents=True, exist_ok=True)
    (out / "search.js").write_text(code, encoding="utf-8")
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
