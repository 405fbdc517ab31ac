"""Cooperative coevolution: an archive of policies that share a few learned representations.

A policy is a representation (early layers) and a decision (late layers). A few representations are
learned by gradients on all elites at once; the archive keeps whole policies, and new ones are

    (R_i, D improved by gradients),   (R_i, greedy G_i),   x + noise + line_sigma z (y - x),

the first two with the representations as they are now. What one elite has taught R_i serves all others,
so that the archive fills with fewer episodes than if each policy had to find its features by itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from posterity._checks import at_least, finite, has_shape, integer, within
from posterity._random import seed_from, seeded
from posterity.combinatorial.elite_variation import iso_line, reassign_representations
from posterity.combinatorial.policy_critic import PolicyCritic, Stacked, layer_sizes, leaky_mlp
from posterity.combinatorial.shared_learning import Learner, Learning, Policy, Replay, policy_of

__all__ = ["CCQD"]

FIELD = "representation"
KEYS = {
    "observation": "obs", "action": "action", ("next", "observation"): "obs",
    ("next", "reward"): "", ("next", "terminated"): "", ("next", "truncated"): "",
}  # fmt: skip


class CCQD:
    """Fill a ribs archive with policies that share learned representations.

    Each round is ``solutions = ask()``, your episodes with ``act``, and ``tell``.

    Parameters
    ----------
    archive : ribs archive
        Made with ``solution_dim`` equal to the weights of both parts, ``dtype=np.float32`` and
        ``extra_fields={"representation": ((), np.int32)}``: from which representation each elite came.
    representation : nn.Module
        ``representation(obs) -> features``. Copies of it are made, drawn anew and used in eval mode and in
        float32; buffers are constants that all share.
    decision : nn.Module
        ``decision(features) -> action`` in [-1, 1]. The last of its layers with weights is an
        ``nn.Linear`` with ``action_dim`` outputs, which the critic reads.
    obs_dim, action_dim : int
        Sizes of an observation and an action, at least 1.
    n_representations : int, default=20
        How many representations there are, at least 1.
    batch_size : int, default=100
        Solutions a round, at least ``n_representations``.
    gradient_share : float, default=0.5
        The share of them made with gradients, in [0, 1]: at least ``n_representations`` of them, or 0,
        with which nothing is trained and this is MAP-Elites by `iso_line`.
    critic_steps, decision_steps : int, default=300, 100
        Steps of training a round, and of each improved decision; at least 0.
    n_sampled : int, default=100
        Elites of which a step of training uses the decisions, at least 1.
    train_batch : int, default=256
        Transitions a step, at least 1.
    representation_lr, decision_lr, greedy_lr, critic_lr : float, default=3e-4, 1e-3, 3e-4, 3e-4
        Rates of Adam, greater than 0.
    discount : float, default=0.99
        In [0, 1].
    tau : float, default=0.005
        The share by which slow copies follow, in (0, 1].
    policy_delay : int, default=2
        Actors move in one of so many steps, at least 1.
    noise, noise_clip : float, default=0.2, 0.5
        Deviation of the noise on actions of targets, and where it is cut; at least 0.
    iso_sigma, line_sigma : float, default=0.005, 0.05
        Of `iso_line`.
    hidden, encoder : sequence of int, default=(256, 256), (64, 64, 64)
        Of `PolicyCritic`; the critics of the greedy decisions have ``hidden`` too.
    buffer_size : int, default=1_000_000
        Transitions that are kept, at least 1.
    shared : bool, default=True
        False is PGA-MAP-Elites: one greedy actor and its critic, by which elites are improved in all
        weights, at ``greedy_lr`` and ``decision_lr``; ``n_representations`` and ``n_sampled`` are not used.
    device : str or torch.device, default="cpu"
        Where to compute.
    seed : int, optional
        Decides all that is drawn, with the archive left out of it; by default anything.

    Raises
    ------
    ValueError
        If an argument is out of range, the archive lacks the field or has another ``solution_dim``, or the
        parts do not fit each other.

    Notes
    -----
    1. Critics are initialised as torch does; the official code draws from a wider range, with biases of 0.
    2. Actors move in every second step; the official counter of steps is never
       advanced, so that they move in every one (``policy_delay=1``).
    3. An archive without elites changes no representation; the official code makes all equal the first.
    4. The archive's field says from which representation an elite came; who owns it after representations were
       replaced is kept here, so that nothing else should add to the archive meanwhile.

    References
    ----------
    .. [1] Xue et al. Sample-Efficient Quality-Diversity by Cooperative Coevolution. ICLR 2024. Section 3.
    .. [2] Nilsson and Cully. Policy Gradient Assisted MAP-Elites. GECCO 2021.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from ribs.archives import GridArchive
    >>> from posterity.combinatorial import CCQD
    >>> representation = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh())  # 4 weights
    >>> decision = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Tanh())  # 3 weights
    >>> archive = GridArchive(solution_dim=7, dims=[8], ranges=[(0, 1)], dtype=np.float32,
    ...                       extra_fields={"representation": ((), np.int32)})
    >>> emitter = CCQD(archive, representation, decision, obs_dim=1, action_dim=1, n_representations=2,
    ...                batch_size=8, critic_steps=2, decision_steps=2, hidden=(8,), encoder=(4,))
    >>> solutions = emitter.ask()
    >>> obs = torch.ones(8, 1)
    >>> action = emitter.act(solutions, obs)
    >>> solutions.shape, action.shape
    ((8, 7), torch.Size([8, 1]))
    >>> last = torch.ones(8, 1, dtype=torch.bool)  # episodes of one step, in which the action is the reward
    >>> then = {"observation": obs, "reward": action, "terminated": last, "truncated": ~last}
    >>> steps = {"observation": obs, "action": action, "next": then}
    >>> told = emitter.tell(action[:, 0], np.arange(8)[:, None] / 8, steps)
    >>> told["added"], len(archive), len(emitter.representations)
    (8.0, 8, 2)
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        archive: Any,
        representation: nn.Module,
        decision: nn.Module,
        *,
        obs_dim: int,
        action_dim: int,
        n_representations: int = 20,
        batch_size: int = 100,
        gradient_share: float = 0.5,
        critic_steps: int = 300,
        decision_steps: int = 100,
        n_sampled: int = 100,
        train_batch: int = 256,
        representation_lr: float = 3e-4,
        decision_lr: float = 1e-3,
        greedy_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_delay: int = 2,
        noise: float = 0.2,
        noise_clip: float = 0.5,
        iso_sigma: float = 0.005,
        line_sigma: float = 0.05,
        hidden: Sequence[int] = (256, 256),
        encoder: Sequence[int] = (64, 64, 64),
        buffer_size: int = 1_000_000,
        shared: bool = True,
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> None:
        if not isinstance(shared, bool):
            raise ValueError(f"shared must be True or False, got {shared!r}")
        self.obs_dim, self.action_dim = integer("obs_dim", obs_dim, 1), integer("action_dim", action_dim, 1)
        n = integer("n_representations", n_representations, 1) if shared else 1
        self.batch_size = integer("batch_size", batch_size, 1)
        self.gradient_share = within("gradient_share", gradient_share, 0, 1)
        if self.batch_size < n:
            raise ValueError(
                f"batch_size must be at least n_representations, {n}, got {self.batch_size}: "
                "each needs a first decision"
            )
        self.n_by_gradient = round(self.gradient_share * self.batch_size)
        if self.gradient_share and self.n_by_gradient < n:
            raise ValueError(
                f"gradient_share times batch_size must be at least n_representations, {n}, or 0, "
                f"got {self.n_by_gradient}"
            )
        self.critic_steps = integer("critic_steps", critic_steps, 0)
        how = Learning(
            n_sampled=integer("n_sampled", n_sampled, 1),
            train_batch=integer("train_batch", train_batch, 1),
            decision_steps=integer("decision_steps", decision_steps, 0),
            representation_lr=at_least("representation_lr", representation_lr, 0, strict=True),
            decision_lr=at_least("decision_lr", decision_lr, 0, strict=True),
            greedy_lr=at_least("greedy_lr", greedy_lr, 0, strict=True),
            critic_lr=at_least("critic_lr", critic_lr, 0, strict=True),
            discount=within("discount", discount, 0, 1),
            tau=within("tau", tau, 0, 1, open_low=True),
            policy_delay=integer("policy_delay", policy_delay, 1),
            noise=at_least("noise", noise, 0),
            noise_clip=at_least("noise_clip", noise_clip, 0),
            shared=shared,
        )
        self.iso_sigma = at_least("iso_sigma", iso_sigma, 0)
        self.line_sigma = at_least("line_sigma", line_sigma, 0)
        hidden, encoder = layer_sizes("hidden", hidden), layer_sizes("encoder", encoder)
        buffer_size = integer("buffer_size", buffer_size, 1)
        self.device = _device(device)
        self._generator = torch.Generator(self.device)
        seed = self._generator.seed() % 2**32 if seed is None else integer("seed", seed, 0)
        self._generator.manual_seed(seed)

        policy = policy_of(representation, decision, self.obs_dim, self.action_dim)
        self.archive = _fitting(archive, policy, n)
        with seeded(seed):  # on the CPU: the same start on every device
            critic = PolicyCritic(
                self.obs_dim, self.action_dim, policy.last.in_features, hidden=hidden, encoder=encoder
            )
            greedy_critic = leaky_mlp(self.obs_dim + self.action_dim, *hidden, 1)
            self._start = self._drawn(policy, n)
            first = self._start[torch.searchsorted(self._blocks(n), torch.arange(n))]  # of each block
            weights = {
                "R": first[:, : policy.representation.dim],
                "G": first[:, policy.representation.dim :],
                "Q": Stacked(greedy_critic).drawn(2 * n).view(n, -1),
            }
            if shared:
                weights["P"] = Stacked(critic).drawn(n)
        for part in (policy.representation, policy.decision):
            part.model.to(self.device)
        twin: Any = critic.twins[0]
        self._learner = Learner(
            policy, Stacked(greedy_critic), Stacked(twin["encoder"]), Stacked(twin["value"]), how,
            {name: rows.to(self.device) for name, rows in weights.items()},
            Replay(self.obs_dim, self.action_dim, buffer_size, self.device), self._generator,
        )  # fmt: skip
        self._owner: dict[int, int] = {}  # of each cell
        self._asked: tuple[Tensor, Tensor] | None = None
        self._told = False

    def _blocks(self, n: int) -> Tensor:
        """Return the representation of each of the first solutions: blocks one after the other."""
        return torch.arange(self.batch_size) * n // self.batch_size

    def _drawn(self, policy: Policy, n: int) -> Tensor:
        representations = policy.representation.drawn(n)[self._blocks(n)]
        return torch.cat([representations, policy.decision.drawn(self.batch_size)], 1)

    @property
    def solution_dim(self) -> int:
        """Weights of a policy."""
        return self._start.shape[1]

    @property
    def representations(self) -> Tensor:
        """The representations as they are now, of shape (n_representations, weights)."""
        return self._learner.weights["R"].detach().clone()

    @property
    def greedy_decisions(self) -> Tensor:
        """The greedy decision of each representation, of shape (n_representations, weights)."""
        return self._learner.weights["G"].detach().clone()

    @torch.inference_mode(False)
    def ask(self) -> ndarray:
        """Return policies to run: improved decisions, greedy ones, offspring of elites; random ones at first.

        Returns
        -------
        ndarray
            Of shape (batch_size, solution_dim), float32: weights of the representation, then of the decision.
        """
        elites, owner = self._elites()
        if not self._told:
            self._asked = self._start.to(self.device), self._blocks(self._learner.n).to(self.device)
        elif not len(elites):  # all were refused
            with seeded(seed_from(self._generator), self.device):
                again = self._drawn(self._learner.policy, self._learner.n)
            self._asked = again, self._blocks(self._learner.n).to(self.device)
        else:
            with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                self._asked = self._offspring(elites, owner)
        return self._asked[0].cpu().numpy().copy()

    @torch.inference_mode(False)
    def tell(self, objective: Any, measures: Any, transitions: Any) -> dict[str, float]:
        """Add what `ask` returned to the archive, then train on all transitions so far.

        Parameters
        ----------
        objective : array-like
            What each policy reached, of shape (batch_size,): larger is better.
        measures : array-like
            How it did, of shape (batch_size, measures of the archive).
        transitions : TensorDict or nested mapping
            All steps of all episodes in one row, with TorchRL's keys: ``"observation"`` (steps, obs_dim),
            ``"action"`` (steps, action_dim), and under ``"next"`` ``"observation"``, ``"reward"``,
            ``"terminated"`` and ``"truncated"``, each of shape (steps,) or (steps, 1).

        Returns
        -------
        dict of str to float
            ``"added"``, how many cells were filled or improved; ``"replaced"``, how many representations
            were; ``"critic_loss"`` and ``"policy_critic_loss"``, squared errors averaged over the steps,
            0 where nothing was trained.

        Raises
        ------
        ValueError
            If there was no ``ask`` before, shapes do not fit, a key is missing, or a number is not finite.
        """
        if self._asked is None:
            raise ValueError("objective must be that of what ask returned, got tell without a new ask")
        solutions, made = self._asked
        scores = _numbers("objective", objective, (self.batch_size,))
        where = _numbers("measures", measures, (self.batch_size, int(self.archive.measure_dim)))
        rows = self._rows(transitions).to(self.device)
        self._asked, self._told = None, True

        status = self.archive.add(
            solutions.cpu().numpy(), scores, where, **{FIELD: made.cpu().numpy().astype(np.int32)}
        )["status"]
        _, cells = self.archive.retrieve(where[status > 0])
        self._owner.update(zip(cells["index"].tolist(), cells[FIELD].tolist(), strict=True))
        elites, owner = self._elites()
        n_replaced = self._reassigned(owner)
        self._learner.replay.insert(rows)
        losses = [torch.zeros(2)]
        if self.n_by_gradient:
            decisions = elites[:, self._learner.policy.representation.dim :]
            with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                losses = [self._learner.step(decisions) for _ in range(self.critic_steps)] or losses
        greedy_loss, policy_loss = torch.stack(losses).mean(0).tolist()
        return {
            "added": float((status > 0).sum()), "replaced": float(n_replaced),
            "critic_loss": greedy_loss, "policy_critic_loss": policy_loss,
        }  # fmt: skip

    @torch.no_grad()
    def act(self, solutions: Any, obs: Any) -> Tensor:
        """Return what each policy does, all in one call.

        Parameters
        ----------
        solutions : Tensor or ndarray
            Weights, of shape (n, solution_dim), as `ask` returns and the archive keeps them.
        obs : Tensor or ndarray
            What each sees, of shape (n, ..., obs_dim).

        Returns
        -------
        Tensor
            Of shape (n, ..., action_dim), float32, on ``device``.
        """
        solutions, obs = _tensor("solutions", solutions, self.device), _tensor("obs", obs, self.device)
        has_shape("solutions", solutions, (None, self.solution_dim), "both parts")
        if obs.ndim < 2 or len(obs) != len(solutions) or obs.shape[-1] != self.obs_dim:
            raise ValueError(
                f"obs must have shape ({len(solutions)}, ..., {self.obs_dim}) for {len(solutions)} solutions, "
                f"got {tuple(obs.shape)}"
            )
        with torch.autocast(self.device.type, enabled=False):
            middle = obs.shape[1:-1]
            action = self._learner.policy(solutions, obs.reshape(len(obs), math.prod(middle), self.obs_dim))
        return action.reshape(len(obs), *middle, self.action_dim)

    def _offspring(self, elites: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        learner, n = self._learner, self._learner.n
        parts, owners = [], []
        if self.n_by_gradient:
            drawn = learner.draw(len(elites), self.n_by_gradient - n)
            index = learner.draw(n, self.n_by_gradient - n)
            parts = [
                learner.improved(elites[drawn], index),
                torch.cat([self.representations, self.greedy_decisions], 1),
            ]
            owners = [index, torch.arange(n, device=self.device)]
        first, second = (learner.draw(len(elites), self.batch_size - self.n_by_gradient) for _ in range(2))
        sigmas = {"iso_sigma": self.iso_sigma, "line_sigma": self.line_sigma}
        parts.append(iso_line(elites[first], elites[second], **sigmas, generator=self._generator))
        return torch.cat(parts), torch.cat([*owners, owner[first]])

    def _elites(self) -> tuple[Tensor, Tensor]:
        """Return the solutions in the archive and the representation that owns each."""
        kept = self.archive.data(["solution", "index", FIELD])
        solutions = torch.as_tensor(kept["solution"], dtype=torch.float32, device=self.device)
        for cell, came_from in zip(kept["index"].tolist(), kept[FIELD].tolist(), strict=True):
            self._owner.setdefault(cell, came_from)
        owner = [self._owner[cell] for cell in kept["index"].tolist()]
        return solutions, torch.tensor(owner, dtype=torch.long, device=self.device)

    def _reassigned(self, owner: Tensor) -> int:
        """Replace representations without elites, and return how many."""
        if not self.n_by_gradient:
            return 0
        owner, source = reassign_representations(owner, self._learner.n, generator=self._generator)
        self._learner.replace(source)
        self._owner.update(zip(self.archive.data("index").tolist(), owner.tolist(), strict=True))
        return int((source != torch.arange(len(source), device=source.device)).sum())

    def _rows(self, transitions: Any) -> Tensor:
        """Return transitions as rows of numbers."""
        sizes = {"obs": self.obs_dim, "action": self.action_dim}
        columns: list[Tensor] = []
        for key, kind in KEYS.items():
            value, named = transitions, ".".join((key,) if isinstance(key, str) else key)
            for part in (key,) if isinstance(key, str) else key:
                try:
                    value = value[part]
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise ValueError(f"transitions must have the key {named!r}, got none") from error
            column = _tensor(f"transitions {named!r}", value, torch.device("cpu"))
            column = column.unsqueeze(-1) if not kind and column.ndim == 1 else column
            n = len(columns[0]) if columns else None
            has_shape(f"transitions {named!r}", column, (n, sizes.get(kind, 1)))
            columns.append(finite(f"transitions {named!r}", column))
        rows = torch.cat(columns, 1)
        if not len(rows):
            raise ValueError("transitions must have at least one step, got none")
        rows[:, -1] *= 1 - rows[:, -2]  # cut off by time alone: its last value is not known
        return rows


def _tensor(name: str, value: Any, device: torch.device) -> Tensor:
    try:
        if isinstance(value, ndarray):
            value = np.asarray(value, order="C")  # torch takes no negative strides
        return torch.as_tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, got {type(value).__name__}") from error


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> ndarray:
    found = _tensor(name, value, torch.device("cpu"))
    return finite(name, has_shape(name, found, shape, "what ask returned")).numpy()


def _device(device: Any) -> torch.device:
    try:
        return torch.Generator(device).device  # also asks whether it is there
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a device that torch has here, got {device!r}") from error


def _fitting(archive: Any, policy: Policy, n: int) -> Any:
    """Return an archive that keeps such policies and where they came from."""
    missing = [
        name
        for name in ("add", "data", "retrieve", "field_list", "solution_dim")
        if not hasattr(archive, name)
    ]
    if missing:
        raise ValueError(f"archive must be an archive of ribs, got {type(archive).__name__}")
    if FIELD not in archive.field_list:
        raise ValueError(
            f"archive must have extra_fields={{{FIELD!r}: ((), np.int32)}}, got the fields {archive.field_list}"
        )
    r, d = policy.representation.dim, policy.decision.dim
    if archive.solution_dim != r + d:
        raise ValueError(
            f"archive must have solution_dim {r + d}, of which representation has {r} and decision {d}, "
            f"got {archive.solution_dim}"
        )
    came_from = np.asarray(archive.data(FIELD))
    if came_from.size and not 0 <= came_from.min() <= came_from.max() < n:
        raise ValueError(
            f"archive must hold elites of representations 0..{n - 1}, "
            f"got {came_from.min()} to {came_from.max()}"
        )
    return archive
