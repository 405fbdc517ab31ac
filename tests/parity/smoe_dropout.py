"""Outputs and gradients of a layer for four k, its load balance, and both schedules at 500 steps."""

import torch

from posterity.compression import ExpertSchedule, SMoEDropout

AGAINST = "a loop over tokens and experts in numpy, float64, its gradients by central differences; schedules by numpy"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    n_experts, d_model, d_expert = stored["w1"].shape
    layer = SMoEDropout(
        d_model, d_expert, n_experts, 1, d_out=stored["w2"].shape[2], learn_router=True
    ).double()
    state = {name: torch.tensor(stored[name]) for name in ("w1", "b1", "w2", "b2")}
    state |= {
        "router.weight": torch.tensor(stored["router"]),
        "router.bias": torch.tensor(stored["router_bias"]),
    }
    layer.load_state_dict(state)
    x = torch.tensor(stored["x"], requires_grad=True)
    for k in (1, 2, 4, 6):
        layer.k = k
        out = layer(x)
        yield f"output, k = {k}", out, stored[f"out{k}"], 1e-12
        values = {"x": x, **{name: getattr(layer, name) for name in ("w1", "b1", "w2", "b2")}}
        slopes = torch.autograd.grad((out * torch.tensor(stored["probe"])).sum(), list(values.values()))
        for name, slope in zip(values, slopes, strict=True):
            yield f"gradient to {name}, k = {k}", slope, stored[f"grad_{name}{k}"], 1e-7
        if k == 2:
            yield "load balance, k = 2", layer.balance_loss(), stored["balance2"], 1e-12
    for mode in ("linear", "cosine"):
        schedule = ExpertSchedule(400, 8, 16, mode=mode)
        yield (
            f"{mode} schedule",
            torch.tensor([schedule(int(step)) for step in stored["steps"]]).double(),
            stored[mode],
            0.0,
        )
