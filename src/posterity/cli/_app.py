"""The application: its options, its ways of saying something, and how it ends."""

import json
import sys
from typing import Annotated, Any

import typer

from posterity.papers import DOMAINS, papers

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
        fail(str(error))
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have it
            raise
        fail(error.format_message())


def set_(settings: list[str] | None) -> dict[str, str]:
    """Return name and value of each ``--set``."""
    given: dict[str, str] = {}
    for text in settings or []:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ValueError(f"--set must be name=value, got {text!r}")
        given[name] = value
    return given


def reading(data: str | None, given: dict[str, str]) -> str | None:
    """Take options of reading out of what is set, and return the data with them behind it."""
    options = {name: given.pop(name) for name in list(given) if name.startswith("data.")}
    if not options:
        return data
    if data is None:
        raise ValueError(f"--set {next(iter(options))} needs --data and a file")
    from posterity.lab.data import with_options

    return with_options(data, {name.removeprefix("data."): text for name, text in options.items()})


def fail(message: str) -> None:
    print("posterity: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def dump(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def interval(facts: dict[str, Any]) -> str:
    low, high = facts["ci95"]
    tail = "" if low is None else f"  [{number(low)}, {number(high)}]"
    return f"{number(facts['mean'])}{tail}"
