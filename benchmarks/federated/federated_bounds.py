"""Race the measured gaps of 10,000 clients with a loop over them, and a plan with a search step by step.

Run from the repository root: ``python -m benchmarks.federated.federated_bounds``.
"""

import math

import numpy as np

from benchmarks.timing import race
from posterity.federated import estimate_gaps, fast_rate_bound, plan


def by_client(train: list, test: list, unseen: list) -> tuple[float, ...]:
    """Return the three gaps and their errors, a client at a time."""
    means = [[float(np.mean(each)) for each in losses] for losses in (train, test, unseen)]
    gaps = [b - a for a, b in zip(means[0], means[1], strict=True)]

    def mean(values: list) -> float:
        return sum(values) / len(values)

    def error(values: list) -> float:
        centre = mean(values)
        return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))

    out, other = mean(gaps), mean(means[2]) - mean(means[1])
    return out, other, error(gaps), math.hypot(error(means[1]), error(means[2]))


def stepwise(m: int, n: int, target: float) -> int:
    """Return the least number of clients, trying one more at a time."""
    while fast_rate_bound(0.02, m, n, delta=0.1, log_class_size=3.0).unparticipating > target:
        m += 1
    return m


def main() -> None:
    rng = np.random.default_rng(0)
    losses = [[rng.random(rng.integers(5, 60)) for _ in range(10_000)] for _ in range(3)]
    race("gaps of 10,000 clients", lambda: estimate_gaps(*losses), lambda: by_client(*losses), target=1)
    race(
        "the number of clients that a fast rate needs",
        lambda: plan(1, 30, target=0.05, empirical_risk=0.02, delta=0.1, log_class_size=3.0, rate="fast"),
        lambda: stepwise(1, 30, 0.05), target=1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
