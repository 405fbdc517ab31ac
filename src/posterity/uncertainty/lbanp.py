"""LBANP: an attentive neural process whose queries look at a few latents, not at the data.

A transformer over context and queries pays for every pair. Here L learned latents z are
filled from the context, layer after layer, and kept; queries x then read layer l's latents,

    z_l = selfattend(crossattend(z_{l-1}, context)),    l = 1, ..., n_layers,      (1)
    q_l = crossattend(q_{l-1}, z_l),                    q_0 = embed(x),            (2)

so that encoding costs O(N L) and each query O(L), whatever the number N of context points.
The last q gives mean and scale of the prediction. Context points do not attend to each
other and queries do not attend to context or queries: what is known of the context is what
the latents hold.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F

from posterity._checks import integer, one_of, within
from posterity._precision import wide
from posterity.uncertainty._neural_process import NeuralProcess, Tasks, mlp

__all__ = ["LBANP"]


class LBANP(NeuralProcess):
    """Latent bottlenecked attentive neural process.

    Parameters
    ----------
    dim_x, dim_y : int
        Sizes of inputs and outputs of the functions.
    n_latents : int, default=8
        Size of the bottleneck.
    d_model : int, default=64
        Width of every embedding.
    n_layers, n_heads : int
        Layers of encoder and decoder, and heads of each attention.
    d_ff : int, default=128
        Hidden width of the feed-forward blocks and of the output heads.
    embed_depth : int, default=4
        Linear layers of each embedding.
    dropout : float, default=0.0
        After each block, in training.
    norm_first : bool, default=True
        ``x + f(norm(x))`` in the place of ``norm(x + f(x))``.
    bound_scale : bool, default=False
        Scales from ``0.05 + 0.95 softplus`` in the place of ``exp``: never below 0.05.
    covariance : {"diagonal", "cholesky", "lowrank"}, default="diagonal"
        Whether targets are predicted independently, or jointly with a triangular factor or
        a covariance of low rank plus diagonal; then targets attend to each other in
        ``n_scale_layers`` layers.
    n_scale_layers, rank : int
        Of the joint variants.

    Raises
    ------
    ValueError
        If a size is less than 1, ``d_model`` is no multiple of ``n_heads`` or
        ``covariance`` is unknown.

    Notes
    -----
    1. The diagonal of the triangular factor is ``softplus(raw) + 0.001``; the official code
       leaves it raw, which is no Cholesky factor where it is negative.
    2. A model with joint targets is for the targets of one call: it is no longer true that
       each is predicted as it would be alone.

    References
    ----------
    .. [1] Feng, Hajimirsadeghi, Bengio, Ahmed. Latent Bottlenecked Attentive Neural
       Processes. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import LBANP
    >>> model = LBANP(dim_x=1, dim_y=1)
    >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)  # 4 functions, 10 points each
    >>> model.loss(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]).backward()
    >>> encodings = model.encode(x, y)  # once, then as many queries as you like
    >>> model.decode(encodings, torch.rand(4, 1000, 1)).loc.shape
    torch.Size([4, 1000, 1])
    """

    def __init__(
        self, dim_x: int, dim_y: int, *, n_latents: int = 8, d_model: int = 64, n_layers: int = 6, n_heads: int = 4,
        d_ff: int = 128, embed_depth: int = 4, dropout: float = 0.0, norm_first: bool = True,
        bound_scale: bool = False, covariance: Literal["diagonal", "cholesky", "lowrank"] = "diagonal",
        n_scale_layers: int = 2, rank: int = 20,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (
            ("dim_x", dim_x), ("dim_y", dim_y), ("n_latents", n_latents), ("d_model", d_model),
            ("n_layers", n_layers), ("n_heads", n_heads), ("d_ff", d_ff),
            ("embed_depth", embed_depth), ("n_scale_layers", n_scale_layers), ("rank", rank),
        ):  # fmt: skip
            integer(name, size, 1)
        within("dropout", dropout, 0, 1, open_high=True)
        one_of("covariance", covariance, ("diagonal", "cholesky", "lowrank"))
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        self.dim_x, self.dim_y, self.n_layers, self.n_latents = dim_x, dim_y, n_layers, n_latents
        self.d_model, self.covariance, self.bound_scale, self.rank = (
            d_model, covariance, bound_scale, rank,
        )  # fmt: skip
        d, hidden = d_model, d_ff
        block = (d, n_heads, hidden, dropout, norm_first)
        self.embed_context = mlp(dim_x + dim_y, d, d, embed_depth - 1)
        self.embed_query = mlp(dim_x, d, d, embed_depth - 1)
        self.latents = nn.Parameter(torch.randn(n_latents, d))
        self.encoder = nn.ModuleList(_EncoderLayer(*block) for _ in range(n_layers))
        self.decoder = nn.ModuleList(_CrossLayer(*block) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d) if norm_first else nn.Identity()
        if covariance == "diagonal":
            self.head = mlp(d, hidden, 2 * dim_y, 1)
            return
        self.mean_head = mlp(d, hidden, dim_y, 1)
        self.scale_layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d, n_heads, hidden, dropout, batch_first=True), n_scale_layers,
            enable_nested_tensor=False,
        )  # fmt: skip
        self.factor_head = mlp(d, d, dim_y * rank, 3)
        if covariance == "lowrank":
            self.diagonal_head = mlp(d, hidden, dim_y, 1)

    def encode(
        self,
        x_context: Float[Tensor, "tasks n dim_x"],
        y_context: Float[Tensor, "tasks n dim_y"],
        context_mask: Bool[Tensor, "tasks n"] | None = None,
    ) -> list[Tensor]:
        """Return the latents of every layer, all that queries need of the context.

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        context_mask : Tensor of shape (tasks, n), bool, optional
            True for a real point.

        Returns
        -------
        list of Tensor of shape (tasks, n_latents, d_model)
            One a layer, whatever n is.
        """
        return self._encode(self._tasks(x_context, y_context, None, None, context_mask), context_mask)

    def _encode(self, batch: Tasks, given: Tensor | None) -> list[Tensor]:
        context = self.embed_context(torch.cat([batch.x_context, batch.y_context], dim=-1))
        latents = self.latents.expand(len(context), -1, -1)
        encodings = []
        for layer in self.encoder:
            latents = layer(latents, context, None if given is None else batch.context_mask)
            encodings.append(latents)
        return encodings

    def decode(
        self, encodings: Sequence[Tensor], x_target: Float[Tensor, "tasks m dim_x"]
    ) -> Normal | MultivariateNormal:
        """Return the prediction at queries; its cost does not depend on the context.

        Parameters
        ----------
        encodings : sequence of Tensor
            What `encode` returned.
        x_target : Tensor of shape (tasks, m, dim_x)

        Returns
        -------
        Normal or MultivariateNormal
            loc and scale of shape (tasks, m, dim_y); with joint targets a distribution
            over vectors of m * dim_y, the outputs of a target side by side, in float32 at
            least: no narrower matrix can be factorised.
        """
        if len(encodings) != self.n_layers:
            raise ValueError(
                f"encodings must be the {self.n_layers} tensors of encode, one a layer, got {len(encodings)}"
            )
        n_tasks = len(encodings[0])
        wanted = (n_tasks, self.n_latents, self.d_model)
        for k, latents in enumerate(encodings):
            if tuple(latents.shape) != wanted:
                raise ValueError(f"encodings[{k}] must have shape {wanted}, got {tuple(latents.shape)}")
        nothing = (encodings[0].new_zeros(n_tasks, 0, size) for size in (self.dim_x, self.dim_y))
        return self._decode(encodings, self._tasks(*nothing, x_target).x_target, None)

    def _decode(
        self, encodings: Sequence[Tensor], x: Tensor, mask: Tensor | None
    ) -> Normal | MultivariateNormal:
        query = self.embed_query(x)
        for layer, latents in zip(self.decoder, encodings, strict=True):
            query = layer(query, latents, None)
        query = self.norm(query)
        if self.covariance == "diagonal":
            mean, raw = self.head(query).chunk(2, dim=-1)
            return Normal(mean, self._positive(raw), validate_args=False)
        return self._joint(query, mask)

    def _positive(self, raw: Tensor) -> Tensor:
        return 0.05 + 0.95 * F.softplus(raw) if self.bound_scale else raw.exp()

    def _joint(self, query: Tensor, mask: Tensor | None) -> MultivariateNormal:
        n, m = query.shape[:2]
        mean = wide(self.mean_head(query)).reshape(n, m * self.dim_y)
        if m == 0:
            return MultivariateNormal(mean, scale_tril=mean.new_zeros(n, 0, 0), validate_args=False)
        hidden = None if mask is None else ~mask
        if hidden is not None:  # a row of padding alone must not become NaN
            hidden = hidden & ~hidden.all(1, keepdim=True)
        mixed = self.scale_layers(query, src_key_padding_mask=hidden)
        factor = wide(self.factor_head(mixed)).reshape(n, m * self.dim_y, self.rank)
        with torch.autocast(query.device.type, enabled=False):
            gram = factor @ factor.mT
        if self.covariance == "cholesky":
            raw = gram.diagonal(dim1=-2, dim2=-1)
            diagonal = self._positive(raw) if self.bound_scale else F.softplus(raw) + 1e-3
            tril = gram.tril(-1) + torch.diag_embed(diagonal)
            return MultivariateNormal(mean, scale_tril=tril, validate_args=False)
        variance = self._positive(wide(self.diagonal_head(mixed)).reshape(n, -1))
        return MultivariateNormal(mean, gram + torch.diag_embed(variance), validate_args=False)

    def forward(
        self,
        x_context: Float[Tensor, "tasks n dim_x"],
        y_context: Float[Tensor, "tasks n dim_y"],
        x_target: Float[Tensor, "tasks m dim_x"],
        *,
        context_mask: Bool[Tensor, "tasks n"] | None = None,
    ) -> Normal | MultivariateNormal:
        """Return ``decode(encode(x_context, y_context, context_mask), x_target)``."""
        batch = self._tasks(x_context, y_context, x_target, None, context_mask)
        return self._decode(self._encode(batch, context_mask), batch.x_target, None)

    def _predict(self, batch: Tasks) -> Normal | MultivariateNormal:
        return self._decode(self._encode(batch, batch.context_mask), batch.x_target, batch.target_mask)


class _Attention(nn.Module):
    """Multi-head attention without biases inside; no key adds exactly nothing."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key_value = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        if source.shape[1] == 0:
            return torch.zeros_like(x)
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.query(x), *self.key_value(source).chunk(2, dim=-1))
        )
        if mask is None:
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        some = mask.any(1)[:, None, None]
        seen = mask[:, None, None] | ~some[:, None]  # softmax over no key is NaN: see all, drop it
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(-1, -1, q.shape[2], -1))
        return self.out(mixed.transpose(1, 2).flatten(2)).masked_fill(~some, 0)


