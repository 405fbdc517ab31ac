"""Coordinate check: train a few steps at several widths and see which layers still move.

For each layer and width n the mean absolute change of a coordinate of its output,
mean |h_t - h_0|, grows like n^slope. In muP every slope is near 0; in the NTK parametrisation
hidden features stop moving, slope -1/2; in PyTorch's own, under Adam, outputs blow up.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from posterity._checks import at_least, integer, scalar
from posterity._precision import wide
from posterity._random import seeded
from posterity.optimization.adaptive_width import (
    Parametrization,
    _apply,
    _tensors,
    exponents,
    param_groups,
)

__all__ = ["CoordinateTable", "coordinate_check"]


@dataclass
class CoordinateTable:
    """How far each layer's output moved.

    Attributes
    ----------
    names : list of str
        Linear, Conv and embedding modules, in the model's order.
    widths : list of int
    steps : int
        Optimiser steps taken.
    change : ndarray of shape (layers, widths, steps, seeds)
        Mean over the batch and the coordinates of |h_t - h_0|, for t = 1, ..., steps.
    slopes : dict of str to float
        Least-squares slope of log2 of the last step's change, mean over seeds, against log2
        of the width, by name; NaN for a layer that does not move.
    """

    names: list[str]
    widths: list[int]
    steps: int
    change: Float[ndarray, "layers widths steps seeds"]
    slopes: dict[str, float]


@torch.inference_mode(False)
@torch.enable_grad()
def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batch: Sequence[Tensor],
    loss_fn: Callable[..., Tensor],
    *,
    lr: float = 2**-10,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    parametrization: Parametrization = "mu",
    base_width: int | None = None,
    n_steps: int = 5,
    seeds: Iterable[int] = range(3),
) -> CoordinateTable:
    """Train freshly made models of several widths on one batch and compare how far layers move.

    Parameters
    ----------
    make_model : callable
        ``make_model(width)`` returns a new model with initial weights drawn from torch's global
        generator, which is seeded for it and put back. Without dropout, whose noise would
        count as movement. The model's device is the batch's.
    widths : sequence of int
        At least two, rising.
    batch : pair of Tensor
        Inputs and targets; every step is on all of them.
    loss_fn : callable
        ``loss_fn(model(inputs), targets)``, a scalar.
    lr : float, default=2**-10
        At the base width, positive.
    optimizer : callable, default=torch.optim.Adam
        A torch optimiser, or a partial one with its own eps and weight decay, as
        ``functools.partial(torch.optim.Adam, eps=1e-20)``; these hold at the base width and
        are scaled as `param_groups` does. Of SGD the family is "sgd".
    parametrization : {"mu", "ntk", "standard"}, default="mu"
    base_width : int, optional
        Where ``lr`` holds; by default the first of ``widths``.
    n_steps : int, default=5
        At least 1. Of one step, layers behind a layer that moves say little.
    seeds : iterable of int, default=range(3)
        One run each.

    Returns
    -------
    CoordinateTable
        Movement of each layer at each width, step and seed, and slopes against width.

    Raises
    ------
    ValueError
        If ``widths`` are fewer than two or do not rise, a number is out of range, the model has
        none of the layers, loss or outputs stop being finite, or models do not fit together,
        as `width_info` says.

    References
    ----------
    .. [1] Littwin, Yang. Adaptive Optimization in the infinite-Width Limit. ICLR 2023. On abcd-parametrisations.
    .. [2] Yang et al. Tensor Programs V. NeurIPS 2021. Appendix D.1, "coordinate checking".

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import coordinate_check
    >>> def mlp(n):
    ...     return nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
    >>> batch = torch.eye(8), torch.arange(8) % 2
    >>> table = coordinate_check(mlp, [64, 256], batch, nn.CrossEntropyLoss(), parametrization="ntk")
    >>> table.slopes["2"] < -0.3  # the hidden layer moves less in the wider network
    True
    """
    widths, seeds = list(widths), list(seeds)
    for width in widths:
        integer("widths", width, 1)
    if len(widths) < 2 or any(a >= b for a, b in zip(widths, widths[1:], strict=False)):
        raise ValueError(f"widths must be at least two, rising, got {widths}")
    if not seeds:
        raise ValueError("seeds must be at least one, got none")
    seeds = [integer("seeds", seed) for seed in seeds]
    at_least("lr", lr, 0, strict=True)
    integer("n_steps", n_steps, 1)
    exponents(parametrization)
    if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError("batch must be a pair of tensors, inputs and targets")
    x, y = (part.detach().clone() for part in batch)
    if len(x) == 0:
        raise ValueError("batch must have at least one row, got none")
    try:
        probe = optimizer([torch.zeros(1, requires_grad=True)], lr=lr)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"optimizer must make a torch optimizer of parameters and lr, got {error}"
        ) from error
    if not isinstance(probe, torch.optim.Optimizer):
        raise ValueError(f"optimizer must make a torch optimizer of parameters and lr, got {probe}")
    family = "sgd" if isinstance(probe, torch.optim.SGD) else "adaptive"
    own = {key: probe.defaults[key] for key in ("eps", "weight_decay") if key in probe.defaults}
    base_width = widths[0] if base_width is None else integer("base_width", base_width, 1)

    names: list[str] = []
    runs: dict[tuple[int, int], Float[ndarray, "layers steps"]] = {}
    devices = [x.device] if x.device.type == "cuda" else []
    for k, seed in enumerate(seeds):
        with torch.random.fork_rng(devices):
            base = make_model(base_width)
        if not isinstance(base, nn.Module) or not _layers(base):
            raise ValueError(f"make_model must return a model with a Linear, Conv or embedding, got {base}")
        for j, width in enumerate(widths):
            with seeded(seed, x.device):
                model = make_model(width).to(x.device)
                _apply(
                    model, _tensors(model, base), exponents(parametrization, family), parametrization, family, True
                )  # fmt: skip
                steps = optimizer(param_groups(model, lr, **own), lr=lr)
                changes = _changes(model, steps, x, y, loss_fn, n_steps)
            if names and list(changes) != names:
                raise ValueError(
                    f"make_model must use the same layers at each width, got {list(changes)} for {names}"
                )
            names = list(changes)
            runs[j, k] = np.array(list(changes.values()))
    change = np.array([[runs[j, k] for k in range(len(seeds))] for j in range(len(widths))]).transpose(
        2, 0, 3, 1
    )
    last = change[:, :, -1].mean(-1)  # (layers, widths)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = [
            float(np.polyfit(np.log2(widths), np.log2(row), 1)[0]) if row.all() else math.nan for row in last
        ]
    return CoordinateTable(names, widths, n_steps, change, dict(zip(names, slopes, strict=True)))


def _changes(
    model: nn.Module,
    steps: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[..., Tensor],
    n_steps: int,
) -> dict[str, list[float]]:
    """Train, and return for each layer its mean absolute change after each step."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: seen.setdefault(name, []).append(wide(output.detach()))

    for name, module in _layers(model).items():
        module.register_forward_hook(keep(name))
    first: dict[str, list[Tensor]] = {}
    changes: dict[str, list[float]] = {}
    for step in range(n_steps + 1):
        seen.clear()
        loss = scalar("loss_fn", loss_fn(model(x), y))
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"loss_fn must stay finite, got {loss.detach()} after {step} steps: lower lr {steps.param_groups[0]['lr']}"
            )
        first = first or dict(seen)
        if step:
            for name in filter(seen.__contains__, _layers(model)):
                moved = [(a - b).abs().mean() for a, b in zip(seen[name], first[name], strict=True)]
                changes.setdefault(name, []).append(float(torch.stack(moved).mean()))
        if step < n_steps:
            steps.zero_grad()
            loss.backward()
            steps.step()
    return changes


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear | _ConvNd | nn.Embedding | nn.EmbeddingBag
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
