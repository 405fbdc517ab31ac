"""The layer on a batch, with given variances over clients, and the server's step for four clients."""

import torch

from posterity.federated import FFALayer, feature_statistics, fedfa_aggregate

AGAINST = "loops over samples, channels and clients in numpy, written from the paper's equations, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    layer = FFALayer(3, p=1.0).double()
    layer.client_var_mean.copy_(torch.tensor(stored["vm"]))
    layer.client_var_std.copy_(torch.tensor(stored["vs"]))
    x = torch.tensor(stored["x"])
    std_mu, std_sigma = layer.augmentation_std(*feature_statistics(x))
    yield "deviation of the mean", std_mu, stored["sm"], 1e-9
    yield "deviation of the deviation", std_sigma, stored["ss"], 1e-9
    yield "layer", layer(x, torch.Generator().manual_seed(7)), stored["out"], 1e-9
    yield "running mean", layer.running_mean, stored["rm"], 1e-9
    yield "running deviation", layer.running_std, stored["rs"], 1e-9
    sent = []
    for mean, std in zip(stored["sent_m"], stored["sent_s"], strict=True):
        state = FFALayer(3).double().state_dict()
        sent.append({**state, "running_mean": torch.tensor(mean), "running_std": torch.tensor(std)})
    back = fedfa_aggregate(sent, stored["weights"].tolist())
    for name, key in (("running_mean", "mean_m"), ("running_std", "mean_s"), ("client_var_mean", "var_m"),
                      ("client_var_std", "var_s")):  # fmt: skip
        yield f"server, {name}", back[name], stored[key], 1e-9
