"""Several cameras encode alone; one decoder uses all of their views.

Slepian and Wolf, and Wyner and Ziv: what correlated sources share need not be known where they are encoded, only where
they are decoded. So each camera runs the same encoder on its own image x_i and sends its quantised latents y_i; the
decoder's features of each view attend to those of the others (`view_transfer`), which needs neither the cameras' places
nor a match of pixels. With the entropy model p, of each view alone,

    loss = mean_i  -log2 p(y_i) / pixels  +  lmbda mean_i |x_i - decoder(y_1, ..., y_v)_i|^2 / dimensions        (1)

What one view's quantisation lost and another kept, and the noise that two cameras do not share, is what is won.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, floating, integer, one_of
from posterity._models import resize_buffers
from posterity._precision import wide
from posterity._random import draw_device
from posterity.coding._integers import UNIT
from posterity.coding._stacks import frequencies
from posterity.coding.view_streams import (
    GDN,
    PRECISION,
    SIDE,
    FrozenViews,
    Predictor,
    Window,
    gaussian_nats,
    mixture_log_p,
    plain_conv,
)
from posterity.coding.view_transfer import SLOPE, CausalContext, CheckerboardContext, JointContextTransfer

__all__ = ["LDMIC", "RateDistortion"]

MIXED = 3  # logistic distributions of a hyper-latent


class RateDistortion(NamedTuple):
    """What a batch of views costs.

    Attributes
    ----------
    loss : Tensor
        Bits a pixel plus ``lmbda`` times the distortion: a scalar to minimise.
    bpp : Tensor
        Bits a pixel, the mean over views.
    distortion : Tensor
        Mean squared error, before values are clamped.
    per_view_bpp : Tensor of shape (n, v)
    reconstruction : Tensor of shape (n, v, c, h, w)
        Not clamped.
    """

    loss: Tensor
    bpp: Tensor
    distortion: Tensor
    per_view_bpp: Tensor
    reconstruction: Tensor


class LDMIC(nn.Module):
    """Codec of several views: independent encoders, a joint decoder.

    Train it on ``codec(views).loss``, by Adam with gradients clipped at norm 1; then `freeze`, `compress_view` at each
    camera and `decompress` where all streams arrive. The state_dict after `freeze` is all that both ends need.

    Parameters
    ----------
    in_channels : int, default=3
        Of the images: 1 for grey, 3 for colours.
    hidden, latent : int, default=128 and 192
        Channels inside and of the latents, for a joint codec multiples of 16: of 16 each head has one key, that is,
        a mean of the other view.
    downsample : int, default=16
        Pixels of a latent place, along a side: a power of two, at least 2. Other sizes are padded inside.
    context : {"none", "checkerboard", "autoregressive"}, default="checkerboard"
        What a latent is predicted by, beside the hyperprior: nothing, the other half of the grid (two passes), or all
        that stands before it, one place after the other, which is slow both ways.
    joint : bool, default=True
        Whether views are decoded together. False is the same network without the transfer between them.

    Raises
    ------
    ValueError
        If a size is out of range.

    Notes
    -----
    Departures from the official code:

    1. Files are coded by networks in integers, which `freeze` rounds; a scale is one of 64, a symbol at most 1,023 in
       magnitude. The decoder of pixels stays in floats and may be trained further without a new freeze.
    2. Hyper-latents have a mixture of logistic distributions, without quantiles and their second optimiser.
    3. A scale is 0.11 plus the softplus of the network's output, whose gradient does not end at 0.11.
    4. With two upsampling stages the second transfer stands after the first of them, with one there is none.
    5. Distortion is the squared error; MS-SSIM is left out.

    References
    ----------
    .. [1] Zhang, Shao, Zhang. LDMIC: Learning-based Distributed Multi-view Image Coding. ICLR 2023.
    .. [2] Minnen, Ballé, Toderici. Joint Autoregressive and Hierarchical Priors for Learned Image Compression. NeurIPS 2018.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import LDMIC
    >>> codec = LDMIC(hidden=16, latent=16, downsample=4).eval().freeze()  # train it first
    >>> views = torch.rand(1, 2, 3, 20, 30)  # two cameras
    >>> streams = [codec.compress_view(views[:, i]) for i in range(2)]  # each at its own camera
    >>> codec.decompress(streams).shape, codec.decompress(streams[:1]).shape  # one camera is missing
    (torch.Size([1, 2, 3, 20, 30]), torch.Size([1, 1, 3, 20, 30]))
    """

    freqs: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        *,
        hidden: int = 128,
        latent: int = 192,
        downsample: int = 16,
        context: Literal["none", "checkerboard", "autoregressive"] = "checkerboard",
        joint: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        integer("hidden", hidden, 1)
        self.latent = integer("latent", latent, 1)
        self.downsample = integer("downsample", downsample, 2)
        if downsample & (downsample - 1):
            raise ValueError(f"downsample must be a power of two, got {downsample}")
        self.context_kind = one_of("context", context, ("none", "checkerboard", "autoregressive"))
        for name, size in (("hidden", hidden), ("latent", latent)):
            if joint and size % 16:
                raise ValueError(f"{name} must be a multiple of 16 for a joint decoder, got {size}")
        stages = downsample.bit_length() - 1
        widths = [in_channels, *[hidden] * (stages - 1), latent]
        encoder: list[nn.Module] = []
        for c, out in zip(widths, widths[1:], strict=False):
            encoder += [_down(c, out), GDN(out)]
        self.encoder = nn.Sequential(*encoder[:-1])
        self.decoder = nn.ModuleList(
            nn.Sequential(_up(c, out), *[GDN(out, inverse=True)] * (stage < stages - 1))
            for stage, (c, out) in enumerate(zip(widths[::-1], widths[-2::-1], strict=False))
        )
        places = ([0, min(2, stages - 1)] if stages > 1 else [0]) if joint else []
        self.transfers = nn.ModuleDict({str(at): JointContextTransfer(widths[-1 - at]) for at in places})
        leaky = nn.LeakyReLU(SLOPE)
        self.hyper_encoder = nn.Sequential(
            nn.Conv2d(latent, hidden, 3, padding=1), leaky, _down(hidden, hidden), leaky, _down(hidden, hidden)
        )  # fmt: skip
        self.hyper_decoder = nn.Sequential(
            _up(hidden, latent), leaky, _up(latent, 3 * latent // 2), leaky, nn.Conv2d(3 * latent // 2, 2 * latent, 3, padding=1)
        )  # fmt: skip
        self.mixture = nn.Parameter(torch.zeros(3, MIXED, hidden))  # logits, centres and log scales
        nn.init.normal_(self.mixture[1], std=1.0)
        self.context: CheckerboardContext | CausalContext | None = None
        self.parameters_of: nn.Sequential | None = None
        if context != "none":
            kind = CheckerboardContext if context == "checkerboard" else CausalContext
            self.context = kind(latent, 2 * latent, 5)
            steps = [4 * latent, 10 * latent // 3, 8 * latent // 3, 2 * latent]
            self.parameters_of = nn.Sequential(
                nn.Conv2d(steps[0], steps[1], 1), leaky, nn.Conv2d(steps[1], steps[2], 1), leaky, nn.Conv2d(steps[2], steps[3], 1)
            )  # fmt: skip
        self.register_buffer("freqs", torch.zeros(0, dtype=torch.int32))  # of hyper-latents, once frozen
        self._tools: FrozenViews | None = None

    def forward(
        self, views: Float[Tensor, "n v c h w"], lmbda: float = 1024.0, *, generator: torch.Generator | None = None
    ) -> RateDistortion:  # fmt: skip
        """Return what views cost, equation 1.

        In training rounding is uniform noise where bits are counted, and passes gradients straight through to the
        decoder. In eval mode it is rounding; a frozen codec then has the latents of its files, without a gradient.

        Parameters
        ----------
        views : Tensor of shape (n, v, in_channels, h, w)
            In [0, 1].
        lmbda : float, default=1024.0
            Bits a pixel that a mean squared error of 1 is worth. Positive.
        generator : torch.Generator, optional
            For the noise.

        Returns
        -------
        RateDistortion
        """
        at_least("lmbda", lmbda, 0, strict=True)
        self._check("views", views, 5, values=views.device.type == "cpu" if isinstance(views, Tensor) else True)  # fmt: skip
        nats, y = self._coded(views.flatten(0, 1), generator)
        n, v, _, h, w = views.shape
        found = self.reconstruct(y.unflatten(0, (n, v)))[..., :h, :w]
        bits = nats.reshape(n, v) / (math.log(2) * h * w)
        distortion = (wide(found) - views.to(wide(found).dtype)).square().mean()
        bpp = bits.mean()
        return RateDistortion(bpp + lmbda * distortion, bpp, distortion, bits, found)

    @torch.no_grad()
    def latents(self, views: Float[Tensor, "n v c h w"]) -> Float[Tensor, "n v latent gh gw"]:
        """Return quantised latents: those of the streams, if the codec is frozen.

        Parameters
        ----------
        views : Tensor of shape (n, v, in_channels, h, w)
            In [0, 1].

        Returns
        -------
        Tensor of shape (n, v, latent, ceil(h / downsample), ceil(w / downsample))
        """
        self._check("views", views, 5)
        x = views.flatten(0, 1)
        y = self._in_units(self._frozen("views").latents(self._padded(x))[0]) if self._is_frozen else self._floats(x, None)[1]  # fmt: skip
        return y.unflatten(0, views.shape[:2])

    def reconstruct(self, latents: Float[Tensor, "n v latent gh gw"]) -> Float[Tensor, "n v c h w"]:
        """Return the images of latents, decoded together; differentiable.

        Parameters
        ----------
        latents : Tensor of shape (n, v, latent, gh, gw)
            As of `latents` or `decode_latents`; any number of views.

        Returns
        -------
        Tensor of shape (n, v, in_channels, downsample * gh, downsample * gw)
            Neither cropped nor clamped.
        """
        if floating("latents", latents).ndim != 5 or latents.shape[2] != self.latent or not latents.numel():
            raise ValueError(f"latents must have shape (n, v, {self.latent}, h, w), got {tuple(latents.shape)}")  # fmt: skip
        x = latents.to(self.mixture.dtype).flatten(0, 1)
        for stage, layers in enumerate(self.decoder):
            if str(stage) in self.transfers:
                x = self.transfers[str(stage)](x.unflatten(0, latents.shape[:2])).flatten(0, 1)
            x = layers(x)
        return x.unflatten(0, latents.shape[:2])

    @torch.no_grad()
    def freeze(self) -> "LDMIC":
        """Fix the integer networks and tables by which views are coded; `forward` in training mode undoes it.

        Returns
        -------
        LDMIC
            Itself, with the table of hyper-latents in its ``state_dict``.

        Raises
        ------
        ValueError
            If weights are not finite or too large for exact sums.
        """
        every = torch.arange(-SIDE, SIDE + 1, dtype=torch.float64)[:, None]
        probs = self._hyper_log_p(every.expand(-1, self.mixture.shape[2])[..., None, None], torch.float64)
        probs = probs.exp()[..., 0, 0].mT.cpu().numpy()
        if not np.isfinite(probs).all():
            raise ValueError("codec must have finite weights before freeze, got NaN or infinity")
        self.freqs = torch.from_numpy(frequencies(probs, PRECISION)).to(self.freqs.device)
        self._tools = None
        self._frozen("codec")
        return self

    @torch.no_grad()
    def compress_view(self, x: Float[Tensor, "n c h w"]) -> bytes:
        """Return one camera's images as bytes, the same at any number of threads.

        Parameters
        ----------
        x : Tensor of shape (n, in_channels, h, w)
            In [0, 1], of any size.

        Returns
        -------
        bytes
            With version, shape, and checksums of the model and the latents.
        """
        tools = self._frozen("x")
        self._check("x", x, 4)
        return tools.write(self._padded(x), (len(x), *x.shape[2:]))

    def compress(self, views: Float[Tensor, "n v c h w"]) -> list[bytes]:
        """Return a stream for each view, ``compress_view(views[:, i])``.

        Parameters
        ----------
        views : Tensor of shape (n, v, in_channels, h, w)
            In [0, 1].

        Returns
        -------
        list of bytes
        """
        self._frozen("views")
        self._check("views", views, 5)
        return [self.compress_view(x) for x in views.unbind(1)]

    @torch.no_grad()
    def decode_latents(self, streams: Sequence[bytes]) -> Float[Tensor, "n v latent gh gw"]:
        """Return the latents in streams, exactly those of `latents`.

        Parameters
        ----------
        streams : sequence of bytes
            One a view, in any number and order. Safe to read from elsewhere.

        Returns
        -------
        Tensor of shape (n, v, latent, gh, gw)

        Raises
        ------
        ValueError
            If there is none, their images differ in size, or one is cut, damaged, of another kind, version or codec.
        """
        return self._read(streams)[0]

    @torch.no_grad()
    def decompress(self, streams: Sequence[bytes]) -> Float[Tensor, "n v c h w"]:
        """Return the images of streams, decoded together.

        Parameters
        ----------
        streams : sequence of bytes
            As for `decode_latents`. A camera that is missing is left out; one alone is decoded alone.

        Returns
        -------
        Tensor of shape (n, v, in_channels, h, w)
            In [0, 1].
        """
        y, (_, h, w) = self._read(streams)
        return self.reconstruct(y)[..., :h, :w].clamp(0, 1)

    def _read(self, streams: Sequence[bytes]) -> tuple[Tensor, tuple[int, ...]]:
        tools = self._frozen("streams")
        if isinstance(streams, bytes | bytearray | memoryview | str) or not isinstance(streams, Sequence):
            raise ValueError(f"streams must be a sequence of bytes, one a view, got {type(streams).__name__}")
        if not streams:
            raise ValueError("streams must have at least one view, got none")
        found = [tools.read(data, f"streams[{i}]", self.latent, self.downsample) for i, data in enumerate(streams)]  # fmt: skip
        for i, (_, shape) in enumerate(found):
            if shape != found[0][1]:
                raise ValueError(f"streams must have images of one (n, h, w), got {found[0][1]} and, of streams[{i}], {shape}")  # fmt: skip
        return self._in_units(torch.stack([y for y, _ in found], 1)), found[0][1]

    def _coded(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the nats of images (m,) and their latents."""
        if self.training:
            self.freqs, self._tools = self.freqs[:0], None  # what is frozen is about to be old
        if not self._is_frozen:
            return self._floats(x, generator)
        tools = self._frozen("views")
        y, z, kept = tools.latents(self._padded(x))
        bits = torch.from_numpy(tools.bits(z, kept)).to(self.mixture.device, wide(self.mixture).dtype)
        return math.log(2) * bits, self._in_units(y)

    def _floats(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return nats and latents by networks in floats."""
        y = wide(self.encoder(self._padded(x).to(x.device, self.mixture.dtype)))
        z = wide(self.hyper_encoder(y.to(self.mixture.dtype)))
        seen_y, seen_z = (_noised(part, generator) if self.training else _rounded(part) for part in (y, z))
        hyper = self.hyper_decoder(seen_z.to(self.mixture.dtype))[..., : y.shape[2], : y.shape[3]]
        if self.context_kind == "checkerboard":
            mean, _ = self._predicted(hyper, None)
            known = _rounded(y - mean) + mean  # right at anchors, and what else it is nobody sees
        elif self.context_kind == "none" or self.training:
            known = seen_y
        else:
            own = self._seen()
            seen = None if own is None else Window.of(own, whole=False)
            walk = Predictor(self.context_kind, seen, self.parameters_of, 1.0).walk
            known = walk(hyper, lambda mean, _, pick: torch.round(pick(y) - mean))
        mean, raw = self._predicted(hyper, known)
        away = _rounded(y - mean)
        nats = gaussian_nats(seen_y - mean if self.training else away, raw)
        return nats - self._hyper_log_p(seen_z).flatten(1).sum(1), away + mean

    def _predicted(self, hyper: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and raw scale of each latent, of the hyperprior and what the context sees of known ones."""
        if self.context is not None and self.parameters_of is not None:
            seen = torch.zeros_like(hyper) if known is None else self.context(known.to(hyper.dtype))
            hyper = self.parameters_of(torch.cat([seen.to(hyper.dtype), hyper], 1))
        mean, raw = wide(hyper).chunk(2, 1)
        return mean, raw

    def _seen(self) -> nn.Conv2d | None:
        """Return the context as a plain convolution without padding."""
        if self.context is None:
            return None
        return plain_conv(self.context.weight * self.context.mask, self.context.bias)

    def _hyper_log_p(self, z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the log-probability of the unit interval about each hyper-latent (m, hidden, h, w)."""
        return mixture_log_p(z.to(self.mixture.device), self.mixture.to(dtype or wide(self.mixture).dtype))

    @property
    def _is_frozen(self) -> bool:
        return self.freqs.numel() > 0

    def _frozen(self, name: str) -> FrozenViews:
        """Return what codes in integers, made of the weights when it is first asked for."""
        if not self._is_frozen:
            raise ValueError(
                f"{name} must come to a frozen codec, got one that is not: call freeze() after training"
            )
        tools = self._tools
        if tools is None:
            about = (self.in_channels, self.latent, self.downsample)
            with torch.no_grad():
                encoder, hyper_encoder, hyper_decoder, seen, parameters = (
                    _on_cpu(net) for net in (self.encoder, self.hyper_encoder, self.hyper_decoder, self._seen(), self.parameters_of)
                )  # fmt: skip
                tools = self._tools = FrozenViews.of(
                    encoder, hyper_encoder, hyper_decoder, self.context_kind, seen, parameters, self.freqs.cpu().numpy(), about
                )  # fmt: skip
        return tools

    def _in_units(self, y: Tensor) -> Tensor:
        """Return integers as the numbers that they stand for, which float32 holds exactly."""
        return (y / UNIT).to(self.mixture.device, wide(self.mixture).dtype)

    def _check(self, name: str, x: Any, n_axes: int, *, values: bool = True) -> None:
        floating(name, x, "scale images to [0, 1]")
        axes = "(n, v, {}, h, w)" if n_axes == 5 else "(n, {}, h, w)"
        if x.ndim != n_axes or x.shape[-3] != self.in_channels or not x.numel():
            raise ValueError(f"{name} must have shape {axes.format(self.in_channels)} and pixels, got {tuple(x.shape)}")  # fmt: skip
        if values:
            low, high = (float(end) for end in x.detach().aminmax())
            if not (low >= 0 and high <= 1):  # NaN is not
                raise ValueError(f"{name} must be in [0, 1], got values from {low:g} to {high:g}")

    def _padded(self, x: Tensor) -> Tensor:
        """Return images with their last row and column repeated up to a multiple of the latent places."""
        down, right = (-side % self.downsample for side in x.shape[2:])
        return F.pad(x.double() if self._is_frozen else wide(x), (0, right, 0, down), mode="replicate")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, ["freqs"], state_dict, prefix)
        self._tools = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _down(c: int, out: int) -> nn.Conv2d:
    """Return a convolution that halves each side, and keeps the size of numbers that pass it."""
    return _started(nn.Conv2d(c, out, 5, stride=2, padding=2), 25 * c)


def _up(c: int, out: int) -> nn.ConvTranspose2d:
    return _started(nn.ConvTranspose2d(c, out, 5, stride=2, padding=2, output_padding=1), 25 * c / 4)


def _started(conv: Any, inputs: float) -> Any:
    nn.init.normal_(conv.weight, std=inputs**-0.5)
    nn.init.zeros_(conv.bias)
    return conv


def _noised(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = draw_device(generator, x.device)
    return x + (torch.rand(x.shape, dtype=x.dtype, generator=generator, device=device) - 0.5).to(x.device)


def _rounded(x: Tensor) -> Tensor:
    """Return whole numbers, with the gradient of what they are near."""
    return x + (torch.round(x) - x).detach()


def _on_cpu(net: Any) -> Any:
    return None if net is None else copy.deepcopy(net).cpu().double()
