"""FedFA: each client trains as if it saw the styles of the others.

What a scanner or camera does to an image is, to a good part, in the mean mu and the deviation
sigma of each channel's features. A layer after a block jitters both, each sample and channel by
a draw of its own,

    beta = mu + e_mu s_mu,   alpha = sigma + e_sigma s_sigma,   e ~ N(0, 1),
    x  ->  alpha (x - mu) / sigma + beta,                                                    (1)

by as much as they vary, in this batch and between clients:

    s^2 = (1 + gamma) (variance of the statistic over the batch),
    gamma_c = C a_c / (a_1 + .. + a_C),   a_c = 1 / (1 + 1 / V_c),                           (2)

where V_c is the variance over clients of the running mean of the statistic. The server computes
V, from running means that clients send with their weights: so a client learns how much, not how,
the styles of others differ, and where they differ most the jitter is largest. In eval mode the
layer is the identity.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, floating, integer, one_of, within
from posterity._models import evaluating
from posterity._precision import wide
from posterity._random import draw_device
from posterity.federated._flower import strategy
from posterity.federated.simulation import aggregate, check_updates

__all__ = ["FFALayer", "feature_statistics", "fedfa_aggregate", "fedfa_strategy", "insert_ffa"]

ClientVariance = Literal["channel", "scalar", "none"]


def feature_statistics(
    x: Float[Tensor, "batch channels *spatial"], eps: float = 1e-6
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
    """Return mean and deviation over the positions of each channel.

    Parameters
    ----------
    x : Tensor
        At least two positions.
    eps : float, default=1e-6
        Positive; added to the variance.

    Returns
    -------
    tuple of Tensor
        Mean, and root of the unbiased variance plus ``eps``, in float32 at least.

    Raises
    ------
    ValueError
        For fewer than two positions, or ``eps`` that is not positive.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import feature_statistics
    >>> mu, sigma = feature_statistics(torch.tensor([[[1.0, 3.0, 5.0]]]))
    >>> mu.item(), round(sigma.item(), 3)
    (3.0, 2.0)
    """
    at_least("eps", eps, 0.0, strict=True)
    _positions("feature_statistics", floating("x", x))
    mean, var = _MeanVar.apply(wide(x).flatten(2))
    return mean, (var + eps).sqrt()


class _MeanVar(torch.autograd.Function):
    """Mean and unbiased variance over the last axis; the gradient is one pass over the features.

    In two vectorised passes, since ``torch.var_mean`` goes through numbers one at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(-1)
        ctx.save_for_backward(x, mean)
        return mean, torch.linalg.vector_norm(x - mean[..., None], dim=-1) ** 2 / (x.shape[-1] - 1)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        slope = 2 * grad_var / (x.shape[-1] - 1)
        level = grad_mean / x.shape[-1] - slope * mean
        return torch.addcmul(level[..., None], x, slope[..., None])


def _positions(who: str, x: Tensor) -> None:
    if x.ndim < 3 or math.prod(x.shape[2:]) < 2:
        raise ValueError(
            f"{who}: x must be (batch, channels, *spatial) with two positions, got {tuple(x.shape)}"
        )


