"""TukeyEM by definition, cell by cell; what it releases, the regressor, and what is refused."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.utils import estimator_checks

from posterity.privacy import PrivacyTestFailed, TukeyEMRegressor, TukeyMechanism, tukey_depth
from posterity.privacy.tukey_em import _batch_models
from posterity.privacy.tukey_mechanism import _least_models
from posterity.testing import check_estimator


def models(m=40, p=2, seed=0):
    """Return models of which coordinates differ in scale and shape."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(size=(m, 1)), 1e3 * rng.standard_cauchy((m, p - 1))])


def mechanism(x, *, epsilon=2.0, delta=1e-3, jitter=0.0, **options):
    return TukeyMechanism(x, epsilon=epsilon, delta=delta, jitter=jitter, **options)


# by definition


def depth_of(y, x):
    return min(min(sum(x[:, j] <= y[j]), sum(x[:, j] >= y[j])) for j in range(len(y)))


def cells(*sets):
    """Return middles and volumes of the cells that the coordinates of all models cut out: depth is constant in each."""
    edges = [np.unique(np.concatenate([x[:, j] for x in sets])) for j in range(sets[0].shape[1])]
    middles = np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij")
    volumes = np.meshgrid(*[np.diff(e) for e in edges], indexing="ij")
    return np.column_stack([each.ravel() for each in middles]), np.prod(volumes, axis=0).ravel()


