r"""How much of each test sample's error is bias and how much variance, and how the two are tied together.

For members h_1 .. h_M of an ensemble, central prediction h and one-hot label e_y, the squared loss is

.. math:: \frac1M \sum_i \|h_i - e_y\|^2 = \|h - e_y\|^2 + \frac1M \sum_i \|h_i - h\|^2,

squared bias and variance, for every sample; cross-entropy has the same identity with the normalised
geometric mean as central prediction. In over-parameterised networks log variance and log squared bias of
correctly classified samples lie on a line of slope about 1 (`alignment`). Where the ensemble is calibrated,
the expected squared bias is :math:`1 - \|h\|^2`, so the spread tells the error without labels
(`calibration_link`).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from posterity._checks import at_least, class_indices, finite, has_shape, integer, one_of
from posterity._precision import rounding
from posterity.dynamics._plots import axes

__all__ = [
    "Alignment",
    "BiasVariance",
    "CalibrationLink",
    "alignment",
    "bias_variance",
    "calibration_link",
]

BLOCK = 2**21  # bytes of predictions that are held in float64 at once: they stay in the cache
SUMS = 1e-3  # how far the sum of a row of probabilities may be from 1
Loss = Literal["squared", "kl"]
Subset = Literal["correct", "incorrect", "all"]


@dataclass(frozen=True)
class BiasVariance:
    """The decomposition of each sample's loss: tensors on the CPU, in float64.

    Attributes
    ----------
    bias2, variance, risk : Tensor of shape (n,)
        Of the squared loss squared bias and variance, of cross-entropy in nats; risk is their sum.
    mean : Tensor of shape (n, K)
        Central predictions.
    correct : Tensor of shape (n,)
        Whether the largest entry of the central prediction is the label's.
    n_members : int
        M.
    loss : {"squared", "kl"}
        What was decomposed.
    unbiased : bool
        Whether the two are unbiased estimates.
    """

    bias2: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]
    risk: Float[Tensor, " n"]
    mean: Float[Tensor, "n classes"]
    correct: Bool[Tensor, " n"]
    n_members: int
    loss: Loss = "squared"
    unbiased: bool = False

    def plot(self, ax: Any = None) -> Any:
        """Draw variance against squared bias, both logarithmic, correctly and incorrectly classified samples apart.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default of a new figure.

        Returns
        -------
        matplotlib.axes.Axes
        """
        ax = axes(ax)
        for name, rows in (("correct", self.correct), ("incorrect", ~self.correct)):
            ax.plot(self.bias2[rows], self.variance[rows], ".", alpha=0.5, label=name)
        ax.axline((1e-3, 1e-3), (1e-1, 1e-1), color="0.5", linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="squared bias" if self.loss == "squared" else "bias")
        ax.set_ylabel("variance")
        ax.legend()
        return ax


@dataclass(frozen=True)
class Alignment:
    """A least-squares line of log variance on log squared bias.

    Attributes
    ----------
    slope, intercept : float
        Of natural logarithms.
    r2 : float
        Coefficient of determination.
    log_ratio, log_ratio_std : float
        Mean and standard deviation of log variance - log squared bias.
    spearman : float
        Rank correlation of the two.
    n, n_dropped : int
        Samples on the line, and samples of the subset left out because a value is not above the floor.
    """

    slope: float
    intercept: float
    r2: float
    log_ratio: float
    log_ratio_std: float
    spearman: float
    n: int
    n_dropped: int


@dataclass(frozen=True)
class CalibrationLink:
    """What a calibrated ensemble's spread says of its error: tensors on the CPU, in float64.

    Attributes
    ----------
    expected_bias2 : Tensor of shape (n,)
        1 - ||h||^2, without labels.
    gap : Tensor of shape (n,)
        ``expected_bias2`` less variance, 1 - mean_i ||h_i||^2 >= 0: 0 where all members are certain.
    residual : float
        Mean squared bias less its expectation: positive where the ensemble is over-confident.
    calibration_error : float
        Mean distance of squared bias from its expectation over bins, weighted by their samples.
    bin_expected, bin_bias2, bin_variance : Tensor of shape (bins,)
        Means in bins of equally many samples, in order of ``expected_bias2``.
    bin_count : Tensor of shape (bins,)
        Samples in each.
    """

    expected_bias2: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]
    residual: float
    calibration_error: float
    bin_expected: Float[Tensor, " bins"]
    bin_bias2: Float[Tensor, " bins"]
    bin_variance: Float[Tensor, " bins"]
    bin_count: Int[Tensor, " bins"]

    def plot(self, ax: Any = None) -> Any:
        """Draw squared bias and variance of the bins against the expected squared bias; calibrated is the diagonal.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default of a new figure.

        Returns
        -------
        matplotlib.axes.Axes
        """
        ax = axes(ax)
        ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
        ax.plot(self.bin_expected, self.bin_bias2, "o-", label="squared bias")
        ax.plot(self.bin_expected, self.bin_variance, "o-", label="variance")
        ax.set(xlabel="expected squared bias, without labels", ylabel="mean of a bin")
        ax.legend()
        return ax


@torch.no_grad()
def bias_variance(
    probs: Float[Tensor, "members n classes"] | Float[np.ndarray, "members n classes"],
    y: Int[Tensor, " n"] | Int[np.ndarray, " n"],
    *,
    loss: Loss = "squared",
    unbiased: bool = False,
    from_logits: bool = False,
) -> BiasVariance:
    r"""Decompose the loss of an ensemble's members into bias and variance, sample by sample.

    Parameters
    ----------
    probs : Tensor or ndarray of shape (M, n, K)
        Probabilities of M members, as ``torch.stack([m(x).softmax(-1) for m in models])`` or of scikit-learn's
        ``predict_proba``; with ``from_logits`` scores before the softmax.
    y : Tensor or ndarray of shape (n,)
        Labels in 0 .. K - 1.
    loss : {"squared", "kl"}, default="squared"
        Squared distance to the one-hot label, summed over classes; or cross-entropy, whose variance is
        the mean of KL(h || h_i) and whose bias is -log h[y].
    unbiased : bool, default=False
        Of the squared loss: variance times M / (M - 1), and squared bias less that over M, which may be
        negative. The sum stays the risk.
    from_logits : bool, default=False
        Then softmax is taken here, in float64, where it saturates late.

    Returns
    -------
    BiasVariance
        In one pass over blocks of samples, of which 2 MiB, or a single one, are in float64 at a time.

    Raises
    ------
    ValueError
        If shapes do not fit, rows are no probabilities or not finite, labels are out of range, or ``unbiased``
        is asked of one member or of cross-entropy.

    References
    ----------
    .. [1] Chen, Lukasik, Jitkrittum, You, Kumar. On Bias-Variance Alignment in Deep Models. ICLR 2024. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import bias_variance
    >>> probs = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    >>> found = bias_variance(probs, torch.tensor([0]))
    >>> found.bias2, found.variance, found.risk
    (tensor([0.1250], dtype=torch.float64), tensor([0.1250], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))
    """
    one_of("loss", loss, ("squared", "kl"))
    probs, y = _tensor("probs", probs), _tensor("y", y)
    m, n, k = has_shape("probs", probs, (None, None, None)).shape
    if not probs.is_floating_point():
        raise ValueError(f"probs must be a floating-point tensor, got dtype {probs.dtype}")
    if 0 in (m, k):
        raise ValueError(f"probs must have a member and a class, got shape {(m, n, k)}")
    y = class_indices("y", y, n, k).cpu().long()
    if unbiased and (m < 2 or loss == "kl"):
        raise ValueError(f"unbiased must be False for one member and for 'kl', got {m} members and {loss!r}")
    parts: list[tuple[Tensor, ...]] = []
    tiny = torch.finfo(torch.float64 if probs.dtype == torch.float64 else torch.float32).tiny
    size = max(1, BLOCK // (8 * m * k))
    for start in range(0, n, size):
        rows = slice(start, start + size)
        # samples last: whatever is summed over classes or members goes along rows of memory
        block = torch.empty((m, k, len(y[rows])), dtype=torch.float64, device=probs.device).copy_(
            probs[:, rows].mT
        )
        if from_logits:
            finite("probs", block)
        else:
            _are_probabilities(block, rounding(probs.dtype, SUMS))
            if loss == "kl":
                block = block.clamp_(min=tiny).log_()
        truth = y[rows].to(block.device)
        one = (
            _kl(block, truth) if loss == "kl" else _squared(block.softmax(1) if from_logits else block, truth)
        )
        parts.append(tuple(x.cpu() for x in one))
    empty = torch.zeros(0, dtype=torch.float64)
    bias2, variance, risk, mean = (
        (torch.cat(each) for each in zip(*parts, strict=True)) if parts else (empty, empty, empty, empty.view(0, k))
    )  # fmt: skip
    if unbiased:
        variance = variance * (m / (m - 1))
        bias2 = bias2 - variance / m
    return BiasVariance(bias2, variance, risk, mean, mean.argmax(1) == y, m, loss, unbiased)


def alignment(
    bv: BiasVariance, *, subset: Subset | Bool[Tensor, " n"] = "correct", floor: float = 1e-12
) -> Alignment:
    """Fit log variance = slope * log squared bias + intercept by least squares.

    Parameters
    ----------
    bv : BiasVariance
        Of two members or more.
    subset : {"correct", "incorrect", "all"} or Tensor of shape (n,), default="correct"
        Which samples, by name or by a mask of truth values.
    floor : float, default=1e-12
        Samples with a value not above it are left out and counted: saturated predictions, which float64
        from logits keeps longest.

    Returns
    -------
    Alignment
        The line, and how well it fits.

    Raises
    ------
    ValueError
        If fewer than three samples are left, or all have the same squared bias.

    References
    ----------
    .. [1] Chen, Lukasik, Jitkrittum, You, Kumar. On Bias-Variance Alignment in Deep Models. ICLR 2024. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import alignment, bias_variance, neural_collapse_ensemble
    >>> probs, y = neural_collapse_ensemble(500, 6, generator=torch.Generator().manual_seed(0))
    >>> line = alignment(bias_variance(probs, y))
    >>> 0.9 < line.slope < 1.1, line.r2 > 0.95
    (True, True)
    """
    at_least("floor", floor, 0.0)
    if isinstance(subset, Tensor):
        if subset.dtype != torch.bool or subset.shape != bv.bias2.shape:
            raise ValueError(
                f"subset must hold {len(bv.bias2)} truth values, got {subset.dtype} {tuple(subset.shape)}"
            )
        chosen = subset.cpu()
    else:
        one_of("subset", subset, ("correct", "incorrect", "all"))
        every = torch.ones_like(bv.correct)
        chosen = {"correct": bv.correct, "incorrect": ~bv.correct, "all": every}[subset]
    bias2, variance = bv.bias2[chosen], bv.variance[chosen]
    kept = (bias2 > floor) & (variance > floor) & bias2.isfinite() & variance.isfinite()
    n, n_dropped = int(kept.sum()), int((~kept).sum())
    if n < 3:
        raise ValueError(
            f"subset must have 3 samples with bias2 and variance above floor={floor:g}, got {n}, {n_dropped} were not: "
            "predictions that saturate keep more as logits in float64, and one member has no variance"
        )
    a, b = bias2[kept].log(), variance[kept].log()
    from_mean = a - a.mean()
    spread = from_mean.square().sum()
    if spread <= 1e-24 * n * a.square().max().clamp_min(1.0):
        raise ValueError(f"subset must have samples of different bias2, all {n} have the same")
    slope = (from_mean * (b - b.mean())).sum() / spread
    intercept = b.mean() - slope * a.mean()
    left, total = (b - slope * a - intercept).square().sum(), (b - b.mean()).square().sum()
    ratio = b - a
    return Alignment(
        float(slope), float(intercept), float(1 - left / total) if total > 0 else 1.0,
        float(ratio.mean()), float(ratio.std()), float(spearmanr(a, b).statistic) if total > 0 else float("nan"),
        n, n_dropped,
    )  # fmt: skip


def calibration_link(bv: BiasVariance, *, n_bins: int = 15) -> CalibrationLink:
    r"""Return the squared bias that calibration promises, and how far it is from what labels say.

    If the labels of samples with central prediction q are distributed as q, then E[bias^2 | h] = 1 - ||h||^2,
    while variance is mean_i ||h_i||^2 - ||h||^2: a calibrated ensemble's variance is at most its expected
    squared bias, and equal to it where its members are certain. Members and their mean cannot both be
    calibrated unless the variance is 0.

    Parameters
    ----------
    bv : BiasVariance
        Of the squared loss, not ``unbiased``.
    n_bins : int, default=15
        1 .. n.

    Returns
    -------
    CalibrationLink
        For each sample, and in bins.

    Raises
    ------
    ValueError
        If the decomposition is another, or has fewer samples than bins.

    References
    ----------
    .. [1] Jiang, Nagarajan, Baek, Kolter. Assessing Generalization of SGD via Disagreement. ICLR 2022. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import bias_variance, calibration_link
    >>> probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])  # certain members
    >>> link = calibration_link(bias_variance(probs, torch.tensor([0, 0])), n_bins=1)
    >>> link.expected_bias2, link.gap
    (tensor([0.5000, 0.0000], dtype=torch.float64), tensor([0., 0.], dtype=torch.float64))
    """
    if bv.loss != "squared" or bv.unbiased:
        raise ValueError(
            f"bv must be of the squared loss and not unbiased, got {bv.loss!r}, unbiased={bv.unbiased}"
        )
    n = len(bv.bias2)
    if integer("n_bins", n_bins, 1) > n:
        raise ValueError(f"n_bins must be at most the number of samples, {n}, got {n_bins}")
    expected = (bv.mean * (1 - bv.mean)).sum(1)
    bins = expected.argsort().tensor_split(n_bins)
    count = torch.tensor([len(rows) for rows in bins])
    means = [torch.stack([x[rows].mean() for rows in bins]) for x in (expected, bv.bias2, bv.variance)]
    gap = (expected - bv.variance).clamp_min(0)  # it is not negative, but for rounding
    return CalibrationLink(
        expected, gap, float(bv.bias2.mean() - expected.mean()),
        float((count * (means[1] - means[0]).abs()).sum() / n), *means, count,
    )  # fmt: skip


def _tensor(name: str, value: Any) -> Tensor:
    """Return a tensor or an array as a tensor."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        return torch.as_tensor(value)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor or an array of numbers, got {type(value).__name__}")
    return value.detach()


