"""The units of a transformer that can be weighed one by one: attention heads, and neurons of its feed-forward.

A unit is scaled where its output is a slice of channels of its own: a head at the input of the projection behind the
attention, which is the same as scaling its attention probabilities; an intermediate neuron before its activation; an
output neuron before dropout and residual. With all scales g = 1 the model is as it was, and d loss / d g_i says what
unit i is for. Layers are known by the names of their parts, so that none of the libraries has to be imported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posterity._checks import finite, floating, has_shape, integer, one_of
from posterity._precision import wide

__all__ = ["Units", "find_units", "unit_scales"]

KINDS = ("heads", "intermediate", "output")


@dataclass
class Units:
    """One row of units that can be scaled, such as the heads of a layer.

    Attributes
    ----------
    name : str
        The layer's name in the model and the kind, as "encoder.layer.0.heads".
    site : nn.Module
        What is scaled there; a ``nn.MultiheadAttention`` stands for its projection, which is no call of its own.
    at : {"input", "output"}
        Whether the first input of ``site`` is scaled, or its output.
    n_units : int
        At least 1; unit i has the i-th of as many equal runs of adjacent channels.
    rows, columns : tuple of nn.Parameter
        Parameters that belong to the units by their first axis, or by their last. An axis k times as long as the
        shortest of all holds k blocks of units: queries, keys and values in one matrix.

    Raises
    ------
    ValueError
        If a field is of another type, or ``n_units`` does not divide the width.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import Units
    >>> layer = torch.nn.Linear(3, 4)
    >>> Units("pairs", layer, "output", 2, rows=(layer.weight, layer.bias), columns=()).width
    4
    """

    name: str
    site: nn.Module
    at: Literal["input", "output"]
    n_units: int
    rows: tuple[nn.Parameter, ...]
    columns: tuple[nn.Parameter, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a word, got {type(self.name).__name__}")
        if not isinstance(self.site, nn.Module):
            raise ValueError(f"site must be a torch module, got {type(self.site).__name__}")
        one_of("at", self.at, ("input", "output"))
        integer("n_units", self.n_units, 1)
        for name, held in (("rows", self.rows), ("columns", self.columns)):
            if not isinstance(held, tuple) or not all(isinstance(p, Tensor) and p.ndim for p in held):
                raise ValueError(f"{name} must be a tuple of parameters, got {type(held).__name__}")
        if not self.rows + self.columns:
            raise ValueError(f"rows and columns of {self.name} must have a parameter, got none")
        if self.width % self.n_units:
            raise ValueError(f"n_units must divide the width {self.width} of {self.name}, got {self.n_units}")
        for size in self._sizes():
            if size % self.width:
                raise ValueError(
                    f"rows and columns of {self.name} must have axes that are multiples of {self.width}, got {size}"
                )

    @property
    def width(self) -> int:
        """Channels of all units together."""
        return min(self._sizes())

    def _sizes(self) -> list[int]:
        return [p.shape[0] for p in self.rows] + [p.shape[-1] for p in self.columns]


def find_units(model: nn.Module, kinds: Sequence[str] = KINDS) -> list[Units]:
    """Return the units of every transformer layer of a model, in the order of the model.

    Parameters
    ----------
    model : nn.Module
        With layers as BERT (also RoBERTa, ELECTRA and others built like it), DistilBERT or GPT-2 of transformers have
        them, or ``nn.TransformerEncoderLayer``.
    kinds : sequence of {"heads", "intermediate", "output"}
        Which units: attention heads, outputs of the first feed-forward layer, outputs of the second.

    Returns
    -------
    list of Units
        In each layer in the order of ``kinds``.

    Raises
    ------
    ValueError
        If a kind is unknown or given twice, or the model has no layer of these; the message names it.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Section 3.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import find_units
    >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=32)
    >>> [(units.name, units.n_units) for units in find_units(layer)]
    [('heads', 2), ('intermediate', 32), ('output', 8)]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {kinds!r}")
    kinds = [one_of("kinds", kind, KINDS) for kind in kinds]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must be different, got {kinds}")
    found = []
    for name, module in model.named_modules():
        for read in (_of_bert, _of_distilbert, _of_gpt2, _of_torch):
            if layer := read(module):
                found += [layer[kind](f"{name}.{kind}".lstrip(".")) for kind in kinds]
                break
    if not found:
        raise ValueError(
            f"model must have layers of BERT, RoBERTa, DistilBERT or GPT-2 or nn.TransformerEncoderLayer, "
            f"{type(model).__name__} has none"
        )
    return found


