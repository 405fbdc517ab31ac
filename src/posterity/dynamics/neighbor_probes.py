"""Labels by nearest neighbours: how good features are, without anything trained on them.

A sample gets the label that most of its k nearest have, by cosine or by distance. Both are inner products of rows:
of unit rows, or of (x, 1) with (r, -|r|^2 / 2), which is (|x|^2 - |x - r|^2) / 2. Products of narrow dtypes choose
candidates, block by block; those are compared in float64. Distances that agree to seven digits are equal: the lower
index is nearer.
"""

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import class_indices, finite, floating, has_shape, integer, one_of
from posterity._precision import wide

__all__ = ["knn_predict", "knn_probe"]

Metric = Literal["cosine", "euclidean"]
SPARE = 4  # candidates beside the k nearest
GROUP = 8  # entries of which the largest is found first
PART = 2**22  # numbers that are gathered in float64 at once
LAST = 2**63 - 1  # beyond every key
ALIKE = 1e-7  # relative difference of squared distances that count as equal
FLOOR = 1e-13  # squared distances below this share of the squared lengths are 0: float64 has no more of them


@torch.no_grad()
def knn_predict(
    features: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    features_test: Float[Tensor, "m d"],
    *,
    k: int = 20,
    metric: Metric = "cosine",
    chunk_size: int = 4096,
) -> Int[Tensor, " m"]:
    """Return the label that most of the k nearest samples have.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Of the samples whose labels are known.
    y : Tensor of shape (n,)
        Their labels, integers.
    features_test : Tensor of shape (m, d)
        Of the samples to label.
    k : int, default=20
        Neighbours, 1 .. n; each has one vote. Of labels with equally many the one whose nearest sample is
        nearest wins. Of samples that are equally near the earlier one is nearer.
    metric : {"cosine", "euclidean"}, default="cosine"
        The cosine of a row of zeros with any other is 0.
    chunk_size : int, default=4096
        Rows of either that are compared at once, at least 1: a block takes ``4 * chunk_size**2`` bytes. It does not change
        the result.

    Returns
    -------
    Tensor of shape (m,)
        Of the dtype of ``y``, on the device of ``features_test``.

    Raises
    ------
    ValueError
        If shapes do not fit, features are not finite, or a setting is not as said.

    Warns
    -----
    UserWarning
        If rows are zero under "cosine".

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import knn_predict
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> knn_predict(features, torch.tensor([4, 4, 7]), torch.tensor([[5.0, 0.0], [0.1, 3.0]]), k=1)
    tensor([4, 7])
    """
    y = _checked(features, y, k, metric, chunk_size).detach()
    n, d = features.shape
    has_shape("features_test", floating("features_test", features_test), (None, d), "features")
    integer("k", k, 1)
    if k > n:
        raise ValueError(f"k must be at most the number of samples, {n}, got {k}")
    _all_finite("features_test", features_test)
    return _predict(features, y, features_test, k, metric, chunk_size, "features").to(y.dtype)


@torch.no_grad()
def knn_probe(
    features: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    features_test: Float[Tensor, "m d"] | None = None,
    y_test: Int[Tensor, " m"] | None = None,
    *,
    k: int = 20,
    metric: Metric = "cosine",
    chunk_size: int = 4096,
) -> Float[Tensor, ""]:
    """Return the accuracy of `knn_predict`, on test samples or leaving each sample out in turn.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Of the samples whose labels are known.
    y : Tensor of shape (n,)
        Their labels, integers.
    features_test : Tensor of shape (m, d), optional
        Of at least one sample to test on; by default each sample is labelled by the others.
    y_test : Tensor of shape (m,), optional
        Their labels: given if those are.
    k : int, default=20
        Neighbours, 1 .. n, or 1 .. n - 1 without test samples.
    metric : {"cosine", "euclidean"}, default="cosine"
        As `knn_predict` takes it.
    chunk_size : int, default=4096
        As `knn_predict` takes it.

    Returns
    -------
    Tensor
        A scalar in float64, on the CPU.

    Raises
    ------
    ValueError
        As `knn_predict`, and if only one of ``features_test`` and ``y_test`` is given.

    Warns
    -----
    UserWarning
        If rows are zero under "cosine".

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import knn_probe
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> knn_probe(features, torch.tensor([0, 0, 1, 0]), k=1)
    tensor(0.5000, dtype=torch.float64)
    """
    if (features_test is None) != (y_test is None):
        missing = "features_test" if features_test is None else "y_test"
        raise ValueError(f"features_test and y_test must be given together, got no {missing}")
    if features_test is not None and y_test is not None:
        floating("features_test", features_test)
        class_indices("y_test", y_test, len(features_test) if features_test.ndim else 0)
        if not len(y_test):
            raise ValueError("features_test must have at least one row, got none")
        found = knn_predict(features, y, features_test, k=k, metric=metric, chunk_size=chunk_size)
        return _share(found, y_test)
    y = _checked(features, y, k, metric, chunk_size).detach()
    n = len(features)
    if n < 2 or k > n - 1:
        raise ValueError(f"k must be at most the number of other samples, {n - 1}, got {k}")
    own = torch.arange(n, device=features.device)
    return _share(_predict(features, y, features, k, metric, chunk_size, "features", (own, own)), y)


