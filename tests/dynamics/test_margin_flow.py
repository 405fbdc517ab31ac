"""The margin problem against SLSQP and in closed form; the flow against it, in closed form and in real time."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import linprog, minimize
from torch import nn
from torch.nn import functional as F

from posterity.dynamics import (
    PowerDiagonal,
    layer_rates,
    margin_flow,
    normalized_margin,
    seminorm_max_margin,
    two_balls,
)
from posterity.testing import check_instrument

BOTH = torch.tensor([1.0, -1.0])


def balls(b, n=24, seed=0, a=2.0):
    mu = torch.tensor([a, b], dtype=torch.float64)
    return two_balls(n, mu, generator=torch.Generator().manual_seed(seed))


def separable(n, d, seed, free=0.0):
    """Return points, moved away from a plane, and their labels."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d)
    x = rng.normal(size=(n, d)) * rng.uniform(0.3, 3, size=d)
    y = np.where(x @ w > 0, 1, -1)
    return torch.tensor(x + 0.3 * y[:, None] * w), torch.tensor(y), torch.tensor(rng.random(d) < 0.6)


def by_slsqp(x, y, penalized):
    """Return the same problem's value by a solver of another kind, from a feasible start."""
    A, p = x.numpy() * y.numpy()[:, None], penalized.numpy().astype(float)
    start = linprog(np.zeros(A.shape[1]), A_ub=-A, b_ub=-np.ones(len(A)), bounds=(None, None)).x
    return minimize(
        lambda b: p @ b**2 / 2, start, jac=lambda b: p * b, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda b: A @ b - 1, "jac": lambda b: A},
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip


