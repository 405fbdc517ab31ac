"""Claims about forward gradients: what makes them train, how noisy they are, and how little they store."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, bound, comparison
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.lab.memory import checkpointed, peak_bytes
from posterity.lab.nets import mlp
from posterity.optimization import LocalMixer, activity_gradient, estimator_variance, forward_gradient

CHOOSE = 200  # images kept apart, on which each arm chooses its rate
TEST = 2_000  # images at most, to test on
RATES = (0.01, 0.03, 0.1)
BATCH = 64


def _fits(data: ImageData, n_train: int, n_patches: int, width: int, n_groups: int, **_: Any) -> None:
    height, width_ = data.x.shape[2:]
    if height != width_ or height % n_patches:
        raise ValueError(
            f"n_patches must divide the sides of square images, got {n_patches} for {height} x {width_}"
        )
    if width % n_groups or width < 2 * n_groups:
        raise ValueError(f"n_groups must leave two or more channels of width {width} each, got {n_groups}")
    if n_train < BATCH:
        raise ValueError(f"n_train must be at least {BATCH}, a batch, got {n_train}")
    require_rest(len(data.y), "n_train", n_train, CHOOSE + 1, "images")


def _accuracies(
    trial: Trial, data: str, methods: dict[str, Any], n_train: int, epochs: int, options: dict[str, Any]
) -> dict[str, float]:
    """Return the test accuracy of each arm, at the rate that is best on images kept apart."""
    images = load_images(data)
    n = len(images.y)
    train, choose, test = split(n, (n_train / n, CHOOSE / n, 1 - (n_train + CHOOSE) / n), trial.seed)
    x, y = torch.from_numpy(images.x).to(trial.device), torch.from_numpy(images.y).to(trial.device)
    x = (x - x[train].mean()) / x[train].std().clamp_min(1e-6)
    results = {}
    for arm, method in methods.items():
        found = [_train(trial, method, lr, x, y, (train, choose, test), epochs, options) for lr in RATES]
        best = max(range(len(RATES)), key=lambda k: found[k][0])
        trial.record(f"learning rate: {arm}", RATES[best])
        for epoch, accuracy in enumerate(found[best][1], 1):
            trial.track(arm, epoch, accuracy)
        results[arm] = found[best][1][-1]
    return results


def _train(
    trial: Trial,
    method: Any,
    lr: float,
    x: Tensor,
    y: Tensor,
    parts: Any,
    epochs: int,
    options: dict[str, Any],
) -> tuple[float, list[float]]:
    """Return the accuracy on images to choose by, and on test images after each epoch."""
    train, choose, test = (
        torch.from_numpy(part[:most]) for part, most in zip(parts, (None, None, TEST), strict=True)
    )
    rng = torch.Generator().manual_seed(trial.seed)
    net = LocalMixer(x.shape[-1], x.shape[1], int(y.max()) + 1, **options, generator=rng).to(trial.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    steps = len(train) // BATCH
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    order, curve = torch.Generator().manual_seed(trial.seed), []
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=order)[: steps * BATCH]].split(BATCH):
            net.estimate(x[rows], y[rows], method=method, generator=rng)
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            falling.step()
        curve.append(_accuracy(net, x[test], y[test]))
    return _accuracy(net, x[choose], y[choose]), curve


@torch.no_grad()
def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((torch.cat([net(part).argmax(1) for part in x.split(1000)]) == y).float().mean())


@comparison(
    paper="local-forward-gradient",
    says="Under local losses, forward gradients by activity perturbation train better than by weight perturbation.",
    where="Ren et al., Sections 3 and 6",
    arms=("weight", "activity"),
    metric="accuracy on test images",
    better="higher",
    smallest={"epochs": 1, "n_train": 64, "width": 16, "n_blocks": 2},
    check=_fits,
)
def activity(
    trial: Trial, data: Images = "digits", n_train: Count = 1_000, n_patches: Count = 1, width: Count = 128,
    n_groups: Count = 8, n_blocks: Count = 3, epochs: Count = 15, rivals: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Train one network twice by local losses, with noise on its weights or on its activations.

    The arms share split, initial weights and batches; each takes of three rates the one that is best on
    200 images kept apart, with momentum 0.9, a cosine and gradients clipped at 5. ``rivals=True`` records
    the accuracy of backpropagation, through all blocks and within each.
    """
    methods = {"weight": "weight", "activity": "activity"}
    if rivals:
        methods |= {"backpropagation": "backprop", "local backpropagation": "local-backprop"}
    options = {"n_patches": n_patches, "width": width, "n_groups": n_groups, "n_blocks": n_blocks}
    found = _accuracies(trial, data, methods, n_train, epochs, options)
    for arm in list(found)[2:]:
        trial.record(f"accuracy: {arm}", found.pop(arm))
    return found


@comparison(
    paper="local-forward-gradient",
    says="With activity perturbation, many local losses train better than one loss at the end.",
    where="Ren et al., Sections 4 and 6",
    arms=("global activity", "local activity"),
    metric="accuracy on test images",
    better="higher",
    smallest={"epochs": 1, "n_train": 64, "width": 16, "n_blocks": 2},
    check=_fits,
)
def local_losses(
    trial: Trial, data: Images = "digits", n_train: Count = 1_000, n_patches: Count = 1, width: Count = 128,
    n_groups: Count = 8, n_blocks: Count = 3, epochs: Count = 15,
) -> dict[str, float]:  # fmt: skip
    """Train one network twice by noise on its activations, for one loss or for one a block and group."""
    methods = {"global activity": "global-activity", "local activity": "activity"}
    options = {"n_patches": n_patches, "width": width, "n_groups": n_groups, "n_blocks": n_blocks}
    return _accuracies(trial, data, methods, n_train, epochs, options)


