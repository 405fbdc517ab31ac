"""Low precision: what accumulates or cancels is computed in float32 at least.

bfloat16 has three significant digits and float16 ends at 65,504: a sum of a few hundred terms
stops growing in one, a square overflows in the other. Under autocast matrix products are
made in them, whatever their inputs are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["NARROW", "rounding", "unit_rows", "wide", "widened"]

NARROW = (torch.bfloat16, torch.float16)
Function = TypeVar("Function", bound=Callable[..., Any])


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 where its dtype is narrower, else as it is."""
    return x.float() if x.dtype in NARROW else x


def rounding(dtype: torch.dtype, least: float) -> float:
    """Return a relative tolerance: ``least``, or what rounding to the dtype alone may cost."""
    return max(least, torch.finfo(dtype).eps)


def unit_rows(x: Tensor, dim: int = -1) -> Tensor:
    """Return vectors along ``dim`` divided by their norms, zeros where they are zero; in float32 at least.

    They are first divided by a power of two near their largest entry, which rounds nothing: squares of
    large numbers overflow, those of small ones vanish.
    """
    x = wide(x)
    if not x.shape[dim]:
        return x
    largest, most = x.detach().abs().amax(dim, keepdim=True), 126 if x.dtype == torch.float32 else 1022
    power = torch.frexp(largest).exponent.to(x).clamp(-most, most)
    return torch.nn.functional.normalize(x / torch.exp2(power), dim=dim)


def widened(function: Function) -> Function:
    """Let a function of tensors compute in float32 at least, outside autocast.

    Narrower arguments are widened, and results have the dtype of the first floating-point
    tensor among the arguments.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        floats = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        if not floats:
            return function(*args, **kwargs)
        dtype, device = floats[0].dtype, floats[0].device.type
        if not any(x.dtype in NARROW for x in floats) and not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        args = tuple(_each(x, wide) for x in args)
        with torch.autocast(device, enabled=False):
            result = function(*args, **{name: _each(x, wide) for name, x in kwargs.items()})
        return result if dtype not in NARROW else _each(result, lambda x: x.to(dtype))

    return call  # type: ignore[return-value]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with its floating-point tensors changed: itself, or the parts of a result."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _each(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
