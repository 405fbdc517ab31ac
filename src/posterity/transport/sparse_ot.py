"""Sparsity-constrained transport: a matching in which no column takes more than k partners.

Among the plans T >= 0 with T 1 = a and T' 1 = b whose columns have at most k nonzeros,

    min_T  <T, C> + (reg / 2) ||T||_F^2.                                      (1)

The constraint is not convex, but for given row prices alpha each column is solved exactly:
keep the k largest entries of (alpha - c_j) / reg and project those, not the whole column,
onto {t >= 0, sum t = b_j}. What is left is a concave function of alpha (the semi-dual),

    max_alpha  alpha.a - sum_j max_t (alpha - c_j).t - (reg / 2) ||t||^2,      (2)

so column sums and the cap hold at every step, and row sums where the gradient of (2)
vanishes. Its value bounds (1) from below. It has kinks where the k-th and next candidate
tie; they get fewer as k grows, and at a kinked optimum no single plan meets the row sums,
which the result says instead of hiding it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.function import once_differentiable

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import rounding
from posterity.transport.sparse_simplex import _above_threshold

__all__ = ["SparseTransport", "sparse_transport"]


@dataclass
class SparseTransport:
    """What `sparse_transport` found.

    Attributes
    ----------
    plan : Tensor
        The plan, shape ``(*batch, m, n)``, without gradient.
    value : Tensor
        The dual value, a lower bound of (1) and equal to it if the plan meets both
        marginals; shape ``batch``, differentiable in cost, a and b.
    alpha, beta : Tensor
        Potentials of rows and columns, shapes ``(*batch, m)`` and ``(*batch, n)``,
        determined up to a constant that moves from one to the other.
    marginal_error : Tensor
        Largest distance of a row or column sum from its marginal, shape ``batch``.
    n_iter : int
        Iterations of the solver, of a batch the most that any of its problems took.
    converged : Tensor
        Whether ``marginal_error`` is at most ``tol`` of the mass; the plan is then a global
        optimum.
    """

    plan: Float[Tensor, "*batch m n"]
    value: Float[Tensor, "*batch"]
    alpha: Float[Tensor, "*batch m"]
    beta: Float[Tensor, "*batch n"]
    marginal_error: Float[Tensor, "*batch"]
    n_iter: int
    converged: Bool[Tensor, "*batch"]


def sparse_transport(
    a: Float[Tensor, "*batch m"],
    b: Float[Tensor, "*batch n"],
    cost: Float[Tensor, "*batch m n"],
    *,
    k: int,
    reg: float = 1.0,
    per: Literal["column", "row"] = "column",
    formulation: Literal["semi-dual", "dual"] = "semi-dual",
    solver: Literal["lbfgs", "adam"] = "lbfgs",
    max_iter: int = 1000,
    tol: float = 1e-6,
    lr: float = 1e-2,
) -> SparseTransport:
    """Transport ``a`` to ``b`` with at most ``k`` nonzeros in each column of the plan.

    Parameters
    ----------
    a : Tensor
        Masses of the rows, shape ``(*batch, m)``, at least 0, some of them positive.
    b : Tensor
        Masses of the columns, shape ``(*batch, n)``, with the sum of ``a``.
    cost : Tensor
        Cost of moving a unit from row to column, shape ``(*batch, m, n)``. Results have
        its dtype and device.
    k : int
        Most nonzeros of a column, at least 1; from m on it is quadratic regularisation.
    reg : float, default=1.0
        Weight of ``||T||^2 / 2``, greater than 0.
    per : {"column", "row"}, default="column"
        Whether the cap is on each column or on each row.
    formulation : {"semi-dual", "dual"}, default="semi-dual"
        Prices on one side or on both. With the dual one neither marginal is exact before
        the optimum.
    solver : {"lbfgs", "adam"}, default="lbfgs"
        L-BFGS solves the problems of a batch one by one in float64; Adam takes exactly
        ``max_iter`` steps for all of them together.
    max_iter : int, default=1000
        Most iterations, at least 0.
    tol : float, default=1e-6
        Largest ``marginal_error`` of a converged result for masses that sum to 1, in
        proportion for others; at least 0.
    lr : float, default=1e-2
        Learning rate of Adam in the units of ``cost``, greater than 0.

    Returns
    -------
    SparseTransport
        Plan, value, potentials, and how well the marginals are met: the best dual value
        seen, and its plan.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes do not fit, masses are not distributions of
        equal sum, or ``k`` leaves a row with mass and no column.

    Notes
    -----
    1. The cost is minimised and its weight is ``reg / 2``, as the paper's gamma.
    2. At a kink L-BFGS restarts from the best point, then takes averaged subgradient steps.
    3. A ``sum(a)`` that differs from ``sum(b)`` by rounding is scaled to it, as otherwise
       (2) has no maximum.

    References
    ----------
    .. [1] Liu, Puigcerver, Blondel. Sparsity-Constrained Optimal Transport. ICLR 2023.

    Examples
    --------
    Four workers, two shifts of two, and a regularisation that would rather spread:

    >>> import torch
    >>> from posterity.transport import sparse_transport
    >>> cost = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    >>> a, b = torch.full((4,), 0.25), torch.full((2,), 0.5)
    >>> result = sparse_transport(a, b, cost, k=2, reg=10.0)
    >>> result.plan
    tensor([[0.2500, 0.0000],
            [0.2500, 0.0000],
            [0.0000, 0.2500],
            [0.0000, 0.2500]])
    >>> result.value, result.converged  # 10 / 2 * 4 / 16
    (tensor(1.2500), tensor(True))
    """
    if isinstance(reg, Real) and not reg > 0:
        raise ValueError(f"reg must be greater than 0, got {reg}: unregularised transport is POT's ot.emd")
    at_least("reg", reg, 0, strict=True)
    integer("k", k, 1)
    one_of("per", per, ("column", "row"))
    one_of("formulation", formulation, ("semi-dual", "dual"))
    one_of("solver", solver, ("lbfgs", "adam"))
    integer("max_iter", max_iter, 0)
    at_least("tol", tol, 0)
    at_least("lr", lr, 0, strict=True)
    _check_problem(a, b, cost, k, per)

    single = torch.promote_types(cost.dtype, torch.float32)
    a, b = a.to(cost.device, single), b.to(cost.device, single)
    batch, (m, n) = cost.shape[:-2], cost.shape[-2:]
    work = torch.float64 if solver == "lbfgs" else single
    with torch.no_grad():
        sides = [a.reshape(-1, m).to(work), b.reshape(-1, n).to(work)]
        costs = cost.reshape(-1, m, n).to(work)
        rows, columns = sides if per == "column" else sides[::-1]
        rows = rows * (columns.sum(-1, keepdim=True) / rows.sum(-1, keepdim=True))
        costs = (costs.mT if per == "column" else costs).contiguous()
        least, total = costs.amin((1, 2), keepdim=True), columns.sum(-1)
        costs = costs - least  # what all cells cost adds a constant, beside which prices would cancel
        problem = _Problem(rows, columns, costs, k, reg, formulation == "semi-dual")
        prices, n_iter = _adam(problem, max_iter, lr) if solver == "adam" else _lbfgs(problem, max_iter, tol)
        found = problem.evaluate(prices)
        alpha, beta = prices[:, : rows.shape[1]] + least[:, 0], found.beta
        plan = problem.plan(found)
        if per == "column":
            plan = plan.mT
        else:
            alpha, beta = beta, alpha
        error = found.grad.abs().amax(-1)
        optimum = found.value + least[:, 0, 0] * total

    plan, alpha, beta = (
        part.reshape(batch + part.shape[1:]).to(cost.dtype).contiguous() for part in (plan, alpha, beta)
    )
    value = _Value.apply(optimum.reshape(batch).to(cost.dtype), plan, alpha, beta, cost, a, b)
    error, converged = error.reshape(batch), (error <= tol * total).reshape(batch)
    return SparseTransport(plan, value, alpha, beta, error.to(cost.dtype), n_iter, converged)


def _check_problem(a: Tensor, b: Tensor, cost: Tensor, k: int, per: str) -> None:
    floating("cost", cost)
    if cost.ndim < 2:
        raise ValueError(f"cost must have rows and columns, got shape {tuple(cost.shape)}")
    sides = {"a": (a, cost.shape[:-1]), "b": (b, cost.shape[:-2] + cost.shape[-1:])}
    for name, (mass, shape) in sides.items():
        has_shape(name, floating(name, mass), shape, f"cost {tuple(cost.shape)}")
        finite(name, mass)
        if bool((mass < 0).any()):
            raise ValueError(f"{name} must be at least 0, got {float(mass.min())}")
        if bool((mass.sum(-1) <= 0).any()):
            raise ValueError(f"{name} must have a positive sum, got 0")
    finite("cost", cost)
    totals = [mass.detach().double().sum(-1).flatten() for mass in (a, b)]
    for left, right in zip(*(total.tolist() for total in totals), strict=True):
        if not math.isclose(left, right, rel_tol=max(rounding(mass.dtype, 1e-5) for mass in (a, b))):
            raise ValueError(f"a and b must have equal sums, got {left:g} and {right:g}")
    mass, takers = (a, cost.shape[-1]) if per == "column" else (b, cost.shape[-2])
    served, other = (
        int((mass > 0).sum(-1).max()) if mass.numel() else 0,
        "row" if per == "column" else "column",
    )
    if k * takers < served:
        raise ValueError(
            f"k must be at least {-(-served // takers)} with per={per!r}: {takers} {per}s of {k} "
            f"cannot serve {served} {other}s, got {k}"
        )


class _Found(NamedTuple):
    value: Tensor  # (batch,)
    grad: Tensor  # (batch, prices): what the marginals lack
    mass: Tensor  # (batch, n, k): of each column
    index: Tensor  # (batch, n, k): in which rows
    beta: Tensor  # (batch, n)


class _Problem(NamedTuple):
    """A batch of problems; a row of ``cost`` is a column of the plan."""

    a: Tensor  # (batch, m)
    b: Tensor  # (batch, n)
    cost: Tensor  # (batch, n, m)
    k: int
    reg: float
    semi_dual: bool

    @property
    def n_prices(self) -> int:
        return self.a.shape[1] + (0 if self.semi_dual else self.b.shape[1])

    def evaluate(self, prices: Tensor) -> _Found:
        """Return value and supergradient at prices alpha, for the dual (alpha, beta)."""
        alpha = prices[:, : self.a.shape[1]]
        top, index = (alpha[:, None] - self.cost).topk(min(self.k, self.cost.shape[-1]), dim=-1)
        if self.semi_dual:
            # scaled by reg, not by reg * b as in the paper: a column may have no mass
            mass, theta = _above_threshold(top, self.reg * self.b[..., None])
            beta = -theta[..., 0]
        else:
            beta = prices[:, self.a.shape[1] :]
            mass = (top + beta[..., None]).relu()
        mass = mass / self.reg
        # on the support alpha_i + beta_j - c_ij = reg t_ij, so both duals have this value
        value = (alpha * self.a).sum(-1) + (beta * self.b).sum(-1)
        value = value - self.reg / 2 * mass.square().sum((-2, -1))
        grad = self.a.scatter_add(1, index.flatten(1), -mass.flatten(1))
        if not self.semi_dual:
            grad = torch.cat([grad, self.b - mass.sum(-1)], 1)
        return _Found(value, grad, mass, index, beta)

    def plan(self, found: _Found) -> Tensor:
        """Return the plan of an evaluation, transposed as the cost is."""
        return torch.zeros_like(self.cost).scatter(-1, found.index, found.mass)


def _adam(problem: _Problem, n_steps: int, lr: float) -> tuple[Tensor, int]:
    """Take steps for the whole batch at once; keep each problem's best."""
    prices = problem.a.new_zeros(len(problem.a), problem.n_prices)
    optimizer = torch.optim.Adam([prices], lr=lr, maximize=True)
    found = problem.evaluate(prices)
    best, value = prices.clone(), found.value
    for _ in range(n_steps):
        prices.grad = found.grad
        optimizer.step()
        found = problem.evaluate(prices)
        best = torch.where((found.value > value)[:, None], prices, best)
        value = torch.maximum(value, found.value)
    return best, n_steps


