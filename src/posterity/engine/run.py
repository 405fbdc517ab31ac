"""From a paper's name to verdicts: plan trials, run what is missing, judge what is there."""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from posterity.engine import statistics
from posterity.engine.discovery import Outline, claim_outlines, entry_modules, load_claims
from posterity.engine.fingerprint import fingerprint
from posterity.engine.store import Job, Outcome, Store
from posterity.papers import Paper, papers

__all__ = ["Plan", "advice", "compare", "execute", "judge", "plan_claims", "stored_rows"]

A_WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Plan:
    """The trials of one claim at one setting."""

    paper: Paper
    outline: Outline
    params: dict[str, Any]
    jobs: list[Job]
    note: str = ""


def plan_claims(
    paper: Paper, *, claim: str | None = None, seeds: int = 5, first_seed: int = 0, data: str | None = None,
    target: str | None = None, settings: dict[str, str] | None = None, device: str = "cpu",
) -> tuple[list[Plan], list[str]]:  # fmt: skip
    """Return the plans of a paper's claims, all of their input checked.

    Parameters
    ----------
    paper : Paper
    claim : str, optional
        One claim; by default each that takes what is set.
    seeds, first_seed : int
        How many, and the first.
    data, target : str, optional
        Values of the parameters of these names.
    settings : dict of str to str, optional
        Other parameters, as text.
    device : str, default="cpu"

    Returns
    -------
    tuple of list of Plan and list of str
        The plans, and the names of claims left out because they do not take what is set.

    Raises
    ------
    ValueError
        For an unknown claim or parameter, a value of another type, or data that does not
        fit or cannot be read.
    """
    claims = load_claims(paper)
    if claim is not None and claim not in claims:
        raise ValueError(f"claim of {paper.slug} must be one of {', '.join(claims)}, got {claim!r}")
    given = dict(settings or {})
    given |= {name: value for name, value in (("data", data), ("target", target)) if value is not None}
    chosen = {claim: claims[claim]} if claim else claims
    taking = {name: each for name, each in chosen.items() if set(given) <= set(each.parameters)}
    if not taking:
        name, each = next(iter(chosen.items()))
        missing = next(key for key in given if key not in each.parameters)
        raise ValueError(f"{paper.slug} {name} takes no {missing!r}, it takes: {', '.join(each.parameters)}")
    plans = []
    for name, each in taking.items():
        params = each.defaults
        for key, text in given.items():
            params[key] = typed(f"{name}: {key}", text, each.parameters[key].annotation)
        note = _check_data(each.parameters, params) if "data" in params else ""
        limit = each.time_limit if params == each.defaults else A_WEEK
        jobs = [
            Job(
                paper.slug,
                name,
                f"{paper.claims}:{name}",
                params,
                seed,
                fingerprint(paper.claims, name),
                device,
                limit,
            )
            for seed in range(first_seed, first_seed + seeds)
        ]
        outline = next(outline for outline in claim_outlines(paper) if outline.name == name)
        plans.append(Plan(paper, outline, params, jobs, note))
    return plans, [name for name in chosen if name not in taking]


def _check_data(parameters: dict[str, inspect.Parameter], params: dict[str, Any]) -> str:
    from posterity.lab.data import check, resolve

    annotation = parameters["data"].annotation
    options = {"target": params["target"]} if "target" in params else {}
    note = check(annotation, params["data"], **options)
    if isinstance(path := resolve(annotation, params["data"]), Path):
        params["data"] = str(path.resolve())  # workers may run elsewhere, and the store outlives this folder
    return note


