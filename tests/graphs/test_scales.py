"""Another unit of the weights, 1e-12 or 1e12 of the old one, changes nothing where mathematics says so."""

import pytest
import torch

from posterity import graphs

HALF = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, 7, 7, 5]])
EDGES = torch.cat([HALF, HALF.flip(0)], 1)
LOOPS = torch.cat([EDGES, torch.arange(8).expand(2, 8)], 1)
STRONG = HALF[0].repeat(2) < 2


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.randn(8, 3, dtype=torch.float64, generator=rng())
SHARE = torch.rand(9, dtype=torch.float64, generator=rng(1)).repeat(2) + 0.5
MASS = torch.rand(8, dtype=torch.float64, generator=rng(2)) + 0.5
LOOPED = torch.cat([SHARE, torch.ones(8, dtype=torch.float64)])


def fixed(layer):
    torch.manual_seed(0)
    return layer().double()


def resistance(unit):
    found = graphs.resistance_distance(EDGES, 9, edge_weight=unit * SHARE) * unit
    return torch.where(found.isfinite(), found, -1)


def eigs(normalization, method):
    def run(unit):
        values, vectors = graphs.laplacian_eigs(
            EDGES, 8, 3, edge_weight=unit * SHARE, normalization=normalization, method=method
        )
        return torch.cat([values[None] / (1 if normalization else unit), vectors.abs()])

    return run


def contour(unit):
    return graphs.apply_filter(lambda z: torch.exp(-z / unit), X, EDGES, unit * SHARE, method="contour")


def coarse(unit):
    found = graphs.collapse_strong_edges(EDGES, 8, unit * SHARE, STRONG, node_weight=unit * MASS)
    return torch.cat([found.edge_weight / unit, found.node_weight / unit, found.project(X).flatten()])


def certificate(unit):
    bound = graphs.collapse_bound(EDGES, 8, unit * SHARE, STRONG, shift=unit)
    return torch.tensor([bound.value, bound.gap, bound.coupling])


def limit(unit):
    conv = fixed(lambda: graphs.AntiSymmetricConv(3, gamma=0.0, act=None))
    conv.gamma = 0.2 * unit
    conv.W.data.mul_(unit)
    return torch.tensor(graphs.euler_step_limit(conv, X, EDGES), dtype=torch.float64) * unit


INVARIANT = {
    "resistance_distance": resistance,
    "laplacian_eigs": eigs(None, "dense"),
    "laplacian_eigs, sparse": eigs(None, "sparse"),
    "laplacian_eigs, normalised": eigs("sym", "dense"),
    "laplacian_eigs, normalised and sparse": eigs("sym", "sparse"),
    "apply_filter": lambda u: graphs.apply_filter(lambda z: torch.exp(-z / u), X, EDGES, u * SHARE),
    "apply_filter around the spectrum": contour,
    "apply_filter of small signals": lambda u: (
        graphs.apply_filter(lambda z: torch.exp(-z), u * X, EDGES, SHARE, method="contour") / u
    ),
    "apply_filter by small values": lambda u: (
        graphs.apply_filter(lambda z: u * torch.exp(-z), X, EDGES, SHARE, method="contour") / u
    ),
    "ResolventConv": lambda u: fixed(lambda: graphs.ResolventConv(3, 2, shift=u))(X, EDGES, u * SHARE),
    "ResolventConv of node weights": lambda u: fixed(lambda: graphs.ResolventConv(3, 2))(X, EDGES, u * SHARE, u * MASS),
    "StableGCN": lambda u: fixed(lambda: graphs.StableGCN(3, 4, 2, max_gain=0.5, shift=u))(X, EDGES, u * SHARE),
    "collapse_strong_edges": coarse,
    "collapse_bound": certificate,
    "PolynomialFilter": lambda u: fixed(lambda: graphs.PolynomialFilter(4))(X, EDGES, u * SHARE),
    "AntiSymmetricConv": lambda u: fixed(lambda: graphs.AntiSymmetricConv(3, 3, phi="gcn"))(X, LOOPS, u * LOOPED),
    "ACMPConv": lambda u: fixed(lambda: graphs.ACMPConv(3, beta=0.2))(X, LOOPS, u * LOOPED),
    "ACMPConv of shares": lambda u: fixed(lambda: graphs.ACMPConv(3, attention="rw"))(X, LOOPS, u * LOOPED),
    "dirichlet_energy": lambda u: graphs.dirichlet_energy(X, EDGES, u * SHARE) / u,
    "euler_step_limit": limit,
    "bgrl_loss": lambda u: graphs.bgrl_loss(u * X, X.flip(0), X.flip(1), u * X),
    "tbgrl_loss": lambda u: graphs.tbgrl_loss(u * X, u * X.flip(0), X, X.flip(1), u * X.flip(0, 1)),
    "gd_wl_colors": lambda u: graphs.gd_wl_colors(EDGES, 8, distance=u * torch.cdist(MASS[:, None], MASS[:, None])),
    "gd_wl_colors of a square": lambda u: graphs.gd_wl_colors(
        HALF[:, :0], 4, distance=u * torch.tensor([[0.0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]]) / 3
    ),
    "eigenspaces": lambda u: graphs.eigenspaces(u * torch.tensor([0.0, 1, 1, 2]).double(), tol=1e-5 * u),
}  # fmt: skip


