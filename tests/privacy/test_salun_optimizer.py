"""SalUn's masked optimiser: any optimiser moves only what it may; its schedules, states and copies."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.privacy import MaskedOptimizer, masked_step, saliency_mask


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


FORGET = rows(20)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_moves_only_what_it_may(name):
    model = network()
    mask = saliency_mask(model, FORGET, keep=0.4)
    was = copy.deepcopy(dict(model.named_parameters()))
    inner = OPTIMIZERS[name](model.parameters())
    optimizer = MaskedOptimizer(inner, model.named_parameters(), mask)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(FORGET[0]), FORGET[1])
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        if name == "LBFGS":
            losses.append(optimizer.step(closure).item())
        else:
            losses.append(closure().item())
            assert optimizer.step() is None
        for key, p in model.named_parameters():
            assert torch.equal(p[~mask[key]], was[key][~mask[key]])
            if name != "LBFGS":
                assert (p != was[key])[mask[key]].float().mean() > 0.9
                for entry in inner.state[p].values():
                    assert entry is None or entry.shape != p.shape or not entry[~mask[key]].any()
    assert losses[2] < losses[0]


def test_what_may_move_moves_as_under_the_optimiser_alone_and_nan_stays_outside():
    w = nn.Parameter(torch.tensor([1.0, -0.0, 3.0]))
    free = nn.Parameter(w.detach().clone())
    mask, anchor = torch.tensor([True, False, False]), w.detach().clone()
    ours, alone = (torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1) for p in (w, free))
    for gradient in ([1.0, float("nan"), float("inf")], [2.0, 5.0, -7.0]):
        w.grad, free.grad = torch.tensor(gradient), torch.tensor(gradient)
        masked_step(ours, {w: mask}, {w: anchor})
        alone.step()
        assert torch.equal(w[0], free[0])
        assert torch.equal(w[1:].view(torch.int32), anchor[1:].view(torch.int32))
        assert ours.state[w]["momentum_buffer"][1:].tolist() == [0.0, 0.0]


def test_schedules_groups_states_and_copies_of_a_masked_optimiser():
    model = network()
    mask = saliency_mask(model, FORGET, keep=0.4)

    def make(model):
        groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": [*model[1:].parameters()]}]
        inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return MaskedOptimizer(inner, model.named_parameters(), mask), inner

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(FORGET[0]), FORGET[1]).backward()
            optimizer.step()

    optimizer, inner = make(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 2)
    schedule.step()
    assert [group["lr"] for group in inner.param_groups] == [0.25, 0.05]
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin, again = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(twin, again, 2)
    assert equal(twin.state_dict(), model.state_dict())
    fresh = copy.deepcopy(network())
    other, _ = make(fresh)
    fresh.load_state_dict(stored[0])
    other.load_state_dict(stored[1])
    train(fresh, other, 2)
    assert equal(fresh.state_dict(), model.state_dict())
