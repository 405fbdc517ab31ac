"""NT-Xent at three temperatures and VICReg: values, and gradients with respect to the first view."""

import torch

from posterity.representation import NTXentLoss, VICRegLoss

AGAINST = "pytorch-metric-learning 2.9.0, in float64; the authors published no code"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    losses = {f"ntxent_{t}": NTXentLoss(t) for t in (0.07, 0.15, 0.5)} | {"vicreg": VICRegLoss()}
    for name, loss in losses.items():
        views = [torch.tensor(stored[z], requires_grad=True) for z in ("z1", "z2")]
        value = loss(*views)
        yield f"{name} value", value, stored[name], 1e-12
        (gradient,) = torch.autograd.grad(value, views[:1])
        yield f"{name} gradient", gradient, stored[f"{name}_grad"], 1e-12
