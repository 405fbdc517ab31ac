"""The network of fields, against its formulas in NumPy, and what it may not see; grids as fields and back."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from posterity.generative import FieldNet, field_image, image_field, sphere_field, volume_field
from posterity.testing import check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=rng(seed))


def lively(coord_dim=2, value_dim=1, **options):
    """A small network whose last layer is not zero, in float64."""
    options = {"dim": 12, "n_latents": 5, "n_blocks": 2, "n_heads": 3, "n_frequencies": 3} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FieldNet(coord_dim, value_dim, **options)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net.double().eval()


def call(net, x, t, coords, context, around):
    return net(x, t, coords=coords, context=context, context_coords=around)


@pytest.fixture
def given():
    """Values at 7 queries, times, their points, values at 4 context points, those points: of 3 fields."""
    return (
        normal(3, 7, 1), torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64), normal(3, 7, 2, seed=1),
        normal(3, 4, 1, seed=2), normal(3, 4, 2, seed=3),
    )  # fmt: skip


# --- the network ---


def in_numpy(net, x, t, coords, context, around):
    """The same, field by field and head by head."""
    w = {name: p.detach().numpy() for name, p in net.named_parameters()}

    def linear(v, name):
        return v @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(v, name):
        away = v - v.mean(-1, keepdims=True)
        return (
            away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def waves(v, n):
        angles = np.stack([v * 2**j * math.pi / 2 for j in range(n)], -1).reshape(*v.shape[:-1], -1)
        return np.concatenate([v, np.sin(angles), np.cos(angles)], -1)

    def embed(values, at, time):
        times = np.tile(waves(np.array([time]), 4), (len(at), 1))
        return linear(np.concatenate([waves(at, net.n_frequencies), values, times], -1), "pair")

    def block(v, others, name):
        n_heads, width = net.reader.n_heads, v.shape[-1] // net.reader.n_heads
        asking = norm(v, f"{name}.norm")
        read = asking if others is None else norm(others, f"{name}.norm_others")
        query, offered = linear(asking, f"{name}.ask"), linear(read, f"{name}.offer")
        heads = []
        for head in range(n_heads):
            part = slice(head * width, (head + 1) * width)
            score = query[:, part] @ offered[:, : v.shape[-1]][:, part].T / math.sqrt(width)
            score = np.exp(score - score.max(1, keepdims=True))
            heads.append(score / score.sum(1, keepdims=True) @ offered[:, v.shape[-1] :][:, part])
        v = v + linear(np.concatenate(heads, 1), f"{name}.out")
        hidden = linear(norm(v, f"{name}.mlp.0"), f"{name}.mlp.1")
        return v + linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, f"{name}.mlp.4")

    found = []
    for row in range(len(x)):
        latents = block(w["latents"], embed(context[row], around[row], t[row]), "reader")
        for k in range(len(net.blocks)):
            latents = block(latents, None, f"blocks.{k}")
        answers = block(embed(x[row], coords[row], t[row]), latents, "answer")
        found.append(linear(norm(answers, "norm"), "out"))
    return np.stack(found)


@pytest.mark.parametrize("n_blocks", [0, 2])
def test_it_is_its_formulas_in_numpy(given, n_blocks):
    net = lively(n_blocks=n_blocks)
    expected = in_numpy(net, *(each.numpy() for each in given))
    np.testing.assert_allclose(call(net, *given).detach(), expected, rtol=0, atol=1e-10)


def test_the_order_of_the_context_does_not_matter_and_queries_keep_theirs(given):
    net, (x, t, coords, context, around) = lively(), given
    plain = call(net, *given)
    turn, other = torch.tensor([2, 0, 3, 1]), torch.tensor([6, 1, 0, 5, 2, 4, 3])
    torch.testing.assert_close(call(net, x, t, coords, context[:, turn], around[:, turn]), plain)
    moved = call(net, x[:, other], t, coords[:, other], context, around)
    torch.testing.assert_close(moved, plain[:, other])
    assert not torch.allclose(call(net, x, t, coords, context[:, turn], around), plain)


def test_a_query_does_not_see_other_queries_and_halves_make_the_whole(given):
    net, (x, t, coords, context, around) = lively(), given
    plain = call(net, *given)
    torch.testing.assert_close(call(net, x[:, 2:4], t, coords[:, 2:4], context, around), plain[:, 2:4])
    latents = net.encode(context, t, context_coords=around)
    assert latents.shape == (3, 5, 12)
    torch.testing.assert_close(net.decode(latents, x, t, coords=coords), plain)


def test_points_that_a_batch_shares_are_those_of_each_field(given):
    net, (x, t, coords, context, around) = lively(), given
    one, seen = coords[:1], around[:1]
    plain = call(net, x, t, one.repeat(3, 1, 1), context, seen.repeat(3, 1, 1))
    for expand in (lambda each: each, lambda each: each.expand(3, -1, -1)):
        torch.testing.assert_close(call(net, x, t, expand(one), context, expand(seen)), plain)


def test_without_context_every_query_is_on_its_own(given):
    net, (x, t, coords, context, around) = lively(), given
    alone = call(net, x, t, coords, context[:, :0], around[:, :0])
    assert alone.shape == (3, 7, 1) and alone.isfinite().all()
    changed = call(net, torch.cat([x[:, :1], -x[:, 1:]], 1), t, coords, context[:, :0], around[:, :0])
    torch.testing.assert_close(changed[:, 0], alone[:, 0])


def test_it_begins_by_predicting_nothing():
    assert not FieldNet(2, 3)(torch.ones(1, 5, 3), torch.zeros(1), coords=torch.ones(1, 5, 2),
                              context=torch.ones(1, 2, 3), context_coords=torch.ones(1, 2, 2)).any()  # fmt: skip


def test_attention_does_not_grow_with_the_square_of_the_points():
    net, (q, k), sizes = lively(), (3000, 2000), []
    hooks = [m.register_forward_hook(lambda m, _, out: sizes.append(out.numel())) for m in net.modules()]
    call(net, normal(1, q, 1), torch.zeros(1).double(), normal(1, q, 2), normal(1, k, 1), normal(1, k, 2))
    assert max(sizes) <= 4 * 12 * q, "nothing is larger than the hidden layer of each query"
    [hook.remove() for hook in hooks]


class InOrder(nn.Module):
    """A network called with all it takes in order, as the conformance check of its kind does."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, coords, context, around):
        return call(self.net, x, t, coords, context, around)


