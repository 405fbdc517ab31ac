"""SalUn: the mask by brute force, weights that stay to the bit, and plain random labelling as its limit."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from posterity.privacy import (
    MaskedOptimizer,
    UnlearningReport,
    concept_unlearning_loss,
    masked_step,
    saliency_mask,
    salun,
    unlearning_report,
)
from posterity.testing import check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dropout=0.0, norm=True, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(
            nn.Linear(6, 16), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
        ).to(dtype)  # fmt: skip


def rows(n, seed=0):
    return torch.randn(n, 6, generator=rng(seed)), torch.randint(3, (n,), generator=rng(seed + 1))


FORGET, RETAIN = rows(20), rows(50, 5)


def state(model):
    """Return all of a model that could have been changed, copied."""
    parts = (
        dict(model.state_dict()),
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )
    return copy.deepcopy(parts)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def gradient(model, x, y, loss=F.cross_entropy):
    """Return the gradient of the mean loss in eval mode, by name."""
    twin = copy.deepcopy(model).eval()
    loss(twin(x), y).backward()
    return {name: p.grad for name, p in twin.named_parameters()}


# The mask.


@pytest.mark.parametrize("keep", [1e-9, 0.1, 0.29, 0.5, 1.0])
def test_the_mask_is_the_largest_gradients_of_all_weights_together(keep):
    model = network()
    mask = saliency_mask(model, FORGET, keep=keep)
    sizes = np.concatenate([g.abs().numpy().ravel() for g in gradient(model, *FORGET).values()])
    chosen = np.concatenate([m.numpy().ravel() for m in mask.values()])
    k = int(len(sizes) * keep)
    assert chosen.sum() == k
    assert set(np.flatnonzero(chosen)) == set(np.argsort(-sizes, kind="stable")[:k])
    assert {name: m.shape for name, m in mask.items()} == {n: p.shape for n, p in model.named_parameters()}


def test_masks_of_smaller_shares_are_parts_of_larger_ones_where_gradients_are_equal_too():
    model = network(norm=False)
    x = FORGET[0].clone()
    x[:, :4] = 0  # most gradients are 0
    smaller = saliency_mask(model, (x, FORGET[1]), keep=0.05)
    for keep in np.linspace(0.1, 1, 10):
        larger = saliency_mask(model, (x, FORGET[1]), keep=keep)
        assert sum(m.sum() for m in larger.values()) == int(sum(m.numel() for m in larger.values()) * keep)
        assert all((larger[name] | ~smaller[name]).all() for name in larger)
        smaller = larger


def test_batching_does_not_matter_and_a_custom_loss_counts():
    model = network()
    whole = saliency_mask(model, FORGET, keep=0.3)
    x, y = FORGET
    parts = [(x[:3], y[:3]), (x[3:18], y[3:18]), (x[18:], y[18:])]
    for forget in (parts, iter(parts), TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=7)):
        assert equal(saliency_mask(model, forget, keep=0.3), whole)
    other = saliency_mask(model, (x, x[:, :3]), keep=0.3, loss_fn=F.mse_loss)
    sizes = gradient(model, x, x[:, :3], F.mse_loss)
    least = torch.cat([g.abs().flatten() for g in sizes.values()]).sort(descending=True).values
    k = int(len(least) * 0.3)
    assert all(torch.equal(other[name], sizes[name].abs() > (least[k - 1] + least[k]) / 2) for name in other)


def test_batch_normalisation_and_dropout_are_in_eval_mode_and_the_model_is_left_as_it_is():
    model = network(dropout=0.5).train()
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = state(model)
    mask = saliency_mask(model, FORGET)
    assert equal(state(model), before)
    assert equal(mask, saliency_mask(network().eval(), FORGET))


def test_frozen_weights_are_not_counted_shared_ones_once_and_unused_ones_have_no_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight
            self.c = nn.Linear(6, 3)
            self.c.bias.requires_grad_(False)
            self.d = nn.Parameter(torch.zeros(10))

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    mask = saliency_mask(Tied(), FORGET, keep=0.5)
    assert list(mask) == ["d", "a.weight", "c.weight", "c.bias"]
    assert not mask["d"].any() and not mask["c.bias"].any()
    assert mask["a.weight"].sum() + mask["c.weight"].sum() == (10 + 36 + 18) // 2


# Unlearning.


@pytest.mark.parametrize("order", ["sequential", "mixed"])
def test_masked_weights_stay_to_the_bit_under_momentum_and_decay(order):
    model = network().eval()
    mask = saliency_mask(model, FORGET, keep=0.4)
    before = state(model)
    found = salun(
        model, FORGET, RETAIN, n_classes=3, mask=mask, lr=0.1, weight_decay=0.1, epochs=3, batch_size=16,
        order=order, generator=rng(),
    )  # fmt: skip
    assert equal(state(model), before)
    assert not any(m.training for m in found.modules()) and all(p.grad is None for p in found.parameters())
    for (name, was), now in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(was.view(torch.int32)[~mask[name]], now.view(torch.int32)[~mask[name]])
        assert (was != now)[mask[name]].all()  # momentum and decay move every other
    assert equal(mask, saliency_mask(model, FORGET, keep=0.4))
    itself = salun(model, FORGET, RETAIN, n_classes=3, keep=0.4, lr=0.1, weight_decay=0.1, epochs=3,
                   batch_size=16, order=order, generator=rng())  # fmt: skip
    assert equal(itself.state_dict(), found.state_dict())


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("order", ["sequential", "mixed"])
def test_with_all_weights_it_is_random_labelling_step_for_step(order, alpha):
    model = network()
    found = salun(model, FORGET, RETAIN, n_classes=3, keep=1.0, epochs=2, lr=0.05, batch_size=16, order=order,
                  alpha=alpha, generator=rng(3))  # fmt: skip
    plain, draw = copy.deepcopy(model).train(), rng(3)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    torch.randint(2**31, (1,), generator=draw)  # the seed of what the model draws
    for _ in range(2):
        labels = torch.randint(3, (20,), generator=draw)
        if order == "sequential":
            passes = [
                [(FORGET[0][r], labels[r], torch.ones(len(r)))
                 for r in torch.randperm(20, generator=draw).split(16)],
                [(RETAIN[0][r], RETAIN[1][r], torch.full((len(r),), alpha))
                 for r in torch.randperm(50, generator=draw).split(16)],
            ]  # fmt: skip
        else:
            x, y = torch.cat([FORGET[0], RETAIN[0]]), torch.cat([labels, RETAIN[1]])
            weight = torch.tensor([1.0] * 20 + [alpha] * 50)
            passes = [[(x[r], y[r], weight[r]) for r in torch.randperm(70, generator=draw).split(16)]]
        for x, y, weight in (batch for each in passes for batch in each):
            sgd.zero_grad()
            (weight * F.cross_entropy(plain(x), y, reduction="none")).mean().backward()
            sgd.step()
    for ours, theirs in zip(found.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_with_hardly_a_weight_the_parameters_are_the_original_ones():
    model = network()
    found = salun(model, FORGET, RETAIN, n_classes=3, keep=1e-9, lr=0.5, generator=rng())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    assert not torch.equal(model[1].running_mean, found[1].running_mean)  # statistics move, as is said


def test_a_generator_decides_all_and_torchs_own_state_is_left_on_every_device(monkeypatch):
    model = network(dropout=0.5)
    chance = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    one, two, other = (
        salun(model, FORGET, RETAIN, n_classes=3, epochs=2, generator=rng(seed)).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), chance)
    assert equal(one, two) and not equal(one, other)


def test_datasets_and_tensors_and_modes_of_gradients_are_alike():
    model = network()
    found = salun(model, FORGET, RETAIN, n_classes=3, epochs=2, generator=rng())
    for given in (
        (TensorDataset(*FORGET), TensorDataset(*RETAIN)),
        (tuple(p[::1].clone() for p in FORGET), RETAIN),
    ):
        again = salun(model, *given, n_classes=3, epochs=2, generator=rng())
        assert equal(again.state_dict(), found.state_dict())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = salun(
                model, FORGET, tuple(p.clone() for p in RETAIN), n_classes=3, epochs=2, generator=rng()
            )
        assert equal(again.state_dict(), found.state_dict())
        again[0](FORGET[0]).sum().backward()  # training may follow


def test_a_last_batch_of_one_row_joins_the_one_before():
    salun(network(), rows(17), rows(33), n_classes=3, batch_size=16, epochs=1)  # else BatchNorm refuses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_unlearned_wide_and_held_weights_stay(dtype):
    model = network().to(dtype)
    full = copy.deepcopy(model).to(torch.promote_types(dtype, torch.float32))
    forget, retain = ((x.to(dtype), y.to(torch.int16)) for x, y in (FORGET, RETAIN))
    mask = saliency_mask(model, forget, keep=0.3)
    assert equal(mask, saliency_mask(full, (forget[0].to(full[0].weight.dtype), FORGET[1]), keep=0.3))
    found = salun(model, forget, retain, n_classes=3, mask=mask, lr=1e-3, generator=rng())
    wide = salun(full, forget, retain, n_classes=3, mask=mask, lr=1e-3, generator=rng())
    for (name, was), now, other in zip(
        model.named_parameters(), found.parameters(), wide.parameters(), strict=True
    ):
        assert now.dtype == dtype and torch.equal(now, other.to(dtype))
        assert torch.equal(was[~mask[name]], now[~mask[name]])
    report = unlearning_report(found, forget, retain, retain)
    assert (
        abs(report.retain_accuracy - unlearning_report(wide, forget, retain, retain).retain_accuracy) <= 0.02
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = saliency_mask(full, FORGET, keep=0.3)
        assert sum(m.sum() for m in mask.values()) == int(sum(m.numel() for m in mask.values()) * 0.3)
        salun(full.float(), FORGET, RETAIN, n_classes=3, epochs=1)


def test_it_forgets_and_keeps_on_digits():
    data = load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(net(x[:1200]), y[:1200]).backward()
        adam.step()
    gone = (y == 3) & (torch.arange(len(y)) < 1200)
    kept = (y != 3) & (torch.arange(len(y)) < 1200)
    parts = (x[gone], y[gone]), (x[kept], y[kept])
    test = x[1200:][y[1200:] != 3], y[1200:][y[1200:] != 3]
    found = salun(net, *parts, n_classes=10, lr=0.05, generator=rng())
    before, after = (unlearning_report(each, *parts, test) for each in (net, found))
    assert before.forget_error < 0.1 and after.forget_error > 0.7
    assert after.retain_accuracy > 0.95 and after.test_accuracy > 0.85


# Concepts.


class Denoiser(nn.Module):
    """Noise prediction: a linear map of the data for each of four concepts."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, generator=rng(), dtype=dtype))

    def forward(self, x, t, cond):
        return torch.einsum("nij,nj->ni", self.weight.to(x.dtype)[cond], x) * t[:, None]


