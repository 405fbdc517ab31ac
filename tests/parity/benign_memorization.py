"""Labels by neighbours of stored features, many of them equally far, and the profile of a layer with stored views."""

import warnings

import torch
from torch import nn

from posterity.dynamics import knn_predict, knn_probe, memorization_profile

AGAINST = "double loops in numpy, distances in float64 to nine digits, ties as documented"


class _Views:
    """Stored views, one after the other."""

    def __init__(self, views):
        self.views, self.at = views, -1

    def __call__(self, batch, generator=None):
        self.at += 1
        return self.views[:, self.at]


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    stored = {name: torch.as_tensor(value) for name, value in stored.items()}
    for name in ("normal", "whole"):
        features, y, test = (stored[f"{name}_{part}"] for part in ("features", "y", "test"))
        for metric in ("cosine", "euclidean"):
            with warnings.catch_warnings():  # a row of zeros is among the whole numbers
                warnings.simplefilter("ignore")
                for k in (1, 10):
                    got = knn_predict(features, y, test, k=k, metric=metric)
                    yield f"labels, {name}, {metric}, k = {k}", got, stored[f"{name}_{metric}_{k}"], 0
                probe = knn_probe(features, y, k=10, metric=metric)
            yield f"leaving one out, {name}, {metric}", probe, stored[f"{name}_{metric}_out"], 1e-12
    layer = nn.Linear(*stored["weight"].shape[::-1], bias=False)
    layer.weight = nn.Parameter(stored["weight"])
    found = memorization_profile(
        nn.Sequential(layer, nn.Tanh()), ["1"], stored["x"], stored["y"], stored["noisy"], stored["x_test"],
        stored["y_test"], k=7, augment=_Views(stored["views"]), n_views=3,
    )  # fmt: skip
    ours = torch.cat([found.signal, found.noise, found.invariance])
    yield "signal, noise, invariance", ours, stored["profile"], 1e-6
