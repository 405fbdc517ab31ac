"""The estimators of TimesNet: windows and their averages by loops, what is held out, scikit-learn's checks."""

import numpy as np
import pytest
import torch

from posterity.testing import check_estimator
from posterity.timeseries import TimesNetClassifier, TimesNetDetector, TimesNetForecaster, TimesNetImputer

QUICK = {"d_model": 4, "d_ff": 4, "n_layers": 1, "n_kernels": 2, "top_k": 2}
BRISK = {**QUICK, "d_model": 8, "d_ff": 8, "lr": 2e-2, "dropout": 0.0}  # learns a rhythm in a few epochs


def daily(time=260, channels=2, noise=0.05):
    t = np.arange(time)[:, None]
    clean = (
        np.sin(2 * np.pi * (t / 12 + np.arange(channels) / 5)) * [1.0, 20.0][:channels]
        + [0.0, 100.0][:channels]
    )
    return clean + noise * np.random.default_rng(0).normal(size=clean.shape)


def test_forecasts_follow_a_rhythm_and_fall_back_on_the_training_series():
    X = daily()
    model = TimesNetForecaster(horizon=6, seq_len=24, max_epochs=4, random_state=0, **BRISK).fit(X[:240])
    forecast = model.predict()
    assert forecast.shape == (6, 2)
    assert (
        np.abs((forecast - X[240:246]) / X.std(0)).mean()
        < 0.5 * np.abs((X[239] - X[240:246]) / X.std(0)).mean()
    )
    np.testing.assert_allclose(model.predict(X[:240]), forecast)
    windows = np.stack([X[s : s + 24] for s in range(0, 200, 7)])
    many = model.predict(windows)
    assert many.shape == (len(windows), 6, 2)
    np.testing.assert_allclose(many[3], model.predict(windows[3]), rtol=1e-4, atol=1e-4)


def test_imputer_fills_gaps_only_and_beats_the_mean():
    X = daily()
    gaps = np.random.default_rng(1).random(X.shape) < 0.2
    model = TimesNetImputer(seq_len=24, max_epochs=4, random_state=0, **BRISK)
    filled = model.fit_transform(np.where(gaps, np.nan, X))
    np.testing.assert_array_equal(filled[~gaps], X[~gaps])
    assert np.isfinite(filled).all()
    assert (((filled - X) / X.std(0))[gaps] ** 2).mean() < 0.3
    np.testing.assert_array_equal(model.transform(X), X)


def test_imputer_averages_overlapping_windows():
    X = daily(time=31)
    gaps = np.random.default_rng(1).random(X.shape) < 0.3
    broken = np.where(gaps, np.nan, X)
    model = TimesNetImputer(seq_len=12, max_epochs=1, random_state=0, **QUICK).fit(daily())
    total, count = np.zeros_like(X), np.zeros_like(X)
    for s in (0, 6, 12, 18, 19):  # stride 6, the last one ends with the series
        scaled = torch.as_tensor((broken[s : s + 12] - model.mean_) / model.scale_).float()[None]
        with torch.no_grad():
            total[s : s + 12] += model.net_(scaled, mask=~scaled.isnan())[0].numpy()
        count[s : s + 12] += 1
    expected = np.where(gaps, total / count * model.scale_ + model.mean_, X)
    np.testing.assert_allclose(model.transform(broken), expected, rtol=1e-4, atol=1e-4)


def test_detector_finds_spikes_and_its_threshold_is_the_training_quantile():
    X = daily()
    model = TimesNetDetector(seq_len=24, contamination=0.05, max_epochs=5, random_state=0, **BRISK).fit(X)
    scores = model.score_samples(X)
    assert (model.predict(X) == -1).mean() == pytest.approx(0.05, abs=0.002)
    assert model.offset_ == pytest.approx(np.quantile(scores, 0.05))
    np.testing.assert_allclose(model.decision_function(X), scores - model.offset_)
    spiked = X.copy()
    spiked[[50, 160, 255], [0, 1, 0]] += 5 * X.std(0)[[0, 1, 0]]
    assert set(model.score_samples(spiked).argsort()[:3]) == {50, 160, 255}


