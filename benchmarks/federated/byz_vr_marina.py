"""Race steps of the solver with a loop over workers, and aggregation with numpy as Flower's strategies do it.

Run from the repository root: ``python -m benchmarks.federated.byz_vr_marina``.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.federated import FiniteSum, alie, byz_vr_marina, coordinate_median, geometric_median, krum

GOOD, LIARS, D, BATCH, ROWS, STEPS = 17, 3, 123, 32, 2_000, 30


def loss(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(X @ w, y) + 0.01 * (w @ w)


def gradient(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("kb,kbd->kd", torch.sigmoid(X @ w) - y, X) / X.shape[1] + 0.02 * w


def one_by_one(X: Tensor, y: Tensor, p: float) -> Tensor:
    """Take the same steps with a backward pass for each worker, and buckets by a Python loop."""
    rng, w = torch.Generator().manual_seed(0), torch.zeros(D)

    def grad(w: Tensor, rows: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        loss(w, X[rows], y[rows]).backward()
        return w.grad  # type: ignore[return-value]

    good = [grad(w, torch.arange(ROWS)) for _ in range(GOOD)]
    for _ in range(STEPS):
        stacked = torch.stack(good)
        sent = [*good, *[stacked.mean(0) - 0.08 * stacked.std(0) for _ in range(LIARS)]]
        order = torch.randperm(len(sent), generator=rng).tolist()
        buckets = [torch.stack([sent[i] for i in order[k : k + 2]]).mean(0) for k in range(0, len(order), 2)]
        g = torch.stack(buckets).median(0).values
        after = w - 0.1 * g
        if float(torch.rand((), generator=rng)) < p:
            good = [grad(after, torch.arange(ROWS)) for _ in range(GOOD)]
        else:
            batches = [torch.randint(ROWS, (BATCH,), generator=rng) for _ in range(GOOD)]
            good = [g + grad(after, rows) - grad(w, rows) for rows in batches]
        w = after
    return w


def numpy_krum(vectors: np.ndarray, f: int) -> np.ndarray:
    """Return the vector of least score, distances pair by pair."""
    n = len(vectors)
    distance = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            distance[i, j] = np.linalg.norm(vectors[i] - vectors[j]) ** 2
    scores = [np.sort(row)[1 : n - f - 1].sum() for row in distance]
    return vectors[int(np.argmin(scores))]


def main() -> None:
    torch.manual_seed(0)
    X, y = torch.randn(ROWS, D), torch.randint(2, (ROWS,)).float()
    peer = lambda: one_by_one(X, y, BATCH / ROWS)  # noqa: E731

    def solve(**options: object) -> object:
        problem = FiniteSum(loss, (X, y), n_workers=GOOD, **options)  # type: ignore[arg-type]
        return byz_vr_marina(
            problem, torch.zeros(D), lr=0.1, n_steps=STEPS, n_byzantine=LIARS, attack=alie, batch_size=BATCH,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    race(
        "30 steps of 20 workers, gradient in closed form",
        lambda: solve(gradient=gradient),
        peer,
        target=10,
        rounds=7,
    )
    race("30 steps of 20 workers, any loss", solve, peer, target=3, rounds=7)
    vectors = torch.randn(20, 1_000_000)
    as_numpy = vectors.numpy()
    race(
        "median of 20 vectors of a million numbers, against numpy's", lambda: coordinate_median(vectors),
        lambda: np.median(as_numpy, axis=0), target=1, rounds=3,
    )  # fmt: skip
    race(
        "Krum of 20 vectors of a million numbers, against numpy", lambda: krum(vectors, 3),
        lambda: numpy_krum(as_numpy, 3), target=1, rounds=3,
    )  # fmt: skip

    def weiszfeld() -> Tensor:
        z = torch.zeros(vectors.shape[1])
        for _ in range(32):
            weight = [1 / max(float(torch.linalg.vector_norm(v - z)), 1e-10) for v in vectors]
            z = sum(w * v for w, v in zip(weight, vectors, strict=True)) / sum(weight)  # type: ignore[assignment]
        return z

    race(
        "geometric median of 20 vectors of a million numbers, against 32 steps one by one",
        lambda: geometric_median(vectors), weiszfeld, target=1, rounds=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
