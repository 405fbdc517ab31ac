"""Distance, weighted statistics, gradient, a step of descent, indicators of 1,008 classes, and a sensitivity map."""

import numpy as np
import torch
from torch import nn

from posterity.generative import (
    class_indicators,
    feature_stats,
    frechet_distance,
    resample_weights,
    sensitivity_map,
)

AGAINST = "the authors' code (github.com/kynkaat/role-of-imagenet-classes-in-fid), in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    real, gen = torch.tensor(stored["real"]), torch.tensor(stored["gen"])
    target = feature_stats(real)
    yield "distance", frechet_distance(target, feature_stats(gen[: len(real)])), stored["fid"], 1e-9
    logs = torch.tensor(stored["logs"], dtype=torch.float64, requires_grad=True)
    weighted = feature_stats(gen, logs)
    yield "weighted mean", weighted.mean, stored["mean"], 1e-12
    yield "weighted covariance", weighted.cov, stored["cov"], 1e-12
    value = frechet_distance(target, weighted)
    yield "weighted distance", value, stored["loss"], 1e-9
    yield "gradient in log weights", torch.autograd.grad(value, logs)[0], stored["grad"], 1e-9
    found = resample_weights(real, gen, max_iter=1, lr=1.0, optimizer="sgd")
    yield "distance before descent", found.history[:1], stored["start"], 1e-9
    step = torch.tensor(stored["step"])  # theirs drifts: compare weights of one sum
    yield "a step of descent", found.log_weights.softmax(0), step.softmax(0), 1e-10
    rows = [torch.tensor(stored[f"logits_{name}"]).float() for name in ("real", "gen")]
    for mode, n, which in (("top_n", 100, "top"), ("middle_n", 100, "middle"), ("middle_n", 151, "middle")):
        for name, ours in zip(("real", "gen"), class_indicators(*rows, n, which=which), strict=True):
            theirs = np.unpackbits(stored[f"{mode}_{n}_{name}"])[
                : len(ours) * int(stored[f"{mode}_{n}_kept"])
            ]
            yield f"indicators, {which} {n}, {name}", ours.flatten(), theirs.astype(np.float32), 0
    conv, head = nn.Conv2d(1, 5, 3).double(), nn.Linear(5, 6).double()
    for module, name in ((conv, "conv"), (head, "head")):
        module.weight.data = torch.tensor(stored[f"{name}_w"])
        module.bias.data = torch.tensor(stored[f"{name}_b"])
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    heat = sensitivity_map(net, conv, torch.tensor(stored["image"]), target, feature_stats(gen), size=(6, 6))
    yield "sensitivity map", heat[0], stored["heat"], 1e-6
