"""The learner against the method in plain loops; at once as one by one; saved and gone on with to the bit."""

import functools
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.transfer import ScheduledDataPrior, ema_rates
from posterity.transfer.scheduled_data_prior import _mixed

SGD = functools.partial(torch.optim.SGD, lr=0.2)
DATA = torch.rand(4, 5), torch.tensor([0, 1, 0, 1])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def body(n_in=5, n_features=6, dtype=torch.float64, seed=0):
    net = nn.Sequential(nn.Linear(n_in, n_features), nn.Tanh())
    net[0].weight.data.copy_(torch.randn(n_features, n_in, generator=rng(seed)))
    net[0].bias.data.zero_()
    return net.to(dtype)


def samples(n=60, n_classes=3, seed=1):
    y = torch.randint(n_classes, (n,), generator=rng(seed))
    x = 0.5 * torch.randn(n, 5, dtype=torch.float64, generator=rng(seed + 1))
    x[torch.arange(n), y] += 2.0
    return x, y


def alike(one, other):
    """Return whether two states are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@pytest.mark.parametrize("adaptive", [True, False])
def test_it_is_the_method_in_plain_loops(adaptive):
    """A batch is the whole memory, so that nothing is drawn but the rows of the head, before the first step."""
    x, y = samples(24)
    x[:3], y[:3] = x[[int((y == k).nonzero()[0]) for k in range(3)]], torch.arange(3)
    learner = ScheduledDataPrior(body(), 6, memory_size=100, batch_size=100, optimizer=SGD, prior_mean=6.0,
                                 prior_var=0.5, window=4, adaptive_lr=adaptive, updates_per_sample=1e-9)  # fmt: skip
    learner.observe(x[:3], y[:3])
    net = [p.detach().clone().requires_grad_() for p in (*body().parameters(), *learner.head.parameters())]
    learner.updates_per_sample = 1.0
    learner.observe(x[3:], y[3:])

    slow, fast, teacher = ([p.detach().clone() for p in net[:2]] for _ in range(3))
    r1, r2 = ema_rates(6.0, 0.5)
    known = [[], [], []]
    for k in range(len(y)):
        with torch.no_grad():
            theirs = torch.tanh(x[k] @ teacher[0].T + teacher[1])
            known[y[k]].append(float((net[2] @ theirs + net[3])[: k + 1 if k < 3 else 3].softmax(0)[y[k]]))
        if k < 3:
            continue
        mean = sum(sum(each[-4:]) / len(each[-4:]) for each in known) / 3
        c = min(max(mean - 1 / 3, 0), 1) * 3 / 4
        loss = 0.0
        betas, ours = [], []
        for i in range(k + 1):
            f = torch.tanh(x[i] @ net[0].T + net[1])
            entropy = F.cross_entropy(net[2] @ f + net[3], y[i])
            (g,) = torch.autograd.grad(entropy, f, retain_graph=True)
            apart = (f - torch.tanh(x[i] @ teacher[0].T + teacher[1])).square().sum()
            betas.append(float((g.square().sum() / (4 * apart.detach() + 1e-8)).sqrt()))
            ours.append((entropy, apart))
        beta = sum(betas) / len(betas)
        loss = sum((1 - c) * entropy + beta * c * apart for entropy, apart in ours) / len(ours)
        grads = torch.autograd.grad(loss, net)
        with torch.no_grad():
            for p, g in zip(net, grads, strict=True):
                p -= 0.2 * (1 - c if adaptive else 1) * g
            for j in range(2):
                slow[j] += r1 * (net[j] - slow[j])
                fast[j] += r2 * (net[j] - fast[j])
                teacher[j] = (r2 * slow[j] - r1 * fast[j]) / (r2 - r1)
    assert 0.1 < c < 0.75
    assert learner.prior_weight == pytest.approx(c)
    for got, expected in zip((*learner.body.parameters(), *learner.head.parameters()), net, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for got, expected in zip(learner.teacher.module.parameters(), teacher, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def awkward():
    """A body with running statistics and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 6),
                             nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU())  # fmt: skip


