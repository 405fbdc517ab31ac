"""Rounds of all tasks at once against a loop over tasks by least squares of numpy."""

import numpy as np
import torch
from numpy import ndarray

from benchmarks.timing import race
from posterity.representation import dfw, subspace_distance

LR = 0.05


def by_loops(phi: ndarray, x: ndarray, y: ndarray, rounds: int, rng: np.random.Generator | None) -> ndarray:
    """Return the representation after rounds with fixed halves, or with new ones drawn by ``rng``."""
    half = x.shape[1] // 2
    for _ in range(rounds):
        total = np.zeros_like(phi)
        for a, b in zip(x, y, strict=True):
            if rng is not None:
                rows = rng.permutation(len(a))
                a, b = a[rows], b[rows]
            head = np.linalg.lstsq(a[:half] @ phi.T, b[:half], rcond=None)[0].T
            operator = np.linalg.lstsq(a[half:], b[half:], rcond=None)[0].T
            total += phi - LR * head.T @ (head @ phi - operator)
        q, r = np.linalg.qr(total.T)
        phi = (q * np.sign(np.diag(r))).T
    return phi


def main() -> None:
    tasks, n, dx, dy, r = 100, 1_000, 50, 10, 5
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    phi, start = (torch.linalg.qr(normal(dx, r)).Q.T for _ in range(2))
    x = normal(tasks, n, dx) * (0.5 * normal(tasks, 1, dx)).exp()
    y = x @ phi.T @ normal(tasks, r, dy) + normal(tasks, n, dy)
    arrays = start.numpy(), x.numpy(), y.numpy()
    ours = dfw(x, y, r, max_iter=3, lr=LR, init=start, partition="fixed", tol=0).phi
    assert float(subspace_distance(ours, torch.from_numpy(by_loops(*arrays, 3, None)))) < 1e-8
    for partition, rounds, target in (("fixed", 60, 10), ("shuffle", 5, 1)):
        race(
            f"{tasks} tasks of {n} rows, {dx} inputs, {rounds} rounds, {partition} halves, against a loop over tasks",
            lambda: dfw(x, y, r, max_iter=rounds, lr=LR, init=start, partition=partition, tol=0, random_state=0),  # noqa: B023
            lambda: by_loops(*arrays, rounds, None if partition == "fixed" else np.random.default_rng(0)),  # noqa: B023
            target=target, rounds=3,
        )  # fmt: skip


if __name__ == "__main__":
    main()
