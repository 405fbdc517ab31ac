import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from torch import nn

from posterity.representation import (
    DeepGeoCCA,
    GeodesicCCA,
    SPDEncoder,
    frechet_mean,
    geodesic_correlation,
    tangent_vectors,
)
from posterity.testing import check_estimator


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def spd(n, c, seed=0):
    a = randn(n, c, 3 * c, seed=seed)
    return a @ a.mT / c


def plain_cca(x, y):
    """Canonical correlations by QR and SVD."""
    q = [np.linalg.qr(v - v.mean(0))[0] for v in (x.numpy(), y.numpy())]
    return torch.from_numpy(np.linalg.svd(q[0].T @ q[1], compute_uv=False))


def shared(n=80, seed=0, c=3):
    """Covariances of two views, one power in common."""
    power = randn(n, seed=seed)
    views = []
    for k in (1, 2):
        scale = randn(n, c, seed=seed + k)
        scale[:, 0] = power
        mix = torch.linalg.qr(randn(c, c, seed=seed + 10 + k)).Q
        noise = 0.05 * spd(n, c, seed=seed + 20 + k)
        views.append(mix @ torch.diag_embed(scale.exp()) @ mix.T + noise)
    return *views, power


def test_of_vectors_and_of_commuting_matrices_it_is_canonical_correlation():
    x, y = randn(60, 4), randn(60, 3, seed=1)
    y[:, 0] += x[:, 1]
    torch.testing.assert_close(geodesic_correlation(x, y, ridge=0.0), plain_cca(x, y), rtol=1e-8, atol=1e-8)
    theirs = CCA(2, max_iter=5000, tol=1e-10).fit(x.numpy(), y.numpy()).transform(x.numpy(), y.numpy())
    corr = [np.corrcoef(theirs[0][:, k], theirs[1][:, k])[0, 1] for k in range(2)]
    torch.testing.assert_close(geodesic_correlation(x, y, ridge=0.0)[:2], torch.tensor(corr, dtype=torch.float64), rtol=1e-6, atol=1e-6)  # fmt: skip
    a, b = (torch.diag_embed(v.exp()) for v in (x[:, :3], y))
    found = geodesic_correlation(a, b, ridge=0.0)[:3]
    torch.testing.assert_close(found, plain_cca(x[:, :3], y), rtol=1e-8, atol=1e-8)
    mixed = geodesic_correlation(a, y, ridge=0.0)
    torch.testing.assert_close(mixed, plain_cca(x[:, :3], y), rtol=1e-8, atol=1e-8)


def test_other_coordinates_change_nothing_and_a_view_is_itself():
    x, y = spd(60, 3), spd(60, 2, seed=1)
    g, h = randn(3, 3, seed=2), randn(2, 2, seed=3)
    value = geodesic_correlation(x, y, ridge=0.0)
    torch.testing.assert_close(
        geodesic_correlation(g @ x @ g.T, h @ y @ h.T, ridge=0.0), value, rtol=1e-7, atol=1e-8
    )
    assert value.shape == (3,) and (value.diff() <= 0).all()
    for other in (x, g @ x @ g.T):
        torch.testing.assert_close(
            geodesic_correlation(x, other, ridge=0.0), torch.ones(6, dtype=torch.float64)
        )
    assert geodesic_correlation(x, y, ridge=0.1)[0] < value[0]
    assert geodesic_correlation(x, y, n_components=2).shape == (2,)


def test_the_correlation_is_that_of_coordinates_along_geodesics():
    x, y, _ = shared()
    model = GeodesicCCA(2, ridge=0.0).fit(x, y)
    torch.testing.assert_close(
        torch.from_numpy(model.correlations_), geodesic_correlation(x, y, ridge=0.0, n_components=2)
    )
    mean = frechet_mean(x)
    np.testing.assert_allclose(model.mean_x_, mean.numpy())
    scores = tangent_vectors(x, mean).numpy() @ model.directions_x_
    np.testing.assert_allclose(model.transform(x), scores - scores.mean(0), atol=1e-9)
    ours, theirs = model.transform(x, y)
    for k in range(2):
        assert np.corrcoef(ours[:, k], theirs[:, k])[0, 1] == pytest.approx(model.correlations_[k])
    assert abs(np.corrcoef(ours[:, 0], ours[:, 1])[0, 1]) < 1e-8
    assert model.score(x, y) == pytest.approx(model.correlations_.mean())


def test_the_shared_source_is_found_on_other_pairs():
    x, y, power = shared(200)
    model = GeodesicCCA(1).fit(x[:100], y[:100])
    score = model.transform(x[100:])[:, 0]
    assert abs(np.corrcoef(score, power[100:])[0, 1]) > 0.95


def test_it_has_a_gradient():
    x, y = spd(8, 2).requires_grad_(), randn(8, 2, seed=1).requires_grad_()
    mean = frechet_mean(x.detach())

    def value(x, y):
        return geodesic_correlation((x + x.mT) / 2, y, mean_x=mean, n_components=2, ridge=0.1)

    assert torch.autograd.gradcheck(value, (x, y))


def test_few_samples_without_a_ridge_are_warned_of():
    with pytest.warns(UserWarning, match="correlate whatever they are"):
        geodesic_correlation(spd(10, 3), spd(10, 3, seed=1), ridge=0.0)


# The model.


def model(**options):
    torch.manual_seed(0)
    return DeepGeoCCA(SPDEncoder(6, (), 2), SPDEncoder(5, (), 2), **options).double()


