import numpy as np
import pytest
import torch
from torch import nn

from posterity.representation import CIRCE, gaussian_kernel, hscic, hsic, leave_one_out_errors
from posterity.testing import check_loss


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def dot(a, b):
    return a @ b.T


def gram(n, seed=0):
    x = randn(n, 2, seed=seed)
    return gaussian_kernel(x, x, 1.0)


# Kernels and criteria.


def test_the_kernel_has_no_factor_two():
    a, b = randn(4, 3), randn(5, 3, seed=1)
    by_hand = np.exp(-np.square(a.numpy()[:, None] - b.numpy()[None]).sum(2) / 0.7)
    torch.testing.assert_close(gaussian_kernel(a, b, 0.7), torch.from_numpy(by_hand))
    far = a.float() + 1000  # what is common to all points does not cost precision
    exact = gaussian_kernel(far.double(), far.double(), 0.7).float()
    torch.testing.assert_close(gaussian_kernel(far, far, 0.7), exact, atol=1e-5, rtol=0)
    wide = 1000 * randn(50, 3).float()  # where rounding alone would put points at negative distances
    assert float(gaussian_kernel(wide, wide, 1e-3).max()) <= 1


def test_biased_hsic_is_the_trace_with_centring_matrices():
    kx, ky, n = gram(7), gram(7, 1), 7
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    torch.testing.assert_close(hsic(kx, ky, biased=True), torch.trace(kx @ h @ ky @ h) / n**2)
    torch.testing.assert_close(hsic(kx, ky, biased=True), hsic(ky, kx, biased=True))
    assert hsic(kx, ky, biased=True) >= 0


def test_unbiased_hsic_is_the_mean_over_quadruples_of_different_samples():
    from itertools import permutations

    kx, ky = gram(6), gram(6, 1)
    total = [kx[i, j] * (ky[i, j] + ky[q, r] - 2 * ky[i, q]) for i, j, q, r in permutations(range(6), 4)]
    torch.testing.assert_close(hsic(kx, ky), torch.stack(total).mean())
    torch.testing.assert_close(hsic(kx, ky), hsic(ky, kx))


def test_unbiased_hsic_of_independent_samples_is_zero_on_average(as_a_user):
    draws = []
    for seed in range(2000):
        x, y = randn(2, 8, 1, seed=seed)
        draws.append(hsic(gaussian_kernel(x, x, 1.0), gaussian_kernel(y, y, 1.0)))
    draws = torch.stack(draws)
    assert abs(float(draws.mean())) < 5 * float(draws.std()) / 2000**0.5
    order = torch.randperm(6, generator=rng())
    kx, ky = gram(6), gram(6, 1)
    for biased in (False, True):
        moved = hsic(kx[order][:, order], ky[order][:, order], biased=biased)
        torch.testing.assert_close(moved, hsic(kx, ky, biased=biased))


def test_leave_one_out_errors_are_those_of_as_many_refits():
    ky, kz, ridges = gram(9), gram(9, 1), (0.05, 1.0)
    found = []
    for ridge in ridges:
        errors = []
        for i in range(9):
            rest = [j for j in range(9) if j != i]
            w = torch.linalg.solve(ky[rest][:, rest] + ridge * torch.eye(8, dtype=torch.float64), ky[rest, i])
            errors.append(kz[i, i] - 2 * w @ kz[rest, i] + w @ kz[rest][:, rest] @ w)
        found.append(torch.stack(errors).mean())
    torch.testing.assert_close(leave_one_out_errors(ky, kz, ridges), torch.stack(found), rtol=1e-10, atol=0)
    assert leave_one_out_errors(torch.ones(9, 9).double(), kz, [1e-18]).isinf().all()


