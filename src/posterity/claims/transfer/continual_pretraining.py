"""Claims about DAS: by soft masks a language model keeps earlier domains, and what was general, while it learns."""

import ast
import importlib.util
import sysconfig
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, comparison
from posterity.lab.continual import kept
from posterity.lab.data import words_of
from posterity.lab.nets import seeded
from posterity.lab.training import fit
from posterity.transfer import ContinualPretrainer, mask_tokens

ARMS = ("naive", "das without contrast", "das")
RATES = (2.5e-4, 1e-3)
PAD, OTHER, MASK = 0, 1, 2  # tokens that are no words of the vocabulary
GENERAL_BATCH, BATCH, WIDTH, HEADS, LAYERS = 16, 8, 64, 4, 2
SHARES = (0.4, 0.1, 0.1)  # to learn from, to choose the rate by, to test; the rest is general

Length = Annotated[int, Between(8, 512)]


class Corpus(NamedTuple):
    """Rows of tokens of one domain, by what they are for."""

    general: Tensor
    train: Tensor
    held: Tensor
    test: Tensor


@cache
def documentation(size: int) -> tuple[str, ...]:
    """Return so many characters of documentation strings of numpy, torch, scipy and the standard library each."""
    texts = []
    for name in ("numpy", "torch", "scipy", ""):
        found = importlib.util.find_spec(name) if name else None
        root = Path(found.origin or "").parent if found else Path(sysconfig.get_paths()["stdlib"])
        files = sorted(root.rglob("*.py") if name else root.glob("*.py"))
        seen, total = dict[str, None](), 0
        for file in files:
            if any("test" in part for part in file.relative_to(root).parts):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node)
                    if text and text not in seen:
                        seen[text] = None
                        total += len(text) + 1
                if total >= size:
                    break
            if total >= size:
                break
        texts.append("\n".join(seen)[:size])
    return tuple(texts)


def _texts(corpora: str, size: int = 200_000) -> tuple[str, ...]:
    """Return the texts of files, or the ones that ship."""
    if not corpora:
        return documentation(size)
    paths = [Path(part.strip()).expanduser() for part in corpora.split(",")]
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(path for path in paths[0].iterdir() if path.suffix in (".txt", ".md", ".tsv"))
    found = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"corpora must be a folder of texts, or files apart by commas, {path} is none")
        try:
            found.append(path.read_text(encoding="utf-8-sig")[:size])
        except UnicodeDecodeError as error:
            raise ValueError(
                f"corpora: {path.name} is no UTF-8 text, byte {error.start} is none of it"
            ) from error
    if len(found) < 2:
        raise ValueError(f"corpora must be at least two texts, of different domains, got {len(found)}")
    return tuple(found)


def _fits(corpora: str, length: int, size: int = 200_000, **_: Any) -> None:
    # those that ship are long enough, and slow to read whole
    for k, text in enumerate(_texts(corpora, size if corpora else min(size, 200 * length))):
        least = 20 * length
        if (n := len(words_of(text))) < least:
            raise ValueError(
                f"corpora must have {least} words each for length={length}, number {k + 1} has {n}"
            )


def _cut(texts: tuple[str, ...], vocabulary: int, length: int, seed: int) -> list[Corpus]:
    """Return domains in random order, cut into rows that are dealt out at random."""
    words = [words_of(text) for text in texts]
    counts = Counter(word for text in words for word in text)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 3]
    index = {word: k + 3 for k, word in enumerate(frequent)}
    rng, found = np.random.default_rng(seed), []
    for k in rng.permutation(len(words)):
        tokens = torch.tensor([index.get(word, OTHER) for word in words[k]])
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        rows = rows[torch.from_numpy(rng.permutation(len(rows)))]
        train, held, test = (max(int(share * len(rows)), 1) for share in SHARES)
        found.append(Corpus(*rows.split([len(rows) - train - held - test, train, held, test])))
    return found


