"""Soft prompts of a frozen two-tower model, their norms, and which of them are too large."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.lab.two_towers import two_towers
from posterity.testing import check_loss
from posterity.transfer import (
    NemesisLoss,
    PromptLearner,
    low_norm_effect,
    low_norm_positions,
    normalization_schedule,
    prompt_norm,
)

NAMES = ["red disc", "green_bar", "tiny ring", "dark cross"]


class Plain(nn.Module):
    """A two-tower module of the stated protocol: causal sums, with dropout that must not act."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding = nn.Embedding(64, 6)
        self.textual, self.visual = nn.Linear(6, 5), nn.Linear(3, 5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)
        self.to(dtype)

    def encode_text(self, input_ids, inputs_embeds=None):
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = (x * torch.arange(1, x.shape[1] + 1).to(x)[:, None]).cumsum(1).div(10).tanh()
        return self.textual(self.dropout(x))[torch.arange(len(x)), input_ids.argmax(1)]

    def encode_image(self, images):
        return self.visual(images)


WORDS = {
    word: k
    for k, word in enumerate(
        ["X", ".", "red", "disc", "green", "bar", "tiny", "ring", "dark", "cross", "a", "picture", "Y"], 1
    )
}


def tokenize(texts):
    rows = []
    for text in texts:
        words = text.replace(".", " .").replace("_", " ").split()
        rows.append([61, *(WORDS.get(word, 50) for word in words), 63])
    return torch.tensor([row + [0] * (14 - len(row)) for row in rows])


def prompts(n_context=3, dtype=torch.float64, **options):
    return PromptLearner(Plain(dtype), tokenize, NAMES, n_context=n_context,
                         generator=torch.Generator().manual_seed(1), **options)  # fmt: skip


def batch(n=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 5, generator=generator, dtype=dtype), torch.arange(n) % 4


@pytest.fixture(scope="module")
def tiny():
    return two_towers("tiny", 0, steps=2)


# The prompts


def test_a_context_of_words_is_the_models_own_text(tiny):
    learner = PromptLearner(tiny.model, tiny.tokenizer, NAMES, init="a photo of a")
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    rows = tiny.tokenizer(texts, padding=True, return_tensors="pt")
    own = F.normalize(tiny.model.get_text_features(**rows).pooler_output, dim=1)
    torch.testing.assert_close(learner.encode(), own, rtol=1e-5, atol=1e-5)
    assert learner.context.shape == (4, 64)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_the_name_stands_where_it_should(position):
    learner = prompts(5, position=position)
    towers = learner._towers
    for k, name in enumerate(NAMES):
        own = [WORDS[word] for word in name.replace("_", " ").split()]
        words = towers.words
        context = learner.context.detach()
        before = {"end": 5, "middle": 2, "front": 0}[position]
        embeds = torch.cat(
            [words[[61]], context[:before], words[own], context[before:], words[[WORDS["."], 63]]]
        )
        ids = torch.zeros(1, len(embeds), dtype=torch.long)
        ids[0, -1] = 63
        own = F.normalize(towers.model.eval().encode_text(ids, embeds[None]), dim=1)
        torch.testing.assert_close(learner.encode()[k], own[0])


def test_each_class_may_have_its_own_context():
    shared, own = prompts(init="a picture"), prompts(init="a picture", class_specific=True)
    assert own.context.shape == (4, 2, 6)
    torch.testing.assert_close(own.encode(), shared.encode())
    changed = own.context.detach().clone()
    changed[2, 1] += 1
    moved = (own.encode(changed) - own.encode()).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, True, False]


def test_only_the_context_is_trained_and_the_model_is_as_it_was():
    learner = prompts()
    model = learner._towers.model.train()
    model.token_embedding.requires_grad_(False)
    features, y = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, weight_decay=0.1)
    NemesisLoss(beta=0.5)(learner, features, y).backward()
    optimizer.step()
    assert [name for name, _ in learner.named_parameters()] == ["context"] == list(learner.state_dict())
    assert (learner.context.grad.abs().sum(1) > 0).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [k != "token_embedding.weight"
                                                             for k, _ in model.named_parameters()]  # fmt: skip
    assert all(module.training for module in model.modules())


