"""Traces, ranges, score and quantised weights of a network of two layers."""

import torch
from torch import nn

from posterity.compression import fit_score, quantize, sensitivity

AGAINST = (
    "backpropagation and quantisation written out in NumPy for this network, sample by sample, in float64"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    stored_state = {n: torch.tensor(stored[k]) for n, k in zip(names, ("w1", "b1", "w2", "b2"), strict=True)}
    net.load_state_dict(stored_state)
    x, y = torch.tensor(stored["x"]), torch.tensor(stored["y"])
    found = sensitivity(net, [(x, y)])
    yield (
        "weights",
        torch.tensor(list(found.weight_trace.values()), dtype=torch.float64),
        stored["traces"],
        1e-12,
    )
    yield "activations", found.activation_trace["2"], stored["activation"], 1e-12
    ranges = [*found.weight_range.values(), found.activation_range["2"]]
    yield "ranges", torch.tensor(ranges, dtype=torch.float64), stored["ranges"], 1e-12
    yield "score", fit_score(found, {"0": 3, "2": 5}, 4), stored["score"], 1e-12
    small = quantize(net, {"0": 3, "2": 5})
    yield "weights of 3 bits", small[0].weight.detach(), stored["q1"], 1e-12
    yield "weights of 5 bits", small[2].weight.detach(), stored["q2"], 1e-12
