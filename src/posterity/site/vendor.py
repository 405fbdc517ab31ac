"""A method as one file: its files in one, with what they import of Posterity, licence and citation."""

import ast
from collections import defaultdict
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

    Raises
    ------
    ValueError
        If two of its files define the same name for different things.
    """
    gathered = _Gathered(paper)
    bibtex = "\n".join("#     " + line for line in paper.bibtex().splitlines())
    header = HEADER.format(
        title=paper.title, version=posterity.__version__, module=paper.module, bibtex=bibtex
    )
    names = "".join(f'\n    "{name}",' for name in sorted(paper.exports))
    head = "\n\n".join([_Source(paper.module).docstring, gathered.imports(), f"__all__ = [{names}\n]"])
    return header + "\n\n\n".join([head, *gathered.texts]) + "\n"


class _Source:
    """A module's text, and what each of its top-level statements is."""

    def __init__(self, module: str) -> None:
        path = Path(posterity.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        text = path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        self.ours: dict[str, tuple[str, str]] = {}  # bound name -> module and name
        self.outside: dict[str, tuple[str, str]] = {}  # bound name -> module and name, "" for the module
        self.defined: dict[str, ast.stmt] = {}
        self.docstring = ""
        self.rest: list[ast.stmt] = []  # what is neither an import, nor the docstring, nor __all__
        for number, node in enumerate(ast.parse(text).body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._imported(node)
                continue
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            if number == 0 and isinstance(node, ast.Expr):
                self.docstring = "\n".join(self.lines[node.lineno - 1 : node.end_lineno])
            elif "__all__" not in names:
                self.rest.append(node)
                for name in [getattr(node, "name", ""), *names]:
                    self.defined[name] = node

    def _imported(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            bound = alias.asname or alias.name.split(".")[0]
            if isinstance(node, ast.Import):
                self.outside[bound] = (alias.name, "")
            elif (node.module or "").startswith("posterity."):
                self.ours[bound] = (node.module or "", alias.name)
            else:
                self.outside[bound] = (node.module or "", alias.name)

    def text(self, node: ast.stmt) -> str:
        """Return a statement with its decorators and the comments right above it."""
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : node.end_lineno])


class _Gathered:
    """The statements of a paper's files and of what they use of shared modules, dependencies first."""

    def __init__(self, paper: Paper) -> None:
        self.own = paper.modules
        self.texts: list[str] = []
        self._outside: dict[str, tuple[str, str]] = {}
        self._origin: dict[str, str] = {}  # defined name -> its module
        self._done: set[tuple[str, str]] = set()
        for module in reversed(self.own):  # the first file last: it is built on the others
            self._whole(module)

    def _whole(self, module: str) -> None:
        if (module, "") in self._done:
            return
        self._done.add((module, ""))
        source = _Source(module)
        for home, name in source.ours.values():
            self._whole(home) if home in self.own else self._definition(home, name)
        if module != self.own[0]:
            title = source.docstring.strip('"').splitlines()[0].strip('"')
            self.texts.append(f"# --- {title}")
        for node in source.rest:
            self._keep(source, module, node)

    def _definition(self, module: str, name: str) -> None:
        """Keep one definition of a shared module, with what it uses."""
        if (module, name) in self._done:
            return
        self._done.add((module, name))
        source = _Source(module)
        if name not in source.defined:  # that module has it from another
            self._definition(*source.ours[name])
            return
        node = source.defined[name]
        for used in dict.fromkeys(each.id for each in ast.walk(node) if isinstance(each, ast.Name)):
            if used in source.ours:
                self._definition(*source.ours[used])
            elif used in source.defined and used != name:
                self._definition(module, used)
        self._keep(source, module, node)

    def _keep(self, source: _Source, module: str, node: ast.stmt) -> None:
        for name in (name for name, each in source.defined.items() if each is node and name):
            if self._origin.setdefault(name, module) != module:
                raise ValueError(f"{name} is defined in {self._origin[name]} and in {module}")
        for used in {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & set(source.outside):
            if self._outside.setdefault(used, source.outside[used]) != source.outside[used]:
                raise ValueError(f"{used} is two things in the files of {self.own[0]}")
        text = source.text(node)
        small = "\n" not in text and self.texts and not self.texts[-1].startswith(("def ", "class ", "@"))
        if small and "\n\n" not in self.texts[-1]:
            self.texts[-1] += "\n" + text
        else:
            self.texts.append(text)

    def imports(self) -> str:
        """Return the import statements of what is used."""
        whole, parts = [], defaultdict(list)
        for bound, (module, name) in sorted(self._outside.items()):
            alias = "" if bound in (module.split(".")[0], name) else f" as {bound}"
            whole.append(f"import {module}{alias}") if not name else parts[module].append(name + alias)
        return "\n".join(
            [
                *whole,
                *(f"from {home} import {', '.join(sorted(names))}" for home, names in sorted(parts.items())),
            ]
        )
