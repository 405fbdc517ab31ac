"""The score against its definition by removal, its kernel against the expectation, and what leaves both alone."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import ortho_group
from sklearn.datasets import load_iris

from posterity.labels import cg_score as module
from posterity.labels import cg_scores, prune_by_score, relu_ntk_gram
from posterity.testing import check_metric


def draw(n=40, d=6, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, d)), rng.integers(classes, size=n)
    y[:classes] = np.arange(classes)
    return X, y


def kernel(X):
    """H, in the plain form; its own line of NumPy."""
    u = X / np.linalg.norm(X, axis=1, keepdims=True)
    H = u @ u.T * (np.pi - np.arccos(np.clip(u @ u.T, -1, 1))) / (2 * np.pi)
    H[np.diag_indices(len(u))] = 0.5
    return H


def complexity(H, signs):
    return signs @ np.linalg.solve(H, signs)


def by_removal(H, signs):
    """The definition: complexity with all less complexity without one."""
    rows = np.arange(len(signs))
    whole = complexity(H, signs)
    return np.array(
        [
            whole - complexity(H[np.ix_(rest, rest)], signs[rest])
            for rest in (np.delete(rows, i) for i in rows)
        ]
    )


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (9, 2), (60, 8), (40, 100)])
def test_is_what_removal_takes_from_the_complexity(n, d, jitter):
    X, y = draw(n, d, seed=n)
    expected = by_removal(kernel(X) + jitter * np.eye(n), 2.0 * y - 1)
    np.testing.assert_allclose(cg_scores(X, y, ratio=None, jitter=jitter), expected, rtol=1e-8)


def test_of_several_classes_each_is_scored_against_the_rest():
    X, y = draw(45, classes=3, seed=1)
    scores = cg_scores(X, y, ratio=None)
    for c in range(3):
        expected = by_removal(kernel(X), np.where(y == c, 1.0, -1.0))
        np.testing.assert_allclose(scores[y == c], expected[y == c], rtol=1e-8)


def test_repeats_are_averages_over_draws_of_as_many_others_as_the_ratio_says():
    """With one other of three there are three scores; their mean must be what many draws come to."""
    X, y = draw(5, classes=2, seed=2)
    y = np.array([0, 0, 1, 1, 1])
    possible = []
    for other in (2, 3, 4):
        rows = [0, 1, other]
        possible.append(by_removal(kernel(X[rows]), np.array([1.0, 1.0, -1.0]))[:2])
    possible = np.array(possible)
    seen = set()
    for seed in range(20):
        once = cg_scores(X, y, ratio=0.5, n_repeats=1, random_state=seed)
        gap = abs(possible - once[:2]).max(1)
        assert gap.min() < 1e-9
        seen.add(int(gap.argmin()))
    assert seen == {0, 1, 2}
    many = cg_scores(X, y, ratio=0.5, n_repeats=1500, random_state=0)
    error = possible.std(0) / math.sqrt(1500)
    assert (abs(many[:2] - possible.mean(0)) < 4 * error).all()
    # class 1 may meet both of class 0 at this ratio, but one of them at a lower one
    pair = np.array([by_removal(kernel(X[[2, 3, 4, k]]), np.array([1.0, 1, 1, -1]))[:3] for k in (0, 1)])
    low = cg_scores(X, y, ratio=0.5, n_repeats=1, random_state=3)[2:]
    assert abs(pair - low).max(1).min() < 1e-9
    full = by_removal(kernel(X), np.where(y == 1, 1.0, -1.0))[2:]
    np.testing.assert_allclose(cg_scores(X, y, ratio=1.0, random_state=3)[2:], full, rtol=1e-8)


def test_a_seed_repeats_and_without_draws_there_is_nothing_random():
    X, y = draw(60, classes=4, seed=3)
    first = cg_scores(X, y, random_state=0)
    np.testing.assert_array_equal(first, cg_scores(X, y, random_state=np.random.RandomState(0)))
    assert abs(first - cg_scores(X, y, random_state=1)).max() > 1e-3
    full = cg_scores(X, y, ratio=None, random_state=0)
    np.testing.assert_array_equal(full, cg_scores(X, y, ratio=None, n_repeats=3, random_state=1))
    np.testing.assert_allclose(full, cg_scores(X, y, ratio=1e9, n_repeats=1, random_state=1), rtol=1e-12)


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_terms_are_those_of_the_inverse_and_add_up(ratio):
    X, y = draw(50, classes=2 if ratio is None else 4, seed=4)
    scores, terms = cg_scores(X, y, ratio=ratio, random_state=0, return_terms=True)
    assert list(terms) == ["self", "cross", "rest"]
    np.testing.assert_allclose(terms["self"] + 2 * terms["cross"] + terms["rest"], scores, rtol=1e-10)
    assert (scores >= 0).all() and (terms["self"] > 0).all() and (terms["rest"] >= 0).all()
    np.testing.assert_array_equal(scores, cg_scores(X, y, ratio=ratio, random_state=0))
    if ratio is None:
        inverse, signs = np.linalg.inv(kernel(X)), 2.0 * y - 1
        others = (inverse - np.diag(np.diag(inverse))) @ signs
        np.testing.assert_allclose(terms["self"], np.diag(inverse), rtol=1e-8)
        np.testing.assert_allclose(terms["cross"], signs * others, rtol=1e-8, atol=1e-9)
        # y_i a_i is self + cross, and sums to the complexity
        total = (terms["self"] + terms["cross"]).sum()
        assert total == pytest.approx(complexity(kernel(X), signs), rel=1e-9)


def test_another_point_never_lowers_the_complexity():
    X, y = draw(30, seed=5)
    values = [complexity(relu_ntk_gram(X[:n]), 2.0 * y[:n] - 1) for n in range(1, 31)]
    assert (np.diff(values) >= 0).all()


def test_scale_rotation_and_the_names_of_two_classes_change_nothing():
    X, y = draw(40, seed=6)
    scores = cg_scores(X, y, ratio=None)
    scale = np.exp(np.random.default_rng(0).normal(0, 5, (40, 1)))
    for other in (X * scale, X @ ortho_group.rvs(6, random_state=0), X * 1e200, X * 1e-200):
        np.testing.assert_allclose(cg_scores(other, y, ratio=None), scores, rtol=1e-8)
    np.testing.assert_allclose(cg_scores(X, 1 - y, ratio=None), scores, rtol=1e-12)
    order = np.random.default_rng(1).permutation(40)
    np.testing.assert_allclose(cg_scores(X[order], y[order], ratio=None), scores[order], rtol=1e-8)
    assert abs(cg_scores(X + 1, y, ratio=None) - scores).max() > 0.1, "a shift does"


def test_the_kernel_is_the_mean_product_of_two_gated_inputs():
    rng = np.random.default_rng(7)
    u = rng.normal(size=(6, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    on = rng.normal(size=(200_000, 3)) @ u.T >= 0
    for i in range(6):
        for j in range(i):
            sample = (u[i] @ u[j]) * (on[:, i] & on[:, j])
            assert abs(sample.mean() - relu_ntk_gram(u)[i, j]) < 3 * sample.std() / math.sqrt(len(sample))
    H = relu_ntk_gram(u)
    np.testing.assert_array_equal(H, H.T)
    assert (np.diag(H) == 0.5).all() and np.linalg.eigvalsh(H)[0] > 0
    np.testing.assert_allclose(np.diag(relu_ntk_gram(u, jitter=0.25)), 0.75)


def test_orthogonal_points_know_nothing_of_each_other():
    Q = ortho_group.rvs(8, random_state=0)
    np.testing.assert_allclose(relu_ntk_gram(Q), np.eye(8) / 2, atol=1e-15)
    np.testing.assert_allclose(cg_scores(Q, np.arange(8) % 2), 2.0, rtol=1e-12)
    np.testing.assert_array_equal(relu_ntk_gram(np.array([[1.0, 2.0], [-2.0, -4.0]])), np.eye(2) / 2)


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7, 1e-9])
def test_two_close_points_have_the_scores_of_their_two_by_two_matrix(angle):
    """H = [[1/2, h], [h, 1/2]]: alike they add 1 / (1/2 + h) each less 2, apart 1 / (1/2 - h)."""
    X = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    # 1/2 - h = (1 - cos angle) / 2 + angle cos angle / (2 pi), with nothing that cancels
    short = math.sin(angle / 2) ** 2 + angle * math.cos(angle) / (2 * math.pi)
    np.testing.assert_allclose(0.5 - relu_ntk_gram(X)[0, 1], short, rtol=1e-6)
    np.testing.assert_allclose(cg_scores(X, [0, 1]), 2 / short - 2, rtol=1e-6)
    opposite = relu_ntk_gram(X * [[1.0], [-1.0]])[0, 1]
    assert opposite == pytest.approx(-math.cos(angle) * angle / (2 * math.pi), rel=1e-9)


def test_large_data_are_taken_class_by_class_with_the_same_result(monkeypatch):
    X, y = draw(60, classes=3, seed=8)
    expected = [cg_scores(X, y, ratio=ratio, random_state=0) for ratio in (0.5, None)]
    monkeypatch.setattr(module, "ONCE", 10)
    for ratio, scores in zip((0.5, None), expected, strict=True):
        np.testing.assert_allclose(cg_scores(X, y, ratio=ratio, random_state=0), scores, rtol=1e-9)
    X[50] = 3 * X[7]
    with pytest.raises(ValueError, match="rows 7 and 50"):
        cg_scores(X, y, ratio=None)


def test_what_a_user_holds_is_read_whatever_its_type():
    X, y = draw(24, classes=3, seed=9)
    X = X.astype(np.float16).astype(np.float64)
    expected = cg_scores(X, y, random_state=0)
    names = np.array(["cat", "dog", "hen"])[y]
    for rows, labels in (
        (X.tolist(), names.tolist()), (pd.DataFrame(X), pd.Series(names)), (X.astype(np.float16), y / 2),
        (np.asfortranarray(X)[::1], y.astype(np.uint8)), (torch.tensor(X).reshape(24, 2, 3), torch.tensor(y)),
        (torch.tensor(X, requires_grad=True).half(), y.astype(object)), (X.reshape(24, 1, 6, 1), names),
    ):  # fmt: skip
        scores = cg_scores(rows, labels, random_state=0)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, rtol=1e-10)
    low = torch.tensor(X).bfloat16()
    np.testing.assert_array_equal(
        cg_scores(low, y, random_state=0), cg_scores(low.double(), y, random_state=0)
    )
    whole = np.random.default_rng(0).integers(-9, 9, (24, 6))
    np.testing.assert_array_equal(relu_ntk_gram(whole.astype(np.int8)), relu_ntk_gram(whole.astype(float)))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(cg_scores(torch.tensor(X), y, random_state=0), expected)


def test_the_score_conforms_to_its_kind(as_a_user):
    X, y = draw(20, seed=10)
    known = [((np.eye(5), np.arange(5) % 2), 2.0)]
    check_metric(lambda X, y: cg_scores(X, y, ratio=None).mean(), torch.tensor(X), y, known=known)


def test_mislabelled_flowers_come_first():
    X, y = load_iris(return_X_y=True)
    wrong = np.array([3, 20, 40])
    y = y.copy()
    y[wrong] = 2  # setosa, far from the others
    suspects = cg_scores(X - X.mean(0), y, jitter=1e-8, random_state=0).argsort()[::-1]
    assert set(suspects[:3]) == set(wrong)


def test_the_shares_of_classes_are_kept_and_ties_go_by_index():
    y = np.repeat(["a", "b", "c"], [10, 100, 7])
    scores = np.random.default_rng(0).normal(size=117)
    for fraction in (0.0, 0.07, 0.3, 0.9):
        for drop in ("low", "high"):
            kept = prune_by_score(scores, y, fraction, drop=drop)
            assert (np.diff(kept) > 0).all()
            for label, n in (("a", 10), ("b", 100), ("c", 7)):
                ranked = np.flatnonzero(y == label)[np.argsort(scores[y == label])]
                stay = n - {0.0: 0, 0.07: {10: 1, 100: 7, 7: 1}[n], 0.3: {10: 3, 100: 30, 7: 3}[n],
                            0.9: {10: 9, 100: 90, 7: 7}[n]}[fraction]  # fmt: skip
                expected = ranked[n - stay :] if drop == "low" else ranked[:stay]
                assert set(kept[y[kept] == label]) == set(expected)
            together = prune_by_score(scores, y, fraction, drop=drop, stratify=False)
            assert len(together) == {0.0: 117, 0.07: 108, 0.3: 81, 0.9: 11}[fraction]
            gone = np.delete(scores, together)
            assert not len(gone) or (
                gone.max() < scores[together].min() if drop == "low" else gone.min() > scores[together].max()
            )
    for drop in ("low", "high"):
        np.testing.assert_array_equal(prune_by_score(np.ones(4), np.zeros(4), 0.5, drop=drop), [2, 3])
    assert prune_by_score([], [], 0.5).shape == (0,)
    assert prune_by_score(torch.ones(3).bfloat16(), torch.arange(3), 0.5).shape == (0,)


X, Y = np.arange(12.0).reshape(4, 3) ** 2 + 1, np.array([0, 0, 1, 1])
TWINS = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 6.0], [2.0, 4.0]])
PAIR = "X must have no two rows of one direction, rows 0 and 2 have it: remove one, or give jitter=1e-8"


def changed(at, value):
    other = X.copy()
    other[at] = value
    return other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cg_scores(changed((2, 1), np.nan), Y), "X must be finite, got NaN or infinity in row 2"),
        (lambda: cg_scores(changed((3, 1), np.inf), Y), "X must be finite, got NaN or infinity in row 3"),
        (lambda: cg_scores(changed(1, 0), Y), "X must have no row of zeros, row 1 has no direction"),
        (lambda: relu_ntk_gram(changed(1, 0)), "X must have no row of zeros, row 1 has no direction"),
        (lambda: cg_scores(X[:, :0], Y), "row 0 has no direction"),
        (lambda: cg_scores(X[:, 0], Y), r"X must have a row a sample, of shape \(n, ...\), got \(4,\)"),
        (lambda: cg_scores(3.0, Y), "X must have a row a sample"),
        (lambda: cg_scores(sparse.eye_array(4, format="csr"), Y), "X must hold real numbers"),
        (lambda: cg_scores(torch.eye(4).to_sparse(), Y), "X must be dense where it is a tensor"),
        (lambda: cg_scores(X, torch.tensor([0, 1, 0, 1]).to_sparse()), "y must be dense where it is a tensor"),
        (lambda: cg_scores(X + 0j, Y), "X must hold real numbers, got complex128"),
        (lambda: cg_scores(X.astype(str), Y), "X must hold real numbers"),
        (lambda: cg_scores(np.array([[1, None]] * 4), Y), "X must hold real numbers|X must be finite"),
        (lambda: cg_scores(np.array([["a", 2]] * 4, dtype=object), Y), "X must hold real numbers"),
        (lambda: cg_scores([[1, 2], [3]], [0, 1]), "X must be an array"),
        (lambda: cg_scores(X, Y * 0), "y must have at least 2 classes, got 1"),
        (lambda: cg_scores(X[:0], Y[:0]), "y must have at least 2 classes, got 0"),
        (lambda: cg_scores(X, Y[:3]), r"y must have shape \(4,\) for X, got \(3,\)"),
        (lambda: cg_scores(X, Y[:, None]), r"y must have shape \(4,\) for X, got \(4, 1\)"),
        (lambda: cg_scores(X, [0, 1, np.nan, 1]), "y must have a label a row, row 2 is NaN"),
        (lambda: cg_scores(X, np.array(["a", 1, None, 2], dtype=object)), "y must have labels of one type"),
        (lambda: cg_scores(X, Y, ratio=0), "ratio must be greater than 0, got 0"),
        (lambda: cg_scores(X, Y, ratio=math.inf), "ratio must be greater than 0, got inf"),
        (lambda: cg_scores(X, Y, n_repeats=0), "n_repeats must be an integer of at least 1, got 0"),
        (lambda: cg_scores(X, Y, jitter=-1e-8), "jitter must be at least 0, got -1e-08"),
        (lambda: relu_ntk_gram(X, jitter=-1.0), "jitter must be at least 0"),
        (lambda: cg_scores(X, Y, random_state="a"), "cannot be used to seed"),
        (lambda: cg_scores(TWINS, [0, 0, 0, 1]), PAIR),
        (lambda: cg_scores(TWINS, [0, 0, 1, 1]), PAIR),
        (lambda: cg_scores(np.ones((9, 1)), np.arange(9) % 2, jitter=1e-300), "give a jitter above 1e-300, such as 1e-08"),
        (lambda: prune_by_score([[1.0]], [0], 0.5), r"scores must have shape \(n,\), got \(1, 1\)"),
        (lambda: prune_by_score([1.0, np.nan], [0, 1], 0.5), "scores must be finite, got NaN or infinity in row 1"),
        (lambda: prune_by_score([1.0, 2.0], [0], 0.5), r"y must have shape \(2,\) for scores, got \(1,\)"),
        (lambda: prune_by_score([1.0], [0], 1.0), r"fraction must be in \[0, 1\), got 1.0"),
        (lambda: prune_by_score([1.0], [0], -0.1), r"fraction must be in \[0, 1\), got -0.1"),
        (lambda: prune_by_score([1.0], [0], 0.5, drop="middle"), "drop must be one of 'low', 'high'"),
        (lambda: prune_by_score([1.0], [0], 0.5, stratify=None), "stratify must be one of True, False"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_jitter_takes_equal_rows_and_shares_their_score():
    scores = cg_scores(TWINS, [0, 1, 0, 1], ratio=None, jitter=0.1)
    expected = by_removal(kernel(TWINS) + 0.1 * np.eye(4), np.array([1.0, -1.0, 1.0, -1.0]))
    np.testing.assert_allclose(scores, expected, rtol=1e-7)
