"""The conformance check of solvers refuses plausible toys, one subtle fault each."""

import math
from dataclasses import dataclass

import pytest
import torch

from posterity.testing import check_solver

pytestmark = pytest.mark.usefixtures("as_a_user")


# ||x - a||^2 / 2 over the simplex


@dataclass
class Result:
    x: torch.Tensor
    value: torch.Tensor
    n_iter: int
    converged: bool


def project(a):
    ordered = a.sort(dim=-1, descending=True).values
    rank = torch.arange(1, a.shape[-1] + 1, dtype=a.dtype, device=a.device)
    theta = ((ordered.cumsum(-1) - 1) / rank).masked_fill(ordered * rank <= ordered.cumsum(-1) - 1, -math.inf)
    return (a - theta.max(-1, keepdim=True).values).clamp_min(0)


def solve(a):
    x = project(a)
    return Result(x, (x - a).square().sum(-1) / 2, 1, True)


def softened(a):
    x = a.softmax(-1)
    return Result(x, (x - a).square().sum(-1) / 2, 1, True)


def pooled(a):
    x = project(a)
    return Result(x, (x - a).square().sum() / 2, 1, True)


def cut(a):
    x = project(a)
    return Result(x, (x.detach() - a.detach()).square().sum(-1) / 2 + 0 * a.sum(-1), 1, True)


def residual(result):
    return float(
        (result.x.sum(-1) - 1).abs().max()
        + (result.x - A - (result.x - A)[result.x > 0].mean()).clamp_max(0).abs().max()
    )


A = torch.tensor([0.9, 0.5, -0.3, 0.1], dtype=torch.float64)


def test_a_good_solver_passes():
    check_solver(solve, A, optimality=residual, reference=float(solve(A).value))


@pytest.mark.parametrize("toy", [softened, pooled, cut])
def test_a_toy_solver_is_refused(toy):
    with pytest.raises(AssertionError):
        check_solver(toy, A, optimality=residual)


# ||x - a||^2 / 2 for a number x, whose value goes with the square of the unit


def widened(a):
    return a.to(torch.promote_types(a.dtype, torch.float32))


def centred(a):
    x = widened(a).mean(-1)
    return Result(x, ((widened(a) - x[..., None]).square().sum(-1) / 2).to(a.dtype), 1, True)


def impatient(a):
    wide, steps = widened(a), 0
    x = wide[..., 0]
    while steps < 60 and (gap := (wide - x[..., None]).mean(-1)).abs().max() > 1e-9:
        x, steps = x + gap / 2, steps + 1
    return Result(x, ((wide - x[..., None]).square().sum(-1) / 2).to(a.dtype), steps, True)


def cancelling(a):
    x = widened(a).mean(-1)
    square = widened(a).square().mean(-1) - x.square()
    return Result(x, (square * a.shape[-1] / 2).to(a.dtype), 1, True)


UNITS = {
    "optimality": lambda result: float((result.x - A.mean()).abs()),
    "scaled": lambda c: ((c * A,), c**2),
    "shifted": lambda c: ((A + c,), 0.0),
}


def test_a_solver_without_units_passes():
    check_solver(centred, A, **UNITS)


@pytest.mark.parametrize(("toy", "said"), [(impatient, "scaled by 1e-12"), (cancelling, "shifted by 1e")])
def test_a_solver_with_units_is_refused(toy, said):
    with pytest.raises(AssertionError, match=said):
        check_solver(toy, A, **UNITS)
