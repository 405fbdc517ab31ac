"""Universal limits of robustness: sizes of a perturbation that no image classifier can resist.

Images are n x n pixels with some channels, N values of b bits each, and every one counts alike. Of
a class that holds at most half of all images only a small share can lie farther than ``size``
from every other class, whatever the classifier: the rest can be moved out. With t the number of
values that may be changed within ``size``, F the distribution function of Binomial(N b, 1/2), q =
2^b and c the share of the class, the robust share is at most each of

    F(r - t) / c,    r the least with F(r) >= c,                                            (1)
    exp(-2 tau^2) / c,    tau = (t + 1) / sqrt(N) - sqrt(log(1 / (1 - c)) / 2),             (2)
    Phi(Phi^-1(c) - sqrt(2 pi) s N^-max(1/p - 1/2, 0)) / c,    s = ((q-1) size - N^(1/p)) / q.   (3)

(1): on the cube of bits balls have the smallest neighbourhoods (Harper). (2): a distance changes by
at most 1 with a value (McDiarmid). (3): the uniform cube is a Lipschitz image of the Gaussian,
whose half spaces have the smallest neighbourhoods. So a size of the order n^(1 / max(p, 1)) breaks any
classifier, and for deep images and p >= 2 a constant one. The orders are the paper's; the constants
are these. The measure is uniform over all images, not over photographs.
"""

import math
from typing import Literal, overload

from scipy.stats import binom, norm

from posterity._checks import at_least, integer, within

__all__ = ["perturbation_for_fraction", "robust_fraction_bound"]

GUARD = 1e-12  # of rounding, so that a size of t^(1/p) allows t changes


@overload
def robust_fraction_bound(
    size: float,
    n: int,
    *,
    channels: int = 1,
    bit_depth: int = 1,
    p: float = 0,
    class_fraction: float = 0.5,
    return_method: Literal[False] = False,
) -> float: ...
@overload
def robust_fraction_bound(
    size: float,
    n: int,
    *,
    channels: int = 1,
    bit_depth: int = 1,
    p: float = 0,
    class_fraction: float = 0.5,
    return_method: Literal[True],
) -> tuple[float, str]: ...
def robust_fraction_bound(
    size: float,
    n: int,
    *,
    channels: int = 1,
    bit_depth: int = 1,
    p: float = 0,
    class_fraction: float = 0.5,
    return_method: bool = False,
) -> float | tuple[float, str]:
    """Return the largest share of a class that can be robust, for any classifier.

    Parameters
    ----------
    size : float
        Of the perturbation, at least 0: for p >= 1 its p-norm, for p = 0 the number of values that
        differ, for 0 < p < 1 the sum of |d|^p, without a root. Values lie in [0, 1].
    n : int
        Pixels in a row.
    channels : int, default=1
        Values of a pixel.
    bit_depth : int, default=1
        Bits of a value; 8 for ordinary images.
    p : float, default=0
        At least 0, ``inf`` among it.
    class_fraction : float, default=0.5
        Share of all images that the class holds, in (0, 1/2].
    return_method : bool, default=False
        Whether to say which of (1) to (3) is the least: ``"H"``, ``"M"`` or ``"G"``.

    Returns
    -------
    float, or tuple of float and str
        In [0, 1], of the class. An image is robust at ``size`` if no image of another class is
        within it.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    1. The paper's explicit constants are not these; each bound here is one of a textbook.

    References
    ----------
    .. [1] Dai, Gifford. Fundamental Limits on the Robustness of Image Classifiers. ICLR 2023.
    .. [2] Harper. Optimal numberings and isoperimetric problems on graphs. 1966.
    .. [3] McDiarmid. On the method of bounded differences. 1989.
    .. [4] Sudakov, Tsirelson. Extremal properties of half-spaces for spherically invariant
       measures. 1974.

    Examples
    --------
    >>> from posterity.robustness import robust_fraction_bound
    >>> robust_fraction_bound(0, 28)  # of 784 black and white pixels
    1.0
    >>> round(robust_fraction_bound(40, 28), 4)  # 40 of them changed
    0.0047
    """
    N, c = _space(n, channels, bit_depth, p), _share(class_fraction)
    at_least("size", size, 0)
    logs = _log_bounds(size, N, bit_depth, p, c)
    method = min(logs, key=lambda name: logs[name])
    bound = math.exp(min(0.0, logs[method]))
    return (bound, method) if return_method else bound


