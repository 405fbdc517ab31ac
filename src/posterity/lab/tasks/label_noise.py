"""Wrong labels: train is (x (n, c, h, w), y, some of it wrong), predict gives (n,) of the same x, higher for wrong.

A share of the labels is replaced by another class, drawn at random; a method sees nothing else
and ranks the examples. `ranked` makes a table of such a ranking: ``posterity suspects`` prints
that of a user's own file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from posterity.claims import Share
from posterity.lab.data import Labelled, flip_labels, load_labelled, split
from posterity.lab.data.images import ImageData
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import classifier, image_epochs, outputs, standardised
from posterity.lab.tasks.tabular_classification import tuned_logistic

__all__ = ["ranked"]

FOLDS = 3
NEIGHBOURS = 10
NETS = 3

Predict = Callable[[Any], Any]


def ranked(examples: ImageData, suspicion: np.ndarray) -> pd.DataFrame:
    """Return examples from the most to the least suspicious.

    Parameters
    ----------
    examples : ImageData
        As `load_labelled` gives them.
    suspicion : ndarray of shape (n,)
        Higher for labels that are rather wrong, as `posterity.labels.cg_scores` gives it.

    Returns
    -------
    DataFrame
        Columns rank (from 1), example (its path in a folder, its row in a table from 1, or its
        place in an array from 0), label, suspicion.
    """
    order = np.argsort(-np.asarray(suspicion), kind="stable")
    ids = examples.ids or tuple(map(str, range(len(examples.y))))
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(order) + 1),
            "example": [ids[i] for i in order],
            "label": [examples.classes[examples.y[i]] for i in order],
            "suspicion": np.asarray(suspicion)[order],
        }
    )


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None, *, share: Share = 0.1) -> float:
    examples = load_labelled(data, target=target)
    x = standardised(examples.x, np.arange(len(examples.y)))
    y, wrong = flip_labels(examples.y, share, seed)
    return float(average_precision_score(wrong, np.asarray(fit((x, y), seed)(x))))


def _needs(examples: ImageData, share: float) -> None:
    n = len(examples.y)
    if not 1 <= round(share * n) < n:
        raise ValueError(f"share must plant at least one wrong label among {n} and leave one, got {share}")


TASK = Task(
    "label-noise", Labelled, "average precision of planted wrong labels", "higher", "digits", _score,
    takes_target=True, needs=_needs,
)  # fmt: skip


@entry("label-noise", "out-of-fold confidence")
def out_of_fold(train: Any, seed: int) -> Predict:
    """Return one less the probability that networks trained on the other two thirds give the label."""

    def shares(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
        return outputs(classifier((x, y), seed), asked).softmax(1).numpy()

    return _out_of_fold(train, seed, shares)


@entry("label-noise", "out-of-fold logistic regression")
def out_of_fold_logistic(train: Any, seed: int) -> Predict:
    """Return the same of logistic regression on pixels or features, its penalty cross-validated."""

    def shares(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
        known, codes = np.unique(y, return_inverse=True)
        full = np.zeros((len(asked), int(y.max()) + 1))
        model = tuned_logistic().fit(x.reshape(len(x), -1), codes)
        full[:, known] = model.predict_proba(asked.reshape(len(asked), -1))
        return full

    return _out_of_fold(train, seed, shares)


def _out_of_fold(train: Any, seed: int, shares: Callable[..., np.ndarray]) -> Predict:
    x, y = train
    unsure = np.empty(len(y))
    for held_out in split(len(y), [1 / FOLDS] * FOLDS, seed, stratify=y):
        rest = np.setdiff1d(np.arange(len(y)), held_out)
        given = shares(x[rest], y[rest], x[held_out])
        known = y[held_out] < given.shape[1]  # a class may be in one fold only
        unsure[held_out] = 1 - np.where(known, given[np.arange(len(held_out)), y[held_out] * known], 0)
    return lambda x: unsure


@entry("label-noise", f"{NEIGHBOURS} nearest neighbours")
def neighbours_disagree(train: Any, seed: int) -> Predict:
    """Return the share of the nearest other examples that have another label, the near ones weighing more."""
    x, y = train[0].reshape(len(train[1]), -1), train[1]
    k = min(NEIGHBOURS, len(y) - 1)
    distance, index = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)
    itself = index == np.arange(len(y))[:, None]
    itself[~itself.any(1), -1] = True  # among exact copies it may not be its own neighbour
    near = 1 / (distance[~itself].reshape(-1, k) + (distance.mean() / 100 or 1))
    other = y[index[~itself].reshape(-1, k)] != y[:, None]
    return lambda x: (near * other).sum(1) / near.sum(1)


@entry("label-noise", "error of short trainings")
def short_trainings(train: Any, seed: int) -> Predict:
    """Return the norm of the error of networks trained for a third of the usual time (EL2N; Paul et al. 2021)."""
    x, y = train
    n_classes = int(y.max()) + 1
    errors = np.zeros(len(y))
    for k in range(NETS):
        net = classifier(train, seed + 1000 * k, epochs=image_epochs(len(y)) // 3)
        errors += np.linalg.norm(outputs(net, x).softmax(1).numpy() - np.eye(n_classes)[y], axis=1)
    return lambda x: errors
