"""The kernel against random neurons, its spectrum against integrals, and its prediction against matrix exponentials and training."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.special import eval_gegenbauer
from torch import nn
from torch.nn import functional as F

from posterity.dynamics import (
    SobolevLoss,
    empirical_ntk,
    frequency_energy,
    learning_rates_by_degree,
    ntk_eigenvalues,
    predicted_residual,
    quadrature_weights,
    relu_ntk,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sphere(n, d, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=rng(seed))
    return x / x.norm(dim=1, keepdim=True)


def circle(angles):
    return torch.stack([angles.cos(), angles.sin()], 1)


def even(n):
    return 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n


@pytest.mark.parametrize("d", [2, 5])
def test_the_kernel_is_the_mean_over_random_neurons(d):
    m = 200_000
    x, y = sphere(4, d), sphere(3, d, seed=1)
    w = torch.randn(m, d, dtype=torch.float64, generator=rng(2))
    # a neuron that is on has the gradient a (x, 1) / sqrt(2) in (w, b), one that is off none
    gradients = [(w @ z.T > 0)[:, :, None] * F.pad(z, (0, 1), value=1.0) / math.sqrt(2) for z in (x, y)]
    each = (gradients[0][:, :, None] * gradients[1][:, None]).sum(-1)
    error = each.std(0) / math.sqrt(m)
    assert ((each.mean(0) - relu_ntk(x, y)).abs() <= 5 * error + 1e-12).all()


class TwoLayers(nn.Module):
    """The network of equation (1): its second layer, signs, is no parameter."""

    def __init__(self, m, d):
        super().__init__()
        self.first = nn.Linear(d, m).double()
        nn.init.normal_(self.first.weight, generator=rng(5))
        nn.init.zeros_(self.first.bias)
        self.register_buffer("signs", torch.arange(m, dtype=torch.float64) % 2 * 2 - 1)

    def forward(self, x):
        return (self.first(x) / math.sqrt(2)).relu() @ self.signs / math.sqrt(len(self.signs))


def test_a_wide_network_of_the_module_has_the_kernel():
    x = sphere(5, 3)
    torch.testing.assert_close(empirical_ntk(TwoLayers(50_000, 3), x), relu_ntk(x, x), atol=1e-2, rtol=0)


def test_the_kernel_is_a_half_of_a_point_with_itself_and_nothing_of_its_opposite():
    x = sphere(50, 7)
    torch.testing.assert_close(relu_ntk(x, x).diagonal(), torch.full((50,), 0.5).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(relu_ntk(x, -x).diagonal(), torch.zeros(50).double(), atol=1e-8, rtol=0)
    assert torch.linalg.eigvalsh(relu_ntk(x, x))[0] > 0
    for dtype in (torch.float32, torch.bfloat16):
        narrow = relu_ntk(x.to(dtype), x)
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.double(), relu_ntk(x, x), atol=2e-2, rtol=0)
    assert relu_ntk(sphere(2, 500), sphere(3, 500)).shape == (2, 3)


def test_the_eigenvalues_on_the_circle_are_those_in_closed_form():
    expected = [(math.pi**2 / 2 + 2) / (2 * math.pi), (2 + math.pi**2 / 4) / (2 * math.pi)]
    for k in range(2, 60):
        even_k = (1 / (k + 1) ** 2 + 1 / (k - 1) ** 2) / (2 * math.pi)
        expected.append(1 / (math.pi * k**2) if k % 2 else even_k)
    found = ntk_eigenvalues(59, 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("d", [3, 4, 7])
def test_the_eigenvalues_are_integrals_over_the_sphere(d):
    found, order = ntk_eigenvalues(7, d), (d - 2) / 2
    around = 2 * math.pi ** ((d - 1) / 2) / math.gamma((d - 1) / 2)
    for degree in range(8):

        def integrand(t, degree=degree):
            polynomial = eval_gegenbauer(degree, order, math.cos(t)) / eval_gegenbauer(degree, order, 1.0)
            return (math.cos(t) + 1) * (math.pi - t) / (4 * math.pi) * polynomial * math.sin(t) ** (d - 2)

        value = around * quad(integrand, 0, math.pi, epsabs=1e-14)[0]
        assert float(found[degree]) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("d", [2, 3, 5, 64])
def test_the_eigenvalues_are_positive_and_fall_like_the_degree_to_the_minus_d(d):
    found = ntk_eigenvalues(10_000, d)
    assert (found > 0).all()
    slope = math.log(float(found[10_000] / found[5_000])) / math.log(2)
    assert slope == pytest.approx(-d, rel=0.01)
    # the trace: K(1) = 1/2 is the sum of eigenvalues times harmonics, over the area
    if d == 3:
        total = sum((2 * k + 1) * float(found[k]) for k in range(10_001)) / (4 * math.pi)
        assert total == pytest.approx(0.5, abs=1e-4)


def test_learning_rates_are_in_order_below_half_the_dimension_flat_there_and_reversed_beyond():
    for d in (2, 4):
        for s, low, high in ((0.0, 0.0, 0.3), (d / 2, 0.5, 2.0), (d / 2 + 1, 10.0, 1e6)):
            rates = learning_rates_by_degree(41, d, s)
            torch.testing.assert_close(
                rates, ntk_eigenvalues(41, d) * torch.tensor([(1 + k) ** (2 * s) for k in range(42)])
            )
            assert low < rates[41] / rates[9] < high


def exponential(h, p, r, times):
    return torch.stack([torch.matrix_exp(-t * h @ p) @ r for t in times])


TIMES = [0.0, 0.3, 5.0, 400.0]


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("s", [None, -1.0, 0.0, 1.5])
def test_the_residual_is_that_of_the_matrix_exponential(d, s):
    x, r = sphere(40, d), torch.randn(40, dtype=torch.float64, generator=rng(1))
    p = quadrature_weights(x).diag() if s is None else SobolevLoss(x, s).matrix
    found = predicted_residual(x, r, torch.tensor(TIMES), s=s)
    torch.testing.assert_close(found, exponential(relu_ntk(x, x), p, r, TIMES), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0], r)
    torch.testing.assert_close(predicted_residual(x, r, TIMES, s=s), found)


def test_singular_kernels_and_points_that_coincide_are_no_exception():
    x, r = sphere(20, 3).repeat(2, 1), torch.randn(40, dtype=torch.float64, generator=rng(1))
    c = torch.rand(40, dtype=torch.float64, generator=rng(2))
    low = torch.randn(40, 3, dtype=torch.float64, generator=rng(3))
    for kernel in (None, low @ low.T):
        for s in (None, 0.5):
            p = c.diag() if s is None else SobolevLoss(x, s, weights=c).matrix
            found = predicted_residual(x, r, TIMES, s=s, weights=c, kernel=kernel)
            h = relu_ntk(x, x) if kernel is None else kernel
            torch.testing.assert_close(found, exponential(h, p, r, TIMES), rtol=1e-5, atol=1e-6)
            assert predicted_residual(x, r, [1e300], s=s, weights=c, kernel=kernel).abs().max() < 1e3


def test_a_wave_on_an_even_circle_decays_at_its_rate():
    n, t = 64, even(64)
    x = circle(t)
    row = relu_ntk(x[:1], x)[0]
    for s in (0.0, 1.0):
        for k in (1, 2, 5, 8):
            rate = float((row * torch.cos(k * t)).sum()) * 2 * math.pi / n  # of the kernel, sampled
            assert rate == pytest.approx(float(ntk_eigenvalues(k, 2)[k]), rel=0.06)
            found = predicted_residual(x, torch.sin(k * t), [3.0, 20.0], s=s)
            for row_found, time in zip(found, (3.0, 20.0), strict=True):
                decay = math.exp(-time * rate * (1 + k) ** (2 * s))
                torch.testing.assert_close(row_found, decay * torch.sin(k * t))
    beyond = torch.sin(20 * t)  # the loss is cut off at 15
    torch.testing.assert_close(predicted_residual(x, beyond, [50.0])[0], beyond)


@pytest.mark.parametrize(("s", "lr"), [(None, 0.5), (1.0, 0.05)])
def test_training_a_wide_network_goes_as_predicted_before(s, lr):
    x = circle(2 * torch.pi * torch.rand(24, dtype=torch.float64, generator=rng(3)))
    target = 3 * x[:, 0] + x[:, 1] * x[:, 0]
    net = TwoLayers(16_384, 2)
    start = (net(x) - target).detach()
    own = empirical_ntk(net, x)
    mean = torch.full((24,), 2 / 24, dtype=torch.float64)
    loss = nn.MSELoss() if s is None else SobolevLoss(x, s, weights=mean)
    optimizer, steps = torch.optim.SGD(net.parameters(), lr=lr), 20
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(x), target).backward()
        optimizer.step()
    end = (net(x) - target).detach()
    assert end.norm() < 0.7 * start.norm()
    for kernel, close in ((own, 0.03), (None, 0.05)):
        found = predicted_residual(x, start, [lr * steps], s=s, weights=mean, kernel=kernel)[0]
        assert (found - end).norm() < close * start.norm()


def test_results_follow_dtype_and_mode_of_the_residual():
    x, r = sphere(20, 2), torch.randn(20, dtype=torch.float64, generator=rng(1))
    exact = predicted_residual(x, r, TIMES)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            found = predicted_residual(x.float(), r.to(dtype).requires_grad_(False), TIMES)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), exact, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=0
        )
    assert predicted_residual(x, r, []).shape == (0, 20)
    energies = torch.stack([frequency_energy(each, x) for each in exact])
    assert (energies[-1] < energies[0]).all()


X, R = sphere(6, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relu_ntk(X, X[:, :2]), r"y must have shape \(any, 3\)"),
        (lambda: relu_ntk(X, 2 * X), "y must have rows of length 1"),
        (lambda: relu_ntk(X.long(), X), "x must be a floating-point"),
        (lambda: ntk_eigenvalues(-1, 3), "max_degree must be an integer of at least 0"),
        (lambda: ntk_eigenvalues(10_001, 3), "max_degree must be at most 10000"),
        (lambda: ntk_eigenvalues(3, 1), "dim must be an integer of at least 2"),
        (lambda: ntk_eigenvalues(3, 65), "dim must be at most 64"),
        (lambda: learning_rates_by_degree(3, 2, math.nan), "s must be in"),
        (lambda: learning_rates_by_degree(2.5, 2), "max_degree must be an integer"),
        (lambda: predicted_residual(X, R[:5], [1.0]), r"residual must have shape \(6\) for x"),
        (lambda: predicted_residual(X, R.long(), [1.0]), "residual must be a floating-point"),
        (lambda: predicted_residual(X, R, [-1.0]), "times must be at least 0"),
        (lambda: predicted_residual(X, R, torch.tensor([1.0, -1.0])), "times must be at least 0, got -1"),
        (lambda: predicted_residual(X, R, torch.tensor([math.inf])), "times must be finite"),
        (lambda: predicted_residual(X, R, torch.ones(2, 2)), r"times must have shape \(any\)"),
        (lambda: predicted_residual(X, R, [1.0], s=math.inf), "s must be in"),
        (lambda: predicted_residual(X, R, [1.0], s=None, max_degree=2), "max_degree must be None where s is None"),
        (lambda: predicted_residual(X, R, [1.0], kernel=torch.eye(5)), r"kernel must have shape \(6, 6\) for x"),
        (lambda: predicted_residual(X, R, [1.0], kernel=torch.eye(6).cumsum(0)), "kernel must be symmetric"),
        (lambda: predicted_residual(X, R, [1.0], kernel=-torch.eye(6)), "kernel must be positive semi-definite"),
        (lambda: predicted_residual(X, R, [1.0], kernel=torch.eye(6) * math.nan), "kernel must be finite"),
        (lambda: predicted_residual(X, R, [1.0], weights=torch.zeros(6)), "weights must not be negative, nor all 0"),
        (lambda: predicted_residual(X, R, [1.0], max_degree=-1), "max_degree must be an integer"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
