"""Expected squared difference (ESD): a calibration loss with nothing to tune inside.

A classifier with top-label confidence C and correctness A is calibrated when, at every
level t, E[1(C <= t) (A - C)] = 0. ESD is the mean square of that gap, with t drawn from
the classifier's own confidences,

    ESD = E_C' [ E[ 1(C <= C') (A - C) ]^2 ].                                  (1)

There are no bins and no kernel width. The square is estimated without bias by products
of different samples: with g_ij = 1(c_j <= c_i) (a_j - c_j),

    (1/n) sum_i  sum_{j != k, both != i} g_ij g_ik / ((n - 1)(n - 2)),         (2)

which sorting and prefix sums evaluate in O(n log n). On a calibrated model the estimate is
0 on average, hence negative about every other time; there the loss and its gradient are 0.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from posterity._checks import at_least, class_indices, floating, has_shape, integer, needs
from posterity._precision import wide, widened

try:
    import torchmetrics
except ModuleNotFoundError:  # the losses need no torchmetrics; ESDMetric says how to install it
    torchmetrics = None
Metric: Any = torchmetrics.Metric if torchmetrics else nn.Module

__all__ = ["ESDLoss", "ESDMetric", "MMCELoss", "SBECELoss", "expected_squared_difference", "interleave"]

SLACK = 1e-6  # rounding that a softmax may leave outside [0, 1]
OFF_ONE = 0.02  # by how much probabilities that were rounded, to a dtype or to digits, may miss 1


@widened
def expected_squared_difference(
    confidence: Float[Tensor, " n"], correct: Shaped[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Return the unbiased estimate of ESD, equation 2.

    Parameters
    ----------
    confidence : Tensor of shape (n,)
        Top-label confidences in [0, 1], n at least 3; gradients go through them. The
        comparison of two confidences is a constant for the gradient.
    correct : Tensor of shape (n,)
        Whether each prediction was right: bool, or 0 and 1.

    Returns
    -------
    Tensor
        A scalar of the dtype and on the device of ``confidence``. It may be negative.

    Raises
    ------
    ValueError
        If n is less than 3, shapes differ, or (on the CPU, where reading is free) a
        confidence lies outside [0, 1] or is NaN.

    References
    ----------
    .. [1] Yoon et al. ESD: Expected Squared Difference as a Tuning-Free Trainable
       Calibration Measure. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import expected_squared_difference
    >>> expected_squared_difference(torch.full((4,), 0.9), torch.zeros(4))
    tensor(0.8100)
    """
    n = len(has_shape("confidence", floating("confidence", confidence), (None,)))
    has_shape("correct", correct, (n,), "confidence")
    if n < 3:
        raise ValueError(f"confidence must have at least 3 values, got {n}: fewer have no unbiased estimate")
    if confidence.device.type == "cpu" and not ((confidence >= -SLACK) & (confidence <= 1 + SLACK)).all():
        low, high = confidence.aminmax()
        raise ValueError(f"confidence must be in [0, 1], got values from {low:g} to {high:g}")
    # G^2 and Q below nearly cancel: sum them in float64 where the device has it
    wide = confidence.dtype if confidence.device.type == "mps" else torch.float64
    gap = correct.to(wide) - confidence.to(wide)
    order = confidence.detach().argsort()
    level = confidence.detach()[order]
    gap = gap[order]
    last = torch.searchsorted(level, level, right=True) - 1  # ties count: c_j <= c_i
    total = gap.cumsum(0)[last] - gap  # G_i = sum over j != i of g_ij
    squares = gap.square().cumsum(0)[last] - gap.square()  # Q_i, of g_ij^2
    return ((total.square() - squares).mean() / ((n - 1) * (n - 2))).to(confidence.dtype)


