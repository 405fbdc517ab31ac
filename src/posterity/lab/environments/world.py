"""Worlds as Gymnasium has them: one episode of a batched transition."""

from typing import Any

import gymnasium
import numpy as np

__all__ = ["world_env"]


class _OneEpisode(gymnasium.Env):
    def __init__(self, world: Any) -> None:
        self.world = world
        self.observation_space, self.action_space = world.observation_space, world.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.state, self.spent = self.world.start(1, self.np_random), 0
        return self.world.observe(self.state)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.state, reward, ended = self.world.move(self.state, np.asarray(action)[None])
        self.spent += 1
        seen = self.world.observe(self.state)[0]
        return seen, float(reward[0]), bool(ended[0]), self.spent >= self.world.n_steps, {}


def world_env(world: Any) -> gymnasium.Env:
    """Return a world as an environment of one episode.

    Parameters
    ----------
    world : object
        A batched transition without memory of its own: ``start(n, rng)`` returns the states of n episodes that begin,
        ``observe(states)`` what is seen of them, (n, *observation), and ``move(states, actions)`` the next states, rewards (n,)
        and whether episodes have ended, (n,) bool; with ``observation_space`` and ``action_space`` of one episode, and
        ``n_steps``, after which it is cut off.

    Returns
    -------
    gymnasium.Env
        Deterministic under ``reset(seed=)``.
    """
    return _OneEpisode(world)
