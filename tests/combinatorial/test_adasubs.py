"""Adaptive subgoal search: step by step as a plain reference, shortest paths from exact parts, refusals."""

import itertools
import random
import re

import pytest
import torch

from posterity.combinatorial import adaptive_subgoal_search


class Graph:
    """A directed graph with labelled edges: action a leads from s to edges[s][a]; the goal is node 0."""

    def __init__(self, n, n_actions, seed):
        rng = random.Random(seed)
        self.n, self.n_actions = n, n_actions
        self.edges = [[rng.randrange(n) for _ in range(n_actions)] for _ in range(n)]
        self.far = [0 if s == 0 else None for s in range(n)]
        for d in range(n):
            for s in range(n):
                if self.far[s] is None and any(self.far[t] == d for t in self.edges[s]):
                    self.far[s] = d + 1

    def step(self, state, action):
        return self.edges[state][action]

    def is_solved(self, state):
        return state == 0

    def toward(self, state):
        """Return the action of a shortest path to the goal."""
        return min(
            range(self.n_actions),
            key=lambda a: (self.far[self.edges[state][a]] is None, self.far[self.edges[state][a]]),
        )

    def on(self, state, k):
        """Return the state k steps on along a shortest path, or the goal."""
        for _ in range(min(k, self.far[state])):
            state = self.step(state, self.toward(state))
        return state


def line(n):
    """Return a line on which action 0 goes down to 0 and action 1 up."""
    graph = Graph(n, 2, 0)
    graph.edges = [[max(0, s - 1), min(n - 1, s + 1)] for s in range(n)]
    graph.far = list(range(n))
    return graph


def exact(graph):
    return {
        "policy": lambda states, goals: torch.tensor([
            [-float(len(_steps(graph, graph.edges[s][a], g))) for a in range(graph.n_actions)]
            for s, g in zip(states, goals, strict=True)
        ]),
        "value": lambda states: -torch.tensor([float(graph.far[s]) for s in states]),
    }  # fmt: skip


def _steps(graph, start, goal):
    """Return a shortest path between two nodes, long where there is none."""
    seen, front = {start: []}, [start]
    while front and goal not in seen:
        nxt = []
        for s in front:
            for t in graph.edges[s]:
                if t not in seen:
                    seen[t] = [*seen[s], t]
                    nxt.append(t)
        front = nxt
    return seen.get(goal, [0] * 999)


def tables(graph, distances, seed, n=3):
    """Return drawn components: proposals, actions, values and odds that depend on the states alone."""

    def draw(*key):
        return random.Random(repr((seed, *key)))

    generators = {k: (lambda s, m, k=k: draw("g", k, s).sample(range(graph.n), n)[:m]) for k in distances}
    return {
        "generators": generators,
        "policy": lambda states, goals: torch.tensor([
            [draw("p", s, g, a).random() for a in range(graph.n_actions)] for s, g in zip(states, goals, strict=True)
        ]),
        "value": lambda states: torch.tensor([round(draw("v", s).random(), 1) for s in states]),
        "verifier": lambda states, goals: torch.tensor(
            [draw("o", s, g).random() for s, g in zip(states, goals, strict=True)]
        ),
    }  # fmt: skip


