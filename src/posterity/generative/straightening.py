"""Reflow: train again on the pairs that a flow makes, and measure how straight it has become.

The ODE takes each start Z_0 to an end Z_1. Trained anew on these pairs, kept together, a
flow carries the same law along straighter paths at no higher cost,

    E c(Z_1 - Z_0) <= E c(X_1 - X_0)   for every convex c,                    (1)

and the straightness S = int_0^1 E || (Z_1 - Z_0) - v(Z_t, t) ||^2 dt falls toward 0,
where one Euler step does the work of many.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import wide, widened
from posterity.generative._network import Cond, Net, Samples
from posterity.generative.flow_ode import Method
from posterity.generative.rectified_flow import RectifiedFlow, Scalar

__all__ = ["reflow", "straightness", "transport_cost"]


@torch.inference_mode(False)  # grad mode too
def reflow(
    flow: RectifiedFlow,
    net: nn.Module,
    fit: Callable[[nn.Module, Tensor, Tensor], nn.Module],
    *,
    n_pairs: int,
    rounds: int = 1,
    x0: Samples | None = None,
    method: Method = "rk45",
    n_steps: int = 100,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> list[nn.Module]:
    """Straighten a trained flow: train on its own pairs, and again on those of the result.

    Parameters
    ----------
    flow : RectifiedFlow
        The flow.
    net : nn.Module
        Its trained network, left as it is.
    fit : callable
        ``fit(net, z0, z1)`` trains a network with ``flow.loss(net, z1, z0)`` and returns
        it; it is given a deep copy of the network of the round before.
    n_pairs : int
        Pairs a round, at least 1.
    rounds : int, default=1
        How often, at least 1. One is mostly enough, since errors of the network add up.
    x0 : Tensor, optional
        Starts of every round, shape ``(n_pairs, *shape)``. Default: drawn anew from the source.
    method : {"euler", "heun", "rk45"}, default="rk45"
        As in ``RectifiedFlow.integrate``.
    n_steps : int, default=100
        Steps of the even grid, at least 1.
    batch_size : int, default=1024
        Samples that are integrated at once.
    generator : torch.Generator, optional
        Source of randomness for the starts.

    Returns
    -------
    list of nn.Module
        The networks of the 2-rectified flow, the 3-rectified flow, and so on.

    Raises
    ------
    ValueError
        If ``rounds`` or ``n_pairs`` is less than 1, or ``x0`` does not fit.
    """
    integer("rounds", rounds, 1)
    integer("n_pairs", n_pairs, 1)
    if x0 is not None:
        has_shape("x0", x0, (n_pairs, *flow.shape), "n_pairs and shape")
    nets = []
    for _ in range(rounds):
        z0, z1 = flow.couple(
            net,
            n_pairs if x0 is None else None,
            x0=x0,
            batch_size=batch_size,
            method=method,
            n_steps=n_steps,
            generator=generator,
        )
        net = fit(copy.deepcopy(net), z0, z1)
        nets.append(net)
    return nets


def straightness(
    flow: RectifiedFlow, net: Net, x0: Samples, *, n_steps: int = 100, cond: Cond = None
) -> Scalar:
    """Return how far the flow's paths are from straight lines at constant speed.

    S = int_0^1 E || (Z_1 - Z_0) - v(Z_t, t) ||^2 dt, by Euler steps.

    Parameters
    ----------
    flow : RectifiedFlow
        The flow.
    net : callable
        Its network.
    x0 : Tensor
        Starts, shape ``(n, *shape)``.
    n_steps : int, default=100
        Euler steps, at least 1.
    cond : mapping of str to Tensor, optional
        Keyword arguments of the network, each with first dimension n.

    Returns
    -------
    Tensor
        A scalar of at least 0, in squared units of the data; 0 if one Euler step is exact.

    Raises
    ------
    ValueError
        If ``x0`` does not fit ``shape`` or ``n_steps`` is less than 1.
    """
    flow._check("x0", x0)
    velocities: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        velocities.append(wide(net(x.to(x0.dtype), t.to(x0.dtype), **more)))
        return velocities[-1]

    flow.integrate(recorded, wide(x0), method="euler", n_steps=n_steps, cond=cond)
    way = torch.stack(velocities).mean(0)  # Z_1 - Z_0, without the difference of two ends far away
    bends = [(way - velocity).square().sum() / len(x0) for velocity in velocities]
    return torch.stack(bends).mean().to(x0.dtype)


@widened
def transport_cost(
    x0: Samples,
    x1: Samples,
    cost: float | Callable[[Tensor], Tensor] = 2.0,
) -> Scalar:
    """Return the mean cost of moving each x0 to its x1.

    Parameters
    ----------
    x0, x1 : Tensor
        Pairs, shape ``(n, *shape)``.
    cost : float or callable, default=2.0
        A power p > 0 of the Euclidean distance, or ``cost(x1 - x0)`` of shape (n,).

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    ValueError
        If shapes differ, or ``cost`` is neither positive nor callable.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import transport_cost
    >>> transport_cost(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor(13.)
    """
    has_shape("x1", floating("x1", x1), floating("x0", x0).shape, "x0")
    if callable(cost):
        return has_shape("cost", cost(x1 - x0), (len(x0),), "x0").mean()
    power = at_least("cost", cost, 0, strict=True)
    lines = (x1 - x0).reshape(len(x0), math.prod(x0.shape[1:]))
    return torch.linalg.vector_norm(lines, dim=1).pow(power).mean()
