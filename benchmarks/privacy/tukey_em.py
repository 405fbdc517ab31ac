"""All batches by one QR against a LinearRegression each, as the official code has it; and the mechanism alone."""

import time

import numpy as np
import torch
from sklearn.linear_model import LinearRegression

from benchmarks.timing import race
from posterity.privacy import TukeyEMRegressor, TukeyMechanism
from posterity.privacy.tukey_em import _batch_models


def one_by_one(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the coefficients of each batch, in a loop, with a column of ones."""
    models = []
    for rows, target in zip(X, y, strict=True):
        ones = np.column_stack([rows, np.ones(len(rows))])
        models.append(LinearRegression(fit_intercept=False).fit(ones, target).coef_)
    return np.array(models)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    n, d, m = 53_940, 9, 1000  # with the intercept ten coefficients
    X = rng.lognormal(size=(n, d))
    y = X @ rng.normal(size=d) + 5 + rng.normal(size=n)
    batches = X[: n // m * m].reshape(m, -1, d), y[: n // m * m].reshape(m, -1)
    np.testing.assert_allclose(_batch_models(*batches, True)[0], one_by_one(*batches), atol=1e-8)
    race(
        f"{m} models of {n} rows and {d + 1} coefficients, against one by one",
        lambda: _batch_models(*batches, True), lambda: one_by_one(*batches), target=25, rounds=5,
    )  # fmt: skip
    race(
        "the whole fit, against the models one by one",
        lambda: TukeyEMRegressor(random_state=0).fit(X, y), lambda: one_by_one(*batches), target=10, rounds=5,
    )  # fmt: skip
    models, _ = _batch_models(*batches, True)
    start = time.perf_counter()
    for seed in range(100):
        TukeyMechanism(models, epsilon=1.0, delta=1e-5, random_state=seed).release()
    print(
        f"test and choice among {m} models: {10 * (time.perf_counter() - start):.2f} ms (target about 1 ms)"
    )


if __name__ == "__main__":
    main()
