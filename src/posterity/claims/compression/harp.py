"""Claims about HARP: pruned to half a percent, learned rates keep more robustness, and small layers keep most."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from posterity._checks import one_of
from posterity.claims import Between, Count, Positive, Share, Trial, comparison, trend
from posterity.compression import HarpResult, harp_prune, pack_sparse, robust_loss
from posterity.lab import nets, training
from posterity.lab.costs import saved_bytes
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.lab.metrics import rank_correlation
from posterity.lab.tasks import entry
from posterity.lab.tasks.image_classification import image_epochs
from posterity.lab.tasks.pruning import RATE, TIMES

TEST = 100  # images to test on, at least
BATCH = 100
Rate = Annotated[float, Between(0.002, 0.5)]
Start = Annotated[float, Between(0.002, 1)]
Width = Annotated[int, Between(8)]


class _Task:
    """Images in [0, 1], an attack, and a network that was trained against it."""

    def __init__(
        self, trial: Trial, data: str, n_train: int, network: str, widths: Sequence[int], epsilon: float, epochs: int
    ) -> None:  # fmt: skip
        images = load_images(data)
        n, self.seed, self.device = len(images.y), trial.seed, trial.device
        train, test = split(n, (n_train / n, 1 - n_train / n), trial.seed)
        parts = [torch.from_numpy(part[rows]) for rows in (train, test) for part in (images.x, images.y)]
        self.x, self.y, self.x_test, self.y_test = (part.to(trial.device) for part in parts)
        shape, n_out = images.x.shape[1:], len(images.classes)
        if network == "cnn":
            self.net = nets.cnn(shape[0], n_out, width=widths[0] // 4, depth=3, seed=trial.seed)
        else:
            self.net = nets.weights(_mlp, (math.prod(shape), *widths, n_out), seed=trial.seed)  # type: ignore[assignment]
        self.epsilon = epsilon
        self.attack = partial(robust_loss, epsilon=epsilon, step_size=epsilon / 3, n_steps=5)
        training.fit(
            self.net, partial(self.attack, generator=self.draws()), (self.x, self.y), epochs=epochs,
            batch_size=BATCH, lr=0.1, optimizer=partial(torch.optim.SGD, momentum=0.9), weight_decay=5e-4,
            schedule="cosine", seed=trial.seed, device=trial.device,
        )  # fmt: skip

    def draws(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def prune(
        self, rate: float, epochs: int, finetune_epochs: int, gamma: float, **options: Any
    ) -> HarpResult:
        order = self.draws()

        def batches() -> Any:
            return (
                (self.x[rows], self.y[rows])
                for rows in torch.randperm(len(self.x), generator=order).split(BATCH)
            )

        return harp_prune(
            self.net, batches, rate, loss_fn=self.attack, prune_epochs=epochs, finetune_epochs=finetune_epochs,
            gamma=gamma, lr=0.1, finetune_lr=0.05, device=self.device, generator=self.draws(), **options,
        )  # fmt: skip

    def accuracy(self, net: nn.Module, n_steps: int = 20) -> float:
        """Return the accuracy under attack on the images that were not trained on; of 0 steps, on them as they are."""
        net.eval()
        last: list[Tensor] = []
        if n_steps == 0:
            with torch.no_grad():
                last = [net(self.x_test)]
        else:
            seen = net.register_forward_hook(lambda module, args, out: last.append(out.detach()))
            with torch.no_grad():  # the last that the network sees is what the attack found
                robust_loss(
                    net, self.x_test, self.y_test, epsilon=self.epsilon, step_size=self.epsilon / 4, n_steps=n_steps,
                    generator=self.draws(),
                )  # fmt: skip
            seen.remove()
        return float((last[-1].argmax(1) == self.y_test).float().mean())


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _kept(result: HarpResult) -> tuple[int, int]:
    """Return how many weights are left in pruned layers, and of how many."""
    masks = result.masks.values()
    return int(sum(mask.sum() for mask in masks)), sum(mask.numel() for mask in masks)


def _fits(data: ImageData, n_train: int, network: str, **_: Any) -> None:
    one_of("network", network, ("mlp", "cnn"))
    require_rest(len(data.y), "n_train", n_train, TEST, "images")


def _compare(
    trial: Trial, task: _Task, arms: dict[str, dict[str, Any]], rate: float, **options: Any
) -> dict[str, float]:
    """Prune by each arm to the same number of weights; return the accuracy under attack."""
    trial.record("accuracy under attack, dense", task.accuracy(task.net))
    trial.record("accuracy, dense", task.accuracy(task.net, 0))
    trial.record("bytes of the file, dense", saved_bytes(task.net.state_dict()))
    robust = {}
    for arm, own in arms.items():
        result = task.prune(rate, **options, **own)
        kept, n = _kept(result)
        if kept > rate * n + 0.001 * n:
            raise RuntimeError(f"{arm} kept {kept} of {n} weights, more than {rate:g} of them")
        robust[arm] = task.accuracy(result.model)
        trial.record(f"accuracy, {arm}", task.accuracy(result.model, 0))
        trial.record(f"weights kept, {arm}", kept)
        trial.record(f"bytes of the packed file, {arm}", len(pack_sparse(result.model)))
        for place, share in enumerate(result.rates.values(), 1):
            trial.track(f"rate of each layer, {arm}", place, share)
    return robust


@comparison(
    paper="harp",
    says="At aggressive compression, learned rates of layers with learned scores keep more robust accuracy than learned scores at a uniform rate.",
    where="Zhao and Wressnegger, Section 5 and Table 1",
    arms=("uniform rates", "harp"),
    metric="accuracy on test images under PGD of 20 steps, after fine-tuning",
    better="higher",
    smallest={"n_train": 200, "width": 20, "train_epochs": 1, "epochs": 1, "finetune_epochs": 1, "rate": 0.1},
    check=_fits,
)
def robust_accuracy(
    trial: Trial, data: Images = "digits", n_train: Count = 1400, network: Literal["mlp", "cnn"] = "mlp",
    width: Width = 128, epsilon: Share = 0.1, rate: Rate = 0.005, start: Start = 0.05, gamma: Positive = 0.03,
    train_epochs: Count = 15, epochs: Count = 20, finetune_epochs: Count = 15,
) -> dict[str, float]:  # fmt: skip
    """Train a network against an attacker once, and prune it to half a percent of its weights by either arm.

    Both arms learn their scores against the attacker and are fine-tuned alike; the baseline, which is HYDRA, prunes
    each layer to the budget. The records have clean accuracy, pruning by least magnitude, the number of weights
    that are left, bytes of the files, dense and packed, and the rates. The claim is about aggressive compression:
    at ``rate=0.01`` the gain is about half of that, and at 0.03 it is a loss, since a uniform rate starves no layer
    and 20 epochs at this gamma do not learn a way down to the budget (the rest is one shift of all rates).
    The paper's setting is ``data="cifar10"`` with a VGG16 or a ResNet-18, where 1 % of the weights keeps
    accuracy and robustness of the dense network.
    """
    task = _Task(trial, data, n_train, network, (width, width), epsilon, train_epochs)
    arms: dict[str, dict[str, Any]] = {
        "least magnitude": {"learn_rates": False, "learn_scores": False},
        "uniform rates": {"learn_rates": False},
        "harp": {"start": max(start, rate)},
    }
    robust = _compare(trial, task, arms, rate, epochs=epochs, finetune_epochs=finetune_epochs, gamma=gamma)
    trial.record("accuracy under attack, least magnitude", robust.pop("least magnitude"))
    return robust


@comparison(
    paper="harp",
    says="Both parts matter: rates and scores learned together keep more robust accuracy than either alone.",
    where="Zhao and Wressnegger, Section 5, ablation",
    arms=("better of the two alone", "scores only", "rates only", "harp"),
    metric="accuracy on test images under PGD of 20 steps, after fine-tuning",
    better="higher",
    smallest={"n_train": 200, "width": 20, "train_epochs": 1, "epochs": 1, "finetune_epochs": 1, "rate": 0.1},
    check=_fits,
)
def both_parts(
    trial: Trial, data: Images = "digits", n_train: Count = 1400, network: Literal["mlp", "cnn"] = "mlp",
    width: Width = 128, epsilon: Share = 0.1, rate: Rate = 0.005, start: Start = 0.05, gamma: Positive = 0.03,
    train_epochs: Count = 15, epochs: Count = 20, finetune_epochs: Count = 15,
) -> dict[str, float]:  # fmt: skip
    """Prune as in ``robust_accuracy``, learning scores at a uniform rate, rates with scores as they start, or both.

    Both have to beat, in each seed, the one of the two that did better there.
    """
    task = _Task(trial, data, n_train, network, (width, width), epsilon, train_epochs)
    above = {"start": max(start, rate)}
    arms: dict[str, dict[str, Any]] = {
        "scores only": {"learn_rates": False},
        "rates only": {"learn_scores": False, **above},
        "harp": above,
    }
    robust = _compare(trial, task, arms, rate, epochs=epochs, finetune_epochs=finetune_epochs, gamma=gamma)
    return {"better of the two alone": max(robust["scores only"], robust["rates only"]), **robust}


@trend(
    paper="harp",
    says="The learned strategy keeps relatively more in small layers.",
    where="Zhao and Wressnegger, Section 5, learned strategies",
    metric="rank correlation of the size of a layer and its learned rate",
    high=-0.5,
    smallest={"n_train": 200, "width": 20, "train_epochs": 1, "epochs": 4, "rate": 0.1},
    check=_fits,
)
def small_layers(
    trial: Trial, data: Images = "digits", n_train: Count = 1400, network: Literal["mlp", "cnn"] = "mlp",
    width: Width = 160, epsilon: Share = 0.1, rate: Rate = 0.02, start: Start = 0.1, gamma: Positive = 0.03,
    train_epochs: Count = 15, epochs: Count = 20,
) -> float:  # fmt: skip
    """Learn the rates of a network whose layers taper, so that their sizes differ by a factor of 60.

    The curve shows rates by size. A rate has no reason but the attacker and the budget to leave where all start.
    """
    widths = [max(width * share // 20, 1) for share in (20, 12, 6, 3)]
    task = _Task(trial, data, n_train, network, widths, epsilon, train_epochs)
    result = task.prune(rate, epochs, 0, gamma, start=max(start, rate))
    sizes = [mask.numel() for mask in result.masks.values()]
    for size, share in sorted(zip(sizes, result.rates.values(), strict=True)):
        trial.track("rate by size of layer", size, share)
    return rank_correlation(sizes, list(result.rates.values()))


@entry("pruning", "HARP, no attack", paper="harp", where={"of": "weights"})
def learned_rates(train: Any, seed: int) -> nn.Module:
    """Return the network at rates and masks that were learned for half of the time, and trained further.

    Nothing attacks it here, which is what the method is for: the loss is that of clean images.
    """
    net, (x, y), share, _ = train
    order, half = torch.Generator().manual_seed(seed), TIMES * image_epochs(len(x)) // 2

    def batches() -> Any:
        return ((x[rows], y[rows]) for rows in torch.randperm(len(x), generator=order).split(64))

    found = harp_prune(
        net, batches, share, loss_fn=partial(robust_loss, kind="natural", bounds=None), prune_epochs=half,
        finetune_epochs=half, gamma=0.1, lr=RATE, finetune_lr=RATE,
    )  # fmt: skip
    return found.model.eval()
