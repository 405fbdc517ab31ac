"""Claims about universality: diverse pre-training costs the single task, serves the others, and may be repaid."""

from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity.claims import Between, Count, NotNegative, Positive, Several, Trial, comparison
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.selfsup import (
    embedded,
    few_of_each,
    image_parts,
    pretrain,
    require_parts,
    view_for,
)
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import STEPS, Features
from posterity.representation import (
    NTXentLoss,
    fine_tune,
    linear_contrastive_representation,
    measure_tradeoff,
)

SHARED, OWN, TASKS, SEEN = (
    2,
    4,
    8,
    60,
)  # features that all tasks have, that each has, tasks, what is seen of them
NOISE = 0.5  # of each view
OTHERS = (2, 5)  # tasks on which a representation is tried beside its target, counted from it
MIXES = (1, 2, 4, 8)  # tasks to learn from


class _HiddenFeatures:
    """Tasks with features of their own and some in common, all seen through one linear map.

    A sample of a task has its own features and the shared ones, standard normal; its label is the sign of a linear
    function of these.
    """

    def __init__(self, seed: int) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        self.map = torch.linalg.qr(self._normal(SEEN, SHARED + TASKS * OWN)).Q
        self.labels = self._normal(TASKS, SHARED + OWN)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draws)

    def samples(self, tasks: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return samples of tasks in equal shares, and their labels."""
        task = tasks[torch.randint(len(tasks), (n,), generator=self.draws)]
        active, features = self._normal(n, SHARED + OWN), torch.zeros(n, SHARED + TASKS * OWN)
        features[:, :SHARED] = active[:, :SHARED]
        features.scatter_(1, SHARED + OWN * task[:, None] + torch.arange(OWN), active[:, SHARED:])
        return features @ self.map.T, ((active * self.labels[task]).sum(1) > 0).long()

    def view(self, x: Tensor) -> Tensor:
        return x + NOISE * self._normal(*x.shape)

    def task(self, task: int, n: int, n_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [self.samples(torch.tensor([task]), size) for size in (n, n_test)]
        return self.view(parts[0][0]), parts[0][1], self.view(parts[1][0]), parts[1][1]


def _by_mix(trial: Trial, dim: int, labels_per_class: int, pairs: int) -> dict[int, tuple[float, float]]:
    """Return accuracy on the target and on other tasks, a mean over targets, by the number of tasks learned from."""
    world, found = _HiddenFeatures(trial.seed), {}
    tasks = [world.task(k, 8 * labels_per_class, 500) for k in range(TASKS)]
    for n in MIXES:
        both = []
        for target in range(TASKS):
            x, _ = world.samples((target + torch.arange(n)) % TASKS, pairs)
            x1, x2 = world.view(x), world.view(x)
            mean = torch.cat([x1, x2]).mean(0)
            net = linear_contrastive_representation(x1 - mean, x2 - mean, dim, ridge=1e-6)
            score = measure_tradeoff(
                lambda x, w=net.weight: x @ w.T, tasks[target], [tasks[(target + k) % TASKS] for k in OTHERS],
                n_labels=(labels_per_class,), random_state=trial.seed,
            )  # fmt: skip
            both.append((float(score.label_efficiency[-1]), score.universality))
        found[n] = tuple(np.mean(both, 0).tolist())
        trial.track("accuracy by tasks learned from: target", n, found[n][0])
        trial.track("accuracy by tasks learned from: others", n, found[n][1])
    return found


@comparison(
    paper="universality-tradeoff",
    says="With few labels a task does better on a representation of its own data than on one of diverse data.",
    where="Shi et al., Section 3, and Figure 1",
    arms=("learned from 8 tasks", "learned from the task alone"),
    metric="accuracy of a linear probe on the task, mean over 8 targets",
    better="higher",
    smallest={"dim": 1, "pairs": 100, "labels_per_class": 2},
)
def own_data(
    trial: Trial, dim: Annotated[int, Between(1, SEEN)] = 6, labels_per_class: Count = 50,
    pairs: Annotated[int, Between(100)] = 2000,
) -> dict[str, float]:  # fmt: skip
    """Solve spectral contrastive learning on 1, 2, 4 and 8 tasks, in dimensions that hold the features of one."""
    found = _by_mix(trial, dim, labels_per_class, pairs)
    return {"learned from 8 tasks": found[8][0], "learned from the task alone": found[1][0]}


@comparison(
    paper="universality-tradeoff",
    says="The other tasks do better on a representation of diverse data.",
    where="Shi et al., Section 3, and Figure 1",
    arms=("learned from another task", "learned from 8 tasks"),
    metric="accuracy of a linear probe on tasks that are not the target, mean",
    better="higher",
    smallest={"dim": 1, "pairs": 100, "labels_per_class": 2},
)
def diverse_data(
    trial: Trial, dim: Annotated[int, Between(1, SEEN)] = 6, labels_per_class: Count = 50,
    pairs: Annotated[int, Between(100)] = 2000,
) -> dict[str, float]:  # fmt: skip
    """Look at the other side of the same representations."""
    found = _by_mix(trial, dim, labels_per_class, pairs)
    return {"learned from another task": found[1][1], "learned from 8 tasks": found[8][1]}


def _has_classes(data: ImageData, first: int, second: int, labels_per_class: int, **_: Any) -> None:
    require_parts(data, labels_per_class)
    for name, value in (("first", first), ("second", second)):
        if value >= len(data.classes):
            raise ValueError(
                f"{name} must be in 0..{len(data.classes) - 1}, a class of the data, got {value}"
            )
    if first == second:
        raise ValueError(f"second must be another class than first, got {second} for both")


@comparison(
    paper="universality-tradeoff",
    says="All classes are told apart better on a representation of all than on one of two classes.",
    where="Shi et al., Section 5, Figure 3",
    arms=("learned from two classes", "learned from all classes"),
    metric="accuracy of a linear probe over all classes",
    better="higher",
    smallest={"labels_per_class": 2},
    check=_has_classes,
)
def all_classes(
    trial: Trial, data: Images = "digits", first: Annotated[int, Between(0)] = 4,
    second: Annotated[int, Between(0)] = 9, dim: Count = 4, labels_per_class: Count = 5,
    ridge: Positive = 1e-3,
) -> dict[str, float]:  # fmt: skip
    """Solve spectral contrastive learning on as many images of two classes and of all.

    Records have the other side, the accuracy of telling the two classes apart: on scikit-learn's digits it does not
    fall, since few features do for any two of them.
    """
    parts = image_parts(load_images(data), trial.seed)
    view, draws = view_for(parts.x), torch.Generator().manual_seed(trial.seed)
    order = torch.randperm(len(parts.y), generator=draws)
    pair = torch.tensor([first, second])
    two = order[torch.isin(parts.y[order], pair)]
    train, test = torch.isin(parts.y, pair), torch.isin(parts.y_test, pair)
    every = parts.x.flatten(1), parts.y, parts.x_test.flatten(1), parts.y_test
    target = every[0][train], every[1][train], every[2][test], every[3][test]
    found = {}
    for arm, rows in (("learned from two classes", two), ("learned from all classes", order[: len(two)])):
        views = [torch.cat([view(parts.x[rows], draws) for _ in range(8)]).flatten(1) for _ in range(2)]
        mean = torch.cat(views).mean(0)
        p = len(mean)
        net = linear_contrastive_representation(views[0] - mean, views[1] - mean, min(dim, p), ridge=ridge)
        score = measure_tradeoff(
            lambda x, w=net.weight, mean=mean: (x - mean) @ w.T, target, [every], n_labels=(labels_per_class,),
            n_repeats=10, random_state=trial.seed,
        )  # fmt: skip
        found[arm] = score.universality
        trial.record(f"accuracy on the two classes, {arm}", float(score.label_efficiency[-1]))
    return found


@comparison(
    paper="universality-tradeoff",
    says="Fine-tuning on few labels does better with the contrastive loss of pre-training than without.",
    where="Shi et al., Section 4, Table 1",
    arms=("better of probe and fine-tuning", "fine-tuning with the contrastive loss"),
    metric="test accuracy",
    better="higher",
    smallest={"steps": 2, "epochs": 2, "draws": 1},
    reason="on small digits fine-tuning leaves little to gain: a third of a point, within the spread",
    check=require_parts,
)
def regularised(
    trial: Trial, data: Images = "digits", steps: Several = 100, epochs: Count = 100,
    labels_per_class: Count = 5, weight: NotNegative = 1.0, lr: Positive = 0.06, draws: Count = 3,
) -> dict[str, float]:  # fmt: skip
    """Fine-tune a SimCLR encoder on some draws of few labels, in the three ways.

    The paper's weight of 0.1 changes nothing at this size; so it is 1 here.
    """
    parts = image_parts(load_images(data), trial.seed)
    net = pretrain(NTXentLoss(0.5), parts.x, steps=steps, seed=trial.seed, device=trial.device)
    encoder, projector = net.encoder.to(trial.device), net.projector.to(trial.device)
    accuracy: dict[Any, list[float]] = {"linear": [], "fine-tune": [], "contrastive": []}
    for draw in range(trial.seed, trial.seed + draws):
        rows = few_of_each(parts.y, labels_per_class, draw)
        tune = partial(
            fine_tune, encoder, parts.x[rows].to(trial.device), parts.y[rows].to(trial.device), augment=view_for(parts.x),
            n_classes=parts.n_classes, projector=projector, weight=weight, epochs=epochs, lr=lr, random_state=draw,
        )  # fmt: skip
        for mode, values in accuracy.items():
            predicted = tune(mode=mode).predict(parts.x_test.to(trial.device)).cpu()
            values.append(float((predicted == parts.y_test).float().mean()))
    means = {mode: float(np.mean(values)) for mode, values in accuracy.items()}
    for mode, value in means.items():
        trial.record(f"accuracy, {mode}", value)
    return {
        "better of probe and fine-tuning": max(means["linear"], means["fine-tune"]),
        "fine-tuning with the contrastive loss": means["contrastive"],
    }


@entry("self-supervised", "SimCLR, fine-tuned with its loss", paper="universality-tradeoff")
def fine_tuned(train: Tensor, seed: int) -> Features:
    """Return the features of SimCLR's encoder, fine-tuned on the probe's labels with the contrastive loss beside."""
    net = pretrain(NTXentLoss(0.2), train, steps=STEPS, seed=seed)
    tuned: dict[int, nn.Module] = {}

    def features(labelled: Tensor, y: Tensor, x: Tensor) -> Tensor:
        if len(y) not in tuned:
            tuned[len(y)] = fine_tune(
                net.encoder, labelled, y, augment=view_for(train), n_classes=int(y.max()) + 1, projector=net.projector,
                weight=1.0, epochs=100, random_state=seed,
            ).encoder  # fmt: skip
        return embedded(tuned[len(y)], x)

    return features
