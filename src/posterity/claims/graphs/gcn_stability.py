"""Claims about limitless stability: resolvent filters work across resolutions, with a rate and a bound."""

from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Positive, Trial, bound, comparison, trend
from posterity.graphs import (
    Coarsening,
    StableGCN,
    apply_filter,
    collapse_bound,
    collapse_strong_edges,
)
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.data.needs import require_rest
from posterity.lab.nets import weights
from posterity.lab.training import fit

Edges = tuple[Tensor, Tensor, Tensor]  # edge_index, edge_weight, node_weight


def _grid(height: int, width: int, delta: float) -> tuple[Edges, Coarsening]:
    """Return the grid of pixels, edges inside each 2 x 2 block strong, and the grid of blocks."""
    pixel = np.arange(height * width).reshape(height, width)
    pairs = [
        np.stack([pixel[:, :-1].ravel(), pixel[:, 1:].ravel()]),
        np.stack([pixel[:-1].ravel(), pixel[1:].ravel()]),
    ]
    half = torch.from_numpy(np.concatenate(pairs, 1))
    edges = torch.cat([half, half.flip(0)], 1)
    block = (edges // width // 2) * width + edges % width // 2
    strong = block[0] == block[1]
    weight = torch.where(strong, 1 / delta, 1.0)
    fine = edges, weight, torch.ones(height * width)
    return fine, collapse_strong_edges(edges, height * width, weight, strong)


def _features(pixels: Tensor) -> Tensor:
    """Return (images, nodes, 7): brightness p, its moments p u, p v, p u^2, p v^2, and u, v."""
    height, width = pixels.shape[1:]
    v, u = torch.meshgrid(torch.linspace(-0.5, 0.5, height), torch.linspace(-0.5, 0.5, width), indexing="ij")
    u, v = u.expand_as(pixels), v.expand_as(pixels)
    p = pixels
    return torch.stack([p, p * u, p * v, p * u**2, p * v**2, u, v], -1).flatten(1, 2)


def _propagation(kind: str, graph: Edges) -> Tensor:
    """Return the matrix of a graph convolution: of Kipf and Welling, or I - L / lambda_max."""
    (sender, receiver), weight, mu = graph
    n = len(mu)
    W = torch.zeros(n, n).index_put((receiver, sender), weight, accumulate=True)
    if kind == "gcn":
        W = W + torch.eye(n)
        root = W.sum(1).rsqrt()
        return root[:, None] * W * root
    L = torch.diag(W.sum(1)) - W
    top = torch.linalg.eigvalsh(L / (mu[:, None] * mu).sqrt())[-1]
    return torch.eye(n) - L / mu[:, None] / top


class _Plain(nn.Module):
    """The network of `StableGCN` with another matrix for the resolvent."""

    def __init__(self, kind: str, in_channels: int, hidden: int, out_channels: int, depth: int) -> None:
        super().__init__()
        self.kind = kind
        self.convs = nn.ModuleList(nn.Linear(hidden if k else in_channels, hidden) for k in range(depth))
        self.readout = nn.Linear(hidden, out_channels)
        self.matrices: dict[int, Tensor] = {}  # by number of nodes: the two resolutions

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, node_weight: Tensor) -> Tensor:
        """Return scores (images, 1, classes)."""
        n = len(node_weight)
        if n not in self.matrices:
            self.matrices[n] = _propagation(self.kind, (edge_index, edge_weight, node_weight))
        for conv in self.convs:
            x = (self.matrices[n] @ conv(x)).relu()
        mean = (node_weight[:, None] * x).sum(-2, keepdim=True) / node_weight.sum()
        return self.readout(mean)


def _fits(data: ImageData, n_train: int, n_test: int, **_: object) -> None:
    require_rest(len(data.y), "n_train", n_train, n_test, "images")
    if min(data.x.shape[2:]) < 2:
        raise ValueError(
            f"images must have 2 x 2 pixels or more, are of {data.x.shape[2]} x {data.x.shape[3]}"
        )


