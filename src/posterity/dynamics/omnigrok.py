r"""Omnigrok: a network generalises late because its weights are too large, and at once at the right norm.

Let L(w) be the least loss among weights of norm w. The training loss looks like an L over w: it falls,
and beyond some norm is 0. The test loss looks like a U, least at w_c. A network that starts at w_0 > w_c
finds a zero of the training loss nearby and memorises; it generalises when weight decay has brought its
norm down to w_c,

.. math:: \lVert\theta(t)\rVert = w_0\, (1 - \eta\lambda)^t, \qquad t = \frac{\ln(w_c / w_0)}{\ln(1 - \eta\lambda)} \approx \frac{\ln(w_0 / w_c)}{\eta\lambda},

for a learning rate eta and a decay lambda: that wait is grokking. So a larger start induces it
(`scale_weights_`), and training at the norm w_c (`constrain_norm`) removes it; where w_c is,
`posterity.dynamics.reduced_landscape` finds by training at several norms.
"""

# pyright: reportPrivateImportUsage=false

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from posterity._checks import at_least, one_of, within
from posterity._precision import NARROW

__all__ = [
    "GrokkingDelay",
    "constrain_norm",
    "generalization_time",
    "grokking_delay",
    "scale_weights_",
    "weight_norm",
]

Number = float | Float[Tensor, ""]
Curve = Sequence[float] | Shaped[Tensor, " n"] | Shaped[np.ndarray, " n"]
SCALE_FREE = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def weight_norm(params: nn.Module | Iterable[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Return the norm of all weights and biases, as one vector.

    Parameters
    ----------
    params : nn.Module or iterable of Tensor
        A model, of which the trainable parameters count, a tied one once; or the tensors themselves, all
        of which count.

    Returns
    -------
    Tensor
        A scalar on the CPU, summed in float64, without a gradient.

    Raises
    ------
    ValueError
        If there is no tensor, or one is not of a real floating-point dtype.

    Warns
    -----
    UserWarning
        If the model has a normalisation layer, named in the message: it cancels the norm of the weights
        before it, which then says little.

    References
    ----------
    .. [1] Liu, Michaud, Tegmark. Omnigrok: Grokking Beyond Algorithmic Data. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import weight_norm
    >>> weight_norm([torch.tensor([3.0]), torch.tensor([[0.0], [4.0]])])
    tensor(5., dtype=torch.float64)
    """
    if isinstance(params, nn.Module):
        found = _trainable(params)
    elif isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise ValueError(f"params must be a model or tensors in a list, got {type(params).__name__}")
    else:
        found = _real("params", params)
    return _total_norm(found).cpu().double()


@torch.no_grad()
def scale_weights_(model: nn.Module, alpha: Number) -> nn.Module:
    """Multiply every trainable parameter, biases too, in place: by about 8 to induce grokking.

    Without biases and with ReLU the output of D layers is multiplied by alpha to the power of D. To start
    at a norm w, pass ``w / weight_norm(model)``.

    Parameters
    ----------
    model : nn.Module
        Changed in place; parameters with ``requires_grad=False`` are not.
    alpha : float
        Greater than 0.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    ValueError
        If ``alpha`` is not positive and finite, or the model has no trainable parameter.

    Warns
    -----
    UserWarning
        If the model has a normalisation layer, named in the message.

    References
    ----------
    .. [1] Liu, Michaud, Tegmark. Omnigrok. ICLR 2023. Sections 2 and 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import scale_weights_, weight_norm
    >>> net = torch.nn.Linear(4, 2)
    >>> before = weight_norm(net)
    >>> torch.testing.assert_close(weight_norm(scale_weights_(net, 8.0)), 8 * before)
    """
    factor = at_least("alpha", _as_float("alpha", alpha), 0.0, strict=True)
    torch._foreach_mul_(_trainable(model), factor)
    return model


def constrain_norm(optimizer: torch.optim.Optimizer, norm: Number | None = None) -> RemovableHandle:
    """Hold the norm of an optimiser's parameters: after each step all are multiplied by one factor.

    The step itself is the optimiser's own, with its moments untouched; set its weight decay to 0.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its trainable parameters, of all groups together, in float32 or float64. Those that are added or
        frozen later need a new call.
    norm : float, optional
        The norm after each step, greater than 0; by default that of now. What is now is not changed: see
        `scale_weights_`.

    Returns
    -------
    RemovableHandle
        ``handle.remove()`` ends it.

    Raises
    ------
    ValueError
        If ``norm`` is not positive and finite, or there are no trainable parameters, or they are all zero,
        not finite, complex, or in bfloat16 or float16, whose rounding is wider than a step's change of norm:
        keep float32 parameters under autocast. On a CPU also if a step leaves them all zero or not finite.

    References
    ----------
    .. [1] Liu, Michaud, Tegmark. Omnigrok. ICLR 2023. Sections 2 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import constrain_norm, scale_weights_, weight_norm
    >>> net = scale_weights_(torch.nn.Linear(4, 2), 0.8)
    >>> optimizer = torch.optim.Adam(net.parameters())
    >>> handle = constrain_norm(optimizer)
    >>> before = weight_norm(net)
    >>> net(torch.ones(3, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> torch.testing.assert_close(weight_norm(net), before)
    >>> handle.remove()
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    params = _real("optimizer", held)
    for p in params:
        if p.dtype in NARROW:
            raise ValueError(
                f"optimizer must have parameters in float32 or float64, got one in {str(p.dtype).removeprefix('torch.')}"
            )
    now = float(_total_norm(params))
    if not (0 < now < math.inf):
        raise ValueError(f"optimizer must have parameters that are finite and not all zero, got norm {now}")
    target = now if norm is None else at_least("norm", _as_float("norm", norm), 0.0, strict=True)

    @torch.no_grad()
    def rescale(*_: Any) -> None:
        total = _total_norm(params)
        if total.device.type == "cpu":
            if not (0 < float(total) < math.inf):
                raise ValueError(
                    f"optimizer must leave parameters finite and not all zero, got norm {float(total)}"
                )
            torch._foreach_mul_(params, target / float(total))
        else:  # without waiting for the number
            for p in params:
                p.mul_((target / total).to(p.device))

    return optimizer.register_step_post_hook(rescale)


@dataclass(frozen=True)
class GrokkingDelay:
    """How much later a network generalises than it fits.

    Attributes
    ----------
    t_train, t_test : float
        The first of the steps at which each curve reaches the threshold, infinity if none does.
    delay : float
        Their difference in steps, infinity if either is.
    ratio : float
        ``t_test / t_train``, 1 where both are 0, infinity if either is.
    """

    t_train: float
    t_test: float
    delay: float
    ratio: float


def grokking_delay(
    steps: Curve,
    train_metric: Curve,
    test_metric: Curve,
    *,
    threshold: float = 0.95,
    better: Literal["higher", "lower"] = "higher",
) -> GrokkingDelay:
    """Return when two curves first reach a threshold, and how far apart.

    Parameters
    ----------
    steps : sequence of float, or Tensor or array of shape (n,)
        When the metrics were taken: at least 0, strictly increasing.
    train_metric, test_metric : sequence of float, or Tensor or array of shape (n,)
        What was measured. NaN does not reach a threshold.
    threshold : float, default=0.95
        Reached by equality too.
    better : {"higher", "lower"}, default="higher"
        From which side it is reached: "higher" for accuracies, "lower" for losses.

    Returns
    -------
    GrokkingDelay
        Of steps as they are given: nothing is interpolated.

    Raises
    ------
    ValueError
        If curves are empty or differ in length, ``steps`` do not increase, ``threshold`` is not finite or
        ``better`` is unknown.

    References
    ----------
    .. [1] Liu, Michaud, Tegmark. Omnigrok. ICLR 2023. Section 1.

    Examples
    --------
    >>> from posterity.dynamics import grokking_delay
    >>> grokking_delay([0, 100, 200, 300], [0.1, 1.0, 1.0, 1.0], [0.1, 0.2, 0.4, 0.97])
    GrokkingDelay(t_train=100.0, t_test=300.0, delay=200.0, ratio=3.0)
    """
    one_of("better", better, ("higher", "lower"))
    within("threshold", threshold, -math.inf, math.inf, open_low=True, open_high=True)
    time, train, test = (
        _curve(name, values)
        for name, values in (("steps", steps), ("train_metric", train_metric), ("test_metric", test_metric))
    )
    time = time.double()
    for name, values in (("train_metric", train), ("test_metric", test)):
        if len(values) != len(time):
            raise ValueError(
                f"{name} must have one value for each of the {len(time)} steps, got {len(values)}"
            )
    if not (bool(time.isfinite().all()) and bool(time[0] >= 0) and bool((time.diff() > 0).all())):
        raise ValueError("steps must be finite, at least 0 and strictly increasing, they are not")
    first = []
    for values in (train, test):
        reached = values >= threshold if better == "higher" else values <= threshold
        first.append(float(time[int(reached.nonzero()[0])]) if bool(reached.any()) else math.inf)
    fit, end = first
    never = math.isinf(fit) or math.isinf(end)
    ratio = math.inf if never or (fit == 0 < end) else end / fit if fit else 1.0
    return GrokkingDelay(fit, end, math.inf if never else end - fit, ratio)


def generalization_time(
    norm0: Number, norm_c: Number, *, lr: float, weight_decay: float, decoupled: bool = True
) -> float:
    r"""Return after how many steps weight decay alone brings a norm down to another.

    .. math:: t = \ln(w_c / w_0) / \ln(1 - \eta\lambda)

    Once a network has fitted its training set gradients are small and decay alone moves the norm: with
    the norm at the fit and the norm where it would generalise, this is how long that takes.

    Parameters
    ----------
    norm0 : float
        The norm now, greater than 0.
    norm_c : float
        The norm at which the network generalises, greater than 0, as from
        `posterity.dynamics.ReducedLandscape.critical_norm`.
    lr : float
        Learning rate, greater than 0, as a constant.
    weight_decay : float
        At least 0; ``lr * weight_decay`` must be less than 1.
    decoupled : bool, default=True
        Whether the decay is apart from the gradient, as in AdamW. False is the L2 penalty of plain SGD, for
        which the law is the same. For that of Adam there is no such law: its second moment divides the
        decay too.

    Returns
    -------
    float
        Steps, not rounded: 0 if ``norm0 <= norm_c``, else infinity if ``weight_decay`` is 0.

    Raises
    ------
    ValueError
        If a norm or ``lr`` is not positive and finite, ``weight_decay`` is negative, or their product is
        1 or more.

    References
    ----------
    .. [1] Liu, Michaud, Tegmark. Omnigrok. ICLR 2023. Section 2.

    Examples
    --------
    >>> from posterity.dynamics import generalization_time
    >>> round(generalization_time(68.0, 34.0, lr=1e-3, weight_decay=0.1))
    6931
    """
    start = at_least("norm0", _as_float("norm0", norm0), 0.0, strict=True)
    end = at_least("norm_c", _as_float("norm_c", norm_c), 0.0, strict=True)
    at_least("lr", lr, 0.0, strict=True)
    at_least("weight_decay", weight_decay, 0.0)
    one_of("decoupled", decoupled, (True, False))
    if lr * weight_decay >= 1:
        raise ValueError(f"weight_decay must be less than 1 / lr, {1 / lr:g}, got {weight_decay}")
    if start <= end:
        return 0.0
    rate = -math.log1p(-lr * weight_decay)
    return (math.log(start) - math.log(end)) / rate if rate else math.inf


def _trainable(model: nn.Module) -> list[Tensor]:
    """Return the trainable parameters of a model, tied ones once, and warn where their norm says little."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    params = _real("model", (p for p in model.parameters() if p.requires_grad))
    free = next((name for name, module in model.named_modules() if isinstance(module, SCALE_FREE)), None)
    if free is not None:
        layer = type(model.get_submodule(free)).__name__
        warnings.warn(
            f"model has a normalisation layer, {layer} {free!r}: it cancels the norm of the weights before it, "
            "which says little",
            UserWarning,
            stacklevel=3,
        )
    return params


def _total_norm(params: Sequence[Tensor]) -> Tensor:
    """Return the norm of all entries of all tensors, in float64 where the device of the first has it."""
    kind = torch.float32 if params[0].device.type == "mps" else torch.float64
    norms = torch._foreach_norm([p.detach() for p in params], 2, dtype=kind)
    return torch.linalg.vector_norm(torch.stack([norm.to(params[0].device) for norm in norms]))


def _real(name: str, params: Iterable[Any]) -> list[Tensor]:
    """Return real floating-point tensors, each once, at least one."""
    found: dict[int, Tensor] = {}
    for p in params:
        if not isinstance(p, Tensor) or not p.is_floating_point():
            what = f"dtype {p.dtype}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"{name} must have real floating-point tensors as parameters, got {what}")
        found[id(p)] = p
    if not found:
        raise ValueError(
            f"{name} must have at least one {'tensor' if name == 'params' else 'trainable parameter'}, got none"
        )
    return list(found.values())


def _as_float(name: str, value: Any) -> Any:
    """Return a number, also that in a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name} must be one real number, got a tensor of shape {tuple(value.shape)}")
        return float(value)
    return value


def _curve(name: str, values: Any) -> Tensor:
    """Return numbers as a vector on the CPU: in their own dtype, by which thresholds are rounded too, or float64."""
    dtype = None if hasattr(values, "dtype") else torch.float64
    try:
        curve = torch.as_tensor(values, dtype=dtype).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}") from None
    if curve.ndim != 1 or not len(curve) or curve.is_complex():
        raise ValueError(
            f"{name} must be a sequence of at least one real number, got shape {tuple(curve.shape)} of {curve.dtype}"
        )
    return curve
