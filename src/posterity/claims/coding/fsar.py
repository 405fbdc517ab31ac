"""Claims about finite-state coding: shorter files at the speed of a table, better latents, fewer states."""

import math
import struct
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from posterity.claims import Between, Count, Positive, Trial, comparison
from posterity.coding import FiniteStateCoder, FSARCodec, HardmaxQuantizer, Quantized
from posterity.lab import nets, training
from posterity.lab.data import ImageData, Images, Pictures, load_images, load_pictures, split
from posterity.lab.tasks import entry

LEFT_TOP = ((0, 0, -1), (0, -1, 0))
Codes = Annotated[int, Between(2, 256)]
STARTS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192])  # of sizes of errors
WIDTHS = np.diff([*STARTS, 256])  # powers of two
Codec = tuple[Callable[[list[ndarray]], bytes], Callable[[bytes], list[ndarray]]]


def _levels(images: ImageData) -> int:
    """Return how many values the pixels have, by the steps that they lie on."""
    for top in (1, 16, 255):
        if np.abs(images.x * top - np.rint(images.x * top)).max() < 1e-3:
            return top + 1
    raise ValueError("images must have pixels of at most 8 bits, got finer ones")


def _discrete(data: Any, **_: Any) -> None:
    _levels(data)


def _pixels(data: str, seed: int) -> tuple[Tensor, Tensor, int]:
    images = load_images(data)
    levels = _levels(images)
    x = torch.from_numpy(np.rint(images.x * (levels - 1))).long()
    train, test = split(len(x), (0.8, 0.2), seed)
    return x[train], x[test], levels


def _train(codec: FSARCodec, x: Tensor, trial: Trial, steps: int, lr: float, states_lr: float = 0.0) -> None:
    """Train a codec in place; the weights of its states, if it has some, at a rate of their own."""
    generator = torch.Generator().manual_seed(trial.seed)
    on, states = trial.device == "cpu", codec.prior.states

    def adam(parameters: list[Any], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p is not states]}]
        if states is not None:
            groups.append({"params": [states], "lr": states_lr})
        return torch.optim.Adam(groups, lr=lr)

    training.fit(
        codec, lambda net, x: net(x, generator=generator if on else None).loss, (x,), steps=steps, batch_size=64, lr=lr,
        optimizer=adam, schedule="cosine", clip=100.0, seed=trial.seed, device=trial.device,
    )  # fmt: skip
    codec.cpu().eval()


def _codec(x: Tensor, levels: int, n_codes: int, seed: int, **options: Any) -> FSARCodec:
    """Return a codec whose encoder and decoder begin with the weights of the seed."""
    with nets.seeded(seed):
        return FSARCodec(
            x.shape[1], n_levels=levels, channels=1, n_codes=n_codes, dim=8, hidden=32, offsets=LEFT_TOP, **options
        )  # fmt: skip


def _measure(trial: Trial, arm: str, codec: FSARCodec, x: Tensor) -> float:
    """Return bits per dimension of the file, which must give the images back, and record the speed."""
    codec.freeze()
    started = time.perf_counter()
    data = codec.compress(x)
    written = time.perf_counter()
    if not torch.equal(codec.decompress(data), x):
        raise ValueError("codec must give the images back, gave others")
    read = time.perf_counter()
    with torch.no_grad():
        cost = codec(x[:500])
    trial.record(f"{arm}: MB/s in", x.numel() / 1e6 / (written - started))
    trial.record(f"{arm}: MB/s out", x.numel() / 1e6 / (read - written))
    trial.record(f"{arm}: bits per dimension of the codes", cost.rate.mean() / x[0].numel() / math.log(2))
    return 8 * len(data) / x.numel()


@comparison(
    paper="fsar",
    says="A finite-state prior shortens the files of a learned codec against an independent prior, at almost its speed.",
    where="Zhang et al., abstract: up to 6 % on CIFAR-10 and ImageNet",
    arms=("independent", "fsar"),
    metric="bits per dimension of held-out images, by the length of the file",
    better="lower",
    smallest={"steps": 1, "n_codes": 4},
    check=_discrete,
)
def shorter(
    trial: Trial, data: Images = "digits", steps: Count = 300, n_codes: Codes = 32, lr: Positive = 3e-3
) -> dict[str, float]:
    """Train one codec twice, by a prior that sees no neighbour and by one that sees the left and the top one.

    The arms share encoder and decoder at the start, batches and settings. There is one code for 4 x 4 pixels: with four,
    as in larger codecs, codes of 8 x 8 digits cost the independent arm more than they save, and the difference
    grows to a quarter of the file. The records have the megabytes a second of both. Towards the paper's setting:
    ``data="cifar10", n_codes=256`` and some 100,000 steps.
    """
    x, held_out, levels = _pixels(data, trial.seed)
    bits = {}
    for arm, autoregressive in (("independent", False), ("fsar", True)):
        codec = _codec(x, levels, n_codes, trial.seed, autoregressive=autoregressive)
        _train(codec, x, trial, steps, lr)
        bits[arm] = _measure(trial, arm, codec, held_out)
    return bits


