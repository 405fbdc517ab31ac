"""The conformance check of estimators refuses plausible toys, one subtle fault each."""

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.validation import check_is_fitted, validate_data

from posterity.testing import check_estimator

pytestmark = pytest.mark.usefixtures("as_a_user")
X_UNITS, Y_UNITS = ("shift X", "scale X"), ("shift y", "scale y")


class Mean(RegressorMixin, BaseEstimator):
    """Fits in its constructor's spirit: changes a parameter in fit."""

    def __init__(self, shift=0.0):
        self.shift = shift

    def fit(self, X, y):
        self.shift = float(np.mean(y))
        return self

    def predict(self, X):
        return np.full(len(X), self.shift)


def test_a_good_estimator_passes():
    check_estimator(LinearRegression())


def test_a_toy_estimator_is_refused():
    with pytest.raises(AssertionError, match="check_"):
        check_estimator(Mean())


def test_a_skipped_check_needs_its_reason_and_must_really_fail():
    with pytest.raises(AssertionError, match="has its reason"):
        check_estimator(LinearRegression(), expected_failures={"check_fit1d": ""})
    with pytest.raises(AssertionError, match="expected to fail, but pass"):
        check_estimator(LinearRegression(), expected_failures={"check_fit1d": "we think so"})


# origin, unit, dtype and torch's modes


class Scaled(RegressorMixin, BaseEstimator):
    """Ridge regression on standardised features, by torch."""

    def variance(self, X):
        return X.var(0)

    def fit(self, X, y):
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        self.mean_ = X.mean(0)
        var = self.variance(X)
        self.scale_ = np.sqrt(np.where(var <= (1e-14 * self.mean_) ** 2, 1.0, var))
        self.level_ = y.mean()
        self.slope_ = self.solve(torch.as_tensor(self.standardised(X)), torch.as_tensor(y - self.level_))
        return self

    def standardised(self, X):
        return (X - self.mean_) / self.scale_

    def solve(self, x, y):
        return torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).to(x), x.T @ y).numpy()

    def predict(self, X):
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.standardised(X) @ self.slope_ + self.level_


class AbsoluteEpsilon(Scaled):
    def standardised(self, X):
        return (X - self.mean_) / (self.scale_ + 1e-8)


class MomentsApart(Scaled):
    def variance(self, X):
        return np.maximum(np.square(X).mean(0) - np.square(X.mean(0)), 0)


class Damped(Scaled):
    """Takes the target for a number of order 1."""

    def solve(self, x, y):
        return super().solve(x, y / (1 + y.abs().mean()) * 2)


class Descent(Scaled):
    """Its gradients need grad mode."""

    def solve(self, x, y):
        slope = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
        for _ in range(5):
            (grad,) = torch.autograd.grad((x @ slope - y).square().mean() / 2, slope)
            slope = (slope - grad / x.shape[1]).detach().requires_grad_()
        return slope.detach().numpy()


class Halved(Scaled):
    """Computes in the dtype that comes."""

    def fit(self, X, y):
        super().fit(X, y)
        self.level_ += getattr(X, "dtype", None) == np.float16
        return self


class Nearest(KNeighborsClassifier):
    """Its distances are |x|^2 - 2 x y + |y|^2, which cancels far from the origin."""

    def __init__(self, n_neighbors=1, algorithm="brute"):
        super().__init__(n_neighbors, algorithm=algorithm)


class Middle(TransformerMixin, BaseEstimator):
    """Clips each column at its median, in its own units."""

    def fit(self, X, y=None):
        self.median_ = np.median(validate_data(self, X, dtype=np.float64), axis=0)
        return self

    def transform(self, X):
        check_is_fitted(self)
        return np.minimum(validate_data(self, X, dtype=np.float64, reset=False), self.median_)


class Rounding(Middle):
    def transform(self, X):
        return super().transform(X).round(6)


def test_good_estimators_pass_in_any_unit():
    check_estimator(Scaled(), invariant=X_UNITS + Y_UNITS)
    check_estimator(Middle(), invariant=X_UNITS)
    check_estimator(Nearest(), invariant=["scale X"])


@pytest.mark.parametrize(
    ("toy", "invariant", "said"),
    [
        (AbsoluteEpsilon, ["scale X"], r"for X \* 1e-12 is that for X, but it is off"),
        (MomentsApart, ["shift X"], r"for X \+ 1e\+08 is that for X, but it is off"),
        (Damped, ["scale y"], r"for y \* 1e-12 move with y, but it is off"),
        (Descent, [], r"does not require grad"),
        (Halved, [], r"float16 is as float32, but it is off"),
        (Nearest, ["shift X"], r"for X \+ 1e\+08 is that for X, but \d+ of 60 labels differ"),
        (Rounding, ["scale X"], r"for X \* 1e-12 is that for X, but it is off"),
    ],
)
def test_an_estimator_with_units_of_its_own_is_refused(toy, invariant, said):
    with pytest.raises((AssertionError, RuntimeError), match=said):
        check_estimator(toy(), invariant=invariant)
