"""MRIV-Net: the nuisances of MRIV from one network of two representations.

The theory of `posterity.tabular.mriv` wants (pi, delta) and (mu_0Y, mu_0A, tau_0) learned on
different samples. Here they are learned from one, so that no row is lost to splitting, but by
two representations that share no weight: the first feeds pi and mu_zA, the second mu_zY and a
mu_zA of its own. A second, small network regresses the pseudo-outcome on X.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, within
from posterity._precision import wide
from posterity._random import drawn_seed, seeded
from posterity.tabular.mriv import _lifted, _MultiplyRobust

__all__ = ["MRIVNet", "NuisanceNet"]

OF_HEAD = (0, 0, 0, 1, 1, 1, 1)  # the representation that feeds each head, in the order of `Nuisances`


class Nuisances(NamedTuple):
    """What `NuisanceNet` says of each row, shape (n,): the probabilities are no logits.

    Attributes
    ----------
    pi, mu_a1, mu_a0 : Tensor
        P(Z = 1 | x) and P(A = 1 | Z, x), from the first representation.
    mu_y1, mu_y0, mu_a1_tau, mu_a0_tau : Tensor
        E[Y | Z, x] and P(A = 1 | Z, x), from the second.
    """

    pi: Tensor
    mu_a1: Tensor
    mu_a0: Tensor
    mu_y1: Tensor
    mu_y0: Tensor
    mu_a1_tau: Tensor
    mu_a0_tau: Tensor


class NuisanceNet(nn.Module):
    """Network for all nuisances of an instrument: two representations, seven heads.

    Representations and heads are each Linear-ReLU-Linear-ReLU-Linear. Those that lie side by
    side are one batched product a layer.

    Parameters
    ----------
    in_features : int
        Columns of x, at least 1.
    representation_size, head_size : int, default=10 and 30
        Widths of their layers, at least 1.
    dropout : float, default=0.0
        Share of hidden units dropped, in [0, 1).

    Raises
    ------
    ValueError
        If a parameter is out of range or the input does not fit.

    References
    ----------
    .. [1] Frauen, Feuerriegel. Estimating individual treatment effects under unobserved
       confounding using binary instruments. ICLR 2023. Section 5 and Figure 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.tabular import NuisanceNet
    >>> net = NuisanceNet(3)
    >>> x, y, z = torch.randn(8, 3), torch.randn(8), torch.tensor([0, 1] * 4)
    >>> net(x).pi.shape, net(x)._fields[:3]
    (torch.Size([8]), ('pi', 'mu_a1', 'mu_a0'))
    >>> net.loss(x, y, z, z).backward()
    """

    _of_head: Tensor
    _unseen: Tensor
    _by_instrument: Tensor

    def __init__(
        self, in_features: int, *, representation_size: int = 10, head_size: int = 30, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        inner = integer("representation_size", representation_size, 1)
        within("dropout", dropout, 0, 1, open_high=True)
        self.representations = _SideBySide(2, self.in_features, inner, inner, dropout)
        self.heads = _SideBySide(len(OF_HEAD), inner, integer("head_size", head_size, 1), 1, dropout)
        for name, value in (
            ("_of_head", OF_HEAD),
            ("_unseen", [[0], [2], [6], [4]]),
            ("_by_instrument", [[0], [1], [1], [1]]),
        ):  # of pi, mu_a, mu_a_tau, mu_y: the head where z is 0, and whether that where it is 1 stands before
            self.register_buffer(name, torch.tensor(value), persistent=False)

    def forward(self, x: Float[Tensor, "n in_features"]) -> Nuisances:
        """Return the nuisances of each row, in the dtype of ``x``."""
        logits = self._outputs(self._fitting(x)).to(x.dtype)
        shares = logits.sigmoid()
        return Nuisances(*(logits[k] if k in (3, 4) else shares[k] for k in range(len(OF_HEAD))))

    def loss(
        self,
        x: Float[Tensor, "n in_features"],
        y: Shaped[Tensor, " n"],
        a: Shaped[Tensor, " n"],
        z: Shaped[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return squared error of the outcome and three cross-entropies, all of weight 1.

        Parameters
        ----------
        x : Tensor of shape (n, in_features)
            At least one row.
        y : Tensor of shape (n,)
            Outcomes.
        a, z : Tensor of shape (n,)
            Treatment and instrument: 0 and 1, or bool.

        Returns
        -------
        Tensor
            A scalar in the dtype of ``x``.
        """
        n = len(self._fitting(x))
        if n == 0:
            raise ValueError("x must have at least one row, got 0")
        for name, value in (("y", y), ("a", a), ("z", z)):
            has_shape(name, value, (n,), "x")
            if name != "y" and value.device.type == "cpu" and not torch.equal(value * value, value):
                raise ValueError(f"{name} must be 0 or 1, got {value.unique().tolist()[:4]}")
        return self._loss(x, y, a, z).to(x.dtype)

    def _loss(self, x: Tensor, y: Tensor, a: Tensor, z: Tensor) -> Tensor:
        outputs = self._outputs(x)
        y, a, z = (value.to(outputs.dtype) for value in (y, a, z))
        seen = outputs.gather(0, self._unseen - self._by_instrument * z.long())  # the heads of the observed z
        log_chance = F.logsigmoid((2 * torch.stack([z, a, a]) - 1) * seen[:3])
        return ((seen[3] - y).square().sum() - log_chance.sum()) / len(x)

    def _fitting(self, x: Tensor) -> Tensor:
        return has_shape("x", floating("x", x), (None, self.in_features))

    def _outputs(self, x: Tensor) -> Tensor:
        """Return the heads' outputs (7, n), in float32 at least: logits but for the outcomes."""
        inner = self.representations(x.expand(2, -1, -1))
        return wide(self.heads(inner.index_select(0, self._of_head))[:, :, 0])


