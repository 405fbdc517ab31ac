"""What lowers or raises a Fréchet distance: which generated samples, and which parts of an image."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import finite
from posterity._models import evaluating
from posterity._precision import wide
from posterity.generative._sizes import height_width
from posterity.generative.frechet import (
    FeatureStats,
    _checked,
    _count,
    _distance,
    _factor,
    _inverse_root,
    _samples,
    add_to_stats,
    feature_stats,
)

__all__ = ["sample_influence", "sensitivity_map"]

AT_ONCE = 512  # rows, whose products stay in the cache


@torch.no_grad()
def sample_influence(real: FeatureStats, generated: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Return how the distance changes with the log weight of each generated sample.

    The lowest are those of which the distance asks for more, the highest those that it wants gone.

    Parameters
    ----------
    real : FeatureStats
        Of the real samples.
    generated : Tensor of shape (m, d)
        Features of the generated ones, at least 2.

    Returns
    -------
    Tensor of shape (m,), float64
        d FID / d log weight, where all weights are 1.

    Raises
    ------
    ValueError
        If sizes do not fit, or a value is not finite.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 3.

    Examples
    --------
    Of two samples the one that is farther from the real ones is wanted less:

    >>> import torch
    >>> from posterity.generative import feature_stats, sample_influence
    >>> real = feature_stats(torch.tensor([[-1.0], [1.0]]))
    >>> sample_influence(real, torch.tensor([[0.0], [2.0]]))
    tensor([-1.,  1.], dtype=torch.float64)
    """
    _checked("real", real)
    x = _samples("generated", generated)
    if x.shape[1] != len(real.mean):
        raise ValueError(f"generated must have as many features as real, {len(real.mean)}, got {x.shape[1]}")
    mean, cov, n = feature_stats(x)
    root = _factor(real.cov.double()).to(x.device)
    p, s, _ = torch.linalg.svd(root.mT @ _factor(cov), full_matrices=False)
    return _influence(
        x - mean, torch.ones_like(x[:, 0]), mean - real.mean.to(x), _inverse_root(root, p, s), float(n)
    )


