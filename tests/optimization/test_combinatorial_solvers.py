"""Solvers against brute force over all decisions, and what the layer does with each of them."""

import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch

from posterity.optimization import (
    CombinatorialLayer,
    assignment,
    grid_shortest_path,
    ranking,
    spanning_tree,
    top_k,
    travelling_salesman,
)
from posterity.optimization import combinatorial_solvers as module
from posterity.testing import check_layer

K5 = torch.tensor(list(itertools.combinations(range(5), 2))).T
K4 = torch.tensor(list(itertools.combinations(range(4), 2))).T
# shape of one instance, and the solver
SOLVERS = {
    "top_k": ((8,), top_k(3)),
    "ranking": ((5,), ranking()),
    "assignment": ((3, 5), assignment()),
    "grid, 8": ((3, 4), grid_shortest_path(8)),
    "grid, 4": ((3, 4), grid_shortest_path(4)),
    "spanning_tree": ((10,), spanning_tree(K5, 5)),
    "tour": ((6, 6), travelling_salesman()),
}


def draw(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every_decision(name, shape):
    """All of Y, a decision a row."""
    n = math.prod(shape)
    if name == "top_k":
        return np.array([np.isin(range(n), kept) for kept in itertools.combinations(range(n), 3)], float)
    if name == "ranking":
        return np.array(list(itertools.permutations(range(n))), float)
    if name == "assignment":
        rows = []
        for columns in itertools.permutations(range(shape[1]), shape[0]):
            rows.append(np.zeros(shape))
            rows[-1][range(shape[0]), columns] = 1
        return np.array(rows).reshape(len(rows), -1)
    if name.startswith("grid"):
        return np.array([path.ravel() for path in paths(shape, int(name[-1]))])
    if name == "spanning_tree":
        return np.array(
            [np.isin(range(n), kept) for kept in itertools.combinations(range(n), 4) if is_tree(kept)], float
        )
    rows = []
    for order in itertools.permutations(range(1, shape[0])):
        rows.append(np.zeros(shape))
        for i, j in itertools.pairwise((0, *order, 0)):
            rows[-1][i, j] = rows[-1][j, i] = 1
    return np.array(rows).reshape(len(rows), -1)


def paths(shape, connectivity):
    """All simple paths from corner to corner, depth first."""
    found, goal = [], (shape[0] - 1, shape[1] - 1)

    def walk(path):
        i, j = path[-1]
        if (i, j) == goal:
            found.append(np.zeros(shape))
            found[-1][tuple(zip(*path, strict=True))] = 1
            return
        for a, b in itertools.product((-1, 0, 1), repeat=2):
            there = (i + a, j + b)
            straight = connectivity == 8 or 0 in (a, b)
            if straight and there not in path and 0 <= there[0] <= goal[0] and 0 <= there[1] <= goal[1]:
                walk([*path, there])

    walk([(0, 0)])
    return found


def is_tree(kept):
    """Whether four edges of the complete graph on five nodes join them all."""
    group = list(range(5))
    for edge in kept:
        a, b = (group[int(node)] for node in K5[:, edge])
        if a == b:
            return False
        group = [a if g == b else g for g in group]
    return True


ALL = {name: every_decision(name, shape) for name, (shape, _) in SOLVERS.items()}


def test_the_decisions_listed_here_are_all_there_are():
    assert [len(ALL[name]) for name in ("top_k", "ranking", "assignment", "spanning_tree", "tour")] == [
        56, 120, 60, 125, 120,
    ]  # fmt: skip  # binomial, factorial, 5 * 4 * 3, Cayley's 5^3, both ways round of 60


# --- the solvers ---


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_finds_one_of_its_decisions_and_none_costs_less(name):
    shape, solver = SOLVERS[name]
    costs = draw(200, *shape) - (0 if name.startswith("grid") else 0.5)
    if name == "tour":
        costs[100:] = (costs[100:] + costs[100:].mT) / 2  # the first hundred are not symmetric
    found = solver(costs)
    assert found.shape == costs.shape and found.dtype == costs.dtype
    assert np.array_equal(solver(costs.numpy()), found.numpy())
    every, flat = ALL[name], costs.flatten(1).numpy()
    assert {tuple(row) for row in found.flatten(1).numpy()} <= {tuple(row) for row in every}
    np.testing.assert_allclose((found.flatten(1).numpy() * flat).sum(1), (flat @ every.T).min(1), rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-300, 1e300])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_does_not_see_the_unit_of_its_costs(name, unit):
    shape, solver = SOLVERS[name]
    costs = 0.5 + draw(20, *shape)
    torch.testing.assert_close(solver(unit * costs), solver(costs), rtol=0, atol=0)


