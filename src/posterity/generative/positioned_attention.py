"""Pixels that look at the tokens of a markup, both knowing where they are.

What a formula looks like depends on the order of its tokens and on the place of the pixel. So rows and columns of the
features have learned embeddings, and so have the places of the tokens; then pixels attend to one another, and to the
whole sequence of tokens, not to its mean: the mean of 12 is that of 21.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer

__all__ = ["PositionedCrossAttention"]

WIDER = 4  # units of the feed-forward layer a channel


class PositionedCrossAttention(nn.Module):
    """A block of attention, from image features to each other and to tokens, with learned positions of both.

    Group norm and a projection; the embeddings of row and column, half of the channels each, are added; a transformer
    block of self-attention, cross-attention and a gated feed-forward layer; a projection back, added to what came.
    The last projection begins at zero: put into a trained network, the block changes nothing until it is trained.

    Parameters
    ----------
    channels : int
        Of the image features; even, divisible by ``n_heads`` and by ``groups``.
    token_dim : int
        Features of a token, at least 1.
    n_heads : int, default=8
        Heads of attention, at least 1.
    max_height, max_width : int, default=64
        Largest features it has embeddings for, at least 1.
    max_tokens : int, default=1024
        Longest sequence it has embeddings for, at least 1.
    groups : int, default=32
        Groups of the first norm, at least 1.

    Raises
    ------
    ValueError
        If an argument is out of range, or what comes does not fit the tables of embeddings.

    References
    ----------
    .. [1] Deng, Kojima, Rush. Markup-to-Image Diffusion Models with Scheduled Sampling. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import PositionedCrossAttention
    >>> attend = PositionedCrossAttention(8, 5, n_heads=2, groups=4)
    >>> h, tokens = torch.randn(3, 8, 4, 6), torch.randn(3, 7, 5)
    >>> torch.equal(attend(h, tokens), h)  # it is not trained
    True
    """

    def __init__(
        self, channels: int, token_dim: int, *, n_heads: int = 8, max_height: int = 64, max_width: int = 64,
        max_tokens: int = 1024, groups: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = integer("channels", channels, 1)
        self.token_dim = integer("token_dim", token_dim, 1)
        for name, parts in (("n_heads", n_heads), ("groups", groups)):
            if channels % integer(name, parts, 1):
                raise ValueError(f"channels must be divisible by {name} = {parts}, got {channels}")
        if channels % 2:
            raise ValueError(f"channels must be even, half for rows and half for columns, got {channels}")
        sizes = {"max_height": max_height, "max_width": max_width, "max_tokens": max_tokens}
        for name, size in sizes.items():
            integer(name, size, 1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.row = nn.Parameter(torch.randn(max_height, channels // 2))
        self.column = nn.Parameter(torch.randn(max_width, channels // 2))
        self.place = nn.Parameter(torch.randn(max_tokens, token_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.to_pixels = _Attention(channels, channels, n_heads)
        self.to_tokens = _Attention(channels, token_dim, n_heads)
        self.widen = nn.Linear(channels, 2 * WIDER * channels)
        self.narrow = nn.Linear(WIDER * channels, channels)
        self.leave = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        h: Float[Tensor, "n channels height width"],
        tokens: Float[Tensor, "n length token_dim"],
        mask: Bool[Tensor, "n length"] | None = None,
    ) -> Float[Tensor, "n channels height width"]:
        """Return features that have looked at the tokens.

        Parameters
        ----------
        h : Tensor
            Image features, shape (n, channels, height, width), height and width within the tables.
        tokens : Tensor
            Features of the tokens, shape (n, length, token_dim), at least one token and at most ``max_tokens``.
        mask : Tensor, optional
            Which tokens count, shape (n, length) of bool: those of padding are False. Default: all. Where none counts,
            pixels attend to each other only.

        Returns
        -------
        Tensor
            Like ``h``.
        """
        self._check(h, tokens, mask)
        weight = self.enter.weight
        n, _, height, width = h.shape
        x = self.enter(self.norm(h.to(weight.dtype))).flatten(2).mT  # (n, pixels, channels)
        grid = torch.cat([
            self.row[:height, None].expand(-1, width, -1), self.column[None, :width].expand(height, -1, -1)
        ], 2)  # fmt: skip
        x = x + grid.flatten(0, 1)
        words = tokens.to(weight.dtype) + self.place[: tokens.shape[1]]
        if mask is not None:  # not by the weights of attention alone: what is not a number times zero is none
            words = words.masked_fill(~mask[..., None], 0)
        x = x + self.to_pixels(y := self.norms[0](x), y)
        x = x + self.to_tokens(self.norms[1](x), words, mask)
        up, gate = self.widen(self.norms[2](x)).chunk(2, 2)
        x = x + self.narrow(up * F.gelu(gate))
        out = self.leave(x.mT.unflatten(2, (height, width)).to(weight.dtype))
        return (h + out).to(h.dtype)

    def _check(self, h: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        has_shape("h", floating("h", h), (None, self.channels, None, None), "the channels")
        has_shape("tokens", floating("tokens", tokens), (len(h), None, self.token_dim), "h and token_dim")
        for name, size, table in (
            ("h", tuple(h.shape[2:]), (len(self.row), len(self.column))),
            ("tokens", (tokens.shape[1],), (len(self.place),)),
        ):
            if not all(1 <= have <= most for have, most in zip(size, table, strict=True)):
                raise ValueError(
                    f"{name} must be of 1 to {' x '.join(map(str, table))} "
                    f"{'rows and columns' if name == 'h' else 'tokens'}, those of the embeddings, "
                    f"got {' x '.join(map(str, size))}"
                )
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise ValueError(f"mask must be a tensor of bool, got {getattr(mask, 'dtype', type(mask))}")
            has_shape("mask", mask, tokens.shape[:2], "tokens")


class _Attention(nn.Module):
    """Attention of several heads from one sequence to another."""

    def __init__(self, channels: int, other: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(other, channels, bias=False)
        self.value = nn.Linear(other, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part(of).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for part, of in ((self.query, x), (self.key, other), (self.value, other))
        )
        seen = None
        if mask is not None:
            some = mask.any(1)[:, None]
            seen = (mask | ~some)[:, None, None]  # a row of none would have no softmax
        y = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return y if mask is None else y * some[..., None]
