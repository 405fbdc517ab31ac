"""Decepticons: parameters that make a transformer write its training text into its own gradient.

Federated learning sends a model to people and gets gradients back. A server that is not honest may
send the usual architecture with a state of its own making, and this module makes such a state, so
that its owner can measure what one update of their model would give away, check states that they
receive (`inspect_parameters`) and choose clipping and noise that stop it (`audit_leakage`). It
works on a model and data that the caller holds, in one process; it has no network code.

The first attention layer looks at position 0 alone and copies a few columns of it into columns that
embeddings leave free: a tag of the sequence. All other attention is silenced, so that every
feed-forward layer sees nearly the same vector h of a token. All its K rows, of all layers together,
measure one number w h against rising thresholds,

    hidden_k = relu(w h - c_k),     c_0 = -10,   c_k the k/K quantile of w h,                  (1)

and all hidden units pass on one gradient delta. Differences of neighbouring rows of it then hold
the tokens between two thresholds alone,

    G_k - G_(k+1) = sum of delta h,   g_k - g_(k+1) = sum of delta   over  c_k < w h <= c_(k+1),   (2)

and their ratio is h itself where one token is: `reconstruct` reads position, sequence and word off it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.special import ndtri
from torch import Tensor, nn

from posterity._checks import at_least, indices, integer
from posterity._random import draw_device

__all__ = ["AuditTransformer", "ImprintProbe", "corrupt_transformer", "imprint_bins"]

LOWEST, SIGMAS = -10.0, 8.0  # below all that is measured: in its units, and at least in its spreads
ROWS = 8  # sequences at once in calibration
BATCHES = 20
LAYOUT = (
    "embedding (nn.Embedding), positions (nn.Embedding, parameter or buffer of max_len rows), "
    "encoder (nn.TransformerEncoder) and decoder (nn.Linear)"
)


class AuditTransformer(nn.Module):
    """The paper's small language model: learned positions, post-norm ReLU layers, no dropout, no mask.

    Any model with the same four attributes can be audited: `corrupt_transformer` says what they
    must be.

    Parameters
    ----------
    vocab_size : int
        Different tokens, at least 2.
    max_len : int
        Tokens of a sequence at most, at least 2.
    d_model : int, default=96
        Width, a multiple of ``n_heads``.
    n_heads : int, default=8
        Heads of attention, at least 1.
    d_ff : int, default=1536
        Hidden units of a feed-forward layer, at least 1.
    n_layers : int, default=3
        Layers, at least 1.

    Attributes
    ----------
    embedding : nn.Embedding
        Uniform in [-0.1, 0.1], as the weight of the decoder.
    positions : nn.Embedding
        Standard normal.
    encoder : nn.TransformerEncoder
        Of post-norm layers.
    decoder : nn.Linear
        With a bias that starts at 0.

    Raises
    ------
    ValueError
        If a size is out of range, or tokens are no integers of shape (batch, positions), too long,
        or (on the CPU, where reading is free) outside the vocabulary.

    References
    ----------
    .. [1] Fowl et al. Decepticons: Corrupted Transformers Breach Privacy in Federated Learning
       for Language Models. ICLR 2023. arXiv 2201.12675.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import AuditTransformer
    >>> model = AuditTransformer(50, 8, d_ff=64, n_layers=1)
    >>> model(torch.tensor([[3, 1, 4, 1, 5]])).shape
    torch.Size([1, 5, 50])
    """

    def __init__(
        self, vocab_size: int, max_len: int, *, d_model: int = 96, n_heads: int = 8, d_ff: int = 1536, n_layers: int = 3
    ) -> None:  # fmt: skip
        super().__init__()
        vocab_size, max_len = integer("vocab_size", vocab_size, 2), integer("max_len", max_len, 2)
        d_model, n_heads = integer("d_model", d_model, 1), integer("n_heads", n_heads, 1)
        d_ff, n_layers = integer("d_ff", d_ff, 1), integer("n_layers", n_layers, 1)
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, {n_heads}, got {d_model}")
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_len, d_model)
        layer = nn.TransformerEncoderLayer(d_model, n_heads, d_ff, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.decoder = nn.Linear(d_model, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Int[Tensor, "batch positions"]) -> Float[Tensor, "batch positions vocab"]:
        """Return logits of the next token at each position."""
        _token_rows("tokens", tokens, self.embedding.num_embeddings, self.positions.num_embeddings)
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.decoder(self.encoder(x))


@dataclass(frozen=True)
class ImprintProbe:
    """What whoever made a corrupted state remembers of it, and reads gradients by.

    Attributes
    ----------
    measurement : Tensor of shape (d_model,)
        The row w of equation 1.
    edges : Tensor of shape (n_layers * d_ff,), float64
        Thresholds c, rising.
    v_length : int
        Columns of the tag.
    mean, std : float
        Of ``measurement`` times h on the calibration tokens.
    """

    measurement: Tensor
    edges: Tensor
    v_length: int
    mean: float
    std: float


@torch.inference_mode(False)  # grad mode too
def corrupt_transformer(
    model: nn.Module,
    *,
    calibration: Int[Tensor, "n positions"] | None = None,
    v_length: int = 6,
    softmax_skew: float = 1e8,
    backward_scale: float = 1e-4,
    sentence_weight: float = 1.0,
    measurement_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, ImprintProbe]:
    """Return a copy of a model in the worst state that its owner should fear, and how to read it.

    Parameters
    ----------
    model : nn.Module
        ``model(tokens) -> logits (batch, positions, vocab)`` in float32 or float64, left as it is,
        with four attributes: ``embedding``, an ``nn.Embedding``; ``positions``, an ``nn.Embedding``,
        or a parameter or buffer of shape (max_len, d_model), with or without a 1 in front;
        ``encoder``, an ``nn.TransformerEncoder`` of post-norm ReLU ``nn.TransformerEncoderLayer``
        with biases; ``decoder``, an ``nn.Linear`` with a bias. The encoder must be given the
        embeddings of the tokens, times a constant, plus the positions. A causal mask does not matter.
    calibration : Tensor of shape (n, positions), optional
        Tokens by which the thresholds are set, at least 2 in all; text like that of the audit is
        best. By default 160 uniform random sequences of full length.
    v_length : int, default=6
        Columns of the tag, at least 3; twice as many must fit into a head.
    softmax_skew : float, default=1e8
        Sharpness of the look at position 0, positive.
    backward_scale : float, default=1e-4
        Gradient that hidden units get, positive; larger ones stand more noise and move h more.
    sentence_weight : float, default=1.0
        Size of the tag, positive.
    measurement_scale : float, default=1.0
        Size of w, positive.
    generator : torch.Generator, optional
        Draws the measurement, and tokens where there is no calibration.

    Returns
    -------
    corrupted : nn.Module
        Same modules, names and shapes.
    probe : ImprintProbe
        What reads its gradients.

    Raises
    ------
    ValueError
        If a number is out of range, the model is not of this layout, a head has fewer than
        ``2 * v_length`` columns, or tokens do not fit.

    Notes
    -----
    1. Layer norms inside the encoder are set to weight 1 and bias 0, so that all feed-forward layers
       see the same h; in a model that is not trained they are.
    2. The last column carries the gradient and is not read; the stream is moved along it alone.

    References
    ----------
    .. [1] Fowl et al. Decepticons: Corrupted Transformers Breach Privacy in Federated Learning
       for Language Models. ICLR 2023. arXiv 2201.12675.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import AuditTransformer, audit_leakage, corrupt_transformer
    >>> model, tokens = AuditTransformer(200, 8, n_layers=1), torch.arange(8, 16)[None]
    >>> state, probe = corrupt_transformer(model)
    >>> report = audit_leakage(state, tokens, probe)
    >>> report.token_accuracy > 0.7
    True
    """
    v = integer("v_length", v_length, 3)
    at_least("softmax_skew", softmax_skew, 0, strict=True)
    at_least("backward_scale", backward_scale, 0, strict=True)
    at_least("sentence_weight", sentence_weight, 0, strict=True)
    at_least("measurement_scale", measurement_scale, 0, strict=True)
    layout = _layout(model)
    d, head = layout.embedding.shape[1], layout.layers[0].self_attn.head_dim
    if head < 2 * v:
        raise ValueError(f"v_length must be at most half of the {head} columns of a head, got {v_length}")
    rows, size = layout.positions.shape[0], layout.embedding.shape[0]
    if calibration is None:
        shape = (ROWS * BATCHES, rows)
        calibration = torch.randint(size, shape, generator=generator, device=draw_device(generator))
    calibration = _token_rows("calibration", calibration, size, rows).to(layout.embedding.device)
    if calibration.numel() < 2:
        raise ValueError(f"calibration must have at least 2 tokens, got shape {tuple(calibration.shape)}")

    drawn = torch.randn(d - v - 1, generator=generator, device=draw_device(generator), dtype=torch.float64)
    drawn = (drawn - drawn.mean()) / drawn.std(correction=0) / len(drawn) ** 0.5
    measurement = layout.embedding.new_zeros(d)
    measurement[v : d - 1] = measurement_scale * drawn.to(measurement)

    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        _corrupt(_layout(twin), v, softmax_skew, backward_scale, sentence_weight)
        seen = _double(_measured(twin, calibration, measurement))
    mean, std = float(seen.mean()), float(seen.std(correction=0))
    if not std > 0:
        raise ValueError(f"calibration must have tokens that differ, what is measured has spread {std:g}")
    layers = _layout(twin).layers
    edges = imprint_bins(mean, std, sum(layer.linear1.out_features for layer in layers))
    with torch.no_grad():
        parts = edges.split([layer.linear1.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.linear1.weight.copy_(measurement.expand_as(layer.linear1.weight))
            layer.linear1.bias.copy_(-part)
    for now, was in zip(twin.modules(), model.modules(), strict=True):
        now.training = was.training
    return twin, ImprintProbe(measurement, edges, v, mean, std)


def imprint_bins(mean: float, std: float, n_bins: int) -> Float[Tensor, " n_bins"]:
    """Return the thresholds of equation 1: one below everything, then quantiles of a normal distribution.

    Parameters
    ----------
    mean, std : float
        Of what is measured; ``std`` positive.
    n_bins : int
        At least 1.

    Returns
    -------
    Tensor of shape (n_bins,), float64
        Rising: -10 (where it is less, ``mean - 8 std``), then the quantiles 1/n_bins, 2/n_bins, …

    Raises
    ------
    ValueError
        If a number is out of range, or the thresholds are so many or so near that they coincide.

    References
    ----------
    .. [1] Fowl et al. Decepticons. ICLR 2023. arXiv 2201.12675.

    Examples
    --------
    >>> from posterity.privacy import imprint_bins
    >>> imprint_bins(0.0, 1.0, 4)
    tensor([-10.0000,  -0.6745,   0.0000,   0.6745], dtype=torch.float64)
    """
    mean, n_bins = at_least("mean", mean, -float("inf")), integer("n_bins", n_bins, 1)
    at_least("std", std, 0, strict=True)
    share = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    edges = torch.empty(n_bins, dtype=torch.float64)
    edges[0] = min(LOWEST, mean - SIGMAS * std)
    edges[1:] = mean + std * torch.from_numpy(ndtri(share.numpy()))
    if not bool((edges.diff() > 0).all()) or not bool(edges.isfinite().all()):
        raise ValueError(f"std must keep {n_bins} thresholds around mean {mean:g} apart, got {std:g}")
    return edges


class _Layout(NamedTuple):
    """The parts of a supported model; tensors are its own."""

    embedding: Tensor
    positions: Tensor
    layers: list[Any]
    decoder: nn.Linear


def _layout(model: nn.Module) -> _Layout:
    """Return the parts of a model, or say what it lacks."""
    names = ("embedding", "positions", "encoder", "decoder")
    parts: list[Any] = [getattr(model, name, None) for name in names]
    embedding, table, encoder, decoder = parts
    table = table.weight if isinstance(table, nn.Embedding) else table
    wanted = (
        (embedding, nn.Embedding),
        (table, Tensor),
        (encoder, nn.TransformerEncoder),
        (decoder, nn.Linear),
    )
    for name, (part, kind) in zip(names, wanted, strict=True):
        if not isinstance(part, kind):
            raise ValueError(f"model must have {LAYOUT}; its {name} is {type(part).__name__}")
    table = table[0] if table.ndim == 3 and len(table) == 1 else table
    d = embedding.embedding_dim
    if table.ndim != 2 or table.shape[1] != d:
        raise ValueError(f"model must have positions of shape (max_len, {d}), got {tuple(table.shape)}")
    if decoder.bias is None:
        raise ValueError("model must have biases, decoder has none")
    if decoder.out_features != embedding.num_embeddings:
        raise ValueError(
            f"model must decode to its {embedding.num_embeddings} tokens, decoder gives {decoder.out_features}"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model must be float32 or float64, differences of gradients vanish in others, "
                f"{name} is {parameter.dtype}"
            )
    for k, layer in enumerate(encoder.layers):
        at = f"encoder.layers.{k}"
        if not isinstance(layer, nn.TransformerEncoderLayer) or layer.self_attn.in_proj_weight is None:
            raise ValueError(
                f"model must have layers nn.TransformerEncoderLayer, {at} is {type(layer).__name__}"
            )
        for part in ("self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"):
            module = layer.get_submodule(part)
            if (module.in_proj_bias if part == "self_attn" else module.bias) is None:
                raise ValueError(f"model must have biases, {at}.{part} has none")
        if layer.norm_first:
            raise ValueError(f"model must have post-norm layers (norm_first=False), {at} is pre-norm")
        relu = layer.activation is torch.relu or layer.activation is nn.functional.relu
        if not relu and not isinstance(layer.activation, nn.ReLU):
            raise ValueError(f"model must have ReLU layers, {at} has {layer.activation}")
    return _Layout(embedding.weight, table, list(encoder.layers), decoder)


def _token_rows(name: str, tokens: Any, vocab_size: int, max_len: int, least: int = 1) -> Tensor:
    """Return tokens (rows, positions) as they are, if they fit a vocabulary and a length."""
    length = indices(name, tokens, (None, None), vocab_size).shape[1]
    if not least <= length <= max_len:
        raise ValueError(f"{name} must have {least} to {max_len} positions, got {length}")
    return tokens


def _corrupt(layout: _Layout, v: int, skew: float, backward_scale: float, sentence_weight: float) -> None:
    """Set all but the first feed-forward layers."""
    tag, source = slice(0, v), slice(v, 2 * v)
    layout.embedding[:, tag] = 0
    positions = layout.positions
    positions[:, tag] = 0
    positions /= positions[:, source].norm(dim=1, keepdim=True).clamp_min(torch.finfo(positions.dtype).tiny)
    d = positions.shape[1]
    for k, layer in enumerate(layout.layers):
        attention = layer.self_attn
        for part in (attention.in_proj_bias, attention.out_proj.bias, attention.out_proj.weight):
            part.zero_()
        if k == 0:
            query, key, value = attention.in_proj_weight.chunk(3)
            query.zero_()
            key.copy_(torch.eye(d))
            value.zero_()
            value[tag, source] = torch.eye(v).to(value)
            bias = attention.in_proj_bias
            bias[v : 2 * v] = skew * positions[0, source]  # of the query
            bias[2 * d : 2 * d + v] = -positions[0, source]  # of the value: leaves the word alone
            attention.out_proj.weight.copy_(sentence_weight * torch.eye(d))
        layer.linear2.weight.zero_()
        layer.linear2.weight[-1] = backward_scale / layer.linear1.out_features
        layer.linear2.bias.zero_()
        for norm in (layer.norm1, layer.norm2):
            norm.weight.fill_(1)
            norm.bias.zero_()


def _measured(model: nn.Module, tokens: Tensor, measurement: Tensor) -> Tensor:
    """Return w h of all tokens where the first feed-forward layer sees them; the layout is checked on the way."""
    layout = _layout(model)
    first, found = layout.layers[0], []

    def enters(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if first.self_attn.batch_first else args[0].transpose(0, 1)
        words = layout.embedding[batch]
        rest = x - layout.positions[: batch.shape[1]]
        factor = (rest * words).sum() / words.square().sum().clamp_min(torch.finfo(words.dtype).tiny)
        if rest.shape != words.shape or not bool((rest - factor * words).norm() <= 1e-3 * rest.norm()):
            raise ValueError("model must give its encoder the embeddings, times a constant, plus positions")

    def measures(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append((args[0] @ measurement).flatten())

    hooks = [first.register_forward_pre_hook(enters), first.linear1.register_forward_pre_hook(measures)]
    try:
        with _full_precision(tokens.device):
            for batch in tokens.long().split(ROWS):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        yield


def _double(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
