"""Susceptibility: a step that leaves no trace, its closed form on a quadratic, and the choice of models."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.labels import Susceptibility, model_regions, select_models, susceptibility_step


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
    ).to(dtype)


def batch(n=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=rng), torch.randint(3, (n,), generator=rng)


class Momentum(torch.optim.Optimizer):
    """Keeps a list and a number in its state, replaces its tensors, and changes its groups."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "seen": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
                state.setdefault("past", []).append(float(p.grad.norm()))
                state["count"] = state.get("count", 0) + 1
                p -= group["lr"] * state["mean"]
        self.state["steps"] = self.state["steps"] + 1 if "steps" in self.state else 1


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "own": Momentum,
}


def everything(net, optimizer):
    """Return all that a step might change, copied."""
    return copy.deepcopy(
        (
            dict(net.state_dict()),
            [p.grad for p in net.parameters()],
            [m.training for m in net.modules()],
            optimizer.state_dict(),
            {name: value for name, value in vars(optimizer).items() if isinstance(value, bool)},
        )
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("mode", [True, False])
def test_a_measurement_leaves_no_trace(name, trained, mode):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1) if name == "SGD" else None
    net.train(mode)
    net[1].eval()
    for seed in range(trained):
        optimizer.zero_grad(set_to_none=seed == 0)
        F.cross_entropy(net(batch(seed=seed)[0]), batch(seed=seed)[1]).backward()
        optimizer.step()
    if trained and schedule:
        schedule.step()
    objects = (
        [id(p) for p in net.parameters()],
        [id(p.grad) for p in net.parameters()],
        set(map(id, optimizer.state)),
    )
    before, chance = everything(net, optimizer), torch.get_rng_state()
    phi, after = susceptibility_step(net, optimizer, *batch(seed=9))
    assert phi != after
    assert equal(everything(net, optimizer), before)
    assert torch.equal(torch.get_rng_state(), chance)
    assert objects == (
        [id(p) for p in net.parameters()], [id(p.grad) for p in net.parameters()], set(map(id, optimizer.state))
    )  # fmt: skip
    assert trained or not optimizer.state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_by_bit_what_it_is_without_the_metric(name):
    def train(measured):
        net = network()
        optimizer = OPTIMIZERS[name](net.parameters())
        metric = Susceptibility(batch(50, 7)[0], 3, batch_size=20)
        torch.manual_seed(5)
        losses = []
        for epoch in range(3):
            if measured:
                metric.update(net, optimizer)
            for seed in range(2):
                x, y = batch(seed=10 * epoch + seed)
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses, everything(net, optimizer)

    assert equal(train(True), train(False))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_measures_the_same_inside_no_grad_and_inference_mode(context):
    net = network()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    torch.manual_seed(1)
    outside = susceptibility_step(net, optimizer, *batch())
    torch.manual_seed(1)
    with context():
        assert susceptibility_step(net, optimizer, *(each.clone() for each in batch())) == outside


def test_the_drop_of_a_quadratic_is_its_closed_form():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    net = nn.Linear(4, 1, bias=False).double()
    lr = 0.07
    before, after = susceptibility_step(
        net, torch.optim.SGD(net.parameters(), lr=lr), x, y, loss_fn=F.mse_loss
    )
    w = net.weight.detach().T
    gradient = 2 / 20 * x.T @ (x @ w - y)
    hessian = 2 / 20 * x.T @ x
    drop = lr * (gradient * gradient).sum() - lr**2 / 2 * (gradient.T @ hessian @ gradient).sum()
    assert before == pytest.approx(float(((x @ w - y) ** 2).mean()), abs=1e-12)
    assert before - after == pytest.approx(float(drop), abs=1e-10)


