r"""Search a population at a time: the best of hundreds of moves of a small classifier, without gradients.

The moves are those of `posterity.optimization.PatternSearch`, one entry by the radius, or of
`posterity.optimization.GreedyRandomSearch`, normal noise on all:

.. math:: \theta \leftarrow \arg\min_{\theta' \in M} L(\theta') \quad\text{if that is below } L(\theta),

with M the next ``population`` moves; when no population helps, the radius shrinks. Training stops at an
accuracy, so that solutions of equal loss can be compared with those of SGD, or goes on to where no move
of the least radius helps.

In a perceptron a move of one weight changes one unit, and the next layer by one column times that change:
pattern search evaluates a move from the layers at hand, for a small part of a forward pass.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from posterity._checks import at_least, integer, one_of, within
from posterity._precision import wide
from posterity._random import draw_device
from posterity.optimization.direct_search import _order, _scalar, _seed, _settings
from posterity.optimization.gradient_free import _cross_entropy, _normalized, _Population, _task

__all__ = ["SearchResult", "population_search"]

Params = dict[str, Tensor]
Found = tuple[Tensor, Callable[[int], Params]]  # losses of a population, and what makes one of it
Draw = Callable[[Params, float, int], Iterator[Found]]


class SearchResult(NamedTuple):
    """Where a search ended.

    Attributes
    ----------
    params : dict of str to Tensor
        Parameters for ``torch.func.functional_call``.
    loss : float
        Training loss there, normalised if asked for.
    accuracy : float
        Training accuracy there.
    n_evals : int
        Moves evaluated.
    radius : float
        The radius at the end.
    history : Tensor of shape (n_steps,)
        The loss after each step; it never rises.
    """

    params: dict[str, Tensor]
    loss: float
    accuracy: float
    n_evals: int
    radius: float
    history: Float[Tensor, " n_steps"]


@torch.no_grad()
def population_search(
    model: nn.Module,
    x: Shaped[Tensor, " n *shape"],
    y: Int[Tensor, " n"],
    *,
    method: Literal["pattern", "random"] = "pattern",
    population: int = 512,
    radius: float = 1.0,
    shrink: float = 0.5,
    max_steps: int = 80_000,
    patience: int = 100,
    min_radius: float = 1e-6,
    stop_accuracy: float | None = 1.0,
    normalize: bool = True,
    unit: float = 1.0,
    loss_fn: Callable | None = None,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Improve a classifier by the best of many moves at a time, without gradients.

    Parameters
    ----------
    model : nn.Module
        Where to start; not changed. In evaluation mode where it has dropout or batch normalisation.
        All its parameters are searched.
    x : Tensor of shape (n, *shape)
        Inputs, finite.
    y : Tensor of shape (n,)
        Class indices.
    method : {"pattern", "random"}, default="pattern"
        Move one entry by the radius, or all by the radius times normal noise.
    population : int, default=512
        Moves evaluated at a time; the best is taken if it lowers the loss, else the next so many are.
    radius : float, default=1.0
        Of the first moves, positive.
    shrink : float, default=0.5
        What the radius is multiplied by when no move was found, in (0, 1).
    max_steps : int, default=80_000
        A step moves or shrinks.
    patience : int, default=100
        Populations without success after which "random" shrinks; "pattern" visits all its moves.
    min_radius : float, default=1e-6
        The search ends when the radius is less; at least 0.
    stop_accuracy : float or None, default=1.0
        The search ends at this training accuracy, in [0, 1]; None goes on.
    normalize : bool, default=True
        Divide logits by `weight_norm_product` before the loss.
    unit : float, default=1.0
        Of the norms, positive.
    loss_fn : callable, optional
        ``loss_fn(logits, y)``, a scalar, of logits (n, classes); any function, called for each move. By
        default the mean cross-entropy, of all moves at once.
    generator : torch.Generator, optional
        Draws the moves; by default torch's global one.

    Returns
    -------
    SearchResult
        The parameters with the lowest loss, and how they were reached.

    Raises
    ------
    ValueError
        If data, model or a setting are not as said, or the loss is NaN at the start.

    See Also
    --------
    guess_and_check : Samples solutions without a start, where they are frequent enough to guess.

    References
    ----------
    Chiang, Ni, Miller, Bansal, Geiping, Goldblum, Goldstein, "Loss landscapes are all you need: neural network
    generalization can be explained without the implicit bias of gradient descent", ICLR 2023, Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import population_search
    >>> net = torch.nn.Linear(2, 2)
    >>> x, y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1, 1])
    >>> result = population_search(net, x, y, stop_accuracy=None, max_steps=10, normalize=False)
    >>> result.accuracy
    1.0
    """
    one_of("method", method, ("pattern", "random"))
    for name, value in (("population", population), ("patience", patience), ("max_steps", max_steps)):
        integer(name, value, 1)
    _settings({"radius": radius, "shrink": shrink})
    at_least("min_radius", min_radius, 0)
    if stop_accuracy is not None:
        within("stop_accuracy", stop_accuracy, 0.0, 1.0)
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of logits and y, got {type(loss_fn).__name__}")
    with _task(model, x, y, normalize, unit) as net:
        judge = _Judge(net, x, y, unit if normalize else None, loss_fn)
        here = {name: p.clone() for name, p in net.params.items()}
        best, accuracy = judge.one(here)
        if best != best:
            raise ValueError("loss_fn must be a number at the start, got NaN")
        draw = _patterns(judge, generator) if method == "pattern" else _noises(judge, patience, generator)
        history: list[float] = []
        n_evals = 0
        while len(history) < max_steps and radius >= min_radius:
            if stop_accuracy is not None and accuracy >= stop_accuracy:
                break
            for losses, made in draw(here, radius, population):
                n_evals += len(losses)
                losses = losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
                k = int(losses.argmin())
                if losses[k] < best:
                    there = made(k)
                    lower, right = judge.one(there)  # alone it may be rounded otherwise
                    if lower < best:
                        here, best, accuracy = there, lower, right
                        break
            else:
                radius *= shrink
            history.append(best)
    return SearchResult(here, best, accuracy, n_evals, radius, torch.tensor(history, dtype=torch.float64))


