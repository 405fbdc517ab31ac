"""Claims about GAINS: trained for it, a neural ODE is provably robust, and linear bounds prove more than boxes."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, NotNegative, Positive, Trial, comparison
from posterity.lab import nets, training
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.robustness import (
    CertifiedLoss,
    NeuralODEBlock,
    TimeLinear,
    certify,
    epsilon_schedule,
    interval_bounds,
    trajectory_graph,
)


def _fits(data: ImageData, n_train: int, n_test: int, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, n_test, "images")


def _images(data: str, n_train: int, n_test: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return flat images in [0, 1] and labels, to learn from and to certify; the number of classes."""
    images = load_images(data)
    n = len(images.y)
    train, test = split(n, (n_train / n, n_test / n), seed)
    x, y = torch.from_numpy(images.x).flatten(1), torch.from_numpy(images.y)
    return x[train], y[train], x[test], y[test], len(images.classes)


def _net(inputs: int, classes: int, width: int) -> nn.Sequential:
    """Return a layer, an ODE block of two layers, and a linear classifier."""
    func = nn.Sequential(TimeLinear(width, width), nn.ReLU(), TimeLinear(width, width), nn.ReLU())
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), NeuralODEBlock(func), nn.Linear(width, classes))


def _train(
    x: Tensor, y: Tensor, classes: int, epsilon: float, width: int, epochs: int, trial: Trial
) -> nn.Sequential:
    """Return a network trained by the likelihood (``epsilon`` 0), or for boxes of ``epsilon``."""
    net: Any = nets.weights(_net, x.shape[1], classes, width, seed=trial.seed)
    certified = CertifiedLoss(generator=torch.Generator().manual_seed(trial.seed))
    steps, taken = epochs * math.ceil(len(x) / min(128, len(x))), 0

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal taken
        done, taken = taken / steps, taken + 1
        if not epsilon:
            return F.cross_entropy(net(x), y)
        certified.q = 0.15 + 0.18 * math.sin(math.pi / 2 * done)
        certified.n_trajectories = 1 if done < 0.4 else 2
        now = epsilon_schedule(done, start=0.05, length=0.6, target=epsilon)
        return certified(net, x, y, now, epsilon_target=epsilon)  # type: ignore[arg-type]

    training.fit(net, loss, (x, y), epochs=epochs, batch_size=128, lr=3e-3, clip=1000.0, seed=trial.seed,
                 device=trial.device)  # fmt: skip
    return net.cpu().eval()


@comparison(
    paper="gains",
    says="Certified training makes a neural ODE provably robust, at a cost in accuracy.",
    where="Zeqiri et al., Section 5, certified accuracy on MNIST and Fashion-MNIST",
    arms=("standard training", "gains training"),
    metric="certified accuracy on test images, boxes through the trajectory graph",
    better="higher",
    smallest={"n_train": 20, "n_test": 1, "epochs": 3, "width": 2, "epsilon": 0.003},
    check=_fits,
)
def certified_training(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1200,
    n_test: Count = 60,
    epsilon: Positive = 0.1,
    width: Count = 24,
    epochs: Count = 40,
) -> dict[str, float]:
    """Train one network by the likelihood and one for boxes a tenth larger than those to prove.

    The arms share images, initial weights, batches and epochs. The records have the clean
    accuracy, which is what proofs cost, and the nodes of the trajectory graph of a test image.
    The curves show, for the standard network, how nodes and trajectories grow with the length
    of time. The paper's setting is MNIST with convolutions, 100 epochs and epsilon 0.1 to 0.2.
    """
    x, y, x_test, y_test, classes = _images(data, n_train, n_test, trial.seed)
    proved = {}
    for arm, train_epsilon in {"standard training": 0.0, "gains training": 1.1 * epsilon}.items():
        net = _train(x, y, classes, train_epsilon, width, epochs, trial)
        proved[arm] = float(certify(net, x_test, y_test, epsilon, method="box").verified.float().mean())
        with torch.no_grad():
            accuracy = (net(x_test).argmax(1) == y_test).float().mean()
        trial.record(f"accuracy, {arm}", accuracy)
        one = ((x_test[:1] - epsilon).clamp(0, 1), (x_test[:1] + epsilon).clamp(0, 1))
        for t1 in (1.0, 2.0, 4.0, 8.0) if not train_epsilon else (1.0,):
            long: Any = copy.deepcopy(net)
            long[2].t1 = t1
            graph = trajectory_graph(long[2], *interval_bounds(long[:2], *one), max_nodes=20_000)
            if t1 == 1:
                trial.record(f"nodes, {arm}", len(graph.nodes))
            if not train_epsilon:
                trial.track("nodes", t1, len(graph.nodes))
                trial.track("log2 of the trajectories", t1, math.log2(graph.n_trajectories))
    return proved


@comparison(
    paper="gains",
    says="Linear bounds through the trajectory graph prove more than boxes do, on the same networks.",
    where="Zeqiri et al., Section 4.3 and 5",
    arms=("box", "gains"),
    metric="certified accuracy on test images",
    better="higher",
    smallest={"n_train": 20, "n_test": 1, "epochs": 3, "width": 2, "epsilon": 0.003},
    check=_fits,
)
def verification(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1200,
    n_test: Count = 100,
    epsilon: Positive = 0.15,
    train_epsilon: NotNegative = 0.11,
    width: Count = 24,
    epochs: Count = 40,
) -> dict[str, float]:
    """Certify one network, trained for smaller boxes than those to prove, by both kinds of bounds.

    By construction the second is never lower. Where boxes already prove all, or the network was
    trained for boxes of the full size, there is little left to gain. The records have the clean accuracy
    and the mean of the margins gained.
    """
    x, y, x_test, y_test, classes = _images(data, n_train, n_test, trial.seed)
    net = _train(x, y, classes, train_epsilon, width, epochs, trial)
    found = {method: certify(net, x_test, y_test, epsilon, method=method) for method in ("box", "gains")}
    with torch.no_grad():
        trial.record("accuracy", (net(x_test).argmax(1) == y_test).float().mean())
    gained = found["gains"].margin - found["box"].margin
    trial.record("median margin gained", float(gained.median()))
    return {method: float(certificate.verified.float().mean()) for method, certificate in found.items()}
