"""Compositional soft prompts (CSP): the vectors of attributes and objects are tuned, and put together anew.

A frozen two-tower model, as CLIP, names an image by the prompt whose features are nearest to the image's. The prompt
of attribute a and object o is

    t(a, o) = [begin] a photo of  v_a  v_o  [end] ,                                                     (1)

in which the vectors v_a and v_o are rows of a table, at first the model's own word vectors, and the table is all that
is learned: by the cross-entropy, over all pairs that have labelled images, of

    p(a, o | x) = softmax of  exp(s) cos(image(x), text(t(a, o))) .                                     (2)

v_old is learned from old cars and old trees alike. So it can be put before "cat", of which no old one was seen: any
rows make a class. Where any pair may occur, `feasibility` tells those worth asking for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posterity._checks import finite, floating, has_shape, indices, integer, within
from posterity._precision import unit_rows, wide, widened
from posterity.transfer._towers import Texts, Towers, different_names

__all__ = ["CompositionalPrompts", "feasibility", "feasible_logits"]

SLOTS = "{} {}"


class CompositionalPrompts(nn.Module):
    """Prompts put together from tuned vectors, one an attribute and one an object (equation 1).

    Parameters
    ----------
    model : nn.Module
        Frozen, and not a part of this module: ``transformers.CLIPModel``, or any with the attributes
        ``token_embedding`` (nn.Embedding), ``encode_text(input_ids, inputs_embeds=None)``, pooled at the end token,
        ``encode_image(images)`` and ``logit_scale``, the logarithm of s in equation 2.
    tokenizer : callable
        The model's, of transformers; or ``list[str] -> LongTensor (m, L)`` with rows of a beginning token, words,
        an end token (the largest id) and padding.
    attributes, objects : sequence of str
        Words, at least one each, none twice; a row of the table each. They may have several tokens.
    template : str, default="a photo of {} {}"
        Ends with its two slots; of more than two words the first ones are attributes.
    dropout : float, default=0.0
        Share, in [0, 1), of the numbers of the table that are 0 at a call in training mode.
    placeholder : str, default="X"
        Fills the slots while the template is made into tokens, one token each. No effect else.
    trainable : Tensor of shape (n_attributes + n_objects,), optional
        Bool: which rows are tuned. The others are at each call what they were at first, or when loaded: no gradient
        reaches them, and what weight decay does to them in the parameter is not read. None: all are tuned.

    Attributes
    ----------
    vocabulary : Parameter of shape (n_attributes + n_objects, width)
        The table, attributes first. All there is in ``parameters()`` and ``state_dict()``.
    attributes, objects : list of str

    Raises
    ------
    ValueError
        If a name is empty or there twice, the placeholder has not one token, the template does not end with its
        slots or is longer than the model's positions, or the model lacks an attribute (named); at the call if pairs
        are no indices in range, or not one of ``images`` and ``image_features`` is given, or they do not fit.

    Notes
    -----
    1. A row starts as the mean of the model's vectors of the word's tokens, in lower case, "." read as a space. Words
       of one token give the model's own text features exactly, before training.
    2. Train on the cross-entropy over the pairs that have images; in the official settings by Adam, 5e-5 to 5e-4,
       weight decay 1e-5, 20 epochs, dropout 0.2 or 0.3. The image tower is frozen: compute ``image_features``
       once. Those of `model`, or of any other library that gives the same, need no unit norm.
    3. Text is cut behind the end token where that changes no feature (causal attention): a prompt costs 8 positions,
       not 77. The model is not moved with this module: move it first. Results have the dtype and device of
       ``vocabulary``, which is float32 for models in half precision.

    References
    ----------
    .. [1] Nayak, Yu, Bach. Learning to Compose Soft Prompts for Compositional Zero-Shot Learning. ICLR 2023.
       Section 4.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import CompositionalPrompts
    >>> class Model(nn.Module):  # any two towers; from transformers: CLIPModel.from_pretrained(name)
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.token_embedding, self.logit_scale = nn.Embedding(9, 4), nn.Parameter(torch.zeros(()))
    ...     def encode_text(self, input_ids, inputs_embeds=None):
    ...         return inputs_embeds.cumsum(1)[torch.arange(len(input_ids)), input_ids.argmax(1)]
    ...     def encode_image(self, images):
    ...         return images
    >>> words = ["", "a", "X", "wet", "old", "dog", "cat"]
    >>> def tokenizer(texts):
    ...     rows = [[7, *(words.index(word) for word in text.split()), 8] for text in texts]
    ...     return torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    >>> prompts = CompositionalPrompts(Model(), tokenizer, ["wet", "old"], ["dog", "cat"], template="a {} {}")
    >>> [name for name, _ in prompts.named_parameters()], prompts.vocabulary.shape
    (['vocabulary'], torch.Size([4, 4]))
    >>> seen = torch.tensor([[0, 0], [1, 0], [1, 1]])  # wet dog, old dog, old cat
    >>> prompts(pairs=seen, image_features=torch.randn(5, 4)).shape  # to train on
    torch.Size([5, 3])
    >>> prompts(pairs=torch.tensor([[0, 1]]), image_features=torch.randn(5, 4)).shape  # wet cat, never seen
    torch.Size([5, 1])
    """

    initial: Tensor
    trained: Tensor

    def __init__(
        self, model: Any, tokenizer: Callable[..., Any], attributes: Sequence[str], objects: Sequence[str], *,
        template: str = "a photo of {} {}", dropout: float = 0.0, placeholder: str = "X",
        trainable: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attributes = different_names("attributes", attributes)
        self.objects = different_names("objects", objects)
        n_rows = len(self.attributes) + len(self.objects)
        within("dropout", dropout, 0, 1, open_high=True)
        if not isinstance(template, str) or not template.endswith(SLOTS) or template.count("{}") != 2:
            raise ValueError(f'template must end with its two slots, "{SLOTS}", got {template!r}')
        if not isinstance(placeholder, str):
            raise ValueError(f"placeholder must be a word of one token, got {placeholder!r}")
        if trainable is not None:
            if not isinstance(trainable, Tensor) or trainable.dtype != torch.bool:
                got = trainable.dtype if isinstance(trainable, Tensor) else type(trainable).__name__
                raise ValueError(f"trainable must be a bool tensor, got {got}")
            has_shape("trainable", trainable, (n_rows,), "attributes and objects")
        self.towers = Towers(model, tokenizer)
        self.template, self.placeholder = template, placeholder
        own = self.towers.word_ids(placeholder)
        if len(own) != 1:
            raise ValueError(f"placeholder must be a word of one token, {placeholder!r} has {len(own)}")
        self._texts: dict[int, Texts] = {}
        self._text(2)
        rows = [self._first(name) for name in (*self.attributes, *self.objects)]
        self.vocabulary = nn.Parameter(torch.stack(rows))
        self.dropout = nn.Dropout(dropout)
        if trainable is not None:
            device = self.vocabulary.device
            self.register_buffer("trained", trainable.to(device, copy=True)[:, None], persistent=False)
            self.register_buffer("initial", self.vocabulary.detach().clone(), persistent=False)
        self.some = trainable is not None

    def encode(
        self, pairs: Int[Tensor, "m k"], *, batch_size: int | None = None
    ) -> Float[Tensor, "m features"]:
        """Return text features of compositions.

        Parameters
        ----------
        pairs : Tensor of shape (m, k), int
            A row a composition: one or more indices of attributes, then that of the object. m is at least 1.
        batch_size : int, optional
            How many go through the text tower at once, at least 1. None: all.

        Returns
        -------
        Tensor of shape (m, d), of unit norm
        """
        return self._encode(pairs, batch_size).to(self.vocabulary)

    def forward(
        self, images: Any = None, pairs: Int[Tensor, "m k"] | None = None, *,
        image_features: Float[Tensor, "n features"] | None = None,
    ) -> Float[Tensor, "n m"]:  # fmt: skip
        """Return logits of images over compositions, the exponent of equation 2.

        Parameters
        ----------
        images : Tensor, optional
            As the model takes them.
        pairs : Tensor of shape (m, k), int, optional
            As `encode` takes them. None: each attribute with each object, the objects of the first attribute first.
        image_features : Tensor of shape (n, d), optional
            In place of images; any norm.

        Returns
        -------
        Tensor of shape (n, m)
        """
        if (images is None) == (image_features is None):
            raise ValueError(
                f"one of images and image_features must be given, got {'both' if images is not None else 'none'}"
            )
        if images is not None and not isinstance(images, Tensor):
            raise ValueError(f"images must be a tensor as the model takes it, got {type(images).__name__}")
        if image_features is not None:
            floating("image_features", image_features)
        if pairs is None:
            sizes = torch.arange(len(self.attributes)), torch.arange(len(self.objects))
            pairs = torch.cartesian_prod(*sizes)
        text = self._encode(pairs, None)
        if image_features is not None:
            image_features = image_features.to(text.dtype)
        return self.towers.logits(text, images, image_features).to(self.vocabulary)

    def _encode(self, pairs: Tensor, batch_size: int | None) -> Tensor:
        """Return text features on the model's device, in float32 at least."""
        rows = self._rows(pairs)
        n = len(rows) if batch_size is None else integer("batch_size", batch_size, 1)
        template, words = self._text(rows.shape[1]), self.towers.words
        ids = template.ids.to(words.device)
        mask = None if template.mask is None else template.mask.to(words.device)
        end = int(template.ends[0])
        before, behind = words[ids[0]].tensor_split([end - rows.shape[1], end])[::2]
        # dropout once a call, so that a word is the same in all compositions
        table = self.dropout(self._table()).to(words)
        done = []
        for part in rows.to(words.device).split(n):
            m = len(part)
            around = [before.expand(m, -1, -1), table[part], behind.expand(m, -1, -1)]
            ends = template.ends.to(words.device).expand(m)
            texts = Texts(ids.expand(m, -1), ends, None if mask is None else mask.expand(m, -1))
            done.append(self.towers.text(texts, torch.cat(around, dim=1)))
        return torch.cat(done)

    def _table(self) -> Tensor:
        """Return the rows as they are used."""
        return torch.where(self.trained, self.vocabulary, self.initial) if self.some else self.vocabulary

    def _rows(self, pairs: Any) -> Tensor:
        """Return the rows of the table that compositions are made of."""
        if indices("pairs", pairs, (None, None)).shape[1] < 2 or not len(pairs):
            raise ValueError(
                f"pairs must have shape (m, 2) or (m, k), k > 2, m > 0, got {tuple(pairs.shape)}"
            )
        pairs = pairs.long()
        if pairs.device.type == "cpu":
            for what, part, n in (
                ("an attribute, ", pairs[:, :-1], len(self.attributes)),
                ("the object, last, ", pairs[:, -1], len(self.objects)),
            ):
                low, high = (int(edge) for edge in part.aminmax())
                if low < 0 or high >= n:
                    raise ValueError(f"pairs: {what}must be in 0..{n - 1}, got values from {low} to {high}")
        return torch.cat([pairs[:, :-1], pairs[:, -1:] + len(self.attributes)], dim=1)

    def _text(self, k: int) -> Texts:
        """Return the tokens of the template with k slots, which end it."""
        if k not in self._texts:
            text = self.template.removesuffix(SLOTS) + " ".join([self.placeholder] * k)
            found = self.towers.tokens([text])
            end = int(found.ends[0])
            slots = found.ids[0, max(end - k, self.towers.n_before) : end]
            if len(slots) != k or not bool((slots == self.towers.word_ids(self.placeholder)).all()):
                raise ValueError(
                    f"template must end with its slots, a token each: {text!r} has {slots.tolist()} there"
                )
            self._texts[k] = found
        return self._texts[k]

    def _first(self, name: str) -> Tensor:
        """Return the mean of the model's vectors of a word's tokens."""
        ids = self.towers.word_ids(name.replace(".", " ").lower())
        if not len(ids):
            raise ValueError(f"attributes and objects must have a token each, {name!r} has none")
        return wide(self.towers.words[ids]).mean(0)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save what is used: rows that are not tuned are kept as they are at each call."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.some and not keep_vars:
            destination[f"{prefix}vocabulary"] = self._table().detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        if self.some:
            self.initial = self.vocabulary.detach().clone()

    def extra_repr(self) -> str:
        return f"{len(self.attributes)} attributes, {len(self.objects)} objects, template={self.template!r}"


