"""Claims about cross-level distillation: a student of another domain learns more from its teacher's next level."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, comparison
from posterity.lab.data import Images, load_images, split
from posterity.lab.data.images import ImageData, require_images
from posterity.lab.nets import seeded
from posterity.lab.selfsup import photo_view
from posterity.lab.training import fit
from posterity.transfer import CrossLevelDistillation, CrossLevelLearner, FeatureDenoiser, few_shot_accuracy

CHANNELS = [16, 32, 64, 64]
BATCH = 64
SHOTS, QUERIES, WAYS = 5, 15, 5
SIDE = 16  # pixels; smaller images are doubled
Change = Literal["inverted", "edges", "none"]


class Blocks(nn.Module):
    """Four convolutional blocks, each after the first half as large as the one before; maps and pooled features."""

    def __init__(self, channels: int, sizes: list[int], seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride=1 + (k > 0), padding=1), nn.BatchNorm2d(n_out), nn.ReLU())
                for k, (n_in, n_out) in enumerate(zip([channels, *sizes], sizes, strict=False))
            )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps of the blocks and the mean of the last."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps, x.mean((2, 3))


class SameLevel(CrossLevelDistillation):
    """The rival: block l beside block l of the teacher, behind 1 x 1 convolutions."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__(channels)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(size, size, 1), nn.BatchNorm2d(size), nn.ReLU()) for size in channels[:-1]
        )

    def forward(
        self, student_maps: Any, teacher_maps: Any, old_maps: Any = None, *, momentum: float = 0.0
    ) -> Tensor:
        """Return the sum over levels of the mean squared difference."""
        shifted = [maps if maps is None else [maps[0], *maps[:-1]] for maps in (teacher_maps, old_maps)]
        total = student_maps[0].new_zeros(())
        for level, projection in enumerate(self.projections):
            target = shifted[0][level + 1]  # pyright: ignore[reportOptionalSubscript]
            if momentum:
                target = torch.lerp(target, shifted[1][level + 1], momentum)  # pyright: ignore[reportOptionalSubscript]
            total = total + F.mse_loss(projection(student_maps[level]), target.detach())
        return total


def _changed(x: Tensor, change: Change, seed: int) -> Tensor:
    """Return images as the target domain shows them."""
    draws = torch.Generator().manual_seed(seed)
    if change == "inverted":
        angle = (torch.rand(len(x), generator=draws) * 2 - 1) * np.pi / 6
        turn = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1)
        grid = F.affine_grid(turn.view(-1, 2, 3), list(x.shape), align_corners=False)
        x = 1 - F.grid_sample(x, grid, align_corners=False)
        return (x + 0.1 * torch.randn(x.shape, generator=draws)).clamp(0, 1)
    if change == "edges":
        down, across = (F.pad(x.diff(dim=axis), pad) for axis, pad in ((2, (0, 0, 0, 1)), (3, (0, 1))))
        return (down**2 + across**2).sqrt().clamp(0, 1)
    return x


