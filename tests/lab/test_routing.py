"""Routing: files as TSPLIB and CVRPLIB have them or as a user does, and a question with plans that are checked."""

import itertools
import math

import numpy as np
import pytest

from posterity.lab.data import fetch, load_qubo, load_routing
from posterity.lab.tasks import entries, get_task
from posterity.lab.tasks import routing as task
from posterity.lab.tasks.routing import Fleet, measure_plan

HEAD = "NAME : x\nTYPE : CVRP\nDIMENSION : 3\n"
MATRIX = "EDGE_WEIGHT_TYPE : EXPLICIT\nEDGE_WEIGHT_FORMAT : {}\nEDGE_WEIGHT_SECTION\n{}\nEOF\n"
CITIES = HEAD + "EDGE_WEIGHT_TYPE : EUC_2D\nNODE_COORD_SECTION\n1 0 0\n2 1.5 0\n3 0 2.2\n"


@pytest.fixture
def read(tmp_path):
    def read(text, name="places.vrp", options=""):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_routing(f"{tmp_path / name}{options}")

    return read


@pytest.mark.parametrize("name", ["A-n32-k5", "F-n72-k4", "M-n101-k10"])
def test_a_published_plan_has_its_published_length(name):
    vrplib = pytest.importorskip("vrplib")
    data = load_routing(name)
    plan = vrplib.read_solution(fetch(name)[1])["routes"]
    total = sum(data.distance[a, b] for r in plan for a, b in itertools.pairwise([0, *r, 0]))
    assert total == data.best and len(plan) == data.n_vehicles and data.depots == (0,)
    assert max(sum(data.demands[c] for c in r) for r in plan) <= data.capacity


def test_whole_distances_are_those_of_tsplib_unless_decimals_are_asked_for(read):
    want = [[0, 1.5, 2.2], [1.5, 0, math.hypot(1.5, 2.2)], [2.2, math.hypot(1.5, 2.2), 0]]
    np.testing.assert_array_equal(read(CITIES).distance, np.floor(np.array(want) + 0.5))
    np.testing.assert_allclose(read(CITIES, options="?rounded=no").distance, want)


