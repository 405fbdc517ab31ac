"""The repulsion and its one-sided gradient in three cases, principal components, the loss of linear members."""

import torch
from torch import nn

from posterity.uncertainty import FoRDELoss, fit_input_components, input_gradient_repulsion

AGAINST = "the authors' code (github.com/AaltoPML/FoRDE), and for the whole loss of plain loops and finite differences"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    basis = {name: torch.tensor(stored[name]) for name in ("components", "scales")}
    for case in ("plain", "pca", "two"):
        gradients = torch.tensor(stored[f"{case}_gradients"], requires_grad=True)
        value = input_gradient_repulsion(gradients, **(basis if case == "pca" else {}))
        yield f"{case} value", value, stored[f"{case}_value"], 1e-8
        (gradient,) = torch.autograd.grad(value, gradients)
        yield f"{case} gradient", gradient, stored[f"{case}_gradient"], 1e-8
    components, scales = fit_input_components(torch.tensor(stored["inputs"]))
    yield "scales", scales, stored["scales"], 1e-6
    yield "second moment", components * scales**2 @ components.T, stored["second_moment"], 1e-6
    members = [nn.Linear(6, 3).double() for _ in stored["weights"]]
    for member, weight, bias in zip(members, stored["weights"], stored["biases"], strict=True):
        member.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    value = FoRDELoss()(members, torch.tensor(stored["x"]), torch.tensor(stored["target"]))
    yield "loss", value, stored["loss"], 1e-8
    gradient = torch.stack(torch.autograd.grad(value, [member.weight for member in members]))
    yield "gradient of the loss", gradient, stored["loss_gradient"], 1e-8
