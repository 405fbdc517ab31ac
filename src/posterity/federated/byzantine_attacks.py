"""Attacks on distributed training: what workers may send who see all that honest ones sent.

For measuring: each is a pure function of honest vectors, and shows whether an aggregator, with a
solver, holds against it. A robust mean is tested by the worst of them, not by one.
"""

from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, integer
from posterity._precision import widened
from posterity.federated.robust_aggregation import Vectors, _vectors

__all__ = ["alie", "bit_flip", "ipm", "mimic"]


@widened
def alie(good: Vectors, n_byzantine: int, z: float | None = None) -> Float[Tensor, "f d"]:
    """Attack: "a little is enough", each coordinate as far below the mean as passes for honest.

    Parameters
    ----------
    good : Tensor of shape (g, d)
        What honest workers send; at least two.
    n_byzantine : int
        f, at least 1.
    z : float, optional
        Standard deviations below the mean; by default ``Phi^-1((n - f - s) / (n - f))`` of n = g + f
        workers, ``s = floor(n / 2 + 1) - f`` of whom must side with the attack.

    Returns
    -------
    Tensor of shape (f, d)
        Equal rows.

    References
    ----------
    Baruch, Baruch, Goldberg, "A Little Is Enough", NeurIPS 2019.
    """
    integer("n_byzantine", n_byzantine, 1)
    if len(_vectors("good", good)) < 2:
        raise ValueError("good must hold at least two vectors, whose spread hides the attack, got 1")
    n = len(good) + n_byzantine
    if z is None:
        share = (n - n_byzantine - (n // 2 + 1 - n_byzantine)) / (n - n_byzantine)
        if not 0 < share < 1:
            raise ValueError(f"z must be given where {n_byzantine} of {n} workers attack")
        z = NormalDist().inv_cdf(share)
    return (good.mean(0) - z * good.std(0)).repeat(n_byzantine, 1)


@widened
def ipm(good: Vectors, n_byzantine: int, epsilon: float = 0.1) -> Float[Tensor, "f d"]:
    """Attack: a multiple of the mean with its sign turned, so that the inner product is negative.

    Parameters
    ----------
    good : Tensor of shape (g, d)
        What honest workers send.
    n_byzantine : int
        At least 1.
    epsilon : float, default=0.1
        The multiple, at least 0.

    Returns
    -------
    Tensor of shape (f, d)
        Equal rows.

    References
    ----------
    Xie, Koyejo, Gupta, "Fall of Empires", UAI 2019.
    """
    integer("n_byzantine", n_byzantine, 1)
    return (-at_least("epsilon", epsilon, 0.0) * _vectors("good", good).mean(0)).repeat(n_byzantine, 1)


def bit_flip(good: Vectors, n_byzantine: int) -> Float[Tensor, "f d"]:
    """Attack: the mean with its sign turned.

    Parameters
    ----------
    good : Tensor of shape (g, d)
        What honest workers send.
    n_byzantine : int
        At least 1.

    Returns
    -------
    Tensor of shape (f, d)
        Equal rows.
    """
    return ipm(good, n_byzantine, epsilon=1.0)


def mimic(good: Vectors, n_byzantine: int, index: int = 0) -> Float[Tensor, "f d"]:
    """Attack: copies of one honest vector, which then counts too much.

    Parameters
    ----------
    good : Tensor of shape (g, d)
        What honest workers send.
    n_byzantine : int
        At least 1.
    index : int, default=0
        Whose.

    Returns
    -------
    Tensor of shape (f, d)
        Equal rows.
    """
    integer("n_byzantine", n_byzantine, 1)
    if not 0 <= integer("index", index) < len(_vectors("good", good)):
        raise ValueError(f"index must be in [0, {len(good)}) for good, got {index}")
    return good[index].repeat(n_byzantine, 1)
