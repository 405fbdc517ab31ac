"""Metrics of studies that scikit-learn and torchmetrics do not have, on arrays or tensors."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

__all__ = ["calibration_error", "node_score", "rank_correlation", "sliced_wasserstein"]


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, n_directions: int = 500, seed: int = 0, p: float = 2.0
) -> float:
    """Return the sliced Wasserstein distance between two clouds of points.

    Parameters
    ----------
    x, y : Tensor of shape (n, ...) and (m, ...)
        Samples; each is flattened. Different sizes are compared by quantiles.
    n_directions : int, default=500
    seed : int, default=0
        Decides the directions.
    p : float, default=2.0

    Returns
    -------
    float
        ``(mean over directions of W_p^p)^(1/p)``.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    directions = torch.randn(
        x.shape[1], n_directions, dtype=x.dtype, generator=torch.Generator().manual_seed(seed)
    )
    directions = directions / directions.norm(dim=0)
    a, b = (x @ directions).sort(dim=0).values, (y @ directions).sort(dim=0).values
    if len(a) != len(b):  # both quantile functions are steps: compare on the union of their jumps
        cuts = np.unique(np.concatenate([np.arange(1, len(z) + 1) / len(z) for z in (a, b)]))
        cuts = cuts[np.concatenate([[True], np.diff(cuts) > 1e-12])]
        widths = torch.from_numpy(np.diff(np.concatenate([[0.0], cuts])))[:, None]
        middle = cuts - np.diff(np.concatenate([[0.0], cuts])) / 2
        a, b = (z[torch.from_numpy((middle * len(z)).astype(int))] for z in (a, b))
        return float(((a - b).abs().pow(p) * widths).sum(0).mean().pow(1 / p))
    return float((a - b).abs().pow(p).mean().pow(1 / p))


def calibration_error(
    probabilities: Tensor | ndarray, target: Tensor | ndarray, *, n_bins: int = 15
) -> float:
    """Return the expected calibration error of the top label, in equal bins.

    Parameters
    ----------
    probabilities : Tensor or ndarray of shape (n, classes)
    target : Tensor or ndarray of shape (n,)
    n_bins : int, default=15

    Returns
    -------
    float
        ``sum over bins of share * |accuracy - mean confidence|``.
    """
    probabilities, target = np.asarray(probabilities), np.asarray(target)
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == target
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    gap = np.bincount(bins, correct - confidence, minlength=n_bins)
    return float(np.abs(gap).sum() / len(target))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation, 0 where a side is constant and so has no order.

    Parameters
    ----------
    x, y : array-like of shape (n,), n of at least 2

    Returns
    -------
    float
        In [-1, 1].
    """
    x, y = np.asarray(x), np.asarray(y)
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    found: Any = spearmanr(x, y)
    return float(found.statistic)


def node_score(scores: Tensor, y: Tensor, rows: Tensor) -> float:
    """Return how well nodes are classified: the area under the ROC curve for two classes, else accuracy.

    Parameters
    ----------
    scores : Tensor of shape (nodes, classes)
    y : Tensor of shape (nodes,), int64
    rows : Tensor of shape (nodes,), bool
        The nodes that count.

    Returns
    -------
    float
        With a single class among the nodes that count, accuracy.
    """
    if scores.shape[1] == 2 and len(y[rows].unique()) == 2:
        return float(roc_auc_score(y[rows].cpu(), (scores[rows, 1] - scores[rows, 0]).detach().cpu()))
    return float((scores[rows].argmax(1) == y[rows]).float().mean())
