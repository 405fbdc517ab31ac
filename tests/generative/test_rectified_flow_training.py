"""Rectified flow's losses by their formulas and minima, its paths by their derivatives, and what is refused."""

import math

import pytest
import torch
from torch import nn

from posterity.generative import RectifiedFlow, reflow, straightness, transport_cost

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


@pytest.fixture
def gaussian():
    return RectifiedFlow(3), GaussianSlope(M, S), normal(64, 3)


@pytest.mark.parametrize("shape", [3, (2, 4), (1, 2, 2)])
def test_loss_is_its_formula(shape):
    size = (shape,) if isinstance(shape, int) else shape
    x0, x1 = normal(6, *size), normal(6, *size, seed=1)
    t = torch.rand(6, dtype=torch.float64, generator=rng(2))
    flow, net = RectifiedFlow(shape), lambda x, t: torch.sin(x) * t.view(-1, *[1] * len(size))
    weight = t.view(-1, *[1] * len(size))
    each = (net(weight * x1 + (1 - weight) * x0, t) - (x1 - x0)) ** 2
    torch.testing.assert_close(flow.loss(net, x1, x0, t=t), each.mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(flow.loss(net, x1, x0, t=t, reduction="sum"), each.sum(), rtol=1e-14, atol=0)
    rows = flow.loss(net, x1, x0, t=t, reduction="none")
    torch.testing.assert_close(rows, each.flatten(1).mean(1), rtol=1e-14, atol=0)


def test_loss_draws_noise_and_uniform_times_for_each_sample():
    seen = {}

    def net(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    n = 20_000
    RectifiedFlow(1).loss(net, torch.full((n, 1), 5.0), generator=rng())
    t, x0 = seen["t"], (seen["x"][:, 0] - 5 * seen["t"]) / (1 - seen["t"])
    assert t.shape == (n,)
    assert abs(torch.corrcoef(torch.stack([t, x0]))[0, 1]) < 0.05
    assert torch.histc(t, 10, 0, 1).sub(n / 10).abs().max() < 5 * math.sqrt(n / 10)
    assert abs(x0.median()) < 0.05
    assert abs(x0.clamp(-2, 2).std() - 0.9596) < 0.03  # a normal law, winsorised at 2


def test_exact_slope_minimises_the_loss(gaussian):
    """The gradient of the loss vanishes there, up to the spread of its samples."""
    flow, net, _ = gaussian
    x1 = M + S * normal(20_000, 3, seed=3)
    (grad,) = torch.autograd.grad(flow.loss(net, x1, generator=rng()), [net.mean])
    assert grad.abs().max() < 0.02
    wrong = GaussianSlope(M + 0.3, S)
    (grad,) = torch.autograd.grad(flow.loss(wrong, x1, generator=rng()), [wrong.mean])
    assert grad.min() > 0.05


def test_one_step_distillation_is_the_loss_at_time_zero(gaussian):
    flow, net, x0 = gaussian
    x1 = normal(64, 3, seed=1)
    plain = flow.loss(net, x1, x0, t=torch.zeros(64, dtype=torch.float64))
    torch.testing.assert_close(flow.distill_loss(net, x1, x0), plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        flow.distill_loss(net, x1, x0, distance=lambda pred, target: (pred - target).square().mean(1)), plain
    )

    def euler_step(pred, target):
        torch.testing.assert_close(pred, M.expand_as(x0))
        assert torch.equal(target, x1)
        return pred.new_zeros(64)

    assert flow.distill_loss(net, x1, x0, distance=euler_step) == 0


def test_distillation_trains_at_the_times_of_euler_steps_only():
    seen = []
    x0, x1 = normal(500, 2), normal(500, 2, seed=1)

    def net(x, t):
        seen.append(t)
        torch.testing.assert_close(x, x0 + t[:, None] * (x1 - x0))
        return x1 - x0

    assert RectifiedFlow(2).distill_loss(net, x1, x0, n_steps=4, generator=rng()) == 0
    times, counts = seen[0].unique(return_counts=True)
    assert times.tolist() == [0, 0.25, 0.5, 0.75]
    assert (counts - 125).abs().max() < 50


@pytest.mark.parametrize("path", ["linear", "vp", "sub-vp"])
def test_velocity_is_the_derivative_of_the_path(path):
    flow, x0, x1 = RectifiedFlow(2, path=path), normal(9, 2), normal(9, 2, seed=1)
    t = torch.linspace(0, 0.98, 9, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: flow.interpolate(x0, x1, t)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(flow.interpolate(x0, x1, t)[1], slope, rtol=1e-9, atol=1e-9)
    at_one, _ = flow.interpolate(x0, x1, torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(at_one, x1)


def test_curved_paths_weigh_data_and_noise_as_their_diffusions_do():
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    for t in (0.0, 0.3, 0.7):
        time = torch.tensor([t], dtype=torch.float64)
        a = math.exp(-19.9 * (1 - t) ** 2 / 4 - 0.1 * (1 - t) / 2)
        for path, b in {"vp": math.sqrt(1 - a**2), "sub-vp": 1 - a**2}.items():
            flow = RectifiedFlow(1, path=path)
            assert abs(flow.interpolate(zero, one, time)[0] - a) < 1e-14
            assert abs(flow.interpolate(one, zero, time)[0] - b) < 1e-14
    assert abs(math.exp(-19.9 / 4 - 0.05) - 0.0066) < 1e-4


def test_loss_on_the_vp_path_stays_off_its_singular_end():
    flow = RectifiedFlow(1, path="vp")
    latest = []

    def net(x, t):
        latest.append(t.max())
        return torch.zeros_like(x)

    assert flow.loss(net, torch.ones(50_000, 1), generator=rng()).isfinite()
    assert 0.99 < latest[0] <= 1 - 1e-3


def test_loss_trains_a_network_to_the_target():
    """A linear network of x, t and their product has the slope of N(m, 1) in its reach at m."""
    net = nn.Linear(1, 1)
    flow, g = RectifiedFlow(1), rng()
    with torch.no_grad():
        net.weight.zero_()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(200):
        opt.zero_grad()
        x1 = 3 + torch.randn(256, 1, generator=g)
        flow.loss(lambda x, t: net(x), x1, generator=g).backward()
        opt.step()
    assert abs(flow.sample(lambda x, t: net(x), 2000, generator=g).mean() - 3) < 0.3


def zero(x, t):
    return torch.zeros_like(x)


def narrow(x, t):
    return x[:, :1]


X, T = torch.zeros(4, 2), torch.zeros(4)
FLOW = RectifiedFlow(2)
OWN = RectifiedFlow(2, source=lambda n, generator: torch.zeros(n, 3))


def loss(x1=X, x0=None, net=zero, **options):
    return FLOW.loss(net, x1, x0, **options)


def drawn_by(source):
    return RectifiedFlow(2, source=source).loss(zero, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RectifiedFlow(0), "shape must be an integer of at least 1, got 0"),
        (lambda: RectifiedFlow(()), r"shape must have at least one dimension, got \(\)"),
        (lambda: RectifiedFlow(2, path="arc"), "path must be one of 'linear', 'vp', 'sub-vp', got 'arc'"),
        (lambda: RectifiedFlow(2, source=3), r"source must be a callable \(n, generator\), got 3"),
        (
            lambda: drawn_by(lambda n, generator: [[0.0, 0.0]] * n),
            "source must be a floating-point tensor, got list",
        ),
        (lambda: drawn_by(lambda n, generator: X.long()), "source must be .* got dtype torch.int64"),
        (lambda: loss(X[:0]), r"x1 must have samples, got shape \(0, 2\)"),
        (lambda: FLOW.distill_loss(zero, X[:0], X[:0]), r"x1 must have samples, got shape \(0, 2\)"),
        (lambda: loss(torch.zeros(4, 3)), r"x1 must have shape \(any, 2\) for shape, got \(4, 3\)"),
        (lambda: loss(X, X[:3]), r"x0 must have shape \(4, 2\) for x1, got \(3, 2\)"),
        (lambda: FLOW.distill_loss(zero, X, X[:3]), r"x0 must have shape \(4, 2\) for x1, got \(3, 2\)"),
        (lambda: FLOW.interpolate(X, X, T[:3]), r"t must have shape \(4\) for 4 samples, got \(3,\)"),
        (lambda: loss(t=T[:, None]), r"t must have shape \(4\) for 4 samples, got \(4, 1\)"),
        (lambda: loss(t=T + 1.5), r"t must be in \[0, 1\], got values in \[1.5, 1.5\]"),
        (lambda: loss(t=T * math.nan), r"t must be in \[0, 1\]"),
        (lambda: loss(t=T.long()), "t must be a floating-point tensor, got dtype torch.int64"),
        (lambda: loss(X.to(torch.uint8)), "x1 .* got dtype torch.uint8: scale to floats first"),
        (lambda: loss(X, X.long()), "x0 .* got dtype torch.int64: scale to floats first"),
        (lambda: FLOW.sample(zero, x0=X.long()), "x0 .* got dtype torch.int64: scale to floats first"),
        (lambda: FLOW.log_prob(zero, X * math.nan), "x1 must be finite, got NaN or infinity"),
        (lambda: FLOW.couple(zero, x0=X + math.inf), "x0 must be finite, got NaN or infinity"),
        (lambda: loss(net=narrow), r"net\(x, t\) must have shape \(4, 2\) for x, got \(4, 1\)"),
        (lambda: FLOW.sample(narrow, 4), r"net\(x, t\) must have shape \(4, 2\) for x, got \(4, 1\)"),
        (lambda: FLOW.sample(zero), "exactly one of n and x0 must be given, got neither"),
        (lambda: FLOW.sample(zero, 4, x0=X), "exactly one of n and x0 must be given, got both"),
        (lambda: FLOW.couple(zero), "exactly one of n and x0 must be given, got neither"),
        (lambda: FLOW.sample(zero, 0), "n must be an integer of at least 1, got 0"),
        (lambda: FLOW.sample(zero, 4, n_steps=0), "n_steps must be an integer of at least 1, got 0"),
        (lambda: FLOW.distill_loss(zero, X, X, n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: straightness(FLOW, zero, X, n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: FLOW.sample(zero, 4, method="rk4"), "method must be one of 'euler', 'heun', 'rk45', got"),
        (lambda: FLOW.integrate(zero, X, t1=1.5), r"t1 must be in \[0, 1\], got 1.5"),
        (lambda: FLOW.integrate(zero, X, t1=0.0), "t1 must differ from t0, got 0.0 for both"),
        (lambda: FLOW.integrate(zero, X, rtol=0.0), "rtol must be greater than 0, got 0.0"),
        (lambda: loss(reduction="max"), "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        (lambda: FLOW.log_prob(zero, X, divergence="none"), "divergence must be one of .* got 'none'"),
        (lambda: FLOW.distill_loss(zero, X, X, n_steps=2, distance=zero), "n_steps must be 1 .* got 2"),
        (lambda: FLOW.distill_loss(zero, X, X, distance=zero), r"distance must have shape \(4\)"),
        (lambda: OWN.log_prob(zero, X), "source_log_prob must be given with a source of your own, got None"),
        (lambda: OWN.sample(zero, 4), r"source must have shape \(4, 2\) for shape, got \(4, 3\)"),
        (lambda: loss(cond={"y": T[:3]}), r"cond\['y'\] must have first dimension 4, got \(3,\)"),
        (
            lambda: FLOW.couple(zero, x0=X, batch_size=2, cond={"y": T[:2]}),
            r"cond\['y'\] must have first dimension 4, got \(2,\)",
        ),
        (lambda: FLOW.couple(zero, 4, batch_size=0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: reflow(FLOW, zero, zero, n_pairs=4, rounds=0), "rounds must be an integer of at least 1"),
        (lambda: reflow(FLOW, zero, zero, n_pairs=5, x0=X), r"x0 must have shape \(5, 2\) for n_pairs"),
        (lambda: transport_cost(X, X[:3]), r"x1 must have shape \(4, 2\) for x0, got \(3, 2\)"),
        (lambda: transport_cost(X, X, 0.0), "cost must be greater than 0, got 0.0"),
    ],
)
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "field", [lambda x, t: x * torch.nan, lambda x, t: 100 * x**3], ids=["NaN", "blows up"]
)
def test_a_field_that_blows_up_is_said_in_our_words(as_a_user, field):
    with pytest.raises(ValueError, match="the field must stay finite along its paths for method 'rk45'"):
        RectifiedFlow(2).sample(field, 4, method="rk45", generator=torch.Generator().manual_seed(0))
