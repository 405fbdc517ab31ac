"""A critic that reads the policy it judges, and many networks whose weights are rows, called at once.

One critic serves a whole archive if it is told whose actions come next: beside state and action it
takes the last layer [W | b] of a policy, each row through an encoder, averaged over rows,

    P(s, a, D) = v(s, a, mean_k e([W | b]_k)),                                        (1)

twice, with encoders of their own, so that the smaller of two values can be taken.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from posterity._checks import floating, has_shape, integer
from posterity._models import by_sample, call

__all__ = ["PolicyCritic"]

ELEMENTWISE = (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Identity)


class PolicyCritic(nn.Module):
    """Twin values of an action in a state, under the policy whose last layer is given.

    Parameters
    ----------
    obs_dim, action_dim : int
        Sizes of an observation and an action, at least 1.
    features : int
        What the policy's last layer is fed with, at least 1.
    hidden : sequence of int, default=(256, 256)
        Hidden layers that see state, action and policy, each at least 1.
    encoder : sequence of int, default=(64, 64, 64)
        Layers of the encoder of a row, the last of them without activation; at least one.

    Attributes
    ----------
    twins : nn.ModuleList
        Two of ``encoder`` and ``value``.

    Raises
    ------
    ValueError
        If a size is not a positive integer, ``encoder`` is empty, or what ``forward`` gets does not fit.

    References
    ----------
    .. [1] Xue et al. Sample-Efficient Quality-Diversity by Cooperative Coevolution. ICLR 2024. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import PolicyCritic
    >>> critic = PolicyCritic(obs_dim=3, action_dim=2, features=5, hidden=(8,), encoder=(4,))
    >>> last = torch.nn.Linear(5, 2)  # of a policy
    >>> head = torch.cat([last.weight, last.bias[:, None]], 1)
    >>> critic(torch.zeros(7, 3), torch.zeros(7, 2), head).shape
    torch.Size([7, 2])
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        features: int,
        *,
        hidden: Sequence[int] = (256, 256),
        encoder: Sequence[int] = (64, 64, 64),
    ) -> None:
        super().__init__()
        self.obs_dim, self.action_dim = integer("obs_dim", obs_dim, 1), integer("action_dim", action_dim, 1)
        self.features = integer("features", features, 1)
        hidden, encoder = layer_sizes("hidden", hidden), layer_sizes("encoder", encoder)
        if not encoder:
            raise ValueError("encoder must have at least one layer, got none")
        seen = self.obs_dim + self.action_dim + encoder[-1]
        self.twins = nn.ModuleList(
            nn.ModuleDict(
                {"encoder": leaky_mlp(self.features + 1, *encoder), "value": leaky_mlp(seen, *hidden, 1)}
            )
            for _ in range(2)
        )

    def forward(
        self,
        obs: Float[Tensor, "*batch obs"],
        action: Float[Tensor, "*batch action"],
        head: Float[Tensor, "action columns"],
    ) -> Float[Tensor, "*batch 2"]:
        """Return both values of each state and action.

        Parameters
        ----------
        obs : Tensor
            Of shape (..., obs_dim).
        action : Tensor
            Of shape (..., action_dim).
        head : Tensor
            Weights of the policy's last layer with its biases as last column, (action_dim, features + 1).

        Returns
        -------
        Tensor
            Of shape (..., 2).
        """
        for name, value, size in (("obs", obs, self.obs_dim), ("action", action, self.action_dim)):
            if floating(name, value).shape[-1:] != (size,):
                raise ValueError(f"{name} must have {size} as last size, got shape {tuple(value.shape)}")
        if obs.shape[:-1] != action.shape[:-1]:
            raise ValueError(
                f"action must have the batch of obs, got {tuple(action.shape)} for {tuple(obs.shape)}"
            )
        has_shape("head", floating("head", head), (self.action_dim, self.features + 1))
        values = []
        for twin in self.twins:
            code = twin["encoder"](head).mean(0)  # type: ignore[index]
            seen = torch.cat([obs, action, code.to(obs.dtype).expand(*obs.shape[:-1], -1)], -1)
            values.append(twin["value"](seen))  # type: ignore[index]
        return torch.cat(values, -1)


class Stacked:
    """Networks of one form, each a row of weights in the order of its parameters, called at once.

    Stacks of linear layers and elementwise functions are batched products; any other network goes by ``vmap``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = dict(model.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        self.dim = sum(self.sizes)
        self.place = {id(p): k for k, p in enumerate(named.values())}
        self.layers = _in_order(model)

    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        """Return what each network makes of its own batch: (n, dim), (n, batch, in) -> (n, batch, out)."""
        parts = [
            part.unflatten(1, shape)
            for part, shape in zip(rows.split(self.sizes, dim=1), self.shapes, strict=True)
        ]
        if self.layers is None:
            return by_sample(self._one, x, *parts)
        for layer in self.layers:
            if not isinstance(layer, nn.Linear):
                x = layer(x)
                continue
            weight = parts[self.place[id(layer.weight)]].mT
            if layer.bias is None:
                x = torch.bmm(x, weight)
            else:
                x = torch.baddbmm(parts[self.place[id(layer.bias)]].unsqueeze(1), x, weight)
        return x

    def _one(self, x: Tensor, *parts: Tensor) -> Tensor:
        buffers = dict(self.model.named_buffers())
        return call(self.model, {**dict(zip(self.names, parts, strict=True)), **buffers}, x)

    def drawn(self, n: int) -> Tensor:
        """Return the weights of n new networks, as their layers draw them from torch's global state."""
        rows = []
        for _ in range(n):
            for module in self.model.modules():
                reset: Any = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            rows.append(parameters_to_vector(self.model.parameters()).detach())
        return torch.stack(rows)


def _in_order(model: nn.Module) -> list[nn.Module] | None:
    """Return the layers of a plain stack of linear and elementwise ones, or None."""
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    if type(model) is nn.Linear or type(model) in ELEMENTWISE:
        return [model]
    if type(model) is not nn.Sequential:
        return None
    parts = [_in_order(part) for part in model]
    return None if None in parts else [layer for part in parts for layer in part or []]


def layer_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Return sizes of layers, each at least 1."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a sequence of layer sizes, got {value!r}")
    return tuple(integer(f"each size of {name}", size, 1) for size in value)


def leaky_mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers with leaky ReLU between them, and none after the last."""
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.LeakyReLU(0.01)] * bool(k) + [nn.Linear(before, after)]
    return nn.Sequential(*layers)
