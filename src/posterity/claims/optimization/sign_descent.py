"""Claims about sign descent: without noise Adam's advantage stays, and signs have most of it."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, comparison, trend
from posterity.lab.data import Text, TextData, load_text
from posterity.lab.metrics import rank_correlation
from posterity.lab.tasks import Training, Walk, entry
from posterity.optimization import NormalizedGD, OptimizerCurve, SignDescent, compare_optimizers

Length = Annotated[int, Between(3, 1024)]
Width = Annotated[int, Between(2, 1024)]

SGD = partial(torch.optim.SGD, momentum=0.9)
SIGN = partial(SignDescent, momentum=0.9)
NORMALISED = partial(NormalizedGD, momentum=0.9)
# as many rates for each, the best inside
RATES = {
    "SGD": (SGD, (0.3, 0.5, 0.8, 1.2)),
    "normalised GD": (NORMALISED, (0.3, 0.5, 0.8, 1.2)),
    "sign descent": (SIGN, (1e-3, 2e-3, 4e-3, 8e-3)),
    "Adam": (torch.optim.Adam, (1e-2, 2e-2, 4e-2, 8e-2)),
}
# small batches want smaller ones
WIDER = {"SGD": (SGD, (0.05, 0.1, 0.3, 0.5, 0.8)), "sign descent": (SIGN, (3e-4, 5e-4, 1e-3, 2e-3, 4e-3))}


class _Transformer(nn.Module):
    """Predicts the next word: one causal encoder layer of two heads, without dropout."""

    def __init__(self, words: int, length: int, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True)
        self.read = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        hidden = self.words(tokens) + self.places(torch.arange(n, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=tokens.device)
        return self.read(self.layer(hidden, src_mask=mask, is_causal=True))


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _fits(data: TextData, sequences: int, length: int, **more: Any) -> None:
    if len(data.tokens) < sequences * length:
        raise ValueError(
            f"{sequences} sequences of {length} words are needed, has {len(data.tokens)} words: "
            "set sequences or length lower"
        )
    if more["width"] % 2:
        raise ValueError(f"width must be even, two heads share it, got {more['width']}")


def _sequences(text: TextData, sequences: int, length: int, seed: int) -> tuple[Tensor, int]:
    """Return sequences that overlap nowhere, drawn from all the text, in the numbers of their own words."""
    rows = text.tokens[: len(text.tokens) // length * length].reshape(-1, length)
    drawn = rows[np.random.default_rng(seed).choice(len(rows), sequences, replace=False)]
    words, tokens = np.unique(drawn, return_inverse=True)
    return torch.from_numpy(tokens.reshape(drawn.shape)), len(words)


def _race(
    trial: Trial, text: TextData, arms: Mapping[str, Any], sequences: int, length: int, width: int, steps: int,
    batch_size: int | None = None,
) -> dict[str, OptimizerCurve]:  # fmt: skip
    tokens, words = _sequences(text, sequences, length, trial.seed)
    make: Callable[[], nn.Module] = lambda: _Transformer(words, length, width)  # noqa: E731
    return compare_optimizers(
        make, _loss, (tokens.to(trial.device),), arms, batch_size=batch_size,
        n_steps=steps, random_state=trial.seed,
    )  # fmt: skip


def _draw(trial: Trial, curves: dict[str, OptimizerCurve]) -> None:
    for name, curve in curves.items():
        for step, loss in enumerate(curve.losses.tolist()):
            if math.isfinite(loss) and (step % 5 == 0 or step == len(curve.losses) - 1):
                trial.track(name, step, loss)
        trial.record(f"learning rate of {name}", curve.lr)


@comparison(
    paper="sign-descent",
    says="Without any gradient noise SGD still trails on a transformer, and sign descent with momentum does not.",
    where="Kunstner et al., Sections 2 and 3",
    arms=("SGD", "sign descent"),
    metric="training loss at the end, nats a word",
    better="lower",
    smallest={"sequences": 6, "steps": 4},
    check=_fits,
)
def geometry(
    trial: Trial,
    data: Text = "sklearn-descr",
    sequences: Count = 64,
    length: Length = 24,
    width: Width = 32,
    steps: Count = 30,
) -> dict[str, float]:
    """Train on the full batch, each arm with the best of four learning rates; Adam beside them."""
    arms = {name: RATES[name] for name in ("SGD", "sign descent", "Adam")}
    curves = _race(trial, load_text(data), arms, sequences, length, width, steps)
    _draw(trial, curves)
    trial.record("training loss of Adam", min(curves["Adam"].grid.values()))
    return {name: min(curves[name].grid.values()) for name in ("SGD", "sign descent")}


@comparison(
    paper="sign-descent",
    says="It is the direction and not the size of the step: normalised gradients do not close the gap, signs do.",
    where="Kunstner et al., Section 4",
    arms=("normalised GD", "sign descent"),
    metric="training loss at the end, nats a word",
    better="lower",
    smallest={"sequences": 6, "steps": 4},
    check=_fits,
)
def direction(
    trial: Trial,
    data: Text = "sklearn-descr",
    sequences: Count = 64,
    length: Length = 24,
    width: Width = 32,
    steps: Count = 30,
) -> dict[str, float]:
    """Train on the full batch, each arm with the best of four learning rates."""
    arms = {name: RATES[name] for name in ("normalised GD", "sign descent")}
    curves = _race(trial, load_text(data), arms, sequences, length, width, steps)
    _draw(trial, curves)
    return {name: min(curve.grid.values()) for name, curve in curves.items()}


@trend(
    paper="sign-descent",
    says="The gap between SGD and sign descent grows with the batch.",
    where="Kunstner et al., Section 2, Figure 2",
    metric="rank correlation of batch size and log(loss of SGD / loss of sign descent)",
    low=0.0,
    high=1.0,
    smallest={"sequences": 8, "steps": 2},
    check=_fits,
)
def grows_with_the_batch(
    trial: Trial,
    data: Text = "sklearn-descr",
    sequences: Annotated[int, Between(8)] = 64,
    length: Length = 24,
    width: Width = 32,
    steps: Count = 30,
) -> float:
    """Train with batches from a sixteenth of the sequences to all of them, as many steps with each."""
    text, sizes = load_text(data), sorted({max(1, sequences // part) for part in (16, 8, 4, 2, 1)})
    gaps = []
    for size in sizes:
        curves = _race(trial, text, WIDER, sequences, length, width, steps, size)
        losses = [min(curve.grid.values()) for curve in curves.values()]
        for name, loss in zip(curves, losses, strict=True):
            trial.track(f"loss of {name}", size, loss)
        gaps.append(math.log(losses[0] / losses[1]))
    return rank_correlation(sizes, gaps)


@entry("optimizer", "sign descent", paper="sign-descent")
def compared_signs(train: Training, seed: int) -> Walk:
    """Return the best of four rates, momentum 0.9."""
    return train.tuned(lambda net, rate: SIGN(net.parameters(), lr=rate), (1e-4, 3e-4, 1e-3, 3e-3))


@entry("optimizer", "normalised GD", paper="sign-descent")
def compared_lengths(train: Training, seed: int) -> Walk:
    """Return the best of four rates, momentum 0.9."""
    return train.tuned(lambda net, rate: NORMALISED(net.parameters(), lr=rate), (0.01, 0.03, 0.1, 0.3))
