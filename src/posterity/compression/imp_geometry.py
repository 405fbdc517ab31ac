r"""Iterative magnitude pruning with rewinding: cut, go back to an early state, train again, and see whether it is still the same solution.

A round trains a network, removes a share of the weights that are left, those of smallest
magnitude, and sets the others back to what they were at an early step,

.. math:: m_{k+1} = m_k \cdot [\,|w_k| > t_k\,], \qquad w_{k+1}(\tau) = m_{k+1} \cdot w(\tau).  \qquad (1)

What a mask carries to that early step is where the next network ends: while the sparse
networks are still as good as the dense one, those of successive rounds are joined by a line without
an error barrier,

.. math:: \max_\alpha\; E((1 - \alpha) a + \alpha b) - (1 - \alpha) E(a) - \alpha E(b);  \qquad (2)

once there is a barrier between two of them, the sparser one has lost the solution. How much a round
may cut is told by the curvature at its end: `posterity.compression.prunable_fraction`.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from posterity._checks import integer, one_of, within
from posterity._precision import wide
from posterity._random import seeded
from posterity.compression._layers import weighted_layers
from posterity.compression.error_barriers import State, copies, require_finite, tensor_mask

__all__ = ["Level", "iterative_pruning", "magnitude_mask"]


class Level(NamedTuple):
    """What one round of `iterative_pruning` leaves; all tensors are copies on the CPU.

    Attributes
    ----------
    mask : dict of str to Tensor
        Which weights there are: bool, by the name of the parameter.
    start, state : dict of str to Tensor
        The state at the rewind step, masked, and at the end of training, for ``load_state_dict``.
    density : float
        Share of the prunable weights that is left.
    """

    mask: dict[str, Tensor]
    start: dict[str, Tensor]
    state: dict[str, Tensor]
    density: float


def magnitude_mask(
    model: nn.Module,
    fraction: float,
    mask: State | None = None,
    *,
    scope: Literal["global", "layer"] = "global",
    layers: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return a mask without the smallest of the weights that are left.

    Parameters
    ----------
    model : nn.Module
        Of any architecture; the weights of its Linear and Conv layers are pruned, biases and norms never.
    fraction : float
        Share of the weights left that is removed, in (0, 1); their number is rounded up.
    mask : mapping of str to Tensor, optional
        Weights left so far: bool, or 0 and 1, by the name of the parameter. What it does not name is whole.
    scope : {"global", "layer"}, default="global"
        Whether magnitudes are compared across layers, or each layer loses its share.
    layers : sequence of str, optional
        Layers to prune, as ``model.named_modules()`` names them. By default all.

    Returns
    -------
    dict of str to Tensor
        Bool, of the shapes of the weights, on the CPU, by names of ``model.named_parameters()``:
        the pruned layers, and what else ``mask`` names. Equal magnitudes go in order of position.

    Raises
    ------
    ValueError
        If ``fraction`` is out of range, the model has no such layer, ``mask`` does not fit it, a weight
        is not finite, or none is left.

    Notes
    -----
    1. Code that compares magnitudes with a threshold by ``>`` removes one more, and all that equal it.

    References
    ----------
    .. [1] Paul et al. Unmasking the Lottery Ticket Hypothesis. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import magnitude_mask
    >>> net = torch.nn.Linear(4, 1)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.1, -3.0, 0.2, 1.0]]))
    >>> magnitude_mask(net, 0.5)
    {'weight': tensor([[False,  True, False,  True]])}
    """
    within("fraction", fraction, 0, 1, open_low=True, open_high=True)
    one_of("scope", scope, ("global", "layer"))
    every = prunable(model)
    weights = prunable(model, layers)
    kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()} | tensor_mask(
        every, mask
    )
    if not any(bool(kept[name].any()) for name in weights):
        raise ValueError("mask must leave a weight to prune, it leaves none")
    return {name: kept[name] for name in every if name in kept} | _cut(weights, kept, fraction, scope)


