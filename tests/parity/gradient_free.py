"""Logits, losses and norms of stored networks, which of them fit, and a pattern search of two entries at a time."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.optimization import (
    guess_and_check,
    population_search,
    stacked_logits,
    weight_norm_product,
)

AGAINST = "loops in numpy over networks, examples and moves, written from the paper's algorithms, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    params = {name: torch.tensor(stored[name]) for name, _ in net.named_parameters()}
    x, y = torch.tensor(stored["x"]), torch.tensor(stored["y"])
    logits = stacked_logits(net, params, x)
    yield "logits", logits, stored["logits"], 1e-12
    yield "products of norms", weight_norm_product(params, unit=1.5), stored["products"], 1e-12
    size = len(stored["products"])
    found = guess_and_check(
        net, x, y, n_models=size, init=lambda name, *_: params[name], unit=1.5, batch_size=size, max_tries=size,
        loss_range=(0.0, float(stored["high"])),
    )  # fmt: skip
    yield "which fit", found.params["0.weight"], stored["0.weight"][stored["fits"]], 0.0
    yield "their losses", found.losses, stored["losses"][stored["fits"]], 1e-12
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(params[name][0])
    # a population of all moves takes the steepest one, whatever their order
    result = population_search(
        net, x, y, population=10**6, max_steps=len(stored["history"]), stop_accuracy=None, unit=1.5
    )
    yield "losses of a search by the best of all moves", result.history, stored["history"], 1e-12
    yield "its end", result.params["0.weight"], stored["end"], 1e-12
    yield "its radius", torch.tensor(result.radius), stored["radius"], 0.0
    yield "loss at the start", F.cross_entropy(logits[0], y), stored["plain"], 1e-12
