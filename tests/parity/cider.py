"""Prototypes, both losses and their gradients in three settings; initial prototypes, simplex, k-NN score."""

import torch
from torch.nn.functional import normalize

from posterity.uncertainty import CIDERLoss, KNNScore, compactness_loss, dispersion_loss, update_prototypes

AGAINST = "the authors' code (github.com/deeplearning-wisc/cider), and for the k-NN score of brute force"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("a", "b", "missing"):  # in the last some classes have no sample
        start, x, target, updated = (
            torch.tensor(stored[f"{case}_{name}"]) for name in ("prototypes", "x", "target", "updated")
        )
        x.requires_grad_()
        momentum, temperature = map(float, stored[f"{case}_hyper"])
        scale = 0.07 / temperature  # ours is the official compactness loss times this
        dispersion, compactness, dispersion_grad, compactness_grad = (
            stored[f"{case}_{name}{of}"] for of in ("", "_grad") for name in ("dispersion", "compactness")
        )
        after = update_prototypes(start, normalize(x), target, momentum=momentum)
        yield f"{case} prototypes", after, updated, 1e-9
        spread = dispersion_loss(after, temperature=temperature)
        yield f"{case} dispersion", spread, dispersion, 1e-9
        yield f"{case} dispersion gradient", torch.autograd.grad(spread, x)[0], dispersion_grad, 1e-9
        compact = compactness_loss(normalize(x), updated, target, temperature=temperature)
        yield f"{case} compactness", compact / scale, compactness, 1e-9
        loss = CIDERLoss(*start.shape, temperature=temperature, momentum=momentum).double()
        loss.prototypes.copy_(start)
        value = loss(normalize(x), target)
        yield f"{case} loss", value, dispersion + 2 * scale * compactness, 1e-9
        (gradient,) = torch.autograd.grad(value, x)
        yield f"{case} loss gradient", gradient, dispersion_grad + 2 * scale * compactness_grad, 1e-9
        yield f"{case} prototypes of the loss", loss.prototypes, updated, 1e-9
    loss = CIDERLoss(5, 16).double()
    loss.initialize(normalize(torch.tensor(stored["b_x"])), torch.tensor(stored["b_target"]) % 5)
    yield "initial prototypes", loss.prototypes, stored["initial"], 1e-9
    simplex = normalize(torch.eye(6, dtype=torch.float64) - 1 / 6)
    yield "dispersion of a simplex", dispersion_loss(simplex, temperature=0.1), -1 / (5 * 0.1), 1e-9
    score = KNNScore(k=11).fit(torch.tensor(stored["train"])).score(torch.tensor(stored["test"]))
    yield "distance to the 11th neighbour", score, stored["knn"], 1e-6
