import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from posterity.optimization import (
    SAM,
    FlowResult,
    alignment,
    limit_flow,
    limiting_sharpness,
    sharpness,
    top_eigenpair,
)

KINDS = ("worst", "ascent", "average")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bowl(d=5, rank=3, seed=0, dtype=torch.float64):
    """Return a singular positive semidefinite matrix, its loss, and its eigenvalues by numpy."""
    root = torch.randn(d, rank, generator=seeded(seed), dtype=torch.float64)
    a = (root @ root.mT).to(dtype)
    return a, lambda x: x @ a @ x / 2, np.linalg.eigvalsh(a.double().numpy())


def test_sharpness_of_a_quadratic_at_its_minimum_is_the_closed_form():
    a, loss, values = bowl()
    x = torch.zeros(5, dtype=torch.float64)
    draw = {"rho": 0.3, "generator": seeded()}
    assert float(sharpness(loss, x, "worst", **draw)) == pytest.approx(0.09 * values[-1] / 2, rel=1e-9)
    assert float(sharpness(loss, x, "average", n_samples=30, **draw)) == pytest.approx(
        0.09 * values.sum() / 10, rel=1e-9
    )
    assert float(sharpness(loss, x, "ascent", **draw)) == 0
    for kind, value in zip(KINDS, (values[-1] / 2, values[2] / 2, values.sum() / 10), strict=True):
        for method in ("exact", "lanczos"):
            got = limiting_sharpness(loss, x, kind, method=method, n_probes=40, generator=seeded())
            assert float(got) == pytest.approx(value, rel=1e-9), (kind, method)


def test_sharpness_away_from_a_minimum_is_the_closed_form():
    a, loss, values = bowl()
    x, rho = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64), 0.7
    g = a @ x
    ascent = rho * g.norm() + rho**2 * (g @ a @ g) / (2 * g @ g)
    torch.testing.assert_close(sharpness(loss, x, "ascent", rho=rho), ascent)
    average = sharpness(loss, x, "average", rho=rho, n_samples=10, generator=seeded())
    assert float(average) == pytest.approx(rho**2 * values.sum() / 10, rel=1e-9)  # the odd part is gone
    # the worst: the greatest over multipliers m of g' (m - rho a)^-1 g solves |v| = 1
    low, high = rho * values[-1] + 1e-9, 1e3
    for _ in range(100):
        m = (low + high) / 2
        v = torch.linalg.solve(m * torch.eye(5, dtype=torch.float64) - rho * a, g)
        low, high = (m, high) if v.norm() > 1 else (low, m)
    truth = loss(x + rho * v) - loss(x)
    for seed in range(2):
        got = sharpness(loss, x, "worst", rho=rho, generator=seeded(seed))
        assert float(got) == pytest.approx(float(truth), rel=1e-7)
    one = sharpness(loss, x, "worst", rho=rho, n_starts=1, generator=seeded())
    assert float(one) == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_worst_direction_in_few_dimensions_is_that_of_a_fine_grid(d):
    def waves(x):
        return torch.sin(3 * x[0] + 1) + sum(torch.cos(5 * x[k] + k) for k in range(d)) + x.sum() ** 2 / 4

    x = torch.linspace(0.2, 0.9, d, dtype=torch.float64)
    line = torch.linspace(-1, 1, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    grid = torch.cat([grid[grid.norm(dim=1) <= 1], grid / grid.norm(dim=1, keepdim=True).clamp_min(1e-9)])
    truth = float((torch.vmap(waves)(x + 1.2 * grid) - waves(x)).max())
    got = float(sharpness(waves, x, "worst", rho=1.2, generator=seeded()))
    assert truth - 1e-9 <= got <= truth + 0.02


def test_a_maximum_inside_the_ball_and_a_maximum_here_count():
    def hill(x):
        return -((x - 0.25) ** 2).sum()

    x = torch.zeros(4, dtype=torch.float64)
    assert float(sharpness(hill, x, "worst", rho=2.0, generator=seeded())) == pytest.approx(0.25)
    assert float(sharpness(hill, x + 0.25, "worst", rho=2.0, generator=seeded())) == 0


def test_the_average_direction_is_that_of_many_directions_of_numpy():
    def quartic(x):
        return (x**4).sum() + x[0] * x[1] ** 2 + x.sum()

    x = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)
    g = np.random.default_rng(0).standard_normal((100_000, 3))
    at = torch.from_numpy(x.numpy() + 0.5 * g / np.linalg.norm(g, axis=1, keepdims=True))
    rises = torch.vmap(quartic)(at) - quartic(x)
    got = sharpness(quartic, x, "average", rho=0.5, n_samples=6_000, generator=seeded())
    assert float(got) == pytest.approx(
        float(rises.mean()), abs=4 * float(rises.std()) / math.sqrt(100_000) + 0.004
    )


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    names = dict(net.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in names.values()])
        state = {name: part.view_as(p) for (name, p), part in zip(names.items(), parts, strict=True)}
        return (torch.func.functional_call(net, state, (x,)).squeeze(1) - y).square().mean()

    return loss, nn.utils.parameters_to_vector(net.parameters()).detach()


