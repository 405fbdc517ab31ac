"""Functions of the Laplacian against matrix exponentials, on graphs with and without eigenvectors."""

import pytest
import torch
from scipy.linalg import expm

from posterity.graphs import apply_filter

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_graph(n=9):
    """A ring with chords, weights from 0.5 to 2, node weights from 0.5 to 3."""
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    chords = torch.stack([torch.arange(n), (torch.arange(n) + 3) % n])[:, ::2]
    edges = torch.cat([ring, chords], 1)
    weight = 0.5 + 1.5 * torch.rand(edges.shape[1], generator=rng(), dtype=F64)
    mu = 0.5 + 2.5 * torch.rand(n, generator=rng(1), dtype=F64)
    return torch.cat([edges, edges.flip(0)], 1), torch.cat([weight, weight]), mu


def laplacian(edges, weight, mu):
    """L by a loop over edges."""
    L = torch.zeros(len(mu), len(mu), dtype=F64)
    for (j, i), w in zip(edges.T.tolist(), weight.tolist(), strict=True):
        L[i, i] += w / mu[i]
        L[i, j] -= w / mu[i]
    return L


DIRECTED = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])  # with a chord


def heat(z):
    return torch.exp(-0.5 * z)


@pytest.mark.parametrize("method", ["eig", "contour"])
def test_the_functional_calculus_of_the_heat_kernel_is_a_matrix_exponential(method):
    edges, weight, mu = random_graph()
    x = torch.randn(2, 9, 3, generator=rng(), dtype=F64)
    expected = torch.from_numpy(expm(-0.5 * laplacian(edges, weight, mu).numpy())) @ x
    got = apply_filter(heat, x, edges, weight, mu, method=method)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
    single = apply_filter(heat, x.float(), edges, weight, mu, method=method)
    torch.testing.assert_close(single, expected.float())


def test_the_contour_works_where_eigenvectors_may_not_exist():
    weight, mu = (
        torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.5], dtype=F64),
        torch.tensor([1.0, 2, 1, 1, 3], dtype=F64),
    )
    x = torch.randn(5, 2, generator=rng(), dtype=F64)
    L = laplacian(DIRECTED, weight, mu)
    expected = torch.from_numpy(expm(-0.5 * L.numpy())) @ x
    for options in ({}, {"center": 3.0}, {"center": 2.0, "radius": 9.0}):
        got = apply_filter(heat, x, DIRECTED, weight, mu, method="contour", **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
    got = apply_filter(lambda z: z, x, DIRECTED, weight, mu, method="contour")
    torch.testing.assert_close(got, L @ x, rtol=0, atol=1e-8)
    path = torch.tensor([[0, 1], [1, 2]])  # L has a Jordan block
    L = laplacian(path, torch.ones(2), torch.ones(3))
    got = apply_filter(heat, x[:3], path, method="contour")
    torch.testing.assert_close(got, torch.from_numpy(expm(-0.5 * L.numpy())) @ x[:3], rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["eig", "contour"])
def test_the_calculus_of_the_resolvent_is_a_linear_system(method):
    edges, weight, mu = random_graph()
    x = torch.randn(9, 2, generator=rng(), dtype=F64)
    L = laplacian(edges, weight, mu)
    shift = 0.25 * float(L.diagonal().max()) + 0.6  # the pole is outside the circle
    got = apply_filter(lambda z: shift / (shift + z), x, edges, weight, mu, method=method)
    expected = torch.linalg.solve(L + shift * torch.eye(9, dtype=F64), shift * x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_a_filter_that_is_not_holomorphic_is_given_up():
    edges, _, _ = random_graph(4)
    with pytest.raises(RuntimeError, match="4096 points"):
        apply_filter(torch.sqrt, torch.randn(4, 1, generator=rng()), edges, method="contour")


def test_edges_that_repeat_add_up_and_loops_do_nothing():
    edges, weight, mu = random_graph()
    x = torch.randn(9, 3, generator=rng(), dtype=F64)
    twice = torch.cat([edges, edges, torch.tensor([[4, 4], [4, 4]])], 1)
    halves = torch.cat([weight / 4, 3 * weight / 4, torch.ones(2, dtype=F64)])
    expected = apply_filter(heat, x, edges, weight, mu)
    torch.testing.assert_close(apply_filter(heat, x, twice, halves, mu), expected)


X, PAIR = torch.randn(3, 4, generator=rng()), torch.tensor([[0, 1], [1, 0]])
ONE_WAY = torch.tensor([[0, 1, 1], [1, 0, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_filter(heat, X, ONE_WAY), "edge_weight must be symmetric, got 1 for 1 -> 2, 0 back"),
        (lambda: apply_filter(heat, X, PAIR, method="power"), "method must be one of 'eig', 'contour'"),
        (lambda: apply_filter(heat, X, PAIR, tol=0.0), "tol must be greater than 0"),
        (lambda: apply_filter(heat, X, PAIR, method="contour", radius=1.0), "radius must be greater than 1 to enclose the spectrum from 1, got 1.0"),
        (lambda: apply_filter(heat, X, PAIR, method="contour", center=3.0, radius=2.5), "radius must be greater than 3 to enclose the spectrum from 3, got 2.5"),
        (lambda: apply_filter(lambda z: z.sum(), X, PAIR), r"g must return a tensor of the shape it is given, \(3,\), got \(\)"),
        (lambda: apply_filter(lambda z: 1.0, X, PAIR, method="contour"), r"shape it is given, \(32,\), got float"),
        (lambda: apply_filter(heat, X[:0], PAIR[:, :0]), "x must have at least one node"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
