"""Race the loss with that of FixMatch on the same logits, with the usual program's steps, and in a training step.

Run from the repository root: ``python -m benchmarks.labels.softmatch``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.nets import cnn
from posterity.labels import SoftMatchLoss

CLASSES, LABELLED, UNLABELLED = 100, 64, 448


def fixmatch(labeled: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
    """Return the loss of a threshold of 0.95."""
    confidence, pseudo = weak.detach().softmax(1).max(1)
    mask = (confidence >= 0.95).to(strong)
    return F.cross_entropy(labeled, y) + (F.cross_entropy(strong, pseudo, reduction="none") * mask).mean()


class ByNumbers(nn.Module):
    """SoftMatch with its Gaussian for each class, in a loop over classes that reads numbers from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.mu, self.var = None, [1 / CLASSES] * CLASSES, [1.0] * CLASSES

    def forward(self, labeled: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        with torch.no_grad():
            p = weak.softmax(1)
            self.model = p.mean(0) if self.model is None else 0.999 * self.model + 0.001 * p.mean(0)
            q = p * (1 / CLASSES + 1e-6) / (self.model + 1e-6)
            confidence, label = (q / q.sum(1, keepdim=True)).max(1)
            for k in range(CLASSES):
                own = confidence[label == k]
                mean, var = (own.mean().item(), own.var().item()) if len(own) > 1 else (0.0, 1.0)
                self.mu[k] = 0.999 * self.mu[k] + 0.001 * mean
                self.var[k] = 0.999 * self.var[k] + 0.001 * var
            mu, var = torch.tensor(self.mu)[label], torch.tensor(self.var)[label]
            weight = torch.exp(-((confidence - mu).clamp(max=0) ** 2) / (2 * var / 4))
        nll = F.cross_entropy(strong, p.argmax(1), reduction="none")
        return F.cross_entropy(labeled, y) + (weight * nll).mean()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    labeled, weak, strong = (
        3 * torch.randn(n, CLASSES, generator=generator) for n in (LABELLED, UNLABELLED, UNLABELLED)
    )
    y = torch.randint(CLASSES, (LABELLED,), generator=generator)
    leaves = [labeled.requires_grad_(), strong.requires_grad_()]
    ours, each, peer = SoftMatchLoss(CLASSES), SoftMatchLoss(CLASSES, per_class=True), ByNumbers()
    torch.testing.assert_close(each(labeled, y, weak, strong), peer(labeled, y, weak, strong))

    def gradient(loss):
        return lambda: torch.autograd.grad(loss(labeled, y, weak, strong), leaves)

    race("loss and gradient with a Gaussian a class, against a loop over classes",
         gradient(each), gradient(peer), target=2, rounds=51)  # fmt: skip
    race("loss and gradient, against FixMatch's (within 10 %)",
         gradient(ours), gradient(fixmatch), target=1 / 1.1, rounds=201,
         why="Means, variances and weights of confidences are more passes over the probabilities than a threshold.")  # fmt: skip

    net = cnn(3, CLASSES, width=8, depth=3)
    images = torch.rand(LABELLED + 2 * UNLABELLED, 3, 16, 16, generator=generator)

    def step(loss):
        def run():
            net.zero_grad()
            z, weak, strong = net(images).split([LABELLED, UNLABELLED, UNLABELLED])
            loss(z, y, weak, strong).backward()

        return run

    race("a step of a small network on images of 16 x 16, against FixMatch's (within 10 %)",
         step(ours), step(fixmatch), target=1 / 1.1, rounds=15)  # fmt: skip


if __name__ == "__main__":
    main()
