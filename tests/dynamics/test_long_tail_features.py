"""Data with a tail, kernels and the bound against brute force over partitions, and the spec's closed values."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from posterity.dynamics import (
    ConceptMixer,
    ConceptSequences,
    SuccessBound,
    equipartition,
    equipartition_kernel,
    nearest_neighbor_accuracy,
    one_hot_kernel,
    success_bound,
)
from posterity.dynamics.equipartition import _normalised
from posterity.lab.memory import peak_bytes
from posterity.testing import check_instrument, check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sentences(n, length, n_words, seed=0):
    return torch.randint(n_words, (n, length), generator=rng(seed))


def equipartitions(n_words, n_concepts):
    room = n_words // n_concepts
    every = itertools.product(range(n_concepts), repeat=n_words)
    return [
        p for p in every if all(times == room for times in Counter(p).values()) and len(set(p)) == n_concepts
    ]


# --- the kernel ---


@pytest.mark.parametrize(
    ("n_words", "n_concepts", "length"), [(6, 3, 3), (8, 2, 4), (6, 6, 2), (4, 1, 3), (6, 2, 6)]
)
def test_the_kernel_counts_the_partitions_that_make_two_sentences_alike(n_words, n_concepts, length):
    every = equipartitions(n_words, n_concepts)
    assert len(every) == math.factorial(n_words) // math.factorial(n_words // n_concepts) ** n_concepts
    x, y = sentences(12, length, n_words), sentences(9, length, n_words, 1)
    found = equipartition_kernel(x, y, n_words=n_words, n_concepts=n_concepts, normalize=False)
    for i, j in itertools.product(range(len(x)), range(len(y))):
        count = sum(
            all(p[a] == p[b] for a, b in zip(x[i].tolist(), y[j].tolist(), strict=True)) for p in every
        )
        assert found[i, j] == count
    scaled = equipartition_kernel(x, y, n_words=n_words, n_concepts=n_concepts)
    torch.testing.assert_close(scaled, found * (n_concepts**length / len(every)), rtol=1e-14, atol=0)


def test_the_kernel_is_symmetric_and_positive_semi_definite_and_largest_where_sentences_are_one():
    x = sentences(60, 3, 6)
    k = equipartition_kernel(x, x, n_words=6, n_concepts=3)
    assert torch.equal(k, k.T)
    assert torch.linalg.eigvalsh(k).min() > -1e-9 * k.max()
    assert torch.equal(k.diagonal(), torch.full((60,), 27.0, dtype=torch.float64))
    assert (k <= 27).all()


def test_neither_names_of_words_nor_an_order_of_places_matter_to_the_kernel():
    x, y = sentences(20, 5, 20), sentences(15, 5, 20, 1)
    k = equipartition_kernel(x, y, n_words=20, n_concepts=4)
    names, places = torch.randperm(20, generator=rng()), torch.randperm(5, generator=rng())
    assert torch.equal(equipartition_kernel(names[x], names[y], n_words=20, n_concepts=4), k)
    assert torch.equal(equipartition_kernel(x[:, places], y[:, places], n_words=20, n_concepts=4), k)
    assert not torch.equal(equipartition_kernel(x[:, places], y, n_words=20, n_concepts=4), k)


def test_independent_sentences_have_a_normalised_kernel_of_1_on_average():
    x, y = sentences(200, 4, 20), sentences(100, 4, 20, 1)
    k = equipartition_kernel(x, y, n_words=20, n_concepts=4)
    # pairs share sentences: the spread is that of means over rows and over columns
    spread = (k.mean(0).var() / k.shape[1] + k.mean(1).var() / k.shape[0]).sqrt()
    assert abs(k.mean() - 1) < 5 * spread
    assert spread < 0.1


def test_chunks_and_narrow_integers_change_nothing(monkeypatch):
    x, y = sentences(31, 6, 30), sentences(17, 6, 30, 1)
    whole = equipartition_kernel(x, y, n_words=30, n_concepts=5)
    monkeypatch.setattr("posterity.dynamics.equipartition.PAIRS", 10_000)
    assert torch.equal(equipartition_kernel(x, y, n_words=30, n_concepts=5), whole)
    assert torch.equal(equipartition_kernel(x.to(torch.int8), y.int(), n_words=30, n_concepts=5), whole)
    assert equipartition_kernel(x[:0], y, n_words=30, n_concepts=5).shape == (0, 17)


def test_the_memory_of_pairs_is_what_is_promised_however_many_there_are(monkeypatch):
    assert equipartition.PAIRS == 64 * 2**20
    monkeypatch.setattr(equipartition, "PAIRS", 2**20)
    x = sentences(400, 9, 150)
    result = 8 * 100 * len(x)
    peak = peak_bytes(lambda: equipartition_kernel(x, x[:100], n_words=150, n_concepts=5))
    assert peak - result < 2**20


def test_one_hot_inner_products_are_the_one_hot_kernel():
    x, y = sentences(20, 5, 7), sentences(15, 5, 7, 1)
    codes = [F.one_hot(part, 7).flatten(1).double() for part in (x, y)]
    assert torch.equal(one_hot_kernel(x, y), codes[0] @ codes[1].T)


# --- the bound ---


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ((9, 150, 5, 1000), {7: 0.0143459, 8: 0.0401854, 9: 0.2762353}),
        ((9, 50, 5, 1000), {6: 0.0721910, 7: 0.0984159}),
        ((4, 12, 3, 10), {2: 0.4031295, 3: 0.4507951}),
        ((5, 20, 4, 50), {3: 0.1961054}),
    ],
)
def test_the_bound_has_the_values_of_the_authors_program(setting, values):
    found = success_bound(*setting)
    for ell, value in values.items():
        assert found.per_ell[ell] == pytest.approx(value, abs=5e-8)
        assert success_bound(*setting, ell=ell).coefficient == found.per_ell[ell]
    assert list(found.per_ell) == list(range(2, setting[0] + 1))
    assert found.coefficient == min(found.per_ell.values()) == found.per_ell[found.ell]


def test_the_bound_is_that_of_all_pairs_of_sentences_one_by_one():
    length, n_words, n_concepts, n_categories = 3, 4, 2, 5
    pairs = list(itertools.product(range(n_words), repeat=2 * length))
    mass, highest = Counter(), Counter()
    for pair in pairs:
        graph = {frozenset((a, b)) for a, b in zip(pair[:length], pair[length:], strict=True) if a != b}
        parts = [{word} for word in range(n_words)]
        for a, b in map(tuple, graph):
            one, other = (next(part for part in parts if word in part) for word in (a, b))
            if one is not other:
                parts = [part for part in parts if part is not one and part is not other] + [one | other]
        if len(graph) != n_words - len(parts):  # a cycle: no forest
            continue
        sizes = tuple(sorted((len(part) for part in parts if len(part) > 1), reverse=True))
        value = float(_normalised(sizes, n_words, n_concepts, length))
        for ell in range(2, len(graph) + 1):
            mass[ell] += value / len(pairs)
            highest[ell] = max(highest[ell], value)
    for ell, found in success_bound(length, n_words, n_concepts, n_categories).per_ell.items():
        assert found == pytest.approx(1 - mass[ell] + highest[ell] / (2 * n_categories), abs=1e-12)


def test_the_limit_grows_with_the_tail_from_guessing_to_certainty():
    bound = success_bound(9, 50, 5, 1000)
    assert bound.limit(0) == 1 / 1000
    assert bound.limit(3) == pytest.approx(3 * bound.coefficient + 1 / 1000)
    assert bound.limit(1000) == 1.0


def test_no_fixed_features_pass_the_bound_on_average():
    reached = []
    for seed in range(3):
        data = ConceptSequences(4, 12, 3, 40, shuffle_words=True, generator=rng(seed))
        x, y = data.train(4)
        x_test, y_test = data.test(5)
        k = equipartition_kernel(x_test, x, n_words=12, n_concepts=3)
        reached.append(float(nearest_neighbor_accuracy(k, y, y_test)))
    assert sum(reached) / 3 <= success_bound(4, 12, 3, 40).limit(1)


# --- the data ---


def test_sentences_have_the_concepts_of_their_sequence_and_words_uniform_within():
    data = ConceptSequences(9, 50, 5, 60, shuffle_words=True, generator=rng())
    assert torch.equal(data.concept_of.bincount(), torch.full((5,), 10))
    assert not torch.equal(data.concept_of, data.concept_of.sort().values)
    x, y = data.test(40)
    assert torch.equal(y, torch.arange(60).repeat_interleave(40))
    assert torch.equal(data.concept_of[x], data.unfamiliar[y])
    for concept in range(5):
        members = (data.concept_of == concept).nonzero()[:, 0]
        times = x.flatten().bincount(minlength=50)[members]
        assert chisquare(times.numpy()).pvalue > 1e-4
    for sequences in (data.familiar, data.unfamiliar):
        assert chisquare(sequences.flatten().bincount(minlength=5).numpy()).pvalue > 1e-4


def test_a_training_set_has_familiar_sentences_first_and_then_the_tail():
    data = ConceptSequences(5, 20, 4, 7, generator=rng())
    x, y = data.train(6, n_unfamiliar=2)
    assert torch.equal(
        y, torch.cat([torch.arange(7).repeat_interleave(4), torch.arange(7).repeat_interleave(2)])
    )
    assert torch.equal(data.concept_of[x[:28]], data.familiar[y[:28]])
    assert torch.equal(data.concept_of[x[28:]], data.unfamiliar[y[28:]])
    assert torch.equal(data.concept_of, torch.arange(20) // 5)


def test_one_generator_decides_all_and_shuffled_words_leave_the_sequences():
    a, b = (ConceptSequences(5, 20, 4, 7, generator=rng(3)) for _ in range(2))
    shuffled = ConceptSequences(5, 20, 4, 7, shuffle_words=True, generator=rng(3))
    assert torch.equal(a.train(4)[0], b.train(4)[0])
    assert torch.equal(shuffled.familiar, a.familiar)
    assert torch.equal(shuffled.unfamiliar, a.unfamiliar)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a.test()
    assert torch.equal(before, torch.get_rng_state())


def test_neighbours_by_true_concepts_are_right_where_words_are_not():
    data = ConceptSequences(9, 50, 5, 60, generator=rng())
    x, y = data.train(6)
    x_test, y_test = data.test(10)
    concepts = one_hot_kernel(data.concept_of[x_test], data.concept_of[x])
    assert nearest_neighbor_accuracy(concepts, y, y_test) > 0.99
    assert nearest_neighbor_accuracy(one_hot_kernel(x_test, x), y, y_test) < 0.3


# --- nearest neighbours ---


def test_ties_count_by_their_expectation():
    ties = torch.ones(1, 4)
    assert nearest_neighbor_accuracy(ties, torch.tensor([0, 1, 2, 3]), torch.tensor([2])) == 0.25
    infinite = torch.tensor([[math.inf, math.inf, 0.0], [-math.inf, -math.inf, -math.inf]])
    found = nearest_neighbor_accuracy(infinite, torch.tensor([0, 1, 0]), torch.tensor([0, 0]))
    assert found == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_neighbours_are_those_of_a_loop_in_any_order_and_chunk(monkeypatch):
    similarity = torch.randint(4, (30, 12), generator=rng())
    y, y_test = torch.arange(12) % 3, torch.arange(30) % 3
    found = nearest_neighbor_accuracy(similarity, y, y_test)
    total = 0.0
    for row, truth in zip(similarity.tolist(), y_test.tolist(), strict=True):
        nearest = [k for k in range(12) if row[k] == max(row)]
        total += sum(int(y[k]) == truth for k in nearest) / len(nearest)
    assert float(found) == pytest.approx(total / 30, abs=1e-12)
    order = torch.randperm(12, generator=rng(1))
    monkeypatch.setattr("posterity.dynamics.long_tail_features.COMPARED", 50)
    assert nearest_neighbor_accuracy(similarity[:, order].double(), y[order], y_test) == pytest.approx(
        float(found)
    )
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_neighbor_accuracy(similarity.bfloat16(), y, y_test) == pytest.approx(float(found))


# --- the network ---


def small(**sizes):
    torch.manual_seed(0)
    return ConceptMixer(4, 12, 3, **{"word_hidden": 8, "embedding": 5, "hidden": 16, **sizes})


def test_the_network_is_a_layer_like_any_other(as_a_user):
    check_layer(small(), sentences(6, 4, 12), shape=(6, 3), chooses=True)
    check_layer(small(), sentences(2, 4, 12), shape=(2, 3))


def test_words_by_index_are_one_hot_codes_through_the_same_layers():
    net = small().double()
    for n in (2, 50):  # fewer words than there are, and more
        x = sentences(n, 4, 12)
        codes = F.one_hot(x, 12).double()
        embedded = net.norm(net.embed(net.word(codes).relu())).flatten(1)
        torch.testing.assert_close(net.features(x), embedded, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net(x), net.mix(embedded), rtol=1e-12, atol=1e-12)
        ours, theirs = (
            torch.autograd.grad(f.square().sum(), net.word.weight)[0] for f in (net.features(x), embedded)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_look_at_a_users_features_leaves_the_network_alone(as_a_user):
    data = ConceptSequences(4, 12, 3, 5, generator=rng())
    (x, y), (x_test, y_test) = data.train(4), data.test(3)

    def look(net, x, x_test):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return nearest_neighbor_accuracy(
                net.features(x_test).double() @ net.features(x).double().T, y, y_test
            )

    check_instrument(look, small(), x, x_test, chooses=True)


def test_the_bound_draws_itself():
    from matplotlib import pyplot

    axes = pyplot.subplots()[1]
    assert SuccessBound(0.05, 6, 100, {6: 0.05}).plot(axes) is axes
    line = axes.lines[0]
    assert line.get_xdata()[-1] == 20
    assert list(line.get_ydata()[:2]) == pytest.approx([0.01, 0.06])
    pyplot.close(axes.figure)


# --- bad input ---


X = torch.tensor([[0, 1, 2]])
Y = torch.tensor([0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConceptSequences(9, 50, 7), "n_words must be a multiple of n_concepts=7, got 50"),
        (lambda: ConceptSequences(1, 50, 5), "length must be an integer of at least 2, got 1"),
        (lambda: ConceptSequences(9, 50, 0), "n_concepts must be an integer of at least 1, got 0"),
        (lambda: ConceptSequences(9, 50, 5, 0), "n_categories must be an integer of at least 1"),
        (lambda: ConceptSequences(9, 50, 5, 4).train(3, n_unfamiliar=4), r"n_unfamiliar must be in 0..n_per_category=3, got 4"),
        (lambda: ConceptSequences(9, 50, 5, 4).train(3, n_unfamiliar=-1), "n_unfamiliar must be in"),
        (lambda: ConceptSequences(9, 50, 5, 4).train(0), "n_per_category must be an integer of at least 1"),
        (lambda: ConceptSequences(9, 50, 5, 4).test(0), "n_per_category must be an integer of at least 1"),
        (lambda: ConceptSequences(9, 50, 5, 4).sample(torch.tensor([4]), "familiar"), r"categories must be in 0..3"),
        (lambda: ConceptSequences(9, 50, 5, 4).sample(torch.ones(2), "familiar"), "categories must hold class indices"),
        (lambda: ConceptSequences(9, 50, 5, 4).sample(Y, "common"), "which must be one of 'familiar', 'unfamiliar'"),
        (lambda: equipartition_kernel(X, X, n_words=4, n_concepts=3), "n_words must be a multiple of n_concepts=3"),
        (lambda: equipartition_kernel(X, X, n_words=2, n_concepts=2), r"x must be in 0..1, got words from 0 to 2"),
        (lambda: equipartition_kernel(X, X - 1, n_words=4, n_concepts=2), r"y must be in 0..3, got words from -1 to 1"),
        (lambda: equipartition_kernel(X.float(), X, n_words=4, n_concepts=2), "x must hold integers"),
        (lambda: equipartition_kernel(X, X[:, :2], n_words=4, n_concepts=2), "the same length, at least 1, got 3 and 2"),
        (lambda: equipartition_kernel(X[0], X, n_words=4, n_concepts=2), r"x must have shape \(any, any\) for sentences"),
        (lambda: equipartition_kernel(X, X, n_words=400, n_concepts=20, normalize=False), "n_words=400 is beyond 1e308: take normalize=True"),
        (lambda: one_hot_kernel(X, X[:, :2]), r"y must have shape \(any, 3\) for x"),
        (lambda: one_hot_kernel(X, X > 0), "y must hold integers, got torch.bool"),
        (lambda: nearest_neighbor_accuracy(torch.ones(1, 2), Y, Y), r"y_train must have shape \(2\) for one class a sample"),
        (lambda: nearest_neighbor_accuracy(torch.ones(2, 1), Y, Y), r"y_test must have shape \(2\) for one class a sample"),
        (lambda: nearest_neighbor_accuracy(torch.ones(1, 1) / 0 * 0, Y, Y), "similarity must not be NaN"),
        (lambda: nearest_neighbor_accuracy(torch.ones(0, 1), Y, Y[:0]), "similarity must have rows and columns"),
        (lambda: nearest_neighbor_accuracy(torch.ones(1, 1), Y.float(), Y), "y_train must hold class indices"),
        (lambda: success_bound(9, 50, 7, 10), "n_words must be a multiple"),
        (lambda: success_bound(1, 50, 5, 10), "length must be an integer of at least 2"),
        (lambda: success_bound(9, 50, 5, 0), "n_categories must be an integer of at least 1"),
        (lambda: success_bound(9, 50, 5, 10, ell=1), r"ell must be in 2..9, got 1"),
        (lambda: success_bound(9, 50, 5, 10, ell=10), r"ell must be in 2..9, got 10"),
        (lambda: success_bound(9, 50, 5, 10).limit(-1), "n_unfamiliar must be an integer of at least 0"),
        (lambda: small(embedding=0), "embedding must be an integer of at least 1"),
        (lambda: small()(X), r"x must have shape \(any, 4\) for this network"),
        (lambda: small()(torch.full((1, 4), 12)), r"x must be in 0..11, got words from 12 to 12"),
        (lambda: small()(torch.ones(1, 4)), "x must hold integers, got torch.float32"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
