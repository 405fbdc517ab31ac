"""Loss, gradient and function on batches of four sizes and with ties, and the two rivals."""

import torch

from posterity.uncertainty import ESDLoss, MMCELoss, SBECELoss, expected_squared_difference

AGAINST = "the authors' code (github.com/hee-suk-yoon/ESD), in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("tiny", "small", "mid", "cal"):
        logits = torch.tensor(stored[f"{case}_logits"], requires_grad=True)
        target = torch.tensor(stored[f"{case}_y"])
        value = ESDLoss(root=False)(logits, target)
        yield f"{case} value", value, stored[f"{case}_esd"], 1e-10
        yield f"{case} gradient", torch.autograd.grad(value, logits)[0], stored[f"{case}_grad"], 1e-9
        confidence, predicted = logits.detach().softmax(1).max(1)
        yield (
            f"{case} function",
            expected_squared_difference(confidence, predicted == target),
            stored[f"{case}_esd"],
            1e-10,
        )
        root = ESDLoss()(logits, target)
        yield f"{case} root", root, stored[f"{case}_root"], 1e-7
        if stored[f"{case}_esd"] > 1e-6:  # below 0 the official root has no gradient, and ours is 0
            yield (
                f"{case} root gradient",
                torch.autograd.grad(root, logits)[0],
                stored[f"{case}_root_grad"],
                1e-7,
            )
        yield (
            f"{case} MMCE",
            MMCELoss(bandwidth=0.4)(logits, target),
            float(stored[f"{case}_mmce"]) ** 0.5,
            1e-8,
        )
        yield (
            f"{case} SB-ECE",
            SBECELoss(n_bins=15, temperature=0.01)(logits, target),
            stored[f"{case}_sbece"],
            1e-6,
        )
    confidence = torch.tensor(stored["ties_confidence"], requires_grad=True)
    value = expected_squared_difference(confidence, torch.tensor(stored["ties_correct"]))
    yield "ties value", value, stored["ties_esd"], 1e-10
    yield "ties gradient", torch.autograd.grad(value, confidence)[0], stored["ties_grad"], 1e-9
