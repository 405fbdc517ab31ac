"""Bins, what is alone in them, fits of words, singular values, and what a corrupted layer is given."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.privacy import (
    AuditTransformer,
    corrupt_transformer,
    extract_embeddings,
    imprint_bins,
    inspect_parameters,
)
from posterity.privacy.leakage_reconstruction import _centred, _word_fit

AGAINST = "the sums, regressions, softmax and layer norm of the method written out in numpy, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    array = {name: torch.from_numpy(stored[name]) for name in stored}
    edges = imprint_bins(float(stored["mean"]), float(stored["std"]), len(stored["edges"]))
    yield "bins", edges, stored["edges"], 1e-10
    found = extract_embeddings(array["weight_grad"], array["bias_grad"])
    yield "embeddings, alone and together in a bin", found, stored["found"], 1e-9
    seen, places = (F.normalize(_centred(array[name]), dim=1) for name in ("seen", "places"))
    yield "fit of words", _word_fit(seen, places, _centred(array["words"])), stored["fit"], 1e-10
    linear = nn.Linear(12, 50).double()
    linear.weight.data = array["weight"]
    score = inspect_parameters(linear).scores["weight"]
    yield "ratio of singular values", score["singular ratio"], stored["ratio"], 1e-8
    yield "share of equal rows", score["equal rows"], 20 / 50, 1e-12

    model = AuditTransformer(30, 7, d_model=24, n_heads=2, d_ff=8, n_layers=1).double()
    model.embedding.weight.data, model.positions.weight.data = array["embedding"], array["positions"]
    state, _ = corrupt_transformer(model, generator=torch.Generator().manual_seed(0))
    inputs = []
    state.get_submodule("encoder.layers.0.linear1").register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    state(array["tokens"])
    yield "what the feed-forward layer is given", inputs[0], stored["inputs"], 1e-9
