"""A network that says, for each start of an exchange between two routes, what its best stops would bring.

`posterity.combinatorial.cross_exchange` finds that by trying all stops, O(n^4) exchanges for all starts of
two routes. The network sees both routes once, customers, starts and ends as tokens that attend to each
other, and predicts the whole table from pairs of tokens, in O(n^2):

    y(a, c) = f(u_a, u_c, arcs) + f(u_c, u_a, arcs),                                          (1)

u_a the states of the tokens before and after position a, arcs the two that an exchange makes there and
the two that it breaks. It is told distances alone, in units of the longer route: so to move, turn, mirror or
renumber places changes nothing, to scale them scales y, and y(s, r) is the transpose of y(r, s).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, integer
from posterity._precision import NARROW
from posterity._random import seed_from
from posterity.combinatorial.fleet_problem import FleetProblem, bordered, checked_plan, ends
from posterity.combinatorial.segment_exchanges import Exchanges, shortened

__all__ = ["DecrementNet", "fit_decrements"]

NODE, EDGE, ARCS = 15, 6, 4  # numbers that describe a token, a pair of tokens, the arcs at a start
MANY = 40  # customers of a route, as the unit of their number
SHARP = 10.0  # a route of tens of arcs: its unit for arcs, and for what is predicted
TOGETHER = 2**20  # pairs of tokens at once

Sample = Callable[[torch.Generator], tuple[FleetProblem, list[list[int]]]]


class _Pairs(NamedTuple):
    """Pairs of routes r and s, filled up to the longest: positions below ``split`` are r's."""

    nodes: Tensor  # (pairs, tokens, NODE)
    edges: Tensor  # (pairs, tokens, tokens, EDGE)
    arcs: Tensor  # (pairs, split - 1, tokens - split - 1, ARCS)
    there: Tensor  # (pairs, tokens): which tokens are
    scale: Tensor  # (pairs,): the longer length
    split: int


