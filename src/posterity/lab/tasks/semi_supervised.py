"""Few labels: train is (x (n, c, h, w), y, -1 where unlabelled), predict maps x to scores (n, classes)."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posterity.claims import Count
from posterity.lab.data import Labelled, load_labelled, split
from posterity.lab.data.images import ImageData
from posterity.lab.nets import cnn, mlp
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import Predict, outputs, standardised
from posterity.lab.training import fit
from posterity.lab.views import strong_view, weak_view

__all__ = ["FixMatch", "few_labels", "require_unlabelled", "two_views"]

LABELLED, UNLABELLED = 20, 128  # examples of a batch
STEPS = 600  # of an entry
SURE = 0.95  # the confidence from which FixMatch and pseudo-labels take a label
MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)

Criterion = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def few_labels(
    inputs: ImageData, labels_per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return three quarters to learn from, with labels for a few of each class, and a quarter to test on.

    Parameters
    ----------
    inputs : ImageData
    labels_per_class : int
    seed : int

    Returns
    -------
    tuple of ndarray
        Inputs, labels with -1 where they are hidden, all labels; test inputs, test labels.
    """
    train, test = split(len(inputs.y), (0.75, 0.25), seed, stratify=inputs.y)  # in random order
    x, y = standardised(inputs.x, train), inputs.y
    shown = np.concatenate([train[y[train] == k][:labels_per_class] for k in range(len(inputs.classes))])
    return x[train], np.where(np.isin(train, shown), y[train], -1), y[train], x[test], y[test]


def require_unlabelled(inputs: ImageData, labels_per_class: int = 4) -> None:
    """Refuse inputs of which two classes would not have a label, an input without one, and a test.

    Parameters
    ----------
    inputs : ImageData
    labels_per_class : int, default=4
    """
    least = -(-4 * (labels_per_class + 1) // 3) + 1
    if (np.bincount(inputs.y) >= least).sum() < 2:
        raise ValueError(
            f"two classes of at least {least} inputs are needed for {labels_per_class} labels a class, "
            f"to leave some unlabelled and some to test on; the largest have {sorted(np.bincount(inputs.y))[:-3:-1]}"
        )


def two_views(
    train: Any, criterion: Criterion | None, *, steps: int, seed: int, device: str = "cpu",
    watch: Callable[[int, Tensor], None] | None = None,
) -> nn.Module:  # fmt: skip
    """Train a small network on weak and strong views, and return the moving average of its weights.

    Stochastic gradient descent with a momentum of 0.9 and a rate of 0.03 that falls to 0 as a cosine; a
    batch has 20 labelled inputs (all, where there are fewer) and 128 others.

    Parameters
    ----------
    train : tuple of ndarray
        Inputs and labels, -1 where there is none.
    criterion : callable, optional
        ``criterion(logits_labeled, y, logits_weak, logits_strong) -> scalar``; None learns from
        the labelled inputs alone.
    steps, seed : int
    device : str
    watch : callable, optional
        ``watch(step, rows)`` after each call of the criterion: the rows of ``train`` that the
        unlabelled batch was.

    Returns
    -------
    nn.Module
        In eval mode, on the CPU.
    """
    x, y = (torch.from_numpy(part) for part in train)
    known, rest = (y >= 0).nonzero()[:, 0], (y < 0).nonzero()[:, 0]
    n_classes = int(y.max()) + 1
    one_pixel = x.shape[2:] == (1, 1)
    net = (
        mlp(x.shape[1], n_classes, seed=seed)
        if one_pixel
        else cnn(x.shape[1], n_classes, width=12, seed=seed)
    )
    rng = torch.Generator().manual_seed(seed)
    averages: list[AveragedModel] = []

    def loss(net: nn.Module, unlabelled: Tensor, rows: Tensor) -> Tensor:
        some = known[torch.randperm(len(known), generator=rng)[:LABELLED]]
        labelled, target = weak_view(x[some], rng).to(unlabelled), y[some].to(unlabelled.device)
        if criterion is None:
            return F.cross_entropy(net(labelled), target)
        n = len(unlabelled)
        views = torch.cat([labelled, weak_view(unlabelled, rng), strong_view(unlabelled, rng)])
        z, weak, strong = net(views).split([len(some), n, n])
        value = criterion(z, target, weak, strong)
        if watch is not None:
            watch(int(averages[0].n_averaged) if averages else 0, rows.cpu())
        return value

    def average(step: int, _: float) -> None:
        if not averages:  # where the network now is
            averages.append(AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True))
        averages[0].update_parameters(net)

    fit(net, loss, (x[rest], rest), steps=steps, batch_size=UNLABELLED, lr=0.03, optimizer=MOMENTUM,
        schedule="cosine", seed=seed, device=device, callback=average)  # fmt: skip
    return averages[0].module.cpu().eval()


