"""A method as one file: what it imports of Posterity is put in, licence and citation on top."""

import ast
from collections.abc import Iterator
from pathlib import Path

import posterity
from posterity.papers import Paper

__all__ = ["vendored"]

HEADER = """\
# {title}
# From Posterity {version}, {module}. Licensed under the Apache License, Version 2.0;
# you may obtain a copy at https://www.apache.org/licenses/LICENSE-2.0
# Cite the paper as
#
{bibtex}
"""


def vendored(paper: Paper) -> str:
    """Return the source of a paper's method that imports nothing of Posterity.

    Parameters
    ----------
    paper : Paper
        An implemented one.

    Returns
    -------
    str
    """
    assert paper.method_file is not None
    source = paper.method_file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    wanted = [pair for node in tree.body for pair in _private_imports(node)]
    for node in tree.body:
        if list(_private_imports(node)):
            lines[node.lineno - 1 : node.end_lineno] = ["\0"] * (
                (node.end_lineno or node.lineno) - node.lineno + 1
            )
    if wanted:
        last = max(
            node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
        )
        lines[last:last] = [*_definitions(wanted, source), ""]
    header = HEADER.format(
        title=paper.title, version=posterity.__version__, module=paper.module,
        bibtex="\n".join("#     " + line for line in paper.bibtex().splitlines()),
    )  # fmt: skip
    return header + "\n".join(line for line in lines if line != "\0").rstrip() + "\n"


def _private_imports(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what is imported from the checks or from a shared part of the domain."""
    module = getattr(node, "module", None) or ""
    if module.startswith("posterity.") and module.rpartition(".")[2].startswith("_"):
        yield from ((module, alias.name) for alias in getattr(node, "names", []))


def _definitions(wanted: list[tuple[str, str]], method: str) -> list[str]:
    """Return imports and definitions that are wanted, with what those use, dependencies first."""
    imports: dict[str, None] = {}
    bodies: dict[tuple[str, str], list[str]] = {}

    def add(module: str, name: str) -> None:
        if (module, name) in bodies:
            return
        source = _source(module)
        definitions: dict[str, ast.stmt] = {}
        elsewhere: dict[str, tuple[str, str]] = {}
        outside: dict[str, str] = {}
        for node in ast.parse(source).body:
            private = list(_private_imports(node))
            if private:
                elsewhere |= {pair[1]: pair for pair in private}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                for alias in node.names:
                    bound = alias.asname or alias.name
                    outside[bound] = start + alias.name + (f" as {bound}" if alias.asname else "")
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                definitions[node.targets[0].id] = node
        node = definitions[name]
        for used in dict.fromkeys(each.id for each in ast.walk(node) if isinstance(each, ast.Name)):
            if used in elsewhere:
                add(*elsewhere[used])
            elif used in definitions and used != name:
                add(module, used)
            elif used in outside and outside[used] not in method:
                imports[outside[used]] = None
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        gap = [] if isinstance(node, ast.Assign) else ["", ""]
        bodies[module, name] = gap + source.splitlines()[first - 1 : node.end_lineno]

    for module, name in wanted:
        add(module, name)
    return [*imports, *(line for body in bodies.values() for line in body)]


def _source(module: str) -> str:
    return (
        Path(posterity.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text("utf-8")
    )
