"""A text-to-image model that is 16 pixels wide and ships with the package: coloured shapes, and the words for them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import integer, needs
from posterity._random import draw_device, seed_from, seeded
from posterity.generative._shipped import read_weights, train, write_weights

__all__ = ["TinyTextToImage", "shapes"]

# Hues in degrees. Between 18 and 42, 168 and 192, 258 and 282 there is nothing: those are for new words.
HUES = {
    "red": 0, "yellow": 60, "lime": 90, "green": 120, "jade": 150, "azure": 210, "blue": 240, "magenta": 300, "pink": 330,
}  # fmt: skip
NEW_HUES = {"orange": 30, "cyan": 180, "violet": 270}
FORMS = ("circle", "square", "triangle", "cross", "ring", "bar")
NEW_FORMS = ("diamond", "frame")
PLACES = {
    "on the left": (0.28, 0.5), "on the right": (0.72, 0.5), "at the top": (0.5, 0.28), "at the bottom": (0.5, 0.72),
    "in the middle": (0.5, 0.5),
}  # fmt: skip
NEUTRAL = [
    "a", "an", "the", "of", "my", "one", "photo", "picture", "image", "painting", "rendering", "rendition", "style", "in", "on",
    "at", "left", "right", "top", "bottom", "middle", "object", "thing", "cropped", "clean", "dirty", "dark", "bright", "cool",
    "good", "nice", "small", "large", "weird", "close-up", "depiction",
]  # fmt: skip
OPENING = "a photo of a "
OPENINGS = (
    OPENING, "a photo of the ", "a rendering of a ", "a cropped photo of the ", "the photo of a ", "a photo of a clean ",
    "a photo of a dirty ", "a dark photo of the ", "a photo of my ", "a photo of the cool ", "a close-up photo of a ",
    "a bright photo of the ", "a good photo of a ", "a photo of one ", "a rendition of the ", "a photo of a nice ",
    "a photo of the small ", "a photo of the weird ", "a photo of the large ", "a picture of a ", "an image of the ",
    "a depiction of a ", "a painting of a ", "the ", "a ",
)  # fmt: skip
FILE = "tiny_text_to_image.safetensors"
SHA256 = "84690673dbb866a87656c57cd5b2e691fdf953449e8914e43049ea60c5a16cfe"
GROUND = 0.92  # the background, a light grey
BATCH = 32  # of `train`
WIDTH, LENGTH = 64, 32


def shapes(
    n: int, *, colors: Sequence[str] | None = None, kinds: Sequence[str] | None = None,
    places: Sequence[str] | None = None, size: int = 16, generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "n 3 size size"], list[str]]:  # fmt: skip
    """Draw pictures of coloured shapes on a plain ground, and say what is in them.

    Parameters
    ----------
    n : int
        How many, at least 1.
    colors : sequence of str, optional
        Of which each has one; a colour is a range of 24 degrees of hue. Default: the nine that `TinyTextToImage` has
        words for. It has never seen "orange", "cyan" and "violet".
    kinds : sequence of str, optional
        Default: the six shapes that it has words for. It has never seen "diamond" and "frame".
    places : sequence of str, optional
        Default: all five, which one caption of five leaves out.
    size : int, default=16
        Pixels a side, at least 4.
    generator : torch.Generator, optional
        Draws everything.

    Returns
    -------
    tuple of Tensor and list of str
        Images of shape (n, 3, size, size) in [0, 1], and captions.

    Raises
    ------
    ValueError
        If a number is too small or a name is unknown.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import shapes
    >>> images, captions = shapes(2, colors=["red"], kinds=["ring"], places=["on the left"])
    >>> captions[0], tuple(images.shape)
    ('a photo of a red ring on the left', (2, 3, 16, 16))
    >>> bool((images[:, 0] > images[:, 2] - 1e-6).all())  # nowhere bluer than red
    True
    """
    count, size = integer("n", n, 1), integer("size", size, 4)
    colours = _chosen("colors", colors, HUES, NEW_HUES)
    kinds = _chosen("kinds", kinds, FORMS, NEW_FORMS)
    named = _chosen("places", places, PLACES, ())
    where = draw_device(generator)
    drawn = torch.rand(9, count, generator=generator, device=where).cpu()
    which = [(drawn[k] * len(names)).long().tolist() for k, names in enumerate((colours, kinds, named))]
    hue = torch.tensor([float({**HUES, **NEW_HUES}[colours[k]]) for k in which[0]]) + 24 * drawn[3] - 12
    colour = _rgb(hue / 60, 0.85 + 0.15 * drawn[4], 0.75 + 0.25 * drawn[5])
    centre = torch.tensor([PLACES[named[k]] for k in which[2]]) + 0.12 * (drawn[6:8].T - 0.5)
    axis = (torch.arange(size) + 0.5) / size
    x, y = (axis[None, None, :] - centre[:, :1, None], axis[None, :, None] - centre[:, 1:, None])
    x, y = x.expand(-1, size, -1), y.expand(-1, -1, size)
    distance = torch.stack([_distance(kinds[k], x[i], y[i]) for i, k in enumerate(which[1])])
    cover = (0.5 - distance * size).clamp(0, 1)[:, None]  # how much of a pixel is inside
    images = GROUND + cover * (colour[:, :, None, None] - GROUND)
    silent = (drawn[8] < 0.2).tolist() if places is None else [False] * count
    tails = ["" if quiet else f" {named[k]}" for quiet, k in zip(silent, which[2], strict=True)]
    texts = [
        f"{OPENING}{colours[i]} {kinds[j]}{tail}"
        for i, j, tail in zip(which[0], which[1], tails, strict=True)
    ]
    return images, texts


def _chosen(name: str, asked: Any, known: Any, new: Any) -> list[str]:
    """Return the names asked for, those of the model's own words by default."""
    if asked is None:
        return list(known)
    every = [*known, *new]
    if (
        isinstance(asked, str)
        or not isinstance(asked, Sequence)
        or not asked
        or any(each not in every for each in asked)
    ):
        raise ValueError(f"{name} must be some of {', '.join(every)}, got {asked!r}")
    return list(asked)


