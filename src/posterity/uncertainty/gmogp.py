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

import math
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of

__all__ = ["GMOGPRegressor", "attention_coefficients"]

NOISE_FLOOR = 1e-4
LARGE = 20_000  # rows above which a warning says how much memory the covariances take
ROWS = 1_024  # rows predicted at once
ONE = math.log(math.e - 1)  # softplus(ONE) = 1


def attention_coefficients(
    targets: Float[Tensor, "n s"],
    weight: Float[Tensor, "s s s"],
    bias: Float[Tensor, "s s s"],
    negative_slope: float = 0.2,
) -> Float[Tensor, "s s"]:
    """Return the weight of each latent process in each output, equation 2.

    Parameters
    ----------
    targets : Tensor of shape (n, s)
        Observations, a column an output; only their directions count.
    weight, bias : Tensor of shape (s, s, s)
        W and B; the first index is the output whose graph it is. Of graph i only row i of
        the scores is used, so other rows of ``bias`` get no gradient.
    negative_slope : float, default=0.2
        Slope of LeakyReLU below 0, at least 0.

    Returns
    -------
    Tensor
        Of shape (s, s): row i holds the parents of output i, the diagonal 1, and the rest of
        a row sums to less than 1.

    Raises
    ------
    ValueError
        If shapes do not fit, ``targets`` are not finite, or ``negative_slope`` is negative.

    References
    ----------
    .. [1] Dai, Yan, Yin. Graphical Multioutput Gaussian Process with Attention. ICLR 2024.

    Examples
    --------
    Without scores two parents have exp(0) / (1 + 2 exp(0)) each:

    >>> import torch
    >>> from posterity.uncertainty import attention_coefficients
    >>> attention_coefficients(torch.eye(3), torch.zeros(3, 3, 3), torch.zeros(3, 3, 3))
    tensor([[1.0000, 0.3333, 0.3333],
            [0.3333, 1.0000, 0.3333],
            [0.3333, 0.3333, 1.0000]])
    """
    at_least("negative_slope", negative_slope, 0)
    s = has_shape("targets", floating("targets", targets), (None, None)).shape[1]
    for name, value in (("weight", weight), ("bias", bias)):
        has_shape(name, floating(name, value), (s, s, s), f"targets of {s} outputs")
    return _attention(_gram(finite("targets", targets)), weight, bias, negative_slope)


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
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
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

    def _prior(self) -> "_Prior":
        *values, flows = (getattr(self, f"{name}_") for name in _Prior._fields)
        return _Prior(*map(self._tensor, values), flows=None if flows is None else self._tensor(flows))

    def _posterior(self, prior: "_Prior", x: Float[Tensor, "m d"]) -> tuple[Tensor, Tensor]:
        """Return the mean (s, m) before any transform, and the covariance with training rows (s, n, m)."""
        train, seen = self._tensor(self.X_train_), self._tensor(self._mask)
        cross = _mixed(prior, _bases(prior, train, x)) * seen[:, :, None]
        alpha = self._tensor(self.alpha_)
        mean = (prior.attention @ prior.mean)[:, None] + (alpha[:, None] @ cross)[:, 0]
        return mean, cross


_Y_OPTIONS = {"dtype": np.float64, "ensure_2d": False, "ensure_all_finite": "allow-nan"}


class _Prior(NamedTuple):
    """All that a fit learns; ``flows`` is None without a transform."""

    attention: Tensor
    lengthscale: Tensor
    outputscale: Tensor
    mean: Tensor
    noise: Tensor
    flows: Tensor | None


