"""Neuro CROSS exchange: exchanges against plain loops, the network's invariances, optima by brute force."""

import functools
import itertools
import logging
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from posterity.combinatorial import (
    DecrementNet,
    FleetProblem,
    cross_exchange,
    fit_decrements,
    solve_min_max,
)
from posterity.combinatorial.segment_exchanges import shortened
from posterity.testing import check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(n, kind, seed=0, dtype=torch.float64):
    """Return a problem of three vehicles."""
    g = rng(seed)
    places, depots = (torch.rand(k, 2, generator=g, dtype=dtype) for k in (n, 3))
    demands = torch.rand(n, generator=g, dtype=dtype)
    options = {
        "one depot": ([0, 0, 0], {}),
        "several": ([0, 1, 2], {}),
        "flexible": ([0, 1, 1], {"end": "any"}),
        "capacity": ([0, 0, 0], {"demands": demands, "capacity": 0.45 * float(demands.sum()) + 0.3}),
        "capacities": (
            [2, 0, 1],
            {"demands": demands, "capacity": demands.sum() * torch.tensor([0.6, 0.5, 0.3])},
        ),
    }
    if kind == "roads":
        between, leave, enter = (torch.rand(k, n, generator=g, dtype=dtype) for k in (n, 3, 3))
        return FleetProblem(between, leave, enter)
    vehicles, more = options[kind]
    return FleetProblem.from_coords(places, depots, vehicles, **more)


KINDS = ("one depot", "several", "flexible", "capacity", "capacities", "roads")


def length(problem, k, route):
    """Return a route's length by a plain loop."""
    if not route:
        return 0.0
    total = float(problem.leave[k, route[0]]) + float(problem.enter[k, route[-1]])
    for u, v in itertools.pairwise(route):
        total += float(problem.between[u, v])
    return total


def fits(problem, k, route):
    if problem.capacity is None:
        return True
    room = problem.capacity[k] if isinstance(problem.capacity, torch.Tensor) else problem.capacity
    return sum(float(problem.demands[v]) for v in route) <= float(room) * (1 + 1e-9)


def swapped(r, s, a, b, c, d):
    return r[:a] + s[c:d] + r[b:], s[:c] + r[a:b] + s[d:]


def by_loops(problem, plan, i, j):
    """Return the best decrement of each start by trying every stop."""
    r, s = plan[i], plan[j]
    old = max(length(problem, i, r), length(problem, j, s))
    table = []
    for a, c in itertools.product(range(len(r) + 1), range(len(s) + 1)):
        best = 0.0
        for b, d in itertools.product(range(a, len(r) + 1), range(c, len(s) + 1)):
            one, two = swapped(r, s, a, b, c, d)
            if fits(problem, i, one) and fits(problem, j, two):
                best = max(best, old - max(length(problem, i, one), length(problem, j, two)))
        table.append(best)
    return torch.tensor(table, dtype=torch.float64)