X_T, TIME = torch.randn(5, 3, dtype=torch.float64, generator=rng(2)), torch.rand(5, dtype=torch.float64)


def test_the_concept_loss_is_its_mean_and_vanishes_where_conditions_coincide():
    net = Denoiser()
    one, two = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    value = concept_unlearning_loss(net, X_T, TIME, one, two)
    change = (X_T @ (net.weight[0] - net.weight[1]).T) * TIME[:, None]
    torch.testing.assert_close(value, change.square().mean())
    (got,) = torch.autograd.grad(value, net.weight)
    assert not got[1:].any() and got[0].any()  # none through the target
    expected = 2 / 15 * (change * TIME[:, None]).T @ X_T
    torch.testing.assert_close(got[0], expected.detach())
    assert concept_unlearning_loss(net, X_T, TIME, two, two) == 0


class ConceptLoss(nn.Module):
    """The loss as a function of the two predictions, which a network that holds them gives."""

    def forward(self, guess, target):
        return concept_unlearning_loss(lambda x, t, cond: guess if cond else target, target, 0, True, False)


def test_the_concept_loss_conforms_to_its_kind(as_a_user):
    check_loss(ConceptLoss(), X_T.clone().requires_grad_(), X_T.flip(0).clone(), symmetric=True)


# The report.


