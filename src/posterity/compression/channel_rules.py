"""What each operation does with channels: which it ties together, and by how much it can magnify them.

Every axis of a tensor carries the names of its channels, one a position, or None where its size is
fixed. A rule says what an operation makes of the names of what goes in, and sends the bound of
equation 1 of `posterity.compression.dfpc` along. What has no rule here fixes the channels it touches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__: list[str] = []

Ids = np.ndarray | None


@dataclass
class Flow:
    """The channels on each axis of a tensor, and the bound that flows with it (None is 0)."""

    ids: list[Ids]
    bound: Tensor | None = None
    constant: bool = False  # computed from nothing but constants


@dataclass
class Call:
    """One call of a torch function."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def bind(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name, None for those not given."""
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        return {name: given.get(name) for name in names}

    def again(self, swap: dict[int, Tensor]) -> Any:
        """Return the function of the same arguments, tensors swapped by their id."""

        def change(value: Any) -> Any:
            if isinstance(value, Tensor):
                return swap.get(id(value), value)
            return type(value)(map(change, value)) if type(value) in (list, tuple) else value

        return self.func(*map(change, self.args), **{k: change(v) for k, v in self.kwargs.items()})


class Count(int):
    """The size of an axis with channels: multiples of it follow them, any other use of it fixes them."""

    walk: Any
    ids: np.ndarray
    times: int

    def __new__(cls, value: int, walk: Any, ids: np.ndarray, times: int = 1) -> "Count":
        self = super().__new__(cls, value)
        self.walk, self.ids, self.times = walk, ids, times
        return self

    def __mul__(self, other: Any) -> Any:
        if type(other) is int:
            return Count(int(self) * other, self.walk, self.ids, self.times * other)
        return self._used("__mul__", other)

    __rmul__ = __mul__
    __hash__ = int.__hash__

    def _used(self, name: str, *others: Any) -> Any:
        for count in (self, *others):
            if isinstance(count, Count):
                count.walk.fix(count.ids, "a number of channels used in Python")
        return getattr(int, name)(int(self), *(int(o) if isinstance(o, Count) else o for o in others))


OTHER_USES = (
    "add", "radd", "sub", "rsub", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod",
    "divmod", "rdivmod", "pow", "rpow", "neg", "eq", "ne", "lt", "le", "gt", "ge", "float", "bool",
    "and", "or", "xor", "lshift", "rshift", "abs",
)  # fmt: skip
for _use in OTHER_USES:
    setattr(Count, f"__{_use}__", lambda self, *others, _use=_use: self._used(f"__{_use}__", *others))

# Largest slope of functions of one number.
ONE = (
    "relu", "relu6", "hardtanh", "celu", "tanh", "softplus", "softsign", "tanhshrink", "softshrink",
    "log_sigmoid", "clamp", "clip", "clamp_min", "clamp_max", "abs", "neg", "sin", "cos", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as",
    "cpu", "cuda", "alias", "requires_grad", "data", "leaky_relu", "elu",
)  # fmt: skip
NONE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
SLOPES = {
    **dict.fromkeys(ONE, 1.0), **dict.fromkeys(NONE, 0.0), "gelu": 1.1290, "silu": 1.0999, "mish": 1.0885,
    "hardswish": 1.5, "sigmoid": 0.25, "hardsigmoid": 1 / 6, "selu": 1.7581,
}  # fmt: skip


def _elementwise(walk: Any, call: Call) -> Flow | None:
    x = call.args[0] if call.args else call.kwargs.get("input")
    others = [t for t in walk.tensors(call) if t is not x]
    if not isinstance(x, Tensor) or (others and call.name not in ("to", "type_as")):
        return None
    flow, slope = walk.flow(x), SLOPES[call.name]
    if call.name in ("leaky_relu", "elu"):
        steep = call.bind("input", "negative_slope" if call.name == "leaky_relu" else "alpha")
        slope = max(1.0, *(abs(float(v)) for k, v in steep.items() if k != "input" and v is not None), 0.0)
    if flow.bound is None or slope == 0:
        return Flow(list(flow.ids))
    return Flow(list(flow.ids), flow.bound if slope == 1 else slope * flow.bound)


