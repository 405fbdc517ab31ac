"""Two-tower models as prompts take them: CLIP's own features, constants in the model, nothing left behind."""

import pytest
import torch
from torch import nn

from posterity.lab.two_towers import two_towers
from posterity.transfer._towers import Towers, different_names


class Plain(nn.Module):
    """A two-tower module of the stated protocol: a causal mean, pooled at the largest id."""

    def __init__(self, both_ways=False):
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding = nn.Embedding(20, 6)
        self.visual = nn.Linear(4, 5)
        self.textual = nn.Linear(6, 5)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(0.5)
        self.both_ways = both_ways

    def encode_text(self, input_ids, inputs_embeds=None):
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        n = torch.arange(1, x.shape[1] + 1)[:, None]
        x = x.mean(1, keepdim=True).expand_as(x) if self.both_ways else x.cumsum(1) / n
        return self.textual(self.dropout(x))[torch.arange(len(x)), input_ids.argmax(1)]

    def encode_image(self, images):
        return self.visual(images)


def tokenize(texts):
    rows = [[18, *(1 + len(word) for word in text.split()), 19] for text in texts]
    return torch.tensor([row + [0] * (9 - len(row)) for row in rows])


@pytest.fixture(scope="module")
def tiny():
    return two_towers("tiny", 0, steps=2)


def test_features_of_clip_are_its_own(tiny):
    towers = Towers(tiny.model, tiny.tokenizer)
    texts = ["a photo of red disc", "bar"]
    found = towers.tokens(texts)
    rows = tiny.tokenizer(texts, padding=True, return_tensors="pt")
    own = nn.functional.normalize(tiny.model.get_text_features(**rows).pooler_output, dim=1)
    torch.testing.assert_close(towers.text(found, towers.words[found.ids]), own, rtol=1e-5, atol=1e-5)
    assert towers.n_before == 1
    assert towers.may_cut
    assert found.ids.shape == (2, 7)
    assert towers.tokenizer.decode(towers.word_ids("red disc")) == "red disc"


def test_logits_of_clip_are_its_own(tiny):
    towers = Towers(tiny.model, tiny.tokenizer)
    pixels = tiny.prepare(torch.rand(3, 3, 16, 16))
    found = towers.tokens(["red bar", "dark ring"])
    text = towers.text(found, towers.words[found.ids])
    rows = tiny.tokenizer(["red bar", "dark ring"], padding=True, return_tensors="pt")
    own = tiny.model(pixel_values=pixels, **rows).logits_per_image
    torch.testing.assert_close(towers.logits(text, pixels, None), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(towers.logits(text, None, 3 * towers.image(pixels)), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_of_any_length_count_by_their_direction(scale):
    towers = Towers(Plain(), tokenize)
    text, features = torch.eye(5), torch.randn(3, 5)
    found = towers.logits(text, None, scale * features)
    torch.testing.assert_close(found, towers.logits(text, None, features))


@pytest.mark.parametrize("both_ways", [False, True])
def test_padding_is_cut_only_where_it_changes_nothing(both_ways):
    towers = Towers(Plain(both_ways), tokenize)
    assert towers.may_cut is not both_ways
    assert towers.tokens(["one two"]).ids.shape[1] == (9 if both_ways else 4)


@pytest.mark.parametrize("kin", [True, False])
def test_a_model_keeps_flags_modes_and_hooks_and_gets_no_gradient(tiny, kin):
    model, tokenizer = (tiny.model, tiny.tokenizer) if kin else (Plain(), tokenize)
    model.train()
    first = next(model.parameters()).requires_grad_(False)
    towers = Towers(model, tokenizer)
    found = towers.tokens(["red disc"])
    embeds = towers.words[found.ids].clone().requires_grad_()
    towers.text(found, embeds)[:, 0].sum().backward()
    with pytest.raises((AttributeError, TypeError)):
        towers.image("no image")
    assert embeds.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    assert not first.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert all(module.training for module in model.modules())
    assert not towers.embedding._forward_hooks
    first.requires_grad_(True)
    model.eval()


def test_half_precision_towers_give_wide_features():
    towers = Towers(Plain().bfloat16(), tokenize)
    found = towers.tokens(["one two"])
    text = towers.text(found, towers.words[found.ids])
    assert text.dtype == torch.float32
    assert towers.logits(text, None, torch.ones(2, 5, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (None, tokenize, "model must be an nn.Module, got NoneType"),
        (nn.Linear(2, 2), tokenize, r"Linear lacks \['token_embedding', 'encode_text'"),
        (Plain(), None, "tokenizer must be callable"),
        (Plain(), lambda texts: [[1, 2]], r"tokenizer must return integers of shape \(1, L\), got list"),
        (Plain(), lambda texts: torch.ones(1, 3), r"got torch.float32 \(1, 3\)"),
    ],
)
def test_refuses_models_and_tokenizers_by_name(as_a_user, model, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        Towers(model, tokenizer)


class Endless:
    eos_token_id = 7

    def __call__(self, texts, **how):
        return {"input_ids": [[1, 2]] * len(texts)}


def test_refuses_a_text_that_is_too_long_or_does_not_end(as_a_user, tiny):
    with pytest.raises(ValueError, match="has 32 tokens, the model has 24 positions"):
        Towers(tiny.model, tiny.tokenizer).tokens(["red", " ".join(["a"] * 30)])
    with pytest.raises(ValueError, match="must end each text with eos_token_id, 7"):
        Towers(Plain(), Endless())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one name"), (["a", " "], "no empty one"), (["a", "b", "a"], "got 'a' twice"),
        ("cat", "must be a sequence of texts"), ([1], "must be a sequence of texts"), (None, "must be a sequence"),
    ],
)  # fmt: skip
def test_names_are_texts_and_different(as_a_user, names, message):
    with pytest.raises(ValueError, match=message):
        different_names("objects", names)
