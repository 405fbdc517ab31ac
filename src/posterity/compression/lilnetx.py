"""LilNetX: train a network to a small file and a sparse one, in a single run.

Each weight of a Linear or Conv layer is held as a real latent V of its shape, and used as

    W = round(V) D                                                                                            (1)

row by row: a row is one (out, in) slice, the K entries of a kernel, and D (K, K) is learned, one for all layers of a
kernel size. Gradients pass the rounding as if it were not there. Three terms then make one loss:

    loss = criterion + lambda_rate * bits of round(V) + lambda_slice * sum of ||V_slice||.                     (2)

The bits are those of a learned density (`FactorizedPrior`), with noise in place of the rounding; they pull latents
together, mostly to zero, so that an entropy coder makes a small file. The norm empties whole kernels, which a decoder
without shift keeps exactly zero, so that what remains also runs faster.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from posterity._checks import at_least, floating, has_shape, one_of
from posterity._files import pack_tensors, restored, seal, unpack_tensors, unseal
from posterity._precision import wide
from posterity._random import draw_device
from posterity.compression._layers import weight_places, weighted_layers
from posterity.compression.latent_prior import FactorizedPrior, decoded, encoded, masses, slice_norm
from posterity.compression.zero_channels import without_zero_channels

__all__ = ["LatentNet"]

MARK = b"PLNX"
Contents = tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]


class LatentNet(nn.Module):
    """A copy of a network whose Linear and Conv weights are decoded from integers, to be trained and then saved.

    Train it as any network, with ``lambda_rate * rate_loss() + lambda_slice * slice_loss()`` in the loss and an
    optimiser for `network_parameters` and one for `prior_parameters`; then take `to_plain` or `to_compact`, and
    `compress`. A latent must be able to travel: the number of steps times the learning rate well over ``boundary``,
    else the rate seems to do nothing. In runs of some hundred steps take Adam at 5e-2, and 1e-2 for the density.

    Parameters
    ----------
    net : nn.Module
        Any network; it is copied. Biases, norms and everything else stay as they are.
    start : {"random", "weights"}, default="random"
        "random" draws latents and decoders anew, so that weights have the variance 2 / fan-out. "weights" begins at
        the weights of ``net``, rounded.
    boundary : float, default=3.0
        The largest initial latent, positive: of the layer of most outputs, or with "weights" of the largest weight.
    step : float, optional
        With "weights": the weight of one latent unit, positive, in place of the largest weight over ``boundary``.
    layers : sequence of str, optional
        Names of Linear and Conv layers; by default all. Those that are to stay as they are, name not.
    generator : torch.Generator, optional
        Draws the start; by default torch's global one.

    Raises
    ------
    ValueError
        If ``net`` has no Linear or Conv layer, is wrapped already, or has weights that are complex or, with
        "weights", not finite; if a layer is unknown, or ``boundary`` or ``step`` not positive.

    Notes
    -----
    1. Random latents are uniform on +-(B + 1/2), the official ones on +-B: rounded, these miss the variance that both
       aim at by a fifth.
    2. A random decoder is scaled to the norm that gives the weights this variance: the official draw is K times too
       large for it, and for a kernel of one entry may come near 0, which kills the layer.
    3. The latents' dtype is that of the weights; decoders compute in float32 at least, outside autocast.

    References
    ----------
    .. [1] Girish, Gupta, Singh, Shrivastava. LilNetX: Lightweight Networks with EXtreme Model Compression and
       Structured Sparsification. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import LatentNet
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> lat = LatentNet(net, generator=torch.Generator().manual_seed(0))
    >>> loss = lat(torch.ones(4, 8)).square().mean() + 1e-4 * lat.rate_loss() + 1e-6 * lat.slice_loss()
    >>> loss.backward()
    >>> data = lat.compress()
    >>> small = LatentNet.decompress(net, data)
    >>> torch.equal(small[0].weight, lat.to_plain()[0].weight)
    True
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        start: Literal["random", "weights"] = "random",
        boundary: float = 3.0,
        step: float | None = None,
        layers: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        one_of("start", start, ("random", "weights"))
        at_least("boundary", boundary, 0, strict=True)
        if step is not None:
            at_least("step", step, 0, strict=True)
            if start == "random":
                raise ValueError(
                    f"step must be None with start='random', got {step}: boundary sets the spread"
                )
        super().__init__()
        found = _layers(net, layers, finite_only=start == "weights")
        self.net = copy.deepcopy(net)
        self._groups: dict[str, list[str]] = {}
        for name, weight in found.items():
            self._groups.setdefault(_group(weight), []).append(name)
        places = weight_places(net, weighted_layers(net, layers))
        self._held = {name: places[name] for name in found}
        self.decoders, self.priors = nn.ParameterDict(), nn.ModuleDict()
        for group, names in self._groups.items():
            weights = [wide(found[name].detach()) for name in names]
            k = weights[0][0, 0].numel()
            if start == "weights":
                largest = max(float(weight.abs().max()) for weight in weights)
                unit = step or largest / boundary or 1.0
                decoder, latents = unit * torch.eye(k).to(weights[0]), [weight / unit for weight in weights]
            else:
                decoder, latents = _random_start(weights, boundary, generator)
            self.decoders[group] = nn.Parameter(decoder)
            self.priors[group] = FactorizedPrior(k, generator=generator).to(decoder)
            for name, latent in zip(names, latents, strict=True):
                with torch.no_grad():
                    self._latent(name).requires_grad_(True).copy_(latent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network says with its decoded weights, in training and evaluation alike."""
        weights = {}
        for group, names in self._groups.items():
            decoder = self.decoders[group]
            with torch.autocast(decoder.device.type, enabled=False):
                rows = _rounded(self._rows(group))
                sizes = [self._latent(name).numel() // len(decoder) for name in names]
                dense = (rows @ wide(decoder)).split(sizes)
            for name, part in zip(names, dense, strict=True):
                latent = self._latent(name)
                weights.update(dict.fromkeys(self._held[name], part.view(latent.shape).to(latent.dtype)))
        return functional_call(self.net, weights, args, kwargs, tie_weights=False)

    def rate_loss(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the bits of all latents over the number of slices, a scalar.

        Latents carry uniform noise on (-1/2, 1/2) in training mode, drawn by ``generator`` or torch's global one, and
        are rounded in eval mode.
        """
        total, n = torch.zeros((), device=self.decoders[next(iter(self._groups))].device), 0
        for group in self._groups:
            with torch.autocast(total.device.type, enabled=False):
                rows = self._rows(group)
                if self.training:
                    noise = torch.rand(rows.shape, dtype=rows.dtype, generator=generator,
                                       device=draw_device(generator, rows.device))  # fmt: skip
                    rows = rows + (noise.to(rows.device) - 0.5)
                else:
                    rows = _rounded(rows)
                total = total + self.priors[group].bits(rows).sum()  # type: ignore[operator]
            n += len(rows)
        return total / n

    def slice_loss(self) -> Tensor:
        """Return the sum of `slice_norm` over the latents of layers with kernels larger than 1, a scalar."""
        total = torch.zeros((), device=self.decoders[next(iter(self._groups))].device)
        for group in self._groups:
            if len(self.decoders[group]) > 1:
                with torch.autocast(total.device.type, enabled=False):
                    total = total + slice_norm(self._rows(group)[None])
        return total

    def network_parameters(self) -> list[nn.Parameter]:
        """Return latents, decoders and all other parameters of the network, for one optimiser."""
        return [*self.net.parameters(), *self.decoders.values()]

    def prior_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the densities, for another optimiser."""
        return list(self.priors.parameters())

    def latents(self) -> dict[str, nn.Parameter]:
        """Return the latents by layer, unrounded, in the shape of its weight: the parameters themselves."""
        return {name: self._latent(name) for name in self._held}

    def decoder(self, layer: str) -> Tensor:
        """Return the decoder of a layer, the parameter itself: (K, K), K the entries of a kernel, 1 for Linear."""
        one_of("layer", layer, tuple(self._held))
        return self.decoders[_group(self._latent(layer))]

    def sparsity(self) -> dict[str, float]:
        """Return the zero shares of rounded latents.

        Returns
        -------
        dict
            ``"weights"`` over all; ``"slices"``, ``"in_channels"`` and ``"out_channels"`` over the layers with kernels
            larger than 1, 0 where there are none.
        """
        zeros: dict[str, int] = dict.fromkeys(("weights", "slices", "in_channels", "out_channels"), 0)
        sizes = dict(zeros)
        for latent in self.latents().values():
            zero = latent.detach().round() == 0
            masks = {"weights": zero}
            if zero[0, 0].numel() > 1:
                empty = zero.flatten(2).all(2)
                masks |= {"slices": empty, "in_channels": empty.all(0), "out_channels": empty.all(1)}
            for what, mask in masks.items():
                zeros[what] += int(mask.sum())
                sizes[what] += mask.numel()
        return {what: zeros[what] / max(size, 1) for what, size in sizes.items()}

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return a network of the user's class with the decoded weights written in."""
        plain = copy.deepcopy(self.net)
        for group, names in self._groups.items():
            latents = [self._latent(name) for name in names]
            rows = torch.cat([_as_rows(latent.detach()) for latent in latents]).round().cpu()
            for name, weight in zip(names, _weights(rows, self.decoders[group], latents), strict=True):
                plain.get_parameter(self._held[name][0]).copy_(weight)
        return plain

    def to_compact(self) -> nn.Module:
        """Return `to_plain` with the zero input and output channels of each layer skipped: the same, with fewer MACs.

        Such a layer becomes a smaller one between two index operations, a ``torch.fx.GraphModule``, which runs and
        unpickles without Posterity. Plain stay grouped convolutions, layers with hooks, layers of classes of their own
        and those whose weight others use without calling the layer: tied ones and attention's. Code of your own
        that reads ``layer.weight`` finds none; name other ``layers`` for it.
        """
        lone = [name for name, held in self._held.items() if len(held) == 1]
        return without_zero_channels(self.to_plain(), lone)

    def compress(self) -> bytes:
        """Return the network as bytes: entropy-coded latents, decoders, and all other state as it is; no pickle.

        Raises
        ------
        ValueError
            If latents are not finite or lie outside int32.
        ModuleNotFoundError
            If constriction is missing.
        """
        return seal(MARK, pack_tensors(*self._contents()))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of `compress`: ``"latents"``, ``"tables"``, ``"decoders"`` and ``"other"``."""
        about, tensors, blobs = self._contents()
        size = {name: len(blob) for name, blob in blobs.items()}
        size["decoders"] = sum(d.numel() * d.element_size() for d in self.decoders.values())
        size["other"] = len(seal(MARK, pack_tensors(about, tensors, blobs))) - sum(size.values())
        return size

    @staticmethod
    def decompress(net: nn.Module, data: bytes) -> nn.Module:
        """Return a copy of a network with the state of a file: the weights of `to_plain`, on every machine.

        Parameters
        ----------
        net : nn.Module
            An instance of the user's class; not changed.
        data : bytes
            Of `compress`. Safe to read from elsewhere.

        Raises
        ------
        ValueError
            If data are cut, damaged, of another kind or version, or do not fit ``net``: the message names the tensor.
        ModuleNotFoundError
            If constriction is missing.
        """
        _not_wrapped(net)
        about, state, blobs = unpack_tensors(unseal(MARK, data))
        try:
            groups = _fitting(net, about["layers"])
            widths = [weights[0][0][0, 0].numel() for weights in groups.values()]
            lengths = [sum(weight.numel() for weight, _ in weights) // k
                       for weights, k in zip(groups.values(), widths, strict=True) for _ in range(k)]  # fmt: skip
            columns = iter(decoded(blobs["tables"], blobs["latents"], lengths))
            for (group, weights), k in zip(groups.items(), widths, strict=True):
                decoder = has_shape("decoder", floating("decoder", state.pop(f"decoder {group}")), (k, k))
                rows = torch.from_numpy(np.stack([next(columns) for _ in range(k)], 1))
                parts = _weights(rows, decoder, [weight for weight, _ in weights])
                for part, (_, keys) in zip(parts, weights, strict=True):
                    state |= dict.fromkeys(keys, part)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError, ValueError) as error:
            if str(error).startswith("data must fit"):
                raise
            raise ValueError(
                f"data must be a latent network, got one that cannot be read: {error!r}"
            ) from error
        return restored(net, state)

    def _latent(self, name: str) -> nn.Parameter:
        return self.net.get_parameter(self._held[name][0])

    def _rows(self, group: str) -> Tensor:
        """Return the latents of a group, (slices, K), in float32 at least."""
        rows = [_as_rows(wide(self._latent(name))) for name in self._groups[group]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _contents(self) -> Contents:
        """Return description, tensors and blobs of the file."""
        columns: list[np.ndarray] = []
        chances: list[tuple[int, np.ndarray] | None] = []
        for group, names in self._groups.items():
            parts = [_as_rows(self._integers(name)).T for name in names]
            lengths = [part.shape[1] for part in parts]
            held = torch.empty(len(parts[0]), sum(lengths), dtype=torch.int32)
            for place, part in zip(held.split(lengths, 1), parts, strict=True):
                place.copy_(part)
            columns += list(held.numpy())
            chances += masses(self.priors[group], held.numpy())  # type: ignore[arg-type]
        tables, stream = encoded(columns, chances)
        layers: dict[int, list[Any]] = {id(v): [list(v.shape)] for v in self.latents().values()}
        rest = {f"decoder {group}": decoder for group, decoder in self.decoders.items()}
        for key, value in self.net.state_dict(keep_vars=True).items():
            if id(value) in layers:
                layers[id(value)].append(key)
            else:
                rest[key] = value
        return {"layers": list(layers.values())}, rest, {"latents": stream, "tables": tables}

    def _integers(self, name: str) -> Tensor:
        """Return the rounded latents of a layer, which lie in int32, on the CPU."""
        latent = wide(self._latent(name).detach())
        largest = max(abs(float(end)) for end in latent.aminmax())
        if not math.isfinite(largest):
            raise ValueError(f"latents of {name!r} must be finite, got NaN or infinity")
        if largest >= 2**31 - 1:
            raise ValueError(f"latents of {name!r} must lie in int32, got {largest:g}")
        return latent.round().cpu()


def _not_wrapped(net: Any) -> None:
    if not isinstance(net, nn.Module):
        raise ValueError(f"net must be an nn.Module, got {type(net).__name__}")
    if any(isinstance(module, LatentNet) for module in net.modules()):
        raise ValueError(
            "net must not be wrapped, got a LatentNet: pass an instance of the class it was made of"
        )


def _layers(net: Any, layers: Sequence[str] | None, *, finite_only: bool) -> dict[str, Tensor]:
    """Return the weights that are to be decoded, by layer."""
    _not_wrapped(net)
    found: dict[str, Tensor] = {name: layer.weight for name, layer in weighted_layers(net, layers).items()}  # type: ignore[misc]
    found = {name: weight for name, weight in found.items() if weight.numel()}
    if not found:
        raise ValueError(f"net must have a layer with weights, got {type(net).__name__} with empty ones")
    for name, weight in found.items():
        if not weight.is_floating_point():
            raise ValueError(f"net must have real weights, got {weight.dtype} in {name!r}")
        if finite_only and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"net must have finite weights, got NaN or infinity in {name!r}")
    return found


def _fitting(net: nn.Module, layers: list[list[Any]]) -> dict[str, list[tuple[Tensor, list[str]]]]:
    """Return by group the weights of a network that a file says it has, with their names."""
    own = net.state_dict()
    groups: dict[str, list[tuple[Tensor, list[str]]]] = {}
    seen: set[str] = set()
    for shape, *keys in layers:
        for key in keys:
            there = own.get(key)
            if (
                there is None
                or list(there.shape) != shape
                or there.ndim < 2
                or not there.numel()
                or key in seen
            ):
                found = "none" if there is None else f"one of {tuple(there.shape)}"
                raise ValueError(
                    f"data must fit {type(net).__name__}, which has for {key!r} of shape {tuple(shape)} {found}"
                )
            seen.add(key)
        groups.setdefault(_group(own[keys[0]]), []).append((own[keys[0]], keys))
    return groups


def _group(weight: Tensor) -> str:
    """Return what layers share a decoder: the kernel's size, and Linear apart."""
    return "x".join(str(size) for size in weight.shape[2:]) if weight.ndim > 2 else "linear"


def _as_rows(weight: Tensor) -> Tensor:
    return weight.reshape(-1, math.prod(weight.shape[2:]))


def _rounded(latents: Tensor) -> Tensor:
    """Round; the gradient passes straight through, and adds an exact 0 to the value."""
    return latents.detach().round() + (latents - latents.detach())


def _random_start(
    weights: Sequence[Tensor], boundary: float, generator: torch.Generator | None
) -> tuple[Tensor, list[Tensor]]:
    """Return a decoder, and latents such that weights have the variance 2 / fan-out in each layer."""
    k, device = weights[0][0, 0].numel(), draw_device(generator)
    fans = [weight.shape[0] * k for weight in weights]
    variance = 24 / max(fans) / ((2 * boundary + 1) ** 2 - 1)  # of an entry, were there one in a row
    decoder = torch.randn(k, k, generator=generator, device=device).to(weights[0])
    decoder = decoder.abs() if k == 1 else decoder
    decoder = decoder * (math.sqrt(variance * k) / torch.linalg.matrix_norm(decoder))
    latents = []
    for weight, fan in zip(weights, fans, strict=True):
        reach = math.sqrt(24 / (variance * fan) + 1) / 2  # B + 1/2: rounded, uniform on -B..B
        latents.append(
            (2 * torch.rand(weight.shape, generator=generator, device=device) - 1).to(weight) * reach
        )
    return decoder, latents


def _weights(rows: Tensor, decoder: Tensor, shapes: Sequence[Tensor]) -> list[Tensor]:
    """Return decoded weights, float64 on the CPU: summed in a fixed order, alike on every machine."""
    rows, decoder = rows.double(), decoder.detach().double().cpu()
    total = rows[:, :1] * decoder[0]
    for j in range(1, len(decoder)):
        total += rows[:, j : j + 1] * decoder[j]
    parts = total.split([weight.numel() // len(decoder) for weight in shapes])
    return [part.reshape(weight.shape) for part, weight in zip(parts, shapes, strict=True)]
