"""The tools for assistants: each is the command of its name, run in a process of its own.

So a tool says what the command says; a cancelled request ends its process and the workers of
that, and what is stored stays; code that was edited since the server started counts, as it
does for a person; and the server itself imports no torch.
"""

import json
import os
import re
import sys
from pathlib import Path
from subprocess import DEVNULL
from typing import Annotated, Any, NotRequired

import anyio
import anyio.to_thread
from anyio.streams.text import TextReceiveStream
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic reads that of typing only from Python 3.12

import posterity
from posterity.engine.compare import advice
from posterity.lab.tasks import task_names

__all__ = ["server"]

PROGRESS = re.compile(r"\[(\d+)/(\d+)(?:, (.*? left))?\] (.*)")
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
STORES = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True)
MORE = ConfigDict(extra="allow")  # fields that a command has beside those that are named here

server = MCPServer(
    "posterity",
    version=posterity.__version__,
    instructions="Methods from 160 conference papers as PyTorch and scikit-learn parts, each with its paper's claim "
    "as a program. Search for a problem, show a paper to get the lines that use its method, run its claim to see "
    "whether it holds (here, or on the user's data), compare all methods of a task on the user's data, and vendor "
    "a method as one file where a dependency is not wanted.",
    log_level="WARNING",
)  # fmt: skip


class Paper(TypedDict):
    """A paper of the index; only what is implemented can be used and run."""

    slug: str
    domain: str
    title: str
    summary: str
    tags: list[str]
    venue: str
    implemented: bool


