"""DFPC: remove whole channels from any network, across skip connections, without data.

Channels that are added together can only go together. What a channel c of such a coupling is worth is
bounded by the paths from the layers a that feed it to the layers b that read it: if every layer's input
is at most 1, zeroing c changes what is read in L1 by at most

    s_c  =  sum over a, b of the entries of  |M_b|[:, c]  D_ab  |M_a|[c, :],                    (1)

with M the matrix of a layer on its actual map and D_ab the product of the slopes on the way (of a
BatchNorm |gamma| / sqrt(var + eps), of a ReLU 1). No matrix is needed. Send ones out of every layer
through slopes and |weights|, add up what all readers receive, and differentiate: the gradient at the
output of a says what readers ask of each position, R_a, and s_c = sum of R_a times |M_a| 1. Layers only
need the sums of their filters for it, so that scores cost less than one pass through the network.

The lowest channels go; what comes back is the user's class with smaller layers in place.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from posterity._checks import integer, one_of, within
from posterity._models import evaluating
from posterity._random import draw_device
from posterity.compression.channel_flow import Coupling, Picture, look
from posterity.compression.channel_surgery import (
    WRONG,
    Inputs,
    alone,
    does_not_run,
    first_sample,
    layout,
    shrink,
    tensors_in,
)  # fmt: skip

__all__ = ["PrunedModel", "channel_saliencies", "latency", "prune_channels"]

METHODS = ("dfpc", "l1", "random")
ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-3}  # share of the largest output; rounding of narrow dtypes


class PrunedModel(NamedTuple):
    """A network with fewer channels, and what was done to it.

    Attributes
    ----------
    model : nn.Module
        Of the class that was given, in its modes, with new parameters where channels went (an
        optimiser has to be made for them).
    plan : dict
        For each changed layer the kept indices of its "out" and "in" channels; plain lists, so that
        ``torch.save({"plan": plan, "state_dict": ...})`` loads with ``weights_only=True``, for `shrink`.
    couplings : list of Coupling
        Of the given network.
    kept : list of Tensor
        For each coupling the channels that are left, ascending.
    params : tuple of int
        Parameters before and after.
    macs : tuple of int
        Multiplications of convolutions, Linear layers and attention for one sample, before and after.
    """

    model: nn.Module
    plan: dict[str, dict[str, list[int]]]
    couplings: list[Coupling]
    kept: list[Tensor]
    params: tuple[int, int]
    macs: tuple[int, int]


@torch.inference_mode(False)
def channel_saliencies(
    model: nn.Module,
    example_inputs: Inputs,
    couplings: Sequence[Coupling] | None = None,
    *,
    method: Literal["dfpc", "l1", "random"] = "dfpc",
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return how much each channel is worth to the layers that read it.

    Parameters
    ----------
    model : nn.Module
        Any network; left as it is, and scored as in eval mode.
    example_inputs : Tensor or tuple of Tensor
        What it is called with, with a batch axis in front; only shapes count.
    couplings : sequence of Coupling, optional
        Some of `data_flow_couplings`, in any order; by default all.
    method : {"dfpc", "l1", "random"}, default="dfpc"
        The bound of equation 1; the sum of absolute weights of the filters that feed a channel; or
        uniform numbers.
    generator : torch.Generator, optional
        Of the random numbers; by default torch's own.

    Returns
    -------
    list of Tensor of shape (n_channels,), float64
        One a coupling. For inputs up to r in magnitude, the bound is r times as large.

    Raises
    ------
    ValueError
        If the network does not run or decides by values what to run, a coupling is not one of its
        own, a BatchNorm has no running statistics, or weights are not finite.

    Notes
    -----
    1. Biases and shifts are left out: zeroing a channel also removes its constant part.
    2. A product of two maps counts as their sum: a gate is at most 1. A token is one row of an
       Embedding, so the largest entry of a column counts, and not its sum.

    References
    ----------
    .. [1] Narshana, Murti, Bhattacharyya. DFPC: Data Flow Driven Pruning of Coupled Channels without
       Data. ICLR 2023. Section 4, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.compression import channel_saliencies
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-2.0]]))
    >>> _ = net[2].weight.data.copy_(torch.tensor([[3.0, 0.5]]))
    >>> channel_saliencies(net, torch.zeros(1, 1))
    [tensor([3., 1.], dtype=torch.float64)]
    """
    one_of("method", method, METHODS)
    picture = look(model, example_inputs, bounding=method == "dfpc")
    scores = _scores(picture, picture.members, method, generator)
    if couplings is None:
        return scores
    known = dict(zip(picture.couplings, scores, strict=True))
    for coupling in couplings:
        if coupling not in known:
            raise ValueError(f"couplings must be of data_flow_couplings of this model, got {coupling!r:.200}")
    return [known[coupling] for coupling in couplings]


