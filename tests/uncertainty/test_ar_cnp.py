"""AR-CNP: the chain rule against exact Gaussian processes, prefix sums against the loop."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from posterity.testing import check_neural_process
from posterity.uncertainty import CNP, ConvCNP, ar_log_likelihood, ar_sample

NOISE = 0.1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gram(a, b):
    return torch.exp(-0.5 * (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / 0.5**2)


def gp(x_context, y_context, x_target, *, context_mask=None):
    """Exact marginal predictions of a Gaussian process with observation noise."""
    keep = torch.ones(x_context.shape[:2]).bool() if context_mask is None else context_mask
    both = keep[:, :, None] & keep[:, None]
    eye = torch.eye(x_context.shape[1], dtype=x_context.dtype)
    known = torch.where(both, gram(x_context, x_context), 0) + torch.where(keep[:, None], NOISE, 1) * eye
    cross = gram(x_target, x_context) * keep[:, None]
    weights = torch.linalg.solve(known, cross.mT).mT
    mean = weights @ torch.where(keep[..., None], y_context, 0)
    variance = 1 + NOISE - (weights * cross).sum(-1, keepdim=True)
    return Normal(mean, variance.sqrt().expand_as(mean))


def joint(x, y, x_new):
    """Return mean and covariance of one task's targets, by the textbook."""
    eye = torch.eye(len(x) + len(x_new), dtype=x.dtype)
    whole = gram(torch.cat([x, x_new]), torch.cat([x, x_new])) + NOISE * eye
    n = len(x)
    weights = torch.linalg.solve(whole[:n, :n], whole[:n, n:]).mT
    return (weights @ y)[:, 0], whole[n:, n:] - weights @ whole[:n, n:]


def batch(n=4, m=5, dim_x=1, dim_y=1, n_tasks=3):
    sizes = (n, dim_x), (n, dim_y), (m, dim_x), (m, dim_y)
    generator = rng(1)
    return [torch.randn(n_tasks, *size, dtype=torch.float64, generator=generator) for size in sizes]


def models():
    torch.manual_seed(0)
    return {
        "cnp": CNP(1, 2, dim_hidden=16).double(),
        "conv": ConvCNP(2, points_per_unit=8, channels=(6, 9), architecture="conv").double(),
        "unet": ConvCNP(2, points_per_unit=8, channels=(6, 8, 4)).double(),
    }


def near(a, b, atol=1e-7):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The chain rule.


@pytest.mark.parametrize(
    "order", ["random", "given", "left-to-right", torch.tensor([3, 0, 4, 1, 2])], ids=str
)
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("n", [4, 0])
def test_exact_conditionals_give_the_exact_joint(order, chunk_size, n):
    x, y, x_new, y_new = batch(n)
    got = ar_log_likelihood(gp, x, y, x_new, y_new, order=order, chunk_size=chunk_size, generator=rng())
    for row in range(3):
        mean, covariance = joint(x[row], y[row], x_new[row])
        near(got[row], MultivariateNormal(mean, covariance).log_prob(y_new[row, :, 0]))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("order", ["random", "left-to-right"])
def test_masked_points_are_not_there(order, chunk_size):
    x, y, x_new, y_new = batch()
    context, target = (
        torch.arange(4) < torch.tensor([[4], [2], [0]]),
        torch.rand(3, 5, generator=rng(2)) < 0.6,
    )
    wild = [torch.where(mask[..., None], part, 1e3) for part, mask in zip((x, y, x_new, y_new), (context, context, target, target), strict=True)]  # fmt: skip
    got = ar_log_likelihood(
        gp, *wild, context_mask=context, target_mask=target, order=order, chunk_size=chunk_size
    )
    for row in range(3):
        c, t = context[row], target[row]
        mean, covariance = joint(x[row, c], y[row, c], x_new[row, t])
        near(got[row], MultivariateNormal(mean, covariance).log_prob(y_new[row, t, 0]))


def test_samples_have_the_joint_mean_and_covariance():
    x, y, x_new, _ = batch(3, 4, n_tasks=2)
    samples = ar_sample(gp, x, y, x_new, 6000, order="random", generator=rng())
    for row in range(2):
        mean, covariance = joint(x[row], y[row], x_new[row])
        drawn = samples.y[:, row, :, 0]
        assert (drawn.mean(0) - mean).abs().max() < 0.08
        assert (drawn.T.cov() - covariance).abs().max() < 0.1
        near(samples.mean[row, :, 0], mean, 0.08)
        near(samples.variance[row, :, 0], covariance.diagonal(), 0.1)


# Prefix sums.


