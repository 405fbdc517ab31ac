"""Contrasting samples and decorrelating dimensions are one thing: both are what a Gram matrix has beside its diagonal.

Of embeddings K (n samples as rows, d dimensions as columns) the two criteria are

    L_c = || K K^T - diag ||_F^2 ,  pairs of samples,      L_nc = || K^T K - diag ||_F^2 ,  pairs of dimensions,

and since K K^T and K^T K have the same norm, with S the sum of fourth powers of the norms of rows and T that of
columns,

    L_nc + T = L_c + S .                                                                       (1)

Where rows have norm 1 and columns norm sqrt(n / d), S and T are constants: then the criteria have the same minima.
Here are the criteria as a loss, and the losses in use that are their kin: NT-Xent (SimCLR, DCL) contrasts samples,
VICReg decorrelates dimensions. The Gram matrix that is larger is never formed where (1) spares it.
"""

import warnings
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import rounding, unit_rows, widened
from posterity.representation._pairs import joint_views

__all__ = [
    "ContrastiveCriterion",
    "DualityTerms",
    "NTXentLoss",
    "VICRegLoss",
    "balance",
    "duality_terms",
]


class DualityTerms(NamedTuple):
    """The four sums of the identity ``noncontrastive + dimension_norms = contrastive + sample_norms``.

    Attributes
    ----------
    contrastive : Tensor of shape ()
        L_c, over ordered pairs of samples.
    noncontrastive : Tensor of shape ()
        L_nc, over ordered pairs of dimensions.
    sample_norms : Tensor of shape ()
        S, the sum of fourth powers of the norms of rows.
    dimension_norms : Tensor of shape ()
        T, the same of columns.
    """

    contrastive: Tensor
    noncontrastive: Tensor
    sample_norms: Tensor
    dimension_norms: Tensor


def duality_terms(k: Float[Tensor, "n d"]) -> DualityTerms:
    """Return both criteria of embeddings and what lies between them; nothing is normalised or centred.

    Parameters
    ----------
    k : Tensor of shape (n, d)
        Rows are samples.

    Returns
    -------
    DualityTerms
        In the dtype of ``k``, differentiable. The criterion of the smaller Gram matrix is summed entry by
        entry, the other follows by the identity, at a cost of n d min(n, d).

    Raises
    ------
    ValueError
        If ``k`` is not a floating-point matrix with a row and a column.

    References
    ----------
    .. [1] Garrido, Chen, Bardes, Najman, LeCun. On the duality between contrastive and non-contrastive
       self-supervised learning. ICLR 2023. Theorem 3.3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import duality_terms
    >>> terms = duality_terms(torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]))
    >>> float(terms.noncontrastive + terms.dimension_norms - terms.contrastive - terms.sample_norms)
    0.0
    """
    return DualityTerms(*_terms(_matrix("k", k)))


def balance(k: Float[Tensor, "n d"], max_iter: int = 100, *, tol: float = 1e-9) -> Float[Tensor, "n d"]:
    """Return embeddings whose rows have norm 1 and whose columns have norm sqrt(n / d).

    Columns and rows are scaled in turns, rows last, until the norms of columns stay (Sinkhorn's iteration on
    the squares). Both criteria of `duality_terms` differ by a constant there.

    Parameters
    ----------
    k : Tensor of shape (n, d)
        Rows are samples.
    max_iter : int, default=100
        Rounds, at most.
    tol : float, default=1e-9
        Largest relative distance of the norm of a column from sqrt(n / d), or what rounding costs where that
        is more.

    Returns
    -------
    Tensor of shape (n, d)
        Differentiable through the rounds that were run.

    Raises
    ------
    ValueError
        If a row or column is 0, or an argument is out of range.

    Warns
    -----
    UserWarning
        If the norms had not settled after ``max_iter`` rounds, as where many entries are 0.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import balance
    >>> k = balance(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    >>> torch.allclose(k.norm(dim=0), torch.full((3,), 2**0.5))
    True
    """
    finite("k", _matrix("k", k))
    integer("max_iter", max_iter, 1)
    at_least("tol", tol, 0)
    for name, dim in (("row", 1), ("column", 0)):
        empty = (k.detach() == 0).all(dim).nonzero()
        if len(empty):
            raise ValueError(f"k must have no {name} of zeros, got one at {int(empty[0])}")
    return _balanced(k, max_iter, rounding(torch.promote_types(k.dtype, torch.float32), tol))


