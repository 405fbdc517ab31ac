"""Attacks against closed forms, the driver's budget and zeros, the sparse file, and what is refused."""

import copy
import io
import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.compression import HARP, harp_prune, pack_sparse, robust_loss, step_up, unpack_sparse

FIXTURE = Path(__file__).parent / "fixtures" / "sparse-v1.bin"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(n_in=10, width=30, n_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, n_out))


def sample(n=12, n_in=10, n_out=3, dtype=torch.float32):
    return torch.rand(n, n_in, generator=seeded(), dtype=torch.float64).to(dtype), torch.arange(n) % n_out


class Watch(nn.Module):
    """Remembers what it is called with."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append((x.detach().clone(), self.training))
        return self.inner(x)


def test_natural_and_trades_without_weight_are_cross_entropy():
    net, (x, y) = network().eval(), sample()
    expected = F.cross_entropy(net(x), y)
    assert torch.equal(robust_loss(net, x, y, kind="natural"), expected)
    torch.testing.assert_close(robust_loss(net, x, y, kind="trades", beta=0.0), expected)
    for kind in ("pgd", "trades"):
        torch.testing.assert_close(robust_loss(net, x, y, kind=kind, epsilon=0.0), expected)


@pytest.mark.parametrize("kind", ["pgd", "trades", "mart"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_perturbations_stay_in_the_ball_and_the_range_and_the_attack_is_in_eval_mode(kind, norm, epsilon):
    x, y = sample(dtype=torch.float64)
    net = Watch(network().double()).train()
    robust_loss(
        net, x, y, kind=kind, epsilon=epsilon, step_size=epsilon, n_steps=3, norm=norm, generator=seeded()
    )
    far = []
    for point, _ in net.seen:
        distance = (point - x).abs().amax(1) if norm == "linf" else (point - x).norm(dim=1)
        assert distance.max() <= epsilon * (1 + 1e-6)
        assert point.min() >= 0 and point.max() <= 1
        far.append(distance.max().item())
    assert max(far) > 0.9 * epsilon
    n_train = {"pgd": 1, "trades": 2, "mart": 2}[kind]
    assert [mode for _, mode in net.seen] == [False] * (len(net.seen) - n_train) + [True] * n_train
    assert len(net.seen) == n_train + 3 + (kind == "trades")
    assert net.training and net.inner[1].training


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_against_a_linear_model_the_attack_reaches_the_closed_form(norm):
    net = nn.Linear(10, 2).double()
    x, y = sample(n_out=2, dtype=torch.float64)
    margin = (net.weight[1] - net.weight[0]).detach()
    size = margin.abs().sum() if norm == "linf" else margin.norm()
    logits = net(x)
    apart = torch.where(y == 0, 1, -1) * (logits[:, 1] - logits[:, 0]) + 0.2 * size
    value = robust_loss(net, x, y, epsilon=0.2, step_size=0.1, n_steps=60, norm=norm, bounds=None)
    torch.testing.assert_close(value, F.softplus(apart).mean(), rtol=1e-6, atol=0)


def test_trades_and_mart_are_their_formulas_at_the_point_that_was_found():
    x, y = sample(dtype=torch.float64)
    for kind in ("trades", "mart"):
        net = Watch(network().double().eval())
        value = robust_loss(net, x, y, kind=kind, beta=2.5, epsilon=0.1, step_size=0.05, generator=seeded())
        p, moved = (net.inner(point).softmax(1) for point, _ in net.seen[-2:])
        total = 0.0
        for i, label in enumerate(y):
            kl = sum(p[i, c] * (p[i, c] / moved[i, c]).log() for c in range(3))
            rival = max(moved[i, c] for c in range(3) if c != label)
            if kind == "trades":
                total += -p[i, label].log() + 2.5 * kl
            else:
                total += -moved[i, label].log() - (1 - rival).log() + 2.5 * (1 - p[i, label]) * kl
        torch.testing.assert_close(value, total / len(y))
    sure = nn.Linear(1, 2, bias=False)
    sure.weight.data = torch.tensor([[300.0], [-300.0]])
    assert torch.isfinite(robust_loss(sure, torch.ones(2, 1), torch.tensor([0, 1]), kind="mart", epsilon=0.0))


def test_the_attack_climbs_and_leaves_gradients_hooks_and_random_state_alone():
    net, (x, y) = network().eval(), sample()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    fired, before = [], torch.get_rng_state()
    net[0].weight.register_hook(fired.append)
    still = robust_loss(net, x, y, kind="natural")
    losses = [
        robust_loss(net, x, y, epsilon=0.1, step_size=0.03, n_steps=n, generator=seeded()) for n in (1, 3, 10)
    ]
    assert still < losses[0] < losses[1] < losses[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert not fired
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(
            robust_loss(net, x, y, epsilon=0.1, step_size=0.03, generator=seeded()), losses[2]
        )
    for kind in ("pgd", "trades", "mart"):
        want = robust_loss(net, x, y, kind=kind, generator=seeded())
        with torch.inference_mode():
            torch.testing.assert_close(
                robust_loss(net, x.clone(), y.clone(), kind=kind, generator=seeded()), want
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    net, (x, y) = network().eval(), sample()
    for kind in ("natural", "pgd", "trades", "mart"):
        options = {"kind": kind, "epsilon": 0.1, "step_size": 0.05, "n_steps": 3}
        want = robust_loss(net, x, y, generator=seeded(), **options)
        got = robust_loss(copy.deepcopy(net).to(dtype), x.to(dtype), y, generator=seeded(), **options)
        assert got.dtype == dtype
        assert got.item() == pytest.approx(want.item(), rel=20 * torch.finfo(dtype).eps)
        with torch.autocast("cpu", dtype=dtype):
            cast = robust_loss(net, x, y, generator=seeded(), **options)
        assert cast.dtype == torch.float32
        assert cast.item() == pytest.approx(want.item(), rel=20 * torch.finfo(dtype).eps)
    harp = HARP(copy.deepcopy(net).to(dtype), 0.2)
    assert all(s.dtype == torch.float32 for s in harp.scores().values())
    harp(x.to(dtype)).sum().backward()
    assert harp(x.to(dtype)).dtype == dtype
    assert harp.to_plain()[0].weight.dtype == dtype
    back = unpack_sparse(copy.deepcopy(net).to(dtype), pack_sparse(harp.to_plain()))
    assert torch.equal(back[0].weight, harp.to_plain()[0].weight)


def test_trades_climbs_the_divergence_and_the_others_the_loss_of_the_label():
    """A step for each input, against the gradient by hand at the start of the attack."""
    x, y = sample(dtype=torch.float64)
    for kind in ("pgd", "mart", "trades"):
        net = Watch(network().double().eval())
        robust_loss(
            net, x, y, kind=kind, epsilon=1.0, step_size=0.01, n_steps=1, bounds=None, generator=seeded()
        )
        start = net.seen[kind == "trades"][0].requires_grad_()
        logits = net.inner(start)
        if kind == "trades":
            climbed = F.kl_div(logits.log_softmax(1), net.inner(x).softmax(1), reduction="sum")
        else:
            climbed = F.cross_entropy(logits, y, reduction="sum")
        (slope,) = torch.autograd.grad(climbed, start)
        expected = (start.detach() - x + 0.01 * slope.sign()).clamp(-1, 1)
        torch.testing.assert_close(net.seen[-1][0] - x, expected)


def test_attacks_start_uniform_in_the_ball_or_for_trades_a_thousandth_away():
    net, y = Watch(nn.Linear(3, 2).double()), torch.zeros(4000, dtype=torch.long)
    x = torch.zeros(4000, 3, dtype=torch.float64)
    starts = {}
    for kind, norm in (("pgd", "linf"), ("pgd", "l2"), ("mart", "l2"), ("trades", "linf")):
        net.seen.clear()
        robust_loss(
            net,
            x,
            y,
            kind=kind,
            norm=norm,
            epsilon=0.5,
            step_size=0.0,
            n_steps=1,
            bounds=None,
            generator=seeded(),
        )
        starts[kind, norm] = net.seen[kind == "trades"][0]
    cube, ball, near = (starts[key] / 0.5 for key in (("pgd", "linf"), ("pgd", "l2"), ("trades", "linf")))
    assert torch.equal(starts["mart", "l2"], starts["pgd", "l2"])
    shares = {"in a half cube": ((cube.abs() < 0.5).double().mean(), 0.5),
              "in the ball of half the volume": ((ball.norm(dim=1) ** 3 < 0.5).double().mean(), 0.5),
              "within one deviation": ((near.abs() < 2e-3).double().mean(), 0.6827)}  # fmt: skip
    for what, (share, expected) in shares.items():
        assert share.item() == pytest.approx(expected, abs=0.03), what
    for start in (cube, ball, near):
        assert (start > 0).double().mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.04)


ATTACK = partial(robust_loss, epsilon=0.05, step_size=0.03, n_steps=2)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_the_driver_meets_the_budget_and_zeros_stay(granularity):
    net, batch = network(20, 40).eval(), sample(60, 20)
    net[1].train()
    before = copy.deepcopy(net)
    result = harp_prune(net, lambda: [batch], 0.2, loss_fn=ATTACK, prune_epochs=30, finetune_epochs=10, gamma=0.5,
                        granularity=granularity, generator=seeded())  # fmt: skip
    for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [m.training for m in result.model.modules()] == [m.training for m in net.modules()]
    kept = 0
    for name, mask in result.masks.items():
        weight = result.model.get_submodule(name).weight
        assert (weight[(mask == 0).expand_as(weight)] == 0).all()
        assert not torch.equal(weight, (before.get_submodule(name).weight * mask)), "what is left was trained"
        kept += int(mask.sum())
    if granularity == "weight":
        assert kept <= 0.2 * (800 + 120) + 2
        assert list(result.masks) == ["0", "3"]
    else:
        assert kept <= 0.2 * 40 + 1
    history = result.history
    assert {len(history[n]) for n in ("robust loss", "compression loss", "keep rate", "gamma")} == {30}
    assert len(history["finetune loss"]) == 10
    met = next(e for e in range(30) if round(history["compression loss"][e], 4) == 0)
    assert history["gamma"] == pytest.approx([0.5 * (min(e, met) + 1) for e in range(30)])
    again = harp_prune(net, lambda: [batch], 0.2, loss_fn=ATTACK, prune_epochs=30, finetune_epochs=10, gamma=0.5,
                       granularity=granularity, generator=seeded())  # fmt: skip
    assert again.history == history


def scripted(losses):
    """A loss whose values are these, one a call, and whose gradient is 0."""
    values = iter(losses)
    return lambda net, x, y: 0 * net(x).sum() + next(values)


@pytest.mark.parametrize(("start", "best"), [(0.3, 3), (0.9, None)])
def test_the_best_epoch_is_kept_of_those_within_the_budget_from_first_step_to_last(start, best):
    losses = [3.0, 1.0, 2.0, 0.5, 4.0, 6.0] if best else [float(epoch) for epoch in range(6)]
    result = harp_prune(network(), lambda: [sample()], 0.5, start=start, loss_fn=scripted(losses), prune_epochs=6,
                        finetune_epochs=0, gamma=1.5, lr=2.0, momentum=0.0, weight_decay=0.0)  # fmt: skip
    over = result.history["compression loss"]
    if best is None:  # the first epoch that ends within the budget has the least loss, of a larger network
        best = next(epoch for epoch in range(6) if over[epoch] == 0) + 1
        assert 1 < best < 5
    assert result.history["robust loss"] == losses
    assert int(result.model[1].num_batches_tracked) == best + 1


def by_hand(groups, epochs, lr, momentum, value):
    """SGD with momentum on a cosine, of groups of parameters and decay; yields each epoch's value."""
    speed = {p: torch.zeros_like(p) for group, _ in groups for p in group}
    for epoch in range(epochs):
        now = value(epoch)
        slopes = torch.autograd.grad(now, list(speed), allow_unused=True)
        yield now.item()
        with torch.no_grad():
            for p, slope in zip(speed, slopes, strict=True):
                decay = next(decay for group, decay in groups if any(p is q for q in group))
                speed[p] = momentum * speed[p] + (0 if slope is None else slope) + decay * p
                p -= lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 * speed[p]


