"""Effective ranks, six filters, and the loss with each at either branch, with its gradient, for tall and wide batches."""

import torch

from posterity.representation import RDMLoss, effective_rank, spectral_filter

AGAINST = (
    "NumPy's singular value decomposition, W held constant and the gradient of cosines by hand, in float64"
)
FILTERS = {
    "power1": ("power", 1.0), "power-1": ("power", -1.0), "power0.5": ("power", 0.5), "log": ("log", 1.0),
    "log1p": ("log1p", 1.0), "log1p-squared": ("log1p-squared", 1.0),
}  # fmt: skip


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("tall", "wide"):
        views = torch.tensor(stored[f"{case}_z"], requires_grad=True)
        for of in ("singular", "eigen"):
            yield f"{case} rank, {of}", effective_rank(views[0], of=of), stored[f"{case}_rank_{of}"], 1e-10
        for name, (filter, sigma) in FILTERS.items():
            ours = spectral_filter(views[0], filter, sigma=sigma)
            yield f"{case} {name} filtered", ours, stored[f"{case}_{name}_filtered"], 1e-11
            for location in ("online", "target"):
                value = RDMLoss(filter, sigma=sigma, location=location)(*views)
                yield f"{case} {name} {location}", value, stored[f"{case}_{name}_{location}"], 1e-11
                gradient = torch.autograd.grad(value, views)[0]
                yield (
                    f"{case} {name} {location} gradient",
                    gradient,
                    stored[f"{case}_{name}_{location}_grad"],
                    1e-11,
                )
