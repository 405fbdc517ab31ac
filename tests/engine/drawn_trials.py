"""A trial that draws and computes with torch, from the global generator too."""

import torch


def draw(trial, size: int = 3):
    trial.track("curve", 1, trial.seed)
    generator = torch.Generator().manual_seed(trial.seed)
    x = torch.randn(300, 300, generator=generator)
    return float((x @ x).sum()) + size + float(torch.rand(()))
