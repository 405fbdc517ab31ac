"""Training of a policy of edits by the answers of a solver (proximal policy optimisation).

The reward of a step is what its edit has added to the relative worsening of the solver's value; with g the discounted
rewards to the end of the episode and r the new probability of the edit over that when it was made,

    loss = - min(r a, clip(r, 1 - c, 1 + c) a),   a = g - value of the instance.                 (1)
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import at_least, integer, within
from posterity._precision import NARROW
from posterity._random import seed_from
from posterity.combinatorial.edit_policy import EditPolicy, joined, seen_by
from posterity.combinatorial.edited_tours import ATSP

__all__ = ["fit_edit_policy"]

SLOW = 0.1  # of the rate, for the convolutions
ENTROPY, CRITIC = 0.01, 0.5  # weights of terms of the loss


class _At(NamedTuple):
    """Where an episode is."""

    instance: Any
    solution: Any
    allowed: ndarray


class _Step(NamedTuple):
    """An edit that was made."""

    graph: tuple[Tensor, Tensor, Tensor, Tensor]
    row: int
    log_p: float
    reward: float
    last: bool


@torch.inference_mode(False)
@torch.enable_grad()
def fit_edit_policy(
    policy: EditPolicy,
    problem: Any,
    solver: Callable[[Any], Any],
    instances: Sequence[Any],
    *,
    episodes: int = 500,
    n_edits: int = 10,
    gamma: float = 0.95,
    lr: float = 1e-3,
    update_every: int = 20,
    epochs: int = 10,
    clip: float = 0.1,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train a policy, in place, to make edits that mislead a solver (proximal policy optimisation).

    Parameters
    ----------
    policy : EditPolicy
        In float32 or float64. What is frozen of it stays.
    problem : object
        As `attack` takes it, with ``graph``.
    solver : callable
        ``solver(instance)`` returns a solution; it is called once an edit, and once for each instance.
    instances : sequence
        Episodes begin at them in turn, in an order drawn anew each time.
    episodes : int, default=500
        Sequences of edits, at least 1.
    n_edits : int, default=10
        Of an episode, at least 1; fewer where none is left.
    gamma : float, default=0.95
        By which a reward counts less each step before, in [0, 1].
    lr : float, default=1e-3
        The rate of Adam, positive; of the convolutions a tenth.
    update_every : int, default=20
        Edits after which the policy is updated, at least 1, at the next end of an episode.
    epochs : int, default=10
        Steps of an update, each with all its edits, at least 1.
    clip : float, default=0.1
        How far a probability may move in an update, relative, positive.
    generator : torch.Generator, optional
        Of instances and edits, by default torch's global one.

    Returns
    -------
    list of float
        The mean return of each update: the ratio at the end of an episode, mean over its episodes; 0 of instances without
        an edit.

    Raises
    ------
    ValueError
        If ``policy`` is in half precision, has nothing to train or does not fit the graph, ``instances`` is empty, a number is
        out of range, or the solver returns a solution that is not feasible.

    Notes
    -----
    1. Rewards are relative to the clean value of each instance, so that large instances do not count more; updates
       wait for the end of an episode. Both differ from the authors' code.

    References
    ----------
    .. [1] Lu et al. ROCO: A general framework for evaluating robustness of combinatorial optimization solvers
       on graphs. ICLR 2023. The learned attacker.
    .. [2] Schulman et al. Proximal policy optimization algorithms. 2017. Equation 7.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from posterity.combinatorial import ATSP, EditPolicy, fit_edit_policy
    >>> problem, costs = ATSP(), np.random.default_rng(0).integers(1, 99, (6, 6))
    >>> returns = fit_edit_policy(EditPolicy(), problem, problem.solvers["nearest"], [costs], episodes=4, n_edits=5,
    ...                           update_every=10, epochs=1, generator=torch.Generator().manual_seed(0))
    >>> len(returns)
    2
    """
    if not isinstance(policy, EditPolicy):
        raise ValueError(f"policy must be an EditPolicy, got {type(policy).__name__}")
    checked_problem(problem, ("graph",))
    if not callable(solver):
        raise ValueError(f"solver must be a function of an instance, got {solver!r}")
    _check_trainable(policy)
    for name, count in (
        ("episodes", episodes),
        ("n_edits", n_edits),
        ("update_every", update_every),
        ("epochs", epochs),
    ):
        integer(name, count, 1)
    within("gamma", gamma, 0, 1)
    at_least("lr", lr, 0, strict=True)
    at_least("clip", clip, 0, strict=True)
    if not isinstance(instances, Sequence) or isinstance(instances, str) or hasattr(instances, "_fields"):
        raise ValueError(f"instances must be a list of instances, got {type(instances).__name__}")
    if not len(instances):
        raise ValueError("instances must have at least one, got none")
    for instance in instances:
        problem.validate(instance)
    rng = random.Random(seed_from(generator))
    answers = []
    for instance in map(copied, instances):
        answer = Answers(problem, solver)
        solution = answer.first(instance)
        answers.append((answer, _At(instance, solution, pairs_of(problem, instance, solution))))
    convolutions = {id(p) for p in policy.layers.parameters()}
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {
                "params": [p for p in trained if (id(p) in convolutions) == slow],
                "lr": lr * (SLOW if slow else 1),
            }
            for slow in (False, True)
            if any((id(p) in convolutions) == slow for p in trained)
        ]
    )
    returns, steps, ends, order = [], [], [], []
    for episode in range(episodes):
        if not order:
            order = rng.sample(range(len(answers)), len(answers))
        answer, at = answers[order.pop()]
        new, end = _episode(policy, problem, answer, at, n_edits, rng)
        steps += new
        ends.append(end)
        if len(steps) >= update_every or episode == episodes - 1:
            if steps:
                _update(policy, optimizer, steps, gamma, epochs, clip)
            returns.append(float(np.mean(ends)))
            steps, ends = [], []
    optimizer.zero_grad()
    return returns


