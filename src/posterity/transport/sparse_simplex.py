"""Projection onto the simplex with at most k nonzeros: keep the k largest, project those.

The nearest y >= 0 to v with sum s and at most k nonzeros is

    y = max(v - theta, 0) on the k largest entries, 0 elsewhere,              (1)

with the threshold theta at which y sums to s: the largest over r <= k of (the sum of the
r largest entries - s) / r. No support has to be searched for: a point on the k largest
entries is at least as near as one on any others.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import widened

__all__ = ["project_sparse_simplex"]


@widened
def project_sparse_simplex(
    v: Float[Tensor, "..."], k: int, *, total: float | Tensor = 1.0, dim: int = -1
) -> Float[Tensor, "..."]:
    """Return the nearest point of the simplex with at most k nonzeros.

    That is the y >= 0 with ``y.sum(dim) == total`` and at most ``k`` nonzeros along
    ``dim`` that is nearest to ``v``. It is differentiable where the k-th largest entry
    is alone.

    Parameters
    ----------
    v : Tensor
        Points, of a floating dtype.
    k : int
        Most nonzeros, at least 1; from the size of ``dim`` on it is the projection onto
        the whole simplex.
    total : float or Tensor, default=1.0
        What the entries sum to, at least 0: a number, or a tensor of the shape of ``v``
        without ``dim``.
    dim : int, default=-1
        Along which dimension.

    Returns
    -------
    Tensor
        Projections, of the shape of ``v``.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit.

    References
    ----------
    .. [1] Liu, Puigcerver, Blondel. Sparsity-Constrained Optimal Transport. ICLR 2023.
    .. [2] Kyrillidis, Becker, Cevher, Koch. Sparse projections onto the simplex. ICML 2013.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import project_sparse_simplex
    >>> v = torch.tensor([0.5, 0.4, 0.3, -1.0])
    >>> project_sparse_simplex(v, 2)
    tensor([0.5500, 0.4500, 0.0000, 0.0000])
    >>> project_sparse_simplex(v, 4)
    tensor([0.4333, 0.3333, 0.2333, 0.0000])
    """
    floating("v", v)
    integer("k", k, 1)
    if integer("dim", dim) not in range(-v.ndim, v.ndim) or v.shape[dim] == 0:
        raise ValueError(f"dim must be a dimension of v that is not empty, got {dim} for {tuple(v.shape)}")
    x = v.movedim(dim, -1).contiguous()  # as partial sorting along a stride is slow
    if not isinstance(total, Tensor):
        total = x.new_full(x.shape[:-1], at_least("total", total, 0))
    elif total.ndim:
        has_shape("total", total, x.shape[:-1], "v without dim")
    top, index = x.topk(min(k, x.shape[-1]), dim=-1)
    excess, _ = _above_threshold(top, total[..., None].to(x))
    return torch.zeros_like(x).scatter(-1, index, excess).movedim(-1, dim)


def _above_threshold(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Project entries in falling order onto the simplex: max(top - theta, 0), and theta.

    The threshold is the largest of (sum of the first r - total) / r: adding an entry to a
    mean raises it exactly while the entry is above it.
    """
    lead = top[..., :1]
    below = top - lead  # the support lies within total of its largest entry: nothing cancels
    rank = torch.arange(1, top.shape[-1] + 1, dtype=top.dtype, device=top.device)
    theta = ((below.cumsum(-1) - total) / rank).amax(-1, keepdim=True)
    return (below - theta).relu(), lead + theta
