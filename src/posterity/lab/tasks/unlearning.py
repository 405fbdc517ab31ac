"""Unlearning: train is (model, (x, y) to forget, (x, y) to keep, classes), predict maps x to logits (n, classes).

A network is trained on three quarters of the data, and once more, from the same initial weights,
without the rows to forget. An entry gets a copy of the first, and is as good as it is near to the second, which it
does not see: in accuracy on kept, forgotten and test rows, and in how many forgotten rows an attack
on membership takes for rows never seen.

Entries that go on from the model do so for ten epochs in batches of 64. Their rates were chosen
alike: of six from 0.0003 to 0.1 the one that comes nearest, on average over both ways of
forgetting, on the noisy digits under three other seeds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import PartOfAll
from posterity.lab.data import Labelled, dataset, load_images, load_labelled, split
from posterity.lab.data.images import ImageData
from posterity.lab.nets import cnn, mlp
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import image_epochs, outputs, standardised
from posterity.lab.training import fit

__all__ = [
    "Forget",
    "Measure",
    "Part",
    "descend",
    "four_figures",
    "require_rows_to_forget",
    "rows_to_forget",
    "train_network",
]

Forget = Literal["random", "class"]
Measure = Literal["average", "retained", "forgotten", "test", "membership"]
Part = tuple[Tensor, Tensor]
Predict = Callable[[np.ndarray], np.ndarray]

EPOCHS = 10  # of an entry that goes on from the model


@dataset(Labelled, "noisy-digits")
def noisy_digits(seed: int) -> ImageData:
    """Return the digits with Gaussian noise on each pixel, of 0.4 of full scale: what is right of them is memorised."""
    images = load_images("digits")
    noise = np.random.default_rng(seed).standard_normal(images.x.shape, dtype=np.float32)
    return replace(images, x=images.x + np.float32(0.4) * noise)


def rows_to_forget(y: np.ndarray, forget: Forget, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows to forget, and which to keep.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Labels of the rows.
    forget : {"random", "class"}
        A share of each class, or of one class, which the seed draws.
    share : float
        In (0, 1].
    seed : int

    Returns
    -------
    tuple of ndarray
        Indices; neither is empty.
    """
    if forget == "random":
        return split(len(y), (share, 1 - share), seed, stratify=y)
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(y, return_counts=True)
    own = rng.permutation(np.flatnonzero(y == rng.choice(classes[counts >= 2])))
    gone = own[: max(1, round(share * len(own)))]
    return gone, rng.permutation(np.setdiff1d(np.arange(len(y)), gone))


def require_rows_to_forget(n: int, forget: Forget, share: float) -> None:
    """Refuse a share of which nothing is forgotten, or after which nothing is kept.

    Parameters
    ----------
    n : int
        How many rows are trained on.
    forget : {"random", "class"}
    share : float
    """
    if forget == "random" and not 1 <= round(share * n) <= n - 2:
        raise ValueError(f"share must let some of {n} rows be forgotten and two be kept, got {share}")


