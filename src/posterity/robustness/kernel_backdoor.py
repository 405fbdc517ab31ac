"""Backdoors in kernel regression: what poisons among the training data do to predictions, in closed form.

Letters: d clean training data, p poisons, t clean held-out data, a held-out source images with the
trigger, which a backdoor wants at +1; k_pd is the kernel of p (rows) with d. Regression on d and p
together, with a ridge on the diagonal, predicts at x

    f(x) + D' S^-1 R,    R = y_p - k_pd G y_d,                                     (1)
    S = k_pp + ridge - k_pd G k_pd',   D = k_px - k_pd G k_dx,   G = (k_dd + ridge)^-1:

f of the clean data, and what is new in the poisons: their labels R, kernel S and reach D, each less what
the clean data explain. One poison more is then one division, and what is new in the others beside
it a rank-one update. The objective keeps clean predictions and pulls triggered ones above 1,

    sum_t (f(x_t) - y_t)^2 + sum_a min(f(x_a) - 1, 0)^2.                           (2)
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity.robustness.tangent_kernel import full

__all__ = ["added_poison_predictions", "backdoor_loss", "greedy_poisons", "loo_residuals"]


def backdoor_loss(
    k_dd: Float[Tensor, "d d"],
    k_pd: Float[Tensor, "p d"],
    k_pp: Float[Tensor, "p p"],
    k_dt: Float[Tensor, "d t"],
    k_pt: Float[Tensor, "p t"],
    k_da: Float[Tensor, "d a"],
    k_pa: Float[Tensor, "p a"],
    y_d: Shaped[Tensor, " d"],
    y_p: Shaped[Tensor, " p"],
    y_t: Shaped[Tensor, " t"],
    *,
    ridge: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " t"], Float[Tensor, " a"]]:
    """Return the backdoor's objective and the predictions it is made of, equations 1 and 2.

    Parameters
    ----------
    k_dd, k_pd, k_pp, k_dt, k_pt, k_da, k_pa : Tensor
        Kernel between d (at least one), p, t and a, any of which may be none; ``k_dd`` and ``k_pp``
        symmetric. Gradients go through all of them.
    y_d, y_p, y_t : Tensor
        Labels, +1 or -1.
    ridge : float, default=0.0
        Added to the diagonal of the kernel of d and p together, at least 0.

    Returns
    -------
    loss : Tensor
        A scalar.
    f_t : Tensor of shape (t,)
        Predictions at clean held-out data.
    f_a : Tensor of shape (a,)
        Predictions at triggered source images.

    Raises
    ------
    ValueError
        If shapes or labels do not fit, or the kernel with its ridge is not symmetric and positive definite.

    Notes
    -----
    1. Computed in float64; the results have the dtype of ``k_dd``.
    2. The clean kernel is factorised alone, and the poisons enter by S of equation 1; the program solves anew.

    References
    ----------
    .. [1] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023. Section 3.

    Examples
    --------
    A poison at the triggered image itself takes it to +1, and costs nothing elsewhere:

    >>> import torch
    >>> from posterity.robustness import backdoor_loss
    >>> one, none = torch.ones(1, 1), torch.zeros(1, 1)
    >>> loss, f_t, f_a = backdoor_loss(one, none, one, one, none, none, one, -one[0], one[0], -one[0])
    >>> f_t, f_a
    (tensor([-1.]), tensor([1.]))
    >>> loss
    tensor(0.)
    """
    at_least("ridge", ridge, 0)
    dtype = floating("k_dd", k_dd).dtype
    given = _kernels(k_dd=k_dd, k_pd=k_pd, k_pp=k_pp, k_dt=k_dt, k_pt=k_pt, k_da=k_da, k_pa=k_pa)
    k_dd, k_pd, k_pp, k_dt, k_pt, k_da, k_pa = given
    y_d, y_p, y_t = signs("y_d", y_d, k_dd), signs("y_p", y_p, k_pp), signs("y_t", y_t, k_dt.T)
    clean = condition_on_clean(k_dd, y_d, torch.cat([k_dt, k_da], 1), ridge)
    loss, f = objective(clean, k_pd, k_pp, torch.cat([k_pt, k_pa], 1), y_p, y_t, ridge)
    return loss.to(dtype), f[: len(y_t)].to(dtype), f[len(y_t) :].to(dtype)


def added_poison_predictions(
    k_dd: Float[Tensor, "d d"],
    k_da: Float[Tensor, "d a"],
    y_d: Shaped[Tensor, " d"],
    k_pd: Float[Tensor, "p d"],
    k_pa: Float[Tensor, "p a"],
    k_pp_diag: Float[Tensor, " p"],
    y_p: Shaped[Tensor, " p"],
    *,
    ridge: float = 0.0,
) -> tuple[Float[Tensor, " a"], Float[Tensor, "p a"]]:
    """Return predictions without poisons, and with each of them alone, by one factorisation for all.

    Parameters
    ----------
    k_dd, k_da : Tensor
        Kernel of d (at least one) with d, symmetric, and with a.
    y_d : Tensor of shape (d,)
        Labels, +1 or -1.
    k_pd, k_pa : Tensor
        Kernel of p with d and a.
    k_pp_diag : Tensor of shape (p,)
        Kernel of each poison with itself.
    y_p : Tensor of shape (p,)
        Labels, +1 or -1.
    ridge : float, default=0.0
        Added to the diagonal, at least 0.

    Returns
    -------
    f_a : Tensor of shape (a,)
        Predictions of the clean data alone.
    f_new : Tensor of shape (p, a)
        Row j: with poison j added. NaN where, without a ridge, it tells nothing new of itself:
        no regression meets its label and all others.

    Raises
    ------
    ValueError
        If shapes or labels do not fit, or ``k_dd`` with its ridge is not symmetric and positive definite.

    References
    ----------
    .. [1] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import added_poison_predictions
    >>> one = torch.ones(1)
    >>> k_pd, k_pa = torch.tensor([[0.0], [0.6]]), torch.tensor([[1.0], [0.8]])
    >>> f_a, f_new = added_poison_predictions(
    ...     one[None], 0 * one[None], -one, k_pd, k_pa, torch.ones(2), torch.ones(2)
    ... )
    >>> f_new.round(decimals=4)  # the first is the triggered image; the second has 1.6 to mend with 0.64 of its own
    tensor([[1.],
            [2.]])
    """
    at_least("ridge", ridge, 0)
    dtype = floating("k_dd", k_dd).dtype
    k_dd, k_da, k_pd, k_pa = _kernels(k_dd=k_dd, k_da=k_da, k_pd=k_pd, k_pa=k_pa)
    y_d, y_p = signs("y_d", y_d, k_dd), signs("y_p", y_p, k_pd)
    own = full(finite("k_pp_diag", floating("k_pp_diag", k_pp_diag)))
    has_shape("k_pp_diag", own, (len(k_pd),), "k_pd")
    clean = condition_on_clean(k_dd, y_d, k_da, ridge)
    known, gap, reach = _new_in(clean, k_pd, k_pa, y_p)
    new = own - known.square().sum(0) + ridge
    usable = _tells_something(new, own, ridge)
    step = torch.where(usable, gap / torch.where(usable, new, 1.0), torch.nan)
    return clean.predictions.to(dtype), (clean.predictions + step[:, None] * reach).to(dtype)


@torch.no_grad()
def greedy_poisons(
    k_dd: Float[Tensor, "d d"],
    k_da: Float[Tensor, "d a"],
    y_d: Shaped[Tensor, " d"],
    k_pd: Float[Tensor, "p d"],
    k_pa: Float[Tensor, "p a"],
    k_pp: Float[Tensor, "p p"],
    y_p: Shaped[Tensor, " p"],
    n_poisons: int,
    *,
    ridge: float = 0.0,
) -> Int[Tensor, " chosen"]:
    """Choose poisons one by one, each that with which the triggered images come nearest to +1.

    Judged by the second sum of equation 2. The training kernel grows by a row a choice, its factor and
    what is new in the other candidates by one update, O((d + p + a) p).

    Parameters
    ----------
    k_dd, k_da : Tensor
        Kernel of d (at least one) with d, symmetric, and with a.
    y_d : Tensor of shape (d,)
        Labels, +1 or -1.
    k_pd, k_pa, k_pp : Tensor
        Kernel of the candidates p with d, a and p, the last symmetric.
    y_p : Tensor of shape (p,)
        Labels, +1 or -1.
    n_poisons : int
        How many to choose, from 0 to p.
    ridge : float, default=0.0
        Added to the diagonal, at least 0.

    Returns
    -------
    Tensor of shape (n_poisons,)
        Indices of candidates in order of choice, int64. Of equal ones the first.

    Raises
    ------
    ValueError
        If shapes or labels do not fit, there are fewer candidates, none is left that tells anything new
        of itself, or ``k_dd`` with its ridge is not symmetric and positive definite.

    Notes
    -----
    1. The program guards its division where a candidate tells nothing new; here it cannot be chosen.

    References
    ----------
    .. [1] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import greedy_poisons
    >>> one, none = torch.ones(1, 1), torch.zeros(1, 1)
    >>> k_pa = torch.tensor([[0.1], [0.5], [0.3]])  # the second lies nearest to the triggered image
    >>> greedy_poisons(one, none, -one[0], torch.zeros(3, 1), k_pa, torch.eye(3), torch.ones(3), 2)
    tensor([1, 2])
    """
    at_least("ridge", ridge, 0)
    integer("n_poisons", n_poisons, 0)
    k_dd, k_da, k_pd, k_pa, k_pp = _kernels(k_dd=k_dd, k_da=k_da, k_pd=k_pd, k_pa=k_pa, k_pp=k_pp)
    y_d, y_p = signs("y_d", y_d, k_dd), signs("y_p", y_p, k_pp)
    if n_poisons > len(k_pp):
        raise ValueError(f"n_poisons must be at most the {len(k_pp)} candidates of k_pp, got {n_poisons}")
    clean = condition_on_clean(k_dd, y_d, k_da, ridge)
    known, gap, reach = _new_in(clean, k_pd, k_pa, y_p)
    own, f, chosen = k_pp.diagonal(), clean.predictions, []
    taken = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    for _ in range(n_poisons):
        new = own - known.square().sum(0) + ridge
        usable = _tells_something(new, own, ridge) & ~taken
        if not bool(usable.any()):
            raise ValueError(
                f"n_poisons must be at most {len(chosen)} here, got {n_poisons}: no other candidate differs from "
                "the training data; raise ridge"
            )
        after = f + (gap / torch.where(usable, new, 1.0))[:, None] * reach  # (p, a)
        miss = (after - 1).clamp_max(0).square().sum(1)
        j = int(torch.where(usable, miss, torch.inf).argmin())
        chosen.append(j)
        taken[j] = True
        row = (k_pp[:, j] - known.T @ known[:, j]) / new[j].sqrt()  # of the factor, for every candidate
        f = after[j]
        gap, reach = (
            gap - row * gap[j] / new[j].sqrt(),
            reach - row[:, None] * reach[j] / new[j].sqrt(),
        )
        known = torch.cat([known, row[None]])
    return torch.tensor(chosen, dtype=torch.int64, device=k_pp.device)


def loo_residuals(
    k_dd: Float[Tensor, "d d"], y_d: Shaped[Tensor, " d"], *, ridge: float = 0.0
) -> Float[Tensor, " d"]:
    """Return how far each label is from what regression on all other data predicts for it.

    A poison is labelled against its neighbourhood: times its label, its residual is large.

    Parameters
    ----------
    k_dd : Tensor of shape (d, d)
        Kernel of the training data, poisons among them, symmetric.
    y_d : Tensor of shape (d,)
        Labels, +1 or -1.
    ridge : float, default=0.0
        Added to the diagonal, at least 0.

    Returns
    -------
    Tensor of shape (d,)
        y_i - f_-i(x_i), by one inverse for all.

    Raises
    ------
    ValueError
        If shapes or labels do not fit, or the kernel with its ridge is not symmetric and positive definite.

    References
    ----------
    .. [1] Rasmussen, Williams. Gaussian Processes for Machine Learning. 2006. Equation 5.12.

    Examples
    --------
    Two that are alike but labelled otherwise, and one alone:

    >>> import torch
    >>> from posterity.robustness import loo_residuals
    >>> k_dd = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> loo_residuals(k_dd, torch.tensor([1, -1, 1]))
    tensor([ 1.5000, -1.5000,  1.0000])
    """
    at_least("ridge", ridge, 0)
    dtype = floating("k_dd", k_dd).dtype
    (k_dd,) = _kernels(k_dd=k_dd)
    y_d = signs("y_d", y_d, k_dd)
    inverse = torch.cholesky_inverse(factorise("k_dd", k_dd, ridge))
    return (inverse @ y_d / inverse.diagonal()).to(dtype)


class Clean(NamedTuple):
    """Regression on the clean data: L with L L' = k_dd + ridge, L^-1 y_d, L^-1 k_dx, predictions at x."""

    factor: Tensor
    labels: Tensor
    reach: Tensor
    predictions: Tensor


