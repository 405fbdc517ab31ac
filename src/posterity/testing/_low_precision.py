"""Low precision: what float32 gives on the same rounded numbers, up to rounding, in the dtype that came."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from posterity.testing._agreement import floats

__all__ = ["check_low_precision", "relative_error"]

NARROW = (torch.bfloat16, torch.float16)


def check_low_precision(
    call: Callable[..., Any], module: nn.Module | None, inputs: Sequence[Any], *, slack: float,
    follows: bool = True, chooses: bool = False, gradient: bool = True,
) -> None:  # fmt: skip
    """Check a call in narrow dtypes, and on every dtype that autocast goes with.

    Parameters
    ----------
    call : callable
        ``call(module, *inputs)``, or ``call(*inputs)`` without a module; returns a tensor or a
        tuple of tensors.
    module : nn.Module, optional
        Cast with the inputs.
    inputs : sequence
        Of which floating-point tensors are cast.
    slack : float
        How many roundings of the dtype the result may be away from what float32 gives on the
        same numbers, by norm.
    follows : bool, default=True
        Whether the result is never narrower than the input, as a loss; if not, autocast may
        make it so, as that of a layer of matrix products.
    chooses : bool, default=False
        Whether rounding may change what it chooses, so that only finiteness is compared.
    gradient : bool, default=True
        Whether parameters, and inputs that require it, have gradients, which then stay finite.
    """
    for dtype, casting in _settings():
        what = f"in {_name(dtype)}" + (f" under autocast to {_name(casting)}" if casting else "")
        low = floats(inputs, lambda x, to=dtype: _cast(x, to))
        exact = floats(low, lambda x: _cast(x, torch.float32) if x.dtype in NARROW else _cast(x, x.dtype))
        part = None if module is None else copy.deepcopy(module).to(dtype)
        twin = None if part is None else copy.deepcopy(part).to(torch.float32 if dtype in NARROW else dtype)
        rounding = torch.finfo(casting or dtype).eps
        try:
            with torch.autocast("cpu", dtype=casting) if casting else nullcontext():
                got, grads = _run(call, part, low, gradient)
        except ValueError as error:
            if any(_name(narrow) in str(error) for narrow in NARROW):
                continue
            raise AssertionError(f"{what} it is refused without a reason: {error}") from error
        except RuntimeError as error:  # NotImplementedError too: no kernel
            raise AssertionError(f"{what} it ends in {type(error).__name__}: {error}") from error
        expected, slopes = _run(call, twin, exact, gradient)
        allowed = {dtype, *({torch.float32} if casting else ()), *(() if follows else (casting,))}
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype in allowed, f"{what} the result is in {_name(ours.dtype)}"
            assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{what} the result is not finite"
            error = relative_error(ours, theirs)
            assert chooses or error <= slack * rounding, (
                f"{what} the result is off by {error:.2g} of its size, allowed {slack * rounding:.2g}"
            )
        for ours, theirs in zip(grads, slopes, strict=True):
            finite = (
                ours is None or theirs is None or bool(ours.isfinite().all()) or not theirs.isfinite().all()
            )
            assert finite, f"{what} a gradient is not finite"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by that of what is expected."""
    actual, expected = (x.detach().double().cpu().nan_to_num(0, 0, 0) for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def _settings() -> Iterator[tuple[torch.dtype, torch.dtype | None]]:
    """Yield dtypes of inputs and parameters, and of autocast."""
    yield from ((dtype, None) for dtype in NARROW)
    yield from ((dtype, torch.bfloat16) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    yield torch.float32, torch.float16


def _run(
    call: Callable[..., Any], module: nn.Module | None, inputs: Sequence[Any], gradient: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the results, and the gradients of their sum to inputs and parameters."""
    if not gradient:
        with torch.no_grad():
            out = call(*inputs) if module is None else call(module, *inputs)
        return _parts(out), []
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    leaves += [] if module is None else [p for p in module.parameters() if p.requires_grad]
    parts = _parts(call(*inputs) if module is None else call(module, *inputs))
    total = torch.stack([part.float().mean() for part in parts if part.requires_grad]).sum()
    return parts, list(torch.autograd.grad(total, leaves, allow_unused=True))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)


def _parts(out: Any) -> list[Tensor]:
    return [part for part in (out if isinstance(out, tuple) else (out,)) if part.is_floating_point()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
