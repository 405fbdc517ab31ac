"""Three rounds on a small network: masks, weights, errors on the lines between levels, spectra, and allowed shares."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.compression import error_barrier, hessian_spectrum, iterative_pruning, prunable_fraction

AGAINST = "a NumPy version in float64, with gradients by hand, differences of them for the Hessian and scans for the shares"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, y = torch.tensor(stored["x"]), torch.tensor(stored["y"])
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    names = list(net.state_dict())
    net.load_state_dict({name: torch.tensor(stored[f"init_{name}"]) for name in names})

    def train(model, start_step, after_step):
        optimizer = torch.optim.SGD(
            model.parameters(), lr=float(stored["lr"]), momentum=float(stored["momentum"]),
            weight_decay=float(stored["decay"]),
        )  # fmt: skip
        for step in range(start_step, int(stored["steps"])):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            after_step(step + 1)

    levels = iterative_pruning(
        net,
        train,
        rounds=int(stored["rounds"]),
        fraction=float(stored["fraction"]),
        rewind_step=int(stored["rewind"]),
    )
    for number, level in enumerate(levels):
        for name in names:
            yield f"level {number}, {name}", level.state[name], stored[f"state{number}_{name}"], 1e-10
        for name, kept in level.mask.items():
            yield f"level {number}, mask of {name}", kept.double(), stored[f"mask{number}_{name}"], 0
        net.load_state_dict(level.state)
        spectrum = hessian_spectrum(net, [(x, y)], loss_fn=F.mse_loss, mask=level.mask, method="exact")
        yield f"level {number}, spectrum", spectrum.eigenvalues, stored[f"spectrum{number}"], 1e-8
        left = torch.cat([net.get_parameter(name)[kept] for name, kept in level.mask.items()])
        yield (
            f"level {number}, share",
            prunable_fraction(left, spectrum, 0.02),
            stored[f"share{number}"],
            1e-12,
        )
        if number:
            ends = levels[number - 1].state, level.state
            found = error_barrier(net, *ends, lambda model: F.mse_loss(model(x), y), n_points=7)
            yield f"line to level {number}", found.errors, stored[f"path{number - 1}"], 1e-10