class _StraightThrough(HardmaxQuantizer):
    """The quantiser of VQ-VAE: no gradient through the choice, codes drawn to vectors, vectors to codes a quarter."""

    def forward(self, z: Tensor, **options: Any) -> Quantized:
        """Return the nearest codes."""
        made = super().forward(z, **options)
        code = self.decode(made.indices)
        pull = (z.detach() - code).square() + 0.25 * (z - code.detach()).square()
        return made._replace(one_hot=made.one_hot.detach(), commitment=pull.flatten(1).sum(1) / 2)


@comparison(
    paper="fsar",
    says="STHQ trains discrete latents better than the straight-through estimator of VQ-VAE.",
    where="Zhang et al., on straight-through hardmax quantisation",
    arms=("vq-vae", "sthq"),
    metric="bits per dimension of held-out images, by the length of the file",
    better="lower",
    reason="in 300 steps codes that the rate does not move carry more, 0.305 bits per dimension beside 0.280, and save "
    "more than that of the pixels",
    smallest={"steps": 1, "n_codes": 4},
    check=_discrete,
)
def latents(
    trial: Trial, data: Images = "digits", steps: Count = 300, n_codes: Codes = 32, lr: Positive = 3e-3
) -> dict[str, float]:
    """Train a codec with an independent prior twice: codes by VQ-VAE's rule, and by straight-through hardmax.

    The arms share the start, batches and settings. In the first neither rate nor pixels move a vector but straight
    through its code; in the second the rate does.
    """
    x, held_out, levels = _pixels(data, trial.seed)
    bits = {}
    for arm in ("vq-vae", "sthq"):
        codec = _codec(x, levels, n_codes, trial.seed, autoregressive=False)
        if arm == "vq-vae":
            codec.quantizer.__class__ = _StraightThrough
        _train(codec, x, trial, steps, lr)
        bits[arm] = _measure(trial, arm, codec, held_out)
    return bits


@comparison(
    paper="fsar",
    says="A learned number of states shrinks the table.",
    where="Zhang et al., on a learnable number of states",
    arms=("all states", "learned states"),
    metric="entries of the table",
    better="lower",
    smallest={"steps": 1, "n_codes": 4},
    check=_discrete,
)
def fewer_states(
    trial: Trial, data: Images = "digits", steps: Count = 300, n_codes: Codes = 64, lr: Positive = 3e-3,
    states_lr: Positive = 6e-3,
) -> dict[str, float]:  # fmt: skip
    """Train a codec that keeps all codes, and one that learns which to keep; the records have the bits of both.

    The weights of codes have a rate of their own: at that of the networks none reaches zero in so few steps, and at four
    times as much only a handful of codes is left, which say nothing. In between the file is some 2 % longer.
    """
    x, held_out, levels = _pixels(data, trial.seed)
    entries = {}
    for arm, reduce in (("all states", False), ("learned states", True)):
        codec = _codec(x, levels, n_codes, trial.seed, reduce_states=reduce)
        _train(codec, x, trial, steps, lr, states_lr)
        trial.record(f"{arm}: bits per dimension", _measure(trial, arm, codec, held_out))
        entries[arm] = codec.freqs.numel()
        trial.record(f"{arm}: codes", codec.freqs.shape[-1])
    return entries


