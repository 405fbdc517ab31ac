"""Soft prompts: a few free vectors in the place of words, tuned for a frozen two-tower model (CoOp).

The text of class c is

    begin, v_1 ... v_M, the tokens of its name, ".", end                                                 (1)

with vectors v that gradient descent chooses; everything else, and the whole model, stays as it is. An image goes to
the class whose text is nearest.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer, one_of
from posterity._precision import wide
from posterity._random import draw_device
from posterity.transfer._towers import Texts, Towers, different_names

__all__ = ["PromptLearner"]


class PromptLearner(nn.Module):
    """The prompts of some classes for a frozen two-tower model.

    Parameters
    ----------
    model : nn.Module
        ``transformers.CLIPModel`` or its kin, or a module with ``token_embedding``,
        ``encode_text(input_ids, inputs_embeds=None)``, ``encode_image(images)`` and ``logit_scale``. It is no part of
        this module, and stays as it is.
    tokenizer : callable
        Of transformers, or ``list[str] -> LongTensor (m, L)``: beginning token, words, end token, padding. The end is
        where its ``eos_token_id`` first occurs, else the largest id.
    class_names : sequence of str
        Different; "_" is read as a space.
    n_context : int, default=16
        M, at least 1; not used with ``init``.
    init : str, optional
        Words whose vectors the context starts from, such as "a photo of a": M is then the number of their tokens.
    class_specific : bool, default=False
        Whether each class has a context of its own.
    position : {"end", "middle", "front"}, default="end"
        Where the name stands: behind the context, in the middle of it, or before it.
    std : float, default=0.02
        Deviation of a context that starts from noise, at least 0.
    placeholder : str, default="X"
        A word of one token, which the vectors take the place of.
    generator : torch.Generator, optional
        Draws the noise.

    Attributes
    ----------
    context : nn.Parameter of shape (M, w) or (C, M, w)
        The only parameter, float32 at least.
    class_names : list of str

    Raises
    ------
    ValueError
        If the model is of neither kind, names are missing or repeated, the placeholder is not one token, or a text is
        too long for the model.

    References
    ----------
    .. [1] Zhou, Yang, Loy and Liu. Learning to Prompt for Vision-Language Models. IJCV 2022. Equation 2.
    .. [2] Fu, Wang, Huang and Zhang. Nemesis: Normalizing the Soft-prompt Vectors of Vision-Language Models.
       ICLR 2024. Section 3.1.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import PromptLearner
    >>> model = nn.Module()  # in the place of transformers.CLIPModel
    >>> model.token_embedding, model.logit_scale = nn.Embedding(32, 4), nn.Parameter(torch.tensor(0.0))
    >>> model.encode_text = lambda ids, inputs_embeds: inputs_embeds.cumsum(1)[torch.arange(len(ids)), ids.argmax(1)]
    >>> model.encode_image = lambda images: images
    >>> def tokenizer(texts):  # a token a letter
    ...     rows = [[28, *(ord(c) % 32 for c in text if c.isalpha()), 31] for text in texts]
    ...     return torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    >>> prompts = PromptLearner(model, tokenizer, ["cat", "dog"], n_context=3)
    >>> prompts(images=torch.randn(5, 4)).shape, [name for name, _ in prompts.named_parameters()]
    (torch.Size([5, 2]), ['context'])
    """

    def __init__(
        self, model: Any, tokenizer: Callable[..., Any], class_names: Sequence[str], *, n_context: int = 16,
        init: str | None = None, class_specific: bool = False, position: Literal["end", "middle", "front"] = "end",
        std: float = 0.02, placeholder: str = "X", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.class_names = different_names("class_names", class_names)
        integer("n_context", n_context, 1)
        one_of("class_specific", class_specific, (True, False))
        one_of("position", position, ("end", "middle", "front"))
        at_least("std", std, 0)
        if init is not None and (not isinstance(init, str) or not init.strip()):
            raise ValueError(f"init must be words, got {init!r}")
        if not isinstance(placeholder, str):
            raise ValueError(f"placeholder must be a word, got {placeholder!r}")
        self._towers = Towers(model, tokenizer)
        words = wide(self._towers.words)
        mark = self._towers.word_ids(placeholder)
        if len(mark) != 1:
            raise ValueError(f"placeholder must be a word of one token, {placeholder!r} has {len(mark)}")
        if init is not None:
            context = words[self._towers.word_ids(init)]
        else:
            drawn = torch.randn(n_context, words.shape[1], generator=generator, device=draw_device(generator))
            context = std * drawn.to(words)
        self._texts, slots = self._placed(len(context), position, placeholder, mark)
        self._slots = slots[:, :, None].expand(-1, -1, words.shape[1])  # (C, M, w)
        if class_specific:
            if init is None:
                n = len(self.class_names)
                drawn = torch.randn(n, *context.shape, generator=generator, device=draw_device(generator))
                context = std * drawn.to(words)
            else:
                context = context.repeat(len(self.class_names), 1, 1)
        self.context = nn.Parameter(context.clone())

    def encode(self, context: Float[Tensor, "*classes m w"] | None = None) -> Float[Tensor, "c d"]:
        """Return the text features of the classes, of unit norm.

        Parameters
        ----------
        context : Tensor of the shape of ``context``, optional
            To be tried in its place.

        Returns
        -------
        Tensor of shape (C, d)
        """
        if context is None:
            context = self.context
        else:
            floating("context", context)
            has_shape("context", context, tuple(self.context.shape), "the context of these prompts")
        return self._features(context[None])[0]

    def forward(
        self, images: Any = None, *, image_features: Float[Tensor, "n d"] | None = None,
        context: Float[Tensor, "*classes m w"] | None = None,
    ) -> Float[Tensor, "n c"]:  # fmt: skip
        """Return the logits of images: cosines with the classes' texts, times the model's scale.

        Parameters
        ----------
        images : Tensor, optional
            As the model takes them.
        image_features : Tensor of shape (n, d), optional
            In their place, features that the model made of them before: the model is frozen, so once is enough.
        context : Tensor of the shape of ``context``, optional
            To be tried in its place.

        Returns
        -------
        Tensor of shape (n, C)
        """
        if (images is None) == (image_features is None):
            raise ValueError("one of images and image_features must be given, got both or neither")
        return self._towers.logits(self.encode(context), images, image_features)

    def _tried(self, contexts: Tensor, image_features: Tensor) -> Float[Tensor, "k n c"]:
        """Return the logits of several contexts in one pass of the text tower.

        Parameters
        ----------
        contexts : Tensor of shape (k, *context.shape)
        image_features : Tensor of shape (n, d)

        Returns
        -------
        Tensor of shape (k, n, C)
        """
        has_shape("contexts", floating("contexts", contexts), (None, *self.context.shape))
        text = self._features(contexts)
        logits = self._towers.logits(text.flatten(0, 1), None, image_features)
        return logits.unflatten(1, text.shape[:2]).transpose(0, 1)

    def _features(self, contexts: Tensor) -> Tensor:
        """Return text features (k, C, d) of contexts (k, M, w) or (k, C, M, w)."""
        k, n = len(contexts), len(self.class_names)
        towers, texts = self._towers, self._texts
        words = towers.words
        texts = Texts(*(None if part is None else part.to(words.device) for part in texts))  # type: ignore[arg-type]
        slots = self._slots.to(words.device)
        own = contexts[:, None].expand(k, n, -1, -1) if contexts.ndim == 3 else contexts
        plain = wide(words)[texts.ids].expand(k, n, -1, -1)
        embeds = plain.scatter(2, slots.expand(k, -1, -1, -1), own.to(plain))
        many = Texts(*(None if part is None else part.repeat(k, *[1] * (part.ndim - 1)) for part in texts))  # type: ignore[arg-type]
        return towers.text(many, embeds.flatten(0, 1)).unflatten(0, (k, n))

    def _placed(self, m: int, position: str, placeholder: str, mark: Tensor) -> tuple[Texts, Tensor]:
        """Return the texts of the classes, and where in each of them the vectors go (C, M)."""
        before = {"end": m, "middle": m // 2, "front": 0}[position]
        names = [" ".join(name.replace("_", " ").split()) for name in self.class_names]
        marks = [placeholder] * m
        texts = [f"{' '.join([*marks[:before], name, *marks[before:]])}." for name in names]
        found, start, rows = self._towers.tokens(texts), self._towers.n_before, []
        for row, end, name in zip(found.ids, found.ends.tolist(), names, strict=True):
            marked = (row[start:end] == mark).nonzero()[:, 0] + start
            # a name may hold the placeholder's token itself: count from the side that is the context's
            chosen = torch.cat([marked[:before], marked[len(marked) - (m - before) :]])
            if len(chosen) != m:
                raise ValueError(
                    f"class_names: {name!r} cannot be told from the {m} placeholders {placeholder!r}"
                )
            rows.append(chosen)
        return found, torch.stack(rows)
