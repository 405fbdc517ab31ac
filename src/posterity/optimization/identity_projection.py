"""A combinatorial solver as a layer, trained by minus the identity where it has no derivative.

A solver turns the costs w that a network predicts into a decision,

    y(w) = argmin_{y in Y} <w, y>,                                            (1)

which is piecewise constant: its derivative is zero or does not exist. On the way back the layer
replaces it by minus the identity,

    dL/dw := -dL/dy,                                                          (2)

so a step makes dearer what the loss wants less of. It needs no second call of the solver and has
nothing to tune, and it descends: with w' = w + a dL/dy, for every a > 0,

    <y(w') - y(w), dL/dy>  <=  0                                              (3)

(add the two optimality inequalities), and for large a, y(w') minimises the linearised loss over Y.
With the loss ||y - y*||^2 and costs that are linear in the parameters, (2) is the update of the
structured perceptron.

What the solver ignores should not be stepped along: scaling w changes no decision, nor does a
constant added to all of w where every decision has the same sum. Steps along such directions add
up until the costs collapse. So they are projected out of w before the solver, and the gradient
goes through that projection P,

    P(w) = w / ||w||  ("norm"),   w - mean(w)  ("mean"),   both in turn  ("std").     (4)
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posterity._checks import at_least, finite, integer, one_of
from posterity._precision import NARROW, wide, widened
from posterity._random import draw_device
from posterity.optimization.combinatorial_solvers import Solver, _with_a_batch

__all__ = ["CombinatorialLayer", "gumbel", "project_costs", "sum_of_gamma"]

PROJECTIONS = ("none", "mean", "norm", "std")


class CombinatorialLayer(nn.Module):
    """Any combinatorial solver as a layer: costs in, decisions out, and a gradient.

    Parameters
    ----------
    solver : callable
        Minimises ``<costs, y>``. It is called as ``solver(costs, *data)`` with the whole batch,
        a float64 array (batch, ``*shape``) of its own, and returns decisions of the same shape,
        an array or a tensor. One with the attribute ``accepts = "torch"``, or a module, gets a
        detached tensor, float32 at least, which it must not change. Those of
        `posterity.optimization` (`top_k`, `assignment`, `grid_shortest_path`, ...) are such
        callables.
    sense : {"min", "max"}, default="min"
        Whether a decision is to have the least or the largest ``<costs, y>``; for "max" the
        solver is handed minus the costs.
    projection : {"none", "mean", "norm", "std"} or callable, default="none"
        What is done to the costs before the solver, see `project_costs`. "norm" is right for
        every solver; "mean" and "std" only where all decisions have the same sum (not for
        shortest paths). A callable maps costs to costs and is differentiated through.
    noise : float or callable, default=0.0
        Added in training mode only. A number alpha, at least 0, is a margin: each projected
        cost moves by ``alpha / 2`` up or down with equal chance, so that a decision on the edge
        of changing is not yet good enough. Costs of norm 1 are of size ``1 / sqrt(n)``, and
        a tenth of that to all of it is useful. A callable, ``noise(shape, generator)``, is that of a
        sampler and is added before the projection: `gumbel` and `sum_of_gamma`, whose scores
        want ``sense="max"``.
    gradient : {"identity", "blackbox"}, default="identity"
        Equation 2, or the rival: ``(y(w + strength dL/dy) - y(w)) / strength`` for "min", which
        solves once more on the way back.
    strength : float, default=10.0
        Of "blackbox", greater than 0, in units of costs per gradient.
    n_jobs : int, default=1
        Threads among which a batch is divided, at least 1; more than 1 only for a solver that
        has the attribute ``by_instance = True``, as the built-in ones on scipy and OR-tools
        have. ``data`` goes to each part as it is.

    Attributes
    ----------
    n_solver_calls : int
        Instances solved so far, forward and backward.

    Raises
    ------
    ValueError
        If an argument is out of range or does not suit the solver; of a call, if ``costs`` do
        not fit or what ``projection``, ``noise`` or ``solver`` return does not, or if the
        decision is whole numbers that the dtype of ``costs`` (bfloat16, float16) cannot hold.

    Notes
    -----
    1. The margin noise takes two values; a symmetric one of another shape would do as well.
    2. The official subset layer is written for scores to be maximised, for which (2) is plus the
       identity: ``sense="max"``.

    References
    ----------
    .. [1] Sahoo et al. Backpropagation through Combinatorial Algorithms: Identity with
       Projection Works. ICLR 2023. Sections 3 and 4.
    .. [2] Vlastelica et al. Differentiation of Blackbox Combinatorial Solvers. ICLR 2020.

    Examples
    --------
    Two of four things, the cheapest; the loss would rather have the last, whose cost falls:

    >>> import torch
    >>> from posterity.optimization import CombinatorialLayer, top_k
    >>> costs = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    >>> decision = CombinatorialLayer(top_k(2))(costs)
    >>> decision.detach()
    tensor([[1., 1., 0., 0.]])
    >>> (-decision[:, 3]).sum().backward()
    >>> costs.grad[0, 3]
    tensor(1.)

    A solver of one's own, here the cheapest of all:

    >>> layer = CombinatorialLayer(lambda costs: costs == costs.min(1, keepdims=True), projection="std")
    >>> layer(costs).detach()
    tensor([[1., 0., 0., 0.]])
    >>> layer.n_solver_calls
    1
    """

    def __init__(
        self,
        solver: Solver,
        *,
        sense: Literal["min", "max"] = "min",
        projection: Literal["none", "mean", "norm", "std"] | Callable[[Tensor], Tensor] = "none",
        noise: float | Callable[[torch.Size, torch.Generator | None], Tensor] = 0.0,
        gradient: Literal["identity", "blackbox"] = "identity",
        strength: float = 10.0,
        n_jobs: int = 1,
    ) -> None:
        super().__init__()
        if not callable(solver):
            raise ValueError(f"solver must be callable, got {solver!r}")
        self.solver = solver
        self.sense = one_of("sense", sense, ("min", "max"))
        self.projection = (
            projection if callable(projection) else one_of("projection", projection, PROJECTIONS)
        )
        if projection in ("mean", "std") and not getattr(solver, "invariant_to_shift", True):
            raise ValueError(
                f"projection must be 'none' or 'norm' for this solver, got {projection!r}: its decisions "
                "differ in length, so subtracting the mean changes the problem"
            )
        self.noise = noise if callable(noise) else at_least("noise", noise, 0)
        self.gradient = one_of("gradient", gradient, ("identity", "blackbox"))
        self.strength = at_least("strength", strength, 0, strict=True)
        self.n_jobs = integer("n_jobs", n_jobs, 1)
        if self.n_jobs > 1 and not getattr(solver, "by_instance", False):
            raise ValueError(
                f"n_jobs must be 1 for this solver, got {n_jobs}: only one with the attribute "
                "by_instance = True is called with parts of a batch"
            )
        self.n_solver_calls = 0

    def forward(
        self, costs: Float[Tensor, " batch *shape"], *data: Any, generator: torch.Generator | None = None
    ) -> Float[Tensor, " batch *shape"]:
        """Return the decisions, in the shape, dtype and device of ``costs``.

        Parameters
        ----------
        costs : Tensor
            An instance a row, shape (batch, ``*shape``), finite.
        *data
            Passed to the solver after the costs, as it is (graphs, capacities).
        generator : torch.Generator, optional
            Of the noise; None draws from torch's global one.
        """
        _with_a_batch(costs)
        with torch.autocast(costs.device.type, enabled=False):
            w = wide(costs)
            if self.training and callable(self.noise):
                w = w + _like(w, self.noise(w.shape, generator), "noise")
            if callable(self.projection):
                w = _like(w, self.projection(w), "projection")
            else:
                w = _project(w, self.projection)
            if self.training and not callable(self.noise) and self.noise:
                coin = torch.randint(2, w.shape, generator=generator, device=draw_device(generator, w.device))
                w = w + self.noise * (coin.to(w) - 0.5)
            if (not self._takes_tensors or w.device.type == "cpu") and not bool(w.isfinite().all()):
                finite("costs", costs)
                raise ValueError("projection and noise must leave costs finite, got NaN or infinity")
            w = -w if self.sense == "max" else w  # from here on everything minimises
            if self.gradient == "blackbox":
                decision = _Blackbox.apply(w, self, data)
            else:
                decision = self._solve(w.detach(), data) - (w - w.detach())  # equation 2
        if costs.dtype in NARROW:
            spoilt = (decision == decision.round()) & (decision.to(costs.dtype) != decision)
            if bool(spoilt.any()):
                dtype = str(costs.dtype).removeprefix("torch.")
                raise ValueError(
                    f"costs must be float32 or wider for this solver: {dtype} rounds its decisions"
                )
        return decision.to(costs.dtype)

    @property
    def _takes_tensors(self) -> bool:
        return getattr(self.solver, "accepts", "") == "torch" or isinstance(self.solver, nn.Module)

    @torch.no_grad()
    def _solve(self, costs: Tensor, data: tuple[Any, ...]) -> Tensor:
        """Return the solver's decisions for costs to be minimised, and count them."""
        given: Any = costs if self._takes_tensors else costs.to("cpu", torch.float64, copy=True).numpy()
        if self.n_jobs == 1:
            found = _tensor(self.solver(given, *data))
        else:
            size = math.ceil(len(costs) / self.n_jobs)
            with ThreadPoolExecutor(self.n_jobs) as pool:
                parts = [given[start : start + size] for start in range(0, len(costs), size)]
                solved = pool.map(lambda part: _tensor(self.solver(part, *data)), parts)
                found = torch.cat(list(solved))
        self.n_solver_calls += len(costs)
        if found.shape != costs.shape:
            raise ValueError(
                f"solver must return decisions of the shape of costs, {tuple(costs.shape)}, got {tuple(found.shape)}"
            )
        return finite("what solver returns", found.detach().to(costs, copy=True))

    def extra_repr(self) -> str:
        """Return the settings."""
        names = ("sense", "projection", "noise", "gradient")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class _Blackbox(torch.autograd.Function):
    """The finite difference of the solver along the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, layer: CombinatorialLayer, data: tuple[Any, ...]) -> Tensor:  # type: ignore[override]
        decision = layer._solve(w, data)
        ctx.save_for_backward(w, decision)
        ctx.layer, ctx.data = layer, data
        return decision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        w, decision = ctx.saved_tensors
        strength = ctx.layer.strength
        moved = finite("the gradient times strength", w + strength * gradient)
        return (ctx.layer._solve(moved, ctx.data) - decision) / strength, None, None


@widened
def project_costs(
    costs: Float[Tensor, " batch *shape"], kind: Literal["none", "mean", "norm", "std"]
) -> Float[Tensor, " batch *shape"]:
    """Take out of costs what a solver does not see, equation 4.

    Parameters
    ----------
    costs : Tensor
        An instance a row, shape (batch, ``*shape``), finite; gradients go through.
    kind : {"none", "mean", "norm", "std"}
        Nothing; subtract the mean of each instance; divide by its L2 norm; both in turn.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``costs``. For "norm" and "std" each instance has norm 1;
        where nothing is left to divide by, it is 0 and so is its gradient.

    Raises
    ------
    ValueError
        If ``costs`` have no batch axis, no entries, no floating dtype or (on the CPU, where
        reading is free) NaN or infinity, or ``kind`` is unknown.

    Notes
    -----
    1. "std" divides by the L2 norm of the centred costs, as the official code does, and not by
       their standard deviation, which is smaller by ``sqrt(n)``.

    References
    ----------
    .. [1] Sahoo et al. Identity with Projection Works. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import project_costs
    >>> project_costs(torch.tensor([[3.0, 4.0]]), "norm")
    tensor([[0.6000, 0.8000]])
    >>> project_costs(torch.tensor([[3.0, 5.0], [2.0, 2.0]]), "std")
    tensor([[-0.7071,  0.7071],
            [ 0.0000,  0.0000]])
    """
    _with_a_batch(costs)
    one_of("kind", kind, PROJECTIONS)
    if costs.device.type == "cpu":
        finite("costs", costs)
    return _project(costs, kind)


def sum_of_gamma(
    k: int, n_terms: int = 10, scale: float = 10.0
) -> Callable[[torch.Size, torch.Generator | None], Tensor]:
    """Return noise with which `top_k` of scores samples subsets of size k.

    Each entry is ``scale / k`` times ``sum_i Gamma(1 / k, scale=k / i) - log(n_terms)``, i from 1
    to ``n_terms``. The sum of k of them is nearly Gumbel of that scale, so that a subset is
    drawn nearly in proportion to exp of its summed scores over ``scale``.

    Parameters
    ----------
    k : int
        Size of the subsets, at least 1.
    n_terms : int, default=10
        Terms of the series, at least 1; more of them come closer.
    scale : float, default=10.0
        The temperature, greater than 0.

    Returns
    -------
    callable
        ``noise(shape, generator)``, for ``CombinatorialLayer(noise=..., sense="max")``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    .. [1] Niepert, Minervini, Franceschi. Implicit MLE. NeurIPS 2021. Section 4.
    .. [2] Sahoo et al. Identity with Projection Works. ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import CombinatorialLayer, sum_of_gamma, top_k
    >>> sampler = CombinatorialLayer(top_k(2), sense="max", noise=sum_of_gamma(2), projection="std")
    >>> sampler(torch.zeros(1000, 4), generator=torch.Generator().manual_seed(0)).mean(0).round(decimals=1)
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    k, n_terms = integer("k", k, 1), integer("n_terms", n_terms, 1)
    return partial(_sum_of_gamma, k, n_terms, at_least("scale", scale, 0, strict=True))


