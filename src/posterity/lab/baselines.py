"""The strong ordinary choice of each task: what a method must beat to be worth its trouble."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import needs
from posterity.lab.data import split
from posterity.lab.nets import cnn, mlp, weights
from posterity.lab.tables import table_encoder
from posterity.lab.tasks import HISTORY, HORIZON, entry, image_epochs
from posterity.lab.training import fit, fit_nodes

__all__: list[str] = []

Predict = Callable[[Any], Any]


def _tuned_mlp(kind: type, seed: int) -> Any:
    net = kind(hidden_layer_sizes=(64, 64), max_iter=300, tol=1e-3, random_state=seed)
    return GridSearchCV(net, {"alpha": [1e-3, 1e-1, 1.0, 10.0]}, cv=3)


def _tuned_logistic() -> Any:
    return GridSearchCV(
        LogisticRegression(max_iter=2000), {"C": np.logspace(-3, 2, 6)}, scoring="neg_log_loss", cv=3
    )


TABLES: dict[str, tuple[Callable[[int], Any], Callable[[int], Any]]] = {
    "linear": (lambda seed: RidgeCV(np.logspace(-3, 3, 13)), lambda seed: _tuned_logistic()),
    "random forest": (
        lambda seed: RandomForestRegressor(300, random_state=seed),
        lambda seed: RandomForestClassifier(300, random_state=seed),
    ),
    "gradient boosting": (
        lambda seed: HistGradientBoostingRegressor(random_state=seed),
        lambda seed: HistGradientBoostingClassifier(random_state=seed),
    ),
    "tuned MLP": (lambda seed: _tuned_mlp(MLPRegressor, seed), lambda seed: _tuned_mlp(MLPClassifier, seed)),
}


def _tables(name: str, regressor: Callable[[int], Any], classifier: Callable[[int], Any]) -> None:
    @entry("tabular-regression", name)
    def _regression(train: Any, seed: int) -> Predict:
        return make_pipeline(table_encoder(), regressor(seed)).fit(*train).predict

    @entry("tabular-classification", name)
    def _classification(train: Any, seed: int) -> Predict:
        return make_pipeline(table_encoder(), classifier(seed)).fit(*train).predict_proba


for _name, _pair in TABLES.items():
    _tables(_name, *_pair)


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


@entry("image-classification", "logistic regression")
def image_logistic(train: Any, seed: int) -> Predict:
    """Return logistic regression on pixels, its penalty cross-validated."""
    model = _tuned_logistic().fit(_flat(train[0]), train[1])
    return lambda x: model.predict_proba(_flat(x))


@entry("image-classification", "5 nearest neighbours")
def image_neighbours(train: Any, seed: int) -> Predict:
    """Return the vote of the nearest training images, pixel by pixel."""
    model = KNeighborsClassifier(5).fit(_flat(train[0]), train[1])
    return lambda x: model.predict_proba(_flat(x))


def _classifier(
    train: Any, seed: int, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> nn.Sequential:
    """Return a small convolutional network (fully connected for features), trained by AdamW."""
    x, y = (torch.from_numpy(part) for part in train)
    n_classes = int(y.max()) + 1
    if x.shape[2:] == (1, 1):
        net = mlp(x.shape[1], n_classes, seed=seed)
    else:
        net = cnn(x.shape[1], n_classes, seed=seed)
    fit(net, lambda net, x, y: loss(net(x), y), (x, y), epochs=image_epochs(len(y)), lr=3e-3, optimizer="adamw", weight_decay=1e-2,
        schedule="cosine", seed=seed)  # fmt: skip
    return net


@torch.no_grad()
def _outputs(net: nn.Module, x: np.ndarray) -> Tensor:
    return torch.cat([net(part) for part in torch.from_numpy(x).split(1000)])


@entry("image-classification", "CNN")
def image_cnn(train: Any, seed: int) -> Predict:
    """Return a small convolutional network, trained by AdamW with a cosine schedule."""
    net = _classifier(train, seed)
    return lambda x: _outputs(net, x).numpy()


@entry("ood-detection", "maximum softmax")
def maximum_softmax(train: Any, seed: int) -> Predict:
    """Return how unsure the network is: minus its largest probability (Hendrycks & Gimpel 2017)."""
    net = _classifier(train, seed)
    return lambda x: -_outputs(net, x).softmax(1).amax(1).numpy()


@entry("ood-detection", "energy")
def energy(train: Any, seed: int) -> Predict:
    """Return minus the logarithm of the sum of exponentiated scores (Liu et al. 2020)."""
    net = _classifier(train, seed)
    return lambda x: -_outputs(net, x).logsumexp(1).numpy()


@entry("ood-detection", "Mahalanobis")
def mahalanobis(train: Any, seed: int) -> Predict:
    """Return the distance of features to the nearest class in the shared covariance (Lee et al. 2018)."""
    body = _classifier(train, seed)[:-1]
    z, y = _outputs(body, train[0]), torch.from_numpy(train[1])
    means = torch.stack([z[y == k].mean(0) for k in range(int(y.max()) + 1)])
    gram = (z - means[y]).T.cov()
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    whiten = torch.linalg.inv(torch.linalg.cholesky(gram + ridge)).T
    return lambda x: torch.cdist(_outputs(body, x) @ whiten, means @ whiten).amin(1).numpy()


@entry("ood-detection", "10th nearest neighbour")
def nearest_features(train: Any, seed: int) -> Predict:
    """Return the distance of normalised features to the tenth nearest of training (Sun et al. 2022)."""
    body = _classifier(train, seed)[:-1]
    z = F.normalize(_outputs(body, train[0]))
    k = min(10, len(z))
    return lambda x: (
        torch.cdist(F.normalize(_outputs(body, x)), z).topk(k, largest=False).values[:, -1].numpy()
    )


def _probabilities(net: nn.Module, temperature: float = 1.0) -> Predict:
    return lambda x: (_outputs(net, x) / temperature).softmax(1).numpy()


@entry("calibration", "cross-entropy")
def plain_probabilities(train: Any, seed: int) -> Predict:
    """Return the network's own probabilities."""
    return _probabilities(_classifier(train, seed))


