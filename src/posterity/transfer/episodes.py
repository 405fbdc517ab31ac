"""Few-shot episodes: how well a linear classifier learns new classes from a few features of each.

An episode draws ``n_way`` classes and of each ``n_shot`` samples to learn from and ``n_query`` others to predict. The
default classifier is scikit-learn's logistic regression, solved for many episodes at once: with B the shots in an
orthonormal basis of their own span,

    min over W, b of  1/2 ||W||^2 + C sum over shots of cross-entropy(B W + b) ,                         (1)

by Newton steps. The span has as many dimensions as there are shots, however long the features are.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor

from posterity._checks import integer
from posterity._precision import wide

__all__ = ["FewShotScore", "few_shot_accuracy"]

C = 1.0  # of the default classifier
MAX_STEPS = 100
AT_ONCE = 2**23  # numbers of features or second derivatives held at once


class FewShotScore(NamedTuple):
    """What `few_shot_accuracy` returns.

    Attributes
    ----------
    mean : float
        Accuracy over episodes, in [0, 1].
    half_width : float
        Of its 95 % interval: 1.96 standard errors.
    accuracies : ndarray of shape (n_episodes,)
    """

    mean: float
    half_width: float
    accuracies: ndarray


def few_shot_accuracy(
    features: ArrayLike | Tensor, y: ArrayLike | Tensor, *, classifier: Any = None, n_way: int = 5, n_shot: int = 5,
    n_query: int = 15, n_episodes: int = 600, random_state: Any = None,
) -> FewShotScore:  # fmt: skip
    """Return the accuracy of few-shot classification on features of a frozen network.

    Parameters
    ----------
    features : array or Tensor of shape (n, d)
        Finite.
    y : array or Tensor of shape (n,)
        Labels of any kind; classes with fewer than ``n_shot + n_query`` samples are never drawn.
    classifier : estimator, optional
        Any scikit-learn classifier, cloned and fitted for each episode; a pipeline with `FeatureDenoiser`, say. By
        default ``LogisticRegression(C=1)``, solved for many episodes together.
    n_way : int, default=5
        Classes an episode, at least 2.
    n_shot, n_query : int, default=5, 15
        Samples of each to learn from and to predict, at least 1.
    n_episodes : int, default=600
        At least 2.
    random_state : int, RandomState or None, default=None
        Draws the episodes; the same one draws the same for any features of the same labels.

    Returns
    -------
    FewShotScore
        Mean accuracy, its half width, and that of each episode.

    Raises
    ------
    ValueError
        If features are not finite, shapes do not fit, or too few classes have enough samples.

    References
    ----------
    .. [1] Zheng, Wang, Liu and Kanezaki. ICLR 2023. Section 4.1.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.transfer import few_shot_accuracy
    >>> y = np.repeat([0, 1, 2], 30)
    >>> few_shot_accuracy(np.eye(3)[y], y, n_way=3, n_episodes=10, random_state=0).mean
    1.0
    """
    for name, value, low in (
        ("n_way", n_way, 2),
        ("n_shot", n_shot, 1),
        ("n_query", n_query, 1),
        ("n_episodes", n_episodes, 2),
    ):
        integer(name, value, low)
    x, labels = _rows(features, y)
    shots, queries = _episodes(labels, n_way, n_shot, n_query, n_episodes, random_state)
    if classifier is not None:
        accuracies = np.array(
            [_right(classifier, x, labels, fit, ask) for fit, ask in zip(shots, queries, strict=True)]
        )
    else:
        step = max(1, AT_ONCE // (queries.shape[1] * x.shape[1] + (n_way * shots.shape[1]) ** 2))
        with torch.inference_mode():
            parts = [
                _solved(
                    torch.from_numpy(x[shots[k : k + step]]),
                    torch.from_numpy(x[queries[k : k + step]]),
                    n_way,
                )
                for k in range(0, n_episodes, step)
            ]
        accuracies = torch.cat(parts).numpy()
    spread = accuracies.std(ddof=1)
    return FewShotScore(float(accuracies.mean()), float(1.96 * spread / np.sqrt(n_episodes)), accuracies)


def _rows(features: Any, y: Any) -> tuple[ndarray, ndarray]:
    """Return features as float64 and labels as arrays."""
    x = features.detach().double().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    labels = wide(y.detach()).cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if x.dtype.kind not in "biuf" or x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"features must be numbers of shape (n, d), got {x.dtype} of shape {x.shape}")
    if labels.shape != (len(x),):
        raise ValueError(
            f"y must have a label for each of {len(x)} rows of features, got shape {labels.shape}"
        )
    x = np.ascontiguousarray(x, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features must be finite, got NaN or infinity")
    return x, labels


def _episodes(
    labels: ndarray, n_way: int, n_shot: int, n_query: int, n_episodes: int, random_state: Any
) -> tuple[ndarray, ndarray]:
    """Return rows to learn from (episodes, n_way * n_shot) and to predict, grouped by class."""
    rng = check_random_state(random_state)
    each = n_shot + n_query
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    large = [rows for rows in members if len(rows) >= each]
    if len(large) < n_way:
        raise ValueError(
            f"n_way must be at most the number of classes with n_shot + n_query = {each} samples, "
            f"{len(large)} of {len(members)}, got {n_way}"
        )
    drawn = np.stack([
        np.stack([rng.permutation(large[k])[:each] for k in rng.permutation(len(large))[:n_way]])
        for _ in range(n_episodes)
    ])  # fmt: skip
    return drawn[:, :, :n_shot].reshape(n_episodes, -1), drawn[:, :, n_shot:].reshape(n_episodes, -1)


def _right(classifier: Any, x: ndarray, labels: ndarray, shots: ndarray, queries: ndarray) -> float:
    fresh: Any = clone(classifier)
    found = fresh.fit(x[shots], labels[shots]).predict(x[queries])
    return float((found == labels[queries]).mean())


def _solved(shots: Tensor, queries: Tensor, n_way: int) -> Tensor:
    """Return the accuracies (e,) of (1) in e episodes of shots (e, m, d) and queries (e, q, d)."""
    own = torch.arange(n_way).repeat_interleave(shots.shape[1] // n_way)
    asked = torch.arange(n_way).repeat_interleave(queries.shape[1] // n_way)
    if shots.shape[1] < shots.shape[2]:  # W lies in the span of the shots
        basis, scale, _ = torch.linalg.svd(shots @ shots.mT)
        root = scale.sqrt()[:, None]
        inverse = torch.where(scale > 1e-13 * scale[:, :1], scale.rsqrt(), 0)[:, None]
        shots, queries = basis * root, queries @ shots.mT @ basis * inverse
    design, asked_design = (torch.cat([x, torch.ones_like(x[..., :1])], 2) for x in (shots, queries))
    weights = _newton(design, torch.nn.functional.one_hot(own, n_way).to(shots))
    return ((asked_design @ weights).argmax(2) == asked).double().mean(1)


def _newton(design: Tensor, target: Tensor) -> Tensor:
    """Return the weights (e, p, k) of penalised multinomial regressions; the last of p columns is the intercept."""
    e, m, p = design.shape
    k = target.shape[1]
    # scikit-learn has one vector for two classes, half as long as the difference of two
    penalty = torch.full((p,), 2.0 if k == 2 else 1.0, dtype=design.dtype)
    penalty[-1] = 0
    # a shift of all intercepts changes no probability: this keeps their sum at 0
    fixed = torch.diag_embed(penalty.repeat_interleave(k))
    fixed[-k:, -k:] += 1 + 1e-9 * torch.eye(k)  # saturated probabilities leave nothing else

    def value(w: Tensor) -> Tensor:
        fit = design @ w
        each = fit.logsumexp(2) - (fit * target).sum(2)
        return C * each.sum(1) + (penalty[:, None] * w**2).sum((1, 2)) / 2 + w[:, -1].sum(1) ** 2 / 2

    w = design.new_zeros(e, p, k)
    best = value(w)
    for _ in range(MAX_STEPS):
        shares = (design @ w).softmax(2)
        gradient = C * design.mT @ (shares - target) + penalty[:, None] * w
        gradient[:, -1] += w[:, -1].sum(1, keepdim=True)
        curved = torch.diag_embed(shares) - shares[..., None] * shares[..., None, :]  # (e, m, k, k)
        spread = (design[..., None, None] * curved[:, :, None]).reshape(e, m, p * k * k)
        hessian = (design.mT @ spread).view(e, p, p, k, k).transpose(2, 3).reshape(
            e, p * k, p * k
        ) * C + fixed
        step = torch.cholesky_solve(gradient.reshape(e, p * k, 1), torch.linalg.cholesky(hessian)).view(
            e, p, k
        )
        slope, length = (gradient * step).sum((1, 2)), torch.ones(e, 1, 1, dtype=w.dtype)
        if bool((slope <= 1e-10 * best.clamp_min(1)).all()):
            break
        for _ in range(40):  # halve the steps that do not lower the value as they should
            after = value(w - length * step)
            short = after > best - 1e-4 * length[:, 0, 0] * slope
            if not bool(short.any()):
                break
            length = torch.where(short[:, None, None], length / 2, length)
        after = value(w - length * step)
        better = after <= best
        w = torch.where(better[:, None, None], w - length * step, w)
        best = torch.where(better, after, best)
    return w
