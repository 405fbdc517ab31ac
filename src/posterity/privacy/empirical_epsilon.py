"""What scores of an attack say of epsilon, and what theory promises for one Gaussian release.

If a release is (epsilon, delta)-differentially private then an attacker who says "present" where a
score reaches t, with false positives FPR and false negatives FNR, has

    epsilon >= log max( (1 - delta - FPR) / FNR, (1 - delta - FNR) / FPR ).                  (1)

With Clopper-Pearson upper limits of both rates in their place this is a lower limit of epsilon,
valid if t did not come from the same scores. The other side, for a sum of vectors of norm at most 1 to
which N(0, s^2 I) is added, one vector present or not: the least epsilon is

    Phi(1 / (2 s) - epsilon s) - exp(epsilon) Phi(-1 / (2 s) - epsilon s) = delta.           (2)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import betaincinv, erfcx, log_ndtr
from scipy.stats import norm
from torch import Tensor

from posterity._checks import at_least, one_of, within

__all__ = ["EpsilonEstimate", "empirical_epsilon", "gaussian_epsilon"]

With = Shaped[Tensor, " n"] | Shaped[ndarray, " n"] | Sequence[float]
Without = Shaped[Tensor, " m"] | Shaped[ndarray, " m"] | Sequence[float]


@dataclass(frozen=True)
class EpsilonEstimate:
    """What `empirical_epsilon` finds, at one threshold.

    Attributes
    ----------
    value : float
        Equation 1 at the rates that were seen, at least 0; infinite where no score is on the wrong side.
    lower : float
        Equation 1 at the upper limits of the rates, at least 0. It is a lower limit of epsilon, with
        the confidence that was asked for, if the threshold was fixed beforehand.
    upper : float
        Equation 1 at the lower limits of the rates: how strong this attack may be. It is no upper
        limit of epsilon, since other attacks may be stronger.
    threshold : float
        Scores from here on say that the canary is present.
    fpr, fnr : float
        Shares of scores without that reach the threshold, and of scores with that do not.
    """

    value: float
    lower: float
    upper: float
    threshold: float
    fpr: float
    fnr: float


def empirical_epsilon(
    scores_with: With,
    scores_without: Without,
    *,
    delta: float | None = None,
    confidence: float = 0.95,
    threshold: float | Literal["max"] = "max",
) -> EpsilonEstimate:
    """Return the epsilon that scores of an attack show, with its limits, equation 1.

    Parameters
    ----------
    scores_with, scores_without : array_like of shape (n,) and (m,)
        Of independent releases in which what is looked for took part, and did not; no NaN. Higher says present.
    delta : float, optional
        In [0, 1); by default 1 / (n + m).
    confidence : float, default=0.95
        Of ``lower``, and of ``upper``, in (0, 1).
    threshold : float or "max", default="max"
        Where to say present. ``"max"`` takes the score at which the value is largest, the first of
        equals: the usual point estimate, whose ``lower`` is optimistic, as the threshold is chosen on the scores
        that judge it. **A number that is fixed before any score is seen makes lower valid.** For scores of
        `canary_score` 0.5 is halfway, and ``0.5 + s**2 * gaussian_epsilon(s, delta)`` is best
        where the noise s is all that blurs them and scores are many thousands.

    Returns
    -------
    EpsilonEstimate
        The value, its limits, and the threshold with both of its rates.

    Raises
    ------
    ValueError
        If there are no scores, one is NaN, or a parameter is out of range.

    Notes
    -----
    1. Under ``"max"`` a threshold at which only one of the rates is 0 does not count, as in the official
       code; at a fixed one, the ratio in equation 1 that is not divided by 0 does.
    2. False positives are divided by m; the official code divides them by n.

    References
    ----------
    .. [1] Maddock, Sablayrolles, Stock. CANIFE: Crafting Canaries for Empirical Privacy Measurement
       in Federated Learning. ICLR 2023. Section 3.
    .. [2] Kairouz, Oh, Viswanath. The Composition Theorem for Differential Privacy. ICML 2015.
       Theorem 2.1, equation 1.

    Examples
    --------
    >>> from posterity.privacy import empirical_epsilon
    >>> found = empirical_epsilon([1.0] * 50, [0.0] * 50, threshold=0.5)  # told apart without an error
    >>> found.value, round(found.lower, 4)
    (inf, 2.5588)
    """
    present, absent = _scores("scores_with", scores_with), _scores("scores_without", scores_without)
    n, m = len(present), len(absent)
    delta = 1 / (n + m) if delta is None else within("delta", delta, 0, 1, open_high=True)
    within("confidence", confidence, 0, 1, open_low=True, open_high=True)
    if isinstance(threshold, str):
        one_of("threshold", threshold, ("max",))
        at = np.unique(np.concatenate([present, absent]))
    else:
        at = np.array([_fixed(threshold)])
    missed = np.searchsorted(np.sort(present), at)  # scores below
    false = m - np.searchsorted(np.sort(absent), at)
    values = _epsilon(false / m, missed / n, delta)
    if isinstance(threshold, str):
        values[(missed == 0) ^ (false == 0)] = 0.0
    best = int(values.argmax())
    k, j = int(missed[best]), int(false[best])
    level = (1 + confidence) / 2
    return EpsilonEstimate(
        value=float(values[best]),
        lower=float(_epsilon(_upper(j, m, level), _upper(k, n, level), delta)),
        upper=_steepest(1 - _upper(m - j, m, level), 1 - _upper(n - k, n, level), delta),
        threshold=float(at[best]),
        fpr=j / m,
        fnr=k / n,
    )


def gaussian_epsilon(
    noise_multiplier: float, delta: float, *, accountant: Literal["exact", "rdp"] = "exact"
) -> float:
    """Return the epsilon of one Gaussian release to which everybody is asked, equation 2.

    The sum of vectors of norm at most C, with noise N(0, (noise_multiplier C)^2 I), is (epsilon,
    delta)-differentially private for adding or removing one vector, and for no smaller epsilon. Sampling clients at
    random would make it smaller; many rounds add up to more.

    Parameters
    ----------
    noise_multiplier : float
        At least 0; without noise epsilon is infinite.
    delta : float
        In [0, 1); at 0 epsilon is infinite.
    accountant : {"exact", "rdp"}, default="exact"
        Whether to solve equation 2, or to ask opacus, which must be installed (``pip install
        opacus``), for its bound by Renyi differential privacy: what the official code compares
        with, some 13 to 23 % larger.

    Returns
    -------
    float
        At least 0.

    Raises
    ------
    ValueError
        If an argument is out of range.
    ModuleNotFoundError
        If opacus is asked and not installed.

    References
    ----------
    .. [1] Balle, Wang. Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration
       and Optimal Denoising. ICML 2018. Theorem 8.

    Examples
    --------
    >>> from posterity.privacy import gaussian_epsilon
    >>> round(gaussian_epsilon(1.0, 1e-2), 3), round(gaussian_epsilon(0.3, 1e-2), 2)
    (2.318, 12.56)
    """
    s = float(at_least("noise_multiplier", noise_multiplier, 0))
    within("delta", delta, 0, 1, open_high=True)
    one_of("accountant", accountant, ("exact", "rdp"))
    if s < 1e-150 or delta == 0:  # beyond, epsilon is larger than any number of float64
        return math.inf
    if accountant == "rdp":
        return _by_renyi(s, float(delta))

    # with epsilon = 1 / (2 s^2) + z / s the left side of equation 2 is Phi(-z) (1 - M(z + 1 / s) / M(z)),
    # M the Mills ratio: nothing overflows, and it is below Phi(-z)
    def excess(z: float) -> float:
        ratio = erfcx((z + 1 / s) / math.sqrt(2)) / erfcx(z / math.sqrt(2))
        return log_ndtr(-z) + math.log1p(-ratio) - math.log(delta) if ratio < 1 else -math.inf

    low, high = -0.5 / s, float(norm.isf(delta)) + 1e-6  # epsilon = 0, and one at which it is too small
    if high <= low or excess(low) <= 0:
        return 0.0
    z: Any = brentq(excess, low, high, xtol=1e-14)
    return max(0.0, (0.5 / s + z) / s)


def _by_renyi(noise_multiplier: float, delta: float) -> float:
    try:
        from opacus.accountants import RDPAccountant  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('opacus is needed for accountant="rdp": pip install opacus') from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, 1.0, 1)]
    return float(accountant.get_epsilon(delta=delta))


def _epsilon(fpr: Any, fnr: Any, delta: float) -> Any:
    """Return equation 1, at least 0; of two ratios, one is left out if it alone is divided by 0."""
    fpr, fnr = np.asarray(fpr, float), np.asarray(fnr, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(fnr > 0, (1 - delta - fpr) / fnr, 0.0)
        second = np.where(fpr > 0, (1 - delta - fnr) / fpr, 0.0)
        found = np.log(np.maximum(np.maximum(first, second), 1.0))
    return np.where((fpr == 0) & (fnr == 0), np.inf, found)


def _steepest(fpr: float, fnr: float, delta: float) -> float:
    """Return equation 1 at lower limits of the rates: infinite where one of them is 0."""
    return math.inf if fpr == 0 or fnr == 0 else float(_epsilon(fpr, fnr, delta))


def _upper(count: int, n: int, level: float) -> float:
    """Return the Clopper-Pearson upper limit of a probability of which count of n were seen."""
    return 1.0 if count == n else float(betaincinv(count + 1, n - count, level))


def _fixed(threshold: Any) -> float:
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float | np.number)
        or math.isnan(threshold)
    ):
        raise ValueError(f"threshold must be a number or 'max', got {threshold!r}")
    return float(threshold)


def _scores(name: str, scores: Any) -> ndarray:
    """Return scores in float64."""
    values = scores.detach().cpu() if isinstance(scores, Tensor) else scores
    values = values.double().numpy() if isinstance(values, Tensor) and not values.is_complex() else values
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be a vector of numbers: {error}") from error
    if array.dtype.kind not in "biuf" or array.ndim != 1:
        raise ValueError(f"{name} must be a vector of numbers, got {array.dtype} of shape {array.shape}")
    if not len(array):
        raise ValueError(f"{name} must have at least one score, got none")
    if np.isnan(array := array.astype(np.float64)).any():
        raise ValueError(f"{name} must not be NaN, score {int(np.isnan(array).argmax())} is")
    return array
