"""All pairs of ranks at once against 10,000 pairs of beta draws for each, and a run at Adult's scale."""

import resource
import time

import numpy as np

from benchmarks.timing import race
from posterity.fairness import fair_thresholds, violation_probability


def drawn(pairs: list[tuple[int, int]], n0: int, n1: int, alpha: float) -> list[float]:
    """Return the probabilities as the official code finds them, re-expressed: two draws at a time."""
    out = []
    for k0, k1 in pairs:
        count = 0
        for _ in range(10_000):
            u0 = np.random.beta(k0, n0 + 1 - k0)
            u1 = np.random.beta(k1, n1 + 1 - k1)
            count += abs(u0 - u1) > alpha
        out.append(count / 10_000)
    return out


def main() -> None:
    n0, n1, alpha, some = 62, 274, 0.1, 8
    k0, k1 = np.arange(1, n0 + 1)[:, None], np.arange(1, n1 + 1)
    rng = np.random.default_rng(0)
    pairs = [(int(rng.integers(1, n0 + 1)), int(rng.integers(1, n1 + 1))) for _ in range(some)]
    work = n0 * n1 / some
    # the peer does 8 of the 16,988 pairs: its ratio for all of them is that many times larger
    ratio = race(
        f"all {n0 * n1:,} probabilities against draws for {some} of them",
        lambda: violation_probability(k0, n0, k1, n1, alpha),
        lambda: drawn(pairs, n0, n1, alpha),
        target=1_000 / work,
        rounds=5,
    )
    print(f"for all pairs: ratio {ratio * work:,.0f} (target 1,000)")

    for name, sizes in (("n = 62 and 274", (101, 123, 62, 274)), ("Adult", (9_592, 15_128, 1_179, 6_662))):
        y, groups = np.repeat([0, 0, 1, 1], sizes), np.repeat([0, 1, 0, 1], sizes)
        scores = rng.normal(1.5 * y + 0.5 * groups)
        fair_thresholds(scores, y, groups)
        start = time.perf_counter()
        fair_thresholds(scores, y, groups)
        print(f"thresholds, {name}: {time.perf_counter() - start:.3f} s")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB (target 2)")


if __name__ == "__main__":
    main()