def _domains(
    images: ImageData, change: Change, n_unlabelled: int, seed: int
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return labelled base images, unlabelled ones of the target, and its images and labels for episodes."""
    x, y = torch.from_numpy(images.x).expand(-1, 3, -1, -1), torch.from_numpy(images.y)
    if min(x.shape[2:]) < SIDE:  # the last of four blocks would see a single pixel
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
    n_base = len(images.classes) // 2
    base, target = y < n_base, y >= n_base
    changed, labels = _changed(x[target], change, seed), y[target] - n_base
    share = n_unlabelled / len(labels)
    free, asked = split(len(labels), (share, 1 - share), seed, stratify=labels.numpy())
    return (x[base], y[base]), changed[free], changed[asked], labels[asked]


def _require_domains(data: ImageData, n_unlabelled: int = 400, n_way: int = WAYS, **_: Any) -> None:
    require_images(data)
    n_base = len(data.classes) // 2
    counts = np.bincount(data.y, minlength=len(data.classes))[n_base:]
    n = int(counts.sum())
    if n_unlabelled > n // 2:
        raise ValueError(
            f"n_unlabelled must be at most half of the {n} images of the target's classes, got {n_unlabelled}"
        )
    left = counts * (1 - n_unlabelled / n)
    if (enough := int((left >= SHOTS + QUERIES + 1).sum())) < n_way:
        raise ValueError(
            f"{n_way} of the target's classes (the second half) must have {SHOTS + QUERIES} images left for episodes, "
            f"{enough} of {len(counts)} have"
        )


def _teacher(base: Any, n_classes: int, epochs: int, seed: int) -> Blocks:
    """Return the blocks of a classifier of the base's images."""
    net = Blocks(base[0].shape[1], CHANNELS, seed)
    with seeded(seed):
        head = nn.Linear(CHANNELS[-1], n_classes)
    both, draws = nn.ModuleList([net, head]), torch.Generator().manual_seed(seed)

    def loss(both: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(net(photo_view(x, draws))[1]), y)

    fit(both, loss, base, epochs=epochs, batch_size=BATCH, lr=3e-3, schedule="cosine", seed=seed)
    return net.eval()


def _student(arm: str, teacher: Blocks, x: Tensor, epochs: int, seed: int) -> Blocks:
    """Return a student trained on unlabelled images, alike in all but what is distilled."""
    student = Blocks(x.shape[1], CHANNELS, seed + 1)
    per_epoch = max(1, len(x) // BATCH)
    with seeded(seed):
        learner = CrossLevelLearner(
            student, teacher, CHANNELS, n_features=CHANNELS[-1], total_steps=epochs * per_epoch,
            alpha=0.0 if arm == "simclr" else 2.0,
        )  # fmt: skip
        if arm == "same-level":
            learner.distillation = SameLevel(CHANNELS)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draws).split(BATCH)[:per_epoch]:
            loss = learner(photo_view(x[rows], draws), photo_view(x[rows], draws))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            learner.after_step()
    return student.eval()


@torch.no_grad()
def _features(net: Blocks, x: Tensor) -> np.ndarray:
    return torch.cat([net(part)[1] for part in x.split(512)]).numpy()


@comparison(
    paper="cldfd",
    says="A student that learns its teacher's next level tells new classes of another domain apart from few labels "
    "better than one that learns by contrast alone.",
    where="Section 4.3, Table 3",
    arms=("simclr", "same-level", "cross-level"),
    metric="mean accuracy, 5-way 5-shot",
    better="higher",
    smallest={"epochs": 1, "n_unlabelled": 64, "n_episodes": 10},
    reason="A teacher of five digits is right on 0.6 of the inverted ones: what it knows helps no more than it hinders.",
    check=_require_domains,
)
def next_level(
    trial: Trial,
    data: Images = "digits",
    change: Change = "inverted",
    n_unlabelled: Annotated[int, Between(BATCH)] = 400,
    epochs: Count = 30,
    n_episodes: Count = 200,
) -> dict[str, float]:
    """Train a teacher on one half of the classes and students on unlabelled, changed images of the other.

    The arms share teacher, initial weights, batches, views, rate and steps; nothing is tuned. Images of the target are
    inverted, turned by up to 30 degrees and noisy, or edge maps (``change="edges"``), or as they are. Episodes of
    the target's other images are the same for all arms; the classifier is logistic regression on pooled features.
    """
    images = load_images(data)
    base, free, x, y = _domains(images, change, n_unlabelled, trial.seed)
    teacher = _teacher(base, len(images.classes) // 2, epochs, trial.seed)
    found = {}
    for arm in ("simclr", "same-level", "cross-level"):
        features = _features(_student(arm, teacher, free, epochs, trial.seed), x)
        found[arm] = few_shot_accuracy(features, y, n_episodes=n_episodes, random_state=trial.seed).mean
        one = few_shot_accuracy(features, y, n_shot=1, n_episodes=n_episodes, random_state=trial.seed).mean
        trial.record(f"{arm}, 1-shot", one)
    trial.record(
        "teacher",
        few_shot_accuracy(_features(teacher, x), y, n_episodes=n_episodes, random_state=trial.seed).mean,
    )
    return found


@comparison(
    paper="cldfd",
    says="A student learns more from its teacher's next level than from the same one.",
    where="Section 4.4, ablation of the levels",
    arms=("same-level", "cross-level"),
    metric="mean accuracy, 5-way 5-shot",
    better="higher",
    smallest={"epochs": 1, "n_unlabelled": 64, "n_episodes": 10},
    reason="In a small network on small images blocks see nearly the same, and which of the teacher's is followed does not show.",
    check=_require_domains,
)
def not_the_same_level(
    trial: Trial,
    data: Images = "digits",
    change: Change = "inverted",
    n_unlabelled: Annotated[int, Between(BATCH)] = 400,
    epochs: Count = 30,
    n_episodes: Count = 200,
) -> dict[str, float]:
    """Train two students that differ in which of the teacher's blocks theirs are drawn to.

    All else is as in `next_level`. Block l beside block l goes through a 1 x 1 convolution in the place of one of 3 x 3
    and stride 2. On images of 8 x 8 pixels, of which the last block sees a single one, the same level is better.
    """
    images = load_images(data)
    base, free, x, y = _domains(images, change, n_unlabelled, trial.seed)
    teacher = _teacher(base, len(images.classes) // 2, epochs, trial.seed)
    return {
        arm: few_shot_accuracy(
            _features(_student(arm, teacher, free, epochs, trial.seed), x), y, n_episodes=n_episodes,
            random_state=trial.seed,
        ).mean
        for arm in ("same-level", "cross-level")
    }  # fmt: skip


@comparison(
    paper="cldfd",
    says="With one label a class, features of which only the largest are kept are told apart better.",
    where="Section 4.3, Table 4",
    arms=("plain", "power only", "denoised"),
    metric="mean accuracy, 5-way 1-shot",
    better="higher",
    smallest={"epochs": 1, "n_unlabelled": 64, "n_episodes": 10},
    reason="The small network has 64 features for five classes, of which few are small and none is noise to be cut.",
    check=_require_domains,
)
def denoising(
    trial: Trial,
    data: Images = "digits",
    change: Change = "inverted",
    n_unlabelled: Annotated[int, Between(BATCH)] = 400,
    epochs: Count = 30,
    n_episodes: Count = 200,
    power: Annotated[float, Between(0.05, 1)] = 0.4,
) -> dict[str, float]:
    """Classify the features of a cross-level student as they are, raised to a power, and denoised, half of them kept.

    The features, the episodes and the classifier are the same for all arms.
    """
    images = load_images(data)
    base, free, x, y = _domains(images, change, n_unlabelled, trial.seed)
    teacher = _teacher(base, len(images.classes) // 2, epochs, trial.seed)
    features = _features(_student("cross-level", teacher, free, epochs, trial.seed), x)
    d = features.shape[1]
    found = {}
    for arm, top, by in (("plain", d, 1.0), ("power only", d, power), ("denoised", d // 2, power)):
        kept = FeatureDenoiser(top=top, power=by).fit_transform(features)
        found[arm] = few_shot_accuracy(kept, y, n_shot=1, n_episodes=n_episodes, random_state=trial.seed).mean
    return found