def gumbel(scale: float = 1.0) -> Callable[[torch.Size, torch.Generator | None], Tensor]:
    """Return Gumbel noise: the largest of noisy scores is a sample of their softmax.

    Parameters
    ----------
    scale : float, default=1.0
        The temperature by which scores are divided in the softmax, greater than 0.

    Returns
    -------
    callable
        ``noise(shape, generator)``, for ``CombinatorialLayer(top_k(1), noise=..., sense="max")``.

    Raises
    ------
    ValueError
        If ``scale`` is not greater than 0.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import CombinatorialLayer, gumbel, top_k
    >>> scores = torch.tensor([0.2, 0.3, 0.5]).log().repeat(10_000, 1)
    >>> sampler = CombinatorialLayer(top_k(1), sense="max", noise=gumbel())
    >>> sampler(scores, generator=torch.Generator().manual_seed(0)).mean(0).round(decimals=1)
    tensor([0.2000, 0.3000, 0.5000])
    """
    return partial(_gumbel, at_least("scale", scale, 0, strict=True))


def _sum_of_gamma(
    k: int, n_terms: int, scale: float, shape: torch.Size, generator: torch.Generator | None
) -> Tensor:
    # torch.distributions takes no generator: numpy draws, under a seed that torch's generator gives
    seed = torch.randint(2**63 - 1, (), generator=generator, device=draw_device(generator))
    rng, total = np.random.default_rng(int(seed)), np.zeros(shape)
    for i in range(1, n_terms + 1):
        total += rng.gamma(1 / k, k / i, size=tuple(shape))
    return torch.from_numpy(scale / k * (total - math.log(n_terms)))


