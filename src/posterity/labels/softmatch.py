"""SoftMatch: pseudo-labels weighted by how sure the network is, in place of a threshold.

FixMatch learns from an unlabelled example only where its most probable class has 0.95 or
more. SoftMatch keeps a running mean mu and variance var of that confidence c, and gives an
example the weight

    w(c) = 1                                       where c >= mu,
           exp(-(c - mu)^2 n_sigma^2 / (2 var))    below:                    (1)

half of the examples count in full and the doubtful ones fade out, at the start of training,
when no confidence is near 0.95, as at its end. Classes that are easy to learn would take most of the
weight; so c is read from probabilities aligned to a target marginal,

    p~ = normalise(p * p_target / p_model),                                  (2)

where p_model is the running mean of predictions. The loss of a step is

    CE(labelled) + lambda_u (1/B) sum_i w(c_i) CE(strong view i, label of weak view i).   (3)
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide, widened
from posterity._processes import n_processes

__all__ = ["SoftMatchLoss", "SoftMatchWeighting", "UniformAlignment", "quantity_quality"]

FLOOR = 1e-6  # added to both marginals of (2), so that a class never predicted divides by no zero
OFF_ONE = 2**-8  # by how much the sum of probabilities may miss 1, as that of rows rounded to bfloat16 does


class _Running(nn.Module):
    """Running statistics as buffers, float32 at least: a narrow average would stand still."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Running":
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            self._buffers[name] = None if value is None else wide(value)
        return self


