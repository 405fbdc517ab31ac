"""The trade-off of diverse pre-training, measured, solved where all is linear, and repaid by a regulariser.

Pre-training on more diverse data brings more features, of which each task's own get less weight or, where the
dimension is scarce, no place: the average task gains, the single one needs more labels. For ``phi(x) = W x`` and the
spectral contrastive loss ``-2 E[phi(x1).phi(x2)] + E[(phi(x).phi(x'))^2]``, with second moments C of all views and
D of pairs of them, the best representation of a dimension is

    W = diag(sqrt lambda) U' C^(-1/2) ,   lambda, U  the largest eigenpairs of  C^(-1/2) D C^(-1/2) :           (1)

lambda is the invariance of a feature in the mix, its variance over that of itself and of what views change; a
feature that is active in a share of the data only has a smaller one and falls under the cut. In fine-tuning the
remedy keeps the contrastive loss of pre-training, on the task's own data:

    L = cross-entropy(classifier(f(x1)), y) + theta L_con(f(x1), f(x2)) .                                        (2)
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._branches import projection_head
from posterity._checks import at_least, class_indices, finite, floating, has_shape, integer, one_of
from posterity._models import evaluating
from posterity._precision import NARROW, unit_rows, widened
from posterity._random import seeded
from posterity.representation._pairs import joint_views

__all__ = [
    "ContrastiveRegularizer",
    "FineTuned",
    "LinearRepresentation",
    "fine_tune",
    "linear_contrastive_representation",
]

MODES = ("linear", "fine-tune", "contrastive")


class ContrastiveRegularizer(nn.Module):
    """A task's loss plus a contrastive loss of two views of the same samples, equation (2).

    Parameters
    ----------
    weight : float, default=0.1
        theta, at least 0.
    temperature : float, default=0.5
        Of NT-Xent, positive; not used with ``contrastive``.
    contrastive : callable, optional
        ``contrastive(z1, z2) -> scalar``, as the encoder was pre-trained; by default NT-Xent.
    criterion : callable, optional
        ``criterion(logits, target) -> scalar``; by default cross-entropy.

    Raises
    ------
    ValueError
        If a parameter is out of range, or logits, targets and views do not fit.

    Notes
    -----
    Where ``torch.distributed`` is initialised, NT-Xent is that of the batch of all processes.

    References
    ----------
    .. [1] Shi, Chen, Li, Raghuram, Wu, Liang, Jha. The Trade-off between Universality and Label Efficiency of
       Representations from Contrastive Learning. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import ContrastiveRegularizer
    >>> loss = ContrastiveRegularizer(weight=0.1)
    >>> logits, z1, z2 = torch.randn(8, 3, requires_grad=True), torch.randn(8, 16), torch.randn(8, 16)
    >>> loss(logits, torch.arange(8) % 3, z1, z2).backward()
    """

    def __init__(
        self, weight: float = 0.1, *, temperature: float = 0.5,
        contrastive: Callable[[Tensor, Tensor], Tensor] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = at_least("weight", weight, 0)
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.contrastive, self.criterion = contrastive, criterion

    def forward(
        self,
        logits: Float[Tensor, " n *classes"],
        target: Tensor,
        z1: Float[Tensor, "n dim"],
        z2: Float[Tensor, "n dim"],
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch.

        Parameters
        ----------
        logits : Tensor of shape (n, classes)
            Of the first view; any shape that the criterion takes.
        target : Tensor of shape (n,)
            Classes, or what the criterion takes.
        z1, z2 : Tensor of shape (n, dim)
            Both views after the projector.

        Returns
        -------
        Tensor of shape ()
        """
        floating("logits", logits)
        for name, z in (("z1", z1), ("z2", z2)):
            if not isinstance(z, Tensor) or z.ndim < 1 or logits.ndim < 1 or len(z) != len(logits):
                rows = len(logits) if logits.ndim else 0
                got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"{name} must have as many rows as logits, {rows}, got {got}")
        if self.criterion is None:
            has_shape("logits", logits, (None, None))
            class_indices("target", target, len(logits), logits.shape[1])
        value = _cross_entropy(logits, target) if self.criterion is None else self.criterion(logits, target)
        _scalar("criterion", value)
        if self.weight == 0:
            return value
        if self.contrastive is not None:
            return value + self.weight * _scalar("contrastive", self.contrastive(z1, z2))
        return value + self.weight * _nt_xent(*joint_views(z1, z2), self.temperature).to(value.dtype)


class LinearRepresentation(NamedTuple):
    """The best linear representation of a dimension, unique up to a rotation.

    Attributes
    ----------
    weight : Tensor of shape (dim, p)
        W: ``x @ weight.T`` are the features.
    invariance : Tensor of shape (dim,)
        lambda, descending, in [0, 1].
    loss : Tensor of shape ()
        The spectral contrastive loss, minus the sum of squares of lambda.
    """

    weight: Tensor
    invariance: Tensor
    loss: Tensor