class _GEGLU(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class _CrossLayer(nn.Module):
    """Attention to a source and a feed-forward block, each residual with its own norm."""

    def __init__(self, d: int, n_heads: int, hidden: int, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attend, self.feed = _Attention(d, n_heads), _GEGLU(d, hidden)
        self.norm, self.feed_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.source_norm = nn.LayerNorm(d) if norm_first else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attend(self.norm(x), self.source_norm(source), mask))
            return x + self.dropout(self.feed(self.feed_norm(x)))
        x = self.norm(x + self.dropout(self.attend(x, source, mask)))
        return self.feed_norm(x + self.dropout(self.feed(x)))


class _SelfLayer(_CrossLayer):
    def __init__(self, d: int, n_heads: int, hidden: int, dropout: float, norm_first: bool) -> None:
        super().__init__(d, n_heads, hidden, dropout, norm_first)
        self.source_norm = nn.Identity()  # the source is the normed input itself

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            normed = self.norm(x)
            x = x + self.dropout(self.attend(normed, normed, None))
            return x + self.dropout(self.feed(self.feed_norm(x)))
        return super().forward(x, x, None)


class _EncoderLayer(nn.Module):
    def __init__(self, d: int, n_heads: int, hidden: int, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.cross = _CrossLayer(d, n_heads, hidden, dropout, norm_first)
        self.own = _SelfLayer(d, n_heads, hidden, dropout, norm_first)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return self.own(self.cross(latents, context, mask))
