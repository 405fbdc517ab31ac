"""CIDER: embeddings on the sphere, compact within classes and far apart between them.

Each class has a prototype mu_c on the unit sphere, a moving average of its embeddings. Two
terms shape the embeddings z (unit vectors),

    L = (1/C) sum_i log( 1/(C-1) sum_{j != i} exp(mu_i . mu_j / T) )                     (1)
        + w mean_n -log softmax_j(z_n . mu_j / T)[y_n] :                                 (2)

dispersion (1) drives the prototypes apart, compactness (2) draws samples to theirs. The
gradient of (1) reaches the network through the prototypes, which this batch has just
moved: prototypes cut off from the batch would leave dispersion without any effect. Inputs of
no known class then lie between the classes, and far from all training features.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, finite, floating, has_shape, integer, one_of, within
from posterity._precision import wide, widened
from posterity._processes import all_rows, n_processes
from posterity.uncertainty.knn_score import _directions

__all__ = [
    "CIDERLoss",
    "compactness_loss",
    "dispersion_loss",
    "hypersphere_geometry",
    "update_prototypes",
]

OFF_ONE = 0.01  # by how much the length of a unit row that was rounded, in whatever dtype, may miss 1


class CIDERLoss(nn.Module):
    """Dispersion of class prototypes plus compactness around them.

    Parameters
    ----------
    n_classes : int
        Classes, at least 2.
    dim : int
        Width of embeddings.
    temperature : float, default=0.1
        T, positive.
    momentum : float, default=0.95
        How much of a prototype one sample leaves, in [0, 1); only for ``"ema"``.
    compactness_weight : float, default=2.0
        w. A weight of the official code is this one times 0.7 at T = 0.1.
    prototypes : {"ema", "learned"}, default="ema"
        Moving averages of embeddings, or parameters.

    Attributes
    ----------
    prototypes : Tensor of shape (n_classes, dim)
        Unit rows: a buffer, or for ``"learned"`` a parameter that is normalised where it is
        used. They start at random; see `initialize`. The buffer is float32 at least, whatever
        the module is cast to: narrower averages would stand still.

    Raises
    ------
    ValueError
        If a parameter is out of range, or embeddings or targets do not fit.

    Notes
    -----
    There is no ``reduction``: dispersion belongs to the batch and not to its samples. In
    eval mode prototypes are not moved. Values inside tensors are checked on the CPU alone.

    Where ``torch.distributed`` is initialised, each training step starts from the moving averages
    of process 0 and moves them by the batches of all processes, so all must call it; with
    gradients averaged, as ``DistributedDataParallel`` does, a step is that of the joint batch.

    References
    ----------
    .. [1] Ming, Sun, Dia, Li. How to Exploit Hyperspherical Embeddings for
       Out-of-Distribution Detection? ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import CIDERLoss
    >>> loss = CIDERLoss(n_classes=3, dim=8)
    >>> h = torch.randn(32, 8, requires_grad=True)
    >>> loss(torch.nn.functional.normalize(h), torch.arange(32) % 3).backward()
    """

    prototypes: Tensor

    def __init__(
        self, n_classes: int, dim: int, *, temperature: float = 0.1, momentum: float = 0.95,
        compactness_weight: float = 2.0, prototypes: Literal["ema", "learned"] = "ema",
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_classes, self.dim = integer("n_classes", n_classes, 2), integer("dim", dim, 1)
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.momentum = within("momentum", momentum, 0, 1, open_high=True)
        self.compactness_weight = at_least("compactness_weight", compactness_weight, 0)
        self.kind = one_of("prototypes", prototypes, ("ema", "learned"))
        start = F.normalize(torch.randn(n_classes, dim), dim=1)
        if self.kind == "ema":
            self.register_buffer("prototypes", start)
        else:
            self.prototypes = nn.Parameter(start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CIDERLoss":
        super()._apply(fn, recurse)
        if self.kind == "ema":
            self.prototypes = wide(self.prototypes)
        return self

    @torch.no_grad()
    def initialize(
        self, embeddings: Tensor | Iterable[tuple[Tensor, Tensor]], target: Tensor | None = None
    ) -> None:
        """Set each prototype to the direction of its class's mean.

        Parameters
        ----------
        embeddings : Tensor or iterable
            Embeddings ``(n, dim)``, or batches ``(embeddings, target)`` of them.
        target : Tensor, optional
            Classes of the embeddings, if these are one tensor.
        """
        batches = [(embeddings, target)] if isinstance(embeddings, Tensor) else embeddings
        total = torch.zeros_like(wide(self.prototypes))
        count = total.new_zeros(self.n_classes)
        for z, y in batches:
            if y is None:
                raise ValueError("target must be given with a tensor of embeddings")
            y = self._check(z, y)
            total.index_add_(0, y, z.detach().to(total))
            count.index_add_(0, y, count.new_ones(len(y)))
        if bool((count == 0).any()):
            raise ValueError(
                f"embeddings must hold each class, got none of class {int((count == 0).nonzero()[0])}"
            )
        self.prototypes.copy_(F.normalize(total / count[:, None], dim=1))

    @widened
    def forward(self, embeddings: Float[Tensor, "n dim"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the loss, and in training mode move the prototypes.

        Parameters
        ----------
        embeddings : Tensor
            Unit rows.
        target : Tensor
            Classes.

        Returns
        -------
        Tensor
            A scalar.
        """
        target = self._check(embeddings, target)
        if self.kind == "learned":
            moved = fixed = F.normalize(self.prototypes.to(embeddings), dim=1)
        else:
            if self.training:
                if n_processes() > 1:
                    distributed.broadcast(self.prototypes, 0)
                rows, classes = all_rows(embeddings, target)
                moved = update_prototypes(self.prototypes.to(embeddings), rows, classes, self.momentum)
                self.prototypes.copy_(moved.detach())
            else:
                moved = self.prototypes.to(embeddings)
            fixed = moved.detach()
        apart = dispersion_loss(moved, self.temperature)
        return apart + self.compactness_weight * compactness_loss(embeddings, fixed, target, self.temperature)

    def _check(self, embeddings: Tensor, target: Tensor) -> Tensor:
        has_shape("embeddings", floating("embeddings", embeddings), (None, self.dim))
        target = class_indices("target", target, len(embeddings), self.n_classes).long()
        if embeddings.device.type == "cpu":
            length = finite("embeddings", wide(embeddings.detach())).norm(dim=1)
            if len(length) and float((length - 1).abs().max()) > OFF_ONE:
                raise ValueError(
                    f"embeddings must be unit rows, got lengths {float(length.min()):.3g} to {float(length.max()):.3g}: "
                    "normalise them first"
                )
        return target


