"""Claims about SMoE-Dropout: quality rises with the experts that are switched on, at a cost that follows them."""

import copy
import importlib.resources
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, bound, comparison, trend
from posterity.compression import ExpertSchedule, SMoEDropout, convert_ffn, set_active, slim
from posterity.lab import training
from posterity.lab.costs import saved_bytes, seconds_in_turns
from posterity.lab.data import Text, TextData, dataset, load_text, words_of
from posterity.lab.metrics import rank_correlation
from posterity.lab.nets import seeded, weights

LENGTH = 32  # characters that a prediction sees at most
BLOCK = 16 * LENGTH  # training and validation take turns in blocks of the text
WIDTH, HIDDEN, HEADS = 64, 512, 4

Experts = Annotated[int, Between(2, 64)]


@dataset(Text, "sklearn-descriptions")
def sklearn_descriptions(seed: int) -> TextData:
    """Return the descriptions that scikit-learn has of all data sets that it knows."""
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda f: f.name)
    words = words_of(" ".join(file.read_text(encoding="utf-8") for file in files))
    vocabulary, tokens = np.unique(np.asarray(words), return_inverse=True)
    return TextData(
        tokens.astype(np.int64), tuple(map(str, vocabulary)), f"sklearn-descriptions: {len(words):,} words"
    )


