r"""What a wide two-layer ReLU network will learn, and when: its kernel's spectrum, and its residual at any time.

For ``m^(-1/2) sum_r a_r relu((w_r . x + b_r) / sqrt(2))``, signs a fixed, w_r ~ N(0, I) and b_r = 0 at the start, w
and b trained, gradient flow on a loss with matrix P moves the residual at the training points by

.. math:: r(t) = e^{-t H P}\, r(0), \qquad
   H_{ij} = K(x_i \cdot x_j), \quad K(z) = \frac{(z + 1)(\pi - \arccos z)}{4 \pi}.                 \qquad (1)

On the sphere the eigenfunctions of K are the harmonics, and those of degree l decay at one rate. A network
without the root of 2 has the kernel 2 K and learns twice as fast.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer, within
from posterity._precision import rounding
from posterity.dynamics._harmonics import area
from posterity.dynamics.frequency_bias import STEEPEST, sobolev_matrix
from posterity.dynamics.sphere_quadrature import LARGEST, MOST, on_sphere, settled_degree, settled_weights

__all__ = ["learning_rates_by_degree", "ntk_eigenvalues", "predicted_residual", "relu_ntk"]

SYMMETRIC = (
    1e-6  # of the largest entry of a kernel, by which it may miss symmetry or have a negative eigenvalue
)


@torch.no_grad()
def relu_ntk(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the tangent kernel K of (1), of a two-layer ReLU network in the limit of width.

    Parameters
    ----------
    x, y : Tensor of shape (n, d) and (m, d)
        Unit vectors, d >= 2.

    Returns
    -------
    Tensor of shape (n, m)
        Values in [0, 1/2], in the dtype and on the device of ``x``, without a gradient.

    Raises
    ------
    ValueError
        If rows are not unit vectors, or differ in length.

    References
    ----------
    .. [1] Basri, Jacobs, Kasten, Kritchman. The Convergence Rate of Neural Networks for Learned Functions of
       Different Frequencies. NeurIPS 2019. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import relu_ntk
    >>> relu_ntk(torch.eye(2), torch.eye(2))  # (0 + 1) (pi - pi / 2) / (4 pi) = 1/8 between them
    tensor([[0.5000, 0.1250],
            [0.1250, 0.5000]])
    """
    first = on_sphere("x", x, most=None)
    second = on_sphere("y", y, x.shape[1], most=None).to(first.device)
    return _kernel(first @ second.T).to(x)


def ntk_eigenvalues(max_degree: int, dim: int) -> Float[Tensor, " degrees"]:
    r"""Return the eigenvalues of K on the sphere, one a degree, in closed form.

    .. math:: \mu_l = A_{d-1} \int_0^\pi K(\cos t)\, P_{l,d}(\cos t)\, \sin^{d-2} t\, \mathrm dt

    Parameters
    ----------
    max_degree : int
        0 .. 10000.
    dim : int
        d, the dimension of the space that holds the sphere, 2 .. 64.

    Returns
    -------
    Tensor of shape (max_degree + 1,)
        In float64, positive; they fall like l^-d.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    1. The arc-cosine kernel :math:`(\pi - \arccos z) / 2 \pi` averages products of two steps 1(w . x > 0) over w,
       so that its eigenvalues are squares of those of the step, :math:`A_{d-1} P_{l-1,d}(0) / (l + d - 2)` for
       l > 0; z times a zonal function mixes the degrees next to l. All terms are positive: nothing cancels, as it
       does in the integral.

    References
    ----------
    .. [1] Basri, Jacobs, Kasten, Kritchman. The Convergence Rate of Neural Networks for Learned Functions of
       Different Frequencies. NeurIPS 2019. Section 4.

    Examples
    --------
    >>> from posterity.dynamics import ntk_eigenvalues
    >>> ntk_eigenvalues(5, 2)[[3, 5]].reciprocal() / 3.14159265  # on the circle 1 / (pi l^2) for odd l > 1
    tensor([ 9.0000, 25.0000], dtype=torch.float64)
    """
    _in_range("max_degree", max_degree, 0, LARGEST)
    _in_range("dim", dim, 2, MOST)
    # squares of the step's eigenvalues by degree, from those of P_{l-1}(0), which fall by a recurrence; even ones are 0
    at_zero, steps = 1.0, [area(dim) / 4]
    for degree in range(1, max_degree + 2):
        if degree % 2:
            steps.append((area(dim - 1) * at_zero / (degree + dim - 2)) ** 2 / area(dim))
            at_zero *= degree / (degree + dim - 2)
        else:
            steps.append(0.0)
    values = [(steps[0] + steps[1]) / 2]
    for degree in range(1, max_degree + 1):
        beside = degree * steps[degree - 1] + (degree + dim - 2) * steps[degree + 1]
        values.append((steps[degree] + beside / (2 * degree + dim - 2)) / 2)
    return torch.tensor(values, dtype=torch.float64)


