"""The four tasks, forecasting with and without time features, and the periods that a batch is folded by."""

from math import prod

import torch

from posterity.timeseries import TimesNet, dominant_periods

AGAINST = "the authors' code (github.com/thuml/Time-Series-Library), in float32"
SIZES = {"d_model": 4, "d_ff": 5, "n_layers": 2, "top_k": 3, "n_kernels": 3}


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, times, mask, real = (
        torch.tensor(stored[name]) for name in ("x", "time_features", "mask", "padding_mask")
    )
    mask, real = mask.float(), real.float()
    periods, amplitudes = dominant_periods(x, 3)
    yield "periods", periods, stored["periods"], 0
    yield "amplitudes", amplitudes, stored["amplitudes"], 1e-4 * stored["amplitudes"].max()
    hidden = torch.where(mask > 0, x, 1e3)  # what is missing must not matter
    calls = {
        "forecast": ({"horizon": 12, "n_time_features": 4}, x, {"time_features": times}),
        "forecast0": ({"horizon": 12}, x, {}),
        "impute": ({"n_time_features": 4}, hidden, {"mask": mask, "time_features": times}),
        "detect": ({}, x, {}),
        "classify": ({"n_classes": 4}, x * real[..., None], {"padding_mask": real}),
    }
    for case, (options, series, call) in calls.items():
        net = TimesNet(3, 24, case.rstrip("0"), **SIZES, **options).eval()
        net.load_tslib(state(stored, case))
        yield case, net(series, **call), stored[f"{case} output"], 1e-4


def state(stored, case):
    """Return weights by their names in the library, stored as names with shapes and one vector."""
    entries = [(name, [int(n) for n in shape]) for name, *shape in map(str.split, stored[f"{case} names"])]
    values = torch.tensor(stored[f"{case} weights"]).split([prod(shape) for _, shape in entries])
    return {name: value.view(shape) for (name, shape), value in zip(entries, values, strict=True)}