def test_the_top_of_a_networks_hessian_is_scipys():
    loss, x = network()
    hessian = torch.autograd.functional.hessian(loss, x).numpy()
    values, vectors = eigsh(hessian, k=1, which="LA")
    for method in ("exact", "lanczos"):
        value, vector = top_eigenpair(loss, x, method=method, generator=seeded())
        assert float(value) == pytest.approx(values[0], rel=1e-8)
        np.testing.assert_allclose(np.abs(vector.numpy()), np.abs(vectors[:, 0]), atol=1e-6)
        assert vector[vector.abs().argmax()] > 0
        worst = limiting_sharpness(loss, x, "worst", method=method, generator=seeded())
        assert float(worst) == pytest.approx(values[0] / 2, rel=1e-8)
    g = torch.autograd.functional.jacobian(loss, x).numpy()
    cosine = abs(g @ vectors[:, 0]) / np.linalg.norm(g)
    assert 0.1 < cosine < 0.999
    assert float(alignment(loss, x)) == pytest.approx(cosine, rel=1e-6)
    trace = limiting_sharpness(loss, x, "average", method="lanczos", n_probes=len(x), generator=seeded())
    assert float(trace) == pytest.approx(hessian.trace() / (2 * len(x)), rel=1e-8)


def test_alignment_is_not_led_astray_by_a_gradient_along_another_eigenvector():
    a = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    state = torch.random.get_rng_state()
    assert float(alignment(lambda x: x @ a @ x / 2, torch.tensor([0.0, 3.0, 0.0]).double())) < 1e-6
    assert float(alignment(lambda x: x @ a @ x / 2, torch.tensor([0.0, 0.0, -3.0]).double())) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lanczos_writes_out_no_hessian():
    x = torch.zeros(200_000)
    curvature = 1 + torch.arange(200_000) / 200_000
    curvature[7] = 9.0

    def loss(x):
        return (curvature * x**2).sum() / 2

    worst = limiting_sharpness(loss, x, "worst", method="lanczos", n_probes=12, generator=seeded())
    assert float(worst) == pytest.approx(4.5, rel=1e-3)
    average = limiting_sharpness(loss, x, "average", method="lanczos", n_probes=4, generator=seeded())
    assert float(average) == pytest.approx(0.75, rel=1e-2)