def test_images_and_their_features_give_the_same_logits():
    learner, images = prompts(), torch.randn(7, 3, dtype=torch.float64)
    features = learner._towers.model.encode_image(images)
    torch.testing.assert_close(learner(images), learner(image_features=features))
    expected = math.exp(2) * F.normalize(features, dim=1) @ learner.encode().T
    torch.testing.assert_close(learner(images), expected)


def test_a_seed_draws_the_context_and_std_is_its_deviation():
    assert torch.equal(prompts(8).context, prompts(8).context)
    assert float(prompts(8, class_specific=True).context.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not prompts(std=0.0).context.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_has_a_wide_context(dtype):
    learner = prompts(dtype=dtype)
    assert learner.context.dtype == torch.float32
    features, y = batch(dtype=dtype)
    loss = NemesisLoss(beta=0.5)(learner, features, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(learner.context.grad).all()


# Norms


@pytest.mark.parametrize(
    ("p", "norms"), [(1.0, [7.0, 0.0, 2.0]), (2.0, [5.0, 0.0, math.sqrt(2)]), (math.inf, [4.0, 0.0, 1.0])]
)
def test_norms_by_hand(p, norms):
    context = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 3.0, 0.0], dtype=torch.float64)
    assert prompt_norm(context, p=p).item() == pytest.approx(sum(norms) / 3)
    assert prompt_norm(context, weights, p=p).item() == pytest.approx(0.5 * norms[0] / 2)
    both = torch.stack([context, 2 * context])
    assert prompt_norm(both, weights, p=p).item() == pytest.approx(3 * 0.5 * norms[0] / 2)
    assert prompt_norm(context, 0 * weights, p=p).item() == 0
    assert prompt_norm(context, 4 * weights, p=p).item() == pytest.approx(4 * 0.5 * norms[0] / 2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_whose_squares_overflow_or_vanish_are_right(scale):
    context = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).mul(scale).requires_grad_()
    value = prompt_norm(context)
    assert value.item() == pytest.approx(2.5 * scale, rel=1e-6)
    value.backward()
    torch.testing.assert_close(context.grad, torch.tensor([[0.3, 0.4], [0.0, 0.0]]))


def test_the_gradient_of_the_norm_is_the_direction_and_nothing_at_zero():
    context = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    prompt_norm(context, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)).backward()
    torch.testing.assert_close(context.grad, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]], dtype=torch.float64))


class Norm(nn.Module):
    def forward(self, context):
        return prompt_norm(context)


def test_norms_conform_to_their_kind(as_a_user):
    check_loss(
        Norm(), torch.randn(5, 3, dtype=torch.float64).requires_grad_(), symmetric=True, compiles=False
    )


def test_the_schedule_is_a_falling_sigmoid():
    for epoch in range(0, 51, 5):
        by_hand = 1 - 1 / (1 + math.exp(-0.2 * (epoch - 25)))
        assert normalization_schedule(epoch, 50) == pytest.approx(by_hand, abs=1e-12)
    assert normalization_schedule(25, 50) == 0.5
    assert normalization_schedule(10**9, 10) == 0


# Which positions count


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_low_norm_positions_are_those_of_a_loop(class_specific, scale):
    learner = prompts(6, std=1.0, class_specific=class_specific)
    features, y = batch(200)
    right = (learner(image_features=features).argmax(1) == y).sum()
    expected = []
    for i in range(6):
        context = learner.context.detach().clone()
        context[..., i, :] *= scale
        expected.append(
            bool((learner(image_features=features, context=context).argmax(1) == y).sum() > right)
        )
    found = low_norm_positions(learner, features, y, scale=scale)
    assert found.tolist() == expected
    some = low_norm_positions(
        learner, features, y, scale=scale, n_positions=2, generator=torch.Generator().manual_seed(3)
    )
    assert int(some.sum()) <= 2
    assert (found | ~some).all()