@pytest.mark.parametrize("unit", [1e-12, 1e12])
@pytest.mark.parametrize("name", INVARIANT)
def test_the_unit_does_not_matter(name, unit):
    call = INVARIANT[name]
    with torch.no_grad():
        torch.testing.assert_close(call(unit), call(1.0), rtol=1e-9, atol=1e-11)


def test_resistances_of_parts_of_different_units_are_each_exact():
    """Two edges of conductances 1e-12 and 1e12 apart from each other resist as much as either says."""
    edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    weight = torch.tensor([1e-12, 1e-12, 1e12, 1e12], dtype=torch.float64)
    found = graphs.resistance_distance(edges, 4, edge_weight=weight)
    assert float(found[0, 1]) == pytest.approx(1e12, rel=1e-12)
    assert float(found[2, 3]) == pytest.approx(1e-12, rel=1e-12)


def test_rounding_does_not_tell_equal_distances_apart():
    """Sums in another order: far from 0 they differ by more than 1e-6."""
    far = 1e12 * torch.tensor([[0, 0.3, 0.1], [0.3, 0, 0.2], [0.1, 0.2, 0]], dtype=torch.float64)
    other = 1e12 * torch.tensor(
        [[0, 0.1 + 0.2, 0.1], [0.1 + 0.2, 0, 0.2], [0.1, 0.2, 0]], dtype=torch.float64
    )
    assert not torch.equal(far, other)
    colors = graphs.gd_wl_colors(
        HALF[:, :0], 6, distance=torch.stack([far, other]), batch=torch.arange(2).repeat_interleave(3)
    )
    assert torch.equal(colors[:3], colors[3:])


def test_a_filter_that_vanishes_ends():
    none = graphs.apply_filter(lambda z: 0 * z, X, EDGES, method="contour")
    assert torch.equal(none, torch.zeros_like(X))
    killed = graphs.apply_filter(lambda z: z, torch.ones_like(X), EDGES, method="contour")
    assert float(killed.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_default_dtype_of_float64_does_no_harm(dtype):
    torch.set_default_dtype(torch.float64)
    try:
        conv = graphs.AntiSymmetricConv(3, phi="gcn").to(dtype)
        assert conv(X.to(dtype), EDGES).dtype == dtype
        masks = torch.tensor([[True, False, True, False], [False, True, False, True]])
        assert graphs.duplicate_leakage(torch.tensor([0, 0, 1, 2]), *masks).leaked_share == 0.5
        assert graphs.ACMPConv(3, method="euler").to(dtype)(X.to(dtype), EDGES).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)
