"""In bfloat16, float16 and under autocast all that takes numbers gives what float32 gives on the same ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from posterity import graphs
from posterity.graphs._sparse import Adjacency, edge_dots, edge_pattern, normalised, sparse_product
from posterity.testing._low_precision import check_low_precision, relative_error

NARROW = [torch.bfloat16, torch.float16]
HALF = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, 7, 7, 5]])
EDGES = torch.cat([HALF, HALF.flip(0)], 1)
KNOWN, LABELS = torch.tensor([0, 5]), torch.tensor([1, 0])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, grad=False):
    return torch.randn(shape, generator=rng(seed)).requires_grad_(grad)


def weights():
    half = torch.rand(HALF.shape[1], generator=rng(9)) + 0.5
    return torch.cat([half, half])


@pytest.fixture(autouse=True)
def plain(as_a_user):
    """Shape hooks are off: they take no 16 bits of what autocast makes."""
    torch.manual_seed(0)


def spread(scores):
    return graphs.propagate_labels(scores, LABELS, KNOWN, EDGES, num_layers=20)


def classifier(scores):
    def predict(x, edge_index):
        return scores

    return graphs.with_label_propagation(predict, torch.tensor([1, 0]))(normal(8, 2), EDGES)


def contour(x, weight):
    return graphs.apply_filter(lambda z: torch.exp(-z), x, EDGES, weight, method="contour")


def distances(weight):
    found = graphs.resistance_distance(EDGES, 8, edge_weight=weight)
    return torch.where(found.isfinite(), found, 0)


def coarse(weight, f):
    found = graphs.collapse_strong_edges(EDGES, 8, weight, HALF[0].repeat(2) < 2)
    return found.edge_weight, found.node_weight, found.project(f), found.lift(found.project(f))


def drawn(logits):
    chosen, weight = graphs.straight_through_choice(
        logits, torch.tensor([0, 0, 0, 1, 1, 1]), 2, generator=rng()
    )
    return weight + logits[chosen]


FUNCTIONS = {
    "log_aggregate": (lambda x: graphs.log_aggregate(x, HALF[0].repeat(300) % 3, 3), (normal(2700, 2, grad=True),)),
    "log_aggregate weighted": (
        lambda x, w: graphs.log_aggregate(x, HALF[0] % 3, 3, w), (normal(9, 2, grad=True), weights()[:9]),
    ),
    "straight_through_choice": (drawn, (normal(6, grad=True),)),
    "dirichlet_energy": (
        lambda x, w: graphs.dirichlet_energy(x, EDGES, w), (normal(8, 3, grad=True), weights()),
    ),
    "sgc_features": (lambda x: graphs.sgc_features(x, EDGES), (normal(8, 3, grad=True),)),
    "propagate_labels": (spread, (normal(8, 2, grad=True),)),
    "with_label_propagation": (classifier, (normal(8, 2, grad=True),)),
    "apply_filter": (
        lambda x: graphs.apply_filter(torch.sqrt, x, EDGES), (normal(8, 3),),
    ),
    "apply_filter contour": (contour, (normal(8, 3, grad=True), weights())),
    "ign_2to1": (graphs.ign_2to1, (normal(2, 1, 70, 70, grad=True),)),
    "laplacian_eigs": (lambda w: graphs.laplacian_eigs(EDGES, 8, edge_weight=w)[0], (weights(),)),
    "resistance_distance": (distances, (weights().requires_grad_(),)),
    "collapse_strong_edges": (coarse, (weights().requires_grad_(), normal(8, 2))),
    "augment_graph": (
        lambda x: graphs.augment_graph(x, EDGES, drop_edge=0.5, drop_feature=0.5, generator=rng())[0],
        (normal(8, 9, grad=True),),
    ),
    "corrupt_graph": (
        lambda x: graphs.corrupt_graph(x, EDGES, kind="random-features", generator=rng())[0], (normal(8, 9),),
    ),
    "products along edges": (
        lambda x, w: sparse_product(Adjacency(edge_pattern(*EDGES, 8), normalised(*EDGES, w, 8)), x),
        (normal(8, 3, grad=True), weights().requires_grad_()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    call, inputs = FUNCTIONS[name]
    check_low_precision(call, None, inputs, slack=4, gradient=any(x.requires_grad for x in inputs))


def polygcl(part, x):
    return part.loss(x, EDGES, generator=rng())


def tbgrl(part, x):
    return part.loss((x, EDGES), (x.flip(0), EDGES))  # 2 less cosines: nothing cancels


def bound(part, x, w):
    return graphs.trapping_radius(part, x, EDGES, w)


def growth(part, x, w):
    return graphs.consensus_growth_rate(part, x, EDGES, w)


ATTEND = {"beta": 0.3, "attention": "transformer", "method": "rk4", "heads": 2}
LOSSES = {
    "PolyGCL": (graphs.PolyGCL(4, 8, K=3).eval(), polygcl, (normal(8, 4),)),
    "TBGRL": (graphs.TBGRL(graphs.GCNEncoder(4, 8, 8), 8), tbgrl, (normal(8, 4),)),
    "trapping_radius": (graphs.ACMPConv(4, source=True, **ATTEND), bound, (normal(8, 4), weights())),
    "consensus_growth_rate": (graphs.ACMPConv(4, beta=0.6), growth, (normal(8, 4), weights())),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_bounds_are_never_narrower_than_what_came(name):
    module, call, inputs = LOSSES[name]
    learns = name in ("PolyGCL", "TBGRL")
    check_low_precision(call, module, inputs, slack=16, gradient=learns)


class Mixed(nn.Module):
    """Message passing of one's own within the anti-symmetric layer."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x, edge_index):
        return self.map(x)


