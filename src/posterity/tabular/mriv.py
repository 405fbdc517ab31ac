"""MRIV: individual treatment effects from a binary instrument, robust to a bad nuisance model.

Who takes the treatment A is confounded by things unseen; a nudge Z (a lottery, an invitation)
moves some people into it. With pi(x) = P(Z = 1 | x), mu_zY(x) = E[Y | Z = z, x],
mu_zA(x) = E[A | Z = z, x] and the compliance delta = mu_1A - mu_0A, the effect is

    tau(x) = (mu_1Y - mu_0Y) / delta.                                          (1)

Any first estimate tau_0 of it gives a pseudo-outcome, whose regression on X is the next:

    Y_MR = (2Z - 1) / (delta P(Z | x)) (Y - A tau_0 - mu_0Y + mu_0A tau_0) + tau_0.   (2)

Its mean is tau(x) if any one of these is right: (pi, delta); (pi, tau_0); (mu_0Y, mu_0A, tau_0).
For with g_z = mu_zY - mu_zA tau_0 the difference g_1 - g_0 is delta (tau - tau_0), which (2)
weighs by 1 / delta and adds to tau_0; and where tau_0 is right there is nothing to add.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from sklearn.base import BaseEstimator
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from posterity._checks import finite, has_shape, one_of, within
from posterity._precision import widened

__all__ = ["mr_pseudo_outcome"]

Vector = Shaped[Tensor, " n"] | Shaped[ndarray, " n"]


def mr_pseudo_outcome(
    y: Vector, a: Vector, z: Vector, *, propensity: Vector, mu_y0: Vector, mu_a0: Vector, delta_a: Vector,
    tau: Vector,
) -> Float[Tensor, " n"] | Float[ndarray, " n"]:  # fmt: skip
    """Return the multiply robust pseudo-outcome of each row, equation 2.

    Regress it on the covariates by any method: the fit estimates the effect.

    Parameters
    ----------
    y, a, z : array or Tensor of shape (n,)
        Outcome; treatment and instrument of 0 and 1.
    propensity : array or Tensor of shape (n,)
        P(Z = 1 | x), between 0 and 1; clip it before.
    mu_y0, mu_a0 : array or Tensor of shape (n,)
        E[Y | Z = 0, x] and E[A | Z = 0, x].
    delta_a : array or Tensor of shape (n,)
        Compliance E[A | Z = 1, x] - E[A | Z = 0, x], not 0.
    tau : array or Tensor of shape (n,)
        A first estimate of the effect.

    Returns
    -------
    ndarray or Tensor of shape (n,)
        As what came: of tensors, with gradients to all of them.

    Raises
    ------
    ValueError
        If shapes differ, tensors and arrays are mixed, or a value is out of range (of tensors,
        read on the CPU only).

    References
    ----------
    .. [1] Frauen, Feuerriegel. Estimating individual treatment effects under unobserved
       confounding using binary instruments. ICLR 2023. Equation 5 and Theorem 1.

    Examples
    --------
    A lottery (propensity 1/2) that half of those drawn follow; the first estimate is 0:

    >>> import numpy as np
    >>> from posterity.tabular import mr_pseudo_outcome
    >>> half, none = np.full(2, 0.5), np.zeros(2)
    >>> y, a, z = np.array([3.0, 1.0]), np.array([1, 0]), np.array([1, 0])
    >>> mr_pseudo_outcome(
    ...     y, a, z, propensity=half, mu_y0=none, mu_a0=none, delta_a=half, tau=none
    ... )
    array([12., -4.])
    """
    given: dict[str, Any] = {
        "y": y, "a": a, "z": z, "propensity": propensity, "mu_y0": mu_y0, "mu_a0": mu_a0, "delta_a": delta_a, "tau": tau,
    }  # fmt: skip
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    if len(tensors) == len(given):
        return _pseudo_outcome(**given)
    if tensors:
        raise ValueError(f"y and all others must be tensors, or all arrays, got tensors only for {tensors}")
    arrays = {name: _numbers(name, value) for name, value in given.items()}
    floats = [each.dtype for each in arrays.values() if each.dtype.kind == "f"]
    wide = {name: torch.tensor(each, dtype=torch.float64) for name, each in arrays.items()}
    return _pseudo_outcome(**wide).numpy().astype(np.result_type(*floats) if floats else np.float64)


@widened
def _pseudo_outcome(**given: Tensor) -> Tensor:
    (n,) = has_shape("y", given["y"], (None,)).shape
    dtype = reduce(torch.promote_types, [value.dtype for value in given.values()])
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    y, a, z, pi, mu_y0, mu_a0, delta, tau = (
        has_shape(name, value, (n,), "y").to(dtype) for name, value in given.items()
    )
    if y.device.type == "cpu":
        for name, value in given.items():
            finite(name, value)
        for name, value in (("a", a), ("z", z)):
            if not ((value == 0) | (value == 1)).all():
                raise ValueError(f"{name} must be 0 or 1, got values from {value.min():g} to {value.max():g}")
        if not ((pi > 0) & (pi < 1)).all():
            raise ValueError(
                f"propensity must be in (0, 1), got values from {pi.min():g} to {pi.max():g}: clip it"
            )
        if (delta == 0).any():
            raise ValueError(f"delta_a must not be 0, row {int((delta == 0).nonzero()[0])} is")
    observed = z * pi + (1 - z) * (1 - pi)  # P(Z | x)
    return (2 * z - 1) / (delta * observed) * (y - a * tau - mu_y0 + mu_a0 * tau) + tau


def _numbers(name: str, value: Any) -> ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got dtype {array.dtype}")
    return array


class _MultiplyRobust(BaseEstimator):
    """What both estimators share: checks, folds, the pseudo-outcome and the second stage.

    A subclass learns the nuisances on rows (`_learn`), evaluates those of each group
    (`_instrument_side`, `_outcome_side`), and regresses the pseudo-outcome (`_regress`).
    """

    n_folds: int
    clip_propensity: float
    min_compliance: float
    random_state: Any
    __metadata_request__fit = {"treatment": True, "instrument": True}  # noqa: RUF012

    @torch.inference_mode(False)  # grad mode too
    def fit(self, X: Any, y: Any, treatment: Any = None, instrument: Any = None) -> Any:
        """Learn the nuisances, the first estimate and the effect.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Covariates that were there before the nudge: numbers, none missing.
        y : array of shape (n,)
            Outcomes.
        treatment, instrument : array of shape (n,)
            Who took the treatment and whom the nudge reached: 0 and 1, or bool.

        Returns
        -------
        Self
            The fitted estimator.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=4)
        a = _binary("treatment", treatment, len(y))
        z = _binary("instrument", instrument, len(y))
        self._check_design(X, a, z)
        self.scaler_ = StandardScaler().fit(X)
        self.outcome_scaler_: Any = StandardScaler().fit(y[:, None])
        y = self.outcome_scaler_.transform(y[:, None])[:, 0]
        draw = check_random_state(self.random_state)
        parts = [np.arange(len(y))]
        if self.n_folds > 1:  # each arm in each fold
            folds = StratifiedKFold(self.n_folds, shuffle=True, random_state=draw)
            parts = [rows for _, rows in folds.split(X, 2 * z + a)]
        self._learned = [self._learn(X[rows], y[rows], a[rows], z[rows], draw) for rows in parts]
        pseudo, pi, delta = np.empty((3, len(y)))
        clipped = np.zeros(len(y), dtype=bool)
        self.final_ = []
        for k, rows in enumerate(parts):
            # no row meets a model that saw it, and the two groups of models saw different rows
            mu_y0, mu_a0, tau = self._outcome_side(self._learned[(k + 1) % len(parts)], X[rows])
            raw_pi, raw_delta = self._instrument_side(self._learned[(k + 2) % len(parts)], X[rows])
            pi[rows] = np.clip(raw_pi, self.clip_propensity, 1 - self.clip_propensity)
            delta[rows] = _lifted(raw_delta, self.min_compliance)
            clipped[rows] = (pi[rows] != raw_pi) | (delta[rows] != raw_delta)
            pseudo[rows] = mr_pseudo_outcome(
                y[rows], a[rows], z[rows], propensity=pi[rows], mu_y0=mu_y0, mu_a0=mu_a0, delta_a=delta[rows], tau=tau
            )  # fmt: skip
            self.final_.append(self._regress(X[rows], pseudo[rows], draw))
        self.pseudo_outcome_ = self.outcome_scaler_.scale_[0] * pseudo
        self.propensity_, self.compliance_, self.n_clipped_ = pi, delta, int(clipped.sum())
        return self

    def predict(self, X: Any) -> ndarray:
        """Return the effect E[Y(1) - Y(0) | X] of each row.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Rows with the columns of ``fit``.

        Returns
        -------
        ndarray of shape (n,)
            In units of ``y``.
        """
        X = self._rows(X)
        return self._in_units([self._evaluate(model, X) for model in self.final_])

    def plug_in(self, X: Any) -> ndarray:
        """Return the first estimate of the effect, for comparison.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Rows with the columns of ``fit``.

        Returns
        -------
        ndarray of shape (n,)
            In units of ``y``; of three folds, the mean.
        """
        X = self._rows(X)
        return self._in_units([self._outcome_side(learned, X)[2] for learned in self._learned])

    def _rows(self, X: Any) -> ndarray:
        check_is_fitted(self)
        return np.asarray(validate_data(self, X, reset=False, dtype=np.float64))

    def _in_units(self, effects: Sequence[ndarray]) -> ndarray:
        return self.outcome_scaler_.scale_[0] * np.mean(effects, axis=0)

    def _check_parameters(self) -> None:
        one_of("n_folds", self.n_folds, (1, 3))
        within("clip_propensity", self.clip_propensity, 0, 0.5)
        within("min_compliance", self.min_compliance, 0, 1, open_low=True)

    def _check_design(self, X: ndarray, a: ndarray, z: ndarray) -> None:
        """Refuse arms of too few rows, and an instrument that hardly moves the treatment."""
        least, counts = 2 * self.n_folds, np.bincount(2 * z + a, minlength=4)
        for cell, count in enumerate(counts):
            if 0 < count < least:
                raise ValueError(
                    f"instrument {cell // 2} with treatment {cell % 2} must have no row, or 2 rows a fold, "
                    f"got {count} for n_folds={self.n_folds}"
                )
        compliance = _first_stage(X, a, z)[1]
        if abs(compliance) < self.min_compliance:
            raise ValueError(
                f"instrument must move the treatment of at least a share {self.min_compliance} (min_compliance), "
                f"got a mean compliance of {compliance:.3g}"
            )

    def _learn(self, X: ndarray, y: ndarray, a: ndarray, z: ndarray, draw: Any) -> Any:
        raise NotImplementedError

    def _instrument_side(self, learned: Any, X: ndarray) -> tuple[ndarray, ndarray]:
        """Return propensity and compliance."""
        raise NotImplementedError

    def _outcome_side(self, learned: Any, X: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Return mean outcome and treatment without the nudge, and the first estimate."""
        raise NotImplementedError

    def _regress(self, X: ndarray, pseudo: ndarray, draw: Any) -> Any:
        raise NotImplementedError

    def _evaluate(self, model: Any, X: ndarray) -> ndarray:
        raise NotImplementedError


def _lifted(delta: ndarray, least: float) -> ndarray:
    """Return compliances of at least a size, their signs kept; 0 takes +."""
    return np.where(delta < 0, -1.0, 1.0) * np.maximum(np.abs(delta), least)


def _first_stage(X: ndarray, a: ndarray, z: ndarray) -> tuple[ndarray, float]:
    """Return the fit of A by least squares on (1, X, Z), and the coefficient of Z."""
    design = np.column_stack([StandardScaler().fit_transform(X), z, np.ones(len(z))])
    weights = np.linalg.lstsq(design, a.astype(float), rcond=None)[0]
    return design @ weights, float(weights[-2])


def _binary(name: str, value: Any, n: int) -> ndarray:
    """Return 0 and 1 of both kinds, as integers."""
    if value is None:
        raise ValueError(f"{name} must be given, an array of {n} values of 0 and 1, got None")
    column = np.asarray(value)
    if column.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},) for X, got {column.shape}")
    try:
        column = column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be 0 or 1, got dtype {column.dtype}") from error
    wrong = np.flatnonzero((column != 0) & (column != 1))
    if len(wrong):
        raise ValueError(f"{name} must be 0 or 1, got {column[wrong[0]]:g} in row {wrong[0]}")
    if column.min() == column.max():
        raise ValueError(f"{name} must take both values, got only {column[0]:g}: it never changes")
    return column.astype(np.int64)
