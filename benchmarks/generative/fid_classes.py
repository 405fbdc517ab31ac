"""Race the Fréchet distance with scipy's square root and torchmetrics, and a step of resampling with autograd.

Run from the repository root: ``python -m benchmarks.generative.fid_classes``.
"""

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from benchmarks.timing import race
from posterity.generative import feature_stats, frechet_distance, resample_weights

D = 2048


def distances() -> None:
    """Time the distance of two sets of Inception's width, from their statistics."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64) / D**0.5
    sets = [torch.randn(2 * D, D, generator=generator, dtype=torch.float64) @ mix for _ in range(2)]
    a, b = (feature_stats(x) for x in sets)

    def by_square_root() -> float:
        root = sqrtm(a.cov.numpy() @ b.cov.numpy())
        gap = (a.mean - b.mean).square().sum()
        return float(gap + a.cov.trace() + b.cov.trace() - 2 * np.trace(root.real))

    def ours() -> Tensor:
        return frechet_distance(a, b)

    def torchmetrics() -> Tensor:
        return _compute_fid(a.mean, a.cov, b.mean, b.cov)

    torch.testing.assert_close(ours(), torchmetrics(), rtol=1e-6, atol=0)
    race(f"distance at d = {D}, against scipy's sqrtm", ours, by_square_root, target=5, rounds=1)
    race(f"distance at d = {D}, against torchmetrics", ours, torchmetrics, target=1, rounds=1)


def steps(m: int = 5_000, d: int = 256, max_iter: int = 20) -> None:
    """Time steps of descent on the weights of m candidates."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2_000, d, generator=generator, dtype=torch.float64)
    made = 1.2 * torch.randn(m, d, generator=generator, dtype=torch.float64) + 0.1
    target = feature_stats(real)

    def ours() -> Tensor:
        return resample_weights(real, made, max_iter=max_iter, optimizer="sgd", lr=10.0).log_weights

    def autograd() -> Tensor:
        """Descend as the official code does, by autograd through the eigenvalues of the product of the covariances."""
        logs = torch.zeros(m, 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logs], lr=10.0)
        for _ in range(max_iter):
            optimizer.zero_grad()
            weights = logs.exp()
            total = weights.sum()
            mean = weights.T @ made / total
            cov = (made - mean).T @ (weights * (made - mean)) / (total - 1)
            values, _ = torch.linalg.eig(cov @ target.cov)  # with vectors, as the official code asks for
            trace = (values.real + 1e-12).sqrt().sum()
            loss = (target.mean - mean[0]).square().sum() + target.cov.trace() + cov.trace() - 2 * trace
            loss.backward()
            optimizer.step()
        return logs.detach()[:, 0]

    torch.testing.assert_close(ours().softmax(0), autograd().softmax(0), rtol=1e-4, atol=0)
    race(
        f"{max_iter} steps at m = {m}, d = {d}, against autograd through eigenvalues",
        ours,
        autograd,
        target=4,
        rounds=3,
    )


def main() -> None:
    torch.set_num_threads(1)
    steps()
    distances()


if __name__ == "__main__":
    main()
