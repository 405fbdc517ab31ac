"""Several layers at once: one Gauss-Newton step of least norm in their weights.

In a change t of the weights of its last k affine layers a network is nearly linear, f + J t, so the
change that fits residues q best, and of these the smallest, is t = pinv(J) q. It may go further than
the network is linear, so parts of it are tried as well.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsqr
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from posterity.transfer.affine_layer import _derivative, _exactly, _join, _LastLayer
from posterity.transfer.minimum_norm import _minimum_norm

__all__: list[str] = []

_DENSE = 50_000_000  # numbers of J up to which it is formed
_FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)  # of the step
_ITERATIONS = 200  # of conjugate gradients


def _gauss_newton(
    network: _LastLayer,
    batches: Sequence[Tensor],
    residues: list[Tensor],
    *,
    ridge: float,
    rcond: float | None,
) -> dict[str, Tensor]:
    """Return the step, by the names of weights, for inputs and the residues of their predictions."""
    names = [_join(name, kind) for name, layer in network.layers.items() for kind in ("weight", "bias")
             if layer._parameters.get(kind) is not None]  # fmt: skip
    theta = {name: network.tensors[name] for name in names}
    sizes = [theta[name].numel() for name in names]
    rows, columns = sum(q.numel() for q in residues), sum(sizes)
    if rows * columns <= _DENSE:
        eps = torch.finfo(network.dtype).eps
        pairs = list(zip(batches, residues, strict=True))
        flat = _minimum_norm(lambda: ((_jacobian(network, theta, x), q.reshape(-1, 1)) for x, q in pairs),
                             (rows, columns), ridge=ridge, rcond=rcond, eps=eps).change[:, 0]  # fmt: skip
    else:
        flat = _by_conjugate_gradients(network, theta, batches, residues, ridge)
    flat = flat.to(network.dtype).to(network.device)
    return {name: part.view(theta[name].shape) for name, part in zip(names, flat.split(sizes), strict=True)}


def _jacobian(network: _LastLayer, theta: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return J of a batch in float64: a row an output, a column a weight."""
    x = network.to(x)

    def one(free: dict[str, Tensor], point: Tensor) -> Tensor:
        return network(point[None], free).flatten()

    try:
        parts = vmap(jacrev(one), in_dims=(None, 0))(theta, x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a module that vmap cannot take, as recurrent ones: row by row
        each = [jacrev(one, chunk_size=1)(theta, point) for point in x]
        parts = {name: torch.stack([part[name] for part in each]) for name in theta}
    rows = len(x) * next(iter(parts.values())).shape[1]
    return _exactly(torch.cat([parts[name].reshape(rows, -1) for name in theta], dim=1))


def _by_conjugate_gradients(
    network: _LastLayer,
    theta: dict[str, Tensor],
    batches: Sequence[Tensor],
    residues: list[Tensor],
    ridge: float,
) -> Tensor:
    """Return the step from products with J and its transpose alone; stopping early is a ridge too."""
    inputs = [network.to(x) for x in batches]
    sizes = [v.numel() for v in theta.values()]

    def named(x: Tensor, *values: Tensor) -> Tensor:
        return network(x, dict(zip(theta, values, strict=True)))

    def forward(flat: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(flat).to(network.dtype).to(network.device).flatten()
        along = [part.view(v.shape) for v, part in zip(theta.values(), vector.split(sizes), strict=True)]
        done = [_derivative(partial(named, x), list(theta.values()), along)[1].flatten() for x in inputs]
        return _exactly(torch.cat(done)).cpu().numpy()

    def backward(values: np.ndarray) -> np.ndarray:
        total, given = (
            torch.zeros(sum(sizes), dtype=network.dtype, device=network.device),
            torch.from_numpy(values),
        )
        for x, q in zip(inputs, given.flatten().split([q.numel() for q in residues]), strict=True):
            out, pull = vjp(partial(network, x), theta)[:2]
            grads = pull(q.to(network.dtype).to(network.device).view(out.shape))[0]
            total += torch.cat([grads[name].flatten() for name in theta])
        return _exactly(total).cpu().numpy()

    right = torch.cat([q.flatten() for q in residues]).cpu().numpy()
    product = LinearOperator((len(right), sum(sizes)), matvec=forward, rmatvec=backward, dtype=np.float64)
    eps = torch.finfo(network.dtype).eps
    found = lsqr(product, right, damp=math.sqrt(ridge), atol=eps, btol=eps, iter_lim=_ITERATIONS)[0]
    return torch.from_numpy(found)
