"""The change of a linear layer, by both ways, and of a convolution."""

import torch
from torch import nn

from posterity.transfer import layer_variation

AGAINST = "the authors' code (github.com/HHTseng/Layer-Variational-Analysis), in float64, linear layers rounded to float32"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    net = nn.Sequential(
        nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1, bias=False)
    ).double()
    images = nn.Sequential(nn.Conv2d(1, 3, 9, padding=4), nn.ReLU(), nn.Conv2d(3, 2, 5, padding=2), nn.ReLU(),
                           nn.Conv2d(2, 1, 5, padding=2, bias=False)).double()  # fmt: skip
    for model, prefix in ((net, "net_fc"), (images, "images_conv")):
        for name, p in model.named_parameters():
            place, kind = name.split(".")
            p.data = torch.tensor(stored[f"{prefix}{int(place) // 2 + 1}.{kind}"])
    x, y, xt, yt, at, bt = (torch.tensor(stored[name]) for name in ("x", "y", "xt", "yt", "at", "bt"))
    for method in ("exact", "perturb"):
        found = layer_variation(net, None, xt, yt, x=x, y=y, method=method)
        yield f"linear layer, {method}", found.weight.T, stored[method], 1e-5
    yield "convolution, exact", layer_variation(images, None, at, bt).weight, stored["kernel"], 1e-9
