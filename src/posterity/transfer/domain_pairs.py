"""Samples of two domains, and which of the old ones a new one belongs to.

Where the domains are not measured in pairs, a new sample (x~, y~) is given the old one that is nearest
in inputs and labels together,

    argmin_i  |x_i - x~| + |y_i - y~|.                                                  (1)
"""

import math
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from posterity._checks import at_least, finite, floating, one_of
from posterity.transfer.affine_layer import _exactly, _plain

__all__ = ["align_domains"]

_DISTANCES = 2**22  # at once


def align_domains(
    x: Shaped[Tensor, "n_source ..."],
    y: Shaped[Tensor, "n_source ..."],
    x_target: Shaped[Tensor, "n ..."],
    y_target: Shaped[Tensor, "n ..."],
    *,
    p: float = 2,
) -> Int[Tensor, " n"]:
    """Return the old sample that is nearest to each new one, in inputs and labels together.

    The distance is ``|x_i - x~_j| + |y_i - y~_j|``, each over all axes but the first.

    Parameters
    ----------
    x, y : Tensor
        Samples of the old domain, at least one.
    x_target, y_target : Tensor
        Samples of the new domain, of the same shapes but for their number.
    p : float, default=2
        Of the norms, at least 1; infinity too.

    Returns
    -------
    Tensor
        int64, indices into ``x``; the first of those that are equally near.

    Raises
    ------
    ValueError
        If samples are missing, do not fit or are not finite, or ``p`` is below 1.

    References
    ----------
    .. [1] Tseng, Lin, Hung, Tsao. Interpretations of Domain Adaptations via Layer Variational
       Analysis. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import align_domains
    >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.zeros(3, 1)
    >>> align_domains(x, y, torch.tensor([[1.9], [0.2]]), y[:2])
    tensor([2, 0])
    """
    if p != math.inf:
        at_least("p", p, 1)
    _check_samples(x, y, x_target, y_target)
    width = max(1, _DISTANCES // len(x))
    sides = [
        [_exactly(_plain(v)).reshape(len(v), v[0].numel()) for v in pair]
        for pair in ((x, x_target), (y, y_target))
    ]
    sides = [[old, new.to(old.device)] for old, new in sides]
    found = []
    for part in torch.arange(len(x_target)).split(width):
        # the way by matrix products rounds off small distances, those that count here
        total = sum(torch.cdist(new[part.to(new.device)], old, float(p), "donot_use_mm_for_euclid_dist")
                    for old, new in sides)  # fmt: skip
        assert isinstance(total, Tensor)
        found.append(total.argmin(1))
    return torch.cat(found).to(x.device)


def _check_samples(x: Any, y: Any, x_target: Any, y_target: Any) -> None:
    """Refuse samples of one domain, or of two where all are given, that do not fit."""
    values: tuple[tuple[str, Any, Any], ...] = (("_target", x_target, y_target), ("", x, y))
    hint = "this is least squares, give one-hot or logit targets"
    for end, inputs, labels in values:
        if not end and inputs is None and labels is None:
            continue
        for name, value in ((f"x{end}", inputs), (f"y{end}", labels)):
            if not isinstance(value, Tensor) or value.ndim == 0 or value.is_complex() or not len(value):
                got = (
                    f"{value.dtype} {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ValueError(f"{name} must be a real tensor with at least one row, got {got}")
            finite(name, value)
        floating(f"y{end}", labels, hint)
        if len(inputs) != len(labels):
            raise ValueError(
                f"y{end} must have a row for each of the {len(inputs)} of x{end}, got {len(labels)}"
            )
    for name, old, new in (("x", x, x_target), ("y", y, y_target)):
        if old is not None and old.shape[1:] != new.shape[1:]:
            raise ValueError(f"{name} must have rows like those of {name}_target, {tuple(new.shape[1:])}, "
                             f"got {tuple(old.shape[1:])}")  # fmt: skip


def _sources(
    x: Any, y: Any, x_target: Any, y_target: Any, method: str, align: Any
) -> tuple[Tensor, Tensor] | None:
    """Return the old input and label of each new sample for "perturb", None for "exact", which needs none."""
    one_of("align", align, (True, False, "auto"))
    _check_samples(x, y, x_target, y_target)
    if method == "exact":
        return None
    if x is None or y is None:
        raise ValueError("x and y must be given for method='perturb'")
    floating("x", x)
    floating("x_target", x_target)
    if align is False and len(x) != len(x_target):
        raise ValueError(
            f"x must have as many rows as x_target for align=False, got {len(x)} and {len(x_target)}"
        )
    if align is True or len(x) != len(x_target):
        nearest = align_domains(x, y, x_target, y_target)
        return x[nearest], y[nearest.to(y.device)]
    return x, y
