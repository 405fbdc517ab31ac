"""How much worse a solver does on an instance whose optimum is no worse (ROCO).

A solver f is asked for instances that are a few edits away, each of which cannot worsen the optimum (a cheaper arc, a
precedence less, one more element in a set). Where its answer is worse nevertheless,

    ratio = (cost(f, G') - cost(f, G)) / cost(f, G),                                          (1)

that much its gap to the optimum has grown at least, though neither optimum is known. `attack` searches the edits
with the largest ratio and sees only the solver's answers, which the problem values itself: a solver is not trusted.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy import ndarray

from posterity._checks import integer, one_of
from posterity._models import held
from posterity._random import seed_from
from posterity.combinatorial.edit_policy import EditPolicy, log_probabilities
from posterity.combinatorial.edit_training import Answers, checked_problem, copied, edited, pairs_of

__all__ = ["AttackResult", "attack"]

METHODS = ("random", "anneal", "genetic", "policy")
HOT, COLD = 0.02, 0.002  # temperatures of annealing, in ratios
POPULATION = 20  # lists of edits of the genetic search


class AttackResult(NamedTuple):
    """What `attack` found.

    Attributes
    ----------
    instance : object
        The one on which the solver does worst, of the kind that was given.
    edits : list of tuple of int
        That lead to it, in order; empty where nothing makes the solver worse.
    value : float
        The solver's there.
    clean : float
        The solver's on the instance that was given.
    ratio : float
        The relative worsening, at least 0.
    history : list of float
        The largest ratio after each call of the solver, 0 after the first.
    n_calls : int
        Calls of the solver, the clean one among them.
    """

    instance: Any
    edits: list[tuple[int, int]]
    value: float
    clean: float
    ratio: float
    history: list[float]
    n_calls: int


def attack(
    problem: Any,
    solver: Callable[[Any], Any],
    instance: Any,
    *,
    method: Literal["random", "anneal", "genetic", "policy"] = "anneal",
    n_edits: int = 10,
    budget: int = 300,
    policy: EditPolicy | None = None,
    beam: int = 3,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Return a near instance on which a solver does worse, though the optimum there is no worse.

    Parameters
    ----------
    problem : object
        `ATSP`, `Scheduling`, `Coverage`, or an object with their ``sense`` ("min" or "max") and methods ``validate``,
        ``value``, ``edits`` and ``apply``; for "policy" also ``graph``, and ``nodes`` where the ends of an edit are
        not numbered as the graph's nodes are.
    solver : callable
        ``solver(instance)`` returns a solution. It gets a copy. Give it a limit of nodes or iterations, not of time: under
        a time limit answers differ from call to call, and luck is taken for an effect of edits.
    instance : object
        As ``problem`` takes it.
    method : {"random", "anneal", "genetic", "policy"}, default="anneal"
        "random" makes sequences of edits, of which the best beginning counts; "anneal" adds an edit or replaces one and
        keeps what is worse for the solver, or not much better; "genetic" joins and changes lists of edits; "policy" takes those
        that ``policy`` finds probable, and follows the ``beam`` that are worst for the solver.
    n_edits : int, default=10
        At most so many edits, at least 1.
    budget : int, default=300
        At most so many calls of the solver beside the first, at least 1.
    policy : EditPolicy, optional
        For "policy", as `fit_edit_policy` has trained it.
    beam : int, default=3
        For "policy": instances that are followed, first ends of edits that are tried of each, and second ends of each of
        these; at least 1.
    generator : torch.Generator, optional
        Of all draws, by default torch's global one; "policy" draws nothing.

    Returns
    -------
    AttackResult
        With ratio 0 and no edits where there is no edit, or none makes the solver worse.

    Raises
    ------
    ValueError
        If the instance, a number or ``method`` is not what it must be, ``policy`` does not fit, the solver returns a
        solution that is not feasible (the message says why), or its clean value is not above 0, so that there is no ratio.

    Notes
    -----
    1. The authors' repository has the learned attacker alone; the other methods are plain versions. Annealing cools from
       0.02 to 0.002, in ratios; the genetic search has 20 lists, of which a child replaces the least.
    2. Edits are those that ``problem`` allows beside the solver's present answer. An edit that is left when another is
       dropped stays: that the optimum is no worse does not depend on the order.

    References
    ----------
    .. [1] Lu et al. ROCO: A general framework for evaluating robustness of combinatorial optimization solvers
       on graphs. ICLR 2023. The robustness metric and the attackers.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from posterity.combinatorial import ATSP, attack
    >>> problem, generator = ATSP(), torch.Generator().manual_seed(0)
    >>> costs = np.array([[0, 4, 5, 9], [4, 0, 4, 9], [5, 4, 0, 5], [9, 9, 5, 0]])
    >>> found = attack(problem, problem.solvers["nearest"], costs, n_edits=1, budget=50, generator=generator)
    >>> found.clean, found.edits, found.value  # city 2 comes first, and the way back from 3 is long
    (22.0, [(0, 2)], 24.5)
    """
    need = ("graph",) if method == "policy" else ()
    checked_problem(problem, need)
    if not callable(solver):
        raise ValueError(f"solver must be a function of an instance, got {solver!r}")
    one_of("method", method, METHODS)
    integer("n_edits", n_edits, 1)
    integer("budget", budget, 1)
    integer("beam", beam, 1)
    if policy is not None and not isinstance(policy, EditPolicy):
        raise ValueError(f"policy must be an EditPolicy, got {type(policy).__name__}")
    if method == "policy" and policy is None:
        raise ValueError('policy must be an EditPolicy for method "policy", got None')
    rng = random.Random(0 if method == "policy" else seed_from(generator))
    problem.validate(instance)
    search = _Search(problem, solver, copied(instance), n_edits, budget, rng)
    if len(search.start.allowed):
        if policy is not None and method == "policy":
            with torch.no_grad(), held(policy):
                search.by_policy(policy, beam)
        else:
            getattr(search, method)()
    return search.result()


