"""Both decompositions of stored predictions, the line through all samples, and the expected squared bias."""

import torch

from posterity.dynamics import alignment, bias_variance, calibration_link

AGAINST = "the formulas in numpy, KL divergences and least squares by scipy, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    found = bias_variance(stored["probs"], stored["y"])
    yield "squared bias", found.bias2, stored["bias2"], 1e-12
    yield "variance", found.variance, stored["variance"], 1e-12
    line = alignment(found, subset="all")
    yield "slope, intercept, r2", torch.tensor([line.slope, line.intercept, line.r2]), stored["line"], 1e-6
    yield "expected squared bias", calibration_link(found).expected_bias2, stored["expected"], 1e-12
    found = bias_variance(stored["probs"], stored["y"], loss="kl")
    yield "bias of cross-entropy", found.bias2, stored["kl_bias"], 1e-12
    yield "variance of cross-entropy", found.variance, stored["kl_variance"], 1e-12
