"""The tangent limit against closed forms, numerical integrals, finite networks and nested loops."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.special import erf
from torch import nn

from posterity.optimization import TangentLimit, param_groups, parametrize


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


FUNCTIONS = {
    "relu": (lambda h: max(h, 0.0), lambda h: float(h > 0)),
    "erf": (erf, lambda h: 2 / math.sqrt(math.pi) * math.exp(-h * h)),
    "tanh": (math.tanh, lambda h: 1 - math.tanh(h) ** 2),
}


def expected(function, cross, one, two):
    """E[f(h) f(h')] by adaptive quadrature."""
    rest = math.sqrt(max(two - cross**2 / one, 0))

    def inner(b, a):
        return (
            function(math.sqrt(one) * a)
            * function(cross / math.sqrt(one) * a + rest * b)
            * math.exp(-(a * a + b * b) / 2)
        )

    return dblquad(inner, -8, 8, -8, 8, epsabs=1e-4, epsrel=1e-4)[0] / (2 * math.pi)


@pytest.mark.parametrize("activation", ["erf", "tanh", "relu"])
def test_kernels_are_gaussian_expectations_layer_by_layer(activation):
    f, slope = FUNCTIONS[activation]
    x, y = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[2.0, -0.5]]).double()
    forward, backward = TangentLimit(2, activation=activation).covariances(x, y)
    cross, one, two = float(x @ y.T) / 2, float(x @ x.T) / 2, float(y @ y.T) / 2
    if activation == "relu":  # kinks are dear to integrate: known angles instead
        angle = math.acos(cross / math.sqrt(one * two))
        value = math.sqrt(one * two) / (2 * math.pi) * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
        slopes = [(math.pi - angle) / (2 * math.pi)]
        angle = math.acos(value / (math.sqrt(one * two) / 2))
        slopes.append((math.pi - angle) / (2 * math.pi))
    else:
        value = expected(f, cross, one, two)
        grid = np.linspace(-9, 9, 20001)
        weight = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
        inner = [
            float(np.sum(weight * np.array([f(math.sqrt(s) * g) for g in grid]) ** 2)) for s in (one, two)
        ]
        slopes = [expected(slope, cross, one, two), expected(slope, value, *inner)]
    torch.testing.assert_close(float(forward[0, 0, 0]), cross)
    torch.testing.assert_close(float(forward[1, 0, 0]), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(backward[1, 0, 0]), slopes[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(backward[0, 0, 0]), slopes[0] * slopes[1], rtol=1e-4, atol=1e-4)


def wide_mlp(d, n, depth, act, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = [d] + [n] * depth + [1]
        layers = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b, bias=False), act()]
            nn.init.normal_(layers[-2].weight, std=(1 / a) ** 0.5)
        return nn.Sequential(*layers[:-1]).double()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_gradient_rule_is_the_tangent_kernel_of_wide_networks(depth):
    x, n = randn(4, 5, seed=1), 256
    kernels = []
    for seed in range(32):
        net = wide_mlp(5, n, depth, nn.ReLU, seed)
        rows = [torch.autograd.grad(net(point).sum(), list(net.parameters())) for point in x]
        kernel = torch.zeros(4, 4).double()
        for k, part in enumerate(
            zip(*rows, strict=True)
        ):  # gradients of w, where W = n^-1/2 w but in the first layer
            g = torch.stack([each.flatten() for each in part])
            kernel += g @ g.T / (n if k else 1)
        kernels.append(kernel)
    kernels = torch.stack(kernels)
    limit = TangentLimit(depth, rule="gradient")
    ours = torch.stack([limit.operator(x, x, chi) for chi in torch.eye(4).double()], 1)
    torch.testing.assert_close(ours, ours.T)
    error = kernels.std(0) / math.sqrt(32)
    assert ((kernels.mean(0) - ours).abs() < 4 * error + 0.01 * ours).all()
    assert (error < 0.1 * ours).all()


def test_depth_one_at_one_point_is_a_quarter_of_known_numbers():
    x = randn(1, 6)
    square = float(x.square().sum())
    value = TangentLimit(rule="gradient").operator(x, x, torch.ones(1).double())
    torch.testing.assert_close(float(value), square / 6 / 2 + square / 2, rtol=1e-7, atol=0)


@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_draws_agree_with_the_closed_forms_where_the_rule_is_linear(activation):
    x, y, chi = randn(5, 4), randn(3, 4, seed=1), randn(5, seed=2)
    exact = TangentLimit(2, activation=activation, rule="gradient").operator(x, y, chi)
    draws = torch.stack([
        TangentLimit(2, activation=activation, rule=lambda g: g, n_samples=2048, generator=rng(s)).operator(x, y, chi)
        for s in range(8)
    ])  # fmt: skip
    error = draws.std(0) / math.sqrt(8)
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.05 * exact.abs().max()).all()  # the bound is not an empty one


