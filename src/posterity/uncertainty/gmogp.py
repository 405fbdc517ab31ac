"""GMOGP: a Gaussian process an output, whose prior is mixed from shared latent processes by attention.

Each of s outputs has a latent process z_j ~ GP(m_j, k_j), k_j squared exponential. Output i is

    y_i = z_i + sum_{j != i} a_ij z_j + noise_i,                                    (1)

so its mean is sum_j a_ij m_j and its kernel sum_j a_ij^2 k_j, with a_ii = 1: the components
are shared by all outputs, the weights are its own. The parents' weights are attention,

    a_ij = exp(e_ij) / (1 + sum_{l != i} exp(e_il)),  e_i = LeakyReLU(F F' W_i + B_i)_i,   (2)

where row j of F is output j's observations at unit length; the 1 lets an output have no
parents. Everything is learned at once by the sum of the s separate evidences, which costs s
factorisations of size n in place of one of size s n. What is shared is the prior: output i
is predicted from its own observations alone, under a kernel that the others helped to find.
"""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from posterity._checks import at_least, integer, one_of
from posterity._random import drawn_seed
from posterity.uncertainty.mixed_kernels import (
    _bases,
    _cholesky,
    _constrain,
    _evidence,
    _mixed,
    _Prior,
    _squared_distances,
    _start,
    _variance,
)
from posterity.uncertainty.output_attention import _gram
from posterity.uncertainty.sinh_arcsinh import _moments, _unwarp

__all__ = ["GMOGPRegressor"]

LARGE = 20_000  # rows above which a warning says how much memory the covariances take
ROWS = 1_024  # rows predicted at once


