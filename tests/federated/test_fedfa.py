"""FedFA: what the layer does to features, by how much, and what the server makes of the clients' statistics."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from posterity.federated import FFALayer, feature_statistics, fedfa_aggregate, fedfa_strategy, insert_ffa
from posterity.testing import check_layer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def test_it_is_a_layer(as_a_user):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), FFALayer(6))
    check_layer(net, features(4, 3, 5, 5, dtype=torch.float32), shape=(4, 6, 5, 5))


@pytest.mark.parametrize("shape", [(6, 3, 9), (6, 3, 5, 4), (6, 3, 2, 3, 4)])
def test_statistics_are_those_of_positions(shape):
    x = features(*shape)
    mu, sigma = feature_statistics(x, eps=0.5)
    assert torch.allclose(mu, x.flatten(2).mean(2))
    assert torch.allclose(sigma, (x.flatten(2).std(2) ** 2 + 0.5).sqrt())


@pytest.mark.parametrize("layer", [FFALayer(3).eval(), FFALayer(3, p=0.0)])
def test_in_eval_mode_and_without_a_chance_it_is_the_identity_and_learns_nothing(layer):
    before, x = state(layer), features(4, 3, 5, 5)
    assert torch.equal(layer(x), x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_what_comes_out_standardised_is_plus_or_minus_what_went_in_standardised():
    x = features(5, 4, 6, 6)
    layer = FFALayer(4, p=1.0, eps=1e-12).double()

    def standardised(x):
        mu, sigma = feature_statistics(x, eps=1e-12)
        return (x - mu[..., None, None]) / sigma[..., None, None]

    before, after = standardised(x), standardised(layer(x, generator()))
    sign = torch.sign((before * after).sum((2, 3), keepdim=True))
    assert torch.allclose(after, sign * before, atol=1e-9)


def test_means_and_deviations_are_jittered_as_much_as_the_equation_says():
    """Mean of the new mean is mu, its variance (1 + gamma) var(mu); the same of the deviation."""
    torch.manual_seed(0)
    x = features(3, 2, 4, 4) * torch.tensor([0.5, 2.0])[:, None, None] + features(3, 2, 1, 1, seed=1)
    layer = FFALayer(2, p=1.0).double()
    layer.client_var_mean.copy_(torch.tensor([0.2, 3.0]))
    layer.client_var_std.copy_(torch.tensor([1.5, 0.1]))
    mu, sigma = feature_statistics(x)
    draws, g = 4000, generator(1)
    out = torch.stack([layer(x, g) for _ in range(draws)])
    mean = out.flatten(3).mean(3)
    # alpha over sigma is the slope of the output on the input
    centred = (x - mu[..., None, None]).flatten(2)
    alpha = sigma * (out.flatten(3) * centred).sum(3) / (centred**2).sum(2)
    for new, statistic, variance in ((mean, mu, layer.client_var_mean), (alpha, sigma, layer.client_var_std)):
        a = 1 / (1 + 1 / variance)
        want = (1 + 2 * a / a.sum()) * statistic.var(0)
        assert ((new.mean(0) - statistic).abs() < 5 * (want / draws).sqrt()).all()
        assert ((new.var(0) / want - 1).abs() < 5 * math.sqrt(2 / draws)).all()
    # samples, channels, mean and deviation have draws of their own
    drawn = torch.cat([(mean - mu).flatten(1), (alpha - sigma).flatten(1)], 1)
    rest = torch.corrcoef(drawn.T) - torch.eye(12)
    assert rest.abs().max() < 5 / math.sqrt(draws)


def gammas(layer, v):
    """Return gamma of each channel, from statistics of unit variance over the batch."""
    layer.client_var_mean.copy_(torch.as_tensor(v))
    mu = torch.tensor([[-1.0], [1.0]]).expand(2, len(v)) / math.sqrt(2)
    return layer.augmentation_std(mu, mu)[0] ** 2 / (1 + layer.eps) - 1


def test_weights_of_channels_sum_to_their_number_and_grow_with_the_variance_over_clients():
    layer = FFALayer(4, eps=1e-9)
    for equal in (1e-3, 1.0, 50.0):
        assert torch.allclose(gammas(layer, [equal] * 4), torch.ones(4), atol=1e-5)
    found = gammas(layer, [0.0, 0.5, 2.0, 9.0])
    assert found.sum().item() == pytest.approx(4, rel=1e-5)
    assert (found.diff() > 0).all()
    a = torch.tensor([0.0, 0.5 / 1.5, 2 / 3, 0.9])
    assert torch.allclose(found, 4 * a / a.sum(), atol=1e-5)


def test_running_statistics_follow_the_batches_in_which_it_acted():
    layer, g = FFALayer(2, p=0.4, momentum=0.9), generator(3)
    mean, std, acted = torch.zeros(2), torch.ones(2), 0
    for k in range(60):
        x = features(4, 2, 3, 3, seed=k, dtype=torch.float32)
        if not torch.equal(layer(x, g), x):
            mu, sigma = feature_statistics(x)
            mean, std, acted = 0.9 * mean + 0.1 * mu.mean(0), 0.9 * std + 0.1 * sigma.mean(0), acted + 1
    assert 12 <= acted <= 36, "once a batch, with chance 0.4"
    assert torch.allclose(layer.running_mean, mean, atol=1e-6)
    assert torch.allclose(layer.running_std, std, atol=1e-6)


def test_a_batch_of_one_is_jittered_by_eps_alone_and_an_empty_one_by_nothing():
    layer = FFALayer(3, p=1.0)
    x = features(1, 3, 4, 4, dtype=torch.float32)
    out = layer(x, generator())
    assert torch.isfinite(out).all() and torch.allclose(out, x, atol=0.05)
    before = state(layer)
    assert layer(x[:0]).shape == (0, 3, 4, 4)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_gradients_are_those_of_the_whole_expression():
    layer = FFALayer(2, p=1.0, eps=1e-3).double()
    x = features(3, 2, 4).requires_grad_()

    def fixed(x):
        return copy.deepcopy(layer)(x, generator(4))

    assert torch.autograd.gradcheck(fixed, x)
    assert torch.autograd.gradgradcheck(fixed, x)


def test_channels_last_are_the_same_channels():
    x = features(4, 5, 3)  # tokens
    tokens, maps = FFALayer(3, p=1.0, channel_dim=-1).double(), FFALayer(3, p=1.0).double()
    assert torch.equal(tokens(x, generator()), maps(x.movedim(-1, 1), generator()).movedim(1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_features_are_those_of_float32_rounded(dtype):
    layer = FFALayer(3, p=1.0)
    x = (300 * features(64, 3, 16, 16, dtype=torch.float32) + 2000).to(dtype)
    narrow, wide = copy.deepcopy(layer).to(dtype), copy.deepcopy(layer)
    out = narrow(x, generator())
    assert out.dtype == dtype and narrow.running_mean.dtype == torch.float32
    assert torch.equal(out, wide(x.float(), generator()).to(dtype))
    assert torch.equal(narrow.running_mean, wide.running_mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = copy.deepcopy(layer)(x, generator())
    assert mixed.dtype == dtype and torch.equal(mixed, out)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), FFALayer(4, p=1.0), nn.Flatten(), nn.LazyLinear(2)
    )


def sent(n=3):
    clients = []
    for k in range(n):
        net = network()
        net(k + 1 + features(5, 1, 6, 6, seed=k, dtype=torch.float32))
        with torch.no_grad():
            net[0].weight += k
        clients.append(state(net))
    return clients


def test_the_server_sends_weighted_means_and_variances_over_clients():
    states, weights = sent(), [1.0, 2.0, 5.0]
    back = fedfa_aggregate(states, weights)
    for name, value in back.items():
        if "client_var" in name or "num_batches" in name:
            continue
        want = sum(w / 8 * s[name] for w, s in zip(weights, states, strict=True))
        assert torch.allclose(value, want, atol=1e-6), name
    for which in ("mean", "std"):
        values = torch.stack([s[f"2.running_{which}"] for s in states])
        want = ((values - values.mean(0)) ** 2).sum(0) / 2
        assert torch.allclose(back[f"2.client_var_{which}"], want, rtol=1e-4)
    assert back["1.num_batches_tracked"] == 1
    assert "1.client_var_mean" not in back, "batch norm has running means, and no layer of ours"
    uniform, turned = fedfa_aggregate(states), fedfa_aggregate(states[::-1])
    assert all(torch.allclose(uniform[name], turned[name], atol=1e-6) for name in uniform)


def test_equal_clients_have_no_variance_and_the_other_variances_are_those_named():
    states = sent()
    same = fedfa_aggregate([states[1]] * 3)
    assert torch.allclose(same["2.client_var_mean"], torch.zeros(4), atol=1e-9)
    scalar = fedfa_aggregate(states, client_variance="scalar")["2.client_var_std"]
    every = torch.stack([s["2.running_std"] for s in states]).flatten()
    assert torch.allclose(scalar, every.var().expand(4), rtol=1e-5)
    left = fedfa_aggregate(states, client_variance="none")
    assert torch.equal(left["2.client_var_mean"], torch.ones(4))
    with pytest.warns(UserWarning, match="one client"):
        assert fedfa_aggregate(states[:1])["2.client_var_mean"].tolist() == [0] * 4


def test_what_the_server_sends_can_be_loaded_and_trained_on():
    net = network()
    net(features(5, 1, 6, 6, dtype=torch.float32))
    net.load_state_dict(fedfa_aggregate(sent()))
    assert torch.isfinite(net.train()(features(5, 1, 6, 6, dtype=torch.float32))).all()


def test_layers_are_put_after_named_modules_of_a_copy_that_computes_the_same():
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU()), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.LazyLinear(2)
    )
    x = features(2, 1, 8, 8, dtype=torch.float32)
    net(x)
    twin = insert_ffa(net, ["0", "1"], sample_input=x, p=1.0)
    assert [m.num_features for m in twin.modules() if isinstance(m, FFALayer)] == [5, 7]
    assert not any(isinstance(m, FFALayer) for m in net.modules())
    assert torch.equal(twin.eval()(x), net.eval()(x))
    assert not torch.equal(twin.train()(x), net(x))


@pytest.mark.parametrize("after", [["0", "0.1", "1"], ["1", "0.1", "0", "0"]])
def test_a_module_inside_another_has_a_layer_too(after):
    net = nn.Sequential(nn.Sequential(nn.Conv2d(1, 5, 3), nn.Conv2d(5, 6, 1)), nn.Conv2d(6, 7, 3))
    x = features(2, 1, 8, 8, dtype=torch.float32)
    twin = insert_ffa(net, after, sample_input=x, p=1.0)
    kinds = [type(m).__name__ for m in twin.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == ["Conv2d", "Conv2d", "FFALayer", "FFALayer", "Conv2d", "FFALayer"]
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_flower_does_what_the_function_does(replies):
    states = sent()
    arrays, metrics = fedfa_strategy(fraction_evaluate=0.0).aggregate_train(1, replies(states))
    want = fedfa_aggregate(states)
    back = arrays.to_torch_state_dict()
    assert back.keys() == want.keys()
    for name, value in back.items():
        assert value.dtype == want[name].dtype and torch.allclose(value, want[name]), name
    assert metrics["loss"] == pytest.approx(1.0)
    assert fedfa_strategy(fraction_evaluate=0.0).aggregate_train(1, []) == (None, None)


def test_without_flower_the_command_that_installs_it_is_said(monkeypatch):
    for name in ("flwr", "flwr.serverapp", "flwr.serverapp.strategy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "posterity\[federated\]"'):
        fedfa_strategy()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: FFALayer(0), "num_features must be an integer of at least 1"),
        (lambda: FFALayer(3, p=1.5), r"p must be in \[0.0, 1.0\]"),
        (lambda: FFALayer(3, momentum=1.0), "momentum"),
        (lambda: FFALayer(3, eps=0.0), "eps must be greater than 0"),
        (lambda: FFALayer(3)(torch.ones(2, 4, 5, 5)), r"3 channels at 1 for FFALayer, got \(2, 4, 5, 5\)"),
        (lambda: FFALayer(3, p=1.0)(torch.ones(2, 3, 1, 1)), r"FFALayer.*two positions, got \(2, 3, 1, 1\)"),
        (lambda: FFALayer(3)(torch.ones(2, 3)), "batch, channels and spatial"),
        (lambda: FFALayer(3)(torch.ones(2, 3, 4, dtype=torch.long)), "x must be a floating-point"),
        (lambda: FFALayer(3).augmentation_std(torch.ones(2, 4), torch.ones(2, 3)), r"mu must be \(batch, 3\)"),
        (lambda: feature_statistics(torch.ones(2, 3)), "two positions"),
        (lambda: fedfa_aggregate([]), "states must hold at least one"),
        (lambda: fedfa_aggregate([{"a": torch.ones(1)}, {}]), "same keys"),
        (lambda: fedfa_aggregate(sent(), [0.0, 0.0, 0.0]), "not all be 0"),
        (lambda: fedfa_aggregate(sent(), client_variance="channels"), "client_variance must be one of"),
        (lambda: insert_ffa(nn.Flatten(), [], sample_input=torch.ones(1, 2)), "after must name at least one"),
        (lambda: insert_ffa(nn.Flatten(), ["0"], sample_input=torch.ones(1, 2)), r"submodules of the model, got \['0'\]"),
        (lambda: insert_ffa(nn.Sequential(nn.Flatten()), ["0"], sample_input=torch.ones(1, 2)), r"'0' must return .*\(1, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()
