"""SMoE-Dropout: train feed-forward layers by random experts, then choose their size at inference.

The hidden units of a feed-forward layer are cut into E experts. A router drawn once at random and
never trained picks k of them for each token,

    y = sum_{e in top k of r(x)} s_e (W2_e act(W1_e x + b1_e) + b2_e),   s = softmax of those k.   (1)

So a layer costs k / E of the dense one, forward and backward. Which experts a token meets is a fixed
random function of what it is: that is the dropout, and no router can collapse. While k grows over
training, each expert learns to be of use beside any others, so that a trained network may be run
with any k: quality rises steadily with the cost.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, integer, one_of, within
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["ExpertSchedule", "SMoEDropout", "n_active", "set_active", "slim"]


class SMoEDropout(nn.Module):
    """A feed-forward layer of experts, of which a fixed random router picks k for each token.

    Parameters
    ----------
    d_model : int
        Features of a token.
    d_expert : int
        Hidden units of an expert.
    n_experts : int
        E.
    k : int
        Active experts, 1 to ``n_experts``. An attribute, to be set at any time (`set_active`); not
        in the state dict.
    activation : callable, default=F.gelu
        Acts on each hidden unit by itself.
    dropout : float, default=0.0
        Share of hidden units dropped in training mode, in [0, 1).
    bias : bool, default=True
        Whether experts have biases.
    d_out : int, optional
        Features of the output; ``d_model`` if None.
    learn_router : bool, default=False
        Whether the router is trained, as other sparse layers do: the baseline, with `balance_loss`.
    generator : torch.Generator, optional
        Draws router and experts, each as ``nn.Linear`` draws its weights.

    Attributes
    ----------
    k : int
    router : nn.Linear
        From features to a logit an expert; frozen, but in the state dict.
    w1, b1, w2, b2 : nn.Parameter
        Shapes (E, d_model, d_expert), (E, d_expert), (E, d_expert, d_out), (E, d_out); biases may be None.

    Raises
    ------
    ValueError
        If a size is below 1, ``k`` outside 1 to ``n_experts``, or ``x`` does not fit.

    Notes
    -----
    1. The router is computed in float32 at least, under autocast too, so that the routing is the
       same whatever the precision of the experts. Of equal logits the lower index is chosen.
    2. There is no balance loss and no noise in the router; scores have a gradient to ``x``.

    References
    ----------
    .. [1] Chen, Zhang, Jaiswal, Liu, Wang. Sparse MoE as the New Dropout: Scaling Dense and
       Self-Slimmable Transformers. ICLR 2023. Section 3.
    .. [2] Fedus, Zoph, Shazeer. Switch Transformers. JMLR 2022. Equation 4, of `balance_loss`.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import SMoEDropout
    >>> layer = SMoEDropout(d_model=8, d_expert=4, n_experts=4, k=2)
    >>> layer(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    >>> layer.k = 4  # all experts
    >>> [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    ['router.weight', 'router.bias']
    """

    k: int
    router: nn.Linear
    w1: nn.Parameter
    w2: nn.Parameter
    b1: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(
        self, d_model: int, d_expert: int, n_experts: int, k: int, *, activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0, bias: bool = True, d_out: int | None = None, learn_router: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.d_expert = integer("d_model", d_model, 1), integer("d_expert", d_expert, 1)
        self.n_experts = integer("n_experts", n_experts, 1)
        self.k = active(k, n_experts)
        self.d_out = integer("d_out", d_model if d_out is None else d_out, 1)
        self.dropout = within("dropout", dropout, 0, 1, open_high=True)
        if not callable(activation):
            raise ValueError(f"activation must be callable, got {activation!r}")
        self.activation = activation
        self.learn_router = one_of("learn_router", learn_router, (False, True))
        one_of("bias", bias, (False, True))
        self.frozen = False  # by `slim`
        self._balance: Tensor | None = None
        self.router = nn.Linear(d_model, n_experts, device="meta").to_empty(device=torch.get_default_device())
        for parameter in (self.router.weight, self.router.bias):
            parameter.data = _uniform(parameter.shape, d_model, generator)
        self.router.requires_grad_(learn_router)
        for name, shape, fan_in in (
            ("w1", (n_experts, d_model, d_expert), d_model),
            ("b1", (n_experts, d_expert), d_model),
            ("w2", (n_experts, d_expert, self.d_out), d_expert),
            ("b2", (n_experts, self.d_out), d_expert),
        ):
            drawn = bias or name.startswith("w")
            value = nn.Parameter(_uniform(shape, fan_in, generator)) if drawn else None
            self.register_parameter(name, value)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_dense(
        cls, linear1: nn.Linear, linear2: nn.Linear, n_experts: int, k: int | None = None, *,
        activation: Callable[[Tensor], Tensor] = F.gelu, dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "SMoEDropout":  # fmt: skip
        """Return a layer whose experts are the hidden units of a dense layer, in order.

        ``w2`` is E times the dense weights and each ``b2`` the whole bias: with all experts and equal
        scores the output is that of ``linear2(activation(linear1(x)))``.

        Parameters
        ----------
        linear1, linear2 : nn.Linear
            The outputs of the first are the inputs of the second; dtype, device, mode and what is
            frozen are taken over.
        n_experts : int
            Divides the number of hidden units.
        k : int, optional
            All experts if None.
        activation, dropout, generator
            As in the class; the generator draws the router.

        Returns
        -------
        SMoEDropout

        Raises
        ------
        ValueError
            If the layers do not chain or ``n_experts`` does not divide the hidden units.

        Examples
        --------
        >>> from torch import nn
        >>> from posterity.compression import SMoEDropout
        >>> layer = SMoEDropout.from_dense(nn.Linear(8, 32), nn.Linear(32, 8), n_experts=4, k=1)
        >>> layer.w1.shape
        torch.Size([4, 8, 8])
        """
        for name, linear in (("linear1", linear1), ("linear2", linear2)):
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{name} must be an nn.Linear, got {type(linear).__name__}")
        hidden = linear1.out_features
        if linear2.in_features != hidden:
            raise ValueError(
                f"linear2 must have the outputs of linear1 as inputs, {hidden}, got {linear2.in_features}"
            )
        divides(integer("n_experts", n_experts, 1), hidden, "linear1")
        width = hidden // n_experts
        bias = linear1.bias is not None or linear2.bias is not None
        layer = cls(
            linear1.in_features, width, n_experts, n_experts if k is None else k, activation=activation,
            dropout=dropout, bias=bias, d_out=linear2.out_features, generator=generator,
        )  # fmt: skip
        layer.to(linear1.weight.device, linear1.weight.dtype).train(linear1.training)
        split = (
            ("w1", linear1.weight, lambda w: w.view(n_experts, width, -1).transpose(1, 2)),
            ("b1", linear1.bias, lambda b: b.view(n_experts, width)),
            ("w2", linear2.weight, lambda w: n_experts * w.t().reshape(n_experts, width, -1)),
            ("b2", linear2.bias, lambda b: b.expand(n_experts, -1)),
        )
        for name, source, cut in split:
            value = None
            if source is not None:
                like = layer.w1
                value = cut(source.detach()).to(like.device, like.dtype, copy=True).contiguous()
                value = nn.Parameter(value, requires_grad=source.requires_grad)
            setattr(layer, name, value)
        return layer

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """Return (1) of each token, in the dtype of ``x``."""
        k = active(self.k, self.n_experts)
        if floating("x", x).ndim == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have d_model = {self.d_model} features last, got {tuple(x.shape)}")
        if x.dtype != self.w1.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x must have the dtype of the layer, {self.w1.dtype}, got {x.dtype}")
        tokens = x.reshape(-1, self.d_model)
        logits = _logits(tokens, self.router.weight, self.router.bias)
        # a stable sort, where topk may take any of equal logits
        chosen = logits.detach().argsort(dim=1, descending=True, stable=True)[:, :k]
        self._balance = self._imbalance(logits, chosen) if self.learn_router else None
        if k == self.n_experts:
            out = self._all(tokens, logits.softmax(1))
        else:
            out = self._some(tokens, chosen, logits.gather(1, chosen).softmax(1))
        return out.to(x.dtype).reshape(*x.shape[:-1], self.d_out)

    def balance_loss(self) -> Float[Tensor, ""]:
        """Return the Switch load balance of the last forward pass, to add to the loss (weight 0.01).

        E times the sum over experts of the share of tokens that it got and its mean probability:
        1 if the load is even, E if one expert gets all. Of a layer with ``learn_router=True`` only.
        """
        if not self.learn_router:
            raise ValueError("learn_router must be True for balance_loss: a router that is fixed has none")
        if self._balance is None:
            raise ValueError("x must have gone through the layer before balance_loss")
        return self._balance

    def extra_repr(self) -> str:
        """Return sizes, for print."""
        return f"{self.d_model} -> {self.n_experts} x {self.d_expert} -> {self.d_out}, k={self.k}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_balance": None}  # has a graph, which cannot be copied

    def _some(
        self, x: Float[Tensor, "n d_model"], chosen: Int[Tensor, "n k"], scores: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n d_out"]:
        """Sort the pairs of token and expert by expert: one gather, and for each expert two products and a sum."""
        expert = chosen.reshape(-1)
        order = expert.argsort(stable=True)
        # not bincount, whose length torch.export does not know
        loads = (expert[:, None] == torch.arange(self.n_experts, device=x.device)).sum(0).tolist()
        token = order.div(chosen.shape[1], rounding_mode="floor")
        shares = scores.reshape(-1, 1).index_select(0, order)
        none = [None] * self.n_experts
        b1, b2 = ((none if b is None else b.unbind()) for b in (self.b1, self.b2))
        out = scores.new_zeros(x.shape[0], self.d_out)  # len() would fix the batch for torch.export
        for part, place, share, w1, c1, w2, c2 in zip(
            x.index_select(0, token).split(loads), token.split(loads), shares.split(loads),
            self.w1.unbind(), b1, self.w2.unbind(), b2, strict=True,
        ):  # fmt: skip
            done = F.linear(self._hidden(F.linear(part, w1.t(), c1)), w2.t(), c2)
            out.index_add_(0, place, share * wide(done))  # a token is once in a part: no race on a GPU
        return out

    def _all(self, x: Float[Tensor, "n d_model"], scores: Float[Tensor, "n e"]) -> Float[Tensor, "n d_out"]:
        """Compute the dense layer, with hidden units multiplied by the scores of their experts."""
        width = self.n_experts * self.d_expert
        w1 = self.w1.transpose(1, 2).reshape(width, self.d_model)
        hidden = self._hidden(F.linear(x, w1, None if self.b1 is None else self.b1.reshape(width)))
        scores = scores.to(hidden.dtype)
        hidden = (hidden.reshape(x.shape[0], self.n_experts, self.d_expert) * scores[:, :, None]).reshape(
            -1, width
        )
        out = hidden @ self.w2.reshape(width, self.d_out)
        return out if self.b2 is None else out + scores @ self.b2

    def _hidden(self, h: Tensor) -> Tensor:
        return F.dropout(self.activation(h), self.dropout, self.training)

    def _imbalance(self, logits: Float[Tensor, "n e"], chosen: Int[Tensor, "n k"]) -> Float[Tensor, ""]:
        load = F.one_hot(chosen, self.n_experts).sum((0, 1)).to(logits.dtype) / max(chosen.numel(), 1)
        return self.n_experts * (load * logits.softmax(1).sum(0) / max(len(logits), 1)).sum()


class ExpertSchedule:
    """How many experts are active at a step of training: from few to many.

    Linear: ``round((k_max - k_min) t / T) + k_min``; cosine: ``round((k_min - k_max) cos(pi t / 2T)) + k_max``,
    which is slow at first; round is half to even.

    Parameters
    ----------
    n_steps : int
        T, at least 1; later steps have ``k_max``.
    k_min : int
        At least 1; half of the experts is usual.
    k_max : int
        At least ``k_min``; all experts are usual.
    mode : {"linear", "cosine"}, default="linear"

    Raises
    ------
    ValueError
        If ``k_min`` is greater than ``k_max`` or a number is out of range.

    References
    ----------
    .. [1] Chen et al. Sparse MoE as the New Dropout. ICLR 2023. Section 3, on self-slimmable training.

    Examples
    --------
    >>> from posterity.compression import ExpertSchedule
    >>> schedule = ExpertSchedule(n_steps=100, k_min=8, k_max=16)
    >>> [schedule(step) for step in (0, 50, 100, 1000)]
    [8, 12, 16, 16]
    """

    def __init__(
        self, n_steps: int, k_min: int, k_max: int, *, mode: Literal["linear", "cosine"] = "linear"
    ) -> None:
        self.n_steps = integer("n_steps", n_steps, 1)
        self.k_min, self.k_max = integer("k_min", k_min, 1), integer("k_max", k_max, 1)
        if k_min > k_max:
            raise ValueError(f"k_min must be at most k_max = {k_max}, got {k_min}")
        self.mode = one_of("mode", mode, ("linear", "cosine"))

    def __call__(self, step: int) -> int:
        """Return k at a step, counted from 0."""
        t = min(integer("step", step, 0), self.n_steps)
        rise = self.k_max - self.k_min
        if self.mode == "linear":
            return round(rise * t / self.n_steps) + self.k_min
        return round(-rise * math.cos(math.pi * t / (2 * self.n_steps))) + self.k_max


def set_active(model: nn.Module, k: int) -> int:
    """Set how many experts are active in every `SMoEDropout` of a model, in place.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    k : int
        1 to the number of experts of each layer.

    Returns
    -------
    int
        The number of layers, which is at least 1.

    Raises
    ------
    ValueError
        If ``k`` is out of range for a layer, or the model has no such layer or is `slim`; nothing is
        set then.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.compression import SMoEDropout, set_active
    >>> set_active(nn.Sequential(SMoEDropout(8, 4, 4, k=1), SMoEDropout(8, 4, 4, k=1)), 3)
    2
    """
    layers = dict(_layers(model))
    if not layers:
        raise ValueError("model must have an SMoEDropout layer, got none: see convert_ffn")
    for name, layer in layers.items():
        if layer.frozen:
            raise ValueError(f"model must not be slim, {name or 'it'} has k = {layer.k} for good")
        active(k, layer.n_experts, f" of {name}" if name else "")
    for layer in layers.values():
        layer.k = int(k)
    return len(layers)


def n_active(model: nn.Module) -> dict[str, int]:
    """Return the number of active experts of each `SMoEDropout` of a model, by name.

    Parameters
    ----------
    model : nn.Module
        Looked at only.

    Returns
    -------
    dict
        Empty for a model without such layers.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.compression import SMoEDropout, n_active
    >>> n_active(nn.Sequential(SMoEDropout(8, 4, 4, k=3)))
    {'0': 3}
    """
    return {name: layer.k for name, layer in _layers(model)}


@torch.inference_mode(False)
def slim(model: nn.Module, k: int) -> nn.Module:
    """Return a copy of a model with k experts active for good, ready to ship.

    Its outputs are those after ``set_active(model, k)``; ``torch.export`` takes it with any batch
    size, and the exported program runs without Posterity. Time falls with k; the file does not,
    since every expert is still some token's.

    Parameters
    ----------
    model : nn.Module
        With `SMoEDropout` layers; its mode is kept.
    k : int
        1 to the number of experts of each layer.

    Returns
    -------
    nn.Module
        `set_active` refuses it.

    Raises
    ------
    ValueError
        As `set_active`.

    Examples
    --------
    >>> from torch import nn
    >>> from posterity.compression import SMoEDropout, n_active, slim
    >>> n_active(slim(nn.Sequential(SMoEDropout(8, 4, 4, k=4)), 1))
    {'0': 1}
    """
    is_module(model)
    model = copy.deepcopy(model)
    set_active(model, k)
    for _, layer in _layers(model):
        layer.frozen = True
    return model


def is_module(model: Any) -> nn.Module:
    """Return ``model`` if it is one."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    return model


def active(k: Any, n_experts: int, where: str = "") -> int:
    """Return a number of active experts."""
    if integer("k", k, 1) > n_experts:
        raise ValueError(f"k must be in 1..{n_experts}, the number of experts{where}, got {k}")
    return int(k)


def divides(n_experts: int, hidden: int, what: str) -> None:
    """Refuse a number of experts that does not divide the hidden units."""
    if hidden % n_experts:
        fit = [n for n in range(1, hidden + 1) if hidden % n == 0]
        near = [max(n for n in fit if n < n_experts), *[n for n in fit if n > n_experts][:1]]
        said = f"{near[0]} and {near[1]} do" if len(near) == 2 else f"{near[0]} does"
        raise ValueError(
            f"n_experts must divide the {hidden} hidden units of {what}, got {n_experts}: {said}"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, SMoEDropout]]:
    for name, module in is_module(model).named_modules():
        if isinstance(module, SMoEDropout):
            yield name, module


def _uniform(shape: Sequence[int], fan_in: int, generator: torch.Generator | None) -> Tensor:
    """Return what ``nn.Linear`` starts from."""
    device = draw_device(generator)
    drawn = torch.rand(shape, generator=generator, device=device).to(torch.get_default_device())
    return (2 * drawn - 1) / math.sqrt(fan_in)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the router's logits in float32 at least, whatever autocast says."""
    weight, bias = wide(weight), wide(bias)
    x = x.to(weight.dtype)
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)
