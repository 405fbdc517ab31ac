"""Standard questions: methods compete in them as entries, against strong ordinary choices.

An entry is ``fit(train, seed) -> predict``: it sees the training part and a seed, and
returns a function of the inputs of the test part. What they are is a task's own:

======================  ==================================  ==========================================
task                    train                               predict
======================  ==================================  ==========================================
tabular-regression      (X frame, y standardised)           frame -> (n,)
tabular-classification  (X frame, y codes)                  frame -> probabilities (n, classes)
image-classification    (x (n, c, h, w), y)                 x -> scores (n, classes)
ood-detection           (x (n, c, h, w), y)                 x -> (n,), higher for unknown classes
calibration             (x (n, c, h, w), y)                 x -> probabilities (n, classes)
node-classification     (graph, train mask, val mask)       graph -> scores (nodes, classes)
forecasting             series (time, c), standardised      (n, 96, c) -> (n, 24, c)
imputation              series (time, c), standardised      (time, c) with NaN -> the same, filled
======================  ==================================  ==========================================

Entries register with `entry`; ordinary ones are in `posterity.lab.baselines`, a paper's
in its claims file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

from posterity.claims import Trial
from posterity.lab.data import Graph, Images, Labelled, Series, Table, split
from posterity.lab.graphs import load_graph
from posterity.lab.images import load_images
from posterity.lab.labelled import load_labelled
from posterity.lab.metrics import calibration_error, node_score
from posterity.lab.series import load_series
from posterity.lab.tables import load_table

__all__ = ["HISTORY", "HORIZON", "TASKS", "Entry", "Task", "entries", "entry", "image_epochs", "score_entry"]

HISTORY, HORIZON = 96, 24  # of a forecast, in steps
HIDDEN = 0.25  # share of entries that imputation hides
SHOWN_AND_HIDDEN = 3  # classes at least, two to be told apart and one to be unknown


@dataclass(frozen=True)
class Task:
    """A standard question.

    Attributes
    ----------
    name : str
    kind : annotation
        The kind of data it takes.
    metric : str
    better : {"lower", "higher"}
    data : str
        The default data.
    score : callable
        ``score(fit, seed, data, target)`` fits an entry and measures it.
    """

    name: str
    kind: Any
    metric: str
    better: str
    data: str
    score: Callable[[Callable[..., Any], int, str, str | None], float]

    def options(self, target: str | None) -> dict[str, Any]:
        """Return what the loader of its data is told."""
        if not self.name.startswith("tabular-"):
            if target is not None:
                raise ValueError(f"{self.name} takes no target")
            return {"min_classes": SHOWN_AND_HIDDEN} if self.name == "ood-detection" else {}
        return {"target": target, "task": self.name.removeprefix("tabular-")}


@dataclass(frozen=True)
class Entry:
    """A competitor: its name, its paper (empty for an ordinary choice), how it is fitted."""

    task: str
    name: str
    paper: str
    fit: Callable[..., Callable[..., Any]]


def _regression(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    table = load_table(data, target=target, task="regression", seed=seed)
    train, test = split(len(table.y), (0.8, 0.2), seed)
    mean, scale = table.y[train].mean(), table.y[train].std() or 1.0
    predict = fit((table.X.iloc[train], (table.y[train] - mean) / scale), seed)
    error = np.asarray(predict(table.X.iloc[test])) - (table.y[test] - mean) / scale
    return float(np.sqrt(np.mean(error**2)))


def _classification(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    table = load_table(data, target=target, task="classification", seed=seed)
    train, test = split(len(table.y), (0.8, 0.2), seed, stratify=table.y)
    known, codes = np.unique(table.y[train], return_inverse=True)
    shares = np.asarray(fit((table.X.iloc[train], codes), seed)(table.X.iloc[test]), dtype=float)
    full = np.zeros((len(test), len(table.classes)))
    full[:, known] = shares
    full = np.clip(full, 1e-7, None)
    return float(log_loss(table.y[test], full / full.sum(1, keepdims=True), labels=range(full.shape[1])))


def _images(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    images = load_images(data)
    train, test = split(len(images.y), (0.75, 0.25), seed, stratify=images.y)
    scores = np.asarray(fit((images.x[train], images.y[train]), seed)(images.x[test]))
    return float((scores.argmax(1) == images.y[test]).mean())


def _standardised(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return features standardised by these rows, images as they are."""
    if x.shape[2:] != (1, 1):
        return x
    scale = x[rows].std(0)
    return (x - x[rows].mean(0)) / np.where(scale > 0, scale, 1)


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


