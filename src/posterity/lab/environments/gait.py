"""A body of joints in a row that a travelling wave moves: many ways to walk, seconds to learn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy import ndarray

__all__ = ["Gait", "GaitEpisodes"]


class GaitEpisodes(NamedTuple):
    """What `Gait.rollout` saw.

    Attributes
    ----------
    objective : ndarray
        The sum of rewards of each episode, of shape (n,).
    measures : ndarray
        The shares of time that the first and the third joint were bent forward, of shape (n, 2).
    transitions : dict
        All steps, flat over episodes, episode after episode, under TorchRL's keys, the last of which are
        under ``"next"``.
    """

    objective: ndarray
    measures: ndarray
    transitions: dict[str, Any]


class Gait:
    """A world of damped joints with a clock, paid for waves that travel along the body.

    With angles q and speeds v of joints in a row, and a clock c, each step is

        v += 0.1 (4 a - 2 q - 0.8 v),   q = clip(q + 0.1 v, -2, 2),   c += 0.15,

    and its reward 0.1 sum_j (q_j v_(j+1) - q_(j+1) v_j) - 0.002 |a|^2 after it. An episode begins at rest with
    c = 0, so that all of it follows from the policy.

    Parameters
    ----------
    n_joints : int, default=4
        At least 3.
    n_steps : int, default=60
        Of an episode, at least 1.

    Attributes
    ----------
    observation_space, action_space : gymnasium.spaces.Box
        Angles, speeds, sine and cosine of the clock; torques in [-1, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.lab.environments import Gait
    >>> seen = Gait().rollout(lambda obs: np.ones((2, 4)), 2)
    >>> seen.measures  # pushed forward all the time
    array([[1., 1.],
           [1., 1.]])
    """

    def __init__(self, n_joints: int = 4, n_steps: int = 60) -> None:
        if n_joints < 3 or n_steps < 1:
            raise ValueError(f"n_joints must be at least 3 and n_steps at least 1, got {n_joints}, {n_steps}")
        self.n_joints, self.n_steps = n_joints, n_steps
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2 * n_joints + 2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (n_joints,), np.float32)

    def start(self, n: int, rng: np.random.Generator | None = None) -> tuple[ndarray, ndarray, ndarray]:
        """Return angles, speeds and clocks of n bodies at rest; nothing is drawn."""
        return np.zeros((n, self.n_joints)), np.zeros((n, self.n_joints)), np.zeros((n, 1))

    def observe(self, state: tuple[ndarray, ndarray, ndarray]) -> ndarray:
        """Return what is seen of states, of shape (n, observations)."""
        q, v, c = state
        return np.concatenate([q, v, np.sin(c), np.cos(c)], axis=1, dtype=np.float32)

    def move(
        self, state: tuple[ndarray, ndarray, ndarray], action: ndarray
    ) -> tuple[tuple[ndarray, ndarray, ndarray], ndarray, ndarray]:
        """Return the next states, rewards and that no episode has ended."""
        q, v, c = state
        a = np.clip(np.asarray(action, dtype=np.float64), -1, 1)
        v = v + 0.1 * (4 * a - 2 * q - 0.8 * v)
        q = np.clip(q + 0.1 * v, -2, 2)
        wave = (q[:, :-1] * v[:, 1:] - q[:, 1:] * v[:, :-1]).sum(1)
        return (q, v, c + 0.15), 0.1 * wave - 0.002 * (a**2).sum(1), np.zeros(len(q), dtype=bool)

    def rollout(self, act: Callable[[ndarray], Any], n: int) -> GaitEpisodes:
        """Run n episodes at once.

        Parameters
        ----------
        act : callable
            From observations (n, observations) to actions (n, joints), array or tensor.
        n : int

        Returns
        -------
        GaitEpisodes
        """
        state = self.start(n)
        obs, forward, steps = self.observe(state), np.zeros((n, 2)), []
        for _ in range(self.n_steps):
            action = np.asarray(act(obs))
            state, reward, _ = self.move(state, action)
            after = self.observe(state)
            steps.append((obs, action, after, reward))
            forward += state[0][:, [0, 2]] > 0
            obs = after
        before, action, after, reward = (
            np.stack(each, axis=1, dtype=np.float32) for each in zip(*steps, strict=True)
        )
        last = np.zeros((n, self.n_steps), dtype=bool)
        last[:, -1] = True
        transitions = {
            "observation": before.reshape(-1, before.shape[2]),
            "action": action.reshape(-1, action.shape[2]),
            "next": {
                "observation": after.reshape(-1, after.shape[2]),
                "reward": reward.reshape(-1),
                "terminated": np.zeros(last.size, dtype=bool),
                "truncated": last.reshape(-1),
            },
        }
        return GaitEpisodes(reward.sum(1, dtype=np.float64), forward / self.n_steps, transitions)
