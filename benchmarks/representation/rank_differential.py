"""Race the filtered loss with a full singular value decomposition a view, as the official code takes it.

Run from the repository root: ``python -m benchmarks.representation.rank_differential``.
"""

import torch
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.memory import peak_bytes
from posterity.representation import RDMLoss


def by_matrices(z1, z2):
    """Multiply each view by the (d, d) matrix W of its full decomposition."""
    value = 0.0
    for online, target in ((z1, z2), (z2, z1)):
        with torch.no_grad():
            _, s, right = torch.linalg.svd(online, full_matrices=True)
            gains = torch.cat([s, s.new_zeros(len(right) - len(s))])
            w = right.T @ torch.diag(gains) @ right
        value = value - F.cosine_similarity(online @ w, target.detach()).mean() / 2
    return value


def by_thin_svd(z1, z2):
    """Multiply singular values by themselves, from a thin decomposition."""
    value = 0.0
    for online, target in ((z1, z2), (z2, z1)):
        with torch.no_grad():
            _, s, right = torch.linalg.svd(online, full_matrices=False)
        value = value - F.cosine_similarity((online @ right.T * s) @ right, target.detach()).mean() / 2
    return value


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)

    def step(loss, z):
        return lambda: torch.autograd.grad(loss(*z), z)

    for n, d, target in ((256, 2048, 3), (512, 128, 1)):
        z = [torch.randn(n, d, generator=rng).requires_grad_() for _ in range(2)]
        race(f"{n} pairs in {d} dimensions, forward and backward, against a full decomposition and a (d, d) matrix",
             step(RDMLoss(), z), step(by_matrices, z), target=target, rounds=3)  # fmt: skip
        race(f"{n} pairs in {d} dimensions, forward and backward, against a thin decomposition",
             step(RDMLoss(), z), step(by_thin_svd, z), target=1, rounds=5)  # fmt: skip
        mine, theirs = (peak_bytes(step(loss, z)) / 2**20 for loss in (RDMLoss(), by_matrices))
        print(f"  peak memory {mine:.0f} MiB instead of {theirs:.0f}")


if __name__ == "__main__":
    main()
