r"""Sobolev losses: they choose which frequencies a network learns first, on points that are not uniform.

On the sphere :math:`S^{d-1}`, with quadrature weights c_i and harmonics of degree l orthonormal on it,

.. math:: \Phi_s = \tfrac12 \sum_{l \le L} \sum_p (1 + l)^{2s}
   \Bigl| \sum_i c_i\, Y_{l,p}(x_i)\, (u_i - y_i) \Bigr|^2 = \tfrac12\, r^\top P_s\, r .            \qquad (1)

A wide ReLU network learns degree l at the rate :math:`\mu_l (1 + l)^{2s}`, :math:`\mu_l \sim l^{-d}`: smooth parts
first at s = 0, all alike at s = d/2, detail first beyond; s < 0 leaves detail, such as noise, alone for longer. No
harmonic is built: their sums over p are polynomials of cosines. For images and signals the same norm is taken by FFT.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import floating, one_of, within
from posterity._precision import wide, widened
from posterity.dynamics._harmonics import area, count, zonal
from posterity.dynamics.sphere_quadrature import (
    cosine_blocks,
    on_sphere,
    settled_degree,
    settled_weights,
    zonal_sum,
)

__all__ = ["ImageSobolevLoss", "SobolevLoss", "frequency_energy"]

STEEPEST = 8.0  # of |s|: more overflows what it is to weigh


class SobolevLoss(nn.Module):
    r"""Squared Sobolev norm of the misfit at all training points of a sphere, equation (1).

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Unit vectors, 2 <= d <= 64: the training inputs, in the order of the predictions.
    s : float, default=0.0
        Sobolev index in [-8, 8]: degree l is weighed by (1 + l)^(2s). 0 is the squared error, integrated over the
        sphere, up to degree L; positive values push detail, negative ones hold it back.
    max_degree : int, optional
        L, at least 0. By default the largest for which there are at most n / 2 harmonics, as more are
        not told apart by n points.
    weights : Tensor of shape (n,), optional
        Not negative. By default those of `quadrature_weights`; equal ones, 2 pi / n on the circle, show what
        nonuniform points do without.

    Attributes
    ----------
    weights : Tensor of shape (n,)
    matrix : Tensor of shape (n, n)
        P_s; both are buffers in the dtype of ``x``, float32 at least.
    max_degree : int
    s : float

    Raises
    ------
    ValueError
        If ``x`` is not of unit vectors, an option does not fit, or predictions are not of all points.

    Warns
    -----
    UserWarning
        If ``max_degree`` asks for more harmonics than there are points.

    Notes
    -----
    1. A value takes one product with the matrix of n^2 entries, and its gradient, P_s r, another.
    2. Data that are not on a sphere are put on it by ``x / x.norm(dim=1, keepdim=True)``, or, to keep lengths, with
       a column of ones appended before that.
    3. A large s multiplies what quadrature errs by in high degrees. Where points leave gaps, give the ``max_degree``
       that is wanted: a gap of g radians tells degrees up to about pi / g apart.

    References
    ----------
    .. [1] Yu, Yang, Townsend. Tuning Frequency Bias in Neural Network Training with Nonuniform Data. ICLR 2023.
       Sections 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import SobolevLoss
    >>> angles = 2 * torch.pi * torch.arange(16) / 16
    >>> x = torch.stack([angles.cos(), angles.sin()], 1)
    >>> pred, target = (3 * angles).sin(), torch.zeros(16)  # |sin 3t|^2 integrates to pi
    >>> SobolevLoss(x)(pred, target) / torch.pi
    tensor(0.5000)
    >>> SobolevLoss(x, s=1.0)(pred, target) / torch.pi  # times (1 + 3)^2
    tensor(8.0000)
    """

    weights: Tensor
    matrix: Tensor

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        s: float = 0.0,
        *,
        max_degree: int | None = None,
        weights: Float[Tensor, " n"] | None = None,
    ) -> None:
        super().__init__()
        self.s = within("s", s, -STEEPEST, STEEPEST)
        points = on_sphere("x", x)
        self.max_degree = settled_degree(max_degree, *points.shape)
        with torch.inference_mode(False), torch.no_grad():
            c = settled_weights(weights, points)
            dtype = wide(x.new_empty(0)).dtype
            self.register_buffer("weights", c.to(x.device, dtype))
            self.register_buffer("matrix", sobolev_matrix(points, c, s, self.max_degree).to(x.device, dtype))

    @widened
    def forward(
        self, pred: Float[Tensor, " n *outputs"], target: Float[Tensor, " n *outputs"]
    ) -> Float[Tensor, ""]:
        """Return the loss, summed over outputs: a scalar.

        Parameters
        ----------
        pred, target : Tensor of shape (n,) or (n, k)
            At all points, in the order of ``x``.

        Returns
        -------
        Tensor
        """
        n = len(self.weights)
        _alike(pred, target)
        if pred.ndim not in (1, 2) or len(pred) != n:
            raise ValueError(
                f"pred must have shape ({n},) or ({n}, k), got {tuple(pred.shape)}: SobolevLoss needs all points "
                "of x; for minibatches use ImageSobolevLoss or build one on the batch"
            )
        dtype = torch.promote_types(pred.dtype, wide(self.matrix).dtype)
        residual = (pred - target).to(dtype)
        return (residual * (self.matrix.to(dtype) @ residual)).sum().div(2).to(pred.dtype)

    def spectral_norm(self) -> float:
        """Return the largest eigenvalue of P_s.

        Gradient descent on a wide network is stable below a step of 2 / (this * largest eigenvalue of its kernel).
        """
        return float(torch.linalg.eigvalsh(wide(self.matrix))[-1])

    def extra_repr(self) -> str:
        return f"n={len(self.weights)}, s={self.s:g}, max_degree={self.max_degree}"


class ImageSobolevLoss(nn.Module):
    r"""Squared Sobolev norm of the misfit of images or signals, by FFT; minibatches are welcome.

    With F the orthonormal Fourier transform over the last axes and k its integer frequencies,

    .. math:: \mathrm{mean}\bigl( (1 + |k|^2)^s\, |F (u - y)|^2 \bigr).

    Parameters
    ----------
    s : float, default=0.0
        Sobolev index in [-8, 8]: 0 is the mean squared error; negative values leave high-frequency noise alone, positive
        ones sharpen.
    dims : {1, 2}, default=2
        How many last axes are space or time.
    normalize : bool, default=False
        Whether weights are divided by their mean over frequencies, so that the loss of white noise, and
        with it a learning rate, is that of the mean squared error.
    reduction : {"mean", "sum", "none"}, default="mean"
        What to make of the losses of single images (a channel is one), each a mean over its entries.

    Raises
    ------
    ValueError
        If an option is unknown, or images are empty, of integers, or of different shapes.

    Notes
    -----
    1. (1 + |k|^2)^s here and (1 + l)^(2s) on the sphere are equivalent norms, not equal ones.
    2. The Fourier transform sees images as periodic: an edge that does not meet the opposite one is detail.

    References
    ----------
    .. [1] Yu, Yang, Townsend. Tuning Frequency Bias in Neural Network Training with Nonuniform Data. ICLR 2023.
       Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import ImageSobolevLoss
    >>> wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    >>> flat = torch.zeros_like(wave)
    >>> ImageSobolevLoss()(wave, flat), ImageSobolevLoss(-1.0)(wave, flat)  # 1/2, and 1/2 (1 + 3^2)^-1
    (tensor(0.5000), tensor(0.0500))
    """

    def __init__(
        self,
        s: float = 0.0,
        *,
        dims: Literal[1, 2] = 2,
        normalize: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        self.s = within("s", s, -STEEPEST, STEEPEST)
        self.dims = one_of("dims", dims, (1, 2))
        self.normalize = one_of("normalize", normalize, (False, True))
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))

    @widened
    def forward(
        self, pred: Float[Tensor, " *batch size"], target: Float[Tensor, " *batch size"]
    ) -> Float[Tensor, " *reduced"]:
        """Return the loss.

        Parameters
        ----------
        pred, target : Tensor of shape (..., H, W), or (..., T) with ``dims=1``

        Returns
        -------
        Tensor
            A scalar, or of shape (...) for ``reduction="none"``.
        """
        _alike(pred, target, "scale images to floats, x / 255")
        if pred.ndim < self.dims or pred.numel() == 0:
            raise ValueError(
                f"pred must have {self.dims} or more axes and no empty one, got shape {tuple(pred.shape)}"
            )
        axes = tuple(range(-self.dims, 0))
        weight = self._weight(pred.shape[-self.dims :], pred.device).to(pred.dtype)
        spectrum = torch.view_as_real(torch.fft.rfftn(pred - target, dim=axes))
        # a product with a vector: sums over short axes, and their gradients, are far slower
        each = spectrum.square().flatten(-self.dims - 1) @ weight
        return each if self.reduction == "none" else getattr(each, self.reduction)()

    def _weight(self, sizes: torch.Size, device: torch.device) -> Tensor:
        """Return what squares of the real and imaginary parts of half the spectrum count in the mean, in a row."""
        double = torch.float32 if device.type == "mps" else torch.float64
        *others, last = (torch.fft.fftfreq(n, d=1 / n, dtype=double, device=device) for n in sizes)
        half = last[: len(last) // 2 + 1].square()
        twice = torch.full_like(half, 2.0)  # the other half is its mirror image, but for the ends
        twice[0] = 1.0
        if len(last) % 2 == 0:
            twice[-1] = 1.0
        square = half if not others else others[0].square()[:, None] + half
        weight = (1 + square) ** self.s * twice / sizes.numel() ** 2
        if self.normalize:
            weight = weight / (weight.sum() * sizes.numel())
        return weight.flatten().repeat_interleave(2)

    def extra_repr(self) -> str:
        return f"s={self.s:g}, dims={self.dims}, normalize={self.normalize}, reduction={self.reduction!r}"


@torch.no_grad()
def frequency_energy(
    residual: Float[Tensor, " n *outputs"],
    x: Float[Tensor, "n d"],
    *,
    max_degree: int | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " degrees"]:
    r"""Return the energy of a function on the sphere in each degree: what to plot during training.

    .. math:: E_l = \sum_p \Bigl| \sum_i c_i\, Y_{l,p}(x_i)\, r_i \Bigr|^2,

    so that the loss (1) is half of the sum of (1 + l)^(2s) E_l.

    Parameters
    ----------
    residual : Tensor of shape (n,) or (n, k)
        Values at the points, such as predictions less targets; energies are summed over k.
    x : Tensor of shape (n, d)
        Unit vectors, 2 <= d <= 64.
    max_degree, weights : optional
        As of `SobolevLoss`.

    Returns
    -------
    Tensor of shape (L + 1,)
        In float64 on the CPU, none negative.

    Raises
    ------
    ValueError
        If ``x`` is not of unit vectors, or the others do not fit it.

    References
    ----------
    .. [1] Yu, Yang, Townsend. Tuning Frequency Bias in Neural Network Training with Nonuniform Data. ICLR 2023.
       Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import frequency_energy
    >>> angles = 2 * torch.pi * torch.arange(12) / 12
    >>> x = torch.stack([angles.cos(), angles.sin()], 1)
    >>> (frequency_energy(1 + (2 * angles).sin(), x) / torch.pi).round(decimals=3)  # |1|^2 is 2 pi, |sin 2t|^2 pi
    tensor([2., 0., 1.], dtype=torch.float64)
    """
    points = on_sphere("x", x)
    n, d = points.shape
    if floating("residual", residual).ndim not in (1, 2) or len(residual) != n:
        raise ValueError(f"residual must have shape ({n},) or ({n}, k) for x, got {tuple(residual.shape)}")
    degree = settled_degree(max_degree, n, d)
    c = settled_weights(weights, points)
    values = c[:, None] * residual.detach().to(points).reshape(n, -1)
    energies = points.new_zeros(degree + 1)
    for rows, cosines in cosine_blocks(points):
        later = values[rows.start :].clone()
        later[rows.stop - rows.start :] *= 2  # pairs that come up once count twice
        for each, polynomial in enumerate(zonal(cosines, degree, d)):
            energies[each] += (values[rows] * (polynomial @ later)).sum()
    harmonics = [count(each, d) / area(d) for each in range(degree + 1)]
    return energies.cpu().mul_(torch.tensor(harmonics, dtype=torch.float64)).clamp_min_(0)


def sobolev_matrix(x: Tensor, weights: Tensor, s: float, max_degree: int) -> Tensor:
    """Return P_s for points as `on_sphere` returns them."""
    factors = [(1.0 + degree) ** (2 * s) for degree in range(max_degree + 1)]
    return zonal_sum(x, factors).mul_(weights).mul_(weights[:, None])


def _alike(pred: Any, target: Any, hint: str = "") -> None:
    floating("pred", pred, hint)
    if floating("target", target, hint).shape != pred.shape:
        raise ValueError(
            f"target must have the shape of pred, {tuple(pred.shape)}, got {tuple(target.shape)}"
        )