@pytest.mark.parametrize("m", [4, 5, 9, 14])
@pytest.mark.parametrize("p", [1, 2])
def test_depth_and_volumes_are_those_of_the_definition(m, p):
    x = models(m, p)
    points = np.concatenate([x, cells(x)[0], 1e4 * x, np.zeros((1, p))])
    np.testing.assert_array_equal(tukey_depth(points, x), [depth_of(y, x) for y in points])
    middles, volumes = cells(x)
    depth = np.array([depth_of(y, x) for y in middles])
    made = mechanism(x)
    assert (made.n_models, made.restricted_depth) == (m, m // 2 // 2)
    np.testing.assert_allclose(
        made.log_volumes, [math.log(volumes[depth >= i].sum()) for i in range(1, m // 2 + 1)], rtol=1e-12
    )
    assert made.depths.tolist() == list(range(m // 4, m // 2 + 1))


def test_depth_counts_ties_on_both_sides():
    x = np.array([[0], [1], [1], [1], [2]])
    assert tukey_depth(np.array([[1], [0], [3], [1.5]]), x).tolist() == [4, 1, 0, 1]


def distance_of(x, epsilon, delta):
    """Return k by all pairs (k, g), from volumes as the product of sides."""
    m, s = len(x), np.sort(x, axis=0)
    half, t, e = m // 2, m // 4, epsilon / 2
    log_volume = {i: np.log(s[m - i] - s[i - 1]).sum() for i in range(1, half + 1)}
    held = [
        k
        for k in range(t - 1)
        for g in range(1, half + 1)
        if t + k + g + 1 <= half
        and log_volume[t - k - 1] - log_volume[t + k + g + 1] - e * g / 2 <= math.log(delta / 8) - e
    ]
    return max(held, default=-1)


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-2), (3.0, 1e-3), (8.0, 1e-5), (30.0, 0.4)])
def test_distance_and_chance_to_pass_are_those_of_the_definition(epsilon, delta):
    seen = set()
    for m in (4, 30, 61, 120, 203, 402, 603):
        x = models(m, 2, seed=m)
        made = mechanism(x, epsilon=epsilon, delta=delta)
        assert made.distance == distance_of(x, epsilon, delta)
        e = epsilon / 2
        np.testing.assert_allclose(made.threshold, math.log(1 / (2 * delta)) / e)
        np.testing.assert_allclose(
            made.pass_probability, stats.laplace(scale=1 / e).sf(made.threshold - made.distance)
        )
        seen.add(made.distance)
    assert len(seen) >= 3


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("neighbours", "share"), [("replace", 0.25), ("add-remove", 0.5)])
def test_density_is_the_exponential_of_depth_and_integrates_to_one(p, neighbours, share):
    for m in (9, 16, 31):
        x = models(m, p)
        made = mechanism(x, neighbors=neighbours)
        middles, volumes = cells(x)
        depth = np.array([depth_of(y, x) for y in middles])
        weight = np.where(depth >= m // 4, np.exp(share * 2.0 * np.minimum(depth, m // 2)), 0)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(
                made.log_density(middles), np.log(weight / (weight @ volumes)), atol=1e-9
            )
        mass = np.exp(made.log_density(middles)) * volumes
        np.testing.assert_allclose(mass.sum(), 1)
        by_depth = [mass[np.minimum(depth, m // 2) == i].sum() for i in made.depths]
        np.testing.assert_allclose(np.exp(made.depth_log_probs), by_depth)


def test_each_coordinate_may_be_moved_and_scaled():
    x = models(200, 3, seed=1)
    plain, moved = mechanism(x), mechanism(x * [1e-6, 3.0, 1e9] + [5.0, -1e3, 1e9])
    assert plain.distance == moved.distance > 0
    np.testing.assert_allclose(plain.depth_log_probs, moved.depth_log_probs, atol=1e-6)


# releases


@pytest.mark.parametrize("neighbours", ["replace", "add-remove"])
def test_releases_fall_in_every_cell_as_often_as_the_density_says(neighbours):
    x = np.column_stack([models(11, 2, seed=3), np.random.default_rng(0).exponential(size=11)])
    made = mechanism(x, epsilon=1.0, neighbors=neighbours)
    middles, volumes = cells(x)
    expected = np.exp(made.log_density(middles)) * volumes
    points = made._releases(60_000, np.random.RandomState(0))[1]
    edges = [np.sort(x[:, j]) for j in range(3)]
    where = [np.searchsorted(e, points[:, j]) - 1 for j, e in enumerate(edges)]
    seen = np.bincount(np.ravel_multi_index(where, (10, 10, 10)), minlength=1000)
    assert seen[expected == 0].sum() == 0
    rare = expected * len(points) < 5
    seen, expected = (np.append(each[~rare], each[rare].sum()) for each in (seen, expected))
    assert stats.chisquare(seen, expected * len(points)).pvalue > 1e-3
    for j, e in enumerate(edges):  # uniform inside its cell
        inside = (points[:, j] - e[where[j]]) / (e[where[j] + 1] - e[where[j]])
        assert stats.kstest(inside, "uniform").pvalue > 1e-3


def test_over_seeds_the_share_that_passes_and_the_depths_are_as_said():
    made = mechanism(models(128, 2), epsilon=2.0, delta=2e-2)
    assert 0.2 < made.pass_probability < 0.9
    released = [made.release(random_state=seed) for seed in range(1_500)]
    points = np.array([each for each in released if each is not None])
    assert stats.binomtest(len(points), len(released), made.pass_probability).pvalue > 1e-3
    depth = np.minimum(tukey_depth(points, made._sorted), 75)
    chances = np.exp(made.depth_log_probs)
    seen = np.array([(depth == i).sum() for i in made.depths])
    rare = chances * len(points) < 5
    assert (
        stats.chisquare(
            np.append(seen[~rare], seen[rare].sum()),
            len(points) * np.append(chances[~rare], chances[rare].sum()),
        ).pvalue
        > 1e-3
    )


def test_a_mechanism_repeats_its_seed_and_not_itself():
    x = models(400)
    made, again = (TukeyMechanism(x, epsilon=3.0, delta=1e-3, random_state=7) for _ in range(2))
    first = made.release()
    np.testing.assert_array_equal(first, again.release())
    assert not np.array_equal(first, made.release())
    before = np.random.get_state()  # a user's own seed is no seed of the noise
    one, two = (TukeyMechanism(x, epsilon=3.0, delta=1e-3).release() for _ in range(2))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert np.random.get_state()[2] == before[2]


def test_equal_models_are_released_near_themselves():
    made = TukeyMechanism(np.full((600, 3), 2.0), epsilon=2.0, delta=1e-4, random_state=0)
    assert made.pass_probability > 0.99
    np.testing.assert_allclose(made.release(), 2.0, atol=1e-9)


def test_a_box_without_volume_releases_nothing():
    rounded = TukeyMechanism(
        np.full((600, 1), 1e12), epsilon=2.0, delta=0.4, random_state=0
    )  # jitter is lost
    tied = mechanism(np.r_[np.zeros(500), np.arange(1, 101)][:, None], delta=0.4)
    for made in (rounded, tied):
        assert (made.distance, made.pass_probability) == (-1, 0.0)
        assert all(made.release(seed) is None for seed in range(50))
        assert made.log_density(np.zeros((2, 1))).tolist() == [-math.inf] * 2


@pytest.mark.parametrize("unit", [1e-300, 1e300, 1.7e308])
def test_huge_and_tiny_models_overflow_nowhere(unit):
    made = mechanism(unit * np.linspace(-1, 1, 400)[:, None])
    plain = mechanism(np.linspace(-1, 1, 400)[:, None])
    assert made.distance == plain.distance
    np.testing.assert_allclose(made.depth_log_probs, plain.depth_log_probs, atol=1e-9)
    assert np.abs(made.release(0)) <= unit


@pytest.mark.parametrize("epsilon", [5e-324, 1e-12, 1e12, 1e308])
def test_any_positive_epsilon_gives_probabilities(epsilon):
    made = mechanism(models(60), epsilon=epsilon, delta=0.1)
    assert 0 <= made.pass_probability <= 1
    np.testing.assert_allclose(np.exp(made.depth_log_probs).sum(), 1)


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0986, 1e-5), (5.0, 1e-3), (1.0, 0.3), (0.5, 0.9)])
def test_the_least_number_of_models_is_that_at_which_the_best_data_pass(epsilon, delta):
    """Data of which all boxes have one volume, nearly, are the best."""
    least = _least_models(epsilon, delta)
    for m, passes in ((least, True), (least - 1, False), (least + 7, True), (least - 9, False)):
        if m >= 4:
            x = np.where(np.arange(m) % 2, 1, -1)[:, None] + 1e-14 * np.random.default_rng(0).random((m, 1))
            assert (mechanism(x, epsilon=epsilon, delta=delta).pass_probability >= 0.5) == passes


# the regressor


@pytest.mark.parametrize("intercept", [True, False])
def test_models_are_ordinary_least_squares(intercept):
    rng = np.random.default_rng(0)
    X, y = rng.normal(2, [1, 10, 0.1], size=(6, 9, 3)), rng.normal(size=(6, 9))
    found, _ = _batch_models(X, y, intercept)
    for model, a, b in zip(found, X, y, strict=True):
        peer = LinearRegression(fit_intercept=intercept).fit(a, b)
        np.testing.assert_allclose(model, np.append(peer.coef_, [peer.intercept_] * intercept), atol=1e-10)


def test_collinear_batches_have_a_solution_of_their_own():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(5, 12, 4)), rng.normal(size=(5, 12))
    X[1, :, 2] = X[1, :, 0]
    X[2, :, 1] = 3.7  # constant, as the intercept is
    X[3] = 0
    found, _ = _batch_models(X, y, True)
    for k, (model, a, b) in enumerate(zip(found, X, y, strict=True)):
        np.testing.assert_allclose(
            a @ model[:-1] + model[-1], LinearRegression().fit(a, b).predict(a), atol=1e-9, err_msg=str(k)
        )
    assert abs(found[2, 1]) < 1e-12 and not found[3, :-1].any()


