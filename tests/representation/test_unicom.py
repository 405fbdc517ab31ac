import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from posterity.representation import (
    ClusterDiscrimination,
    cluster_labels,
    mean_average_precision_at_r,
    recall_at_k,
)
from posterity.testing import check_loss, check_metric


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def made(dim=6, n_classes=9, seed=0, **options):
    loss = ClusterDiscrimination(dim, n_classes, **options).double()
    loss.weight.data = randn(n_classes, dim, seed=seed)
    return loss


def batch(n=7, dim=6, n_classes=9, seed=1):
    return randn(n, dim, seed=seed).requires_grad_(), torch.randint(n_classes, (n,), generator=rng(seed))


def by_loops(z, labels, weight, classes, features, angular, additive, scale, threshold):
    """The loss of a batch by numpy, sample by sample."""
    z, weight = (x.detach().numpy()[:, features] for x in (z, weight))
    total = 0.0
    for row, label in zip(z, labels.tolist(), strict=True):
        logits = []
        for k in classes:
            c = row @ weight[k] / np.linalg.norm(row) / np.linalg.norm(weight[k])
            if k == label:
                c = math.cos(math.acos(c) + angular) - additive
                own = scale * c
            elif threshold and c > threshold:
                c = 0.0
            logits.append(scale * c)
        total += math.log(sum(math.exp(x) for x in logits)) - own
    return total / len(z)


# The loss.


def test_without_margin_and_parts_it_is_cross_entropy_of_scaled_cosines():
    loss, (z, y) = made(angular_margin=0), batch()
    ours = loss(z, y)
    cosine = F.normalize(z, dim=1) @ F.normalize(loss.weight, dim=1).T
    plain = F.cross_entropy(32 * cosine, y)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(v, (z, loss.weight)) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)
    everything = {"classes": torch.arange(9), "features": torch.arange(6)}
    torch.testing.assert_close(loss(z, y, **everything), ours)


@pytest.mark.parametrize("margins", [(0.3, 0.0), (0.0, 0.2)])
@pytest.mark.parametrize("gradient", ["straight-through", "exact"])
def test_the_loss_of_a_part_is_that_of_the_part_of_the_matrix(margins, gradient):
    loss = made(angular_margin=margins[0], additive_margin=margins[1], scale=5.0, filter_threshold=0.3, margin_gradient=gradient)  # fmt: skip
    z, y = batch()
    y = y % 4
    classes, features = torch.tensor([0, 1, 2, 3, 7]), torch.tensor([5, 0, 2])
    ours = loss(z, y, classes=classes, features=features)
    expected = by_loops(z, y, loss.weight, classes.tolist(), features.tolist(), *margins, 5.0, 0.3)
    assert float(ours.detach()) == pytest.approx(expected, rel=1e-10)
    ours.backward()
    outside = loss.weight.grad.clone()
    outside[classes[:, None], features] = 0
    assert torch.equal(outside, torch.zeros_like(outside))
    assert (loss.weight.grad[classes][:, features] != 0).all()
    assert torch.equal(z.grad[:, [1, 3, 4]], torch.zeros(7, 3, dtype=torch.float64))


def test_the_straight_gradient_is_that_of_softmax_as_if_the_margin_were_a_constant():
    loss, (z, y) = made(angular_margin=0.4), batch()
    unit = F.normalize(z, dim=1)
    cosine = unit @ F.normalize(loss.weight, dim=1).T
    shifted = cosine.detach().clone()
    own = shifted.gather(1, y[:, None])
    shifted.scatter_(1, y[:, None], (own.acos() + 0.4).cos())
    slope = 32 * ((32 * shifted).softmax(1) - F.one_hot(y, 9)) / len(y)
    expected = torch.autograd.grad((slope * cosine).sum(), z)[0]
    torch.testing.assert_close(torch.autograd.grad(loss(z, y), z)[0], expected)
    exact = made(angular_margin=0.4, margin_gradient="exact")
    torch.testing.assert_close(exact(z, y), loss(z, y))
    assert torch.autograd.gradcheck(lambda z: exact(z, y), z)
    assert not torch.allclose(torch.autograd.grad(exact(z, y), z)[0], expected)