def test_detector_scores_are_minus_errors_of_windows_one_after_another():
    X = daily(time=29)
    model = TimesNetDetector(seq_len=12, max_epochs=1, random_state=0, **QUICK).fit(daily())
    expected = np.empty(29)
    for s, new in ((0, 0), (12, 0), (17, 7)):  # the last one ends with the series, and adds five steps
        window = (X[s : s + 12] - model.mean_) / model.scale_
        with torch.no_grad():
            error = (model.net_(torch.as_tensor(window).float()[None])[0].numpy() - window) ** 2
        expected[s + new : s + 12] = -error.mean(1)[new:]
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-3, atol=1e-5)


def test_classifier_reads_shapes_and_shorter_series():
    rng = np.random.default_rng(0)
    t, y = np.arange(24), np.array(["early", "late"])[np.arange(60) % 2]
    X = np.sin(2 * np.pi * (t / 12 + 0.25 * (y == "late")[:, None])) + 0.1 * rng.normal(size=(60, 24))
    length = rng.integers(16, 25, size=60)
    X[t >= length[:, None]] = np.nan
    model = TimesNetClassifier(max_epochs=8, random_state=0, **BRISK).fit(X[:40], y[:40])
    assert model.score(X[40:], y[40:]) == 1.0
    shares = model.predict_proba(X[40:])
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(model.predict_proba(X[43:44]), shares[3:4], atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X[40:, :, None]), shares, atol=1e-5)


