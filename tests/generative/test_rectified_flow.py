"""Rectified flow where its slope is known: Gaussians, mixtures, monotone maps of a line."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from posterity.generative import RectifiedFlow, reflow, straightness, transport_cost
from posterity.testing import check_generative

M = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
S = 0.5


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=rng(seed))


class GaussianSlope(nn.Module):
    """E[X1 - X0 | X_t = x] for X0 ~ N(0, I) and X1 ~ N(mean, std^2 I), independent."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), std

    def forward(self, x, t):
        t = t[:, None]
        gain = (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.std**2)
        return self.mean + gain * (x - t * self.mean)


class MixtureSlope(nn.Module):
    """The slope when a pair is N(start_k, I) and N(end_k, std^2 I), k drawn evenly."""

    def __init__(self, starts, ends, std):
        super().__init__()
        self.starts, self.ends, self.std = starts, ends, std

    def forward(self, x, t):
        t = t[:, None, None]
        centre = (1 - t) * self.starts + t * self.ends
        var = (1 - t) ** 2 + t**2 * self.std**2
        off = x[:, None] - centre
        weight = (-off.square().sum(2, keepdim=True) / (2 * var)).softmax(1)  # one var a time
        slope = self.ends - self.starts + (t * self.std**2 - (1 - t)) / var * off
        return (weight * slope).sum(1)


class PairsSlope(nn.Module):
    """The slope of increasing pairs on a line: each keeps to its own, which never cross."""

    def __init__(self, z0=None, z1=None):
        super().__init__()
        if z0 is not None:
            order = z0[:, 0].argsort()
            self.z0, self.z1 = z0[order, 0], z1[order, 0]

    def forward(self, x, t):
        at = ((1 - t[0]) * self.z0 + t[0] * self.z1).numpy()
        slope = np.interp(x[:, 0].numpy(), at, (self.z1 - self.z0).numpy())
        return torch.from_numpy(slope)[:, None]


@pytest.fixture(params=["torchdiffeq", "scipy"])
def solver(request, monkeypatch):
    if request.param == "scipy":
        monkeypatch.setitem(sys.modules, "torchdiffeq", None)  # importing it now fails
    return request.param


@pytest.fixture
def gaussian():
    return RectifiedFlow(3), GaussianSlope(M, S), normal(64, 3)


def test_conforms_to_its_kind(as_a_user):
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.5])
    target = mean + std * torch.randn(50, 2, generator=rng(1))
    check_generative(RectifiedFlow(2), GaussianSlope(mean, 0.5), target, mean=mean, std=std, atol=0.06)


