"""Classification on a table: train is (frame, y codes), predict gives probabilities (n, classes)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline

from posterity.lab.data import Table, load_table, split, table_encoder
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.tabular_regression import tuned_mlp

__all__: list[str] = []


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> float:
    table = load_table(data, target=target, task="classification", seed=seed)
    train, test = split(len(table.y), (0.8, 0.2), seed, stratify=table.y)
    known, codes = np.unique(table.y[train], return_inverse=True)
    shares = np.asarray(fit((table.X.iloc[train], codes), seed)(table.X.iloc[test]), dtype=float)
    full = np.zeros((len(test), len(table.classes)))
    full[:, known] = shares
    full = np.clip(full, 1e-7, None)
    return float(log_loss(table.y[test], full / full.sum(1, keepdims=True), labels=range(full.shape[1])))


TASK = Task(
    "tabular-classification", Table, "log loss", "lower", "wine", _score,
    takes_target=True, loading={"task": "classification"},
)  # fmt: skip


def tuned_logistic() -> Any:
    """Return logistic regression, its penalty cross-validated."""
    return GridSearchCV(
        LogisticRegression(max_iter=2000), {"C": np.logspace(-3, 2, 6)}, scoring="neg_log_loss", cv=3
    )


ORDINARY: dict[str, Callable[[int], Any]] = {
    "linear": lambda seed: tuned_logistic(),
    "random forest": lambda seed: RandomForestClassifier(300, random_state=seed),
    "gradient boosting": lambda seed: HistGradientBoostingClassifier(random_state=seed),
    "tuned MLP": lambda seed: tuned_mlp(MLPClassifier, seed),
}


def _offer(name: str, model: Callable[[int], Any]) -> None:
    @entry("tabular-classification", name)
    def _fit(train: Any, seed: int) -> Callable[[Any], Any]:
        return make_pipeline(table_encoder(), model(seed)).fit(*train).predict_proba


for _name, _model in ORDINARY.items():
    _offer(_name, _model)