def _checked(features: Any, y: Any, k: int, metric: str, chunk_size: int) -> Tensor:
    """Return the labels, if they and the settings fit the features."""
    one_of("metric", metric, ("cosine", "euclidean"))
    integer("k", k, 1)
    integer("chunk_size", chunk_size, 1)
    n = len(has_shape("features", floating("features", features), (None, None)))
    class_indices("y", y, n)
    _all_finite("features", features)
    return y


def _all_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinity, which any sum with them is; only a sum that is not finite is looked into."""
    if not bool(x.sum(dtype=wide(x[:0]).dtype).isfinite()):
        finite(name, x)


def _share(found: Tensor, y: Tensor) -> Tensor:
    """Return the share of labels that were found."""
    return (found == y.to(found.device)).cpu().double().mean()


def _predict(
    features: Tensor, y: Tensor, test: Tensor, k: int, metric: str, chunk_size: int, name: str,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return labels by the vote of neighbours; samples of the same id in ``own`` are no neighbours."""
    space = _Space(features, test.to(features.device), metric, own)
    if space.zeros:
        warnings.warn(
            f"{name} has {space.zeros} rows of zeros, whose cosine with any other is taken as 0",
            UserWarning,
            stacklevel=3,
        )
    kinds, codes = y.to(features.device).unique(return_inverse=True)
    found = []
    for rows in torch.arange(len(test), device=features.device).split(chunk_size):
        for some in space.nearest(rows, k, chunk_size).split(max(1, PART // max(1, len(kinds)))):
            labels = codes[some]
            votes = torch.zeros(len(labels), len(kinds), dtype=torch.int32, device=labels.device)
            votes.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.int32))
            # the nearest of those with the most votes
            first = votes.gather(1, labels).argmax(1, keepdim=True)
            found.append(kinds[labels.gather(1, first)[:, 0]])
    return torch.cat(found).to(test.device) if found else y.new_zeros(0, device=test.device)


class _Rows:
    """Rows of one side, made when they are asked for: unit ones, or centred ones with a column beside them.

    Squared distances are ``base``, of the queries, less twice the products. ``quick`` is all rows in float32.
    """

    def __init__(self, x: Tensor, size: Tensor, centre: Tensor | None, halved: bool) -> None:
        self.x, self.size, self.centre, self.halved = x, size, centre, halved
        plain = self._plain(slice(None)) if centre is not None else None
        self.base = (
            x.new_full((len(x),), 2.0, dtype=torch.float64) if plain is None else plain.square().sum(1)
        )
        self.quick = self._with_column(self._plain(slice(None), torch.float32), slice(None))

    def _plain(self, index: Any, dtype: torch.dtype = torch.float64) -> Tensor:
        x = self.x[index].to(dtype)
        if self.centre is not None:
            return (x - self.centre.to(dtype)).div_(self.size.to(dtype))
        return x / self.size[index].to(dtype)

    def _with_column(self, x: Tensor, index: Any) -> Tensor:
        if self.centre is None:
            return x
        beside = self.base[index] / -2 if self.halved else torch.ones_like(self.base[index])
        return torch.cat([x, beside[..., None].to(x)], -1)

    def __getitem__(self, index: Any) -> Tensor:
        return self._with_column(self._plain(index), index)

    def products(self, near: Tensor, queries: Tensor) -> Tensor:
        """Return the products of each query with some rows of its own, (queries, near)."""
        if self.centre is not None:
            return (self[near] @ queries[:, :, None])[:, :, 0]
        return (self.x[near].double() @ queries[:, :, None])[:, :, 0] / self.size[near][:, :, 0]


