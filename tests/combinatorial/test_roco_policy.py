"""ROCO: what the policy of edits sees, that it is one, and that training makes it a better one."""

import itertools
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from posterity.combinatorial import (
    ATSP,
    Coverage,
    EditPolicy,
    Jobs,
    Scheduling,
    Sets,
    attack,
    fit_edit_policy,
)
from posterity.combinatorial.edit_training import discounted
from posterity.testing import check_layer


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def policy(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EditPolicy(**options)


def costs(n, seed=0, high=100):
    return np.random.default_rng(seed).integers(0, high, (n, n)).astype(float)


def jobs(n, seed=0, kinds=2, chance=0.4):
    rng = np.random.default_rng(seed)
    pairs = [(i, j) for i, j in itertools.combinations(range(n), 2) if rng.random() < chance]
    duration = rng.integers(1, 6, n).astype(float)
    resources = rng.integers(1, 10, (n, kinds)) / 10
    order = rng.permutation(n)
    before = np.array([(order[i], order[j]) for i, j in pairs], dtype=np.int64).reshape(-1, 2)
    return Jobs(duration, resources, before)


def sets(n, elements, limit, seed=0):
    rng = np.random.default_rng(seed)
    return Sets(rng.random((n, elements)) < 0.3, rng.integers(1, 20, elements).astype(float), limit)


BIG = {
    "atsp": (ATSP(), lambda seed: costs(12, seed)),
    "scheduling": (Scheduling(), lambda seed: jobs(14, seed)),
    "coverage": (Coverage(), lambda seed: sets(12, 20, 4, seed)),
}


def described(problem, instance):
    solution = next(iter(problem.solvers.values()))(instance)
    edits = problem.edits(instance, solution)
    nodes = problem.nodes(instance, edits) if hasattr(problem, "nodes") else edits
    return *problem.graph(instance, solution), torch.from_numpy(nodes.copy())


@pytest.mark.parametrize("name", BIG)
def test_graphs_are_finite_and_probabilities_sum_to_one_and_permute(name):
    problem, make = BIG[name]
    x, edge_index, edge_weight, edits = described(problem, make(0))
    assert x.dtype == edge_weight.dtype == torch.float32 and x.shape[1] == 4 and torch.isfinite(x).all()
    assert edge_index.dtype == torch.int64 and edge_index.min() >= 0 and edge_index.max() < len(x)
    assert edits.max() < len(x)
    net = policy().double()
    log_p, value = net(x.double(), edge_index, edge_weight.double(), edits)
    assert log_p.shape == (len(edits),) and value.shape == ()
    assert float(log_p.detach().exp().sum()) == pytest.approx(1)
    order = torch.randperm(len(x), generator=gen())
    place = order.argsort()
    moved, again = net(x[order].double(), place[edge_index], edge_weight.double(), place[edits])
    torch.testing.assert_close(moved, log_p)
    torch.testing.assert_close(again, value)
    none, _ = net(x.double(), edge_index, edge_weight.double(), edits[:0])
    assert none.shape == (0,)


def test_features_are_those_that_are_promised():
    d = np.array([[9999.0, 2, 4], [6, np.nan, 8], [1, 3, 7]])
    x, edges, weight = ATSP().graph(np.nan_to_num(d), [0, 1, 2])
    want = torch.tensor([[3, 2, 3.5, 1], [7, 6, 2.5, 2], [2, 1, 6, 4]]) / 4
    torch.testing.assert_close(x, want)
    assert edges.tolist() == [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]]
    torch.testing.assert_close(weight, torch.tensor([2.0, 4, 6, 8, 1, 3]) / 4)
    chain = Jobs(np.array([1.0, 2, 3]), np.array([[0.5, 0.1], [0.2, 0.2], [1, 0]]), np.array([[0, 1]]))
    x, edges, _ = Scheduling().graph(chain, [0, 1, 3])
    torch.testing.assert_close(
        x, torch.tensor([[0.5, 0.3, 3 / 6, 0], [1, 0.2, 2 / 6, 1 / 6], [1.5, 0.5, 3 / 6, 3 / 6]])
    )
    assert edges.tolist() == [[0], [1]]
    instance = Sets(np.array([[True, True, False], [False, False, True]]), np.array([1.0, 2, 3]), 1)
    x, edges, _ = Coverage().graph(instance, [1])
    want = [[1, 0, 1, 2 / 3], [1, 1, 1, 1 / 3], [0, 0, 0.5, 0.5], [0, 0, 1, 0.5], [0, 1, 1.5, 0.5]]
    torch.testing.assert_close(x, torch.tensor(want))
    assert edges.tolist() == [[0, 0, 1], [2, 3, 4]]


