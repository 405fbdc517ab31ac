"""Pixel contrast against the double loop over all pixels, its symmetries, and where nothing can be contrasted."""

import itertools
import math

import pytest
import torch

from posterity.generative import PixelContrastiveLoss
from posterity.testing import check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=2, d=3, h=3, w=4, classes=3, seed=0):
    embeddings = torch.randn(n, d, h, w, dtype=torch.float64, generator=rng(seed))
    return embeddings, torch.randint(classes, (n, h, w), generator=rng(seed + 1))


def by_loops(embeddings, labels, tau, ignored=None):
    """Return equation 1 by loops over pixels and positives."""
    z = [v / v.norm() for v in embeddings.movedim(1, 3).reshape(-1, embeddings.shape[1])]
    y = labels.flatten().tolist()
    every, kept = [], [i for i in range(len(y)) if y[i] != ignored]
    for i in kept:
        positives = [j for j in kept if j != i and y[j] == y[i]]
        negatives = [j for j in kept if y[j] != y[i]]
        if positives and negatives:
            against = sum(torch.exp(z[i] @ z[k] / tau) for k in negatives)
            costs = [-torch.log((e := torch.exp(z[i] @ z[j] / tau)) / (e + against)) for j in positives]
            every.append(sum(costs) / len(costs))
    return sum(every) / len(every)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_is_the_double_loop_over_all_pixels(tau):
    embeddings, labels = batch()
    labels[0, 0, 0] = 7  # a class of one pixel, which has no positive and is a negative of all others
    loss = PixelContrastiveLoss(tau, max_pixels_per_class=None)
    torch.testing.assert_close(
        loss(embeddings, labels), by_loops(embeddings, labels, tau), rtol=1e-10, atol=0
    )


def test_positives_do_not_stand_against_each_other():
    """In SupCon two coinciding positives cost log 2 each at least; here nothing, far from the negatives."""
    embeddings = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]).double().view(1, 1, 1, 6).repeat(1, 2, 1, 1)
    assert PixelContrastiveLoss(0.1)(embeddings, torch.tensor([[[0, 0, 0, 1, 1, 1]]])) < 1e-7


@pytest.mark.parametrize(("tau", "n"), [(1.0, 2), (0.5, 5), (0.1, 3)])
def test_the_least_is_that_of_two_antipodal_points(tau, n):
    labels = torch.tensor([0, 1]).repeat_interleave(n).view(2, 1, n)
    point = torch.tensor([3.0, 4.0]).double().view(1, 2, 1, 1).expand(-1, -1, 1, n)
    loss, least = PixelContrastiveLoss(tau), math.log1p(n * math.exp(-2 / tau))
    assert float(loss(torch.cat([point, -point]), labels)) == pytest.approx(least, rel=1e-9)
    for seed in range(3):
        anything = torch.randn(2, 2, 1, n, dtype=torch.float64, generator=rng(seed))
        assert loss(anything, labels) > least


def test_order_of_images_names_of_classes_rotations_and_lengths_do_not_matter():
    embeddings, labels = batch(n=3, d=4)
    loss = PixelContrastiveLoss(0.2, max_pixels_per_class=None)
    value = loss(embeddings, labels)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=rng(5))).Q
    lengths = torch.rand(3, 1, 3, 4, dtype=torch.float64, generator=rng(6)) + 0.1
    others = [
        loss(embeddings[[2, 0, 1]], labels[[2, 0, 1]]),
        loss(embeddings, torch.tensor([40, 2, 9])[labels]),
        loss(torch.einsum("ij,njhw->nihw", turn, embeddings), labels),
        loss(embeddings * lengths, labels),
        loss(embeddings * 1e-200, labels),
        loss(embeddings * 1e200, labels),
    ]
    for other in others:
        torch.testing.assert_close(other, value)
    single = loss(embeddings.float() * 1e-30, labels)  # squares below float32's range
    torch.testing.assert_close(single.double(), value, rtol=1e-5, atol=1e-6)


def test_pixels_of_other_images_are_positives():
    """Each image has one pixel of class 0 and one of 1: all positives are across images."""
    x = torch.randn(2, 3, 1, 2, dtype=torch.float64, generator=rng())
    labels = torch.tensor([[[0, 1]], [[0, 1]]])
    loss = PixelContrastiveLoss(1.0)
    torch.testing.assert_close(loss(x, labels), by_loops(x, labels, 1.0))
    assert loss(x, labels) > 0
    assert loss(x[:1], labels[:1]) == 0


@pytest.mark.parametrize("limit", [None, 2])
def test_ignored_pixels_change_nothing(limit):
    embeddings, labels = batch(seed=3)
    loss = PixelContrastiveLoss(0.3, max_pixels_per_class=limit, ignore_index=255)
    few = torch.cat([labels, torch.full((2, 3, 2), 255)], 2)
    value = loss(embeddings, labels, generator=rng())
    for noise in (1.0, 1e6):
        wide = torch.cat([embeddings, noise * torch.ones(2, 3, 3, 2).double()], 3)
        got = loss(wide, few, generator=rng())
        if limit is None:
            torch.testing.assert_close(got, value)
        else:
            assert torch.isfinite(got)
    assert PixelContrastiveLoss(ignore_index=-1)(embeddings, labels - labels - 1) == 0


