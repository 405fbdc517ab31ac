"""Claims about SalUn: it comes closer to retraining than fine-tuning, and its mask keeps what is retained."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from posterity.claims import Count, PartOfAll, Trial, comparison
from posterity.lab.data import ImageData, Labelled, load_labelled, split
from posterity.lab.data.needs import require_rest
from posterity.lab.nets import cnn, mlp
from posterity.lab.tasks import entry
from posterity.lab.tasks.image_classification import standardised
from posterity.lab.tasks.unlearning import (
    EPOCHS,
    Forget,
    Part,
    cross_entropy,
    descend,
    joined,
    predictor,
    require_rows_to_forget,
    rows_to_forget,
)  # fmt: skip
from posterity.privacy import UnlearningReport, salun, unlearning_report

TESTED = 1_000  # rows at most
RATES = (0.003, 0.01, 0.03, 0.1)  # the last is that of the first training

Network = Literal["mlp", "cnn"]
Method = Callable[[nn.Module, Part, Part, float], nn.Module]


def _fits(data: ImageData, n_train: int, forget: Forget, share: float, **_: Any) -> None:
    if n_train < 20:
        raise ValueError(f"n_train must be at least 20, got {n_train}")
    require_rest(len(data.y), "n_train", n_train, 20, "examples")
    require_rows_to_forget(n_train, forget, share)


class _Case:
    """A model, the rows that it shall forget, and what a model that never saw them is like."""

    def __init__(
        self, inputs: ImageData, seed: int, *, n_train: int, forget: Forget, share: float, train_epochs: int,
        network: Network, device: str,
    ) -> None:  # fmt: skip
        n, self.n_classes = len(inputs.y), len(inputs.classes)
        tested = min(TESTED, n - n_train)
        train, test = split(n, (n_train / n, tested / n), seed, stratify=inputs.y)
        gone, kept = (train[rows] for rows in rows_to_forget(inputs.y[train], forget, share, seed))
        x, y = (
            torch.from_numpy(standardised(inputs.x, train)).to(device),
            torch.from_numpy(inputs.y).to(device),
        )
        self.forget, self.retain, self.test = ((x[rows], y[rows]) for rows in (gone, kept, test))

        def trained(part: Part) -> nn.Module:
            make = mlp(x[0].numel(), self.n_classes, width=256, seed=seed) if network == "mlp" else (
                cnn(x.shape[1], self.n_classes, width=12, seed=seed))  # fmt: skip
            descend(make, cross_entropy, part, lr=RATES[-1], epochs=train_epochs, batch_size=128,
                    schedule="cosine", seed=seed, device=device)  # fmt: skip
            return make.to(device).eval()

        self.model = trained(joined(self.forget, self.retain))
        self.goal = self.report(trained(self.retain))

    def report(self, model: nn.Module) -> UnlearningReport:
        return unlearning_report(model, self.forget, self.retain, self.test)

    def gap(self, method: Method, rate: float) -> float:
        """Return the distance from retraining, in percentage points; 100 where the method blows up."""
        try:
            found = method(copy.deepcopy(self.model), self.forget, self.retain, rate)
            return 100 * self.report(found.eval()).gap(self.goal)
        except ValueError:  # the loss or an output is not finite
            return 100.0


@comparison(
    paper="salun",
    says="SalUn comes closer to retraining than fine-tuning and gradient ascent do.",
    where="Fan et al., Section 5.2, Table 1",
    arms=("fine-tuning", "gradient ascent", "random labels", "SalUn"),
    metric="mean distance from the retrained model in four figures, percentage points",
    better="lower",
    smallest={"n_train": 200, "train_epochs": 2, "epochs": 1},
    check=_fits,
)
def close_to_retraining(
    trial: Trial,
    data: Labelled = "noisy-digits",
    target: str | None = None,
    n_train: Count = 1_000,
    forget: Forget = "random",
    share: PartOfAll = 0.3,
    keep: PartOfAll = 0.5,
    train_epochs: Count = 40,
    epochs: Count = 10,
    network: Network = "mlp",
) -> dict[str, float]:
    """Train with and without the rows to forget, from the same initial weights, and unlearn four times.

    The four figures are the error on forgotten rows, accuracy on kept and on test rows, and how many
    forgotten rows a membership attack takes for never seen. Each arm has ten epochs in batches of
    256, and of four rates, up to the one of the first training, that which comes closest on another
    split with other initial weights. Random labels without a mask come as close as SalUn here. At rates
    beyond, or in many small batches, fine-tuning becomes a retraining and comes close too: the
    records have it at five times the rate. The paper's setting is ``data="cifar10", network="cnn",
    share=0.1`` with all of CIFAR-10 and a ResNet-18.
    """
    inputs = load_labelled(data, target=target)

    def case(seed: int) -> _Case:
        return _Case(inputs, seed, n_train=n_train, forget=forget, share=share, train_epochs=train_epochs,
                     network=network, device=trial.device)  # fmt: skip

    tuning, judged = case(trial.seed + 10_000), case(trial.seed)

    def fine_tuned(model: nn.Module, gone: Part, kept: Part, rate: float) -> nn.Module:
        descend(model, cross_entropy, kept, lr=rate, epochs=epochs, batch_size=256, seed=trial.seed, device=trial.device)  # fmt: skip
        return model

    def ascended(model: nn.Module, gone: Part, kept: Part, rate: float) -> nn.Module:
        descend(model, lambda net, x, y: -cross_entropy(net, x, y), gone, lr=rate, epochs=epochs, batch_size=256,
                seed=trial.seed, device=trial.device)  # fmt: skip
        return model

    def relabelled(share: float) -> Method:
        return lambda model, gone, kept, rate: salun(
            model, gone, kept, n_classes=judged.n_classes, keep=share, epochs=epochs, lr=rate,
            generator=torch.Generator().manual_seed(trial.seed),
        )  # fmt: skip

    gaps = {}
    methods: dict[str, Method] = {
        "fine-tuning": fine_tuned, "gradient ascent": ascended, "random labels": relabelled(1.0), "SalUn": relabelled(keep),
    }  # fmt: skip
    for arm, method in methods.items():
        tried = [tuning.gap(method, rate) for rate in RATES]
        rate = RATES[int(np.argmin(tried))]
        gaps[arm] = judged.gap(method, rate)
        trial.record(f"rate, {arm}", rate)
    trial.record("gap, doing nothing", 100 * judged.report(judged.model).gap(judged.goal))
    trial.record("gap, fine-tuning at five times the rate", judged.gap(fine_tuned, 5 * RATES[-1]))
    return gaps


@comparison(
    paper="salun",
    says="The mask keeps what is retained, where few of the kept rows are at hand and the rate is not tuned.",
    where="Fan et al., Section 4 and Figure 2",
    arms=("random labels", "SalUn"),
    metric="accuracy on kept rows, mean over five rates",
    better="higher",
    smallest={"n_train": 200, "train_epochs": 2, "epochs": 1, "draws": 1},
    check=_fits,
)
def keeps_what_is_retained(
    trial: Trial,
    data: Labelled = "noisy-digits",
    target: str | None = None,
    n_train: Count = 1_000,
    forget: Forget = "class",
    share: PartOfAll = 1.0,
    at_hand: PartOfAll = 0.05,
    keep: PartOfAll = 0.2,
    train_epochs: Count = 40,
    epochs: Count = 10,
    draws: Count = 3,
    network: Network = "mlp",
) -> dict[str, float]:
    """Forget a class with a twentieth of the other rows at hand, with and without the mask.

    A rate cannot be tuned where nobody has retrained, so both arms run at five, from 0.001 to 0.1.
    Each forgets the class at all of them, as the records say; they differ in the damage, most of it
    at the two largest rates. At a rate that suits, with all rows at hand, or with half of the
    weights in the mask, what it keeps is within noise: there it acts as a smaller rate would.
    """
    case = _Case(load_labelled(data, target=target), trial.seed, n_train=n_train, forget=forget, share=share,
                 train_epochs=train_epochs, network=network, device=trial.device)  # fmt: skip
    x, y = case.retain
    some = max(2, round(at_hand * len(y)))
    known = x[:some], y[:some]  # rows are in random order
    accuracy = {}
    for arm, part in (("random labels", 1.0), ("SalUn", keep)):
        kept, forgotten = [], []
        for rate in (0.001, *RATES):
            reports = []
            for draw in range(draws):
                unlearned = salun(
                    case.model, case.forget, known, n_classes=case.n_classes, keep=part, epochs=epochs, lr=rate,
                    generator=torch.Generator().manual_seed(trial.seed + 1000 * draw),
                )  # fmt: skip
                reports.append(case.report(unlearned))
            kept.append(np.mean([report.retain_accuracy for report in reports]))
            forgotten.append(np.mean([report.forget_error for report in reports]))
            trial.track(f"accuracy on kept rows, by rate: {arm}", rate, kept[-1])
        accuracy[arm] = float(np.mean(kept))
        trial.record(f"error on forgotten rows, {arm}", float(np.mean(forgotten)))
    trial.record("accuracy on kept rows, retrained", case.goal.retain_accuracy)
    return accuracy


@entry("unlearning", "SalUn", paper="salun")
def unlearned(train: Any, seed: int, rate: float = 0.01) -> Any:
    """Return the model after random labels of the rows to forget under the mask, half of the weights in it."""
    model, gone, kept, n_classes = train
    rng = torch.Generator().manual_seed(seed)
    return predictor(salun(model, gone, kept, n_classes=n_classes, epochs=EPOCHS, lr=rate, batch_size=64,
                           order="mixed", generator=rng))  # fmt: skip
