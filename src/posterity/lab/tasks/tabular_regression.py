"""Regression on a table: train is (frame, standardised y), predict maps a frame to (n,)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline

from posterity.lab.data import Table, load_table, split, table_encoder
from posterity.lab.tasks import Task, entry

__all__: list[str] = []


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    table = load_table(data, target=target, task="regression", seed=seed)
    train, test = split(len(table.y), (0.8, 0.2), seed)
    mean, scale = table.y[train].mean(), table.y[train].std() or 1.0
    predict = fit((table.X.iloc[train], (table.y[train] - mean) / scale), seed)
    error = np.asarray(predict(table.X.iloc[test])) - (table.y[test] - mean) / scale
    return float(np.sqrt(np.mean(error**2)))


TASK = Task(
    "tabular-regression", Table, "root mean squared error, target standardised", "lower", "diabetes", _score,
    takes_target=True, loading={"task": "regression"},
)  # fmt: skip


def tuned_mlp(kind: type, seed: int) -> Any:
    """Return scikit-learn's network of two layers of 64 units, its penalty cross-validated."""
    net = kind(hidden_layer_sizes=(64, 64), max_iter=300, tol=1e-3, random_state=seed)
    return GridSearchCV(net, {"alpha": [1e-3, 1e-1, 1.0, 10.0]}, cv=3)


ORDINARY: dict[str, Callable[[int], Any]] = {
    "linear": lambda seed: RidgeCV(np.logspace(-3, 3, 13)),
    "random forest": lambda seed: RandomForestRegressor(300, random_state=seed),
    "gradient boosting": lambda seed: HistGradientBoostingRegressor(random_state=seed),
    "tuned MLP": lambda seed: tuned_mlp(MLPRegressor, seed),
}


def _offer(name: str, model: Callable[[int], Any]) -> None:
    @entry("tabular-regression", name)
    def _fit(train: Any, seed: int) -> Callable[[Any], Any]:
        return make_pipeline(table_encoder(), model(seed)).fit(*train).predict


for _name, _model in ORDINARY.items():
    _offer(_name, _model)
