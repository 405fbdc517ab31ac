"""Race SFRIK with VICReg from its covariance matrices, and with a polynomial a degree; print memory and growth.

Run from the repository root: ``python -m benchmarks.representation.sfrik``.
"""

import torch
from torch.nn import functional as F

from benchmarks.representation.ssl_duality import covariances
from benchmarks.timing import race
from posterity.representation import SFRIKLoss, legendre


def each_degree(z1, z2, weights=(1.0, 40.0, 40.0)):
    """Evaluate the polynomial of each degree on the matrix of cosines, as the official code does."""
    u = [F.normalize(z, dim=1) for z in (z1, z2)]
    value = 0.5 * (u[0] - u[1]).square().sum(1).mean()
    for z in u:
        cosine = z @ z.T
        for degree, b in enumerate(weights, 1):
            value = value + b * legendre(cosine, degree, z.shape[1]).mean() / 2
    return value


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)

    def step(loss, z):
        return lambda: torch.autograd.grad(loss(*z), z)

    for n, d, target in ((256, 2048, 2), (256, 8192, 8), (512, 512, 1)):
        z = [torch.randn(n, d, generator=rng).requires_grad_() for _ in range(2)]
        race(f"{n} pairs in {d} dimensions, forward and backward, against VICReg's (d, d) matrices "
             f"({n * n * 4 / 2**20:.2f} MiB a matrix instead of {d * d * 4 / 2**20:.2f})",
             step(SFRIKLoss(), z), step(covariances, z), target=target, rounds=5)  # fmt: skip
    z = [torch.randn(2048, 1024, generator=rng).requires_grad_() for _ in range(2)]
    race("2,048 pairs in 1,024 dimensions, forward and backward, against a polynomial a degree",
         step(SFRIKLoss(), z), step(each_degree, z), target=1.3, rounds=5)  # fmt: skip


if __name__ == "__main__":
    main()
