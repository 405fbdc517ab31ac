"""Race the update of prototypes with a loop over samples, and the score with faiss.

Run from the repository root: ``python -m benchmarks.uncertainty.cider``.
"""

from importlib.util import find_spec

import torch
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.uncertainty import KNNScore, dispersion_loss, update_prototypes


def loop(prototypes, z, y, momentum):
    """Move prototypes sample by sample, as the official code does."""
    rows = prototypes.clone()
    for sample, label in zip(z, y.tolist(), strict=True):
        row = F.normalize(momentum * rows[label] + (1 - momentum) * sample, dim=0)
        rows = rows.clone()
        rows[label] = row
    return rows


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for n_classes, target in ((100, 20), (10, 5)):
        mu = F.normalize(torch.randn(n_classes, 128, generator=generator), dim=1)
        z = F.normalize(torch.randn(1024, 128, generator=generator), dim=1).requires_grad_()
        y = torch.randint(n_classes, (1024,), generator=generator)
        race(f"prototypes of 1,024 samples, {n_classes} classes, with gradient, against a loop",
             lambda mu=mu, z=z, y=y: torch.autograd.grad(dispersion_loss(update_prototypes(mu, z, y, 0.95)), z),
             lambda mu=mu, z=z, y=y: torch.autograd.grad(dispersion_loss(loop(mu, z, y, 0.95)), z),
             target=target, rounds=5)  # fmt: skip
    if find_spec("faiss") is None:
        print("score, against faiss: skipped, faiss is not installed")
        return
    known, queries = (
        torch.randn(50_000, 128, generator=generator),
        torch.randn(2_000, 128, generator=generator),
    )
    ours, theirs = (KNNScore(50, backend=backend).fit(known) for backend in ("torch", "faiss"))
    race("2,000 queries against 50,000 features, against faiss (within 1.5 times)",
         lambda: ours.score(queries), lambda: theirs.score(queries), target=1 / 1.5, rounds=3)  # fmt: skip


if __name__ == "__main__":
    main()
