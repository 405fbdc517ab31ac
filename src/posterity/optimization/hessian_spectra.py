r"""Spectra of a network's Hessian without the Hessian: products with it, and Lanczos steps of these.

For P parameters the Hessian H has P^2 entries, but a product with it costs two or three gradients: the
derivative of the gradient along v,

.. math:: H v = \partial_\epsilon \nabla L(\theta + \epsilon v), \qquad
          G v = J^T H_{out} J v \ \text{(generalised Gauss-Newton)}.

After m products from a unit vector v the eigenvalues t_i of a small tridiagonal matrix, and the squared
first entries w_i of its eigenvectors, are a quadrature of H's spectral density as v sees it,

.. math:: v^T f(H) v \approx \sum_i w_i f(t_i),

exact for polynomials of degree 2m - 1. The outermost t_i are H's extreme eigenvalues after a few dozen steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import wide
from posterity._random import draw_device
from posterity.optimization._krylov import Matvec, ritz, tridiagonal
from posterity.optimization.flat_network import Batch, _exactly, _Flat, _scalar

__all__ = [
    "SpectralDensity", "extreme_eigenvalues", "ggn_matvec", "hessian_matvec", "lanczos", "spectral_density",
]  # fmt: skip

Generator = torch.Generator | None


def hessian_matvec(model: nn.Module, loss_fn: Callable[..., Tensor], batch: Batch) -> Matvec:
    """Return the product with the Hessian of a loss, at the weights that the model has now.

    Parameters
    ----------
    model : nn.Module
        In eval mode, if it has dropout or batch normalisation. It is not changed; P below counts its
        parameters that require a gradient, flat in the order of ``model.parameters()``.
    loss_fn : callable
        ``loss_fn(model, *batch)`` is the mean loss of a batch, a scalar.
    batch : tuple of Tensor
        At least one; none empty.

    Returns
    -------
    callable
        Maps a vector of shape (P,) to one of its dtype and device. It keeps the graph of the gradient, so
        that a product is one backward pass through it.

    Raises
    ------
    ValueError
        If the batch is empty, the loss is no scalar or does not depend on the model, nothing in the model
        requires a gradient, or dropout or batch statistics are active.

    Notes
    -----
    Weights and inputs in bfloat16 or float16 are read as float32, and autocast is off.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import hessian_matvec
    >>> model = nn.Linear(2, 1, bias=False)
    >>> product = hessian_matvec(model, lambda model, x: model(x).square().mean(), (torch.tensor([[1.0, 2.0]]),))
    >>> product(torch.tensor([1.0, 0.0]))  # 2 x x' v
    tensor([2., 4.])
    """
    flat = _Flat(model, loss_fn)
    with _exactly(flat.theta), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        theta = flat.theta.clone().requires_grad_()
        loss = flat(theta, *flat.read(batch))
        if not loss.requires_grad:
            raise ValueError("loss_fn must depend on the model's parameters, got a loss without a gradient")
        slope = torch.autograd.grad(loss, theta, create_graph=True)[0]
    return _product(lambda v: _pull(slope, theta, v), theta)


def ggn_matvec(model: nn.Module, output_loss: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Matvec:
    """Return the product with the generalised Gauss-Newton matrix, J' H_out J.

    J is the Jacobian of the model's outputs, H_out the Hessian of the loss in them. For a convex
    ``output_loss`` the matrix has no negative eigenvalue; it is the Hessian where the model is linear in
    its parameters.

    Parameters
    ----------
    model : nn.Module
        In eval mode, as for `hessian_matvec`.
    output_loss : callable
        ``output_loss(outputs, y)`` is the mean loss of a batch, a scalar.
    batch : tuple of Tensor
        Inputs and, last, y: outputs are ``model(*batch[:-1])``.

    Returns
    -------
    callable
        Maps a vector of shape (P,) to one of its dtype and device.

    Raises
    ------
    ValueError
        As `hessian_matvec`; also if the batch has no y, or outputs are no tensor.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import ggn_matvec
    >>> model, x, y = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> ggn_matvec(model, nn.functional.mse_loss, (x, y))(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    flat = _Flat(model, lambda model, *x: model(*x))
    if len(batch) < 2:
        raise ValueError(f"batch must hold inputs and y, got {len(batch)} tensors")
    with _exactly(flat.theta), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        *x, y = flat.read(batch)
        theta = flat.theta.clone().requires_grad_()
        outputs = floating("outputs of model", flat.call(theta, *x))
        if not outputs.requires_grad:
            raise ValueError("model must depend on its parameters, got outputs without a gradient")
        seen = outputs.detach().requires_grad_()
        loss = _scalar("output_loss", output_loss(seen, y))
        bend = (
            torch.autograd.grad(loss, seen, create_graph=True)[0]
            if loss.requires_grad
            else torch.zeros_like(seen)
        )
        # u -> J' u is linear in u, so that its own transpose is v -> J v
        dual = torch.zeros_like(outputs).requires_grad_()
        pulled = torch.autograd.grad(outputs, theta, dual, create_graph=True)[0]

    def product(v: Tensor) -> Tensor:
        return _pull(outputs, theta, _pull(bend, seen, _pull(pulled, dual, v)))

    return _product(product, theta)


def lanczos(
    matvec: Matvec, v0: Float[Tensor, " dim"], n_iter: int, *, reorthogonalize: bool = True
) -> tuple[Float[Tensor, " m"], Float[Tensor, " rest"], Float[Tensor, "m dim"]]:
    """Return what a symmetric operator is in the Krylov space of a vector: a tridiagonal matrix.

    Parameters
    ----------
    matvec : callable
        The product with a symmetric matrix, (dim,) to (dim,).
    v0 : Tensor of shape (dim,)
        Where to start; finite and not zero, of any length.
    n_iter : int
        Products, at least 1; more than ``dim`` are cut to it.
    reorthogonalize : bool, default=True
        Against all earlier vectors, twice. Without it less is computed and eigenvalues appear repeatedly.

    Returns
    -------
    alpha : Tensor of shape (m,)
        Diagonal; m is ``n_iter``, or less where the Krylov space is exhausted.
    beta : Tensor of shape (m - 1,)
        Off-diagonal.
    V : Tensor of shape (m, dim)
        Orthonormal rows, the first along ``v0``. All in float32 at least.

    Raises
    ------
    ValueError
        If ``v0`` is zero or not finite, or products have another shape or are not finite: the message has
        the iteration.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import lanczos
    >>> values = torch.tensor([1.0, 2.0, 3.0])
    >>> alpha, beta, V = lanczos(lambda v: values * v, torch.tensor([1.0, 0.0, 1.0]), 3)
    >>> alpha.round(decimals=4), beta.round(decimals=4)  # eigenvalues 1 and 3: v0 has no part in the third
    (tensor([2., 2.]), tensor([1.]))
    """
    has_shape("v0", floating("v0", v0), (None,))
    integer("n_iter", n_iter, 1)
    start = wide(finite("v0", v0.detach()))
    size = start.abs().max() if len(start) else 0
    if not size > 0:
        raise ValueError(f"v0 must not be zero, got zeros of shape {tuple(v0.shape)}")
    with _exactly(start), torch.no_grad():
        return tridiagonal(_checked(matvec), start / size, n_iter, reorthogonalize=reorthogonalize)


@dataclass(frozen=True)
class SpectralDensity:
    """A spectral density as weighted points, for each of several probes.

    Attributes
    ----------
    nodes : Tensor of shape (n_probes, m)
        Ritz values, ascending; a probe whose Krylov space was exhausted repeats its last with weight 0.
    weights : Tensor of shape (n_probes, m)
        How much of the spectrum is there; 1 together for each probe.
    n_probes : int
    """

    nodes: Float[Tensor, "n_probes m"]
    weights: Float[Tensor, "n_probes m"]
    n_probes: int

    def moment(self, k: int) -> Tensor:
        """Return the mean of the k-th powers of the eigenvalues, exact for the probes up to k = 2m - 1.

        Parameters
        ----------
        k : int
            At least 0.

        Returns
        -------
        Tensor of shape ()
        """
        integer("k", k, 0)
        return (self.weights * self.nodes**k).sum(1).mean()

    def density(self, grid: Float[Tensor, " g"], width: float) -> Float[Tensor, " g"]:
        """Return the density, each point widened to a normal distribution.

        Parameters
        ----------
        grid : Tensor of shape (g,)
            Eigenvalues at which to evaluate.
        width : float
            Standard deviation, positive.

        Returns
        -------
        Tensor of shape (g,)
        """
        at_least("width", width, 0, strict=True)
        away = (floating("grid", grid)[:, None, None].to(self.nodes) - self.nodes) / width
        bumps = torch.exp(-away.square() / 2) / (width * math.sqrt(2 * math.pi))
        return (self.weights * bumps).sum(2).mean(1)

    @property
    def largest(self) -> Tensor:
        """The largest Ritz value, a lower bound of the largest eigenvalue."""
        return self.nodes.max()

    @property
    def smallest(self) -> Tensor:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return self.nodes.min()

    @property
    def degeneracy(self) -> Tensor:
        """The share of eigenvalues that are next to zero, below a thousandth of the largest in size."""
        size = self.nodes.abs()
        return (self.weights * (size <= 1e-3 * size.max())).sum(1).mean()


def spectral_density(
    matvec: Matvec, dim: int, *, n_iter: int = 80, n_probes: int = 1, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None, generator: Generator = None,
) -> SpectralDensity:  # fmt: skip
    """Return the spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Parameters
    ----------
    matvec : callable
        The product with a symmetric matrix, (dim,) to (dim,).
    dim : int
        At least 1.
    n_iter : int, default=80
        Products a probe, at least 1.
    n_probes : int, default=1
        Random starting vectors, at least 1. One sees eigenvalues with random weights, of relative variance
        2 / (how many there are nearby).
    dtype : {torch.float32, torch.float64}, default=torch.float32
        Of the vectors.
    device : torch.device or str, optional
        Of the vectors: best the model's. By default torch's.
    generator : torch.Generator, optional
        Draws the probes.

    Returns
    -------
    SpectralDensity
        Nodes and weights of all probes.

    Raises
    ------
    ValueError
        If a number is out of range, or products have another shape or are not finite.

    Notes
    -----
    Probes are normal vectors scaled to length 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import spectral_density
    >>> values = torch.tensor([0.0, 0.0, 0.0, 5.0])
    >>> found = spectral_density(lambda v: values * v, 4)
    >>> round(float(found.largest), 3)
    5.0
    >>> found.weights.shape  # the matrix has two different eigenvalues
    torch.Size([1, 2])
    """
    _sizes(dim, n_iter, dtype)
    integer("n_probes", n_probes, 1)
    found = []
    for _ in range(n_probes):
        alpha, beta, _ = _probe(matvec, dim, n_iter, dtype, device, generator)
        values, vectors = _ritz(alpha, beta)
        found.append((values, vectors[0].square()))
    m = max(len(values) for values, _ in found)
    nodes, weights = torch.empty(n_probes, m), torch.zeros(n_probes, m)
    nodes, weights = nodes.to(alpha), weights.to(alpha)
    for k, (values, share) in enumerate(found):
        nodes[k] = values[-1].to(nodes)
        nodes[k, : len(values)] = values.to(nodes)
        weights[k, : len(values)] = (share / share.sum()).to(nodes)
    return SpectralDensity(nodes, weights, n_probes)


def extreme_eigenvalues(
    matvec: Matvec, dim: int, *, n_iter: int = 50, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None, generator: Generator = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, " dim"], Float[Tensor, " dim"]]:  # fmt: skip
    """Return the smallest and the largest eigenvalue of a symmetric operator, with eigenvectors.

    Parameters
    ----------
    matvec : callable
        The product with a symmetric matrix, (dim,) to (dim,).
    dim : int
        At least 1.
    n_iter : int, default=50
        Lanczos steps, each a product; at least 1. Ends that stand apart from the rest need few.
    dtype : {torch.float32, torch.float64}, default=torch.float32
        Of the vectors.
    device : torch.device or str, optional
        Of the vectors: best the model's. By default torch's.
    generator : torch.Generator, optional
        Draws the vector to start from.

    Returns
    -------
    smallest, largest : Tensor of shape ()
        From inside the spectrum: not below the least and not above the greatest eigenvalue.
    v_min, v_max : Tensor of shape (dim,)
        Of length 1.

    Raises
    ------
    ValueError
        If a number is out of range, or products have another shape or are not finite.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import extreme_eigenvalues
    >>> values = torch.tensor([-2.0, 0.0, 1.0, 7.0])
    >>> low, high, _, vector = extreme_eigenvalues(lambda v: values * v, 4)
    >>> round(float(low), 3), round(float(high), 3), round(abs(float(vector[3])), 3)
    (-2.0, 7.0, 1.0)
    """
    _sizes(dim, n_iter, dtype)
    alpha, beta, basis = _probe(matvec, dim, n_iter, dtype, device, generator)
    values, vectors = (part.to(alpha) for part in _ritz(alpha, beta))
    with _exactly(alpha), torch.no_grad():
        low, high = (vectors[:, end] @ basis for end in (0, -1))
        return (
            values[0],
            values[-1],
            nn.functional.normalize(low, dim=0),
            nn.functional.normalize(high, dim=0),
        )


