"""Quantiser and prior against formulas, brute force and each other; the codec gives back every image."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import logistic
from torch import nn

from posterity.coding import FiniteStateCoder, FiniteStatePrior, FSARCodec, HardmaxQuantizer
from posterity.coding.finite_state_prior import _Entmax
from posterity.coding.frozen_codec import FINEST, _logistic_grid, _logistic_rows
from posterity.testing import check_layer

FIXTURE = Path(__file__).parent / "fixtures" / "fsar-v1.bin"
LEFT, TOP, CHANNEL = (0, 0, -1), (0, -1, 0), (-1, 0, 0)


def quantizer(surrogate="softmax", **options):
    torch.manual_seed(0)
    return HardmaxQuantizer(5, 3, 2, surrogate=surrogate, **options).double()


def vectors(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 2, 3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()


def test_the_code_is_the_nearest_and_its_gradient_that_of_the_vector():
    layer, z = quantizer(), vectors()
    made = layer(z)
    for n, c, i, j in itertools.product(range(4), range(2), range(3), range(2)):
        distance = (layer.codebook[c] - z[n, c, i, j]).square().sum(1)
        assert made.indices[n, c, i, j] == distance.argmin()
        assert torch.equal(made.output[n, c, i, j], layer.codebook[c, distance.argmin()])
    assert torch.equal(made.one_hot, torch.nn.functional.one_hot(made.indices, 5).double())
    assert torch.equal(layer.decode(made.indices), made.output)
    probe = torch.randn_like(z)
    (grad,) = torch.autograd.grad((made.output * probe).sum(), z, retain_graph=True)
    assert torch.equal(grad, probe)
    chosen = layer.decode(made.indices)
    torch.testing.assert_close(made.commitment, ((z - chosen) ** 2).flatten(1).sum(1) / 2)
    for leaf in (z, layer.codebook):  # both are drawn
        got, want = (torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (made.commitment, ((z - chosen) ** 2) / 2))  # fmt: skip
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("surrogate", ["gumbel", "softmax"])
def test_the_gradient_of_the_choice_is_that_of_the_relaxed_one(surrogate):
    layer, z = quantizer(surrogate, temperature=0.7, variance=2.0), vectors()
    made = layer(z, generator=torch.Generator().manual_seed(3))
    logits = -(z[..., None, :] - layer.codebook[:, None, None]).square().sum(-1) / 4
    if surrogate == "gumbel":
        noise = torch.rand(2, 24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        logits = logits - noise.log().neg().log().reshape(2, 4, 3, 2, 5).movedim(0, 1)
    soft = (logits / 0.7).softmax(-1)
    probe = torch.randn_like(soft)
    for leaf in (z, layer.codebook):
        got, want = (torch.autograd.grad((x * probe).sum(), leaf, retain_graph=True)[0] for x in (made.one_hot, soft))  # fmt: skip
        torch.testing.assert_close(got, want)


def test_the_choice_is_noise_free_and_its_gradient_falls_with_the_temperature():
    z, sizes = vectors(), []
    for temperature in (1.0, 4.0, 16.0):
        layer = quantizer("gumbel", temperature=temperature)
        made = layer(z)
        assert torch.equal(made.indices, layer.eval()(z).indices)
        (grad,) = torch.autograd.grad((made.one_hot * torch.arange(5)).sum(), z)
        sizes.append(float(grad.norm()))
    assert sizes[0] > sizes[1] > sizes[2]


def test_weights_of_codes_count_in_the_choice_and_a_code_of_weight_zero_is_never_made():
    layer, z = quantizer(temperature=1.0), vectors()
    weights = torch.tensor([0.02, 0.9, 0.08, 0.0, 0.0], dtype=torch.float64)
    made = layer(z, weights=weights)
    logits = -(z[..., None, :] - layer.codebook[:, None, None]).square().sum(-1) / 2 + weights.log()
    assert torch.equal(made.indices, logits.argmax(-1))
    assert (made.indices != layer(z).indices).any()
    probe = torch.randn_like(logits)
    got, want = (torch.autograd.grad((x * probe).sum(), z, retain_graph=True)[0] for x in (made.one_hot, logits.softmax(-1)))  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_codes_are_drawn_from_vectors():
    layer, z = quantizer(), vectors()
    layer.init_from(z, generator=torch.Generator().manual_seed(0))
    for c in range(2):
        rows = z[:, c].reshape(-1, 3)
        assert ((layer.codebook[c][:, None] - rows).abs().sum(-1).min(1).values == 0).all()
    assert len(layer.codebook[0].unique(dim=0)) == 5
    layer.init_from(z[:1, :, :1])  # two vectors for five codes
    assert len(layer.codebook[0].unique(dim=0)) == 2


def prior(offsets, channels=2, k=4, reduce=False, seed=0):
    torch.manual_seed(seed)
    net = FiniteStatePrior(k, 3, channels, offsets, reduce_states=reduce).double()
    nn.init.normal_(net.static)
    for bias in net.biases:
        nn.init.normal_(bias)
    return net, torch.randn(channels, k, 3, dtype=torch.float64)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(
    "offsets", [[], [LEFT, TOP], [CHANNEL, LEFT, TOP], [(0, -1)], [(0, -2, -1), (-1, -1, 0)]]
)
def test_the_network_is_the_table_at_the_contexts(offsets, reduce):
    net, codebook = prior(offsets, reduce=reduce)
    if reduce:
        net.states.data = torch.tensor([0.5, 0.0, -0.2, 0.3]).double()
    shape = (3, 2, 6) if offsets == [(0, -1)] else (3, 2, 4, 5)
    x = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(x, 4).double()
    log_p = net(one_hot, codebook)
    table = net.table(codebook)
    torch.testing.assert_close(table.sum(-1), torch.ones_like(table[..., 0]))
    rows = FiniteStateCoder.from_probs(table, offsets).contexts(x)
    channel = torch.arange(2).reshape(1, 2, *[1] * (x.ndim - 2))
    torch.testing.assert_close(log_p.exp(), table[channel, rows], rtol=0, atol=1e-9)
    nats = -(one_hot * log_p).flatten(1).sum(1)
    torch.testing.assert_close(net.rate(one_hot, codebook), nats)


def test_the_rate_moves_choice_codes_and_network_or_the_network_alone():
    net, codebook = prior([LEFT])
    codebook.requires_grad_()
    one_hot = torch.nn.functional.one_hot(torch.arange(24).reshape(1, 2, 3, 4) % 4, 4).double().requires_grad_()  # fmt: skip
    net.rate(one_hot, codebook).sum().backward()
    assert all((leaf.grad != 0).any() for leaf in (one_hot, codebook, net.static, net.weights[0]))
    one_hot.grad = None
    net.rate(one_hot, codebook, detach=True).sum().backward()
    assert one_hot.grad is None


def test_weights_of_states_are_entmax():
    z = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    down = z.sort(descending=True).values  # sparsemax by its closed form
    size = ((1 + torch.arange(1, 8) * down) > down.cumsum(0)).sum()
    tau = (down.cumsum(0)[size - 1] - 1) / size
    torch.testing.assert_close(_Entmax.apply(z, 2.0), (z - tau).clamp_min(0))
    torch.testing.assert_close(_Entmax.apply(z, 1 + 1e-6), z.softmax(0), rtol=1e-4, atol=1e-4)
    for alpha in (1.4, 1.5):
        p = _Entmax.apply(z, alpha)
        assert (p == 0).any() and (p > 0).sum() > 2
        threshold = ((alpha - 1) * z - p.pow(alpha - 1))[p > 0]  # the same for all that are kept
        assert float(threshold.max() - threshold.min()) < 1e-9
        assert ((alpha - 1) * z)[p == 0].max() <= threshold.mean()
        assert torch.autograd.gradcheck(lambda x, a=alpha: _Entmax.apply(x, a), z.clone().requires_grad_())
    net, _ = prior([LEFT], reduce=True)
    net.states.data[1] = -9.0
    assert net.active_states().tolist() == [True, False, True, True]


class Commitment(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = HardmaxQuantizer(4, 3, 2)

    def forward(self, z):
        return self.layer(z).commitment


def test_layers_conform_to_their_kind(as_a_user):
    check_layer(Commitment(), torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)), shape=(5,), chooses=True)  # fmt: skip
    net, codebook = prior([LEFT, TOP])
    one_hot = torch.nn.functional.one_hot(torch.arange(48).reshape(2, 2, 3, 4) % 4, 4).float()
    check_layer(net.float(), one_hot, codebook.float(), shape=(2, 2, 3, 4, 4))


def test_pixels_have_the_logistic_distribution():
    first, step, sides = _logistic_grid(64)
    rows = _logistic_rows(64).freqs / 2**16
    for i in (0, 10, 21, 35):
        for m in (0, sides[i] // 3, sides[i] - 1):
            edges = logistic.cdf(np.arange(63) + 0.5, loc=m * step[i], scale=2 ** ((i - FINEST) / 4))
            want = np.diff(np.concatenate([[0], edges, [1]]))
            np.testing.assert_allclose(rows[first[i] + m], want * (1 - 64 / 2**16) + 2**-16, atol=2**-16)


def test_training_thaws_a_frozen_codec():
    net, x = FSARCodec(1, n_levels=8, n_codes=4, dim=2, hidden=4), torch.arange(64).reshape(1, 1, 8, 8) % 8
    net.eval().freeze()
    net(x)
    data = net.compress(x)
    net.train()(x)
    with pytest.raises(ValueError, match="must come after freeze"):
        net.eval().compress(x)
    with pytest.raises(ValueError, match="must come after freeze"):
        net.decompress(data)
    assert torch.equal(net.freeze().decompress(net.compress(x)), x)


def test_nats_of_pixels_are_those_of_the_logistic_far_out_too():
    net, rng = FSARCodec(2, n_levels=64, n_codes=2, dim=2, hidden=4), torch.Generator().manual_seed(0)
    out = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64, generator=rng)
    out[0, :, 1] = 9 * out[0, :, 1]  # beyond the sharpest and the widest scale
    x = torch.randint(64, (3, 2, 5, 4), generator=rng)
    x[..., 0], x[..., 1] = 0, 63
    scale = (2.0 ** (2 * out[:, :, 1] + 1)).clamp(2**-2.5, 2**6.25)
    away = x - 63 / 2 * (1 + out[:, :, 0])
    sign = torch.where(
        away > 0, -1.0, 1.0
    )  # the tail in which the difference of probabilities does not cancel
    low, high = (logistic.cdf(sign * (away + side * sign) / scale) for side in (-0.5, 0.5))
    want = -np.log(high - low)
    want = np.where(x == 0, -logistic.logcdf((away + 0.5) / scale), want)
    want = np.where(x == 63, -logistic.logsf((away - 0.5) / scale), want)
    torch.testing.assert_close(net._logistic(out, x), torch.from_numpy(want))


def codec(channels=1, n_levels=16, freeze=True, **options):
    torch.manual_seed(0)
    net = FSARCodec(
        channels, n_levels=n_levels, **{"channels": 2, "n_codes": 5, "dim": 4, "hidden": 8, **options}
    )
    net(images((8, channels, 12, 12), n_levels))
    return net.eval().freeze() if freeze else net.eval()


def images(shape, n_levels, seed=0, dtype=torch.int64):
    return torch.randint(n_levels, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


CODECS = {
    "categorical": codec(), "logistic": codec(3, 64, offsets=[LEFT, TOP, CHANNEL]), "independent": codec(autoregressive=False),
    "full": codec(1, 7, downsample=1), "coarse": codec(2, 33, downsample=8, offsets=[(0, -1, -1)]),
    "few": codec(n_codes=1), "black and white": codec(n_levels=2, reduce_states=True),
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(CODECS)), n=st.integers(0, 3), sides=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    constant=st.booleans(), dtype=st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_image_comes_back(name, n, sides, constant, dtype, seed):
    net = CODECS[name]
    x = images((n, net.in_channels, *sides), net.n_levels, seed, dtype)
    x = torch.full_like(x, seed % net.n_levels) if constant else x
    back = net.decompress(net.compress(x))
    assert back.dtype == dtype
    assert torch.equal(back.long(), x.long())


@pytest.mark.parametrize("name", ["categorical", "logistic"])
def test_files_do_not_depend_on_threads_and_are_read_at_another_batch_size_and_thread_count(
    name, monkeypatch
):
    net = CODECS[name]
    x = images((5, net.in_channels, 11, 10), net.n_levels)
    data = net.compress(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + before % 2)
        twin = copy.deepcopy(net)
        twin._tools = None  # made anew
        assert twin.compress(x) == data
        for module in ("fsar", "frozen_codec"):
            monkeypatch.setattr(f"posterity.coding.{module}.SLAB", 2 * 11 * 10)
        assert torch.equal(twin.decompress(data), x)
    finally:
        torch.set_num_threads(before)


def test_a_trained_codec_writes_what_it_promises_and_its_state_reads_it():
    torch.manual_seed(0)
    x = (torch.arange(12)[:, None] + torch.arange(12) * 2 + torch.arange(25)[:, None, None]) % 16
    x = x[:, None]
    net = codec(freeze=False).train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        cost = net(x, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(cost.loss, (cost.data + cost.rate + cost.commitment).mean())
        optimizer.zero_grad()
        cost.loss.backward()
        optimizer.step()
        losses.append(float(cost.loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        bits = net.eval()(x).bits_per_dim
    data = net.freeze().compress(x)
    assert 8 * (len(data) - 48) / x.numel() == pytest.approx(float(bits.mean()), rel=0.03)
    fresh = codec(freeze=False)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.decompress(data), x)
    assert torch.equal(copy.deepcopy(net).decompress(data), x)
    with pytest.raises(ValueError, match="another's"):
        CODECS["categorical"].decompress(data)


def test_files_of_logistic_pixels_are_as_long_as_promised():
    net = CODECS["logistic"]
    x = images((6, 3, 16, 16), 64) // 4 + 20
    with torch.no_grad():
        bits = float(net(x).bits_per_dim.mean())
    assert 8 * (len(net.compress(x)) - 48) / x.numel() == pytest.approx(bits, rel=0.01)


def test_codes_of_weight_zero_leave_the_table():
    net = codec(reduce_states=True, freeze=False)
    net.prior.states.data[1:3] = -9.0
    net.freeze()
    assert net.freqs.shape == (2, 16, 3)
    x = images((3, 1, 9, 9), 16)
    assert torch.equal(net.decompress(net.compress(x)), x)
    assert int(net(x).rate.isfinite().sum()) == 3


def test_a_frozen_codec_chooses_the_codes_of_the_networks_in_floats():
    net, chosen = codec(reduce_states=True, freeze=False), []
    net.prior.states.data = torch.tensor([1.0, 0.0, -9.0, 1.5, 0.5])
    net.quantizer.register_forward_hook(lambda _, __, made: chosen.append(made.indices))
    x = images((6, 1, 16, 16), 16)
    net(x)
    kept = net.freeze().active.nonzero()[:, 0]
    found = kept[net._frozen().indices(net._scaled(net._padded(x)))]
    assert kept.tolist() == [0, 1, 3, 4]
    assert (found == chosen[0]).double().mean() > 0.97


@pytest.mark.parametrize("cast", [False, True])
def test_it_trains_in_low_precision(cast):
    net = codec(freeze=False).train()
    net = net if cast else net.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        cost = net(images((4, 1, 8, 8), 16))
    cost.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    x = images((2, 1, 8, 8), 16)
    assert torch.equal(net.freeze().decompress(net.compress(x)), x)


def test_every_flipped_byte_and_cut_is_refused(as_a_user):
    net = CODECS["categorical"]
    data = net.compress(torch.zeros(1, 1, 6, 6, dtype=torch.long))
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 255
        for bad in (bytes(damaged), data[:place]):
            with pytest.raises(ValueError, match="data"):
                net.decompress(bad)


def fixed():
    """A codec of known weights and tables, so that no arithmetic of floats is in its files."""
    net = FSARCodec(1, n_levels=64, channels=1, n_codes=3, dim=2, hidden=4, offsets=[LEFT])
    for number, value in enumerate(net.parameters()):
        value.data = ((torch.arange(value.numel()) * 7 + number) % 9 - 4).reshape(value.shape) / 16.0
    freqs = torch.tensor([[[2000, 2000, 96], [1000, 3000, 96], [96, 2000, 2000], [1, 4094, 1]]])
    net.freqs, net.active = freqs.int(), torch.ones(3, dtype=torch.bool)
    return net.eval()


def test_a_file_of_the_first_version_is_read():
    x = (torch.arange(2 * 9 * 10).reshape(2, 1, 9, 10) ** 2) % 64
    assert torch.equal(fixed().decompress(FIXTURE.read_bytes()), x)
    assert fixed().compress(x) == FIXTURE.read_bytes()


X = torch.zeros(1, 1, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codec(freeze=False).compress(X), r"x must come after freeze\(\)"),
        (lambda: codec(freeze=False).decompress(b""), r"data must come after freeze\(\)"),
        (lambda: CODECS["categorical"].compress(X + 16), r"x must be in 0\.\.15, got values from 16"),
        (lambda: CODECS["categorical"](X - 1), r"x must be in 0\.\.15, got values from -1"),
        (lambda: CODECS["categorical"].compress(X.float()), "x must hold integers, got torch.float32"),
        (lambda: CODECS["logistic"].compress(X), r"x must have shape \(n, 3, h, w\)"),
        (lambda: CODECS["categorical"].compress(X[..., :0]), "x must have pixels"),
        (lambda: codec().train()(X), "more than one latent place"),
        (lambda: FSARCodec(n_levels=1), "n_levels must be an integer of at least 2"),
        (lambda: FSARCodec(n_levels=1000), "n_levels must be at most 512"),
        (lambda: FSARCodec(downsample=3), "downsample must be a power of two"),
        (lambda: FSARCodec(offsets=[(0, -1)]), "offsets must have 3 entries"),
        (lambda: FSARCodec(n_codes=512, offsets=[LEFT, TOP, CHANNEL]), "reduce_states"),
        (lambda: nan_codec().freeze(), "codec must have finite weights"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def nan_codec():
    net = codec(freeze=False)
    net.prior.static.data[0, 0] = math.nan
    return net
