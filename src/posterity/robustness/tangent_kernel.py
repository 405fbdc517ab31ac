"""Tangent kernels: what training on one input does to the output at another, for a network or an infinite one.

A gradient step on an input x' moves the output at x, to first order, in proportion to

    k(x, x') = < d f(x) / d theta, d f(x') / d theta >.                            (1)

For a network with weights `empirical_ntk` takes the gradients one input at a time. Its own gradient
needs no work for a pair: with weights w_ij on the entries, that of row x_i is

    d/dx_i < d f(x_i) / d theta, v_i >,   v_i = sum_j w_ij d f(x_j) / d theta,     (2)

one pass over the x_j and one double pass a row. For a fully connected ReLU network of infinite width
`relu_ntk` is the limit in closed form: with c_0 the cosine of two inputs and q their norms' product
over d,

    c_l+1 = (sqrt(1 - c_l^2) + (pi - arccos c_l) c_l) / pi,                        (3)
    t_l+1 = c_l+1 + t_l (pi - arccos c_l) / pi,   t_0 = c_0,   k = q t_depth.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from posterity._checks import finite, floating, has_shape, integer
from posterity._precision import wide

__all__ = ["empirical_ntk", "relu_ntk"]

KEPT = 2**26  # numbers of gradients that are kept rather than taken anew, half a gigabyte


def empirical_ntk(
    model: nn.Module,
    x1: Float[Tensor, " n *shape"],
    x2: Float[Tensor, " m *shape"],
    *,
    chunk_size: int = 256,
) -> Float[Tensor, "n m"]:
    """Return the tangent kernel of a network at its present weights, equation 1.

    Gradients, but no second ones, go through ``x1`` and ``x2`` (equation 2), and none through the weights.

    Parameters
    ----------
    model : nn.Module
        Maps (n, ...) to one output a row, (n,) or (n, 1). It is read in evaluation mode, in the wider
        of its dtype and that of the inputs, float32 at least. Frozen parameters do not enter.
    x1, x2 : Tensor of shape (n, ...) and (m, ...)
        Finite inputs.
    chunk_size : int, default=256
        Rows whose gradients are held at once, at least 1; twice as many, each as large as the model.

    Returns
    -------
    Tensor of shape (n, m)
        Of the dtype of ``x1``.

    Raises
    ------
    ValueError
        If the model has more than one output or no parameter to train, or an input does not fit.

    References
    ----------
    .. [1] Jacot, Gabriel, Hongler. Neural Tangent Kernel. NeurIPS 2018. Section 4.
    .. [2] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023.

    Examples
    --------
    A linear model moves by the inner product, and by 1 for its bias:

    >>> import torch
    >>> from posterity.robustness import empirical_ntk
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> empirical_ntk(torch.nn.Linear(2, 1), x, x)
    tensor([[ 6.,  4.],
            [ 4., 10.]])
    """
    x1, x2 = _rows("x1", x1), _rows("x2", x2)
    has_shape("x2", x2, (None, *x1.shape[1:]), "x1")
    tangent = Tangent(model, torch.promote_types(x1.dtype, x2.dtype), chunk_size)
    return tangent(x1, x2).to(x1.dtype)


def relu_ntk(
    x1: Float[Tensor, " n *shape"], x2: Float[Tensor, " m *shape"], *, depth: int = 2
) -> Float[Tensor, "n m"]:
    """Return the tangent kernel of an infinitely wide ReLU network, equation 3.

    Parameters
    ----------
    x1, x2 : Tensor of shape (n, ...) and (m, ...)
        Finite inputs; each is flattened to d numbers. Gradients go through both.
    depth : int, default=2
        Hidden layers, at least 0, which is the inner product over d. Weights have He's scaling, there
        is no bias, and all layers are trained.

    Returns
    -------
    Tensor of shape (n, m)
        Of the dtype of ``x1``, computed in float64. An input with itself has (depth + 1) |x|^2 / d.

    Raises
    ------
    ValueError
        If ``depth`` is negative or an input does not fit.

    Notes
    -----
    1. Where two inputs have one direction the angle between them has a kink, and there its gradient is 0.

    References
    ----------
    .. [1] Cho, Saul. Kernel Methods for Deep Learning. NeurIPS 2009. Section 2.
    .. [2] Jacot, Gabriel, Hongler. Neural Tangent Kernel. NeurIPS 2018. Theorem 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import relu_ntk
    >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # at right angles: 1/pi for one layer
    >>> relu_ntk(x, x, depth=1)
    tensor([[2.0000, 0.3183],
            [0.3183, 2.0000]])
    """
    integer("depth", depth, 0)
    x1, x2 = _rows("x1", x1), _rows("x2", x2)
    has_shape("x2", x2, (None, *x1.shape[1:]), "x1")
    d = math.prod(x1.shape[1:])
    if d == 0:
        raise ValueError(f"x1 must have numbers in its rows, got shape {tuple(x1.shape)}")
    (u1, norm1), (u2, norm2) = (_directions(full(x).reshape(len(x), d)) for x in (x1, x2))
    c = u1 @ u2.T
    t = c
    for _ in range(depth):
        same = c.abs() > 1 - 32 * torch.finfo(c.dtype).eps
        inside = c.masked_fill(same, 0.0)  # the slope of the arccosine at 1 has no bound
        angle = torch.where(same, math.pi * (c < 0).to(c), inside.arccos())
        sine = torch.where(same, torch.zeros_like(c), (1 - inside.square()).sqrt())
        straight = (math.pi - angle) / math.pi
        c, t = sine / math.pi + straight * c, t * straight
        t = t + c
    return (norm1[:, None] * norm2 / d * t).to(x1.dtype)


class Tangent:
    """A copy of a network as the kernel of its parameter gradients, in a dtype of its own."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, chunk_size: int = 256) -> None:
        self.chunk_size = integer("chunk_size", chunk_size, 1)
        floats = [value.dtype for value in model.parameters() if value.is_floating_point()]
        for each in (*floats, torch.float32):
            dtype = torch.promote_types(dtype, each)
        with torch.inference_mode(False):
            self.model = copy.deepcopy(model).to(dtype).eval()
            self.theta = {
                name: value.detach().clone()
                for name, value in self.model.named_parameters()
                if value.requires_grad
            }
        if not self.theta:
            raise ValueError("model must have a parameter that requires a gradient, has none")
        self.dtype, self.device = dtype, next(iter(self.theta.values())).device
        self.size = sum(value.numel() for value in self.theta.values())
        self.kept: tuple[Tensor, Tensor] | None = None  # inputs and their gradients

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the kernel, through which gradients go to the inputs."""
        home = x1.device
        with torch.inference_mode(False):
            alike = x1 is x2
            x1 = self._own(x1)
            x2 = x1 if alike else self._own(x2)
            for name, x in (("x1", x1), ("x2", x2)):
                self._one_output(name, x)
            gram: Any = _Gram.apply(self, x1, x2)
        return gram.to(home)

    def keep(self, x: Tensor) -> Tensor:
        """Return inputs whose gradients are from now on remembered, where they are not too many."""
        x = self._own(x)
        if len(x) * self.size <= KEPT:
            self._one_output("x", x)
            self.kept = (x, torch.cat([rows for _, rows in self.gradients(x)]))
        return x

    def gradients(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield gradients with respect to the parameters, flat, of some inputs at a time."""
        remembered = self.kept is not None and self.kept[0] is x
        for start in range(0, len(x), self.chunk_size):
            part = slice(start, min(start + self.chunk_size, len(x)))
            if remembered:
                yield part, self.kept[1][part]  # type: ignore[index]
                continue
            with self._exact():
                each = vmap(grad(self._output), (None, 0))(self.theta, x[part].detach())
            yield part, torch.cat([value.flatten(1) for value in each.values()], 1)

    def pull(self, x: Tensor, v: Tensor) -> Tensor:
        """Return d/dx_i of the derivative of the output at x_i along v_i, equation 2."""

        def along(x: Tensor, v: Tensor) -> Tensor:
            pieces = zip(self.theta.items(), v.split([t.numel() for t in self.theta.values()]), strict=True)
            change = {name: piece.view_as(value) for (name, value), piece in pieces}
            return jvp(lambda theta: self._output(theta, x), (self.theta,), (change,))[1]

        with self._exact():
            return vmap(grad(along))(x.detach(), v)

    def _output(self, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.model, theta, (x[None],)).reshape(())

    def _own(self, x: Tensor) -> Tensor:
        x = x.clone() if x.is_inference() else x
        return x.to(self.device, self.dtype)

    def _exact(self) -> Any:
        return torch.autocast(self.device.type, enabled=False)

    def _one_output(self, name: str, x: Tensor) -> None:
        with torch.no_grad(), self._exact():
            out = self.model(x[:1]) if len(x) else torch.zeros(0)
        if not isinstance(out, Tensor) or out.shape not in ((len(x[:1]),), (len(x[:1]), 1)):
            came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"model must have one output a row of {name}, (n,) or (n, 1), got {came} for 1 row"
            )


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tangent: Tangent, x1: Tensor, x2: Tensor) -> Tensor:
        ctx.tangent, ctx.inputs = tangent, (x1, x2)  # themselves, by which remembered gradients are known
        ctx.save_for_backward(x1, x2)
        gram = x1.new_zeros(len(x1), len(x2))
        for rows, left in tangent.gradients(x1):
            for columns, right in [(rows, left)] if _one_chunk(tangent, x1, x2) else tangent.gradients(x2):
                gram[rows, columns] = left @ right.T
        return gram

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _ = ctx.saved_tensors  # refuses inputs that were changed in place
        x1, x2 = ctx.inputs
        if x1 is x2:
            return None, _slope(ctx.tangent, x1, x1, weights + weights.T), None
        wanted = ctx.needs_input_grad
        first = _slope(ctx.tangent, x1, x2, weights) if wanted[1] else None
        return None, first, _slope(ctx.tangent, x2, x1, weights.T) if wanted[2] else None


def _slope(tangent: Tangent, x: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient at x of the weighted sum of the kernel with others, equation 2."""
    parts = [torch.zeros_like(x[:0])]
    for start in range(0, len(x), tangent.chunk_size):
        rows = slice(start, start + tangent.chunk_size)
        v = x.new_zeros(len(x[rows]), tangent.size)
        for columns, right in tangent.gradients(other):
            v += weights[rows, columns] @ right
        parts.append(tangent.pull(x[rows], v))
    return torch.cat(parts)


def _one_chunk(tangent: Tangent, x1: Tensor, x2: Tensor) -> bool:
    return x1 is x2 and len(x1) <= tangent.chunk_size


def full(x: Tensor) -> Tensor:
    """Return a tensor in float64, where the device has it."""
    return wide(x) if x.device.type == "mps" else x.double()


def _rows(name: str, x: Any) -> Tensor:
    floating(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have a row an input, (n, ...), got shape {tuple(x.shape)}")
    return finite(name, x)


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit rows and norms; a row of zeros stays one, with a gradient of 0."""
    norm = torch.linalg.vector_norm(x, dim=1)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))[:, None], norm
