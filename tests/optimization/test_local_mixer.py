"""The local mixer: what autograd gives under stopped gradients, and estimates that are that on average, exactly."""

import itertools

import pytest
import torch
from torch.func import jvp
from torch.nn import functional as F

import posterity.optimization.local_mixer as module
from posterity.optimization import LocalMixer, estimator_variance, grouped_cross_entropy
from posterity.testing import check_layer

TARGET = torch.tensor([0, 2, 1])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small(dtype=torch.float64, **options):
    """A small net with heads, as all else, away from their start."""
    net = LocalMixer(
        4,
        2,
        3,
        **(
            {"n_patches": 2, "width": 12, "hidden": 8, "n_groups": 2, "n_blocks": 2, "generator": rng()}
            | options
        ),
    )
    generator = rng(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net.to(dtype)


def images(n=3, dtype=torch.float64):
    return torch.randn(n, 2, 4, 4, generator=rng(2), dtype=torch.float64).to(dtype)


def gradients(net, method, **options):
    net.estimate(images(dtype=net.readout.bias.dtype), TARGET, method=method, **options)
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def flat(grads):
    return torch.cat([each.flatten() for each in grads.values()])


def features(seed=0, shape=(3, 4, 2, 5)):
    generator = rng(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(shape[2] * shape[3], 3, dtype=torch.float64, generator=generator).requires_grad_()
    return x, weight, torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()


def pooled(x, weight, bias):
    return F.cross_entropy(x.mean(1).flatten(1) @ weight + bias, TARGET, reduction="none")


def test_copies_are_one_loss_and_their_sum_has_its_gradient():
    x, weight, bias = features()
    copies, loss = grouped_cross_entropy(x, weight, bias, TARGET), pooled(x, weight, bias)
    torch.testing.assert_close(copies, loss[:, None, None].expand(3, 4, 2))
    ours = torch.autograd.grad(copies.sum(), (x, weight, bias))
    plain = torch.autograd.grad(loss.sum(), (x, weight, bias))
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-12)
    for mine, one in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine, 4 * 2 * one)


def test_a_copy_sees_its_own_patch_and_group_alone_in_either_mode():
    x, weight, bias = features()
    (plain,) = torch.autograd.grad(pooled(x, weight, bias).sum(), x)
    copies = grouped_cross_entropy(x, weight, bias, TARGET)
    for n, p, g in itertools.product(range(3), range(4), range(2)):
        (grad,) = torch.autograd.grad(copies[n, p, g], x, retain_graph=True)
        expected = torch.zeros_like(plain)
        expected[n, p, g] = plain[n, p, g]
        torch.testing.assert_close(grad, expected)
    v = torch.randn(x.shape, dtype=x.dtype, generator=rng(5))
    along = jvp(
        lambda x: grouped_cross_entropy(x, weight.detach(), bias.detach(), TARGET), (x.detach(),), (v,)
    )[1]
    torch.testing.assert_close(along, (plain * v).sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_in_low_precision_are_those_of_float32_rounded(as_a_user, dtype):
    low = [each.detach().to(dtype) for each in features()]
    copies = grouped_cross_entropy(*low, TARGET)
    assert copies.dtype == dtype
    torch.testing.assert_close(copies, grouped_cross_entropy(*(x.float() for x in low), TARGET).to(dtype))


OPTIONS = [{}, {"kernel_size": 3}, {"residual": False, "n_patches": 1}]


@pytest.mark.parametrize("options", OPTIONS)
def test_local_backprop_is_autograd_with_stops(options):
    net = small(**options)
    found = gradients(net, "local-backprop")
    net.zero_grad()
    losses = net.local_losses(images(), TARGET)
    copies = losses[0][0].numel()
    torch.stack([each.sum((1, 2)).mean() for each in losses]).sum().backward()
    for name, parameter in net.named_parameters():
        if not name.startswith("readout"):
            times = copies if name.startswith("heads") else 1
            torch.testing.assert_close(parameter.grad, times * found[name])


@pytest.mark.parametrize("options", OPTIONS)
def test_backprop_is_autograd_through_all_blocks(options):
    net = small(**options)
    found, local = gradients(net, "backprop"), gradients(net, "local-backprop")
    net.zero_grad()
    F.cross_entropy(net(images()), TARGET).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], local[name] if name.startswith("heads") else parameter.grad)


