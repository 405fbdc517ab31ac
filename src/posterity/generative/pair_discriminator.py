"""A discriminator of pairs in two modalities: layout and image, layout and edge map, in one network.

Each modality has a first layer of its own; all others are shared, so that what makes an edge map
credible for a layout also judges the image. It looks at patches, at full size and at halves of it.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer
from posterity._precision import wide
from posterity.generative.layout_guidance import _one_hot

__all__ = ["MultiModalDiscriminator"]

SLOPE = 0.2


class MultiModalDiscriminator(nn.Module):
    """Judge whether images and edge maps are real and go with their layout.

    Every layer is divided by its largest singular value.

    Parameters
    ----------
    n_classes : int
        Channels of the layout, at least 2.
    image_channels : int, default=3
        Channels of the image, at least 1.
    width : int, default=64
        Channels of the first layer, at least 1, doubled by each of the next two.
    n_scales : int, default=2
        Sizes at which it looks, at least 1, each half of the one before, by networks of their own.

    Raises
    ------
    ValueError
        If an argument is out of range, or an input does not fit.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Section 3, the multi-modality discriminator.
    .. [2] Miyato et al. Spectral Normalization for Generative Adversarial Networks. ICLR 2018.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import MultiModalDiscriminator
    >>> judge = MultiModalDiscriminator(2, width=4)
    >>> layout = torch.eye(2).view(1, 2, 1, 2).expand(3, 2, 8, 2)
    >>> scales = judge(layout, torch.zeros(3, 3, 8, 2), torch.zeros(3, 1, 8, 2))
    >>> len(scales), [len(values) for values in scales[0]]  # both pairs of 3 layouts
    (2, [6, 6, 6, 6])
    """

    def __init__(
        self, n_classes: int, *, image_channels: int = 3, width: int = 64, n_scales: int = 2
    ) -> None:
        super().__init__()
        self.n_classes = integer("n_classes", n_classes, 2)
        self.image_channels = integer("image_channels", image_channels, 1)
        integer("width", width, 1)
        self.scales = nn.ModuleList(
            PatchNet(n_classes, image_channels, width) for _ in range(integer("n_scales", n_scales, 1))
        )

    def forward(
        self, layout: Shaped[Tensor, "n classes h w"], image: Float[Tensor, "n channels h w"] | None,
        edge: Float[Tensor, "n 1 h w"] | None,
    ) -> list[list[Tensor]]:  # fmt: skip
        """Return, for each scale, the features of each layer and last the scores of patches.

        Parameters
        ----------
        layout : Tensor of shape (n, n_classes, h, w)
            One-hot, of any dtype.
        image : Tensor of shape (n, image_channels, h, w), or None
            Images in [-1, 1].
        edge : Tensor of shape (n, 1, h, w), or None
            Edge maps in [0, 1]. Not both may be None.

        Returns
        -------
        list of list of Tensor
            The pairs with images come first, then those with edges: 2n rows, or n where one is None.
        """
        where = _one_hot(layout, self.n_classes)
        if image is None and edge is None:
            raise ValueError("image and edge must not both be None: there is nothing to judge")
        size = (len(where), None, *where.shape[2:])
        for name, maps, channels in (("image", image, self.image_channels), ("edge", edge, 1)):
            if maps is not None:
                has_shape(name, floating(name, maps), (size[0], channels, *size[2:]), "layout")
        weight = next(self.parameters())
        where, image, edge = (None if maps is None else maps.to(weight) for maps in (where, image, edge))
        judged = []
        for k, net in enumerate(self.scales):
            if k:
                where, image, edge = (
                    None if maps is None else _halved(maps) for maps in (where, image, edge)
                )
            judged.append(net(where, image, edge))
        return judged


class PatchNet(nn.Module):
    """The network of one scale."""

    def __init__(self, n_classes: int, image_channels: int, width: int) -> None:
        super().__init__()
        self.image = SpectralConv(n_classes + image_channels, width, stride=2)
        self.edge = SpectralConv(n_classes + 1, width, stride=2)
        self.layers = nn.ModuleList(
            [SpectralConv(width, 2 * width, stride=2), SpectralConv(2 * width, 4 * width, stride=1)]
        )
        self.score = SpectralConv(4 * width, 1, stride=1)

    def forward(self, where: Tensor, image: Any, edge: Any) -> list[Tensor]:
        pairs = [(self.image, image), (self.edge, edge)]
        x = torch.cat([stem(torch.cat([where, maps], 1)) for stem, maps in pairs if maps is not None])
        found = [F.leaky_relu(x, SLOPE)]
        for layer in self.layers:
            found.append(F.leaky_relu(layer(found[-1]), SLOPE))
        return [*found, self.score(found[-1])]


class SpectralConv(nn.Conv2d):
    """A convolution of 4 x 4 whose weight, as a matrix, has a largest singular value of 1.

    One step of the power method a call in training follows the weights. Unlike torch's
    parametrization it can be pickled and works in every dtype.
    """

    left: Tensor

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, 4, stride, padding=2)
        self.register_buffer("left", torch.randn(width))
        for _ in range(15):
            self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        matrix = wide(self.weight).flatten(1)
        right = F.normalize(matrix.T @ wide(self.left), dim=0)
        self.left.copy_(F.normalize(matrix @ right, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                self._follow()
            # a copy, for the next call changes it before this one's backward
            left = F.normalize(wide(self.left.clone()), dim=0)
            size = (wide(self.weight).flatten(1).T @ left).norm()
            weight = (wide(self.weight) / size.clamp_min(torch.finfo(size.dtype).tiny)).to(self.weight.dtype)
        return self._conv_forward(x, weight, self.bias)


def _halved(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps, 3, 2, padding=1, count_include_pad=False)
