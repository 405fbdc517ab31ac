"""KwikBucks: against the algorithm one question at a time, its budget, and the oracle's own clusters."""

import itertools

import numpy as np
import pytest

from posterity.clustering import (
    EmbeddingSignal,
    correlation_clustering_cost,
    kwik_cluster,
    kwikbucks,
    pairwise_f1,
    weak_signals,
)


def problem(n=40, seed=0, clusters=5, noise=0.1):
    """Return a similarity and an oracle's answers, both symmetric and neither always right."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(clusters, size=n)
    together = kind[:, None] == kind
    flips = np.triu(rng.random((n, n)) < noise, 1)
    strong = together ^ flips ^ flips.T
    weak = together + rng.normal(size=(n, n))
    return weak + weak.T, strong


def truth(labels):
    return labels[:, None] == labels


class Listening:
    """An oracle that keeps what it was asked, and refuses to be asked twice."""

    def __init__(self, strong):
        self.strong, self.pairs, self.calls = strong, set(), 0

    def __call__(self, pairs):
        self.calls += 1
        for pair in pairs.tolist():
            key = tuple(sorted(pair))
            assert key[0] != key[1] and key not in self.pairs
            self.pairs.add(key)
        return self.strong[pairs[:, 0], pairs[:, 1]]


def one_by_one(weak, strong, candidates, budget, max_neighbors, batch_size, weight, k):
    """Return joins, pivots and number of questions by the definition, items one after the other."""
    n, asked, joins, pivots, voted = len(weak), 0, {}, [], {}

    def first_yes(item, ranked):
        nonlocal asked
        for pivot in ranked[:max_neighbors]:
            if asked == budget:
                raise StopIteration
            asked += 1
            if strong[item, pivot]:
                return pivot
        return None

    def falling(items, score):
        return sorted(items, key=lambda item: -score(item))  # stable: the earlier first among equals

    try:
        pivots.append(candidates[0])
        for item in candidates[1:]:
            pivot = first_yes(item, falling(pivots, lambda p, item=item: weak[item, p]))
            if pivot is None:
                pivots.append(item)
            else:
                joins[item] = pivot
        rest = [item for item in range(n) if item not in candidates]
        rest = falling(rest, lambda item: max(weak[item, c] for c in candidates))
        for start in range(0, len(rest), batch_size):
            before = dict(voted)
            for item in rest[start : start + batch_size]:
                near = falling([u for u in range(n) if u != item], lambda u, item=item: weak[item, u])[:k]

                def score(p, item=item, near=near, before=before):
                    return weak[item, p] + weight * sum(before.get(u) == p for u in near)

                pivot = first_yes(item, falling(pivots, score))
                if pivot is not None:
                    joins[item] = voted[item] = pivot
        exhausted = False
    except StopIteration:
        exhausted = True
    own = np.array([joins.get(item, item) for item in range(n)])
    return own[:, None] == own, pivots, asked, exhausted


@pytest.mark.parametrize("budget", [0, 1, 17, 60, 150, 400])
@pytest.mark.parametrize(("max_neighbors", "batch_size"), [(3, 7), (100, 100), (5, 1)])
def test_it_is_the_algorithm_one_question_at_a_time(budget, max_neighbors, batch_size):
    for seed in range(4):
        weak, strong = problem(seed=seed)
        candidates = np.random.default_rng(seed).permutation(40)[:12].tolist()
        joined, pivots, asked, exhausted = one_by_one(
            weak, strong, candidates, budget, max_neighbors, batch_size, 0.7, 6
        )
        oracle = Listening(strong)
        result = kwikbucks(
            weak, oracle, budget=budget, pivots=candidates, max_neighbors=max_neighbors, batch_size=batch_size,
            boost_weight=0.7, n_boost_neighbors=6, merge=False,
        )  # fmt: skip
        np.testing.assert_array_equal(truth(result.labels), joined)
        assert result.pivots.tolist() == pivots
        assert result.n_queries == asked == len(oracle.pairs)
        assert result.exhausted == exhausted and result.n_merge_queries == 0


@pytest.mark.parametrize("merge", [True, False])
def test_consistent_answers_and_enough_questions_give_the_oracles_clusters(merge):
    kind = np.random.default_rng(0).integers(6, size=60)
    weak, _ = problem(60)
    result = kwikbucks(weak, truth(kind), budget=10_000, n_pivots=60, merge=merge, random_state=0)
    assert correlation_clustering_cost(result.labels, truth(kind)) == 0
    _, first = np.unique(kind, return_index=True)
    order = kind[np.sort(first)]
    np.testing.assert_array_equal(order[result.labels], kind)  # numbered as they appear
    assert not result.exhausted and len(result.pivots) == 6


@pytest.mark.parametrize("budget", [0, 1, 40, 10**12])
@pytest.mark.parametrize("merge_budget", [0, 1, 25])
def test_no_budget_is_passed_and_every_question_is_counted_once(budget, merge_budget):
    weak, strong = problem(noise=0.3)
    oracle = Listening(strong)
    result = kwikbucks(
        weak,
        oracle,
        budget=budget,
        n_pivots=10,
        merge_budget=merge_budget,
        merge_threshold=0.3,
        random_state=0,
    )
    assert result.n_queries <= budget
    assert result.n_queries + result.n_merge_queries == len(oracle.pairs) <= budget + merge_budget
    if not budget:
        assert result.exhausted and result.n_queries == 0


def test_a_perfect_similarity_finds_the_pivot_with_the_first_question():
    kind = np.random.default_rng(1).integers(4, size=50)
    weak = truth(kind).astype(float)
    candidates = [int(np.flatnonzero(kind == k)[0]) for k in range(4)]
    result = kwikbucks(weak, truth(kind), budget=10_000, pivots=candidates, merge=False)
    # every candidate asks all earlier pivots, each of the 46 others once
    assert result.n_queries == 0 + 1 + 2 + 3 + 46
    assert correlation_clustering_cost(result.labels, truth(kind)) == 0


def test_without_boost_batches_change_nothing():
    weak, strong = problem(noise=0.2)
    options = {"budget": 170, "pivots": list(range(0, 40, 3)), "boost_neighbors": False, "merge": False}
    results = [kwikbucks(weak, strong, batch_size=size, **options) for size in (1, 3, 100)]
    for other in results[1:]:
        np.testing.assert_array_equal(other.labels, results[0].labels)
        assert other.n_queries == results[0].n_queries


def test_renaming_items_renames_the_clusters():
    weak, strong = problem(seed=3)
    names = np.random.default_rng(0).permutation(40)
    back = np.argsort(names)
    plain = kwikbucks(weak, strong, budget=150, pivots=[3, 9, 20, 31, 38], merge=False)
    again = kwikbucks(
        weak[np.ix_(names, names)], strong[np.ix_(names, names)], budget=150,
        pivots=back[[3, 9, 20, 31, 38]], merge=False,
    )  # fmt: skip
    np.testing.assert_array_equal(truth(again.labels), truth(plain.labels[names]))
    np.testing.assert_array_equal(names[again.pivots], plain.pivots)


def test_items_are_asked_many_at_once_where_the_budget_allows_it():
    weak, strong = problem(200, clusters=3, noise=0)
    ample, tight = Listening(strong), Listening(strong)
    options = {"n_pivots": 5, "merge": False, "random_state": 0}
    result = kwikbucks(weak, ample, budget=10_000, **options)
    again = kwikbucks(weak, tight, budget=result.n_queries, **options)
    assert ample.calls < 25 < len(ample.pairs)
    np.testing.assert_array_equal(again.labels, result.labels)
    assert again.n_queries == result.n_queries and not again.exhausted


def test_two_clusters_are_one_where_enough_pairs_say_so():
    """Two pivots of one true cluster that the oracle does not join to each other are merged by the rest."""
    kind = np.repeat([0, 1], 20)
    strong = truth(kind)
    strong[0, 1] = strong[1, 0] = False  # both pivots; their members belong together
    strong[0, 2:11] = strong[2:11, 0] = False
    weak = truth(kind) + np.random.default_rng(0).random((40, 40)) / 10
    weak = weak + weak.T
    options = {"budget": 500, "pivots": [0, 1, 20], "random_state": 0}
    apart = kwikbucks(weak, strong, merge=False, **options)
    assert len(np.unique(apart.labels)) == 3
    one = kwikbucks(weak, strong, **options)
    np.testing.assert_array_equal(one.labels, kind)
    strict = kwikbucks(weak, strong, merge_threshold=1.0, **options)
    assert len(np.unique(strict.labels)) == 3
    assert 0 < one.n_merge_queries <= 2 * 20


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_merging_is_the_definition_cluster_by_cluster(threshold):
    for seed in range(3):
        weak, strong = problem(30, seed=seed, noise=0.35)
        options = {"budget": 60, "pivots": [4, 8, 15, 16, 23], "merge_pairs": 6, "merge_neighbors": 4}
        plain = kwikbucks(weak, strong, merge=False, **options)
        got = kwikbucks(weak, strong, merge_budget=30, merge_threshold=threshold, random_state=7, **options)

        own = {item: next((p for p in plain.pivots.tolist() if plain.labels[p] == label), item)
               for item, label in enumerate(plain.labels.tolist())}  # fmt: skip
        heads = plain.pivots.tolist() + sorted(set(own.values()) - set(plain.pivots.tolist()))
        members = [[i for i in range(30) if own[i] == head] for head in heads]
        place = {i: k for k, group in enumerate(members) for i in group}
        near = [
            sorted((u for u in range(30) if u != v), key=lambda u, v=v: -weak[v, u])[:4] for v in range(30)
        ]
        linked = {tuple(sorted((place[v], place[u]))) for v in range(30) for u in near[v]}
        linked = sorted(pair for pair in linked if pair[0] != pair[1])
        linked.sort(key=lambda pair: -sum(weak[i, j] for i in members[pair[0]] for j in members[pair[1]]))
        rng, alive, into = np.random.RandomState(7), set(range(len(heads))), {}
        asked = Listening(strong)
        kwikbucks(weak, asked, merge=False, **options)
        known, left = set(asked.pairs), 30 + 60 - plain.n_queries
        for a, b in linked:
            if a in alive and b in alive:
                drawn = zip(
                    *(np.array(members[k])[rng.randint(len(members[k]), size=6)] for k in (a, b)), strict=True
                )
                drawn = [tuple(sorted(map(int, pair))) for pair in drawn]
                new = set(drawn) - known
                if len(new) > left:
                    break
                left, known = left - len(new), known | new
                if np.mean([strong[pair] for pair in drawn]) >= threshold:
                    alive.discard(b)
                    into[b] = a

        def root(k, into=into):
            return root(into[k]) if k in into else k

        want = np.array([root(place[i]) for i in range(30)])
        np.testing.assert_array_equal(truth(got.labels), truth(want))
        assert got.n_merge_queries == 30 + 60 - plain.n_queries - left


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [item for item in rest if item not in others]
            for tail in partitions(left):
                yield [(first, *others), *tail]


def test_the_pivot_algorithm_costs_at_most_three_times_the_least():
    for seed in range(3):
        _, strong = problem(7, seed=seed, clusters=2, noise=0.3)
        costs = []
        for groups in partitions(list(range(7))):
            labels = np.empty(7, dtype=int)
            for k, group in enumerate(groups):
                labels[list(group)] = k
            costs.append(correlation_clustering_cost(labels, strong))
        assert len(costs) == 877  # the seventh Bell number
        got = [
            correlation_clustering_cost(kwik_cluster(strong, 7, random_state=s).labels, strong)
            for s in range(200)
        ]
        assert min(costs) <= min(got) and np.mean(got) <= 3 * max(min(costs), 1 / 3)


@pytest.mark.parametrize("budget", [0, 1, 30, None])
def test_the_pivot_algorithm_keeps_its_budget(budget):
    _, strong = problem()
    oracle = Listening(strong)
    result = kwik_cluster(oracle, 40, budget=budget, random_state=0)
    assert result.n_queries == len(oracle.pairs) <= (40 * 39 // 2 if budget is None else budget)
    assert result.exhausted == (budget is not None)
    for pivot in result.pivots[:-1]:
        assert (
            strong[pivot, result.labels == result.labels[pivot]].sum()
            >= (result.labels == result.labels[pivot]).sum() - 1
        )


def test_cost_and_f1_count_pairs():
    labels, strong = np.array([0, 0, 1, 1, 2]), truth(np.array([0, 0, 0, 1, 1]))
    pairs = list(itertools.combinations(range(5), 2))
    joined = {p for p in pairs if labels[p[0]] == labels[p[1]]}
    together = {p for p in pairs if strong[p]}
    assert correlation_clustering_cost(labels, strong) == len(joined ^ together)
    assert pairwise_f1(labels, strong) == 2 * len(joined & together) / (len(joined) + len(together))
    strong[np.arange(5), np.arange(5)] = False  # the diagonal does not count
    assert correlation_clustering_cost(labels, strong) == len(joined ^ together)
    assert pairwise_f1(np.arange(3), np.eye(3, dtype=bool)) == 1.0
    assert pairwise_f1(np.arange(3), np.ones((3, 3), dtype=bool)) == 0.0


@pytest.mark.parametrize("n", [3, 50, 400])
def test_nearest_neighbours_are_those_of_a_full_sort_with_ties(n, monkeypatch):
    monkeypatch.setattr(weak_signals, "BLOCK", 7 * n)
    rng = np.random.default_rng(0)
    for weak in (rng.normal(size=(n, n)), rng.integers(3, size=(n, n)).astype(float)):
        hidden = weak.copy()
        np.fill_diagonal(hidden, -np.inf)
        for k in (1, 2, 5):
            want = np.argsort(-hidden, axis=1, kind="stable")[:, : min(k, n - 1)]
            np.testing.assert_array_equal(weak_signals.neighbours(weak_signals.as_signal(weak), k), want)


@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_their_matrix_and_so_is_a_callable(normalize):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5))
    strong = truth(rng.integers(5, size=60))
    scaled = features / np.linalg.norm(features, axis=1, keepdims=True) if normalize else features
    matrix = scaled @ scaled.T

    class Custom:
        def __len__(self):
            return 60

        def __call__(self, rows, cols):
            return matrix[np.ix_(rows, cols)]

    options = {"budget": 150, "n_pivots": 9, "merge_budget": 60, "random_state": 0}
    signal = EmbeddingSignal(features, normalize=normalize)
    np.testing.assert_allclose(signal(np.arange(60), np.arange(60)), matrix, atol=1e-12)
    want = kwikbucks(matrix, strong, **options)
    for weak in (signal, Custom()):
        got = kwikbucks(weak, strong, **options)
        np.testing.assert_array_equal(got.labels, want.labels)
        assert (got.n_queries, got.n_merge_queries) == (want.n_queries, want.n_merge_queries)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_unit_of_embeddings_does_not_matter_nor_their_layout(scale):
    features = np.random.default_rng(0).normal(size=(4, 30)).T * scale
    assert not features.flags.c_contiguous
    plain = EmbeddingSignal(np.ascontiguousarray(features / scale))
    np.testing.assert_allclose(EmbeddingSignal(features).features, plain.features, rtol=1e-12)


def test_narrow_and_integer_embeddings_are_widened():
    features = np.random.default_rng(0).integers(-9, 9, size=(20, 6))
    wide = EmbeddingSignal(features)
    assert wide.features.dtype == np.float64
    narrow = EmbeddingSignal(features.astype(np.float16))
    assert narrow.features.dtype == np.float32
    np.testing.assert_allclose(narrow.features, wide.features, atol=1e-6)
    zero = EmbeddingSignal(np.zeros((3, 2)))
    assert not zero(np.arange(3), np.arange(3)).any()


def test_one_item_is_a_cluster():
    result = kwikbucks(np.ones((1, 1)), np.ones((1, 1), dtype=bool), budget=5)
    assert result.labels.tolist() == [0] and result.pivots.tolist() == [0] and result.n_queries == 0
    assert kwik_cluster(np.ones((1, 1), dtype=bool), 1).labels.tolist() == [0]


def test_the_same_seed_gives_the_same_clusters_and_leaves_numpy_alone():
    weak, strong = problem()
    before = np.random.get_state()[1].copy()
    first, again = (kwikbucks(weak, strong, budget=200, random_state=5) for _ in range(2))
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


WEAK, STRONG = problem(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": -1}, "budget must be an integer of at least 0, got -1"),
        ({"budget": 2.5}, "budget must be an integer"),
        ({"pivots": [1, 1]}, r"pivots must be different, got \[1, 1\]"),
        ({"pivots": [1, 8]}, "pivots must be items from 0 to 7, got 8"),
        ({"pivots": []}, "pivots must be integers of shape"),
        ({"pivots": [1], "n_pivots": 1}, "n_pivots must not be given beside pivots"),
        ({"n_pivots": 9}, "n_pivots must be at most the 8 items, got 9"),
        ({"weak": WEAK[:7]}, r"weak must be square and not empty, got shape \(7, 8\)"),
        ({"weak": WEAK[:7, :7]}, r"strong must be a bool array of shape \(7, 7\)"),
        ({"weak": np.where(np.eye(8) > 0, np.nan, WEAK)}, "weak must be finite"),
        ({"weak": lambda rows, cols: WEAK}, "the length of weak must be an integer"),
        ({"strong": STRONG.astype(int)}, "strong must be a bool array .* got int64"),
        ({"strong": np.triu(STRONG)}, r"strong must be symmetric, got True for \(\d, \d\) and not for"),
        ({"strong": lambda pairs: np.ones(len(pairs) + 1, dtype=bool)},
         r"strong must return a truth value for each of \d+ pairs, first \(\d, \d\), got bool of shape"),
        ({"strong": lambda pairs: np.ones(len(pairs))}, r"first \(\d, \d\), got float64 of shape"),
        ({"merge_threshold": 1.5}, r"merge_threshold must be in \[0, 1\], got 1.5"),
        ({"merge_pairs": 0}, "merge_pairs must be an integer of at least 1"),
        ({"merge_budget": -1}, "merge_budget must be an integer of at least 0"),
        ({"merge_neighbors": 0}, "merge_neighbors must be"),
        ({"max_neighbors": 0}, "max_neighbors must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"n_boost_neighbors": 0}, "n_boost_neighbors must be"),
        ({"boost_weight": -0.1}, "boost_weight must be at least 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, change, message):
    asked = []
    arguments = {"weak": WEAK, "strong": STRONG, "budget": 50, "random_state": 0, **change}
    if "strong" not in change and "weak" not in change:
        arguments["strong"] = lambda pairs: asked.append(pairs)
    with pytest.raises(ValueError, match=message):
        kwikbucks(arguments.pop("weak"), arguments.pop("strong"), **arguments)
    assert not asked


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EmbeddingSignal(np.array([[1.0, np.inf]])), "features must be finite"),
        (lambda: EmbeddingSignal(np.zeros(3)), r"features must be numbers of two dimensions, got float64 of shape \(3,\)"),
        (lambda: EmbeddingSignal(np.array([["a"]])), "features must be numbers"),
        (lambda: EmbeddingSignal(np.zeros((0, 3))), r"features must not be empty, got shape \(0, 3\)"),
        (lambda: kwik_cluster(STRONG, 7), r"strong must be a bool array of shape \(7, 7\)"),
        (lambda: kwik_cluster(STRONG, 0), "n must be an integer of at least 1"),
        (lambda: kwik_cluster(STRONG, 8, budget=-1), "budget must be"),
        (lambda: pairwise_f1(np.zeros(8), STRONG), "labels must be integers of shape"),
        (lambda: pairwise_f1(np.zeros(7, dtype=int), STRONG), r"strong_matrix must be a bool array of shape \(7, 7\)"),
        (lambda: correlation_clustering_cost(np.zeros(8, dtype=int), np.triu(STRONG)), "strong_matrix must be symmetric"),
    ],
)  # fmt: skip
def test_the_other_names_refuse_bad_input_too(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