@pytest.mark.parametrize("labels", [torch.zeros(1, 2, 2).long(), torch.arange(4).view(1, 2, 2)])
def test_with_nothing_to_contrast_it_is_zero_and_attached(labels):
    embeddings = torch.randn(1, 3, 2, 2, generator=rng()).requires_grad_()
    loss = PixelContrastiveLoss()(embeddings, labels)
    assert loss == 0
    loss.backward()
    assert (embeddings.grad == 0).all()


def test_is_finite_for_equal_embeddings_at_a_low_temperature():
    x = torch.ones(1, 2, 2, 4).requires_grad_()
    labels = torch.tensor([0, 1]).repeat_interleave(4).view(1, 2, 4)
    loss = PixelContrastiveLoss(0.01)(x, labels)
    assert float(loss.detach()) == pytest.approx(math.log(5), rel=1e-5)  # one positive against four negatives
    loss.backward()
    assert torch.isfinite(x.grad).all()


def test_labels_are_brought_to_the_size_of_the_embeddings_by_nearest_neighbours():
    embeddings, _ = batch()
    large = torch.randint(3, (2, 7, 9), generator=rng(8))
    small = torch.nn.functional.interpolate(large[:, None].double(), (3, 4), mode="nearest")[:, 0].long()
    loss = PixelContrastiveLoss(max_pixels_per_class=None)
    assert torch.equal(loss(embeddings, large), loss(embeddings, small))


def test_draws_so_many_pixels_of_each_class_all_alike():
    """With one pixel of class 1 apart, the loss tells which were drawn: here by how often each is."""
    loss = PixelContrastiveLoss(max_pixels_per_class=2)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 5, 9, 9])
    seen = torch.zeros(10)
    draw = rng()
    for _ in range(400):
        chosen = loss._chosen(labels, draw)
        assert len(set(chosen.tolist())) == len(chosen) == 7
        assert labels[chosen].bincount(minlength=10)[[0, 1, 5, 9]].tolist() == [2, 2, 1, 2]
        seen[chosen] += 1 / 400
    wanted = torch.tensor([1 / 2] * 4 + [2 / 3] * 3 + [1.0] * 3)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=0.09)


def test_one_generator_draws_once_and_the_global_state_is_left_alone():
    embeddings, labels = batch(h=20)
    loss, state = PixelContrastiveLoss(max_pixels_per_class=4), torch.get_rng_state()
    values = [loss(embeddings, labels, generator=rng(seed)) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sample_is_right_on_average():
    """Drawing does not change what a pixel's pair costs: with one negative class of one pixel it is unbiased."""
    embeddings, _ = batch(n=1, h=1, w=9)
    labels = torch.tensor([[[0] * 8 + [1]]])
    full = PixelContrastiveLoss(1.0, max_pixels_per_class=None)(embeddings, labels)
    loss, draw = PixelContrastiveLoss(1.0, max_pixels_per_class=3), rng()
    drawn = torch.stack([loss(embeddings, labels, generator=draw) for _ in range(100)])
    assert abs(drawn.mean() - full) < 4 * drawn.std() / math.sqrt(100)


def test_conforms_to_its_kind(as_a_user):
    embeddings, labels = batch(d=4)
    check_loss(PixelContrastiveLoss(0.5), embeddings.requires_grad_(), labels, symmetric=True, compiles=False)


def test_gradient_is_that_of_differences():
    embeddings, labels = batch(h=2, w=3)
    loss = PixelContrastiveLoss(max_pixels_per_class=None)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), embeddings.requires_grad_())


X, Y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PixelContrastiveLoss(0.0), "temperature must be greater than 0"),
        (lambda: PixelContrastiveLoss(None), "temperature must be a number greater than 0, got None"),
        (lambda: PixelContrastiveLoss(max_pixels_per_class=1), "max_pixels_per_class must be an integer of at least 2"),
        (lambda: PixelContrastiveLoss(ignore_index=1.5), "ignore_index must be an integer, got 1.5"),
        (lambda: PixelContrastiveLoss()(None, Y), "embeddings must be a floating-point tensor"),
        (lambda: PixelContrastiveLoss()(X.long(), Y), "embeddings must be a floating-point tensor"),
        (lambda: PixelContrastiveLoss()(X[0], Y), "embeddings must have shape"),
        (lambda: PixelContrastiveLoss()(X[:, :1], Y), "at least 2 channels"),
        (lambda: PixelContrastiveLoss()(X[:0], Y[:0]), "embeddings must have pixels"),
        (lambda: PixelContrastiveLoss()(X, Y[:1]), r"labels must have shape \(2, any, any\) for embeddings"),
        (lambda: PixelContrastiveLoss()(X, Y[:, :0]), "labels must have pixels"),
        (lambda: PixelContrastiveLoss()(X, Y.float()), "labels must hold class indices, got dtype torch.float32"),
        (lambda: PixelContrastiveLoss()(X, None), "labels must be a tensor of class indices, got NoneType"),
        (lambda: PixelContrastiveLoss(ignore_index=255)(X, Y - 1), "labels must be at least 0, or ignore_index=255, got -1"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_all_pixels_of_a_small_batch_are_used_without_a_draw():
    embeddings, labels = batch()
    everything = itertools.pairwise(
        PixelContrastiveLoss(max_pixels_per_class=limit)(embeddings, labels) for limit in (None, 24, 64)
    )
    assert all(torch.equal(*pair) for pair in everything)