class Answers:
    """A solver's answers, valued by the problem, and how much worse than the first they are."""

    def __init__(self, problem: Any, solver: Callable[[Any], Any]) -> None:
        self.problem, self.solver = problem, solver
        self.sign = 1.0 if problem.sense == "min" else -1.0

    def first(self, instance: Any) -> Any:
        """Return the answer with which others are compared."""
        self.clean = 1.0
        solution, self.clean, _ = self(instance)
        if not self.clean > 0:
            raise ValueError(
                f"solver must have a clean value above 0, or there is no ratio to it, got {self.clean}"
            )
        return solution

    def __call__(self, instance: Any) -> tuple[Any, float, float]:
        """Return an answer, its value and the ratio."""
        solution = copied(self.solver(copied(instance)))
        try:
            value = float(self.problem.value(instance, solution))
        except ValueError as error:
            raise ValueError(f"solver must return a feasible solution: {error}") from error
        if value != value:
            raise ValueError("problem must value a solution, got NaN")
        return solution, value, self.sign * (value - self.clean) / self.clean


def checked_problem(problem: Any, more: Sequence[str] = ()) -> None:
    """Refuse what has not the methods of a problem."""
    missing = [
        name
        for name in ("validate", "value", "edits", "apply", *more)
        if not callable(getattr(problem, name, None))
    ]
    if missing or isinstance(problem, type):
        what = "a class" if isinstance(problem, type) else f"no {', '.join(missing)}"
        raise ValueError(f"problem must be an object as ATSP() is, has {what}")
    if getattr(problem, "sense", None) not in ("min", "max"):
        raise ValueError(f'problem must have sense "min" or "max", got {getattr(problem, "sense", None)!r}')


def copied(value: Any) -> Any:
    """Return an instance or a solution that what writes into its arrays and lists does not reach."""
    if isinstance(value, ndarray):
        return value.copy()
    if isinstance(value, list):
        return list(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(part) for part in value))
    return value


