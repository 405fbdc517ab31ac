"""Constrained bridges: means by quadrature, laws known in closed form, members whatever the network."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import nn

from posterity.generative import Categorical, ConstrainedBridge, Grid, Interval, Points, Product
from posterity.testing import check_generative

F64 = torch.float64
CLOUD = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5], [-2.0, 0.3, 0.1], [1.0, 1.0, 1.0]], dtype=F64)
MIXED = [Interval(-1.0, 1.0), Categorical(3), Grid(torch.arange(4.0)), Categorical(2), Points(CLOUD), Interval(0.0),
         Grid(torch.tensor([0.0, 5.0])), Interval()]  # fmt: skip
DOMAINS = {
    "interval": Interval(-1.0, 1.0),
    "half line": Interval(0.0),
    "other half": Interval(high=torch.tensor([0.0, 1.0, 2.0])),
    "line": Interval(),
    "grid": Grid(torch.tensor([-1.0, 0.2, 3.0])),
    "levels": Grid(torch.linspace(-1, 1, 256)),
    "points": Points(CLOUD),
    "classes": Categorical(3),
    "product": Product(MIXED),
}
SCHEDULES = ("exp", "linear", "inverse-exp", "constant")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=F64, generator=rng(seed))


def zero(x, t):
    return torch.zeros_like(x)


class Tilt(nn.Module):
    """A constant tilt."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self, x, t):
        return self.value.expand_as(x)


@pytest.fixture(params=DOMAINS)
def domain(request):
    return DOMAINS[request.param]


def size(domain):
    return max(domain.dim, 3)


def test_conforms_to_its_kind(as_a_user):
    """A tilt by log p from the zero point, from where all corners are as far, ends with the law p."""
    p = torch.tensor([0.5, 0.3, 0.2])
    target = torch.eye(3)[torch.multinomial(p, 200, replacement=True, generator=rng())]
    std = (p * (1 - p)).sqrt()
    check_generative(
        ConstrainedBridge(Categorical(3), 3), Tilt(p.log()), target, mean=p, std=std, atol=0.04, n_steps=10
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_force_and_target_add_up_to_the_bridge_to_the_data(domain, schedule):
    bridge = ConstrainedBridge(domain, size(domain), schedule=schedule)
    z, x1 = 2 * normal(50, size(domain)), domain.project(normal(50, size(domain), seed=1))
    t = torch.rand(50, dtype=F64, generator=rng()) * 0.99
    left = (bridge.beta(torch.ones_like(t)) - bridge.beta(t))[:, None]
    total = bridge.singular_force(z, t) + bridge.target(z, t, x1)
    torch.testing.assert_close(total, bridge.sigma2(t)[:, None] * (x1 - z) / left, rtol=1e-9, atol=1e-10)


def test_force_is_the_gradient_of_log_h(domain):
    bridge = ConstrainedBridge(domain, size(domain))
    z = (3 * normal(200, size(domain))).requires_grad_()
    t = torch.rand(200, dtype=F64, generator=rng())
    left = (bridge.beta(torch.ones_like(t)) - bridge.beta(t))[:, None]
    log_h = domain.log_h(z, left)
    assert log_h.shape == (200,)
    (slope,) = torch.autograd.grad(log_h.sum(), z)
    torch.testing.assert_close(
        bridge.sigma2(t)[:, None] * slope, bridge.singular_force(z.detach(), t), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, math.inf), (-math.inf, 0.5), (2.0, 2.001)])
