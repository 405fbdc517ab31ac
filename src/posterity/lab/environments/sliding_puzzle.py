"""The sliding puzzle: numbered tiles and a blank on a square, put in order by moving the blank."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

__all__ = ["SlidingPuzzle"]

MOVES = ((-1, 0), (0, -1), (1, 0), (0, 1))  # of the blank: up, left, down, right
SCRAMBLE = 80  # moves away from the goal with which an episode begins


class SlidingPuzzle:
    """A puzzle of ``size**2 - 1`` tiles: a problem for search, and a world.

    A state is a tuple of the tiles, row by row, 0 the blank; solved is ``(1, 2, ..., size**2 - 1, 0)``. Actions move the blank up,
    left, down or right (0 to 3); a move over the edge changes nothing.

    Parameters
    ----------
    size : int, default=3
    n_steps : int, default=200
        After how many an episode is cut off.
    """

    n_actions = 4

    def __init__(self, size: int = 3, n_steps: int = 200) -> None:
        if not 2 <= size <= 9:
            raise ValueError(f"size must be from 2 to 9, got {size}")
        self.size, self.n_steps, self.places = size, n_steps, size * size
        self.goal = (*range(1, self.places), 0)
        self.observation_space = gymnasium.spaces.MultiDiscrete([self.places] * self.places)
        self.action_space = gymnasium.spaces.Discrete(4)

    def step(self, state: tuple[int, ...], action: int) -> tuple[int, ...]:
        """Return the state after a move of the blank."""
        at = state.index(0)
        row, column = divmod(at, self.size)
        down, right = MOVES[action]
        if not (0 <= row + down < self.size and 0 <= column + right < self.size):
            return state
        to = at + down * self.size + right
        tiles = list(state)
        tiles[at], tiles[to] = tiles[to], 0
        return tuple(tiles)

    def is_solved(self, state: tuple[int, ...]) -> bool:
        """Return whether all tiles are in order."""
        return state == self.goal

    def tokens(self, states: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the tiles of states, (n, places), int64."""
        return torch.tensor(states, dtype=torch.long)

    def from_tokens(self, tokens: Any) -> tuple[int, ...] | None:
        """Return the state of tiles, None where no moves lead from it to the goal."""
        state = tuple(int(t) for t in tokens)
        if sorted(state) != list(range(self.places)):
            return None
        at, far = state.index(0), 0
        order = [self.goal.index(tile) for tile in state]
        swaps = sum(order[j] < order[i] for i in range(self.places) for j in range(i + 1, self.places))
        far = sum(divmod(self.places - 1, self.size)) - sum(divmod(at, self.size))
        return (
            state if (swaps + far) % 2 == 0 else None
        )  # each move swaps two and changes the distance by one

    def encode(self, states: Sequence[tuple[int, ...]]) -> Tensor:
        """Return states as one-hot vectors, (n, places**2), float32."""
        return torch.nn.functional.one_hot(self.tokens(states), self.places).flatten(1).float()

    def trajectory(self, n_moves: int, rng: np.random.Generator) -> tuple[list[tuple[int, ...]], list[int]]:
        """Return a random walk away from the goal, none of whose moves undoes the last, the other way round.

        Parameters
        ----------
        n_moves : int
        rng : numpy.random.Generator

        Returns
        -------
        tuple of list
            States, the last of them the goal, and the actions between them.
        """
        states, actions = [self.goal], []
        while len(actions) < n_moves:
            action = int(rng.integers(4))
            state = self.step(states[-1], action)
            if state != states[-1] and not (actions and action == (actions[-1] + 2) % 4):
                states.append(state)
                actions.append(action)
        return states[::-1], [(action + 2) % 4 for action in actions[::-1]]

    def start(self, n: int, rng: np.random.Generator) -> ndarray:
        """Return n scrambled states, (n, places)."""
        return np.array([self.trajectory(SCRAMBLE, rng)[0][0] for _ in range(n)])

    def observe(self, state: ndarray) -> ndarray:
        """Return the tiles."""
        return state.copy()

    def move(self, state: ndarray, action: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Return the next states, 1 for a solved one and else 0, and whether they are solved."""
        at = state.argmin(1)
        row, column = np.divmod(at, self.size)
        down, right = np.array(MOVES)[action].T
        fine = (
            (row + down >= 0)
            & (row + down < self.size)
            & (column + right >= 0)
            & (column + right < self.size)
        )
        to = np.where(fine, at + down * self.size + right, at)
        new, rows = state.copy(), np.arange(len(state))
        new[rows, at], new[rows, to] = state[rows, to], 0
        solved = (new == np.array(self.goal)).all(1)
        return new, solved.astype(float), solved
