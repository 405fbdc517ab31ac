"""Adaptive subgoal search: plan over subgoals, far ones first, near ones where no far one leads on.

For each of several distances k a generator proposes states about k steps on; a policy walks there; a value function says how near
the goal a state is; a verifier may say without walking whether the policy would arrive. Every state that is reached
waits in one queue a distance, all sorted by value, and an expansion takes

    the longest distance whose queue is not empty, its best state u, and the proposals of that generator at u.

So each state is first expanded by the longest distance, and by shorter ones only when none is left for longer ones: where the
going is hard the search takes small steps by itself, and nobody has to choose the distance. A budget bounds the states that are visited:
one for each step of the policy and for each decision of the verifier.
"""

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from posterity._checks import integer, one_of, within

__all__ = ["SubgoalSearchResult", "adaptive_subgoal_search"]

State = Hashable


class SubgoalSearchResult(NamedTuple):
    """What a search found and what it spent.

    Attributes
    ----------
    solved : bool
    states : list
        Of the path: the start, its subgoals, the solved state; the start alone where nothing was found.
    actions : list of int
        From the start to the solved state, empty where nothing was found.
    distances : list of int
        How many actions lead from each state of the path to the next.
    n_visited : int
        Steps of the policy and decisions of the verifier.
    n_nodes, n_expanded : int
        States that were reached, the start among them, and expansions.
    calls : dict
        Calls of each component: ``generator``, ``policy``, ``value``, ``verifier``.
    verifier_failed : bool
        Whether a path was found that the policy could not walk, because the verifier was wrong.
    """

    solved: bool
    states: list
    actions: list[int]
    distances: list[int]
    n_visited: int
    n_nodes: int
    n_expanded: int
    calls: dict[str, int]
    verifier_failed: bool


@dataclass
class _Node:
    state: State
    parent: int
    distance: int  # by which its generator was named
    actions: list[int] | None  # from its parent; None where the verifier vouched for them
    depth: int


