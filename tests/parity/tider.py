"""Components, objective and its gradient, for parameters and a table that are stored."""

import torch

from posterity.timeseries import TiderFactors

AGAINST = "the paper's equations in loops over entries, gradients by central differences, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    model = TiderFactors(24, 5, rank=3, bias_rank=2, n_harmonics=4, period=(8.0, 5.5), lags=(1, 3)).double()
    parameters = dict(model.named_parameters())
    model.load_state_dict({name: torch.tensor(stored[f"p_{name}"]) for name in parameters})
    for name, part in zip(("trend", "seasonal", "bias"), model.components(), strict=True):
        yield name, part, stored[name], 1e-5
    fit = (model() - torch.tensor(stored["X"]))[torch.tensor(stored["known"])].square().mean()
    penalty = model.penalty(l2=0.3, ar=0.5, trend=0.7)
    yield "fit", fit, stored["fit"], 1e-5
    yield "penalty", penalty, stored["penalty"], 1e-6
    for name, gradient in zip(parameters, torch.autograd.grad(fit + penalty, list(model.parameters())), strict=True):  # fmt: skip
        yield f"gradient, {name}", gradient, stored[f"g_{name}"], 1e-5
