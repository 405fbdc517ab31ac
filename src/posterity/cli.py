"""The command line: find a method, use it, run its claim, compare, report.

Nothing heavy is imported before a command needs it, so that ``--help``, ``list``,
``search`` and ``show`` answer at once.
"""

import difflib
import json
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posterity.papers import DOMAINS, Paper, get, papers

if TYPE_CHECKING:
    from posterity.engine.store import Job, Outcome

__all__ = ["app", "main"]

app = typer.Typer(
    name="posterity", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Methods from conference papers, each with its claim as a program.",
)  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Slug = Annotated[str, typer.Argument(help="A paper's slug.", autocompletion=lambda: sorted(papers()))]
Slugs = Annotated[
    list[str] | None, typer.Argument(help="Slugs of papers.", autocompletion=lambda: sorted(papers()))
]
Domain = Annotated[
    str | None, typer.Option("--domain", help="One of the 25 domains.", autocompletion=lambda: DOMAINS)
]
Target = Annotated[str | None, typer.Option("--target", help="Column to predict: its name, or its number.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="A name, a CSV or Parquet file, a folder of images, a graph .npz."),
]


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))  # what typer.Exit carries is returned
    except ValueError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have it
            raise
        _fail(error.format_message())


def _fail(message: str) -> None:
    print("posterity: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _dump(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# --- the index -----------------------------------------------------------------------


def _index_row(paper: Paper) -> dict[str, Any]:
    return {
        "slug": paper.slug, "domain": paper.domain, "title": paper.title, "summary": paper.summary,
        "tags": list(paper.tags), "venue": paper.venue, "implemented": paper.implemented,
    }  # fmt: skip


def _print_index(found: list[Paper]) -> None:
    width = max((len(paper.slug) for paper in found), default=0)
    for paper in found:
        mark = "*" if paper.implemented else " "
        print(f"{mark} {paper.slug:<{width}}  {paper.domain:<14}  {paper.summary}")


@app.command("list")
def list_(
    domain: Domain = None,
    implemented: Annotated[bool, typer.Option("--implemented", help="Only what can be used now.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the papers; a star marks those that are implemented."""
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    found = [
        p for p in papers().values() if domain in (None, p.domain) and (p.implemented or not implemented)
    ]
    found.sort(key=lambda p: (DOMAINS.index(p.domain) if p.domain in DOMAINS else len(DOMAINS), p.slug))
    if as_json:
        _dump([_index_row(paper) for paper in found])
    else:
        _print_index(found)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _match(term: str, words: list[str], near: set[str]) -> float:
    """Return how well a term is found among words: 1 whole, less for a part or a typo."""
    if term in words:
        return 1.0
    if any(w.startswith(term) or (2 * len(w) > len(term) and term.startswith(w)) for w in words):
        return 0.8
    if len(term) > 3 and any(term in w for w in words):
        return 0.6
    return 0.5 if not near.isdisjoint(words) else 0.0


def find(words: Iterable[str]) -> list[Paper]:
    """Return the papers that match, best first: names and tags count more than summaries."""
    terms = [term for word in words for term in _words(word)]
    texts = {
        paper.slug: [(_words(text), weight) for text, weight in (
            (paper.slug, 4.0), (" ".join(paper.tags), 3.0), (paper.domain, 2.0), (paper.title, 2.0),
            (paper.summary + " " + paper.problem, 1.0), (" ".join(paper.exports), 1.0))]
        for paper in papers().values()
    }  # fmt: skip
    known = {word for fields in texts.values() for field, _ in fields for word in field if len(word) > 3}
    near = {  # a word that somebody wrote is no typo
        term: set(difflib.get_close_matches(term, known, n=10, cutoff=0.75))
        if len(term) > 3 and term not in known
        else set()
        for term in terms
    }
    scored = []
    for paper in papers().values():
        each = [
            max(weight * _match(term, field, near[term]) for field, weight in texts[paper.slug])
            for term in terms
        ]
        if each and min(each) > 0:
            scored.append((sum(each) + 0.5 * paper.implemented, paper))
        elif len(each) > 2 and sum(score > 0 for score in each) > len(each) / 2:
            scored.append((sum(each) / 2, paper))
    return [paper for _, paper in sorted(scored, key=lambda pair: (-pair[0], pair[1].slug))]


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="What you look for: a problem, a method, a name.")],
    as_json: AsJson = False,
) -> None:
    """Search the papers by problem, method or name; typos are forgiven."""
    found = find(words)
    if as_json:
        _dump([_index_row(paper) for paper in found])
    elif found:
        _print_index(found)
    else:
        _say(f"nothing found for {' '.join(words)}; `posterity list` shows all")


@app.command()
def show(slug: Slug, as_json: AsJson = False) -> None:
    """Show what a paper's method is for, the lines that use it, its claims and verdicts."""
    from posterity.engine.discovery import claim_outlines

    paper = get(slug)
    facts: dict[str, Any] = {
        **_index_row(paper), "authors": list(paper.authors), "track": paper.track, "url": paper.url,
        "for": paper.problem, "kind": paper.kind, "lines": paper.lines, "module": paper.module,
        "exports": list(paper.exports),
        "needs": {"labels": paper.labels, "gpu": paper.gpu, "extra": paper.extra},
        "departures": list(paper.departures), "claims": [], "cite": paper.bibtex(),
    }  # fmt: skip
    last = {row["claim"]: row for row in _shipped(slug)}
    last |= {row["claim"]: row for row in _remembered(slug)}
    for outline in claim_outlines(paper):
        row = last.get(outline.name)
        per_trial = row["seconds"] / max(1, len(row["seeds"])) if row else None
        facts["claims"].append({
            "name": outline.name, "says": outline.facts["says"], "form": outline.form, "params": outline.defaults,
            "verdict": row["verdict"] if row else None, "effect": (row.get("effect") or row.get("value")) if row else None,
            "seconds_per_trial": round(per_trial, 2) if per_trial is not None else None,
        })  # fmt: skip
    if as_json:
        _dump(facts)
        return
    print(f"{paper.title}\n{', '.join(paper.authors)}. {paper.venue} ({paper.track}).\n")
    print(paper.summary)
    if not paper.implemented:
        print(f"\nNot implemented yet.\n\n{paper.bibtex()}")
        return
    extra = f'pip install "posterity[{paper.extra}]"' if paper.extra else "nothing beyond the core"
    print(f"\nFor: {paper.problem}\n\nUse it ({paper.kind}):\n")
    print("\n".join("    " + line for line in paper.lines.strip().splitlines()))
    print(f"\nNeeds: labels {paper.labels}; GPU {paper.gpu}; install: {extra}")
    print("\nClaims:")
    for claim in facts["claims"]:
        cost = f", {claim['seconds_per_trial']:g} s a seed" if claim["seconds_per_trial"] is not None else ""
        print(f"  {claim['name']}: {claim['says']}\n    {claim['verdict'] or 'not run yet'}{cost}")
    if paper.departures:
        print("\nDepartures from the paper and slips of official code not copied:")
        for number, text in enumerate(paper.departures, start=1):
            print(f"  {number}. {text}")
    print(f"\nCite:\n{paper.bibtex()}")


def _shipped(slug: str) -> list[dict[str, Any]]:
    """Return the rows of the evidence that came with the package."""
    path = Path(__file__).parent / "evidence" / f"{slug}.json"
    return json.loads(path.read_text(encoding="utf-8"))["claims"] if path.is_file() else []


def _remembered(slug: str) -> list[dict[str, Any]]:
    """Return this machine's rows at the default parameters; the store is read only if it is there."""
    from posterity.engine.store import Store, home

    if not (home() / "trials.sqlite").is_file():
        return []
    from posterity.engine.discovery import claim_outlines
    from posterity.engine.run import stored_rows

    defaults = {outline.name: outline.defaults for outline in claim_outlines(get(slug))}
    rows, _ = stored_rows([slug], Store())
    return [row for row in rows if _params(row) == defaults[row["claim"]]]


def _params(row: dict[str, Any]) -> dict[str, Any]:
    data = {"data": row["data"]} if row["data"] is not None else {}
    return {**data, **row["params"]}


# --- running -------------------------------------------------------------------------


@app.command()
def run(
    slugs: Slugs = None,
    domain: Domain = None,
    every: Annotated[bool, typer.Option("--all", help="Every paper that is implemented.")] = False,
    claim: Annotated[str | None, typer.Option("--claim", help="One claim of the paper.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first of them.")] = 0,
    data: Data = None,
    target: Target = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="name=value, a parameter of the claim.")
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
    _check_numbers(seeds, first_seed, workers, on, device)
    if claim is not None and len(chosen) != 1:
        raise ValueError("--claim needs exactly one paper")
    given: dict[str, str] = {}
    for text in settings or []:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ValueError(f"--set must be name=value, got {text!r}")
        if name in ("data", "target"):
            raise ValueError(f"use --{name} for {name}")
        given[name] = value

    from posterity.engine.run import judge, plan_claims
    from posterity.engine.store import Store

    plans = []
    for paper in chosen:
        found, left = plan_claims(
            paper, claim=claim, seeds=seeds, first_seed=first_seed, data=data, target=target, settings=given,
            device=device,
        )  # fmt: skip
        plans += found
        if left and not quiet:
            _say(f"{paper.slug}: left out {', '.join(left)}, which does not take what is set")
    if not quiet:
        for note in dict.fromkeys(plan.note for plan in plans if plan.note):
            _say(note)
    outcomes = _run([job for plan in plans for job in plan.jobs], Store(), on, workers, fresh, quiet)
    rows = [
        judge(plan.paper.slug, plan.outline, [(job, outcomes[job.key]) for job in plan.jobs])
        for plan in plans
    ]
    if as_json:
        _dump(rows)
    else:
        _print_rows(rows)
    if any(row["verdict"] == "error" for row in rows):
        for row in rows:
            for seed, text in row.get("errors", {}).items():
                _say(f"{row['paper']} {row['claim']} seed {seed}: {text}")
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


def _check_numbers(seeds: int, first_seed: int, workers: int | None, on: str, device: str) -> None:
    if seeds < 1:
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


def _run(
    jobs: list["Job"], store: Any, on: str, workers: int | None, fresh: bool, quiet: bool
) -> dict[str, "Outcome"]:
    """Run jobs under a progress display; on Ctrl-C say how to go on."""
    from posterity.engine.run import execute

    total = len({job.key for job in jobs})
    outcomes: dict[str, Outcome] = {}
    stored = 0
    terminal = sys.stderr.isatty() and not quiet
    from contextlib import nullcontext

    display: Any = nullcontext()
    if terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        display = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=_console(stderr=True), transient=True,
        )  # fmt: skip
    try:
        with display as progress:
            task = progress.add_task("trials", total=total) if terminal else None
            for job, outcome, known in execute(jobs, store, on=on, workers=workers, fresh=fresh):
                outcomes[job.key] = outcome
                stored += known
                if terminal:
                    progress.update(task, advance=1, description=f"{job.paper} {job.claim}")
                elif not quiet and not known:
                    said = outcome.error or f"{outcome.seconds:.1f} s"
                    _say(f"[{len(outcomes)}/{total}] {job.paper} {job.claim} seed {job.seed}: {said}")
    except KeyboardInterrupt:
        words = [word for word in sys.argv[1:] if word != "--fresh"]
        _say(
            f"stopped; {len(outcomes)} of {total} trials are stored. To go on:\n  posterity {shlex.join(words)}"
        )
        raise typer.Exit(130) from None
    if stored and not quiet:
        _say(f"{stored} of {total} trials were stored and not run again")
    return outcomes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(facts: dict[str, Any]) -> str:
    low, high = facts["ci95"]
    tail = "" if low is None else f"  [{_number(low)}, {_number(high)}]"
    return f"{_number(facts['mean'])}{tail}"