def joined(one: Part, other: Part) -> Part:
    """Return the rows of two parts."""
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def train_network(part: Part, n_classes: int, seed: int, *, start: int | None = None) -> nn.Module:
    """Return a small network, convolutional for images, trained by stochastic gradient descent.

    Parameters
    ----------
    part : tuple of Tensor
        Inputs (n, c, h, w) and labels.
    n_classes, seed : int
    start : int, optional
        Seed of the initial weights, by default ``seed``.

    Returns
    -------
    nn.Module
        In eval mode.
    """
    x, _ = part
    start = seed if start is None else start
    if x.shape[2:] == (1, 1):
        net = mlp(x.shape[1], n_classes, width=256, seed=start)
    else:
        net = cnn(x.shape[1], n_classes, width=12, seed=start)
    descend(net, cross_entropy, part, lr=0.03, epochs=image_epochs(len(x)), seed=seed, schedule="cosine")
    return net.eval()


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a classifier on a batch."""
    return F.cross_entropy(net(x), y)


def descend(
    net: nn.Module, loss: Callable[..., Tensor], data: tuple[Tensor, ...], *, lr: float, epochs: int, seed: int,
    batch_size: int = 64, schedule: str = "constant", device: str = "cpu",
) -> None:  # fmt: skip
    """Train a network in place by stochastic gradient descent, as every network of the task is.

    Parameters
    ----------
    net : nn.Module
    loss : callable
        ``loss(net, *batch) -> scalar``.
    data : tuple of Tensor
    lr : float
    epochs, seed, batch_size : int
    schedule, device : str
        As for `posterity.lab.training.fit`.
    """

    def sgd(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)

    fit(net, loss, data, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=5e-4, optimizer=sgd,
        schedule=schedule, seed=seed, device=device)  # fmt: skip


def four_figures(predict: Predict, forget: Part, retain: Part, test: Part) -> dict[str, float]:
    """Return what is compared of two models, in percent.

    Parameters
    ----------
    predict : callable
        Inputs to logits (n, classes).
    forget, retain, test : tuple of Tensor

    Returns
    -------
    dict of str to float
        Accuracies, and the share of forgotten rows that a support vector machine takes for rows never seen
        by the probability of their class, having learned from kept and from test rows.
    """
    sure, right = {}, {}
    for name, (x, y) in (("forgotten", forget), ("retained", retain), ("test", test)):
        logits = torch.as_tensor(np.asarray(predict(x.numpy()))).double()
        sure[name] = logits.softmax(1).gather(1, y[:, None])[:, 0].nan_to_num().numpy()
        right[name] = 100 * float((logits.argmax(1) == y).double().mean())
    n = min(len(sure["retained"]), len(sure["test"]))
    seen = [sure[name][np.linspace(0, len(sure[name]) - 1, n).astype(int)] for name in ("retained", "test")]
    attack = SVC(C=3, gamma="auto").fit(np.concatenate(seen)[:, None], np.repeat([1, 0], n))
    return {**right, "membership": 100 * float((attack.predict(sure["forgotten"][:, None]) == 0).mean())}


def _parts(inputs: ImageData, forget: Forget, share: float, seed: int) -> tuple[Part, Part, Part]:
    train, test = split(len(inputs.y), (0.75, 0.25), seed, stratify=inputs.y)
    x, y = torch.from_numpy(standardised(inputs.x, train)), torch.from_numpy(inputs.y)
    gone, kept = (train[rows] for rows in rows_to_forget(inputs.y[train], forget, share, seed))
    return (x[gone], y[gone]), (x[kept], y[kept]), (x[test], y[test])


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, measure: Measure = "average",
    forget: Forget = "random", share: PartOfAll = 0.3,
) -> float:  # fmt: skip
    inputs = load_labelled(data, target=target)
    n_classes = len(inputs.classes)
    gone, kept, test = _parts(inputs, forget, share, seed)
    model, without = (train_network(part, n_classes, seed) for part in (joined(gone, kept), kept))
    asked = tuple(
        tuple(each.clone() for each in part) for part in (gone, kept)
    )  # an entry may change its own
    ours, theirs = (
        four_figures(predict, gone, kept, test)
        for predict in (fit((model, *asked, n_classes), seed), predictor(without))
    )
    gaps = {name: abs(ours[name] - theirs[name]) for name in ours}
    return float(np.mean(list(gaps.values()))) if measure == "average" else gaps[measure]


def _needs(inputs: ImageData, forget: Forget = "random", share: float = 0.3, **_: Any) -> None:
    n = len(inputs.y)
    if n < 20:
        raise ValueError(
            f"at least 20 inputs are needed, to train on, to forget some of and to test on; has {n}"
        )
    require_rows_to_forget(round(0.75 * n), forget, share)


TASK = Task(
    "unlearning", Labelled, "distance from retraining, percentage points", "lower", "noisy-digits", _score,
    takes_target=True, needs=_needs, references=("retraining from elsewhere",),
)  # fmt: skip


def predictor(net: nn.Module) -> Predict:
    """Return logits of a network."""
    net.eval()
    return lambda x: outputs(net, x).numpy()


@entry("unlearning", "doing nothing")
def nothing(train: Any, seed: int) -> Predict:
    """Return the model as it is."""
    return predictor(train[0])


@entry("unlearning", "retraining from elsewhere")
def retrained(train: Any, seed: int) -> Predict:
    """Return a network trained on the kept rows from other initial weights: as near as chance lets one be."""
    _, _, kept, n_classes = train
    return predictor(train_network(kept, n_classes, seed, start=seed + 10_000))


@entry("unlearning", "fine-tuning")
def fine_tuned(train: Any, seed: int, lr: float = 0.1) -> Predict:
    """Return the model trained further, on the kept rows alone."""
    model, _, kept, _ = train
    descend(model, cross_entropy, kept, lr=lr, epochs=EPOCHS, seed=seed)
    return predictor(model)


@entry("unlearning", "gradient ascent")
def ascended(train: Any, seed: int, lr: float = 0.0003) -> Predict:
    """Return the model made worse on the rows to forget, by steps up their loss (Graves et al. 2021)."""
    model, gone, _, _ = train
    descend(model, lambda net, x, y: -cross_entropy(net, x, y), gone, lr=lr, epochs=EPOCHS, seed=seed)
    return predictor(model)


@entry("unlearning", "random labels")
def relabelled(train: Any, seed: int, lr: float = 0.01) -> Predict:
    """Return the model trained on random labels of the rows to forget, drawn anew each time, and right ones of the others."""
    model, gone, kept, n_classes = train
    rng = torch.Generator().manual_seed(seed)
    x, y = joined(gone, kept)

    def loss(net: nn.Module, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        drawn = torch.randint(n_classes, y.shape, generator=rng)
        return F.cross_entropy(net(x), torch.where(row < len(gone[1]), drawn, y))

    descend(model, loss, (x, y, torch.arange(len(y))), lr=lr, epochs=EPOCHS, seed=seed)
    return predictor(model)
