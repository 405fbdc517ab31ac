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
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._random import draw_device

__all__ = ["SampledLaplace", "sample_posterior"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KEEP_BYTES = 2**28  # linearisations of all batches are kept up to here, else made anew in each pass
_EXACT = 2**30  # points x outputs x parameters up to which the diagonal of J' H J is exact
_JITTER = 1e-6

Generator = torch.Generator | None
Product = Callable[[Tensor], Tensor]
Block = tuple[float, Product, Tensor | float]  # one over how many blocks, its J' H J and J' H eps


def sample_posterior(
    jacobian: Float[Tensor, "n o p"], curvature: Float[Tensor, "n o o"],
    prior_precision: float | Float[Tensor, " p"], n_samples: int, *,
    objective: Literal["low-variance", "standard"] = "low-variance",
    solver: Literal["cg", "cholesky", "sgd"] = "cg", tol: float = 1e-6, max_iter: int = 1_000,
    generator: Generator = None,
) -> Float[Tensor, "n_samples p"]:  # fmt: skip
    """Return draws from the posterior of a linear model whose Jacobian is given.

    Parameters
    ----------
    jacobian : Tensor
        J, of each data point's outputs.
    curvature : Tensor
        H, of each point's negative log-likelihood in its outputs: symmetric, no negative
        eigenvalue.
    prior_precision : float or Tensor
        Positive, one for all parameters or one each.
    n_samples : int
        How many draws.
    objective : {"low-variance", "standard"}, default="low-variance"
        Where the noise of a draw is put: all in the regulariser, or in targets of the data,
        where minibatches see it. Both have the same minimiser up to a jitter of 1e-6 on H.
    solver : {"cg", "cholesky", "sgd"}, default="cg"
        Conjugate gradients; dense algebra of size min(p, n o); or minibatches with momentum.
    tol : float, default=1e-6
        Residual at which iterations stop, relative to the right side of (1).
    max_iter : int, default=1000
        Most passes over the data.
    generator : torch.Generator, optional
        Decides the draws.

    Returns
    -------
    Tensor
        Draws from ``N(0, (sum_n J_n' H_n J_n + diag(prior_precision))^-1)``.

    Raises
    ------
    ValueError
        If shapes do not fit, the curvature is not positive semi-definite, or a number is out
        of range.

    Warns
    -----
    ConvergenceWarning
        If ``max_iter`` passes do not reach ``tol``.

    References
    ----------
    .. [1] Antoran et al. Sampling-based inference for large linear models, with application
       to linearised Laplace. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import sample_posterior
    >>> J, H = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 1)  # one point, sees one weight
    >>> z = sample_posterior(J, H, 1.0, 100_000, generator=torch.Generator().manual_seed(0))
    >>> (z.T @ z / 100_000).round(decimals=1)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    n, o, p = has_shape("jacobian", floating("jacobian", jacobian), (None, None, None)).shape
    has_shape("curvature", floating("curvature", curvature), (n, o, o), "jacobian")
    integer("n_samples", n_samples, 1)
    one_of("objective", objective, ("low-variance", "standard"))
    one_of("solver", solver, ("cg", "cholesky", "sgd"))
    at_least("tol", tol, 0, strict=True)
    integer("max_iter", max_iter, 1)
    if isinstance(prior_precision, Tensor):
        precision = has_shape("prior_precision", prior_precision, (p,), "jacobian").to(jacobian)
        if not bool((finite("prior_precision", precision) > 0).all()):
            raise ValueError(f"prior_precision must be positive, got {float(precision.min())}")
    else:
        precision = jacobian.new_full((p,), at_least("prior_precision", prior_precision, 0, strict=True))
    jacobian, curvature = finite("jacobian", jacobian).detach(), finite("curvature", curvature).to(jacobian)
    values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
    scale = curvature.abs().max() if n else 0.0
    if bool(((curvature - curvature.mT).abs() > 1e-4 * scale).any() or (values < -1e-4 * scale).any()):
        raise ValueError("curvature must be symmetric without negative eigenvalues")
    values = values.clamp_min(0)
    root = values.sqrt() if objective == "low-variance" else values / (values + _JITTER).sqrt()

    prior = _randn((n_samples, p), jacobian, generator) * precision.sqrt()  # lam w0
    e = _randn((n_samples, n, o), jacobian, generator)
    noise = torch.einsum("nij,nj,nkj,snk->sni", vectors, root, vectors, e)  # H eps or H^(1/2) e
    data = torch.einsum("nop,sno->sp", jacobian, noise)
    factor = (values.sqrt()[:, :, None] * vectors.mT @ jacobian).flatten(0, 1)  # J' H J = factor' factor
    if solver == "cholesky":
        return _cholesky(factor, precision, prior + data)
    diagonal = factor.square().sum(0) + precision
    start = torch.zeros_like(prior)
    if solver == "cg" or n == 0:
        return _cg(
            lambda z: z @ factor.T @ factor + precision * z, prior + data, start, diagonal, tol, max_iter
        ).z

    standard, rows = objective == "standard", -(-n // 8)

    def blocks() -> Iterator[Block]:
        for first in range(0, n, rows):
            part, own = factor[first * o : (first + rows) * o], slice(first, first + rows)
            targets = torch.einsum("nop,sno->sp", jacobian[own], noise[:, own]) if standard else 0.0
            yield 1 / -(-n // rows), lambda z, part=part: z @ part.T @ part, targets

    right = prior if standard else prior + data
    return _sgd(blocks, right, start, precision, diagonal, tol, max_iter).z


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
        with _still(self.model), torch.no_grad():
            return self._fit(X, y)

    def _fit(self, X: Tensor | Iterable, y: Tensor | None) -> "SampledLaplace":
        tangent = _Tangent(self.model)
        data = self._data(X, y)
        n = n_batches = 0
        for x, target in data():
            x = tangent.to(x)
            if n == 0:
                n_outputs, saved = tangent.measure(x)
            self._check_target(target, len(x), n_outputs)
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
        regression = self.likelihood == "regression"
        prior = _randn((self.n_samples, p), theta, self.generator)
        noise, diagonal, toward = torch.zeros_like(prior), torch.zeros_like(theta), torch.zeros_like(theta)
        exact = n * n_outputs * p <= _EXACT
        for batch in batches():
            e = _randn((self.n_samples, *batch.f.shape), theta, self.generator)
            noise += batch.pull(self._root(batch.f, e))
            if exact:
                columns = torch.eye(n_outputs, dtype=theta.dtype, device=theta.device)
                columns = columns[:, None].expand(-1, len(batch.f), -1)
                diagonal += tangent.squares(batch.x, self._root(batch.f, columns))
            if regression and batch.y is not None:
                toward += batch.pull(batch.y[None].to(theta) / self.noise_variance)[0]
        if not exact:
            diagonal = noise.square().mean(0)
        s = diagonal.clamp_min(1e-6).rsqrt() if self.g_prior else torch.ones_like(theta)
        noise, toward, diagonal = noise * s, toward * s, diagonal * s.square()

        def blocks() -> Iterator[Block]:
            for batch in batches():
                yield 1 / n_batches, lambda z, b=batch: s * b.pull(self._curve(b.f, b.push(s * z))), 0.0

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
            z, mode = found.z[:k], found.z[k] if regression else self._mode(batches, s, lam, mode)
            gamma = self._dimension(found, math.sqrt(lam) * prior + noise, lam)
            lam = min(max(gamma / max(float(mode.double().square().sum()), 1e-30), 1e-10), 1e10)
            history.append({"prior_precision": lam, "effective_dimension": gamma, "n_iter": found.n_iter})
        found = solve(lam, self.tol, z, mode if regression and self.n_em_steps else None)
        self.samples_, self.scale_, self.history_ = found.z[:k].clone(), s, history
        self.effective_dimension_ = self._dimension(found, math.sqrt(lam) * prior + noise, lam)
        self.prior_precision_ = lam
        self.linear_mode_ = None if not self.n_em_steps else found.z[k].clone() if regression else mode
        return self

    def _dimension(self, found: "_Solution", right: Tensor, lam: float) -> float:
        """Return the mean of z' G z, where G z is what the solver left of the right side."""
        k, p = right.shape
        z = found.z[:k]
        gamma = float((z * (right - lam * z - found.residual[:k])).double().sum() / k)
        return min(max(gamma, min(1.0, p / 2)), max(p - 1.0, p / 2))

    def _mode(
        self, batches: Callable[[], Iterator["_Batch"]], s: Tensor, lam: float, start: Tensor
    ) -> Tensor:
        """Return the weights at which the linear classifier, without offset, fits best."""
        w = start.clone().requires_grad_()

        def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
            loss, grad = lam / 2 * point.double().square().sum(), lam * point
            for batch in batches():
                logits, target = batch.push((s * point)[None])[0], batch.y.long()
                loss = loss + F.cross_entropy(logits.double(), target, reduction="sum")
                gap = logits.softmax(1) - F.one_hot(target, logits.shape[1])
                grad = grad + s * batch.pull(gap[None])[0]
            return loss, grad

        def step() -> Tensor:
            loss, w.grad = evaluate(w.detach())
            return loss

        steepest = float(evaluate(torch.zeros_like(start))[1].abs().max())
        torch.optim.LBFGS(
            [w], max_iter=self.max_iter, tolerance_grad=self.tol * steepest, tolerance_change=0,
            line_search_fn="strong_wolfe",
        ).step(step)  # fmt: skip
        slope = float(evaluate(w.detach())[1].abs().max())
        _warn(slope / max(steepest, 1e-30), self.tol, self.max_iter, "L-BFGS")
        return w.detach()

    def _curve(self, f: Tensor, u: Tensor) -> Tensor:
        """Return H u."""
        if self.likelihood == "regression":
            return u / self.noise_variance
        p = f.softmax(-1)
        return p * u - p * (p * u).sum(-1, keepdim=True)

    def _root(self, f: Tensor, e: Tensor) -> Tensor:
        """Return R e with R R' = H; for the softmax R = diag(sqrt p) - p sqrt(p)'."""
        if self.likelihood == "regression":
            return e / math.sqrt(self.noise_variance)
        p = f.softmax(-1)
        e = p.sqrt() * e
        return e - p * e.sum(-1, keepdim=True)

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
        return lambda: ((batch[0], batch[1]) for batch in X)

    def _check_target(self, y: Tensor | None, n: int, n_outputs: int) -> None:
        if y is None:
            return
        if self.likelihood == "regression":
            has_shape("y", finite("y", floating("y", y)), (n, n_outputs), "X and the model")
            return
        if y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"y must hold class indices, got dtype {y.dtype}")
        low, high = has_shape("y", y, (n,), "X").aminmax() if n else (0, 0)
        if int(low) < 0 or int(high) >= n_outputs:
            raise ValueError(f"y must be in 0..{n_outputs - 1}, got {int(low)} to {int(high)}")

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
        return f + deviation

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
        return f, torch.einsum("kmi,kmj->mij", deviation, deviation) / len(deviation)

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
            raise ValueError("predict_proba is for classification: use predict")
        f, deviation = self._functions(X)
        if link == "mc":
            return (f + deviation).softmax(-1).mean(0)
        return (f / (1 + math.pi / 8 * deviation.square().mean(0)).sqrt()).softmax(-1)

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
        f = self.sample(X)
        self._check_target(y, len(X), f.shape[-1])
        y = y.to(f.device)
        if self.likelihood == "classification":
            each = f.log_softmax(-1).gather(-1, y.long().expand(len(f), -1)[..., None])[..., 0]
        else:
            square = (y - f).square() / self.noise_variance
            each = -0.5 * (square + math.log(2 * math.pi * self.noise_variance)).sum(-1)
        if joint:
            each = each.sum(-1)
        return each.logsumexp(0) - math.log(len(f))

    def _functions(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (m, o) and the draws' deviations from them (n_samples, m, o)."""
        if not hasattr(self, "samples_"):
            raise ValueError("there are no draws yet: call fit first")
        with _still(self.model), torch.no_grad():
            tangent = _Tangent(self.model)
            made = (tangent.at(tangent.to(x), None) for x in X.split(self.batch_size))
            parts = [(batch.f, batch.push(self.scale_ * self.samples_)) for batch in made]
        return torch.cat([f for f, _ in parts]), torch.cat([d for _, d in parts], 1)


class _Batch(NamedTuple):
    """A batch, its outputs, and the products V -> J V and U -> J' U for stacks of vectors."""

    x: Tensor
    y: Any  # Tensor, or None where there are no labels
    f: Tensor
    push: Product
    pull: Product


class _Tangent:
    """The outputs of a network as a function of its free parameters, as one vector theta."""

    def __init__(self, model: nn.Module) -> None:
        self.model, free = model, _parameters(model)
        self.names, self.shapes = list(free), [v.shape for v in free.values()]
        self.sizes = [v.numel() for v in free.values()]
        self.theta = torch.cat([v.detach().flatten() for v in free.values()])

    def to(self, x: Tensor) -> Tensor:
        return x.to(self.theta.device)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        return functional_call(self.model, {name: v.view(shape) for name, v, shape in parts}, (x,))

    def measure(self, x: Tensor) -> tuple[int, int]:
        """Return the number of outputs, and the bytes that linearising at x keeps."""
        saved = 0

        def pack(value: Tensor) -> Tensor:
            nonlocal saved
            saved += value.numel() * value.element_size()
            return value

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            f = self(self.theta.clone().requires_grad_(), x)
        if f.ndim != 2 or len(f) != len(x):
            raise ValueError(f"model must map n inputs to (n, outputs), got {tuple(f.shape)} for {len(x)}")
        return f.shape[1], saved

    def at(self, x: Tensor, y: Tensor | None) -> _Batch:
        f, pull = vjp(lambda theta: self(theta, x), self.theta)[:2]
        # u -> J' u is linear, so its own transpose is v -> J v: no second pass through the network
        push = vjp(lambda u: pull(u)[0], torch.zeros_like(f))[1]
        y = None if y is None else y.to(f.device)
        return _Batch(x, y, f, lambda v: vmap(push)(v)[0], lambda u: vmap(pull)(u)[0])

    def squares(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the sum over points n and columns c of (J_n' u_cn)^2."""

        def one(point: Tensor, columns: Tensor) -> Tensor:
            pull = vjp(lambda theta: self(theta, point[None])[0], self.theta)[1]
            return vmap(pull)(columns)[0].square().sum(0)

        total, u = torch.zeros_like(self.theta), u.transpose(0, 1)  # (points, columns, outputs)
        rows = max(1, 2**24 // (u.shape[1] * len(total)))
        for xs, us in zip(x.split(rows), u.split(rows), strict=True):
            try:
                total += vmap(one)(xs, us).sum(0)
            except RuntimeError:  # a module that vmap cannot take through its inputs
                total += torch.stack([one(*pair) for pair in zip(xs, us, strict=True)]).sum(0)
        return total


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the free parameters by name: trainable, not of a normalisation layer."""
    fixed = {id(v) for m in model.modules() if isinstance(m, _NORMS) for v in m.parameters(recurse=False)}
    free = {name: v for name, v in model.named_parameters() if v.requires_grad and id(v) not in fixed}
    if not sum(v.numel() for v in free.values()):
        raise ValueError("model must have a trainable parameter outside normalisation layers, has none")
    return free


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode, with attention that can be differentiated twice; then undo both."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


class _Solution(NamedTuple):
    z: Tensor
    residual: Tensor
    n_iter: int


def _cg(
    product: Product, right: Tensor, start: Tensor, diagonal: Tensor, tol: float, max_iter: int
) -> _Solution:
    """Solve for all rows at once by conjugate gradients, preconditioned by the diagonal."""
    z, limit = start.clone(), tol * right.norm(dim=1)
    r = right - product(z)
    d = q = r / diagonal
    rho, n_iter = (r * q).sum(1), 0
    while n_iter < max_iter and not bool((r.norm(dim=1) <= limit).all()):
        image = product(d)
        slope = (d * image).sum(1)
        step = torch.where(slope > 0, rho / slope, 0)[:, None]  # a row that is solved stands still
        z += step * d
        r -= step * image
        q = r / diagonal
        new = (r * q).sum(1)
        d = q + torch.where(rho > 0, new / rho, 0)[:, None] * d
        rho, n_iter = new, n_iter + 1
    _warn(_relative(r, right), tol, max_iter, "conjugate gradients")
    return _Solution(z, r, n_iter)


def _sgd(
    blocks: Callable[[], Iterator[Block]], right: Tensor, start: Tensor, precision: Tensor | float,
    diagonal: Tensor, tol: float, max_iter: int,
) -> _Solution:  # fmt: skip
    """Minimise by Nesterov's momentum over blocks of the data; the solution is a moving average."""

    def gradient(block: Block, z: Tensor, right: Tensor | float) -> Tensor:
        share, product, noise = block
        return ((product(z) - noise) / share + precision * z - right) / diagonal

    def residual(z: Tensor) -> Tensor:
        r = right - precision * z
        for _, product, noise in blocks():
            r = r + noise - product(z)
        return r

    top = 1.0  # the largest curvature that a block can show, by power iterations
    for share, product, _ in blocks():
        v = right[:1] / diagonal
        for _ in range(8):
            v = gradient((share, product, 0.0), v / v.norm().clamp_min(1e-30), 0.0)
        top = max(top, float(v.norm()))
    z, average, velocity, n_iter = start.clone(), start.clone(), torch.zeros_like(start), 0
    r = residual(average)
    full = right + sum((noise for _, _, noise in blocks()), start=torch.zeros_like(right))
    while n_iter < max_iter and _relative(r, full) > tol:
        rate = 0.5 / top * (1 - n_iter / max_iter)
        for block in blocks():
            velocity = 0.9 * velocity - rate * gradient(block, z + 0.9 * velocity, right)
            z = z + velocity
            average += 0.01 * (z - average)
        n_iter += 1
        if n_iter % 10 == 0 or n_iter == max_iter:
            r = residual(average)
    _warn(_relative(r, full), tol, max_iter, "stochastic gradients")
    return _Solution(average, r, n_iter)


def _cholesky(factor: Tensor, precision: Tensor, right: Tensor) -> Tensor:
    """Solve with factor' factor + diag(precision), or with the dual matrix if that is smaller."""
    rows, p = factor.shape
    if rows >= p:
        chol = torch.linalg.cholesky(factor.T @ factor + precision.diag())
        return torch.cholesky_solve(right.T, chol).T
    z = right / precision
    dual = factor / precision @ factor.T
    chol = torch.linalg.cholesky(dual + torch.eye(rows, dtype=dual.dtype, device=dual.device))
    return z - torch.cholesky_solve(factor @ z.T, chol).T @ factor / precision


def _relative(r: Tensor, right: Tensor) -> float:
    return float((r.norm(dim=1) / right.norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny)).max())


def _warn(residual: float, tol: float, max_iter: int, solver: str) -> None:
    if residual > tol:
        warnings.warn(
            f"{solver} left a relative residual of {residual:.2g} after at most {max_iter} passes, "
            f"tol is {tol:g}: raise max_iter or tol", ConvergenceWarning, stacklevel=2,
        )  # fmt: skip


def _randn(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    where = draw_device(generator, like.device)
    return torch.randn(shape, dtype=like.dtype, device=where, generator=generator).to(like.device)


def _shuffled(n: int, generator: Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=draw_device(generator)).cpu()
