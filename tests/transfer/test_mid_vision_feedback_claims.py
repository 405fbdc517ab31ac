"""The claims on data of one's own: contexts from a file, beside the images or elsewhere, and what is refused."""

import numpy as np
import pytest
import torch

from posterity.claims import Trial
from posterity.claims.transfer.mid_vision_feedback import beats_filter, context_helps, grouped
from posterity.lab.data.images import load_images

SMALL = {"n_train": 30, "epochs": 1, "noise": 0.0}


@pytest.fixture
def photos(tmp_path):
    """A folder of images of four classes, too few of their own to learn from but enough to run on."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("cat", "desk", "horse", "sofa"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for k in range(35):
            image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    (tmp_path / "photos" / "context.csv").write_text(
        "class,context\nsofa,furniture\ncat,animal\nhorse,animal\ndesk, furniture\n"
    )
    return tmp_path / "photos"


def test_a_file_beside_the_images_says_their_contexts(photos):
    images = load_images(str(photos))
    assert images.classes == ("cat", "desk", "horse", "sofa")
    expected = torch.tensor([0, 1, 0, 1])
    for contexts in ("context.csv", str(photos / "context.csv")):
        assert torch.equal(grouped(images, contexts, 2, 0, str(photos)), expected)
    found = context_helps(Trial(100), data=str(photos), contexts="context.csv", **SMALL)
    assert found["post-hoc filter"] >= found["no context"]


def test_classes_are_dealt_out_evenly():
    images = load_images("digits")
    for n_contexts, counts in ((2, [5, 5]), (3, [4, 3, 3]), (10, [1] * 10)):
        dealt = grouped(images, "random", n_contexts, 100, "digits")
        assert dealt.bincount().tolist() == counts
    assert not torch.equal(grouped(images, "random", 2, 100, ""), grouped(images, "random", 2, 101, ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,animal\ndesk,furniture\nhorse,animal\n", "context.csv lacks the class 'sofa'"),
        ("cat,animal\ncat,furniture\n", "context.csv has the class 'cat' twice"),
        ("cat,animal,1\n", r"context.csv must have two columns, class,context, has \['cat', 'animal', '1'\] in row 1"),
        ("cat,animal\ndesk,\n", "context.csv must have two columns"),
        ("cat,a\ndesk,a\nhorse,a\nsofa,a\n", "context.csv must have two contexts at least, all classes are in 'a'"),
    ],
)  # fmt: skip
def test_a_file_of_contexts_that_does_not_fit_is_refused(photos, text, message):
    (photos / "context.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        context_helps.refuse(
            {"data": str(photos), "contexts": "context.csv", **SMALL}, load_images(str(photos))
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"contexts": "none.csv"},
            "contexts must be \"random\" or a CSV file with rows class,context, got 'none.csv'",
        ),
        ({"n_contexts": 11}, "n_contexts must be at most the 10 classes, got 11"),
        ({"n_train": 1_700}, "n_train must leave 100 of the 1797 images"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        beats_filter.refuse(settings, load_images("digits"))
