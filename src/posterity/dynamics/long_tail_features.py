r"""Long-tailed data on which only learned features help, and what tells so.

A category has a familiar sequence of concepts, with many sentences in the training set, and an unfamiliar
one, its tail, with one or a few. A sentence has for each concept one of its words at random, so that two
sentences of one sequence seldom share words: which words belong together must be learned from the familiar
sentences, and then the tail is easy. `equipartition_kernel` is the best that fixed features can do instead,
`success_bound` a limit for all of them, `ConceptMixer` a network that learns the concepts.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import class_indices, has_shape, integer, one_of
from posterity._random import draw_device
from posterity.dynamics.equipartition import even, words

__all__ = ["ConceptMixer", "ConceptSequences", "nearest_neighbor_accuracy", "one_hot_kernel"]

COMPARED = 2**24  # similarities that are compared at once: 16 MiB of truth values


class ConceptSequences:
    """Sentences of categories that have a familiar and an unfamiliar sequence of concepts each.

    Parameters
    ----------
    length : int, default=9
        Words in a sentence, at least 2.
    n_words, n_concepts : int, default=150 and 5
        The first a multiple of the second: concepts have equally many words.
    n_categories : int, default=1000
        Each with two sequences.
    shuffle_words : bool, default=False
        Whether words are in concepts at random; if not, the first words are in the first concept.
    generator : torch.Generator, optional
        Draws familiar sequences, unfamiliar ones, concepts of words if they are shuffled, then what is
        sampled. By default torch's global one.

    Attributes
    ----------
    concept_of : Tensor of shape (n_words,)
        The concept of each word.
    familiar, unfamiliar : Tensor of shape (n_categories, length)
        Sequences of concepts, uniform and independent, so that two categories may have the same.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    .. [1] Laurent, von Brecht, Bresson. Long-Tailed Learning Requires Feature Learning. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import ConceptSequences
    >>> data = ConceptSequences(4, 12, 3, 10, generator=torch.Generator().manual_seed(0))
    >>> x, y = data.train(6, n_unfamiliar=1)
    >>> x.shape, bool((data.concept_of[x[-1]] == data.unfamiliar[y[-1]]).all())
    (torch.Size([60, 4]), True)
    """

    concept_of: Int[Tensor, " words"]
    familiar: Int[Tensor, "categories length"]
    unfamiliar: Int[Tensor, "categories length"]

    def __init__(
        self,
        length: int = 9,
        n_words: int = 150,
        n_concepts: int = 5,
        n_categories: int = 1000,
        *,
        shuffle_words: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.length = integer("length", length, 2)
        self.n_words, self.n_concepts = even("n_words", n_words, n_concepts)
        self.n_categories = integer("n_categories", n_categories, 1)
        self.generator = generator
        shape = self.n_categories, self.length
        self.familiar = self._draw(self.n_concepts, shape)
        self.unfamiliar = self._draw(self.n_concepts, shape)
        device = draw_device(generator)
        self.concept_of = torch.arange(self.n_words, device=device) // (self.n_words // self.n_concepts)
        if shuffle_words:
            self.concept_of = self.concept_of[
                torch.randperm(self.n_words, generator=generator, device=device)
            ]

    def sample(
        self, categories: Int[Tensor, " n"], which: Literal["familiar", "unfamiliar"]
    ) -> Int[Tensor, "n length"]:
        """Return a sentence of a sequence of each category.

        Parameters
        ----------
        categories : Tensor of shape (n,)
            In 0 .. n_categories - 1.
        which : {"familiar", "unfamiliar"}
            Of which sequence.

        Returns
        -------
        Tensor of shape (n, length)
            Words, on the device of the generator.
        """
        one_of("which", which, ("familiar", "unfamiliar"))
        n = categories.shape[0] if isinstance(categories, Tensor) and categories.ndim else 0
        class_indices("categories", categories, n, self.n_categories)
        concepts = (self.familiar if which == "familiar" else self.unfamiliar)[
            categories.to(self.familiar.device).long()
        ]
        words_of = self.concept_of.argsort(stable=True).view(self.n_concepts, -1)
        return words_of[concepts, self._draw(words_of.shape[1], concepts.shape)]

    def train(
        self, n_per_category: int = 8, *, n_unfamiliar: int = 1
    ) -> tuple[Int[Tensor, "n length"], Int[Tensor, " n"]]:
        """Return a training set with a tail.

        Parameters
        ----------
        n_per_category : int, default=8
            Sentences of a category, at least 1.
        n_unfamiliar : int, default=1
            n*: how many of them are of its unfamiliar sequence.

        Returns
        -------
        x : Tensor of shape (n_categories * n_per_category, length)
            First all familiar sentences, category after category, then all unfamiliar ones.
        y : Tensor of shape (n_categories * n_per_category,)
            Their categories.
        """
        n_per_category = integer("n_per_category", n_per_category, 1)
        if not 0 <= integer("n_unfamiliar", n_unfamiliar) <= n_per_category:
            raise ValueError(
                f"n_unfamiliar must be in 0..n_per_category={n_per_category}, got {n_unfamiliar}"
            )
        known = self._each(n_per_category - n_unfamiliar)
        rare = self._each(int(n_unfamiliar))
        x = torch.cat([self.sample(known, "familiar"), self.sample(rare, "unfamiliar")])
        return x, torch.cat([known, rare])

    def test(self, n_per_category: int = 10) -> tuple[Int[Tensor, "n length"], Int[Tensor, " n"]]:
        """Return sentences of unfamiliar sequences only: the tail.

        Parameters
        ----------
        n_per_category : int, default=10

        Returns
        -------
        x : Tensor of shape (n_categories * n_per_category, length)
        y : Tensor of shape (n_categories * n_per_category,)
        """
        y = self._each(integer("n_per_category", n_per_category, 1))
        return self.sample(y, "unfamiliar"), y

    def _each(self, times: int) -> Tensor:
        return torch.arange(self.n_categories, device=self.familiar.device).repeat_interleave(times)

    def _draw(self, below: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=draw_device(self.generator))


def one_hot_kernel(x: Int[Tensor, "n length"], y: Int[Tensor, "m length"]) -> Float[Tensor, "n m"]:
    """Return in how many places two sentences have the same word: inner products of one-hot codes.

    Parameters
    ----------
    x, y : Tensor of shapes (n, length) and (m, length)
        Words, as integers.

    Returns
    -------
    Tensor of shape (n, m)
        In float64, on the device of ``x``.

    Raises
    ------
    ValueError
        If they are no integers, or lengths differ.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import one_hot_kernel
    >>> one_hot_kernel(torch.tensor([[3, 1, 4]]), torch.tensor([[3, 1, 5], [1, 4, 3]]))
    tensor([[2., 0.]], dtype=torch.float64)
    """
    words("x", x)
    has_shape("y", words("y", y), (None, x.shape[1]), "x")
    y = y.to(x.device)
    same = x.new_zeros((len(x), len(y)), dtype=torch.float64)
    for k in range(x.shape[1]):
        same += x[:, k, None] == y[:, k]
    return same


def nearest_neighbor_accuracy(
    similarity: Float[Tensor, "m n"] | Int[Tensor, "m n"],
    y_train: Int[Tensor, " n"],
    y_test: Int[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Return how often the most similar training sentence has the right category, ties decided by lot.

    Parameters
    ----------
    similarity : Tensor of shape (m, n)
        Of m test to n training sentences: of a kernel, or inner products of a network's features.
    y_train, y_test : Tensor of shapes (n,) and (m,)
        Categories.

    Returns
    -------
    Tensor of shape ()
        The expected accuracy, exactly, in float64: among tied neighbours the share that is right.

    Raises
    ------
    ValueError
        If shapes differ, one is empty, or a similarity is NaN.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import nearest_neighbor_accuracy
    >>> similarity = torch.tensor([[2.0, 2.0, 1.0]])  # two are nearest, one of them is right
    >>> nearest_neighbor_accuracy(similarity, torch.tensor([0, 1, 0]), torch.tensor([0]))
    tensor(0.5000, dtype=torch.float64)
    """
    if not isinstance(similarity, Tensor) or similarity.is_complex():
        raise ValueError(f"similarity must be a real tensor, got {getattr(similarity, 'dtype', similarity)}")
    m, n = has_shape("similarity", similarity, (None, None)).shape
    if similarity.numel() == 0:
        raise ValueError(f"similarity must have rows and columns, got shape {(m, n)}")
    if similarity.isnan().any():
        raise ValueError("similarity must not be NaN")
    y_train = class_indices("y_train", y_train, n).to(similarity.device)
    y_test = class_indices("y_test", y_test, m).to(similarity.device)
    total = similarity.new_zeros((), dtype=torch.float64)
    for rows, truth in zip(
        similarity.split(max(1, COMPARED // n)), y_test.split(max(1, COMPARED // n)), strict=True
    ):
        nearest = rows == rows.amax(1, keepdim=True)
        right = nearest & (y_train == truth[:, None])
        total += (right.sum(1).double() / nearest.sum(1)).sum()
    return total / m


class ConceptMixer(nn.Module):
    """A network that learns which words mean the same: an MLP for words, then one for sentences.

    Each word goes through a hidden layer to an embedding, which is normalised; the embeddings of a sentence
    go together through another hidden layer to the classes.

    Parameters
    ----------
    length : int
        Words in a sentence.
    n_words, n_classes : int
        How many there are.
    word_hidden, embedding, hidden : int, default=500, 10 and 2000
        Widths: of the words' hidden layer, of an embedding, of the sentences' hidden layer.

    Raises
    ------
    ValueError
        If a size is less than 1; in calls, if sentences are no integers, of another length, or (on the CPU)
        have other words.

    References
    ----------
    .. [1] Laurent, von Brecht, Bresson. Long-Tailed Learning Requires Feature Learning. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import ConceptMixer
    >>> net = ConceptMixer(9, 150, 1000)
    >>> x = torch.randint(150, (4, 9))
    >>> net(x).shape, net.features(x).shape
    (torch.Size([4, 1000]), torch.Size([4, 90]))
    """

    def __init__(
        self, length: int, n_words: int, n_classes: int, *, word_hidden: int = 500, embedding: int = 10,
        hidden: int = 2000,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.n_words = integer("length", length, 1), integer("n_words", n_words, 1)
        self.word = nn.Linear(self.n_words, integer("word_hidden", word_hidden, 1))  # of one-hot codes
        self.embed = nn.Linear(word_hidden, integer("embedding", embedding, 1))
        self.norm = nn.LayerNorm(embedding)
        self.mix = nn.Sequential(
            nn.Linear(self.length * embedding, integer("hidden", hidden, 1)), nn.ReLU(),
            nn.Linear(hidden, integer("n_classes", n_classes, 1)),
        )  # fmt: skip

    def features(self, x: Int[Tensor, "n length"]) -> Float[Tensor, "n features"]:
        """Return the embeddings of a sentence's words, one after another.

        Parameters
        ----------
        x : Tensor of shape (n, length)

        Returns
        -------
        Tensor of shape (n, length * embedding)
        """
        words("x", x, self.n_words if isinstance(x, Tensor) and x.device.type == "cpu" else None)
        has_shape("x", x, (None, self.length), "this network")
        x = x.long()
        if x.numel() >= self.n_words:  # each word once, not each time that it stands there
            return F.embedding(x, self._embedded(self.word.weight.T)).flatten(1)
        return self._embedded(F.embedding(x, self.word.weight.T)).flatten(1)

    def forward(self, x: Int[Tensor, "n length"]) -> Float[Tensor, "n classes"]:
        """Return scores of classes.

        Parameters
        ----------
        x : Tensor of shape (n, length)
            Words in 0 .. n_words - 1.

        Returns
        -------
        Tensor of shape (n, n_classes)
        """
        return self.mix(self.features(x))

    def _embedded(self, columns: Tensor) -> Tensor:
        """Return embeddings of words, from their columns of the first layer's weight."""
        return self.norm(self.embed((columns + self.word.bias).relu()))
