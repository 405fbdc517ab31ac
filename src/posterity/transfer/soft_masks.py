"""How important each unit is, as a share, and gradients in which important units count less.

With virtual scales g = 1 on the units of a model, the raw importance of unit i is the mean of d loss / d g_i over
batches. Within each layer and kind it is standardised and squashed,

    I_i = |tanh((r_i - mean r) / std r)|  in [0, 1),                                                           (1)

so that neither scale nor sign of the loss matters, and a later step multiplies the gradient of all that belongs to
unit i by 1 - I_i, while the forward pass uses all units.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posterity._checks import finite, floating, has_shape, scalar
from posterity._precision import wide
from posterity.transfer.transformer_units import Units, by_name, unit_scales

__all__ = ["merge_importance", "normalize_importance", "soft_mask_gradients", "unit_importance"]


@torch.inference_mode(False)  # grad mode too
def unit_importance(
    model: nn.Module, units: Sequence[Units], batches: Iterable, loss_fn: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Return the mean gradient of a loss in the scales of all units, by one backward pass a batch.

    Parameters
    ----------
    model : nn.Module
        In the mode in which it is; left as it was, gradients too.
    units : sequence of Units
        As `find_units` returns them.
    batches : iterable
        At least one; each counts alike.
    loss_fn : callable
        ``loss_fn(model, batch)``, a scalar.

    Returns
    -------
    dict of str to Tensor of shape (n_units,)
        With signs, in float32 at least; for `normalize_importance`.

    Raises
    ------
    ValueError
        If there is no batch, the loss is no finite scalar, or does not depend on any unit.

    Notes
    -----
    1. Autocast is off inside.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Equation 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import Units, unit_importance
    >>> layer = torch.nn.Linear(1, 2)
    >>> _ = torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
    >>> units = [Units("both", layer, "output", 2, (layer.weight, layer.bias), ())]
    >>> loss = lambda model, x: (model(x) * torch.tensor([1.0, 3.0])).sum()
    >>> unit_importance(layer, units, [torch.tensor([[2.0]])], loss)  # d loss / d g is output times weight
    {'both': tensor([2., 6.])}
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    named = by_name(units)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches must be iterable, got {type(batches).__name__}")
    scales = {
        name: torch.ones_like(wide(_first(each)[: each.n_units].detach()), requires_grad=True)
        for name, each in named.items()
    }
    total = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    n = 0
    for batch in batches:
        with unit_scales(units, scales), torch.autocast(_first(units[0]).device.type, enabled=False):
            value = finite("what loss_fn returns", scalar("loss_fn", loss_fn(model, _outside(batch))))
            if not value.requires_grad:
                raise ValueError("loss_fn must depend on a unit, and have a gradient")
            slopes = torch.autograd.grad(value, list(scales.values()), allow_unused=True)
        if all(slope is None for slope in slopes):
            raise ValueError(
                "loss_fn must depend on a unit: units are of another model than the one it calls"
            )
        for name, slope in zip(scales, slopes, strict=True):
            if slope is not None:
                total[name] += slope
        n += 1
    if not n:
        raise ValueError("batches must give at least one batch, got none")
    return {name: value / n for name, value in total.items()}


def normalize_importance(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return raw importance as shares in [0, 1), equation 1: what is far above or below the mean counts.

    Parameters
    ----------
    raw : mapping of str to Tensor of shape (n_units,)
        As `unit_importance` returns it; finite.

    Returns
    -------
    dict of str to Tensor of shape (n_units,)
        In the dtype of each entry. Entries whose values are all alike give zeros.

    Raises
    ------
    ValueError
        If an entry is no vector of finite floating-point numbers.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Equation 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import normalize_importance
    >>> normalize_importance({"heads": torch.tensor([-1.0, 0.0, 1.0])})  # tanh of 1
    {'heads': tensor([0.7616, 0.0000, 0.7616])}
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"raw must map names to tensors, got {type(raw).__name__}")
    found = {}
    for name, value in raw.items():
        x = has_shape(f"raw[{name!r}]", floating(f"raw[{name!r}]", value), (None,)).detach()
        finite(f"raw[{name!r}]", x)
        if not len(x) or bool((x == x[0]).all()):  # a deviation would be that of rounding
            found[name] = torch.zeros_like(x)
            continue
        exact = x.cpu().double()
        exact = exact / exact.abs().max()  # squares of huge values overflow
        share = ((exact - exact.mean()) / exact.std()).tanh().abs()
        found[name] = share.to(x).clamp_max(1 - torch.finfo(x.dtype).eps / 2)  # rounding may reach 1
    return found


def merge_importance(*importances: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the largest importance that each unit has in any of several.

    Parameters
    ----------
    *importances : mapping of str to Tensor of shape (n_units,)
        At least one, all of the same names and shapes, values in [0, 1].

    Returns
    -------
    dict of str to Tensor of shape (n_units,)
        Of the names of the first.

    Raises
    ------
    ValueError
        If there is none, names or shapes differ, or a value is outside [0, 1] or NaN.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Equation 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import merge_importance
    >>> merge_importance({"heads": torch.tensor([0.5, 0.0])}, {"heads": torch.tensor([0.25, 0.75])})
    {'heads': tensor([0.5000, 0.7500])}
    """
    if not importances:
        raise ValueError("importances must be at least one, got none")
    for each in importances:
        if not isinstance(each, Mapping):
            raise ValueError(f"importances must map names to tensors, got {type(each).__name__}")
        if each.keys() != importances[0].keys():
            raise ValueError(
                f"importances must have the same names, got {sorted(importances[0])} and {sorted(each)}"
            )
    merged = {}
    for name, first in importances[0].items():
        first = has_shape(f"importances[{name!r}]", floating(f"importances[{name!r}]", first), (None,))
        parts = [share_of_units(f"importances[{name!r}]", each[name], len(first)) for each in importances]
        value = parts[0].clone()
        for other in parts[1:]:
            value = torch.maximum(value, other.to(value))
        merged[name] = value
    return merged