def test_the_driver_is_sgd_on_a_cosine_and_decay_leaves_rates_alone():
    net, (x, y) = network(8, 9).double(), sample(20, 8, dtype=torch.float64)
    options = {"loss_fn": lambda net, x, y: F.cross_entropy(net(x), y), "prune_epochs": 5, "gamma": 0.4, "lr": 0.3,
               "finetune_lr": 0.2, "momentum": 0.6, "weight_decay": 0.1, "start": 0.7}  # fmt: skip
    batches, rate = partial(list, [(x, y)]), 0.4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the budget was met is not the matter
        pruned = harp_prune(net, batches, rate, finetune_epochs=0, **options)
        result = harp_prune(net, batches, rate, finetune_epochs=4, **options)
    harp = HARP(net, rate, start=0.7).train()
    scores, rates = list(harp.scores().values()), list(harp.rate_logits().values())
    kept, losses = [], []

    def objective(epoch):
        kept.append(harp.keep_rate().item())
        losses.append(F.cross_entropy(harp(x), y))
        return losses[-1] + 0.4 * (epoch + 1) * harp.compression_loss()

    groups = [(scores, 0.1), (rates, 0.0), ([harp.model[1].weight, harp.model[1].bias], 0.1)]
    list(by_hand(groups, 5, 0.3, 0.6, objective))
    kept.append(harp.keep_rate().item())
    assert pruned.history["robust loss"] == pytest.approx([loss.item() for loss in losses], rel=1e-9)
    assert pruned.history["keep rate"] == pytest.approx(kept[1:], rel=1e-9)
    own = pruned.model.train()
    masks = {own[int(name)].weight: mask for name, mask in result.masks.items()}

    def loss(_):
        for weight, mask in masks.items():
            weight.data *= mask
        return F.cross_entropy(own(x), y)

    values = list(by_hand([(list(own.parameters()), 0.1)], 4, 0.2, 0.6, loss))
    for weight, mask in masks.items():
        weight.data *= mask
    assert result.history["finetune loss"] == pytest.approx(values, rel=1e-9)
    for ours, theirs in zip(result.model.state_dict().values(), own.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_budget_that_was_not_met_is_met_by_one_shift_of_all_logits():
    net, batch = network(20, 40), sample(30, 20)
    options = {"loss_fn": ATTACK, "prune_epochs": 1, "finetune_epochs": 0, "gamma": 0.0}
    start = {"0": 0.3, "3": 0.6}
    with pytest.warns(UserWarning, match="no epoch met the budget"):
        result = harp_prune(net, lambda: [batch], 0.05, start=start, lr=1e-9, **options)
    share = sum(n * result.rates[name] for name, n in (("0", 800), ("3", 120))) / 920
    assert share <= 0.05 and share == pytest.approx(0.05, rel=1e-3)
    least = 0.005

    def logit(k):
        return math.log((k - least) / (1 - k))

    shifts = [logit(result.rates[n]) - logit(start[n]) for n in start]
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = harp_prune(net, lambda: [batch], 0.05, learn_rates=False, **options)
    assert fixed.rates == pytest.approx({"0": 0.05, "3": 0.05}, rel=1e-5)


def test_the_driver_runs_in_inference_mode_and_with_any_loss():
    net, batch = network(), sample()
    with torch.inference_mode():
        inside = [part.clone() for part in batch]
        result = harp_prune(net, lambda: [inside], 0.5, prune_epochs=2, finetune_epochs=1, start=0.5, gamma=1.0,
                            loss_fn=lambda net, x, y: F.cross_entropy(net(x), y))  # fmt: skip
    assert not result.model[0].weight.is_inference()
    assert len(result.history["finetune loss"]) == 1


def test_the_weight_of_the_budget_grows_by_steps():
    assert [step_up(0.1, epoch) for epoch in (0, 1, 9)] == pytest.approx([0.1, 0.2, 1.0])


class Varied(nn.Module):
    """Tensors of every kind: tied, sparse, empty, scalar, of several dtypes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(40, 50), nn.Linear(40, 50), nn.BatchNorm1d(50)
        self.b.weight = self.a.weight
        self.narrow = nn.Parameter(torch.zeros(33).half())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("flags", torch.zeros(65, dtype=torch.int64))


def test_the_file_is_exact_and_as_small_as_promised():
    torch.manual_seed(0)
    net = Varied()
    with torch.no_grad():
        net.a.weight[torch.rand(50, 40) < 0.97] = 0
        net.a.weight[0, :3] = torch.tensor([math.nan, math.inf, 1e-40])
        net.narrow[7], net.flags[64] = 3, -5
    data = pack_sparse(net)
    back = unpack_sparse(Varied(), data)
    own = net.state_dict()
    for name, value in back.state_dict().items():
        assert value.dtype == own[name].dtype
        torch.testing.assert_close(value, own[name], rtol=0, atol=0, equal_nan=True)
    assert back.b.weight is back.a.weight
    kept = int((net.a.weight != 0).sum())
    other = sum(v.numel() * v.itemsize for n, v in own.items() if n not in ("a.weight", "b.weight"))
    assert len(data) <= kept * 4 + 2000 / 8 + other + 64 * len(own)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert len(data) < file.tell() / 4
    plain = network()
    assert torch.equal(unpack_sparse(network(), pack_sparse(plain))[0].weight, plain[0].weight)


def stored():
    """The network that the stored file holds, in numbers that need no generator."""
    net = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape) / 8 - 2)
        net[0].weight[torch.arange(72).reshape(8, 9) % 10 != 3] = 0
    return net


def test_a_stored_file_is_read():
    net = stored()
    back = unpack_sparse(
        nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), FIXTURE.read_bytes()
    )
    assert int((back[0].weight != 0).sum()) == 7
    for name, value in back.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_damaged_and_foreign_files_are_refused():
    net = nn.Linear(30, 2)
    with torch.no_grad():
        net.weight[:, 2:] = 0
    data = pack_sparse(net)
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        for bad in (bytes(broken), data[:place]):
            with pytest.raises(ValueError, match="data must"):
                unpack_sparse(net, bad)
    for other, match in [
        (nn.Linear(40, 2), r"'weight' of shape \(2, 30\) for \(2, 40\)"),
        (nn.Linear(30, 2, bias=False), "'bias', which it does not have"),
        (nn.Sequential(nn.Linear(30, 2)), "'weight', which it does not have"),
    ]:
        with pytest.raises(ValueError, match=match):
            unpack_sparse(other, data)


NET, (X, Y) = network(), sample()
PRUNE = partial(harp_prune, NET, lambda: [(X, Y)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HARP(NET, 0.0), r"rate must be in \(0, 1\], got 0"),
        (lambda: HARP(NET, 1.5), r"rate must be in \(0, 1\]"),
        (lambda: HARP(NET, 0.1, alpha=1.0), r"alpha must be in \[0, 1\)"),
        (lambda: HARP(NET, 0.1, alpha=1 - 1e-9), "alpha must leave room below rate"),
        (lambda: HARP(NET, 0.1, start=0.005), r"start must be in \[0.01, 1\], got 0.005"),
        (lambda: HARP(NET, 0.1, start={"9": 0.5}), "'9', no module: the layers are '0', '3'"),
        (lambda: HARP(NET, 0.1, layers=["0"], start={"3": 0.5}), "start must name layers that are pruned, got '3'"),
        (lambda: HARP(NET, 0.1, layers=["1"]), "'1', a BatchNorm1d"),
        (lambda: HARP(NET, 0.1, granularity="row"), "granularity must be one of"),
        (lambda: HARP(nn.ReLU(), 0.1), "must have a layer of Linear"),
        (lambda: HARP(nn.Linear(3, 2), 0.1, granularity="channel"), "model must have a layer whose input channels"),
        (lambda: HARP(NET, 0.1, granularity="channel", layers=["0"]), "'0', the first layer"),
        (lambda: HARP(NET, 0.1).to_compact(), "granularity must be 'channel'"),
        (lambda: step_up(0.1, -1), "epoch must be"),
        (lambda: step_up(-0.1, 1), "gamma must be"),
        (lambda: robust_loss(NET, X, Y, kind="fgsm"), "kind must be one of"),
        (lambda: robust_loss(NET, X, Y, norm="l1"), "norm must be one of"),
        (lambda: robust_loss(NET, X, Y, epsilon=-0.1), "epsilon must be at least 0"),
        (lambda: robust_loss(NET, X, Y, n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: robust_loss(NET, X, Y, beta=-1.0), "beta must be at least 0"),
        (lambda: robust_loss(NET, 4 * X - 2, Y), r"x must be in bounds = \(0, 1\), got values from -.* normalisation"),
        (lambda: robust_loss(NET, X * math.nan, Y), "x must be in bounds"),
        (lambda: robust_loss(NET, X, Y, bounds=(1.0, 0.0)), "bounds must be .* low < high"),
        (lambda: robust_loss(NET, X, Y, bounds=0.5), "bounds must be"),
        (lambda: robust_loss(NET, X[:0], Y[:0]), "x must have at least one sample"),
        (lambda: robust_loss(NET, X.long(), Y), "x must be a floating-point"),
        (lambda: robust_loss(NET, X, Y[:3]), r"y must have shape \(12\)"),
        (lambda: robust_loss(NET, X, Y[:, None]), r"y must have shape \(12\)"),
        (lambda: robust_loss(NET, X, Y.float()), "y must hold class indices"),
        (lambda: robust_loss(NET, X, Y + 1), r"y must be in 0\.\.2"),
        (lambda: robust_loss(nn.Flatten(0), X, Y), "model must give logits of shape"),
        (lambda: robust_loss(lambda_model(), X, Y), "model must be differentiable by x"),
        (lambda: robust_loss(nn.Linear(10, 1), X, 0 * Y, kind="mart"), "at least 2 classes for mart"),
        (lambda: harp_prune(NET, iter([(X, Y)]), 0.1), "batches must be a callable"),
        (lambda: harp_prune(NET, lambda: [], 0.1), "batches must give at least one batch"),
        (lambda: harp_prune(NET, lambda: 3, 0.1), "batches must give an iterable"),
        (lambda: harp_prune(NET, lambda: [X], 0.1), "batches must give pairs"),
        (lambda: harp_prune(NET, (lambda once: lambda: once)(iter([(X, Y)])), 0.1), "none in pruning epoch 1"),
        (lambda: PRUNE(0.1, loss_fn=3), "loss_fn must be callable"),
        (lambda: PRUNE(0.1, loss_fn=lambda net, x, y: net(x)), "loss_fn must return a scalar"),
        (lambda: PRUNE(0.1, loss_fn=lambda net, x, y: net(x).sum() * math.nan), "loss_fn must be finite, got nan in pruning epoch 0, step 0"),
        (lambda: PRUNE(0.1, prune_epochs=0), "prune_epochs must be"),
        (lambda: PRUNE(0.1, finetune_epochs=-1), "finetune_epochs must be"),
        (lambda: PRUNE(0.1, lr=0.0), "lr must be greater than 0"),
        (lambda: PRUNE(0.1, momentum=1.0), "momentum must be"),
        (lambda: PRUNE(2.0), "rate must be"),
        (lambda: unpack_sparse(NET, b"PQNT"), "data must begin with b'PSPR'"),
        (lambda: pack_sparse(nn.Linear(2, 2, device="meta")), "model must have dense tensors"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def lambda_model():
    """A model whose logits do not depend on its input."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3)

    return Constant()


def test_weights_that_are_not_finite_are_refused_by_layer(as_a_user):
    net = network()
    with torch.no_grad():
        net[3].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite floating-point weights, got others in '3'"):
        HARP(net, 0.1)
