"""Sampled Laplace: error bars of a trained network from least squares with random data.

Around its trained weights the network is linear in them, f(x) + J(x) s z, and under a prior
z ~ N(0, I / lam) those weights have the posterior N(0, A^-1), A = s J' H J s + lam I, too
large to write down. But a draw from it is a solution of

    A z = sqrt(lam) a + s J' H^(1/2) e,      a, e ~ N(0, I),                            (1)

which conjugate gradients find from products with J and J' alone, for all draws at once.
The draws also choose the prior: with gamma = mean z' (s J' H J s) z, how many directions the
data have decided, and w the weights of the linear model that fit the data best,

    lam <- gamma / |w|^2.                                                               (2)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, integer, one_of
from posterity._precision import NARROW
from posterity._random import draw_device
from posterity.uncertainty.block_solvers import Block, _cg, _sgd, _Solution
from posterity.uncertainty.linearised_network import _Batch, _linear_mode, _parameters, _still, _Tangent
from posterity.uncertainty.output_likelihood import _Likelihood
from posterity.uncertainty.posterior_draws import Generator, _randn

__all__ = ["SampledLaplace"]

_KEEP_BYTES = 2**28  # linearisations of all batches are kept up to here, else made anew in each pass
_EXACT = 2**30  # points x outputs x parameters up to which the diagonal of J' H J is exact


class SampledLaplace:
    """Linearised Laplace posterior of a trained network, represented by draws.

    Parameters
    ----------
    model : nn.Module
        Trained; maps ``(n, ...)`` to ``(n, outputs)``. It is not changed. Gradients must be
        differentiable once more; frozen parameters and normalisation layers are held fixed.
    likelihood : {"classification", "regression"}
        Outputs are logits of a softmax, or means of Gaussians.
    n_samples : int, default=16
        Draws, at least 1; memory and time grow with it.
    prior_precision : float, default=1.0
        lam, positive: where its choice starts, or its value if ``n_em_steps`` is 0.
    noise_variance : float, default=1.0
        Of regression targets, positive.
    g_prior : bool, default=True
        Whether s makes all features equally large over the data, s_d = (J' H J)_dd^(-1/2);
        else s is 1. With it, how a layer is parametrised does not matter; a weight that no
        training point reaches has the largest s, 1000, and is very uncertain.
    n_em_steps : int, default=5
        How often (2) updates the precision.
    solver : {"cg", "sgd"}, default="cg"
        Conjugate gradients, or minibatches with momentum.
    batch_size : int, default=256
        Rows of a tensor that are worked on at once; a lower one takes less memory.
    tol : float, default=1e-4
        Relative residual at which solvers stop.
    max_iter : int, default=500
        Most passes over the data in one solve.
    generator : torch.Generator, optional
        Decides the draws.

    Attributes
    ----------
    prior_precision_ : float
        The precision found.
    effective_dimension_ : float
        gamma of (2) at that precision, in [1, p - 1].
    scale_ : Tensor of shape (p,)
        s.
    samples_ : Tensor of shape (n_samples, p)
        Draws z; the weights' deviations are ``scale_ * samples_``. Parameters are in the
        order of ``model.named_parameters()``, flattened.
    linear_mode_ : Tensor of shape (p,), or None
        w of (2); None if ``n_em_steps`` is 0.
    history_ : list of dict
        For each step: ``prior_precision`` after it, ``effective_dimension``, ``n_iter``.

    Raises
    ------
    ValueError
        If a parameter is out of range or nothing in the model can be trained.

    Notes
    -----
    1. The square root of softmax curvature is ``diag(sqrt p) - p sqrt(p)'``, in closed form.
    2. (J' H J)_dd is exact up to 2^30 points x outputs x parameters, beyond that the mean over
       the draws' own noise.
    3. The linear model's weights come from L-BFGS over all data (regression: from the solver
       itself), where the official code uses Adam.
    4. The rate of "sgd" is half the inverse of the largest eigenvalue in a batch and falls
       linearly to 0 over ``max_iter`` passes; the official rates are set by hand. It reaches a
       residual of about 1e-2, so set ``tol`` to that.
    5. Step t = 1, 2, ... of (2) solves to a residual of ``10^-(t+1)``, until that is below ``tol``.
    6. Weights in bfloat16 or float16 are read as float32; predictions have the dtype of their inputs.

    References
    ----------
    .. [1] Antoran et al. Sampling-based inference for large linear models, with application
       to linearised Laplace. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import SampledLaplace
    >>> _ = torch.manual_seed(0)
    >>> x = torch.linspace(-1, 1, 50)[:, None]
    >>> net = torch.nn.Linear(1, 1)
    >>> laplace = SampledLaplace(net, "regression", n_samples=64, noise_variance=0.01)
    >>> mean, covariance = laplace.fit(x, 2 * x).predict(torch.tensor([[0.0], [10.0]]))
    >>> bool(covariance[1, 0, 0] > 50 * covariance[0, 0, 0])  # far from the data, wide
    True
    """

    def __init__(
        self, model: nn.Module, likelihood: Literal["classification", "regression"], *, n_samples: int = 16,
        prior_precision: float = 1.0, noise_variance: float = 1.0, g_prior: bool = True, n_em_steps: int = 5,
        solver: Literal["cg", "sgd"] = "cg", batch_size: int = 256, tol: float = 1e-4, max_iter: int = 500,
        generator: Generator = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        self.likelihood = one_of("likelihood", likelihood, ("classification", "regression"))
        self.n_samples = integer("n_samples", n_samples, 1)
        self.prior_precision = at_least("prior_precision", prior_precision, 0, strict=True)
        self.noise_variance = at_least("noise_variance", noise_variance, 0, strict=True)
        self.g_prior = one_of("g_prior", g_prior, (False, True))
        self.n_em_steps = integer("n_em_steps", n_em_steps, 0)
        self.solver = one_of("solver", solver, ("cg", "sgd"))
        self.batch_size = integer("batch_size", batch_size, 1)
        self.tol = at_least("tol", tol, 0, strict=True)
        self.max_iter = integer("max_iter", max_iter, 1)
        self.generator = generator
        _parameters(model)

    @property
    def _likelihood(self) -> _Likelihood:
        return _Likelihood(self.likelihood, self.noise_variance)

    def fit(self, X: Tensor | Iterable, y: Tensor | None = None) -> "SampledLaplace":
        """Choose the precision and draw from the posterior.

        Parameters
        ----------
        X : Tensor or iterable
            Training inputs; or batches ``(x, y)`` that can be gone through again and again,
            such as a DataLoader, one batch of which is worked on at once.
        y : Tensor, optional
            Classes ``(n,)`` or targets ``(n, outputs)``. Not needed if ``n_em_steps`` is 0:
            only the choice of the precision looks at them.

        Returns
        -------
        SampledLaplace
            Itself.

        Raises
        ------
        ValueError
            If data and model do not fit, or batches cannot be gone through twice.
        """
        with _still(self.model):
            return self._fit(X, y)

    def _fit(self, X: Tensor | Iterable, y: Tensor | None) -> "SampledLaplace":
        tangent = _Tangent(self.model)
        data, likelihood = self._data(X, y), self._likelihood
        n = n_batches = 0
        for x, target in data():
            x = tangent.to(x)
            if not bool(torch.isfinite(x).all()):
                raise ValueError("X must be finite, got NaN or infinity")
            if n == 0:
                n_outputs, saved = tangent.measure(x)
            likelihood.check(target, len(x), n_outputs)
            n, n_batches = n + len(x), n_batches + 1
        if n == 0:
            raise ValueError("X must give at least one batch, got none")
        keep = saved * n_batches <= _KEEP_BYTES
        made = (tangent.at(tangent.to(x), target) for x, target in data())
        kept = list(made) if keep else []

        def batches() -> Iterator[_Batch]:
            return iter(kept) if keep else (tangent.at(tangent.to(x), target) for x, target in data())

        # One pass: the draws' data noise, the diagonal, and for regression the right side of the mean.
        theta, p = tangent.theta, len(tangent.theta)
        regression = likelihood.gaussian
        prior = _randn((self.n_samples, p), theta, self.generator)
        noise, diagonal, toward = torch.zeros_like(prior), torch.zeros_like(theta), torch.zeros_like(theta)
        exact = n * n_outputs * p <= _EXACT
        for batch in batches():
            e = _randn((self.n_samples, *batch.f.shape), theta, self.generator)
            noise += batch.pull(likelihood.root(batch.f, e))
            if exact:
                columns = torch.eye(n_outputs, dtype=theta.dtype, device=theta.device)
                columns = columns[:, None].expand(-1, len(batch.f), -1)
                diagonal += tangent.squares(batch.x, likelihood.root(batch.f, columns))
            if regression and batch.y is not None:
                toward += batch.pull(batch.y[None].to(theta) / self.noise_variance)[0]
        if not exact:
            diagonal = noise.square().mean(0)
        s = diagonal.clamp_min(1e-6).rsqrt() if self.g_prior else torch.ones_like(theta)
        noise, toward, diagonal = noise * s, toward * s, diagonal * s.square()

        def blocks() -> Iterator[Block]:
            for batch in batches():
                yield 1 / n_batches, lambda z, b=batch: s * b.pull(likelihood.curve(b.f, b.push(s * z))), 0.0

        def product(z: Tensor) -> Tensor:
            total = torch.zeros_like(z)
            for _, part, _ in blocks():
                total += part(z)
            return total

        def solve(lam: float, tol: float, z: Tensor, mean: Tensor | None) -> _Solution:
            right = torch.cat([math.sqrt(lam) * prior + noise, *([] if mean is None else [toward[None]])])
            start = torch.cat([z, *([] if mean is None else [mean[None]])])
            if self.solver == "cg":
                return _cg(lambda v: product(v) + lam * v, right, start, diagonal + lam, tol, self.max_iter)
            return _sgd(blocks, right, start, lam, diagonal + lam, tol, self.max_iter)

        # EM. The noise is drawn once and rescaled with lam, and solutions are started from the last.
        lam, k = float(self.prior_precision), self.n_samples
        z, mode, history = torch.zeros_like(prior), torch.zeros_like(theta), []
        for step in range(self.n_em_steps):
            tol = max(self.tol, 0.1 ** (step + 2))  # a first guess of lam is not worth an exact solution
            found = solve(lam, tol, z, mode if regression else None)
            z = found.z[:k]
            mode = found.z[k] if regression else _linear_mode(batches, s, lam, mode, self.tol, self.max_iter)
            gamma = self._dimension(found, math.sqrt(lam) * prior + noise, lam)
            lam = min(max(gamma / max(float(mode.double().square().sum()), 1e-30), 1e-10), 1e10)
            history.append({"prior_precision": lam, "effective_dimension": gamma, "n_iter": found.n_iter})
        found = solve(lam, self.tol, z, mode if regression and self.n_em_steps else None)
        self.samples_, self.scale_, self.history_ = found.z[:k].clone(), s, history
        self.effective_dimension_ = self._dimension(found, math.sqrt(lam) * prior + noise, lam)
        self.prior_precision_ = lam
        self.linear_mode_ = None if not self.n_em_steps else found.z[k].clone() if regression else mode
        return self

    def _dimension(self, found: _Solution, right: Tensor, lam: float) -> float:
        """Return the mean of z' G z, where G z is what the solver left of the right side."""
        k, p = right.shape
        z = found.z[:k]
        gamma = float((z * (right - lam * z - found.residual[:k])).double().sum() / k)
        return min(max(gamma, min(1.0, p / 2)), max(p - 1.0, p / 2))

    def _data(self, X: Tensor | Iterable, y: Tensor | None) -> Callable[[], Iterator[tuple]]:
        """Return what goes through the data once more at each call."""
        if isinstance(X, Tensor):
            if y is None and self.n_em_steps:
                raise ValueError("y must be given to choose the prior precision; n_em_steps=0 goes without")
            if not len(X):
                raise ValueError("X must hold at least one point, got none")
            if y is not None and (not isinstance(y, Tensor) or len(y) != len(X)):
                raise ValueError(f"y must be a tensor with a row for each of the {len(X)} of X")
            # Minibatches must each look like the whole; full passes do not mind the order.
            order = _shuffled(len(X), self.generator) if self.solver == "sgd" else torch.arange(len(X))
            rows = order.split(self.batch_size)
            return lambda: ((X[i.to(X.device)], None if y is None else y[i.to(y.device)]) for i in rows)
        if y is not None:
            raise ValueError("y must be None where X gives batches (x, y)")
        if not isinstance(X, Iterable) or iter(X) is X:
            raise ValueError(f"X must be a tensor or a loader that can restart, got {type(X).__name__}")
        return lambda: map(_pair, X)

    def sample(self, X: Tensor) -> Float[Tensor, "n_samples m o"]:
        """Return draws of the function: each is one function at all points.

        Parameters
        ----------
        X : Tensor
            Inputs.

        Returns
        -------
        Tensor
            Outputs ``f(x) + J(x) (s z_k)`` of each draw.
        """
        f, deviation = self._functions(X)
        return _as(X, f + deviation)

    def predict(self, X: Tensor) -> tuple[Float[Tensor, "m o"], Float[Tensor, "m o o"]]:
        """Return mean and covariance of the function at each point.

        Parameters
        ----------
        X : Tensor
            Inputs.

        Returns
        -------
        tuple of Tensor
            The model's own outputs, and their covariance over the draws.
        """
        f, deviation = self._functions(X)
        with torch.autocast(f.device.type, enabled=False):
            covariance = torch.einsum("kmi,kmj->mij", deviation, deviation) / len(deviation)
        return _as(X, f), _as(X, covariance)

    def predict_proba(self, X: Tensor, *, link: Literal["mc", "probit"] = "mc") -> Float[Tensor, "m o"]:
        """Return class probabilities.

        Parameters
        ----------
        X : Tensor
            Inputs.
        link : {"mc", "probit"}, default="mc"
            The mean of the draws' softmaxes, or the softmax of ``f / sqrt(1 + pi/8 var)``.

        Returns
        -------
        Tensor
            Rows that sum to one.

        Raises
        ------
        ValueError
            For a regression.
        """
        one_of("link", link, ("mc", "probit"))
        if self.likelihood == "regression":
            raise ValueError("likelihood must be 'classification' for predict_proba: use predict")
        f, deviation = self._functions(X)
        if link == "mc":
            return _as(X, (f + deviation).softmax(-1).mean(0))
        return _as(X, (f / (1 + math.pi / 8 * deviation.square().mean(0)).sqrt()).softmax(-1))

    def log_likelihood(self, X: Tensor, y: Tensor, *, joint: bool = False) -> Float[Tensor, "*m"]:
        """Return the log of the predictive density of targets, averaged over the draws.

        Parameters
        ----------
        X, y : Tensor
            Inputs and targets.
        joint : bool, default=False
            Of all targets together, in place of each by itself.

        Returns
        -------
        Tensor
            A scalar if ``joint``, else one value a point.
        """
        f, deviation = self._functions(X)
        f = f + deviation
        self._likelihood.check(y, len(X), f.shape[-1])
        each = self._likelihood.log_density(f, y.to(f.device))
        if joint:
            each = each.sum(-1)
        return _as(X, each.logsumexp(0) - math.log(len(f)))

    def _functions(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (m, o) and the draws' deviations from them (n_samples, m, o)."""
        if not hasattr(self, "samples_"):
            raise ValueError("there are no draws yet: call fit first")
        with _still(self.model):
            tangent = _Tangent(self.model)
            made = (tangent.at(tangent.to(x), None) for x in X.split(self.batch_size))
            parts = [(batch.f, batch.push(self.scale_ * self.samples_)) for batch in made]
        return torch.cat([f for f, _ in parts]), torch.cat([d for _, d in parts], 1)


def _pair(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a loader's batch."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(f"X must give batches (x, y), got {type(batch).__name__}")
    return batch[0], batch[1]


def _as(X: Tensor, result: Tensor) -> Tensor:
    """Return a result as narrow as the inputs that it is for."""
    return result.to(X.dtype) if X.dtype in NARROW else result


def _shuffled(n: int, generator: Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=draw_device(generator)).cpu()