@entry("calibration", "temperature scaling")
def temperature_scaling(train: Any, seed: int) -> Predict:
    """Return probabilities at the temperature that fits a tenth held out best (Guo et al. 2017)."""
    rows, held_out = split(len(train[1]), (0.9, 0.1), seed, stratify=train[1])
    net = _classifier((train[0][rows], train[1][rows]), seed)
    scores, y = _outputs(net, train[0][held_out]), torch.from_numpy(train[1][held_out])
    temperatures = np.geomspace(0.1, 10, 201)
    losses = [float(F.cross_entropy(scores / t, y)) for t in temperatures]
    return _probabilities(net, float(temperatures[int(np.argmin(losses))]))


@entry("calibration", "label smoothing")
def label_smoothing(train: Any, seed: int) -> Predict:
    """Return probabilities of a network trained on labels smoothed by 0.05 (Müller et al. 2019)."""
    return _probabilities(_classifier(train, seed, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.05)))


@entry("calibration", "focal loss")
def focal_loss(train: Any, seed: int) -> Predict:
    """Return probabilities of a network trained by the focal loss of power 2 (Mukhoti et al. 2020)."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        log_p = z.log_softmax(1).gather(1, y[:, None])[:, 0]
        return -((1 - log_p.exp()).square() * log_p).mean()

    return _probabilities(_classifier(train, seed, loss))


class GraphNet(nn.Module):
    """Graph convolutions with residual connections, layer normalisation and a map of a node's own state.

    Parameters
    ----------
    conv : callable
        ``conv(n_in, n_out)`` makes a layer called as ``layer(x, edge_index)``.
    n_in, n_out, width, depth : int
    dropout : float
    """

    def __init__(
        self, conv: Callable[[int, int], nn.Module], n_in: int, n_out: int, width: int = 64, depth: int = 2,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.readout = nn.Linear(n_in, width), nn.Linear(width, n_out)
        self.convs = nn.ModuleList(conv(width, width) for _ in range(depth))
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return scores of shape (nodes, n_out)."""
        x = self.dropout(self.encoder(self.dropout(x)).relu())
        for conv, own, norm in zip(self.convs, self.own, self.norms, strict=True):
            h = norm(x)
            x = x + self.dropout((conv(h, edge_index) + own(h)).relu())
        return self.readout(x)


