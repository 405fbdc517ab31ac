"""Which channels of a network must go together, found by watching it run once.

Channels that are added, multiplied or normalised together can only be removed together. The network
is run on one sample while every torch function is seen on its way; a rule for each says what it does
with the channels (`posterity.compression.channel_rules`), and union-find over single channels joins
those that are tied. Nothing is asked of the user's class: control flow over shapes, keyword arguments,
functional calls and tied weights are followed as they happen.

What is not known to keep channels apart fixes those it touches; so does a number of channels that is
written into the code, or used in it other than to shape a view.
"""

import os
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from posterity.compression.channel_rules import RULES, Call, Count, Flow, Ids
from posterity.compression.channel_surgery import (
    WRONG,
    Inputs,
    alone,
    does_not_run,
    duplicate,
    first_sample,
    layout,
    tensors_in,
)  # fmt: skip

__all__ = ["Coupling", "data_flow_couplings"]


@dataclass(frozen=True)
class Coupling:
    """Channels of several layers that can only be removed together.

    Attributes
    ----------
    feeds : tuple of str
        Layers whose output channels they are.
    reads : tuple of str
        Layers that take them in.
    between : tuple of str
        Modules on the way with a parameter for each: BatchNorm, PReLU, depthwise convolutions.
    n_channels : int
        How many there are.
    """

    feeds: tuple[str, ...]
    reads: tuple[str, ...]
    between: tuple[str, ...]
    n_channels: int


def data_flow_couplings(model: nn.Module, example_inputs: Inputs) -> list[Coupling]:
    """Return the sets of channels that can be removed, and the layers that they tie together.

    Parameters
    ----------
    model : nn.Module
        Any network; left as it is.
    example_inputs : Tensor or tuple of Tensor
        What it is called with, with a batch axis in front; the first sample is used.

    Returns
    -------
    list of Coupling
        In the order of ``model.named_modules()``. Channels that are inputs or outputs of the network
        are not listed, nor those that an operation fixes; the latter are told in one warning.

    Raises
    ------
    ValueError
        If the network does not run on the sample, or decides by the values of a tensor what to run.

    References
    ----------
    .. [1] Narshana, Murti, Bhattacharyya. DFPC: Data Flow Driven Pruning of Coupled Channels without
       Data. ICLR 2023. Section 3, Definition 1.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.compression import data_flow_couplings
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    >>> data_flow_couplings(net, torch.rand(1, 3, 4, 4))
    [Coupling(feeds=('0',), reads=('4',), between=('1',), n_channels=8)]
    """
    return look(model, example_inputs).couplings


@dataclass
class Block:
    """The channels of one axis of one weight, and the layers that hold it."""

    start: int
    size: int
    owners: list[tuple[str, str]]  # (layer, side)
    mixes: bool
    depth: int = 0  # of a depthwise convolution: outputs of an input


@dataclass
class Picture:
    """What was seen: for each channel of each weight (an atom) the component it goes with."""

    model: nn.Module  # the copy that ran
    couplings: list[Coupling]
    members: list[np.ndarray]  # for each coupling the component of each channel
    homes: list[Block]  # for each coupling a weight that has all its channels
    labels: np.ndarray
    blocks: list[Block]
    worth: np.ndarray  # of each component: the bound where it was asked for, else the sum of absolute weights

    def plan(self, gone: np.ndarray) -> dict[str, dict[str, list[int]]]:
        """Return what each layer keeps when components go."""
        plan: dict[str, dict[str, list[int]]] = {}
        lost = np.isin(self.labels, gone)
        for block in self.blocks:
            here = lost[block.start : block.start + block.size]
            if here.any():
                for layer, side in block.owners:
                    plan.setdefault(layer, {})[side] = np.flatnonzero(~here).tolist()
                    if block.depth:
                        plan[layer]["in"] = np.flatnonzero(~here[:: block.depth]).tolist()
        return plan


def look(model: nn.Module, example_inputs: Inputs, *, bounding: bool = False, quiet: bool = False) -> Picture:
    """Run a copy of a model on the first sample and return what became of its channels."""
    inputs = first_sample(example_inputs)
    model = duplicate(model)
    for name, module in model.named_modules():
        if bounding and isinstance(module, _BatchNorm) and module.running_var is None:
            raise ValueError(
                f"model must have running statistics in every BatchNorm for method='dfpc', {name!r} has none"
            )
    walk = Walk(model, bounding)
    for tensor in inputs:
        walk.flows[tensor] = Flow([None] * tensor.ndim)
    with alone(inputs), torch.no_grad():
        try:
            with walk:
                result = model(*inputs)
        except Refused as refusal:
            raise ValueError(str(refusal)) from None
        except WRONG as error:
            raise does_not_run(error) from error
    for hook in walk.hooks:
        hook.remove()
    for tensor in tensors_in(result):
        for ids in walk.flow(tensor).ids:
            walk.fix(ids, None)
    return walk.picture(model, quiet)