def reference(graph, start, *, generators, policy, value, verifier=None, accept=1.0, reject=0.0, n_subgoals=1, slack=0,
              order="longest", budget=1000):  # fmt: skip
    """Search by sorted lists, one state and one walk at a time; return solved, actions, distances, expansions, visits."""
    nodes, visits, expanded = [(start, None, [], 0)], 0, 0
    if graph.is_solved(start):
        return True, [], [], 0, 0
    ks = sorted(generators)
    queues = {k: [0] for k in (ks if order != "mixed" else [0])}
    worth = [float(value([start])[0])]

    def walk(state, goal, limit):
        nonlocal visits
        been, path = [state], []
        for _ in range(limit):
            action = int(policy([state], [goal])[0].argmax())
            visits += 1
            state = graph.step(state, action)
            path.append(action)
            if state == goal:
                return path
            if state in been:
                return None
            been.append(state)
        return None

    while visits < budget and any(queues.values()):
        best = {k: min(queue, key=lambda i: (-worth[i], i)) for k, queue in queues.items() if queue}
        k = max(best, key=lambda k: (worth[best[k]], k)) if order == "best" else max(best)
        index = best[k]
        queues[k].remove(index)
        expanded += 1
        proposals = []
        for each in sorted(generators, reverse=True) if order == "mixed" else [k]:
            for goal in generators[each](nodes[index][0], n_subgoals):
                if goal not in [n[0] for n in nodes] and goal not in [p[0] for p in proposals]:
                    proposals.append((goal, each))
        new = []
        for goal, each in proposals:
            odds = float(verifier([nodes[index][0]], [goal])[0]) if verifier else 0.5
            if verifier and odds > accept:
                visits += 1
                path = None
            elif verifier and odds < reject:
                visits += 1
                continue
            else:
                path = walk(nodes[index][0], goal, each + slack)
                if path is None:
                    continue
            nodes.append((goal, index, path, each))
            new.append(len(nodes) - 1)
        for i in new:
            worth.append(float(value([nodes[i][0]])[0]))
        for i in new:
            if graph.is_solved(nodes[i][0]):
                chain = []
                while i is not None:
                    chain.insert(0, nodes[i])
                    i = nodes[i][1]
                parts = []
                for before, node in itertools.pairwise(chain):
                    path = node[2] if node[2] is not None else walk(before[0], node[0], node[3] + slack)
                    if path is None:
                        return False, [], [], expanded, visits
                    parts.append(path)
                return True, [a for p in parts for a in p], [len(p) for p in parts], expanded, visits
        for queue in queues.values():
            queue.extend(new)
    return False, [], [], expanded, visits


def told(found):
    return found.solved, found.actions, found.distances, found.n_expanded, found.n_visited


@pytest.mark.parametrize("order", ["longest", "best", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_subgoals": 3},
        {"accept": 0.8, "reject": 0.3, "n_subgoals": 3},
        {"slack": 2, "n_subgoals": 3, "reject": 0.2},
    ],
)
def test_each_step_is_that_of_a_plain_search(order, options):
    solved = 0
    for seed in range(12):
        graph = Graph(9, 3, seed)
        parts = tables(graph, (4, 2, 1), seed)
        found = adaptive_subgoal_search(graph, 7, **parts, order=order, budget=150, **options)
        assert told(found) == reference(graph, 7, **parts, order=order, budget=150, **options)
        replays(graph, 7, found)
        solved += found.solved
    assert solved


def replays(graph, start, found):
    state = start
    for action in found.actions:
        state = graph.step(state, action)
    assert graph.is_solved(state) == found.solved and sum(found.distances) == len(found.actions)
    assert len(set(found.states)) == len(found.states) == len(found.distances) + 1
    assert found.states[0] == start and found.states[-1] == state


def test_one_distance_is_best_first_search_over_its_subgoals():
    for seed in range(8):
        graph = Graph(30, 3, seed)
        parts = tables(graph, (3,), seed)
        found = [
            told(adaptive_subgoal_search(graph, 5, **parts, n_subgoals=3, order=o, budget=100))
            for o in ("longest", "best", "mixed")
        ]
        assert found[0] == found[1] == found[2]


