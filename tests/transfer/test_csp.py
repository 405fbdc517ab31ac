"""CSP: prompts put together are the model's own at first, only the table is learned, words act where they are."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.lab.two_towers import two_towers
from posterity.testing import check_layer
from posterity.transfer import CompositionalPrompts, feasibility, feasible_logits

WORDS = ["", "a", "photo", "of", "X", "wet", "old", "red", "dog", "cat", "car", "big", "hot"]
ATTRIBUTES, OBJECTS = ["wet", "old", "red"], ["dog", "cat"]
PAIRS = torch.tensor([[0, 0], [2, 1], [1, 0], [0, 1]])


class Plain(nn.Module):
    """A two-tower module of the stated protocol: a nonlinear causal sum, in which order matters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding = nn.Embedding(20, 6)
        self.visual, self.textual = nn.Linear(4, 5), nn.Linear(6, 5)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(0.5)

    def encode_text(self, input_ids, inputs_embeds=None):
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        n = torch.arange(1, x.shape[1] + 1)[:, None].to(x)
        x = (x * n.sqrt()).tanh().cumsum(1) / n
        return self.textual(self.dropout(x))[torch.arange(len(x)), input_ids.argmax(1)]

    def encode_image(self, images):
        return self.visual(images)


def tokenize(texts):
    rows = [[18, *(WORDS.index(word) for word in text.split()), 19] for text in texts]
    return torch.tensor([row + [0] * (9 - len(row)) for row in rows])


def prompts(**options):
    return CompositionalPrompts(Plain(), tokenize, ATTRIBUTES, OBJECTS, **options)


