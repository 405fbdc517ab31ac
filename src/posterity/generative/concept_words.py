"""A learned word: its vectors, the file they travel in, and the layer that gives them in the place of a vocabulary's."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, needs, one_of
from posterity._precision import wide

__all__ = ["Concept", "ConceptEmbedding"]


class ConceptEmbedding(nn.Module):
    """A vocabulary's embedding in which some rows are free vectors, and nothing else can be trained.

    It takes the place of a text encoder's ``nn.Embedding``. The rows lie over the base, which is neither copied nor a
    part of this module: an optimiser sees ``vectors`` alone, without states or decay for the rest of the vocabulary.

    Parameters
    ----------
    base : nn.Embedding
        Stays as it is, and gets no gradient.
    ids : sequence of int
        Of the free rows, different, at least one: of tokens of the base, or of new ones beyond its end.
    vectors : Tensor of shape (n_vectors, d)
        What they start from, finite.

    Attributes
    ----------
    vectors : nn.Parameter of shape (n_vectors, d)
        The only parameter, float32 at least.
    initial : Tensor of shape (n_vectors, d)
        What it started from, a buffer.

    Raises
    ------
    ValueError
        If ``base`` is no embedding, ids are missing, negative or repeated, or the vectors do not fit.

    References
    ----------
    .. [1] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.generative import ConceptEmbedding
    >>> base = nn.Embedding.from_pretrained(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> words = ConceptEmbedding(base, [2], torch.tensor([[5.0, 6.0]]))  # a third word
    >>> words(torch.tensor([1, 2])).tolist()
    [[1.0, 1.0], [5.0, 6.0]]
    """

    ids: Tensor
    initial: Tensor

    def __init__(self, base: nn.Embedding, ids: Sequence[int], vectors: Float[Tensor, "n_vectors d"]) -> None:
        super().__init__()
        if not isinstance(base, nn.Embedding):
            raise ValueError(f"base must be an nn.Embedding, got {type(base).__name__}")
        if isinstance(ids, str) or not isinstance(ids, Sequence) or not len(ids):
            raise ValueError(f"ids must be a sequence of at least one integer, got {ids!r}")
        rows = [integer("ids", each, 0) for each in ids]
        if len(set(rows)) < len(rows):
            raise ValueError(f"ids must be different, got {rows}")
        floating("vectors", vectors)
        has_shape("vectors", vectors, (len(rows), base.embedding_dim), f"{len(rows)} ids and the base")
        where = base.weight.device
        start = wide(finite("vectors", vectors.detach())).to(where, copy=True)
        self.register_buffer("ids", torch.tensor(rows, device=where), persistent=False)
        self.register_buffer("initial", start.clone(), persistent=False)
        self.vectors = nn.Parameter(start)
        self._base = (base,)  # in a tuple, where nn.Module does not look for parts

    @property
    def base(self) -> nn.Embedding:
        """The embedding below."""
        return self._base[0]

    @property
    def weight(self) -> Tensor:
        """The vocabulary of the base, for what asks a text encoder for its dtype or device."""
        return self.base.weight

    def forward(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d"]:
        """Return the vectors of tokens, in the dtype of the base.

        Parameters
        ----------
        tokens : Tensor of any shape
            Indices of the base or of the free rows.

        Returns
        -------
        Tensor of shape (*tokens.shape, d)
        """
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens must hold indices, got {got}")
        found = tokens[..., None] == self.ids
        ours = found.any(-1)
        plain = F.embedding(tokens.masked_fill(ours, 0), self.base.weight.detach())
        free = self.vectors.to(plain.dtype)[found.int().argmax(-1)]
        return torch.where(ours[..., None], free, plain)

    def anchor_distance(self) -> Float[Tensor, ""]:
        """Return the mean over vectors of the squared distance from where they started."""
        return (self.vectors - self.initial).square().sum(1).mean()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.base._apply(fn)  # an encoder that holds this layer moves whole
        return super()._apply(fn, recurse)


@dataclass
class Concept:
    """A learned word.

    Attributes
    ----------
    token : str
        As it stands in prompts.
    vectors : Tensor of shape (n_vectors, d)
        Of the width of the text encoder that it was learned for; it means nothing to another.

    Raises
    ------
    ValueError
        If the token is empty or holds a space, or the vectors are not finite numbers of shape (n_vectors, d).

    Examples
    --------
    >>> import tempfile, torch
    >>> from posterity.generative import Concept
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Concept("<cat>", torch.tensor([[1.0, 2.0]])).save(f"{folder}/cat.safetensors")
    ...     Concept.load(f"{folder}/cat.safetensors")
    Concept(token='<cat>', vectors=tensor([[1., 2.]]))
    """

    token: str
    vectors: Float[Tensor, "n_vectors d"]

    def __post_init__(self) -> None:
        checked_token(self.token)
        floating("vectors", self.vectors)
        if self.vectors.ndim != 2 or not self.vectors.numel():
            raise ValueError(
                f"vectors must have shape (n_vectors, d), none of them 0, got {tuple(self.vectors.shape)}"
            )
        finite("vectors", self.vectors.detach())

    def save(self, path: str | os.PathLike[str], format: Literal["diffusers", "a1111"] = "diffusers") -> None:
        """Write the word to a file.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.safetensors`` or, as torch saves, in ``.bin`` or ``.pt``.
        format : {"diffusers", "a1111"}, default="diffusers"
            A dict from the token to its vectors; or what the web UI of that name reads, in a ``.pt`` or ``.bin``.

        Raises
        ------
        ValueError
            If the ending or the format is another, or the two do not go together.
        """
        one_of("format", format, ("diffusers", "a1111"))
        to = _with_ending(path)
        vectors = self.vectors.detach().cpu().contiguous().clone()
        if to.suffix == ".safetensors":
            if format == "a1111":
                raise ValueError(f"path must end in .pt or .bin for format='a1111', got {to.name}")
            needs("safetensors.torch", "generative").save_file({self.token: vectors}, str(to))
        elif format == "diffusers":
            torch.save({self.token: vectors}, to)
        else:
            torch.save(
                {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": self.token}, to
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, token: str | None = None) -> "Concept":
        """Read a word from a file of either format; no code of the file is run.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.safetensors``, ``.bin`` or ``.pt``.
        token : str, optional
            Which, where the file holds several.

        Returns
        -------
        Concept

        Raises
        ------
        ValueError
            If the file holds no vectors, or several tokens of which none is chosen.
        """
        file = _with_ending(path)
        if not file.is_file():
            raise ValueError(f"path must be a file, got {file}")
        try:
            if file.suffix == ".safetensors":
                held: Any = needs("safetensors.torch", "generative").load_file(str(file))
            else:
                held = torch.load(file, map_location="cpu", weights_only=True)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # each library has its own for a file that is not of its kind
            raise ValueError(f"path must be a file of learned words, {file.name} cannot be read") from error
        if isinstance(held, dict) and isinstance(held.get("string_to_param"), dict):
            held = {held.get("name", file.stem): next(iter(held["string_to_param"].values()), None)}
        if (
            not isinstance(held, dict)
            or not held
            or not all(isinstance(each, Tensor) for each in held.values())
        ):
            raise ValueError(f"path must be a file of vectors by token, {file.name} is none")
        if token is not None:
            one_of("token", token, list(held))
        elif len(held) > 1:
            raise ValueError(f"token must be given for a file of several tokens, one of {', '.join(held)}")
        name = next(iter(held)) if token is None else token
        vectors = held[name].detach()
        return cls(name, vectors[None] if vectors.ndim == 1 else vectors)


def checked_token(token: Any) -> str:
    """Return a token: a text that is one word."""
    if not isinstance(token, str) or not token or any(letter.isspace() for letter in token):
        raise ValueError(f"token must be a text without spaces, got {token!r}")
    return token


def pieces_of(token: str, n: int) -> list[str]:
    """Return the tokens that a word stands for, named as diffusers names them."""
    return [token, *(f"{token}_{k}" for k in range(1, n))]


def with_tokens(tokenizer: Any, pieces: list[str]) -> tuple[Any, list[int]]:
    """Return a copy of a tokenizer that knows these tokens, and their ids."""
    known = tokenizer.get_vocab()
    if old := [piece for piece in pieces if piece in known]:
        raise ValueError(f"token must be new to the tokenizer, {old[0]!r} is in its vocabulary")
    words = copy.deepcopy(tokenizer)
    words.add_tokens(pieces)
    ids = words.convert_tokens_to_ids(pieces)
    read = words(" ".join(pieces), add_special_tokens=False)["input_ids"]
    if list(read) != list(ids):
        raise ValueError(f"token must be read as one, this tokenizer reads {pieces[0]!r} in pieces")
    return words, ids


def _with_ending(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path must be a path, got {path!r}")
    file = Path(path)
    if file.suffix not in (".safetensors", ".bin", ".pt"):
        raise ValueError(f"path must end in .safetensors, .bin or .pt, got {file.name!r}")
    return file