def learning_rates_by_degree(max_degree: int, dim: int, s: float = 0.0) -> Float[Tensor, " degrees"]:
    """Return how fast a wide network learns each degree under a Sobolev loss: mu_l (1 + l)^(2s).

    Its part of the residual decays like exp(-rate * time), time the learning rate times the steps. Low degrees come
    first for s < d/2, all about alike at d/2, high ones first beyond.

    Parameters
    ----------
    max_degree, dim : int
        As of `ntk_eigenvalues`.
    s : float, default=0.0
        Sobolev index in [-8, 8].

    Returns
    -------
    Tensor of shape (max_degree + 1,)
        In float64.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    References
    ----------
    .. [1] Yu, Yang, Townsend. Tuning Frequency Bias in Neural Network Training with Nonuniform Data. ICLR 2023.
       Section 4.

    Examples
    --------
    >>> from posterity.dynamics import learning_rates_by_degree
    >>> plain, tuned = (learning_rates_by_degree(9, 2, s) for s in (0.0, 1.0))
    >>> round(float(plain[5] / plain[9]), 2), round(float(tuned[5] / tuned[9]), 2)
    (3.24, 1.17)
    """
    within("s", s, -STEEPEST, STEEPEST)
    rates = ntk_eigenvalues(max_degree, dim)
    return rates * (1 + torch.arange(max_degree + 1, dtype=torch.float64)) ** (2 * s)


