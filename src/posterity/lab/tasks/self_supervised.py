"""Self-supervision: train is images (n, c, h, w), predict maps (labelled images, their labels, images) to features.

The features are learned from the images alone; a linear probe and nearest neighbours say what they are worth when
labels come, a few of each class. All networks have the same encoder, views and steps (`posterity.lab.selfsup`); the
supervised one learns from the labels that the probe gets, and so is trained again for each number of labels.
"""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count
from posterity.lab.data import Images, load_images
from posterity.lab.nets import mlp
from posterity.lab.selfsup import (
    embedded,
    encoder_for,
    feature_dim,
    few_of_each,
    image_parts,
    knn_accuracy,
    pretrain,
    probe,
    require_parts,
    view_for,
)
from posterity.lab.tasks import Task, entry
from posterity.lab.training import fit

__all__ = ["STEPS", "features_of", "learned_features"]

STEPS = 300  # of an entry
LABELS = (1, 2, 5, 10, 20, 50)  # a class, at which accuracy is shown

Features = Callable[[Tensor, Tensor, Tensor], Tensor]


def features_of(net: nn.Module) -> Features:
    """Return the features of a network that has learned all that it will.

    Parameters
    ----------
    net : nn.Module

    Returns
    -------
    callable
    """
    return lambda labelled, y, x: embedded(net, x)


def learned_features(
    train: Any, loss: Callable[[Tensor, Tensor], Tensor], seed: int, **options: Any
) -> Features:
    """Return the features of the small encoder, trained with a loss of two views.

    Parameters
    ----------
    train : Tensor of shape (n, channels, height, width)
    loss : callable
        ``loss(z1, z2) -> scalar``.
    seed : int
    **options
        Of `posterity.lab.selfsup.pretrain`.

    Returns
    -------
    callable
    """
    return features_of(pretrain(loss, train, steps=STEPS, seed=seed, **options).encoder)


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, labels_per_class: Count = 10
) -> dict[str, float]:
    parts = image_parts(load_images(data), seed)
    features = fit(parts.x, seed)

    def accuracy(judge: Callable[..., float], per_class: int) -> float:
        rows = few_of_each(parts.y, per_class, seed)
        x, y = parts.x[rows], parts.y[rows]
        train, test = (torch.as_tensor(features(x, y, part)) for part in (parts.x, parts.x_test))
        return judge(train, parts.y, test, parts.y_test, rows)

    found = {f"linear probe, {labels_per_class} labels a class": accuracy(probe, labels_per_class)}
    found["nearest neighbours"] = accuracy(lambda *given: knn_accuracy(*given[:4]), labels_per_class)
    for n in LABELS:
        if n * parts.n_classes <= len(parts.y):
            found[f"linear probe by labels a class: {n}"] = accuracy(probe, n)
    return found


TASK = Task(
    "self-supervised", Images, "accuracy of a linear probe", "higher", "digits", _score, needs=require_parts
)


@entry("self-supervised", "raw pixels")
def raw_pixels(train: Tensor, seed: int) -> Features:
    """Return the pixels themselves."""
    return lambda labelled, y, x: x.flatten(1)


@entry("self-supervised", "PCA")
def principal_components(train: Tensor, seed: int) -> Features:
    """Return the principal components that hold 95 % of the variance."""
    pca = PCA(0.95, svd_solver="full").fit(train.flatten(1).numpy())
    return lambda labelled, y, x: torch.from_numpy(pca.transform(x.flatten(1).numpy()))


@entry("self-supervised", "random encoder")
def random_encoder(train: Tensor, seed: int) -> Features:
    """Return the encoder as all others start."""
    return features_of(encoder_for(train, seed))


@entry("self-supervised", "supervised, the probe's labels")
def supervised_few(train: Tensor, seed: int) -> Features:
    """Return the features of the encoder trained by cross-entropy on views of the probe's labelled images."""

    def features(labelled: Tensor, y: Tensor, x: Tensor) -> Tensor:
        if len(y) not in trained:
            trained[len(y)] = classifier(labelled, y, seed)
        return embedded(trained[len(y)], x)

    trained: dict[int, nn.Module] = {}
    return features


def classifier(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Return an encoder trained on views of labelled images, for as many steps as the others."""
    encoder, draws = encoder_for(x, seed), torch.Generator().manual_seed(seed)
    head = mlp(feature_dim(encoder, x), int(y.max()) + 1, depth=0, seed=seed)
    view, net = view_for(x), nn.Sequential(encoder, head)

    def loss(net: nn.Module, rows: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(net(view(rows, draws)), target)

    fit(net, loss, (x, y), steps=STEPS, batch_size=128, lr=2e-3, optimizer="adamw", weight_decay=1e-4,
        schedule="cosine", seed=seed)  # fmt: skip
    return encoder
