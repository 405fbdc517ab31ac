"""A network of a field's points: a few latents read the context, every query reads the latents.

A pair of a coordinate and a noisy value at time t is embedded as one vector,

    Linear(coordinate, sin and cos of 2^j pi/2 coordinate, value, features of t).      (1)

A fixed number of latents attends to the embedded context once and then to itself; each
embedded query attends to the latents, and its noise is read off it. So the order of the
context does not matter, queries do not see each other, and a call costs
O((k + q) latents + blocks latents^2): linear in the points, on any space that has coordinates.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer, within
from posterity._precision import wide

__all__ = ["FieldNet"]

TIME_FREQUENCIES = 4


class ReadingBlock(nn.Module):
    """Attention of some points to others, or to themselves, and a network of each: pre-norm, residual."""

    def __init__(self, dim: int, n_heads: int, dropout: float, *, to_others: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(dim)
        self.norm_others = nn.LayerNorm(dim) if to_others else None
        self.ask = nn.Linear(dim, dim, bias=False)
        self.offer = nn.Linear(dim, 2 * dim, bias=False)  # a bias of keys would cancel in the softmax
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )  # fmt: skip

    def forward(
        self, x: Float[Tensor, "#n points dim"], others: Float[Tensor, "n others dim"] | None = None
    ) -> Float[Tensor, "n points dim"]:
        """Return ``x`` after it has read ``others``, or itself; one ``x`` serves all n."""
        asking = self.norm(x)
        read = asking if others is None or self.norm_others is None else self.norm_others(others)
        keys, values = self.offer(read).chunk(2, -1)
        query = self.ask(asking).expand(len(read), -1, -1)
        if read.shape[1]:
            found = F.scaled_dot_product_attention(self._heads(query), self._heads(keys), self._heads(values))
            found = found.transpose(1, 2).flatten(2)
        else:
            found = torch.zeros_like(query)  # there is nothing to read
        x = x + self.drop(self.out(found))
        return x + self.drop(self.mlp(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class FieldNet(nn.Module):
    """Predict the noise of a field at any points from its noisy values at some.

    Its convention is that of ``FieldDiffusion``: ``net(x, t, coords=, context=, context_coords=)``.

    Parameters
    ----------
    coord_dim : int
        Numbers in a coordinate, at least 1: 2 in the plane, 3 for unit vectors of the sphere.
    value_dim : int
        Numbers in a value, at least 1: 3 for colours.
    dim : int, default=128
        Width, a multiple of ``n_heads``.
    n_latents : int, default=128
        Vectors that hold the field between reading and answering, at least 1.
    n_blocks : int, default=6
        Blocks in which the latents read each other, at least 0.
    n_heads : int, default=4
        Heads of every attention, at least 1.
    n_frequencies : int, default=6
        Sine and cosine of pi/2, pi, 2 pi, ... times each number of a coordinate, at least 0. The
        last one's half period, 2 / 2^(n_frequencies - 1), is the finest detail that it tells apart
        with ease.
    dropout : float, default=0.0
        In [0, 1), after attention and inside and after the network of each block.

    Raises
    ------
    ValueError
        If a size is out of range, ``n_heads`` does not divide ``dim``, or what it is called
        with does not fit.

    Notes
    -----
    1. The paper names no widths for one core; these are ours. Its networks are larger.
    2. The last layer starts at zero, so that an untrained network predicts no noise.
    3. Coordinates that one batch shares, ``(1, q, d)`` or such a tensor expanded, are embedded once.

    References
    ----------
    .. [1] Zhuang et al. Diffusion Probabilistic Fields. ICLR 2023. Section 4.
    .. [2] Jaegle et al. Perceiver IO: A General Architecture for Structured Inputs & Outputs. ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import FieldNet
    >>> net = FieldNet(3, 1, dim=32, n_latents=8, n_blocks=1)
    >>> x, t, coords = torch.randn(2, 500, 1), torch.rand(2), torch.randn(2, 500, 3)
    >>> noise = net(x, t, coords=coords, context=x[:, :50], context_coords=coords[:, :50])
    >>> noise.shape, bool(noise.any())
    (torch.Size([2, 500, 1]), False)
    """

    def __init__(
        self, coord_dim: int, value_dim: int, *, dim: int = 128, n_latents: int = 128, n_blocks: int = 6,
        n_heads: int = 4, n_frequencies: int = 6, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.coord_dim = integer("coord_dim", coord_dim, 1)
        self.value_dim = integer("value_dim", value_dim, 1)
        self.n_frequencies = integer("n_frequencies", n_frequencies, 0)
        integer("dim", dim, 1)
        integer("n_latents", n_latents, 1)
        integer("n_blocks", n_blocks, 0)
        if dim % integer("n_heads", n_heads, 1):
            raise ValueError(f"dim must be a multiple of n_heads, {n_heads}, got {dim}")
        within("dropout", dropout, 0, 1, open_high=True)
        self._sizes = (coord_dim * (1 + 2 * n_frequencies), value_dim, 1 + 2 * TIME_FREQUENCIES)
        self.pair = nn.Linear(sum(self._sizes), dim)
        self.latents = nn.Parameter(torch.randn(n_latents, dim))
        self.reader = ReadingBlock(dim, n_heads, dropout, to_others=True)
        self.blocks = nn.ModuleList(
            ReadingBlock(dim, n_heads, dropout, to_others=False) for _ in range(n_blocks)
        )
        self.answer = ReadingBlock(dim, n_heads, dropout, to_others=True)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, value_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x: Float[Tensor, "n q value_dim"], t: Float[Tensor, " n"], *, coords: Float[Tensor, "#n q coord_dim"],
        context: Float[Tensor, "n k value_dim"], context_coords: Float[Tensor, "#n k coord_dim"],
    ) -> Float[Tensor, "n q value_dim"]:  # fmt: skip
        """Return the noise in the values of the queries.

        Parameters
        ----------
        x : Tensor of shape (n, q, value_dim)
            Noisy values at the queries.
        t : Tensor of shape (n,)
            Times, 0 at noise and 1 at data.
        coords : Tensor of shape (n or 1, q, coord_dim)
            Where the queries are.
        context : Tensor of shape (n, k, value_dim)
            Noisy values that say what field it is; with none, every query is on its own.
        context_coords : Tensor of shape (n or 1, k, coord_dim)
            Where those are.

        Returns
        -------
        Tensor of shape (n, q, value_dim)
            Estimated noise.
        """
        latents = self.encode(context, t, context_coords=context_coords)
        return self.decode(latents, x, t, coords=coords)

    def encode(
        self, context: Float[Tensor, "n k value_dim"], t: Float[Tensor, " n"], *,
        context_coords: Float[Tensor, "#n k coord_dim"],
    ) -> Float[Tensor, "n latents dim"]:  # fmt: skip
        """Return the latents that have read the context: the half of a call that queries share.

        Parameters
        ----------
        context, t, context_coords : Tensor
            As ``forward`` takes them.

        Returns
        -------
        Tensor of shape (n, n_latents, dim)
            What ``decode`` reads.
        """
        pairs = self._embed("context", context, t, "context_coords", context_coords)
        latents = self.reader(self.latents[None], pairs)
        for block in self.blocks:
            latents = block(latents)
        return latents

    def decode(
        self, latents: Float[Tensor, "n latents dim"], x: Float[Tensor, "n q value_dim"], t: Float[Tensor, " n"], *,
        coords: Float[Tensor, "#n q coord_dim"],
    ) -> Float[Tensor, "n q value_dim"]:  # fmt: skip
        """Return the noise in the values of the queries, given what ``encode`` returned.

        Parameters
        ----------
        latents : Tensor of shape (n, n_latents, dim)
            From ``encode``.
        x, t, coords : Tensor
            As ``forward`` takes them.

        Returns
        -------
        Tensor of shape (n, q, value_dim)
            Estimated noise.
        """
        pairs = self._embed("x", x, t, "coords", coords)
        has_shape("latents", floating("latents", latents), (len(x), *self.latents.shape), "x and the network")
        return self.out(self.norm(self.answer(pairs, latents)))

    def _embed(self, name: str, values: Tensor, t: Tensor, where: str, coords: Tensor) -> Tensor:
        """Return equation 1, its linear layer taken apart: what one batch shares is computed once."""
        own = f"coord_dim={self.coord_dim} and value_dim={self.value_dim}"
        has_shape(name, floating(name, values), (None, None, self.value_dim), own)
        n, m, _ = values.shape
        rows = 1 if isinstance(coords, Tensor) and len(coords) == 1 else n
        has_shape(
            where,
            floating(where, coords),
            (rows, m, self.coord_dim),
            f"{name} {tuple(values.shape)} and {own}",
        )
        has_shape("t", floating("t", t), (n,), name)
        if rows > 1 and coords.stride(0) == 0:
            coords = coords[:1]
        at, to, when = self.pair.weight.split(self._sizes, 1)
        places = F.linear(_waves(coords, self.n_frequencies).to(values.dtype), at, self.pair.bias)
        times = F.linear(_waves(t[:, None], TIME_FREQUENCIES).to(values.dtype), when)
        return F.linear(values, to) + (places + times[:, None])


def _waves(x: Tensor, n_frequencies: int) -> Tensor:
    """Return x, and sine and cosine of 2^j pi/2 x: in float32 at least, for high octaves magnify rounding."""
    x = wide(x)
    octaves = 2.0 ** torch.arange(n_frequencies, dtype=x.dtype, device=x.device) * (math.pi / 2)
    angles = (x[..., None] * octaves).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], -1)
