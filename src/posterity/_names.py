"""Names of a package: served from its files (PEP 562), imported when they are asked for.

What a package offers grows by a file, and no list of it is kept: every file without an
underscore in front says in ``__all__`` what it offers.
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["files", "listed", "serve_files"]


@cache
def listed(path: Path) -> frozenset[str]:
    """Return what a file lists in ``__all__``, without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if getattr(target, "id", "") == "__all__":
            return frozenset(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return frozenset()


@cache
def files(folder: Path) -> dict[str, Path]:
    """Return the file that lists each name of a package."""
    return {name: path for path in sorted(folder.glob("[!_]*.py")) for name in sorted(listed(path))}


def serve_files(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose names its files list."""
    module = sys.modules[package]
    folder = Path(str(module.__file__)).parent

    def get_name(name: str) -> Any:
        if name == "__all__":
            return sorted(files(folder))
        if name.startswith("__") or name not in files(folder):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{files(folder)[name].stem}"), name)
        setattr(module, name, value)
        return value

    return get_name, lambda: sorted({*vars(module), *files(folder)})
