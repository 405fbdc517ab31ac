"""Topology-aware robust optimisation: the projection, the inner maximum, and the prior against networkx."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from posterity.claims import Trial
from posterity.claims.transfer.topology_aware_robust import unseen_groups
from posterity.engine.compare import compare
from posterity.testing import check_loss, check_metric
from posterity.transfer import (
    TopologyAwareDRO,
    distance_graph,
    group_distances,
    learn_topology,
    project_simplex,
    topology_prior,
    worst_case_weights,
)

PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def losses(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


# The loss


def test_conforms_to_its_kind(as_a_user):
    groups = torch.tensor([0, 2, 3, 1, 2, 2])
    check_loss(TopologyAwareDRO(PRIOR).eval(), losses(6).requires_grad_(), groups, symmetric=True)
    exact = TopologyAwareDRO(PRIOR, strength=5.0, update="exact")
    check_loss(exact, losses(4).requires_grad_(), batch_of_one=False, detaches=True, compiles=False)


@pytest.mark.parametrize("update", ["gradient", "exact"])
def test_gradient_of_the_loss_is_the_updated_weights_which_stay_on_the_simplex(update):
    loss = TopologyAwareDRO(PRIOR, eta=0.7, strength=0.5, update=update)
    for step in range(20):
        means = (3 * losses(4, seed=step)).requires_grad_()
        (grad,) = torch.autograd.grad(loss(means), means)
        torch.testing.assert_close(grad, loss.weights, rtol=0, atol=1e-12)
        assert (loss.weights >= 0).all()
        assert float(loss.weights.sum()) == pytest.approx(1, abs=1e-9)


def test_one_gradient_step_by_hand():
    loss, means = TopologyAwareDRO(PRIOR, eta=0.2, strength=3.0), losses(4)
    loss(means)
    start = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(
        loss.weights, project_simplex(start + 0.2 * (means - 3 * (start - PRIOR))), rtol=0, atol=1e-12
    )


def test_gradient_steps_reach_the_exact_weights():
    means = losses(4)
    steps = TopologyAwareDRO(PRIOR, eta=0.2, strength=4.0)
    for _ in range(2000):
        steps(means)
    torch.testing.assert_close(
        steps.weights, worst_case_weights(means, PRIOR, strength=4.0), rtol=0, atol=1e-6
    )
    exact = TopologyAwareDRO(PRIOR, strength=4.0, update="exact")
    exact(means)
    torch.testing.assert_close(exact.weights, steps.weights, rtol=0, atol=1e-6)


def test_worst_case_weights_maximise_what_they_should():
    means, strength = losses(4), 1.5

    def value(q):
        return q @ means - strength / 2 * ((q - PRIOR) ** 2).sum(-1)

    best = worst_case_weights(means, PRIOR, strength=strength)
    others = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(4, 0.5), 20_000))
    near = project_simplex(best + 1e-3 * torch.randn(2_000, 4, generator=generator(), dtype=torch.float64))
    assert value(best) >= torch.cat([value(others), value(near)]).max() - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_have_the_prior_and_the_worst_group_for_limits(dtype):
    means = torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=dtype)
    torch.testing.assert_close(worst_case_weights(means, PRIOR.to(dtype), strength=1e9), PRIOR.to(dtype))
    assert worst_case_weights(means, PRIOR.to(dtype), strength=1e-9).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("update", ["gradient", "exact"])
def test_samples_with_groups_are_their_means(update):
    groups = torch.tensor([3, 0, 1, 1, 2, 3, 0, 0])
    each = losses(8)
    means = torch.stack([each[groups == k].mean() for k in range(4)])
    one, other = (TopologyAwareDRO(PRIOR, update=update) for _ in range(2))
    for _ in range(3):
        torch.testing.assert_close(one(each, groups), other(means))
        torch.testing.assert_close(one.weights, other.weights)


@pytest.mark.parametrize("update", ["gradient", "exact"])
def test_a_group_that_a_batch_lacks_keeps_its_weight_and_adds_nothing(update):
    loss = TopologyAwareDRO(PRIOR, eta=0.5, update=update)
    loss(losses(4))
    before = loss.weights.clone()
    each = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
    value = loss(each, torch.tensor([0, 2, 0]))
    assert torch.equal(loss.weights[[1, 3]], before[[1, 3]])
    assert float(loss.weights.sum()) == pytest.approx(1)
    assert float(value) == pytest.approx(float(5 * loss.weights[0] + 2 * loss.weights[2]))
    moved = PRIOR[[0, 2]] + each.new_tensor([5, 2]) if update == "exact" else (
        before[[0, 2]] + 0.5 * (each.new_tensor([5, 2]) - (before[[0, 2]] - PRIOR[[0, 2]]))
    )  # fmt: skip
    room = float(before[[0, 2]].sum())
    torch.testing.assert_close(loss.weights[[0, 2]], project_simplex(moved, total=room))
    assert float(loss(each[:0], torch.tensor([], dtype=torch.long))) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_groups_may_be_integers_of_any_width(dtype):
    groups, each = torch.tensor([3, 0, 1, 1, 2]), losses(5)
    loss = TopologyAwareDRO(PRIOR).eval()
    torch.testing.assert_close(loss(each, groups.to(dtype)), loss(each, groups))
    x = torch.randn(5, 2, generator=generator())
    found = [
        group_distances(x, some, n_projections=3, generator=generator())
        for some in (groups, groups.to(dtype))
    ]
    assert torch.equal(*found)


def test_weights_follow_only_in_training_and_come_back():
    loss = TopologyAwareDRO(PRIOR)
    loss.eval()(losses(4))
    assert loss.weights.tolist() == [0.25] * 4
    loss.train()(losses(4))
    again = TopologyAwareDRO(torch.full((4,), 0.25))
    again.load_state_dict(loss.state_dict())
    torch.testing.assert_close(again.double()(losses(4, seed=1)), loss(losses(4, seed=1)), rtol=1e-6, atol=0)
    loss.reset()
    assert loss.weights.tolist() == [0.25] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_are_not_lost_in_low_precision(dtype):
    low, high = TopologyAwareDRO(PRIOR.float(), eta=1e-3).to(dtype), TopologyAwareDRO(PRIOR, eta=1e-3)
    means = losses(4).to(dtype)
    high.prior = low.prior.double()
    for _ in range(200):
        value = low(means)
        high(means.double())
    assert value.dtype == dtype
    torch.testing.assert_close(low.weights.double(), high.weights, rtol=0, atol=1e-5)


# The projection


def test_projection_is_the_nearest_point_of_the_simplex():
    cp = pytest.importorskip("cvxpy")
    v = torch.randn(3, 2, 6, generator=generator(), dtype=torch.float64)
    got = project_simplex(v, total=2.5)
    for given, found in zip(v.view(-1, 6).numpy(), got.view(-1, 6).numpy(), strict=True):
        w = cp.Variable(6)
        cp.Problem(cp.Minimize(cp.sum_squares(w - given)), [w >= 0, cp.sum(w) == 2.5]).solve(cp.CLARABEL)
        assert_allclose(found, w.value, atol=1e-5)


def test_projection_of_a_point_of_the_simplex_is_itself_and_shifts_do_not_matter():
    torch.testing.assert_close(project_simplex(PRIOR), PRIOR)
    torch.testing.assert_close(project_simplex(PRIOR + 7), PRIOR)
    assert project_simplex(torch.tensor([1e8, -1e8, 3.0])).tolist() == [1, 0, 0]
    assert project_simplex(torch.tensor([[5.0], [-5.0]])).tolist() == [[1], [1]]
    assert project_simplex(torch.tensor([-math.inf, 0.0, 0.0])).tolist() == [0, 0.5, 0.5]


def test_projection_has_the_gradient_of_its_active_set():
    v = torch.randn(3, 5, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project_simplex, v)


# The topology


@pytest.mark.parametrize("seed", range(4))
def test_the_prior_is_networkxs_betweenness(seed):
    graph = nx.gnp_random_graph(14, (0.15, 0.25, 0.4, 0.1)[seed], seed=seed)
    adjacency = torch.from_numpy(nx.to_numpy_array(graph))
    expected = np.array(list(nx.betweenness_centrality(graph).values()))
    assert_allclose(topology_prior(adjacency), expected / expected.sum(), atol=1e-12)
    sources = [0, 3, 4, 9, 2]
    rest = [k for k in range(14) if k not in sources]
    expected = nx.betweenness_centrality_subset(graph, sources, rest)
    expected = np.array([expected[k] for k in sources])
    uniform = np.full(5, 0.2)
    expected = expected / expected.sum() if expected.sum() else uniform
    assert_allclose(topology_prior(adjacency, sources=sources), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("graph", "prior"),
    [
        (nx.star_graph(5), [1, 0, 0, 0, 0, 0]), (nx.path_graph(3), [0, 1, 0]),
        (nx.complete_graph(4), [0.25] * 4), (nx.empty_graph(5), [0.2] * 5), (nx.cycle_graph(5), [0.2] * 5),
    ],
)  # fmt: skip
def test_the_prior_of_known_graphs(graph, prior):
    adjacency = torch.from_numpy(nx.to_numpy_array(graph, dtype=int))
    assert topology_prior(adjacency).tolist() == pytest.approx(prior)
    loops = adjacency + 3 * torch.eye(len(prior), dtype=torch.long)
    assert topology_prior(loops).tolist() == pytest.approx(prior)
    assert topology_prior(adjacency.bool()).dtype == torch.float32


def test_a_grid_with_very_many_paths_keeps_its_shares():
    graph = nx.grid_2d_graph(12, 12)
    expected = np.array(list(nx.betweenness_centrality(graph).values()))
    assert_allclose(
        topology_prior(torch.from_numpy(nx.to_numpy_array(graph))), expected / expected.sum(), atol=1e-12
    )


def test_the_graph_is_symmetric_without_loops_and_ranks_alone_count():
    points = torch.randn(9, 2, generator=generator(), dtype=torch.float64)
    distances = torch.cdist(points, points)
    for percentile in (1, 30, 80, 100):
        graph = distance_graph(distances, percentile=percentile)
        assert torch.equal(graph, graph.T)
        assert not graph.diagonal().any()
        if percentile < 100:  # what is interpolated between two entries is below the same pairs
            cut = np.percentile(distances.numpy(), percentile)
            assert torch.equal(graph.bool(), (distances > 0) & (distances < cut))
            torch.testing.assert_close(distance_graph(distances**3, percentile=percentile), graph)
    assert int(graph.sum()) == 9 * 8 - 2


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_shifted_cloud_is_as_far_as_it_was_moved(dim):
    cloud = torch.randn(40, dim, generator=generator(), dtype=torch.float64)
    move = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)[:dim]
    x, groups = torch.cat([cloud, cloud + move]), torch.arange(80) // 40
    length = float(move.norm())
    assert float(group_distances(x, groups, method="wasserstein")[0, 1]) == pytest.approx(length, abs=1e-6)
    sliced = group_distances(x, groups, n_projections=5_000, generator=generator())[0, 1]
    share = {1: 1.0, 2: 2 / math.pi, 3: 0.5}[dim]  # mean of |<u, t>| / |t| over directions
    assert float(sliced) == pytest.approx(share * length, rel=0.02)


def test_clouds_of_unlike_sizes_are_compared_by_their_distributions():
    ot = pytest.importorskip("ot")
    x = torch.randn(26, 2, generator=generator(), dtype=torch.float64)
    groups = torch.tensor([0] * 7 + [1] * 14 + [2] * 5)
    clouds = [x[groups == k].numpy() for k in range(3)]
    exact = group_distances(x, groups, method="wasserstein")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float(exact[i, j]) == pytest.approx(
            ot.emd2([], [], ot.dist(clouds[i], clouds[j], "euclidean")), abs=1e-9
        )
    line = group_distances(x[:, :1], groups, n_projections=3, generator=generator())
    assert float(line[0, 1]) == pytest.approx(
        float(ot.wasserstein_1d(clouds[0][:, 0], clouds[1][:, 0])), abs=1e-9
    )


@pytest.mark.parametrize(
    "method", ["sliced", "wasserstein", "diffusion", lambda a, b: (a.mean(0) - b.mean(0)).norm()]
)
def test_the_order_of_points_is_nothing_and_distances_are_distances(method):
    x = torch.randn(45, 3, generator=generator(), dtype=torch.float64)
    groups = torch.arange(45) % 4
    x = x + groups[:, None]
    found = group_distances(x, groups, method=method, generator=generator())
    order = torch.randperm(45, generator=generator(1))
    again = group_distances(x[order], groups[order], method=method, generator=generator())
    torch.testing.assert_close(found, again)
    torch.testing.assert_close(found, found.T)
    assert (found.diagonal() == 0).all()
    assert found[0, 1] < found[0, 3]


def test_diffusion_distance_by_dense_powers():
    x = torch.rand(12, 2, generator=generator(), dtype=torch.float64)
    groups = torch.tensor([0, 1, 2] * 4)
    apart = torch.cdist(x, x).numpy()
    near = np.sort(apart, axis=1)[:, 1:4]
    kernel = np.where((apart <= near[:, -1:]) & (apart > 0), np.exp(-((apart / near[:, -1:]) ** 2)), 0)
    kernel = kernel + kernel.T + np.eye(12)
    walk = (kernel / kernel.sum(1, keepdims=True)).T
    mu = np.eye(3)[groups].astype(float) / 4
    heat = [np.linalg.matrix_power(walk, 2**k) @ mu for k in range(4)]
    parts = [2 ** (-(3 - k - 1) * 0.5) * (heat[k + 1] - heat[k]) for k in range(3)] + [heat[3]]
    embedded = np.concatenate(parts).T
    expected = np.abs(embedded[:, None] - embedded).sum(2)
    assert_allclose(
        group_distances(x, groups, method="diffusion", max_scale=3, n_neighbors=3), expected, atol=1e-12
    )


def test_distances_conform_to_their_kind(as_a_user):
    groups = torch.arange(40) % 3

    def spread(x):
        return group_distances(x, groups[: len(x)], generator=generator()).sum()

    x = torch.randn(40, 3, generator=generator(), dtype=torch.float64)
    point = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    check_metric(
        lambda x: group_distances(x, torch.arange(len(x)) % 2, generator=generator()).sum(), x,
        known=[((point,), 4.0)], permutation_invariant=False,
    )  # fmt: skip
    assert spread(x.bfloat16()).dtype == torch.bfloat16


def test_topology_of_clouds_on_a_line_scales_features_and_finds_the_middle():
    x = torch.randn(300, 2, generator=generator()) * 0.1
    groups = torch.arange(300) % 3
    x[:, 0] += groups
    found = learn_topology(x * torch.tensor([1e-3, 1.0]), groups, percentile=80, generator=generator())
    assert found.prior.tolist() == [0, 1, 0]
    constant = learn_topology(torch.cat([x, torch.ones(300, 1)], 1), groups, generator=generator())
    assert torch.isfinite(constant.distances).all()


# What is refused

BAD = [
    (lambda: TopologyAwareDRO(torch.tensor([0.5, 0.6])), "prior must be non-negative and sum to 1, got a sum of 1.1"),
    (lambda: TopologyAwareDRO(torch.tensor([1.5, -0.5])), "prior must be non-negative"),
    (lambda: TopologyAwareDRO(torch.tensor([1, 0])), "prior must be a floating-point tensor"),
    (lambda: TopologyAwareDRO(torch.tensor([])), "prior must be non-negative and sum to 1"),
    (lambda: TopologyAwareDRO(PRIOR, eta=0.0), "eta must be greater than 0"),
    (lambda: TopologyAwareDRO(PRIOR, strength=0.0), "strength must be greater than 0"),
    (lambda: TopologyAwareDRO(PRIOR, update="newton"), "update must be one of"),
    (lambda: TopologyAwareDRO(PRIOR)(losses(3)), r"losses must have shape \(4\)"),
    (lambda: TopologyAwareDRO(PRIOR)(torch.tensor([1.0, math.nan, 0, 0])), "losses must be finite"),
    (lambda: TopologyAwareDRO(PRIOR)(torch.tensor([1.0, math.inf, 0, 0])), "losses must be finite"),
    (lambda: TopologyAwareDRO(PRIOR)(losses(4).long()), "losses must be a floating-point tensor"),
    (lambda: TopologyAwareDRO(PRIOR)(losses(4), torch.zeros(5).long()), r"groups must have shape \(4\)"),
    (lambda: TopologyAwareDRO(PRIOR)(losses(4), torch.tensor([0, 1, 2, 4])), r"groups must be in 0\.\.3"),
    (lambda: TopologyAwareDRO(PRIOR)(losses(4), torch.zeros(4)), "groups must hold class indices"),
    (lambda: worst_case_weights(losses(3), PRIOR, strength=1), r"losses must have shape \(4\)"),
    (lambda: worst_case_weights(losses(4) / 0, PRIOR, strength=1), "losses must be finite"),
    (lambda: worst_case_weights(losses(4), PRIOR, strength=-1), "strength must be greater than 0"),
    (lambda: project_simplex(torch.zeros(3, 0)), "v must have elements"),
    (lambda: project_simplex(PRIOR, total=0), "total must be greater than 0"),
    (lambda: topology_prior(torch.zeros(2, 3)), "adjacency must be square"),
    (lambda: topology_prior(torch.tensor([[0, 1], [0, 0]])), "adjacency must be symmetric"),
    (lambda: topology_prior(-torch.ones(2, 2)), "adjacency must not be negative"),
    (lambda: topology_prior(torch.ones(1, 1)), "at least two rows"),
    (lambda: topology_prior(torch.full((2, 2), math.nan)), "adjacency must be finite"),
    (lambda: topology_prior(None), "adjacency must be a tensor"),
    (lambda: topology_prior(torch.ones(3, 3), sources=[]), "sources must be some"),
    (lambda: topology_prior(torch.ones(3, 3), sources=[0, 0]), r"got \[0, 0\]"),
    (lambda: topology_prior(torch.ones(3, 3), sources=[0, 3]), "sources must be some"),
    (lambda: topology_prior(torch.ones(3, 3), sources=[0, 1, 2]), "sources must be some, not all"),
    (lambda: topology_prior(torch.ones(3, 3), sources=[-1]), "sources must be an integer of at least 0"),
    (lambda: distance_graph(torch.zeros(3, 3), percentile=0), r"percentile must be in \(0, 100\]"),
    (lambda: distance_graph(torch.ones(3, 3)), "must be 0 on the diagonal"),
    (lambda: group_distances(losses(4, 2), torch.zeros(4).long()), "groups must be at least two"),
    (lambda: group_distances(losses(4, 2), torch.tensor([0, 0, 2, 2])), "group 1 has none"),
    (lambda: group_distances(losses(4, 2), torch.tensor([0, 1])), r"groups must have shape \(4\)"),
    (lambda: group_distances(losses(4, 2), torch.tensor([0, -1, 1, 1])), "numbered from 0"),
    (lambda: group_distances(losses(4, 2) / 0, torch.tensor([0, 0, 1, 1])), "features must be finite"),
    (lambda: group_distances(losses(0, 2), torch.tensor([]).long()), "features must hold samples"),
    (lambda: group_distances(losses(2, 2), torch.tensor([0, 1]), method="euclid"), "method must be one of"),
    (lambda: group_distances(losses(2, 2), torch.tensor([0, 1]), method=lambda a, b: a - b), "method must return a scalar"),
    (lambda: group_distances(losses(2, 2), torch.tensor([0, 1]), n_projections=0), "n_projections must be"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The claim and the task


def test_a_claim_on_groups_of_text_needs_a_learned_topology(tmp_path):
    rows = ["a,town,target", *(f"{k % 7},{'uvwxy'[k % 5]},{k % 2}" for k in range(100))]
    (tmp_path / "towns.csv").write_text("\n".join(rows))
    told = {"data": str(tmp_path / "towns.csv"), "target": "target", "group": "town", "n_sources": 3}
    found = unseen_groups(Trial(0), **told, topology="learned", steps=3)
    assert all(0 <= value <= 1 for value in found.values())
    from posterity.lab.data import load_table

    with pytest.raises(ValueError, match="topology of 'town' is not known"):
        unseen_groups.check(data=load_table(told["data"], target="target"), group="town", n_sources=3)
    with pytest.raises(ValueError, match="n_sources must leave some of the 5 groups unseen, got 5"):
        unseen_groups.check(data=load_table(told["data"], target="target"), group="town", n_sources=5)


def test_the_method_competes_where_the_task_is_asked():
    jobs, _, _ = compare("domain-shift", seeds=1)
    assert {"ordinary training", "group reweighting", "group DRO", "topology-aware"} == {
        job.params["entry"] for job in jobs
    }
