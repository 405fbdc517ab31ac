"""Textual inversion: an overlay that changes one row, models that stay as they are, words that are found again."""

import copy
import math

import pytest
import torch
from torch import nn

from posterity._checks import needs
from posterity.generative import (
    PROMPTS,
    Concept,
    ConceptEmbedding,
    TextualInversion,
    TinyTextToImage,
    shapes,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny():
    return TinyTextToImage.pretrained()


@pytest.fixture
def pair(tiny):
    return TextualInversion.from_pipeline(tiny, initializer="ring")


@pytest.fixture(scope="module")
def images():
    return shapes(5, colors=["orange"], kinds=["ring"], generator=seeded())[0]


@pytest.fixture
def base():
    return nn.Embedding.from_pretrained(torch.randn(7, 4, generator=seeded()), freeze=False)


def state(*modules):
    return [p.detach().clone() for module in modules for p in [*module.parameters(), *module.buffers()]]


# --- the overlay


@pytest.mark.parametrize("ids", [[3], [7], [2, 9]])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_all_other_rows_are_the_bases_bit_for_bit(base, ids, shape):
    words = ConceptEmbedding(base, ids, torch.randn(len(ids), 4, generator=seeded(1)))
    tokens = torch.randint(10, shape, generator=seeded(2))
    tokens = torch.where((tokens < 7) | torch.isin(tokens, torch.tensor(ids)), tokens, ids[0])
    by_hand = torch.stack(
        [words.vectors[ids.index(k)] if k in ids else base.weight[k] for k in tokens.flatten().tolist()]
    )
    assert torch.equal(words(tokens), by_hand.view(*shape, 4))


def test_gradients_of_several_occurrences_add_up_and_none_reaches_the_base(base):
    words = ConceptEmbedding(base, [7], torch.zeros(1, 4))
    words(torch.tensor([[7, 1, 7], [0, 7, 2]])).sum().backward()
    assert words.vectors.grad.tolist() == [[3.0] * 4]
    assert base.weight.grad is None
    assert [name for name, _ in words.named_parameters()] == ["vectors"]


def test_overlay_compiles_without_a_break(as_a_user, base):
    words = ConceptEmbedding(base, [7], torch.ones(1, 4))
    tokens = torch.tensor([[7, 1], [6, 7]])
    run = torch.compile(lambda tokens: words(tokens), fullgraph=True, backend="eager")
    assert torch.equal(run(tokens), words(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_overlay_has_the_dtype_of_its_base_and_trains_in_float32_at_least(base, dtype):
    words = ConceptEmbedding(base.to(dtype), [7], base.weight[:1])
    assert words.vectors.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(words(torch.tensor([7])), base.weight[:1])


def test_anchor_distance_is_the_mean_squared_length_of_the_way(base):
    words = ConceptEmbedding(base, [7, 8], torch.zeros(2, 4))
    with torch.no_grad():
        words.vectors += torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
    assert float(words.anchor_distance().detach()) == (4 + 9) / 2


# --- the learner


def test_a_word_that_starts_as_another_is_told_and_lost_exactly_as_that_one(pair, images):
    learner, denoise = pair
    ours, theirs = (
        learner.encode([f"a photo of a {word} on the left"] * 5) for word in ("<concept>", "ring")
    )
    assert torch.equal(ours, theirs)
    t = torch.tensor([1, 100, 400, 700, 999])
    noise = torch.randn(images.shape, generator=seeded(1))
    assert torch.equal(denoise(images, ours, t=t, noise=noise), denoise(images, theirs, t=t, noise=noise))


def test_nothing_but_the_vectors_changes(tiny, images):
    model = copy.deepcopy(tiny)
    model.unet.requires_grad_(True).train()
    model.text_encoder.train()
    learner, denoise = TextualInversion.from_pipeline(model, initializer="ring")
    before, n, start = state(model.unet, model.text_encoder), len(model.tokenizer), learner.embedding.initial
    rng = torch.random.get_rng_state()
    concept = learner.fit(denoise, images, n_steps=2, batch_size=2, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model.unet, model.text_encoder), strict=True))
    assert len(model.tokenizer) == n and not torch.equal(concept.vectors, start)
    assert all(p.requires_grad and p.grad is None for p in model.unet.parameters())
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    assert all(module.training for net in (model.unet, model.text_encoder) for module in net.modules())


def test_an_interrupted_run_leaves_the_models_as_they_were(tiny, pair, images):
    learner, denoise = pair
    layer = tiny.text_encoder.get_input_embeddings()

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.fit(denoise, images, n_steps=2, batch_size=1, callback=stop)
    assert tiny.text_encoder.get_input_embeddings() is layer


@pytest.mark.parametrize("n_vectors", [1, 3])
def test_attached_words_are_found_by_pipelines_and_detached_ones_leave_no_trace(tiny, n_vectors):
    learner, _ = TextualInversion.from_pipeline(tiny, initializer="ring", n_vectors=n_vectors)
    concept = Concept("<mine>", torch.randn(n_vectors, 64, generator=seeded()))
    texts = ["a photo of a <mine> on the left", "a red ring"]
    tokens, n, layer = (
        tiny.tokenizer(texts)["input_ids"],
        len(tiny.tokenizer),
        tiny.text_encoder.get_input_embeddings(),
    )
    told = learner.encode(texts)
    learner.attach(concept)
    pieces = " ".join(["<mine>", *(f"<mine>_{k}" for k in range(1, n_vectors))])
    ids = tiny.tokenizer(
        f"a photo of a {pieces} on the left", padding="max_length", return_tensors="pt"
    ).input_ids
    hidden = tiny.text_encoder.get_input_embeddings()(ids)
    assert torch.equal(
        hidden[0, 5 : 5 + n_vectors], concept.vectors
    )  # after the beginning and "a photo of a"
    torch.testing.assert_close(learner.encode(texts[:1]), tiny.text_encoder(ids)[0])
    assert not torch.equal(learner.encode(texts)[0], told[0])
    learner.attach(Concept("<yours>", torch.zeros(1, 64)))
    learner.encode(["a <mine> and a <yours>"])
    learner.detach()
    assert tiny.tokenizer(texts)["input_ids"] == tokens and len(tiny.tokenizer) == n
    assert tiny.text_encoder.get_input_embeddings() is layer and torch.equal(learner.encode(texts), told)


def test_same_generator_gives_the_same_vectors(tiny, images):
    def learned(seed):
        learner, denoise = TextualInversion.from_pipeline(tiny, initializer=None, generator=seeded(seed))
        return learner.fit(denoise, images, n_steps=2, batch_size=2, generator=seeded(seed)).vectors

    assert torch.equal(learned(0), learned(0)) and not torch.equal(learned(0), learned(1))


def test_one_step_is_adamws_on_the_loss_of_the_same_draws(tiny, images):
    options = {"initializer": "ring", "n_vectors": 2, "anchor_weight": 0.5}
    learner, denoise = TextualInversion.from_pipeline(tiny, **options)
    with torch.no_grad():
        learner.embedding.vectors += 0.1
    by_hand = copy.deepcopy(learner.embedding.vectors)
    rng, prompt = seeded(), "a photo of a <concept>"
    rows, flips = torch.randint(5, (3,), generator=rng), torch.rand(3, generator=rng) < 1
    assert flips.all()
    loss = learner.loss(denoise, images[rows].flip(3), kind=[prompt], generator=rng)
    told = learner.encode([prompt] * 3).detach()
    rng = seeded()
    torch.randint(5, (3,), generator=rng), torch.rand(3, generator=rng), torch.randint(1, (3,), generator=rng)
    anchor = 0.5 * 64 * 0.01
    assert float(loss.detach()) == pytest.approx(
        float(denoise(images[rows].flip(3), told, generator=rng)) + anchor, rel=1e-5
    )
    by_hand.grad = torch.autograd.grad(loss, learner.embedding.vectors)[0]
    torch.optim.AdamW([by_hand], lr=1e-2).step()
    found = learner.fit(
        denoise, images, n_steps=1, lr=1e-2, batch_size=3, flip=1, kind=[prompt], generator=seeded()
    )
    torch.testing.assert_close(found.vectors, by_hand.detach())


@pytest.mark.parametrize(("start", "word"), [("red", "cross")])
def test_a_known_word_is_found_again_from_its_pictures(tiny, start, word):
    """Started from another word, the loss is not above that of the word itself by more than two percent."""
    learner, denoise = TextualInversion.from_pipeline(tiny, initializer=start)
    with torch.no_grad():
        told, nothing = learner.encode([f"a photo of a {word}"] * 8), learner.encode([""])
        drawn = denoise.sample(told, nothing, n_steps=8, guidance_scale=1.0, generator=seeded())
    learner.fit(
        denoise,
        drawn,
        n_steps=30,
        lr=3e-2,
        batch_size=6,
        kind=["a photo of a {}"],
        flip=0,
        generator=seeded(),
    )
    loss = {}
    with torch.no_grad():
        for text in (start, word, "<concept>"):
            told = learner.encode([f"a photo of a {text}"]).expand(64, -1, -1)
            loss[text] = float(denoise(drawn.repeat(8, 1, 1, 1), told, generator=seeded(1)))
    assert loss["<concept>"] <= 1.02 * loss[word] < loss[start]


def test_texts_have_the_word_in_them_and_distinct_ones_are_encoded_once(tiny, pair):
    learner, _ = pair
    texts = learner.prompts(200, "style", generator=seeded())
    assert set(texts) == {template.replace("{}", "<concept>") for template in PROMPTS["style"]}
    rows = []
    hook = tiny.text_encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    told = learner.encode(["a", "b", "a"])
    hook.remove()
    assert rows == [2] and torch.equal(told[0], told[2]) and told.shape == (3, 32, 64)


def test_a_network_of_half_precision_teaches_in_float32(tiny, images):
    learned = {}
    images = images[:2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(tiny)
        model.unet.to(dtype)
        learner, denoise = TextualInversion.from_pipeline(model, initializer="ring")
        loss = learner.loss(denoise, images, generator=seeded())
        assert loss.dtype == torch.float32
        learned[dtype] = torch.autograd.grad(loss, learner.embedding.vectors)[0]
        assert denoise.sample(*learner.encode(["a ring", ""]).split(1), n_steps=1).dtype == dtype
    for dtype in (torch.bfloat16, torch.float16):
        cosine = torch.cosine_similarity(learned[dtype], learned[torch.float32])
        assert cosine > 0.9


# --- files


@pytest.mark.parametrize(
    ("name", "format"), [("a.safetensors", "diffusers"), ("a.bin", "diffusers"), ("a.pt", "a1111")]
)
@pytest.mark.parametrize("n_vectors", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_round_trip_bit_for_bit(tmp_path, name, format, n_vectors, dtype):
    concept = Concept("<mine>", torch.randn(n_vectors, 4, generator=seeded()).to(dtype))
    concept.save(tmp_path / name, format)
    found = Concept.load(tmp_path / name)
    assert found.token == "<mine>" and found.vectors.dtype == dtype
    assert torch.equal(found.vectors, concept.vectors)
    if format == "diffusers" and name.endswith("bin"):
        assert list(torch.load(tmp_path / name, weights_only=True)) == ["<mine>"]


def test_a_token_of_several_is_chosen(tmp_path):
    torch.save({"<a>": torch.zeros(4), "<b>": torch.ones(4)}, tmp_path / "two.bin")
    assert Concept.load(tmp_path / "two.bin", token="<b>").vectors.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_diffusers_reads_the_file_and_tells_the_model_the_same(tiny, tmp_path, name):
    needs("diffusers", "generative")
    from diffusers.loaders import TextualInversionLoaderMixin

    class Pipe(TextualInversionLoaderMixin):
        hf_device_map, components = None, {}

        def __init__(self):
            self.tokenizer, self.text_encoder = copy.deepcopy((tiny.tokenizer, tiny.text_encoder))

    concept = Concept("<mine>", torch.randn(2, 64, generator=seeded()))
    concept.save(tmp_path / name)
    pipe = Pipe()
    pipe.load_textual_inversion(str(tmp_path), weight_name=name)
    prompt = pipe.maybe_convert_prompt("a photo of a <mine> on the left", pipe.tokenizer)
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    learner, _ = TextualInversion.from_pipeline(tiny, initializer="ring")
    learner.attach(concept)
    try:
        ours = learner.encode(["a photo of a <mine> on the left"])
    finally:
        learner.detach()
    torch.testing.assert_close(ours, pipe.text_encoder(ids)[0])


# --- the small model


def test_shapes_are_where_and_of_the_colour_that_the_caption_says():
    images, captions = shapes(
        8, colors=["blue"], kinds=["circle"], places=["on the left"], generator=seeded()
    )
    assert set(captions) == {"a photo of a blue circle on the left"}
    ink = (images - images[:, :, :1, :1]).abs().sum(1)
    assert (ink[..., :8].sum((1, 2)) > 3 * ink[..., 8:].sum((1, 2))).all()
    area = ink.sum((1, 2)) / ink.amax((1, 2))
    torch.testing.assert_close(area, torch.full((8,), math.pi * (0.2 * 16) ** 2), rtol=0.02, atol=0)
    deepest = images.flatten(2)[torch.arange(8), :, ink.flatten(1).argmax(1)]
    assert (deepest.argmax(1) == 2).all() and images.min() >= 0 and images.max() <= 1


def test_training_is_decided_by_its_generator_and_rounds_to_what_the_file_holds():
    first, again = (TinyTextToImage.train(1, seeded(3)) for _ in range(2))
    for p, q in zip(first.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, p.half().float()) and not p.requires_grad


def test_damaged_weights_are_refused(as_a_user, monkeypatch):
    monkeypatch.setattr("posterity.generative.tiny_text_to_image.SHA256", "0" * 64)
    with pytest.raises(ValueError, match="it is damaged"):
        TinyTextToImage.pretrained()


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "ring"}, "token must be new to the tokenizer, 'ring' is in its vocabulary"),
        ({"token": "two words"}, "token must be a text without spaces, got 'two words'"),
        ({"initializer": "red ring"}, r"one token, 'red ring' is \['red', 'ring'\]"),
        ({"initializer": "sculpture"}, r"one token, 'sculpture' is \['<unknown>'\]"),
        ({"initializer": torch.zeros(2, 64)}, r"initializer must have shape \(1, 64\)"),
        ({"initializer": 3}, "initializer must be a word, vectors or None, got 3"),
        ({"n_vectors": 0}, "n_vectors must be an integer of at least 1, got 0"),
        ({"anchor_weight": -1.0}, "anchor_weight must be at least 0, got -1.0"),
    ],
)
def test_refuses_a_bad_word_by_name(as_a_user, tiny, options, message):
    with pytest.raises(ValueError, match=message):
        TextualInversion.from_pipeline(tiny, **{"initializer": "ring", **options})


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(0, 3, 16, 16), {}, "none of them 0, got"),
        (torch.zeros(2, 1, 16, 16), {}, "images must have 3 channels for this model, got 1"),
        (torch.full((2, 3, 16, 16), 1.5), {}, r"images must be in \[0, 1\], got values from 1.5"),
        (torch.full((2, 3, 16, 16), math.nan), {}, r"images must be in \[0, 1\]"),
        (
            torch.zeros(2, 3, 16, 16).byte(),
            {},
            "images must be a floating-point tensor, got dtype torch.uint8: divide",
        ),
        (
            None,
            {"kind": ["a photo"]},
            r"kind must hold templates with \{\} or <concept> in each, got 'a photo'",
        ),
        (None, {"kind": "objects"}, "kind must be one of 'object', 'style', got 'objects'"),
        (None, {"kind": ["word " * 40 + "{}"]}, "prompts must have at most 32 tokens, .* has 11 too many"),
        (None, {"lr": 0}, "lr must be greater than 0"),
        (None, {"flip": 2}, "flip must be in"),
        (None, {"n_steps": 0}, "n_steps must be an integer of at least 1"),
    ],
)
def test_refuses_bad_images_and_settings_by_name(as_a_user, pair, images, options, message):
    learner, denoise = pair
    images = torch.zeros(2, 3, 16, 16) if images is None else images
    with pytest.raises(ValueError, match=message):
        learner.fit(denoise, images, **options)


