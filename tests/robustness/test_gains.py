"""The controlled solver against its rules and torchdiffeq; the block; the certified loss; bad input."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import RK23, RK45
from torch import nn
from torch.nn import functional as F

import posterity.robustness.ode_solver as solver
from posterity.robustness import (
    CertifiedLoss,
    NeuralODEBlock,
    TimeConv2d,
    TimeLinear,
    aggregate_linear_bounds,
    certify,
    certify_regression,
    controlled_adaptive_solve,
    epsilon_schedule,
    interval_bounds,
    linear_bounds,
    trajectory_graph,
)
from posterity.testing import check_layer, check_loss


def network(seed=0, inputs=4, width=6, outputs=3, *, h0=0.5, scale=1.0, front=True, **options):
    """A small float64 network with a block, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        func = nn.Sequential(TimeLinear(width, width), nn.ReLU(), TimeLinear(width, width))
        layers = [nn.Linear(inputs, width), nn.ReLU()] if front else []
        net = nn.Sequential(*layers, NeuralODEBlock(func, **options), nn.Linear(width, outputs))
    for parameter in func.parameters():
        parameter.data.mul_(scale)
    net[-2].h0.fill_(h0)
    return net.double().eval()


def stiff(t, y):
    """A field that needs long and short steps."""
    return torch.stack([30 * torch.cos(12 * t) * (t > 0.4123) - 3 * y[:, 0], y[:, 0] * y[:, 1]], 1)


def by_hand(f, y, t1, h, atol, order, A, B, C, E, min_step=0.02):
    """The rules with floats and numpy, one sample: the state, and (t, h, action) of each step."""
    t, clips, forced, tried = 0.0, 0, False, []
    while t < t1 - 1e-8:
        k = np.zeros((len(C) + 1, len(y)))
        for i in range(len(C)):
            k[i] = f(t + C[i] * h, y + h * A[i, :i] @ k[:i])
        new = y + h * B @ k[:-1]
        k[-1] = f(t + h, new)
        e = abs(h * E @ k).sum() / atol
        action = 1 if forced else 2 if e <= 2.0**-order else 1 if e <= 1 else 0
        before, start = h, t
        if action:
            t, y = t + h, new
            h = 2 * h if action == 2 else h
            if t < t1 - 1e-8 and t + h > t1 + 1e-12:
                h, clips = t1 - t, max(clips, 1)
            if action == 2 and (t >= t1 - 1e-8 or h <= before + 1e-12):
                action = 1
        elif clips:
            clips += 1
            forced = clips > 2
            h = h if forced else h / 2
        else:
            forced = h / 2 < min_step * t1
            h = h if forced else h / 2
        tried.append((start, before, action))
    return y, tried


SHAMPINE = [35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720, -2187 / 6784 + 12231 / 42400,
            11 / 84 - 649 / 6300, -1 / 60]  # fmt: skip