@pytest.mark.parametrize("kind", [TimesNetForecaster, TimesNetImputer, TimesNetDetector])
def test_a_seed_decides_everything_and_global_states_stay(kind):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    make = {"seq_len": 12, "max_epochs": 1, "random_state": 3, "lr": 1e-2, **QUICK}
    make |= {"horizon": 4} if kind is TimesNetForecaster else {}
    first, second = kind(**make).fit(daily(60)), kind(**make).fit(daily(60))
    other = kind(**{**make, "random_state": 4}).fit(daily(60))
    for name, value in first.net_.state_dict().items():
        torch.testing.assert_close(second.net_.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(other.net_.head.weight, first.net_.head.weight)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_training_never_sees_the_part_held_out():
    X = np.random.default_rng(0).normal(size=(200, 2))
    turned = np.concatenate([X[:180], X[:179:-1]])  # mean and deviation stay
    make = {"horizon": 4, "seq_len": 12, "random_state": 0, "max_epochs": 1, **QUICK}
    losses = [TimesNetForecaster(**make).fit(series).losses_ for series in (X, turned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    earlier = np.concatenate([X[:170], X[179:169:-1], X[180:]])
    assert TimesNetForecaster(**make).fit(earlier).losses_ != pytest.approx(losses[0], rel=1e-4)


def test_training_stops_when_patience_ends_and_keeps_the_best_weights():
    X = daily(100, noise=1.0)
    make = {
        "horizon": 4,
        "seq_len": 12,
        "patience": 2,
        "lr": 0.3,
        "batch_size": 64,
        "random_state": 1,
        **QUICK,
    }
    stopped = TimesNetForecaster(max_epochs=30, **make).fit(X)
    assert 2 < len(stopped.losses_) < 30
    before, best = (TimesNetForecaster(max_epochs=len(stopped.losses_) - n, **make).fit(X) for n in (3, 2))
    for name, value in best.net_.state_dict().items():
        torch.testing.assert_close(stopped.net_.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(before.net_.head.weight, best.net_.head.weight)


def test_without_early_stopping_a_prediction_is_still_that_of_the_series_alone():
    make = {"horizon": 4, "seq_len": 24, "random_state": 0, "max_epochs": 1, "validation_fraction": 0.0}
    model = TimesNetForecaster(**make, **QUICK).fit(daily(100))
    period = np.array([24, 12, 8, 6, 16])[:, None, None]
    windows = np.sin(2 * np.pi * np.arange(24)[:, None] / period + [0.0, 1.0]) * [1.0, 20.0] + [0.0, 100.0]
    alone = np.stack([model.predict(window) for window in windows])
    np.testing.assert_allclose(model.predict(windows), alone, rtol=1e-4, atol=1e-4)


def test_imputer_learns_from_hidden_entries_that_were_observed():
    """Signs cannot be guessed: their squared error is about their variance, 1, or more."""
    rng = np.random.default_rng(0)
    X = rng.choice([-1.0, 1.0], size=(300, 2))
    X[rng.random(X.shape) < 0.8] = np.nan
    model = TimesNetImputer(seq_len=24, max_epochs=2, random_state=0, **QUICK).fit(X)
    assert min(model.losses_) > 0.8  # with missing entries among them, taken for 0, it would be near 0.2


def test_classifier_learns_nothing_from_what_is_padded():
    X = np.random.default_rng(4).normal(size=(40, 24))
    X[:, 16:] = np.nan
    heads = [
        TimesNetClassifier(max_epochs=n, validation_fraction=0.0, random_state=0, **QUICK)
        .fit(X, np.arange(40) % 2)
        .net_.head.weight
        for n in (1, 3)
    ]
    before, after = (head.detach().view(2, 24, 4) for head in heads)
    torch.testing.assert_close(after[:, 16:], before[:, 16:], rtol=0, atol=0)
    assert (after[:, :16] != before[:, :16]).all()


ROWS_ARE_TIME = "rows are consecutive steps of time, not exchangeable samples"
TOO_SHORT = "batches of one step are shorter than a window"


TINY = {
    "d_model": 2,
    "d_ff": 2,
    "n_layers": 1,
    "n_kernels": 1,
    "top_k": 1,
    "max_epochs": 1,
    "batch_size": 512,
}
ALL = TINY | {"validation_fraction": 0.0}


@pytest.mark.parametrize(
    ("estimator", "expected_failures"),
    [
        (TimesNetImputer(seq_len=4, random_state=0, **ALL), {"check_methods_subset_invariance": TOO_SHORT}),
        (
            TimesNetDetector(seq_len=4, random_state=0, **ALL),
            {
                "check_methods_subset_invariance": TOO_SHORT,
                "check_methods_sample_order_invariance": ROWS_ARE_TIME,
            },
        ),
        (
            TimesNetForecaster(seq_len=4, horizon=2, random_state=0, **TINY),
            {
                "check_methods_subset_invariance": TOO_SHORT,
                "check_methods_sample_order_invariance": "a forecast has horizon rows, none of them a row of X",
            },
        ),
        (
            TimesNetClassifier(random_state=0, **(ALL | {"max_epochs": 2, "lr": 0.3, "d_model": 8})),
            {"check_estimators_pickle": "it puts NaN in the middle of series, which has no meaning"},
        ),
    ],
    ids=["imputer", "detector", "forecaster", "classifier"],
)
def test_estimators_pass_scikit_learns_checks(as_a_user, estimator, expected_failures):
    check_estimator(estimator, expected_failures=expected_failures, invariant=["shift X", "scale X"])


# bad input

GAP = daily(40)
GAP[:, 1] = np.nan
INNER = daily(40).T.copy()
INNER[1, 3] = np.nan


@pytest.mark.parametrize(
    ("model", "X", "message"),
    [
        (TimesNetForecaster(seq_len=30, horizon=11), daily(40), "at least 41 rows .* n_samples = 40"),
        (TimesNetForecaster(seq_len=12, horizon=0), daily(40), "horizon must be an integer of at least 1"),
        (TimesNetForecaster(seq_len=12, horizon=2), GAP, "contains NaN"),
        (TimesNetImputer(seq_len=41), daily(40), "at least 41 rows"),
        (TimesNetImputer(seq_len=12), GAP, "observed value in each column, got none in 1"),
        (TimesNetImputer(seq_len=12, mask_rate=0.0), daily(40), r"mask_rate must be in \(0, 1\), got 0.0"),
        (TimesNetImputer(seq_len=12, mask_rate=1.0), daily(40), r"mask_rate must be in \(0, 1\), got 1.0"),
        (TimesNetDetector(seq_len=12, contamination=0.6), daily(40), r"contamination must be in \(0, 0.5\]"),
        (TimesNetDetector(seq_len=12, contamination=0.0), daily(40), r"contamination must be in \(0, 0.5\]"),
        (TimesNetDetector(seq_len=12, top_k=7), daily(40), "top_k must be at most half of the 12"),
        (TimesNetDetector(seq_len=12, lr=0.0), daily(40), "lr must be greater than 0"),
        (
            TimesNetDetector(seq_len=12, max_epochs=0),
            daily(40),
            "max_epochs must be an integer of at least 1",
        ),
        (
            TimesNetDetector(seq_len=12, validation_fraction=1.0),
            daily(40),
            r"validation_fraction must be in \[0, 1\)",
        ),
        (TimesNetClassifier(), INNER, "NaN at the end of a series only, got others in series 1"),
    ],
)
def test_estimators_refuse_bad_input_by_name(as_a_user, model, X, message):
    with pytest.raises(ValueError, match=message):
        model.fit(X, np.arange(len(X)) % 2)


def test_columns_are_named_where_they_have_names(as_a_user):
    import pandas as pd

    frame = pd.DataFrame(GAP, columns=["load", "empty"])
    with pytest.raises(ValueError, match="got none in 'empty'"):
        TimesNetImputer(seq_len=12).fit(frame)


def test_fitted_estimators_refuse_other_series(as_a_user):
    quick = {"seq_len": 12, "max_epochs": 1, **QUICK}
    forecaster = TimesNetForecaster(horizon=2, **quick).fit(daily(40))
    with pytest.raises(ValueError, match="at least 12 rows"):
        forecaster.predict(daily(11))
    with pytest.raises(ValueError, match=r"X must be \(n, 12, 2\) or a series, got \(3, 11, 2\)"):
        forecaster.predict(np.zeros((3, 11, 2)))
    with pytest.raises(ValueError, match="X must be finite"):
        forecaster.predict(np.full((3, 12, 2), np.nan))
    with pytest.raises(ValueError, match="at least 12 rows"):
        TimesNetImputer(**quick).fit(daily(40)).transform(daily(11))
    with pytest.raises(ValueError, match="features"):
        TimesNetDetector(**quick).fit(daily(40)).score_samples(daily(40, channels=1))
    classes = TimesNetClassifier(max_epochs=1, **QUICK)
    with pytest.raises(ValueError, match="at least 2 classes, got 1 class"):
        classes.fit(np.zeros((4, 12)), np.zeros(4))
    classes.fit(np.random.default_rng(0).normal(size=(4, 12, 2)), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="must have the 2 variables of fit, got 1"):
        classes.predict(np.zeros((4, 12)))


@pytest.mark.parametrize("unit", [2.0**-600, 2.0**600])
def test_units_whose_squares_are_no_numbers_change_nothing(unit):
    X = daily(60)
    plain, other = (TimesNetForecaster(horizon=6, seq_len=24, **SMALL).fit(scale * X) for scale in (1, unit))
    np.testing.assert_array_equal(other.predict(), unit * plain.predict())


def test_a_rate_that_diverges_is_named(as_a_user):
    with pytest.raises(ValueError, match="lr must be lower"):
        TimesNetForecaster(horizon=2, seq_len=12, lr=1e30, **QUICK).fit(daily(60))


@pytest.mark.parametrize("validation_fraction", [0.0, 0.2])
def test_a_rate_at_which_the_last_step_diverges_is_named(as_a_user, validation_fraction):
    one = {"max_epochs": 1, "batch_size": 1000, "validation_fraction": validation_fraction}
    with pytest.raises(ValueError, match="lr must be lower"):
        TimesNetForecaster(horizon=2, seq_len=12, lr=1e30, **one, **QUICK).fit(daily(60))


SMALL = {"max_epochs": 1, "d_model": 4, "d_ff": 4, "n_layers": 1, "n_kernels": 1, "random_state": 0}


@pytest.mark.parametrize("rows", [30, 31, 36])
def test_a_forecaster_works_from_the_stated_least_length_on(as_a_user, rows):
    X = np.random.default_rng(0).normal(size=(rows, 2))
    model = TimesNetForecaster(horizon=6, seq_len=24, **SMALL).fit(X)
    assert model.predict().shape == (6, 2)
    with pytest.raises(ValueError, match="at least 30 rows"):
        TimesNetForecaster(horizon=6, seq_len=24, **SMALL).fit(X[:29])


@pytest.mark.parametrize("rows", [24, 25, 36])
def test_an_imputer_and_a_detector_work_from_the_stated_least_length_on(as_a_user, rows):
    X = np.random.default_rng(0).normal(size=(rows, 2))
    assert TimesNetImputer(seq_len=24, **SMALL).fit(X).transform(X).shape == X.shape
    assert len(TimesNetDetector(seq_len=24, **SMALL).fit(X).predict(X)) == rows


def test_fitting_inside_no_grad_trains(as_a_user):
    X = np.sin(np.arange(60) / 3)[:, None]
    plain = TimesNetForecaster(horizon=6, seq_len=24, **SMALL).fit(X)
    with torch.no_grad():
        model = TimesNetForecaster(horizon=6, seq_len=24, **SMALL).fit(X)
    np.testing.assert_array_equal(model.predict(), plain.predict())
