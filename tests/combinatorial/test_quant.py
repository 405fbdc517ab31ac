"""QuAnt: lowest states by brute force, the loss and its gradient, features whose one-hot QUBO is 0 at the truth."""

import itertools
import math
import sys

import pytest
import torch
from torch import nn

from posterity.combinatorial import (
    QuAntLoss,
    QUBONet,
    from_bits,
    ground_states,
    matching_features,
    qubo_energy,
    registration_features,
    to_bits,
)
from posterity.testing import check_layer, check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(batch, n, seed=0, dtype=torch.float64):
    a = torch.randn(batch, n, n, generator=rng(seed), dtype=dtype)
    return (a + a.mT) / 2


def by_loops(matrix):
    """Return all states, lowest energy first, of equal ones the smaller integer, by plain sums."""
    n = len(matrix)
    found = []
    for number, bits in enumerate(itertools.product((0, 1), repeat=n)):
        energy = sum(float(matrix[i, j]) * bits[i] * bits[j] for i in range(n) for j in range(n))
        found.append((round(energy, 9), number, bits))
    return sorted(found)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_lowest_states_are_those_of_all_in_order(n):
    a, k = drawn(3, n), min(3, 2**n)
    found = ground_states(a, k)
    for matrix, x, energy in zip(a, found.x, found.energy, strict=True):
        truth = by_loops(matrix)[:k]
        assert x.tolist() == [list(bits) for _, _, bits in truth]
        assert energy.tolist() == pytest.approx([value for value, _, _ in truth])


@pytest.mark.parametrize("n", [11, 13])
@pytest.mark.parametrize("chunk", [64, 2**14])
def test_chunks_change_nothing(monkeypatch, n, chunk):
    monkeypatch.setattr(sys.modules[ground_states.__module__], "STATES", chunk)
    a = drawn(2, n, seed=1)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=a.dtype)
    energy = torch.einsum("si,bij,sj->bs", states, a, states)
    want = energy.topk(3, dim=1, largest=False)
    found = ground_states(a, 3)
    torch.testing.assert_close(found.energy, want.values)
    assert torch.equal(found.x, states[want.indices])


def test_of_equal_energies_the_smaller_integer_comes_first():
    x = ground_states(torch.zeros(1, 4, 4), 12).x[0]
    assert from_bits(x).tolist() == list(range(12))
    assert from_bits(ground_states(torch.zeros(1, 4, 4), 3).x[0]).tolist() == [0, 1, 2]


def test_without_couplings_a_bit_is_set_where_its_own_is_negative():
    own = torch.randn(5, 9, generator=rng())
    assert torch.equal(ground_states(torch.diag_embed(own), 1).x[:, 0], (own < 0).float())


def test_states_and_energies_have_the_dtype_of_the_couplings():
    for dtype in (torch.bfloat16, torch.float16):
        a = drawn(2, 6).to(dtype)
        found = ground_states(a, 2)
        exact = ground_states(a.float(), 2)
        assert found.x.dtype == found.energy.dtype == dtype and torch.equal(found.x.float(), exact.x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ground_states(a.float(), 2).energy, exact.energy)


def test_energies_are_those_of_dimod():
    dimod = pytest.importorskip("dimod")
    (a,) = drawn(1, 7, seed=2)
    couplings = {(i, j): float(a[i, i] if i == j else 2 * a[i, j]) for i in range(7) for j in range(i, 7)}
    model = dimod.BinaryQuadraticModel.from_qubo(couplings)
    x = torch.randint(2, (1, 50, 7), generator=rng())
    want = model.energies((x[0].numpy(), list(range(7))))
    torch.testing.assert_close(qubo_energy(a[None], x)[0], torch.from_numpy(want))
    torch.testing.assert_close(qubo_energy(a[None], x[:, 3]), torch.from_numpy(want[3:4]))


def test_annealing_finds_the_lowest_and_fills_with_different_states():
    pytest.importorskip("dwave.samplers")
    a = drawn(3, 6, seed=3)
    found, truth = ground_states(a, 20, solver="anneal", generator=rng()), ground_states(a, 20)
    assert torch.equal(found.x[:, 0], truth.x[:, 0])
    assert torch.equal(found.x, ground_states(a, 20, solver="anneal", generator=rng()).x)
    for matrix, x, energy in zip(a, found.x, found.energy, strict=True):
        assert len({tuple(row) for row in x.tolist()}) == 20 and energy.tolist() == sorted(energy.tolist())
        torch.testing.assert_close(torch.einsum("si,ij,sj->s", x, matrix, x), energy)
    every = ground_states(a[:, :2, :2].contiguous(), 4, solver="anneal", num_reads=1)
    assert from_bits(every.x).sort(1).values.tolist() == [[0, 1, 2, 3]] * 3


