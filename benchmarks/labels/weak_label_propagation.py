"""Propagation against the dense inverse that the official program forms, and time and memory of many points."""

import resource
import time

import numpy as np
from numpy import ndarray

from benchmarks.timing import race
from posterity.labels import aggregate_votes, distance_graph, propagate


def by_inverse(W: ndarray, prior: ndarray, labels: ndarray, labeled: ndarray, kappa: float) -> ndarray:
    """Return the same distributions by the inverse of a dense matrix."""
    n = len(W)
    free = np.setdiff1d(np.arange(n), labeled)
    f = np.zeros_like(prior)
    f[labeled] = np.eye(prior.shape[1])[labels]
    system = np.diag(W.sum(1) + kappa) - W
    inverse = np.linalg.inv(system[np.ix_(free, free)])
    f[free] = inverse @ (W[np.ix_(free, labeled)] @ f[labeled] + kappa * prior[free])
    return f


def problem(n: int, d: int, n_labels: int = 100) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Return points, votes of eight rules, labels and who has them."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    votes = np.where(rng.random((n, 8)) < 0.75, y[:, None], 1 - y[:, None])
    votes[rng.random((n, 8)) < 0.4] = -1
    labeled = rng.permutation(n)[:n_labels]
    return rng.normal(size=(n, d)) + 2 * y[:, None], votes, y[labeled], labeled


def main() -> None:
    X, votes, labels, labeled = problem(50_000, 2)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    W, prior = distance_graph(X, 10, random_state=0), aggregate_votes(votes, 2)
    middle = time.perf_counter()
    propagate(W, prior, labels, labeled, confidence=0.1)
    end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"n = 50,000 in the plane, degree 10: {end - start:.2f} s (target under 3 s), of these {end - middle:.2f} s propagation; "
        f"{(after - before) / 1e3:.0f} MB more than before (target under 500 MB)"
    )
    X, votes, labels, labeled = problem(3_000, 2)
    W, prior = distance_graph(X, 10), aggregate_votes(votes, 2)
    dense = W.toarray()
    np.testing.assert_allclose(
        propagate(W, prior, labels, labeled, confidence=0.1),
        by_inverse(dense, prior, labels, labeled, 0.1), rtol=0, atol=1e-7,
    )  # fmt: skip
    race(
        "n = 3,000, degree 10, against the dense inverse",
        lambda: propagate(W, prior, labels, labeled, confidence=0.1),
        lambda: by_inverse(dense, prior, labels, labeled, 0.1),
        target=50, rounds=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
