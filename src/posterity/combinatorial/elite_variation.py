"""What changes between generations: offspring on lines through elites, and who owns which elite.

An offspring of the elites x and y is

    x + iso_sigma N(0, I) + line_sigma z (y - x),    one z ~ N(0, 1) for all weights:      (1)

what two good solutions differ in is the direction in which others lie. An elite belongs to the
representation that it was made with; a representation whose elites have all been beaten is replaced
by a copy of the one with most, whose elites are then dealt out among the copies.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, indices, integer
from posterity._precision import widened
from posterity._random import draw_device

__all__ = ["iso_line", "reassign_representations"]


@widened
def iso_line(
    x: Float[Tensor, "batch dim"],
    y: Float[Tensor, "batch dim"],
    *,
    iso_sigma: float = 0.005,
    line_sigma: float = 0.05,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch dim"]:
    """Return offspring of pairs of solutions: near the first, along the line to the second.

    Parameters
    ----------
    x, y : Tensor
        First and second parents, of shape (batch, dim).
    iso_sigma : float, default=0.005
        Deviation of each weight by itself, at least 0.
    line_sigma : float, default=0.05
        Deviation along the line, in units of the distance from x to y; at least 0.
    generator : torch.Generator, optional
        Draws the noise of each weight, then z.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``.

    Raises
    ------
    ValueError
        If the shapes of ``x`` and ``y`` differ, or a sigma is negative.

    References
    ----------
    .. [1] Vassiliades and Mouret. Discovering the Elite Hypervolume by Leveraging Interspecies
       Correlation. GECCO 2018. Equation 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import iso_line
    >>> x, y = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]])
    >>> child = iso_line(x, y, iso_sigma=0.0)
    >>> child / child[:, :1]
    tensor([[1., 2., 4.]])
    """
    iso_sigma, line_sigma = at_least("iso_sigma", iso_sigma, 0), at_least("line_sigma", line_sigma, 0)
    has_shape("x", floating("x", x), (None, None))
    has_shape("y", floating("y", y), tuple(x.shape), "that of x")
    options = {"generator": generator, "dtype": x.dtype, "device": draw_device(generator, x.device)}
    noise = torch.randn(tuple(x.shape), **options).to(x.device)
    z = torch.randn((len(x), 1), **options).to(x.device)
    return x + iso_sigma * noise + line_sigma * z * (y.to(x) - x)


def reassign_representations(
    owner: Int[Tensor, " elites"],
    n: int,
    *,
    threshold: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " elites"], Int[Tensor, " n"]]:
    """Replace representations that own too few elites by copies of the most popular one.

    Parameters
    ----------
    owner : Tensor
        The representation of each elite, in 0 .. n - 1.
    n : int
        How many representations there are, at least 1.
    threshold : int, default=0
        Replaced is who owns so many elites or fewer; at least 0.
    generator : torch.Generator, optional
        Deals the elites of the most popular one among itself and its copies, each uniformly at random.

    Returns
    -------
    owner : Tensor
        The new owners: elites of others keep theirs.
    source : Tensor
        Of which representation each becomes a copy, of shape (n,): itself, or the most popular one, of
        equally popular ones the first. Without elites nobody is popular, and nothing changes.

    Raises
    ------
    ValueError
        If ``owner`` is not integer or names a representation that is not there, or ``n`` or ``threshold``
        is too small.

    References
    ----------
    .. [1] Xue et al. Sample-Efficient Quality-Diversity by Cooperative Coevolution. ICLR 2024. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import reassign_representations
    >>> owner, source = reassign_representations(torch.tensor([0, 2, 2, 2]), 3)
    >>> source
    tensor([0, 2, 2])
    >>> owner[:1], bool((owner[1:] > 0).all())  # those of 2 are dealt out among 1 and 2
    (tensor([0]), True)
    """
    n, threshold = integer("n", n, 1), integer("threshold", threshold, 0)
    indices("owner", owner, (None,))
    if len(owner):
        low, high = (int(end) for end in owner.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"owner must be in 0..{n - 1}, got values from {low} to {high}")
    own = torch.arange(n, device=owner.device)
    counts = torch.bincount(owner, minlength=n)
    replaced = counts <= threshold
    if not len(owner) or not bool(replaced.any()):
        return owner.clone(), own
    popular = int(torch.argmax((counts == counts.max()).int()))  # the first of equal ones
    source = torch.where(replaced, popular, own)
    replaced[popular] = True  # those that share its elites
    sharing = own[replaced]
    drawn = torch.randint(
        len(sharing), tuple(owner.shape), generator=generator, device=draw_device(generator, owner.device)
    )
    return torch.where(owner == popular, sharing[drawn.to(owner.device)], owner).to(owner.dtype), source