def _graph_entry(name: str, layer: str) -> None:
    @entry("node-classification", name)
    def _fit(train: Any, seed: int) -> Predict:
        conv = getattr(needs("torch_geometric.nn", "graphs"), layer)
        graph = train[0]
        best: tuple[float, Any] = (-1.0, None)
        for depth in (1, 2, 4):
            net = weights(GraphNet, conv, graph.x.shape[1], int(graph.y.max()) + 1, depth=depth, seed=seed)
            best = max(best, (fit_nodes(net, train, seed), net), key=lambda pair: pair[0])
        return lambda graph: torch.no_grad()(best[1])(graph.x, graph.edge_index)


for _entry, _layer in (("GCN", "GCNConv"), ("GraphSAGE", "SAGEConv"), ("GAT", "GATConv")):
    _graph_entry(_entry, _layer)


@entry("node-classification", "MLP")
def nodes_mlp(train: Any, seed: int) -> Predict:
    """Return a network that sees a node's own features only."""
    graph = train[0]

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(graph.x.shape[1], int(graph.y.max()) + 1, dropout=0.5, seed=seed)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.net(x)

    net = Alone()
    fit_nodes(net, train, seed)
    return lambda graph: torch.no_grad()(net)(graph.x, graph.edge_index)


@entry("forecasting", "repeat the last day")
def repeat_last(train: Any, seed: int) -> Predict:
    """Return the last 24 steps again."""
    return lambda x: x[:, -HORIZON:]


@entry("forecasting", "ridge")
def ridge_forecast(train: Any, seed: int) -> Predict:
    """Return a linear map from each variable's history, less its last value, to its future."""
    windows = np.lib.stride_tricks.sliding_window_view(train, HISTORY + HORIZON, axis=0)
    windows = windows[:: max(1, len(windows) // 4000)].reshape(-1, HISTORY + HORIZON)
    last = windows[:, HISTORY - 1 : HISTORY]
    model = RidgeCV(np.logspace(-2, 4, 7)).fit(windows[:, :HISTORY] - last, windows[:, HISTORY:] - last)

    def predict(x: np.ndarray) -> np.ndarray:
        rows = x.swapaxes(1, 2).reshape(-1, HISTORY)
        future = model.predict(rows - rows[:, -1:]) + rows[:, -1:]
        return future.reshape(len(x), x.shape[2], HORIZON).swapaxes(1, 2)

    return predict


@entry("imputation", "linear interpolation")
def interpolate(train: Any, seed: int) -> Predict:
    """Return straight lines between the observed neighbours in time."""

    def predict(x: np.ndarray) -> np.ndarray:
        filled = x.copy()
        for column in filled.T:
            gone = np.isnan(column)
            if not gone.all():
                column[gone] = np.interp(np.flatnonzero(gone), np.flatnonzero(~gone), column[~gone])
        return np.nan_to_num(filled)

    return predict


@entry("imputation", "ridge on the neighbours")
def ridge_impute(train: Any, seed: int) -> Predict:
    """Return iterated ridge regression on the other variables and four steps around."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    def around(x: np.ndarray) -> np.ndarray:
        moved = [np.roll(x, k, axis=0) for k in (-2, -1, 1, 2)]
        return np.hstack([x, *moved])

    model = IterativeImputer(max_iter=5, random_state=seed, keep_empty_features=True)
    hidden = np.random.default_rng(seed).random(train.shape) < 0.25
    model.fit(around(np.where(hidden, np.nan, train)[-4000:]))
    return lambda x: np.asarray(model.transform(around(x)))[:, : x.shape[1]]
