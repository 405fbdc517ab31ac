"""Discrete latents and the table of their distributions, trained together: the learned half of finite-state coding.

A vector z becomes the nearest of K codes, forward exactly, backward by the softmax of

    logits_k = -|z - e_k|^2 / (2 variance),                                                              (1)

so that the rate, which sees only which code it was, moves vectors and codes (STHQ). The rate is that of a small
network on the codes of the M neighbours. Since it has (K + 1)^M different inputs, it is a table once it is trained.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide, widened
from posterity._random import draw_device
from posterity.coding.finite_state import check_offsets, n_rows

__all__ = ["FiniteStatePrior", "HardmaxQuantizer", "Quantized"]

TINY = 1e-9  # kept of a code of weight 0, so that its logarithm is finite
TABLE_SLAB = 2**14  # rows of a table computed at once


class Quantized(NamedTuple):
    """What a quantiser makes of vectors.

    Attributes
    ----------
    output : Tensor of shape (n, C, *spatial, dim)
        The codes; their gradient is that of the vectors.
    indices : Tensor of shape (n, C, *spatial), int64
    one_hot : Tensor of shape (n, C, *spatial, K)
        The choice, with the gradient of the relaxed one.
    commitment : Tensor of shape (n,)
        ``sum |z - e|^2 / (2 variance)``, which draws codes and vectors to each other.
    """

    output: Tensor
    indices: Tensor
    one_hot: Tensor
    commitment: Tensor


class HardmaxQuantizer(nn.Module):
    """Straight-through hardmax quantisation (STHQ) of vectors to codes.

    Parameters
    ----------
    n_codes : int
        K, at least 1.
    dim : int
        Entries of a code, at least 1.
    channels : int, default=1
        Each has a codebook of its own.
    temperature : float, default=0.5
        Of the relaxed choice, positive: the higher, the smaller its gradient.
    variance : float, default=1.0
        Of equation 1, positive.
    surrogate : {"gumbel", "softmax"}, default="gumbel"
        Whose gradient the choice has: a Gumbel-softmax sample's, in training, or the softmax's.

    Attributes
    ----------
    codebook : Parameter of shape (channels, n_codes, dim)

    Raises
    ------
    ValueError
        If an argument is out of range, or ``z`` does not fit or has NaN (on the CPU, where reading is free).

    Notes
    -----
    1. The paper's formula may have the probabilities as surrogate where the official code has the sample: both are
       offered.

    References
    ----------
    .. [1] Zhang, Yu, Li, Lin. Finite-State Autoregressive Entropy Coding for Efficient Learned Lossless Compression.
       ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import HardmaxQuantizer
    >>> layer = HardmaxQuantizer(2, 1)
    >>> _ = layer.codebook.data.copy_(torch.tensor([[[-1.0], [1.0]]]))
    >>> z = torch.tensor([[[0.2]]], requires_grad=True)  # one sample, one channel, no spatial axes
    >>> made = layer(z)
    >>> made.output.detach(), made.indices, made.commitment.detach()
    (tensor([[[1.]]]), tensor([[1]]), tensor([0.3200]))
    >>> torch.autograd.grad(made.output.sum(), z)[0]
    tensor([[[1.]]])
    """

    def __init__(
        self,
        n_codes: int,
        dim: int,
        channels: int = 1,
        *,
        temperature: float = 0.5,
        variance: float = 1.0,
        surrogate: Literal["gumbel", "softmax"] = "gumbel",
    ) -> None:
        super().__init__()
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.variance = at_least("variance", variance, 0, strict=True)
        self.surrogate = one_of("surrogate", surrogate, ("gumbel", "softmax"))
        shape = (integer("channels", channels, 1), integer("n_codes", n_codes, 1), integer("dim", dim, 1))
        self.codebook = nn.Parameter(torch.randn(shape))

    @widened
    def forward(
        self,
        z: Float[Tensor, "n channels *spatial dim"],
        *,
        weights: Float[Tensor, " n_codes"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Return the nearest code of each vector.

        Parameters
        ----------
        z : Tensor of shape (n, C, *spatial, dim)
        weights : Tensor of shape (n_codes,), optional
            Of the codes, as `FiniteStatePrior` learns them: probabilities are multiplied by them, and a code of
            weight 0 is not chosen.
        generator : torch.Generator, optional
            For the sample of "gumbel" in training.

        Returns
        -------
        Quantized
        """
        z = self._check(z)
        codebook = wide(self.codebook)
        channels, k, dim = codebook.shape
        by = z.movedim(1, 0).reshape(channels, -1, dim)  # (C, places, dim)
        square = by.square().sum(-1, keepdim=True) - 2 * by @ codebook.mT + codebook.square().sum(-1)[:, None]
        logits = -square / (2 * self.variance)
        if weights is not None:
            has_shape("weights", floating("weights", weights), (k,), "n_codes")
            logits = logits + (wide(weights) + TINY).log()
            logits = torch.where(wide(weights) > 0, logits, logits - 1e9)
        index = logits.argmax(-1)
        soft = logits
        if self.surrogate == "gumbel" and self.training:
            device = draw_device(generator, logits.device)
            noise = torch.rand(logits.shape, dtype=logits.dtype, device=device, generator=generator)
            soft = logits - noise.clamp_min(torch.finfo(noise.dtype).tiny).log().neg().log().to(logits.device)
        soft = (soft / self.temperature).softmax(-1)
        hard = F.one_hot(index, k).to(soft.dtype)
        one_hot = hard + (soft - soft.detach())
        chosen = codebook.gather(1, index[..., None].expand(-1, -1, dim))
        distance = (by - chosen).square().sum(-1) / (2 * self.variance)
        output = chosen.detach() + (by - by.detach())  # the code exactly; its gradient is that of z

        def back(x: Tensor, *last: int) -> Tensor:
            return x.reshape(channels, z.shape[0], *z.shape[2:-1], *last).movedim(0, 1)

        commitment = back(distance).flatten(1).sum(1)
        return Quantized(back(output, dim), back(index), back(one_hot, k), commitment)

    def decode(
        self, indices: Integer[Tensor, "n channels *spatial"]
    ) -> Float[Tensor, "n channels *spatial dim"]:
        """Return the codes of indices.

        Parameters
        ----------
        indices : integer Tensor of shape (n, C, *spatial)
            In 0 .. n_codes - 1.

        Returns
        -------
        Tensor
        """
        channels, k, _ = self.codebook.shape
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"indices must be integers, got {indices.dtype}")
        if indices.ndim < 2 or indices.shape[1] != channels:
            raise ValueError(f"indices must have shape (n, {channels}, *spatial), got {tuple(indices.shape)}")
        indices = indices.long()
        if indices.device.type == "cpu" and indices.numel() and not (indices.min() >= 0 and indices.max() < k):  # fmt: skip
            raise ValueError(f"indices must be in 0..{k - 1}, got {indices.min()} to {indices.max()}")
        channel = torch.arange(channels, device=indices.device).reshape(-1, *[1] * (indices.ndim - 2))
        return self.codebook[channel, indices]

    @torch.no_grad()
    def init_from(
        self, z: Float[Tensor, "n channels *spatial dim"], *, generator: torch.Generator | None = None
    ) -> "HardmaxQuantizer":
        """Make the codes of randomly drawn vectors, which keeps them from dying at the start.

        Parameters
        ----------
        z : Tensor of shape (n, C, *spatial, dim)
            At least one vector a channel; they come twice where there are fewer than codes.
        generator : torch.Generator, optional

        Returns
        -------
        HardmaxQuantizer
            Itself.
        """
        z = self._check(z)
        channels, k, dim = self.codebook.shape
        by = z.movedim(1, 0).reshape(channels, -1, dim)
        if not by.shape[1]:
            raise ValueError(f"z must have a vector for each channel, got shape {tuple(z.shape)}")
        order = torch.randperm(by.shape[1], generator=generator, device=draw_device(generator))
        self.codebook.copy_(by[:, order.repeat(-(-k // len(order)))[:k].to(by.device)])
        return self

    def _check(self, z: Tensor) -> Tensor:
        channels, _, dim = self.codebook.shape
        floating("z", z)
        if z.ndim < 3 or z.shape[1] != channels or z.shape[-1] != dim:
            raise ValueError(f"z must have shape (n, {channels}, *spatial, {dim}), got {tuple(z.shape)}")
        if z.device.type == "cpu" and not bool(torch.isfinite(z).all()):
            raise ValueError("z must be finite, got NaN or infinity")
        return z

    def extra_repr(self) -> str:
        """Return what it was made with."""
        channels, k, dim = self.codebook.shape
        return f"n_codes={k}, dim={dim}, channels={channels}, surrogate={self.surrogate!r}"


class FiniteStatePrior(nn.Module):
    """The probability of each code given its neighbours' codes: a network to train, a table to use.

    Parameters
    ----------
    n_codes : int
        K, at least 1.
    dim : int
        Entries of a code, at least 1.
    channels : int, default=1
        Each has a network and a table of its own.
    offsets : sequence of sequence of int, default=((0, -1, 0), (0, 0, -1))
        M neighbours over (channel, *spatial), as of `FiniteStateCoder`: the top and the left one. None at all is the
        independent prior.
    expansion : float, default=2.0
        Hidden units over inputs and over codes, positive: M d -> 2 M d -> 2 K -> K.
    reduce_states : bool, default=False
        Whether to learn which codes there are: sparse weights that multiply the probabilities.
    entmax_alpha : float, default=1.4
        Of the weights, in (1, 2]: the higher, the sooner a code's is 0.

    Raises
    ------
    ValueError
        If an argument is out of range, an offset is not causal or comes twice, or the table would have more than
        2^28 entries.

    References
    ----------
    .. [1] Zhang, Yu, Li, Lin. Finite-State Autoregressive Entropy Coding for Efficient Learned Lossless Compression.
       ICLR 2024.
    .. [2] Peters, Niculae, Martins. Sparse Sequence-to-Sequence Models. ACL 2019. Equation 10.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import FiniteStateCoder, FiniteStatePrior, HardmaxQuantizer
    >>> _ = torch.manual_seed(0)
    >>> layer, prior = HardmaxQuantizer(4, 2), FiniteStatePrior(4, 2)
    >>> made = layer(torch.randn(8, 1, 5, 5, 2))
    >>> nats = prior.rate(made.one_hot, layer.codebook)  # to minimise
    >>> coder = FiniteStateCoder.from_probs(prior.table(layer.codebook), prior.offsets)
    >>> bool(((coder.code_length(made.indices) - nats / 0.6931).abs() < 0.5).all())
    True
    """

    def __init__(
        self,
        n_codes: int,
        dim: int,
        channels: int = 1,
        offsets: Sequence[Sequence[int]] = ((0, -1, 0), (0, 0, -1)),
        *,
        expansion: float = 2.0,
        reduce_states: bool = False,
        entmax_alpha: float = 1.4,
    ) -> None:
        super().__init__()
        k, dim, channels = integer("n_codes", n_codes, 1), integer("dim", dim, 1), integer("channels", channels, 1)  # fmt: skip
        self.n_codes, self.dim, self.channels = k, dim, channels
        self.offsets = check_offsets(offsets)
        n_rows(channels, k, self.offsets)
        at_least("expansion", expansion, 0, strict=True)
        self.entmax_alpha = within("entmax_alpha", entmax_alpha, 1, 2, open_low=True)
        self.static = nn.Parameter(torch.zeros(channels, k))
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        wide_in = len(self.offsets) * dim
        sizes = [wide_in, round(expansion * wide_in) or 1, round(expansion * k) or 1, k] if wide_in else []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            bound = fan_in**-0.5
            self.weights.append(nn.Parameter(torch.empty(channels, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.zeros(channels, 1, fan_out)))
        self.states = nn.Parameter(torch.zeros(k)) if reduce_states else None

    @widened
    def forward(
        self, one_hot: Float[Tensor, "n channels *spatial k"], codebook: Float[Tensor, "channels k dim"]
    ) -> Float[Tensor, "n channels *spatial k"]:
        """Return log-probabilities of every code at every place.

        Parameters
        ----------
        one_hot : Tensor of shape (n, C, *spatial, K)
            Which code is where.
        codebook : Tensor of shape (C, K, dim)

        Returns
        -------
        Tensor of shape (n, C, *spatial, K)
        """
        self._check_codebook(codebook)
        floating("one_hot", one_hot)
        n_axes = len(self.offsets[0]) + 2 if self.offsets else max(one_hot.ndim, 3)
        if one_hot.ndim != n_axes or one_hot.shape[1] != self.channels or one_hot.shape[-1] != self.n_codes:
            raise ValueError(
                f"one_hot must have shape (n, {self.channels}, *spatial, {self.n_codes}) with {n_axes - 3} spatial axes, "
                f"got {tuple(one_hot.shape)}"
            )
        codes = torch.einsum("nc...k,ckd->nc...d", one_hot, wide(codebook))
        seen = [_shifted(codes, offset) for offset in self.offsets]
        by = torch.cat(seen, -1).movedim(1, 0).flatten(1, -2) if seen else None  # (C, places, M d)
        places = one_hot.shape[0] * one_hot[0, 0, ..., 0].numel() if len(one_hot) else 0
        log_p = self._log_probs(by, places)
        return log_p.reshape(self.channels, len(one_hot), *one_hot.shape[2:]).movedim(0, 1)

    @widened
    def rate(
        self,
        one_hot: Float[Tensor, "n channels *spatial k"],
        codebook: Float[Tensor, "channels k dim"],
        *,
        detach: bool = False,
    ) -> Float[Tensor, " n"]:
        """Return ``-sum one_hot * log p`` of each sample, in nats.

        Parameters
        ----------
        one_hot, codebook : Tensor
            As of the call.
        detach : bool, default=False
            Whether to train the prior alone, as the official recipe does: no gradient reaches the vectors.

        Returns
        -------
        Tensor of shape (n,)
        """
        one_hot = one_hot.detach() if detach else one_hot
        return -(one_hot * self(one_hot, codebook)).flatten(1).sum(1)

    @torch.no_grad()
    def table(self, codebook: Float[Tensor, "channels k dim"]) -> Float[Tensor, "channels rows k"]:
        """Return the probabilities of every code in every state of the neighbours.

        Parameters
        ----------
        codebook : Tensor of shape (C, K, dim)

        Returns
        -------
        Tensor of shape (C, (K + 1)^M, K)
            For ``FiniteStateCoder.from_probs``.
        """
        return self.table_of(codebook, torch.arange(self.n_codes))

    @torch.no_grad()
    def table_of(
        self, codebook: Float[Tensor, "channels k dim"], codes: Int[Tensor, " kept"]
    ) -> Float[Tensor, "channels rows kept"]:
        """Return the table of some of the codes, which then number from 0.

        Parameters
        ----------
        codebook : Tensor of shape (C, K, dim)
        codes : integer Tensor of shape (K',)
            Those kept, as `active_states` says.

        Returns
        -------
        Tensor of shape (C, (K' + 1)^M, K')
        """
        self._check_codebook(codebook)
        device = self.static.device
        codes = codes.to(device)
        rows, base = n_rows(self.channels, len(codes), self.offsets), len(codes) + 1
        padded = F.pad(wide(codebook)[:, codes], (0, 0, 1, 0))  # state 0 is the zero vector
        parts = []
        for start in range(0, rows, TABLE_SLAB):
            row = torch.arange(start, min(start + TABLE_SLAB, rows), device=device)
            seen = []
            for j, offset in enumerate(self.offsets):
                state = row // base ** (len(self.offsets) - 1 - j) % base
                known = [padded[max(c + offset[0], 0), state] for c in range(self.channels)]
                seen.append(torch.stack(known))
            by = torch.cat(seen, -1) if seen else None
            parts.append(self._log_probs(by, len(row))[..., codes].softmax(-1))
        return torch.cat(parts, 1)

    def active_states(self) -> Bool[Tensor, " k"]:
        """Return which codes have a weight above 0: all, unless states are reduced.

        Returns
        -------
        Tensor of shape (K,)
        """
        weights = self.code_weights()
        return torch.ones(self.n_codes, dtype=torch.bool) if weights is None else (weights > 0).cpu()

    def code_weights(self) -> Float[Tensor, " k"] | None:
        """Return the weights of the codes, which sum to 1; None unless states are reduced.

        Returns
        -------
        Tensor of shape (K,) or None
        """
        return None if self.states is None else _Entmax.apply(wide(self.states), float(self.entmax_alpha))  # type: ignore[no-any-return]

    def _log_probs(self, by: Tensor | None, places: int) -> Tensor:
        """Return log-probabilities of the neighbours' codes (C, places, M d)."""
        logits = wide(self.static)[:, None].expand(-1, places, -1)
        if by is not None:
            hidden = by
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                hidden = F.leaky_relu(hidden) if layer else hidden
                hidden = hidden @ wide(weight) + wide(bias)
            logits = logits + hidden
        weights = self.code_weights()
        if weights is not None:
            logits = logits + (weights + TINY).log()
        return logits.log_softmax(-1)

    def _check_codebook(self, codebook: Tensor) -> None:
        has_shape("codebook", floating("codebook", codebook), (self.channels, self.n_codes, self.dim))

    def extra_repr(self) -> str:
        """Return what it was made with."""
        return f"n_codes={self.n_codes}, dim={self.dim}, channels={self.channels}, offsets={self.offsets}"


def _shifted(x: Tensor, offset: tuple[int, ...]) -> Tensor:
    """Return at each place of (n, C, *spatial, d) what is at place + offset, zeros from outside."""
    ahead = [0, 0]
    for axis in reversed(range(len(offset))):
        step = min(-offset[axis], x.shape[axis + 1])
        x = x.narrow(axis + 1, 0, x.shape[axis + 1] - step)
        ahead += [step, 0]
    return F.pad(x, ahead)


class _Entmax(torch.autograd.Function):
    """alpha-entmax: [(alpha - 1) z - tau]_+^(1 / (alpha - 1)), tau such that it sums to 1."""

    @staticmethod
    def forward(ctx, z: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        scaled = (alpha - 1) * z.double()
        low = scaled.max() - 1
        high = scaled.max() - len(z) ** (1 - alpha)
        for _ in range(60):
            tau = (low + high) / 2
            over = (scaled - tau).clamp_min(0).pow(1 / (alpha - 1)).sum() >= 1
            low, high = torch.where(over, tau, low), torch.where(over, high, tau)
        p = (scaled - (low + high) / 2).clamp_min(0).pow(1 / (alpha - 1))
        p = p / p.sum()
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p.to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (p,) = ctx.saved_tensors
        s = torch.where(p > 0, p.pow(2 - ctx.alpha), 0)
        wide_grad = grad.double()
        return (s * (wide_grad - (s @ wide_grad) / s.sum())).to(grad.dtype), None