def test_some_positions_count_and_a_scale_of_one_finds_none():
    learner = prompts(6, std=1.0)
    features, y = batch(200)
    assert low_norm_positions(learner, features, y, scale=0.0).any()
    assert not low_norm_positions(learner, features, y, scale=1.0).any()


def test_contexts_in_one_pass_are_those_one_at_a_time():
    learner, (features, _) = prompts(4), batch()
    contexts = torch.randn(5, 4, 6, dtype=torch.float64)
    one = torch.stack([learner(image_features=features, context=context) for context in contexts])
    torch.testing.assert_close(learner._tried(contexts, features), one, rtol=1e-6, atol=1e-9)


# The loss


def test_beta_mixes_the_two_penalties_and_alpha_zero_is_cross_entropy():
    learner, (features, y) = prompts(6, std=1.0), batch(200)
    plain = F.cross_entropy(learner(image_features=features), y)
    options = {"alpha": 0.3, "corruption": 0.0, "n_positions": None, "schedule": False}

    def loss(beta, **more):
        return NemesisLoss(**{**options, "beta": beta, **more})(learner, features, y, epoch=5, max_epoch=10)

    torch.testing.assert_close(loss(0.5, alpha=0.0), plain)
    uniform = 0.3 * prompt_norm(learner.context)
    counts = low_norm_positions(learner, features, y, scale=0.0).double()
    aware = prompt_norm(learner.context, 0.3 * counts)
    assert aware > 0
    torch.testing.assert_close(loss(1.0), plain + uniform)
    torch.testing.assert_close(loss(0.0), plain + aware)
    torch.testing.assert_close(loss(0.25), plain + 0.25 * uniform + 0.75 * aware)
    torch.testing.assert_close(loss(1.0, schedule=True), plain + 0.5 * uniform)


def test_uniform_penalty_needs_no_other_pass_of_the_text_tower():
    learner, (features, y) = prompts(), batch()
    passes, encode = [], learner._towers.model.encode_text
    learner._towers.model.encode_text = lambda *args, **kw: (
        passes.append(len(args[0])),
        encode(*args, **kw),
    )[1]
    NemesisLoss(beta=1.0)(learner, features, y)
    assert passes == [4]
    NemesisLoss(beta=0.5, n_positions=2)(learner, features, y)
    assert passes == [4, 4, 8]  # the corrupted ones alone


# The effect


def test_the_effect_is_what_a_loop_measures():
    learner, (features, y) = prompts(3, std=1.0), batch(100)
    scales, sigmas = (0.1, 1.0, 5.0), (0.0, 0.5)
    found = low_norm_effect(
        learner, features, y, scales=scales, sigmas=sigmas, generator=torch.Generator().manual_seed(0)
    )

    def accuracy(context):
        return float((learner(image_features=features, context=context).argmax(1) == y).double().mean())

    context = learner.context.detach()
    assert found.accuracy == pytest.approx(accuracy(context))
    for i in range(3):
        for k, scale in enumerate(scales):
            changed = context.clone()
            changed[i] *= scale
            assert float(found.scaled[i, k]) == pytest.approx(accuracy(changed))
        changed = context.clone()
        changed[i] = 0
        assert float(found.replaced[i, 0]) == pytest.approx(accuracy(changed))
    assert found.frequency == pytest.approx(float((found.scaled[:, 0] > found.accuracy).double().mean()))
    assert (found.scaled[:, 1] == found.accuracy).all()
    assert math.isnan(low_norm_effect(learner, features, y, scales=(2.0,)).frequency)
    own = prompts(3, class_specific=True)
    assert low_norm_effect(own, features, y).replaced.shape == (3, 5)


