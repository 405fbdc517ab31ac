"""Both sides of a representation, by linear probes: a target with few labels, and the mean of many tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from torch import Tensor

from posterity._checks import integer

__all__ = ["Tradeoff", "measure_tradeoff"]


@dataclass(frozen=True)
class Tradeoff:
    """Both sides of a representation.

    Attributes
    ----------
    label_efficiency : ndarray of shape (budgets,)
        Accuracy on the target for each number of labels.
    universality : float
        Mean accuracy over the tasks at the largest number.
    per_task : ndarray of shape (tasks, budgets)
        Accuracy on each task.
    n_labels : tuple of int
        Labels of each class.
    """

    label_efficiency: ndarray
    universality: float
    per_task: ndarray
    n_labels: tuple[int, ...]


def measure_tradeoff(
    represent: Callable[[Any], Any], target: Sequence[Any], tasks: Sequence[Sequence[Any]], *,
    n_labels: Sequence[int] = (5, 10, 20, 50), n_repeats: int = 5, random_state: int | None = None,
) -> Tradeoff:  # fmt: skip
    """Measure a representation by linear probes: on a target with few labels, and on many tasks.

    Parameters
    ----------
    represent : callable
        ``represent(x) -> features (n, dim)``, of arrays or tensors as they are in the tasks.
    target : tuple
        ``(x_train, y_train, x_test, y_test)``.
    tasks : sequence of tuple
        The same of each task, at least one.
    n_labels : sequence of int, default=(5, 10, 20, 50)
        Labels of each class, ascending.
    n_repeats : int, default=5
        Draws of labels, over which accuracies are means.
    random_state : int, optional
        Decides the draws of labels.

    Returns
    -------
    Tradeoff
        Logistic regression on features standardised by all of a task's training features.

    Raises
    ------
    ValueError
        If an argument does not fit: among others a class with fewer training samples than labels are asked for,
        or one that training lacks.

    References
    ----------
    .. [1] Shi, Chen, Li, Raghuram, Wu, Liang, Jha. The Trade-off between Universality and Label Efficiency of
       Representations from Contrastive Learning. ICLR 2023. Section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.representation import measure_tradeoff
    >>> x = np.random.default_rng(0).normal(size=(80, 5))
    >>> task = x[:60], x[:60, 0] > 0, x[60:], x[60:, 0] > 0
    >>> found = measure_tradeoff(lambda x: x, task, [task], n_labels=(5, 20), random_state=0)
    >>> found.label_efficiency.shape, found.per_task.shape
    ((2,), (1, 2))
    """
    integer("n_repeats", n_repeats, 1)
    budgets = tuple(integer("n_labels", n, 1) for n in n_labels)
    if not budgets or list(budgets) != sorted(set(budgets)):
        raise ValueError(f"n_labels must be ascending numbers, at least one, got {tuple(n_labels)}")
    if not len(tasks):
        raise ValueError("tasks must have at least one task, got none")
    draws = check_random_state(random_state)
    named = {"target": target, **{f"tasks[{k}]": task for k, task in enumerate(tasks)}}
    read = {name: _task(name, task, budgets[-1]) for name, task in named.items()}
    rows = [_probed(name, represent, task, budgets, n_repeats, draws) for name, task in read.items()]
    per_task = np.stack(rows[1:])
    return Tradeoff(rows[0], float(per_task[:, -1].mean()), per_task, budgets)


def _task(name: str, task: Sequence[Any], most: int) -> tuple[Any, ndarray, Any, ndarray]:
    if len(task) != 4:
        raise ValueError(f"{name} must be (x_train, y_train, x_test, y_test), got {len(task)} parts")
    x, y, x_test, y_test = task
    y, y_test = (np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels) for labels in (y, y_test))
    if y.ndim != 1 or y_test.ndim != 1 or len(y) != len(x) or len(y_test) != len(x_test) or not len(y_test):
        raise ValueError(f"{name} must have a label a sample, got {y.shape} and {y_test.shape}")
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{name} must have two classes in training, got {classes.tolist()}")
    if missing := sorted(set(y_test.tolist()) - set(classes.tolist())):
        raise ValueError(f"{name} must have every class in training, it lacks {missing[0]!r}")
    if counts.min() < most:
        few = classes[counts.argmin()]
        raise ValueError(
            f"n_labels must be at most the {counts.min()} samples of class {few} of {name}, got {most}"
        )
    return x, y, x_test, y_test


@torch.no_grad()
def _probed(
    name: str, represent: Callable[[Any], Any], task: tuple[Any, ndarray, Any, ndarray], budgets: tuple[int, ...],
    n_repeats: int, draws: Any,
) -> ndarray:  # fmt: skip
    """Return the mean accuracy for each number of labels."""
    x, y, x_test, y_test = task
    train, test = (_features(name, represent(part), len(part)) for part in (x, x_test))
    scale = train.std(0)
    scale = np.where(
        scale > 1e-12 * np.abs(train).max(0, initial=1e-300), scale, np.inf
    )  # what is constant says nothing
    train, test = ((part - train.mean(0)) / scale for part in (train, test))
    found = np.zeros(len(budgets))
    for _ in range(n_repeats):
        order = draws.permutation(len(y))
        for k, n in enumerate(budgets):
            rows = np.concatenate([order[y[order] == c][:n] for c in np.unique(y)])
            model = LogisticRegression(max_iter=1000).fit(train[rows], y[rows])
            found[k] += model.score(test, y_test) / n_repeats
    return found


def _features(name: str, features: Any, n: int) -> ndarray:
    features = features.cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if features.ndim != 2 or len(features) != n:
        raise ValueError(
            f"represent must return features of shape ({n}, dim) for {name}, got {features.shape}"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"represent must return finite features, got NaN or infinity for {name}")
    return features.astype(float)