def test_momentum_and_weight_decay_count_as_they_stand():
    """One parameter, loss w: the step is lr (momentum b + 1 + decay w)."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 2.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5, weight_decay=0.25)
    net.weight.grad = torch.full((1, 1), 3.0, dtype=torch.float64)
    optimizer.step()  # the buffer is 3.5, the weight 1.65
    x = torch.ones(1, 1, dtype=torch.float64)
    before, after = susceptibility_step(net, optimizer, x, x, loss_fn=lambda out, y: (out * y).sum())
    assert before == pytest.approx(1.65)
    assert before - after == pytest.approx(0.1 * (0.5 * 3.5 + 1 + 0.25 * 1.65))


def test_batch_norm_and_dropout_are_in_training_mode_for_both_losses():
    seen = []
    net = network().eval()
    net[1].register_forward_hook(lambda module, *_: seen.append((module.training, net[3].training)))
    susceptibility_step(net, OPTIMIZERS["SGD"](net.parameters()), *batch())
    assert seen == [(True, True)] * 2


def test_without_a_rate_nothing_drops():
    net = nn.Linear(6, 3)
    metric = Susceptibility(batch(40)[0], 3)
    for _ in range(3):
        metric.update(net, torch.optim.SGD(net.parameters(), lr=0.0))
    assert metric.history == [0.0] * 3 and float(metric.compute()) == 0.0


def test_the_mean_of_the_history_and_what_reset_forgets():
    net = network()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    metric = Susceptibility(batch(40)[0], 3, batch_size=16)
    labels = metric.labels.clone()
    for _ in range(4):
        metric.update(net, optimizer)
    assert len(set(metric.history)) == 4  # each on a batch of its own
    assert float(metric.compute()) == pytest.approx(np.mean(metric.history), rel=1e-12)
    metric.reset()
    assert metric.history == [] and torch.equal(metric.labels, labels)
    with pytest.raises(ValueError, match="call update first"):
        metric.compute()


def test_a_seed_decides_labels_and_batches_and_the_metric_measures_what_the_function_does():
    net = network()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    probe = batch(40)[0]
    metrics = [
        Susceptibility(probe, 3, batch_size=16, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    for metric in metrics:
        torch.manual_seed(0)
        metric.update(net, optimizer)
    assert metrics[0].history == metrics[1].history != metrics[2].history
    assert torch.equal(metrics[0].labels, metrics[1].labels)
    assert set(metrics[0].labels.tolist()) == {0, 1, 2}
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (40,), generator=rng)
    rows = torch.randperm(40, generator=rng)[:16]
    torch.manual_seed(0)
    before, after = susceptibility_step(net, optimizer, probe[rows], labels[rows])
    assert metrics[0].history == [before - after]


def test_replicas_merge_and_the_state_goes_through_a_dict_a_pickle_and_a_copy():
    net = network()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    first, second = (
        Susceptibility(batch(40)[0], 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    for _ in range(2):
        first.update(net, optimizer)
    second.update(net, optimizer)
    pooled = [*first.history, *second.history]
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(np.mean(pooled), rel=1e-12)
    again = Susceptibility(batch(40)[0], 3)
    again.load_state_dict(first.state_dict())
    assert sorted(again.history) == sorted(pooled) and torch.equal(again.labels, first.labels)
    for original, twin in (
        (first, copy.deepcopy(first)), (second, pickle.loads(pickle.dumps(second))), (second, second.to("cpu")),
    ):  # fmt: skip
        before = list(original.history)
        twin.update(net, optimizer)
        assert twin.history[:-1] == before and len(twin.history) == len(before) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_has_a_wide_loss(dtype):
    """The drop is a small difference of two losses: in 16 bits it would be a multiple of 2^-8."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3).to(dtype)
    x, y = batch(64)
    drop = np.subtract(*susceptibility_step(net, torch.optim.SGD(net.parameters(), lr=0.5), x.to(dtype), y))
    full = copy.deepcopy(net).float()
    exact = np.subtract(
        *susceptibility_step(full, torch.optim.SGD(full.parameters(), lr=0.5), x.to(dtype).float(), y)
    )
    assert drop == pytest.approx(exact, rel=0.1) and drop * 2**8 % 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_too():
    net = network().cuda()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    before, chance = everything(net, optimizer), torch.cuda.get_rng_state()
    metric = Susceptibility(batch(40)[0], 3)
    metric.update(net, optimizer)
    assert equal(everything(net, optimizer), before) and torch.equal(torch.cuda.get_rng_state(), chance)
    metric.to("cuda").update(net, optimizer)
    assert metric.compute().is_cuda


def test_shared_parameters_and_several_groups_are_put_back():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    optimizer = torch.optim.SGD(
        [{"params": [net[0].weight], "lr": 0.1}, {"params": net[3].parameters()}], lr=0.01, momentum=0.9
    )
    before = everything(net, optimizer)
    susceptibility_step(net, optimizer, *batch())
    assert equal(everything(net, optimizer), before)


