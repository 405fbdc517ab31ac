"""Exact and empirical epsilon, clients' updates, and a canary of softmax regression, step by step."""

import torch

from posterity.privacy import canary_score, client_updates, craft_canary, empirical_epsilon, gaussian_epsilon

AGAINST = "the definitions in 40 digits and by loops; softmax regression and Adam by their formulas in numpy, derivatives by complex steps"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for noise, delta, theirs in stored["gauss"].tolist():
        yield (
            f"exact epsilon, noise {noise}, delta {delta}",
            gaussian_epsilon(noise, delta),
            theirs,
            1e-11 * theirs,
        )
    for k in range(6):
        scores = stored[f"with_{k}"], stored[f"without_{k}"]
        value, threshold, lower = stored[f"found_{k}"].tolist()
        best = empirical_epsilon(*scores)
        yield f"estimate {k}", (best.value, best.threshold), (value, threshold), 1e-12
        yield f"lower limit {k}", empirical_epsilon(*scores, threshold=0.5).lower, lower, 1e-10
    net = torch.nn.Linear(5, 3).double()
    net.weight.data, net.bias.data = torch.from_numpy(stored["W"]), torch.from_numpy(stored["bias"])
    clients = list(zip(torch.from_numpy(stored["X"]), torch.from_numpy(stored["Y"]), strict=True))
    for steps in (1, 3):
        ours = client_updates(net, clients, lr=0.8, local_steps=steps, clip=0.5)
        yield f"updates, {steps} local steps", ours, stored[f"updates_{steps}"], 1e-12
    canary = craft_canary(
        net, torch.from_numpy(stored["updates_1"]), torch.from_numpy(stored["x0"])[None], torch.tensor([int(stored["y0"])]),
        clip=0.5, norm_floor=1.5, n_steps=25, lr=0.05,
    )  # fmt: skip
    yield "losses of 25 steps", canary.losses, stored["losses"], 1e-9
    yield "the canary", canary.x[0], stored["x"], 1e-8
    yield "its gradient", canary.grad, stored["grad"], 1e-8
    yield (
        "a score",
        canary_score(canary.grad, torch.from_numpy(stored["aggregate"]), clip=0.5),
        stored["score"],
        1e-8,
    )
