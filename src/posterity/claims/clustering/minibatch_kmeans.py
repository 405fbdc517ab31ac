"""Claims about mini-batch k-means: batches speak for the data, runs end, and end well."""

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn.cluster import KMeans, kmeans_plusplus

from posterity.claims import Count, Positive, Several, Trial, bound, comparison, trend
from posterity.clustering import EarlyStopMiniBatchKMeans, iteration_bound, kmeans_batch_update
from posterity.lab.data import Points, load_points


def _cube(data: str, seed: int, n_rows: int | None = None) -> ndarray:
    """Return points moved and scaled, by one factor, into the unit cube."""
    points = load_points(data, seed=seed)[:n_rows].astype(np.float64)
    points -= points.min(0)
    return points / (np.ptp(points, axis=0).max() or 1.0)


def _fits(
    data: ndarray, n_clusters: int, n_rows: int | None = None, epsilon: float | None = None, **_: object
) -> None:
    """Refuse fewer different points than clusters and one, and an epsilon that no step could pass."""
    points = data[:n_rows]
    for some in (points[: 100 * n_clusters], points):  # often the first are enough
        if (different := len(pd.DataFrame(some).drop_duplicates())) > n_clusters:
            break
    else:
        raise ValueError(f"n_clusters must be less than the {different} different points, got {n_clusters}")
    if epsilon is not None and epsilon >= data.shape[1]:
        raise ValueError(f"epsilon must be less than the {data.shape[1]} coordinates, got {epsilon}")


def _cost(points: ndarray, centers: ndarray) -> float:
    gap = np.square(points).sum(1)[:, None] - 2 * points @ centers.T + np.square(centers).sum(1)
    return float(gap.min(1).mean())


def _agreement(
    points: ndarray, centers: ndarray, size: int, epsilon: float, max_iter: int, trial: Trial, curve: str
) -> float:
    """Return the share of steps with batch progress whose progress on all the data is half of it or more."""
    rng = np.random.default_rng(trial.seed)
    costs = [_cost(points, centers)]
    for step in range(max_iter):
        batch = points[rng.integers(0, len(points), size)]
        centers, progress = kmeans_batch_update(batch, centers)
        if progress < epsilon:
            break
        costs.append(_cost(points, centers))
        trial.track(curve, step + 1, costs[-1])
    falls = -np.diff(costs)
    trial.record(f"{curve}: steps before the last", len(falls))
    return float(np.mean(falls >= epsilon / 2)) if len(falls) else 1.0


@comparison(
    paper="minibatch-kmeans",
    says="With a large enough batch, progress on the batch is progress on all data; with a small one it is not.",
    where="Schwartzman, Section 3",
    arms=("batch 64", "batch 2048"),
    metric="share of improving steps in which the cost of all data falls by epsilon / 2",
    better="higher",
    smallest={"max_iter": 5, "n_rows": 300},
    check=_fits,
)
def local_implies_global(
    trial: Trial,
    data: Points = "digits",
    n_clusters: Several = 10,
    epsilon: Positive = 0.16,
    max_iter: Count = 150,
    n_rows: Count | None = None,
) -> dict[str, float]:
    """Run the algorithm from one k-means++ start with either batch, until a batch stops improving.

    A run whose first batch does not improve has promised nothing: its share is 1. Where
    epsilon is far above the noise of a small batch, both shares are 1 and the claim is
    inconclusive. The paper has no experiment.
    """
    points = _cube(data, trial.seed, n_rows)
    start = kmeans_plusplus(points, n_clusters, random_state=trial.seed)[0]
    return {
        arm: _agreement(points, start, size, epsilon, max_iter, trial, arm)
        for arm, size in (("batch 64", 64), ("batch 2048", 2048))
    }


@bound(
    paper="minibatch-kmeans",
    says="The run stops within 2 d / epsilon iterations from any start.",
    where="Schwartzman, Theorem 1",
    metric="iterations over the bound 2 d / epsilon, largest over starts and epsilons",
    limit=1.0,
    smallest={"n_rows": 300},
    check=_fits,
)
def terminates(
    trial: Trial,
    data: Points = "digits",
    n_clusters: Several = 10,
    batch_size: Count = 2048,
    n_rows: Count | None = None,
) -> float:
    """Start from k-means++, from random points and with all centers in one corner of the cube.

    The record has the slope of log iterations against log 1 / epsilon, at most 1 by the theorem.
    """
    points = _cube(data, trial.seed, n_rows)
    d = points.shape[1]
    corner = np.zeros((n_clusters, d))
    epsilons = (0.16, 0.04, 0.02)
    shares, counts = [], []
    for name, start in (("k-means++", "k-means++"), ("random", "random"), ("corner", corner)):
        for epsilon in epsilons:
            model = EarlyStopMiniBatchKMeans(
                n_clusters, epsilon=epsilon, batch_size=batch_size, init=start, random_state=trial.seed
            ).fit(points)
            shares.append(model.n_iter_ * epsilon / (2 * d))
            counts.append(model.n_iter_)
            trial.track(f"iterations: {name}", 1 / epsilon, model.n_iter_)
            if not model.converged_:
                return model.n_iter_ / iteration_bound(d, epsilon)
    slopes = np.polyfit(-np.log(epsilons), np.log(np.reshape(counts, (3, 3)).T), 1)[0]
    trial.record("largest slope of log iterations in log 1 / epsilon", slopes.max())
    return max(shares)


@trend(
    paper="minibatch-kmeans",
    says="Where it stops, the mean cost is at most 5 % above what full-batch k-means reaches from the same start.",
    metric="cost over the cost of Lloyd's algorithm, mean over starts",
    high=1.05,
    smallest={"n_rows": 300, "n_starts": 2},
    check=_fits,
)
def quality(
    trial: Trial,
    data: Points = "digits",
    n_clusters: Several = 10,
    epsilon: Positive = 0.02,
    batch_size: Count = 2048,
    n_starts: Count = 10,
    n_rows: Count | None = None,
) -> float:
    """Compare final costs on all data from ten starts; Lloyd's algorithm runs to its own convergence.

    From one start in ten or so the two end in different local optima, up to a tenth apart
    either way, which is why a trial takes the mean over several. The limit is ours: the
    theorem bounds the number of steps and keeps the logarithmic guarantee of k-means++,
    it does not compare with Lloyd's algorithm.
    """
    points = _cube(data, trial.seed, n_rows)
    ratios, iterations = [], []
    for number in range(n_starts):
        seed = n_starts * trial.seed + number
        start = kmeans_plusplus(points, n_clusters, random_state=seed)[0]
        early = EarlyStopMiniBatchKMeans(
            n_clusters, epsilon=epsilon, batch_size=batch_size, init=start, random_state=seed
        ).fit(points)
        full = KMeans(n_clusters, init=start, n_init=1, max_iter=1000, tol=0).fit(points)
        ratios.append(early.inertia_ / float(full.inertia_ or 0.0))
        iterations.append(early.n_iter_)
        trial.track("cost over Lloyd's, by start", number, ratios[-1])
    trial.record("largest ratio", max(ratios))
    trial.record("mini-batch iterations", float(np.mean(iterations)))
    return float(np.mean(ratios))