STYLES = {"holds": "bold green", "fails": "bold red", "inconclusive": "bold yellow", "error": "bold magenta"}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Print each claim: statement, arms or value, paired difference, verdict."""
    from rich.table import Table

    from posterity.engine.statistics import describe_range

    console = _console()
    for row in rows:
        console.print()
        console.print(f"{row['paper']} · {row['claim']}", style="bold", markup=False)
        console.print(row["says"], markup=False)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        table.add_column()
        for arm, facts in row.get("arms", {}).items():
            table.add_row(arm, _interval(facts))
        if "value" in row:
            table.add_row("value", _interval(row["value"]))
            table.add_row("limit" if "limit" in row else "range", _number(row.get("limit")) if "limit" in row
                          else describe_range(row["range"]))  # fmt: skip
        if "effect" in row:
            arms = list(row["arms"])
            table.add_row(f"{arms[-1]} less {arms[0]}", _interval(row["effect"]))
        console.print(table)
        better = {"lower": "lower is better", "higher": "higher is better"}.get(row["better"], "")
        console.print(f"{row['metric']}{f' ({better})' if better else ''}; {len(row['seeds'])} seeds, "
                      f"{row['seconds']:.0f} s; data {row['data']}", style="dim", markup=False)  # fmt: skip
        console.print("verdict: ", end="")
        console.print(row["verdict"], style=STYLES[row["verdict"]])


@app.command()
def results(slugs: Slugs = None, as_json: AsJson = False) -> None:
    """Print the verdicts of stored trials; those of other code are not shown."""
    from posterity.engine.run import stored_rows
    from posterity.engine.store import Store

    for slug in slugs or []:
        get(slug)
    rows, stale = stored_rows(slugs or None, Store())
    if as_json:
        _dump(rows)
    else:
        _print_rows(rows)
        if not rows:
            _say("nothing stored yet: `posterity run SLUG`")
    if stale:
        _say(f"{stale} stored trials were made by other code and are not shown")


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="A task: tabular-regression, node-classification, ...")],
    data: Data = None,
    target: Target = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first of them.")] = 0,
    on: Annotated[str, typer.Option("--on", help="local, ray, or ray://HOST:PORT.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", help="Trials at a time.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run stored trials anew.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Rank every method that does a task, with the strong ordinary choices, on your data."""
    _check_numbers(seeds, first_seed, workers, on, "cpu")
    from posterity.engine import run as engine
    from posterity.engine.store import Store

    jobs, rank, note = engine.compare(task, data=data, target=target, seeds=seeds, first_seed=first_seed)
    if note and not quiet:
        _say(note)
    outcomes = _run(jobs, Store(), on, workers, fresh, quiet)
    rows = rank([(job, outcomes[job.key]) for job in jobs])
    if as_json:
        _dump(rows)
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("rank", "entry", "paper", rows[0]["metric"]):
            table.add_column(name)
        for row in rows:
            place = "error" if row["rank"] is None else f"{'=' if row['tied'] else ''}{row['rank']}"
            table.add_row(place, row["entry"], row["paper"] or "ordinary", row.get("error") or _interval(row))
        console = _console()
        console.print(table)
        console.print(f"{rows[0]['better']} is better; = ties: the paired difference to the first of the rank has "
                      f"0 in its 95 % interval; {seeds} seeds", style="dim")  # fmt: skip
        console.print(engine.advice(rows), markup=False)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


