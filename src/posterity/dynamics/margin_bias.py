r"""Margin bias: long training keeps only the fastest-scaling parameters of a network small, and frees the others.

A network with biases, skip connections or normalisation is no homogeneous function of its parameters, but often
a quasi-homogeneous one: with a rate :math:`\lambda_i \ge 0` for each of them,

.. math:: f(x;\, \psi_\alpha(\theta)) = e^{\alpha} f(x; \theta), \qquad \psi_\alpha(\theta)_i = e^{\alpha \lambda_i} \theta_i,

for every :math:`\alpha` and x; or, differentiated, :math:`\sum_i \lambda_i \theta_i\, \partial f / \partial \theta_i = f`.
Once cross-entropy's gradient flow separates the data, its parameters, scaled back along :math:`\psi`, tend to a
first-order optimum of

.. math:: \min \tfrac12 \sum_{i:\, \lambda_i = \lambda_{\max}} \theta_i^2 \quad\text{subject to}\quad y_i f(x_i; \theta) \ge 1,

in which parameters below the largest rate cost nothing. What they can do alone is then done by them, the
others vanish beside them, and the margin in input space may go with these: a cost in robustness.
`posterity.dynamics.margin_flow` follows the flow, `posterity.dynamics.seminorm_max_margin` solves the problem for a
linear model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor, nn

from posterity._checks import class_indices, has_shape
from posterity._models import call, evaluating, state
from posterity._precision import wide

__all__ = [
    "lambda_seminorm",
    "layer_rates",
    "normalized_margin",
    "quasi_homogeneity_error",
    "scale_by_rates_",
]

Rates = Mapping[str, float] | Mapping[str, Tensor]
TOP = 1e-9  # rates as near to the largest as this count as the largest
LARGEST = 700.0  # e^710 is no number

WEIGHTED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMALIZING = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PASSING = (  # f(c x) = c f(x) for c > 0
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


def layer_rates(model: nn.Sequential) -> dict[str, float]:
    """Return a rate for each parameter of a plain stack of layers.

    With M weighted layers, counted from the input or from the last normalisation, each weight has the rate
    1/M and the bias of the j-th layer j/M: the output bias has 1, and is what is kept small in the end.

    Parameters
    ----------
    model : nn.Sequential
        Of ``Linear``, ``Conv``, ``ReLU``, ``LeakyReLU``, ``Identity``, ``Flatten``, pooling, ``Dropout``,
        ``LayerNorm`` and ``BatchNorm`` layers, and of such stacks.

    Returns
    -------
    dict of str to float
        By the names of ``model.named_parameters()``. The gain and shift of the last normalisation are its first
        weighted layer; all parameters in front of it have 0, and so have those that are frozen.

    Raises
    ------
    ValueError
        If ``model`` is no such stack, has another layer, no trainable weight behind its last normalisation, a
        frozen bias where the output grows, or a layer in two places that ask for two rates.

    Notes
    -----
    1. Rates are not unique: those of the weights may be shared out otherwise, and parameters in front of a
       normalisation, of which it keeps the direction only, may have any where its ``eps`` is 0. These fulfil the
       definition whatever ``eps`` is.
    2. Of other networks the rates come from you. Both branches of a sum must have one degree: with
       ``x + W2 relu(W1 x)`` behind a weighted layer, ``W1`` and ``W2`` have 0. Of a residual network whose
       head follows a normalisation the head's weight and bias have 1, all others 0.

    References
    ----------
    .. [1] Kunin et al. The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks. ICLR 2023.
       Section 3.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.dynamics import layer_rates
    >>> layer_rates(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
    {'0.weight': 0.5, '0.bias': 0.5, '2.weight': 0.5, '2.bias': 1.0}
    >>> layer_rates(nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 1)))
    {'0.weight': 0.0, '0.bias': 0.0, '1.weight': 0.5, '1.bias': 0.5, '2.weight': 0.5, '2.bias': 1.0}
    """
    layers = _layers("model", model)
    last = max((k for k, (_, layer) in enumerate(layers) if type(layer) in NORMALIZING), default=0)
    counted = [
        k >= last and _trainable(getattr(layer, "weight", None)) for k, (_, layer) in enumerate(layers)
    ]
    n = sum(counted)
    if not n:
        raise ValueError("model must have a trainable weight behind its last normalisation, got none")
    names = {id(p): name for name, p in model.named_parameters()}
    rates: dict[str, float] = {}
    degree = 0  # of what a layer puts out, in parts of n
    for (where, layer), grows in zip(layers, counted, strict=True):
        degree += grows
        for part, rate in (("weight", int(grows)), ("bias", degree)):
            parameter = getattr(layer, part, None)
            if not isinstance(parameter, nn.Parameter):
                continue
            if part == "bias" and rate and not parameter.requires_grad:
                raise ValueError(f"model must be free to scale its bias {where}.{part}, which is frozen")
            name = names[id(parameter)]
            if rates.setdefault(name, rate / n) != rate / n:
                raise ValueError(
                    f"model uses {name} in two places, that ask for the rates {rates[name]:g} and {rate / n:g}"
                )
    return rates


def _layers(where: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers of a stack in order, those of stacks inside among them."""
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise ValueError(
            f"{where} must be an nn.Sequential, got {type(model).__name__}: give rates of your own"
        )
    found = []
    for name, layer in model._modules.items():  # named_children leaves out one used twice
        assert layer is not None
        if isinstance(layer, nn.Sequential):
            found += _layers(f"{where}.{name}", layer)
        elif type(layer) in WEIGHTED + NORMALIZING + PASSING:  # a subclass may compute anything
            found.append((f"{where}.{name}", layer))
        else:
            raise ValueError(
                f"{where} must be made of linear, convolution, ReLU, pooling, dropout and normalisation layers, "
                f"got {type(layer).__name__} as {name!r}: give rates of your own"
            )
    return found


