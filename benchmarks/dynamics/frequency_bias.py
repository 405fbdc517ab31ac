"""Race the Sobolev matrix against explicit harmonics, its image form against the mean squared error, and a
prediction for many times against one matrix exponential a time.

Run from the repository root: ``python -m benchmarks.dynamics.frequency_bias``.
"""

import time

import numpy as np
import torch
from scipy.special import sph_harm_y
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.dynamics import ImageSobolevLoss, SobolevLoss, predicted_residual, quadrature_weights, relu_ntk


def sphere(n: int, d: int) -> Tensor:
    x = torch.randn(n, d, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def explicit(x: Tensor, weights: Tensor, s: float, degree: int) -> Tensor:
    """Return P_s from harmonics that are built, 2 l + 1 of a degree."""
    polar, around = np.arccos(x[:, 2].numpy()), np.arctan2(x[:, 1].numpy(), x[:, 0].numpy())
    total = np.zeros((len(x), len(x)))
    for each in range(degree + 1):
        rows = [sph_harm_y(each, m, polar, around) * weights.numpy() for m in range(-each, each + 1)]
        built = np.stack(rows)
        total += (1 + each) ** (2 * s) * (built.conj().T @ built).real
    return torch.from_numpy(total)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = sphere(2_000, 3)
    c = quadrature_weights(x)
    start = time.perf_counter()
    loss = SobolevLoss(x, 1.0, max_degree=30, weights=c)
    print(f"matrix of 2,000 points, degree 30: {time.perf_counter() - start:.2f} s (target 1.5)")
    torch.testing.assert_close(loss.matrix, explicit(x, c, 1.0, 30))
    race(
        "matrix of 2,000 points on the sphere, degree 30, against explicit harmonics",
        lambda: SobolevLoss(x, 1.0, max_degree=30, weights=c),
        lambda: explicit(x, c, 1.0, 30),
        target=10, rounds=5,
    )  # fmt: skip

    pred, target = torch.randn(2, 64, 1, 64, 64)
    pred.requires_grad_()
    images = ImageSobolevLoss(-1.0)
    race(
        "64 images of 64 x 64, loss and gradient, against mse_loss",
        lambda: torch.autograd.grad(images(pred, target), pred),
        lambda: torch.autograd.grad(F.mse_loss(pred, target), pred),
        target=1 / 1.5, rounds=51,
        why="A Fourier transform of each image stands beside one pass of subtraction.",
    )  # fmt: skip

    x = sphere(200, 3)
    r, times = torch.randn(200, dtype=torch.float64), torch.linspace(0, 100, 100, dtype=torch.float64)
    system = relu_ntk(x, x) @ SobolevLoss(x, 1.0).matrix
    by_exponentials = lambda: torch.stack([torch.matrix_exp(-t * system) @ r for t in times])  # noqa: E731
    torch.testing.assert_close(
        predicted_residual(x, r, times, s=1.0), by_exponentials(), rtol=1e-6, atol=1e-6
    )
    race(
        "residual of 200 points at 100 times, against 100 matrix exponentials",
        lambda: predicted_residual(x, r, times, s=1.0),
        by_exponentials,
        target=20, rounds=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
