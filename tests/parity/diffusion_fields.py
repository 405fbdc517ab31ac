"""Shares, random and deterministic steps, clipped and not, of both schedules, with a network that is a formula."""

from unittest import mock

import torch

from posterity.generative import FieldDiffusion

AGAINST = "diffusers' DDPMScheduler and DDIMScheduler, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, 1e-9 difference."""
    start, matrix, fresh = (torch.tensor(stored[name]) for name in ("start", "matrix", "fresh"))
    coords, n_steps = torch.linspace(-1, 1, start.shape[1])[None, :, None], len(fresh)

    def net(x, t, **_):
        return (x + 0.3 * torch.tanh(x @ matrix)) * (1 - t)[:, None, None]

    for schedule in ("linear", "cosine"):
        t = 1 - torch.arange(1, n_steps + 1, dtype=torch.float64) / n_steps
        shares = FieldDiffusion(n_steps=n_steps, schedule=schedule).alpha_bar(t)
        yield f"{schedule} shares", shares, stored[f"{schedule}_shares"], 1e-13
        for clip in (False, True):
            process = FieldDiffusion(n_steps=n_steps, schedule=schedule, clip=(-1.5, 1.5) if clip else None)
            name, drawn = f"{schedule}_{clip}", iter(fresh)
            says = f"{schedule}, {'clipped' if clip else 'free'}"
            with mock.patch(
                "posterity.generative.diffusion_fields.normal", lambda *_, drawn=drawn: next(drawn)
            ):
                made = process.sample(net, coords, 2, x0=start)
            yield f"{says}, DDPM", made, stored[f"{name}_ddpm"], 1e-9
            for steps in (20, 5):
                made = process.sample(net, coords, 2, x0=start, sampler="ddim", n_steps=steps)
                yield f"{says}, DDIM in {steps} steps", made, stored[f"{name}_ddim{steps}"], 1e-9