@pytest.mark.parametrize("h0", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("atol", [1e-1, 1e-3])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_takes_the_steps_of_the_rules_with_the_weights_of_scipy(method, atol, h0):
    peer = {"dopri5": (5, RK45, np.array(SHAMPINE)), "bosh3": (3, RK23, RK23.E)}[method]
    order, source, error = peer
    y0 = torch.tensor([[0.3, -1.0]]).double()

    def numpy_field(t, y):
        return stiff(torch.tensor(t).double(), torch.tensor(y[None]))[0].numpy()

    state, tried = by_hand(
        numpy_field, y0[0].numpy(), 1.0, h0, atol, order, source.A, source.B, source.C, error
    )
    ours = controlled_adaptive_solve(stiff, y0, h0=h0, atol=atol, method=method)
    assert ours.actions == tuple(action for _, _, action in tried)
    np.testing.assert_allclose(ours.times, [t for t, _, _ in tried], atol=1e-9)
    np.testing.assert_allclose(ours.step_sizes, [h for _, h, _ in tried], atol=1e-9)
    np.testing.assert_allclose(ours.y[0], state, rtol=1e-9)
    assert ours.n_evaluations == 1 + (len(source.C)) * len(tried)


def test_small_tolerance_is_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = torch.rand(1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    field = lambda t, y: torch.stack([torch.sin(9 * t) - y[:, 1], y[:, 0] * y[:, 1]], 1)  # noqa: E731
    theirs = torchdiffeq.odeint(
        field, y0, torch.tensor([0.0, 2.0]).double(), rtol=1e-9, atol=1e-9, method="dopri5"
    )
    ours = controlled_adaptive_solve(field, y0, t1=2.0, h0=0.1, atol=1e-10, min_step=1e-3)
    torch.testing.assert_close(ours.y, theirs[-1], rtol=0, atol=1e-5)
    assert not ours.forced


def test_the_error_weights_are_shampines():
    dopri5 = pytest.importorskip("torchdiffeq._impl.dopri5")
    theirs = dopri5._DORMAND_PRINCE_SHAMPINE_TABLEAU.c_error
    np.testing.assert_allclose(solver.TABLEAUS["dopri5"].error, theirs, atol=1e-15)


def test_rejections_end_in_forced_steps():
    rough = lambda t, y: 1e6 * torch.sin(1e4 * y + 1e3 * t)  # noqa: E731
    ours = controlled_adaptive_solve(rough, torch.ones(1, 2).double(), h0=0.5)
    assert ours.forced
    assert min(ours.step_sizes[:-1]) >= 0.02
    assert abs(ours.times[-1] + ours.step_sizes[-1] - 1) < 1e-12
    clipped = controlled_adaptive_solve(
        lambda t, y: 1e5 * torch.cos(300 * t) * (t > 0.7) + 0 * y, torch.ones(1, 1), h0=0.4
    )
    # 0.4, then a step clipped to the end: rejected twice, after which all is accepted
    assert clipped.forced
    assert clipped.actions == (2, 0, 1, 0, 1)
    assert clipped.step_sizes == pytest.approx((0.4, 0.6, 0.3, 0.3, 0.3))


def test_the_batch_decides_by_its_mean_and_in_eval_each_alone():
    net = network(atol=1e-3, scale=2.0, method="bosh3")
    block = net[-2]
    generator = torch.Generator().manual_seed(0)
    y0 = (
        torch.randn(6, 6, dtype=torch.float64, generator=generator)
        * torch.logspace(-2, 1, 6).double()[:, None]
    )
    alone = [
        controlled_adaptive_solve(block._field, y0[i : i + 1], h0=0.5, atol=1e-3, method="bosh3")
        for i in range(6)
    ]
    assert len({one.actions for one in alone}) > 2
    torch.testing.assert_close(block(y0), torch.cat([one.y for one in alone]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(y0[[5, 3]]), block(y0)[[5, 3]], rtol=1e-12, atol=1e-12)
    together = controlled_adaptive_solve(block._field, y0, h0=0.5, atol=1e-3, method="bosh3")
    assert len(together.y) == 6
    gradients = [torch.autograd.grad(f(v).square().sum(), v)[0] for v in [y0.clone().requires_grad_()]
                 for f in (block, lambda v: torch.cat([controlled_adaptive_solve(block._field, row, h0=0.5, atol=1e-3, method="bosh3").y for row in v.split(1)]))]  # fmt: skip
    torch.testing.assert_close(*gradients)


def test_the_first_step_follows_the_batches_in_training_only():
    block = network(h0=0.0)[2].train()
    x = torch.rand(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block(x)
    first = float(block.h0)
    k = block._field(torch.tensor(0.0), x).detach()
    h = 0.01 * float(x.abs().sum()) / float(k.abs().sum())
    coefficients = np.zeros((7, 8, 6))
    for i in range(6):
        state = x.numpy() + h * np.tensordot(RK45.A[i, :i], coefficients[:i], 1)
        coefficients[i] = block._field(torch.tensor(RK45.C[i] * h), torch.tensor(state)).detach()
    state = x.numpy() + h * np.tensordot(RK45.B, coefficients[:6], 1)
    coefficients[6] = block._field(torch.tensor(h), torch.tensor(state)).detach()
    e = abs(h * np.tensordot(SHAMPINE, coefficients, 1)).sum(1).max() / 5e-3
    expected = min(1, h * min(10, max(0.9 * e**-0.25, 1.0 if e < 1 else 0.2)))
    assert math.isclose(first, expected, rel_tol=1e-6)
    block.h0.fill_(0.1)
    block(x)
    assert math.isclose(float(block.h0), 0.9 * 0.1 + 0.1 * expected, rel_tol=1e-6)
    block.eval()(x)
    assert math.isclose(float(block.h0), 0.9 * 0.1 + 0.1 * expected, rel_tol=1e-6)


def test_time_is_one_more_input_or_channel():
    generator = torch.Generator().manual_seed(0)
    linear, conv, t = TimeLinear(3, 2), TimeConv2d(2, 4), torch.tensor(0.7)
    x = torch.randn(5, 3, generator=generator)
    torch.testing.assert_close(
        linear(t, x), F.linear(torch.cat([x, torch.full((5, 1), 0.7)], 1), linear.weight, linear.bias)
    )
    x = torch.randn(5, 2, 6, 6, generator=generator)
    full = torch.cat([x, torch.full((5, 1, 6, 6), 0.7)], 1)
    torch.testing.assert_close(conv(t, x), F.conv2d(full, conv.weight, conv.bias, padding=1))


def test_the_block_conforms_to_its_kind(as_a_user):
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    check_layer(network()[2].float(), x, shape=(3, 6), chooses=True)


# --- training ---


class Fixed(nn.Module):
    """The loss of a network that is part of it, as `check_loss` calls one."""

    def __init__(self, net, **options):
        super().__init__()
        self.net, self.loss = net, CertifiedLoss(**options)

    def forward(self, x, y):
        return self.loss(self.net, x, y, 0.01, epsilon_target=0.02, bounds=(-1e9, 1e9))


def test_the_loss_conforms_to_its_kind(as_a_user):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    y = torch.randint(3, (3,), generator=generator)
    net = network(atol=1.0, scale=0.3)
    for parameter in net.parameters():  # gradcheck is of the inputs
        parameter.requires_grad_(False)
    check_loss(Fixed(net), x, y, compiles=False, symmetric=True, extremes=10.0)


def test_without_a_radius_or_a_share_it_is_cross_entropy():
    net, generator = network(), torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(9, 4, dtype=torch.float64, generator=generator),
        torch.randint(3, (9,), generator=generator),
    )
    plain = F.cross_entropy(net[3](controlled_adaptive_solve(net[2]._field, net[:2](x), h0=0.5).y), y)
    torch.testing.assert_close(CertifiedLoss()(net, x, y, 0.0, epsilon_target=0.1), plain)
    torch.testing.assert_close(
        CertifiedLoss(weight=0.0, gamma=0.0)(net, x, y, 0.1, epsilon_target=0.1), plain
    )


def test_the_worst_logits_are_those_of_the_corners_of_a_linear_network():
    net, generator = nn.Sequential(nn.Linear(3, 4)).double(), torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, dtype=torch.float64, generator=generator) * 0.6 + 0.2
    y = torch.randint(4, (5,), generator=generator)
    corners = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)]).double() * 0.2 - 0.1
    z = net(x[:, None] + corners)
    gaps = z - z.gather(2, y[:, None, None].expand(-1, 8, 1))
    above, width = gaps.amax(1), (gaps.amax(1) - gaps.amin(1)).square().sum(1) / 3
    expected = 0.5 * F.cross_entropy(net(x), y) + 0.5 * F.cross_entropy(above, y) + 0.7 * width.mean()
    loss = CertifiedLoss(weight=0.5, gamma=0.7)(net, x, y, 0.1, epsilon_target=0.1)
    torch.testing.assert_close(loss, expected)


