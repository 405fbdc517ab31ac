"""One claim over values of a parameter: what is asked, and its rows as a curve."""

from collections.abc import Mapping
from typing import Any

from posterity.cli._app import console, interval, number
from posterity.engine.plan import Plan
from posterity.engine.verdicts import direction

__all__ = ["asked", "print_curve", "refuse_swept", "written"]


def asked(sweep: list[str], given: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the parameter of ``--sweep`` and its values as text; ``given`` is what ``--set`` sets."""
    if len(sweep) > 1:
        raise ValueError(f"--sweep must be given once, got {len(sweep)}")
    name, sign, text = sweep[0].partition("=")
    if not sign or not name:
        raise ValueError(f"--sweep must be name=value,value, got {sweep[0]!r}")
    if name in ("data", "target"):
        raise ValueError(f"--sweep must name a parameter other than data and target, got {name!r}")
    if name in given:
        raise ValueError(f"{name} must be in --sweep or in --set, not in both")
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise ValueError(f"--sweep {name} must have no empty value, got {text!r}")
    if len(values) < 2:
        raise ValueError(f"--sweep {name} must have at least two values, got {text!r}")
    return name, values


def refuse_swept(name: str, plans: list[Plan]) -> None:
    """Refuse a value that comes twice, however it is written, and a parameter that is a list."""
    values = [plan.params[name] for plan in plans]
    if isinstance(values[0], list):
        raise ValueError(f"--sweep {name} must be one value at a time, and {name} is a list: use --set")
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"--sweep {name} must have each value once, got {written(value)} twice")


def written(value: Any) -> str:
    """Return a value of a parameter as it is written on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def print_curve(rows: list[dict[str, Any]], name: str) -> None:
    """Print a line a value: arms, effect or value with its interval, verdict; below it the direction."""
    from rich.table import Table
    from rich.text import Text

    from posterity.cli.running import STYLES

    terminal, first = console(), rows[0]
    terminal.print()
    terminal.print(f"{first['paper']} · {first['claim']} by {name}", style="bold", markup=False)
    terminal.print(first["says"], markup=False)
    arms = list(first.get("arms", ()))
    table = Table(box=None, pad_edge=False)
    for head in (name, *arms, f"{arms[-1]} less {arms[0]}" if arms else "value", "verdict"):
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        means = [number(row["arms"][arm]["mean"]) for arm in arms]
        verdict = Text(row["verdict"], STYLES[row["verdict"]])
        table.add_row(
            Text(written(row["params"][name])),
            *means,
            interval(row["effect"] if "effect" in row else row["value"]),
            verdict,
        )
    terminal.print(table)
    better = {"lower": "; lower is better", "higher": "; higher is better"}.get(first["better"], "")
    terminal.print(f"{first['metric']}{better}; {max(len(row['seeds']) for row in rows)} seeds a value, "
                  f"{sum(row['seconds'] for row in rows):.0f} s; data {first['data']}",
                  style="dim", markup=False)  # fmt: skip
    if said := direction(rows, name):
        terminal.print(said, markup=False)