def pairs_of(problem: Any, instance: Any, solution: Any) -> Int[ndarray, "m 2"]:
    """Return the edits that a problem allows."""
    found = np.asarray(problem.edits(instance, solution))
    if not found.size:
        return np.zeros((0, 2), dtype=np.int64)
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise ValueError(
            f"problem must have edits of shape (m, 2), integers, got {found.dtype} {found.shape}"
        )
    return found


def edited(
    problem: Any, instance: Any, edits: Sequence[tuple[int, int]]
) -> tuple[Any, list[tuple[int, int]]]:
    """Return the instance after edits, and those of them that were possible one after the other."""
    if type(problem) is ATSP:
        return problem._edited(instance, edits), list(edits)  # one copy
    kept = []
    for edit in edits:
        try:
            instance = problem.apply(instance, edit)
        except ValueError:  # gone, or there already
            continue
        kept.append(edit)
    return instance, kept


def _check_trainable(policy: EditPolicy) -> None:
    trained = [p for p in policy.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("policy must have a parameter that requires a gradient, got none")
    if any(p.is_inference() for p in trained):
        raise ValueError(
            "policy must not be made under torch.inference_mode, whose tensors cannot be trained"
        )
    narrow = next((p.dtype for p in policy.parameters() if p.dtype in NARROW), None)
    if narrow is not None:
        raise ValueError(
            f"policy must be in float32 or float64 to be trained, got {narrow}: cast it afterwards"
        )


def _episode(
    policy: EditPolicy, problem: Any, answer: Answers, at: _At, n_edits: int, rng: random.Random
) -> tuple[list[_Step], float]:
    """Return the steps of an episode, and the ratio at its end."""
    steps, ratio = [], 0.0
    for k in range(n_edits):
        if not len(at.allowed):
            break
        graph = seen_by(policy, problem, at)
        with torch.no_grad(), torch.autocast(policy.second.weight.device.type, enabled=False):
            log_p = policy._score(joined([graph], policy))[0].double().cpu().numpy()
        if not np.isfinite(log_p).any():
            raise ValueError("policy must give finite probabilities, got NaN")
        reach = np.cumsum(np.exp(log_p))
        row = min(int(np.searchsorted(reach, rng.random() * reach[-1], side="right")), len(reach) - 1)
        i, j = at.allowed[row].tolist()
        instance = problem.apply(at.instance, (i, j))
        solution, _, new = answer(instance)
        at = _At(instance, solution, pairs_of(problem, instance, solution))
        last = k == n_edits - 1 or not len(at.allowed)
        steps.append(_Step(graph, row, float(log_p[row]), new - ratio, last))
        ratio = new
    return steps, ratio


def discounted(steps: Sequence[Any], gamma: float) -> list[float]:
    """Return what is gained from each step on to the end of its episode."""
    future, gains = 0.0, []
    for step in reversed(steps):
        future = step.reward + (0.0 if step.last else gamma * future)
        gains.append(future)
    return gains[::-1]


def _update(
    policy: EditPolicy,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[_Step],
    gamma: float,
    epochs: int,
    clip: float,
) -> None:
    """Move the policy towards edits that brought more than expected."""
    graphs = joined([step.graph for step in steps], policy)
    like = policy.second.weight
    gain = torch.tensor(discounted(steps, gamma), dtype=like.dtype, device=like.device)
    gain = (gain - gain.mean()) / (gain.std(correction=0) + 1e-5)
    before = torch.tensor([step.log_p for step in steps], dtype=like.dtype, device=like.device)
    sizes = [len(step.graph[3]) for step in steps]
    rows = torch.tensor(
        [shift + step.row for shift, step in zip(np.cumsum([0, *sizes[:-1]]).tolist(), steps, strict=True)]
    ).to(like.device)
    for _ in range(epochs):
        with torch.autocast(like.device.type, enabled=False):
            log_p, value, entropy = policy._score(graphs)
        ratio = (log_p[rows] - before).exp()
        advantage = gain - value.detach()
        actor = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        loss = (actor - ENTROPY * entropy).mean() + CRITIC * F.mse_loss(value, gain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
