"""A method as one file: the few checks it imports are put in, licence and citation on top."""

import ast
from pathlib import Path

import posterity
from posterity import _checks
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
    wanted: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "posterity._checks":
            wanted += [alias.name for alias in node.names]
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = "\0"
    lines = [line for line in lines if line != "\0"]
    if wanted:
        imports = max(
            node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
        )
        removed = len(source.splitlines()) - len(lines)
        at = imports - removed
        lines[at:at] = [*_checks_source(wanted, "\n".join(lines)), ""]
    header = HEADER.format(
        title=paper.title, version=posterity.__version__, module=paper.module,
        bibtex="\n".join("#     " + line for line in paper.bibtex().splitlines()),
    )  # fmt: skip
    return header + "\n".join(lines).rstrip() + "\n"


def _checks_source(wanted: list[str], method: str) -> list[str]:
    """Return imports and functions of `_checks` that are wanted, with what those call."""
    source = Path(_checks.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    needed, todo = set(), list(wanted)
    while todo:
        name = todo.pop()
        if name in functions and name not in needed:
            needed.add(name)
            todo += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
    bodies = [ast.get_source_segment(source, functions[name]) or "" for name in functions if name in needed]
    used = {node.id for name in needed for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
    imports = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                if (alias.asname or alias.name) in used and start + alias.name not in method:
                    imports.append(start + alias.name)
    return [*imports, *(line for body in bodies for line in ["", "", *body.splitlines()])]
