import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.lab.data import load_images
from posterity.lab.selfsup import (
    descend,
    effective_rank,
    embedded,
    encoder_for,
    feature_dim,
    few_of_each,
    image_parts,
    knn_accuracy,
    photo_view,
    pretrain,
    probe,
    small_view,
    view_for,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simclr(z1, z2):
    z, n = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    similar = (z @ z.T / 0.2).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similar, torch.cat([torch.arange(n) + n, torch.arange(n)]))


@pytest.fixture(scope="module")
def parts():
    return image_parts(load_images("digits"), 100)


@pytest.mark.parametrize(("view", "shape"), [(small_view, (5, 1, 8, 8)), (photo_view, (5, 3, 16, 12))])
def test_a_view_is_the_generators_and_each_image_has_its_own(view, shape):
    x = torch.rand(shape, generator=rng())
    kept, state = x.clone(), torch.get_rng_state()
    a, b, c = view(x, rng(1)), view(x, rng(1)), view(x, rng(2))
    assert a.shape == x.shape and torch.isfinite(a).all()
    torch.testing.assert_close(a, b)
    assert (a - c).abs().amax((1, 2, 3)).min() > 0.01
    same = view(x[:1].expand_as(x), rng(1))
    assert (same[0] - same[1:]).abs().amax((1, 2, 3)).min() > 0.01
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)


def test_a_photograph_of_one_grey_stays_grey():
    """Luma is what saturation and hue leave alone."""
    x = torch.full((50, 3, 8, 8), 0.5)
    seen = photo_view(x, rng())
    torch.testing.assert_close(seen[:, 0], seen[:, 1], atol=1e-2, rtol=0)
    torch.testing.assert_close(seen[:, 0], seen[:, 2], atol=1e-2, rtol=0)
    means = seen.mean((1, 2, 3))
    assert 0.29 < means.min() < 0.4 < 0.6 < means.max() < 0.71


def test_arms_start_alike_and_a_seed_is_a_run(parts):
    nets = [
        pretrain(simclr, parts.x, steps=2, seed=100, batch_size=16).encoder.state_dict() for _ in range(2)
    ]
    for name, value in nets[0].items():
        torch.testing.assert_close(value, nets[1][name])
    other = pretrain(simclr, parts.x, steps=2, seed=101, batch_size=16).encoder.state_dict()
    assert not torch.allclose(other["0.weight"], nets[0]["0.weight"])


def test_contrast_makes_features_worth_more_than_pixels_and_random_ones(parts):
    """The levels that the convention of the domain names."""
    found = pretrain(simclr, parts.x, steps=100, seed=100)
    rows = few_of_each(parts.y, 10, 100)
    worth = [
        probe(net(parts.x), parts.y, net(parts.x_test), parts.y_test, rows)
        for net in (lambda x: embedded(found.encoder, x), lambda x: x.flatten(1))
    ]
    assert worth[0] > worth[1] + 0.02
    assert found.losses[-10:].mean() < found.losses[:10].mean() - 0.5
    assert not found.encoder.training and found.seconds > 0


def test_a_loss_with_parameters_is_trained_along(parts):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z1, z2):
            return self.scale.square() + simclr(z1, z2)

    loss = Scaled()
    pretrain(loss, parts.x, steps=3, seed=100, batch_size=16)
    assert float(loss.scale) < 1 and not loss.training
    with pytest.raises(ValueError, match="lower lr"):
        pretrain(lambda a, b: (a - b).sum() * torch.nan, parts.x, steps=1, batch_size=4)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_any_number_of_steps_rises_and_falls(steps):
    w, seen = nn.Parameter(torch.ones(2)), []
    opt = torch.optim.SGD([{"params": [w], "lr": 0.5}])
    x = torch.arange(12.0).view(3, 1, 2, 2)

    def value(rows, see):
        first, second = see(), see()
        assert len(rows) == 4 and first.shape == (4, 1, 2, 2) and not torch.equal(first, second)
        return w.square().sum()

    losses = descend(
        value,
        opt,
        x,
        steps=steps,
        batch_size=4,
        on_step=lambda step: seen.append((step, opt.param_groups[0]["lr"])),
    )
    assert len(losses) == steps and [step for step, _ in seen] == list(range(steps))
    assert losses[-1] <= losses[0] and max(lr for _, lr in seen) <= 0.5
    if steps > 2:
        assert seen[-1][1] < 0.1 * max(lr for _, lr in seen)


def test_few_labels_are_the_first_of_more(parts):
    few, more = (few_of_each(parts.y, n, 3) for n in (2, 5))
    assert torch.equal(parts.y[few].bincount(), torch.full((10,), 2))
    assert set(few.tolist()) < set(more.tolist())
    assert len(few_of_each(parts.y, None, 3)) == len(parts.y)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(6, 3)) == pytest.approx(1)


def test_neighbours_vote_by_direction():
    train, y = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.1, 5.0], [0.0, 1.0]]), torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[100.0, 1.0], [0.01, 0.2]])
    assert knn_accuracy(train, y, test, torch.tensor([0, 1]), k=2) == 1


def test_embedding_leaves_modes_as_they_were(parts):
    net = encoder_for(parts.x, 0).train()
    net[1].eval()
    before = net[4].running_mean.clone()
    features = embedded(net, parts.x[:7], batch_size=3)
    assert features.shape == (7, feature_dim(net, parts.x)) == (7, 64)
    assert net.training and not net[1].training and torch.equal(before, net[4].running_mean)


def test_photographs_get_a_larger_encoder_and_their_view():
    x = torch.zeros(2, 3, 32, 32)
    assert feature_dim(encoder_for(x, 0), x) == 128 and view_for(x) is photo_view
    images = load_images("digits")
    colours = type(images)(np.repeat(images.x[:90], 3, 1), images.y[:90], images.classes)
    split = image_parts(colours, 0)
    assert len(split.x_test) == 30
    torch.testing.assert_close(split.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
