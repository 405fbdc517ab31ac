"""The Fréchet distance of sets that come in batches: count, mean and covariance are kept, and no features.

Parts join exactly: with n = n_1 + n_2 and g the difference of their means, the products about the common mean
are those about their own plus n_1 n_2 / n times g g^T.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from posterity._checks import finite, floating, integer
from posterity._models import at_rest
from posterity.generative.frechet import FeatureStats, _samples, frechet_distance

try:
    import torchmetrics
except ModuleNotFoundError:  # no other part needs torchmetrics; FrechetDistance says how to install it
    torchmetrics = None
Metric: Any = torchmetrics.Metric if torchmetrics else nn.Module

__all__ = ["FrechetDistance"]


class FrechetDistance(Metric):
    """The Fréchet distance over many batches, in the manner of ``torchmetrics.image.fid``.

    It keeps count, mean and covariance of each set, in float64, and no features; parts that were computed
    apart, in other processes too, are joined exactly.

    Parameters
    ----------
    extractor : callable, optional
        ``extractor(images) -> (batch, d)``; a module is called in eval mode, without gradients. By default
        `update` takes features. A number is an FID only if this is the Inception of the original metric:
        torchvision's gives others.
    dim : int, optional
        How many features there are; the first batch says so by default.
    **kwargs : Any
        Passed to ``torchmetrics.Metric``.

    Raises
    ------
    ModuleNotFoundError
        If torchmetrics is not installed.
    ValueError
        If input does not fit, or fewer than 2 samples of a set were seen.

    References
    ----------
    .. [1] Kynkäänniemi et al. The Role of ImageNet Classes in Fréchet Inception Distance. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import FrechetDistance
    >>> metric = FrechetDistance()
    >>> metric.update(torch.tensor([[-1.0], [1.0]]), real=True)
    >>> for feature in (2.0, 4.0):
    ...     metric.update(torch.tensor([[feature]]), real=False)
    >>> metric.compute().round(decimals=6)
    tensor(9., dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(
        self, extractor: Callable[[Tensor], Tensor] | None = None, dim: int | None = None, **kwargs: Any
    ) -> None:
        if torchmetrics is None:
            raise ModuleNotFoundError(
                'torchmetrics is needed for FrechetDistance: pip install "posterity[generative]"'
            )
        super().__init__(**kwargs)
        if extractor is not None and not callable(extractor):
            raise ValueError(f"extractor must be callable or None, got {type(extractor).__name__}")
        self.extractor = extractor
        self.dim = None if dim is None else integer("dim", dim, 1)
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images_or_features: Shaped[Tensor, " n *shape"], real: bool) -> None:
        """Take a batch of the real or of the generated set: what the extractor takes, else features."""
        if not isinstance(real, bool):
            raise ValueError(f"real must be True or False, got {real!r}")
        features = images_or_features
        if not isinstance(features, Tensor):
            raise ValueError(f"images_or_features must be a tensor, got {type(features).__name__}")
        if self.extractor is None:
            name = "images_or_features"
            floating(name, features, "images need an extractor")
        else:
            name, features = "what extractor returns", _extracted(self.extractor, features)
        x = _samples(name, features, at_least_n=1, hint="images need an extractor")
        held = self.real if real else self.generated
        known = self.dim or next((part.shape[-1] for part in (*self.real, *self.generated)), x.shape[1])
        if x.shape[1] != known:
            raise ValueError(f"{name} must have {known} features, got {x.shape[1]}")
        mean = x.mean(0)
        scatter = (x - mean).mT @ (x - mean)
        finite(f"the squares of {name}", scatter)
        part = torch.cat([torch.full_like(mean, len(x))[None], mean[None], scatter])[None]
        both = _joined(torch.cat([*held, part]))[None]
        held.clear()
        held.append(both)

    def compute(self) -> Float[Tensor, ""]:
        """Return the distance of all that was seen."""
        stats = []
        for real, state in ((True, self.real), (False, self.generated)):
            parts = list(state)  # a tensor of parts once they were gathered from processes
            parts = [part if part.ndim == 3 else part[None] for part in parts]
            joined = _joined(torch.cat(parts)) if parts else None
            n = 0.0 if joined is None else float(joined[0, 0])
            if joined is None or n < 2:
                raise ValueError(f"real={real} must have had at least 2 samples before compute, got {n:g}")
            stats.append(FeatureStats(joined[1], joined[2:] / (n - 1), n))
        return frechet_distance(*stats)


def _joined(parts: Float[Tensor, "k rows d"]) -> Float[Tensor, "rows d"]:
    """Return the union of parts: a row of the count, the mean, and sums of products about it."""
    n, means = parts[:, 0, :1], parts[:, 1]
    mean = (n * means).sum(0) / n.sum()
    gap = means - mean
    return torch.cat([n.sum().expand_as(mean)[None], mean[None], parts[:, 2:].sum(0) + (n * gap).mT @ gap])


def _extracted(extractor: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with at_rest(extractor):
        return extractor(images)