def typed(name: str, text: str, annotation: Any) -> Any:
    """Return text as the value that an annotation asks for.

    Parameters
    ----------
    name : str
        For the message.
    text : str
    annotation : Any
        ``int``, ``float``, ``bool``, ``str``, a ``Literal``, a tuple or list of these, an
        ``Annotated`` of one, or a union with None.

    Returns
    -------
    Any
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return typed(name, text, inner[0])
    if origin in (Union, types.UnionType):
        if type(None) in inner and text.lower() == "none":
            return None
        return typed(name, text, next(arg for arg in inner if arg is not type(None)))
    if origin is Literal:
        by_text = {str(value): value for value in inner}
        if text not in by_text:
            raise ValueError(f"{name} must be one of {', '.join(by_text)}, got {text!r}")
        return by_text[text]
    if origin in (tuple, list):
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        return [typed(name, part.strip(), inner[0]) for part in parts]
    if annotation is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() in ("true", "yes", "1")
    if annotation in (int, float):
        try:
            return annotation(text.replace("_", ""))
        except ValueError:
            noun = "an integer" if annotation is int else "a number"
            raise ValueError(f"{name} must be {noun}, got {text!r}") from None
    return text


def execute(
    jobs: Iterable[Job], store: Store, *, on: str = "local", workers: int | None = None, fresh: bool = False
) -> Iterator[tuple[Job, Outcome, bool]]:
    """Run what is not stored, keep it, and yield every job with its outcome.

    Parameters
    ----------
    jobs : iterable of Job
    store : Store
    on : str, default="local"
        ``local``, ``ray``, or ``ray://HOST:PORT``.
    workers : int, optional
    fresh : bool, default=False
        Run stored trials anew.

    Yields
    ------
    tuple of Job, Outcome and bool
        The last says whether it was stored before; stored ones come first.
    """
    jobs = list({job.key: job for job in jobs}.values())
    if fresh:
        store.forget(jobs)
    known = store.get(jobs)
    for job in jobs:
        if job.key in known:
            yield job, known[job.key], True
    missing = [job for job in jobs if job.key not in known]
    if not missing:
        return
    if on == "local":
        from posterity.engine.local import run_local

        done = run_local(missing, workers=workers)
    else:
        from posterity.engine.cluster import run_on_ray

        done = run_on_ray(missing, address=None if on == "ray" else on, workers=workers)
    for job, outcome in done:
        store.put(job, outcome)
        yield job, outcome, False


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
    row["seeds"] = [job.seed for job, _ in good]
    row["seconds"] = round(sum(outcome.seconds for _, outcome in ordered), 3)
    row["data"] = first.params.get("data")
    row["params"] = {name: value for name, value in first.params.items() if name != "data"}
    row["code"] = first.code
    if bad:
        row["errors"] = bad
    return row


def _described(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "ci95": [None, None], "values": []}
    return {**statistics.summary(values), "values": values}


def groups(pairs: Iterable[tuple[Job, Outcome]]) -> list[list[tuple[Job, Outcome]]]:
    """Return trials grouped by claim, parameters, device and code."""
    found: dict[str, list[tuple[Job, Outcome]]] = {}
    for job, outcome in pairs:
        key = json.dumps([job.paper, job.claim, job.params, job.device, job.code], sort_keys=True)
        found.setdefault(key, []).append((job, outcome))
    return list(found.values())


def current(slugs: Iterable[str] | None, store: Store) -> tuple[list[list[tuple[Job, Outcome]]], int]:
    """Return the groups of stored trials made by the code as it is, and how many trials were not."""
    kept, stale = [], 0
    for group in groups(store.all(slugs)):
        job = group[0][0]
        paper = papers().get(job.paper)
        names = {outline.name for outline in claim_outlines(paper)} if paper and paper.implemented else set()
        if paper and job.claim in names and job.code == fingerprint(paper.claims, job.claim):
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


def compare(
    task: str, *, data: str | None = None, target: str | None = None, seeds: int = 5, first_seed: int = 0,
    device: str = "cpu",
) -> tuple[list[Job], Callable[[Iterable[tuple[Job, Outcome]]], list[dict[str, Any]]], str]:  # fmt: skip
    """Return the jobs of a comparison, the function that ranks their outcomes, and a note on the data.

    Parameters
    ----------
    task : str
        One of `posterity.lab.tasks.TASKS`.
    data, target : str, optional
    seeds, first_seed : int
    device : str

    Returns
    -------
    tuple of list of Job, callable and str
    """
    from importlib import import_module

    from posterity.lab.data import check, resolve
    from posterity.lab.tasks import TASKS, entries

    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    question = TASKS[task]
    for module in entry_modules(task):
        import_module(module)
    homes = {name: each.fit.__module__ for name, each in entries(task).items()}
    spec = data or question.data
    options = question.options(target)
    note = check(question.kind, spec, **options)
    found = resolve(question.kind, spec)
    source = ""  # the module whose import registers a generated set
    if isinstance(found, Path):
        spec = str(found.resolve())
    elif callable(found):
        source = found.__module__
    jobs = []
    for name, home in homes.items():
        params = {"task": task, "entry": name, "home": home, "source": source, "data": spec, "target": target}
        code = "".join(fingerprint(module) for module in (home, "posterity.lab.tasks", source) if module)
        jobs += [
            Job("", f"compare {task}", "posterity.lab.tasks:score_entry", params, seed, code, device, A_WEEK)
            for seed in range(first_seed, first_seed + seeds)
        ]
    return (
        jobs,
        lambda pairs: _rank(question, list(pairs), {name: entries(task)[name].paper for name in homes}),
        note,
    )


def _rank(question: Any, pairs: list[tuple[Job, Outcome]], papers_of: dict[str, str]) -> list[dict[str, Any]]:
    """Return entries from best to worst; two whose paired difference has 0 inside are tied."""
    values: dict[str, dict[int, float]] = {name: {} for name in papers_of}
    errors: dict[str, str] = {}
    for job, outcome in pairs:
        if outcome.error:
            errors[job.params["entry"]] = outcome.error
        else:
            values[job.params["entry"]][job.seed] = outcome.value
    sign = 1 if question.better == "lower" else -1
    whole = [name for name in values if name not in errors and values[name]]
    whole.sort(key=lambda name: sign * statistics.summary(list(values[name].values()))["mean"])
    rows: list[dict[str, Any]] = []
    leader, rank = "", 0
    for place, name in enumerate(whole, start=1):
        mine = [values[name][seed] for seed in sorted(values[name])]
        tied = False
        if leader:
            theirs = [values[leader][seed] for seed in sorted(values[leader])]
            tied = statistics.judge_comparison(mine, theirs, question.better)[1] != "holds"
        if not tied:
            leader, rank = name, place
        described = {**statistics.summary(mine), "values": mine}
        rows.append({"rank": rank, "entry": name, "paper": papers_of[name] or None, "metric": question.metric,
                     "better": question.better, **described})  # fmt: skip
    for row in rows:
        row["tied"] = sum(other["rank"] == row["rank"] for other in rows) > 1
    rows += [{"rank": None, "entry": name, "paper": papers_of[name] or None, "metric": question.metric,
              "better": question.better, "error": text} for name, text in errors.items()]  # fmt: skip
    return rows


def advice(rows: list[dict[str, Any]]) -> str:
    """Return whether an ordinary choice is enough on this data, in a sentence.

    Parameters
    ----------
    rows : list of dict
        A ranking, as the function from `compare` returns it.

    Returns
    -------
    str
    """
    ordinary = next((row for row in rows if row["rank"] and not row["paper"]), None)
    if ordinary is None:
        return "No ordinary choice ran, so there is nothing to compare with."
    first = ordinary["entry"]
    if ordinary["rank"] == 1:
        seeds = len(ordinary["values"])
        return f"{first}, an ordinary choice, is enough as far as {seeds} seeds tell: nothing is shown to be better."
    better = [row["entry"] for row in rows if row["rank"] and row["rank"] < ordinary["rank"]]
    return f"{first}, the best ordinary choice, is not enough: {', '.join(better)} did better."
