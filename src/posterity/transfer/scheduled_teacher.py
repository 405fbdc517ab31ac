"""A teacher of the past that is not the latest: the difference of two moving averages of a model.

Two exponential averages of the weights, of rates r1 < r2, are drawn to the model after each of its updates, and the
teacher is what the slow one has beyond the fast one:

    theta_i <- theta_i + r_i (theta - theta_i) ,   teacher = (r2 theta_1 - r1 theta_2) / (r2 - r1) .         (1)

The model of k updates ago then weighs r1 r2 / (r2 - r1) ((1 - r1)^k - (1 - r2)^k): nothing for the newest, a hump,
and a tail; mean and spread of k are chosen, where one average has its largest weight at the newest model.
"""

import math

import torch
from torch import Tensor, nn

from posterity._branches import momentum_copy
from posterity._checks import at_least, within
from posterity._precision import wide

__all__ = ["ScheduledTeacher", "ema_rates"]


def ema_rates(mean: float, var: float) -> tuple[float, float]:
    """Return the rates of the two averages for which the age of the teacher's weights has a mean and a variance.

    Parameters
    ----------
    mean : float
        The age k has the mean ``mean - 1``, in updates; greater than 2.
    var : float
        The variance of k is ``var * mean**2``; greater than 1/2 - 1/mean, at most (1 - 1/mean) (1 - 2/mean).

    Returns
    -------
    tuple of float
        r1 < r2, both in (0, 1].

    Raises
    ------
    ValueError
        If there are no such rates.

    Notes
    -----
    1. The age is one more than the sum of two geometric variables, so 1/r1 + 1/r2 = mean. The paper asks for
       var < 1 - 1/mean, where the fast rate may still exceed 1, which is no average.

    References
    ----------
    .. [1] Koh et al. Online Boundary-Free Continual Learning by Scheduled Data Prior. ICLR 2023. The scheduled
       data prior, its appendix on the two rates, and `SDP.update_sdp_model` of the official code.

    Examples
    --------
    >>> from posterity.transfer import ema_rates
    >>> slow, fast = ema_rates(6.0, 5 / 9)  # 1/r1 + 1/r2 = 6 and (1 - r1)/r1^2 + (1 - r2)/r2^2 = 20
    >>> round(1 / slow, 6), round(1 / fast, 6)
    (5.0, 1.0)
    """
    mean = float(at_least("mean", mean, 2, strict=True))
    low, high = 0.5 - 1 / mean, (1 - 1 / mean) * (1 - 2 / mean)
    rule = f"greater than {low:.6g} and at most {high:.6g} for mean {mean:g}"
    try:
        var = float(within("var", var, low, high * (1 + 1e-12), open_low=True))
    except ValueError:
        raise ValueError(f"var must be {rule}, got {var}") from None
    spread = math.sqrt(2 * var - 1 + 2 / mean)
    below = mean - 1 - mean * var
    slow, fast = (1 - spread) / below, (1 + spread) / below
    if not 0 < slow < fast:  # so near its lower end that rounding makes them one
        raise ValueError(f"var must be {rule}, got {var}, where both rates are {slow:g}")
    return slow, min(fast, 1.0)


class ScheduledTeacher(nn.Module):
    """The teacher of (1): a copy of a module, moved after each update of it.

    Called, it is the teacher. No gradient reaches it. It starts as the module is, and so do both averages.

    Parameters
    ----------
    module : nn.Module
        The model; it is copied.
    mean : float, default=10_000.0
        Mean age of the teacher's weights in updates, more one; greater than 2.
    var : float, default=0.75
        Variance of their age over ``mean**2``, as `ema_rates` takes it.

    Attributes
    ----------
    module : nn.Module
        The teacher.
    rates : tuple of float
        r1 and r2.
    slow, fast : nn.ParameterList
        The two averages, in float32 at least.

    Raises
    ------
    ValueError
        If ``module`` is none, or there are no rates for ``mean`` and ``var``.

    References
    ----------
    .. [1] Koh et al. Online Boundary-Free Continual Learning by Scheduled Data Prior. ICLR 2023. The scheduled
       data prior, its appendix on the two rates, and `SDP.update_sdp_model` of the official code.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import ScheduledTeacher
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> teacher = ScheduledTeacher(model, mean=6.0, var=5 / 9)  # rates 1/5 and 1
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> for _ in range(2):
    ...     teacher.update(model)
    ...     print(round(teacher.module.weight.item(), 4))  # nothing of the newest, then 1/4 (1 - 4/5)
    ...
    0.0
    0.2
    """

    def __init__(self, module: nn.Module, *, mean: float = 10_000.0, var: float = 0.75) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ValueError(f"module must be a torch module, got {type(module).__name__}")
        self.rates = ema_rates(mean, var)
        self.module = momentum_copy(module)
        self.slow, self.fast = (
            nn.ParameterList(nn.Parameter(wide(p.detach()).clone(), False) for p in module.parameters())
            for _ in range(2)
        )
        # kept: a walk through a small module takes as long as its averages
        self._weights: list[list[Tensor]] = [
            [*part.parameters()] for part in (self.module, self.slow, self.fast)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the teacher gives."""
        return self.module(x)

    @torch.no_grad()
    def update(self, model: nn.Module, n_updates: float = 1.0) -> None:
        """Follow the model, after an update of it.

        Parameters
        ----------
        model : nn.Module
            Built as the module was. Its buffers, such as running statistics, are copied.
        n_updates : float, default=1.0
            As how many updates this one counts, greater than 0.
        """
        at_least("n_updates", n_updates, 0, strict=True)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch module, got {type(model).__name__}")
        ours, slow, fast = self._weights
        theirs = [p.detach() for p in model.parameters()]
        if [p.shape for p in ours] != [p.shape for p in theirs]:
            raise ValueError(
                f"model must have the parameters of the module that was copied: {len(ours)} of these shapes, "
                f"got {len(theirs)}"
            )
        r1, r2 = self.rates
        if ours:
            theirs = [p.to(own) for p, own in zip(theirs, slow, strict=True)]
            torch._foreach_lerp_(slow, theirs, 1 - (1 - r1) ** n_updates)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_lerp_(fast, theirs, 1 - (1 - r2) ** n_updates)  # pyright: ignore[reportPrivateImportUsage]
            if all(own.dtype == average.dtype for own, average in zip(ours, slow, strict=True)):
                torch._foreach_copy_(ours, slow)  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_lerp_(ours, fast, -r1 / (r2 - r1))  # pyright: ignore[reportPrivateImportUsage]
            else:  # of narrow weights the difference is taken before it is rounded
                blend = torch._foreach_lerp(slow, fast, -r1 / (r2 - r1))  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_copy_(ours, blend)  # pyright: ignore[reportPrivateImportUsage]
        for own, new in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(new)