def soft_mask_gradients(units: Sequence[Units], importance: Mapping[str, Tensor]) -> None:
    """Multiply the gradients of what belongs to each unit by 1 - importance, in place, between backward and step.

    Parameters
    ----------
    units : sequence of Units
        As `find_units` returns them.
    importance : mapping of str to Tensor of shape (n_units,)
        An entry for each of ``units``, values in [0, 1]: 0 leaves a gradient, 1 makes it zero.

    Raises
    ------
    ValueError
        If an entry is missing or does not fit, or no parameter has a gradient; frozen ones are passed over.

    Notes
    -----
    1. Adam divides a gradient by its own size: a factor that stays the same over its steps cancels, and only an
       importance of 1 holds a unit. For plain SGD a step is shorter by the factor. `ContinualPretrainer` shortens
       the step itself, whatever the optimizer.
    2. Queries, keys and values are masked by the rows that make a head; the official code multiplies their weights
       along the inputs, by broadcasting, and the bias behind the attention, which belongs to no head, by heads.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Equation 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import Units, soft_mask_gradients
    >>> layer = torch.nn.Linear(1, 2)
    >>> units = [Units("both", layer, "output", 2, (layer.weight, layer.bias), ())]
    >>> layer(torch.ones(1, 1)).sum().backward()
    >>> soft_mask_gradients(units, {"both": torch.tensor([0.25, 1.0])})
    >>> layer.bias.grad
    tensor([0.7500, 0.0000])
    """
    masks = importance_of_parameters(units, importance)
    graded = [(p, mask) for p, mask in masks if p.grad is not None]
    if not graded:
        raise ValueError("units must have gradients to mask, got none: call backward() first")
    with torch.no_grad():
        for p, mask in graded:
            assert p.grad is not None
            p.grad.mul_(1 - mask)


def importance_of_parameters(
    units: Sequence[Units], importance: Mapping[str, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each parameter of the units with its importance, shaped to broadcast, of its device and dtype."""
    named = by_name(units)
    if not isinstance(importance, Mapping):
        raise ValueError(f"importance must map names to tensors, got {type(importance).__name__}")
    if missing := sorted(named.keys() - importance.keys()):
        raise ValueError(f"importance must have an entry for each row of units, has none for {missing[0]!r}")
    found = []
    for name, each in named.items():
        value = share_of_units(f"importance[{name!r}]", importance[name], each.n_units)
        value = value.repeat_interleave(each.width // each.n_units)
        for p in each.rows:
            mask = value.repeat(p.shape[0] // each.width).to(p)
            found.append((p, mask.view(-1, *[1] * (p.ndim - 1))))
        for p in each.columns:
            found.append((p, value.repeat(p.shape[-1] // each.width).to(p)))
    return found


def share_of_units(name: str, value: Any, n: int) -> Tensor:
    """Return importance of units, if there is one for each, in [0, 1]."""
    has_shape(name, floating(name, value), (n,))
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must be in [0, 1], got values from {value.min():g} to {value.max():g}")
    return value.detach()


def _first(units: Units) -> Tensor:
    """Return a vector of the dtype and on the device of the units, at least as long as they are many."""
    return (units.rows + units.columns)[0].detach().flatten()


def _outside(batch: Any) -> Any:
    """Return a batch without tensors of inference mode, which no gradient can go through."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {name: _outside(value) for name, value in batch.items()}
    return type(batch)(map(_outside, batch)) if type(batch) in (tuple, list) else batch
