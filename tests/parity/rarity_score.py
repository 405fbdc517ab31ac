"""Radii, scores and rankings of three clouds for k = 1, 3 and 5, by distance and by angle, and realism."""

import torch

from posterity.generative import RarityManifold, realism_score

AGAINST = "the authors' code (github.com/hichoe95/Rarity-Score) in float64, its realism with the balls up to the median radius"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("low", "high", "angle"):
        real, samples = (torch.tensor(stored[f"{case}_{kind}"]) for kind in ("real", "samples"))
        metric = "cosine" if case == "angle" else "euclidean"
        manifold = RarityManifold(real, metric=metric)
        for k in (1, 3, 5):
            found, theirs = manifold(samples, k), stored[f"{case}_{k}_score"]
            inside = found.inside.numpy()
            yield f"{case}, k = {k}, inside", found.inside.double(), (theirs != 0).astype(float), 0
            # their radius of the cosine is -(1 + cos), ours 1 - cos
            shift = 2.0 if case == "angle" else 0.0
            yield f"{case}, k = {k}, radii", manifold.radii(k), stored[f"{case}_{k}_radii"] + shift, 1e-12
            yield f"{case}, k = {k}, scores", found.score[found.inside], theirs[inside] + shift, 1e-12
            if f"{case}_{k}_realism" in stored:
                yield (
                    f"{case}, k = {k}, realism",
                    realism_score(real, samples, k),
                    stored[f"{case}_{k}_realism"],
                    1e-9,
                )
