"""Race pixel contrast with the loop over pixels and with a training step, and gates of classes with a loop over them.

Run from the repository root: ``python -m benchmarks.generative.ecgan``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.generative import (
    ECGAN,
    ECGANGenerator,
    MultiModalDiscriminator,
    PixelContrastiveLoss,
    SemanticPreserving,
)


def by_pixels(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the contrastive loss by a loop over pixels, each against all others at once."""
    z = F.normalize(embeddings, dim=1).movedim(1, 3).flatten(0, 2)
    y, every = labels.flatten(), []
    for i in range(len(z)):
        logits = z @ z[i] / temperature
        positive, negative = y == y[i], logits[y != y[i]]
        positive[i] = False
        if positive.any() and len(negative):
            against = negative.logsumexp(0)
            every.append((torch.logaddexp(logits[positive], against) - logits[positive]).mean())
    return torch.stack(every).mean()


def by_pairs(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the same by a loop over pixels and their positives, as it is defined."""
    z = F.normalize(embeddings, dim=1).movedim(1, 3).flatten(0, 2)
    y, total = labels.flatten(), torch.zeros(())
    for i in range(len(z)):
        logits = z @ z[i] / temperature
        against, positives = (
            logits[y != y[i]].exp().sum(),
            [j for j in range(len(z)) if j != i and y[j] == y[i]],
        )
        for j in positives:
            total = total - (logits[j].exp() / (logits[j].exp() + against)).log() / len(positives)
    return total / len(z)


def contrast() -> None:
    """Time value and gradient on small batches, and on what a training step has."""
    torch.manual_seed(0)
    loss = PixelContrastiveLoss(max_pixels_per_class=None)
    for side, peer, what, target, rounds in (
        (8, by_pairs, "a loop over pixels and positives", 20, 3),
        (16, by_pixels, "a loop over pixels alone", 10, 5),
    ):
        x, labels = torch.randn(4, 32, side, side).requires_grad_(), torch.randint(8, (4, side, side))
        torch.testing.assert_close(loss(x, labels), peer(x, labels), rtol=1e-4, atol=1e-5)
        race(
            f"contrast of {4 * side**2:,} pixels, against {what}",
            lambda x=x, labels=labels: torch.autograd.grad(loss(x, labels), x),
            lambda x=x, labels=labels, peer=peer: torch.autograd.grad(peer(x, labels), x),
            target=target,
            rounds=rounds,
        )
    labels = torch.randint(35, (4, 64, 64))
    layout, image = F.one_hot(labels, 35).movedim(3, 1), torch.rand(4, 3, 64, 64) * 2 - 1
    gan = ECGAN(ECGANGenerator(35), MultiModalDiscriminator(35))
    batch, edge = (layout, image), torch.zeros(4, 1, 64, 64)
    features = torch.randn(4, 64, 64, 64).requires_grad_()
    race(
        "contrast within a training step of four images of 64 x 64 in 35 classes, against all of it",
        lambda: torch.autograd.grad(PixelContrastiveLoss()(features, labels), features),
        lambda: gan.fit([(*batch, edge)], 1),
        target=20,
        rounds=3,
    )


@torch.no_grad()
def gates() -> None:
    """Time the gates of 150 classes."""
    torch.manual_seed(0)
    x, layout = (
        torch.randn(2, 64, 64, 64),
        F.one_hot(torch.randint(150, (2, 64, 64)), 150).movedim(3, 1).float(),
    )
    module = SemanticPreserving(150, 64)

    def by_classes() -> Tensor:
        out = x.clone()
        for c in range(150):
            where = layout[:, c, None]
            mean = (x * where).sum((2, 3)) / where.sum((2, 3)).clamp_min(1)
            gate = module.excite(module.squeeze(mean).relu()).sigmoid()
            out += where * gate[:, :, None, None] * x
        return out

    torch.testing.assert_close(module(x, layout), by_classes(), rtol=1e-4, atol=1e-4)
    race(
        "gates of 150 classes, against a loop over them",
        lambda: module(x, layout),
        by_classes,
        target=5,
        rounds=7,
    )


def main() -> None:
    torch.set_num_threads(1)
    contrast()
    gates()


if __name__ == "__main__":
    main()