def _rgb(
    sextant: Float[Tensor, " n"], saturation: Float[Tensor, " n"], value: Float[Tensor, " n"]
) -> Float[Tensor, "n 3"]:
    """Return colours by hue (six units around), saturation and value."""
    around = (sextant[:, None] + torch.tensor([5.0, 3.0, 1.0])) % 6
    dip = torch.minimum(around, 4 - around).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * dip)


def _distance(
    kind: str, x: Float[Tensor, "size size"], y: Float[Tensor, "size size"]
) -> Float[Tensor, "size size"]:
    """Return how far points are outside a shape around 0, negative inside."""
    square = torch.maximum(x.abs(), y.abs())
    if kind == "circle":
        return (x * x + y * y).sqrt() - 0.2
    if kind == "square":
        return square - 0.18
    if kind == "triangle":  # upright, its three sides
        return torch.maximum(y - 0.17, (2 * x.abs() - y) / math.sqrt(5) - 0.1)
    if kind == "cross":
        return torch.minimum(
            torch.maximum(x.abs() - 0.07, y.abs() - 0.22), torch.maximum(y.abs() - 0.07, x.abs() - 0.22)
        )
    if kind == "ring":
        return ((x * x + y * y).sqrt() - 0.17).abs() - 0.055
    if kind == "bar":
        return torch.maximum(x.abs() - 0.25, y.abs() - 0.085)
    if kind == "diamond":
        return (x.abs() + y.abs() - 0.25) / math.sqrt(2)
    return (square - 0.165).abs() - 0.055  # a frame


