"""Fingerprints: which code a trial ran, so that work on one paper leaves other evidence current.

A fingerprint covers a claim's file and what it imports of Posterity, transitively: its
method, the parts of the lab it uses. Comments, layout and docstrings do not count. The
versions of torch, numpy and scikit-learn do.
"""

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from posterity.papers import papers

__all__ = ["fingerprint", "sources"]

LIBRARIES = ("torch", "numpy", "scikit-learn")


@cache
def fingerprint(module: str) -> str:
    """Return the fingerprint of a module: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(module).items()):
        digest.update(f"{name}\0{_meaning(path)}\0".encode())
    for library in LIBRARIES:
        digest.update(f"{library} {version(library).split('+')[0]}\0".encode())
    return digest.hexdigest()[:12]


def sources(module: str) -> dict[str, Path]:
    """Return every file that counts, by module name."""
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        todo += [target for target in _imports(path) if target not in found]
    return found


@cache
def _meaning(path: Path) -> str:
    """Return the code without comments, layout and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


@cache
def _imports(path: Path) -> list[str]:
    wanted = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names if alias.name.startswith("posterity.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posterity."):
            wanted += [_definer(node.module or "", alias.name) for alias in node.names]
    # The index, the forms of claims and the engine describe and run; they do not compute.
    skip = ("posterity.papers", "posterity.engine")
    return [name for name in wanted if name != "posterity.claims" and not name.startswith(skip)]


def _definer(module: str, name: str) -> str:
    """Return the module that defines ``name`` of ``module``: a submodule, or a served name."""
    if _file(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    for paper in papers().values():
        if name in paper.exports and module == f"posterity.{paper.domain}":
            return paper.module
    return module


def _file(module: str) -> Path | None:
    if module.startswith("posterity."):
        base = Path(__file__).parent.parent.joinpath(*module.split(".")[1:])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None
