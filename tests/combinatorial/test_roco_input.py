"""ROCO: what is refused, and what is said."""

import numpy as np
import pytest
import torch

from posterity.combinatorial import (
    ATSP,
    Coverage,
    EditPolicy,
    Jobs,
    Scheduling,
    Sets,
    attack,
    fit_edit_policy,
)

D = np.array([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]])
NEAREST = ATSP().solvers["nearest"]
ONES, PAIR = np.ones((2, 1)), np.array([[0, 1]])
MEMBER = np.eye(2, dtype=bool)


def changed(value):
    d = D.copy()
    d[0, 1] = value
    return d


@pytest.mark.parametrize(
    ("problem", "instance", "message"),
    [
        (ATSP(), np.ones((3, 4)), r"shape \(n, n\) with n at least 3, got \(3, 4\)"),
        (ATSP(), np.ones((2, 2)), r"got \(2, 2\)"),
        (ATSP(), changed(np.nan), "finite costs of a finite sum, got nan"),
        (ATSP(), changed(np.inf), "finite costs of a finite sum, got inf"),
        (ATSP(), changed(-1.0), "costs of at least 0, got -1"),
        (ATSP(), D.tolist(), "instance must be an array of numbers, got list"),
        (ATSP(), None, "instance must be an array of numbers, got NoneType"),
        (ATSP(), D.astype(str), "instance must be an array of numbers, got <U32"),
        (
            Scheduling(),
            Jobs(np.ones(2), np.array([[0.5], [1.2]]), PAIR),
            r"got 1.2 for job 1, which never fits",
        ),
        (Scheduling(), Jobs(np.ones(2), -ONES, PAIR), r"resources must be in \[0, 1\], got -1.0 for job 0"),
        (Scheduling(), Jobs(np.array([1.0, 0]), ONES, PAIR), "greater than 0, got 0.0 for job 1"),
        (Scheduling(), Jobs(np.array([1.0, np.nan]), ONES, PAIR), "got nan for job 1"),
        (
            Scheduling(),
            Jobs(np.ones(4), np.ones((4, 1)), np.array([[0, 1], [1, 2], [2, 3], [3, 1]])),
            "no cycle, has 1 -> 2 -> 3 -> 1|no cycle, has 2 -> 3 -> 1 -> 2|no cycle, has 3 -> 1 -> 2 -> 3",
        ),
        (Scheduling(), Jobs(np.ones(2), ONES, np.array([[1, 1]])), "no cycle, has 1 -> 1"),
        (Scheduling(), Jobs(np.ones(2), ONES, np.array([[0, 2]])), r"jobs in 0..1, got values from 0 to 2"),
        (Scheduling(), Jobs(np.ones(2), ONES, np.array([[0, 1], [0, 1]])), r"has \(0, 1\) twice"),
        (Scheduling(), Jobs(np.ones(2), ONES, np.array([[0.0, 1]])), "before must be an array of integers"),
        (Scheduling(), Jobs(np.ones(2), np.ones((3, 1)), PAIR), r"resources must have shape \(2, r\)"),
        (Scheduling(), Jobs(np.ones(0), np.ones((0, 1)), PAIR), r"duration must have shape \(n,\)"),
        (Scheduling(), Jobs(np.ones(2), ONES, np.array([0, 1])), r"before must have shape \(m, 2\)"),
        (Scheduling(), None, "instance must be Jobs"),
        (Coverage(), Sets(MEMBER, np.ones(2), 0), "limit must be an integer of at least 1, got 0"),
        (Coverage(), Sets(MEMBER, np.ones(2), 3), "at most the number of sets, 2, got 3"),
        (Coverage(), Sets(MEMBER, np.array([1.0, -2]), 1), "at least 0, got -2.0 for element 1"),
        (Coverage(), Sets(MEMBER, np.array([1.0, np.inf]), 1), "weight must be finite"),
        (Coverage(), Sets(MEMBER, np.ones(3), 1), "weight must be an array of 2 numbers"),
        (Coverage(), Sets(MEMBER.astype(int), np.ones(2), 1), "member must be a bool array"),
        (Coverage(), "sets", "instance must be Sets"),
    ],
)
def test_refuses_what_is_no_instance(as_a_user, problem, instance, message):
    solver = next(iter(problem.solvers.values()))
    with pytest.raises(ValueError, match=message):
        problem.validate(instance)
    with pytest.raises(ValueError, match=message):
        attack(problem, solver, instance)