@pytest.mark.parametrize(("value_dim", "n_blocks"), [(1, 1), (3, 0)])
def test_conforms_to_its_kind(as_a_user, value_dim, n_blocks):
    net = lively(3, value_dim, n_blocks=n_blocks).float()
    x, coords = normal(2, 9, value_dim).float(), nn.functional.normalize(normal(2, 9, 3).float(), dim=2)
    check_layer(
        InOrder(net), x, torch.tensor([0.1, 0.7]), coords, x[:, :4], coords[:, :4], shape=(2, 9, value_dim)
    )


def test_dropout_works_in_training_only():
    net = lively(dropout=0.5)
    x = normal(1, 6, 1)
    arguments = x, torch.zeros(1).double(), normal(1, 6, 2), x, normal(1, 6, 2)
    assert torch.equal(call(net, *arguments), call(net, *arguments))
    net.train()
    assert not torch.equal(call(net, *arguments), call(net, *arguments))


# --- grids ---


def test_an_image_is_its_pixels_at_their_centres():
    images = normal(2, 3, 4, 6)
    values, coords = image_field(images)
    assert values.shape == (2, 24, 3) and coords.shape == (1, 24, 2)
    assert coords.dtype == torch.float64
    for row in range(4):
        for column in range(6):
            place = row * 6 + column
            assert torch.equal(values[:, place], images[:, :, row, column])
            expected = [-1 + (column + 0.5) / 3, -1 + (row + 0.5) / 2]
            np.testing.assert_allclose(coords[0, place], expected, atol=1e-15)
    assert torch.equal(field_image(values, 4, 6), images)
    _, fine = image_field(torch.zeros(1, 1, 8, 12))
    blocks = fine.reshape(4, 2, 6, 2, 2).mean((1, 3)).reshape(24, 2)
    np.testing.assert_allclose(blocks, coords[0], atol=1e-7)  # four fine pixels lie around a coarse one


def test_a_map_is_values_at_unit_vectors_without_a_seam():
    maps = normal(2, 1, 10, 20)
    values, coords = sphere_field(maps)
    assert torch.equal(values[..., 0], maps.flatten(1))
    at = coords[0].reshape(10, 20, 3)
    np.testing.assert_allclose(at.norm(dim=2), np.ones((10, 20)), atol=1e-14)
    assert torch.pdist(coords[0]).min() > 1e-3
    latitude = math.pi / 2 - (torch.arange(10) + 0.5) * math.pi / 10  # north first
    longitude = (torch.arange(20) + 0.5) * math.pi / 10
    np.testing.assert_allclose(at[..., 2].asin(), latitude.double()[:, None].expand(10, 20), atol=1e-6)
    turned = torch.atan2(at[..., 1], at[..., 0]) % (2 * math.pi)
    np.testing.assert_allclose(turned, longitude.double()[None].expand(10, 20), atol=1e-6)
    around = (at - at.roll(1, 1)).norm(dim=2)  # the last column is as near to the first as any two
    np.testing.assert_allclose(around, around[:, :1].expand(10, 20), atol=1e-14)
    areas = at[..., :2].norm(dim=2).reshape(-1)
    np.testing.assert_allclose(
        areas.reshape(10, 20), latitude.double().cos()[:, None].expand(10, 20), atol=1e-6
    )
    moment = torch.einsum("i,ij,ik->jk", areas / areas.sum(), coords[0], coords[0])
    np.testing.assert_allclose(moment, np.eye(3) / 3, atol=0.01)  # of the uniform law


