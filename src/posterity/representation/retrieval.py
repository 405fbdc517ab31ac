"""Retrieval figures of embeddings by cosine: recall at k and mean average precision at R."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import class_indices, finite, floating, has_shape, integer
from posterity._precision import wide

__all__ = ["mean_average_precision_at_r", "recall_at_k"]


@torch.no_grad()
def recall_at_k(
    query: Float[Tensor, "n dim"], query_labels: Int[Tensor, " n"], *, k: int = 1,
    gallery: Float[Tensor, "m dim"] | None = None, gallery_labels: Int[Tensor, " m"] | None = None,
    batch_size: int = 1024,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the share of queries that have one of their class among their k nearest by cosine.

    Parameters
    ----------
    query : Tensor of shape (n, dim)
        Embeddings of any length.
    query_labels : Tensor of shape (n,)
        Integers.
    k : int, default=1
        At most the size of the gallery.
    gallery, gallery_labels : Tensor of shape (m, dim) and (m,), optional
        Where to look; without them among all other queries.
    batch_size : int, default=1024
        Queries at a time.

    Returns
    -------
    Tensor of shape ()
        In [0, 1]. A query of a class that nothing else belongs to counts 0.

    Raises
    ------
    ValueError
        If an argument does not fit, or an embedding is not finite.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import recall_at_k
    >>> z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> round(float(recall_at_k(z, torch.tensor([0, 0, 1]))), 4)
    0.6667
    """
    parts = _parts(query, query_labels, gallery, gallery_labels, batch_size)
    size = parts[2].shape[0] - (gallery is None)
    if not 1 <= integer("k", k) <= size:
        raise ValueError(f"k must be in 1..{size}, as many as may be found, got {k}")
    found = [
        (parts[3][near] == own[:, None]).any(1)
        for near, own in _nearest(*parts[:3], k, gallery is None, batch_size)
    ]
    return torch.cat(found).to(wide(query).dtype).mean().to(query.dtype)


@torch.no_grad()
def mean_average_precision_at_r(
    query: Float[Tensor, "n dim"], query_labels: Int[Tensor, " n"], *,
    gallery: Float[Tensor, "m dim"] | None = None, gallery_labels: Int[Tensor, " m"] | None = None,
    batch_size: int = 1024,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the mean over queries of the average precision in the first R places, R members of its class.

    Parameters
    ----------
    query, query_labels, gallery, gallery_labels, batch_size
        As for `recall_at_k`.

    Returns
    -------
    Tensor of shape ()
        In [0, 1]: the sum over places i <= R that hold its class of the precision at i, over R. Queries of which
        nothing else has the class are left out.

    Raises
    ------
    ValueError
        If an argument does not fit, an embedding is not finite, or no query has anything to be found.

    References
    ----------
    .. [1] Musgrave, Belongie, Lim. A Metric Learning Reality Check. ECCV 2020. Section 3.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import mean_average_precision_at_r
    >>> z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> float(mean_average_precision_at_r(z, torch.tensor([0, 0, 1])))
    1.0
    """
    parts = _parts(query, query_labels, gallery, gallery_labels, batch_size)
    known, codes = parts[3].unique(return_inverse=True)
    place = torch.searchsorted(known, parts[1]).clamp_max(len(known) - 1)
    count = torch.where(known[place] == parts[1], codes.bincount()[place], 0) - int(gallery is None)
    if not bool((count > 0).any()):
        raise ValueError("query_labels must have a class that something else belongs to, got none")
    most, values, start = int(count.max()), [], 0
    for near, own in _nearest(*parts[:3], most, gallery is None, batch_size):
        r = count[start : start + len(own)]
        start += len(own)
        places = torch.arange(1, most + 1, device=r.device)
        relevant = (parts[3][near] == own[:, None]) & (places <= r[:, None])
        precision = relevant.cumsum(1) / places
        values.append(((precision * relevant).sum(1) / r.clamp_min(1))[r > 0])
    return torch.cat(values).mean().to(query.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """Return rows over their norms, whose squares may be too large or small for the dtype; a row of 0 stays."""
    largest = x.detach().abs().amax(1, keepdim=True)
    return F.normalize(x / torch.where(largest > 0, largest, 1), dim=1)


def _parts(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries and gallery as unit rows, with their labels."""
    has_shape("query", floating("query", query), (None, None))
    if query.shape[1] == 0:
        raise ValueError(f"query must have a column at least, got shape {tuple(query.shape)}")
    class_indices("query_labels", query_labels, len(query))
    integer("batch_size", batch_size, 1)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels must both be given or neither")
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = query, query_labels
    has_shape("gallery", floating("gallery", gallery), (None, query.shape[1]), "query")
    class_indices("gallery_labels", gallery_labels, len(gallery))
    if len(query) == 0 or len(gallery) == 0:
        raise ValueError(f"query and gallery must have rows, got {len(query)} and {len(gallery)}")
    units = [unit_rows(wide(finite(name, z))) for name, z in (("query", query), ("gallery", gallery))]
    return units[0], query_labels, units[1].to(units[0].dtype), gallery_labels


def _nearest(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    k: int,
    alone: bool,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for some queries at a time, the k nearest of the gallery, nearest first, and the queries' labels."""
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(query), batch_size):
            part = query[start : start + batch_size]
            cosine = part @ gallery.T
            if alone:
                cosine.diagonal(start).fill_(-torch.inf)
            yield cosine.topk(min(k, len(gallery)), dim=1).indices, query_labels[start : start + batch_size]