@pytest.mark.parametrize(
    ("problem", "instance", "solution", "message"),
    [
        (ATSP(), D, [0, 1, 1], "city 1 is visited 2 times"),
        (ATSP(), D, [0, 1], "city 2 is visited 0 times"),
        (ATSP(), D, [0, 1, 3], r"cities in 0..2, got 3"),
        (ATSP(), D, [0, 1, 2.0], "solution must be integers"),
        (ATSP(), D, None, "solution must be integers, got None"),
        (
            Scheduling(),
            Jobs(np.ones(2), ONES, PAIR),
            [0, 0.5],
            "keep precedences: job 1 starts at 0.5, job 0 ends at 1",
        ),
        (
            Scheduling(),
            Jobs(np.ones(2), np.array([[0.6], [0.5]]), PAIR[:0]),
            [0, 0.5],
            "at 0.5 resource 0 is used to 1.1",
        ),
        (
            Scheduling(),
            Jobs(np.ones(2), ONES, PAIR),
            [0, -1],
            "start every job at 0 or later, got -1.0 for job 1",
        ),
        (Scheduling(), Jobs(np.ones(2), ONES, PAIR), [0, np.nan], "got nan for job 1"),
        (Scheduling(), Jobs(np.ones(2), ONES, PAIR), [0], r"2 start times, got shape \(1,\)"),
        (Scheduling(), Jobs(np.ones(2), ONES, PAIR), "soon", "solution must be start times"),
        (Coverage(), Sets(MEMBER, np.ones(2), 1), [0, 1], "at most 1 sets, got 2"),
        (Coverage(), Sets(MEMBER, np.ones(2), 2), [0, 0], "has set 0 2 times"),
        (Coverage(), Sets(MEMBER, np.ones(2), 1), [2], r"sets in 0..1, got 2"),
        (Coverage(), Sets(MEMBER, np.ones(2), 1), None, "solution must be integers"),
    ],
)
def test_refuses_a_solution_that_is_not_feasible(as_a_user, problem, instance, solution, message):
    with pytest.raises(ValueError, match=message):
        problem.value(instance, solution)
    with pytest.raises(ValueError, match=f"solver must return a feasible solution: .*{message}"):
        attack(problem, lambda _: solution, instance)


@pytest.mark.parametrize(
    ("problem", "instance", "edit", "message"),
    [
        (ATSP(), D, (1, 1), "an arc between two cities"),
        (ATSP(), D, (0, 3), r"edit must be in 0..2 and 0..2, got \(0, 3\)"),
        (ATSP(), D, 5, "edit must be two integers, got 5"),
        (ATSP(), D, (0, 1, 2), "edit must be two integers"),
        (ATSP(), D, (0, 1.5), "edit must be two integers"),
        (Scheduling(), Jobs(np.ones(2), ONES, PAIR), (1, 0), "one of before, got"),
        (Coverage(), Sets(MEMBER, np.ones(2), 1), (0, 0), "an element that the set lacks"),
    ],
)
def test_refuses_an_edit_that_is_none(as_a_user, problem, instance, edit, message):
    with pytest.raises(ValueError, match=message):
        problem.apply(instance, edit)


