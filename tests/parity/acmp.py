"""Velocity and trajectories, and by brute force the paper's equation, its linear flow and certificates."""

import torch

from posterity.graphs import ACMPConv, consensus_growth_rate, trapping_radius

AGAINST = "the authors' code (github.com/ykiiiiii/ACMP), of brute force and of the matrix exponential"
SETTINGS = (
    {"attention": "gcn", "method": "euler", "step_size": 0.1},
    {"attention": "gcn", "method": "rk4", "step_size": 0.05},  # torchdiffeq's is another fourth-order rule
    {"attention": "transformer", "method": "euler", "step_size": 0.1, "heads": 2, "attention_dim": 16},
)


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, edge_index = torch.tensor(stored["x"]), torch.tensor(stored["edge_index"])
    for k, settings in enumerate(SETTINGS):
        conv = make(time=2.0, beta=0.4, interaction="operator", source=True, **settings)
        put(conv, {name: stored[name][k] for name in ("alpha_raw", "delta_raw", "source_weight")})
        if settings["attention"] == "transformer":
            for part in ("query", "key"):
                put(conv, {f"{part}.{of}": stored[f"{part}_{of}"] for of in ("weight", "bias")})
        name = "{attention}, {method}".format(**settings)
        yield f"{name}: velocity", conv.velocity(x, edge_index), stored["velocity"][k], 1e-6
        allowed = 1e-5 if settings["method"] == "rk4" else 1e-6
        yield f"{name}: state", conv(x, edge_index), stored["state"][k], allowed
    own = {name: stored[f"own_{name}"] for name in ("alpha_raw", "delta_raw")}
    conv = put(make(beta=0.3), own)
    yield "equation", conv.velocity(x, edge_index), stored["own_velocity"], 1e-9
    yield "trapping radius", trapping_radius(conv, x, edge_index), stored["radius"], 1e-6
    linear = put(make(time=3.0, method="rk4", step_size=0.01, reaction=False), own)
    yield "linear diffusion", linear(x, edge_index), stored["diffused"], 1e-6
    for beta, rate in zip(stored["beta"], stored["growth_rate"], strict=True):
        conv = make(beta=float(beta), alpha_init=0.5, delta_init=0.05)
        yield f"growth at beta {beta:g}", consensus_growth_rate(conv, x[:7], edge_index), rate, 1e-5


def make(**settings):
    return ACMPConv(8, **settings).double().eval()


def put(conv, weights):
    for name, value in weights.items():
        conv.get_parameter(name).copy_(torch.as_tensor(value))
    return conv
