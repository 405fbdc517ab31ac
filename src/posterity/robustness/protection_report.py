"""What a protection did to released data, and what a linear classifier makes of it.

Perturbations protect as far as they are easier to learn than what the images show. Two figures say so
with nothing to tune: how well a linear classifier tells the classes from the perturbations alone
(the shortcut), and how well one that was trained on protected data does on clean data.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from posterity._checks import has_shape, interval
from posterity.robustness.checkpoint_gradients import samples

__all__ = ["protection_report"]

FOLDS = 5


def protection_report(
    x: Float[Tensor, "n ..."],
    x_protected: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    random_state: int | np.random.RandomState | None = None,
) -> dict[str, float]:
    """Return how large perturbations are and how well they hold against linear classifiers.

    A linear classifier is a weak reader: what stops it may not stop a network, and the reverse.

    Parameters
    ----------
    x, x_protected : Tensor of shape (n, ...)
        Clean data and what shall be released.
    y : Tensor of shape (n,), integer
        Labels: two classes or more, of 5 samples each or more.
    bounds : tuple of float, default=(0.0, 1.0)
        Least and largest value that data may have; their distance is the peak of the PSNR.
    random_state : int or RandomState, optional
        Decides the five folds.

    Returns
    -------
    dict of str to float
        ``max_change`` and ``mean_change``, of absolute values; ``at_limit``, the share of values changed
        by the largest change, within a thousandth of it; ``psnr`` in dB; and accuracies of logistic
        regression, five-fold: ``shortcut`` on the perturbations alone (1 means that they give the classes
        away), ``clean_after_protected`` of training on protected and testing on clean samples, and,
        for scale, ``clean_after_clean``.

    Raises
    ------
    ValueError
        If arguments do not fit each other, or data are not finite and inside ``bounds``.

    References
    ----------
    .. [1] Yu et al. Availability Attacks Create Shortcuts. KDD 2022. The linear classifier.
    .. [2] Chen et al. Self-Ensemble Protection. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import protection_report
    >>> y = torch.arange(40) % 2
    >>> x = torch.full((40, 3), 0.5)
    >>> report = protection_report(x, x + 0.1 * (2 * y[:, None] - 1), y)
    >>> {name: round(value, 3) for name, value in report.items() if name != "clean_after_protected"}
    {'max_change': 0.1, 'mean_change': 0.1, 'at_limit': 1.0, 'psnr': 20.0, 'shortcut': 1.0, 'clean_after_clean': 0.5}
    """
    low, high = interval("bounds", bounds)
    clean, labels = _array("x", x, y, low, high)
    released, _ = _array("x_protected", x_protected, y, low, high)
    has_shape("x_protected", x_protected, x.shape, "x")
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2 or counts.min() < FOLDS:
        shown = dict(zip(names.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"y must have two classes or more of at least {FOLDS} samples each, got {shown}")
    seed = random_state
    if isinstance(seed, bool) or not (
        seed is None or isinstance(seed, int | np.integer | np.random.RandomState)
    ):
        raise ValueError(f"random_state must be an integer, a RandomState or None, got {seed!r}")
    if isinstance(seed, int | np.integer) and not 0 <= seed < 2**32:
        raise ValueError(f"random_state must be in 0..2**32 - 1, got {seed}")
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(splitter.split(clean, labels))
    change = released - clean
    size = np.abs(change)
    error = float(np.square(change).mean())
    return {
        "max_change": float(size.max()),
        "mean_change": float(size.mean()),
        "at_limit": float((size >= 0.999 * size.max()).mean()) if error else 0.0,
        "psnr": 10 * math.log10((high - low) ** 2 / error) if error else math.inf,
        "shortcut": _accuracy(change, change, labels, folds),
        "clean_after_protected": _accuracy(released, clean, labels, folds),
        "clean_after_clean": _accuracy(clean, clean, labels, folds),
    }


def _array(name: str, x: Tensor, y: Tensor, low: float, high: float) -> tuple[ndarray, ndarray]:
    """Return samples as rows of float64, and labels."""
    try:
        x, y = samples(x, y)
    except ValueError as error:
        raise ValueError(str(error).replace("x must", f"{name} must", 1)) from None
    rows = x.flatten(1).cpu().to(torch.float64).numpy()
    if not rows.size:
        raise ValueError(f"{name} must have at least one value, got shape {tuple(x.shape)}")
    if not ((rows >= low) & (rows <= high)).all():
        raise ValueError(f"{name} must be in bounds [{low:g}, {high:g}], got others or NaN")
    return rows, y.cpu().numpy()


def _accuracy(train: ndarray, test: ndarray, y: ndarray, folds: list[Any]) -> float:
    """Return the share of right predictions for rows of ``test`` by fits on other rows of ``train``."""
    right = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for rest, held in folds:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
            right += int((model.fit(train[rest], y[rest]).predict(test[held]) == y[held]).sum())
    return right / len(y)
