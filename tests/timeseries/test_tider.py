"""TIDER against its equations written as sums, what its parts promise, and gaps whose truth is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from posterity.testing import check_estimator
from posterity.timeseries import TIDER, TiderFactors
from posterity.timeseries.tider import train_factors

SIZES = {"rank": 2, "bias_rank": 3, "n_harmonics": 3, "period": (6.0, 7.5), "lags": (1, 4)}


def drawn(time=20, channels=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = TiderFactors(time, channels, **{**SIZES, **options})
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model.to(dtype)


def arrays(model):
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


# the model


def by_sums(p, time, periods, n_harmonics):
    """Trend, season and bias, entry by entry."""
    w = np.exp(p["mix"]) / np.exp(p["mix"]).sum()
    shape = (time, len(p["channel"]))
    trend, season, bias = np.zeros(shape), np.zeros(shape), np.zeros(time)
    for t in range(time):
        bias[t] = sum(p["bias"][t])
        waves = []
        for period in periods:
            for n in range(n_harmonics):
                waves += [np.sin(2 * np.pi * n * t / period), np.cos(2 * np.pi * n * t / period)]
        for c, loading in enumerate(p["channel"]):
            for r, u in enumerate(loading):
                trend[t, c] += w[0] * p["trend"][t, r] * u
                season[t, c] += w[1] * sum(a * b[r] for a, b in zip(waves, p["season"], strict=True)) * u
    return trend, season, bias


def test_parts_are_the_sums_of_the_paper_and_add_up():
    model = drawn()
    parts = model.components()
    for ours, theirs in zip(parts, by_sums(arrays(model), 20, (6.0, 7.5), 3), strict=True):
        np.testing.assert_allclose(ours.detach(), theirs, atol=1e-5)
    torch.testing.assert_close(
        parts.trend + parts.seasonal + parts.bias[:, None], model(), atol=1e-10, rtol=0
    )


def test_penalties_are_norms_not_squared():
    model, p = drawn(), arrays(drawn())
    w = np.exp(p["mix"]) / np.exp(p["mix"]).sum()
    U = np.hstack([p["channel"], np.ones((4, 3))])
    moving = w[0] * p["trend"] + w[1] * model.waves.numpy() @ p["season"]
    V = np.hstack([moving, p["bias"]])
    np.testing.assert_allclose(model().detach(), V @ U.T, atol=1e-10)
    off = [p["ar"][0] @ p["bias"][t - 1] + p["ar"][1] @ p["bias"][t - 4] - p["bias"][t] for t in range(4, 20)]
    steps = [p["trend"][t + 1] - p["trend"][t] for t in range(19)]

    def norm(x):
        return np.sqrt(np.sum(np.square(x)))

    for weights, expected in (
        ({"l2": 0.5, "ar": 0, "trend": 0}, 0.5 * (norm(U) + norm(V))),
        ({"l2": 0, "ar": 0.5, "trend": 0}, 0.5 * norm(off)),
        ({"l2": 0, "ar": 0, "trend": 0.5}, 0.5 * norm(steps)),
        ({}, 1e-2 * (norm(U) + norm(V)) + 0.2 * norm(off) + 0.1 * norm(steps)),
    ):
        np.testing.assert_allclose(model.penalty(**weights).item(), expected, rtol=1e-6)
        assert model.penalty(**weights, factors=model.factors()) == model.penalty(**weights)


@torch.no_grad()
def test_penalties_vanish_for_what_they_allow():
    model = drawn(30, lags=(1, 2), bias_rank=2)
    slope = torch.tensor([0.3, -0.4]).double()
    model.trend[:] = torch.arange(30).double()[:, None] * slope + 7
    torch.testing.assert_close(
        model.penalty(l2=0, ar=0, trend=1), torch.tensor(0.5 * 29**0.5).double(), rtol=1e-6, atol=0
    )
    model.ar[:] = torch.tensor([[[0.9, 0.2], [-0.1, 0.8]], [[-0.5, 0.0], [0.1, -0.4]]])
    for t in range(2, 30):  # not its transpose, and the lags not in another order
        model.bias[t] = model.ar[0] @ model.bias[t - 1] + model.ar[1] @ model.bias[t - 2]
    assert model.penalty(l2=0, ar=1, trend=0) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_season_is_the_same_in_every_cycle_even_late(dtype):
    model = drawn(6_000, period=24, n_harmonics=8, dtype=dtype)
    seasonal = model.components().seasonal
    assert (seasonal[24:] - seasonal[:-24]).abs().max() < 1e-5
    assert (seasonal[12:] - seasonal[:-12]).abs().max() > 0.1


def test_multiple_zero_gives_a_constant_by_its_cosine_alone():
    model = drawn(period=6, n_harmonics=1)
    seasonal = model.components().seasonal
    torch.testing.assert_close(seasonal, seasonal[:1].expand(20, -1))
    assert seasonal.abs().max() > 0.01
    model.season.data[0] += 1e3
    torch.testing.assert_close(model.components().seasonal, seasonal)


def test_gradients_are_those_of_finite_differences():
    model = drawn(8, 3, period=(4.0, 3.0), lags=(1, 2), rank=1, bias_rank=1, n_harmonics=2)
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def objective(*given):
        call = dict(zip(names, given, strict=True))
        fit = torch.func.functional_call(model, call).square().mean()

        class Penalised(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self):
                return self.model.penalty()

        return fit + torch.func.functional_call(Penalised(), {f"model.{k}": v for k, v in call.items()}, ())

    assert torch.autograd.gradcheck(objective, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_and_does_no_more(dtype):
    low = drawn(40, period=12, lags=(1, 2)).to(dtype)
    wide = drawn(40, period=12, lags=(1, 2)).to(dtype).double()
    assert low().dtype == low.components().bias.dtype == dtype
    for ours, exact in ((low(), wide()), (low.penalty(), wide.penalty()), *zip(low.components(), wide.components(), strict=True)):  # fmt: skip
        torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0.02)
    plain = drawn(40, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        under = plain(), plain.penalty(), *plain.components()
    for ours, exact in zip(under, (plain(), plain.penalty(), *plain.components()), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_a_generator_decides_the_start_and_the_state_can_be_loaded():
    first, second = (
        TiderFactors(20, 4, period=12, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    state = torch.get_rng_state()
    other = TiderFactors(20, 4, period=12, generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(), second())
    assert not torch.equal(first(), other())
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(), other())
    wide = TiderFactors(2_000, 4, init_scale=3.0, generator=torch.Generator().manual_seed(0))
    assert wide.trend.std().item() == pytest.approx(3, rel=0.05)


# the estimator


def seasons(time=120, channels=6, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(time)[:, None]
    shape = np.sin(2 * np.pi * t / 12) + 0.5 * np.cos(4 * np.pi * t / 12)
    return shape * rng.uniform(0.5, 2, channels) * 10 + 100 + noise * rng.normal(size=(time, channels))


def with_gaps(X, share=0.4, seed=1):
    return np.where(np.random.default_rng(seed).random(X.shape) < share, np.nan, X)


def test_a_season_of_rank_one_is_recovered_under_forty_percent_of_holes():
    X = seasons()
    gaps = with_gaps(X)
    model = TIDER(12, max_epochs=120, random_state=0).fit(gaps)
    error = ((model.transform(gaps) - X) / X.std(0))[np.isnan(gaps)]
    assert np.sqrt(np.mean(error**2)) < 0.05


def test_components_add_up_in_units_of_the_data_and_gaps_alone_are_filled():
    X = with_gaps(seasons(noise=1.0))
    model = TIDER(12, max_epochs=40, random_state=0).fit(X)
    filled = model.transform(X)
    np.testing.assert_array_equal(filled[~np.isnan(X)], X[~np.isnan(X)])
    np.testing.assert_array_equal(filled[np.isnan(X)], model.reconstruction_[np.isnan(X)])
    np.testing.assert_allclose(sum(model.components_), model.reconstruction_, rtol=1e-5)
    assert all(part.shape == X.shape for part in model.components_)
    scale = np.nanstd(X, axis=0)  # the bias is one for all channels, in their deviations
    bias = model.components_.bias / scale
    np.testing.assert_allclose(bias, np.repeat(bias[:, :1], 6, axis=1), rtol=1e-6)
    seasonal = model.components_.seasonal
    np.testing.assert_allclose(seasonal[12:], seasonal[:-12], atol=1e-4 * np.abs(seasonal).max())
    assert model.weights_.sum() == pytest.approx(1)
    assert model.channel_factors_.shape == (6, 10)
    full = seasons()
    np.testing.assert_array_equal(model.transform(full), full)
    elsewhere = with_gaps(full, seed=2)
    np.testing.assert_array_equal(
        model.transform(elsewhere), np.where(np.isnan(elsewhere), model.reconstruction_, full)
    )


def test_units_of_a_channel_move_its_fill_and_nothing_else():
    X = with_gaps(seasons(noise=1.0))
    a, b = np.array([1e-6, 1.0, 3.0, 1e9, 0.5, 7.0]), np.array([0, -50.0, 1e3, 0, 2.0, 0])
    make = {"max_epochs": 20, "random_state": 0}
    plain = TIDER("auto", **make).fit_transform(X)
    np.testing.assert_allclose((TIDER("auto", **make).fit_transform(a * X + b) - b) / a, plain, rtol=1e-4)
    raw = TIDER(12, standardize=False, **make).fit(X).reconstruction_
    moved = TIDER(12, standardize=False, **make).fit(X + 50).reconstruction_
    assert np.abs(moved - raw - 50).max() > 1


def test_permuting_channels_permutes_the_reconstruction():
    X = torch.as_tensor(seasons(60, 5, noise=1.0)).float()
    X = (X - X.mean(0)) / X.std(0)
    known = torch.rand(X.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    held = known & (torch.rand(X.shape, generator=torch.Generator().manual_seed(1)) < 0.2)
    order = torch.tensor([3, 0, 4, 1, 2])
    fits = []
    for columns in (torch.arange(5), order):
        model = TiderFactors(60, 5, period=12, generator=torch.Generator().manual_seed(2))
        model.channel.data = model.channel.data[columns]
        train_factors(
            model, X[:, columns], (known & ~held)[:, columns], held[:, columns], penalties={}, lr=0.05, max_epochs=15,
            patience=15, batch_size=None, generator=torch.Generator(),
        )  # fmt: skip
        fits.append(model())
    torch.testing.assert_close(fits[1], fits[0][:, order], rtol=1e-3, atol=1e-3)


def test_one_step_is_adams_on_the_objective():
    """The loss is the mean over trained entries only, and what is missing or held out has no say."""
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    known = torch.rand(X.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    held = known & (torch.rand(X.shape, generator=torch.Generator().manual_seed(2)) < 0.3)
    models = [TiderFactors(20, 3, period=6, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    seen = torch.where(known & ~held, X, 99.0)  # elsewhere anything
    held_X = torch.where(held, X, seen)
    history, best = train_factors(
        models[0], held_X, known & ~held, held, penalties={"l2": 0.1}, lr=0.05, max_epochs=1, patience=1,
        batch_size=None, generator=torch.Generator(),
    )  # fmt: skip
    opt = torch.optim.Adam(models[1].parameters(), lr=0.05)
    loss = (models[1]() - X)[known & ~held].square().mean() + models[1].penalty(l2=0.1)
    loss.backward()
    opt.step()
    torch.testing.assert_close(models[0](), models[1](), rtol=1e-4, atol=1e-5)
    assert history[0, 0] == pytest.approx(loss.item(), rel=1e-5)
    assert history[0, 1] == pytest.approx((models[1]() - X)[held].square().mean().item(), rel=1e-4)
    assert best == 1


def test_training_stops_when_patience_ends_and_the_best_epoch_is_kept():
    X = with_gaps(np.random.default_rng(0).normal(size=(40, 5)))
    make = {"period": 12, "random_state": 0, "patience": 7, "lr": 0.2}
    stopped = TIDER(max_epochs=300, **make).fit(X)
    assert stopped.n_iter_ == stopped.best_epoch_ + 7 == len(stopped.history_) < 300
    assert stopped.best_epoch_ == np.argmin(stopped.history_[:, 1]) + 1
    best = TIDER(max_epochs=stopped.best_epoch_, **make).fit(X)
    np.testing.assert_array_equal(best.reconstruction_, stopped.reconstruction_)
    last = TIDER(max_epochs=9, validation_fraction=0.0, **make).fit(X)
    assert last.n_iter_ == last.best_epoch_ == 9
    assert np.isnan(last.history_[:, 1]).all()


def test_batches_of_channels_fit_as_well():
    X = seasons()
    gaps = with_gaps(X)
    model = TIDER(12, batch_size=4, max_epochs=60, random_state=0).fit(gaps)
    assert np.sqrt(np.mean(((model.transform(gaps) - X) / X.std(0)) ** 2)) < 0.1
    whole = TIDER(12, batch_size=6, max_epochs=3, random_state=0).fit(gaps)
    np.testing.assert_array_equal(
        whole.reconstruction_, TIDER(12, max_epochs=3, random_state=0).fit(gaps).reconstruction_
    )


def test_the_period_is_found_beside_a_trend_larger_than_it():
    t = np.arange(240)[:, None]
    X = np.sin(2 * np.pi * t / 12 + [0.0, 1.0]) + 0.05 * t * [1, -1]
    model = TIDER(max_epochs=1, random_state=0).fit(with_gaps(X))
    np.testing.assert_array_equal(model.period_, [12.0])
    listed = TIDER([12, 40.0], max_epochs=1).fit(X)
    np.testing.assert_array_equal(listed.period_, [12.0, 40.0])


def test_a_channel_that_is_constant_is_filled_by_its_constant():
    X = seasons()
    X[:, 2] = 0.1
    X[:, 3] = np.nan
    X[6, 3] = 7.0  # seen once
    X[np.arange(120) % 3 == 1] = np.nan
    filled = TIDER(12, max_epochs=10, random_state=0).fit_transform(X)
    np.testing.assert_allclose(filled[:, 2], 0.1, rtol=1e-12)
    np.testing.assert_array_equal(filled[:, 3], 7.0)


@pytest.mark.parametrize("unit", [1e-300, 1e300])
def test_squares_of_the_units_need_not_be_numbers(unit):
    X = with_gaps(seasons(48))
    make = {"period": 12, "max_epochs": 5, "random_state": 0}
    plain = TIDER(**make).fit_transform(X)
    np.testing.assert_allclose(TIDER(**make).fit_transform(X * unit) / unit, plain, rtol=1e-4)


def test_a_seed_decides_everything_and_global_states_stay():
    X = with_gaps(seasons(48))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = (
        TIDER(12, max_epochs=3, batch_size=2, random_state=seed).fit_transform(X) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


PARAMETERS = "time steps are parameters: a table with other rows cannot be transformed"


def test_conforms_to_its_kind(as_a_user):
    check_estimator(
        TIDER(2.5, max_epochs=2, lags=(1,), random_state=0),
        expected_failures={
            "check_fit_idempotent": PARAMETERS,
            "check_methods_subset_invariance": PARAMETERS,
        },
        invariant=["shift X", "scale X"],
    )


# bad input

X0 = seasons(40, 3)
EMPTY, HUGE = X0.copy(), X0.copy()
EMPTY[:, 1] = np.nan
HUGE[3, 0] = np.inf


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        ({}, X0[:, 0], "Expected 2D array"),
        ({}, X0[:4], r"at least max\(lags\) \+ 2 = 5 rows .* n_samples = 4"),
        ({"lags": (1, 40)}, X0, "at least .* 42 rows"),
        ({}, EMPTY, "observed value in each column, got none in 1"),
        ({}, pd.DataFrame(EMPTY, columns=["a", "hall", "c"]), "got none in 'hall'"),
        ({}, HUGE, "infinity"),
        ({"period": 1}, X0, r"period must be in \(1, 40\], got 1"),
        ({"period": 41}, X0, r"period must be in \(1, 40\], got 41"),
        ({"period": [12, 41]}, X0, "got 41"),
        ({"period": []}, X0, "period must not be empty"),
        ({"period": "daily"}, X0, "period must be a number .* got 'daily'"),
        ({"period": np.nan}, X0, "period must be in"),
        ({"period": "auto"}, np.full((40, 2), 0.1), "period must be given for a table without variation"),
        ({"lags": (0, 1)}, X0, "lags must be an integer of at least 1, got 0"),
        ({"lags": (1, 1)}, X0, r"lags must differ, got \(1, 1\)"),
        ({"lags": ()}, X0, "lags must be a sequence of at least one integer"),
        ({"lags": 3}, X0, "lags must be a sequence of at least one integer"),
        ({"rank": 0}, X0, "rank must be an integer of at least 1"),
        ({"bias_rank": 0}, X0, "bias_rank must be an integer of at least 1"),
        ({"n_harmonics": 0}, X0, "n_harmonics must be an integer of at least 1"),
        ({"l2": -1.0}, X0, "l2 must be at least 0, got -1.0"),
        ({"ar": -1.0}, X0, "ar must be at least 0"),
        ({"trend": -1.0}, X0, "trend must be at least 0"),
        ({"lr": 0.0}, X0, "lr must be greater than 0"),
        ({"lr": 1e30}, X0, "lr must be lower"),
        ({"lr": 1e30, "max_epochs": 1}, X0, "lr must be lower"),
        ({"lr": 1e30, "max_epochs": 1, "validation_fraction": 0.0}, X0, "lr must be lower"),
        ({"standardize": False}, X0 * 1e30, "lr must be lower, or standardize True: the loss is inf"),
        ({"max_epochs": 0}, X0, "max_epochs must be an integer of at least 1"),
        ({"patience": 0}, X0, "patience must be an integer of at least 1"),
        ({"batch_size": 0}, X0, "batch_size must be an integer of at least 1"),
        ({"validation_fraction": 1.0}, X0, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"standardize": "yes"}, X0, "standardize must be one of True, False"),
    ],
)
def test_refuses_bad_input_by_name(as_a_user, options, X, message):
    with pytest.raises(ValueError, match=message):
        TIDER(**{"period": 12, "max_epochs": 3, **options}).fit(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_timesteps": 4}, "n_timesteps must be an integer of at least 5, got 4"),
        ({"n_channels": 0}, "n_channels must be an integer of at least 1"),
        ({"init_scale": 0.0}, "init_scale must be greater than 0"),
        ({"period": 48}, r"period must be in \(1, 40\], got 48"),
    ],
)
def test_factors_refuse_bad_sizes_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        TiderFactors(**{"n_timesteps": 40, "n_channels": 3, **options})


def test_a_fitted_table_refuses_another(as_a_user):
    frame = pd.DataFrame(X0, columns=list("abc"))
    model = TIDER(12, max_epochs=1).fit(frame)
    with pytest.raises(ValueError, match=r"X must have the 40 rows of fit, .* got 39"):
        model.transform(frame[:39])
    with pytest.raises(ValueError, match="feature names should match"):
        model.transform(frame.rename(columns={"a": "z"}))
    with pytest.raises(ValueError, match="expecting 3 features"):
        model.transform(X0[:, :2])


def test_a_period_seen_less_than_twice_is_warned_of(as_a_user):
    with pytest.warns(UserWarning, match="period 30 is seen less than twice in 40 rows"):
        TIDER([12, 30], max_epochs=1).fit(X0)


def test_rows_must_be_evenly_spaced_where_they_have_times(as_a_user):
    hours = pd.date_range("2024-01-01", periods=41, freq="h")
    even = pd.DataFrame(X0, index=hours[:40])
    TIDER(12, max_epochs=1).fit(even)
    monthly = pd.DataFrame(X0, index=pd.date_range("2020-01-31", periods=40, freq="ME"))
    TIDER(12, max_epochs=1).fit(monthly)
    summer = pd.date_range("2024-03-30", periods=40, freq="h", tz="Europe/Berlin")
    TIDER(12, max_epochs=1).fit(pd.DataFrame(X0, index=summer))
    for index, gap in (
        (
            hours.delete(7),
            "got 2024-01-01 06:00:00 and then 2024-01-01 08:00:00 where the usual step is 0 days 01:00",
        ),
        (hours[:40][::-1], "sort it and use asfreq"),
        (hours[[0, *range(39)]], "2024-01-01 00:00:00 and then 2024-01-01 00:00:00"),
    ):
        with pytest.raises(ValueError, match=f"X must be evenly spaced in time, .*{gap}"):
            TIDER(12, max_epochs=1).fit(pd.DataFrame(X0, index=index))
