"""The Bayes classifier, its counts and label propagation against loops, scipy and closed forms."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch_geometric.data import Data

from posterity.graphs import (
    CSBM,
    SemanticRobustness,
    attack_candidates,
    bayes_robustness,
    model_robustness,
    propagate_labels,
    semantic_robustness,
    with_label_propagation,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    csbm = CSBM(150, K=1.2)
    return csbm, csbm.sample(rng(1))


def new_nodes(model, count, seed=2):
    csbm, graph = model
    generator = rng(seed)
    return [csbm.sample_node(graph, generator) for _ in range(count)]


def loop_likelihood(csbm, g, node):
    """Every pair of the node, one at a time."""
    joined = {frozenset(edge) for edge in g.edge_index.T.tolist()}
    out = []
    for label in (0, 1):
        total = multivariate_normal((2 * label - 1) * csbm.mean.numpy().astype(float), csbm.sigma**2).logpdf(
            g.x[node].numpy().astype(float)
        )
        for other in range(len(g.y)):
            if other != node:
                share = csbm.p if int(g.y[other]) == label else csbm.q
                total += math.log(share if frozenset((node, other)) in joined else 1 - share)
        out.append(total)
    return out


def joined(g, node, others):
    here = torch.full_like(others, node)
    return torch.cat([g.edge_index, torch.stack([here, others]), torch.stack([others, here])], 1)


# The model.


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_likelihood_is_scipys_and_a_loop_over_pairs(sigma):
    csbm = CSBM(60, sigma=sigma)
    g = csbm.sample_node(csbm.sample(rng()), rng(1))
    for node in (0, 17, 60):
        got = csbm.log_likelihood(g.x, g.edge_index, g.y, node)
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(loop_likelihood(csbm, g, node), abs=1e-8)


def test_each_foreign_edge_takes_c_from_the_margin(model):
    csbm, _ = model
    c = math.log(csbm.p * (1 - csbm.q) / (csbm.q * (1 - csbm.p)))
    assert csbm.edge_log_odds == pytest.approx(c)
    for g in new_nodes(model, 20):
        node, label = len(g.y) - 1, int(g.y[-1])
        low = csbm.log_likelihood(g.x, g.edge_index, g.y, node)
        margin = float(low[label] - low[1 - label])
        foreign = attack_candidates(g.x, g.y, g.edge_index, node)[:1]
        after = csbm.log_likelihood(g.x, joined(g, node, foreign), g.y, node)
        assert float(after[label] - after[1 - label]) == pytest.approx(margin - c, abs=1e-9)


def test_the_label_of_the_node_itself_is_not_looked_at(model):
    csbm, _ = model
    g = new_nodes(model, 1)[0]
    flipped = g.y.clone()
    flipped[-1] = 1 - flipped[-1]
    node = len(g.y) - 1
    torch.testing.assert_close(
        csbm.log_likelihood(g.x, g.edge_index, g.y, node),
        csbm.log_likelihood(g.x, g.edge_index, flipped, node),
    )


def test_edges_may_be_listed_once_or_twice_and_loops_do_not_count(model):
    csbm, g = model
    half = g.edge_index[:, g.edge_index[0] < g.edge_index[1]]
    loop = torch.tensor([[3], [3]])
    want = csbm.log_likelihood(g.x, g.edge_index, g.y, 3)
    torch.testing.assert_close(csbm.log_likelihood(g.x, half, g.y, 3), want)
    torch.testing.assert_close(csbm.log_likelihood(g.x, torch.cat([half, loop], 1), g.y, 3), want)


def test_samples_have_the_laws_moments():
    csbm = CSBM(800, K=2.0, sigma=1.5)
    within, across, distance, shares = [], [], [], []
    for seed in range(8):
        g = csbm.sample(rng(seed))
        same = (g.y[g.edge_index[0]] == g.y[g.edge_index[1]]).sum() / 2
        ones = int(g.y.sum())
        pairs = ones * (ones - 1) / 2 + (800 - ones) * (799 - ones) / 2
        within.append(float(same) / pairs)
        across.append(float(g.edge_index.shape[1] / 2 - same) / (ones * (800 - ones)))
        distance.append(float((g.x[g.y == 1].mean(0) - g.x[g.y == 0].mean(0)) @ csbm.mean / csbm.mean.norm()))
        shares.append(ones / 800)
        assert bool((g.edge_index[0] != g.edge_index[1]).all())
        both = {tuple(edge) for edge in g.edge_index.T.tolist()}
        assert len(both) == g.edge_index.shape[1] and all((v, u) in both for u, v in both)
    pairs = 8 * 800 * 799 / 4
    for got, want, error in [
        (within, csbm.p, math.sqrt(csbm.p / pairs)),
        (across, csbm.q, math.sqrt(csbm.q / pairs)),
        (distance, 2.0 * 1.5, 1.5 * math.sqrt(4 / 800 / 8)),
        (shares, 0.5, 0.5 / math.sqrt(800 * 8)),
    ]:
        assert abs(np.mean(got) - want) < 4 * error
    assert csbm.n_features == round(800 / math.log(800) ** 2)


def test_a_new_node_has_the_models_degree_and_leaves_the_others_alone(model):
    csbm, graph = model
    nodes = new_nodes(model, 400)
    degree = np.mean([int((g.edge_index[0] == 150).sum()) for g in nodes])
    want = 150 / 2 * (csbm.p + csbm.q)
    assert abs(degree - want) < 4 * math.sqrt(want / 400)
    assert torch.equal(nodes[0].edge_index[:, : graph.edge_index.shape[1]], graph.edge_index)
    assert torch.equal(nodes[0].x[:150], graph.x) and len(nodes[0].y) == 151


# Counts.


@pytest.mark.parametrize("kind", ["l2-weak", "l2", "random"])
def test_candidates_are_foreign_no_neighbours_and_in_order(model, kind):
    g = new_nodes(model, 1)[0]
    node = len(g.y) - 1
    found = attack_candidates(g.x, g.y, g.edge_index, node, kind=kind, generator=rng())
    near = set(g.edge_index[1][g.edge_index[0] == node].tolist())
    want = {v for v in range(node) if int(g.y[v]) != int(g.y[node]) and v not in near}
    assert set(found.tolist()) == want and len(found) == len(want)
    distance = (g.x[found] - g.x[node]).norm(dim=1).diff()
    if kind != "random":
        assert bool((distance >= -1e-6).all()) if kind == "l2-weak" else bool((distance <= 1e-6).all())


def test_bayes_counts_are_those_of_adding_edges_one_at_a_time(model):
    csbm, _ = model
    for g in new_nodes(model, 50):
        node, label = len(g.y) - 1, int(g.y[-1])
        counts = set()
        for kind in ("l2-weak", "l2"):
            candidates = attack_candidates(g.x, g.y, g.edge_index, node, kind=kind)
            count = -1
            for t in range(len(candidates) + 1):
                if csbm.bayes_predict(g.x, joined(g, node, candidates[:t]), g.y, node) != label:
                    break
                count = t
            assert bayes_robustness(csbm, g.x, g.edge_index, g.y, node, candidates) == count
            counts.add(count)
        assert len(counts) == 1
        assert bayes_robustness(csbm, g.x, g.edge_index, g.y, node, candidates, 1) == min(count, 1)


def test_when_foreign_edges_are_the_likely_ones_no_edge_changes_the_class():
    csbm = CSBM(80, within_degree=1.0, between_degree=3.0, K=3)
    graph = csbm.sample(rng())
    for g in (csbm.sample_node(graph, rng(k)) for k in range(10)):
        candidates = attack_candidates(g.x, g.y, g.edge_index, 80)
        count = bayes_robustness(csbm, g.x, g.edge_index, g.y, 80, candidates, 7)
        assert count in (-1, 7)


class Scripted:
    """Right while the node has not between ``low`` and ``high`` edges more; asked once or in blocks."""

    def __init__(self, degree, wrong, asked=None):
        self.degree, self.wrong, self.asked = degree, wrong, asked

    def __call__(self, x, edge_index):
        extra = int((edge_index[0] == len(x) - 1).sum()) - self.degree
        scores = torch.zeros(len(x), 2)
        scores[-1, int(extra in self.wrong)] = 1
        return scores

    def batched(self, x, edge_indices):
        self.asked.append(len(edge_indices))
        return torch.stack([self(x, edges) for edges in edge_indices])


@pytest.mark.parametrize(
    ("wrong", "count"), [((), 40), ((0,), -1), ((1,), 0), ((5, 9), 4), ((39, 40), 38), ((40,), 39)]
)
def test_the_first_change_counts_alone_and_in_blocks(wrong, count):
    x, edges = torch.zeros(60, 1), torch.tensor([[59, 0, 59, 1], [0, 59, 1, 59]])
    candidates, asked = torch.arange(2, 42), []
    scripted = Scripted(2, wrong, asked)
    assert model_robustness(lambda x, e: scripted(x, e), x, edges, 59, 0, candidates) == count
    assert model_robustness(scripted, x, edges, 59, 0, candidates) == count
    assert asked[:3] == [1, 2, 4][: len(asked)] and max(asked) <= 32
    if count > 10:
        assert model_robustness(scripted, x, edges, 59, 0, candidates, max_edges=7) == 7


def test_bayes_itself_is_neither_over_robust_nor_attacked(model):
    csbm, graph = model

    def predict(x, edge_index):
        y = torch.cat([graph.y, torch.zeros(1, dtype=torch.int64)])
        scores = torch.zeros(len(x), 2, dtype=torch.float64)
        scores[-1] = csbm.log_likelihood(x, edge_index, y, len(x) - 1)
        return scores

    result = semantic_robustness(predict, csbm, graph, n_nodes=40, generator=rng(3))
    assert torch.equal(result.model, result.bayes)
    assert (result.over, result.adversarial, result.f1) == (0, 1, 1)
    assert result.accuracy == result.bayes_accuracy


def test_a_network_that_ignores_edges_has_the_truths_robustness_and_more(model):
    csbm, graph = model
    weight = torch.stack([-csbm.mean, csbm.mean], 1)
    result = semantic_robustness(
        lambda x, e: x @ weight, csbm, graph, n_nodes=60, max_edges=30, generator=rng(4)
    )
    assert set(result.model.tolist()) <= {-1, 30}
    assert result.r_joint == result.r_bayes and result.adversarial == 1 and result.over > 0.5


def test_measures_are_means_over_nodes_that_both_get_right():
    result = SemanticRobustness(
        torch.tensor([2, 0, 4, 3]), torch.tensor([4, 2, -1, 3]), torch.tensor([2, 3, 5, -1])
    )
    assert result.r_model == pytest.approx((4 / 2 + 2 / 1) / 2)
    assert result.r_bayes == pytest.approx((2 / 2 + 3 / 1) / 2)
    assert result.r_joint == pytest.approx((2 / 2 + 2 / 1) / 2)
    assert result.over == pytest.approx(1 - 1.5 / 2) and result.adversarial == pytest.approx(1.5 / 2)
    assert result.f1 == pytest.approx(2 * 0.75 * 0.75 / 1.5)
    assert (result.accuracy, result.bayes_accuracy) == (0.75, 0.75)
    assert result.violation_rate(4) == pytest.approx(2 / 3)
    assert result.violation_rate("deg") == 0
    assert result.violation_rate("deg+2") == pytest.approx(2 / 3)
    assert result.by_degree() == {
        0: {"nodes": 1, "model": 2, "bayes": 3, "joint": 2}, 2: {"nodes": 1, "model": 4, "bayes": 2, "joint": 2}
    }  # fmt: skip
    nothing = SemanticRobustness(torch.tensor([1]), torch.tensor([-1]), torch.tensor([2]))
    assert math.isnan(nothing.over) and math.isnan(nothing.adversarial) and math.isnan(nothing.f1)


def test_joint_robustness_is_below_both_and_shares_are_shares(model):
    csbm, graph = model
    predict = with_label_propagation(None, graph.y)
    result = semantic_robustness(predict, csbm, graph, n_nodes=40, max_edges=20, generator=rng(5))
    assert result.r_joint <= min(result.r_model, result.r_bayes)
    assert 0 <= result.over <= 1 and 0 <= result.adversarial <= 1


# Label propagation.


def dense(edge_index, n):
    a = torch.zeros(n, n, dtype=torch.float64)
    a[edge_index[0], edge_index[1]] = 1
    a.fill_diagonal_(0)
    scale = a.sum(1).clamp_min(1).rsqrt()
    return scale[:, None] * a * scale


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7])
def test_propagation_converges_to_the_linear_systems_solution(alpha, model):
    _, g = model
    edges = torch.cat([g.edge_index, torch.tensor([[4, 7], [4, 7]]), g.edge_index[:, :10]], 1)
    scores = torch.randn(150, 3, dtype=torch.float64, generator=rng())
    known, y = torch.tensor([3, 60, 9]), torch.tensor([2, 0, 1])
    start = scores.softmax(1)
    start[known] = torch.eye(3, dtype=torch.float64)[y]
    want = (1 - alpha) * torch.linalg.solve(
        torch.eye(150, dtype=torch.float64) - alpha * dense(edges, 150), start
    )
    got = propagate_labels(scores, y, known, edges, num_layers=200, alpha=alpha)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    if alpha == 0:
        torch.testing.assert_close(propagate_labels(scores, y, known, edges, alpha=0, num_layers=3), start)


def test_propagation_is_linear_in_its_start_and_clamps_only_if_told(model):
    _, g = model
    a, b = (torch.randn(150, 2, dtype=torch.float64, generator=rng(k)) for k in (0, 1))
    none = torch.tensor([], dtype=torch.int64)

    def run(z, **options):
        return propagate_labels(z, none, none, g.edge_index, num_layers=5, normalize=False, **options)

    torch.testing.assert_close(run(2 * a - 3 * b), 2 * run(a) - 3 * run(b))
    assert run(5 * a).abs().max() > 1
    clamped = run(5 * a, clamp=True)
    assert clamped.min() >= 0 and clamped.max() <= 1


def test_the_wrapped_classifier_knows_the_first_nodes_and_not_the_new_one(model):
    csbm, graph = model
    g = new_nodes(model, 1)[0]
    weight = torch.stack([-csbm.mean, csbm.mean], 1)
    plain = lambda x, e: x @ weight  # noqa: E731
    got = with_label_propagation(plain, graph.y, num_layers=4, alpha=0.5)(g.x, g.edge_index)
    want = propagate_labels(
        plain(g.x, None), graph.y, torch.arange(150), g.edge_index, num_layers=4, alpha=0.5
    )
    torch.testing.assert_close(got, want)
    alone = with_label_propagation(None, graph.y, num_layers=4, alpha=0.5)(g.x, g.edge_index)
    zeros = torch.zeros(151, 2)
    want = propagate_labels(
        zeros, graph.y, torch.arange(150), g.edge_index, num_layers=4, alpha=0.5, normalize=False
    )
    torch.testing.assert_close(alone, want)
    assert not torch.equal(want[-1], want[0])
    assert not hasattr(with_label_propagation(plain, graph.y), "batched")


def test_blocks_of_graphs_are_each_propagated_alone(model):
    csbm, graph = model
    nodes = new_nodes(model, 3)
    x, edges = nodes[0].x, [g.edge_index for g in nodes]
    weight = torch.stack([-csbm.mean, csbm.mean], 1)

    class Both(SimpleNamespace):
        def __call__(self, x, edge_index):
            return x @ weight

        def batched(self, x, edge_indices):
            return (x @ weight).expand(len(edge_indices), -1, -1)

    for predict in (Both(), None):
        wrapped = with_label_propagation(predict, graph.y)
        torch.testing.assert_close(
            wrapped.batched(x, edges), torch.stack([wrapped(x, each) for each in edges])
        )


# Bad input.


def test_wrong_arguments_are_refused(model, as_a_user):
    csbm, graph = model
    x, e, y = graph.x, graph.edge_index, graph.y
    near = e[1][e[0] == 0][:1]
    far = attack_candidates(x, y, e, 0)
    known = torch.arange(3)
    for call, message in [
        (lambda: CSBM(2), "n must be"),
        (lambda: CSBM(10, within_degree=5), "within_degree must give an edge probability in .* n=10"),
        (lambda: CSBM(10, between_degree=0), "between_degree must give"),
        (lambda: CSBM(K=-1), "K must be"),
        (lambda: CSBM(sigma=0), "sigma must be"),
        (lambda: CSBM(n_features=0), "n_features"),
        (lambda: csbm.log_likelihood(x, e, y + 1, 0), r"y must name classes in 0\.\.1, got 2"),
        (lambda: csbm.log_likelihood(x, e, y[:5], 0), "y must have shape"),
        (lambda: csbm.log_likelihood(x, e, y, 150), "node must be in 0..149"),
        (lambda: csbm.log_likelihood(x[:, :2], e, y, 0), "x must have shape"),
        (lambda: attack_candidates(x, y, e, -1), "node must be in"),
        (lambda: attack_candidates(x, y, e, 0, kind="cos"), "kind must be one of"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, near), "must not be neighbours of node 0"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, torch.tensor([0])), "the node itself"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, far[[0, 0]]), "must not repeat"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, torch.tensor([999])), "candidates must name nodes in"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, torch.tensor([-2, 3])), "candidates must name nodes in"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, far, -1), "max_edges"),
        (lambda: model_robustness(lambda x, e: x[:3], x, e, 0, 0, far), "predict must return scores"),
        (lambda: with_label_propagation(lambda x, e: x[0], y)(x, e), "predict must return scores"),
        (lambda: with_label_propagation(None, y, alpha=1.0), "alpha"),
        (lambda: with_label_propagation(None, y, num_classes=1), "num_classes"),
        (lambda: propagate_labels(x, y[:3], known, e, alpha=1.0), "alpha"),
        (lambda: propagate_labels(x, y[:3], torch.tensor([0, 0, 1]), e), "known must not repeat"),
        (lambda: propagate_labels(x, y[:3], torch.tensor([0, 1, 150]), e), "known must name nodes in"),
        (lambda: propagate_labels(x, y[:2], known, e), "y_known must have shape"),
        (lambda: propagate_labels(x, y[:3] + 90, known, e), "y_known must name classes in"),
        (lambda: semantic_robustness(lambda x, e: x, csbm, graph, n_nodes=0), "n_nodes"),
        (lambda: SemanticRobustness(*torch.ones(3, 2).long()).violation_rate("all"), "budget must be one of"),
        (lambda: csbm.log_likelihood(x.long(), e, y, 0), "x must be a floating-point tensor"),
        (lambda: csbm.log_likelihood(x, e + 150, y, 0), r"edge_index must name nodes in 0\.\.149"),
        (
            lambda: csbm.sample_node(Data(x=x[:, :2], edge_index=e, y=y)),
            r"data.x must have shape \(any, \d+\) for this model",
        ),
        (lambda: csbm.sample_node(Data(x=x, edge_index=e - 1, y=y)), "data.edge_index must name nodes in"),
        (
            lambda: semantic_robustness(lambda x, e: x, csbm, Data(x=x, edge_index=e, y=y + 1)),
            r"data.y must name classes in 0\.\.1, got 2",
        ),
        (lambda: attack_candidates(x, y.float(), e, 0), "y must hold integers"),
        (lambda: attack_candidates(x, y, e - 1, 0), r"edge_index must name nodes in 0\.\.149 of x, got -1"),
        (lambda: bayes_robustness(csbm, x, e, y, 0, far.float()), "candidates must hold integers"),
        (
            lambda: model_robustness(lambda x, e: x, x, e, 0, -1, far),
            "label must be an integer of at least 0, got -1",
        ),
        (lambda: propagate_labels(y[:, None], y[:3], known, e), "scores must be a floating-point tensor"),
        (
            lambda: propagate_labels(x, y[:3], known, e - 1),
            r"edge_index must name nodes in 0\.\.149 of scores, got -1",
        ),
        (lambda: propagate_labels(x, y[:3], known.float(), e), "known must hold integers"),
        (lambda: with_label_propagation(None, y + 1), r"y_known must name classes in 0\.\.1, got 2"),
        (
            lambda: with_label_propagation(None, y)(x[:5], e[:, :0]),
            "y_known must have at most a label a node, got 150 for 5",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"predict\.batched must return"):
        model_robustness(SimpleNamespace(batched=lambda x, edges: x), x, e, 0, 0, far)
