"""CIRCE: features that say nothing of a distractor Z beyond what the target Y explains, by one regression in advance.

Features phi(X) are independent of Z given Y if the covariance of kernel features

    CIRCE = | E[ phi(X) (x) (psi(Z) - E[psi(Z) | Y]) (x) psi'(Y) ] |^2                             (1)

vanishes. Of the three regressions that a conditional covariance asks for only Y -> psi(Z) is left, and it does not
involve the network: kernel ridge regression on held-out pairs, once. With R the Gram matrix of the residuals
psi(z_i) - mu(y_i) of a batch, (1) is estimated by the Hilbert-Schmidt independence criterion of K_x and R * K_y.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape
from posterity._models import resize_buffers
from posterity._precision import wide
from posterity._processes import all_rows
from posterity.representation.kernel_dependence import (
    columns,
    enough,
    gaussian,
    hsic,
    median_distance,
    same_length,
)

__all__ = ["CIRCE", "leave_one_out_errors"]

Kernel = Callable[[Tensor, Tensor], Tensor]
Width = float | Literal["median"]


def leave_one_out_errors(
    ky: Float[Tensor, "m m"], kz: Float[Tensor, "m m"], ridges: Sequence[float]
) -> Float[Tensor, " ridges"]:
    """Return the mean squared error, in the feature space of z, of predicting each sample from all others.

    Exact, from one eigendecomposition for all ridges: a residual over one minus its leverage.

    Parameters
    ----------
    ky, kz : Tensor of shape (m, m)
        Gram matrices of inputs and outputs of a kernel ridge regression.
    ridges : sequence of float
        Positive; added to ``ky`` as they are.

    Returns
    -------
    Tensor of shape (len(ridges),), float64
        Infinite for a ridge below the precision of ``ky``, its largest eigenvalue times m times 2e-16.

    Raises
    ------
    ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import leave_one_out_errors
    >>> leave_one_out_errors(torch.eye(3), torch.eye(3), [1.0]).tolist()
    [1.0]
    """
    has_shape("ky", floating("ky", ky), (None, None))
    has_shape("ky", ky, (len(ky), len(ky)))
    has_shape("kz", floating("kz", kz), tuple(ky.shape), "ky")
    if not len(ky):
        raise ValueError("ky must have at least one row, got none")
    ridges = [at_least(f"ridges[{k}]", ridge, 0, strict=True) for k, ridge in enumerate(ridges)]
    ky, kz = (_double(finite(name, k.detach())) for name, k in (("ky", ky), ("kz", kz)))
    values, vectors = torch.linalg.eigh(ky)
    turned = vectors.T @ kz @ vectors
    least = float(_rounding(values))
    errors = []
    for ridge in ridges:
        if ridge < least:
            errors.append(torch.inf)
            continue
        # left vectors' is I - H, so that nothing cancels
        left = vectors * (ridge / (values.clamp_min(0) + ridge))
        errors.append(float((((left @ turned) * left).sum(1) / (left * vectors).sum(1).square()).mean()))
    return torch.tensor(errors, dtype=torch.float64)


class CIRCE(nn.Module):
    """The penalty: ``fit(y, z)`` on held-out pairs once, then ``circe(features, y, z)`` in every batch.

    Parameters
    ----------
    sigma2_x : float or "median", default=0.01
        Of the features' Gaussian kernel; "median" takes the median squared distance of the batch. Features of
        other than unit size want another than the default, which would make their Gram matrix the identity.
    sigma2_z : float or "median", default=1.0
        Of the distractor; "median" is that of the held-out pairs.
    sigma2_y : float or "median", or sequence of these, default=(1.0, 0.1, 0.01, 0.001)
        Of the target; of several the one with the least leave-one-out error is taken.
    ridge : float or sequence of float, default=(0.01, 0.1, 1.0, 10.0, 100.0)
        Of the regression, not multiplied by the number of pairs; chosen likewise.
    kernel_x, kernel_z : callable, optional
        ``kernel(a, b)`` of (n, d) and (m, d), positive semidefinite, in the place of the Gaussian ones.
    biased : bool, default=False
        As for `hsic`.
    centered : bool, default=True
        Whether the features' mean is taken off, as in `hsic`; else the mean over pairs of ``K_x R K_y``, which
        agrees in expectation and varies more.

    Attributes
    ----------
    sigma2_y_, ridge_ : float
        What was chosen.
    loo_errors_ : Tensor of shape (widths, ridges)
        The leave-one-out errors of the grid.

    Raises
    ------
    ValueError
        If a parameter is out of range; in `fit` and at the call if data do not fit, or `fit` was not called.

    Notes
    -----
    1. Rows of a batch must not be among the held-out pairs: their residuals would be too small.
    2. The regression is made and kept in float64 where the device has it, whatever the module is cast to: it divides
       by the ridge what rounding leaves.
    3. Features of z are written by their coordinates on the axes of the held-out pairs' Gram matrix, as kernel
       principal components are; axes below rounding, which the mean of z given y does not see, are left out. `fit`
       costs O(m^3) a width, a batch O(n m axes + n^2 axes); a Gaussian kernel of few dimensions has some dozen axes.

    Where ``torch.distributed`` is initialised, the batch is that of all processes; all must `fit` on the same pairs.

    References
    ----------
    .. [1] Pogodin, Deka, Li, Sutherland, Veitch, Gretton. Efficient Conditionally Invariant Representation
       Learning. ICLR 2023. Sections 2 and 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import CIRCE
    >>> y, z = torch.rand(2, 100, 1)
    >>> circe = CIRCE(sigma2_x="median").fit(y[:60], z[:60])
    >>> features = torch.randn(40, 8, requires_grad=True)  # your network's
    >>> circe(features, y[60:], z[60:]).backward()
    """

    held_y: Tensor
    held_z: Tensor
    to_mean: Tensor
    to_axes: Tensor
    loo_errors_: Tensor

    def __init__(
        self, *, sigma2_x: Width = 0.01, sigma2_z: Width = 1.0,
        sigma2_y: Width | Sequence[Width] = (1.0, 0.1, 0.01, 0.001),
        ridge: float | Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0), kernel_x: Kernel | None = None,
        kernel_z: Kernel | None = None, biased: bool = False, centered: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sigma2_x, self.sigma2_z = _width("sigma2_x", sigma2_x), _width("sigma2_z", sigma2_z)
        self.sigma2_y = [_width("sigma2_y", value) for value in _listed("sigma2_y", sigma2_y)]
        self.ridge = [at_least("ridge", value, 0, strict=True) for value in _listed("ridge", ridge)]
        self.kernel_x, self.kernel_z = kernel_x, kernel_z
        self.biased, self.centered = bool(biased), bool(centered)
        for name in ("held_y", "held_z", "to_mean", "to_axes", "loo_errors_"):
            self.register_buffer(name, torch.empty(0))
        self._chosen: tuple[float, ...] = ()  # Python numbers, so that a step never waits for a device

    def get_extra_state(self) -> Tensor:
        """Return what `fit` chose, for ``state_dict``."""
        return torch.tensor(self._chosen, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `fit` chose, from ``state_dict``."""
        self._chosen = tuple(state.tolist())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CIRCE":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():  # float64 stays: rounding would be divided by the ridge
            self._buffers[name] = _double(before[name].to(moved.device))  # type: ignore[union-attr]
        return self

    @property
    def sigma2_y_(self) -> float:
        """The width of the target's kernel."""
        self._require_fit()
        return self._chosen[0]

    @property
    def ridge_(self) -> float:
        """The ridge of the regression."""
        self._require_fit()
        return self._chosen[1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, y: Float[Tensor, " m *dy"], z: Float[Tensor, " m *dz"]) -> "CIRCE":
        """Regress the distractor's features on the target, on held-out pairs.

        Parameters
        ----------
        y, z : Tensor of shape (m, d)
            At least ten pairs; ``(m,)`` counts as ``(m, 1)``.

        Returns
        -------
        CIRCE
        """
        y, z = columns("y", y), columns("z", z)
        same_length(len(y), "y", z=z)
        if len(y) < 10:
            raise ValueError(f"y must have at least 10 held-out rows, got {len(y)}")
        y, z = finite("y", y.detach()), finite("z", z.detach())
        with torch.autocast(y.device.type, enabled=False):
            exact = _double(y), _double(z)
            sigma2_z = median_distance(exact[1]) if self.sigma2_z == "median" else self.sigma2_z
            kz = self._kernel_z(exact[1], exact[1], float(sigma2_z))
            medians = {"median": float(median_distance(exact[0]))}
            widths = [float(medians.get(width, width)) for width in self.sigma2_y]  # type: ignore[call-overload]
            grams = [gaussian(exact[0], exact[0], width) for width in widths]
            errors = torch.stack([leave_one_out_errors(ky, kz, self.ridge) for ky in grams])
            if not bool(errors.isfinite().any()):
                raise ValueError(f"ridge must be above the precision of the Gram matrix, got {self.ridge}")
            width, at = divmod(int(errors.argmin()), len(self.ridge))
            ridge = float(self.ridge[at])
            own = torch.eye(len(y), dtype=kz.dtype, device=kz.device)
            factor = torch.linalg.cholesky(grams[width] + ridge * own)
            values, axes = torch.linalg.eigh(kz)
            seen = values > _rounding(values)  # often few, since Gaussian kernels are smooth
            sizes, axes = values[seen].sqrt(), axes[:, seen]
            self.to_mean = torch.cholesky_solve(axes * sizes, factor).T.contiguous()  # (axes, held)
            self.to_axes = axes / sizes  # (held, axes)
        self.held_y, self.held_z, self.loo_errors_ = exact[0].clone(), exact[1].clone(), errors
        self._chosen = (widths[width], ridge, float(sigma2_z))
        return self

    def forward(
        self, features: Tensor | Sequence[Tensor], y: Float[Tensor, " n *dy"], z: Float[Tensor, " n *dz"]
    ) -> Float[Tensor, ""]:
        """Return the penalty of a batch.

        Parameters
        ----------
        features : Tensor of shape (n, d), or sequence of these
            Of the network, or its predictions; of several layers the penalties are summed.
        y, z : Tensor of shape (n, d)
            Target and distractor.

        Returns
        -------
        Tensor of shape ()
            A gradient reaches the features alone.
        """
        layers = [features] if isinstance(features, Tensor) else list(features)
        if not layers:
            raise ValueError("features must be a tensor or a sequence of tensors, got an empty one")
        several = not isinstance(features, Tensor)
        names = [f"features[{k}]" if several else "features" for k in range(len(layers))]
        layers = [columns(name, x.flatten(1) if isinstance(x, Tensor) and x.ndim > 2 else x)
                  for name, x in zip(names, layers, strict=True)]  # fmt: skip
        y, z = self._batch(y, z)
        same_length(len(layers[0]), names[0], y=y, z=z, **dict(zip(names[1:], layers[1:], strict=True)))
        *layers, y, z = all_rows(*layers, y, z)
        enough(names[0], len(y), self.biased)
        for name, x in zip(names, layers, strict=True):
            if x.device.type == "cpu":
                finite(name, x.detach())
        with torch.autocast(y.device.type, enabled=False):
            return self._value(layers, y, z)

    def residual_kernel(self, y: Float[Tensor, " n *dy"], z: Float[Tensor, " n *dz"]) -> Float[Tensor, "n n"]:
        """Return the Gram matrix of what the target leaves unexplained of the distractor's features.

        Parameters
        ----------
        y, z : Tensor of shape (n, d)

        Returns
        -------
        Tensor of shape (n, n)
            Without a gradient.
        """
        y, z = self._batch(y, z)
        with torch.autocast(y.device.type, enabled=False):
            return self._residuals(_double(y), _double(z), wide(z).dtype).to(z.dtype)

    def _batch(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        self._require_fit()
        y, z = columns("y", y), columns("z", z)
        for name, value, held in (("y", y, self.held_y), ("z", z, self.held_z)):
            has_shape(name, value, (len(y), held.shape[1]), "y and what fit saw")
            if value.device.type == "cpu":
                finite(name, value.detach())
        return y, z

    def _value(self, layers: list[Tensor], y: Tensor, z: Tensor) -> Tensor:
        dtype, y, z = wide(layers[0]).dtype, _double(y.detach()), _double(z.detach())
        other = self._residuals(y, z, dtype) * gaussian(y, y, self.sigma2_y_, dtype)
        total = wide(layers[0]).new_zeros(())
        for x in map(wide, layers):
            if self.kernel_x is not None:
                kx = self.kernel_x(x, x)
            else:
                kx = gaussian(
                    x, x, median_distance(x.detach()) if isinstance(self.sigma2_x, str) else self.sigma2_x
                )
            if self.centered:
                total = total + hsic(kx, other, biased=self.biased)
            else:
                product, n = kx * other, len(kx)
                diagonal, of = (0.0, n * n) if self.biased else (product.diagonal().sum(), n * (n - 1))
                total = total + (product.sum() - diagonal) / of
        return total.to(layers[0].dtype)

    @torch.no_grad()
    def _residuals(self, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        sigma2_y, _, sigma2_z = self._chosen
        # mu(y), and of psi(z) what lies beside it, by their coordinates on orthonormal axes
        mean = (gaussian(y, self.held_y, sigma2_y) @ self.to_mean.T).to(dtype)  # (batch, axes)
        own = (self._kernel_z(z, self.held_z, sigma2_z) @ self.to_axes).to(dtype)
        half = (0.5 * mean - own) @ mean.T
        return self._kernel_z(z, z, sigma2_z, dtype) + half + half.T

    def _kernel_z(self, a: Tensor, b: Tensor, sigma2: float, dtype: torch.dtype | None = None) -> Tensor:
        if self.kernel_z is None:
            return gaussian(a, b, sigma2, dtype)
        return self.kernel_z(a, b).to(dtype or a.dtype)

    def _require_fit(self) -> None:
        if not self.held_y.numel():
            raise ValueError("fit(y, z) must be called first, on held-out pairs")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        resize_buffers(self, [*self._buffers], state_dict, prefix)  # as many as the pairs that were fitted
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


# Distances, and what is asked of data.


def _rounding(values: Tensor) -> Tensor:
    """Return the size of eigenvalues, in rising order, that rounding alone makes."""
    return values[-1] * len(values) * torch.finfo(values.dtype).eps


def _double(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _width(name: str, value: Width) -> Width:
    return value if value == "median" else at_least(name, value, 0, strict=True)


def _listed(name: str, values: object) -> list:
    found = [values] if isinstance(values, str | Real) else list(values)  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"{name} must name at least one value, got none")
    return found
