"""Geodesic correlation: what two views share whose samples are covariances, along geodesics through their means.

At the Frechet mean M of a view each matrix S has a coordinate along a direction u: <log_M(S), u>_M, affine
invariant. The correlation of two views along directions (u, v) is that of their coordinates, and the geodesic
correlations are its successive maxima. In whitened tangent vectors t they are those of canonical correlation analysis,

    singular values of  C_xx^(-1/2) C_xy C_yy^(-1/2) ,                                             (1)

and may train two encoders: the mean of the largest is the objective. A view of vectors uses them as they are.
"""

import warnings
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, within
from posterity._models import evaluating, resize_buffers
from posterity._precision import wide, widened
from posterity._processes import all_rows
from posterity.representation.spd import (
    check_spd,
    coordinates,
    frechet_mean,
    geodesic,
    spectral,
    tangent_vectors,
)

__all__ = ["DeepGeoCCA", "GeodesicCCA", "geodesic_correlation"]


def geodesic_correlation(
    x: Tensor, y: Tensor, *, n_components: int | None = None, ridge: float = 1e-3, mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the geodesic correlations of two views.

    Parameters
    ----------
    x, y : Tensor of shape (n, c, c) or (n, d)
        Symmetric positive definite matrices, or vectors; row i of one beside row i of the other.
    n_components : int, optional
        How many; at most the smaller dimension, which it is by default. Matrices have c (c + 1) / 2.
    ridge : float, default=1e-3
        Added to both covariances, times their mean variance; it lowers correlations.
    mean_x, mean_y : Tensor, optional
        Where the tangent spaces are; by default at the Frechet means of the views.

    Returns
    -------
    Tensor of shape (n_components,)
        Descending, differentiable.

    Raises
    ------
    ValueError
        If views or options do not fit, or a matrix is not symmetric positive definite.

    Warns
    -----
    UserWarning
        If there are fewer than two samples a dimension and no ridge: correlations are near 1 then, whatever the data.

    References
    ----------
    .. [1] Ju, Kobler, Tang, Guan, Kawanabe. Deep Geodesic Canonical Correlation Analysis for Covariance-Based
       Neuroimaging Data. ICLR 2024. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import geodesic_correlation
    >>> x = torch.randn(40, 3, 6) @ torch.randn(6, 6)
    >>> s = x @ x.mT + torch.eye(3)
    >>> bool(geodesic_correlation(s, s, n_components=1, ridge=0.0) > 0.99)
    True
    """
    views = _vectors(x, y, mean_x, mean_y, ridge)
    k = _components(n_components, views)
    return _correlations(*views, ridge)[1][:k].to(x.dtype)


class DeepGeoCCA(nn.Module):
    """Two encoders that learn, without labels, what two views share.

    Parameters
    ----------
    encoder_x, encoder_y : nn.Module
        Of a view to latents: matrices (n, c, c), as `SPDEncoder` gives, or vectors (n, d). Make them small: a batch
        should have some times as many samples as the tangent space dimensions.
    n_components : int, default=1
        Correlations that are maximised.
    ridge : float, default=1e-3
        As for `geodesic_correlation`.
    mean_momentum : float, default=0.1
        Share of the way that running means go to a batch's, in (0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range, or views do not fit.

    Notes
    -----
    The gradient of a batch's mean is that of its last step (see `frechet_mean`). `project` uses the running means
    and, after `fit_directions`, directions of a whole set.

    Where ``torch.distributed`` is initialised, correlations and means are those of the batch of all processes.

    References
    ----------
    .. [1] Ju, Kobler, Tang, Guan, Kawanabe. Deep Geodesic Canonical Correlation Analysis for Covariance-Based
       Neuroimaging Data. ICLR 2024. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import DeepGeoCCA, SPDEncoder
    >>> model = DeepGeoCCA(SPDEncoder(6, (), 2), SPDEncoder(5, (), 2))
    >>> x, y = (a @ a.mT + torch.eye(a.shape[1]) for a in (torch.randn(32, 6, 9), torch.randn(32, 5, 9)))
    >>> model.loss(x, y).backward()
    >>> model.fit_directions(x, y).project(x)[0].shape
    torch.Size([32, 1])
    """

    def __init__(
        self, encoder_x: nn.Module, encoder_y: nn.Module, *, n_components: int = 1, ridge: float = 1e-3,
        mean_momentum: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder_x, self.encoder_y = encoder_x, encoder_y
        self.n_components = integer("n_components", n_components, 1)
        self.ridge = at_least("ridge", ridge, 0)
        self.mean_momentum = within("mean_momentum", mean_momentum, 0, 1, open_low=True)
        for side in ("x", "y"):  # sizes are those of the latents
            for name in ("mean", "center", "directions"):
                self.register_buffer(f"{name}_{side}", torch.empty(0))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return minus the mean of the largest geodesic correlations of a batch; in training mode means move.

        Parameters
        ----------
        x, y : Tensor
            What the encoders take, row i of one beside row i of the other.

        Returns
        -------
        Tensor of shape ()
        """
        latents = all_rows(self.encoder_x(x), self.encoder_y(y))
        means = [_mean(z, tol=1e-8) for z in latents]
        if self.training:
            for side, mean in zip("xy", means, strict=True):
                self._move(side, mean.detach())
        found = geodesic_correlation(
            *latents, n_components=self.n_components, ridge=self.ridge, mean_x=means[0], mean_y=means[1]
        )
        return -found.mean()

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the latents of the views that are given.

        Parameters
        ----------
        x, y : Tensor, optional

        Returns
        -------
        tuple
            None where there is no view.
        """
        return (
            None if x is None else self.encoder_x(x), None if y is None else self.encoder_y(y)
        )  # fmt: skip

    @torch.no_grad()
    def project(
        self, x: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return canonical scores, in eval mode.

        Parameters
        ----------
        x, y : Tensor, optional

        Returns
        -------
        tuple of Tensor of shape (n, n_components), None where there is no view.
        """
        if not self.directions_x.numel():
            raise ValueError("fit_directions(x, y) must be called first")
        with evaluating(self):
            latents = self(x, y)
        return tuple(
            None if z is None else self._scores(side, z) for side, z in zip("xy", latents, strict=True)
        )  # type: ignore[return-value]

    @torch.no_grad()
    def fit_directions(self, x: Tensor, y: Tensor) -> "DeepGeoCCA":
        """Take means and directions from a whole set, after training.

        Parameters
        ----------
        x, y : Tensor

        Returns
        -------
        DeepGeoCCA
        """
        with evaluating(self):
            latents = self.encoder_x(x), self.encoder_y(y)
        means = [_mean(z) for z in latents]
        views = _vectors(*latents, *means, self.ridge)
        k = _components(self.n_components, views)
        directions, _ = _correlations(*views, self.ridge)
        for side, mean, view, found in zip("xy", means, views, directions, strict=True):
            setattr(self, f"mean_{side}", mean.detach())
            setattr(self, f"center_{side}", view.mean(0))
            setattr(self, f"directions_{side}", found[:, :k].contiguous())
        return self

    def _scores(self, side: str, z: Tensor) -> Tensor:
        mean, center, directions = (
            getattr(self, f"{name}_{side}") for name in ("mean", "center", "directions")
        )
        return (_coordinates(z, mean).to(center) - center) @ directions

    @torch.no_grad()
    def _move(self, side: str, mean: Tensor) -> None:
        name = f"mean_{side}"
        running = getattr(self, name)
        if running.shape != mean.shape:
            setattr(self, name, mean.clone())
        elif mean.ndim == 2:
            setattr(self, name, geodesic(running, mean.to(running), self.mean_momentum))
        else:
            setattr(self, name, torch.lerp(running, mean.to(running), self.mean_momentum))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        resize_buffers(self, [*self._buffers], state_dict, prefix)  # as large as the latents that were seen
        super()._load_from_state_dict(state_dict, prefix, *args)


class GeodesicCCA(TransformerMixin, BaseEstimator):
    """Canonical correlation analysis of two views, of which each may be covariances.

    Parameters
    ----------
    n_components : int, default=2
        Pairs of directions; at most the smaller dimension.
    ridge : float, default=1e-3
        As for `geodesic_correlation`.

    Attributes
    ----------
    correlations_ : ndarray of shape (n_components,)
        Of the scores of the training views, pair by pair.
    mean_x_, mean_y_ : ndarray of shape (c, c) or (d,)
        Frechet means; of vectors the mean.
    directions_x_, directions_y_ : ndarray of shape (d, n_components)
        In tangent coordinates (`tangent_vectors`).

    References
    ----------
    .. [1] Ju, Kobler, Tang, Guan, Kawanabe. Deep Geodesic Canonical Correlation Analysis for Covariance-Based
       Neuroimaging Data. ICLR 2024. Section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.representation import GeodesicCCA
    >>> rng = np.random.default_rng(0)
    >>> a = rng.normal(size=(50, 3, 8))
    >>> s = a @ a.transpose(0, 2, 1)
    >>> GeodesicCCA(n_components=1).fit(s, np.log(s[:, 0, :1])).transform(s).shape
    (50, 1)
    """

    def __init__(self, n_components: int = 2, *, ridge: float = 1e-3) -> None:
        self.n_components = n_components
        self.ridge = ridge

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, X: Any, y: Any) -> "GeodesicCCA":
        """Find directions.

        Parameters
        ----------
        X : array-like of shape (n, c, c) or (n, d)
        y : array-like of shape (n, c', c'), (n, d') or (n,)
            The other view.

        Returns
        -------
        GeodesicCCA
        """
        integer("n_components", self.n_components, 1)
        at_least("ridge", self.ridge, 0)
        if y is None:
            raise ValueError(
                "y must be the other view: GeodesicCCA requires y to be passed, but the target y is None"
            )
        latents = _array("X", X, 3), _array("y", y, 3)
        means = [_mean(z) for z in latents]
        views = _vectors(*latents, *means, self.ridge, names=("X", "y"))
        k = _components(self.n_components, views)
        directions, _ = _correlations(*views, self.ridge)
        self.mean_x_, self.mean_y_ = (m.numpy() for m in means)
        self._centers = [view.mean(0).numpy() for view in views]
        self.directions_x_, self.directions_y_ = (d[:, :k].numpy() for d in directions)
        self.n_features_in_ = latents[0].shape[1]
        self.correlations_ = self._correlation(X, y)
        return self

    def transform(self, X: Any, y: Any = None) -> Any:
        """Return canonical scores.

        Parameters
        ----------
        X : array-like of shape (n, c, c) or (n, d)
        y : array-like, optional

        Returns
        -------
        ndarray of shape (n, n_components), or of both views a tuple of two
        """
        check_is_fitted(self)
        x_scores = self._scores("X", X, self.mean_x_, self._centers[0], self.directions_x_)
        if y is None:
            return x_scores
        return x_scores, self._scores("y", y, self.mean_y_, self._centers[1], self.directions_y_)

    def score(self, X: Any, y: Any) -> float:
        """Return the mean correlation of the scores of two views.

        Parameters
        ----------
        X, y : array-like

        Returns
        -------
        float
        """
        return float(self._correlation(X, y).mean())

    def _correlation(self, X: Any, y: Any) -> ndarray:
        a, b = (s - s.mean(0) for s in self.transform(X, y))
        if len(a) != len(b):
            raise ValueError(f"y must have as many rows as X, {len(a)}, got {len(b)}")
        size = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
        return (a * b).sum(0) / np.where(size > 0, size, 1)

    def _scores(self, name: str, view: Any, mean: ndarray, center: ndarray, directions: ndarray) -> ndarray:
        z = _array(name, view)
        if tuple(z.shape[1:]) != mean.shape:
            wanted = ", ".join(map(str, mean.shape))
            raise ValueError(
                f"{name} has {z.shape[1]} features, but {type(self).__name__} is expecting {mean.shape[0]} features as "
                f"input: shape (n, {wanted}), got {tuple(z.shape)}"
            )
        with torch.no_grad():
            return (_coordinates(z, torch.from_numpy(mean)).numpy() - center) @ directions


