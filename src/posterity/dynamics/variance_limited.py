r"""Is a network limited by its width? The part of its error that is chance of its initialisation.

Networks of the same width, trained on the same data from different initial weights, err together and apart:

.. math:: E\,\mathrm{mean}\,(f - y)^2 = \mathrm{mean}\,(E f - y)^2 + \mathrm{mean}\,\mathrm{Var} f.  \qquad (1)

The first part is what an infinite ensemble would be left with, much as a wider network; the
second is the variance, of which an average of e networks keeps 1/e. With more data the variance
takes over: at some sample size P* it is half of the error, and from there a network of
this width no longer follows its infinite-width limit. P* grows about as the root of the width, and
later for networks that learn features ("rich", a small output scale) than for those that do not ("lazy").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from posterity._checks import finite, floating, has_shape, integer, within
from posterity._precision import wide
from posterity._random import draw_device
from posterity.dynamics._harmonics import count, zonal
from posterity.dynamics._plots import axes

__all__ = [
    "InitializationVariance", "PowerLaw", "initialization_variance", "onset_exponent", "sphere_polynomial",
    "variance_onset",
]  # fmt: skip


@dataclass(frozen=True)
class InitializationVariance:
    """Errors of networks of one width and their parts (1): scalars, on the CPU.

    Attributes
    ----------
    error : Tensor
        Mean squared error of single networks.
    ensemble_error : Tensor
        That of the average of all of them.
    variance : Tensor
        Unbiased variance over networks, mean over samples and outputs.
    infinite_ensemble_error : Tensor
        ``error - variance``: an unbiased estimate, which chance may bring below 0.
    fraction : Tensor
        ``variance / error``, at most 1, and 0 where there is no error.
    n_models : int
    """

    error: Float[Tensor, ""]
    ensemble_error: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    infinite_ensemble_error: Float[Tensor, ""]
    fraction: Float[Tensor, ""]
    n_models: int

    def ensemble(self, size: int) -> Float[Tensor, ""]:
        """Return the expected error of the average of ``size`` networks, at least 1."""
        return self.infinite_ensemble_error + self.variance / integer("size", size, 1)

    def plot(self, ax: Any = None) -> Any:
        """Draw the expected error over the number of networks averaged, and where it ends; return the Axes."""
        ax = axes(ax)
        sizes = range(1, 2 * self.n_models + 1)
        ax.plot(sizes, [float(self.ensemble(size)) for size in sizes], label="average of networks")
        ax.plot([self.n_models], [float(self.ensemble_error)], "o", label="of all that were trained")
        ax.axhline(float(self.infinite_ensemble_error), linestyle="--", label="infinite ensemble")
        ax.set(xlabel="networks averaged", ylabel="mean squared error", xscale="log")
        ax.legend()
        return ax


def initialization_variance(
    predictions: Float[Tensor, "members n k"], y: Float[Tensor, "n k"]
) -> InitializationVariance:
    """Return how much of the error of networks is variance over their initial weights.

    Parameters
    ----------
    predictions : Tensor of shape (E, n, k)
        Of E networks, at least 2, trained on the same data: average over data sets outside.
    y : Tensor of shape (n, k)
        What they should be.

    Returns
    -------
    InitializationVariance
        In the dtype of ``predictions``, float32 at least.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or squares leave the dtype.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import initialization_variance
    >>> found = initialization_variance(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[3.0]]))
    >>> found.error, found.variance, found.ensemble(2), found.ensemble_error
    (tensor(5.), tensor(2.), tensor(4.), tensor(4.))
    """
    members, n, k = has_shape("predictions", floating("predictions", predictions), (None, None, None)).shape
    has_shape("y", floating("y", y), (n, k), "predictions")
    if members < 2:
        raise ValueError(f"predictions must be of at least 2 networks, got {members}: one has no variance")
    if n == 0 or k == 0:
        raise ValueError(
            f"predictions must have at least one sample and output, got {tuple(predictions.shape)}"
        )
    finite("predictions", predictions)
    finite("y", y)
    dtype = wide(predictions.detach()[:0]).dtype
    f, target = (part.detach().cpu().double() for part in (predictions, y))
    error = (f - target).square().mean()
    variance = f.var(0).mean()
    total = (f.mean(0) - target).square().mean()
    fraction = torch.where(error > 0, (variance / error).clamp(max=1), 0.0)
    found = InitializationVariance(
        *(part.to(dtype) for part in (error, total, variance, error - variance, fraction)), n_models=members
    )
    if not bool(found.error.isfinite()):
        raise ValueError(f"predictions must have squared errors that {dtype} can hold")
    return found


def variance_onset(
    sizes: Sequence[int], fraction: Sequence[float | Tensor], *, threshold: float = 0.5
) -> float:
    """Return the sample size P* at which variance first is half, or another share, of the error.

    Parameters
    ----------
    sizes : sequence of int
        Increasing, positive.
    fraction : sequence of float or scalar Tensor
        In [0, 1], one a size: `InitializationVariance.fraction`.
    threshold : float, default=0.5
        In (0, 1).

    Returns
    -------
    float
        Linear in the logarithm of the size between the two around the crossing; the first size if
        the share is reached there, nan if it never is.

    Raises
    ------
    ValueError
        If sizes or fractions are not as above.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior. ICLR 2023. Section 3.

    Examples
    --------
    >>> from posterity.dynamics import variance_onset
    >>> round(variance_onset([10, 20, 40, 80], [0.1, 0.3, 0.7, 0.9]), 3)  # 20 sqrt(2)
    28.284
    """
    p, share = _numbers("sizes", sizes), _numbers("fraction", fraction)
    if not len(p):
        raise ValueError("sizes must have at least one size, got none")
    if len(p) != len(share):
        raise ValueError(f"fraction must have one value a size, got {len(share)} for {len(p)}")
    if not (np.isfinite(p).all() and (p > 0).all() and (np.diff(p) > 0).all()):
        raise ValueError(f"sizes must be positive and increase, got {p.tolist()}")
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"fraction must be in [0, 1], got {share.tolist()}")
    within("threshold", threshold, 0, 1, open_low=True, open_high=True)
    above = np.flatnonzero(share >= threshold)
    if not len(above):
        return float("nan")
    at = above[0]
    if at == 0:
        return float(p[0])
    way = (threshold - share[at - 1]) / (share[at] - share[at - 1])
    return float(p[at - 1] * (p[at] / p[at - 1]) ** way)


@dataclass(frozen=True)
class PowerLaw:
    """``prefactor * x ** exponent``, fitted on logarithms.

    Attributes
    ----------
    exponent, prefactor : float
    r2 : float
        Share of the variance of the logarithms that the line explains; nan where there is none.
    stderr : float
        Standard error of the exponent; nan for two points.
    """

    exponent: float
    prefactor: float
    r2: float
    stderr: float


def onset_exponent(widths: Sequence[int], onsets: Sequence[float]) -> PowerLaw:
    """Return the power of the width by which the onset of variance grows: about 1/2 for polynomials.

    Parameters
    ----------
    widths : sequence of int
        Positive.
    onsets : sequence of float
        Positive, one a width, as `variance_onset` returns them; those that are not finite do not count.

    Returns
    -------
    PowerLaw
        Of least squares in log-log.

    Raises
    ------
    ValueError
        If there are not two widths with a finite onset, or a number is not positive.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior. ICLR 2023. Section 3.

    Examples
    --------
    >>> from posterity.dynamics import onset_exponent
    >>> round(onset_exponent([16, 64, 256], [30, 60, 120]).exponent, 3)
    0.5
    """
    x, onset = _numbers("widths", widths), _numbers("onsets", onsets)
    if len(x) != len(onset):
        raise ValueError(f"onsets must have one value a width, got {len(onset)} for {len(x)}")
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise ValueError(f"widths must be positive, got {x.tolist()}")
    known = np.isfinite(onset)
    x, onset = x[known], onset[known]
    if (onset <= 0).any():
        raise ValueError(f"onsets must be positive, got {onset.tolist()}")
    if len(np.unique(x)) < 2:
        raise ValueError(f"onsets must be finite at two widths or more, got {len(np.unique(x))}")
    a, b = np.log(x), np.log(onset)
    fit: Any = stats.linregress(a, b)
    left = float(np.square(b - fit.intercept - fit.slope * a).sum())
    total = float(np.square(b - b.mean()).sum())
    return PowerLaw(
        float(fit.slope), float(np.exp(fit.intercept)), 1 - left / total if total else float("nan"),
        float(fit.stderr) if len(x) > 2 else float("nan"),
    )  # fmt: skip


def sphere_polynomial(
    n: int,
    dim: int,
    degree: int,
    *,
    direction: Float[Tensor, " dim"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n 1"]]:
    r"""Draw points on the unit sphere and a polynomial of one degree there, of mean square 1.

    :math:`y = \sqrt{N(d, k)}\, P_{k,d}(\beta \cdot x)`, P Gegenbauer's polynomial with P(1) = 1 and
    N the number of harmonics of degree k in d dimensions.

    Parameters
    ----------
    n : int
        At least 1.
    dim : int
        At least 2.
    degree : int
        At least 0.
    direction : Tensor of shape (dim,), optional
        Not 0; its length does not matter. By default the first axis, so that two calls draw of one
        function.
    generator : torch.Generator, optional
        Of the points.

    Returns
    -------
    x : Tensor of shape (n, dim)
        Uniform on the sphere, in the dtype and on the device of ``direction``.
    y : Tensor of shape (n, 1)
        The polynomial there.

    Raises
    ------
    ValueError
        If a number is out of range, or ``direction`` does not fit.

    Notes
    -----
    1. The official code divides by the root mean square over 1,000 draws, here the norm is exact.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import sphere_polynomial
    >>> x, y = sphere_polynomial(5, dim=4, degree=1, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(y[:, 0], 2 * x[:, 0]), torch.allclose(x.norm(dim=1), torch.ones(5))
    (True, True)
    """
    integer("n", n, 1)
    integer("dim", dim, 2)
    integer("degree", degree, 0)
    size = count(degree, dim)
    if size.bit_length() > 1000:
        raise ValueError(
            f"degree must be lower: {degree} has more harmonics in {dim} dimensions than numbers hold"
        )
    if direction is None:
        direction = torch.zeros(dim)
        direction[0] = 1
    finite("direction", has_shape("direction", floating("direction", direction), (dim,), "dim"))
    beta = direction.detach().cpu().double()
    if not bool(beta.any()):
        raise ValueError("direction must not be 0")
    x = torch.randn(n, dim, generator=generator, device=draw_device(generator), dtype=torch.float64).cpu()
    x = x / x.norm(dim=1, keepdim=True)
    *_, value = zonal(x @ (beta / beta.abs().max()) / (beta / beta.abs().max()).norm(), degree, dim)
    y = size**0.5 * value[:, None]
    return x.to(direction), y.to(direction)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.array([float(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}") from error
