"""Pixel-wise contrastive loss: pixels of one class are drawn together, over all images of a batch.

With cosines s_ij between the embeddings of pixels i and j, over a temperature tau, a pixel i has
the others of its class for positives P_i and those of other classes for negatives N_i, wherever
in the batch they are, and costs

    L_i = -1/|P_i| sum_{j in P_i} log( exp(s_ij) / (exp(s_ij) + sum_{k in N_i} exp(s_ik)) ).   (1)

Each positive stands against all negatives and not against the other positives, so that a class
may collapse to a point. In terms of the log-sum-exp n_i over negatives, a positive costs
softplus(n_i - s_ij): one product of matrices, and nothing that overflows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import widened
from posterity._random import draw_device

__all__ = ["PixelContrastiveLoss"]


class PixelContrastiveLoss(nn.Module):
    """Contrast pixels by class over a batch of label maps, equation 1.

    The mean over pixels that have a positive and a negative; 0, with a gradient of 0, where no
    pixel has. Embeddings are normalised here. Memory grows as the square of the pixels used.

    Parameters
    ----------
    temperature : float, default=0.1
        tau, positive: what cosines are divided by.
    max_pixels_per_class : int or None, default=64
        Pixels of a class that are used, at least 2, drawn uniformly from the whole batch where
        there are more; None is all of them.
    ignore_index : int, optional
        Label of pixels that are left out; any integer.

    Raises
    ------
    ValueError
        If an argument is out of range; if ``embeddings`` is not a floating-point tensor of at least
        2 channels, or has no pixel; or if ``labels`` are not integers from 0 up, one map an image.

    Notes
    -----
    1. Temperature and sampling are choices of this implementation.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Section 3, the pixel-wise contrastive loss.
    .. [2] Wang et al. Exploring Cross-Image Pixel Contrast for Semantic Segmentation. ICCV 2021.

    Examples
    --------
    Two classes at right angles, two pixels each: a pixel has one positive at cosine 1 and two
    negatives at 0, so costs log(1 + 2/e):

    >>> import torch
    >>> from posterity.generative import PixelContrastiveLoss
    >>> embeddings = torch.tensor([[[[1.0, 3.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 2.0]]]])
    >>> labels = torch.tensor([[[0, 0, 1, 1]]])
    >>> PixelContrastiveLoss(temperature=1.0)(embeddings, labels)
    tensor(0.5514)
    """

    def __init__(
        self, temperature: float = 0.1, *, max_pixels_per_class: int | None = 64,
        ignore_index: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        if max_pixels_per_class is not None:  # one has no positive
            integer("max_pixels_per_class", max_pixels_per_class, 2)
        self.max_pixels_per_class = max_pixels_per_class
        self.ignore_index = None if ignore_index is None else integer("ignore_index", ignore_index)

    def forward(
        self, embeddings: Float[Tensor, "n d h w"], labels: Int[Tensor, "n height width"], *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the loss.

        Parameters
        ----------
        embeddings : Tensor of shape (n, d, h, w)
            One vector a pixel, of d at least 2 channels.
        labels : Tensor of shape (n, H, W), integers
            Classes from 0 up, brought to (h, w) by nearest neighbours.
        generator : torch.Generator, optional
            Source of randomness for the choice of pixels; nothing is drawn where all are used.

        Returns
        -------
        Tensor
            A scalar in the dtype of ``embeddings``.
        """
        has_shape("embeddings", floating("embeddings", embeddings), (None, None, None, None))
        if embeddings.shape[1] < 2 or 0 in embeddings.shape:
            raise ValueError(
                f"embeddings must have pixels of at least 2 channels, got shape {tuple(embeddings.shape)}"
            )
        _label_maps(labels, len(embeddings), self.ignore_index)
        where = _nearest(labels, embeddings.shape[2:]).flatten().to(embeddings.device)
        chosen = self._chosen(where, generator)
        pixels = embeddings.permute(0, 2, 3, 1).flatten(0, 2)[chosen]
        return _contrast(pixels, where[chosen], self.temperature)

    def _chosen(self, labels: Int[Tensor, " p"], generator: torch.Generator | None) -> Int[Tensor, " q"]:
        """Return which pixels count: not ignored, and of a class no more than the limit."""
        kept = torch.arange(len(labels), device=labels.device)
        if self.ignore_index is not None:
            kept = kept[labels != self.ignore_index]
        limit = self.max_pixels_per_class
        if limit is None or not len(kept):
            return kept
        _, code, count = labels[kept].unique(return_inverse=True, return_counts=True)
        if int(count.max()) <= limit:
            return kept
        device = draw_device(generator, labels.device)
        shuffle = torch.randperm(len(kept), generator=generator, device=device).to(labels.device)
        order = shuffle[code[shuffle].argsort(stable=True)]  # classes one after the other, each at random
        start = (count.cumsum(0) - count).repeat_interleave(count)
        place = torch.arange(len(kept), device=labels.device) - start  # within the class
        return kept[order[place < limit]]


