"""ROCO: edits against optima by brute force, schedules against a slow simulation, the attackers' promises."""

import itertools
import math

import numpy as np
import pytest
import torch

from posterity.combinatorial import (
    ATSP,
    AttackResult,
    Coverage,
    EditPolicy,
    Jobs,
    Scheduling,
    Sets,
    attack,
)

METHODS = ("random", "anneal", "genetic", "policy")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def policy(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EditPolicy(**options)


def costs(n, seed=0, high=100):
    return np.random.default_rng(seed).integers(0, high, (n, n)).astype(float)


def jobs(n, seed=0, kinds=2, chance=0.4):
    rng = np.random.default_rng(seed)
    pairs = [(i, j) for i, j in itertools.combinations(range(n), 2) if rng.random() < chance]
    duration = rng.integers(1, 6, n).astype(float)
    resources = rng.integers(1, 10, (n, kinds)) / 10
    order = rng.permutation(n)
    before = np.array([(order[i], order[j]) for i, j in pairs], dtype=np.int64).reshape(-1, 2)
    return Jobs(duration, resources, before)


def sets(n, elements, limit, seed=0):
    rng = np.random.default_rng(seed)
    return Sets(rng.random((n, elements)) < 0.3, rng.integers(1, 20, elements).astype(float), limit)


def tour_cost(d, tour):
    return sum(float(d[i, j]) for i, j in zip(tour, [*tour[1:], tour[0]], strict=True))


def best_tour(d):
    """Return the optimum by all orders."""
    tours = ([0, *rest] for rest in itertools.permutations(range(1, len(d))))
    return min(tours, key=lambda tour: tour_cost(d, tour))


def covered(instance, chosen):
    total = 0.0
    for e, weight in enumerate(instance.weight):
        if any(instance.member[k, e] for k in chosen):
            total += float(weight)
    return total


def best_sets(instance):
    every = itertools.combinations(range(len(instance.member)), instance.limit)
    return list(max(every, key=lambda chosen: covered(instance, chosen)))


def runs(instance, starts):
    """Hold start times against precedences and capacities at every event, and return the makespan, by plain loops."""
    ends = [float(s) + float(d) for s, d in zip(starts, instance.duration, strict=True)]
    for i, j in instance.before.tolist():
        assert starts[j] >= ends[i] - 1e-9
    for now in starts:
        for r in range(instance.resources.shape[1]):
            used = sum(
                float(instance.resources[k, r])
                for k in range(len(ends))
                if starts[k] <= now + 1e-9 and ends[k] > now + 1e-9
            )
            assert used <= 1 + 1e-9
    return max(ends)


def best_starts(instance):
    """Return an optimal schedule: jobs in every order, each as early as it fits among those before."""
    n, kinds = instance.resources.shape
    before = [[i for i, j in instance.before.tolist() if j == job] for job in range(n)]
    duration, demand = instance.duration.tolist(), instance.resources.tolist()
    best = [math.inf, None]

    def fits(starts, job, at):
        times = [at] + [s for s in starts.values() if at < s < at + duration[job]]
        for now in times:
            for r in range(kinds):
                used = sum(demand[k][r] for k, s in starts.items() if s <= now < s + duration[k])
                if used + demand[job][r] > 1 + 1e-9:
                    return False
        return True

    def extend(starts):
        span = max((s + duration[k] for k, s in starts.items()), default=0.0)
        if span >= best[0]:
            return
        if len(starts) == n:
            best[:] = span, dict(starts)
            return
        for job in range(n):
            if job not in starts and all(i in starts for i in before[job]):
                ready = max((starts[i] + duration[i] for i in before[job]), default=0.0)
                at = min(
                    t
                    for t in [ready, *(s + duration[k] for k, s in starts.items())]
                    if t >= ready and fits(starts, job, t)
                )
                starts[job] = at
                extend(starts)
                del starts[job]

    extend({})
    return np.array([best[1][k] for k in range(n)])


CASES = {
    "atsp": (ATSP(), lambda seed: costs(6, seed), best_tour, tour_cost),
    "scheduling": (Scheduling(), lambda seed: jobs(6, seed), best_starts, runs),
    "coverage": (Coverage(), lambda seed: sets(7, 9, 3, seed), best_sets, covered),
}
BIG = {
    "atsp": (ATSP(), lambda seed: costs(12, seed)),
    "scheduling": (Scheduling(), lambda seed: jobs(14, seed)),
    "coverage": (Coverage(), lambda seed: sets(12, 20, 4, seed)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_edit_worsens_the_optimum_or_the_answer_in_hand(name):
    problem, make, best, value = CASES[name]
    for seed in range(3):
        instance = make(seed)
        problem.validate(instance)
        solution = problem.solvers[next(iter(problem.solvers))](instance)
        now, optimum = problem.value(instance, solution), problem.value(instance, best(instance))
        assert now == pytest.approx(value(instance, solution))
        edits = problem.edits(instance, solution)
        assert edits.dtype == np.int64 and edits.tolist() == sorted(edits.tolist()) and len(edits)
        for edit in edits.tolist()[:: 3 if name == "atsp" else 1]:
            changed = problem.apply(instance, tuple(edit))
            problem.validate(changed)
            assert problem.value(changed, solution) == now
            after = problem.value(changed, best(changed))
            assert after <= optimum if problem.sense == "min" else after >= optimum


def test_edits_are_all_that_there_are_and_change_one_thing_in_a_copy():
    d = costs(5)
    tour = [0, 3, 1, 4, 2]
    arcs = {(0, 3), (3, 1), (1, 4), (4, 2), (2, 0)}
    want = [(i, j) for i in range(5) for j in range(5) if i != j and (i, j) not in arcs]
    assert [tuple(edit) for edit in ATSP().edits(d, tour).tolist()] == want
    kept = d.copy()
    changed = ATSP(0.25).apply(d.astype(int), (2, 4))
    assert changed.dtype == float and changed[2, 4] == 0.25 * d[2, 4] and np.array_equal(d, kept)
    assert (changed != d).sum() == (d[2, 4] > 0)
    assert ATSP().apply(d.astype(np.float32), (0, 1)).dtype == np.float32
    instance = sets(4, 6, 2)
    found = {tuple(edit) for edit in Coverage().edits(instance, [1]).tolist()}
    assert found == {(k, e) for k in (0, 2, 3) for e in range(6) if not instance.member[k, e]}
    k, e = min(found)
    more = Coverage().apply(instance, (k, e))
    assert more.member[k, e] and more.member.sum() == instance.member.sum() + 1 and not instance.member[k, e]
    chain = Jobs(np.ones(3), np.ones((3, 1)), np.array([[1, 2], [0, 1]]))
    starts = Scheduling().solvers["tetris"](chain)
    assert Scheduling().edits(chain, starts).tolist() == [[0, 1], [1, 2]]
    assert Scheduling().apply(chain, (1, 2)).before.tolist() == [[0, 1]] and len(chain.before) == 2


def slow_schedule(rule, instance):
    """Return start times by an event simulation that looks at everything at each event."""
    n, kinds = instance.resources.shape
    before = [{i for i, j in instance.before.tolist() if j == job} for job in range(n)]
    after = [{j for i, j in instance.before.tolist() if i == job} for job in range(n)]
    duration, demand = instance.duration.tolist(), instance.resources.tolist()

    def path(job):
        return duration[job] + max((path(k) for k in after[job]), default=0.0)

    starts, now = {}, 0.0
    while len(starts) < n:
        ended = {k for k, s in starts.items() if s + duration[k] <= now}
        used = [sum(demand[k][r] for k in starts if k not in ended) for r in range(kinds)]
        score = {
            "shortest-first": lambda k: duration[k],
            "critical-path": lambda k: -path(k),
            "tetris": lambda k, used=tuple(used): -sum(demand[k][r] * (1 - used[r]) for r in range(kinds)),
        }[rule]
        ready = [k for k in range(n) if k not in starts and before[k] <= ended]
        for k in sorted(ready, key=lambda k: (round(score(k), 9), k)):
            if all(used[r] + demand[k][r] <= 1 + 1e-9 for r in range(kinds)):
                starts[k] = now
                used = [used[r] + demand[k][r] for r in range(kinds)]
        now = min(s + duration[k] for k, s in starts.items() if s + duration[k] > now)
    return [starts[k] for k in range(n)]


@pytest.mark.parametrize("rule", ["shortest-first", "critical-path", "tetris"])
def test_list_schedules_are_those_of_a_slow_simulation(rule):
    for seed in range(12):
        instance = jobs(15, seed, kinds=1 + seed % 3, chance=0.05 * (seed % 4))
        # shares and times in 64ths, so that sums are exact and equal ends are equal
        instance = instance._replace(resources=np.ceil(instance.resources * 16) / 16)
        starts = Scheduling().solvers[rule](instance)
        assert starts.tolist() == slow_schedule(rule, instance)
        assert Scheduling().value(instance, starts) == runs(instance, starts)


def test_a_precedence_less_can_make_a_list_schedule_longer_within_grahams_bound():
    problem, solver, longer = Scheduling(), Scheduling().solvers["critical-path"], 0
    for seed in range(60):
        m = 2 + seed % 2
        instance = jobs(8, seed, kinds=1, chance=0.3)._replace(resources=np.full((8, 1), 1 / m))
        before = problem.value(instance, solver(instance))
        for edit in problem.edits(instance, solver(instance)).tolist():
            changed = problem.apply(instance, tuple(edit))
            after = problem.value(changed, solver(changed))
            if after > before and longer < 3:
                longer += 1
                for each, value in ((instance, before), (changed, after)):
                    assert value <= (2 - 1 / m) * runs(each, best_starts(each)) + 1e-9
    assert longer == 3


def test_simple_tours_are_those_of_plain_loops():
    for seed in range(5):
        d = costs(11, seed, 10**6)
        tour = [0]
        while len(tour) < 11:
            tour.append(min((c for c in range(11) if c not in tour), key=lambda c: d[tour[-1], c]))
        assert ATSP().solvers["nearest"](d) == tour
        tour = [0]
        while len(tour) < 11:
            left = [c for c in range(11) if c not in tour]
            city = max(left, key=lambda c: min(d[t, c] for t in tour))
            places = [[*tour[: k + 1], city, *tour[k + 1 :]] for k in range(len(tour))]
            tour = min(places, key=lambda t: tour_cost(d, t) if len(t) > 1 else 0)
        assert ATSP().solvers["farthest-insertion"](d) == tour
        found = ATSP().solvers["insertion+or-opt"](d)
        assert sorted(found) == list(range(11)) and tour_cost(d, found) <= tour_cost(d, tour)
        for k, length in itertools.product(range(11), (1, 2, 3)):  # no move of a stretch is left that pays
            turned = found[k:] + found[:k]
            stretch, rest = turned[:length], turned[length:]
            for place in range(len(rest)):
                moved = rest[:place] + stretch + rest[place:]
                assert tour_cost(d, moved) >= tour_cost(d, found) - 1e-6


def test_greedy_takes_what_adds_most():
    for seed in range(5):
        instance, chosen = sets(8, 12, 3, seed), []
        for _ in range(3):
            gains = [covered(instance, [*chosen, k]) - covered(instance, chosen) for k in range(8)]
            if max(gains) > 0:
                chosen.append(gains.index(max(gains)))
        assert Coverage().solvers["greedy"](instance) == chosen
    nothing = Sets(np.zeros((2, 3), dtype=bool), np.ones(3), 2)
    assert Coverage().solvers["greedy"](nothing) == []


def equal(one, two):
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BIG)
def test_an_attack_keeps_its_promises(name, method):
    problem, make = BIG[name]
    state, net = torch.random.get_rng_state(), policy()
    for solver in [*problem.solvers.values()][: 1 if method == "policy" else 3]:
        instance = make(3)
        calls = []

        def counted(each, solver=solver, calls=calls):
            calls.append(1)
            return solver(each)

        options = {
            "method": method,
            "n_edits": 4,
            "budget": 40,
            "policy": net if method == "policy" else None,
        }
        found = attack(problem, counted, instance, **options, generator=gen())
        assert isinstance(found, AttackResult)
        assert len(calls) == found.n_calls == len(found.history) <= 41 and len(found.edits) <= 4
        assert found.history == sorted(found.history) and found.history[-1] == found.ratio >= 0
        again = instance
        for edit in found.edits:
            assert all(type(end) is int for end in edit)
            again = problem.apply(again, edit)
        assert equal(again, found.instance) and equal(instance, make(3))
        assert problem.value(again, solver(again)) == found.value
        assert problem.value(instance, solver(instance)) == found.clean
        worse = found.value - found.clean if problem.sense == "min" else found.clean - found.value
        assert found.ratio == worse / found.clean
        twin = attack(problem, solver, instance, **options, generator=gen())
        assert twin.edits == found.edits and twin.history == found.history
    assert torch.equal(torch.random.get_rng_state(), state) and net.training


@pytest.mark.parametrize("name", ["atsp", "coverage"])
def test_a_solver_that_finds_the_optimum_has_ratio_0(name):
    problem, make, best, _ = CASES[name]
    for method, seed in itertools.product(METHODS, (0, 1)):
        net = policy() if method == "policy" else None
        found = attack(
            problem, best, make(seed), method=method, n_edits=3, budget=25, policy=net, generator=gen(seed)
        )
        assert found.ratio == 0 and found.edits == [] and found.value == found.clean


def test_a_scheduler_that_finds_the_optimum_has_ratio_0():
    for method in METHODS:
        net = policy() if method == "policy" else None
        found = attack(
            Scheduling(),
            best_starts,
            jobs(6, 1),
            method=method,
            n_edits=3,
            budget=12,
            policy=net,
            generator=gen(),
        )
        assert found.ratio == 0


def test_attacks_find_what_misleads_and_more_calls_are_never_worse():
    problem, solver, d = ATSP(), ATSP().solvers["nearest"], costs(15, 5)
    random = [attack(problem, solver, d, method="random", budget=b, generator=gen(4)) for b in (10, 40, 160)]
    assert random[0].history == random[1].history[:11] and random[1].history == random[2].history[:41]
    for method in ("anneal", "genetic"):
        found = attack(problem, solver, d, method=method, budget=160, generator=gen(4))
        assert found.ratio > random[0].ratio and found.ratio > 0.05


def test_an_instance_without_edits_has_ratio_0():
    free = Jobs(np.ones(3), np.full((3, 1), 0.5), np.zeros((0, 2), dtype=int))
    full = Sets(np.ones((2, 3), dtype=bool), np.ones(3), 1)
    for problem, instance in ((Scheduling(), free), (Coverage(), full)):
        for method in METHODS:
            solver = next(iter(problem.solvers.values()))
            found = attack(problem, solver, instance, method=method, policy=policy(), generator=gen())
            assert found.ratio == 0 and found.edits == [] and found.n_calls == 1 and found.history == [0.0]
    single = Jobs(np.ones(2), np.full((2, 1), 0.5), np.array([[0, 1]]))  # one edit, and then none
    for method in METHODS:
        found = attack(
            Scheduling(), Scheduling().solvers["tetris"], single, method=method, policy=policy(), budget=7
        )
        assert found.ratio == 0 and found.n_calls <= 8


def test_a_solver_cannot_spoil_what_it_is_given_or_lie_about_what_it_found():
    def spoils(d):
        tour = ATSP().solvers["nearest"](d)
        d[:] = 0
        return tour

    d = costs(9, 1)
    honest = attack(ATSP(), ATSP().solvers["nearest"], d, generator=gen(), budget=40)
    assert attack(ATSP(), spoils, d, generator=gen(), budget=40).history == honest.history
    assert np.array_equal(d, costs(9, 1))
    buffer = np.zeros(9, dtype=int)

    def reuses(d):
        buffer[:] = ATSP().solvers["nearest"](d)
        return buffer

    assert attack(ATSP(), reuses, d, generator=gen(), budget=40).history == honest.history


def test_renumbering_permutes_the_edits():
    rng = np.random.default_rng(0)
    d, order = costs(8, 0, 10**6), rng.permutation(8)
    place = np.argsort(order)
    tour = ATSP().solvers["farthest-insertion"](d)
    moved = ATSP().edits(d[order][:, order], place[tour].tolist())
    assert {tuple(e) for e in order[moved].tolist()} == {tuple(e) for e in ATSP().edits(d, tour).tolist()}
    rng = np.random.default_rng(1)
    free = jobs(10, 2)._replace(duration=rng.uniform(1, 5, 10), resources=rng.uniform(0.1, 0.9, (10, 2)))
    order = rng.permutation(10)
    place = np.argsort(order)
    there = Jobs(free.duration[order], free.resources[order], place[free.before])
    for solver in Scheduling().solvers.values():
        starts = solver(there)
        np.testing.assert_allclose(starts, solver(free)[order])
        edits = Scheduling().edits(there, starts)
        assert {tuple(e) for e in order[edits].tolist()} == {tuple(e) for e in free.before.tolist()}


def test_extreme_costs_are_valued_rightly():
    for factor in (1e-300, 1e300):
        d = factor * costs(8)
        tour = ATSP().solvers["insertion+or-opt"](d)
        assert tour == ATSP().solvers["insertion+or-opt"](costs(8) * factor)
        assert ATSP().value(d, tour) == pytest.approx(tour_cost(d, tour))
        assert all(torch.isfinite(part).all() for part in ATSP().graph(d, tour))
    same = np.zeros((4, 4))
    assert ATSP().value(same, ATSP().solvers["insertion+or-opt"](same)) == 0
    dear = costs(9, 2)
    dear[0, 1:] = 1e15
    tour = ATSP().solvers["insertion+or-opt"](dear)
    assert sorted(tour) == list(range(9))
    odd = costs(6)
    np.fill_diagonal(odd, np.inf)
    ATSP().validate(odd)
    plain = attack(ATSP(), ATSP().solvers["nearest"], costs(6), budget=20, generator=gen())
    assert attack(ATSP(), ATSP().solvers["nearest"], odd, budget=20, generator=gen()).history == plain.history
    assert ATSP().value(costs(6)[::-1, ::-1], [0, 1, 2, 3, 4, 5]) == tour_cost(costs(6), [5, 4, 3, 2, 1, 0])
