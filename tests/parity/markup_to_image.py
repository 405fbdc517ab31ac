"""Scheduled-sampling steps for m = 0 to 5, a chain of the sampler, and distances of aligned columns."""

import torch

from posterity.generative import ScheduledSamplingDiffusion, column_dtw

AGAINST = "the authors' training step and DTW distance (github.com/da03/markup2im) and diffusers' DDPMScheduler, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, k, gain = (torch.tensor(stored[name]) for name in ("x", "k", "gain"))
    process = ScheduledSamplingDiffusion(x.shape[1:], n_steps=100, beta_start=1e-3, beta_end=0.2)
    seen = []

    def net(y, t):
        seen.append(y)
        return gain * y.sin() + 0.1 * t[:, None, None, None]

    yield "share of the data", process.alpha_bar(torch.arange(100)), stored["alpha_bar"], 1e-6
    for m in (0, 1, 2, 5):
        draws = torch.Generator().manual_seed(m)
        loss = process.loss(net, x, m=m, k=k, generator=draws)
        yield f"m = {m}, input", seen[-1], stored[f"input_{m}"], 1e-9
        yield f"m = {m}, loss", loss, stored[f"loss_{m}"], 1e-9
    made, clean = process.sample(
        net, x0=torch.tensor(stored["x0"]), return_clean=True, generator=torch.Generator().manual_seed(9)
    )
    yield "images on the way", torch.stack(clean), stored["clean"], 1e-5
    yield "sample", made, stored["sample"], 1e-5
    pred, target = (torch.tensor(stored[name]) / 255 for name in ("pred", "target"))
    yield "distance of aligned columns", column_dtw(pred, target), stored["dtw"], 1e-5
