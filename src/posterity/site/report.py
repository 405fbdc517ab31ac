"""The report: pages of stored trials, and the gallery of their papers."""

import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from posterity.engine.discovery import claim_outlines
from posterity.engine.store import Job, Outcome
from posterity.engine.verdicts import direction, judge
from posterity.papers import papers
from posterity.site import figures
from posterity.site.pages import card, claim_view, environment, write_gallery, write_paper

__all__ = ["write_report"]

Group = list[tuple[Job, Outcome]]


def write_report(groups: Iterable[Group], out: Path) -> Path:
    """Write the pages of stored trials into a folder and return the first page's path.

    Parameters
    ----------
    groups : iterable of list of (Job, Outcome)
        One a claim and setting.
    out : Path

    Returns
    -------
    Path
    """
    pages = environment([("Results", "index.html")])
    by_paper: dict[str, list[Group]] = {}
    for group in groups:
        by_paper.setdefault(group[0][0].paper, []).append(group)
    cards, machine = [], _machine()
    for slug, mine in by_paper.items():
        claims = [_claim(group) for group in mine]
        _add_sweeps(mine, claims)
        write_paper(pages, papers()[slug], claims, machine, out)
        cards.append(card(papers()[slug], [claim["row"] for claim in claims]))
    n_claims = sum(map(len, by_paper.values()))
    intro = f"{n_claims} claims of {len(cards)} papers, measured on this machine over paired seeds."
    return write_gallery(pages, cards, out, "Results", intro)


def _claim(group: Group) -> dict[str, Any]:
    """Return what a page shows of the trials of one claim at one setting."""
    job = group[0][0]
    outline = next(o for o in claim_outlines(papers()[job.paper]) if o.name == job.claim)
    good = [outcome for _, outcome in sorted(group, key=lambda pair: pair[0].seed) if not outcome.error]
    tracked = dict.fromkeys(name for outcome in good for name in outcome.curves)
    recorded = dict.fromkeys(name for outcome in good for name in outcome.records)
    records = {}
    for name in recorded:
        values = [outcome.records[name] for outcome in good if name in outcome.records]
        records[name] = sum(values) / len(values)
    curves = {name: [outcome.curves.get(name, []) for outcome in good] for name in tracked}
    pictures: dict[str, dict[int, list[str]]] = {}
    for each, outcome in group:
        for name, picture in outcome.pictures.items():
            pictures.setdefault(name, {})[each.seed] = picture
    row = judge(job.paper, outline, group)
    return claim_view(papers()[job.paper], outline, row, curves, records, pictures)


def _add_sweeps(groups: list[Group], claims: list[dict[str, Any]]) -> None:
    """Put a chart of settings of a claim that differ in one number above the first of them."""
    along: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for group, claim in zip(groups, claims, strict=True):
        job = group[0][0]
        for name, value in job.params.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = json.dumps({**job.params, name: None}, sort_keys=True)
                along.setdefault((name, job.claim, job.device, job.code, others), []).append(claim)
    for (name, *_), found in along.items():
        rows = [claim["row"] for claim in found]
        if chart := figures.sweep(name, rows):
            said = direction(rows, name)
            judged = "every seed lies" if rows[0]["form"] == "bound" else "the interval lies"
            caption = (
                f"{said[:1].upper()}{said[1:]}. Blue dots are seeds, black ones their mean, bars its 95 % "
                f"interval; the claim holds where {judged} on the shaded side."
            )
            found[0]["sweeps"].append((name, caption, Markup(chart)))


def _machine() -> list[str]:
    found = [f"Python {platform.python_version()}", platform.platform(terse=True), platform.machine()]
    for name in ("posterity", "torch", "numpy", "scipy", "scikit-learn"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