def test_mean_and_mass_of_an_interval_are_integrals(ends):
    low, high = ends
    for z in (-6.0, -1.0, 0.0, 0.7, 4.0):
        for std in (0.3, 5.0):
            peak = min(max(z, low), high)  # the density is taken relative to its largest value
            span = (max(low, peak - 40 * std), min(high, peak + 40 * std))

            def density(x, z=z, std=std, peak=peak):
                return math.exp(((peak - z) ** 2 - (x - z) ** 2) / (2 * std**2))

            options = {"epsabs": 1e-12, "epsrel": 1e-9, "points": [peak], "limit": 200}
            mass = quad(density, *span, **options)[0]
            mean = peak + quad(lambda x, f=density, p=peak: (x - p) * f(x), *span, **options)[0] / mass
            args = torch.tensor([z], dtype=F64), torch.tensor(std**2, dtype=F64)
            assert abs(float(Interval(low, high).endpoint_mean(*args)) - mean) < 1e-6
            log_mass = math.log(mass / (std * math.sqrt(2 * math.pi))) - (peak - z) ** 2 / (2 * std**2)
            assert abs(float(Interval(low, high).log_h(*args)) - log_mass) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_interval_holds_far_outside(dtype):
    """At A deviations from its end a half-line's mean is 1 / A - 2 / A^3 + 10 / A^5 deviations inside."""
    for away in (20.0, 40.0, 1e3, 1e6):
        inside = 1 / away - 2 / away**3 + 10 / away**5
        z = torch.tensor([-away, away], dtype=dtype, requires_grad=True)
        mean = Interval(torch.tensor([0.0, -math.inf]), torch.tensor([math.inf, 0.0])).endpoint_mean(
            z, torch.ones((), dtype=dtype)
        )
        expected = torch.tensor([inside, -inside], dtype=dtype)
        assert (mean * expected >= 0).all()
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=2 * away * torch.finfo(dtype).eps)
        (slope,) = torch.autograd.grad(mean.sum(), z)
        assert torch.isfinite(slope).all()
        both = Interval(-1.0, 1.0).endpoint_mean(z, torch.ones((), dtype=dtype))
        assert (both.abs() <= 1).all()
        assert (both.sign() == z.sign()).all()


def test_whole_line_has_no_force_and_its_target_is_the_point_bridges():
    bridge, z, x1, t = (
        ConstrainedBridge(Interval(), 2),
        normal(5, 2),
        normal(5, 2, seed=1),
        torch.full((5,), 0.4),
    )
    assert (bridge.singular_force(z, t.double()) == 0).all()
    left = math.exp(-3 * 0.4) - math.exp(-3)
    expected = 3 * math.exp(-3 * 0.4) / left * (x1 - z)
    torch.testing.assert_close(bridge.target(z, t.double(), x1), expected, rtol=1e-6, atol=0)


def agree(first, second, z, var):
    torch.testing.assert_close(first.endpoint_mean(z, var), second.endpoint_mean(z, var), rtol=0, atol=1e-10)
    torch.testing.assert_close(first.log_h(z, var), second.log_h(z, var), rtol=1e-10, atol=1e-10)
    assert torch.equal(first.project(z), second.project(z))


@pytest.mark.parametrize("var", [2.0, 0.1, 1e-4])
def test_special_cases_are_each_other(var):
    var = torch.full((40, 1), var, dtype=F64)
    agree(Points(torch.eye(4)), Categorical(4), normal(40, 4), var)
    for values in (torch.tensor([-1.0, 0.3, 4.0]), torch.linspace(-2, 2, 200)):  # the second in a window
        agree(Points(values[:, None]), Grid(values), 2 * normal(40, 1), var)
    far = Grid(torch.arange(40.0) + 1e6)
    assert torch.equal(far.project(far.values.float()), far.values.float())
    mid = Points(torch.tensor([[0.7]], dtype=F64)).endpoint_mean(normal(40, 1), var)
    narrow = Interval(0.7 - 1e-9, 0.7 + 1e-9).endpoint_mean(normal(40, 1), var)
    torch.testing.assert_close(narrow, mid, rtol=0, atol=1e-8)