def awkward_learner(seed=0):
    return ScheduledDataPrior(awkward(), 6, memory_size=12, batch_size=5, lr=1e-2, prior_mean=20.0, prior_var=0.6,
                              updates_per_sample=0.75, cutmix=1.0, generator=rng(seed),
                              augment=lambda x: x + 0.1 * torch.randn_like(x))  # fmt: skip


def test_many_at_once_are_as_one_after_another_and_torchs_own_state_stays():
    x, y = torch.rand(40, 1, 4, 4, generator=rng()), torch.randint(4, (40,), generator=rng(1))
    together, single = awkward_learner(), awkward_learner()
    before = torch.get_rng_state()
    together.observe(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)  # what others draw in between does not matter
    for k in range(40):
        single.observe(x[k : k + 1], y[k : k + 1], task=k)
    assert alike(together.state_dict(), single.state_dict())
    assert not alike(together.state_dict()["body"], awkward().state_dict())


@pytest.mark.parametrize("at", [0, 1, 23])
def test_a_saved_learner_goes_on_to_the_bit(at):
    x, y = torch.rand(45, 1, 4, 4, generator=rng()), torch.randint(5, (45,), generator=rng(1))
    one, other = awkward_learner(), awkward_learner(seed=9)
    if at:
        one.observe(x[:at], y[:at])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    one.observe(x[at:], y[at:])
    file.seek(0)
    if at == 23:
        other.observe(x[:5], y[:5] + 90)  # what it knew is gone
    other.load_state_dict(torch.load(file, weights_only=True))
    other.observe(x[at:], y[at:])
    assert alike(one.state_dict(), other.state_dict())
    assert torch.equal(one.logits(x), other.logits(x))


def test_a_state_does_not_move_with_the_learner():
    x, y = samples(30)
    learner = ScheduledDataPrior(body(), 6, lr=1e-2)
    learner.observe(x[:20], y[:20])
    state = learner.state_dict()
    kept = learner.state_dict()
    learner.observe(x[20:], y[20:])
    assert alike(state, kept)
    assert not alike(state, learner.state_dict())


def test_a_new_class_adds_a_row_and_only_the_head_forgets_its_optimizer():
    x, y = samples(30, n_classes=2)
    learner = ScheduledDataPrior(body(), 6, lr=1e-2, generator=rng(), batch_size=64)
    learner.observe(x, y)
    old, weight = learner.head, learner.head.weight.detach().clone()
    steps = {id(p): float(s["step"]) for p, s in learner.optimizer.state.items()}
    second = int((y != y[0]).nonzero()[0])  # where the head began anew
    assert (steps[id(learner.body[0].weight)], steps[id(learner.head.weight)]) == (30, 30 - second)
    learner.updates_per_sample = 1e-9
    learner.observe(x[:1], torch.tensor([17]))
    assert learner.head is old
    assert torch.equal(learner.head.weight[:2], weight)
    assert learner.head.weight.shape == (3, 6) and learner.head.weight[2].abs().max() <= 1 / math.sqrt(6)
    assert float(learner.optimizer.state[learner.body[0].weight]["step"]) == 30
    assert learner.head.weight not in learner.optimizer.state
    assert learner.classes_ == [*dict.fromkeys(y.tolist()), 17]
    learner.updates_per_sample = 1.0
    learner.observe(x[:4], torch.full((4,), 17))
    assert float(learner.optimizer.state[learner.head.weight]["step"]) == 4


@pytest.mark.parametrize(("share", "n", "steps"), [(0.25, 11, 2), (1.0, 7, 7), (2.5, 4, 10)])
def test_shares_of_updates_add_up(share, n, steps):
    count = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            count.append(1)
            return super().step(closure)

    x, y = samples(n)
    ScheduledDataPrior(body(), 6, updates_per_sample=share, optimizer=lambda p: Counting(p, lr=0.1)).observe(
        x, y
    )
    assert len(count) == steps


