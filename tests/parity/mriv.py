"""Pseudo-outcome and its gradient, two-stage least squares, and the network with its loss on stored rows."""

import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

from posterity.tabular import MRIV, NuisanceNet, mr_pseudo_outcome

AGAINST = (
    "loops in numpy over rows (pseudo-outcome, network and loss a layer at a time), "
    "and the normal equations of two-stage least squares, in float64"
)
NUISANCES = ("propensity", "mu_y0", "mu_a0", "delta_a", "tau")


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    y, a, z = (stored[name] for name in "yaz")
    yield (
        "pseudo-outcome",
        mr_pseudo_outcome(y, a, z, **{name: stored[name] for name in NUISANCES}),
        stored["pseudo"],
        1e-12,
    )

    leaves = {name: torch.tensor(stored[name], requires_grad=True) for name in NUISANCES}
    total = mr_pseudo_outcome(*(torch.tensor(each) for each in (y, a, z)), **leaves).sum()
    for name, gradient in zip(NUISANCES, torch.autograd.grad(total, list(leaves.values())), strict=True):
        yield f"gradient in {name}", gradient, stored[f"gradient_{name}"], 1e-6

    models = {"treatment_model": LogisticRegression(), "instrument_model": LogisticRegression()}
    model = MRIV(outcome=LinearRegression(), final=LinearRegression(), n_folds=1, **models)
    yield (
        "two-stage least squares",
        model.fit(stored["x"], y, a, z).plug_in(stored["x"])[0],
        stored["two_stage"],
        1e-10,
    )

    net = NuisanceNet(3).double()
    net.load_state_dict({name: torch.tensor(stored[f"net.{name}"]) for name in net.state_dict()})
    x, y, a, z = (torch.tensor(stored[name]) for name in "xyaz")
    for name, value in net(x)._asdict().items():
        yield f"network, {name}", value, stored[f"said_{name}"], 1e-12
    yield "network, loss", net.loss(x, y, a, z), stored["loss"], 1e-12
