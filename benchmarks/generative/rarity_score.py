"""The rarity score against full matrices that are sorted, and radii against scikit-learn.

Run from the repository root: ``python -m benchmarks.generative.rarity_score``.
"""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks.timing import race
from posterity.generative import knn_radii, rarity_score


def features(n: int, d: int = 512) -> tuple[Tensor, Tensor]:
    """Return real features and samples."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=draws), 0.95 * torch.randn(n, d, generator=draws)


def full(a: Tensor, b: Tensor) -> Tensor:
    """Return all distances in float64."""
    a, b = a.double(), b.double()
    square = a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)
    return square.clamp_min(0).sqrt()


def by_sorting(real: Tensor, samples: Tensor, k: int = 3) -> ndarray:
    """Return the scores as the official program has them: whole matrices, all rows sorted, a loop over samples."""
    among = full(real, real)
    ordered, _ = among.sort(dim=1)[0].numpy(), among.argsort(dim=1).numpy()
    radii, apart = ordered[:, k], full(real, samples).numpy()
    inside = np.repeat(radii[:, None], len(samples), 1) - apart > 0
    outside = np.flatnonzero(~inside.any(0))
    scores = np.zeros(len(samples))
    for i in range(len(samples)):
        if i not in outside:
            scores[i] = radii[inside[:, i]].min()
    return scores


def by_partition(real: Tensor, samples: Tensor, k: int = 3) -> ndarray:
    """Return the scores from whole matrices of scikit-learn, rows partitioned (as in prdc), without a loop."""
    radii = np.partition(pairwise_distances(real.numpy(), n_jobs=1), k, axis=1)[:, k]
    apart = pairwise_distances(real.numpy(), samples.numpy(), n_jobs=1)
    scores = np.where(apart < radii[:, None], radii[:, None], np.inf).min(0)
    return np.where(np.isfinite(scores), scores, 0)


def _peak() -> float:
    """Return the most memory that this process had, in GiB, where Linux says it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**20


def _grown(way: str, n: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    real, samples = features(n)
    rarity_score(real[:100], samples[:100])
    before, start = _peak(), time.perf_counter()
    (by_sorting if way == "sorting" else rarity_score)(real, samples)
    queue.put((_peak() - before, _peak(), time.perf_counter() - start))


def grown(way: str, n: int) -> tuple[float, float, float]:
    """Return by how many GiB a fresh process grows, to how many, and the seconds."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_grown, args=(way, n, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    torch.set_num_threads(1)
    real, samples = features(5_000)
    found = rarity_score(real, samples)
    ours = found.score.nan_to_num(0.0).numpy()
    np.testing.assert_allclose(ours, by_sorting(real, samples), rtol=1e-6)
    # rounded to float32, distances may change sides of an edge
    assert np.isclose(ours, by_partition(real, samples), rtol=1e-4).mean() > 0.999
    name = "5,000 real and 5,000 samples of 512 features"
    race(
        f"{name}, against full matrices in float64, sorted, and a loop",
        lambda: rarity_score(real, samples),
        lambda: by_sorting(real, samples),
        target=5,
        rounds=3,
    )
    race(
        f"{name}, against full matrices of scikit-learn, partitioned",
        lambda: rarity_score(real, samples),
        lambda: by_partition(real, samples),
        target=1,
        rounds=3,
    )
    for n, d, rounds in ((5_000, 512, 5), (20_000, 64, 3)):
        x = features(n, d)[0]
        rows = x.numpy()
        race(
            f"radii of {n:,} samples of {d} features, against scikit-learn's brute NearestNeighbors",
            lambda: knn_radii(x),  # noqa: B023
            lambda: NearestNeighbors(n_neighbors=4, algorithm="brute").fit(rows).kneighbors(rows),  # noqa: B023
            target=1,
            rounds=rounds,
        )
    mine, theirs = grown("ours", 5_000), grown("sorting", 5_000)
    print(
        f"memory at 5,000: full matrices {theirs[0]:.2f} GiB, ours {mine[0]:.3f} GiB, "
        f"ratio {theirs[0] / mine[0]:.1f} (target 10)"
    )
    _, most, seconds = grown("ours", 20_000)
    print(f"20,000 and 20,000 samples: {seconds:.1f} s, the process at most {most:.2f} GiB (target 4)")


if __name__ == "__main__":
    main()