@widened
def feasibility(
    seen_pairs: Int[Tensor, "pairs 2"], attribute_embeddings: Float[Tensor, "attributes width"],
    object_embeddings: Float[Tensor, "objects length"],
) -> Float[Tensor, "attributes objects"]:  # fmt: skip
    """Return how like a pair is to pairs that were seen, by the likeness of words.

    For a pair (a, o) that was not seen: the mean of the largest cosine of o with an object that was seen with a, and
    of the largest cosine of a with an attribute that was seen with o; -1 in place of either where there is none.

    Parameters
    ----------
    seen_pairs : Tensor of shape (p, 2), int
        Attribute and object of each pair that has images.
    attribute_embeddings, object_embeddings : Tensor of shape (n_attributes, w) and (n_objects, w')
        Vectors of words; GloVe in the official code. ``prompts.vocabulary`` before training will do.

    Returns
    -------
    Tensor of shape (n_attributes, n_objects)
        In [-1, 1]; 1 for pairs that were seen.

    Raises
    ------
    ValueError
        If an index is out of range, or an embedding is not finite.

    Notes
    -----
    1. The official code gives 0 to pairs that were seen and keeps them by a mask.

    References
    ----------
    .. [1] Nayak, Yu, Bach. CSP. ICLR 2023. Appendix; after Mancini et al. Open World Compositional Zero-Shot
       Learning. CVPR 2021. Section 3.3.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import feasibility
    >>> attributes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # wet, old: cosine 0
    >>> objects = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # dog, cat: cosine 0.6
    >>> feasibility(torch.tensor([[0, 0], [1, 0], [1, 1]]), attributes, objects)
    tensor([[1.0000, 0.3000],
            [1.0000, 1.0000]])
    """
    for name, value in (
        ("attribute_embeddings", attribute_embeddings),
        ("object_embeddings", object_embeddings),
    ):
        finite(name, has_shape(name, floating(name, value), (None, None)))
    n_attributes, n_objects = len(attribute_embeddings), len(object_embeddings)
    pairs = _two("seen_pairs", seen_pairs, (n_attributes, n_objects)).to(attribute_embeddings.device)
    seen = torch.zeros(n_attributes, n_objects, dtype=torch.bool, device=pairs.device)
    seen[pairs[:, 0], pairs[:, 1]] = True
    by_object = _nearest(object_embeddings, seen)
    by_attribute = _nearest(attribute_embeddings, seen.T).T
    dtype = torch.promote_types(by_object.dtype, by_attribute.dtype)
    mean = (by_object.to(dtype) + by_attribute.to(by_object.device, dtype)) / 2
    return mean.masked_fill(seen, 1.0).to(attribute_embeddings.dtype)


