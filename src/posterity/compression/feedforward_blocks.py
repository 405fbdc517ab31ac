"""The feed-forward blocks of a user's model, found and cut into experts."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posterity._checks import integer
from posterity._precision import wide
from posterity.compression.smoe_dropout import SMoEDropout, active, divides, is_module

__all__ = ["convert_ffn"]

_GATES = ({"gate_proj", "up_proj"}, {"gate_up_proj"}, {"wi_0", "wi_1"}, {"w1", "w2", "w3"})
_SOUGHT = (
    "nn.TransformerEncoderLayer and DecoderLayer, nn.Sequential of Linear - activation - [Dropout] - Linear "
    "with the hidden layer wider than both ends, modules of two such layers and an activation (GPT-2, ViT), "
    "and intermediate.dense with output.dense (BERT)"
)


@torch.inference_mode(False)
def convert_ffn(
    model: nn.Module, n_experts: int, *, k: int | None = None,
    layers: Sequence[str] | Callable[[str, nn.Module], bool] | None = None, generator: torch.Generator | None = None,
) -> nn.Module:  # fmt: skip
    """Return a copy of a model whose feed-forward blocks are cut into experts by `SMoEDropout.from_dense`.

    Parameters
    ----------
    model : nn.Module
        Blocks are found in ``nn.TransformerEncoderLayer`` and ``DecoderLayer``; in ``nn.Sequential``,
        as Linear - activation - [Dropout] - Linear with the hidden layer wider than both ends; in
        modules that are two such layers with an activation between (GPT-2, ViT, your own), which
        is tried on numbers; and in BERT's ``intermediate`` and ``output``.
    n_experts : int
        Divides the hidden units of each block.
    k : int, optional
        Active experts at first, all if None.
    layers : sequence of str, or callable, optional
        Names of the modules that hold the blocks, or ``layers(name, module) -> bool``; all if None.
    generator : torch.Generator, optional
        Draws the routers, in the order of the model.

    Returns
    -------
    nn.Module
        The first linear layer of each block is a `SMoEDropout`, activation and second layer pass on
        what they get. All else, as residuals, norms and heads, is copied.

    Raises
    ------
    ValueError
        If nothing is found, a name in ``layers`` is no block, sizes do not fit, a weight is shared
        with another module, or a block is gated (SwiGLU), which has no experts of this kind.

    Notes
    -----
    1. The fused inference path of ``nn.TransformerEncoderLayer`` is left, since it reads the weights
       of the dense layer: in eval mode padded positions are computed like others.
    2. Dropout between the layers is taken over by the experts in torch's layers and in Sequential.
       Other modules keep theirs where they call it.
    3. Hooks on the two linear layers of a block go with them.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.compression import convert_ffn, n_active, set_active
    >>> block = nn.TransformerEncoderLayer(16, 2, dim_feedforward=64, batch_first=True)
    >>> experts = convert_ffn(nn.TransformerEncoder(block, 2), n_experts=8)
    >>> set_active(experts, 2)
    2
    >>> n_active(experts)
    {'layers.0.linear1': 2, 'layers.1.linear1': 2}
    """
    is_module(model)
    integer("n_experts", n_experts, 1)
    active(n_experts if k is None else k, n_experts)
    model = copy.deepcopy(model)
    blocks, gated = _find(model)
    chosen = _choose(blocks, gated, dict(model.named_modules()), layers)
    _refuse_shared(model, chosen)
    for block in chosen:
        divides(n_experts, block.linears[0].out_features, block.place or "the model")
    for block in chosen:
        experts = SMoEDropout.from_dense(
            *block.linears,
            n_experts,
            k,
            activation=block.activation,
            dropout=block.dropout,
            generator=generator,
        )
        _put(block.holder, block.first, experts)
        for name in block.rest:
            _put(block.holder, name, nn.Identity())
        if isinstance(block.holder, nn.TransformerEncoderLayer):
            block.holder.activation_relu_or_gelu = 0  # by which torch knows that its fused path is right
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # the fused path again, of all layers
    return model


@dataclass
class _Block:
    """Two linear layers with an activation between: where they are, and what stands for them."""

    place: str  # of the holder, as in named_modules()
    holder: nn.Module
    first: str  # the child that becomes the experts
    rest: tuple[str, ...]  # those that pass on what they get
    linears: tuple[nn.Linear, nn.Linear]
    activation: Callable[[Tensor], Tensor]
    dropout: float = 0.0


def _find(model: nn.Module) -> tuple[list[_Block], dict[str, str]]:
    """Return the blocks of a model in its order, and the classes of its gated feed-forwards by name."""
    blocks, gated = [], {}
    for name, module in model.named_modules():
        linear = {child for child, layer in module.named_children() if _linear(layer) is not None}
        said = "glu" in type(module).__name__.lower() or "gated" in type(module).__name__.lower()
        if any(gates <= linear for gates in _GATES) or (said and len(linear) > 1) or _glu_between(module):
            gated[name] = type(module).__name__
            continue
        for find in (_of_torch, _of_sequential, _of_bert, _of_a_module):
            found = list(find(name, module))
            blocks += found
            if found:
                break
    return blocks, gated


def _of_torch(name: str, module: nn.Module) -> Iterator[_Block]:
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        if isinstance(module, kind) and type(module)._ff_block is kind._ff_block:
            rest = ("activation", "dropout", "linear2")
            yield from _block(name, module, "linear1", rest, module.activation, module.dropout.p)


def _of_sequential(name: str, module: nn.Module) -> Iterator[_Block]:
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return
    children = list(module._modules.items())
    at = 0
    while at < len(children):
        window = children[at : at + 4]
        if len(window) == 4 and not isinstance(window[2][1], nn.Dropout):
            window = window[:3]
        names = [child for child, _ in window]
        found: list[_Block] = []
        if len(window) > 2 and not isinstance(window[1][1], nn.Dropout):
            p = window[2][1].p if isinstance(window[2][1], nn.Dropout) else 0.0
            found = [
                block
                for block in _block(name, module, names[0], tuple(names[1:]), window[1][1], p)
                if _wide(*block.linears)
            ]
        yield from found
        at += len(window) if found else 1


def _of_bert(name: str, module: nn.Module) -> Iterator[_Block]:
    parts = [getattr(module, "intermediate", None), getattr(module, "output", None)]
    activation = getattr(parts[0], "intermediate_act_fn", None)
    if all(isinstance(getattr(part, "dense", None), nn.Module) for part in parts) and callable(activation):
        rest = ("intermediate.intermediate_act_fn", "output.dense")
        yield from _block(name, module, "intermediate.dense", rest, activation)


def _of_a_module(name: str, module: nn.Module) -> Iterator[_Block]:
    """Yield two linear layers and an activation, if numbers go through them as they should."""
    if isinstance(module, nn.Sequential):
        return
    passive = nn.Dropout | nn.Identity
    linear = [child for child, layer in module.named_children() if _linear(layer) is not None]
    other = [
        child
        for child, layer in module.named_children()
        if child not in linear and not isinstance(layer, passive)
    ]
    if len(linear) != 2 or len(other) != 1:
        return
    for first, last in (linear, linear[::-1]):  # in either order of their definition
        for block in _block(name, module, first, (other[0], last), module.get_submodule(other[0])):
            if _wide(*block.linears) and _passes(module, block):
                yield block


def _block(
    name: str, module: nn.Module, first: str, rest: tuple[str, ...], activation: Any, dropout: float = 0.0
) -> Iterator[_Block]:  # fmt: skip
    """Yield the block, if the layers chain and the activation acts on each unit by itself."""
    one, two = _linear(module.get_submodule(first)), _linear(module.get_submodule(rest[-1]))
    if one is None or two is None or one.out_features != two.in_features:
        return
    if _elementwise(activation, one):
        yield _Block(name, module, first, rest, (one, two), activation, dropout)


def _linear(layer: nn.Module) -> nn.Linear | None:
    """Return a linear layer on the weights of one, GPT-2's transposed Conv1D among them."""
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    if not (type(layer) is nn.Linear or transposed) or weight is None or weight.is_meta:
        return None
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(1, 1, bias=False, device="meta").train(layer.training)
    linear.in_features, linear.out_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear


