"""Rank differential: alignment without negatives keeps its rank where the online branch has the lower rank.

Non-contrastive methods align an online branch with a target branch, which no gradient enters. Whatever makes the
branches differ acts on the spectrum of a batch of outputs: with ``z = U diag(s) V'`` a branch becomes

    U diag(s h(s)) V' = z V diag(h(s)) V' = z W ,                                                  (1)

where h lowers small singular values beside large ones (online) or raises them (target). The online output then has
the lower effective rank, the exponential of the entropy of its normalised singular values, and aligning it with
the target raises that of both: the features do not collapse. A filter (1) needs no parameters.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, one_of
from posterity._precision import wide, widened
from posterity._processes import all_rows, n_processes
from posterity.representation._pairs import matching_views

__all__ = ["RDMLoss", "RankMonitor", "effective_rank", "rank_difference", "spectral_filter"]

Filter = str | Callable[[Tensor], Tensor]
FILTERS = ("power", "log", "log1p", "log1p-squared")


def effective_rank(
    z: Float[Tensor, "n d"], *, of: Literal["singular", "eigen"] = "singular", center: bool = False
) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of a normalised spectrum: how many directions a batch fills.

    Parameters
    ----------
    z : Tensor of shape (n, d)
        Rows are samples.
    of : {"singular", "eigen"}, default="singular"
        The singular values of ``z``, or their squares, the eigenvalues of ``z.T @ z``.
    center : bool, default=False
        Whether the mean row is taken off first.

    Returns
    -------
    Tensor of shape ()
        In [1, min(n, d)], differentiable.

    Raises
    ------
    ValueError
        If ``z`` is not a floating-point matrix of finite numbers, or all of it is 0, where no rank is defined.

    References
    ----------
    .. [1] Zhuo, Wang, Ma, Wang. Towards a Unified Theoretical Understanding of Non-contrastive Learning via
       Rank Differential Mechanism. ICLR 2023. Section 3.
    .. [2] Roy, Vetterli. The effective rank: A measure of effective dimensionality. EUSIPCO 2007.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import effective_rank
    >>> round(float(effective_rank(torch.eye(5))), 4)
    5.0
    """
    return _rank("z", z, of, center)


