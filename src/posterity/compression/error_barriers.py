r"""The line between two states of a network: whether the error rises on it, and random steps beside it.

Two networks are one solution, linearly connected, when no point between them is worse than they are,

.. math:: \max_\alpha\; E((1 - \alpha) a + \alpha b) - (1 - \alpha) E(a) - \alpha E(b) = 0.  \qquad (1)
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from posterity._checks import at_least, integer
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["Barrier", "error_barrier", "perturb_state"]

State = Mapping[str, Tensor]


class Barrier(NamedTuple):
    """Errors on a line between two states.

    Attributes
    ----------
    height : float
        Equation (1) on the grid, at least 0.
    at : float
        The alpha where it is reached.
    errors, alphas : ndarray of shape (n_points,)
        The error at each point, and where it lies: 0 is the first state, 1 the second.
    """

    height: float
    at: float
    errors: ndarray
    alphas: ndarray


def error_barrier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    error: Callable[[nn.Module], float],
    *,
    n_points: int = 11,
    recalibrate: Callable[[nn.Module], object] | None = None,
) -> Barrier:
    """Return the error on the straight line between two states, and how far it rises above its ends.

    Parameters
    ----------
    model : nn.Module
        Says what the states are of; a copy of it is evaluated.
    state_a, state_b : mapping of str to Tensor
        As ``model.state_dict()`` gives them. Weights and floating-point buffers are interpolated, other
        entries are those of the nearer end.
    error : callable
        ``error(model) -> float``, of a copy in eval mode; lower is better.
    n_points : int, default=11
        Points on the line, both ends among them, at least 2.
    recalibrate : callable, optional
        ``recalibrate(model)`` calls the model on training data, before each evaluation. BatchNorm then takes its
        statistics as averages over these calls; without, those in between fit no network, and a barrier
        may be of their making.

    Returns
    -------
    Barrier
        Its height, where it is, and the errors.

    Raises
    ------
    ValueError
        If ``n_points`` is less than 2, states do not fit the model or are not finite, or ``error`` does not
        return a finite number.

    Notes
    -----
    1. Height is counted from the line between the errors of the ends. Papers that subtract their mean or
       maximum differ where the ends do: ``errors`` has what they need.

    References
    ----------
    .. [1] Paul et al. Unmasking the Lottery Ticket Hypothesis. ICLR 2023. Section 2.
    .. [2] Frankle et al. Linear Mode Connectivity and the Lottery Ticket Hypothesis. ICML 2020. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import error_barrier
    >>> net = torch.nn.Linear(1, 1, bias=False)  # two solutions of w^2 = 1, and 0 between them
    >>> ends = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[1.0]])}
    >>> found = error_barrier(net, *ends, lambda net: (net.weight.item() ** 2 - 1) ** 2, n_points=5)
    >>> found.height, found.at
    (1.0, 0.5)
    """
    integer("n_points", n_points, 2)
    now = model.state_dict()
    for name, state in (("state_a", state_a), ("state_b", state_b)):
        _fits(name, state, now)
    net = copy.deepcopy(model)
    alphas = np.linspace(0, 1, n_points)
    errors = np.empty(n_points)
    for k, alpha in enumerate(alphas):
        net.load_state_dict({key: _between(a, state_b[key], float(alpha)) for key, a in state_a.items()})
        net.eval()
        if recalibrate is not None:
            _recalibrate(net, recalibrate)
        errors[k] = _checked(error(net), float(alpha))
    rise = errors - ((1 - alphas) * errors[0] + alphas * errors[-1])
    rise[[0, -1]] = 0
    top = int(rise.argmax())
    return Barrier(float(rise[top]), float(alphas[top]), errors, alphas)


def perturb_state(
    state: State, scale: float, *, mask: State | None = None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return a state moved in a random direction, by a share of the norm of its weights.

    Training that returns to the same solution from there says how wide the basin around a rewind state is.

    Parameters
    ----------
    state : mapping of str to Tensor
        As ``model.state_dict()`` gives it.
    scale : float
        Length of the step over the norm of the weights, at least 0.
    mask : mapping of str to Tensor, optional
        Which weights move, by name, as in `Level`. By default all floating-point tensors of two axes or
        more; biases, norms and their statistics stay.
    generator : torch.Generator, optional
        Of the direction.

    Returns
    -------
    dict of str to Tensor
        Copies on the CPU.

    Raises
    ------
    ValueError
        If ``scale`` is out of range, ``mask`` does not fit the state, or weights are not finite.

    References
    ----------
    .. [1] Paul et al. Unmasking the Lottery Ticket Hypothesis. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import perturb_state
    >>> state = {"weight": torch.full((2, 2), 3.0), "bias": torch.ones(2)}
    >>> moved = perturb_state(state, 0.5, generator=torch.Generator().manual_seed(0))
    >>> (moved["weight"] - 3).norm(), moved["bias"]  # half of 6
    (tensor(3.), tensor([1., 1.]))
    """
    at_least("scale", scale, 0)
    moved: dict[str, Any] = copies(state, "state")
    weights = {name: w for name, w in moved.items() if isinstance(w, Tensor) and w.is_floating_point()}
    if mask is None:
        kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items() if w.ndim > 1}
    else:
        kept = tensor_mask(weights, mask)
    kept = {
        name: kept[name] for name in {id(weights[name]): name for name in kept}.values()
    }  # tied ones once
    require_finite("state must have finite weights", {name: weights[name] for name in kept})
    noise = {
        name: torch.randn(
            part.shape, generator=generator, device=draw_device(generator), dtype=torch.float64
        ).cpu()
        * part
        for name, part in kept.items()
    }
    length = (
        scale * _norm(weights[name] * part for name, part in kept.items()) / (_norm(noise.values()) or 1.0)
    )
    new = {id(weights[name]): weights[name].double().add(step, alpha=length).to(weights[name].dtype)
           for name, step in noise.items()}  # fmt: skip
    return {name: new.get(id(w), w) for name, w in moved.items()}  # pyright: ignore[reportReturnType]


