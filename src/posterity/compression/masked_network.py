"""A network whose pruning is trained: its weights times masks, made of scores and of a rate for each layer.

The mask of layer l keeps its weights of largest |score|, all but the ``floor((1 - k_l) n_l)`` smallest, with

    k_l = alpha * rate + (1 - alpha * rate) sigmoid(r_l).

Gradients pass straight through the mask: with g = d loss / d mask, which is d loss / d (masked weight) times
the weight, a score gets g sign(score) and the rate k_l the sum of g over its layer.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity._checks import one_of, within
from posterity._precision import wide
from posterity.compression._layers import WEIGHTED, in_place_of, weight_places, weighted_layers

__all__ = ["HARP"]

CLIP = 0.01  # the start of a rate that learns stays this far from where the sigmoid is flat
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class HARP(nn.Module):
    """A frozen copy of a network whose pruning is trained: scores and rates, straight through masks.

    Parameters
    ----------
    model : nn.Module
        Any; robustly trained, to prune robustly. Not changed. A weight that several modules share has one mask.
    rate : float
        Share of the weights to keep, in (0, 1].
    alpha : float, default=0.1
        In [0, 1): each layer keeps more than ``alpha * rate``, so that none dies.
    start : float or mapping of str to float, optional
        Kept share at the beginning, in [alpha * rate, 1], for all layers or by name. Default 0.1 for a ``rate``
        up to 0.1, else ``(1 + rate) / 2``: the budget is reached from above; ``rate`` if rates are not learned.
    granularity : {"weight", "channel"}, default="weight"
        What is kept or dropped. Channels are those that a layer reads; the budget then counts multiply-adds.
    learn_rates, learn_scores : bool, default=True
        Without learned rates this is HYDRA.
    layers : sequence of str, optional
        Names of Linear and Conv layers; all by default.

    Attributes
    ----------
    model : nn.Module
        The copy; of its parameters only those of normalisation layers learn.

    Raises
    ------
    ValueError
        If an argument is out of range, the model has no layer to prune, a name is unknown or that of a layer whose
        channels cannot be pruned, or a weight is not finite.

    Notes
    -----
    1. Masks are made again when a score or a rate has been changed, and not in each forward pass: once a step,
       however many passes an attack makes. A change through ``.data`` goes unseen.
    2. With channels, the first layer (it reads data), grouped convolutions and layers whose weight is read by a
       module around them (attention) are left whole and do not count; a channel's score begins with the sum of
       its absolute weights. Multiply-adds of a layer are those of its own kept inputs, seen in the first forward pass.
    3. Scores and rates are float32 at least, so that small steps of narrow models are not rounded away.

    References
    ----------
    .. [1] Zhao, Wressnegger. Holistic Adversarially Robust Pruning. ICLR 2023. Sections 3 and 4.
    .. [2] Sehwag et al. HYDRA: Pruning Adversarially Robust Neural Networks. NeurIPS 2020.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import HARP
    >>> net = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
    >>> harp = HARP(net, 0.05)
    >>> {name: round(rate.item(), 4) for name, rate in harp.rates().items()}
    {'0': 0.1, '2': 0.1}
    >>> {name: int(mask.sum()) for name, mask in harp.masks().items()}
    {'0': 100, '2': 10}
    >>> round(harp.compression_loss().item(), 4)  # twice the budget
    1.0
    """

    positions: Tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, model: nn.Module, rate: float, *, alpha: float = 0.1, start: float | Mapping[str, float] | None = None,
        granularity: Literal["weight", "channel"] = "weight", learn_rates: bool = True, learn_scores: bool = True,
        layers: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rate = within("rate", rate, 0, 1, open_low=True)
        self.alpha = within("alpha", alpha, 0, 1, open_high=True)
        self.granularity = one_of("granularity", granularity, ("weight", "channel"))
        one_of("learn_rates", learn_rates, (False, True))
        one_of("learn_scores", learn_scores, (False, True))
        self.least = float(alpha * rate)
        if rate - self.least <= 1e-6 * rate:
            raise ValueError(
                f"alpha must leave room below rate = {rate}, got {alpha}: the budget is out of reach"
            )
        found = _prunable(model, granularity, layers)
        starts = _starts(found, model, start, self.least, (rate if not learn_rates else 0.1 if rate <= 0.1 else (1 + rate) / 2))  # fmt: skip
        self.names = list(found)
        places = weight_places(model, found)
        self._learns = {name: p.requires_grad for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model)
        self.training = model.training
        norms = {id(p) for m in self.model.modules() if isinstance(m, NORMS) for p in m.parameters()}
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in norms)
        self.places = [places[name] for name in self.names]
        self._scores, self._logits = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            weight = wide(model.get_parameter(places[name][0]).detach())
            share = (starts[name] - self.least) / (1 - self.least)
            edge = CLIP if learn_rates else 1e-12
            share = min(max(share, edge), 1 - edge)
            logit = torch.tensor(math.log(share / (1 - share)), dtype=weight.dtype, device=weight.device)
            self._scores.append(nn.Parameter(self._first_score(weight), requires_grad=learn_scores))
            self._logits.append(nn.Parameter(logit, requires_grad=learn_rates))
        self._kept: tuple[list[Any], list[Tensor], list[Tensor]] | None = None
        self._counted = granularity == "weight"
        if granularity == "channel":  # at how many places each layer is applied, for multiply-adds
            self.register_buffer("positions", torch.zeros(len(self.names), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model gives with its weights times their masks."""
        if not args and not kwargs:
            raise ValueError("args must hold what the model is called with, got nothing")
        tensors: dict[str, Tensor] = {}
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self._learned())
        shares = self.rates().values() if learning else [None] * len(self.names)
        scores = self._scores._parameters.values()
        for places, mask, score, share in zip(self.places, self._masks(), scores, shares, strict=True):
            weight = self.model.get_parameter(places[0])
            masked = weight * mask if share is None else _Masked.apply(weight, mask, score, share)
            tensors.update(dict.fromkeys(places, masked))
        hooks = [] if self._counted else self._counting()
        try:
            out = functional_call(self.model, tensors, args, kwargs, tie_weights=False)
        finally:
            for hook in hooks:
                hook.remove()
        self._counted = True
        return out

    def scores(self) -> dict[str, nn.Parameter]:
        """Return the scores of each layer, of the shape of its weight, or (1, in, 1, 1) and (1, in) for channels."""
        return dict(zip(self.names, self._scores, strict=True))

    def rate_logits(self) -> dict[str, nn.Parameter]:
        """Return r of equation 1 of each layer, a scalar."""
        return dict(zip(self.names, self._logits, strict=True))

    def rates(self) -> dict[str, Tensor]:
        """Return the kept share of each layer, a scalar in (alpha * rate, 1) with a gradient."""
        return {n: self.least + (1 - self.least) * r.sigmoid() for n, r in self.rate_logits().items()}

    def masks(self) -> dict[str, Tensor]:
        """Return what is kept, 1, and dropped, 0, in the dtype of the weight and the shape of the scores."""
        return {name: mask.clone() for name, mask in zip(self.names, self._masks(), strict=True)}

    def keep_rate(self) -> Tensor:
        """Return the kept share of all weights, or of multiply-adds, a scalar with a gradient."""
        device = self._logits[0].device
        shares = torch.stack([rate.to(device) for rate in self.rates().values()])
        sizes = torch.stack([shares.new_tensor(self.model.get_parameter(p[0]).numel()) for p in self.places])
        if self.granularity == "channel":
            if not bool((self.positions > 0).any()):
                raise ValueError(
                    "model must have had an input before keep_rate: multiply-adds are not known yet"
                )
            sizes = sizes * self.positions.to(sizes)
        return (sizes / sizes.sum() * shares).sum()

    def compression_loss(self) -> Tensor:
        """Return by what share the budget is exceeded, 0 if it is not: a scalar with a gradient."""
        return F.relu(self.keep_rate() / self.rate - 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return a copy of the model, of the user's class, with zeros in the place of what is dropped."""
        model = copy.deepcopy(self.model)
        for places, mask in zip(self.places, self._masks(), strict=True):
            weight = model.get_parameter(places[0])
            weight.copy_(torch.where(mask != 0, weight, 0))  # 0 and not -0, which times a mask may be
        for name, p in model.named_parameters():
            p.requires_grad_(self._learns[name])
        return model

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_compact(self) -> nn.Module:
        """Return a copy of the model whose layers read only the channels they kept.

        In the place of each layer stands a ``torch.fx.GraphModule`` that picks channels (its buffer ``kept``) and
        calls a smaller layer (its ``layer``). Of channel granularity only.
        """
        if self.granularity != "channel":
            raise ValueError(f"granularity must be 'channel' for to_compact, got {self.granularity!r}")
        model = self.to_plain()
        made: dict[int, nn.Module] = {}
        masks = dict(zip(self.names, self._masks(), strict=True))
        owner = {
            place: name for name, places in zip(self.names, self.places, strict=True) for place in places
        }
        smaller: dict[str, nn.Parameter] = {}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if id(module) not in made:
                name = owner.get(f"{path}.weight")
                if name is None:
                    continue
                kept = masks[name].flatten().nonzero()[:, 0]
                layer = copy.copy(module)  # its bias and hooks stay its own
                layer._parameters = dict(module._parameters)
                if name not in smaller:
                    weight = module.weight[:, kept].clone()  # type: ignore[index]
                    smaller[name] = nn.Parameter(weight, requires_grad=module.weight.requires_grad)  # type: ignore[union-attr]
                layer._parameters["weight"] = smaller[name]
                setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(kept))
                made[id(module)] = _picking(layer, kept, module.weight.ndim)  # type: ignore[arg-type]
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[id(module)])
        return model

    def extra_repr(self) -> str:
        """Return the budget, for print."""
        return f"rate={self.rate}, alpha={self.alpha}, granularity={self.granularity!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _learned(self) -> list[nn.Parameter]:
        # a ParameterList looks each up by name: slow beside a small network
        return [
            p for kind in (self._scores, self._logits) for p in kind._parameters.values() if p is not None
        ]

    @torch.no_grad()
    def _masks(self) -> list[Tensor]:
        """Return the masks, made anew if a score or a rate is another tensor or was written to."""
        every = self._learned()
        if any(p.is_inference() for p in every):  # these do not count what is written to them
            return self._made()
        now = [(p.data_ptr(), p._version, p.dtype, p.device) for p in every]
        if self._kept is None or self._kept[0] != now:
            with torch.inference_mode(False):
                # the tensors are kept, so that no other can come to lie where they lay
                self._kept = (now, self._made(), [p.detach() for p in every])
        return self._kept[1]

    def _made(self) -> list[Tensor]:
        masks = []
        logits = torch.stack([r.detach().cpu().double() for r in self._logits])  # one read for all layers
        for places, score, share in zip(self.places, self._scores, logits.sigmoid().tolist(), strict=True):
            share, n = self.least + (1 - self.least) * share, score.numel()
            if self.granularity == "weight":
                count = n - math.floor((1 - share) * n)
            else:
                count = max(1, round(share * n))
            mask = _largest(score.detach().abs(), count)
            masks.append(mask.to(self.model.get_parameter(places[0]).dtype))
        return masks

    def _first_score(self, weight: Tensor) -> Tensor:
        """Return the weights of a layer on the scale of He's rule, or the magnitude of its channels."""
        fan_in = max(weight[0].numel() if len(weight) else 0, 1)
        if self.granularity == "channel":
            weight = weight.abs().sum([a for a in range(weight.ndim) if a != 1], keepdim=True)
        top = weight.abs().max() if weight.numel() else weight.new_ones(())
        return math.sqrt(6 / fan_in) * weight / torch.where(top > 0, top, 1)

    def _counting(self) -> list[Any]:
        """Return hooks that count, in one pass, where layers are applied."""
        self.positions.zero_()
        hooks = []
        for k, places in enumerate(self.places):

            def count(module: Any, args: Any, out: Tensor, k: int = k) -> None:
                n_out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                self.positions[k] += out.numel() // n_out

            owners = [self.model.get_submodule(place.rpartition(".")[0]) for place in places]
            hooks += [owner.register_forward_hook(count) for owner in owners]
        return hooks