def condition_on_clean(k_dd: Tensor, y_d: Tensor, k_dx: Tensor, ridge: float) -> Clean:
    """Return what the objective needs of the clean data, whatever the poisons are."""
    factor = factorise("k_dd", k_dd, ridge)
    both = torch.linalg.solve_triangular(factor, torch.cat([y_d[:, None], k_dx], 1), upper=False)
    labels, reach = both[:, 0], both[:, 1:]
    return Clean(factor, labels, reach, reach.T @ labels)


def objective(
    clean: Clean, k_pd: Tensor, k_pp: Tensor, k_px: Tensor, y_p: Tensor, y_t: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return equation 2 and the predictions at x, of which the first are those of t."""
    known, gap, reach = _new_in(clean, k_pd, k_px, y_p)
    factor = factorise("k_pp", k_pp - known.T @ known, ridge)
    f = clean.predictions + reach.T @ torch.cholesky_solve(gap[:, None], factor)[:, 0]
    kept, pulled = f[: len(y_t)] - y_t, (f[len(y_t) :] - 1).clamp_max(0)
    return kept.square().sum() + pulled.square().sum(), f


def factorise(name: str, kernel: Tensor, ridge: float) -> Tensor:
    """Return the lower Cholesky factor of a kernel with its ridge."""
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(kernel + ridge * eye)
    if int(failed):
        raise ValueError(
            f"{name} with its ridge must be positive definite, got one that is not at ridge {ridge:g}: raise ridge"
        )
    return factor


def symmetric(name: str, kernel: Tensor) -> Tensor:
    """Return a kernel that is symmetric up to rounding."""
    has_shape(name, kernel, (len(kernel), len(kernel)))
    if not len(kernel):
        return kernel
    values = kernel.detach()
    off, slack = float((values - values.T).abs().max()), max(1e-9, 64 * torch.finfo(values.dtype).eps)
    if off > slack * float(values.abs().max()):
        raise ValueError(f"{name} must be symmetric, got entries that differ from their mirror by {off:g}")
    return kernel


def signs(name: str, y: Any, source: Tensor) -> Tensor:
    """Return labels of +1 and -1, one a row of ``source``, in its dtype."""
    if not isinstance(y, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(y).__name__}")
    has_shape(name, y, (len(source),), f"a kernel of {len(source)} rows")
    odd = (y != 1) & (y != -1)
    if y.dtype == torch.bool or bool(odd.any()):
        came = y.dtype if y.dtype == torch.bool else y[odd][0].item()
        raise ValueError(f"{name} must hold labels +1 and -1, got {came}")
    return y.to(source)


def _kernels(**given: Any) -> list[Tensor]:
    """Return finite kernels in float64, whose letters agree on sizes: k_pd has p rows and d columns."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in given.items():
        finite(name, has_shape(name, floating(name, value), (None, None)))
        for letter, size in zip(name[2:], value.shape, strict=True):
            wanted, source = sizes.setdefault(letter, (size, name))
            if size != wanted:
                raise ValueError(
                    f"{name} must have {wanted} for {letter} as {source} has, got shape {tuple(value.shape)}"
                )
        if name[2] == name[3]:
            symmetric(name, value)
    if not sizes["d"][0]:
        raise ValueError("k_dd must have at least one row, got none")
    return [full(value) for value in given.values()]


def _new_in(clean: Clean, k_pd: Tensor, k_px: Tensor, y_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return L^-1 k_pd', and what is new in the poisons' labels and reach: R and D of equation 1."""
    known = torch.linalg.solve_triangular(clean.factor, k_pd.T, upper=False)
    return known, y_p - known.T @ clean.labels, k_px - known.T @ clean.reach


def _tells_something(new: Tensor, own: Tensor, ridge: float) -> Tensor:
    """Return which Schur complements are more than rounding."""
    return new > torch.finfo(new.dtype).eps ** 0.5 * (own + ridge)