def test_the_report_is_the_official_attack_and_three_accuracies():
    net = network().eval()
    x, y = rows(40, 9)
    report = unlearning_report(net, FORGET, RETAIN, (x, y))
    shares = {}
    for name, (inputs, target) in {"f": FORGET, "r": RETAIN, "t": (x, y)}.items():
        with torch.no_grad():
            logits = net(inputs).double().numpy()
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        shares[name] = p[np.arange(len(p)), target.numpy()], (p.argmax(1) == target.numpy()).mean()
    assert report.forget_error == pytest.approx(1 - shares["f"][1])
    assert (report.retain_accuracy, report.test_accuracy) == pytest.approx((shares["r"][1], shares["t"][1]))
    spaced = [round(float(k)) if k == round(float(k)) else int(k) for k in np.linspace(0, 49, 40)]
    members = np.concatenate([shares["r"][0][spaced], shares["t"][0]])[:, None]
    svc = SVC(C=3, gamma="auto", kernel="rbf").fit(members, [1] * 40 + [0] * 40)
    assert report.mia == pytest.approx(np.mean(svc.predict(shares["f"][0][:, None]) == 0))


def test_an_attack_finds_what_was_memorised_and_calls_unseen_rows_unseen():
    """A model that is sure of what it has seen, the first entry being a mark of it, and of nothing else."""

    class Memory(nn.Module):
        def forward(self, x):
            return torch.stack([8.0 * x[:, 0], torch.zeros(len(x))], 1)

    x, y = torch.zeros(100, 2), torch.zeros(100, dtype=torch.long)
    x[:50, 0] = 1
    kept, new = (x[10:50], y[10:50]), (x[50:90], y[50:90])
    assert unlearning_report(Memory(), (x[:10], y[:10]), kept, new).mia == 0
    assert unlearning_report(Memory(), (x[90:], y[90:]), kept, new).mia == 1


