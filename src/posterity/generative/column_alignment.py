"""How far two pictures of a line are apart when their columns may stretch and shift: dynamic time warping.

A picture is read as the sequence of its columns, vectors of ink and no ink. An alignment pairs columns of
one with columns of the other, in order and skipping none; a pair costs the squared distance of its columns, the least of
those to some rows up or down, and the distance is the square root of what the cheapest alignment costs:

    D[i, j] = c[i, j] + min(D[i-1, j], D[i, j-1], D[i-1, j-1]).                                 (1)

A symbol a little too wide or too low costs little, a missing one costs its ink.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import finite, floating, has_shape, within
from posterity._precision import widened

__all__ = ["column_dtw"]

ROOM = 2**24  # of pairs of columns at a time
SLACK = 1e-3  # of numbers in [0, 1] that come of clipping and scaling


@widened
def column_dtw(
    pred: Float[Tensor, "n height width"],
    target: Float[Tensor, "n height width"],
    *,
    threshold: float = 150 / 255,
    shift: float = 0.1,
) -> Float[Tensor, " n"]:
    """Return the distance of grey pictures by aligning their columns, lower is better.

    Parameters
    ----------
    pred, target : Tensor
        Grey pictures in [0, 1], dark ink on white, shape (n, height, width); of one size.
    threshold : float, default=150/255
        Below it a pixel is ink; in (0, 1).
    shift : float, default=0.1
        Share of the height by which a column may be moved up or down for each pair, in [0, 1). Rows that are
        left without a partner do not count.

    Returns
    -------
    Tensor
        Shape (n,), the root of the number of pixels that differ along the cheapest alignment.

    Raises
    ------
    ValueError
        If pictures differ in size, hold what is no number in [0, 1], or an argument is out of range.

    Notes
    -----
    The official code reports the negative, as a similarity.

    References
    ----------
    .. [1] Deng, Kojima, Rush. Markup-to-Image Diffusion Models with Scheduled Sampling. ICLR 2023. Section 5.

    Examples
    --------
    A wider stroke costs nothing, a missing one the root of its ink:

    >>> import torch
    >>> from posterity.generative import column_dtw
    >>> thin, wide, blank = torch.ones(3, 1, 4, 6)
    >>> thin[:, :, 2] = wide[:, :, 2:4] = 0
    >>> column_dtw(wide, thin), column_dtw(blank, thin)
    (tensor([0.]), tensor([2.]))
    """
    within("threshold", threshold, 0, 1, open_low=True, open_high=True)
    within("shift", shift, 0, 1, open_high=True)
    has_shape("pred", floating("pred", pred, "scale to [0, 1]"), (None, None, None))
    has_shape("target", floating("target", target, "scale to [0, 1]"), pred.shape, "pred")
    if 0 in pred.shape[1:]:
        raise ValueError(f"pred must have rows and columns, got {tuple(pred.shape)}")
    for name, x in (("pred", pred), ("target", target)):
        if finite(name, x).numel() and not (x.min() >= -SLACK and x.max() <= 1 + SLACK):
            raise ValueError(f"{name} must be in [0, 1], got values from {x.min():g} to {x.max():g}")
    n, height, width = pred.shape
    rows = math.floor(shift * height + 1e-9)
    # Counts of pixels are exact in float32 up to 2^24, and a path has less than 2 width columns
    dtype = torch.float32 if 2 * width * height < 2**24 else torch.float64
    ink, other = ((x < threshold).to(dtype).mT.contiguous() for x in (pred, target))
    size = max(1, ROOM // width**2)
    parts = [
        _aligned(_costs(one, two, rows)) for one, two in zip(ink.split(size), other.split(size), strict=True)
    ]
    return torch.cat(parts).to(torch.promote_types(pred.dtype, target.dtype)).sqrt()


def _costs(ink: Tensor, other: Tensor, rows: int) -> Tensor:
    """Return what each pair of columns costs, (n, width, width): |x| + |y| - 2 x y, the least over shifts."""
    height = ink.shape[2]
    least = None
    for by in range(-rows, rows + 1):
        one = ink[..., max(by, 0) : height + min(by, 0)]
        two = other[..., max(-by, 0) : height + min(-by, 0)]
        cost = torch.baddbmm(one.sum(2)[:, :, None] + two.sum(2)[:, None], one, two.mT, alpha=-2)
        least = cost if least is None else torch.minimum(least, cost, out=least)
    assert least is not None
    return least


def _aligned(costs: Tensor) -> Tensor:
    """Return the least cost of an alignment, (n,), row by row of equation 1.

    With C[j] the sum of a row's costs up to j, D[j] - C[j] is the least, up to j, of what comes from above less
    C[j - 1]: a running minimum for the whole batch.
    """
    total = costs.cumsum(2)
    before = total - costs
    above = total[:, 0]  # the first row has no choice
    for i in range(1, costs.shape[1]):
        enter = above.clone()
        torch.minimum(above[:, 1:], above[:, :-1], out=enter[:, 1:])
        above = (enter - before[:, i]).cummin(1).values + total[:, i]
    return above[:, -1]