class _Masked(torch.autograd.Function):
    """Weight times mask; score and rate get the gradient of the mask as if it were theirs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, score: Tensor, rate: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, _, score, rate = inputs
        ctx.save_for_backward(weight, score)
        ctx.rate = rate.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:  # type: ignore[override]
        weight, score = ctx.saved_tensors
        g = wide(grad) * weight
        if g.shape != score.shape:  # channels
            g = g.sum([a for a in range(g.ndim) if a != 1], keepdim=True)
        to_score, to_rate = ctx.needs_input_grad[2:]
        return (
            None, None, (g * score.sign()).to(score.dtype) if to_score else None,
            g.sum().to(ctx.rate) if to_rate else None,
        )  # fmt: skip


def _largest(size: Tensor, count: int) -> Tensor:
    """Return where the ``count`` largest are; of equal ones the last."""
    n = size.numel()
    if count >= n:
        return torch.ones_like(size, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(size, dtype=torch.bool)
    flat = size.flatten()
    edge = flat.kthvalue(n - count).values  # the largest that is dropped
    kept = flat > edge
    missing = count - int(kept.sum())
    if missing > 0:
        kept[(flat == edge).nonzero()[:, 0][-missing:]] = True
    return kept.view_as(size)


def _prunable(model: nn.Module, granularity: str, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers to prune by name, with finite, real weights."""
    found = weighted_layers(model, layers)
    if granularity == "channel":
        whole = _whole(model)
        if layers is not None:
            for name in found:
                if name in whole:
                    raise ValueError(
                        f"layers must have channels that can be dropped, got {name!r}, {whole[name]}"
                    )
        found = {name: module for name, module in found.items() if name not in whole}
        if not found:
            raise ValueError(f"model must have a layer whose input channels can be dropped, got {type(model).__name__} without one")  # fmt: skip
    for name, module in found.items():
        weight: Any = module.weight
        if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            raise ValueError(f"model must have finite floating-point weights, got others in {name!r}")
        if not weight.numel():
            raise ValueError(
                f"model must have weights to prune, got none in {name!r}, of shape {tuple(weight.shape)}"
            )
    return found