def perturbation_for_fraction(
    fraction: float,
    n: int,
    *,
    channels: int = 1,
    bit_depth: int = 1,
    p: float = 0,
    class_fraction: float = 0.5,
) -> float:
    """Return the least size at which no classifier has more than this share of a class robust.

    Parameters
    ----------
    fraction : float
        Of the class, in (0, 1).
    n, channels, bit_depth, p, class_fraction
        As for `robust_fraction_bound`.

    Returns
    -------
    float
        By the bounds here; a whole number for p = 0, else exact to a relative 1e-9.

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> from posterity.robustness import perturbation_for_fraction
    >>> perturbation_for_fraction(0.01, 28)  # values of 784
    37.0
    >>> [round(perturbation_for_fraction(0.01, n, bit_depth=16, p=2), 2) for n in (28, 224)]  # no longer with n
    [1.03, 1.03]
    """
    within("fraction", fraction, 0, 1, open_low=True, open_high=True)
    N, c = _space(n, channels, bit_depth, p), _share(class_fraction)
    goal = math.log(fraction)

    def enough(size: float) -> bool:
        return min(_log_bounds(size, N, bit_depth, p, c).values()) <= goal

    low, high = 0.0, float(N) if p < 1 else N ** (1 / p)
    if p == 0:
        few, many = 0, N
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if enough(middle) else (middle, many)
        return float(many)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def changes_within(size: float, N: int, p: float) -> int:
    """Return how many values may change by up to 1 each within a size: N if that is all of them."""
    if math.isinf(p):
        return N if size >= 1 - GUARD else 0
    # beyond N nothing is gained, and a power may overflow
    most = size if p <= 1 or size >= N else size**p
    return min(N, math.floor(min(most, float(N)) * (1 + GUARD) + GUARD))


def _log_bounds(size: float, N: int, bit_depth: int, p: float, c: float) -> dict[str, float]:
    """Return logarithms of (1), (2) and (3)."""
    t, log_c = changes_within(size, N, p), math.log(c)
    if t >= N:  # every other image is within the size
        return {"H": -math.inf}
    M = N * bit_depth
    half = int(binom.ppf(c - GUARD, M, 0.5))
    logs = {"H": float(binom.logcdf(half - t, M, 0.5)) - log_c}
    tau = (t + 1) / math.sqrt(N) - math.sqrt(-math.log1p(-c) / 2)
    if tau > 0:
        logs["M"] = -2 * tau**2 - log_c
    if p >= 1:
        q = 2.0**bit_depth
        s = ((q - 1) * size - N ** (1 / p)) / q
        if s > 0:
            reach = math.sqrt(2 * math.pi) * s * N ** -max(1 / p - 0.5, 0)
            logs["G"] = float(norm.logcdf(norm.ppf(c) - reach)) - log_c
    return logs


def _space(n: int, channels: int, bit_depth: int, p: float) -> int:
    """Return how many values an image has."""
    integer("bit_depth", bit_depth, 1)
    if bit_depth > 64:
        raise ValueError(f"bit_depth must be an integer from 1 to 64, got {bit_depth}")
    norm_order(p)
    return integer("n", n, 1) ** 2 * integer("channels", channels, 1)


def norm_order(p: float) -> float:
    """Return p if it is at least 0, or infinity."""
    return p if isinstance(p, float) and p == math.inf else at_least("p", p, 0)


def _share(class_fraction: float) -> float:
    try:
        return within("class_fraction", class_fraction, 0, 0.5, open_low=True)
    except ValueError as error:
        raise ValueError(f"{error}: the theorem needs a class of at most half of the images") from None
