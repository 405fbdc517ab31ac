"""LBANP: its size, its bottleneck, its padding, and the densities it returns."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from posterity.testing import check_neural_process
from posterity.uncertainty import LBANP

SMALL = {"n_latents": 3, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 8}
JOINT = ["cholesky", "lowrank"]


def small(dim_x=1, dim_y=1, **options):
    torch.manual_seed(0)
    return LBANP(dim_x, dim_y, **{**SMALL, **options}).double().eval()


def batch(n=6, m=5, dim_x=1, dim_y=1, n_tasks=3):
    rng = torch.Generator().manual_seed(1)
    sizes = (n, dim_x), (n, dim_y), (m, dim_x), (m, dim_y)
    return [torch.randn(n_tasks, *size, dtype=torch.float64, generator=rng) for size in sizes]


def near(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_parameters_are_counted():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    torch.manual_seed(0)
    model = LBANP(1, 1)
    parts = [model.embed_context, model.embed_query, model.encoder, model.decoder, model.norm, model.head]
    assert [count(part) for part in parts] == [12_672, 12_608, 499_968, 250_368, 128, 8_578]
    assert count(model) == 784_834
    other = LBANP(2, 3, n_latents=16, d_model=32, n_layers=3, n_heads=2, d_ff=64)
    assert count(other) == 105_126
    assert float(model.latents.detach().std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("options", [{}, {"norm_first": False}, {"bound_scale": True}], ids=str)
def test_the_convention(options):
    check_neural_process(small(2, 3, **options), dim_x=2, dim_y=3)


def test_a_target_is_predicted_alone_as_among_others():
    model, (x, y, x_new, _) = small(), batch()
    whole = model(x, y, x_new)
    for k in range(5):
        near(model(x, y, x_new[:, k : k + 1]).loc, whole.loc[:, k : k + 1])
    encodings = model.encode(x, y)
    for part in (slice(0, 2), slice(2, 5)):
        near(model.decode(encodings, x_new[:, part]).scale, whole.scale[:, part])


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_encodings_do_not_grow_with_the_context(n):
    encodings = small(n_layers=3).encode(torch.rand(2, n, 1).double(), torch.rand(2, n, 1).double())
    assert [tuple(each.shape) for each in encodings] == [(2, 3, 16)] * 3
    assert all(torch.isfinite(each).all() for each in encodings)


def test_each_layer_reads_its_own_latents():
    model, (x, y, x_new, _) = small(n_layers=4), batch()
    encodings = model.encode(x, y)
    whole = model.decode(encodings, x_new).loc
    for k in range(4):
        other = [each.flip(-1) if at == k else each for at, each in enumerate(encodings)]
        assert (model.decode(other, x_new).loc - whole).abs().max() > 1e-4
    assert not torch.allclose(model.decode(encodings[::-1], x_new).loc, whole)


def test_one_layer_is_the_formula():
    """Equations 1 and 2 by softmax and matrix products, from the layer's own weights."""
    model, (x, y, x_new, _) = small(n_layers=1, n_heads=1), batch()

    def attend(block, into, source):
        d = into.shape[-1]
        key, value = block.key_value(source)[..., :d], block.key_value(source)[..., d:]
        weights = (block.query(into) @ key.mT / math.sqrt(d)).softmax(-1)
        return block.out(weights @ value)

    def feed(block, z):
        up = block.up(z)
        half = up.shape[-1] // 2
        return block.down(up[..., :half] * torch.nn.functional.gelu(up[..., half:]))

    def cross(layer, z, source):
        z = z + attend(layer.attend, layer.norm(z), layer.source_norm(source))
        return z + feed(layer.feed, layer.feed_norm(z))

    context = model.embed_context(torch.cat([x, y], -1))
    latents = cross(model.encoder[0].cross, model.latents.expand(3, -1, -1), context)
    own = model.encoder[0].own
    normed = own.norm(latents)
    latents = latents + attend(own.attend, normed, normed)
    latents = latents + feed(own.feed, own.feed_norm(latents))
    query = cross(model.decoder[0], model.embed_query(x_new), latents)
    out = model.head(model.norm(query))
    got = model(x, y, x_new)
    near(got.loc, out[..., :1], 1e-12)
    near(got.scale, out[..., 1:].exp(), 1e-12)


@pytest.mark.parametrize("covariance", JOINT)
def test_joint_targets_have_a_density_that_masks_marginalise(covariance):
    model, (x, y, x_new, y_new) = small(1, 2, covariance=covariance, rank=3), batch(dim_y=2)
    joint = model(x, y, x_new)
    assert isinstance(joint, MultivariateNormal) and joint.batch_shape == (3,) and joint.event_shape == (10,)
    gram = joint.covariance_matrix
    assert (
        torch.linalg.eigvalsh(gram).min() > 0
        and (gram - torch.diag_embed(gram.diagonal(0, 1, 2))).abs().max() > 1e-6
    )
    near(model.log_likelihood(x, y, x_new, y_new), joint.log_prob(y_new.flatten(1)))
    real = torch.arange(5) < torch.tensor([[5], [3], [1]])
    wild = torch.where(real[..., None], x_new, 1e30), torch.where(real[..., None], y_new, -1e30)
    got = model.log_likelihood(x, y, *wild, target_mask=real)
    for row, count in enumerate((5, 3, 1)):
        one = slice(row, row + 1)
        near(got[one], model.log_likelihood(x[one], y[one], x_new[one, :count], y_new[one, :count]))
    near(model.loss(x, y, *wild, target_mask=real), -(got / real.sum(1)).mean())
    turn = torch.tensor([3, 1, 4, 0, 2])
    moved = model(x, y, x_new[:, turn]).covariance_matrix
    if covariance == "lowrank":  # a triangular factor depends on the order of the targets
        pairs = (2 * turn[:, None] + torch.arange(2)).flatten()
        near(moved, gram[:, pairs][:, :, pairs])
    with torch.no_grad():
        assert torch.isfinite(model.log_likelihood(x, y, x_new[:, :0], y_new[:, :0])).all()
        assert float(model.loss(x, y, *wild, target_mask=torch.zeros_like(real))) == pytest.approx(
            0, abs=1e-9
        )