def test_it_learns_is_asked_at_any_time_and_answers_in_labels_as_they_came():
    x, y = samples(120)
    learner = ScheduledDataPrior(body(), 6, lr=1e-2, memory_size=30, prior_mean=40.0, generator=rng())
    names = torch.tensor([30, -7, 400])
    learner.observe(x.bfloat16()[:60], names[y[:60]].double())  # whole numbers in floats, and few digits
    early = learner.predict(x)
    assert early.dtype == torch.int64 and set(early.tolist()) <= set(names.tolist())
    learner.observe(x[60:], names[y[60:]])
    assert float((learner.predict(x) == names[y]).double().mean()) > 0.9
    assert learner.logits(x.half()).dtype == torch.float16
    assert torch.equal(
        learner.logits(x).argmax(1), torch.tensor([learner.classes_.index(c) for c in learner.predict(x)])
    )
    assert learner.n_seen == 120 and len(learner.memory) == 30


def test_the_users_module_keeps_its_modes_flags_and_frozen_weights():
    net = awkward()
    net[1].eval()
    net[3].weight.requires_grad_(False)
    frozen, moved = net[3].weight.clone(), net[0].weight.clone()
    modes = [module.training for module in net.modules()]
    learner = ScheduledDataPrior(net, 6, lr=1e-2)
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    with torch.no_grad():
        learner.observe(x, y)
    with torch.inference_mode():
        learner.observe(x.clone(), y.clone())  # inference tensors
        learner.predict(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner.observe(x, y)
        assert learner.logits(x).dtype == torch.float32
    learner.observe(x, y)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net[3].weight, frozen) and not torch.equal(net[0].weight, moved)
    assert all(p.grad is None for p in net.parameters())
    learner.body[6] = Broken()
    learner._modules.append(learner.body[6])
    with pytest.raises(RuntimeError, match="broken"):
        learner.observe(x, y)
    assert [module.training for module in net.modules()] == modes


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_a_body_without_weights_trains_the_head_alone():
    learner = ScheduledDataPrior(nn.Flatten(), 5, lr=0.1, generator=rng())
    x, y = samples(60)
    learner.observe(x.view(60, 5, 1), y)
    assert float((learner.predict(x.view(60, 5, 1)) == y).double().mean()) > 0.9


