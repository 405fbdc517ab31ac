"""Logits, local losses and gradients of a small mixer, and the tangents that an estimate is made of."""

import torch

from posterity.optimization import LocalMixer, grouped_cross_entropy

AGAINST = "the network written by loops in numpy, and central differences of its local losses, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case, kernel_size in (("linear", None), ("convolution", 3)):
        net = LocalMixer(
            6, 2, 3, n_patches=3, width=8, hidden=8, n_groups=2, n_blocks=2, kernel_size=kernel_size
        ).double()
        names = dict(net.named_parameters())
        net.load_state_dict({name: torch.tensor(stored[f"{case} {name}"]) for name in names})
        images, target = torch.tensor(stored["images"]), torch.tensor(stored["target"])
        yield f"{case}: logits", net(images), stored[f"{case} logits"], 1e-12
        local = torch.stack([each[:, 0, 0] for each in net.local_losses(images, target)])
        yield f"{case}: local losses", local, stored[f"{case} losses"], 1e-12
        net.estimate(images, target, method="local-backprop")
        for name, parameter in names.items():
            if name.startswith("blocks"):
                yield f"{case}: gradient of {name}", parameter.grad, stored[f"{case} gradient {name}"], 1e-7
    x, weight, bias, v = (torch.tensor(stored[f"copies {name}"]) for name in ("x", "weight", "bias", "v"))
    along = torch.func.jvp(
        lambda x: grouped_cross_entropy(x, weight, bias, torch.tensor(stored["target"])), (x,), (v,)
    )[1]
    yield "copies: along a direction", along, stored["copies along"], 1e-7