def test_a_covariance_is_factor_times_factor_and_a_diagonal():
    model, (x, y, x_new, _) = small(covariance="lowrank", rank=2, bound_scale=True), batch()
    gram = model(x, y, x_new).covariance_matrix
    query = model.embed_query(x_new)
    for layer, latents in zip(model.decoder, model.encode(x, y), strict=True):
        query = layer(query, latents, None)
    mixed = model.scale_layers(model.norm(query))
    factor, raw = model.factor_head(mixed), model.diagonal_head(mixed)[..., 0]
    near(gram, factor @ factor.mT + torch.diag_embed(0.05 + 0.95 * torch.nn.functional.softplus(raw)))


def test_bounded_scales_and_triangular_factors():
    x, y, x_new, _ = batch()
    assert small(bound_scale=True)(x, y, 1e3 * x_new).scale.min() >= 0.05
    for bound, least in ((False, 1e-3), (True, 0.05)):
        tril = small(covariance="cholesky", bound_scale=bound)(x, y, x_new).scale_tril
        assert tril.diagonal(0, 1, 2).min() > least and (tril.triu(1) == 0).all()


@pytest.mark.parametrize("covariance", ["diagonal", *JOINT])
def test_gradients(covariance):
    model, args = small(n_layers=1, d_model=4, covariance=covariance, rank=2), batch(4, 3)
    args = [part.requires_grad_() for part in args]
    assert torch.autograd.gradcheck(model.log_likelihood, tuple(args))


@pytest.mark.parametrize("covariance", ["diagonal", *JOINT])
def test_padding_alone_and_empty_contexts_train(covariance):
    model, (x, y, x_new, y_new) = small(covariance=covariance), batch()
    none = torch.zeros(3, 6, dtype=torch.bool)
    empty = model(x[:, :0], y[:, :0], x_new)
    near(model(x, y, x_new, context_mask=none).loc, empty.loc)
    model.loss(x, y, x_new, y_new, context_mask=none).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_dropout_is_for_training():
    model, (x, y, x_new, _) = small(dropout=0.5), batch()
    near(model(x, y, x_new).loc, model(x, y, x_new).loc, 0)
    assert not torch.equal(model.train()(x, y, x_new).loc, model(x, y, x_new).loc)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"d_model": 10, "n_heads": 4}, "d_model must be a multiple of n_heads, got 10 and 4"),
        ({"n_latents": 0}, "n_latents must be an integer of at least 1, got 0"),
        ({"rank": 0}, "rank must be"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"covariance": "full"}, "covariance must be one of 'diagonal'"),
    ],
)
def test_options_that_do_not_fit(as_a_user, options, says):
    with pytest.raises(ValueError, match=says):
        LBANP(1, 1, **options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: {"x_context": a["x_context"][..., :0]}, r"x_context must have shape \(tasks, points, 1\), got \(3, 6, 0\)"),
        (lambda a: {"y_target": a["y_target"].repeat(1, 1, 2)}, r"y_target must have shape \(3, 5, 1\), got \(3, 5, 2\)"),
        (lambda a: {"x_target": a["x_target"][:2]}, r"x_target must have shape \(3, points, 1\), got \(2, 5, 1\)"),
        (lambda a: {"x_context": a["x_context"].long()}, "x_context must be a floating-point tensor, got dtype"),
        (lambda a: {"y_context": a["y_context"][:, :4]}, r"y_context must have shape \(3, 6, 1\)"),
        (lambda a: {"context_mask": torch.ones(3, 5).bool()}, r"context_mask must have shape \(3, 6\), got \(3, 5\)"),
        (lambda a: {"target_mask": torch.ones(3, 5)}, "target_mask must be a tensor of bool"),
        (lambda a: {"y_context": a["y_context"] * math.nan}, "y_context must be finite where its mask is True"),
    ],
)  # fmt: skip
def test_tasks_that_do_not_fit(as_a_user, change, says):
    names = ("x_context", "y_context", "x_target", "y_target")
    arguments = dict(zip(names, batch(), strict=True))
    with pytest.raises(ValueError, match=says):
        small().log_likelihood(**{**arguments, **change(arguments)})


def test_nan_in_padding_is_no_matter_of_ours_but_encodings_are(as_a_user):
    model, (x, y, x_new, _) = small(), batch()
    encodings = model.encode(x, y)
    with pytest.raises(ValueError, match="encodings must be the 2 tensors of encode, one a layer, got 1"):
        model.decode(encodings[:1], x_new)
    with pytest.raises(ValueError, match=r"encodings\[1\] must have shape \(3, 3, 16\)"):
        model.decode([encodings[0], encodings[1][:, :2]], x_new)
    with pytest.raises(ValueError, match=r"x_target must have shape \(3, points, 1\), got \(2, 5, 1\)"):
        model.decode(encodings, x_new[:2])
