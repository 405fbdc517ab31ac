"""Mini-batch k-means against scikit-learn's step, its own inequality, and the theorem's bound."""

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import ortho_group
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning

from posterity.clustering import (
    EarlyStopMiniBatchKMeans,
    iteration_bound,
    kmeans_batch_update,
    sufficient_batch_size,
)
from posterity.testing import check_estimator

DIGITS = load_digits().data / 16


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assign(batch, centers):
    return np.square(batch[:, None] - centers).sum(2).argmin(1)


def test_conforms_to_its_kind(as_a_user):
    reason = "batches are drawn at random: weights and repeated rows agree in law, not draw by draw"
    check_estimator(
        EarlyStopMiniBatchKMeans(3, random_state=0),
        expected_failures={
            "check_sample_weight_equivalence_on_dense_data": reason,
            "check_sample_weight_equivalence_on_sparse_data": reason,
        },
        invariant=["shift X", "scale X"],
    )


def test_sklearn_rate_is_scikit_learns_partial_fit(rng):
    centers, counts = rng.random((5, 4)), np.zeros(5)
    peer = MiniBatchKMeans(5, init=centers, n_init=1, reassignment_ratio=0, random_state=0)
    for _ in range(6):
        batch = rng.random((40, 4))
        centers, _ = kmeans_batch_update(batch, centers, learning_rate="sklearn", counts=counts)
        peer.partial_fit(batch)
        np.testing.assert_allclose(centers, peer.cluster_centers_, atol=1e-13)
    np.testing.assert_array_equal(counts, peer._counts)


def test_one_cluster_goes_to_the_mean_and_gains_all_but_the_variance(rng):
    batch, start = rng.random((30, 3)), np.full((1, 3), 2.0)
    centers, progress = kmeans_batch_update(batch, start)
    np.testing.assert_allclose(centers, batch.mean(0)[None])
    before = np.square(batch - start).sum(1).mean()
    assert progress == pytest.approx(before - batch.var(0).sum())


def test_the_step_is_the_formula_and_leaves_its_input(rng):
    batch, centers = rng.random((50, 3)), rng.random((6, 3))
    kept = centers.copy()
    new, progress = kmeans_batch_update(batch, centers)
    np.testing.assert_array_equal(centers, kept)
    labels = assign(batch, centers)
    expected = centers.copy()
    for j in range(6):
        mine = batch[labels == j]
        if len(mine):
            alpha = np.sqrt(len(mine) / 50)
            expected[j] = (1 - alpha) * centers[j] + alpha * mine.mean(0)
    np.testing.assert_allclose(new, expected, atol=1e-14)
    cost = [np.square(batch[:, None] - c).sum(2).min(1).mean() for c in (centers, expected)]
    assert progress == pytest.approx(cost[0] - cost[1])


@pytest.mark.parametrize("seed", range(20))
def test_progress_is_at_least_what_the_inequality_promises(seed):
    rng = np.random.default_rng(seed)
    batch, centers = rng.random((64, 4)), rng.random((8, 4))
    labels = assign(batch, centers)
    new, progress = kmeans_batch_update(batch, centers)
    promised = 0.0
    for j in range(8):
        mine = batch[labels == j]
        if len(mine):
            share = len(mine) / 64
            promised += (
                share * np.sqrt(share) * (2 - np.sqrt(share)) * np.square(mine.mean(0) - centers[j]).sum()
            )
    assert promised >= 0
    assert progress >= promised - 1e-12
    if (assign(batch, new) == labels).all():
        assert progress == pytest.approx(promised, abs=1e-12)


def test_equality_holds_where_no_point_changes_cluster():
    batch = np.array([[0.0], [0.2], [10.0], [10.4]])
    _, progress = kmeans_batch_update(batch, np.array([[0.3], [9.9]]))
    root = np.sqrt(0.5)
    assert progress == pytest.approx(0.5 * root * (2 - root) * (0.2**2 + 0.3**2))


def test_the_step_moves_with_translations_rotations_and_scale(rng):
    batch, centers = rng.random((40, 4)), rng.random((5, 4))
    new, progress = kmeans_batch_update(batch, centers)
    turn = ortho_group.rvs(4, random_state=0)
    moved, same = kmeans_batch_update(3 * batch @ turn + 7, 3 * centers @ turn + 7)
    np.testing.assert_allclose(moved, 3 * new @ turn + 7, atol=1e-12)
    assert same == pytest.approx(9 * progress)