def test_refuses_words_of_another_width_and_learning_while_one_is_attached(as_a_user, pair, images):
    learner, denoise = pair
    with pytest.raises(
        ValueError, match=r"vectors must have shape \(any, 64\) for the text encoder, got \(1, 3\)"
    ):
        learner.attach(Concept("<mine>", torch.zeros(1, 3)))
    learner.attach(Concept("<mine>", torch.zeros(1, 64)))
    try:
        with pytest.raises(ValueError, match="<mine> must be detached"):
            learner.loss(denoise, images)
        with pytest.raises(ValueError, match="must be new to the tokenizer"):
            learner.attach(Concept("<mine>", torch.zeros(1, 64)))
    finally:
        learner.detach()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"<a>": torch.zeros(4), "<b>": torch.zeros(4)}, "several tokens, one of <a>, <b>"),
        ({"<a>": 3}, "must be a file of vectors by token"),
        ([torch.zeros(4)], "must be a file of vectors by token"),
    ],
)
def test_refuses_files_without_one_word(as_a_user, tmp_path, held, message):
    torch.save(held, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=message):
        Concept.load(tmp_path / "a.bin")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        Concept.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([], torch.zeros(0, 4), "at least one integer"),
        ([1, 1], torch.zeros(2, 4), r"ids must be different, got \[1, 1\]"),
        ([-1], torch.zeros(1, 4), "ids must be an integer of at least 0, got -1"),
        ([1], torch.zeros(1, 5), r"vectors must have shape \(1, 4\) for 1 ids and the base, got \(1, 5\)"),
    ],
)
def test_refuses_a_bad_overlay_by_name(as_a_user, base, ids, vectors, message):
    with pytest.raises(ValueError, match=message):
        ConceptEmbedding(base, ids, vectors)
