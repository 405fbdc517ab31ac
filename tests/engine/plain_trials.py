"""Trials that behave and misbehave, imported by worker processes."""

import os
import time

import torch


def draw(trial, size: int = 3):
    trial.track("curve", 1, trial.seed)
    generator = torch.Generator().manual_seed(trial.seed)
    x = torch.randn(300, 300, generator=generator)
    return float((x @ x).sum()) + size + float(torch.rand(()))


def slow(trial, seconds: float = 0.2):
    time.sleep(seconds)
    return trial.seed


def troubled(trial, trouble: str = "none"):
    if trial.seed == 1:
        if trouble == "raises":
            raise RuntimeError("a seed that fails")
        if trouble == "hangs":
            time.sleep(3600)
        if trouble == "eats":
            return float(len(bytearray(1 << 36)))
        if trouble == "dies":
            os.kill(os.getpid(), 9)
    return float(trial.seed)