def adaptive_subgoal_search(
    problem: Any,
    start: State,
    *,
    generators: Mapping[int, Callable[[Any, int], list]],
    policy: Callable[[list, list], Tensor],
    value: Callable[[list], Tensor],
    verifier: Callable[[list, list], Tensor] | None = None,
    accept: float = 1.0,
    reject: float = 0.0,
    n_subgoals: int = 1,
    slack: int = 0,
    order: Literal["longest", "best", "mixed"] = "longest",
    budget: int = 1000,
    max_depth: int | None = None,
) -> SubgoalSearchResult:
    """Search a path from a state to a solved one over subgoals of several distances.

    Parameters
    ----------
    problem : object
        With ``step(state, action) -> state``, ``is_solved(state) -> bool`` and ``n_actions``. States are hashable.
    start : hashable
        The state to begin at.
    generators : mapping of int to callable
        ``generators[k](state, n)`` returns a list of at most n states about k steps on, most probable first. A single
        distance is the plain search over subgoals that this one was made to replace.
    policy : callable
        ``policy(states, subgoals)`` returns logits (batch, n_actions); the largest is taken.
    value : callable
        ``value(states)`` returns (batch,), higher nearer the goal.
    verifier : callable, optional
        ``verifier(states, subgoals)`` returns the probability (batch,) that the policy arrives.
    accept : float, default=1.0
        A subgoal of a higher probability is taken without walking; at 1 none is. One false word on the path is
        enough to lose it, so that with paths of n segments choose it where the precision on pairs held out, to the power of n, is
        still high.
    reject : float, default=0.0
        A subgoal of a lower probability is dropped without walking.
    n_subgoals : int, default=1
        Asked of a generator.
    slack : int, default=0
        Steps beyond k that a walk may take.
    order : {"longest", "best", "mixed"}, default="longest"
        Which queue is next: of the longest distance; the one whose best state has the highest value; or one queue, and all generators at
        each expansion.
    budget : int, default=1000
        No expansion begins once so many states are visited.
    max_depth : int, optional
        Subgoals on a path, at most.

    Returns
    -------
    SubgoalSearchResult
        Its actions, replayed from the start, end in a solved state.

    Raises
    ------
    ValueError
        For distances, thresholds or numbers out of range, states that are not hashable, and components whose answers have
        another shape, hold NaN, or are too many.

    References
    ----------
    Zawalski et al., ICLR 2023, Algorithm 1; the walk's end at a state that it has seen, and how visits are counted, are
    those of the official code.

    Examples
    --------
    Counting down to 0 by ones, with a generator that is exact at distance 3 and another at 1:

    >>> class Down:
    ...     n_actions = 1
    ...     def step(self, state, action): return max(0, state - 1)
    ...     def is_solved(self, state): return state == 0
    >>> found = adaptive_subgoal_search(
    ...     Down(), 7, generators={3: lambda s, n: [max(0, s - 3)], 1: lambda s, n: [max(0, s - 1)]},
    ...     policy=lambda s, g: torch.zeros(len(s), 1), value=lambda s: -torch.tensor(s, dtype=torch.float),
    ... )
    >>> found.states, found.distances, found.n_expanded
    ([7, 4, 1, 0], [3, 3, 1], 3)
    """
    distances = _distances(generators)
    accept, reject = within("accept", accept, 0, 1), within("reject", reject, 0, 1)
    if reject > accept:
        raise ValueError(f"reject must be at most accept, got {reject} and {accept}")
    n_subgoals, slack = integer("n_subgoals", n_subgoals, 1), integer("slack", slack, 0)
    budget, order = integer("budget", budget, 1), one_of("order", order, ("longest", "best", "mixed"))
    if max_depth is not None:
        max_depth = integer("max_depth", max_depth, 1)
    search = _Search(problem, policy, value, verifier, accept, reject, slack)
    _hashable(start, "start")
    if problem.is_solved(start):
        return search.result(True, [start], [], [])
    search.add(_Node(start, -1, 0, [], 0))
    queues: dict[int, list[tuple[float, int]]] = {k: [] for k in (distances if order != "mixed" else (0,))}
    _push(queues, 0, search.values([start]))
    while search.n_visited < budget:
        k = _next_queue(queues, order)
        if k is None:
            break
        _, index = heapq.heappop(queues[k])
        node = search.nodes[index]
        if max_depth is not None and node.depth >= max_depth:
            continue
        search.n_expanded += 1
        asked = distances if order == "mixed" else [k]
        proposals = {}  # state to the distance that proposed it first
        for each in asked:
            for state in search.proposed(generators[each], each, node.state, n_subgoals):
                if state not in search.seen:
                    proposals.setdefault(state, each)
        new = search.reach(index, proposals)
        goal = next((n for n in new if problem.is_solved(search.nodes[n].state)), None)
        if goal is not None:
            return search.path(goal)
        if new:
            _push(queues, new[0], search.values([search.nodes[n].state for n in new]))
    return search.result(False, [start], [], [])


