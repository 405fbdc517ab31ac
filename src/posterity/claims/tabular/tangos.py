"""Claims about TANGOS: specialised units generalise better, alone and beside dropout."""

from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn.metrics import log_loss

from posterity.claims import Between, Count, Positive, Trial, comparison
from posterity.lab.data import Table, load_table, split, table_encoder
from posterity.lab.tasks import entry
from posterity.tabular import TangosClassifier, TangosRegressor

SPEC, L2 = (1.0, 10.0, 100.0), (0.1, 0.01, 0.001)  # the grids of the paper's code
ORTH = 0.1


class _Parts:
    """Encoded training and test rows of one seed, and how a network does on the latter."""

    def __init__(
        self, data: str, target: str | None, n_noise: int, n_rows: int, trial: Trial, number: int = 0
    ) -> None:
        seed = trial.seed + 10_000 * number
        table = load_table(data, target=target, seed=seed)
        self.classes = len(table.classes)
        labels = table.y if self.classes else None
        train, test = split(len(table.y), (0.8 * min(1, n_rows / len(table.y)), 0.2), seed, stratify=labels)
        encode = table_encoder().fit(table.X.iloc[train])
        x = np.asarray(encode.transform(table.X), dtype=np.float32)
        rng = np.random.default_rng(seed)
        copies = [rng.permutation(x[:, column]) for column in rng.integers(0, x.shape[1], n_noise)]
        x = np.column_stack([x, *copies])
        y = table.y
        if not self.classes:
            y = (y - y[train].mean()) / (y[train].std() or 1.0)
        self.x, self.y, self.x_test, self.y_test = x[train], y[train], x[test], y[test]
        self.trial, self.seed = trial, seed

    def fit(self, max_epochs: int, **options: Any) -> Any:
        """Train on three quarters of the training rows and stop by the fourth."""
        kind = TangosClassifier if self.classes else TangosRegressor
        return kind(
            max_epochs=max_epochs, validation_fraction=0.25, device=self.trial.device,
            random_state=self.seed, **options,
        ).fit(self.x, self.y)  # fmt: skip

    def loss(self, model: Any) -> float:
        """Return squared error or cross-entropy on the test rows."""
        if not self.classes:
            return float(np.mean((model.predict(self.x_test) - self.y_test) ** 2))
        shares = np.full((len(self.y_test), self.classes), 1e-7)
        shares[:, model.classes_] += model.predict_proba(self.x_test)
        return float(log_loss(self.y_test, shares / shares.sum(1, keepdims=True), labels=range(self.classes)))


def _best(models: list[Any]) -> Any:
    """Return the model whose kept weights have the lowest validation loss."""
    return min(models, key=lambda model: model.history_["validation_loss"][model.best_epoch_])


def _overlap(a: ndarray) -> tuple[float, float]:
    """Return the two terms of attributions (n, units, inputs): mean size, mean absolute cosine."""
    unit = a / np.maximum(np.linalg.norm(a, axis=2, keepdims=True), 1e-6)
    units = a.shape[1]
    cosines = np.abs(unit @ unit.swapaxes(1, 2))[:, *np.tril_indices(units, -1)]
    return float(np.abs(a).mean()), float(cosines.mean()) if units > 1 else 0.0


def _report(trial: Trial, parts: _Parts, models: dict[str, Any]) -> dict[str, float]:
    """Return the test loss of each arm, with its curve and its terms on test rows beside it."""
    for arm, model in models.items():
        size, overlap = _overlap(model.attributions(parts.x_test[:100]))
        trial.record(f"specialisation on test rows, {arm}", size)
        trial.record(f"orthogonalisation on test rows, {arm}", overlap)
        for epoch, value in enumerate(model.history_["validation_loss"]):
            trial.track(f"validation loss, {arm}", epoch, value)
    return {arm: parts.loss(model) for arm, model in models.items()}


def _mean(losses: list[dict[str, float]]) -> dict[str, float]:
    return {arm: float(np.mean([loss[arm] for loss in losses])) for arm in losses[0]}