class _Space:
    """Both sides, by the inner products of whose rows neighbours are found: the larger the nearer."""

    def __init__(
        self, features: Tensor, test: Tensor, metric: str, own: tuple[Tensor, Tensor] | None
    ) -> None:
        self.own, self.zeros = own, 0
        self.narrow = wide(features[:0]).dtype == torch.float32
        r, q = features.detach(), test.detach()
        if metric == "cosine":
            if not self.narrow or q.dtype == torch.float64:
                r, q = _unit(r.double()), _unit(q.double())
            sizes = [torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64) for x in (r, q)]
            self.zeros = int((sizes[0] == 0).sum()) + (0 if test is features else int((sizes[1] == 0).sum()))
            self.refs, self.queries = (
                _Rows(x, size.clamp_min(1e-300), None, False) for x, size in zip((r, q), sizes, strict=True)
            )
        else:  # centred and of size 1, so that products neither cancel more than they must nor overflow
            largest = [part.abs().max().double() for part in (r, q) if part.numel()]
            size = torch.stack(largest).max() if largest else r.new_ones((), dtype=torch.float64)
            centre = ((r / size).mean(0, dtype=torch.float64) * size).to(wide(r).dtype).double()
            size = size.clamp_min(1e-300)
            self.refs, self.queries = _Rows(r, size, centre, True), _Rows(q, size, centre, False)

    def nearest(self, rows: Tensor, k: int, chunk_size: int) -> Tensor:
        """Return the k nearest of some queries, (rows, k), in order."""
        n, n_candidates = len(self.refs.x), k + SPARE
        if not self.narrow or n <= n_candidates or not len(rows):
            return self._exactly(rows, k, chunk_size)
        refs, queries = self.refs.quick, self.queries.quick[rows]
        best = queries.new_empty(len(rows), 0)
        found = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for start in range(0, n, chunk_size):
            products = self._without_own(
                queries @ refs[start : start + chunk_size].T, rows, start, -torch.inf
            )
            some, at = _largest(products, n_candidates)
            best, found = torch.cat([best, some], 1), torch.cat([found, at + start], 1)
            if best.shape[1] > n_candidates:
                best, at = best.topk(n_candidates)
                found = found.gather(1, at)
        size = max(1, PART // (n_candidates * max(1, refs.shape[1])))
        parts = zip(found.split(size), rows.split(size), strict=True)
        exact = torch.cat([self.refs.products(near, self.queries[some]) for near, some in parts])
        off = (exact - best).abs().masked_fill(best.isneginf(), 0)
        exact = exact.masked_fill(best.isneginf(), -torch.inf)
        order = self._keys(exact, rows, found).topk(k, largest=False).values % 2**32
        # a sample that is no candidate may be as near if rounding, several times what is seen here, hid it
        kth, base = exact.topk(k).values[:, -1], self.queries.base[rows]
        slack = 4 * off.max() + ALIKE * (base - 2 * kth).abs() + FLOOR * base
        unsure = (~(best.amin(1) + slack < kth)).nonzero()[:, 0]
        if len(unsure):
            order[unsure] = self._exactly(rows[unsure], k, chunk_size)
        return order

    def _exactly(self, rows: Tensor, k: int, chunk_size: int) -> Tensor:
        """Return the same from products in float64 with all samples."""
        found = []
        for some in rows.split(max(1, chunk_size // 8)):
            best = torch.empty(len(some), 0, dtype=torch.int64, device=rows.device)
            queries = self.queries[some]
            for start in range(0, len(self.refs.x), chunk_size):
                products = queries @ self.refs[slice(start, start + chunk_size)].T
                at = torch.arange(start, start + products.shape[1], device=rows.device)
                keys = self._without_own(self._keys(products, some, at), some, start, LAST)
                best = torch.cat([best, keys], 1)
                best = best.topk(min(k, best.shape[1]), largest=False).values
            found.append(best % 2**32)
        return torch.cat(found) if found else rows.new_zeros(0, k)

    def _keys(self, products: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Return integers in the order of nearness: the bits of squared distances in float32, then the index."""
        base = self.queries.base[rows][:, None]
        squared = base - 2 * products
        squared = squared.masked_fill(squared < FLOOR * base, 0.0)
        return (squared.float().view(torch.int32).long() << 32) + index

    def _without_own(self, block: Tensor, rows: Tensor, start: int, value: float) -> Tensor:
        if self.own is None:
            return block
        refs, queries = self.own
        return block.masked_fill_(queries[rows][:, None] == refs[start : start + block.shape[1]], value)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return at most k largest entries of each row and where they are: they lie in the k groups of largest maximum."""
    n = x.shape[1] // GROUP
    if n <= k:
        return x.topk(min(k, x.shape[1]))
    groups = x[:, : n * GROUP].unflatten(1, (GROUP, n))
    top = groups.amax(1).topk(k, sorted=False).indices
    at = (top[:, None] + n * torch.arange(GROUP, device=x.device)[:, None]).flatten(1)
    rest = torch.arange(n * GROUP, x.shape[1], device=x.device).expand(len(x), -1)
    at = torch.cat([at, rest], 1)
    values, chosen = x.gather(1, at).topk(k)
    return values, at.gather(1, chosen)


def _unit(x: Tensor) -> Tensor:
    """Return rows of length 1, zeros as they are; the largest entry is 1 first, so that squares stay finite."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(tiny) if x.shape[-1] else x
    return x / x.norm(dim=-1, keepdim=True).clamp_min(tiny)