def iterative_pruning(
    model: nn.Module,
    train: Callable[[nn.Module, int, Callable[[int], None]], object],
    *,
    rounds: int,
    fraction: float = 0.2,
    rewind_step: int = 0,
    scope: Literal["global", "layer"] = "global",
    layers: Sequence[str] | None = None,
    restart: Literal["rewind", "reinitialise", "continue"] = "rewind",
    generator: torch.Generator | None = None,
) -> list[Level]:
    """Train, prune, rewind and train again, for some rounds.

    Parameters
    ----------
    model : nn.Module
        At its initial weights; copies of it are trained.
    train : callable
        ``train(model, start_step, after_step)`` trains ``model`` in place from ``start_step`` to the end of
        its schedule, with an optimiser of its own, and calls ``after_step(number of steps done so far)``
        after every step: ``start_step + 1``, ``start_step + 2``, and so on. There the removed weights are set
        back to 0, which momentum and weight decay would move.
    rounds : int
        How often to prune, at least 0.
    fraction : float, default=0.2
        Share of the weights left that a round removes, in (0, 1).
    rewind_step : int, default=0
        Step of the dense run to which weights and buffers go back, at least 0, the initial state. A few
        hundredths of the run are needed by networks that are not small.
    scope, layers
        As for `magnitude_mask`.
    restart : {"rewind", "reinitialise", "continue"}, default="rewind"
        What the weights left go back to: the rewind state; new ones, which each module with
        ``reset_parameters`` draws, a control; or where they are, as fine-tuning does.
    generator : torch.Generator, optional
        Of new weights.

    Returns
    -------
    list of Level
        ``rounds + 1``, the dense network first. Load ``level.state`` into the model to use one.

    Raises
    ------
    ValueError
        Before any training: if a number is out of range, or a round finds no weight to prune (it says
        which). Later: if ``train`` does not call ``after_step`` as above or ends before ``rewind_step``, or a
        level ends with weights that are not finite.

    Notes
    -----
    1. Modules whose parameters are their own and that have no ``reset_parameters`` keep them under
       "reinitialise".
    2. A pruned network is as large and as fast as the dense one until its zeros are packed: they compress
       to little on disk, dense products do not leave them out.

    References
    ----------
    .. [1] Paul et al. Unmasking the Lottery Ticket Hypothesis. ICLR 2023. Section 2, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import iterative_pruning
    >>> x, y = torch.randn(64, 6), torch.randint(3, (64,))
    >>> def train(model, start_step, after_step):
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ...     for step in range(start_step, 20):
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    ...         after_step(step + 1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    >>> levels = iterative_pruning(net, train, rounds=2, fraction=0.5, rewind_step=2)
    >>> [round(level.density, 2) for level in levels]
    [1.0, 0.5, 0.24]
    >>> _ = net.load_state_dict(levels[2].state)
    >>> int((net[0].weight == 0).sum() + (net[2].weight == 0).sum())  # of 90
    68
    """
    integer("rounds", rounds, 0)
    within("fraction", fraction, 0, 1, open_low=True, open_high=True)
    integer("rewind_step", rewind_step, 0)
    one_of("scope", scope, ("global", "layer"))
    one_of("restart", restart, ("rewind", "reinitialise", "continue"))
    weights = prunable(model, layers)
    _enough(weights, rounds, fraction, scope)
    require_finite("model must have finite weights", snapshot(model))
    mask = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    levels: list[Level] = []
    with torch.inference_mode(False), torch.enable_grad():
        for number in range(rounds + 1):
            net = copy.deepcopy(model)
            if number:
                net.load_state_dict(levels[-1].state)
                named = dict(net.named_parameters())
                mask = _cut({name: named[name] for name in mask}, mask, fraction, scope)
            if number and restart == "rewind":
                net.load_state_dict(levels[0].start)
            elif number and restart == "reinitialise":
                net = copy.deepcopy(model)
                _reinitialise(net, generator)
            levels.append(_train(net, train, mask, number, rewind_step))
    return levels


