"""What pages say of code, read from its files: nothing is imported."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posterity._names import files
from posterity.engine.discovery import Outline, entry_modules
from posterity.lab import data, tasks
from posterity.papers import Paper

__all__ = ["Question", "api", "own_data", "question", "questions", "tasks_of"]


@dataclass(frozen=True)
class Question:
    """A task as its file says it: its first line, metric, kind of data, default set, and how it is asked."""

    name: str
    says: str
    metric: str
    better: str
    data: str
    command: str


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _call(path: Path, name: str) -> ast.Call:
    """Return the first call of a name in a file."""
    calls = (node for node in ast.walk(_parsed(path)) if isinstance(node, ast.Call))
    return next(call for call in calls if getattr(call.func, "id", "") == name)


def _given(kind: str) -> str:
    """Return what a user puts after ``--data`` for a kind of data, as Table or Graph."""
    call = _call(files(Path(str(data.__file__)).parent)[kind], "Kind")
    if call.keywords:  # the kind takes a folder
        return "YOUR-FOLDER"
    return f"YOUR{ast.literal_eval(call.args[1])[0]}"


def own_data(paper: Paper, outline: Outline) -> str:
    """Return the command that runs a claim on a user's data, empty if it takes none."""
    if "data" not in outline.defaults or paper.claims_file is None:
        return ""
    tree = _parsed(paper.claims_file)
    names = {
        each.asname or each.name: each.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == data.__name__
        for each in node.names
    }
    claim = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == outline.name)
    kind = next(getattr(arg.annotation, "id", "") for arg in claim.args.args if arg.arg == "data")
    if kind not in names:
        return ""
    target = " --target COLUMN" if "target" in outline.defaults else ""
    return f"posterity run {paper.slug} --claim {outline.name} --data {_given(names[kind])}{target}"


def question(name: str) -> Question:
    """Return what the file of a task says."""
    path = tasks.task_file(name)
    call = _call(path, "Task")
    metric, better, shipped = (ast.literal_eval(each) for each in call.args[2:5])
    kind = getattr(call.args[1], "id", "")
    target = " --target COLUMN" if any(word.arg == "takes_target" for word in call.keywords) else ""
    says = (ast.get_docstring(_parsed(path)) or "").partition("\n")[0]
    score: Any = _definition(f"{tasks.__name__}.{path.stem}", getattr(call.args[5], "id", ""))
    asked = zip(score.args.kwonlyargs, score.args.kw_defaults, strict=True)
    set_ = "".join(f" --set {arg.arg}={ast.literal_eval(default)}" for arg, default in asked)
    command = f"posterity compare {name} --data {_given(kind)}{target}{set_}"
    return Question(name, says, metric, better, shipped, command)


@cache
def questions() -> tuple[Question, ...]:
    """Return every task."""
    return tuple(map(question, tasks.task_names()))


@cache
def _entered(name: str) -> frozenset[str]:
    return frozenset(entry_modules(name))


def tasks_of(paper: Paper) -> list[Question]:
    """Return the tasks that a paper has an entry in."""
    return [each for each in questions() if paper.claims in _entered(each.name)]


def api(paper: Paper) -> list[dict[str, str]]:
    """Return name, arguments and first line of what a paper exports."""
    rows = []
    for name in paper.exports:
        node = _definition(paper.home(name), name)
        says = (ast.get_docstring(node) or "").partition("\n\n")[0] if node is not None else ""
        rows.append({"name": name, "arguments": _arguments(node), "says": " ".join(says.split())})
    return rows


def _definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Return what defines a name, in the module or where that has it from; None for a constant."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return None
    for node in _parsed(Path(spec.origin)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("posterity."):
            for each in node.names:
                if (each.asname or each.name) == name:
                    return _definition(node.module, each.name)
    return None


def _arguments(node: ast.FunctionDef | ast.ClassDef | None) -> str:
    """Return the arguments of a function, or of a class's constructor, with their defaults."""
    if isinstance(node, ast.ClassDef):
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                return _arguments(each)
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        return f"({', '.join(ast.unparse(each.target) for each in fields)})" if fields else "()"
    if node is None:
        return ""
    plain: Any = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0]
    for each in ast.walk(plain.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    if plain.args.args and plain.args.args[0].arg == "self":
        del plain.args.args[0]
    return f"({ast.unparse(plain.args)})"