def test_the_run_moves_with_translation_and_scale():
    plain, moved = (
        EarlyStopMiniBatchKMeans(4, epsilon=0.02, random_state=3).fit(X) for X in (DIGITS, 50 * DIGITS - 9)
    )
    assert plain.n_iter_ == moved.n_iter_
    np.testing.assert_allclose(moved.cluster_centers_, 50 * plain.cluster_centers_ - 9, atol=1e-9)
    np.testing.assert_allclose(moved.progress_, 2500 * plain.progress_, rtol=1e-7)
    assert (plain.scale_, moved.scale_) == (1.0, 50.0)


def test_far_from_the_origin_float32_still_counts():
    X = make_blobs(2000, centers=4, random_state=0)[0]
    near, far = (EarlyStopMiniBatchKMeans(4, random_state=0).fit(Z.astype(np.float32)) for Z in (X, X + 1e4))
    assert far.cluster_centers_.dtype == np.float32
    assert far.inertia_ == pytest.approx(near.inertia_, rel=1e-2)


def test_a_center_far_from_all_points_stays_and_all_stay_in_the_hull(rng):
    init = np.vstack([rng.random((3, 64)), np.full((1, 64), 100.0)])
    model = EarlyStopMiniBatchKMeans(4, epsilon=0.05, init=init, random_state=0).fit(DIGITS)
    np.testing.assert_allclose(model.cluster_centers_[3], 100.0)
    low, high = np.minimum(init.min(0), DIGITS.min(0)), np.maximum(init.max(0), DIGITS.max(0))
    assert (model.cluster_centers_ >= low - 1e-12).all()
    assert (model.cluster_centers_ <= high + 1e-12).all()


@pytest.mark.parametrize(
    "init", ["k-means++", "random", np.zeros((10, 64))], ids=["k-means++", "random", "corner"]
)
def test_it_stops_at_the_first_step_below_epsilon_and_within_the_bound(init):
    for seed, epsilon in enumerate((0.2, 0.05, 0.02)):
        model = EarlyStopMiniBatchKMeans(
            10, epsilon=epsilon, batch_size=2048, init=init, random_state=seed
        ).fit(DIGITS)
        assert model.converged_
        assert model.n_iter_ == len(model.progress_) <= iteration_bound(64, epsilon) + 1
        assert (model.progress_[:-1] >= epsilon * model.scale_**2).all()
        assert model.progress_[-1] < epsilon * model.scale_**2


def test_the_last_step_counts_in_the_centers():
    """With the batch "theory" on little data each step sees all of it, so the run can be replayed."""
    start = DIGITS[:5]
    model = EarlyStopMiniBatchKMeans(5, epsilon=0.5, batch_size="theory", init=start, random_state=0).fit(
        DIGITS
    )
    centers = start
    for expected in model.progress_:
        centers, progress = kmeans_batch_update(DIGITS, centers)
        assert progress == pytest.approx(expected)
    np.testing.assert_allclose(model.cluster_centers_, centers)


def test_movement_stops_when_centers_rest():
    X = np.repeat([[0.0, 0.0], [4.0, 4.0]], 50, axis=0)
    model = EarlyStopMiniBatchKMeans(
        2, stop="movement", epsilon=0.01, init=X[[0, 99]] + 0.5, random_state=0
    ).fit(X)
    assert model.converged_
    np.testing.assert_allclose(model.cluster_centers_, [[0, 0], [4, 4]], atol=0.4)


def test_reaching_max_iter_warns_and_says_so():
    with pytest.warns(ConvergenceWarning, match="max_iter=2"):
        model = EarlyStopMiniBatchKMeans(10, epsilon=1e-3, max_iter=2, random_state=0).fit(DIGITS)
    assert not model.converged_
    assert model.n_iter_ == 2


def test_equal_points_need_one_iteration():
    model = EarlyStopMiniBatchKMeans(1, random_state=0).fit(np.ones((20, 3)))
    assert (model.n_iter_, model.converged_, model.scale_, model.inertia_) == (1, True, 0.0, 0.0)


