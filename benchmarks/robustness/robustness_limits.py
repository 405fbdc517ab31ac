"""Race distances to the next class, axis by axis, with distances of all pairs of images.

Run from the repository root: ``python -m benchmarks.robustness.robustness_limits``.
"""

import time

import numpy as np

from benchmarks.timing import race
from posterity.robustness import boundary_distance, robust_fraction_bound

POPCOUNT = np.array([bin(k).count("1") for k in range(2**14)], dtype=np.int8)


def all_pairs(labels: np.ndarray) -> np.ndarray:
    """Return for each image the least Hamming distance to one of another class."""
    images = np.arange(len(labels))
    distance = np.empty(len(labels), dtype=np.int64)
    for k in images:
        distance[k] = POPCOUNT[(k ^ images)[labels != labels[k]]].min()
    return distance


def main() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2**14)
    race(
        "16,384 images of 14 bits",
        lambda: boundary_distance(labels),
        lambda: all_pairs(labels),
        target=1000,
        rounds=3,
    )
    many = rng.integers(0, 10, 2**20)
    start = time.perf_counter()
    boundary_distance(many)
    print(f"a million images of 20 bits, ten classes: {time.perf_counter() - start:.2f} s (bound 3 s)")
    start = time.perf_counter()
    for k in range(100):
        robust_fraction_bound(1 + k / 10, 224, channels=3, bit_depth=8, p=2)
    print(f"a bound: {10 * (time.perf_counter() - start):.3f} ms (bound 1 ms)")


if __name__ == "__main__":
    main()
