"""The rarity score's claims: what they refuse, a user's own data, and features of a vision model."""

import numpy as np
import pytest
import torch

from posterity.claims import Trial
from posterity.claims.generative.rarity_score import finds_rare, truncation
from posterity.lab.data import load_labelled

SMALL = {"n_rare": 4, "n_common": 12, "queries": 8, "corrupted": 10, "rare": 1, "k": 3}


@pytest.fixture
def pictures(tmp_path):
    """A file of 3 classes of 8x8 pictures in colour, 20 each but for one of 5."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2, 3], [20, 20, 20, 5])
    x = (40 * y[:, None, None, None] + rng.integers(0, 30, (65, 8, 8, 3))).astype(np.uint8)
    path = tmp_path / "pictures.npz"
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture
def folder(tmp_path):
    """A vision transformer of random weights, as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize("extractor", ["pixels", "pca"])
def test_runs_on_a_users_pictures_and_leaves_small_classes_out(as_a_user, pictures, extractor):
    trial = Trial(12345)
    found = finds_rare(trial, data=str(pictures), extractor=extractor, **SMALL)
    assert all(0 <= value <= 1 for value in found.values())
    assert 0 <= trial.records["inside, rare"] <= 1


def test_takes_features_of_a_folder_of_transformers(as_a_user, pictures, folder):
    settings = {"data": str(pictures), "extractor": f"transformers:{folder}", **SMALL}
    finds_rare.refuse(settings, load_labelled(str(pictures)))
    assert all(0 <= value <= 1 for value in finds_rare(Trial(12345), **settings).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractor": "vgg"}, "extractor must be pixels, pca, or transformers: .* got 'vgg'"),
        ({"extractor": "transformers:"}, "extractor must be pixels, pca, or transformers"),
        ({"extractor": "transformers:/no/such/folder"}, "extractor must be .* got 'transformers:/no/such/folder': "),
        ({"n_rare": 12}, "n_rare must be less than n_common=12, got 12"),
        ({"rare": 3}, r"4 classes of n_common \+ queries = 20 examples are needed, has 3"),
        ({"corrupted": 25}, "corrupted must be at most the 24 held-out examples, got 25"),
        ({"k": 28}, "k must be less than the number of reference samples, got 28"),
    ],
)  # fmt: skip
def test_refuses_what_data_cannot_give_before_any_trial(as_a_user, pictures, settings, message):
    with pytest.raises(ValueError, match=message):
        finds_rare.refuse({"data": str(pictures), **SMALL, **settings}, load_labelled(str(pictures)))


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({}, 30, "at least 40 points are needed"),
        ({"n_reference": 60}, 50, "n_reference must be at most the 50 points, got 60"),
        (
            {"n_reference": 20, "components": 11},
            50,
            "n_reference must be at least twice components, 22, got 20",
        ),
    ],
)
def test_truncation_refuses_too_few_points(as_a_user, settings, rows, message):
    with pytest.raises(ValueError, match=message):
        truncation.refuse({"data": "digits", **settings}, np.zeros((rows, 3)))
