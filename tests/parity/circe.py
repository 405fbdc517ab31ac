"""Residuals, the grid of leave-one-out errors, the penalty in its four forms, HSIC and HSCIC."""

import torch

from posterity.representation import CIRCE, hscic, hsic, leave_one_out_errors

AGAINST = "scikit-learn's KernelRidge and rbf_kernel with refits and sums over samples in numpy, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    held_y, held_z, y, z, x = (torch.tensor(stored[name]) for name in ("held_y", "held_z", "y", "z", "x"))
    widths, ridges = stored["widths"].tolist(), stored["ridges"].tolist()
    options = {"sigma2_x": 0.8, "sigma2_z": 0.5, "sigma2_y": widths, "ridge": ridges}
    for biased in (True, False):
        for centered in (True, False):
            circe = CIRCE(**options, biased=biased, centered=centered).fit(held_y, held_z)
            case = f"{'biased' if biased else 'unbiased'}, {'centred' if centered else 'not centred'}"
            yield case, circe(x, y, z), stored[f"value_{int(biased)}{int(centered)}"], 1e-9
    yield (
        "chosen width and ridge",
        torch.tensor([circe.sigma2_y_, circe.ridge_]).double(),
        stored["chosen"],
        1e-7,
    )
    yield "leave-one-out errors", circe.loo_errors_, stored["loo"], 1e-9
    yield "residual kernel", circe.residual_kernel(y, z), stored["residual"], 1e-8
    kx, ky = torch.tensor(stored["kx"]), torch.tensor(stored["ky"])
    yield "leave-one-out, of matrices", leave_one_out_errors(kx, ky, ridges), stored["loo_matrices"], 1e-9
    for biased in (True, False):
        yield (
            f"HSIC, {'biased' if biased else 'unbiased'}",
            hsic(kx, ky, biased=biased),
            stored[f"hsic_{int(biased)}"],
            1e-12,
        )
    found = hscic(x, z, y, ridge=0.2, sigma2_x=0.8, sigma2_z=0.5, sigma2_y=0.3)
    yield "HSCIC", found, stored["hscic"], 1e-10