def test_the_sign_rule_at_one_point_is_a_sum_of_two_norms():
    """Omega = sign(chi) (|x|_2 / sqrt(2 pi d) + |x|_1 / sqrt(2 pi))."""
    x = randn(1, 6)
    exact = (float(x.norm()) / math.sqrt(6) + float(x.abs().sum())) / math.sqrt(2 * math.pi)
    draws = torch.stack(
        [TangentLimit(generator=rng(s)).operator(x, x, torch.tensor([-0.3]).double()) for s in range(8)]
    )
    assert abs(float(draws.mean()) + exact) < 3 * float(draws.std()) / math.sqrt(8)
    assert draws.std() < 0.1


def test_twice_the_error_moves_no_faster_under_signs_and_twice_under_gradients():
    x, y, chi = randn(5, 4), randn(3, 4, seed=1), randn(5, seed=2)
    for rule, factor in (("sign", 1.0), ("gradient", 2.0)):
        one, two = (TangentLimit(2, rule=rule, generator=rng()).operator(x, y, c) for c in (chi, 2 * chi))
        torch.testing.assert_close(two, factor * one)


def one_sign_step(n, depth, x, x_test, chi, seed, lr=1e-3):
    """Return minus the change of f per unit of rate, of a network trained by signs in the NTK parametrisation."""
    net = wide_mlp(6, n, depth, nn.ReLU, seed)
    parametrize(net, wide_mlp(6, 1, depth, nn.ReLU, 0), parametrization="ntk", rescale_init=False)
    opt = torch.optim.Adam(param_groups(net, lr, eps=1e-30))  # whose first step is by signs
    before = net(x_test).detach()
    (net(x)[:, 0] @ chi).backward()
    opt.step()
    return (before - net(x_test).detach())[:, 0] / lr


def test_a_network_of_width_8192_moves_by_the_operator_in_one_sign_step():
    x, x_test, chi = randn(4, 6, seed=3), randn(5, 6, seed=4), randn(4, seed=5)
    omega = TangentLimit(n_samples=16_384, generator=rng()).operator(x, x_test, chi)
    assert (one_sign_step(8192, 1, x, x_test, chi, 1) - omega).norm() / omega.norm() < 0.05


def test_deep_networks_move_by_the_operator_on_average():
    x, x_test, chi = randn(4, 6, seed=3), randn(5, 6, seed=4), randn(4, seed=5)
    moved = torch.stack([one_sign_step(384, 3, x, x_test, chi, seed, lr=1e-5) for seed in range(16)])
    omegas = torch.stack([TangentLimit(3, generator=rng(s)).operator(x, x_test, chi) for s in range(8)])
    error = (moved.var(0) / 16 + omegas.var(0) / 8).sqrt()
    assert ((moved.mean(0) - omegas.mean(0)).abs() < 4 * error).all()
    assert error.norm() < 0.2 * omegas.mean(0).norm()


