"""Twelve steps on a quadratic, gradients of groups, sharpness at a distance and in the limit, and a flow's end."""

from functools import partial

import torch

from posterity.optimization import SAM, alignment, limit_flow, limiting_sharpness, sam_gradient, sharpness

AGAINST = "numpy loops over samples, its eigenvalues, the secular equation of the worst rise, and scipy's solve_ivp for the flow"
MAKE = {
    "sam": partial(SAM, rho=0.3), "sam momentum": partial(SAM, rho=0.3, momentum=0.9),
    "asam": partial(SAM, rho=0.5, adaptive=True),
}  # fmt: skip


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    a, start, x, y = (torch.tensor(stored[name]) for name in ("a", "start", "X", "y"))

    def loss(x):
        return x @ a @ x / 2

    for name, make in MAKE.items():
        params = [part.clone().requires_grad_() for part in (start[:2], start[2:])]
        optimizer = make(params, lr=0.05)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss(torch.cat(params)).backward()

        for _ in range(12):
            optimizer.step(closure)
        yield name, torch.cat(params).detach(), stored[name], 1e-10
    for size in (1, 3, 7):
        got = sam_gradient(
            lambda p, x, y: (torch.tanh(x @ p) - y) ** 2, start, x, y, rho=0.3, group_size=size
        )
        yield f"gradient, groups of {size}", got, stored[f"gradient {size}"], 1e-9
    for kind in ("worst", "ascent", "average"):
        for method in ("exact", "lanczos"):
            got = limiting_sharpness(
                loss,
                torch.zeros_like(start),
                kind,
                method=method,
                n_probes=5,
                generator=torch.Generator().manual_seed(0),
            )
            yield f"{kind}, {method}", got, stored[kind], 1e-9
    rise = sharpness(loss, start, "worst", rho=0.7, generator=torch.Generator().manual_seed(0))
    yield "rise in the worst direction", rise, stored["rise"], 1e-7
    yield (
        "rise along the gradient",
        sharpness(loss, start, "ascent", rho=0.7),
        stored["rise along the gradient"],
        1e-10,
    )
    yield "alignment", alignment(loss, start), stored["alignment"], 1e-9
    flow = limit_flow(
        lambda x: (x[0] * x[1] - 1) ** 2,
        torch.tensor([2.0, 0.5]).double(),
        "average",
        time=0.3,
        n_steps=40,
    )
    yield "end of a flow", flow.params, stored["flow"], 5e-3