def test_sampled_trajectories_are_paths_of_the_graph_and_more_of_them_share_their_draws():
    net = network(scale=2.0, method="bosh3")
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    low, high = x - 0.005, x + 0.005
    graph = trajectory_graph(net[2], *interval_bounds(net[:2], low, high))
    assert graph.n_trajectories > 10
    edges = {(a, b) for a, b in graph.edges}
    place = {step: k for k, step in enumerate(graph.nodes[:-1])}
    loss = CertifiedLoss(q=0.33, generator=torch.Generator().manual_seed(0))
    from posterity.robustness.boxes import between

    box, reference = between(*interval_bounds(net[:2], low, high)), net[2]._solve(net[:2](x))
    seen = set()
    for _ in range(6):
        _, actions = loss._along(net[2], box, reference)
        seen.add(tuple(actions))
        control, _, step = net[2]._control()
        for action in actions:
            after = control.after(step, action)
            assert (place[step], len(place) if after is None else place[after]) in edges
            step = after
    assert len(seen) > 1
    # at a point, and without other choices, the solver's own steps are taken
    point = between(net[:2](x), net[:2](x))
    _, actions = CertifiedLoss(q=0.0)._along(net[2], point, reference)
    assert [min(a, 1) for a in actions] == [min(a, 1) for a in reference.actions]
    values = {float(CertifiedLoss(n_trajectories=n, q=0.33, generator=torch.Generator().manual_seed(1))(net, x, torch.tensor([0]), 0.02, epsilon_target=0.02).detach()) for n in (1, 4)}  # fmt: skip
    assert len(values) == 2


