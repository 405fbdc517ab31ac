"""Claims about DINO-vMF: how many prototypes stay in use, what the features are worth, the digits of the constant."""

import numpy as np
import torch
from torch import Tensor, nn

from posterity.claims import Count, Positive, Several, Trial, bound, comparison
from posterity.lab.data import Images, load_images
from posterity.lab.nets import seeded
from posterity.lab.selfsup import descend, encoder_for, feature_dim, image_parts, require_parts, worth
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import STEPS, Features, features_of
from posterity.representation import DINOHead, SelfDistillation, vmf_log_normalizer

ARMS = {  # kind of prototypes, and what the teacher's centre averages
    "normalized": ("normalized", "logit"),
    "normalized, probability centre": ("normalized", "probability"),
    "unnormalized": ("unnormalized", "logit"),
    "vmf": ("vmf", "probability"),
}


def _distilled(
    x: Tensor, encoder: nn.Module, arm: str, seed: int, *, steps: int, n_prototypes: int, batch_size: int,
    teacher_temperature: float = 0.04, device: str = "cpu",
) -> SelfDistillation:  # fmt: skip
    """Return student and teacher after so many steps on two views, at the rates of the other losses."""
    kind, centering = ARMS[arm]
    with seeded(seed + 1):
        head = DINOHead(
            feature_dim(encoder, x), n_prototypes, hidden_dim=256, bottleneck_dim=32, prototypes=kind  # type: ignore[arg-type]
        )  # fmt: skip
    model = SelfDistillation(
        encoder, head, teacher_temperature=teacher_temperature, teacher_warmup=(teacher_temperature, 0),
        momentum=0.99, total_steps=steps, centering=centering,  # type: ignore[arg-type]
    ).to(device)  # fmt: skip
    descend(
        lambda rows, see: model.loss([see(), see()]),
        torch.optim.AdamW(model.trainable_parameters(), lr=2e-3, weight_decay=1e-4), x, steps=steps,
        batch_size=batch_size, seed=seed, device=device, on_step=model.update_teacher,
    )  # fmt: skip
    return model.cpu().eval()


def _small(x: Tensor, seed: int) -> nn.Module:
    """Return an encoder that learns many steps in seconds."""
    return encoder_for(x, seed, width=8, dim=32)


@comparison(
    paper="dino-vmf",
    says="Under a sharp teacher, prototypes with normalising constants and a centre of probabilities stay in use.",
    where="Section 3.2; Section 4",
    arms=("normalized", "normalized, probability centre", "unnormalized", "vmf"),
    metric="prototypes that win at least one training image",
    better="higher",
    smallest={"steps": 2, "n_prototypes": 8},
    check=require_parts,
)
def in_use(
    trial: Trial, data: Images = "digits", steps: Several = 150, n_prototypes: Several = 128,
    teacher_temperature: Positive = 0.03, batch_size: Several = 64,
) -> dict[str, float]:  # fmt: skip
    """Distil the same network with four heads, each centred as in its paper but for the second.

    The second arm has fixed norms and a centre of probabilities: it tells what the centre does alone, which at this
    scale is all of it. The norms of so few steps spread little, as the recorded precisions show, and the constants
    with them.
    """
    parts, found = image_parts(load_images(data), trial.seed), {}
    for arm in ARMS:
        model = _distilled(
            parts.x, _small(parts.x, trial.seed), arm, trial.seed, steps=steps, n_prototypes=n_prototypes,
            batch_size=batch_size, teacher_temperature=teacher_temperature, device=trial.device,
        )  # fmt: skip
        assigned = torch.cat([model.assignments(x) for x in parts.x.split(512)])
        found[arm] = float(len(assigned.argmax(1).unique()))
        effective = float(torch.special.entr(assigned.double().mean(0)).sum().exp())
        trial.record(
            f"effective number of prototypes, exp of the entropy of mean assignments, {arm}", effective
        )
        low, high = model.head.precision().aminmax()
        trial.record(f"largest precision over smallest, {arm}", float(high / low))
    return found


@comparison(
    paper="dino-vmf",
    says="Features are better with normalising constants and a centre of probabilities than with fixed norms.",
    where="Section 4",
    arms=("normalized", "normalized, probability centre", "vmf"),
    metric="accuracy of a linear probe, few labels a class",
    better="higher",
    smallest={"steps": 2, "n_prototypes": 8, "labels_per_class": 1},
    check=require_parts,
    reason="on small images, in some hundred steps, more prototypes in use make features no better",
)
def features(
    trial: Trial, data: Images = "digits", steps: Several = 150, n_prototypes: Several = 128,
    teacher_temperature: Positive = 0.03, batch_size: Several = 64, labels_per_class: Count = 10,
) -> dict[str, float]:  # fmt: skip
    """Distil the same network with the three heads and probe the teacher's encoder."""
    parts, found = image_parts(load_images(data), trial.seed), {}
    for arm in ("normalized", "normalized, probability centre", "vmf"):
        model = _distilled(
            parts.x, _small(parts.x, trial.seed), arm, trial.seed, steps=steps, n_prototypes=n_prototypes,
            batch_size=batch_size, teacher_temperature=teacher_temperature, device=trial.device,
        )  # fmt: skip
        accuracy = worth(model.teacher_backbone, parts, trial.seed, labels_per_class)
        found[arm] = accuracy["linear"]
        trial.record(f"accuracy of nearest neighbours, {arm}", accuracy["knn"])
    return found


@bound(
    paper="dino-vmf",
    says="The expansion gives the normalising constant to six digits after the point, and more.",
    where="Section 3",
    metric="largest error of the log constant against forty digits, precisions 0.1 to 1,000, 16 to 256 dimensions",
    limit=1e-6,
    smallest={"points": 20},
)
def exact_constant(trial: Trial, points: Count = 300) -> float:
    """Compare with mpmath at precisions drawn evenly on a logarithmic scale."""
    import mpmath  # comes with torch

    rng, worst = np.random.default_rng(trial.seed), 0.0
    for dim in (16, 64, 256):
        kappa = np.sort(10 ** rng.uniform(-1, 3, points))
        ours = vmf_log_normalizer(torch.from_numpy(kappa), dim).tolist()
        for k, value in zip(kappa.tolist(), ours, strict=True):
            with mpmath.workdps(40):
                nu = mpmath.mpf(dim) / 2 - 1
                log_bessel = mpmath.log(mpmath.besseli(nu, k))
                true = nu * mpmath.log(k) - (nu + 1) * mpmath.log(2 * mpmath.pi) - log_bessel
                error = abs(float(mpmath.mpf(value) - true))
            trial.track(f"error by precision: {dim} dimensions", k, error)
            worst = max(worst, error)
    return worst


@entry("self-supervised", "DINO-vMF", paper="dino-vmf")
def dino_vmf(train: Tensor, seed: int) -> Features:
    """Return the teacher's features after self-distillation with 128 prototypes of free precision."""
    encoder = encoder_for(train, seed)
    model = _distilled(train, encoder, "vmf", seed, steps=STEPS, n_prototypes=128, batch_size=128)
    return features_of(model.teacher_backbone)
