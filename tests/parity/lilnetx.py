"""The density, its prices, decoded weights and the slice norm, on stored parameters and integers."""

import torch
from torch import nn

from posterity.compression import FactorizedPrior, LatentNet, slice_norm

AGAINST = "the formulas evaluated with numpy in long double"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("start", "trained"):
        prior = FactorizedPrior(9).double()
        with torch.no_grad():
            for name, own in prior.named_parameters():
                own.copy_(torch.from_numpy(stored[f"{case}_{name.replace('.', '')}"]))
            q = torch.from_numpy(stored["q"])[:, None].expand(-1, 9)
            yield f"{case} F", prior.cdf(q), stored[f"{case}_cdf"], 1e-12
            yield f"{case} bits", prior.bits(q), stored[f"{case}_bits"], 1e-9
            yield f"{case} bits, float32", prior.float().bits(q.float()), stored[f"{case}_bits"], 2e-3
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, groups=2), nn.Flatten(), nn.Linear(6, 5)
    ).double()
    lat = LatentNet(net)
    with torch.no_grad():
        for name in ("0", "1", "3"):
            lat.latents()[name].copy_(torch.from_numpy(stored[f"latents_{name}"]))
        lat.decoder("0").copy_(torch.from_numpy(stored["decoder_3x3"]))
        lat.decoder("3").copy_(torch.from_numpy(stored["decoder_linear"]))
    plain = lat.to_plain()
    back = LatentNet.decompress(net, lat.compress())
    for name in ("0", "1", "3"):
        yield f"weights of {name}", plain.get_submodule(name).weight, stored[f"weight_{name}"], 1e-12
        yield (
            f"weights of {name} from the file",
            back.get_submodule(name).weight,
            stored[f"weight_{name}"],
            1e-12,
        )
    yield "slice norm", slice_norm(lat.latents()["0"]), stored["norm_2"], 1e-12
    yield "slice norm, largest", slice_norm(lat.latents()["0"], float("inf")), stored["norm_inf"], 1e-12