# --- taking away ---------------------------------------------------------------------


@app.command()
def report(
    slugs: Slugs = None,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path(
        "posterity-report"
    ),
) -> None:
    """Write a page a paper and an index, self-contained HTML, from stored trials."""
    from posterity.engine.run import current
    from posterity.engine.store import Store
    from posterity.site.pages import write_report

    for slug in slugs or []:
        get(slug)
    kept, stale = current(slugs or None, Store())
    if not kept:
        raise ValueError(
            "nothing to report: no stored trials of the current code; `posterity run SLUG` makes them"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"-o must be a folder, got the file {out}")
    index = write_report(kept, out)
    if stale:
        _say(f"{stale} stored trials were made by other code and are not shown")
    print(index)


@app.command()
def cite(slugs: Annotated[list[str], typer.Argument(help="Slugs of papers.")]) -> None:
    """Print BibTeX."""
    print("\n\n".join(get(slug).bibtex() for slug in slugs))


@app.command()
def vendor(slug: Slug) -> None:
    """Print a method as one file, importable without Posterity, with licence and citation."""
    from posterity.site.vendor import vendored

    paper = get(slug)
    if not paper.implemented:
        raise ValueError(f"{slug} is not implemented yet: `posterity list --implemented` shows what is")
    print(vendored(paper), end="")


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="The new paper's slug: lower case, digits, hyphens.")],
    domain: Annotated[str, typer.Option("--domain", help="Its domain.")],
    root: Annotated[Path, typer.Option("--root", help="A checkout of Posterity.")] = Path(),
) -> None:
    """Write the four files of a new paper into a checkout."""
    from posterity.site.scaffold import scaffold

    for path in scaffold(slug, domain, root):
        print(path)
