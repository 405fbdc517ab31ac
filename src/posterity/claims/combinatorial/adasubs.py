"""Adaptive subgoal search: several distances, longest first, against one, and against search by single steps."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from posterity.claims import Between, Count, NotNegative, Trial, comparison
from posterity.combinatorial import (
    SubgoalModels,
    SubgoalSearchResult,
    adaptive_subgoal_search,
    fit_subgoal_models,
)
from posterity.lab.environments import SlidingPuzzle

DISTANCES = (4, 3, 2)
ADAPTIVE = {"reject": 0.05, "n_subgoals": 2, "slack": 1}  # the verifier only rejects
LOOKS = 8  # points of a curve over the budget

State = tuple[int, ...]
Side = Annotated[int, Between(2, 5)]
Moves = Annotated[int, Between(4, 1000)]


@comparison(
    paper="adasubs",
    says="Several distances, longest first, solve more than one long distance within the same budget.",
    where="Section 4.3, Figure 2",
    arms=("kSubS, k = 4", "AdaSubS, k = 4, 3, 2"),
    metric="share of puzzles solved within the budget",
    better="higher",
    smallest={"size": 2, "n_walks": 20, "walk": 12, "scramble": 12, "n_steps": 3, "n_tests": 3, "budget": 40},
)
def solved_within(
    trial: Trial, size: Side = 3, n_walks: Count = 5000, walk: Moves = 40, scramble: Moves = 80,
    n_steps: Count = 1000, n_tests: Count = 25, budget: Count = 400,
) -> dict[str, float]:  # fmt: skip
    """Solve sliding puzzles with one set of networks, by subgoals four steps on alone and by those four, three and two on.

    The networks learn from random walks away from the goal, turned round; the puzzles are scrambled by longer ones. As
    published, a single distance takes three subgoals and no verifier; the adaptive search takes two, and a verifier that only rejects.
    Recorded: the best single distance, against which nothing is gained here (what adaptivity saves is choosing it), and
    best-first search by single steps with the same value network, which solves all of these small puzzles within a few dozen states:
    where a value is that good, subgoals do not pay.
    """
    puzzle, models, starts = _setting(trial.seed, size, n_walks, walk, scramble, n_steps, n_tests)
    found = {
        f"kSubS, k = {k}": _solve(
            puzzle, models, starts, budget, generators={k: models.generators[k]}, verifier=None, n_subgoals=3, slack=1
        )
        for k in DISTANCES
    }  # fmt: skip
    found["AdaSubS, k = 4, 3, 2"] = _solve(puzzle, models, starts, budget, **ADAPTIVE)
    found["best-first, single steps"] = _solve(puzzle, models, starts, budget, **_single_steps(puzzle))
    for name, results in found.items():
        for look in range(1, LOOKS + 1):
            within = budget * look / LOOKS
            share = np.mean([each.solved and each.n_visited <= within for each in results])
            trial.track(f"solved within so many states: {name}", within, float(share))
    shares = {name: float(np.mean([each.solved for each in results])) for name, results in found.items()}
    best = max(shares[f"kSubS, k = {k}"] for k in DISTANCES)
    trial.record("share solved by the best single distance", best)
    trial.record("share solved by best-first search of single steps", shares["best-first, single steps"])
    verifierless = _solve(puzzle, models, starts, budget, **{**ADAPTIVE, "reject": 0.0, "verifier": None})
    trial.record("share solved without a verifier", float(np.mean([each.solved for each in verifierless])))
    for name, results in (("with", found["AdaSubS, k = 4, 3, 2"]), ("without", verifierless)):
        calls = float(np.mean([each.calls["policy"] for each in results]))
        trial.record(f"calls of the policy a puzzle {name} a verifier", calls)
    return {name: shares[name] for name in ("kSubS, k = 4", "AdaSubS, k = 4, 3, 2")}


@comparison(
    paper="adasubs",
    says="A search by subgoals suffers less from errors of the value than one by single steps.",
    where="Section 4.4, errors of the value function",
    arms=("best-first", "AdaSubS"),
    metric="states visited with a noisy value over those with the clean one",
    better="lower",
    smallest={"size": 2, "n_walks": 20, "walk": 12, "scramble": 12, "n_steps": 3, "n_tests": 3, "budget": 40},
)
def errors_of_the_value(
    trial: Trial, noise: NotNegative = 6.0, size: Side = 3, n_walks: Count = 5000, walk: Moves = 40,
    scramble: Moves = 80, n_steps: Count = 1000, n_tests: Count = 25, budget: Count = 400,
) -> dict[str, float]:  # fmt: skip
    """Add to the value of each state a fixed normal error, of six steps' deviation, and count what the searches visit.

    An unsolved puzzle counts as the whole budget. Networks, puzzles and errors are the same for both. The ratio says what
    errors cost; in the number of states itself, recorded, the two are level with errors, and best-first far ahead without.
    """
    puzzle, models, starts = _setting(trial.seed, size, n_walks, walk, scramble, n_steps, n_tests)

    def noisy(states: Sequence[State]) -> Tensor:
        errors = [np.random.default_rng([trial.seed, *state]).normal() for state in states]
        return models.value(list(states)) + noise * torch.tensor(errors, dtype=torch.float32)

    ratios = {}
    for name, options in (("best-first", _single_steps(puzzle)), ("AdaSubS", ADAPTIVE)):
        clean, rough = (
            float(
                np.mean(
                    [
                        each.n_visited if each.solved else budget
                        for each in _solve(puzzle, models, starts, budget, **options, value=value)
                    ]
                )
            )
            for value in (models.value, noisy)
        )
        trial.record(f"states visited: {name}", clean)
        trial.record(f"states visited with errors: {name}", rough)
        ratios[name] = rough / max(clean, 1.0)
    return ratios


def _setting(
    seed: int, size: int, n_walks: int, walk: int, scramble: int, n_steps: int, n_tests: int
) -> tuple[SlidingPuzzle, SubgoalModels, list[State]]:
    """Return the puzzle, networks that have learned it, and scrambled states to solve."""
    puzzle, rng = SlidingPuzzle(size), np.random.default_rng(seed)
    walks = [puzzle.trajectory(walk, rng) for _ in range(n_walks)]
    models = fit_subgoal_models(
        puzzle, walks, distances=DISTANCES, n_steps=n_steps, generator=torch.Generator().manual_seed(seed)
    )
    return puzzle, models, [puzzle.trajectory(scramble, rng)[0][0] for _ in range(n_tests)]


def _solve(
    puzzle: SlidingPuzzle, models: SubgoalModels, starts: list[State], budget: int, **options: Any
) -> list[SubgoalSearchResult]:
    parts = {**models._asdict(), "budget": budget, **options}
    return [adaptive_subgoal_search(puzzle, start, **parts) for start in starts]


def _single_steps(puzzle: SlidingPuzzle) -> dict[str, Any]:
    """Return the parts of best-first search: the next states, and the action that leads to one."""

    def policy(states: list[State], goals: list[State]) -> Tensor:
        pairs = zip(states, goals, strict=True)
        return torch.tensor([[float(puzzle.step(s, a) == g) for a in range(4)] for s, g in pairs])

    def onward(state: State, n: int) -> list[State]:
        return list(dict.fromkeys(puzzle.step(state, action) for action in range(4)))

    return {"generators": {1: onward}, "policy": policy, "verifier": None, "n_subgoals": 4}
