"""Sharp images from an ordinary codec's bytes, which compressed again give the same bytes.

Let f be a codec that writes and reads an image, trained on the mean squared error: f(x) = y is blurred, the mean of
all images with these bytes. A decoder that samples from p(x | y) instead gives images like those that there are, and
since each of them could have had these bytes, f(x_hat) = y: it is idempotent. Conversely any unconditional model under
the constraint f(x_hat) = y is that decoder. So diffuse backwards with a prior, and at each step go down

    x_{t-1} = mean(x_t, x0(x_t)) + noise - scale grad_{x_t} | y - f(x0(x_t)) |_2                        (1)

through the prior and the codec, whose rounding passes gradients straight through. Nothing is trained and no byte is
added; of the mean squared error it costs a factor of two, at most.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer, interval, one_of, within
from posterity._models import at_rest
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["IdempotentCodec", "PosteriorSample", "linear_betas", "posterior_sample"]

HARDER = 1.5  # factor of the scale with each new try
PULL = 0.1  # of the spherical steps: towards the constraint, of the way to the steepest point
RANGE = (-1.0, 1.0)


class PosteriorSample(NamedTuple):
    """Samples under a constraint.

    Attributes
    ----------
    x : Tensor of shape (n, *shape)
        Not clipped.
    residual : Tensor of shape (n,)
        Norm of ``target - forward(x)``.
    n_evals : int
        Calls of the prior.
    """

    x: Tensor
    residual: Tensor
    n_evals: int


def linear_betas(n_steps: int = 1000) -> Float[Tensor, " steps"]:
    """Return the variances of the usual schedule of diffusion, spread over fewer steps.

    Parameters
    ----------
    n_steps : int, default=1000
        At least 1.

    Returns
    -------
    Tensor of shape (n_steps,), float64
        From 1e-4 to 0.02, times ``1000 / n_steps``, at most 0.999.

    Examples
    --------
    >>> from posterity.coding import linear_betas
    >>> linear_betas(200)[[0, -1]]
    tensor([0.0005, 0.1000], dtype=torch.float64)
    """
    n = integer("n_steps", n_steps, 1)
    return (torch.linspace(1e-4, 0.02, n, dtype=torch.float64) * (1000 / n)).clamp_max(0.999)


@torch.inference_mode(False)
def posterior_sample(
    prior: Any,
    forward: Callable[[Tensor], Tensor],
    target: Float[Tensor, " n *target"],
    shape: Sequence[int],
    *,
    method: Literal["dps", "dsg"] = "dps",
    scale: float = 0.6,
    betas: Float[Tensor, " steps"] | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    max_tries: int = 1,
    tol: float | None = None,
    x_init: Float[Tensor, " n *shape"] | None = None,
    generator: torch.Generator | None = None,
) -> PosteriorSample:
    """Sample from a prior under ``forward(x) = target``, by guided reverse diffusion.

    Parameters
    ----------
    prior : object
        With ``denoise(x, alpha_bar)``, as `NetPrior` and `GaussianMixturePrior`.
    forward : callable
        Of a batch; differentiable.
    target : Tensor of shape (n, *target)
        What ``forward`` should give, one a sample. Its dtype is that of the result.
    shape : sequence of int
        Of the samples with their number, ``(n, *shape)``.
    method : {"dps", "dsg"}, default="dps"
        Equation 1; or steps to the sphere on which the noise lies, a tenth of the way to where the residual falls
        most, which does with 100 steps and has no scale.
    scale : float, default=0.6
        Of the gradient, at least 0, which leaves samples of the prior.
    betas : Tensor of shape (steps,), optional
        Variances of the noise, in (0, 1), the first nearest to the data. By default `linear_betas` of 1,000 steps.
    clip : tuple of float, optional
        Range of the expected samples inside; None leaves them.
    max_tries : int, default=1
        Samples whose residual is above ``tol`` are drawn again, with 1.5 times the scale, this often in all;
        the better counts.
    tol : float, optional
        Residual above which a sample is drawn again; None takes what comes.
    x_init : Tensor of shape (n, *shape), optional
        Where to start, by default from normal noise.
    generator : torch.Generator, optional
        Of the noise.

    Returns
    -------
    PosteriorSample
        With the dtype of ``target``.

    Raises
    ------
    ValueError
        If arguments are out of range, the prior returns another shape or what is not finite, or ``forward`` has no
        gradient.

    References
    ----------
    .. [1] Xu et al. Idempotence and Perceptual Image Compression. ICLR 2024. Section 3.3.
    .. [2] Chung et al. Diffusion Posterior Sampling for General Noisy Inverse Problems. ICLR 2023.
    .. [3] Yang et al. Guidance with Spherical Gaussian Constraint for Conditional Diffusion. ICML 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import GaussianMixturePrior, linear_betas, posterior_sample
    >>> prior = GaussianMixturePrior(torch.zeros(1, 2), torch.eye(2)[None], torch.ones(1))
    >>> found = posterior_sample(
    ...     prior, lambda x: x[:, :1], torch.full((4, 1), 0.5), (4, 2), betas=linear_betas(50), clip=None,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> bool(((found.x[:, 0] - 0.5).abs() < 1).all()), found.n_evals
    (True, 50)
    """
    if not callable(getattr(prior, "denoise", None)):
        raise ValueError(f"prior must have denoise(x, alpha_bar), got {type(prior).__name__}")
    floating("target", target)
    shape = tuple(integer("shape", size, 0) for size in shape)
    if len(shape) < 2 or not target.ndim or len(target) != shape[0]:
        raise ValueError(
            f"shape must be (n, *shape) for n = {len(target) if target.ndim else 'no'} targets, got {shape}"
        )
    one_of("method", method, ("dps", "dsg"))
    at_least("scale", scale, 0)
    max_tries = integer("max_tries", max_tries, 1)
    if tol is not None:
        at_least("tol", tol, 0)
    clip = None if clip is None else interval("clip", clip)
    steps = _schedule(linear_betas() if betas is None else betas)
    if x_init is not None:
        has_shape("x_init", floating("x_init", x_init), shape)
    dtype, target = target.dtype, wide(target.detach().clone())
    if not shape[0]:
        return PosteriorSample(target.new_zeros(shape, dtype=dtype), target.new_zeros(0, dtype=dtype), 0)

    def run(rows: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        part = (len(rows), *shape[1:])
        device = draw_device(generator, target.device)
        start = torch.randn(part, generator=generator, device=device).to(target) if x_init is None else x_init.detach().clone()[rows].to(target)  # fmt: skip
        x = _descend(prior, forward, target[rows], start, steps, method, strength, clip, generator)
        with torch.no_grad():
            return x, _norm(target[rows] - forward(x))

    owners = [getattr(part, "__self__", part) for part in (prior, forward)]  # of methods
    with at_rest(*owners), torch.autocast(target.device.type, enabled=False):
        x, residual = run(torch.arange(shape[0], device=target.device), scale)
        evals = len(steps[0])
        for attempt in range(1, 1 if tol is None else max_tries):
            rows = residual.gt(tol or 0.0).nonzero()[:, 0]
            if not len(rows):
                break
            again, left = run(rows, scale * HARDER**attempt)
            better = left < residual[rows]
            x[rows[better]], residual[rows[better]] = again[better], left[better]
            evals += len(steps[0])
    return PosteriorSample(x.to(dtype), residual.to(dtype), evals)


class IdempotentCodec:
    """A codec with the bytes of another, whose images are sharp.

    Parameters
    ----------
    codec : object
        With ``compress(x)``, ``decompress(data)`` and a differentiable ``reconstruct(x)``, on images in [-1, 1].
    prior : object
        With ``denoise(x, alpha_bar)``: a model of the same images, without any condition.
    method, scale, betas, max_tries, tol
        As for `posterior_sample`.

    Raises
    ------
    ValueError
        If the codec or the prior lacks a method, or a number is out of range.

    References
    ----------
    .. [1] Xu et al. Idempotence and Perceptual Image Compression. ICLR 2024. Theorems 1 and 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import GaussianMixturePrior, IdempotentCodec, TransformCodec, linear_betas
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = (0.3 * torch.randn(80, 1, 4, 4, generator=rng)).clamp(-1, 1)
    >>> codec = TransformCodec((1, 4, 4), 3, step=0.5).fit(x, n_steps=20, generator=rng)
    >>> sharp = IdempotentCodec(codec, GaussianMixturePrior.fit(x, 1), betas=linear_betas(20))
    >>> data = sharp.compress(x[:8])
    >>> sharp.decompress(data, generator=rng).shape, sharp.decompress(data, n_samples=3, generator=rng).shape
    (torch.Size([8, 1, 4, 4]), torch.Size([3, 8, 1, 4, 4]))
    """

    def __init__(
        self, codec: Any, prior: Any, *, method: Literal["dps", "dsg"] = "dps", scale: float = 0.6,
        betas: Float[Tensor, " steps"] | None = None, max_tries: int = 3, tol: float | None = None,
    ) -> None:  # fmt: skip
        for name in ("compress", "decompress", "reconstruct"):
            if not callable(getattr(codec, name, None)):
                raise ValueError(f"codec must have {name}, got {type(codec).__name__} without it")
        if not callable(getattr(prior, "denoise", None)):
            raise ValueError(f"prior must have denoise(x, alpha_bar), got {type(prior).__name__}")
        self.codec, self.prior = codec, prior
        self.method = one_of("method", method, ("dps", "dsg"))
        self.scale = at_least("scale", scale, 0)
        self.betas = linear_betas() if betas is None else betas
        _schedule(self.betas)
        self.max_tries = integer("max_tries", max_tries, 1)
        self.tol = None if tol is None else at_least("tol", tol, 0)

    def compress(self, x: Float[Tensor, " n *shape"]) -> bytes:
        """Return exactly ``codec.compress(x)``.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            In [-1, 1].

        Returns
        -------
        bytes
        """
        self._in_range(x)
        return self.codec.compress(x)

    def decompress_mse(self, data: bytes) -> Float[Tensor, " n *shape"]:
        """Return ``codec.decompress(data)``.

        Parameters
        ----------
        data : bytes

        Returns
        -------
        Tensor of shape (n, *shape)
        """
        try:
            return self.codec.decompress(data)
        except ValueError as error:
            raise ValueError(f"data must be of {type(self.codec).__name__}: {error}") from error

    @torch.inference_mode(False)
    def decompress(
        self,
        data: bytes,
        *,
        realism: float = 1.0,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return images like those that there are, with the same bytes.

        Parameters
        ----------
        data : bytes
        realism : float, default=1.0
            In [0, 1]: the share of the sample beside the codec's own image, which is 0 exactly.
        n_samples : int, default=1
            Different images of the same bytes.
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape (n, *shape), or (n_samples, n, *shape) for more than one
            In [-1, 1].

        Raises
        ------
        ValueError
            If data are not the codec's, arguments are out of range, or the codec's ``reconstruct`` has no gradient.
        """
        within("realism", realism, 0, 1)
        n_samples = integer("n_samples", n_samples, 1)
        y = self.decompress_mse(data)
        y = y.clone() if y.is_inference() else y.detach()
        many = y.expand(n_samples, *y.shape)
        if realism == 0 or not len(y):
            return many.clone() if n_samples > 1 else y
        self._differentiable(y)
        found = posterior_sample(
            self.prior, self.codec.reconstruct, many.flatten(0, 1), (n_samples * len(y), *y.shape[1:]),
            method=self.method, scale=self.scale, betas=self.betas, clip=RANGE, max_tries=self.max_tries,
            tol=self.tol, generator=generator,
        )  # fmt: skip
        x = realism * found.x.clamp(*RANGE).reshape(many.shape) + (1 - realism) * many
        return x if n_samples > 1 else x[0]

    @torch.no_grad()
    def idempotence_error(self, x_hat: Float[Tensor, " n *shape"], data: bytes) -> Float[Tensor, " n"]:
        """Return the mean squared difference between the codec's images of ``x_hat`` and of the bytes.

        Parameters
        ----------
        x_hat : Tensor of shape (n, *shape)
        data : bytes

        Returns
        -------
        Tensor of shape (n,)
            0 where ``x_hat`` is idempotent.
        """
        y = self._matching(x_hat, data)
        return (wide(self._at_rest(x_hat)) - wide(y)).square().flatten(1).mean(1)

    @torch.no_grad()
    def code_agreement(self, x_hat: Float[Tensor, " n *shape"], data: bytes) -> float:
        """Return which share of the symbols of ``x_hat``, compressed again, is that of the bytes.

        Parameters
        ----------
        x_hat : Tensor of shape (n, *shape)
        data : bytes

        Returns
        -------
        float
            In [0, 1]. Of a codec without ``symbols(x)`` and ``read_symbols(data)`` the share of equal numbers of its images.
        """
        y = self._matching(x_hat, data)
        symbols, stored = (getattr(self.codec, name, None) for name in ("symbols", "read_symbols"))
        if symbols is None or stored is None:
            ours, theirs = self._at_rest(x_hat), y
        else:
            ours, theirs = symbols(x_hat), stored(data)
        return float((ours == theirs).double().mean())

    def _at_rest(self, x: Tensor) -> Tensor:
        with at_rest(self.codec):
            return self.codec.reconstruct(x)

    def _matching(self, x_hat: Tensor, data: bytes) -> Tensor:
        y = self.decompress_mse(data)
        has_shape("x_hat", floating("x_hat", x_hat), tuple(y.shape), "these bytes")
        return y

    def _in_range(self, x: Tensor) -> None:
        floating("x", x, "scale images to [-1, 1]")
        if x.numel():
            low, high = float(x.min()), float(x.max())
            if not (low >= RANGE[0] and high <= RANGE[1]):  # NaN is not
                raise ValueError(f"x must be in [-1, 1], got values from {low:g} to {high:g}")

    def _differentiable(self, y: Tensor) -> None:
        """Try once whether a gradient comes through the codec."""
        with torch.enable_grad(), at_rest(self.codec):
            probe = y[:1].clone().requires_grad_()
            out = self.codec.reconstruct(probe)
            grad = torch.autograd.grad(out.sum(), probe, allow_unused=True)[0] if out.requires_grad else None
        if grad is None:
            raise ValueError("codec.reconstruct must be differentiable by x, it has no gradient: round by "
                             "c + (c.round() - c).detach(), straight through")  # fmt: skip


def _schedule(betas: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha_bar before and after each step, (steps,) and (steps,), and so beta."""
    floating("betas", betas)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas must have shape (steps,), got {tuple(betas.shape)}")
    betas = betas.detach().double().cpu()
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("betas must lie in (0, 1), so that noise grows with every step")
    return betas, (1 - betas).cumprod(0)


def _descend(
    prior: Any, forward: Callable[[Tensor], Tensor], target: Tensor, x: Tensor, steps: tuple[Tensor, Tensor],
    method: str, scale: float, clip: tuple[float, float] | None, generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Go from noise to samples, from the last step to the first."""
    betas, alpha_bars = steps
    device = draw_device(generator, x.device)
    for t in reversed(range(len(betas))):
        beta, now = float(betas[t]), float(alpha_bars[t])
        before = float(alpha_bars[t - 1]) if t else 1.0
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = prior.denoise(x, alpha_bars[t])
            if not isinstance(x0, Tensor) or x0.shape != x.shape:
                got = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
                raise ValueError(f"prior must return the shape that it gets, {tuple(x.shape)}, got {got}")
            x0 = x0 if clip is None else x0.clamp(*clip)
            grad = torch.zeros_like(x)
            if scale or method == "dsg":
                seen = forward(x0)
                has_shape("forward(x)", seen, tuple(target.shape), "target")
                if not seen.requires_grad:
                    raise ValueError("forward must be differentiable by x, it has no gradient")
                (grad,) = torch.autograd.grad(_norm(target - seen).sum(), x)
        if not bool(torch.isfinite(x0).all() & torch.isfinite(grad).all()):
            raise ValueError(
                f"prior and forward must give finite values, got NaN or infinity at step {t + 1} of {len(betas)}"
            )
        x, x0 = x.detach(), x0.detach()
        mean = math.sqrt(before) * beta / (1 - now) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - now) * x
        sigma = math.sqrt(beta * (1 - before) / (1 - now))
        noise = torch.randn(x.shape, generator=generator, device=device).to(x) if t else torch.zeros_like(x)
        if method == "dps":
            x = mean + sigma * noise - scale * grad
        else:
            radius = math.sqrt(x[0].numel()) * sigma
            move = sigma * noise + PULL * (-radius * _unit(grad) - sigma * noise)
            x = mean + radius * _unit(move)
    return x.detach()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wide(x).flatten(1), dim=1)


def _unit(x: Tensor) -> Tensor:
    size = _norm(x).reshape(-1, *[1] * (x.ndim - 1))
    return x / torch.where(size > 0, size, 1)
