"""The contextual stochastic block model against its counts, moments and limits."""

import math

import pytest
import torch

from posterity.graphs import contextual_sbm


@pytest.mark.parametrize("phi", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_edges_of_the_block_model_have_their_expected_number_and_share(phi):
    n, degree = 3000, 6.0
    graph = contextual_sbm(
        n, degree=degree, n_features=2, phi=phi, generator=torch.Generator().manual_seed(0)
    )
    row, column = graph.edge_index
    assert (row != column).all()
    pairs = {tuple(pair) for pair in graph.edge_index.T.tolist()}
    assert len(pairs) == graph.edge_index.shape[1]  # none twice
    assert all((v, u) in pairs for u, v in pairs)
    signal = math.sqrt(4.25) * math.sin(phi * math.pi / 2)
    inside, across = (degree + math.sqrt(degree) * signal) / n, (degree - math.sqrt(degree) * signal) / n
    half = n // 2
    alike = graph.y[row] == graph.y[column]
    for count, cells, p in (
        (int(alike.sum()) // 2, half * (half - 1), inside),
        (int((~alike).sum()) // 2, half * half, across),
    ):
        assert abs(count - cells * p) < 5 * math.sqrt(cells * p * (1 - p)) + 1e-9
    if phi != 0:
        share = (degree + math.sqrt(degree) * signal) / (2 * degree)
        assert abs(float(alike.double().mean()) - share) < 0.03
    per_node = torch.bincount(row, minlength=n).double()
    assert abs(float(per_node[:half].mean() - per_node[half:].mean())) < 0.4
    assert abs(float(per_node.var() - degree)) < 1.0  # a Poisson's, as independent edges give


def test_a_block_model_at_probability_one_is_complete():
    graph = contextual_sbm(6, degree=6.0, n_features=2, phi=0.0)
    assert graph.edge_index.shape[1] == 30


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
def test_features_of_the_block_model_have_their_mean_and_noise(phi):
    n, p = 4000, 1000
    graph = contextual_sbm(n, n_features=p, phi=phi, generator=torch.Generator().manual_seed(1))
    assert int(graph.y.sum()) == n // 2 and (graph.y[: n // 2] == 1).all()
    mu = math.sqrt(n / p * 4.25) * math.cos(phi * math.pi / 2)
    gap = (graph.x[graph.y == 1].mean(0) - graph.x[graph.y == 0].mean(0)) / 2
    # mu |u|^2 and the noise's own 1, each give or take a share of sqrt(2 / p)
    assert abs(float(gap.square().sum()) * n - (mu + 1)) < 0.2 * (mu + 1)
    residual = graph.x - (2 * graph.y[:, None] - 1) * gap
    assert abs(float(residual.var()) * p - 1) < 0.01


def test_an_odd_block_model_and_its_generator():
    graphs = [
        contextual_sbm(11, n_features=3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert int(graphs[0].y.sum()) == 5
    assert torch.equal(graphs[0].x, graphs[1].x) and torch.equal(graphs[0].edge_index, graphs[1].edge_index)
    assert not torch.equal(graphs[0].x, graphs[2].x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contextual_sbm(1), "n must be an integer of at least 2"),
        (lambda: contextual_sbm(n_features=0), "n_features must be an integer of at least 1"),
        (lambda: contextual_sbm(degree=0.0), "degree must be greater than 0"),
        (lambda: contextual_sbm(phi=1.5), r"phi must be in \[-1, 1\], got 1.5"),
        (lambda: contextual_sbm(epsilon=-0.5), "epsilon must be at least 0"),
        (lambda: contextual_sbm(degree=2.0, phi=-1.0), r"degree and phi must give edge probabilities in \[0, 1\]"),
        (lambda: contextual_sbm(8, degree=7.0, phi=0.5), r"for degree=7.0, phi=0.5, epsilon=3.25, n=8"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