def linear_contrastive_representation(
    x1: Float[Tensor, "n p"], x2: Float[Tensor, "n p"], dim: int, *, ridge: float = 0.0
) -> LinearRepresentation:
    """Solve spectral contrastive learning of a linear representation, equation (1).

    Parameters
    ----------
    x1, x2 : Tensor of shape (n, p)
        Two views of each sample, centred by the caller.
    dim : int
        Features, at most p.
    ridge : float, default=0.0
        Added to C, times its mean diagonal.

    Returns
    -------
    LinearRepresentation
        In the dtype of the views, computed in float64.

    Raises
    ------
    ValueError
        If the views do not fit, are not finite, or have a singular C without a ridge.

    Warns
    -----
    UserWarning
        If a column has a mean of more than a tenth of its deviation.

    References
    ----------
    .. [1] Shi, Chen, Li, Raghuram, Wu, Liang, Jha. The Trade-off between Universality and Label Efficiency of
       Representations from Contrastive Learning. ICLR 2023. Section 3.
    .. [2] HaoChen, Wei, Gaidon, Ma. Provable Guarantees for Self-Supervised Deep Learning with Spectral
       Contrastive Loss. NeurIPS 2021.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import linear_contrastive_representation
    >>> x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    >>> x = x - x.mean(0)
    >>> linear_contrastive_representation(x, x, dim=2).invariance.round(decimals=4).tolist()
    [1.0, 1.0]
    """
    has_shape("x1", finite("x1", floating("x1", x1)), (None, None))
    has_shape("x2", finite("x2", floating("x2", x2)), tuple(x1.shape), "x1")
    n, p = x1.shape
    if n < 2:
        raise ValueError(f"x1 must have at least 2 rows, got {n}")
    if integer("dim", dim, 1) > p:
        raise ValueError(f"dim must be at most the {p} columns, got {dim}")
    at_least("ridge", ridge, 0)
    a, b = (x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64) for x in (x1, x2))
    pooled = torch.cat([a, b])
    if bool((pooled.mean(0).abs() > 0.1 * pooled.std(0)).any()):
        warnings.warn(
            "x1 and x2 should be centred: a column has a mean of a tenth of its deviation", stacklevel=2
        )
    second = pooled.T @ pooled / (2 * n)
    second = second + ridge * second.diagonal().mean() * torch.eye(p, dtype=a.dtype, device=a.device)
    cross = a.T @ b / n
    factor, info = torch.linalg.cholesky_ex(second)
    left = factor.diagonal().square() / second.diagonal()  # what the columns before leave of each
    if int(info) or not bool((left > p * torch.finfo(a.dtype).eps).all()):
        raise ValueError("x1 and x2 have a singular matrix of second moments: set ridge, as 1e-3")
    # with C = L L' the eigenpairs are those of L^-1 D L^-T, and W the same
    half = torch.linalg.solve_triangular(factor, (cross + cross.T) / 2, upper=False)
    found, directions = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    invariance = found.flip(0)[:dim].clamp_min(0)
    top = torch.linalg.solve_triangular(factor.T, directions.flip(1)[:, :dim], upper=True)
    weight = invariance.sqrt()[:, None] * top.T
    return LinearRepresentation(*(v.to(x1.dtype) for v in (weight, invariance, -invariance.square().sum())))