def test_hscic_is_the_mean_of_weighted_criteria():
    x, z, y = randn(3, 6, 2)
    kx, kz, ky = (gaussian_kernel(v, v, 1.3) for v in (x, z, y))
    w = torch.linalg.inv(ky + 0.3 * torch.eye(6, dtype=torch.float64)) @ ky
    total = 0.0
    for j in range(6):
        a = w[:, j]
        total = total + a @ (kx * kz) @ a - 2 * (a * (kx @ a)) @ (kz @ a) + (a @ kx @ a) * (a @ kz @ a)
    options = {"sigma2_x": 1.3, "sigma2_z": 1.3, "sigma2_y": 1.3, "ridge": 0.3}
    torch.testing.assert_close(hscic(x, z, y, **options), total / 6)


# The penalty.


def test_with_linear_kernels_it_is_the_gram_matrix_of_ridge_residuals():
    y, z, yb, zb = randn(20, 2), randn(20, 3, seed=1), randn(7, 2, seed=2), randn(7, 3, seed=3)
    circe = CIRCE(sigma2_y=1.5, ridge=0.2, kernel_z=dot).fit(y, z)
    ky = gaussian_kernel(y, y, 1.5)
    predicted = gaussian_kernel(yb, y, 1.5) @ torch.linalg.solve(
        ky + 0.2 * torch.eye(20, dtype=torch.float64), z
    )
    residual = zb - predicted
    torch.testing.assert_close(circe.residual_kernel(yb, zb), residual @ residual.T, rtol=1e-10, atol=1e-10)
    x = randn(7, 4, seed=4)
    other = residual @ residual.T * gaussian_kernel(yb, yb, 1.5)
    kx = gaussian_kernel(x, x, 0.01)
    for biased in (False, True):
        made = CIRCE(sigma2_y=1.5, ridge=0.2, kernel_z=dot, biased=biased).fit(y, z)
        torch.testing.assert_close(made(x, yb, zb), hsic(kx, other, biased=biased))
        plain = CIRCE(sigma2_y=1.5, ridge=0.2, kernel_z=dot, kernel_x=dot, biased=biased, centered=False).fit(
            y, z
        )
        product = dot(x, x) * other
        expected = product.mean() if biased else (product.sum() - product.trace()) / 42
        torch.testing.assert_close(plain(x, yb, zb), expected)


def test_the_grid_is_searched_by_leave_one_out_and_ties_go_to_the_first():
    y = randn(60, 1)
    z = torch.sin(2 * y) + 0.1 * randn(60, 1, seed=1)
    circe = CIRCE(sigma2_y=(100.0, 1.0, 1e-4), ridge=(0.1, 1e5), sigma2_z=1.0).fit(y, z)
    kz = gaussian_kernel(z, z, 1.0)
    expected = torch.stack(
        [leave_one_out_errors(gaussian_kernel(y, y, s), kz, (0.1, 1e5)) for s in (100.0, 1.0, 1e-4)]
    )
    torch.testing.assert_close(circe.loo_errors_, expected)
    assert (circe.sigma2_y_, circe.ridge_) == (1.0, 0.1)
    twice = CIRCE(sigma2_y=(1.0, 1.0), ridge=0.1).fit(y, z)
    assert twice.loo_errors_.shape == (2, 1) and twice.sigma2_y_ == 1.0
    median = CIRCE(sigma2_y="median", sigma2_z="median", ridge=0.1).fit(y, z)
    apart = (y - y.T).square()[~torch.eye(60, dtype=torch.bool)].median()
    assert median.sigma2_y_ == pytest.approx(float(apart))


def test_a_distractor_that_the_target_explains_costs_nothing_nor_do_constant_features():
    y = torch.linspace(-1, 1, 40, dtype=torch.float64)
    held, batch = torch.arange(0, 40, 2), torch.arange(1, 40, 2)
    x = randn(20, 3)
    values = [
        float(
            CIRCE(sigma2_x=1.0, sigma2_y=1.0, ridge=ridge)
            .fit(y[held], y[held])
            .forward(x, y[batch], y[batch])
        )
        for ridge in (1e-1, 1e-4, 1e-8)
    ]
    assert abs(values[2]) < 1e-9 < abs(values[1]) < abs(values[0])
    left = [
        float(
            CIRCE(sigma2_y=1.0, ridge=ridge).fit(y[held], y[held]).residual_kernel(y[batch], y[batch]).norm()
        )
        for ridge in (1e-1, 1e-4, 1e-8)
    ]
    assert left[2] < 1e-6 < left[1] < left[0]
    for biased in (False, True):
        circe = CIRCE(sigma2_x=1.0, biased=biased).fit(y[held], randn(20))
        constant = circe(torch.ones(20, 3, dtype=torch.float64), y[batch], randn(20, seed=1))
        assert float(constant) == pytest.approx(0, abs=1e-12)


