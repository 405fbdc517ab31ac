"""Text: running words, as numbers of a vocabulary."""

import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn import datasets

from posterity.lab.data import Kind, Source, dataset, load

__all__ = ["Text", "TextData", "load_text", "words_of"]

Text = Annotated[str, Kind("text", (".txt", ".md"))]

WORD = re.compile(r"\w+(?:['’]\w+)*")
SHIPPED = ("iris", "wine", "digits", "breast_cancer", "diabetes", "linnerud")
LEAST, DIFFERENT = 20, 5  # words to cut sequences from, and to tell apart


@dataclass(frozen=True)
class TextData:
    """Words in the order in which they stand.

    Attributes
    ----------
    tokens : ndarray of shape (n,), int64
        Numbers of words in the vocabulary.
    vocabulary : tuple of str
        Each word once, in the order of the alphabet.
    note : str
        What was read and what was done to it.
    """

    tokens: ndarray
    vocabulary: tuple[str, ...]
    note: str = ""


def load_text(data: str, *, seed: int = 0) -> TextData:
    """Return the words of a name or file.

    Parameters
    ----------
    data : str
        A registered name, or a file of UTF-8 text; cut into words by `words_of`.
    seed : int, default=0
        For generated text, of which there is none.

    Returns
    -------
    TextData

    Raises
    ------
    ValueError
        If the file is no UTF-8 text or has no word; the message names it.
    """
    return load(Text, data, seed=seed)


def read_text(source: Source) -> TextData:
    """Return the words of a file."""
    source.option({})
    (path,) = source.paths
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.name} is no UTF-8 text, byte {error.start} is none of it") from error
    if "\0" in text:
        raise ValueError(f"{source.name} is no text, character {text.index(chr(0))} is NUL")
    return _of_words(words_of(text), source.name)


def require_text(text: TextData) -> None:
    """Refuse text too short or too uniform to be read back."""
    n, different = len(text.tokens), len(text.vocabulary)
    if n < LEAST or different < DIFFERENT:
        raise ValueError(
            f"at least {LEAST} words, {DIFFERENT} of them different, are needed; has {n}, {different} different"
        )


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case.

    A word is a run of letters, digits and underscores, of any script, with apostrophes inside
    ("don't"); everything else, punctuation and layout, is left out.

    Parameters
    ----------
    text : str

    Returns
    -------
    list of str

    Examples
    --------
    >>> from posterity.lab.data import words_of
    >>> words_of("Let's go - 2 of us!")
    ["let's", 'go', '2', 'of', 'us']
    """
    return WORD.findall(text.lower())


def _of_words(words: list[str], name: str) -> TextData:
    if not words:
        raise ValueError(f"{name}: has no word")
    vocabulary, tokens = np.unique(np.asarray(words), return_inverse=True)
    note = f"{name}: {len(words):,} words, {len(vocabulary):,} different"
    return TextData(tokens.astype(np.int64), tuple(map(str, vocabulary)), note)


@dataset(Text, "sklearn-descr")
def sklearn_descr(seed: int) -> TextData:
    """Return the descriptions that scikit-learn gives of the data sets that ship with it."""
    texts = [getattr(datasets, f"load_{name}")().DESCR for name in SHIPPED]
    return _of_words(words_of(" ".join(texts)), "sklearn-descr")