def test_ties_leave_exactly_k_ones_and_a_permutation():
    for k in range(1, 7):
        assert top_k(k)(torch.ones(3, 6)).sum(1).tolist() == [k] * 3
    assert ranking()(torch.zeros(2, 9)).sort(1).values.tolist() == [list(range(9))] * 2


def test_a_small_cost_beside_a_huge_one_still_counts():
    wall = torch.ones(1, 3, 3, dtype=torch.float64)
    wall[0, 1, 1] = 1e15
    wall[0, 0, 1] = 1 + 1e-12
    assert grid_shortest_path(8)(wall)[0].tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    costs = torch.tensor([[1.0, 1 + 1e-12, 1e15]], dtype=torch.float64)
    assert spanning_tree(torch.tensor([[0, 0, 1], [1, 1, 2]]), 3)(costs).tolist() == [[1, 0, 1]]


def test_free_cells_are_walked_and_negative_ones_are_free_with_one_warning():
    costs = torch.ones(1, 2, 4)
    costs[0, 0, :3] = 0.0
    solver = grid_shortest_path()
    assert solver(costs)[0].tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]
    with pytest.warns(UserWarning, match="negative costs are taken as 0"):
        found = solver(torch.where(costs == 0, -0.5, costs))
    assert found[0].tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver(-costs)


def test_many_grids_are_solved_a_part_at_a_time(monkeypatch):
    sizes, solve = [], module._shortest_paths
    monkeypatch.setattr(module, "_shortest_paths", lambda k, c: sizes.append(c.size) or solve(k, c))
    costs = draw(100, 9, 9)
    found = grid_shortest_path()(costs)
    assert max(sizes) <= module.CELLS and sum(sizes) == costs.numel()
    monkeypatch.setattr(module, "CELLS", costs.numel())
    assert torch.equal(found, grid_shortest_path()(costs)) and sizes[-1] == costs.numel()


def test_a_grid_may_be_a_cell_a_row_or_a_column():
    for shape in ((1, 1, 1), (2, 1, 5), (2, 5, 1)):
        assert grid_shortest_path(4)(torch.rand(shape)).tolist() == torch.ones(shape).tolist()


def test_a_batch_is_solved_as_its_instances_are():
    for shape, solver in [
        *SOLVERS.values(),
        ((30, 40), grid_shortest_path()),
        ((9, 9), travelling_salesman()),
    ]:
        costs = draw(40, *shape, seed=4)
        assert torch.equal(solver(costs), torch.cat([solver(one[None]) for one in costs]))


def test_of_parallel_edges_the_cheapest_counts_and_no_loop_does():
    edges = torch.tensor([[0, 1, 0, 2, 2], [1, 0, 1, 2, 1]])
    costs = torch.tensor([[3.0, 1.0, 2.0, -9.0, 5.0], [0.0, 1.0, 0.0, -9.0, 5.0]])
    assert spanning_tree(edges, 3)(costs).tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 1]]
    assert spanning_tree(torch.tensor([[0], [0]]), 1)(torch.ones(2, 1)).tolist() == [[0], [0]]