class ContrastiveCriterion(nn.Module):
    """The pair of criteria as a loss: views agree, and samples, or dimensions, are told apart.

    Parameters
    ----------
    side : {"samples", "dimensions"}, default="samples"
        Whether L_c, a mean over pairs of samples, or L_nc, over pairs of dimensions, is lowered.
    alignment_weight : float, default=1.0
        Of the mean squared distance of a sample's views.
    criterion_weight : float, default=1.0
        Of the criterion, a mean over the two views.
    normalize : {"none", "rows", "columns", "both"}, default="rows"
        What is done to each view before: unit rows, columns of norm sqrt(n / d), ten rounds of `balance`.

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if the views are not two (batch, dim) of one shape with two
        rows, and for ``"dimensions"`` two columns.

    Notes
    -----
    The paper states the criteria and trains other losses; weights and scale here are ours.

    Where ``torch.distributed`` is initialised, the batch is that of all processes.

    References
    ----------
    .. [1] Garrido, Chen, Bardes, Najman, LeCun. On the duality between contrastive and non-contrastive
       self-supervised learning. ICLR 2023. Definitions 3.1 and 3.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import ContrastiveCriterion
    >>> z1, z2 = torch.randn(2, 8, 4, requires_grad=True)
    >>> ContrastiveCriterion("dimensions")(z1, z2).backward()
    """

    def __init__(
        self, side: Literal["samples", "dimensions"] = "samples", *, alignment_weight: float = 1.0,
        criterion_weight: float = 1.0, normalize: Literal["none", "rows", "columns", "both"] = "rows",
    ) -> None:  # fmt: skip
        super().__init__()
        self.side = one_of("side", side, ("samples", "dimensions"))
        self.alignment_weight = at_least("alignment_weight", alignment_weight, 0)
        self.criterion_weight = at_least("criterion_weight", criterion_weight, 0)
        self.normalize = one_of("normalize", normalize, ("none", "rows", "columns", "both"))

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Return the loss of two views after the projector, row i of one beside row i of the other."""
        z1, z2 = joint_views(z1, z2)
        _check_dims(z1, 2 if self.side == "dimensions" else 1)
        return self._value(z1, z2)

    @widened
    def _value(self, z1: Tensor, z2: Tensor) -> Tensor:
        views = [self._normalized(z) for z in (z1, z2)]
        alignment = (views[0] - views[1]).square().sum(1).mean()
        m = z1.shape[0 if self.side == "samples" else 1]
        both = [_terms(z)[0 if self.side == "samples" else 1] / (m * (m - 1)) for z in views]
        return self.alignment_weight * alignment + self.criterion_weight * (both[0] + both[1]) / 2

    def _normalized(self, z: Tensor) -> Tensor:
        n, d = z.shape
        if self.normalize == "rows":
            return unit_rows(z)
        if self.normalize == "columns":
            return F.normalize(z, dim=0) * (n / d) ** 0.5
        return _balanced(z, 10, None) if self.normalize == "both" else z


class NTXentLoss(nn.Module):
    """The contrastive loss of SimCLR, or of DCL, with similarities of which opposites are not the best.

    Of 2n unit vectors each has its other view as a positive and 2n - 2 negatives; the loss is the mean of
    ``log(exp(positive) + sum exp(negative)) - positive``.

    Parameters
    ----------
    temperature : float, default=0.15
        Divides all similarities, positive.
    similarity : {"cos", "sq", "abs"}, default="cos"
        What becomes of a negative's cosine: itself, its square, its absolute value. With the latter two,
        negatives are best orthogonal, as they are in the paper's criterion.
    decoupled : bool, default=False
        Whether the positive is left out of the sum (DCL).

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if the views are not two (batch, dim) of one shape with two
        rows at least.

    Notes
    -----
    The positive stays a cosine also in the sum.

    Where ``torch.distributed`` is initialised, negatives come from all processes.

    References
    ----------
    .. [1] Garrido, Chen, Bardes, Najman, LeCun. On the duality between contrastive and non-contrastive
       self-supervised learning. ICLR 2023. Section 4.
    .. [2] Chen, Kornblith, Norouzi, Hinton. A Simple Framework for Contrastive Learning of Visual
       Representations. ICML 2020. Equation 1.
    .. [3] Yeh, Hong, Hsu, Liu, Chen, LeCun. Decoupled Contrastive Learning. ECCV 2022.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import NTXentLoss
    >>> z1, z2 = torch.randn(2, 8, 4, requires_grad=True)
    >>> NTXentLoss(0.2)(z1, z2).backward()
    """

    def __init__(
        self, temperature: float = 0.15, *, similarity: Literal["cos", "sq", "abs"] = "cos",
        decoupled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.similarity = one_of("similarity", similarity, ("cos", "sq", "abs"))
        self.decoupled = bool(decoupled)

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Return the loss of two views after the projector, row i of one beside row i of the other."""
        return self._value(*joint_views(z1, z2))

    @widened
    def _value(self, z1: Tensor, z2: Tensor) -> Tensor:
        n = len(z1)
        z = unit_rows(torch.cat([z1, z2]))
        cosine = z @ (z.T / self.temperature)
        positive = cosine.diagonal(n)
        if self.similarity == "cos":
            negative = cosine.clone()
        else:
            negative = cosine.abs() if self.similarity == "abs" else self.temperature * cosine.square()
        for offset in (-n, 0, n):  # neither itself nor its other view
            negative.diagonal(offset).fill_(-torch.inf)
        excess = negative.logsumexp(1) - torch.cat([positive, positive])
        return (excess if self.decoupled else F.softplus(excess)).mean()


