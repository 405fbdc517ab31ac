r"""Learning rates read from the curvature while training: a scheduler that takes a few Lanczos steps.

On a quadratic whose curvatures lie between l and L, gradient descent with momentum (heavy ball) is fastest at

.. math:: \eta = \Big(\frac{2}{\sqrt L + \sqrt l}\Big)^2, \qquad
          \mu = \Big(\frac{\sqrt L - \sqrt l}{\sqrt L + \sqrt l}\Big)^2,

and shrinks the error by sqrt(mu) a step; without momentum at 2 / (L + l). `LanczosLearner` measures L and l
on a batch every so often and sets both.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from posterity._checks import at_least, integer, within
from posterity._models import evaluating
from posterity.optimization.flat_network import Batch
from posterity.optimization.hessian_spectra import _probe, _ritz, hessian_matvec

__all__ = ["LanczosLearner"]

_VISIBLE = 1e-2  # weight of a Ritz value that stands for more than a stray direction
_FLAT = 1e-4  # l is at least this share of L


class LanczosLearner(LRScheduler):
    """Sets learning rate and momentum from the Hessian of the current batch.

    Call ``observe(batch)`` and then ``step()`` after each step of the optimiser.

    Parameters
    ----------
    optimizer : Optimizer
        All its groups get the same rate. With ``learn_momentum``, one that has a momentum, as SGD.
    model : nn.Module
        Whose parameters the Hessian is of; in eval mode while it is measured.
    loss_fn : callable
        ``loss_fn(model, *batch)`` is the mean loss of a batch, a scalar.
    every : int, default=100
        Steps from one measurement to the next, at least 1. The first ``step`` measures.
    n_iter : int, default=20
        Lanczos steps a measurement, at least 1; each costs two or three gradients.
    safety : float, default=1.0
        Multiplies the rate; positive.
    learn_momentum : bool, default=True
        Whether to set the momentum too. Otherwise the rate is that of descent without one.
    max_lr : float, optional
        The rate is at most this; positive.
    min_lr : float, default=0.0
        And at least this.
    average : float, default=0.9
        In [0, 1): how much of L's running mean is kept at a measurement. L is never below the current one.
    last_epoch : int, default=-1
        As in torch's schedulers.
    generator : torch.Generator, optional
        Draws the vectors that Lanczos starts from.

    Attributes
    ----------
    largest, smallest : float or None
        L and l of the last measurement, None before it.

    Raises
    ------
    ValueError
        If a number is out of range, the optimiser has no momentum to learn, a step that measures has had no
        batch, or products with the Hessian are not finite.

    See Also
    --------
    max_learning_rate : The largest stable rate for a batch size.

    Notes
    -----
    1. L is the largest Ritz value; l the smallest positive one of weight at least 0.01, at least 1e-4 L.
    2. Where L is not positive the rate stays as it is.

    References
    ----------
    .. [1] Granziol, Zohren, Roberts. Learning Rates as a Function of Batch Size: A Random Matrix Theory
       Approach to Neural Network Training. JMLR 2022.
    .. [2] Polyak. Some methods of speeding up the convergence of iteration methods. 1964.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import LanczosLearner
    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> loss_fn = lambda model, x: model(x).square().sum() / 2  # curvatures 1 and 9
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    >>> learner = LanczosLearner(optimizer, model, loss_fn, generator=torch.Generator().manual_seed(0))
    >>> loss_fn(model, x).backward()
    >>> optimizer.step()
    >>> learner.observe((x,))
    >>> learner.step()
    >>> round(optimizer.param_groups[0]["lr"], 3), round(optimizer.param_groups[0]["momentum"], 3)
    (0.25, 0.25)
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, loss_fn: Callable[..., Tensor], *, every: int = 100,
        n_iter: int = 20, safety: float = 1.0, learn_momentum: bool = True, max_lr: float | None = None,
        min_lr: float = 0.0, average: float = 0.9, last_epoch: int = -1, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
        self.every, self.n_iter = integer("every", every, 1), integer("n_iter", n_iter, 1)
        self.safety = at_least("safety", safety, 0, strict=True)
        self.min_lr = at_least("min_lr", min_lr, 0)
        self.max_lr = math.inf if max_lr is None else at_least("max_lr", max_lr, 0, strict=True)
        if self.max_lr < self.min_lr:
            raise ValueError(f"max_lr must be at least min_lr, got {max_lr} and {min_lr}")
        self.average = within("average", average, 0, 1, open_high=True)
        self.learn_momentum = learn_momentum
        if learn_momentum and not all("momentum" in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer must have a momentum, got {type(optimizer).__name__}: set learn_momentum=False"
            )
        if last_epoch >= 0 and not all("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                f"last_epoch must be -1 where an optimizer's groups have no 'initial_lr', got {last_epoch}"
            )
        self.largest: float | None = None
        self.smallest: float | None = None
        self._mean, self._since = 0.0, self.every  # L's running mean; steps since the last measurement
        self._theirs = (model, loss_fn, generator)
        self._batch: Batch | None = None
        self._made = False  # torch's constructor makes a step of its own
        super().__init__(optimizer, last_epoch)
        self._made = True

    def observe(self, batch: Batch) -> None:
        """Say which batch the next step is to measure.

        Parameters
        ----------
        batch : tuple of Tensor
            What ``loss_fn`` takes after the model.
        """
        self._batch = batch

    def get_lr(self) -> list[Any]:
        """Return the rate of each group, measuring it and setting the momentum if it is time to.

        Returns
        -------
        list of float
        """
        batch, self._batch = self._batch, None
        if self._made:
            self._since += 1
            if self._since > self.every:
                if batch is None:
                    raise ValueError("batch must be given to observe before a step that measures, got none")
                self._since = 1
                return self._learn(batch)
        return [group["lr"] for group in self.optimizer.param_groups]

    def _learn(self, batch: Batch) -> list[Any]:
        groups = self.optimizer.param_groups
        top, low = self._measure(batch)
        if not top > 0:
            return [group["lr"] for group in groups]
        self._mean = top if self.largest is None else self.average * self._mean + (1 - self.average) * top
        self.largest = max(self._mean, top)
        self.smallest = max(low, _FLAT * self.largest)
        root, least = math.sqrt(self.largest), math.sqrt(self.smallest)
        if self.learn_momentum:
            rate = (2 / (root + least)) ** 2
            for group in groups:
                group["momentum"] = ((root - least) / (root + least)) ** 2
        else:
            rate = 2 / (self.largest + self.smallest)
        return [min(max(self.safety * rate, self.min_lr), self.max_lr)] * len(groups)

    def _measure(self, batch: Batch) -> tuple[float, float]:
        """Return the largest Ritz value, and the smallest positive one that is no stray; 0 if there is none."""
        model, loss_fn, generator = self._theirs
        with evaluating(model):
            matvec = hessian_matvec(model, loss_fn, batch)
        free = [p for p in model.parameters() if p.requires_grad]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in free) else torch.float32
        size = sum(p.numel() for p in free)
        values, vectors = _ritz(*_probe(matvec, size, self.n_iter, dtype, free[0].device, generator)[:2])
        seen = values[(values > 0) & (vectors[0].square() >= _VISIBLE)]
        return float(values[-1]), float(seen[0]) if len(seen) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what it has measured and its settings, without the model, loss, batch and generator.

        Returns
        -------
        dict
        """
        return {key: v for key, v in super().state_dict().items() if key not in ("_theirs", "_batch")}
