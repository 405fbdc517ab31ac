"""Inverse problems of continuous images: the image whose measurements are these, at any coordinates.

A latent z makes a coarse image D(z), which a network makes a function f; measurements of f may be
its values, its derivatives, projections, the residual of a differential equation:

    min_z  mean (measure(f) - y)^2 + tv mean(|df/dx| + |df/dy|) + weight prior(z),
    f(x) = net(D(z), x),                                                       (1)

by Adam. f knows its derivatives exactly, so they can be measured, or asked to be small, anywhere.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity._models import held
from posterity._precision import NARROW, wide
from posterity.generative._sizes import height_width
from posterity.generative.image_derivatives import image_gradient, image_laplacian
from posterity.generative.image_interpolation import pixel_grid

__all__ = ["ContinuousSolution", "solve_continuous"]


class ContinuousSolution(NamedTuple):
    """What `solve_continuous` found.

    Attributes
    ----------
    image : Tensor
        The continuous image at ``size``, shape (n, channels, height, width).
    latent : Tensor
        Its latent, in the shape it came in.
    coarse : Tensor
        What the decoder makes of it, shape (n, c, h, w): ``net(coarse, coords)`` is the image
        anywhere.
    losses : Tensor
        Objective before each step, those of the decoder's last, shape (n_steps + refine_steps,).
    """

    image: Float[Tensor, "n channels height width"]
    latent: Tensor
    coarse: Float[Tensor, "n c h w"]
    losses: Float[Tensor, " steps"]


class ContinuousImage:
    """A continuous image, as a measurement sees it: ``f(coords)``, its derivatives, and pixels of any size."""

    def __init__(self, net: Callable[..., Any], coarse: Tensor) -> None:
        self.net, self.coarse = net, coarse

    def __call__(self, coords: Tensor) -> Tensor:
        return self.net(self.coarse, coords)

    def gradient(self, coords: Tensor) -> Tensor:
        return image_gradient(self.net, self.coarse, coords)

    def laplacian(self, coords: Tensor) -> Tensor:
        return image_laplacian(self.net, self.coarse, coords)

    def image(self, size: int | Sequence[int]) -> Tensor:
        sides = (size, size) if isinstance(size, int) else size
        coords = pixel_grid(*sides, device=self.coarse.device, dtype=self.coarse.dtype)
        return self(coords).transpose(1, 2).unflatten(2, sides)


def solve_continuous(
    net: Callable[..., Any], measure: Callable[[Any], Tensor], y: Tensor, *, latent: Tensor,
    decoder: Callable[[Tensor], Tensor] | None = None, size: int | tuple[int, int] | None = None,
    coords: Float[Tensor, "b m 2"] | None = None, n_steps: int = 500, lr: float = 1e-2, tv: float = 0.0,
    prior: Callable[[Tensor], Tensor] | None = None, prior_weight: float = 0.0, refine_steps: int = 0,
    refine_lr: float = 5e-6,
) -> ContinuousSolution:  # fmt: skip
    """Return the continuous image that explains measurements, by gradient descent on its latent.

    Networks are used in eval mode and end as they were.

    Parameters
    ----------
    net : callable
        ``net(image, coords)``, a trained ``FunkNN`` for example.
    measure : callable
        ``measure(f)`` of the shape of y, where ``f(coords)``, ``f.gradient(coords)``,
        ``f.laplacian(coords)`` and ``f.image(size)`` are what their names say, of shapes
        (n, m, channels), (n, m, channels, 2), (n, m, channels) and (n, channels, height, width).
    y : Tensor
        Measurements, finite floats.
    latent : Tensor
        Where to start: a latent of the decoder, or without one the coarse image itself,
        shape (n, c, h, w). float32 or float64.
    decoder : callable, optional
        Makes coarse images (n, c, h, w) of latents: a VAE's, a flow and what decodes it.
    size : int or tuple of int, optional
        Size of the image returned, at least 1; that of the coarse image by default.
    coords : Tensor of shape (n, m, 2) or (1, m, 2), optional
        Where ``tv`` looks at the gradient; pixel centres of ``size`` by default.
    n_steps : int, default=500
        Of Adam on the latent, at least 0.
    lr : float, default=1e-2
        Greater than 0.
    tv : float, default=0.0
        Weight of the total variation, with respect to coordinates, at least 0. Above 0
        ``coords`` or ``size`` must be given.
    prior : callable, optional
        ``prior(latent)``, a number that is small for likely latents.
    prior_weight : float, default=0.0
        At least 0.
    refine_steps : int, default=0
        Steps on the weights of a copy of the decoder afterwards, the latent fixed, at least 0;
        above 0 the decoder must be a module.
    refine_lr : float, default=5e-6
        Greater than 0.

    Returns
    -------
    ContinuousSolution
        Image, latent, coarse image and losses, without gradients.

    Raises
    ------
    ValueError
        If shapes do not fit, an argument is out of range, or the measurement does not depend
        on the image.
    RuntimeError
        If the objective stops being finite.

    Notes
    -----
    1. Adam's first step is ``lr`` in every entry; choose it by the scale of the latent.
    2. The decoder is refined as a copy: ``coarse`` has the effect, your decoder stays.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 4.

    Examples
    --------
    Four pixels, known by their values:

    >>> import torch
    >>> from posterity.generative import FunkNN, pixel_grid, solve_continuous
    >>> at, y = pixel_grid(2), torch.tensor([[[0.0], [1.0], [1.0], [0.0]]])
    >>> found = solve_continuous(FunkNN(1), lambda f: f(at), y, latent=torch.zeros(1, 1, 2, 2))
    >>> found.image.squeeze().round(decimals=2).abs()
    tensor([[0., 1.],
            [1., 0.]])
    """
    finite("y", floating("y", y))
    finite("latent", floating("latent", latent))
    if latent.dtype in NARROW:
        raise ValueError(
            f"latent must be float32 or float64, got {latent.dtype}, which rounds small steps away"
        )
    sides = None if size is None else height_width(size)
    for name, count in (("n_steps", n_steps), ("refine_steps", refine_steps)):
        integer(name, count, 0)
    for name, rate in (("lr", lr), ("refine_lr", refine_lr)):
        at_least(name, rate, 0, strict=True)
    at_least("tv", tv, 0)
    at_least("prior_weight", prior_weight, 0)
    if tv > 0 and coords is None and size is None:
        raise ValueError("coords or size must be given with tv, got neither")
    if coords is not None:
        has_shape("coords", floating("coords", coords), (None, None, 2), "(x, y)")
    if refine_steps and not isinstance(decoder, nn.Module):
        raise ValueError(f"decoder must be a module for refine_steps, got {type(decoder).__name__}")
    if decoder is None:
        has_shape("latent", latent, (None,) * 4, "an image, without decoder")

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(latent.device.type, enabled=False))
        y, dtype = wide(y.detach().clone()), latent.dtype
        z = latent.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        where = None if coords is None else coords.detach().clone()
        if refine_steps:
            decoder = copy.deepcopy(decoder)
        stack.enter_context(held(net, decoder))

        def coarse() -> Tensor:
            made = z if decoder is None else floating("decoder(latent)", decoder(z))
            return has_shape("decoder(latent)", made, (None,) * 4, "images")

        def objective() -> Tensor:
            f = ContinuousImage(net, coarse())
            said = floating("measure(f)", measure(f))
            loss = (has_shape("measure(f)", said, y.shape, "y") - y).square().mean()
            if not loss.requires_grad:
                raise ValueError("measure(f) must depend on f, got values without a gradient")
            if tv > 0:
                grid = where
                if grid is None:
                    grid = pixel_grid(*sides, device=z.device, dtype=dtype)  # type: ignore[misc]
                loss = loss + tv * f.gradient(grid).abs().sum(-1).mean()
            if prior is not None and prior_weight > 0:
                loss = loss + prior_weight * floating("prior(latent)", prior(z)).sum()
            return loss

        losses = _descend(objective, [z], lr, n_steps)
        z.requires_grad_(False)
        if refine_steps and isinstance(decoder, nn.Module):
            weights = [p.requires_grad_() for p in decoder.parameters() if p.is_floating_point()]
            losses += _descend(objective, weights, refine_lr, refine_steps)
        with torch.no_grad():
            low = coarse()
            view = ContinuousImage(net, low)
            image = view.image(tuple(low.shape[2:]) if sides is None else sides)
    return ContinuousSolution(
        image, z.detach(), low.detach().clone(), torch.tensor(losses, dtype=dtype, device=z.device)
    )


def _descend(objective: Callable[[], Tensor], values: list[Tensor], lr: float, n_steps: int) -> list[float]:
    """Return the objective before each step of Adam."""
    losses: list[float] = []
    optimizer = torch.optim.Adam(values, lr=lr)
    for step in range(n_steps):
        loss = objective()
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss.detach()):
            raise RuntimeError(f"the objective is {losses[-1]} at step {step + 1}: lower lr, got {lr}")
        for value, grad in zip(values, torch.autograd.grad(loss, values, allow_unused=True), strict=True):
            value.grad = grad
        optimizer.step()
    return losses
