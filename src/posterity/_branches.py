"""Branches of self-supervised networks: a projection head, and a copy that follows with momentum."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["follow", "momentum_copy", "projection_head"]


def projection_head(sizes: Sequence[int], *, last_norm: bool = False) -> nn.Sequential:
    """Return Linear - BatchNorm - ReLU - ... - Linear through ``sizes``, without biases.

    With ``last_norm`` a BatchNorm without scale and shift ends it.
    """
    layers: list[nn.Module] = []
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        if k:
            layers += [nn.BatchNorm1d(n_in), nn.ReLU()]
        layers.append(nn.Linear(n_in, n_out, bias=False))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(sizes[-1], affine=False)] if last_norm else []))


def momentum_copy(module: nn.Module) -> nn.Module:
    """Return a copy that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Move parameters of ``target`` towards those of ``source``; copy the buffers, as running statistics are.

    ``momentum`` is the share that stays: 1 changes no parameter, 0 copies them.
    """
    theirs = [p.detach() for p in source.parameters()]
    torch._foreach_lerp_(list(target.parameters()), theirs, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
    for ours, new in zip(target.buffers(), source.buffers(), strict=True):
        ours.copy_(new)