def test_rk45_maps_gaussian_to_gaussian_and_back(gaussian, solver):
    flow, net, x0 = gaussian
    with torch.no_grad():
        there = flow.integrate(net, x0, rtol=1e-7, atol=1e-7)
        back = flow.integrate(net, there.x, t0=1.0, t1=0.0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(there.x, M + S * x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.x, x0, rtol=0, atol=1e-5)


def test_rk45_works_in_single_precision(gaussian, solver):
    flow, net, x0 = gaussian
    x1 = flow.sample(net.float(), x0=x0.float(), method="rk45", rtol=1e-6, atol=1e-6)
    assert x1.dtype == torch.float32
    torch.testing.assert_close(x1.double(), M + S * x0, rtol=0, atol=1e-5)


def test_rk45_reaches_a_fine_tolerance_on_a_network_in_single_precision(gaussian, solver):
    """The state is wider than the network, or its rounding would drive the step to nothing."""
    flow, net, x0 = gaussian
    found = flow.integrate(net.float(), x0.float(), rtol=1e-8, atol=1e-8)
    assert found.n_evals < 1000
    torch.testing.assert_close(found.x.double(), M + S * x0, rtol=0, atol=2e-6)


def test_one_euler_step_goes_to_the_mean_of_the_data(gaussian):
    flow, net, x0 = gaussian
    torch.testing.assert_close(flow.sample(net, x0=x0, n_steps=1), M.expand(64, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("backward", [False, True])
def test_global_error_falls_with_the_order_of_the_method(gaussian, method, order, backward):
    flow, net, x0 = gaussian
    start, end = (M + S * x0, x0) if backward else (x0, M + S * x0)
    ends = {"t0": float(backward), "t1": float(not backward)}
    with torch.no_grad():
        errors = [
            (flow.integrate(net, start, method=method, n_steps=n, **ends).x - end).abs().max()
            for n in (50, 100)
        ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


def test_network_sees_one_unscaled_time_a_sample(solver):
    flow, seen, shapes = RectifiedFlow((2, 2)), [], set()

    def net(x, t):
        seen.append(float(t[0]))
        shapes.add((t.shape, t.dtype, len(t.unique())))
        return 30 * torch.sin(x)  # needs small steps, and would tempt a solver past the end

    x = normal(5, 2, 2).float()
    calls = {}
    for method in ("euler", "heun", "rk45"):
        seen.clear()
        found = flow.integrate(net, x, method=method, n_steps=7, return_path=True)
        assert found.n_evals == len(seen)
        assert found.path.shape == (len(found.times), 5, 2, 2)
        assert torch.equal(found.path[0], x)
        assert torch.equal(found.path[-1], found.x)
        assert (found.times[0], found.times[-1]) == (0, 1)
        assert (found.times.diff() > 0).all()
        calls[method] = list(seen)
    assert shapes == {((5,), torch.float32, 1)}
    assert all(0 <= t <= 1 for times in calls.values() for t in times)
    np.testing.assert_allclose(calls["euler"], np.arange(7) / 7, rtol=1e-7)  # none at t = 1
    assert len(calls["heun"]) == 14
    seen.clear()
    flow.integrate(lambda x, t: seen.append(float(t.max())) or 0 * x, x, method="rk45")
    flow.integrate(lambda x, t: seen.append(float(t.min())) or 1e-6 * x, x, t0=1.0, t1=0.0)
    assert 0 <= min(seen) <= max(seen) <= 1


def test_rk45_path_has_the_flow_at_its_times(gaussian, solver):
    flow, net, x0 = gaussian
    with torch.no_grad():
        found = flow.integrate(net, x0, t0=1.0, t1=0.25, rtol=1e-8, atol=1e-8, return_path=True)
    t = found.times[:, None, None]
    scale = ((1 - t) ** 2 + t**2 * S**2).sqrt()
    noise = (x0 - M) / S  # x0 stands at t = 1 here
    torch.testing.assert_close(found.path, t * M + scale * noise, rtol=0, atol=1e-6)


def test_gradients_pass_through_the_integration(gaussian):
    """d (mean + std x0) / d mean = 1 in every coordinate."""
    flow, net, x0 = gaussian
    for method in ("heun", "rk45"):
        (grad,) = torch.autograd.grad(flow.integrate(net, x0, method=method).x.sum(), [net.mean])
        torch.testing.assert_close(grad, torch.full((3,), 64.0, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_straightness_of_a_gaussian_is_its_integral(std):
    """S = E||x0||^2 (int a'(t)^2 dt - (s - 1)^2), since Z_t = t m + a(t) x0."""

    def speed(t):
        return (t * std**2 - (1 - t)) ** 2 / ((1 - t) ** 2 + t**2 * std**2)

    x0 = normal(500, 3)
    expected = x0.square().sum(1).mean() * (quad(speed, 0, 1)[0] - (std - 1) ** 2)
    with torch.no_grad():
        found = straightness(RectifiedFlow(3), GaussianSlope(M, std), x0, n_steps=200)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)
    if std == 0.5:
        torch.testing.assert_close(expected, 0.21460 * x0.square().sum(1).mean(), rtol=1e-4, atol=0)


def test_straightness_of_a_constant_field_is_zero():
    shift = torch.tensor([2.0, -3.0])
    found = straightness(RectifiedFlow(2), lambda x, t: shift.expand_as(x), torch.zeros(4, 2))
    assert found < 1e-10


def is_normal_log_density(std, **options):
    x1 = M + 1.6 * std * normal(64, 3)
    with torch.no_grad():
        found = RectifiedFlow(3).log_prob(GaussianSlope(M, std), x1, **options)
    torch.testing.assert_close(
        found, torch.distributions.Normal(M, std).log_prob(x1).sum(1).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_log_prob_is_the_normal_log_density(solver, divergence):
    """Hutchinson's estimate is exact too: the Jacobian is a multiple of the identity."""
    is_normal_log_density(S, divergence=divergence, rtol=1e-7, atol=1e-7)


def test_log_prob_on_an_even_grid_is_the_normal_log_density():
    is_normal_log_density(0.9, method="heun", n_steps=150)


def test_density_of_a_mixture_is_right_and_integrates_to_one():
    ends = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [0.0, -1.4]], dtype=torch.float64)
    net = MixtureSlope(torch.zeros_like(ends), ends, 0.4)
    side = torch.linspace(-4, 4, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    density = RectifiedFlow(2).log_prob(net, grid).exp()
    square = (grid[:, None] - ends).square().sum(2)
    truth = (-square / (2 * 0.4**2)).exp().mean(1) / (2 * math.pi * 0.4**2)
    torch.testing.assert_close(density, truth, rtol=0, atol=1e-4)
    assert abs(density.sum() * (side[1] - side[0]) ** 2 - 1) < 0.01


def test_hutchinson_is_unbiased():
    """For v = A x the trace of A, on average over signs; a single sign is off by a - b terms."""
    a = torch.tensor([[0.3, 0.8], [-0.1, -0.5]], dtype=torch.float64)
    flow, x1 = RectifiedFlow(2), normal(1, 2).expand(4000, 2)
    exact = flow.log_prob(lambda x, t: x @ a.T, x1[:1], method="heun", n_steps=20)
    options = {"method": "heun", "n_steps": 20, "divergence": "hutchinson", "generator": rng()}
    several = flow.log_prob(lambda x, t: x @ a.T, x1, **options)
    assert several.std() > 0.1
    assert abs(several.mean() - exact) < 4 * several.std() / math.sqrt(4000)


def test_log_prob_uses_the_density_of_the_source(gaussian):
    """A source N(0, 2^2) moved by a constant is N(shift, 2^2)."""
    _, _, x = gaussian
    law = torch.distributions.Normal(torch.zeros(3).double(), 2.0)
    flow = RectifiedFlow(3, source=lambda n, generator: 2 * torch.randn(n, 3, generator=generator))
    found = flow.log_prob(lambda x, t: M.expand_as(x), x, source_log_prob=lambda z: law.log_prob(z).sum(1))
    torch.testing.assert_close(found, law.log_prob(x - M).sum(1))


def test_log_prob_trains_the_network(gaussian):
    """d log N(x; m, s^2) / d m = (x - m) / s^2."""
    flow, net, x0 = gaussian
    x1 = M + 0.8 * x0
    (grad,) = torch.autograd.grad(flow.log_prob(net, x1, method="heun", n_steps=50).sum(), [net.mean])
    torch.testing.assert_close(grad, ((x1 - M) / S**2).sum(0), rtol=1e-3, atol=1e-3)


def test_cost_of_the_coupling_does_not_rise():
    """For every convex cost; for independent pairs and for pairs whose lines cross."""
    flow = RectifiedFlow(2)
    ends = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, 3.0], [1.0, -2.0]], dtype=torch.float64)
    component = torch.randint(4, (2000,), generator=rng(5))
    for starts in (torch.zeros_like(ends), -ends):
        x0 = starts[component] + normal(2000, 2)
        x1 = ends[component] + 0.2 * normal(2000, 2, seed=1)
        z0, z1 = flow.couple(MixtureSlope(starts, ends, 0.2), x0=x0, batch_size=2000)
        assert torch.equal(z0, x0)
        for power in (1.0, 1.5, 2.0, 4.0):
            assert transport_cost(z0, z1, power) <= transport_cost(x0, x1, power)
        torch.testing.assert_close(z1.mean(0), x1.mean(0), rtol=0, atol=0.2)  # the law is kept
        torch.testing.assert_close(z1.T.cov(), x1.T.cov(), rtol=0, atol=0.5)


def test_transport_cost_is_its_formula():
    x0, x1 = normal(7, 2, 3), normal(7, 2, 3, seed=1)
    each = [np.linalg.norm((b - a).numpy().ravel()) for a, b in zip(x0, x1, strict=True)]
    assert abs(transport_cost(x0, x1) - np.mean(np.square(each))) < 1e-12
    assert abs(transport_cost(x0, x1, 1) - np.mean(each)) < 1e-12
    largest = transport_cost(x0, x1, lambda d: d.abs().flatten(1).amax(1))
    assert abs(largest - (x1 - x0).abs().flatten(1).amax(1).mean()) < 1e-12


def test_reflow_leaves_increasing_pairs_of_a_line_unchanged():
    """Pairs that do not cross are a fixed point, as long as they stay paired."""
    flow = RectifiedFlow(1)
    first = PairsSlope()
    first.z0 = torch.linspace(-4, 4, 40, dtype=torch.float64)
    first.z1 = first.z0 + torch.sin(first.z0) * 0.9 + 2
    given = []

    def fit(net, z0, z1):
        given.append((net, z0, z1))
        return PairsSlope(z0, z1)

    x0 = normal(50, 1).clamp(-3.9, 3.9)
    nets = reflow(flow, first, fit, n_pairs=50, rounds=2, x0=x0)
    assert len(nets) == 2
    assert [len(z0) for _, z0, _ in given] == [50, 50]
    assert given[0][0] is not first
    assert torch.equal(given[0][0].z1, first.z1)  # a copy of its predecessor
    assert given[1][0] is not nets[0]
    _, z1 = flow.couple(first, x0=x0)
    for net in nets:
        torch.testing.assert_close(flow.couple(net, x0=x0)[1], z1, rtol=0, atol=1e-4)
        torch.testing.assert_close(flow.sample(net, x0=x0, n_steps=1), z1, rtol=0, atol=1e-4)


def test_reflow_draws_each_round_anew():
    starts = []
    net = GaussianSlope(torch.zeros(2), 1.0)
    reflow(
        RectifiedFlow(2),
        net,
        lambda net, z0, z1: starts.append(z0) or net,
        n_pairs=5,
        rounds=2,
        generator=rng(),
    )
    assert starts[0].shape == (5, 2)
    assert not torch.equal(*starts)


def test_rotating_source_and_network_rotates_the_samples():
    turn, _ = torch.linalg.qr(normal(2, 2))
    ends = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    net, x0, flow = MixtureSlope(0 * ends, ends, 0.5), normal(20, 2), RectifiedFlow(2)
    turned = MixtureSlope(0 * ends, ends @ turn.T, 0.5)
    for method in ("euler", "heun", "rk45"):
        plain = flow.sample(net, x0=x0, method=method, rtol=1e-7, atol=1e-7)
        again = flow.sample(turned, x0=x0 @ turn.T, method=method, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(again, plain @ turn.T, rtol=0, atol=1e-5)


def test_one_generator_gives_the_same_bytes(gaussian):
    flow, net, _ = gaussian
    for draw in (
        lambda seed: flow.sample(net, 9, generator=rng(seed)),
        lambda seed: flow.couple(net, 9, generator=rng(seed))[1],
        lambda seed: flow.loss(net, M.expand(9, 3), generator=rng(seed)),
        lambda seed: flow.log_prob(
            lambda x, t: x.cumsum(1),
            M.expand(9, 3),
            method="heun",
            n_steps=5,
            divergence="hutchinson",
            generator=rng(seed),
        ),
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("method", ["euler", "heun", "rk45"])
def test_couple_does_not_depend_on_the_batch_size(gaussian, method):
    flow, net, x0 = gaussian
    label = torch.arange(64.0, dtype=torch.float64)[:, None]

    def with_label(x, t, label):
        return net(x, t) + label

    options = {"x0": x0, "method": method, "n_steps": 20, "cond": {"label": label}}
    _, whole = flow.couple(with_label, batch_size=64, **options)
    _, parts = flow.couple(with_label, batch_size=20, **options)
    if method == "rk45":
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(parts, whole)
    assert not whole.requires_grad


def test_source_of_ones_own_is_used_in_the_dtype_of_the_data():
    flow = RectifiedFlow(2, source=lambda n, generator: torch.full((n, 2), 7.0))
    seen = []

    def net(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    flow.loss(net, torch.full((4, 2), 7.0, dtype=torch.float64))
    assert seen[0].dtype == torch.float64
    torch.testing.assert_close(seen[0], torch.full((4, 2), 7.0, dtype=torch.float64))
    assert torch.equal(flow.sample(net, 3), torch.full((3, 2), 7.0))


def test_samples_take_the_dtype_of_the_network_unless_starts_are_given():
    flow = RectifiedFlow(2)
    double = GaussianSlope(torch.zeros(2), 1.0).double()
    assert flow.sample(double, 3).dtype == torch.float64
    assert flow.sample(double.float(), x0=normal(3, 2)).dtype == torch.float64
    assert flow.sample(lambda x, t: x, 3).dtype == torch.get_default_dtype()
