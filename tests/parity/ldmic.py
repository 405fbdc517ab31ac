"""Attention, transfer between three views, the checkerboard's context, and nats of latents."""

import torch

from posterity.coding import CheckerboardContext, JointContextTransfer
from posterity.coding.view_streams import gaussian_nats

AGAINST = "loops in numpy written from the definitions, and scipy's normal distribution, on weights of random numbers"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    layer = JointContextTransfer(16).double()
    layer.load_state_dict({name: torch.tensor(stored[f"jct {name}"]) for name in layer.state_dict()})
    views = torch.tensor(stored["views"])
    yield "transfer between three views", layer(views).detach(), stored["transferred"], 1e-9
    attended = layer.attn(views[:, 0], views[:, 1]).detach()
    yield "attention of one view to another", attended, stored["attended"], 1e-9
    context = CheckerboardContext(3, 2).double()
    context.load_state_dict({name: torch.tensor(stored[name]) for name in ("weight", "bias")})
    yield "context of a checkerboard", context(torch.tensor(stored["latents"])).detach(), stored["seen"], 1e-9
    nats = gaussian_nats(torch.tensor(stored["away"]), torch.tensor(stored["raw"]))
    yield "nats of latents", nats, stored["nats"], 1e-6
