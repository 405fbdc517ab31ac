"""What consensus fair clustering minimises: agreement with a consensus, groups that mix, structure that stays.

Samples have latent rows z, clusters have centers c, and q_ik is proportional to
1 / (1 + |z_i - c_k|^2), each row summing to 1. Three losses share them:

    L_con    = mean_i -log( sum_j e_ij W_ij / sum_j e_ij + 1e-8 ),   e_ij = exp(T cos(z_i, z_j)),    (1)
    L_fair   = (1/G) sum_g sum_{i in g} KL(t_i || q_i),   t_ik ~ q_ik^2 / sum_{i in g} q_ik,         (2)
    L_struct = (1/G) sum_g || Q_g Q_g' - Y_g Y_g' ||_F^2.                                            (3)

(1) draws together what a consensus W of many plain clusterings, which no group label can
touch, puts together. (2) sharpens each group's assignments while it fills every cluster with
some of the group. (3) keeps of a reference clustering Y who is together with whom, within a group:
so the clusters of different groups need not be named alike. It is |Q'Q|^2 - 2 |Q'Y|^2 + |Y'Y|^2,
of k x k matrices.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import widened

__all__ = [
    "consensus_contrastive_loss", "fair_assignment_loss", "soft_assignment", "structure_preservation_loss",
]  # fmt: skip

SLACK = 1e-5  # rounding that probabilities may leave outside [0, 1]
OFF_ONE = 0.02  # by how much the sum of rounded probabilities may miss 1


@widened
def soft_assignment(z: Float[Tensor, "n h"], centers: Float[Tensor, "k h"]) -> Float[Tensor, "n k"]:
    """Return the share of each cluster in each sample, by Student's kernel with one degree of freedom.

    Parameters
    ----------
    z : Tensor of shape (n, h)
        Latent rows.
    centers : Tensor of shape (k, h)
        Latent centers, at least one.

    Returns
    -------
    Tensor of shape (n, k)
        Proportional to ``1 / (1 + |z_i - c_k|^2)``; rows sum to 1.

    Raises
    ------
    ValueError
        If shapes do not fit, or there is no center.

    References
    ----------
    .. [1] Xie, Girshick, Farhadi. Unsupervised Deep Embedding for Clustering Analysis. ICML
       2016. Equation 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.fairness import soft_assignment
    >>> soft_assignment(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [3.0]]))  # 1 against 1/10
    tensor([[0.9091, 0.0909],
            [0.0909, 0.9091]])
    """
    has_shape("z", floating("z", z), (None, None))
    has_shape("centers", floating("centers", centers), (None, z.shape[1]), "z")
    if not len(centers):
        raise ValueError("centers must have at least one row, got none")
    # in a unit in which no square overflows
    unit = (
        torch.cat([z.detach(), centers.detach()]).abs().amax().clamp_min(1) if z.numel() else z.new_ones(())
    )
    distance = (z[:, None] / unit - centers / unit).square().sum(2)
    tiny = torch.finfo(distance.dtype).tiny
    return (distance + unit.reciprocal().square()).clamp_min(tiny).log().neg().softmax(1)


@widened
def consensus_contrastive_loss(
    z: Float[Tensor, "n h"], coassociation: Float[Tensor, "n n"], *, temperature: float = 2.0, order: int = 2
) -> Float[Tensor, ""]:
    """Return how far latent rows are from what a consensus puts together, equation 1.

    Parameters
    ----------
    z : Tensor of shape (n, h)
        Latent rows, n at least 1. Their lengths do not matter.
    coassociation : Tensor of shape (n, n)
        As `coassociation_matrix` gives it: in [0, 1].
    temperature : float, default=2.0
        T, positive; larger looks at the nearest samples only.
    order : int, default=2
        W is this power of the matrix, at least 1: friends of friends count. Rows are not
        normalised, so that the loss may be negative.

    Returns
    -------
    Tensor
        A scalar of the dtype and on the device of ``z``.

    Raises
    ------
    ValueError
        If shapes do not fit, an option is out of range, or (on the CPU, where reading is free)
        an entry lies outside [0, 1].

    Notes
    -----
    1. The cosine of a sample with itself counts as 0 in both sums, as in the official code.

    References
    ----------
    .. [1] Chhabra et al. Robust Fair Clustering. ICLR 2023. Section 3, the consensus term.

    Examples
    --------
    Two samples that are always together, at a right angle: ``-log((1 + 1) / (1 + 1))``, and one
    power higher ``-log 2``.

    >>> import torch
    >>> from posterity.fairness import consensus_contrastive_loss
    >>> consensus_contrastive_loss(torch.eye(2), torch.ones(2, 2), order=2)
    tensor(-0.6931)
    """
    n, h = has_shape("z", floating("z", z), (None, None)).shape
    if not n or not h:
        raise ValueError(f"z must have at least one row and one column, got shape {tuple(z.shape)}")
    has_shape("coassociation", floating("coassociation", coassociation), (n, n), "z")
    at_least("temperature", temperature, 0, strict=True)
    integer("order", order, 1)
    if coassociation.device.type == "cpu" and not ((coassociation >= 0) & (coassociation <= 1 + SLACK)).all():
        low, high = coassociation.aminmax()
        raise ValueError(f"coassociation must be in [0, 1], got values from {low:g} to {high:g}")
    z = z / z.detach().abs().amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)  # no square overflows
    return contrast(z, torch.linalg.matrix_power(coassociation.to(z.dtype), order), temperature)


@widened
def fair_assignment_loss(q: Float[Tensor, "n k"], groups: Shaped[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the divergence of each group's assignments from their sharpened, evened version, equation 2.

    Parameters
    ----------
    q : Tensor of shape (n, k)
        Shares of clusters, rows that sum to 1. The targets t made of them are constants for
        the gradient.
    groups : Tensor of shape (n,)
        Integers or bool that name the group of each sample, at least one sample.

    Returns
    -------
    Tensor
        A scalar of the dtype and on the device of ``q``: 0 where the assignments of each group
        are their own target. A sum over samples, so it grows with n.

    Raises
    ------
    ValueError
        If shapes do not fit, groups are no integers, or (on the CPU) rows of ``q`` are no shares.

    References
    ----------
    .. [1] Chhabra et al. Robust Fair Clustering. ICLR 2023. Section 3, the fair clustering term.
    .. [2] Li, Zhao, Liu. Deep Fair Clustering for Visual Learning. CVPR 2020.

    Examples
    --------
    >>> import torch
    >>> from posterity.fairness import fair_assignment_loss
    >>> fair_assignment_loss(torch.full((4, 2), 0.5), torch.tensor([0, 0, 1, 1]))
    tensor(0.)
    """
    return divergence(_shares("q", q), group_rows(groups, len(q)))