class _Judge:
    """Gives the losses of a population."""

    def __init__(
        self, net: _Population, x: Tensor, y: Tensor, unit: float | None, loss_fn: Callable | None
    ) -> None:
        self.net, self.x, self.y, self.unit, self.loss_fn = net, x, y, unit, loss_fn

    def of_logits(self, logits: Tensor) -> Tensor:
        """Return the loss of each of logits, (population, n, classes)."""
        if self.loss_fn is None:
            return _cross_entropy(logits, self.y).double()
        losses = [_scalar("loss_fn", self.loss_fn(each, self.y)) for each in logits]
        return torch.tensor(losses, dtype=torch.float64, device=logits.device)

    def __call__(self, params: Params) -> Tensor:
        return self.of_logits(_normalized(self.net.logits(params, self.x), params, self.unit))

    def one(self, params: Params) -> tuple[float, float]:
        """Return loss and accuracy of one network."""
        stacked = {name: p[None] for name, p in params.items()}
        logits = _normalized(self.net.logits(stacked, self.x), stacked, self.unit)
        return float(self.of_logits(logits)), float((logits[0].argmax(1) == self.y).double().mean())


def _noises(judge: _Judge, patience: int, generator: torch.Generator | None) -> Draw:
    """Return what draws populations with normal noise on all entries."""

    def draw(here: Params, radius: float, population: int) -> Iterator[Found]:
        for _ in range(patience):
            best, losses, chunk = {}, [], judge.net.at_once(len(judge.x))
            for start in range(0, population, chunk):
                tried = _scattered(here, min(chunk, population - start), radius, generator)
                losses.append(judge(tried).nan_to_num(nan=math.inf))
                k = int(losses[-1].argmin())
                if not best or losses[-1][k] < min(float(part.min()) for part in losses[:-1]):
                    best = {name: p[k].clone() for name, p in tried.items()}
            yield torch.cat(losses), lambda k, best=best: best

    return draw


def _scattered(here: Params, size: int, radius: float, generator: torch.Generator | None) -> Params:
    tried = {}
    for name, p in here.items():
        device = draw_device(generator, p.device)
        dtype = torch.promote_types(p.dtype, torch.float32)
        noise = torch.randn((size, *p.shape), generator=generator, device=device, dtype=dtype)
        tried[name] = p + noise.mul_(radius).to(p)
    return tried


def _patterns(judge: _Judge, generator: torch.Generator | None) -> Draw:
    """Return what visits the moves of single entries, in a new order each time."""
    seeds = count(_seed(generator))
    net, n_entries = judge.net, sum(p.numel() for p in judge.net.params.values())
    quick = _Trace.fits(net)

    def draw(here: Params, radius: float, population: int) -> Iterator[Found]:
        order = _order(2 * n_entries, next(seeds))
        trace = _Trace(judge, here) if quick else None
        chunk = min(population, net.at_once(len(judge.x)))
        while moves := sorted(islice(order, population)):  # so that those of a parameter lie together
            chunks = [moves[k : k + chunk] for k in range(0, len(moves), chunk)]
            losses = [trace(part, radius) if trace else judge(_moved(here, part, radius)) for part in chunks]
            yield torch.cat(losses), lambda k, moves=moves: _one(_moved(here, [moves[k]], radius))

    return draw