def test_thresholds_at_their_ends_are_no_verifier():
    for seed in range(8):
        graph = Graph(30, 3, seed)
        parts = tables(graph, (4, 2), seed)
        one = adaptive_subgoal_search(graph, 5, **parts, n_subgoals=2, budget=100)
        other = adaptive_subgoal_search(graph, 5, **{**parts, "verifier": None}, n_subgoals=2, budget=100)
        assert one._replace(calls={}) == other._replace(calls={}) and not other.calls["verifier"]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_exact_parts_find_a_shortest_path_in_as_few_expansions_as_it_has_segments(k):
    graph = Graph(60, 2, 3)
    start = max((s for s in range(60) if graph.far[s]), key=lambda s: graph.far[s])
    found = adaptive_subgoal_search(
        graph, start, generators={k: lambda s, n: [graph.on(s, k)]}, **exact(graph)
    )
    assert (
        found.solved
        and len(found.actions) == graph.far[start]
        and found.n_expanded == -(-graph.far[start] // k)
    )
    replays(graph, start, found)


def test_where_far_subgoals_are_lies_the_search_takes_near_ones():
    graph = line(12)
    lie = lambda s, n: [s + 100]  # noqa: E731
    graph.edges += [[s, s] for s in range(12, 300)]
    parts = {**exact(graph), "policy": lambda states, goals: torch.tensor([[1.0, 0.0]] * len(states)),
             "value": lambda states: -torch.tensor(states, dtype=torch.float32)}  # fmt: skip
    found = adaptive_subgoal_search(graph, 9, generators={4: lie, 1: lambda s, n: [s - 1]}, **parts)
    assert found.solved and found.distances == [1] * 9
    alone = adaptive_subgoal_search(graph, 9, generators={4: lie}, **parts)
    assert not alone.solved and alone.n_expanded == 1 and alone.n_visited == 4 and alone.states == [9]


def test_a_false_word_of_the_verifier_is_found_out():
    graph = line(9)
    parts = exact(graph)
    found = adaptive_subgoal_search(
        graph, 8, generators={2: lambda s, n: [max(0, s - 3)]}, **parts, verifier=lambda s, g: torch.ones(len(s)), accept=0.9
    )  # fmt: skip
    assert not found.solved and found.verifier_failed and found.actions == []
    fine = adaptive_subgoal_search(
        graph, 8, generators={3: lambda s, n: [max(0, s - 3)]}, **parts, verifier=lambda s, g: torch.ones(len(s)), accept=0.9
    )  # fmt: skip
    assert fine.solved and fine.distances == [3, 3, 2] and fine.n_visited == 3 + 8


def test_what_is_solved_costs_nothing_and_the_budget_is_kept():
    graph = Graph(40, 3, 1)
    parts = tables(graph, (4, 2), 1)
    done = adaptive_subgoal_search(graph, 0, **parts)
    assert done.solved and done.actions == [] and done.states == [0] and done.n_visited == 0
    assert set(done.calls.values()) == {0}
    for budget in (1, 10, 40):
        found = adaptive_subgoal_search(graph, 9, **{**parts, "verifier": None}, n_subgoals=3, budget=budget)
        assert found.n_visited < budget + 3 * 4
    shallow = adaptive_subgoal_search(
        line(9), 8, generators={1: lambda s, n: [s - 1]}, **exact(line(9)), max_depth=3
    )
    assert not shallow.solved and shallow.n_expanded == 3


def test_walks_of_an_expansion_go_in_step():
    graph = line(30)
    parts = {
        **exact(graph),
        "generators": {4: lambda s, n: [max(0, s - 4), max(0, s - 3), max(0, s - 2)][:n]},
    }
    found = adaptive_subgoal_search(graph, 20, **parts, n_subgoals=3)
    assert found.calls["policy"] == 4 * found.n_expanded
    assert found.n_visited == (4 + 3 + 2) * found.n_expanded


GRAPH = line(9)
PARTS = {**exact(GRAPH), "generators": {2: lambda s, n: [max(0, s - 2)]}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generators": {}}, "generators must be a mapping of one distance"),
        ({"generators": {0: PARTS["generators"][2]}}, "distances of 1 or more, whole numbers, got 0"),
        ({"generators": {1.5: PARTS["generators"][2]}}, "whole numbers, got 1.5"),
        ({"accept": 0.4, "reject": 0.5}, "reject must be at most accept"),
        ({"accept": 1.2}, "accept must"),
        ({"reject": -0.1}, "reject must"),
        ({"budget": 0}, "budget must"),
        ({"n_subgoals": 0}, "n_subgoals must"),
        ({"slack": -1}, "slack must"),
        ({"max_depth": 0}, "max_depth must"),
        ({"order": "random"}, "order must"),
        ({"generators": {2: lambda s, n: [[1, 2]]}}, "states must be hashable, generators[2] gave a list: make it a tuple"),
        ({"generators": {2: lambda s, n: [1, 2]}}, "list of at most 1 states, got 2 of them"),
        ({"generators": {2: lambda s, n: (1,)}}, "list of at most 1 states, got tuple"),
        ({"policy": lambda s, g: torch.zeros(len(s), 3)}, "policy must return (1, 2), got (1, 3)"),
        ({"value": lambda s: torch.zeros(len(s), 1)}, "value must return (1,), got (1, 1)"),
        ({"value": lambda s: torch.full((len(s),), torch.nan)}, "value must return numbers, got NaN"),
        ({"verifier": lambda s, g: torch.zeros(2)}, "verifier must return (1,), got (2,)"),
        ({"start": [1, 2]}, "states must be hashable, start gave a list"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, change, said):
    change = dict(change)
    with pytest.raises(ValueError, match=re.escape(said)):
        adaptive_subgoal_search(GRAPH, change.pop("start", 8), **{**PARTS, **change})
