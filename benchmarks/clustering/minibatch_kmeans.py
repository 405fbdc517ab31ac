"""A step against scikit-learn's Cython step, and a whole run against Lloyd's algorithm."""

import warnings

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import make_blobs

from benchmarks.timing import race
from posterity.clustering import EarlyStopMiniBatchKMeans


def main() -> None:
    warnings.simplefilter("ignore")
    X, _ = make_blobs(200_000, 32, centers=50, cluster_std=4.0, random_state=0)
    start = X[:50]
    steps = 100

    def ours(n: int) -> object:
        return lambda: EarlyStopMiniBatchKMeans(
            50, epsilon=1e-12, batch_size=4096, init=start, max_iter=n, random_state=0
        ).fit(X)

    def theirs(n: int) -> object:
        return lambda: MiniBatchKMeans(
            50, init=start, n_init=1, batch_size=4096, max_iter=max(1, n * 4096 // len(X)), max_no_improvement=None,
            tol=0, reassignment_ratio=0, random_state=0,
        ).fit(X)  # fmt: skip

    # scikit-learn counts passes over the data: both take about as many batches
    n = -(-steps * 4096 // len(X)) * len(X) // 4096
    race(
        f"{n} steps of 4,096 of 200,000 x 32, k = 50, against MiniBatchKMeans",
        ours(n),
        theirs(n),
        target=1 / 1.5,
        rounds=5,
    )
    # uniform points have no clear clusters: the case in which Lloyd's algorithm takes long
    X = np.random.default_rng(0).random((200_000, 32))
    early = EarlyStopMiniBatchKMeans(50, epsilon=0.01, batch_size=4096, init=X[:50], random_state=0)
    full = KMeans(50, init=X[:50], n_init=1, random_state=0)
    race(
        "a run to its end against KMeans to its own",
        lambda: early.fit(X),
        lambda: full.fit(X),
        target=20,
        rounds=2,
    )
    print(f"{early.n_iter_} and {full.n_iter_} iterations")
    print(f"cost over KMeans's cost: {early.inertia_ / full.inertia_:.4f} (target at most 1.05)")


if __name__ == "__main__":
    main()
