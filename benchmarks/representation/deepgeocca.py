"""Race the Frechet mean with pyriemann and geoopt; print what a training step takes.

Run from the repository root: ``python -m benchmarks.representation.deepgeocca`` (pyriemann, geoopt).
"""

import time
from statistics import median

import geoopt
import torch
from pyriemann.geometry.mean import mean_riemann
from torch import Tensor

from benchmarks.timing import race
from posterity.representation import DeepGeoCCA, SPDEncoder, frechet_mean


def covariances(n: int, c: int, samples: int, spread: float) -> Tensor:
    """Return covariances of mixed sources whose deviations are exp(spread N)."""
    rng = torch.Generator().manual_seed(0)
    mix, scale, signal = (
        torch.randn(*shape, dtype=torch.float64, generator=rng)
        for shape in ((c, c), (n, c, 1), (n, c, samples))
    )
    x = mix @ ((spread * scale).exp() * signal)
    return x @ x.mT / samples


def by_geoopt(s: Tensor, steps: int = 12) -> Tensor:
    """Return the mean by steps of size 1 with the maps of geoopt."""
    manifold = geoopt.SymmetricPositiveDefinite()
    mean = s.mean(0)
    for _ in range(steps):
        mean = manifold.expmap(mean, manifold.logmap(mean, s).mean(0))
    return mean


def main() -> None:
    torch.set_num_threads(1)
    s = covariances(1000, 22, 100, 0.3)
    torch.testing.assert_close(
        frechet_mean(s), torch.from_numpy(mean_riemann(s.numpy())), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(frechet_mean(s), by_geoopt(s), rtol=1e-6, atol=1e-6)
    for tol in (1e-8, 1e-12):
        race(f"mean of 1,000 matrices of 22 channels to {tol:g}, against pyriemann",
             lambda: frechet_mean(s, tol=tol), lambda: mean_riemann(s.numpy(), tol=tol), target=5, rounds=5)  # noqa: B023  # fmt: skip
    race("mean of 1,000 matrices of 22 channels, against 12 steps of geoopt", lambda: frechet_mean(s), lambda: by_geoopt(s),
         target=1, rounds=3)  # fmt: skip
    few = covariances(128, 22, 100, 0.3).float()
    model = DeepGeoCCA(SPDEncoder(22, (), 4), SPDEncoder(22, (), 4))
    opt = torch.optim.Adam(model.parameters())
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        opt.zero_grad()
        model.loss(few, few.flip(0)).backward()
        opt.step()
        seconds.append(time.perf_counter() - start)
    print(f"training step, 128 pairs, 22 channels to 4: {1e3 * median(seconds):.1f} ms (target under 30 ms)")


if __name__ == "__main__":
    main()
