"""Bilinear transduction of demonstrations: act for a goal outside their range, beside one of them.

A policy a(s, g) of states and goals is predicted as in `bilinear_transduction`, from the observation of a
demonstration at the same time t and the difference from it:

    a_j(t) = < f(o_j(t) - o_i(t)), g(o_i(t)) >   for demonstrations i and j.

For a new goal one demonstration is chosen at the start, whose goal differs from the new one as goals of
demonstrations differ among each other; it then goes along for the whole episode.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from torch import Tensor

from posterity._checks import at_least, integer
from posterity._random import seeded
from posterity.transfer.bilinear_transduction import BilinearPredictor, _descend, _device, _errors, _widths
from posterity.transfer.transductive_anchors import _Search, pairwise_deltas

__all__ = ["BilinearTransductionPolicy"]

MOST = 20_000  # differences of goals to compare with


class BilinearTransductionPolicy:
    """A policy cloned from demonstrations that reaches goals outside their range.

    Parameters
    ----------
    hidden : sequence of int, default=(32,)
        Widths of the ReLU layers of both networks, each at least 1.
    n_embed : int, default=32
        Dimension of the embeddings of each action, at least 1.
    goal_indices : sequence of int
        Which entries of an observation are the goal, at least one.
    n_steps : int, default=5000
        Steps of Adam, at least 1.
    batch_size : int, default=32
        Pairs of a step, at least 1.
    lr : float, default=1e-3
        Of Adam, positive.
    device : str, default="cpu"
        Where to train and act, as torch names it.
    random_state : int, RandomState or None, default=None
        Decides initial weights, pairs and differences of goals.

    Attributes
    ----------
    predictor_ : BilinearPredictor
        Of standardised observations and actions.
    goals_ : ndarray of shape (n_demos, n_goal)
        Goal of each demonstration, from its last observation.
    loss_curve_ : ndarray of shape (n_steps,)
    anchor_, distance_ : int, float
        After `reset`: the demonstration that goes along, and how far the goal's difference from its own is from
        the nearest difference of two demonstrations, in units of the deviation of goals: 0 is seen, large is
        not to be trusted.

    Raises
    ------
    ValueError
        If a parameter is out of range, demonstrations are of unequal length or width, or a call is out of turn.
    NotFittedError
        If it acts before ``fit``.

    Notes
    -----
    Departure from the official code: observations and actions are standardised.

    References
    ----------
    .. [1] Netanyahu, Gupta, Simchowitz, Zhang, Agrawal. Learning to Extrapolate: A Transductive Approach.
       ICLR 2023. Imitation learning.

    Examples
    --------
    Walk a third of the way to a goal in each step; the goals of the demonstrations lie between 0 and 1.

    >>> import numpy as np
    >>> from posterity.transfer import BilinearTransductionPolicy
    >>> demos = []
    >>> for goal in np.linspace(0, 1, 20):
    ...     s = goal * (1 - (2 / 3) ** np.arange(6.0))
    ...     demos.append({"obs": np.stack([s, np.full(6, goal)], 1), "action": (goal - s)[:, None] / 3})
    >>> policy = BilinearTransductionPolicy((), 2, goal_indices=[1], n_steps=200, lr=2e-2, random_state=0)
    >>> policy = policy.fit(demos)
    >>> demos[policy.reset([0.0, 1.5])]["obs"][-1, 1] >= 0.5  # whose goal is at most 1 away
    np.True_
    >>> bool(abs(policy.act([0.0, 1.5])[0] - 0.5) < 0.1)
    True
    """

    def __init__(
        self, hidden: Sequence[int] = (32,), n_embed: int = 32, *, goal_indices: Sequence[int], n_steps: int = 5000,
        batch_size: int = 32, lr: float = 1e-3, device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.hidden = _widths(hidden)
        self.n_embed = integer("n_embed", n_embed, 1)
        if not isinstance(goal_indices, Sequence | ndarray) or not len(goal_indices):
            raise ValueError(f"goal_indices must be a sequence of at least one index, got {goal_indices!r}")
        self.goal_indices = [integer("goal_indices", index, 0) for index in goal_indices]
        self.n_steps = integer("n_steps", n_steps, 1)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.lr = at_least("lr", lr, 0, strict=True)
        self.device = device
        self.random_state = random_state

    @torch.inference_mode(False)  # grad mode too
    def fit(self, demos: Sequence[Mapping[str, ndarray]]) -> "BilinearTransductionPolicy":
        """Train on pairs of demonstrations at the same time.

        Parameters
        ----------
        demos : sequence of mappings
            Each with ``"obs"`` of shape (T, d) or (T + 1, d) and ``"action"`` of shape (T, a), T alike in all; at
            least two.

        Returns
        -------
        BilinearTransductionPolicy
            The fitted policy.
        """
        device = _device(self.device)
        obs, action = _stacked(demos)
        if max(self.goal_indices) >= obs.shape[2]:
            raise ValueError(f"goal_indices must be in 0..{obs.shape[2] - 1}, got {max(self.goal_indices)}")
        narrow = obs.dtype == np.float32 or device.type == "mps"
        self._dtype = torch.float32 if narrow else torch.float64
        seeds = [int(s) for s in check_random_state(self.random_state).randint(2**31 - 1, size=3)]
        self._obs_unit, self._action_unit = _unit(obs), _unit(action)
        self.goals_ = obs[:, -1, self.goal_indices]
        self._goal_unit = _unit(self.goals_)
        goals = torch.from_numpy((self.goals_ - self._goal_unit[0]) / self._goal_unit[1])
        draws = torch.Generator().manual_seed(seeds[2])
        deltas = pairwise_deltas(goals, MOST if len(goals) ** 2 > MOST else None, generator=draws)
        self._search = _Search(goals, deltas)

        steps = action.shape[1]
        self._obs = self._tensor((obs[:, :steps] - self._obs_unit[0]) / self._obs_unit[1], device)
        x, y = self._obs, self._tensor((action - self._action_unit[0]) / self._action_unit[1], device)
        generator = torch.Generator(device=device).manual_seed(seeds[1])
        with seeded(seeds[0]):
            net = BilinearPredictor(x.shape[2], y.shape[2], n_embed=self.n_embed, hidden=self.hidden).to(x)

        def step() -> Tensor:
            i, j = torch.randint(len(x), (2, self.batch_size), generator=generator, device=device)
            t = torch.randint(steps, (self.batch_size,), generator=generator, device=device)
            anchor = x[i, t]
            return _errors(net(anchor, x[j, t] - anchor), y[j, t], "norm").mean()

        self.loss_curve_ = _descend(net.parameters(), step, self.n_steps, self.lr, "constant")
        self.predictor_, self._t = net, -1
        return self

    def reset(self, obs: Any) -> int:
        """Begin an episode: choose the demonstration that goes along.

        Parameters
        ----------
        obs : array-like of shape (d,)
            The first observation; its goal counts.

        Returns
        -------
        int
            Which of the demonstrations.
        """
        goal = self._observed(obs, 1)[self.goal_indices]
        found, far = self._search.nearest(
            torch.from_numpy((goal - self._goal_unit[0]) / self._goal_unit[1])[None]
        )
        self.anchor_, self.distance_, self._t = int(found), float(far), 0
        return self.anchor_

    def act(self, obs: Any) -> Float[ndarray, " a"]:
        """Return the action for the next step of the episode that `reset` began.

        Parameters
        ----------
        obs : array-like of shape (d,)

        Returns
        -------
        ndarray of shape (a,)
        """
        row = self._observed(obs, 1)
        if self._t < 0:
            raise ValueError("reset(obs) must come before act(obs)")
        action = self.act_batch(row[None], self._t, [self.anchor_])[0]
        self._t += 1
        return action

    def act_batch(self, obs: Any, t: int, anchors: Any) -> Float[ndarray, "b a"]:
        """Return the actions of several episodes at time t.

        Parameters
        ----------
        obs : array-like of shape (b, d)
        t : int
            Steps since the beginning, at least 0; beyond the demonstrations it is their last step.
        anchors : array-like of b integers
            Which demonstration goes along with each.

        Returns
        -------
        ndarray of shape (b, a)
        """
        rows = self._observed(obs, 2)
        t = min(integer("t", t, 0), self._obs.shape[1] - 1)
        at = np.asarray(anchors)
        if at.shape != (len(rows),) or (len(at) and at.dtype.kind not in "iu"):
            raise ValueError(f"anchors must be {len(rows)} integers, one for each of obs, got {anchors!r}")
        if len(at) and not (at.min() >= 0 and at.max() < len(self._obs)):
            raise ValueError(f"anchors must be in 0..{len(self._obs) - 1}, got {at.min()} to {at.max()}")
        x = self._tensor((rows - self._obs_unit[0]) / self._obs_unit[1], self._obs.device)
        anchor = self._obs[torch.as_tensor(at.astype(np.int64), device=x.device), t]
        with torch.no_grad():
            action = self.predictor_(anchor, x - anchor).cpu().numpy()
        return action * self._action_unit[1] + self._action_unit[0]

    def _observed(self, obs: Any, ndim: int) -> ndarray:
        if not hasattr(self, "predictor_"):
            raise NotFittedError("fit(demos) must come before acting on obs")
        rows, d = _numbers("obs", obs), self._obs.shape[2]
        if rows.ndim != ndim or rows.shape[-1] != d:
            wanted = f"({d},)" if ndim == 1 else f"(b, {d})"
            raise ValueError(f"obs must have shape {wanted} as those of the demonstrations, got {rows.shape}")
        return rows.astype(self.goals_.dtype)

    def _tensor(self, value: ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(np.asarray(value)).to(device, self._dtype)


def _stacked(demos: Any) -> tuple[ndarray, ndarray]:
    """Return observations (n, T or T + 1, d) and actions (n, T, a), or say which demonstration does not fit."""
    if not isinstance(demos, Sequence) or len(demos) < 2:
        raise ValueError(f"demos must be a sequence of at least 2 demonstrations, got {demos!r:.60}")
    found: dict[str, list[ndarray]] = {"obs": [], "action": []}
    for k, demo in enumerate(demos):
        if not isinstance(demo, Mapping) or not {"obs", "action"} <= set(demo):
            raise ValueError(f'demos[{k}] must be a mapping with "obs" and "action", got {demo!r:.60}')
        for name, rows in found.items():
            value = _numbers(f'demos[{k}]["{name}"]', demo[name])
            if value.ndim != 2 or 0 in value.shape:
                raise ValueError(f'demos[{k}]["{name}"] must be (time, features), none 0, got {value.shape}')
            if rows and value.shape != rows[0].shape:
                raise ValueError(
                    f'demos[{k}]["{name}"] must have the shape of the first demonstration, {rows[0].shape}, '
                    f"got {value.shape}"
                )
            rows.append(value)
        more = len(found["obs"][0]) - len(found["action"][0])
        if more not in (0, 1):
            raise ValueError(
                f'demos[{k}]["obs"] must have as many rows as "action", or one more, '
                f"got {len(found['obs'][0])} and {len(found['action'][0])}"
            )
    return np.stack(found["obs"]), np.stack(found["action"])


def _numbers(name: str, value: Any) -> ndarray:
    """Return finite numbers as float64, or as float32 where they are."""
    try:
        array = np.asarray(value)
        array = array.astype(array.dtype if array.dtype == np.float32 else np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array


def _unit(values: ndarray) -> tuple[ndarray, ndarray]:
    """Return mean and deviation of the last axis, 1 where a feature is constant."""
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    mean, scale = flat.mean(0), flat.std(0)
    scale[scale <= 1e-12 * np.abs(flat).max(0)] = 1.0
    return mean.astype(values.dtype), scale.astype(values.dtype)
