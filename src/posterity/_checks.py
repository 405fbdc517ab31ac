"""Checks of arguments: each returns the value it passes, or says what is wrong.

A message has the name, the rule and what came. Shapes, dtypes and Python numbers are
always checked; values inside tensors only where the kind is offline, so that no check
makes an accelerator wait.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "at_least",
    "class_indices",
    "finite",
    "floating",
    "has_shape",
    "indices",
    "integer",
    "interval",
    "needs",
    "one_of",
    "scalar",
    "within",
]


def _number(name: str, value: Any, kind: type, noun: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be {noun}, got {value!r}")


def integer(name: str, value: Any, low: int | None = None) -> int:
    """Return ``value`` as an int, at least ``low`` where that is given."""
    _number(name, value, Integral, "an integer" if low is None else f"an integer of at least {low}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value}")
    return int(value)


def at_least(name: str, value: Any, low: float, *, strict: bool = False) -> float:
    """Return a finite number that is at least (``strict``: greater than) ``low``."""
    rule = f"{'greater than' if strict else 'at least'} {low}"
    _number(name, value, Real, f"a number {rule}")
    if not math.isfinite(value) or value < low or (strict and value == low):
        raise ValueError(f"{name} must be {rule}, got {value}")
    return value


def within(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """Return a number that lies in the interval from ``low`` to ``high``."""
    rule = f"in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    _number(name, value, Real, f"a number {rule}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):  # NaN is neither
        raise ValueError(f"{name} must be {rule}, got {value}")
    return value


def interval(name: str, value: Any) -> tuple[float, float]:
    """Return two finite numbers (low, high), the first the lower."""
    ends = tuple(value) if isinstance(value, tuple | list) else ()
    if len(ends) != 2 or not all(isinstance(end, Real) for end in ends):
        raise ValueError(f"{name} must be two numbers (low, high), got {value!r}")
    low, high = map(float, ends)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{name} must be two finite numbers (low, high) with low < high, got {value!r}")
    return low, high


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return ``value`` if it is one of ``allowed``."""
    if not any(type(value) is type(option) and value == option for option in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def floating(name: str, value: Any, hint: str = "") -> Tensor:
    """Return a tensor of a floating dtype; ``hint`` says what to do about another."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a floating-point tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        tail = f": {hint}" if hint else ""
        raise ValueError(f"{name} must be a floating-point tensor, got dtype {value.dtype}{tail}")
    return value


def has_shape(name: str, value: Tensor, shape: Sequence[int | None], source: str = "") -> Tensor:
    """Return a tensor of this shape; None is any size, ``source`` is who says so."""
    fits = value.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        tail = f" for {source}" if source else ""
        raise ValueError(f"{name} must have shape {wanted}{tail}, got {tuple(value.shape)}")
    return value


def class_indices(name: str, value: Tensor, n: int, n_classes: int | None = None) -> Tensor:
    """Return integers, one a sample, in 0 .. n_classes - 1; values are read on the CPU, where that is free."""
    dtype = value.dtype if isinstance(value, Tensor) else None
    if dtype is None or dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise ValueError(f"{name} must hold class indices, got {dtype or type(value).__name__}")
    has_shape(name, value, (n,), "one class a sample")
    if n_classes is not None and n and value.device.type == "cpu":
        low, high = (int(end) for end in value.aminmax())
        if low < 0 or high >= n_classes:
            raise ValueError(f"{name} must be in 0..{n_classes - 1}, got values from {low} to {high}")
    return value


def indices(
    name: str, value: Any, shape: Sequence[int | None], n: int | None = None, source: str = ""
) -> Tensor:
    """Return integers of a shape in 0 .. n - 1; values are read on the CPU, where that is free."""
    dtype = value.dtype if isinstance(value, Tensor) else None
    if dtype is None or dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise ValueError(f"{name} must hold integers, got {dtype or type(value).__name__}")
    has_shape(name, value, shape, source)
    if n is not None and value.numel() and value.device.type == "cpu":
        low, high = (int(end) for end in value.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{name} must be in 0..{n - 1}, got values from {low} to {high}")
    return value


def scalar(name: str, value: Any) -> Tensor:
    """Return what a function of the user's gave as a tensor without dimensions; it must be one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"{name} must return a scalar tensor, got {getattr(value, 'shape', type(value).__name__)}"
        )
    return value.reshape(())


def finite(name: str, value: Tensor) -> Tensor:
    """Return a tensor without NaN or infinity; offline kinds only, since it reads values."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return value


def needs(module: str, extra: str) -> Any:
    """Return the module of an optional dependency, or say how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ModuleNotFoundError(
            f'{error.name} is needed here: pip install "posterity[{extra}]"', name=error.name
        ) from error
