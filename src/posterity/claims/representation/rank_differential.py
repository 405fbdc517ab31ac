"""Claims about rank differential: a filter without parameters prevents collapse, and the online rank is the lower."""

from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Several, Trial, bound, comparison, trend
from posterity.lab.data import Images, load_images
from posterity.lab.nets import seeded
from posterity.lab.selfsup import (
    Loss,
    Parts,
    Pretrained,
    effective_rank,
    embedded,
    image_parts,
    pretrain,
    require_parts,
    worth,
)
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import Features, learned_features
from posterity.representation import RankMonitor, RDMLoss, spectral_filter

OUT = 64  # dimensions of the projector's output


class LearnedPredictor(nn.Module):
    """SimSiam: the online branch goes through a small network, which learns along."""

    def __init__(self, seed: int, dim: int = OUT) -> None:
        super().__init__()
        with seeded(seed + 3):
            self.net = nn.Sequential(
                nn.Linear(dim, dim // 2, bias=False), nn.BatchNorm1d(dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim)
            )  # fmt: skip
        self.monitor = RankMonitor()

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        p1, p2 = self.net(z1), self.net(z2)
        self.monitor.update(p1, z2)
        cosines = F.cosine_similarity(p1, z2.detach()), F.cosine_similarity(p2, z1.detach())
        return -(cosines[0].mean() + cosines[1].mean()) / 2


def _losses(seed: int) -> dict[str, nn.Module]:
    return {
        "no predictor": RDMLoss(sigma=0),
        "learned predictor": LearnedPredictor(seed),
        "online, s": RDMLoss("power", sigma=1),
        "online, log(1 + s)": RDMLoss("log1p"),
        "target, s": RDMLoss("power", sigma=1, location="target"),
        "target, 1/s": RDMLoss("power", sigma=-1, location="target"),
    }


def _trained(trial: Trial, parts: Parts, loss: Loss, steps: int) -> Pretrained:
    return pretrain(loss, parts.x, steps=steps, seed=trial.seed, device=trial.device, projector=(256, OUT), last_norm=True)  # fmt: skip


@comparison(
    paper="rank-differential",
    says="A spectral filter without parameters keeps outputs from collapsing, where alignment alone lets them.",
    where="Zhuo et al., Section 5, Table 2",
    arms=(
        "no predictor", "learned predictor", "online, s", "online, log(1 + s)", "target, s", "target, 1/s"
    ),
    metric="effective rank of the projector's outputs on the training images",
    better="higher",
    smallest={"steps": 2, "labels_per_class": 1},
    check=require_parts,
)  # fmt: skip
def keeps_rank(
    trial: Trial, data: Images = "digits", steps: Several = 150, labels_per_class: Count = 10
) -> dict[str, float]:
    """Train the same network with six losses that align two views, and nothing else.

    Targets multiplied by s are a control: a rising filter at the target gives the online branch the higher rank, and
    must not help. Records have the accuracy of a linear probe on the features.
    """
    parts, found = image_parts(load_images(data), trial.seed), {}
    for arm, loss in _losses(trial.seed).items():
        net = _trained(trial, parts, loss, steps)
        found[arm] = effective_rank(embedded(nn.Sequential(net.encoder, net.projector), parts.x))
        trial.record(
            f"accuracy of a linear probe, {arm}",
            worth(net.encoder, parts, trial.seed, labels_per_class)["linear"],
        )
    return found


@comparison(
    paper="rank-differential",
    says="The features of the network that did not collapse are worth more.",
    where="Zhuo et al., Section 5, Table 2",
    arms=("no predictor", "target, 1/s"),
    metric="accuracy of a linear probe",
    better="higher",
    smallest={"steps": 2, "labels_per_class": 1},
    check=require_parts,
)
def features(
    trial: Trial, data: Images = "digits", steps: Several = 200, labels_per_class: Count = 10
) -> dict[str, float]:
    """Train with alignment alone and with whitened targets."""
    parts, losses = image_parts(load_images(data), trial.seed), _losses(trial.seed)
    found = {}
    for arm in ("no predictor", "target, 1/s"):
        accuracy = worth(
            _trained(trial, parts, losses[arm], steps).encoder, parts, trial.seed, labels_per_class
        )
        found[arm] = accuracy["linear"]
        trial.record(f"accuracy of nearest neighbours, {arm}", accuracy["knn"])
    return found


@bound(
    paper="rank-differential",
    says="Through a rising filter the online branch has the lower rank at every step of training.",
    where="Zhuo et al., Section 4",
    metric="effective rank of the online outputs less that of the other view's target, the largest along training",
    limit=0.0,
    smallest={"steps": 2},
    check=require_parts,
)
def lower_online(trial: Trial, data: Images = "digits", steps: Several = 200) -> float:
    """Look at both branches at every step of training with a filter log(1 + s)."""
    parts, monitor, loss = image_parts(load_images(data), trial.seed), RankMonitor(), RDMLoss("log1p")

    def watched(z1: Tensor, z2: Tensor) -> Tensor:
        monitor.update(spectral_filter(z1, "log1p"), z2)
        return loss(z1, z2)

    _trained(trial, parts, watched, steps)
    seen = monitor.result()
    for step in range(0, steps, max(1, steps // 30)):
        for branch in ("online", "target"):
            trial.track(f"effective rank of a batch by step: {branch}", step + 1, float(seen[branch][step]))
    return -float(seen["difference"].min())


@trend(
    paper="rank-differential",
    says="A predictor that is learned lowers the rank of the online branch too.",
    where="Zhuo et al., Section 4",
    metric="effective rank of the target less that of the other view's prediction, mean along training",
    low=0.0,
    smallest={"steps": 4},
    check=require_parts,
)
def predictor_filters(trial: Trial, data: Images = "digits", steps: Several = 200) -> float:
    """Look at both branches of SimSiam at every step; the record has the share of steps at which the online rank is lower."""
    parts, loss = image_parts(load_images(data), trial.seed), LearnedPredictor(trial.seed)
    _trained(trial, parts, loss, steps)
    seen = loss.monitor.result()
    for step in range(0, steps, max(1, steps // 30)):
        for branch in ("online", "target"):
            trial.track(f"effective rank of a batch by step: {branch}", step + 1, float(seen[branch][step]))
    trial.record("share of steps at which the online rank is lower", float((seen["difference"] > 0).mean()))
    return float(seen["difference"].mean())


@entry("self-supervised", "RDM, whitened targets", paper="rank-differential")
def whitened_targets(train: Tensor, seed: int) -> Features:
    """Return features learned by alignment with targets whose singular values are 1."""
    return learned_features(train, RDMLoss("power", sigma=-1, location="target"), seed, last_norm=True)
