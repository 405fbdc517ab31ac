"""What a subgoal search needs, learned from solved examples: generators, a policy, a value, a verifier.

From trajectories ``s_0, ..., s_T`` that end solved, with their actions: the generator of distance k learns
``s_i -> s_min(i + k, T)`` by cross-entropy, the policy ``(s_i, s_(i + d)) -> a_i`` for d up to the longest distance, the value
``s_i -> i - T``, and the verifier, from what the trained generators propose, whether the trained policy gets there. They
share nothing.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, integer
from posterity._precision import wide
from posterity._random import draw_device, seed_from, seeded
from posterity.combinatorial.adasubs import checked

__all__ = ["SubgoalModels", "TokenSubgoals", "fit_subgoal_models"]


class SubgoalModels(NamedTuple):
    """What `adaptive_subgoal_search` takes: ``adaptive_subgoal_search(problem, start, **models._asdict())``.

    Attributes
    ----------
    generators : dict of int to callable
    policy, value, verifier : callable
    """

    generators: dict[int, Callable]
    policy: Callable
    value: Callable
    verifier: Callable


class TokenSubgoals(nn.Module):
    """A distribution over states written as tokens, given another: one token after the other.

    ``log p(y | x) = sum over positions of log p(y_i | x, y_1..y_(i - 1))``, each by a network of two hidden layers that
    sees x, the tokens so far and the position as one-hot vectors.

    Parameters
    ----------
    length : int
        Of a state in tokens.
    n_tokens : int
        How many different ones there are.
    width : int, default=256
        Of the hidden layers.

    Raises
    ------
    ValueError
        For sizes below 1, and tokens of another length or outside ``0..n_tokens - 1``.

    Examples
    --------
    >>> net = TokenSubgoals(3, 2, width=8)
    >>> every = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    >>> round(float(net.log_prob(torch.zeros(8, 3, dtype=torch.long), every).exp().sum().detach()), 5)
    1.0
    """

    def __init__(self, length: int, n_tokens: int, *, width: int = 256) -> None:
        super().__init__()
        self.length, self.n_tokens = integer("length", length, 1), integer("n_tokens", n_tokens, 1)
        width = integer("width", width, 1)
        self.state = nn.Embedding(
            length * n_tokens, width
        )  # a linear layer of one-hot vectors, as a sum of rows
        self.prefix = nn.Embedding(length * n_tokens, width)
        self.position = nn.Embedding(length, width)
        for part in (self.state, self.prefix, self.position):
            nn.init.normal_(part.weight, std=(2 * length + 1) ** -0.5)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, n_tokens)

    def log_prob(
        self, tokens: Int[Tensor, "batch length"], target_tokens: Int[Tensor, "batch length"]
    ) -> Tensor:
        """Return ``log p(target | tokens)``.

        Parameters
        ----------
        tokens, target_tokens : Tensor of shape (batch, length), integers

        Returns
        -------
        Tensor of shape (batch,)
        """
        state, prefixes = self._known(tokens), self._prefixes(target_tokens)
        at = torch.arange(self.length, device=tokens.device)
        logits = self._next(state[:, None] + prefixes, at)
        return -F.cross_entropy(wide(logits).mT, target_tokens.long(), reduction="none").sum(1)

    def loss(
        self, tokens: Int[Tensor, "batch length"], target_tokens: Int[Tensor, "batch length"], *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the mean cross-entropy of a token: at one random position a sample in training, at all in eval mode.

        Parameters
        ----------
        tokens, target_tokens : Tensor of shape (batch, length), integers
        generator : torch.Generator, optional
            Of the positions; by default torch's global one.

        Returns
        -------
        Tensor
            Scalar.
        """
        if not self.training:
            return -self.log_prob(tokens, target_tokens).mean() / self.length
        state, prefixes = self._known(tokens), self._prefixes(target_tokens)
        at = torch.randint(
            self.length, (len(tokens),), generator=generator, device=draw_device(generator, tokens.device)
        ).to(tokens.device)
        rows = torch.arange(len(at), device=at.device)
        return F.cross_entropy(
            wide(self._next(state + prefixes[rows, at], at)), target_tokens.long()[rows, at]
        )

    @torch.no_grad()
    def propose(self, tokens: Int[Tensor, " length"], n: int, *, beam: int = 8) -> Int[Tensor, "m length"]:
        """Return the likeliest states by beam search, likeliest first.

        Parameters
        ----------
        tokens : Tensor of shape (length,), integers
        n : int
            At most so many.
        beam : int, default=8
            Beginnings that are kept; with ``n_tokens**length`` of them the search is exhaustive.

        Returns
        -------
        Tensor of shape (m, length), int64
        """
        n, beam = integer("n", n, 1), integer("beam", beam, 1)
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be ({self.length},), got {tuple(tokens.shape)}")
        known = self._known(tokens[None])
        found = tokens.new_zeros((1, 0), dtype=torch.long)
        total = wide(known).new_zeros(1)
        for at in range(self.length):
            score = total[:, None] + wide(
                self._next(known, torch.tensor(at, device=known.device))
            ).log_softmax(1)
            total, best = score.flatten().topk(min(beam, score.numel()))
            row, token = best // self.n_tokens, best % self.n_tokens
            found = torch.cat([found[row], token[:, None]], 1)
            known = known[row] + self.prefix(at * self.n_tokens + token)
        return found[:n]

    def _codes(self, tokens: Tensor) -> Tensor:
        """Return which of all one-hot entries each token sets."""
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ValueError(f"tokens must be (batch, {self.length}), got {tuple(tokens.shape)}")
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.numel() and not (tokens.min() >= 0 and tokens.max() < self.n_tokens):
            raise ValueError(
                f"tokens must be in 0..{self.n_tokens - 1}, got {int(tokens.min())} to {int(tokens.max())}"
            )
        return tokens.long() + self.n_tokens * torch.arange(self.length, device=tokens.device)

    def _known(self, tokens: Tensor) -> Tensor:
        return self.state(self._codes(tokens)).sum(1)

    def _prefixes(self, tokens: Tensor) -> Tensor:
        """Return what the tokens before each position add, (batch, length, width)."""
        parts = self.prefix(self._codes(tokens))
        return torch.cat([torch.zeros_like(parts[:, :1]), parts[:, :-1].cumsum(1)], 1)

    def _next(self, known: Tensor, at: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(known + self.position(at)))))


