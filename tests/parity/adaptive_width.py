"""Training in muP with biases, uneven widths and weight decay; kernels and tangent kernel of two activations."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.optimization import TangentLimit, param_groups, parametrize

AGAINST = (
    "the authors' library mup 1.0.0 in float64, Adam at eps = 1e-30; and numerical integration of the kernels"
)

OPTIMIZERS = {"MuAdam": torch.optim.Adam, "MuAdamW": torch.optim.AdamW, "MuSGD": torch.optim.SGD}


def mlp(n):
    return nn.Sequential(
        nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 3 * n), nn.Tanh(), nn.Linear(3 * n, 3)
    ).double()


def conv(n):
    return nn.Sequential(
        nn.Conv1d(2, n, 3), nn.ReLU(), nn.Conv1d(n, n, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * n, 3)
    ).double()  # fmt: skip


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    y = torch.tensor(stored["y"])
    for case, make in (("mlp", mlp), ("conv", conv)):
        x = torch.tensor(stored[f"{case}_x"])
        for name, kind in OPTIMIZERS.items():
            net = make(16)
            with torch.no_grad():
                for k, p in enumerate(net.parameters()):
                    p.copy_(torch.tensor(stored[f"{case}_start{k}"]))
            parametrize(net, make(4), family="sgd" if kind is torch.optim.SGD else "adaptive")
            yield f"{case} values at the start", net(x), stored[f"{case}_values"], 1e-12
            optimizer = kind(param_groups(net, 0.02, eps=1e-30, weight_decay=0.1))
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
            for k, p in enumerate(net.parameters()):
                yield f"{case} {name}, tensor {k} after 5 steps", p, stored[f"{case}_{name}{k}"], 1e-8
    x = torch.tensor(stored["points"])
    for activation in ("erf", "tanh"):
        limit = TangentLimit(2, activation=activation, rule="gradient")
        forward, backward = limit.covariances(x)
        yield f"{activation} forward kernels", forward, stored[f"{activation}_forward"], 1e-7
        yield f"{activation} backward kernels", backward, stored[f"{activation}_backward"], 1e-7
        tangent = torch.stack([limit.operator(x, x, chi) for chi in torch.eye(3).double()], 1)
        yield f"{activation} tangent kernel", tangent, stored[f"{activation}_tangent"], 1e-6
