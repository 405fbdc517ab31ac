"""TukeyEM: linear regression under differential privacy, with no bounds to know and nothing to tune.

Cut the rows into m disjoint batches, fit least squares on each, and choose one deep point among
the m coefficient vectors by a test and the exponential mechanism (`posterity.privacy.TukeyMechanism`):

    theta ~ exp(c d(theta)),    d(theta) = the number of models on the poorer side of theta
                                           in its worst coordinate.                          (1)

A row is in one batch, hence moves one model, hence the depth of any point by at most 1, whatever
the row says: this is why neither features nor labels need a bound. Few outlying batches are as
far from the middle as many honest ones are near it. What it costs is rows, about 1,000 batches
with several rows for each coefficient.
"""

import warnings
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from posterity._checks import integer, one_of
from posterity.privacy.tukey_mechanism import (
    LEAST,
    TukeyMechanism,
    _check_budget,
    _generator,
    _least_models,
)

__all__ = ["PrivacyTestFailed", "TukeyEMRegressor"]

LN_3 = 1.0986122886681098
FARTHEST = 1e300  # a coefficient beyond it counts as it
JITTER, ROUNDING = 1e-10, 1e-13  # of the batch's own spread, and of a number itself


class PrivacyTestFailed(RuntimeError):
    """The private test found models that agree too little: nothing may be released.

    That it failed is part of the private output and may be published; trying again on the same
    people spends epsilon and delta again.
    """


