"""Claims about SFRIK: wide outputs are cheap, it competes with VICReg, prevents collapse, and degrees add rank."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Several, Trial, comparison, trend
from posterity.lab.costs import seconds_in_turns
from posterity.lab.data import Images, load_images
from posterity.lab.memory import peak_bytes
from posterity.lab.metrics import rank_correlation
from posterity.lab.selfsup import Parts, effective_rank, embedded, image_parts, pretrain, require_parts, worth
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import Features, learned_features
from posterity.representation import SFRIKLoss, VICRegLoss

Loss = Callable[[Tensor, Tensor], Tensor]
# both methods choose among these by validation
SFRIK = tuple(partial(SFRIKLoss, alignment_weight=weight) for weight in (1.0, 10.0))
VICREG = tuple(partial(VICRegLoss, *weights) for weights in ((25.0, 25.0, 1.0), (10.0, 10.0, 1.0)))


def _matrices(z1: Tensor, z2: Tensor) -> Tensor:
    """Return VICReg as its paper writes it, from (d, d) covariance matrices."""
    value = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        centered = z - z.mean(0)
        cov = centered.T @ centered / (len(z) - 1)
        hinge = F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean() / 2
        apart = cov.square().sum() - cov.diagonal().square().sum()
        value = value + 25 * hinge + apart / z.shape[1]
    return value


def _step(loss: Loss, n: int, dim: int) -> Callable[[], Any]:
    draws = torch.Generator().manual_seed(0)
    views = [torch.randn(n, dim, generator=draws).requires_grad_() for _ in range(2)]
    return lambda: torch.autograd.grad(loss(*views), views)


@comparison(
    paper="sfrik",
    says="In very wide outputs a truncated kernel costs a fraction of what covariance matrices cost.",
    where="Zheng et al., Section 3.3 and Table 1",
    arms=("vicreg", "sfrik"),
    metric="seconds of the loss and its gradient, over those of a product of matrices timed in turn",
    better="lower",
    timed=True,
    smallest={"dim": 16, "batch_size": 8, "rounds": 1},
)
def cheap(
    trial: Trial, dim: Several = 8192, batch_size: Several = 256, rounds: Count = 2
) -> dict[str, float]:
    """Run both losses in turns on random outputs, VICReg from its covariance matrices as its paper writes it.

    Curves have seconds and the most bytes of tensors alive, against the dimension and against the batch; beside
    them is VICReg with the smaller of its Gram matrices, as `posterity.representation.VICRegLoss` has it: where the
    batch is smaller than the dimension that trick makes it as cheap as SFRIK. Records have the powers of the
    dimension with which seconds grow.
    """
    arms: dict[str, Loss] = {
        "vicreg": _matrices,
        "sfrik": SFRIKLoss(),
        "vicreg, smaller matrix": VICRegLoss(),
    }
    dims = [max(dim // part, 2) for part in (8, 4, 2, 1)]
    factors = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    medians = []
    for n, q in [
        *((batch_size, q) for q in dims),
        *((n, dims[0]) for n in (batch_size // 2, 2 * batch_size)),
    ]:
        steps = [_step(loss, n, q) for loss in arms.values()]
        seconds = seconds_in_turns([*steps, lambda: factors[0] @ factors[1]], rounds)
        for (name, step), value in zip(
            zip(arms, steps, strict=True), np.median(seconds, 0)[:-1], strict=True
        ):
            for across, x, drawn in (
                ("dimension", q, n == batch_size),
                ("pairs in a batch", n, q == dims[0]),
            ):
                if drawn:
                    trial.track(f"seconds by {across}: {name}", x, value)
                    trial.track(f"MiB alive by {across}: {name}", x, peak_bytes(step) / 2**20)
        if n == batch_size:
            medians.append(np.median(seconds[:, :-1] / seconds[:, -1:], 0))
    for name, values in zip(arms, np.array(medians).T, strict=True):
        trial.record(f"power of the dimension, {name}", float(np.polyfit(np.log(dims), np.log(values), 1)[0]))
    return dict(zip(("vicreg", "sfrik"), medians[-1].tolist(), strict=False))


def _best(
    trial: Trial, parts: Parts, losses: tuple[Callable[[], nn.Module], ...], steps: int, labels_per_class: int
) -> tuple[float, int]:
    """Return the test accuracy of the loss that is best on images kept from the training set, and which it is."""
    kept = len(parts.x) // 4
    inner = Parts(parts.x[kept:], parts.y[kept:], parts.x[:kept], parts.y[:kept], parts.n_classes)
    encoders = [
        pretrain(make(), inner.x, steps=steps, seed=trial.seed, device=trial.device).encoder
        for make in losses
    ]
    best = int(np.argmax([worth(net, inner, trial.seed, labels_per_class)["linear"] for net in encoders]))
    return worth(encoders[best], parts, trial.seed, labels_per_class)["linear"], best


@trend(
    paper="sfrik",
    says="Features learned with SFRIK are at most two points less accurate than those of VICReg.",
    where="Zheng et al., Section 5, Tables 2 to 4",
    metric="accuracy of a linear probe, VICReg's less SFRIK's",
    high=0.02,
    smallest={"steps": 1, "labels_per_class": 1},
    check=require_parts,
)
def competes(
    trial: Trial, data: Images = "digits", steps: Count = 200, labels_per_class: Count = 10
) -> float:
    """Choose the weights of both on a quarter of the training images, then test."""
    parts = image_parts(load_images(data), trial.seed)
    vicreg, weights = _best(trial, parts, VICREG, steps, labels_per_class)
    sfrik, alignment = _best(trial, parts, SFRIK, steps, labels_per_class)
    trial.record("accuracy, VICReg", vicreg)
    trial.record("accuracy, SFRIK", sfrik)
    trial.record("weights chosen, VICReg (0: 25, 25, 1; 1: 10, 10, 1)", weights)
    trial.record("alignment weight chosen, SFRIK", (1, 10)[alignment])
    return vicreg - sfrik


@comparison(
    paper="sfrik",
    says="The kernel keeps features from collapsing, as agreement of views alone lets them.",
    where="Zheng et al., Section 3",
    arms=("alignment only", "sfrik"),
    metric="accuracy of a linear probe",
    better="higher",
    smallest={"steps": 1, "labels_per_class": 1},
    check=require_parts,
)
def no_collapse(
    trial: Trial, data: Images = "digits", steps: Count = 200, labels_per_class: Count = 10
) -> dict[str, float]:
    """Train with both parts of the loss and with its first alone; records have the rank of the outputs."""
    parts = image_parts(load_images(data), trial.seed)

    def alignment(z1: Tensor, z2: Tensor) -> Tensor:
        return 10 * SFRIKLoss().terms(z1, z2).alignment

    found = {}
    for name, loss in (("alignment only", alignment), ("sfrik", SFRIKLoss(alignment_weight=10))):
        net = pretrain(loss, parts.x, steps=steps, seed=trial.seed, device=trial.device)
        found[name] = worth(net.encoder, parts, trial.seed, labels_per_class)["linear"]
        outputs = embedded(nn.Sequential(net.encoder, net.projector), parts.x)
        trial.record(f"effective rank of the outputs, {name}", effective_rank(outputs))
    return found


@trend(
    paper="sfrik",
    says="Each further degree of the kernel spreads the outputs over more dimensions.",
    where="Zheng et al., Section 3.2",
    metric="rank correlation of the number of degrees and the effective rank of the outputs",
    low=0.9,
    smallest={"steps": 1},
    check=require_parts,
)
def degrees(trial: Trial, data: Images = "digits", steps: Count = 200) -> float:
    """Train with degrees 1, up to 2 and up to 3, at an alignment weight of 1."""
    parts = image_parts(load_images(data), trial.seed)
    ranks = []
    for degree in (1, 2, 3):
        loss = SFRIKLoss((1.0, 40.0, 40.0)[:degree], alignment_weight=1)
        net = pretrain(loss, parts.x, steps=steps, seed=trial.seed, device=trial.device)
        ranks.append(effective_rank(embedded(nn.Sequential(net.encoder, net.projector), parts.x)))
        trial.track("effective rank of the outputs by degrees", degree, ranks[-1])
    return rank_correlation((1, 2, 3), ranks)


@entry("self-supervised", "SFRIK", paper="sfrik")
def sfrik(train: Tensor, seed: int) -> Features:
    """Return features learned with degrees up to 3, at an alignment weight of 10."""
    return learned_features(train, SFRIKLoss(alignment_weight=10), seed)