def _rows(data: ImageData, batch: int, **_: Any) -> None:
    require_rest(len(data.y), "batch", batch, 0, "images")


@bound(
    paper="local-forward-gradient",
    says="The variance of a weight gradient by activity perturbation is what the number of units says.",
    where="Ren et al., Section 3",
    metric="measured variance over (1 / B^2) sum ||x||^2 (units + 1) ||g||^2, the largest over layers of three widths",
    limit=1.1,
    smallest={"n_draws": 50, "batch": 16},
    check=_rows,
)
def variance(
    trial: Trial, data: Images = "digits", batch: Count = 64, n_draws: Annotated[int, Between(50)] = 1_000
) -> float:
    """Estimate the gradient of a first layer of 8, 32 and 128 units many times, and compare.

    The curves are variances over the squared norm of the gradient, also of weight perturbation, whose is
    the number of weights, plus 1.
    """
    images, rng = load_images(data), torch.Generator().manual_seed(trial.seed)
    rows = torch.randperm(len(images.y), generator=rng)[:batch].numpy()
    x = torch.from_numpy(images.x[rows]).flatten(1).to(trial.device)
    y = torch.from_numpy(images.y[rows]).to(trial.device)
    worst = 0.0
    for units in (8, 32, 128):
        weight = (torch.randn(x.shape[1], units, generator=rng) / x.shape[1] ** 0.5).to(trial.device)
        top = mlp(units, int(images.y.max()) + 1, width=32, depth=1, seed=trial.seed).to(trial.device)
        inner = dict(top.named_parameters())

        def losses(z: Tensor, top: nn.Module = top, inner: dict[str, Any] = inner) -> Tensor:
            return F.cross_entropy(functional_call(top, inner, torch.tanh(z)), y, reduction="none")

        z = (x @ weight).requires_grad_()
        (g,) = torch.autograd.grad(losses(z).sum(), z)
        true = x.T @ g / len(x)
        expected = (x.square().sum(1) * (units + 1) * g.square().sum(1)).sum() / len(x) ** 2

        def by_activity(rng: torch.Generator, z: Tensor = z, losses: Any = losses) -> Tensor:
            return x.T @ activity_gradient(losses, z, generator=rng)[1] / len(x)

        def by_weight(rng: torch.Generator, weight: Tensor = weight, losses: Any = losses) -> Tensor:
            return forward_gradient(lambda p: losses(x @ p["w"]).mean(), {"w": weight}, generator=rng)[1]["w"]

        found = estimator_variance(by_activity, true, n_draws=n_draws, generator=rng)["variance"]
        other = estimator_variance(by_weight, true, n_draws=n_draws // 2, generator=rng)["variance"]
        trial.track("activity perturbation", units, found / true.square().sum())
        trial.track("weight perturbation", units, other / true.square().sum())
        worst = max(worst, float(found / expected))
    return worst


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return checkpointed([self.block], x)


def _divides(n_groups: int, width: int, **_: Any) -> None:
    if width % n_groups or width < 2 * n_groups:
        raise ValueError(f"n_groups must leave two or more channels of width {width} each, got {n_groups}")


@bound(
    paper="local-forward-gradient",
    says="The memory of a step by local forward gradients does not grow with depth.",
    where="Ren et al., Sections 1 and 4",
    metric="peak bytes of a step at 8 blocks over those at 2 blocks, gradients of parameters left out",
    limit=1.3,
    smallest={"width": 16, "batch": 2, "n_patches": 2, "deepest": 8},
    check=_divides,
)
def memory(
    trial: Trial, n_patches: Count = 8, width: Count = 64, n_groups: Count = 8, batch: Count = 32,
    deepest: Annotated[int, Between(8, 64)] = 16,
) -> float:  # fmt: skip
    """Count the bytes alive at once in a step, of 2, 4, 8 blocks and so on up to ``deepest``.

    Every step leaves the gradients of all parameters behind, which grow with depth whatever makes them;
    their bytes are taken off. The curves are megabytes of the estimate, of backpropagation, and of
    backpropagation that stores each block's input alone and computes the block again.
    """
    rng = torch.Generator().manual_seed(trial.seed)
    size = 4 * n_patches
    images = torch.randn(batch, 3, size, size, generator=rng).to(trial.device)
    target = torch.randint(10, (batch,), generator=rng).to(trial.device)
    peaks: dict[int, float] = {}
    for depth in (each for each in (2, 4, 8, 16, 32, 64) if each <= deepest):
        for way in ("backpropagation", "checkpointing", "forward gradient"):
            net = LocalMixer(size, n_patches=n_patches, width=width, n_groups=n_groups, n_blocks=depth,
                             generator=torch.Generator().manual_seed(trial.seed)).to(trial.device)  # fmt: skip
            own = sum(p.numel() * p.element_size() for p in net.parameters())
            if way == "checkpointing":
                net.blocks = nn.ModuleList(_Checkpointed(block) for block in net.blocks)
            if way == "forward gradient":
                peak = peak_bytes(lambda net=net: net.estimate(images, target, generator=rng)) - own
                peaks[depth] = peak
            else:
                heads = sum(
                    p.numel() * p.element_size() for p in net.heads.parameters()
                )  # without a part in it
                peak = (
                    peak_bytes(lambda net=net: F.cross_entropy(net(images), target).backward()) - own + heads
                )
            trial.track(f"{way}, megabytes", depth, peak / 1e6)
    return peaks[8] / peaks[2]
