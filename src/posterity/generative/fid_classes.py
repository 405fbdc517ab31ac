"""What the Fréchet distance of features measures, by gaming it: resampling against an extractor.

FID looks through the eyes of a classifier. Of images that a generator made anyway, others are drawn, in proportion to
weights w_i = exp(l_i) that minimise the distance of the weighted set from the real one,

    min over l of FID( (m_r, C_r), (m_w, C_w) ),  m_w = sum w f / W,  C_w = sum w (f - m_w)(f - m_w)^T / (W - 1).  (1)

No image changes, and FID falls by a half or more; in features of another network the same draw gains hardly anything.
Which part of the features is matched can be chosen: all of them, or the classes on top of the classifier's list alone
(`class_indicators`, and `match_class_histogram` where that has a closed form). A fall of FID that such a
draw gets as well says nothing about images.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, class_indices, finite, floating, has_shape, integer, one_of
from posterity._random import draw_device
from posterity.generative.fid_sensitivity import AT_ONCE, _influence
from posterity.generative.frechet import _factor, _inverse_root, _samples, feature_stats

__all__ = ["Resampling", "class_indicators", "match_class_histogram", "resample_weights"]

PATIENCE = 10  # iterations over which progress is judged by tol


class Resampling(NamedTuple):
    """Weights by which generated samples are drawn, as `resample_weights` finds them.

    Attributes
    ----------
    log_weights : Tensor of shape (m,)
        Their exponentials sum to m.
    history : Tensor of shape (iterations + 1,)
        The distance of the weighted set before each iteration, and after the last.
    """

    log_weights: Tensor
    history: Tensor

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Int[Tensor, " n"]:
        """Return indices of n samples, drawn with replacement in proportion to the weights.

        Parameters
        ----------
        n : int
            How many, at least 1.
        generator : torch.Generator, optional
            Of any device.

        Returns
        -------
        Tensor of shape (n,), int64

        Raises
        ------
        ValueError
            If ``n`` is out of range.
        """
        integer("n", n, 1)
        weights = (self.log_weights.double() - self.log_weights.double().max()).exp()
        ends = weights.cumsum(0)
        level = torch.rand(
            n, dtype=torch.float64, generator=generator, device=draw_device(generator, ends.device)
        )
        last = torch.searchsorted(
            ends, ends[-1:]
        )  # rounding may reach the end, behind which all weights are 0
        return torch.searchsorted(ends, level.to(ends.device) * ends[-1], right=True).minimum(last)


def class_indicators(
    real_logits: Float[Tensor, "n classes"], gen_logits: Float[Tensor, "m classes"], n: int = 1, *,
    which: Literal["top", "middle"] = "top",
) -> tuple[Float[Tensor, "n kept"], Float[Tensor, "m kept"]]:  # fmt: skip
    """Return which classes are among the N largest logits of each row, as features to `resample_weights` by.

    Parameters
    ----------
    real_logits, gen_logits : Tensor of shape (n, classes) and (m, classes)
        Of the real and the generated samples, from one classifier.
    n : int, default=1
        N, at least 1, at most the number of classes.
    which : {"top", "middle"}, default="top"
        "middle" takes the N logits in the middle of a row's order, which say nothing: a control.

    Returns
    -------
    tuple of Tensor of shape (n, kept) and (m, kept)
        1 where a class is among them, else 0, in the dtypes of the logits; of the classes that occur in both sets.

    Raises
    ------
    ValueError
        If shapes do not fit, ``n`` is out of range, a logit is not finite, or no class occurs in both.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 3.

    Examples
    --------
    The class that only the generated samples have on top is left out:

    >>> import torch
    >>> from posterity.generative import class_indicators
    >>> real, generated = torch.eye(3)[[0, 1, 1]], torch.eye(3)[[0, 2, 1]]
    >>> class_indicators(real, generated)[1]
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.]])
    """
    one_of("which", which, ("top", "middle"))
    rows = {"real_logits": real_logits, "gen_logits": gen_logits}
    for name, logits in rows.items():
        finite(name, has_shape(name, floating(name, logits), (None, None)).detach())
        if not logits.numel():
            raise ValueError(f"{name} must have at least one row and class, got {tuple(logits.shape)}")
    n_classes = real_logits.shape[1]
    has_shape("gen_logits", gen_logits, (None, n_classes), "real_logits")
    if integer("n", n, 1) > n_classes:
        raise ValueError(f"n must be at most the number of classes, {n_classes}, got {n}")
    first = 0 if which == "top" else n_classes // 2 - n // 2
    marks = []
    for logits in rows.values():
        order = logits.detach().sort(dim=1, descending=True, stable=True).indices
        marks.append(torch.zeros_like(logits.detach()).scatter(1, order[:, first : first + n], 1.0))
    shared = (marks[0] > 0).any(0) & (marks[1] > 0).any(0).to(marks[0].device)
    if not shared.any():
        raise ValueError(
            f"real_logits and gen_logits must have a class in common among their {which} {n}, have none"
        )
    return marks[0][:, shared], marks[1][:, shared.to(marks[1].device)]


def match_class_histogram(
    real_classes: Int[Tensor, " n"], gen_classes: Int[Tensor, " m"], *, n_classes: int
) -> Float[Tensor, " m"]:
    """Return log weights under which generated classes are as frequent as real ones: Top-1 alignment, closed.

    A sample of class c weighs p_real(c) / p_generated(c). Real classes that no generated sample has are left out,
    and the others share what is left; generated classes that no real sample has weigh nothing.

    Parameters
    ----------
    real_classes, gen_classes : Tensor of shape (n,) and (m,)
        Predicted classes, of one classifier for both.
    n_classes : int
        How many classes there are, at least 1; classes are 0 to n_classes - 1.

    Returns
    -------
    Tensor of shape (m,), float64
        Their exponentials sum to m; minus infinity for no weight.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, a class is out of range, or no class occurs in both.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import match_class_histogram
    >>> match_class_histogram(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), n_classes=3).exp()
    tensor([1.5000, 1.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    integer("n_classes", n_classes, 1)
    counts = []
    for name, classes in (("real_classes", real_classes), ("gen_classes", gen_classes)):
        if not isinstance(classes, Tensor) or classes.ndim != 1 or not len(classes):
            shown = tuple(classes.shape) if isinstance(classes, Tensor) else type(classes).__name__
            raise ValueError(f"{name} must have shape (n,) with at least one class, got {shown}")
        codes = class_indices(name, classes.cpu(), len(classes), n_classes).long()
        counts.append(torch.bincount(codes, minlength=n_classes).double())
    real, generated = counts
    shared = (real > 0) & (generated > 0)
    if not shared.any():
        raise ValueError("real_classes and gen_classes must have a class in common, have none")
    share = real * shared / real[shared].sum()
    weights = len(gen_classes) * share / generated.clamp_min(1)
    return weights.log().to(gen_classes.device)[gen_classes.long()]


@torch.inference_mode(False)
@torch.no_grad()
def resample_weights(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], *, max_iter: int = 200, lr: float = 0.05,
    optimizer: Literal["adam", "sgd"] = "adam", tol: float = 0.0,
) -> Resampling:  # fmt: skip
    """Return weights of generated samples that minimise the Fréchet distance to the real ones, equation 1.

    Draw by them, and compare the distance of what is drawn with that of as many uniform draws, in these features and in
    those of an unrelated network: if only the first falls, the gain is the extractor's and not the images'.

    Parameters
    ----------
    real, generated : Tensor of shape (n, d) and (m, d)
        Features to be matched: pre-logits, logits, or `class_indicators`. The paper takes five times as
        many generated samples as real ones.
    max_iter : int, default=200
        Steps over the full set, at least 1.
    lr : float, default=0.05
        Of the log weights; positive. With "sgd" gradients are of the order 1 / m: take 10.
    optimizer : {"adam", "sgd"}, default="adam"
        "sgd" is plain gradient descent, the official choice, with up to 100,000 steps.
    tol : float, default=0.0
        Stop once ten steps lowered the distance by no more than this share of it; at least 0, and 0 never stops.

    Returns
    -------
    Resampling
        The best weights that were met, the uniform ones among them, in float64.

    Raises
    ------
    ValueError
        If shapes do not fit, there are fewer than 2 samples, a value is not finite, an option is out of range,
        or ``lr`` so large that weights overflow.

    Notes
    -----
    1. The gradient is the closed form of the paper's problem; the official code differentiates the eigenvalues
       of the product of the covariances.
    2. Log weights are shifted after each step so that weights sum to m: the distance depends on their sum by the
       unbiased W - 1 alone, and official steps let it drift.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 3.

    Examples
    --------
    Half of the generated samples are real, and the others far away:

    >>> import torch
    >>> from posterity.generative import resample_weights
    >>> real = torch.tensor([[-1.0], [1.0]])
    >>> found = resample_weights(real, torch.cat([real, real + 50]))
    >>> bool((found.log_weights.exp()[2:] < 0.05).all())
    True
    """
    integer("max_iter", max_iter, 1)
    at_least("lr", lr, 0, strict=True)
    at_least("tol", tol, 0)
    one_of("optimizer", optimizer, ("adam", "sgd"))
    y, x = _samples("real", real), _samples("generated", generated).clone()
    has_shape("generated", x, (None, y.shape[1]), "real")
    target, _ = feature_stats(y), feature_stats(x)  # which say so where squares are too large
    m, gap = len(x), -target.mean.to(x.device)
    root, spread = _factor(target.cov).to(x.device), float(target.cov.trace())
    logs = torch.zeros(m, dtype=x.dtype, device=x.device)
    first, second, unit = torch.zeros_like(logs), torch.zeros_like(logs), 0.0
    best, history = logs.clone(), []
    for k in range(max_iter + 1):
        weights = logs.exp()
        mean = weights @ x / m
        x -= mean  # x stays centred, gap is how far that is from the real mean
        gap += mean
        cov = _scatter(x, weights) / (m - 1)
        p, s, _ = torch.linalg.svd(root.mT @ _factor(cov), full_matrices=False)
        distance = float(gap.square().sum() + cov.trace() - 2 * s.sum()) + spread
        if distance <= min(history, default=distance):
            best.copy_(logs)
        history.append(distance)
        before = min(history[:-PATIENCE], default=float("inf"))
        if k == max_iter or (tol and min(history) > (1 - tol) * before):
            break
        slope = _influence(x, weights, gap, _inverse_root(root, p, s), m)
        if optimizer == "adam":
            unit = unit or float(slope.abs().max()) or 1.0  # features may have any
            slope = slope / unit
            first.lerp_(slope, 0.1)
            second.lerp_(slope.square(), 0.001)
            slope = first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        logs -= lr * slope
        logs -= logs.logsumexp(0) - torch.tensor(float(m), dtype=x.dtype).log().to(x.device)
        if not bool(logs.isfinite().all()):
            raise ValueError(f"lr must be smaller, weights are no longer finite after {k + 1} steps of {lr}")
    return Resampling(best, torch.tensor(history, dtype=torch.float64).clamp_min(0).to(x.device))


def _scatter(x: Float[Tensor, "m d"], weights: Float[Tensor, " m"]) -> Float[Tensor, "d d"]:
    """Return x^T diag(weights) x."""
    out = x.new_zeros(x.shape[1], x.shape[1])
    for rows, some in zip(x.split(AT_ONCE), weights.split(AT_ONCE), strict=True):
        out.addmm_((rows * some[:, None]).mT, rows)
    return out