@pytest.mark.parametrize(
    ("method", "options"),
    [("activity", 0), ("weight", 0), ("global-activity", 0), ("global-weight", 0), ("activity", 1), ("weight", 1), ("global-weight", 2)],
)  # fmt: skip
def test_the_expected_estimate_is_the_gradient_exactly(as_a_user, monkeypatch, method, options):
    """Noise enters in v v^T alone: averaged over sqrt(N) times a basis, estimates are their expectation."""
    net = small(width=8, hidden=8, **OPTIONS[options])
    by_weight, whole = method.endswith("weight"), method.startswith("global")
    layers = [5] if whole else [2, 3]  # that draw together
    n_samples, call = (430 if options == 2 else 250), 0

    def basis(like, shape, **_):
        """One entry is not 0, at the same place in each image: that which has the number of the draw."""
        nonlocal call, stage, seen
        draws = layers[stage] * (2 if by_weight else 1)
        v = torch.zeros(shape, dtype=torch.float64).flatten(0 if by_weight else 1)
        number, seen = call // draws, 0 if call % draws == 0 else seen
        if seen <= number < seen + v.shape[-1]:
            v[..., number - seen] = n_samples**0.5
        seen += v.shape[-1]
        assert seen <= n_samples, "the basis is not whole"
        call += 1
        if call == draws * n_samples:
            call, stage = 0, stage + 1
        return v.reshape(shape)

    stage = seen = 0
    exact = gradients(net, "backprop" if whole else "local-backprop")
    monkeypatch.setattr(module, "_draw", basis)
    found = gradients(net, method, n_samples=n_samples)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", ["activity", "global-weight"])
def test_draws_are_unbiased(as_a_user, method):
    net = small()
    true = flat(gradients(net, "backprop" if "global" in method else "local-backprop"))
    found = estimator_variance(lambda generator: flat(gradients(net, method, n_samples=8, generator=generator)), true,
                               n_draws=24, generator=rng())  # fmt: skip
    assert found["bias"] < 2 * (found["variance"] / 24).sqrt()


def test_activities_have_less_variance_than_weights_and_local_losses_less_than_one():
    net, spread = small(width=32, hidden=32, n_groups=8), {}
    for method in ("activity", "weight", "global-activity"):
        true = flat(gradients(net, "backprop" if "global" in method else "local-backprop"))
        found = estimator_variance(lambda generator: flat(gradients(net, method, generator=generator)), true,  # noqa: B023
                                   n_draws=10, generator=rng())  # fmt: skip
        spread[method] = found["variance"] / true.square().sum()
    assert 3 * spread["activity"] < min(spread["weight"], spread["global-activity"])


def test_a_block_does_not_depend_on_later_ones():
    three = small(n_blocks=3)
    two = small(n_blocks=2)
    two.load_state_dict(
        {name: value for name, value in three.state_dict().items() if name in two.state_dict()}
    )
    long, short = gradients(three, "activity", generator=rng()), gradients(two, "activity", generator=rng())
    for name, value in short.items():
        if not name.startswith("readout"):
            torch.testing.assert_close(long[name], value)


@pytest.mark.parametrize(("local", "whole"), [("local-backprop", "backprop"), ("activity", "global-activity"), ("weight", "global-weight")])  # fmt: skip
def test_one_block_of_one_patch_and_group_is_trained_alike_by_its_head_and_the_readout(local, whole):
    net = small(n_patches=1, n_groups=1, n_blocks=1)
    net.heads[0].load_state_dict(net.readout.state_dict())
    one, other = gradients(net, local, generator=rng()), gradients(net, whole, generator=rng())
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)


@pytest.mark.parametrize("method", ["activity", "weight"])
def test_samples_are_averaged_and_the_generator_decides(method):
    net = small(n_blocks=1)
    together = flat(gradients(net, method, n_samples=3, generator=rng()))
    generator = rng()
    apart = torch.stack([flat(gradients(net, method, generator=generator)) for _ in range(3)]).mean(0)
    torch.testing.assert_close(together, apart)
    assert not torch.equal(together, flat(gradients(net, method, n_samples=3, generator=rng(1))))
    signs = flat(gradients(net, method, distribution="rademacher", generator=rng()))
    assert not torch.equal(signs, flat(gradients(net, method, generator=rng())))


@pytest.mark.parametrize("method", module.METHODS)
def test_what_is_returned_is_the_networks_and_has_no_graph(method):
    net = small()
    found = net.estimate(images(), TARGET, method=method)
    assert not any(value.requires_grad for value in found.values())
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.requires_grad
        assert parameter.grad.dtype == parameter.dtype
    torch.testing.assert_close(found["logits"], net(images()).detach())
    torch.testing.assert_close(found["loss"], F.cross_entropy(net(images()), TARGET).detach())
    local = torch.stack([each[:, 0, 0].mean() for each in net.local_losses(images(), TARGET)])
    torch.testing.assert_close(found["local_losses"], local.detach())


def test_at_the_start_heads_alone_move():
    net = LocalMixer(4, 2, 3, n_patches=2, width=16, n_groups=2, n_blocks=2, generator=rng())
    net.estimate(images(dtype=torch.float32), TARGET)
    assert all((parameter.grad == 0).all() for parameter in net.blocks.parameters())
    assert all((head.weight.grad != 0).any() for head in [*net.heads, net.readout])
    torch.testing.assert_close(net.readout.bias.grad, torch.zeros(3))  # classes in equal shares


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["activity", "backprop", "local-backprop"])
def test_estimates_where_gradients_are_off_and_leaves_the_frozen_alone(mode, method):
    net = small()
    net.blocks[0].requires_grad_(False)
    with mode():
        net.estimate(images(), TARGET.clone(), method=method, generator=rng())
    assert all(parameter.grad is None for parameter in net.blocks[0].parameters())
    got = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.blocks[0].requires_grad_(True)
    for name, value in gradients(net, method, generator=rng()).items():
        if (grad := got[name]) is not None:
            assert not grad.is_inference()
            torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_the_network_conforms_to_its_kind(as_a_user, options):
    net = small(torch.float32, width=32, hidden=32, **options)
    dead = [name for name, _ in net.named_parameters() if name.startswith("heads")]
    check_layer(net, images(dtype=torch.float32), shape=(3, 3), dead=dead)


