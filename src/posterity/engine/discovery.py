"""Finding claims: by reading their files (fast, nothing imported) or by importing them."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from posterity.papers import Paper, papers

__all__ = ["Outline", "claim_outlines", "entry_modules", "load_claims"]


@dataclass(frozen=True)
class Outline:
    """What a claim's source says of it: name, form, decorator arguments, defaults, docstring."""

    name: str
    form: str
    facts: dict[str, Any]
    defaults: dict[str, Any]
    doc: str


def claim_outlines(paper: Paper) -> list[Outline]:
    """Return the claims of a paper in the order of its file, without importing it."""
    path = paper.claims_file
    return _outlines(path) if path is not None else []


@cache
def _outlines(path: Path) -> list[Outline]:
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            form = getattr(getattr(mark, "func", None), "id", "")
            if form in ("comparison", "bound", "trend") and isinstance(mark, ast.Call):
                words = {word.arg: word.value for word in mark.keywords if word.arg not in (None, "check")}
                facts = {name: ast.literal_eval(value) for name, value in words.items()}
                arguments = [arg.arg for arg in node.args.args]
                values = [ast.literal_eval(value) for value in node.args.defaults]
                defaults = dict(zip(arguments[len(arguments) - len(values) :], values, strict=True))
                found.append(Outline(node.name, form, facts, defaults, ast.get_docstring(node) or ""))
    return found


def load_claims(paper: Paper) -> dict[str, Any]:
    """Return the `Claim` objects of a paper by name, in the order of its file."""
    if paper.claims_file is None:
        raise ValueError(f"{paper.slug} is not implemented yet: `posterity list --implemented` shows what is")
    module = import_module(paper.claims)
    return {outline.name: getattr(module, outline.name) for outline in claim_outlines(paper)}


def entry_modules(task: str) -> list[str]:
    """Return the modules that register entries of a task: its own, then claims whose source does."""
    files = {paper.claims: path for paper in papers().values() if (path := paper.claims_file)}
    own = f"posterity.lab.tasks.{task.replace('-', '_')}"
    return [own, *(module for module, path in files.items() if task in _tasks_in(path))]


@cache
def _tasks_in(path: Path) -> frozenset[str]:
    calls = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    return frozenset(
        call.args[0].value
        for call in calls
        if getattr(call.func, "id", "") == "entry" and call.args and isinstance(call.args[0], ast.Constant)
    )
