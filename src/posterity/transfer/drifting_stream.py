"""A stream without tasks: each class arrives around a time of its own, by a normal law, once or in periods.

A sample of class i of N, in a random order of the classes, arrives at

    time ~ Normal(i / N, sigma) + period ,   period uniform in 0 .. n_repeats - 1 ,                            (1)

so that classes fade in and out, several at a time; sigma = 0 gives tasks of one class with sharp boundaries. Some
classes may exist from a later period on only.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, class_indices, integer, within
from posterity._random import draw_device

__all__ = ["Stream", "gaussian_stream"]


class Stream(NamedTuple):
    """What `gaussian_stream` returns.

    Attributes
    ----------
    index : Tensor of shape (m,)
        Rows in the order of their arrival.
    time : Tensor of shape (m,)
        When each arrives, float64, sorted.
    class_start : Tensor of shape (n_classes,)
        The first period of each class, in the order of the sorted labels.
    """

    index: Int[Tensor, " m"]
    time: Float[Tensor, " m"]
    class_start: Int[Tensor, " n_classes"]


def gaussian_stream(
    y: Int[Tensor, " n"], *, sigma: float = 0.1, n_repeats: int = 1, initial_classes: float = 1.0,
    generator: torch.Generator | None = None,
) -> Stream:  # fmt: skip
    """Return in which order samples arrive where their classes come and go gradually, equation 1.

    Parameters
    ----------
    y : Tensor of shape (n,)
        Labels, any integers.
    sigma : float, default=0.1
        Standard deviation of the times of a class, at least 0; a period lasts 1.
    n_repeats : int, default=1
        Periods, at least 1.
    initial_classes : float, default=1.0
        Share of the classes that exist from the start, in [0, 1]. In period p, from 0, as many exist as the nearest
        integer to N (initial + (1 - initial) (p + 1) / n_repeats); a sample drawn for a period before its class
        exists never comes.
    generator : torch.Generator, optional
        Draws everything; torch's own where it is None.

    Returns
    -------
    Stream
        On the device of ``y``. With all classes from the start ``index`` is a permutation of the rows.

    Raises
    ------
    ValueError
        If ``y`` is no vector of integers with a row at least, or a number is out of range.

    References
    ----------
    .. [1] Koh et al. Online Boundary-Free Continual Learning by Scheduled Data Prior. ICLR 2023. The Gaussian
       and the periodic stream; `make_stream.ipynb` of the official code.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import gaussian_stream
    >>> y = torch.tensor([7, 5, 7, 5, 5])
    >>> arriving = y[gaussian_stream(y, sigma=0.0).index].tolist()
    >>> arriving in ([5, 5, 5, 7, 7], [7, 7, 5, 5, 5])
    True
    """
    class_indices("y", y, len(y) if isinstance(y, Tensor) and y.ndim else 0)
    if not len(y):
        raise ValueError(f"y must have at least one row, got shape {tuple(y.shape)}")
    at_least("sigma", sigma, 0)
    n_repeats = integer("n_repeats", n_repeats, 1)
    within("initial_classes", initial_classes, 0, 1)
    device = draw_device(generator, torch.device("cpu"))
    labels, codes = y.unique(return_inverse=True)
    codes = codes.to(device)
    n, n_classes = len(y), len(labels)
    turn = torch.randperm(n_classes, generator=generator, device=device)
    start = torch.zeros(n_classes, dtype=torch.long, device=device)
    if initial_classes < 1:
        order = torch.randperm(n_classes, generator=generator, device=device)
        exist = [
            round(n_classes * (initial_classes + (1 - initial_classes) * (p + 1) / n_repeats))
            for p in range(n_repeats)
        ]
        for p in range(1, n_repeats):
            start[order[exist[p - 1] : exist[p]]] = p
    shuffled = torch.randperm(n, generator=generator, device=device)  # equal times in any order
    own = codes[shuffled]
    period = torch.randint(n_repeats, (n,), generator=generator, device=device)
    noise = torch.randn(n, generator=generator, device=device)
    time = (turn[own].double() / n_classes + sigma * noise.double()) + period
    comes = period >= start[own]
    time, place = time[comes].sort(stable=True)
    return Stream(shuffled[comes][place].to(y.device), time.to(y.device), start.to(y.device))