@pytest.mark.parametrize("method", ["activity", "weight", "local-backprop"])
@pytest.mark.parametrize(("dtype", "casting"), [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)])  # fmt: skip
def test_estimates_in_low_precision_are_those_of_float32(as_a_user, method, dtype, casting):
    net = small(torch.float32, width=32, hidden=32)
    low = small(torch.float32, width=32, hidden=32).to(dtype)
    exact = gradients(net, method, generator=rng())
    with torch.autocast("cpu", dtype=casting, enabled=casting is not None):
        found = gradients(low, method, generator=rng())
    for name, value in found.items():
        assert value.dtype == dtype
        assert F.cosine_similarity(value.float().flatten(), exact[name].flatten(), dim=0) > 0.95, name


def test_it_trains(as_a_user):
    generator = rng()
    x = torch.randn(60, 1, 4, 4, generator=generator)
    y = (x[:, 0, 0, 0] > x[:, 0, 0, 1]).long()
    net = LocalMixer(4, 1, 2, n_patches=2, width=32, n_groups=4, n_blocks=2, generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        found = net.estimate(x, y, generator=generator)
        optimizer.step()
    assert (found["logits"].argmax(1) == y).float().mean() > 0.9
    assert (found["local_losses"] < 0.5).all()


def test_a_loss_that_is_not_finite_leaves_gradients_as_they_were(as_a_user):
    net = small()
    before = gradients(net, "local-backprop")
    with pytest.raises(ValueError, match="the loss of images must be finite"):
        net.estimate(images() * torch.nan, TARGET)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in net.named_parameters())


NET = small()
X, W, B = torch.zeros(3, 4, 2, 5), torch.zeros(10, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LocalMixer(9, n_patches=2), "image_size must be a multiple of n_patches 2, got 9"),
        (lambda: LocalMixer(8, width=20), "width must be a multiple of n_groups 8, got 20"),
        (lambda: LocalMixer(8, hidden=20), "hidden must be a multiple of n_groups 8, got 20"),
        (lambda: LocalMixer(8, width=8), "width must be an integer of at least 16, got 8"),
        (lambda: LocalMixer(8, kernel_size=2), "kernel_size must be odd, got 2"),
        (lambda: LocalMixer(8, n_blocks=0), "n_blocks must be an integer of at least 1"),
        (lambda: LocalMixer(8, n_groups=0), "n_groups must be an integer of at least 1"),
        (lambda: LocalMixer(8, 1, 1), "n_classes must be an integer of at least 2"),
        (lambda: NET(images()[:, :1]), r"images must have shape \(any, 2, 4, 4\) for LocalMixer, got \(3, 1, 4, 4\)"),
        (lambda: NET(images().long()), "images must be a floating-point tensor"),
        (lambda: NET.estimate(images()[:0], TARGET[:0]), "images must hold at least one image"),
        (lambda: NET.estimate(images().int(), TARGET), "images must be a floating-point tensor"),
        (lambda: NET.estimate(images(), TARGET[:2]), r"target must have shape \(3\)"),
        (lambda: NET.estimate(images(), TARGET + 1), r"target must be in 0\.\.2, got values from 1 to 3"),
        (lambda: NET.estimate(images(), TARGET.double()), "target must hold class indices, got torch.float64"),
        (lambda: NET.local_losses(images(), TARGET - 1), r"target must be in 0\.\.2, got values from -1 to 1"),
        (lambda: NET.estimate(images(), TARGET, method="local"), "method must be one of 'activity'"),
        (lambda: NET.estimate(images(), TARGET, distribution="uniform"), "distribution must be one of 'normal'"),
        (lambda: NET.estimate(images(), TARGET, n_samples=0), "n_samples must be an integer of at least 1"),
        (lambda: grouped_cross_entropy(X[0], W, B, TARGET), r"x must have shape \(any, any, any, any\)"),
        (lambda: grouped_cross_entropy(X.long(), W, B, TARGET), "x must be a floating-point tensor"),
        (lambda: grouped_cross_entropy(X[:, :0], W, B, TARGET), "x must have no empty axis"),
        (lambda: grouped_cross_entropy(X, W[1:], B, TARGET), r"weight must have shape \(10, any\) for x"),
        (lambda: grouped_cross_entropy(X, W, B[1:], TARGET), r"bias must have shape \(3\) for weight"),
        (lambda: grouped_cross_entropy(X, W, B, TARGET + 1), r"target must be in 0\.\.2"),
        (lambda: grouped_cross_entropy(X, W, B, TARGET > 0), "target must hold class indices, got torch.bool"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
