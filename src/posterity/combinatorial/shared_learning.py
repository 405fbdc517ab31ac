"""Shared representations learn from all elites: critics that know the decision, actors that follow them.

Each representation R_i has a greedy decision G_i, a twin critic Q_i and a twin policy critic P_i, which also
sees the decision D. On one batch of transitions for all, with the smaller of both twins in the targets,

    sum_i |Q_i(s, a) - r - gamma Q'_i(s', R'_i G'_i)|^2 + sum_(i, D) |P_i(s, a, D) - r - gamma P'_i(s', R'_i D, D)|^2

falls in the critics (primes are slow copies, actions get clipped noise), and

    - sum_i Q_i(s, R_i G_i) - sum_(i, D) P_i(s, R_i D, D)

in R and G, the second sum in R alone. D are elites of the archive, each with any representation.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posterity.combinatorial.policy_critic import Stacked

__all__ = []


@dataclass
class Learning:
    """How the parts learn; `CCQD` says what each is."""

    n_sampled: int
    train_batch: int
    decision_steps: int
    representation_lr: float
    decision_lr: float
    greedy_lr: float
    critic_lr: float
    discount: float
    tau: float
    policy_delay: int
    noise: float
    noise_clip: float
    shared: bool


class Replay:
    """The latest transitions as rows of one matrix, which grows up to ``capacity`` rows."""

    def __init__(self, obs_dim: int, action_dim: int, capacity: int, device: torch.device) -> None:
        self.widths = (obs_dim, action_dim, obs_dim, 1, 1, 1)
        self.capacity, self.next = capacity, 0
        self.rows = torch.empty(0, sum(self.widths), device=device)
        self.filled = 0

    def insert(self, rows: Tensor) -> None:
        """Add transitions, the oldest make place."""
        rows = rows[-self.capacity :]
        wanted = min(self.filled + len(rows), self.capacity)
        if wanted > len(self.rows):
            larger = self.rows.new_empty(min(max(wanted, 2 * len(self.rows)), self.capacity), rows.shape[1])
            larger[: self.filled] = self.rows[: self.filled]
            self.rows = larger
        place = (self.next + torch.arange(len(rows), device=rows.device)) % self.capacity
        self.rows[place] = rows
        self.next = (self.next + len(rows)) % self.capacity
        self.filled = wanted

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return n of them, drawn with replacement: obs, action, next obs, reward, terminated, cut off."""
        drawn = torch.randint(self.filled, (n,), generator=generator, device=self.rows.device)
        return self.rows[drawn].split(self.widths, dim=1)


