"""The constant and its slope in ten dimensions, the posterior of a mixture, the loss and both centres."""

import torch

from posterity.representation import DINOvMFLoss, vmf_log_normalizer, vmf_logits

AGAINST = "mpmath with forty digits (constants, posteriors), a loop over pairs in numpy (loss, centres)"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for row, dim in enumerate(stored["dims"].tolist()):
        kappa = torch.tensor(stored["kappa"][row], requires_grad=True)
        value = vmf_log_normalizer(kappa, dim)
        yield f"constant, {dim} dimensions", value, stored["value"][row], 1e-11
        (slope,) = torch.autograd.grad(value.sum(), kappa)
        yield f"slope, {dim} dimensions", -slope, stored["length"][row], 1e-12
    y, weight = torch.tensor(stored["y"]), torch.tensor(stored["weight"])
    logits = vmf_logits(y, weight, float(stored["temperature"]))
    yield "posterior", logits.softmax(1), stored["posterior"], 1e-12
    for centering in ("probability", "logit"):
        loss = DINOvMFLoss(6, center_momentum=0.8, centering=centering).double()
        loss.center = torch.tensor(stored["start"])
        value = loss([*torch.tensor(stored["student"])], [*torch.tensor(stored["teacher"])])
        yield f"loss, centre of {centering}", value, stored["loss"], 1e-12
        yield f"centre of {centering}", loss.center, stored[f"center_{centering}"], 1e-12
