"""Views, logits, embedding and loss of both mixtures by their published parameter names; a filter's spectrum."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from posterity.graphs import PolyGCL, PolynomialFilter

AGAINST = "the authors' code (github.com/ChenJY-Count/PolyGCL), and for one filter of eigenvectors"
CONVEX = {
    "act": "prelu", "batch_norm": True, "init_low": 4.0, "init_high": 0.3, "value_range": 6.0,
    "learn_ends": True, "nonnegative": True,
}  # fmt: skip


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, edge_index, perm = (torch.tensor(stored[name]) for name in ("x", "edge_index", "perm"))
    for mix, options in {"free": {}, "convex": CONVEX}.items():
        net = PolyGCL(5, 7, K=6, mix=mix, **options).eval()
        prefix = f"{mix}/weights/"
        net.load_state_dict(
            {k.removeprefix(prefix): torch.tensor(v) for k, v in stored.items() if k.startswith(prefix)}
        )
        logits = net(x, x[perm], edge_index)
        real = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat_interleave(len(x))
        ours = {
            "high": net.encoder.prop1(x, edge_index, highpass=True),
            "low": net.encoder.prop1(x, edge_index, highpass=False),
            "logits": logits,
            "embedding": net.embed(x, edge_index),
            "loss": binary_cross_entropy_with_logits(logits, real),
        }
        for name, value in ours.items():
            yield f"{mix} {name}", value, stored[f"{mix}/{name}"], 1e-5 if name == "loss" else 1e-4
    ring, signal = torch.tensor(stored["ring"]), torch.tensor(stored["signal"])
    both = PolynomialFilter(10).double().both(signal, ring)
    for name, value in zip(("high", "low"), both, strict=True):
        yield f"spectral form, {name}", value, stored[f"spectral_{name}"], 1e-4