def test_a_solver_of_the_users_is_not_trusted_with_energies_and_order():
    a = drawn(2, 4)
    lowest = ground_states(a, 2)
    turned = ground_states(a, 2, solver=lambda a, k: (lowest.x.flip(1).bool(), torch.zeros(2, 2)))
    assert torch.equal(turned.x, lowest.x) and torch.equal(turned.energy, lowest.energy)
    for answer, said in (
        (lowest.x[:, :1], "must return states"),
        (lowest.x + 1, "must be 0 or 1"),
        (lowest.x[:, :1].expand(2, 2, 4), "returned one twice"),
    ):
        with pytest.raises(ValueError, match=said):
            ground_states(a, 2, solver=lambda a, k, answer=answer: (answer, None))


def test_the_loss_without_a_gap_is_zero_at_the_lowest_states_alone():
    a, loss = drawn(4, 5), QuAntLoss(gap=0)
    best = ground_states(a, 1).x[:, 0]
    assert float(loss(a, best)) == 0
    for bits in itertools.product((0, 1), repeat=5):
        x = torch.tensor(bits).expand(4, 5)
        value = float(loss(a, x))
        assert value >= 0 and (value == 0) == torch.equal(x.double(), best)


@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_the_loss_grows_with_the_couplings_and_has_the_gradient_of_the_equation(gap):
    a, bits = drawn(3, 4).requires_grad_(), torch.randint(2, (3, 4), generator=rng())
    loss = QuAntLoss(gap)
    value = loss(a, bits)
    torch.testing.assert_close(loss(7 * a, bits), 7 * value)
    (gradient,) = torch.autograd.grad(value, a)
    for matrix, x, got in zip(a.detach(), bits.double(), gradient, strict=True):
        (e0, _, x0), (e1, _, x1) = by_loops(matrix)[:2]
        x0, x1 = torch.tensor(x0).double(), torch.tensor(x1).double()
        energy = float(x @ matrix @ x)
        sign = 0 if torch.equal(x, x1) else math.copysign(1, energy - e1)
        outer = {name: torch.outer(v, v) for name, v in (("x", x), ("x0", x0), ("x1", x1))}
        want = outer["x"] - outer["x0"] - gap * sign * (outer["x"] - outer["x1"])
        torch.testing.assert_close(got, want / 3, atol=1e-12, rtol=0)


