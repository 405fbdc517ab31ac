"""Edges of a photograph, the contrastive loss of pixels, and the gates of classes."""

import numpy as np
import torch
from torch.nn import functional as F

from posterity.generative import PixelContrastiveLoss, SemanticPreserving, edges

AGAINST = (
    "OpenCV 4's Canny for the edges, and loops over pixels and classes in numpy, in float64, for loss and gates; "
    "the authors have not published their networks"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    photo = torch.tensor(stored["photo"]).permute(2, 0, 1)[None] / 255
    found = edges(photo, low=100 / 255, high=200 / 255, sigma=0.1)  # a Gaussian of one pixel: none
    theirs = np.unpackbits(stored["edge"])[: found.numel()].astype(np.float32)
    yield "edges", found.flatten(), theirs, 0
    z, labels = torch.tensor(stored["z"]), torch.tensor(stored["labels"])
    for temperature, theirs in zip((0.1, 0.7), stored["loss"], strict=True):
        loss = PixelContrastiveLoss(temperature, max_pixels_per_class=None, ignore_index=255)
        yield f"contrast, {temperature}", loss(z, labels), theirs, 1e-10
    gate = SemanticPreserving(3, 4, reduction=2).double()
    weights = {"squeeze.weight": "w1", "squeeze.bias": "b1", "excite.weight": "w2", "excite.bias": "b2"}
    gate.load_state_dict({name: torch.tensor(stored[key]) for name, key in weights.items()})
    layout = F.one_hot(torch.tensor(stored["classes"]), 3).movedim(3, 1)
    yield "gates", gate(torch.tensor(stored["x"]), layout).detach(), stored["gated"], 1e-12
