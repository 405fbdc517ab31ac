"""Multi-marginal earth mover's distance: one number for how far d histograms lie apart.

Histograms p_1, ..., p_d on the same n ordered bins are coupled at the least mean cost
c(i_1, ..., i_d) = max_r i_r - min_r i_r, the range of the bins that are joined:

    min { sum_i T_i c(i) :  T >= 0,  the r-th marginal of T is p_r }.          (1)

The cost is Monge, so the monotone coupling (walk all histograms from the left, ship what
the current bins share) is optimal, and with the cumulative sums F_r everything is closed:

    value = sum_j  max_r F_r(j) - min_r F_r(j)   over j = 0, ..., n - 2.        (2)

Bin r's optimal price is a sum of signs of where F_r is the largest or the smallest, so the
gradient comes with the value, in O(n d); for two histograms (2) is Wasserstein-1 in bins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posterity._checks import at_least, floating, has_shape, integer, one_of
from posterity._precision import rounding, wide

__all__ = ["DEMDLoss", "DEMDRegularizer", "MultiMarginalTransport", "multimarginal_emd", "soft_histogram"]


@dataclass
class MultiMarginalTransport:
    """What `multimarginal_emd` found.

    Attributes
    ----------
    value : Tensor
        The transport cost, shape ``batch``; in bins times mass for the range cost.
    potentials : Tensor
        Optimal dual prices of the range cost, shape ``(*batch, d, n)``, first column 0:
        ``(histograms * potentials).sum()`` is the value, and no sum of one price a
        histogram exceeds the cost of the bins.
    indices : Tensor or None
        The bins that the monotone coupling joins, shape ``(s, d)`` with s at most
        ``d (n - 1) + 1``; None for a batch.
    masses : Tensor or None
        The mass of each, shape ``(s,)``, positive; None for a batch.
    """

    value: Float[Tensor, "*batch"]
    potentials: Float[Tensor, "*batch d n"]
    indices: Int[Tensor, "s d"] | None = None
    masses: Float[Tensor, " s"] | None = None


def multimarginal_emd(
    histograms: Float[Tensor, "*batch d n"], *, cost: Callable[[Tensor], Tensor] | None = None
) -> MultiMarginalTransport:
    """Return the cost of the best joint coupling of d histograms, its prices and the coupling.

    Parameters
    ----------
    histograms : Tensor
        Rows of nonnegative masses over the same n ordered bins, shape ``(*batch, d, n)``;
        the d rows of a problem have the same sum, usually 1.
    cost : callable, optional
        ``cost(indices)`` of int tuples ``(s, d)`` returns ``(s,)``. The value is then the
        cost of the monotone coupling, which is optimal for Monge costs (the range of the
        default, squared deviations from the mean bin, sums of convex functions of pairwise
        differences) and only an upper bound for others. Potentials stay those of the range.

    Returns
    -------
    MultiMarginalTransport
        ``value`` is differentiable, by (2) or, with ``cost``, through the masses.

    Raises
    ------
    ValueError
        If masses are negative or not finite, or the sums of two rows differ by more than
        1e-4 of their size, or than rounding to the dtype costs.

    References
    ----------
    .. [1] Mehta, Kline, Lokhande, Fung, Singh. Efficient Discrete Multi-Marginal Optimal
       Transport Regularization. ICLR 2023.
    .. [2] Bein, Brucker, Park, Pathak. A Monge property for the d-dimensional
       transportation problem. Discrete Applied Mathematics 58, 1995.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import multimarginal_emd
    >>> p = torch.eye(5)[[0, 1, 4]]  # three point masses
    >>> result = multimarginal_emd(p)
    >>> result.value, result.indices, result.masses
    (tensor(4.), tensor([[0, 1, 4]]), tensor([1.]))
    """
    dtype, p = histograms.dtype, _masses(histograms)
    value, potentials = (each.to(dtype) for each in _Range.apply(p))
    if cost is None and p.ndim > 2:
        return MultiMarginalTransport(value, potentials)
    indices, masses = _coupling(p)
    if cost is not None:
        each = cost(indices.flatten(0, -2))
        if not isinstance(each, Tensor) or each.shape != (indices.flatten(0, -2).shape[0],):
            raise ValueError(f"cost must return one number a tuple of bins, got {each!r}")
        value = (masses * each.to(masses).view_as(masses)).sum(-1).to(dtype)
    if p.ndim > 2:
        return MultiMarginalTransport(value, potentials)
    kept = masses > 0
    return MultiMarginalTransport(value, potentials, indices[kept], masses[kept].to(dtype))


class DEMDLoss(nn.Module):
    """Distance of d histograms from each other, (2), as a loss.

    The backward pass returns the potentials that the forward pass found times the incoming
    gradient. They are a derivative along changes that keep every row's sum, which is what
    a softmax or `soft_histogram` in front of the loss makes.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the batch of problems.

    Notes
    -----
    Masses and sums are checked on the CPU; on an accelerator a check would wait for it.
    The cost grows with the number of bins; divide by ``n - 1`` to compare grids.

    References
    ----------
    .. [1] Mehta, Kline, Lokhande, Fung, Singh. Efficient Discrete Multi-Marginal Optimal
       Transport Regularization. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import DEMDLoss
    >>> groups = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])
    >>> DEMDLoss()(groups)
    tensor(1.)
    """

    def __init__(self, *, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, histograms: Float[Tensor, "*batch d n"]) -> Float[Tensor, "..."]:
        """Return the distance of the rows of each problem.

        Parameters
        ----------
        histograms : Tensor
            As for `multimarginal_emd`.

        Returns
        -------
        Tensor
            A scalar, or for ``reduction="none"`` one value a problem.
        """
        value = _Range.apply(_masses(histograms))[0].to(histograms.dtype)
        return value if self.reduction == "none" else getattr(value, self.reduction)()


def soft_histogram(
    x: Float[Tensor, " samples"], n_bins: int = 10, *, smoothing: float = 1e-4
) -> Float[Tensor, " n_bins"]:
    """Return a histogram of values in [0, 1) that is differentiable in them.

    A value shares its mass between its two nearest locations r / n_bins by linear
    interpolation: bin r gets ``sum_i max(1 / n_bins - |x_i - r / n_bins|, 0)``.

    Parameters
    ----------
    x : Tensor
        Values in [0, 1), at least one.
    n_bins : int, default=10
        Locations 0, 1 / n_bins, ..., at least 2.
    smoothing : float, default=1e-4
        Added to every bin before the histogram is scaled to sum 1, so that no bin is empty.

    Returns
    -------
    Tensor
        Masses that sum to 1.

    Raises
    ------
    ValueError
        If values are outside [0, 1) or there are none.

    Notes
    -----
    Values above the last location, 1 - 1 / n_bins, have no right neighbour and lose mass
    linearly, as in the published layer.

    References
    ----------
    .. [1] Mehta, Kline, Lokhande, Fung, Singh. Efficient Discrete Multi-Marginal Optimal
       Transport Regularization. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import soft_histogram
    >>> soft_histogram(torch.tensor([0.25, 0.375]), n_bins=4, smoothing=0)
    tensor([0.0000, 0.7500, 0.2500, 0.0000])
    """
    has_shape("x", floating("x", x), (None,))
    integer("n_bins", n_bins, 2)
    at_least("smoothing", smoothing, 0)
    _unit("x", x)
    one = x.new_zeros(len(x), dtype=torch.int64)
    return _soft_histograms(wide(x), one, 1, n_bins, smoothing)[0].to(x.dtype)


class DEMDRegularizer(nn.Module):
    """Penalty that pulls the score distributions of all groups together.

    Scores become one soft histogram a group; the penalty is the multi-marginal distance of
    them all, so that no pair of groups and no barycentre has to be chosen.

    Parameters
    ----------
    n_bins : int, default=10
        Bins of the histograms, at least 2.
    activation : {"sigmoid", "identity"}, default="sigmoid"
        What brings scores to [0, 1): a sigmoid for logits, or nothing.

    References
    ----------
    .. [1] Mehta, Kline, Lokhande, Fung, Singh. Efficient Discrete Multi-Marginal Optimal
       Transport Regularization. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import DEMDRegularizer
    >>> logits = torch.tensor([-2.0, 2.0, 0.5, 0.5], requires_grad=True)
    >>> penalty = DEMDRegularizer()(logits, groups=torch.tensor([0, 1, 0, 1]))
    >>> penalty.backward()  # lowers the second score, raises the first
    >>> logits.grad.sign()
    tensor([-1.,  1., -1.,  1.])
    """

    def __init__(self, *, n_bins: int = 10, activation: Literal["sigmoid", "identity"] = "sigmoid") -> None:
        super().__init__()
        self.n_bins = integer("n_bins", n_bins, 2)
        self.activation = one_of("activation", activation, ("sigmoid", "identity"))

    def forward(
        self, scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"]
    ) -> Float[Tensor, ""]:
        """Return the distance of the groups' score histograms, in bins.

        Parameters
        ----------
        scores : Tensor
            A score a sample.
        groups : Tensor
            Integer group of each sample; with one group the penalty is 0.

        Returns
        -------
        Tensor
            A scalar, at least 0.
        """
        has_shape("scores", floating("scores", scores), (None,))
        if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
            raise ValueError(f"groups must be a tensor of integers, got {getattr(groups, 'dtype', groups)}")
        has_shape("groups", groups, scores.shape, "scores")
        if self.activation == "identity":
            _unit("scores", scores)
            x = wide(scores)
        else:
            _some("scores", scores)
            x = wide(scores).sigmoid() - 1e-4  # below 1 whatever the score
        names, group = torch.unique(groups, return_inverse=True)
        histograms = _soft_histograms(x, group, len(names), self.n_bins, 1e-4)
        value, _ = _Range.apply(histograms)
        return value.to(scores.dtype)


class _Range(torch.autograd.Function):
    """Value (2) and potentials; the gradient of the value is the potentials."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> tuple[Tensor, Tensor]:
        wide = p.double() if p.dtype != torch.float64 and p.shape[-1] > 1000 else p
        total = wide.cumsum(-1)[..., :-1]
        high, most = total.max(-2, keepdim=True)
        low, least = total.min(-2, keepdim=True)
        one = torch.ones_like(high, dtype=p.dtype)
        sign = torch.zeros_like(total, dtype=p.dtype)  # where all are equal the two cancel
        sign.scatter_add_(-2, most, one).scatter_add_(-2, least, -one)
        potentials = torch.zeros_like(p)
        potentials[..., 1:] = -sign.cumsum(-1)
        ctx.save_for_backward(potentials)
        ctx.mark_non_differentiable(potentials)
        return (high - low).sum((-1, -2)).to(p.dtype), potentials

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (potentials,) = ctx.saved_tensors
        return grad[..., None, None] * potentials