def test_dependence_stays_and_independence_vanishes_with_more_samples():
    sizes, found = (50, 100, 200, 400, 800), {"distractor": [], "target": []}
    for n in sizes:
        values = {name: [] for name in found}
        for seed in range(4):
            y = randn(n + 200, 1, seed=seed)
            own, other = randn(n + 200, 1, seed=seed + 50), randn(n + 200, 1, seed=seed + 99)
            z = y + 0.5 * own
            circe = CIRCE(sigma2_x=1.0, sigma2_y=(1.0, 0.3), ridge=(0.1, 1.0), biased=True).fit(y[n:], z[n:])
            for name, x in (("distractor", z), ("target", y + 0.5 * other)):
                values[name].append(float(circe(x[:n], y[:n], z[:n])))
        for name in found:
            found[name].append(np.mean(values[name]))
    assert min(found["distractor"]) > 1e-3
    assert np.polyfit(np.log(sizes), np.log(found["target"]), 1)[0] < -0.5
    assert found["target"][-1] < found["distractor"][-1] / 4


def test_it_is_a_regulariser_whose_gradient_reaches_features_alone(as_a_user):
    y, z = randn(12, 1), randn(12, 1, seed=1)
    circe = CIRCE(sigma2_x=1.0, sigma2_y=1.0, ridge=0.5).fit(y, z)
    x, yb, zb = randn(6, 2, seed=2).requires_grad_(), randn(6, 1, seed=3), randn(6, 1, seed=4)

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.circe = circe

        def forward(self, x, y, z):
            return self.circe(x, y, z)

    check_loss(circe, x, yb, zb, batch_of_one=False, symmetric=True, compiles=False)
    assert torch.autograd.gradgradcheck(lambda x: circe(x, yb, zb), x)
    targets = [t.clone().requires_grad_() for t in (yb, zb)]
    circe(x, *targets).backward()
    assert x.grad.norm() > 0 and targets[0].grad is None and targets[1].grad is None
    two = circe([x, 2 * x], yb, zb)
    torch.testing.assert_close(two, circe(x, yb, zb) + circe(2 * x, yb, zb))
    torch.testing.assert_close(circe(x, yb[:, 0], zb[:, 0]), circe(x, yb, zb))
    maps = randn(6, 2, 3, seed=5)
    torch.testing.assert_close(circe(maps, yb, zb), circe(maps.flatten(1), yb, zb))
    order = torch.randperm(6, generator=rng())
    torch.testing.assert_close(circe(x[order], yb[order], zb[order]), circe(x, yb, zb))


def test_a_state_dict_is_all_of_it():
    y, z = randn(12, 1), randn(12, 2, seed=1)
    circe = CIRCE(sigma2_x="median", ridge=(0.1, 1.0)).fit(y, z)
    x, yb, zb = randn(6, 2, seed=2), randn(6, 1, seed=3), randn(6, 2, seed=4)
    again = CIRCE(sigma2_x="median", ridge=(0.1, 1.0))
    again.double().load_state_dict(circe.state_dict())
    assert torch.equal(again(x, yb, zb), circe(x, yb, zb))
    assert again.ridge_ == circe.ridge_
    low = circe.to(torch.float32)
    torch.testing.assert_close(
        low(x.float(), yb.float(), zb.float()).double(), again(x, yb, zb), rtol=1e-4, atol=1e-7
    )


def curved(n, seed=0):
    y = 2 * torch.rand(n, 1, dtype=torch.float64, generator=rng(seed)) - 1
    return y, torch.sin(3 * y) + 0.3 * randn(n, 1, seed=seed + 1)


