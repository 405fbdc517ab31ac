"""What no conformance check covers gives on CUDA what it gives on the CPU."""

import numpy as np
import pytest
import torch
from torch import nn

from posterity import generative, graphs, tabular, timeseries, transport, uncertainty

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def both_ways(edges):
    return torch.cat([edges, edges.flip(0)], 1)


RING = both_ways(torch.stack([torch.arange(12), (torch.arange(12) + 1) % 12]))
PATHS = both_ways(torch.tensor([[0, 1, 2, 3, 5, 6, 8, 0], [1, 2, 3, 4, 6, 7, 9, 4]]))  # and two lone nodes
WEIGHTS = torch.rand(8, dtype=torch.float64, generator=rng(3)).add(0.5).repeat(2)
LABELS = torch.arange(12) % 3
NODE = torch.tensor([0, 0, 1, 1, 1, 2])


def a_dgn_steps(on):
    torch.manual_seed(0)
    conv = graphs.AntiSymmetricConv(4, 3).double().to(on)
    args = draw(12, 4).to(on), PATHS.to(on), WEIGHTS.to(on)
    values = graphs.local_jacobian_eigenvalues(conv, *args)
    return conv(*args), values.abs().sort(1).values, graphs.euler_step_limit(conv, *args)


def acmp_measures(on):
    torch.manual_seed(0)
    conv = graphs.ACMPConv(4, method="rk4", beta=0.2).double().to(on)
    args = draw(12, 4).to(on), RING.to(on)
    return (
        conv.velocity(*args),
        graphs.trapping_radius(conv, *args),
        graphs.consensus_growth_rate(conv, *args),
    )


def agents(on):
    logits, values = draw(6).to(on), draw(6, 3).to(on)
    chosen, weight = graphs.straight_through_choice(logits, NODE.to(on), 3, generator=rng(1))
    return weight.shape, graphs.log_aggregate(values, NODE.to(on), 3), chosen.device.type == on


def coarsened(on):
    coarse = graphs.collapse_strong_edges(PATHS.to(on), 12, WEIGHTS.to(on), 1.2)
    bound = graphs.collapse_bound(PATHS.to(on), 12, WEIGHTS.to(on), 1.2)
    x = draw(12, 2).to(on)
    filtered = [
        graphs.apply_filter(lambda t: 1 / (1 + t), x, PATHS.to(on), WEIGHTS.to(on), method=method, **options)
        for method, options in (("eig", {}), ("contour", {"center": 5.0, "radius": 5.5}))
    ]
    return coarse.lift(coarse.project(x)), tuple(bound), filtered


def distances(on):
    return (
        graphs.shortest_path_distance(PATHS.to(on), 12),
        graphs.resistance_distance(PATHS.to(on), 12, edge_weight=WEIGHTS.to(on)),
        graphs.gd_wl_colors(PATHS.to(on), 12),
        graphs.gd_wl_equivalent(RING.to(on), 12, PATHS.to(on), 12),
        graphs.biconnectivity(PATHS.to(on), 12).cut_vertex,
    )


def homophilies(on):
    edges, y = PATHS.to(on), LABELS.to(on)
    kept, left = graphs.remove_duplicate_nodes(edges, 12, y=y)
    return (
        *(getattr(graphs, f"{kind}_homophily")(edges, y) for kind in ("edge", "node", "adjusted")),
        graphs.label_informativeness(edges, y), graphs.find_duplicate_nodes(edges, 12), kept, left,
        graphs.sgc_features(draw(12, 4).to(on), edges), graphs.adjacency_features(edges, 12),
    )  # fmt: skip


def node_classifier(on):
    torch.manual_seed(0)
    net = graphs.HeterophilyGNN(4, 8, 3, dropout=0.0).double().to(on)
    masks = [(torch.arange(12) % 4 == k).to(on) for k in (0, 1, 2)]
    result = graphs.fit_node_classifier(
        net, draw(12, 4).to(on), PATHS.to(on), LABELS.to(on), *masks, lr=1e-2, num_steps=5
    )
    return net(draw(12, 4).to(on), PATHS.to(on)), result.val


def embedded(on):
    torch.manual_seed(0)
    model = graphs.PolyGCL(4, 8, K=3, dropout=0.0, feature_dropout=0.0).double().to(on)
    losses = graphs.fit_polygcl(model, draw(12, 4).to(on), RING.to(on), max_epochs=2, generator=rng())
    return model.embed(draw(12, 4).to(on), RING.to(on)).isfinite().all(), len(losses)


