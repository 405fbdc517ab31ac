"""The protocol of node classification against its steps by hand, scikit-learn and torch."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from posterity.graphs import HeterophilyGNN, fit_node_classifier, node_protocol, run_protocol


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(n=40, classes=3, seed=0):
    y = torch.arange(n) % classes
    x = F.one_hot(y, classes).double() + torch.randn(n, classes, generator=seeded(seed)).double()
    edges = torch.randint(n, (2, 3 * n), generator=seeded(seed))
    part = torch.arange(n) // classes % 4
    return x, edges, y, part < 2, part == 2, part == 3


class Alone(nn.Module):
    """A linear map of a node's own features, and what it was asked for."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear, self.norm = nn.Linear(n_in, n_out).double(), nn.LayerNorm(n_in).double()
        self.outputs = []

    def forward(self, x, edge_index):
        out = self.linear(self.norm(x))
        if not self.training:
            self.outputs.append(out.detach())
        return out


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("eval_every", [1, 4])
def test_the_test_value_is_that_of_the_first_best_validation_value(classes, eval_every):
    x, edges, y, *parts = task(n=60, classes=classes)
    net = Alone(classes, 1 if classes == 2 else classes)
    result = fit_node_classifier(net, x, edges, y, *parts, lr=0.05, num_steps=30, eval_every=eval_every)
    seen = net.outputs
    steps = [step for step in range(1, 31) if step % eval_every == 0 or step == 30]
    assert len(seen) == len(steps)

    def value(scores, mask):
        if classes == 2:
            return roc_auc_score(y[mask], scores[mask, 0])
        return float((scores[mask].argmax(1) == y[mask]).double().mean())

    values = [value(scores, parts[1]) for scores in seen]
    best = int(np.argmax(values))
    assert (result.metric, result.best_step) == ("roc_auc" if classes == 2 else "accuracy", steps[best])
    assert result.val == pytest.approx(values[best])
    assert result.test == pytest.approx(value(seen[best], parts[2]))
    assert not net.training
    torch.testing.assert_close(net(x, edges).detach(), seen[best])


def test_steps_are_adamws_with_warm_up_and_decay_of_weights_alone():
    x, edges, y, *parts = task()
    net, twin = Alone(3, 3), Alone(3, 3)
    twin.load_state_dict(net.state_dict())
    fit_node_classifier(
        net, x, edges, y, *parts, lr=0.1, weight_decay=0.5, num_steps=6, warmup_steps=3, eval_every=6
    )
    weights = [twin.linear.weight]
    spared = [twin.linear.bias, *twin.norm.parameters()]
    optimizers = [
        torch.optim.AdamW(weights, weight_decay=0.5),
        torch.optim.AdamW(spared, weight_decay=0.0),
    ]
    for lr in (0.025, 0.05, 0.075, 0.1, 0.1, 0.1):
        twin.zero_grad()
        F.cross_entropy(twin(x, edges)[parts[0]], y[parts[0]]).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    for ours, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_area_under_the_curve_counts_ties_as_half():
    y = torch.randint(2, (50,), generator=seeded(1))
    scores = torch.randint(6, (50, 1), generator=seeded(2)).float()
    assert node_protocol._value(scores, y) == pytest.approx(roc_auc_score(y, scores[:, 0]))


def test_the_protocol_reports_one_depth_for_all_splits():
    x, edges, y, *_ = task()
    parts = torch.stack([torch.randperm(40, generator=seeded(k)) % 4 for k in range(3)])
    masks = parts < 2, parts == 2, parts == 3

    def make(depth):
        torch.manual_seed(depth)
        return HeterophilyGNN(3, 8, 3, model="SAGE", num_layers=depth, dropout=0.0).double()

    options = {"lr": 0.01, "num_steps": 8, "eval_every": 2}
    result = run_protocol(make, x, edges, y, *masks, num_layers=(1, 3), **options)
    table = {
        depth: [
            fit_node_classifier(make(depth), x, edges, y, *(m[k] for m in masks), **options) for k in range(3)
        ]
        for depth in (1, 3)
    }
    for depth, results in table.items():
        assert result.val_means[depth] == pytest.approx(np.mean([r.val for r in results]))
    best = max((1, 3), key=lambda depth: result.val_means[depth])
    tests = [r.test for r in table[best]]
    assert result.best_num_layers == best
    assert result.values.tolist() == pytest.approx(tests)
    assert (result.mean, result.std) == pytest.approx((np.mean(tests), np.std(tests, ddof=1)))
    one = run_protocol(make, x, edges, y, *(m[:1] for m in masks), num_layers=(2,), **options)
    assert math.isnan(one.std)


MASK = torch.eye(6).bool().repeat_interleave(2, 1)[:3]
SIX = torch.randn(12, 3), torch.zeros(2, 0).long(), torch.arange(12) % 2
ONE_CLASS = torch.tensor([0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1])


def protocol(y=SIX[2], train=MASK[:1], val=MASK[1:2], test=MASK[2:3], x=SIX[0], out=1, **options):
    return run_protocol(
        lambda depth: HeterophilyGNN(3, 8, out), x, SIX[1], y, train, val, test, num_steps=1, **options
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: protocol(val=MASK[:1]), "val_masks of split 0 must not overlap the other masks"),
        (lambda: protocol(test=MASK[:1]), "test_masks of split 0 must not overlap the other masks"),
        (lambda: protocol(train=MASK[:1] & False), "train_masks of split 0 must not be empty"),
        (lambda: protocol(y=ONE_CLASS), "val_masks of split 0 must hold both classes"),
        (lambda: protocol(ONE_CLASS, MASK[1:], MASK[:2].flip(0) & False | MASK[[0, 0]], MASK[[2, 1]]), "test_masks of split 1 must hold both classes"),
        (lambda: protocol(val=MASK[:2]), r"val_masks must have shape \(1, 12\) for train_masks, got \(2, 12\)"),
        (lambda: protocol(train=MASK[0]), r"train_masks must have shape \(any, 12\) for y"),
        (lambda: protocol(num_layers=()), "num_layers and train_masks must hold a depth and a split, got 0 and 1"),
        (lambda: protocol(y=SIX[2][:5]), r"train_masks must have shape \(any, 5\) for y"),
        (lambda: protocol(y=SIX[2] - 1), "y must not be negative"), (lambda: protocol(y=SIX[2].double()), "y must hold integers"),
        (lambda: protocol(x=SIX[0][:5]), r"y must have shape \(5\) for the nodes"), (lambda: protocol(lr=0.0), "lr must be greater than 0"),
        (lambda: protocol(weight_decay=-1.0), "weight_decay must be"), (lambda: protocol(warmup_steps=-1), "warmup_steps must be"),
        (lambda: protocol(eval_every=0), "eval_every must be"), (lambda: protocol(out=2), r"must have shape \(12, 1\) for 2 classes, got \(12, 2\)"),
        (lambda: protocol(y=torch.arange(12) % 3), r"must have shape \(12, 3\) for 3 classes, got \(12, 1\)"),
        (lambda: protocol(x=SIX[0] * torch.inf), "must be finite, got NaN or infinity after 1 steps, lr 3e-05"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fitting_takes_at_least_one_step(as_a_user):
    with pytest.raises(ValueError, match="num_steps must be"):
        fit_node_classifier(HeterophilyGNN(3, 8, 1), *SIX, *MASK, num_steps=0)
