"""Neuro CROSS exchange: what is no fleet, no plan and no setting is refused by name, before any work."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from posterity.claims.combinatorial import neuro_cross as claims
from posterity.combinatorial import (
    DecrementNet,
    FleetProblem,
    cross_exchange,
    fit_decrements,
    solve_min_max,
)
from posterity.lab.tasks.routing import Fleet

SQUARE, ROWS = torch.rand(4, 4), torch.rand(2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(4, 3), ROWS, ROWS), r"between must have shape \(4, 4\), got \(4, 3\)"),
        ((SQUARE, torch.rand(2, 3), ROWS), r"leave must have shape \(any, 4\)"),
        ((SQUARE, ROWS, torch.rand(3, 4)), r"enter must have shape \(2, 4\)"),
        ((SQUARE, ROWS, ROWS, torch.rand(3)), r"demands must have shape \(4\)"),
        ((SQUARE, ROWS, ROWS, torch.rand(4), torch.rand(3)), r"capacity must have shape \(2\)"),
        ((SQUARE.long(), ROWS, ROWS), "between must be a floating-point tensor"),
        ((SQUARE, ROWS.double(), ROWS), "leave must have the dtype of between"),
        ((SQUARE, ROWS * torch.nan, ROWS), "leave must be finite"),
        ((SQUARE / 0, ROWS, ROWS), "between must be finite"),
        ((SQUARE, ROWS, -ROWS), "enter must be at least 0"),
        ((SQUARE, ROWS, ROWS, -torch.ones(4)), "demands must be at least 0"),
        ((SQUARE[:0, :0], ROWS[:, :0], ROWS[:, :0]), "at least one customer, got none"),
        ((SQUARE, ROWS[:1], ROWS[:1]), "at least 2 vehicles, got 1: .* travelling salesman"),
        ((SQUARE, ROWS, ROWS, None, 3.0), "capacity must come with demands"),
        ((SQUARE, ROWS, ROWS, torch.ones(4), math.inf), "capacity must be finite, or None"),
        ((SQUARE, ROWS, ROWS, torch.ones(4), -1.0), "capacity must be at least 0"),
        ((SQUARE, ROWS, ROWS, torch.ones(4), "much"), "capacity must be a number"),
        (
            (SQUARE, ROWS, ROWS, torch.tensor([1.0, 5, 1, 1]), 4.0),
            "customer 1 has 5 and the largest capacity is 4",
        ),
        ((SQUARE, ROWS, ROWS, torch.ones(4), 1.5), "all are 4 and all capacities 3"),
        ((None, ROWS, ROWS), "between must be a floating-point tensor, got NoneType"),
    ],
)
def test_refuses_a_problem_that_is_none(as_a_user, arguments, message):
    with pytest.raises(ValueError, match=message):
        FleetProblem(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vehicles": [0, 2]}, r"vehicles must name depots in 0..1, got 2"),
        ({"vehicles": [0, 0.5]}, "vehicles must name depots"),
        ({"vehicles": None}, "vehicles must be a sequence"),
        ({"end": "nearest"}, "end must be one of 'start', 'any'"),
        ({"customers": torch.rand(3, 3)}, r"customers must have shape \(any, 2\)"),
        ({"depots": torch.rand(0, 2)}, "depots must have at least one row"),
        ({"customers": torch.full((3, 2), torch.nan)}, "customers must be finite"),
    ],
)
def test_refuses_places_that_are_none(as_a_user, change, message):
    given = {"customers": torch.rand(3, 2), "depots": torch.rand(2, 2), "vehicles": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        FleetProblem.from_coords(given.pop("customers"), given.pop("depots"), given.pop("vehicles"), **given)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([[0, 1], [2]], "customer 3 is visited 0 times"),
        ([[0, 1, 2], [2, 3]], "customer 2 is visited 2 times"),
        ([[0, 1, 2], [4, 3]], "vehicle 1 has 4"),
        ([[0, 1, 2, 3]], "one route for each of 2 vehicles, got 1"),
        ([[0, 1, 2, "3"], []], "vehicle 0 has '3'"),
        ([None, []], "that of vehicle 0 is NoneType"),
        (None, "routes must be a list of lists of customers, got NoneType"),
        ([[0, 1, 2, 3], []], "0 carries 4, its capacity is 3"),
    ],
)
def test_refuses_routes_that_are_no_plan(as_a_user, routes, message):
    problem = FleetProblem(SQUARE, ROWS, ROWS, torch.ones(4), 3.0)
    calls = [lambda: problem.lengths(routes), lambda: cross_exchange(problem, routes, 0, 1)]
    calls += [lambda: DecrementNet()(problem, routes, [(0, 1)])]
    calls += [lambda: solve_min_max(problem, routes)] if routes is not None else []
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_refuses_what_is_out_of_range(as_a_user):
    problem, plan = FleetProblem(SQUARE, ROWS, ROWS), [[0, 1], [2, 3]]
    for call, message in (
        (lambda: cross_exchange(problem, plan, 1, 1), "two different vehicles, got 1 twice"),
        (lambda: cross_exchange(problem, plan, 0, 2), r"j must be a vehicle in 0..1, got 2"),
        (lambda: cross_exchange(problem, plan, 0, 1, starts=torch.zeros(2, 2)), "starts must hold integers"),
        (lambda: cross_exchange(problem, plan, 0, 1, starts=torch.tensor([[0, 3]])), r"starts must lie in 0..2 and 0..2"),
        (lambda: cross_exchange(problem, plan, 0, 1, starts=torch.tensor([[-1, 0]])), "starts must lie"),
        (lambda: cross_exchange(SQUARE, plan, 0, 1), "problem must be a FleetProblem, got Tensor"),
        (lambda: solve_min_max(problem, top_k=0), "top_k must be an integer of at least 1, got 0"),
        (lambda: solve_min_max(problem, n_perturbations=-1), "n_perturbations must be an integer"),
        (lambda: solve_min_max(problem, time_limit=0.0), "time_limit must be greater than 0"),
        (lambda: solve_min_max(problem, net=3), "net must be a module, or None"),
        (lambda: solve_min_max(problem, net=nn.Identity()), "positional"),
        (lambda: DecrementNet(width=50), "width must be a multiple of n_heads, got 50 for 4"),
        (lambda: DecrementNet()(problem, plan, [(0, 0)]), "pairs must be of two different vehicles"),
        (lambda: DecrementNet()(problem, plan, [3]), "pairs must be pairs of vehicles, got 3"),
        (lambda: fit_decrements(nn.Linear(1, 1)), "net must be a DecrementNet, got Linear"),
        (lambda: fit_decrements(DecrementNet().bfloat16()), "got torch.bfloat16: cast it afterwards"),
        (lambda: fit_decrements(DecrementNet().requires_grad_(False)), "requires a gradient, got none"),
        (lambda: fit_decrements(DecrementNet(), n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: fit_decrements(DecrementNet(), lr=0.0), "lr must be greater than 0"),
        (lambda: fit_decrements(DecrementNet(), 3), "sample must be a function"),
        (lambda: fit_decrements(DecrementNet(), lambda g: problem), "sample must return a FleetProblem and its routes"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError) if message == "positional" else ValueError, match=message):
            call()


def test_refuses_a_network_whose_tables_do_not_fit(as_a_user):
    class Wrong(nn.Module):
        def forward(self, problem, routes, pairs):
            return [torch.zeros(1, 1) for _ in pairs]

    with pytest.raises(ValueError, match=r"net must return tables of shapes \[\(3, 3\)\], got \[\(1, 1\)\]"):
        solve_min_max(FleetProblem(SQUARE, ROWS, ROWS), [[0, 1], [2, 3]], net=Wrong())


@pytest.mark.parametrize("capacity", [math.inf, 6.0])
def test_the_entry_of_the_comparison_serves_all_and_fits(monkeypatch, capacity):
    monkeypatch.setattr(claims, "_trained", lambda *_: (DecrementNet(), []))  # what it picks is always exact
    distance = np.random.default_rng(0).uniform(1, 2, (10, 10))  # ways back are not as long
    np.fill_diagonal(distance, 0)
    demands = np.arange(9) % 3 + 1.0
    plan = claims.balanced(Fleet(distance, demands, capacity, 4, 0.2), 0)()
    assert sorted(c for route in plan for c in route) == list(range(9)) and len(plan) == 4
    assert all(sum(demands[c] for c in route) <= capacity for route in plan)
