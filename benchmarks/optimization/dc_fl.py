"""Race a forward step with back-propagation, and the loss on maps with one that multiplies at every position.

Run from the repository root: ``python -m benchmarks.optimization.dc_fl``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.optimization import DictionaryContrastiveLoss, ForwardTrainer, SupervisedContrastiveLoss

WIDTH, BATCH, CLASSES = 1024, 512, 10


def layers() -> list[nn.Module]:
    first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    return [
        first,
        *(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2)),
    ]


def at_every_position(maps: Tensor, y: Tensor, words: Tensor) -> Tensor:
    """Return the loss with a product at each position, averaged afterwards, written from the paper's formula."""
    local = maps.flatten(2).permute(2, 0, 1)  # positions, images, channels
    pooled = F.adaptive_avg_pool1d(words[None], maps.shape[1])[0]
    return F.cross_entropy((local @ pooled.T).mean(0), y)


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    trainer = ForwardTrainer(
        layers(), CLASSES, update="synchronous", generator=torch.Generator().manual_seed(0)
    )
    net = nn.Sequential(*layers(), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def backpropagate() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    race(
        "a synchronous step of three layers, against back-propagation",
        lambda: trainer.learn(x, y),
        backpropagate,
        target=1 / 1.5,
    )

    maps, words = (
        torch.randn(64, 256, 16, 16, requires_grad=True),
        torch.randn(CLASSES, 256, requires_grad=True),
    )
    loss, labels = DictionaryContrastiveLoss(), torch.randint(CLASSES, (64,))

    def forth_and_back(value: Tensor) -> None:
        torch.autograd.grad(value, (maps, words))

    race("the loss on 256 x 16 x 16 maps, forth and back, against a product at every position",
         lambda: forth_and_back(loss(maps, labels, words)), lambda: forth_and_back(at_every_position(maps, labels, words)), target=10)  # fmt: skip

    features, rival = torch.randn(2048, 256, requires_grad=True), SupervisedContrastiveLoss()
    labels = torch.randint(CLASSES, (2048,))
    race("the loss of 2,048 vectors, against contrast of all pairs",
         lambda: torch.autograd.grad(loss(features, labels, words), features), lambda: torch.autograd.grad(rival(features, labels), features), target=5)  # fmt: skip


if __name__ == "__main__":
    main()
