"""Tasks on the command line: every entry ranked on a user's data, and a user's labels ranked by an entry."""

from importlib import import_module
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
        list[str] | None,
        typer.Option(
            "--set", help="name=value, a setting of the task; data.name=value, an option of reading --data."
        ),
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
    from posterity.engine import compare as engine
    from posterity.engine.store import Store

    jobs, rank, note = engine.compare(
        task, data=data, target=target, seeds=seeds, first_seed=first_seed, settings=given
    )
    if note and not quiet:
        say(note)
    outcomes = run_jobs(jobs, Store(), on, workers, fresh, quiet)
    rows = rank([(job, outcomes[job.key]) for job in jobs])
    if as_json:
        dump(rows)
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        every = dict.fromkeys(name for row in rows for name in row.get("figures", {}))
        beside = [name for name in every if not engine.curve_point(name)]
        for name in ("rank", "entry", "paper", rows[0]["metric"], *beside):
            table.add_column(name)
        for row in rows:
            place = "error" if row["rank"] is None else f"{'=' if row['tied'] else ''}{row['rank']}"
            origin = row["paper"] or ("reference" if row.get("reference") else "ordinary")
            figures = [
                f"{row['figures'][name]:.4g}" if name in row.get("figures", {}) else "" for name in beside
            ]
            table.add_row(place, row["entry"], origin, row.get("error") or interval(row), *figures)
        terminal = console()
        terminal.print(table)
        terminal.print(f"{rows[0]['better']} is better; = ties: the paired difference to the first of the rank has "
                      f"0 in its 95 % interval; {seeds} seeds", style="dim")  # fmt: skip
        terminal.print(engine.advice(rows), markup=False)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@app.command()
def suspects(
    data: Annotated[str, typer.Option("--data", help="A table, a folder of images, or an .npz of x and y.")],
    target: Target = None,
    method: Annotated[
        str, typer.Option("--method", help="An entry of the task label-noise, as compare ranks them.")
    ] = "CG-score",
    top: Annotated[int | None, typer.Option("--top", min=1, help="Only the so many first.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what the method draws.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="data.name=value, an option of reading --data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print your labelled examples as CSV, those whose label is probably wrong first."""
    given = set_(settings)
    source = str(reading(data, given))
    if given:
        raise ValueError(
            f"--set of suspects takes options of reading, data.name=value, got {next(iter(given))}"
        )
    import numpy as np

    from posterity.engine.discovery import entry_modules
    from posterity.lab.data import check, load_labelled
    from posterity.lab.data.labelled import Labelled
    from posterity.lab.tasks import entries
    from posterity.lab.tasks.image_classification import standardised
    from posterity.lab.tasks.label_noise import ranked

    for module in entry_modules("label-noise"):
        import_module(module)
    methods = entries("label-noise")
    if method not in methods:
        raise ValueError(f"--method must be one of {', '.join(methods)}, got {method!r}")
    if note := check(Labelled, source, target=target):
        say(note)
    examples = load_labelled(source, target=target)
    x = standardised(examples.x, np.arange(len(examples.y)))
    table = ranked(examples, methods[method].fit((x, examples.y), seed)(x)).head(top or len(x))
    if as_json:
        dump(table.to_dict("records"))
    else:
        print(table.to_csv(index=False), end="")
