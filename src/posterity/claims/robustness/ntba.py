"""Claims about tangent-kernel poisons: few of them plant a backdoor, and whether a filter sees them."""

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, NotNegative, Positive, Trial, comparison
from posterity.lab import nets
from posterity.lab.data import ImageData, Images, load_images
from posterity.robustness import (
    AuditResult,
    BackdoorAudit,
    PeriodicTrigger,
    attack_success,
    loo_residuals,
    relu_ntk,
)

LEAST = 5  # images of either class to test on


def _fits(data: ImageData, n_train: int, n_poisons: int, pair: Any, counts: Any = (), **_: Any) -> None:
    sizes = np.bincount(data.y, minlength=len(data.classes))
    if len(pair) != 2 or pair[0] == pair[1] or max(pair) >= len(sizes):
        raise ValueError(
            f"pair must be two different classes of 0 to {len(sizes) - 1}, source and target, got {tuple(pair)}"
        )
    for k in pair:
        if sizes[k] < n_train + LEAST:
            raise ValueError(
                f"n_train must leave {LEAST} images of each class of pair, of {data.classes[k]!r} there are "
                f"{sizes[k]}, got {n_train}"
            )
    if n_train < 5:
        raise ValueError(f"n_train must be at least 5, got {n_train}")
    most = n_train - max(round(0.2 * n_train), 1)
    if max((n_poisons, *counts)) > most:
        raise ValueError(
            f"n_poisons and counts must be at most {most}, the candidates of {n_train} images, got "
            f"{max((n_poisons, *counts))}"
        )