def _large(data: Any, n_codes: int, **_: Any) -> None:
    rows = sum((x.shape[1] // 4) * (x.shape[2] // 4) for x in data.pictures)
    if rows < 4 * n_codes:
        raise ValueError(
            f"pictures must have 4 patches of 4x4 for each of {n_codes} codes, those have {rows}"
        )


@comparison(
    paper="fsar",
    says="Codes of image patches cost a fraction of the bits when their neighbours choose the table.",
    where="Zhang et al., on finite-state autoregressive coding",
    arms=("independent", "fsar"),
    metric="bits a code of held-out pictures, by the length of the file",
    better="lower",
    smallest={"n_codes": 8},
    check=_large,
)
def codes(
    trial: Trial, data: Pictures = "photo-tiles", n_codes: Codes = 32, smoothing: Positive = 0.05
) -> dict[str, float]:
    """Code the nearest of k-means' centres of grey 4x4 patches, by tables of the counts in other pictures.

    No network is in it. The records have the speed of both in millions of codes a second.
    """
    pictures = [x.mean(0) for x in load_pictures(data).pictures]
    train, test = split(len(pictures), (0.75, 0.25), trial.seed)
    patches = [_patches(x) for x in pictures]
    seen = np.concatenate([patches[row].reshape(-1, 16) for row in train])
    means = MiniBatchKMeans(n_codes, n_init=1, batch_size=1024, random_state=trial.seed).fit(seen)
    every = [means.predict(p.reshape(-1, 16)).reshape(1, *p.shape[:2]) for p in patches]
    groups = {name: list(_by_size([every[row] for row in rows]).values()) for name, rows in (("train", train), ("test", test))}  # fmt: skip
    bits = {}
    for arm, offsets in (("independent", ()), ("fsar", LEFT_TOP)):
        counts = np.sum([_counts(batch, n_codes, offsets) for batch, _ in groups["train"]], 0)
        coder = FiniteStateCoder.from_probs(counts + smoothing, offsets)
        seconds, length, n = 0.0, 0, 0
        for batch, _ in groups["test"]:
            symbols = torch.from_numpy(batch).long()
            started = time.perf_counter()
            packed = coder.compress(symbols)
            seconds += time.perf_counter() - started
            if not torch.equal(coder.decompress(packed), symbols):
                raise ValueError("coder must give the codes back, gave others")
            length, n = length + len(packed), n + batch.size
        bits[arm] = 8 * length / n
        trial.record(f"{arm}: million codes a second", n / seconds / 1e6)
    return bits


def _patches(x: ndarray) -> ndarray:
    """Return grey 4x4 patches as (rows, columns, 16); what is left at the edges goes."""
    down, right = (side // 4 for side in x.shape)
    return x[: 4 * down, : 4 * right].reshape(down, 4, right, 4).swapaxes(1, 2).reshape(down, right, 16)


def _counts(batch: ndarray, n_codes: int, offsets: Any) -> ndarray:
    """Return how often each code stood in each row."""
    symbols = torch.from_numpy(batch).long()
    rows = (n_codes + 1) ** len(offsets)
    blank = FiniteStateCoder.from_probs(np.ones((1, rows, n_codes)), offsets)
    flat = (blank.contexts(symbols) * n_codes + symbols).flatten()
    return torch.bincount(flat, minlength=rows * n_codes).double().reshape(1, rows, n_codes).numpy()


def _by_size(pictures: list[ndarray]) -> dict[tuple[int, ...], tuple[ndarray, list[int]]]:
    """Return pictures of one size together, and which they were."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, x in enumerate(pictures):
        places.setdefault(x.shape, []).append(place)
    return {shape: (np.stack([pictures[p] for p in where]), where) for shape, where in places.items()}


@entry("lossless-images", "FSAR", paper="fsar")
def lossless(train: list[ndarray], seed: int) -> Codec:
    """Return the codec, trained on crops for at most a minute; of colours the differences to the second one are coded."""
    channels = len(train[0])
    rng = np.random.default_rng(seed)
    side = 32
    shown = [_mixed(np.pad(x, [(0, 0), *((0, max(0, side - s)) for s in x.shape[1:])], "edge")) for x in train]  # fmt: skip
    with nets.seeded(seed):
        codec = FSARCodec(
            channels, channels=1, n_codes=128, dim=16, hidden=64, downsample=2, offsets=LEFT_TOP
        )
    generator = torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(codec.parameters(), lr=2e-3)
    steps = 600
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        crops = []
        for row in rng.integers(len(shown), size=8):
            x = shown[row]
            top, left = (rng.integers(s - side + 1) for s in x.shape[1:])
            crops.append(x[:, top : top + side, left : left + side])
        loss = codec(torch.from_numpy(np.stack(crops)).long(), generator=generator).loss / side**2
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        opt.step()
        falling.step()
    codec.eval().freeze()

    return _grouped(
        lambda batch: codec.compress(torch.from_numpy(batch)), lambda data: codec.decompress(data).numpy()
    )


@entry("lossless-images", "FSAR's coder on residuals", paper="fsar")
def tables(train: list[ndarray], seed: int) -> Codec:
    """Return finite-state tables of how large the errors of the median predictor of JPEG-LS are, and no network.

    An error is one of 16 sizes, coded by a table that its left and top neighbour and the colour before it choose, and
    the bits within that size, which are written as they are.
    """
    side = min(64, *(size for x in train for size in x.shape[1:]))
    tiles = [
        x[:, top : top + side, left : left + side]
        for x in train
        for top in range(0, x.shape[1] - side + 1, side)
        for left in range(0, x.shape[2] - side + 1, side)
    ]
    sizes, _ = _sized(_errors(np.stack([_mixed(x) for x in tiles])))
    offsets = (*LEFT_TOP, (-1, 0, 0)) if len(train[0]) > 1 else LEFT_TOP
    coder = FiniteStateCoder.from_counts(torch.from_numpy(sizes), len(STARTS), offsets, smoothing=0.05)

    def pack(batch: ndarray) -> bytes:
        sizes, rest = _sized(_errors(batch))
        packed = coder.compress(torch.from_numpy(sizes))
        bits = np.unpackbits(rest[..., None].astype(np.uint8), axis=-1)
        return struct.pack("<Q", len(packed)) + packed + np.packbits(bits[_inside(sizes)]).tobytes()

    def unpack(data: bytes) -> ndarray:
        (length,) = struct.unpack_from("<Q", data)
        sizes = coder.decompress(data[8 : 8 + length]).numpy()
        inside = _inside(sizes)
        bits = np.zeros(inside.shape, np.uint8)
        bits[inside] = np.unpackbits(
            np.frombuffer(data, np.uint8, offset=8 + length), count=int(inside.sum())
        )
        return _from_errors(STARTS[sizes] + np.packbits(bits, axis=-1)[..., 0])

    return _grouped(pack, unpack)


def _sized(errors: ndarray) -> tuple[ndarray, ndarray]:
    """Return the size of each error, and where it lies within."""
    sizes = np.searchsorted(STARTS, errors, side="right") - 1
    return sizes, errors - STARTS[sizes]


def _inside(sizes: ndarray) -> ndarray:
    """Return which of the eight bits of what is left of an error are written."""
    return np.arange(8) >= 8 - np.log2(WIDTHS).astype(int)[sizes][..., None]


def _errors(x: ndarray) -> ndarray:
    """Return the errors of the median predictor, (n, c, h, w), modulo 256: 0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ..."""
    padded = np.pad(x.astype(np.int32), ((0, 0), (0, 0), (1, 0), (1, 0)), "edge")
    left, top, corner = padded[..., 1:, :-1], padded[..., :-1, 1:], padded[..., :-1, :-1]
    left, top = _ends(left.copy(), top.copy())
    found = (x - np.median([left, top, left + top - corner], 0).astype(np.int32) + 128) % 256 - 128
    return np.where(found < 0, -2 * found - 1, 2 * found)


def _ends(left: ndarray, top: ndarray) -> tuple[ndarray, ndarray]:
    """At the edges, where the decoder knows one neighbour or none, let both be that one or 128."""
    left[..., 1:, 0] = top[..., 1:, 0]
    top[..., 0, 1:] = left[..., 0, 1:]
    left[..., 0, 0] = top[..., 0, 0] = 128
    return left, top


def _from_errors(errors: ndarray) -> ndarray:
    """Return pictures from the errors, diagonal by diagonal: each depends on those before it alone."""
    found = np.where(errors % 2, -(errors + 1) // 2, errors // 2)
    x = np.full((*errors.shape[:2], errors.shape[2] + 1, errors.shape[3] + 1), 128, np.int32)
    for d in range(sum(errors.shape[2:]) - 1):
        i = np.arange(max(0, d - errors.shape[3] + 1), min(d, errors.shape[2] - 1) + 1)
        j = d - i
        left, top, corner = x[..., i + 1, j], x[..., i, j + 1], x[..., i, j]
        left, top = np.where(j == 0, top, left), np.where(i == 0, left, top)
        corner = np.where((i == 0) | (j == 0), left, corner)
        guess = np.median([left, top, left + top - corner], 0).astype(np.int32)
        x[..., i + 1, j + 1] = (guess + found[..., i, j]) % 256
    return x[..., 1:, 1:].astype(np.uint8)


def _grouped(pack: Callable[[ndarray], bytes], unpack: Callable[[bytes], ndarray]) -> Codec:
    """Return a codec of many pictures from one of pictures of one size, with colours mixed."""

    def compress(pictures: list[ndarray]) -> bytes:
        groups = _by_size([_mixed(x) for x in pictures])
        files = [pack(batch) for batch, _ in groups.values()]
        order = [place for _, where in groups.values() for place in where]
        head = struct.pack(f"<II{len(order)}I", len(files), len(order), *order)
        return head + b"".join(struct.pack("<Q", len(file)) + file for file in files)

    def decompress(data: bytes) -> list[ndarray]:
        n_files, n = struct.unpack_from("<II", data)
        order, at, found = struct.unpack_from(f"<{n}I", data, 8), 8 + 4 * n, []
        for _ in range(n_files):
            (length,) = struct.unpack_from("<Q", data, at)
            found += list(unpack(data[at + 8 : at + 8 + length]))
            at += 8 + length
        pictures: list[Any] = [None] * n
        for place, x in zip(order, found, strict=True):
            pictures[place] = _mixed(x, back=True)
        return pictures

    return compress, decompress


def _mixed(x: ndarray, *, back: bool = False) -> ndarray:
    """Return colours as differences to green, modulo 256 about 128, and back."""
    if len(x) != 3:
        return x
    green = x[1] - np.uint8(128)
    red, blue = (x[0] + green, x[2] + green) if back else (x[0] - green, x[2] - green)
    return np.stack([red, x[1], blue])
