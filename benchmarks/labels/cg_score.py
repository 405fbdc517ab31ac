"""Scores from one factorisation against removing one example after the other, as the official code does."""

import time

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits

from benchmarks.timing import race
from posterity.labels import cg_scores


def by_removal(X: ndarray, signs: ndarray, n_removed: int) -> ndarray:
    """Return the scores of the first examples: for each, the inverse without its row and column."""
    u = X / np.linalg.norm(X, axis=1, keepdims=True)
    cosine = np.clip(u @ u.T, -1, 1)
    gram = cosine * (np.pi - np.arccos(cosine)) / (2 * np.pi)
    np.fill_diagonal(gram, 0.5)
    inverse = np.linalg.inv(gram)
    whole = signs @ (inverse @ signs)
    scores = np.empty(n_removed)
    for i in range(n_removed):
        row, left = np.delete(inverse[i], i), np.delete(signs, i)
        rest = np.delete(np.delete(inverse, i, 0), i, 1) - np.outer(row, row) / inverse[i, i]
        scores[i] = whole - left @ (rest @ left)
    return scores


def main() -> None:
    for n, part, target in ((600, 1, 60), (2_000, 10, 150)):
        rng = np.random.default_rng(0)
        X, y = rng.normal(size=(n, 50)), rng.permutation(np.arange(n) % 2)
        signs = 2.0 * y - 1
        np.testing.assert_allclose(
            cg_scores(X, y, ratio=None)[:60], by_removal(X, signs, 60), rtol=1e-9, atol=1e-9
        )
        race(
            f"n = {n}, against {'removal of each' if part == 1 else 'a tenth of the removals'}",
            lambda: cg_scores(X, y, ratio=None),  # noqa: B023
            lambda: by_removal(X, signs, n // part),  # noqa: B023
            target=target / part, rounds=3,
        )  # fmt: skip
    X, y = load_digits(return_X_y=True)
    start = time.perf_counter()
    cg_scores(X[:1203], y[:1203], n_repeats=5, random_state=0)
    print(f"1,203 digits, 5 repeats: {time.perf_counter() - start:.3f} s (target under 0.5 s)")


if __name__ == "__main__":
    main()