def _wide(linear1: nn.Linear, linear2: nn.Linear) -> bool:
    return linear1.out_features > max(linear1.in_features, linear2.out_features)


@torch.no_grad()
def _elementwise(activation: Any, linear: nn.Linear) -> bool:
    """Return whether a half of the units gives half of the outputs: no softmax, norm or weight a unit."""
    if not callable(activation) or (isinstance(activation, nn.Module) and _linear(activation) is not None):
        return False
    weight = linear.weight
    x = torch.linspace(-3, 3, 4 * weight.shape[0], dtype=weight.dtype, device=weight.device).reshape(4, -1)
    half = (weight.shape[0] + 1) // 2
    try:
        act: Any = copy.deepcopy(activation).eval() if isinstance(activation, nn.Module) else activation
        whole, part = act(x.clone()), act(x[:, :half].clone())
        return whole.shape == x.shape and torch.equal(whole[:, :half], part)
    except Exception:  # whatever a user's module raises on numbers that it does not take
        return False


@torch.no_grad()
def _passes(module: nn.Module, block: _Block) -> bool:
    """Return whether the module, in eval mode, is its second layer of the activation of its first."""
    weight = block.linears[0].weight
    x = torch.linspace(-2, 2, 6 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    x = wide(x.sin().reshape(2, 3, -1))
    try:
        twin, one, act, two = (
            copy.deepcopy(part).to(x.dtype).eval() if isinstance(part, nn.Module) else part
            for part in (module, block.linears[0], block.activation, block.linears[1])
        )
        with torch.autocast(x.device.type, enabled=False):
            got, wanted = twin.forward(x), two(act(one(x)))
        return got.shape == wanted.shape and bool((got - wanted).norm() <= 1e-4 * wanted.norm())
    except Exception:  # as above
        return False


def _glu_between(module: nn.Module) -> bool:
    return any(isinstance(child, nn.GLU) for child in module.children()) and any(
        _linear(child) is not None for child in module.children()
    )


def _choose(
    blocks: list[_Block], gated: dict[str, str], holders: dict[str, nn.Module], layers: Any
) -> list[_Block]:
    """Return the blocks that are asked for."""
    places = dict.fromkeys(block.place for block in blocks)
    if isinstance(layers, str) or not (layers is None or callable(layers) or isinstance(layers, Sequence)):
        raise ValueError(f"layers must be names of modules or a function of name and module, got {layers!r}")
    if layers is None:
        wanted = {*places, *gated}
    elif callable(layers):
        wanted = {name for name in (*places, *gated) if layers(name, holders[name])}
    else:
        wanted = set(layers)
        for name in layers:
            if name not in places and name not in gated:
                known = ", ".join(map(repr, places)) or "none"
                raise ValueError(
                    f"layers must name modules with a feed-forward block, got {name!r}: they are {known}"
                )
    for name, kind in gated.items():
        if name in wanted:
            raise ValueError(
                f"model must have plain feed-forward blocks, got {name or 'itself'}, a {kind}, which is gated: "
                "leave it out by layers"
            )
    chosen = [block for block in blocks if block.place in wanted]
    if not chosen:
        raise ValueError(f"model must have a feed-forward block{'' if layers is None else ' that layers choose'}, "
                         f"got none. Looked for: {_SOUGHT}")  # fmt: skip
    return chosen


def _refuse_shared(model: nn.Module, blocks: list[_Block]) -> None:
    """Refuse blocks of which a layer or weight has another place, which would keep the dense one."""
    places, owners = defaultdict(list), defaultdict(list)
    for name, module in model.named_modules():
        for child, layer in module._modules.items():
            places[id(layer)].append(f"{name}.{child}".lstrip("."))
        for child, parameter in module._parameters.items():
            owners[id(parameter)].append(f"{name}.{child}".lstrip("."))
    for block in blocks:
        for name in (block.first, block.rest[-1]):
            layer = block.holder.get_submodule(name)
            for names in (places[id(layer)], *(owners[id(p)] for p in layer.parameters())):
                if len(names) > 1:
                    raise ValueError(
                        f"model must not share layers of a feed-forward block, got {' and '.join(names)}"
                    )


def _put(holder: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(holder.get_submodule(parent), child, module)