def _one(tried: Params) -> Params:
    return {name: p[0] for name, p in tried.items()}


def _moved(here: Params, moves: list[int], radius: float) -> Params:
    """Return a population, each with one entry moved: 2i moves the i-th of all entries up, 2i + 1 down."""
    tried = {}
    for name, p, rows, places, step in _shares(here, moves, radius):
        stack = p.expand(len(moves), *p.shape).clone(memory_format=torch.contiguous_format)
        stack.view(len(moves), -1)[rows].scatter_add_(1, places[:, None], step[:, None])
        tried[name] = stack
    return tried


def _shares(
    here: Params, moves: list[int], radius: float
) -> Iterator[tuple[str, Tensor, slice, Tensor, Tensor]]:
    """Yield name, parameter, and which of sorted moves are of it, at which of its entries, by how much."""
    drawn = torch.tensor(moves)
    entry, step = drawn >> 1, radius * (1 - 2 * (drawn & 1)).double()
    start = 0
    for name, p in here.items():
        end = start + p.numel()
        rows = slice(bisect_left(moves, 2 * start), bisect_left(moves, 2 * end))
        yield name, p, rows, (entry[rows] - start).to(p.device), step[rows].to(p)
        start = end


class _Trace:
    """The layers of a perceptron at one place, from which a move of one entry is a small change.

    A move of layer l changes one of its units, and the next layer by one column of its weights times that.
    """

    def __init__(self, judge: _Judge, here: Params) -> None:
        self.judge, self.here = judge, here
        self.blocks: list[tuple[str, str, list[nn.Module]]] = []
        self.inputs, self.sums = [], []  # of each linear layer, (features, n)
        hidden = judge.x.flatten(1).T
        for module, weight, bias in judge.net.layers or ():
            if weight:
                self.blocks.append((weight, bias, []))
                self.inputs.append(hidden)
                hidden = self._linear(len(self.blocks) - 1, hidden)
                self.sums.append(hidden)
            else:
                hidden = module(hidden)
                if self.blocks:
                    self.blocks[-1][2].append(module)
        self.owner = {name: k for k, block in enumerate(self.blocks) for name in block[:2]}
        self.norms = {name: wide(p).norm() for name, p in here.items() if p.ndim > 1}

    @staticmethod
    def fits(net: _Population) -> bool:
        """Whether a network is a perceptron, no two layers of which share a parameter."""
        names = [name for _, *pair in net.layers or () for name in pair if name]
        return bool(names) and len(set(names)) == len(names)

    def __call__(self, moves: list[int], radius: float) -> Tensor:
        """Return the losses after moves of single entries."""
        logits, scale = [], {name: norm.expand(len(moves)).clone() for name, norm in self.norms.items()}
        for name, p, rows, places, step in _shares(self.here, moves, radius):
            if p.ndim > 1:
                inputs = self.inputs[self.owner[name]][places % p.shape[1]]
                logits.append(self._logits(name, places // p.shape[1], step[:, None] * inputs))
                before, step = wide(p.reshape(-1)[places]), wide(step)
                scale[name][rows] = (self.norms[name] ** 2 + step * (2 * before + step)).clamp_min(0).sqrt()
            else:
                logits.append(self._logits(name, places, step[:, None]))
        found = wide(torch.cat(logits))
        if self.judge.unit is not None:
            for norm in scale.values():
                found = found / (norm / self.judge.unit)[:, None, None]
        return self.judge.of_logits(found.mT)

    def _logits(self, name: str, unit: Tensor, change: Tensor) -> Tensor:
        """Return logits (moves, classes, n) when a unit of the layer changes."""
        k = self.owner[name]
        if k == len(self.blocks) - 1:
            hidden = self.sums[k].expand(len(unit), *self.sums[k].shape).clone()
            hidden[torch.arange(len(unit), device=unit.device), unit] += change
        else:
            old = self.sums[k][unit]
            change = self._after(k, old + change) - self._after(k, old)
            k += 1
            column = self.here[self.blocks[k][0]].T[unit]  # (moves, features)
            hidden = torch.addcmul(self.sums[k], column[:, :, None], change[:, None, :])
        for later in range(k + 1, len(self.blocks)):
            hidden = self._linear(later, self._after(later - 1, hidden))
        return self._after(len(self.blocks) - 1, hidden)

    def _linear(self, k: int, hidden: Tensor) -> Tensor:
        weight, bias, _ = self.blocks[k]
        out = self.here[weight] @ hidden
        return out + self.here[bias][:, None] if bias else out

    def _after(self, k: int, hidden: Tensor) -> Tensor:
        for module in self.blocks[k][2]:
            hidden = module(hidden)
        return hidden
