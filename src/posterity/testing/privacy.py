"""Private releases: an attack whose success bounds the privacy loss from below."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import beta

from posterity._checks import within

__all__ = ["check_private"]


def check_private(
    here: Sequence[float] | np.ndarray,
    there: Sequence[float] | np.ndarray,
    *,
    epsilon: float,
    delta: float = 0.0,
    confidence: float = 0.99,
) -> float:
    """Check that releases on neighbouring data are not told apart better than was promised.

    An attacker sees a score of one release and guesses which data it comes from. If releases are
    (epsilon, delta)-differentially private then, for every event S and both ways round,
    ``P(S | here) <= exp(epsilon) P(S | there) + delta``. The event, scores above a threshold or
    below it, is chosen on the first half of the releases; the second half gives Clopper-Pearson
    limits of its two probabilities, and these a lower bound on epsilon.

    Parameters
    ----------
    here, there : array_like of shape (runs,)
        A score of each of independent releases on one data set, and on a neighbour; some
        thousands. The sharpest attack scores by the ratio of the two densities; a release that
        fails has a score of its own, outside all others.
    epsilon : float
        What is promised.
    delta : float, default=0.0
    confidence : float, default=0.99
        With which the bound holds.

    Returns
    -------
    float
        The lower bound, at least 0.

    Raises
    ------
    ValueError
        For fewer than four scores, NaN among them, or a delta or confidence outside [0, 1).
    """
    within("delta", delta, 0.0, 1.0, open_high=True)
    within("confidence", confidence, 0.0, 1.0, open_high=True)
    first, second = (np.asarray(scores, float).ravel() for scores in (here, there))
    for name, scores in (("here", first), ("there", second)):
        if len(scores) < 4 or np.isnan(scores).any():
            raise ValueError(f"{name} must be at least 4 scores without NaN, got {len(scores)}")
    wrong = (1 - confidence) / 4  # two ways round, two limits each
    bound = 0.0
    for likely, rare in ((first, second), (second, first)):
        half, other = len(likely) // 2, len(rare) // 2
        sign, threshold = _best_event(likely[:half], rare[:other], delta, wrong)
        hits, false = (sign * x >= threshold for x in (likely[half:], rare[other:]))
        loss = _privacy_loss(hits.sum(), hits.size, false.sum(), false.size, delta, wrong)
        bound = max(bound, float(loss))
    assert bound <= epsilon, (
        f"releases are told apart with epsilon at least {bound:.3g}, promised is {epsilon:.3g}"
    )
    return bound


def _best_event(likely: np.ndarray, rare: np.ndarray, delta: float, wrong: float) -> tuple[int, float]:
    """Return the sign and threshold whose event bounds epsilon best on these scores."""
    found = []
    for sign in (1, -1):
        a, b = np.sort(sign * likely), np.sort(sign * rare)
        at = np.unique(np.concatenate([a, b]))
        hits, false = (len(x) - np.searchsorted(x, at) for x in (a, b))
        losses = _privacy_loss(hits, len(a), false, len(b), delta, wrong)
        found.append((losses.max(), sign, float(at[losses.argmax()])))
    _, sign, threshold = max(found)
    return sign, threshold


def _privacy_loss(
    hits: np.ndarray | np.integer, runs: int, false: np.ndarray | np.integer, false_runs: int, delta: float,
    wrong: float,
) -> np.ndarray:  # fmt: skip
    """Return lower limits of epsilon from how often events occur, each limit wrong at this rate."""
    low = np.where(hits > 0, beta.ppf(wrong, np.maximum(hits, 1), runs - hits + 1), 0.0)
    left = np.maximum(false_runs - false, 1)
    high = np.where(false < false_runs, beta.ppf(1 - wrong, false + 1, left), 1.0)
    return np.asarray(np.log(np.maximum(low - delta, 1e-300) / high))