@widened
def structure_preservation_loss(
    q: Float[Tensor, "n k"], reference: Float[Tensor, "n r"], groups: Shaped[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Return how much of a reference, of who is together within a group, is lost, equation 3.

    Parameters
    ----------
    q : Tensor of shape (n, k)
        Shares of clusters, rows that sum to 1.
    reference : Tensor of shape (n, r)
        Those of the reference, one-hot or soft; r is mostly k.
    groups : Tensor of shape (n,)
        Integers or bool that name the group of each sample, at least one sample.

    Returns
    -------
    Tensor
        A scalar of the dtype and on the device of ``q``: 0 where ``q`` is the reference, up to
        the names of clusters. A sum over pairs, so it grows with n^2.

    Raises
    ------
    ValueError
        If shapes do not fit, groups are no integers, or (on the CPU) rows are no shares.

    References
    ----------
    .. [1] Chhabra et al. Robust Fair Clustering. ICLR 2023. Section 3, the structural
       preservation term.

    Examples
    --------
    Two samples that should be together are half together: all four pairs miss by a half.

    >>> import torch
    >>> from posterity.fairness import structure_preservation_loss
    >>> reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> structure_preservation_loss(torch.full((2, 2), 0.5), reference, torch.tensor([0, 0]))
    tensor(1.)
    """
    _shares("q", q)
    if len(has_shape("reference", _shares("reference", reference), (None, None))) != len(q):
        raise ValueError(f"reference must have the {len(q)} rows of q, got {len(reference)}")
    return structure(q, reference.to(q.dtype), group_rows(groups, len(q)))


def contrast(z: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return equation 1 of a weight W."""
    z = F.normalize(z, dim=1)
    likeness = ((temperature * z) @ z.T).fill_diagonal_(0)
    return -(likeness.softmax(1) * weight).sum(1).add(1e-8).log().mean()


def divergence(q: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Return equation 2 of groups given by their rows."""
    tiny, total = torch.finfo(q.dtype).tiny, q.new_zeros(())
    for own in rows:
        part = q[own]
        with torch.no_grad():
            target = part.square() / part.sum(0).clamp_min(tiny)
            target = target / target.sum(1, keepdim=True).clamp_min(tiny)
        total = total + (target.xlogy(target) - target * part.clamp_min(tiny).log()).sum()
    return total / len(rows)


def structure(q: Tensor, reference: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Return equation 3 of groups given by their rows."""
    # the squares of the blocks Q'Q, Q'Y and Y'Y nearly cancel: float64 where the device has it
    wide = q.dtype if q.device.type == "mps" else torch.float64
    both = torch.cat([q, reference], 1).to(wide)
    sign = torch.ones(both.shape[1], dtype=wide, device=q.device)
    sign[q.shape[1] :] = -1
    total = both.new_zeros(())
    for own in rows:
        part = both[own]
        total = total + sign @ (part.T @ part).square() @ sign
    return (total / len(rows)).to(q.dtype)


def group_rows(groups: Tensor, n: int) -> list[Tensor]:
    """Return the rows of each group."""
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        came = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(f"groups must be a tensor of integers or bool, got {came}")
    has_shape("groups", groups, (n,), "q")
    return [(groups == group).nonzero()[:, 0] for group in groups.unique()]


def _shares(name: str, q: Tensor) -> Tensor:
    """Return a matrix whose rows are shares, not empty."""
    n, k = has_shape(name, floating(name, q), (None, None)).shape
    if not n or not k:
        raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(q.shape)}")
    if q.device.type == "cpu" and not (
        (q >= -SLACK).all() and ((q.detach().sum(1) - 1).abs() <= OFF_ONE).all()
    ):
        raise ValueError(f"{name} must have rows that are at least 0 and sum to 1, got {_odd(q.detach())}")
    return q


def _odd(q: Tensor) -> str:
    """Return the first row that is no shares, in words."""
    wrong = ~((q >= -SLACK).all(1) & ((q.sum(1) - 1).abs() <= OFF_ONE))
    row = int(wrong.nonzero()[0])
    return f"{[round(float(x), 4) for x in q[row, :5]]} in row {row}"