class Learner:
    """Weights of all that learns, a row for each representation, and the steps by which it does."""

    def __init__(
        self, policy: "Policy", critic: Stacked, encoder: Stacked, value: Stacked, how: Learning,
        weights: dict[str, Tensor], replay: Replay, generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.policy, self.critic, self.encoder, self.value = policy, critic, encoder, value
        self.how, self.replay, self.generator = how, replay, generator
        self.weights = {name: rows.clone().requires_grad_() for name, rows in weights.items()}
        self.slow = {name: rows.clone() for name, rows in weights.items()}
        rates = {"R": how.representation_lr, "G": how.greedy_lr, "Q": how.critic_lr, "P": how.critic_lr}
        if not how.shared:  # one actor as a whole
            rates["R"] = how.greedy_lr
        self.optimizers = {
            name: torch.optim.Adam([rows], lr=rates[name], fused=rows.device.type in ("cpu", "cuda"))
            for name, rows in self.weights.items()
        }
        self.n_steps = 0

    @property
    def n(self) -> int:
        """How many representations there are."""
        return len(self.weights["R"])

    def replace(self, source: Tensor) -> None:
        """Make each representation, with all that belongs to it, a copy of that which ``source`` names."""
        with torch.no_grad():
            for rows in (*self.weights.values(), *self.slow.values()):
                rows.copy_(rows[source])

    def draw(self, high: int, n: int) -> Tensor:
        """Return n indices below ``high``."""
        return torch.randint(high, (n,), generator=self.generator, device=self.replay.rows.device)

    def step(self, decisions: Tensor) -> Tensor:
        """Take a step on a new batch; return both critics' losses, for one representation and one decision."""
        how, batch = self.how, self.replay.sample(self.how.train_batch, self.generator)
        n = how.n_sampled if how.shared and len(decisions) else 0
        for_critics = self._sampled(decisions, n)
        greedy_loss, policy_loss = self._critic_losses(batch, *for_critics)
        loss, moving = greedy_loss + policy_loss, [name for name in ("Q", "P") if name in self.weights]
        if self.n_steps % how.policy_delay == 0:
            loss = loss + self._actor_loss(batch[0], *self._sampled(decisions, n))
            moving += ["R", "G"]
        every = [self.weights[name] for name in moving]
        for rows, gradient in zip(every, torch.autograd.grad(loss, every, allow_unused=True), strict=True):
            rows.grad = gradient
        with torch.no_grad():
            for name in moving:
                self.optimizers[name].step()
                self.slow[name].lerp_(self.weights[name], how.tau)
        self.n_steps += 1
        return torch.stack([greedy_loss.detach() / self.n, policy_loss.detach() / max(n, 1)])

    def improved(self, solutions: Tensor, index: Tensor) -> Tensor:
        """Return solutions after steps on what the critics of ``index`` say: their decisions, without sharing all weights."""
        how, d_r = self.how, self.policy.representation.dim
        with torch.no_grad():
            fixed = self.weights["R"].index_select(0, index)
        own = (solutions[:, d_r:] if how.shared else solutions).clone().requires_grad_()
        optimizer = torch.optim.Adam([own], lr=how.decision_lr, fused=own.device.type in ("cpu", "cuda"))
        critics = self._twins(self.weights["P" if how.shared else "Q"].detach())[:, :1].index_select(0, index)
        for _ in range(how.decision_steps):
            obs = self.replay.sample(how.train_batch, self.generator)[0].expand(len(own), -1, -1)
            if how.shared:
                with torch.no_grad():
                    features = self.policy.representation(fixed, obs)
                action = self.policy.decision(own, features)
                value = self._policy_values(critics, obs, action, self.policy.heads(own))
            else:
                action = self.policy(own, obs)
                value = self._values(critics, torch.cat([obs, action], -1))
            (own.grad,) = torch.autograd.grad(-value.mean(-1).sum(), [own])
            optimizer.step()
        return torch.cat([fixed, own.detach()], 1) if how.shared else own.detach()

    def _sampled(self, decisions: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return n decisions of elites, and any representation for each."""
        if not n:
            return decisions[:0], self.draw(1, 0)
        return decisions[self.draw(len(decisions), n)], self.draw(self.n, n)

    def _critic_losses(
        self, batch: tuple[Tensor, ...], decisions: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        obs, action, after, reward, terminated, cut = batch
        going, counts = self.how.discount * (1 - terminated[:, 0]), 1 - cut
        with torch.no_grad():
            everywhere = after.expand(self.n, -1, -1)
            features = self.policy.representation(self.slow["R"], everywhere)
            then = self._noisy(self.policy.decision(self.slow["G"], features))
            values = self._values(self._twins(self.slow["Q"]), torch.cat([everywhere, then], -1))
            target = reward[:, 0] + going * values.amin(1)  # (n, batch)
        seen = torch.cat([obs, action], -1).expand(self.n, -1, -1)
        error = (self._values(self._twins(self.weights["Q"]), seen) - target.unsqueeze(1)) * counts[:, 0]
        greedy_loss = error.square().mean(-1).sum()
        if not len(decisions):
            return greedy_loss, greedy_loss.new_zeros(())
        heads = self.policy.heads(decisions)
        with torch.no_grad():
            then = self._noisy(self.policy.decision(decisions, features.index_select(0, index)))
            critics = self._twins(self.slow["P"]).index_select(0, index)
            values = self._policy_values(critics, after.expand(len(index), -1, -1), then, heads)
            target = reward[:, 0] + going * values.amin(1)
        critics = self._twins(self.weights["P"]).index_select(0, index)
        everywhere = obs.expand(len(index), -1, -1), action.expand(len(index), -1, -1)
        error = (self._policy_values(critics, *everywhere, heads) - target.unsqueeze(1)) * counts[:, 0]
        return greedy_loss, error.square().mean(-1).sum()

    def _actor_loss(self, obs: Tensor, decisions: Tensor, index: Tensor) -> Tensor:
        everywhere = obs.expand(self.n, -1, -1)
        features = self.policy.representation(self.weights["R"], everywhere)
        action = self.policy.decision(self.weights["G"], features)
        critics = self._twins(self.weights["Q"].detach())[:, :1]
        loss = -self._values(critics, torch.cat([everywhere, action], -1)).mean(-1).sum()
        if len(decisions):
            action = self.policy.decision(decisions, features.index_select(0, index))
            critics = self._twins(self.weights["P"].detach())[:, :1].index_select(0, index)
            seen = obs.expand(len(index), -1, -1)
            loss = (
                loss - self._policy_values(critics, seen, action, self.policy.heads(decisions)).mean(-1).sum()
            )
        return loss

    def _noisy(self, action: Tensor) -> Tensor:
        noise = torch.randn(
            tuple(action.shape), generator=self.generator, device=action.device, dtype=action.dtype
        )
        noise = (self.how.noise * noise).clamp_(-self.how.noise_clip, self.how.noise_clip)
        return (action + noise).clamp_(-1, 1)

    def _twins(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (2, -1))

    def _values(self, critics: Tensor, x: Tensor) -> Tensor:
        """Return values by critics (n, twins, dim) of x (n, batch, in): (n, twins, batch)."""
        twins = critics.shape[1]
        return self.critic(critics.flatten(0, 1), _for_each(x, twins)).view(-1, twins, x.shape[1])

    def _policy_values(self, critics: Tensor, obs: Tensor, action: Tensor, heads: Tensor) -> Tensor:
        """Return values of policies by critics (n, twins, dim): (n, twins, batch)."""
        twins, rows = critics.shape[1], critics.flatten(0, 1)
        of_encoder, of_value = rows.split([self.encoder.dim, self.value.dim], dim=1)
        code = self.encoder(of_encoder, _for_each(heads, twins)).mean(1, keepdim=True)
        seen = _for_each(torch.cat([obs, action], -1), twins)
        x = torch.cat([seen, code.expand(-1, seen.shape[1], -1)], -1)
        return self.value(of_value, x).view(-1, twins, obs.shape[1])


@dataclass
class Policy:
    """The two parts of policies whose weights are rows, and where the last layer of the second lies in a row."""

    representation: Stacked
    decision: Stacked
    last: nn.Linear

    def __call__(self, solutions: Tensor, obs: Tensor) -> Tensor:
        """Return the actions of each solution in its own observations, (n, batch, obs) -> (n, batch, action)."""
        r, d = solutions.split([self.representation.dim, self.decision.dim], dim=1)
        return self.decision(d, self.representation(r, obs))

    def heads(self, decisions: Tensor) -> Tensor:
        """Return [W | b] of each decision, (n, action, features + 1)."""
        parts = decisions.split(self.decision.sizes, dim=1)
        weight = parts[self.decision.place[id(self.last.weight)]].unflatten(1, self.last.weight.shape)
        if self.last.bias is None:
            return torch.cat([weight, weight.new_zeros(*weight.shape[:2], 1)], -1)
        return torch.cat([weight, parts[self.decision.place[id(self.last.bias)]].unsqueeze(-1)], -1)


def policy_of(representation: Any, decision: Any, obs_dim: int, action_dim: int) -> Policy:
    """Return copies of both parts, at rest and in float32, that are known to fit."""
    for name, part in (("representation", representation), ("decision", decision)):
        if not isinstance(part, nn.Module) or not sum(p.numel() for p in part.parameters()):
            raise ValueError(f"{name} must be a module with weights, got {part!r}")
    parts = [
        copy.deepcopy(part).cpu().float().eval().requires_grad_(False) for part in (representation, decision)
    ]
    leaves = [leaf for leaf in parts[1].modules() if any(True for _ in leaf.parameters(recurse=False))]
    if not isinstance(leaves[-1], nn.Linear) or leaves[-1].out_features != action_dim:
        raise ValueError(
            f"decision must have an nn.Linear with action_dim = {action_dim} outputs as last layer with weights, "
            f"got {leaves[-1]}"
        )
    with torch.no_grad():
        try:
            features = parts[0](torch.zeros(2, obs_dim))
        except RuntimeError as error:
            raise ValueError(
                f"representation must take rows of obs_dim = {obs_dim} numbers: {error}"
            ) from error
        try:
            action = parts[1](features)
        except RuntimeError as error:
            raise ValueError(f"decision must take what representation gives: {error}") from error
    if not isinstance(action, Tensor) or action.shape != (2, action_dim):
        raise ValueError(
            f"decision must give one action of action_dim = {action_dim} a row, "
            f"got {getattr(action, 'shape', type(action).__name__)} for 2 rows"
        )
    return Policy(Stacked(parts[0]), Stacked(parts[1]), leaves[-1])


def _for_each(x: Tensor, n: int) -> Tensor:
    """Return each of a batch n times in turn."""
    return x if n == 1 else x.unsqueeze(1).expand(-1, n, *x.shape[1:]).flatten(0, 1)
