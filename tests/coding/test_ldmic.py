"""Streams are separable and exact, attention and transfer equal their formulas, contexts see what they may."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from posterity.coding import LDMIC, CheckerboardContext, EfficientAttention, JointContextTransfer
from posterity.coding import view_streams as streams_of
from posterity.testing import check_layer

FIXTURE = Path(__file__).parent / "fixtures" / "ldmic-v1.bin"
CONTEXTS = ["none", "checkerboard", "autoregressive"]


def scenes(n=2, v=2, h=13, w=21, c=3, seed=0):
    """Return smooth random views that overlap."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, c, h // 4 + 2, w // 4 + 2, generator=rng)
    wide = nn.functional.interpolate(coarse, (h, w + v), mode="bilinear")
    return torch.stack([wide[..., i : i + w] for i in range(v)], 1)


def codec(context="checkerboard", freeze=True, steps=25, seed=0, **options):
    torch.manual_seed(seed)
    net = LDMIC(
        **{"in_channels": 3, "hidden": 16, "latent": 16, "downsample": 4, "context": context, **options}
    )
    net.encoder[-1].weight.data *= 8  # so that something is in the files after a few steps
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        loss = net(scenes(c=net.in_channels, seed=step), 300.0, generator=rng).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().freeze() if freeze else net.eval()


def in_floats(net):
    """Return a codec as it was before freeze."""
    plain = copy.deepcopy(net)
    plain.freqs, plain._tools = plain.freqs[:0], None
    return plain


CODECS = {context: codec(context) for context in CONTEXTS}


