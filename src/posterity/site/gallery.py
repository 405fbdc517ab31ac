"""The site, from records and evidence: the gallery, a page a paper, a page a task, ``llms.txt``."""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from posterity.engine.compare import curve_point
from posterity.engine.discovery import claim_outlines
from posterity.papers import ROOT, Paper, papers
from posterity.site import figures, sources
from posterity.site.pages import card, claim_view, environment, write_gallery, write_paper

__all__ = ["write_site"]


def write_site(out: Path) -> Path:
    """Write the site into a folder and return its front page's path.

    A manual that Sphinx wrote into ``manual`` of that folder before is linked.

    Parameters
    ----------
    out : Path

    Returns
    -------
    Path
    """
    links = [("Papers", "index.html"), ("Tasks", "tasks/index.html")]
    manual = (out / "manual" / "index.html").is_file()
    pages = environment([*links, ("Manual", "manual/index.html")] if manual else links)
    cards = []
    for paper in papers().values():
        shipped = paper.evidence()
        rows = {row["claim"]: row for row in shipped["claims"]}
        claims = [_claim(paper, outline, rows.get(outline.name)) for outline in claim_outlines(paper)]
        write_paper(pages, paper, claims, _made_with(shipped), out, "../manual/" if manual else "")
        cards.append(card(paper, [claim["row"] for claim in claims if claim["row"]]))
    _write_tasks(pages, out)
    (out / "llms.txt").write_text(_for_assistants(manual), encoding="utf-8")
    ready = sum(paper.implemented for paper in papers().values())
    title = f"Methods from {len(cards)} papers, each with its claim as a program"
    intro = (
        f"Parts for PyTorch and scikit-learn; {ready} can be used now. Their papers' claims were measured on data "
        "that ships: rerun them, or run them on your own."
    )
    return write_gallery(pages, cards, out, title, intro)


def _claim(paper: Paper, outline: Any, row: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a page shows of a claim and its evidence, which keeps curves and pictures of one seed."""
    stored = row or {}
    curves = {name: [curve] for name, curve in stored.get("curves", {}).items()}
    pictures = {name: {stored["seeds"][0]: found} for name, found in stored.get("pictures", {}).items()}
    return claim_view(paper, outline, row, curves, stored.get("records", {}), pictures)


def _made_with(stored: dict[str, Any]) -> list[str]:
    if "python" not in stored:
        return []
    return [
        f"Python {stored['python']}",
        *(f"{name} {version}" for name, version in stored["libraries"].items()),
    ]


def _write_tasks(pages: Any, out: Path) -> None:
    """Write a page a task, with its comparison where one is stored, and the list of them."""
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    here = papers().values()
    for task in sources.questions():
        path = ROOT / "evidence" / "tasks" / f"{task.name}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        page = pages.get_template("task.html").render(
            task=task, stored=stored, entered=[p for p in here if p.implemented and task in sources.tasks_of(p)],
            figure=Markup(figures.ranking(stored["rows"])) if stored else "",
            charts=_charts(stored["rows"]) if stored else [],
            beside=[name for name in stored["rows"][0].get("figures", {}) if not curve_point(name)] if stored else [],
            made_with=_made_with(stored) if stored else [], root="../",
        )  # fmt: skip
        (out / "tasks" / f"{task.name}.html").write_text(page, encoding="utf-8")
    page = pages.get_template("tasks.html").render(tasks=sources.questions(), root="../")
    (out / "tasks" / "index.html").write_text(page, encoding="utf-8")


def _charts(rows: list[dict[str, Any]]) -> list[Markup]:
    """Return the curves that figures are points of, of six entries at a time, in their order."""
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in row.get("figures", {}).items():
            if place := curve_point(name):
                up, across, x = place
                lines.setdefault((up, across), {}).setdefault(row["entry"], []).append((x, value))
    return [
        Markup(figures.curves(f"{up} by {across}", {name: [curve] for name, curve in some}, across, up))
        for (up, across), curves in lines.items()
        for some in (list(curves.items())[k : k + 6] for k in range(0, len(curves), 6))
    ]


HEAD = """# Posterity

> Methods from conference papers as parts that drop into PyTorch and scikit-learn programs, each with its paper's claim as a program: on the data that ships, or on your own.

Install: `pip install posterity`, or `pip install "posterity[all]"` with what every domain needs. Then, in a terminal (each takes `--json` where it prints results):

- `posterity search WORDS`: the methods for a problem, in the words of who has it; typos are forgiven
- `posterity show SLUG`: what a method is for, the lines that use it, what it needs, its claims and verdicts
- `posterity run SLUG --claim NAME --data FILE`: a claim over paired seeds, on the data that ships or on your own
- `posterity compare TASK --data FILE`: every method that does a task, ranked, with intervals
- `posterity vendor SLUG`: a method as one file; `posterity cite SLUG`: BibTeX

A verdict is "holds" when the 95 % interval of the paired difference over seeds lies on the claimed side, "fails" when it lies on the other, else "inconclusive".
"""


def _for_assistants(manual: bool) -> str:
    """Return the text of ``llms.txt``: what this is, how it is used, a line a paper."""
    lines = [HEAD]
    if manual:
        lines += ["## Docs", "", "- [Manual](manual/index.html): start, use, claims, data, API by domain", ""]
    lines += ["## Tasks", ""]
    lines += [
        f"- [{task.name}](tasks/{task.name}.html): {task.says} `{task.command}`"
        for task in sources.questions()
    ]
    for heading, ready in (("Papers that can be used now", True), ("Optional", False)):
        lines += ["", f"## {heading}", ""]
        lines += [
            f"- [{paper.slug}](papers/{paper.slug}.html): {paper.summary} ({paper.domain}{'' if ready else '; not implemented yet'})"
            for paper in papers().values()
            if paper.implemented == ready
        ]
    return "\n".join(lines) + "\n"
