"""Race sliced Wasserstein with POT's, and a spiral with the random directions it replaces.

Run from the repository root: ``python -m benchmarks.transport.quasi_sliced_wasserstein``.
"""

import time
from importlib.util import find_spec

import torch

from benchmarks.timing import race
from posterity.transport import sliced_wasserstein, sphere_points


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2048, 3, generator=generator) * scale for scale in (1.0, 2.0))
    spiral = sphere_points(100)
    if find_spec("ot"):
        import ot

        across = spiral.T.contiguous()
        race("2,048 points, 100 directions, against POT", lambda: sliced_wasserstein(x, y, spiral),
             lambda: ot.sliced_wasserstein_distance(x, y, projections=across), target=2)  # fmt: skip
        gap = sliced_wasserstein(x, y, spiral) - ot.sliced_wasserstein_distance(x, y, projections=across)
        print(f"difference of the two values: {float(gap):.1e}")
    else:
        print("against POT: skipped, POT is not installed")
    small = x[:500].double(), y[:500].double() + 0.3
    truth = sliced_wasserstein(*small, sphere_points(50_000, dtype=torch.float64))
    draws = [sphere_points(10_000, "random", generator=generator, dtype=torch.float64) for _ in range(10)]
    random = torch.stack([(sliced_wasserstein(*small, draw) - truth).abs() for draw in draws]).mean()
    evenly = (sliced_wasserstein(*small, sphere_points(100, dtype=torch.float64)) - truth).abs()
    print(f"error of 10,000 random directions {float(random):.1e}, of a spiral of 100 {float(evenly):.1e}")
    race("a spiral of 100 against 10,000 random directions, 500 points",
         lambda: sliced_wasserstein(*small, sphere_points(100, dtype=torch.float64)),
         lambda: sliced_wasserstein(
             *small, sphere_points(10_000, "random", generator=generator, dtype=torch.float64)),
         target=50, rounds=5)  # fmt: skip
    for n in (1_000, 10_000, 100_000):
        clouds = [torch.randn(n, 3, generator=generator) for _ in range(2)]
        times = []
        for _ in range(5):
            start = time.perf_counter()
            sliced_wasserstein(*clouds, spiral)
            times.append(time.perf_counter() - start)
        print(f"{n} points, 100 directions: {1e3 * min(times):.1f} ms")


if __name__ == "__main__":
    main()