def test_the_loss_rises_with_the_margin_and_units_and_names_do_not_matter():
    z, y = batch()
    values = [float(made(angular_margin=m, scale=4.0)(z, y).detach()) for m in (0.0, 0.2, 0.4)]
    assert values == sorted(values) and values[0] < values[2]
    loss = made()
    value = loss(z, y)
    order, turn = torch.randperm(9, generator=rng()), torch.randperm(6, generator=rng(1))
    other = made()
    other.weight.data = loss.weight.data[order][:, turn] * torch.rand(9, 1, generator=rng()).double().add(0.1)
    place = order.argsort()
    torch.testing.assert_close(other(3 * z[:, turn], place[y]), value)


@pytest.mark.parametrize("gradient", ["straight-through", "exact"])
def test_the_margin_is_added_to_the_angle_even_where_they_pass_pi(gradient):
    angle, values = 1.0, []
    z, margins = torch.tensor([[1.0, 0.0]], dtype=torch.float64), [0.0, 0.5, 1.0, 1.5, 2.0, math.pi - 1, 3.0]
    for m in margins:
        loss = ClusterDiscrimination(2, 2, angular_margin=m, scale=3.0, margin_gradient=gradient).double()
        loss.weight.data = torch.tensor(
            [[math.cos(angle), math.sin(angle)], [0.0, -1.0]], dtype=torch.float64
        )
        values.append(float(loss(z, torch.tensor([0])).detach()))
    assert values == pytest.approx(
        [math.log1p(math.exp(-3 * math.cos(angle + m))) for m in margins], rel=1e-10
    )
    assert all(b > a for a, b in zip(values[:-1], values[1:-1], strict=False)) and values[-1] < values[-2]


def test_it_is_a_loss_and_its_prototypes_a_parameter(as_a_user):
    z, y = batch(4, 5, 6)
    for options in ({}, {"margin_gradient": "exact"}, {"filter_threshold": 0.2, "angular_margin": 0.0}):
        loss = made(5, 6, scale=4.0, **options)
        check_loss(loss, z, y, symmetric=True, compiles=False, detaches="exact" not in options.values())
    start = ClusterDiscrimination(64, 500).weight
    assert float(start.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert [name for name, _ in made().named_parameters()] == ["weight"]


def test_sparse_gradients_are_the_dense_ones():
    z, y = batch()
    dense, sparse = made(class_rate=0.8), made(class_rate=0.8, sparse=True)
    for loss in (dense, sparse):
        loss(z, y, generator=rng()).backward()
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    whole = made(sparse=True)
    whole(z, y).backward()
    assert whole.weight.grad.is_sparse


@pytest.mark.parametrize("gradient", ["straight-through", "exact"])
def test_where_an_embedding_is_its_prototype_value_and_gradient_are_finite(gradient):
    weight = randn(200, 6, dtype=torch.float32)  # of some the cosine with itself is rounded to more than 1
    loss = ClusterDiscrimination(6, 200, margin_gradient=gradient)
    loss.weight.data = weight
    z = (3 * weight).requires_grad_()
    value = loss(torch.cat([z, -z]), torch.arange(200).repeat(2))
    grads = torch.autograd.grad(value, (z, loss.weight))
    assert value.isfinite() and all(g.isfinite().all() for g in grads)


def test_an_additive_margin_takes_the_place_of_the_angular_one():
    z, y = batch()
    torch.testing.assert_close(
        made(additive_margin=0.2)(z, y), made(additive_margin=0.2, angular_margin=0)(z, y)
    )
    assert (made(additive_margin=0.2)(z, y) > made(angular_margin=0)(z, y)).item()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_embeddings_whose_squares_leave_the_range_have_their_cosines(size):
    z, y = batch()
    z, far = z.detach().float(), (size * z.detach()).float().requires_grad_()
    loss = made().float()
    value = loss(far, y)
    torch.testing.assert_close(value, loss(z, y))
    (grad,) = torch.autograd.grad(value, far)
    near = z.clone().requires_grad_()
    expected = torch.autograd.grad(loss(near, y), near)[0]
    torch.testing.assert_close(size * grad.double(), expected.double(), rtol=1e-4, atol=1e-5)
    assert float(recall_at_k(far, y)) == float(recall_at_k(z, y)) > 0


# What a step sees.


def test_a_part_of_the_classes_has_its_size_all_of_the_batch_and_the_rest_evenly():
    loss = ClusterDiscrimination(2, 200, class_rate=0.1)
    labels, count = torch.tensor([5, 9, 5, 150]), torch.zeros(200)
    state = torch.get_rng_state()
    generator = rng()
    for _ in range(1000):
        classes = loss.sample_classes(labels, generator)
        assert len(classes) == 20 and (classes[1:] > classes[:-1]).all()
        count[classes] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert (count[[5, 9, 150]] == 1000).all()
    others = count[[k for k in range(200) if k not in (5, 9, 150)]]
    p = 17 / 197
    assert ((others - 1000 * p).abs() < 5 * math.sqrt(1000 * p * (1 - p))).all()
    same = [loss.sample_classes(labels, rng(3)) for _ in range(2)]
    assert torch.equal(*same)
    assert torch.equal(loss.sample_classes(torch.arange(30) * 2), torch.arange(30) * 2)
    few = ClusterDiscrimination(2, 200, class_rate=0.1).sample_classes(labels.int(), rng(3))
    assert torch.equal(few, same[0]) and few.dtype == torch.int64


def test_of_very_many_classes_some_are_drawn_without_a_list_of_all(monkeypatch):
    monkeypatch.setattr("posterity.representation.unicom.MANY", 50)
    loss, labels, count = (
        ClusterDiscrimination(2, 200, class_rate=0.1),
        torch.tensor([5, 9]),
        torch.zeros(200),
    )
    generator, state = rng(), torch.get_rng_state()
    for _ in range(1000):
        classes = loss.sample_classes(labels, generator)
        assert len(classes) == 20 and (classes[1:] > classes[:-1]).all() and {5, 9} <= set(classes.tolist())
        count[classes] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*(loss.sample_classes(labels, rng(3)) for _ in range(2)))
    p = 18 / 198
    others = count[[k for k in range(200) if k not in (5, 9)]]
    assert ((others - 1000 * p).abs() < 5 * math.sqrt(1000 * p * (1 - p))).all()


