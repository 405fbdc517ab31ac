"""Ensembles whose spread is that of training: other seeds, bootstraps, disjoint halves; and a model of one."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from joblib import Parallel, delayed
from torch import Tensor

from posterity._checks import at_least, integer, one_of
from posterity._random import draw_device

__all__ = ["ensemble_predictions", "neural_collapse_ensemble"]

ATTEMPTS = 20  # resamples at random that may lack a class, before classes are resampled one by one
Fit = Callable[[Any, Any, Any, int], Any]


def ensemble_predictions(
    fit_predict: Fit,
    X: Any,
    y: Any,
    X_test: Any,
    *,
    n_models: int = 20,
    resample: Literal["none", "bootstrap", "split"] = "bootstrap",
    n_splits: int = 2,
    n_jobs: int = 1,
    random_state: int | None = None,
) -> Float[Tensor, "members n classes"]:
    """Train members of an ensemble on resampled data and return what they predict.

    Parameters
    ----------
    fit_predict : callable
        ``fit_predict(X, y, X_test, seed)`` trains a model and returns probabilities, or scores, of shape
        (n_test, K) for the same K classes each time: a tensor or an array. It gets rows of what came here.
    X : Tensor, ndarray, sparse matrix or DataFrame of n rows
        What members learn from.
    y : Tensor, ndarray or Series of n labels
        Of any kind.
    X_test : Tensor, ndarray, sparse matrix or DataFrame of n_test rows
        What they predict.
    n_models : int, default=20
        M.
    resample : {"none", "bootstrap", "split"}, default="bootstrap"
        What members differ in beside their seed: nothing; n rows with replacement; or one of n_splits
        disjoint parts, of ever new partitions, whose members share no example. Every resample has every class: one
        that lacks a class is drawn again, at last class by class.
    n_splits : int, default=2
        Parts of a partition, for ``"split"``: 2 up to the examples of the smallest class.
    n_jobs : int, default=1
        Members that are trained at once, in processes of their own, as joblib counts.
    random_state : int, optional
        Decides resamples and the members' seeds; by default they are new each time.

    Returns
    -------
    Tensor of shape (n_models, n_test, K)
        As the predictions' dtype, on the CPU: what `bias_variance` takes.

    Raises
    ------
    ValueError
        If an argument is out of its range, lengths differ, or predictions have another shape than
        (n_test, K) or than those of the first member.

    References
    ----------
    .. [1] Yang, Yu, You, Steinhardt, Ma. Rethinking Bias-Variance Trade-off for Generalization of Neural
       Networks. ICML 2020. Section 3 (disjoint parts).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> from posterity.dynamics import bias_variance, ensemble_predictions
    >>> X, y = load_iris(return_X_y=True)
    >>> def fit_predict(X, y, X_test, seed):
    ...     return DecisionTreeClassifier(random_state=seed).fit(X, y).predict_proba(X_test)
    >>> probs = ensemble_predictions(fit_predict, X[::2], y[::2], X[1::2], n_models=5, random_state=0)
    >>> probs.shape
    torch.Size([5, 75, 3])
    >>> found = bias_variance(probs, y[1::2])
    """
    one_of("resample", resample, ("none", "bootstrap", "split"))
    n_models = integer("n_models", n_models, 1)
    if random_state is not None:
        integer("random_state", random_state, 0)
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    n, n_test = _length(X), _length(X_test)
    if labels.ndim != 1 or len(labels) != n or n == 0:
        raise ValueError(
            f"y must hold a label for each of the {n} rows of X, at least 1, got shape {labels.shape}"
        )
    classes, codes, count = np.unique(labels, return_inverse=True, return_counts=True)
    if resample == "split" and not 2 <= integer("n_splits", n_splits) <= count.min():
        raise ValueError(
            f"n_splits must be in 2..{count.min()}, the examples of the smallest class, got {n_splits}"
        )
    seeds = [each.spawn(2) for each in np.random.SeedSequence(random_state).spawn(n_models)]
    if resample == "none":
        chosen = [None] * n_models
    elif resample == "bootstrap":
        chosen = [_bootstrap(codes, len(classes), np.random.default_rng(own)) for own, _ in seeds]
    else:
        chosen = []
        for own, _ in seeds[::n_splits]:
            chosen += _parts(codes, len(classes), n_splits, np.random.default_rng(own))
    members = zip(chosen[:n_models], (int(seed.generate_state(1)[0]) for _, seed in seeds), strict=True)
    outputs: list[Any] = list(
        Parallel(n_jobs=n_jobs)(
            delayed(_member)(fit_predict, X, y, X_test, rows, seed) for rows, seed in members
        )
    )
    for output in outputs:
        if output.ndim != 2 or len(output) != n_test or output.shape != outputs[0].shape:
            raise ValueError(
                f"fit_predict must return an array of shape ({n_test}, classes), the same for all members, "
                f"got {tuple(output.shape)} after {tuple(outputs[0].shape)}"
            )
    return torch.stack(outputs)


def neural_collapse_ensemble(
    n: int,
    n_classes: int,
    *,
    n_models: int = 20,
    scale: float = 10.0,
    noise: tuple[float, float] = (0.05, 0.7),
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "members n classes"], Int[Tensor, " n"]]:
    r"""Draw the predictions of networks in neural collapse, whose features scatter around the class means.

    .. math:: f = W_y + \sigma \epsilon, \quad h = \mathrm{softmax}(s\, W f), \quad
              W = \sqrt{K / (K - 1)}\, (I - 1 1^\top / K),

    with a noise level :math:`\sigma` for each sample, uniform, and new noise for each member: squared bias and
    variance of its samples are aligned.

    Parameters
    ----------
    n, n_classes : int
        Samples, at least 0, and K, at least 2.
    n_models : int, default=20
        Members.
    scale : float, default=10.0
        s > 0.
    noise : tuple of float, default=(0.05, 0.7)
        Lowest and highest level, at least 0.
    generator : torch.Generator, optional
        Draws labels, levels, noise. By default torch's global one.

    Returns
    -------
    probs : Tensor of shape (n_models, n, n_classes)
        In float64, on the generator's device.
    y : Tensor of shape (n,)
        Labels.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    .. [1] Chen, Lukasik, Jitkrittum, You, Kumar. On Bias-Variance Alignment in Deep Models. ICLR 2024. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import neural_collapse_ensemble
    >>> probs, y = neural_collapse_ensemble(100, 4, noise=(0.0, 0.0), generator=torch.Generator().manual_seed(0))
    >>> bool((probs.argmax(2) == y).all())
    True
    """
    n, k = integer("n", n, 0), integer("n_classes", n_classes, 2)
    m = integer("n_models", n_models, 1)
    at_least("scale", scale, 0.0, strict=True)
    if len(noise) != 2 or not 0 <= at_least("noise", noise[0], 0.0) <= at_least("noise", noise[1], 0.0):
        raise ValueError(f"noise must be a lowest and a highest level, got {noise}")
    device = draw_device(generator)
    y = torch.randint(k, (n,), generator=generator, device=device)
    uniform = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    level = noise[0] + (noise[1] - noise[0]) * uniform
    etf = (k / (k - 1)) ** 0.5 * (torch.eye(k, dtype=torch.float64, device=device) - 1 / k)
    drawn = torch.randn((m, n, k), generator=generator, device=device, dtype=torch.float64)
    return (scale * (etf[y] + level[:, None] * drawn) @ etf.T).softmax(-1), y


def _member(fit_predict: Fit, X: Any, y: Any, X_test: Any, rows: np.ndarray | None, seed: int) -> Tensor:
    some = (X, y) if rows is None else (_rows(X, rows), _rows(y, rows))
    output = fit_predict(*some, X_test, seed)
    return torch.as_tensor(output.detach().cpu() if isinstance(output, Tensor) else np.asarray(output))


def _length(data: Any) -> int:
    shape = getattr(data, "shape", ())  # a sparse matrix has one, but no len
    if not shape:
        raise ValueError(
            f"X and X_test must be tensors, arrays or tables with rows, got {type(data).__name__}"
        )
    return int(shape[0])


def _rows(data: Any, rows: np.ndarray) -> Any:
    """Return rows of a tensor, an array, a sparse matrix, or what pandas has."""
    if isinstance(data, Tensor):
        return data[torch.from_numpy(rows).to(data.device)]
    return data.iloc[rows] if hasattr(data, "iloc") else data[rows]


def _bootstrap(codes: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    for _ in range(ATTEMPTS):
        rows = rng.integers(len(codes), size=len(codes))
        if len(np.unique(codes[rows])) == k:
            return rows
    return np.concatenate([rng.choice(own, len(own)) for own in _by_class(codes, k)])


def _parts(codes: np.ndarray, k: int, n_splits: int, rng: np.random.Generator) -> list[np.ndarray]:
    for _ in range(ATTEMPTS):
        parts = np.array_split(rng.permutation(len(codes)), n_splits)
        if all(len(np.unique(codes[part])) == k for part in parts):
            return parts
    dealt = np.concatenate([rng.permutation(own) for own in _by_class(codes, k)])
    return [dealt[at::n_splits] for at in range(n_splits)]


def _by_class(codes: np.ndarray, k: int) -> list[np.ndarray]:
    return [np.flatnonzero(codes == each) for each in range(k)]
