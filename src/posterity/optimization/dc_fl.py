r"""Dictionary contrastive learning (DCL): each layer learns from its own loss, against embeddings of the labels.

A network trained end to end keeps every activation until the gradient comes back. Here no gradient
crosses a layer's border. A dictionary holds an embedding :math:`t_z \in R^D` of each class z, shared by all
layers. Layer l reads its features as K local vectors :math:`h^1 .. h^K` (positions of a map, pieces of a
vector), and its loss is the cross-entropy of

.. math:: s_z = \frac{1}{K} \sum_k \langle h^k, \operatorname{pool}(t_z) \rangle                         \qquad (1)

against the true class: it brings the mean local feature towards its own label's embedding and away from
the others'. No sample is compared with another, so what two images share that is not their label
distracts it little; there is no auxiliary head, and no matrix of all pairs. The embeddings themselves learn from the losses of
all layers. `posterity.optimization.ForwardTrainer` trains a stack of your layers so.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, floating, has_shape, integer, one_of
from posterity._precision import unit_rows, widened
from posterity._random import draw_device

__all__ = [
    "DictionaryContrastiveLoss",
    "LabelDictionary",
    "SupervisedContrastiveLoss",
    "dictionary_logits",
    "pool_labels",
]

Reduction = Literal["mean", "sum", "none"]


def pool_labels(embedding: Float[Tensor, "classes dim"], dim: int) -> Float[Tensor, "classes pooled"]:
    """Return embeddings of another length, each entry the mean of those in its bin.

    Parameters
    ----------
    embedding : Tensor of shape (classes, D)
        One of each class, D at least 1.
    dim : int
        C, at least 1. Bin i is [floor(i D / C), ceil((i + 1) D / C)), so C may be larger than D.

    Returns
    -------
    Tensor of shape (classes, dim)
        In the dtype of ``embedding``.

    Raises
    ------
    ValueError
        If ``embedding`` is no matrix of floating-point numbers or has no column, or ``dim`` is below 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import pool_labels
    >>> pool_labels(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), 2)
    tensor([[2., 6.]])
    """
    has_shape("embedding", floating("embedding", embedding), (None, None))
    integer("dim", dim, 1)
    if not embedding.shape[1]:
        raise ValueError(f"embedding must have a column, got shape {tuple(embedding.shape)}")
    return embedding if dim == embedding.shape[1] else _pool(embedding, dim)


@widened
def _pool(embedding: Tensor, dim: int) -> Tensor:
    return F.adaptive_avg_pool1d(embedding[None], dim)[0]


def dictionary_logits(
    features: Float[Tensor, "batch ..."],
    embedding: Float[Tensor, "classes dim"],
    *,
    n_patches: int = 1,
    temperature: float = 1.0,
    normalize: bool = False,
) -> Float[Tensor, "batch classes"]:
    """Return the logits of equation 1: how much the mean local feature is like each label's embedding.

    The mean over local features is taken before the product with the dictionary, which is the same
    and K times less work.

    Parameters
    ----------
    features : Tensor
        Maps (batch, C, H, W), of H W local features; tokens (batch, C, P), channels first; or vectors
        (batch, n_patches * C), of which entry ``piece * C + channel`` belongs to a piece.
    embedding : Tensor of shape (classes, D)
        Pooled to C (`pool_labels`).
    n_patches : int, default=1
        Into how many pieces vectors are cut; maps and tokens have their positions.
    temperature : float, default=1.0
        Positive; divides the logits.
    normalize : bool, default=False
        Divide each position of a map, or each whole vector, and each pooled embedding by its length.

    Returns
    -------
    Tensor of shape (batch, classes)
        In the dtype of ``features``.

    Raises
    ------
    ValueError
        If features are of another kind, a vector cannot be cut, there are fewer than two classes,
        or an option is out of range.

    References
    ----------
    Choi et al., "Dictionary contrastive learning for efficient local supervision without auxiliary networks",
    ICLR 2024, Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import dictionary_logits
    >>> maps = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])  # one image, two channels, two positions
    >>> dictionary_logits(maps, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[2., 1.]])
    """
    at_least("temperature", temperature, 0.0, strict=True)
    integer("n_patches", n_patches, 1)
    _check(features, embedding, n_patches)
    return widened(_logits)(features, embedding, n_patches, temperature, normalize)


def _check(features: Tensor, embedding: Tensor, n_patches: int) -> None:
    if not 2 <= floating("features", features).ndim <= 4:
        raise ValueError(
            f"features must be vectors (batch, n), tokens (batch, c, p) or maps (batch, c, h, w), got {tuple(features.shape)}"
        )
    if features.ndim == 2 and features.shape[1] % n_patches:
        raise ValueError(
            f"features must have a width divisible by n_patches={n_patches}, got {features.shape[1]}"
        )
    if not features[:1].numel() and len(features):
        raise ValueError(f"features must not be empty, got shape {tuple(features.shape)}")
    has_shape("embedding", floating("embedding", embedding), (None, None))
    if embedding.shape[0] < 2 or not embedding.shape[1]:
        raise ValueError(f"embedding must hold at least two classes, got shape {tuple(embedding.shape)}")


def _logits(
    features: Tensor, embedding: Tensor, n_patches: int, temperature: float, normalize: bool
) -> Tensor:
    if normalize:
        features = unit_rows(features, 1)
    if features.ndim == 2:
        mean = features.unflatten(1, (n_patches, -1)).mean(1)
    else:
        mean = features.flatten(2).mean(2)
    words = pool_labels(embedding, mean.shape[1])
    if normalize:
        words = unit_rows(words)
    return mean @ words.to(mean.dtype).T / temperature


class DictionaryContrastiveLoss(nn.Module):
    """Cross-entropy of a layer's features against embeddings of the labels.

    Parameters
    ----------
    n_patches : int, default=1
        Into how many pieces vectors are cut.
    temperature : float, default=1.0
        Positive.
    normalize : bool, default=False
        As for `dictionary_logits`.
    reduction : {"mean", "sum", "none"}, default="mean"

    Raises
    ------
    ValueError
        If an option is out of range; at the call, if the features do not fit, or the target is not one class a
        sample, of the embedding's (its values are read on the CPU, where that is free).

    References
    ----------
    Choi et al., "Dictionary contrastive learning for efficient local supervision without auxiliary networks",
    ICLR 2024, Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import DictionaryContrastiveLoss
    >>> loss = DictionaryContrastiveLoss()
    >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), torch.eye(2))  # log 2: it cannot tell
    tensor(0.6931)
    """

    def __init__(
        self, *, n_patches: int = 1, temperature: float = 1.0, normalize: bool = False, reduction: Reduction = "mean"
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_patches = integer("n_patches", n_patches, 1)
        self.temperature = at_least("temperature", temperature, 0.0, strict=True)
        self.normalize = normalize
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))

    def forward(
        self,
        features: Float[Tensor, "batch ..."],
        target: Int[Tensor, " batch"],
        embedding: Float[Tensor, "classes dim"],
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Parameters
        ----------
        features : Tensor
            Vectors, tokens or maps, as for `dictionary_logits`; at least one sample.
        target : Tensor of shape (batch,)
            Classes from 0.
        embedding : Tensor of shape (classes, D)

        Returns
        -------
        Tensor
            A scalar, or of shape (batch,) for ``reduction="none"``.
        """
        _check(features, embedding, self.n_patches)
        check_target(target, len(features), len(embedding))
        return _loss(
            features, embedding, target, self.n_patches, self.temperature, self.normalize, self.reduction
        )

    def extra_repr(self) -> str:
        """Return the options that a printed module shows."""
        return f"n_patches={self.n_patches}, temperature={self.temperature}, normalize={self.normalize}"


