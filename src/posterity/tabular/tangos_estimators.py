"""Networks for a table as scikit-learn estimators, trained with the TANGOS regulariser.

ReLU layers are trained by Adam on the squared error or the cross-entropy plus the two
terms of `posterity.tabular.tangos`, which come in after a few epochs. A part of the rows
is held out: the weights of its lowest loss, taken without the regulariser, are kept.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, integer, within
from posterity._random import drawn_seed, seeded
from posterity._stopping import Best
from posterity.tabular.attributions import latent_attributions
from posterity.tabular.tangos import TangosPenalty, tangos_terms

__all__ = ["TangosClassifier", "TangosRegressor"]


class _Tangos(BaseEstimator):
    """Parameters, training and attributions that both estimators share."""

    def __init__(
        self, hidden: Sequence[int] | None = None, *, lambda_spec: float = 10.0, lambda_orth: float = 0.1,
        n_pairs: int | None = 50, warmup_epochs: int = 3, max_epochs: int = 200, batch_size: int = 32,
        lr: float = 1e-3, weight_decay: float = 0.0, dropout: float = 0.0, validation_fraction: float = 0.2,
        patience: int = 30, standardize: bool = True, device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.hidden = hidden
        self.lambda_spec = lambda_spec
        self.lambda_orth = lambda_orth
        self.n_pairs = n_pairs
        self.warmup_epochs = warmup_epochs
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.standardize = standardize
        self.device = device
        self.random_state = random_state

    def attributions(self, X: Any) -> ndarray:
        """Return the gradient of each latent unit by each standardised input.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Rows with the columns of ``fit``.

        Returns
        -------
        ndarray of shape (n, units, d)
            ``[r, i, j]`` is dh_i / dx_j at row r.
        """
        inputs = self._inputs(X)
        return latent_attributions(self.net_, inputs, create_graph=False).cpu().numpy()

    def _check_parameters(self) -> None:
        if self.hidden is not None:
            if not isinstance(self.hidden, Sequence | ndarray) or len(self.hidden) == 0:
                raise ValueError(f"hidden must be a sequence of at least one width, got {self.hidden!r}")
            for width in self.hidden:
                integer("hidden", width, 1)
        for name, low in (("warmup_epochs", 0), ("max_epochs", 1), ("batch_size", 1), ("patience", 1)):
            integer(name, getattr(self, name), low)
        at_least("lr", self.lr, 0, strict=True)
        at_least("weight_decay", self.weight_decay, 0)
        within("dropout", self.dropout, 0, 1, open_high=True)
        within("validation_fraction", self.validation_fraction, 0, 1, open_low=True, open_high=True)
        TangosPenalty(self.lambda_spec, self.lambda_orth, self.n_pairs)  # checks these three

    def _validated(self, X: Any, **options: Any) -> Any:
        try:
            return validate_data(self, X, dtype=[np.float64, np.float32], **options)
        except ValueError as error:
            raise ValueError(f"{error}{_column_at_fault(X, str(error))}") from error

    def _rows(self, X: Any, y: Any, sample_weight: Any, **options: Any) -> tuple[ndarray, ndarray, ndarray]:
        """Return rows, targets and weights of mean 1, without the rows of weight 0."""
        X, y = self._validated(X, y=y, ensure_min_samples=2, **options)
        weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        kept = weight > 0
        if kept.sum() < 2:
            raise ValueError(f"sample_weight must be positive for at least 2 rows, got {kept.sum()}")
        return X[kept], y[kept], weight[kept] / weight[kept].mean()

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = self.scaler_.transform(self._validated(X, reset=False))
        return torch.as_tensor(X).to(next(self.net_.parameters()))

    def _outputs(self, X: Any) -> Tensor:
        inputs = self._inputs(X)
        with torch.no_grad():
            return self.head_(self.net_(inputs)).cpu()

    @torch.inference_mode(False)  # grad mode too
    def _train(self, X: ndarray, y: ndarray, weight: ndarray, n_out: int) -> None:
        """Train from scratch: on floats (n, k) by squared error, on class codes by cross-entropy."""
        n, d = X.shape
        regression = y.dtype.kind == "f"
        criterion = _squared_error if regression else _cross_entropy
        draw = check_random_state(self.random_state)
        held = min(n - 1, max(1, round(self.validation_fraction * n)))
        even = not regression and np.bincount(y).min() >= 2 and min(held, n - held) >= n_out
        train, val = train_test_split(
            np.arange(n), test_size=held, stratify=y if even else None, random_state=draw
        )
        seed = drawn_seed(draw)

        center = {"with_mean": self.standardize, "with_std": self.standardize}
        self.scaler_ = StandardScaler(**center).fit(X[train])
        if regression:
            self.target_scaler_ = StandardScaler(**center).fit(y[train])
            y = np.asarray(self.target_scaler_.transform(y))
        device = torch.device(self.device)
        dtype = torch.float32 if device.type == "mps" else torch.as_tensor(X[:0]).dtype
        inputs, weights = (
            torch.as_tensor(part).to(device, dtype) for part in (self.scaler_.transform(X), weight)
        )
        targets = torch.as_tensor(y).to(device, dtype if regression else torch.long)
        val_rows = torch.as_tensor(val, device=device)
        x_val, y_val, w_val = inputs[val_rows], targets[val_rows], weights[val_rows]

        shuffle = torch.Generator().manual_seed(seed)
        pairs = torch.Generator(device=device).manual_seed(seed + 1)  # order is the same for any lambda
        with seeded(seed, device):  # initial weights and dropout
            widths = [d, *(self.hidden if self.hidden is not None else (d + 1, d + 1))]
            net = nn.Sequential(*_hidden_layers(widths, self.dropout))
            head = nn.Linear(int(widths[-1]), n_out)
            both = nn.Sequential(net, head).to(device, dtype)
            optimizer = torch.optim.Adam(
                both.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True
            )
            history: dict[str, list[float]] = {
                "loss": [], "validation_loss": [], "specialization": [], "orthogonalization": []
            }  # fmt: skip
            best, epoch = Best(both, self.patience), 0
            for epoch in range(self.max_epochs):
                penalised = epoch >= self.warmup_epochs and (self.lambda_spec > 0 or self.lambda_orth > 0)
                both.train()
                sums = inputs.new_zeros(3)  # stays on the device until the epoch ends
                order = torch.as_tensor(train)[torch.randperm(len(train), generator=shuffle)].to(device)
                for rows in order.split(self.batch_size):
                    x = inputs[rows]
                    loss = (weights[rows] * criterion(both(x), targets[rows])).mean()
                    parts = [loss.detach(), *(2 * [loss.new_tensor(math.nan)])]
                    if penalised:
                        terms = tangos_terms(net, x, n_pairs=self.n_pairs, generator=pairs)
                        parts[1:] = [term.detach() for term in terms]
                        loss = loss + self.lambda_spec * terms[0] + self.lambda_orth * terms[1]
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    sums += len(rows) * torch.stack(parts)
                both.eval()
                with torch.no_grad():
                    validation = float((w_val * criterion(both(x_val), y_val)).sum() / w_val.sum())
                if not math.isfinite(validation):
                    raise ValueError(
                        f"the validation loss is {validation} in epoch {epoch}: lower lr={self.lr}"
                    )
                means = (sums / len(train)).tolist()
                for name, value in zip(history, (means[0], validation, *means[1:]), strict=True):
                    history[name].append(value)
                if best.stop(validation):
                    break
            best.restore()
        self.best_epoch_ = epoch - best.idle
        self.net_, self.head_, self.history_ = net, head, history
        self.n_iter_ = len(history["loss"])


class TangosRegressor(RegressorMixin, _Tangos):
    """Neural network for regression on a table, trained with the TANGOS regulariser.

    Parameters
    ----------
    hidden : sequence of int, optional
        Widths of the hidden ReLU layers, each at least 1; two of d + 1 where it is None.
    lambda_spec, lambda_orth : float, default=10.0 and 0.1
        Weights of specialisation and orthogonalisation, at least 0; with both 0 it is a plain network.
    n_pairs : int, optional
        Pairs of units drawn at each step, at least 1, default 50. None takes all.
    warmup_epochs : int, default=3
        Epochs without the regulariser, at least 0.
    max_epochs : int, default=200
        Epochs at most, at least 1.
    batch_size : int, default=32
        Rows a step, at least 1.
    lr, weight_decay : float, default=1e-3 and 0.0
        Of Adam: the first positive, the second at least 0 and added to the gradient.
    dropout : float, default=0.0
        Share of units dropped after each hidden layer, in [0, 1).
    validation_fraction : float, default=0.2
        Share of rows that decide when to stop, in (0, 1); at least one row.
    patience : int, default=30
        Epochs without a better validation loss after which to stop, at least 1.
    standardize : bool, default=True
        Whether inputs and targets are standardised, by the training part's statistics.
    device : str, default="cpu"
        Where to train, as torch names it.
    random_state : int, RandomState or None, default=None
        Decides split, initial weights, batches, dropout and pairs.

    Attributes
    ----------
    net_, head_ : nn.Sequential, nn.Linear
        Inputs to latent units, and latent units to outputs.
    scaler_, target_scaler_ : StandardScaler
    n_iter_, best_epoch_ : int
        Epochs trained; the one, from 0, whose weights are kept: that of the lowest
        validation loss without the regulariser.
    history_ : dict of lists
        For each epoch ``loss``, ``validation_loss``, and of the steps with the regulariser
        ``specialization`` and ``orthogonalization`` (NaN for others).
    n_features_in_ : int
    feature_names_in_ : ndarray

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range, the data are not numbers, or the loss
        stops being finite.

    Notes
    -----
    1. Rows are weighted in both losses, not in the regulariser; rows of weight 0 are as
       if they were not there.
    2. Categories are the pipeline's matter, as in the second example.

    References
    ----------
    .. [1] Jeffares et al. TANGOS: Regularizing Tabular Neural Networks through Gradient
       Orthogonalization and Specialization. ICLR 2023.

    Examples
    --------
    >>> from sklearn.datasets import make_regression
    >>> from posterity.tabular import TangosRegressor
    >>> X, y = make_regression(120, 5, random_state=0)
    >>> model = TangosRegressor(lambda_spec=1.0, lr=1e-2, max_epochs=50, random_state=0).fit(X, y)
    >>> model.score(X, y) > 0.9
    True
    >>> model.attributions(X).shape
    (120, 6, 5)

    >>> from sklearn.compose import make_column_transformer
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import OneHotEncoder
    >>> encode = make_column_transformer(
    ...     (OneHotEncoder(sparse_output=False), ["city"]), remainder="passthrough"
    ... )
    >>> model = make_pipeline(encode, TangosRegressor())
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "TangosRegressor":
        """Train the network.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Numbers; float32 stays float32.
        y : array of shape (n,) or (n, k)
            Targets.
        sample_weight : array of shape (n,), optional
            Weights, none negative.

        Returns
        -------
        TangosRegressor
            The fitted estimator.
        """
        self._check_parameters()
        X, y, weight = self._rows(X, y, sample_weight, multi_output=True, y_numeric=True)
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1).astype(X.dtype)
        self._train(X, y, weight, y.shape[1])
        return self

    def predict(self, X: Any) -> ndarray:
        """Return predicted targets, of shape (n,) or (n, k) as ``y`` was."""
        outputs = self._outputs(X).numpy()
        outputs = self.target_scaler_.inverse_transform(outputs)
        return outputs[:, 0] if self._flat else outputs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class TangosClassifier(ClassifierMixin, _Tangos):
    """Neural network for classification of a table's rows, trained with the TANGOS regulariser.

    Parameters
    ----------
    hidden : sequence of int, optional
        Widths of the hidden ReLU layers, each at least 1; two of d + 1 where it is None.
    lambda_spec, lambda_orth : float, default=10.0 and 0.1
        Weights of specialisation and orthogonalisation, at least 0; with both 0 it is a plain network.
    n_pairs : int, optional
        Pairs of units drawn at each step, at least 1, default 50. None takes all.
    warmup_epochs, max_epochs : int, default=3 and 200
        Epochs without the regulariser, at least 0, and epochs at most, at least 1.
    batch_size : int, default=32
        Rows a step, at least 1.
    lr, weight_decay, dropout : float, default=1e-3, 0.0 and 0.0
        As for `TangosRegressor`.
    validation_fraction : float, default=0.2
        Share of rows that decide when to stop, in (0, 1); of each class alike where every
        class has two rows.
    patience : int, default=30
        Epochs without a better validation loss after which to stop, at least 1.
    standardize : bool, default=True
        Whether inputs are standardised, by the training part's statistics.
    device, random_state : str, int
        As for `TangosRegressor`.

    Attributes
    ----------
    classes_ : ndarray of shape (K,)
    net_, head_, scaler_, n_iter_, best_epoch_, history_, n_features_in_, feature_names_in_
        As for `TangosRegressor`.

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range, the data are not numbers, ``y`` has one
        class only, or the loss stops being finite.

    References
    ----------
    .. [1] Jeffares et al. TANGOS. ICLR 2023.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from posterity.tabular import TangosClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = TangosClassifier(lambda_spec=1.0, lr=1e-2, max_epochs=20, random_state=0).fit(X, y)
    >>> model.predict_proba(X).shape, model.score(X, y) > 0.9
    ((178, 3), True)
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "TangosClassifier":
        """Train the network.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Numbers; float32 stays float32.
        y : array of shape (n,)
            Labels of at least 2 classes.
        sample_weight : array of shape (n,), optional
            Weights, none negative.

        Returns
        -------
        TangosClassifier
            The fitted estimator.
        """
        self._check_parameters()
        X, y, weight = self._rows(X, y, sample_weight)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got only {self.classes_[0]!r}")
        self._train(X, codes, weight, len(self.classes_))
        return self

    def predict(self, X: Any) -> ndarray:
        """Return the most probable label of each row, shape (n,)."""
        best = self._outputs(X).argmax(1).numpy()
        return self.classes_[best]

    def predict_proba(self, X: Any) -> ndarray:
        """Return the probability of each class, shape (n, K), in the order of ``classes_``."""
        return self._outputs(X).softmax(1).numpy()


def _hidden_layers(widths: Sequence[int], dropout: float) -> Iterator[nn.Module]:
    for below, above in zip(widths[:-1], widths[1:], strict=True):
        yield nn.Linear(int(below), int(above))
        yield nn.ReLU()
        if dropout:
            yield nn.Dropout(dropout)


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def _column_at_fault(X: Any, error: str) -> str:
    """Return a sentence about the first column that is no numbers or not finite, or nothing."""
    encode = "one-hot encode categories first, as in make_pipeline(make_column_transformer(...), model)"
    for name in getattr(X, "columns", ()):
        try:
            column = np.asarray(X[name], dtype=float)
        except (TypeError, ValueError):
            return f"; column {name!r} of X is not numeric: {encode}"
        if not np.isfinite(column).all():
            return f"; column {name!r} of X has NaN or infinity: impute or drop it"
    return f"; {encode}" if "could not convert string" in error else ""
