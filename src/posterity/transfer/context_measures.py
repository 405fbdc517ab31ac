"""What contexts do to features and to answers: the contrast that holds them apart, and filtering by hand.

Classes are grouped into contexts, ``class_context`` has one a class; samples have the context that is known or
expected of them, -1 where none is. In training, features f of samples of different contexts should be far apart in
angle: their contrast is the mean over such pairs i, j of

    |cos(f_i, f_j)| ,     f averaged over positions.                                                    (1)

Of answers, those in other contexts can be ruled out afterwards, and the share that is not out of place counted.
"""

import math
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import class_indices, floating, has_shape, one_of
from posterity._precision import widened

__all__ = ["context_contrast", "contextual_consistency", "filter_logits"]

LEAST_NORM = 1e-8  # of features of which a cosine is taken


@widened
def context_contrast(
    features: Float[Tensor, "n channels *spatial"], context: Int[Tensor, " n"], *, per_location: bool = False,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:  # fmt: skip
    """Return how much features of different contexts point the same way (equation 1), to be made small.

    Parameters
    ----------
    features : Tensor of shape (n, channels, *spatial)
        Of a site before its map.
    context : Tensor of shape (n,)
        Integers, -1 where it is not known: such a sample is in no pair.
    per_location : bool, default=False
        Whether cosines are taken at each position and then averaged, not of averages over positions.
    reduction : {"mean", "sum", "none"}, default="mean"
        What to make of the pairs; "none" gives them in the order (0, 1), (0, 2), ..., (1, 2), ...

    Returns
    -------
    Tensor
        A scalar, 0 where no two samples are of different contexts; for "none" of shape (pairs,).

    Raises
    ------
    ValueError
        If shapes do not fit, or (on the CPU, where reading is free) a feature is NaN or infinite.

    Notes
    -----
    The authors' loss is not published: theirs trains two branches on pairs of samples of different contexts; all
    pairs of a batch have the same expectation. Weigh it by 0.01 to 0.1: at 1 behind a ReLU it kills the features,
    since those that are all 0 have no contrast.

    References
    ----------
    .. [1] Maynord, Dessalene, Fermuller, Aloimonos. Mid-Vision Feedback. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import context_contrast
    >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, -2.0]])
    >>> context_contrast(features, torch.tensor([0, 1, 1]))  # the mean of 1 and 0
    tensor(0.5000)
    """
    one_of("per_location", per_location, (False, True))
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if floating("features", features).ndim < 2 or 0 in features.shape[1:]:
        raise ValueError(
            f"features must have shape (n, channels, *spatial), all but n at least 1, got {tuple(features.shape)}"
        )
    contexts_of_samples("context", context, len(features))
    if features.ndim == 2:
        rows = features[None]  # (positions, n, channels)
    else:
        flat = features.flatten(2)
        rows = flat.permute(2, 0, 1) if per_location else flat.mean(2)[None]
    size = rows.detach().abs().amax(2, keepdim=True)
    if size.device.type == "cpu" and not bool(size.isfinite().all()):
        raise ValueError(
            "features must be finite, and so must their mean over positions, got NaN or infinity"
        )
    size = size.clamp_min(LEAST_NORM)
    rows = rows / size  # so that no square is too large or too small
    unit = rows / torch.maximum(rows.norm(dim=2, keepdim=True), LEAST_NORM / size)
    contrast = (unit @ unit.mT).abs().mean(0)  # (n, n)
    known = context >= 0
    apart = (context[:, None] != context) & known[:, None] & known
    if reduction == "none":
        return contrast[apart.triu(1)]
    total = (contrast * apart).sum()
    return total / (apart.sum().clamp_min(1) if reduction == "mean" else 2)


def filter_logits(
    logits: Float[Tensor, "n classes"], context: Int[Tensor, " n"], class_context: Int[Tensor, " classes"], *,
    fill: float = float("-inf"),
) -> Float[Tensor, "n classes"]:  # fmt: skip
    """Return logits in which classes of other contexts are ruled out: what feedback is to be better than.

    Parameters
    ----------
    logits : Tensor of shape (n, classes)
        Of a network that knows nothing of contexts.
    context : Tensor of shape (n,)
        Integers; -1 leaves a sample as it is.
    class_context : Tensor of shape (classes,)
        The context to which each class belongs; all from 0 to the largest have a class.
    fill : float, default=-inf
        What classes that are not expected get.

    Returns
    -------
    Tensor of shape (n, classes)
        Those of classes in the context, bit for bit, and ``fill``.

    Raises
    ------
    ValueError
        If shapes do not fit, a context is out of range or without classes, or ``fill`` is NaN or beyond the dtype.

    References
    ----------
    .. [1] Maynord, Dessalene, Fermuller, Aloimonos. Mid-Vision Feedback. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import filter_logits
    >>> logits = torch.tensor([[3.0, 2.0, 1.0]])
    >>> filter_logits(logits, torch.tensor([1]), class_context=torch.tensor([0, 1, 1]))
    tensor([[-inf, 2., 1.]])
    """
    n, classes = has_shape("logits", floating("logits", logits), (None, None)).shape
    contexts_of_samples("context", context, n, contexts_of_classes(class_context, classes, "logits"))
    if isinstance(fill, bool) or not isinstance(fill, Real) or math.isnan(fill):
        raise ValueError(f"fill must be a number, got {fill!r}")
    if math.isfinite(fill) and abs(fill) > torch.finfo(logits.dtype).max:
        raise ValueError(f"fill must be a number that {logits.dtype} can hold, or infinite, got {fill}")
    given = context[:, None]
    return logits.masked_fill((given != class_context) & (given >= 0), fill)


def contextual_consistency(
    predictions: Int[Tensor, " n"], context: Int[Tensor, " n"], class_context: Int[Tensor, " classes"]
) -> Float[Tensor, ""]:
    """Return the share of predictions whose class belongs to the context of the sample.

    Parameters
    ----------
    predictions : Tensor of shape (n,)
        Classes.
    context : Tensor of shape (n,)
        Integers; samples with -1 do not count.
    class_context : Tensor of shape (classes,)
        As for `filter_logits`.

    Returns
    -------
    Tensor of shape ()
        Float32; NaN where no sample has a context.

    Raises
    ------
    ValueError
        If shapes do not fit, or a class or context is out of range.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import contextual_consistency
    >>> context, class_context = torch.tensor([0, 0, 1, -1]), torch.tensor([0, 1, 1])
    >>> contextual_consistency(torch.tensor([0, 0, 0, 0]), context, class_context)
    tensor(0.6667)
    """
    n_contexts = contexts_of_classes(class_context)
    if not isinstance(predictions, Tensor) or predictions.ndim != 1:
        raise ValueError("predictions must be a tensor of shape (n,), one class a sample")
    class_indices("predictions", predictions, len(predictions), len(class_context))
    contexts_of_samples("context", context, len(predictions), n_contexts)
    known = context >= 0
    return ((class_context[predictions.long()] == context) & known).sum() / known.sum()


def contexts_of_samples(name: str, value: Any, n: int, n_contexts: int | None = None) -> Tensor:
    """Return integers, one a sample, from -1 to n_contexts - 1; values are read on the CPU."""
    class_indices(name, value, n)
    if n and value.device.type == "cpu":
        low, high = (int(end) for end in value.aminmax())
        if low < -1 or (n_contexts is not None and high >= n_contexts):
            last = "" if n_contexts is None else f" to {n_contexts - 1}"
            raise ValueError(f"{name} must be from -1{last}, got values from {low} to {high}")
    return value


def contexts_of_classes(
    class_context: Any, classes: int | None = None, source: str = "", n_contexts: int | None = None
) -> int | None:
    """Return how many contexts there are, each with a class; None where values are not read."""
    if not isinstance(class_context, Tensor) or class_context.ndim != 1 or not len(class_context):
        raise ValueError(
            f"class_context must be a tensor of a context a class, got {type(class_context).__name__}"
        )
    class_indices("class_context", class_context, len(class_context), n_contexts)
    if classes is not None:
        has_shape("class_context", class_context, (classes,), source)
    if class_context.device.type != "cpu":
        return n_contexts
    if int(class_context.min()) < 0:
        raise ValueError(f"class_context must be at least 0, got {int(class_context.min())}")
    counts = class_context.long().bincount(minlength=n_contexts or 0)
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"class_context must have a class of every context, got none of context {empty}")
    return len(counts)
