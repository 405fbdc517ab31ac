"""The expected samples of a mixture, and two guided steps from noise."""

from unittest import mock

import torch

from posterity.coding import GaussianMixturePrior, idempotent_codec, posterior_sample

AGAINST = (
    "the formulas of the method written out in NumPy for single samples, gradients by central differences"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    prior = GaussianMixturePrior(*(torch.tensor(stored[name]) for name in ("M", "C", "W")))
    x = torch.tensor(stored["x"])
    for ab, want in zip(stored["alpha_bars"], stored["denoised"], strict=True):
        yield f"denoised at {ab}", prior.denoise(x, torch.tensor(ab)), want, 1e-9
    seen = torch.tensor(stored["F"])
    noise = torch.tensor(stored["noise"])
    with mock.patch.object(idempotent_codec.torch, "randn", return_value=noise):
        found = posterior_sample(
            prior, lambda x: x @ seen.mT, torch.tensor(stored["y"]), (5, 4), scale=0.4,
            betas=torch.tensor(stored["betas"]), x_init=torch.tensor(stored["start"]),
        )  # fmt: skip
    yield "two guided steps", found.x, stored["sample"], 1e-6
