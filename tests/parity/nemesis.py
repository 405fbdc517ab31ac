"""Norms of shared contexts and of those of three classes, and the schedule of 1, 50 and 200 epochs."""

import math

import torch

from posterity.transfer import normalization_schedule, prompt_norm

AGAINST = "the authors' code (github.com/ShyFoo/Nemesis) in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for name in ("shared", "own"):
        context = torch.tensor(stored[name])
        for k in range(3):
            weights = torch.tensor(stored[f"weights {k}"])
            for kind, p in (("one", 1.0), ("two", 2.0), ("inf", math.inf)):
                yield (
                    f"{name}, {kind}",
                    prompt_norm(context, weights, p=p),
                    stored[f"{name} {k} {kind}"],
                    1e-12,
                )
    for n in (1, 50, 200):
        yield f"{n} epochs", [normalization_schedule(k, n) for k in range(n + 1)], stored[f"omega {n}"], 1e-12
