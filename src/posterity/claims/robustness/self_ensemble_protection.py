"""Claims about self-ensemble protection: a run's checkpoints protect better than its last, and differ as networks do."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Positive, Several, Trial, bound, comparison
from posterity.lab import nets, training
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.robustness import SelfEnsembleProtector, gradient_similarity, protection_report

BATCH = 64
TESTED = 1_000  # images at most
LEAST = 20  # images to learn from and to test on
PROTECTOR, READER = 12, 16  # channels of their first convolutions


def _fits(data: ImageData, n_train: int, **_: Any) -> None:
    if n_train < LEAST:
        raise ValueError(f"n_train must be at least {LEAST}, got {n_train}")
    require_rest(len(data.y), "n_train", n_train, LEAST, "images")


def _images(data: str, n_train: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return images of each class and labels, to be released and to test on; the number of classes released."""
    images = load_images(data)
    n = len(images.y)
    parts = split(n, (n_train / n, min(TESTED, n - n_train) / n), seed, stratify=images.y)
    classes, y = np.unique(images.y[parts[0]], return_inverse=True)  # those of a single image may be missing
    code = {old: new for new, old in enumerate(classes)}
    test = np.array([row for row in parts[1] if images.y[row] in code])
    x = torch.from_numpy(images.x)
    return (
        x[parts[0]],
        torch.from_numpy(y),
        x[test],
        torch.tensor([code[c] for c in images.y[test]]),
        len(code),
    )


def _net(channels: int, classes: int, width: int) -> nn.Sequential:
    """Return two convolutions, a layer of 64 features, and a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(32 * width, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def _train(
    x: Tensor, y: Tensor, classes: int, width: int, epochs: int, seed: int, device: str,
    callback: Callable[[nn.Module], Callable[[int, float], None]] | None = None,
) -> nn.Module:  # fmt: skip
    net = nets.weights(_net, x.shape[1], classes, width, seed=seed)
    training.fit(net, lambda net, x, y: F.cross_entropy(net(x), y), (x, y), epochs=epochs, batch_size=BATCH,
                 lr=0.05, seed=seed, device=device, callback=callback(net) if callback else None,
                 optimizer=lambda weights, lr, weight_decay: torch.optim.SGD(weights, lr=lr, momentum=0.9))  # fmt: skip
    return net.eval()


def _run(x: Tensor, y: Tensor, classes: int, epochs: int, seed: int, device: str) -> list[nn.Module]:
    """Return the network after each epoch of one training run."""
    kept: list[nn.Module] = []
    per_epoch = -(-len(x) // min(BATCH, len(x)))

    def keep(net: nn.Module) -> Callable[[int, float], None]:
        return lambda step, loss: None if step % per_epoch else kept.append(copy.deepcopy(net).eval())

    _train(x, y, classes, PROTECTOR, epochs, seed, device, keep)
    return kept


@comparison(
    paper="self-ensemble-protection",
    says="The checkpoints of one training run protect data better than its final model does.",
    where="Chen et al., Section 4, CIFAR-10",
    arms=("final checkpoint", "unprotected", "sign noise", "SEP-FA", "SEP-FA-VR", "SEP"),
    metric="accuracy on clean images of a network trained on protected ones",
    better="lower",
    smallest={"n_train": 100, "epochs": 2, "steps": 2, "train_epochs": 1},
    seeds=10,
    check=_fits,
)
def protection(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1203,
    epsilon: Positive = 0.2,
    steps: Count = 10,
    epochs: Count = 10,
    train_epochs: Count = 15,
) -> dict[str, float]:
    """Protect images five ways, or not, and train on each another network, from other weights.

    The first and the last arm push by the same loss. All perturbations keep to ``epsilon``, which images of
    8x8 pixels need so large, and have equally many steps of ``epsilon / 5``, not equally many gradients: an
    ensemble costs one a checkpoint and step. At 0.15 neither protects much, at 0.3 both do. The checkpoints
    are those after each epoch. The records have the accuracy on protected images, and how well a linear
    classifier reads perturbations alone. The paper's setting is ``data="cifar10", n_train=50000,
    epsilon=0.0078, steps=30`` with a ResNet-18 and 30 checkpoints of 120 epochs, where the paper finds
    feature alignment and variance reduction better still.
    """
    x, y, x_test, y_test, classes = _images(data, n_train, trial.seed)
    run = _run(x, y, classes, epochs, trial.seed, trial.device)
    rng = torch.Generator().manual_seed(trial.seed)
    released = {
        "unprotected": x,
        "sign noise": (x + epsilon * torch.randn(x.shape, generator=rng).sign()).clamp(0, 1),
    }
    for arm, mode in {"final checkpoint": "ce", "SEP": "ce", "SEP-FA-VR": "vr", "SEP-FA": "fa"}.items():
        checkpoints: Any = run[-1:] if arm == "final checkpoint" else run
        options: Any = {
            "epsilon": epsilon,
            "step_size": epsilon / 5,
            "n_steps": steps,
            "mode": mode,
            "n_inner": 5,
        }
        released[arm] = SelfEnsembleProtector(
            checkpoints, **options, n_classes=classes, generator=rng
        ).protect(x, y)
    accuracy = {}
    for arm in ("final checkpoint", "unprotected", "sign noise", "SEP-FA", "SEP-FA-VR", "SEP"):
        net = _train(released[arm], y, classes, READER, train_epochs, trial.seed + 50_000, trial.device).cpu()
        with torch.no_grad():
            accuracy[arm] = float((net(x_test).argmax(1) == y_test).float().mean())
            trial.record(
                f"accuracy on protected images, {arm}", (net(released[arm]).argmax(1) == y).float().mean()
            )
    if int(y.bincount().min()) >= 5 and x[0].numel() <= 256:
        report = protection_report(x, released["SEP"], y, random_state=trial.seed)
        trial.record("linear classifier on the perturbations, SEP", report["shortcut"])
    return accuracy


@bound(
    paper="self-ensemble-protection",
    says="Input gradients of the checkpoints of one run are nearly orthogonal.",
    where="Chen et al., Section 3.2",
    metric="mean cosine of the input gradients of two checkpoints",
    better="lower",
    limit=0.5,
    reason="Small networks keep much of a gradient's direction from one epoch to the next; it falls with the epochs between them.",
    smallest={"n_train": 100, "epochs": 2, "images": 20},
    check=_fits,
)
def orthogonal_gradients(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1203,
    epochs: Several = 10,
    images: Count = 200,
) -> float:
    """Compare the gradients of the checkpoints after each epoch, on images that they were trained on.

    The curve has the cosine by how many epochs lie between; the records have the mean cosine of the
    last checkpoint with one of another run, which the paper likens it to.
    """
    x, y, _, _, classes = _images(data, n_train, trial.seed)
    run = _run(x, y, classes, epochs, trial.seed, trial.device)
    other = _run(x, y, classes, epochs, trial.seed + 50_000, trial.device)
    similarity = gradient_similarity([*run, other[-1]], x[:images], y[:images])
    trial.record("cosine of the last with the last of another run", float(similarity[-2, -1]))
    inside = similarity[:-1, :-1]
    for apart in range(1, len(run)):
        trial.track("cosine by epochs apart", apart, float(inside.diagonal(apart).mean()))
    return float((inside.sum() - inside.trace()) / (inside.numel() - len(inside)))
