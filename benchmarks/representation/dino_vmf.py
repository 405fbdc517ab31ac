"""Race the constant with what it is added to and with other ways to it, and the loss with one cross-entropy a pair.

Run from the repository root: ``python -m benchmarks.representation.dino_vmf``.
"""

import mpmath
import numpy as np
import torch
from scipy.special import ive
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.memory import peak_bytes
from posterity.representation import DINOvMFLoss, vmf_log_normalizer, vmf_logits


def by_scipy(kappa, dim):
    """Take the logarithm of scipy's scaled Bessel function."""
    nu = dim / 2 - 1
    return nu * np.log(kappa) - (nu + 1) * np.log(2 * np.pi) - np.log(ive(nu, kappa)) - kappa


def by_mpmath(kappa, dim):
    """Take mpmath's Bessel function, one number at a time."""
    nu = dim / 2 - 1
    return [
        nu * mpmath.log(k) - (nu + 1) * mpmath.log(2 * mpmath.pi) - mpmath.log(mpmath.besseli(nu, k))
        for k in kappa.tolist()
    ]


def pairwise(student, teacher):
    """Sum probabilities times log-softmax for each pair of views, as DINO's code in common use does."""
    total, pairs = 0.0, 0
    for i, q in enumerate(t.softmax(1) for t in teacher):
        for j, view in enumerate(student):
            if i != j:
                total = total - (q * view.log_softmax(1)).sum(1).mean()
                pairs += 1
    return total / pairs


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    y = F.normalize(torch.randn(256, 256, generator=rng), dim=1)
    weight = F.normalize(torch.randn(65536, 256, generator=rng), dim=1)
    kappa = 5 + 30 * torch.rand(65536, generator=rng)
    with torch.no_grad():
        race("65,536 constants in 256 dimensions, against the (256, 256) x (256, 65,536) product they go with",
             lambda: vmf_log_normalizer(kappa, 256), lambda: y @ weight.T, target=50)  # fmt: skip
        race("logits with constants, 65,536 prototypes, against the plain product over the temperature",
             lambda: vmf_logits(y, weight, 0.1), lambda: y @ weight.T / 0.1, target=0.95, rounds=7)  # fmt: skip
    exact = kappa.double()
    race("65,536 constants in 256 dimensions, against scipy.special.ive and a logarithm",
         lambda: vmf_log_normalizer(exact, 256), lambda: by_scipy(exact.numpy(), 256), target=5)  # fmt: skip
    few = exact[:4096]
    race("4,096 constants in 256 dimensions, against mpmath",
         lambda: vmf_log_normalizer(few, 256), lambda: by_mpmath(few, 256), target=100, rounds=3)  # fmt: skip
    for n, k, target in ((32, 4096, 1), (128, 4096, 1.3), (32, 65536, 1.3)):
        student = [torch.randn(n, k, generator=rng).requires_grad_() for _ in range(6)]
        teacher = [torch.randn(n, k, generator=rng) for _ in range(2)]
        loss = DINOvMFLoss(k, centering="none")

        def step(of, student=student, teacher=teacher):
            return lambda: torch.autograd.grad(of(student, teacher), student)

        race(f"loss of two global and four local views, {n} rows, {k:,} prototypes, forward and backward, "
             "against one cross-entropy a pair",
             step(loss), step(pairwise), target=target, rounds=7)  # fmt: skip
        mine, theirs = (peak_bytes(step(of)) / 2**20 for of in (loss, pairwise))
        print(f"  peak memory {mine:.0f} MiB instead of {theirs:.0f}")


if __name__ == "__main__":
    main()
