"""Growth of cost with size, judged against a yardstick: work of known cost timed in the same loop."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from posterity.claims import Trial

__all__ = ["relative_growth"]

Work = Callable[[], object]


def relative_growth(
    trial: Trial, sizes: Sequence[int], works: Sequence[Work], yardsticks: Sequence[Work], *, rounds: int, name: str
) -> float:  # fmt: skip
    """Return the exponent with which the seconds of works, over those of yardsticks, grow with size.

    Work and yardstick of a size run one after the other, and sizes take turns; the median of
    their ratios counts. So what slows a machine for a while slows both, and the exponent is
    the same on a busy machine as on an idle one.

    Parameters
    ----------
    trial : Trial
        Tracks the seconds of both.
    sizes : sequence of int
        At least two.
    works, yardsticks : sequence of callable
        One a size; a yardstick's cost in size is known.
    rounds : int
        After one that warms up.
    name : str
        What the curves are named after.

    Returns
    -------
    float
    """
    seconds = np.empty((2, len(sizes), rounds + 1))
    for turn in range(rounds + 1):
        for k, pair in enumerate(zip(works, yardsticks, strict=True)):
            for who, work in enumerate(pair):
                start = time.perf_counter()
                work()
                seconds[who, k, turn] = time.perf_counter() - start
    seconds = seconds[:, :, 1:]
    for line, each in zip((name, "yardstick"), np.median(seconds, axis=2), strict=True):
        for size, value in zip(sizes, each, strict=True):
            trial.track(f"seconds: {line}", size, value)
    ratios = np.median(seconds[0] / seconds[1], axis=1)
    for size, ratio in zip(sizes, ratios, strict=True):
        trial.track(f"{name}, over the yardstick", size, ratio)
    return float(np.polyfit(np.log(sizes), np.log(ratios), 1)[0])
