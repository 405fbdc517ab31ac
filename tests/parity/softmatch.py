"""Four steps of three settings: loss, weights, gradient of the strong view, and the statistics at the end."""

import torch

from posterity.labels import SoftMatchLoss

AGAINST = "loops over examples and classes in numpy, written from the paper's equations, in float64"

SETTINGS = {
    "plain": {"momentum": 0.9},
    "by_class": {"momentum": 0.6, "n_sigma": 1.5, "per_class": True, "align": "model", "lambda_u": 0.7},
    "soft": {"momentum": 0.6, "align": None, "hard_label": False, "temperature": 0.4, "lambda_u": 2.0},
}


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case, options in SETTINGS.items():
        criterion = SoftMatchLoss(5, **options).double()
        parts = (torch.tensor(stored[f"{case}_{name}"]) for name in ("labeled", "y", "weak", "strong"))
        for step, (labeled, y, weak, strong) in enumerate(zip(*parts, strict=True)):
            strong.requires_grad_()
            loss = criterion(labeled, y, weak, strong)
            (gradient,) = torch.autograd.grad(loss, strong)
            yield f"{case}, step {step}, loss", loss, stored[f"{case}_loss"][step], 1e-7
            yield f"{case}, step {step}, weights", criterion.weights, stored[f"{case}_weights"][step], 1e-6
            yield f"{case}, step {step}, gradient", gradient, stored[f"{case}_grad"][step], 1e-7
        yield f"{case}, mean", criterion.weighting.mu, stored[f"{case}_mu"], 1e-7
        yield f"{case}, variance", criterion.weighting.var, stored[f"{case}_var"], 1e-7
        if criterion.alignment is not None:
            for name in ("p_model", "p_target"):
                yield f"{case}, {name}", getattr(criterion.alignment, name), stored[f"{case}_{name}"], 1e-7
