"""Drawn objects with attributes, and the small CLIP model that is trained on them."""

import pytest
import torch

from posterity.lab.two_towers import ATTRIBUTES, OBJECTS, attribute_object_images, captions, two_towers


def drawn(names, objects, style="plain", seed=0):
    attributes = torch.tensor([[a in each for a in ATTRIBUTES] for each in names])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([OBJECTS.index(o) for o in objects])
    return attribute_object_images(attributes, rows, style=style, generator=generator)


def test_colours_are_what_they_are_called_and_their_complements_in_the_inverted_style():
    for style, lit in (("plain", [1, 0, 0]), ("inverted", [0, 1, 1])):
        image = drawn([["red"]], ["square"], style)[0]
        inside = image[:, 6:10, 6:10].mean((1, 2))
        assert ((inside > 0.5) == torch.tensor(lit).bool()).all()


def test_sizes_textures_and_darkness_show():
    light = drawn([[], ["tiny"], ["huge"], ["striped"], ["dotted"], ["dark"]], ["disc"] * 6).mean((1, 2, 3))
    plain, tiny, huge, striped, dotted, dark = light.tolist()
    assert tiny < striped < plain < huge
    assert max(dotted, dark) < plain


def test_the_same_generator_draws_the_same():
    assert torch.equal(drawn([["red"]], ["ring"]), drawn([["red"]], ["ring"]))
    assert not torch.equal(drawn([["red"]], ["ring"]), drawn([["red"]], ["ring"], seed=1))


def test_captions_name_attributes_then_the_object():
    attributes = torch.zeros(2, len(ATTRIBUTES), dtype=torch.bool)
    attributes[0, [0, 3]] = True
    assert captions(attributes, torch.tensor([0, 5])) == ["red striped disc", "bar"]


def test_training_pulls_images_to_their_captions():
    tiny = two_towers("tiny", 0, steps=60)
    names, objects = [["red"], ["green"], ["blue"]] * 8, ["disc"] * 24
    pixels = tiny.prepare(drawn(names, objects))
    rows = tiny.tokenizer([f"a photo of {n[0]} disc" for n in names[:3]], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = tiny.model(pixel_values=pixels, **rows).logits_per_image.argmax(1)
    assert (found == torch.arange(24) % 3).float().mean() > 0.9


def test_a_saved_model_is_loaded_by_its_folder(tmp_path):
    tiny = two_towers("tiny", 0, steps=2)
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = two_towers(str(tmp_path), 0)
    images = torch.rand(2, 3, 20, 20)
    assert loaded.prepare(images).shape == (2, 3, 16, 16)
    rows = {"input_ids": loaded.tokenizer(["red disc"], return_tensors="pt")["input_ids"]}
    torch.testing.assert_close(
        loaded.model.get_text_features(**rows).pooler_output,
        tiny.model.get_text_features(**rows).pooler_output,
    )


def test_a_model_that_is_nowhere_is_refused_by_name(as_a_user, tmp_path):
    with pytest.raises(ValueError, match="model must be tiny, or a CLIP model's folder or name"):
        two_towers(str(tmp_path), 0)
    with pytest.raises(ValueError, match="style must be one of"):
        drawn([["red"]], ["disc"], "crayon")
