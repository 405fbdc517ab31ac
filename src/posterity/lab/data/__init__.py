"""Data by name or by file: the register of names, the cache of public sets, the kinds.

A claim annotates its ``data`` parameter with a kind; a user gives a registered name or a
file of that kind. Sets that ship with scikit-learn and generators need no network; public
sets are files that pooch checks by SHA-256, taken from the folder ``POSTERITY_DATA``
when they are there.

Each kind has a file, named as the kind: the annotation (``Graph``), its loader
(``load_graph``), the sets that it makes or that ship, how its files are read
(``read_graph``), and what every run needs of them, if reading does not say it (``require_graph``).
Options of reading stand behind the file: ``houses.csv?header=no``.
"""

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from urllib.parse import parse_qsl, quote

from posterity._names import serve_files

__all__ = [
    "Kind", "Source", "absolute", "check", "dataset", "fetch", "load", "resolve", "with_options",
]  # fmt: skip


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


@dataclass(frozen=True)
class Source:
    """Files that are read as one set.

    Attributes
    ----------
    name : str
        For messages.
    paths : tuple of Path
    facts : dict
        Of a public set, from the register.
    options : dict of str to str
        Of reading, checked by the reader of the kind.
    """

    name: str
    paths: tuple[Path, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def option(self, allowed: Mapping[str, Sequence[str] | None]) -> dict[str, str]:
        """Return the options, or say which there are and what they may be."""
        for name, value in self.options.items():
            if name not in allowed:
                known = ", ".join(allowed) or "none"
                raise ValueError(f"{self.name}: {name!r} is no option of reading it, those are {known}")
            values = allowed[name]
            if values is not None and value not in values:
                raise ValueError(f"{self.name}: {name} must be one of {', '.join(values)}, got {value!r}")
        return self.options


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

    Raises
    ------
    ValueError
        If another module makes a set of this name and kind.
    """
    kind = kind_of(annotation).name

    def keep(make: Callable[..., Any]) -> Callable[..., Any]:
        maker = _REGISTER.get((kind, name), make).__module__
        if maker != make.__module__:
            raise ValueError(f"{kind} {name!r} must have one maker, is made by {maker} and {make.__module__}")
        _REGISTER[kind, name] = make
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
    spec, _ = _apart(spec)
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
        raise ValueError(
            f"data must be {kind.name}: {allowed}, got {spec!r}, which is {' and '.join(others)}"
        )
    raise ValueError(f"data must be {kind.name}: {allowed}, got {spec!r}, which is no name and no file")


def _apart(spec: str) -> tuple[str, dict[str, str]]:
    """Return a file and the options behind it."""
    path, mark, query = spec.partition("?")
    if not mark or Path(spec).expanduser().exists():
        return spec, {}
    return path, dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))


def absolute(annotation: Any, spec: str) -> str:
    """Return a file's absolute path with its options, a name as it is: workers may run elsewhere.

    Parameters
    ----------
    annotation : annotation
    spec : str

    Returns
    -------
    str
    """
    found = resolve(annotation, spec)
    if not isinstance(found, Path):
        return spec
    return with_options(str(found.resolve()), _apart(spec)[1])


def with_options(path: str, options: Mapping[str, str]) -> str:
    """Return a file with options of reading behind it.

    Parameters
    ----------
    path : str
    options : mapping of str to str

    Returns
    -------
    str
    """
    if not options:
        return path
    return (
        path
        + ("&" if "?" in path else "?")
        + "&".join(f"{name}={quote(text, safe=',.;:')}" for name, text in options.items())
    )


def load(annotation: Any, spec: str, *, seed: int = 0, **more: Any) -> Any:
    """Return the data of a name or a file, as its kind makes or reads it.

    Parameters
    ----------
    annotation : annotation
    spec : str
    seed : int, default=0
        For generated data.
    **more
        For the reader of the kind.

    Returns
    -------
    Any
    """
    found = resolve(annotation, spec)
    if callable(found):
        return found(seed)
    kind = kind_of(annotation)
    if isinstance(found, Path):
        source = Source(found.name, (found,), options=_apart(spec)[1])
    else:
        source = Source(found, tuple(fetch(found)), public_sets()[found])
    return getattr(_module(kind), f"read_{kind.name}")(source, **more)


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


def check(annotation: Any, spec: str, needs: Callable[[Any], None] | None = None, **options: Any) -> str:
    """Load data once, so that whatever is wrong with it is said before any work.

    Parameters
    ----------
    annotation : annotation
    spec : str
        Name or file.
    needs : callable, optional
        Raises ``ValueError`` for data, as its kind's loader gives it, that will not do here.
    **options
        What the kind's loader takes, such as ``target``.

    Returns
    -------
    str
        One line that says what was read and what was done to it; empty for a generator.

    Raises
    ------
    ValueError
        For data that cannot be read, with which nothing of its kind can be done, or that
        ``needs`` refuses; the message names it.
    """
    kind = kind_of(annotation)
    made = callable(resolve(annotation, spec))
    if made and not options.get("target") and needs is None:
        return ""
    loaded = getattr(_module(kind), f"load_{kind.name}")(spec, **options)
    try:
        for refuse in (None if made else getattr(_module(kind), f"require_{kind.name}", None), needs):
            if refuse is not None:
                refuse(loaded)
    except ValueError as error:
        raise ValueError(f"{spec if made else Path(_apart(spec)[0]).name}: {error}") from error
    return getattr(loaded, "note", "")


__getattr__, __dir__ = serve_files(__name__)
