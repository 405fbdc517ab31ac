"""Bilinear transduction: beyond the training range, predict from a training point and a difference that was seen.

Any function can be written h(x) = H(x - x', x') with any training point x', its anchor. Of the form

    h(x) = < f(x - x'), g(x') >                                               (1)

with p embeddings f and g, it is a matrix of rank p, whose rows are differences and columns are anchors. Pairs of
training points show a block of it, and low rank fills in the rest: a query outside the range needs an anchor that
was seen and a difference that was seen, not the two together. A network of x itself has to guess there.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, one_of
from posterity._precision import widened
from posterity._random import seeded
from posterity.transfer.transductive_anchors import _labels, _Pairs, _Search, pairwise_deltas

__all__ = ["BilinearPredictor", "BilinearTransductionRegressor"]

PAIRINGS, LOSSES, SCHEDULES = ("uniform", "groups", "learned"), ("norm", "squared"), ("constant", "cosine")


class BilinearPredictor(nn.Module):
    """Two networks whose embeddings are multiplied: a prediction from an anchor and a difference.

    Parameters
    ----------
    in_features : int
        Features of a point, and of a difference.
    out_features : int, default=1
        Values predicted.
    n_embed : int, default=32
        Dimension p of the embeddings of each value. Far above the rank of what is learned it fits the pairs that
        were seen and fills in worse.
    hidden : sequence of int, default=(32, 32)
        Widths of the ReLU layers of both networks; none makes both linear.

    Attributes
    ----------
    anchor_net, delta_net : nn.Sequential
        Of linear layers and ReLU, with ``out_features * n_embed`` outputs, in the layout of the official code: read
        as (out_features, n_embed) of anchors and (n_embed, out_features) of differences.

    Raises
    ------
    ValueError
        If a size is less than 1, or tensors do not fit or are no floating-point numbers.

    References
    ----------
    .. [1] Netanyahu, Gupta, Simchowitz, Zhang, Agrawal. Learning to Extrapolate: A Transductive Approach.
       ICLR 2023. Bilinear transduction.

    Examples
    --------
    A product of two numbers is bilinear:

    >>> import torch
    >>> from posterity.transfer import BilinearPredictor
    >>> model = BilinearPredictor(1, n_embed=1, hidden=())
    >>> for net in (model.anchor_net, model.delta_net):
    ...     _ = net[0].weight.data.fill_(1.0), net[0].bias.data.fill_(0.0)
    >>> model(torch.tensor([[3.0]]), torch.tensor([[5.0]])).item()
    15.0
    """

    def __init__(
        self, in_features: int, out_features: int = 1, *, n_embed: int = 32, hidden: Sequence[int] = (32, 32)
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.n_embed = integer("n_embed", n_embed, 1)
        widths = (self.in_features, *_widths(hidden), self.out_features * self.n_embed)
        self.anchor_net, self.delta_net = _layers(widths), _layers(widths)

    def forward(self, anchor: Float[Tensor, "n d"], delta: Float[Tensor, "n d"]) -> Float[Tensor, "n out"]:
        """Return predictions, in the dtype of the embeddings."""
        has_shape("anchor", floating("anchor", anchor), (None, self.in_features))
        has_shape("delta", floating("delta", delta), (len(anchor), self.in_features), "anchor")
        of_anchor = self.anchor_net(anchor).unflatten(1, (self.out_features, self.n_embed))
        *body, last = self.delta_net
        for layer in body:
            delta = layer(delta)
        # the last layer's rows are put into the order of the anchor's: cheaper than to turn what it returns
        rows = [each.unflatten(0, (self.n_embed, self.out_features)).transpose(0, 1).flatten(0, 1)
                for each in (last.weight, last.bias)]  # fmt: skip
        return _products(of_anchor, F.linear(delta, *rows).view_as(of_anchor))


@widened
def _products(a: Float[Tensor, "n out embed"], b: Float[Tensor, "n out embed"]) -> Float[Tensor, "n out"]:
    """Return the inner products of the embeddings of each value."""
    return (a * b).sum(2)


class BilinearTransductionRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Regression that reaches beyond the range of the training data, by differences seen within it.

    Two networks are trained to predict a training point from another, the anchor, and their difference. A query is
    predicted from the anchor whose difference to it is nearest to one of training; `anchors` says how near.

    Parameters
    ----------
    hidden : sequence of int, default=(32, 32)
        Widths of the ReLU layers of both networks, each at least 1.
    n_embed : int, default=32
        Dimension of the embeddings, at least 1: what the rank of the problem asks for, and little more.
    pairing : {"uniform", "groups", "learned"}, default="uniform"
        With which others a point is paired: with all; with those of its group; or with all, weighted by a network
        that learns which anchors tell about which points.
    loss : {"norm", "squared"}, default="norm"
        Mean Euclidean norm of the error, as the official code has it, or mean square of that.
    n_steps : int, default=5000
        Steps of Adam, at least 1.
    batch_size : int, default=32
        Pairs of a step, at least 1. For "learned" so many points (at most all), each paired with each other.
    lr : float, default=1e-3
        Of Adam, positive.
    schedule : {"constant", "cosine"}, default="constant"
        Whether the rate falls to 0 over the steps.
    n_deltas : int or None, default=20_000
        Training differences to compare with, a sample of all, at least 1; the difference 0 is always among them.
        Where there are no more, or with None, they are all.
    n_anchors : int, default=1
        Anchors whose predictions are averaged, at least 1 and at most the training rows.
    radius : float, optional
        Positive, in standardised units: anchors are drawn from all whose difference is so near to one of training,
        as the paper has it; alike in every call. None takes the nearest, as the official code does.
    standardize : bool, default=True
        Whether inputs and targets are, by training mean and deviation.
    device : str, default="cpu"
        Where to train, as torch names it.
    random_state : int, RandomState or None, default=None
        Decides initial weights, pairs, and what is drawn of differences and anchors.

    Attributes
    ----------
    predictor_ : BilinearPredictor
        Of standardised anchors and differences.
    x_train_, train_deltas_ : ndarray of shape (n, d), (m, d)
        Standardised training points, and the differences to compare with.
    loss_curve_ : ndarray of shape (n_steps,)
    n_features_in_ : int
    feature_names_in_ : ndarray

    Raises
    ------
    ValueError
        If a parameter is out of range, data do not fit or are no numbers, there are fewer than 2 training rows,
        groups are missing or unknown, or the loss stops being finite.

    Notes
    -----
    What helps is low rank: exponentials, products, polynomials. It did not show on a sine of a few periods in the
    training range plus a trend, and a target that is linear in x an ordinary network extrapolates as well.

    A prediction costs a search among the differences for each training row: a k-d tree's up to 15 columns.

    Departures from the paper:

    1. Inputs and targets are standardised; differences are then in units of the training spread.
    2. The nearest anchor is taken, as in the official code; ``radius`` is the paper's rule.
    3. ``pairing="learned"`` is our reading of weighted transduction, which is not in the official code: for each
       point of a batch, a softmax of the scores of the others weighs their errors; among the tenth of the training
       points with the nearest differences, the one of largest score is the anchor.

    References
    ----------
    .. [1] Netanyahu, Gupta, Simchowitz, Zhang, Agrawal. Learning to Extrapolate: A Transductive Approach.
       ICLR 2023. Bilinear and weighted transduction.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.transfer import BilinearTransductionRegressor
    >>> X = np.linspace(0, 1, 40)[:, None]
    >>> model = BilinearTransductionRegressor(
    ...     (16,), 2, loss="squared", lr=2e-2, schedule="cosine", n_steps=300, random_state=0
    ... ).fit(X, np.exp(2 * X[:, 0]))
    >>> bool(abs(model.predict([[1.3]])[0] / np.exp(2.6) - 1) < 0.25)  # beyond all that was seen
    True

    The second value that `anchors` returns is 0 for differences that were seen, and large beyond one further
    width of the training range: there is nothing to trust there.

    >>> indices, distance = model.anchors([[0.0], [1.3], [5.0]])
    >>> (distance[:2] < 0.1).all(), distance[2].round() == round(3 / X.std())
    (np.True_, array([ True]))
    """

    def __init__(
        self, hidden: Sequence[int] = (32, 32), n_embed: int = 32, *,
        pairing: Literal["uniform", "groups", "learned"] = "uniform", loss: Literal["norm", "squared"] = "norm",
        n_steps: int = 5000, batch_size: int = 32, lr: float = 1e-3,
        schedule: Literal["constant", "cosine"] = "constant", n_deltas: int | None = 20_000, n_anchors: int = 1,
        radius: float | None = None, standardize: bool = True, device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.hidden = hidden
        self.n_embed = n_embed
        self.pairing = pairing
        self.loss = loss
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.lr = lr
        self.schedule = schedule
        self.n_deltas = n_deltas
        self.n_anchors = n_anchors
        self.radius = radius
        self.standardize = standardize
        self.device = device
        self.random_state = random_state

    @torch.inference_mode(False)  # grad mode too
    def fit(self, X: Any, y: Any, groups: Any = None) -> "BilinearTransductionRegressor":
        """Train on pairs of rows.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Numbers; float32 stays float32.
        y : array-like of shape (n,) or (n, k)
            Targets.
        groups : array-like of shape (n,), optional
            Labels, for ``pairing="groups"`` and only for it.

        Returns
        -------
        BilinearTransductionRegressor
            The fitted estimator.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True,
                             ensure_min_samples=2)  # fmt: skip
        device = self._check_parameters(len(X))
        if (groups is None) == (self.pairing == "groups"):
            rule = "must have a label for each row with" if groups is None else "must be None but with"
            raise ValueError(f'groups {rule} pairing="groups", got pairing={self.pairing!r}')
        self._labels = None if groups is None else _labels("groups", groups, len(X))
        codes = None if groups is None else np.unique(self._labels, return_inverse=True)[1]
        self._one = y.ndim == 1
        y = np.asarray(y, dtype=X.dtype).reshape(len(X), -1)
        options = {"with_mean": bool(self.standardize), "with_std": bool(self.standardize)}
        self._x_scaler, self._y_scaler = StandardScaler(**options).fit(X), StandardScaler(**options).fit(y)
        self.x_train_ = self._x_scaler.transform(X)
        dtype = torch.float32 if device.type == "mps" or X.dtype == np.float32 else torch.float64
        inputs, targets = (
            torch.as_tensor(each).to(device, dtype) for each in (self.x_train_, self._y_scaler.transform(y))
        )
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=3)
        self._train(inputs, targets, codes, *map(int, seeds[:2]))
        self._deltas(torch.as_tensor(self.x_train_), codes, int(seeds[2]))
        return self

    def predict(self, X: Any, groups: Any = None) -> ndarray:
        """Return predictions from anchors.

        Parameters
        ----------
        X : array-like of shape (n, d)
        groups : array-like of shape (n,), optional
            Where ``fit`` had them: anchors are then of the row's group, else of any.

        Returns
        -------
        ndarray of shape (n,) or (n, k)
            As ``y`` was: the mean over the anchors.
        """
        x, found, _ = self._anchored(X, groups)
        like = next(self.predictor_.parameters())
        anchor = torch.as_tensor(self.x_train_)[found.flatten()]
        delta = x.repeat_interleave(found.shape[1], 0) - anchor
        with torch.no_grad():
            y = (
                self.predictor_(anchor.to(like), delta.to(like))
                .unflatten(0, found.shape)
                .mean(1)
                .cpu()
                .numpy()
            )
        y = self._y_scaler.inverse_transform(y)
        return y[:, 0] if self._one else y

    def anchors(self, X: Any, groups: Any = None) -> tuple[ndarray, ndarray]:
        """Return which training rows are the anchors, and how far their differences are from those of training.

        Parameters
        ----------
        X : array-like of shape (n, d)
        groups : array-like of shape (n,), optional
            As for `predict`.

        Returns
        -------
        indices : ndarray of shape (n, n_anchors)
            Rows of training.
        distances : ndarray of shape (n, n_anchors)
            Of each difference, row less anchor, from the nearest of ``train_deltas_``, in standardised units: 0 is a
            difference that was seen, as every training row's own is; up to what rows held out of training have, it
            is as good as seen. From there on the prediction is a guess: with a training range of width w every
            query more than one further w outside it is at least so far from what was seen as from there.
        """
        _, found, far = self._anchored(X, groups)
        return found.numpy(), far.numpy()

    def _anchored(self, X: Any, groups: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return standardised rows, their anchors, and the distances of their differences."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=self.x_train_.dtype, reset=False)
        if groups is not None and self._labels is None:
            raise ValueError("groups may be given where fit had them, it had none")
        x, x_train = (torch.as_tensor(each) for each in (self._x_scaler.transform(X), self.x_train_))
        draws = torch.Generator().manual_seed(self._seed)
        if self._scorer is None:
            return x, *self._search.nearest(x, self.n_anchors, self.radius, groups, draws)
        near, far = self._search.nearest(x, max(self.n_anchors, len(x_train) // 10))
        like, anchor = next(self._scorer.parameters()), x_train[near.flatten()]
        delta = x.repeat_interleave(near.shape[1], 0) - anchor
        with torch.no_grad():
            score = (
                self._scorer(torch.cat([anchor, delta], 1).to(like)).unflatten(0, near.shape)[..., 0].cpu()
            )
        best = score.argsort(dim=1, descending=True, stable=True)[:, : self.n_anchors]
        return x, near.gather(1, best), far.gather(1, best)

    def _check_parameters(self, n: int) -> torch.device:
        _widths(self.hidden)
        for name in ("n_embed", "n_steps", "batch_size", "n_anchors"):
            integer(name, getattr(self, name), 1)
        one_of("pairing", self.pairing, PAIRINGS)
        one_of("loss", self.loss, LOSSES)
        one_of("schedule", self.schedule, SCHEDULES)
        at_least("lr", self.lr, 0, strict=True)
        if self.n_deltas is not None:
            integer("n_deltas", self.n_deltas, 1)
        if self.radius is not None:
            at_least("radius", self.radius, 0, strict=True)
            if self.pairing == "learned":
                raise ValueError(f'radius must be None with pairing="learned", got {self.radius}')
        if self.n_anchors > n:
            raise ValueError(f"n_anchors must be at most the {n} training rows, got {self.n_anchors}")
        return _device(self.device)

    def _train(self, x: Tensor, y: Tensor, codes: ndarray | None, seed: int, seed_pairs: int) -> None:
        generator = torch.Generator(device=x.device).manual_seed(seed_pairs)
        hidden, d, n = _widths(self.hidden), x.shape[1], len(x)
        with seeded(seed):
            net = BilinearPredictor(d, y.shape[1], n_embed=self.n_embed, hidden=hidden).to(x)
            self._scorer = _layers((2 * d, *hidden, 1)).to(x) if self.pairing == "learned" else None
        pairs = _Pairs(n, codes, generator, x.device)

        def error(i: Tensor, j: Tensor) -> Tensor:
            return _errors(net(x[i], x[j] - x[i]), y[j], self.loss)

        def step() -> Tensor:
            if self._scorer is None:
                return error(*pairs.draw(self.batch_size)).mean()
            rows = torch.randperm(n, generator=generator, device=x.device)[: max(2, self.batch_size)]
            m = len(rows)
            i, j = rows.repeat_interleave(m), rows.repeat(m)
            score = self._scorer(torch.cat([x[i], x[j] - x[i]], 1)).view(m, m)
            itself = torch.eye(m, dtype=torch.bool, device=x.device)  # would take all the weight
            weight = score.masked_fill(itself, -torch.inf).softmax(0)
            return (weight * error(i, j).view(m, m)).sum() / m

        modules = [net] if self._scorer is None else [net, self._scorer]
        parameters = [p for module in modules for p in module.parameters()]
        self.loss_curve_ = _descend(parameters, step, self.n_steps, self.lr, self.schedule)
        self.predictor_ = net

    def _deltas(self, x: Tensor, codes: ndarray | None, seed: int) -> None:
        """Keep the training differences to compare with; `seed` also draws anchors."""
        self._seed, most = seed, self.n_deltas
        every = len(x) ** 2 if codes is None else int(np.square(np.bincount(codes)).sum())
        draws = torch.Generator().manual_seed(seed)
        if most is None or most >= every:
            deltas = pairwise_deltas(x, groups=codes)
        else:
            deltas = pairwise_deltas(x, most, groups=codes, generator=draws)
            deltas[0] = 0
        self.train_deltas_, self._search = deltas.numpy(), _Search(x, deltas, self._labels)


def _widths(hidden: Any) -> tuple[int, ...]:
    """Return the widths of hidden layers."""
    if not isinstance(hidden, Sequence | ndarray) or isinstance(hidden, str):
        raise ValueError(f"hidden must be a sequence of widths, got {hidden!r}")
    return tuple(integer("hidden", width, 1) for width in hidden)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, above in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _errors(predicted: Tensor, target: Tensor, loss: str) -> Tensor:
    """Return the norm or the square of each row's error."""
    error = predicted - target
    return error.square().sum(1) if loss == "squared" else torch.linalg.vector_norm(error, dim=1)


def _descend(
    parameters: Iterable[Tensor], step: Callable[[], Tensor], n_steps: int, lr: float, schedule: str
) -> ndarray:
    """Take steps of Adam and return the losses."""
    optimizer = torch.optim.Adam(list(parameters), lr=lr, fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps) if schedule == "cosine" else None
    losses = []  # which stay on the device until the end
    for _ in range(n_steps):
        loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if falling is not None:
            falling.step()
        losses.append(loss.detach())
    curve = torch.stack(losses).cpu().numpy()
    if not np.isfinite(curve).all():
        raise ValueError(
            f"the loss is {curve[~np.isfinite(curve)][0]} after {np.isfinite(curve).argmin()} steps: lower lr={lr}"
        )
    return curve


def _device(name: Any) -> torch.device:
    """Return a device that torch has here."""
    try:
        return torch.empty((), device=name).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"device must be one that torch has here, got {name!r}: {error}") from error
