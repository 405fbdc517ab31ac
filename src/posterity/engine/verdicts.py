"""Judging: rows of values, effect and verdict from the trials of one claim at one setting."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from posterity.engine import statistics
from posterity.engine.discovery import Outline, claim_outlines
from posterity.engine.fingerprint import is_current
from posterity.engine.store import Job, Outcome, Store
from posterity.papers import papers

__all__ = ["agreement", "current", "direction", "groups", "judge", "settling", "stored_rows"]


def judge(paper: str, outline: Outline, pairs: Iterable[tuple[Job, Outcome]]) -> dict[str, Any]:
    """Return the row of one claim at one setting: values, effect, verdict.

    Parameters
    ----------
    paper : str
        The slug.
    outline : Outline
    pairs : iterable of tuple of Job and Outcome
        At least one.

    Returns
    -------
    dict
        JSON values; the fields are those that ``posterity run --json`` prints.
    """
    ordered = sorted(pairs, key=lambda pair: pair[0].seed)
    good = [(job, outcome) for job, outcome in ordered if not outcome.error]
    bad = {str(job.seed): outcome.error for job, outcome in ordered if outcome.error}
    facts, first = outline.facts, ordered[0][0]
    row: dict[str, Any] = {
        "paper": paper, "claim": outline.name, "says": facts["says"], "form": outline.form,
        "metric": facts["metric"], "better": facts.get("better", "lower" if outline.form == "bound" else "within"),
    }  # fmt: skip
    values = [outcome.value for _, outcome in good]
    verdict: str
    if outline.form == "comparison":
        arms = list(facts["arms"])
        by_arm = {arm: [value[arm] for value in values] for arm in arms}
        row["arms"] = {arm: _described(each) for arm, each in by_arm.items()}
        if values:
            row["effect"], verdict = statistics.judge_comparison(
                by_arm[arms[0]], by_arm[arms[-1]], facts["better"]
            )
        else:
            row["effect"], verdict = {"mean": None, "ci95": [None, None]}, "error"
    else:
        row["value"] = _described(values)
        if outline.form == "bound":
            row["limit"] = facts["limit"]
            verdict = statistics.judge_bound(values, facts["limit"], row["better"]) if values else "error"
        else:
            row["range"] = [facts.get("low"), facts.get("high")]
            verdict = statistics.judge_trend(values, *row["range"]) if values else "error"
    row["verdict"] = "error" if bad else verdict
    if row["verdict"] == "inconclusive" and len(values) > 1:
        if outline.form == "comparison":
            pairs_of = zip(by_arm[arms[-1]], by_arm[arms[0]], strict=True)
            seen, edges = [ours - theirs for ours, theirs in pairs_of], [0.0]
        else:
            seen, edges = values, [end for end in row["range"] if end is not None]
        row["seeds_to_settle"] = statistics.seeds_to_settle(seen, edges)
    row["seeds"] = [job.seed for job, _ in good]
    row["seconds"] = round(sum(outcome.seconds for _, outcome in ordered), 3)
    row["data"] = first.params.get("data")
    row["params"] = {name: value for name, value in first.params.items() if name != "data"}
    row["code"] = first.code
    if bad:
        row["errors"] = bad
    return row


def settling(row: dict[str, Any]) -> str:
    """Return how many seeds would settle an inconclusive row, in words; empty for others.

    Parameters
    ----------
    row : dict
        What `judge` returns.

    Returns
    -------
    str
    """
    if "seeds_to_settle" not in row:
        return ""
    count = row["seeds_to_settle"]
    many = "more than 1,000" if count is None else f"about {count:,}"
    return f"; {many} seeds would settle it, if the spread stays as seen"


def direction(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Return how effect or value moves with a parameter, in words; empty where that has no order.

    Parameters
    ----------
    rows : sequence of dict
        What `judge` returns, of one claim; at least one.
    name : str
        The parameter in which they differ.

    Returns
    -------
    str
    """
    what = "effect" if "effect" in rows[0] else "value"
    points = [(row["params"][name], row[what]["mean"], *row[what]["ci95"]) for row in rows]
    if any(isinstance(point[0], bool) or not isinstance(point[0], int | float) for point in points):
        return ""
    points = sorted(point for point in points if point[1] is not None and math.isfinite(point[1]))
    if len(points) < 2:
        return ""
    if any(point[2] is None for point in points):
        return f"{what}: whether it changes cannot be told from one seed"

    def at(point: tuple[float, ...]) -> str:
        return f"{point[1]:.4g} at {name}={point[0]:g}"

    first, last = points[0], points[-1]
    if first[3] < last[2] or last[3] < first[2]:
        return f"{what} {'rises' if first[1] < last[1] else 'falls'} from {at(first)} to {at(last)}"
    least, most = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    if least[3] < most[2]:
        return f"{what} is lowest, {at(least)}, and highest, {at(most)}; the ends do not differ beyond the intervals"
    return f"{what}: no change beyond the intervals from {name}={first[0]:g} to {name}={last[0]:g}"


def agreement(parity: dict[str, Any]) -> str:
    """Return how closely a method agrees with other code, in words.

    Parameters
    ----------
    parity : dict
        ``against``, ``values`` and ``largest`` of the evidence.

    Returns
    -------
    str
    """
    return f"{parity['values']:,} values of {parity['against']}, at most {parity['largest']:.2g} apart"


def _described(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "ci95": [None, None], "values": []}
    return {**statistics.summary(values), "values": values}


def groups(pairs: Iterable[tuple[Job, Outcome]]) -> list[list[tuple[Job, Outcome]]]:
    """Return trials grouped by claim, parameters, device and code.

    Parameters
    ----------
    pairs : iterable of tuple of Job and Outcome

    Returns
    -------
    list of list of tuple of Job and Outcome
    """
    found: dict[str, list[tuple[Job, Outcome]]] = {}
    for job, outcome in pairs:
        key = json.dumps([job.paper, job.claim, job.params, job.device, job.code], sort_keys=True)
        found.setdefault(key, []).append((job, outcome))
    return list(found.values())


def current(slugs: Iterable[str] | None, store: Store) -> tuple[list[list[tuple[Job, Outcome]]], int]:
    """Return the groups of stored trials made by the code as it is, and how many trials were not.

    Parameters
    ----------
    slugs : iterable of str, optional
        By default every paper.
    store : Store

    Returns
    -------
    tuple of list of list of tuple of Job and Outcome, and int
    """
    kept, stale = [], 0
    for group in groups(store.all(slugs)):
        job = group[0][0]
        paper = papers().get(job.paper)
        names = {outline.name for outline in claim_outlines(paper)} if paper and paper.implemented else set()
        if paper and job.claim in names and is_current(job.code, paper.claims, job.claim):
            kept.append(group)
        elif paper:
            stale += len(group)
    return kept, stale


def stored_rows(slugs: Iterable[str] | None, store: Store) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of stored trials made by the code as it is, and how many trials were not.

    Parameters
    ----------
    slugs : iterable of str, optional
        By default every paper.
    store : Store

    Returns
    -------
    tuple of list of dict and int
    """
    kept, stale = current(slugs, store)
    rows = []
    for group in kept:
        paper = papers()[group[0][0].paper]
        outline = next(o for o in claim_outlines(paper) if o.name == group[0][0].claim)
        rows.append(judge(paper.slug, outline, group))
    return rows, stale
