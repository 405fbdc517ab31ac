"""Race PsCo's step with that of momentum contrast, its assignments with POT's, and its evaluation task by task.

Run from the repository root: ``python -m benchmarks.representation.psco``.
"""

import ot
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.representation import PsCo, PsCoLoss, evaluate_few_shot, prototype_scores, sample_episode


def conv4() -> nn.Sequential:
    """Return four blocks of 64 channels, pooled with the rest kept: 256 features of 28 x 28 pixels."""
    layers: list[nn.Module] = []
    for n_in in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(n_in, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
    return nn.Sequential(*layers, nn.Flatten())


def pot_shots(key, queue, n_shots=4):
    """Return shots from POT's Sinkhorn in logarithms, with as many steps."""
    n, m = len(key), len(queue)
    cost = -F.normalize(key, dim=1) @ queue.T
    even = [torch.full((k,), 1 / k) for k in (n, m)]
    plan = ot.bregman.sinkhorn_log(*even, cost, 0.05, numItermax=3, stopThr=0, warn=False)
    return plan.topk(n_shots, dim=1).indices


def by_task(model, x, labels, n_tasks, generator):
    """Embed the images of each task anew, as the official evaluation does."""
    found, shown, asked = [], torch.arange(5), torch.arange(5).repeat_interleave(15)
    for _ in range(n_tasks):
        task = sample_episode(labels, generator=generator)
        support, query = (
            model.embed(x[rows], role=role)
            for rows, role in ((task.support, "support"), (task.query, "query"))
        )
        scores = prototype_scores(query, support, shown)
        found.append((scores.argmax(1) == asked).double().mean())
    return torch.stack(found)


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(256, 1, 28, 28, generator=rng)
    torch.manual_seed(0)
    plain, ours = PsCo(conv4(), 256, meta_weight=0), PsCo(conv4(), 256)
    race("step of Conv4, 256 images of 28 x 28, queue 16,384, against the step without the pseudo task",
         lambda: ours.loss(x, x).backward(), lambda: plain.loss(x, x).backward(), target=1 / 1.15, rounds=5)  # fmt: skip

    key, loss = torch.randn(256, 256, generator=rng), PsCoLoss(256)
    race("shots of 256 keys from a queue of 16,384, against POT's Sinkhorn in logarithms",
         lambda: loss.shots(key), lambda: pot_shots(key, loss.queue), target=2, rounds=5)  # fmt: skip

    small = torch.rand(900, 1, 14, 14, generator=rng)
    ours = PsCo(conv4(), 64, hidden_dim=512)
    labels = torch.arange(900) % 10
    scores = [evaluate_few_shot(ours, small, labels, n_tasks=9, generator=torch.Generator().manual_seed(1)).per_task,
              by_task(ours, small, labels, 9, torch.Generator().manual_seed(1))]  # fmt: skip
    torch.testing.assert_close(*scores, rtol=0, atol=0.03)  # near ties may fall either way
    race("600 5-way 1-shot tasks of 900 images of 14 x 14, against embedding the images of each task",
         lambda: evaluate_few_shot(ours, small, labels, n_tasks=600, generator=rng),
         lambda: by_task(ours, small, labels, 600, rng), target=20, rounds=1)  # fmt: skip


if __name__ == "__main__":
    main()
