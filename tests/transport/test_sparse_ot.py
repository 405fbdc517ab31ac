"""Sparsity-constrained transport against brute force, a cone program, POT and its KKT conditions."""

import itertools

import cvxpy as cp
import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from posterity.testing import check_layer, check_solver
from posterity.transport import SparseTransportRouter, project_sparse_simplex, sparse_transport


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(m, n, seed=0):
    generator = rng(seed)
    a, b, cost = (
        torch.rand(*size, generator=generator, dtype=torch.float64) for size in ((m,), (n,), (m, n))
    )
    a, b = a + 0.1, b + 0.1
    return a / a.sum(), b / b.sum(), cost


def cone_optimum(a, b, cost, k, reg):
    """The convex hull of the problem: <T, C> + reg/2 sum T^2 / Z with Z at most k a column."""
    plan, share, square = (cp.Variable(cost.shape, nonneg=True) for _ in range(3))
    flat = [cp.vec(part, order="F") for part in (plan, share, square)]
    cone = cp.SOC(flat[2] + flat[1], cp.vstack([2 * flat[0], flat[2] - flat[1]]), axis=0)
    marginals = [cp.sum(plan, axis=1) == a.numpy(), cp.sum(plan, axis=0) == b.numpy()]
    caps = [share <= 1, cp.sum(share, axis=0) <= k]
    objective = cp.sum(cp.multiply(cost.numpy(), plan)) + reg / 2 * cp.sum(square)
    return cp.Problem(cp.Minimize(objective), [cone, *marginals, *caps]).solve(solver="CLARABEL")