class _Model(nn.Module):
    """Says hidden words again: post-norm layers as RoBERTa's, words of input and output shared."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(length, WIDTH)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.begin = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.1))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, F.gelu, batch_first=True)
            for _ in range(LAYERS)
        )
        self.end, self.bias = nn.LayerNorm(WIDTH), nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.begin(self.words(input_ids) + self.places.weight[: input_ids.shape[1]])
        for layer in self.layers:
            hidden = layer(hidden)  # rows have no padding
        return F.linear(self.end(hidden), self.words.weight, self.bias), hidden


def _loss(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = net(inputs, torch.ones_like(inputs))[0]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _hidden(rows: Tensor, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return mask_tokens(rows, mask_token_id=MASK, vocab_size=vocabulary, special_ids=(PAD, OTHER), generator=draws)  # fmt: skip


@torch.no_grad()
def _score(net: nn.Module, asked: tuple[Tensor, Tensor]) -> float:
    """Return the loss on tokens hidden once and for all, nats each."""
    net.eval()
    parts = [(float(_loss(net, x, y)), int((y != -100).sum())) for x, y in zip(*(part.split(128) for part in asked), strict=True)]  # fmt: skip
    return sum(value * n for value, n in parts if n) / max(sum(n for _, n in parts), 1)


def _run(arm: str, start: Mapping[str, Tensor], corpora: list[Corpus], asked: Any, s: Any, lr: float) -> Any:
    """Return losses on each domain (column) after each (row), and on general text at the end, on parts to choose and to test."""
    trial, steps, vocabulary, length = s
    net = _Model(vocabulary, length)
    net.load_state_dict(start)
    net.words.requires_grad_(False)  # no mask holds them
    net.places.requires_grad_(False)
    trainer = ContinualPretrainer(
        net, mask_token_id=MASK, lr=lr, kinds=() if arm == "naive" else ("heads", "intermediate", "output"),
        contrast=float(arm == "das"), importance_batches=20, device=trial.device,
        generator=torch.Generator().manual_seed(trial.seed),
    )  # fmt: skip
    after = np.zeros((2, len(corpora), len(corpora)))
    rng = np.random.default_rng(trial.seed)
    for k, corpus in enumerate(corpora):
        order = np.concatenate([rng.permutation(len(corpus.train)) for _ in range(steps * BATCH // len(corpus.train) + 2)])  # fmt: skip
        rows = corpus.train[torch.from_numpy(order)].split(BATCH)[:steps]
        trainer.fit_domain(
            [{"input_ids": ids, "special_tokens_mask": (ids == OTHER).long()} for ids in rows],
            n_steps=steps,
        )
        for part in range(2):
            after[part, k] = [_score(net, each[part]) for each in asked[:-1]]
    return after, [_score(net, asked[-1][part]) for part in range(2)]


def _pretrained(trial: Trial, corpora: list[Corpus], vocabulary: int, length: int, steps: int) -> Any:
    """Return the weights of a model of general text: four tenths of each domain."""
    with seeded(trial.seed):
        net = _Model(vocabulary, length)
    rows = torch.cat([corpus.general for corpus in corpora])
    many = rows.repeat(-(-steps * GENERAL_BATCH // len(rows)), 1)  # each time with other tokens hidden
    fit(net, _loss, _hidden(many, vocabulary, trial.seed), steps=steps, batch_size=GENERAL_BATCH, lr=1e-3,
        seed=trial.seed, device=trial.device)  # fmt: skip
    return net.state_dict()


def _study(
    trial: Trial, corpora: str, steps: int, pretraining: int, length: int, vocabulary: int, size: int
) -> dict[str, Any]:
    """Return what each arm comes to on the parts to test, at the rate with the lower mean final loss on held-out parts."""
    domains = _cut(_texts(corpora, size), vocabulary, length, trial.seed)
    start = _pretrained(trial, domains, vocabulary, length, pretraining)
    parts: list[tuple[Tensor, ...]] = [(corpus.held, corpus.test) for corpus in domains]
    parts.append(tuple(torch.cat(each) for each in zip(*parts, strict=True)))
    asked = [tuple(tuple(x.to(trial.device) for x in _hidden(rows, vocabulary, 1)) for rows in each) for each in parts]  # fmt: skip
    found = {}
    for arm in ARMS:
        tried = [_run(arm, start, domains, asked, (trial, steps, vocabulary, length), lr) for lr in RATES]
        best = min(range(len(RATES)), key=lambda k: tried[k][0][0, -1].mean())
        after, general = tried[best]
        found[arm] = after[1], general[1]
        trial.record(f"rate, {arm}", RATES[best])
        trial.record(f"mean final loss, {arm}", after[1, -1].mean())
        trial.record(f"loss on the last domain, {arm}", after[1, -1, -1])
    return found


@comparison(
    paper="continual-pretraining",
    says="Soft masks keep earlier domains while a language model learns the next.",
    where="Section 4, forgetting rate",
    arms=("naive", "das without contrast", "das"),
    metric="forgetting: rise of the loss on earlier domains, nats a hidden token",
    better="lower",
    seeds=10,
    smallest={"steps": 1, "pretraining": 1, "length": 8, "vocabulary": 10, "size": 1_500},
    check=_fits,
)
def keeps_domains(
    trial: Trial,
    corpora: str = "",
    steps: Count = 80,
    pretraining: Count = 300,
    length: Length = 32,
    vocabulary: Annotated[int, Between(10)] = 1_000,
    size: Annotated[int, Between(1_000)] = 200_000,
) -> dict[str, float]:
    """Train one model on four domains in turn, and ask it for hidden words of all of them after each.

    Domains are the documentation of numpy, torch, scipy and Python's standard library, in random order, or
    ``corpora``: a folder of texts, or files with commas between, one a domain, of which ``size`` characters are read.
    The model has two layers of 64 and begins with what it learned from four tenths of each domain; then its word
    vectors, which no mask holds, stay as they are. The arms share it, the batches of eight rows and the steps, and each
    has the one of two rates (0.00025 and 0.001) with the lower mean final loss on held-out rows. Soft masks also slow
    learning, for which the mean final loss and that on the last domain are recorded: plain training often prefers the
    lower rate and forgets little at it, masks the higher. Where word vectors are trained too, plain training at a
    lower rate does as well as masks.
    """
    found = _study(trial, corpora, steps, pretraining, length, vocabulary, size)
    return {arm: -kept(-after).backward for arm, (after, _) in found.items()}


@comparison(
    paper="continual-pretraining",
    says="Soft masks keep what a language model knew of all domains before it was trained on each in turn.",
    where="Section 4, general knowledge",
    arms=("naive", "das without contrast", "das"),
    metric="loss on the mixture of all domains at the end, nats a hidden token",
    better="lower",
    reason="Masks alone lower it in every seed; the contrast, in so few steps, costs about as much.",
    smallest={"steps": 1, "pretraining": 1, "length": 8, "vocabulary": 10, "size": 1_500},
    check=_fits,
)
def keeps_general(
    trial: Trial,
    corpora: str = "",
    steps: Count = 80,
    pretraining: Count = 300,
    length: Length = 32,
    vocabulary: Annotated[int, Between(10)] = 1_000,
    size: Annotated[int, Between(1_000)] = 200_000,
) -> dict[str, float]:
    """Train and choose as for ``keeps_domains``, and ask for hidden words of the mixture that the model began with.

    The rows asked about are of all domains alike, none of them seen. Learning a domain lowers the loss on its part of
    the mixture, and forgetting raises that on the others.
    """
    found = _study(trial, corpora, steps, pretraining, length, vocabulary, size)
    return {arm: general for arm, (_, general) in found.items()}
