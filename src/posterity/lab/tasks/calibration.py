"""Calibration: train is (x (n, c, h, w), y), predict gives probabilities (n, classes)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.lab.data import Labelled, load_labelled, split
from posterity.lab.metrics import calibration_error
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import Predict, classifier, outputs, standardised

__all__: list[str] = []


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    images = load_labelled(data, target=target)
    train, test = split(len(images.y), (0.5, 0.5), seed, stratify=images.y)
    x = standardised(images.x, train)
    shares = np.asarray(fit((x[train], images.y[train]), seed)(x[test]))
    return calibration_error(shares, images.y[test])


TASK = Task(
    "calibration", Labelled, "expected calibration error", "lower", "digits", _score, takes_target=True
)  # fmt: skip


def _probabilities(net: nn.Module, temperature: float = 1.0) -> Predict:
    return lambda x: (outputs(net, x) / temperature).softmax(1).numpy()


@entry("calibration", "cross-entropy")
def plain_probabilities(train: Any, seed: int) -> Predict:
    """Return the network's own probabilities."""
    return _probabilities(classifier(train, seed))


@entry("calibration", "temperature scaling")
def temperature_scaling(train: Any, seed: int) -> Predict:
    """Return probabilities at the temperature that fits a tenth held out best (Guo et al. 2017)."""
    rows, held_out = split(len(train[1]), (0.9, 0.1), seed, stratify=train[1])
    net = classifier((train[0][rows], train[1][rows]), seed)
    scores, y = outputs(net, train[0][held_out]), torch.from_numpy(train[1][held_out])
    scores, y = scores[y < scores.shape[1]], y[y < scores.shape[1]]  # a class of one image may be new
    temperatures = np.geomspace(0.1, 10, 201)
    losses = [float(F.cross_entropy(scores / t, y)) for t in temperatures]
    return _probabilities(net, float(temperatures[int(np.argmin(losses))]))


@entry("calibration", "label smoothing")
def label_smoothing(train: Any, seed: int) -> Predict:
    """Return probabilities of a network trained on labels smoothed by 0.05 (Müller et al. 2019)."""
    return _probabilities(classifier(train, seed, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.05)))


@entry("calibration", "focal loss")
def focal_loss(train: Any, seed: int) -> Predict:
    """Return probabilities of a network trained by the focal loss of power 2 (Mukhoti et al. 2020)."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        log_p = z.log_softmax(1).gather(1, y[:, None])[:, 0]
        return -((1 - log_p.exp()).square() * log_p).mean()

    return _probabilities(classifier(train, seed, loss))