class FixMatch:
    """Cross-entropy of the strong view with the label of the weak one, where it is sure (Sohn et al. 2020).

    Parameters
    ----------
    threshold : float, default=0.95
        From which confidence on.

    Attributes
    ----------
    weights, pseudo_labels : Tensor of shape (n,)
        Of the last unlabelled batch: 0 or 1, and the labels.
    """

    weights: Tensor
    pseudo_labels: Tensor

    def __init__(self, threshold: float = SURE) -> None:
        self.threshold = threshold

    def __call__(self, labeled: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the loss."""
        confidence, self.pseudo_labels = weak.detach().softmax(1).max(1)
        self.weights = (confidence >= self.threshold).to(weak)
        nll = F.cross_entropy(strong, self.pseudo_labels, reduction="none")
        return F.cross_entropy(labeled, y) + (self.weights * nll).mean()


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, labels_per_class: Count = 4
) -> float:
    x, y, _, x_test, y_test = few_labels(load_labelled(data, target=target), labels_per_class, seed)
    return float((np.asarray(fit((x, y), seed)(x_test)).argmax(1) == y_test).mean())


TASK = Task(
    "semi-supervised", Labelled, "accuracy", "higher", "digits", _score, takes_target=True,
    needs=require_unlabelled,
)  # fmt: skip


def trained(train: Any, seed: int, criterion: Criterion | None) -> Predict:
    """Return scores of the network that an entry trains."""
    net = two_views(train, criterion, steps=STEPS, seed=seed)
    return lambda x: outputs(net, x).numpy()


@entry("semi-supervised", "labels alone")
def labels_alone(train: Any, seed: int) -> Predict:
    """Return the network trained on weak views of what is labelled."""
    return trained(train, seed, None)


@entry("semi-supervised", "pseudo-labels")
def pseudo_labels(train: Any, seed: int) -> Predict:
    """Return the network trained on its own labels too, where it is sure of the same view (Lee 2013).

    Their weight grows from 0 to 1 over two fifths of the steps.
    """
    step = 0

    def criterion(labeled: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        nonlocal step
        step += 1
        value = F.cross_entropy(labeled, y)
        return value + min(1.0, step / (0.4 * STEPS)) * (FixMatch()(labeled, y, weak, weak) - value)

    return trained(train, seed, criterion)


@entry("semi-supervised", "FixMatch")
def fixmatch(train: Any, seed: int) -> Predict:
    """Return the network trained on strong views, with the labels that weak ones get (Sohn et al. 2020)."""
    return trained(train, seed, FixMatch())


@entry("semi-supervised", "label spreading")
def label_spreading(train: Any, seed: int) -> Predict:
    """Return scikit-learn's label spreading over the graph of seven nearest neighbours."""
    x, y = train
    model = LabelSpreading(kernel="knn", n_neighbors=min(7, len(y) - 1), max_iter=1000)
    model.fit(x.reshape(len(x), -1), y)

    def predict(x: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(x), int(y.max()) + 1))
        scores[:, model.classes_] = model.predict_proba(x.reshape(len(x), -1))
        return scores

    return predict