def test_the_gap_is_the_mean_absolute_difference():
    one, two = UnlearningReport(0.1, 1.0, 0.8, 0.2), UnlearningReport(0.3, 0.9, 0.8, 0.1)
    assert one.gap(two) == two.gap(one) == pytest.approx(0.1) and one.gap(one) == 0


def test_the_report_leaves_the_model_as_it_is():
    net = network(dropout=0.5).train()
    before = state(net)
    report = unlearning_report(net, FORGET, RETAIN, RETAIN)
    assert equal(state(net), before)
    assert report == unlearning_report(network(dropout=0.5).eval(), TensorDataset(*FORGET), RETAIN, RETAIN)


NET, (X, Y) = network(), FORGET
NAN = copy.deepcopy(NET)
NAN[4].bias.data[0] = torch.nan
FROZEN = network().requires_grad_(False)


def unlearn(model=NET, forget=FORGET, retain=RETAIN, n_classes=3, **options):
    return salun(model, forget, retain, n_classes=n_classes, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saliency_mask(NET, FORGET, keep=0.0), r"keep must be in \(0, 1\], got 0.0"),
        (lambda: saliency_mask(NET, FORGET, keep=1.5), r"keep must be in \(0, 1\], got 1.5"),
        (lambda: saliency_mask(NET, []), "forget must have at least one row, got none"),
        (lambda: saliency_mask(NET, (X[:0], Y[:0])), "forget must have at least one row, got none"),
        (lambda: saliency_mask(NET, (X, Y[:3])), "forget must have a label an input, got 20 inputs and 3 labels"),
        (lambda: saliency_mask(NET, 3), "forget must be tensors .* got int"),
        (lambda: saliency_mask(NET, [1, 2]), "forget must be tensors .* got int"),
        (lambda: saliency_mask(NET, (X, Y + 1)), r"labels of forget must be in 0..2, got values from 1 to 3"),
        (lambda: saliency_mask(NET, (X, Y > 1)), "labels of forget must hold class indices"),
        (lambda: saliency_mask(FROZEN, FORGET), "model must have a parameter with a gradient"),
        (lambda: saliency_mask(NAN, FORGET), "the gradient of model must be finite, that of 0.weight is not"),
        (lambda: saliency_mask(NET, FORGET, loss_fn=lambda out, y: out), "loss_fn must return a scalar tensor"),
        (lambda: unlearn(keep=0.0), r"keep must be in \(0, 1\]"),
        (lambda: unlearn(n_classes=1), "n_classes must be an integer of at least 2"),
        (lambda: unlearn(n_classes=4), r"model must give logits of shape \(batch, 4\), got \(20, 3\)"),
        (lambda: unlearn(forget=(X[:0], Y[:0])), "forget must have at least one row"),
        (lambda: unlearn(retain=(X[:0], Y[:0])), "retain must have at least one row"),
        (lambda: unlearn(retain=(X, Y - 1)), r"labels of retain must be in 0..2, got values from -1 to 1"),
        (lambda: unlearn(forget=TensorDataset(X, Y + 9)), "labels of forget must be in 0..2, got values from 9"),
        (lambda: unlearn(forget=[FORGET]), r"forget must be tensors \(x, y\) or a dataset with a length, got list"),
        (lambda: unlearn(mask={}), "mask must have the names of the parameters, they differ in"),
        (lambda: unlearn(mask={n: torch.ones(2).bool() for n, _ in NET.named_parameters()}), r"mask must be bool of shape \(16, 6\) for 0.weight"),
        (lambda: unlearn(mask={n: torch.ones_like(p) for n, p in NET.named_parameters()}), "mask must be bool .* got torch.float32"),
        (lambda: unlearn(epochs=0), "epochs must be an integer of at least 1"),
        (lambda: unlearn(batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: unlearn(lr=0.0), "lr must be greater than 0"),
        (lambda: unlearn(lr=1e30), "lr must be lower, the loss is"),
        (lambda: unlearn(momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: unlearn(weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: unlearn(alpha=-1.0), "alpha must be at least 0"),
        (lambda: unlearn(order="random"), "order must be one of 'sequential', 'mixed'"),
        (lambda: unlearn(FROZEN), "model must have a parameter with a gradient"),
        (lambda: MaskedOptimizer(None, NET.named_parameters(), {}), "optimizer must be a torch.optim.Optimizer"),
        (lambda: MaskedOptimizer(torch.optim.SGD(NET.parameters()), NET[0].named_parameters(), saliency_mask(NET[0], FORGET, loss_fn=lambda out, y: out.sum())),
         "named_parameters must have every parameter of optimizer"),
        (lambda: masked_step(torch.optim.SGD(NET.parameters()), {}, {}), r"mask must have a tensor of shape \(16, 6\)"),
        (lambda: concept_unlearning_loss(Denoiser(), X_T[:0], TIME, Y, Y), "x_t must have at least one row"),
        (lambda: concept_unlearning_loss(Denoiser(), X_T.long(), TIME, Y, Y), "x_t must be a floating-point tensor"),
        (lambda: concept_unlearning_loss(lambda x, t, c: x[:c], X_T, TIME, 2, 3), "net must give one shape for both"),
        (lambda: unlearning_report(NAN, FORGET, RETAIN, RETAIN), "model must give finite logits, those of forget"),
        (lambda: unlearning_report(NET, FORGET, RETAIN, (X[:0], Y[:0])), "test must have at least one row"),
        (lambda: unlearning_report(NET, FORGET, (X, Y + 1), RETAIN), r"labels of retain must be in 0\.\.2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
