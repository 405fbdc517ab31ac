"""Scenes and what the claims about ECGAN refuse; pairs of a user's own in a folder."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from posterity.claims import Trial
from posterity.claims.generative import ecgan
from posterity.lab.data import PictureData


def test_scenes_have_all_classes_and_objects_of_several_colours():
    image, labels = map(
        np.stack, zip(*(ecgan._scene(np.random.default_rng(seed)) for seed in range(30)), strict=True)
    )
    assert set(np.unique(labels)) == set(range(len(ecgan.CLASSES)))
    sky = np.stack([image[k][:, labels[k] == 0].mean(1) for k in range(30)])
    assert sky.std(0).min() > 5  # of 255
    assert (labels[:, 0] == 0).mean() > 0.9
    assert (labels[:, -1] == 1).mean() > 0.9


def test_iou_is_the_share_of_agreement_by_class():
    y = torch.tensor([[[0, 0, 1, 1]]])
    found = F.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 3).movedim(3, 1).float()
    net = torch.nn.Conv2d(3, 3, 1, bias=False)
    net.weight.data = torch.eye(3).view(3, 3, 1, 1)
    mean, each = ecgan._iou(net, found, y, 3)
    assert each[:2] == pytest.approx([1 / 2, 2 / 3])
    assert np.isnan(each[2])  # neither there nor found
    assert mean == pytest.approx(7 / 12)


def pictures(n=12, side=9):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, side, side)).astype(np.uint8) for _ in range(n)]
    maps = [np.repeat(rng.choice([7, 40, 255], (1, side, side)), 3, 0).astype(np.uint8) for _ in range(n)]
    return images + maps


def test_pairs_of_a_folder_are_brought_to_one_side_and_classes_count_from_zero(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, part in (("images", pictures()[:12]), ("labels", [m[0] for m in pictures()[12:]])):
        (tmp_path / name).mkdir()
        for k, x in enumerate(part):
            image.fromarray(np.moveaxis(x, 0, 2) if x.ndim == 3 else x).save(tmp_path / name / f"{k:02}.png")
    train, test = ecgan._split(Trial(0), str(tmp_path), 8, 8, 4)
    assert train.x.shape == (8, 3, 8, 8)
    assert test.y.shape == (4, 8, 8)
    assert train.n_classes == 3
    assert set(train.y.unique().tolist()) == {0, 1, 2}
    assert train.x.abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda p: p[:-1], {}, "as many images as label maps"),
        (lambda p: [p[0][:, :-1], *p[1:]], {}, "pair 0 has"),
        (lambda p: [*p[:12], *p[:12]], {}, "label maps must be grey"),
        (lambda p: [*p[:12], *[0 * x for x in p[:12]]], {}, "at least two classes"),
        (lambda p: p, {"side": 16}, "side must be at most 9"),
        (lambda p: p, {"n_train": 9}, "n_train must leave 4 of the 12 pairs"),
    ],
)
def test_data_that_cannot_be_used_are_refused(change, settings, message):
    with pytest.raises(ValueError, match=message):
        ecgan._fits(PictureData(change(pictures())), **{"side": 8, "n_train": 8, "n_test": 4} | settings)
