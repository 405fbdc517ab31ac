"""Claims on the command line: run them to verdicts, print the verdicts that are stored."""

import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posterity.cli._app import (
    AsJson,
    Data,
    Domain,
    Slugs,
    Target,
    app,
    console,
    dump,
    interval,
    number,
    reading,
    say,
    set_,
)  # fmt: skip
from posterity.papers import DOMAINS, Paper, get, papers

if TYPE_CHECKING:
    from posterity.engine.store import Job, Outcome


@app.command()
def run(
    slugs: Slugs = None,
    domain: Domain = None,
    every: Annotated[bool, typer.Option("--all", help="Every paper that is implemented.")] = False,
    claim: Annotated[str | None, typer.Option("--claim", help="One claim of the paper.")] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="How many seeds; by default what the claim asks for, mostly 5."),
    ] = None,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first of them.")] = 0,
    data: Data = None,
    target: Target = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="name=value, a parameter of the claim; data.name=value, an option of reading --data.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="name=a,b,c: one claim over values of a parameter, as a curve."),
    ] = None,
    on: Annotated[str, typer.Option("--on", help="local, ray, or ray://HOST:PORT.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", help="Trials at a time.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Run stored trials anew.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 unless every verdict is holds.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run the claims of papers: method against baseline over paired seeds, to a verdict."""
    chosen = _choose(slugs, domain, every)
    check_numbers(seeds, first_seed, workers, on, device)
    if claim is not None and len(chosen) != 1:
        raise ValueError("--claim needs exactly one paper")
    given = set_(settings)
    for name in given.keys() & {"data", "target"}:
        raise ValueError(f"use --{name} for {name}")
    data = reading(data, given)

    from posterity.cli.sweeping import asked, print_curve, refuse_swept, written
    from posterity.engine.plan import plan_claims
    from posterity.engine.store import Store
    from posterity.engine.verdicts import judge

    if sweep and claim is None:
        raise ValueError("--sweep needs exactly one paper and --claim")
    swept, values = asked(sweep, given) if sweep else ("", [])
    several = [{**given, swept: value} for value in values] or [given]
    plans = []
    for paper, settings_of in ((paper, each) for paper in chosen for each in several):
        found, left = plan_claims(
            paper, claim=claim, seeds=seeds, first_seed=first_seed, data=data, target=target,
            settings=settings_of, device=device,
        )  # fmt: skip
        plans += found
        if left and not quiet:
            say(f"{paper.slug}: left out {', '.join(left)}, which does not take what is set")
    if swept:
        refuse_swept(swept, plans)
    if not quiet:
        for note in dict.fromkeys(plan.note for plan in plans if plan.note):
            say(note)
    outcomes = run_jobs(
        [job for plan in plans for job in plan.jobs], Store(), on, workers, fresh, quiet, swept
    )
    rows = [
        judge(plan.paper.slug, plan.outline, [(job, outcomes[job.key]) for job in plan.jobs])
        for plan in plans
    ]
    if as_json:
        dump(rows)
    elif swept:
        print_curve(rows, swept)
    else:
        _print_rows(rows)
    if any(row["verdict"] == "error" for row in rows):
        for row in rows:
            for seed, text in row.get("errors", {}).items():
                at = f" {swept}={written(row['params'][swept])}" if swept else ""
                say(f"{row['paper']} {row['claim']}{at} seed {seed}: {text}")
        raise typer.Exit(1)
    if strict and any(row["verdict"] != "holds" for row in rows):
        raise typer.Exit(3)


def _choose(slugs: list[str] | None, domain: str | None, every: bool) -> list[Paper]:
    if bool(slugs) + (domain is not None) + every != 1:
        raise ValueError("say which papers: slugs, --domain D or --all, one of them")
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    if slugs:
        chosen = [get(slug) for slug in dict.fromkeys(slugs)]
        if missing := [paper.slug for paper in chosen if not paper.implemented]:
            raise ValueError(
                f"{missing[0]} is not implemented yet: `posterity list --implemented` shows what is"
            )
        return chosen
    chosen = [p for p in papers().values() if p.implemented and domain in (None, p.domain)]
    if not chosen:
        raise ValueError(f"no paper of {domain} is implemented yet")
    return chosen


def check_numbers(seeds: int | None, first_seed: int, workers: int | None, on: str, device: str) -> None:
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    if first_seed < 0:
        raise ValueError(f"--first-seed must be at least 0, got {first_seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if not re.fullmatch(r"local|ray|ray://[^:/]+:\d+", on):
        raise ValueError(f"--on must be local, ray or ray://HOST:PORT, got {on!r}")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"--device must be cpu, cuda, cuda:N or mps, got {device!r}")
    if device != "cpu" and on == "local":
        import torch

        backend = torch.backends.mps if device == "mps" else torch.cuda
        if not backend.is_available():
            raise ValueError(f"--device {device}: this torch sees none")


def run_jobs(
    jobs: list["Job"], store: Any, on: str, workers: int | None, fresh: bool, quiet: bool, swept: str = ""
) -> dict[str, "Outcome"]:
    """Run jobs under a progress display that names the value of a swept parameter; on Ctrl-C say how to go on."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from posterity.engine.run import execute

    waiting = {
        job.key: _name(job, swept) for job in jobs
    }  # what is not done, in the order in which it starts
    total = len(waiting)
    outcomes: dict[str, Outcome] = {}
    stored = 0
    terminal = sys.stderr.isatty() and not quiet
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console(stderr=True), transient=True, disable=not terminal,
        speed_estimate_period=float("inf"),  # of all trials: one may take longer than rich looks back
    )  # fmt: skip
    task = progress.add_task(next(iter(waiting.values())), total=total)
    progress.advance(task, 0)  # the time left is judged from here, so that what each worker loads counts
    many = workers or os.cpu_count() or 1  # before each has ended a trial, time left is no more than a guess
    try:
        with progress:
            for job, outcome, known in execute(jobs, store, on=on, workers=workers, fresh=fresh):
                outcomes[job.key] = outcome
                stored += known
                del waiting[job.key]
                if known:  # says nothing of the others' time
                    progress.reset(task, completed=stored)
                progress.advance(task, 0 if known else 1)
                progress.update(task, description=next(iter(waiting.values()), ""))
                if not terminal and not quiet and not known:
                    said = outcome.error or f"{outcome.seconds:.1f} s"
                    left = progress.tasks[0].time_remaining if len(outcomes) - stored >= many else None
                    rest = f", {_about(left)} left" if left else ""
                    say(f"[{len(outcomes)}/{total}{rest}] {_name(job, swept)} seed {job.seed}: {said}")
    except KeyboardInterrupt:
        words = [word for word in sys.argv[1:] if word != "--fresh"]
        say(
            f"stopped; {len(outcomes)} of {total} trials are stored. To go on:\n  posterity {shlex.join(words)}"
        )
        raise typer.Exit(130) from None
    if stored and not quiet:
        say(f"{stored} of {total} trials were stored and not run again")
    return outcomes


def _name(job: "Job", swept: str = "") -> str:
    """Return what a trial runs, in words: a claim of a paper, or an entry of a comparison."""
    from posterity.cli.sweeping import written

    at = f" {swept}={written(job.params[swept])}" if swept else ""
    return f"{job.paper} {job.claim}{at}" if job.paper else f"{job.claim} ({job.params['entry']})"


def _about(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"


STYLES = {"holds": "bold green", "fails": "bold red", "inconclusive": "bold yellow", "error": "bold magenta"}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Print each claim: statement, arms or value, paired difference, verdict."""
    from rich.table import Table

    from posterity.engine.statistics import describe_range
    from posterity.engine.verdicts import settling

    terminal = console()
    for row in rows:
        terminal.print()
        terminal.print(f"{row['paper']} · {row['claim']}", style="bold", markup=False)
        terminal.print(row["says"], markup=False)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        table.add_column()
        for arm, facts in row.get("arms", {}).items():
            table.add_row(arm, interval(facts))
        if "value" in row:
            table.add_row("value", interval(row["value"]))
            table.add_row("limit" if "limit" in row else "range", number(row.get("limit")) if "limit" in row
                          else describe_range(row["range"]))  # fmt: skip
        if "effect" in row:
            arms = list(row["arms"])
            table.add_row(f"{arms[-1]} less {arms[0]}", interval(row["effect"]))
        terminal.print(table)
        better = {"lower": "lower is better", "higher": "higher is better"}.get(row["better"], "")
        terminal.print(f"{row['metric']}{f' ({better})' if better else ''}; {len(row['seeds'])} seeds, "
                      f"{row['seconds']:.0f} s; data {row['data']}", style="dim", markup=False)  # fmt: skip
        terminal.print("verdict: ", end="")
        terminal.print(row["verdict"], style=STYLES[row["verdict"]], end="")
        terminal.print(settling(row), style="dim", markup=False)
    if len({row["paper"] for row in rows}) > 1:
        terminal.print()
        terminal.print(_overview(rows))


def _overview(rows: list[dict[str, Any]]) -> Any:
    """Return a line a claim: paper, claim, its effect or value with interval, verdict."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("paper", "claim", "effect or value", "verdict"):
        table.add_column(name, overflow="fold")
    for row in rows:
        facts = row["effect"] if "effect" in row else row["value"]
        verdict = Text(row["verdict"], STYLES[row["verdict"]])
        table.add_row(row["paper"], row["claim"], interval(facts), verdict)
    return table


@app.command()
def results(slugs: Slugs = None, as_json: AsJson = False) -> None:
    """Print the verdicts of stored trials; those of other code are not shown."""
    from posterity.engine.store import Store
    from posterity.engine.verdicts import stored_rows

    for slug in slugs or []:
        get(slug)
    rows, stale = stored_rows(slugs or None, Store())
    if as_json:
        dump(rows)
    else:
        _print_rows(rows)
        if not rows:
            say("nothing stored yet: `posterity run SLUG`")
    if stale:
        say(f"{stale} stored trials were made by other code and are not shown")
