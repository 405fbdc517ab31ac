"""Claims about Decepticons: a corrupted state makes an update readable, clipping and noise do not let it."""

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from posterity.claims import Between, Count, NotNegative, Positive, Trial, comparison
from posterity.lab.data import Text, TextData, load_text
from posterity.lab.nets import seeded
from posterity.privacy import AuditTransformer, LeakageReport, audit_leakage, corrupt_transformer

Length = Annotated[int, Between(2, 1024)]


def _fits(data: TextData, sequences: int, length: int, **_: Any) -> None:
    if len(data.tokens) < sequences * length:
        raise ValueError(
            f"{sequences} sequences of {length} words are needed, has {len(data.tokens)} words: "
            "set sequences or length lower"
        )


def _batch(text: TextData, sequences: int, length: int, seed: int) -> Tensor:
    """Return sequences that follow on each other nowhere, drawn from all the text."""
    rows = text.tokens[: len(text.tokens) // length * length].reshape(-1, length)
    return torch.from_numpy(rows[np.random.default_rng(seed).choice(len(rows), sequences, replace=False)])


def _model(text: TextData, length: int, trial: Trial) -> AuditTransformer:
    with seeded(trial.seed):
        return AuditTransformer(len(text.vocabulary), length).to(trial.device)


def _sinusoids(table: Tensor) -> Tensor:
    """Return fixed positions of the shape of a table, as the first transformer had them."""
    length, d = table.shape
    rate = torch.exp(-math.log(10_000.0) * torch.arange(0, d, 2) / d)
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :d].to(table)


def _shuffled(tokens: Tensor, seed: int) -> float:
    """Return the accuracy of the right words in random order: what knowing the words alone is worth."""
    order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(seed))
    return float((tokens.flatten()[order] == tokens.flatten()).float().mean())


@comparison(
    paper="decepticons",
    says="A corrupted parameter state turns one update of many sequences into readable text.",
    where="Fowl et al., abstract",
    arms=("honest state", "corrupted state"),
    metric="share of tokens read at their places",
    better="higher",
    smallest={"sequences": 2, "length": 8},
    check=_fits,
)
def reads_text(
    trial: Trial,
    data: Text = "sklearn-descr",
    sequences: Count = 8,
    length: Length = 32,
    embedding_scale: Positive = 1.0,
    positions: Literal["learned", "sinusoidal"] = "learned",
) -> dict[str, float]:
    """Take one gradient on some text in each of two states of one model, and read both alike.

    The honest state is the initial one. Its bias gradient too tells which words there were (see the
    records), but not where they stood. Of the corrupted state, words are lost that fall between the
    same two thresholds, more of them with more sequences, and the last of each sequence, which has
    no gradient of its own. ``embedding_scale=9.8`` multiplies words by the root of the width, as some
    models do; ``positions="sinusoidal"`` has neighbouring places look alike. The paper reads
    WikiText from this transformer, BERT and GPT-2: any text file will do.
    """
    text = load_text(data)
    tokens = _batch(text, sequences, length, trial.seed)
    model = _model(text, length, trial)
    with torch.no_grad():
        model.embedding.weight *= embedding_scale
        if positions == "sinusoidal":
            model.positions.weight.copy_(_sinusoids(model.positions.weight))
    corrupted, probe = corrupt_transformer(model, generator=torch.Generator().manual_seed(trial.seed))
    states: dict[str, nn.Module] = {"honest state": model, "corrupted state": corrupted}
    accuracy = {}
    for arm, state in states.items():
        report = audit_leakage(state, tokens, probe)
        accuracy[arm] = report.token_accuracy
        trial.record(f"words read, wherever they stood, {arm}", report.bag_accuracy)
        trial.record(f"embeddings found, {arm}", report.n_hits)
    trial.record("the right words in random order", _shuffled(tokens, trial.seed))
    return accuracy


@comparison(
    paper="decepticons",
    says="A clipped gradient with a little noise on it cannot be read.",
    where="Clipping and noise of Abadi et al. (2016), against the attack of Fowl et al.",
    arms=("no defence", "little noise", "more noise"),
    metric="share of tokens read at their places",
    better="lower",
    smallest={"sequences": 2, "length": 8, "scales": (1.0,), "traced": (1e-9,)},
    check=_fits,
)
def noise_stops_it(
    trial: Trial,
    data: Text = "sklearn-descr",
    sequences: Count = 8,
    length: Length = 32,
    clip: Positive = 1.0,
    little: NotNegative = 1e-3,
    more: NotNegative = 1e-2,
    scales: tuple[Positive, ...] = (1e-4, 1.0, 10.0),
    traced: tuple[Positive, ...] = (1e-12, 1e-9, 1e-6),
) -> dict[str, float]:
    """Corrupt a model, clip its gradient to ``clip`` and add noise of that much times ``clip``.

    Each arm has the best of the attacks whose hidden units get so much of the gradient: small ``scales`` read
    best, large ones stand noise. Clipping alone takes nothing away, since reading is blind
    to scale, as the records say; the curves have far less noise than the arms. Which words there were
    stays readable when their order is lost, and needs more noise: records and curves have that too.
    """
    text = load_text(data)
    tokens = _batch(text, sequences, length, trial.seed)
    model = _model(text, length, trial)
    rng = torch.Generator().manual_seed(trial.seed)
    attacks = [corrupt_transformer(model, backward_scale=scale, generator=rng) for scale in scales]

    def best(norm: float | None, noise: float) -> tuple[LeakageReport, float]:
        """Return the best attack's report, and the most words that any attack found."""
        reports = [
            audit_leakage(state, tokens, probe, clip=norm, noise_multiplier=noise, generator=rng)
            for state, probe in attacks
        ]
        return max(reports, key=lambda each: each.token_accuracy), max(each.bag_accuracy for each in reports)

    accuracy = {}
    for arm, norm, noise in (
        ("no defence", None, 0.0),
        ("little noise", clip, little),
        ("more noise", clip, more),
    ):
        report, words = best(norm, noise)
        accuracy[arm] = report.token_accuracy
        trial.record(f"words read, wherever they stood, {arm}", words)
    for noise in traced:
        report, words = best(clip, noise)
        trial.track(
            "tokens read at their places, by log10 of noise", math.log10(noise), report.token_accuracy
        )
        trial.track("words read, by log10 of noise", math.log10(noise), words)
    trial.record("clipping alone", best(clip, 0.0)[0].token_accuracy)
    trial.record("the right words in random order", _shuffled(tokens, trial.seed))
    return accuracy
