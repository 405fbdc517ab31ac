"""Claims about duality: one criterion falls with the other, the family is level, and narrow outputs do."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Positive, Several, Trial, bound, comparison, trend
from posterity.lab.data import Images, load_images
from posterity.lab.metrics import rank_correlation
from posterity.lab.selfsup import Parts, image_parts, pretrain, require_parts, worth
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import Features, learned_features
from posterity.representation import ContrastiveCriterion, NTXentLoss, VICRegLoss

FAMILY: dict[str, Callable[[], nn.Module]] = {
    "SimCLR": NTXentLoss,
    "SimCLR, squared": lambda: NTXentLoss(similarity="sq"),
    "SimCLR, absolute": lambda: NTXentLoss(similarity="abs"),
    "DCL": lambda: NTXentLoss(decoupled=True),
    "VICReg": VICRegLoss,
    "VICReg-exp": lambda: VICRegLoss(variant="exp"),
    "VICReg-ctr": lambda: VICRegLoss(variant="ctr"),
    "criterion": lambda: ContrastiveCriterion(criterion_weight=10),
}


def _gram(k: Tensor) -> tuple[float, float, float, float]:
    """Return both criteria and the norms between them, each from its own Gram matrix."""
    found = []
    for rows in (k, k.T):
        gram = rows @ rows.T
        found += [
            float((gram - gram.diagonal().diag()).square().sum()),
            float(gram.diagonal().square().sum()),
        ]
    return found[0], found[2], found[1], found[3]


def _along(trial: Trial, data: str, steps: int) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Return the criteria of a fixed batch of test images, ten and more times along training on samples' one."""
    parts = image_parts(load_images(data), trial.seed)
    batch, seen = parts.x_test[:256], []

    @torch.no_grad()
    def look(step: int, net: nn.Module) -> None:
        if step % max(1, steps // 30) == 0:
            net.eval()
            device = next(net.parameters()).device
            seen.append((step, _gram(F.normalize(net(batch.to(device)), dim=1))))
            net.train()

    loss = ContrastiveCriterion(criterion_weight=10)
    pretrain(loss, parts.x, steps=steps, seed=trial.seed, device=trial.device, on_step=look)
    return seen


@trend(
    paper="ssl-duality",
    says="A network that learns to tell samples apart tells dimensions apart by as much.",
    where="Section 3, Theorem 3.3",
    metric="rank correlation of the two criteria on held-out images along training",
    low=0.9,
    smallest={"steps": 10},
    check=require_parts,
)
def falls_with_the_other(trial: Trial, data: Images = "digits", steps: Several = 300) -> float:
    """Track both criteria of unit rows while the criterion of samples is minimised."""
    seen = _along(trial, data, steps)
    for step, (samples, dimensions, *_) in seen:
        trial.track("criterion by step: of samples", step, samples)
        trial.track("criterion by step: of dimensions", step, dimensions)
    return rank_correlation([terms[0] for _, terms in seen], [terms[1] for _, terms in seen])


@bound(
    paper="ssl-duality",
    says="The two criteria of a trained network differ by the norms of rows and columns, exactly.",
    where="Section 3, Theorem 3.3",
    metric="relative error of the identity in float32, the largest along training",
    limit=1e-5,
    smallest={"steps": 5},
    check=require_parts,
)
def identity(trial: Trial, data: Images = "digits", steps: Several = 100) -> float:
    """Compute both Gram matrices of a network's outputs while it learns."""
    errors = [abs(b + t - a - s) / (a + s) for _, (a, b, s, t) in _along(trial, data, steps)]
    return max(errors)


def _accuracy(
    trial: Trial, parts: Parts, loss: nn.Module, steps: int, labels_per_class: int, out: int = 128
) -> float:
    found = pretrain(loss, parts.x, steps=steps, seed=trial.seed, device=trial.device, projector=(256, out))
    return worth(found.encoder, parts, trial.seed, labels_per_class)["linear"]


@bound(
    paper="ssl-duality",
    says="Losses that contrast samples and losses that decorrelate dimensions learn features worth the same.",
    where="Section 4, Tables 1 and 2",
    metric="accuracy of a linear probe, the best of eight losses less the worst",
    limit=0.03,
    smallest={"steps": 2, "labels_per_class": 1},
    check=require_parts,
)
def level(trial: Trial, data: Images = "digits", steps: Several = 150, labels_per_class: Count = 10) -> float:
    """Train the same network with the eight losses of the family."""
    parts = image_parts(load_images(data), trial.seed)
    found = {}
    for name, make in FAMILY.items():
        found[name] = _accuracy(trial, parts, make(), steps, labels_per_class)
        trial.record(f"accuracy, {name}", found[name])
    return max(found.values()) - min(found.values())


@comparison(
    paper="ssl-duality",
    says="SimCLR does better at a low temperature.",
    where="Section 4, Table 2",
    arms=("temperature 0.5", "temperature 0.15"),
    metric="accuracy of a linear probe",
    better="higher",
    smallest={"steps": 2, "labels_per_class": 1},
    reason="on small images of few classes a softer temperature does as well or better; the paper's is of ImageNet",
    check=require_parts,
)
def temperature(
    trial: Trial, data: Images = "digits", steps: Several = 300, low: Positive = 0.15, high: Positive = 0.5,
    labels_per_class: Count = 10,
) -> dict[str, float]:  # fmt: skip
    """Train with NT-Xent at both temperatures."""
    parts = image_parts(load_images(data), trial.seed)
    return {
        name: _accuracy(trial, parts, NTXentLoss(t), steps, labels_per_class)
        for name, t in (("temperature 0.5", high), ("temperature 0.15", low))
    }


@trend(
    paper="ssl-duality",
    says="A covariance loss needs no wide outputs: an eighth of the dimensions costs less than two points.",
    where="Section 4, Figure 3",
    metric="accuracy of a linear probe, VICReg in many dimensions less in few",
    high=0.02,
    smallest={"steps": 2, "labels_per_class": 1},
    check=require_parts,
)
def narrow(
    trial: Trial, data: Images = "digits", steps: Several = 300, wide: Several = 512, few: Several = 64,
    labels_per_class: Count = 10,
) -> float:  # fmt: skip
    """Train VICReg with both widths of the projector's output."""
    parts = image_parts(load_images(data), trial.seed)
    found = [_accuracy(trial, parts, VICRegLoss(), steps, labels_per_class, out) for out in (wide, few)]
    trial.record(f"accuracy, {wide} dimensions", found[0])
    trial.record(f"accuracy, {few} dimensions", found[1])
    return found[0] - found[1]


@entry("self-supervised", "SimCLR", paper="ssl-duality")
def simclr(train: Tensor, seed: int) -> Features:
    """Return features learned with NT-Xent at a temperature of 0.2."""
    return learned_features(train, NTXentLoss(0.2), seed)


@entry("self-supervised", "VICReg", paper="ssl-duality")
def vicreg(train: Tensor, seed: int) -> Features:
    """Return features learned with VICReg, at its published weights."""
    return learned_features(train, VICRegLoss(), seed)


@entry("self-supervised", "sample-contrastive criterion", paper="ssl-duality")
def criterion(train: Tensor, seed: int) -> Features:
    """Return features learned with the criterion of samples."""
    return learned_features(train, ContrastiveCriterion(criterion_weight=10), seed)
