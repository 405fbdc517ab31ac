"""From values over seeds to a verdict: a t-interval, and on which side it lies."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

__all__ = ["Verdict", "describe_range", "judge_bound", "judge_comparison", "judge_trend", "summary"]

Verdict = Literal["holds", "fails", "inconclusive", "error"]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and its 95 % t-interval, None where one value gives none.

    Parameters
    ----------
    values : sequence of float
        One a seed.

    Returns
    -------
    dict
        ``mean`` and ``ci95``, the two ends.
    """
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return {"mean": mean, "ci95": [None, None]}
    half = float(stdtrit(len(array) - 1, 0.975) * array.std(ddof=1) / math.sqrt(len(array)))
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def judge_comparison(
    baseline: Sequence[float], method: Sequence[float], better: str
) -> tuple[dict[str, Any], Verdict]:
    """Return the paired difference, method less baseline, and its verdict."""
    if not (np.isfinite(baseline).all() and np.isfinite(method).all()):
        return {"mean": None, "ci95": [None, None]}, "error"
    effect = summary(np.subtract(method, baseline).tolist())
    low, high = effect["ci95"]
    if low is None:
        return effect, "inconclusive"
    if better == "higher":
        low, high = -high, -low
    return effect, "holds" if high < 0 else "fails" if low > 0 else "inconclusive"


def judge_bound(values: Sequence[float], limit: float, better: str) -> Verdict:
    """Return whether no value passed the limit; reaching it is allowed."""
    if not np.isfinite(values).all():
        return "error"
    passed = np.greater(values, limit) if better == "lower" else np.less(values, limit)
    return "fails" if passed.any() else "holds"


def judge_trend(values: Sequence[float], low: float | None, high: float | None) -> Verdict:
    """Return where the interval of the mean lies: within the range, outside, or across an end.

    None is no end.
    """
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not np.isfinite(values).all():
        return "error"
    start, end = summary(values)["ci95"]
    if start is None:
        return "inconclusive"
    if low <= start and end <= high:
        return "holds"
    return "fails" if end < low or start > high else "inconclusive"


def describe_range(ends: Sequence[float | None]) -> str:
    """Return the range of a trend in words; one of its ends may be open."""
    low, high = ends
    if low is None or high is None:
        return f"at most {high:g}" if low is None else f"at least {low:g}"
    return f"between {low:g} and {high:g}"
