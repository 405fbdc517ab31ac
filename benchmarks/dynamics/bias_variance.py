"""Race the decomposition against mlxtend's, which is given members that are trained already.

Run from the repository root: ``python -m benchmarks.dynamics.bias_variance``.
"""

import time
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.timing import race
from posterity.dynamics import bias_variance


class Stored:
    """A classifier whose training is to take the next member's predictions."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels, self.at = labels, -1

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Stored":
        self.at = (self.at + 1) % len(self.labels)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.labels[self.at]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    probs = (2 * torch.randn(50, 10_000, 100)).softmax(-1)
    y = torch.randint(100, (10_000,))
    start = time.perf_counter()
    bias_variance(probs, y)
    print(f"50 members, 10,000 samples, 100 classes: {time.perf_counter() - start:.2f} s (target 1)")

    if find_spec("mlxtend") is None:
        print("against mlxtend: skipped, mlxtend is not installed")
        return
    from mlxtend.evaluate import bias_variance_decomp

    for m, n, k in ((20, 5_000, 2), (50, 2_000, 10)):
        some, labels = probs[:m, :n, :k].softmax(-1).contiguous(), y[:n] % k
        members = Stored(some.argmax(2).numpy())
        X, X_test = np.zeros((10, 1)), np.zeros((n, 1))
        race(
            f"{m} members, {n:,} samples, {k} classes: each sample's, against mlxtend's mean 0-1 loss",
            lambda some=some, labels=labels: bias_variance(some, labels),
            lambda m=m, members=members, labels=labels, X=X, X_test=X_test: bias_variance_decomp(
                members, X, X[:, 0], X_test, labels.numpy(), loss="0-1_loss", num_rounds=m
            ),
            target=20, rounds=7,
        )  # fmt: skip


if __name__ == "__main__":
    main()
