"""Contexts and code lengths, the table of a prior, weights of states, and choices of a quantiser."""

import torch

from posterity.coding import FiniteStateCoder, FiniteStatePrior, HardmaxQuantizer

AGAINST = "loops in numpy written from the definitions, and scipy's root of the entmax threshold, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    symbols = torch.tensor(stored["symbols"])
    for case in ("left_top", "all", "far"):
        offsets = stored[f"{case}_offsets"].tolist()
        coder = FiniteStateCoder(stored[f"{case}_freqs"], offsets, precision=10)
        yield f"{case}: contexts", coder.contexts(symbols), stored[f"{case}_contexts"], 0.0
        yield f"{case}: code length", coder.code_length(symbols), stored[f"{case}_bits"], 1e-9
        back = coder.decompress(coder.compress(symbols))
        yield f"{case}: what comes back", back, stored["symbols"], 0.0
    codebook = torch.tensor(stored["codebook"])
    channels, k, dim = codebook.shape
    prior = FiniteStatePrior(k, dim, channels, [(0, 0, -1), (-1, 0, 0)], reduce_states=True).double()
    prior.load_state_dict({name: torch.tensor(stored[f"prior {name}"]) for name in prior.state_dict()})
    yield "weights of states", prior.code_weights(), stored["weights"], 1e-6
    yield "table of the prior", prior.table(codebook), stored["table"], 1e-6
    layer = HardmaxQuantizer(k, dim, channels).double().eval()
    layer.codebook.data = codebook
    made = layer(torch.tensor(stored["z"]))
    yield "indices", made.indices, stored["indices"], 0.0
    yield "commitment", made.commitment, stored["commitment"], 1e-9