def test_sparse_data_agree_with_dense():
    dense = EarlyStopMiniBatchKMeans(6, init=DIGITS[:6], random_state=0).fit(DIGITS)
    rows = EarlyStopMiniBatchKMeans(6, init=DIGITS[:6], random_state=0).fit(sparse.csr_matrix(DIGITS))
    np.testing.assert_allclose(rows.cluster_centers_, dense.cluster_centers_, atol=1e-10)
    assert rows.inertia_ == pytest.approx(dense.inertia_)


def test_labels_inertia_and_score_are_those_of_the_final_centers():
    model = EarlyStopMiniBatchKMeans(7, random_state=0).fit(DIGITS)
    gap = np.square(DIGITS[:, None] - model.cluster_centers_).sum(2)
    np.testing.assert_array_equal(model.labels_, gap.argmin(1))
    np.testing.assert_array_equal(model.predict(DIGITS), model.labels_)
    assert model.inertia_ == pytest.approx(gap.min(1).sum())
    assert model.score(DIGITS) == pytest.approx(-model.inertia_)
    np.testing.assert_allclose(model.transform(DIGITS), np.sqrt(gap), atol=1e-6)


def test_weights_of_zero_take_points_out():
    X = np.vstack([make_blobs(300, centers=[[0, 0], [5, 5]], random_state=0)[0], np.full((300, 2), 90.0)])
    weight = np.repeat([2.0, 0.0], 300)
    model = EarlyStopMiniBatchKMeans(2, epsilon=1e-4, random_state=0, n_init=3).fit(X, sample_weight=weight)
    assert model.cluster_centers_.max() < 10
    assert model.inertia_ == pytest.approx(
        2 * np.square(X[:300, None] - model.cluster_centers_).sum(2).min(1).sum()
    )


def test_more_runs_never_cost_more():
    costs = [EarlyStopMiniBatchKMeans(10, n_init=n, random_state=0).fit(DIGITS).inertia_ for n in (1, 4)]
    assert costs[1] <= costs[0]
    full = KMeans(10, n_init=4, random_state=0).fit(DIGITS).inertia_
    assert costs[1] <= 1.05 * full