def _are_probabilities(block: Tensor, tol: float) -> None:
    """Refuse rows that are negative or do not sum to 1."""
    off = float((block.sum(1) - 1).abs().amax())
    if not off <= tol:  # NaN and infinity among them, which it is dear to look for first
        finite("probs", block)
        raise ValueError(
            f"probs must sum to 1 in each row, a sum is off by {off:.3g}: pass from_logits=True for logits"
        )
    if (least := float(block.amin())) < 0:
        raise ValueError(f"probs must not be negative, got {least:.3g}: pass from_logits=True for logits")


def _squared(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bias, variance, risk and central prediction; from differences, made in place, which keep small values."""
    mean = p.mean(0)
    p[:, y, torch.arange(len(y), device=y.device)] -= 1  # h_i - e_y
    risk = p.square().sum((0, 1)) / len(p)
    error = p.mean(0)
    p -= error
    return error.square().sum(0), p.square().sum((0, 1)) / len(p), risk, mean.T


def _kl(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bias, variance, risk and central prediction, from logits or logarithms of probabilities."""
    logs = scores.log_softmax(1)
    middle = logs.mean(0)
    central = middle.log_softmax(0)
    h, away = central.exp(), central - logs
    # the terms of KL(h || h_i) as h (u + exp(-u) - 1), u = log h - log h_i: none is negative, so nothing cancels
    terms = torch.where(away.abs() < 1, (away + torch.expm1(-away)) * h, h * away + logs.exp() - h)
    pick = y[None]
    return -central.gather(0, pick)[0], terms.sum((0, 1)) / len(terms), -middle.gather(0, pick)[0], h.T
