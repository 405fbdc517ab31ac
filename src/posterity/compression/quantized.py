"""A network with weights and activations of a few bits: to train on, and as a file of exactly those bits.

Per tensor, asymmetric, from the smallest value to the largest: ``step = (max - min) / (2^b - 1)``, and a value is
moved to ``min + step * round((value - min) / step)``. The gradient passes the rounding as if it were not there.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from posterity._checks import integer
from posterity._files import DTYPES, pack_tensors, restored, seal, unpack_tensors, unseal
from posterity._models import evaluating
from posterity._precision import wide
from posterity.compression._layers import WEIGHTED, weight_places, weighted_layers

__all__ = ["pack_quantized", "quantize", "unpack_quantized"]

MARK = b"PQNT"
HIGHEST_BITS = 16


def quantize(
    model: nn.Module,
    weight_bits: int | Mapping[str, int],
    activation_bits: int | Mapping[str, int] | None = None,
    *,
    calibration: Shaped[Tensor, " n *shape"] | None = None,
) -> nn.Module:
    """Return a copy of a model with quantised weights, and activations, for use and for further training.

    ``module.weight`` of a layer is its quantised weight; the float weight that training moves is
    ``module.parametrizations.weight.original``. What enters a layer is quantised by ``module.activation_quantizer``.

    Parameters
    ----------
    model : nn.Module
        Not changed. A weight that several modules share is quantised in all of them.
    weight_bits : int or mapping of str to int
        Bits in 1 .. 16: one number for all Linear and Conv layers, or by name; layers without a name stay as they are.
    activation_bits : int or mapping, optional
        Bits of what enters a layer, likewise; an int counts for the first layer too, which `allocate_bits` leaves
        alone. None leaves activations in floating point.
    calibration : Tensor of shape (n, *shape), optional
        Inputs that set the ranges of activations, by one forward pass in eval mode. Without them ranges follow the
        batches that are seen in training mode, and until the first one activations pass as they are.

    Returns
    -------
    nn.Module
        Of the model's class. Fine-tune it as any network, with a tenth of the learning rate of its training.

    Raises
    ------
    ValueError
        If bits are not integers in 1 .. 16, a name is not that of a Linear or Conv layer, the model is quantised
        already, or ``calibration`` comes without activations to quantise.

    References
    ----------
    .. [1] Zandonati, Pol, Pierini, Sirkin, Kopetz. FIT: A Metric for Model Sensitivity. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import pack_quantized, quantize, unpack_quantized
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> small = quantize(net, {"0": 2, "2": 4})
    >>> len(small[0].weight.unique()), len(small[2].weight.unique()) <= 16
    (4, True)
    >>> data = pack_quantized(small)
    >>> sum(p.numel() * 4 for p in net.parameters()), len(data) < 1800
    (17680, True)
    >>> plain = unpack_quantized(net, data)
    >>> torch.equal(plain(torch.ones(1, 64)), small(torch.ones(1, 64)))
    True
    """
    if any(_quantizers(model)):
        raise ValueError("model must not be quantised yet, got one that is: quantise the float model anew")
    weights = _named("weight_bits", weight_bits, model)
    activations = {} if activation_bits is None else _named("activation_bits", activation_bits, model)
    if calibration is not None and not activations:
        raise ValueError("calibration must come with activation_bits, got it without: weights need none")
    places = weight_places(model, weighted_layers(model))
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name, bits in weights.items():
        for place in places[name]:
            owner, _, attribute = place.rpartition(".")
            parametrize.register_parametrization(modules[owner], attribute, _MinMax(bits))
    owners = {name: [place.rpartition(".")[0] for place in places[name]] for name in activations}
    sites = {owner: activations[name] for name, own in owners.items() for owner in own
             if isinstance(modules[owner], WEIGHTED)}  # fmt: skip
    for name, bits in sites.items():
        _attach(modules[name], bits)
    if calibration is not None:
        observers = [modules[name].activation_quantizer for name in sites]
        with evaluating(model), torch.no_grad():
            for observer in observers:
                observer.observing = True  # type: ignore[union-attr]
            model(calibration)
            for observer in observers:
                observer.observing = False  # type: ignore[union-attr]
    return model


def pack_quantized(model: nn.Module) -> bytes:
    """Return a quantised model as bytes: its weights in exactly their bits, all other state as it is.

    Parameters
    ----------
    model : nn.Module
        Made by `quantize`, trained further or not.

    Returns
    -------
    bytes
        With version and checksum; without pickle.

    Raises
    ------
    ValueError
        If the model is not quantised, or a weight is not finite.
    """
    quantised = {
        f"{name}.{attribute}".lstrip("."): quantizer for name, attribute, quantizer in _quantizers(model)
    }
    activations = {name: m.activation_quantizer.bits for name, m in model.named_modules() if "activation_quantizer" in m._modules}  # type: ignore[union-attr]  # fmt: skip
    if not quantised and not activations:
        raise ValueError("model must be quantised, got one that is not: see quantize")
    state = {}
    codes: dict[str, bytes] = {}
    weights: dict[str, Any] = {}
    seen: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        head, mark, attribute = key.removesuffix(".original").rpartition("parametrizations.")
        name = head + attribute if mark else key
        if name not in quantised:
            state[key] = value
            continue
        if id(value) in seen:  # a tied weight: its codes are there
            weights[name] = seen[id(value)]
            continue
        seen[id(value)] = name
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"model must have finite weights, got NaN or infinity in {name!r}")
        low, step, number = _codes(wide(value.detach()), quantised[name].bits)
        codes[name] = _packed(number.cpu().numpy().astype(np.uint16), quantised[name].bits)
        weights[name] = [quantised[name].bits, str(value.dtype).removeprefix("torch."), list(value.shape)]
        state[f"low {name}"], state[f"step {name}"] = low, step
    return seal(MARK, pack_tensors({"weights": weights, "activations": activations}, state, codes))


def unpack_quantized(model: nn.Module, data: bytes) -> nn.Module:
    """Return a plain network with the quantised weights of a file written in.

    Parameters
    ----------
    model : nn.Module
        An unquantised instance of the class, on the CPU or another device; not changed.
    data : bytes
        Of `pack_quantized`. Safe to read from elsewhere.

    Returns
    -------
    nn.Module
        Of the model's class; activation quantisers are attached where there were some.

    Raises
    ------
    ValueError
        If data are cut, damaged, of another kind or version, or do not fit the model: the message names the tensor.
    """
    if any(_quantizers(model)):
        raise ValueError("model must not be quantised, got one that is: an instance as it was before")
    about, state, codes = unpack_tensors(unseal(MARK, data))
    try:
        for name, what in about["weights"].items():
            if isinstance(what, str):
                state[name] = state[what]
                continue
            bits, dtype, shape = what
            number = _unpacked(codes[name], _bits_of(bits), int(np.prod(shape, dtype=np.int64)))
            low, step = state.pop(f"low {name}"), state.pop(f"step {name}")
            number = torch.from_numpy(number.astype(np.int32)).reshape(shape)
            state[name] = (low + number.to(low.dtype) * step).to(DTYPES[dtype])
        activations = {name: _bits_of(bits) for name, bits in about["activations"].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"data must be a quantised network, got one that cannot be read: {error}") from error
    if not activations:
        return restored(model, state)
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name, bits in activations.items():
        if name not in modules:
            raise ValueError(f"data must fit {type(model).__name__}, got activations of {name!r}, which it does not have")  # fmt: skip
        _attach(modules[name], bits)
    return restored(model, state)


class _MinMax(nn.Module):
    """The quantised tensor, as a parametrisation."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return _Rounded.apply(weight, self.bits)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _Rounded(torch.autograd.Function):
    """Quantise; the gradient passes straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, bits: int) -> Tensor:
        low, step, number = _codes(wide(weight), bits)
        return (low + number * step).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest value, the step, and each value's number in 0 .. 2^bits - 1; a constant is 0."""
    if not x.numel():
        return x.new_zeros(()), x.new_zeros(()), x
    low, high = x.aminmax()
    step = (high - low) / (2**bits - 1)
    return low, step, ((x - low) / torch.where(step > 0, step, 1)).round_()