def test_an_error_on_the_way_leaves_no_trace_either():
    net = network()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    before = everything(net, optimizer)
    calls = []

    def breaks(out, y):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("after the step")
        return F.cross_entropy(out, y)

    with pytest.raises(RuntimeError, match="after the step"):
        susceptibility_step(net, optimizer, *batch(), loss_fn=breaks)
    assert equal(everything(net, optimizer), before)


def test_regions_of_a_square_and_of_equal_models():
    zeta, accuracy = [0.1, 0.9, 0.1, 0.9], [0.9, 0.9, 0.2, 0.2]
    assert model_regions(zeta, accuracy).tolist() == [1, 2, 3, 4]
    assert model_regions(torch.tensor(zeta), np.array(accuracy, dtype=np.float32)).tolist() == [1, 2, 3, 4]
    narrow = torch.tensor([[1.0, 9.0, 1.0, 9.0], [9.0, 9.0, 2.0, 2.0]])
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        assert model_regions(*narrow.to(dtype)).tolist() == [1, 2, 3, 4]
    assert model_regions([0.1] * 3, [0.7] * 3).tolist() == [1, 1, 1]  # at the mean, whatever a sum rounds to
    assert model_regions([2, 0], [1, 0]).tolist() == [2, 3]


def test_selection_is_by_resistance_then_by_accuracy_and_never_empty():
    assert select_models([0.2, 0.1, 0.2, 0.9], [0.8, 0.7, 0.9, 0.1]).tolist() == [1, 2, 0]
    # trainable models are susceptible, resistant ones are not trainable: ranks 1 + 1 beat 0 + 3 and 3 + 0
    zeta, accuracy = [0.0, 0.45, 1.0, 0.9], [0.0, 0.4, 1.0, 0.3]
    assert model_regions(zeta, accuracy).tolist() == [3, 3, 2, 4]
    assert select_models(zeta, accuracy).tolist() == [1]


NET = network()
X, Y = batch(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sgd: susceptibility_step(NET, sgd, X, Y[:7]), "x and y must have one length, at least 1, got 8 and 7"),
        (lambda sgd: susceptibility_step(NET, sgd, X[:0], Y[:0]), "x and y must have one length, at least 1, got 0"),
        (lambda sgd: susceptibility_step(NET, torch.optim.LBFGS(NET.parameters()), X, Y),
         "optimizer must not need a closure, got LBFGS"),
        (lambda sgd: susceptibility_step(nn.Linear(6, 3), sgd, X, Y),
         r"optimizer must have parameters of model only, parameter 0 of group 0, of shape \(12, 6\), is not"),
        (lambda sgd: susceptibility_step(NET, None, X, Y), "optimizer must be a torch.optim.Optimizer, got NoneType"),
        (lambda sgd: susceptibility_step(NET, sgd, X * torch.nan, Y), "the loss of model must be finite before the step"),
        (lambda sgd: Susceptibility(X * torch.inf, 3).update(NET, sgd), "must be finite .* in epoch 0"),
        (lambda sgd: Susceptibility(X[:1], 3), r"probe must be a tensor of at least 2 inputs, got \(1, 6\)"),
        (lambda sgd: Susceptibility([1, 2], 3), "probe must be a tensor of at least 2 inputs, got list"),
        (lambda sgd: Susceptibility(X, 1), "n_classes must be an integer of at least 2, got 1"),
        (lambda sgd: Susceptibility(X, 3, batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda sgd: model_regions([1.0], [1.0]), "susceptibility must be numbers of at least 2 models"),
        (lambda sgd: model_regions(torch.eye(2)[0].to_sparse(), [1.0, 1.0]), "susceptibility must be dense"),
        (lambda sgd: model_regions([1.0, np.nan], [1.0, 1.0]), "susceptibility must be finite, got NaN or infinity in row 1"),
        (lambda sgd: select_models([1.0, 2.0], [1.0, 1.0, 1.0]), r"train_accuracy must have shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.optim.SGD(NET.parameters(), lr=0.1))


def test_the_metric_without_torchmetrics_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"posterity\[uncertainty\]"):
        Susceptibility(X, 3)
