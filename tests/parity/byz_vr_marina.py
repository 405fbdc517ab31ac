"""Robust means of eleven vectors, three of them far off; and forty steps of the solver under attack."""

import torch
from torch.nn import functional as F

from posterity.federated import (
    FiniteSum,
    alie,
    byz_vr_marina,
    coordinate_median,
    geometric_median,
    krum,
    trimmed_mean,
)

AGAINST = "loops in numpy and scipy, written from the paper's algorithm, with the same draws, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    v = torch.tensor(stored["v"])
    yield "coordinate median", coordinate_median(v), stored["median"], 1e-12
    yield "trimmed mean", trimmed_mean(v, 3), stored["trimmed"], 1e-12
    yield "geometric median", geometric_median(v, max_iter=1000, tol=1e-14), stored["geometric"], 1e-9
    yield "Krum", krum(v, 3), stored["krum"], 1e-12
    yield "Krum, mean of four", krum(v, 3, 4), stored["krum4"], 1e-12

    def loss(w, X, y):
        return F.binary_cross_entropy_with_logits(X @ w, y) + 0.05 * (w @ w)

    problem = FiniteSum(loss, (torch.tensor(stored["X"]), torch.tensor(stored["y"])), n_workers=7)
    found = byz_vr_marina(
        problem, torch.zeros(4, dtype=torch.float64), lr=0.5, n_steps=40, n_byzantine=2, attack=alie, batch_size=5,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    yield "forty steps", found.x, stored["w"], 1e-10