@comparison(
    paper="gcn-stability",
    says="Trained at one resolution, a network of resolvent filters works at another; a GCN does not.",
    where="the paper's experiments",
    arms=("gcn", "polynomial", "resolvent"),
    metric="accuracy on coarse graphs after training on fine ones",
    better="higher",
    smallest={"n_train": 100, "n_test": 100, "epochs": 2},
    check=_fits,
)
def resolutions(
    trial: Trial,
    data: Images = "digits",
    delta: Positive = 0.01,
    n_train: Count = 1_200,
    n_test: Count = 597,
    hidden: Count = 32,
    depth: Count = 2,
    epochs: Count = 30,
) -> dict[str, float]:
    """Classify images as grids of pixels, and then as grids of 2 x 2 blocks.

    Edges inside a block have weight 1/delta, others 1; a coarse node has the weight of four,
    and the means of their features. Arms share split, width, depth, pooling, optimiser,
    batches and epochs; none is tuned. Beside the metric: the accuracy on fine graphs, where the
    resolvent pays for not seeing what is inside a block, and how far embeddings move. The paper's
    own data are molecules, whose bonds to hydrogen grow strong.
    """
    images = load_images(data)
    order = np.random.default_rng(trial.seed).permutation(len(images.x))
    rows = torch.from_numpy(order[: n_train + n_test])
    pixels = torch.from_numpy(images.x).mean(1)[rows]
    height, width = (side - side % 2 for side in pixels.shape[1:])
    fine, coarse = _grid(height, width, delta)
    x, y = _features(pixels[:, :height, :width]), torch.from_numpy(images.y)[rows]
    small = coarse.edge_index, coarse.edge_weight, coarse.node_weight
    test = x[n_train:], y[n_train:]
    test_small = coarse.project(test[0].movedim(1, 0)).movedim(0, 1)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x, *fine)[:, 0], y)

    sizes = x.shape[-1], hidden, len(images.classes), depth
    result = {}
    for arm, make in {
        "gcn": partial(_Plain, "gcn"),
        "polynomial": partial(_Plain, "polynomial"),
        "resolvent": partial(StableGCN, pool="mean"),
    }.items():
        net = weights(make, *sizes, seed=trial.seed)
        fit(net, loss, (x[:n_train], y[:n_train]), epochs=epochs, batch_size=100, lr=1e-2, seed=trial.seed)
        with torch.no_grad():
            on_fine, on_coarse = net(test[0], *fine)[:, 0], net(test_small, *small)[:, 0]
            readout, net.readout = net.readout, nn.Identity()
            before, after = net(test[0], *fine), net(test_small, *small)
            net.readout = readout
        result[arm] = _accuracy(on_coarse, test[1])
        trial.record(f"{arm}, accuracy on fine graphs", _accuracy(on_fine, test[1]))
        trial.record(f"{arm}, relative change of embeddings", float((after - before).norm() / before.norm()))
    return result


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).float().mean())


def _club(seed: int, pairs: int, delta: float) -> dict[str, Any]:
    """Return the karate club with a few random edges of weight 1/delta."""
    half = torch.tensor(list(nx.karate_club_graph().edges)).T
    chosen = torch.zeros(half.shape[1], dtype=torch.bool)
    chosen[torch.randperm(half.shape[1], generator=torch.Generator().manual_seed(seed))[:pairs]] = True
    strong = torch.cat([chosen, chosen])
    weight = torch.where(strong, 1 / delta, 1.0).double()
    return {
        "edge_index": torch.cat([half, half.flip(0)], 1), "num_nodes": 34,
        "edge_weight": weight, "strong": strong,
    }  # fmt: skip


def _collapse_error(graph: dict[str, Any], shift: float) -> float:
    """Return ||R - J R_c J*|| with the resolvents from eigenvectors."""
    coarse = collapse_strong_edges(**graph)

    def resolvent(n: int, *edges: Tensor) -> Tensor:
        return apply_filter(lambda z: shift / (shift + z), torch.eye(n, dtype=torch.float64), *edges)

    R = resolvent(34, graph["edge_index"], graph["edge_weight"])
    J = coarse.lift(torch.eye(coarse.num_nodes, dtype=torch.float64))
    small = resolvent(coarse.num_nodes, coarse.edge_index, coarse.edge_weight, coarse.node_weight.double())
    return float(torch.linalg.matrix_norm(R - J @ small @ coarse.project(torch.eye(34).double()), 2))


@trend(
    paper="gcn-stability",
    says="As edges grow strong, the resolvent tends to that of the collapsed graph, in proportion.",
    where="the paper's analysis of collapsing edges",
    metric="slope of the log of the error against that of delta, the inverse strength",
    low=0.95,
    high=1.05,
    smallest={"deltas": (1e-2, 1e-3)},
)
def rate(
    trial: Trial,
    deltas: tuple[Positive, ...] = (1e-2, 1e-3, 1e-4, 1e-5),
    pairs: Count = 6,
    shift: Positive = 1.0,
) -> float:
    """Make six random edges of the karate club strong and collapse them, in float64.

    The error is the operator norm of R - J R_c J*. Above delta = 0.01 it still bends.
    """
    errors = [_collapse_error(_club(trial.seed, pairs, delta), shift) for delta in deltas]
    for delta, error in zip(deltas, errors, strict=True):
        trial.track("error of the resolvent by delta", delta, error)
    return float(np.polyfit(np.log(deltas), np.log(errors), 1)[0])


@bound(
    paper="gcn-stability",
    says="The certificate is never passed: the resolvents are as near as it says, at any strength.",
    where="the paper's analysis of collapsing edges, with constants of our own",
    metric="largest error over its bound",
    limit=1.0,
    smallest={"deltas": (1.0, 1e-2)},
)
def certificate(
    trial: Trial,
    deltas: tuple[Positive, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    pairs: Count = 6,
    shift: Positive = 1.0,
) -> float:
    """Divide the error of `rate` by `collapse_bound`, from equal edges to very strong ones."""
    ratios = []
    for delta in deltas:
        graph = _club(trial.seed, pairs, delta)
        ratios.append(_collapse_error(graph, shift) / collapse_bound(**graph, shift=shift).value)
        trial.track("error over bound by delta", delta, ratios[-1])
    return max(ratios)