def _sizes(dim: int, n_iter: int, dtype: torch.dtype) -> None:
    integer("dim", dim, 1)
    integer("n_iter", n_iter, 1)
    one_of("dtype", dtype, (torch.float32, torch.float64))


def _probe(
    matvec: Matvec, dim: int, n_iter: int, dtype: torch.dtype, device: torch.device | str | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return `lanczos` from a random vector."""
    place = torch.empty(0, device=device).device
    draw = torch.randn(dim, dtype=dtype, device=draw_device(generator, place), generator=generator)
    return lanczos(matvec, draw.to(place), n_iter)


def _ritz(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ritz values and vectors in float64, where small matrices cost nothing: on the CPU."""
    return ritz(alpha.cpu().double(), beta.cpu().double())


def _checked(matvec: Matvec) -> Matvec:
    """Return a product whose images have the dtype and device of what it is given."""

    def product(vector: Tensor) -> Tensor:
        image = matvec(vector)
        if not isinstance(image, Tensor) or image.is_complex():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"matvec must return a real tensor, got {got}")
        return image.detach().to(vector)

    return product


def _pull(value: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """Return v's product with the Jacobian of a value, whose graph is kept; zero where it has none."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(value, leaf, v, retain_graph=True, materialize_grads=True)
    return found


def _product(function: Callable[[Tensor], Tensor], theta: Tensor) -> Matvec:
    def matvec(vector: Tensor) -> Tensor:
        if not isinstance(vector, Tensor) or vector.shape != theta.shape:
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"matvec takes shape ({len(theta)},), the model's parameters, got {got}")
        with _exactly(theta):
            v = vector.clone() if vector.is_inference() else vector.detach()
            return function(v.to(theta)).to(vector)

    return matvec
