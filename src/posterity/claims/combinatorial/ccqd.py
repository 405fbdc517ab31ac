"""CCQD: an archive of gaits by shared representations, by evolution alone, and by gradients that share nothing."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from torch import nn

from posterity._checks import needs
from posterity.claims import Between, Count, NotNegative, PartOfAll, Several, Trial, comparison
from posterity.combinatorial import CCQD
from posterity.lab.environments import Gait, GaitEpisodes

CELLS = 20  # on a side of the grid
RATES = {"representation_lr": 3e-4, "decision_lr": 1e-3, "greedy_lr": 1e-3, "critic_lr": 1e-3}
SIZES = {"n_sampled": 12, "train_batch": 64, "hidden": (64, 64), "encoder": (32, 32)}

Place = Annotated[int, Between(0)]


class Task(NamedTuple):
    """What policies are for: sizes, and how n episodes are run at once."""

    obs_dim: int
    action_dim: int
    episodes: Callable[[Callable[[Any], Any], int], GaitEpisodes]


def _possible(
    env: str = "gait", first: int = 0, second: int = 2, batch_size: int = 50, n_representations: int = 4,
    gradient_share: float = 0.5, **_: Any,
) -> None:  # fmt: skip
    seen = _task(env, first, second, 0).obs_dim
    if max(first, second) >= seen:
        raise ValueError(
            f"first and second must be two of the {seen} observed numbers, got {first}, {second}"
        )
    if round(gradient_share * batch_size) < n_representations:
        raise ValueError(
            "gradient_share of batch_size must be at least n_representations, "
            f"got {round(gradient_share * batch_size)} and {n_representations}"
        )


@comparison(
    paper="ccqd",
    says="Learned representations and evolved decisions fill an archive better than evolution alone.",
    where="Abstract and Section 4",
    arms=("MAP-Elites", "CCQD"),
    metric="QD score after 2,000 episodes",
    better="higher",
    check=_possible,
    smallest={"generations": 2, "critic_steps": 2, "decision_steps": 1, "batch_size": 12, "width": 8},
)
def cooperation(
    trial: Trial,
    env: str = "gait",
    first: Place = 0,
    second: Place = 2,
    generations: Count = 40,
    batch_size: Several = 50,
    n_representations: Count = 4,
    gradient_share: PartOfAll = 0.5,
    critic_steps: Count = 30,
    decision_steps: Count = 10,
    width: Count = 64,
    iso_sigma: NotNegative = 0.1,
    line_sigma: NotNegative = 0.05,
    discount: Annotated[float, Between(0, 1)] = 0.97,
) -> dict[str, float]:
    """Fill a grid of 20 x 20 with policies, by how often two joints are bent forward, in so many episodes.

    The score is the sum over filled cells of the return and 1. Both arms start from the same policies, and make
    offspring alike: ``iso_sigma`` and ``line_sigma`` are those that serve evolution alone best, which at the published 0.005
    reaches a seventh of what it reaches here; gradients take part of the batch. ``env`` may be the
    name of an environment of Gymnasium with continuous actions, as ``env="HalfCheetah-v5", first=2, second=5``
    (``pip install "gymnasium[mujoco]"``); measured are the shares of time that two observed numbers are
    positive.
    """
    how = {"critic_steps": critic_steps, "decision_steps": decision_steps, "discount": discount}
    how |= {"iso_sigma": iso_sigma, "line_sigma": line_sigma, "n_representations": n_representations}
    task = _task(env, first, second, trial.seed)
    return {
        arm: _scores(
            trial, arm, task, generations, width, batch_size=batch_size, gradient_share=share, **how
        )[-1]
        for arm, share in (("MAP-Elites", 0.0), ("CCQD", gradient_share))
    }


@comparison(
    paper="ccqd",
    says="Shared representations make better use of early episodes than gradients that share nothing.",
    where="Abstract and Section 4, against PGA-MAP-Elites",
    arms=("PGA-MAP-Elites", "CCQD"),
    metric="QD score after 1,000 episodes",
    better="higher",
    seeds=10,
    reason="Sharing gains about 300 of 11,400 in these few episodes, and single seeds differ by twice that.",
    check=_possible,
    smallest={"generations": 2, "critic_steps": 2, "decision_steps": 1, "batch_size": 12, "width": 8},
)
def sample_efficiency(
    trial: Trial,
    env: str = "gait",
    first: Place = 0,
    second: Place = 2,
    generations: Count = 20,
    batch_size: Several = 50,
    n_representations: Count = 4,
    gradient_share: PartOfAll = 0.5,
    critic_steps: Count = 60,
    decision_steps: Count = 30,
    width: Count = 64,
    iso_sigma: NotNegative = 0.2,
    line_sigma: NotNegative = 0.05,
    discount: Annotated[float, Between(0, 1)] = 0.97,
) -> dict[str, float]:
    """Fill the same grid in half as many episodes, with more steps of training between them.

    Without sharing there is one actor and one critic, which improves elites in all their weights. Both arms have the same
    numbers of steps, rates and offspring, which are the best for the first among those tried. The advantage is small, about 600 of
    11,000 and as large as its spread; it is one of few episodes and much training: with ``generations=40,
    critic_steps=30, decision_steps=10`` there is none, and with ``critic_steps=100`` half of it is left. At the published
    ``iso_sigma=0.005``, which serves both worse, it is 2,000, and its spread too. A step costs CCQD about four times as much.
    """
    how = {"critic_steps": critic_steps, "decision_steps": decision_steps, "discount": discount}
    how |= {"iso_sigma": iso_sigma, "line_sigma": line_sigma, "n_representations": n_representations}
    how |= {"gradient_share": gradient_share, "batch_size": batch_size}
    task = _task(env, first, second, trial.seed)
    return {
        arm: _scores(trial, arm, task, generations, width, shared=shared, **how)[-1]
        for arm, shared in (("PGA-MAP-Elites", False), ("CCQD", True))
    }


def _scores(
    trial: Trial, arm: str, task: Task, generations: int, width: int, *, batch_size: int, **how: Any
) -> list[float]:
    """Fill an archive; return its QD score after each generation."""
    representation = nn.Sequential(nn.Linear(task.obs_dim, width), nn.Tanh())
    decision = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, task.action_dim), nn.Tanh())
    n_weights = sum(p.numel() for part in (representation, decision) for p in part.parameters())
    archive = needs("ribs.archives", "combinatorial").GridArchive(
        solution_dim=n_weights, dims=[CELLS, CELLS], ranges=[(0, 1)] * 2, dtype=np.float32, qd_score_offset=-1,
        extra_fields={"representation": ((), np.int32)}, seed=trial.seed,
    )  # fmt: skip
    emitter = CCQD(
        archive, representation, decision, obs_dim=task.obs_dim, action_dim=task.action_dim, batch_size=batch_size,
        seed=trial.seed, device=trial.device, **RATES, **SIZES, **how,
    )  # fmt: skip
    scores = []
    for generation in range(generations):
        solutions = emitter.ask()
        seen = task.episodes(lambda obs, rows=solutions: emitter.act(rows, obs).cpu().numpy(), batch_size)
        emitter.tell(seen.objective, seen.measures, seen.transitions)
        scores.append(float(archive.stats.qd_score))
        trial.track(f"QD score: {arm}", (generation + 1) * batch_size, scores[-1])
    trial.record(f"filled cells of {CELLS**2}: {arm}", len(archive))
    trial.record(f"best return: {arm}", archive.stats.obj_max)
    return scores


def _task(env: str, first: int, second: int, seed: int) -> Task:
    """Return a task by name, or say what is wrong with it."""
    if env == "gait":
        world = Gait()
        return Task(2 * world.n_joints + 2, world.n_joints, world.rollout)
    try:
        spaces = gymnasium.make(env)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"env must be 'gait' or an environment of Gymnasium that is installed: {error}"
        ) from error
    seen, moves = spaces.observation_space, spaces.action_space
    spaces.close()
    if not (
        isinstance(seen, Box) and len(seen.shape) == 1 and isinstance(moves, Box) and len(moves.shape) == 1
    ):
        raise ValueError(f"env must observe and take rows of numbers, got {seen} and {moves} of {env}")
    if not (np.isfinite(moves.low).all() and np.isfinite(moves.high).all()):
        raise ValueError(f"env must have bounded actions, got {moves} of {env}")

    def episodes(act: Callable[[Any], Any], n: int) -> GaitEpisodes:
        return _episodes(env, act, n, [first, second], seed)

    return Task(seen.shape[0], moves.shape[0], episodes)


def _episodes(env: str, act: Callable[[Any], Any], n: int, measured: list[int], seed: int) -> GaitEpisodes:
    """Run an episode of each of n environments of Gymnasium, which all begin as they always do."""
    running = gymnasium.make_vec(env, num_envs=n, vectorization_mode="sync")
    moves: Any = running.single_action_space
    obs, _ = running.reset(seed=seed)
    total, positive, length, going, steps = np.zeros(n), np.zeros((n, 2)), np.zeros(n), np.ones(n, bool), []
    while going.any():
        action = np.clip(act(obs.astype(np.float32)), -1, 1)
        scaled = moves.low + (action + 1) / 2 * (moves.high - moves.low)
        after, reward, terminated, truncated, _ = running.step(scaled.astype(moves.dtype))
        steps.append([each[going] for each in (obs, action, after, reward, terminated, truncated)])
        total += going * reward
        positive += going[:, None] * (after[:, measured] > 0)
        length += going
        going &= ~(terminated | truncated)
        obs = after
    running.close()
    before, action, after, reward, terminated, truncated = map(np.concatenate, zip(*steps, strict=True))
    then = {"observation": after, "reward": reward, "terminated": terminated, "truncated": truncated}
    return GaitEpisodes(
        total, positive / length[:, None], {"observation": before, "action": action, "next": then}
    )