class DecrementNet(nn.Module):
    """The decrements of all starts of exchanges between pairs of routes, predicted in one pass.

    Parameters
    ----------
    width : int, default=48
        Of a token, a multiple of ``n_heads``.
    n_layers : int, default=3
        Of attention, at least 1.
    n_heads : int, default=4
        Of each layer, at least 1.

    Raises
    ------
    ValueError
        If a number is out of range; of a call, if ``routes`` is no plan of the problem, or ``pairs`` are not
        pairs of two different vehicles.

    Notes
    -----
    1. The network sees distances alone, both ways; that of the paper embeds coordinates. So it serves road
       networks, and what leaves distances as they are leaves its output.

    References
    ----------
    .. [1] Kim, Park, Park. Learning to CROSS exchange to solve min-max vehicle routing problems.
       ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import DecrementNet, FleetProblem
    >>> problem = FleetProblem.from_coords(torch.rand(5, 2), torch.rand(1, 2), vehicles=[0, 0])
    >>> (table,) = DecrementNet()(problem, [[0, 1, 2], [3, 4]], [(0, 1)])
    >>> table.shape
    torch.Size([4, 3])
    """

    def __init__(self, width: int = 48, n_layers: int = 3, n_heads: int = 4) -> None:
        super().__init__()
        integer("width", width, 1)
        integer("n_layers", n_layers, 1)
        if width % integer("n_heads", n_heads, 1):
            raise ValueError(f"width must be a multiple of n_heads, got {width} for {n_heads}")
        self.embed = nn.Linear(NODE, width)
        self.ties = nn.Sequential(nn.Linear(EDGE, 24), nn.ReLU(), nn.Linear(24, 2 * n_heads * n_layers))
        self.layers = nn.ModuleList(_Layer(width, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(2 * width, width), nn.Linear(2 * width, width, bias=False)
        self.arcs, self.out = nn.Linear(ARCS, width, bias=False), nn.Linear(width, 1)

    def forward(
        self, problem: FleetProblem, routes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
    ) -> list[Float[Tensor, "a c"]]:
        """Return a table of shape (len(r) + 1, len(s) + 1) for the routes r, s of each pair of vehicles."""
        plan = checked_plan(problem, routes)
        pairs = [_pair(pair, len(plan)) for pair in pairs]
        full, tables = bordered(problem), []
        most = max([len(plan[i]) + len(plan[j]) + 4 for i, j in pairs], default=1) ** 2
        step = max(1, TOGETHER // most)
        for k in range(0, len(pairs), step):
            some = pairs[k : k + step]
            batch = _batch([(problem, full, plan, i, j) for i, j in some], self.embed.weight)
            predicted = self._predict(batch) * (batch.scale / SHARP)[:, None, None]
            tables += [
                table[: len(plan[i]) + 1, : len(plan[j]) + 1]
                for table, (i, j) in zip(predicted, some, strict=True)
            ]
        return tables

    def _predict(self, batch: _Pairs) -> Float[Tensor, "pairs a c"]:
        """Return what pairs that are filled up to one size predict, in tenths of the longer route."""
        x, ties = self.embed(batch.nodes), self.ties(batch.edges)
        missing = ~batch.there[:, None, None]
        for layer, tie in zip(self.layers, ties.chunk(len(self.layers), -1), strict=True):
            x = layer(x, tie, missing)
        x = self.norm(x)
        r, s = (
            torch.cat([part[:, :-1], part[:, 1:]], -1) for part in (x[:, : batch.split], x[:, batch.split :])
        )
        return self._decode(r[:, :, None], s[:, None], batch.arcs) + self._decode(
            s[:, None], r[:, :, None], batch.arcs[..., [1, 0, 3, 2]]
        )

    def _decode(self, u: Tensor, v: Tensor, arcs: Tensor) -> Tensor:
        return self.out((self.first(u) + self.second(v) + self.arcs(arcs)).relu())[..., 0]


class _Layer(nn.Module):
    """Attention whose logits get a term, and whose weights a factor, from each pair of tokens."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm, self.qkv, self.mix = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.deep = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, ties: Tensor, missing: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        bias, gate = ties.permute(0, 3, 1, 2).chunk(2, 1)
        logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias
        weights = logits.masked_fill(missing, -torch.inf).softmax(-1) * gate.sigmoid()
        x = x + self.mix((weights @ v).transpose(1, 2).flatten(2))
        return x + self.deep(x)


def _pair(pair: Any, vehicles: int) -> tuple[int, int]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"pairs must be pairs of vehicles, got {pair!r}")
    i, j = (integer("pairs", k, 0) for k in pair)
    if i == j or max(i, j) >= vehicles:
        raise ValueError(f"pairs must be of two different vehicles in 0..{vehicles - 1}, got {(i, j)}")
    return i, j


def _batch(cases: Sequence[tuple[FleetProblem, Tensor, list[list[int]], int, int]], like: Tensor) -> _Pairs:
    """Return what the network sees of pairs of routes (problem, its distances, plan, i, j)."""
    pairs = [[ends(problem, k, plan[k]) for k in (i, j)] for problem, _, plan, i, j in cases]
    split, rest = (max(len(pair[k]) for pair in pairs) for k in (0, 1))
    device = cases[0][1].device
    filled = [r + r[-1:] * (split - len(r)) + s + s[-1:] * (rest - len(s)) for r, s in pairs]
    at = torch.tensor(filled, device=device)
    sizes = torch.tensor([[len(r), len(s)] for r, s in pairs], device=device)
    if all(case[1] is cases[0][1] for case in cases):
        ways = cases[0][1][at[:, :, None], at[:, None]]
    else:
        ways = torch.stack([full[k[:, None], k] for (_, full, *_), k in zip(cases, at, strict=True)])
    second = torch.arange(split + rest, device=device) >= split
    place = torch.arange(split + rest, device=device) - split * second
    own = sizes[:, second.long()]  # the size of each token's route
    there = place < own
    step = ways.diagonal(1, 1, 2) * (place[1:] < own[:, 1:]) * ~(second[1:] & ~second[:-1])  # to the next
    before, after = F.pad(step, (1, 0)), F.pad(step, (0, 1))
    so_far = before.cumsum(1)
    total = torch.stack([so_far[:, split - 1], so_far[:, -1] - so_far[:, split - 1]], 1)
    so_far = so_far - so_far[:, split - 1 : split] * second
    scale = total.amax(1)
    unit = scale.masked_fill(scale == 0, 1)[:, None]
    length, other = total[:, second.long()] / unit, total[:, (~second).long()] / unit
    load, room = _shares(cases, pairs, at, split, ways)
    so_far = so_far / unit
    nodes = torch.stack(
        [
            so_far, length - so_far, length, other, length - other, SHARP * before / unit, SHARP * after / unit,
            (place == 0).expand_as(so_far), place == own - 1, (own - 2) / MANY, (sizes.sum(1, keepdim=True) - own - 2) / MANY,
            room[:, second.long()], room[:, (~second).long()], load, there * (place / own),
        ],
        -1,
    )  # fmt: skip
    same = second[:, None] == second
    behind = place - place[:, None]  # by how many places a token comes after another
    ways = SHARP * ways / unit[..., None]
    fixed = torch.stack([same, same & (behind == 1), same & (behind == -1), same * behind.sign()], -1)
    edges = torch.cat([torch.stack([ways, ways.mT], -1), fixed.to(ways).expand(len(pairs), *fixed.shape)], -1)
    r, s = slice(0, split), slice(split, None)
    between, back = ways[:, r, s], ways.mT[:, r, s]
    arcs = torch.stack(
        torch.broadcast_tensors(
            between[:, :-1, 1:],
            back[:, 1:, :-1],
            SHARP * (after / unit)[:, r][:, :-1, None],
            SHARP * (after / unit)[:, None, s][..., :-1],
        ),
        -1,
    )
    nodes, edges, arcs, scale = (x.to(like.device, like.dtype) for x in (nodes, edges, arcs, scale))
    return _Pairs(nodes, edges, arcs, there.to(like.device), scale, split)


def _shares(
    cases: Sequence[Any], pairs: Sequence[Any], at: Tensor, split: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the demand of each token and the free share of each vehicle's capacity, 0 and 1 without a capacity."""
    load, room = like.new_zeros(at.shape), like.new_ones(len(cases), 2)
    for row, ((problem, _, plan, i, j), pair) in enumerate(zip(cases, pairs, strict=True)):
        if problem.capacity is None:
            continue
        demands = problem.demands.to(like)
        for side, (k, nodes) in enumerate(zip((i, j), pair, strict=True)):
            most = float(problem.capacity[k] if isinstance(problem.capacity, Tensor) else problem.capacity)
            begin = split * side + 1
            shares = demands[plan[k]] / (most or 1.0)
            load[row, begin : begin + len(nodes) - 2] = shares
            room[row, side] = 1 - shares.sum()
    return load, room


@torch.inference_mode(False)
@torch.enable_grad()
def fit_decrements(
    net: DecrementNet,
    sample: Sample | None = None,
    *,
    n_samples: int = 1200,
    n_steps: int = 375,
    batch_size: int = 32,
    lr: float = 3e-3,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train a network, in place, on exact tables of random pairs of routes.

    Parameters
    ----------
    net : DecrementNet
        In float32 or float64. What is frozen of it stays.
    sample : callable, optional
        ``sample(generator)`` returns a problem and a plan, of which the longest route and one other, drawn, are
        the pair; the generator is on the CPU. By default 14 to 36 customers in the unit square, seven times of
        ten with one depot, else with two and flexible ends, and once in four with a capacity.
    n_samples : int, default=1200
        Tables, at least 1.
    n_steps : int, default=375
        Of AdamW under a one-cycle rate, at least 1.
    batch_size : int, default=32
        Tables a step, at least 1.
    lr : float, default=3e-3
        The highest rate, positive.
    generator : torch.Generator, optional
        Of samples and batches, by default torch's global one.

    Returns
    -------
    list of float
        The loss of each step: smooth L1 with beta 0.1, of decrements in tenths of the longer route.

    Raises
    ------
    ValueError
        If ``net`` is no `DecrementNet`, is in half precision or has nothing to train, a number is out of range, or
        ``sample`` returns anything but a problem and a plan of it.

    References
    ----------
    .. [1] Kim, Park, Park. Learning to CROSS exchange to solve min-max vehicle routing problems.
       ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import DecrementNet, fit_decrements
    >>> losses = fit_decrements(DecrementNet(width=8), n_samples=8, n_steps=3, generator=torch.Generator().manual_seed(0))
    >>> len(losses)
    3
    """
    if not isinstance(net, DecrementNet):
        raise ValueError(f"net must be a DecrementNet, got {type(net).__name__}")
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("net must have a parameter that requires a gradient, got none")
    if any(p.is_inference() for p in trained):
        raise ValueError("net must not be made under torch.inference_mode, whose tensors cannot be trained")
    narrow = next((p.dtype for p in net.parameters() if p.dtype in NARROW), None)
    if narrow is not None:
        raise ValueError(f"net must be in float32 or float64 to be trained, got {narrow}: cast it afterwards")
    if sample is not None and not callable(sample):
        raise ValueError(f"sample must be a function of a generator, got {type(sample).__name__}")
    for name, value in (("n_samples", n_samples), ("n_steps", n_steps), ("batch_size", batch_size)):
        integer(name, value, 1)
    at_least("lr", lr, 0, strict=True)
    rng = torch.Generator().manual_seed(seed_from(generator))
    cases, tables = [], []
    for _ in range(n_samples):
        problem, plan, i, j = _drawn(sample or _two_routes, rng)
        full = bordered(problem)
        table = Exchanges(problem, full.cpu().double().numpy(), plan, i, j)
        cases.append((problem, full, plan, i, j))
        tables.append(torch.from_numpy(table.best()[2]).reshape(table.n + 1, table.m + 1))
    optimizer = torch.optim.AdamW(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, n_steps + 1))
    losses, order = [], torch.empty(0, dtype=torch.int64)
    for _ in range(n_steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(n_samples, generator=rng)])
        rows, order = order[:batch_size].tolist(), order[batch_size:]
        batch = _batch([cases[k] for k in rows], net.embed.weight)
        with torch.autocast(net.embed.weight.device.type, enabled=False):
            loss = _loss(net._predict(batch), [tables[k] for k in rows], batch.scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def _loss(predicted: Tensor, tables: Sequence[Tensor], scale: Tensor) -> Tensor:
    target, weight = torch.zeros_like(predicted), torch.zeros_like(predicted)
    for k, table in enumerate(tables):
        target[k, : len(table), : table.shape[1]] = table.to(target)
        weight[k, : len(table), : table.shape[1]] = 1
    target = SHARP * target / scale.masked_fill(scale == 0, 1)[:, None, None]
    return (F.smooth_l1_loss(predicted, target, beta=0.1, reduction="none") * weight).sum() / weight.sum()


def _drawn(sample: Sample, rng: torch.Generator) -> tuple[FleetProblem, list[list[int]], int, int]:
    """Return what the user's function gives, and two vehicles: the longest route and another."""
    drawn = sample(rng)
    if not isinstance(drawn, tuple) or len(drawn) != 2 or not isinstance(drawn[0], FleetProblem):
        raise ValueError(f"sample must return a FleetProblem and its routes, got {type(drawn).__name__}")
    problem, plan = drawn[0], checked_plan(*drawn)
    i = int(problem.lengths(plan).argmax())
    j = int(torch.randint(len(plan) - 1, (), generator=rng))
    return problem, plan, i, j + (j >= i)


def _two_routes(rng: torch.Generator) -> tuple[FleetProblem, list[list[int]]]:
    """Return two routes of a noisy sweep, of which the one has handed up to four customers of an end to the other."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=rng, dtype=torch.float64)

    n = 14 + int(23 * uniform())
    customers, one = uniform(n, 2), float(uniform()) < 0.7
    depots = uniform(1 if one else 2, 2)
    angle = torch.atan2(*(customers - depots.mean(0)).T) + 1.5 * float(uniform()) * torch.randn(
        n, generator=rng, dtype=torch.float64
    )
    order = angle.argsort().tolist()
    vehicles, end = ([0, 0], "start") if one else ([0, 1], "any")
    problem = FleetProblem.from_coords(customers, depots, vehicles, end=end)
    full = bordered(problem).numpy()
    plan = [
        shortened(ends(problem, k, part), full, True)[1:-1]
        for k, part in enumerate((order[: n // 2], order[n // 2 :]))
    ]
    giver, handed = int(2 * uniform()), int(5 * uniform())
    if handed:
        plan[1 - giver] += plan[giver][-handed:]
        plan[giver] = plan[giver][:-handed]
    if float(uniform()) < 0.25:
        demands = 0.2 + uniform(n)
        fullest = max(float(demands[part].sum()) for part in plan)
        problem = FleetProblem.from_coords(
            customers,
            depots,
            vehicles,
            end=end,
            demands=demands,
            capacity=fullest * (1.01 + 0.3 * float(uniform())),
        )
    return problem, plan