def test_a_part_of_the_features_is_drawn_for_all_rows_alike():
    loss, (z, y) = made(n_features=3, class_rate=0.5), batch()
    state = torch.get_rng_state()
    features = loss.sample_features(rng(4))
    assert len(features.unique()) == 3
    generator = rng(7)
    classes = loss.sample_classes(y, generator)
    expected = loss(z, y, classes=classes, features=loss.sample_features(generator))
    torch.testing.assert_close(loss(z, y, generator=rng(7)), expected)
    assert torch.equal(torch.get_rng_state(), state)
    counts = torch.stack([loss.sample_features(rng(seed)) for seed in range(600)]).flatten().bincount()
    assert ((counts - 300).abs() < 5 * math.sqrt(150)).all()


# Clusters.


def test_clusters_are_those_of_directions_and_the_objective_never_falls():
    x = randn(300, 5) * torch.rand(300, 1, generator=rng()).add(0.1)
    u = F.normalize(x, dim=1)
    values = []
    for max_iter in range(1, 9):
        labels, centres = cluster_labels(x, 12, max_iter=max_iter, random_state=0)
        values.append(float((u * centres[labels]).sum()))
    assert all(b >= a - 1e-10 for a, b in zip(values, values[1:], strict=False)) and values[-1] > values[0]
    labels, centres = cluster_labels(x, 12, max_iter=200, batch_size=7, random_state=0)
    torch.testing.assert_close(labels, (u @ centres.T).argmax(1))
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(12, dtype=torch.float64))
    for k in range(12):
        torch.testing.assert_close(centres[k], F.normalize(u[labels == k].sum(0), dim=0))