def definition(model, x, y, x_new, y_new, turns):
    """The loop: all targets are asked each time, so that a grid is that of the whole call."""
    value = 0
    for k, at in enumerate(turns):
        seen = turns[:k]
        predictive = model(torch.cat([x, x_new[:, seen]], 1), torch.cat([y, y_new[:, seen]], 1), x_new)
        value = value + predictive.log_prob(y_new)[:, at].sum(-1)
    return value


@pytest.mark.parametrize("name", ["cnp", "conv", "unet"])
@pytest.mark.parametrize("n", [4, 0])
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_all_factors_at_once_are_those_of_the_loop(name, n, chunk_size):
    model, args = models()[name], batch(n, dim_y=2)
    turns = [2, 0, 4, 3, 1]
    got = ar_log_likelihood(model, *args, order=torch.tensor(turns), chunk_size=chunk_size)
    near(got, definition(model, *args, turns))


@pytest.mark.parametrize("name", ["cnp", "conv", "unet"])
def test_one_target_is_the_ordinary_likelihood(name):
    model, (x, y, x_new, y_new) = models()[name], batch(m=1, dim_y=2)
    near(ar_log_likelihood(model, x, y, x_new, y_new), model.log_likelihood(x, y, x_new, y_new))


def test_masks_in_prefix_sums():
    x, y, x_new, y_new = batch(dim_y=2)
    context, target = (
        torch.arange(4) < torch.tensor([[4], [2], [0]]),
        torch.arange(5) < torch.tensor([[5], [3], [2]]),
    )
    for model in models().values():
        got = ar_log_likelihood(
            model, x, y, x_new, y_new, context_mask=context, target_mask=target, order="given"
        )
        x_wild = torch.where(target[..., None], x_new, -1e3)
        wild = ar_log_likelihood(
            model, x, y, x_wild, y_new, context_mask=context, target_mask=target, order="given"
        )
        near(got, wild)
    model = models()["cnp"]
    for row, (n, m) in enumerate(((4, 5), (2, 3), (0, 2))):
        one = slice(row, row + 1)
        got = ar_log_likelihood(
            model, x, y, x_new, y_new, context_mask=context, target_mask=target, order="given"
        )
        alone = ar_log_likelihood(
            model, x[one, :n], y[one, :n], x_new[one, :m], y_new[one, :m], order="given"
        )
        near(got[one], alone)


def test_a_subclass_with_a_forward_of_its_own_is_called():
    class Louder(CNP):
        def forward(self, *args, **options):
            predictive = super().forward(*args, **options)
            return Normal(predictive.loc + 1, predictive.scale)

    torch.manual_seed(0)
    args = batch()
    model = Louder(1, 1, dim_hidden=8).double()
    near(ar_log_likelihood(model, *args, order="given"), definition(model, *args, range(5)))


@pytest.mark.parametrize("name", ["cnp", "conv", "unet"])
def test_gradients_flow_to_the_model(name):
    model, args = models()[name], batch(dim_y=2)
    ar_log_likelihood(model, *args, order="given").sum().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and (p.grad != 0).any()
        for p in model.parameters()
    )


# Samples.


def called(model):
    return lambda *args, **options: model(*args, **options)


@pytest.mark.parametrize("order", ["given", "left-to-right", torch.tensor([2, 4, 0, 1, 3])], ids=str)
def test_sums_sample_as_calls_do(order):
    model, (x, y, x_new, _) = models()["cnp"], batch(dim_y=2)
    one, other = (
        ar_sample(each, x, y, x_new, 6, order=order, generator=rng()) for each in (model, called(model))
    )
    for got, want in zip(one, other, strict=True):
        near(got, want)


@pytest.mark.parametrize("name", ["cnp", "conv", "unet"])
def test_smooth_is_the_mean_given_the_whole_sample(name):
    model, (x, y, x_new, _) = models()[name], batch(dim_y=2)
    samples = ar_sample(model, x, y, x_new, 4, generator=rng())
    for s in range(4):
        again = model(torch.cat([x, x_new], 1), torch.cat([y, samples.y[s]], 1), x_new)
        near(samples.smooth[s], again.loc)
    same = ar_sample(model, x, y, x_new, 4, generator=rng())
    assert all(torch.equal(a, b) for a, b in zip(samples, same, strict=True))
    assert samples.y.shape == samples.smooth.shape == (4, 3, 5, 2) and samples.mean.shape == (3, 5, 2)
    assert not samples.y.requires_grad