@pytest.mark.parametrize("width", [1.0, 0.1, 0.001])
def test_axes_below_rounding_are_left_out_without_a_trace_in_float64_or_float32(width):
    held, (y, z) = curved(300), curved(40, 5)
    y, z = 1.3 * y, 1.3 * z  # some lie beyond the held-out pairs
    circe = CIRCE(sigma2_x=1.0, sigma2_y=width, ridge=0.01, sigma2_z=0.5).fit(*held)
    assert circe.to_axes.shape[1] < 30  # few, where 300 are possible
    k = lambda a, b, s: (-(a - b.T).square() / s).exp()  # noqa: E731
    own = 0.01 * torch.eye(300, dtype=torch.float64)
    weights = torch.linalg.solve(k(held[0], held[0], width) + own, k(held[0], y, width))
    across = k(z, held[1], 0.5) @ weights
    direct = k(z, z, 0.5) - across - across.T + weights.T @ k(held[1], held[1], 0.5) @ weights
    torch.testing.assert_close(circe.residual_kernel(y, z), direct, rtol=0, atol=1e-7)
    y32, z32 = y.float(), z.float()
    exact = circe.residual_kernel(y32.double(), z32.double())
    torch.testing.assert_close(circe.residual_kernel(y32, z32).double(), exact, rtol=0, atol=2e-6)
    before = circe.residual_kernel(y, z)
    for dtype in (torch.float32, torch.bfloat16):  # casting the module rounds nothing
        assert torch.equal(circe.to(dtype).residual_kernel(y, z), before)
    assert circe.to_mean.dtype == circe.held_y.dtype == torch.float64