def test_no_cluster_is_left_empty_and_captions_count_as_much_as_images():
    corners = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]).repeat_interleave(20, 0)
    for seed in range(10):  # most starts have two centres in one corner
        labels, _ = cluster_labels(corners, 3, random_state=seed)
        assert sorted(labels.bincount(minlength=3).tolist()) == [20, 20, 20]
    alone = torch.tensor([[1.0, 0]] * 40 + [[0, 1], [0, -1]])
    for seed in range(5):  # two centres in the crowd: the empty one goes to what is farthest, in one round
        labels, _ = cluster_labels(alone, 2, max_iter=1, random_state=seed)
        assert sorted(labels.bincount(minlength=2).tolist()) == [1, 41]
    image, text = 9 * randn(40, 4), randn(40, 4, seed=1)
    joint = F.normalize(F.normalize(image, dim=1) + F.normalize(text, dim=1), dim=1)
    for ours, theirs in zip(cluster_labels(image, 5, text_features=text, random_state=0),
                            cluster_labels(joint, 5, random_state=0), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


# Retrieval.


def rank_by_loops(query, labels, gallery, gallery_labels, alone, k):
    """Recall at k and mAP@R by sorting each query's gallery."""
    found, precision = [], []
    unit, other = (F.normalize(z, dim=1) for z in (query, gallery))
    for i in range(len(query)):
        places = [j for j in (unit[i] @ other.T).argsort(descending=True).tolist() if not (alone and j == i)]
        hits = [bool(gallery_labels[j] == labels[i]) for j in places]
        found.append(any(hits[:k]))
        r = sum(hits)
        if r:
            precision.append(sum(sum(hits[: p + 1]) / (p + 1) for p in range(r) if hits[p]) / r)
    return np.mean(found), np.mean(precision)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_figures_are_those_of_sorted_galleries(batch_size):
    query, labels = randn(23, 4), torch.randint(6, (23,), generator=rng())
    labels[0] = 77  # alone in its class
    gallery, others = randn(31, 4, seed=2), torch.randint(5, (31,), generator=rng(2))
    for rest in ({}, {"gallery": gallery, "gallery_labels": others}):
        where = (gallery, others, False) if rest else (query, labels, True)
        for k in (1, 3):
            expected = rank_by_loops(query, labels, *where, k)
            found = recall_at_k(query, labels, k=k, batch_size=batch_size, **rest)
            assert float(found) == pytest.approx(expected[0])
        mean = mean_average_precision_at_r(query, labels, batch_size=batch_size, **rest)
        assert float(mean) == pytest.approx(expected[1])


def test_equal_embeddings_do_not_find_themselves():
    z = torch.ones(4, 2)
    assert float(recall_at_k(z, torch.arange(4))) == 0
    pairs = torch.tensor([0, 0, 1, 2])
    assert float(recall_at_k(z, pairs, k=3)) == 0.5  # all others are found, but not the query itself
    assert float(mean_average_precision_at_r(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))) == 1


def test_figures_of_a_case_by_hand():
    angles = torch.tensor([0.01, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    z, y = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 0, 0, 2])
    # the others, nearest first: of 0: 1 2 3 4, of 1: 0 2 3 4, of 2: 1 0 3 4, of 3: 2 4 1 0, of 4: 3 2 1 0
    assert float(recall_at_k(z, y)) == pytest.approx(1 / 5)  # of 3 alone
    assert float(recall_at_k(z, y, k=2)) == pytest.approx(3 / 5)
    # of 0: (0 + 1/2) / 2; of 2: (0 + 1/2) / 2; of 3: (1 + 0) / 2; the classes of 1 and 4 have nothing else
    assert float(mean_average_precision_at_r(z, y)) == pytest.approx(1 / 3)
    assert float(recall_at_k(z[:1], y[:1], k=4, gallery=z[1:], gallery_labels=y[1:])) == 1


def test_they_are_metrics(as_a_user):
    z, y = randn(12, 3), torch.arange(12) % 3
    apart = F.one_hot(y, 3).double()
    check_metric(recall_at_k, z, y, known=[((apart, y), 1.0)])
    check_metric(mean_average_precision_at_r, z, y, known=[((apart, y), 1.0)])


