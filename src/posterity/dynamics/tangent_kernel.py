r"""Tangent kernel of a network as it stands, and kernel regression with it.

To first order in its weights a network is a linear model whose features are the gradients of its
outputs, so that gradient descent on squared error is regression with the kernel

.. math:: K_{ab}(x, x') = \nabla_\theta f_a(x) \cdot \nabla_\theta f_b(x').      \qquad (1)

At the initial weights it is what a very wide, lazy network would do; at the trained weights
it is what a network would do that had those features from the start: regression from zero,

.. math:: \hat f(x) = K(x, X)\, (K(X, X) + \lambda I)^{-1} y.                    \qquad (2)

A layer z = W h contributes (h . h') (dz . dz') to (1), dz the gradient of an output in z: a
network of such layers needs no gradients of weights at all.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import jacrev, vmap

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._models import call, evaluating, state
from posterity._precision import rounding, wide
from posterity.dynamics.ntk_mlp import Factor, by_layer, row_of_layers

__all__ = ["empirical_ntk", "ntk_regression"]

MEMORY = 256 * 2**20  # bytes of Jacobian blocks, and of what making them takes, at a time
JITTER = 1e-10  # of the mean of the diagonal, where there is no ridge


def empirical_ntk(
    model: nn.Module,
    x1: Shaped[Tensor, " n1 *features"],
    x2: Shaped[Tensor, " n2 *features"] | None = None,
    *,
    params: dict[str, Tensor] | None = None,
    outputs: Literal["trace", "full"] = "trace",
    batch_size: int | None = None,
) -> Float[Tensor, "n1 m *outputs"]:
    """Return the tangent kernel (1) of a model between points.

    Gradients are with respect to the parameters that require one. The model is looked at in
    eval mode, one sample at a time where it is not a row of layers, and left as it was.

    Parameters
    ----------
    model : nn.Module
        Called with a batch, returns a value or values a sample; axes after the first are
        flattened to k outputs. Samples that ``torch.func.vmap`` cannot take together go one by one.
    x1, x2 : Tensor of shape (n1, ...) and (n2, ...)
        Points; without ``x2`` the kernel is that of ``x1`` with itself.
    params : dict of str to Tensor, optional
        Weights in place of the model's own, such as one member of `RegressionEnsemble.params`.
    outputs : {"trace", "full"}, default="trace"
        The mean of (1) over a = b, or all of it.
    batch_size : int, optional
        Samples of a Jacobian block, at least 1. By default as many as keep blocks, and what making
        them takes, within 256 MiB; a single gradient that needs more is made alone.

    Returns
    -------
    Tensor
        Shape (n1, n2), or (n1, n2, k, k) whose entry [i, j, a, b] is (1) for x1[i] and
        x2[j]; on the device of ``x1`` and in the dtype of the model, without a gradient.

    Raises
    ------
    ValueError
        If points are empty or not finite, the model has nothing to train, ``params`` names or
        shapes are not its own, or an option is out of range.

    Notes
    -----
    1. ``nn.Sequential`` of ``nn.Linear`` and elementwise functions, and `NTKMLP`, without hooks or
       shared weights, go by the sum over layers and hold activations only.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import empirical_ntk
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> empirical_ntk(torch.nn.Linear(2, 1), x)  # x . x' + 1, the bias's
    tensor([[2., 2.],
            [2., 6.]])
    """
    _model(model)
    _points("x1", x1)
    if x2 is not None:
        _points("x2", x2, x1)
    one_of("outputs", outputs, ("trace", "full"))
    if batch_size is not None:
        integer("batch_size", batch_size, 1)
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), torch.get_default_dtype())
    with at_work(model, device=x1.device):
        kernel = _kernel(*_weights(model, params), model, x1, x2, outputs, batch_size)
    return kernel.to(dtype)


def ntk_regression(
    model: nn.Module,
    x: Shaped[Tensor, " n *features"],
    y: Float[Tensor, "n k"],
    x_test: Shaped[Tensor, " n_test *features"],
    *,
    params: dict[str, Tensor] | None = None,
    ridge: float = 0.0,
    outputs: Literal["trace", "full"] = "trace",
    start: Literal["zero", "network"] = "zero",
    batch_size: int | None = None,
) -> Float[Tensor, "n_test k"]:
    """Return what regression with the model's tangent kernel, equation (2), predicts.

    Parameters
    ----------
    model : nn.Module
        As `empirical_ntk` takes it, with k outputs.
    x : Tensor of shape (n, ...)
        Training points, no two alike unless there is a ridge.
    y : Tensor of shape (n, k)
        Their targets.
    x_test : Tensor of shape (n_test, ...)
        Where to predict.
    params : dict of str to Tensor, optional
        Weights in place of the model's own.
    ridge : float, default=0.0
        Added to the diagonal of the kernel, at least 0; at 0 the diagonal gets 1e-10 of its
        mean, or a rounding of the dtype where that is more.
    outputs : {"trace", "full"}, default="trace"
        One kernel for all outputs, or the kernel of each pair of them.
    start : {"zero", "network"}, default="zero"
        The function that regression starts from: 0, or the model's, to which (2) of its
        residuals is then added.
    batch_size : int, optional
        As for `empirical_ntk`.

    Returns
    -------
    Tensor of shape (n_test, k)
        On the device of ``x``, in the dtype of the model.

    Raises
    ------
    ValueError
        If an argument does not fit, or rows of ``x`` are equal and there is no ridge.

    Notes
    -----
    1. The official script starts regression with the final kernel from the trained network, which
       has no residual left and so predicts itself, whatever the kernel: here ``start="network"``.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import ntk_regression
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    >>> ntk_regression(torch.nn.Linear(1, 1), x, y, torch.tensor([[4.0]])).round(decimals=3)
    tensor([[9.]])
    """
    _model(model)
    n = _points("x", x)
    k = has_shape(
        "y", floating("y", y), (n, None), "x (if it has one value a sample, give y[:, None])"
    ).shape[1]
    finite("y", y)
    if k == 0:
        raise ValueError(f"y must have at least one column, got {tuple(y.shape)}")
    n_test = _points("x_test", x_test, x, "x")
    at_least("ridge", ridge, 0)
    one_of("outputs", outputs, ("trace", "full"))
    one_of("start", start, ("zero", "network"))
    if batch_size is not None:
        integer("batch_size", batch_size, 1)
    if ridge == 0:
        _no_twins(x)
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), torch.get_default_dtype())
    with at_work(model, device=x.device):
        weights = _weights(model, params)
        first = [_values(*weights, model, ordinary(points)) for points in (x, x_test)]
        if first[0].shape[1] != k:
            raise ValueError(
                f"y must have a column for each output of model, got {k} for {first[0].shape[1]}"
            )
        kernel = _kernel(*weights, model, x, None, outputs, batch_size)
        across = _kernel(*weights, model, x_test, x, outputs, batch_size)
        if start == "zero":
            first = [torch.zeros_like(value) for value in first]
        if outputs == "full":  # rows are samples, then outputs
            kernel, across = (part.transpose(1, 2).flatten(2).flatten(0, 1) for part in (kernel, across))
        residual = (y.to(x.device) - first[0]).reshape(len(kernel), -1)
        moved = _double(across) @ _solve(kernel, _double(residual), ridge)
        return (_double(first[1]) + moved.reshape(n_test, k)).to(dtype)


def _solve(kernel: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Return (kernel + ridge)^-1 target, in float64 where the device has it."""
    mean = kernel.diagonal().mean()
    if not bool(kernel.isfinite().all()):
        raise ValueError("model must have finite gradients at x, its kernel is NaN or infinite")
    diagonal = ridge or float(mean) * rounding(kernel.dtype, JITTER)
    system = _double(kernel)
    system = system + diagonal * torch.eye(len(system), dtype=system.dtype, device=system.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not bool(failed):
        return torch.cholesky_solve(target, factor)
    # as few significant directions as the kernel has: least squares of the symmetric matrix
    return torch.linalg.pinv(system, hermitian=True, rtol=rounding(kernel.dtype, JITTER)) @ target


class _Weights(NamedTuple):
    params: dict[str, Tensor]
    rest: dict[str, Tensor]


@contextmanager
def at_work(*models: nn.Module, device: torch.device) -> Iterator[None]:
    """Let gradients be taken whatever surrounds the call, of models in eval mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for model in models:
            stack.enter_context(evaluating(model))
        yield


def ordinary(x: Tensor) -> Tensor:
    """Return a tensor that gradients may pass through: of float32 at least, not of inference mode."""
    x = x.detach()
    return wide(x.clone() if x.is_inference() else x)


def _weights(model: nn.Module, params: dict[str, Tensor] | None) -> _Weights:
    """Return what trains and what does not, with the weights that the caller gave."""
    own, rest = state(model)
    if not any(p.numel() for p in own.values()):
        raise ValueError("model must have a parameter that requires a gradient, got none")
    for name, value in (params or {}).items():
        part = own if name in own else rest
        if name not in part:
            raise ValueError(f"params must have names of model's parameters, got {name!r}")
        if part[name].shape != value.shape:
            raise ValueError(
                f"params must have shape {tuple(part[name].shape)} at {name!r}, got {tuple(value.shape)}"
            )
        part[name] = value.to(part[name].device)
    return _Weights(*({name: ordinary(value) for name, value in part.items()} for part in (own, rest)))


def _values(params: dict[str, Tensor], rest: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """Return the model's values at points, (n, k)."""
    with torch.no_grad():
        return _flat(call(model, {**params, **rest}, x), len(x))


def _flat(out: Any, n: int) -> Tensor:
    if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != n or not out.is_floating_point():
        came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model must return a float tensor with a row for each of {n} samples, got {came}")
    return out.reshape(n, -1)


def _kernel(
    params: dict[str, Tensor], rest: dict[str, Tensor], model: nn.Module, x1: Tensor, x2: Tensor | None,
    outputs: str, batch_size: int | None,
) -> Tensor:  # fmt: skip
    """Return the kernel from products of Jacobian blocks: some samples, and of many outputs some."""
    x1, x2 = ordinary(x1), None if x2 is None else ordinary(x2)
    width = _values(params, rest, model, x1[:1]).shape[1]
    if width == 0:
        raise ValueError("model must have at least one output a sample, got none")
    layers = row_of_layers(model) if x1.ndim == 2 else None
    if layers is not None:
        block: Callable[[Tensor, slice], list[Factor]] = by_layer(layers, params, rest)
        sizes = [p.shape for p in (*params.values(), *rest.values()) if p.ndim == 2]
        fixed, each = sum(map(sum, sizes)), 2 * sum(n_out for n_out, _ in sizes)  # with what backward leaves
    else:
        block = _by_jacobian(model, params, rest)
        fixed, each = _activations(model, params, rest, x1[:1]), sum(p.numel() for p in params.values())
    size = next(iter(params.values())).element_size()
    share = MEMORY // 4 // size  # of two blocks, each of which takes its own size again while it is made
    some = width if batch_size else min(width, max(1, share // max(1, each)))
    square = math.isqrt(share) // (some if outputs == "full" else 1)
    rows = batch_size or max(1, min(share // (fixed + each * some), square))

    def parts(n: int) -> list[tuple[slice, slice]]:
        return [(slice(i, min(i + rows, n)), slice(a, min(a + some, width)))
                for i in range(0, n, rows) for a in range(0, width, some)]  # fmt: skip

    other = x1 if x2 is None else x2
    shape = (len(x1), len(other)) + ((width, width) if outputs == "full" else ())
    kernel = torch.zeros(shape, dtype=next(iter(params.values())).dtype, device=x1.device)
    for i, (here, a) in enumerate(parts(len(x1))):
        left = right = []  # lets the last blocks go before the next is made
        left = block(x1[here], a)
        for j, (there, b) in enumerate(parts(len(other))):
            if (outputs == "trace" and a != b) or (x2 is None and j < i):
                continue
            right = []
            right = left if x2 is None and i == j else block(other[there], b)
            product = _product(left, right, outputs == "full")
            if outputs == "full":
                kernel[here, there, a, b] = product
                if x2 is None and i != j:
                    kernel[there, here, b, a] = product.permute(1, 0, 3, 2)
            else:
                kernel[here, there] += product / width
                if x2 is None and i != j:
                    kernel[there, here] += product.T / width
    return kernel


def _product(left: list[Factor], right: list[Factor], full: bool) -> Tensor:
    total: Any = 0
    for one, two in zip(left, right, strict=True):
        if full:
            inner = one.right.flatten(0, 1) @ two.right.flatten(0, 1).T
            inner = inner.reshape(*one.right.shape[:2], *two.right.shape[:2]).transpose(1, 2)
        else:
            inner = one.right.flatten(1) @ two.right.flatten(1).T
        if one.left is not None and two.left is not None:
            inner = inner * (one.left @ two.left.T).reshape(*inner.shape[:2], *[1] * (inner.ndim - 2))
        total = total + inner
    return total


def _by_jacobian(
    model: nn.Module, params: dict[str, Tensor], rest: dict[str, Tensor]
) -> Callable[[Tensor, slice], list[Factor]]:
    """Return what gives the gradients of all parameters at samples, by ``vmap`` of ``jacrev``, or of one by one."""

    def block(x: Tensor, outputs: slice) -> list[Factor]:
        def one(p: dict[str, Tensor], point: Tensor) -> Tensor:
            return call(model, {**p, **rest}, point[None]).flatten()[outputs]

        try:
            jacobian = vmap(jacrev(one), in_dims=(None, 0))(params, x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an RNN, or control flow on values; any other error is met again
            each = [_alone(partial(one, point=point), params) for point in x]
            jacobian = {name: torch.stack([part[name] for part in each]) for name in params}
        return [Factor(None, jacobian.pop(name).detach().flatten(2)) for name in list(jacobian)]

    return block


def _alone(function: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the Jacobian of a vector, by a gradient for each of its entries."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    out = function(leaves)
    rows = [
        torch.autograd.grad(
            value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for value in out
    ]
    return {name: torch.stack(part) for name, part in zip(leaves, zip(*rows, strict=True), strict=True)}


def _activations(model: nn.Module, params: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor) -> int:
    """Return how many numbers the model keeps of one sample for its gradients."""
    weights = {name: p.clone().requires_grad_() for name, p in params.items()}
    known, kept = {p.data_ptr() for p in weights.values()}, [0]

    def keep(saved: Tensor) -> Tensor:
        kept[0] += 0 if saved.data_ptr() in known else saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        call(model, {**weights, **rest}, x)
    return kept[0]


def _double(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def _model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")


def _points(name: str, x: Any, like: Tensor | None = None, source: str = "x1") -> int:
    """Return the number of points; ``like`` is what they must be like."""
    if not isinstance(x, Tensor) or x.ndim == 0 or x.numel() == 0:
        came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor with at least one row and one feature, got {came}")
    if like is not None:
        has_shape(name, x, (None, *like.shape[1:]), source)
        if x.device != like.device:
            raise ValueError(f"{name} must be on the device of {source}, got {x.device} for {like.device}")
    return len(finite(name, x))


def _no_twins(x: Tensor) -> None:
    """Refuse points that are given twice, at which no kernel can be inverted."""
    kinds = x.flatten(1).unique(dim=0, return_inverse=True)[1].tolist() if x.ndim > 1 else x.tolist()
    first: dict[Any, int] = {}
    for row, kind in enumerate(kinds):
        if first.setdefault(kind, row) != row:
            raise ValueError(
                f"x must not have equal rows at ridge=0, got rows {first[kind]} and {row}: leave one out or set ridge"
            )