class Looking(nn.Module):
    """A body that keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(16, 4), []

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.seen.append(x)
        return self.linear(x.flatten(1))


def test_half_of_the_batches_are_mixed_by_boxes_of_other_images():
    learner = ScheduledDataPrior(Looking(), 4, cutmix=1.0, batch_size=8, generator=rng())
    y = torch.arange(200) % 5
    learner.observe(y.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4), y)
    values = [[len(image.unique()) for image in batch] for batch in learner.body.seen]
    assert max(map(max, values)) == 2
    # some boxes are empty, or hold all, or meet an image of their own class
    assert 0.25 < sum(max(each) == 2 for each in values) / len(values) < 0.55


def test_a_mixture_counts_its_pixels():
    torch.manual_seed(0)
    y = torch.arange(6)
    x = y.double().view(6, 1, 1, 1).expand(6, 1, 7, 5)
    for _ in range(40):
        mixed, other, lam = _mixed(x, y, 1.0)
        assert 0 <= lam <= 1
        for k in range(6):
            assert float((mixed[k] == k).double().mean()) == pytest.approx(lam if other[k] != k else 1)
            assert ((mixed[k] == k) | (mixed[k] == other[k])).all()


# --- what is refused ---


def learner(n=5, **options):
    return ScheduledDataPrior(nn.Linear(n, 3), 3, **options)


def seen():
    one = learner()
    one.observe(*DATA)
    return one


NAN = DATA[0].masked_fill(torch.eye(4, 5) > 0, math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScheduledDataPrior(None, 3), "body must be a torch module"),
        (lambda: ScheduledDataPrior(nn.Linear(5, 3).bfloat16(), 3), "body must be in float32 or float64, got torch.bfloat16"),
        (lambda: ScheduledDataPrior(nn.Linear(5, 3), 0), "n_features must be an integer of at least 1"),
        (lambda: learner(memory_size=0), "memory_size must be an integer of at least 1"),
        (lambda: learner(batch_size=0), "batch_size must be"),
        (lambda: learner(updates_per_sample=0), "updates_per_sample must be greater than 0"),
        (lambda: learner(lr=-1.0), "lr must be greater than 0"),
        (lambda: learner(window=0), "window must be"),
        (lambda: learner(cutmix=-1), "cutmix must be at least 0"),
        (lambda: learner(prior_var=0.4), "prior_var must be greater than 0.4999 and at most 0.9997 for prior_mean 10000"),
        (lambda: learner(prior_mean=1.0), "prior_mean must be greater than 2"),
        (lambda: learner(optimizer=3), "optimizer must be callable"),
        (lambda: learner(optimizer=lambda p: None), "optimizer must return a torch optimizer"),
        (lambda: learner(augment="flip"), "augment must be callable"),
        (lambda: learner().predict(DATA[0]), "x cannot be classified before"),
        (lambda: learner().observe(NAN, DATA[1]), "x must be finite"),
        (lambda: seen().predict(NAN), "x must be finite"),
        (lambda: learner().observe(DATA[0].long(), DATA[1]), "x must be a floating-point tensor"),
        (lambda: learner().observe(None, DATA[1]), "x must be a floating-point tensor"),
        (lambda: learner().observe(DATA[0][:0], DATA[1][:0]), "x must have at least one row"),
        (lambda: learner().observe(torch.tensor(1.0), DATA[1]), "x must have at least one row"),
        (lambda: seen().observe(torch.rand(1, 4), DATA[1][:1]), r"x must have rows of shape \(5,\) as before, got \(4,\)"),
        (lambda: seen().logits(torch.rand(1, 4)), "x must have rows of shape"),
        (lambda: learner().observe(DATA[0], DATA[1][:3]), r"y must have shape \(4\)"),
        (lambda: learner().observe(DATA[0], DATA[1] + 0.5), "y must hold whole numbers"),
        (lambda: learner().observe(DATA[0], DATA[1] * math.nan), "y must hold whole numbers"),
        (lambda: learner().observe(DATA[0], DATA[1] > 0), "y must hold class indices, got torch.bool"),
        (lambda: learner().observe(DATA[0], [0, 1, 0, 1]), "y must hold class indices, got list"),
        (lambda: ScheduledDataPrior(nn.Linear(5, 4), 3).observe(*DATA), r"body must return \(n, 3\), n_features wide, got \(1, 4\)"),
        (lambda: learner(cutmix=1.0).observe(*DATA), r"x must be images \(n, channels, height, width\) for cutmix"),
        (lambda: learner(augment=lambda x: x[:1]).observe(*DATA), "augment must keep the 2 rows, gave 1"),
        (lambda: learner(lr=1e30).observe(*DATA), "lr must be lower"),
        (lambda: learner().load_state_dict({}), "state must be what state_dict"),
        (lambda: seen().load_state_dict(learner().state_dict()), "state must not be of before"),
        (lambda: ScheduledDataPrior(nn.Linear(5, 4), 4).load_state_dict(seen().state_dict()), "state must have 4 features"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_does_not_fit_leaves_the_learner_as_it_was(as_a_user):
    one = seen()
    before = one.state_dict()
    for x, y in ((NAN, DATA[1]), (DATA[0][:, :3], DATA[1]), (DATA[0], DATA[1] + 0.5), (DATA[0], DATA[1][:2])):
        with pytest.raises(ValueError, match=r"x|y"):
            one.observe(x, y)
    assert alike(one.state_dict(), before)
