r"""Learning rates as a function of the batch size: what the noise of a batch does to the Hessian's ends.

The Hessian of a batch of B samples out of N is the whole set's plus noise that averages out,

.. math:: H_B = H + E / \sqrt b, \qquad b = \frac{B}{1 - B/N},

with E a random symmetric matrix of P x P entries of variance s^2. Random matrix theory (a spiked Wigner
matrix) says where an eigenvalue l of H that stands apart then lies:

.. math:: l' = l + \frac{P s^2}{b\, l} \quad\text{if}\ |l| > s \sqrt{P/b}, \qquad
          \text{else at the edge of the noise},\ \pm 2 s \sqrt{P/b}.

So a batch is sharper than the data, by as much as 1/b, and gradient descent with it is stable up to
2 / l' only: in proportion to B while noise rules, flat when it has gone. Adam divides by the curvature and
is limited by the edge of the noise: its rates go as the root of B.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from posterity._checks import at_least, integer, one_of, within
from posterity._models import by_sample
from posterity._random import draw_device
from posterity.optimization.flat_network import Batch, _exactly, _Flat
from posterity.optimization.hessian_spectra import Generator, extreme_eigenvalues, hessian_matvec

__all__ = [
    "HessianVariance", "batch_extremes", "effective_batch", "hessian_variance", "max_learning_rate",
    "scale_learning_rate",
]  # fmt: skip

_AT_ONCE = 2**23  # numbers in the products of a chunk of samples


class HessianVariance(NamedTuple):
    """How much the Hessians of single samples differ, and the ends of their mean.

    Attributes
    ----------
    isotropic : Tensor of shape ()
        P s^2 of noise that is alike in all directions, E ||H_i - H||_F^2 / P.
    top, bottom : Tensor of shape ()
        What takes its place at the eigenvectors v of the ends, E ||(H_i - H) v||^2 - E (v' (H_i - H) v)^2.
    top_value, bottom_value : Tensor of shape ()
        The largest and the smallest eigenvalue of H.
    """

    isotropic: Float[Tensor, ""]
    top: Float[Tensor, ""]
    bottom: Float[Tensor, ""]
    top_value: Float[Tensor, ""]
    bottom_value: Float[Tensor, ""]


def hessian_variance(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Batch, *, n_probes: int = 8, max_samples: int = 1024,
    n_iter: int = 50, generator: Generator = None,
) -> HessianVariance:  # fmt: skip
    """Return the variance of a sample's Hessian, from products alone.

    The noise of networks is far from isotropic: it has low rank and lies along H's own top. So two numbers
    beside the isotropic one say what it does to the largest and to the smallest eigenvalue.

    Parameters
    ----------
    model : nn.Module
        In eval mode, if it has dropout or batch normalisation. It is not changed.
    loss_fn : callable
        ``loss_fn(model, *batch)`` is the mean loss of a batch, a scalar; here also of batches of one.
    data : tuple of Tensor
        Samples in their first axis, all of one length of at least 2.
    n_probes : int, default=8
        Random directions for the isotropic variance, at least 1.
    max_samples : int, default=1024
        Of more samples so many are drawn, and stand for all; at least 2.
    n_iter : int, default=50
        Lanczos steps for the ends, at least 1.
    generator : torch.Generator, optional
        Draws samples and directions.

    Returns
    -------
    HessianVariance
        In float32 at least.

    Raises
    ------
    ValueError
        If data have different lengths or fewer than 2 samples, a number is out of range, or as `hessian_matvec`.

    Notes
    -----
    1. Variances have the divisor n - 1: then a batch drawn without replacement has exactly that over b.
    2. Samples go through ``torch.func.vmap``, a chunk at a time; one by one where a module does not allow it.

    References
    ----------
    .. [1] Granziol, Zohren, Roberts. Learning Rates as a Function of Batch Size: A Random Matrix Theory
       Approach to Neural Network Training. JMLR 2022.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import hessian_variance
    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> found = hessian_variance(model, lambda model, x: model(x).square().mean() / 2, (x,))
    >>> round(float(found.top_value), 3), round(float(found.top), 3)  # H = diag(2, 1/2): noise turns no eigenvector
    (2.0, 0.0)
    """
    n = _length(data)
    integer("n_probes", n_probes, 1)
    integer("max_samples", max_samples, 2)
    integer("n_iter", n_iter, 1)
    flat = _Flat(model, loss_fn)
    if n > max_samples:
        rows = torch.randperm(n, device=draw_device(generator), generator=generator)[:max_samples]
        data = tuple(x[rows.to(x.device)] for x in data)
        n = max_samples
    theta, kind = flat.theta, {"dtype": flat.theta.dtype, "device": flat.theta.device}
    low, high, v_low, v_high = extreme_eigenvalues(
        hessian_matvec(model, loss_fn, data), len(theta), n_iter=n_iter, generator=generator, **kind
    )
    kind["device"] = draw_device(generator, theta.device)
    probes = torch.randn(n_probes, len(theta), generator=generator, **kind).to(theta)
    with _exactly(theta), torch.no_grad():
        directions = torch.cat([v_high[None], v_low[None], probes])
        spread, along = _spread(flat, flat.read(data), directions)
    isotropic = spread[2:].mean() / len(theta)
    top, bottom = (spread[:2] - along[:2]).clamp_min(0)
    return HessianVariance(isotropic, top, bottom, high, low)


def _spread(flat: _Flat, data: list[Tensor], directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each direction v the variances over samples of H_i v, a sum over entries, and of v' H_i v."""
    theta = flat.theta

    def one(*sample: Tensor) -> Tensor:
        pull = vjp(grad(lambda theta: flat(theta, *(x[None] for x in sample))), theta)[1]  # H_i is symmetric
        return vmap(lambda v: pull(v)[0])(directions)

    n = 0
    mean, spread, along = torch.zeros_like(directions), directions.new_zeros(()), directions.new_zeros(())
    for chunk in zip(*(x.split(max(1, _AT_ONCE // directions.numel())) for x in data), strict=True):
        images = by_sample(one, *chunk)  # (samples, directions, P)
        size = len(images)
        shift = images.mean(0) - mean  # variances of chunks, joined: no difference of large numbers
        inner = images - images.mean(0)
        share = n * size / (n + size)
        spread = spread + inner.square().sum((0, 2)) + share * shift.square().sum(1)
        along = (
            along + (inner * directions).sum(2).square().sum(0) + share * (shift * directions).sum(1).square()
        )
        mean, n = mean + shift * (size / (n + size)), n + size
    return spread / (n - 1), along / (n - 1)


def effective_batch(batch_size: int, n_samples: int | None = None) -> float:
    """Return b = B / (1 - B/N): how large a batch of fresh samples would be as noisy.

    Parameters
    ----------
    batch_size : int
        B, at least 1 and at most N.
    n_samples : int, optional
        N, of the set that batches are drawn from without replacement. None: samples come fresh, b = B.

    Returns
    -------
    float
        Infinite for the whole set.

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> from posterity.optimization import effective_batch
    >>> effective_batch(50, 100), effective_batch(100, 100), effective_batch(50)
    (100.0, inf, 50.0)
    """
    size = integer("batch_size", batch_size, 1)
    if n_samples is None:
        return float(size)
    n = integer("n_samples", n_samples, 1)
    if size > n:
        raise ValueError(f"batch_size must be at most n_samples, got {size} for {n}")
    return math.inf if size == n else size / (1 - size / n)


def batch_extremes(value: Tensor | float, variance: Tensor | float, b: Tensor | float) -> Tensor:
    """Return where an outermost eigenvalue lies in the Hessian of a batch.

    Parameters
    ----------
    value : Tensor or float
        l, the largest or the smallest eigenvalue of the whole set's Hessian.
    variance : Tensor or float
        P s^2 there, at least 0: ``top``, ``bottom`` or ``isotropic`` of `hessian_variance`.
    b : Tensor or float
        `effective_batch`, positive; may be infinite. The three broadcast.

    Returns
    -------
    Tensor
        ``value + variance / (b value)`` where ``|value| > sqrt(variance / b)``, else the noise's edge
        ``2 sqrt(variance / b)`` with the sign of ``value``, which for 0 is positive. In float32 at least.

    Raises
    ------
    ValueError
        If ``value`` is not finite, ``variance`` negative or not finite, ``b`` not positive, or shapes do not
        broadcast.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import batch_extremes
    >>> batch_extremes(torch.tensor([8.0, -4.0, 1.0]), 4.0, 1.0)
    tensor([ 8.5000, -5.0000,  4.0000])
    """
    values, variances, sizes = _together(value=value, variance=variance, b=b)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("value must be finite, got NaN or infinity")
    if not bool(((variances >= 0) & torch.isfinite(variances)).all()):
        raise ValueError("variance must be at least 0 and finite, got another value")
    if not bool((sizes > 0).all()):
        raise ValueError("b must be greater than 0, got another value")
    edge = variances.sqrt() / sizes.sqrt()  # half the noise's; no overflow of variance / b
    outside = values.abs() > edge
    moved = values + edge * (edge / torch.where(outside, values, 1.0))
    return torch.where(outside, moved, torch.where(values < 0, -2 * edge, 2 * edge))


def max_learning_rate(
    variance: HessianVariance, batch_size: int, n_samples: int | None = None, *,
    optimizer: Literal["sgd", "adam"] = "sgd", momentum: float = 0.0, damping: float = 1e-8,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the largest stable learning rate for a batch size.

    Parameters
    ----------
    variance : HessianVariance
        Of the network as it is now: sharpness changes in training, and with it the rate.
    batch_size : int
        B, at least 1.
    n_samples : int, optional
        N, as in `effective_batch`.
    optimizer : {"sgd", "adam"}, default="sgd"
        SGD: ``2 (1 + momentum) / l'``, with l' from `batch_extremes` and ``variance.top``. Adam and its kin:
        ``1 / (2 sqrt(variance.isotropic / b) + damping)``, right up to a constant that nothing here can
        know: use it only to compare batch sizes.
    momentum : float, default=0.0
        Of SGD, in [0, 1).
    damping : float, default=1e-8
        Adam's epsilon, at least 0.

    Returns
    -------
    Tensor of shape ()
        Infinite where nothing limits it: no curvature and no noise.

    Raises
    ------
    ValueError
        If a number is out of range, or Adam is given a momentum.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import HessianVariance, max_learning_rate
    >>> found = HessianVariance(*map(torch.tensor, (4.0, 16.0, 4.0, 2.0, -1.0)))
    >>> [round(float(max_learning_rate(found, size)), 3) for size in (1, 2, 4, 64, 1024)]
    [0.25, 0.354, 0.5, 0.941, 0.996]
    """
    one_of("optimizer", optimizer, ("sgd", "adam"))
    within("momentum", momentum, 0, 1, open_high=True)
    at_least("damping", damping, 0)
    b = effective_batch(batch_size, n_samples)
    if optimizer == "adam":
        if momentum:
            raise ValueError(f"momentum must be 0 with optimizer 'adam', got {momentum}")
        return 1 / (batch_extremes(torch.zeros_like(variance.isotropic), variance.isotropic, b) + damping)
    # a Hessian that is negative throughout has only noise above zero
    return 2 * (1 + momentum) / batch_extremes(variance.top_value.clamp_min(0), variance.top, b)


def scale_learning_rate(
    lr: float, old_batch: float, new_batch: float, *, optimizer: Literal["sgd", "adam"] = "sgd",
    threshold: float | None = None,
) -> float:  # fmt: skip
    """Return the learning rate for a new batch size.

    Parameters
    ----------
    lr : float
        That with ``old_batch``, at least 0.
    old_batch, new_batch : float
        Batch sizes, or `effective_batch` of them; positive.
    optimizer : {"sgd", "adam"}, default="sgd"
        The rate goes with the batch size, or with its root.
    threshold : float, optional
        The batch size, positive, beyond which it stays. For SGD the Hessian has a natural one,
        ``variance.top / variance.top_value**2``.

    Returns
    -------
    float
        That with ``new_batch``.

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> from posterity.optimization import scale_learning_rate
    >>> scale_learning_rate(0.1, 64, 256), scale_learning_rate(0.001, 64, 256, optimizer="adam")
    (0.4, 0.002)
    >>> scale_learning_rate(0.1, 64, 256, threshold=128)
    0.2
    """
    at_least("lr", lr, 0)
    at_least("old_batch", old_batch, 0, strict=True)
    at_least("new_batch", new_batch, 0, strict=True)
    power = {"sgd": 1.0, "adam": 0.5}[one_of("optimizer", optimizer, ("sgd", "adam"))]
    if threshold is not None:
        at_least("threshold", threshold, 0, strict=True)
        old_batch, new_batch = min(old_batch, threshold), min(new_batch, threshold)
    return lr * (new_batch / old_batch) ** power


def _together(**parts: Tensor | float) -> tuple[Tensor, ...]:
    """Return numbers and tensors broadcast, in the widest dtype among the tensors, float32 at least."""
    tensors = [part for part in parts.values() if isinstance(part, Tensor)]
    dtype, device = (torch.float32, tensors[0].device) if tensors else (torch.float64, None)
    for part in tensors:
        dtype = torch.promote_types(dtype, part.dtype)
    names = ", ".join(parts)
    if dtype.is_complex:
        raise ValueError(f"{names} must be real, got a complex one")
    given = [torch.as_tensor(part, dtype=dtype, device=device) for part in parts.values()]
    try:
        return torch.broadcast_tensors(*given)
    except RuntimeError as error:
        raise ValueError(f"{names} must broadcast, got shapes {[tuple(x.shape) for x in given]}") from error


def _length(data: Batch) -> int:
    """Return how many samples there are, the same in all tensors."""
    if not isinstance(data, (tuple, list)) or not data or not all(isinstance(x, Tensor) for x in data):
        raise ValueError(f"data must be a tuple of tensors, got {data!r:.80}")
    lengths = sorted({len(x) if x.ndim else 0 for x in data})
    if len(lengths) > 1 or lengths[0] < 2:
        raise ValueError(f"data must be tensors of one length of at least 2, got lengths {lengths}")
    return lengths[0]