def _meet(walk: Any, tensors: Sequence[Tensor], ndim: int, skip: int | None = None) -> list[Ids]:
    """Return the channels of tensors that are broadcast to ``ndim`` axes: those at one place are tied."""
    result: list[Ids] = []
    for axis in range(ndim):
        here = [(walk.flow(t), axis - ndim + t.ndim) for t in tensors]
        here = [
            (flow, k, t) for (flow, k), t in zip(here, tensors, strict=True) if k >= 0 and t.shape[k] != 1
        ]
        ids = [flow.ids[k] for flow, k, _ in here]
        known = [each for each in ids if each is not None]
        if axis == skip or not known:
            result.append(None)
        elif len(known) < len(ids):  # meets a size that is fixed
            odd = any(flow.constant for flow, k, _ in here if flow.ids[k] is None)
            for each in known:
                walk.fix(each, "a tensor of fixed size" if odd else None)
            result.append(None)
        else:
            for each in known[1:]:
                walk.unite(known[0], each)
            result.append(known[0])
    return result


def _arithmetic(walk: Any, call: Call) -> Flow | None:
    if call.kwargs.keys() - {"input", "other", "self"}:
        return None  # alpha, rounding_mode, out
    operands = [*call.args, *call.kwargs.values()]
    tensors = [v for v in operands if isinstance(v, Tensor)]
    if call.name == "where":
        tensors = [v for v in operands[1:] if isinstance(v, Tensor)]
        if len(operands) != 3 or any(each is not None for each in walk.flow(operands[0]).ids):
            return None
    elif len(operands) != 2:
        return None
    factor = 1.0
    if call.name in ("mul", "div"):
        for place, v in enumerate(operands):
            single = isinstance(v, Tensor) and v.numel() == 1 and walk.flow(v).constant
            if isinstance(v, (int, float)) or single:
                factor *= abs(float(v))
            elif call.name == "div" and place == 1:
                return None  # by what may be near 0
        if call.name == "div":
            if factor == 0 or not isinstance(operands[0], Tensor):
                return None
            factor = 1 / factor
    ids = _meet(walk, tensors, call.out.ndim)
    bounds = [walk.flow(t).bound for t in tensors]
    bounds = [b.expand(call.out.shape) for b in bounds if b is not None]  # a gate counts as at most 1
    return Flow(ids, factor * sum(bounds[1:], bounds[0]) if bounds else None)