def _trainable(parameter: Any) -> bool:
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad


def quasi_homogeneity_error(
    model: nn.Module,
    x: Shaped[Tensor, " n *features"],
    rates: Rates,
    *,
    alphas: Sequence[float] = (-0.5, 0.5, 1.0),
) -> Float[Tensor, ""]:
    """Return how far a model is from the definition, 0 but for rounding where the rates are right.

    Parameters
    ----------
    model : nn.Module
        Looked at in eval mode, where averages of a ``BatchNorm`` are constants.
    x : Tensor of shape (n, ...)
        Inputs, taken in the dtype of the parameters.
    rates : mapping of str to float or Tensor
        By the names of ``model.named_parameters()``, at least 0; a Tensor has a rate for each element, as
        `posterity.dynamics.PowerDiagonal` needs them. Each trainable one needs a rate; frozen ones that are
        left out have 0.
    alphas : sequence of float, default=(-0.5, 0.5, 1.0)
        How far to scale, from -700 to 700.

    Returns
    -------
    Tensor
        A scalar: the largest over ``alphas`` of max |f(psi) - e^alpha f| / max |e^alpha f|.

    Raises
    ------
    ValueError
        If a name of ``rates`` is no parameter's, a trainable parameter has none, a rate is negative or all are 0, ``alphas`` is empty,
        ``x`` is, or ``model`` returns no tensor or nothing finite.

    References
    ----------
    .. [1] Kunin et al. ICLR 2023. Definition of Section 3.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.dynamics import layer_rates, quasi_homogeneity_error
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    >>> x = torch.eye(2, dtype=torch.float64)
    >>> bool(quasi_homogeneity_error(net, x, layer_rates(net)) < 1e-10)
    True
    >>> bool(quasi_homogeneity_error(net, x, {name: 0.5 for name, _ in net.named_parameters()}) < 1e-3)
    False
    """
    known = _checked(model, rates)
    if not len(alphas):
        raise ValueError("alphas must hold at least one number, got none")
    if bad := [alpha for alpha in alphas if not abs(alpha) <= LARGEST]:
        raise ValueError(f"alphas must be from -{LARGEST:g} to {LARGEST:g}, got {bad[0]}")
    usual = _outputs(model, x).cpu().double()
    worst = torch.zeros((), dtype=torch.float64)
    for alpha in alphas:
        expected = usual * math.exp(alpha)
        off = (_outputs(model, x, known, float(alpha)).cpu().double() - expected).abs().max()
        size = expected.abs().max()
        worst = torch.maximum(worst, off / size if size else torch.where(off > 0, torch.inf, 0.0).double())
    return worst


