"""The decomposition against loops over members, its identities, and the line and the link that follow from it."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from scipy.stats import linregress, spearmanr

from posterity.dynamics import (
    BiasVariance,
    alignment,
    bias_variance,
    calibration_link,
    ensemble_predictions,
    neural_collapse_ensemble,
)
from posterity.testing import check_instrument


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(m=5, n=40, k=4, seed=0, scale=2.0):
    return scale * torch.randn(m, n, k, dtype=torch.float64, generator=rng(seed))


def labels(n=40, k=4, seed=1):
    return torch.randint(k, (n,), generator=rng(seed))


# --- the decomposition ---


def test_squared_loss_is_decomposed_as_a_loop_over_members_and_classes_does():
    p, y = logits().softmax(-1), labels()
    found = bias_variance(p, y)
    m, n, k = p.shape
    for j in range(n):
        centre = [sum(float(p[i, j, c]) for i in range(m)) / m for c in range(k)]
        target = [float(c == int(y[j])) for c in range(k)]
        bias = sum((centre[c] - target[c]) ** 2 for c in range(k))
        spread = sum((float(p[i, j, c]) - centre[c]) ** 2 for i in range(m) for c in range(k)) / m
        risk = sum((float(p[i, j, c]) - target[c]) ** 2 for i in range(m) for c in range(k)) / m
        for ours, theirs in ((found.bias2, bias), (found.variance, spread), (found.risk, risk)):
            assert float(ours[j]) == pytest.approx(theirs, rel=1e-12, abs=1e-14)
        assert bool(found.correct[j]) == (max(range(k), key=centre.__getitem__) == int(y[j]))
    torch.testing.assert_close(found.mean, p.mean(0))


def test_cross_entropy_is_decomposed_around_the_normalised_geometric_mean():
    z, y = logits(), labels()
    found = bias_variance(z, y, loss="kl", from_logits=True)
    logs = log_softmax(z.numpy(), axis=-1)
    geometric = np.exp(logs.mean(0)) / np.exp(logs.mean(0)).sum(-1, keepdims=True)
    rows = np.arange(len(y))
    np.testing.assert_allclose(found.bias2, -np.log(geometric[rows, y.numpy()]), rtol=1e-12)
    np.testing.assert_allclose(found.variance, rel_entr(geometric, np.exp(logs)).sum(-1).mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.risk, -logs[:, rows, y.numpy()].mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.mean, geometric, rtol=1e-12)
    again = bias_variance(z.softmax(-1), y, loss="kl")
    torch.testing.assert_close(again.variance, found.variance, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"loss": "kl"}])
def test_bias_and_variance_sum_to_the_risk(options):
    found = bias_variance(logits(scale=4), labels(), from_logits=True, **options)
    torch.testing.assert_close(found.bias2 + found.variance, found.risk, rtol=1e-12, atol=1e-12)
    assert (found.variance >= 0).all()
    assert (found.bias2 >= 0).all() or options.get("unbiased")


def test_equal_members_have_no_variance_and_one_member_is_its_own_mean():
    one = logits(1)
    for loss in ("squared", "kl"):
        for z in (one, one.expand(6, -1, -1)):
            found = bias_variance(z, labels(), loss=loss, from_logits=True)
            assert found.variance.max() <= 1e-30
            torch.testing.assert_close(found.bias2, found.risk)


def test_small_variance_keeps_its_digits():
    z = logits(1).expand(4, -1, -1) + 1e-9 * logits(4, seed=3)
    for loss in ("squared", "kl"):
        tiny = bias_variance(z, labels(), loss=loss, from_logits=True).variance
        large = bias_variance(
            logits(1) + 1e-4 * logits(4, seed=3), labels(), loss=loss, from_logits=True
        ).variance
        torch.testing.assert_close(
            tiny * 1e10, large, rtol=1e-3, atol=0.0
        )  # it is quadratic in the difference


def test_unbiased_estimates_have_the_exact_expectations_and_the_plug_in_is_high_by_variance_over_m():
    concentration = np.array([2.0, 1.0, 3.0])
    drawn = np.random.default_rng(0).dirichlet(concentration, size=(3, 4000))
    y = torch.zeros(4000, dtype=torch.int64)
    total = concentration.sum()
    mean = concentration / total
    variance = (mean * (1 - mean)).sum() / (total + 1)
    bias2 = ((mean - np.eye(3)[0]) ** 2).sum()
    found, plain = (bias_variance(drawn, y, unbiased=each) for each in (True, False))
    for ours, exact in (
        (found.bias2, bias2),
        (found.variance, variance),
        (plain.bias2, bias2 + variance / 3),
    ):
        assert abs(ours.mean() - exact) < 5 * ours.std() / math.sqrt(4000)


def test_orders_of_members_samples_and_classes_do_not_matter():
    z, y = logits(), labels()
    names, rows = torch.randperm(4, generator=rng(2)), torch.randperm(40, generator=rng(3))
    for loss in ("squared", "kl"):
        found = bias_variance(z, y, loss=loss, from_logits=True)
        renamed = bias_variance(z[:, :, names], names.argsort()[y], loss=loss, from_logits=True)
        moved = bias_variance(z.flip(0)[:, rows], y[rows], loss=loss, from_logits=True)
        shifted = bias_variance(z + 7.0, y, loss=loss, from_logits=True)
        for ours, back in ((renamed, slice(None)), (moved, rows.argsort()), (shifted, slice(None))):
            torch.testing.assert_close(ours.bias2[back], found.bias2)
            torch.testing.assert_close(ours.variance[back], found.variance)


def test_blocks_arrays_and_narrow_dtypes_give_the_same(monkeypatch):
    z, y = logits(), labels()
    found = bias_variance(z.softmax(-1), y)
    monkeypatch.setattr(import_module("posterity.dynamics.bias_variance"), "BLOCK", 1000)
    pieces = bias_variance(z.softmax(-1).numpy(), y.numpy().astype(np.int32))
    torch.testing.assert_close(pieces.bias2, found.bias2)
    torch.testing.assert_close(bias_variance(z.softmax(-1).mT.contiguous().mT, y).risk, found.risk)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = z.softmax(-1).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            narrow = bias_variance(p, y)
        assert narrow.bias2.dtype == torch.float64
        torch.testing.assert_close(
            narrow.bias2, bias_variance(p.double(), y).bias2
        ) if dtype == torch.float32 else None
        torch.testing.assert_close(narrow.bias2, found.bias2, rtol=0.05, atol=0.02)
    empty = bias_variance(z[:, :0], y[:0], from_logits=True)
    assert empty.mean.shape == (0, 4) and empty.risk.shape == (0,)


def test_huge_logits_and_certain_probabilities_stay_finite():
    z = torch.tensor([[[1e12, 0.0, -1e12]], [[0.0, 1e4, 0.0]]], dtype=torch.float64)
    for loss in ("squared", "kl"):
        found = bias_variance(z, torch.tensor([1]), loss=loss, from_logits=True)
        assert bool(found.risk.isfinite().all())
        torch.testing.assert_close(found.bias2 + found.variance, found.risk)
    certain = torch.eye(3)[None, :, :]
    found = bias_variance(certain, torch.tensor([0, 1, 0]), loss="kl")
    assert found.risk[0] == 0
    assert 80 < found.risk[2] < math.inf


def test_a_users_networks_are_left_alone(as_a_user):
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(3, 4), torch.randn(40, 3), labels()

    def look(net, x):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return bias_variance(torch.stack([net(x), 2 * net(x)]), y.to(x.device), from_logits=True)

    check_instrument(look, net, x)


# --- alignment ---


def made(bias2, variance, correct=None):
    bias2, variance = torch.as_tensor(bias2).double(), torch.as_tensor(variance).double()
    correct = torch.ones(len(bias2), dtype=torch.bool) if correct is None else correct
    return BiasVariance(bias2, variance, bias2 + variance, torch.zeros(len(bias2), 2), correct, 4)


def test_a_power_law_made_by_hand_is_found():
    bias2 = torch.logspace(-6, 0, 50, dtype=torch.float64)
    line = alignment(made(bias2, 3.0 * bias2**0.8))
    assert line.slope == pytest.approx(0.8)
    assert line.intercept == pytest.approx(math.log(3.0))
    assert line.r2 == pytest.approx(1.0)
    assert (line.n, line.n_dropped) == (50, 0)
    assert line.spearman == pytest.approx(1.0)


def test_the_line_is_least_squares_of_log_variance_on_log_bias_for_the_subset_asked():
    probs, y = neural_collapse_ensemble(200, 4, noise=(0.5, 2.0), n_models=4, generator=rng())
    bv = bias_variance(probs, y)
    for subset, rows in (
        ("correct", bv.correct), ("incorrect", ~bv.correct), ("all", bv.correct | True),
        (torch.arange(200) < 90, torch.arange(200) < 90),
    ):  # fmt: skip
        line = alignment(bv, subset=subset)
        a, b = bv.bias2[rows].log().numpy(), bv.variance[rows].log().numpy()
        theirs = linregress(a, b)
        assert line.slope == pytest.approx(theirs.slope)
        assert line.intercept == pytest.approx(theirs.intercept)
        assert line.r2 == pytest.approx(theirs.rvalue**2)
        assert line.log_ratio == pytest.approx((b - a).mean())
        assert line.log_ratio_std == pytest.approx((b - a).std(ddof=1))
        assert line.spearman == pytest.approx(spearmanr(a, b).statistic)
        assert line.n == int(rows.sum())


def test_samples_below_the_floor_are_dropped_and_counted():
    bv = made([1e-14, 0.1, 0.2, 0.4, math.inf, 0.3], [0.1, 0.1, 0.2, 0.4, 0.1, 1e-13])
    line = alignment(bv)
    assert (line.n, line.n_dropped) == (3, 3)
    assert line.slope == pytest.approx(1.0)
    assert alignment(bv, floor=1e-15).n == 5


def test_collapsed_networks_are_aligned():
    for scale, slope in ((5.0, (0.9, 1.5)), (10.0, (0.7, 1.4)), (20.0, (0.7, 1.2))):
        line = alignment(
            bias_variance(*neural_collapse_ensemble(500, 6, n_models=25, scale=scale, generator=rng()))
        )
        assert slope[0] < line.slope < slope[1]
        assert line.r2 > 0.8


# --- calibration ---


def test_labels_drawn_from_the_mean_have_the_expected_bias():
    p = torch.from_numpy(np.random.default_rng(0).dirichlet([1.0, 2.0, 0.5], size=(4, 5000)))
    y = torch.multinomial(p.mean(0), 1, generator=rng())[:, 0]
    link = calibration_link(bias_variance(p, y), n_bins=5)
    error = (bias_variance(p, y).bias2 - link.expected_bias2).std() / math.sqrt(5000)
    assert abs(link.residual) < 5 * error
    assert link.calibration_error < 0.03
    overconfident = calibration_link(bias_variance(p, (p.mean(0).argmax(1) + 1) % 3), n_bins=5)
    assert overconfident.residual > 0.2


def test_certain_members_reach_the_expected_bias_and_others_stay_below():
    certain = torch.eye(3, dtype=torch.float64)[torch.randint(3, (7, 50), generator=rng())]
    link = calibration_link(bias_variance(certain, labels(50, 3)))
    assert link.gap.max() < 1e-15
    p = logits(6, 60, 5).softmax(-1)
    bv = bias_variance(p, labels(60, 5))
    link = calibration_link(bv)
    assert (bv.variance >= 0).all()
    assert (bv.variance <= link.expected_bias2).all()
    assert (link.expected_bias2 <= 1 - 1 / 5).all()
    torch.testing.assert_close(link.gap, 1 - p.square().sum(-1).mean(0))
    torch.testing.assert_close(link.expected_bias2, 1 - p.mean(0).square().sum(-1))


def test_bins_hold_equally_many_samples_in_order():
    bv = bias_variance(logits(6, 62, 5).softmax(-1), labels(62, 5))
    link = calibration_link(bv, n_bins=6)
    assert sorted(link.bin_count.tolist()) == [10, 10, 10, 10, 11, 11]
    assert (link.bin_expected.diff() > 0).all()
    order = link.expected_bias2.argsort()
    torch.testing.assert_close(link.bin_bias2[0], bv.bias2[order[:11]].mean())
    torch.testing.assert_close(link.bin_variance[-1], bv.variance[order[-10:]].mean())
    weighted = (link.bin_count * (link.bin_bias2 - link.bin_expected).abs()).sum() / 62
    assert link.calibration_error == pytest.approx(float(weighted))


# --- ensembles ---


def rows_seen(X, y, X_test, seed):
    """A member that predicts which rows it was trained on, its labels and its seed."""
    counts = np.bincount(np.asarray(X)[:, 0].astype(int), minlength=30)
    return np.tile([*counts, seed], (len(X_test), 1)).astype(float)


DATA = np.arange(30.0)[:, None]


def seen(resample, y=None, **options):
    y = np.arange(30) % 3 if y is None else y
    return ensemble_predictions(rows_seen, DATA, y, DATA[:2], resample=resample, random_state=0, **options)


def test_members_differ_in_seed_and_in_the_rows_that_the_scheme_draws():
    for resample in ("none", "bootstrap", "split"):
        out = seen(resample, n_models=6)
        assert out.shape == (6, 2, 31)
        assert len(set(out[:, 0, -1].tolist())) == 6
        counts = out[:, 0, :-1]
        if resample == "none":
            assert (counts == 1).all()
        elif resample == "bootstrap":
            assert (counts.sum(1) == 30).all()
            assert (counts > 1).any(1).all()
        else:  # disjoint halves of three partitions that differ
            assert (counts[0::2] + counts[1::2] == 1).all()
            assert not torch.equal(counts[0], counts[2])


def test_a_random_state_decides_all_and_earlier_members_do_not_depend_on_later_ones():
    for resample in ("none", "bootstrap", "split"):
        assert torch.equal(seen(resample, n_models=5), seen(resample, n_models=7)[:5])
    other = ensemble_predictions(rows_seen, DATA, np.arange(30) % 3, DATA[:2], n_models=5, random_state=1)
    assert not torch.equal(other, seen("bootstrap", n_models=5))


@pytest.mark.parametrize("resample", ["bootstrap", "split"])
def test_every_resample_has_every_class_even_rare_ones(resample):
    y = np.zeros(30, dtype=int)
    y[[3, 11]] = 1  # a bootstrap lacks them in one draw of eight, a half in one of two
    y[[4, 20]] = 2
    counts = seen(resample, y, n_models=40)[:, 0, :-1]
    assert (counts[:, [3, 11]].sum(1) > 0).all()
    assert (counts[:, [4, 20]].sum(1) > 0).all()
    everything = np.arange(30) // 2  # no bootstrap at random has all fifteen: class by class
    counts = seen(resample, everything, n_models=4)[:, 0, :-1]
    assert (counts.reshape(4, 15, 2).sum(2) > 0).all()


def test_tensors_frames_and_sparse_matrices_come_as_they_are():
    pd = pytest.importorskip("pandas")
    from scipy.sparse import csr_matrix

    kinds = []

    def fit(X, y, X_test, seed):
        kinds.append((type(X), type(y), X.shape))
        return torch.ones(X_test.shape[0], 2, requires_grad=True)

    y = np.arange(30) % 2
    for X, labels_ in (
        (torch.from_numpy(DATA), torch.from_numpy(y)), (pd.DataFrame(DATA), pd.Series(y, index=range(5, 35))),
        (csr_matrix(DATA), y), (DATA, y.astype(str)),
    ):  # fmt: skip
        out = ensemble_predictions(fit, X, labels_, X, n_models=1, random_state=0)
        assert kinds.pop() == (type(X), type(labels_), (30, 1))
        assert out.shape == (1, 30, 2) and not out.requires_grad


def test_collapsed_predictions_are_those_of_the_formula():
    probs, y = neural_collapse_ensemble(50, 4, n_models=3, scale=2.0, noise=(0.1, 0.3), generator=rng(5))
    draw = rng(5)
    assert torch.equal(y, torch.randint(4, (50,), generator=draw))
    level = 0.1 + 0.2 * torch.rand(50, generator=draw, dtype=torch.float64)
    noise = torch.randn(3, 50, 4, generator=draw, dtype=torch.float64)
    w = math.sqrt(4 / 3) * (torch.eye(4, dtype=torch.float64) - 0.25)
    torch.testing.assert_close(probs, (2.0 * (w[y] + level[:, None] * noise) @ w.T).softmax(-1))


def test_results_draw_themselves():
    from matplotlib import pyplot

    bv = bias_variance(*neural_collapse_ensemble(60, 4, generator=rng()))
    for result in (bv, calibration_link(bv)):
        axes = pyplot.subplots()[1]
        assert result.plot(axes) is axes and axes.has_data()
        assert result.plot() is not axes
    pyplot.close("all")


# --- bad input ---


P = torch.full((2, 3, 2), 0.5)
Y = torch.zeros(3, dtype=torch.int64)
BV = made([0.1, 0.2, 0.4], [0.1, 0.2, 0.3])


def ensemble(**options):
    y = options.pop("y", np.arange(30) % 3)
    return ensemble_predictions(options.pop("fit", rows_seen), options.pop("X", DATA), y, DATA, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bias_variance(P[0], Y), r"probs must have shape \(any, any, any\), got \(3, 2\)"),
        (lambda: bias_variance(P[:0], Y), "probs must have a member and a class"),
        (lambda: bias_variance(P + 1, Y), "must sum to 1 in each row, .* pass from_logits=True for logits"),
        (lambda: bias_variance(P - torch.tensor([1.0, -1.0]), Y), "probs must not be negative, got -0.5: pass from_logits=True"),
        (lambda: bias_variance(P / 0, Y), "probs must be finite"),
        (lambda: bias_variance(P.int(), Y), "probs must be a floating-point tensor, got dtype torch.int32"),
        (lambda: bias_variance([[0.5]], Y), "probs must be a tensor or an array of numbers, got list"),
        (lambda: bias_variance(P, Y.float()), "y must hold class indices, got torch.float32"),
        (lambda: bias_variance(P, Y[:2]), r"y must have shape \(3\)"),
        (lambda: bias_variance(P, Y + 2), r"y must be in 0..1, got values from 2 to 2"),
        (lambda: bias_variance(P, Y, loss="hinge"), "loss must be one of"),
        (lambda: bias_variance(P[:1], Y, unbiased=True), "unbiased must be False for one member"),
        (lambda: bias_variance(P, Y, loss="kl", unbiased=True), "unbiased must be False .* 'kl'"),
        (lambda: alignment(BV, subset="wrong"), "subset must be one of 'correct', 'incorrect', 'all'"),
        (lambda: alignment(BV, subset=torch.ones(2, dtype=torch.bool)), "subset must hold 3 truth values"),
        (lambda: alignment(BV, subset=torch.ones(3)), "subset must hold 3 truth values, got torch.float32"),
        (lambda: alignment(BV, floor=0.3), r"subset must have 3 samples .* floor=0.3, got 1, 2 were not"),
        (lambda: alignment(BV, floor=-1), "floor must be at least 0"),
        (lambda: alignment(made([0.1] * 3, [0.1] * 3)), "samples of different bias2, all 3 have the same"),
        (lambda: calibration_link(bias_variance(P, Y, loss="kl"), n_bins=1), "bv must be of the squared loss"),
        (lambda: calibration_link(bias_variance(P, Y, unbiased=True), n_bins=1), "bv must be .* unbiased=True"),
        (lambda: calibration_link(BV), "n_bins must be at most the number of samples, 3, got 15"),
        (lambda: calibration_link(BV, n_bins=0), "n_bins must be an integer of at least 1"),
        (lambda: ensemble(resample="split", n_splits=1), r"n_splits must be in 2..10, the examples of the smallest"),
        (lambda: ensemble(resample="split", n_splits=11), r"n_splits must be in 2..10"),
        (lambda: ensemble(resample="jackknife"), "resample must be one of"),
        (lambda: ensemble(n_models=0), "n_models must be an integer of at least 1"),
        (lambda: ensemble(random_state=-1), "random_state must be an integer of at least 0"),
        (lambda: ensemble(y=np.zeros(3)), r"y must hold a label for each of the 30 rows of X"),
        (lambda: ensemble(X=3.0), "X and X_test must be tensors, arrays or tables"),
        (lambda: ensemble(fit=lambda *_: np.ones(30)), r"fit_predict must return an array of shape \(30, classes\)"),
        (lambda: ensemble(fit=lambda *_: np.ones((2, 3))), r"fit_predict must return .* got \(2, 3\)"),
        (lambda: neural_collapse_ensemble(5, 1), "n_classes must be an integer of at least 2"),
        (lambda: neural_collapse_ensemble(5, 2, scale=0.0), "scale must be greater than 0"),
        (lambda: neural_collapse_ensemble(5, 2, noise=(0.5, 0.1)), "noise must be a lowest and a highest level"),
        (lambda: neural_collapse_ensemble(5, 2, n_models=0), "n_models must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
