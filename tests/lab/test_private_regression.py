"""Private regression: the noise of the ordinary choices is what they promise, and tables become numbers in public."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.linear_model import LinearRegression

from posterity.engine.compare import compare
from posterity.lab.data import TableData
from posterity.lab.tasks import entries, get_task
from posterity.lab.tasks.private_regression import _gaussian_noise, adassp, private_mean, public_numbers
from posterity.testing import check_private


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 1e-3), (0.3662, 3.3e-6), (2.0, 1e-8), (20.0, 1e-2)])
def test_gaussian_noise_is_the_least_that_keeps_the_promise(epsilon, delta):
    """The hockey-stick divergence of N(1, s) from N(0, s), by integration."""
    s = _gaussian_noise(epsilon, delta)
    start = epsilon * s**2 + 0.5  # beyond it the first is exp(epsilon) times as likely

    def excess(x):
        return norm.pdf(x, 1, s) - math.exp(epsilon) * norm.pdf(x, 0, s)

    spent = quad(excess, start, start + 10 * s, epsabs=0, epsrel=1e-9, limit=200)[0]
    np.testing.assert_allclose(spent, delta, rtol=1e-4)


def rows(n=400, d=3):
    rng = np.random.default_rng(0)
    X = rng.normal([0, 5, -1], [1, 10, 0.1], size=(n, d))
    return X, X @ [1.0, -2.0, 30.0] + 4 + 0.1 * rng.normal(size=n)


def test_without_noise_adassp_is_least_squares():
    X, y = rows()
    predict = adassp((X, y, 1e9, 0.1), 0)
    np.testing.assert_allclose(predict(X), LinearRegression().fit(X, y).predict(X), atol=1e-3)


@pytest.mark.parametrize("fit", [adassp, private_mean])
def test_releases_of_neighbours_are_not_told_apart_beyond_the_promise(fit):
    """Two rows at the bounds stay, so that these, public here, are those of both."""
    x = np.r_[-1.0, 1.0, np.zeros(8)][:, None]
    y = np.r_[-1.0, 1.0, np.zeros(8)]
    other = (np.r_[x, [[1.0]]], np.r_[y, 1.0]) if fit is adassp else (x, np.r_[y[:-1], 1.0])
    scores = [
        [fit((*data, 2.0, 1e-5), seed)(np.ones((1, 1)))[0] for seed in range(start, start + 600)]
        for start, data in ((0, (x, y)), (10_000, other))
    ]
    check_private(*scores, epsilon=2.0, delta=1e-5)


def test_the_noise_of_the_mean_is_what_it_must_be_and_not_more():
    y = np.r_[-1.0, 1.0, -np.ones(8)]
    means = [
        np.array([private_mean((y[:, None], each, 2.0, 0.1), seed)(np.ones((1, 1)))[0] for seed in seeds])
        for each, seeds in ((y, range(2_000)), (np.r_[y[:-1], 1.0], range(2_000, 4_000)))
    ]
    assert check_private(*means, epsilon=2.0) > 1.5
    with pytest.raises(AssertionError, match="told apart"):  # half the noise
        check_private(*((m + m.mean()) / 2 for m in means), epsilon=2.0)


def test_tables_become_numbers_by_what_is_public():
    frame = pd.DataFrame({"a": [1.0, np.nan, 3.0], "town": ["u", "v", "w"]})
    table = TableData(frame, np.arange(3.0), "regression")
    np.testing.assert_array_equal(
        public_numbers(table), [[1, 0, 0, 0], [0, 1, 1, 0], [3, 0, 0, 1]]
    )  # a, a is missing, v, w


def test_every_entry_scores_and_knows_the_budget():
    task, seen = get_task("private-regression"), []
    compare("private-regression")  # imports what registers the data
    for name, each in entries("private-regression").items():
        assert -1 < task.score(each.fit, 0, "long-tailed", None) < 1, name
    task.score(lambda train, seed: seen.append(train[2:]) or LinearRegression().fit(*train[:2]).predict,
               0, "long-tailed", None, epsilon=0.5, delta=1e-6)  # fmt: skip
    assert seen == [(0.5, 1e-6)]


def test_few_rows_are_refused_before_any_trial(tmp_path):
    X, y = rows(900)
    pd.DataFrame(X).assign(y=y).to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(ValueError, match=r"at least 1000 rows are needed.*has 900"):
        compare("private-regression", data=str(tmp_path / "few.csv"), target="y")
    wide = TableData(pd.DataFrame(np.eye(1_000, 120)), np.arange(1_000.0), "regression")
    with pytest.raises(ValueError, match="at least 1210 rows for 121 coefficients"):
        get_task("private-regression").needs(wide)
    with pytest.raises(ValueError, match=r"delta must be .*at most 0\.1, got 0\.5"):
        compare("private-regression", settings={"delta": "0.5"})