class _ActivationQuantizer(nn.Module):
    """Clamps to the range seen in calibration or training, then rounds."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.observing = bits, False
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def forward(self, x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        if not x.numel():
            return x
        if self.observing:
            low, high = wide(x.detach()).aminmax()
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            return x
        if self.training:
            low, high = wide(x.detach()).aminmax()
            first = self.low > self.high
            self.low = torch.where(first, low, self.low.lerp(low.to(self.low.dtype), 0.1))
            self.high = torch.where(first, high, self.high.lerp(high.to(self.high.dtype), 0.1))
        unset = self.low > self.high
        low, high = (
            torch.where(unset, end, own) for end, own in ((-torch.inf, self.low), (torch.inf, self.high))
        )
        kept = wide(x).clamp(low, high)
        step = torch.where(high > low, (high - low) / (2**self.bits - 1), 1)
        rounded = torch.where(unset, kept, low + torch.round((kept - low) / step) * step)
        return (kept + (rounded - kept).detach()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _attach(module: nn.Module, bits: int) -> None:
    module.add_module("activation_quantizer", _ActivationQuantizer(bits))
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    args = args or (kwargs.pop("input"),)
    return (module.activation_quantizer(args[0]), *args[1:]), kwargs  # type: ignore[operator]


def _quantizers(model: nn.Module) -> Iterator[tuple[str, str, "_MinMax | _ActivationQuantizer"]]:
    """Yield what is quantised: module, attribute, quantiser."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
                if isinstance(chain[0], _MinMax):
                    yield name, attribute, chain[0]