@pytest.mark.parametrize(("mid", "beta"), [(0.6, 4.0), (0.25, 1.0), (1.0, 2.0)])
def test_eps_rises_from_nothing_to_the_target_smoothly(mid, beta):
    def at(step):
        return epsilon_schedule(step, start=3, length=20, target=0.3, mid=mid, beta=beta)

    values = [at(step) for step in np.linspace(-1, 30, 400)]
    assert values == sorted(values)
    assert at(3) == at(-5) == 0
    assert at(23) == at(99) == 0.3
    joint = 3 + 20 * mid
    assert math.isclose(at(joint - 1), at(joint) * ((20 * mid - 1) / (20 * mid)) ** beta)
    if mid < 1:
        assert math.isclose(at(23 - 1e-9), 0.3, rel_tol=1e-6)
        slopes = [(at(joint + h) - at(joint)) / h for h in (-1e-5, 1e-5)]
        assert math.isclose(*slopes, rel_tol=1e-3)


NET, ROW = network(), torch.rand(1, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0])
EYE, NONE = torch.eye(2), torch.zeros(2)


def solve(y0=ROW, func=lambda t, y: -y, **options):
    return controlled_adaptive_solve(func, y0, **{"h0": 0.5, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(factor=1.0), "factor must be greater than 1"),
        (lambda: solve(h0=0.0), r"h0 must be in \(0, 1.0\], got 0.0"),
        (lambda: solve(h0=1.5), r"h0 must be in \(0, 1.0\], got 1.5"),
        (lambda: solve(atol=0.0), "atol must be greater than 0"),
        (lambda: solve(t1=-1.0), "t1 must be greater than 0"),
        (lambda: solve(min_step=0.0), r"min_step must be in \(0, 1\]"),
        (lambda: solve(method="rk4"), "method must be one of"),
        (lambda: solve(max_steps=2, h0=0.01), "max_steps must be larger: at t = 0.03 2 steps"),
        (lambda: solve(ROW * math.nan), "func must keep the state finite"),
        (lambda: solve(func=lambda t, y: y.square().exp() * 1e9), "func must keep the state finite"),
        (lambda: solve(func=lambda t, y: y[:, :2]), r"func must return the shape of its state, \(1, 4\), got \(1, 2\)"),
        (lambda: solve(func=lambda t, y: 1.0), "func must return the shape of its state, .* got float"),
        (lambda: solve(ROW[:0]), "y0 must have at least one sample"),
        (lambda: solve(ROW.long()), "y0 must be a floating-point"),
        (lambda: NeuralODEBlock(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), "func must be of .* got Tanh at 1"),
        (lambda: NeuralODEBlock(nn.Linear(2, 2)), "func must be an nn.Sequential, got Linear"),
        (lambda: NeuralODEBlock(nn.Sequential(), factor=0.5), "factor must be greater than 1"),
        (lambda: NeuralODEBlock(nn.Sequential(nn.Linear(2, 3)))(torch.ones(1, 2)), "func must return the shape"),
        (lambda: NeuralODEBlock(nn.Sequential(nn.Linear(2, 2))).eval()(torch.ones(1, 2)), "h0 must be in .* training mode"),
        (lambda: TimeLinear(0, 2), "in_features must be an integer of at least 1"),
        (lambda: TimeLinear(3, 2)(0.0, ROW), r"x must have shape \(batch, 3\)"),
        (lambda: TimeLinear(4, 2)(0.0, ROW.long()), "x must be a floating-point"),
        (lambda: TimeConv2d(3, 2, 5, 0)(0.0, torch.ones(1, 3, 4, 4)), "x must be at least 5 pixels"),
        (lambda: certify(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ROW, Y, 0.1), "net must be of .* got Tanh at 1"),
        (lambda: certify(nn.Linear(4, 3), ROW, Y, 0.1), "net must be an nn.Sequential with layers"),
        (lambda: certify(NET, ROW, Y, -0.1), "epsilon must be at least 0"),
        (lambda: certify(NET, ROW, Y, 0.1, method="linear"), "method must be one of"),
        (lambda: certify(NET, ROW + 1, Y, 0.1), r"x must lie in bounds, \[0.0, 1.0\]"),
        (lambda: certify(NET, ROW, Y, 0.1, bounds=(1.0, 0.0)), "bounds must be two finite numbers"),
        (lambda: certify(NET, ROW * math.nan, Y, 0.1), "x must be finite"),
        (lambda: certify(NET, ROW[:, :2], Y, 0.1), r"x must fit net, got shape \(1, 2\)"),
        (lambda: certify(NET, ROW, Y + 3, 0.1), r"y must be in 0\.\.2"),
        (lambda: certify(NET, ROW, Y.float(), 0.1), "y must hold class indices"),
        (lambda: certify(NET, ROW, torch.tensor([0, 1]), 0.1), r"y must have shape \(1\)"),
        (lambda: certify(network(outputs=1), ROW, Y, 0.1), "net must have at least 2 outputs"),
        (lambda: certify(network().bfloat16(), ROW, Y, 0.1), "net must be in float32 or float64, got torch.bfloat16"),
        (lambda: certify(network(h0=0.0), ROW, Y, 0.1), "h0 must be in"),
        (lambda: certify_regression(NET, ROW, ROW, 0.1), r"y must have shape \(1, 3\)"),
        (lambda: certify_regression(NET, ROW, ROW[:, :3], 0.1, nu=-1.0), "nu must be at least 0"),
        (lambda: interval_bounds(NET, ROW, ROW - 1), "lower must be at most upper"),
        (lambda: interval_bounds(NET, ROW, ROW[:, :3]), r"upper must have the shape of lower"),
        (lambda: interval_bounds(nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Flatten()), ROW, ROW), "net must pad"),
        (lambda: interval_bounds(nn.Sequential(nn.AdaptiveAvgPool2d(2)), ROW, ROW), r"net must average .* at 0 of size 2"),
        (lambda: linear_bounds(NET, ROW.expand(2, 4), ROW.expand(2, 4)), "lower must be one sample"),
        (lambda: linear_bounds(NET, ROW, ROW, C=torch.ones(1, 2)), r"C must have shape \(any, 3\)"),
        (lambda: trajectory_graph(NET[2], torch.zeros(2, 6), torch.ones(2, 6)), "lower must be one sample"),
        (lambda: trajectory_graph(NET[2], torch.full((1, 6), -9.0), torch.full((1, 6), 9.0), max_nodes=5), "max_nodes must be larger: .* more than 5 nodes; .* CertifiedLoss"),
        (lambda: trajectory_graph(NET, ROW, ROW), "block must be a NeuralODEBlock, got Sequential"),
        (lambda: aggregate_linear_bounds(EYE, NONE, EYE, NONE, NONE, NONE - 1, kind="lower"), "lower must be at most upper"),
        (lambda: aggregate_linear_bounds(EYE, NONE, EYE[:1], NONE, NONE, NONE, kind="lower"), r"A2 must have shape \(2, 2\)"),
        (lambda: aggregate_linear_bounds(EYE, NONE, EYE, NONE, NONE, NONE, kind="both"), "kind must be one of"),
        (lambda: CertifiedLoss(weight=2.0), r"weight must be in \[0, 1\]"),
        (lambda: CertifiedLoss(q=0.6), r"q must be in \[0, 0.5\]"),
        (lambda: CertifiedLoss(n_trajectories=0), "n_trajectories must be an integer of at least 1"),
        (lambda: CertifiedLoss()(NET, ROW, Y, 0.2, epsilon_target=0.1), r"epsilon must be in \[0, 0.1\]"),
        (lambda: CertifiedLoss()(NET, ROW, Y + 3, 0.1, epsilon_target=0.1), r"y must be in 0\.\.2"),
        (lambda: CertifiedLoss()(network().half(), ROW, Y, 0.1, epsilon_target=0.1), "net must be in float32 or float64, got torch.float16"),
        (lambda: epsilon_schedule(1, start=0, length=0, target=1), "length must be greater than 0"),
        (lambda: epsilon_schedule(1, start=0, length=1, target=-1), "target must be in"),
        (lambda: epsilon_schedule(1, start=0, length=1, target=1, beta=0.5), "beta must be at least 1"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
