"""Comparing: every entry of a task on one set of data, ranked, with ties and advice."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from posterity.claims import refuse
from posterity.engine import statistics
from posterity.engine.discovery import entry_modules
from posterity.engine.fingerprint import fingerprint, reader
from posterity.engine.plan import A_WEEK, typed
from posterity.engine.store import Job, Outcome

__all__ = ["advice", "compare", "curve_point"]


def compare(
    task: str, *, data: str | None = None, target: str | None = None, seeds: int = 5, first_seed: int = 0,
    settings: Mapping[str, str] | None = None, device: str = "cpu",
) -> tuple[list[Job], Callable[[Iterable[tuple[Job, Outcome]]], list[dict[str, Any]]], str]:  # fmt: skip
    """Return the jobs of a comparison, the function that ranks their outcomes, and a note on the data.

    Parameters
    ----------
    task : str
        Its name.
    data, target : str, optional
    seeds, first_seed : int
    settings : mapping of str to str, optional
        Of the question, as text.
    device : str

    Returns
    -------
    tuple of list of Job, callable and str
    """
    from posterity.lab.data import absolute, check, kind_of, resolve
    from posterity.lab.tasks import entries, get_task

    question = get_task(task)
    for module in entry_modules(task):
        import_module(module)
    asked = _settings(question, settings or {})
    fits = {
        name: each.fit for name, each in entries(task).items()
        if all(asked[setting] == value for setting, value in each.where.items())
    }  # fmt: skip
    spec = data or question.data
    options = question.options(target)
    needs = partial(question.needs, **asked) if question.needs else None
    note = check(question.kind, spec, needs, **options)
    found = resolve(question.kind, spec)
    source = ""  # the module whose import registers a generated set
    read = ""
    if callable(found):
        source = found.__module__
    else:
        spec, read = absolute(question.kind, spec), reader(kind_of(question.kind).name)
    jobs = []
    judge = question.score.__module__, "TASK"
    for name, fit in fits.items():
        home = fit.__module__
        counted = (home, fit.__name__), judge, (source, "")
        params = {"task": task, "entry": name, "home": home, "source": source, "data": spec, "target": target}
        if asked:
            params["settings"] = asked
        code = "".join(fingerprint(module, name) for module, name in counted if module) + read
        jobs += [
            Job("", f"compare {task}", "posterity.lab.tasks:score_entry", params, seed, code, device, A_WEEK)
            for seed in range(first_seed, first_seed + seeds)
        ]
    return (
        jobs,
        lambda pairs: _rank(question, list(pairs), {name: entries(task)[name].paper for name in fits}),
        note,
    )


def _settings(question: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Return every setting of a question, what is given in the place of its default."""
    known = question.settings
    values = {name: parameter.default for name, parameter in known.items()}
    for name, text in given.items():
        if name not in known:
            raise ValueError(
                f"{question.name} takes no {name!r}, it takes: {', '.join(known) or 'no setting'}"
            )
        values[name] = typed(name, text, known[name].annotation)
        refuse(name, values[name], known[name].annotation)
    return values


def _rank(question: Any, pairs: list[tuple[Job, Outcome]], papers_of: dict[str, str]) -> list[dict[str, Any]]:
    """Return entries from best to worst; two whose paired difference has 0 inside are tied."""
    values: dict[str, dict[int, float]] = {name: {} for name in papers_of}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in papers_of}
    errors: dict[str, str] = {}
    for job, outcome in pairs:
        if outcome.error:
            errors[job.params["entry"]] = outcome.error
        else:
            values[job.params["entry"]][job.seed] = outcome.value
            figures[job.params["entry"]].append(outcome.records)
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
        if any(figures[name]):
            described["figures"] = {
                key: sum(f[key] for f in figures[name]) / len(mine) for key in figures[name][0]
            }
        rows.append({"rank": rank, "entry": name, "paper": papers_of[name] or None, "metric": question.metric,
                     "better": question.better, **described})  # fmt: skip
    for row in rows:
        if row["entry"] in question.references:
            row["reference"] = True
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
    choices = [row for row in rows if row["rank"] and not row.get("reference")]
    ordinary = next((row for row in choices if not row["paper"]), None)
    if ordinary is None:
        return "No ordinary choice ran, so there is nothing to compare with."
    first = ordinary["entry"]
    better = [row["entry"] for row in choices if row["rank"] < ordinary["rank"]]
    if not better:
        seeds = len(ordinary["values"])
        return f"{first}, an ordinary choice, is enough as far as {seeds} seeds tell: nothing is shown to be better."
    return f"{first}, the best ordinary choice, is not enough: {', '.join(better)} did better."


def curve_point(figure: str) -> tuple[str, str, float] | None:
    """Return what a figure named "up by across: number" is a point of, None of another.

    Parameters
    ----------
    figure : str

    Returns
    -------
    tuple of str, str and float, or None
    """
    place = re.fullmatch(r"(.+) by (.+): ([\d.]+)", figure)
    return (place[1], place[2], float(place[3])) if place else None
