"""Two-tower models as prompt tuning takes them: texts and images to one space, the text's word vectors replaced.

A model is ``transformers.CLIPModel`` or its kin (``text_model``, ``get_text_features``, ``get_image_features``,
``logit_scale``), or any module with

    token_embedding   nn.Embedding (V, w)
    encode_text       (input_ids (m, L), inputs_embeds=None (m, L, w)) -> (m, d), pooled at the end token of input_ids
    encode_image      (images) -> (n, d)
    logit_scale       0-d, the logarithm of the scale

Its parameters are constants here: no gradient reaches them, their flags and modes stay as they were.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posterity._checks import floating, has_shape
from posterity._models import held
from posterity._precision import unit_rows, wide

__all__ = ["Texts", "Towers", "different_names"]

KIN = ("text_model", "get_text_features", "get_image_features", "logit_scale")
PLAIN = ("token_embedding", "encode_text", "encode_image", "logit_scale")


class Texts(NamedTuple):
    """Tokens (m, L) on the model's device, where each text ends (m,), and what the tokenizer masks (m, L) if it does."""

    ids: Tensor
    ends: Tensor
    mask: Tensor | None


class Towers:
    """A frozen two-tower model and its tokenizer; no module, so that a prompt's parameters are the prompt's alone.

    Parameters
    ----------
    model : nn.Module
        See the top of this file.
    tokenizer : callable
        Of transformers, or ``list[str] -> LongTensor (m, L)``; a row is a beginning token, words, an end token,
        padding. The end is where ``tokenizer.eos_token_id`` first occurs, else the largest id.
    """

    def __init__(self, model: Any, tokenizer: Callable[..., Any]) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
        if not callable(tokenizer):
            raise ValueError(f"tokenizer must be callable on a list of texts, got {type(tokenizer).__name__}")
        self.is_kin = all(hasattr(model, name) for name in KIN)
        lacks = [name for name in PLAIN if not hasattr(model, name)]
        if not self.is_kin and lacks:
            kind = type(model).__name__
            raise ValueError(f"model must be a CLIPModel or have {', '.join(PLAIN)}: {kind} lacks {lacks}")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.embedding: Any = (
            self.model.text_model.get_input_embeddings() if self.is_kin else model.token_embedding
        )
        if not isinstance(self.embedding, nn.Module) or not hasattr(self.embedding, "weight"):
            raise ValueError(f"token_embedding must be an nn.Embedding, got {type(self.embedding).__name__}")
        self.n_before = int(self._padded([""]).ends[0])  # tokens before the first word
        self.may_cut = self._same_without_padding()

    @property
    def words(self) -> Tensor:
        """The word vectors of the whole vocabulary (V, w), constants."""
        return self.embedding.weight.detach()

    @property
    def n_positions(self) -> int | None:
        """How many tokens a text may have, where the model says so."""
        config = getattr(getattr(self.model, "config", None), "text_config", None)
        return getattr(config, "max_position_embeddings", getattr(self.model, "context_length", None))

    def tokens(self, texts: Sequence[str]) -> Texts:
        """Return the tokens of texts, without the padding that all share where it changes no feature."""
        found = self._padded(texts)
        if not self.may_cut:
            return found
        return _cut(found, int(found.ends.max()) + 1)

    def word_ids(self, text: str) -> Tensor:
        """Return the ids of a text's own tokens (k,), without beginning and end."""
        found = self._padded([text])
        return found.ids[0, self.n_before : int(found.ends[0])]

    def text(self, texts: Texts, embeds: Tensor) -> Tensor:
        """Return the features (m, d) of texts whose word vectors (m, L, w) are given, of unit norm, float32 at least."""
        embeds = embeds.to(self.words.dtype)
        with held(self.model):
            if not self.is_kin:
                found = self.model.encode_text(texts.ids, inputs_embeds=embeds)
            else:
                hook = self.embedding.register_forward_hook(lambda module, args, output: embeds)
                try:
                    found = self.model.get_text_features(input_ids=texts.ids, attention_mask=texts.mask)
                finally:
                    hook.remove()
        return _unit(found)

    def image(self, images: Any) -> Tensor:
        """Return the features (n, d) of images as the model takes them, of unit norm, float32 at least."""
        with held(self.model):
            if not self.is_kin:
                return _unit(self.model.encode_image(images))
            return _unit(self.model.get_image_features(pixel_values=images))

    def logits(self, text: Tensor, images: Any, image_features: Any) -> Tensor:
        """Return the scaled cosines (n, m) of either images or their features with text features (m, d)."""
        if images is not None:
            features = self.image(images)
        else:
            floating("image_features", image_features)
            has_shape("image_features", image_features, (None, text.shape[1]), "text features of that width")
            features = _unit(image_features.to(text.device))
        features = features.to(text.dtype)
        with torch.autocast(text.device.type, enabled=False):
            return wide(self.model.logit_scale.detach()).exp() * features @ text.T

    def _padded(self, texts: Sequence[str]) -> Texts:
        """Return the tokens as the tokenizer pads them."""
        mask, end, device = None, getattr(self.tokenizer, "eos_token_id", None), self.words.device
        if end is None:
            ids = self.tokenizer(list(texts))
        else:
            length = self.n_positions
            how: dict[str, Any] = (
                {"padding": "max_length", "max_length": length} if length else {"padding": True}
            )
            rows = self.tokenizer(list(texts), truncation=False, **how)
            for text, row in zip(texts, rows["input_ids"], strict=True):
                if length and len(row) > length:
                    raise ValueError(f"{text!r} has {len(row)} tokens, the model has {length} positions")
            ids = torch.tensor(rows["input_ids"])
            mask = torch.tensor(rows["attention_mask"]) if "attention_mask" in rows else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(texts) or ids.is_floating_point():
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"tokenizer must return integers of shape ({len(texts)}, L), got {got}")
        if end is not None and not bool((ids == end).any(1).all()):
            raise ValueError(f"tokenizer must end each text with eos_token_id, {end}, which a row lacks")
        ends = ids.argmax(1) if end is None else (ids == end).int().argmax(1)
        return Texts(ids.long().to(device), ends.to(device), None if mask is None else mask.to(device))

    def _same_without_padding(self) -> bool:
        """Return whether what follows the end token changes nothing, as with causal attention."""
        padded = self._padded(["a"])
        cut = _cut(padded, int(padded.ends[0]) + 1)
        if cut.ids.shape == padded.ids.shape:
            return True
        with torch.no_grad():
            whole = self.text(padded, self.words[padded.ids])
            try:
                short = self.text(cut, self.words[cut.ids])
            except (RuntimeError, ValueError):  # a tower of one length
                return False
        return whole.shape == short.shape and torch.allclose(
            whole, short, atol=4 * torch.finfo(self.words.dtype).eps ** 0.75
        )


def different_names(name: str, names: Any) -> list[str]:
    """Return names as a list: at least one, texts, none twice."""
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(n, str) for n in names)
    ):
        raise ValueError(f"{name} must be a sequence of texts, got {names!r}")
    if not names or not all(each.strip() for each in names):
        raise ValueError(f"{name} must hold at least one name and no empty one, got {list(names)}")
    if twice := sorted({each for each in names if list(names).count(each) > 1}):
        raise ValueError(f"{name} must be different, got {twice[0]!r} twice")
    return list(names)


def _cut(texts: Texts, length: int) -> Texts:
    return Texts(texts.ids[:, :length], texts.ends, None if texts.mask is None else texts.mask[:, :length])


def _unit(output: Any) -> Tensor:
    """Return features of unit norm; newer versions of transformers wrap the projected ones."""
    return unit_rows(output if isinstance(output, Tensor) else output.pooler_output)