def test_trees_are_those_of_networkx():
    networkx = pytest.importorskip("networkx")
    graph = networkx.gnm_random_graph(40, 120, seed=1)
    graph.add_edges_from(networkx.path_graph(40).edges)
    edges = torch.tensor(list(graph.edges)).T
    costs = draw(1, edges.shape[1])
    for (i, j), cost in zip(edges.T.tolist(), costs[0].tolist(), strict=True):
        graph[i][j]["weight"] = cost
    size = networkx.minimum_spanning_tree(graph).size("weight")
    assert float((spanning_tree(edges, 40)(costs) * costs).sum()) == pytest.approx(size, rel=1e-12)


def test_the_heuristic_makes_a_trip_that_two_exchanges_cannot_shorten():
    pytest.importorskip("ortools")
    points = draw(2, 14, 2, seed=3)
    lengths = torch.cdist(points, points)
    trips = travelling_salesman()(lengths)
    torch.testing.assert_close(trips, trips.mT)
    for trip, length in zip(trips, lengths, strict=True):
        order = [0, int(trip[0].argmax())]
        while len(order) < 14:
            order.append(next(j for j in trip[order[-1]].nonzero()[:, 0].tolist() if j != order[-2]))
        assert sorted(order) == list(range(14))
        for i, j in itertools.combinations(range(14), 2):  # reverse what is between: 2-opt
            a, b, c, d = order[i], order[i + 1 - 14], order[j], order[j + 1 - 14]
            assert length[a, b] + length[c, d] <= length[a, c] + length[b, d] + 1e-6
    short = lengths[:, :7, :7]
    near = (travelling_salesman("ortools")(short) * short).sum((1, 2))
    assert (near <= 1.1 * (travelling_salesman("exact")(short) * short).sum((1, 2))).all()


def test_solvers_leave_the_costs_and_take_strided_ones():
    for shape, solver in SOLVERS.values():
        costs = draw(4, *shape).requires_grad_()
        kept = costs.detach().clone()
        strided = costs.detach().transpose(0, -1).contiguous().transpose(0, -1)
        found = solver(costs)
        assert not found.requires_grad
        torch.testing.assert_close(solver(strided), found, rtol=0, atol=0)
        torch.testing.assert_close(costs.detach(), kept, rtol=0, atol=0)


# --- in the layer ---


@pytest.mark.parametrize(("sense", "sign"), [("min", -1), ("max", 1)])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_gradient_is_minus_the_identity_and_plus_where_it_maximises(name, sense, sign):
    shape, solver = SOLVERS[name]
    costs, g = draw(6, *shape), draw(6, *shape, seed=1) - 0.5
    costs = (-costs if sense == "max" else costs).requires_grad_()
    out = CombinatorialLayer(solver, sense=sense)(costs)
    torch.testing.assert_close(out.detach(), solver(-sign * costs.detach()), rtol=0, atol=0)
    (g * out).sum().backward()
    torch.testing.assert_close(costs.grad, sign * g, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in SOLVERS if not name.startswith("grid")])
