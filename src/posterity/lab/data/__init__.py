"""Data by name or by file: the register of names, the cache of public sets, the kinds.

A claim annotates its ``data`` parameter with a kind; a user gives a registered name or a
file of that kind. Sets that ship with scikit-learn and generators need no network; public
sets are files that pooch checks by SHA-256, taken from the folder ``POSTERITY_DATA``
when they are there.

Each kind has a file, named as the kind: the annotation (``Graph``), its loader
(``load_graph``) and the sets that it makes or that ship. This file finds; those read.
"""

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from posterity._names import serve_files

__all__ = ["Kind", "check", "dataset", "fetch", "kind_of", "names", "public_sets", "resolve"]


@dataclass(frozen=True)
class Kind:
    """A kind of data: its name, which is its file's here, and the files it may be given as.

    Attributes
    ----------
    name : str
    suffixes : tuple of str
        Endings of files that are read.
    folder : bool
        Whether a folder may be given.
    """

    name: str
    suffixes: tuple[str, ...]
    folder: bool = False

    @property
    def files(self) -> str:
        """The files it takes, in words."""
        return ", ".join(f"*{s}" for s in self.suffixes) + (" or a folder" if self.folder else "")


_REGISTER: dict[tuple[str, str], Callable[..., Any]] = {}


def kind_of(annotation: Any) -> Kind:
    """Return the kind in an annotation such as `Points`."""
    return next(arg for arg in get_args(annotation)[1:] if isinstance(arg, Kind))


def _module(kind: Kind) -> ModuleType:
    return import_module(f"{__name__}.{kind.name}")


def dataset(annotation: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function ``(seed) -> data`` under a name of a kind.

    Parameters
    ----------
    annotation : annotation
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
    _module(kind)
    made = {name for of, name in _REGISTER if of == kind.name}
    return sorted(made | {name for name, facts in public_sets().items() if facts["kind"] == kind.name})


def resolve(annotation: Any, spec: str) -> Callable[..., Any] | str | Path:
    """Return what a SPEC stands for: a generator, a public set's name, or a path.

    Parameters
    ----------
    annotation : annotation
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
    annotation : annotation
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
    loaded = getattr(_module(kind), f"load_{kind.name}")(spec, **options)
    return getattr(loaded, "note", "")


__getattr__, __dir__ = serve_files(__name__)