@contextmanager
def unit_scales(units: Sequence[Units], scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Let forward passes inside a ``with`` run with unit i of each row multiplied by ``scales[name][i]``.

    Parameters
    ----------
    units : sequence of Units
        As `find_units` returns them.
    scales : mapping of str to Tensor of shape (n_units,)
        By the names of ``units``; rows without an entry stay as they are. Gradients reach them.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        If a name is none of the units', or scales do not fit or (on the CPU) are not finite.

    Notes
    -----
    1. Torch's fused path of attention in eval mode, which calls none of the layers, is off inside.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import Units, unit_scales
    >>> layer = torch.nn.Linear(1, 2)
    >>> _ = torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
    >>> units = [Units("both", layer, "output", 2, (layer.weight, layer.bias), ())]
    >>> with unit_scales(units, {"both": torch.tensor([1.0, 0.5])}):
    ...     layer(torch.tensor([[2.0]])).tolist()
    ...
    [[2.0, 1.0]]
    >>> layer(torch.tensor([[2.0]])).tolist()
    [[2.0, 2.0]]
    """
    named = by_name(units)
    if not isinstance(scales, Mapping):
        raise ValueError(f"scales must map names to tensors, got {type(scales).__name__}")
    for name, scale in scales.items():
        if name not in named:
            raise ValueError(f"scales must have names of units, got {name!r}")
        has_shape(f"scales[{name!r}]", floating(f"scales[{name!r}]", scale), (named[name].n_units,))
        if scale.device.type == "cpu":
            finite(f"scales[{name!r}]", scale)
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for name, scale in scales.items():
            for handle in _hooked(named[name], scale):
                stack.callback(handle.remove)
        yield


def by_name(units: Sequence[Units]) -> dict[str, Units]:
    """Return units by their names, if they are units and have different ones."""
    if not isinstance(units, Sequence) or not units or not all(isinstance(each, Units) for each in units):
        raise ValueError(
            f"units must be a list of Units, at least one, got {units if units == [] else type(units).__name__}"
        )
    named = {each.name: each for each in units}
    if len(named) < len(units):
        raise ValueError("units must have different names")
    return named


def _hooked(units: Units, scale: Tensor) -> list[Any]:
    """Return handles of the hooks that scale a row of units."""
    site = units.site

    def scaled(x: Tensor) -> Tensor:
        if x.shape[-1] % units.n_units:
            raise ValueError(
                f"n_units must divide the width {x.shape[-1]} at {units.name}, got {units.n_units}"
            )
        each = scale.to(x.device).repeat_interleave(x.shape[-1] // units.n_units)
        return (wide(x) * each).to(x.dtype)  # the sum over positions, in the backward pass, is wide

    if isinstance(site, nn.MultiheadAttention):  # reads the weight of its projection without calling it
        projection: Any = site.out_proj
        weight: Any = projection._parameters["weight"]
        shadow = projection.__dict__

        def put(*_: Any) -> None:
            shadow["weight"] = scaled(weight)

        def take(*_: Any) -> None:
            shadow.pop("weight", None)

        return [
            site.register_forward_pre_hook(put),
            site.register_forward_hook(take, always_call=True),
            _Undo(take),
        ]
    if units.at == "output":
        return [site.register_forward_hook(lambda _, __, out: scaled(out))]
    return [site.register_forward_pre_hook(lambda _, args: (scaled(args[0]), *args[1:]))]


@dataclass
class _Undo:
    """What is removed as a hook is, where a failed call left it."""

    remove: Callable[[], None]


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _layer(
    inputs: list[Any], ends: list[Any], n_heads: Any, attention: Any = None
) -> dict[str, Callable[[str], Units]] | None:
    """Return what makes each kind of units of a name, if a layer has these linear ones.

    ``inputs`` are of queries, keys and values, ``ends`` the projection behind the attention and both feed-forward.
    """
    if not all(isinstance(_part(each, "weight"), nn.Parameter) for each in (*inputs, *ends)):
        return None
    out, *feedforward = ends

    def heads(name: str) -> Units:
        rows, columns = _owned(inputs)
        if _transposed(out):
            rows = (*rows, out.weight)
        else:
            columns = (*columns, out.weight)
        return Units(name, attention or out, "input", n_heads, rows, columns)

    def neurons(each: Any) -> Callable[[str], Units]:
        n = each.weight.shape[1 if _transposed(each) else 0]
        return lambda name: Units(name, each, "output", n, *_owned([each]))

    return {"heads": heads, **{kind: neurons(x) for kind, x in zip(KINDS[1:], feedforward, strict=True)}}


def _owned(layers: Sequence[Any]) -> tuple[tuple, tuple]:
    """Return parameters by whose rows, and by whose columns, outputs of linear layers are made."""
    rows, columns = [], []
    for each in layers:
        (columns if _transposed(each) else rows).append(each.weight)
        if isinstance(each.bias, nn.Parameter):
            rows.append(each.bias)
    return tuple(rows), tuple(columns)


def _transposed(layer: Any) -> bool:
    """Return whether a layer is a ``Conv1D`` of transformers, whose weight is (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D"


def _of_bert(module: nn.Module) -> dict[str, Callable[[str], Units]] | None:
    inputs = [_part(module, f"attention.self.{name}") for name in ("query", "key", "value")]
    ends = [_part(module, f"{name}.dense") for name in ("attention.output", "intermediate", "output")]
    return _layer(inputs, ends, _part(module, "attention.self.num_attention_heads"))


def _of_distilbert(module: nn.Module) -> dict[str, Callable[[str], Units]] | None:
    inputs = [_part(module, f"attention.{name}_lin") for name in "qkv"]
    ends = [_part(module, name) for name in ("attention.out_lin", "ffn.lin1", "ffn.lin2")]
    return _layer(inputs, ends, _part(module, "attention.n_heads"))


def _of_gpt2(module: nn.Module) -> dict[str, Callable[[str], Units]] | None:
    ends = [_part(module, name) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    return _layer([_part(module, "attn.c_attn")], ends, _part(module, "attn.num_heads"))


@dataclass
class _Packed:
    """Queries, keys and values of ``nn.MultiheadAttention``, as a linear layer has them."""

    weight: nn.Parameter
    bias: nn.Parameter | None


def _of_torch(module: nn.Module) -> dict[str, Callable[[str], Units]] | None:
    if not isinstance(module, nn.TransformerEncoderLayer):
        return None
    attention = module.self_attn
    packed = _Packed(attention.in_proj_weight, attention.in_proj_bias)  # type: ignore[arg-type]
    ends = [attention.out_proj, module.linear1, module.linear2]
    return _layer([packed], ends, attention.num_heads, attention)