def _start(s: int, d: int | None, n_flows: int, seed: int, like: Tensor) -> dict[str, Tensor]:
    """Return the unconstrained parameters: W Xavier uniform, B standard normal, all else 0."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(s, s, s, generator=generator, dtype=torch.float64)
    raw = {
        "weight": 1.414 * math.sqrt(3 / s) * (2 * uniform - 1),
        "bias": torch.randn(s, s, s, generator=generator, dtype=torch.float64),
        "lengthscale": torch.zeros(s) if d is None else torch.zeros(s, d),
        **{name: torch.zeros(s) for name in ("outputscale", "mean", "noise")},
    }
    if n_flows:
        raw["flows"] = torch.zeros(n_flows, 4, s)
    return {name: value.to(like).requires_grad_() for name, value in raw.items()}


def _constrain(raw: dict[str, Tensor], gram: Float[Tensor, "s s"]) -> _Prior:
    flows = raw.get("flows")
    if flows is not None:  # at 0 each map is the identity, and weight decay leads back to it
        a, b, c, d = flows.unbind(1)
        flows = torch.stack([a, F.softplus(b + ONE), c, F.softplus(d + ONE)], 1)
    return _Prior(
        _attention(gram, raw["weight"], raw["bias"], 0.2),
        F.softplus(raw["lengthscale"]),
        F.softplus(raw["outputscale"]),
        raw["mean"],
        F.softplus(raw["noise"]) + NOISE_FLOOR,
        flows,
    )


def _gram(targets: Float[Tensor, "n s"]) -> Float[Tensor, "s s"]:
    """Return the cosines of outputs; one that is 0 throughout has none."""
    features = targets / torch.linalg.vector_norm(targets, dim=0).clamp_min(torch.finfo(targets.dtype).tiny)
    return features.T @ features


def _attention(
    gram: Float[Tensor, "s s"], weight: Float[Tensor, "s s s"], bias: Float[Tensor, "s s s"], slope: float
) -> Float[Tensor, "s s"]:
    own = torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    # row i of (F F') W_i + B_i, the only one that is used
    scores = (gram[:, None] @ weight)[:, 0] + bias.diagonal().T
    scores = F.leaky_relu(scores, slope).masked_fill(own, -math.inf)
    peak = scores.detach().amax(1, keepdim=True).clamp_min(0)
    parents = (scores - peak).exp()
    return parents / ((-peak).exp() + parents.sum(1, keepdim=True)) + own


def _squared_distances(a: Float[Tensor, "*s n d"], b: Float[Tensor, "*s m d"]) -> Float[Tensor, "*s n m"]:
    center = b.mean(-2, keepdim=True)  # squares of centred inputs do not cancel
    a, b = a - center, b - center
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (squares - 2 * a @ b.mT).clamp_min(0)


def _bases(
    prior: _Prior, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], squared: Tensor | None = None
) -> Float[Tensor, "s n m"]:
    """Return the kernel of each latent process at variance 1."""
    scale = prior.lengthscale
    if scale.ndim == 2:
        return (-0.5 * _squared_distances(a / scale[:, None], b / scale[:, None])).exp()
    squared = _squared_distances(a, b) if squared is None else squared
    return (squared * (-0.5 * scale.pow(-2))[:, None, None]).exp()


def _mixed(prior: _Prior, bases: Float[Tensor, "s n m"]) -> Float[Tensor, "s n m"]:
    """Return the covariance of each output without noise: sum_j a_ij^2 k_j, one matrix product."""
    return ((prior.attention.square() * prior.outputscale) @ bases.flatten(1)).view_as(bases)


def _variance(prior: _Prior) -> Float[Tensor, " s"]:
    return prior.attention.square() @ prior.outputscale


def _evidence(
    prior: _Prior, x: Float[Tensor, "n d"], y: Float[Tensor, "s n"], mask: Bool[Tensor, "s n"],
    squared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the log-density of each output, the Cholesky factors, and K^-1 (y - mean)."""
    z, stretch = y, y.new_zeros(())
    if prior.flows is not None:
        z, stretch = _warp(prior.flows, y)
    covariance = _mixed(prior, _bases(prior, x, x, squared))
    noise = prior.noise[:, None].expand_as(z)
    residual = z - (prior.attention @ prior.mean)[:, None]
    if not bool(mask.all()):  # a row not observed is alone, with variance 1 and residual 0
        covariance = covariance * (mask[:, :, None] & mask[:, None, :])
        noise = torch.where(mask, noise, 1 - covariance.diagonal(dim1=1, dim2=2))
        residual, stretch = residual * mask, stretch * mask
    density, factor, alpha = _Gaussian.apply(covariance, noise, residual)
    constant = 0.5 * math.log(2 * math.pi) * mask.to(y.dtype).sum(1)
    return density - constant + stretch.sum(-1), factor, alpha


class _Gaussian(torch.autograd.Function):
    """Log-density of residuals under N(0, covariance + diag(noise)), without its constant.

    The gradient in closed form, (alpha alpha' - K^-1) / 2, costs one inverse from the factor;
    autograd would solve with the factor several times.
    """

    @staticmethod
    def forward(
        ctx: Any, covariance: Tensor, noise: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor = _cholesky(covariance, noise)
        alpha = torch.cholesky_solve(residual[:, :, None], factor)[:, :, 0]
        ctx.save_for_backward(factor, alpha)
        ctx.mark_non_differentiable(factor, alpha)
        logdet = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return -0.5 * (residual * alpha).sum(1) - logdet, factor, alpha

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        factor, alpha = ctx.saved_tensors
        slope = torch.cholesky_inverse(factor).neg_()
        slope.baddbmm_(alpha[:, :, None], alpha[:, None]).mul_(0.5 * grads[0][:, None, None])
        return slope, slope.diagonal(dim1=1, dim2=2), -grads[0][:, None] * alpha


def _cholesky(covariance: Float[Tensor, "s n n"], noise: Float[Tensor, "s n"]) -> Float[Tensor, "s n n"]:
    """Factorise covariance + diag(noise), with jitter on the diagonal only if it is needed."""
    for jitter in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        matrix = covariance.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(noise + jitter)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info.any()):
            return factor
    raise ValueError("a covariance is not positive definite, even with a jitter of 1e-4: lower lr")


def _warp(flows: Float[Tensor, "k 4 s"], y: Float[Tensor, "s n"]) -> tuple[Tensor, Tensor]:
    """Return T(y) and log T'(y) for the composition of d sinh(b arcsinh(y) - a) + c."""
    stretch = torch.zeros_like(y)
    for a, b, c, d in flows[..., None]:
        inner = b * y.arcsinh() - a
        stretch = stretch + (b * d).log() + inner.cosh().log() - 0.5 * y.square().log1p()
        y = d * inner.sinh() + c
    return y, stretch


def _unwarp(flows: Float[Tensor, "k 4 s"], z: Float[Tensor, "s m p"]) -> Float[Tensor, "s m p"]:
    """Return the inverse of T, applied to each output's values."""
    for a, b, c, d in flows.flip(0)[..., None, None]:
        z = ((((z - c) / d).arcsinh() + a) / b).sinh()
    return z


def _moments(flows: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of T^-1 of a Gaussian, by 32 Gauss-Hermite points."""
    points, weights = (mean.new_tensor(part) for part in np.polynomial.hermite_e.hermegauss(32))
    y = _unwarp(flows, mean[:, :, None] + std[:, :, None] * points)
    weights = weights / weights.sum()
    center = y @ weights
    return center, ((y - center[:, :, None]).square() @ weights).sqrt()
