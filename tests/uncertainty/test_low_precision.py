"""Low precision, other units and other modes, where no conformance check goes: by paper."""

import copy

import pytest
import torch
from torch import nn

from posterity.testing._low_precision import check_low_precision, relative_error
from posterity.uncertainty import (
    CNP,
    LBANP,
    SINP,
    ConvCNP,
    FoRDELoss,
    RepulsiveEnsemble,
    SampledLaplace,
    ar_sample,
    attention_coefficients,
    fit_input_components,
    input_gradient_repulsion,
    sample_posterior,
    self_normalized_weights,
)

NARROW = [torch.bfloat16, torch.float16]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def members(n=3):
    torch.manual_seed(0)
    return RepulsiveEnsemble(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), n)


COMPONENTS, SCALES = fit_input_components(normal(20, 5, seed=1))
JACOBIAN, CURVATURE = normal(9, 2, 4), 0.3 * torch.eye(2, dtype=torch.float64).repeat(9, 1, 1) + 0.1


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        (input_gradient_repulsion, (normal(4, 60, 5).requires_grad_(),)),
        (
            lambda u, c, s: input_gradient_repulsion(u, components=c, scales=s),
            (normal(4, 60, 5).requires_grad_(), COMPONENTS, SCALES),
        ),
        (fit_input_components, (normal(300, 5),)),
        (self_normalized_weights, tuple(9 * normal(50, 3, seed=k) for k in range(3))),
        (
            attention_coefficients,
            (normal(300, 3), normal(3, 3, 3, seed=1).requires_grad_(), normal(3, 3, 3, seed=2)),
        ),
        *(
            (
                lambda j, h, p, o=o, s=s: sample_posterior(j, h, p, 6, objective=o, solver=s, generator=rng()),
                (JACOBIAN, CURVATURE, torch.full((4,), 0.5, dtype=torch.float64)),
            )
            for o, s in (("low-variance", "cg"), ("standard", "cholesky"))
        ),
    ],
    ids=["forde", "forde-projected", "forde-components", "si-np", "gmogp", "sampled-laplace-cg",
         "sampled-laplace-dense"],
)  # fmt: skip
def test_functions_round_their_result_only(as_a_user, call, inputs):
    check_low_precision(call, None, inputs, slack=4, gradient=any(x.requires_grad for x in inputs))


def test_probabilities_of_an_ensemble_are_as_wide_as_its_input(as_a_user):
    x = torch.randn(20, 4, generator=rng())
    check_low_precision(lambda net, x: net.predict_proba(x), members(), (x,), slack=8)


def sums():
    model = CNP(1, 1, dim_hidden=16, n_encoder_layers=1, n_decoder_layers=1)
    with torch.no_grad():  # each of many points adds little
        for parameter in model.encoder[-1].parameters():
            parameter.mul_(0.05)
    return model


MODELS = {
    "ar-cnp-sums": sums,
    "ar-cnp-grid": lambda: ConvCNP(1, points_per_unit=16, channels=(8,), architecture="conv"),
}


def tasks(n, m, far=0.0):
    x = far + torch.rand(2, n + m, 1, dtype=torch.float64, generator=rng())
    y = normal(2, n + m, 1)
    return x[:, :n], y[:, :n], x[:, n:], y[:, n:]


def test_a_sum_goes_on_growing_point_by_point(as_a_user):
    torch.manual_seed(0)
    x, y, x_new, _ = tasks(1, 300)

    def last(net, *tensors):  # given all draws
        return ar_sample(net, *tensors, n_samples=1, order="given", generator=rng()).smooth

    check_low_precision(last, sums(), (x, y, x_new), slack=8, gradient=False)