@pytest.mark.parametrize("rows", ["9999 1 2\n3 9999 4\n5 6 9999", "9999 1\n2 3 9999 4 5\n6 9999"])
def test_a_full_matrix_may_break_its_lines_anywhere(read, rows):
    data = read(HEAD + MATRIX.format("FULL_MATRIX", rows), "x.atsp")
    assert data.distance.tolist() == [[0, 1, 2], [3, 0, 4], [5, 6, 0]]
    assert data.points is None and data.depots == () and len(data.customers) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + MATRIX.format("UPPER_ROW", "1 2\n3"), "type EXPLICIT UPPER_ROW are not read; write the matrix out"),
        (CITIES.replace("EUC_2D", "GEO"), "type GEO are not read"),
        (CITIES.replace("1.5 0", "1.5"), "line 7 is '2 1.5', must be a place's number and two coordinates"),
        (CITIES.replace("1.5 0", "1.5 x"), "line 7 is '2 1.5 x'"),
        (CITIES.replace("SION : 3", "SION : 4"), "DIMENSION is 4, distances are of 3 places"),
        (CITIES.replace("NODE", "CAPACITY : 4\nNODE") + "DEMAND_SECTION\n1 0\n2 3\nEOF\n", "3 places have 2 demands"),
        (CITIES + "DEPOT_SECTION\n9\n-1\n", "a depot is numbered 9, there are 3 places"),
        (HEAD + MATRIX.format("FULL_MATRIX", "0 -1 1\n1 0 1\n1 1 0"), "from place 1 to 2 is -1"),
        ("", "has no distances"),
        ("hello", "states no EDGE_WEIGHT_TYPE"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_by_name_and_place(read, text, said):
    with pytest.raises(ValueError, match=r"places\.vrp") as error:
        read(text)
    assert said in str(error.value)


def test_a_table_has_straight_distances_or_those_on_the_globe(read):
    straight = read("x;y [km];Demand\n0;0;0\n3;4;2\n0;;5\n1,5;2;6\n", "a.csv", "?capacity=8")
    np.testing.assert_allclose(straight.distance, [[0, 5, 2.5], [5, 0, 2.5], [2.5, 2.5, 0]])
    assert straight.demands.tolist() == [0, 2, 6] and straight.capacity == 8 and straight.depots == (0,)
    assert "1 rows without a coordinate or demand left out" in straight.note
    globe = read("lon,lat,depot\n0,0,no\n90,0,yes\n0,90,no\n", "b.csv")
    quarter = math.pi / 2 * 6371.0088
    np.testing.assert_allclose(globe.distance, quarter * (1 - np.eye(3)), rtol=1e-12)
    assert globe.depots == (1,) and globe.customers.tolist() == [0, 2]
    with pytest.raises(ValueError, match="capacity must be"):
        read("x,y\n0,0\n3,4\n", "c.csv", "?capacity=much")


def fleet(n=7, vehicles=3, capacity=math.inf, seed=0):
    points = np.random.default_rng(seed).random((n + 1, 2))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    return Fleet(distance, np.arange(n) % 3 + 1.0, capacity, vehicles, 0.1, points)


@pytest.mark.parametrize("name", [name for name, each in entries("routing").items() if not each.paper])
@pytest.mark.parametrize("capacity", [math.inf, 5.0])
def test_every_entrys_plan_serves_all_and_fits(name, capacity):
    problem = fleet(capacity=capacity)
    plan = entries("routing")[name].fit(problem, 0)()
    assert sorted(c for route in plan for c in route) == list(range(7)) and len(plan) <= 3
    assert all(sum(c % 3 + 1 for c in route) <= capacity for route in plan)
    longest, total = measure_plan(problem, plan)
    lengths = []
    for route in plan:
        lengths.append(0.0)
        for a, b in itertools.pairwise([0, *(c + 1 for c in route), 0]):
            lengths[-1] += problem.distance[a, b]
    assert longest == pytest.approx(max(lengths)) and total == pytest.approx(sum(lengths))


def test_two_opt_leaves_no_stretch_that_is_shorter_the_other_way_round():
    rng = np.random.default_rng(1)
    distance = rng.random((9, 9))  # not symmetric
    route = task._two_opt(list(range(8)), distance)

    def length(route):
        return sum(distance[a, b] for a, b in itertools.pairwise([0, *(c + 1 for c in route), 0]))

    assert sorted(route) == list(range(8))
    for i, j in itertools.combinations(range(9), 2):
        assert length(route) <= length(route[:i] + route[i:j][::-1] + route[j:]) + 1e-9


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([[0, 1], [2], [3, 4, 5]], "visits 6 0 times"),
        ([[0, 1, 1], [2], [3, 4, 5, 6]], "visits 1 2 times"),
        ([[0], [1], [2], [3, 4, 5, 6]], "at most 3 vehicles, used 4"),
        ([[0, 1, 2, 3, 4], [5, 6], []], "not overload vehicle 0: 9 of 6"),
        ([[0, 1, 2, 3], [4, 5, 6, 7], []], "visits 7 1 times of 7"),
    ],
)
def test_a_plan_that_serves_not_all_or_overloads_is_refused(plan, said):
    with pytest.raises(ValueError, match=said):
        measure_plan(fleet(capacity=6.0 if "overload" in said else 7.0), plan)


def test_the_question_is_asked_of_one_depot_and_vehicles_enough(read):
    two = read("x,y,depot\n0,0,yes\n3,4,yes\n1,1,no\n2,1,no\n", "two.csv")
    with pytest.raises(ValueError, match="one depot is asked for, has 2"):
        get_task("routing").needs(two)
    with pytest.raises(ValueError, match="n_vehicles must be 5 or more"):
        get_task("routing").needs(load_routing("A-n32-k5"), n_vehicles=4)


def test_the_bits_of_least_energy_of_a_graph_are_its_largest_cut(tmp_path):
    edges, weights = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 1]]), np.arange(1.0, 7)
    np.savez(tmp_path / "graph.npz", edges=edges, weights=weights)
    data = load_qubo(str(tmp_path / "graph.npz"))
    assert "1 loops left out" in data.note
    for bits in itertools.product((0, 1), repeat=4):
        cut = sum(w for (a, b), w in zip(edges, weights, strict=True) if bits[a] != bits[b])
        assert np.array(bits) @ data.matrix @ np.array(bits) == pytest.approx(-cut)


def test_a_matrix_is_made_symmetric_with_the_same_energies(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    np.savez(tmp_path / "m.npz", matrix=matrix)
    data = load_qubo(str(tmp_path / "m.npz"))
    assert (data.matrix == data.matrix.T).all() and "not symmetric" in data.note
    for bits in itertools.product((0, 1), repeat=3):
        assert np.array(bits) @ data.matrix @ np.array(bits) == pytest.approx(
            np.array(bits) @ matrix @ np.array(bits)
        )
