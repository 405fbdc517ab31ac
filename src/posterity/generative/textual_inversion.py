"""Textual inversion: a new word for a thing, learned from a few pictures of it by a model that stays as it is.

The word is the vector v in the place of its token's embedding at which the frozen model denoises the pictures best,

    v* = argmin_v E || eps - eps_theta(x_t, t, c(y(v))) ||^2,                                            (1)

where y is a neutral text with the word in it ("a photo of a <concept>"), c the frozen text encoder, and x, eps and t are
drawn as the model was trained. The gradient goes through both networks to v alone, so nothing that they know is lost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, needs, one_of, within
from posterity._models import held
from posterity._precision import wide
from posterity._random import draw_device
from posterity.generative.concept_words import (
    Concept,
    ConceptEmbedding,
    checked_token,
    pieces_of,
    with_tokens,
)
from posterity.generative.frozen_diffusion import DiffusionLoss

__all__ = ["PROMPTS", "TextualInversion"]

PROMPTS: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
        "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
        "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
        "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
        "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
        "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
        "a photo of a cool {}", "a photo of a small {}",
    ),
    "style": (
        "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
        "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
        "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
        "a close-up painting in the style of {}", "a bright painting in the style of {}", "a good painting in the style of {}",
        "a rendition in the style of {}", "a nice painting in the style of {}", "a small painting in the style of {}",
        "a weird painting in the style of {}", "a large painting in the style of {}",
    ),
}  # fmt: skip
HALF_SCALE = 1024.0  # of the loss in float16, where the gradient of a mean over many pixels vanishes


class TextualInversion:
    """A learner of one new word for a frozen text-to-image model.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Of the text encoder. Only ``attach`` changes it.
    text_encoder : nn.Module
        Of transformers: with ``get_input_embeddings`` and ``set_input_embeddings``; ``text_encoder(ids)[0]`` is what the
        model is told.
    token : str, default="<concept>"
        The word, new to the tokenizer. With several vectors it stands for ``token``, ``token_1``, ... in a row.
    initializer : str or Tensor or None, default="object"
        A word of one token that the vectors start from: what kind of thing it is ("cat", "sculpture"). Or vectors
        themselves, (d,) or (n_vectors, d): the mean embedding is a start that says nothing,
        ``text_encoder.get_input_embeddings().weight.mean(0)``. None is uniform in [0, 1), as the official code does.
    n_vectors : int, default=1
        At least 1. More of them fit the pictures more closely, and heed the rest of a prompt less.
    anchor_weight : float, default=0.0
        At least 0: of the mean squared distance of the vectors from their start.
    generator : torch.Generator, optional
        Draws the start where there is no initializer.

    Attributes
    ----------
    embedding : ConceptEmbedding
        The vectors, over the encoder's own embedding.
    token : str

    Raises
    ------
    ValueError
        If the token is in the vocabulary already or the tokenizer takes it apart, the initializer is not one token,
        vectors have another width, or a number is out of range.

    Notes
    -----
    1. New tokens are added, as diffusers does; the official code inserts vectors at a word that the vocabulary has.
    2. A prompt that is too long is refused, where the official code cuts its end off.
    3. Templates are drawn without the official doubles.

    References
    ----------
    .. [1] Gal, Alaluf, Atzmon, Patashnik, Bermano, Chechik, Cohen-Or. An Image is Worth One Word: Personalizing
       Text-to-Image Generation using Textual Inversion. ICLR 2023. Equation 2 and Section 5.

    Examples
    --------
    With diffusers installed, and a model that ships:

    >>> import torch
    >>> from posterity.generative import TextualInversion, TinyTextToImage, shapes
    >>> model = TinyTextToImage.pretrained()
    >>> learner, denoise = TextualInversion.from_pipeline(model, initializer="ring")
    >>> images, _ = shapes(5, colors=["orange"], kinds=["ring"], generator=torch.Generator().manual_seed(0))
    >>> concept = learner.fit(denoise, images, n_steps=2, generator=torch.Generator().manual_seed(0))
    >>> concept.token, tuple(concept.vectors.shape)
    ('<concept>', (1, 64))
    >>> learner.encode(["a photo of a <concept> on the left"]).shape
    torch.Size([1, 32, 64])
    """

    def __init__(
        self, tokenizer: Any, text_encoder: nn.Module, *, token: str = "<concept>",
        initializer: str | Tensor | None = "object", n_vectors: int = 1, anchor_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        for name in ("get_vocab", "add_tokens", "convert_tokens_to_ids"):
            if not callable(tokenizer) or not hasattr(tokenizer, name):
                raise ValueError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")
        if not isinstance(text_encoder, nn.Module) or not hasattr(text_encoder, "set_input_embeddings"):
            raise ValueError(
                f"text_encoder must be a model of transformers, got {type(text_encoder).__name__}"
            )
        self.token = checked_token(token)
        integer("n_vectors", n_vectors, 1)
        self.anchor_weight = at_least("anchor_weight", anchor_weight, 0)
        self.tokenizer: Any = tokenizer
        self.text_encoder: Any = text_encoder
        base = self.text_encoder.get_input_embeddings()
        if not isinstance(base, nn.Embedding):
            raise ValueError(
                f"text_encoder must have an nn.Embedding at its input, got {type(base).__name__}"
            )
        start = self._start(initializer, n_vectors, base, generator)
        self._words, ids = with_tokens(tokenizer, pieces_of(token, n_vectors))
        self.embedding = ConceptEmbedding(base, ids, start)
        self._base = base
        self._attached: dict[str, Concept] = {}
        self._before: dict[str, Any] | None = None  # the tokenizer as it was before `attach`

    @classmethod
    def from_pipeline(cls, pipe: Any, **kwargs: Any) -> tuple["TextualInversion", DiffusionLoss]:
        """Return a learner and its loss for a pipeline of diffusers.

        Parameters
        ----------
        pipe : object
            With ``tokenizer``, ``text_encoder``, ``unet`` and ``scheduler``, and ``vae`` where it has one: Stable
            Diffusion 1 and 2 and their kin, or `TinyTextToImage`. A scheduler that only samples is replaced by a DDIM
            scheduler of its settings.
        **kwargs
            Of `TextualInversion`.

        Returns
        -------
        tuple of TextualInversion and DiffusionLoss

        Raises
        ------
        ValueError
            If a part is missing, or the pipeline has a second text encoder.
        """
        lacks = [
            name
            for name in ("tokenizer", "text_encoder", "unet", "scheduler")
            if getattr(pipe, name, None) is None
        ]
        if lacks:
            raise ValueError(f"pipe must have {', '.join(lacks)}, {type(pipe).__name__} does not")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise ValueError(f"pipe must have one text encoder, {type(pipe).__name__} has two")
        scheduler, vae = pipe.scheduler, getattr(pipe, "vae", None)
        # some diffuse on another scale than the network was trained on, others know no velocity
        if (
            not hasattr(scheduler, "get_velocity")
            or float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0
        ):
            scheduler = needs("diffusers", "generative").DDIMScheduler.from_config(scheduler.config)
        factor = getattr(getattr(vae, "config", None), "scaling_factor", 0.18215)
        return cls(pipe.tokenizer, pipe.text_encoder, **kwargs), DiffusionLoss(
            pipe.unet, scheduler, vae, scaling_factor=factor
        )

    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "n length d"]:
        """Return what the text encoder makes of prompts, the word among them; distinct ones are encoded once.

        While words are attached it is they that are known; else it is the word that is being learned.

        Parameters
        ----------
        prompts : sequence of str
            At least one; the word stands in them as ``token``, or not at all.

        Returns
        -------
        Tensor of shape (n, length, d)
            Differentiable in the new vectors only.

        Raises
        ------
        ValueError
            If there are no prompts, or one is too long for the encoder once the word is written out.
        """
        _texts("prompts", prompts)
        with held(self.text_encoder), self._worded():
            return self._encoded(prompts)

    def prompts(
        self, n: int, kind: Literal["object", "style"] | Sequence[str] = "object", *,
        generator: torch.Generator | None = None,
    ) -> list[str]:  # fmt: skip
        """Draw neutral texts with the word in them.

        Parameters
        ----------
        n : int
            How many, at least 1.
        kind : {"object", "style"} or sequence of str, default="object"
            Whose templates of `PROMPTS`, or your own, with ``{}`` or the word itself in each.
        generator : torch.Generator, optional
            Chooses.

        Returns
        -------
        list of str

        Raises
        ------
        ValueError
            If ``n`` is less than 1, the kind is unknown, or a template has no place for the word.
        """
        count, templates = integer("n", n, 1), self._templates(kind)
        where = draw_device(generator)
        rows = torch.randint(len(templates), (count,), generator=generator, device=where).tolist()
        return [templates[row].replace("{}", self.token) for row in rows]

    def loss(
        self, denoise: DiffusionLoss, images: Float[Tensor, "n channels height width"], *,
        kind: Literal["object", "style"] | Sequence[str] = "object", generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the error of equation 1 on images, each under a text of its own, and the anchor's share.

        Parameters
        ----------
        denoise : DiffusionLoss
            The frozen model.
        images : Tensor of shape (n, channels, height, width)
            In [0, 1].
        kind : {"object", "style"} or sequence of str, default="object"
            As in ``prompts``.
        generator : torch.Generator, optional
            Draws texts, steps and noise.

        Returns
        -------
        Tensor
            A scalar, differentiable in ``embedding.vectors`` only.

        Raises
        ------
        ValueError
            If an argument does not fit, or a word is attached.
        """
        self._check(denoise, images, kind)
        with held(self.text_encoder), denoise._held(), self._worded():
            return self._error(denoise, images, self._templates(kind), generator)

    @torch.inference_mode(False)
    def fit(
        self, denoise: DiffusionLoss, images: Float[Tensor, "n channels height width"], *, n_steps: int = 5_000,
        lr: float = 5e-3, batch_size: int = 4, kind: Literal["object", "style"] | Sequence[str] = "object",
        flip: float = 0.5, generator: torch.Generator | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
    ) -> Concept:  # fmt: skip
        """Learn the vectors, on from where they are.

        Parameters
        ----------
        denoise : DiffusionLoss
            The frozen model.
        images : Tensor of shape (n, channels, height, width)
            Three to five of the thing, in [0, 1], on any device.
        n_steps : int, default=5000
            Of AdamW with its weight decay of 0.01, at least 1.
        lr : float, default=5e-3
            Learning rate, greater than 0. Official runs multiply it by the batch size and the number of devices.
        batch_size : int, default=4
            Images a step, drawn with replacement, at least 1.
        kind : {"object", "style"} or sequence of str, default="object"
            As in ``prompts``.
        flip : float, default=0.5
            How often an image is mirrored, in [0, 1]; 0 where left and right matter.
        generator : torch.Generator, optional
            Draws images, texts, steps and noise.
        callback : callable, optional
            ``callback(step, loss)`` after each step, the loss a tensor.

        Returns
        -------
        Concept
            The word and a copy of its vectors.

        Raises
        ------
        ValueError
            If an argument does not fit, a word is attached, or the vectors do not stay finite.
        """
        self._check(denoise, images, kind)
        integer("n_steps", n_steps, 1)
        integer("batch_size", batch_size, 1)
        at_least("lr", lr, 0, strict=True)
        within("flip", flip, 0, 1)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be callable, got {type(callback).__name__}")
        templates, where = self._templates(kind), draw_device(generator)
        self._tokens(self._words, [template.replace("{}", self.token) for template in templates], self._own)
        images, vectors = images.detach().clone(), self.embedding.vectors
        scale = HALF_SCALE if denoise._dtype() == torch.float16 else 1.0
        adam = torch.optim.AdamW([vectors], lr=lr)
        with torch.enable_grad(), held(self.text_encoder), denoise._held(), self._worded():
            for step in range(n_steps):
                rows = torch.randint(len(images), (batch_size,), generator=generator, device=where)
                mirrored = torch.rand(batch_size, generator=generator, device=where) < flip
                batch = images[rows.to(images.device)]
                batch = torch.where(mirrored.to(images.device)[:, None, None, None], batch.flip(3), batch)
                loss = self._error(denoise, batch, templates, generator)
                (gradient,) = torch.autograd.grad(scale * loss, vectors)
                vectors.grad = gradient / scale
                adam.step()
                if callback is not None:
                    callback(step, loss.detach())
        vectors.grad = None
        finite("vectors, after training with this lr,", vectors.detach())
        return Concept(self.token, vectors.detach().clone())

    def attach(self, concept: Concept) -> None:
        """Put a word into the tokenizer and the text encoder, where pipelines find it; several may be in at once.

        Parameters
        ----------
        concept : Concept
            Learned here, or loaded.

        Raises
        ------
        ValueError
            If its token is in the vocabulary already, or its vectors have another width than the encoder's.
        """
        if not isinstance(concept, Concept):
            raise ValueError(f"concept must be a Concept, got {type(concept).__name__}")
        has_shape("vectors", concept.vectors, (None, self._base.embedding_dim), "the text encoder")
        before = dict(self.tokenizer.__dict__) if self._before is None else self._before
        words, _ = with_tokens(self.tokenizer, pieces_of(concept.token, len(concept.vectors)))
        every = {**self._attached, concept.token: concept}
        pieces = [piece for each in every.values() for piece in pieces_of(each.token, len(each.vectors))]
        vectors = torch.cat(
            [wide(each.vectors.detach()).to(self._base.weight.device) for each in every.values()]
        )
        ids = words.convert_tokens_to_ids(pieces)
        layer = ConceptEmbedding(self._base, ids, vectors).requires_grad_(False)
        _replaced(self.tokenizer, words.__dict__)
        self.text_encoder.set_input_embeddings(layer)
        self._before, self._attached = before, every

    def detach(self) -> None:
        """Take all attached words out: tokenizer and text encoder are as before, bit for bit."""
        if self._before is not None:
            _replaced(self.tokenizer, self._before)
            self.text_encoder.set_input_embeddings(self._base)
            self._before, self._attached = None, {}

    def _start(
        self, initializer: Any, n: int, base: nn.Embedding, generator: torch.Generator | None
    ) -> Tensor:
        """Return the vectors at the beginning (n, d)."""
        weight, width = wide(base.weight.detach()), base.embedding_dim
        if initializer is None:
            drawn = torch.rand(n, width, generator=generator, device=draw_device(generator))
            return drawn.to(weight)
        if isinstance(initializer, Tensor):
            floating("initializer", initializer)
            if initializer.ndim == 1:
                initializer = initializer.expand(n, -1)
            return has_shape("initializer", initializer, (n, width), "the text encoder").detach().to(weight)
        if not isinstance(initializer, str):
            raise ValueError(f"initializer must be a word, vectors or None, got {initializer!r}")
        ids = self.tokenizer(initializer, add_special_tokens=False)["input_ids"]
        known = self.tokenizer.convert_ids_to_tokens(ids)
        if len(ids) != 1 or known[0] == getattr(self.tokenizer, "unk_token", None):
            raise ValueError(f"initializer must be a word of one token, {initializer!r} is {known}")
        return weight[ids * n]

    def _templates(self, kind: Any) -> list[str]:
        if isinstance(kind, str):
            return list(PROMPTS[one_of("kind", kind, tuple(PROMPTS))])
        kind = _texts("kind", kind)
        for template in kind:
            if "{}" not in template and self.token not in template:
                raise ValueError(
                    f"kind must hold templates with {{}} or {self.token} in each, got {template!r}"
                )
        return kind

    def _check(self, denoise: Any, images: Any, kind: Any) -> None:
        if not isinstance(denoise, DiffusionLoss):
            raise ValueError(f"denoise must be a DiffusionLoss, got {type(denoise).__name__}")
        denoise._check(images)
        self._templates(kind)
        if self._attached:
            raise ValueError(f"{', '.join(self._attached)} must be detached before a word is learned")

    @property
    def _own(self) -> dict[str, list[str]]:
        return {self.token: pieces_of(self.token, len(self.embedding.vectors))}

    def _error(
        self,
        denoise: DiffusionLoss,
        images: Tensor,
        templates: Sequence[str],
        generator: torch.Generator | None,
    ) -> Tensor:
        texts = self.prompts(len(images), templates, generator=generator)
        error = denoise._error(images, self._encoded(texts), generator=generator)
        if self.anchor_weight:
            error = error + self.anchor_weight * self.embedding.anchor_distance().to(error)
        return error

    @contextmanager
    def _worded(self) -> Iterator[None]:
        """Let the encoder know the word that is being learned, unless others are attached."""
        if self._attached:
            yield
            return
        if self.embedding.vectors.device != self._base.weight.device:  # the encoder has moved
            self.embedding.to(self._base.weight.device)
        try:
            self.text_encoder.set_input_embeddings(self.embedding)
            yield
        finally:
            self.text_encoder.set_input_embeddings(self._base)

    def _encoded(self, prompts: Sequence[str]) -> Tensor:
        distinct = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        if self._attached:
            spelled = {token: pieces_of(token, len(each.vectors)) for token, each in self._attached.items()}
            ids, mask = self._tokens(self.tokenizer, list(distinct), spelled)
        else:
            ids, mask = self._tokens(self._words, list(distinct), self._own)
        ids = ids.to(self._base.weight.device)
        # as pipelines do: encoders in the manner of CLIP were trained to see the padding
        masked = getattr(getattr(self.text_encoder, "config", None), "use_attention_mask", False)
        options = {"attention_mask": mask.to(ids.device)} if masked else {}
        told = self.text_encoder(ids, **options)[0]
        return told[torch.tensor([distinct[text] for text in prompts], device=told.device)]

    def _tokens(
        self, tokenizer: Any, texts: list[str], spelled: dict[str, list[str]]
    ) -> tuple[Tensor, Tensor]:
        """Return tokens of texts (n, length) and their mask, each word written out as all that it stands for."""
        full = [_spelled(text, spelled) for text in texts]
        config = getattr(self.text_encoder, "config", None)
        positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        length = min(tokenizer.model_max_length, positions)
        read = tokenizer(full, padding="max_length", max_length=length, truncation=False)
        rows, masks = read["input_ids"], read["attention_mask"]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > length:
                raise ValueError(
                    f"prompts must have at most {length} tokens, {text!r} has {len(row) - length} too many"
                )
        return torch.tensor(rows), torch.tensor(masks)


def _texts(name: str, texts: Any) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"{name} must be a sequence of at least one text, got {texts!r}")
    if wrong := [each for each in texts if not isinstance(each, str)]:
        raise ValueError(f"{name} must be texts, got {wrong[0]!r}")
    return list(texts)


def _spelled(text: str, spelled: dict[str, list[str]]) -> str:
    for token, pieces in spelled.items():
        text = text.replace(token, " ".join(pieces)) if len(pieces) > 1 else text
    return text


def _replaced(tokenizer: Any, state: dict[str, Any]) -> None:
    """Give a tokenizer, which others hold, the insides of another."""
    tokenizer.__dict__.clear()
    tokenizer.__dict__.update(state)
