"""Bounds and certificates attacked: points, corners and gradients look for what a proof excludes."""

import itertools
from fractions import Fraction
from importlib import import_module

import pytest
import torch
from torch import nn

from posterity.robustness import (
    CertifiedLoss,
    NeuralODEBlock,
    TimeConv2d,
    aggregate_linear_bounds,
    certify,
    certify_regression,
    controlled_adaptive_solve,
    interval_bounds,
    linear_bounds,
    trajectory_graph,
)
from posterity.robustness.ode_solver import Step
from tests.robustness.test_gains import network

gains, graphs = (import_module(f"posterity.robustness.{name}") for name in ("gains", "trajectory_graph"))
GENTLE = {"atol": 5e-2, "scale": 1.0}
ROUGH = {"atol": 5e-2, "scale": 2.0, "method": "bosh3"}
FINE = {"atol": 2e-2, "scale": 1.0, "factor": 1.5}


def draws(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attack(net, low, high, rows, restarts=10, steps=8, seed=0):
    """Minimise a row of the output on each box: what was tried last, and the best values."""
    low, high, rows = (part.repeat(restarts, *[1] * (part.ndim - 1)) for part in (low, high, rows))
    x = low + (high - low) * draws(*low.shape, seed=seed)
    best = torch.full((len(x),), float("inf"), dtype=torch.float64)
    for k in range(steps + 1):
        x = x.detach().requires_grad_()
        value = (net(x) * rows).sum(1)
        best = torch.minimum(best, value.detach())
        if k < steps:
            (slope,) = torch.autograd.grad(value.sum(), x)
            x = torch.minimum(torch.maximum(x - (high - low) * 0.5**k * slope.sign(), low), high)
    return x.detach(), best.view(restarts, -1).amin(0)


def found_outside(net, low, high):
    """By how much the outputs of points, corners and PGD leave interval bounds and linear bounds."""
    points = low + (high - low) * draws(2000, low.shape[1])
    corners = low + (high - low) * torch.tensor(list(itertools.product((0.0, 1.0), repeat=low.shape[1])))
    outputs = net(low).shape[1]
    rows = torch.cat([torch.eye(outputs), -torch.eye(outputs)]).double()
    sought, best = attack(net, low.expand(len(rows), -1), high.expand(len(rows), -1), rows)
    x = torch.cat([points, corners, sought])
    with torch.no_grad():
        out = net(x)
    box, lines = interval_bounds(net, low, high), linear_bounds(net, low, high)
    extremes = torch.maximum(-best[outputs:], out.amax(0)), torch.minimum(best[:outputs], out.amin(0))
    gaps = [
        extremes[0] - box[1][0], box[0][0] - extremes[1], extremes[0] - lines.upper, lines.lower - extremes[1],
        (x @ lines.A_lower.T + lines.c_lower - out).amax(0), (out - x @ lines.A_upper.T - lines.c_upper).amax(0),
    ]  # fmt: skip
    return max(float(gap.max()) for gap in gaps), x


@pytest.mark.parametrize("options", [GENTLE, ROUGH, FINE], ids=["gentle", "rough", "factor 3/2"])
def test_no_point_leaves_the_bounds_and_every_solver_path_is_in_the_graph(as_a_user, options):
    eps = 0.04
    net, x = network(3, **options), draws(1, 4, seed=1)
    outside, tried = found_outside(net, x - eps, x + eps)
    assert outside <= 0
    block, state = net[2], interval_bounds(net[:2], x - eps, x + eps)
    graph = trajectory_graph(block, *state)
    edges, place = set(graph.edges), {(float(step.t), float(step.h)): [] for step in graph.nodes[:-1]}
    for k, step in enumerate(graph.nodes[:-1]):
        place[float(step.t), float(step.h)].append(k)
    paths = set()
    for y in net[:2](tried[:: len(tried) // 30]).split(1):
        solution = controlled_adaptive_solve(
            block._field, y, h0=0.5, atol=block.atol, method=block.method, factor=block.factor
        )
        assert bool(
            (solution.y >= graph.output_bounds[0]).all() & (solution.y <= graph.output_bounds[1]).all()
        )
        here = {0}
        for t, h in list(zip(solution.times, solution.step_sizes, strict=True))[1:]:
            here = {k for k in place[t, h] for j in here if (j, k) in edges}
            assert here, "a step of the solver is an edge of the graph"
        assert any((k, len(graph.nodes) - 1) in edges for k in here)
        paths.add(solution.actions)
    assert graph.n_trajectories >= len(paths)


def at_a_threshold(net):
    """A tiny box that straddles a place where the solver goes another way."""
    block = net[2]

    def way(x):
        return controlled_adaptive_solve(
            block._field, net[:2](x), h0=0.5, atol=block.atol, method=block.method
        ).actions

    a, *others = (2 * draws(1, 4, seed=k) for k in range(20))
    here = way(a)
    b = next(x for x in others if way(x) != here)
    for _ in range(25):
        middle = (a + b) / 2
        a, b = (middle, b) if way(middle) == here else (a, middle)
    middle, half = (a + b) / 2, (a - b).abs() + 1e-6
    return middle - half, middle + half


def test_both_sides_of_a_decision_are_covered_and_a_dropped_transition_is_found(as_a_user, monkeypatch):
    net = network(3, **(ROUGH | {"atol": 0.02}))
    low, high = at_a_threshold(net)
    assert trajectory_graph(net[2], *interval_bounds(net[:2], low, high)).n_trajectories > 1
    assert found_outside(net, low, high)[0] <= 0

    def in_the_middle(error, atol, slack):
        size = error.center.abs().sum(1) / atol
        return size, size

    monkeypatch.setattr(graphs, "error_bounds", in_the_middle)  # one way only
    assert trajectory_graph(net[2], *interval_bounds(net[:2], low, high)).n_trajectories == 1
    assert found_outside(net, low, high)[0] > 1e-4


def trained(steps=25):
    """A network that separates two blobs, trained for boxes, and points of them."""
    x = torch.cat([0.3 + 0.1 * draws(40, 4, seed=1), 0.55 + 0.1 * draws(40, 4, seed=2)])
    y, net = torch.arange(80) // 40, network(outputs=2, atol=0.1).train()
    loss, optimizer = CertifiedLoss(), torch.optim.Adam(net.parameters(), lr=2e-2)
    for k in range(steps):
        optimizer.zero_grad()
        loss(net, x, y, 0.05 * k / steps, epsilon_target=0.05).backward()
        optimizer.step()
    return net.eval(), x[::8], y[::8]


def flipped(net, x, y, eps, verified):
    """Number of verified samples for which a search finds another decision."""
    if not verified.any():
        return 0
    x, rows = x[verified], 2 * torch.eye(2)[y[verified]].double() - 1
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    _, best = attack(net, low, high, rows, restarts=20)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double()
    points = torch.cat([corners, draws(50, 4, seed=9)])
    out = net((low[:, None] + (high - low)[:, None] * points).flatten(0, 1)).view(len(x), -1, 2)
    best = torch.minimum(best, (out * rows[:, None]).sum(2).detach().amin(1))
    return int((best <= 0).sum())


def test_an_attack_breaks_no_certificate_but_one_of_half_the_bounds(as_a_user, monkeypatch):
    net, x, y = trained()
    proved = {}
    for eps in (0.1, 0.13):
        lines, box = certify(net, x, y, eps), certify(net, x, y, eps, method="box")
        assert bool((lines.margin >= box.margin - 1e-9).all())
        assert flipped(net, x, y, eps, lines.verified) == 0
        proved[eps] = int(box.verified.sum()), int(lines.verified.sum())
    assert proved[0.1][1] >= 5
    assert any(a < b for a, b in proved.values()), proved
    real = gains.bound_network

    def halved(net, low, high, **how):
        return real(net, (3 * low + high) / 4, (low + 3 * high) / 4, **how)

    monkeypatch.setattr(gains, "bound_network", halved)
    assert flipped(net, x, y, 0.13, certify(net, x, y, 0.13).verified) > 0, "the same attack sees half a box"


def test_a_certificate_is_of_one_sample_whatever_stands_beside_it():
    net, x = network(3, **ROUGH), draws(3, 4)
    y = net(x).argmax(1)
    together = certify(net, x, y, 0.01).margin
    alone = torch.cat([certify(net, x[k : k + 1], y[k : k + 1], 0.01).margin for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert bool((certify(net.float(), x, y, 0.01).margin - alone).abs().max() < 1e-4)


def test_at_a_point_the_bounds_are_the_output_and_the_graph_is_a_path():
    net, x = network(3, **ROUGH), draws(1, 4)
    out = net(x)[0]
    for low, high in (tuple(b[0] for b in interval_bounds(net, x, x)), (linear_bounds(net, x, x).lower, linear_bounds(net, x, x).upper)):  # fmt: skip
        torch.testing.assert_close(low, out, rtol=0, atol=1e-6)
        torch.testing.assert_close(high, out, rtol=0, atol=1e-6)
    graph = trajectory_graph(net[2], net[:2](x), net[:2](x))
    assert graph.n_trajectories == 1
    assert graph.edges == [(k, k + 1) for k in range(len(graph.nodes) - 1)]


def test_affine_dynamics_have_exact_bounds():
    net = network(5, inputs=4, width=4, front=False)
    block = NeuralODEBlock(nn.Sequential(net[0].func[0], net[0].func[2]), atol=1e3).double().eval()
    block.h0.fill_(0.5)
    net, low = nn.Sequential(block, net[1]), draws(1, 4) - 0.2
    corners = low + 0.4 * torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double()
    assert trajectory_graph(block, low, low + 0.4).n_trajectories == 1
    C = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    out, bounds = net(corners) @ C.T, linear_bounds(net, low, low + 0.4, C=C)
    torch.testing.assert_close(bounds.lower, out.amin(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(bounds.upper, out.amax(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(corners @ bounds.A_lower.T + bounds.c_lower, out, rtol=0, atol=1e-7)


def test_convolutions_and_pools_are_bounded_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        func = nn.Sequential(TimeConv2d(3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1), NeuralODEBlock(func, atol=1.0),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Linear(3, 3),
        ).double().eval()  # fmt: skip
    net[3].h0.fill_(0.5)
    x = draws(1, 2, 6, 6)
    low, high = x - 0.05, x + 0.05
    points = low + 0.1 * (draws(100, 2, 6, 6, seed=2) > 0.5)
    points = torch.cat(
        [
            points,
            attack(
                net,
                low.expand(6, -1, -1, -1),
                high.expand(6, -1, -1, -1),
                torch.cat([torch.eye(3), -torch.eye(3)]).double(),
                restarts=3,
            )[0],
        ]
    )
    out, box, lines = net(points), interval_bounds(net, low, high), linear_bounds(net, low, high)
    for lower, upper in ((box[0][0], box[1][0]), (lines.lower, lines.upper)):
        assert bool((out >= lower).all() & (out <= upper).all())
    flat = points.flatten(1)
    assert bool((flat @ lines.A_lower.T + lines.c_lower <= out).all())
    assert bool((flat @ lines.A_upper.T + lines.c_upper >= out).all())
    assert float((lines.upper - lines.lower).mean()) < 0.7 * float((box[1] - box[0]).mean())


def test_regression_is_robust_where_no_error_grows_beyond_what_is_allowed():
    net, x = network(3, **ROUGH), draws(6, 4)
    y = net(x).detach() + 0.3 * draws(6, 3, seed=4) - 0.1
    clean = (net(x) - y).abs().mean(1)
    for eps in (0.003, 0.03):
        certificate = certify_regression(net, x, y, eps, nu=0.2, delta=0.02)
        weaker = certify_regression(net, x, y, eps, nu=0.2, delta=0.02, method="box")
        assert bool((certificate.margin >= weaker.margin - 1e-9).all())
        near = x[:, None] + eps * (2 * draws(6, 200, 4, seed=5) - 1)
        worst = (net(near.flatten(0, 1)).view(6, 200, 3) - y[:, None]).abs().mean(2).amax(1)
        assert bool((certificate.margin <= 1.2 * clean + 0.02 - worst).all())
        assert torch.equal(certificate.verified, certificate.margin > 0)
    at_point = certify_regression(net, x, y, 0.0, nu=0.2, delta=0.02).margin
    torch.testing.assert_close(at_point, 0.2 * clean + 0.02, rtol=0, atol=1e-6)


def test_paths_are_counted_and_all_states_of_the_rules_are_nodes(as_a_user):
    block = network(front=False, method="bosh3")[0]
    low, high = torch.full((1, 6), -1e3).double(), torch.full((1, 6), 1e3).double()
    graph = trajectory_graph(block, low, high)  # of which every transition is possible
    reached, waiting = set(), [(Fraction(0), Fraction(1, 2), 0, False)]
    while waiting:  # the rules, with fractions
        t, h, clips, forced = state = waiting.pop()
        if state in reached or t == 1:
            continue
        reached.add(state)
        for grown in (h,) if forced else (h, 2 * h):
            rest = 1 - t - h
            seen = clips if forced else max(clips, 1)
            waiting.append((t + h, min(grown, rest), seen if grown > rest else clips, forced))
        if not forced and clips == 0:
            waiting.append((t, h / 2, 0, False) if h / 2 >= Fraction(0.02) else (t, h, 0, True))
        elif not forced:
            waiting.append((t, h / 2, 2, False) if clips == 1 else (t, h, 0, True))
    assert reached == {tuple(node) for node in graph.nodes[:-1]}
    assert graph.nodes[0] == Step(Fraction(0), Fraction(1, 2))
    net, x = network(**ROUGH), torch.full((1, 4), 0.5).double()
    few = trajectory_graph(net[2], *interval_bounds(net[:2], x - 0.01, x + 0.01))
    after = {k: [b for a, b in few.edges if a == k] for k in range(len(few.nodes))}

    def walk(k):
        return 1 if k == len(few.nodes) - 1 else sum(walk(b) for b in after[k])

    assert 1 < few.n_trajectories < 1e5
    assert walk(0) == few.n_trajectories


def test_a_graph_that_is_too_large_or_numbers_that_overflow_prove_nothing(monkeypatch):
    net, x = network(3, **ROUGH), draws(3, 4)
    y = net(x).argmax(1)
    real = gains.bound_network
    monkeypatch.setattr(gains, "bound_network", lambda *given, **how: real(*given, max_nodes=20, **how))
    limited = certify(net, x, y, 0.05)
    assert bool((limited.margin == -float("inf")).any())
    assert not limited.verified[limited.margin == -float("inf")].any()


@pytest.mark.parametrize("kind", ["lower", "upper"])
def test_an_aggregated_bound_is_below_both_and_is_the_chord(kind):
    d, sign = 3, 1 if kind == "lower" else -1
    low, high = -0.5 * draws(d, seed=1), 0.5 * draws(d, seed=2)
    A1, A2 = (
        torch.randn(200, d, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (3, 4)
    )
    c1, c2 = draws(200, seed=5), draws(200, seed=6)
    A, c = aggregate_linear_bounds(A1, c1, A2, c2, low, high, kind=kind)
    corners = low + (high - low) * torch.tensor(list(itertools.product((0.0, 1.0), repeat=d))).double()
    first, second, joined = (corners @ a.T + b for a, b in ((A1, c1), (A2, c2), (A, c)))
    best = sign * torch.minimum(sign * first, sign * second)
    assert bool((sign * joined <= sign * best + 1e-12).all())
    gap = first - second
    ends = gap.amin(0), gap.amax(0)
    crossing = (ends[0] < 0) & (ends[1] > 0)
    assert 20 < int(crossing.sum()) < 180
    # a chord of min(D, 0), or of max, from one end of D to the other: tight at both
    at = torch.stack([gap.argmin(0), gap.argmax(0)])
    torch.testing.assert_close(joined.gather(0, at)[:, crossing], best.gather(0, at)[:, crossing])
    torch.testing.assert_close(joined[:, ~crossing], best[:, ~crossing])
    same_A, same_c = aggregate_linear_bounds(A1, c1, A1, c1, low, high, kind=kind)
    assert torch.equal(same_A, A1)
    assert torch.equal(same_c, c1)