def feasible_logits(
    logits: Float[Tensor, "n m"], pairs: Int[Tensor, "m 2"], seen: Bool[Tensor, " m"],
    feasibility: Float[Tensor, "attributes objects"], *, threshold: float,
) -> Float[Tensor, "n m"]:  # fmt: skip
    """Return logits in which unseen pairs below a threshold of feasibility are ruled out.

    Parameters
    ----------
    logits : Tensor of shape (n, m)
        Of samples for candidates.
    pairs : Tensor of shape (m, 2), int
        The candidates.
    seen : Tensor of shape (m,), bool
        Which of them have training images; these are never ruled out.
    feasibility : Tensor of shape (n_attributes, n_objects)
        As `feasibility` returns it.
    threshold : float
        Choose it on validation data, by ``composition_metrics(...).auc``: some 50 values from the lowest to the highest.

    Returns
    -------
    Tensor of shape (n, m)
        -inf for a pair that is not seen and whose feasibility is below the threshold.

    Raises
    ------
    ValueError
        If shapes do not fit, an index is out of range, or no candidate is left.

    Notes
    -----
    1. The official code multiplies by 0, which promotes a pair whose competitors have negative cosines.

    References
    ----------
    .. [1] Nayak, Yu, Bach. CSP. ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import feasible_logits
    >>> pairs, seen = torch.tensor([[0, 0], [0, 1], [1, 1]]), torch.tensor([True, False, False])
    >>> feasible_logits(torch.tensor([[-3.0, -1.0, -2.0]]), pairs, seen, torch.tensor([[1.0, -0.2], [0.0, 0.4]]), threshold=0.1)
    tensor([[-3., -inf, -2.]])
    """
    has_shape("logits", floating("logits", logits), (None, None))
    has_shape("feasibility", floating("feasibility", feasibility), (None, None))
    m = logits.shape[1]
    pairs = has_shape("pairs", _two("pairs", pairs, tuple(feasibility.shape)), (m, 2), "logits")
    _which("seen", seen, m)
    within("threshold", threshold, -float("inf"), float("inf"))
    scores = feasibility.to(logits.device)[tuple(pairs.to(logits.device).T)]
    keep = seen.to(logits.device) | (scores >= threshold)
    if keep.device.type == "cpu" and not bool(keep.any()):
        raise ValueError(f"threshold must leave a candidate, {threshold} is above all, and none is seen")
    return logits.masked_fill(~keep, -float("inf"))


def _two(name: str, pairs: Any, sizes: tuple[int, ...]) -> Tensor:
    """Return pairs of indices of an attribute and an object."""
    indices(name, pairs, (None, 2), source="attribute and object")
    for what, column, n in zip(("attribute", "object"), pairs.T, sizes, strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < n:
            low, high = (int(edge) for edge in column.aminmax())
            raise ValueError(f"{name}: an {what} must be in 0..{n - 1}, got values from {low} to {high}")
    return pairs.long()


def _which(name: str, value: Any, m: int) -> Tensor:
    """Return a mask of m candidates."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a bool tensor, got {got}")
    return has_shape(name, value, (m,), "one a candidate")


def _nearest(embeddings: Tensor, seen: Tensor) -> Tensor:
    """Return the largest cosine of each word (column) with one that was seen with each partner (row), or -1."""
    unit = unit_rows(embeddings) if embeddings.shape[1] else embeddings
    cosine = unit @ unit.T
    none = cosine.new_full((len(cosine),), -1.0)
    rows = [cosine[:, mates].amax(1) if bool(mates.any()) else none for mates in seen.to(cosine.device)]
    return torch.stack(rows) if rows else cosine.new_zeros(0, len(cosine))