class _SideBySide(nn.Module):
    """k networks of three layers that see k inputs: (k, n, inputs) to (k, n, outputs)."""

    def __init__(self, k: int, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()

        def started(*shape: int, below: int) -> nn.Parameter:  # as nn.Linear starts
            return nn.Parameter(torch.empty(k, *shape).uniform_(-1, 1) / below**0.5)

        self.weight0, self.bias0 = started(inputs, hidden, below=inputs), started(1, hidden, below=inputs)
        self.weight1, self.bias1 = started(hidden, hidden, below=hidden), started(1, hidden, below=hidden)
        self.weight2, self.bias2 = started(hidden, outputs, below=hidden), started(1, outputs, below=hidden)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self._dropped(torch.baddbmm(self.bias0, x, self.weight0).relu())
        x = self._dropped(torch.baddbmm(self.bias1, x, self.weight1).relu())
        return torch.baddbmm(self.bias2, x, self.weight2)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class MRIVNet(_MultiplyRobust):
    """Individual effects with a binary instrument: MRIV with networks for both stages.

    What it identifies the effect from stands with `MRIV`.

    Parameters
    ----------
    representation_size, head_size, second_stage_size : int, default=10, 30 and 30
        Widths of hidden layers, at least 1: of both representations, of the heads, and of the
        network that regresses the pseudo-outcome.
    dropout, second_stage_dropout : float, default=0.0 and 0.1
        Of the two stages, in [0, 1).
    lr : float, default=5e-3
        Of Adam, positive.
    batch_size, max_epochs : int, default=64 and 100
        Of either stage, at least 1.
    n_folds : {1, 3}, default=1
        With 3, networks are fitted crosswise as `MRIV` fits its models.
    clip_propensity, min_compliance : float, default=0.01 and 0.05
        As for `MRIV`.
    standardize : bool, default=True
        Whether to standardise X; ``y`` always is.
    device : str, default="cpu"
        Where to train, as torch names it.
    random_state : int, RandomState or None, default=None
        Decides folds, initial weights, batches and dropout.

    Attributes
    ----------
    pseudo_outcome_, propensity_, compliance_, n_clipped_, n_features_in_, feature_names_in_
        As for `MRIV`.
    net_ : list of NuisanceNet
        One a fold, of X and ``y`` standardised.
    final_ : list of nn.Sequential
        The second stage, one a fold.
    scaler_, outcome_scaler_ : StandardScaler

    Raises
    ------
    ValueError
        At ``fit``, as `MRIV` does, or if training diverges.

    Notes
    -----
    1. Batches are shuffled; the official loader keeps the order of the rows.
    2. The first estimate is the ratio of the second representation's heads.

    References
    ----------
    .. [1] Frauen, Feuerriegel. Estimating individual treatment effects under unobserved
       confounding using binary instruments. ICLR 2023. Section 5.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.tabular import MRIVNet
    >>> rng = np.random.default_rng(0)
    >>> X, hidden = rng.normal(size=(1_000, 1)), rng.normal(size=1_000)
    >>> drawn = rng.integers(0, 2, 1_000)
    >>> taken = (2 * drawn + hidden > 1).astype(int)
    >>> y = np.where(X[:, 0] > 0, 3, -3) * taken + hidden
    >>> model = MRIVNet(max_epochs=10, random_state=0).fit(X, y, treatment=taken, instrument=drawn)
    >>> (model.predict([[-1.0], [1.0]]) > 0).tolist()
    [False, True]
    """

    def __init__(
        self, *, representation_size: int = 10, head_size: int = 30, second_stage_size: int = 30, dropout: float = 0.0,
        second_stage_dropout: float = 0.1, lr: float = 5e-3, batch_size: int = 64, max_epochs: int = 100,
        n_folds: int = 1, clip_propensity: float = 0.01, min_compliance: float = 0.05, standardize: bool = True,
        device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.representation_size = representation_size
        self.head_size = head_size
        self.second_stage_size = second_stage_size
        self.dropout = dropout
        self.second_stage_dropout = second_stage_dropout
        self.lr = lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.n_folds = n_folds
        self.clip_propensity = clip_propensity
        self.min_compliance = min_compliance
        self.standardize = standardize
        self.device = device
        self.random_state = random_state

    @property
    def net_(self) -> list[NuisanceNet]:
        """The network of each fold."""
        check_is_fitted(self)
        return self._learned

    def _check_parameters(self) -> None:
        super()._check_parameters()
        for name in ("representation_size", "head_size", "second_stage_size", "batch_size", "max_epochs"):
            integer(name, getattr(self, name), 1)
        for name in ("dropout", "second_stage_dropout"):
            within(name, getattr(self, name), 0, 1, open_high=True)
        at_least("lr", self.lr, 0, strict=True)

    def _learn(self, X: ndarray, y: ndarray, a: ndarray, z: ndarray, draw: Any) -> NuisanceNet:
        def make() -> NuisanceNet:
            return NuisanceNet(
                X.shape[1], representation_size=self.representation_size, head_size=self.head_size, dropout=self.dropout
            )  # fmt: skip

        return self._trained(make, NuisanceNet._loss, draw, self._inputs(X), *map(self._tensor, (y, a, z)))

    def _instrument_side(self, learned: NuisanceNet, X: ndarray) -> tuple[ndarray, ndarray]:
        said = self._said(learned, X)
        return said.pi, said.mu_a1 - said.mu_a0

    def _outcome_side(self, learned: NuisanceNet, X: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        said = self._said(learned, X)
        delta = _lifted(said.mu_a1_tau - said.mu_a0_tau, self.min_compliance)
        return said.mu_y0, said.mu_a0_tau, (said.mu_y1 - said.mu_y0) / delta

    def _said(self, net: NuisanceNet, X: ndarray) -> Any:
        with torch.no_grad():
            return Nuisances(*(each.cpu().double().numpy() for each in net(self._inputs(X))))  # type: ignore[arg-type]

    def _regress(self, X: ndarray, pseudo: ndarray, draw: Any) -> nn.Module:
        def make() -> nn.Module:
            width, layers = self.second_stage_size, []
            for below in (X.shape[1], width):
                layers += [nn.Linear(below, width), nn.ReLU(), nn.Dropout(self.second_stage_dropout)]
            return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))

        def loss(net: Any, x: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(net(x), target)

        return self._trained(make, loss, draw, self._inputs(X), self._tensor(pseudo))

    def _evaluate(self, model: nn.Module, X: ndarray) -> ndarray:
        with torch.no_grad():
            return model(self._inputs(X)).cpu().double().numpy()

    def _inputs(self, X: ndarray) -> Tensor:
        return self._tensor(self.scaler_.transform(X) if self.standardize else X)

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array), dtype=torch.float32, device=self.device)

    def _trained(self, make: Callable[[], Any], loss: Callable[..., Tensor], draw: Any, *data: Tensor) -> Any:
        """Return a new network after ``max_epochs`` of Adam on shuffled batches."""
        seed = drawn_seed(draw)
        shuffle = torch.Generator().manual_seed(seed)
        with seeded(seed, data[0].device):  # initial weights and dropout
            net = make().to(data[0].device).train()
            optimizer = torch.optim.Adam(net.parameters(), lr=self.lr, fused=True)
            for _ in range(self.max_epochs):
                order = torch.randperm(len(data[0]), generator=shuffle).to(data[0].device)
                for rows in order.split(self.batch_size):
                    optimizer.zero_grad()
                    loss(net, *(each[rows] for each in data)).backward()
                    optimizer.step()
        if not all(bool(parameter.isfinite().all()) for parameter in net.parameters()):
            raise ValueError(f"lr must be small enough for training to converge, it diverged at lr={self.lr}")
        return net.eval()
