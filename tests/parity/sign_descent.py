"""Twelve steps of five parameters in two tensors along stored gradients, and tails of stored draws."""

from functools import partial

import torch

from posterity.optimization import NormalizedGD, SignDescent, tail_index

AGAINST = "loops in numpy over entries, written from the paper's algorithms, in float64"
MAKE = {
    "sign": partial(SignDescent, lr=0.05), "sign, momentum": partial(SignDescent, lr=0.05, momentum=0.9),
    "Signum": partial(SignDescent, lr=0.05, momentum=0.9, order="momentum-then-sign"),
    "rescaled sign": partial(SignDescent, lr=0.05, momentum=0.5, rescale=True),
    "normalised": partial(NormalizedGD, lr=0.05, momentum=0.9),
    "normalised, each tensor, 1-norm": partial(NormalizedGD, lr=0.05, momentum=0.9, norm=1, scope="tensor"),
}  # fmt: skip


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for name, make in MAKE.items():
        x = torch.tensor(stored["start"])
        params = [part.clone().requires_grad_() for part in (x[:2], x[2:])]
        optimizer = make(params)
        for g in torch.tensor(stored["gradients"]):
            params[0].grad, params[1].grad = g[:2].clone(), g[2:].clone()
            optimizer.step()
        yield name, torch.cat(params).detach(), stored[name], 1e-12
    yield "tail index", tail_index(torch.tensor(stored["draws"])), stored["tail"], 1e-12
