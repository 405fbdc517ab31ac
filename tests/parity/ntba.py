"""Regression with poisons, the greedy choice, leave-one-out residuals and both kernels, on stored points."""

import torch
from torch import nn

from posterity.robustness import (
    added_poison_predictions,
    backdoor_loss,
    empirical_ntk,
    greedy_poisons,
    loo_residuals,
    relu_ntk,
)

AGAINST = "numpy: a new solve for each, Gaussian integrals for the infinite network, finite differences for the other"
LETTERS = "dpta"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x = {letter: torch.tensor(stored[f"x_{letter}"]) for letter in LETTERS}
    y = {letter: torch.tensor(stored[f"y_{letter}"]) for letter in "dpt"}
    for depth in (1, 2, 3):
        yield (
            f"ReLU kernel, depth {depth}",
            relu_ntk(x["d"], x["p"], depth=depth),
            stored[f"relu_{depth}"],
            1e-7,
        )

    k = {a + b: relu_ntk(x[a], x[b]) for a, b in ("dd", "pd", "pp", "dt", "pt", "da", "pa")}
    ridge = float(stored["ridge"])
    order = ("dd", "pd", "pp", "dt", "pt", "da", "pa")
    loss, f_t, f_a = backdoor_loss(*(k[name] for name in order), y["d"], y["p"], y["t"], ridge=ridge)
    yield "objective", loss, stored["loss"], 1e-7
    yield "clean predictions", f_t, stored["f_t"], 1e-7
    yield "triggered predictions", f_a, stored["f_a"], 1e-7
    single = (k["dd"], k["da"], y["d"], k["pd"], k["pa"])
    alone, each = added_poison_predictions(*single, k["pp"].diagonal(), y["p"], ridge=ridge)
    yield "predictions without poisons", alone, stored["alone"], 1e-7
    yield "predictions with each poison", each, stored["each"], 1e-7
    chosen = greedy_poisons(*single, k["pp"], y["p"], 5, ridge=ridge)
    yield "greedy choice", chosen.double(), stored["chosen"].astype(float), 0.0
    yield "leave-one-out residuals", loo_residuals(k["dd"], y["d"], ridge=ridge), stored["residuals"], 1e-7

    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    for name, value in net.named_parameters():
        value.data = torch.tensor(stored[f"net_{name}"])
    p = x["p"].requires_grad_()
    kernel = empirical_ntk(net, p, x["d"])
    yield "kernel of a network", kernel, stored["tangent"], 1e-7
    (slope,) = torch.autograd.grad((torch.tensor(stored["weights"]) * kernel).sum(), p)
    yield "its gradient", slope, stored["slope"], 1e-5
