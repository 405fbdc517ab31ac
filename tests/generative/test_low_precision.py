"""Rectified flow in low precision, in other units, and asked for inside modes without gradients."""

import pytest
import torch
from torch import nn

from posterity.generative import RectifiedFlow, reflow, straightness, transport_cost
from posterity.testing._low_precision import check_low_precision, relative_error

NARROW = [torch.bfloat16, torch.float16]
SLUG = "rectified-flow"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


class Turning(nn.Module):
    """A slope that grows with x and bends with t."""

    def __init__(self, centre=0.0):
        super().__init__()
        self.matrix, self.centre = nn.Parameter(draw(3, 3).float()), centre

    def forward(self, x, t):
        return (x - self.centre) @ self.matrix * torch.cos(2 * t)[:, None]


@pytest.mark.parametrize("dtype", NARROW, ids=[f"{SLUG}-bfloat16", f"{SLUG}-float16"])
@pytest.mark.parametrize("method", ["euler", "heun", "rk45"])
def test_steps_that_are_small_beside_the_state_are_not_lost(as_a_user, dtype, method):
    seen = set()

    def net(x, t):
        seen.update((x.dtype, t.dtype))
        return torch.full_like(x, 8.0)

    start = torch.full((4, 3), 100.0, dtype=dtype)
    found = RectifiedFlow(3).integrate(net, start, method=method, n_steps=500, return_path=True)
    assert seen == {found.x.dtype} == {found.path.dtype} == {dtype}
    assert torch.equal(found.x, torch.full_like(start, 108.0))
    assert found.times.dtype == torch.float32


@pytest.mark.parametrize("dtype", NARROW, ids=[f"{SLUG}-bfloat16", f"{SLUG}-float16"])
def test_rk45_does_not_chase_the_rounding_of_a_narrow_network(as_a_user, dtype):
    low, x = Turning().to(dtype), draw(20, 3).to(dtype)
    found = RectifiedFlow(3).integrate(low, x)
    exact = RectifiedFlow(3).integrate(low.float(), x.float())
    assert found.n_evals <= exact.n_evals
    assert relative_error(found.x, exact.x) < 4 * torch.finfo(dtype).eps


FLOW, FEW = RectifiedFlow(3), {"method": "heun", "n_steps": 10}
CALLS = {
    "exact": (lambda net, x0, x1: FLOW.log_prob(net, x1, **FEW), 8),
    "hutchinson": (
        lambda net, x0, x1: FLOW.log_prob(net, x1, divergence="hutchinson", **FEW, generator=rng()),
        8,
    ),
    "distill": (lambda net, x0, x1: FLOW.distill_loss(net, x1, x0, n_steps=4, generator=rng()), 8),
    "straightness": (lambda net, x0, x1: straightness(FLOW, net, x0, n_steps=20), 8),
    "none": (lambda net, x0, x1: FLOW.loss(net, x1, x0, reduction="none", generator=rng()), 8),
    "pairs": (lambda net, x0, x1: FLOW.couple(net, x0=x0, **FEW), 8),
}


@pytest.mark.parametrize("name", CALLS, ids=lambda name: f"{SLUG}-{name}")
def test_a_narrow_flow_is_its_float32_twin_rounded(as_a_user, name):
    call, slack = CALLS[name]
    inputs = draw(200, 3), 2 + draw(200, 3, seed=1)
    check_low_precision(call, Turning(), inputs, slack=slack, gradient=name != "pairs")


@pytest.mark.parametrize("path", ["linear", "vp", "sub-vp"], ids=lambda path: f"{SLUG}-{path}")
def test_a_time_that_rounds_to_its_end_has_a_finite_velocity(as_a_user, path):
    flow, x1 = RectifiedFlow(3, path=path), draw(5000, 3).requires_grad_()
    for net in (lambda x, t: 0 * x, Turning()):
        check_low_precision(lambda x1, net=net: flow.loss(lambda x, t: net(x.float(), t.float()).to(x), x1,
                                                          generator=rng()), None, (x1,), slack=2)  # fmt: skip


@pytest.mark.parametrize(
    "cost", [2.0, 0.5, lambda way: way.abs().sum(1)], ids=[f"{SLUG}-{k}" for k in range(3)]
)
def test_the_cost_of_pairs_is_that_of_the_rounded_pairs(as_a_user, cost):
    pairs = draw(300, 3).requires_grad_(), 100 + draw(300, 3, seed=1)
    check_low_precision(lambda *xs: transport_cost(*xs, cost), None, pairs, slack=2)


@pytest.mark.parametrize("dtype", NARROW, ids=[f"{SLUG}-bfloat16", f"{SLUG}-float16"])
def test_one_generator_draws_the_same_starts_in_every_precision(dtype):
    net = Turning()
    wide, _ = FLOW.couple(net, 50, method="euler", n_steps=1, generator=rng())
    narrow, _ = FLOW.couple(net.to(dtype), 50, method="euler", n_steps=1, generator=rng())
    assert torch.equal(narrow, wide.to(dtype))


def test_straightness_knows_no_origin_and_no_unit():
    x = draw(30, 3)
    expected = straightness(FLOW, Turning().double(), x)
    far = straightness(FLOW, Turning(1e8).double(), x + 1e8)
    torch.testing.assert_close(far, expected, rtol=1e-6, atol=0)
    for unit in (1e-12, 1e12):
        torch.testing.assert_close(straightness(FLOW, Turning().double(), unit * x) / unit**2, expected)
    # a flow along straight lines far away has straightness 0, not that of rounded ends
    assert float(straightness(FLOW, lambda x, t: torch.full_like(x, 0.3), x + 1e8)) < 1e-20


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: f"{SLUG}-{m.__name__}")
def test_reflow_trains_inside_modes_without_gradients(mode):
    def fit(net, z0, z1):
        FLOW.loss(net, z1, z0, generator=rng()).backward()
        return net

    with mode():
        (again,) = reflow(FLOW, Turning(), fit, n_pairs=20, x0=draw(20, 3).float(), method="euler", n_steps=2)
        pairs = FLOW.couple(Turning(), 20, method="euler", n_steps=2, generator=rng())
    assert float(again.matrix.grad.norm()) > 0
    net = Turning()
    FLOW.loss(net, pairs[1], pairs[0], generator=rng()).backward()  # pairs made there train here
    assert float(net.matrix.grad.norm()) > 0
