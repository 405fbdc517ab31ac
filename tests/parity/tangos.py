"""Attributions, both terms, the penalty and its gradients for two networks, and a linear map in closed form."""

import torch
from torch import nn

from posterity.tabular import TangosPenalty, latent_attributions, tangos_terms

AGAINST = (
    "the authors' code (github.com/alanjeffares/TANGOS) in float64, and for a linear map of closed forms"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case, act in {"relu": nn.ReLU(), "tanh": nn.Tanh()}.items():
        t = {k.removeprefix(f"{case} "): torch.tensor(v) for k, v in stored.items() if k.startswith(case)}
        weights = {k: t[k] for k in ("0.weight", "0.bias", "2.weight", "2.bias")}
        layers = (nn.Linear(*weights[f"{k}.weight"].shape[::-1]).double() for k in (0, 2))
        net = nn.Sequential(next(layers), act, next(layers), act)
        net.load_state_dict(weights)
        x, spec, orth = t["x"], t["specialization"], t["orthogonalization"]
        yield f"{case} attributions", latent_attributions(net, x), t["attributions"], 1e-10
        ours = tangos_terms(net, x)  # over all pairs of units
        yield f"{case} specialization", ours[0], spec, 1e-11
        yield f"{case} orthogonalization", ours[1], orth, 1e-7
        penalty = TangosPenalty(lambda_spec=10.0, lambda_orth=0.5, n_pairs=None)(net, x)
        yield f"{case} penalty", penalty, 10 * spec + 0.5 * orth, 1e-7
        gradients = torch.autograd.grad(penalty, [net[0].weight, net[2].weight])
        for layer, gradient in zip((0, 2), gradients, strict=True):
            yield f"{case} gradient of layer {layer}", gradient, t[f"gradient {layer}"], 1e-6
    linear = nn.Linear(4, 3).double()  # units that read other inputs, and a dead one
    rows = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    linear.load_state_dict({"weight": rows, "bias": torch.zeros(3)})
    x = torch.tensor(stored["tanh x"])[:, :4]
    yield "attributions of a linear map", latent_attributions(linear, x), rows.expand(3, 3, 4), 1e-12
    specialization, overlap = tangos_terms(linear, x)
    yield "specialization of a linear map", specialization, 10 / 12, 1e-12
    yield "orthogonalization of a linear map", overlap, 0.0, 1e-12
