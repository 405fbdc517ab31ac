"""The network with its activity, features of matching and registration, lowest states, the loss and its gradient."""

import torch

from posterity.combinatorial import (
    QuAntLoss,
    QUBONet,
    from_bits,
    ground_states,
    matching_features,
    registration_features,
    to_bits,
)

AGAINST = "the authors' code (github.com/MSeelbach/QuAnt), in float64; the loss of one instance at a time"
LAYERS = {"fc2": "first", "fc4": "inner", "fc5": "again", "fc6": "last", "fc12": "head"}


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("deep", "shallow"):
        x, mask = torch.tensor(stored[f"{case}_x"]), torch.tensor(stored[f"{case}_mask"]).bool()
        weights = {
            f"{ours}.{part}": torch.tensor(stored[f"{case}_{theirs}.{part}"])
            for theirs, ours in LAYERS.items()
            for part in ("weight", "bias")
            if f"{case}_{theirs}.{part}" in stored
        }
        net = QUBONet(256, 8, width=10, deep=case == "deep", couplings=mask).double()
        net.load_state_dict(weights)
        couplings, activity = net(x, return_activity=True)
        yield f"{case} couplings", couplings, stored[f"{case}_couplings"], 1e-12
        yield f"{case} activity", activity, float(stored[f"{case}_activity"]), 1e-12
    for k in (4, 5):
        d1, d2 = (torch.tensor(stored[f"match{k}_{name}"])[None] for name in ("d1", "d2"))
        yield f"features of {k} nodes", matching_features(d1, d2)[0], stored[f"match{k}_features"], 1e-15
        bits = to_bits(torch.tensor(stored[f"match{k}_p"]), (k - 1).bit_length()).flatten()
        yield f"bits of {k} nodes", bits, stored[f"match{k}_bits"], 0
    for case in ("reg0", "reg1"):
        template, reference = (torch.tensor(stored[f"{case}_{name}"]) for name in ("template", "reference"))
        got = registration_features(template, reference, ordered=True)
        yield f"{case} features", got, stored[f"{case}_features"], 1e-10
    for case in ("loss0", "loss1", "loss2", "loss3"):
        couplings = torch.tensor(stored[f"{case}_couplings"], requires_grad=True)
        found = ground_states(couplings, 2)
        yield f"{case} energies", found.energy, stored[f"{case}_energy"], 1e-12
        yield f"{case} states", from_bits(found.x), stored[f"{case}_which"], 0
        value = QuAntLoss()(couplings, torch.tensor(stored[f"{case}_bits"]))
        yield f"{case} value", value, float(stored[f"{case}_value"]), 1e-12
        (gradient,) = torch.autograd.grad(value, couplings)
        yield f"{case} gradient", gradient, stored[f"{case}_gradient"], 1e-12
