"""Claims about SoftMatch: soft weights beat a threshold where labels are few, and use more right labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posterity.claims import Count, Trial, comparison
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.tasks import entry
from posterity.lab.tasks.image_classification import Predict, outputs
from posterity.lab.tasks.semi_supervised import (
    FixMatch,
    few_labels,
    require_unlabelled,
    trained,
    two_views,
)
from posterity.labels import SoftMatchLoss, quantity_quality


def _fits(data: ImageData, labels_per_class: int, **_: Any) -> None:
    require_unlabelled(data, labels_per_class)


def _softmatch(n_classes: int, align: Any = "uniform") -> SoftMatchLoss:
    return SoftMatchLoss(n_classes, align=align, momentum=0.99)


@comparison(
    paper="softmatch",
    says="Soft weights with alignment beat a fixed confidence threshold when labels are scarce.",
    where="Chen et al., Section 4.1",
    arms=("FixMatch", "labels alone", "SoftMatch without alignment", "SoftMatch"),
    metric="accuracy on test images",
    better="higher",
    smallest={"steps": 4},
    check=_fits,
)
def scarce_labels(
    trial: Trial, data: Images = "digits", labels_per_class: Count = 2, steps: Count = 600
) -> dict[str, float]:
    """Train one network four times, on two labels a class and the rest of three quarters of the images.

    The arms share split, labels, initial weights, views and steps, and are measured by the moving
    average of their weights. FixMatch takes labels from a confidence of 0.95 on.
    The paper's setting is ``data="cifar10", labels_per_class=4`` with a WRN-28-2 and 2^20 steps,
    where the statistics have a momentum of 0.999, here 0.99.
    """
    images = load_images(data)
    x, y, _, x_test, y_test = few_labels(images, labels_per_class, trial.seed)
    n_classes = int(y.max()) + 1
    criteria: dict[str, Callable[..., Tensor] | None] = {
        "FixMatch": FixMatch(),
        "labels alone": None,
        "SoftMatch without alignment": _softmatch(n_classes, align=None),
        "SoftMatch": _softmatch(n_classes),
    }
    accuracy = {}
    for arm, criterion in criteria.items():
        net = two_views((x, y), criterion, steps=steps, seed=trial.seed, device=trial.device)
        accuracy[arm] = float((outputs(net, x_test).argmax(1).numpy() == y_test).mean())
    return accuracy


@comparison(
    paper="softmatch",
    says="SoftMatch learns from more right pseudo-labels than a threshold lets through.",
    where="Chen et al., Section 4.4",
    arms=("FixMatch", "SoftMatch"),
    metric="weight of right pseudo-labels an unlabelled image, mean over the run",
    better="higher",
    smallest={"steps": 4},
    check=_fits,
)
def right_labels(
    trial: Trial, data: Images = "digits", labels_per_class: Count = 2, steps: Count = 600
) -> dict[str, float]:
    """Train with both losses and ask at each step how much weight there is on right labels.

    It is the product of the paper's two axes, which are in the records: quantity, the mean weight,
    and quality, the share of it that is on right labels. SoftMatch gains in the first. In the
    second a threshold is ahead in so short a run: what it lets through is little and sure.
    """
    images = load_images(data)
    x, y, truth, *_ = few_labels(images, labels_per_class, trial.seed)
    labels = torch.from_numpy(truth)
    n_classes = int(y.max()) + 1
    right = {}
    for arm, criterion in {"FixMatch": FixMatch(), "SoftMatch": _softmatch(n_classes)}.items():
        seen: list[tuple[float, float]] = []

        def watch(step: int, rows: Tensor, criterion: Any = criterion, seen: Any = seen) -> None:
            seen.append(
                quantity_quality(criterion.weights.cpu(), criterion.pseudo_labels.cpu(), labels[rows])
            )

        two_views((x, y), criterion, steps=steps, seed=trial.seed, device=trial.device, watch=watch)
        quantity, quality = np.array(seen).T
        right[arm] = float((quantity * np.nan_to_num(quality)).mean())  # the share of nothing is NaN
        trial.record(f"quantity, {arm}", quantity.mean())
        if quantity.any():
            trial.record(f"quality, {arm}", right[arm] / quantity.mean())
    return right


@entry("semi-supervised", "SoftMatch", paper="softmatch")
def softmatch(train: Any, seed: int) -> Predict:
    """Return the network trained on strong views, with soft weights of the labels that weak ones get."""
    return trained(train, seed, _softmatch(int(train[1].max()) + 1))