def test_a_median_is_that_of_different_points_and_a_constant_has_width_one():
    (y, z), x = curved(30), randn(7, 3, seed=9)
    off = lambda a: torch.pdist(a).square()  # noqa: E731
    circe = CIRCE(sigma2_x="median", sigma2_y=1.0, sigma2_z="median", ridge=0.1).fit(y, z)
    middle = [float(off(a).sort().values[(len(off(a)) - 1) // 2]) for a in (x, z)]
    same = CIRCE(sigma2_x=middle[0], sigma2_y=1.0, sigma2_z=middle[1], ridge=0.1).fit(y, z)
    torch.testing.assert_close(circe(x, y[:7], z[:7]), same(x, y[:7], z[:7]))
    flat = CIRCE(sigma2_x=1.0, sigma2_y="median", sigma2_z="median", ridge=0.1).fit(0 * y, 0 * z)
    assert flat.sigma2_y_ == 1.0
    assert flat(x, y[:7], z[:7]).isfinite()


def test_ridges_that_rounding_hides_are_passed_over():
    y, z = curved(60)
    circe = CIRCE(sigma2_y=1.0, ridge=(1e-17, 1e-2)).fit(y, z)
    assert circe.ridge_ == 1e-2 and circe.loo_errors_[0, 0] == torch.inf
    with pytest.raises(ValueError, match="ridge must be above the precision"):
        CIRCE(sigma2_y=1.0, ridge=1e-17).fit(y, z)


def test_it_is_fitted_in_inference_mode_and_takes_no_random_numbers():
    y, z = curved(40)
    state = torch.get_rng_state()
    with torch.inference_mode():
        circe = CIRCE(sigma2_x=1.0).fit(y[8:], z[8:])
    x = randn(8, 2).requires_grad_()
    circe(x, y[:8], z[:8]).backward()
    assert x.grad.norm() > 0 and torch.equal(state, torch.get_rng_state())


FITTED = CIRCE(ridge=0.1).fit(torch.arange(10.0), torch.arange(10.0).square() / 100)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CIRCE()(torch.randn(5, 2), torch.randn(5), torch.randn(5)), r"fit\(y, z\) must be called first"),
        (lambda: CIRCE().ridge_, "must be called first"),
        (lambda: FITTED(torch.randn(5, 2), torch.randn(4), torch.randn(4)), "y must have as many rows as features"),
        (lambda: FITTED(torch.randn(5, 2), torch.randn(5), torch.randn(4)), "z must have shape"),
        (lambda: FITTED(torch.randn(5, 2), torch.randn(5, 2), torch.randn(5)), "y must have shape"),
        (lambda: FITTED(torch.randn(3, 2), torch.randn(3), torch.randn(3)), "features must have at least 4 rows"),
        (lambda: FITTED(torch.full((5, 2), torch.nan), torch.randn(5), torch.randn(5)), "features must be finite"),
        (lambda: FITTED(torch.randn(5, 2), torch.full((5,), torch.nan), torch.randn(5)), "y must be finite"),
        (lambda: FITTED(torch.randn(5, 2), torch.randn(5), torch.full((5,), torch.nan)), "z must be finite"),
        (lambda: FITTED(torch.randn(5, 2), torch.randn(5), torch.randn(5, 2)), r"z must have shape .*\(5, 2\)"),
        (lambda: FITTED([], torch.randn(5), torch.randn(5)), "features must be a tensor or"),
        (lambda: FITTED(torch.randn(5, 2), torch.arange(5), torch.randn(5)), "y must be .* one-hot"),
        (lambda: CIRCE().fit(torch.arange(20), torch.randn(20)), "y must be .* one-hot"),
        (lambda: CIRCE().fit(torch.randn(20), torch.arange(20)), "z must be .* one-hot"),
        (lambda: CIRCE().fit(torch.full((12,), torch.nan), torch.randn(12)), "y must be finite"),
        (lambda: CIRCE().fit(torch.randn(9), torch.randn(9)), "at least 10 held-out rows"),
        (lambda: CIRCE().fit(torch.randn(12), torch.randn(11)), "z must have as many rows as y"),
        (lambda: CIRCE().fit(torch.randn(12), torch.full((12,), torch.inf)), "z must be finite"),
        (lambda: CIRCE(sigma2_x=0), "sigma2_x"),
        (lambda: CIRCE(sigma2_y=(1.0, -1.0)), "sigma2_y"),
        (lambda: CIRCE(sigma2_z="mean"), "sigma2_z"),
        (lambda: CIRCE(sigma2_z=-1.0), "sigma2_z"),
        (lambda: CIRCE(ridge=(0.1, -1.0)), "ridge"),
        (lambda: CIRCE(ridge=()), "ridge must name"),
        (lambda: CIRCE(ridge=0.0), "ridge"),
        (lambda: CIRCE(sigma2_y=()), "sigma2_y must name"),
        (lambda: FITTED([torch.randn(5, 2), torch.randn(4, 2)], torch.randn(5), torch.randn(5)), r"features\[1\] must have as many"),
        (lambda: FITTED.residual_kernel(torch.randn(5), torch.arange(5)), "z must be .* one-hot"),
        (lambda: leave_one_out_errors(torch.eye(3), torch.eye(3), [0.0]), r"ridges\[0\]"),
        (lambda: hscic(torch.ones(4, 1), torch.ones(3, 1), torch.ones(4, 1), ridge=1, sigma2_x=1, sigma2_z=1, sigma2_y=1), "z must have as many"),
        (lambda: gaussian_kernel(torch.ones(2, 2), torch.ones(2, 3), 1.0), "b must have shape"),
        (lambda: hsic(torch.ones(3, 3), torch.ones(3, 3)), "at least 4 rows"),
        (lambda: hsic(torch.ones(4, 3), torch.ones(4, 3)), "kx must have shape"),
        (lambda: hscic(*torch.ones(3, 4, 1), ridge=0, sigma2_x=1, sigma2_z=1, sigma2_y=1), "ridge"),
        (lambda: hscic(*torch.ones(3, 4, 1), ridge=1, sigma2_x=0, sigma2_z=1, sigma2_y=1), "sigma2_x must be"),
        (lambda: leave_one_out_errors(torch.ones(0, 0), torch.ones(0, 0), [1.0]), "ky must have at least one row"),
        (lambda: leave_one_out_errors(torch.eye(3), torch.eye(4), [1.0]), "kz must have shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
