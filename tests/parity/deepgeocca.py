"""Means, weighted means, tangent vectors and distances of three sets of covariances, and correlations of two views."""

import torch

from posterity.representation import frechet_mean, geodesic_correlation, spd_distance, tangent_vectors

AGAINST = "pyriemann 0.12, and SciPy's generalised eigenvalues of its tangent vectors, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("small", "mid", "wide"):
        s, weights, mean = (torch.tensor(stored[f"{case}_{name}"]) for name in ("s", "w", "mean"))
        yield f"{case} mean", frechet_mean(s), mean, 1e-8
        yield f"{case} weighted mean", frechet_mean(s, weights), stored[f"{case}_weighted"], 1e-8
        yield f"{case} tangent vectors", tangent_vectors(s, mean), stored[f"{case}_tangent"], 1e-9
        yield f"{case} distances", spd_distance(s, mean), stored[f"{case}_distance"], 1e-9
    views = [torch.tensor(stored[name]) for name in ("x", "y")]
    for name, ridge in (("plain", 0.0), ("ridge", 0.1)):
        found = geodesic_correlation(*views, ridge=ridge)
        yield f"{name} correlations", found, stored[f"{name}_correlations"], 1e-8
