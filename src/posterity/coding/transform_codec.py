"""A small learned codec for images of one size: principal components, whole numbers, tables, a synthesis network.

``c = round(V^T (x - mean) / step)`` are the symbols, coded by a table each; the network turns ``step c`` back into
an image and is trained on the mean squared error, so that it comes to the mean of the images behind these symbols.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity._files import seal, unseal
from posterity._models import resize_buffers
from posterity._precision import wide
from posterity._random import draw_device
from posterity._tables import integer_tables
from posterity.coding._stacks import Rows, stack, words

__all__ = ["TransformCodec"]

MARK, VERSION = b"PTRC", 2  # the first version's checksum leaves the center out
HEADER = struct.Struct("<IQ")
PRECISION = 16
BATCH = 64
LONGEST = 2**16 - 2  # symbols of a component


class TransformCodec(nn.Module):
    """A lossy codec with a mean squared error that training makes small, and a differentiable `reconstruct`.

    Parameters
    ----------
    shape : sequence of int
        Of one image, as (channels, height, width).
    n_latents : int, default=6
        Principal components that are kept, at most the number of pixels.
    step : float, default=1.5
        Of the rounding, in units of the pixels; larger is smaller files.
    hidden : int, default=128
        Units of the synthesis network.

    Raises
    ------
    ValueError
        If a number is out of range, or images do not fit.

    Notes
    -----
    Images may have any range; `IdempotentCodec` wants [-1, 1]. Coding needs ``pip install "posterity[coding]"``.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import TransformCodec
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(64, 1, 4, 4, generator=rng)
    >>> codec = TransformCodec((1, 4, 4), n_latents=3, step=1.0).fit(x, n_steps=20, generator=rng)
    >>> data = codec.compress(x[:5])
    >>> len(data) < 50, torch.equal(codec.decompress(data), codec.reconstruct(x[:5]))
    (True, True)
    """

    center: Tensor
    components: Tensor
    low: Tensor
    freqs: Tensor

    def __init__(
        self, shape: Sequence[int], n_latents: int = 6, *, step: float = 1.5, hidden: int = 128
    ) -> None:
        super().__init__()
        self.shape = tuple(integer("shape", size, 1) for size in shape)
        if not self.shape:
            raise ValueError("shape must have at least one size, got none")
        d = math.prod(self.shape)
        self.n_latents = integer("n_latents", n_latents, 1)
        if n_latents > d:
            raise ValueError(f"n_latents must be at most the {d} pixels, got {n_latents}")
        self.step = float(at_least("step", step, 0, strict=True))
        integer("hidden", hidden, 1)
        self.register_buffer("center", torch.zeros(d))
        self.register_buffer("components", torch.zeros(d, n_latents))
        self.register_buffer("low", torch.zeros(n_latents, dtype=torch.int64))  # smallest symbol of each
        self.register_buffer("freqs", torch.zeros(n_latents, 0, dtype=torch.int64))
        self.synthesis = nn.Sequential(
            nn.Linear(n_latents, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, d),
        )

    @torch.inference_mode(False)
    def fit(
        self, x: Float[Tensor, " n *shape"], n_steps: int = 800, *, lr: float = 2e-3, generator: torch.Generator | None = None
    ) -> "TransformCodec":  # fmt: skip
        """Fit components, tables and network in place.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            At least two images.
        n_steps : int, default=800
            Of Adam with batches of 64, its rate falling to 0 along a cosine.
        lr : float, default=2e-3
        generator : torch.Generator, optional
            Of the initial weights and the batches.

        Returns
        -------
        TransformCodec
            Itself.
        """
        integer("n_steps", n_steps, 0)
        at_least("lr", lr, 0, strict=True)
        flat = finite("x", self._checked(x)).detach().clone().flatten(1)
        if len(flat) < 2:
            raise ValueError(f"x must have at least 2 images, got {len(flat)}")
        own = self.center.dtype
        centered = flat.double() - flat.double().mean(0)
        self.center = flat.double().mean(0).to(own)
        rest = self.n_latents - min(centered.shape)  # fewer images than components: some are 0
        axes = torch.linalg.svd(centered, full_matrices=False)[2][: self.n_latents].mT
        self.components = F.pad(axes, (0, max(rest, 0))).to(own)
        symbols = self._symbols(flat.to(own))
        self._tabulate(symbols)
        self._start(generator)
        center = wide(self.center)  # Adam's steps vanish in narrow types, or divide by 0
        self.synthesis.to(center.dtype)
        q, flat = symbols.to(center.dtype) * self.step, flat.to(center.dtype)
        adam = torch.optim.Adam(self.synthesis.parameters(), lr=lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(n_steps, 1))
        device = draw_device(generator)
        with torch.enable_grad():
            for _ in range(n_steps):
                rows = torch.randint(len(q), (min(BATCH, len(q)),), generator=generator, device=device).to(
                    q.device
                )
                adam.zero_grad()
                F.mse_loss(center + self.synthesis(q[rows]), flat[rows]).backward()
                adam.step()
                falling.step()
        adam.zero_grad()
        self.synthesis.to(own)
        return self

    def symbols(self, x: Float[Tensor, " n *shape"]) -> Int[Tensor, "n latents"]:
        """Return the whole numbers that are stored of images.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)

        Returns
        -------
        Tensor of shape (n, n_latents), int64
        """
        self._ready()
        return self._symbols(finite("x", self._checked(x)).detach().to(self.center).flatten(1), bounded=True)

    def reconstruct(self, x: Float[Tensor, " n *shape"]) -> Float[Tensor, " n *shape"]:
        """Return what `decompress` makes of `compress`; the gradient passes the rounding straight through.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)

        Returns
        -------
        Tensor of shape (n, *shape)
        """
        self._ready()
        flat = self._checked(x).to(self.center.dtype).flatten(1)
        latent = (flat - self.center) @ self.components / self.step
        rounded = self._symbols(flat.detach(), bounded=True).to(latent.dtype)
        # the sum of a number and its complement is off in the last digit, and decoding must not be
        return self._synthesise(_straight(latent, rounded)).reshape(x.shape).to(x.dtype)

    def compress(self, x: Float[Tensor, " n *shape"]) -> bytes:
        """Return images as bytes.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            Finite.

        Returns
        -------
        bytes
            With version, checksum and the mark of this codec's tables.
        """
        symbols = (self.symbols(x) - self.low).cpu().numpy()
        coder, table = stack(), self._rows()
        table.push(coder, symbols.T.reshape(-1), np.repeat(np.arange(self.n_latents), len(symbols)))
        return seal(MARK, HEADER.pack(len(symbols), self._checksum(table)) + words(coder), VERSION)

    @torch.no_grad()
    def decompress(self, data: bytes) -> Float[Tensor, " n *shape"]:
        """Return the images of `compress`.

        Parameters
        ----------
        data : bytes

        Returns
        -------
        Tensor of shape (n, *shape)

        Raises
        ------
        ValueError
            If data are cut, damaged, or of another codec.
        """
        symbols = self.read_symbols(data)
        return self._synthesise(symbols.to(self.center.dtype)).reshape(len(symbols), *self.shape)

    def read_symbols(self, data: bytes) -> Int[Tensor, "n latents"]:
        """Return the whole numbers in bytes.

        Parameters
        ----------
        data : bytes
            As for `decompress`.

        Returns
        -------
        Tensor of shape (n, n_latents), int64
        """
        first = isinstance(data, bytes | bytearray | memoryview) and bytes(data[5:6]) == b"\1"
        version = 1 if first else VERSION
        payload = unseal(MARK, data, version)
        if len(payload) < HEADER.size:
            raise ValueError("data must have a header, got less")
        n, checksum = HEADER.unpack_from(payload)
        table = self._rows()
        if checksum != self._checksum(table, version):
            raise ValueError("data must be of this codec, got those of another: its tables or network differ")
        coder = stack(payload[HEADER.size :], (n * self.n_latents, table.least))
        found = table.pop(coder, np.repeat(np.arange(self.n_latents), n)).reshape(self.n_latents, n)
        return torch.from_numpy(found.T.astype(np.int64)).to(self.low.device) + self.low

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, ["freqs"], state_dict, prefix)  # as long as the data made it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checked(self, x: Tensor) -> Tensor:
        return has_shape("x", floating("x", x, "scale images first"), (None, *self.shape), "the codec")

    def _ready(self) -> None:
        if not self.freqs.numel():
            raise ValueError("codec must be fitted first: call fit")

    def _symbols(self, flat: Tensor, bounded: bool = False) -> Tensor:
        latent = ((wide(flat) - wide(self.center)) @ wide(self.components) / self.step).nan_to_num()
        symbols = torch.round(latent.clamp(-(2**30), 2**30)).long()
        if not bounded:
            return symbols
        size = (self.freqs > 0).sum(1)
        return torch.minimum(torch.maximum(symbols, self.low), self.low + size - 1)

    def _tabulate(self, symbols: Tensor) -> None:
        """Count symbols; two more on either side may come, and what is beyond is moved to the last."""
        low, high = symbols.amin(0) - 2, symbols.amax(0) + 2
        longest = int((high - low).max()) + 1
        if longest > LONGEST // 2:
            raise ValueError(f"step must be larger, got {self.step}: a component has {longest} symbols")
        counts = torch.zeros(self.n_latents, longest, dtype=torch.float64)
        for k in range(self.n_latents):
            counts[k] = torch.bincount((symbols[:, k] - low[k]).cpu(), minlength=longest).double()
        freqs = np.zeros(counts.shape, np.int64)
        for k, size in enumerate((high - low + 1).tolist()):
            freqs[k, :size] = integer_tables(counts[k, :size].numpy() + 0.5, PRECISION)
        self.low, self.freqs = low, torch.from_numpy(freqs).to(low.device)

    def _rows(self) -> Rows:
        self._ready()
        return Rows(self.freqs.cpu().numpy(), PRECISION)

    def _checksum(self, table: Rows, version: int = VERSION) -> int:
        """Return a mark of everything that decoding depends on."""
        parts = [*self.synthesis.parameters(), *([self.center] if version > 1 else [])]
        net = b"".join(p.detach().cpu().float().numpy().tobytes() for p in parts)
        rest = np.concatenate([self.low.cpu().numpy(), self.shape]).astype("<i8").tobytes()
        return table.checksum() << 32 | zlib.crc32(net + rest + struct.pack("<d", self.step))

    def _start(self, generator: torch.Generator | None) -> None:
        device = draw_device(generator)
        for layer in self.synthesis:
            if isinstance(layer, nn.Linear):
                for p in (layer.weight, layer.bias):
                    drawn = torch.rand(p.shape, generator=generator, device=device).to(p)
                    p.data = (2 * drawn - 1) / math.sqrt(layer.in_features)

    def _synthesise(self, symbols: Tensor) -> Tensor:
        return self.center + self.synthesis(symbols * self.step)


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` to the last digit, with the gradient of ``x``."""
    return _Straight.apply(x, value)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