def fit_subgoal_models(
    problem: Any,
    trajectories: Sequence[tuple[Sequence, Sequence[int]]],
    *,
    distances: Sequence[int] = (4, 3, 2),
    n_steps: int = 1000,
    batch_size: int = 256,
    lr: float = 2e-3,
    n_verifier_states: int = 250,
    n_subgoals: int = 3,
    beam: int = 8,
    generator: torch.Generator | None = None,
) -> SubgoalModels:
    """Train what a search needs from solved examples, each part for itself.

    Parameters
    ----------
    problem : object
        Beside what `adaptive_subgoal_search` asks of it: ``encode(states) -> Tensor (n, ...)`` for policy, value and verifier,
        ``tokens(states) -> Tensor (n, length)`` of integers for the generators, and ``from_tokens(tokens) -> state``, or None where
        tokens are no state.
    trajectories : sequence of (states, actions)
        ``len(states) == len(actions) + 1``; the last state is solved.
    distances : sequence of int, default=(4, 3, 2)
        Of the generators, in steps.
    n_steps, batch_size, lr : int, int, float, default=1000, 256, 2e-3
        Of each training, by Adam with the rate falling to 0 as a cosine.
    n_verifier_states : int, default=250
        States for which each generator proposes subgoals, to teach the verifier.
    n_subgoals, beam : int, default=3, 8
        Of those proposals, and of the search's.
    generator : torch.Generator, optional
        By default torch's global one.

    Returns
    -------
    SubgoalModels
        Its parts are modules, in eval mode, that are called with lists of states.

    Raises
    ------
    ValueError
        For trajectories whose actions do not lead from state to state, that do not end solved, or that are all shorter than the
        longest distance.

    Warns
    -----
    UserWarning
        If the policy reached all proposals, or none: the verifier then says the same for all.
    """
    distances = [integer("distances", k, 1) for k in distances]
    if not distances:
        raise ValueError("distances must be one or more")
    n_steps, batch_size = integer("n_steps", n_steps, 1), integer("batch_size", batch_size, 1)
    lr, n_subgoals, beam = (
        at_least("lr", lr, 0, strict=True),
        integer("n_subgoals", n_subgoals, 1),
        integer("beam", beam, 1),
    )
    n_verifier_states = integer("n_verifier_states", n_verifier_states, 1)
    _check_trajectories(problem, trajectories, max(distances))
    table = _Table(problem, trajectories)
    seed = seed_from(generator)
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed):
        draws = torch.Generator().manual_seed(seed)
        train = _Training(n_steps, batch_size, lr, draws)
        n_tokens = int(table.tokens.max()) + 1
        generators = {}
        for k in distances:
            net = TokenSubgoals(table.tokens.shape[1], n_tokens)
            train(net, table.n_pairs, lambda rows, net=net, k=k: net.loss(
                table.tokens[table.starts[rows]], table.tokens[table.ahead(rows, k)], generator=draws
            ))  # fmt: skip
            generators[k] = _Generator(problem, net, beam)
        policy = _Policy(problem, _mlp(2 * table.codes.shape[1], problem.n_actions))
        value = _Value(problem, _mlp(table.codes.shape[1], 1))
        train(policy, table.n_pairs, lambda rows: policy.loss(table, rows, max(distances), draws))
        train(value, table.n_pairs, lambda rows: F.mse_loss(
            value.net(table.codes[table.starts[rows]])[:, 0], -table.left[rows].float()
        ))  # fmt: skip
        rows = torch.randint(table.n_pairs, (n_verifier_states,), generator=draws)
        asked = [table.states[i] for i in table.starts[rows].tolist()]
        verifier = _fit_verifier(problem, asked, generators, policy, table.codes.shape[1], n_subgoals, train)
    return SubgoalModels(generators, policy, value, verifier)


