"""Descent of three networks, their kernels and regressions at the end, and the parts of their error."""

import torch

from posterity.dynamics import NTKMLP, empirical_ntk, initialization_variance, ntk_regression, train_ensemble

AGAINST = "a NumPy version with gradients by hand, one sample at a time, in float64; the authors' code needs JAX and neural-tangents"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, x_test, y, y_test = (torch.tensor(stored[name]) for name in ("x", "x_test", "y", "y_test"))
    names = ["layers.0.weight", "layers.2.weight", "layers.4.weight"]

    def make(seed):
        net = NTKMLP(4, 12, alpha=float(stored["alpha"])).double()
        net.load_state_dict({name: torch.tensor(stored[f"start{seed}_{k}"]) for k, name in enumerate(names)})
        return net

    steps = int(stored["steps"])
    found = train_ensemble(make, x, y, x_test, n_models=3, lr=float(stored["lr"]), n_steps=steps, tol=0.0)
    yield "predictions after descent", found.predictions, stored["predictions"], 1e-8
    for member in range(3):
        weights = {name: p[member] for name, p in found.params.items()}
        for k, name in enumerate(names):
            yield (
                f"network {member}, matrix {k} after descent",
                weights[name],
                stored[f"last{member}_{k}"],
                1e-8,
            )
        net = make(member)
        kernel = empirical_ntk(net, x, params=weights)
        yield f"network {member}, final kernel", kernel, stored[f"kernel{member}"], 1e-8
        values = ntk_regression(net, x, y, x_test, params=weights, ridge=1e-3)[:, 0]
        yield f"network {member}, regression with it", values, stored[f"regression{member}"][:, 0], 1e-8
    parts = initialization_variance(found.predictions, y_test)
    for name, value in (
        ("error", parts.error),
        ("variance", parts.variance),
        ("average", parts.ensemble_error),
    ):
        yield f"{name} over networks", value, stored[name], 1e-8
