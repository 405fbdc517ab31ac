"""Adaptive width: learning rates that are right at one width are right at every other, with Adam too.

Give each weight matrix of a network of width n four exponents,

    W = n^-a w,   w ~ N(0, n^-2b),   w <- w - lr n^-c Q(n^d g),                       (1)

where g is the gradient of w and Q what an optimiser makes of gradients, entry by entry (Adam,
sign descent, RMSProp). Two choices keep training finite as n grows: NTK, in which features
stop moving, and muP ("mu"), in which every layer moves as much as it can, so that a learning
rate tuned on a narrow model suits a wide one. What this does to a model m times as wide as
its base, under muP and Adam: the last layer's input is multiplied by 1/m, hidden matrices
learn at lr/m, and Adam's eps becomes eps/m, since gradients shrink like 1/m.
"""

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from posterity._checks import at_least, one_of

__all__ = ["Exponents", "WidthInfo", "exponents", "param_groups", "parametrize", "width_info"]

Parametrization = Literal["mu", "ntk", "standard"]
Family = Literal["adaptive", "sgd"]
Role = Literal["input", "hidden", "output"]

_MARK = "_adaptive_width"  # attribute of a parametrized model: family, and factors of each parameter


class Exponents(NamedTuple):
    """Exponents of one layer in (1): ``W = n^-a w``, ``w ~ N(0, n^-2b)``, rate ``n^-c``, gradient times ``n^d``."""

    a: float
    b: float
    c: float
    d: float


class WidthInfo(NamedTuple):
    """What a tensor is in its network, and how much wider than in the base; ``"fixed"`` has multiplier 1."""

    role: Literal["input", "hidden", "output", "fixed"]
    multiplier: float


_TABLE: dict[tuple[str, str], tuple[Exponents, Exponents, Exponents]] = {  # input, hidden, output
    ("mu", "adaptive"): (Exponents(0, 0, 0, 1), Exponents(0, 0.5, 1, 1), Exponents(1, 0, 0, 1)),
    ("ntk", "adaptive"): (Exponents(0, 0, 0.5, 0.5), Exponents(0.5, 0, 1, 1), Exponents(0.5, 0, 0.5, 0.5)),
    ("standard", "adaptive"): (Exponents(0, 0, 0, 0), Exponents(0, 0.5, 0, 0), Exponents(0, 0.5, 0, 0)),
    ("mu", "sgd"): (Exponents(0, 0, -1, 0), Exponents(0, 0.5, 0, 0), Exponents(1, 0, -1, 0)),
    ("ntk", "sgd"): (Exponents(0, 0, 0, 0), Exponents(0.5, 0, 0, 0), Exponents(0.5, 0, 0, 0)),
    ("standard", "sgd"): (Exponents(0, 0, 0, 0), Exponents(0, 0.5, 0, 0), Exponents(0, 0.5, 0, 0)),
}


def exponents(parametrization: Parametrization, family: Family = "adaptive") -> dict[Role, Exponents]:
    """Return the exponents of (1) for the three roles that a layer can have.

    ``(a + t, b - t, c - t, d + t)`` for one layer is the same training under an adaptive Q
    without eps; ``(a + t, b - t, c - 2t, d)`` under SGD.

    Parameters
    ----------
    parametrization : {"mu", "ntk", "standard"}
        "standard" is PyTorch's: fan-in initialisation, one learning rate.
    family : {"adaptive", "sgd"}, default="adaptive"
        Optimisers that divide gradients by their size, or that use them as they are.

    Returns
    -------
    dict
        ``Exponents`` of ``"input"``, ``"hidden"`` and ``"output"``.

    Raises
    ------
    ValueError
        If a name is unknown.

    References
    ----------
    .. [1] Littwin, Yang. Adaptive Optimization in the infinite-Width Limit. ICLR 2023. On abcd-parametrisations.
    .. [2] Yang, Hu. Tensor Programs IV: Feature Learning in Infinite-Width Neural Networks.
       ICML 2021. Section 5, for SGD.

    Examples
    --------
    >>> from posterity.optimization import exponents
    >>> exponents("mu")["hidden"]
    Exponents(a=0, b=0.5, c=1, d=1)
    """
    one_of("parametrization", parametrization, ("mu", "ntk", "standard"))
    one_of("family", family, ("adaptive", "sgd"))
    row = _TABLE[parametrization, family]
    return {"input": row[0], "hidden": row[1], "output": row[2]}