class TinyTextToImage:
    """A text-to-image diffusion model of 0.4 million weights, for trying out what is meant for large ones.

    It draws the pictures of `shapes` from their captions: a word tokenizer, a ``transformers.CLIPTextModel`` of two
    layers, a ``diffusers.UNet2DConditionModel`` on 16x16 pixels, and a DDIM scheduler with 1,000 training steps whose
    target is the velocity. What a pipeline holds has the same name here. It heeds colours and shapes; that a caption
    names a place it has hardly learned.

    Parameters
    ----------
    unet : nn.Module
        The denoiser.
    text_encoder : nn.Module
        What makes 32 vectors of 64 numbers of a text.
    tokenizer : transformers tokenizer
        Of 51 words.
    scheduler : diffusers scheduler
        The noises, and how they are taken away.

    Notes
    -----
    It draws best without guidance, or with a ``guidance_scale`` of up to 2 in at most 15 steps. More of either spoils
    colours and places.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import TextualInversion, TinyTextToImage
    >>> model = TinyTextToImage.pretrained()
    >>> learner, denoise = TextualInversion.from_pipeline(model, initializer="circle")
    >>> told = learner.encode(["a photo of a red circle", ""])
    >>> generator = torch.Generator().manual_seed(0)
    >>> (image,) = denoise.sample(told[:1], told[1:], n_steps=10, guidance_scale=2.0, generator=generator)
    >>> image.shape, bool((image[0] > image[1:].amax(0) + 0.4).sum() > 10)  # more than ten pixels are red
    (torch.Size([3, 16, 16]), True)
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, tokenizer: Any, scheduler: Any) -> None:
        self.unet, self.text_encoder, self.tokenizer, self.scheduler = (
            unet,
            text_encoder,
            tokenizer,
            scheduler,
        )

    def to(self, device: torch.device | str) -> "TinyTextToImage":
        """Move both networks.

        Parameters
        ----------
        device : torch.device or str

        Returns
        -------
        TinyTextToImage
            Itself.
        """
        self.unet.to(device)
        self.text_encoder.to(device)
        return self

    @classmethod
    def pretrained(cls) -> "TinyTextToImage":
        """Return the model that ships: what ``train(6_000, torch.Generator().manual_seed(0))`` gave on one CPU core.

        Returns
        -------
        TinyTextToImage
            In float32, from weights of 16 bits; in eval mode, no parameter asks for a gradient.

        Raises
        ------
        FileNotFoundError
            If the weights are not beside this file.
        ValueError
            If they are not those that belong to it.
        """
        made = cls._untrained(0)
        read_weights(Path(__file__).with_name(FILE), SHA256, made._networks())
        return made

    def _networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def _save(self, path: Path) -> None:
        """Write the file that `pretrained` reads."""
        write_weights(path, self._networks())

    @classmethod
    def _untrained(cls, seed: int) -> "TinyTextToImage":
        diffusers, transformers = needs("diffusers", "generative"), needs("transformers", "generative")
        tokenizer = _tokenizer(transformers)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
        with seeded(seed):
            encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH, **ids,
            ))  # fmt: skip
            unet = diffusers.UNet2DConditionModel(
                sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=None,
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
                attention_head_dim=2, cross_attention_dim=WIDTH,
            )  # fmt: skip
        # velocities: where all is noise, an error of the noise would be one of the whole picture
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
            timestep_spacing="trailing",
        )  # fmt: skip
        return cls(unet, encoder, tokenizer, scheduler)

    @classmethod
    @torch.inference_mode(False)
    def train(cls, n_steps: int = 6_000, generator: torch.Generator | None = None) -> "TinyTextToImage":
        """Train a model from nothing, on the CPU: a quarter of an hour of one core at the default.

        Adam at 2e-3 with warm-up and a cosine, batches of 32, gradients clipped at norm 1, averaged weights, a tenth of
        the captions empty, and every caption behind one of 25 openings.

        Parameters
        ----------
        n_steps : int, default=6000
            At least 1.
        generator : torch.Generator, optional
            Draws the initial weights, pictures, captions, steps and noise.

        Returns
        -------
        TinyTextToImage
            With weights rounded to 16 bits, in eval mode; no parameter asks for a gradient.

        Raises
        ------
        ValueError
            If ``n_steps`` is less than 1.
        """
        integer("n_steps", n_steps, 1)
        where = draw_device(generator)
        made = cls._untrained(seed_from(generator))

        def loss() -> Tensor:
            images, texts = shapes(BATCH, generator=generator)
            which = torch.randint(len(OPENINGS), (BATCH,), generator=generator, device=where).tolist()
            texts = [OPENINGS[i] + text.removeprefix(OPENING) for i, text in zip(which, texts, strict=True)]
            empty = torch.rand(BATCH, generator=generator, device=where) < 0.1
            texts = ["" if nothing else text for nothing, text in zip(empty.tolist(), texts, strict=True)]
            tokens = made.tokenizer(
                texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            x = 2 * images - 1
            noise = torch.randn(x.shape, generator=generator, device=where).cpu()
            t = torch.randint(1000, (BATCH,), generator=generator, device=where).cpu()
            context = made.text_encoder(tokens.input_ids)[0]
            said = made.unet(made.scheduler.add_noise(x, noise, t), t, encoder_hidden_states=context).sample
            return (said - made.scheduler.get_velocity(x, noise, t)).square().mean()

        train([made.unet, made.text_encoder], loss, n_steps)
        return made


def _tokenizer(transformers: Any) -> Any:
    """Return a tokenizer of whole words."""
    tokenizers = needs("tokenizers", "generative")
    words = ["<start>", "<end>", "<unknown>", *dict.fromkeys([*NEUTRAL, *HUES, *FORMS])]
    model = tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unknown>")
    split = tokenizers.Tokenizer(model)
    split.normalizer = tokenizers.normalizers.Lowercase()
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    split.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, bos_token="<start>", eos_token="<end>", unk_token="<unknown>", pad_token="<end>",
        model_max_length=LENGTH,
    )  # fmt: skip