@widened
def update_prototypes(
    prototypes: Float[Tensor, "classes dim"], embeddings: Float[Tensor, "n dim"], target: Int[Tensor, " n"],
    momentum: float,
) -> Float[Tensor, "classes dim"]:  # fmt: skip
    """Return prototypes moved by the samples of a batch, one after the other.

    For each sample in order, ``mu <- normalize(momentum * mu + (1 - momentum) * z)`` for the
    prototype of its class. Only the order within a class matters, so the k-th samples of all
    classes are taken at once.

    Parameters
    ----------
    prototypes : Tensor
        Unit rows.
    embeddings : Tensor
        Unit rows.
    target : Tensor
        Classes.
    momentum : float
        In [0, 1).

    Returns
    -------
    Tensor
        New prototypes, differentiable in both.
    """
    within("momentum", momentum, 0, 1, open_high=True)
    has_shape("embeddings", embeddings, (None, prototypes.shape[1]))
    target = class_indices("target", target, len(embeddings), len(prototypes)).long()
    if len(target) == 0:
        return prototypes
    order = target.argsort(stable=True)
    sorted_target = target[order]
    count = torch.bincount(target, minlength=len(prototypes))
    rank = torch.arange(len(target), device=target.device) - (count.cumsum(0) - count)[sorted_target]
    by_rank = rank.argsort(stable=True)
    order, sizes = order[by_rank], torch.bincount(rank).tolist()
    # classes with a k-th sample, in the order of class 0's, 1's, ...: most numerous first, so that
    # each step works on the first rows and nothing is scattered until the end
    present = count.argsort(descending=True, stable=True)
    place = torch.empty_like(present)
    place[present] = torch.arange(len(present), device=target.device)
    within_step = place[target[order]]
    moving, done = prototypes[present][: sizes[0]], []
    start = 0
    for size in sizes:
        step = order[start : start + size]
        step = step[within_step[start : start + size].argsort()]
        if size < len(moving):
            done.append(moving[size:])
            moving = moving[:size]
        moving = F.normalize(momentum * moving + (1 - momentum) * embeddings[step], dim=1)
        start += size
    rows = torch.cat([moving, *done[::-1], prototypes[present][sizes[0] :]])
    return rows[place]