def test_scale_and_shift_change_no_decision_and_the_gradient_by_the_scale(name):
    shape, solver = SOLVERS[name]
    layer, g = CombinatorialLayer(solver, projection="std"), draw(6, *shape, seed=1)
    results = []
    for c, b in ((1.0, 0.0), (3.0, -2.0)):
        costs = (c * draw(6, *shape) + b).requires_grad_()
        out = layer(costs)
        results.append((out.detach(), c * torch.autograd.grad((g * out).sum(), costs)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("a", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_never_raises_the_linearised_loss(name, a):
    shape, solver = SOLVERS[name]
    w = draw(200, *shape).requires_grad_()
    g = draw(200, *shape, seed=1) - (0.0 if name.startswith("grid") else 0.5)  # paths: w' stays positive
    before = CombinatorialLayer(solver)(w)
    step = torch.autograd.grad((g * before).sum(), w)[0]
    after = solver(w.detach() - a * step)
    change = ((after - before.detach()) * g).flatten(1).sum(1)
    assert (change <= 1e-12).all()
    assert (change < -1e-6).any()  # and it does move decisions
    if a == 100.0:
        far = solver(w.detach() - 1e6 * step).flatten(1).numpy()
        best = (g.flatten(1).numpy() @ ALL[name].T).min(1)
        np.testing.assert_allclose((far * g.flatten(1).numpy()).sum(1), best, rtol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("gradient", ["identity", "blackbox"])
@pytest.mark.filterwarnings("ignore:negative costs")
def test_the_layer_conforms_to_its_kind(as_a_user, name, gradient):
    shape, solver = SOLVERS[name]
    costs = draw(3, *shape).float().requires_grad_()
    layer = CombinatorialLayer(solver, projection="norm", gradient=gradient, strength=1.0)
    check_layer(layer, costs, shape=(3, *shape), chooses=True)


@pytest.mark.parametrize("name", ["assignment", "grid, 8", "spanning_tree", "tour"])
def test_threads_change_nothing(name):
    shape, solver = SOLVERS[name]
    costs = draw(5, *shape)
    layer = CombinatorialLayer(solver, n_jobs=3)
    assert torch.equal(layer(costs), solver(costs))
    assert layer.n_solver_calls == 5
    assert torch.equal(layer(costs[:1]), solver(costs[:1]))


ONE, PAIR = torch.rand(2, 3), torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(0), "k must be an integer of at least 1"),
        (lambda: top_k(4)(ONE), "k must be at most the number of costs, 3, got 4"),
        (lambda: top_k(2)(ONE.numpy().astype(int)), "costs must be floating-point, got dtype int64"),
        (lambda: top_k(2)([[1.0]]), "costs must be a floating-point tensor, got list"),
        (lambda: top_k(2)(ONE * math.nan), "costs must be finite"),
        (lambda: ranking()(ONE[None]), r"costs must have shape \(any, any\)"),
        (lambda: assignment()(torch.ones(1, 3, 2)), "got 3 rows and 2 columns"),
        (lambda: assignment()(ONE), r"costs must have shape \(any, any, any\)"),
        (lambda: grid_shortest_path(6), "connectivity must be one of 4, 8"),
        (lambda: grid_shortest_path()(ONE), r"costs must have shape \(any, any, any\)"),
        (lambda: travelling_salesman("fast"), "method must be one of"),
        (lambda: travelling_salesman()(torch.ones(1, 4, 5)), "square matrices of at least 3 cities, got 4 x 5"),
        (lambda: travelling_salesman()(torch.ones(1, 2, 2)), "at least 3 cities, got 2 x 2"),
        (lambda: travelling_salesman("exact")(torch.ones(1, 13, 13)), "at most 12 cities for method 'exact', got 13"),
        (lambda: spanning_tree(PAIR.T[:1], 3), r"edge_index must have shape \(2, any\)"),
        (lambda: spanning_tree(PAIR.float(), 3), "edge_index must be a tensor of integers, got torch.float32"),
        (lambda: spanning_tree(PAIR, 2), r"edge_index must be in 0\.\.1, got values from 0 to 2"),
        (lambda: spanning_tree(PAIR, 4), "edge_index must connect all n_nodes = 4, got 2 parts"),
        (lambda: spanning_tree(torch.tensor([[0, 0, 1], [1, 1, 0]]), 3), "edge_index must connect all n_nodes = 3, got 2 parts"),
        (lambda: spanning_tree(PAIR[:, :0], 1), "edge_index must have at least one edge"),
        (lambda: spanning_tree(PAIR, 3)(ONE), r"costs must have shape \(any, 2\) for edge_index, got \(2, 3\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tours_without_ortools_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.constraint_solver.pywrapcp", None)
    with pytest.raises(ModuleNotFoundError, match=r"posterity\[optimization\]"):
        travelling_salesman("ortools")(torch.rand(1, 4, 4))
