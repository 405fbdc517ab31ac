"""Race the probe against scikit-learn's brute-force neighbours, and steps of training with and without augmentation.

Run from the repository root: ``python -m benchmarks.dynamics.benign_memorization``.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.dynamics import knn_predict, memorize


def augment(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return rows with noise, some entries left out."""
    kept = torch.rand(x.shape, generator=generator) > 0.1
    return (x + 0.1 * torch.randn(x.shape, generator=generator)) * kept


def features(n: int, m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of ten classes, their labels, and features to label."""
    y = torch.arange(n) % 10
    centres = torch.randn(10, d)
    return centres[y] + torch.randn(n, d), y, centres[torch.arange(m) % 10] + torch.randn(m, d)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for n, m, d, rounds in ((20_000, 4_000, 64, 5), (20_000, 4_000, 128, 5), (50_000, 10_000, 512, 2)):
        x, y, test = features(n, m, d)
        start = time.perf_counter()
        knn_predict(x, y, test)
        print(f"{n:,} x {m:,} rows of {d}: {time.perf_counter() - start:.1f} s (target 60)")
        peer = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(x.numpy(), y.numpy())
        race(
            f"{n:,} x {m:,} rows of {d}, against scikit-learn's brute force",
            lambda x=x, y=y, test=test: knn_predict(x, y, test),
            lambda peer=peer, test=test: peer.predict(test.numpy()),
            target=2, rounds=rounds,
        )  # fmt: skip

    x, y = torch.randn(500, 64), torch.randint(10, (500,))
    sizes = (64, 256, 256, 256, 256, 256)
    blocks = [
        nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    net = nn.Sequential(*blocks, nn.Linear(256, 10))

    def steps(how: Callable[..., Any] | None) -> Callable[[], object]:
        return lambda: memorize(net, x, y, augment=how, n_steps=50, eval_every=50)

    race(
        "50 steps of a fully connected network with augmentation, against without: at most twice as long",
        steps(augment), steps(None), target=0.5,
    )  # fmt: skip


if __name__ == "__main__":
    main()