class _Table:
    """All states of the trajectories in one row, with where each pair of state and action stands."""

    def __init__(self, problem: Any, trajectories: Sequence[tuple[Sequence, Sequence[int]]]) -> None:
        self.states = [state for states, _ in trajectories for state in states]
        self.tokens = torch.as_tensor(problem.tokens(self.states)).long()
        self.codes = torch.as_tensor(problem.encode(self.states)).float().flatten(1)
        starts, left, actions, at = [], [], [], 0
        for states, acts in trajectories:
            starts += range(at, at + len(acts))
            left += range(len(acts), 0, -1)
            actions += [int(a) for a in acts]
            at += len(states)
        self.starts, self.left, self.actions = map(torch.tensor, (starts, left, actions))
        self.n_pairs = len(starts)

    def ahead(self, rows: Tensor, k: int | Tensor) -> Tensor:
        """Return where the state k steps on stands, the last one where there are not so many."""
        return self.starts[rows] + torch.minimum(self.left[rows], torch.as_tensor(k))


class _Training:
    def __init__(self, n_steps: int, batch_size: int, lr: float, draws: torch.Generator) -> None:
        self.n_steps, self.batch_size, self.lr, self.draws = n_steps, batch_size, lr, draws

    def __call__(self, net: nn.Module, n: int, loss_of: Callable[[Tensor], Tensor]) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps)
        for _ in range(self.n_steps):
            optimizer.zero_grad()
            loss_of(torch.randint(n, (self.batch_size,), generator=self.draws)).backward()
            optimizer.step()
            schedule.step()
        net.eval().requires_grad_(False)


class _Generator(nn.Module):
    def __init__(self, problem: Any, net: TokenSubgoals, beam: int) -> None:
        super().__init__()
        self.problem, self.net, self.beam = problem, net, beam

    def forward(self, state: Any, n: int) -> list:
        tokens = torch.as_tensor(self.problem.tokens([state]))[0]
        found = [
            self.problem.from_tokens(each) for each in self.net.propose(tokens, self.beam, beam=self.beam)
        ]
        return list(dict.fromkeys(each for each in found if each is not None and each != state))[:n]


class _Encoded(nn.Module):
    def __init__(self, problem: Any, net: nn.Module) -> None:
        super().__init__()
        self.problem, self.net = problem, net

    def codes(self, states: list) -> Tensor:
        return torch.as_tensor(self.problem.encode(states)).float().flatten(1)

    def of_pairs(self, states: list, subgoals: list) -> Tensor:
        return self.net(torch.cat([self.codes(states), self.codes(subgoals)], 1))