@dataclass(frozen=True)
class FineTuned:
    """A network that was fine-tuned.

    Attributes
    ----------
    encoder, classifier : nn.Module
        In eval mode.
    losses : ndarray of shape (steps,)
        The loss of each step.
    """

    encoder: nn.Module
    classifier: nn.Linear
    losses: ndarray

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return classes.

        Parameters
        ----------
        x : Tensor of shape (n, ...)

        Returns
        -------
        Tensor of shape (n,)
        """
        with evaluating(self.encoder) as encoder:
            return self.classifier(encoder(x).flatten(1)).argmax(1)


@torch.inference_mode(False)
@torch.enable_grad()
def fine_tune(
    encoder: nn.Module, x: Tensor, y: Tensor, *, augment: Callable[[Tensor, torch.Generator], Tensor], n_classes: int,
    projector: nn.Module | None = None, mode: Literal["linear", "fine-tune", "contrastive"] = "contrastive",
    weight: float = 0.1, temperature: float = 0.5, epochs: int = 200, batch_size: int = 256, lr: float = 0.06,
    weight_decay: float = 5e-4, random_state: int = 0,
) -> FineTuned:  # fmt: skip
    """Fine-tune an encoder on a task's labelled data.

    SGD with a momentum of 0.9; the rate of encoder and projector falls to 0 as a cosine, that of the classifier
    stays.

    Parameters
    ----------
    encoder : nn.Module
        Of samples to features (n, dim); not changed, a copy is trained.
    x : Tensor of shape (n, ...)
        Samples of the task.
    y : Tensor of shape (n,)
        Classes.
    augment : callable
        ``augment(x, generator) -> x``: a view of a batch.
    n_classes : int
        At least 2.
    projector : nn.Module, optional
        Of features to what the contrastive loss compares; a copy is trained and thrown away. By default two
        layers as wide as the features, with batch normalisation.
    mode : {"contrastive", "fine-tune", "linear"}, default="contrastive"
        Equation (2); without its second term; or the classifier alone, the encoder frozen in eval mode.
    weight, temperature
        As for `ContrastiveRegularizer`.
    epochs, batch_size : int, default=200, 256
        A last batch of fewer than two samples is left out.
    lr, weight_decay : float, default=0.06, 5e-4
        Of SGD.
    random_state : int, default=0
        Decides the classifier's start, batches and views; nothing global is touched.

    Returns
    -------
    FineTuned
        Copies of encoder and classifier, in the dtype of ``x``, and the losses. Half precision learns in float32.

    Raises
    ------
    ValueError
        If an argument does not fit, or the loss stops being finite.

    References
    ----------
    .. [1] Shi, Chen, Li, Raghuram, Wu, Liang, Jha. The Trade-off between Universality and Label Efficiency of
       Representations from Contrastive Learning. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import fine_tune
    >>> x, y = torch.randn(20, 4), torch.arange(20) % 2
    >>> def noise(x, generator):
    ...     return x + 0.1 * torch.randn(x.shape, generator=generator)
    >>> found = fine_tune(torch.nn.Linear(4, 8), x, y, augment=noise, n_classes=2, epochs=2)
    >>> found.predict(x).shape
    torch.Size([20])
    """
    one_of("mode", mode, MODES)
    integer("n_classes", n_classes, 2)
    integer("epochs", epochs, 1)
    integer("batch_size", batch_size, 2)
    at_least("lr", lr, 0, strict=True)
    at_least("weight_decay", weight_decay, 0)
    regularizer = ContrastiveRegularizer(weight, temperature=temperature)
    if not isinstance(x, Tensor) or x.ndim < 2 or len(x) < 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of at least two samples, got {got}")
    class_indices("y", y, len(x), n_classes)
    x, y = (part.clone() if part.is_inference() else part for part in (x, y.long()))
    net, draws = copy.deepcopy(encoder), torch.Generator().manual_seed(integer("random_state", random_state))
    given = x.dtype
    if given in NARROW:  # in which small steps would be lost
        net, x = net.float(), x.float()
    with evaluating(net), torch.no_grad():
        found = net(x[:2]).flatten(1)
    dim, like = found.shape[1], next((p for p in net.parameters() if p.is_floating_point()), found)
    with seeded(random_state, x.device):
        classifier = nn.Linear(dim, n_classes).to(like)
        head = projection_head((dim, dim, dim)) if projector is None else copy.deepcopy(projector)
        head = head.to(like)
        losses = _descend(net, head, classifier, x, y, augment, mode, regularizer, epochs, batch_size, lr,
                          weight_decay, draws)  # fmt: skip
    if given in NARROW:
        net, classifier = net.to(given), classifier.to(given)
    return FineTuned(net.eval(), classifier.eval(), losses)


def _descend(
    net: nn.Module, head: nn.Module, classifier: nn.Linear, x: Tensor, y: Tensor, augment: Callable[..., Tensor],
    mode: str, regularizer: ContrastiveRegularizer, epochs: int, batch_size: int, lr: float, weight_decay: float,
    draws: torch.Generator,
) -> ndarray:  # fmt: skip
    """Train in place and return the losses."""
    slow = [] if mode == "linear" else [p for p in net.parameters() if p.requires_grad]
    slow += list(head.parameters()) if mode == "contrastive" else []
    groups: list[dict[str, Any]] = [{"params": list(classifier.parameters())}]
    groups += [{"params": slow}] if slow else []
    opt = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)
    batches = [len(rows) for rows in torch.arange(len(x)).split(batch_size)]
    total = epochs * sum(size > 1 for size in batches)
    net.train(mode != "linear")
    losses: list[float] = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draws).split(batch_size):
            if len(rows) < 2:
                continue
            for group in opt.param_groups[1:]:
                group["lr"] = lr * (1 + math.cos(math.pi * len(losses) / total)) / 2
            batch, target = x[rows.to(x.device)], y[rows.to(y.device)]
            with torch.set_grad_enabled(mode != "linear"):
                first = net(augment(batch, draws)).flatten(1)
            if mode == "contrastive":
                second = net(augment(batch, draws)).flatten(1)
                value = regularizer(classifier(first), target, head(first), head(second))
            else:
                value = F.cross_entropy(classifier(first), target)
            if not bool(value.isfinite()):
                raise ValueError(
                    f"the loss is {float(value.detach())} after {len(losses)} steps: lower lr, got {lr}"
                )
            opt.zero_grad()
            value.backward()
            opt.step()
            losses.append(float(value.detach()))
    return np.asarray(losses)


# Both losses.


def _scalar(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {came}")
    return value


@widened
def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target.long())


@widened
def _nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of SimCLR: cross-entropy of each view's other one among all others."""
    n = len(z1)
    z = unit_rows(torch.cat([z1, z2]))
    cosine = z @ (z.T / temperature)
    cosine.diagonal().fill_(-torch.inf)
    other = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(cosine, other)
