"""The protector against its formulas in numpy, its promises, what it leaves alone; the similarity; the report; bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

import posterity.robustness.checkpoint_gradients as gradients
from posterity.robustness import (
    SelfEnsembleProtector,
    gradient_similarity,
    protection_report,
    select_checkpoints,
)

N, D, HIDDEN, K = 24, 6, 5, 4
MODES = ("ce", "fa", "vr")


class Scaled(nn.Module):
    """Features tanh(scale W x), then a linear layer; the scale is no weight."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.first, self.head = nn.Linear(D, HIDDEN, bias=False), nn.Linear(HIDDEN, K, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.scale * self.first(x)))


def networks(m=3, make=Scaled, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [make() for _ in range(m)]
        for net in nets:
            for weight in net.parameters():
                nn.init.normal_(weight)
        return [net.to(dtype) for net in nets]


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5),
                         nn.Flatten(), nn.Linear(48, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, K))  # fmt: skip


def samples(shape=(D,), n=N, dtype=torch.float64):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x, torch.arange(n) % K


def protector(nets, **options):
    return SelfEnsembleProtector(
        nets, **{"epsilon": 0.1, "step_size": 0.03, "n_steps": 4, "n_inner": 3, **options}
    )


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


X, Y = samples()


# --- which checkpoints ---


def test_checkpoints_are_evenly_spaced_and_end_with_the_last():
    assert select_checkpoints(120, 30) == list(range(3, 120, 4))
    assert select_checkpoints(10, 3) == [2, 5, 9]
    for total in range(1, 30):
        assert select_checkpoints(total, total) == list(range(total))
        for count in range(1, total + 1):
            chosen = select_checkpoints(total, count)
            assert chosen == [math.floor((k + 1) * total / count + 1e-9) - 1 for k in range(count)]
            assert chosen[-1] == total - 1 and len(set(chosen)) == count


# --- the formulas, in numpy ---


def in_numpy(nets, x, y, mode, *, eps, step_size, n_steps, drawn):
    """Protect by the derivatives of tanh, softmax and squares, in nothing but numpy."""
    x0, y = x.numpy(), y.numpy()
    target = (y + K // 2) % K
    weights = [(net.first.weight.detach().numpy(), net.head.weight.detach().numpy()) for net in nets]

    def slope(m, z):
        first, head = weights[m]
        h = np.tanh(z @ first.T)
        if mode == "ce":
            p = np.exp(h @ head.T)
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(p)), target] -= 1
            back = p @ head
        else:
            clean = np.tanh(x0 @ first.T)
            back = 2 / HIDDEN * (h - np.stack([clean[y == k].mean(0) for k in target]))
        return (back * (1 - h**2)) @ first

    def step(z, direction):
        return np.clip(np.clip(z - step_size * np.sign(direction), x0 - eps, x0 + eps), 0, 1)

    now = x0
    for k in range(n_steps):
        each = [slope(m, now) for m in range(len(nets))]
        mean = np.mean(each, 0)
        if mode != "vr":
            now = step(now, mean)
            continue
        z, total = now, np.zeros_like(now)
        for m in drawn[k]:
            total = total + slope(m, z) - (each[m] - mean)
            z = step(z, total)
        now = step(now, total)
    return torch.from_numpy(now)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stacked", [True, False])
