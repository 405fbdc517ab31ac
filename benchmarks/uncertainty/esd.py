"""ESD by sorting against the matrix form that its definition suggests, forward and backward."""

import time

import torch
from torch import Tensor

from benchmarks.timing import race
from posterity.uncertainty import expected_squared_difference


def by_matrices(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return the same estimate with n x n matrices: mean and variance of each row."""
    n = len(confidence)
    g = (confidence.detach() <= confidence.detach()[:, None]) * (correct - confidence)
    g = g.masked_fill(torch.eye(n, dtype=torch.bool), 0)
    mean = g.sum(1) / (n - 1)
    variance = ((g - mean[:, None]).square().sum(1) - mean.square()) / (n - 2)
    return (mean.square() - variance / (n - 1)).mean()


def main() -> None:
    for n, target, rounds in ((512, 4, 51), (8_192, 300, 3)):
        generator = torch.Generator().manual_seed(0)
        confidence = torch.rand(n, generator=generator).requires_grad_()
        correct = (torch.rand(n, generator=generator) < 0.6).float()
        torch.testing.assert_close(
            by_matrices(confidence, correct),
            expected_squared_difference(confidence, correct),
            rtol=1e-3,
            atol=1e-6,
        )
        race(
            f"n = {n}, against n x n matrices",
            lambda: torch.autograd.grad(expected_squared_difference(confidence, correct), confidence),  # noqa: B023
            lambda: torch.autograd.grad(by_matrices(confidence, correct), confidence),  # noqa: B023
            target=target, rounds=rounds,
        )  # fmt: skip
    confidence, correct = torch.rand(200_000).requires_grad_(), torch.ones(200_000)
    start = time.perf_counter()
    expected_squared_difference(confidence, correct).backward()
    print(f"n = 200000: {time.perf_counter() - start:.3f} s (target under 1 s)")


if __name__ == "__main__":
    main()