class UniformAlignment(_Running):
    """Align predictions to a target marginal, equation 2.

    Parameters
    ----------
    n_classes : int
        Classes C, at least 2.
    momentum : float, default=0.999
        Share of a running mean that a batch leaves, in [0, 1).
    target : {"uniform", "model"} or Tensor of shape (C,), default="uniform"
        What the mean prediction should be: all classes alike, the running mean of predictions
        on labelled examples, or shares that are known and sum to 1.

    Attributes
    ----------
    p_model : Tensor of shape (C,)
        Running mean of predictions; 0 before the first batch, which it then is.
    p_target : Tensor of shape (C,)
        What they are aligned to.

    Raises
    ------
    ValueError
        If a parameter is out of range, a batch is empty, or (on the CPU, where reading is
        free) rows are not probabilities.

    Notes
    -----
    In eval mode nothing is updated. Buffers are float32 at least. Where ``torch.distributed``
    is initialised, means are over the batches of all processes, which so share their statistics.

    References
    ----------
    .. [1] Chen et al. SoftMatch. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.labels import UniformAlignment
    >>> probs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])  # 0.8 and 0.2 on average
    >>> UniformAlignment(2)(probs)
    tensor([[0.6923, 0.3077],
            [0.3684, 0.6316]])
    """

    p_model: Tensor
    p_target: Tensor

    def __init__(
        self, n_classes: int, *, momentum: float = 0.999,
        target: Literal["uniform", "model"] | Float[Tensor, " classes"] = "uniform",
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_classes = integer("n_classes", n_classes, 2)
        self.momentum = within("momentum", momentum, 0, 1, open_high=True)
        if isinstance(target, Tensor):
            has_shape("target", floating("target", target), (n_classes,), "n_classes")
            share = wide(_shares("target", target[None], n_classes)[0].detach().clone())
            self.target = "given"
        else:
            self.target = one_of("target", target, ("uniform", "model"))
            share = torch.full((n_classes,), 1 / n_classes)
        self.register_buffer("p_model", torch.zeros_like(share))
        self.register_buffer("p_target", share)

    def forward(
        self,
        probs: Float[Tensor, "batch classes"],
        probs_labeled: Float[Tensor, "labeled classes"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Return aligned rows, without a gradient, and in training mode update the running means before.

        ``probs_labeled`` are predictions on labelled examples: ``target="model"`` needs them in
        training mode, no other uses them.
        """
        _shares("probs", probs, self.n_classes)
        if self.target != "model":
            probs_labeled = None
        elif probs_labeled is not None:
            _shares("probs_labeled", probs_labeled, self.n_classes)
        elif self.training:
            raise ValueError('probs_labeled must be given for target="model", got None')
        return _constant(self._align, probs, probs_labeled)

    def _align(self, probs: Tensor, probs_labeled: Tensor | None) -> Tensor:
        """Do what ``forward`` does, in the dtype that comes and without looking at values."""
        if self.training:
            means = _means(probs) if probs_labeled is None else _means(probs, probs_labeled)
            # it sums to 0 before the first batch, which it then is, and to 1 after
            _move(self.p_model, means[0], 1 - self.momentum * self.p_model.sum().round())
            if probs_labeled is not None:
                _move(self.p_target, means[1], 1 - self.momentum)
        aligned = probs * ((self.p_target + FLOOR) / (self.p_model + FLOOR)).to(probs)
        return aligned.div_(aligned.sum(1, keepdim=True))


class SoftMatchWeighting(_Running):
    """Weigh predictions by their confidence against its running Gaussian, equation 1.

    Parameters
    ----------
    n_classes : int
        Classes C, at least 2.
    n_sigma : float, default=2.0
        How many times narrower than the confidences the tail is, positive. A large one is the
        hard mask c >= mu; one near 0 gives every example the weight 1.
    momentum : float, default=0.999
        Share of a running statistic that a batch leaves, in [0, 1).
    per_class : bool, default=False
        Whether each predicted class has a Gaussian of its own. A class that a batch predicts
        less than twice then moves its mean towards 0 and its variance towards 1, as in the
        official code: what is predicted too rarely is weighted generously.

    Attributes
    ----------
    mu, var : Tensor of shape () or (C,)
        Mean and variance of the confidence, 1 / C and 1 before the first batch.

    Raises
    ------
    ValueError
        As `UniformAlignment`.

    Notes
    -----
    1. The paper's tail has the variance var; the official code, and so the published results,
       have var / n_sigma^2 with n_sigma = 2.
    2. A batch of one moves the mean and leaves the variance.

    What `UniformAlignment` says of eval mode, buffers and processes holds here too.

    References
    ----------
    .. [1] Chen et al. SoftMatch. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.labels import SoftMatchWeighting
    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])  # mean 0.8, variance 0.01
    >>> SoftMatchWeighting(2, momentum=0.0)(probs)  # 1, 1, exp(-2)
    tensor([1.0000, 1.0000, 0.1353])
    """

    mu: Tensor
    var: Tensor

    def __init__(
        self, n_classes: int, *, n_sigma: float = 2.0, momentum: float = 0.999, per_class: bool = False
    ) -> None:
        super().__init__()
        self.n_classes = integer("n_classes", n_classes, 2)
        self.n_sigma = at_least("n_sigma", n_sigma, 0, strict=True)
        self.momentum = within("momentum", momentum, 0, 1, open_high=True)
        self.per_class = per_class
        size = (n_classes,) if per_class else ()
        self.register_buffer("mu", torch.full(size, 1 / n_classes))
        self.register_buffer("var", torch.ones(size))

    def forward(self, probs: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
        """Return weights in [0, 1], without a gradient, and in training mode update the Gaussian before."""
        return _constant(self._weigh, _shares("probs", probs, self.n_classes))

    def _weigh(self, probs: Tensor) -> Tensor:
        """Do what ``forward`` does, in the dtype that comes and without looking at values."""
        if self.per_class:
            confidence, label = probs.max(1)
        else:
            confidence, label = probs.amax(1), None
        if self.training:
            self._update(confidence, label)
        mu, var = self.mu.to(probs), self.var.to(probs)
        if label is not None:
            mu, var = mu[label], var[label]
        # equal confidences are their mean but for rounding, and then have no variance
        below = F.threshold(mu - confidence, 8 * torch.finfo(self.mu.dtype).eps, 0.0)
        steep = (self.n_sigma * self.n_sigma / -2 / var).clamp_min_(torch.finfo(var.dtype).min)
        return below.square_().mul_(steep).exp_()

    def _update(self, confidence: Tensor, label: Tensor | None) -> None:
        if label is None and n_processes() == 1:
            var, mean = torch.var_mean(confidence) if len(confidence) > 1 else (self.var, confidence[0])
        else:
            n, mean, var = _moments(confidence, label, self.n_classes)
            few = (mean, self.var) if label is None else (0.0, 1.0)
            mean, var = torch.where(n > 1, mean, few[0]), torch.where(n > 1, var, few[1])
        _move(self.mu, mean, 1 - self.momentum)
        _move(self.var, var, 1 - self.momentum)


class SoftMatchLoss(nn.Module):
    """The loss of a labelled and an unlabelled batch, equation 3.

    Parameters
    ----------
    n_classes : int
        Classes C, at least 2.
    lambda_u : float, default=1.0
        Weight of the unlabelled part, at least 0.
    n_sigma, momentum, per_class
        As `SoftMatchWeighting` takes them; ``momentum`` is that of the alignment too. The
        default is for long training: 0.99 for some thousand steps.
    align : {"uniform", "model"} or None, default="uniform"
        Target of `UniformAlignment`; None does not align.
    hard_label : bool, default=True
        Whether a pseudo-label is the most probable class of the weak view, or its softmax.
    temperature : float, default=0.5
        Of that softmax, positive.
    reduction : {"mean", "sum"}, default="mean"
        Whether each part is divided by the size of its batch: by B, not by the sum of weights.

    Attributes
    ----------
    weights : Tensor of shape (B,)
        Weights of the last unlabelled batch.
    pseudo_labels : Tensor of shape (B,)
        Its most probable classes, of predictions that are not aligned.
    supervised, unsupervised : Tensor
        Both parts of the last loss, the second before ``lambda_u``; without a gradient.
    alignment, weighting : nn.Module
        Hold the running statistics.

    Raises
    ------
    ValueError
        If a parameter is out of range, shapes do not fit, a batch is empty, or (on the CPU,
        where reading is free) a logit is not finite or a label no class.

    Notes
    -----
    The gradient goes through ``logits_labeled`` and ``logits_strong``. No value is read from an
    accelerator: there ``logits_weak`` that are not finite leave the running statistics as they
    were, and the loss is not finite. In eval mode nothing is updated.

    References
    ----------
    .. [1] Chen et al. SoftMatch: Addressing the Quantity-Quality Tradeoff in Semi-supervised
       Learning. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.labels import SoftMatchLoss
    >>> criterion = SoftMatchLoss(3)
    >>> labeled, weak, strong = (torch.randn(n, 3, requires_grad=True) for n in (4, 8, 8))
    >>> criterion(labeled, torch.tensor([0, 1, 2, 0]), weak, strong).backward()
    >>> weak.grad is None, criterion.weights.shape
    (True, torch.Size([8]))
    """

    weights: Tensor
    pseudo_labels: Tensor
    supervised: Tensor
    unsupervised: Tensor

    def __init__(
        self, n_classes: int, *, lambda_u: float = 1.0, n_sigma: float = 2.0, momentum: float = 0.999,
        per_class: bool = False, align: Literal["uniform", "model"] | None = "uniform", hard_label: bool = True,
        temperature: float = 0.5, reduction: Literal["mean", "sum"] = "mean",
    ) -> None:  # fmt: skip
        super().__init__()
        one_of("align", align, ("uniform", "model", None))
        of = {"n_classes": n_classes, "momentum": momentum}
        self.alignment = None if align is None else UniformAlignment(**of, target=align)
        self.weighting = SoftMatchWeighting(**of, n_sigma=n_sigma, per_class=per_class)
        self.n_classes = n_classes
        self.lambda_u = at_least("lambda_u", lambda_u, 0)
        self.hard_label = hard_label
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.reduction = one_of("reduction", reduction, ("mean", "sum"))

    @widened
    def forward(
        self,
        logits_labeled: Float[Tensor, "labeled classes"],
        y: Int[Tensor, " labeled"],
        logits_weak: Float[Tensor, "batch classes"],
        logits_strong: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, ""]:
        """Return the loss, and in training mode update the running statistics before.

        ``y`` holds the classes of the labelled examples; ``logits_weak`` and ``logits_strong``
        belong to a weakly and a strongly distorted view of the same unlabelled ones.
        """
        y = self._check(logits_labeled, y, logits_weak, logits_strong)
        with torch.no_grad():
            probs = logits_weak.softmax(1)
            pseudo = logits_weak.argmax(1)  # of what the network says: alignment only weighs
            if self.alignment is not None:
                labeled = logits_labeled.softmax(1) if self.alignment.target == "model" else None
                probs = self.alignment._align(probs, labeled)
            weights = self.weighting._weigh(probs)
            target = pseudo if self.hard_label else (logits_weak / self.temperature).softmax(1)
        supervised = F.cross_entropy(logits_labeled, y, reduction=self.reduction)
        unsupervised = weights @ F.cross_entropy(logits_strong, target, reduction="none")
        if self.reduction == "mean":
            unsupervised = unsupervised / len(weights)
        self.weights, self.pseudo_labels = weights, pseudo
        self.supervised, self.unsupervised = supervised.detach(), unsupervised.detach()
        return supervised + self.lambda_u * unsupervised

    def _check(self, labeled: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        """Return classes as 64-bit integers, once all that came fits."""
        given = {"logits_labeled": labeled, "logits_weak": weak, "logits_strong": strong}
        for name, logits in given.items():
            _rows(name, logits, self.n_classes)
        has_shape("logits_strong", strong, tuple(weak.shape), "logits_weak")
        y = _codes("y", y, len(labeled), "logits_labeled")
        if not _readable(y):
            return y
        low, high = y.aminmax()
        if int(low) < 0 or int(high) >= self.n_classes:
            raise ValueError(
                f"y must be in 0..{self.n_classes - 1}, got values from {int(low)} to {int(high)}"
            )
        for name, logits in given.items():
            # a sum costs little; where it overflows, every value is asked
            if not (math.isfinite(logits.detach().sum()) or bool(logits.isfinite().all())):
                raise ValueError(f"{name} must be finite: logits are not finite, got NaN or infinity")
        return y


def quantity_quality(
    weights: Float[Tensor, " batch"], pseudo: Int[Tensor, " batch"], target: Int[Tensor, " batch"]
) -> tuple[float, float]:
    """Return how much of the unlabelled data is used, and how much of that use is right.

    Parameters
    ----------
    weights : Tensor
        In [0, 1]; the mask of a threshold is the case of 0 and 1.
    pseudo, target : Tensor
        Pseudo-labels and true classes.

    Returns
    -------
    tuple of float and float
        Mean weight, and share of the weight that lies on right pseudo-labels: NaN if all
        weights are 0.

    Raises
    ------
    ValueError
        If a batch is empty, sizes differ, or a weight lies outside [0, 1].

    References
    ----------
    .. [1] Chen et al. SoftMatch. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.labels import quantity_quality
    >>> quantity_quality(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
    (0.5, 0.6666666666666666)
    """
    n = len(has_shape("weights", floating("weights", weights), (None,)))
    pseudo, target = _codes("pseudo", pseudo, n, "weights"), _codes("target", target, n, "weights")
    if not n:
        raise ValueError("weights must have at least one value, got none")
    exact = weights.detach().cpu().double()
    if not bool(((exact >= 0) & (exact <= 1)).all()):  # NaN is neither
        raise ValueError(f"weights must be in [0, 1], got values from {exact.min():g} to {exact.max():g}")
    total = float(exact.sum())
    right = float(exact[(pseudo == target.to(pseudo.device)).cpu()].sum())
    return total / n, right / total if total else float("nan")


def _readable(x: Tensor) -> bool:
    """Return whether values may be looked at: on the CPU, where none waits, outside torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _rows(name: str, value: Tensor, n_classes: int) -> None:
    if not len(has_shape(name, floating(name, value), (None, n_classes), "n_classes")):
        raise ValueError(f"{name} must have at least one row, got none")


def _shares(name: str, probs: Tensor, n_classes: int) -> Tensor:
    """Return rows of probabilities."""
    _rows(name, probs, n_classes)
    if _readable(probs):
        x = wide(probs.detach())
        if not bool((x >= 0).all()):
            raise ValueError(f"{name} must be probabilities, got {float(x.min()):g} among them")
        off = (x.sum(1) - 1).abs()
        if not bool((off <= OFF_ONE).all()):
            row = int(off.nan_to_num(torch.inf).argmax())
            raise ValueError(
                f"{name} must be rows that sum to 1, got {float(x[row].sum()):g} in row {row}: take the softmax first"
            )
    return probs


def _codes(name: str, value: Tensor, n: int, source: str) -> Tensor:
    """Return classes as 64-bit integers."""
    kind = getattr(value, "dtype", type(value).__name__)
    if kind not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"{name} must be a tensor of integers, got {kind}")
    return has_shape(name, value, (n,), source).long()


@torch.no_grad()
@widened
def _constant(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    return function(*args)


def _means(*batches: Tensor) -> list[Tensor]:
    """Return the mean row of each batch, over all processes."""
    if n_processes() == 1:
        return [batch.mean(0) for batch in batches]
    sums = torch.stack([F.pad(batch.sum(0), (0, 1), value=len(batch)) for batch in batches])
    distributed.all_reduce(sums)
    return list(sums[:, :-1] / sums[:, -1:])


def _moments(x: Tensor, label: Tensor | None, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and unbiased variance of values, of each class if labels are given.

    They are those of all processes: sums and sums of squares are added up, in float64 where
    the device has it, since they nearly cancel.
    """
    x = x if x.device.type == "mps" else x.double()
    sums = torch.stack([torch.ones_like(x), x, x.square()])  # (3, batch)
    if label is None:
        sums = sums.sum(1)
    else:
        sums = sums.new_zeros(3, n_classes).index_add_(1, label, sums)
    if n_processes() > 1:
        distributed.all_reduce(sums)
    n, total, squares = sums
    mean = total / n.clamp_min(1)
    return n, mean, ((squares - total * mean) / (n - 1).clamp_min(1)).clamp_min(0)


def _move(running: Tensor, now: Tensor, rate: Tensor | float) -> None:
    """Move a running statistic towards that of a batch, unless this is not finite."""
    now = now.to(running)
    if not _readable(now):  # where no check came before
        now = torch.where(now.isfinite(), now, running)
    running.lerp_(now, rate)