def test_low_precision_is_computed_in_float32_and_given_back():
    a, loss, values = bowl(dtype=torch.float32)
    x = torch.zeros(5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [limiting_sharpness(loss, x, kind) for kind in KINDS]
    assert all(each.dtype == torch.bfloat16 for each in found)
    assert float(found[0]) == pytest.approx(values[-1] / 2, rel=0.01)
    assert float(found[1]) == pytest.approx(values[2] / 2, rel=0.01)


def test_in_inference_mode_and_without_a_global_seed():
    _, loss, values = bowl()
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        x = torch.zeros(5, dtype=torch.float64)
        assert float(top_eigenpair(loss, x, generator=seeded())[0]) == pytest.approx(values[-1])
        sharpness(loss, x, "average", rho=1.0, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the flow ---


def which_sharpness(x):
    """Return a loss with minimisers at w = 0, where lambda_1 is least at theta = 1, the trace at 1/7, lambda_2 at -1."""
    theta, w = x[0], x[1:]
    return ((4 + (theta - 1) ** 2) * w[0] ** 2 + (1 + 0.75 * (theta + 1) ** 2) * w[1] ** 2) / 2


@pytest.mark.parametrize(("kind", "centre", "rate", "value"), [
    ("worst", 1.0, 1.0, lambda t: 4 + (t - 1) ** 2), ("average", 1 / 7, 7 / 4, lambda t: 5 + (t - 1) ** 2 + 0.75 * (t + 1) ** 2),
    ("ascent", -1.0, 0.75, lambda t: 1 + 0.75 * (t + 1) ** 2),
])  # fmt: skip
def test_the_flow_of_each_sharpness_is_its_equations_solution(kind, centre, rate, value):
    flow = limit_flow(which_sharpness, torch.zeros(3, dtype=torch.float64), kind, time=0.25, n_steps=30)
    assert isinstance(flow, FlowResult)
    times = torch.linspace(0, 0.25, 31, dtype=torch.float64)
    theta = centre - centre * torch.exp(-rate * times)
    torch.testing.assert_close(flow.path[:, 0], theta, rtol=0, atol=1e-3)
    assert flow.path[:, 1:].abs().max() < 1e-8
    torch.testing.assert_close(flow.values, value(flow.path[:, 0]))
    assert torch.equal(flow.params, flow.path[-1])


def test_the_flow_returns_to_a_curved_manifold_and_finds_the_flattest_factors():
    """Minimisers of (a b - 1)^2 are a hyperbola, where the trace is 2 (a^2 + b^2) and least at a = b."""

    def loss(x):
        return (x[0] * x[1] - 1) ** 2

    start = torch.tensor([2.0, 0.7], dtype=torch.float64)  # not on it
    for kind in ("average", "worst"):  # of rank one they are the same
        flow = limit_flow(loss, start, kind, time=1.0, n_steps=20)
        assert (flow.path.prod(1) - 1).abs().max() < 1e-8
        torch.testing.assert_close(flow.values, 2 * flow.path.square().sum(1))
        assert (flow.values.diff() < 1e-9).all()
        torch.testing.assert_close(flow.params, torch.ones(2, dtype=torch.float64), rtol=0, atol=0.02)


def test_full_batch_sam_follows_the_flow_of_the_worst_direction():
    x = torch.tensor([0.0, 0.05, 0.03], dtype=torch.float64, requires_grad=True)
    optimizer = SAM([x], lr=0.02, rho=0.2)

    def closure():
        optimizer.zero_grad()
        which_sharpness(x).backward()

    for _ in range(400):
        optimizer.step(closure)
    theta = 1 - math.exp(-400 * 0.02 * 0.2**2)
    assert abs(x[0].item() - theta) < 0.05


ONES = torch.ones(3)


def square(x):
    return (x**2).sum()


def test_a_loss_of_one_number_counts_with_dimensions_and_without():
    def one(x):
        return square(x).reshape(1)

    for kind in KINDS:
        plain, found = (sharpness(f, ONES, kind, rho=0.1, generator=seeded()) for f in (square, one))
        assert torch.equal(plain, found)
        assert torch.equal(limiting_sharpness(square, ONES, kind), limiting_sharpness(one, ONES, kind))
    assert torch.equal(top_eigenpair(square, ONES)[0], top_eigenpair(one, ONES)[0])
    assert torch.equal(alignment(square, ONES), alignment(one, ONES))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: sharpness(square, ONES, "steep", rho=0.1), "kind must be one of"),
    (lambda: sharpness(square, ONES, "worst", rho=-0.1), "rho must be at least 0"),
    (lambda: sharpness(square, ONES, "average", rho=0.1, n_samples=1), "n_samples must be an integer of at least 2"),
    (lambda: sharpness(square, ONES, "worst", rho=0.1, n_starts=0), "n_starts must be"),
    (lambda: sharpness(square, ONES, "worst", rho=0.1, n_steps=0), "n_steps must be"),
    (lambda: sharpness(square, ONES[:, None], "worst", rho=0.1), "params must have shape"),
    (lambda: sharpness(square, ONES.long(), "worst", rho=0.1), "params must be a floating-point"),
    (lambda: sharpness(square, ONES[:0], "worst", rho=0.1), "params must hold at least one"),
    (lambda: sharpness(square, ONES * math.nan, "worst", rho=0.1), "params must be finite"),
    (lambda: sharpness(lambda x: x, ONES, "worst", rho=0.1), "loss_fn must return a scalar tensor"),
    (lambda: sharpness(lambda x: x.sum().log() * math.nan, ONES, "worst", rho=0.1), "loss_fn and its gradient must be finite"),
    (lambda: limiting_sharpness(square, ONES, "worst", method="power"), "method must be one of"),
    (lambda: limiting_sharpness(square, torch.ones(2001), "worst"), "use method='lanczos'"),
    (lambda: limiting_sharpness(square, ONES, "worst", tol=-1.0), "tol must be at least 0"),
    (lambda: limiting_sharpness(square, ONES, "worst", n_probes=0), "n_probes must be"),
    (lambda: limiting_sharpness(lambda x: x.sum() * 0, ONES, "ascent"), "a positive eigenvalue"),
    (lambda: limiting_sharpness(lambda x: x.sum() * 0, ONES, "ascent", method="lanczos"), "a positive eigenvalue"),
    (lambda: top_eigenpair(square, ONES, n_iter=0), "n_iter must be"), (lambda: top_eigenpair(square, ONES, method="qr"), "method must be one of"),
    (lambda: top_eigenpair(square, torch.ones(2001), method="exact"), "use method='lanczos'"),
    (lambda: alignment(square, ONES * 0), "params must be where the gradient is not zero"),
    (lambda: limit_flow(square, ONES, "steep", time=1.0), "kind must be one of"),
    (lambda: limit_flow(square, ONES, "average", time=-1.0), "time must be at least 0"),
    (lambda: limit_flow(square, ONES, "average", time=1.0, n_steps=0), "n_steps must be"),
    (lambda: limit_flow(square, ONES, "average", time=1.0, tol=0.0), "tol must be greater than 0"),
    (lambda: limit_flow(square, ONES, "worst", time=1.0), "loss_fn must have a simple eigenvalue"),
    (lambda: limit_flow(lambda x: -square(x), ONES, "worst", time=1.0), "params must"),
    (lambda: limit_flow(lambda x: x.sum(), ONES, "worst", time=1.0), "params must be near a minimiser"),
])  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, words):
    with pytest.raises(ValueError, match=words):
        call()