def test_a_volume_is_its_voxels_at_their_centres():
    volumes = normal(1, 2, 2, 3, 4)
    values, coords = volume_field(volumes)
    assert values.shape == (1, 24, 2) and coords.shape == (1, 24, 3)
    for deep, row, column in np.ndindex(2, 3, 4):
        place = (deep * 3 + row) * 4 + column
        assert torch.equal(values[:, place], volumes[:, :, deep, row, column])
        expected = [-1 + (column + 0.5) / 2, -1 + (row + 0.5) * 2 / 3, -1 + (deep + 0.5)]
        np.testing.assert_allclose(coords[0, place], expected, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_neighbours_stay_apart_in_every_dtype(dtype):
    for make, shape in ((image_field, (1, 1, 3, 1000)), (sphere_field, (1, 1, 3, 1000))):
        values, coords = make(torch.zeros(shape, dtype=dtype))
        assert values.dtype == dtype and coords.dtype == torch.float32
        assert len(coords[0].unique(dim=0)) == 3000


# --- bad input ---

X, T, C = torch.zeros(3, 5, 1), torch.zeros(3), torch.zeros(3, 5, 2)
NET = FieldNet(2, 1, dim=4, n_latents=2, n_blocks=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FieldNet(0, 1), "coord_dim must be an integer of at least 1, got 0"),
        (lambda: FieldNet(2, 0), "value_dim must be an integer of at least 1, got 0"),
        (lambda: FieldNet(2, 1, dim=0), "dim must be an integer of at least 1, got 0"),
        (lambda: FieldNet(2, 1, dim=6), "dim must be a multiple of n_heads, 4, got 6"),
        (lambda: FieldNet(2, 1, n_heads=0), "n_heads must be an integer of at least 1, got 0"),
        (lambda: FieldNet(2, 1, n_latents=0), "n_latents must be an integer of at least 1, got 0"),
        (lambda: FieldNet(2, 1, n_blocks=-1), "n_blocks must be an integer of at least 0, got -1"),
        (lambda: FieldNet(2, 1, n_frequencies=1.5), "n_frequencies must be an integer of at least 0, got 1.5"),
        (lambda: FieldNet(2, 1, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: call(NET, X.repeat(1, 1, 2), T, C, X, C),
         r"x must have shape \(any, any, 1\) for coord_dim=2 and value_dim=1, got \(3, 5, 2\)"),
        (lambda: call(NET, X, T, C[..., :1], X, C),
         r"coords must have shape \(3, 5, 2\) for x \(3, 5, 1\) and coord_dim=2 and value_dim=1, got \(3, 5, 1\)"),
        (lambda: call(NET, X, T, C, X, C[:, :2]), r"context_coords must have shape \(3, 5, 2\) for context"),
        (lambda: call(NET, X, T, C, X[..., :0], C), r"context must have shape \(any, any, 1\)"),
        (lambda: call(NET, X, T, C[:2], X, C), r"coords must have shape \(3, 5, 2\) .* got \(2, 5, 2\)"),
        (lambda: call(NET, X, T[:2], C, X, C), r"t must have shape \(3\) for context, got \(2,\)"),
        (lambda: call(NET, X[:2], T, C, X, C), r"coords must have shape \(2, 5, 2\)"),
        (lambda: call(NET, X[:2], T, C[:2], X, C), r"t must have shape \(2\) for x, got \(3,\)"),
        (lambda: call(NET, X.long(), T, C, X, C), "x must be a floating-point tensor, got dtype torch.int64"),
        (lambda: call(NET, X, T, None, X, C), "coords must be a floating-point tensor, got NoneType"),
        (lambda: call(NET, X, 0.5, C, X, C), "t must be a floating-point tensor, got float"),
        (lambda: NET.decode(torch.zeros(3, 3, 4), X, T, coords=C), r"latents must have shape \(3, 2, 4\)"),
        (lambda: image_field(torch.zeros(3, 4, 4)), r"images must have shape \(any, any, any, any\), got \(3, 4, 4\)"),
        (lambda: image_field(torch.zeros(1, 1, 4, 4).byte()), "images .* torch.uint8: scale to floats first"),
        (lambda: image_field(torch.zeros(1, 1, 0, 4)), "images must have channels and cells"),
        (lambda: image_field([1]), "images must be a floating-point tensor, got list"),
        (lambda: sphere_field(torch.zeros(4, 4)), "maps must have shape"),
        (lambda: volume_field(torch.zeros(1, 1, 4, 4)), "volumes must have shape"),
        (lambda: field_image(X, 2, 2), r"values must have shape \(any, 4, any\) for height 2 and width 2, got"),
        (lambda: field_image(X, 0, 2), "height must be an integer of at least 1, got 0"),
        (lambda: field_image(X.long(), 5, 1), "values must be a floating-point tensor"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
