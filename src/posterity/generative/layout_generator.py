"""A generator of images from label maps that draws the edges first and lets them guide the image.

One encoder reads the layout; an edge branch and an image branch follow it layer by layer, and at
every layer, and on their outputs, the features of the image are multiplied by one plus the
sigmoid of those of the edges. The coarse image that comes of it is refined under gates of each
class, and a last network reads the label map back from the refined image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import integer
from posterity._random import draw_device
from posterity.generative.layout_guidance import EdgeTransfer, SemanticPreserving, _one_hot

__all__ = ["ECGANGenerator", "ECGANOutput"]


class ECGANOutput(NamedTuple):
    """What a generator makes of n layouts of h x w pixels.

    Attributes
    ----------
    image : Tensor of shape (n, channels, h, w)
        The refined image, in [-1, 1].
    coarse : Tensor of shape (n, channels, h, w)
        The image before it is refined, in [-1, 1].
    edge : Tensor of shape (n, 1, h, w)
        The edge map, in [0, 1].
    features : Tensor of shape (n, width, h, w)
        One vector a pixel, for the contrastive loss: the last features after their projection.
    label_logits : Tensor of shape (n, n_classes, h, w)
        Scores of the classes, read back from ``image``.
    """

    image: Float[Tensor, "n channels h w"]
    coarse: Float[Tensor, "n channels h w"]
    edge: Float[Tensor, "n 1 h w"]
    features: Float[Tensor, "n width h w"]
    label_logits: Float[Tensor, "n classes h w"]


class ECGANGenerator(nn.Module):
    """Make images from layouts, guided by their edges and by classes.

    Parameters
    ----------
    n_classes : int
        Channels of the layout, at least 2.
    width : int, default=64
        Channels of the features, at least 2.
    n_layers : int, default=3
        Layers of the edge and of the image branch, at least 1.
    image_channels : int, default=3
        Channels of the image, at least 1.
    noise_channels : int, default=0
        Standard normal numbers an image that are given to the encoder with the layout, so that
        one layout has many images; 0 is one image a layout.

    Raises
    ------
    ValueError
        If an argument is out of range, or a layout does not fit.

    Notes
    -----
    1. The authors' networks are not published; encoder and sizes are choices of this
       implementation, whose norms are of a group and so the same in training and at rest.
    2. The image is guided before its tanh, by the scores whose sigmoid is the edge map: so it
       stays in [-1, 1], where the paper's product leaves it.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Section 3 and Figure 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import ECGANGenerator
    >>> out = ECGANGenerator(2, width=4)(torch.eye(2).view(1, 2, 1, 2).expand(3, 2, 5, 2))
    >>> out.image.shape, out.edge.shape, out.label_logits.shape
    (torch.Size([3, 3, 5, 2]), torch.Size([3, 1, 5, 2]), torch.Size([3, 2, 5, 2]))
    """

    def __init__(
        self, n_classes: int, *, width: int = 64, n_layers: int = 3, image_channels: int = 3,
        noise_channels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_classes = integer("n_classes", n_classes, 2)
        self.noise_channels = integer("noise_channels", noise_channels, 0)
        integer("width", width, 2)
        integer("image_channels", image_channels, 1)
        depth = range(integer("n_layers", n_layers, 1))
        self.encoder = LayoutEncoder(n_classes + noise_channels, width)
        self.edge_layers = nn.ModuleList(_layer(width, width) for _ in depth)
        self.image_layers = nn.ModuleList(_layer(width, width) for _ in depth)
        self.to_edge = nn.Conv2d(width, 1, 3, padding=1)
        self.to_coarse = nn.Conv2d(width, image_channels, 3, padding=1)
        self.transfer = EdgeTransfer()
        known = n_classes + width + image_channels + 1
        self.semantic = SemanticPreserving(n_classes, known)
        self.refine = nn.Sequential(_layer(known, width), nn.ReLU(), _layer(width, width), nn.ReLU())
        self.to_image = nn.Conv2d(width, image_channels, 3, padding=1)
        self.project = nn.Conv2d(width, width, 1)
        self.read_labels = nn.Sequential(
            _layer(image_channels, width), nn.ReLU(), _layer(width, width), nn.ReLU(), nn.Conv2d(width, n_classes, 1)
        )  # fmt: skip

    def forward(
        self, layout: Shaped[Tensor, "n classes h w"], *, generator: torch.Generator | None = None
    ) -> ECGANOutput:
        """Return images, edges, and what the losses need.

        Parameters
        ----------
        layout : Tensor of shape (n, n_classes, h, w)
            One-hot, of any dtype and size.
        generator : torch.Generator, optional
            Source of randomness for the noise, if there are channels for it.

        Returns
        -------
        ECGANOutput
        """
        weight = self.to_edge.weight
        where = _one_hot(layout, self.n_classes).to(weight)
        seen = where
        if self.noise_channels:
            device = draw_device(generator, weight.device)
            drawn = torch.promote_types(weight.dtype, torch.float32)
            noise = torch.randn(
                len(where), self.noise_channels, 1, 1, dtype=drawn, device=device, generator=generator
            )
            seen = torch.cat([where, noise.to(weight).expand(-1, -1, *where.shape[2:])], 1)
        features = self.encoder(seen)
        edge, image = features, features
        for edge_layer, image_layer in zip(self.edge_layers, self.image_layers, strict=True):
            guide = edge_layer(edge)  # before its ReLU: gates of 0 to 1, not of a half to 1
            edge, image = F.relu(guide), self.transfer(F.relu(image_layer(image)), guide)
        edge_scores = self.to_edge(edge)
        coarse = self.transfer(self.to_coarse(image), edge_scores).tanh()
        edge = edge_scores.sigmoid()
        known = torch.cat([part.to(features.dtype) for part in (where, features, coarse, edge)], 1)
        last = self.refine(self.semantic(known, where))
        refined = self.to_image(last).tanh()
        return ECGANOutput(refined, coarse, edge, self.project(last), self.read_labels(refined))


class LayoutEncoder(nn.Module):
    """Read a layout at full size, half and quarter; ``width`` channels a pixel of the full size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.at_full = _layer(channels, width)
        self.at_half = _layer(width, 2 * width, stride=2)
        self.at_quarter = _layer(2 * width, 2 * width, stride=2)
        self.deep = _layer(2 * width, 2 * width)
        self.to_half = _layer(4 * width, width)
        self.to_full = _layer(2 * width, width)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n width h w"]:
        full = F.relu(self.at_full(x))
        half = F.relu(self.at_half(full))
        low = F.relu(self.at_quarter(half))
        low = low + F.relu(self.deep(low))
        half = F.relu(self.to_half(torch.cat([_enlarged(low, half.shape[2:]), half], 1)))
        return F.relu(self.to_full(torch.cat([_enlarged(half, full.shape[2:]), full], 1)))


def _layer(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and a norm over all of an image, which any batch and any size has."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(1, width))


def _enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="nearest")
