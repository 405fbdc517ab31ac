"""Masks, scores, budget and gradients of a two-layer network, and attacks on a linear classifier."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.compression import HARP, robust_loss

AGAINST = (
    "numpy, float64: a stable sort, gradients by hand; for a linear classifier the closed form of the attack"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    sizes = stored["w0"].shape[1], stored["w0"].shape[0], stored["w2"].shape[0]
    net = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:])).double()
    net.load_state_dict({f"{k}.{kind}": torch.tensor(stored[f"{kind[0]}{k}"]) for k in (0, 2) for kind in ("weight", "bias")})  # fmt: skip
    x, y = torch.tensor(stored["x"]), torch.tensor(stored["y"])
    for case in range(3):
        rate, alpha = (float(v) for v in stored[f"setting{case}"])
        harp = HARP(net, rate, alpha=alpha)
        with torch.no_grad():
            for name, score in harp.scores().items():
                score.copy_(torch.tensor(stored[f"score{name}_{case}"]))
                harp.rate_logits()[name].fill_(float(stored[f"logit{name}_{case}"]))
        loss = F.cross_entropy(harp(x), y)
        total = loss + 0.3 * harp.compression_loss()
        total.backward()
        yield f"loss, case {case}", loss, stored[f"loss{case}"], 1e-12
        yield f"kept share, case {case}", harp.keep_rate(), stored[f"keep{case}"], 1e-12
        for name in ("0", "2"):
            yield f"mask {name}, case {case}", harp.masks()[name], stored[f"mask{name}_{case}"], 0.0
            yield (
                f"score gradient {name}, case {case}",
                harp.scores()[name].grad,
                stored[f"grad{name}_{case}"],
                1e-10,
            )
            yield (
                f"rate gradient {name}, case {case}",
                harp.rate_logits()[name].grad,
                stored[f"slope{name}_{case}"],
                1e-10,
            )
    for name, p in HARP(net, 0.1).scores().items():
        yield f"first scores {name}", p, stored[f"first{name}"], 1e-12
    linear = nn.Linear(sizes[0], 2, bias=False).double()
    linear.weight.data = torch.tensor(stored["linear"])
    for norm in ("linf", "l2"):
        value = robust_loss(
            linear,
            x,
            torch.tensor(stored["y2"]),
            epsilon=0.1,
            step_size=0.05,
            n_steps=60,
            norm=norm,
            bounds=None,
        )
        yield f"attacked linear classifier, {norm}", value, stored[f"attacked_{norm}"], 1e-9