def test_product_acts_column_by_column():
    product, z = DOMAINS["product"], 2 * normal(30, 13)
    var = torch.rand(30, 1, dtype=F64, generator=rng()) + 0.01
    start, log_h = 0, torch.zeros(30, dtype=F64)
    for factor in MIXED:
        own = slice(start, start := start + factor.dim)
        torch.testing.assert_close(
            product.endpoint_mean(z, var)[:, own], factor.endpoint_mean(z[:, own], var)
        )
        assert torch.equal(product.project(z)[:, own], factor.project(z[:, own]))
        log_h += factor.log_h(z[:, own], var)
    torch.testing.assert_close(product.log_h(z, var), log_h)
    nested = Product([Product(MIXED[:3]), *MIXED[3:]])
    assert torch.equal(nested.endpoint_mean(z, var), product.endpoint_mean(z, var))


@pytest.mark.parametrize("var", [0.5, 1e-3])
def test_a_mean_is_that_of_the_posterior_over_members(var):
    """By brute force over members, with a variance of each column's own."""
    spread = var * torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    for domain, members in ((Points(CLOUD), CLOUD), (Categorical(3), torch.eye(3, dtype=F64))):
        z = normal(20, 3)
        logs = -((z[:, None] - members).square() / (2 * spread)).sum(2)
        expected = logs.softmax(1) @ members
        torch.testing.assert_close(domain.endpoint_mean(z, spread), expected, rtol=0, atol=1e-10)


def test_nearest_members_and_ties(domain):
    z = 3 * normal(50, size(domain))
    member = domain.project(z)
    assert domain.contains(member).all()
    torch.testing.assert_close(domain.project(member), member, rtol=0, atol=0)
    gone = domain.endpoint_mean(z, torch.zeros((), dtype=F64))
    torch.testing.assert_close(gone, member, rtol=0, atol=1e-5)
    assert domain.project(z * math.nan).isnan().all()
    assert not domain.contains(z * math.nan).any()


def test_ties_go_to_the_lowest_index():
    assert Categorical(3).project(torch.zeros(3)).tolist() == [1, 0, 0]
    assert Grid(torch.tensor([0.0, 1.0, 2.0])).project(torch.tensor([0.5, 1.5])).tolist() == [0, 1]
    assert Points(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).project(torch.zeros(2)).tolist() == [1, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_beta_is_the_integral_of_sigma2_and_interpolation_has_its_moments(schedule):
    bridge = ConstrainedBridge(Interval(), 1, schedule=schedule, a=2.0, b=0.7, c=0.2)
    at = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=F64)
    beta = bridge.beta(at)
    for t, found in zip(at.tolist(), beta.tolist(), strict=True):
        area = quad(lambda s: float(bridge.sigma2(torch.tensor([s], dtype=F64))), 0, t)[0]
        assert abs(found - area) < 1e-8
    assert beta[0] == 0
    x0, x1, n = torch.full((1, 1), -1.0, dtype=F64), torch.full((1, 1), 2.0, dtype=F64), 40_000
    for k in (1, 2):
        share = float(beta[k] / beta[3])
        z = bridge.interpolate(x0.expand(n, 1), x1.expand(n, 1), at[k].expand(n), generator=rng())
        var = float(beta[k]) * (1 - share)
        assert abs(z.mean() - (-1 + 3 * share)) < 4 * math.sqrt(var / n)
        assert abs(z.var() / var - 1) < 0.04
    ends = bridge.interpolate(x0.expand(2, 1), x1.expand(2, 1), torch.tensor([0.0, 1.0], dtype=F64))
    torch.testing.assert_close(ends.flatten(), torch.tensor([-1.0, 2.0], dtype=F64))


def test_underscore_names_the_same_schedule():
    t = torch.linspace(0, 1, 5)
    first, second = (ConstrainedBridge(Interval(), 1, schedule=f"inverse{mark}exp") for mark in "-_")
    assert torch.equal(first.beta(t), second.beta(t))