def width_info(model: nn.Module, base: nn.Module) -> dict[str, WidthInfo]:
    """Return the role of each parameter, read off the dimensions in which it differs from the base.

    A weight whose outputs alone grow is an input layer, whose inputs alone grow an output
    layer, and one that grows both ways is hidden. Biases, gains of normalisation and
    embeddings that grow count as input layers: one number of theirs feeds each unit.

    Parameters
    ----------
    model : nn.Module
        Only its shapes are read.
    base : nn.Module
        The same architecture at another width, on any device, ``meta`` too.

    Returns
    -------
    dict
        `WidthInfo` by parameter name; a hidden weight's multiplier is that of its inputs.

    Raises
    ------
    ValueError
        If names or ranks differ; a tensor differs in more than two dimensions, or in a kernel's
        size; an output weight belongs to neither a Linear nor a Conv module; or one tensor
        has two roles, as an embedding tied to a readout has.

    Warns
    -----
    UserWarning
        If all shapes are equal, so that nothing will be scaled.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.optimization import width_info
    >>> info = width_info(nn.Linear(64, 10), nn.Linear(16, 10))
    >>> info["weight"], info["bias"]
    (WidthInfo(role='output', multiplier=4.0), WidthInfo(role='fixed', multiplier=1.0))
    """
    tensors = _tensors(model, base)
    _warn_if_fixed(tensors)
    return {name: WidthInfo(tensors[name].role, tensors[name].m) for name, _ in model.named_parameters()}


def parametrize(
    model: nn.Module,
    base: nn.Module,
    *,
    parametrization: Parametrization = "mu",
    family: Family = "adaptive",
    rescale_init: bool = True,
) -> nn.Module:
    """Put a freshly initialised model into a parametrisation of which its base is an ordinary member.

    At the base's width nothing changes. Keys of the state dict never do. Train with the groups
    that `param_groups` makes. With "ntk" and "standard" no layer has a multiplier: by the
    symmetry of `exponents`, initial size and rate do its work.

    Parameters
    ----------
    model : nn.Module
        Changed in place; once only. What multiplies the output layers is not in the state dict, so
        call this, with ``rescale_init=False``, also before a checkpoint is loaded.
    base : nn.Module
        As `width_info` takes it.
    parametrization : {"mu", "ntk", "standard"}, default="mu"
    family : {"adaptive", "sgd"}, default="adaptive"
        The optimiser to come.
    rescale_init : bool, default=True
        Whether to scale the initial weights and biases of Linear and Conv modules, which PyTorch
        draws with a spread of 1 / sqrt(fan-in), to the spread of (1): in muP the output
        weights by sqrt(m), biases by the root of their layer's fan-in multiplier.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ValueError
        As `width_info`, if a name is unknown, or if ``model`` was parametrized before.

    Warns
    -----
    UserWarning
        If all shapes are equal.

    Notes
    -----
    1. The multiplier is a hook on the output module: it acts where the module is called, not
       where its weight is used by a function.
    2. muP wants attention logits scaled by 1 / d_head, not by its root; that is in the
       attention's code and left to you, as is the initialisation of modules that are not Linear or
       Conv.

    References
    ----------
    .. [1] Littwin, Yang. Adaptive Optimization in the infinite-Width Limit. ICLR 2023. On abcd-parametrisations.
    .. [2] Yang et al. Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
       Hyperparameter Transfer. NeurIPS 2021. Table 8.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import param_groups, parametrize
    >>> def mlp(n):
    ...     return nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
    >>> net = parametrize(mlp(64), mlp(16))
    >>> adam = torch.optim.Adam(param_groups(net, lr=0.01))
    >>> [(len(group["params"]), group["lr"]) for group in adam.param_groups]
    [(4, 0.01), (1, 0.0025), (1, 0.01)]
    """
    table = exponents(parametrization, family)
    one_of("rescale_init", rescale_init, (False, True))
    tensors = _tensors(model, base)
    _warn_if_fixed(tensors)
    return _apply(model, tensors, table, parametrization, family, rescale_init)


