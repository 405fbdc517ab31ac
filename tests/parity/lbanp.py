"""Predictions and likelihood of two small models, norms first and last, on tasks of 5, 3 and 0 points.

And the number of parameters of the official configuration.
"""

import torch

from posterity.uncertainty import LBANP

AGAINST = (
    "the equations in plain NumPy loops, and of the parameter counts of the authors' code "
    "(github.com/BorealisAI/latent-bottlenecked-anp)"
)
SMALL = {"n_latents": 3, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 12, "embed_depth": 3}


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    batch = [torch.tensor(stored[name]) for name in ("x_context", "y_context", "x_target", "y_target")]
    masks = {
        f"{name}_mask": torch.arange(each.shape[1]) < torch.tensor(stored[f"n_{name}"])[:, None]
        for name, each in {"context": batch[0], "target": batch[2]}.items()
    }
    for case, options in {"pre": {}, "post": {"norm_first": False, "bound_scale": True}}.items():
        model = LBANP(2, 3, **SMALL, **options).double().eval()
        own, names = model.state_dict(), stored[f"{case}_names"]
        values = torch.tensor(stored[f"{case}_weights"]).split([own[name].numel() for name in names])
        model.load_state_dict({name: v.view_as(own[name]) for name, v in zip(names, values, strict=True)})
        found = model(*batch[:3], context_mask=masks["context_mask"])
        yield f"{case} mean", found.loc, stored[f"{case}_loc"], 1e-9
        yield f"{case} scale", found.scale, stored[f"{case}_scale"], 1e-9
        value = model.log_likelihood(*batch, **masks)
        yield f"{case} log-likelihood", value, stored[f"{case}_log_likelihood"], 1e-9
        yield f"{case} loss", model.loss(*batch, **masks), stored[f"{case}_loss"], 1e-9
    models = (
        LBANP(1, 1),
        LBANP(2, 3, n_latents=16, d_model=32, n_layers=3, n_heads=2, d_ff=64, embed_depth=4),
    )
    ours = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    yield "parameters", ours, stored["sizes"], 0