def pairs(n=40, seed=0):
    power = randn(n, seed=seed).exp()
    views = []
    for c, k in ((6, 1), (5, 2)):
        scale = randn(n, c, seed=seed + k).exp()
        scale[:, 0] = power
        mix = torch.linalg.qr(randn(c, c, seed=k)).Q
        views.append(mix @ torch.diag_embed(scale) @ mix.T)
    return views


def test_the_loss_is_minus_the_mean_correlation_of_latents_and_training_lowers_it():
    net, (x, y) = model(n_components=2), pairs()
    latents = net(x, y)
    expected = -geodesic_correlation(*latents, n_components=2).mean()
    torch.testing.assert_close(net.loss(x, y), expected)
    ours, theirs = (torch.autograd.grad(v, list(net.parameters())) for v in (net.loss(x, y), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # through the means too
    assert net(x)[1] is None and net(y=y)[0] is None
    opt = torch.optim.Adam(net.parameters(), lr=0.02)
    start = float(expected.detach())
    for _ in range(60):
        opt.zero_grad()
        value = net.loss(x, y)
        value.backward()
        opt.step()
    assert float(value.detach()) < start - 0.02


def test_means_run_along_geodesics_in_training_and_directions_are_those_of_a_set():
    net = model(mean_momentum=0.3)
    (x, y), (x2, y2) = pairs(), pairs(seed=50)
    net.loss(x, y)
    first = frechet_mean(net(x)[0].detach())
    torch.testing.assert_close(net.mean_x, first)
    net.loss(x2, y2)
    second = frechet_mean(net(x2)[0].detach())
    from posterity.representation.spd import geodesic

    torch.testing.assert_close(net.mean_x, geodesic(first, second, 0.3))
    running = net.mean_x.clone()
    net.eval().loss(x, y)
    assert torch.equal(net.mean_x, running)
    net.train().fit_directions(x, y)
    assert net.training
    ours, theirs = net.project(x, y)
    own = GeodesicCCA(1).fit(net(x)[0].detach(), net(y=y)[1].detach())
    np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(own.transform(net(x)[0].detach())), atol=1e-7)
    assert theirs.shape == (40, 1) and net.project(x)[1] is None
    again = model(mean_momentum=0.3)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.project(x)[0], ours)


def test_a_view_may_be_vectors():
    torch.manual_seed(0)
    net = DeepGeoCCA(SPDEncoder(6, (), 2), nn.Linear(4, 2)).double()
    x, y = pairs()[0], randn(40, 4)
    net.loss(x, y).backward()
    assert net.mean_y.shape == (2,)
    first = net.mean_y.clone()
    net.loss(x, y + 1)
    torch.testing.assert_close(net.mean_y, 0.9 * first + 0.1 * net(y=y + 1)[1].detach().mean(0))
    assert net.fit_directions(x, y).project(x, y)[1].shape == (40, 1)


# The estimator, and what is refused.


def test_the_estimator_is_one_of_scikit_learns(as_a_user):
    check_estimator(GeodesicCCA(1))


X, Y = spd(12, 2), spd(12, 2, seed=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: geodesic_correlation(X, Y[:11]), "y must have as many rows as x"),
        (lambda: geodesic_correlation(X[:2], Y[:2]), "at least 3 rows"),
        (lambda: geodesic_correlation(X, Y, n_components=4), "n_components must be at most 3"),
        (lambda: geodesic_correlation(X, Y, ridge=-1.0), "ridge"),
        (lambda: geodesic_correlation(-X, Y), "x must be positive definite, 12 of 12"),
        (lambda: geodesic_correlation(X, Y.long()), "y must be a floating"),
        (lambda: geodesic_correlation(X, Y, mean_y=torch.eye(3).double()), "mean_y must have shape"),
        (lambda: geodesic_correlation(X[:, :1], Y), "x must have square matrices"),
        (lambda: geodesic_correlation(X + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), Y), "x must be symmetric, matrix 0"),
        (lambda: geodesic_correlation(X, Y * torch.ones(12, 1, 1).index_fill(0, torch.tensor([5, 8]), -1)), "y must be positive definite, 2 of 12 are not, the first is matrix 5: shrink"),
        (lambda: geodesic_correlation(X, Y + 0j), "y must be a floating"),
        (lambda: geodesic_correlation(X, torch.full((12, 2), torch.nan)), "y must be finite"),
        (lambda: geodesic_correlation(X[:, 0, 0], Y), "x must have shape"),
        (lambda: model(ridge=-1.0), "ridge"),
        (lambda: model(n_components=4).loss(*pairs()), "n_components must be at most 3"),
        (lambda: GeodesicCCA(1, ridge=-1.0).fit(X, Y), "ridge"),
        (lambda: GeodesicCCA(1).fit(X, Y).score(X, Y[:5]), "y must have as many rows as X"),
        (lambda: model().project(pairs()[0]), "fit_directions"),
        (lambda: model(n_components=0), "n_components"),
        (lambda: model(mean_momentum=0), "mean_momentum"),
        (lambda: GeodesicCCA(2).fit(X, Y).transform(spd(3, 3)), "is expecting 2 features"),
        (lambda: GeodesicCCA(9).fit(X, Y), "n_components must be at most 3"),
        (lambda: GeodesicCCA(1).fit(X, Y[:5]), "y must have as many rows as X"),
        (lambda: GeodesicCCA(1).fit(np.ones((3, 1, 4, 4)), Y), "X must have shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