def param_groups(
    model: nn.Module, lr: float, *, eps: float = 1e-8, weight_decay: float = 0.0, scale_decay: bool = True
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimiser, one for each different set of rates.

    Parameters
    ----------
    model : nn.Module
        As `parametrize` returned it, not inside a wrapper.
    lr : float
        The base model's, positive.
    eps : float, default=1e-8
        The base model's, at least 0; left out for the family "sgd", which has none.
    weight_decay : float, default=0.0
        The base model's, at least 0.
    scale_decay : bool, default=True
        Whether to keep each group's product of rate and decay that of the base: in muP with Adam
        the hidden groups get ``weight_decay * m``, as the authors' library has it. Right for
        decay that is multiplied by the rate, as SGD's and AdamW's is.

    Returns
    -------
    list of dict
        ``"params"``, ``"lr"``, ``"weight_decay"`` and, for adaptive optimisers, ``"eps"``.

    Raises
    ------
    ValueError
        If a number is out of range, ``model`` was not parametrized, or has got parameters since.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.optimization import param_groups, parametrize
    >>> net = parametrize(nn.Linear(64, 10, bias=False), nn.Linear(16, 10, bias=False))
    >>> [(group["lr"], group["eps"]) for group in param_groups(net, lr=0.01, eps=1e-6)]
    [(0.01, 2.5e-07)]
    """
    at_least("lr", lr, 0, strict=True)
    at_least("eps", eps, 0)
    at_least("weight_decay", weight_decay, 0)
    one_of("scale_decay", scale_decay, (False, True))
    if not isinstance(model, nn.Module) or _MARK not in vars(model):
        raise ValueError(
            f"model must be one that parametrize returned, got {type(model).__name__}: call parametrize first"
        )
    family, factors = getattr(model, _MARK)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name not in factors:
            raise ValueError(
                f"model must have the parameters with which it was parametrized, got also {name}"
            )
        of_lr, of_eps = factors[name] if family == "adaptive" else (factors[name][0], 1.0)
        if (of_lr, of_eps) not in groups:
            group = {"params": [], "lr": lr * of_lr}
            group["weight_decay"] = weight_decay / of_lr if scale_decay else weight_decay
            groups[of_lr, of_eps] = group | ({"eps": eps * of_eps} if family == "adaptive" else {})
        groups[of_lr, of_eps]["params"].append(parameter)
    return list(groups.values())


class _Tensor(NamedTuple):
    """A parameter beside its base: role, ratios of inputs and outputs, ratio of PyTorch's fan-in."""

    role: Literal["input", "hidden", "output", "fixed"]
    m_in: float = 1.0
    m_out: float = 1.0
    fan: float = 1.0

    @property
    def m(self) -> float:
        return self.m_out if self.role == "input" else self.m_in


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Return each parameter and the module that owns it, by every name that it has."""
    return {
        f"{where}.{leaf}" if where else leaf: (owner, parameter)
        for where, owner in module.named_modules(remove_duplicate=False)
        for leaf, parameter in owner._parameters.items()
        if parameter is not None
    }


def _tensors(model: nn.Module, base: nn.Module) -> dict[str, _Tensor]:
    """Return what each parameter is, by every name that it has."""
    for name, module in (("model", model), ("base", base)):
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name} must be an nn.Module, got {type(module).__name__}")
    ours, theirs = _places(model), _places(base)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"base must have the parameters of model, got {', '.join(odd[:3])} in only one of them"
        )
    tensors: dict[str, _Tensor] = {}
    first: dict[int, str] = {}
    for name, (owner, parameter) in ours.items():
        tensors[name] = tensor = _tensor(name, owner, tuple(parameter.shape), tuple(theirs[name][1].shape))
        other = first.setdefault(id(parameter), name)
        if tensors[other].role != tensor.role:
            raise ValueError(
                f"model must not tie tensors of different roles, got {other} ({tensors[other].role}) "
                f"and {name} ({tensor.role}): give one a weight of its own"
            )
    return tensors


def _tensor(name: str, owner: nn.Module, shape: tuple[int, ...], base: tuple[int, ...]) -> _Tensor:
    if shape == base:
        return _Tensor("fixed")
    came = f"got {name} of shape {shape} for {base}"
    if len(shape) != len(base):
        raise ValueError(f"base must have tensors of the same rank as model, {came}")
    wide = [k for k, size in enumerate(shape) if size != base[k]]
    if any(shape[k] == 0 or base[k] == 0 for k in wide):
        raise ValueError(f"base must not have an empty width, {came}")
    ratios = [size / base[k] if k in wide else 1.0 for k, size in enumerate(shape)]
    if len(wide) > 2:
        raise ValueError(f"base must differ from model in at most two dimensions of a tensor, {came}")
    linear = isinstance(owner, nn.Linear | _ConvNd)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        if wide != [1]:
            raise ValueError(f"base must have as many embeddings as model, {came}")
        return _Tensor("input", m_out=ratios[1])
    if len(shape) == 1:
        return _Tensor("input", m_out=ratios[0])
    if wide[-1] > 1:  # neither outputs nor inputs, as the last axis of positions (1, n, width)
        if linear or len(wide) > 1:
            raise ValueError(f"base must differ from model in numbers of inputs and outputs only, {came}")
        return _Tensor("input", m_out=ratios[wide[0]])
    out, into = (1, 0) if isinstance(owner, _ConvTransposeNd) else (0, 1)
    if wide == [into] and not linear:
        raise ValueError(
            f"model must have output weights in Linear or Conv modules only, got {name} in "
            f"{type(owner).__name__}: put a readout into nn.Linear, a table of vectors into nn.Embedding"
        )
    role = "hidden" if len(wide) == 2 else "input" if wide == [out] else "output"
    return _Tensor(role, ratios[into], ratios[out], ratios[1])


def _warn_if_fixed(tensors: dict[str, _Tensor]) -> None:
    if all(tensor.role == "fixed" for tensor in tensors.values()):
        warnings.warn("base has the shapes of model, so nothing is scaled", UserWarning, stacklevel=3)


def _apply(
    model: nn.Module, tensors: dict[str, _Tensor], table: dict[Role, Exponents], parametrization: str,
    family: Family, rescale_init: bool,
) -> nn.Module:  # fmt: skip
    """Scale initial weights, multiply inputs of output layers, and mark the model with its factors."""
    if any(_MARK in vars(module) for module in model.modules()):
        raise ValueError("model must not be parametrized twice, it or a part of it was")
    if parametrization != "mu":  # no multiplier: shift by t = -a, so that W itself is trained
        table = {
            role: Exponents(0, e.b + e.a, e.c + (e.a if family == "adaptive" else 2 * e.a), e.d - e.a)
            for role, e in table.items()
        }
    setattr(
        model, _MARK, (family, {name: _factors(t, table, parametrization) for name, t in tensors.items()})
    )
    if parametrization == "standard":
        return model
    places = _places(model)
    if rescale_init:
        _rescale(places, tensors, table)
    if table["output"].a:
        heads = {places[name][0]: tensor.m for name, tensor in tensors.items() if tensor.role == "output"}
        for head, m in heads.items():
            head.register_forward_pre_hook(_Multiplied(m ** -table["output"].a), with_kwargs=True)
    return model


def _factors(tensor: _Tensor, table: dict[Role, Exponents], parametrization: str) -> tuple[float, float]:
    """Return what learning rate and eps are multiplied by."""
    if tensor.role == "fixed" or parametrization == "standard":
        return 1.0, 1.0
    e = table[tensor.role]
    if tensor.role == "hidden":  # a sum over inputs takes 1 / m_in; gradients shrink with the outputs
        return tensor.m_out ** (1 - e.c) / tensor.m_in, tensor.m_out**-e.d
    return tensor.m**-e.c, tensor.m**-e.d


@torch.no_grad()
def _rescale(
    places: dict[str, tuple[nn.Module, nn.Parameter]], tensors: dict[str, _Tensor], table: dict[Role, Exponents]
) -> None:  # fmt: skip
    """Bring Linear and Conv modules from a spread of 1 / sqrt(fan-in) to m^-b; biases to m^0."""
    done = set()
    for name, (owner, parameter) in places.items():
        if id(parameter) in done or not isinstance(owner, nn.Linear | _ConvNd):
            continue
        done.add(id(parameter))
        where, _, leaf = name.rpartition(".")
        weight = tensors.get(f"{where}.weight" if where else "weight", tensors[name])
        b = table[weight.role].b if leaf == "weight" and weight.role != "fixed" else 0
        factor = (weight.fan / weight.m ** (2 * b)) ** 0.5
        if factor != 1:
            parameter.mul_(factor)


class _Multiplied:
    """A forward pre-hook that multiplies a module's input; an object, so that models pickle and copy."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        return args, kwargs | {"input": kwargs["input"] * self.factor}
