"""Topology-aware robust optimisation beside loops over groups, networkx and a loop over pairs."""

import time
from itertools import combinations

import networkx as nx
import numpy as np
import torch
from scipy.stats import wasserstein_distance

from benchmarks.timing import race
from posterity.transfer import TopologyAwareDRO, group_distances, topology_prior

generator = torch.Generator().manual_seed(0)


def project(v):
    """Return the projection on the simplex, in numpy."""
    u = np.sort(v)[::-1]
    above = (np.cumsum(u) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - above[np.nonzero(u > above)[0][-1]], 0)


def weighting() -> None:
    """Race a call for 50 groups, and one for 640 samples of them, with a loop over groups and numpy weights."""
    prior = torch.full((50,), 0.02)
    loss, weights = TopologyAwareDRO(prior), prior.numpy().copy()
    means = torch.rand(50, generator=generator)
    groups = torch.arange(640) % 50
    each = torch.rand(640, generator=generator)

    def step(parts):
        nonlocal weights
        values = np.array([float(part) for part in parts])
        weights = project(weights + 0.1 * (values - (weights - 0.02)))
        total = parts[0] * 0
        for part, weight in zip(parts, weights, strict=True):
            total = total + part * float(weight)
        return total

    race("weighted loss of 50 groups, against a loop over groups", lambda: loss(means), lambda: step(list(means)),
         target=2.0, rounds=200)  # fmt: skip
    race("weighted loss of 640 samples of 50 groups, against a loop over groups", lambda: loss(each, groups),
         lambda: step([each[groups == k].mean() for k in range(50)]), target=2.0, rounds=200)  # fmt: skip


def one_call() -> None:
    """Race a call for 50 groups with a hundred microseconds."""

    def wait():
        end = time.perf_counter() + 1e-4
        while time.perf_counter() < end:
            pass

    loss, means = TopologyAwareDRO(torch.full((50,), 0.02)), torch.rand(50, generator=generator)
    race(
        "weighted loss of 50 groups, against 100 microseconds",
        lambda: loss(means),
        wait,
        target=1.0,
        rounds=200,
    )


def prior() -> None:
    """Race the prior of 300 groups with networkx."""
    graph = nx.random_geometric_graph(300, 0.15, seed=0)
    adjacency = torch.from_numpy(nx.to_numpy_array(graph))
    race("prior of 300 groups, against networkx", lambda: topology_prior(adjacency),
         lambda: nx.betweenness_centrality(graph), target=5.0, rounds=5)  # fmt: skip


def distances() -> None:
    """Race sliced distances of 20 groups with a loop over pairs and directions."""
    x = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    groups = torch.arange(2000) % 20
    draws = torch.randn(16, 50, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(draws, dim=0)

    def loop():
        along = (x @ directions).numpy()
        clouds = [along[groups.numpy() == k] for k in range(20)]
        return [
            np.mean([wasserstein_distance(clouds[i][:, d], clouds[j][:, d]) for d in range(50)])
            for i, j in combinations(range(20), 2)
        ]

    race("sliced distances of 20 groups of 100 points, against scipy for each pair and direction",
         lambda: group_distances(x, groups, n_projections=50, generator=generator), loop, target=2.0, rounds=5)  # fmt: skip


if __name__ == "__main__":
    weighting()
    one_call()
    prior()
    distances()
