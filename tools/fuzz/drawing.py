"""Arguments drawn from a signature: shapes, dtypes and choices by annotation, awkward values among them.

All sizes of an example are one number, most of the time, so that what is drawn fits together;
the rest of the time one of them is 0, 1 or another. Of two examples that show the same fault
hypothesis prefers the plainer, so each list begins with what is most ordinary.
"""

import collections.abc
import inspect
import math
import types
import typing
from dataclasses import is_dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

FILLS = (
    "ordinary", "shares", "unit rows", "zeros", "equal", "one NaN", "one infinity", "huge", "tiny", "far", "strided",
    "expanded", "needs gradient",
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
NUMBERS = (0.5, 1.0, 0.0, 2.0, -1.0, float("nan"), float("inf"), 1e-12, 1e12)
LOSSES = ("loss_fn", "output_loss", "sample_loss")
CAPPED = 20  # a default beyond it means long work: fewer are drawn


class Undrawable(Exception):
    """What an annotation asks for is not to be had from it."""


class Net(nn.Module):
    """A user's network: it maps the last axis of what comes first, and lets the rest pass by."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x, *_, **__):
        if not x.is_floating_point() or x.shape[-1:] != (self.linear.in_features,):
            raise ValueError(f"x must have {self.linear.in_features} features, got {tuple(x.shape)}")
        return self.linear(x.to(self.linear.weight.dtype)).tanh()

    def extra_repr(self):
        return ""


def loss(*given):
    """Return a user's loss: the mean square of all numbers that it is given, of a network's parameters among them."""
    parts = [
        part for each in given for part in (each.parameters() if isinstance(each, nn.Module) else [each])
    ]
    parts = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    return sum((part.square().mean() for part in parts), torch.zeros(()))


class Drawing:
    """One example: its sizes, its dtype, and how a value is drawn from an annotation.

    ``data`` is hypothesis', ``others`` the public names of the domain, from whose classes
    and functions an argument may be had.
    """

    def __init__(self, data, others=()):
        self.data, self.others = data, tuple(others)
        self.size = self.pick((4, 4, 12, 2, 1, 3))
        self.things = self.pick((self.size, min(self.size, 2)))  # nodes, classes, groups that integers name
        self.dtype = self.pick((torch.float32,) * 3 + DTYPES)
        self.strange = self.pick((False, True))  # else only ordinary numbers
        self.sizes, self.names, self.seed = {}, (), 0

    def pick(self, options):
        return self.data.draw(st.sampled_from(list(options)))

    def now_and_then(self, usual, others):
        """Return what is usual, or one time in eight, where strange things are drawn, one of the others."""
        rarely = self.strange and self.pick((False,) * 8 + (True,))
        return self.pick(others) if rarely else usual

    # --- arguments of a call ---

    def arguments(self, function, hints=None, depth=0):
        """Return keyword arguments for a function: those that must be given, and now and then another."""
        drawn, parameters = {}, inspect.signature(function).parameters
        self.names = tuple(parameters)
        for name, parameter in parameters.items():
            if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            annotation = parameter.annotation
            if hints and (annotation is Tensor or annotation == Tensor | None):
                annotation = hints.get(name, annotation)
            default = parameter.default
            long = isinstance(default, int) and not isinstance(default, bool) and default > CAPPED
            if default is not parameter.empty and not long and self.pick((True, True, False)):
                continue
            try:
                drawn[name] = self.pick((2, 1, 3, 12)) if long else self.value(name, annotation, depth)
            except Undrawable:
                if default is parameter.empty:
                    raise
        return drawn

    def value(self, name, annotation, depth=0):
        """Return a value of an annotation."""
        origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
        if hasattr(annotation, "dim_str"):
            return self.array(annotation)
        if annotation is Tensor:
            return self.tensor((self.size, self.size), self.dtype)
        if annotation is np.ndarray:
            return self.ndarray((self.sizes.get("n", self.size),), self.pick((torch.int64, torch.float64)))
        if annotation is int:
            return self.now_and_then(self.pick((self.size, self.size, 1, 2)), (0, 1, 2, 5, -1, 2.5))
        if annotation is float:
            return self.now_and_then(self.pick((0.5, 0.5, 0.5, 1.0)), NUMBERS)
        if annotation is bool:
            return self.pick((True, False))
        if annotation is str and name == "layers":  # submodules of a user's network
            return self.now_and_then("linear", ("", "head"))
        if annotation is nn.Sequential and name == "model":
            return self.cast(
                nn.Sequential(nn.Linear(self.size, self.size), nn.ReLU(), nn.Linear(self.size, 2))
            )
        if origin is collections.abc.Mapping and parts == (str, float):  # a number for each parameter
            names = self.now_and_then(
                ("linear.weight", "linear.bias"), ((), ("linear.weight",), ("head",) * 2)
            )
            return {each: self.value(name, float, depth) for each in names}
        if annotation is torch.Generator:
            return torch.Generator().manual_seed(0)
        if annotation is torch.dtype:
            return self.dtype
        if annotation in (None, type(None)):
            return None
        if origin is typing.Literal:
            return self.pick(parts)
        if origin in (typing.Union, types.UnionType):
            return self.either(name, parts, depth)
        if origin is tuple:
            return tuple(self.value(name, part, depth) for part in parts if part is not Ellipsis)
        if origin in (list, collections.abc.Sequence, collections.abc.Iterable) and parts:
            return [self.value(name, parts[0], depth) for _ in range(self.pick((2, 1, 0)))]
        if annotation is collections.abc.Iterable:
            return list(range(self.size))
        if origin is collections.abc.Callable:
            return loss if name in LOSSES else self.callable(parts, depth)
        if annotation is typing.Any:
            return self.anything(name)
        if inspect.isclass(annotation):
            return self.instance(annotation, depth)
        raise Undrawable(annotation)

    def either(self, name, parts, depth):
        """Return a value of one of the members, the next where the first cannot be had."""
        first = self.pick(range(len(parts)))
        for k in range(len(parts)):
            try:
                return self.value(name, parts[(first + k) % len(parts)], depth)
            except Undrawable:
                continue
        raise Undrawable(parts)

    def callable(self, parts, depth):
        """Return a network, what makes one, or a function of tensors.

        What is called with anything is a network of the domain that takes what the function takes.
        """
        arguments = parts[0]
        if parts[1] is torch.optim.Optimizer:
            return torch.optim.SGD
        if arguments is not Ellipsis and arguments[:1] == [torch.Size]:
            return lambda shape, *_: torch.zeros(shape)
        if arguments == [torch.Generator]:
            return lambda generator: torch.randn(self.size, generator=generator)
        if arguments is Ellipsis and parts[1] is typing.Any:
            alike = [net for net in self.others if _is_net(net) and _shares(net, self.names)]
            return self.instance(self.pick(alike), depth + 1) if alike else self.cast(Net(self.size))
        if arguments == [] or arguments == [int]:
            return lambda *_: Net(self.size)
        if getattr(parts[1], "array_type", None) is np.ndarray:  # a truth value for each of what comes
            return lambda given, *_: np.arange(len(given)) % 2 == 0
        if arguments == [Tensor] and self.pick((True, False)):
            return torch.tanh
        if arguments is not Ellipsis and arguments[0] is nn.Module:
            return lambda given, *_: given
        if arguments is not Ellipsis and arguments[0] is int:
            return lambda n, *_: torch.zeros(n, self.size)
        return self.cast(Net(self.size))

    def instance(self, kind, depth):
        """Return an object of a class: a user's network, or one of the domain's, made or had from a function."""
        if depth > 2:
            raise Undrawable(kind)
        if kind is nn.Module:
            return self.cast(Net(self.size))
        if kind is torch.optim.Optimizer:
            return torch.optim.SGD(self.cast(Net(self.size)).parameters(), lr=0.1)
        if is_result(kind):
            makers = [f for f in self.others if inspect.isfunction(f) and _makes(f, kind)]
            if not makers:
                raise Undrawable(kind)
            return makers[0](**self.arguments(makers[0], depth=depth + 1))
        if getattr(kind, "_is_protocol", False):
            known = [each for each in self.others if inspect.isclass(each) and each is not kind]
            fulfils = [each for each in known if kind in self.others and issubclass(each, kind)]
            if not fulfils:
                raise Undrawable(kind)
            return self.instance(self.pick(fulfils), depth)
        if kind not in self.others:
            raise Undrawable(kind)
        return self.cast(kind(**self.arguments(kind.__init__, depth=depth + 1)))

    def cast(self, made):
        """Return a module in the dtype of the example, training or not."""
        if isinstance(made, nn.Module):
            made = made.to(self.dtype) if self.dtype.is_floating_point else made
            made.train(self.pick((False, True)))
        return made

    def anything(self, name):
        """Return what a name without an annotation is in scikit-learn, or an integer."""
        n, d = self.extent("samples"), self.extent("features")
        if name == "X":
            n = self.sizes["samples"] = self.pick((n, 12 * n))
            return self.ndarray(self.pick(((n, d),) * 4 + ((n, 3, d), (n,))), self.dtype)
        if name in ("y", "sensitive_features", "sample_weight"):
            return self.ndarray((n,), self.pick((torch.int64, torch.float32)))
        if name in ("treatment", "instrument"):
            return np.arange(n) % 2
        if name == "Y":
            return self.ndarray((n, 2), torch.float32)
        if name == "random_state":
            return 0
        if name == "params":  # of an optimiser
            dtype = self.dtype if self.dtype.is_floating_point else torch.float32
            params = [
                self.tensor((n, d), dtype).detach().requires_grad_() for _ in range(self.pick((2, 1, 0)))
            ]
            for p in params:
                p.grad = torch.ones_like(p)
            return params
        if name == "data":
            data = __import__("torch_geometric.data", fromlist=["Data"])
            x, y = self.tensor((n, d), self.dtype), self.tensor((n,), torch.int64)
            return data.Data(x=x, edge_index=self.tensor((2, 2 * n), torch.int64), y=y)
        if name.startswith("_") or name in ("fit", "init", "estimator", "output_weights"):
            raise Undrawable(name)
        return self.now_and_then(self.size, (0, 1, -1, 2.5))

    # --- tensors ---

    def extent(self, name):
        """Return the size of a named dimension, which is the same wherever it stands in a call."""
        if name not in self.sizes:
            self.sizes[name] = self.now_and_then(self.size, (0, 1, 5))
        return self.sizes[name]

    def shape(self, dim_str):
        """Return sizes for jaxtyping's names of them."""
        sizes = []
        for word in dim_str.split():
            if word.startswith("*") or word == "...":
                name = word.lstrip("*")
                if name not in self.sizes:
                    self.sizes[name] = (self.extent("size of " + name),) * self.pick((1, 0, 2))
                sizes.extend(self.sizes[name])
            else:
                sizes.append(int(word) if word.isdecimal() else self.extent(word))
        return tuple(sizes)

    def array(self, annotation):
        """Return a tensor or an ndarray of a jaxtyping annotation."""
        kinds = (
            annotation.dtypes if isinstance(annotation.dtypes, tuple | list) else ("float32", "int64", "bool")
        )
        kind = self.pick([kind for kind in ("float32", "int64", "bool") if kind in kinds] or [None])
        if kind is None:
            raise Undrawable(annotation)
        whole = self.pick((torch.int64, torch.int64, torch.int64, torch.int32))
        dtype = {"float32": self.dtype, "int64": whole, "bool": torch.bool}[kind]
        make = self.tensor if annotation.array_type is Tensor else self.ndarray
        return make(self.shape(annotation.dim_str), dtype)

    def ndarray(self, shape, dtype):
        """Return `tensor` as an ndarray, which has no bfloat16."""
        value = self.tensor(shape, dtype).detach()
        return (value.float() if dtype is torch.bfloat16 else value).numpy()

    def tensor(self, shape, dtype):
        """Return a tensor whose values are those of its fill; integers name one of ``size`` things."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        if dtype is torch.bool:
            if self.pick((True, False)):
                return torch.rand(shape, generator=generator) < 0.5
            return self._in_turn(shape) % 3 == self.seed % 3  # three in a row share out all there is
        if not dtype.is_floating_point:
            value = torch.randint(self.things, shape, generator=generator, dtype=dtype)
            fill = self.pick(("ordinary", "in turn", "both ways"))
            if fill == "in turn":
                value = (self._in_turn(shape) % self.things).to(dtype)
            if fill == "both ways" and len(shape) == 2:  # edges, each with its reverse
                half = value[:, : shape[1] // 2]
                value = torch.cat([half, half.flip(0), value[:, 2 * half.shape[1] :]], 1)
            odd = self.now_and_then("", ("sorted", "negative", "beyond", "equal"))
            if odd == "sorted":
                value = value.sort().values
            elif odd and value.numel():
                value[(0,) * value.ndim] = {"negative": -1, "beyond": 100, "equal": 0}[odd]
            return value
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        usual = self.pick(("ordinary", "ordinary", "shares", "unit rows"))
        return self.filled(value, self.now_and_then(usual, FILLS)).to(dtype)

    @staticmethod
    def _in_turn(shape):
        return torch.arange(math.prod(shape)).reshape(shape)

    def filled(self, value, fill):
        first = (0,) * value.ndim
        if fill == "shares":
            return value.abs() / value.abs().sum(-1, keepdim=True) if value.ndim else value.abs()
        if fill == "unit rows":
            return value / value.norm(dim=-1, keepdim=True) if value.ndim else value
        if fill in ("zeros", "equal"):
            return torch.full_like(value, float(fill == "equal"))
        if fill in ("one NaN", "one infinity"):
            if value.numel():
                value[first] = float("nan" if fill == "one NaN" else "inf")
            return value
        if fill in ("huge", "tiny", "far"):
            return value + 1e8 if fill == "far" else value * (1e12 if fill == "huge" else 1e-12)
        if fill == "strided":
            return (
                value.mT.contiguous().mT
                if value.ndim > 1
                else value.repeat_interleave(2)[::2]
                if value.ndim
                else value
            )
        if fill == "expanded" and value.numel():
            return value[:1].expand(value.shape) if value.ndim else value
        return value.requires_grad_() if fill == "needs gradient" else value


def is_result(value):
    """Return whether a class only holds what a function returns."""
    return inspect.isclass(value) and (is_dataclass(value) or hasattr(value, "_fields"))


def _is_net(value):
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _shares(net, names):
    """Return whether a network is called with at least two of the names."""
    return len(set(inspect.signature(net.forward).parameters) & set(names) - {"self"}) >= 2


def _makes(function, kind):
    """Return whether a function returns a class that it does not need one of."""
    said = inspect.signature(function)
    return said.return_annotation is kind and all(p.annotation is not kind for p in said.parameters.values())
