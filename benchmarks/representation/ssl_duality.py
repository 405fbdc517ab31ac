"""Race NT-Xent with two ways in use, covariances and both criteria with their d x d or n x n forms.

Run from the repository root: ``python -m benchmarks.representation.ssl_duality``.
"""

import torch
from pytorch_metric_learning.losses import NTXentLoss as TheirNTXentLoss
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.representation import NTXentLoss, VICRegLoss, duality_terms


def reshaped(z1, z2, temperature=0.15):
    """Gather positives and negatives by boolean masks, as most implementations do."""
    z, n = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    similar = z @ z.T
    labels = torch.cat([torch.arange(n)] * 2)
    alike = labels[:, None] == labels[None]
    own = torch.eye(2 * n, dtype=torch.bool)
    alike, similar = alike[~own].view(2 * n, -1), similar[~own].view(2 * n, -1)
    logits = torch.cat([similar[alike].view(2 * n, -1), similar[~alike].view(2 * n, -1)], dim=1)
    return F.cross_entropy(logits / temperature, torch.zeros(2 * n, dtype=torch.long))


def covariances(z1, z2):
    """Compute VICReg from its (d, d) covariance matrices."""
    value = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        z = z - z.mean(0)
        c = z.T @ z / (len(z) - 1)
        value = value + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        value = value + (c.square().sum() - c.diagonal().square().sum()) / len(c)
    return value


def both_gram_matrices(k):
    """Compute each criterion from its own Gram matrix."""
    rows, columns = k @ k.T, k.T @ k
    return [(g - g.diagonal().diag()).square().sum() for g in (rows, columns)]


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)

    def step(loss, z):
        return lambda: torch.autograd.grad(loss(*z), z)

    for n, d in ((512, 128), (128, 128), (512, 2048)):
        z = [torch.randn(n, d, generator=rng).requires_grad_() for _ in range(2)]
        race(f"NT-Xent, {n} pairs in {d} dimensions, forward and backward, against masks and reshapes",
             step(NTXentLoss(), z), step(reshaped, z), target=1.5 if d < 1024 else 1)  # fmt: skip
    theirs, labels = TheirNTXentLoss(0.15), torch.arange(64).repeat(2)
    z = [torch.randn(64, 128, generator=rng).requires_grad_() for _ in range(2)]
    race("NT-Xent, 64 pairs in 128 dimensions, forward and backward, against pytorch-metric-learning",
         step(NTXentLoss(), z), step(lambda *z: theirs(torch.cat(z), labels), z), target=1)  # fmt: skip
    for n, d, target in ((256, 4096, 4), (512, 512, 1)):
        z = [torch.randn(n, d, generator=rng).requires_grad_() for _ in range(2)]
        race(f"VICReg, {n} pairs in {d} dimensions, forward and backward, against (d, d) matrices",
             step(VICRegLoss(), z), step(covariances, z), target=target)  # fmt: skip
    k = torch.randn(4096, 128, generator=rng)
    race("both criteria, 4,096 samples in 128 dimensions, against both Gram matrices",
         lambda: duality_terms(k), lambda: both_gram_matrices(k), target=10)  # fmt: skip


if __name__ == "__main__":
    main()
