"""Importance of three layers as shares, and the contrast with and without what was known before."""

import torch

from posterity.transfer import integration_loss, normalize_importance

AGAINST = "the authors' code (github.com/UIC-Liu-Lab/ContinualLM) in float64, on one process"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    found = normalize_importance({str(k): torch.tensor(row) for k, row in enumerate(stored["raw"])})
    for k, shares in enumerate(stored["shares"]):
        yield f"importance, layer {k}", found[str(k)], shares, 1e-12
    anchor, positive, negative = torch.tensor(stored["z"])
    for temperature in (0.05, 0.5):
        for name, known in (("with", negative), ("without", None)):
            loss = integration_loss(anchor, positive, known, temperature=temperature)
            yield f"contrast {name} negatives", loss, stored[f"{name} {temperature}"], 1e-12
