"""Loss, flow, inverse, straightness, cost and density of the exact velocity between Gaussians; curved paths."""

import torch

from posterity.generative import RectifiedFlow, straightness, transport_cost

AGAINST = "closed forms (flow, straightness and density between Gaussians, formulas of the curved paths)"
SOLVER = {"method": "rk45", "rtol": 1e-8, "atol": 1e-8}


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x0, x1, t, mean = (torch.tensor(stored[name]) for name in ("x0", "x1", "t", "mean"))
    scale, flowed = float(stored["scale"]), stored["flowed"]

    def net(x, t):  # E[X1 - X0 | X_t = x] for X0 ~ N(0, I) and X1 ~ N(mean, scale^2 I)
        t = t[:, None]
        return mean + (t * scale**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * scale**2) * (x - t * mean)

    flow = RectifiedFlow(3)
    yield "loss", flow.loss(net, x1, x0, t=t), stored["loss"], 1e-9
    yield "losses", flow.loss(net, x1, x0, t=t, reduction="none"), stored["losses"], 1e-8
    yield "flow", flow.sample(net, x0=x0, **SOLVER), flowed, 1e-5
    yield "one Euler step", flow.sample(net, x0=x0, n_steps=1), mean.expand_as(x0), 1e-8
    back = flow.integrate(net, torch.tensor(flowed), t0=1.0, t1=0.0, **SOLVER).x
    yield "inverse", back, x0, 1e-5
    pair = flow.couple(net, x0=x0, batch_size=7, **SOLVER)
    yield "coupling, start", pair[0], x0, 1e-5
    yield "coupling, end", pair[1], flowed, 1e-5
    coarse, fine = (straightness(flow, net, x0, n_steps=n) for n in (400, 800))
    yield "straightness, extrapolated from 400 and 800 steps", 2 * fine - coarse, stored["straightness"], 1e-4
    yield "straightness of a line", straightness(flow, lambda x, t: torch.ones_like(x), x0), 0.0, 1e-12
    one_step = flow.distill_loss(lambda x, t: mean + (scale - 1) * x, torch.tensor(flowed), x0, n_steps=1)
    yield "distilled to one step", one_step, 0.0, 1e-12
    yield "mean squared cost", transport_cost(x0, x1), stored["cost"], 1e-9
    yield "mean cost", transport_cost(x0, x1, 1.0), stored["cost1"], 1e-10
    yield "log-density", flow.log_prob(net, x1, **SOLVER), stored["log_density"], 1e-4
    for path in ("vp", "sub-vp"):
        point, velocity = RectifiedFlow(3, path=path).interpolate(x0, x1, t)
        yield f"{path} point", point, stored[f"{path}_point"], 1e-6
        yield f"{path} velocity", velocity, stored[f"{path}_velocity"], 1e-5