@widened
def _contrast(
    pixels: Float[Tensor, "p d"], labels: Int[Tensor, " p"], temperature: float
) -> Float[Tensor, ""]:
    """Return equation 1, averaged over the pixels that have both a positive and a negative."""
    scale = pixels.detach().abs().amax(1, keepdim=True)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
    # the largest entry is now 1: squares neither overflow nor vanish, and only zero meets eps
    unit = F.normalize(pixels / scale, dim=1, eps=0.5)
    order = labels.argsort(stable=True)
    count = labels.unique(return_counts=True)[1]
    if len(count) < 2 or int(count.max()) < 2:
        return 0 * unit.sum()
    return _Contrast.apply((unit / temperature**0.5)[order], count)


class _Contrast(torch.autograd.Function):
    """Value and gradient in one go: autograd would pass over the P x P products thrice as often."""

    @staticmethod
    def forward(ctx: Any, z: Float[Tensor, "p d"], count: Int[Tensor, " classes"]) -> Float[Tensor, ""]:
        """Take pixels class by class, with the number in each class."""
        p, code = len(z), torch.arange(len(count), device=z.device).repeat_interleave(count)
        n_positive = count[code] - 1
        n_valid = int((n_positive > 0).sum())
        # positives of pixel i: the others of its class, which stand around it
        rows = torch.arange(p, device=z.device).repeat_interleave(n_positive)
        first = (n_positive.cumsum(0) - n_positive)[rows]
        place = (count.cumsum(0) - count)[code][rows] + torch.arange(len(rows), device=z.device) - first
        pairs = rows * p + place + (place >= rows)
        logits = z @ z.T
        against = logits.masked_fill(code[:, None] == code, -torch.inf)
        top = against.amax(1, keepdim=True)
        against = against.sub_(top).exp_()  # softmax over negatives, before it is divided
        total = against.sum(1, keepdim=True)
        gap = (top + total.log())[rows, 0] - logits.view(-1)[pairs]  # n_i - s_ij
        share = (n_valid * n_positive.to(z.dtype)).clamp_min(1).reciprocal()[rows]
        pull = gap.sigmoid() * share  # what the loss falls by s_ij, and what negatives of i share
        push = torch.zeros_like(top[:, 0]).index_add_(0, rows, pull)
        slope = against.mul_(push[:, None] / total)
        slope.view(-1)[pairs] = -pull
        ctx.save_for_backward(slope @ z + slope.T @ z)
        return (F.softplus(gap, threshold=60.0) * share).sum()  # beyond 60 the 1 in log(1 + e^gap) is lost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def _label_maps(labels: Int[Tensor, "n height width"], n: int, ignore_index: int | None = None) -> None:
    """Refuse label maps that are not n maps of classes from 0 up; values are read on the CPU only."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must hold class indices, got dtype {labels.dtype}")
    has_shape("labels", labels, (n, None, None), "embeddings")
    if labels.numel() == 0:
        raise ValueError(f"labels must have pixels, got shape {tuple(labels.shape)}")
    if labels.device.type == "cpu":
        bad = labels < 0
        if ignore_index is not None:
            bad &= labels != ignore_index
        if bool(bad.any()):
            raise ValueError(
                f"labels must be at least 0, or ignore_index={ignore_index}, got {labels[bad][0]}"
            )


def _nearest(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (..., H, W) of any dtype at another size, by the floor of the scaled place."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    rows, columns = (
        torch.arange(new, device=maps.device) * old // new
        for new, old in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[..., rows[:, None], columns]