def test_samples_come_in_the_targets_order():
    """A model that says x itself, without noise, shows where each value went."""

    def says_x(x, y, x_new, *, context_mask=None):
        return Normal(x_new, torch.full_like(x_new, 1e-9))

    _, _, x_new, _ = batch()
    empty = x_new[:, :0]
    for order in ("random", "left-to-right", torch.tensor([4, 2, 0, 3, 1])):
        samples = ar_sample(says_x, empty, empty, x_new, 2, order=order, generator=rng())
        for part in (samples.y[0], samples.smooth[1], samples.mean):
            near(part, x_new)


def test_moments_are_those_of_the_mixture():
    """The first target's prediction is certain; the second's mean is the first's draw."""

    def follows(x, y, x_new, *, context_mask=None):
        last = y[:, -1:] if y.shape[1] else torch.zeros_like(x_new[:, :1])
        return Normal(last.expand_as(x_new).clone(), torch.ones_like(x_new))

    empty = torch.zeros(1, 0, 1, dtype=torch.float64)
    samples = ar_sample(
        follows, empty, empty, torch.zeros(1, 2, 1, dtype=torch.float64), 500, order="given", generator=rng()
    )
    first = samples.y[:, 0, 0, 0]
    near(samples.mean[0, 1, 0], first.mean(), 1e-12)
    near(samples.variance[0, 1, 0], 1 + first.var(correction=0), 1e-12)
    near(samples.variance[0, 0, 0], torch.tensor(1.0).double(), 1e-12)


def test_no_targets():
    x, y, x_new, y_new = batch(m=0)
    for model in (gp, CNP(1, 1, dim_hidden=4).double()):
        assert ar_log_likelihood(model, x, y, x_new, y_new).tolist() == [0, 0, 0]
        assert ar_log_likelihood(model, x, y, x_new, y_new, chunk_size=3).tolist() == [0, 0, 0]
        assert ar_sample(model, x, y, x_new, 2).y.shape == (2, 3, 0, 1)


# The models.


@pytest.mark.parametrize("name", ["cnp", "conv", "unet"])
def test_the_convention(name):
    check_neural_process(models()[name], dim_x=1, dim_y=2)


def test_a_cnp_sums():
    model, (x, y, x_new, _) = models()["cnp"], batch(dim_y=2)
    total = model.encoder(torch.cat([x, y], -1)).sum(1, keepdim=True).expand(-1, 5, -1)
    mean, raw = model.decoder(torch.cat([total, x_new], -1)).chunk(2, -1)
    got = model(x, y, x_new)
    near(got.loc, mean, 1e-12)
    near(got.variance, 1e-6 + nn.functional.softplus(raw), 1e-12)
    layers = [
        len([m for m in part if isinstance(m, nn.Linear)]) for part in (CNP(1, 1).encoder, CNP(1, 1).decoder)
    ]
    assert layers == [4, 7]


def test_channels_of_a_convcnp_are_density_and_normalised_data():
    model, (x, y, x_new, _) = models()["conv"], batch(dim_y=2)
    seen = []
    model.network.register_forward_hook(lambda net, args, out: seen.append((args[0], out)))
    got = model(x, y, x_new)
    channels, out = seen[0]
    step, low = 1 / 8, float(min(x.min(), x_new.min()))
    grid = step * torch.arange(channels.shape[2], dtype=torch.float64)
    start = math.floor((low - 0.1) / step - 1 + 0.5) * step  # rounded, one step further
    starts = [start + k * step for k in (-1, 0, 1)]
    weights = [torch.exp(-0.5 * ((x - (grid + s)) * 8).square()) for s in starts]
    fits = [torch.allclose(channels[:, 0], w.sum(1), atol=1e-5) for w in weights]
    assert sum(fits) == 1
    w = weights[fits.index(True)]
    near(channels[:, 1:], (y.mT @ w) / (w.sum(1, keepdim=True) + 1e-4), 1e-5)
    at = grid + starts[fits.index(True)]
    assert at[0] <= low - 0.1 and at[-1] >= float(max(x.max(), x_new.max())) + 0.1
    read = torch.exp(-0.5 * ((x_new - at) * 8).square()) @ out.mT
    near(got.loc, read[..., :2], 1e-5)


@pytest.mark.parametrize("name", ["conv", "unet"])
def test_a_convcnp_moves_with_its_inputs(name):
    model, (x, y, x_new, _) = models()[name], batch(dim_y=2)
    got = model(x, y, x_new)
    for steps in (1, 5, -8):
        moved = model(x + steps / 8, y, x_new + steps / 8)
        near(moved.loc, got.loc, 1e-6)
        near(moved.scale, got.scale, 1e-6)


