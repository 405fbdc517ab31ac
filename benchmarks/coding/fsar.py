"""Coding by table against a row of probabilities a symbol, a loop of calls, and one static model; sizes beside files.

Rows of probabilities are made as an autoregressive model gives them, one a symbol; the loop decodes symbol by symbol,
since each needs its context. The last part prints bytes and megabytes a second of one set of codes.
"""

import io
import time
import zlib

import numpy as np
import torch

from benchmarks.timing import race
from posterity._checks import needs
from posterity.coding import FiniteStateCoder

LEFT_TOP = [(0, 0, -1), (0, -1, 0)]


def field(n: int, side: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return smooth random fields in k levels: a walk along the rows, one down the columns, and noise."""
    rng = np.random.default_rng(seed)
    down, along = rng.normal(size=(2, n, 1, side, side))
    x = (
        k / 2
        + down[..., :1].cumsum(-2)
        + along[:, :, :1].cumsum(-1)
        + 0.5 * rng.normal(size=(n, 1, side, side))
    )
    x = x + rng.uniform(-k / 3, k / 3, size=(n, 1, 1, 1))
    return torch.from_numpy(x.round().clip(0, k - 1).astype(np.int64))


def main() -> None:
    stream = needs("constriction", "coding").stream
    family = stream.model.Categorical(perfect=False)
    k, x = 64, field(16_000, 8, 64)
    coder = FiniteStateCoder.from_counts(x, k, LEFT_TOP, smoothing=0.05)
    data = coder.compress(x)
    assert torch.equal(coder.decompress(data), x)
    freqs = coder.freqs[0].numpy()

    def by_rows() -> object:
        ans = stream.stack.AnsCoder()
        rows = coder.contexts(x).numpy().ravel()
        symbols = x.numpy().ravel().astype(np.int32)
        for start in reversed(range(0, len(rows), 65_536)):  # so that probabilities fit in memory
            part = slice(start, start + 65_536)
            probs = freqs[rows[part]].astype(np.float32) / 4096
            ans.encode_reverse(symbols[part], family, probs)
        return ans.get_compressed()

    few = x[:160]
    table = freqs.astype(np.float32) / 4096
    rows = coder.contexts(few).numpy()
    ans = stream.stack.AnsCoder()
    ans.encode_reverse(few.numpy().ravel().astype(np.int32), family, table[rows.ravel()])
    words = ans.get_compressed()

    def by_loop() -> np.ndarray:
        """Decode the first 160 fields, each symbol after its context is known."""
        ans, out = stream.stack.AnsCoder(words), np.zeros((160, 9, 9), np.int64)
        for n in range(160):
            for i in range(1, 9):
                for j in range(1, 9):
                    row = out[n, i, j - 1] * (k + 1) + out[n, i - 1, j]
                    out[n, i, j] = ans.decode(family, table[row][None])[0] + 1
        return out[:, 1:, 1:] - 1

    assert (by_loop() == few[:, 0].numpy()).all()
    static = FiniteStateCoder.from_counts(x, k, [])
    packed = static.compress(x)
    model = stream.model.Categorical(static.freqs[0, 0].numpy().astype(np.float32) / 4096, perfect=False)
    flat = x.numpy().ravel().astype(np.int32)
    race("encode 1 M symbols, against a row of probabilities a symbol", lambda: coder.compress(x), by_rows, target=5, rounds=5)  # fmt: skip

    def decode_share() -> None:  # 100 times the loop's work
        coder.decompress(data)

    def loop_scaled() -> None:
        by_loop()

    start = time.perf_counter()
    loop_scaled()
    loop = (time.perf_counter() - start) / few.numel()
    start = time.perf_counter()
    decode_share()
    ours = (time.perf_counter() - start) / x.numel()
    print(f"decode, against a loop of calls, a symbol: {1e6 * loop:.2f} us and {1e6 * ours:.3f} us, ratio {loop / ours:.1f}")  # fmt: skip

    def one_model() -> object:
        ans = stream.stack.AnsCoder()
        ans.encode_reverse(flat, model)
        return ans.get_compressed()

    race("encode 1 M symbols, against one static model (at most 10 times slower)", lambda: coder.compress(x), one_model, target=0.1, rounds=5)  # fmt: skip
    race("decode 1 M symbols, against the same coder without neighbours", lambda: coder.decompress(data), lambda: static.decompress(packed), target=0.1, rounds=5)  # fmt: skip

    pillow, zstandard = needs("PIL.Image", "images"), needs("zstandard", "coding")
    plain = x.to(torch.uint8).numpy()
    sheet = plain.reshape(100, 160, 8, 8).swapaxes(1, 2).reshape(800, 1280)  # one picture of all fields

    def picture(kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        pillow.fromarray(sheet).save(file, kind, **options)
        return file.getvalue()

    for name, work in {
        "finite state": lambda: coder.compress(x), "static": one_model, "zlib 9": lambda: zlib.compress(plain.tobytes(), 9),
        "zstd 19": lambda: zstandard.ZstdCompressor(level=19).compress(plain.tobytes()),
        "PNG": lambda: picture("PNG", optimize=True), "WebP, lossless": lambda: picture("WEBP", lossless=True),
    }.items():  # fmt: skip
        start = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - start
        size = len(made) if isinstance(made, bytes) else made.nbytes
        print(f"{name}: {size} bytes, {8 * size / x.numel():.3f} bits a symbol, {x.numel() / 1e6 / seconds:.2f} Msymbol/s")  # fmt: skip


if __name__ == "__main__":
    main()
