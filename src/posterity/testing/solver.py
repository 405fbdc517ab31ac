"""Solvers: optimality, a reference, a batch, a gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from posterity.testing._agreement import accelerators, global_state, placed, same, untouched
from posterity.testing._low_precision import check_low_precision

__all__ = ["check_solver"]


def check_solver(
    solve: Callable[..., Any],
    *inputs: Any,
    optimality: Callable[[Any], float],
    reference: float | None = None,
    tol: float = 1e-5,
    differentiable: bool = True,
    scaled: Callable[[float], tuple[Sequence[Any], float]] | None = None,
    shifted: Callable[[float], tuple[Sequence[Any], float]] | None = None,
) -> None:
    """Check a solver: its optimality conditions, a reference, its batch, its gradient, its units.

    Parameters
    ----------
    solve : callable
        ``solve(*inputs)`` returns a result with ``.value``, ``.n_iter``, ``.converged``.
    *inputs
        Float64 tensors of one problem.
    optimality : callable
        Residual of the optimality conditions of a result, 0 at an optimum.
    reference : float, optional
        The optimal value by another solver.
    tol : float, default=1e-5
        For residual, reference and gradient.
    differentiable : bool, default=True
        Whether ``.value`` has gradients with respect to the inputs.
    scaled : callable, optional
        ``scaled(c)`` returns the inputs in other units, and what that multiplies the value by;
        asked for 1e-12 and 1e12.
    shifted : callable, optional
        ``shifted(c)`` returns the inputs away from the origin, and what that adds to the
        value; asked for 1e8.
    """
    before = global_state()
    result = solve(*inputs)
    untouched(before, "the solver")
    for name in ("value", "n_iter", "converged"):
        assert hasattr(result, name), f"a result has .{name}"
    value = result.value
    assert isinstance(value, Tensor) and value.shape == (), f"one problem, one value, got {value}"
    assert bool(torch.as_tensor(result.converged).all()), "it converges"
    residual = float(optimality(result))
    assert residual <= tol, f"the optimality conditions hold to {tol:g}, residual {residual:g}"
    if reference is not None:
        gap = abs(float(value) - reference)
        assert gap <= tol * max(1, abs(reference)), (
            f"the reference value is {reference:.9g}, got {float(value):.9g}"
        )
    several = solve(*(torch.stack([x, x]) for x in inputs))
    same(several.value, torch.stack([value, value]).detach(), "a batch of problems", rtol=tol, atol=tol)
    single = solve(*(x.float() for x in inputs)).value
    assert single.dtype == torch.float32, f"the dtype follows the input, float32 gave {single.dtype}"
    same(single.double(), value.detach(), "float32 agrees with float64", rtol=1e-3, atol=1e-3)
    check_low_precision(lambda *xs: solve(*xs).value, None, inputs, slack=8, gradient=False)
    others = [(scaled, c, f"scaled by {c:g}") for c in (1e-12, 1e12)] + [(shifted, 1e8, "shifted by 1e8")]
    for moved, c, what in others:
        if moved is None:
            continue
        there, effect = moved(c)
        again = solve(*there)
        got = float(again.value) / effect if moved is scaled else float(again.value) - effect
        rounding = 0.0 if moved is scaled else abs(effect) * torch.finfo(value.dtype).eps
        assert bool(torch.as_tensor(again.converged).all()), f"it converges on inputs {what}"
        off = abs(got - float(value))
        assert off <= tol * abs(float(value)) + 8 * rounding, (
            f"the value of inputs {what} is off by {off / abs(float(value)):.2g} of itself"
        )
    for device in accelerators():
        far = solve(*placed(device, inputs)).value
        assert far.device.type == device.type, f"on {device} the value is on {far.device}"
        same(far.detach().cpu(), value.detach(), f"{device} agrees with the CPU", rtol=tol, atol=tol)
    if differentiable:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = solve(*leaves).value
        grads = torch.autograd.grad(out, leaves)
        generator = torch.Generator().manual_seed(0)
        for k, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
            step = torch.randn(x.shape, dtype=x.dtype, generator=generator) * x.abs().clamp_min(1e-3)
            if float((x.sum() - 1).abs()) < 1e-9:  # a histogram: stay on the simplex
                step = step - x * step.sum()
            h = 1e-4
            ends = [
                solve(*(y + s * h * step if j == k else y for j, y in enumerate(inputs))).value
                for s in (1, -1)
            ]
            slope = float((ends[0] - ends[1]).detach() / (2 * h))
            got = float((grad * step).sum())
            assert abs(slope - got) <= 1e-3 * max(1.0, abs(slope)), (
                f"input {k}: the gradient gives {got:.6g} along a direction, differences {slope:.6g}"
            )
