"""How local is an image distribution: what denoisers gain from looking at more pixels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity._precision import wide
from posterity.generative._network import normal
from posterity.generative.haar_pyramid import Pictures, _pictured

__all__ = ["locality_curve"]


@torch.inference_mode(False)  # grad mode too: what is fitted has to learn
def locality_curve(
    fit: Callable[[int], Callable[[Tensor], Any]], x: Pictures, sigmas: Sequence[float],
    receptive_fields: Sequence[int], *, generator: torch.Generator | None = None,
) -> dict[int, Float[Tensor, " sigmas"]]:  # fmt: skip
    """Measure how much denoisers gain from larger receptive fields.

    Where the curve is flat, a pixel depends on its neighbourhood alone; what is left of the
    density is a Markov field of that size.

    Parameters
    ----------
    fit : callable
        ``fit(receptive_field)`` trains and returns ``denoise(y) -> x``, such as
        ``MultiscaleDenoiser.denoise``.
    x : Tensor of shape (n, c, h, w)
        Clean held-out images, whose range is 1.
    sigmas : sequence of float
        Levels of noise, positive. All denoisers see the same noise, at every level.
    receptive_fields : sequence of int
        What to hand to ``fit``, at least 1.
    generator : torch.Generator, optional
        Source of randomness for the noise.

    Returns
    -------
    dict of int to Tensor
        By receptive field, PSNR in dB over all images, shape (len(sigmas),).

    Raises
    ------
    ValueError
        If an argument is out of range, or a denoised image has another shape.

    Examples
    --------
    A mean of r x r pixels leaves 1 / r^2 of the variance in a flat image, at r = 3 9.5 dB less:

    >>> import torch
    >>> from torch.nn.functional import avg_pool2d
    >>> from posterity.generative import locality_curve
    >>> def fit(r):
    ...     return lambda y: avg_pool2d(y, r, stride=1, padding=r // 2, count_include_pad=False)
    >>> noise = torch.Generator().manual_seed(0)
    >>> curve = locality_curve(fit, torch.full((1, 1, 256, 256), 0.5), [0.1], [1, 3], generator=noise)
    >>> {r: round(psnr.item()) for r, psnr in curve.items()}
    {1: 20, 3: 30}
    """
    finite("x", _pictured("x", x))
    for k, sigma in enumerate(sigmas):
        at_least(f"sigmas[{k}]", sigma, 0, strict=True)
    fields = [integer("receptive_fields", field, 1) for field in receptive_fields]
    clean = wide(x.clone() if x.is_inference() else x)
    noise = normal(clean.shape, clean.dtype, clean.device, generator)
    curve = {}
    for field in fields:
        denoise, psnr = fit(field), []
        for sigma in sigmas:
            with torch.no_grad():
                found = floating(f"fit({field})(y)", denoise((clean + sigma * noise).to(x.dtype)))
                has_shape(f"fit({field})(y)", found, x.shape, "x")
                psnr.append(-10 * (wide(found) - clean).square().mean().log10())
        curve[field] = torch.stack(psnr) if psnr else clean.new_zeros(0)
    return curve
