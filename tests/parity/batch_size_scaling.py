"""Products, ends, moments and variances of a network whose dense Hessians numpy has from its gradient in closed form."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.optimization import (
    extreme_eigenvalues,
    ggn_matvec,
    hessian_matvec,
    hessian_variance,
    lanczos,
    spectral_density,
)

AGAINST = "dense Hessians in numpy, by complex steps of a gradient in closed form"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, y, theta = (torch.tensor(stored[name]) for name in ("x", "y", "theta"))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.utils.vector_to_parameters(theta, net.parameters())
    dim, eye = len(theta), torch.eye(len(theta), dtype=torch.float64)
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}

    product = hessian_matvec(net, loss, (x, y))
    yield "Hessian", torch.stack([product(v) for v in eye]), stored["hessian"], 1e-12
    gauss_newton = ggn_matvec(net, F.cross_entropy, (x, y))
    yield (
        "generalised Gauss-Newton matrix",
        torch.stack([gauss_newton(v) for v in eye]),
        stored["gauss_newton"],
        1e-12,
    )
    nodes = spectral_density(product, dim, n_iter=dim, **options).nodes[
        0
    ]  # zero is there five times, seen once
    yield "eigenvalues but zero", nodes[nodes.abs() > 1e-9], stored["values"], 1e-9
    low, high, _, _ = extreme_eigenvalues(product, dim, **options)
    yield "ends", torch.stack([low, high]), stored["ends"], 1e-10
    alpha, beta, _ = lanczos(product, torch.tensor(stored["v"]), 5)
    values, vectors = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
    moments = torch.stack([(vectors[0].square() * values**k).sum() for k in range(10)])
    yield "ten moments of five steps", moments, stored["moments"], 1e-10

    found = hessian_variance(net, loss, (x, y), n_probes=2000, generator=torch.Generator().manual_seed(0))
    yield "variance along the top", found.top, stored["top"], 1e-7
    yield "variance along the bottom", found.bottom, stored["bottom"], 1e-7
    yield "isotropic variance over its value", found.isotropic / stored["isotropic"].item(), 1.0, 0.05
    rows = torch.tensor(stored["rows"])
    low, high, _, _ = extreme_eigenvalues(hessian_matvec(net, loss, (x[rows], y[rows])), dim, **options)
    yield "ends of a batch", torch.stack([low, high]), stored["batch"], 1e-10


def loss(net, x, y):
    return F.cross_entropy(net(x), y)