def _gumbel(scale: float, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    empty = torch.empty(shape, dtype=torch.float32, device=draw_device(generator))
    waiting = empty.exponential_(generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    return -scale * waiting.log()


def _project(w: Tensor, kind: str) -> Tensor:
    """Project each instance, in units of its largest entry, so that neither squares nor sums overflow.

    The norm that is divided by is at least the root of the smallest number, as the gradient is one over it.
    """
    if kind == "none":
        return w
    flat = w.flatten(1)
    unit = flat.detach().abs().amax(1, keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    flat = flat / unit
    if kind in ("mean", "std"):
        flat = flat - flat[:, :1].detach()  # a constant: equal costs end at 0 exactly, not at rounding
        flat = flat - flat.mean(1, keepdim=True)
    if kind == "mean":
        return (flat * unit).view_as(w)
    empty = (flat == 0).all(1, keepdim=True)  # 0 / 1 with no gradient, where the norm has none
    flat = flat.masked_fill(empty, 0.0)
    norm = torch.linalg.vector_norm(flat.masked_fill(empty, 1.0), dim=1, keepdim=True)
    return (flat / norm.clamp_min(torch.finfo(w.dtype).tiny ** 0.5 / unit)).view_as(w)


def _tensor(found: Any) -> Tensor:
    """Return what a user's solver returns as a tensor."""
    if isinstance(found, Tensor):
        return found
    values = np.array(found)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"solver must return an array or a tensor of numbers, got {type(found).__name__}")
    return torch.from_numpy(values)


def _like(w: Tensor, made: Any, name: str) -> Tensor:
    """Return what a user's callable made of costs, in their dtype and on their device."""
    if not isinstance(made, Tensor) or made.shape != w.shape:
        came = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"{name} must return a tensor of the shape of costs, {tuple(w.shape)}, got {came}")
    return made.to(w)
