"""Cross-level distillation beside SimCLR's step and the official way of stepping; episodes beside a loop of fits."""

import copy

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.timing import race
from posterity.transfer import CrossLevelLearner, few_shot_accuracy, nt_xent

CHANNELS = [16, 32, 64, 64]


class Blocks(nn.Module):
    """Four convolutional blocks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = zip([3, *CHANNELS], CHANNELS, strict=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 1 + (k > 0), 1), nn.BatchNorm2d(b), nn.ReLU())
            for k, (a, b) in enumerate(sizes)
        )

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return maps and pooled features."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps, x.mean((2, 3))


def steps() -> None:
    """Race a training step with SimCLR's of the same student, and with one that copies and computes too much."""
    torch.manual_seed(0)
    x1, x2 = torch.rand(64, 3, 32, 32), torch.rand(64, 3, 32, 32)
    learner = CrossLevelLearner(Blocks(), Blocks(), CHANNELS, n_features=64, total_steps=1000)
    learner.n_steps = 10
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3, momentum=0.9)
    old = [copy.deepcopy(learner.student)]

    def ours() -> None:
        optimizer.zero_grad()
        learner(x1, x2).backward()
        optimizer.step()
        learner.after_step()

    def simclr() -> None:
        optimizer.zero_grad()
        features, others = learner.student(x1)[1], learner.student(x2)[1]
        nt_xent(learner.head(features), learner.head(others)).backward()
        optimizer.step()

    def official() -> None:
        optimizer.zero_grad()
        (maps, features), (_, others) = learner.student(x1), learner.student(x2)
        with torch.no_grad():
            theirs, _ = learner.teacher(x1)
            learner.teacher(x2)
            before, _ = old[0].eval()(x1)
        distilled = learner.distillation(maps, theirs, before, momentum=learner.momentum)
        (nt_xent(learner.head(features), learner.head(others)) + 2 * distilled).backward()
        optimizer.step()
        old[0] = copy.deepcopy(learner.student)

    race(
        "training step, against SimCLR's step of the same student",
        ours,
        simclr,
        target=1 / 1.5,
        why="It adds a pass of the teacher and one of the student as it was.",
    )
    race("training step, against a teacher on both views and a deep copy a step", ours, official, target=1.2)


def episodes() -> None:
    """Race 100 episodes, 5-way 5-shot, of 512 features with a loop of fits."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 40)
    x = np.maximum(0.3 * rng.normal(size=(10, 512))[y] + rng.normal(size=(400, 512)), 0)
    told = {"n_episodes": 100, "random_state": 0}
    race("100 episodes, 5-way 5-shot, 512 features, against a loop of scikit-learn's LogisticRegression",
         lambda: few_shot_accuracy(x, y, **told),
         lambda: few_shot_accuracy(x, y, classifier=LogisticRegression(C=1, max_iter=1000), **told),
         target=5.0, rounds=3)  # fmt: skip


if __name__ == "__main__":
    steps()
    episodes()
