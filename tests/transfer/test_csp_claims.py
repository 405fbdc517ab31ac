"""The claims on data of one's own: compositions as folders are named, which are seen, and what is refused."""

import numpy as np
import pytest
import torch

from posterity.claims import Trial
from posterity.claims.transfer.csp import Coop, Words, higher_order, recombines, roles
from posterity.lab.data import ImageData, load_images
from posterity.lab.two_towers import two_towers
from posterity.transfer._towers import Towers

SMALL = {"pretraining": 1, "steps": 1}


def images(*classes, each=4):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(classes)), each)
    return ImageData(rng.random((len(y), 3, 6, 5), dtype=np.float32), y, classes)


def every(attributes, objects):
    return [f"{a}_{o}" for a in attributes for o in objects]


def test_a_folder_of_ones_own_is_tuned_and_tested_on(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in [*every(("Wet", "very.old", "red"), ("dog", "cat", "car")), "Wet_red_dog", "red_Wet_car"]:
        (tmp_path / name).mkdir()
        for k in range(4):
            image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / name / f"{k}.png"
            )
    data = load_images(str(tmp_path))
    higher_order.refuse({"data": str(tmp_path)}, data)
    found = higher_order(Trial(100), data=str(tmp_path), **SMALL)
    assert all(0 <= value <= 1 for value in found.values())
    words = Words(data.classes)
    assert words.attributes == ["Wet", "red", "very.old"]
    assert words.objects == ["car", "cat", "dog"]
    k = data.classes.index("very.old_cat")
    assert words.texts[k] == "very old cat"
    assert words.indices[k] == [2, 1]
    assert words.indices[data.classes.index("red_Wet_car")] == [1, 0, 0]


def test_half_is_seen_with_each_word_among_it_and_the_rest_is_shared_out():
    for classes in (every("abcdef", "uvwxyz"), [*every("ab", "uvwxyz"), "c_u"]):
        words = Words(classes)
        for seed in range(100, 106):
            role = roles(words, seed)
            seen = [words.parts[k] for k in np.flatnonzero(role == 0)]
            assert {a for a, _ in seen} == set(words.attributes)
            assert {o for _, o in seen} == set(words.objects)
            least = len(words.attributes) + len(words.objects) - 1
            assert len(classes) // 2 <= len(seen) <= max(len(classes) // 2, least)
            left = len(classes) - len(seen)
            assert (role == 1).sum() == left // 3
    assert not np.array_equal(roles(words, 100), roles(words, 101))


def test_coop_with_the_vectors_of_words_is_the_model_with_those_words():
    made = two_towers("tiny", 100, steps=1)
    towers = Towers(made.model, made.tokenizer)
    coop = Coop(towers, ["red disc", "dark bar"], 3, seed=100)
    coop.context.data = towers.words[towers.word_ids("a photo of")].clone()
    own = towers.tokens(["a photo of red disc", "a photo of dark bar"])
    text = towers.text(own, towers.words[own.ids])
    features = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    got = coop(features, torch.tensor([1, 0]))
    torch.testing.assert_close(got, towers.logits(text, None, features)[:, [1, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("claim", "data", "message"),
    [
        (recombines, images("red", "red_disc"), "classes must be named attribute_object, as red_disc, .* got 'red'"),
        (recombines, images("red_", "red_disc"), "got 'red_'"),
        (recombines, images(*every("abc", "xyz"), "a_b_x"), "classes must be named attribute_object, as red_disc, got 'a_b_x'"),
        (recombines, images(*every("ab", "xy")), "three pairs must be left .* there are 4 pairs of 2 attributes and 2 objects"),
        (recombines, images(*every("abc", "xyz"), each=3), "4 images of each class are needed, 'a_x' has 3"),
        (higher_order, images(*every("abc", "xyz")), "at least two classes named attribute_attribute_object are needed, has 0"),
        (higher_order, images("a_b_x", "b_a_x", "a_x"), "at least two classes named attribute_object are needed, has 1"),
        (higher_order, images("a_b_x", "b_a_x", "a_x", "a_y"), "'b' of a_b_x must be in a class of one attribute too"),
    ],
)  # fmt: skip
def test_data_that_cannot_answer_is_refused(claim, data, message):
    with pytest.raises(ValueError, match=message):
        claim.refuse({"data": "photos"}, data)
