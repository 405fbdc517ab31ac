"""Networks of two fields in training and at rest, the ascent with and without fresh noise, and the pyramid."""

from unittest import mock

import torch

from posterity.generative import LocalCNN, ascend, haar

AGAINST = (
    "the authors' network and sampler (github.com/LabForComputationalVision/local-probability-models-of-images), "
    "and Haar's matrix for the pyramid, in float64"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for name, field in (("low43", 43), ("detail13", 13)):
        v = torch.tensor(stored[f"{name}_v"]).double()
        out = stored[f"{name}_train"].shape[1]
        net = LocalCNN(v.shape[1], out, receptive_field=field, width=4).double()
        for k, conv in enumerate(net.convs):
            conv.weight.data = torch.tensor(stored[f"{name}_w{k}"]).double()
        for norm, gain in zip(net.norms, stored[f"{name}_gains"], strict=True):
            norm.gain.data = torch.tensor(gain).double()
        with torch.no_grad():
            yield f"{name}, in training", net(v), stored[f"{name}_train"], 1e-10
            deviations = torch.stack([norm.running_std for norm in net.norms])
            yield f"{name}, deviations", deviations, stored[f"{name}_sd"], 1e-10
            yield f"{name}, at rest", net.eval()(v), stored[f"{name}_eval"], 1e-10
    image, low = (torch.tensor(stored[name]) for name in ("image", "low"))

    def residual(v):
        return torch.tanh(v[:, 1:] - image * v[:, :1])

    for name, beta, fixed, end in (
        ("mode", 1.0, False, 0.05),
        ("drawn", 0.4, False, 0.2),
        ("fixed", 0.4, True, 0.2),
    ):
        drawn = iter(torch.tensor(stored[f"{name}_fresh"])[:, None])
        with mock.patch("posterity.generative.score_ascent.normal", lambda *_, drawn=drawn: next(drawn)):
            found = ascend(
                residual, torch.tensor(stored[f"{name}_y0"])[None], cond=low[None], h0=0.1, beta=beta,
                sigma_end=end, fixed_step=fixed,
            )  # fmt: skip
        yield f"ascent, {name}", found.sample[0], stored[f"{name}_sample"], 1e-10
        yield f"ascent, {name}, noise", found.sigmas[0], stored[f"{name}_sigmas"], 1e-10
    x = torch.tensor(stored["x"])
    for name, ours in zip(("low", "detail"), haar(x), strict=True):
        yield f"pyramid, {name}", ours, stored[f"haar_{name}"], 1e-13
