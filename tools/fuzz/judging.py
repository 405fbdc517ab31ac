"""How a call may end: in what its annotation says, or in a `ValueError` that names an argument."""

import inspect
import re
import traceback
import types
import typing
from dataclasses import is_dataclass

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor

THEIRS = (
    "sklearn",
    "torch/nn",
    "torch/optim",
    "fuzz/drawing.py",
)  # whose words are not ours: scikit-learn's, torch's, the user's

__all__ = ["misfit", "place", "rightly", "shown"]


def misfit(value, annotation, sizes):
    """Return what is wrong with a value of an annotation; ``sizes`` has, and gets, those of its dimensions."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if hasattr(annotation, "dim_str"):
        if not isinstance(value, annotation.array_type):
            return f"a {type(value).__name__} for {annotation.__name__}"
        return _misshapen(tuple(value.shape), annotation.dim_str, sizes)
    if origin in (typing.Union, types.UnionType):
        wrong = [misfit(value, part, dict(sizes)) for part in parts]
        return "" if "" in wrong else wrong[0]
    if origin is tuple:
        if parts[1:] == (Ellipsis,) and isinstance(value, tuple):
            parts = parts[:1] * len(value)
        if not isinstance(value, tuple) or len(value) != len(parts):
            return f"{shown(value)} for {annotation}"
        return _first(misfit(each, part, sizes) for each, part in zip(value, parts, strict=True))
    if not inspect.isclass(annotation) or origin or annotation in (typing.Any, inspect.Parameter.empty):
        return ""
    numbers = (np.generic,) if annotation in (float, int, bool) else ()
    if not isinstance(value, (annotation, *numbers)):
        return f"{shown(value)} for {annotation.__name__}"
    if is_dataclass(annotation) or hasattr(annotation, "_fields"):
        hints = typing.get_type_hints(annotation)
        return _first(misfit(getattr(value, name), hint, sizes) for name, hint in hints.items())
    return ""


def rightly(error, documented):
    """Return whether an error is a ValueError that names an argument of what is documented, or listed there."""
    if isinstance(error, ModuleNotFoundError | NotFittedError | MemoryError) or "allocate memory" in str(
        error
    ):
        return True  # what is asked for is not here
    if isinstance(error, ValueError):
        words = set(re.findall(r"\w+", str(error)))
        return _theirs(error) or any(words & _parameters(each) for each in documented)
    return type(error).__name__ in {name for each in documented for name in _raises(each)}


def _theirs(error):
    """Return whether an error, or that which it passes on, is not in our words."""
    raised = [each for each in (error, error.__cause__) if each is not None]
    files = [traceback.extract_tb(each.__traceback__)[-1].filename for each in raised]
    return any(name in file for name in THEIRS for file in files)


def place(error):
    """Return the last line of the library that an error came through."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/posterity/" in f.filename]
    return f"{ours[-1].filename.rpartition('/posterity/')[2]}:{ours[-1].lineno}" if ours else "the call"


def shown(value):
    """Return a value in short: few numbers themselves, else dtype and shape."""
    if isinstance(value, Tensor | np.ndarray):
        dtype, x = str(value.dtype).removeprefix("torch."), torch.as_tensor(value).detach()
        if 0 < x.numel() <= 12:
            return dtype + " " + re.sub(r"(\d\.\d{3})\d+", r"\1", str(x.tolist()))
        return f"{dtype} {tuple(x.shape)}{'' if x.double().isfinite().all() else ', not finite'}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return " ".join(re.sub(r" at 0x\w+", "", repr(value)).split())[:160]


def _misshapen(shape, dim_str, sizes):
    """Return how a shape differs from the names of its dimensions, or nothing."""
    known = {name: size for name, size in sizes.items() if re.search(rf"\b{name}\b", dim_str)}
    wrong = f"shape {shape} for ({dim_str})" + (f" where {known}" if known else "")
    words, extents = dim_str.split(), list(shape)
    several = [k for k, word in enumerate(words) if word.startswith("*") or word == "..."]
    if several:
        k, after = several[0], len(words) - several[0] - 1
        if len(extents) < len(words) - 1:
            return wrong
        middle = tuple(extents[k : len(extents) - after])
        if words[k] != "..." and sizes.setdefault(words[k].lstrip("*"), middle) != middle:
            return wrong
        words, extents = words[:k] + words[k + 1 :], extents[:k] + extents[len(extents) - after :]
    if len(words) != len(extents):
        return wrong
    fits = all(
        (int(word) if word.isdecimal() else sizes.setdefault(word, extent)) == extent
        for word, extent in zip(words, extents, strict=True)
    )
    return "" if fits else wrong


def _parameters(value):
    """Return the names of a callable's parameters, with those of all methods of the classes among its arguments."""
    signature = inspect.signature(value)
    names = set(signature.parameters)
    for kind in (value, *(parameter.annotation for parameter in signature.parameters.values())):
        if inspect.isclass(kind) and kind.__module__.startswith("posterity"):
            for method in vars(kind).values():
                names |= set(inspect.signature(method).parameters) if inspect.isfunction(method) else set()
    return names - {"self"}


def _raises(value):
    """Return the exceptions that a docstring's Raises section lists."""
    section = re.search(r"Raises\n-+\n(.*?)(\n\w[\w ]*\n-{3,}|\Z)", inspect.getdoc(value) or "", re.DOTALL)
    return re.findall(r"^(\w+)", section[1], re.MULTILINE) if section else []


def _first(found):
    return next(filter(None, found), "")
