"""Exact derivatives of continuous images: gradient and Laplacian at any coordinates.

For any f(image, coords) whose value at a coordinate depends on no other coordinate,

    grad f = (df/dx, df/dy),   lap f = d2f/dx2 + d2f/dy2,                      (1)

by differentiation of the program, with respect to coordinates in [-1, 1]. Per pixel, divide by
w / 2 and h / 2, for the Laplacian by their squares. The gradient goes backward, a pass a channel.
The Laplacian of a `FunkNN` goes forward with its values and slopes, all channels at once, for some
four times the work of a value; that of another f takes two passes backward a channel and axis.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape
from posterity._precision import wide
from posterity.generative.funknn import FunkNN
from posterity.generative.image_interpolation import check_image, patch_jet

__all__ = ["image_gradient", "image_laplacian"]


def image_gradient(
    net: Callable[..., Any], image: Float[Tensor, "n c h w"], coords: Float[Tensor, "#n m 2"], *,
    create_graph: bool = True,
) -> Float[Tensor, "n m channels 2"]:  # fmt: skip
    """Return the gradient of a continuous image.

    Parameters
    ----------
    net : callable
        ``net(image, coords)`` of shape (n, m, channels), such as a ``FunkNN``; each value depends
        on its own coordinate only. A module is used in the mode it is in.
    image : Tensor of shape (n, c, h, w)
        What the network interpolates.
    coords : Tensor of shape (n, m, 2) or (1, m, 2)
        (x, y) in [-1, 1].
    create_graph : bool, default=True
        Whether the result can be differentiated, in the image, the network's parameters and
        the coordinates.

    Returns
    -------
    Tensor of shape (n, m, channels, 2)
        d/dx and d/dy, with respect to the coordinates.

    Raises
    ------
    ValueError
        If shapes do not fit, or the values do not depend on the coordinates.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 4.

    Examples
    --------
    A ramp of j over eight columns rises by 1 a pixel, by 4 a unit of [-1, 1]:

    >>> import torch
    >>> from posterity.generative import FunkNN, image_gradient
    >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    >>> image_gradient(FunkNN(1), ramp, torch.zeros(1, 1, 2), create_graph=False).squeeze()
    tensor([4., 0.])
    """
    check_image(image, coords)
    with _graphs(image, coords) as (image, coords):
        at = coords.expand(len(image), -1, -1)
        at = at if at.requires_grad else at.clone().requires_grad_()
        value = floating("net(image, coords)", net(image, at))
        has_shape("net(image, coords)", value, (*at.shape[:2], None), "image and coords")
        if not value.requires_grad:
            raise ValueError(NO_COORDS)
        parts = []
        for k in range(value.shape[2]):
            keep = create_graph or k + 1 < value.shape[2]
            (part,) = torch.autograd.grad(
                value[..., k].sum(), at, create_graph=create_graph, retain_graph=keep, allow_unused=True
            )
            if part is None:
                raise ValueError(NO_COORDS)
            parts.append(part)
    return torch.stack(parts, 2) if parts else value.new_zeros(*value.shape, 2)


def image_laplacian(
    net: Callable[..., Any], image: Float[Tensor, "n c h w"], coords: Float[Tensor, "#n m 2"], *,
    create_graph: bool = True,
) -> Float[Tensor, "n m channels"]:  # fmt: skip
    """Return the Laplacian of a continuous image.

    A network of ReLUs adds what it does to the derivatives of the patch only; for its own
    curvature take ``activation="sin"``.

    Parameters
    ----------
    net : callable
        ``net(image, coords)`` of shape (n, m, channels), such as a ``FunkNN``; each value depends
        on its own coordinate only. A module is used in the mode it is in.
    image : Tensor of shape (n, c, h, w)
        What the network interpolates.
    coords : Tensor of shape (n, m, 2) or (1, m, 2)
        (x, y) in [-1, 1].
    create_graph : bool, default=True
        Whether the result can be differentiated, in the image, the network's parameters and
        the coordinates.

    Returns
    -------
    Tensor of shape (n, m, channels)
        Sum of the second derivatives, with respect to the coordinates.

    Raises
    ------
    ValueError
        If shapes do not fit, the values do not depend on the coordinates, or the network
        interpolates with ``kernel="bilinear"``, which has no second derivative.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 4.

    Examples
    --------
    j^2 over eight columns curves by 2 a pixel squared, by 32 in units of [-1, 1]:

    >>> import torch
    >>> from posterity.generative import FunkNN, image_laplacian
    >>> bowl = torch.arange(8.0).square().expand(1, 1, 8, 8)
    >>> image_laplacian(FunkNN(1), bowl, torch.zeros(1, 1, 2), create_graph=False).item()
    32.0
    """
    check_image(image, coords, net.channels if isinstance(net, FunkNN) else None)
    modules = net.modules() if isinstance(net, nn.Module) else ()
    if any(isinstance(module, FunkNN) and module.kernel == "bilinear" for module in modules):
        raise ValueError(
            "net must have kernel='cubic' or 'cubic6', got 'bilinear', which has no second derivative"
        )
    with _graphs(image, coords) as (image, coords):
        with torch.set_grad_enabled(create_graph):
            if isinstance(net, FunkNN) and _as_made(net):
                return _forward(net, image, coords)
        return _backward(net, image, coords, create_graph)


NO_COORDS = "net(image, coords) must depend on coords, got values without a gradient in them"


@contextmanager
def _graphs(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield tensors of which graphs can be made, also for a caller who has switched that off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield [x.clone() if x.is_inference() else x for x in tensors]


def _backward(net: Callable[..., Any], image: Tensor, coords: Tensor, create_graph: bool) -> Tensor:
    """Return the Laplacian by two passes backward, channel by channel."""
    at = coords.expand(len(image), -1, -1)
    at = at if at.requires_grad else at.clone().requires_grad_()
    slopes = image_gradient(net, image, at)
    channels = []
    for k in range(slopes.shape[2]):
        second = torch.zeros_like(at[..., 0])
        for d in (0, 1):
            slope = slopes[:, :, k, d]
            (part,) = (
                torch.autograd.grad(
                    slope.sum(), at, create_graph=create_graph, retain_graph=True, allow_unused=True
                )
                if slope.requires_grad
                else (None,)
            )
            second = second if part is None else second + part[..., d]  # None: a plane
        channels.append(second)
    return torch.stack(channels, 2) if channels else slopes[..., 0]


def _as_made(net: nn.Module) -> bool:
    """Return whether a network is a `FunkNN` with its own layers, none replaced and none with hooks."""
    plain = (FunkNN, nn.ModuleList, nn.Linear, nn.Conv2d)
    return type(net) is FunkNN and not any(
        type(module) not in plain or module._forward_hooks or module._forward_pre_hooks
        for module in net.modules()
    )


def _forward(net: FunkNN, image: Tensor, coords: Tensor) -> Tensor:
    """Return the Laplacian of a `FunkNN` in one pass: value, slopes and Laplacian go through the layers together.

    They are rows 0, 1, 2 and 3 of x. Of a layer's activation a, with z before it,

        lap a(z) = a'(z) lap z + a''(z) ((dz/dx)^2 + (dz/dy)^2).
    """
    dtype = torch.promote_types(net.patch_scale.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        jet = patch_jet(wide(image), wide(coords), net.patch_size, wide(net.patch_scale), net.kernel)
        middle = net.patch_size // 2
        centre = jet[3][..., middle, middle]
        x = torch.stack(jet).flatten(1, 2).to(dtype)  # (4, n * m, c, p, p)
        for k, conv in enumerate(net.convs):
            z = _affine(lambda v, w: F.conv2d(F.pad(v, (0, 1, 0, 1)), w), conv, x, dtype)
            before, x = x, _activated(z, None if net.omega is None else 1.0)
            if k % 4 == 3:
                x = _pooled(x)
            elif k:
                x = x + before
        x = x.flatten(2)
        *layers, last = net.layers
        for k, layer in enumerate(layers):
            x = _activated(
                _affine(F.linear, layer, x, dtype), None if net.omega is None else net.omega[k].to(dtype)
            )
        learned = F.linear(x[3], last.weight.to(dtype))  # type: ignore[arg-type]
        return (learned.view(centre.shape).to(centre.dtype) + centre).to(image.dtype)


def _affine(product: Callable[[Tensor, Tensor], Tensor], layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a layer makes of values and derivatives; these do not see its bias."""
    z = product(x.flatten(0, 1), layer.weight.to(dtype)).unflatten(0, x.shape[:2])
    bias = layer.bias.to(dtype).view(-1, *[1] * (z.ndim - 3))
    return torch.cat([z[:1] + bias, z[1:]])


def _activated(z: Tensor, omega: Any) -> Tensor:
    if omega is None:
        return z * (z[:1] > 0)
    z = omega * z
    sin, cos = z[0].sin(), z[0].cos()
    return torch.stack([sin, cos * z[1], cos * z[2], cos * z[3] - sin * (z[1].square() + z[2].square())])


def _pooled(x: Tensor) -> Tensor:
    """Return the maxima of blocks of 2 x 2, and the derivatives there."""
    values, at = F.max_pool2d(x[0], 2, return_indices=True)
    others = [each.flatten(2).gather(2, at.flatten(2)).view(values.shape) for each in x[1:]]
    return torch.stack([values, *others])
