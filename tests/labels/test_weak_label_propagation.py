"""Propagation against dense solves and brute force, votes against loops over Bayes' rule, the estimator against its parts."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.datasets import load_iris, make_blobs

import posterity.labels.label_votes as label_votes
import posterity.labels.propagation as propagation
import posterity.labels.weak_label_propagation as module
from posterity.labels import (
    WeakLabelPropagation,
    absorption_weights,
    aggregate_votes,
    distance_graph,
    prior_confidence,
    propagate,
    smooth_prior,
    vote_graph,
)
from posterity.testing import check_estimator


def problem(n=40, c=3, l=6, seed=0, density=0.15):
    """Return a weighted graph that is connected, a prior, labels, who has them, and confidences, some 0."""
    rng = np.random.default_rng(seed)
    W = np.triu(rng.random((n, n)) * (rng.random((n, n)) < density), 1)
    W[np.arange(n - 1), np.arange(1, n)] += 0.1
    kappa = rng.random(n) * (rng.random(n) < 0.6)
    return W + W.T, rng.dirichlet(np.ones(c), n), rng.integers(0, c, l), rng.permutation(n)[:l], kappa


def dense(W, prior, labels, labeled, kappa):
    """Return the solution by a dense solve of the normal equations."""
    n, c = prior.shape
    free = np.setdiff1d(np.arange(n), labeled)
    system = np.diag(W.sum(1) + kappa) - W
    f = np.zeros((n, c))
    f[labeled] = np.eye(c)[labels]
    rhs = W[np.ix_(free, labeled)] @ f[labeled] + (kappa[:, None] * prior)[free]
    f[free] = np.linalg.solve(system[np.ix_(free, free)], rhs)
    return f


def objective(f, W, prior, labeled, kappa):
    free = ~np.isin(np.arange(len(W)), labeled)
    spread = sum(W[i, j] * np.square(f[i] - f[j]).sum() for i, j in itertools.combinations(range(len(W)), 2))
    return spread + (kappa * np.square(f - prior).sum(1))[free].sum()


@pytest.fixture(params=["factorised", "filled", "iterated"])
def path(request, monkeypatch):
    """Solve by a sparse factorisation, a dense one, and conjugate gradients."""
    monkeypatch.setattr(propagation, "FILLED", 0.0 if request.param == "filled" else 1.0)
    monkeypatch.setattr(propagation, "DIRECT", 0 if request.param == "iterated" else 3_000)


@pytest.mark.parametrize("seed", range(3))
def test_every_path_is_the_dense_solve(path, seed):
    W, prior, labels, labeled, kappa = problem(seed=seed)
    expected = dense(W, prior, labels, labeled, kappa)
    for graph in (W, W + np.diag(kappa), sparse.csr_array(W), sparse.coo_matrix(W), torch.from_numpy(W)):
        f = propagate(graph, prior, labels, labeled, confidence=kappa)
        np.testing.assert_allclose(f, expected, rtol=0, atol=1e-9)


def test_no_step_lowers_the_objective_whose_gradient_is_zero(path):
    W, prior, labels, labeled, kappa = problem()
    f = propagate(W, prior, labels, labeled, confidence=kappa)
    free = ~np.isin(np.arange(len(W)), labeled)
    gradient = 2 * (W.sum(1)[:, None] * f - W @ f) + 2 * kappa[:, None] * (f - prior)
    assert np.abs(gradient[free]).max() < 1e-8
    least = objective(f, W, prior, labeled, kappa)
    for seed in range(5):
        step = 1e-3 * np.random.default_rng(seed).normal(size=f.shape) * free[:, None]
        assert objective(f + step, W, prior, labeled, kappa) > least


def test_rows_are_distributions_between_the_least_and_the_largest_target(path):
    W, prior, labels, labeled, kappa = problem()
    prior = 0.2 + 0.4 * prior
    f = propagate(W, prior, labels[:3], labeled[:3], confidence=kappa)
    np.testing.assert_allclose(f.sum(1), 1, atol=1e-12)
    assert f.min() >= 0
    alone = propagate(W, prior, [], [], confidence=kappa)
    assert (alone >= prior.min(0) - 1e-12).all()
    assert (alone <= prior.max(0) + 1e-12).all()
    np.testing.assert_array_equal(f[labeled[:3]], np.eye(3)[labels[:3]])


def test_without_confidence_it_is_the_harmonic_solution_and_with_all_of_it_the_prior(path):
    W, prior, labels, labeled, _ = problem()
    free = np.setdiff1d(np.arange(len(W)), labeled)
    laplacian = np.diag(W.sum(1)) - W
    harmonic = np.linalg.solve(laplacian[np.ix_(free, free)], W[np.ix_(free, labeled)] @ np.eye(3)[labels])
    for kappa in (1e-10, 0.0):
        f = propagate(W, prior, labels, labeled, confidence=kappa)
        np.testing.assert_allclose(f[free], harmonic, rtol=0, atol=1e-6)
    f = propagate(W, prior, labels, labeled, confidence=1e10)
    np.testing.assert_allclose(f[free], prior[free], rtol=0, atol=1e-6)


def test_absorption_weights_are_shares_that_make_and_bound_the_solution():
    W, prior, labels, labeled, kappa = problem()
    W[:5], W[:, :5] = 0, 0  # a part with nothing but confidences, and rows without any
    kappa[:3] = 0
    A, B = absorption_weights(W, labeled, confidence=kappa)
    np.testing.assert_allclose(A.sum(1) + B.sum(1), 1, atol=1e-12)
    assert min(A.min(), B.min()) >= 0
    f = propagate(W, prior, labels, labeled, confidence=kappa)
    np.testing.assert_allclose(A @ np.eye(3)[labels] + B @ prior, f, rtol=0, atol=1e-10)
    y = np.eye(3)[np.random.default_rng(1).integers(0, 3, len(W))]
    bound = [
        a @ np.linalg.norm(np.eye(3)[labels] - own, axis=1) + b @ np.linalg.norm(prior - own, axis=1)
        for a, b, own in zip(A, B, y, strict=True)
    ]
    assert (np.linalg.norm(f - y, axis=1) <= np.array(bound) + 1e-12).all()


def test_absorption_weights_are_the_frequencies_of_a_walk():
    W = np.array([[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=float)
    kappa, rng = np.array([0, 0, 1.0, 0.5]), np.random.default_rng(0)
    A, B = absorption_weights(W, [0], confidence=kappa)
    ends = np.zeros(5)
    for _ in range(4000):
        at = 1
        while True:
            rates = np.append(W[at], kappa[at])
            to = rng.choice(5, p=rates / rates.sum())
            if to in (0, 4):
                ends[0 if to == 0 else 1 + at] += 1 / 4000
                break
            at = to
    np.testing.assert_allclose(np.append(A[1], B[1]), ends, atol=0.03)


@pytest.mark.parametrize("kappa", [0.3, 1e-6, 1e-12, 1e-30, 1e-300])
def test_without_labels_the_mean_is_that_of_the_prior_towards_which_all_tend(path, kappa):
    W, prior, *_ = problem(30)
    both = np.block([[W, np.zeros_like(W)], [np.zeros_like(W), 3 * W]])  # two parts
    h = np.vstack([prior, prior[:, ::-1]])
    f = propagate(both, h, [], [], confidence=kappa)
    for rows in (slice(0, 30), slice(30, 60)):
        np.testing.assert_allclose(f[rows].mean(0), h[rows].mean(0), rtol=0, atol=1e-12)
        if kappa <= 1e-6:
            assert np.abs(f[rows] - h[rows].mean(0)).max() < 3e3 * kappa + 1e-11


def test_of_unequal_confidences_far_below_rounding_the_weighted_mean_is_left():
    W, prior, *_ = problem(20)
    kappa = 1e-40 * np.arange(20)
    f = propagate(W, prior, [], [], confidence=kappa)
    np.testing.assert_allclose(f, np.tile(kappa @ prior / kappa.sum(), (20, 1)), rtol=0, atol=1e-12)


def test_a_part_that_nothing_pulls_is_its_prior(path):
    W = np.kron(np.eye(3), 1 - np.eye(2))
    prior = np.array([[0.3, 0.7], [0.6, 0.4]] * 3)
    f = propagate(W, prior, [1], [0], confidence=[0, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(f, [[0, 1], [0, 1], *prior[:2], [0.3, 0.7], [0.3, 0.7]], atol=1e-12)


def test_nodes_may_be_renamed_and_weights_and_confidences_scaled_together(path):
    W, prior, labels, labeled, kappa = problem()
    f = propagate(W, prior, labels, labeled, confidence=kappa)
    order = np.random.default_rng(3).permutation(len(W))
    place = np.argsort(order)
    moved = propagate(W[np.ix_(order, order)], prior[order], labels, place[labeled], confidence=kappa[order])
    np.testing.assert_allclose(moved, f[order], rtol=0, atol=1e-9)
    for unit in (1e-200, 1e-12, 7.0, 1e200):
        scaled = propagate(unit * W, prior, labels, labeled, confidence=unit * kappa)
        np.testing.assert_allclose(scaled, f, rtol=0, atol=1e-9)


def test_smoothing_is_the_dense_solve_and_keeps_the_mean():
    W, prior, *_ = problem()
    system = np.eye(40) + 10 * (np.diag(W.sum(1)) - W)
    smoothed = smooth_prior(W, prior)
    np.testing.assert_allclose(smoothed, np.linalg.solve(system, prior), rtol=0, atol=1e-12)
    np.testing.assert_allclose(smoothed.mean(0), prior.mean(0), atol=1e-12)
    np.testing.assert_allclose(smooth_prior(W, prior, alpha=0), prior, atol=1e-15)
    system = np.eye(40) + 0.3 * (np.diag(W.sum(1)) - W)
    np.testing.assert_allclose(smooth_prior(W, prior, alpha=0.3), np.linalg.solve(system, prior), atol=1e-12)


@pytest.mark.parametrize("n_hops", [0, 1, 3])
def test_confidence_is_the_formula_and_low_near_labels(n_hops):
    path = np.diag(np.ones(9), 1) + np.diag(np.ones(9), -1)
    s = np.linspace(0.02, 0.95, 10)
    near = np.where(np.arange(10) <= 2 + n_hops, 1e-3, 1.0)
    near[: max(0, 2 - n_hops)] = 1.0
    two = np.stack([1 - s, s], axis=1)
    quadratic = prior_confidence(two, path, [2], n_hops=n_hops)
    np.testing.assert_allclose(quadratic, 500 * ((2 * np.abs(s - 0.5) + 0.001) * near) ** 2, rtol=1e-9)
    step = prior_confidence(two, path, [2], n_hops=n_hops, kind="step", scale=100.0, threshold=0.2)
    np.testing.assert_allclose(step, 50 * np.where((s < 0.2) | (s > 0.8), 1e6, 1e-3) * near, rtol=1e-9)
    three = prior_confidence(np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]), np.zeros((2, 2)), [])
    np.testing.assert_allclose(three, [500 * 1.001**2, 500 * 0.001**2], rtol=1e-9)


def draw_votes(n, accuracies, c, seed=0, abstains=0.3, shares=None):
    rng = np.random.default_rng(seed)
    y = rng.choice(c, n, p=shares)
    votes = np.full((n, len(accuracies)), -1)
    for j, a in enumerate(accuracies):
        wrong = (y + rng.integers(1, c, n)) % c
        votes[:, j] = np.where(rng.random(n) < abstains, -1, np.where(rng.random(n) < a, y, wrong))
    return votes, y


@pytest.mark.parametrize("c", [2, 4])
def test_em_is_a_loop_over_bayes_rule(c):
    votes, _ = draw_votes(60, [0.9, 0.7, 0.6, 0.8], c)
    m, voted = votes.shape[1], np.flatnonzero((votes >= 0).any(1))
    p = aggregate_votes(votes, c, method="majority")
    for _ in range(100):
        pi = np.array([(1 + sum(p[i][k] for i in voted)) / (c + len(voted)) for k in range(c)])
        right = [[p[i, votes[i, j]] for i in voted if votes[i, j] >= 0] for j in range(m)]
        a = [(1 + sum(r)) / (2 + len(r)) for r in right]
        new = np.full_like(p, 1 / c)
        for i in voted:
            for k in range(c):
                cast = [j for j in range(m) if votes[i, j] >= 0]
                new[i, k] = pi[k] * np.prod(
                    [a[j] if votes[i, j] == k else (1 - a[j]) / (c - 1) for j in cast]
                )
            new[i] /= new[i].sum()
        p = new
    np.testing.assert_allclose(aggregate_votes(votes, c), p, rtol=0, atol=1e-10)


def test_em_finds_who_is_right_where_the_majority_does_not():
    votes, y = draw_votes(4000, [0.95, 0.55, 0.55, 0.55, 0.55], 2, abstains=0.0, shares=[0.7, 0.3])
    em, majority = (aggregate_votes(votes, 2, method=method).argmax(1) for method in ("em", "majority"))
    assert (em == y).mean() > 0.93
    assert (majority == y).mean() < 0.82


def test_the_majority_shares_ties_and_no_vote_says_nothing():
    votes = [[0, 0, 2], [1, 2, -1], [-1, -1, -1], [2, -1, -1], [0, 1, 2]]
    third = 1 / 3
    expected = [[1, 0, 0], [0, 0.5, 0.5], [third, third, third], [0, 0, 1], [third, third, third]]
    np.testing.assert_allclose(aggregate_votes(votes, 3, method="majority"), expected)
    np.testing.assert_allclose(aggregate_votes(votes, 3)[2], third)
    np.testing.assert_allclose(aggregate_votes(np.full((4, 2), -1), 3), third)


def test_classes_rows_and_rules_may_be_renamed():
    votes, _ = draw_votes(80, [0.9, 0.7, 0.6], 3)
    p, rng = aggregate_votes(votes, 3), np.random.default_rng(1)
    to = np.array([2, 0, 1])
    renamed = np.where(votes < 0, -1, to[votes])
    np.testing.assert_allclose(aggregate_votes(renamed, 3)[:, to], p, atol=1e-12)
    order = rng.permutation(80)
    np.testing.assert_allclose(aggregate_votes(votes[order][:, ::-1], 3), p[order], atol=1e-12)


@pytest.mark.parametrize(("m", "c"), [(3, 2), (4, 3), (60, 2), (220, 2), (120, 3), (250, 3)])
def test_edges_of_votes_are_those_of_the_cosine(monkeypatch, m, c):
    monkeypatch.setattr(label_votes, "PRODUCTS", 40)
    rng = np.random.default_rng(0)
    votes = rng.integers(-1, c, (30, m))
    votes[10:] = votes[rng.integers(0, 10, 20)]
    for row in votes[15:]:  # a vote or two beside others
        at = rng.integers(0, m, 2)
        row[at] = rng.integers(-1, c, 2)
    votes[5], votes[6], votes[7] = -1, np.arange(m) % c, np.arange(m) % c
    votes[7, 0] = -1
    code = np.where(votes < 0, 0, 2 * votes - 1) if c == 2 else np.eye(c + 1)[votes][:, :, :c].reshape(30, -1)
    dot = code @ code.T
    alike = (100 * dot) ** 2 > 99**2 * np.outer(np.diag(dot), np.diag(dot))
    alike &= (dot > 0) & ~np.eye(30, dtype=bool)
    graph = vote_graph(votes)
    np.testing.assert_array_equal(graph.toarray(), alike)
    assert (m < 50) == (len(label_votes._alike(votes, None)[1].data) == 0)
    some = rng.random(30) < 0.7
    np.testing.assert_array_equal(vote_graph(votes, confident=some).toarray(), alike & np.outer(some, some))


@pytest.mark.parametrize("kind", ["normal", "grid", "twins"])
def test_the_distance_graph_is_the_definition(monkeypatch, kind):
    monkeypatch.setattr(module, "DISTANCES", 500)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(83, 3)) if kind == "normal" else rng.integers(0, 4, (83, 2)).astype(float)
    X = np.repeat(X[:9], 9, axis=0) if kind == "twins" else X
    distances = cdist(X, X)
    for degree in (0.5, 1.0, 1.5, 7, 10.0, 33.3, len(X)):
        expected = distances <= np.quantile(distances, degree / len(X))
        np.fill_diagonal(expected, False)
        np.testing.assert_array_equal(distance_graph(X, degree).toarray(), expected)


def test_units_and_origin_leave_the_graph_alone():
    X = np.round(256 * np.random.default_rng(0).normal(size=(60, 3))) / 256
    plain = distance_graph(X).toarray()
    for moved in (X + 2**30, 2.0**-600 * X, 2.0**600 * X, X.astype(np.float32), torch.from_numpy(X)):
        np.testing.assert_array_equal(distance_graph(moved).toarray(), plain)


@pytest.mark.parametrize("d", [2, 8])
def test_a_sample_of_many_points_gives_nearly_the_degree(monkeypatch, d):
    monkeypatch.setattr(module, "EXACT", 500)
    monkeypatch.setattr(module, "SAMPLE", 500)
    X = np.random.default_rng(0).normal(size=(3000, d))
    graph = distance_graph(X, 20, random_state=0)
    assert graph.sum() / 3000 == pytest.approx(19, rel=0.2)
    assert (graph != graph.T).nnz == 0
    assert graph.diagonal().sum() == 0


def data(seed=0):
    X, truth = make_blobs(120, centers=3, cluster_std=2.0, random_state=seed)
    votes, _ = draw_votes(120, [0.8, 0.7, 0.9], 3, seed)
    y = np.full(120, -1)
    y[::10] = truth[::10]
    rng = np.random.default_rng(seed)
    votes = np.where((votes >= 0) & (rng.random(votes.shape) < 0.8), truth[:, None], votes)
    return X, y, votes, truth


@pytest.mark.parametrize(
    "options", [{}, {"confidence": "adaptive", "smooth_degree": 20}], ids=["plain", "adaptive"]
)
def test_conforms_to_its_kind(as_a_user, options):
    reason = "-1 marks a row without a label, as in scikit-learn's own, which this check knows by name"
    check_estimator(
        WeakLabelPropagation(**options),
        expected_failures={"check_classifiers_classes": reason},
        invariant=["shift X", "scale X"],
    )


@pytest.mark.parametrize("confidence", [0.3, "adaptive", "step"])
@pytest.mark.parametrize("vote_weight", [0.0, 0.2])
def test_the_estimator_is_its_parts(confidence, vote_weight):
    X, y, votes, _ = data()
    model = WeakLabelPropagation(
        confidence=confidence, vote_weight=vote_weight, smooth_degree=30, prune_quantile=0.4
    ).fit(X, y, votes)
    graph, prior, labeled = distance_graph(X), aggregate_votes(votes, 3), np.flatnonzero(y >= 0)
    smoothed = smooth_prior(distance_graph(X, 30), prior)
    kinds = {"adaptive": "quadratic", "step": "step"}
    kappa = confidence
    if confidence in kinds:
        kappa = prior_confidence(smoothed, graph, labeled, kind=kinds[confidence])
    decided = smoothed.max(1)
    graph = graph + vote_weight * vote_graph(votes, confident=decided >= np.quantile(decided, 0.4))
    f = propagate(graph, prior, y[labeled], labeled, confidence=kappa)
    np.testing.assert_allclose(model.label_distributions_, f, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.prior_, prior)
    np.testing.assert_allclose(model.confidence_, np.broadcast_to(kappa, 120))
    np.testing.assert_array_equal(model.labels_, f.argmax(1))


def test_votes_that_are_alike_but_not_equal_have_edges_too():
    X, y, _, truth = data()
    votes = np.repeat(truth[:, None], 60, axis=1)
    votes[::2, 0] = -1
    model = WeakLabelPropagation(vote_weight=0.1).fit(X, y, votes)
    graph, labeled = distance_graph(X) + 0.1 * vote_graph(votes), np.flatnonzero(y >= 0)
    f = propagate(graph, aggregate_votes(votes, 3), y[labeled], labeled, confidence=0.1)
    np.testing.assert_allclose(model.label_distributions_, f, rtol=0, atol=1e-10)


def test_without_weak_labels_it_is_label_propagation():
    X, y, *_ = data()
    model = WeakLabelPropagation(avg_degree=20, confidence=7.0).fit(X, y)
    labeled = np.flatnonzero(y >= 0)
    f = propagate(distance_graph(X, 20), np.full((120, 3), 1 / 3), y[labeled], labeled, confidence=1e-3)
    np.testing.assert_allclose(model.label_distributions_, f, rtol=0, atol=1e-12)


def test_new_rows_have_the_mean_within_the_radius_or_the_nearest():
    X, y, votes, _ = data()
    model = WeakLabelPropagation().fit(X, y, votes)
    rows = np.vstack([X[:10] + 0.3, X + 0.0, [[90.0, 90.0]]])
    distances = cdist(rows, X)
    assert model.radius_ == pytest.approx(np.quantile(cdist(X, X), 10 / 120))
    for own, near in zip(model.predict_proba(rows), distances, strict=True):
        inside = near <= model.radius_ * (1 + 1e-9)
        inside = inside if inside.any() else near == near.min()
        np.testing.assert_allclose(own, model.label_distributions_[inside].mean(0), atol=1e-12)
    np.testing.assert_array_equal(model.predict(rows), model.predict_proba(rows).argmax(1))


def test_votes_are_labels_and_may_name_a_class_that_no_label_has():
    X, truth = load_iris(return_X_y=True)
    truth = truth * 10 + 5
    y = np.where(np.arange(150) % 15 == 0, truth, -1)
    y[truth == 25] = -1
    votes = np.where(np.arange(150)[:, None] % 3 == np.arange(3), truth[:, None], -1)
    model = WeakLabelPropagation(confidence=10.0).fit(X, y, votes)
    assert model.classes_.tolist() == [5, 15, 25]
    assert (model.labels_ == truth).mean() > 0.9
    assert (model.predict(X) == truth).mean() > 0.9
    sure = WeakLabelPropagation(confidence=1e6).fit(X, np.full(150, -1), votes)
    assert sure.labels_.tolist() == truth.tolist()
    words = np.array(["x", "yy"])[(truth == 25).astype(int)]
    assert set(WeakLabelPropagation().fit(X, words).predict(X)) == {"x", "yy"}


NARROW = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_numbers_are_read_as_they_are(dtype):
    W, prior, labels, labeled, kappa = problem()
    narrow = [torch.from_numpy(x).to(dtype) for x in (W, prior, kappa)]
    wide = [x.double().numpy() for x in narrow]
    f = propagate(narrow[0], narrow[1], torch.from_numpy(labels), labeled, confidence=narrow[2])
    shares = wide[1] / wide[1].sum(1, keepdims=True)
    np.testing.assert_allclose(f, dense(wide[0], shares, labels, labeled, wide[2]), rtol=0, atol=1e-9)


PAIR, EVEN = [[0, 1], [1, 0]], [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propagate([[0, 1], [0, 0]], EVEN, [], []), r"adjacency must be symmetric, got 1 at \(0, 1\) and 0 at \(1, 0\)"),
        (lambda: propagate([[0, -1], [-1, 0]], EVEN, [], []), "adjacency must not be negative, got -1"),
        (lambda: propagate([[0, np.nan], [np.nan, 0]], EVEN, [], []), "adjacency must be finite"),
        (lambda: propagate(np.zeros((2, 3)), EVEN, [], []), r"adjacency must have shape \(n, n\)"),
        (lambda: propagate(np.zeros((0, 0)), EVEN, [], []), "adjacency must have shape"),
        (lambda: propagate([[0, 1e308, 1e308], [1e308, 0, 0], [1e308, 0, 0]], EVEN, [], []), "adjacency must have a finite sum"),
        (lambda: propagate(torch.eye(2).to_sparse(), EVEN, [], []), "adjacency must be dense where it is a tensor"),
        (lambda: propagate(PAIR, EVEN[:1], [], []), r"prior must have shape \(2, c\) for adjacency"),
        (lambda: propagate(PAIR, [[1], [1]], [], []), "prior must have shape .* c at least 2"),
        (lambda: propagate(PAIR, [[1.5, -0.5], [1, 0]], [], []), "prior must not be negative, got -0.5"),
        (lambda: propagate(PAIR, [[0.5, 0.5], [0.5, 0.4]], [], []), "prior must have rows that sum to 1, row 1 has 0.9"),
        (lambda: propagate(PAIR, EVEN, [2], [0]), r"labels must be in 0\.\.1, classes of prior, got 2"),
        (lambda: propagate(PAIR, EVEN, [-1], [0]), r"labels must be in 0\.\.1, classes of prior, got -1"),
        (lambda: propagate(PAIR, EVEN, [0.5], [0]), "labels must be integers"),
        (lambda: propagate(PAIR, EVEN, [0, 1], [0]), "labels must have a class for each of labeled, 1, got 2"),
        (lambda: propagate(PAIR, EVEN, [0, 0], [1, 1]), "labeled must name no node twice, got 1 2 times"),
        (lambda: propagate(PAIR, EVEN, [0], [2]), r"labeled must be in 0\.\.1, rows of adjacency, got 2"),
        (lambda: propagate(PAIR, EVEN, [0], [0], confidence=-1.0), "confidence must be at least 0, got -1"),
        (lambda: propagate(PAIR, EVEN, [0], [0], confidence=[1.0]), r"confidence must be a number or have shape \(2,\)"),
        (lambda: propagate(PAIR, EVEN, [0], [0], confidence=np.inf), "confidence must be finite"),
        (lambda: propagate(PAIR, EVEN, [], [], confidence=0.0), "confidence must be positive somewhere where labeled is empty"),
        (lambda: absorption_weights(PAIR, [], confidence=0.0), "confidence must be positive somewhere"),
        (lambda: smooth_prior(PAIR, EVEN, alpha=-1), "alpha must be at least 0"),
        (lambda: prior_confidence(EVEN, PAIR, [0], n_hops=-1), "n_hops must be an integer of at least 0"),
        (lambda: prior_confidence(EVEN, PAIR, [0], kind="cubic"), "kind must be one of"),
        (lambda: prior_confidence(EVEN, PAIR, [0], scale=-1.0), "scale must be at least 0"),
        (lambda: prior_confidence(EVEN, PAIR, [0], threshold=2.0), r"threshold must be in \[0, 1\]"),
        (lambda: prior_confidence([[1, 2], [0, 1]], PAIR, [0]), "smoothed must have rows that sum to 1"),
        (lambda: aggregate_votes([[2]], 2), r"votes must be in -1\.\.1, got 2"),
        (lambda: aggregate_votes([[-2]], 2), r"votes must be in -1\.\.1, got -2"),
        (lambda: aggregate_votes([[0.5]], 2), "votes must be whole numbers"),
        (lambda: aggregate_votes([0], 2), r"votes must have shape \(n, m\)"),
        (lambda: aggregate_votes([[0]], 1), "n_classes must be an integer of at least 2"),
        (lambda: aggregate_votes([[0]], 2, method="snorkel"), "method must be one of"),
        (lambda: vote_graph([[-2]]), "votes must be of at least -1, got -2"),
        (lambda: vote_graph([[0]], confident=[0.5]), r"confident must be bool of shape \(1,\) for votes"),
        (lambda: distance_graph([[0.0]], 2), r"avg_degree must be in \(0, 1\], got 2"),
        (lambda: distance_graph([[np.nan]], 1), "X must be finite"),
        (lambda: distance_graph([1.0, 2.0], 1), r"X must have shape \(n, d\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "weak_labels", "message"),
    [
        ({}, None, "y must have a label, or weak_labels be given"),
        ({}, np.full((120, 2), -1), "y and weak_labels must name at least 2 classes, got 0 class"),
        ({}, np.zeros((9, 2), int), "weak_labels must have a row for each of y, 120, got 9"),
        ({}, np.full((120, 2), -2), "weak_labels: votes must be of at least -1, got -2"),
        ({"confidence": 0.0}, np.eye(120, 2, dtype=int), "confidence must be positive somewhere"),
        ({"confidence": "soft"}, np.eye(120, 2, dtype=int), "confidence must be one of 'adaptive', 'step'"),
        ({"confidence": -1.0}, None, "confidence must be at least 0"),
        ({"avg_degree": 0}, None, "avg_degree must be greater than 0"),
        ({"smooth_degree": -1}, None, "smooth_degree must be greater than 0"),
        ({"vote_weight": -1}, None, "vote_weight must be at least 0"),
        ({"prune_quantile": 2}, None, r"prune_quantile must be in \[0, 1\]"),
    ],
)
def test_the_estimator_refuses_bad_input_by_name(as_a_user, options, weak_labels, message):
    with pytest.raises(ValueError, match=message):
        WeakLabelPropagation(**options).fit(data()[0], np.full(120, -1), weak_labels)
    with pytest.raises(ValueError, match="y must hold whole numbers where weak_labels do"):
        WeakLabelPropagation().fit(data()[0], np.array(list("ab") * 60), np.zeros((120, 1), int))
