"""Classification of images: train is (x (n, c, h, w), y), predict maps x to scores (n, classes)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.lab.data import Images, load_images, split
from posterity.lab.nets import cnn, mlp
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.tabular_classification import tuned_logistic
from posterity.lab.training import fit

__all__ = ["image_epochs"]

Predict = Callable[[Any], Any]


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    images = load_images(data)
    train, test = split(len(images.y), (0.75, 0.25), seed, stratify=images.y)
    scores = np.asarray(fit((images.x[train], images.y[train]), seed)(images.x[test]))
    return float((scores.argmax(1) == images.y[test]).mean())


TASK = Task("image-classification", Images, "accuracy", "higher", "digits", _score)


def image_epochs(n: int) -> int:
    """Return how many epochs of batches of 64 an entry trains on n images: 30, or 600 steps.

    Parameters
    ----------
    n : int

    Returns
    -------
    int
    """
    return max(30, -(-600 // -(-n // 64)))


def standardised(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return features standardised by these rows, images as they are."""
    if x.shape[2:] != (1, 1):
        return x
    scale = x[rows].std(0)
    return (x - x[rows].mean(0)) / np.where(scale > 0, scale, 1)


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


@entry("image-classification", "logistic regression")
def image_logistic(train: Any, seed: int) -> Predict:
    """Return logistic regression on pixels, its penalty cross-validated."""
    model = tuned_logistic().fit(_flat(train[0]), train[1])
    return lambda x: model.predict_proba(_flat(x))


@entry("image-classification", "5 nearest neighbours")
def image_neighbours(train: Any, seed: int) -> Predict:
    """Return the vote of the nearest training images, pixel by pixel."""
    model = KNeighborsClassifier(5).fit(_flat(train[0]), train[1])
    return lambda x: model.predict_proba(_flat(x))


def classifier(
    train: Any, seed: int, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, epochs: int | None = None
) -> nn.Sequential:  # fmt: skip
    """Return a small convolutional network (fully connected for features), trained by AdamW."""
    x, y = (torch.from_numpy(part) for part in train)
    n_classes = int(y.max()) + 1
    if x.shape[2:] == (1, 1):
        net = mlp(x.shape[1], n_classes, seed=seed)
    else:
        net = cnn(x.shape[1], n_classes, seed=seed)
    fit(net, lambda net, x, y: loss(net(x), y), (x, y), epochs=epochs or image_epochs(len(y)), lr=3e-3, optimizer="adamw", weight_decay=1e-2,
        schedule="cosine", seed=seed)  # fmt: skip
    return net


@torch.no_grad()
def outputs(net: nn.Module, x: np.ndarray) -> Tensor:
    return torch.cat([net(part) for part in torch.from_numpy(x).split(1000)])


@entry("image-classification", "CNN")
def image_cnn(train: Any, seed: int) -> Predict:
    """Return a small convolutional network, trained by AdamW with a cosine schedule."""
    net = classifier(train, seed)
    return lambda x: outputs(net, x).numpy()
