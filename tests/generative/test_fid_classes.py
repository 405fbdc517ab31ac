"""The Fréchet distance against scipy's matrix square root, its gradients against differences, and what games it."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from posterity.generative import (
    FeatureStats,
    FrechetDistance,
    Resampling,
    add_to_stats,
    class_indicators,
    feature_stats,
    frechet_distance,
    match_class_histogram,
    resample_weights,
    sample_influence,
    sensitivity_map,
)
from posterity.testing import check_metric


def draw(n, d=4, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def fid(real, generated):
    return frechet_distance(feature_stats(real), feature_stats(generated))


def by_square_root(a, b):
    """Equation 1 as the original metric computes it, by numpy and scipy."""
    a, b = a.numpy(), b.numpy()
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = np.real(sqrtm(cov_a @ cov_b))
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)


# --- the distance ---


def test_is_that_of_the_matrix_square_root():
    for seed in range(5):
        for d in (1, 2, 7):
            a, b = draw(60, d, seed), draw(40, d, seed + 10, 2.0, 1.0)
            assert float(fid(a, b)) == pytest.approx(by_square_root(a, b), rel=1e-6)


def test_known_distances():
    x = draw(50)
    trace = float(feature_stats(x).cov.trace())
    shift = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    assert float(fid(x, x + shift)) == pytest.approx(14.25, abs=1e-10)  # |shift|^2
    assert float(fid(x, x.mean(0) + 3 * (x - x.mean(0)))) == pytest.approx(
        4 * trace, rel=1e-10
    )  # (c - 1)^2 tr C
    assert float(fid(x, x)) <= 1e-12 * trace
    # covariances that commute: the distance of the deviations along their common axes
    axes = torch.linalg.qr(draw(4, 4, 3)).Q
    one, two = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 0.25, 0.0, 1.0]).double()
    stats = [FeatureStats(torch.zeros(4).double(), axes * v @ axes.mT, 100.0) for v in (one, two)]
    assert float(frechet_distance(*stats)) == pytest.approx(1 + 2.25 + 9 + 1, abs=1e-10)


def test_does_not_know_which_is_which_nor_how_axes_lie():
    a, b = draw(30), draw(20, seed=1, shift=1.0)
    assert float(fid(a, b)) == pytest.approx(float(fid(b, a)), rel=1e-12)
    turn = torch.linalg.qr(draw(4, 4, 2)).Q
    assert float(fid(a @ turn, b @ turn)) == pytest.approx(float(fid(a, b)), rel=1e-10)
    far = torch.full((4,), 1e6).double()
    assert float(fid(a + far, b + far)) == pytest.approx(float(fid(a, b)), rel=1e-8)


def test_of_a_set_to_itself_is_nothing_also_where_variances_span_ten_orders():
    x = draw(200, 30) * torch.logspace(0, -5, 30).double()
    assert float(fid(x, x)) < 1e-10 * float(feature_stats(x).cov.trace())


@pytest.mark.parametrize("decay", [0.0, -7.0])
def test_wide_features_are_those_of_a_block_beside_itself(decay):
    """Of blocks that vary apart, the distances add up; a steep spectrum takes the slower, exact way."""
    a, b = draw(30), draw(30, seed=1, shift=1.0)
    one, other = feature_stats(a), feature_stats(b)
    units = torch.logspace(0, decay, 70).double()
    many = [
        FeatureStats(
            torch.cat([u * s.mean for u in units]), torch.block_diag(*(u**2 * s.cov for u in units)), 1e4
        )
        for s in (one, other)
    ]
    expected = float(frechet_distance(one, other)) * float(units.square().sum())
    assert float(frechet_distance(*many)) == pytest.approx(expected, rel=1e-7)


def test_fewer_samples_than_features_give_the_value_and_a_warning():
    a, b = draw(5, 12), draw(6, 12, 1)
    with pytest.warns(UserWarning, match="has . samples of 12 features"):
        value = float(fid(a, b))
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    expected = np.square((a.mean(0) - b.mean(0)).numpy()).sum() + np.trace(cov_a + cov_b) - 2 * trace
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_gradients_are_those_of_an_eigendecomposition(flip):
    """Autograd through eigh, which is right for distinct eigenvalues."""
    a, b = draw(30).requires_grad_(), draw(25, seed=1, shift=0.5).requires_grad_()

    def plain(a, b):
        cov_a, cov_b = (torch.cov(x.mT) for x in (a, b))
        values, vectors = torch.linalg.eigh(cov_a)
        root = (vectors * values.sqrt()) @ vectors.mT
        trace = torch.linalg.eigvalsh(root @ cov_b @ root).sqrt().sum()
        return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace

    expected = torch.autograd.grad(plain(a, b), (a, b))
    got = torch.autograd.grad(fid(b, a) if flip else fid(a, b), (a, b))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_gradients_pass_central_differences():
    a, b = draw(8, 3), draw(7, 3, 1).requires_grad_()
    logs = torch.linspace(-1, 1, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: frechet_distance(feature_stats(a), feature_stats(x, w)), (b, logs)
    )


@pytest.mark.filterwarnings("ignore:. has . samples")
def test_gradients_stay_finite_where_features_are_dead_or_samples_few():
    dead = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    cases = [(draw(20) * dead, draw(20, seed=1) * dead), (draw(20) * dead, draw(20, seed=1) * dead.flip(0)),
             (draw(3), draw(3, seed=1)), (torch.zeros(5, 4), draw(9)), (draw(20), draw(20))]  # fmt: skip
    for a, b in cases:
        a, b = a.double().clone().requires_grad_(), b.clone().requires_grad_()
        for gradient in torch.autograd.grad(fid(a, b), (a, b)):
            assert gradient.isfinite().all()
    # of what varies in both sets, the gradient is that of the sets without the dead features
    a, b = draw(20) * dead, (draw(20, seed=1) * dead).requires_grad_()
    few = b.detach()[:, :2].clone().requires_grad_()
    (whole,), (part,) = torch.autograd.grad(fid(a, b), b), torch.autograd.grad(fid(a[:, :2], few), few)
    torch.testing.assert_close(whole[:, :2], part)


# --- statistics ---


def test_integer_weights_are_repetitions():
    x, counts = draw(6), torch.tensor([1, 3, 0, 2, 1, 5])
    weighted = feature_stats(x, counts.double().log())
    repeated = feature_stats(x.repeat_interleave(counts, 0))
    assert float(weighted.n) == pytest.approx(repeated.n)
    torch.testing.assert_close(tuple(weighted[:2]), tuple(repeated[:2]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        tuple(feature_stats(x, torch.zeros(6))[:2]), tuple(feature_stats(x)[:2]), rtol=1e-14, atol=1e-15
    )
    np.testing.assert_allclose(feature_stats(x).cov, np.cov(x.numpy(), rowvar=False), rtol=1e-12)


def test_one_sample_more_is_exact():
    x = draw(9)
    for n in (1, 2, 8):
        start = feature_stats(x[:n]) if n > 1 else FeatureStats(x[0], torch.zeros(4, 4).double(), 1)
        got = add_to_stats(start, x[n])
        torch.testing.assert_close(
            tuple(got[:2]), tuple(feature_stats(x[: n + 1])[:2]), rtol=1e-12, atol=1e-14
        )
        assert got.n == n + 1
    assert torch.equal(add_to_stats(start, x[8]).cov, add_to_stats(start, x[8:]).cov)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_distance_of_the_rounded_numbers(as_a_user, dtype):
    a, b = (x.to(dtype) for x in (draw(300, shift=50.0), draw(300, seed=1, shift=50.0)))
    expected = fid(a.double(), b.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fid(a, b), expected)
    b.requires_grad_()
    fid(a, b).backward()
    assert b.grad.dtype == dtype and b.grad.isfinite().all()
    assert frechet_distance(*(FeatureStats(s.mean.float(), s.cov.float(), s.n) for s in map(feature_stats, (a, b)))).dtype == torch.float32  # fmt: skip


class Pairs:
    """The streaming form, updated with both sets at once."""

    def __init__(self):
        self.metric = FrechetDistance()

    def update(self, real, generated):
        self.metric.update(real, real=True)
        self.metric.update(generated, real=False)

    def compute(self):
        return self.metric.compute()

    def reset(self):
        self.metric.reset()


def test_conforms_to_its_kind(as_a_user):
    known = [((torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])), 11.0)]
    check_metric(fid, draw(20), draw(20, seed=1, shift=0.3), known=known, streaming=Pairs)


def test_a_stream_in_uneven_batches_is_one_batch_and_two_streams_are_their_union():
    a, b = draw(50, shift=1e3), draw(40, seed=1, shift=1e3)
    expected = float(fid(a, b))
    metric, other = FrechetDistance(dim=4), FrechetDistance()
    for part in a.split([1, 20, 29]):
        metric.update(part, real=True)
    metric.update(b[:1], real=False)
    other.update(b[1:], real=False)
    other.merge_state(metric)  # which holds no real batch yet
    assert float(other.compute()) == pytest.approx(expected, rel=1e-10)
    assert sum(x.numel() for x in metric.real) == 6 * 4  # no features are kept


def test_a_metric_takes_images_through_an_extractor_as_it_is():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout())
    images = torch.randint(255, (30, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    metric = FrechetDistance(lambda x: net[:2](x.float()))
    module = FrechetDistance(net)
    for real, part in ((True, images[:15]), (False, images[15:])):
        metric.update(part, real)
        module.update(part.float(), real)
    assert net.training and net[2].training
    assert float(module.compute()) == float(metric.compute())
    with torch.no_grad():
        features = net[:2](images.float())
    assert float(metric.compute()) == pytest.approx(float(fid(features[:15], features[15:])), rel=1e-9)


# --- classes ---


def test_indicators_mark_the_largest_and_the_middle_logits():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert class_indicators(logits, logits, 2)[0].tolist() == [
        [1, 1, 0, 0],
        [0, 0, 1, 1],
    ]  # classes 0, 1, 4, 5
    turned = torch.stack([logits[0].roll(k) for k in range(6)])  # each class is in the middle of some row
    for n, marked in ((1, [3]), (2, [2, 3]), (3, [2, 3, 4]), (4, [1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])):
        row = class_indicators(turned, turned, n, which="middle")[0][0]
        assert row.nonzero()[:, 0].tolist() == marked
    assert class_indicators(logits.half(), logits.double())[1].dtype == torch.float64


def test_aligned_classes_are_as_frequent_as_real_ones():
    rng = torch.Generator().manual_seed(0)
    real, generated = torch.randint(5, (200,), generator=rng), torch.randint(1, 6, (150,), generator=rng)
    logs = match_class_histogram(real, generated, n_classes=7)
    weights = logs.exp()
    assert float(weights.sum()) == pytest.approx(150)
    assert (logs[generated == 5] == -math.inf).all()  # no real sample has it
    kept = real[real > 0]  # no generated sample has class 0
    got = torch.bincount(generated, weights, minlength=7) / 150
    torch.testing.assert_close(
        got, torch.bincount(kept, minlength=7).double() / len(kept), rtol=1e-12, atol=0
    )


def test_alignment_in_closed_form_is_where_the_top_1_problem_is_stationary():
    rng = torch.Generator().manual_seed(0)
    real, generated = torch.randint(4, (120,), generator=rng), torch.randint(4, (120,), generator=rng)
    one_hot = torch.eye(4, dtype=torch.float64)
    logs = match_class_histogram(real, generated, n_classes=4).requires_grad_()
    value = frechet_distance(feature_stats(one_hot[real]), feature_stats(one_hot[generated], logs))
    assert value.item() == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(value, logs)
    assert slope.abs().max() < 1e-10
    start = sample_influence(feature_stats(one_hot[real]), one_hot[generated])
    assert start.abs().max() > 1e-4
    found = resample_weights(one_hot[real], one_hot[generated], max_iter=400).log_weights.exp()
    assert (found - logs.detach().exp()).abs().max() < 0.05


# --- resampling ---


def test_candidates_that_contain_the_real_set_are_found():
    real = draw(60)
    found = resample_weights(real, torch.cat([real, draw(200, seed=1, shift=1.0)]), max_iter=300)
    assert found.history.min() < 0.05 * found.history[0]
    assert float(found.log_weights.exp().sum()) == pytest.approx(260)
    drawn = found.sample(10_000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=260) / 10_000
    assert (shares - found.log_weights.exp() / 260).abs().max() < 0.01


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.05), ("adam", 5.0), ("sgd", 1e4)])
def test_never_ends_above_its_start_and_returns_what_its_history_says(optimizer, lr):
    real, generated = draw(40), draw(70, seed=1, shift=0.5)
    found = resample_weights(real, generated, max_iter=12, lr=lr, optimizer=optimizer)
    value = float(frechet_distance(feature_stats(real), feature_stats(generated, found.log_weights)))
    assert value == pytest.approx(float(found.history.min()), rel=1e-9)
    assert float(found.history[0]) == pytest.approx(float(fid(real, generated)), rel=1e-10)
    assert value <= found.history[0] + 1e-12


def test_plain_descent_is_that_of_autograd():
    real, generated = draw(30), draw(50, seed=1, shift=0.5)
    found = resample_weights(real, generated, max_iter=5, lr=1.0, optimizer="sgd")
    logs = torch.zeros(50).double()
    for _ in range(5):
        logs.requires_grad_()
        value = frechet_distance(feature_stats(real), feature_stats(generated, logs))
        logs = (logs - torch.autograd.grad(value, logs)[0]).detach()
        logs = logs + math.log(50) - logs.logsumexp(0)
    torch.testing.assert_close(found.log_weights, logs, rtol=1e-9, atol=1e-10)


def test_adam_is_torchs_and_does_not_know_units():
    real, generated = draw(30), draw(50, seed=1, shift=0.5)
    logs = torch.zeros(50).double().requires_grad_()
    adam = torch.optim.Adam([logs], lr=0.05, eps=0)
    for _ in range(5):
        adam.zero_grad()
        frechet_distance(feature_stats(real), feature_stats(generated, logs)).backward()
        adam.step()
        logs.data += math.log(50) - logs.data.logsumexp(0)
    found = resample_weights(real, generated, max_iter=5)
    torch.testing.assert_close(found.log_weights, logs.detach(), rtol=1e-5, atol=1e-6)
    for unit in (1e-12, 1e12):
        torch.testing.assert_close(resample_weights(unit * real, unit * generated, max_iter=5)[0], found[0])


def test_stops_where_ten_steps_gained_no_more_than_tol():
    real, generated = draw(40), draw(70, seed=1, shift=0.5)
    long = resample_weights(real, generated, max_iter=100).history
    short = resample_weights(real, generated, max_iter=100, tol=0.3).history
    assert torch.equal(long[: len(short)], short)
    best = long.cummin(0).values
    first = next(k for k in range(10, 101) if best[k] > 0.7 * best[k - 10])
    assert len(short) == first + 1 < 101


def test_classes_in_the_middle_of_random_logits_do_not_help():
    rng = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, 20, generator=rng) for n in (200, 600)]
    real, generated = draw(200), draw(600, seed=1, shift=0.3)
    found = resample_weights(*class_indicators(*logits, 3, which="middle"), max_iter=50)
    assert found.history.min() < 0.5 * found.history[0]  # aligned they are
    stats = feature_stats(generated, found.log_weights)
    assert frechet_distance(feature_stats(real), stats) > 0.9 * fid(real, generated)


def test_influence_is_the_slope_of_the_distance_in_each_log_weight():
    real, generated = draw(30), draw(12, seed=1, shift=0.5)
    stats, slopes = feature_stats(real), []
    for i in range(12):
        bump = torch.zeros(12).double()
        bump[i] = 1e-5
        values = [float(frechet_distance(stats, feature_stats(generated, sign * bump))) for sign in (1, -1)]
        slopes.append((values[0] - values[1]) / 2e-5)
    np.testing.assert_allclose(sample_influence(stats, generated), slopes, rtol=1e-5, atol=1e-7)


def test_draws_are_the_generators_and_leave_out_what_weighs_nothing():
    logs = torch.tensor([0.0, 1.0, -math.inf, 2.0, -math.inf]).double()
    found = Resampling(logs, torch.zeros(1))
    state = torch.get_rng_state()
    one, two = (found.sample(4_000, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())
    shares = torch.bincount(one, minlength=5) / 4_000
    assert shares[[2, 4]].tolist() == [0, 0]
    assert (shares - logs.softmax(0)).abs().max() < 0.03


# --- bad input ---

X, S, NAN = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), feature_stats(draw(6, 3)), math.nan
IMAGES, NET = torch.zeros(1, 1, 4, 4), nn.Sequential(nn.Conv2d(1, 3, 2), nn.AvgPool2d(3), nn.Flatten())
CLASSES = torch.zeros(4, dtype=torch.long)
TWICE = nn.ReLU()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_stats(X.long()), "features must be a floating-point tensor, got dtype torch.int64"),
        (lambda: feature_stats(None), "features must be a floating-point tensor, got NoneType"),
        (lambda: feature_stats(X[None]), r"features must have shape \(n, d\), got \(1, 6, 3\): pass images"),
        (lambda: feature_stats(X[:1]), "features must have at least 2 samples, got 1"),
        (lambda: feature_stats(X * NAN), "features must be finite"),
        (lambda: feature_stats(X.double() * 1e200), "features must have finite squares"),
        (lambda: feature_stats(X, torch.zeros(5)), r"log_weights must have shape \(6\) for features"),
        (lambda: feature_stats(X, torch.tensor([0.0, *[-math.inf] * 5])), "log_weights must give weights to at least 2"),
        (lambda: feature_stats(X, torch.full((6,), -9.0)), "of a sum above 1"),
        (lambda: feature_stats(X, torch.full((6,), NAN)), "log_weights must not be NaN"),
        (lambda: add_to_stats(S, X[0, :2]), r"feature must have shape \(3\) for stats"),
        (lambda: add_to_stats(S, X[0] * NAN), "feature must be finite"),
        (lambda: add_to_stats(None, X[0]), "stats must be FeatureStats"),
        (lambda: frechet_distance(S, feature_stats(X[:, :2])), "b must have as many features as a, 3, got 2"),
        (lambda: frechet_distance(S, X), "b must be FeatureStats, as feature_stats makes them, got Tensor"),
        (lambda: frechet_distance(S, S._replace(cov=S.cov * NAN)), "b must be finite"),
        (lambda: frechet_distance(S, S._replace(cov=S.cov[:2])), r"b.cov must have shape \(3, 3\)"),
        (lambda: frechet_distance(S._replace(n=0), S), "a.n must be a number of samples"),
        (lambda: frechet_distance(S, S._replace(cov=-S.cov)), "cov must be a covariance, but has an eigenvalue"),
        (lambda: FrechetDistance().update(IMAGES.byte(), real=True), "images need an extractor"),
        (lambda: FrechetDistance().update(IMAGES, real=True), "images need an extractor"),
        (lambda: FrechetDistance().update(X, real=1), "real must be True or False"),
        (lambda: FrechetDistance(dim=4).update(X, real=True), "must have 4 features, got 3"),
        (lambda: FrechetDistance(nn.Identity()).update(IMAGES, real=True), "what extractor returns must have shape"),
        (lambda: FrechetDistance("inception"), "extractor must be callable"),
        (lambda: FrechetDistance(dim=0), "dim must be an integer of at least 1"),
        (lambda: FrechetDistance().compute(), "real=True must have had at least 2 samples before compute, got 0"),
        (lambda: class_indicators(X, X[:, :2]), r"gen_logits must have shape \(any, 3\) for real_logits"),
        (lambda: class_indicators(X, X, 4), "n must be at most the number of classes, 3, got 4"),
        (lambda: class_indicators(X, X, 0), "n must be an integer of at least 1"),
        (lambda: class_indicators(X, X, which="bottom"), "which must be one of"),
        (lambda: class_indicators(X * NAN, X), "real_logits must be finite"),
        (lambda: class_indicators(torch.eye(2)[:1], torch.eye(2)[1:]), "must have a class in common"),
        (lambda: match_class_histogram(CLASSES - 1, CLASSES, n_classes=2), r"real_classes must be in 0\.\.1"),
        (lambda: match_class_histogram(CLASSES, CLASSES + 2, n_classes=2), r"gen_classes must be in 0\.\.1"),
        (lambda: match_class_histogram(CLASSES, CLASSES + 1, n_classes=2), "must have a class in common"),
        (lambda: match_class_histogram(CLASSES.float(), CLASSES, n_classes=2), "real_classes must hold class indices"),
        (lambda: match_class_histogram(CLASSES[:0], CLASSES, n_classes=2), "at least one class"),
        (lambda: match_class_histogram(CLASSES, CLASSES, n_classes=0), "n_classes must be an integer"),
        (lambda: resample_weights(X, X[:, :2]), r"generated must have shape \(any, 3\) for real"),
        (lambda: resample_weights(X[:1], X), "real must have at least 2 samples"),
        (lambda: resample_weights(X, X, max_iter=0), "max_iter must be an integer"),
        (lambda: resample_weights(X, X, lr=0.0), "lr must be greater than 0"),
        (lambda: resample_weights(X, 9 * X, lr=1e308, optimizer="sgd"), "lr must be smaller, weights are no longer finite"),
        (lambda: resample_weights(X, X, tol=-1.0), "tol must be at least 0"),
        (lambda: resample_weights(X, X, optimizer="lbfgs"), "optimizer must be one of"),
        (lambda: Resampling(torch.zeros(3), torch.zeros(1)).sample(0), "n must be an integer"),
        (lambda: sample_influence(S, X[:, :2]), "generated must have as many features as real, 3, got 2"),
        (lambda: sample_influence(X, X), "real must be FeatureStats"),
        (lambda: sensitivity_map(NET, nn.Conv2d(1, 3, 2), IMAGES, S, S), "layer must be a module inside extractor"),
        (lambda: sensitivity_map(None, NET[0], IMAGES, S, S), "extractor must be a module"),
        (lambda: sensitivity_map(NET, NET[2], IMAGES, S, S), r"layer must give .* \(b, c, h, w\), gave \(1, 3\)"),
        (lambda: sensitivity_map(NET, NET[0], IMAGES[0], S, S), "image must have shape"),
        (lambda: sensitivity_map(NET, NET[0], IMAGES, S, S, size=(0, 2)), "size must be an integer of at least 1"),
        (lambda: sensitivity_map(NET, NET[0], IMAGES, S, feature_stats(X[:, :2])), "generated must have as many"),
        (lambda: sensitivity_map(nn.Sequential(NET[0], TWICE, TWICE, *NET[1:]), TWICE, IMAGES, S, S), "was called 2 times"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_metric_without_torchmetrics_says_what_to_install(monkeypatch):
    import posterity.generative.frechet_metric as module

    monkeypatch.setattr(module, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"posterity\[generative\]"):
        FrechetDistance()