@torch.inference_mode(False)
def prune_channels(
    model: nn.Module,
    example_inputs: Inputs,
    amount: int | float,
    *,
    method: Literal["dfpc", "l1", "random"] = "dfpc",
    scope: Literal["all", "uncoupled"] = "all",
    n_steps: int = 1,
    min_channels: int = 1,
    round_to: int = 1,
    ignore: Sequence[str] = (),
    finetune: Callable[[nn.Module], object] | None = None,
    generator: torch.Generator | None = None,
) -> PrunedModel:
    """Return a copy of a network without its least salient channels.

    The result is run once on the sample beside the given network with the same channels silenced; what
    does not agree, as where a forward hook does something with channels by number, is refused.

    Parameters
    ----------
    model : nn.Module
        Any network in any mode; left as it is.
    example_inputs : Tensor or tuple of Tensor
        What it is called with, with a batch axis in front; no data is needed, noise will do.
    amount : int or float
        How many channels go, or which share in [0, 1) of all that `data_flow_couplings` lists;
        a channel of a coupling counts once.
    method : {"dfpc", "l1", "random"}, default="dfpc"
        As of `channel_saliencies`.
    scope : {"all", "uncoupled"}, default="all"
        "uncoupled" takes only from couplings of one feeding and one reading layer.
    n_steps : int, default=1
        In how many turns, at least 1; scores are computed anew on the smaller network in each.
    min_channels : int, default=1
        What is left at least of a coupling.
    round_to : int, default=1
        What is left of a coupling is a multiple of it, rounded up, or all there was.
    ignore : sequence of str
        Layers whose couplings stay whole, or modules that contain them.
    finetune : callable, optional
        Called with the smaller network after each step; trains it in place.
    generator : torch.Generator, optional
        Of ``method="random"``.

    Returns
    -------
    PrunedModel
        The smaller network with its plan, what was kept, and what it costs.

    Raises
    ------
    ValueError
        If an argument is out of range, more is asked than can go, nothing can, the network cannot be
        followed, or the smaller one does not agree with the given one without those channels.

    References
    ----------
    .. [1] Narshana, Murti, Bhattacharyya. DFPC: Data Flow Driven Pruning of Coupled Channels without
       Data. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.compression import prune_channels
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    >>> small = prune_channels(net, torch.rand(1, 3, 8, 8), 0.5)
    >>> small.model[3], small.params
    (Conv2d(4, 2, kernel_size=(3, 3), stride=(1, 1)), (386, 194))
    """
    one_of("method", method, METHODS)
    one_of("scope", scope, ("all", "uncoupled"))
    n_steps, round_to = integer("n_steps", n_steps, 1), integer("round_to", round_to, 1)
    min_channels = integer("min_channels", min_channels, 1)
    if isinstance(amount, float):
        within("amount", amount, 0, 1, open_high=True)
    else:
        amount = integer("amount", amount, 0)
    if finetune is not None and not callable(finetune):
        raise ValueError(f"finetune must be callable, got {type(finetune).__name__}")
    picture = look(model, example_inputs, bounding=method == "dfpc" and n_steps == 1)
    if not picture.couplings:
        raise ValueError("model must have channels that can be removed, got none: every one is tied to an input, "
                         "an output or what is named in the warning")  # fmt: skip
    open_to = _open(model, picture.couplings, scope, ignore)
    sizes = [coupling.n_channels for coupling in picture.couplings]
    most = sum(max(0, n - min_channels) for n, free in zip(sizes, open_to, strict=True) if free)
    total = int(amount * sum(sizes)) if isinstance(amount, float) else amount
    if total > most:
        raise ValueError(f"amount must be at most {most} channels here, of {sum(sizes)}, got {amount}")

    modes = {name: module.training for name, module in model.named_modules()}
    now, inputs = model, first_sample(example_inputs)
    alive = [np.ones(n, bool) for n in sizes]
    gone = 0
    macs = [0, 0]
    for step in range(1, n_steps + 1):
        wanted = total * step // n_steps - gone
        small = picture if n_steps == 1 else look(now, example_inputs, bounding=method == "dfpc", quiet=True)
        members = _members(picture, small, alive)
        scores = _scores(small, members, method, generator)
        left = _select(scores, alive, open_to, wanted, min_channels, round_to)
        gone += wanted
        lost = [m[~keep[here]] for m, keep, here in zip(members, left, alive, strict=True)]
        plan = small.plan(np.concatenate(lost))
        now, alive = shrink(now, plan).eval(), left
        full, macs[1] = _agree(small.model, now, plan, inputs)
        macs[0] = macs[0] or full
        if finetune is not None:
            _finetuned(now, finetune)
    lost = [m[~keep] for m, keep in zip(picture.members, alive, strict=True)]
    for name, module in now.named_modules():
        module.training = modes.get(name, module.training)
    return PrunedModel(
        now, picture.plan(np.concatenate(lost)), picture.couplings,
        [torch.from_numpy(np.flatnonzero(keep)) for keep in alive],
        (_size(model), _size(now)), (macs[0], macs[1]),
    )  # fmt: skip