def test_zero_network_ends_in_each_class_as_often():
    bridge = ConstrainedBridge(Categorical(4), 4)
    raw = bridge.sample(zero, 4000, n_steps=50, project=False, generator=rng())
    assert (raw - Categorical(4).project(raw)).norm(dim=1).max() < 1e-3
    counts = Categorical(4).project(raw).sum(0)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


@pytest.mark.parametrize("method", ["bridge", "euler"])
def test_any_bounded_network_ends_in_the_domain(domain, method):
    bridge = ConstrainedBridge(domain, size(domain))
    n_steps = 200 if method == "bridge" else 20
    options = {"n_steps": n_steps, "method": method, "generator": rng()}
    raw = bridge.sample(lambda x, t: 5 * x.sin(), 50, project=False, **options)
    made = domain.project(raw)
    assert domain.contains(made).all()
    if method == "bridge":
        assert ((raw - made).norm(dim=1) < 0.05).float().mean() >= 0.99


@pytest.mark.parametrize("parametrization", ["drift", "force", "tilt"])
def test_exact_drift_of_a_known_law_reproduces_it(parametrization):
    """The drift is the target at the posterior mean over the atoms."""
    p, n = torch.tensor([0.6, 0.1, 0.2, 0.1]), 4000 if parametrization == "drift" else 2000
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    bridge = ConstrainedBridge(Points(points), 2, parametrization=parametrization)

    def net(z, t):
        left = (bridge.beta(torch.ones_like(t)) - bridge.beta(t))[:, None]
        all_left = float(bridge.beta(torch.ones(1)))
        logs = -(z[:, None] - points).square().sum(2) / (2 * left) + points.square().sum(1) / (2 * all_left)
        mean = (logs + p.log()).softmax(1) @ points
        u = bridge.target(z, t, mean)
        return u if parametrization == "drift" else u / bridge.sigma2(t).sqrt()[:, None]

    if (
        parametrization == "tilt"
    ):  # <l, x> over these points is log p and what the zero point's distance lacks
        wanted = p.log() + points.square().sum(1) / (2 * (1 - math.exp(-3)))
        tilt = torch.linalg.lstsq(points[1:3], (wanted[1:3] - wanted[0])[:, None]).solution[:, 0]
        p = (points @ tilt - points.square().sum(1) / (2 * (1 - math.exp(-3)))).softmax(0)
        net = Tilt(tilt)
    made = bridge.sample(net, n, n_steps=100 if parametrization == "drift" else 50, generator=rng())
    frequency = (made[:, None] == points).all(2).float().mean(0)
    assert (frequency - p).abs().sum() / 2 < 0.05


@pytest.mark.parametrize("method", ["bridge", "euler"])
def test_tilted_law_on_an_interval_is_its_density(method):
    """From 0 the outcome has density exp(l x) N(x; 0, beta_1) on [-1, 1], up to a constant."""
    bridge, tilt, beta = ConstrainedBridge(Interval(-1.0, 1.0), 1), 1.5, 1 - math.exp(-3)
    law = stats.truncnorm(
        (-1 - beta * tilt) / beta**0.5, (1 - beta * tilt) / beta**0.5, beta * tilt, beta**0.5
    )
    n_steps = 60 if method == "bridge" else 150
    made = bridge.sample(Tilt(torch.tensor([tilt])), 3000, n_steps=n_steps, method=method, generator=rng())
    assert abs(made.mean() - law.mean()) < 0.03
    assert abs(made.std() - law.std()) < 0.03


def test_one_step_goes_to_the_predicted_outcome_and_the_path_has_all_states():
    bridge, x0 = ConstrainedBridge(Categorical(3), 3, b=2.0), normal(7, 3)
    tilt = torch.tensor([1.0, 0.0, -2.0], dtype=F64)
    made, path = bridge.sample(Tilt(tilt), x0=x0, n_steps=1, project=False, return_path=True)
    torch.testing.assert_close(made, (x0 / (2 * (1 - math.exp(-3))) + tilt).softmax(1))
    assert torch.equal(path, torch.stack([x0, made]))
    made, path = bridge.sample(zero, x0=x0, n_steps=9, return_path=True, generator=rng())
    assert path.shape == (10, 7, 3)
    torch.testing.assert_close(Categorical(3).project(path[-1]), made)
    assert torch.equal(made, bridge.sample(zero, x0=x0, n_steps=9, generator=rng()))


