"""Matrices, energies, kernel and prediction at stored points, its eigenvalues, and the loss of stored images."""

import torch

from posterity.dynamics import (
    ImageSobolevLoss,
    SobolevLoss,
    frequency_energy,
    ntk_eigenvalues,
    predicted_residual,
    relu_ntk,
)

AGAINST = (
    "explicit harmonics, Fourier transforms, integrals and matrix exponentials by numpy and scipy, in float64"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, c, r, times = (torch.tensor(stored[name]) for name in ("x", "c", "r", "times"))
    for s, theirs in zip((-1.0, 0.0, 1.0), stored["matrices"], strict=True):
        yield f"matrix, s = {s:g}", SobolevLoss(x, s, max_degree=3, weights=c).matrix, theirs, 1e-11
    yield "energies", frequency_energy(r, x, max_degree=3, weights=c), stored["energy"], 1e-11
    yield "kernel", relu_ntk(x, x), stored["kernel"], 1e-7
    predicted = predicted_residual(x, r, times, s=1.0, max_degree=3, weights=c)
    yield "prediction", predicted, stored["predicted"], 1e-7
    yield "eigenvalues, d = 3", ntk_eigenvalues(8, 3), stored["mu"], 1e-12
    images = torch.tensor(stored["images"])
    for s, theirs in zip((-1.0, 1.0), stored["image"], strict=True):
        yield f"images, s = {s:g}", ImageSobolevLoss(s)(*images), theirs, 1e-11
