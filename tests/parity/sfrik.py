"""The loss and its gradient for four sizes: degrees up to 2, 3 and 5, more pairs than dimensions and fewer."""

import torch

from posterity.representation import SFRIKLoss

AGAINST = "SciPy's Gegenbauer polynomials of every pair of rows, their derivatives by hand, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("small", "tall", "wide", "five"):
        views = torch.tensor(stored[f"{case}_z"], requires_grad=True)
        loss = SFRIKLoss(
            stored[f"{case}_weights"].tolist(), alignment_weight=float(stored[f"{case}_alignment"])
        )
        value = loss(*views)
        yield f"{case} value", value, stored[f"{case}_value"], 1e-11
        yield f"{case} gradient", torch.autograd.grad(value, views)[0], stored[f"{case}_grad"], 1e-11
