"""A table made anew: constrained bridges for columns of numbers, integers and categories.

Every column becomes a factor of one product: numbers an interval of their range in training,
integers a grid of the values seen (at most 64 of them, else an interval, rounded at the
end), categories one-hot vectors. So a sampled row has no category but those seen, no
fraction of an integer and no number out of range, however well or badly the network learned.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from posterity._branches import follow, momentum_copy
from posterity._checks import at_least, integer, within
from posterity._random import drawn_seed, seeded
from posterity.generative.constrained_bridges import ConstrainedBridge
from posterity.generative.intervals import Interval
from posterity.generative.products import Product
from posterity.generative.table_columns import _column, _Layout, _objects

__all__ = ["BridgeTable"]

AT_ONCE = 8192  # rows sampled together
CLIP = 5.0  # of the gradient's norm, as the official code has it


class BridgeTable(BaseEstimator):
    """A generator of table rows, fitted to a table of mixed columns.

    Parameters
    ----------
    categorical : sequence of column names or numbers, or "auto", default="auto"
        Columns of categories; "auto" takes those of text, booleans, objects and pandas' categories.
    integer : sequence of column names or numbers, or "auto", default="auto"
        Columns of whole numbers; "auto" takes those of an integer dtype.
    hidden : sequence of int, default=(512, 512)
        Units of the hidden layers.
    schedule : {"exp", "linear", "inverse-exp", "constant"}, default="exp"
        As `ConstrainedBridge` takes it, like ``a`` and ``b``.
    a, b : float, default=3.0 and 1.0
        Rate and scale of the schedule.
    n_steps : int, default=200
        Steps of sampling, at least 1.
    max_iter : int, default=5000
        Steps of training, at least 1.
    batch_size : int, default=128
        Rows a step, at least 2, which batch normalisation needs.
    lr : float, default=1e-3
        Learning rate of Adam, positive.
    ema : float, default=0.999
        Weight of the past in the averaged network that samples, in [0, 1); 0 is no average.
    device : str, default="cpu"
        Where to train and to sample.
    random_state : int, RandomState instance or None, default=None
        Decides weights, batches and noise.

    Attributes
    ----------
    bridge_ : ConstrainedBridge
        The process, on the columns' encoding.
    net_ : nn.Module
        The averaged network.
    columns_ : list
        For each column its ``name``, ``kind`` ("continuous", "integer", "categorical" or "constant"),
        and ``values`` or ``low`` and ``high``.
    loss_curve_ : list of float
        Loss of each step.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray of str
        Their names, where X has them.

    Notes
    -----
    The recipe is the official code's for Adult: a network that sees t in every layer, with leaky
    ReLU and batch normalisation, gradients clipped at norm 5. The average of weights, the
    grids and both ends of the intervals are ours. A category that is missing is one
    more category; a number that is missing is refused. Columns of text that differ in every row
    cost a column each: leave them out.

    References
    ----------
    .. [1] Liu, Wu, Ye, Liu. Learning Diffusion Bridges on Constrained Domains. ICLR 2023.
       Mixed-typed tables.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.generative import BridgeTable
    >>> X = np.array([["red", 1, 0.5], ["blue", 3, 0.25], ["red", 3, 1.0]], dtype=object)
    >>> model = BridgeTable(hidden=(8,), max_iter=20, n_steps=5, random_state=0).fit(X)
    >>> made = model.sample(10)
    >>> made.shape, set(made[:, 0]) <= {"red", "blue"}, set(made[:, 1]) <= {1, 3}
    ((10, 3), True, True)
    >>> bool(made[:, 2].min() >= 0.25 and made[:, 2].max() <= 1)
    True
    """

    bridge_: ConstrainedBridge
    net_: Any
    columns_: list[Any]
    loss_curve_: list[float]
    n_features_in_: int

    def __init__(
        self, categorical: Sequence[Any] | Literal["auto"] = "auto",
        integer: Sequence[Any] | Literal["auto"] = "auto", *, hidden: Sequence[int] = (512, 512),
        schedule: str = "exp", a: float = 3.0, b: float = 1.0, n_steps: int = 200, max_iter: int = 5000,
        batch_size: int = 128, lr: float = 1e-3, ema: float = 0.999, device: str = "cpu",
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.categorical = categorical
        self.integer = integer
        self.hidden = hidden
        self.schedule = schedule
        self.a = a
        self.b = b
        self.n_steps = n_steps
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.lr = lr
        self.ema = ema
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = tags.input_tags.string = True
        tags.non_deterministic = self.random_state is None
        return tags

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, X: Any, y: Any = None) -> "BridgeTable":
        """Learn the table's law.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, n_columns)
            At least two rows.
        y : Series or array-like of shape (n_rows,), optional
            One more column, the last of what is sampled.

        Returns
        -------
        BridgeTable
            Itself.

        Raises
        ------
        ValueError
            If a setting is out of range, a column cannot be what it is said to be, or a number is missing.
        """
        sizes = self._settings()
        raw, self._layout = self._read(X, y)
        kinds = self._kinds([name for name, _ in raw])
        found = [_column(name, given, kinds) for name, given in raw]
        self.columns_ = [column for column, _ in found]
        kept = [column for column in self.columns_ if column.factor is not None]
        seed = drawn_seed(self.random_state)
        self.loss_curve_ = []
        if not kept:  # nothing varies
            self.bridge_ = ConstrainedBridge(Interval(), 1, schedule=self.schedule, a=self.a, b=self.b)  # pyright: ignore[reportArgumentType]
            self.net_ = nn.Identity()
            return self
        encoded = [column.encode(values) for column, values in found if column.factor is not None]
        x1 = torch.from_numpy(np.concatenate(encoded, axis=1).astype(np.float32))
        domain = Product([column.factor for column in kept])
        self.bridge_ = ConstrainedBridge(
            domain, domain.dim, schedule=self.schedule, a=self.a, b=self.b  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        with seeded(seed):
            net = _TableNet(domain.dim, sizes).to(self.device)
        self.net_ = self._train(net, x1, torch.Generator().manual_seed(seed))
        return self

    def _settings(self) -> list[int]:
        """Refuse settings out of range and return the sizes of the layers."""
        hidden = self.hidden
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise ValueError(f"hidden must be a sequence of integers, got {hidden!r}")
        for name, value, low in (
            ("n_steps", self.n_steps, 1),
            ("max_iter", self.max_iter, 1),
            ("batch_size", self.batch_size, 2),
        ):
            integer(name, value, low)
        at_least("lr", self.lr, 0, strict=True)
        within("ema", self.ema, 0, 1, open_high=True)
        ConstrainedBridge(Interval(), 1, schedule=self.schedule, a=self.a, b=self.b)  # pyright: ignore[reportArgumentType]
        return [integer("hidden", size, 1) for size in hidden]

    def _read(self, X: Any, y: Any) -> tuple[list[tuple[Any, Any]], "_Layout"]:
        """Return names and values of all columns, and how to put columns together again."""
        named: list[tuple[Any, Any]]
        if hasattr(X, "iloc") and hasattr(X, "columns"):
            validate_data(self, X, skip_check_array=True)
            named = [(name, X.iloc[:, j]) for j, name in enumerate(X.columns)]
            n = len(X)
            layout = _Layout(names=X.columns)
        else:
            X = validate_data(
                self, X, dtype=None, ensure_all_finite=False, ensure_min_samples=0, ensure_min_features=0
            )
            named = [(j, X[:, j]) for j in range(X.shape[1])]
            n = len(X)
            layout = _Layout(dtype=X.dtype)
        if n < 2:
            raise ValueError(f"X must have at least 2 rows, got {n} sample(s)")
        if not named:
            raise ValueError(
                f"X must have columns, got 0 feature(s) (shape=({n}, 0)) while a minimum of 1 is required."
            )
        if y is not None:
            series = y if hasattr(y, "iloc") and hasattr(y, "name") else np.asarray(y)
            if series.ndim == 2 and series.shape[1] == 1 and isinstance(series, ndarray):
                series = series[:, 0]
            if series.shape != (n,):
                raise ValueError(f"y must have shape ({n},) for X, got {tuple(series.shape)}")
            name = getattr(y, "name", None)
            name = ("target" if name is None else name) if layout.names is not None else "y"
            if layout.names is not None and name in list(X.columns):
                raise ValueError(f"y must have a name that no column of X has, got {name!r}")
            named.append((name, series))
            layout.y = name
        return named, layout

    def _kinds(self, names: Sequence[Any]) -> Callable[[Any, str], str]:
        """Return the rule by which a column's kind follows from its name and what its values look like."""
        said: dict[str, list[Any] | None] = {}
        for what, listed in (("categorical", self.categorical), ("integer", self.integer)):
            if isinstance(listed, str) and listed == "auto":
                said[what] = None
                continue
            if isinstance(listed, str) or not hasattr(listed, "__iter__"):
                raise ValueError(f'{what} must be a sequence of columns or "auto", got {listed!r}')
            said[what] = list(listed)
            for name in listed:
                if name not in names:
                    raise ValueError(f"{what} must name columns of the table, {name!r} is none of {names}")
        integers, classes = said["integer"], said["categorical"]
        for name in integers or []:
            if name in (classes or []):
                raise ValueError(f"integer must not name what is categorical, got {name!r} in both")

        def kind(name: Any, looks: str) -> str:
            if name in (classes or []):
                return "categorical"
            if name in (integers or []):
                return "integer"
            left = (looks == "categorical" and classes is None) or (looks == "integer" and integers is None)
            return looks if left else "continuous"

        return kind

    def _train(self, net: "_TableNet", x1: Tensor, draws: torch.Generator) -> nn.Module:
        """Train a network and return its average."""
        mean, size = momentum_copy(net), min(self.batch_size, len(x1))
        opt = torch.optim.Adam(net.parameters(), lr=self.lr)
        x1 = x1.to(self.device)
        for k in range(self.max_iter):
            rows = torch.randint(len(x1), (size,), generator=draws).to(x1.device)
            loss = self.bridge_.loss(net, x1[rows], generator=draws)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            opt.step()
            self.loss_curve_.append(float(loss.detach()))
            follow(mean, net, min(self.ema, (1 + k) / (10 + k)))  # the first steps are forgotten sooner
        return mean.eval()

    def sample(self, n_samples: int = 1, *, random_state: Any = None) -> Any:
        """Return new rows.

        Parameters
        ----------
        n_samples : int, default=1
            At least 1.
        random_state : int, RandomState instance or None, default=None
            Source of randomness; None is that of the estimator.

        Returns
        -------
        DataFrame or ndarray
            As X was given, with its columns and dtypes, and y as the last column where it was given.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            If ``n_samples`` is less than 1.
        """
        check_is_fitted(self, "net_")
        n = integer("n_samples", n_samples, 1)
        seed = drawn_seed(self.random_state if random_state is None else random_state)
        draws = torch.Generator().manual_seed(seed)
        widths = [column.factor.dim for column in self.columns_ if column.factor is not None]
        blocks: list[ndarray] = []
        if widths:
            parts = [
                self.bridge_.sample(self.net_, len(rows), n_steps=self.n_steps, generator=draws)
                for rows in torch.arange(n).split(AT_ONCE)
            ]
            flat = torch.cat([part for part in parts if isinstance(part, Tensor)]).double().cpu().numpy()
            blocks = np.split(flat, np.cumsum(widths)[:-1], axis=1)
        ends = iter(blocks)
        made = [
            _objects([column.values[0]] * n) if column.factor is None else column.decode(next(ends))
            for column in self.columns_
        ]
        return self._layout.join(made, [column.dtype for column in self.columns_])


class _TableNet(nn.Module):
    """A perceptron that sees t in every layer, with batch normalisation."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [width, *hidden]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(n + 1, m), nn.BatchNorm1d(m), nn.LeakyReLU())
            for n, m in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.last = nn.Linear(sizes[-1] + 1, width)

    def forward(self, x: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        for layer in [*self.layers, self.last]:
            x = layer(torch.cat([x, t[:, None]], 1))
        return x
