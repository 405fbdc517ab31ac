"""Polynomial filters against the eigendecomposition, numpy's Chebyshev series and PyG."""

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval
from torch import nn

from posterity.graphs import PolynomialFilter
from posterity.testing import check_graph_network

NONE = torch.empty(2, 0, dtype=torch.long)
RING = torch.stack([torch.arange(9), (torch.arange(9) + 1) % 9])
CHORDS = torch.tensor([[0, 2, 5], [4, 7, 8]])
EDGES = torch.cat([RING, CHORDS, RING.flip(0), CHORDS.flip(0)], 1)  # connected, 9 nodes, 12 edges


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weigh(seed=1):
    half = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.cat([half, half])


def make(K=5, seed=0, **options):
    """Filters whose steps are drawn, some of them cut by relu."""
    filters = PolynomialFilter(K, **options).double()
    with torch.no_grad():
        filters.temp_low.copy_(draw(K, seed=seed) + 0.3)
        filters.temp_high.copy_(draw(K, seed=seed + 1) + 0.3)
    return filters


def laplacian(n, edges, weight):
    A = torch.zeros(n, n, dtype=torch.float64)
    A.index_put_((edges[1], edges[0]), weight, accumulate=True)
    A.fill_diagonal_(0)
    d = A.sum(1)
    scale = torch.where(d > 0, d, torch.inf).rsqrt()
    return torch.eye(n, dtype=torch.float64) - scale[:, None] * A * scale


@pytest.mark.parametrize("K", [1, 2, 5, 10])
@pytest.mark.parametrize("options", [{}, {"learn_ends": True, "nonnegative": True}])
def test_the_polynomial_goes_through_monotone_values(K, options):
    filters = make(K, init_high=0.5, **options)
    t = np.cos((K - np.arange(K + 1) + 0.5) * np.pi / (K + 1))
    assert (np.diff(t) > 0).all()
    for highpass, start, temp in ((True, 0.5, filters.temp_high), (False, 2.0, filters.temp_low)):
        values = filters.values(highpass=highpass).detach().numpy()
        steps = np.maximum(temp.detach().numpy(), 0).cumsum()
        expected = np.concatenate([[start], start + steps if highpass else start - steps])
        if options and not highpass:
            expected = np.maximum(expected, 0)
        np.testing.assert_allclose(values, expected, atol=1e-12)
        assert (np.diff(values) >= 0).all() if highpass else (np.diff(values) <= 0).all()
        np.testing.assert_allclose(
            chebval(t, filters.coefficients(highpass=highpass).detach().numpy()), values, atol=1e-12
        )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("max_elements", [0, 2**27])
def test_filters_are_those_of_the_eigendecomposition(weighted, K, max_elements):
    x, weight = draw(9, 3), weigh() if weighted else None
    filters = make(K, max_elements=max_elements)
    frequency, basis = torch.linalg.eigh(
        laplacian(9, EDGES, torch.ones(24).double() if weight is None else weight)
    )
    got = dict(zip((True, False), filters.both(x, EDGES, weight), strict=True))
    for highpass in (True, False):
        h = chebval(frequency.numpy() - 1, filters.coefficients(highpass=highpass).detach().numpy())
        expected = basis @ (torch.from_numpy(h)[:, None] * (basis.T @ x))
        torch.testing.assert_close(got[highpass], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            filters(x, EDGES, weight, highpass=highpass), got[highpass], rtol=0, atol=1e-12
        )


def test_filters_are_pygs_chebyshev_convolution_also_on_directed_and_broken_graphs():
    pyg = pytest.importorskip("torch_geometric.nn")
    # node 5 is isolated, 4 has a loop, 0 to 1 counts twice
    edges = torch.tensor([[0, 1, 2, 2, 3, 4, 4, 0], [1, 2, 0, 3, 4, 4, 0, 1]])
    x, weight = draw(6, 4), draw(8, seed=3).abs()
    filters = make(4)
    peer = pyg.ChebConv(4, 4, 5, bias=False).double()
    for highpass in (True, False):
        with torch.no_grad():
            for lin, c in zip(peer.lins, filters.coefficients(highpass=highpass), strict=True):
                lin.weight.copy_(c * torch.eye(4, dtype=torch.float64))
        got = filters(x, edges, weight, highpass=highpass)
        expected = peer(x, edges, weight, lambda_max=torch.tensor(2.0).double())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_without_steps_a_filter_is_a_multiple_of_the_identity():
    x = draw(9, 3)
    filters = PolynomialFilter(4, init_low=1.5, init_high=0.25, value_range=0.0).double()
    high, low = filters.both(x, EDGES)
    torch.testing.assert_close(high, 0.25 * x, rtol=0, atol=1e-12)
    torch.testing.assert_close(low, 1.5 * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("K", [1, 4, 10, 31])
def test_the_start_is_a_ramp_of_the_angle_and_high_and_low_sum_to_two(K):
    filters, x = PolynomialFilter(K).double(), draw(9, 3)
    t = np.linspace(-1, 1, 101)
    high, low = (
        chebval(t, filters.coefficients(highpass=highpass).detach().numpy()) for highpass in (True, False)
    )
    np.testing.assert_allclose(high + low, 2, atol=1e-12)
    if K >= 10:  # lambda = 1 + t; the ramp is 1 + (2 / pi) arcsin t, widened to the outer nodes
        widened = (K + 1) / K
        np.testing.assert_allclose(high, 1 + widened * 2 / np.pi * np.arcsin(t), atol=0.2)
        assert np.abs(high - (1 + t)).max() < 0.35
    total = sum(filters.both(x, EDGES))
    torch.testing.assert_close(total, 2 * x, rtol=0, atol=1e-12)


def test_at_start_a_regular_graphs_constant_passes_low_and_not_high():
    high, low = PolynomialFilter(10).double().both(torch.ones(9, 1, dtype=torch.float64), RING)
    assert high.abs().max() < 0.15
    torch.testing.assert_close(low, 2 - high, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_elements", [0, 2**27])
def test_gradients_reach_features_and_steps(max_elements):
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 0, 1, 3]])  # directed: the transpose is another matrix
    filters = PolynomialFilter(3, init_high=0.4, learn_ends=True, max_elements=max_elements).double()
    names = [name for name, _ in filters.named_parameters()]
    inputs = [p.detach().clone().requires_grad_() for p in filters.parameters()]
    x = draw(5, 2).requires_grad_()

    def run(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Both(filters), {f"filters.{k}": v for k, v in state.items()}, (x, edges)
        )

    assert torch.autograd.gradcheck(run, (x, *inputs))