@widened
def _loss(
    features: Tensor, embedding: Tensor, target: Tensor, n_patches: int, temperature: float, normalize: bool, reduction: str
) -> Tensor:  # fmt: skip
    logits = _logits(features, embedding, n_patches, temperature, normalize)
    return F.cross_entropy(logits, target.long(), reduction=reduction)


def check_target(target: Tensor, n: int, n_classes: int | None) -> None:
    """Refuse a target that is not one class a sample, or of no sample."""
    class_indices("target", target, n, n_classes)
    if not n:
        raise ValueError("target must have at least one class, got none")


class LabelDictionary(nn.Module):
    """An embedding of each class.

    Parameters
    ----------
    n_classes : int
        At least 2.
    dim : int
        D, at least 1.
    init : {"normal", "orthogonal"}, default="normal"
        Standard normal entries, or orthogonal rows as long as these are on average, sqrt(D) (columns where there
        are more classes than dimensions).
    adaptive : bool, default=True
        Whether the embeddings learn; if not, ``weight`` is a buffer.
    generator : torch.Generator, optional
        Of the initial values.

    Attributes
    ----------
    weight : Tensor of shape (n_classes, dim)

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> from posterity.optimization import LabelDictionary
    >>> [tuple(p.shape) for p in LabelDictionary(10, 64).parameters()]
    [(10, 64)]
    >>> list(LabelDictionary(10, 64, adaptive=False).parameters())
    []
    """

    weight: Tensor

    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        init: Literal["normal", "orthogonal"] = "normal",
        adaptive: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        integer("n_classes", n_classes, 2)
        integer("dim", dim, 1)
        one_of("init", init, ("normal", "orthogonal"))
        weight = torch.empty(n_classes, dim, device=draw_device(generator, torch.device("cpu")))
        if init == "normal":
            weight.normal_(generator=generator)
        else:
            nn.init.orthogonal_(weight, gain=dim**0.5, generator=generator)
        weight = weight.cpu()
        self.adaptive = adaptive
        if adaptive:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self) -> Float[Tensor, "classes dim"]:
        """Return the embeddings.

        Returns
        -------
        Tensor of shape (n_classes, dim)
        """
        return self.weight

    def extra_repr(self) -> str:
        """Return the options that a printed module shows."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, adaptive={self.adaptive}"


class SupervisedContrastiveLoss(nn.Module):
    """The rival: each sample's features against all samples of the batch (Khosla et al. 2020).

    For an anchor, minus the mean over the others of its class of
    ``log(exp(<h, h_p> / T) / sum_a exp(<h, h_a> / T))``, a over all others; features have length 1. An anchor
    without another of its class counts 0. Memory and time are quadratic in the batch.

    Parameters
    ----------
    temperature : float, default=0.07
        T, positive.

    Raises
    ------
    ValueError
        If ``temperature`` is not positive; at the call, for a batch of one or a target that is not one integer a sample.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import SupervisedContrastiveLoss
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> far = SupervisedContrastiveLoss()(features, torch.tensor([0, 1, 0, 1]))
    >>> bool(SupervisedContrastiveLoss()(features, torch.tensor([0, 0, 1, 1])) < far)
    True
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = at_least("temperature", temperature, 0.0, strict=True)

    def forward(
        self, features: Float[Tensor, "batch ..."], target: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Return the mean over anchors.

        Parameters
        ----------
        features : Tensor
            Vectors (batch, n), or tokens and maps, which are averaged over their positions.
        target : Tensor of shape (batch,)
            Classes.

        Returns
        -------
        Tensor
            A scalar.
        """
        if not 2 <= floating("features", features).ndim <= 4:
            raise ValueError(f"features must have 2 to 4 axes, got shape {tuple(features.shape)}")
        check_target(target, len(features), None)
        if len(features) < 2:
            raise ValueError(f"features must be of at least two samples, got {len(features)}")
        if not features[:1].numel():
            raise ValueError(f"features must not be empty, got shape {tuple(features.shape)}")
        return _supervised_contrast(features, target, self.temperature)


@widened
def _supervised_contrast(features: Tensor, target: Tensor, temperature: float) -> Tensor:
    h = unit_rows(features if features.ndim == 2 else features.flatten(2).mean(2))
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    logits = (h @ h.T / temperature).masked_fill(itself, -torch.inf)
    log_share = logits.log_softmax(1).masked_fill(itself, 0.0)
    positive = (target[:, None] == target[None]) & ~itself
    return -((log_share * positive).sum(1) / positive.sum(1).clamp_min(1)).mean()
