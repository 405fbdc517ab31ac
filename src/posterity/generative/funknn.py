"""FunkNN: an image as a function, a learned interpolation that sees one patch and nothing else.

The value at a coordinate x is that of classical interpolation, corrected by a network that is
given the p x p patch of interpolated values around x:

    f(x) = net(patch(x)) + patch(x)[centre].                                  (1)

No other input: what is learned is how images look locally, not where. A shift of the image shifts
f, and what was learned from some images serves others and all sizes. The patch is a smooth
function of x, so f has exact gradients and Laplacians wherever the network has.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity._checks import at_least, integer, one_of
from posterity._precision import NARROW, wide
from posterity.generative.image_interpolation import KERNELS, check_image, image_patches

__all__ = ["FunkNN"]

DENSE = {"mlp": (512, 512, 256, 256, 128, 128, 64, 64, 64), "cnn": (64, 64, 64)}
CONVS, CONV_WIDTH = 8, 64


class FunkNN(nn.Module):
    """An image as a function of coordinates, at any resolution.

    Untrained it is cubic interpolation: its last layer starts at zero. Train it on what
    ``funknn_pairs`` makes of images, with an L1 loss.

    Parameters
    ----------
    channels : int, default=3
        Of the images, at least 1.
    patch_size : int, default=9
        Side of the patch, odd, at least 1; at least 5 for "cnn".
    network : {"mlp", "cnn"}, default="mlp"
        Dense layers on the patch, or eight convolutions of 2 x 2 before them.
    hidden : sequence of int, optional
        Widths of the dense layers before the last, each at least 1. 512, 512, 256, 256, 128,
        128, 64, 64, 64 for "mlp" and 64, 64, 64 for "cnn" by default [1]_.
    activation : {"relu", "sin"}, default="relu"
        "sin" for use with derivatives, which it makes smooth: each dense layer is multiplied by
        a learned number before the sine [2]_. Computed in float32 at least.
    omega0 : float, default=30.0
        Where those numbers start, greater than 0.
    kernel : {"cubic", "cubic6", "bilinear"}, default="cubic"
        See ``image_patches``.

    Attributes
    ----------
    patch_scale : Parameter of shape (2,)
        Learned factor (x, y) on the spacing of the patch; starts at 1.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    1. The last layer starts at zero. With torch's default a short training ends below
       interpolation.
    2. Coordinates are those of ``grid_sample``; see ``image_patches`` for what of the official
       sampling is not copied.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 2 and Appendix.
    .. [2] Sitzmann et al. Implicit neural representations with periodic activation functions.
       NeurIPS 2020. Section 3.2.

    Examples
    --------
    A ramp of j over eight columns, at column 4 and a half on row 4:

    >>> import torch
    >>> from posterity.generative import FunkNN
    >>> net = FunkNN(1, hidden=[16])
    >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    >>> net(ramp, torch.tensor([[[0.25, 0.125]]])).item()
    4.5
    """

    def __init__(
        self, channels: int = 3, *, patch_size: int = 9, network: Literal["mlp", "cnn"] = "mlp",
        hidden: Sequence[int] | None = None, activation: Literal["relu", "sin"] = "relu",
        omega0: float = 30.0, kernel: Literal["cubic", "cubic6", "bilinear"] = "cubic",
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = integer("channels", channels, 1)
        self.patch_size = integer("patch_size", patch_size, 1)
        self.network = one_of("network", network, tuple(DENSE))
        least = 5 if network == "cnn" else 1
        if patch_size % 2 == 0 or patch_size < least:
            raise ValueError(
                f"patch_size must be odd, at least {least} for network={network!r}, got {patch_size}"
            )
        widths = DENSE[network] if hidden is None else hidden
        if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths:
            raise ValueError(f"hidden must be a sequence of widths, got {hidden!r}")
        self.activation = one_of("activation", activation, ("relu", "sin"))
        at_least("omega0", omega0, 0, strict=True)
        self.kernel = one_of("kernel", kernel, tuple(KERNELS))
        self.convs = nn.ModuleList()
        features = channels * patch_size**2
        if network == "cnn":
            for k in range(CONVS):
                self.convs.append(nn.Conv2d(CONV_WIDTH if k else channels, CONV_WIDTH, 2))
            features = CONV_WIDTH * (patch_size // 4) ** 2
        sizes = [features, *(integer("hidden", width, 1) for width in widths), channels]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.omega = nn.Parameter(torch.full((len(widths),), float(omega0))) if activation == "sin" else None
        self.patch_scale = nn.Parameter(torch.ones(2))
        if activation == "sin":
            for k, layer in enumerate(self.layers):
                reach = math.sqrt(6 / sizes[k]) / omega0 if k else 1 / sizes[0]
                nn.init.uniform_(layer.weight, -reach, reach)  # type: ignore[arg-type]
                nn.init.uniform_(layer.bias, -reach, reach)  # type: ignore[arg-type]
        for value in self.layers[-1].parameters():
            nn.init.zeros_(value)

    def forward(
        self, image: Float[Tensor, "n c h w"], coords: Float[Tensor, "#n m 2"]
    ) -> Float[Tensor, "n m c"]:
        """Return the values of images at coordinates.

        Parameters
        ----------
        image : Tensor of shape (n, channels, h, w)
            Of any size, two pixels a side or more.
        coords : Tensor of shape (n, m, 2) or (1, m, 2)
            (x, y); [-1, 1] is the image, which is mirrored beyond.

        Returns
        -------
        Tensor of shape (n, m, channels)
            Values, in the dtype of the image.

        Raises
        ------
        ValueError
            If shapes do not fit or a coordinate is NaN or beyond [-3, 3].
        """
        check_image(image, coords, self.channels)
        # Half precision would round the patch before it is known what of it cancels.
        patches = image_patches(
            wide(image), wide(coords), self.patch_size, scale=wide(self.patch_scale), kernel=self.kernel  # type: ignore[arg-type]
        )  # fmt: skip
        middle = self.patch_size // 2
        centre = patches[..., middle, middle]
        x = patches.flatten(0, 1)
        if self.omega is None:
            learned = self._dense(self._convolved(x.to(self.patch_scale.dtype)))
        else:
            with torch.autocast(x.device.type, enabled=False):
                learned = self._dense(
                    self._convolved(x.to(torch.promote_types(self.patch_scale.dtype, torch.float32)))
                )
        return (learned.view(centre.shape).to(centre.dtype) + centre).to(image.dtype)

    def _convolved(self, x: Tensor) -> Tensor:
        for k, conv in enumerate(self.convs):
            before, x = x, _through(conv, F.pad(x, (0, 1, 0, 1)))
            x = x.relu() if self.omega is None else x.sin()
            if k % 4 == 3:
                x = F.max_pool2d(x, 2)
            elif k:
                x = x + before
        return x.flatten(1)

    def _dense(self, x: Tensor) -> Tensor:
        *layers, last = self.layers
        for k, layer in enumerate(layers):
            x = _through(layer, x)
            x = x.relu() if self.omega is None else (self.omega[k].to(x.dtype) * x).sin()
        return _through(last, x)


def _through(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer makes of x, in the dtype of x where the layer's is narrower."""
    params = dict(layer.named_parameters())
    if any(p.dtype in NARROW for p in params.values()) and x.dtype not in NARROW:
        return functional_call(layer, {name: p.to(x.dtype) for name, p in params.items()}, (x,))
    return layer(x)