class TukeyEMRegressor(RegressorMixin, BaseEstimator):
    """Linear regression whose coefficients are (epsilon, delta)-differentially private.

    Coefficients, intercept and ``passed_`` may be published together, and everything computed
    from them. With ``neighbors="replace"``, and rows and models counted in public, they are
    (epsilon, delta)-differentially private where one row is replaced by any other (all rows of a
    person, if they lie in one batch, which a random cut does not see to). The guarantee covers one
    ``fit``: another one, with other settings too, spends epsilon and delta again. Nothing else that
    depends on the data is kept on the object.

    What is done to the data before ``fit`` must not depend on them either: scaling by their
    own mean, a choice of columns by their correlation, codes of categories taken from their
    frequencies are not covered. The fit needs no scaling: units change nothing. The origin of a
    feature does. Where features are far from 0 beside their spread (a year, a latitude), slopes
    and intercept of the models move together, and a release that is deep in each of them alone
    predicts badly: subtract a typical value that is public.

    Parameters
    ----------
    epsilon : float, default=ln 3
        Greater than 0; half for the test, half for the choice.
    delta : float, default=1e-5
        In (0, 1); should be far below one over the number of rows.
    n_models : int, default=1000
        Batches m, at least 4. The test needs some hundreds to pass, 1,000 with the default budget;
        more leave fewer rows for each model. To be chosen without the data.
    fit_intercept : bool, default=True
        Whether there is an intercept, one more coefficient.
    neighbors : {"replace", "add-remove"}, default="replace"
        Which collections of models must not be told apart, see `posterity.privacy.TukeyMechanism`.
        ``"add-remove"`` is the official code's exponent, e: closer to the middle, but for one row
        replaced it is (1.5 epsilon, delta) that holds.
    on_failure : {"raise", "zero"}, default="raise"
        Where the test is not passed: raise `PrivacyTestFailed`, or return a model of zeros with
        ``passed_=False``, as the official code does.
    random_state : int, RandomState or None, default=None
        Cuts the rows, draws the noise. None takes fresh numbers from the operating system to seed
        numpy's Mersenne Twister. **The guarantee does not hold against whoever knows the seed**:
        fix it in tests only.

    Attributes
    ----------
    coef_ : ndarray of shape (d,)
    intercept_ : float
    passed_ : bool
        Whether the test was passed.
    n_features_in_ : int
    feature_names_in_ : ndarray

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range, data are not finite, or the rows of a batch are
        fewer than the coefficients. That data are not finite is said in the clear.
    PrivacyTestFailed
        At ``fit``, if the test is not passed and ``on_failure="raise"``.

    Warns
    -----
    UserWarning
        If delta is at least one over the number of rows: publishing a row would be allowed.

    Notes
    -----
    1. Noise, depth of the release and exponent differ from the official code, which does not keep
       its promise: see the notes of `posterity.privacy.TukeyMechanism`.
    2. A batch whose columns are collinear has the shortest of its solutions, columns scaled to
       one size; a coefficient that overflows counts as 1e300. Both change that batch alone.
    3. The noise that keeps models apart is in each batch's own units, so that a change of units
       changes nothing; in the official code it is 1e-10 whatever the units.
    4. Proofs are about real numbers: sampling in floating point, numpy's generator, and how long
       a fit takes are outside them.

    References
    ----------
    .. [1] Amin, Joseph, Ribero, Vassilvitskii. Easy Differentially Private Linear Regression.
       ICLR 2023. Algorithm 4.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.privacy import TukeyEMRegressor
    >>> rng = np.random.default_rng(0)
    >>> X = rng.lognormal(0.0, 2.0, size=(20_000, 2))  # no bound is known
    >>> y = 3 * X[:, 0] - 2 * X[:, 1] + 50 + rng.normal(size=20_000)
    >>> model = TukeyEMRegressor(random_state=0).fit(X, y)
    >>> model.coef_.round(1), round(model.intercept_)
    (array([ 3., -2.]), 50)
    """

    def __init__(
        self, epsilon: float = LN_3, delta: float = 1e-5, n_models: int = 1000, fit_intercept: bool = True,
        neighbors: Literal["replace", "add-remove"] = "replace", on_failure: Literal["raise", "zero"] = "raise",
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.epsilon = epsilon
        self.delta = delta
        self.n_models = n_models
        self.fit_intercept = fit_intercept
        self.neighbors = neighbors
        self.on_failure = on_failure
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "TukeyEMRegressor":
        """Fit the models and release one point, privately.

        Parameters
        ----------
        X : array of shape (n, d)
            Features, finite.
        y : array of shape (n,)
            Target, finite.

        Returns
        -------
        TukeyEMRegressor
            The fitted estimator.
        """
        _check_budget(self.epsilon, self.delta, self.neighbors)
        m = integer("n_models", self.n_models, LEAST)
        one_of("on_failure", self.on_failure, ("raise", "zero"))
        one_of("fit_intercept", self.fit_intercept, (True, False))
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        n, d = X.shape
        p = d + self.fit_intercept
        if n // m < p:
            most = n // p
            fits = (
                f"at most {most} fit" if most >= LEAST else f"X must have at least {LEAST * p} rows for any"
            )
            raise ValueError(
                f"n_models must leave {p} rows for the {p} coefficients of a model, got n_models={m} for "
                f"n_samples = {n}: {fits}"
            )
        if self.delta >= 1 / n:
            warnings.warn(
                f"delta={self.delta:g} is not below 1 / {n}: it would allow to publish a row", stacklevel=2
            )
        draw = _generator(self.random_state)
        rows = draw.permutation(n)[: n // m * m]
        models = _batch_models(X[rows].reshape(m, -1, d), y[rows].reshape(m, -1), self.fit_intercept)
        mechanism = TukeyMechanism(
            _jittered(*models, draw), epsilon=self.epsilon, delta=self.delta, neighbors=self.neighbors,
            jitter=np.finfo(float).tiny, random_state=draw,
        )  # fmt: skip
        point = mechanism.release()
        if point is None and self.on_failure == "raise":
            least = _least_models(self.epsilon, self.delta)
            hint = f"; at this budget no data pass with fewer than {least} models" if m < least else ""
            raise PrivacyTestFailed(
                f"the models of {m} batches agree too little to release one: raise n_models or epsilon{hint}"
            )
        self.passed_ = point is not None
        point = np.zeros(p) if point is None else point
        self.coef_, self.intercept_ = point[:d], float(point[d]) if self.fit_intercept else 0.0
        return self

    def predict(self, X: Any) -> ndarray:
        """Return the predictions of the released model.

        Parameters
        ----------
        X : array of shape (n, d)
            Rows with the columns of ``fit``.

        Returns
        -------
        ndarray of shape (n,)
        """
        check_is_fitted(self)
        X = np.asarray(validate_data(self, X, reset=False, dtype=np.float64))
        return X @ self.coef_ + self.intercept_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # on a few hundred rows
        return tags


def _batch_models(X: ndarray, y: ndarray, fit_intercept: bool) -> tuple[ndarray, ndarray]:
    """Return the least-squares coefficients of each batch (m, b, d), the intercept last, and their units.

    Each batch is centred, which is what a column of ones does, and scaled to one size in each column,
    so that rank is judged column by column. Only numbers of a batch enter its model.
    """
    (m, b, d), eps = X.shape, np.finfo(np.float64).eps
    tiny = b * eps
    x_unit, y_unit = _size(X), _size(y)
    x, z = X / x_unit, y / y_unit
    x_mean, z_mean = (a.mean(1, keepdims=True) * fit_intercept for a in (x, z))
    x -= x_mean
    z -= z_mean
    x *= np.abs(x).max(1, keepdims=True) > tiny  # what rounding leaves of a constant column
    triangle = np.linalg.qr(np.concatenate([x, z[..., None]], axis=2), mode="r")  # R and Q'z
    r, projected = triangle[:, :d, :d], triangle[:, :d, d:]
    coef = np.zeros((m, d))
    flat = np.abs(np.diagonal(r, axis1=1, axis2=2)).min(1) <= tiny * np.sqrt(b)
    coef[~flat] = np.linalg.solve(r[~flat], projected[~flat])[..., 0]
    if flat.any():
        coef[flat] = (np.linalg.pinv(x[flat], rcond=tiny) @ z[flat][..., None])[..., 0]
    unit = y_unit * _size(z)
    with np.errstate(over="ignore", invalid="ignore"):
        models, units = coef * (y_unit / x_unit[:, 0]), unit / x_unit[:, 0]
        if fit_intercept:
            constant = y_unit * (z_mean - (coef * x_mean[:, 0]).sum(1, keepdims=True))
            models, units = np.hstack([models, constant]), np.hstack([units, unit])
    return tuple(np.nan_to_num(each, posinf=FARTHEST).clip(-FARTHEST, FARTHEST) for each in (models, units))


def _size(values: ndarray) -> ndarray:
    """Return the largest absolute value over axis 1, 1 where all are 0."""
    top = np.abs(values).max(1, keepdims=True)
    return np.where(top > 0, top, 1.0)


def _jittered(models: ndarray, units: ndarray, draw: np.random.RandomState) -> ndarray:
    """Return models of which no two are equal: each number moves by far less than it means."""
    least = np.maximum(JITTER * units, ROUNDING * np.abs(models))
    return models + least * draw.uniform(size=models.shape)