def scale_by_rates_(model: nn.Module, alpha: float, rates: Rates) -> nn.Module:
    """Scale parameters in place by exp(alpha rate), which multiplies the output by exp(alpha).

    Parameters
    ----------
    model : nn.Module
        Changed.
    alpha : float
        Logarithm of the factor, of either sign.
    rates : mapping of str to float or Tensor
        As `quasi_homogeneity_error` takes them.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If ``rates`` do not fit, or a parameter would not be finite in its dtype; the model is then as it was.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.dynamics import layer_rates, scale_by_rates_
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> before = net(torch.eye(2))
    >>> after = scale_by_rates_(net, 0.7, layer_rates(net))(torch.eye(2))
    >>> bool(torch.allclose(after, 2.01375 * before))  # e^0.7
    True
    """
    known = _checked(model, rates)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        scaled = {name: _scaled(parameters[name].detach(), alpha, rate) for name, rate in known.items()}
        for name, value in scaled.items():
            if not bool(value.to(parameters[name].dtype).isfinite().all()):
                raise ValueError(f"alpha must leave parameters finite, {name} is not for {alpha}")
        for name, value in scaled.items():
            parameters[name].copy_(value)
    return model


def lambda_seminorm(model: nn.Module, rates: Rates, *, top_only: bool = False) -> Float[Tensor, ""]:
    """Return the seminorm of a model's parameters, sqrt(sum_i rate_i theta_i^2).

    Parameters
    ----------
    model : nn.Module
        A parameter that is shared counts once.
    rates : mapping of str to float or Tensor
        As `quasi_homogeneity_error` takes them.
    top_only : bool, default=False
        Whether only parameters of the largest rate count, which is what training keeps small.

    Returns
    -------
    Tensor
        A scalar in float64.

    Raises
    ------
    ValueError
        If ``rates`` do not fit ``model``.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.dynamics import lambda_seminorm
    >>> net = nn.Linear(2, 1)
    >>> _ = nn.init.constant_(net.weight, 2.0), nn.init.constant_(net.bias, 3.0)
    >>> lambda_seminorm(net, {"weight": 0.5, "bias": 1.0})  # (4 + 4) / 2 + 9
    tensor(3.6056, dtype=torch.float64)
    >>> round(float(lambda_seminorm(net, {"weight": 0.5, "bias": 1.0}, top_only=True)), 4)
    3.0
    """
    logs, _ = _log_squares(model, _checked(model, rates), top_only)
    return torch.tensor(math.exp(np.logaddexp.reduce(logs) / 2) if len(logs) else 0.0, dtype=torch.float64)


def normalized_margin(
    model: nn.Module,
    x: Shaped[Tensor, " n *features"],
    y: Shaped[Tensor, " n"],
    rates: Rates,
    *,
    top_only: bool = False,
) -> Float[Tensor, ""]:
    """Return the least margin that a quasi-homogeneous model has once its parameters are scaled to unit seminorm.

    It is e^-alpha min_i y_i f(x_i) for the alpha at which psi_-alpha(theta) has the seminorm 1. Scaling by the
    rates does not change it. Of a homogeneous model gradient flow on separated data does not let its smoothed form
    fall, which has -log L in place of the least margin.

    Parameters
    ----------
    model : nn.Module
        Returns (n,) or (n, 1), one score a sample, or (n, classes); looked at in eval mode.
    x : Tensor of shape (n, ...)
        Inputs, taken in the dtype of the parameters.
    y : Tensor of shape (n,)
        -1 and 1 for a single score; else class indices, and the margin is the true class's score less the best other.
    rates : mapping of str to float or Tensor
        As `quasi_homogeneity_error` takes them, which says whether they are right.
    top_only : bool, default=False
        Whether only parameters of the largest rate count in the seminorm.

    Returns
    -------
    Tensor
        A scalar in float64, negative where a sample is on the wrong side.

    Raises
    ------
    ValueError
        If arguments do not fit, all parameters that count are 0, or outputs are not finite.

    References
    ----------
    .. [1] Kunin et al. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.dynamics import normalized_margin
    >>> net = nn.Linear(2, 1, bias=False)
    >>> net.weight.data = torch.tensor([[3.0, 4.0]])
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([1, -1])
    >>> normalized_margin(net, x, y, {"weight": 1.0})  # 3 / 5
    tensor(0.6000, dtype=torch.float64)
    """
    known = _checked(model, rates)
    logs, steps = _log_squares(model, known, top_only)
    if not len(logs):
        raise ValueError("model must have a parameter of a positive rate that is not 0, all are")
    has_shape("y", y, x.shape[:1], "x")
    least = _margins(_outputs(model, x), y).min().cpu().double()
    # the root is no lower than that of any rate's part alone, and no higher than if all were as large
    low = float(np.max(logs / (2 * steps))) - 1e-9
    high = float(np.max((logs + math.log(len(logs))) / (2 * steps))) + 1e-9
    alpha: Any = brentq(lambda a: logsumexp(logs - 2 * a * steps), low, high, xtol=1e-13, rtol=1e-15)
    return least * math.exp(-alpha)