LAYERS = {
    "AntiSymmetricConv": (graphs.AntiSymmetricConv(4, 200, epsilon=0.02, phi="gcn"), (normal(8, 4), EDGES, weights())),
    "AntiSymmetricConv of a module": (graphs.AntiSymmetricConv(4, 5, phi=Mixed()), (normal(8, 4), EDGES)),
    "ACMPConv": (graphs.ACMPConv(4, time=20.0, beta=0.4), (normal(8, 4), EDGES, weights())),
    "ACMPConv attending": (graphs.ACMPConv(4, source=True, **ATTEND), (normal(8, 4), EDGES)),
    "ResolventConv": (graphs.ResolventConv(4, 3, 2, identity=True), (normal(8, 4), EDGES, weights())),
    "StableGCN": (graphs.StableGCN(4, 6, 2, pool="mean", max_gain=0.7), (normal(8, 4), EDGES, weights())),
    "PolynomialFilter": (
        graphs.PolynomialFilter(20, learn_ends=True), (normal(8, 4, grad=True), EDGES, weights()),
    ),
    "PolynomialFilter summed": (graphs.PolynomialFilter(5, max_elements=0), (normal(8, 4, grad=True), EDGES)),
    "AgentNet": (
        graphs.AgentNet(4, 8, 2, num_agents=3, mode="random", edge_dim=2).eval(),
        (normal(8, 4), EDGES, None, normal(18, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    module, inputs = LAYERS[name]
    options = {"start": torch.tensor([0, 3, 6])} if name == "AgentNet" else {}

    def call(part, *parts):
        given = {**options, "generator": rng()} if options else {}
        return part(*parts, **given)

    check_low_precision(call, module, inputs, slack=8, follows=False)


@pytest.mark.parametrize("casting", NARROW)
def test_networks_train_under_autocast_whose_backward_pass_is_in_it_or_not(casting):
    x, edge_index = normal(8, 4), EDGES
    for make in (
        lambda: graphs.ADGN(4, 8, 2, 3),
        lambda: graphs.ACMP(4, 8, 2),
        lambda: graphs.ACMP(4, 8, 2, adjoint=True),
        lambda: graphs.AgentNet(4, 8, 2, num_agents=3, num_steps=3),
        lambda: graphs.GCNEncoder(4, 8),
        lambda: graphs.HeterophilyGNN(4, 8, 2),
        lambda: graphs.HeterophilyGNN(4, 8, 2, model="GT"),
        lambda: graphs.StableGCN(4, 8, 2),
        lambda: graphs.GraphormerGD(4, 8, num_layers=1, num_heads=2),
        lambda: graphs.LinkDecoder(4),
    ):
        net = make()
        with torch.autocast("cpu", dtype=casting):
            net(x, edge_index).float().sum().backward()
            out = net(x, edge_index).float().sum()
        out.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters()), type(net)


@pytest.mark.parametrize("mode", ["learned", "simple"])
def test_agents_that_choose_stay_finite(mode):
    net = graphs.AgentNet(4, 8, 2, num_agents=3, mode=mode, edge_dim=2).eval()
    check_low_precision(
        lambda part, x, edge_attr: part(x, EDGES, None, edge_attr, generator=rng()),
        net, (normal(8, 4), normal(18, 2)), slack=8, follows=False, chooses=True,
    )  # fmt: skip


@pytest.mark.parametrize("distances", ["spd", "rd", "both"])
def test_distances_are_not_rounded_before_they_are_looked_at(distances):
    net = graphs.DistanceBias(2, use_spd=distances != "rd", use_rd=distances != "spd", num_kernels=8)
    spd, rd = graphs.shortest_path_distance(EDGES, 9)[None], graphs.resistance_distance(EDGES, 9)[None]
    check_low_precision(lambda part, a, b: part(a, b), net, (spd, rd), slack=8, follows=False)


@pytest.mark.parametrize("dtype", NARROW)
def test_an_encoding_masks_padding_in_narrow_numbers(dtype):
    eigvals, eigvecs = graphs.laplacian_eigs(EDGES, 8, 4)
    mask = torch.tensor([[True, True, True, False]])
    net = graphs.SignNet(4, 8, 3).to(dtype).train()
    low = eigvecs.to(dtype), eigvals[None].to(dtype), EDGES, torch.zeros(8, dtype=torch.long), mask
    twin = graphs.SignNet(4, 8, 3)
    twin.load_state_dict(net.state_dict())
    out, exact = net(*low), twin(*(part.float() if part.is_floating_point() else part for part in low))
    assert out.dtype == dtype and relative_error(out, exact) < 16 * torch.finfo(dtype).eps
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", NARROW)
def test_what_returns_numbers_is_that_of_the_rounded_ones(dtype):
    x, w = normal(8, 4).to(dtype), weights().to(dtype)
    exact, exact_w = x.double(), w.double()
    conv = graphs.AntiSymmetricConv(4, gamma=0.3)
    low, twin = conv.to(dtype), graphs.AntiSymmetricConv(4, gamma=0.3).double()
    twin.load_state_dict(conv.state_dict())
    found = graphs.local_jacobian_eigenvalues(low, x, EDGES, w)
    assert found.dtype == torch.complex64
    limits = graphs.euler_step_limit(low, x, EDGES, w), graphs.euler_step_limit(twin, exact, EDGES, exact_w)
    assert limits[0] == pytest.approx(limits[1], rel=1e-4)
    layer = graphs.ResolventConv(3, 4, 2).to(dtype)
    upper = graphs.ResolventConv(3, 4, 2).double()
    upper.load_state_dict(layer.state_dict())
    assert graphs.filter_gain(layer) == pytest.approx(graphs.filter_gain(upper), rel=1e-6)
    spectrum = graphs.laplacian_eigs(EDGES, 8, normalization=None)[0].to(dtype)
    assert graphs.filter_gain(layer, spectrum) == pytest.approx(graphs.filter_gain(upper, spectrum.double()))
    mask = HALF[0].repeat(2) < 2
    bounds = [graphs.collapse_bound(EDGES, 8, each, mask).value for each in (w, exact_w)]
    assert bounds[0] == pytest.approx(bounds[1])
    scores = normal(100).to(dtype), normal(100, seed=1).to(dtype)
    assert graphs.hits_at_k(*scores) == graphs.hits_at_k(*(part.double() for part in scores))
    colors = [graphs.gd_wl_colors(EDGES, 8, distance=abs(d - d.T)) for d in (x @ x.T, (x @ x.T).double())]
    assert torch.equal(*colors)
    assert torch.equal(*(graphs.find_duplicate_nodes(EDGES, 8, x=each) for each in (x, exact)))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_new_node_is_classified_by_its_rounded_features(dtype):
    csbm = graphs.CSBM(60, n_features=5)
    data = csbm.sample(rng())
    data.x = data.x.to(dtype)
    counts = []
    for x in (data.x, data.x.double()):
        candidates = graphs.attack_candidates(x, data.y, data.edge_index, 3)
        counts.append(
            [graphs.bayes_robustness(csbm, x, data.edge_index, data.y, k, candidates[:0]) for k in range(60)]
        )
        counts.append(candidates.tolist())
    assert counts[:2] == counts[2:]
    torch.testing.assert_close(
        csbm.log_likelihood(data.x, data.edge_index, data.y, 3),
        csbm.log_likelihood(data.x.double(), data.edge_index, data.y, 3),
    )
    found = graphs.semantic_robustness(
        lambda x, edge_index: normal(len(x), 2).to(dtype), csbm, data, n_nodes=3, max_edges=2, generator=rng()
    )
    assert len(found.model) == 3


@pytest.mark.parametrize("dtype", NARROW)
def test_equal_eigenvalues_stay_one_space_when_they_are_rounded(dtype):
    """They may lie on either side of the middle between two numbers of the dtype."""
    eps = torch.finfo(dtype).eps
    below = torch.tensor([0.0, 0.25, 1.0]) * (1 + eps / 2) * (1 - 1e-6)
    pairs = torch.stack([below, below * (1 + 2e-6)], 1)
    low = pairs.to(dtype)
    assert low[1, 0] < low[1, 1] and graphs.eigenspaces(pairs.flatten()).tolist() == [0, 0, 1, 1, 2, 2]
    assert graphs.eigenspaces(low.flatten()).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", NARROW)
def test_training_on_narrow_numbers_trains(dtype):
    z = normal(30, 6)
    links = torch.stack([torch.arange(29), torch.arange(1, 30)])
    decoder = graphs.fit_link_decoder(
        z.to(dtype), links, links, links.flip(1), max_epochs=3, k=1, generator=rng()
    )
    wide = graphs.fit_link_decoder(
        z.to(dtype).float(), links, links, links.flip(1), max_epochs=3, k=1, generator=rng()
    )
    for low, exact in zip(decoder.parameters(), wide.parameters(), strict=True):
        assert torch.equal(low, exact.to(dtype))
    y = torch.arange(30) % 3
    masks = [torch.arange(30) // 10 == k for k in range(3)]
    net = graphs.HeterophilyGNN(6, 8, 3).to(dtype)
    assert 0 <= graphs.fit_node_classifier(net, z.to(dtype), links, y, *masks, num_steps=2, lr=0.01).val <= 1
    model = graphs.TBGRL(graphs.GCNEncoder(6, 8, 8), 8).to(dtype)
    sparse = torch.where(torch.rand(30, 6, generator=rng()) < 0.05, z, 0).to(dtype)
    losses = graphs.fit_tbgrl(model, sparse, links, max_epochs=3, warmup_steps=0, generator=rng())
    assert all(torch.tensor(losses).isfinite())
    model = graphs.PolyGCL(6, 8, K=2).to(dtype)
    assert all(
        torch.tensor(graphs.fit_polygcl(model, z.to(dtype), links, max_epochs=3, generator=rng())).isfinite()
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_one_generator_gives_one_draw_in_every_precision(dtype):
    logits = normal(3000).to(dtype)
    index = torch.arange(1000).repeat_interleave(3)
    low, exact = (
        graphs.straight_through_choice(x, index, 1000, generator=rng())[0] for x in (logits, logits.float())
    )
    assert torch.equal(low, exact)
    x = normal(20, 5)
    wide = graphs.corrupt_graph(x, EDGES, kind="random-features", generator=rng())[0]
    assert torch.equal(
        graphs.corrupt_graph(x.to(dtype), EDGES, kind="random-features", generator=rng())[0], wide.to(dtype)
    )
    split = graphs.inductive_link_split(
        normal(40, 3).to(dtype),
        torch.cat(
            [
                torch.stack([torch.arange(39), torch.arange(1, 40)]),
                torch.stack([torch.arange(1, 40), torch.arange(39)]),
            ],
            1,
        ),
        generator=rng(),
    )
    assert split.train_x.dtype == dtype


@pytest.mark.parametrize("dtype", NARROW)
def test_eigenvectors_come_in_the_dtype_of_the_weights(dtype):
    pytest.importorskip("torch_geometric")
    data = SimpleNamespace(num_nodes=8, edge_index=EDGES, get=lambda name: weights().to(dtype))
    found = graphs.AddLaplacianEigs(4).forward(data)
    assert found.eigvecs.dtype == found.eigvals.dtype == dtype
    gram = found.eigvecs.double().T @ found.eigvecs.double()
    torch.testing.assert_close(
        gram, torch.eye(4, dtype=torch.float64), rtol=0, atol=8 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_scores_of_edges_are_summed_in_full(dtype):
    q, k = normal(8, 500).to(dtype), normal(8, 500, seed=1).to(dtype)
    scores = edge_dots(edge_pattern(*EDGES, 8), q, k)
    torch.testing.assert_close(scores, (q.float()[EDGES[0]] * k.float()[EDGES[1]]).sum(1))
