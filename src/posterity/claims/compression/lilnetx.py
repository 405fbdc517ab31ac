"""Claims about LilNetX: small files at the same accuracy, and weights and kernels that vanish as they cost more."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._files import pack_tensors, seal
from posterity.claims import Count, NotNegative, Positive, Share, Trial, bound, comparison, trend
from posterity.compression import LatentNet
from posterity.compression.latent_prior import encoded
from posterity.lab import nets, training
from posterity.lab.costs import saved_bytes, seconds_in_turns
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.lab.metrics import rank_correlation

BATCH = 50
BITS = (2, 3, 4, 5, 6, 8)
CLIPS = np.linspace(0.3, 1.0, 15)  # of the largest weight: where a quantiser may end


def _fits(data: ImageData, n_train: int, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, 1, "images")
    if n_train < 2:
        raise ValueError(f"n_train must be at least 2, got {n_train}: batches are normalised")


class _Task:
    """Images of one seed, a network for them, and its training."""

    def __init__(self, trial: Trial, data: str, n_train: int, width: int, epochs: int) -> None:
        images = load_images(data)
        n = len(images.y)
        train, test = split(n, (n_train / n, 1 - n_train / n), trial.seed)
        x = (images.x - images.x[train].mean()) / (images.x[train].std() + 1e-6)
        self.x, self.y = torch.from_numpy(x[train]).float(), torch.from_numpy(images.y[train])
        self.x_test, self.y_test = torch.from_numpy(x[test]).float(), torch.from_numpy(images.y[test])
        self.trial, self.epochs = trial, epochs
        channels, n_out = [x.shape[1], width, 2 * width, 2 * width], int(images.y.max()) + 1
        side = [-(-size // 4) for size in x.shape[2:]]
        with nets.seeded(trial.seed):
            layers: list[nn.Module] = []
            for k, stride in enumerate((1, 2, 2)):
                block = nn.Conv2d(channels[k], channels[k + 1], 3, stride, 1), nn.BatchNorm2d(channels[k + 1])
                layers += [*block, nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * side[0] * side[1], n_out))

    def fit(self, net: nn.Module, loss: Callable[..., Tensor], **options: Any) -> None:
        training.fit(net, loss, (self.x, self.y), epochs=self.epochs, batch_size=min(BATCH, len(self.x)), schedule="cosine",
                     seed=self.trial.seed, device=self.trial.device, **options)  # fmt: skip
        net.cpu().eval()

    def dense(self, lr: float, weight_decay: float) -> nn.Module:
        net = copy.deepcopy(self.net)
        self.fit(net, lambda net, x, y: F.cross_entropy(net(x), y), lr=lr, weight_decay=weight_decay)
        return net

    def latent(self, lambda_rate: float, lambda_slice: float, lr: float) -> LatentNet:
        """Train from the initial weights of the dense network: latents at ``lr``, all else slower."""
        lat = LatentNet(self.net, start="weights", generator=torch.Generator().manual_seed(self.trial.seed))

        def loss(lat: Any, x: Tensor, y: Tensor) -> Tensor:
            return (
                F.cross_entropy(lat(x), y) + lambda_rate * lat.rate_loss() + lambda_slice * lat.slice_loss()
            )

        def adam(_: Any, lr: float, **__: Any) -> torch.optim.Optimizer:
            latents, decoders = list(lat.latents().values()), list(lat.decoders.values())
            own = {id(p) for p in [*latents, *decoders]}
            rest = [p for p in lat.network_parameters() if id(p) not in own] + lat.prior_parameters()
            groups = ((latents, lr), (decoders, lr / 50), (rest, lr / 5))
            return torch.optim.Adam([{"params": params, "lr": rate} for params, rate in groups])

        self.fit(lat, loss, lr=lr, optimizer=adam)
        return lat

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            return float((net.eval()(self.x_test).argmax(1) == self.y_test).float().mean())


def _quantised(net: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """Return a network with weights of some bits, and its file's bytes: the same container and coder as lilnetx's."""
    net, levels = copy.deepcopy(net), 2 ** (bits - 1) - 1
    columns, steps = [], {}
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                tried = [float(layer.weight.abs().max()) * clip / levels for clip in CLIPS]
                codes = [(layer.weight / step).round().clamp(-levels, levels) for step in tried]
                errors = [
                    float((code * step - layer.weight).square().sum())
                    for code, step in zip(codes, tried, strict=True)
                ]
                best = int(np.argmin(errors))
                steps[f"decoder {name}"] = torch.tensor(tried[best])
                columns.append(codes[best].flatten().long().numpy())
                layer.weight.copy_(codes[best] * tried[best])
    kept = {name: value for name, value in net.state_dict().items() if value.ndim < 2}
    about = {"layers": [[list(v.shape), name] for name, v in net.state_dict().items() if v.ndim > 1]}
    tables, stream = encoded(columns, [None] * len(columns))
    return net, len(
        seal(b"QUAN", pack_tensors(about, {**steps, **kept}, {"latents": stream, "tables": tables}))
    )


@comparison(
    paper="lilnetx",
    says="At the same accuracy the jointly trained network is a much smaller file than one trained, quantised and "
    "entropy-coded afterwards.",
    where="Girish et al., abstract and Section 4",
    arms=("quantise and code", "lilnetx"),
    metric="log2 of the bytes of the smallest file that loses at most 1 point of the float network's test accuracy",
    better="lower",
    smallest={"epochs": 1, "n_train": 200, "width": 4},
    check=_fits,
)
def smaller_file(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_000,
    width: Count = 16,
    epochs: Count = 40,
    lr: Positive = 3e-2,
    dense_lr: Positive = 1e-2,
    low_rate: NotNegative = 0.001,
    high_rate: NotNegative = 0.05,
    lambda_slice: NotNegative = 1e-4,
    points: Share = 0.01,
) -> dict[str, float]:
    """Train two dense networks and two latent ones, and keep the smallest admissible file of each kind.

    The dense ones, without and with weight decay 5e-4, are quantised at 2, 3, 4, 5, 6 and 8 bits a weight, each
    tensor with the step of least squared error, and coded as lilnetx codes; the first sets the accuracy that is
    asked. Files hold all state of the network. An arm without an admissible file counts the float network's file;
    the records say how many were admissible. ``data="cifar10"`` is the paper's; take more images and ``width=32``.
    """
    task = _Task(trial, data, n_train, width, epochs)
    dense = [task.dense(dense_lr, decay) for decay in (0.0, 5e-4)]
    whole = task.accuracy(dense[0])
    trial.record("accuracy, float", whole)
    files: dict[str, list[tuple[int, float]]] = {"quantise and code": [], "lilnetx": []}
    for net in dense:
        for bits in BITS:
            small, size = _quantised(net, bits)
            files["quantise and code"].append((size, task.accuracy(small)))
    for rate in (low_rate, high_rate):
        lat = task.latent(rate, lambda_slice, lr)
        data_bytes = lat.compress()
        value = task.accuracy(LatentNet.decompress(task.net, data_bytes))
        files["lilnetx"].append((len(data_bytes), value))
        for name, share in lat.sparsity().items():
            trial.record(f"zero {name}, rate {rate:g}", share)
        for name, part in lat.sizes().items():
            trial.record(f"bytes of {name}, rate {rate:g}", part)
        trial.record(f"accuracy, rate {rate:g}", value)
    trial.record("bytes, float", saved_bytes(dense[0].state_dict()))
    least = {}
    for arm, pairs in files.items():
        fitting = [size for size, value in pairs if value >= whole - points - 1e-9]
        trial.record(f"admissible files, {arm}", len(fitting))
        least[arm] = min(fitting, default=saved_bytes(dense[0].state_dict()))
        trial.record(f"bytes, {arm}", least[arm])
    return {arm: math.log2(size) for arm, size in least.items()}


@trend(
    paper="lilnetx",
    says="The file shrinks steadily as the rate costs more.",
    where="Girish et al., Section 4, trade-off curves",
    metric="rank correlation of lambda_rate and the bytes of the file",
    high=-0.9,
    smallest={"epochs": 1, "n_train": 200, "width": 4},
    check=_fits,
)
def rate_sets_bytes(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_000,
    width: Count = 16,
    epochs: Count = 8,
    lr: Positive = 5e-2,
    lambda_slice: NotNegative = 1e-4,
) -> float:
    """Train at four values of lambda_rate, 0.01 to 0.64; the curves have bytes and accuracies."""
    task = _Task(trial, data, n_train, width, epochs)
    rates = [0.01, 0.04, 0.16, 0.64]
    sizes: list[float] = []
    for rate in rates:
        lat = task.latent(rate, lambda_slice, lr)
        sizes.append(len(lat.compress()))
        trial.track("bytes", rate, sizes[-1])
        trial.track("accuracy", rate, task.accuracy(lat))
    return rank_correlation(rates, sizes)


@trend(
    paper="lilnetx",
    says="Whole kernels vanish as their norm costs more.",
    where="Girish et al., Section 4, structured sparsity",
    metric="rank correlation of lambda_slice and the share of kernels that are zero",
    low=0.9,
    smallest={"epochs": 1, "n_train": 200, "width": 4},
    check=_fits,
)
def norm_empties_slices(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_000,
    width: Count = 16,
    epochs: Count = 8,
    lr: Positive = 5e-2,
    lambda_rate: NotNegative = 0.01,
) -> float:
    """Train at four values of lambda_slice, 1e-5 to 1e-2; the curves have shares and accuracies."""
    task = _Task(trial, data, n_train, width, epochs)
    weights = [1e-5, 1e-4, 1e-3, 1e-2]
    shares = []
    for weight in weights:
        lat = task.latent(lambda_rate, weight, lr)
        shares.append(lat.sparsity()["slices"])
        trial.track("zero kernels", weight, shares[-1])
        trial.track("zero input channels", weight, lat.sparsity()["in_channels"])
        trial.track("accuracy", weight, task.accuracy(lat))
    return rank_correlation(weights, shares)


@bound(
    paper="lilnetx",
    says="With its zero channels skipped the trained network runs in less time than the dense one.",
    where="Girish et al., abstract: inference about 1.8 times as fast",
    metric="seconds of a forward pass of the compact network, over those of the dense one",
    limit=1.0,
    timed=True,
    smallest={"epochs": 1, "n_train": 200, "width": 8, "rounds": 3},
    check=_fits,
)
def faster(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_000,
    width: Count = 32,
    epochs: Count = 12,
    lr: Positive = 5e-2,
    lambda_rate: NotNegative = 0.2,
    lambda_slice: NotNegative = 1e-3,
    rounds: Count = 31,
) -> float:
    """Train once, then run the dense network and what `to_compact` leaves in turns, on a batch of 64 in one thread.

    The median of the ratios counts. The records have accuracies, the seconds of a pass, the bytes of both files and
    the shares of channels that are zero.
    """
    task = _Task(trial, data, n_train, width, epochs)
    lat = task.latent(lambda_rate, lambda_slice, lr)
    arms = {"dense": task.net.eval(), "compact": lat.to_compact().eval()}
    batch = task.x_test[torch.arange(64) % len(task.x_test)]
    with torch.inference_mode():
        seconds = seconds_in_turns([partial(net, batch) for net in arms.values()], rounds)
    for arm, value in zip(arms, np.median(seconds, 0), strict=True):
        trial.record(f"seconds of a pass, {arm}", value)
    trial.record("accuracy, compact", task.accuracy(arms["compact"]))
    trial.record("bytes, dense", saved_bytes(task.net.state_dict()))
    trial.record("bytes, lilnetx", len(lat.compress()))
    for name, share in lat.sparsity().items():
        trial.record(f"zero {name}", share)
    return float(np.median(seconds[:, 1] / seconds[:, 0]))
