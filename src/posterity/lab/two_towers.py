"""Two towers: a small CLIP model that ships as code, trained here on drawn images and their captions, or one by name.

An image shows one object with attributes, which its caption names: "a photo of red disc". In the ``inverted`` style
colours are the complements of what they are in the ``plain`` one, strokes are thicker and there is more noise: words
keep their place, what they look like changes, as between a model's pre-training and a user's pictures.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import needs, one_of
from posterity.lab import pretrained
from posterity.lab.nets import seeded

__all__ = ["ATTRIBUTES", "OBJECTS", "TwoTowers", "attribute_object_images", "captions", "two_towers"]

ATTRIBUTES = ("red", "green", "blue", "striped", "dotted", "tiny", "huge", "dark")
OBJECTS = ("disc", "square", "triangle", "cross", "ring", "bar")
SIZE = 16  # of the small model's images
BATCH = 128  # of the small model's training
POSITIONS = 24  # tokens of a text: sixteen free ones and a few words


class TwoTowers(NamedTuple):
    """A model, its tokenizer, and what makes its inputs of images (n, 3, h, w) in [0, 1]."""

    model: nn.Module
    tokenizer: Any
    prepare: Callable[[Tensor], Tensor]


def attribute_object_images(
    attributes: Tensor, objects: Tensor, *, size: int = SIZE, style: str = "plain", generator: torch.Generator
) -> Tensor:
    """Draw objects with attributes.

    Parameters
    ----------
    attributes : Tensor of shape (n, 8), bool
        Which of `ATTRIBUTES` each has.
    objects : Tensor of shape (n,), int
        Index into `OBJECTS`.
    size : int, default=16
        Height and width, pixels.
    style : {"plain", "inverted"}, default="plain"
    generator : torch.Generator
        Draws places, sizes and noise.

    Returns
    -------
    Tensor of shape (n, 3, size, size), in [0, 1]
    """
    one_of("style", style, ("plain", "inverted"))
    n, has = len(objects), dict(zip(ATTRIBUTES, attributes.T[:, :, None, None], strict=True))
    stroke, noise = (0.3, 0.1) if style == "plain" else (0.45, 0.2)
    axis = torch.linspace(-1, 1, size)
    shift = (torch.rand(2, n, 1, 1, generator=generator) - 0.5) * 0.5
    radius = 0.6 + 0.1 * torch.rand(n, 1, 1, generator=generator)
    radius = torch.where(has["tiny"], 0.5, torch.where(has["huge"], 1.5, 1.0)) * radius
    v, u = (axis[:, None] - shift[0]) / radius, (axis[None, :] - shift[1]) / radius
    r, square = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
    thin = torch.minimum(u.abs(), v.abs())
    drawn = torch.stack([
        r < 1, square < 0.85, (v < 0.7) & (v > -1 + 1.7 * u.abs()), (square < 1) & (thin < stroke),
        (r < 1.05) & (r > 1 - stroke), (u.abs() < 1.1) & (v.abs() < stroke),
    ])[objects, torch.arange(n)]  # fmt: skip
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    drawn = drawn & (~has["striped"] | ((rows + columns) % 4 < 2))
    drawn = drawn & (~has["dotted"] | ((rows % 3 > 0) & (columns % 3 > 0)))
    tinted = has["red"] | has["green"] | has["blue"]
    on, off = (1.0, 0.1) if style == "plain" else (0.1, 1.0)
    channels = [torch.where(tinted, torch.where(has[c], on, off), 0.85) for c in ("red", "green", "blue")]
    bright = torch.where(has["dark"], 0.4, 1.0)
    image = torch.stack([drawn * bright * channel for channel in channels], dim=1)
    return (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def captions(attributes: Tensor, objects: Tensor) -> list[str]:
    """Return what images show, in words: "red striped disc".

    Parameters
    ----------
    attributes : Tensor of shape (n, 8), bool
    objects : Tensor of shape (n,), int

    Returns
    -------
    list of str
    """
    return [
        " ".join([*(a for a, has in zip(ATTRIBUTES, row, strict=True) if has), OBJECTS[k]])
        for row, k in zip(attributes.tolist(), objects.tolist(), strict=True)
    ]


def two_towers(model: str, seed: int, *, steps: int = 600) -> TwoTowers:
    """Return a two-tower model by name: ``tiny`` is made and trained here, others are loaded by transformers.

    Parameters
    ----------
    model : str
        "tiny"; or a folder or a name of the hub with a ``CLIPModel`` and its tokenizer.
    seed : int
        Of the small model: each seed has its own, trained once a process.
    steps : int, default=600
        Of its training; not used for others.

    Returns
    -------
    TwoTowers
    """
    if model == "tiny":
        return _tiny(seed, steps)
    transformers = needs("transformers", "transfer")
    rule = "model must be tiny, or a CLIP model's folder or name"
    loaded = pretrained.load(transformers.CLIPModel, model, rule).eval()
    tokenizer = pretrained.load(transformers.AutoTokenizer, model, rule)
    size = loaded.config.vision_config.image_size
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # of CLIP's own training images
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    return TwoTowers(loaded, tokenizer, lambda images: (_sized(images, size) - mean) / std)


@cache
@torch.enable_grad()  # whoever asks first
def _tiny(seed: int, steps: int) -> TwoTowers:
    model, tokenizer = _untrained(seed)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        attributes, objects = _anything(BATCH, draws)
        images = attribute_object_images(attributes, objects, generator=draws)
        texts = [f"a photo of {caption}" for caption in captions(attributes, objects)]
        ids = tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(pixel_values=_centred(images), **ids).logits_per_image
        same = (ids["input_ids"][:, None] == ids["input_ids"]).all(2).float()
        target = same / same.sum(1, keepdim=True)  # who has the same caption is no negative
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()
    return TwoTowers(model.eval(), tokenizer, lambda images: _centred(_sized(images, SIZE)))


def _untrained(seed: int) -> tuple[Any, Any]:
    """Return the small model with the initial weights of a seed, and its tokenizer of whole words."""
    transformers, tokenizers = needs("transformers", "transfer"), needs("tokenizers", "transfer")
    special = ["<pad>", "<begin>", "<unknown>", "<end>"]  # CLIP reads an end token of id 2 as "the largest"
    words = [
        *special,
        *["a", "photo", "of", "x", ".", "the", "picture", "with", "and", "an", "image"],
        *ATTRIBUTES,
        *OBJECTS,
    ]
    level = tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unknown>")
    raw = tokenizers.Tokenizer(level)
    raw.normalizer = tokenizers.normalizers.Lowercase()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 1), ("<end>", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", unk_token="<unknown>",
        model_max_length=POSITIONS,
    )  # fmt: skip
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **shared, "vocab_size": len(words), "max_position_embeddings": POSITIONS,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
        },
        vision_config={**shared, "image_size": SIZE, "patch_size": 4},
        projection_dim=32,
    )  # fmt: skip
    with seeded(seed):
        return transformers.CLIPModel(config), tokenizer


def _anything(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return attributes, one or two each, and objects of n images."""
    kind = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])  # of attributes that exclude each other
    first, second = torch.rand(n, len(ATTRIBUTES), generator=generator).argsort(1)[:, :2].T
    attributes = F.one_hot(first, len(ATTRIBUTES)).bool()
    two = (torch.rand(n, generator=generator) < 0.5) & (kind[first] != kind[second])
    attributes[two, second[two]] = True
    return attributes, torch.randint(len(OBJECTS), (n,), generator=generator)


def _sized(images: Tensor, size: int) -> Tensor:
    """Return images in three colours and of a model's size."""
    images = images.expand(-1, 3, -1, -1)
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return images


def _centred(images: Tensor) -> Tensor:
    return 2 * images - 1