def fulfils_its_conditions(found, x, y, penalized, tol=1e-6):
    signed = x * y[:, None]
    slack = signed @ found.coef - 1
    size = found.multipliers.max().clamp_min(1.0)
    assert (slack > -tol).all()
    assert (found.multipliers >= 0).all()
    assert ((slack * found.multipliers).abs() < tol * size).all()
    pull = signed.T @ found.multipliers
    torch.testing.assert_close(
        pull, torch.where(penalized, found.coef, 0.0), rtol=tol, atol=tol * float(size)
    )
    assert (found.support[found.multipliers > 0]).all()
    assert (slack[found.support].abs() < tol).all()
    assert found.margin == pytest.approx(1 / float(found.coef.norm()), rel=1e-12)
    assert found.value == pytest.approx(float((found.coef[penalized] ** 2).sum()) / 2, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_solution_is_slsqps_and_fulfils_its_conditions(seed):
    x, y, penalized = separable(30 + 10 * seed, 2 + seed, seed)
    every = torch.ones_like(penalized)
    for p in (every, penalized):
        found = seminorm_max_margin(x, y, p)
        theirs = by_slsqp(x, y, p)
        assert found.value == pytest.approx(theirs.fun, rel=1e-5, abs=1e-7)
        if not found.degenerate:
            fulfils_its_conditions(found, x, y, p)
            np.testing.assert_allclose(found.coef[p], theirs.x[p.numpy()], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        seminorm_max_margin(x, y, every).coef, by_slsqp(x, y, every).x, rtol=1e-5, atol=1e-5
    )


def test_units_of_x_divide_the_coefficients_and_order_and_repetition_do_not_matter():
    x, y, penalized = separable(40, 5, 3)
    found = seminorm_max_margin(x, y, penalized)
    for c in (1e-9, 3.0, 1e9):
        scaled = seminorm_max_margin(c * x, y, penalized.tolist())
        torch.testing.assert_close(scaled.coef * c, found.coef, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(scaled.multipliers * c**2, found.multipliers, rtol=1e-6, atol=1e-6)
        assert scaled.margin == pytest.approx(c * found.margin)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    again = seminorm_max_margin(x[order].repeat(3, 1), y[order].repeat(3), penalized)
    torch.testing.assert_close(again.coef, found.coef, rtol=1e-8, atol=1e-8)


def test_of_several_optima_the_shortest_is_returned():
    """A sample, x = (2, 1, 1), its mirror image, and the last two free: with value 0 the shortest is (0, 1/2, 1/2)."""
    found = seminorm_max_margin(BOTH[:, None] * torch.tensor([2.0, 1.0, 1.0]), BOTH, [True, False, False])
    torch.testing.assert_close(found.coef, torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64))
    assert (found.degenerate, found.value) == (True, 0.0)
    # opposite demands on the free sum leave b_0 = 1; b_1 + b_2 is then between -1 and 1, shortest at 0
    x, y = torch.tensor([[2.0, 1.0, 1.0], [2.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]), torch.tensor([1, 1, -1])
    found = seminorm_max_margin(x, y, [True, False, False])
    torch.testing.assert_close(found.coef, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert not found.degenerate


@pytest.mark.parametrize("b", [0.3, 0.6, 0.95])
def test_two_balls_have_the_margin_of_the_closed_form(b):
    x, y = balls(b, 4_000)
    s = math.sqrt(1 - b**2)
    found = seminorm_max_margin(x, y, [True, False])
    torch.testing.assert_close(
        found.coef / found.coef.norm(), torch.tensor([s, b]).double(), rtol=0.01, atol=0
    )
    assert found.margin == pytest.approx((2 - s) * s, rel=0.01)
    assert not found.degenerate
    widest = seminorm_max_margin(x, y, [True, True])
    assert widest.margin == pytest.approx(math.sqrt(4 + b**2) - 1, rel=0.01)


def test_behind_the_cliff_the_free_coordinate_does_alone():
    x, y = balls(1.3, 4_000)
    found = seminorm_max_margin(x, y, [True, False])
    assert (found.degenerate, found.value, float(found.coef[0])) == (True, 0.0, 0.0)
    assert found.margin == pytest.approx(0.3, rel=0.01)
    assert (found.multipliers == 0).all()
    assert found.support.sum() >= 1


@pytest.mark.parametrize("d", [1, 2, 5])
def test_balls_are_uniform(d):
    mu = torch.linspace(1, 2, d, dtype=torch.float64)
    for surface in (True, False):
        x, y = two_balls(20_000, mu, 1.5, surface=surface, generator=torch.Generator().manual_seed(0))
        assert (x.shape, y.sum()) == ((40_000, d), 0)
        off = x - y[:, None] * mu
        share = (off.norm(dim=1) / 1.5) ** d  # uniform in a ball
        assert share.mean() == pytest.approx(1.0 if surface else 0.5, abs=0.01)
        assert share.var() == pytest.approx(0.0 if surface else 1 / 12, abs=0.01)
        assert off.mean(0).abs().max() < 0.03
        spread = torch.cov(off.T).reshape(d, d)
        expected = 1.5**2 / d * (1.0 if surface else d / (d + 2))
        torch.testing.assert_close(spread, expected * torch.eye(d).double(), atol=0.03, rtol=0)
    low, _ = two_balls(5, mu.half(), generator=torch.Generator().manual_seed(0))
    high, _ = two_balls(5, mu.half().double(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(low, high.half())


def equal_starts(degrees, start=0.5):
    model = PowerDiagonal(degrees)
    nn.init.constant_(model.theta, start)
    return model


@pytest.mark.parametrize(("degrees", "penalized"), [([1, 1], [True, True]), ([1, 3], [True, False])])
def test_the_flow_reaches_the_direction_of_its_margin_problem(degrees, penalized):
    x, y = balls(0.95)
    flow = margin_flow(equal_starts(degrees), x, y, duration=11.0)
    assert flow.success
    coef, wanted = flow.model.coefficients().detach(), seminorm_max_margin(x, y, penalized).coef
    torch.testing.assert_close(coef / coef.norm(), wanted / wanted.norm(), rtol=0.01, atol=0)
    torch.testing.assert_close(flow.params[-1], flow.model.theta.detach())
    torch.testing.assert_close(flow.min_margin[-1], (y * (x @ coef)).min())
    torch.testing.assert_close(flow.log_margin[-1], flow.min_margin[-1].log())


def test_a_parameter_that_is_not_needed_vanishes_beside_the_other():
    x, y = balls(1.3)
    theta = margin_flow(equal_starts([1, 3]), x, y, duration=11.0).params[-1]
    assert theta[0] < 10
    assert theta[1] > 1e4


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_the_path_is_that_of_gradient_flow_in_real_time(loss):
    """Both pass through the same points: compared where a parameter has the same value."""
    x, y = balls(0.6, 5)
    flow = margin_flow(equal_starts([1, 3]), x, y, loss=loss, duration=1.5, n_eval=200, rtol=1e-9)
    data, sign, powers = x.numpy(), y.numpy(), np.array([1, 3])

    def push(_, theta):
        z = -sign * (data @ theta**powers)
        share = np.exp(z) if loss == "exponential" else 1 / (1 + np.exp(-z))
        return (share * sign) @ data * powers * theta ** (powers - 1)

    real = solve_ivp(push, (0, 0.5), [0.5, 0.5], rtol=1e-10, atol=1e-12, dense_output=True)
    assert real.y[0, -1] < flow.params[-1, 0]
    along = np.interp(real.y[0], flow.params[:, 0].numpy(), flow.params[:, 1].numpy())
    np.testing.assert_allclose(real.y[1], along, rtol=1e-4)
    margins = y * (x @ flow.params.pow(torch.tensor([1, 3])).T).T
    each = (-margins).exp() if loss == "exponential" else F.softplus(-margins)
    torch.testing.assert_close(flow.log_loss, each.sum(1).log())
    torch.testing.assert_close(flow.min_margin, margins.min(1).values)
    assert flow.log_margin[0].isnan() == (flow.min_margin[0] <= 0)


def test_a_sample_and_its_mirror_image_have_a_closed_form_at_margins_of_e_to_the_forty():
    """theta' = theta beyond 1, from 1: e^tau, of the degree 3 a margin of e^(3 tau)."""
    for loss in ("exponential", "logistic"):
        flow = margin_flow(equal_starts([3], 1.0), BOTH[:, None], BOTH, loss=loss, duration=14.0, n_eval=15)
        assert flow.success
        torch.testing.assert_close(flow.params[:, 0].log(), flow.times, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(flow.log_margin, 3 * flow.times, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(flow.log_loss[1:], math.log(2) - flow.min_margin[1:], rtol=1e-6, atol=1e-5)


def network(*, norm=False, classes=1, width=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, width, bias=False), *[nn.BatchNorm1d(width)] * norm, nn.ReLU(), nn.Linear(width, classes, bias=norm)
        )  # fmt: skip


def test_the_normalised_margin_does_not_fall_once_a_homogeneous_model_separates():
    """Its smoothed form, with -log L for the least margin, which it tends to."""
    x, y = balls(0.95, 6)
    flow = margin_flow(network(width=4), x, y, duration=4.0, n_eval=20)
    assert flow.success
    smooth, least = [], []
    for k in (flow.log_loss < 0).nonzero()[:, 0]:
        nn.utils.vector_to_parameters(flow.params[k], flow.model.parameters())
        margin = normalized_margin(flow.model, x, y, layer_rates(flow.model))
        least.append(margin)
        smooth.append(-flow.log_loss[k] * margin / flow.min_margin[k])
    assert len(smooth) > 5
    assert (torch.stack(smooth).diff() > -1e-6).all()
    assert smooth[-1] > 1.2 * smooth[0]
    torch.testing.assert_close(smooth[-1], least[-1], rtol=0.2, atol=0)


def test_of_classes_the_flow_is_that_of_cross_entropy():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    y = torch.arange(3)
    model = nn.Linear(2, 3, bias=False)
    flow = margin_flow(model, x, y, loss="logistic", duration=3.0, n_eval=4)
    for at, log_loss, margin in zip(flow.params, flow.log_loss, flow.min_margin, strict=True):
        scores = x.double() @ at.view(3, 2).T
        torch.testing.assert_close(log_loss.exp(), F.cross_entropy(scores, y, reduction="sum"))
        others = scores.masked_fill(torch.eye(3).bool(), -math.inf).max(1).values
        torch.testing.assert_close(margin, (scores.diagonal() - others).min())
    assert margin_flow(model, x, y, duration=3.0).min_margin[-1] > 1


def test_the_flow_conforms_to_its_kind(as_a_user):
    y = torch.tensor([1, -1, 1])
    x = torch.tensor([[1.0, 0.5], [-0.5, -1.0], [0.3, 1.0]])
    look = partial(margin_flow, y=y, duration=0.05, n_eval=2)
    check_instrument(look, network(norm=True, width=2), x)


def test_the_copy_is_double_and_frozen_parameters_and_modes_stay():
    model = network(norm=True)
    model[0].requires_grad_(False)
    model.train()
    flow = margin_flow(model, *balls(0.95, 3), duration=1.0, n_eval=3)
    assert flow.params.shape == (3, sum(p.numel() for p in model.parameters() if p.requires_grad))
    kept, moved = dict(model.named_parameters()), dict(flow.model.named_parameters())
    assert torch.equal(moved["0.weight"], kept["0.weight"].double())
    assert not torch.equal(moved["3.weight"], kept["3.weight"].double())
    assert torch.equal(flow.model.get_buffer("1.running_mean"), model.get_buffer("1.running_mean").double())
    assert flow.model.training


class Ends(nn.Module):
    """Its score is not a number beyond 2, or does not depend on its parameter."""

    def __init__(self, how):
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        ends = {
            "nan": (2 - self.w).sqrt() * 0 + self.w,
            "flat": 0 * self.w + 1,
            "bounded": self.w.clamp(max=2.0),
        }
        return x[:, 0] * ends[self.how]


@pytest.mark.parametrize("how", ["nan", "flat", "bounded"])
def test_the_path_ends_where_there_is_no_direction(how):
    flow = margin_flow(Ends(how), BOTH[:, None], BOTH, duration=5.0, n_eval=51)
    assert not flow.success
    assert flow.params.isfinite().all() and flow.log_loss.isfinite().all()
    assert len(flow.times) == len(flow.params) == len(flow.log_loss)
    assert flow.params[-1] == 1 if how == "flat" else 1.5 < flow.params[-1] < 2.3
    assert flow.plot().has_data()


def test_a_solver_that_stalls_gives_up(monkeypatch):
    monkeypatch.setattr(sys.modules["posterity.dynamics.margin_flow"], "GRADIENTS", 300)
    flow = margin_flow(equal_starts([1, 3]), *balls(0.95), duration=11.0, n_eval=20)
    assert not flow.success
    assert 2 < len(flow.times) < 20


def test_powers_draw_from_their_generator():
    first, again, other = (
        PowerDiagonal([1, 3, 1], generator=torch.Generator().manual_seed(s)).theta for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


X, Y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, -1])
MU = torch.ones(2)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: seminorm_max_margin(X, Y[:1], [True, True]), r"y must have shape \(2\) for x"),
    (lambda: seminorm_max_margin(X.long(), Y, [True, True]), "x must be a floating-point"),
    (lambda: seminorm_max_margin(X, 2 * Y, [True, True]), "y must hold -1 and 1"),
    (lambda: seminorm_max_margin(X, Y, [True]), "penalized must be 2 truth values"),
    (lambda: seminorm_max_margin(X, Y, [1, 0]), "penalized must be 2 truth values"),
    (lambda: seminorm_max_margin(X, Y, [True, True], tol=0.0), "tol must be greater than 0"),
    (lambda: seminorm_max_margin(X * math.nan, Y, [True, True]), "x must be finite"),
    (lambda: seminorm_max_margin(X[:0], Y[:0], [True, True]), "x must have at least one row"),
    (lambda: seminorm_max_margin(X, Y.abs(), [True, True]), "y must have both classes, got 1 alone"),
    (lambda: seminorm_max_margin(X, Y, [False, False]), "penalized must have a True"),
    (lambda: seminorm_max_margin(torch.ones(2, 2), BOTH, [True, True]), "x must be linearly separable through the origin"),
    (lambda: margin_flow(equal_starts([1, 1]), X, Y.abs()), "y must have more than one class, got 1 alone"),
    (lambda: seminorm_max_margin(0 * X, Y, [True, True]), "x must be linearly separable"),
    (lambda: PowerDiagonal([]), "degrees must hold at least one"),
    (lambda: PowerDiagonal([1, 2]), "degrees must be odd, so that coefficients have both signs, got 2"),
    (lambda: PowerDiagonal([-1]), "degrees must be an integer of at least 1"),
    (lambda: PowerDiagonal([1, 1])(torch.ones(3, 3)), r"x must have shape \(any, 2\) for degrees"),
    (lambda: margin_flow(network(), X, Y, loss="hinge"), "loss must be one of 'exponential', 'logistic', got 'hinge'"),
    (lambda: margin_flow(network(), X, Y, duration=0.0), r"duration must be in \(0.0, 700.0\], got 0.0"),
    (lambda: margin_flow(network(), X, Y, n_eval=1), "n_eval must be an integer of at least 2"),
    (lambda: margin_flow(network(), X, Y, rtol=-1.0), "rtol must be greater than 0"),
    (lambda: margin_flow(network(), X, Y, atol=0.0), "atol must be greater than 0"),
    (lambda: margin_flow(nn.Flatten(0), X, Y), "model must have 1 to 3000 trainable parameters, got 0"),
    (lambda: margin_flow(nn.Linear(2, 3_000), X, Y), "model must have 1 to 3000 trainable parameters, got 9000"),
    (lambda: margin_flow(network(), X, Y[:1]), r"y must have shape \(2\) for x"),
    (lambda: margin_flow(network(), X, Y.abs() - 1), "y must hold -1 and 1"),
    (lambda: margin_flow(network(classes=2), X, Y), r"y must be in 0\.\.1"),
    (lambda: margin_flow(network(), X * math.inf, Y), "model must return finite outputs for x"),
    (lambda: margin_flow(network(), X[:0], Y[:0]), "x must be a tensor of at least one row"),
    (lambda: two_balls(0, MU), "n must be an integer of at least 1"),
    (lambda: two_balls(1, MU, 0.0), "radius must be greater than 0"),
    (lambda: two_balls(1, MU[None]), "mu must have shape"),
    (lambda: two_balls(1, MU[:0]), "mu must have at least one element"),
    (lambda: two_balls(1, MU * math.nan), "mu must be finite"),
])  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, words):
    with pytest.raises(ValueError, match=words):
        call()
