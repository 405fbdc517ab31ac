"""Unknown classes: train is (x (n, c, h, w), y), predict gives (n,), higher for classes never seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from posterity.lab.data import Labelled, load_labelled, split
from posterity.lab.data.needs import require_classes
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import Predict, classifier, outputs, standardised

__all__: list[str] = []

SHOWN_AND_HIDDEN = 3  # classes at least, two to be told apart and one to be unknown


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    """Hide two classes in five from training, and ask which test images are of them."""
    images = load_labelled(data, target=target)
    n_classes = len(images.classes)
    shown = np.random.default_rng(seed).permutation(n_classes)[: max(2, round(0.6 * n_classes))]
    code = np.full(n_classes, -1)
    code[shown] = np.arange(len(shown))
    y = code[images.y]
    known = np.flatnonzero(y >= 0)
    train, test = (known[part] for part in split(len(known), (0.75, 0.25), seed, stratify=y[known]))
    x = standardised(images.x, train)
    score = fit((x[train], y[train]), seed)
    asked = np.concatenate([test, np.flatnonzero(y < 0)])
    return float(roc_auc_score(y[asked] < 0, np.asarray(score(x[asked]))))


TASK = Task(
    "ood-detection", Labelled, "ROC AUC of hidden classes", "higher", "digits", _score,
    takes_target=True, needs=lambda data: require_classes(data.y, data.classes, "inputs", SHOWN_AND_HIDDEN),
)  # fmt: skip


@entry("ood-detection", "maximum softmax")
def maximum_softmax(train: Any, seed: int) -> Predict:
    """Return how unsure the network is: minus its largest probability (Hendrycks & Gimpel 2017)."""
    net = classifier(train, seed)
    return lambda x: -outputs(net, x).softmax(1).amax(1).numpy()


@entry("ood-detection", "energy")
def energy(train: Any, seed: int) -> Predict:
    """Return minus the logarithm of the sum of exponentiated scores (Liu et al. 2020)."""
    net = classifier(train, seed)
    return lambda x: -outputs(net, x).logsumexp(1).numpy()


@entry("ood-detection", "Mahalanobis")
def mahalanobis(train: Any, seed: int) -> Predict:
    """Return the distance of features to the nearest class in the shared covariance (Lee et al. 2018)."""
    body = classifier(train, seed)[:-1]
    z, y = outputs(body, train[0]), torch.from_numpy(train[1])
    means = torch.stack([z[y == k].mean(0) for k in range(int(y.max()) + 1)])
    gram = (z - means[y]).T.cov()
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    whiten = torch.linalg.inv(torch.linalg.cholesky(gram + ridge)).T
    return lambda x: torch.cdist(outputs(body, x) @ whiten, means @ whiten).amin(1).numpy()


@entry("ood-detection", "10th nearest neighbour")
def nearest_features(train: Any, seed: int) -> Predict:
    """Return the distance of normalised features to the tenth nearest of training (Sun et al. 2022)."""
    body = classifier(train, seed)[:-1]
    z = F.normalize(outputs(body, train[0]))
    k = min(10, len(z))
    return lambda x: (
        torch.cdist(F.normalize(outputs(body, x)), z).topk(k, largest=False).values[:, -1].numpy()
    )