class _State(NamedTuple):
    """Edits, the instance that they lead to, and what the solver makes of it."""

    edits: list[tuple[int, int]]
    instance: Any
    solution: Any
    ratio: float  # below 0 where the solver does better
    value: float
    allowed: ndarray


class _Search:
    """The calls of a solver, and the worst answer so far."""

    def __init__(
        self,
        problem: Any,
        solver: Callable[[Any], Any],
        instance: Any,
        n_edits: int,
        budget: int,
        rng: random.Random,
    ) -> None:
        self.problem, self.rng, self.n_edits, self.budget = problem, rng, n_edits, budget
        self.answers = Answers(problem, solver)
        solution = self.answers.first(instance)
        self.history = [0.0]
        self.start = self.best = _State(
            [], instance, solution, 0.0, self.answers.clean, pairs_of(problem, instance, solution)
        )

    @property
    def left(self) -> int:
        """Calls that may still be made."""
        return self.budget + 1 - len(self.history)

    def ask(self, edits: Sequence[tuple[int, int]], instance: Any) -> _State:
        """Call the solver, and remember the worst."""
        solution, value, ratio = self.answers(instance)
        state = _State(list(edits), instance, solution, ratio, value, self.start.allowed)
        if ratio > self.best.ratio:
            self.best = state
        self.history.append(self.best.ratio)
        return state

    def follow(self, state: _State) -> _State:
        """Return a state with the edits that its own answer allows."""
        return state._replace(allowed=pairs_of(self.problem, state.instance, state.solution))

    def draw(self, allowed: ndarray) -> tuple[int, int]:
        """Return one of the edits."""
        i, j = allowed[self.rng.randrange(len(allowed))].tolist()
        return i, j

    def make(self, edits: Sequence[tuple[int, int]]) -> tuple[Any, list[tuple[int, int]]]:
        """Return the instance that edits lead to, and those of them that are possible one after the other."""
        return edited(self.problem, self.start.instance, edits)

    def random(self) -> None:
        """Make sequences of edits from the start, anew while calls are left."""
        while self.left:
            state = self.start
            while self.left and len(state.edits) < self.n_edits and len(state.allowed):
                edit = self.draw(state.allowed)
                state = self.follow(self.ask([*state.edits, edit], self.problem.apply(state.instance, edit)))

    def anneal(self) -> None:
        """Add an edit, or replace one when there are enough; keep by the rule of Metropolis."""
        state = self.start
        for k in range(self.budget):
            edits = list(state.edits)
            if edits and (len(edits) == self.n_edits or not len(state.allowed)):
                del edits[self.rng.randrange(len(edits))]
            if len(state.allowed):
                edits.append(self.draw(state.allowed))
            instance, edits = self.make(edits)
            new = self.ask(edits, instance)
            temperature = HOT * (COLD / HOT) ** (k / max(1, self.budget - 1))
            change = new.ratio - state.ratio
            if change >= 0 or self.rng.random() < math.exp(change / temperature):
                state = self.follow(new)

    def genetic(self) -> None:
        """Join the beginning of one list with the end of another and replace an edit; the child replaces the least."""
        people = []
        for _ in range(min(POPULATION, self.left)):
            rows = self.rng.sample(range(len(self.start.allowed)), min(self.n_edits, len(self.start.allowed)))
            instance, edits = self.make([(i, j) for i, j in self.start.allowed[rows].tolist()])
            people.append(self.follow(self.ask(edits, instance)))
        while self.left:
            one, two = (
                max((self.rng.choice(people) for _ in range(2)), key=lambda state: state.ratio)
                for _ in range(2)
            )
            cut = self.rng.randint(0, self.n_edits)
            edits = [*one.edits[:cut], *two.edits[cut:]]
            if len(one.allowed):
                edit = self.draw(one.allowed)
                if edits:
                    edits[self.rng.randrange(len(edits))] = edit
                else:
                    edits = [edit]
            instance, edits = self.make(edits)
            child = self.follow(self.ask(edits, instance))
            least = min(range(len(people)), key=lambda k: people[k].ratio)
            if child.ratio >= people[least].ratio:
                people[least] = child

    def by_policy(self, policy: EditPolicy, beam: int) -> None:
        """Follow the instances that are worst for the solver, a depth at a time; no list of edits is tried twice."""
        front, seen = [self.start], set()
        for _ in range(self.n_edits):
            found = []
            scores = log_probabilities(policy, self.problem, front)
            for state, score in zip(front, scores, strict=True):
                for row in _probable(state.allowed[:, 0], score, beam):
                    i, j = state.allowed[row].tolist()
                    edits = [*state.edits, (i, j)]
                    if tuple(sorted(edits)) in seen or not self.left:
                        continue
                    seen.add(tuple(sorted(edits)))
                    found.append(self.ask(edits, self.problem.apply(state.instance, (i, j))))
            found.sort(key=lambda state: -state.ratio)
            front = [state for state in map(self.follow, found[:beam]) if len(state.allowed)]
            if not front or not self.left:
                return

    def result(self) -> AttackResult:
        """Return the worst."""
        best, n = self.best, len(self.history)
        return AttackResult(
            best.instance, best.edits, best.value, self.answers.clean, best.ratio, self.history, n
        )


def _probable(first: ndarray, score: ndarray, beam: int) -> list[int]:
    """Return rows of edits: of the most probable first ends, each with its most probable second ends, likeliest first."""
    score = np.nan_to_num(score, nan=-np.inf)
    order = np.argsort(-score, kind="stable")
    mass = {end: np.logaddexp.reduce(score[first == end]) for end in np.unique(first).tolist()}
    ends = sorted(mass, key=lambda end: -mass[end])[:beam]
    rows = [row for end in ends for row in order[first[order] == end][:beam].tolist()]
    return sorted(rows, key=lambda row: -score[row])
