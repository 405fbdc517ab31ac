"""SI-NP: weights, the gradient of the likelihood by quadrature, and the convention."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from posterity.testing import check_neural_process
from posterity.uncertainty import SINP, self_normalized_weights


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**options):
    torch.manual_seed(0)
    return SINP(1, 1, **{"dim_hidden": 12, "dim_latent": 4, **options}).double()


def batch(n=4, m=5, n_tasks=3):
    generator = rng(1)
    return [torch.randn(n_tasks, size, 1, dtype=torch.float64, generator=generator) for size in (n, n, m, m)]


def near(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Weights.


@pytest.mark.parametrize("level", [0.0, -1e5])
def test_weights_are_normalised_products_of_densities(level):
    values = torch.randn(3, 6, 2, dtype=torch.float64, generator=rng())
    # a power of two more keeps the sums exact at any level
    likelihood, prior, proposal = values[0], values[1], values[2]
    weights, baseline = self_normalized_weights((likelihood + level).requires_grad_(), prior, proposal)
    shifted = (likelihood + level) - level
    product = shifted.exp() * prior.exp() / proposal.exp()
    near(weights, product / product.sum(0), 1e-12 if level == 0 else 1e-10)
    ratio = prior.exp() / proposal.exp()
    near(baseline, ratio / ratio.sum(0))
    near(weights.sum(0), torch.ones(2, dtype=torch.float64))
    assert not weights.requires_grad and not baseline.requires_grad


def test_the_prior_as_proposal_has_equal_baselines():
    likelihood, prior = torch.randn(2, 5, 3, dtype=torch.float64, generator=rng())
    near(
        self_normalized_weights(likelihood, prior, prior)[1],
        torch.full((5, 3), 0.2, dtype=torch.float64),
        1e-16,
    )


def test_weights_that_cannot_be(as_a_user):
    zero = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"log_prior must have the shape .* got \(2, 2\) and \(3, 2\)"):
        self_normalized_weights(zero, zero[:2], zero)
    with pytest.raises(ValueError, match="log_proposal must have the shape"):
        self_normalized_weights(zero, zero, zero[:, :1])
    with pytest.raises(ValueError, match="must be finite for some particle, is -inf at best in task 1"):
        self_normalized_weights(torch.tensor([[0.0, -math.inf]] * 3), zero, zero)
    with pytest.raises(ValueError, match=r"log_prior - log_proposal must be finite .* in task 0"):
        self_normalized_weights(zero, torch.full((3, 2), -math.inf), torch.full((3, 2), -math.inf))


# The objective.


def test_one_particle_of_the_prior_trains_the_decoder_alone():
    model, args = small(proposal="prior", n_particles=1), batch()
    model.loss(*args, generator=rng()).backward()
    assert all((p.grad == 0).all() for p in model.prior_encoder.parameters())
    got = {name: p.grad for name, p in model.decoder.named_parameters()}
    prior = model.prior(*args[:2])
    z = (prior.loc + prior.scale * torch.randn(1, 3, 4, dtype=torch.float64, generator=rng())).detach()
    x, y = torch.cat([args[0], args[2]], 1), torch.cat([args[1], args[3]], 1)
    model.zero_grad()
    (-model.decoder(x, z).log_prob(y).sum((0, 2, 3)) / 9).mean().backward()
    for name, p in model.decoder.named_parameters():
        near(p.grad, got[name])


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("proposal", ["learned", "prior"])
def test_the_gradient_is_that_of_the_likelihood(proposal, control_variate):
    """Many particles of a one-dimensional z against quadrature of the integral over z.

    That of a learned proposal is of its cross-entropy to the posterior of z.
    """
    torch.manual_seed(3)
    model = SINP(1, 1, dim_hidden=3, dim_latent=1, n_particles=4_000, proposal=proposal, n_encoder_layers=1,
                 n_decoder_layers=1, min_scale=0.5, control_variate=control_variate).double()  # fmt: skip
    model.decoder.body = nn.Sequential(nn.Tanh(), nn.Linear(3, 2)).double()
    args = batch(2, 3, n_tasks=2)
    x, y = torch.cat([args[0], args[2]], 1), torch.cat([args[1], args[3]], 1)

    # the decoder has kinks in z: a fine grid, not Gauss-Hermite
    nodes = torch.linspace(-7, 7, 8001, dtype=torch.float64)[:, None]
    mass = Normal(0.0, 1.0).log_prob(nodes) + math.log(14 / 8000)
    prior = model.prior(*args[:2])
    z = prior.loc + prior.scale * nodes[..., None]
    each = model.decoder(x, z).log_prob(y).sum((2, 3)) + mass
    target, parts = -each.logsumexp(0), [model.prior_encoder, model.decoder]
    if proposal == "learned":
        log_proposal = model.propose(x, y).log_prob(z.detach()).sum(-1)
        target = target - (each.detach().softmax(0) * log_proposal).sum(0)
        parts.append(model.proposal_encoder)
    wanted = [p for part in parts for p in part.parameters()]
    truth = torch.autograd.grad((target / 5).mean(), wanted)

    repeats = [torch.autograd.grad(model.loss(*args, generator=rng(k)), wanted) for k in range(24)]
    for name, parts, exact in zip((p.shape for p in wanted), zip(*repeats, strict=True), truth, strict=True):
        drawn = torch.stack(parts)
        error = drawn.std(0) / math.sqrt(len(drawn)) + 1e-9
        assert ((drawn.mean(0) - exact).abs() <= 3 * error).all(), name
    calm = torch.stack([torch.cat([g.flatten() for g in each]) for each in repeats]).std(0).mean()
    if control_variate:
        model.control_variate = False
        loud = [torch.autograd.grad(model.loss(*args, generator=rng(k)), wanted) for k in range(24)]
        loud = torch.stack([torch.cat([g.flatten() for g in each]) for each in loud]).std(0).mean()
        assert calm < loud


def test_every_part_learns():
    model = small()
    model.loss(*batch(), generator=rng()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad != 0).any(), name
    assert (
        model.last_ess_.shape == (3,)
        and ((model.last_ess_ >= 1 - 1e-9) & (model.last_ess_ <= 8 + 1e-9)).all()
    )


def test_no_gradient_goes_through_the_particles():
    """With it, the prior as proposal would be paid for shrinking: log p(z) = -log sigma + constant."""
    model, args = small(proposal="prior", n_particles=64, control_variate=False), batch()
    decoder_free = model.decoder
    decoder_free.from_z.weight.data.zero_()  # z explains nothing: all weights are equal
    grads = []
    for seed in range(80):
        model.zero_grad()
        model.loss(*args, generator=rng(seed)).backward()
        grads.append(model.prior_encoder.log_variance.bias.grad.clone())
    drawn = torch.stack(grads)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert (drawn.mean(0).abs() < 4 * error).all()


@pytest.mark.parametrize("proposal", ["learned", "prior"])
def test_the_convention(proposal):
    torch.manual_seed(0)
    model = SINP(2, 3, dim_hidden=12, dim_latent=4, proposal=proposal)
    check_neural_process(model, dim_x=2, dim_y=3, latent=True)


def test_one_z_serves_all_targets():
    model, (x, y, x_new, _) = small(), batch()
    both = model(x, y, torch.cat([x_new, x_new], 1), n_samples=6, generator=rng())
    near(both.loc[:, :, :5], both.loc[:, :, 5:])
    assert both.loc.shape == (6, 3, 10, 1) and both.loc[:, 0, 0, 0].unique().numel() == 6


def test_log_likelihood_averages_densities_outside_the_sum():
    model, (x, y, x_new, y_new) = small(), batch()
    each = model(x, y, x_new, n_samples=16, generator=rng()).log_prob(y_new).sum((2, 3))
    got = model.log_likelihood(x, y, x_new, y_new, n_samples=16, generator=rng())
    near(got, each.exp().mean(0).log(), 1e-10)


def test_prior_and_proposal_pool_by_the_mean_and_forget_padding():
    model, (x, y, _, _) = small(), batch()
    real = torch.arange(4) < torch.tensor([[4], [2], [0]])
    for make in (model.prior, model.propose):
        masked = make(torch.where(real[..., None], x, 1e3), y, real)
        near(masked.loc[1], make(x[1:2, :2], y[1:2, :2]).loc[0])
        near(masked.scale[2], make(x[:1, :0], y[:1, :0]).scale[0])
        twice = make(torch.cat([x, x], 1), torch.cat([y, y], 1))
        near(twice.loc, make(x, y).loc)
    assert not torch.equal(model.prior(x, y).loc, model.propose(x, y).loc)


def test_layers_and_scales():
    model = SINP(1, 1)
    linears = [
        sum(isinstance(m, nn.Linear) for m in part.modules()) for part in (model.prior_encoder, model.decoder)
    ]
    assert linears == [4 + 2, 2 + 5 + 1]  # the decoder's first layer is two: of x and of z
    scale = model(*[part.float() for part in batch()[:3]]).scale
    assert scale.min() > 0.1
    one = small(min_scale=1.0)(*batch()[:3])
    near(one.scale, torch.ones_like(one.scale))
    prior = model.prior(*[part.float() for part in batch()[:2]])
    assert isinstance(prior, Normal) and prior.loc.shape == (3, 128)


def test_same_generator_same_numbers():
    model, args = small(), batch()
    assert torch.equal(model.loss(*args, generator=rng(5)), model.loss(*args, generator=rng(5)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_particles": 0}, "n_particles must be an integer of at least 1"),
        ({"proposal": "posterior"}, "proposal must be one of 'learned', 'prior', got 'posterior'"),
        ({"min_scale": 0.0}, r"min_scale must be in \(0, 1\], got 0.0"),
        ({"min_scale": 1.5}, "min_scale must be in"),
        ({"dim_latent": -1}, "dim_latent must be"),
    ],
)
def test_options_that_do_not_fit(as_a_user, options, says):
    with pytest.raises(ValueError, match=says):
        SINP(1, 1, **options)


def test_calls_that_do_not_fit(as_a_user):
    model, (x, y, x_new, y_new) = small(proposal="prior"), batch()
    with pytest.raises(ValueError, match='propose needs proposal="learned"'):
        model.propose(x, y)
    for call in (
        lambda: model(x, y, x_new, n_samples=0),
        lambda: model.log_likelihood(x, y, x_new, y_new, n_samples=0),
    ):
        with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got 0"):
            call()
    with pytest.raises(ValueError, match=r"y_target must have shape \(3, 5, 1\)"):
        model.loss(x, y, x_new, y_new[:, :2])
    with pytest.raises(ValueError, match="x_context must be finite"):
        model.prior(x * math.inf, y)