@comparison(
    paper="tangos",
    says="Specialised units that do not overlap generalise better than no or classical regularisation.",
    where="Jeffares et al., Section 5",
    arms=("none", "l2", "tangos"),
    metric="test loss: squared error of the standardised target, or cross-entropy",
    better="lower",
    smallest={"max_epochs": 5, "n_rows": 60, "n_noise": 5, "n_splits": 1},
)
def generalises(
    trial: Trial,
    data: Table = "diabetes",
    target: str | None = None,
    n_noise: Annotated[int, Between(0)] = 40,
    max_epochs: Count = 100,
    lr: Positive = 1e-3,
    n_rows: Annotated[int, Between(10)] = 1_000,
    n_splits: Count = 3,
) -> dict[str, float]:
    """Train one network with early stopping only, with weight decay and with TANGOS.

    A trial is the mean over three splits, since one test part of a small table is noisy.
    The arms share each split (60/20/20), initial weights, batches and epochs. Weight decay
    and TANGOS each take the better of three strengths by the trial's validation loss, at
    ``lambda_orth = 0.1``. ``n_noise`` adds columns that are permutations of real ones:
    the case of many irrelevant features in which sparse attributions must help; with
    ``n_noise=0`` the gain on diabetes is small. At most four fifths of ``n_rows`` rows are
    trained on; the test part is a fifth of the table. The records compare the two terms on
    test rows: strong specialisation leaves all units on the few columns that count, so that
    their overlap can rise while their size falls.
    """
    off = {"lr": lr, "lambda_spec": 0.0, "lambda_orth": 0.0}
    losses = []
    for number in range(n_splits):
        parts = _Parts(data, target, n_noise, n_rows, trial, number)
        models = {
            "none": parts.fit(max_epochs, **off),
            "l2": _best([parts.fit(max_epochs, **off, weight_decay=strength) for strength in L2]),
            "tangos": _best(
                [parts.fit(max_epochs, lr=lr, lambda_spec=strength, lambda_orth=ORTH) for strength in SPEC]
            ),
        }
        shown = trial if number == 0 else Trial(parts.seed)  # the page has the first split's curves
        losses.append(_report(shown, parts, models))
    return _mean(losses)


@comparison(
    paper="tangos",
    says="TANGOS adds to dropout: both together generalise better than dropout alone.",
    where="Jeffares et al., Section 5, in tandem with other regularisers",
    arms=("dropout", "dropout + tangos"),
    metric="test loss: squared error of the standardised target, or cross-entropy",
    better="lower",
    smallest={"max_epochs": 5, "n_rows": 60, "n_noise": 5, "n_splits": 1},
)
def adds_to_dropout(
    trial: Trial,
    data: Table = "diabetes",
    target: str | None = None,
    n_noise: Annotated[int, Between(0)] = 40,
    max_epochs: Count = 100,
    lr: Positive = 1e-3,
    n_rows: Annotated[int, Between(10)] = 1_000,
    n_splits: Count = 5,
) -> dict[str, float]:
    """Train with dropout, its rate one of three by validation loss, and with TANGOS added to that.

    The rate is chosen without TANGOS and kept; ``lambda_spec`` is then one of three. The gain
    is smaller than that over no regularisation, so that a trial is the mean over more splits.
    All else is as in ``generalises``.
    """
    off = {"lr": lr, "lambda_spec": 0.0, "lambda_orth": 0.0}
    losses = []
    for number in range(n_splits):
        parts = _Parts(data, target, n_noise, n_rows, trial, number)
        plain = _best([parts.fit(max_epochs, **off, dropout=rate) for rate in (0.1, 0.2, 0.5)])
        both = _best(
            [
                parts.fit(max_epochs, lr=lr, dropout=plain.dropout, lambda_spec=strength, lambda_orth=ORTH)
                for strength in SPEC
            ]
        )
        shown = trial if number == 0 else Trial(parts.seed)
        losses.append(_report(shown, parts, {"dropout": plain, "dropout + tangos": both}))
    return _mean(losses)


def _entry(kind: Any, train: tuple[pd.DataFrame, ndarray], seed: int) -> tuple[Any, Any]:
    """Return the encoder and the network, its strength chosen by its own validation part."""
    encode = table_encoder().fit(train[0])
    x = np.asarray(encode.transform(train[0]), dtype=np.float32)
    return encode, _best(
        [kind(lambda_spec=s, lambda_orth=ORTH, random_state=seed).fit(x, train[1]) for s in SPEC]
    )


@entry("tabular-regression", "TANGOS", paper="tangos")
def regression(train: Any, seed: int) -> Any:
    """Return a network with TANGOS, its strength one of three."""
    encode, model = _entry(TangosRegressor, train, seed)
    return lambda X: model.predict(np.asarray(encode.transform(X), dtype=np.float32))


@entry("tabular-classification", "TANGOS", paper="tangos")
def classification(train: Any, seed: int) -> Any:
    """Return a network with TANGOS, its strength one of three."""
    encode, model = _entry(TangosClassifier, train, seed)
    return lambda X: model.predict_proba(np.asarray(encode.transform(X), dtype=np.float32))