def contextual(on):
    csbm = graphs.CSBM(60)
    g = csbm.sample_node(csbm.sample(rng()), rng(1))
    x, edges, y = g.x.to(on), g.edge_index.to(on), g.y.to(on)
    others = graphs.attack_candidates(x, y, edges, 60, kind="l2-weak", generator=rng(2))
    return (
        csbm.log_likelihood(x, edges, y, 60), csbm.bayes_predict(x, edges, y, 60), others,
        graphs.bayes_robustness(csbm, x, edges, y, 60, others, 10),
        graphs.propagate_labels(x[:, :2], y[:20], torch.arange(20, device=on), edges),
    )  # fmt: skip


def spectra(on):
    values, vectors = graphs.laplacian_eigs(PATHS.to(on), 12, edge_weight=WEIGHTS.to(on))
    return (
        values,
        (vectors * values) @ vectors.T,
        graphs.eigenspaces(values),
        graphs.ign_2to1(draw(2, 3, 5, 5).to(on)),
    )


def link_representations(on):
    torch.manual_seed(0)
    model = graphs.TBGRL(graphs.GCNEncoder(4, 8, 6), 6, predictor_hidden=8).double().to(on)
    losses = graphs.fit_tbgrl(
        model, draw(12, 4).to(on), RING.to(on), max_epochs=2, warmup_steps=1, generator=rng()
    )
    z = model.embed(draw(12, 4).to(on), RING.to(on))
    pairs = RING.to(on)[:, :6]
    decoder = graphs.fit_link_decoder(z, pairs, pairs, pairs.flip(0), max_epochs=2, k=2, generator=rng())
    return len(losses), decoder(z, pairs).isfinite().all(), graphs.hits_at_k(z[:, 0] * 0 + 1, z[:, 0] * 0, 5)


def transported(on):
    torch.manual_seed(0)
    histograms = draw(4, 3, 6).softmax(-1).to(on)
    x, y = draw(2, 30, 3).to(on), draw(2, 30, 3, seed=1).to(on)
    points = transport.sphere_points(40, dtype=torch.float64, device=on)
    a, b, cost = draw(9).softmax(0).to(on), draw(7, seed=1).softmax(0).to(on), draw(9, 7, seed=2).abs().to(on)
    return (
        transport.sparse_transport(a, b, cost, k=5).value,
        transport.multimarginal_emd(histograms).value,
        transport.soft_histogram(draw(50).sigmoid().to(on)),
        transport.sliced_wasserstein(x, y, points),
        transport.project_sparse_simplex(draw(3, 7).to(on), 2),
    )  # fmt: skip


def out_of_distribution(on):
    x, y = nn.functional.normalize(draw(60, 5)).to(on), (torch.arange(60) % 3).to(on)
    prototypes = nn.functional.normalize(draw(3, 5, seed=1)).to(on)
    score = uncertainty.KNNScore(5).fit(x)
    return (
        score.score(x[:7] * 0.5), score.threshold(x), uncertainty.update_prototypes(prototypes, x, y, 0.9),
        list(uncertainty.hypersphere_geometry(x, y, prototypes, x).values()),
    )  # fmt: skip


def input_components(on):
    components, scales = uncertainty.fit_input_components(draw(40, 6).to(on), rank=3)
    gradients = draw(3, 5, 6).to(on)
    return (
        (components * scales) @ components.T,
        scales,
        uncertainty.input_gradient_repulsion(gradients, components=components, scales=scales),
    )


def laplace(on):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().to(on)
    x, y = draw(30, 3).to(on), (torch.arange(30) % 2).to(on)
    fitted = uncertainty.SampledLaplace(
        net, "classification", n_samples=4, n_em_steps=2, generator=rng()
    ).fit(x, y)
    shares = fitted.predict_proba(x, link="probit")
    return shares.device.type == on, shares.sum(1), fitted.log_likelihood(x, y).isfinite().all()


def functions(on):
    torch.manual_seed(0)
    model = uncertainty.ConvCNP(1, points_per_unit=8, channels=(8, 8), architecture="conv").double().to(on)
    tasks = draw(2, 6, 1), draw(2, 6, 1, seed=1), draw(2, 4, 1, seed=2), draw(2, 4, 1, seed=3)
    tasks = [part.to(on) for part in tasks]
    drawn = uncertainty.ar_sample(model, *tasks[:3], 3, generator=rng())
    return (
        uncertainty.ar_log_likelihood(model, *tasks, order="given"),
        drawn.y.device.type == on,
        drawn.y.shape,
    )


