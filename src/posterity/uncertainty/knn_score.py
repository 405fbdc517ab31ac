"""Distance to the k-th nearest training feature, as a score of what is unknown.

With features z divided by their length, an input x scores

    s(x) = ||z(x) - z_(k)||,

the distance to the k-th nearest of the training features: small where the network has seen much
like it, large where it has not. Nothing is trained, and nothing is assumed of their distribution.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, needs, one_of, within
from posterity._precision import wide, widened

__all__ = ["KNNScore"]


class KNNScore:
    """Distance to the k-th nearest training feature: how far an input lies from all that is known.

    Features are normalised first, so only directions count. Nothing is trained.

    Parameters
    ----------
    k : int, default=50
        Which neighbour.
    backend : {"torch", "faiss"}, default="torch"
        Exact search in chunks, or faiss's flat index.
    chunk_size : int, default=4096
        Most queries at once.

    References
    ----------
    .. [1] Sun, Ming, Zhu, Li. Out-of-distribution detection with deep nearest neighbors.
       ICML 2022.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import KNNScore
    >>> known = torch.tensor([[1.0, 0.0], [2.0, 0.1], [1.0, 0.2]])
    >>> score = KNNScore(k=1).fit(known)
    >>> score.score(torch.tensor([[5.0, 0.0], [0.0, 1.0]])) > score.threshold(known)
    tensor([False,  True])
    """

    def __init__(
        self, k: int = 50, *, backend: Literal["torch", "faiss"] = "torch", chunk_size: int = 4096
    ) -> None:
        self.k = integer("k", k, 1)
        self.backend = one_of("backend", backend, ("torch", "faiss"))
        self.chunk_size = integer("chunk_size", chunk_size, 1)

    @widened
    def fit(self, features: Float[Tensor, "n d"]) -> "KNNScore":
        """Keep training features.

        Parameters
        ----------
        features : Tensor
            At least k rows.

        Returns
        -------
        KNNScore
            Itself.
        """
        features = _directions("features", features)
        if len(features) < self.k:
            raise ValueError(
                f"k must be at most the number of training features, got {self.k} for {len(features)}"
            )
        self.features_ = features
        if self.backend == "faiss":
            self.index_ = needs("faiss", "faiss").IndexFlatL2(features.shape[1])
            self.index_.add(features.float().cpu().numpy())
        return self

    def score(self, features: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Return the distance of each feature; larger is further from the training data.

        Parameters
        ----------
        features : Tensor
            Queries, as wide as the training features.

        Returns
        -------
        Tensor
            Euclidean distances of directions, in [0, 2].
        """
        return self._score("features", features)

    @widened
    def _score(self, name: str, features: Tensor) -> Tensor:
        if not hasattr(self, "features_"):
            raise ValueError(f"{name} can be scored once training features are known: call fit first")
        has_shape(name, features, (None, self.features_.shape[1]), "the training features")
        queries = _directions(name, features)
        if self.backend == "faiss":
            squares, _ = self.index_.search(queries.float().cpu().numpy(), self.k)
            return torch.from_numpy(squares[:, -1]).to(queries).clamp_min(0).sqrt()
        known, parts = self.features_.to(queries).T, []
        fitting = max(1, 2**23 // known.shape[1])  # a table of products that stays near the caches
        for chunk in queries.split(min(self.chunk_size, fitting)):
            _, nearest = (chunk @ known).topk(self.k, dim=1)
            # 2 - 2 cos cancels for near neighbours: take the last one's difference itself
            parts.append((chunk - self.features_.to(queries)[nearest[:, -1]]).norm(dim=1))
        return torch.cat(parts) if parts else queries.new_zeros(0)

    def threshold(self, in_distribution: Float[Tensor, "m d"], tpr: float = 0.95) -> float:
        """Return the score below which a share of in-distribution features lies.

        Parameters
        ----------
        in_distribution : Tensor
            Held-out features of known classes.
        tpr : float, default=0.95
            The share, in (0, 1].

        Returns
        -------
        float
            Larger scores are called unknown.
        """
        within("tpr", tpr, 0, 1, open_low=True)
        scores = self._score("in_distribution", in_distribution)
        if not len(scores):
            raise ValueError("in_distribution must hold at least one row, got none")
        return float(torch.quantile(scores.double(), tpr))


def _directions(name: str, features: Tensor) -> Tensor:
    """Return unit rows, also of features so large or small that their squares leave the dtype."""
    has_shape(name, floating(name, features), (None, None))
    features = wide(finite(name, features.detach()))
    peak = features.abs().amax(1, keepdim=True) if features.shape[1] else features.new_ones(len(features), 1)
    ordinary = (peak == 0) | ((peak > 1e-6) & (peak < 1e6))
    return F.normalize(features / torch.where(ordinary, 1, peak), dim=1)