@torch.inference_mode(False)
def latency(model: nn.Module, example_inputs: Inputs, *, n_repeats: int = 30, warmup: int = 5) -> float:
    """Return the median seconds of a forward pass in eval mode, without gradients.

    Parameters
    ----------
    model : nn.Module
        Its modes are put back.
    example_inputs : Tensor or tuple of Tensor
        The whole batch to time.
    n_repeats : int, default=30
        Passes that are timed, at least 1.
    warmup : int, default=5
        Passes before them.

    Returns
    -------
    float
        Seconds of a pass.

    Raises
    ------
    ValueError
        If the network does not take the inputs, or a number is out of range.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import latency
    >>> 0 < latency(torch.nn.Linear(4, 4), torch.rand(2, 4), n_repeats=3) < 1
    True
    """
    n_repeats, warmup = integer("n_repeats", n_repeats, 1), integer("warmup", warmup, 0)
    first_sample(example_inputs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    wait: Any = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    seconds = []
    with torch.no_grad(), _as_it_predicts(model):
        for turn in range(warmup + n_repeats):
            wait()
            start = time.perf_counter()
            try:
                model(*inputs)
            except WRONG as error:
                raise does_not_run(error) from error
            wait()
            if turn >= warmup:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def _as_it_predicts(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; attention keeps its fast path, which is what is timed."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _open(model: nn.Module, couplings: list[Coupling], scope: str, ignore: Sequence[str]) -> list[bool]:
    """Return for each coupling whether channels may be taken from it."""
    if isinstance(ignore, str) or not all(isinstance(name, str) for name in ignore):
        raise ValueError(f"ignore must be a sequence of names of layers, got {ignore!r:.100}")
    known = dict(model.named_modules(remove_duplicate=False))
    for name in ignore:
        if name not in known:
            raise ValueError(f"ignore must name layers of the model, got {name!r}, which it has not")
    shut = {id(module) for name in ignore for module in known[name].modules()}
    return [
        not any(id(known[layer]) in shut for layer in (*c.feeds, *c.reads, *c.between))
        and (scope == "all" or len(c.feeds) == len(c.reads) == 1)
        for c in couplings
    ]


def _scores(
    picture: Picture, members: list[np.ndarray], method: str, generator: torch.Generator | None
) -> list[Tensor]:
    if method == "random":
        device = draw_device(generator)
        return [
            torch.rand(len(m), generator=generator, dtype=torch.float64, device=device).cpu() for m in members
        ]
    scores = [torch.from_numpy(picture.worth[m]) for m in members]
    for coupling, score in zip(picture.couplings, scores, strict=False):
        if not bool(score.isfinite().all()):
            raise ValueError(
                f"model must have finite weights, got NaN or infinity around {coupling.feeds[0]!r}"
            )
    return scores


def _members(first: Picture, small: Picture, alive: list[np.ndarray]) -> list[np.ndarray]:
    """Return the components of the channels that are left, in the smaller network."""
    if small is first:
        return first.members
    places = {(*block.owners, block.mixes): block for block in small.blocks}
    gone = np.concatenate([m[~keep] for m, keep in zip(first.members, alive, strict=True)])
    members = []
    for home, member, keep in zip(first.homes, first.members, alive, strict=True):
        labels = first.labels[home.start : home.start + home.size]
        labels = labels[~np.isin(labels, gone)]
        now = places.get((*home.owners, home.mixes))
        if now is None:  # a layer of one channel is not followed: it keeps it
            members.append(np.zeros(keep.sum(), int))
            continue
        _, where = np.unique(labels, return_index=True)
        where = where[np.searchsorted(np.unique(labels), member[keep])]
        members.append(small.labels[now.start + where])
    return members


def _select(
    scores: list[Tensor], alive: list[np.ndarray], open_to: list[bool], wanted: int, least: int, multiple: int
) -> list[np.ndarray]:
    """Return which channels are left when the lowest go, ties by coupling, then index."""
    left = [keep.copy() for keep in alive]
    index = [np.flatnonzero(keep) for keep in alive]
    counts = [len(i) for i in index]
    order = sorted(
        (float(s), k, i) for k, score in enumerate(scores) if open_to[k] for i, s in enumerate(score)
    )
    taken: dict[int, list[int]] = {}
    for _, k, i in order:
        if wanted and counts[k] > least:
            left[k][index[k][i]] = False
            taken.setdefault(k, []).append(int(index[k][i]))
            counts[k], wanted = counts[k] - 1, wanted - 1
    for k, out in taken.items():
        back = min(-counts[k] % multiple, len(out))
        left[k][out[len(out) - back :]] = True  # the best of them
    return left


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class _Multiplications(TorchDispatchMode):
    """Counts multiplications of matrix products and convolutions, as torch's FlopCounterMode, which is slower."""

    total = 0
    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = flop_registry.get(getattr(func, "_overloadpacket", func))
        if flops is not None:
            self.total += flops(*args, **(kwargs or {}), out_val=out) // 2
        return out


@torch.no_grad()
def _agree(
    full: nn.Module, small: nn.Module, plan: dict[str, dict[str, list[int]]], inputs: tuple[Tensor, ...]
) -> tuple[int, int]:
    """Return the multiplications of both networks; refuse a small one that computes something else.

    It has to be the full one whose readers do not see the lost channels, which are silenced in place.
    """
    modules = dict(full.named_modules())
    for name, sides in plan.items():
        form = layout(modules[name])
        if form is not None and form.mixes and "in" in sides:
            weight: Any = modules[name].weight
            axis = form.tensors["weight"]["in"]
            lost = sorted(set(range(weight.shape[axis])) - set(sides["in"]))
            weight.index_fill_(axis, torch.tensor(lost, device=weight.device), 0)
    outs, macs = [], []
    for net in (full, small):
        # attention by its ordinary path: of the fast ones nothing is counted
        with alone(inputs), evaluating(net), sdpa_kernel(SDPBackend.MATH), _Multiplications() as counter:
            try:
                outs.append(tensors_in(net(*inputs)))
            except WRONG as error:
                raise ValueError(
                    "model does something with channels that was not seen, without them it gives: "
                    f"{error!r:.200}; name its layers in ignore"
                ) from error
        macs.append(counter.total)
    for a, b in zip(*outs, strict=True):
        same = a.shape == b.shape
        if same and a.is_floating_point() and a.numel():
            size = a.abs().nan_to_num(0, 0, 0).max().double()
            off = (a.double() - b.double()).abs().nan_to_num(0, 0, 0).max()
            same = bool(off <= ALLOWED.get(a.dtype, 0.1) * size + torch.finfo(a.dtype).tiny)
        if not same:
            raise ValueError(
                "model does something with channels that was not seen: without them it is another network; "
                "name its layers in ignore"
            )
    return macs[0], macs[1]


def _finetuned(model: nn.Module, finetune: Callable[[nn.Module], object]) -> None:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with torch.enable_grad():
        finetune(model)
    for name, tensor in model.state_dict().items():
        if shapes.pop(name, None) != tensor.shape:
            raise ValueError(f"finetune must not change shapes, {name!r} is now {tuple(tensor.shape)}")
    if shapes:
        raise ValueError(f"finetune must not remove weights, {next(iter(shapes))!r} is gone")