@widened
def dispersion_loss(prototypes: Float[Tensor, "classes dim"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """Return (1): the mean over classes of log mean exp of the cosines to the others over T.

    Parameters
    ----------
    prototypes : Tensor
        Unit rows, at least two.
    temperature : float, default=0.1
        Positive.

    Returns
    -------
    Tensor
        A scalar, at least ``-1 / ((classes - 1) T)``, which the regular simplex reaches.
    """
    at_least("temperature", temperature, 0, strict=True)
    n = len(has_shape("prototypes", floating("prototypes", prototypes), (None, None)))
    if n < 2:
        raise ValueError(f"prototypes must be at least two, got {n}")
    cosine = prototypes @ prototypes.T / temperature
    own = torch.eye(n, dtype=torch.bool, device=cosine.device)
    others = cosine[~own].view(n, n - 1)
    return (others.logsumexp(1) - torch.log(cosine.new_tensor(n - 1.0))).mean()


@widened
def compactness_loss(
    embeddings: Float[Tensor, "n dim"], prototypes: Float[Tensor, "classes dim"], target: Int[Tensor, " n"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return (2): the cross-entropy of cosines to the prototypes over T.

    Parameters
    ----------
    embeddings : Tensor
        Unit rows.
    prototypes : Tensor
        Unit rows.
    target : Tensor
        Classes.
    temperature : float, default=0.1
        Positive.

    Returns
    -------
    Tensor
        A scalar.
    """
    at_least("temperature", temperature, 0, strict=True)
    has_shape("embeddings", floating("embeddings", embeddings), (None, prototypes.shape[1]))
    target = class_indices("target", target, len(embeddings), len(prototypes)).long()
    return F.cross_entropy(embeddings @ prototypes.T / temperature, target)


def hypersphere_geometry(
    embeddings: Float[Tensor, "n dim"], target: Int[Tensor, " n"], prototypes: Float[Tensor, "classes dim"],
    ood: Float[Tensor, "m dim"] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return what the loss shapes, as mean angles in degrees.

    Parameters
    ----------
    embeddings : Tensor
        Embeddings of known classes.
    target : Tensor
        Their classes.
    prototypes : Tensor
        One a class.
    ood : Tensor, optional
        Embeddings of inputs of no known class.

    Returns
    -------
    dict of str to float
        ``dispersion`` between different prototypes, higher is better; ``compactness`` from
        samples to their prototype, the mean of class means, lower is better; with ``ood``
        ``separability``, by how much further from the nearest prototype those inputs are.
    """
    has_shape("prototypes", prototypes, (None, embeddings.shape[1]), "embeddings")
    target = class_indices("target", target, len(embeddings), len(prototypes)).long()
    z = _directions("embeddings", embeddings).double()
    mu = _directions("prototypes", prototypes).double()

    def degrees(cosine: Tensor) -> Tensor:
        return torch.rad2deg(cosine.clamp(-1, 1).arccos())

    own = torch.eye(len(mu), dtype=torch.bool, device=mu.device)
    to_all = z @ mu.T
    angle = degrees(to_all.gather(1, target[:, None])[:, 0])
    sums = angle.new_zeros(len(mu)).index_add(0, target, angle)
    count = torch.bincount(target, minlength=len(mu))
    result = {
        "dispersion": float(degrees((mu @ mu.T)[~own]).mean()),
        "compactness": float((sums / count.clamp_min(1))[count > 0].mean()),
    }
    if ood is not None:
        outside = degrees((_directions("ood", ood).double() @ mu.T).amax(1)).mean()
        result["separability"] = float(outside - degrees(to_all.amax(1)).mean())
    return result