def _coupling(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return bins and masses of the monotone coupling, some masses 0: cut [0, total] where any F_r is."""
    total = p.cumsum(-1)
    end = total[..., -1:].mean(-2, keepdim=True)
    total = total * (end / total[..., -1:].clamp_min(torch.finfo(p.dtype).tiny))  # equal to the last digit
    cuts = torch.cat([torch.zeros_like(end[..., 0]), total[..., :-1].flatten(-2), end[..., 0]], -1)
    cuts = cuts.sort(-1).values
    middle = (cuts[..., 1:] + cuts[..., :-1]).detach() / 2
    at = middle[..., None, :].expand(*total.shape[:-1], middle.shape[-1]).contiguous()
    bins = torch.searchsorted(total.detach().contiguous(), at, right=True).clamp_max(p.shape[-1] - 1)
    return bins.transpose(-1, -2), cuts.diff(dim=-1)


def _soft_histograms(x: Tensor, group: Tensor, n_groups: int, n_bins: int, smoothing: float) -> Tensor:
    """Return (n_groups, n_bins): each value goes to its left and right location."""
    left = (x.detach() * n_bins).floor()
    to_right = x - left / n_bins
    counts = x.new_zeros(n_groups, n_bins + 2)  # a column on either side for what has no location
    flat = group * (n_bins + 2) + left.long().clamp(-1, n_bins - 1) + 1
    counts = counts.view(-1).index_add(0, flat, 1 / n_bins - to_right).index_add(0, flat + 1, to_right)
    counts = counts.view(n_groups, -1)[:, 1:-1] + smoothing
    return counts / counts.sum(-1, keepdim=True)


def _masses(histograms: Tensor) -> Tensor:
    """Return histograms, widened, that are: nonnegative, finite, rows of a problem with one sum."""
    p = floating("histograms", histograms)
    if p.ndim < 2 or 0 in p.shape[-2:]:
        raise ValueError(
            f"histograms must have shape (..., d, n) with d and n at least 1, got {tuple(p.shape)}"
        )
    if p.device.type != "cpu" or p.numel() == 0:
        return wide(p)
    fixed = p.detach()
    low, high = fixed.aminmax()
    if not (low >= 0 and high < torch.inf):  # NaN is neither
        raise ValueError("histograms must be nonnegative and finite")
    sums = fixed.sum(-1, dtype=torch.float64)
    gap = (sums - sums[..., :1]).abs() - rounding(p.dtype, 1e-4) * sums.amax(-1, keepdim=True)
    if bool((gap > 0).any()):
        row = tuple((gap > 0).nonzero()[0].tolist())
        first = sums[(*row[:-1], 0)]
        raise ValueError(
            f"histograms must have rows of one sum: row {row[-1]} sums to {sums[row]:.6g}, row 0 to {first:.6g}; "
            "normalise them first"
        )
    return wide(p)


def _some(name: str, x: Tensor) -> None:
    if len(x) == 0:
        raise ValueError(f"{name} must not be empty")
    if x.device.type == "cpu" and not bool(torch.isfinite(x.detach()).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _unit(name: str, x: Tensor) -> None:
    _some(name, x)
    if x.device.type == "cpu" and not bool(((x.detach() >= 0) & (x.detach() < 1)).all()):
        low, high = x.detach().aminmax()
        raise ValueError(f"{name} must lie in [0, 1), got values from {low:g} to {high:g}")
