"""Trials that behave and misbehave, imported by worker processes; they need no heavy library."""

import os
import time


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
