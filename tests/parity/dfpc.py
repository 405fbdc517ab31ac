"""Scores of a bottleneck ResNet, all couplings of it, by matrices that a loop over every pixel fills."""

import torch

from posterity.claims.compression.dfpc import BottleneckNet
from posterity.compression import channel_saliencies, data_flow_couplings

AGAINST = "the definition by dense matrices of every layer and every pair of layers, in NumPy and float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    net = BottleneckNet(1, 3, 2).double().eval()
    state = {name[6:]: torch.tensor(stored[name]) for name in stored if name.startswith("state/")}
    net.load_state_dict(state, strict=False)
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    couplings = data_flow_couplings(net, x)
    yield "number of couplings", torch.tensor(len(couplings)), stored["n_couplings"], 0
    for coupling, score in zip(couplings, channel_saliencies(net, x), strict=True):
        name = coupling.feeds[0]
        yield f"feeds of {name}", torch.tensor(len(coupling.feeds)), stored[f"feeds/{name}"], 0
        theirs = torch.tensor(stored[f"score/{name}"])
        yield f"scores of {name}, relative", score / theirs, theirs / theirs, 1e-10
