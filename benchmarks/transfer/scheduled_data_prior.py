"""An arrival beside plain replay, the teacher beside a loop over parameters, rates beside a loop and N^3 cells."""

import copy

import numpy as np
import torch
from torch import nn

from benchmarks.timing import race
from posterity.lab.continual import Body, ReplayLearner
from posterity.lab.nets import mlp
from posterity.transfer import ScheduledDataPrior, ScheduledTeacher, ema_rates, knowledge_rates


def body() -> nn.Module:
    """Return a network of 98,688 parameters to 128 features."""
    return nn.Sequential(mlp(256, 128, width=256, depth=1), nn.ReLU())


def arrivals() -> None:
    """Race an arrival with one of experience replay: the same network, memory and batch, and either form of Adam."""
    x, y = torch.rand(600, 256), torch.arange(600) % 10
    ours = ScheduledDataPrior(body(), 128, memory_size=500, generator=torch.Generator().manual_seed(0))
    ours.observe(x, y)
    ours.observe(x, y)
    assert ours.prior_weight > 0  # the teacher is asked
    for form, fused in (
        ("torch's ordinary Adam", False),
        ("the Adam of one kernel that is our default", True),
    ):
        replay = ReplayLearner(Body(body(), 128), 10, memory_size=500)
        replay.optimizer = torch.optim.Adam(replay.net.parameters(), lr=1e-3, fused=fused)
        replay.observe(x, y)
        race(f"an arrival, 98,688 parameters, batch 16, against experience replay with {form}",
             lambda: ours.observe(x[:1], y[:1]), lambda replay=replay: replay.observe(x[:1], y[:1]),
             target=1 / 1.8, rounds=301,
             why="A teacher is asked and follows, one pass and one average, beside an optimiser of one kernel.")  # fmt: skip


def teachers() -> None:
    """Race an update of the teacher with the official loop over parameters, by name, and copies of the head."""
    for name, net in (("98,688 parameters", body()), ("40 layers", mlp(32, 32, width=32, depth=40))):
        head = nn.Linear(128, 10)
        teacher = ScheduledTeacher(net, mean=100.0)
        r1, r2 = ema_rates(100.0, 0.75)
        slow, fast, own = (copy.deepcopy(net) for _ in range(3))

        @torch.no_grad()
        def official(net=net, head=head, slow=slow, fast=fast, own=own, r1=r1, r2=r2) -> None:
            model, mine, one, two = (dict(each.named_parameters()) for each in (net, own, slow, fast))
            for key, p in model.items():
                one[key].sub_(r1 * (one[key] - p))
                two[key].sub_(r2 * (two[key] - p))
                mine[key].copy_(r2 / (r2 - r1) * one[key] - r1 / (r2 - r1) * two[key])
            for _ in range(3):
                copy.deepcopy(head)
            here, there = dict(net.named_buffers()), dict(own.named_buffers())
            for key, buffer in here.items():
                there[key].copy_(buffer)

        race(f"teacher of {name}, against a loop over parameters",
             lambda teacher=teacher, net=net: teacher.update(net), official, target=2.0, rounds=201)  # fmt: skip


def by_loop(y, y1, y2, n):
    """Return both rates as the official code does: counts by a loop over samples, then N^3 cells."""
    right1, right2, both, count, all1, all2 = (np.zeros(n) for _ in range(6))
    for g, a, b in zip(y, y1, y2, strict=True):
        count[g] += 1
        all1[a] += 1
        all2[b] += 1
        right1[g] += a == g
        right2[g] += b == g
        both[g] += (a == g) and (b == g)
    share, p1, p2, cells = count / len(y), all1 / len(y), all2 / len(y), np.zeros((n, n, n))
    for g in range(n):
        never = 1 - (right1[g] + right2[g] - both[g]) / count[g]
        m1, m2 = p1 / (1 - p1[g]), p2 / (1 - p2[g])
        m1[g] = (right1[g] - both[g]) / count[g] / (never + 1e-10)
        m2[g] = (right2[g] - both[g]) / count[g] / (never + 1e-10)
        cells[g] = m1[:, None] * m2 * never * share[g]
        cells[g, g, g] = both[g] / len(y)
    y1y2, gy1, gy2 = (cells.sum(axis, keepdims=True) + 1e-10 for axis in (0, 2, 1))
    only1, only2 = cells.sum((0, 2), keepdims=True), cells.sum((0, 1), keepdims=True)
    loss = np.sum(cells * np.log(only2 * cells / y1y2 / gy2 + 1e-10)) / np.log(n)
    gain = np.sum(cells * np.log(only1 * cells / y1y2 / gy1 + 1e-10)) / np.log(n)
    pair = cells.sum(2)
    before = np.log(
        pair / (pair.sum(0, keepdims=True) + 1e-10) / (pair.sum(1, keepdims=True) + 1e-10) + 1e-10
    )
    before = np.sum(pair * before) / np.log(n)
    return loss / before, gain / (1 - before)


def rates() -> None:
    """Race the knowledge rates of 10,000 test points and 100 classes."""
    rng = np.random.default_rng(0)
    y = np.arange(10_000) % 100
    before, after = (
        np.where(rng.random(10_000) < hit, y, rng.integers(100, size=10_000)) for hit in (0.5, 0.4)
    )
    tensors = [torch.from_numpy(each) for each in (y, before, after)]
    np.testing.assert_allclose(
        knowledge_rates(*tensors, n_classes=100)[:2], by_loop(y, before, after, 100), atol=1e-5
    )
    race("knowledge rates, 10,000 points, 100 classes, against the official loop",
         lambda: knowledge_rates(*tensors, n_classes=100), lambda: by_loop(y, before, after, 100),
         target=20.0, rounds=15)  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arrivals()
    teachers()
    rates()