class _Layer(nn.Module):
    """A linear or convolutional layer in the kernel's parametrisation: N(0, 1) weights, scaled outside."""

    def __init__(self, *shape: int, gain: float = math.sqrt(2)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.scale = gain / math.sqrt(math.prod(shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return self.scale * F.linear(x, self.weight)
        return self.scale * F.conv2d(x, self.weight, stride=2, padding=1)


def _mlp(shape: tuple[int, ...], width: int) -> nn.Sequential:
    first = _Layer(width, math.prod(shape), gain=1.0)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), _Layer(width, width), nn.ReLU(), _Layer(1, width))


def _convnet(shape: tuple[int, ...], width: int) -> nn.Sequential:
    width, quarter = max(width // 16, 1), [-(-side // 4) for side in shape[1:]]  # each stride rounds up
    return nn.Sequential(
        _Layer(width, shape[0], 3, 3, gain=1.0), nn.ReLU(), _Layer(2 * width, width, 3, 3), nn.ReLU(), nn.Flatten(),
        _Layer(1, 2 * width * math.prod(quarter)),
    )  # fmt: skip


def _victim(x: Tensor, y: Tensor, network: str, width: int, steps: int, lr: float, trial: Trial) -> nn.Module:
    """Return a network trained on all images at once by the squared loss, from the weights of the seed."""
    make = _mlp if network == "mlp" else _convnet
    net = nets.weights(make, tuple(x.shape[1:]), width, seed=trial.seed).to(trial.device)
    x, y = x.to(trial.device), y.to(trial.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
    return net.cpu().eval()


class _Scene:
    """Images of two classes to train on and to test on, a trigger, and the victims of poisons."""

    def __init__(
        self, trial: Trial, data: str, pair: Any, n_train: int, strength: float, frequency: float, **victim: Any
    ) -> None:  # fmt: skip
        images = load_images(data)
        self.trial, self.victim = trial, victim
        self.generator = torch.Generator().manual_seed(trial.seed)
        x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
        train, test = [], []
        for label in pair:
            index = (y == label).nonzero()[:, 0]
            index = index[torch.randperm(len(index), generator=self.generator)]
            train.append(x[index[:n_train]])
            test.append(x[index[n_train : n_train + 500]])
        self.x, (self.source, self.target) = torch.cat(train), test
        self.y = torch.ones(2 * n_train)
        self.y[:n_train] = -1
        self.trigger = PeriodicTrigger(strength, frequency)

    def train(self, poisons: Tensor) -> nn.Module:
        """Return a network trained on the clean images and poisons that are labelled as the target."""
        x, y = torch.cat([self.x, poisons]), torch.cat([self.y, torch.ones(len(poisons))])
        return _victim(x, y, trial=self.trial, **self.victim)

    def audit(self, kernel: Any, n_poisons: int, relative_ridge: float, max_iter: int) -> AuditResult:
        generator = torch.Generator().manual_seed(self.trial.seed)
        return BackdoorAudit(
            kernel, self.trigger, n_poisons=n_poisons, relative_ridge=relative_ridge, max_iter=max_iter,
            generator=generator,
        ).run(self.x, self.y)  # fmt: skip

    def random(self, n_poisons: int) -> Tensor:
        """Return triggered source images, of which a smaller number is a part of a larger one."""
        generator = torch.Generator().manual_seed(self.trial.seed)
        order = torch.randperm(len(self.x) // 2, generator=generator)
        return self.trigger(self.x[order[:n_poisons]])

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Return the clean accuracy, mean over the two classes."""
        right = [(net(self.source) <= 0).float().mean(), (net(self.target) > 0).float().mean()]
        return float(sum(right)) / 2

    def success(self, net: nn.Module) -> float:
        return attack_success(net, self.source, self.trigger)


@comparison(
    paper="ntba",
    says="Designed poisons plant a backdoor with far fewer examples than random triggered images.",
    where="Hayase and Oh, Section 4",
    arms=("random", "greedy", "ntba"),
    metric="share of triggered test images of the source class that the retrained network takes for the target",
    better="higher",
    smallest={"n_train": 10, "n_poisons": 1, "counts": (), "width": 8, "steps": 5, "max_iter": 2},
    check=_fits,
)
def few_poisons(
    trial: Trial,
    data: Images = "digits",
    pair: tuple[Annotated[int, Between(0)], ...] = (3, 8),
    n_train: Count = 100,
    n_poisons: Count = 2,
    counts: tuple[Count, ...] = (1, 4),
    strength: Positive = 0.2,
    frequency: Positive = 4.0,
    network: Literal["mlp", "convnet"] = "mlp",
    relative_ridge: NotNegative = 0.12,
    max_iter: Annotated[int, Between(0)] = 60,
    width: Count = 256,
    steps: Count = 400,
    lr: Positive = 0.5,
) -> dict[str, float]:
    """Train a network anew on ``n_train`` images a class and a few poisons, and count its errors.

    Source and target class are ``pair``. The arms share images, trigger, initial weights and steps;
    the first takes its poisons from the source images at random, the second greedily, and from
    there the third designs them. Kernel and network have two hidden layers, those of the kernel
    infinitely wide; with ``network="convnet"`` it is the tangent kernel of the network that was
    trained on the clean images. The records have the clean accuracy, the success without poisons and what the kernel
    predicted; the curves, the success of other numbers of poisons. The paper's setting is
    ``data="cifar10", pair=(4, 9), strength=6/255, frequency=16`` with a wide ResNet and all images.
    """
    victim = {"network": network, "width": width, "steps": steps, "lr": lr}
    scene = _Scene(trial, data, pair, n_train, strength, frequency, **victim)
    clean = scene.train(scene.x[:0])
    trial.record("success without poisons", scene.success(clean))
    trial.record("clean accuracy without poisons", scene.accuracy(clean))
    kernel = relu_ntk if network == "mlp" else clean
    reached = {}
    for n in sorted({*counts, n_poisons}):
        found = scene.audit(kernel, n, relative_ridge, max_iter)
        for arm, poisons in (
            ("random", scene.random(n)), ("greedy", found.initial), ("ntba", found.poisons),
        ):  # fmt: skip
            net = scene.train(poisons)
            trial.track(f"success by the number of poisons: {arm}", n, scene.success(net))
            if n == n_poisons:
                reached[arm] = scene.success(net)
                trial.record(f"clean accuracy, {arm}", scene.accuracy(net))
        if n == n_poisons:
            trial.record("success that the kernel predicts, ntba", found.predicted_success)
            for score, area in found.detection.items():
                trial.record(f"poisons found by {score} (AUC), ntba", area)
    return reached


@comparison(
    paper="ntba",
    says="Leave-one-out residuals find random poisons better than designed ones.",
    where="not a statement of the paper; asked of its poisons here",
    arms=("random", "ntba"),
    metric="area under the ROC curve of the residual: poisons against clean images of the target class",
    better="lower",
    smallest={"n_train": 10, "n_poisons": 2, "width": 8, "steps": 5, "max_iter": 2},
    check=_fits,
    reason="A poison moves predictions in proportion to its residual: designed to move more, it stands out more.",
)
def hidden_poisons(
    trial: Trial,
    data: Images = "digits",
    pair: tuple[Annotated[int, Between(0)], ...] = (3, 8),
    n_train: Count = 100,
    n_poisons: Count = 16,
    strength: Positive = 0.2,
    frequency: Positive = 4.0,
    relative_ridge: NotNegative = 0.12,
    max_iter: Annotated[int, Between(0)] = 60,
    width: Count = 256,
    steps: Count = 400,
    lr: Positive = 0.5,
) -> dict[str, float]:
    """Filter as many poisons of either kind by their residuals, in the kernel of a wide network.

    A few poisons among a hundred images are found whatever they are, and there is nothing to
    compare; as many as here hide each other. The records have the success of networks retrained with
    either kind: what is hidden must also work.
    """
    scene = _Scene(
        trial, data, pair, n_train, strength, frequency, network="mlp", width=width, steps=steps, lr=lr
    )
    found = scene.audit(relu_ntk, n_poisons, relative_ridge, max_iter)
    area = {}
    for arm, poisons in {"random": scene.random(n_poisons), "ntba": found.poisons}.items():
        x, y = torch.cat([scene.x, poisons]).double(), torch.cat([scene.y, torch.ones(n_poisons)])
        k = relu_ntk(x, x)
        residual = loo_residuals(k, y, ridge=relative_ridge * float(k.diagonal().mean()))[n_train:]
        poisoned = np.arange(len(residual)) >= n_train
        area[arm] = float(roc_auc_score(poisoned, residual.numpy()))
        trial.record(f"success, {arm}", scene.success(scene.train(poisons)))
    return area