@settings(max_examples=12, deadline=None)
@given(
    context=st.sampled_from(CONTEXTS), n=st.integers(1, 2), v=st.integers(1, 3), sides=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kind=st.sampled_from(["random", "constant", "scene"]), dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
@example("none", 1, 1, (1, 1), "random", torch.float32, 0)
@example("checkerboard", 1, 1, (1, 1), "random", torch.float32, 0)
@example("autoregressive", 2, 2, (3, 9), "scene", torch.bfloat16, 1)
def test_streams_give_back_the_latents_exactly(context, n, v, sides, kind, dtype, seed):
    net, rng = CODECS[context], torch.Generator().manual_seed(seed)
    x = scenes(n, v, *sides, seed=seed) if kind == "scene" else torch.rand(n, v, 3, *sides, generator=rng)
    x = (torch.full_like(x, seed / 99) if kind == "constant" else x).to(dtype)
    streams = net.compress(x)
    latents = net.latents(x)
    assert torch.equal(net.decode_latents(streams), latents)
    assert latents.shape == (n, v, 16, -(-sides[0] // 4), -(-sides[1] // 4))
    back = net.decompress(streams)
    assert back.shape == x.shape
    torch.testing.assert_close(back, net(x).reconstruction.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", CONTEXTS)
def test_latents_are_nearly_those_of_the_networks_in_floats_and_truly_varied(context):
    net = CODECS[context]
    x = scenes(4, 2)
    found = net.latents(x)
    plain = in_floats(net)
    near = (found - plain.latents(x)).abs()
    assert (near < 0.1).float().mean() > 0.97
    assert float(found.std()) > 0.5
    a, b = net(x), plain(x)
    torch.testing.assert_close(a.bpp, b.bpp, rtol=0.05, atol=0.01)
    torch.testing.assert_close(a.distortion, b.distortion, rtol=0.1, atol=1e-3)


def test_encoding_is_separable_and_decoding_joint():
    net, x = CODECS["checkerboard"], scenes(2, 3)
    streams = net.compress(x)
    assert streams == [net.compress_view(x[:, i]) for i in range(3)]
    other = x.clone()
    other[:, 1] = 1 - other[:, 1]
    changed = net.compress(other)
    assert changed[0] == streams[0]
    assert changed[2] == streams[2]
    assert changed[1] != streams[1]
    joint, altered, alone = (net.decompress(s)[:, 0] for s in (streams, changed, streams[:1]))
    assert (joint - altered).abs().max() > 1e-4
    assert (joint - alone).abs().max() > 1e-4
    back = net.decompress([streams[2], streams[0], streams[1]])
    torch.testing.assert_close(back, net.decompress(streams)[:, [2, 0, 1]], rtol=0, atol=1e-5)
    single = codec(joint=False, steps=1)
    streams = single.compress(x)
    torch.testing.assert_close(
        single.decompress(streams)[:, :1], single.decompress(streams[:1]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("context", CONTEXTS)
def test_length_is_that_of_the_likelihood(context):
    net = CODECS[context]
    x = scenes(8, 2, 48, 64) if context != "autoregressive" else scenes(8, 2, 20, 24)
    streams, cost, pixels = net.compress(x), net(x), x.shape[-2] * x.shape[-1]
    bits = cost.per_view_bpp.double().sum(0) * pixels
    likelihood = in_floats(net)(x).per_view_bpp.double().sum(0) * pixels
    for stream, table, want in zip(streams, bits.tolist(), likelihood.tolist(), strict=True):
        assert 0 <= 8 * len(stream) - table <= 8 * 48
        assert abs(8 * len(stream) - want) <= 0.01 * want + 8 * 64
    torch.testing.assert_close(cost.loss, cost.bpp + 1024 * cost.distortion)
    torch.testing.assert_close(cost.distortion, (cost.reconstruction - x).square().mean())
    torch.testing.assert_close(cost.bpp, cost.per_view_bpp.mean())


def test_tables_are_the_gaussian_and_the_scale_the_nearest():
    rows = streams_of.gaussian_rows()
    q = np.arange(-streams_of.LARGEST, streams_of.LARGEST + 1)
    scales = 0.11 * (256 / 0.11) ** (np.arange(64) / 63)
    for i in (0, 1, 13, 40, 63):
        want = norm.cdf((q + 0.5) / scales[i]) - norm.cdf((q - 0.5) / scales[i])
        want = 1 + want / want.sum() * (2**24 - len(q))
        assert np.abs(rows.freqs[i] - want).max() <= 1
    raw = np.random.default_rng(0).uniform(-12, 300, 4000)
    found = streams_of._scale_rows(torch.from_numpy(np.floor(raw * 4096)))
    scale = 0.11 + np.logaddexp(0, raw)
    nearest = np.abs(np.log(scale[:, None] / scales)).argmin(1)
    assert (found != nearest).mean() < 2e-3


def test_nats_are_those_of_unit_intervals():
    away = torch.tensor([[0.0, 0.3, -1.2, 4.0, -30.0]], dtype=torch.float64)
    raw = torch.tensor([[-30.0, 0.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    scale = 0.11 + np.logaddexp(0, raw.numpy())
    far = np.abs(away.numpy())
    want = -np.log(norm.sf((far - 0.5) / scale) - norm.sf((far + 0.5) / scale)).sum(1)
    np.testing.assert_allclose(streams_of.gaussian_nats(away, raw), want, rtol=1e-9)
    z = torch.arange(-60.0, 61.0, dtype=torch.float64).reshape(-1, 1, 1, 1)
    mixture = torch.tensor([[0.3, -1.0], [2.0, -3.0], [0.5, -1.0]], dtype=torch.float64)[..., None]
    log_p = streams_of.mixture_log_p(z, mixture)
    weight, (centre, log_scale) = mixture[0, :, 0].softmax(0), mixture[1:, :, 0]
    edge = lambda x: ((x - centre) / log_scale.exp()).sigmoid() @ weight  # noqa: E731
    want = torch.stack([edge(float(each) + 0.5) - edge(float(each) - 0.5) for each in z.flatten()])
    torch.testing.assert_close(log_p.exp().flatten(), want)
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_the_rate_on_noise_is_in_expectation_that_of_rounding():
    rng, n = torch.Generator().manual_seed(0), 200_000
    raw = torch.full((n, 1), 0.7, dtype=torch.float64)
    mean, noise = torch.rand(2, n, 1, dtype=torch.float64, generator=rng)
    y = 2 * torch.randn(n, 1, dtype=torch.float64, generator=rng) + mean
    trained = streams_of.gaussian_nats(y + noise - 0.5, raw)
    tested = streams_of.gaussian_nats(torch.round(y), raw)
    differ = trained - tested
    assert abs(float(differ.mean())) < 3 * float(differ.std()) / math.sqrt(n)


def test_in_training_bits_are_of_noisy_latents_and_the_decoder_sees_rounded_ones():
    net, x = codec("none", freeze=False, steps=2).double().train(), scenes(h=16, w=20).double()
    cost, rng = net(x, generator=torch.Generator().manual_seed(7)), torch.Generator().manual_seed(7)
    with torch.no_grad():
        y = net.encoder(x.flatten(0, 1))
        z = net.hyper_encoder(y)
        seen_y, seen_z = (part + torch.rand(part.shape, dtype=torch.float64, generator=rng) - 0.5 for part in (y, z))  # fmt: skip
        mean, raw = net.hyper_decoder(seen_z)[..., :4, :5].chunk(2, 1)
        away, scale = (seen_y - mean).abs(), 0.11 + nn.functional.softplus(raw)
        p = torch.from_numpy(norm.sf((away - 0.5) / scale) - norm.sf((away + 0.5) / scale))
        nats = -p.log().flatten(1).sum(1) - streams_of.mixture_log_p(seen_z, net.mixture).flatten(1).sum(1)
        torch.testing.assert_close(cost.per_view_bpp.flatten(), nats / math.log(2) / (16 * 20))
        rounded = torch.round(y - mean) + mean
        torch.testing.assert_close(cost.reconstruction, net.reconstruct(rounded.unflatten(0, (2, 2))))


@pytest.mark.parametrize("inverse", [False, True])
def test_normalisation_divides_by_the_root_of_all_squares_and_its_inverse_multiplies(inverse):
    torch.manual_seed(0)
    layer, x = streams_of.GDN(3, inverse=inverse).double(), torch.randn(2, 3, 2, 2).double()
    nn.init.uniform_(layer.root_gamma)
    for i in range(3):
        square = layer.root_beta[i] ** 2 + 0.01
        for j in range(3):
            square = square + layer.root_gamma[i, j] ** 2 * x[:, j] ** 2
        want = x[:, i] * square.sqrt() if inverse else x[:, i] / square.sqrt()
        torch.testing.assert_close(layer(x)[:, i], want)


def test_views_meet_at_the_latents_size_and_at_four_times_it():
    net, met = LDMIC(1, hidden=16, latent=32), []
    for transfer in net.transfers.values():
        transfer.register_forward_hook(lambda _, inputs, __: met.append(tuple(inputs[0].shape)))
    net.reconstruct(torch.zeros(1, 2, 32, 2, 3))
    assert met == [(1, 2, 32, 2, 3), (1, 2, 16, 8, 12)]
    norms = [layer.inverse for layer in net.modules() if isinstance(layer, streams_of.GDN)]
    assert norms == [False] * 3 + [True] * 3  # of the encoder and of the decoder
    assert list(LDMIC(hidden=16, latent=16, downsample=4).transfers) == ["0", "1"]
    assert list(LDMIC(hidden=16, latent=16, downsample=2).transfers) == ["0"]


def test_coding_draws_no_random_numbers():
    net, plain = codec(freeze=False, steps=0), in_floats(CODECS["autoregressive"])
    state = torch.get_rng_state()
    net.freeze().decompress(net.compress(scenes(1, 1, 5, 5)))
    plain(scenes(1, 1, 5, 5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n_heads", [1, 2])
def test_attention_is_the_quadratic_form(n_heads):
    torch.manual_seed(0)
    layer = EfficientAttention(6, key_channels=4, value_channels=2, n_heads=n_heads).double()
    target, source = torch.randn(2, 6, 3, 4).double(), torch.randn(2, 6, 5, 2).double()
    keys, queries, values = layer.keys(source), layer.queries(target), layer.values(source)
    found = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    dk, dv = 4 // n_heads, 2 // n_heads
    for n in range(2):
        for head in range(n_heads):
            k = keys[n, head * dk : (head + 1) * dk].reshape(dk, 10).exp()
            k = k / k.sum(1, keepdim=True)
            v = values[n, head * dv : (head + 1) * dv].reshape(dv, 10)
            for i in range(3):
                for j in range(4):
                    q = queries[n, head * dk : (head + 1) * dk, i, j].exp()
                    weights = (q / q.sum()) @ k  # of each source position
                    assert float(weights.detach().sum()) == pytest.approx(1)
                    found[n, head * dv : (head + 1) * dv, i, j] = v @ weights
    torch.testing.assert_close(layer(target, source), layer.reprojection(found))
    mixed = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    moved = source.flatten(2)[..., mixed].reshape(source.shape)
    torch.testing.assert_close(layer(target, moved), layer(target, source))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    permuted = layer(target.flatten(2)[..., order].reshape(target.shape), source)
    torch.testing.assert_close(permuted, layer(target, source).flatten(2)[..., order].reshape(target.shape))


def test_transfer_follows_its_formula_and_the_order_of_views():
    torch.manual_seed(0)
    layer, x = JointContextTransfer(16).double(), torch.randn(2, 3, 16, 4, 5).double()
    out = layer(x)
    f = [layer.rb2(layer.rb1(x[:, i])) for i in range(3)]
    for i in range(3):
        others = [f[j] for j in range(3) if j != i]
        attended = layer.attn(f[i], (others[0] + others[1]) / 2)
        torch.testing.assert_close(out[:, i], x[:, i] + layer.refine(torch.cat([attended, f[i]], 1)))
    torch.testing.assert_close(layer(x[:, [2, 0, 1]]), out[:, [2, 0, 1]])
    alone = x[:, :1]
    own = layer.rb2(layer.rb1(alone[:, 0]))
    want = alone[:, 0] + layer.refine(torch.cat([torch.zeros_like(own), own], 1))
    torch.testing.assert_close(layer(alone)[:, 0], want)
    block = layer.refine[0]
    inner = nn.functional.leaky_relu(block.conv1(torch.cat([own, own], 1)), 0.01)
    want = nn.functional.leaky_relu(block.conv2(inner), 0.01) + block.skip(torch.cat([own, own], 1))
    torch.testing.assert_close(block(torch.cat([own, own], 1)), want)
    for value in layer.refine.parameters():
        nn.init.zeros_(value)
    assert torch.equal(layer(x), x)


def seen_by(context, h=5, w=6):
    """Return which latents (h w) the mean and scale at each place (h w) depend on, by the Jacobian."""
    torch.manual_seed(0)
    net = codec(context, freeze=False, steps=0, hidden=16, latent=16).double()
    hyper = torch.randn(1, 32, h, w).double()

    def parameters(y):
        return torch.cat(net._predicted(hyper, y), 1).sum(1).flatten()

    y = torch.randn(1, 16, h, w).double()
    jacobian = torch.autograd.functional.jacobian(parameters, y)
    return (jacobian != 0).any(2).reshape(h * w, h * w)


def test_a_checkerboard_predicts_one_half_by_the_other():
    reached = seen_by("checkerboard")
    rows, columns = torch.arange(30) // 6, torch.arange(30) % 6
    anchor = (rows + columns) % 2 == 1
    near = ((rows[:, None] - rows).abs() <= 2) & ((columns[:, None] - columns).abs() <= 2)
    assert torch.equal(reached, ~anchor[:, None] & anchor & near)


def test_autoregression_is_strictly_causal():
    reached = seen_by("autoregressive")
    place = torch.arange(30)
    rows, columns = place // 6, place % 6
    near = ((rows[:, None] - rows).abs() <= 2) & ((columns[:, None] - columns).abs() <= 2)
    assert torch.equal(reached, (place[:, None] > place) & near)


def test_layers_conform_to_their_kind(as_a_user):
    torch.manual_seed(0)
    check_layer(
        EfficientAttention(32), torch.randn(2, 32, 4, 3), torch.randn(2, 32, 5, 4), shape=(2, 32, 4, 3)
    )
    check_layer(JointContextTransfer(32), torch.randn(2, 2, 32, 4, 3), shape=(2, 2, 32, 4, 3))
    check_layer(CheckerboardContext(3, 4), torch.randn(2, 3, 5, 4), shape=(2, 4, 5, 4))


@pytest.mark.parametrize("context", CONTEXTS)
def test_training_reaches_every_weight_and_lowers_the_loss(context):
    net = codec(context, freeze=False, steps=0, hidden=32, latent=32).train()
    optimizer, losses, x = torch.optim.Adam(net.parameters(), 3e-3), [], scenes()
    rng = torch.Generator().manual_seed(0)
    for _ in range(8):
        cost = net(x, 200.0, generator=rng)
        optimizer.zero_grad()
        cost.loss.backward()
        assert all(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
        optimizer.step()
        losses.append(float(cost.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "float64"])
def test_it_trains_and_codes_in_other_precision(mode):
    net = codec(freeze=False, steps=0).train()
    net = net.bfloat16() if mode == "bfloat16" else net.double() if mode == "float64" else net
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        cost = net(scenes(), 100.0)
        cost.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        streams = net.eval().freeze().compress(scenes())
        found = net.decode_latents(streams)
    assert torch.equal(found, net.latents(scenes()))


def test_files_do_not_depend_on_threads_batches_or_a_copy_and_a_trained_decoder_still_reads_them():
    net, x = CODECS["checkerboard"], scenes(3, 1, 40, 33)[:, 0]
    data = net.compress_view(x)
    twin = codec(freeze=False, steps=0, seed=5)
    twin.load_state_dict(net.state_dict())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + before % 2)
        assert twin.compress_view(x) == data
    finally:
        torch.set_num_threads(before)
    with torch.inference_mode():
        assert copy.deepcopy(net).compress_view(x) == data
    for i in range(3):
        latents = net.decode_latents([net.compress_view(x[i : i + 1])])
        assert torch.equal(latents, net.decode_latents([data])[i : i + 1])
    for value in twin.decoder.parameters():
        value.data *= 1.1
    assert torch.equal(twin.freeze().decode_latents([data]), net.decode_latents([data]))
    with pytest.raises(ValueError, match=r"streams\[0\]: data must be of this codec, got another's"):
        CODECS["none"].decompress([data])


@pytest.mark.parametrize("context", ["checkerboard", "autoregressive"])
def test_a_context_that_says_nothing_codes_too(context):
    net, x = codec(context, freeze=False, steps=0), scenes(1, 1, 5, 5)
    net.context.weight.data.zero_()
    net(x)
    assert torch.equal(net.freeze().decode_latents(net.compress(x)), net.latents(x))


def test_training_thaws_a_frozen_codec():
    net = codec(steps=1)
    net.train()(scenes())
    with pytest.raises(ValueError, match="must come to a frozen codec"):
        net.eval().compress(scenes())


def test_latents_far_out_are_clipped_alike_at_both_ends():
    net = codec("none", steps=1)
    net.encoder[-1].weight.data *= 400
    net.freeze()
    x = scenes()
    found = net.latents(x)
    assert found.abs().max() > 1000
    assert torch.equal(net.decode_latents(net.compress(x)), found)


def test_every_flipped_byte_and_cut_is_refused(as_a_user):
    net = CODECS["none"]
    data = net.compress_view(torch.full((1, 3, 4, 4), 0.5))
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 255
        for bad in (bytes(damaged), data[:place]):
            with pytest.raises(ValueError, match=r"streams\[0\]: data"):
                net.decompress([bad])


def fixed():
    """A codec of known weights and tables, so that no arithmetic of floats is in its files."""
    net = LDMIC(1, hidden=16, latent=16, downsample=4)
    for number, value in enumerate(net.parameters()):
        spread = ((torch.arange(value.numel()) * 7 + number) % 9 - 4).reshape(value.shape)
        value.data = spread / (4.0 if number < 2 else 64.0)
    places = torch.arange(-streams_of.SIDE, streams_of.SIDE + 1)
    freqs = 1 + (2**20 >> places.abs().clamp_max(20))
    freqs[streams_of.SIDE] += 2**24 - int(freqs.sum())
    net.freqs = freqs.int().expand(16, -1).clone()
    return net.eval()


def test_a_file_of_the_first_version_is_read():
    x = ((torch.arange(2 * 9 * 10).reshape(2, 1, 9, 10) ** 2) % 64) / 64
    net = fixed()
    assert net.compress_view(x) == FIXTURE.read_bytes()
    found = net.decode_latents([FIXTURE.read_bytes()])
    assert torch.equal(found, net.latents(x[:, None]))
    assert found.std() > 0.3


X = torch.full((1, 2, 3, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codec(freeze=False, steps=0).compress(X), "views must come to a frozen codec"),
        (lambda: codec(freeze=False, steps=0).decompress([b""]), "must come to a frozen codec"),
        (lambda: CODECS["none"](X[0]), r"views must have shape \(n, v, 3, h, w\) and pixels, got \(2, 3, 4, 4\)"),
        (lambda: CODECS["none"].compress_view(X), r"x must have shape \(n, 3, h, w\)"),
        (lambda: CODECS["none"].compress(X[:, :, :2]), r"views must have shape \(n, v, 3, h, w\)"),
        (lambda: CODECS["none"].compress(X[:0]), "views must have shape .* and pixels"),
        (lambda: CODECS["none"](3 * X), r"views must be in \[0, 1\], got values from 1.5 to 1.5"),
        (lambda: CODECS["none"].compress(X - 1), r"views must be in \[0, 1\]"),
        (lambda: CODECS["none"].latents(X * math.nan), r"views must be in \[0, 1\], got values from nan"),
        (lambda: CODECS["none"].compress(X.long()), "views must be a floating-point tensor, got dtype torch.int64: scale"),
        (lambda: CODECS["none"](X, 0.0), "lmbda must be greater than 0, got 0.0"),
        (lambda: CODECS["none"].decompress([]), "streams must have at least one view"),
        (lambda: CODECS["none"].decompress(b"PLDM"), "streams must be a sequence of bytes"),
        (lambda: CODECS["none"].decompress([3]), r"streams\[0\]: data must be bytes, got int"),
        (
            lambda: CODECS["none"].decompress([CODECS["none"].compress_view(x) for x in (X[0], X[:, 0, :, :3])]),
            r"got \(2, 4, 4\) and, of streams\[1\], \(1, 3, 4\)",
        ),
        (lambda: CODECS["none"].reconstruct(torch.zeros(1, 2, 15, 1, 1)), r"latents must have shape \(n, v, 16, h, w\)"),
        (lambda: LDMIC(hidden=24), "hidden must be a multiple of 16 for a joint decoder, got 24"),
        (lambda: LDMIC(latent=100), "latent must be a multiple of 16"),
        (lambda: LDMIC(downsample=12), "downsample must be a power of two, got 12"),
        (lambda: LDMIC(context="both"), "context must be one of"),
        (lambda: EfficientAttention(24), r"channels must be a multiple of 8 \* n_heads = 16, got 24"),
        (lambda: EfficientAttention(6, key_channels=3, value_channels=2), "key_channels must be a multiple of n_heads"),
        (lambda: EfficientAttention(16)(X[0], X[0]), r"target must have shape \(any, 16, any, any\)"),
        (lambda: EfficientAttention(16)(torch.zeros(1, 16, 0, 2), torch.zeros(1, 16, 2, 2)), "target must have positions"),
        (lambda: EfficientAttention(16)(torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 0)), "source must have positions"),
        (lambda: JointContextTransfer(16)(torch.zeros(1, 0, 16, 2, 2)), "views must have at least one view"),
        (lambda: CheckerboardContext(3, 3, 4), "kernel_size must be odd, got 4"),
        (lambda: nan_codec().freeze(), "finite weights"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def nan_codec():
    net = codec(freeze=False, steps=0)
    net.hyper_decoder[0].weight.data[0] = math.nan
    return net
