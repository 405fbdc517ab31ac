r"""Curvature of the loss over the weights that are left, and how many of them it allows to cut.

Around the end of training the set of weights whose loss is at most epsilon higher is the ellipsoid
of the Hessian, with squared radii r_i^2 = 2 epsilon / lambda_i, infinite for lambda_i <= 0. To cut the
n smallest of D weights is to look for such a point in a subspace of D - n dimensions, through a point at
the distance R(n), the norm of what is cut. A random subspace through it meets the ellipsoid with high
probability as long as

.. math:: n \le \sum_i r_i^2 / (r_i^2 + R(n)^2),  \qquad (1)

where a flat direction counts 1 and a sharp one 0 (Gordon's escape theorem). The left side rises with n and
the right one falls, so that there is one largest share. Retraining after each cut makes new small weights,
which is to lower R.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from posterity._checks import at_least, finite, floating, integer, one_of, scalar
from posterity._precision import NARROW, wide
from posterity._random import draw_device
from posterity.compression.error_barriers import require_finite, tensor_mask
from posterity.compression.imp_geometry import prunable

__all__ = ["Spectrum", "hessian_spectrum", "prunable_fraction"]

LARGEST = 20_000  # dimensions of an exact spectrum: its matrix has 3 GB in float64
AT_ONCE = 64  # products with the Hessian in one call


class Spectrum(NamedTuple):
    """Eigenvalues of a Hessian of D weights; tensors in float64 on the CPU.

    Attributes
    ----------
    eigenvalues : Tensor of shape (k,)
        Ascending.
    weights : Tensor of shape (k,)
        How many eigenvalues each stands for: they sum to D, and are 1 where the spectrum is exact.
    loss : float
        Mean over the batches.
    """

    eigenvalues: Tensor
    weights: Tensor
    loss: float


def hessian_spectrum(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    mask: Mapping[str, Tensor] | None = None,
    method: Literal["exact", "lanczos"] = "lanczos",
    n_iter: int = 64,
    n_probes: int = 4,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Return the spectrum of the Hessian of a loss in the weights that may still be pruned.

    Parameters
    ----------
    model : nn.Module
        Looked at in eval mode, and left as it is.
    batches : iterable of tuple of Tensor
        Inputs and targets. The graph of each batch's gradient is kept, so that memory grows with all of them:
        a thousand samples are enough for an estimate.
    loss_fn : callable, default=torch.nn.functional.cross_entropy
        ``loss_fn(model(x), y)`` is the mean over a batch, a scalar; batches are weighted by their size.
    mask : mapping of str to Tensor, optional
        Weights left, by the name of the parameter, as in `Level`; parameters that it does not name do not
        count. By default all weights of Linear and Conv layers.
    method : {"exact", "lanczos"}, default="lanczos"
        "exact" makes the whole matrix, for some thousand weights, at most 20,000. "lanczos" estimates the density
        of eigenvalues by stochastic quadrature.
    n_iter : int, default=64
        Steps of Lanczos, at least 1: each is a product with the Hessian.
    n_probes : int, default=4
        Random vectors that it starts from, at least 1.
    generator : torch.Generator, optional
        Of these vectors.

    Returns
    -------
    Spectrum
        Eigenvalues, how many each stands for, and the loss.

    Raises
    ------
    ValueError
        If an argument is out of range, ``mask`` does not fit or leaves nothing, ``batches`` has no sample,
        the loss is not a finite scalar, or "exact" is asked of more than 20,000 weights.

    Notes
    -----
    1. In float32 at least, outside autocast; the projected matrix of Lanczos is in float64, its vectors
       are orthogonalised against all earlier ones.

    References
    ----------
    .. [1] Paul et al. Unmasking the Lottery Ticket Hypothesis. ICLR 2023. Section 4.
    .. [2] Ubaru, Chen, Saad. Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature. SIAM J. Matrix
       Analysis and Applications, 2017. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import hessian_spectrum
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # the Hessian of the squared error is 2 x^T x / 2
    >>> data = [(x, torch.zeros(2, 1))]
    >>> hessian_spectrum(net, data, loss_fn=torch.nn.functional.mse_loss, method="exact")[:2]
    (tensor([1., 4.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    one_of("method", method, ("exact", "lanczos"))
    integer("n_iter", n_iter, 1)
    integer("n_probes", n_probes, 1)
    weights = prunable(model)
    require_finite("model must have finite weights", weights)
    kept = tensor_mask(weights, mask)
    if mask is None:
        kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    D = sum(int(part.sum()) for part in kept.values())
    if not D:
        raise ValueError("mask must leave a weight, it leaves none")
    if method == "exact" and D > LARGEST:
        raise ValueError(
            f'method must be "lanczos" for more than {LARGEST:,} weights, got "exact" for {D:,} of them'
        )
    with torch.inference_mode(False), torch.enable_grad():
        net = copy.deepcopy(model).eval()
        if any(p.dtype in NARROW for p in net.parameters()):
            net.float()
        kind = next(iter(weights.values())).device.type
        with (
            _twice_differentiable(),
            torch.autocast("cpu", enabled=False),
            torch.autocast(kind, enabled=False),
        ):
            hessian = _Hessian(net, kept, batches, loss_fn)
            if method == "exact":
                return Spectrum(_eigenvalues(hessian, D), torch.ones(D, dtype=torch.float64), hessian.loss)
            nodes, shares = _quadrature(hessian, D, min(n_iter, D), n_probes, generator)
            return Spectrum(nodes, shares * (D / n_probes), hessian.loss)


def prunable_fraction(weights: Tensor, spectrum: Spectrum | Tensor, epsilon: float) -> float:
    r"""Return the largest share of the weights that the curvature allows to cut at once, equation (1).

    Parameters
    ----------
    weights : Tensor
        All D weights that are left, in any shape, without those cut before.
    spectrum : Spectrum or Tensor of shape (D,)
        Of the Hessian in these weights; as a tensor, all its eigenvalues.
    epsilon : float
        Rise of the loss that is allowed, positive.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If there are no weights, a number is not finite, ``epsilon`` is not positive, or the spectrum is
        not of D weights.

    Notes
    -----
    1. (1) is a bound: with R^2 (1 - n / D) for R^2 it is where a random subspace through the point ceases to
       meet the ellipsoid as D grows, so that it is close where a small share may be cut and cautious where
       a large one may.
    2. The loss is taken to be quadratic and the axes to be as good as random: the number orders
       networks and rounds, and is not a promise.

    References
    ----------
    .. [1] Paul et al. Unmasking the Lottery Ticket Hypothesis. ICLR 2023. Section 4.
    .. [2] Larsen et al. How Many Degrees of Freedom Do We Need to Train Deep Networks: A Loss Landscape
       Perspective. ICLR 2022. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import prunable_fraction
    >>> weights = torch.tensor([0.1, 0.2, 1.0, 2.0])
    >>> prunable_fraction(weights, torch.zeros(4), 0.05)  # nothing bends: anything goes
    1.0
    >>> prunable_fraction(weights, torch.tensor([0.0, 0.0, 10.0, 10.0]), 0.05)
    0.5
    """
    finite("weights", floating("weights", weights))
    at_least("epsilon", epsilon, 0, strict=True)
    eigenvalues, counts = spectrum[:2] if isinstance(spectrum, tuple) else (spectrum, None)
    finite("spectrum", floating("spectrum", eigenvalues))
    D = weights.numel()
    if not D:
        raise ValueError(f"weights must have at least one weight, got shape {tuple(weights.shape)}")
    total = eigenvalues.numel() if counts is None else float(counts.sum())
    if not abs(total - D) <= 1e-3 * D:
        raise ValueError(f"spectrum must be of the {D} weights, got one of {total:g}")
    rest = wide(weights.detach()).abs().flatten().cpu().numpy()
    bend = eigenvalues.detach().double().flatten().cpu()
    share = torch.ones_like(bend) if counts is None else counts.detach().double().flatten().cpu()
    bend, share = bend[bend > 0] / epsilon / 2, share[bend > 0]
    low, square = 0, 0.0  # n = 0 is always allowed; square is R(low)^2, rest what may be cut beside these low
    while len(rest):
        half = (len(rest) + 1) // 2
        rest.partition(half - 1)  # half the numbers at each turn: less than to sort them
        small = rest[:half].astype(float)
        more = square + float(small @ small)
        # what is lost of D is summed, exact where nothing is
        if low + half <= D - float((share / (1 + 1 / (bend * more))).sum()):
            low, square, rest = low + half, more, rest[half:]
        else:
            rest = rest[: half - 1]
    return low / D


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Have attention and recurrent layers go by operations that have second derivatives, also in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Hessian:
    """Products with the Hessian of the mean loss, from graphs of the gradient that are built once."""

    def __init__(
        self, net: nn.Module, kept: Mapping[str, Tensor], batches: Iterable[Any], loss_fn: Callable[..., Any]
    ) -> None:
        for p in net.parameters():
            p.requires_grad_(False)
        named = dict(net.named_parameters())
        self.weights = [named[name].requires_grad_() for name in kept]
        self.dtype, self.device = self.weights[0].dtype, self.weights[0].device
        self.sizes = [w.numel() for w in self.weights]
        self.places = torch.cat([part.flatten() for part in kept.values()]).nonzero()[:, 0].to(self.device)
        self.graphs: list[tuple[float, list[tuple[int, Tensor]]]] = []
        self.loss, total, self.together = 0.0, 0, True
        for number, batch in enumerate(batches):
            x, y = _pair(batch, number, self.device)
            value = floating("what loss_fn returns", scalar("loss_fn", loss_fn(net(x), y)))
            if not bool(value.isfinite()):
                raise ValueError(f"loss_fn must be finite, got {float(value.detach()):g} on batch {number}")
            self.loss += len(x) * float(value.detach())
            total += len(x)
            self.graphs.append((float(len(x)), self._gradient(value)))
        if not total:
            raise ValueError("batches must have at least one sample, got none")
        self.loss /= total
        self.graphs = [(size / total, gradient) for size, gradient in self.graphs]

    def _gradient(self, value: Tensor) -> list[tuple[int, Tensor]]:
        """Return those parts of the gradient that depend on the weights; others have no second derivative."""
        if not value.requires_grad:
            return []
        parts = torch.autograd.grad(value, self.weights, create_graph=True, allow_unused=True)
        return [(k, part) for k, part in enumerate(parts) if part is not None and part.requires_grad]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the Hessian times each row of (k, D)."""
        full = torch.zeros(len(vectors), sum(self.sizes), dtype=self.dtype, device=self.device)
        full[:, self.places] = vectors.to(full)
        out = torch.zeros_like(full, dtype=vectors.dtype)
        parts = [
            part.unflatten(1, w.shape)
            for part, w in zip(full.split(self.sizes, 1), self.weights, strict=True)
        ]
        for share, gradient in self.graphs:
            if not gradient:
                continue
            ours = [parts[k].to(part) for k, part in gradient]
            out += share * self._product([part for _, part in gradient], ours).to(out)
        return out[:, self.places]

    def _product(self, gradient: list[Tensor], vectors: list[Tensor]) -> Tensor:
        """Return the derivative of what each row of the vectors makes of a gradient."""
        n = len(vectors[0])
        if n > 1 and self.together:
            try:
                return torch.cat([part.flatten(1) for part in self._slopes(gradient, vectors, True)], 1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that vmap does not know
                self.together = False
        rows = [self._slopes(gradient, [part[k] for part in vectors], False) for k in range(n)]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    def _slopes(self, gradient: list[Tensor], vectors: list[Tensor], together: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            gradient, self.weights, vectors, retain_graph=True, allow_unused=True, materialize_grads=True,
            is_grads_batched=together,
        )  # fmt: skip
        return [part.to(self.device, self.dtype) for part in found]


def _pair(batch: Any, number: int, device: torch.device) -> tuple[Tensor, Any]:
    """Return the inputs and the targets of a batch where the model is, inputs in float32 at least."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise ValueError(
            f"batches must give pairs of inputs and targets, got {type(batch).__name__} at {number}"
        )
    x, y = batch
    if x.ndim == 0 or not len(x):
        raise ValueError(f"batches must have samples, got inputs of shape {tuple(x.shape)} in batch {number}")
    x = (x.clone() if x.is_inference() else x.detach()).to(device)
    if not isinstance(y, Tensor):
        return wide(x), y
    y = (y.clone() if y.is_inference() else y.detach()).to(device)
    return wide(x), wide(y)


def _eigenvalues(hessian: _Hessian, D: int) -> Tensor:
    """Return all eigenvalues, from the products with all unit vectors."""
    matrix = torch.empty(D, D, dtype=torch.float64)
    for start in range(0, D, AT_ONCE):
        unit = torch.zeros(min(AT_ONCE, D - start), D, dtype=hessian.dtype, device=hessian.device)
        unit[torch.arange(len(unit)), start + torch.arange(len(unit))] = 1
        matrix[start : start + len(unit)] = hessian(unit).cpu()
    _require_curvature(matrix)
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


def _quadrature(
    hessian: _Hessian, D: int, n_iter: int, n_probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return Ritz values and squared first components of their vectors, of all probes, in ascending order."""
    dtype = torch.float32 if hessian.device.type == "mps" else torch.float64
    nodes, shares = [], []
    for _ in range(n_probes):
        probe = torch.randn(D, generator=generator, device=draw_device(generator)).to(hessian.device, dtype)
        basis = torch.empty(n_iter, D, dtype=dtype, device=hessian.device)
        basis[0] = probe / probe.norm()
        diagonal, beside = [], []
        for k in range(n_iter):
            new = hessian(basis[k : k + 1])[0]
            _require_curvature(new)
            before = basis[: k + 1]
            along = before @ new
            diagonal.append(float(along[k]))
            new = new - along @ before
            new = new - (before @ new) @ before  # once more: what rounding left
            length = float(new.norm())
            reach = max(map(abs, (*diagonal, *beside)))
            if k + 1 == n_iter or length <= 10 * torch.finfo(hessian.dtype).eps * reach:
                break  # the probe has no part in what is left
            beside.append(length)
            basis[k + 1] = new / length
        values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
        nodes.append(values)
        shares.append(vectors[0] ** 2)
    node, share = np.concatenate(nodes), np.concatenate(shares)
    order = np.argsort(node, kind="stable")
    return torch.from_numpy(node[order]), torch.from_numpy(share[order])


def _require_curvature(product: Tensor) -> None:
    if not bool(product.isfinite().all()):
        raise ValueError("loss_fn must have finite second derivatives, got NaN or infinity")
