"""Continual learning: train is a `Setting`, an entry returns a learner with observe(x, y, task=None) and predict(x).

Every sample comes once, tasks one after another (`posterity.lab.continual`), and the learner is tested on all tasks
after each. All may keep as many samples, have the same network to start from and make one step a sample, in
batches of sixteen; joint training, which keeps everything and starts again after each task, is the ceiling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Several, Share
from posterity.lab.continual import (
    Learner,
    ReplayLearner,
    Scenario,
    body_for,
    experiences,
    kept,
    learn,
    require_experiences,
)
from posterity.lab.data import Images, load_images
from posterity.lab.nets import weights
from posterity.lab.tasks import Task, entry
from posterity.lab.training import fit

__all__ = ["Setting"]


class Setting(NamedTuple):
    """What a learner is told before the stream: an image (1, c, h, w), the number of classes, its memory."""

    x: Tensor
    n_classes: int
    memory: int


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, scenario: Scenario = "classes",
    n_tasks: Several = 5, memory: Count = 100, blur: Share = 0.3,
) -> dict[str, float]:  # fmt: skip
    images = load_images(data)
    stream = experiences(images, scenario, n_tasks, seed, blur=blur)
    learner = fit(Setting(stream[0].x[:1], len(images.classes), memory), seed)
    accuracy = learn(learner, stream)
    found = kept(accuracy, 1 / len(images.classes))
    figures = {
        "average accuracy": found.average, "forgetting": found.forgetting,
        "backward transfer": found.backward, "forward transfer": found.forward,
    }  # fmt: skip
    for task in range(n_tasks):
        figures[f"accuracy on the past by tasks learned: {task + 1}"] = float(
            accuracy[task, : task + 1].mean()
        )
    return figures


TASK = Task(
    "continual", Images, "average accuracy after all tasks", "higher", "digits", _score,
    needs=require_experiences, references=("joint training",),
)  # fmt: skip


@entry("continual", "fine-tuning alone")
def fine_tuning(train: Setting, seed: int) -> Learner:
    """Return a learner without memory."""
    return ReplayLearner(body_for(train.x, seed), train.n_classes, memory_size=0, seed=seed)


@entry("continual", "experience replay")
def experience_replay(train: Setting, seed: int) -> Learner:
    """Return a learner with a reservoir of the past."""
    return ReplayLearner(body_for(train.x, seed), train.n_classes, memory_size=train.memory, seed=seed)


class JointLearner:
    """Everything is kept; before it is asked, a fresh network is trained on all of it for thirty epochs."""

    def __init__(self, train: Setting, seed: int) -> None:
        self.train, self.seed = train, seed
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.net: nn.Module | None = None

    def observe(self, x: Tensor, y: Tensor, task: int | None = None) -> None:
        """Keep samples."""
        self.parts.append((x, y))
        self.net = None

    def predict(self, x: Tensor) -> Tensor:
        """Return labels."""
        if self.net is None:
            body = body_for(self.train.x, self.seed)
            head = weights(nn.Linear, body.n_features, self.train.n_classes, seed=self.seed)
            self.net = nn.Sequential(body.net, head)
            both = [torch.cat(part) for part in zip(*self.parts, strict=True)]
            fit(
                self.net,
                lambda net, x, y: F.cross_entropy(net(x), y),
                both,
                epochs=30,
                batch_size=16,
                seed=self.seed,
            )
        with torch.no_grad():
            return self.net(x).argmax(1)


@entry("continual", "joint training")
def joint(train: Setting, seed: int) -> Learner:
    """Return the learner that keeps everything."""
    return JointLearner(train, seed)
