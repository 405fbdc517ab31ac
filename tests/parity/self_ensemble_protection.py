"""Three modes of protection, the class means in them, and the similarity of gradients, for networks of tanh units."""

import torch
from torch import nn

from posterity.robustness import SelfEnsembleProtector, gradient_similarity

AGAINST = "the derivatives of a tanh layer and a softmax by their formulas in numpy, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    nets = []
    for first, head in zip(stored["first"], stored["head"], strict=True):
        net = nn.Sequential(nn.Linear(10, 7, bias=False), nn.Tanh(), nn.Linear(7, 5, bias=False)).double()
        net[0].weight.data, net[2].weight.data = torch.from_numpy(first), torch.from_numpy(head)
        nets.append(net)
    x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])

    def draws(seed):
        return torch.Generator().manual_seed(seed)

    drawn = torch.randint(len(nets), (6, 4), generator=draws(3))
    yield "inner draws", drawn, stored["drawn"], 0
    for mode in ("ce", "fa", "vr"):
        protector = SelfEnsembleProtector(
            nets,
            epsilon=0.08,
            step_size=0.02,
            n_steps=6,
            n_inner=4,
            mode=mode,
            batch_size=9,
            generator=draws(3),
        )
        yield f"protected, {mode}", protector.protect(x, y), stored[mode], 1e-12
    yield "similarity", gradient_similarity(nets, x, y), stored["similarity"], 1e-12