# What is refused

FEATURES, Y = batch()
BAD = [
    (lambda: PromptLearner(nn.Linear(2, 2), tokenize, NAMES), "model must be a CLIPModel or have"),
    (lambda: PromptLearner(Plain(), None, NAMES), "tokenizer must be callable"),
    (lambda: PromptLearner(Plain(), tokenize, []), "class_names must hold at least one name"),
    (lambda: PromptLearner(Plain(), tokenize, ["a", "a"]), "class_names must be different, got 'a' twice"),
    (lambda: PromptLearner(Plain(), tokenize, NAMES, n_context=0), "n_context must be an integer of at least 1"),
    (lambda: prompts(position="top"), "position must be one of"),
    (lambda: prompts(placeholder="X Y"), "placeholder must be a word of one token, 'X Y' has 2"),
    (lambda: prompts(init=" "), "init must be words"),
    (lambda: prompts(std=-1.0), "std must be at least 0"),
    (lambda: prompts()(), "one of images and image_features must be given"),
    (lambda: prompts()(FEATURES, image_features=FEATURES), "one of images and image_features must be given"),
    (lambda: prompts()(image_features=FEATURES[:, :4]), r"image_features must have shape \(any, 5\)"),
    (lambda: prompts()(image_features=FEATURES.long()), "image_features must be a floating-point tensor"),
    (lambda: prompts().encode(torch.zeros(2, 6)), r"context must have shape \(3, 6\)"),
    (lambda: prompt_norm(torch.zeros(3)), "context must have shape"),
    (lambda: prompt_norm(torch.zeros(3, 0)), "context must hold vectors"),
    (lambda: prompt_norm(torch.zeros(3, 2), torch.ones(2)), r"weights must have shape \(3\)"),
    (lambda: prompt_norm(torch.zeros(3, 2), p=3.0), "p must be 1, 2 or inf, got 3.0"),
    (lambda: NemesisLoss(alpha=-1.0), "alpha must be at least 0"),
    (lambda: NemesisLoss(beta=1.5), r"beta must be in \[0, 1\]"),
    (lambda: NemesisLoss(p=0.0), "p must be 1, 2 or inf"),
    (lambda: NemesisLoss(corruption=-0.1), "corruption must be at least 0"),
    (lambda: NemesisLoss(n_positions=0), "n_positions must be an integer of at least 1"),
    (lambda: NemesisLoss(n_positions=4)(prompts(), FEATURES, Y), "n_positions must be at most the 3 positions"),
    (lambda: NemesisLoss()(prompts(), FEATURES, Y, epoch=-1), "epoch must be an integer of at least 0"),
    (lambda: NemesisLoss()(prompts(), FEATURES, Y, max_epoch=0), "max_epoch must be an integer of at least 1"),
    (lambda: NemesisLoss()(prompts(), FEATURES, Y + 1), r"y must be in 0\.\.3"),
    (lambda: NemesisLoss()(prompts(), FEATURES, Y[:3]), r"y must have shape \(12\)"),
    (lambda: NemesisLoss()(prompts(), FEATURES[:0], Y[:0]), "y must hold at least one class"),
    (lambda: NemesisLoss()(None, FEATURES, Y), "prompts must be a PromptLearner"),
    (lambda: low_norm_positions(prompts(), FEATURES, Y, scale=-1.0), "scale must be at least 0"),
    (lambda: low_norm_effect(prompts(), FEATURES, Y, scales=(-1.0,)), "scales must be at least 0"),
    (lambda: low_norm_effect(prompts(), FEATURES, Y, sigmas=0.5), "sigmas must be a sequence of numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_a_text_that_is_too_long_for_the_model_by_name(as_a_user, tiny):
    with pytest.raises(ValueError, match=r"red disc.* has 25 tokens, the model has 24 positions"):
        PromptLearner(tiny.model, tiny.tokenizer, NAMES, n_context=20)
