"""The index: one TOML record a paper, read without importing what it describes.

Whether a paper is implemented is found from the code: its method file exists. Other
packages add papers through the entry point group ``posterity.papers``, whose value is a
package that holds records; such a record names its files in ``module`` and ``claims``.
"""

import json
import os
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from posterity._names import listed

__all__ = ["DOMAINS", "Paper", "get", "method_modules", "papers", "public_modules", "serve"]

ROOT = Path(__file__).parent.parent
DOMAINS = (
    "transport", "graphs", "uncertainty", "privacy", "federated", "fairness", "robustness",
    "labels", "clustering", "tabular", "timeseries", "generative", "coding", "compression",
    "representation", "transfer", "optimization", "dynamics", "combinatorial", "language",
    "rl", "imitation", "vision", "scenes", "science",
)  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """A record: facts about a paper and, once it is implemented, what it gives.

    Attributes
    ----------
    slug, domain, title, venue, track : str
    authors : tuple of str
    summary : str
        One line: what the method does for whom.
    tags : tuple of str
        Words that people search for, problems before names.
    kind : str
        The kind of interface (loss, layer, estimator, solver, ...).
    exports : tuple of str
        Public names, equal to the ``__all__`` of its method files together.
    problem : str
        The problem it solves, in the words of a person who has it.
    lines : str
        The lines that use it.
    labels, gpu : str
        What it needs of them.
    extra : str
        The extra to install, empty if none.
    departures : tuple of str
        Each departure from the paper, and each slip of official code not copied.
    own_data : str
        Where no claim takes ``--data``: what takes a user's files instead, or why nothing does.
    url : str
        Where to read the paper.
    since : str
        The version that brought it.
    module, claims : str
        Import paths, found from domain and slug unless the record says otherwise.
    parts : tuple of str
        Names of further method files beside the first, one an idea.
    """

    slug: str
    domain: str
    title: str
    authors: tuple[str, ...]
    venue: str
    track: str
    summary: str
    tags: tuple[str, ...]
    kind: str = ""
    exports: tuple[str, ...] = ()
    problem: str = ""
    lines: str = ""
    labels: str = ""
    gpu: str = ""
    extra: str = ""
    departures: tuple[str, ...] = ()
    own_data: str = ""
    url: str = ""
    since: str = ""
    module: str = ""
    claims: str = ""
    parts: tuple[str, ...] = ()
    _root: Path = field(default=ROOT, repr=False)

    @property
    def year(self) -> int:
        """Year of the venue."""
        return int(self.venue.rsplit(" ", 1)[1])

    @property
    def method_file(self) -> Path | None:
        """File of the method, the first of them, or None while nobody has written it."""
        return self._file(self.module)

    @property
    def modules(self) -> tuple[str, ...]:
        """Import paths of its method files."""
        package = self.module.rpartition(".")[0]
        return (self.module, *(f"{package}.{part}" for part in self.parts))

    def home(self, name: str) -> str:
        """Return the module that defines an exported name, found without importing any."""
        if not self.parts:
            return self.module
        for module in self.modules:
            path = self._file(module)
            if path is not None and name in listed(path):
                return module
        raise ValueError(f"{self.slug}: no method file has {name!r} in its __all__")

    @property
    def claims_file(self) -> Path | None:
        """File of its claims, or None."""
        return self._file(self.claims)

    @property
    def implemented(self) -> bool:
        """Whether the method file exists."""
        return self.method_file is not None

    def _file(self, module: str) -> Path | None:
        package, _, rest = module.partition(".")
        if package == "posterity":  # found without importing the domain, which may be heavy
            path = (self._root / rest.replace(".", "/")).with_suffix(".py")
        else:
            spec = find_spec(module)
            path = Path(spec.origin) if spec and spec.origin else self._root / "missing"
        return path if path.is_file() else None

    def evidence(self) -> dict[str, Any]:
        """Return what came with the package: the rows of its ``claims`` and its ``parity``, None without."""
        path = self._root / "evidence" / f"{self.slug}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {"claims": [], "parity": None, **stored}

    def bibtex(self) -> str:
        """Return the citation, made from the record."""
        family = self.authors[0].rsplit(" ", 1)[-1].lower()
        key = "".join(c for c in family if c.isalnum()) + f"{self.year}{self.slug.replace('-', '')}"
        place = "International Conference on Learning Representations"
        rows = {
            "title": "{" + self.title + "}",
            "author": " and ".join(self.authors),
            "booktitle": place if self.venue.startswith("ICLR") else self.venue,
            "year": str(self.year),
        }
        if self.url:
            rows["url"] = self.url
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in rows.items())
        return f"@inproceedings{{{key},\n{body}\n}}"