class Both(nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.filters = filters

    def forward(self, x, edge_index):
        return torch.cat(self.filters.both(x, edge_index), 1)


def test_isolated_nodes_have_the_middle_frequency():
    filters, x = make(4), draw(5, 2)
    for highpass in (True, False):
        middle = chebval(0.0, filters.coefficients(highpass=highpass).detach().numpy())
        torch.testing.assert_close(filters(x, NONE, highpass=highpass), middle * x, rtol=0, atol=1e-12)
        loops = torch.arange(5).expand(2, 5)
        torch.testing.assert_close(filters(x, loops, highpass=highpass), middle * x, rtol=0, atol=1e-12)


def test_learned_ends_pass_through_relu():
    filters = make(3, learn_ends=True)
    with torch.no_grad():
        filters.initial_val_high.fill_(-0.7)
    assert filters.values(highpass=True)[0] == 0
    assert filters.values(highpass=False)[0] == 2


def test_ends_learn_only_if_asked():
    assert not PolynomialFilter(3).initial_val_low.requires_grad
    filters = PolynomialFilter(3, learn_ends=True, init_high=0.5)
    sum(part.square().sum() for part in filters.both(draw(9, 2).float(), EDGES)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in filters.parameters())


def test_casting_up_loses_no_digits():
    filters = PolynomialFilter(7).half().double()
    with torch.no_grad():
        filters.temp_high.fill_(2 / 7)
    torch.testing.assert_close(
        filters.coefficients(highpass=True),
        PolynomialFilter(7).double().coefficients(highpass=True),
        rtol=0,
        atol=1e-7,
    )
    assert filters.table.dtype == torch.float64 and "table" not in filters.state_dict()
    assert PolynomialFilter(7).table.dtype == torch.float32


@pytest.mark.parametrize(
    "filters",
    [PolynomialFilter(4), PolynomialFilter(4, max_elements=0), PolynomialFilter(2, learn_ends=True, init_high=1.0)],
)  # fmt: skip
def test_conforms_to_its_kind(as_a_user, filters):
    check_graph_network(Both(filters), torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), EDGES)


X = torch.randn(9, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PolynomialFilter(0), "K must be an integer of at least 1, got 0"),
        (lambda: PolynomialFilter(init_low=-1.0), "init_low must be at least 0, got -1.0"),
        (lambda: PolynomialFilter(init_high=-1.0), "init_high must be at least 0, got -1.0"),
        (lambda: PolynomialFilter(value_range=-1.0), "value_range must be at least 0, got -1.0"),
        (lambda: PolynomialFilter(max_elements=-1), "max_elements must be an integer of at least 0"),
        (lambda: PolynomialFilter()(X[0], EDGES), r"x must have shape \(any, any\), got \(4\,\)"),
        (lambda: PolynomialFilter()(X.long(), EDGES), "x must be a floating-point tensor"),
        (lambda: PolynomialFilter()(X, EDGES.float()), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: PolynomialFilter()(X, EDGES.T), r"edge_index must have shape \(2, any\), got \(24, 2\)"),
        (lambda: PolynomialFilter()(X, EDGES + 1), r"edge_index must name nodes in 0\.\.8, got 9"),
        (lambda: PolynomialFilter()(X, EDGES - 1), r"edge_index must name nodes in 0\.\.8, got -1"),
        (lambda: PolynomialFilter()(X, EDGES, torch.ones(3)), r"edge_weight must have shape \(24\) for edge_index"),
        (lambda: PolynomialFilter().both(X, EDGES, -torch.ones(24)), "edge_weight must be at least 0, got -1"),
        (lambda: PolynomialFilter()(X, EDGES, torch.ones(24).requires_grad_()), "edge_weight must not require"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
