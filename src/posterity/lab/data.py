"""Data by name or by file: the kinds, the register of names, the cache of public sets.

A claim annotates its ``data`` parameter with a kind; a user gives a registered name or a
file of that kind. Sets that ship with scikit-learn and generators need no network; public
sets are files that pooch checks by SHA-256, taken from the folder ``POSTERITY_DATA``
when they are there.
"""

import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from numpy import ndarray

__all__ = [
    "Functions",
    "Graph",
    "Images",
    "Kind",
    "Labelled",
    "Points",
    "Series",
    "Table",
    "check",
    "dataset",
    "fetch",
    "resolve",
    "split",
]


@dataclass(frozen=True)
class Kind:
    """A kind of data: its name, the module that loads it, the files it may be given as.

    Attributes
    ----------
    name, module : str
    suffixes : tuple of str
        Endings of files that are read.
    folder : bool
        Whether a folder may be given.
    """

    name: str
    module: str
    suffixes: tuple[str, ...]
    folder: bool = False

    @property
    def files(self) -> str:
        """The files it takes, in words."""
        return ", ".join(f"*{s}" for s in self.suffixes) + (" or a folder" if self.folder else "")


Points = Annotated[str, Kind("points", "points", (".csv", ".parquet", ".npy"))]
Table = Annotated[str, Kind("table", "tables", (".csv", ".tsv", ".data", ".parquet"))]
Images = Annotated[str, Kind("images", "images", (".npz",), folder=True)]
Labelled = Annotated[str, Kind("labelled", "labelled", (".npz",), folder=True)]
Graph = Annotated[str, Kind("graph", "graphs", (".npz",))]
Functions = Annotated[str, Kind("functions", "functions", (".csv", ".parquet"))]
Series = Annotated[str, Kind("series", "series", (".csv", ".parquet", ".txt", ".gz"))]

_REGISTER: dict[tuple[str, str], Callable[..., Any]] = {}


def kind_of(annotation: Any) -> Kind:
    """Return the kind in an annotation such as `Points`."""
    return next(arg for arg in get_args(annotation)[1:] if isinstance(arg, Kind))


def dataset(annotation: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function ``(seed) -> data`` under a name of a kind.

    Parameters
    ----------
    annotation : Points, Table, Images, Labelled, Graph, Functions or Series
        The kind of data that the function returns.
    name : str
        What a user writes after ``--data``.

    Returns
    -------
    callable
        A decorator that returns the function as it is.
    """

    def keep(make: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTER[kind_of(annotation).name, name] = make
        return make

    return keep


@cache
def public_sets() -> dict[str, dict[str, Any]]:
    """Return the facts about each public file: kind, path, url, sha256, reading options."""
    return tomllib.loads(Path(__file__).with_name("registry.toml").read_text(encoding="utf-8"))


def names(kind: Kind) -> list[str]:
    """Return the registered names of a kind, sorted."""
    import_module(f"posterity.lab.{kind.module}")
    made = {name for of, name in _REGISTER if of == kind.name}
    return sorted(made | {name for name, facts in public_sets().items() if facts["kind"] == kind.name})


def resolve(annotation: Any, spec: str) -> Callable[..., Any] | str | Path:
    """Return what a SPEC stands for: a generator, a public set's name, or a path.

    Parameters
    ----------
    annotation : Points, Table, Images, Labelled, Graph, Functions or Series
    spec : str

    Returns
    -------
    callable, str or Path

    Raises
    ------
    ValueError
        If it is neither a registered name of this kind nor a file of it, with what is.
    """
    kind = kind_of(annotation)
    known = names(kind)
    if (kind.name, spec) in _REGISTER:
        return _REGISTER[kind.name, spec]
    if spec in known:
        return spec
    path = Path(spec).expanduser()
    allowed = f"a name ({', '.join(known)}) or {kind.files}"
    if path.is_dir():
        if kind.folder:
            return path
        raise ValueError(f"data must be {kind.name}: {allowed}, got the folder {spec}")
    if path.is_file():
        if path.name.lower().endswith(kind.suffixes):
            return path
        raise ValueError(f"data must be {kind.name}: {allowed}, got the file {spec}")
    others = sorted({of for of, name in _REGISTER if name == spec} | {
        facts["kind"] for name, facts in public_sets().items() if name == spec
    })  # fmt: skip
    if others:
        raise ValueError(f"data must be {kind.name}: {allowed}, got {spec!r}, which is {others[0]}")
    raise ValueError(f"data must be {kind.name}: {allowed}, got {spec!r}, which is no name and no file")


def fetch(name: str) -> list[Path]:
    """Return the checked files of a public set, from ``POSTERITY_DATA`` or its URL.

    Parameters
    ----------
    name : str

    Returns
    -------
    list of Path
    """
    import pooch

    facts = public_sets()[name]
    folder = os.environ.get("POSTERITY_DATA") or str(pooch.os_cache("posterity"))
    paths = []
    for part in facts["files"]:
        keeper = pooch.create(
            path=folder,
            base_url="",
            registry={part["path"]: part["sha256"]},
            urls={part["path"]: part["url"]},
        )
        keeper.logger = None
        target = Path(folder) / part["path"]
        try:
            if target.is_file():
                if pooch.file_hash(str(target)) != part["sha256"]:
                    raise ValueError(f"{target} is not the published {name}: its SHA-256 differs; remove it")
                paths.append(target)
                continue
            paths.append(Path(keeper.fetch(part["path"])))
        except (OSError, AttributeError) as error:
            raise ValueError(
                f"{name} is not in {folder} and could not be downloaded from {part['url']}: "
                "put the file there or set POSTERITY_DATA to a folder that holds it"
            ) from error
    return paths


def check(annotation: Any, spec: str, **options: Any) -> str:
    """Load data once, so that whatever is wrong with it is said before any work.

    Parameters
    ----------
    annotation : Points, Table, Images, Labelled, Graph, Functions or Series
    spec : str
        Name or file.
    **options
        What the kind's loader takes, such as ``target``.

    Returns
    -------
    str
        One line that says what was read and what was done to it; empty for a generator.
    """
    kind = kind_of(annotation)
    found = resolve(annotation, spec)
    if callable(found) and not options.get("target"):
        return ""
    loaded = getattr(import_module(f"posterity.lab.{kind.module}"), f"load_{kind.name}")(spec, **options)
    return getattr(loaded, "note", "")


def split(
    n: int, fractions: Sequence[float], seed: int, *, stratify: ndarray | None = None
) -> tuple[ndarray, ...]:
    """Return disjoint index arrays of a random split.

    Parameters
    ----------
    n : int
        How many rows.
    fractions : sequence of float
        The share of each part; they sum to at most 1.
    seed : int
    stratify : ndarray of shape (n,), optional
        Labels whose shares each part keeps, as nearly as counts allow.

    Returns
    -------
    tuple of ndarray
        Sorted-at-random indices, one array a part.
    """
    if sum(fractions) > 1 + 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions must be positive and sum to at most 1, got {tuple(fractions)}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if stratify is not None:  # deal each class out evenly: sort by the rank within its class
        labels = np.asarray(stratify)[order]
        place = np.empty(n)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = order[np.argsort(place, kind="stable")]
    cuts = np.round(np.cumsum([0.0, *fractions]) * n).astype(int)
    return tuple(rng.permutation(order[low:high]) for low, high in zip(cuts[:-1], cuts[1:], strict=True))
