"""The coder against loops and entropies, and its files against every damage."""

import itertools
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posterity._files import seal
from posterity.coding import FiniteStateCoder, FiniteStatePrior, HardmaxQuantizer

FIXTURE = Path(__file__).parent / "fixtures" / "finite-state-v1.bin"
LEFT, TOP, CHANNEL = (0, 0, -1), (0, -1, 0), (-1, 0, 0)
OFFSETS = {
    "none": [], "left": [LEFT], "left and top": [LEFT, TOP], "all": [LEFT, TOP, CHANNEL], "far": [(0, -1, -2), (-2, 0, 0)],
    "one axis": [(0, -1)], "one axis, far": [(0, -2), (-1, -1)], "channels only": [(-1,)],
}  # fmt: skip


def draw(shape, k, seed=0):
    return torch.randint(k, shape, generator=torch.Generator().manual_seed(seed))


def shape_for(offsets, n, channels, sides):
    n_axes = len(offsets[0]) - 1 if offsets else len(sides)
    return (n, channels, *sides[:n_axes])


def random_coder(channels, k, offsets, seed=0, precision=12):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(k, 0.3), (channels, (k + 1) ** len(offsets)))
    return FiniteStateCoder.from_probs(probs, offsets, precision=precision)


def rows_by_loops(symbols, k, offsets):
    rows = torch.zeros_like(symbols)
    for place in itertools.product(*map(range, symbols.shape)):
        for offset in offsets:
            seen = [at + step for at, step in zip(place[1:], offset, strict=True)]
            state = 0 if min(seen) < 0 else int(symbols[place[0], *seen]) + 1
            rows[place] = rows[place] * (k + 1) + state
    return rows


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OFFSETS)
def test_contexts_and_lengths_are_those_of_loops_and_what_comes_back_is_what_went_in(name, channels):
    offsets, k = OFFSETS[name], 3
    coder = random_coder(channels, k, offsets)
    x = draw(shape_for(offsets, 4, channels, (5, 4)), k)
    rows = rows_by_loops(x, k, offsets)
    assert torch.equal(coder.contexts(x), rows)
    for sample, bits in zip(range(len(x)), coder.code_length(x), strict=True):
        product = 0.0
        for place in itertools.product(*map(range, x.shape[1:])):
            at = (sample, *place)
            product -= math.log2(int(coder.freqs[place[0], rows[at], x[at]]) / 4096)
        assert bits == pytest.approx(product, rel=1e-12)
    data = coder.compress(x)
    assert torch.equal(coder.decompress(data), x)
    total = float(coder.code_length(x).sum())
    assert total - 64 <= 8 * len(data) <= 1.001 * total + 512


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(OFFSETS)), n=st.integers(0, 5), channels=st.integers(1, 3), k=st.integers(1, 6),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)), constant=st.booleans(), precision=st.integers(3, 24),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_symbols_come_back(name, n, channels, k, sides, constant, precision, dtype, seed):
    offsets = OFFSETS[name]
    coder = random_coder(channels, k, offsets, seed, precision)
    shape = shape_for(offsets, n, channels, sides)
    x = torch.full(shape, k - 1) if constant else draw(shape, k, seed)
    back = coder.decompress(coder.compress(x.to(dtype)))
    assert back.dtype == torch.int64
    assert torch.equal(back, x)


def test_symbols_that_were_never_seen_and_large_grids_come_back():
    coder = FiniteStateCoder.from_counts(torch.zeros(2, 1, 8, 8, dtype=torch.long), 64, [LEFT, TOP])
    for shape in ((1, 1, 97, 131), (300, 1, 8, 8)):  # few symbols a row, and many
        x = draw(shape, 64)
        data = coder.compress(x)
        assert torch.equal(coder.decompress(data), x)
        assert 8 * len(data) <= 1.001 * float(coder.code_length(x).sum()) + 512
    assert coder.compress(x) == coder.compress(x.flip(3).flip(3))  # not contiguous


@pytest.mark.parametrize("k", [1, 2, 64])
def test_long_runs_of_what_costs_least_come_back(k):
    coder = FiniteStateCoder.from_probs(np.eye(k)[:1].repeat(k + 1, 0)[None], [TOP])
    x = torch.zeros(3, 1, 4, 10_000, dtype=torch.long)
    x[2, 0, 1, 7] = k - 1
    assert torch.equal(coder.decompress(coder.compress(x)), x)
    assert torch.equal(coder.decompress(coder.compress(x[:2])), x[:2])


def test_both_ways_of_handing_over_probabilities_write_the_same(monkeypatch):
    coder, x = random_coder(1, 5, [LEFT]), draw((9, 1, 7, 7), 5)
    files = []
    for few in (0, 1000):
        monkeypatch.setattr("posterity.coding._stacks.FEW", few)
        files.append(coder.compress(x))
    assert files[0] == files[1]
    assert torch.equal(coder.decompress(files[0]), x)