def test_a_grid_away_from_zero_keeps_its_steps(as_a_user):
    torch.manual_seed(0)
    check_low_precision(
        lambda net, *tensors: net(*tensors).loc, MODELS["ar-cnp-grid"](), tasks(20, 6, far=30.0)[:3],
        slack=8, follows=False,
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_one_generator_draws_the_same_function_in_every_precision(as_a_user, model):
    torch.manual_seed(0)
    x, y, x_new, _ = tasks(20, 6)

    def draws(net, *tensors):
        return tuple(ar_sample(net, *tensors, n_samples=4, order="given", generator=rng()))

    check_low_precision(draws, MODELS[model](), (x, y, x_new), slack=32, gradient=False)


@pytest.mark.parametrize("covariance", ["cholesky", "lowrank"], ids=lambda name: f"lbanp-{name}")
def test_joint_predictions_are_factorised_in_single_precision(as_a_user, covariance):
    torch.manual_seed(0)
    model = LBANP(1, 1, d_model=8, n_layers=1, n_heads=2, covariance=covariance, rank=3).eval()
    check_low_precision(
        lambda net, *tensors: net.log_likelihood(*tensors), model, tasks(6, 5), slack=32, gradient=False
    )
    low = [x.bfloat16() for x in tasks(6, 5)]
    assert copy.deepcopy(model).bfloat16()(*low[:3]).covariance_matrix.dtype == torch.float32


@pytest.mark.parametrize("dtype", NARROW, ids=["si-np-bfloat16", "si-np-float16"])
def test_the_mean_of_many_embeddings_does_not_overflow(as_a_user, dtype):
    torch.manual_seed(0)
    model = SINP(1, 1, dim_hidden=8, dim_latent=4)
    with torch.no_grad():
        model.prior_encoder.embed[-1].bias.fill_(60.0)
    x, y, _, _ = (part.to(dtype) for part in tasks(2000, 0))
    exact = model.prior(x.float(), y.float()).loc
    assert relative_error(model.to(dtype).prior(x, y).loc, exact) < 8 * torch.finfo(dtype).eps


def fitted(likelihood, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    net[0].bias.requires_grad_(False)
    x = torch.randn(20, 3, generator=rng()).to(dtype)
    y = x[:, :2].clone() if likelihood == "regression" else (x.sum(1) > 0).long()
    return SampledLaplace(net, likelihood, n_samples=4, n_em_steps=2, generator=rng()), x, y


KINDS = pytest.mark.parametrize(
    "likelihood", ["regression", "classification"], ids=lambda kind: f"sampled-laplace-{kind}"
)


@KINDS
def test_a_network_of_narrow_weights_has_the_posterior_of_its_float32_twin(as_a_user, likelihood):
    low, x, y = fitted(likelihood, torch.bfloat16)
    twin = SampledLaplace(
        copy.deepcopy(low.model).float(), likelihood, n_samples=4, n_em_steps=2, generator=rng()
    )
    twin.fit(x.float(), y.float() if likelihood == "regression" else y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low.fit(x, y)
        assert low.prior_precision_ == twin.prior_precision_
        for ours, theirs in zip(low.predict(x), twin.predict(x.float()), strict=True):
            assert ours.dtype == torch.bfloat16
            assert relative_error(ours, theirs) < torch.finfo(ours.dtype).eps
        assert low.log_likelihood(x, y).dtype == low.sample(x).dtype == torch.bfloat16
    assert next(low.model.parameters()).dtype == torch.bfloat16


@KINDS
def test_a_posterior_fitted_in_inference_mode_is_that_of_any_other(as_a_user, likelihood):
    laplace, x, y = fitted(likelihood)
    samples = laplace.fit(x, y).samples_
    with torch.inference_mode():
        laplace.generator = rng()
        again = laplace.fit(x.clone(), y.clone()).samples_
        laplace.fit([(x.clone(), y.clone())]).sample(x.clone())
    assert not again.is_inference()
    assert torch.equal(again, samples)


@pytest.mark.parametrize("c", [1e-12, 1e12], ids=["sampled-laplace-small", "sampled-laplace-large"])
def test_draws_know_no_unit_of_the_log_likelihood(c):
    for objective in ("low-variance", "standard"):
        found, moved = (
            sample_posterior(JACOBIAN, by * CURVATURE, by * 0.5, 5, objective=objective, generator=rng())
            for by in (1.0, c)
        )
        torch.testing.assert_close(moved * c**0.5, found)


@pytest.mark.parametrize("c", [1e-12, 1e12], ids=["forde-small", "forde-large"])
def test_only_directions_of_input_gradients_count_whatever_their_unit(c):
    u = normal(4, 6, 5)
    torch.testing.assert_close(input_gradient_repulsion(c * u), input_gradient_repulsion(u))
    found, moved = (input_gradient_repulsion(u, components=COMPONENTS, scales=by * SCALES) for by in (1.0, c))
    torch.testing.assert_close(moved, found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: f"forde-{m.__name__}")
def test_a_validation_loss_has_the_value_of_training(as_a_user, mode):
    ensemble, x, y = members(), torch.randn(8, 4, generator=rng()), torch.arange(8) % 3
    with mode():
        loss = FoRDELoss(*fit_input_components(torch.randn(9, 4, generator=rng(1))))
        found = loss(ensemble, x.clone(), y.clone())
    expected = loss(ensemble, x, y)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())
    expected.backward()