class _Policy(_Encoded):
    def forward(self, states: list, subgoals: list) -> Tensor:
        return self.of_pairs(states, subgoals)

    def loss(self, table: _Table, rows: Tensor, most: int, draws: torch.Generator) -> Tensor:
        on = torch.randint(1, most + 1, (len(rows),), generator=draws)
        pairs = torch.cat([table.codes[table.starts[rows]], table.codes[table.ahead(rows, on)]], 1)
        return F.cross_entropy(self.net(pairs), table.actions[rows])


class _Value(_Encoded):
    def forward(self, states: list) -> Tensor:
        return self.net(self.codes(states))[:, 0]


class _Verifier(_Encoded):
    def forward(self, states: list, subgoals: list) -> Tensor:
        return self.of_pairs(states, subgoals)[:, 0].sigmoid()


class _Constant(nn.Module):
    def __init__(self, odds: float) -> None:
        super().__init__()
        self.odds = odds

    def forward(self, states: list, subgoals: list) -> Tensor:
        return torch.full((len(states),), self.odds)


def _fit_verifier(
    problem: Any, states: list, generators: dict[int, Callable], policy: _Policy, width: int, n_subgoals: int, train: _Training
) -> nn.Module:  # fmt: skip
    """Return a network that says whether the policy arrives, of as many pairs where it does as where it does not."""
    pairs, limits = [], []
    for k, propose in generators.items():
        for state in states:
            found = propose(state, n_subgoals)
            pairs += [(state, goal) for goal in found]
            limits += [k] * len(found)
    labels = _arrives(problem, policy, pairs, limits)
    yes, no = (torch.nonzero(labels == word)[:, 0] for word in (True, False))
    if not len(yes) or not len(no):
        what = "all" if len(yes) else "none"
        warnings.warn(
            f"the policy reaches {what} of {len(pairs)} proposals: the verifier says so of all", stacklevel=3
        )
        return _Constant(float(len(yes) > 0))
    net = _Verifier(problem, _mlp(2 * width, 1))
    codes = torch.cat([net.codes([s for s, _ in pairs]), net.codes([g for _, g in pairs])], 1)

    def loss_of(rows: Tensor) -> Tensor:
        half = len(rows) // 2
        chosen = torch.cat([yes[rows[half:] % len(yes)], no[rows[:half] % len(no)]])
        return F.binary_cross_entropy_with_logits(net.net(codes[chosen])[:, 0], labels[chosen].float())

    train(net, len(yes) * len(no), loss_of)
    return net


@torch.no_grad()
def _arrives(problem: Any, policy: _Policy, pairs: list, limits: list[int]) -> Tensor:
    """Return whether the policy walks from each state to its subgoal within its limit, all in step."""
    at, there = [state for state, _ in pairs], torch.zeros(len(pairs), dtype=torch.bool)
    walking = list(range(len(pairs)))
    for step in range(max(limits, default=0)):
        walking = [i for i in walking if not there[i] and step < limits[i]]
        if not walking:
            break
        logits = policy([at[i] for i in walking], [pairs[i][1] for i in walking])
        actions = checked("policy", logits, (len(walking), problem.n_actions)).argmax(1).tolist()
        for i, action in zip(walking, actions, strict=True):
            at[i] = problem.step(at[i], action)
            there[i] = at[i] == pairs[i][1]
    return there


def _mlp(n_in: int, n_out: int, width: int = 256) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_out)
    )


def _check_trajectories(problem: Any, trajectories: Sequence, longest: int) -> None:
    if not len(trajectories):
        raise ValueError("trajectories must be one or more")
    for n, (states, actions) in enumerate(trajectories):
        if len(states) != len(actions) + 1:
            raise ValueError(
                f"trajectory {n} must have one state more than actions, has {len(states)} and {len(actions)}"
            )
        for i, action in enumerate(actions):
            if problem.step(states[i], action) != states[i + 1]:
                raise ValueError(
                    f"trajectory {n}: action {action} does not lead from state {i} to state {i + 1}"
                )
        if not problem.is_solved(states[-1]):
            raise ValueError(f"trajectory {n} does not end in a solved state")
    if max(len(actions) for _, actions in trajectories) < longest:
        raise ValueError(
            f"trajectories must have {longest} actions or more, the longest of distances; all are shorter"
        )