def _whole(model: nn.Module) -> dict[str, str]:
    """Return why a layer keeps all channels that it reads, by name."""
    every = weighted_layers(model)
    whole = {next(iter(every)): "the first layer, which reads data"}
    for name, places in weight_places(model, every).items():
        for place in places:
            path = place.rpartition(".")[0]
            module, parent = (model.get_submodule(p) for p in (path, path.rpartition(".")[0]))
            if getattr(module, "groups", 1) > 1:
                whole.setdefault(name, "a grouped convolution")
            elif type(module) not in WEIGHTED:
                whole.setdefault(name, f"whose weight a {type(module).__name__} reads")
            elif type(parent).__module__.startswith("torch.nn.modules.") and not isinstance(
                parent, CONTAINERS
            ):
                whole.setdefault(name, f"whose weight a {type(parent).__name__} reads")
    return whole


def _starts(
    layers: Mapping[str, nn.Module], model: nn.Module, start: Any, least: float, default: float
) -> dict[str, float]:
    """Return the kept share at the beginning of each layer."""
    default, low = max(default, least), float(f"{least:.12g}")  # 0.01, and not the product of 0.1 and 0.1
    if start is None:
        return dict.fromkeys(layers, default)
    if not isinstance(start, Mapping):
        return dict.fromkeys(layers, within("start", start, low, 1))
    shares = dict.fromkeys(layers, default)
    for name, share in start.items():
        first = next(iter(weighted_layers(model, [name]))) if isinstance(name, str) else name
        if first not in shares:
            raise ValueError(f"start must name layers that are pruned, got {name!r}: they are {', '.join(map(repr, shares))}")  # fmt: skip
        shares[first] = within("start", share, low, 1)
    return shares


def _picking(layer: nn.Module, kept: Tensor, ndim: int) -> nn.Module:
    """Return a module that calls a layer on some of its channels; torch's own class, so that a file needs no other."""
    graph = torch.fx.Graph()
    x = graph.placeholder("input")
    some = graph.call_method("index_select", (x, 1 - ndim, graph.get_attr("kept")))
    graph.output(graph.call_module("layer", (some,)))
    root = nn.Module()
    root.add_module("layer", layer)
    root.register_buffer("kept", kept)
    return in_place_of(layer, root, graph, "Picking")