class FFALayer(nn.Module):
    """Feature augmentation by the statistics of a batch and of the other clients, equations (1) and (2).

    It has no parameters. Its buffers travel with the model's state: put it into the network that
    clients train, and aggregate with `fedfa_aggregate`. Buffers are float32 at least, whatever
    the model's dtype: a narrow running mean would stand still.

    Parameters
    ----------
    num_features : int
        Channels.
    p : float, default=0.5
        In [0, 1]: how often, in training mode, it acts; one draw for the whole batch.
    eps : float, default=1e-6
        Positive; added to variances.
    momentum : float, default=0.99
        In [0, 1): of the running statistics.
    channel_dim : int, default=1
        Where channels are; -1 for tokens (batch, length, channels).

    Attributes
    ----------
    running_mean, running_std : Tensor of shape (num_features,)
        Of mu and sigma over the batches in which the layer acted; they start at 0 and 1.
    client_var_mean, client_var_std : Tensor of shape (num_features,)
        Variance of the two over clients, as the server said last; 1 at first.

    Notes
    -----
    Departures from the official code: the variance over clients is one for each channel, as the
    paper has it; the code has one number for all, so that every gamma is 1
    (``client_variance="scalar"``). The variance over a batch of one is 0.

    References
    ----------
    Zhou, Konukoglu, "FedFA: Federated Feature Augmentation", ICLR 2023, Section 3 and
    Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import FFALayer
    >>> layer = FFALayer(3, p=1.0)
    >>> x = torch.randn(8, 3, 4, 4)
    >>> layer(x).shape, bool((layer(x) == x).all()), bool((layer.eval()(x) == x).all())
    (torch.Size([8, 3, 4, 4]), False, True)
    """

    running_mean: Tensor
    running_std: Tensor
    client_var_mean: Tensor
    client_var_std: Tensor

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        eps: float = 1e-6,
        momentum: float = 0.99,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        self.num_features = integer("num_features", num_features, 1)
        self.p = within("p", p, 0.0, 1.0)
        self.eps = at_least("eps", eps, 0.0, strict=True)
        self.momentum = within("momentum", momentum, 0.0, 1.0, open_high=True)
        self.channel_dim = integer("channel_dim", channel_dim)
        self.register_buffer("running_mean", torch.zeros(num_features))
        for name in ("running_std", "client_var_mean", "client_var_std"):
            self.register_buffer(name, torch.ones(num_features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FFALayer":
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            self._buffers[name] = None if value is None else wide(value)
        return self

    def augmentation_std(
        self, mu: Float[Tensor, "batch channels"], sigma: Float[Tensor, "batch channels"]
    ) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Return the deviations by which mu and sigma are jittered, equation (2).

        Parameters
        ----------
        mu, sigma : Tensor
            As `feature_statistics` returns them.

        Returns
        -------
        tuple of Tensor
            Differentiable in ``mu`` and ``sigma``.
        """
        for name, value in (("mu", mu), ("sigma", sigma)):
            if floating(name, value).ndim != 2 or value.shape[1] != self.num_features or len(value) == 0:
                raise ValueError(
                    f"{name} must be (batch, {self.num_features}) with a sample, got {tuple(value.shape)}"
                )
        return self._std(mu, self.client_var_mean), self._std(sigma, self.client_var_std)

    def _std(self, statistic: Tensor, client_var: Tensor) -> Tensor:
        statistic = wide(statistic)
        a = (client_var + self.eps) / (client_var + self.eps + 1)  # 1 / (1 + 1 / V)
        gamma = self.num_features * a / a.sum()
        over_batch = statistic.var(0, correction=min(1, len(statistic) - 1)) + self.eps
        return ((1 + gamma.to(over_batch)) * over_batch).sqrt()

    def forward(
        self, x: Float[Tensor, " batch *features"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " batch *features"]:
        """Return features in another style, in training mode and as often as ``p`` says; else ``x``.

        Parameters
        ----------
        x : Tensor of shape (batch, channels, *spatial)
            One to three spatial axes, at least two positions; channels where ``channel_dim`` says.
        generator : torch.Generator, optional

        Returns
        -------
        Tensor
            Of the shape and dtype of ``x``.

        Raises
        ------
        ValueError
            For another number of channels, or fewer than two positions.
        """
        if floating("x", x).ndim < 3 or not -x.ndim <= self.channel_dim < x.ndim:
            raise ValueError(f"x must have batch, channels and spatial axes, got {tuple(x.shape)}")
        if x.shape[self.channel_dim] != self.num_features:
            raise ValueError(
                f"x must have {self.num_features} channels at {self.channel_dim} for FFALayer, got {tuple(x.shape)}"
            )
        if not self.training or self.p == 0 or len(x) == 0:
            return x
        first = x.movedim(self.channel_dim, 1)
        _positions("FFALayer", first)
        device = draw_device(generator)
        if self.p < 1 and torch.rand((), generator=generator, device=device) >= self.p:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self._restyled(first, generator).to(x.dtype).movedim(1, self.channel_dim)

    def _restyled(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        mu, sigma = feature_statistics(x, self.eps)
        with torch.no_grad():
            for running, now in ((self.running_mean, mu), (self.running_std, sigma)):
                running.lerp_(now.detach().mean(0).to(running), 1 - self.momentum)
        std_mu, std_sigma = self.augmentation_std(mu, sigma)
        device = draw_device(generator, mu.device)
        noise = torch.randn((2, *mu.shape), generator=generator, device=device, dtype=mu.dtype).to(mu.device)
        scale = (sigma + noise[1] * std_sigma) / sigma  # may be negative, as in the paper
        shift = mu + noise[0] * std_mu - mu * scale
        shape = (*mu.shape, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), wide(x), scale.view(shape))

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.num_features}, p={self.p}, eps={self.eps}, momentum={self.momentum}"


def insert_ffa(
    model: nn.Module,
    after: Sequence[str],
    *,
    sample_input: Any,
    p: float = 0.5,
    eps: float = 1e-6,
    momentum: float = 0.99,
    channel_dim: int = 1,
) -> nn.Module:
    """Return a copy of a model with an `FFALayer` after each of the named submodules.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    after : sequence of str
        Names as ``named_modules`` gives them. The paper puts one after every stage of an encoder, after
        the pooling where a stage has one.
    sample_input : Any
        What the model is called with once, in eval mode, to learn the channels; a tuple is several
        arguments.
    p, eps, momentum, channel_dim
        Of `FFALayer`.

    Returns
    -------
    nn.Module
        A named submodule ``net`` becomes ``Sequential(net, FFALayer)``, so its parameters are called
        ``net.0.weight``.

    Raises
    ------
    ValueError
        If a name is no submodule, or its output no tensor with channels and positions.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.federated import insert_ffa
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    >>> insert_ffa(net, ["1"], sample_input=torch.randn(2, 1, 8, 8))[1]
    Sequential(
      (0): ReLU()
      (1): FFALayer(8, p=0.5, eps=1e-06, momentum=0.99)
    )
    """
    if not after:
        raise ValueError("after must name at least one submodule, got none")
    twin = copy.deepcopy(model)
    known = dict(twin.named_modules())
    if unknown := [name for name in after if not name or name not in known]:
        raise ValueError(f"after must name submodules of the model, got {unknown}")
    shapes: dict[str, Any] = {}
    hooks = [
        known[name].register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: getattr(out, "shape", type(out).__name__)})
        )
        for name in after
    ]
    with torch.no_grad(), evaluating(twin):
        twin(*sample_input if isinstance(sample_input, tuple) else (sample_input,))
    for hook in hooks:
        hook.remove()
    for name in sorted(set(after), key=lambda name: -name.count(".")):  # what is inside another one first
        shape = shapes.get(name, "nothing: it was not called")
        if isinstance(shape, str) or len(shape) < 3:
            raise ValueError(
                f"after: {name!r} must return (batch, channels, *spatial), got {shape if isinstance(shape, str) else tuple(shape)}"
            )
        layer = FFALayer(shape[channel_dim], p, eps, momentum, channel_dim)
        parent, _, own = name.rpartition(".")
        twin.get_submodule(parent).add_module(
            own, nn.Sequential(known[name], layer).train(known[name].training)
        )
    return twin


def fedfa_aggregate(
    states: Sequence[dict[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    client_variance: ClientVariance = "channel",
) -> dict[str, Tensor]:
    """Return what the server sends back: the mean of the states, and how far clients' statistics differ.

    Parameters
    ----------
    states : sequence of dict of str to Tensor
        ``state_dict`` of each client's model; running statistics are averaged as all else is.
    weights : sequence of float, optional
        Of the mean, divided by their sum; by default all alike, as in the paper. Variances over
        clients are never weighted.
    client_variance : {"channel", "scalar", "none"}, default="channel"
        The variance over clients of each channel's running statistic; one variance of all channels
        and clients together, as the official code computes; or that which clients sent.

    Returns
    -------
    dict of str to Tensor
        New tensors, for ``load_state_dict`` of every client's model.

    Raises
    ------
    ValueError
        If there is no state, if keys or shapes differ, or for weights below 0 or all 0.

    Warns
    -----
    UserWarning
        If there is one client only: its variances are 0.

    Examples
    --------
    >>> from posterity.federated import FFALayer, fedfa_aggregate
    >>> sent = [FFALayer(2).state_dict(), FFALayer(2).state_dict()]
    >>> sent[1]["running_mean"] += torch.tensor([2.0, 0.0])
    >>> back = fedfa_aggregate(sent)
    >>> back["running_mean"], back["client_var_mean"]
    (tensor([1., 0.]), tensor([2., 0.]))
    """
    one_of("client_variance", client_variance, ("channel", "scalar", "none"))
    check_updates(states, weights, "states")
    mean = aggregate(states, weights)
    if client_variance == "none":
        return mean
    for name in mean:
        layer, _, which = name.rpartition("client_var_")
        if which not in ("mean", "std") or f"{layer}running_{which}" not in mean:
            continue
        sent = torch.stack([wide(state[f"{layer}running_{which}"]) for state in states])
        if len(states) < 2:
            warnings.warn("one client has no variance over clients: it is 0", stacklevel=2)
            mean[name] = torch.zeros_like(mean[name])
        elif client_variance == "channel":
            mean[name] = sent.var(0).to(mean[name])
        else:
            mean[name] = sent.var().expand_as(mean[name]).to(mean[name], copy=True)
    return mean


def fedfa_strategy(*, client_variance: ClientVariance = "channel", **fedavg_kwargs: Any) -> Any:
    """Return a Flower strategy whose server does what `fedfa_aggregate` does, clients alike.

    Parameters
    ----------
    client_variance : {"channel", "scalar", "none"}, default="channel"
    **fedavg_kwargs
        Of ``flwr.serverapp.strategy.FedAvg``.

    Returns
    -------
    flwr.serverapp.strategy.FedAvg
        For a ``ServerApp``; its ``aggregate_train`` is ours.

    Raises
    ------
    ImportError
        If Flower is not installed, with the command that installs it.
    """
    one_of("client_variance", client_variance, ("channel", "scalar", "none"))
    return strategy(
        lambda states, _: fedfa_aggregate(states, client_variance=client_variance), **fedavg_kwargs
    )
