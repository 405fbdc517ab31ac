"""The attack against exhaustive search and what an adversary cannot do; measures against hand counts."""

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans

from posterity.fairness import (
    FairSpectralClustering,
    cluster_balance,
    cluster_group_entropy,
    fairness_attack,
)


def test_balance_of_equal_shares_is_one():
    assert cluster_balance(np.repeat([0, 1, 2], 4), np.tile([0, 1, 0, 1], 3)) == 1
    assert cluster_balance(np.repeat([0, 1], 6), np.tile([0, 1, 2], 4)) == 1
    # a third of the samples is of group 1, in each cluster too
    assert cluster_balance(np.repeat([0, 1], 6), np.tile([0, 0, 1], 4)) == 1


def test_measures_are_hand_counts_with_three_groups():
    labels = np.array([0] * 5 + [1] * 3 + [2] * 4)
    groups = np.array([0, 0, 1, 1, 2, 0, 1, 2, 0, 2, 2, 2])
    # shares: cluster 0 2/5 2/5 1/5, cluster 1 a third each, cluster 2 1/4 0 3/4; overall 4, 3 and 5 of 12
    assert cluster_balance(labels, groups) == 0
    groups[8] = 1  # cluster 2 then has 0 1/4 3/4, so group 0 is absent; give it one of group 2 instead
    groups[9] = 0  # 1/4 1/4 2/4; overall 4, 4 and 4 of 12
    ratios = [2 / 5 * 3, 2 / 5 * 3, 1 / 5 * 3, 1, 1, 1, 3 / 4, 3 / 4, 3 / 2]
    assert cluster_balance(labels, groups) == pytest.approx(min(min(r, 1 / r) for r in ratios))
    shares = np.array([[2 / 5, 2 / 5, 1 / 5], [1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 4, 1 / 2]])
    expected = -(shares * np.log(shares)).sum() / 3
    assert cluster_group_entropy(labels, groups) == pytest.approx(expected, abs=1e-12)


def test_measures_do_not_depend_on_order_and_names(as_a_user):
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    order = rng.permutation(60)
    words, names = np.array(list("wxyz"))[labels], pd.Series(np.array(["u", "v", "w"])[groups])
    for measure in (cluster_balance, cluster_group_entropy):
        value = measure(labels, groups)
        assert measure(labels[order], groups[order]) == pytest.approx(value, abs=1e-12)
        assert measure(words, names) == pytest.approx(value, abs=1e-12)
        assert measure(-7 * labels, groups.astype(float)) == pytest.approx(value, abs=1e-12)


def test_entropy_of_a_cluster_of_one_group_is_zero():
    assert abs(cluster_group_entropy(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))) < 1e-14
    assert cluster_group_entropy(np.repeat(range(5), 4), np.tile([0, 1], 10)) == pytest.approx(
        2.5 * np.log(2)
    )


GROUPS = np.arange(24) % 2
U, V = np.arange(8), np.arange(8, 24)