class VICRegLoss(nn.Module):
    """VICReg: views agree, dimensions keep a variance and are not correlated.

    Parameters
    ----------
    sim_coeff, std_coeff, cov_coeff : float, default=25.0, 25.0, 1.0
        Weights of the mean squared difference, the hinge on the standard deviations, and the covariances.
    variant : {"standard", "exp", "ctr"}, default="standard"
        The covariance term: the sum of squared covariances over d; for ``"exp"`` the mean log-sum-exp of each
        dimension's covariances with the others, over ``temperature``; for ``"ctr"`` hinge and covariance
        are those of samples, over dimensions: the regulariser of the transposed views.
    temperature : float, default=0.1
        Of ``"exp"``, positive.
    gamma : float, default=1.0
        The standard deviation below which the hinge acts.
    eps : float, default=1e-4
        Added to variances before the root.

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if the views are not two (batch, dim) of one shape with two
        rows, and for ``"exp"`` and ``"ctr"`` two columns.

    Notes
    -----
    1. The hinge has a factor 1/2, the covariances have none, as in the published code of VICReg.
    2. ``"ctr"`` transposes literally: each sample is centred over its dimensions.
    3. Where n < d the sum of squared covariances is taken from the Gram matrix of samples, which has the same
       norm: n^2 d instead of n d^2, without a (d, d) matrix.

    Where ``torch.distributed`` is initialised, statistics are those of all processes.

    References
    ----------
    .. [1] Garrido, Chen, Bardes, Najman, LeCun. On the duality between contrastive and non-contrastive
       self-supervised learning. ICLR 2023. Section 4.
    .. [2] Bardes, Ponce, LeCun. VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
       Learning. ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import VICRegLoss
    >>> z1, z2 = torch.randn(2, 8, 4, requires_grad=True)
    >>> VICRegLoss()(z1, z2).backward()
    """

    def __init__(
        self, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0, *,
        variant: Literal["standard", "exp", "ctr"] = "standard", temperature: float = 0.1, gamma: float = 1.0,
        eps: float = 1e-4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sim_coeff = at_least("sim_coeff", sim_coeff, 0)
        self.std_coeff = at_least("std_coeff", std_coeff, 0)
        self.cov_coeff = at_least("cov_coeff", cov_coeff, 0)
        self.variant = one_of("variant", variant, ("standard", "exp", "ctr"))
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.gamma, self.eps = at_least("gamma", gamma, 0), at_least("eps", eps, 0, strict=True)

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Return the loss of two views after the projector, row i of one beside row i of the other."""
        z1, z2 = joint_views(z1, z2)
        _check_dims(z1, 1 if self.variant == "standard" else 2)
        return self._value(z1, z2)

    @widened
    def _value(self, z1: Tensor, z2: Tensor) -> Tensor:
        views = (z1.T, z2.T) if self.variant == "ctr" else (z1, z2)
        return self.sim_coeff * F.mse_loss(z1, z2) + self._regularizer(views[0]) + self._regularizer(views[1])

    def _regularizer(self, z: Tensor) -> Tensor:
        n, d = z.shape
        z = z - z.mean(0)
        std = (z.square().sum(0) / (n - 1) + self.eps).sqrt()
        hinge = F.relu(self.gamma - std).mean() / 2
        if self.variant == "exp":
            cov = z.T @ (z / (n - 1))
            others = cov.masked_fill(torch.eye(d, dtype=torch.bool, device=z.device), -torch.inf)
            repelled = (others / self.temperature).logsumexp(1).mean()
        else:
            repelled = _terms(z)[1] / ((n - 1) ** 2 * d)
        return self.std_coeff * hinge + self.cov_coeff * repelled


# The criteria through the smaller Gram matrix, and the doubly normalised set.


@widened
def _terms(k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return L_c, L_nc, S and T."""
    n, d = k.shape
    gram = k @ k.T if n < d else k.T @ k
    square = k.square()
    samples, dimensions = (square.sum(dim).square().sum() for dim in (1, 0))
    apart = gram - gram.diagonal().diag()
    direct = apart.square().sum()
    if n < d:
        return direct, direct + samples - dimensions, samples, dimensions
    return direct + dimensions - samples, direct, samples, dimensions


@widened
def _balanced(k: Tensor, max_iter: int, tol: float | None) -> Tensor:
    """Return k after rounds of scaling columns and rows; without ``tol`` all of them are run."""
    n, d = k.shape
    target = (n / d) ** 0.5
    k, off = F.normalize(k, dim=1), torch.inf
    for _ in range(max_iter):
        k = F.normalize(target * F.normalize(k, dim=0), dim=1)
        if tol is not None:
            off = float((k.detach().norm(dim=0) / target - 1).abs().max())
            if off <= tol:
                return k
    if tol is not None:
        warnings.warn(
            f"norms of columns are still {off:.1e} off after {max_iter} rounds, more than {tol:.1e}",
            stacklevel=3,
        )
    return k


def _matrix(name: str, k: Tensor) -> Tensor:
    has_shape(name, floating(name, k), (None, None))
    if 0 in k.shape:
        raise ValueError(f"{name} must have a row and a column, got shape {tuple(k.shape)}")
    return k


def _check_dims(z1: Tensor, least: int) -> None:
    if z1.shape[1] < least:
        raise ValueError(f"z1 must have at least {least} columns, got shape {tuple(z1.shape)}")