# Views as vectors, and their canonical correlations.


def _mean(z: Tensor, tol: float = 1e-12) -> Tensor:
    return frechet_mean(z, tol=tol) if z.ndim == 3 else wide(z).mean(0).to(z.dtype)


def _coordinates(z: Tensor, mean: Tensor) -> Tensor:
    """Return the tangent vectors of matrices; vectors as they are."""
    return tangent_vectors(z, mean) if z.ndim == 3 else z


def _vectors(
    x: Tensor, y: Tensor, mean_x: Tensor | None, mean_y: Tensor | None, ridge: float,
    names: tuple[str, str] = ("x", "y"),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    at_least("ridge", ridge, 0)
    views = []
    for name, z, mean in zip(names, (x, y), (mean_x, mean_y), strict=True):
        floating(name, z)
        if z.ndim == 3:
            check_spd(name, z)
        else:
            has_shape(name, finite(name, z.detach()), (None, None))
        if len(z) != len(x):
            raise ValueError(f"{name} must have as many rows as {names[0]}, {len(x)}, got {len(z)}")
        if len(z) < 3 or z.shape[1] == 0:
            raise ValueError(f"{name} must have at least 3 rows and a column, got shape {tuple(z.shape)}")
        if mean is not None:
            has_shape(f"mean_{name}", floating(f"mean_{name}", mean), tuple(z.shape[1:]), name)
            mean = check_spd(f"mean_{name}", mean) if z.ndim == 3 else mean
        views.append(coordinates(z, _mean(z) if mean is None else mean) if z.ndim == 3 else z)
    most = max(v.shape[1] for v in views)
    if ridge == 0 and len(x) < 2 * most:
        warnings.warn(
            f"{len(x)} samples of {most} dimensions correlate whatever they are: set ridge, or use fewer dimensions",
            stacklevel=3,
        )
    return views[0], views[1]


def _components(n_components: int | None, views: tuple[Tensor, Tensor]) -> int:
    most = min(v.shape[1] for v in views)
    if n_components is None:
        return most
    if integer("n_components", n_components, 1) > most:
        raise ValueError(f"n_components must be at most {most}, the smaller dimension, got {n_components}")
    return n_components


@widened
def _correlations(x: Tensor, y: Tensor, ridge: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return directions of both views, a column a component, and the correlations (1)."""
    y = y.to(x.dtype)
    x, y = x - x.mean(0), y - y.mean(0)
    whitening = []
    for view in (x, y):
        cov = view.T @ view / len(view)
        mean = cov.diagonal().mean()
        eps = torch.finfo(cov.dtype).eps * len(cov)
        floor = (ridge + eps) * mean + torch.finfo(cov.dtype).tiny  # what does not vary at all has no scale
        whitening.append(
            spectral(cov + floor * torch.eye(len(cov), dtype=cov.dtype, device=cov.device), "inverse root")
        )
    inner = whitening[0] @ (x.T @ y / len(x)) @ whitening[1]
    left, found, right = torch.linalg.svd(inner, full_matrices=False)
    return (whitening[0] @ left.detach(), whitening[1] @ right.mT.detach()), torch.linalg.svdvals(
        inner
    ) if inner.requires_grad else found


def _array(name: str, view: Any, least: int = 1) -> Tensor:
    """Return a view as float64."""
    view = view.detach().cpu().numpy() if isinstance(view, Tensor) else view
    array = check_array(
        view,
        dtype=np.float64,
        allow_nd=True,
        ensure_2d=name != "y",
        ensure_min_samples=least,
        input_name=name,
    )
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must have shape (n, c, c) or (n, d), got {array.shape}")
    found = torch.from_numpy(array.copy())
    return check_spd(name, found) if found.ndim == 3 else found
