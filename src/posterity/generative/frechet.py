"""The Fréchet distance of two sets of features, by their means and covariances.

    FID = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^{1/2} C_b C_a^{1/2})^{1/2}             (1)

With C_a = F_a F_a^T and C_b = F_b F_b^T (Cholesky factors, or what eigenvectors leave of a singular one) the last trace
is the sum of the singular values s of F_a^T F_b = P s Q^T: there is no matrix square root. Those of wide features are
roots of eigenvalues, which are cheaper, where that errs by less than 1e-7 of the traces. The gradient is closed too,

    d FID / d C_b = I - F_a P s^{-1} P^T F_a^T,    d FID / d C_a = I - F_b Q s^{-1} Q^T F_b^T,  (2)

and stays finite for equal or no singular values, where that of an eigendecomposition does not.
"""

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import finite, floating, has_shape

__all__ = ["FeatureStats", "add_to_stats", "feature_stats", "frechet_distance"]

NOTHING = 1e-10  # singular values below this share of the largest have no inverse
LARGE, SLACK = 256, 1e-7


class FeatureStats(NamedTuple):
    """Mean and covariance of a set of features, as `feature_stats` makes them.

    Attributes
    ----------
    mean : Tensor of shape (d,)
    cov : Tensor of shape (d, d)
        Unbiased: divided by n - 1.
    n : float or Tensor
        The number of samples, or the sum of their weights.
    """

    mean: Tensor
    cov: Tensor
    n: float | Tensor


def feature_stats(
    features: Float[Tensor, "n d"], log_weights: Float[Tensor, " n"] | None = None
) -> FeatureStats:
    """Return mean and unbiased covariance of features, plain or weighted, in float64.

    With w = exp(log_weights) and W their sum, the mean is sum w f / W and the covariance
    sum w (f - mean)(f - mean)^T / (W - 1), so that a weight of 2 is the sample twice.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Floating-point, at least 2 rows; gradients go through them.
    log_weights : Tensor of shape (n,), optional
        Minus infinity leaves a sample out. At least two samples have a weight, and the weights sum to
        more than 1; gradients go through them.

    Returns
    -------
    FeatureStats
        In float64 whatever the dtype of ``features``.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, there are fewer than 2 samples, or a value is not finite.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 3
       and appendix (weighted statistics).

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import feature_stats
    >>> mean, cov, n = feature_stats(torch.tensor([[1.0], [3.0]]))
    >>> float(mean), float(cov), n
    (2.0, 2.0, 2.0)
    """
    x = _samples("features", features)
    if log_weights is None:
        n, w = float(len(x)), None
        mean = x.mean(0)
    else:
        has_shape("log_weights", floating("log_weights", log_weights), (len(x),), "features")
        w = log_weights.double().exp()
        total = float(w.detach().sum())
        if not total < float("inf"):
            raise ValueError("log_weights must not be NaN and have finite exponentials, one has not")
        if int((w > 0).sum()) < 2 or total <= 1:
            raise ValueError(
                f"log_weights must give weights to at least 2 samples, of a sum above 1, got {total:g} on {int((w > 0).sum())}"
            )
        n = w.sum()
        mean = w @ x / n
    centred = x - mean
    cov = (centred if w is None else centred * w[:, None]).mT @ centred / (n - 1)
    if not bool(cov.detach().isfinite().all()):
        raise ValueError("features must have finite squares in float64, they are too large")
    return FeatureStats(mean, (cov + cov.mT) / 2, n)