def test_a_matching_problem_as_a_one_hot_qubo_has_energy_0_at_the_truth():
    k = 4
    d1, p = torch.rand(3, k, k, generator=rng(), dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    d2 = d1[:, p][:, :, p]
    features = matching_features(d1, d2).view(3, k * k, k * k)
    kron = [
        (
            torch.kron(a, torch.ones(k, k, dtype=a.dtype)) - torch.kron(torch.ones(k, k, dtype=b.dtype), b)
        ).abs()
        for a, b in zip(d1, d2, strict=True)
    ]
    assert torch.equal(features, torch.stack(kron))
    energies = {}
    for perm in itertools.permutations(range(k)):
        chosen = torch.tensor([perm[i] * k + i for i in range(k)])
        energies[perm] = float(features[0][chosen][:, chosen].sum())
    assert energies[tuple(p.tolist())] == 0 and sorted(energies.values())[1] > 0.1


def test_bits_and_integers_go_there_and_back():
    for n in (1, 3, 9):
        values = torch.arange(2**n)
        assert torch.equal(from_bits(to_bits(values, n)), values)
    assert to_bits(torch.tensor([[4, 1], [3, 0]]), 3).tolist() == [
        [[1, 0, 0], [0, 0, 1]],
        [[0, 1, 1], [0, 0, 0]],
    ]
    assert from_bits(to_bits(torch.tensor(2**61 + 5), 62)) == 2**61 + 5


def by_hand(template, reference, pairs):
    """Return Phi Phi^T row by row from the pairs of a template point and its neighbours."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=template.dtype)
    eye = torch.eye(2, dtype=template.dtype)
    rows = [torch.cat([template[i] for i, near in pairs for _ in near])]
    for c in (eye, turn, -eye, -turn):
        for omega in (0.5, 0.2, 0.1, 0.1, 0.05):
            rows.append(torch.cat([-omega * c @ reference[j] for _, near in pairs for j in near]))
    phi = torch.stack(rows)
    return phi @ phi.T


@pytest.mark.parametrize("ordered", [True, False])
def test_registration_features_are_products_of_turned_neighbours(ordered):
    template = torch.randn(6, 2, generator=rng(), dtype=torch.float64)
    reference = template + 0.8 * torch.randn(6, 2, generator=rng(1), dtype=torch.float64)
    pairs = []
    for i in range(6):
        a, b = (reference[i], template) if ordered else (template[i], reference)
        pairs.append((i, sorted(range(6), key=lambda j, a=a, b=b: math.dist(a, b[j]))[:2]))
    got = registration_features(template, reference, n_neighbors=2, ordered=ordered)
    torch.testing.assert_close(got, by_hand(template, reference, pairs))
    torch.testing.assert_close(got, got.T)
    assert float(torch.linalg.eigvalsh(got).min()) > -1e-10
    mixed = registration_features(template, reference[torch.randperm(6, generator=rng())], n_neighbors=2)
    torch.testing.assert_close(mixed, registration_features(template, reference, n_neighbors=2))


def test_couplings_are_symmetric_bounded_and_on_the_graph_alone():
    x, graph = torch.randn(4, 3, generator=rng()), torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool()
    for couplings in ("full", "diagonal", graph):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = QUBONet(3, 3, width=6, couplings=couplings)
        a = net(20 * x)
        assert torch.equal(a, a.mT) and float(a.detach().abs().max()) <= 1
        allowed = {"full": torch.ones(3, 3), "diagonal": torch.eye(3)}.get(
            couplings if isinstance(couplings, str) else "", graph
        )
        assert torch.equal(a.detach() != 0, allowed.bool().expand(4, 3, 3))


def test_the_activity_is_the_mean_size_of_hidden_layers_added_up():
    torch.manual_seed(0)
    net = QUBONet(3, 2, width=5)
    x, seen = torch.randn(4, 3, generator=rng()), []
    for layer in (net.first, net.inner, net.again, net.last):
        layer.register_forward_hook(lambda _, __, out: seen.append(out.relu().abs().mean()))
    couplings, activity = net(x, return_activity=True)
    torch.testing.assert_close(activity, sum(seen))
    assert torch.equal(couplings, net(x)) and net.again.in_features == 8


def test_training_finds_a_code_that_no_diagonal_has():
    """The answer of two bits is 01 or 10, as the input says, where 00 and 11 must lie above both."""
    torch.manual_seed(0)
    x = torch.tensor([[1.0], [-1.0]])
    bits = torch.tensor([[0, 1], [1, 0]])
    net, loss_fn = QUBONet(1, 2, width=8, deep=False), QuAntLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss_fn(net(x), bits).backward()
        optimizer.step()
    assert torch.equal(ground_states(net(x), 1).x[:, 0].long(), bits)


@pytest.mark.parametrize("options", [{}, {"deep": False}, {"couplings": "diagonal"}])
def test_the_network_conforms_to_its_kind(as_a_user, options):
    torch.manual_seed(0)
    check_layer(QUBONet(3, 2, width=6, **options), torch.randn(4, 3, generator=rng()), shape=(4, 2, 2))


class Symmetric(nn.Module):
    """The loss of the symmetric part, which differences of single entries keep."""

    def forward(self, a, bits):
        return QuAntLoss(0.1)((a + a.mT) / 2, bits)


def test_the_loss_conforms_to_its_kind(as_a_user):
    bits = torch.randint(2, (4, 3), generator=rng())
    check_loss(Symmetric(), drawn(4, 3).requires_grad_(), bits, compiles=False, symmetric=True)


A = drawn(2, 3, dtype=torch.float32)
BITS = torch.tensor([[0, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ground_states(A[:, :2]), r"couplings must be \(batch, n, n\)"),
        (lambda: ground_states(A + torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])), r"use \(A \+ A.mT\) / 2"),
        (lambda: ground_states(A.long()), "couplings must be"),
        (lambda: ground_states(A * math.nan), "couplings"),
        (lambda: ground_states(torch.zeros(1, 21, 21)), 'solver="anneal"'),
        (lambda: ground_states(A, 9), "k must be at most 8"),
        (lambda: ground_states(A, 0), "k must be"),
        (lambda: ground_states(A, solver="quantum"), "solver must be"),
        (lambda: QuAntLoss()(A, BITS[:, :2]), r"bits must be \(2, 3\)"),
        (lambda: QuAntLoss()(A, BITS[:1]), r"bits must be \(2, 3\)"),
        (lambda: QuAntLoss()(A, 2 * BITS), "bits must be 0 or 1"),
        (lambda: QuAntLoss()(A[:0], BITS[:0]), "one or more"),
        (lambda: QuAntLoss(-0.1), "gap must be"),
        (lambda: QUBONet(3, 2, couplings=torch.ones(2, 2)), "couplings must be bool"),
        (lambda: QUBONet(3, 2, couplings=torch.ones(3, 3).bool()), "couplings must"),
        (lambda: QUBONet(3, 2, couplings=torch.ones(2, 2).triu().bool()), "couplings must be symmetric"),
        (lambda: QUBONet(3, 2, couplings="band"), "couplings must be 'full'"),
        (lambda: QUBONet(0, 2), "in_features"),
        (lambda: QUBONet(3, 2)(torch.randn(4, 5)), "x must"),
        (lambda: matching_features(torch.rand(1, 3, 3), torch.rand(1, 4, 4)), "d1 and d2 must both be"),
        (lambda: to_bits(torch.tensor([4]), 2), r"values must be in 0..3"),
        (lambda: to_bits(torch.tensor([-1]), 2), r"values must be in 0..3"),
        (lambda: to_bits(torch.tensor([1.0]), 2), "values must be integers"),
        (lambda: from_bits(torch.tensor([2, 0])), "bits must be 0 or 1"),
        (lambda: registration_features(torch.rand(3, 2), torch.rand(4, 2), ordered=True), "as many points"),
        (lambda: registration_features(torch.rand(3, 2), torch.rand(2, 2)), "n_neighbors must be at most"),
        (lambda: qubo_energy(A, BITS[:, :2]), "x must be"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()