def test_a_point_beyond_the_receptive_field_has_no_effect():
    model, (x, y, x_new, _) = models()["conv"], batch(dim_y=2)
    far = torch.cat([x, torch.full((3, 1, 1), 30.0, dtype=torch.float64)], 1)
    one, other = (
        model(far, torch.cat([y, value * torch.ones_like(y[:, :1])], 1), x_new) for value in (-2, 5)
    )
    near(one.loc, other.loc, 1e-6)


def test_a_grid_is_a_multiple_of_the_stride():
    model = ConvCNP(1, channels=(4, 4, 4, 4, 4, 4)).double()
    sizes = []
    model.network.register_forward_hook(lambda net, args, out: sizes.append((args[0].shape[2], out.shape[2])))
    for spread in (0.01, 1.0, 3.7):
        x = torch.linspace(-spread, spread, 5, dtype=torch.float64)[None, :, None]
        model(x, x, x)
    assert all(a == b and a % 64 == 0 for a, b in sizes) and len(set(sizes)) == 3


# What does not fit.


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("backwards", "order must be one of 'random', 'given', 'left-to-right'"),
        (torch.tensor([0, 1, 1, 3, 4]), "order must be a permutation of 0 to 4, got one in which 1 repeats"),
        (torch.tensor([0, 1, 2, 3, 5]), "5 is outside"),
        (torch.tensor([0, 1]), r"order must be a permutation of shape \(5,\) or \(3, 5\)"),
    ],
    ids=str,
)
def test_orders_that_are_none(as_a_user, order, says):
    with pytest.raises(ValueError, match=says):
        ar_log_likelihood(gp, *batch(), order=order)
    with pytest.raises(ValueError, match=says):
        ar_sample(gp, *batch()[:3], 2, order=order)


def test_models_that_do_not_fit(as_a_user):
    args = batch()

    def correlated(x, y, x_new, *, context_mask=None):
        return MultivariateNormal(x_new[..., 0], torch.eye(x_new.shape[1], dtype=x.dtype))

    def latent(x, y, x_new, *, context_mask=None):
        return Normal(x_new.expand(2, -1, -1, -1), 1.0)

    for chunk_size in (None, 4):
        with pytest.raises(ValueError, match="it is joint already"):
            ar_log_likelihood(correlated, *args, chunk_size=chunk_size)
        with pytest.raises(
            ValueError, match=r"must return a Normal of shape \(\d, 1, 1\), got Normal of shape \(2, "
        ):
            ar_log_likelihood(latent, *args, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=r"must return a Normal of shape .* got Tensor"):
        ar_sample(lambda x, y, x_new, context_mask=None: x_new, *args[:3], 2)
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got 0"):
        ar_sample(gp, *args[:3], 0)
    with pytest.raises(ValueError, match="chunk_size must be"):
        ar_log_likelihood(gp, *args, chunk_size=0)


def test_grids_that_cannot_be(as_a_user):
    x, y, x_new, _ = batch()
    model = ConvCNP(1, architecture="conv").double()
    with pytest.raises(
        ValueError, match=r"x must span few units: from .* to 1e\+06 the grid needs .* rescale x"
    ):
        model(torch.cat([x, torch.full_like(x[:, :1], 1e6)], 1), torch.cat([y, y[:, :1]], 1), x_new)
    with pytest.raises(ValueError, match="must have a real point, got none"):
        model(x[:, :0], y[:, :0], x_new[:, :0])
    with pytest.raises(ValueError, match=r"x_context must have shape \(tasks, points, 1\), got \(3, 4, 2\)"):
        model(x.repeat(1, 1, 2), y, x_new)
    for options in (
        {"kernel_size": 4},
        {"channels": ()},
        {"points_per_unit": 0},
        {"margin": -1},
        {"architecture": "vit"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ConvCNP(1, **options)


def test_left_to_right_is_lexicographic():
    x_new = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    visited = []

    def watches(x, y, at, *, context_mask=None):
        visited.append(at[0, 0].tolist())
        return Normal(at[..., :1], torch.ones_like(at[..., :1]))

    ar_log_likelihood(watches, x_new[:, :0], x_new[:, :0, :1], x_new, x_new[..., :1], order="left-to-right")
    assert visited == [[0.0, -1.0], [0.0, 1.0], [1.0, 0.0]]


def test_orders_of_each_task():
    args = batch(m=3)
    turns = torch.tensor(list(itertools.permutations(range(3)))[1:4])
    torch.manual_seed(0)
    model = CNP(1, 1, dim_hidden=8).double()
    got = ar_log_likelihood(model, *args, order=turns)
    for row in range(3):
        one = [part[row : row + 1] for part in args]
        near(got[row : row + 1], definition(model, *one, turns[row].tolist()))
