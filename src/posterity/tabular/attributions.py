"""Attributions of hidden units: the gradient of each unit by each input, for every row at once.

Where h(x) = s_L(W_L ... s_1(W_1 x + b_1) ... + b_L) and every s is piecewise linear, as
ReLU and dropout are, the gradient of the units at a row is a product of weights and slopes,

    dh / dx = D_L W_L ... D_1 W_1,   D_l = diag of s_l' at that row,          (1)

made from the top down so that every product is one large matrix product over all rows.
Any other h takes one batched backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating
from posterity._precision import wide, widened

__all__ = ["latent_attributions"]


def latent_attributions(
    latent: Callable[[Tensor], Tensor], x: Float[Tensor, " n *shape"], *, create_graph: bool = True
) -> Float[Tensor, " n units inputs"]:
    """Return the gradient of every latent unit with respect to its row of inputs.

    An ``nn.Sequential`` of Linear, ReLU, LeakyReLU, Dropout and Identity has it in closed
    form, a product of weights and slopes; anything else takes one batched backward pass.

    Parameters
    ----------
    latent : callable
        Maps (n, ...) to (n, units): a module up to the activations of interest.
    x : Tensor of shape (n, ...)
        Inputs, at least one row.
    create_graph : bool, default=True
        Whether the result can be differentiated, as a penalty needs.

    Returns
    -------
    Tensor
        Of shape (n, units, inputs). Where rows see each other (batch normalisation in
        training) it is the gradient of a unit's sum over the batch.

    Raises
    ------
    ValueError
        If ``x`` is not floating or has no rows, or ``latent(x)`` is not (n, units).

    Examples
    --------
    >>> import torch
    >>> from posterity.tabular import latent_attributions
    >>> latent_attributions(lambda x: (x**2).sum(1, keepdim=True), torch.tensor([[1.0, 3.0]]))[0].detach()
    tensor([[2., 6.]])
    """
    return _attributions(latent, x, create_graph).to(x.dtype)


def _attributions(
    latent: Callable[[Tensor], Tensor], x: Float[Tensor, " n *shape"], create_graph: bool
) -> Float[Tensor, " n units inputs"]:
    """Return the attributions in float32 at least."""
    floating("x", x, "convert it, as in x.float()")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x must be (n, ...) with n and all sizes of at least 1, got {tuple(x.shape)}")
    layers = _piecewise_linear(latent) if x.ndim == 2 else None
    if layers is not None:
        with torch.set_grad_enabled(create_graph):
            return _closed_form(layers, wide(x))
    with torch.inference_mode(False):  # grad mode too
        if not x.requires_grad:
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        h = latent(x)
        if h.ndim != 2 or len(h) != len(x):
            raise ValueError(f"latent(x) must be ({len(x)}, units), got {tuple(h.shape)}")
        if not h.requires_grad:
            raise ValueError("latent(x) must depend on x by differentiable operations, got a constant")
        every = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)[:, None].expand(-1, len(h), -1)
        (a,) = torch.autograd.grad(
            h, x, every, is_grads_batched=True, create_graph=create_graph, materialize_grads=True
        )
    return wide(a).flatten(2).movedim(0, 1)


def _piecewise_linear(latent: Any) -> list[nn.Module] | None:
    """Return the layers of a network that has the closed form, else None."""
    if type(latent) is not nn.Sequential:
        return None
    layers: list[nn.Module] = []
    for layer in latent:
        nested = [layer] if type(layer) is not nn.Sequential else _piecewise_linear(layer)
        if nested is None:
            return None
        layers += nested
    known = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Identity)
    plain = all(type(layer) in known for layer in layers)  # not subclasses: their forward may differ
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in latent.modules())
    return layers if plain and not hooked and any(type(layer) is nn.Linear for layer in layers) else None


@widened
def _closed_form(layers: list[nn.Module], x: Float[Tensor, "n d"]) -> Float[Tensor, "n units d"]:
    """Return D_L W_L ... D_1 W_1, where the slopes D are constants for the gradient."""
    factors: list[Tensor] = []  # weights (out, in) and slopes (n, 1, width), from the input up
    with torch.no_grad():
        h = x
        for layer in layers:
            if isinstance(layer, nn.Linear):
                factors.append(layer.weight)
                h = F.linear(h, wide(layer.weight), None if layer.bias is None else wide(layer.bias))
            elif not isinstance(layer, nn.Identity):
                slope = _slope(layer, h)
                factors.append(slope[:, None])
                h = h * slope
    rows, jacobian = None, None  # from the top down: each product is one large matrix product
    for factor in map(wide, reversed(factors)):
        if factor.ndim == 2:
            jacobian = factor if jacobian is None else jacobian @ factor
        elif jacobian is None:
            rows = factor if rows is None else rows * factor
        else:
            jacobian = jacobian * factor
    assert jacobian is not None
    jacobian = jacobian.expand(len(x), -1, -1)
    return jacobian if rows is None else jacobian * rows.mT


def _slope(layer: nn.Module, h: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    if isinstance(layer, nn.Dropout):
        return F.dropout(torch.ones_like(h), layer.p, layer.training)
    low = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
    return torch.full_like(h, low).masked_fill_(h > 0, 1.0)
