"""Fingerprints: which code a trial ran, so that other work leaves its evidence current.

A fingerprint covers the definitions of Posterity that a claim reaches by name, transitively:
in its file, its method, the lab and what papers share. What a module does on import counts as
soon as the module is reached: registered data sets, loops, conditions. What code says counts,
not where it stands: a definition may move to another file, and comments, layout, docstrings,
the types of arguments, the paths of our own imports and what a claim says of itself beside
its judgement do not count. The versions of torch,
numpy and scikit-learn do. What reads files counts only for trials that read one.
"""

import ast
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from posterity._names import files
from posterity.papers import Paper, papers

__all__ = ["fingerprint", "is_current", "reader", "sources"]

LIBRARIES = ("torch", "numpy", "scikit-learn")
# Decorators of what counts only where it is named; other calls, such as `dataset`, register.
BY_NAME = {"dataclass", "entry", "comparison", "bound", "trend"}
# What a claim's decorator says that changes no value and no verdict.
ASIDE = {"where", "reason", "time_limit", "smallest", "figure", "seeds", "check"}
OURS = re.compile(r"(?<=(?:name|dule)=')posterity\.[\w.]+")
# The index, the forms of claims, the engine and the registers describe, find and run; they do not compute.
SKIP = {
    "posterity.papers", "posterity._names", "posterity.claims", "posterity.lab.data", "posterity.lab.tasks",
}  # fmt: skip


@cache
def fingerprint(module: str, claim: str = "") -> str:
    """Return the fingerprint of a claim of a module, or of a module: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    meanings = {
        _parsed(name).meaning(each) for name, found in _reached(module, claim).items() for each in found
    }
    for meaning in sorted(meanings):
        digest.update(f"{meaning}\0".encode())
    for library in LIBRARIES:
        digest.update(f"{library} {version(library).split('+')[0]}\0".encode())
    return digest.hexdigest()[:12]


def reader(kind: str) -> str:
    """Return the kind of a file that a trial reads, and the fingerprint of what reads it."""
    return f"{kind}:{fingerprint(f'posterity.lab.data.{kind}', f'read_{kind}')}"


def is_current(code: str, module: str, claim: str) -> bool:
    """Return whether a trial's code, its reader's among it, is that of the sources as they are."""
    own, _, read = code.partition("+")
    return own == fingerprint(module, claim) and read in ("", reader(read.partition(":")[0]) if read else "")


def sources(module: str) -> set[str]:
    """Return the name of every module of which something counts."""
    return set(_reached(module, ""))


class _Parsed:
    """A module's top-level statements, what each binds, and which always count."""

    def __init__(self, path: Path) -> None:
        self.body = [
            each for node in ast.parse(path.read_text(encoding="utf-8")).body for each in _apart(node)
        ]
        for node in self.body:
            _strip(node)
        self.binds: dict[str, int] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.imported: set[int] = set()  # imports from elsewhere: they count where they are used
        self.always: set[int] = set()
        for number, node in enumerate(self.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                ours = dict(_imported(node))
                self.imports |= ours
                self.binds |= {name: number for name in map(_bound, node.names) if name not in ours}
                self.imported.add(number)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.binds[node.name] = number
                registrars = {_name(each.func) for each in node.decorator_list if isinstance(each, ast.Call)}
                if registrars - BY_NAME:
                    self.always.add(number)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (each.id for t in targets for each in ast.walk(t) if isinstance(each, ast.Name)):
                    self.binds[name] = number
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.always.add(number)

    def meaning(self, number: int) -> str:
        """Return what a statement says; where an import of ours comes from is not part of it."""
        return OURS.sub("posterity", ast.dump(self.body[number]))

    def uses(self, number: int) -> Iterator[tuple[str, str]]:
        """Yield (module, name) of each import that a statement uses, ("", name) of its own."""
        reached = set()  # names of modules, of which an attribute is used
        for node in ast.walk(self.body[number]):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = self.imports.get(node.value.id, ("", ""))
                if module and not name:
                    yield module, node.attr
                    reached.add(node.value)
            elif isinstance(node, ast.Name) and node.id in self.imports and node not in reached:
                yield self.imports[node.id]
            elif isinstance(node, ast.Name) and node.id in self.binds:
                yield "", node.id
            elif isinstance(node, ast.Import | ast.ImportFrom):
                yield from (target for _, target in _imported(node))


def _reached(root: str, claim: str) -> dict[str, set[int]]:
    """Return the numbers of the statements that count, by module."""
    found: dict[str, set[int]] = defaultdict(set)
    todo: list[tuple[str, str]] = [(root, claim)]
    while todo:
        module, name = todo.pop()
        if module in SKIP or module.startswith("posterity.engine") or _file(module) is None:
            continue
        parsed = _parsed(module)
        new = set(parsed.always)
        if name in parsed.imports:
            todo.append(parsed.imports[name])
        elif name in parsed.binds:
            new.add(parsed.binds[name])
        else:  # the module as a whole
            new |= set(parsed.binds.values()) - parsed.imported
        new -= found[module]
        found[module] |= new
        todo += [(of or module, used) for number in new for of, used in parsed.uses(number)]
    return found


def _apart(node: ast.stmt) -> Iterator[ast.stmt]:
    """Yield an import name by name, since each counts where it is used; other statements as they are."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        yield node
        return
    for alias in node.names:
        yield (
            ast.Import([alias])
            if isinstance(node, ast.Import)
            else ast.ImportFrom(node.module, [alias], node.level)
        )


def _strip(statement: ast.stmt) -> None:
    """Take out of a statement what computes nothing."""
    for node in ast.walk(statement):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and _name(mark.func) in ("comparison", "bound", "trend"):
                    mark.keywords = [word for word in mark.keywords if word.arg not in ASIDE]
        if isinstance(node, ast.arg):
            node.annotation = None


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the bound name and (module, name) of each import from Posterity."""
    for alias in node.names:
        if isinstance(node, ast.Import) and alias.name.startswith("posterity."):
            yield _bound(alias), (alias.name, "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posterity."):
            yield _bound(alias), _definer(node.module or "", alias.name)


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.split(".")[0]


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _definer(module: str, name: str) -> tuple[str, str]:
    """Return where ``name`` of ``module`` is defined: a submodule, a served name, or there."""
    if paper := _exported().get(f"{module}.{name}"):
        return paper.home(name), name
    if _file(f"{module}.{name}") is not None:
        return f"{module}.{name}", ""
    package = _file(module)
    if package is not None and package.name == "__init__.py" and name in files(package.parent):
        return f"{module}.{files(package.parent)[name].stem}", name
    return module, name


@cache
def _exported() -> dict[str, Paper]:
    """Return the paper of each name that a domain serves."""
    return {
        f"posterity.{paper.domain}.{name}": paper for paper in papers().values() for name in paper.exports
    }


@cache
def _parsed(module: str) -> _Parsed:
    path = _file(module)
    assert path is not None
    return _Parsed(path)


def _file(module: str) -> Path | None:
    if module.startswith("posterity."):
        base = Path(__file__).parent.parent.joinpath(*module.split(".")[1:])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None
