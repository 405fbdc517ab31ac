"""Realism, how close a sample is to the real data, and the rarity score over many batches.

With the balls of radius NN_k(r_i) around real samples r_i, those above the median left out,

    realism(x) = max_i  NN_k(r_i) / (|x - r_i| + 1e-6),                          (1)

more than 1 where x lies in one of them. Realism says how near the data a sample is, rarity how
empty the data are around it.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from posterity._checks import integer, one_of
from posterity._models import at_rest
from posterity.generative.rarity_score import (
    Distance,
    Features,
    Samples,
    _beside,
    _Cloud,
    _features,
    _more_than,
    _neighbours,
    _Products,
    _some_ball,
    rarity_score,
)

try:
    import torchmetrics
except ModuleNotFoundError:  # the functions need no torchmetrics; RarityScore says how to install it
    torchmetrics = None
Metric: Any = torchmetrics.Metric if torchmetrics else nn.Module

__all__ = ["RarityScore", "realism_score"]

FAR = 1e9  # times the extent of the real data
AWAY = 1e-6  # added to distances, so that a copy of a real sample has a realism


def realism_score(
    real: Features,
    samples: Samples,
    k: int = 3,
    *,
    metric: Distance = "euclidean",
    batch_size: int = 1024,
) -> Float[Tensor, " m"]:
    """Return how close each sample is to the real data, equation 1.

    Parameters
    ----------
    real : Tensor or array of shape (n, d)
        Features of real samples, floating, finite, n greater than ``k``.
    samples : Tensor or array of shape (m, d)
        Features of the samples to score, m at least 1.
    k : int, default=3
        Neighbour that a ball reaches to, at least 1.
    metric : {"euclidean", "cosine"}, default="euclidean"
        Cosine is 1 minus the cosine of the angle.
    batch_size : int, default=1024
        Rows compared at once, at least 1.

    Returns
    -------
    Tensor of shape (m,)
        Realism, at least 0, of the dtype and on the device of ``real``; without a gradient. That of
        a copy of a real sample is a million radii: in float16 infinite.

    Raises
    ------
    ValueError
        As `rarity_score`.

    Notes
    -----
    The file beside the official rarity code takes all balls; here, as in the paper, the huge ones
    of outliers are left out.

    References
    ----------
    .. [1] Kynkäänniemi et al. Improved Precision and Recall Metric for Assessing Generative
       Models. NeurIPS 2019. Equation 3.

    Examples
    --------
    Radii are 1, 1, 2 and 4, of which 2 and 4 are above the median:

    >>> import torch
    >>> from posterity.generative import realism_score
    >>> real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> realism_score(real, torch.tensor([[0.5], [2.0], [5.0]]), k=1)
    tensor([2.0000, 1.0000, 0.2500])
    """
    real = _features("real", real)
    samples = _features("samples", samples, real, metric)
    k, batch_size = integer("k", k, 1), integer("batch_size", batch_size, 1)
    _more_than("k", k, real)
    cloud = _Cloud(real, one_of("metric", metric, ("euclidean", "cosine")))
    squares = _neighbours(cloud, k, batch_size)[:, k - 1]
    _some_ball(squares)
    kept = (squares <= squares.quantile(0.5)).nonzero()[:, 0]
    ratios = [_largest_ratios(cloud, squares, kept, part, batch_size) for part in samples.split(batch_size)]
    return torch.cat(ratios).to(real)


class RarityScore(Metric):
    """Rarity score of samples that come in batches, against real ones that come in batches.

    All features are kept until ``compute``, which scores them as `rarity_score` scores them at once.

    Parameters
    ----------
    k : int, default=3
        Neighbour that a ball reaches to, at least 1.
    extractor : callable, optional
        Makes features (batch, d) of a batch of images; without it ``update`` takes features. A module
        is called in eval mode, without gradients, and left in the mode that it had; it is not made
        a part of the metric, so move it to a device yourself.
    metric : {"euclidean", "cosine"}, default="euclidean"
        Cosine is 1 minus the cosine of the angle.
    batch_size : int, default=1024
        Rows compared at once by ``compute``, at least 1.
    **kwargs : Any
        Passed to ``torchmetrics.Metric``.

    Raises
    ------
    ModuleNotFoundError
        If torchmetrics is not installed.
    ValueError
        As `rarity_score`; if ``compute`` is called before both kinds were given.

    References
    ----------
    .. [1] Han, Choi, Choi, Kim, Ha, Choi. Rarity Score: A New Metric to Evaluate the Uncommonness
       of Synthesized Images. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import RarityScore
    >>> metric = RarityScore(k=1)
    >>> metric.update(torch.tensor([[0.0], [1.0]]), real=True)
    >>> metric.update(torch.tensor([[3.0], [7.0]]), real=True)
    >>> metric.update(torch.tensor([[0.5], [12.0], [2.5], [1.5]]), real=False)
    >>> metric.compute()
    {'mean': tensor(1.3333), 'inside_rate': tensor(0.7500), 'scores': tensor([1., nan, 2., 1.])}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        k: int = 3,
        *,
        extractor: Callable[[Tensor], Tensor] | None = None,
        metric: Distance = "euclidean",
        batch_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        if torchmetrics is None:
            raise ModuleNotFoundError(
                'torchmetrics is needed for RarityScore: pip install "posterity[generative]"'
            )
        super().__init__(**kwargs)
        if extractor is not None and not callable(extractor):
            raise ValueError(f"extractor must be callable, got {type(extractor).__name__}")
        self.k = integer("k", k, 1)
        self.metric = one_of("metric", metric, ("euclidean", "cosine"))
        self.batch_size = integer("batch_size", batch_size, 1)
        self._extractor = (extractor,)  # in a tuple a module is not registered as a part
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("samples", [], dist_reduce_fx="cat")

    def update(self, features: Shaped[Tensor, "batch ..."], real: bool) -> None:
        """Take a batch of features, or of images for the extractor; ``real`` says of which kind."""
        if not isinstance(real, bool):
            raise ValueError(f"real must be True or False, got {real!r}")
        (extractor,) = self._extractor
        if extractor is not None:
            with torch.no_grad(), at_rest(extractor):
                features = extractor(features)
        name = "features" if extractor is None else "extractor(features)"
        features = _features(name, features, metric=self.metric)
        for seen in (self.real, self.samples):
            if len(seen) and seen[0].shape[-1] != features.shape[1]:
                raise ValueError(
                    f"{name} must have the {seen[0].shape[-1]} features of batches before, got {features.shape[1]}"
                )
        (self.real if real else self.samples).append(features)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean score of samples inside, their fraction, and the score of each sample."""
        pooled = []
        for kind, state in (("real", self.real), ("samples", self.samples)):  # tensors once they were reduced
            rows = torch.cat(list(state)) if isinstance(state, list) and state else state
            if not len(rows):
                raise ValueError(f"features of both kinds must be given before compute, got no {kind}")
            pooled.append(rows)
        real, samples = pooled
        found = rarity_score(real, samples, self.k, metric=self.metric, batch_size=self.batch_size)
        return {"mean": found.mean(), "inside_rate": found.rate(), "scores": found.score}


def _largest_ratios(cloud: _Cloud, squares: Tensor, kept: Tensor, samples: Tensor, batch_size: int) -> Tensor:
    """Return equation 1 for some samples over the balls that are kept.

    Bounds on each ratio leave a few that may be the largest, which differences decide.
    """
    exact = cloud.place(samples)
    away, near = AWAY / cloud.unit if cloud.metric == "euclidean" else AWAY, torch.finfo(cloud.dtype).eps
    far = (exact - cloud.centre).abs().amax(1) > FAR  # whose squares may overflow: by differences alone
    x, square, size = cloud.look(torch.where(far[:, None], cloud.centre, exact))
    x, products = _beside(x, 1.0), _Products()
    best = torch.zeros(len(exact), dtype=torch.float64, device=exact.device)
    for balls in kept.split(batch_size):
        apart = products(x, _beside(-2 * cloud.rows[balls], cloud.square[balls])).add_(square[:, None])
        error = cloud.error * (size[:, None] + cloud.size[balls])
        radius = cloud.distances(squares[balls])
        ends = (cloud.distances((apart + sign * error).clamp_min(0)) + away for sign in (1, -1))
        low, high = (radius.to(cloud.dtype) / end for end in ends)
        least = torch.maximum(low.amax(1) * (1 - 8 * near), best.to(cloud.dtype) * (1 - near))
        i, j = ((high * (1 + 8 * near) >= least[:, None]) | far[:, None]).nonzero(as_tuple=True)
        ratio = radius[j] / (cloud.distances(cloud.between(exact, i, balls[j])) + away)
        best.scatter_reduce_(0, i, ratio, "amax")
    return best
