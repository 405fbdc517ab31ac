"""A step of the three losses against one with n x n matrices throughout, at n = 2,000, and a whole training."""

import time

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import race
from posterity.fairness import ConsensusFairClustering
from posterity.fairness.consensus_losses import contrast, divergence, soft_assignment, structure

ALPHA, BETA, TEMPERATURE, ORDER = 10.0, 50.0, 2.0, 2


def by_matrices(z: Tensor, centers: Tensor, A: Tensor, Y: Tensor, groups: Tensor, order: Tensor) -> Tensor:
    """Return the loss as the official code finds it, re-expressed: rows shuffled each epoch, W with them."""
    z, Y, groups = z[order], Y[order], groups[order]
    W = torch.matrix_power(A[order][:, order], ORDER)
    unit = z / z.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    similarity = similarity * (1 - torch.eye(len(z)))
    e = torch.exp(TEMPERATURE * similarity)
    loss = -torch.log((e * W).sum(1) / e.sum(1) + 1e-8).mean()
    q = 1 / (1 + (z[:, None] - centers).square().sum(2))
    q = q / q.sum(1, keepdim=True)
    for g in (0, 1):
        own = groups == g
        part, reference = q[own], Y[own]
        target = (part.square() / part.sum(0)).detach()
        target = target / target.sum(1, keepdim=True)
        loss = loss + ALPHA * (target * (target / part).log()).sum() / 2
        loss = loss + BETA * (part @ part.T - reference @ reference.T).square().sum() / 2
    return loss


def main() -> None:
    torch.manual_seed(0)
    n, k, h = 2_000, 10, 64
    z, centers = torch.randn(n, h).requires_grad_(), torch.randn(k, h).requires_grad_()
    A = torch.rand(n, n)
    A = ((A + A.T) / 2).fill_diagonal_(1)
    W = torch.linalg.matrix_power(A, ORDER)
    Y, groups = torch.eye(k)[torch.randint(k, (n,))], torch.arange(n) % 2
    rows = [(groups == g).nonzero()[:, 0] for g in (0, 1)]

    def ours() -> Tensor:
        q = soft_assignment(z, centers)
        return contrast(z, W, TEMPERATURE) + ALPHA * divergence(q, rows) + BETA * structure(q, Y, rows)

    def theirs() -> Tensor:
        return by_matrices(z, centers, A, Y, groups, torch.randperm(n))

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    race(
        f"n = {n}: a step, against n x n matrices",
        lambda: torch.autograd.grad(ours(), (z, centers)),
        lambda: torch.autograd.grad(theirs(), (z, centers)),
        target=2,
        rounds=7,
    )

    def known() -> Tensor:  # the official steps, had they kept W and the order
        e = torch.exp(TEMPERATURE * (cosine(z) * (1 - torch.eye(n))))
        loss = -torch.log((e * W).sum(1) / e.sum(1) + 1e-8).mean()
        q = soft_assignment(z, centers)
        for own in rows:
            part, reference = q[own], Y[own]
            loss = loss + BETA * (part @ part.T - reference @ reference.T).square().sum() / 2
        return loss + ALPHA * divergence(q, rows)

    race(
        f"n = {n}: the same where the peer too computes W once",
        lambda: torch.autograd.grad(ours(), (z, centers)),
        lambda: torch.autograd.grad(known(), (z, centers)),
        target=1,
        rounds=7,
    )

    rng = np.random.default_rng(0)
    group = np.arange(240) % 2
    X = rng.normal(2 * rng.normal(size=(4, 8))[rng.integers(0, 4, 240)]) + 3.0 * group[:, None]
    model = ConsensusFairClustering(4, beta=5.0, hidden=36, epochs=150, n_init=1, random_state=0)
    start = time.perf_counter()
    model.fit(X, sensitive_features=group)
    print(
        f"n = 240, 150 epochs with the co-association: {time.perf_counter() - start:.2f} s (target about 1 s)"
    )


def cosine(z: Tensor) -> Tensor:
    unit = z / z.norm(dim=1, keepdim=True)
    return unit @ unit.T


if __name__ == "__main__":
    main()