LABELS = torch.tensor([0, 1])
Z = torch.eye(2, 4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ClusterDiscrimination(4, 9, angular_margin=-0.1), "angular_margin"),
        (lambda: ClusterDiscrimination(4, 9, additive_margin=-0.1, angular_margin=0), "additive_margin"),
        (lambda: ClusterDiscrimination(4, 9, additive_margin=0.1, angular_margin=0.5), "choose one margin"),
        (lambda: ClusterDiscrimination(4, 9, scale=0), "scale"),
        (lambda: ClusterDiscrimination(4, 9, class_rate=0), "class_rate"),
        (lambda: ClusterDiscrimination(4, 9, class_rate=1.1), "class_rate"),
        (lambda: ClusterDiscrimination(4, 9, n_features=5), "n_features"),
        (lambda: ClusterDiscrimination(4, 9, n_features=0), "n_features"),
        (lambda: ClusterDiscrimination(4, 9, margin_gradient="none"), "margin_gradient"),
        (lambda: ClusterDiscrimination(4, 1), "n_classes"),
        (lambda: ClusterDiscrimination(4, 9)(Z, torch.tensor([0, 9])), "labels must be in 0..8"),
        (lambda: ClusterDiscrimination(4, 9)(Z, torch.tensor([0, 1, 2])), "labels must have shape"),
        (lambda: ClusterDiscrimination(4, 9)(Z, torch.tensor([0, 1], dtype=torch.int32)), "labels must be int64"),
        (lambda: ClusterDiscrimination(4, 9)(Z[:, :3], LABELS), "embeddings must have shape"),
        (lambda: ClusterDiscrimination(4, 9)(Z[:0], LABELS[:0]), "at least one row"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, classes=torch.tensor([0, 2])), "they lack 1"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, classes=torch.tensor([1, 0])), "sorted and different"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, classes=torch.tensor([0, 1, 1])), "sorted and different"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, features=torch.tensor([0, 0])), "features must be different"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, features=torch.tensor([4])), "features must be in 0..3"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, classes=[0, 1]), "classes must be a tensor"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, features=torch.eye(2).long()), "features must be a tensor of one axis"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, features=torch.tensor([-1])), "features must be in 0..3"),
        (lambda: ClusterDiscrimination(4, 9)(Z, LABELS, classes=torch.tensor([0, 1, 9])), "classes must be in 0..8"),
        (lambda: ClusterDiscrimination(4, 9)(Z, torch.tensor([-1, 0])), "labels must be in 0..8"),
        (lambda: ClusterDiscrimination(4, 9).sample_classes(torch.tensor([9])), "labels must be in 0..8"),
        (lambda: ClusterDiscrimination(4, 9, filter_threshold=-0.1), "filter_threshold"),
        (lambda: ClusterDiscrimination(4, 9, scale=-1), "scale"),
        (lambda: recall_at_k(torch.eye(4), torch.arange(4), k=3, gallery=torch.eye(4)[:2], gallery_labels=LABELS), r"k must be in 1..2"),
        (lambda: recall_at_k(torch.eye(4), torch.arange(4), gallery=torch.eye(3), gallery_labels=torch.arange(3)), "gallery must have shape"),
        (lambda: recall_at_k(torch.eye(4)[:0], torch.arange(0)), "query and gallery must have rows"),
        (lambda: cluster_labels(torch.eye(3), 2, text_features=-torch.eye(3)), "features plus text_features must have a direction"),
        (lambda: cluster_labels(torch.eye(3), 0), "n_clusters must be in 1..3"),
        (lambda: cluster_labels(torch.eye(3), 2, max_iter=0), "max_iter"),
        (lambda: cluster_labels(torch.eye(3), 2, batch_size=0), "batch_size"),
        (lambda: recall_at_k(torch.eye(4), torch.arange(4), k=4), r"k must be in 1..3"),
        (lambda: recall_at_k(torch.eye(4), torch.arange(4), k=0), r"k must be in 1..3"),
        (lambda: recall_at_k(torch.full((4, 2), torch.nan), torch.arange(4)), "query must be finite"),
        (lambda: recall_at_k(torch.ones(4, 0), torch.arange(4)), "query must have a column"),
        (lambda: recall_at_k(torch.eye(4), torch.arange(3)), "query_labels must have shape"),
        (lambda: recall_at_k(torch.eye(4), torch.arange(4), gallery=torch.eye(4)), "both be given"),
        (lambda: mean_average_precision_at_r(torch.eye(4), torch.arange(4)), "must have a class that something"),
        (lambda: cluster_labels(torch.eye(3), 4), "n_clusters must be in 1..3"),
        (lambda: cluster_labels(torch.zeros(3, 2), 2), "row 0 is 0"),
        (lambda: cluster_labels(torch.full((3, 2), torch.nan), 2), "features must be finite"),
        (lambda: cluster_labels(torch.eye(3), 2, text_features=torch.eye(2)), "text_features must have shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