class Refused(Exception):
    """The network does what cannot be followed."""


QUESTIONS = {
    "__bool__", "item", "tolist", "numpy", "__array__", "__int__", "__float__", "__index__", "equal", "allclose",
    "is_nonzero", "__contains__", "nonzero", "argwhere", "unique", "masked_select", "__complex__",
}  # fmt: skip
FACTS = {
    "dim", "ndimension", "get_device", "is_contiguous", "is_floating_point", "is_complex", "is_inference",
    "is_conj", "is_neg", "register_hook", "retain_grad", "element_size", "__hash__", "__repr__", "__format__",
    "has_names", "is_shared", "is_signed", "result_type", "can_cast", "_is_view", "is_same_size", "data_ptr",
}  # fmt: skip
ALIKE = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div",
    "itruediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "idiv": "div", "radd": "add", "rsub": "sub",
    "rmul": "mul", "negative": "neg", "absolute": "abs", "swish": "silu",
}  # fmt: skip


class Walk(TorchFunctionMode):
    """Sees every torch function of a run and keeps what channels the axes of tensors carry."""

    def __init__(self, model: nn.Module, bounding: bool) -> None:
        super().__init__()
        self.bounding = bounding
        self.flows: Any = WeakIdKeyDictionary()
        self.sides: Any = WeakIdKeyDictionary()  # weight -> {side: its atoms}
        self.size = 0  # atoms so far
        self.blocks: list[Block] = []
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.stuck: list[np.ndarray] = []
        self.causes: dict[tuple[str, str], list[np.ndarray]] = {}
        self.total: Tensor | None = None
        self.parts: list[tuple[np.ndarray, int, Tensor, Tensor]] = []
        self.spent: set[int] = set()
        self.path: list[str] = []
        self.hooks: list[Any] = []
        self._own_weights(model)
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self.hooks += [
                    module.register_forward_pre_hook(lambda m, a, name=name: self.path.append(name), prepend=True),
                    module.register_forward_hook(lambda m, a, o: (self.path.pop(), None)[1], always_call=True),
                ]  # fmt: skip
        weights = [t for t in model.parameters() if t.is_floating_point()]
        self.device = weights[0].device if weights else torch.device("cpu")
        self.real_dtype = torch.float32 if self.device.type == "mps" else torch.float64

    def _own_weights(self, model: nn.Module) -> None:
        owners: Any = WeakIdKeyDictionary()
        for name, module in model.named_modules():
            form = layout(module)
            for tensor, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    owners.setdefault(value, []).append((name, tensor, form, module))
        for value, held in owners.items():
            forms = [form.tensors.get(tensor) if form else None for _, tensor, form, _ in held]
            if not all(forms) or value.ndim == 0:
                continue  # a raw parameter, or one that something else uses too
            sides = {}
            for axis in sorted({a for form in forms if form for a in form.values()}):
                places = [
                    (name, side) for (name, *_), form in zip(held, forms, strict=True)
                    for side, a in (form or {}).items() if a == axis
                ]  # fmt: skip
                if value.shape[axis] > 1:
                    block = Block(
                        self.size, value.shape[axis], places, any(f.mixes for *_, f, _ in held if f)
                    )
                    if any("groups" in f.sizes for *_, f, _ in held if f):
                        block.depth = block.size // held[0][3].groups
                    self.blocks.append(block)
                    sides[axis] = self._atoms(value.shape[axis])
            self.sides[value] = {side: sides.get(axis) for side, axis in (forms[0] or {}).items()}
            self.flows[value] = Flow([sides.get(axis) for axis in range(value.ndim)])

    def _atoms(self, size: int) -> np.ndarray:
        self.size += size
        return np.arange(self.size - size, self.size)

    # What rules ask for

    def flow(self, tensor: Tensor) -> Flow:
        return self.flows.get(tensor) or Flow([None] * tensor.ndim, constant=True)

    def own(self, weight: Any) -> dict[str, Ids] | None:
        return self.sides.get(weight) if isinstance(weight, Tensor) else None

    def unite(self, a: Ids, b: Ids) -> None:
        if a is None or b is None:
            self.fix(b if a is None else a, None)
        else:
            self.ties.append((a, b))

    def fix(self, ids: Ids, why: str | None) -> None:
        """Keep channels where they are; silently if there is nothing to tell."""
        if ids is not None:
            self.stuck.append(ids)
            if why is not None:
                self.causes.setdefault((why, self.where()), []).append(ids)

    def fixed(self, size: int) -> np.ndarray:
        ids = self._atoms(size)
        self.stuck.append(ids)
        return ids

    def where(self) -> str:
        return repr(self.path[-1]) if self.path and self.path[-1] else "the model itself"

    @staticmethod
    def tensors(call: Call) -> list[Tensor]:
        return [v for v in tree_leaves((call.args, call.kwargs)) if isinstance(v, Tensor)]

    def zeros(self, shape: Iterable[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=self.real_dtype, device=self.device)

    def real(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.real_dtype)

    def magnitude(self, weight: Tensor) -> Tensor:
        return self.real(weight).abs()

    def demand(self, value: Tensor) -> None:
        self.total = value if self.total is None else self.total + value

    def leaf(self, out: Ids, axis: int, reach: Tensor, shape: Iterable[int]) -> Tensor:
        """Return ones in the place of a layer's output, which remember what readers ask of them."""
        ones = self.zeros(shape).add_(1).requires_grad_()
        if out is not None:
            self.parts.append((out, axis, ones, reach.detach()))
        return ones

    # The run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        getter = name == "__get__"
        if getter:
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        leaves = tree_leaves((args, kwargs))
        known = [v for v in leaves if isinstance(v, Tensor) and v in self.flows]
        self.spent.clear()
        if known and name in QUESTIONS:
            raise Refused(_question(name, self.where()))
        if name in ("size", "shape", "__len__") and known:
            return self._sizes(name, args[0], func(*args, **kwargs), *args[1:], **kwargs)
        out = func(*args, **kwargs)
        results = [out] if isinstance(out, Tensor) else [v for v in tree_leaves(out) if isinstance(v, Tensor)]
        if known and (results or not (getter or name in FACTS)):
            self._follow(Call(_plain(name), func, args, kwargs, out), known, results)
        for v in leaves:
            if isinstance(v, Count) and id(v) not in self.spent:
                self.fix(v.ids, f"a number of channels given to {name}")
        return out

    def _follow(self, call: Call, known: list[Tensor], results: list[Tensor]) -> None:
        rule = RULES.get(call.name) if results and "out" not in call.kwargs else None
        flows = None
        if rule is not None:
            try:
                with torch.enable_grad():
                    flows = rule(self, call)
            except Exception:  # called as no rule foresees
                flows = None
        if flows is None:
            for tensor in known:
                for ids in self.flow(tensor).ids:
                    self.fix(ids, call.name)
            first = call.args[0] if call.args else None
            changed = isinstance(first, Tensor) and getattr(call.func, "__name__", "").endswith("_")
            for tensor in [*results, *([first] if changed else [])]:
                if tensor not in self.sides:
                    self.flows[tensor] = Flow([None] * tensor.ndim)
            return
        for tensor, flow in zip(results, [flows] if isinstance(flows, Flow) else flows, strict=True):
            if tensor in self.sides:  # an operation that gave back a weight as it is
                continue
            sizes = zip(flow.ids, tensor.shape, strict=True)
            flow.ids = [None if size == 1 else ids for ids, size in sizes]
            self.flows[tensor] = flow

    def _sizes(self, name: str, tensor: Tensor, out: Any, dim: int = 0) -> Any:
        ids = self.flow(tensor).ids
        if isinstance(out, torch.Size):
            return torch.Size([s if i is None else Count(s, self, i) for s, i in zip(out, ids, strict=True)])
        asked = ids[dim]
        if asked is None:
            return out
        if name == "__len__":  # Python makes a plain number of it
            self.fix(asked, "len of channels")
            return out
        return Count(out, self, asked)

    # What it comes to

    def picture(self, model: nn.Module, quiet: bool) -> Picture:
        pairs = [np.concatenate([pair[k] for pair in self.ties] or [np.zeros(0, int)]) for k in (0, 1)]
        graph = coo_matrix((np.ones(len(pairs[0]), bool), tuple(pairs)), shape=(self.size, self.size))
        count, labels = connected_components(graph, directed=False)
        stuck = np.zeros(count, bool)
        for ids in self.stuck:
            stuck[labels[ids]] = True
        feeds, reads = np.zeros(count, bool), np.zeros(count, bool)
        for block in self.blocks:
            here = labels[block.start : block.start + block.size]
            for _, side in block.owners:
                (feeds if side == "out" else reads)[here] |= block.mixes
        found = self._couplings(labels, ~stuck & feeds & reads)
        if not quiet:
            self._tell(labels)
        worth = self._bound(labels, count) if self.bounding else self._norms(labels, count)
        return Picture(model, *found, labels, self.blocks, worth)

    def _norms(self, labels: np.ndarray, count: int) -> np.ndarray:
        """Return the sum of absolute weights of the filters of each component."""
        norms = np.zeros(count)
        mixing = {block.start for block in self.blocks if block.mixes}
        for value, sides in self.sides.items():
            ids = sides.get("out")
            if ids is not None and value.ndim > 1 and ids[0] in mixing:
                axis = next(a for a, each in enumerate(self.flows[value].ids) if each is ids)
                weight = value.detach().abs().double().sum([a for a in range(value.ndim) if a != axis])
                norms += np.bincount(labels[ids], weight.cpu().numpy(), minlength=count)
        return norms

    def _couplings(
        self, labels: np.ndarray, free: np.ndarray
    ) -> tuple[list[Coupling], list[np.ndarray], list[Block]]:
        """Group free components by the weights that they pass through."""
        groups: dict[tuple[int, ...], list[int]] = {}
        through: dict[int, list[int]] = {}  # component -> its blocks
        for k, block in enumerate(self.blocks):
            here = labels[block.start : block.start + block.size]
            for component in set(here[free[here]].tolist()):
                through.setdefault(component, []).append(k)
        for component in sorted(through):
            groups.setdefault(tuple(through[component]), []).append(component)
        found = []
        for blocks, here in groups.items():
            names: dict[str, dict[str, None]] = {"out": {}, "in": {}, "between": {}}
            for block in (self.blocks[k] for k in blocks):
                for layer, side in block.owners:
                    names[side if block.mixes else "between"][layer] = None
            feed = next(b for k in blocks for b in [self.blocks[k]]
                        if b.mixes and any(side == "out" for _, side in b.owners))  # fmt: skip
            order = labels[feed.start : feed.start + feed.size]
            inside = set(here)
            order = np.array([c for c in dict.fromkeys(order.tolist()) if c in inside])
            each = (tuple(n for n in names[side]) for side in ("out", "in", "between"))
            found.append((feed.start, int(order[0]), Coupling(*each, len(order)), order, feed))
        found.sort(key=lambda f: f[:2])
        return [f[2] for f in found], [f[3] for f in found], [f[4] for f in found]

    def _bound(self, labels: np.ndarray, count: int) -> np.ndarray:
        """Return the score of each component: what readers ask times what feeds can reach."""
        scores = np.zeros(count)
        if self.total is not None and self.total.requires_grad:
            leaves = [part[2] for part in self.parts]
            for (ids, axis, _, reach), asked in zip(
                self.parts, torch.autograd.grad(self.total, leaves, allow_unused=True), strict=True
            ):
                if asked is not None:
                    each = (asked * reach).movedim(axis, 0).flatten(1).sum(1)
                    scores += np.bincount(labels[ids], each.cpu().numpy(), minlength=count)
        return scores

    def _tell(self, labels: np.ndarray) -> None:
        """Warn once of all that keeps channels, unless no layer could lose any by it."""
        lines = []
        for (why, where), groups in self.causes.items():
            touched = set(labels[np.concatenate(groups)].tolist())
            names = {
                layer: None for block in self.blocks if block.mixes for layer, side in block.owners
                if side == "out" and touched & set(labels[block.start : block.start + block.size].tolist())
            }  # fmt: skip
            if names:
                listed = ", ".join(list(names)[:8]) + (
                    f" and {len(names) - 8} more" if len(names) > 8 else ""
                )
                lines.append(f"{why} in {where} ({listed})")
        if lines:
            shown = "; ".join(lines[:20]) + (f"; and {len(lines) - 20} more" if len(lines) > 20 else "")
            warnings.warn(
                f"channels stay that meet what is not known to keep them apart: {shown}", stacklevel=5
            )


def _plain(name: str) -> str:
    """Return the name of what a function computes: of methods, in-place forms and operators alike."""
    if name in ("__getitem__", "__rdiv__", "__rtruediv__", "rdiv"):
        return name
    bare = name.strip("_")
    return ALIKE.get(bare, bare)


def _question(name: str, where: str) -> str:
    ours, packages = os.path.dirname(__file__), os.path.dirname(torch.__file__)
    frames = [f for f in reversed(traceback.extract_stack()) if not f.filename.startswith((ours, packages))]
    frames.sort(key=lambda f: f.filename.startswith(os.path.dirname(packages)))  # first what the user wrote
    line = f"{frames[0].filename}:{frames[0].lineno}: {frames[0].line}" if frames else "unknown line"
    return (
        f"model must not decide by the values of a tensor what it runs: Tensor.{name} in {where} ({line}); "
        "only one of its branches would be seen, write it with torch.where"
    )
