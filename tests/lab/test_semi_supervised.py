"""The task of few labels: what it hides, what its entries see, and the views they learn from."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from posterity.claims.labels import softmatch  # noqa: F401  which registers an entry
from posterity.engine.compare import compare
from posterity.lab.data.images import ImageData
from posterity.lab.tasks import entries, get_task, semi_supervised
from posterity.lab.tasks.semi_supervised import FixMatch, few_labels, two_views
from posterity.lab.views import strong_view, weak_view

TASK = get_task("semi-supervised")
NETWORKS = ["labels alone", "pseudo-labels", "FixMatch", "SoftMatch"]


@pytest.fixture
def short(monkeypatch):
    """Let networks train for 60 steps."""
    monkeypatch.setattr(semi_supervised, "STEPS", 60)


@pytest.fixture
def features(tmp_path, short):
    """Return a file of three classes that lie apart, as rows."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    np.savez(tmp_path / "d.npz", x=4 * np.eye(6)[2 * y] + rng.normal(size=(90, 6)), y=y)
    return str(tmp_path / "d.npz")


@pytest.fixture
def images(tmp_path, short):
    """Return a file of images with a bright spot where their class has it."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = 0.5 * np.eye(25)[3 * y] + 0.4 * rng.random((40, 25))
    np.savez(tmp_path / "i.npz", x=x.reshape(40, 5, 5), y=y)
    return str(tmp_path / "i.npz")


@pytest.mark.parametrize("name", [*NETWORKS, "label spreading"])
def test_every_entry_finds_classes_that_lie_apart(name, features):
    assert TASK.score(entries("semi-supervised")[name].fit, 0, features, None) > 0.8


def test_images_are_learned_from_too(images):
    for name in ("labels alone", "FixMatch"):
        assert 0.3 < TASK.score(entries("semi-supervised")[name].fit, 0, images, None) <= 1


def test_a_few_labels_of_each_class_are_shown_and_the_others_hidden(features):
    seen = []

    def fit(train, seed):
        seen.append(train)
        return lambda x: np.zeros((len(x), 3))

    for labels in (1, 4):
        TASK.score(fit, 0, features, None, labels_per_class=labels)
        x, y = seen[-1]
        assert (len(x), (y == -1).sum()) == (68, 68 - 3 * labels)
        assert np.bincount(y[y >= 0]).tolist() == [labels] * 3
    assert set(np.flatnonzero(seen[0][1] >= 0)) < set(np.flatnonzero(seen[1][1] >= 0)), (
        "more labels, not others"
    )


def test_hidden_labels_are_the_true_ones_elsewhere():
    inputs = ImageData(np.arange(80, dtype=np.float32).reshape(80, 1, 1, 1), np.arange(80) % 2, ("a", "b"))
    x, y, truth, x_test, y_test = few_labels(inputs, 2, 0)
    order = np.argsort(np.concatenate([x, x_test]).ravel(), kind="stable")
    np.testing.assert_array_equal(np.concatenate([truth, y_test])[order], np.arange(80) % 2)
    np.testing.assert_array_equal(y[y >= 0], truth[y >= 0])


def test_too_few_of_two_classes_are_refused_before_any_trial(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(40, 2)), y=np.arange(40) < 5)
    with pytest.raises(ValueError, match="two classes of at least 8 inputs are needed for 4 labels a class"):
        compare("semi-supervised", data=str(tmp_path / "d.npz"))


def test_a_run_repeats_and_its_rows_are_those_without_a_label():
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(50, 3, 1, 1)).astype(np.float32),
        np.where(np.arange(50) < 6, np.arange(50) % 2, -1),
    )
    seen = []
    nets = [
        two_views(
            (x, y), FixMatch(), steps=5, seed=0, watch=lambda step, rows: seen.append((step, rows.tolist()))
        )
        for _ in range(2)
    ]
    with torch.no_grad():
        assert torch.equal(*(net(torch.from_numpy(x)) for net in nets))
    assert seen[:5] == seen[5:]
    assert [step for step, _ in seen[:5]] == [0, 1, 2, 3, 4]
    assert sorted(seen[0][1]) == list(range(6, 50))


def test_fixmatch_learns_from_what_is_sure():
    weak = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 2.9]], requires_grad=True)  # 0.993, 0.73, 0.948
    strong, labeled, y = torch.randn(3, 2), torch.randn(2, 2), torch.tensor([0, 1])
    criterion = FixMatch()
    want = F.cross_entropy(labeled, y) + F.cross_entropy(strong[:1], torch.tensor([0])) / 3
    torch.testing.assert_close(criterion(labeled, y, weak, strong), want)
    assert criterion.weights.tolist() == [1, 0, 0] and criterion.pseudo_labels.tolist() == [0, 0, 1]
    assert not criterion.weights.requires_grad


# Views.


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (1, 2, 2), (12, 1, 1)])
def test_views_have_the_shape_and_are_drawn_by_the_generator(shape):
    x = torch.rand(30, *shape)
    kept = x.clone()
    for view in (weak_view, strong_view):
        first, again, other = (view(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert first.shape == x.shape and first.dtype == x.dtype and first.isfinite().all()
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(x, kept)
    near, far = ((view(x, torch.Generator()) - x).std() for view in (weak_view, strong_view))
    torch.testing.assert_close(near, torch.tensor(0.05), atol=0.01, rtol=0)
    assert far > 3 * near


def test_a_strong_view_moves_scales_and_cuts_each_image_in_its_own_way(monkeypatch):
    """Without noise: each is the image moved by at most a pixel, but for a grey square of 3 x 3."""
    monkeypatch.setattr("posterity.lab.views._normal", lambda x, generator: torch.zeros_like(x))
    image = 0.3 + torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = strong_view(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(1))
    corners, moves, contrasts = set(), set(), []
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")[0, 0]
    for view in found[:, 0]:
        grey = (view == 0.3).nonzero()
        top, left = grey.amin(0).tolist()
        assert len(grey) == 9 and (view[top : top + 3, left : left + 3] == 0.3).all()
        corners.add((top, left))
        seen = view != 0.3
        for down, right in np.ndindex(3, 3):
            before = padded[down : down + 8, right : right + 8] - image.mean()
            ratio = ((view - image.mean()) / before)[seen]
            if ratio.std() < 1e-3:
                moves.add((down, right))
                contrasts.append(float(ratio.median()))
    assert len(contrasts) == 200 and len(moves) == 9 and len(corners) == 36
    assert 0.6 <= min(contrasts) < 0.65 and 1.35 < max(contrasts) <= 1.4