def check_plan(problem, plan):
    """Hold a plan against its problem: partition, loads, lengths, value."""
    assert sorted(v for route in plan.routes for v in route) == list(range(len(problem.between)))
    assert all(type(v) is int for route in plan.routes for v in route)
    assert all(fits(problem, k, route) for k, route in enumerate(plan.routes))
    lengths = [length(problem, k, route) for k, route in enumerate(plan.routes)]
    torch.testing.assert_close(
        plan.lengths.double(), torch.tensor(lengths, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    assert plan.value == pytest.approx(max(lengths), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_exchanges_are_the_best_of_plain_loops(kind):
    problem, plan = drawn(9, kind), [[0, 1, 2, 3, 4], [5, 6, 7, 8], []]
    if "capacit" in kind:
        plan = solve_min_max(problem).routes  # one that fits
    for i, j in ((0, 1), (1, 0), (2, 1), (0, 2)):
        want = by_loops(problem, plan, i, j)
        best = cross_exchange(problem, plan, i, j)
        torch.testing.assert_close(best.decrement, want, rtol=0, atol=1e-12)
        old = max(length(problem, i, plan[i]), length(problem, j, plan[j]))
        for (a, c), (b, d), gain in zip(
            best.start.tolist(), best.stop.tolist(), best.decrement.tolist(), strict=True
        ):
            assert a <= b and c <= d
            one, two = swapped(plan[i], plan[j], a, b, c, d)
            new = max(length(problem, i, one), length(problem, j, two))
            assert gain == pytest.approx(max(0.0, old - new), abs=1e-12)
            assert fits(problem, i, one) and fits(problem, j, two)


def test_exchanges_keep_their_figures_in_float32_and_below():
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        problem, plan = drawn(8, "flexible", dtype=dtype), [[0, 1, 2, 3, 4], [5, 6, 7], []]
        best = cross_exchange(problem, plan, 0, 1)
        assert best.decrement.dtype == problem.lengths(plan).dtype == dtype
        torch.testing.assert_close(best.decrement.double(), by_loops(problem, plan, 0, 1), rtol=0, atol=atol)
        check = solve_min_max(problem, plan)
        assert check.lengths.dtype == dtype and check.value <= max(
            length(problem, k, r) for k, r in enumerate(plan)
        )


def test_starts_that_are_given_have_the_values_of_all():
    problem, plan = drawn(11, "capacity"), None
    plan = solve_min_max(problem).routes
    every = cross_exchange(problem, plan, 0, 1)
    rows = torch.randperm(len(every.start), generator=rng())[:7]
    some = cross_exchange(problem, plan, 0, 1, starts=every.start[rows].int())
    assert torch.equal(some.start, every.start[rows])
    assert torch.equal(some.decrement, every.decrement[rows])
    none = cross_exchange(problem, plan, 0, 1, starts=torch.empty(0, 2, dtype=torch.int64))
    assert len(none.start) == len(none.stop) == len(none.decrement) == 0


@pytest.mark.parametrize("kind", ["several", "capacities"])
def test_parts_of_a_table_change_nothing(monkeypatch, kind):
    problem = drawn(17, kind)
    plan = solve_min_max(problem).routes
    whole = cross_exchange(problem, plan, 0, 1)
    for entries in (1, 100, 1000):
        monkeypatch.setattr("posterity.combinatorial.segment_exchanges.CACHED", entries)
        part = cross_exchange(problem, plan, 0, 1)
        assert torch.equal(part.start, whole.start)
        assert torch.equal(part.decrement, whole.decrement)


def test_lengths_are_those_of_a_plain_loop_whatever_the_diagonal():
    for kind in KINDS:
        problem, plan = drawn(7, kind), [[3, 1], [], [0, 2, 5, 4, 6]]
        if "capacit" in kind:
            problem = FleetProblem(problem.between, problem.leave, problem.enter)
        want = [length(problem, k, route) for k, route in enumerate(plan)]
        torch.testing.assert_close(problem.lengths(plan), torch.tensor(want, dtype=torch.float64))
        odd = problem.between.clone().fill_diagonal_(9999)
        assert torch.equal(
            FleetProblem(odd, problem.leave, problem.enter).lengths(plan), problem.lengths(plan)
        )


def test_a_flexible_end_is_the_nearest_depot():
    places, depots = torch.tensor([[0.0, 1.0], [9.0, 1.0]]), torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    problem = FleetProblem.from_coords(places, depots, [0, 1], end="any")
    assert problem.lengths([[0, 1], []]).tolist() == [1 + 9 + 1, 0]
    assert FleetProblem.from_coords(places, depots, [0, 1]).lengths([[0, 1], []])[0] > 19


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_order_is_left_only_where_no_change_of_one_stretch_helps(symmetric):
    for seed in range(5):
        full = np.random.default_rng(seed).uniform(size=(11, 11))
        full = full + full.T if symmetric else full
        route = [9, *random.Random(seed).sample(range(9), 9), 10]

        def total(stops, full=full):
            return sum(full[u, v] for u, v in itertools.pairwise(stops))

        found = shortened(route, full, symmetric)
        assert sorted(found) == sorted(route) and found[0] == 9 and found[-1] == 10
        assert total(found) <= total(route)
        for i, j in itertools.combinations(range(1, 11), 2):
            if symmetric:
                assert total(found[:i] + found[i:j][::-1] + found[j:]) >= total(found) - 1e-9
            elif j - i <= 3:
                rest = found[:i] + found[j:]
                for k in range(1, len(rest)):
                    assert total(rest[:k] + found[i:j] + rest[k:]) >= total(found) - 1e-9


class OfNumbers(nn.Module):
    """The network as a function of tensors, all tables in one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, between, leave, enter):
        tables = self.net(FleetProblem(between, leave, enter), [[0, 1, 2, 5], [3, 4], []], [(0, 1), (2, 0)])
        return torch.cat([table.flatten() for table in tables])


def network(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DecrementNet(**options)


def test_the_network_passes_the_checks_of_a_layer(as_a_user):
    problem = drawn(6, "roads", dtype=torch.float32)
    check_layer(
        OfNumbers(network(width=12)), problem.between, problem.leave, problem.enter, shape=(5 * 3 + 1 * 5,)
    )


def test_tables_of_the_network_follow_what_is_done_to_the_places():
    net = network().double()
    g = rng(3)
    places, depots = (torch.rand(n, 2, generator=g, dtype=torch.float64) for n in (12, 2))
    demands = torch.rand(12, generator=g, dtype=torch.float64)
    plan = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11]]

    def tables(move, plan=plan, order=slice(None), weight=1.0):
        problem = FleetProblem.from_coords(
            move(places)[order],
            move(depots),
            [0, 1, 0],
            end="any",
            demands=weight * demands[order],
            capacity=9.0 * weight,
        )
        return net(problem, plan, [(0, 1), (1, 0), (0, 2)])

    base = tables(lambda x: x)
    assert [table.shape for table in base] == [(8, 4), (4, 8), (8, 3)]
    torch.testing.assert_close(base[1], base[0].T, rtol=0, atol=1e-10)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    order = torch.randperm(12, generator=g)
    renumbered = [[order.tolist().index(v) for v in route] for route in plan]
    for again, factor in (
        (tables(lambda x: x.flip(1)), 1),
        (tables(lambda x: x @ turn + 5), 1),
        (tables(lambda x: 100 * x), 100),
        (tables(lambda x: x, weight=7.0), 1),
        (tables(lambda x: x, plan=renumbered, order=order), 1),
    ):
        for one, two in zip(again, base, strict=True):
            torch.testing.assert_close(one, factor * two, rtol=1e-8, atol=1e-9)


def test_a_pair_alone_has_the_table_that_it_has_among_others(monkeypatch):
    net, problem = network(), drawn(12, "several", dtype=torch.float32)
    plan = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11], []]
    pairs = [(0, 1), (0, 2), (1, 2)]
    together = net(problem, plan, pairs)
    monkeypatch.setattr("posterity.combinatorial.exchange_network.TOGETHER", 1)
    for pair, table, apart in zip(pairs, together, net(problem, plan, pairs), strict=True):
        torch.testing.assert_close(net(problem, plan, [pair])[0], table, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(apart, table, rtol=1e-4, atol=1e-5)
    assert net(problem, plan, []) == []


def test_training_learns_which_starts_pay_and_leaves_the_rest_alone():
    net, state = network(1, width=24, n_layers=2), torch.random.get_rng_state()
    net.eval()
    net.norm.requires_grad_(False)
    losses = fit_decrements(net, n_samples=60, n_steps=60, batch_size=8, generator=rng())
    assert len(losses) == 60 and sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not net.training and torch.equal(net.norm.weight, torch.ones(24)) and net.embed.weight.grad is None
    ranks = []
    for seed in range(8):
        problem, plan = (
            drawn(20, "one depot", seed, torch.float32),
            [list(range(12)), list(range(12, 20)), []],
        )
        truth = cross_exchange(problem, plan, 0, 1).decrement
        with torch.no_grad():
            (table,) = net(problem, plan, [(0, 1)])
        ranks.append(np.corrcoef(table.flatten(), truth)[0, 1])
    assert np.mean(ranks) > 0.5


def test_training_takes_what_the_user_samples_and_repeats():
    seen = []

    def sample(generator):
        problem = drawn(6, "capacity", int(torch.randint(100, (), generator=generator)))
        seen.append(problem)
        return problem, solve_min_max(problem).routes

    nets = [network(width=8) for _ in range(2)]
    with torch.inference_mode():
        one = fit_decrements(nets[0], sample, n_samples=5, n_steps=1, batch_size=8, generator=rng())
    two = fit_decrements(nets[1], sample, n_samples=5, n_steps=1, batch_size=8, generator=rng())
    assert one == two and len(seen) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_one_and_no_exchange_of_its_longest_route_is_left(kind):
    for seed in (0, 1):
        problem = drawn(12, kind, seed)
        plan = solve_min_max(problem)
        check_plan(problem, plan)
        assert plan.converged
        i = int(plan.lengths.argmax())
        for j in {0, 1, 2} - {i}:
            assert by_loops(problem, plan.routes, i, j).max() <= 1e-6 * plan.value + 1e-9
        if "capacit" not in kind:
            start = [list(range(8)), list(range(8, 12)), []]
            again = solve_min_max(problem, start, net=network(), n_perturbations=2, generator=rng())
            check_plan(problem, again)
            assert again.value <= max(length(problem, k, route) for k, route in enumerate(start))


def test_with_every_start_picked_any_network_makes_the_same_exchanges():
    problem, plan = drawn(14, "flexible"), [list(range(14)), [], []]
    one, two = (solve_min_max(problem, plan, net=net, top_k=500) for net in (None, network()))
    assert one.routes == two.routes and one.n_evaluated == two.n_evaluated and one.n_iter == two.n_iter > 0
    assert solve_min_max(problem, plan, net=network(), top_k=1).n_evaluated < one.n_evaluated / 4


def test_a_network_that_says_nothing_costs_no_correctness():
    class Nothing(nn.Module):
        def forward(self, problem, routes, pairs):
            assert not self.training
            return [torch.full((len(routes[i]) + 1, len(routes[j]) + 1), torch.nan) for i, j in pairs]

    problem, net = drawn(12, "capacity"), Nothing()
    check_plan(problem, solve_min_max(problem, net=net, n_perturbations=3, generator=rng()))
    assert net.training


def optimum(problem):
    """Return the best value of two vehicles, by all paths through every subset."""
    n, between = len(problem.between), problem.between.tolist()
    least = []
    for k in (0, 1):
        leave, enter = problem.leave[k].tolist(), problem.enter[k].tolist()

        @functools.cache
        def reach(subset, last, leave=leave):
            rest = subset & ~(1 << last)
            if not rest:
                return leave[last]
            return min(reach(rest, v) + between[v][last] for v in range(n) if rest >> v & 1)

        least.append(
            [
                min((reach(part, v) + enter[v] for v in range(n) if part >> v & 1), default=0.0)
                for part in range(1 << n)
            ]
        )
    return min(max(least[0][part], least[1][(1 << n) - 1 - part]) for part in range(1 << n))


def test_two_vehicles_find_the_optimum_of_all_plans():
    found = 0
    for seed in range(20):
        g = rng(seed)
        problem = FleetProblem.from_coords(
            torch.rand(7, 2, generator=g, dtype=torch.float64), torch.rand(2, 2, generator=g, dtype=torch.float64),
            [0, seed % 2], end=("start", "any")[seed // 2 % 2],
        )  # fmt: skip
        best, plan = optimum(problem), solve_min_max(problem, n_perturbations=20, generator=g)
        check_plan(problem, plan)
        assert plan.value >= best - 1e-9
        found += plan.value <= best + 1e-9
    assert found >= 18


def test_places_on_a_line_go_to_a_vehicle_a_side_from_any_start():
    places = torch.tensor([[x, 0.0] for x in (-3, -2, -1, 1, 2, 3)], dtype=torch.float64)
    problem = FleetProblem.from_coords(places, torch.zeros(1, 2, dtype=torch.float64), [0, 0])
    for seed in range(12):
        order = random.Random(seed).sample(range(6), 6)
        plan = solve_min_max(problem, [order[: seed % 7], order[seed % 7 :]])
        assert plan.value == pytest.approx(6)
        assert sorted(map(sorted, plan.routes)) == [[0, 1, 2], [3, 4, 5]]
    assert solve_min_max(problem).value == pytest.approx(6)


def test_a_start_is_found_where_loads_hardly_fit():
    places, depot = torch.rand(12, 2, generator=rng()), torch.rand(1, 2, generator=rng(1))
    demands = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0] * 2)
    problem = FleetProblem.from_coords(
        places, depot, [0] * 6, demands=demands, capacity=7.0
    )  # all of it is used
    plan = solve_min_max(problem, n_perturbations=2, generator=rng())
    check_plan(problem, plan)
    problem = FleetProblem.from_coords(places[:3], depot, [0, 0], demands=torch.full((3,), 4.0), capacity=7.0)
    with pytest.raises(ValueError, match="routes must be given here: no plan was found whose loads fit"):
        solve_min_max(problem)
    idle = FleetProblem.from_coords(places, depot, [0, 0], demands=torch.zeros(12), capacity=0.0)
    check_plan(idle, solve_min_max(idle))


def test_the_same_generator_gives_the_same_plan_and_no_other_state_is_touched():
    problem, state = drawn(18, "one depot"), torch.random.get_rng_state()
    plans = [solve_min_max(problem, n_perturbations=4, generator=rng(seed)) for seed in (5, 5, 6)]
    assert plans[0].routes == plans[1].routes and plans[0].n_evaluated == plans[1].n_evaluated
    assert plans[0].n_evaluated != plans[2].n_evaluated
    assert torch.equal(torch.random.get_rng_state(), state)
    once = solve_min_max(problem)
    assert all(plan.value <= once.value for plan in plans)


def test_the_time_ends_it_and_improvements_are_said(caplog):
    problem, seconds = drawn(90, "one depot"), 0.3
    with caplog.at_level(logging.INFO, "posterity"):
        began = time.monotonic()
        plan = solve_min_max(problem, n_perturbations=10**6, time_limit=seconds, generator=rng())
        spent = time.monotonic() - began
    assert seconds <= spent < seconds + 0.1 and not plan.converged
    check_plan(problem, plan)
    said = [record.args[0] for record in caplog.records]
    assert said == sorted(set(said), reverse=True) and said[-1] == pytest.approx(plan.value)
    early = solve_min_max(problem, time_limit=1e-9)
    check_plan(problem, early)
    assert not early.converged and early.n_iter == 0
    assert solve_min_max(drawn(8, "one depot"), time_limit=60.0).converged


def test_places_that_coincide_and_a_single_customer_are_no_trouble():
    same = FleetProblem.from_coords(torch.ones(5, 2), torch.ones(1, 2), [0, 0])
    plan = solve_min_max(same, net=network(), n_perturbations=2, generator=rng())
    check_plan(same, plan)
    assert plan.value == 0 and all(torch.isfinite(t).all() for t in network()(same, plan.routes, [(0, 1)]))
    single = FleetProblem.from_coords(torch.ones(1, 2), torch.zeros(1, 2), [0, 0, 0])
    plan = solve_min_max(single, n_perturbations=3, generator=rng())
    check_plan(single, plan)
    assert plan.value == pytest.approx(2 * math.sqrt(2))
    for factor in (1e-12, 1e12):
        base, far = drawn(15, "several"), None
        far = FleetProblem(factor * base.between, factor * base.leave, factor * base.enter)
        assert solve_min_max(far).value == pytest.approx(factor * solve_min_max(base).value, rel=1e-9)