def test_training_by_gradients_is_linear_and_reaches_the_kernel_interpolation():
    x, y, x_test = randn(4, 6), randn(4, seed=1), randn(3, 6, seed=2)
    limit = TangentLimit(2, rule="gradient")
    k_train, k_test = (
        torch.stack([limit.operator(x, z, e) for e in torch.eye(4).double()], 1) for z in (x, x_test)
    )
    f0 = randn(4, seed=6)
    train, test = limit.evolve(x, x_test, lambda f: f - y, lr=0.05, n_steps=2000, f0_train=f0)
    assert train.shape == (2001, 4)
    assert test.shape == (2001, 3)
    torch.testing.assert_close(train[0], f0)
    torch.testing.assert_close(train[1], f0 - 0.05 * k_train @ (f0 - y))
    torch.testing.assert_close(train[-1], y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(test[-1], k_test @ torch.linalg.solve(k_train, y - f0), rtol=1e-5, atol=1e-5)


def test_evolve_draws_once_and_adds_up_steps_of_the_operator():
    x, y, x_test = randn(4, 6), randn(4, seed=1), randn(3, 6, seed=2)
    train, test = TangentLimit(2, n_samples=256, generator=rng()).evolve(
        x, x_test, lambda f: f - y, lr=0.01, n_steps=3
    )
    together = torch.cat([train, test], 1)
    assert (together[0] == 0).all()
    # a test point that is a training point moves as it does: all points share the draws
    again, same = TangentLimit(2, n_samples=256, generator=rng()).evolve(
        x, x, lambda f: f - y, lr=0.01, n_steps=3
    )
    torch.testing.assert_close(again, same, rtol=1e-6, atol=1e-8)
    # until a sign of chi changes, sign descent with one training point is a constant velocity
    line, _ = TangentLimit(n_samples=64, generator=rng()).evolve(
        x[:1], x, lambda f: f - 100, lr=0.01, n_steps=5, f0_test=y
    )
    torch.testing.assert_close(line.diff(dim=0), line[1:2].expand(5, 1))


def test_the_operator_is_its_definition_in_loops():
    """With all pairs in place of random ones, on draws of our own."""
    x, chi = randn(3, 4), torch.tensor([1.0, 0.5, 0.8]).double()
    x_test = x[[0, 2]] + 0.3 * randn(2, 4, seed=1)
    s = 1000
    both = torch.cat([x, x_test])
    forward, backward = TangentLimit(2).covariances(both)
    generator = rng(7)
    h1 = torch.randn(s, 4, generator=generator).double() @ both.T / 2
    h2 = torch.distributions.MultivariateNormal(torch.zeros(5).double(), forward[1] + 1e-9 * torch.eye(5))
    g1 = torch.distributions.MultivariateNormal(torch.zeros(5).double(), backward[1] + 1e-9 * torch.eye(5))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        h2, g1 = h2.sample((s,)), g1.sample((s,))
    dh2 = torch.randn(s, 1, generator=generator).double() * (h2 > 0)
    dh1 = g1 * (h1 > 0)
    draws = []
    for k in range(s):
        total = torch.zeros(2).double()
        other = (k * 7 + 1) % s
        total += h2[k, 3:].relu() * torch.sign(h2[k, :3].relu() @ chi)
        for shift in range(4):
            phi = h1[(other + shift) % s].relu()
            total += dh2[k, 3:] * phi[3:] * torch.sign((chi * dh2[k, :3] * phi[:3]).sum()) / 4
        for j in range(4):
            total += dh1[k, 3:] * x_test[:, j] * torch.sign((chi * dh1[k, :3] * x[:, j]).sum())
        draws.append(total)
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(s)
    ours = TangentLimit(2, n_samples=16_384, generator=rng()).operator(x, x_test, chi)
    assert ((ours - draws.mean(0)).abs() < 4 * error).all()
    assert (error < 0.15 * ours.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_double_result_rounded(as_a_user, dtype):
    x, y, chi = (part.to(dtype) for part in (randn(5, 4), randn(3, 4, seed=1), randn(5, seed=2)))
    for rule in ("gradient", "sign"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = TangentLimit(2, rule=rule, generator=rng()).operator(x, y, chi)
        assert ours.dtype == dtype
        double = TangentLimit(2, rule=rule, generator=rng()).operator(x.double(), y.double(), chi.double())
        torch.testing.assert_close(ours.double(), double, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_without_a_generator_torchs_own_is_read():
    x, chi = randn(3, 4), randn(3, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = TangentLimit(2, n_samples=64).operator(x, x, chi)
        two = TangentLimit(2, n_samples=64).operator(x, x, chi)
        torch.manual_seed(0)
        torch.testing.assert_close(TangentLimit(2, n_samples=64).operator(x, x, chi), one)
    assert not torch.equal(one, two)


P, Q1, CHI = randn(3, 4), randn(2, 4), randn(3)


def evolve(**changed):
    arguments = {"x_train": P, "x_test": Q1, "loss_grad": lambda f: f, "lr": 0.1, "n_steps": 2}
    return TangentLimit(n_samples=8).evolve(**arguments | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TangentLimit(0), "depth must be an integer of at least 1"),
        (lambda: TangentLimit(activation="gelu"), "activation must be one of 'relu', 'erf', 'tanh', got 'gelu'"),
        (lambda: TangentLimit(rule="adam"), "rule must be one of 'gradient', 'sign', got 'adam'"),
        (lambda: TangentLimit(n_samples=0), "n_samples must be an integer of at least 1"),
        (lambda: TangentLimit().operator(P, Q1[:, :2], CHI), r"x_test must have shape \(any, 4\) for x_train"),
        (lambda: TangentLimit().operator(P, Q1, CHI[:2]), r"chi must have shape \(3\) for x_train"),
        (lambda: TangentLimit().operator(P, Q1, CHI * math.nan), "chi must be finite"),
        (lambda: TangentLimit().operator(P * math.inf, Q1, CHI), "x_train must be finite"),
        (lambda: TangentLimit().operator(P[:0], Q1, CHI[:0]), "x_train must have at least one row"),
        (lambda: TangentLimit().operator(P.long(), Q1, CHI), "x_train must be a floating-point tensor"),
        (lambda: TangentLimit(rule=lambda g: g.sum()).operator(P, Q1, CHI), "rule must return a tensor of the shape"),
        (lambda: TangentLimit().covariances(P[0]), r"x must have shape \(any, any\)"),
        (lambda: TangentLimit().covariances(P, Q1[:, :1]), r"x2 must have shape \(any, 4\) for x"),
        (lambda: evolve(lr=0.0), "lr must be greater than 0"),
        (lambda: evolve(n_steps=-1), "n_steps must be an integer of at least 0"),
        (lambda: evolve(f0_test=CHI), r"f0_test must have shape \(2\) for x_test"),
        (lambda: evolve(loss_grad=lambda f: f.sum()), r"loss_grad must have shape \(3\)"),
        (lambda: evolve(loss_grad=lambda f: f * math.nan), "loss_grad must stay finite"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