@torch.no_grad()
def predicted_residual(
    x: Float[Tensor, "n d"],
    residual: Float[Tensor, " n"],
    times: Float[Tensor, " times"] | Sequence[float],
    *,
    s: float | None = 0.0,
    max_degree: int | None = None,
    weights: Float[Tensor, " n"] | None = None,
    kernel: Float[Tensor, "n n"] | None = None,
) -> Float[Tensor, "times n"]:
    r"""Return the residual that a wide network will have at its training points, equation (1), before it is trained.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Unit vectors, 2 <= d <= 64.
    residual : Tensor of shape (n,)
        Predictions less targets at the start.
    times : Tensor of shape (T,) or sequence of float
        At least 0: the learning rate of plain gradient descent times the steps.
    s : float, optional
        Sobolev index in [-8, 8] of the `SobolevLoss` that it is trained by, by default 0. None is the loss
        1/2 sum_i c_i r_i^2 without harmonics: with ``weights=torch.full((n,), 2 / n)`` that is ``nn.MSELoss()``.
    max_degree, weights : optional
        As of `SobolevLoss`.
    kernel : Tensor of shape (n, n), optional
        H, in place of `relu_ntk(x, x)`: twice that for a network without the root of 2, or what `empirical_ntk`
        returns for any network.

    Returns
    -------
    Tensor of shape (T, n)
        In the dtype and on the device of ``residual``, without a gradient.

    Raises
    ------
    ValueError
        If ``x`` is not of unit vectors, the others do not fit it, a time is negative, or ``kernel`` is not symmetric
        and positive semi-definite.

    Notes
    -----
    With H = L L' and the symmetric S = L' P L, e^(-tHP) = 1 - L S^-1 (1 - e^(-tS)) L' P: one decomposition serves
    all times, and no inverse of H, which may be singular, is taken.

    References
    ----------
    .. [1] Yu, Yang, Townsend. Tuning Frequency Bias in Neural Network Training with Nonuniform Data. ICLR 2023.
       Sections 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import empirical_ntk, predicted_residual
    >>> angles = 2 * torch.pi * torch.arange(64) / 64
    >>> x = torch.stack([angles.cos(), angles.sin()], 1)
    >>> start = (3 * angles).sin()
    >>> later = predicted_residual(x, start, [9 * torch.pi, 18 * torch.pi])  # the rate of degree 3 is 1 / (9 pi)
    >>> (later.norm(dim=1) / start.norm()).round(decimals=2)
    tensor([0.3700, 0.1300])

    Of a network as it is, trained by ``nn.MSELoss()`` with a learning rate of 0.01 for 100 steps:

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    >>> start, mean = net(x)[:, 0] - (3 * angles).sin(), torch.full((64,), 2 / 64)
    >>> later = predicted_residual(x, start, [100 * 0.01], s=None, weights=mean, kernel=empirical_ntk(net, x))
    >>> bool((later.square().mean() < start.square().mean()).all())
    True
    """
    points = on_sphere("x", x)
    n, d = points.shape
    has_shape("residual", floating("residual", residual), (n,), "x")
    if s is not None:
        within("s", s, -STEEPEST, STEEPEST)
        degree = settled_degree(max_degree, n, d)
    elif max_degree is not None:
        raise ValueError(f"max_degree must be None where s is None, got {max_degree}")
    at = _times(times).to(points)
    root = _root(_kernel(points @ points.T) if kernel is None else _given(kernel, points))
    c = settled_weights(weights, points)
    matrix = c.diag() if s is None else sobolev_matrix(points, c, s, degree)
    start = residual.detach().to(points)
    onto = root.T @ matrix
    values, vectors = torch.linalg.eigh(onto @ root)
    values = values.clamp_min(0)
    parts = vectors.T @ (onto @ start)
    # directions that the loss does not see have no part; what they seem to have is rounding
    seen = values > n * torch.finfo(values.dtype).eps * values.max()
    gone = torch.where(seen, -torch.expm1(-at[:, None] * values) / values.where(seen, 1.0), 0.0)
    return (start - (gone * parts) @ (root @ vectors).T).to(residual)


def _kernel(cosines: Tensor) -> Tensor:
    """Return K of cosines."""
    cosines = cosines.clamp(-1, 1)
    return (cosines + 1) * (math.pi - cosines.arccos()) / (4 * math.pi)


def _root(kernel: Tensor) -> Tensor:
    """Return L of a kernel L L'."""
    values, vectors = torch.linalg.eigh(kernel)
    if float(values[0]) < -SYMMETRIC * len(kernel) * float(kernel.abs().max()):
        raise ValueError(
            f"kernel must be positive semi-definite, got an eigenvalue of {float(values[0]):.3g} beside "
            f"{float(values[-1]):.3g}"
        )
    return vectors * values.clamp_min(0).sqrt()


def _given(kernel: Tensor, x: Tensor) -> Tensor:
    """Return a kernel that was given, symmetric to the last digit."""
    has_shape("kernel", floating("kernel", kernel), (len(x), len(x)), "x")
    found = finite("kernel", kernel.detach()).to(x)
    if float((found - found.T).abs().max()) > rounding(kernel.dtype, SYMMETRIC) * float(found.abs().max()):
        raise ValueError("kernel must be symmetric: that of all points with themselves")
    return (found + found.T) / 2


def _times(times: Tensor | Sequence[float]) -> Tensor:
    """Return times as a tensor in float64."""
    if isinstance(times, Tensor):
        found = floating("times", times).detach().double()
    else:
        found = torch.tensor([at_least("times", time, 0) for time in times], dtype=torch.float64)
    has_shape("times", found, (None,))
    if bool((finite("times", found) < 0).any()):
        raise ValueError(f"times must be at least 0, got {float(found.min()):g}")
    return found


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if integer(name, value, low) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
