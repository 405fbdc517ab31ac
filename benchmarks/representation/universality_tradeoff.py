"""Race the regulariser's contrastive loss with a broadcast cosine, and the closed form with gradient descent.

Run from the repository root: ``python -m benchmarks.representation.universality_tradeoff``.
"""

import torch
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.memory import peak_bytes
from posterity.representation import ContrastiveRegularizer, linear_contrastive_representation


def broadcast(z1, z2, temperature=0.5):
    """Compare all views by a broadcast cosine of shape (2n, 2n, d), as the official code does."""
    z, n = torch.cat([z1, z2]), len(z1)
    similar = F.cosine_similarity(z[:, None], z[None], dim=2) / temperature
    own = torch.eye(2 * n, dtype=torch.bool)
    positive = torch.cat([similar.diagonal(n), similar.diagonal(-n)])
    negatives = similar.masked_fill(own, -torch.inf)
    return (negatives.logsumexp(1) - positive).mean()


def descended(x1, x2, dim, steps=500, batch_size=256):
    """Minimise the spectral contrastive loss of a linear map by gradient descent on batches."""
    rng = torch.Generator().manual_seed(0)
    w = (torch.randn(dim, x1.shape[1], generator=rng) / x1.shape[1] ** 0.5).requires_grad_()
    opt = torch.optim.Adam([w], lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(len(x1), (batch_size,), generator=rng)
        a, b = x1[rows] @ w.T, x2[rows] @ w.T
        both = torch.cat([a, b])
        value = -2 * (a * b).sum(1).mean() + (both @ both.T).square().mean()
        opt.zero_grad()
        value.backward()
        opt.step()
    return w.detach()


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    loss = ContrastiveRegularizer(1.0)
    z = [torch.randn(256, 256, generator=rng).requires_grad_() for _ in range(2)]
    logits, target = torch.randn(256, 10, generator=rng), torch.arange(256) % 10

    def ours():
        return torch.autograd.grad(loss(logits, target, *z), z)

    def theirs():
        return torch.autograd.grad(F.cross_entropy(logits, target) + broadcast(*z), z)

    race("256 pairs in 256 dimensions, forward and backward, against a broadcast cosine",
         ours, theirs, target=10, rounds=3)  # fmt: skip
    mine, other = (peak_bytes(step) / 2**20 for step in (ours, theirs))
    print(f"  peak memory {mine:.0f} MiB instead of {other:.0f}")
    x = torch.randn(2000, 784, generator=rng)
    views = [x + 0.5 * torch.randn(x.shape, generator=rng) for _ in range(2)]
    views = [v - v.mean(0) for v in views]
    race("the best 64 features of 2,000 pairs in 784 dimensions, against 500 steps of gradient descent",
         lambda: linear_contrastive_representation(*views, 64), lambda: descended(*views, 64), target=1, rounds=3)  # fmt: skip


if __name__ == "__main__":
    main()