def _named(argument: str, bits: Any, model: nn.Module) -> dict[str, int]:
    """Return bits by the first name of each layer."""
    if not isinstance(bits, Mapping):
        bits = dict.fromkeys(weighted_layers(model), bits)
    for name, value in bits.items():
        try:
            _bits_of(value)
        except ValueError:
            raise ValueError(
                f"{argument} must be integers in 1..{HIGHEST_BITS}, got {value!r} for {name!r}"
            ) from None
    named: dict[str, int] = {}
    for name, value in bits.items():
        (first,) = weighted_layers(model, [name])
        if named.setdefault(first, value) != value:
            raise ValueError(
                f"{argument} must be one number for {first!r} and what shares its weight, got two"
            )
    return named


def _bits_of(value: Any) -> int:
    if not 1 <= integer("bits", value) <= HIGHEST_BITS:
        raise ValueError(f"bits must be in 1..{HIGHEST_BITS}, got {value}")
    return int(value)


def _packed(numbers: np.ndarray, bits: int) -> bytes:
    """Return numbers below ``2**bits`` in that many bits each, the highest first."""
    every = np.unpackbits(numbers.astype(">u2").reshape(-1, 1).view(np.uint8), axis=1)
    return np.packbits(every[:, HIGHEST_BITS - bits :]).tobytes()


def _unpacked(data: bytes, bits: int, n: int) -> np.ndarray:
    if n < 0 or len(data) != -(-n * bits // 8):
        raise ValueError(f"{n} numbers of {bits} bits need {-(-n * bits // 8)} bytes, got {len(data)}")
    every = np.unpackbits(np.frombuffer(data, np.uint8), count=n * bits).reshape(n, bits)
    whole = np.zeros((n, HIGHEST_BITS), np.uint8)
    whole[:, HIGHEST_BITS - bits :] = every
    return np.packbits(whole, axis=1).view(">u2").reshape(-1).astype(np.uint16)