@pytest.mark.parametrize(("method", "n_steps", "slack"), [("bridge", 4, 0.05), ("euler", 100, 0.08)])
def test_paths_to_a_single_point_are_those_of_the_bridge(method, n_steps, slack):
    """There the predicted outcome never moves, so that a few steps of the bridge are exact at every time."""
    bridge, n = ConstrainedBridge(Points(torch.tensor([[2.0]])), 1, b=1.5), 10_000
    _, path = bridge.sample(zero, n, n_steps=n_steps, method=method, return_path=True, generator=rng())
    for t in (0.25, 0.5, 0.75):
        beta, total = (1.5 * (1 - math.exp(-3 * s)) for s in (t, 1.0))
        at = path[round(t * n_steps), :, 0]
        assert abs(at.mean() / (2 * beta / total) - 1) < slack
        assert abs(at.var() / (beta * (1 - beta / total)) - 1) < slack


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("parametrization", ["drift", "force", "tilt"])
def test_loss_is_its_formula(parametrization, reduction):
    """Between u and the target where the network looked; for "force" between u and target over sigma."""
    domain, seen = DOMAINS["product"], []
    bridge = ConstrainedBridge(domain, 13, parametrization=parametrization)

    def net(x, t):
        seen[:] = [x, t]
        return torch.sin(x)

    x1 = domain.project(normal(20, 13))
    found = bridge.loss(net, x1, reduction=reduction, generator=rng())
    z, t = seen
    error = bridge.drift(net, z, t) - bridge.target(z, t, x1)
    if parametrization == "force":
        error = error / bridge.sigma2(t).sqrt()[:, None]
    each = error.square()
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each.mean(1)}[reduction]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_loss_draws_times_up_to_t_max_and_states_of_the_bridge():
    seen, n = {}, 20_000
    bridge = ConstrainedBridge(Interval(), 1, schedule="constant", t_max=0.5)
    bridge.loss(lambda x, t: seen.update(x=x, t=t) or 0 * x, torch.full((n, 1), 3.0), generator=rng())
    t, x = seen["t"], seen["x"][:, 0]
    assert 0 <= t.min() < 0.01 < 0.49 < t.max() <= 0.5
    noise = (x - 3 * t) / (t * (1 - t)).sqrt()
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_columns_and_classes_may_stand_in_any_order():
    """Drift and loss of permuted columns are the permuted ones, where weights are permuted likewise."""
    order = torch.tensor([3, 1, 2, 0])
    first = ConstrainedBridge(Product([Interval(-1.0, 1.0), Categorical(3)]), 4)
    second = ConstrainedBridge(Product([Categorical(3), Interval(-1.0, 1.0)]), 4)
    weights, z, t = normal(4, 4), normal(9, 4, seed=1), torch.full((9,), 0.3, dtype=F64)
    u = first.drift(lambda x, t: x @ weights, z, t)
    moved = second.drift(lambda x, t: x @ weights[order][:, order], z[:, order], t)
    torch.testing.assert_close(moved, u[:, order])


def test_sources_starts_and_conditions_are_used():
    bridge = ConstrainedBridge(Interval(), 2, source=lambda n, generator: torch.full((n, 2), 7.0))
    seen = []

    def net(x, t, y):
        seen.append((x, t, y))
        return 0 * x

    bridge.sample(net, 3, n_steps=2, cond={"y": torch.arange(3)})
    assert (seen[0][0] == 7).all()
    assert [call[1].tolist() for call in seen] == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert seen[1][2].tolist() == [0, 1, 2]
    x0 = torch.tensor([[1.0, 2.0]])
    bridge.loss(lambda x, t: seen.append(x) or 0 * x, 0 * x0, x0, t=torch.zeros(1))
    assert torch.equal(seen[-1], x0)


