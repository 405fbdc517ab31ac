r"""Search without gradients: try moves of the parameters, keep one that lowers the loss, else move less.

Two ways to move parameters :math:`\theta` of P entries by a radius r, which use of the loss only whether
it fell, so that it may be quantised, spiking, or a count of errors:

.. math:: \theta \pm r\, e_i \quad\text{(pattern search)} \qquad\text{or}\qquad
          \theta + r\, z, \; z \sim N(0, I) \quad\text{(greedy random search)}.

Pattern search visits its 2P moves in random order; greedy random search draws until its patience ends.
A move is kept only if the loss falls, and when none is found, r is multiplied by ``shrink``. So the loss
never rises, and pattern search ends where no single entry can improve. Nothing of a forward pass is
kept: beyond the parameters the memory of a step does not grow with depth.

These are optimisers of any closure, one evaluation at a time; `posterity.optimization.population_search`
evaluates hundreds of moves of a small classifier at once.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from posterity._checks import at_least, integer, within
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["GreedyRandomSearch", "PatternSearch"]

BLOCK = 256  # moves drawn at a time


class _DirectSearch(Optimizer):
    """Holds what both optimisers draw by: a seed and how often it was used, in the first parameter's state."""

    def __init__(self, params: Any, defaults: dict[str, Any], generator: torch.Generator | None) -> None:
        super().__init__(params, defaults)
        self._memory.update(seed=_seed(generator), n_steps=0)

    @property
    def _memory(self) -> dict[str, Any]:
        return self.state[self.param_groups[0]["params"][0]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, checked as the optimiser's are.

        Parameters
        ----------
        param_group : dict
            ``"params"``, and what differs from the defaults.
        """
        _settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ValueError(f"params must be real floating-point tensors, got dtype {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Look for a move that lowers the loss, and take it.

        Parameters
        ----------
        closure : callable
            Returns the loss, a scalar, and calls no ``backward``; it is called without gradients.

        Returns
        -------
        float
            The loss after the step, which is at most the loss before.

        Raises
        ------
        ValueError
            If there is no closure, or its loss is not a scalar or, before a move, is NaN.
        """
        if closure is None:
            raise ValueError("closure must be a function that returns the loss, got None")
        best = _scalar("closure", closure())
        if best != best:
            raise ValueError("closure must return a number before a move, got NaN")
        self._memory["n_steps"] += 1
        return self._search(closure, best, self._memory["seed"] + self._memory["n_steps"] - 1)

    @abstractmethod
    def _search(self, closure: Callable[[], Any], best: float, seed: int) -> float:
        """Return the loss after a move that lowers it, or ``best`` with the parameters as they were."""

    def _all(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _shrink(self) -> None:
        for group in self.param_groups:
            group["radius"] *= group["shrink"]


class PatternSearch(_DirectSearch):
    """Moves one entry of the parameters at a time, by a radius that shrinks when no move helps.

    A step visits the moves of all entries up and down in a new random order and keeps the first that
    lowers the loss. If none of them does, it multiplies the radius of each group by ``shrink``.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        What to optimise; each group may have settings of its own. Real; gradients are neither needed nor
        read, and what does not require any is moved too.
    radius : float, default=1.0
        Positive. The present one is ``optimizer.param_groups[0]["radius"]``.
    shrink : float, default=0.5
        In (0, 1).
    generator : torch.Generator, optional
        Draws the seed of all orders, once; by default torch's global one.

    Raises
    ------
    ValueError
        If a setting is out of its range or a parameter is not real.

    See Also
    --------
    population_search : The same for classifiers, hundreds of moves at a time.

    Notes
    -----
    1. A step evaluates the closure up to 2P + 1 times for P entries. The first half of an order is drawn as
       far as it is visited, so a step that soon succeeds is cheap in any network.
    2. The closure must give the same loss for the same parameters within a step: fix the batch and dropout.

    References
    ----------
    Chiang et al., "Loss landscapes are all you need", ICLR 2023, Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import PatternSearch
    >>> p = torch.zeros(2)
    >>> optimizer = PatternSearch([p])
    >>> for _ in range(10):
    ...     loss = optimizer.step(lambda: (p - torch.tensor([3.0, -0.5])).abs().sum())
    >>> p
    tensor([ 3.0000, -0.5000])
    """

    def __init__(
        self, params: Any, *, radius: float = 1.0, shrink: float = 0.5, generator: torch.Generator | None = None
    ) -> None:  # fmt: skip
        super().__init__(params, {"radius": radius, "shrink": shrink}, generator)

    def _search(self, closure: Callable[[], Any], best: float, seed: int) -> float:
        params = self._all()
        ends, total = [], 0
        for p, _ in params:
            total += p.numel()
            ends.append(total)
        for move in _order(2 * total, seed):
            which = bisect_right(ends, move // 2)
            p, group = params[which]
            place = _place(move // 2 - (ends[which] - p.numel()), p.shape)
            held = p[place].clone()
            p[place] += -group["radius"] if move % 2 else group["radius"]
            try:
                loss = _scalar("closure", closure())
            except BaseException:
                p[place] = held
                raise
            if loss < best:  # NaN is not
                return loss
            p[place] = held
        self._shrink()
        return best


class GreedyRandomSearch(_DirectSearch):
    """Moves all parameters by normal noise of a radius, when that lowers the loss.

    A step tries one move. After ``patience`` of them in a row without success the radius shrinks.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        What to optimise; each group may have settings of its own. Real; gradients are neither needed nor
        read, and what does not require any is moved too.
    radius : float, default=1.0
        Standard deviation of an entry's move, positive. The present one is
        ``optimizer.param_groups[0]["radius"]``.
    shrink : float, default=0.5
        In (0, 1).
    patience : int, default=100
        Of the optimiser, not of a group.
    generator : torch.Generator, optional
        Draws the seed of all moves, once; by default torch's global one.

    Raises
    ------
    ValueError
        If a setting is out of its range or a parameter is not real.

    See Also
    --------
    PatternSearch : Moves single entries; needs more evaluations far away and ends closer.
    population_search : The same for classifiers, hundreds of moves at a time.

    Notes
    -----
    1. A step evaluates the closure twice, before and after the move, and holds a copy of the parameters.
    2. The closure must give the same loss for the same parameters within a step: fix the batch and dropout.

    References
    ----------
    Chiang et al., "Loss landscapes are all you need", ICLR 2023, Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import GreedyRandomSearch
    >>> p = torch.zeros(2)
    >>> optimizer = GreedyRandomSearch([p], patience=10)
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: (p - torch.tensor([3.0, -0.5])).abs().sum())
    >>> loss < 0.01
    True
    """

    def __init__(
        self, params: Any, *, radius: float = 1.0, shrink: float = 0.5, patience: int = 100,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.patience = integer("patience", patience, 1)
        super().__init__(params, {"radius": radius, "shrink": shrink}, generator)
        self._memory["n_failed"] = 0

    def _search(self, closure: Callable[[], Any], best: float, seed: int) -> float:
        memory, params = self._memory, self._all()
        draw = torch.Generator().manual_seed(seed)
        held = [p.clone() for p, _ in params]
        loss = best
        try:
            for p, group in params:  # drawn on the CPU in float32, so that devices and dtypes move alike
                p.add_(torch.randn(p.shape, generator=draw).to(p), alpha=group["radius"])
            loss = _scalar("closure", closure())
        finally:
            if not loss < best:
                for (p, _), before in zip(params, held, strict=True):
                    p.copy_(before)
        if loss < best:
            memory["n_failed"] = 0
            return loss
        memory["n_failed"] += 1
        if memory["n_failed"] == self.patience:
            memory["n_failed"] = 0
            self._shrink()
        return best


def _settings(settings: dict[str, Any]) -> None:
    at_least("radius", settings["radius"], 0, strict=True)
    within("shrink", settings["shrink"], 0, 1, open_low=True, open_high=True)


def _scalar(name: str, loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return float(wide(loss))
    if isinstance(loss, bool | str) or not hasattr(loss, "__float__") or isinstance(loss, Tensor):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name} must return a scalar loss, got {got}")
    return float(loss)


def _seed(generator: torch.Generator | None) -> int:
    """Return a seed for streams of a search's own, drawn from a generator."""
    return int(torch.randint(2**62, (), generator=generator, device=draw_device(generator)))


def _order(n: int, seed: int) -> Iterator[int]:
    """Yield 0 to n - 1 in random order: the first half is drawn as far as it is asked for."""
    draw, seen = np.random.default_rng(seed), set()
    while 2 * len(seen) < n:
        for k in draw.integers(n, size=BLOCK).tolist():
            if k not in seen:
                seen.add(k)
                yield k
    yield from draw.permutation([k for k in range(n) if k not in seen]).tolist()


def _place(index: int, shape: torch.Size) -> tuple[int, ...]:
    """Return the index of an entry, counted in order, in each axis."""
    place = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        place.append(rest)
    return tuple(reversed(place))