def _checked(model: nn.Module, rates: Rates) -> dict[str, Tensor]:
    """Return rates in float64 on the CPU: one for a parameter, or one for each of its elements."""
    parameters = dict(model.named_parameters())
    if not isinstance(rates, Mapping):
        raise ValueError(f"rates must be a mapping of names to numbers, got {type(rates).__name__}")
    known = {}
    for name, rate in rates.items():
        if name not in parameters:
            raise ValueError(f"rates must be of parameters of model, it has none called {name!r}")
        try:
            known[name] = value = torch.as_tensor(rate, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"rates must be numbers, got {rate!r} for {name}") from None
        if value.ndim and value.shape != parameters[name].shape:
            raise ValueError(
                f"rates must be numbers or have the shapes of the parameters, got {tuple(value.shape)} for "
                f"{name}, which is {tuple(parameters[name].shape)}"
            )
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"rates must be finite and at least 0, got {rate} for {name}")
    if not any(bool((value > 0).any()) for value in known.values()):
        raise ValueError("rates must hold one greater than 0, got none")
    if missing := [name for name, p in parameters.items() if p.requires_grad and name not in rates]:
        raise ValueError(
            f"rates must have one for each trainable parameter, 0 if need be, got none for {missing[0]}"
        )
    return known


def _scaled(value: Tensor, alpha: float, rate: Tensor) -> Tensor:
    value = wide(value)
    return value * torch.exp(alpha * rate).to(value)


def _outputs(
    model: nn.Module, x: Tensor, rates: Mapping[str, Tensor] | None = None, alpha: float = 0.0
) -> Tensor:
    """Return what a model returns in eval mode, in float32 at least, with parameters scaled along rates."""
    if not isinstance(x, Tensor) or not x.ndim or not len(x):
        raise ValueError(f"x must be a tensor of at least one row, got {getattr(x, 'shape', x)}")
    params, rest = state(model)
    tensors = {name: wide(value) for name, value in {**params, **rest}.items()}
    for name, rate in (rates or {}).items():
        tensors[name] = _scaled(tensors[name], alpha, rate)
    kinds = [p.dtype for p in tensors.values() if p.is_floating_point()]
    x = x.detach().to(kinds[0]) if kinds and x.is_floating_point() else x
    with evaluating(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        outputs = call(model, tensors, x)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(f"model must return a floating-point tensor, got {type(outputs).__name__}")
    if not bool(outputs.isfinite().all()):
        raise ValueError("model must return finite outputs for x, got NaN or infinity")
    return outputs


def _margins(outputs: Tensor, y: Tensor) -> Tensor:
    """Return margins (n, others): y f of a single score, else the true class's score less each other's."""
    n = len(y)
    if outputs.shape in ((n,), (n, 1)):
        if y.dtype == torch.bool or y.is_complex() or not bool((y.abs() == 1).all()):
            raise ValueError("y must hold -1 and 1 for a model of a single score, got others")
        return outputs.reshape(n, 1) * y.to(outputs)[:, None]
    classes = has_shape("model must return one row of scores a sample: its output", outputs, (n, None)).shape[
        1
    ]
    y = class_indices("y", y, n, classes).to(outputs.device).long()[:, None]
    own = torch.zeros_like(outputs, dtype=torch.bool).scatter(1, y, True)
    return (outputs.gather(1, y) - outputs).masked_fill(own, torch.inf)


def _log_squares(
    model: nn.Module, rates: Mapping[str, Tensor], top_only: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each rate that has parameters other than 0 the log of its part of the squared seminorm, and the rate."""
    parts: dict[float, list[float]] = {}
    top = max(float(rate.max()) for rate in rates.values() if rate.numel())
    for name, parameter in model.named_parameters():
        if name not in rates:
            continue
        value, rate = parameter.detach().cpu().double(), rates[name]
        if not bool(value.isfinite().all()):
            raise ValueError(f"model must have finite parameters, {name} is not")
        for each in rate.unique().tolist():
            members = value[rate == each] if rate.ndim else value.flatten()
            size = float(members.abs().max()) if members.numel() else 0.0
            if size and each and (not top_only or each >= (1 - TOP) * top):
                square = float((members / size).square().sum())
                parts.setdefault(each, []).append(math.log(each) + 2 * math.log(size) + math.log(square))
    steps = np.array(sorted(parts))
    return np.array([logsumexp(parts[each]) for each in steps]), steps
