r"""A ReLU network whose tangent kernel has a limit, and Jacobians of rows of layers without gradients of weights.

Where z = W h is one layer of many, the gradient of an output in W is the outer product of dz, its
gradient in z, and h. So Jacobians need not be made: their products are products of those,

.. math:: \nabla_W f(x) \cdot \nabla_W f(x') = (h \cdot h')\, (dz \cdot dz').
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, integer
from posterity._random import draw_device

__all__ = ["NTKMLP"]

ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Dropout,
)  # fmt: skip


class NTKMLP(nn.Module):
    r"""ReLU network without biases, in the parametrisation in which its tangent kernel has a limit.

    Each of its layers is :math:`h \mapsto \alpha^{1/depth} W h / \sqrt{n}` with n inputs and weights
    drawn from N(0, 1). The output is proportional to alpha: large is lazy, small is rich.

    Parameters
    ----------
    in_features, width : int
        At least 1.
    depth : int, default=3
        Number of weight matrices, at least 1: hidden layers and one.
    out_features : int, default=1
        At least 1.
    alpha : float, default=1.0
        Positive.
    generator : torch.Generator, optional
        Of the initial weights.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior for Networks in the Lazy and
       Rich Regimes. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import NTKMLP
    >>> net = NTKMLP(10, width=64)
    >>> net(torch.ones(5, 10)).shape, [tuple(w.shape) for w in net.parameters()]
    (torch.Size([5, 1]), [(64, 10), (64, 64), (1, 64)])
    """

    def __init__(
        self, in_features: int, width: int, depth: int = 3, out_features: int = 1, *, alpha: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.width = integer("width", width, 1)
        self.depth = integer("depth", depth, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.alpha = at_least("alpha", alpha, 0, strict=True)
        sizes = [in_features, *[width] * (depth - 1), out_features]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layers += [_Scaled(n_in, n_out, alpha ** (1 / depth) / math.sqrt(n_in), generator), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Return the values at points."""
        if floating("x", x).ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {tuple(x.shape)}")
        return self.layers(x)


class _Scaled(nn.Module):
    """A matrix of standard normal weights behind a fixed factor."""

    def __init__(self, n_in: int, n_out: int, scale: float, generator: torch.Generator | None) -> None:
        super().__init__()
        drawn = torch.randn(n_out, n_in, generator=generator, device=draw_device(generator))
        self.weight = nn.Parameter(drawn.to(torch.get_default_device()))
        self.scale = scale

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(self.scale * h, self.weight)


class Factor(NamedTuple):
    """Part of a Jacobian block: rows ``left`` (n, p) times ``right`` (n, outputs, q), or ``right`` alone."""

    left: Tensor | None
    right: Tensor


def row_of_layers(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Return the layers of a row of linear and elementwise ones, by name; None of any other model.

    For samples that are rows of numbers.
    """
    if not isinstance(model, nn.Sequential | NTKMLP) or type(model) not in (nn.Sequential, NTKMLP):
        return None
    found, seen = [], set()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(
            len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ):
            return None
        if type(module) in (nn.Sequential, NTKMLP):
            continue
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            continue  # nothing, where samples are rows
        own = [id(p) for p in module.parameters()]
        if type(module) not in (nn.Linear, _Scaled, *ELEMENTWISE) or seen & set(own):
            return None
        seen |= set(own)
        found.append((name, module))
    return found


def run_row(
    layers: list[tuple[str, nn.Module]], weights: dict[str, Tensor], x: Tensor,
    watch: Callable[[str, Tensor, Tensor], Any] = lambda *_: None,
) -> Tensor:  # fmt: skip
    """Return what a row of layers makes of points, with these weights or with stacked ones; ``watch`` sees h and z."""
    h = x
    for name, module in layers:
        if isinstance(module, nn.Linear | _Scaled):
            h = module.scale * h if isinstance(module, _Scaled) else h
            z = h @ weights[f"{name}.weight"].mT
            if f"{name}.bias" in weights:
                z = z + weights[f"{name}.bias"].unsqueeze(-2)
            watch(name, h, z)
            h = z
        else:
            h = module(h.clone() if getattr(module, "inplace", False) else h)
    return h


def by_layer(
    layers: list[tuple[str, nn.Module]], params: dict[str, Tensor], rest: dict[str, Tensor]
) -> Callable[[Tensor, slice], list[Factor]]:
    """Return what gives inputs of layers and gradients of what they put out, at samples."""

    def block(x: Tensor, outputs: slice) -> list[Factor]:
        inputs, made = [], []

        def watch(name: str, h: Tensor, z: Tensor) -> None:
            trained = {"weight": h.detach(), "bias": h.new_ones(len(h), 1)}  # what dz is multiplied by
            inputs.append([part for leaf, part in trained.items() if f"{name}.{leaf}" in params])
            made.append(z if z.requires_grad else z.requires_grad_())

        out = run_row(layers, {**params, **rest}, x, watch)
        grads = [
            torch.autograd.grad(out[:, a].sum(), made, retain_graph=True)
            for a in range(out.shape[1])[outputs]
        ]
        stacked = [torch.stack(of_layer, 1) for of_layer in zip(*grads, strict=True)]
        return [
            Factor(torch.cat(left, 1), right) for left, right in zip(inputs, stacked, strict=True) if left
        ]

    return block
