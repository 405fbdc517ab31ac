"""The small lossy codec: exact symbols, real bytes, straight-through gradients, files that later versions read."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posterity.coding import TransformCodec

FIXTURES = Path(__file__).parent / "fixtures"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 80, shape: tuple[int, ...] = (1, 5, 4), seed: int = 0) -> Tensor:
    mix = torch.randn(20, 20, generator=rng(7)) / 5
    return (torch.randn(n, 20, generator=rng(seed)) @ mix).reshape(n, *shape)


@pytest.fixture(scope="module")
def codec() -> TransformCodec:
    return TransformCodec((1, 5, 4), 4, step=0.4, hidden=16).fit(images(), 40, generator=rng())


def test_components_are_principal_and_symbols_are_rounded(codec):
    x = images()
    flat = x.flatten(1)
    u, s, v = torch.linalg.svd(flat - flat.mean(0))
    torch.testing.assert_close((codec.components.mT @ v[:4].mT).abs(), torch.eye(4), atol=1e-4, rtol=0)
    want = torch.round((flat - flat.mean(0)) @ codec.components / 0.4)
    assert torch.equal(codec.symbols(x), want.long())


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 40), scale=st.sampled_from([0.0, 1.0, 3.0, 1e6]), seed=st.integers(0, 99))
def test_symbols_come_back(codec, n, scale, seed):
    x = images(n, seed=seed) * scale
    data = codec.compress(x)
    assert torch.equal(codec.read_symbols(data), codec.symbols(x))
    torch.testing.assert_close(codec.decompress(data), codec.reconstruct(x).detach())


def test_bytes_are_the_tables_entropy(codec):
    x = images(4000, seed=3)
    symbols = codec.symbols(x) - codec.low
    bits = sum((16 - torch.log2(codec.freqs[k, symbols[:, k]].double())).sum() for k in range(4))
    assert len(codec.compress(x)) * 8 < 1.01 * float(bits) + 8 * 60


def test_tables_are_the_frequencies_of_training_with_half_a_count_more(codec):
    symbols = codec.symbols(images()) - codec.low
    for k in range(4):
        size = int(symbols[:, k].max()) + 3  # two more on either side
        counts = torch.bincount(symbols[:, k], minlength=size) + 0.5
        want = 1 + counts / counts.sum() * (2**16 - size)
        assert symbols[:, k].min() == 2
        assert (codec.freqs[k, :size] - want).abs().max() <= 1
        assert (codec.freqs[k, size:] == 0).all()


def test_reconstruct_is_straight_through(codec):
    x = images(6, seed=5).requires_grad_()
    codec.reconstruct(x).square().sum().backward()
    q = (codec.symbols(x.detach()).float() * codec.step).requires_grad_()
    (codec.center + codec.synthesis(q)).square().sum().backward()
    torch.testing.assert_close(x.grad, (q.grad @ codec.components.mT).reshape(x.shape))


def test_training_lowers_the_error():
    x = images(300)
    few, many = (TransformCodec((1, 5, 4), 4, step=0.3).fit(x, n, generator=rng()) for n in (0, 300))
    error = [(c.reconstruct(x) - x).square().mean().item() for c in (few, many)]
    linear = codec_of_components(many, x)
    assert error[1] < 0.5 * error[0] and error[1] < 1.1 * linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_codec_learns_as_well(dtype):
    x = images(300).to(dtype)
    low, plain = (TransformCodec((1, 5, 4), 4, step=0.3).to(d).fit(x.to(d), 200, generator=rng()) for d in (dtype, torch.float32))  # fmt: skip
    assert {value.dtype for value in low.synthesis.state_dict().values()} == {dtype}
    error = [
        (c.reconstruct(x.to(c.center.dtype)).double() - x.double()).square().mean().item()
        for c in (low, plain)
    ]
    assert error[0] < 1.05 * error[1]
    torch.testing.assert_close(low.decompress(low.compress(x)), low.reconstruct(x))


def codec_of_components(codec: TransformCodec, x: Tensor) -> float:
    plain = codec.center + codec.symbols(x).float() * codec.step @ codec.components.mT
    return (plain.reshape(x.shape) - x).square().mean().item()


def test_same_bytes_again_in_other_batches_and_threads(codec):
    x, before = images(30, seed=8), torch.get_num_threads()
    data = codec.compress(x)
    try:
        torch.set_num_threads(1 + before % 2)
        again = copy.deepcopy(codec)
        assert again.compress(x) == data
        other = TransformCodec((1, 5, 4), 4, step=0.4, hidden=16)
        other.load_state_dict(codec.state_dict())
        assert other.compress(x.to(memory_format=torch.channels_last)) == data
        torch.testing.assert_close(other.decompress(data), codec.decompress(data))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("version", [1, 2])
def test_stored_file_is_read(version):
    codec = TransformCodec((1, 5, 4), 3, step=0.5, hidden=4)
    stored = torch.load(FIXTURES / "transform-v1.pt", weights_only=True)
    data = (FIXTURES / f"transform-v{version}.bin").read_bytes()
    codec.load_state_dict(stored["state"])
    torch.testing.assert_close(codec.decompress(data), stored["images"])
    assert torch.equal(codec.read_symbols(data), stored["symbols"])


def test_damaged_and_foreign_data_are_refused(codec):
    data = codec.compress(images(3))
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        for bad in (bytes(broken), data[:place]):
            with pytest.raises(ValueError, match="data must"):
                codec.decompress(bad)
    other = TransformCodec((1, 5, 4), 4, step=0.4, hidden=16).fit(images(), 41, generator=rng())
    with pytest.raises(ValueError, match="of another"):
        other.decompress(data)


def test_bytes_of_a_codec_that_differs_in_its_center_alone_are_refused(codec):
    other = copy.deepcopy(codec)
    other.center += 1
    with pytest.raises(ValueError, match="of another"):
        other.decompress(codec.compress(images(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_images(codec, dtype):
    x = images(20, seed=4).to(dtype)
    got = codec.reconstruct(x)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.float(), codec.reconstruct(x.float()), atol=4 * torch.finfo(dtype).eps, rtol=0
    )
    assert codec.compress(x) == codec.compress(x.float())


def test_bad_input(codec, as_a_user: None):
    x = images(3)
    for match, look in [
        ("fitted first", lambda: TransformCodec((3, 3)).compress(torch.zeros(1, 3, 3))),
        ("shape must have at least one size", lambda: TransformCodec((), 1)),
        ("at most the 4 pixels", lambda: TransformCodec((2, 2), 5)),
        ("step", lambda: TransformCodec((2, 2), 2, step=0)),
        ("hidden", lambda: TransformCodec((2, 2), 2, hidden=0)),
        ("shape", lambda: TransformCodec((0, 2), 2)),
        ("x must have shape", lambda: codec.compress(x[:, :, :4])),
        ("floating-point", lambda: codec.compress(torch.zeros(1, 1, 5, 4, dtype=torch.uint8))),
        ("finite", lambda: codec.compress(torch.full((1, 1, 5, 4), torch.nan))),
        ("at least 2 images", lambda: TransformCodec((1, 5, 4)).fit(x[:1])),
        ("finite", lambda: TransformCodec((1, 5, 4)).fit(x / 0)),
        ("n_steps", lambda: TransformCodec((1, 5, 4)).fit(x, -1)),
        ("lr", lambda: TransformCodec((1, 5, 4)).fit(x, lr=0)),
        ("step must be larger", lambda: TransformCodec((1, 5, 4), step=1e-7).fit(x)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            look()
