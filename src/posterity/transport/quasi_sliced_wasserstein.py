"""Quasi-sliced Wasserstein: evenly spread directions in place of random ones.

The sliced distance of two clouds averages one-dimensional ones over the sphere,

    SW_p(x, y)^p = E_theta [ W_p(theta.x, theta.y)^p ],   theta uniform on the sphere,

each W_p by sorting. Random directions err by O(1 / sqrt L); on a point set that covers the
sphere evenly (a spiral, mapped Sobol points, minimisers of an energy) the same L give an
error smaller by one to three digits. Rotating the set at random for every call makes each
direction uniform, so SW_p^p and its gradient are unbiased, with little noise left.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, floating, integer, one_of
from posterity._precision import widened
from posterity._random import draw_device, seed_from

__all__ = ["QuasiSlicedWasserstein", "sliced_wasserstein", "sphere_points"]

Method = Literal["gaussian", "equal-area", "spiral", "distance", "coulomb", "random"]
Randomize = Literal["rotate", "scramble"]
METHODS = ("gaussian", "equal-area", "spiral", "distance", "coulomb", "random")
SOBOL = ("gaussian", "equal-area")


def sphere_points(
    n: int, method: Method = "spiral", *, randomize: Randomize | None = None,
    generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n 3"]:  # fmt: skip
    """Return n points that cover the unit sphere in three dimensions evenly.

    Parameters
    ----------
    n : int
        How many, at least 1.
    method : str, default="spiral"
        ``"gaussian"`` and ``"equal-area"`` map Sobol points of the cube and the square;
        ``"spiral"`` is the generalised spiral; ``"distance"`` and ``"coulomb"`` start from it
        and maximise the mean distance, or minimise the mean inverse distance, of pairs
        (seconds for some hundred points, kept for the process); ``"random"`` draws
        independent uniform points.
    randomize : {"rotate", "scramble"}, optional
        Make every point uniform on the sphere: by a random rotation of the set, or for the
        two Sobol sets by Owen scrambling.
    generator : torch.Generator, optional
        On the CPU; by default torch's.
    dtype : torch.dtype, default=torch.float32
        Of the result; points are computed in float64.
    device : torch.device or str, optional
        Of the result.

    Returns
    -------
    Tensor
        Unit rows.

    Raises
    ------
    ValueError
        If an argument is not one of those allowed.

    References
    ----------
    .. [1] Nguyen, Bariletto, Ho. Quasi-Monte Carlo for 3D Sliced Wasserstein. ICLR 2024.
    .. [2] Rakhmanov, Saff, Zhou. Minimal discrete energy on the sphere. Mathematical Research
       Letters 1, 1994.

    Examples
    --------
    >>> from posterity.transport import sphere_points
    >>> points = sphere_points(100)
    >>> float((points.T @ points / 100 * 3 - torch.eye(3)).abs().max()) < 0.01
    True
    """
    integer("n", n, 1)
    _check_method(method, randomize)
    if method == "random":
        points = _normalized(_randn((n, 3), generator))
    else:
        seed = None
        if randomize == "scramble":
            seed = seed_from(generator)
        points = _points(n, method) if seed is None else _sobol(n, method, seed)
        if randomize == "rotate":
            points = points @ _rotations((), generator).to(points)
    return points.to(dtype=dtype, device=device, copy=True)  # what is kept stays ours


@widened
def sliced_wasserstein(
    x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch l d"], directions: Float[Tensor, "... L d"], *,
    p: float = 2,
) -> Float[Tensor, "*batch"]:  # fmt: skip
    """Return the sliced Wasserstein distance of two clouds along given directions.

    Parameters
    ----------
    x, y : Tensor
        Clouds of points of equal weight, ``(*batch, m, d)`` and ``(*batch, l, d)``; for
        m other than l the one-dimensional distances are exact all the same.
    directions : Tensor
        ``(L, d)`` for all, or ``(*batch, L, d)``; scaled to unit length.
    p : float, default=2
        Order, at least 1.

    Returns
    -------
    Tensor
        ``(mean over directions of W_p^p)^(1/p)``, one a pair, differentiable; where it is 0 its
        gradient is 0.

    Raises
    ------
    ValueError
        If shapes do not fit, a cloud is empty, ``p`` is below 1, or (on the CPU) a
        coordinate is not finite or a direction is 0.

    References
    ----------
    .. [1] Bonneel, Rabin, Peyre, Pfister. Sliced and Radon Wasserstein barycenters of
       measures. Journal of Mathematical Imaging and Vision 51, 2015.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import sliced_wasserstein, sphere_points
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> sliced_wasserstein(x, x + torch.tensor([3.0, 0.0, 0.0]), sphere_points(1000))
    tensor(1.7320)
    """
    at_least("p", p, 1)
    for name, cloud in (("x", x), ("y", y), ("directions", directions)):
        floating(name, cloud)
        if cloud.ndim < 2 or 0 in cloud.shape[-2:]:
            raise ValueError(
                f"{name} must hold at least one point, (..., points, d), got {tuple(cloud.shape)}"
            )
        if cloud.device.type == "cpu" and not bool(torch.isfinite(cloud.detach()).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    d = x.shape[-1]
    if y.shape[-1] != d or directions.shape[-1] != d:
        raise ValueError(
            f"x, y and directions must have one dimension, got {d}, {y.shape[-1]} and {directions.shape[-1]}"
        )
    batch = x.shape[:-2]
    if y.shape[:-2] != batch or directions.shape[:-2] not in ((), batch):
        raise ValueError(
            f"x and y must have the same batch, directions the same or none, got {tuple(batch)}, "
            f"{tuple(y.shape[:-2])} and {tuple(directions.shape[:-2])}"
        )
    length = directions.norm(dim=-1, keepdim=True)
    if directions.device.type == "cpu" and not bool((length > 0).all()):
        raise ValueError("directions must not be of length 0")
    theta = (directions / length).to(x)
    # sorting is along memory, so project to (..., L, points)
    a, b = ((theta @ cloud.mT).sort(dim=-1).values for cloud in (x, y))
    if a.shape[-1] == b.shape[-1]:
        powers = _power(a - b, p).mean((-1, -2))
    else:
        i, j, width = _levels(a.shape[-1], b.shape[-1], x)
        powers = (_power(a[..., i] - b[..., j], p) @ width).mean(-1)
    return _root(powers, p)


class QuasiSlicedWasserstein(nn.Module):
    """Sliced Wasserstein distance of 3-D clouds along evenly spread directions, as a loss.

    Parameters
    ----------
    n_directions : int, default=100
        Projections a pair of clouds.
    method : str, default="spiral"
        As for `sphere_points`; ``"random"`` draws anew at every call.
    randomize : {"rotate", "scramble"}, optional
        Draw a random version of the set at every call, one for each pair of a batch, so
        that SW_p^p is unbiased. Without, the set is made once.
    p : float, default=2
        Order, at least 1.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the batch of pairs.
    generator : torch.Generator, optional
        Of the random versions; on the CPU.

    Notes
    -----
    SW_p^p is unbiased under ``randomize``, SW_p itself is not, because of the root. The
    rotation is uniform: the QR decomposition of a Gaussian matrix with the signs of R's
    diagonal fixed. Without that, as in the official code, it is not.

    References
    ----------
    .. [1] Nguyen, Bariletto, Ho. Quasi-Monte Carlo for 3D Sliced Wasserstein. ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import QuasiSlicedWasserstein
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    >>> loss = QuasiSlicedWasserstein(50)(x, torch.zeros(64, 3))
    >>> loss.backward()
    """

    directions: Tensor

    def __init__(
        self, n_directions: int = 100, *, method: Method = "spiral", randomize: Randomize | None = None,
        p: float = 2, reduction: Literal["mean", "sum", "none"] = "mean",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_directions = integer("n_directions", n_directions, 1)
        _check_method(method, randomize)
        self.method, self.randomize = method, randomize
        self.p = at_least("p", p, 1)
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))
        self.generator = generator
        if method != "random":
            points = sphere_points(n_directions, method, dtype=torch.float64)
            self.register_buffer("directions", points, persistent=False)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch l d"]) -> Float[Tensor, "..."]:
        """Return the distance of each pair of clouds, reduced.

        Parameters
        ----------
        x, y : Tensor
            Clouds ``(*batch, m, 3)`` and ``(*batch, l, 3)``.

        Returns
        -------
        Tensor
            A scalar, or for ``reduction="none"`` one value a pair.
        """
        for name, cloud in (("x", x), ("y", y)):
            if floating(name, cloud).ndim < 2 or cloud.shape[-1] != 3:
                raise ValueError(
                    f"{name} must have shape (..., points, 3), got {tuple(cloud.shape)}: for other dimensions "
                    "use sliced_wasserstein with directions of your own"
                )
        dtype = torch.promote_types(x.dtype, torch.float32)
        value = sliced_wasserstein(x, y, self._draw(x.shape[:-2]).to(x.device, dtype), p=self.p)
        return value if self.reduction == "none" else getattr(value, self.reduction)()

    def _draw(self, batch: tuple[int, ...]) -> Tensor:
        if self.method == "random":
            return _randn((*batch, self.n_directions, 3), self.generator)
        if self.randomize == "rotate":
            return self.directions @ _rotations(batch, self.generator).to(self.directions)
        if self.randomize == "scramble":
            options = {"randomize": "scramble", "generator": self.generator, "dtype": torch.float64}
            sets = [
                sphere_points(self.n_directions, self.method, **options)  # type: ignore[arg-type]
                for _ in range(math.prod(batch))
            ]
            return torch.cat(sets or [self.directions[:0]]).view(*batch, self.n_directions, 3)
        return self.directions


def _check_method(method: str, randomize: str | None) -> None:
    one_of("method", method, METHODS)
    one_of("randomize", randomize, (None, "rotate", "scramble"))
    if randomize == "scramble" and method not in SOBOL:
        raise ValueError(f"randomize='scramble' is for {' and '.join(SOBOL)}, got method {method!r}")


def _normalized(points: Tensor) -> Tensor:
    return points / points.norm(dim=-1, keepdim=True)


@lru_cache(maxsize=32)
def _points(n: int, method: str) -> Tensor:
    """Return the fixed set of a method, float64; callers must not change it."""
    with torch.inference_mode(False):  # what is kept may be trained with later
        if method in SOBOL:
            return _sobol(n, method, None)
        spiral = _spiral(n)
        return spiral if method == "spiral" or n == 1 else _least_energy(spiral, method)


def _sobol(n: int, method: str, seed: int | None) -> Tensor:
    engine = torch.quasirandom.SobolEngine(3 if method == "gaussian" else 2, seed is not None, seed)
    u = engine.draw(n, dtype=torch.float64)
    if method == "gaussian":
        return _normalized(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)) + 1e-6)
    across, along = 2 * math.pi * u[:, 0], u[:, 1]
    radius = 2 * (along - along.square()).clamp_min(0).sqrt()
    return torch.stack([radius * across.cos(), radius * across.sin(), 1 - 2 * along], 1)


def _spiral(n: int) -> Tensor:
    z = 1 - (2 * torch.arange(1, n + 1, dtype=torch.float64) - 1) / n
    down, around = z.arccos(), 1.8 * math.sqrt(n) * z.arccos()
    return torch.stack([down.sin() * around.cos(), down.sin() * around.sin(), z], 1)


def _energy(points: Tensor, method: str) -> Tensor:
    distance = torch.pdist(points)
    return -distance.mean() if method == "distance" else (1 / (distance + 1e-6)).mean()


def _least_energy(start: Tensor, method: str) -> Tensor:
    """Return the best points that L-BFGS meets from a start, never worse than the start."""
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=200, history_size=20, line_search_fn="strong_wolfe")
    best = [float(_energy(start, method)), start]

    def closure() -> Tensor:
        optimizer.zero_grad()
        points = _normalized(free)
        energy = _energy(points, method)
        energy.backward()
        if float(energy.detach()) < best[0]:
            best[:] = [float(energy.detach()), points.detach().clone()]
        return energy

    with torch.enable_grad():
        optimizer.step(closure)
    return best[1]


def _randn(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=draw_device(generator))


def _rotations(batch: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Return uniform rotations (*batch, 3, 3)."""
    q, r = torch.linalg.qr(_randn((*batch, 3, 3), generator))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # QR is unique, and q uniform, only so
    return q * torch.linalg.det(q)[..., None, None]


def _levels(m: int, n: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each piece on which both quantile functions are constant, two indices and its width."""
    numbers = [torch.arange(size, device=like.device) * other for size, other in ((m, n), (n, m))]
    cuts = torch.cat(numbers).unique()  # multiples of 1 / (m n)
    width = torch.diff(cuts, append=cuts.new_tensor([m * n]))
    return cuts // n, cuts // m, width.to(like.dtype) / (m * n)


def _power(x: Tensor, p: float) -> Tensor:
    return x.square() if p == 2 else x.abs() if p == 1 else x.abs().pow(p)


def _root(x: Tensor, p: float) -> Tensor:
    if p == 1:
        return x
    positive = x > 0
    root = torch.where(positive, x, 1).pow(1 / p)
    return torch.where(positive, root, 0)
