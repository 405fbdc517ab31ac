"""The mask, steps under it with SGD and Adam, an unlearning, and its report, for softmax regression."""

from dataclasses import astuple

import torch
from torch.nn import functional as F

from posterity.privacy import MaskedOptimizer, saliency_mask, salun, unlearning_report

AGAINST = "softmax regression, both optimisers and the mask by their formulas in numpy, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    forget, retain, test = (
        (torch.from_numpy(stored[f"x_{part}"]), torch.from_numpy(stored[f"y_{part}"]))
        for part in ("forget", "retain", "test")
    )

    def start():
        net = torch.nn.Linear(7, 4, bias=False).double()
        net.weight.data = torch.from_numpy(stored["start"]).clone()
        return net

    for keep in (0.1, 0.45, 0.8):
        yield f"mask, {keep}", saliency_mask(start(), forget, keep=keep)["weight"], stored[f"mask_{keep}"], 0
    mask = {"weight": torch.from_numpy(stored["mask_0.45"])}
    optimizers = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.05),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.05),
    }
    for name, make in optimizers.items():
        net = start()
        optimizer = MaskedOptimizer(make(net.parameters()), net.named_parameters(), mask)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(net(forget[0]), forget[1]).backward()
            optimizer.step()
        yield f"six steps of {name}", net.weight, stored[name], 1e-10
    unlearned = salun(start(), forget, retain, n_classes=4, keep=0.45, epochs=3, lr=0.1, alpha=0.7,
                      generator=torch.Generator().manual_seed(4))  # fmt: skip
    yield "an unlearning", unlearned.weight, stored["salun"], 1e-10
    yield "its report", astuple(unlearning_report(unlearned, forget, retain, test)), stored["report"], 1e-12