def _conv(walk: Any, call: Call) -> Flow | None:
    transposed, n = "transpose" in call.name, int(call.name[-2])
    names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = call.bind("input", "weight", "bias", "stride", "padding", *names)
    x, weight, bias = (given.pop(k) for k in ("input", "weight", "bias"))
    rest = {k: v for k, v in given.items() if v is not None}
    own = walk.own(weight)
    if own is None:
        return None
    flow, axis = walk.flow(x), x.ndim - 1 - n
    groups = rest.get("groups", 1)
    depthwise = "in" not in own
    if depthwise != (groups > 1) or (depthwise and groups != x.shape[axis]):
        return None
    for k, ids in enumerate(flow.ids):
        if k != axis:
            walk.fix(ids, "channels in a place of a convolution that is none of channels")
    out, incoming = own["out"], flow.ids[axis]
    if depthwise:
        walk.unite(None if incoming is None else np.repeat(incoming, len(weight) // groups), out)
    else:
        walk.unite(incoming, own["in"])
    if bias is not None:
        walk.unite(out, walk.flow(bias).ids[0])
    ids: list[Ids] = [None] * call.out.ndim
    ids[axis] = out
    if not walk.bounding:
        return Flow(ids)
    heavy, t = walk.magnitude(weight), flow.bound
    if depthwise:
        return Flow(ids, None if t is None else call.func(t, heavy, None, **rest))
    if t is not None:  # only the sum over all outputs is wanted: add up the filters first
        walk.demand(call.func(t, heavy.sum(1 if transposed else 0, keepdim=True), None, **rest).sum())
    ones = heavy.new_ones([1 if k == axis else size for k, size in enumerate(x.shape)])
    reach = call.func(ones, heavy.sum(0 if transposed else 1, keepdim=True), None, **rest)
    return Flow(ids, walk.leaf(out, axis, reach, call.out.shape))


def _linear(walk: Any, call: Call) -> Flow | None:
    x, weight, bias = call.bind("input", "weight", "bias").values()
    own = walk.own(weight)
    if own is None or "in" not in own:
        return None
    flow = walk.flow(x)
    for ids in flow.ids[:-1]:
        walk.fix(ids, "channels on an axis that a Linear does not read")
    walk.unite(flow.ids[-1], own["in"])
    if bias is not None:
        walk.unite(own["out"], walk.flow(bias).ids[0])
    ids = [None] * (call.out.ndim - 1) + [own["out"]]
    if not walk.bounding:
        return Flow(ids)
    heavy = walk.magnitude(weight)
    if flow.bound is not None:
        walk.demand((flow.bound * heavy.sum(0)).sum())
    reach = heavy.sum(1).expand(call.out.shape)
    return Flow(ids, walk.leaf(own["out"], len(ids) - 1, reach, call.out.shape))


def _embedding(walk: Any, call: Call) -> Flow | None:
    given = call.bind("input", "weight", "padding_idx", "max_norm")
    own = walk.own(given["weight"])
    if own is None or "in" in own or given["max_norm"] is not None:
        return None
    ids = [None] * (call.out.ndim - 1) + [own["out"]]
    if not walk.bounding:
        return Flow(ids)
    reach = walk.magnitude(given["weight"]).amax(0).expand(call.out.shape)  # of one token at a time
    return Flow(ids, walk.leaf(own["out"], len(ids) - 1, reach, call.out.shape))


def _batch_norm(walk: Any, call: Call) -> Flow | None:
    if call.func is not F.batch_norm:
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = call.bind(*names)
    x, mean, var, weight, bias, training = (given[name] for name in names[:6])
    flow = walk.flow(x)
    tensors = [t for t in (mean, var, weight, bias) if t is not None]
    if not tensors or (walk.bounding and (var is None or training)):
        return None
    for tensor in tensors:
        walk.unite(flow.ids[1], walk.flow(tensor).ids[0])
    bound = flow.bound
    if bound is not None:
        scale = (walk.real(var) + (1e-5 if given["eps"] is None else given["eps"])).rsqrt()
        if weight is not None:
            scale = scale * walk.magnitude(weight)
        bound = bound * scale.reshape(-1, *[1] * (x.ndim - 2))
    return Flow(list(flow.ids), bound)


def _prelu(walk: Any, call: Call) -> Flow:
    x, weight = call.bind("input", "weight").values()
    flow = walk.flow(x)
    if weight.numel() > 1:
        walk.unite(flow.ids[1], walk.flow(weight).ids[0])
    bound = flow.bound
    if bound is not None:
        slope = walk.magnitude(weight).clamp_min(1)
        bound = bound * (slope.reshape(-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else slope)
    return Flow(list(flow.ids), bound)


def _pool(walk: Any, call: Call) -> Flow | None:
    """Pools, interpolation and padding: the last axes are space, and there is no mixing of channels."""
    x = call.args[0] if call.args else call.kwargs["input"]
    if not isinstance(call.out, Tensor) or len(walk.tensors(call)) > 1:
        return None
    given = call.kwargs
    if call.name == "interpolate":
        n, mode = x.ndim - 2, given.get("mode", call.args[3] if len(call.args) > 3 else "nearest")
        if mode == "bicubic":  # has negative weights
            return None
    elif call.name == "pad":
        n = len(call.bind("input", "pad")["pad"]) // 2
    else:
        n = int(call.name[-2])
    flow = walk.flow(x)
    for ids in flow.ids[x.ndim - n :]:
        walk.fix(ids, f"{call.name} along channels")
    ids: list[Ids] = [*flow.ids[: x.ndim - n], *[None] * n]
    t = flow.bound
    if t is None:
        return Flow(ids)
    if call.name == "pad" and given.get("mode", "constant") == "constant":
        t = F.pad(
            t, given.get("pad", call.args[1] if len(call.args) > 1 else None)
        )  # a constant has no share
    elif "max" in call.name:  # at most the sum over the window
        t = _window_sums(call, t, n)
    else:
        t = call.again({id(x): t})
    return Flow(ids, t)


def _window_sums(call: Call, t: Tensor, n: int) -> Tensor:
    if call.name.startswith("adaptive"):
        average: Any = getattr(F, f"adaptive_avg_pool{n}d")
        for k, size in enumerate(call.out.shape[-n:]):
            wide = t.shape[t.ndim - n + k]
            counts = [-(-(i + 1) * wide // size) - i * wide // size for i in range(size)]
            scale = t.new_tensor(counts).reshape(-1, *[1] * (n - 1 - k))
            one = [*t.shape[t.ndim - n :]]
            one[k] = size
            t = average(t, one) * scale
        return t
    given = call.bind("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    kernel, stride, padding, dilation = (
        [given[k]] * n if isinstance(given[k], int) else list(given[k] or fall)
        for k, fall in (("kernel_size", ()), ("stride", ()), ("padding", [0] * n), ("dilation", [1] * n))
    )
    stride = stride or kernel
    ends = []  # ceil_mode may go past the end
    for k in range(n):
        need = (call.out.shape[k - n] - 1) * stride[k] + dilation[k] * (kernel[k] - 1) + 1
        ends += [padding[k], max(0, need - t.shape[k - n] - padding[k])]
    pairs = [ends[2 * k : 2 * k + 2] for k in reversed(range(n))]
    t = F.pad(t, [end for pair in pairs for end in pair])
    sums: Any = getattr(F, f"conv{n}d")
    spread = t.reshape(-1, 1, *t.shape[-n:])
    out = sums(spread, t.new_ones(1, 1, *kernel), stride=stride, dilation=dilation)
    out = out[(..., *(slice(size) for size in call.out.shape[-n:]))]
    return out.reshape(*t.shape[:-n], *out.shape[-n:])


def _reduce(walk: Any, call: Call) -> Flow | None:
    x = call.args[0] if call.args else call.kwargs["input"]
    dim, keep = call.kwargs.get("dim", call.kwargs.get("axis")), bool(call.kwargs.get("keepdim", False))
    if dim is None and len(call.args) > 1:
        dim = call.args[1]
    if len(call.args) > 2:
        keep = bool(call.args[2])
    if not isinstance(x, Tensor) or not isinstance(call.out, Tensor) or len(walk.tensors(call)) > 1:
        return None
    dims = {d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim or range(x.ndim))}
    flow = walk.flow(x)
    for d in dims:
        walk.fix(flow.ids[d], f"{call.name} over channels")
    ids = [None if d in dims else each for d, each in enumerate(flow.ids) if keep or d not in dims]
    if flow.bound is None:
        return Flow(ids)
    # mean and sum, and the largest of many, which is at most their sum
    again = flow.bound.mean if call.name == "mean" else flow.bound.sum
    return Flow(ids, again(dim=sorted(dims), keepdim=keep))


def _join(walk: Any, call: Call) -> Flow | None:
    tensors = call.args[0] if call.args else call.kwargs.get("tensors")
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int) or "out" in call.kwargs:
        return None
    ndim = call.out.ndim
    dim %= ndim
    bounds = [walk.flow(t).bound for t in tensors]
    bound = None
    if any(b is not None for b in bounds):
        zeros = [walk.zeros(t.shape) if b is None else b for t, b in zip(tensors, bounds, strict=True)]
        bound = call.func(zeros, dim)
    if call.name == "stack":
        ids = _meet(walk, tensors, ndim - 1)
        return Flow([*ids[:dim], None, *ids[dim:]], bound)
    if any(t.ndim != ndim for t in tensors):
        return None
    ids = _meet(walk, tensors, ndim, skip=dim)
    parts = [walk.flow(t).ids[dim] for t in tensors]
    if any(part is not None for part in parts):  # channels beside others that stay
        sizes = [t.shape[dim] for t in tensors]
        ids[dim] = np.concatenate(
            [walk.fixed(size) if p is None else p for p, size in zip(parts, sizes, strict=True)]
        )
    return Flow(ids, bound)


PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)


def _view(walk: Any, call: Call) -> Any:
    """Whatever moves, drops or adds axes: strides say which axis became which."""
    x = call.args[0] if call.args else call.kwargs.get("input")
    if not isinstance(x, Tensor) or len(walk.tensors(call)) > 1 or x.ndim > len(PRIMES):
        return None
    flow = walk.flow(x)
    if call.name in ("expand", "expand_as", "broadcast_to"):
        asked = [v for a in call.args[1:] for v in (a if isinstance(a, (tuple, list)) else (a,))]
        for k, ids in enumerate(reversed(flow.ids)):
            _same_size(walk, ids, asked[-1 - k] if k < len(asked) else None, "expand")
    probe = call.again({id(x): torch.empty_strided(x.shape, PRIMES[: x.ndim], device="meta")})
    outs, probes = ([out] if isinstance(out, Tensor) else list(out) for out in (call.out, probe))
    bounds = [None] * len(outs)
    if flow.bound is not None:
        again = call.again({id(x): flow.bound})
        bounds = [again] if isinstance(again, Tensor) else list(again)
    flows = []
    for each, bound in zip(probes, bounds, strict=True):
        came = [PRIMES.index(s) if s in PRIMES[: x.ndim] else None for s in each.stride()]
        came = [k if k is not None and x.shape[k] == size > 1 else None
                for k, size in zip(came, each.shape, strict=True)]  # fmt: skip
        for k, ids in enumerate(flow.ids):
            if k not in came:
                walk.fix(ids, f"{call.name} of channels")
        flows.append(Flow([None if k is None else flow.ids[k] for k in came], bound))
    return flows[0] if isinstance(call.out, Tensor) else flows


def _same_size(walk: Any, ids: Ids, asked: Any, what: str, times: int = 1) -> bool:
    """Whether a size that was asked for follows the channels that it is the size of; else they stay."""
    if ids is None:
        return True
    if isinstance(asked, Count) and asked.times == times and len(asked.ids) == len(ids):
        walk.unite(asked.ids, ids)
        walk.spent.add(id(asked))
        return True
    if asked is None or (type(asked) is int and asked == -1):
        return True
    walk.fix(ids, f"a number of channels written into {what}")
    return False


def _reshape(walk: Any, call: Call) -> Flow | None:
    x = call.args[0] if call.args else call.kwargs.get("input")
    if not isinstance(x, Tensor) or not x.numel() or len(walk.tensors(call)) > 1:
        return None
    flow, shape = walk.flow(x), call.out.shape
    if call.name in ("flatten", "unflatten"):
        asked: list[Any] = [-1] * len(shape)
    else:
        values = call.args[1:] or (call.kwargs.get("shape", call.kwargs.get("size")),)
        asked = [v for a in values for v in (a if isinstance(a, (tuple, list)) else (a,))]
        if len(asked) != len(shape) or not all(isinstance(v, int) for v in asked):
            return None  # view of another dtype
    ids: list[Ids] = [None] * len(shape)
    i = j = 0
    while i < x.ndim or j < len(shape):
        first, start = i, j
        a, b = (x.shape[i] if i < x.ndim else 1), (shape[j] if j < len(shape) else 1)
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * x.shape[i], i + 1
            else:
                b, j = b * shape[j], j + 1
        ins = [k for k in range(first, min(i, x.ndim)) if x.shape[k] > 1]
        outs = [k for k in range(start, min(j, len(shape))) if shape[k] > 1]
        named = [k for k in ins if flow.ids[k] is not None]
        if not named:
            continue
        if len(named) > 1 or len(outs) != 1:
            for k in named:
                walk.fix(flow.ids[k], f"{call.name} of channels")
            continue
        (k,), (o,) = named, outs
        channels: Any = flow.ids[k]
        before = math.prod(x.shape[m] for m in ins if m < k)
        after = math.prod(x.shape[m] for m in ins if m > k)
        if _same_size(walk, channels, asked[o], call.name, before * after):
            ids[o] = np.tile(np.repeat(channels, after), before)
    return Flow(ids, None if flow.bound is None else flow.bound.reshape(shape))


def _fresh(walk: Any, call: Call) -> Flow:
    return Flow([None] * call.out.ndim)


VIEWS = (
    "permute", "transpose", "t", "T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "squeeze",
    "unsqueeze", "__getitem__", "select", "unbind", "chunk", "split", "expand", "expand_as",
    "broadcast_to",
)  # fmt: skip
POOLS = [f"{a}{kind}_pool{n}d" for a in ("", "adaptive_") for kind in ("avg", "max") for n in (1, 2, 3)]
RULES: dict[str, Callable[[Any, Call], Any]] = {
    **dict.fromkeys(SLOPES, _elementwise),
    **dict.fromkeys(("add", "sub", "mul", "div", "where", "maximum", "minimum"), _arithmetic),
    **dict.fromkeys([f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)], _conv),
    **dict.fromkeys([*POOLS, "interpolate", "pad"], _pool),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _join),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), _reshape),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"), _fresh),
    "linear": _linear, "embedding": _embedding, "batch_norm": _batch_norm, "prelu": _prelu,
}  # fmt: skip
