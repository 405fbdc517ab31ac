"""From values over seeds to a verdict: a t-interval, and on which side it lies."""

import math
from collections.abc import Sequence
from typing import Any, Literal

__all__ = [
    "Verdict", "describe_range", "judge_bound", "judge_comparison", "judge_trend", "seeds_to_settle", "summary",
]  # fmt: skip

Verdict = Literal["holds", "fails", "inconclusive", "error"]

# The 97.5 % points of Student's t with 1, 2, ... degrees of freedom: `posterity show` judges
# stored trials, and importing scipy for one number would triple its time.
T = (
    12.706204736174694, 4.302652729749462, 3.1824463052837078, 2.7764451051977934, 2.5705818356363146,
    2.4469118511449786, 2.364624251592784, 2.306004135204166, 2.262157162798205, 2.228138851986274,
    2.200985160091639, 2.1788128296672284, 2.1603686564627913, 2.144786687917804, 2.131449545559776,
    2.1199052992212546, 2.1098155778333156, 2.1009220402410382, 2.0930240544083087, 2.085963447265864,
    2.0796138447276795, 2.0738730679040254, 2.0686576104190486, 2.0638985616280245, 2.0595385527532972,
    2.0555294386428735, 2.0518305164802846, 2.0484071417952454, 2.045229642132703, 2.0422724563012378,
)  # fmt: skip


def _quantile(freedom: int) -> float:
    """Return the 97.5 % point of Student's t."""
    if freedom <= len(T):
        return T[freedom - 1]
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


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
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "ci95": [None, None]}
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def seeds_to_settle(values: Sequence[float], edges: Sequence[float], most: int = 1000) -> int | None:
    """Return how many seeds would put the interval on one side of every edge, if the spread stays.

    Parameters
    ----------
    values : sequence of float
        One a seed; at least two.
    edges : sequence of float
        Where a verdict changes: 0 for a paired difference, the ends of a range for a trend.
    most : int, default=1000
        Beyond it the answer is None.

    Returns
    -------
    int or None
    """
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    room = min(abs(mean - edge) for edge in edges)
    enough = (n for n in range(2, most + 1) if _quantile(n - 1) * math.sqrt(variance / n) < room)
    return next(enough, None)


def judge_comparison(
    baseline: Sequence[float], method: Sequence[float], better: str
) -> tuple[dict[str, Any], Verdict]:
    """Return the paired difference, method less baseline, and its verdict."""
    if not all(map(math.isfinite, (*baseline, *method))):
        return {"mean": None, "ci95": [None, None]}, "error"
    effect = summary([ours - theirs for ours, theirs in zip(method, baseline, strict=True)])
    low, high = effect["ci95"]
    if low is None:
        return effect, "inconclusive"
    if better == "higher":
        low, high = -high, -low
    return effect, "holds" if high < 0 else "fails" if low > 0 else "inconclusive"


def judge_bound(values: Sequence[float], limit: float, better: str) -> Verdict:
    """Return whether no value passed the limit; reaching it is allowed."""
    if not all(map(math.isfinite, values)):
        return "error"
    passed = any(value > limit if better == "lower" else value < limit for value in values)
    return "fails" if passed else "holds"


def judge_trend(values: Sequence[float], low: float | None, high: float | None) -> Verdict:
    """Return where the interval of the mean lies: within the range, outside, or across an end.

    None is no end.
    """
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not all(map(math.isfinite, values)):
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
