"""The layer for contexts given and shared, all its gradients, the contrast both ways, and the filter."""

import torch

from posterity.transfer import ContextAffine, context_contrast, filter_logits

AGAINST = "loops over samples, positions and pairs in numpy, gradients by central differences, float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    t = {name: torch.tensor(value) for name, value in stored.items()}
    layer = ContextAffine(*t["bias"].shape).double()
    layer.load_state_dict({"weight": t["weight"], "bias": t["bias"]})
    x = t["x"].requires_grad_()
    shares = t["shares"].requires_grad_()
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias, "shares": shares}
    for name, wanted in (("given", ("x", "weight", "bias")), ("shares", tuple(leaves))):
        out = layer(x, t[name])
        yield f"output, context {name}", out, stored[f"{name}_out"], 1e-12
        slopes = torch.autograd.grad((out * t["probe"]).sum(), [leaves[leaf] for leaf in wanted])
        for leaf, slope in zip(wanted, slopes, strict=True):
            yield f"gradient to {leaf}, context {name}", slope, stored[f"{name}_grad_{leaf}"], 1e-7
    for name in ("averages", "locations"):
        values = context_contrast(x, t["given"], per_location=name == "locations", reduction="none")
        yield f"contrast of {name}", values, stored[f"{name}_pairs"], 1e-12
        yield f"its gradient, {name}", torch.autograd.grad(values.mean(), x)[0], stored[f"{name}_grad"], 1e-7
    filtered = filter_logits(t["logits"], t["given"], t["of_class"], fill=-9.0)
    yield "filtered logits", filtered, stored["filtered"].clip(min=-9.0), 0.0