def table(n=30_000, d=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.lognormal(0, 1, (n, d)) * 10.0 ** np.arange(d)
    return X, X @ np.arange(1, d + 1) - 40 + rng.normal(size=n)


def test_it_regresses_where_rows_are_many_and_a_tenth_of_them_wild():
    X, y = table()
    model = TukeyEMRegressor(random_state=0).fit(X, y)
    assert model.passed_
    np.testing.assert_allclose(model.coef_, [1, 2, 3], rtol=0.05)
    X, y = X.copy(), y.copy()
    y[:100] = 1e12  # in a tenth of the batches, at most
    np.testing.assert_allclose(TukeyEMRegressor(random_state=0).fit(X, y).coef_, [1, 2, 3], rtol=0.2)


def test_units_and_the_origin_of_the_target_do_not_matter():
    X, y = table()
    plain = TukeyEMRegressor(random_state=0).fit(X, y)
    X2 = X * [1e-3, 1.0, 1e5]
    moved = TukeyEMRegressor(random_state=0).fit(X2, 1e4 * y - 7)
    np.testing.assert_allclose(moved.predict(X2), 1e4 * plain.predict(X) - 7, rtol=1e-5, atol=1)


def test_nothing_but_the_release_is_kept():
    X, y = table(8_000)
    model = TukeyEMRegressor(random_state=0).fit(pd.DataFrame(X, columns=list("abc")), y)
    known = {*model.get_params(), "coef_", "intercept_", "passed_", "n_features_in_", "feature_names_in_"}
    assert set(vars(model)) == known
    assert model.feature_names_in_.tolist() == list("abc")
    again = pickle.loads(pickle.dumps(model))
    frame = pd.DataFrame(X, columns=list("abc"))
    np.testing.assert_array_equal(again.predict(frame), frame.to_numpy() @ model.coef_ + model.intercept_)
    without = TukeyEMRegressor(fit_intercept=False, random_state=0).fit(X, y)
    assert without.intercept_ == 0.0


def test_without_a_seed_two_fits_differ_and_with_one_they_do_not():
    X, y = table(8_000)
    fits = [TukeyEMRegressor(random_state=seed).fit(X, y).coef_ for seed in (None, None, 3, 3)]
    assert not np.array_equal(*fits[:2])
    np.testing.assert_array_equal(*fits[2:])


def test_a_failed_test_is_an_error_that_says_what_to_raise_or_a_model_of_zeros():
    X, y = table(2_000)
    with pytest.raises(PrivacyTestFailed, match=r"raise n_models or epsilon; .* fewer than 29\d models"):
        TukeyEMRegressor(n_models=100, random_state=0).fit(X, y)
    model = TukeyEMRegressor(n_models=100, on_failure="zero", random_state=0).fit(X, y)
    assert not model.passed_
    assert not model.predict(X).any()


SMALL = "its data cannot hold the models, of as many rows as coefficients each"
OF_FOUR = (
    "check_n_features_in_after_fitting", "check_estimators_dtypes", "check_estimators_nan_inf",
    "check_regressors_no_decision_function",
)  # fmt: skip
OF_FOURTEEN = (
    *OF_FOUR, "check_fit_score_takes_y", "check_estimators_overwrite_params", "check_dont_overwrite_parameters",
    "check_estimators_fit_returns_self", "check_readonly_memmap_input", "check_dtype_object",
    "check_pipeline_consistency", "check_estimators_pickle", "check_f_contiguous_array_estimator",
    "check_supervised_y_2d", "check_regressors_int", "check_methods_sample_order_invariance",
    "check_methods_subset_invariance", "check_fit2d_1feature", "check_dict_unchanged", "check_fit2d_predict1d",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:delta=")
def test_scikit_learns_checks(as_a_user):
    """With four models, of which none is ever released, and with fourteen and no privacy to speak of."""
    few = TukeyEMRegressor(n_models=4, epsilon=50.0, delta=0.5, on_failure="zero", random_state=0)
    estimator_checks.check_estimator(few, expected_failed_checks=dict.fromkeys(OF_FOUR, SMALL))
    more = TukeyEMRegressor(n_models=14, epsilon=400.0, delta=0.9, random_state=2)
    check_estimator(
        more, expected_failures=dict.fromkeys(OF_FOURTEEN, SMALL), invariant={"scale X", "scale y", "shift y"}
    )


ROWS = np.random.default_rng(0).normal(size=(40, 3))


def fit(X=ROWS, y=ROWS[:, 0], **options):
    return TukeyEMRegressor(**{"n_models": 4, "delta": 1e-3, **options}).fit(X, y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(n_models=11), r"n_models must leave 4 rows for the 4 .* n_models=11 for n_samples = 40: at most 10 fit"),
        (lambda: fit(X=ROWS[:12], y=ROWS[:12, 0]), "n_samples = 12: X must have at least 16 rows"),
        (lambda: fit(n_models=3), "n_models must be an integer of at least 4, got 3"),
        (lambda: fit(epsilon=0.0), "epsilon must be greater than 0, got 0.0"),
        (lambda: fit(epsilon=math.nan), "epsilon must be greater than 0, got nan"),
        (lambda: fit(delta=1.0), r"delta must be in \(0, 1\), got 1.0"),
        (lambda: fit(delta=0), r"delta must be in \(0, 1\), got 0"),
        (lambda: fit(neighbors="swap"), "neighbors must be one of 'replace', 'add-remove', got 'swap'"),
        (lambda: fit(on_failure="nan"), "on_failure must be one of 'raise', 'zero'"),
        (lambda: fit(fit_intercept=2), "fit_intercept must be one of True, False"),
        (lambda: fit(X=np.where(ROWS > 1, np.nan, ROWS)), "Input X contains NaN"),
        (lambda: fit(y=np.where(ROWS[:, 0] > 1, np.inf, ROWS[:, 0])), "Input y contains infinity"),
        (lambda: fit(y=ROWS), "y should be a 1d array"),
        (lambda: mechanism(ROWS[:3]), "models must have at least 4 rows, got 3"),
        (lambda: mechanism(ROWS[0]), r"models must be a matrix with at least 1 column, got shape \(3,\)"),
        (lambda: mechanism(np.where(ROWS > 1, np.nan, ROWS)), r"models must be finite, row \d+ is not"),
        (lambda: mechanism(ROWS.astype(complex)), "models must hold numbers, got dtype complex128"),
        (lambda: mechanism(ROWS * [1, 0, 1]), "models must take two values or more with jitter=0, got 0 alone in column 1"),
        (lambda: mechanism(ROWS, jitter=-1.0), "jitter must be at least 0, got -1.0"),
        (lambda: mechanism(ROWS, delta=0.0), r"delta must be in \(0, 1\)"),
        (lambda: mechanism(ROWS).log_density(ROWS[:, :2]), "points must be a matrix with 3 columns, as models has"),
        (lambda: tukey_depth(ROWS, ROWS[:0]), "models must have at least 1 row, got 0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_delta_that_would_allow_to_publish_a_row_is_warned_of():
    with pytest.warns(UserWarning, match=r"delta=0.025 is not below 1 / 40"):
        fit(delta=0.025, on_failure="zero")
    assert clone(TukeyEMRegressor(delta=0.025)).delta == 0.025