def test_counts_make_the_table():
    x = torch.tensor([[[[0, 1, 1, 0, 1]]]])
    coder = FiniteStateCoder.from_counts(x, 2, [LEFT], smoothing=0.0)
    # outside: one 0; after 0: two 1; after 1: one 1 and one 0
    assert coder.freqs.tolist() == [[[4095, 1], [1, 4095], [2048, 2048]]]


def markov(n, length, table, seed):
    """A chain whose first symbol is drawn uniformly."""
    rng, k = np.random.default_rng(seed), len(table)
    x = np.empty((n, 1, length), np.int64)
    x[..., 0] = rng.integers(k, size=(n, 1))
    for t in range(1, length):
        u = rng.random((n, 1, 1))
        x[..., t] = (u > table[x[..., t - 1]].cumsum(-1)).sum(-1)
    return torch.from_numpy(x)


def test_on_a_markov_chain_it_reaches_the_entropy_rate_and_without_neighbours_the_marginal_entropy():
    table = np.array([[0.9, 0.08, 0.02], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8]])
    values, vectors = np.linalg.eig(table.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    rate = -(stationary[:, None] * table * np.log2(table)).sum()
    marginal = -(stationary * np.log2(stationary)).sum()
    x = markov(400, 500, table, 0)
    probs = np.concatenate([np.full((1, 3), 1 / 3), table])[None]
    for coder, entropy in (
        (FiniteStateCoder.from_probs(probs, [(0, -1)]), rate),
        (FiniteStateCoder.from_probs(stationary[None, None], []), marginal),
    ):
        assert 8 * len(coder.compress(x)) / x.numel() == pytest.approx(entropy, rel=0.01)


def test_every_flipped_byte_cut_and_foreign_file_is_refused(as_a_user):
    coder = random_coder(2, 3, [LEFT, TOP])
    data = coder.compress(draw((2, 2, 4, 4), 3))
    for place in range(len(data)):
        for mask in (1, 128):
            damaged = bytearray(data)
            damaged[place] ^= mask
            with pytest.raises(ValueError, match="data"):
                coder.decompress(bytes(damaged))
        with pytest.raises(ValueError, match="data"):
            coder.decompress(data[:place])
    for foreign in (b"", b"PK\x03\x04" * 9, data + b"\0", zlib.compress(data), None, "text"):
        with pytest.raises(ValueError, match="data"):
            coder.decompress(foreign)


def test_a_file_with_a_right_seal_that_lies_is_refused(as_a_user):
    coder = random_coder(1, 3, [LEFT])
    payload = coder.compress(draw((2, 1, 4, 4), 3))[18:]
    head = payload[:14]
    sizes = lambda *shape: b"".join(bytes([s % 128 | 128, s // 128 % 128 | 128, s // 2**14]) for s in shape)  # noqa: E731
    for lie in (
        b"", head, head + sizes(100_000, 1, 900, 900) + payload[18:], head + b"\xff" * 20, head + payload[14:18],
        head + sizes(0, 1, 2_000_000, 2_000_000), head + b"\2\1\4\4" + b"\0" * 8, head + b"\2\2\4\4" + payload[18:],
        head + b"\2\1\4\3" + payload[18:], payload + b"x", payload + b"\1\0\0\0",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="data"):
            coder.decompress(seal(b"PFSA", lie))


def test_files_of_another_coder_are_refused(as_a_user):
    x = draw((2, 1, 4, 4), 3)
    data = random_coder(1, 3, [LEFT]).compress(x)
    for other, message in (
        (random_coder(1, 4, [LEFT]), "K = 4, got 3"),
        (random_coder(1, 3, [LEFT], precision=10), "precision = 10, got 12"),
        (random_coder(1, 3, [LEFT], seed=1), "coder's table"),
        (random_coder(1, 3, [TOP]), "coder's table"),
        (random_coder(2, 3, [LEFT]), "coder's table"),
    ):
        with pytest.raises(ValueError, match=message):
            other.decompress(data)


def test_a_file_of_the_first_version_is_read():
    x = (torch.arange(2 * 2 * 6 * 5).reshape(2, 2, 6, 5) ** 2) % 4
    coder = FiniteStateCoder.from_counts(x, 4, [LEFT, TOP, CHANNEL])
    assert torch.equal(coder.decompress(FIXTURE.read_bytes()), x)
    assert coder.compress(x) == FIXTURE.read_bytes()


def test_the_state_makes_the_coder_and_pickles():
    coder, x = random_coder(2, 3, [LEFT, CHANNEL]), draw((3, 2, 4, 5), 3)
    data = coder.compress(x)
    twin = FiniteStateCoder(**coder.state_dict())
    assert twin.compress(x) == data
    import copy
    import pickle

    assert torch.equal(copy.deepcopy(coder).decompress(data), x)
    assert torch.equal(pickle.loads(pickle.dumps(coder)).decompress(data), x)


GOOD = np.full((1, 3, 2), 2048)
X = torch.zeros(1, 1, 2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FiniteStateCoder(GOOD, [LEFT]).compress(X + 2), r"symbols must be in 0\.\.1, got 2"),
        (lambda: FiniteStateCoder(GOOD, [LEFT]).compress(X - 1), r"symbols must be in 0\.\.1, got -1"),
        (lambda: FiniteStateCoder(GOOD, [LEFT]).compress(X.float()), "symbols must be an integer tensor, got torch.float32"),
        (lambda: FiniteStateCoder(GOOD, [LEFT]).compress(X > 0), "symbols must be an integer tensor, got torch.bool"),
        (lambda: FiniteStateCoder(GOOD, [LEFT]).contexts(X.expand(1, 2, 2, 2)), r"symbols must have shape \(n, 1, \*spatial\)"),
        (lambda: FiniteStateCoder(GOOD, [LEFT]).code_length(X[0]), "with 2 spatial axes"),
        (lambda: FiniteStateCoder(GOOD, [(0, 0, 1)]), r"causal.*got \(0, 0, 1\)"),
        (lambda: FiniteStateCoder(GOOD, [(0, 1, -1)]), "causal"),
        (lambda: FiniteStateCoder(GOOD, [(0, 0, 0)]), "causal"),
        (lambda: FiniteStateCoder(GOOD, [3]), "offsets must be sequences of integers"),
        (lambda: FiniteStateCoder(np.full((1, 9, 2), 2048), [LEFT, (0, -1)]), "offsets must have 3 entries"),
        (lambda: FiniteStateCoder(np.full((1, 9, 2), 2048), [LEFT, LEFT]), "offsets must be different"),
        (lambda: FiniteStateCoder(np.array([[[0, 4096]] * 3]), [LEFT]), "freqs must be at least 1, got 0"),
        (lambda: FiniteStateCoder(GOOD + 1, [LEFT]), "freqs must have rows that sum to 4096, got 4098"),
        (lambda: FiniteStateCoder(GOOD / 1.0, [LEFT]), "freqs must be an array of integers, got float64"),
        (lambda: FiniteStateCoder(GOOD[:, :2], [LEFT]), r"freqs must have shape \(C, \(K \+ 1\)\^M, K\)"),
        (lambda: FiniteStateCoder.from_probs(np.ones((1, 1, 9)), [], precision=3), "precision must give each of 9 symbols"),
        (lambda: FiniteStateCoder.from_probs(np.ones((1, 1, 2)), [], precision=25), r"precision must be in 1\.\.24"),
        (lambda: FiniteStateCoder.from_probs(np.full((1, 1, 2), np.nan), []), "probs must be finite"),
        (lambda: FiniteStateCoder.from_counts(X, 300, [LEFT, TOP, CHANNEL]), "K = 300.*reduce_states.*M = 3"),
        (lambda: FiniteStateCoder.from_counts(X, 2, [LEFT], smoothing=-1.0), "smoothing must be at least 0"),
        (lambda: HardmaxQuantizer(2, 3)(torch.full((1, 1, 3), math.nan)), "z must be finite, got NaN"),
        (lambda: HardmaxQuantizer(2, 3)(torch.zeros(1, 2, 3)), r"z must have shape \(n, 1, \*spatial, 3\)"),
        (lambda: HardmaxQuantizer(2, 3).decode(X + 2), r"indices must be in 0\.\.1"),
        (lambda: HardmaxQuantizer(2, 3).decode(X.float()), "indices must be integers"),
        (lambda: HardmaxQuantizer(2, 3).init_from(torch.zeros(0, 1, 3)), "z must have a vector"),
        (lambda: HardmaxQuantizer(2, 3, temperature=0.0), "temperature must be greater than 0"),
        (lambda: HardmaxQuantizer(2, 3, surrogate="hard"), "surrogate must be one of"),
        (lambda: FiniteStatePrior(2, 3, offsets=[(0, 1, 0)]), "offsets must be causal"),
        (lambda: FiniteStatePrior(300, 3, offsets=[LEFT, TOP, CHANNEL]), "reduce_states"),
        (lambda: FiniteStatePrior(2, 3, entmax_alpha=1.0), r"entmax_alpha must be in \(1, 2\]"),
        (lambda: FiniteStatePrior(2, 3)(torch.zeros(1, 1, 2, 2, 4), torch.zeros(1, 2, 3)), "one_hot must have shape"),
        (lambda: FiniteStatePrior(2, 3).table(torch.zeros(1, 3, 3)), r"codebook must have shape \(1, 2, 3\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