def importance(on):
    torch.manual_seed(0)
    model = uncertainty.SINP(1, 1, dim_hidden=8, dim_latent=4).double().to(on)
    tasks = [part.to(on) for part in (draw(2, 6, 1), draw(2, 6, 1, seed=1), draw(2, 4, 1, seed=2))]
    model.loss(*tasks, tasks[2], generator=rng()).backward()
    finite = all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return finite, uncertainty.self_normalized_weights(*(draw(3, 2, seed=k).to(on) for k in range(3)))


def flows(on):
    torch.manual_seed(0)
    flow, net = generative.RectifiedFlow(2), Slope().double().to(on)
    x0, x1 = draw(20, 2).to(on), draw(20, 2, seed=1).to(on)
    pair = flow.couple(net, x0=x0, n_steps=5)
    return (
        pair[1], flow.loss(net, x1, x0, t=torch.linspace(0, 1, 20, dtype=torch.float64, device=on)),
        flow.log_prob(net, x1), generative.straightness(flow, net, x0), generative.transport_cost(x0, x1),
    )  # fmt: skip


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, t):
        return self.linear(torch.cat([x, t[:, None]], 1))


def attributions(on):
    torch.manual_seed(0)
    latent = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double().to(on)
    return tabular.latent_attributions(latent, draw(6, 4).to(on)), tuple(
        tabular.tangos_terms(latent, draw(6, 4).to(on))
    )


CASES = [
    a_dgn_steps, acmp_measures, agents, coarsened, distances, homophilies, node_classifier, embedded, contextual,
    spectra, link_representations, transported, out_of_distribution, input_components, laplace, functions,
    importance, flows, attributions,
]  # fmt: skip


def plain(value):
    """Return tensors on the CPU, containers as lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_functions_repeat_and_agree_with_the_cpu(case, on):
    torch.testing.assert_close(plain(case(on)), plain(case("cpu")), rtol=1e-6, atol=1e-8)


@needs_cuda
def test_generators_of_either_device_serve_data_on_either():
    torch.manual_seed(0)
    flow, slope = generative.RectifiedFlow(2), Slope().double()
    latent = nn.Linear(4, 5).double()
    process = uncertainty.SINP(1, 1, dim_hidden=8, dim_latent=4).double()
    for generator in (torch.Generator("cpu"), torch.Generator("cuda")):
        for on in ("cpu", "cuda"):
            tasks = [draw(2, 5, 1, seed=k).to(on) for k in range(4)]
            drawn = [
                flow.loss(slope.to(on), draw(9, 2).to(on), generator=generator),
                process.to(on).loss(*tasks, generator=generator),
                *tabular.tangos_terms(latent.to(on), draw(6, 4).to(on), n_pairs=3, generator=generator),
                graphs.augment_graph(
                    draw(12, 4).to(on), RING.to(on), drop_edge=0.2, drop_feature=0.2, generator=generator
                )[0],
                graphs.corrupt_graph(draw(12, 4).to(on), RING.to(on), generator=generator)[0],
            ]
            assert all(each.device.type == on and each.isfinite().all() for each in drawn)
        points = transport.sphere_points(5, "random", generator=generator, device="cuda")
        assert points.device.type == "cuda"
        graph = graphs.CSBM(60).sample(generator)
        assert graph.x.device.type == graph.edge_index.device.type == generator.device.type


ESTIMATORS = {
    "tangos": lambda on: tabular.TangosRegressor(max_epochs=3, device=on, random_state=0),
    "timesnet": lambda on: timeseries.TimesNetForecaster(
        horizon=4, seq_len=12, max_epochs=1, device=on, random_state=0
    ),
    "gmogp": lambda on: uncertainty.GMOGPRegressor(n_iter=3, device=on, random_state=0),
}


@needs_cuda
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_fit_on_the_device_and_give_arrays(name):
    x = draw(60, 3).numpy()
    y = {"tangos": x[:, 0], "timesnet": None, "gmogp": x[:, :2]}[name]
    model = ESTIMATORS[name]("cuda").fit(x, y)
    out = model.predict(x)
    assert isinstance(out, np.ndarray) and np.isfinite(out).all()