def read(path: Path, root: Path = ROOT) -> Paper:
    """Return the record in a TOML file, its fields checked."""
    return record(path, tomllib.loads(path.read_text(encoding="utf-8")), root)


def record(path: Path, facts: dict[str, Any], root: Path = ROOT) -> Paper:
    """Return the record that a file's facts describe, its fields checked."""
    known = {f.name for f in fields(Paper) if not f.name.startswith("_")}
    if unknown := sorted(set(facts) - known):
        raise ValueError(f"{path.name}: unknown field {unknown[0]!r}, allowed are {sorted(known)}")
    lists = ("authors", "tags", "exports", "departures", "parts")
    for name, value in facts.items():
        if name in lists:
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise ValueError(f"{path.name}: {name} must be a list of strings, got {value!r}")
            facts[name] = tuple(value)
        elif not isinstance(value, str):
            raise ValueError(f"{path.name}: {name} must be a string, got {value!r}")
    stem = facts.get("slug", "").replace("-", "_")
    stem = f"_{stem}" if stem[:1].isdigit() else stem
    facts.setdefault("module", f"posterity.{facts.get('domain')}.{stem}")
    facts.setdefault("claims", f"posterity.claims.{facts.get('domain')}.{stem}")
    try:
        return Paper(**facts, _root=root)
    except TypeError as error:
        raise ValueError(f"{path.name}: {str(error).split('__init__() ')[-1]}") from error


@cache
def papers() -> dict[str, Paper]:
    """Return every record by slug: ours, then those of other packages."""
    ours = [record(ROOT / "papers" / name, facts) for name, facts in _parsed(ROOT / "papers").items()]
    found = {paper.slug: paper for paper in ours}
    for entry in entry_points(group="posterity.papers"):
        spec = find_spec(entry.value)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(place).glob("*.toml")):
                paper = read(path)
                found.setdefault(paper.slug, paper)
    return found


def _parsed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of every TOML file of a folder by file name.

    Parsing 160 files takes longer than the commands that read them may, so what was parsed
    is kept in ``__pycache__``, where that can be written, until a file changes.
    """
    files = sorted((each.name, each.stat()) for each in os.scandir(folder) if each.name.endswith(".toml"))
    stamp = [[name, stat.st_mtime_ns, stat.st_size] for name, stat in files]
    kept = folder / "__pycache__" / "records.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        cached = json.loads(kept.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp:
            return cached["facts"]
    facts = {name: tomllib.loads((folder / name).read_text(encoding="utf-8")) for name, _ in files}
    with suppress(OSError):
        kept.parent.mkdir(exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"stamp": stamp, "facts": facts}), encoding="utf-8")
        part.replace(kept)
    return facts


def method_modules() -> set[str]:
    """Return the import path of every method file of every paper."""
    return {module for paper in papers().values() for module in paper.modules}


def public_modules(domain: str) -> list[str]:
    """Return the import paths of a domain's public modules, which its papers share and users call.

    They are the files of the domain that belong to no paper and have no underscore in front.
    """
    taken = method_modules()
    stems = (path.stem for path in sorted((ROOT / domain).glob("[!_]*.py")))
    return [name for name in (f"posterity.{domain}.{stem}" for stem in stems) if name not in taken]


def get(slug: str) -> Paper:
    """Return the record of a slug, or say which slugs are near it."""
    if slug in papers():
        return papers()[slug]
    import difflib

    near = difflib.get_close_matches(slug, papers(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`posterity list` shows all"
    raise ValueError(f"unknown paper {slug!r}: {hint}")


class _Domain(ModuleType):
    """A domain's package: a function that is named as its file is served, and not the file."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in getattr(value, "__all__", ()):
            value = getattr(value, name)
        super().__setattr__(name, value)


def serve(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a domain: names come from its records.

    Nothing is imported before a name is asked for (PEP 562). The domain's public modules are
    served as modules.
    """
    domain = package.rsplit(".", 1)[-1]
    sys.modules[package].__class__ = _Domain

    @cache
    def names() -> dict[str, Paper | None]:
        shared = {name.rpartition(".")[2]: None for name in public_modules(domain)}
        here = (paper for paper in papers().values() if paper.domain == domain and paper.implemented)
        return shared | {name: paper for paper in here for name in paper.exports}

    def get_name(name: str) -> Any:
        if name == "__all__":
            return sorted(names())
        if name.startswith("__") or name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        paper = names()[name]
        if paper is None:
            return import_module(f"{package}.{name}")
        value = getattr(import_module(paper.home(name)), name)
        setattr(sys.modules[package], name, value)
        return value

    return get_name, lambda: sorted(names())