def test_each_mode_is_its_formula(mode, stacked, monkeypatch):
    if not stacked:
        monkeypatch.setattr(gradients, "SMALL", 0)
    nets = networks()
    drawn = torch.randint(3, (4, 3), generator=rng(5)).tolist()
    expected = in_numpy(nets, X, Y, mode, eps=0.1, step_size=0.03, n_steps=4, drawn=drawn)
    got = protector(nets, mode=mode, generator=rng(5)).protect(X, Y)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_one_step_by_cross_entropy_is_a_signed_step_down_for_a_model_as_it_predicts():
    (net,) = networks(1, convolutional)
    x, y = samples((1, 4, 4))
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(copy.deepcopy(net).eval()(leaf), (y + 2) % K)
    expected = (x - 0.03 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    got = protector([net.train()], mode="ce", n_steps=1).protect(x, y)
    torch.testing.assert_close(got, expected)


def test_other_features_classes_and_shifts_are_taken():
    nets = networks()
    hidden = protector(nets, mode="fa").protect(X, Y)
    by_hand = protector(nets, mode="fa", n_classes=K, features=lambda net, x: torch.tanh(net.first(x)))
    assert torch.equal(by_hand.protect(X, Y), hidden)
    assert not torch.equal(protector(nets, mode="fa", features=lambda net, x: net(x)).protect(X, Y), hidden)
    one, two = (protector(nets, mode="ce", target_shift=shift).protect(X, Y) for shift in (1, 2))
    assert torch.equal(two, protector(nets, mode="ce").protect(X, Y)) and not torch.equal(one, two)
    assert torch.equal(one, protector(nets, mode="ce", target_shift=1 - K).protect(X, Y))
    leaf = X.clone().requires_grad_()
    loss = sum(F.cross_entropy(net(leaf), (Y + 1) % K) for net in nets)
    expected = (X - 0.03 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    torch.testing.assert_close(protector(nets, mode="ce", target_shift=1, n_steps=1).protect(X, Y), expected)


def test_features_are_the_input_of_the_linear_layer_that_is_called_last():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.first = nn.Linear(2 * HIDDEN, K), nn.Linear(D // 2, HIDDEN)

        def forward(self, x):
            return self.head(self.first(x.view(-1, 2, D // 2)).tanh().flatten(1))

    nets = networks(2, Late)
    by_hand = protector(
        nets, features=lambda net, x: net.first(x.view(-1, 2, D // 2)).tanh().flatten(1), generator=rng()
    )
    assert torch.equal(protector(nets, generator=rng()).protect(X, Y), by_hand.protect(X, Y))


# --- promises ---


@pytest.mark.parametrize("mode", MODES)
def test_changes_keep_to_eps_and_bounds_and_samples_do_not_see_each_other(mode):
    nets = networks()
    x = X.clone()
    x[:4], x[4:8] = 0.0, 1.0
    options = {"mode": mode, "n_steps": 6}
    out = protector(nets, generator=rng(2), **options).protect(x, Y)
    assert (out - x).abs().max() <= 0.1 + 1e-12 and out.min() >= 0 and out.max() <= 1
    assert (out - x).abs().max() > 0.09
    order = torch.randperm(N, generator=rng(3))
    permuted = protector(nets, generator=rng(2), **options).protect(x[order], Y[order])
    torch.testing.assert_close(permuted, out[order], rtol=0, atol=1e-12)
    wide = protector(nets, bounds=(-1, 2), generator=rng(2), **options).protect(x, Y)
    assert (wide.min() < 0 and wide.max() > 1) == (mode == "ce")  # features have means to stop at
    assert (wide - x).abs().max() <= 0.1 + 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_one_checkpoint_are_one_checkpoint(mode):
    (net,) = networks(1)
    one, two = (protector([net], mode=mode, generator=rng(seed)).protect(X, Y) for seed in (0, 1))
    assert torch.equal(one, two)
    many = protector([copy.deepcopy(net) for _ in range(4)], mode=mode, generator=rng(2)).protect(X, Y)
    torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["fa", "vr"])
@pytest.mark.parametrize("small", [2**15, 0, 7 * 16])  # the last stacks some batches and not others
def test_the_batch_size_does_not_change_the_result(mode, small, monkeypatch):
    monkeypatch.setattr(gradients, "SMALL", small)
    nets = networks(2, convolutional)
    x, y = samples((1, 4, 4))
    whole, parts = (
        protector(nets, mode=mode, batch_size=size, generator=rng(4)).protect(x, y) for size in (100, 7)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_samples_come_closer_to_the_other_class_for_all_checkpoints_together(mode):
    nets = networks(4)
    out = protector(nets, mode=mode, n_steps=10, generator=rng()).protect(X, Y)
    target = (Y + 2) % K
    if mode == "ce":
        losses = [[F.cross_entropy(net(x), target) for net in nets] for x in (X, out)]
    else:
        hidden = [[torch.tanh(net.first(x)) for net in nets] for x in (X, out)]
        means = [torch.stack([h[k == Y].mean(0) for k in target]) for h in hidden[0]]
        losses = [[F.mse_loss(h, mean) for h, mean in zip(each, means, strict=True)] for each in hidden]
    before, after = (torch.stack(each).mean() for each in losses)
    assert after < before


def test_no_room_is_no_change():
    for mode in MODES:
        assert torch.equal(protector(networks(), mode=mode, epsilon=0.0).protect(X, Y), X)
        assert torch.equal(protector(networks(), mode=mode, step_size=0.0).protect(X, Y), X)
    assert protector(networks()).protect(X[:0], Y[:0]).shape == (0, D)


def test_checkpoints_may_differ_in_code_and_architecture():
    nets = networks()
    nets[1].scale = 3.0  # equal weights, other numbers
    other = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, K)).double()
    for each in (nets, [*nets, other]):
        leaf = X.clone().requires_grad_()
        loss = sum(F.cross_entropy(net(leaf), (Y + 2) % K) for net in each)
        expected = (X - 0.03 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
        torch.testing.assert_close(protector(each, mode="ce", n_steps=1).protect(X, Y), expected)
    assert protector([*nets, other], mode="vr").protect(X, Y).shape == X.shape


# --- what is left alone ---


@pytest.mark.parametrize("mode", MODES)
def test_models_and_data_are_left_as_they_are(mode):
    nets = networks(2, convolutional, torch.float32)
    x, y = samples((1, 4, 4), dtype=torch.float32)
    nets[0].train()
    nets[0][1].eval()
    nets[1].eval()
    for weight in nets[0].parameters():
        weight.grad = torch.ones_like(weight)
    nets[1][0].weight.requires_grad_(False)
    before = copy.deepcopy(nets)
    kept, state = x.clone(), torch.random.get_rng_state()
    x.requires_grad_()
    out = protector(nets, mode=mode, generator=rng()).protect(x, y)
    gradient_similarity(nets, x, y)
    assert not out.requires_grad and torch.equal(x, kept) and torch.equal(torch.random.get_rng_state(), state)
    for net, was in zip(nets, before, strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip(net.state_dict().values(), was.state_dict().values(), strict=True)
        )
        assert [module.training for module in net.modules()] == [module.training for module in was.modules()]
        assert not any(module._forward_pre_hooks for module in net.modules())
        for a, b in zip(net.parameters(), was.parameters(), strict=True):
            assert a.requires_grad == b.requires_grad
            assert a.grad is None or (a.grad == 1).all()


def test_modes_are_put_back_where_it_fails():
    nets = [net.train() for net in networks()]
    with pytest.raises(ValueError, match=r"y must be in 0\.\.3"):
        protector(nets).protect(X, Y + 1)
    assert all(module.training for net in nets for module in net.modules())


def test_it_works_without_gradients_in_inference_mode_and_under_autocast():
    nets = networks(2, dtype=torch.float32)
    x, y = samples(dtype=torch.float32)
    expected = protector(nets, generator=rng()).protect(x, y)
    similar = gradient_similarity(nets, x, y)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            mine = copy.deepcopy(nets)
            out = protector(mine, generator=rng()).protect(x.clone(), y.clone())
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(gradient_similarity(mine, x.clone(), y.clone()), similar)
            assert not out.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_data_and_models_are_perturbed_in_float32_and_keep_to_eps(dtype):
    nets = networks(dtype=torch.float32)
    x, y = samples(dtype=dtype)
    eps = 2 / 255
    exact = protector(nets, epsilon=eps, step_size=1 / 255, generator=rng()).protect(x.float(), y)
    out = protector(nets, epsilon=eps, step_size=1 / 255, generator=rng()).protect(x, y)
    change = out.double() - x.double()
    assert out.dtype == dtype and change.abs().max() <= eps and change.any()
    assert (out.double() - exact.double()).abs().max() <= torch.finfo(dtype).eps  # a unit in the last place
    assert (change * (exact - x.float()).double() >= 0).all()
    narrow = [copy.deepcopy(net).to(dtype) for net in nets]
    wide = [copy.deepcopy(net).float() for net in narrow]
    mine, theirs = (protector(each, generator=rng()).protect(x.float(), y) for each in (narrow, wide))
    assert torch.equal(mine, theirs) and next(narrow[0].parameters()).dtype == dtype
    torch.testing.assert_close(
        gradient_similarity(narrow, x.float(), y), gradient_similarity(wide, x.float(), y)
    )


# --- how alike gradients are ---


def test_similarity_is_the_mean_cosine_of_input_gradients():
    nets = networks(3, lambda: nn.Linear(D, K))
    each = []
    for net in nets:
        p = net(X).softmax(1).detach().numpy()
        each.append((p - np.eye(K)[Y.numpy()]) @ net.weight.detach().numpy())
    lengths = [np.linalg.norm(g, axis=1) for g in each]
    expected = [[((g * h).sum(1) / (s * t)).mean() for h, t in zip(each, lengths, strict=True)] for g, s in zip(each, lengths, strict=True)]  # fmt: skip
    torch.testing.assert_close(gradient_similarity(nets, X, Y), torch.tensor(np.array(expected)))


def test_similarity_leaves_out_what_has_no_angle_and_does_not_ask_for_length():
    one, two = networks(2, lambda: nn.Linear(D, K, bias=False))
    x, y = X.clone(), Y.clone()
    x[0] = 0
    with torch.no_grad():
        two.weight[:] = one.weight[[1, 0, 2, 3]]
        sure = copy.deepcopy(one)
        sure.weight.mul_(1e4)  # sure of everything: right and without a gradient, or wrong
    right = sure(x).argmax(1) == y
    rest = ~right | (torch.arange(N) == 0)
    assert right.any() and rest.any()
    torch.testing.assert_close(
        gradient_similarity([sure, two], x, y)[0, 1], gradient_similarity([sure, two], x[rest], y[rest])[0, 1]
    )
    torch.testing.assert_close(gradient_similarity([sure, two], x, y).diagonal(), torch.ones(2).double())
    tiny = nn.Sequential(copy.deepcopy(one), nn.Linear(K, K, bias=False).double())
    tiny[1].weight.data = 1e-200 * torch.eye(K).double()
    torch.testing.assert_close(gradient_similarity([tiny, tiny], x, y), torch.ones(2, 2).double())


# --- the report ---


def blobs(n=60):
    x = 0.5 + 0.1 * torch.randn(n, 8, generator=rng(3), dtype=torch.float64)
    y = torch.arange(n) % 3
    x[torch.arange(n), y] += 0.15
    return x.clamp(0, 1), y


def test_the_report_is_its_formulas_and_scikit_learn():
    x, y = blobs()
    delta = 0.01 * torch.randn(60, 8, generator=rng(4), dtype=torch.float64).clamp(-1, 1)
    released = (x + delta).clamp(0, 1)
    change = (released - x).numpy()
    report = protection_report(x, released, y, random_state=7)
    assert report["max_change"] == pytest.approx(np.abs(change).max())
    assert report["mean_change"] == pytest.approx(np.abs(change).mean())
    assert report["at_limit"] == pytest.approx((np.abs(change) > 0.00999).mean())
    assert report["psnr"] == pytest.approx(20 * math.log10(1 / np.sqrt((change**2).mean())))
    folds = StratifiedKFold(5, shuffle=True, random_state=7)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    for name, rows in {"clean_after_clean": x.numpy(), "shortcut": change}.items():
        assert report[name] == pytest.approx(cross_val_score(model, rows, y.numpy(), cv=folds).mean())
    right = [
        model.fit(released[a].numpy(), y[a].numpy()).score(x[b].numpy(), y[b].numpy())
        for a, b in folds.split(x, y)
    ]
    assert report["clean_after_protected"] == pytest.approx(np.mean(right))
    larger = protection_report(2 * x, 2 * released, y, bounds=(0, 2), random_state=7)
    assert larger["psnr"] == pytest.approx(report["psnr"])


def test_perturbations_of_a_class_are_a_shortcut_and_noise_is_none():
    x, y = blobs(150)
    signs = torch.sign(torch.randn(3, 8, generator=rng(5), dtype=torch.float64))
    away = protection_report(x, (x + 0.05 * signs[y]).clamp(0, 1), y, random_state=0)
    noise = torch.sign(torch.randn(150, 8, generator=rng(6), dtype=torch.float64))
    noisy = protection_report(x, (x + 0.05 * noise).clamp(0, 1), y, random_state=0)
    assert away["shortcut"] > 0.98 and abs(noisy["shortcut"] - 1 / 3) < 0.15
    assert away["clean_after_clean"] == noisy["clean_after_clean"] > 0.7
    assert noisy["clean_after_protected"] > 0.6 > away["clean_after_protected"]
    none = protection_report(x, x.clone(), y, random_state=0)
    assert none["psnr"] == math.inf and none["max_change"] == none["at_limit"] == 0
    assert none["clean_after_protected"] == none["clean_after_clean"]


def test_the_report_reads_every_dtype_and_shape():
    x, y = blobs()
    images = x.view(60, 2, 2, 2)
    report = protection_report(images, (images + 0.02).clamp(0, 1), y, random_state=1)
    assert report == protection_report(x, (x + 0.02).clamp(0, 1), y, random_state=np.random.RandomState(1))
    narrow = protection_report(x.bfloat16(), x.bfloat16(), y.int(), random_state=1)
    assert narrow["max_change"] == 0


# --- bad input ---

NETS = networks()
BROKEN = copy.deepcopy(NETS)
BROKEN[1].first.weight.data[0] = torch.nan
NO_HEAD = nn.Sequential(nn.Conv1d(1, 4, 6), nn.Flatten())
BLOBS, LABELS = blobs()


class Constant(nn.Module):
    def forward(self, x):
        return x.detach()[:, :K]


class Wider(nn.Module):
    """Features whose width follows the data."""

    def forward(self, net, x):
        return F.pad(x, (0, 4)) if x.requires_grad else x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_checkpoints(0, 1), "n_total must be an integer of at least 1, got 0"),
        (lambda: select_checkpoints(5, 0), "n_select must be an integer of at least 1, got 0"),
        (lambda: select_checkpoints(5, 6), "n_select must be at most n_total=5, got 6"),
        (lambda: protector([]), "checkpoints must be at least one model, got none"),
        (lambda: protector(NETS[0]), "checkpoints must be a sequence of models, got one model"),
        (lambda: protector([NETS[0], "net"]), "checkpoints must be at least one model, got"),
        (lambda: protector(3), "checkpoints must be models, got int"),
        (lambda: protector(NETS, epsilon=-0.1), "epsilon must be at least 0, got -0.1"),
        (lambda: protector(NETS, step_size=-1.0), "step_size must be at least 0"),
        (lambda: protector(NETS, step_size=math.nan), "step_size must be at least 0"),
        (lambda: protector(NETS, n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: protector(NETS, mode="sep"), "mode must be one of 'ce', 'fa', 'vr', got 'sep'"),
        (lambda: protector(NETS, n_inner=0), "n_inner must be an integer of at least 1"),
        (lambda: protector(NETS, features="head"), "features must be a function"),
        (lambda: protector(NETS, n_classes=1), "n_classes must be an integer of at least 2"),
        (lambda: protector(NETS, target_shift=0.5), "target_shift must be an integer"),
        (lambda: protector(NETS, bounds=(1.0, 0.0)), "bounds must be two finite numbers .* low < high"),
        (lambda: protector(NETS, bounds=1.0), "bounds must be two numbers"),
        (lambda: protector(NETS, bounds=(0.0, "one")), "bounds must be two numbers"),
        (lambda: protector(NETS, batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: protector(NETS).protect(X + 0.5, Y), r"x must be in bounds \[0, 1\]"),
        (lambda: protector(NETS).protect(X * math.nan, Y), r"x must be in bounds \[0, 1\], got others or NaN"),
        (lambda: protector(NETS).protect(X.long(), Y), "x must be a floating-point tensor"),
        (lambda: protector(NETS).protect(X[:, 0], Y), r"x must have shape \(n, \.\.\.\)"),
        (lambda: protector(NETS).protect(X, Y[:3]), r"y must have shape \(24\) for one class a sample, got \(3,\)"),
        (lambda: protector(NETS).protect(X, Y.double()), "y must hold class indices, got torch.float64"),
        (lambda: protector(NETS).protect(X, Y + 1), r"y must be in 0\.\.3 for 4 classes, got values from 1 to 4"),
        (lambda: protector(NETS).protect(X, Y - 1), r"y must be in 0\.\.3"),
        (lambda: protector(NETS, mode="fa").protect(X[Y < 2], Y[Y < 2]), r"y must have a sample of each class aimed at.* \[2, 3\]"),
        (lambda: protector(NETS, n_classes=9).protect(X, Y), r"y must have a sample of each class aimed at.* \[4, 5, 6, 7\]"),
        (lambda: protector(NETS, mode="ce", n_classes=9).protect(X, Y), "checkpoints must give 9 logits, n_classes, got 4"),
        (lambda: protector(BROKEN, mode="ce").protect(X, Y), "finite gradients, that of checkpoint 1 is not"),
        (lambda: protector(BROKEN, mode="vr").protect(X, Y), "finite gradients, that of checkpoint 1 is not"),
        (lambda: protector([Constant()], mode="ce").protect(X, Y), "checkpoints must have a gradient with respect to x"),
        (lambda: protector([nn.Identity()], features=Wider(), n_classes=K).protect(X, Y), "features must be as wide as those of means, 6, got 10"),
        (lambda: protector(NETS, features=lambda net, x: x.sum()).protect(X, Y), r"features must be of shape \(batch, any\)"),
        (lambda: protector([NO_HEAD]).protect(X[:, None], Y), "features must be given"),
        (lambda: protector([nn.Unflatten(1, (2, 3))], mode="ce").protect(X, Y), "checkpoints must give logits of shape"),
        (lambda: gradient_similarity([], X, Y), "checkpoints must be at least one model"),
        (lambda: gradient_similarity(NETS, X[:0], Y[:0]), "x must have at least one sample"),
        (lambda: gradient_similarity(NETS, X / 0, Y), "x must be finite"),
        (lambda: gradient_similarity(NETS, X, Y + 1), r"y must be in 0\.\.3"),
        (lambda: gradient_similarity(BROKEN, X, Y), "that of checkpoint 1 is not"),
        (lambda: gradient_similarity([nn.Linear(D, 1).double()] * 2, X, 0 * Y), "x must have a sample for which checkpoints 0 and 0"),
        (lambda: protection_report(BLOBS, BLOBS[:, :3], LABELS), r"x_protected must have shape \(60, 8\) for x"),
        (lambda: protection_report(BLOBS, BLOBS + 1, LABELS), r"x_protected must be in bounds \[0, 1\]"),
        (lambda: protection_report(BLOBS, BLOBS.long(), LABELS), "x_protected must be a floating-point tensor"),
        (lambda: protection_report(BLOBS * math.nan, BLOBS, LABELS), r"x must be in bounds"),
        (lambda: protection_report(BLOBS, BLOBS, 0 * LABELS), "y must have two classes or more"),
        (lambda: protection_report(BLOBS[:9], BLOBS[:9], LABELS[:9]), "of at least 5 samples each"),
        (lambda: protection_report(BLOBS[:, :0], BLOBS[:, :0], LABELS), "x must have at least one value"),
        (lambda: protection_report(BLOBS, BLOBS, LABELS, random_state="one"), "random_state must be"),
        (lambda: protection_report(BLOBS, BLOBS, LABELS, random_state=-1), "random_state must be"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
