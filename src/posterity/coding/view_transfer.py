"""What views say of each other, found by attention of linear cost; and which latents are coded by which.

Cameras see one scene from places that nobody knows, so what a pixel of one view owes to another has no fixed place.
Attention finds it without geometry. With queries Q of the target, keys K and values V of the source,

    a = (softmax_positions(K) V^T)^T softmax_channels(Q),                                               (1)

the bracket is a small matrix that sums up the source, whatever its size: the cost is linear in both sizes.
`JointContextTransfer` refines each view's features by the mean of the others'. `CheckerboardContext` predicts one half
of a grid by the other, so that a decoder needs two passes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer
from posterity._precision import widened

__all__ = ["CheckerboardContext", "EfficientAttention", "JointContextTransfer"]

SLOPE = 0.01  # of the leaky ReLU


class EfficientAttention(nn.Module):
    """Attention between two images in linear cost, equation 1.

    Parameters
    ----------
    channels : int
        Of both images.
    key_channels, value_channels : int, optional
        Of keys and queries, and of values, multiples of ``n_heads``. By default an eighth and a quarter of ``channels``.
    n_heads : int, default=2
        Parts of the channels that attend apart, at least 1.

    Raises
    ------
    ValueError
        If channels are not multiples of ``n_heads``, or images do not fit them.

    References
    ----------
    .. [1] Shen et al. Efficient Attention: Attention with Linear Complexities. WACV 2021. Section 3.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import EfficientAttention
    >>> attention = EfficientAttention(16)
    >>> attention(torch.rand(1, 16, 4, 4), torch.rand(1, 16, 5, 7)).shape
    torch.Size([1, 16, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        n_heads: int = 2,
    ) -> None:
        super().__init__()
        integer("channels", channels, 1)
        self.n_heads = integer("n_heads", n_heads, 1)
        if (key_channels is None or value_channels is None) and channels % (8 * n_heads):
            raise ValueError(f"channels must be a multiple of 8 * n_heads = {8 * n_heads}, got {channels}: or give key_channels and value_channels")  # fmt: skip
        wide_keys = channels // 8 if key_channels is None else integer("key_channels", key_channels, 1)
        wide_values = (
            channels // 4 if value_channels is None else integer("value_channels", value_channels, 1)
        )
        for name, value in (("key_channels", wide_keys), ("value_channels", wide_values)):
            if value % n_heads:
                raise ValueError(f"{name} must be a multiple of n_heads = {n_heads}, got {value}")
        self.channels = channels
        self.keys = nn.Conv2d(channels, wide_keys, 1)
        self.queries = nn.Conv2d(channels, wide_keys, 1)
        self.values = nn.Conv2d(channels, wide_values, 1)
        self.reprojection = nn.Conv2d(wide_values, channels, 1)

    def forward(
        self, target: Float[Tensor, "n c h w"], source: Float[Tensor, "n c h2 w2"]
    ) -> Float[Tensor, "n c h w"]:
        """Return for each position of the target what the source has for it.

        Parameters
        ----------
        target : Tensor of shape (n, channels, h, w)
        source : Tensor of shape (n, channels, h2, w2)
            Of any size.

        Returns
        -------
        Tensor of shape (n, channels, h, w)
        """
        has_shape("target", floating("target", target), (None, self.channels, None, None), "channels")
        has_shape("source", floating("source", source), (len(target), self.channels, None, None), "target")
        for name, x in (("target", target), ("source", source)):
            if not x.shape[2] * x.shape[3]:
                raise ValueError(f"{name} must have positions, got shape {tuple(x.shape)}")
        found = _attend(self.queries(target), self.keys(source), self.values(source), self.n_heads)
        return self.reprojection(found)


@widened
def _attend(queries: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> Tensor:
    q, k, v = (x.flatten(2).unflatten(1, (n_heads, -1)) for x in (queries, keys, values))
    summary = torch.einsum("nhkp,nhvp->nhkv", k.softmax(-1), v)
    found = torch.einsum("nhkv,nhkp->nhvp", summary, q.softmax(2))
    return found.flatten(1, 2).unflatten(2, queries.shape[2:])


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 beside the identity, or beside one of 1 x 1 where widths differ."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if c == out else nn.Conv2d(c, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.leaky_relu(self.conv1(x), SLOPE))
        return F.leaky_relu(inner, SLOPE) + self.skip(x)


class JointContextTransfer(nn.Module):
    """Each view's features, refined by what the other views show.

    With ``f = rb2(rb1(x))`` a view becomes ``x + refine([attention(f, mean of the others' f), f])``; a view alone
    attends to nothing, and its first half is 0. All views share the weights, so their order is of no account.

    Parameters
    ----------
    channels : int
        A multiple of ``8 * n_heads``.
    n_heads : int, default=2
        Parts of the channels that attend apart, at least 1.

    Raises
    ------
    ValueError
        If ``channels`` is not such a multiple, or views do not fit it.

    References
    ----------
    .. [1] Zhang, Shao, Zhang. LDMIC: Learning-based Distributed Multi-view Image Coding. ICLR 2023. Section 3.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import JointContextTransfer
    >>> JointContextTransfer(16)(torch.rand(2, 3, 16, 4, 4)).shape  # three views
    torch.Size([2, 3, 16, 4, 4])
    """

    def __init__(self, channels: int, *, n_heads: int = 2) -> None:
        super().__init__()
        self.attn = EfficientAttention(channels, n_heads=n_heads)
        self.rb1, self.rb2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        self.refine = nn.Sequential(ResidualBlock(2 * channels, channels), ResidualBlock(channels, channels))

    def forward(self, views: Float[Tensor, "n v c h w"]) -> Float[Tensor, "n v c h w"]:
        """Return refined features.

        Parameters
        ----------
        views : Tensor of shape (n, v, channels, h, w)
            Features of at least one view.

        Returns
        -------
        Tensor of shape (n, v, channels, h, w)
        """
        has_shape("views", floating("views", views), (None, None, self.attn.channels, None, None), "channels")
        n, v, _, h, w = views.shape
        if not v * h * w:
            raise ValueError(f"views must have at least one view and position, got shape {tuple(views.shape)}")  # fmt: skip
        x = views.flatten(0, 1)
        own = self.rb2(self.rb1(x))
        if v > 1:
            others = _others(own.unflatten(0, (n, v))).flatten(0, 1).to(own.dtype)
            attended = self.attn(own, others)
        else:
            attended = torch.zeros_like(own)
        return (x + self.refine(torch.cat([attended, own], 1))).unflatten(0, (n, v))


def _others(features: Tensor) -> Tensor:
    """Return for each view the mean of the others, summed as it stands: a difference from the total would cancel."""
    v = features.shape[1]
    share = (1 - torch.eye(v, device=features.device)) / (v - 1)
    return _mixed(features, share)


@widened
def _mixed(features: Tensor, share: Tensor) -> Tensor:
    return torch.einsum("ij,njchw->nichw", share.to(features.dtype), features)


class CheckerboardContext(nn.Conv2d):
    """A convolution that sees from one colour of a checkerboard only the other, and nothing the other way.

    Anchors are the positions whose row and column, counted from 0, have an odd sum. There the result is 0; elsewhere
    it depends on anchors alone.

    Parameters
    ----------
    in_channels, out_channels : int
        Of what comes in and goes out, at least 1.
    kernel_size : int, default=5
        Odd.

    Raises
    ------
    ValueError
        If sizes are out of range, or latents do not fit them.

    References
    ----------
    .. [1] He et al. Checkerboard Context Model for Efficient Learned Image Compression. CVPR 2021.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import CheckerboardContext
    >>> seen = CheckerboardContext(1, 1)(torch.ones(1, 1, 2, 2))
    >>> (seen[0, 0] == 0).tolist()
    [[False, True], [True, False]]
    """

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5) -> None:
        size = integer("kernel_size", kernel_size, 1)
        if size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {size}")
        super().__init__(
            integer("in_channels", in_channels, 1), integer("out_channels", out_channels, 1), size, padding=size // 2
        )  # fmt: skip
        self.register_buffer("mask", anchors(size, size), persistent=False)  # the centre's sum is even

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """Return what anchors say of the other positions.

        Parameters
        ----------
        input : Tensor of shape (n, in_channels, h, w)

        Returns
        -------
        Tensor of shape (n, out_channels, h, w)
        """
        has_shape("input", floating("input", input), (None, self.in_channels, None, None), "in_channels")
        if not input.shape[2] * input.shape[3]:
            raise ValueError(f"input must have positions, got shape {tuple(input.shape)}")
        seen = self._conv_forward(input, self.weight * self.mask, self.bias)
        return seen.masked_fill(anchors(*input.shape[2:]).to(input.device), 0.0)


class CausalContext(nn.Conv2d):
    """A convolution that sees what stands before, row by row: rows above, and in its own row what is to the left."""

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        before = torch.arange(kernel_size**2) < kernel_size**2 // 2
        self.register_buffer("mask", before.reshape(kernel_size, kernel_size), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.mask, self.bias)


def anchors(h: int, w: int) -> Tensor:
    """Return where row and column have an odd sum."""
    return (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 1
