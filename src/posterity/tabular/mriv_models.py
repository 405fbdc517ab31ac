"""MRIV from models of scikit-learn: the nuisances, a first estimate and the second stage."""

from typing import Any

import numpy as np
from numpy import ndarray
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler
from sklearn.utils.validation import check_is_fitted

from posterity._checks import one_of
from posterity.tabular.mriv import _first_stage, _lifted, _MultiplyRobust

__all__ = ["MRIV"]

# leaves of at least 50 rows: compliance is divided by, and smaller leaves find small ones in noise
BOOSTING = {"learning_rate": 0.05, "max_leaf_nodes": 8, "max_iter": 100, "min_samples_leaf": 50}


class MRIV(_MultiplyRobust):
    """Multiply robust effects with a binary instrument, from any scikit-learn models.

    It identifies the effect where, given X, the instrument is as good as random
    (independence), acts on the outcome through the treatment alone (exclusion), moves the
    treatment everywhere (relevance), and nothing unseen changes both how people comply and
    how the treatment works on them.

    Parameters
    ----------
    initial : {"2sls", "wald"} or estimator, default="2sls"
        The first estimate: one effect for all, by two-stage least squares; the ratio of
        equation 1 of the nuisance models; or any estimator with this ``fit`` and ``predict``.
    outcome : regressor, optional
        For E[Y | Z, X]; by default gradient boosting of 100 rounds.
    treatment_model, instrument_model : classifier, optional
        With ``predict_proba``, for E[A | Z, X] and P(Z | X); by default the same.
    final : regressor, optional
        Regresses the pseudo-outcome on X; by default ridge regression on cubic splines of
        each column.
    n_folds : {1, 3}, default=3
        With 3, a row meets only models that saw other rows, and the two groups of nuisances
        are learned on different rows, as the theory wants. With 1, all see all.
    clip_propensity : float, default=0.01
        P(Z = 1 | X) is kept this far from 0 and 1, in [0, 0.5].
    min_compliance : float, default=0.05
        Smaller compliances are lifted to it and keep their sign, in (0, 1]; a mean
        compliance below it is refused.
    random_state : int, RandomState or None, default=None
        Decides folds and models.

    Attributes
    ----------
    pseudo_outcome_ : ndarray of shape (n,)
        Of the rows of ``fit``, in units of ``y``.
    propensity_, compliance_ : ndarray of shape (n,)
        P(Z = 1 | X) and delta as used, clipped and lifted.
    n_clipped_ : int
        Rows of which one of these was.
    nuisance_, final_ : list
        One a fold: a dict of fitted models, of ``y`` standardised; the second stage.
    n_features_in_ : int
    feature_names_in_ : ndarray

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range, values are missing, treatment or instrument
        are not two values 0 and 1, an arm has one row, or the instrument is weak.

    Notes
    -----
    1. The official cross-fitting leaves learners out by their error against the true effect,
       which nobody has; here all are averaged.
    2. Nothing is clipped in the official code.
    3. An arm may be empty: where none can have the treatment without the nudge, mu_0A is 0.

    References
    ----------
    .. [1] Frauen, Feuerriegel. Estimating individual treatment effects under unobserved
       confounding using binary instruments. ICLR 2023. Sections 4 and 5.

    Examples
    --------
    Half of those who are drawn take it up; the effect is x:

    >>> import numpy as np
    >>> from posterity.tabular import MRIV
    >>> rng = np.random.default_rng(0)
    >>> X, hidden = rng.normal(size=(1_500, 1)), rng.normal(size=1_500)
    >>> drawn = rng.integers(0, 2, 1_500)
    >>> taken = (drawn + hidden > 0.5).astype(int)
    >>> y = X[:, 0] * taken + hidden
    >>> model = MRIV(random_state=0).fit(X, y, treatment=taken, instrument=drawn)
    >>> bool(np.ptp(model.plug_in(X)))  # one effect for all
    False
    >>> bool(model.predict([[-1.0]]) < -0.3 < 0.3 < model.predict([[1.0]]))
    True
    """

    def __init__(
        self, initial: Any = "2sls", *, outcome: Any = None, treatment_model: Any = None, instrument_model: Any = None,
        final: Any = None, n_folds: int = 3, clip_propensity: float = 0.01, min_compliance: float = 0.05,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.initial = initial
        self.outcome = outcome
        self.treatment_model = treatment_model
        self.instrument_model = instrument_model
        self.final = final
        self.n_folds = n_folds
        self.clip_propensity = clip_propensity
        self.min_compliance = min_compliance
        self.random_state = random_state

    @property
    def nuisance_(self) -> list[dict[str, Any]]:
        """The fitted models of each fold."""
        check_is_fitted(self)
        return self._learned

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if isinstance(self.initial, str):
            one_of("initial", self.initial, ("2sls", "wald"))
        wanted = {
            "initial": ("fit", "predict"), "outcome": ("fit", "predict"), "final": ("fit", "predict"),
            "treatment_model": ("fit", "predict_proba"), "instrument_model": ("fit", "predict_proba"),
        }  # fmt: skip
        for name, methods in wanted.items():
            value = getattr(self, name)
            for method in methods:
                if value is not None and not isinstance(value, str) and not hasattr(value, method):
                    raise ValueError(f"{name} must have the method {method}, got {value!r}")

    def _learn(self, X: ndarray, y: ndarray, a: ndarray, z: ndarray, draw: Any) -> dict[str, Any]:
        def classify(model: Any, rows: ndarray, labels: ndarray) -> Any:
            one_kind = labels[rows].min() == labels[rows].max()  # an empty arm
            model = DummyClassifier() if one_kind else _made(model, HistGradientBoostingClassifier, draw)
            return model.fit(X[rows], labels[rows])

        learned: dict[str, Any] = {"instrument": classify(self.instrument_model, z >= 0, z)}
        for arm in (0, 1):
            rows = z == arm
            learned[f"treatment {arm}"] = classify(self.treatment_model, rows, a)
            if arm == 0 or self.initial == "wald":
                model = _made(self.outcome, HistGradientBoostingRegressor, draw)
                learned[f"outcome {arm}"] = model.fit(X[rows], y[rows])
        if self.initial == "2sls":
            learned["initial"] = _two_stage(X, y, a, z)
        elif self.initial != "wald":
            learned["initial"] = _made(self.initial, None, draw).fit(X, y, treatment=a, instrument=z)
        return learned

    def _instrument_side(self, learned: dict[str, Any], X: ndarray) -> tuple[ndarray, ndarray]:
        taken = [_probability(learned[f"treatment {arm}"], X) for arm in (0, 1)]
        return _probability(learned["instrument"], X), taken[1] - taken[0]

    def _outcome_side(self, learned: dict[str, Any], X: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        mu_y0, mu_a0 = learned["outcome 0"].predict(X), _probability(learned["treatment 0"], X)
        if self.initial == "2sls":
            tau = np.full(len(X), learned["initial"])
        elif self.initial == "wald":
            delta = _probability(learned["treatment 1"], X) - mu_a0
            tau = (learned["outcome 1"].predict(X) - mu_y0) / _lifted(delta, self.min_compliance)
        else:
            tau = np.asarray(learned["initial"].predict(X), dtype=np.float64)
        return mu_y0, mu_a0, tau

    def _regress(self, X: ndarray, pseudo: ndarray, draw: Any) -> Any:
        return _made(self.final, _splines, draw).fit(X, pseudo)

    def _evaluate(self, model: Any, X: ndarray) -> ndarray:
        return model.predict(X)


def _splines() -> Any:
    return make_pipeline(StandardScaler(), SplineTransformer(6), RidgeCV(np.logspace(-3, 3, 13)))


def _made(model: Any, default: Any, draw: Any) -> Any:
    """Return a fresh copy of a model, or the default, whose own draws are this one's."""
    if model is None:
        model = default(**BOOSTING) if default is not _splines else default()
    model = clone(model)
    open_ = [
        name for name, value in model.get_params().items() if name.endswith("random_state") and value is None
    ]
    return model.set_params(**{name: int(draw.randint(2**31 - 1)) for name in open_})


def _probability(model: Any, X: ndarray) -> ndarray:
    """Return the probability of 1, which a model that never saw it does not list."""
    classes = list(model.classes_)
    return model.predict_proba(X)[:, classes.index(1)] if 1 in classes else np.zeros(len(X))


def _two_stage(X: ndarray, y: ndarray, a: ndarray, z: ndarray) -> float:
    """Return the coefficient of the fitted A in the regression of Y on (1, X, fitted A)."""
    fitted, _ = _first_stage(X, a, z)
    design = np.column_stack([StandardScaler().fit_transform(X), np.ones(len(z)), fitted])
    return float(np.linalg.lstsq(design, y, rcond=None)[0][-1])