class GMOGPRegressor(RegressorMixin, MultiOutputMixin, BaseEstimator):
    """Gaussian processes for several outputs whose kernels mix shared components by attention.

    Each output is conditioned on its own observations only: this is what makes s outputs
    cost s times one output, and what they cannot do for each other. Where an output was not
    observed but a correlated one was, a coregional model knows more.

    Parameters
    ----------
    n_iter : int, default=150
        Steps of Adam, at least 1.
    lr : float, default=0.08
        Its rate, positive; times 0.9 after every 100 steps.
    weight_decay : float, default=5e-4
        At least 0.
    ard : bool, default=False
        Whether each latent process has a lengthscale for each input.
    output_transform : {None, "sal"}, default=None
        ``"sal"`` learns a monotone map of each output under which it is Gaussian, a
        composition of ``d sinh(b arcsinh(y) - a) + c``.
    n_flows : int, default=2
        Maps in that composition, at least 1.
    output_weights : array of shape (s,), optional
        Weights of the evidences, positive; each choice leads to another Pareto optimum.
    normalize_y : bool, default=True
        Whether each output is centred and divided by its standard deviation.
    device : str, default="cpu"
        Where to compute; in float64.
    random_state : int, RandomState or None, default=None
        Draws the start of the attention.

    Attributes
    ----------
    attention_ : ndarray of shape (s, s)
        Row i: the weights of the latent processes in output i.
    lengthscale_ : ndarray of shape (s,), or (s, d) with ``ard``
    outputscale_, mean_, noise_ : ndarray of shape (s,)
        Variance and mean of each latent process, variance of each output's noise.
    y_mean_, y_scale_ : ndarray of shape (s,)
        What ``normalize_y`` took away; all else is in the units that it leaves.
    weight_, bias_ : ndarray of shape (s, s, s)
        W and B, from which `attention_coefficients` makes ``attention_``.
    flows_ : ndarray of shape (n_flows, 4, s) or None
        a, b, c and d of each map.
    loss_curve_ : ndarray of shape (n_iter,)
        Minus the mean weighted evidence of a row and output, before each step.
    log_marginal_likelihood_ : ndarray of shape (s,)
        Evidence of each output.
    X_train_ : ndarray of shape (n, d)
    alpha_ : ndarray of shape (s, n)
        Inverse covariance times residual, 0 where nothing was observed.
    L_ : ndarray of shape (s, n, n)
        Cholesky factors.
    n_features_in_ : int
    feature_names_in_ : ndarray

    Raises
    ------
    ValueError
        At ``fit``, if a parameter is out of range, an output has fewer than 2 observations,
        data are infinite, or a covariance stops being positive definite.

    Notes
    -----
    1. The transform is an exact warped Gaussian process, its predictions integrated by 32
       Gauss-Hermite points; the paper has flows inside a variational bound.
    2. Outputs may be missing row by row; the official code has no missing values.
    3. Observations are centred before the attention compares them (``normalize_y``).
    4. The evidences are computed in one batch; distributed execution is not included.

    References
    ----------
    .. [1] Dai, Yan, Yin. Graphical Multioutput Gaussian Process with Attention. ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.uncertainty import GMOGPRegressor
    >>> X = np.linspace(0, 3, 40)[:, None]
    >>> Y = np.hstack([np.sin(3 * X), np.cos(3 * X), np.sin(3 * X) + X])
    >>> Y[10:15, 2] = np.nan  # not observed
    >>> model = GMOGPRegressor(random_state=0).fit(X, Y)
    >>> mean, std = model.predict(X[10:15], return_std=True)
    >>> bool((abs(mean[:, 2] - np.sin(3 * X[10:15, 0]) - X[10:15, 0]) < 0.1).all())
    True
    """

    def __init__(
        self, *, n_iter: int = 150, lr: float = 0.08, weight_decay: float = 5e-4, ard: bool = False,
        output_transform: Literal[None, "sal"] = None, n_flows: int = 2, output_weights: Any = None,
        normalize_y: bool = True, device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.n_iter = n_iter
        self.lr = lr
        self.weight_decay = weight_decay
        self.ard = ard
        self.output_transform = output_transform
        self.n_flows = n_flows
        self.output_weights = output_weights
        self.normalize_y = normalize_y
        self.device = device
        self.random_state = random_state

    @torch.inference_mode(False)  # grad mode too
    def fit(self, X: Any, Y: Any) -> "GMOGPRegressor":
        """Learn kernels, noise and attention.

        Parameters
        ----------
        X : array of shape (n, d)
            Inputs, used as they are.
        Y : array of shape (n,) or (n, s)
            Outputs; NaN is not observed.

        Returns
        -------
        GMOGPRegressor
            The fitted estimator.
        """
        integer("n_iter", self.n_iter, 1)
        at_least("lr", self.lr, 0, strict=True)
        at_least("weight_decay", self.weight_decay, 0)
        one_of("output_transform", self.output_transform, (None, "sal"))
        integer("n_flows", self.n_flows, 1)
        names = getattr(Y, "columns", None)
        x_options = {"dtype": np.float64, "ensure_min_samples": 2}
        X, Y = validate_data(self, X, Y, validate_separately=(x_options, _Y_OPTIONS))
        check_consistent_length(X, Y)
        self._flat = Y.ndim == 1
        Y = Y.reshape(len(X), -1)
        (n, d), s = X.shape, Y.shape[1]
        seen = ~np.isnan(Y)
        for i, count in enumerate(seen.sum(0)):
            if count < 2:
                name = i if names is None else repr(names[i])
                raise ValueError(f"Y must have at least 2 observed rows an output, got {count} for {name}")
        weights = self._weights(s)
        if n > LARGE:
            warnings.warn(
                f"{n} rows need {4 * 8 * s * n**2 / 2**30:.0f} GiB for the covariances of {s} outputs"
            )

        self.y_mean_, self.y_scale_ = np.zeros(s), np.ones(s)
        if self.normalize_y:
            self.y_mean_, std = np.nanmean(Y, axis=0), np.nanstd(Y, axis=0)
            self.y_scale_ = np.where(std > 10 * np.finfo(float).eps * np.abs(self.y_mean_), std, 1.0)
        x, (y, mask) = self._tensor(X), self._outputs(Y)
        gram, squared = _gram(y.T), None if self.ard else _squared_distances(x, x)
        seed = drawn_seed(self.random_state)
        raw = _start(s, d if self.ard else None, self.n_flows if self.output_transform else 0, seed, x)
        optimizer = torch.optim.Adam(list(raw.values()), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.9)
        losses = []
        for _ in range(self.n_iter):
            optimizer.zero_grad()
            evidence, _, _ = _evidence(_constrain(raw, gram), x, y, mask, squared)
            loss = -(weights * evidence).sum() / (n * s)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())

        with torch.no_grad():
            prior = _constrain(raw, gram)
            found = _evidence(prior, x, y, mask, squared)
        self.loss_curve_ = torch.stack(losses).cpu().numpy()
        self.log_marginal_likelihood_, self.L_, self.alpha_ = (part.cpu().numpy() for part in found)
        for name, value in prior._asdict().items():
            setattr(self, f"{name}_", None if value is None else value.detach().cpu().numpy())
        self.weight_, self.bias_ = (raw[name].detach().cpu().numpy() for name in ("weight", "bias"))
        self.X_train_, self._mask = X, seen.T
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the mean, and the standard deviation, of new observations.

        Parameters
        ----------
        X : array of shape (m, d)
            Inputs.
        return_std : bool, default=False
            Whether to return the standard deviation too, noise included.

        Returns
        -------
        ndarray or tuple of two
            Of shape (m, s), or (m,) if ``Y`` had one axis.
        """
        check_is_fitted(self)
        x = self._tensor(validate_data(self, X, reset=False, dtype=np.float64))
        prior, spread = self._prior(), return_std or self.output_transform is not None
        means, variances = [], []
        for rows in x.split(ROWS):
            mean, cross = self._posterior(prior, rows)
            means.append(mean)
            if spread:
                reduced = torch.linalg.solve_triangular(self._tensor(self.L_), cross, upper=False)
                known = reduced.square().sum(1)
                variances.append((_variance(prior)[:, None] - known).clamp_min(0) + prior.noise[:, None])
        mean = torch.cat(means, 1)
        std = torch.cat(variances, 1).sqrt() if spread else None
        if prior.flows is not None:
            mean, std = _moments(prior.flows, mean, std)
        mean = mean.cpu().numpy().T * self.y_scale_ + self.y_mean_
        mean = mean[:, 0] if self._flat else mean
        if not return_std:
            return mean
        assert std is not None
        std = std.cpu().numpy().T * self.y_scale_
        return mean, std[:, 0] if self._flat else std

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = None) -> ndarray:
        """Draw new observations, jointly over the inputs; outputs are independent given the data.

        Parameters
        ----------
        X : array of shape (m, d)
            Inputs.
        n_samples : int, default=1
            Draws, at least 1.
        random_state : int, RandomState or None, default=None
            Source of the draws.

        Returns
        -------
        ndarray
            Of shape (m, s, n_samples), or (m, n_samples) if ``Y`` had one axis.
        """
        check_is_fitted(self)
        integer("n_samples", n_samples, 1)
        x = self._tensor(validate_data(self, X, reset=False, dtype=np.float64))
        prior = self._prior()
        mean, cross = self._posterior(prior, x)
        reduced = torch.linalg.solve_triangular(self._tensor(self.L_), cross, upper=False)
        covariance = _mixed(prior, _bases(prior, x, x)) - reduced.mT @ reduced
        factor = _cholesky(covariance, prior.noise[:, None].expand_as(mean))
        draws = check_random_state(random_state).standard_normal((*mean.shape, n_samples))
        z = mean[:, :, None] + factor @ self._tensor(draws)
        if prior.flows is not None:
            z = _unwarp(prior.flows, z)
        y = z.cpu().numpy() * self.y_scale_[:, None, None] + self.y_mean_[:, None, None]
        return y[0] if self._flat else y.transpose(1, 0, 2)

    def log_marginal_likelihood(self, X: Any, Y: Any) -> ndarray:
        """Return the evidence of data under the fitted prior.

        Parameters
        ----------
        X : array of shape (n, d)
            Inputs.
        Y : array of shape (n,) or (n, s)
            Outputs; NaN is not observed.

        Returns
        -------
        ndarray of shape (s,)
            Log-densities of the normalised outputs.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        Y = check_array(Y, input_name="Y", **_Y_OPTIONS)
        check_consistent_length(X, Y)
        Y = Y.reshape(len(X), -1)
        if Y.shape[1] != len(self.y_mean_):
            raise ValueError(f"Y must have the {len(self.y_mean_)} outputs of fit, got {Y.shape[1]}")
        y, mask = self._outputs(Y)
        return _evidence(self._prior(), self._tensor(X), y, mask)[0].cpu().numpy()

    def _weights(self, s: int) -> Tensor:
        if self.output_weights is None:
            return self._tensor(np.ones(s))
        weights = np.asarray(self.output_weights, dtype=np.float64)
        if weights.shape != (s,) or not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError(f"output_weights must be {s} positive numbers, got {self.output_weights!r}")
        return self._tensor(weights)

    def _tensor(self, array: ndarray) -> Tensor:
        return torch.tensor(array, dtype=torch.float64, device=self.device)

    def _outputs(self, Y: ndarray) -> tuple[Tensor, Tensor]:
        """Return normalised outputs (s, n), 0 where not observed, and where they are (s, n)."""
        y = self._tensor((Y - self.y_mean_) / self.y_scale_).T.contiguous()
        return y.nan_to_num(), ~y.isnan()

    def _prior(self) -> _Prior:
        *values, flows = (getattr(self, f"{name}_") for name in _Prior._fields)
        return _Prior(*map(self._tensor, values), flows=None if flows is None else self._tensor(flows))

    def _posterior(self, prior: _Prior, x: Float[Tensor, "m d"]) -> tuple[Tensor, Tensor]:
        """Return the mean (s, m) before any transform, and the covariance with training rows (s, n, m)."""
        train, seen = self._tensor(self.X_train_), self._tensor(self._mask)
        cross = _mixed(prior, _bases(prior, train, x)) * seen[:, :, None]
        alpha = self._tensor(self.alpha_)
        mean = (prior.attention @ prior.mean)[:, None] + (alpha[:, None] @ cross)[:, 0]
        return mean, cross


_Y_OPTIONS = {"dtype": np.float64, "ensure_2d": False, "ensure_all_finite": "allow-nan"}