def add_to_stats(stats: FeatureStats, feature: Float[Tensor, " d"] | Float[Tensor, "1 d"]) -> FeatureStats:
    """Return the statistics of a set with one sample more: exactly, by an update of rank one.

    Parameters
    ----------
    stats : FeatureStats
        Of the set as it is; of at least one sample.
    feature : Tensor of shape (d,) or (1, d)
        The sample; gradients go through it.

    Returns
    -------
    FeatureStats
        Of the larger set, in the dtype of ``stats``.

    Raises
    ------
    ValueError
        If the sizes differ, or a value is not finite.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import add_to_stats, feature_stats
    >>> mean, cov, n = add_to_stats(feature_stats(torch.tensor([[1.0], [3.0]])), torch.tensor([5.0]))
    >>> float(mean), float(cov), n
    (3.0, 4.0, 3.0)
    """
    mean, cov, n = _checked("stats", stats)
    if floating("feature", feature).ndim == 2 and len(feature) == 1:
        feature = feature[0]
    finite("feature", has_shape("feature", feature, tuple(mean.shape), "stats").detach())
    gap = feature.to(mean) - mean
    return FeatureStats(mean + gap / (n + 1), (n - 1) / n * cov + gap[:, None] * gap / (n + 1), n + 1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> Float[Tensor, ""]:
    """Return the Fréchet distance of two sets, equation 1, from their statistics.

    Of Inception's features it is the FID. The estimate is biased upwards, the more the fewer samples there
    are: compare only distances of equally many.

    Parameters
    ----------
    a, b : FeatureStats
        Of the two sets; which is which does not matter. Gradients go to both.

    Returns
    -------
    Tensor
        A scalar, at least 0, in the dtype of the statistics; computed in float64.

    Raises
    ------
    ValueError
        If the statistics are none, not finite, or of features of different size.

    Warns
    -----
    UserWarning
        If a set has fewer samples than features.

    Notes
    -----
    1. Where a set does not vary in some direction, the distance has no derivative for its variance there; the
       gradient is then that of the traces alone.

    References
    ----------
    .. [1] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium.
       NeurIPS 2017. Equation 6.

    Examples
    --------
    A shift by 3 and twice the deviation, of variance 2: 9 + (2 - 1)^2 2.

    >>> import torch
    >>> from posterity.generative import feature_stats, frechet_distance
    >>> a, b = feature_stats(torch.tensor([[-1.0], [1.0]])), feature_stats(torch.tensor([[1.0], [5.0]]))
    >>> frechet_distance(a, b).round(decimals=6)
    tensor(11., dtype=torch.float64)
    """
    a, b = _checked("a", a), _checked("b", b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b must have as many features as a, {len(a.mean)}, got {len(b.mean)}")
    for name, stats in (("a", a), ("b", b)):
        if _count(stats) < len(stats.mean):
            warnings.warn(
                f"{name} has {_count(stats):g} samples of {len(stats.mean)} features: fewer than features, "
                "the distance is biased upwards",
                stacklevel=2,
            )
    return _distance(a, b)


def _samples(name: str, value: Any, at_least_n: int = 2, hint: str = "") -> Float[Tensor, "n d"]:
    """Return features (n, d) in float64, or say what is wrong with them."""
    floating(name, value, hint)
    if value.ndim != 2 or not value.shape[1]:
        tail = f": {hint or 'pass images through an extractor first'}"
        raise ValueError(f"{name} must have shape (n, d), got {tuple(value.shape)}{tail}")
    if len(value) < at_least_n:
        raise ValueError(f"{name} must have at least {at_least_n} samples, got {len(value)}")
    finite(name, value.detach())
    return value.double()


def _checked(name: str, stats: Any) -> FeatureStats:
    """Return statistics, or say what is wrong with them."""
    if not isinstance(stats, FeatureStats):
        raise ValueError(
            f"{name} must be FeatureStats, as feature_stats makes them, got {type(stats).__name__}"
        )
    d = len(has_shape(f"{name}.mean", floating(f"{name}.mean", stats.mean), (None,)))
    has_shape(f"{name}.cov", floating(f"{name}.cov", stats.cov), (d, d), f"{name}.mean")
    for part in (stats.mean, stats.cov):
        finite(name, part.detach())
    if not isinstance(stats.n, int | float | Tensor) or not 1 <= _count(stats) < float("inf"):
        raise ValueError(f"{name}.n must be a number of samples, at least 1, got {stats.n!r}")
    if d == 0:
        raise ValueError(f"{name} must have at least 1 feature, got 0")
    return stats


def _count(stats: FeatureStats) -> float:
    return float(stats.n.detach() if isinstance(stats.n, Tensor) else stats.n)


def _factor(cov: Float[Tensor, "d d"]) -> Float[Tensor, "d k"]:
    """Return F with F F^T = cov: triangular where it can be, else of as many columns as the rank."""
    least = len(cov) * torch.finfo(cov.dtype).eps
    triangle, failed = torch.linalg.cholesky_ex(cov)
    if not failed and bool((triangle.diagonal().square() > least * cov.diagonal().max()).all()):
        return triangle
    values, vectors = torch.linalg.eigh(cov)
    if values[0] < -1e-3 * values.abs().max():
        raise ValueError(f"cov must be a covariance, but has an eigenvalue of {float(values[0]):g}")
    kept = values > least * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()


def _inverse_root(factor: Float[Tensor, "d k"], vectors: Tensor, values: Tensor) -> Float[Tensor, "d r"]:
    """Return B of equation 2, with I - B B^T the gradient: the pseudo-inverse where there is nothing."""
    kept = values > NOTHING * values[:1].sum()
    return factor @ vectors[:, kept] / values[kept].sqrt()


def _singular_values(product: Float[Tensor, "k l"], trace: float) -> Float[Tensor, " r"]:
    """Return singular values: of a large matrix by a fifth of the work, where that errs by little of the trace."""
    if min(product.shape) > LARGE:
        squares = torch.linalg.eigvalsh(
            product @ product.mT if len(product) <= product.shape[1] else product.mT @ product
        )
        error = (
            4 * torch.finfo(product.dtype).eps * squares[-1]
        )  # of each square, which a root of a small one magnifies
        found = squares.clamp_min(0).sqrt()
        if bool((error / found.clamp_min(error.sqrt())).sum() <= SLACK * trace):
            return found
    return torch.linalg.svdvals(product)


class _Frechet(torch.autograd.Function):
    """Equation 1 with the gradient of equation 2."""

    @staticmethod
    def forward(ctx: Any, mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
        one, other = _factor(cov_a), _factor(cov_b)
        product, gap = one.mT @ other, mean_a - mean_b
        if any(ctx.needs_input_grad):
            p, s, q = torch.linalg.svd(product, full_matrices=False)
            ctx.save_for_backward(gap, _inverse_root(one, p, s), _inverse_root(other, q.mT, s))
        else:
            s = _singular_values(product, float(cov_a.trace() + cov_b.trace()))
        return (gap.square().sum() + cov_a.trace() + cov_b.trace() - 2 * s.sum()).clamp_min(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        gap, towards_b, towards_a = ctx.saved_tensors
        eye = torch.eye(len(gap), dtype=gap.dtype, device=gap.device)
        slopes = [eye - root @ root.mT for root in (towards_a, towards_b)]
        return 2 * grad * gap, grad * slopes[0], -2 * grad * gap, grad * slopes[1]


def _distance(a: FeatureStats, b: FeatureStats) -> Float[Tensor, ""]:
    parts = (part.double() for stats in (a, b) for part in (stats.mean, stats.cov))
    return _Frechet.apply(*parts).to(a.mean.dtype)  # type: ignore[union-attr]