def best_of_all_supports(a, b, cost, k, reg):
    """Solve the equality-constrained QP of every support, keep the best that is nonnegative."""
    m, n = cost.shape
    columns = [list(s) for size in range(1, k + 1) for s in itertools.combinations(range(m), size)]
    supports = np.zeros((len(columns) ** n, m, n))
    for at, choice in enumerate(itertools.product(columns, repeat=n)):
        for j, rows in enumerate(choice):
            supports[at, rows, j] = 1
    sums = np.concatenate([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    kept = sums * supports.reshape(-1, 1, m * n)
    want, c = np.concatenate([a, b]), cost.numpy().ravel()
    potentials = np.linalg.pinv(kept @ sums.T) @ (reg * want + kept @ c)[..., None]
    plans = supports.reshape(-1, m * n) * ((sums.T @ potentials)[..., 0] - c) / reg
    ok = (np.abs(plans @ sums.T - want).max(1) < 1e-9) & (plans.min(1) > -1e-12)
    return (plans @ c + reg / 2 * (plans**2).sum(1))[ok].min()


def primal(plan, cost, reg):
    return float((plan * cost).sum() + reg / 2 * plan.square().sum())


# The projection.


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("total", [0.3, 1.0, 4.0])
def test_projection_is_the_nearest_point_of_all_supports(k, total):
    for v in torch.randn(4, 5, dtype=torch.float64, generator=rng()):
        candidates = []
        for size in range(1, min(k, 5) + 1):
            for rows in map(list, itertools.combinations(range(5), size)):
                y = torch.zeros_like(v)
                y[rows] = v[rows] + (total - v[rows].sum()) / size  # nearest of its plane
                if y.min() >= 0:
                    candidates.append(y)
        best = min(candidates, key=lambda y: float((y - v).square().sum()))
        torch.testing.assert_close(project_sparse_simplex(v, k, total=total), best)


def test_projection_without_a_cap_is_pots():
    v = torch.randn(6, 9, dtype=torch.float64, generator=rng())
    for dim in (0, 1, -2):
        full = ot.utils.proj_simplex(v.movedim(dim, 0).numpy(), z=2.0)
        ours = project_sparse_simplex(v, 99, total=2.0, dim=dim).movedim(dim, 0)
        torch.testing.assert_close(ours, torch.from_numpy(full))


def test_projection_takes_a_total_for_each_column():
    v, total = torch.randn(3, 7, 4, generator=rng()), torch.rand(3, 4, generator=rng(1))
    total[0, 0] = 0
    y = project_sparse_simplex(v, 3, total=total, dim=1)
    torch.testing.assert_close(y.sum(1), total)
    assert (y[0, :, 0] == 0).all()
    assert ((y > 0).sum(1) <= 3).all()
    torch.testing.assert_close(y[1, :, 2], project_sparse_simplex(v[1, :, 2], 3, total=float(total[1, 2])))
    torch.testing.assert_close(
        project_sparse_simplex(v, 3, total=torch.tensor(2.0)).sum(-1), 2 * torch.ones(3, 7)
    )


def test_projection_sums_exactly_far_from_the_origin():
    v = torch.randn(20, 9, dtype=torch.float64, generator=rng()) + 1e9
    assert (project_sparse_simplex(v, 4).sum(-1) - 1).abs().max() < 1e-14


def test_projection_has_its_gradient():
    v = torch.randn(6, 9, dtype=torch.float64, generator=rng(), requires_grad=True)
    total = torch.rand(6, dtype=torch.float64, generator=rng(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, total: project_sparse_simplex(v, 4, total=total), (v, total))


# The solver.


def kkt(result, a, b, cost, reg):
    """Residual of both marginals and of T = max(alpha + beta - C, 0) / reg."""
    spread = (result.alpha[:, None] + result.beta - cost).relu() / reg
    errors = (result.plan - spread), (result.plan.sum(1) - a), (result.plan.sum(0) - b)
    return max(float(error.abs().max()) for error in errors)


@pytest.mark.parametrize(("k", "reg"), [(99, 0.1), (5, 1.0)])
def test_conforms_to_its_kind(as_a_user, k, reg):
    a, b, cost = problem(14, 11)

    def solve(a, b, cost):  # masses that were rounded have other sums
        return sparse_transport(a, b * (a.sum(-1) / b.sum(-1))[..., None], cost, k=k, reg=reg)

    check_solver(
        solve, a, b, cost,
        optimality=lambda result: kkt(result, a, b, cost, reg), reference=cone_optimum(a, b, cost, k, reg),
        scaled=lambda c: ((c * a, c * b, c * cost), c**2), shifted=lambda c: ((a, b, cost + c), c),
    )  # fmt: skip


@pytest.mark.parametrize("formulation", ["semi-dual", "dual"])
@pytest.mark.parametrize("reg", [0.1, 10.0])
def test_without_a_cap_it_is_quadratic_regularisation(formulation, reg):
    a, b, cost = problem(14, 11, seed=1)
    result = sparse_transport(a, b, cost, k=14, reg=reg, formulation=formulation, tol=5e-7)
    assert result.converged
    assert kkt(result, a, b, cost, reg) < 1e-6
    assert primal(result.plan, cost, reg) == pytest.approx(float(result.value), rel=1e-6)
    peer = ot.smooth.smooth_ot_dual(a.numpy(), b.numpy(), cost.numpy(), reg, reg_type="l2")
    assert np.abs(peer - result.plan.numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("formulation", "m", "n", "k", "reg", "gap"),
    [
        ("semi-dual", 14, 11, 2, 0.1, 3e-3), ("dual", 14, 11, 2, 10.0, 3e-3),
        ("semi-dual", 14, 11, 3, 1.0, 3e-3), ("dual", 20, 15, 2, 1.0, 3e-3),
        ("dual", 11, 14, 1, 0.1, 2e-2), ("semi-dual", 15, 20, 1, 10.0, 2e-2),
        ("semi-dual", 20, 15, 8, 0.1, 1e-5), ("dual", 20, 15, 8, 0.1, 1e-5),
    ],
)  # fmt: skip
def test_value_is_below_the_optimum_of_the_cone_program_and_near_it(formulation, m, n, k, reg, gap):
    a, b, cost = problem(m, n, seed=2)
    best = cone_optimum(a, b, cost, k, reg)
    value = float(sparse_transport(a, b, cost, k=k, reg=reg, formulation=formulation).value)
    assert best * (1 - gap) <= value <= best * (1 + 1e-7)


def test_one_partner_each_bounds_unregularised_transport():
    a, b, cost = problem(8, 11, 1)
    emd = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    for reg in (1e-3, 1.0):
        result = sparse_transport(a, b, cost, k=1, reg=reg)
        value = float(result.value - reg / 2 * b.square().sum())
        assert value <= emd + 1e-12
        assert float(result.value) >= (emd + reg / 2 * float(b.square().sum())) * (1 - 2e-2)


def test_value_falls_as_the_cap_is_loosened():
    a, b, cost = problem(12, 9, seed=3)
    values = [float(sparse_transport(a, b, cost, k=k, reg=3.0).value) for k in (2, 4, 12)]
    assert all(loose <= tight * (1 + 3e-3) for tight, loose in itertools.pairwise(values))
    assert values[0] > values[-1] * 1.1


def test_a_converged_plan_is_the_best_of_all_supports():
    """With these masses many pairs of supports can carry a plan."""
    a, b = (torch.tensor(mass, dtype=torch.float64) / 6 for mass in ([1, 1, 1, 1, 2], [2, 2, 2]))
    converged = 0
    for seed in range(4, 11):
        cost = torch.rand(5, 3, dtype=torch.float64, generator=rng(seed))
        best = best_of_all_supports(a, b, cost, 2, 0.5)
        result = sparse_transport(a, b, cost, k=2, reg=0.5)
        assert float(result.value) <= best + 1e-9
        converged += bool(result.converged)
        if result.converged:
            assert float(result.value) == pytest.approx(best, abs=1e-6)
            assert primal(result.plan, cost, 0.5) == pytest.approx(best, abs=1e-5)
    assert converged >= 3  # or nothing was tested


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
@pytest.mark.parametrize("k", [2, 3, 14])
def test_columns_keep_cap_and_sum_at_every_iteration(solver, k):
    a, b, cost = problem(14, 11)
    values = []
    for max_iter in (0, 1, 2, 7, 60):
        result = sparse_transport(a, b, cost, k=k, reg=0.3, solver=solver, max_iter=max_iter)
        assert (result.plan >= 0).all()
        assert ((result.plan > 0).sum(0) <= k).all()
        assert (result.plan.sum(0) - b).abs().max() < 1e-12
        assert result.n_iter <= max_iter
        torch.testing.assert_close(result.marginal_error, (result.plan.sum(1) - a).abs().max())
        assert result.converged == (result.marginal_error <= 1e-6)
        values.append(float(result.value))
    assert values == sorted(values)  # the best seen, from the same start
    # what the row sums lack, at the price of the rows, is the whole gap to the plan's own cost
    gap = result.alpha @ (a - result.plan.sum(1))
    assert float(result.value - gap) == pytest.approx(primal(result.plan, cost, 0.3), abs=1e-12)


def test_value_is_the_dual_function_of_its_potentials():
    a, b, cost = problem(9, 7)
    for formulation in ("semi-dual", "dual"):
        result = sparse_transport(a, b, cost, k=2, reg=0.7, formulation=formulation, max_iter=9)
        top = (result.alpha[:, None] + result.beta - cost).relu().topk(2, dim=0).values
        dual = result.alpha @ a + result.beta @ b - top.square().sum() / (2 * 0.7)
        torch.testing.assert_close(result.value, dual)


@pytest.mark.parametrize(("m", "n", "k"), [(4, 3, 3), (3, 2, 3)])
def test_value_has_its_gradient(m, n, k):
    a, b, cost = problem(m, n)
    cost.requires_grad_()
    u, v = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (m, n))

    def value(cost, u, v):
        result = sparse_transport(a + u - u.mean(), b + v - v.mean(), cost, k=k, reg=0.2, tol=1e-7)
        assert result.converged
        return result.value

    assert torch.autograd.gradcheck(value, (cost, u, v), atol=1e-7)
    x = [mass.clone().requires_grad_() for mass in (a, b)]
    result = sparse_transport(*x, cost, k=k, reg=0.2)
    grads = torch.autograd.grad(result.value, [*x, cost])
    for grad, solution in zip(grads, (result.alpha, result.beta, result.plan), strict=True):
        torch.testing.assert_close(grad, solution)
    assert not result.plan.requires_grad


@pytest.mark.parametrize("k", [5, 14])
def test_permuting_permutes_and_potentials_in_the_cost_only_shift(k):
    a, b, cost = problem(14, 11)
    options = {"k": k, "reg": 0.5, "tol": 1e-7}
    plain = sparse_transport(a, b, cost, **options)
    assert plain.converged
    rows, columns = torch.randperm(14, generator=rng()), torch.randperm(11, generator=rng(1))
    moved = sparse_transport(a[rows], b[columns], cost[rows][:, columns], **options)
    torch.testing.assert_close(moved.plan, plain.plan[rows][:, columns], rtol=0, atol=1e-6)
    u, v = torch.randn(14, 1, generator=rng()).double(), torch.randn(11, generator=rng(1)).double()
    shifted = sparse_transport(a, b, cost + u + v, **options)
    torch.testing.assert_close(shifted.plan, plain.plan, rtol=0, atol=1e-6)
    torch.testing.assert_close(shifted.value, plain.value + a @ u[:, 0] + b @ v)


@pytest.mark.parametrize("formulation", ["semi-dual", "dual"])
@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_a_cap_on_rows_is_the_transposed_problem(formulation, solver):
    a, b, cost = problem(6, 9)
    options = {"k": 3, "reg": 0.5, "formulation": formulation, "solver": solver, "max_iter": 40}
    rows = sparse_transport(a, b, cost, per="row", **options)
    columns = sparse_transport(b, a, cost.mT, **options)
    assert ((rows.plan > 0).sum(1) <= 3).all()
    for mine, other in ((rows.plan, columns.plan.mT), (rows.alpha, columns.beta), (rows.beta, columns.alpha)):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(rows.value, columns.value)


@pytest.mark.parametrize("formulation", ["semi-dual", "dual"])
def test_adam_approaches_lbfgs(formulation):
    a, b, cost = problem(14, 11)
    exact = sparse_transport(a, b, cost, k=5, reg=1.0).value
    result = sparse_transport(
        a, b, cost, k=5, reg=1.0, formulation=formulation, solver="adam", max_iter=500, lr=5e-2
    )
    assert float(exact) - 1e-3 * float(exact) <= float(result.value) <= float(exact) + 1e-9


def test_adam_keeps_the_best_of_steps_too_long():
    a, b, cost = problem(14, 11)
    values = [
        float(sparse_transport(a, b, cost, k=5, solver="adam", lr=3.0, max_iter=n).value) for n in range(12)
    ]
    assert values == sorted(values)


def test_restarts_from_the_best_point_at_a_kink_and_returns_the_best_seen(monkeypatch):
    rounds, starts = [], []

    def spy(descent, start, **options):
        def watched(point):
            value, grad = descent(point)
            rounds[-1].append(-value)
            return value, grad

        starts.append(-descent(start)[0])
        rounds.append([])
        return minimize(watched, start, **options)

    monkeypatch.setattr("posterity.transport.sparse_ot.minimize", spy)
    polished = []
    for seed in range(2):
        rounds.clear(), starts.clear()
        value = float(sparse_transport(*problem(14, 14, seed), k=1).value)
        assert 1 < len(rounds) <= 4
        assert all(start == max(map(max, rounds[:at])) for at, start in enumerate(starts) if at)
        polished.append(value - max(map(max, rounds)))
    assert min(polished) >= 0
    assert max(polished) > 1e-6


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_a_batch_is_its_problems(solver):
    several = [problem(8, 6, seed) for seed in range(6)]
    a, b, cost = (torch.stack(part).unflatten(0, (2, 3)) for part in zip(*several, strict=True))
    together = sparse_transport(a, b, cost, k=3, solver=solver, max_iter=8)
    assert together.plan.shape == (2, 3, 8, 6)
    for at, one in enumerate(several):
        alone = sparse_transport(*one, k=3, solver=solver, max_iter=8)
        for name in ("plan", "value", "alpha", "beta", "marginal_error", "converged"):
            torch.testing.assert_close(getattr(together, name).flatten(0, 1)[at], getattr(alone, name))


@pytest.mark.parametrize("formulation", ["semi-dual", "dual"])
def test_rows_and_columns_without_mass_are_empty(formulation):
    a, b, cost = problem(7, 5)
    full = sparse_transport(a, b, cost, k=7, reg=0.1, formulation=formulation, tol=1e-7)
    wide = torch.rand(9, 7, dtype=torch.float64, generator=rng(5))
    wide[:7, :5] = cost
    none = torch.zeros(2, dtype=torch.float64)
    result = sparse_transport(
        torch.cat([a, none]), torch.cat([b, none]), wide, k=9, reg=0.1, formulation=formulation, tol=1e-8
    )
    torch.testing.assert_close(result.value, full.value)
    torch.testing.assert_close(result.plan[:7, :5], full.plan, rtol=0, atol=1e-7)
    assert result.plan[7:].abs().max() < 1e-8
    assert result.plan[:, 5:].abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_results_have_the_dtype_of_the_cost(dtype, solver):
    a, b, cost = problem(6, 5)
    result = sparse_transport(a, b.float(), cost.to(dtype).requires_grad_(), k=2, solver=solver, max_iter=20)
    for part in (result.plan, result.value, result.alpha, result.beta, result.marginal_error):
        assert part.dtype == dtype
    result.value.backward()


# The router.


class Weights(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        return self.router(x).combine


@pytest.mark.parametrize("options", [{}, {"choose": "experts", "k": 2}])
def test_router_conforms_to_its_kind(as_a_user, options):
    torch.manual_seed(0)
    router = SparseTransportRouter(8, 4, **options)
    check_layer(Weights(router), torch.randn(2, 12, 8, generator=rng()), shape=(2, 12, 4))


@pytest.mark.parametrize(("choose", "k", "per"), [("tokens", None, "column"), ("experts", 2, "row")])
def test_router_dispatches_by_the_plan_of_a_transport_problem(choose, k, per):
    torch.manual_seed(0)
    router = SparseTransportRouter(8, 4, k=k, choose=choose).double()
    x = torch.randn(3, 11, 8, generator=rng()).double()
    dispatch, combine, plan = router(x)
    similarity = (x @ router.gate.weight.T).softmax(-1)
    result = sparse_transport(
        torch.ones(3, 11).double(), torch.full((3, 4), 11 / 4).double(), -similarity,
        k=k or 3, per=per, solver="adam", max_iter=20,
    )  # fmt: skip
    torch.testing.assert_close(plan, result.plan)
    assert torch.equal(dispatch, plan > 0)
    torch.testing.assert_close(combine, torch.where(dispatch, similarity, 0))
    assert dispatch.sum(1 if choose == "tokens" else 2).max() <= (k or 3)
    assert (combine.sum() - similarity[dispatch].sum()).abs() < 1e-12
    assert not plan.requires_grad
    assert combine.requires_grad


def test_router_takes_its_cap_from_the_capacity_factor():
    x = torch.randn(1, 16, 8, generator=rng())
    for factor, cap in ((0.5, 2), (1.0, 4), (1.3, 6)):
        router = SparseTransportRouter(8, 4, capacity_factor=factor, n_steps=0)
        assert (
            router(x).dispatch.sum(1) == cap
        ).all()  # at price 0 each takes its cap: 4 / cap is far above similarity


# Bad input.

A, B, C = torch.full((4,), 0.25), torch.full((2,), 0.5), torch.rand(4, 2, generator=rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": 1.5}, "k must be an integer of at least 1, got 1.5"),
        ({"k": 1}, "k must be at least 2 with per='column': 2 columns of 1 cannot serve 4 rows, got 1"),
        (
            {"a": B, "b": A, "cost": C.T, "k": 1, "per": "row"},
            "per='row': 2 rows of 1 cannot serve 4 columns",
        ),
        ({"reg": 0}, "reg must be greater than 0, got 0: unregularised transport is POT's"),
        ({"reg": -1.0}, "reg must be greater than 0, got -1.0"),
        ({"reg": float("nan")}, "reg must be greater than 0, got nan"),
        ({"reg": float("inf")}, "reg must be greater than 0, got inf"),
        ({"reg": "1"}, "reg must be a number"),
        ({"a": A[:3]}, r"a must have shape \(4\) for cost \(4, 2\), got \(3,\)"),
        ({"b": B[None]}, r"b must have shape \(2\) for cost \(4, 2\), got \(1, 2\)"),
        ({"cost": C[0]}, r"cost must have rows and columns, got shape \(2,\)"),
        ({"cost": C.long()}, "cost must be a floating-point tensor"),
        ({"a": A.long()}, "a must be a floating-point tensor"),
        ({"cost": C / 0}, "cost must be finite"),
        ({"a": A * float("nan")}, "a must be finite"),
        ({"b": torch.tensor([1.5, -0.5])}, "b must be at least 0, got -0.5"),
        ({"a": 0 * A}, "a must have a positive sum, got 0"),
        ({"a": 2 * A}, "a and b must have equal sums, got 2 and 1"),
        ({"per": "both"}, "per must be one of 'column', 'row'"),
        ({"formulation": "primal"}, "formulation must be one of"),
        ({"solver": "sgd"}, "solver must be one of"),
        ({"max_iter": -1}, "max_iter must be an integer of at least 0"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"lr": 0.0}, "lr must be greater than 0"),
    ],
)
def test_solver_refuses_bad_input_by_name(as_a_user, change, message):
    arguments = {"a": A, "b": B, "cost": C, "k": 2} | change
    with pytest.raises(ValueError, match=message):
        sparse_transport(**arguments)


def test_sums_that_differ_by_rounding_are_accepted():
    assert sparse_transport(A * (1 + 5e-6), B, C, k=4).converged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer"),
        ({"k": True}, "k must be an integer"),
        ({"total": -1.0}, "total must be at least 0"),
        ({"total": torch.ones(3)}, r"total must have shape \(4\) for v without dim, got \(3,\)"),
        ({"dim": 2}, r"dim must be a dimension of v that is not empty, got 2 for \(4, 2\)"),
        ({"v": torch.zeros(3, 0)}, "dim must be a dimension of v that is not empty"),
        ({"v": torch.tensor(1.0)}, "dim must be a dimension of v"),
        ({"v": C.long()}, "v must be a floating-point tensor"),
    ],
)
def test_projection_refuses_bad_input_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        project_sparse_simplex(**({"v": C, "k": 1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choose": "experts"}, "k must be given with choose='experts'"),
        ({"choose": "both"}, "choose must be one of"),
        ({"k": 0}, "k must be an integer"),
        ({"dim": 0}, "dim must be an integer"),
        ({"n_experts": 0}, "n_experts must be an integer"),
        ({"capacity_factor": 0.0}, "capacity_factor must be greater than 0"),
        ({"reg": 0.0}, "reg must be greater than 0"),
        ({"n_steps": -1}, "n_steps must be an integer"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"dim": 7}, r"x must have shape \(any, any, 7\) for dim=7, got \(1, 4, 8\)"),
    ],
)
def test_router_refuses_bad_input_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        SparseTransportRouter(**({"dim": 8, "n_experts": 2} | options))(torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="x must hold at least one token, got none"):
        SparseTransportRouter(8, 2)(torch.zeros(3, 0, 8))