def rank_difference(
    online: Float[Tensor, "n d"], target: Float[Tensor, "n d"], *, of: Literal["singular", "eigen"] = "singular",
    center: bool = False,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return by how much the effective rank of the target branch exceeds that of the online branch.

    Parameters
    ----------
    online, target : Tensor of shape (n, d)
        Outputs of the branches that are aligned, after predictor, filter or centring.
    of, center
        As for `effective_rank`.

    Returns
    -------
    Tensor of shape ()
        Positive where aligning them raises the rank.

    Raises
    ------
    ValueError
        As for `effective_rank`.

    References
    ----------
    .. [1] Zhuo, Wang, Ma, Wang. Towards a Unified Theoretical Understanding of Non-contrastive Learning via
       Rank Differential Mechanism. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import rank_difference, spectral_filter
    >>> z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> bool(rank_difference(spectral_filter(z, "log1p"), z) > 0)
    True
    """
    ranks = [_rank(name, z, of, center) for name, z in (("online", online), ("target", target))]
    return ranks[1] - ranks[0]


def spectral_filter(
    z: Float[Tensor, "n d"], filter: Filter = "power", *, sigma: float = 1.0
) -> Float[Tensor, "n d"]:
    """Multiply each singular value s of a batch by h(s): ``U diag(s h(s)) V'``.

    Parameters
    ----------
    z : Tensor of shape (n, d)
        Rows are samples; nothing is centred.
    filter : {"power", "log", "log1p", "log1p-squared"} or callable, default="power"
        h: s^sigma, log s, log(1 + s), log(1 + s^2), or ``h(s)`` of singular values (k,), descending.
    sigma : float, default=1.0
        The exponent of "power": -1 makes all singular values 1, 0 changes nothing.

    Returns
    -------
    Tensor of shape (n, d)
        ``z W`` with ``W = V diag(h(s)) V'``; the gradient takes W for a constant, a linear predictor.

    Raises
    ------
    ValueError
        If an argument is out of range, or a callable returns another shape or what is not finite.

    Notes
    -----
    Directions whose singular value is below ``max(n, d)`` times the precision of the largest are not spanned by the
    batch: they stay 0, where negative powers would blow up rounding.

    References
    ----------
    .. [1] Zhuo, Wang, Ma, Wang. Towards a Unified Theoretical Understanding of Non-contrastive Learning via
       Rank Differential Mechanism. ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import effective_rank, spectral_filter
    >>> z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> round(float(effective_rank(spectral_filter(z, sigma=-1))), 4)
    8.0
    """
    has_shape("z", floating("z", z), (None, None))
    if 0 in z.shape:
        raise ValueError(f"z must have a row and a column, got shape {tuple(z.shape)}")
    return _filtered("z", z, *_filter(filter, sigma))


class RDMLoss(nn.Module):
    """Alignment of two views, one branch of which goes through a spectral filter: no predictor, no negatives.

    Parameters
    ----------
    filter : {"power", "log", "log1p", "log1p-squared"} or callable, default="power"
        As for `spectral_filter`. An online filter keeps the rank up if it rises with s, a target filter if it
        falls; the opposite choices are allowed, as controls.
    sigma : float, default=1.0
        The exponent of "power": for the online branch positive, for the target branch negative.
    location : {"online", "target"}, default="online"
        Which branch is filtered.
    form : {"negcos", "byol"}, default="negcos"
        Minus the mean cosine, or ``4 + 4`` times that, BYOL's sum over both directions.

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if the views are not two (batch, dim) of one shape with two
        rows, or one target is given without the other.

    Notes
    -----
    1. Any filter may stand at the target; the official code takes powers there.
    2. End the projector in a BatchNorm without scale and shift: else the filter follows the mean.

    Where ``torch.distributed`` is initialised, a batch is that of all processes.

    References
    ----------
    .. [1] Zhuo, Wang, Ma, Wang. Towards a Unified Theoretical Understanding of Non-contrastive Learning via
       Rank Differential Mechanism. ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import RDMLoss
    >>> z1, z2 = torch.randn(2, 32, 8, requires_grad=True)
    >>> RDMLoss("power", sigma=-1, location="target")(z1, z2).backward()
    """

    def __init__(
        self, filter: Filter = "power", *, sigma: float = 1.0, location: Literal["online", "target"] = "online",
        form: Literal["negcos", "byol"] = "negcos",
    ) -> None:  # fmt: skip
        super().__init__()
        self.filter, self.sigma = _filter(filter, sigma)
        self.location = one_of("location", location, ("online", "target"))
        self.form = one_of("form", form, ("negcos", "byol"))

    def forward(
        self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], target1: Float[Tensor, "n d"] | None = None,
        target2: Float[Tensor, "n d"] | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the loss of two views after the projector.

        Parameters
        ----------
        z1, z2 : Tensor of shape (n, d)
            Views of the online branch, row i of one beside row i of the other.
        target1, target2 : Tensor of shape (n, d), optional
            The same views through a momentum branch; without them the targets are the views themselves. No
            gradient enters targets.

        Returns
        -------
        Tensor of shape ()
        """
        if (target1 is None) != (target2 is None):
            missing = "target1" if target1 is None else "target2"
            raise ValueError(f"target1 and target2 must both be given or neither, {missing} is missing")
        given = [z1, z2] if target1 is None else [z1, z2, target1, target2]
        names = ("z1", "z2", "target1", "target2")[: len(given)]
        matching_views(*given, least=0, names=names)
        given = all_rows(*given)
        matching_views(*given, names=names)
        if z1.shape[1] == 0:
            raise ValueError(f"z1 must have a column, got shape {tuple(z1.shape)}")
        return self._value(*given)

    @widened
    def _value(self, *given: Tensor) -> Tensor:
        names = ("z1", "z2") if len(given) == 2 or self.location == "online" else ("target1", "target2")
        online, target = list(given[:2]), [z.detach() for z in given[-2:]]
        branch = online if self.location == "online" else target
        for k, name in enumerate(names):
            branch[k] = _filtered(name, branch[k], self.filter, self.sigma)
        cosines = F.cosine_similarity(online[0], target[1]), F.cosine_similarity(online[1], target[0])
        value = -(cosines[0].mean() + cosines[1].mean()) / 2
        return value if self.form == "negcos" else 4 + 4 * value


class RankMonitor:
    """Effective ranks of both branches along training, for any method with two.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import RankMonitor
    >>> monitor = RankMonitor()
    >>> monitor.update(torch.ones(4, 3), torch.eye(4, 3))  # at each step, the outputs that are aligned
    >>> monitor.result()["difference"].round(3).tolist()
    [2.0]
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    @torch.no_grad()
    def update(self, online: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> None:
        """Add the ranks of two branches.

        Parameters
        ----------
        online, target : Tensor of shape (n, d)
            Outputs of the branches; nothing is kept of them.

        Raises
        ------
        ValueError
            As for `effective_rank`, or if the shapes differ.
        """
        names = "online", "target"
        matching_views(online, target, least=1, names=names)
        rows = all_rows(online, target) if n_processes() > 1 else (online, target)
        ranks = [float(_rank(name, z, "singular", False)) for name, z in zip(names, rows, strict=True)]
        self._seen.append((ranks[0], ranks[1]))

    def result(self) -> dict[str, ndarray]:
        """Return what was seen.

        Returns
        -------
        dict of str to ndarray
            ``"online"``, ``"target"`` and ``"difference"``, target less online, an entry an update.
        """
        online, target = np.asarray(self._seen, dtype=float).reshape(-1, 2).T
        return {"online": online, "target": target, "difference": target - online}


# The spectrum, and the filter in its thin basis.


def _rank(name: str, z: Tensor, of: str, center: bool) -> Tensor:
    has_shape(name, floating(name, z), (None, None))
    one_of("of", of, ("singular", "eigen"))
    if 0 in z.shape:
        raise ValueError(f"{name} must have a row and a column, got shape {tuple(z.shape)}")
    finite(name, z)
    z = z - wide(z).mean(0).to(z.dtype) if center else z
    if not bool(z.any()):
        raise ValueError(
            f"{name} must not be all 0: it has no rank" + (" once its mean is off" if center else "")
        )
    return _effective_rank(z, 1 if of == "singular" else 2)


@widened
def _effective_rank(z: Tensor, power: int) -> Tensor:
    spectrum = torch.linalg.svdvals(z / z.detach().abs().max()) ** power
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp()


def _filter(filter: Filter, sigma: float) -> tuple[Filter, float]:
    if not callable(filter):
        one_of("filter", filter, FILTERS)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not np.isfinite(sigma):
        raise ValueError(f"sigma must be a finite number, got {sigma!r}")
    return filter, float(sigma)


@widened
def _filtered(name: str, z: Tensor, filter: Filter, sigma: float) -> Tensor:
    """Return z W, W constant."""
    finite(name, z.detach())  # no spectrum is found of others, and its cost is nothing beside that of one
    if filter == "power" and sigma == 0:
        return z
    with torch.no_grad():
        basis, gains = _spectrum(z.detach(), filter, sigma)
    return (z @ basis * gains) @ basis.T


def _spectrum(z: Tensor, filter: Filter, sigma: float) -> tuple[Tensor, Tensor]:
    """Return V (d, k) and h(s) (k,)."""
    n, d = z.shape
    eps, tiny = torch.finfo(z.dtype).eps, torch.finfo(z.dtype).tiny
    # filters that vanish with s need no small singular values: these the Gram matrix, which is cheaper, gets wrong
    vanishes = filter in ("log1p", "log1p-squared") or (filter == "power" and sigma > 0)
    if vanishes:
        size = z.abs().max().clamp_min(tiny)  # squares stay in range
        z = z / size
        squares, vectors = torch.linalg.eigh(z @ z.T if n < d else z.T @ z)
        s = squares.clamp_min(0).sqrt()
        if n >= d:
            return vectors, _gain(size * s, filter, sigma)
        known = s > s[-1] * eps**0.5
        basis = z.T @ (vectors * torch.where(known, 1 / s, 0.0))
        return basis, torch.where(known, _gain(size * s, filter, sigma), 0.0)
    _, s, right = torch.linalg.svd(z, full_matrices=False)
    least = (s[0] * max(n, d) * eps).clamp_min(tiny)
    return right.T, torch.where(s > least, _gain(s.maximum(least), filter, sigma), 0.0)


def _gain(s: Tensor, filter: Filter, sigma: float) -> Tensor:
    if callable(filter):
        gain = filter(s)
        if not isinstance(gain, Tensor) or gain.shape != s.shape:
            shape = tuple(gain.shape) if isinstance(gain, Tensor) else type(gain).__name__
            raise ValueError(
                f"filter must return a tensor of the shape that it gets, {tuple(s.shape)}, got {shape}"
            )
        if not bool(gain.isfinite().all()):
            raise ValueError("filter must return finite values, got NaN or infinity")
        return gain.to(s)
    if filter == "power":
        return s**sigma
    return s.log() if filter == "log" else torch.log1p(s.square() if filter == "log1p-squared" else s)
