"""Tasks on the command line: every entry ranked on a user's data."""

from typing import Annotated

import typer

from posterity.cli._app import AsJson, Data, Target, app, console, dump, interval, reading, say, set_
from posterity.cli.running import check_numbers, run_jobs


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="A task: tabular-regression, node-classification, ...")],
    data: Data = None,
    target: Target = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first of them.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="data.name=value, an option of reading --data.")
    ] = None,
    on: Annotated[str, typer.Option("--on", help="local, ray, or ray://HOST:PORT.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", help="Trials at a time.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run stored trials anew.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Rank every method that does a task, with the strong ordinary choices, on your data."""
    check_numbers(seeds, first_seed, workers, on, "cpu")
    given = set_(settings)
    data = reading(data, given)
    if given:
        raise ValueError(
            f"--set of compare takes options of reading, data.name=value, got {next(iter(given))}"
        )
    from posterity.engine import compare as engine
    from posterity.engine.store import Store

    jobs, rank, note = engine.compare(task, data=data, target=target, seeds=seeds, first_seed=first_seed)
    if note and not quiet:
        say(note)
    outcomes = run_jobs(jobs, Store(), on, workers, fresh, quiet)
    rows = rank([(job, outcomes[job.key]) for job in jobs])
    if as_json:
        dump(rows)
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("rank", "entry", "paper", rows[0]["metric"]):
            table.add_column(name)
        for row in rows:
            place = "error" if row["rank"] is None else f"{'=' if row['tied'] else ''}{row['rank']}"
            table.add_row(place, row["entry"], row["paper"] or "ordinary", row.get("error") or interval(row))
        terminal = console()
        terminal.print(table)
        terminal.print(f"{rows[0]['better']} is better; = ties: the paired difference to the first of the rank has "
                      f"0 in its 95 % interval; {seeds} seeds", style="dim")  # fmt: skip
        terminal.print(engine.advice(rows), markup=False)
    if any("error" in row for row in rows):
        raise typer.Exit(1)