def prunable(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the weights of Linear and Conv layers, by the names of ``named_parameters()``, each once."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    own: list[Any] = [layer.weight for layer in weighted_layers(model, layers).values()]
    wanted = {id(weight) for weight in own}
    weights = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"model must have real weights, {name!r} has dtype {weight.dtype}")
        if not weight.numel():
            raise ValueError(f"model must have weights, {name!r} has shape {tuple(weight.shape)}")
    return weights


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model, copied to the CPU; what is tied in it is one tensor."""
    return copies(model.state_dict(), "model")


def _count(left: int, fraction: float) -> int:
    """Return the share of a number, rounded up: of the decimal that was written, not of its binary neighbour."""
    return math.ceil(Fraction(repr(float(fraction))) * left)


def _enough(weights: Mapping[str, Tensor], rounds: int, fraction: float, scope: str) -> None:
    """Refuse rounds that find nothing to prune; how many weights are left depends on no training."""
    sizes = [w.numel() for w in weights.values()]
    left = sizes if scope == "layer" else [sum(sizes)]
    for number in range(1, rounds + 1):
        if not any(left):
            raise ValueError(
                f"rounds must leave a weight to prune, got {rounds}: round {number} finds none, "
                f"the density after round {number - 1} is 0"
            )
        left = [n - _count(n, fraction) for n in left]


def _cut(weights: Mapping[str, Tensor], mask: State, fraction: float, scope: str) -> dict[str, Tensor]:
    """Return the masks of these weights without the smallest that are left, in each group on its own."""
    groups = [[name] for name in weights] if scope == "layer" else [list(weights)]
    cut = {}
    for names in groups:
        kept = torch.cat([mask[name].flatten() for name in names])
        sizes = torch.cat([wide(weights[name].detach()).abs().flatten().cpu() for name in names])
        if not bool(sizes.isfinite().all()):
            require_finite("model must have finite weights", {name: weights[name] for name in names})
        sizes = sizes[kept]
        n = _count(len(sizes), fraction)
        if n:
            edge = sizes.kthvalue(n).values
            remain = sizes > edge
            equal = (sizes == edge).nonzero()[:, 0]
            remain[equal[n - int((sizes < edge).sum()) :]] = True  # equals go in order of position
            kept = kept.masked_scatter(kept, remain)
        parts = kept.split([mask[name].numel() for name in names])
        cut.update({name: part.view_as(mask[name]).clone() for name, part in zip(names, parts, strict=True)})
    return cut


class _Upkeep:
    """Sets the weights that a mask removed back to 0, in one multiplication."""

    def __init__(self, net: nn.Module, mask: State) -> None:
        self.net, self.mask = net, mask
        self.pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, *, signs: bool = False) -> None:
        """Multiply by the mask, which may leave -0.0; with ``signs`` make it 0.0."""
        if not self.mask:
            return
        if self.pairs is None or self.pairs[0][0].device != self.pairs[1][0].device:  # training moved them
            named = dict(self.net.named_parameters())
            weights: list[Tensor] = [named[name] for name in self.mask]
            self.pairs = weights, [self.mask[n].to(w) for n, w in zip(self.mask, weights, strict=True)]
        torch._foreach_mul_(*self.pairs)  # pyright: ignore[reportPrivateImportUsage]
        if signs:
            torch._foreach_add_(self.pairs[0], 0.0)  # pyright: ignore[reportPrivateImportUsage]


def _train(
    net: nn.Module, train: Callable[..., object], mask: dict[str, Tensor], number: int, rewind_step: int
) -> Level:
    """Train a network under a mask: the dense one from the beginning, others from the rewind step."""
    upkeep = _Upkeep(net, mask if number else {})
    upkeep(signs=True)
    first = done = rewind_step if number else 0
    start = snapshot(net) if done == rewind_step else None
    where = f"at level {number}"

    def after_step(step: int) -> None:
        nonlocal start, done
        if integer("the number that train gives to after_step", step) != done + 1:
            raise ValueError(
                f"train must call after_step with the number of steps done, {done + 1} {where}, got {step}"
            )
        done = int(step)
        upkeep()
        if done == rewind_step:
            start = snapshot(net)

    train(net, first, after_step)
    if done == first:
        raise ValueError(f"train must call after_step after every optimiser step, it never did {where}")
    if start is None:
        raise ValueError(
            f"rewind_step must be reached by train, got {rewind_step}: it ended after step {done}, "
            "and no snapshot was taken"
        )
    upkeep(signs=True)
    state = snapshot(net)
    require_finite(f"train must leave finite weights {where}", state)
    left = sum(int(kept.sum()) for kept in mask.values())
    return Level(mask, start, state, left / sum(kept.numel() for kept in mask.values()))


@torch.no_grad()
def _reinitialise(net: nn.Module, generator: torch.Generator | None) -> None:
    """Let each module draw its parameters anew; modules draw from torch's global generator, which is lent."""
    lent = nullcontext()
    if generator is not None:
        draw = torch.randint(2**62, (), generator=generator, device=generator.device)
        lent = seeded(int(draw), next(net.parameters()).device)
    with lent:
        for module in reversed(list(net.modules())):  # parts before what holds them, which may know better
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if callable(reset):
                reset()