@pytest.fixture(scope="module")
def tiny():
    return two_towers("tiny", 100, steps=2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_at_first_features_are_the_models_own_of_the_prompt_in_words():
    made = prompts()
    texts = [
        f"a photo of {a} {o}" for a, o in [("wet", "dog"), ("red", "cat"), ("old", "dog"), ("wet", "cat")]
    ]
    own = F.normalize(made.towers.model.eval().encode_text(tokenize(texts)), dim=1)
    torch.testing.assert_close(made.encode(PAIRS), own)
    triple = F.normalize(made.towers.model.encode_text(tokenize(["a photo of old red cat"])), dim=1)
    torch.testing.assert_close(made.encode(torch.tensor([[1, 2, 1]])), triple)


def test_at_first_features_are_clips_own_and_so_are_logits(tiny):
    made = CompositionalPrompts(
        tiny.model, tiny.tokenizer, ["red", "Striped", "tiny"], ["disc", "bar"], placeholder="x"
    )
    images = tiny.prepare(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    for pairs, texts in (
        ([[0, 0], [1, 1]], ["a photo of red disc", "a photo of striped bar"]),
        ([[0, 1, 1], [2, 0, 0]], ["a photo of red striped bar", "a photo of tiny red disc"]),
    ):
        rows = tiny.tokenizer(texts, padding=True, return_tensors="pt")
        own = tiny.model(pixel_values=images, **rows)
        features = F.normalize(own.text_embeds, dim=1)
        torch.testing.assert_close(made.encode(torch.tensor(pairs)), features, rtol=1e-5, atol=1e-5)
        got = made(images, torch.tensor(pairs))
        torch.testing.assert_close(got, own.logits_per_image, rtol=1e-4, atol=1e-4)


def test_a_word_of_several_tokens_starts_as_their_mean():
    made = CompositionalPrompts(Plain(), lambda texts: tokenize([t.replace("X", "big") for t in texts]),
                                ["Hot.Red", "wet"], ["old car"])  # fmt: skip
    words = made.towers.words
    torch.testing.assert_close(made.vocabulary[0], (words[12] + words[7]) / 2)
    torch.testing.assert_close(made.vocabulary[1], words[5])
    torch.testing.assert_close(made.vocabulary[2], (words[6] + words[10]) / 2)


@pytest.mark.parametrize("kin", [True, False])
def test_only_the_table_is_learned_and_the_model_is_left_as_it_was(tiny, kin):
    if kin:
        made = CompositionalPrompts(
            tiny.model, tiny.tokenizer, ["red", "dark"], ["disc", "bar"], placeholder="x"
        )
        images = torch.rand(3, 3, 16, 16)
    else:
        made, images = prompts(), draw(3, 4)
    model = made.towers.model.train()
    before = copy.deepcopy(model.state_dict())
    frozen = next(model.parameters()).requires_grad_(False)
    assert [name for name, _ in made.named_parameters()] == ["vocabulary"]
    assert list(made.state_dict()) == ["vocabulary"]
    assert list(made.children()) == [made.dropout]
    made(images, torch.tensor([[0, 0], [1, 0]])).logsumexp(1).sum().backward()
    used = made.vocabulary.grad.abs().sum(1) > 0
    assert used.tolist() == ([True, True, True, False] if kin else [True, True, False, True, False])
    assert all(p.grad is None for p in model.parameters())
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    frozen.requires_grad_(True)
    model.eval()


def test_a_row_changes_the_compositions_that_have_it_and_no_other():
    made = prompts()
    every = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    before, first = made.encode(every), made.vocabulary.detach().clone()
    for row, has in ((1, every[:, 0] == 1), (3 + 1, every[:, 1] == 1)):
        with torch.no_grad():
            made.vocabulary.copy_(first)
            made.vocabulary[row] += 1
        assert torch.equal((made.encode(every) != before).any(1), has)


def test_images_and_their_features_batches_and_all_at_once_agree():
    made = prompts()
    model, images = made.towers.model.eval(), draw(7, 4)
    features = model.encode_image(images).detach()
    torch.testing.assert_close(made(images, PAIRS), made(pairs=PAIRS, image_features=features))
    torch.testing.assert_close(made.encode(PAIRS, batch_size=3), made.encode(PAIRS))
    expected = math.e * F.cosine_similarity(features[:, None], made.encode(PAIRS), dim=2)
    torch.testing.assert_close(made(pairs=PAIRS, image_features=features), expected)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    assert torch.equal(made(image_features=features), made(pairs=every, image_features=features))
    wide = made(pairs=PAIRS.int(), image_features=features.double())
    torch.testing.assert_close(wide, expected.float())
    assert made(pairs=PAIRS, image_features=features[:0]).shape == (0, 4)
    strided = features.repeat_interleave(2, 0)[::2]
    torch.testing.assert_close(made(pairs=PAIRS.T.contiguous().T, image_features=strided), expected)


def test_dropout_is_drawn_once_a_call_in_training_alone():
    made = prompts(dropout=0.5)
    same = torch.tensor([[0, 0]]).repeat(8, 1)
    rows = made.train().encode(same, batch_size=3)
    assert torch.equal(rows, rows[:1].expand_as(rows))
    assert not torch.equal(made.encode(same), rows)
    torch.testing.assert_close(made.eval().encode(PAIRS), prompts().encode(PAIRS))


def test_rows_that_are_not_tuned_stay_whatever_the_optimiser_does():
    trainable = torch.tensor([True, False, True, False, True])
    made = prompts(trainable=trainable)
    first = made.vocabulary.detach().clone()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(3):
        loss = F.cross_entropy(made(draw(8, 4), PAIRS), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        assert (made.vocabulary.grad[~trainable] == 0).all()
        assert (made.vocabulary.grad[trainable] != 0).any(1).all()
        optimizer.step()
    table = made.state_dict()["vocabulary"]
    assert torch.equal(table[~trainable], first[~trainable])
    assert (table[trainable] != first[trainable]).any(1).all()
    free = prompts()
    free.load_state_dict(made.state_dict())
    torch.testing.assert_close(free.encode(PAIRS), made.encode(PAIRS))
    other = prompts(trainable=~trainable)  # tuned on from there, the other half
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other.encode(PAIRS), made.encode(PAIRS))


def test_words_tuned_on_some_pairs_serve_pairs_that_were_not_seen():
    """Images are the model's own features of prompts with other words: tuning finds those words from half the pairs."""
    truth = prompts()
    with torch.no_grad():
        truth.vocabulary += draw(5, 6, seed=3)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    features = truth.encode(every).detach()
    seen = torch.tensor([0, 1, 2, 4])  # each word occurs
    made = prompts()
    start = (made.encode(every) * features).sum(1)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(120):
        loss = F.cross_entropy(20 * made(pairs=every[seen], image_features=features[seen]), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    answers = made(pairs=every, image_features=features).argmax(1)
    assert (answers[seen] == seen).all()
    assert (start < 0.99).any()


def test_the_tower_in_half_precision_has_a_table_in_float32():
    made = CompositionalPrompts(Plain().bfloat16(), tokenize, ATTRIBUTES, OBJECTS)
    assert made.vocabulary.dtype == torch.float32
    out = made(pairs=PAIRS, image_features=draw(3, 5).bfloat16())
    assert out.dtype == torch.float32
    full = prompts()(pairs=PAIRS, image_features=draw(3, 5))
    torch.testing.assert_close(out, full, rtol=0.05, atol=0.05)


def test_conforms_to_its_kind(as_a_user):
    check_layer(_Call(prompts()), draw(6, 5), shape=(6, 4))
    check_layer(
        _Call(prompts(trainable=torch.tensor([True, True, True, False, True]))), draw(6, 5), shape=(6, 4)
    )


class _Call(nn.Module):
    """Prompts called with image features alone, as a layer is."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, image_features):
        return self.made(pairs=PAIRS, image_features=image_features)


def test_feasibility_is_the_double_loop_over_words():
    attributes, objects = draw(4, 3).double(), draw(5, 6, seed=1).double()
    seen = {(0, 0), (0, 1), (1, 1), (2, 3), (1, 3)}

    def cos(x, i, j):
        return float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))

    found = feasibility(torch.tensor(sorted(seen)), attributes, objects)
    for a, o in itertools.product(range(4), range(5)):
        by_object = max([cos(objects, o, p) for p in range(5) if p != o and (a, p) in seen], default=-1.0)
        by_attribute = max(
            [cos(attributes, a, b) for b in range(4) if b != a and (b, o) in seen], default=-1.0
        )
        expected = 1.0 if (a, o) in seen else (by_object + by_attribute) / 2
        assert abs(float(found[a, o]) - expected) < 1e-12, (a, o)
    assert found[3, 4] == -1
    for size in (1e-30, 1e30):  # whose squares are not numbers of float32
        other = feasibility(torch.tensor(sorted(seen)), size * attributes.float(), size * objects.float())
        torch.testing.assert_close(other, found.float())
    none = feasibility(torch.zeros(0, 2, dtype=torch.long), attributes, objects)
    assert (none == -1).all()
    low = feasibility(torch.tensor(sorted(seen)), attributes.bfloat16(), objects.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), found, rtol=0.03, atol=0.03)


def test_the_threshold_rules_out_unseen_pairs_below_it_and_no_other():
    score = torch.tensor([[1.0, -0.5, 0.2], [0.1, 1.0, 0.3]])
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    seen = torch.tensor([True, True, False, False, True, False])
    logits = (-draw(4, 6).abs()).requires_grad_()
    got = feasible_logits(logits, pairs, seen, score, threshold=0.2)
    keep = torch.tensor([True, True, True, False, True, True])  # at the threshold it stays
    assert torch.equal(got.isfinite(), keep.expand(4, -1))
    assert torch.equal(got[:, keep], logits[:, keep])
    got[:, keep].sum().backward()
    assert torch.equal(logits.grad[0], keep.float())
    assert torch.equal(feasible_logits(logits, pairs, seen, score, threshold=-2.0), logits)


GOOD = {"model": Plain(), "tokenizer": tokenize, "attributes": ATTRIBUTES, "objects": OBJECTS}
MADE = prompts()
X5 = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": []}, "attributes must hold at least one name"),
        ({"attributes": ["wet", "wet"]}, "attributes must be different, got 'wet' twice"),
        ({"objects": ["dog", "cat", "dog"]}, "objects must be different, got 'dog' twice"),
        ({"objects": ["dog", " "]}, "objects must hold at least one name and no empty one"),
        ({"objects": ["dog", "."]}, "must have a token each, '.' has none"),
        ({"objects": "dog"}, "objects must be a sequence of texts"),
        ({"placeholder": "wet dog"}, "placeholder must be a word of one token, 'wet dog' has 2"),
        ({"placeholder": ""}, "placeholder must be a word of one token, '' has 0"),
        ({"placeholder": None}, "placeholder must be a word of one token, got None"),
        ({"template": "a photo of {}"}, 'template must end with its two slots, "{} {}"'),
        ({"template": "{} {} photo"}, "template must end with its two slots"),
        ({"template": "a {} photo of {} {}"}, "template must end with its two slots"),
        ({"template": None}, "template must end with its two slots"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"trainable": torch.ones(5)}, "trainable must be a bool tensor, got torch.float32"),
        ({"trainable": [True] * 5}, "trainable must be a bool tensor, got list"),
        ({"trainable": torch.ones(4, dtype=torch.bool)}, r"trainable must have shape \(5\) for attributes and objects"),
        ({"model": nn.Linear(2, 2)}, r"Linear lacks \['token_embedding'"),
        ({"model": None}, "model must be an nn.Module"),
        ({"tokenizer": None}, "tokenizer must be callable"),
    ],
)  # fmt: skip
def test_refuses_what_no_prompt_can_be_made_of(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        CompositionalPrompts(**{**GOOD, **options})


def test_refuses_a_template_whose_slots_are_not_the_last_tokens_or_that_is_too_long(as_a_user, tiny):
    with pytest.raises(
        ValueError, match=r"template must end with its slots, a token each: 'a photo X X' has"
    ):
        CompositionalPrompts(Plain(), lambda texts: tokenize([f"{t} of" for t in texts]), ["wet"], ["dog"],
                             template="a photo {} {}", placeholder="X")  # fmt: skip
    with pytest.raises(ValueError, match="tokens, the model has 24 positions"):
        CompositionalPrompts(tiny.model, tiny.tokenizer, ["red"], ["disc"], placeholder="x",
                             template="a " * 25 + "{} {}")  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MADE.encode(PAIRS.float()), "pairs must hold integers, got torch.float32"),
        (lambda: MADE.encode([[0, 0]]), "pairs must hold integers, got list"),
        (lambda: MADE.encode(PAIRS[:, :1]), r"pairs must have shape \(m, 2\) or \(m, k\), k > 2, m > 0, got \(4, 1\)"),
        (lambda: MADE.encode(PAIRS[:0]), r"got \(0, 2\)"),
        (lambda: MADE.encode(PAIRS[0]), r"got \(2,\)"),
        (lambda: MADE.encode(torch.tensor([[3, 0]])), r"an attribute, must be in 0\.\.2, got values from 3 to 3"),
        (lambda: MADE.encode(torch.tensor([[0, 3, 0]])), r"an attribute, must be in 0\.\.2, got values from 0 to 3"),
        (lambda: MADE.encode(torch.tensor([[0, 2]])), r"the object, last, must be in 0\.\.1"),
        (lambda: MADE.encode(torch.tensor([[0, -1]])), r"the object, last, must be in 0\.\.1, got values from -1"),
        (lambda: MADE.encode(PAIRS, batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: MADE(pairs=PAIRS), "one of images and image_features must be given, got none"),
        (lambda: MADE(X5, PAIRS, image_features=X5), "one of images and image_features must be given, got both"),
        (lambda: MADE([[1.0]], PAIRS), "images must be a tensor as the model takes it, got list"),
        (lambda: MADE(pairs=PAIRS, image_features=X5.long()), "image_features must be a floating-point tensor"),
        (lambda: MADE(pairs=PAIRS, image_features=X5[:, :4]), r"image_features must have shape \(any, 5\) for text features"),
        (lambda: feasibility(PAIRS.float(), draw(3, 2), draw(2, 2)), "seen_pairs must hold integers"),
        (lambda: feasibility(PAIRS, draw(2, 2), draw(2, 2)), r"seen_pairs: an attribute must be in 0\.\.1, got values from 0 to 2"),
        (lambda: feasibility(PAIRS, draw(3, 2), draw(1, 2)), r"seen_pairs: an object must be in 0\.\.0"),
        (lambda: feasibility(PAIRS, draw(3, 2) * math.nan, draw(2, 2)), "attribute_embeddings must be finite"),
        (lambda: feasibility(PAIRS, draw(3, 2), draw(2)), r"object_embeddings must have shape \(any, any\)"),
        (lambda: feasibility(PAIRS, None, draw(2, 2)), "attribute_embeddings must be a floating-point tensor"),
        (lambda: rule_out(logits=torch.zeros(2, 4).long()), "logits must be a floating-point tensor"),
        (lambda: rule_out(pairs=PAIRS[:3]), r"pairs must have shape \(4, 2\) for logits"),
        (lambda: rule_out(seen=torch.zeros(4)), "seen must be a bool tensor, got torch.float32"),
        (lambda: rule_out(seen=torch.ones(3, dtype=torch.bool)), r"seen must have shape \(4\)"),
        (lambda: rule_out(feasibility=torch.zeros(2, 2)), r"pairs: an attribute must be in 0\.\.1"),
        (lambda: rule_out(threshold=math.nan), "threshold must be in"),
        (lambda: rule_out(threshold=5.0), "threshold must leave a candidate, 5.0 is above all"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def rule_out(**options):
    good = {"logits": torch.zeros(2, 4), "pairs": PAIRS, "seen": torch.zeros(4, dtype=torch.bool),
            "feasibility": torch.zeros(3, 2), "threshold": 0.0}  # fmt: skip
    return feasible_logits(**{**good, **options})
