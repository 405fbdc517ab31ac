"""Draws from the posterior of a linear model against dense linear algebra, and solvers against each other."""

import math

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from posterity.uncertainty import sample_posterior


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def softmax_curvature(n, o, seed=0):
    p = randn(n, o, seed=seed).softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def dense_covariance(J, H, precision):
    G = torch.einsum("nop,noq,nqr->pr", J, H, J)
    return torch.linalg.inv(G + torch.as_tensor(precision, dtype=J.dtype).expand(J.shape[2]).diag())


@pytest.mark.parametrize("objective", ["low-variance", "standard"])
@pytest.mark.parametrize("precision", [0.7, "vector"])
@pytest.mark.parametrize("n", [3, 20])  # n o < p, and not
def test_draws_have_the_posterior_moments(objective, precision, n):
    J, H, p = randn(n, 3, 12, seed=1), softmax_curvature(n, 3), 12
    precision = 0.2 + torch.arange(p, dtype=torch.float64) / p if precision == "vector" else precision
    z = sample_posterior(J, H, precision, 20_000, objective=objective, solver="cholesky", generator=rng(2))
    want = dense_covariance(J, H, precision)
    assert (z.T @ z / len(z) - want).norm() < 0.06 * want.norm()
    assert (z.mean(0).abs() < 0.03 * want.diag().sqrt()).all()


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("objective", ["low-variance", "standard"])
def test_solvers_find_the_same_draws(n, objective):
    J, H = randn(n, 3, 12, seed=1), softmax_curvature(n, 3)
    precision = 0.5 + torch.arange(12, dtype=torch.float64)

    def draws(solver, **options):
        return sample_posterior(
            J, H, precision, 4, objective=objective, solver=solver, generator=rng(3), **options
        )

    exact = draws("cholesky")
    torch.testing.assert_close(draws("cg", tol=1e-10), exact, atol=1e-8, rtol=0)
    assert (draws("cg") - exact).norm() < 1e-5 * exact.norm()
    tol = 1e-2 if objective == "low-variance" else 3e-2  # minibatches see the noise of its targets
    passes = 600 if n == 3 else 400
    A = torch.linalg.inv(dense_covariance(J, H, precision))
    assert (
        (draws("sgd", tol=tol, max_iter=passes) @ A - exact @ A).norm(dim=1)
        <= 1.01 * tol * (exact @ A).norm(dim=1)
    ).all()


def test_minibatches_see_less_noise_in_the_low_variance_objective():
    """After the same passes its solutions are nearer to the exact draws."""
    J, H = randn(64, 3, 12, seed=1), softmax_curvature(64, 3)
    error = {}
    for objective in ("low-variance", "standard"):
        exact, found = (
            sample_posterior(
                J, H, 1.0, 50, objective=objective, solver=solver, max_iter=200, tol=1e-9, generator=rng(3)
            )
            for solver in ("cholesky", "sgd")
        )
        error[objective] = float((found - exact).norm() / exact.norm())
    assert 1.5 * error["low-variance"] < error["standard"]


@pytest.mark.parametrize("singular", [False, True])
def test_both_objectives_have_one_minimiser(singular):
    J, H = randn(9, 3, 12, seed=1), softmax_curvature(9, 3)
    H = H if singular else H + 0.5 * torch.eye(3, dtype=H.dtype)
    a, b = (
        sample_posterior(J, H, 1.0, 5, objective=objective, solver="cholesky", generator=rng(3))
        for objective in ("low-variance", "standard")
    )
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_each_draw_minimises_the_stochastic_objective():
    """The gradient of the low-variance objective vanishes, its noise being drawn from the generator."""
    J, H, lam = randn(6, 2, 5, seed=1), softmax_curvature(6, 2), 0.3
    g = rng(4)
    a = torch.randn(7, 5, dtype=torch.float64, generator=g)
    e = torch.randn(7, 6, 2, dtype=torch.float64, generator=g)
    z = sample_posterior(J, H, lam, 7, solver="cholesky", generator=rng(4)).requires_grad_()
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT
    moved = a / math.sqrt(lam) + torch.einsum("nop,noq,snq->sp", J, root, e) / lam
    out = torch.einsum("nop,sp->sno", J, z)
    loss = 0.5 * torch.einsum("sno,noq,snq->", out, H, out) + lam / 2 * (z - moved).square().sum()
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("solver", ["cg", "cholesky", "sgd"])
def test_without_data_draws_are_the_prior(solver):
    z = sample_posterior(randn(0, 2, 3), randn(0, 2, 2), 4.0, 20_000, solver=solver, generator=rng(1))
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(3).double() / 4, atol=0.01, rtol=0)


def test_more_data_lower_the_variance():
    J, H, at = randn(12, 2, 6, seed=1), softmax_curvature(12, 2), randn(5, 6, seed=5)
    last = lowest = at.square().sum(1)
    for n in (1, 3, 12):
        z = sample_posterior(J[:n], H[:n], 1.0, 40_000, solver="cholesky", generator=rng(2))
        variance = (z @ at.T).square().mean(0)
        exact = torch.einsum("mp,pq,mq->m", at, dense_covariance(J[:n], H[:n], 1.0), at)
        torch.testing.assert_close(variance, exact, rtol=0.05, atol=0)  # seven standard errors
        assert (exact <= last + 1e-12).all()
        assert (variance <= 1.03 * lowest).all()
        last, lowest = exact, variance


def test_draws_follow_dtype_and_generator():
    J, H = randn(4, 2, 3).float(), softmax_curvature(4, 2).float()
    a, b, c = (sample_posterior(J, H, 1.0, 3, generator=rng(seed)) for seed in (1, 1, 2))
    assert a.dtype == torch.float32 and torch.equal(a, b) and not torch.equal(a, c)


def test_says_when_a_solver_stops_early():
    J, H = randn(9, 3, 12, seed=1), softmax_curvature(9, 3)
    for solver in ("cg", "sgd"):
        with pytest.warns(ConvergenceWarning, match="relative residual"):
            sample_posterior(J, H, 0.01, 2, solver=solver, max_iter=1, generator=rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jacobian": randn(4, 3)}, r"jacobian must have shape \(any, any, any\)"),
        ({"jacobian": torch.zeros(4, 2, 3).long()}, "jacobian must be a floating-point tensor"),
        ({"curvature": randn(4, 3, 3)}, r"curvature must have shape \(4, 2, 2\)"),
        ({"curvature": -torch.eye(2).double().expand(4, 2, 2)}, "without negative eigenvalues"),
        ({"curvature": torch.triu(torch.ones(4, 2, 2)).double()}, "symmetric"),
        ({"jacobian": torch.full((4, 2, 3), torch.nan)}, "jacobian must be finite"),
        ({"prior_precision": 0.0}, "prior_precision must be greater than 0"),
        ({"prior_precision": torch.zeros(3)}, "prior_precision must be positive"),
        ({"prior_precision": torch.ones(2)}, r"prior_precision must have shape \(3\)"),
        ({"n_samples": 0}, "n_samples must be an integer of at least 1"),
        ({"objective": "lowest"}, "objective must be one of"),
        ({"solver": "lu"}, "solver must be one of"),
        ({"tol": 0}, "tol must be greater than 0"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1"),
    ],
)
def test_refuses_a_bad_linear_model(as_a_user, change, message):
    given = {
        "jacobian": randn(4, 2, 3),
        "curvature": softmax_curvature(4, 2),
        "prior_precision": 1.0,
        "n_samples": 2,
    }
    with pytest.raises(ValueError, match=message):
        sample_posterior(**{**given, **change})