@torch.inference_mode(False)
def sensitivity_map(
    extractor: nn.Module, layer: nn.Module, image: Shaped[Tensor, "b channels height width"], real: FeatureStats,
    generated: FeatureStats, *, size: int | tuple[int, int] | None = None,
) -> Float[Tensor, "b rows columns"]:  # fmt: skip
    """Return where the Fréchet distance looks at in generated images.

    An image is added to the generated set, and the distance differentiated for what ``layer`` gives: the map is the
    sum over channels of activation times the mean of the squared derivatives of the channel.

    Parameters
    ----------
    extractor : nn.Module
        ``extractor(image) -> (b, d)``; called in eval mode, its parameters, their flags and its modes stay as they are.
    layer : nn.Module
        A submodule of it that gives (b, c, h, w): the last convolution, say.
    image : Tensor of shape (b, channels, height, width)
        Images, each of which is looked at by itself.
    real, generated : FeatureStats
        Of features by the same extractor; the generated ones without the image.
    size : int or tuple of int, optional
        Height and width of the map; those of the image by default.

    Returns
    -------
    Tensor of shape (b, *size)
        Each map runs from 0 to 1; it is 0 where nothing differs. In the dtype of the activations.

    Raises
    ------
    ValueError
        If ``layer`` is not in ``extractor``, is not called exactly once or gives another shape, the features do not
        depend on it, or sizes do not fit.

    Notes
    -----
    1. The derivative for an image's features is scaled to length 1 before it goes down the network, so that none is lost
       in low precision; the scale of a map does not matter.
    2. Maps are resized bilinearly; the official code does so by Lanczos, of 8 bits.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.generative import feature_stats, sensitivity_map
    >>> conv = nn.Conv2d(1, 1, 1)
    >>> _ = nn.init.ones_(conv.weight), nn.init.zeros_(conv.bias)
    >>> extractor = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> stats = feature_stats(torch.tensor([[0.0], [1.0]]))
    >>> sensitivity_map(extractor, conv, torch.tensor([[[[0.0, 2.0], [4.0, 8.0]]]]), stats, stats)
    tensor([[[0.0000, 0.2500],
             [0.5000, 1.0000]]])
    """
    real, generated = (_apart(name, stats) for name, stats in (("real", real), ("generated", generated)))
    if len(real.mean) != len(generated.mean):
        raise ValueError(
            f"generated must have as many features as real, {len(real.mean)}, got {len(generated.mean)}"
        )
    if not isinstance(extractor, nn.Module):
        raise ValueError(f"extractor must be a module, got {type(extractor).__name__}")
    if not any(module is layer for module in extractor.modules()):
        raise ValueError(f"layer must be a module inside extractor, got {type(layer).__name__}")
    if not isinstance(image, Tensor) or image.ndim != 4 or not image.numel():
        shown = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image must have shape (b, channels, height, width), none of them 0, got {shown}")
    rows, columns = height_width(tuple(image.shape[2:]) if size is None else size)

    seen: list[Tensor | None] = []

    def cut(module: nn.Module, args: Any, out: Any) -> Any:
        """Let the graph begin at what the layer gives: nothing before it needs a derivative."""
        if not isinstance(out, Tensor) or not out.is_floating_point():
            seen.append(None)
            return out
        seen.append(leaf := out.detach().requires_grad_())
        return leaf.clone()  # which may be changed in place

    image = image.clone() if image.is_inference() else image.detach()
    with layer.register_forward_hook(cut), evaluating(extractor), torch.enable_grad():
        features = extractor(image)
    if len(seen) != 1:
        raise ValueError(f"layer must be called once when extractor is, was called {len(seen)} times")
    activation = seen[0]
    if activation is None or activation.ndim != 4 or len(activation) != len(image):
        shown = "another" if activation is None else tuple(activation.shape)
        raise ValueError(f"layer must give a floating-point tensor (b, c, h, w), gave {shown}")
    if not isinstance(features, Tensor) or tuple(features.shape) != (len(image), len(real.mean)):
        shown = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"extractor must return ({len(image)}, {len(real.mean)}) for image and real, returned {shown}"
        )
    if not features.requires_grad:
        raise ValueError(
            "what extractor returns must depend, differentiably, on what layer gives, but does not"
        )
    finite("what extractor returns", features.detach())
    slopes = torch.stack([_slope(row, real, generated) for row in features.detach()]).to(features)
    (gradient,) = torch.autograd.grad(features, activation, slopes)
    kept = wide(activation.detach())
    weight = wide(gradient).square().mean((2, 3), keepdim=True)
    weight = weight / weight.amax(1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
    found = (weight * kept).sum(1, keepdim=True)
    found = F.interpolate(found, (rows, columns), mode="bilinear", align_corners=False)[:, 0]
    found = found - found.amin((1, 2), keepdim=True)
    top = found.amax((1, 2), keepdim=True)
    return torch.where(top > 0, found / torch.where(top > 0, top, 1), 0).to(activation.dtype)


def _apart(name: str, stats: Any) -> FeatureStats:
    """Return checked statistics in float64 that need no gradient."""
    mean, cov, _ = _checked(name, stats)
    return FeatureStats(mean.detach().double().clone(), cov.detach().double().clone(), _count(stats))


def _slope(feature: Float[Tensor, " d"], real: FeatureStats, generated: FeatureStats) -> Float[Tensor, " d"]:
    """Return the direction in which a feature of one more image raises the distance, of length 1 or 0."""
    with torch.enable_grad():
        leaf = feature.to(generated.mean).requires_grad_()
        (slope,) = torch.autograd.grad(_distance(real, add_to_stats(generated, leaf)), leaf)
    return slope / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny)


def _influence(
    centred: Float[Tensor, "m d"], weights: Float[Tensor, " m"], gap: Float[Tensor, " d"],
    root: Float[Tensor, "d r"], total: float,
) -> Float[Tensor, " m"]:  # fmt: skip
    """Return d FID / d log weight of each sample, with A = I - root root^T.

    w_i [ (c_i^T A c_i - tr(A C)) / (W - 1) + 2 c_i^T (m - m_real) / W ], c_i the centred features.
    """
    slope = torch.eye(len(root), dtype=root.dtype, device=root.device) - root @ root.mT
    along = torch.cat([((rows @ slope) * rows).sum(1) for rows in centred.split(AT_ONCE)])  # c^T A c
    trace = (weights * along).sum() / (total - 1)
    return weights * ((along - trace) / (total - 1) + 2 * (centred @ gap) / total)
