"""Seminorm, margin and error of a network, two margin problems, a flow, and neural collapse."""

import torch
from torch import nn

from posterity.dynamics import (
    PowerDiagonal,
    lambda_seminorm,
    layer_rates,
    margin_flow,
    neural_collapse,
    normalized_margin,
    quasi_homogeneity_error,
    seminorm_max_margin,
)

AGAINST = (
    "numpy: a network by hand with bisection for its scaling, scipy's SLSQP for margin problems, its Radau with a "
    "gradient by hand for the flow, and scatter matrices"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""

    def of(name):
        return torch.tensor(stored[name])

    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).double()
    values = zip(net.parameters(), ("W1", "b1", "g", "s", "W2", "b2"), strict=True)
    with torch.no_grad():
        for p, name in values:
            p.copy_(of(name))
    rates = layer_rates(net)
    x, y = of("x"), of("y")
    yield "seminorm", lambda_seminorm(net, rates), stored["seminorm"], 1e-10
    yield "seminorm of the largest rate", lambda_seminorm(net, rates, top_only=True), stored["top"], 1e-10
    yield "normalised margin", normalized_margin(net, x, y, rates), stored["normalized"], 1e-10
    yield "error of the definition", quasi_homogeneity_error(net, x, rates), 0.0, 1e-12
    even = {name: 0.5 if rate else 0.0 for name, rate in rates.items()}
    yield "error of equal rates", quasi_homogeneity_error(net, x, even, alphas=(0.5,)), stored["error"], 1e-10
    for name in ("qp small", "qp"):
        penalized = of(f"{name} penalized")
        found = seminorm_max_margin(of(f"{name} x"), of(f"{name} y"), penalized)
        yield f"{name}: value", found.value, stored[f"{name} value"], 1e-6
        yield f"{name}: penalised coefficients", found.coef[penalized], stored[f"{name} coef"], 1e-5
    model = PowerDiagonal([1, 3])
    nn.init.constant_(model.theta, 0.5)
    flow = margin_flow(model, of("flow x"), of("flow y"), duration=5.0, n_eval=11, rtol=1e-8, atol=1e-11)
    yield "flow: log parameters", flow.params.log(), of("flow params").log(), 1e-5
    yield "flow: log of its log loss", (-flow.log_loss[5:]).log(), (-of("flow log loss")[5:]).log(), 1e-4
    yield "flow: log margin", flow.min_margin[5:].log(), of("flow margin")[5:].log(), 1e-4
    for name, value in neural_collapse(of("features"), of("classes"), of("weight")).items():
        yield name, value, stored[name], 1e-9