class OfNumbers(nn.Module):
    """The policy as a function of tensors to one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, edge_index, edge_weight, edits):
        log_p, value = self.net(x, edge_index, edge_weight, edits)
        return torch.cat([log_p, value[None]])


def test_the_policy_passes_the_checks_of_a_layer(as_a_user):
    given = described(ATSP(), costs(7))
    check_layer(OfNumbers(policy()), *given, shape=(len(given[3]) + 1,))


class Digits:
    """A user's own problem: tuples of four bits, a solver counts them, and only an edit (2, bit) makes its answer worse."""

    sense: ClassVar = "min"

    def validate(self, instance):
        pass

    def value(self, instance, solution):
        return 1.0 + solution

    def edits(self, instance, solution):
        return np.array([(i, j) for i in range(4) for j in range(4) if i != j and not instance[i][j]])

    def apply(self, instance, edit):
        rows = [list(row) for row in instance]
        rows[edit[0]][edit[1]] = 1
        return tuple(map(tuple, rows))

    def graph(self, instance, solution):
        edges = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
        return torch.eye(4), edges, torch.ones(12)


def test_training_learns_which_edit_pays_and_leaves_the_rest_alone():
    empty, net, state = ((0,) * 4,) * 4, policy(1), torch.random.get_rng_state()
    net.eval()
    net.pool.requires_grad_(False)
    fixed = net.pool.weight.clone()

    def solver(instance):
        return float(sum(instance[2]))

    def chance():
        edits = torch.from_numpy(Digits().edits(empty, 0))
        with torch.no_grad():
            log_p, _ = net(*Digits().graph(empty, 0), edits)
        return float(log_p.exp()[edits[:, 0] == 2].sum())

    before = chance()
    with torch.inference_mode():
        returns = fit_edit_policy(
            net,
            Digits(),
            solver,
            [empty],
            episodes=60,
            n_edits=2,
            update_every=20,
            epochs=6,
            lr=3e-2,
            generator=gen(),
        )
    assert len(returns) == 6 and np.mean(returns[-2:]) > np.mean(returns[:2]) + 0.3
    assert chance() > max(0.7, before + 0.2)
    assert torch.equal(torch.random.get_rng_state(), state) and not net.training
    assert torch.equal(net.pool.weight, fixed) and all(p.grad is None for p in net.parameters())
    found = attack(Digits(), solver, empty, method="policy", policy=net, n_edits=2, budget=30)
    assert found.ratio == 2 and {i for i, _ in found.edits} == {2}
    for method in ("anneal", "genetic"):
        assert attack(Digits(), solver, empty, method=method, n_edits=3, generator=gen()).ratio == 3


def test_gains_are_discounted_within_an_episode():
    class Step(NamedTuple):
        reward: float
        last: bool

    steps = [Step(1, False), Step(2, False), Step(4, True), Step(8, False), Step(16, True)]
    assert discounted(steps, 0.5) == [1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4, 8 + 16 / 2, 16]
    assert discounted(steps, 0.0) == [1, 2, 4, 8, 16]


def test_training_repeats_and_takes_every_problem():
    for name in BIG:
        problem, make = BIG[name]
        solver = next(iter(problem.solvers.values()))
        runs_ = [
            fit_edit_policy(
                policy(), problem, solver, [make(0), make(1)], episodes=3, n_edits=3, epochs=2, update_every=5,
                generator=gen(),
            )
            for _ in range(2)
        ]  # fmt: skip
        assert runs_[0] == runs_[1] and len(runs_[0]) == 2


def test_a_policy_in_half_precision_attacks():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = attack(
            ATSP(), ATSP().solvers["nearest"], costs(8), method="policy", policy=policy().to(dtype), budget=20
        )
        assert found.n_calls == 21
    with pytest.raises(
        ValueError, match=r"policy must be in float32 or float64 to be trained, got torch\.bfloat16"
    ):
        fit_edit_policy(policy().bfloat16(), ATSP(), ATSP().solvers["nearest"], [costs(4)])