class Half:
    sense = "middle"

    def validate(self, instance): ...
    def value(self, instance, solution): ...
    def edits(self, instance, solution): ...
    def apply(self, instance, edit): ...


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": None}, "problem must be an object as ATSP"),
        ({"problem": ATSP}, "has a class"),
        ({"problem": Half()}, 'sense "min" or "max", got \'middle\''),
        ({"solver": "nearest"}, "solver must be a function of an instance, got 'nearest'"),
        ({"method": "luck"}, "method must be one of 'random', 'anneal'"),
        ({"n_edits": 0}, "n_edits must be an integer of at least 1"),
        ({"budget": 0}, "budget must be an integer of at least 1"),
        ({"budget": 2.5}, "budget must be an integer"),
        ({"beam": 0}, "beam must be an integer of at least 1"),
        ({"method": "policy"}, 'policy must be an EditPolicy for method "policy", got None'),
        ({"method": "policy", "policy": torch.nn.Linear(1, 1)}, "policy must be an EditPolicy, got Linear"),
        (
            {"method": "policy", "policy": EditPolicy(in_features=3)},
            "policy must have the in_features of the problem's graph, 4, got 3",
        ),
        ({"instance": 0 * D}, "clean value above 0, or there is no ratio to it, got 0"),
    ],
)
def test_refuses_an_attack_that_is_none(as_a_user, change, message):
    given = {"problem": ATSP(), "solver": NEAREST, "instance": D} | change
    with pytest.raises(ValueError, match=message):
        attack(given.pop("problem"), given.pop("solver"), given.pop("instance"), **given)


@pytest.mark.parametrize("factor", [0, 1, -0.5, np.nan, None])
def test_refuses_a_factor_that_makes_no_arc_cheaper(as_a_user, factor):
    with pytest.raises(ValueError, match="factor must be"):
        ATSP(factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": None}, "policy must be an EditPolicy, got NoneType"),
        ({"policy": EditPolicy().requires_grad_(False)}, "a parameter that requires a gradient"),
        ({"policy": EditPolicy(in_features=2)}, "in_features of the problem's graph, 4, got 2"),
        ({"problem": 3}, "problem must be an object"),
        ({"solver": None}, "solver must be a function"),
        ({"instances": []}, "instances must have at least one"),
        ({"instances": None}, "instances must be a list"),
        ({"instances": Jobs(np.ones(2), ONES, PAIR)}, "instances must be a list of instances, got Jobs"),
        ({"instances": [D, -D]}, "costs of at least 0"),
        ({"episodes": 0}, "episodes must be"),
        ({"n_edits": 0}, "n_edits must be"),
        ({"update_every": 0}, "update_every must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"gamma": 1.5}, "gamma must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"clip": 0.0}, "clip must be"),
    ],
)
def test_refuses_a_training_that_is_none(as_a_user, change, message):
    given = {"policy": EditPolicy(), "problem": ATSP(), "solver": NEAREST, "instances": [D]} | change
    with pytest.raises(ValueError, match=message):
        fit_edit_policy(**given)


X4, EDGES = torch.rand(3, 4), torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(3, 5), EDGES, torch.ones(2), EDGES.T), r"x must have shape \(any, 4\)"),
        ((X4.long(), EDGES, torch.ones(2), EDGES.T), "x must be a floating-point tensor"),
        ((X4[:0], EDGES[:, :0], torch.ones(0), EDGES[:, :0].T), "at least one node"),
        ((X4, EDGES + 2, torch.ones(2), EDGES.T), r"edge_index must be in 0..2"),
        ((X4, EDGES.float(), torch.ones(2), EDGES.T), "edge_index must hold integers"),
        ((X4, EDGES, torch.ones(3), EDGES.T), r"edge_weight must have shape \(2\)"),
        ((X4, EDGES, torch.ones(2), EDGES.T + 2), r"edits must be in 0..2"),
        ((X4, EDGES, torch.ones(2), torch.tensor([0, 1])), r"edits must have shape \(any, 2\)"),
        ((X4, EDGES, torch.ones(2), None), "edits must hold integers, got NoneType"),
    ],
)
def test_the_policy_refuses_what_is_no_graph(as_a_user, arguments, message):
    with pytest.raises(ValueError, match=message):
        EditPolicy()(*arguments)


@pytest.mark.parametrize("change", [{"in_features": 0}, {"width": 0}, {"n_layers": 0}, {"width": 2.5}])
def test_the_policy_refuses_sizes_that_are_none(as_a_user, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be an integer of at least 1"):
        EditPolicy(**change)