class ESDLoss(nn.Module):
    """ESD of a batch of logits, to add to the cross-entropy of another batch.

    The value belongs to the batch and not to its samples, so there is no ``reduction``.
    Hold out a part of the training data (a tenth) for it and draw both batches by
    `interleave`: on data that the network has memorised, every prediction is right.

    Parameters
    ----------
    root : bool, default=True
        Whether to return the square root, as the paper adds it to the loss, of an estimate
        above rounding and 0, with a gradient of 0, of any other.

    Raises
    ------
    ValueError
        If a batch has fewer than 3 samples or 2 classes, or ``target`` does not fit.

    Notes
    -----
    1. The official code takes the root of a clipped estimate, whose gradient is NaN where
       the estimate is negative, and relies on a gradient scaler to skip the whole step.
       Here that gradient is 0 and the cross-entropy still steps.

    References
    ----------
    .. [1] Yoon et al. ESD. ICLR 2023. Sections 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import ESDLoss
    >>> logits = torch.tensor([[0.9, 0.1]]).log().repeat(4, 1)
    >>> ESDLoss()(logits, torch.ones(4, dtype=torch.long))  # sure and always wrong
    tensor(0.9000)
    >>> ESDLoss()(100 * logits, torch.zeros(4, dtype=torch.long))  # sure and always right
    tensor(0.)
    """

    def __init__(self, *, root: bool = True) -> None:
        super().__init__()
        self.root = root

    @widened
    def forward(self, logits: Float[Tensor, "n classes"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the loss, a scalar."""
        value = expected_squared_difference(*_top_label(logits, target, at_least_n=3))
        return _root(value, torch.finfo(logits.dtype).eps) if self.root else value


class ESDMetric(Metric):
    """ESD over many batches: the exact value of all samples together.

    Parameters
    ----------
    root : bool, default=True
        Whether ``compute`` returns the root, 0 for a negative estimate, or the estimate.
    **kwargs : Any
        Passed to ``torchmetrics.Metric``.

    Raises
    ------
    ModuleNotFoundError
        If torchmetrics is not installed.
    ValueError
        If input does not fit, or fewer than 3 samples were seen.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import ESDMetric
    >>> metric = ESDMetric()
    >>> for _ in range(2):
    ...     metric.update(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([1, 1]))
    >>> metric.compute()
    tensor(0.9000)
    """

    full_state_update = False
    is_differentiable = True
    higher_is_better = False

    def __init__(self, *, root: bool = True, **kwargs: Any) -> None:
        needs("torchmetrics", "uncertainty")
        super().__init__(**kwargs)
        self.root = root
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, preds: Float[Tensor, "n classes"], target: Int[Tensor, " n"]) -> None:
        """Take a batch: logits, or probabilities (none negative, rows that sum to 1, within 2 %)."""
        preds = wide(floating("preds", preds))
        share = preds.ndim == 2 and bool((preds >= 0).all() and ((preds.sum(1) - 1).abs() < OFF_ONE).all())
        confidence, correct = _top_label(
            preds.clamp_min(1e-30).log() if share else preds, target, name="preds"
        )
        self.confidence.append(confidence)
        self.correct.append(correct)

    def compute(self) -> Float[Tensor, ""]:
        """Return the value of all batches together."""
        pooled = []
        for state in (self.confidence, self.correct):  # tensors once they were reduced over processes
            pooled.append(
                torch.cat(list(state)) if isinstance(state, list) and state else torch.as_tensor(state)
            )
        if len(pooled[0]) < 3:
            raise ValueError(f"preds must have had at least 3 rows before compute, got {len(pooled[0])}")
        value = expected_squared_difference(*pooled)
        return _root(value, torch.finfo(value.dtype).eps) if self.root else value


def interleave(train: Iterable, calibration: Iterable) -> Iterator[tuple]:
    """Yield pairs of a training and a calibration batch, for one pass over the training data.

    Parameters
    ----------
    train : iterable
        Batches, as a ``DataLoader`` gives them.
    calibration : iterable
        Batches; started anew (a shuffling loader shuffles anew) whenever it ends.

    Yields
    ------
    tuple
        ``(training batch, calibration batch)``.

    Raises
    ------
    ValueError
        If ``calibration`` is empty, or is an iterator that cannot be started anew and ends
        before ``train`` does.

    Examples
    --------
    >>> from posterity.uncertainty import interleave
    >>> list(interleave("abc", [1, 2]))
    [('a', 1), ('b', 2), ('c', 1)]
    """
    source = iter(calibration)
    once = source is calibration
    for number, batch in enumerate(train):
        try:
            other = next(source)
        except StopIteration:
            if number == 0:
                raise ValueError("calibration must give at least one batch, got none") from None
            if once:
                raise ValueError(
                    f"calibration must be started anew after {number} batches, but is an iterator: "
                    "pass a DataLoader or a list"
                ) from None
            source = iter(calibration)
            other = next(source)
        yield batch, other


class MMCELoss(nn.Module):
    """Maximum mean calibration error, the kernel measure that ESD is compared with.

    sqrt( (1/n^2) sum_ij (c_i - a_i)(c_j - a_j) exp(-|c_i - c_j| / bandwidth) ), unweighted;
    biased upwards on small batches.

    Parameters
    ----------
    bandwidth : float, default=0.4
        Width of the Laplace kernel, positive.

    Raises
    ------
    ValueError
        If ``bandwidth`` is not positive or the input does not fit.

    References
    ----------
    .. [1] Kumar, Sarawagi, Jain. Trainable Calibration Measures from Kernel Mean
       Embeddings. ICML 2018. Equation 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import MMCELoss
    >>> MMCELoss()(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([1]))
    tensor(0.9000)
    """

    def __init__(self, *, bandwidth: float = 0.4) -> None:
        super().__init__()
        self.bandwidth = at_least("bandwidth", bandwidth, 0, strict=True)

    @widened
    def forward(self, logits: Float[Tensor, "n classes"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the loss, a scalar."""
        confidence, correct = _top_label(logits, target)
        gap = confidence - correct.to(confidence.dtype)
        kernel = torch.exp(-(confidence[:, None] - confidence).abs() / self.bandwidth)
        return _root(gap @ kernel @ gap / len(gap) ** 2, torch.finfo(gap.dtype).eps ** 2)


class SBECELoss(nn.Module):
    """Soft-binned calibration error, the binned measure that ESD is compared with.

    With soft memberships w_bi = softmax over bins of -(c_i - centre_b)^2 / temperature and
    the soft accuracy A_b of each bin, sqrt( (1/n) sum_bi w_bi (A_b - c_i)^2 ).

    Parameters
    ----------
    n_bins : int, default=15
        Bins of equal width, at least 1.
    temperature : float, default=0.01
        Softness of the bins, positive.

    Raises
    ------
    ValueError
        If a parameter is out of range or the input does not fit.

    References
    ----------
    .. [1] Karandikar et al. Soft Calibration Objectives for Neural Networks. NeurIPS 2021.
       Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import SBECELoss
    >>> SBECELoss()(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([1]))
    tensor(0.9000)
    """

    def __init__(self, *, n_bins: int = 15, temperature: float = 0.01) -> None:
        super().__init__()
        self.n_bins = integer("n_bins", n_bins, 1)
        self.temperature = at_least("temperature", temperature, 0, strict=True)

    @widened
    def forward(self, logits: Float[Tensor, "n classes"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the loss, a scalar."""
        confidence, correct = _top_label(logits, target)
        centres = (torch.arange(self.n_bins, device=logits.device, dtype=logits.dtype) + 0.5) / self.n_bins
        weight = (-(confidence[:, None] - centres).square() / self.temperature).softmax(1)  # (n, bins)
        mass = weight.sum(0)
        tiny = torch.finfo(mass.dtype).tiny
        accuracy = correct.to(weight.dtype) @ weight / mass.clamp_min(tiny)
        value = (weight * (accuracy - confidence[:, None]).square()).sum() / len(weight)
        return _root(value, torch.finfo(value.dtype).eps ** 2)


def _top_label(
    logits: Float[Tensor, "n classes"], target: Int[Tensor, " n"], at_least_n: int = 1, name: str = "logits"
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return confidence and correctness of the most probable class, the first of equals."""
    n, classes = has_shape(name, floating(name, logits), (None, None)).shape
    if classes < 2:
        raise ValueError(f"{name} must have at least 2 classes, got {classes}")
    if n < at_least_n:
        raise ValueError(
            f"{name} must have at least {at_least_n} rows, got {n}: fewer have no unbiased estimate"
        )
    class_indices("target", target, n, classes)
    top = logits.argmax(1, keepdim=True)
    confidence = logits.softmax(1).gather(1, top)[:, 0]
    if confidence.device.type == "cpu" and bool(confidence.isnan().any()):
        raise ValueError(f"{name} must not be NaN or infinite, row {int(confidence.isnan().nonzero()[0])} is")
    return confidence, top[:, 0] == target


def _root(value: Tensor, floor: float) -> Tensor:
    """Return the root above ``floor``; elsewhere 0 with gradient 0, where sqrt would give NaN."""
    positive = value > floor
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)
