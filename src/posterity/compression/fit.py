"""How much each layer suffers from quantisation, by the Fisher information, and which bits to give it.

Quantising moves weights and activations a little. To second order the change of what a model says is the Fisher
form of that move; with rounding errors of mean zero, independent, of power p_l in layer l, what is left of it is

    FIT = sum_l Tr I(w_l) p_l + sum_s Tr I(a_s) p_s,      p = ((max - min) / (2^b - 1))^2,

over the weights w_l of the layers and the activations a_s that enter them. Traces are means over samples of squared
gradients, and cost a forward and a backward pass a batch (`sensitivity`); then any assignment of bits is scored
without running the model (`fit_score`), and the best for a budget is found exactly (`allocate_bits`). `quantize`
makes the network.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor, nn

from posterity._checks import at_least, floating, integer, one_of, scalar
from posterity._models import evaluating
from posterity.compression._layers import weighted_layers
from posterity.compression.gradient_norms import Calls, squared_norms

__all__ = ["BitConfig", "Sensitivity", "allocate_bits", "fit_score", "sensitivity"]

MOST_BITS = 16


@dataclass(frozen=True)
class Sensitivity:
    """Fisher traces and ranges by layer, in the order of ``model.named_modules()``.

    Attributes
    ----------
    weight_trace, activation_trace : dict of str to float
        Mean over samples of the squared gradient of a sample's loss: by the layer's weight, by what enters the layer.
        An input that depends on no parameter, as the first layer's, has none.
    weight_range, activation_range : dict of str to float
        Largest less smallest value; of activations the mean over batches.
    n_weights, n_activations : dict of str to int
        Elements of the weight; of what enters the layer for one sample.
    n_samples : int
    weight_error, activation_error : dict of str to float
        Relative standard error of each trace, from the batches; NaN after one batch.
    """

    weight_trace: dict[str, float]
    activation_trace: dict[str, float]
    weight_range: dict[str, float]
    activation_range: dict[str, float]
    n_weights: dict[str, int]
    n_activations: dict[str, int]
    n_samples: int
    weight_error: dict[str, float]
    activation_error: dict[str, float]


class BitConfig(NamedTuple):
    """Bits by layer, for weights and for activations; the score; bytes of the weights."""

    weight_bits: dict[str, int]
    activation_bits: dict[str, int]
    score: float
    weight_bytes: int


@torch.inference_mode(False)
def sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    layers: Sequence[str] | None = None,
    estimator: Literal["per-sample", "batch"] = "per-sample",
    max_batches: int | None = None,
    min_batches: int = 2,
    tol: float | None = None,
) -> Sensitivity:
    """Return the Fisher traces of a model's weights and activations, layer by layer.

    Parameters
    ----------
    model : nn.Module
        Looked at in eval mode; not changed. Samples must not depend on each other.
    batches : iterable of (x, y)
        Inputs, with the batch as their first axis, and targets.
    loss_fn : callable, default=cross_entropy
        ``loss_fn(model(x), y)``: a scalar, the mean over the samples.
    layers : sequence of str, optional
        Names of Linear and Conv layers; by default all. A weight that several share counts once.
    estimator : {"per-sample", "batch"}, default="per-sample"
        "per-sample" is the trace. "batch", for weights only, is the authors' cheaper figure, n times the squared
        gradient of the mean loss, its mean over batches: what it adds to the trace vanishes only where the mean
        gradient does.
    max_batches : int, optional
        Stop after so many.
    min_batches : int, default=2
        Batches before ``tol`` may stop.
    tol : float, optional
        Stop when every relative standard error is below this; the authors use a relative variance of 1e-3.

    Returns
    -------
    Sensitivity
        Layers in the order of ``model.named_modules()``.

    Raises
    ------
    ValueError
        If a layer is unknown or not Linear or Conv, there are no batches, or one only with ``tol``, inputs of a layer
        are integers, or a loss is not a finite scalar.

    Notes
    -----
    Layers that are called once or more, on samples along their first axis, cost a few products more than the backward
    pass. Others (a weight used without calling its layer, tied to an embedding, or on inputs of another layout) take
    a gradient for each sample, by ``torch.func.vmap`` where the model allows it, in a loop where not.

    References
    ----------
    .. [1] Zandonati, Pol, Pierini, Sirkin, Kopetz. FIT: A Metric for Model Sensitivity. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import allocate_bits, fit_score, sensitivity
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
    >>> found = sensitivity(net, zip(x.split(16), y.split(16)))
    >>> list(found.weight_trace), list(found.activation_trace)
    (['0', '2'], ['2'])
    >>> fit_score(found, 4) > fit_score(found, 8)
    True
    >>> allocate_bits(found, weight_budget=4, activation_budget=4).weight_bits
    {'0': 4, '2': 4}
    """
    one_of("estimator", estimator, ("per-sample", "batch"))
    min_batches = integer("min_batches", min_batches, 1)
    if max_batches is not None:
        max_batches = integer("max_batches", max_batches, 1)
    if tol is not None:
        at_least("tol", tol, 0, strict=True)
        if max_batches == 1:
            raise ValueError("max_batches must be at least 2 with tol, got 1: one batch tells no error")
    modules = weighted_layers(model, layers)
    weights, activations, spans = _Mean(), _Mean(), _Mean()
    sizes: dict[str, int] = {}
    n_samples = 0
    each = estimator == "per-sample"
    with evaluating(model), torch.enable_grad():
        for x, y in islice(batches, max_batches):
            x, y = (part.clone() if part.is_inference() else part for part in (x, y))
            n = len(x)
            if not n:
                raise ValueError("batches must have samples, got one without")
            with ExitStack() as stack:
                calls = stack.enter_context(Calls(model, modules))
                value = _scalar(loss_fn(calls.forward(x), y))
                calls.backward(value * n, weights=not each)
            # of the sum of losses: the gradients of single samples, side by side
            of_weights = squared_norms(calls, x, y, loss_fn, each=each)
            # the authors' figure grows with n: their mean is over batches, not samples
            weights.add({name: total / n for name, total in of_weights.items()}, n if each else 1)
            activations.add({name: total / n for name, total in calls.input_norms().items()}, n)
            spans.add(calls.input_ranges(), 1)
            sizes |= {name: size // n for name, size in calls.input_sizes().items()}
            n_samples += n
            if tol is not None and weights.count >= max(2, min_batches):
                errors = [*weights.errors().values(), *activations.errors().values()]
                if all(error < tol for error in errors):
                    break
    if not n_samples:
        raise ValueError("batches must hold at least one batch, got none")
    if tol is not None and weights.count < 2:
        raise ValueError("batches must be at least 2 with tol, got 1: one batch tells no error")
    held: dict[str, Tensor] = {name: module.weight.detach() for name, module in modules.items()}  # type: ignore[union-attr,misc]
    ranges = {name: float(weight.double().max() - weight.double().min()) for name, weight in held.items()}
    return Sensitivity(
        weights.means(), activations.means(), ranges, spans.means(),
        {name: weight.numel() for name, weight in held.items()}, sizes,
        n_samples, weights.errors(), activations.errors(),
    )  # fmt: skip


def fit_score(
    sensitivity: Sensitivity,
    weight_bits: int | Mapping[str, int],
    activation_bits: int | Mapping[str, int] | None = None,
) -> float:
    """Return FIT: the predicted harm of these bits, to rank assignments by; smaller is better.

    Parameters
    ----------
    sensitivity : Sensitivity
        Of `sensitivity`.
    weight_bits : int or mapping of str to int
        Bits in 1 .. 16, one number for all, or for each layer of ``sensitivity``.
    activation_bits : int or mapping, optional
        Likewise for the layers of ``sensitivity.activation_trace``; None leaves activations in floating point.

    Returns
    -------
    float
        The sum of traces times noise, at least 0.

    Raises
    ------
    ValueError
        If bits are not integers in 1 .. 16, a layer is missing or unknown, or there are no activations to score.
    """
    weights = _bits("weight_bits", weight_bits, sensitivity.weight_trace)
    score = sum(
        _noise(sensitivity.weight_range[name], b) * sensitivity.weight_trace[name]
        for name, b in weights.items()
    )
    if activation_bits is None:
        return score
    if not sensitivity.activation_trace:
        raise ValueError("activation_bits must be None for a sensitivity without activations, got bits")
    activations = _bits("activation_bits", activation_bits, sensitivity.activation_trace)
    return score + sum(
        _noise(sensitivity.activation_range[name], b) * sensitivity.activation_trace[name]
        for name, b in activations.items()
    )


def allocate_bits(
    sensitivity: Sensitivity,
    *,
    weight_budget: float,
    activation_budget: float | None = None,
    choices: Sequence[int] = (2, 3, 4, 6, 8),
) -> BitConfig:
    """Return the bits of least score within a budget: a multiple-choice knapsack, solved exactly.

    Parameters
    ----------
    sensitivity : Sensitivity
        Of `sensitivity`.
    weight_budget : float
        Mean bits a weight: 4.0 is the size of a uniform network of 4 bits.
    activation_budget : float, optional
        Mean bits an element of the activations of a sample; None leaves them in floating point.
    choices : sequence of int, default=(2, 3, 4, 6, 8)
        Bits that the hardware offers, in 1 .. 16.

    Returns
    -------
    BitConfig
        As `fit_score` and `quantize` take it.

    Raises
    ------
    ValueError
        If a budget is below the smallest choice, or choices are not bits.
    """
    if isinstance(choices, str) or not len(choices):
        raise ValueError(f"choices must be bits, at least one, got {choices!r}")
    options = sorted({_bit("choices", b) for b in choices})
    _budget("weight_budget", weight_budget, options)
    if activation_budget is not None:
        _budget("activation_budget", activation_budget, options)
        if not sensitivity.activation_trace:
            raise ValueError(
                "activation_budget must be None for a sensitivity without activations, got a budget"
            )
    weights = _knapsack(
        sensitivity.weight_trace, sensitivity.weight_range, sensitivity.n_weights, weight_budget, options
    )
    activations = {} if activation_budget is None else _knapsack(
        sensitivity.activation_trace, sensitivity.activation_range, sensitivity.n_activations, activation_budget, options
    )  # fmt: skip
    score = fit_score(sensitivity, weights, activations or None)
    size = sum(math.ceil(sensitivity.n_weights[name] * b / 8) for name, b in weights.items())
    return BitConfig(weights, activations, score, size)


def _knapsack(
    traces: Mapping[str, float], ranges: Mapping[str, float], sizes: Mapping[str, int], budget: float, options: list[int]
) -> dict[str, int]:  # fmt: skip
    """Minimise the sum of traces times noise, one choice a layer, within ``budget`` bits an element."""
    names = list(traces)
    costs = np.array([[traces[name] * _noise(ranges[name], b) for b in options] for name in names])
    if not np.isfinite(costs).all():
        bad = names[int(np.argmin(np.isfinite(costs).all(1)))]
        raise ValueError(f"sensitivity must be finite, got {traces[bad]} and range {ranges[bad]} at {bad!r}")
    n = np.array([sizes[name] for name in names], float)
    bits = np.array(options, float)
    saved = costs[:, :1] - costs  # what more bits save, from the fewest on: the smaller numbers
    spent = n[:, None] * (bits - bits[0])  # and what they cost
    room = math.floor(budget * n.sum() * (1 + 1e-12)) - bits[0] * n.sum()
    unit = max(saved.max(), np.finfo(float).tiny)
    rows, variables = len(names), costs.size
    one_each = csr_array(
        (np.ones(variables), np.arange(variables), np.arange(rows + 1) * len(options)), (rows, variables)
    )
    limit = room
    while True:  # the solver may pass the limit by its tolerance: then once more with that much less
        found = milp(
            -saved.ravel() / unit * 1e4, bounds=Bounds(0, 1), integrality=np.ones(variables), options={"mip_rel_gap": 0.0},
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent.reshape(1, -1) / n.mean(), -np.inf, limit / n.mean())],
        )  # fmt: skip
        pick = found.x.reshape(rows, -1).argmax(1)
        over = spent[np.arange(rows), pick].sum() - room
        if over <= 0:
            return {name: options[choice] for name, choice in zip(names, pick, strict=True)}
        limit -= over


def _noise(span: float, bits: int) -> float:
    return (span / (2**bits - 1)) ** 2


def _bit(name: str, value: Any, where: str = "") -> int:
    try:
        if 1 <= integer(name, value) <= MOST_BITS:
            return int(value)
    except ValueError:
        pass
    raise ValueError(f"{name} must be integers in 1..{MOST_BITS}, got {value!r}{where}")


def _bits(name: str, value: Any, known: Iterable[str]) -> dict[str, int]:
    """Return bits for each known layer."""
    known = list(known)
    if not isinstance(value, Mapping):
        value = dict.fromkeys(known, value)
    unknown = [layer for layer in value if layer not in known]
    lacking = [layer for layer in known if layer not in value]
    if unknown or lacking:
        what = f"unknown {unknown[0]!r}" if unknown else f"none for {lacking[0]!r}"
        raise ValueError(
            f"{name} must have bits for each layer, got {what}: the layers are {', '.join(map(repr, known))}"
        )
    return {layer: _bit(name, value[layer], f" for {layer!r}") for layer in known}


def _budget(name: str, value: Any, options: list[int]) -> None:
    at_least(name, value, 0)
    if value < options[0]:
        raise ValueError(
            f"{name} must be at least the smallest of choices, {options[0]} bits an element, got {value}"
        )


def _scalar(value: Any) -> Tensor:
    value = floating("what loss_fn returns", scalar("loss_fn", value))
    if not bool(torch.isfinite(value)):
        raise ValueError(f"loss_fn must be finite, got {value.item()}")
    return value


class _Mean:
    """Means over batches, weighted by their samples, and their relative standard errors."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[float, int]]] = {}
        self.count = 0

    def add(self, values: Mapping[str, float], n: int) -> None:
        self.count += 1
        for name, value in values.items():
            self.values.setdefault(name, []).append((value, n))

    def means(self) -> dict[str, float]:
        return {name: _weighted(pairs)[0] for name, pairs in self.values.items()}

    def errors(self) -> dict[str, float]:
        return {name: _weighted(pairs)[1] for name, pairs in self.values.items()}


def _weighted(pairs: Sequence[tuple[float, int]]) -> tuple[float, float]:
    values, n = np.array(pairs, float).T
    mean = float(values @ n / n.sum())
    if len(values) < 2:
        return mean, math.nan
    spread = math.sqrt(float(((n * (values - mean)) ** 2).sum()) * len(values) / (len(values) - 1)) / n.sum()
    return mean, 0.0 if spread == 0 else spread / abs(mean)