def test_the_bound_and_the_batch_are_the_formulas():
    assert iteration_bound(64, 0.16) == 800
    assert iteration_bound(3, 0.7) == 9
    assert sufficient_batch_size(100, 2, 3, 0.5) == int(np.ceil(16 * np.log(100 * 3 * 4)))
    assert sufficient_batch_size(100, 2, 3, 0.5, constant=2.0) == int(np.ceil(32 * np.log(100 * 3 * 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, "epsilon must be greater than 0, got 0"),
        ({"epsilon": 64}, "epsilon must be less than n_features=64, got 64.*stop at once"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": "all"}, 'batch_size must be "theory" or an integer'),
        ({"n_clusters": 5000}, "n_clusters must be at most the number of samples, n_samples=1797, got 5000"),
        ({"n_clusters": 0}, "n_clusters must be an integer of at least 1"),
        ({"init": np.zeros((3, 64))}, r"init must have shape \(8, 64\)"),
        ({"init": np.full((8, 64), np.nan)}, "init must be finite"),
        ({"init": "best"}, "init must be one of 'k-means\\+\\+', 'random', got 'best'"),
        ({"learning_rate": "slow"}, "learning_rate must be one of 'sqrt', 'sklearn'"),
        ({"stop": "never"}, "stop must be one of 'progress', 'movement'"),
        ({"n_init": 0}, "n_init must be an integer of at least 1"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1"),
    ],
)
def test_refuses_bad_parameters_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopMiniBatchKMeans(**options).fit(DIGITS)


@pytest.mark.parametrize("weight", [-1.0, 0.0])
def test_refuses_bad_weights(as_a_user, weight):
    with pytest.raises(ValueError, match=r"non-negative|at least one non-zero"):
        EarlyStopMiniBatchKMeans(2).fit(DIGITS, sample_weight=np.full(len(DIGITS), weight))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_data_that_are_not_finite(as_a_user, bad):
    X = DIGITS.copy()
    X[3, 4] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        EarlyStopMiniBatchKMeans(2).fit(X)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((3, 2)), np.zeros((2, 2))), {"learning_rate": "sklearn"}, "counts must be given"),
        (
            (np.zeros((3, 2)), np.zeros((2, 2))),
            {"learning_rate": "sklearn", "counts": np.zeros(3)},
            r"counts must have shape \(2,\)",
        ),
        ((np.zeros((3, 2)), np.zeros((2, 2))), {"learning_rate": "x"}, "learning_rate must be one of"),
        ((np.zeros((3, 2)), np.zeros((2, 3))), {}, r"centers must be \(k, 2\)"),
        ((np.zeros((0, 2)), np.zeros((2, 2))), {}, r"batch must be \(b, d\)"),
    ],
)
def test_the_step_refuses_bad_input(as_a_user, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans_batch_update(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iteration_bound(0, 0.1), "n_features must be"), (lambda: iteration_bound(2, 2), "epsilon must be less"),
        (lambda: sufficient_batch_size(0, 2, 3, 0.5), "n_samples must be"),
        (lambda: sufficient_batch_size(9, 2, 3, 0.5, constant=0), "constant must be greater than 0"),
    ],
)  # fmt: skip
def test_the_formulas_refuse_bad_input(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(centre, 0.3, (60, 2)) for centre in (0, 5, 10)])


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e8, 1), (-1e8, 1), (0, 1e-12), (0, 1e12), (1e8, 10)])
def test_labels_and_costs_do_not_depend_on_where_the_origin_is_and_what_the_unit_is(blobs, offset, scale):
    X = scale * blobs + offset
    model = EarlyStopMiniBatchKMeans(3, random_state=0).fit(X)
    plain = EarlyStopMiniBatchKMeans(3, random_state=0).fit(blobs)
    assert model.labels_.tolist() == plain.labels_.tolist() == model.predict(X).tolist()
    assert model.inertia_ == pytest.approx(scale**2 * plain.inertia_, rel=1e-4)
    assert model.score(X) == pytest.approx(-model.inertia_, rel=1e-4)
    np.testing.assert_allclose(
        model.transform(X), scale * plain.transform(blobs), rtol=1e-4, atol=1e-6 * scale
    )
    squares = np.square(X[:, None] - model.cluster_centers_).sum(2)
    assert model.labels_.tolist() == squares.argmin(1).tolist()


@pytest.mark.parametrize("batch_size", ["theory", 256])
def test_rows_of_weight_zero_are_not_there(blobs, batch_size):
    far = np.concatenate([blobs, [[1e6, -1e6]]])
    weight = np.r_[np.ones(len(blobs)), 0]
    options = {"init": blobs[[0, 60, 120]], "batch_size": batch_size, "epsilon": 0.01, "random_state": 0}
    model = EarlyStopMiniBatchKMeans(3, **options).fit(far, sample_weight=weight)
    alone = EarlyStopMiniBatchKMeans(3, **options).fit(blobs)
    assert model.scale_ == pytest.approx(alone.scale_)
    if batch_size == "theory":  # every step sees all rows; smaller batches are drawn otherwise
        assert model.inertia_ == pytest.approx(alone.inertia_)


def test_a_step_that_sees_all_data_weighs_its_rows(blobs):
    """Weights of whole numbers are repeated rows."""
    weight = np.arange(len(blobs)) % 3 + 1
    options = {"init": blobs[[0, 60, 120]], "batch_size": "theory", "epsilon": 0.001}
    model = EarlyStopMiniBatchKMeans(3, **options).fit(blobs, sample_weight=weight)
    repeated = EarlyStopMiniBatchKMeans(3, **options).fit(np.repeat(blobs, weight, axis=0))
    np.testing.assert_allclose(model.cluster_centers_, repeated.cluster_centers_)
    assert model.n_iter_ == repeated.n_iter_


def test_wide_indices_are_read_as_narrow_ones(blobs):
    X = sparse.csr_matrix(np.where(np.abs(blobs) < 1, 0, blobs))
    plain = EarlyStopMiniBatchKMeans(3, random_state=0).fit(X)
    X.indices, X.indptr = X.indices.astype(np.int64), X.indptr.astype(np.int64)
    model = EarlyStopMiniBatchKMeans(3, random_state=0).fit(X)
    assert model.labels_.tolist() == plain.labels_.tolist() == model.predict(X).tolist()
