"""Private regression: train is (X (n, d), y, epsilon, delta), predict maps (k, d) to (k,).

An entry answers for one fit under (epsilon, delta)-differential privacy, the one named so does
not. Public are the numbers of rows and columns and what turns a table into numbers: which columns
may be missing (0 and a column that says so), and which categories there are (a column each, of the
20 commonest, less one). Nothing is centred or scaled by the data. Entries "given exact bounds" take
the bounds of each column from the rows that they protect, **which is not private**: it stands for
bounds that were known before, as sharp as they can be, and favours them.

AdaSSP protects a row that is added or taken away, TukeyEM and the mean one that is replaced, which
is more. Seeds are known here, so nothing of a comparison is to be published. Where diffprivlib can
be imported (``pip install diffprivlib``; 0.6.6 needs a scikit-learn before 1.8), its linear
regression competes too.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.preprocessing import OneHotEncoder

from posterity.claims import Between, Positive
from posterity.lab.data import Table, TableData, load_table, split
from posterity.lab.data.needs import require_rows
from posterity.lab.tasks import Task, entry

__all__ = ["Delta", "adassp", "public_numbers"]

LEAST = 1_000  # rows: of fewer the noise is all that is left
RHO = 0.05  # of AdaSSP: how often its ridge may be too small

Delta = Annotated[float, Between(1e-12, 0.1)]
Predict = Callable[[np.ndarray], np.ndarray]


def public_numbers(table: TableData) -> np.ndarray:
    """Return the columns of a table as numbers, by what counts as public.

    Parameters
    ----------
    table : TableData

    Returns
    -------
    ndarray of shape (n, d)
    """
    encode = make_column_transformer(
        (
            SimpleImputer(strategy="constant", fill_value=0.0, add_indicator=True, keep_empty_features=True),
            make_column_selector(dtype_include="number"),
        ),
        (
            OneHotEncoder(
                drop="first", max_categories=20, handle_unknown="infrequent_if_exist", sparse_output=False
            ),
            make_column_selector(dtype_exclude="number"),
        ),
    )
    return np.asarray(encode.fit_transform(table.X), dtype=np.float64)


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *,
    epsilon: Positive = 1.0986, delta: Delta = 1e-5,
) -> float:  # fmt: skip
    table = load_table(data, target=target, task="regression", seed=seed)
    X, (train, test) = public_numbers(table), split(len(table.y), (0.8, 0.2), seed)
    predict = fit((X[train], table.y[train], epsilon, delta), seed)
    return float(r2_score(table.y[test], predict(X[test])))


def _needs(table: TableData, **_: Any) -> None:
    require_rows(len(table.y), "rows", LEAST)
    columns = public_numbers(table).shape[1] + 1
    require_rows(len(table.y), f"rows for {columns} coefficients", 10 * columns)


TASK = Task(
    "private-regression", Table, "R2 on held-out rows", "higher", "long-tailed", _score,
    takes_target=True, loading={"task": "regression"}, needs=_needs, references=("least squares, not private",),
)  # fmt: skip


@entry("private-regression", "least squares, not private")
def least_squares(train: Any, seed: int) -> Predict:
    """Return least squares, which promises nothing: what privacy costs is the distance to it."""
    X, y, _, _ = train
    return LinearRegression().fit(X, y).predict


@entry("private-regression", "private mean, given exact bounds")
def private_mean(train: Any, seed: int) -> Predict:
    """Return the mean of the target with Laplace noise, whatever the features are."""
    _, y, epsilon, _ = train
    mean = y.mean() + np.random.default_rng(seed).laplace(scale=np.ptp(y) / (len(y) * epsilon))
    return lambda X: np.full(len(X), mean)


@entry("private-regression", "AdaSSP, given exact bounds")
def adassp(train: Any, seed: int) -> Predict:
    """Return a ridge regression on noisy second moments, its penalty from a noisy eigenvalue.

    Algorithm 2 of Wang (Revisiting differentially private linear regression, UAI 2018), a third of
    the budget each for the eigenvalue, the moments of X, and those with y. Columns and target are
    moved and scaled to [-1, 1] by their bounds, and the largest norm of such a row is known too.
    The noise is the least that keeps each third by the Gaussian mechanism; the published constant
    is somewhat short of it.

    Parameters
    ----------
    train : tuple of ndarray, ndarray, float and float
        X of shape (n, d), y of shape (n,), epsilon, delta.
    seed : int

    Returns
    -------
    callable
    """
    X, y, epsilon, delta = train
    rng, third = np.random.default_rng(seed), epsilon / 3
    to_box, origin, most = _Box(X), (y.max() + y.min()) / 2, np.ptp(y) / 2

    Z = _with_ones(to_box(X))
    d, norm2, noise = Z.shape[1], (Z**2).sum(1).max(), _gaussian_noise(third, delta / 3)
    moments, log_term = Z.T @ Z, math.log(6 / delta)
    smallest = np.linalg.eigvalsh(moments)[0] + noise * norm2 * rng.normal() - log_term / third * norm2
    wanted = math.sqrt(d * log_term * math.log(2 * d**2 / RHO)) * norm2 / third
    ridge = max(0.0, wanted - max(0.0, smallest))
    upper = np.triu(rng.normal(size=(d, d)))
    moments = moments + noise * norm2 * (upper + np.triu(upper, 1).T) + ridge * np.eye(d)
    target = Z.T @ (y - origin) + noise * math.sqrt(norm2) * most * rng.normal(size=d)
    weights = np.linalg.lstsq(moments, target, rcond=None)[0]
    return lambda X: _with_ones(to_box(X)) @ weights + origin


class _Box:
    """The map of columns to [-1, 1] by their exact bounds."""

    def __init__(self, X: np.ndarray) -> None:
        self.middle, half = (X.max(0) + X.min(0)) / 2, np.ptp(X, axis=0) / 2
        self.half = np.where(half > 0, half, 1.0)

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return (X - self.middle) / self.half


def _with_ones(X: np.ndarray) -> np.ndarray:
    return np.column_stack([X, np.ones(len(X))])


def _gaussian_noise(epsilon: float, delta: float) -> float:
    """Return the least standard deviation, at a sensitivity of 1, by Theorem 8 of Balle and Wang (2018)."""
    return math.exp(
        float(brentq(lambda log_s: _spent(epsilon, math.exp(log_s)) - delta, math.log(1e-6), math.log(1e14)))
    )


def _spent(epsilon: float, s: float) -> float:
    """Return the delta of Gaussian noise of standard deviation s."""
    return float(ndtr(0.5 / s - epsilon * s) - math.exp(epsilon + log_ndtr(-0.5 / s - epsilon * s)))


def diffprivlib_regression(train: Any, seed: int) -> Predict:
    """Return diffprivlib's linear regression, the functional mechanism, of which epsilon alone is spent."""
    from diffprivlib.models import LinearRegression as Private  # pyright: ignore[reportMissingImports]

    X, y, epsilon, _ = train
    to_box = _Box(X)
    origin, most = (y.max() + y.min()) / 2, np.ptp(y) / 2 or 1.0
    model = Private(epsilon=epsilon, bounds_X=(-1, 1), bounds_y=(-1, 1), random_state=seed)
    model.fit(to_box(X), (y - origin) / most)
    return lambda X: model.predict(to_box(X)) * most + origin


try:
    import diffprivlib.models  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError:  # not installed, or too old for this scikit-learn
    pass
else:
    entry("private-regression", "diffprivlib, given exact bounds")(diffprivlib_regression)