def tensor_mask(weights: Mapping[str, Tensor], mask: Any) -> dict[str, Tensor]:
    """Return a user's mask as bool on the CPU, after seeing that it fits these weights."""
    if mask is None:
        return {}
    if not isinstance(mask, Mapping):
        raise ValueError(f"mask must map names of parameters to tensors, got {type(mask).__name__}")
    kept = {}
    for name, part in mask.items():
        if name not in weights:
            known = ", ".join(map(repr, weights))
            raise ValueError(f"mask must name prunable parameters, got {name!r}: they are {known}")
        shape = tuple(weights[name].shape)
        if not isinstance(part, Tensor) or tuple(part.shape) != shape:
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"mask must have a tensor of shape {shape} for {name!r}, got {got}")
        if not bool(((part == 0) | (part == 1)).all()):
            raise ValueError(f"mask must hold bools, or 0 and 1, that of {name!r} has other numbers")
        kept[name] = part.detach().to("cpu", torch.bool, copy=True)
    return kept


def copies(state: Any, what: str) -> dict[str, Any]:
    """Return a state copied to the CPU; what is tied in it is one tensor."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} must be a state_dict, got {type(state).__name__}")
    seen: dict[Any, Any] = {}
    out = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            place = (value.device, value.data_ptr() or id(value), value.shape, value.stride(), value.dtype)
            if place not in seen:
                seen[place] = value.detach().to("cpu", copy=True)
            out[name] = seen[place]
        else:
            out[name] = copy.deepcopy(value)
    return out


def _between(a: Any, b: Any, alpha: float) -> Any:
    if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
        return a if alpha < 0.5 else b
    return torch.lerp(wide(a.detach()), wide(b.detach().to(a)), alpha).to(a.dtype)  # ends come out exactly


@torch.no_grad()
def _recalibrate(net: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Have BatchNorm layers take averages over the calls of a model that is otherwise in eval mode."""
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    run(net)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()


def _checked(value: Any, alpha: float) -> float:
    try:
        plain = value.detach() if isinstance(value, Tensor) else value
        number = float("nan") if isinstance(plain, str | bytes) else float(plain)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not math.isfinite(number):
        raise ValueError(f"error must return a finite number, got {value!r} at alpha {alpha:g}")
    return number


def _fits(name: str, state: Any, now: State) -> None:
    """Refuse a state that is not of the model, or not finite."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} must be a state_dict, got {type(state).__name__}")
    if state.keys() != now.keys():
        missing, more = sorted(now.keys() - state.keys()), sorted(map(str, state.keys() - now.keys()))
        raise ValueError(
            f"{name} must have the keys of model.state_dict(), lacks {missing}, has {more} besides"
        )
    for key, value in now.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(state[key], Tensor) or state[key].shape != value.shape:
            got = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
            raise ValueError(f"{name} must have shape {tuple(value.shape)} for {key!r}, got {got}")
    require_finite(f"{name} must be finite", state)


def require_finite(rule: str, state: Mapping[str, Any]) -> None:
    """Refuse a state with NaN or infinity, after the words of the rule."""
    for name, value in state.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(f"{rule}, {name!r} has NaN or infinity")


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))
