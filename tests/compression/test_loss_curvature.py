"""Spectra of Hessians against closed forms and brute force, and the share that they allow to cut."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity.compression import Spectrum, hessian_spectrum, magnitude_mask, prunable_fraction
from posterity.testing import check_instrument


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def regression(n=40, d=7):
    x = torch.randn(n, d, dtype=torch.float64, generator=draw()) * torch.arange(1, d + 1)
    return nn.Linear(d, 1).double(), [(part, torch.zeros(len(part), 1).double()) for part in x.split(15)], x


def test_linear_regression_has_the_eigenvalues_of_its_normal_matrix():
    net, batches, x = regression()
    full = 2 * x.T @ x / len(x)
    found = hessian_spectrum(net, batches, loss_fn=F.mse_loss, method="exact")
    torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(full))
    assert torch.equal(found.weights, torch.ones(7, dtype=torch.float64))
    assert found.loss == pytest.approx(float((x @ net.weight.T + net.bias).detach().square().mean()))
    kept = torch.tensor([True, False, True, True, False, True, True])
    part = hessian_spectrum(
        net, iter(batches), loss_fn=F.mse_loss, mask={"weight": kept[None]}, method="exact"
    )
    torch.testing.assert_close(part.eigenvalues, torch.linalg.eigvalsh(full[kept][:, kept]))


def test_lanczos_of_as_many_steps_as_weights_is_exact_and_its_trace_is_within_sampling_error():
    net, batches, x = regression()
    exact = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    one = hessian_spectrum(net, batches, loss_fn=F.mse_loss, n_iter=50, n_probes=1, generator=draw())
    torch.testing.assert_close(one.eigenvalues, exact)
    assert float(one.weights.sum()) == pytest.approx(7)
    many = hessian_spectrum(net, batches, loss_fn=F.mse_loss, n_iter=7, n_probes=100, generator=draw())
    # the trace of a probe is D v'Av / v'v, with variance 2 D (tr A^2 - (tr A)^2 / D) / (D + 2)
    spread = math.sqrt(2 * 7 / 9 * float(exact.square().sum() - exact.sum() ** 2 / 7) / 100)
    assert abs(float(many.eigenvalues @ many.weights - exact.sum())) < 4 * spread
    assert float(many.weights.sum()) == pytest.approx(7)


def test_each_eigenvalue_weighs_what_the_probes_have_of_it():
    net, batches, x = regression()
    _, vectors = torch.linalg.eigh(2 * x.T @ x / len(x))
    found = hessian_spectrum(net, batches, loss_fn=F.mse_loss, n_iter=7, n_probes=3, generator=draw(1))
    generator, share = draw(1), 0
    for _ in range(3):
        probe = torch.randn(7, generator=generator).double()
        share = share + (vectors.T @ probe / probe.norm()) ** 2
    torch.testing.assert_close(found.weights.view(7, 3).sum(1), 7 / 3 * share)


def test_no_eigenvalue_comes_twice_after_many_steps():
    """As they do where vectors are orthogonal to the last two only."""
    scale = 1.5 ** -torch.arange(60, dtype=torch.float64)
    net = nn.Linear(60, 1, bias=False).double()
    x = torch.diag(scale)
    found = hessian_spectrum(
        net, [(x, torch.zeros(60, 1).double())], loss_fn=F.mse_loss, n_iter=50, n_probes=1, generator=draw()
    )
    expected = (2 * scale**2 / 60)[:15].flip(0)
    torch.testing.assert_close(found.eigenvalues[-15:], expected, rtol=1e-6, atol=0)


def test_lanczos_stops_where_the_krylov_space_ends():
    net = nn.Linear(30, 1, bias=False)
    x = torch.zeros(5, 30)
    x[:, :2] = torch.randn(5, 2, generator=draw())
    found = hessian_spectrum(net, [(x, torch.zeros(5, 1))], loss_fn=F.mse_loss, n_probes=1, generator=draw())
    assert len(found.eigenvalues) == 3  # two directions, and all others
    expected = torch.linalg.eigvalsh(2 * x[:, :2].double().T @ x[:, :2].double() / 5)
    torch.testing.assert_close(found.eigenvalues[1:], expected, rtol=1e-5, atol=0)
    assert abs(float(found.eigenvalues[0])) < 1e-6


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(12, 2)
    )


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2))


@pytest.mark.parametrize("make", [encoder, convolutions])
def test_networks_have_the_spectrum_of_their_whole_hessian(make):
    net = make().double()
    shape = (3, 4) if make is encoder else (4, 4)
    batches = [
        (torch.randn(n, *shape, dtype=torch.float64, generator=draw(n)), torch.arange(n) % 2) for n in (5, 2)
    ]
    mask = magnitude_mask(net, 0.5)
    found = hessian_spectrum(net, batches, mask=mask, method="exact")
    assert net.training
    fixed = {k: v.detach().clone() for k, v in net.state_dict().items()}
    sizes = [part.numel() for part in mask.values()]
    kept = torch.cat([part.flatten() for part in mask.values()])

    def loss(flat):
        weights = {k: w.view(mask[k].shape) for k, w in zip(mask, flat.split(sizes), strict=True)}
        net.eval()
        return sum(
            len(y) / 7 * F.cross_entropy(functional_call(net, {**fixed, **weights}, (x,)), y)
            for x, y in batches
        )

    flat = torch.cat([fixed[name].flatten() for name in mask])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        whole = torch.autograd.functional.hessian(loss, flat.requires_grad_())
    expected = torch.linalg.eigvalsh(whole[kept][:, kept])
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-8, atol=1e-10)
    assert found.loss == pytest.approx(float(loss(flat.detach())))
    ours = hessian_spectrum(net, batches, mask=mask, n_iter=len(expected), n_probes=2, generator=draw())
    torch.testing.assert_close(ours.eigenvalues[[0, -1]], expected[[0, -1]], rtol=1e-6, atol=1e-8)


def test_recurrent_networks_are_looked_at_without_batched_products():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    net = Net().double()
    x, y = torch.randn(6, 5, 3, dtype=torch.float64, generator=draw()), torch.arange(6) % 2
    hidden = net.rnn(x)[0][:, -1].detach()
    p = net.head(hidden).softmax(1)
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # the Hessian of the cross-entropy
    whole = torch.einsum("nab,ni,nj->aibj", outer, hidden, hidden).reshape(8, 8) / 6
    found = hessian_spectrum(net, [(x, y)], method="exact")
    torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(whole).detach())


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    net, x = nn.Linear(3, 1), torch.randn(4, 3)
    for method in ("exact", "lanczos"):
        found = hessian_spectrum(net, [(x, x)], loss_fn=lambda out, _: out.mean(), method=method)
        assert not found.eigenvalues.any()
        assert float(found.weights.sum()) == pytest.approx(3)


def scan(weights, eigenvalues, counts, epsilon):
    size = np.sort(np.abs(weights))
    best = 0
    for n in range(1, len(size) + 1):
        distance = (size[:n] ** 2).sum()
        radii = [2 * epsilon / v if v > 0 else math.inf for v in eigenvalues]
        allowed = sum(
            c * (1.0 if r == math.inf else r / (r + distance)) for r, c in zip(radii, counts, strict=True)
        )
        if n <= allowed:
            best = n
    return best / len(size)


@pytest.mark.parametrize("seed", range(6))
def test_the_share_equals_a_scan_over_all_numbers(seed):
    weights = torch.randn(80, dtype=torch.float64, generator=draw(seed))
    spectrum = 10 ** (4 * torch.rand(80, dtype=torch.float64, generator=draw(seed + 10)) - 2) - 0.1
    shares = []
    for epsilon in (1e-4, 1e-2, 1.0, 100.0, 1e4):
        share = prunable_fraction(weights.view(8, 10), spectrum, epsilon)
        assert share == scan(weights.numpy(), spectrum.numpy(), np.ones(80), epsilon)
        assert prunable_fraction(weights, 7 * spectrum, epsilon) <= share
        assert prunable_fraction(8 * weights, spectrum / 64, epsilon) == share
        shares.append(share)
    assert shares == sorted(shares)
    assert len(set(shares)) > 2
    counts = torch.rand(9, dtype=torch.float64, generator=draw(seed))
    counts *= 80 / counts.sum()
    few = Spectrum(spectrum[:9], counts, 0.0)
    assert prunable_fraction(weights, few, 0.01) == scan(
        weights.numpy(), spectrum[:9].numpy(), counts.numpy(), 0.01
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 30.0])
def test_the_share_of_many_weights_equals_a_scan_and_leaves_them_as_they_are(dtype, epsilon):
    weights = torch.randn(70, 71, dtype=torch.float64, generator=draw()).to(dtype).t()
    before = weights.clone()
    nodes, counts = (
        10 ** (torch.arange(40, dtype=torch.float64) / 10 - 2),
        torch.full((40,), 4970 / 40).double(),
    )
    distance = weights.double().flatten().square().sort().values.cumsum(0)
    allowed = (counts / (1 + nodes * distance[:, None] / (2 * epsilon))).sum(1)
    expected = int((torch.arange(1, 4971) <= allowed).sum())
    assert 100 < expected < 4900
    assert prunable_fraction(weights, Spectrum(nodes, counts, 0.0), epsilon) == expected / 4970
    assert torch.equal(weights, before)


def test_where_nothing_bends_all_may_go():
    weights = torch.randn(1001)
    assert prunable_fraction(weights, torch.zeros(1001), 1e-9) == 1
    assert prunable_fraction(weights, -torch.rand(1001), 1e-9) == 1
    assert prunable_fraction(weights, Spectrum(torch.zeros(3), torch.full((3,), 1001 / 3), 0.0), 1e-9) == 1
    assert prunable_fraction(torch.zeros(5), torch.ones(5), 1.0) == 1
    assert prunable_fraction(1e30 * torch.ones(4), torch.tensor([1e30, 1e30, 0, 0]), 1e-30) == 0.5


@pytest.mark.parametrize("scale", [4, 8, 16, 32, 64])
def test_a_random_subspace_meets_the_ellipsoid_as_far_as_predicted_and_not_much_farther(scale):
    D, epsilon, draws = 200, 1.0, []
    eigenvalues = torch.arange(1, D + 1, dtype=torch.float64) ** -0.5
    weights = scale * torch.randn(D, dtype=torch.float64, generator=draw())
    distance = weights.square().sort().values.cumsum(0).sqrt()
    for seed in range(12):
        normals, point = torch.randn(D + 1, D, dtype=torch.float64, generator=draw(seed)).split([D, 1])
        low, high = 0, D
        while low < high:  # n equations, of a subspace through a point; the least loss that fulfils them
            n = (low + high + 1) // 2
            goal = normals[:n] @ point[0] * distance[n - 1] / point.norm()
            least = 0.5 * goal @ torch.linalg.solve(normals[:n] / eigenvalues @ normals[:n].T, goal)
            low, high = (n, high) if least <= epsilon else (low, n - 1)
        draws.append(low)
    n = torch.arange(1, D)
    radii = (2 * epsilon / eigenvalues)[:, None]
    limit = int(n[n <= (radii / (radii + distance[n - 1] ** 2 * (1 - n / D))).sum(0)].max())
    mean = sum(draws) / len(draws)
    assert mean == pytest.approx(limit, rel=0.05), "where it changes as D grows"
    bound = round(D * prunable_fraction(weights, eigenvalues, epsilon))
    assert bound < mean
    if mean < D / 4:
        assert bound == pytest.approx(mean, rel=0.1)


def test_conforms_to_its_kind(as_a_user):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 3)
    y = torch.arange(8) % 3
    for method in ("exact", "lanczos"):

        def look(net, x, method=method):
            found = hessian_spectrum(
                net, [(x[:5], y[:5]), (x[5:], y[5:])], method=method, n_iter=5, generator=draw()
            )
            return found.eigenvalues, found.weights, found.loss

        check_instrument(look, net, x, slack=256)


NET, X, Y = nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2


def spectrum(batches=((X, Y),), model=NET, **settings):
    return hessian_spectrum(model, batches, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(method="full"), "method must be one of 'exact', 'lanczos'"),
        (lambda: spectrum(n_iter=0), "n_iter must be an integer of at least 1"),
        (lambda: spectrum(n_probes=0), "n_probes must be an integer of at least 1"),
        (lambda: spectrum(model=nn.Linear(101, 200), method="exact"), 'method must be "lanczos" for more than 20,000 weights'),
        (lambda: spectrum(mask={"bias": torch.ones(2)}), "mask must name prunable parameters, got 'bias'"),
        (lambda: spectrum(mask={"weight": torch.zeros(2, 3)}), "mask must leave a weight, it leaves none"),
        (lambda: spectrum(()), "batches must have at least one sample, got none"),
        (lambda: spectrum([(X[:0], Y[:0])]), "batches must have samples"),
        (lambda: spectrum([X]), "batches must give pairs of inputs and targets, got Tensor"),
        (lambda: spectrum([(X, Y), (X * math.nan, Y)]), "loss_fn must be finite, got nan on batch 1"),
        (lambda: spectrum(loss_fn=lambda out, _: out), "loss_fn must return a scalar tensor, got .*4, 2"),
        (lambda: spectrum(model=nn.Flatten()), "model must have a layer"),
        (lambda: prunable_fraction(torch.ones(3), torch.ones(3), 0.0), "epsilon must be greater than 0, got 0"),
        (lambda: prunable_fraction(torch.ones(3), torch.ones(3), math.nan), "epsilon must be greater than 0"),
        (lambda: prunable_fraction(torch.ones(0), torch.ones(0), 1.0), "weights must have at least one weight"),
        (lambda: prunable_fraction(torch.ones(3), torch.ones(4), 1.0), "spectrum must be of the 3 weights, got one of 4"),
        (lambda: prunable_fraction(torch.full((3,), math.nan), torch.ones(3), 1.0), "weights must be finite"),
        (lambda: prunable_fraction(torch.ones(3), torch.full((3,), math.inf), 1.0), "spectrum must be finite"),
        (lambda: prunable_fraction(torch.ones(3).long(), torch.ones(3), 1.0), "weights must be a floating-point tensor"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