class Shown(Paper):
    """A paper with the lines that use its method (``lines``), what it needs, and its claims with last verdicts."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    lines: str
    exports: list[str]
    needs: dict[str, Any]
    departures: list[str]
    claims: list[dict[str, Any]]
    cite: str


class Interval(TypedDict):
    """A mean over seeds and its 95 % interval; values are those of the seeds."""

    mean: float | None
    ci95: list[float | None]
    values: NotRequired[list[float | None]]


class Verdict(TypedDict):
    """A claim at one setting: its arms or its value over seeds, the paired effect (method less baseline), the verdict.

    "holds" when the interval lies wholly on the claimed side, "fails" when wholly on the other, else
    "inconclusive"; "error" when a trial raised, with the reason of each seed in ``errors``.
    """

    __pydantic_config__ = MORE  # type: ignore[misc]
    paper: str
    claim: str
    says: str
    form: str
    metric: str
    better: str
    arms: NotRequired[dict[str, Interval]]
    effect: NotRequired[Interval]
    value: NotRequired[Interval]
    verdict: str
    seeds_to_settle: NotRequired[int | None]
    seeds: list[int]
    seconds: float
    data: str | None
    params: dict[str, Any]
    errors: NotRequired[dict[str, str]]


class Place(TypedDict):
    """An entry of a ranking: its score over seeds, tied with others of its rank, or the error that it raised."""

    rank: int | None
    entry: str
    paper: str | None
    metric: str
    better: str
    mean: NotRequired[float | None]
    ci95: NotRequired[list[float | None]]
    values: NotRequired[list[float | None]]
    tied: NotRequired[bool]
    error: NotRequired[str]


class Papers(TypedDict):
    """The papers found, best first; none if no word is known."""

    papers: list[Paper]


class Verdicts(TypedDict):
    """Verdicts, and what was said on the way: how data was read, which claims were left out."""

    verdicts: list[Verdict]
    notes: list[str]


class Ranking(TypedDict):
    """Entries from best to worst, whether an ordinary choice is enough, and how the data was read."""

    ranking: list[Place]
    advice: str
    notes: list[str]


Slug = Annotated[str, Field(description="The paper's slug, as search gives it: esd, rectified-flow.")]
Data = Annotated[
    str | None,
    Field(
        description="The name of a data set that ships, or a file or folder in the working folder or in "
        "POSTERITY_DATA: a CSV or Parquet table, a folder of images, an .npz graph. Options of reading may stand "
        "behind it: houses.csv?header=no. By default the data that the claim or task names."
    ),
]
Target = Annotated[str | None, Field(description="For tables: the column to predict, its name or number.")]
Value = str | bool | int | float | None
Settings = dict[str, Value | list[Value]] | None
READING = 'Options of reading data have the form {"data.header": "no"}.'


@server.tool(annotations=READS)
async def search(
    words: Annotated[str, Field(description="A problem in the user's words, a method, or a name.")],
) -> Papers:
    """Find methods for a problem among the papers, best first; typos are forgiven. Start here.

    Returns slugs with a summary each; show says how one is used.
    """
    return {"papers": await _json(["search", "--json", "--", words])}


@server.tool(annotations=READS)
async def show(slug: Slug) -> Shown:
    """Show what a paper's method is for and how to use it.

    Returns the lines of Python that use the method, what it needs, where it departs from the paper, its claims with
    their parameters, last verdict and seconds a seed, and BibTeX. Read it before run.
    """
    return await _json(["show", "--json", "--", slug])


@server.tool(annotations=STORES)
async def run(
    context: Context,
    slug: Slug,
    claim: Annotated[
        str | None, Field(description="One claim, as show names them; by default all that take what is set.")
    ] = None,
    seeds: Annotated[
        int | None, Field(ge=1, description="How many seeds; by default what the claim asks for, mostly 5.")
    ] = None,
    data: Data = None,
    target: Target = None,
    settings: Annotated[
        Settings,
        Field(
            description='Parameters of the claim by name, as show lists them under params: {"epochs": 20}. '
            + READING
        ),
    ] = None,
) -> Verdicts:
    """Run a paper's claim: its method against the baseline over paired seeds, to a verdict.

    Takes seconds to minutes (show gives seconds a seed) and reports progress. Finished trials are stored and never
    run again, so a cancelled run can be asked for anew. Returns the verdict with effect and 95 % interval.
    """  # fmt: skip
    words = [f"--claim={claim}"] * (claim is not None) + await _options(seeds, data, target, settings)
    notes: list[str] = []
    return {"verdicts": await _json(["run", "--json", *words, "--", slug], notes, context), "notes": notes}


@server.tool(annotations=STORES)
async def compare(
    context: Context,
    task: Annotated[str, Field(description=f"The question: {', '.join(task_names())}.")],
    data: Data = None,
    target: Target = None,
    seeds: Annotated[int, Field(ge=1, description="How many seeds.")] = 5,
    settings: Annotated[
        Settings, Field(description='Settings of the task by name: {"labels_per_class": 2}. ' + READING)
    ] = None,
) -> Ranking:
    """Rank every method that does a task, with the strong ordinary choices, on the user's data.

    Use it when the user cannot choose. Takes a minute or more and reports progress. Returns the entries with
    their scores, 95 % intervals and ties, and whether an ordinary choice is enough.
    """
    notes: list[str] = []
    words = ["compare", "--json", *await _options(seeds, data, target, settings), "--", task]
    ranking = await _json(words, notes, context)
    return {"ranking": ranking, "advice": advice(ranking), "notes": notes}


@server.tool(annotations=READS)
async def results(
    slug: Annotated[str | None, Field(description="One paper; by default all that were run here.")] = None,
) -> Verdicts:
    """Return the verdicts of trials that are stored on this machine, without running anything."""
    notes: list[str] = []
    words = ["results", "--json", "--", *([] if slug is None else [slug])]
    return {"verdicts": await _json(words, notes), "notes": notes}


@server.tool(annotations=READS, structured_output=False)
async def vendor(slug: Slug) -> str:
    """Return a paper's method as the text of one Python file, importable without Posterity.

    It carries licence and citation; write it into the user's project as it is.
    """
    return await _command(["vendor", "--", slug])


async def _json(words: list[str], notes: list[str] | None = None, context: Context | None = None) -> Any:
    printed = await _command(words, notes, context)
    return json.loads(printed, parse_constant=lambda _: None)  # the protocol knows no NaN and no infinity


async def _command(words: list[str], notes: list[str] | None = None, context: Context | None = None) -> str:
    """Run a command, report its progress and note what else it says; return what it prints."""
    said = [] if notes is None else notes
    # what lies in the working folder is data, and no module of it is imported
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}

    async def listen(stream: Any) -> None:
        rest = ""
        async for text in TextReceiveStream(stream, errors="replace"):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                if (found := PROGRESS.match(line)) and context is not None:
                    message = "; ".join(filter(None, (found[4], found[3])))
                    await context.report_progress(int(found[1]), int(found[2]), message)
                else:
                    said.append(line)

    try:
        async with await anyio.open_process(
            [sys.executable, "-m", "posterity", *words], stdin=DEVNULL, env=environment
        ) as process:  # leaving by cancellation kills it
            async with anyio.create_task_group() as group:
                group.start_soon(listen, process.stderr)
                printed = b"".join([piece async for piece in process.stdout or ()])
            code = await process.wait()
    except ValueError as error:  # a NUL among the words
        raise ToolError(str(error)) from error
    if code and not printed:  # 1 with verdicts printed: a trial raised, and its row says why
        last = said[-1] if said else f"the command ended with exit code {code}"
        raise ToolError(last.removeprefix("posterity: "))
    return printed.decode()


async def _options(seeds: int | None, data: str | None, target: str | None, settings: Settings) -> list[str]:
    if data is not None:
        await anyio.to_thread.run_sync(_refuse_outside, data)  # a folder may hold many files
    given = {"seeds": seeds, "data": data, "target": target}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    for name, value in (settings or {}).items():
        if name in ("data", "target") or "=" in name:
            raise ToolError(
                f"settings must hold parameters of the claim or task, and data.OPTION, got {name!r}"
            )
        words.append(f"--set={name}={_text(value)}")
    return words


def _text(value: Any) -> str:
    """Return a value as it is written after --set."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _refuse_outside(data: str) -> None:
    """Refuse a file or folder that is neither in the working folder nor in POSTERITY_DATA, symlinks followed."""
    try:
        path = Path(data).expanduser()
        if not path.exists():
            path = Path(data.partition("?")[0]).expanduser()
        if len(path.parts) == 1 and not path.is_symlink() and not path.exists():
            return  # a name, or nothing
        here, shared = Path.cwd(), os.environ.get("POSTERITY_DATA")
        folders = [] if here == Path(here.anchor) else [here]  # an assistant may start us in /
        folders += [Path(shared).resolve()] if shared else []
        inside = any(path.resolve().is_relative_to(folder) for folder in folders)
        links = [each for each in path.rglob("*") if each.is_symlink()] if inside and path.is_dir() else []
        for each in [path, *links]:
            if not any(each.resolve().is_relative_to(folder) for folder in folders):
                raise ToolError(
                    f"data must lie in the working folder {here if here in folders else '(/ does not count)'} "
                    f"or in POSTERITY_DATA ({shared or 'not set'}), got {each}"
                )
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such home, a NUL
        why = getattr(error, "strerror", None) or error
        raise ToolError(f"data must be a name, a file or a folder, got {data!r}: {why}") from error