def _lbfgs(problem: _Problem, max_iter: int, tol: float) -> tuple[Tensor, int]:
    """Solve the problems one after the other, each in its own units of mass and cost."""
    prices = problem.a.new_zeros(len(problem.a), problem.n_prices)
    most = 0
    for row in range(len(prices)):
        a, b, cost = (side[row : row + 1] for side in (problem.a, problem.b, problem.cost))
        total = float(b.sum())
        unit = float(cost.max()) or problem.reg * total
        one = problem._replace(a=a / total, b=b / total, cost=cost / unit, reg=problem.reg * total / unit)

        def objective(z: ndarray, one: _Problem = one) -> tuple[float, ndarray]:
            found = one.evaluate(torch.from_numpy(z).to(one.a)[None])
            return float(found.value), found.grad[0].cpu().numpy()

        best, n_iter = _ascend(objective, problem.n_prices, max_iter, tol)
        prices[row] = unit * torch.from_numpy(best).to(prices)
        most = max(most, n_iter)
    return prices, most


def _ascend(
    objective: Callable[[ndarray], tuple[float, ndarray]], size: int, max_iter: int, tol: float
) -> tuple[ndarray, int]:
    """Maximise a concave function from 0, whose kinks may stop a line search."""
    z, rank, n_iter = np.zeros(size), (False, -math.inf), 0  # a point that meets the marginals wins

    def descent(point: ndarray) -> tuple[float, ndarray]:
        nonlocal z, rank
        value, grad = objective(point)
        if (now := (bool(np.abs(grad).max() <= tol), value)) > rank:
            z, rank = point.copy(), now
        return -value, -grad

    for _ in range(4):
        before = rank[1]
        if n_iter < max_iter:
            options = {"maxcor": 20, "ftol": 1e-15, "gtol": tol, "maxiter": max_iter - n_iter}
            n_iter += minimize(descent, z, jac=True, method="L-BFGS-B", options=options).nit
        if rank[0] or n_iter >= max_iter or rank[1] - before <= 1e-9 * abs(rank[1]):
            break
    if not rank[0]:
        point, mean, width = z.copy(), z.copy(), np.ptp(z)
        n_steps = min(200, max_iter - n_iter)
        for step in range(1, n_steps + 1):
            slope = -descent(point)[1]
            point = point + 0.1 * width * step**-0.5 * slope / np.linalg.norm(slope)
            mean += (point - mean) * 2 / (step + 2)  # later points weigh more
            descent(mean)
        n_iter += n_steps
    return z, n_iter


class _Value(torch.autograd.Function):
    """The optimal value, whose gradient is the solution itself (envelope theorem)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, plan: Tensor, alpha: Tensor, beta: Tensor, cost: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        ctx.save_for_backward(plan, alpha, beta)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, alpha, beta = ctx.saved_tensors
        g = grad[..., None]
        return None, None, None, None, g[..., None] * plan, g * alpha, g * beta
