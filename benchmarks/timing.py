"""Races: two ways of doing the same work, timed in turns in one run.

Turns alternate, so that a busy machine slows both alike; the median of each counts. Where
``POSTERITY_RACES`` names a file, each race is a line of JSON in it, as `tools.bench` asks.
"""

import json
import os
import time
from collections.abc import Callable
from statistics import median

import torch


def race(
    name: str, ours: Callable[[], object], peer: Callable[[], object], *, target: float, rounds: int = 15,
    why: str = "",
) -> float:  # fmt: skip
    """Print and return how many times faster ``ours`` is than ``peer``; both warm up once.

    ``why`` says what keeps it below its target, where profiling has found no way.
    """
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(rounds + 1):
        for who, work in (("ours", ours), ("peer", peer)):
            start = time.perf_counter()
            work()
            if turn:
                seconds[who].append(time.perf_counter() - start)
    mine, theirs = median(seconds["ours"]), median(seconds["peer"])
    ratio = theirs / mine
    verdict = "reached" if ratio >= target else "MISSED"
    print(
        f"{name}: peer {1e3 * theirs:.3f} ms, ours {1e3 * mine:.3f} ms, "
        f"ratio {ratio:.2f} (target {target:g}, {verdict})"
    )
    if "POSTERITY_RACES" in os.environ:
        row = {"name": name, "ratio": float(f"{ratio:.3g}"), "target": float(f"{target:.3g}")}
        if why and ratio < target:
            row["why"] = why
        with open(os.environ["POSTERITY_RACES"], "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return ratio