def _unknown(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    """Hide two classes in five from training, and ask which test images are of them."""
    images = load_labelled(data, min_classes=SHOWN_AND_HIDDEN)
    n_classes = len(images.classes)
    shown = np.random.default_rng(seed).permutation(n_classes)[: max(2, round(0.6 * n_classes))]
    code = np.full(n_classes, -1)
    code[shown] = np.arange(len(shown))
    y = code[images.y]
    known = np.flatnonzero(y >= 0)
    train, test = (known[part] for part in split(len(known), (0.75, 0.25), seed, stratify=y[known]))
    x = _standardised(images.x, train)
    score = fit((x[train], y[train]), seed)
    asked = np.concatenate([test, np.flatnonzero(y < 0)])
    return float(roc_auc_score(y[asked] < 0, np.asarray(score(x[asked]))))


def _calibration(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    images = load_labelled(data)
    train, test = split(len(images.y), (0.5, 0.5), seed, stratify=images.y)
    x = _standardised(images.x, train)
    shares = np.asarray(fit((x[train], images.y[train]), seed)(x[test]))
    return calibration_error(shares, images.y[test])


def _nodes(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    graph = load_graph(data, seed=seed)
    train, val, test = graph.split(seed)
    scores = torch.as_tensor(fit((graph, train, val), seed)(graph))
    return node_score(scores, graph.y, test)


def _series_parts(data: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 80 % and the rest, filled forward and standardised by the first."""
    values = load_series(data, seed=seed).values.copy()
    for column in values.T:
        known = np.flatnonzero(~np.isnan(column))
        column[:] = column[
            known[np.clip(np.searchsorted(known, np.arange(len(column)), "right") - 1, 0, None)]
        ]
    cut = round(0.8 * len(values))
    if len(values) - cut < HISTORY + HORIZON:
        raise ValueError(f"{data}: needs at least {5 * (HISTORY + HORIZON)} rows, has {len(values)}")
    mean, scale = values[:cut].mean(0), values[:cut].std(0)
    values = (values - mean) / np.where(scale > 0, scale, 1)
    return values[:cut], values[cut:]


def _forecasting(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    train, test = _series_parts(data, seed)
    windows = np.lib.stride_tricks.sliding_window_view(test, HISTORY + HORIZON, axis=0).swapaxes(1, 2)
    windows = windows[np.linspace(0, len(windows) - 1, min(len(windows), 200)).astype(int)]
    forecast = np.asarray(fit(train, seed)(windows[:, :HISTORY].copy()))
    return float(np.mean((forecast - windows[:, HISTORY:]) ** 2))


def _imputation(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    train, test = _series_parts(data, seed)
    hidden = np.random.default_rng(seed).random(test.shape) < HIDDEN
    filled = np.asarray(fit(train, seed)(np.where(hidden, np.nan, test)))
    return float(np.mean((filled - test)[hidden] ** 2))


_TABLE_ERROR = "root mean squared error, target standardised"
TASKS = {
    task.name: task
    for task in (
        Task("tabular-regression", Table, _TABLE_ERROR, "lower", "diabetes", _regression),
        Task("tabular-classification", Table, "log loss", "lower", "wine", _classification),
        Task("image-classification", Images, "accuracy", "higher", "digits", _images),
        Task("ood-detection", Labelled, "ROC AUC of hidden classes", "higher", "digits", _unknown),
        Task("calibration", Labelled, "expected calibration error", "lower", "digits", _calibration),
        Task(
            "node-classification", Graph, "accuracy, or ROC AUC for two classes", "higher", "digits", _nodes
        ),
        Task("forecasting", Series, "mean squared error, standardised", "lower", "two-rhythms", _forecasting),
        Task(
            "imputation", Series, "mean squared error of hidden entries", "lower", "two-rhythms", _imputation
        ),
    )
}
_ENTRIES: dict[tuple[str, str], Entry] = {}


def entry(task: str, name: str, *, paper: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function ``fit(train, seed) -> predict`` as an entry of a task.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    name : str
        What the ranking calls it.
    paper : str, default=""
        Its slug, empty for an ordinary choice.

    Returns
    -------
    callable
        A decorator that returns the function as it is.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")

    def keep(fit: Callable[..., Any]) -> Callable[..., Any]:
        _ENTRIES[task, name] = Entry(task, name, paper, fit)
        return fit

    return keep


def entries(task: str) -> dict[str, Entry]:
    """Return the registered entries of a task by name, ordinary choices first.

    Parameters
    ----------
    task : str

    Returns
    -------
    dict of str to Entry
    """
    found = {name: each for (of, name), each in _ENTRIES.items() if of == task}
    return dict(sorted(found.items(), key=lambda item: (item[1].paper != "", item[0])))


def score_entry(
    trial: Trial, task: str, entry: str, home: str, source: str, data: str, target: str | None = None
) -> float:
    """Fit one entry on one seed's training part and return its score on the test part.

    Parameters
    ----------
    trial : Trial
    task, entry : str
        Names.
    home, source : str
        The modules that register the entry and, where it is generated, the data.
    data : str
    target : str, optional

    Returns
    -------
    float
    """
    for module in filter(None, (home, source)):
        import_module(module)
    return TASKS[task].score(entries(task)[entry].fit, trial.seed, data, target)