class _Transformer(nn.Module):
    """Predicts the next character: causal pre-norm blocks without dropout."""

    def __init__(self, characters: int, n_layers: int = 2) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(n_layers))
        for block in self.blocks:
            for part in block.modules():
                if isinstance(part, nn.Linear):
                    part.reset_parameters()  # copies would start equal
        self.norm, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        hidden = self.characters(tokens) + self.places(torch.arange(n, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=tokens.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.read(self.norm(hidden))


def _fits(data: TextData, n_train: int, n_val: int, **more: Any) -> None:
    n = len(_characters(data)[0]) // BLOCK
    if -(-n_train // BLOCK) + -(-n_val // BLOCK) > n:
        raise ValueError(
            f"n_train + n_val must be at most {n * BLOCK} characters, {n} blocks of {BLOCK}, "
            f"got {n_train} + {n_val}"
        )
    if "k" in more and more["k"] >= more["n_experts"]:
        raise ValueError(f"k must be less than n_experts = {more['n_experts']}, got {more['k']}")
    if HIDDEN % more["n_experts"]:
        raise ValueError(f"n_experts must divide {HIDDEN}, got {more['n_experts']}")


def _sizes(width: int, n_experts: int, **_: Any) -> None:
    if width % 4:
        raise ValueError(f"width must be divisible by 4, which heads share it, got {width}")
    if 8 * width % n_experts:
        raise ValueError(
            f"n_experts must divide the {8 * width} hidden units, 8 times width, got {n_experts}"
        )


def _characters(text: TextData) -> tuple[np.ndarray, int]:
    """Return the text in numbers of its characters, one space between words, and how many there are."""
    joined = " ".join(text.vocabulary[token] for token in text.tokens)
    used, numbers = np.unique(np.array(list(joined)), return_inverse=True)
    return numbers, len(used)


def _parts(text: TextData, n_train: int, n_val: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Return windows of the training blocks, at every place, and of the validation blocks, side by side."""
    numbers, n_characters = _characters(text)
    blocks = torch.from_numpy(numbers[: len(numbers) // BLOCK * BLOCK]).reshape(-1, BLOCK)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(blocks)))
    size = -(-n_train // BLOCK)
    train, val = blocks[order[:size]], blocks[order[size : size + -(-n_val // BLOCK)]]
    windows = train.unfold(1, LENGTH + 1, 1).reshape(-1, LENGTH + 1)
    return windows, val.unfold(1, LENGTH + 1, LENGTH).reshape(-1, LENGTH + 1), n_characters


def _loss(net: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(net(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def _bits(net: nn.Module, windows: Tensor) -> float:
    """Return validation bits a character."""
    device = next(net.parameters()).device
    return float(_loss(net.eval(), windows.to(device))) / np.log(2)


def _start(n_characters: int, seed: int) -> nn.Module:
    return weights(_Transformer, n_characters, seed=seed)


def _experts(net: nn.Module, n_experts: int, k: int, trial: Trial, *, learned: bool = False) -> nn.Module:
    """Return a network cut into experts, with routers to train or not."""
    net = convert_ffn(net, n_experts, k=k, generator=torch.Generator().manual_seed(trial.seed))
    for layer in _layers(net):
        layer.learn_router = learned
        layer.router.requires_grad_(learned)
    return net


def _layers(net: nn.Module) -> list[SMoEDropout]:
    return [module for module in net.modules() if isinstance(module, SMoEDropout)]


def _fit(
    net: nn.Module, windows: Tensor, steps: int, lr: float, trial: Trial, *, schedule: ExpertSchedule | None = None,
    balance: float = 0.0,
) -> nn.Module:  # fmt: skip
    """Train in place, with a growing number of experts or a load balance if they are given."""
    step = 0

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        nonlocal step
        if schedule is not None:
            set_active(net, schedule(step))
        step += 1
        value = _loss(net, batch)
        if balance:
            value = value + balance * sum(layer.balance_loss() for layer in _layers(net))
        return value

    training.fit(net, loss, (windows,), steps=steps, batch_size=16, lr=lr, optimizer="adamw", weight_decay=0.01,
                 schedule="cosine", seed=trial.seed, device=trial.device)  # fmt: skip
    return net


def _curve(net: nn.Module, val: Tensor, n_experts: int, name: str, trial: Trial) -> dict[int, float]:
    """Return validation bits by the number of experts that are switched on."""
    bits = {}
    for k in range(1, n_experts + 1):
        set_active(net, k)
        bits[k] = _bits(net, val)
        trial.track(f"validation bits: {name}", k, bits[k])
    return bits


@comparison(
    paper="smoe-dropout",
    says="Under a fixed random router and a growing k quality keeps rising as more experts are switched on; "
    "under a learned router it does not.",
    where="Chen et al., Section 4, the self-slimmable property",
    arms=("learned router", "smoe-dropout"),
    metric="validation bits a character with all experts, less those with k",
    better="lower",
    smallest={"n_train": 512, "n_val": 512, "steps": 2, "n_experts": 4},
    check=_fits,
)
def slimmable(
    trial: Trial,
    data: Text = "sklearn-descriptions",
    n_train: Count = 8_000,
    n_val: Count = 8_000,
    n_experts: Experts = 8,
    k: Count = 2,
    steps: Count = 300,
    lr: Positive = 5e-3,
) -> dict[str, float]:
    """Train one start by two routings and switch on more experts afterwards.

    The learned router has ``k`` experts throughout and the Switch load balance; the fixed one
    from half of the experts to all.
    """
    train, val, n_characters = _parts(load_text(data), n_train, n_val, trial.seed)
    start = _start(n_characters, trial.seed)
    learned = _experts(start, n_experts, k, trial, learned=True)
    _fit(learned, train, steps, lr, trial, balance=0.01)
    ours = _experts(start, n_experts, n_experts, trial)
    _fit(ours, train, steps, lr, trial, schedule=ExpertSchedule(steps, max(n_experts // 2, 1), n_experts))
    rise = {}
    for arm, net in (("learned router", learned), ("smoe-dropout", ours)):
        bits = _curve(net, val, n_experts, arm, trial)
        rise[arm] = bits[n_experts] - bits[k]
        trial.record(f"validation bits with k experts, {arm}", bits[k])
        trial.record(f"validation bits with all experts, {arm}", bits[n_experts])
    return rise


@comparison(
    paper="smoe-dropout",
    says="A network trained by random experts generalises better than the dense one of its size and steps.",
    where="Chen et al., Section 4, comparison with dense training",
    arms=("dense", "smoe-dropout"),
    metric="validation bits a character, all experts",
    better="lower",
    smallest={"n_train": 512, "n_val": 512, "steps": 2, "n_experts": 4},
    check=_fits,
    reason="at this scale the two come out alike: random experts learn the training text by heart as well",
)
def regulariser(
    trial: Trial,
    data: Text = "sklearn-descriptions",
    n_train: Count = 8_000,
    n_val: Count = 8_000,
    n_experts: Experts = 8,
    steps: Count = 400,
    lr: Positive = 5e-3,
) -> dict[str, float]:
    """Train one start both ways, for many steps on few characters, where a regulariser can help.

    The records have training bits, and those of ours with half of the experts.
    """
    train, val, n_characters = _parts(load_text(data), n_train, n_val, trial.seed)
    dense = _start(n_characters, trial.seed)
    ours = _experts(dense, n_experts, n_experts, trial)
    _fit(dense, train, steps, lr, trial)
    _fit(ours, train, steps, lr, trial, schedule=ExpertSchedule(steps, max(n_experts // 2, 1), n_experts))
    set_active(ours, n_experts)
    bits = {"dense": _bits(dense, val), "smoe-dropout": _bits(ours, val)}
    for arm, net in (("dense", dense), ("smoe-dropout", ours)):
        trial.record(f"training bits, {arm}", _bits(net, train[:: max(len(train) // 500, 1)]))
    set_active(ours, max(n_experts // 2, 1))
    trial.record("validation bits, half of the experts", _bits(ours, val))
    return bits


@trend(
    paper="smoe-dropout",
    says="Bits fall steadily with the number of experts that are switched on at inference.",
    where="Chen et al., Section 4, the self-slimmable property",
    metric="rank correlation of validation bits with the number of active experts",
    high=-0.9,
    smallest={"n_train": 512, "n_val": 512, "steps": 2, "n_experts": 4},
    check=_fits,
)
def steady(
    trial: Trial,
    data: Text = "sklearn-descriptions",
    n_train: Count = 8_000,
    n_val: Count = 8_000,
    n_experts: Experts = 8,
    steps: Count = 300,
    lr: Positive = 5e-3,
) -> float:
    """Train with a growing k and measure at an eighth, a quarter, three eighths, a half, three quarters and all.

    From three quarters on the curve is flat to a few thousandths of a bit, with the least bits often
    just before all experts, which were active together for the last steps only: over every k, which
    the curve shows, the correlation is nearer to -0.9.
    """
    train, val, n_characters = _parts(load_text(data), n_train, n_val, trial.seed)
    net = _experts(_start(n_characters, trial.seed), n_experts, n_experts, trial)
    _fit(net, train, steps, lr, trial, schedule=ExpertSchedule(steps, max(n_experts // 2, 1), n_experts))
    bits = _curve(net, val, n_experts, "smoe-dropout", trial)
    shares = sorted({max(round(n_experts * share / 8), 1) for share in (1, 2, 3, 4, 6, 8)})
    return rank_correlation(shares, [bits[k] for k in shares])


@bound(
    paper="smoe-dropout",
    says="With a quarter of the experts a network with wide feed-forward layers, all else included, runs in "
    "less time than the dense network.",
    where="Chen et al., Section 4, inference cost",
    metric="seconds of a forward pass with a quarter of the experts, over those of the dense network",
    limit=1.0,
    timed=True,
    smallest={"width": 32, "tokens": 64, "rounds": 1},
    check=_sizes,
)
def cost(
    trial: Trial,
    width: Annotated[int, Between(8, 1024)] = 256,
    n_experts: Experts = 16,
    tokens: Count = 1_024,
    rounds: Count = 15,
) -> float:
    """Time both in turns and return the median of their ratios: two encoder layers, hidden width 8 times theirs.

    Multiply-adds are two fifths of the dense network's; sorting tokens, and torch's fused encoder,
    which only the dense network can take, come on top.
    The curve has other numbers of experts. The records have the bytes of the saved files: those of
    the experts are the dense network's and a router, since every expert is kept.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    with seeded(trial.seed):
        layer = nn.TransformerEncoderLayer(width, 4, 8 * width, 0.0, F.gelu, batch_first=True)
        dense = nn.TransformerEncoder(layer, 2).to(trial.device).eval()
    experts = convert_ffn(dense, n_experts, generator=generator)
    shares = sorted({max(n_experts // part, 1) for part in (8, 4, 2, 1)})
    nets = {k: slim(experts, k) for k in shares}
    x = torch.randn(-(-tokens // 64), 64, width, generator=generator).to(trial.device)
    quarter, ratios = max(n_experts // 4, 1), {}
    for k in shares:
        with torch.inference_mode():  # a number is read, which waits for the device
            passes = [lambda net=net: float(net(x).sum()) for net in (nets[k], dense)]
            seconds = seconds_in_turns(passes, rounds if k == quarter else min(rounds, 3))
        ratios[k] = float(np.median(seconds[:, 0] / seconds[:, 1]))
        trial.track("seconds over those of the dense network", k, ratios[k])
        trial.track("seconds of a forward pass", k, float(np.median(seconds[:, 0])))
        trial.track("seconds of a forward pass, dense", k, float(np.median(seconds[:, 1])))
    for name, net in (("dense", dense), ("a quarter of the experts", nets[quarter])):
        trial.record(f"bytes of the file, {name}", saved_bytes(net.state_dict()))
    return ratios[quarter]