def sensitive(given):
    """A clustering whose labels are decided by the groups that it is given: a sum of them, by hand."""
    weight = np.arange(1, 9) * (2 * given[:8] - 1)
    level = weight.sum()
    return (np.arange(24) * (abs(level) + 1) // 24 + GROUPS * (level > 20)) % 3


def objective(labels, groups):
    return float((labels * groups).mean())


@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_the_best_of_what_was_tried(seed):
    asked = []

    def spy(given):
        asked.append(given.copy())
        return sensitive(given)

    found = fairness_attack(spy, GROUPS, U, V, objective=objective, budget=9, random_state=seed)
    assert len(asked) == 10, "the true groups are asked for too"
    np.testing.assert_array_equal(asked[0], GROUPS)
    values = [objective(sensitive(given)[V], GROUPS[V]) for given in asked]
    assert found.clean_value == values[0]
    np.testing.assert_array_equal(found.history, values[1:])
    assert found.value == min(values) <= min(found.history[:5]), "at most that of the best random vector"
    np.testing.assert_array_equal(found.groups, asked[int(np.argmin(values))])
    np.testing.assert_array_equal(found.labels, sensitive(found.groups))
    for given in asked:
        np.testing.assert_array_equal(given[V], GROUPS[V])
        assert set(given) <= {0, 1}


def test_a_long_search_finds_the_worst_of_all_vectors():
    every = []
    for bits in itertools.product((0, 1), repeat=8):
        given = GROUPS.copy()
        given[U] = bits
        every.append(objective(sensitive(given)[V], GROUPS[V]))
    found = fairness_attack(sensitive, GROUPS, U, V, objective=objective, budget=900, random_state=0)
    assert found.value == min(every)
    assert min(every) < found.clean_value < max(every)


def test_the_search_finds_more_than_random_flips_do():
    """Sixty bits, each of which counts: random vectors get about 30 + 2.3 sd right, whatever they learn."""
    groups = np.arange(80) % 2

    def hits(given):
        return np.repeat([given[:60].sum()], 80)

    def left(labels, groups):
        return 60.0 - labels[0]

    search = [
        fairness_attack(
            hits, groups, range(60), range(60, 80), objective=left, budget=60, random_state=seed
        ).value
        for seed in range(10)
    ]
    flips = [60 - np.random.default_rng(seed).integers(0, 2, (60, 60)).sum(1).max() for seed in range(10)]
    assert np.mean(search) < np.mean(flips) - 2


@pytest.mark.parametrize("name", ["balance", "entropy"])
def test_a_clustering_that_ignores_groups_cannot_be_attacked(name):
    labels = np.arange(24) // 3 % 3
    measure = {"balance": cluster_balance, "entropy": cluster_group_entropy}[name]
    found = fairness_attack(lambda given: labels, GROUPS, U, V, objective=name, budget=5, random_state=0)
    assert found.value == found.clean_value == measure(labels[V], GROUPS[V])
    np.testing.assert_array_equal(found.groups, GROUPS)
    assert set(found.history) == {found.value}


def test_a_budget_of_one_is_one_random_vector_and_a_seed_decides_it():
    results = [
        fairness_attack(sensitive, GROUPS, U, V, objective=objective, budget=1, random_state=seed)
        for seed in (3, 3, 4)
    ]
    assert [len(each.history) for each in results] == [1, 1, 1]
    np.testing.assert_array_equal(results[0].groups, results[1].groups)


def test_it_harms_fair_spectral_clustering_and_not_k_means():
    """Groups that lie apart along one axis: whether the constraint outweighs it depends on the labels."""
    rng = np.random.default_rng(3)
    groups = np.arange(120) % 2
    X = rng.normal(0, 0.5, (120, 2)) + np.c_[4.0 * (np.arange(120) // 2 % 2), 4.0 * groups]
    values = []
    for model in (
        FairSpectralClustering(2, n_neighbors=20, random_state=0),
        KMeans(2, n_init=1, random_state=0),
    ):

        def cluster(given, model=model):
            return (
                model.fit_predict(X)
                if isinstance(model, KMeans)
                else model.fit_predict(X, sensitive_features=given)
            )

        values.append(fairness_attack(cluster, groups, range(40), range(40, 120), budget=8, random_state=0))
    spectral, plain = values
    assert spectral.clean_value == pytest.approx(1)
    assert plain.value == plain.clean_value


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 1], [0, 1, 1], "groups must have the length of labels, 2, got 3"),
        ([0, 1], [1, 1], "groups must have at least two groups, got only 1"),
        ([], [], "labels must not be empty"),
        ([0, 1], [0, np.nan], "groups must not be missing, got no value in row 1"),
        ([np.nan, 1], [0, 1], "labels must not be missing, got no value in row 0"),
        ([[0, 1]], [0, 1], r"labels must have shape \(n,\), got \(1, 2\)"),
    ],
)
@pytest.mark.parametrize("measure", [cluster_balance, cluster_group_entropy])
def test_measures_refuse_bad_input(as_a_user, measure, labels, groups, message):
    with pytest.raises(ValueError, match=message):
        measure(np.array(labels), np.array(groups))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": GROUPS + 1}, "groups must be 0 or 1, got 1, 2"),
        ({"groups": np.array(list("ab"))[GROUPS]}, "groups must be 0 or 1, got a, b"),
        ({"attack_indices": [0, 8]}, "eval_indices must not be in attack_indices, got 8 in both"),
        ({"attack_indices": [24]}, r"attack_indices must be in 0\.\.23, got 24 to 24"),
        ({"eval_indices": [-1, 9]}, r"eval_indices must be in 0\.\.23, got -1 to 9"),
        ({"attack_indices": [1, 1]}, "attack_indices must not repeat"),
        ({"attack_indices": []}, "attack_indices must not be empty"),
        ({"attack_indices": [0.5]}, "attack_indices must be integers"),
        ({"eval_indices": [9, 11]}, "eval_indices must hold both groups, got group 1 only"),
        ({"budget": 0}, "budget must be an integer of at least 1, got 0"),
        ({"objective": "fair"}, "objective must be 'balance', 'entropy' or a function, got 'fair'"),
        ({"objective": lambda labels, groups: np.nan}, "objective must be finite, got nan"),
        ({"cluster": lambda given: given[1:]}, r"cluster must return labels of shape \(24,\), got \(23,\)"),
    ],
)
def test_the_attack_refuses_bad_input(as_a_user, change, message):
    whole = {"cluster": sensitive, "groups": GROUPS, "attack_indices": U, "eval_indices": V}
    with pytest.raises(ValueError, match=message):
        fairness_attack(**{**whole, **change})