class _Search:
    """The nodes of a search, its components, and what they cost."""

    def __init__(
        self, problem: Any, policy: Any, value: Any, verifier: Any, accept: float, reject: float, slack: int
    ) -> None:
        self.problem, self.policy, self.value, self.verifier = problem, policy, value, verifier
        self.accept, self.reject, self.slack = accept, reject, slack
        self.nodes: list[_Node] = []
        self.seen: set[State] = set()
        self.n_visited = self.n_expanded = 0
        self.calls = {"generator": 0, "policy": 0, "value": 0, "verifier": 0}

    def add(self, node: _Node) -> int:
        self.nodes.append(node)
        self.seen.add(node.state)
        return len(self.nodes) - 1

    def values(self, states: list) -> list[float]:
        self.calls["value"] += 1
        return checked("value", self.value(states), (len(states),)).tolist()

    def proposed(self, generator: Callable, k: int, state: State, n: int) -> list:
        self.calls["generator"] += 1
        found = generator(state, n)
        if not isinstance(found, list) or len(found) > n:
            what = f"{len(found)} of them" if isinstance(found, list) else type(found).__name__
            raise ValueError(f"generators[{k}] must return a list of at most {n} states, got {what}")
        for each in found:
            _hashable(each, f"generators[{k}]")
        return found

    def reach(self, index: int, proposals: dict[State, int]) -> list[int]:
        """Return the new nodes: subgoals that the verifier vouches for, or to which the policy walks."""
        if not proposals:
            return []
        node, goals = self.nodes[index], list(proposals)
        sure = [0] * len(goals)  # 1 taken, -1 dropped, 0 to be walked
        if self.verifier is not None:
            self.calls["verifier"] += 1
            odds = checked("verifier", self.verifier([node.state] * len(goals), goals), (len(goals),))
            sure = [1 if p > self.accept else -1 if p < self.reject else 0 for p in odds.tolist()]
            self.n_visited += sum(map(abs, sure))
        unsure = [goal for goal, word in zip(goals, sure, strict=True) if not word]
        walks = dict(
            zip(
                unsure,
                self.walk(node.state, unsure, [proposals[g] + self.slack for g in unsure]),
                strict=True,
            )
        )
        new = []
        for goal, word in zip(goals, sure, strict=True):
            actions = None if word else walks[goal]
            if word > 0 or actions is not None:
                new.append(self.add(_Node(goal, index, proposals[goal], actions, node.depth + 1)))
        return new

    def walk(self, state: State, goals: list, limits: list[int]) -> list[list[int] | None]:
        """Return the actions of walks to several subgoals, all in step; None where the policy does not arrive."""
        at: list[State] = [state] * len(goals)
        actions: list[list[int]] = [[] for _ in goals]
        been: list[set[State]] = [{state} for _ in goals]
        arrived, walking = [False] * len(goals), list(range(len(goals)))
        while walking:
            self.calls["policy"] += 1
            logits = self.policy([at[i] for i in walking], [goals[i] for i in walking])
            chosen = checked("policy", logits, (len(walking), self.problem.n_actions)).argmax(1).tolist()
            self.n_visited += len(walking)
            still = []
            for i, action in zip(walking, chosen, strict=True):
                at[i] = self.problem.step(at[i], action)
                actions[i].append(action)
                if at[i] == goals[i]:
                    arrived[i] = True
                elif at[i] not in been[i] and len(actions[i]) < limits[i]:
                    been[i].add(at[i])
                    still.append(i)
            walking = still
        return [path if there else None for path, there in zip(actions, arrived, strict=True)]

    def path(self, goal: int) -> SubgoalSearchResult:
        """Return the way to a solved node; what the verifier vouched for is walked now."""
        chain = []
        while goal >= 0:
            chain.append(self.nodes[goal])
            goal = self.nodes[goal].parent
        chain.reverse()
        actions, distances = [], []
        for before, node in zip(chain, chain[1:], strict=False):
            part = node.actions
            if part is None:
                (part,) = self.walk(before.state, [node.state], [node.distance + self.slack])
                if part is None:
                    return self.result(False, [chain[0].state], [], [], failed=True)
            actions += part
            distances.append(len(part))
        return self.result(True, [node.state for node in chain], actions, distances)

    def result(
        self, solved: bool, states: list, actions: list[int], distances: list[int], failed: bool = False
    ) -> SubgoalSearchResult:
        return SubgoalSearchResult(
            solved, states, actions, distances, self.n_visited, len(self.nodes), self.n_expanded, self.calls, failed
        )  # fmt: skip


def checked(name: str, answer: Any, shape: tuple[int, ...]) -> Tensor:
    """Return what a component said if it is of a shape and without NaN."""
    answer = torch.as_tensor(answer).detach()
    if answer.shape != shape:
        raise ValueError(f"{name} must return {shape}, got {tuple(answer.shape)}")
    if answer.isnan().any():
        raise ValueError(f"{name} must return numbers, got NaN")
    return answer


def _next_queue(queues: dict[int, list[tuple[float, int]]], order: str) -> int | None:
    """Return the distance whose best state is expanded next, None when all queues are empty."""
    waiting = [k for k, queue in queues.items() if queue]
    if not waiting:
        return None
    if order == "best":
        return max(waiting, key=lambda k: (-queues[k][0][0], k))
    return max(waiting)


def _push(queues: dict[int, list[tuple[float, int]]], first: int, values: Sequence[float]) -> None:
    """Put new nodes, numbered from ``first``, into all queues; of equal values the older comes first."""
    for queue in queues.values():
        for n, value in enumerate(values, first):
            heapq.heappush(queue, (-value, n))


def _distances(generators: Any) -> list[int]:
    """Return the distances, longest first."""
    if not isinstance(generators, Mapping) or not generators:
        raise ValueError("generators must be a mapping of one distance or more to functions")
    for k in generators:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"generators must have distances of 1 or more, whole numbers, got {k!r}")
    return sorted(generators, reverse=True)


def _hashable(state: Any, source: str) -> None:
    try:
        hash(state)
    except TypeError:
        raise ValueError(
            f"states must be hashable, {source} gave a {type(state).__name__}: make it a tuple"
        ) from None