def test_grids_of_images_act_on_every_pixel():
    levels = Grid(torch.linspace(-1, 1, 256))
    bridge = ConstrainedBridge(levels, (3, 4, 4))
    made = bridge.sample(zero, 2, n_steps=5, generator=rng())
    assert made.shape == (2, 3, 4, 4)
    steps = (made + 1) * 127.5
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert bridge.loss(zero, made).isfinite()


ROW = Product([Interval(0.0, 1.0), Categorical(3)])
X, T = torch.tensor([[0.5, 1.0, 0.0, 0.0]] * 5), torch.full((5,), 0.5)
BRIDGE = ConstrainedBridge(ROW, 4)
OFF = torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Interval(1.0, 1.0), "low must be below high, got 1 and 1"),
        (lambda: Interval(math.nan), "low must be below high, got nan and inf"),
        (lambda: Interval("0"), "low must be a number or a tensor of them, got '0'"),
        (lambda: Interval(torch.zeros(2), torch.ones(3)), "low and high must broadcast to each other"),
        (lambda: Grid(torch.tensor([0.0, 2.0, 1.0])), "values must be in strictly increasing order, got 2 before 1"),
        (lambda: Grid(torch.tensor([0.0, 0.0])), "strictly increasing order, got 0 before 0"),
        (lambda: Grid(torch.tensor([0.0, math.inf])), "values must be finite"),
        (lambda: Grid([0.0, 1.0]), "values must be a tensor of numbers, got list"),
        (lambda: Grid(torch.zeros(0)), "values must hold at least one number"),
        (lambda: Points(torch.zeros(2, 3)), r"points must be all different, got \[0.0, 0.0, 0.0\] 2 times"),
        (lambda: Points(torch.zeros(3)), r"points must have shape \(any, any\)"),
        (lambda: Categorical(1), "n_classes must be an integer of at least 2, got 1"),
        (lambda: Product([]), "factors must be a sequence of at least one domain"),
        (lambda: Product([3]), "factors must be domains such as Interval and Categorical, got 3"),
        (lambda: Product([Interval(torch.zeros(2))]), "factors must have one column each where they are intervals"),
        (lambda: ROW.project(torch.zeros(2, 3)), r"z must have 4 columns .* got 3: .* factor 1, Categorical\(3\)"),
        (lambda: ROW.project(torch.zeros(2, 6)), r"z must have 4 columns .* got 6: they go on behind factor 1"),
        (lambda: ROW.endpoint_mean(X, torch.zeros(4, 1)), r"var must be broadcastable to \(5, 4\) of z, got \(4, 1\)"),
        (lambda: ROW.log_h(X, torch.tensor(-1.0)), "var must be at least 0, got values down to -1"),
        (lambda: ROW.project(X.long()), "z must be a floating-point tensor, got dtype torch.int64"),
        (lambda: ROW.contains(X, -1.0), "atol must be at least 0, got -1.0"),
        (lambda: Categorical(3).project(X), r"z must have a last axis of 3 columns for Categorical\(3\), got \(5, 4\)"),
        (lambda: ConstrainedBridge("line", 3), "domain must be one such as Interval or Categorical, got 'line'"),
        (lambda: ConstrainedBridge(ROW, (2, 5)), r"shape must have 4 columns .* got 5"),
        (lambda: ConstrainedBridge(ROW, ()), "shape must have at least one dimension"),
        (lambda: ConstrainedBridge(ROW, 4, schedule="cosine"), "schedule must be one of 'exp', .* got 'cosine'"),
        (lambda: ConstrainedBridge(ROW, 4, a=0.0), r"a must be in \(0, 50\], got 0.0"),
        (lambda: ConstrainedBridge(ROW, 4, b=-1.0), "b must be in .* got -1.0"),
        (lambda: ConstrainedBridge(ROW, 4, c=-0.1), "c must be at least 0, got -0.1"),
        (lambda: ConstrainedBridge(ROW, 4, t_max=1.0), r"t_max must be in \(0, 1\), got 1.0"),
        (lambda: ConstrainedBridge(ROW, 4, parametrization="score"), "parametrization must be one of"),
        (lambda: ConstrainedBridge(ROW, 4, source=3), "source must be a callable"),
        (lambda: BRIDGE.loss(zero, OFF), r"x1 must be in the domain .*, got 0.5 in column 1 of row 1"),
        (lambda: BRIDGE.loss(zero, X * math.nan), "x1 must be in the domain .*, got nan in column 0 of row 0"),
        (lambda: BRIDGE.loss(zero, X[:0]), r"x1 must have samples, got shape \(0, 4\)"),
        (lambda: BRIDGE.loss(zero, X.long()), "x1 .* got dtype torch.int64: one-hot or cast to float"),
        (lambda: BRIDGE.loss(zero, X[:, :3]), r"x1 must have shape \(any, 4\) for shape, got \(5, 3\)"),
        (lambda: BRIDGE.loss(zero, X, X[:3]), r"x0 must have shape \(5, 4\) for x1, got \(3, 4\)"),
        (lambda: BRIDGE.loss(zero, X, t=2 * T), r"t must be in \[0, 1\), got 1: the force is infinite"),
        (lambda: BRIDGE.loss(zero, X, t=4 * T), r"t must be in \[0, 1\], got values in \[2, 2\]"),
        (lambda: BRIDGE.loss(zero, X, reduction="max"), "reduction must be one of"),
        (lambda: BRIDGE.loss(lambda x, t: x[:, :1], X), r"net\(x, t\) must have shape \(5, 4\) for x"),
        (lambda: BRIDGE.loss(zero, X, cond={"y": T[:3]}), r"cond\['y'\] must have first dimension 5"),
        (lambda: BRIDGE.target(X, 2 * T, X), r"t must be in \[0, 1\), got 1"),
        (lambda: BRIDGE.target(X, T, X[:3]), r"x1 must have shape \(5, 4\) for z, got \(3, 4\)"),
        (lambda: BRIDGE.singular_force(X, 2 * T), r"t must be in \[0, 1\), got 1"),
        (lambda: BRIDGE.beta(4 * T), r"t must be in \[0, 1\], got values in \[2, 2\]"),
        (lambda: BRIDGE.interpolate(X, X, T, noise=X[:2]), r"noise must have shape \(5, 4\)"),
        (lambda: BRIDGE.sample(zero), "exactly one of n and x0 must be given, got neither"),
        (lambda: BRIDGE.sample(zero, 2, x0=X), "exactly one of n and x0 must be given, got both"),
        (lambda: BRIDGE.sample(zero, 2, n_steps=0), "n_steps must be an integer of at least 1, got 0"),
        (lambda: BRIDGE.sample(zero, 2, method="heun"), "method must be one of 'bridge', 'euler', got 'heun'"),
        (
            lambda: ConstrainedBridge(ROW, 4, source=lambda n, g: torch.zeros(n, 3)).sample(zero, 2),
            r"source must have shape \(2, 4\) for shape, got \(2, 3\)",
        ),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_half_precision_computes_wide_and_autocast_changes_nothing():
    z = normal(20, 13).float()
    product, var = DOMAINS["product"], torch.tensor(0.05)
    exact = product.endpoint_mean(z, var)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product.endpoint_mean(z, var), exact)
    narrow = z.bfloat16()
    found = product.endpoint_mean(narrow, var)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, product.endpoint_mean(narrow.float(), var).bfloat16())
    assert np.isfinite(exact.numpy()).all()
