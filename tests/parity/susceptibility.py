"""Both losses of five measurements along a training, with momentum and with Adam, and where it ends."""

import torch
from torch.nn import functional as F

from posterity.labels import susceptibility_step

AGAINST = "softmax regression and both optimisers by their formulas in numpy"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, y, probe, labels = (torch.from_numpy(stored[name]) for name in ("x", "y", "probe", "probe_labels"))
    optimizers = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.01),
    }
    for name, make in optimizers.items():
        net = torch.nn.Linear(x.shape[1], 3, bias=False).double()
        with torch.no_grad():
            net.weight.copy_(torch.from_numpy(stored["start"]))
        optimizer, losses = make(net.parameters()), []
        for batch in zip(probe, labels, strict=True):
            losses.append(susceptibility_step(net, optimizer, *batch))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        yield f"{name}, losses before and after", losses, stored[name], 1e-10
        yield f"{name}, weights at the end", net.weight, stored[f"{name}_end"], 1e-10
