"""Fits train wherever they are called from, and what layers and graphs keep serves training later."""

import copy

import pytest
import torch

from posterity import graphs

HALF = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 3]])
EDGES = torch.cat([HALF, HALF.flip(0)], 1)
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
MASKS = [torch.arange(12) // 4 == k for k in range(3)]


def rng():
    return torch.Generator().manual_seed(0)


def node_classifier(x, edges, model=None):
    model = model or nets()["fit_node_classifier"]()
    graphs.fit_node_classifier(
        model, x, edges, Y.clone(), *(mask.clone() for mask in MASKS), num_steps=2, lr=0.01
    )
    return list(model.parameters())


def protocol(x, edges):
    made = []

    def make(num_layers):
        made.append(graphs.HeterophilyGNN(4, 8, 3, num_layers=num_layers, dropout=0.0))
        return made[-1]

    torch.manual_seed(0)
    graphs.run_protocol(
        make, x, edges, Y, *(mask[None] for mask in MASKS), num_layers=(1, 2), num_steps=2, lr=0.01
    )
    return list(made[-1].parameters())


def tbgrl(x, edges, model=None):
    model = model or nets()["fit_tbgrl"]()
    graphs.fit_tbgrl(model, x, edges, max_epochs=2, warmup_steps=0, generator=rng())
    return list(model.trainable_parameters())


def polygcl(x, edges, model=None):
    model = model or nets()["fit_polygcl"]()
    graphs.fit_polygcl(model, x, edges, max_epochs=3, generator=rng())
    return list(model.parameters())


def decoder(x, edges):
    links = edges[:, :6]
    return list(
        graphs.fit_link_decoder(
            x, links, links, links.flip(0), max_epochs=2, k=1, generator=rng()
        ).parameters()
    )


def nets():
    torch.manual_seed(0)
    return {
        "fit_node_classifier": lambda: graphs.HeterophilyGNN(4, 8, 3, dropout=0.0),
        "fit_tbgrl": lambda: graphs.TBGRL(graphs.GCNEncoder(4, 8, 8), 8),
        "fit_polygcl": lambda: graphs.PolyGCL(4, 8, K=2),
    }


FITS = {
    "fit_node_classifier": node_classifier,
    "run_protocol": protocol,
    "fit_tbgrl": tbgrl,
    "fit_polygcl": polygcl,
    "fit_link_decoder": decoder,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_the_same_without_gradients_around_it(as_a_user, name, mode):
    plain = FITS[name](X, EDGES)
    mine = [nets()[name]()] if name in nets() else []
    with mode():
        found = FITS[name](X.clone(), EDGES.clone(), *mine)  # data made in this mode
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (
            mode is torch.inference_mode
        )
    assert torch.is_grad_enabled()
    for theirs, ours in zip(plain, found, strict=True):
        assert torch.equal(ours, theirs) and not ours.is_inference()


@pytest.mark.parametrize("name", nets())
def test_a_module_made_under_inference_mode_is_refused(as_a_user, name):
    with torch.inference_mode():
        model = nets()[name]()
    with pytest.raises(ValueError, match="model must not be made under torch"):
        FITS[name](X, EDGES, model)


@pytest.mark.parametrize("name", nets())
def test_a_fit_that_fails_leaves_the_dtype_of_the_module(as_a_user, name):
    model = nets()[name]().bfloat16()
    with pytest.raises(ValueError, match="edge_index"):
        FITS[name](X.bfloat16(), EDGES + 100, model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


KEPT = {
    "AntiSymmetricConv": lambda: graphs.AntiSymmetricConv(4, 3, phi="gcn", cached=True),
    "AntiSymmetricConv of sums": lambda: graphs.AntiSymmetricConv(4, 3, cached=True),
    "ACMPConv": lambda: graphs.ACMPConv(4, method="euler", cached=True),
    "ACMPConv attending": lambda: graphs.ACMPConv(4, method="euler", attention="transformer", cached=True),
    "ResolventConv": lambda: graphs.ResolventConv(4, 3, 2, cached=True),
    "PolynomialFilter": lambda: graphs.PolynomialFilter(2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", KEPT)
def test_what_evaluation_kept_serves_training(as_a_user, name, mode):
    layer = KEPT[name]()
    fresh = copy.deepcopy(layer)
    weight = torch.full((12,), 0.5)
    with mode():
        layer.to(torch.float32)
        layer(X[:6].clone(), EDGES.clone(), weight.clone())
    for each in (layer, fresh):
        x = X[:6].clone().requires_grad_()
        each(x, EDGES, weight).square().sum().backward()
        each.slopes = [x.grad, *(p.grad for p in each.parameters())]
    for ours, theirs in zip(layer.slopes, fresh.slopes, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("name", [name for name in KEPT if name != "PolynomialFilter"])
def test_what_is_kept_does_not_follow_the_callers_tensors(as_a_user, name):
    layer, edges, weight = KEPT[name](), EDGES.clone(), torch.full((12,), 0.5, dtype=torch.float64)
    x = X[:6].double()
    layer.double()
    more = {"node_weight": torch.ones(6, dtype=torch.float64)} if name == "ResolventConv" else {}
    before = layer(x, edges, weight, **more).detach().clone()
    edges.copy_(EDGES.flip(1))
    weight.fill_(7.0)
    for value in more.values():
        value.fill_(3.0)
    out = layer(x, edges, weight, **more)
    assert torch.equal(out, before)
    out.square().sum().backward()
    out.detach().zero_()
    assert torch.equal(layer(x, edges, weight, **more), before)


@pytest.mark.parametrize("name", ["AntiSymmetricConv", "ACMPConv", "ResolventConv"])
def test_what_is_kept_serves_other_dtypes(as_a_user, name):
    layer = KEPT[name]()
    low = layer(X[:6], EDGES)
    high = layer.double()(X[:6].double(), EDGES)
    assert high.dtype == torch.float64
    torch.testing.assert_close(high.float(), low, rtol=1e-4, atol=1e-5)
    assert layer.bfloat16()(X[:6].bfloat16(), EDGES).dtype == torch.bfloat16


def test_results_are_nobodys_to_change():
    """Mutating what a function returned changes no later result."""
    filters = graphs.PolynomialFilter(2)
    calls = {
        "csr": lambda: graphs.AgentNet.csr(EDGES, 6),
        "laplacian_eigs": lambda: graphs.laplacian_eigs(EDGES, 6),
        "resistance_distance": lambda: (graphs.resistance_distance(EDGES, 6),),
        "shortest_path_distance": lambda: (graphs.shortest_path_distance(EDGES, 6),),
        "adjacency_features": lambda: (graphs.adjacency_features(EDGES, 6),),
        "coefficients": lambda: (
            filters.coefficients(highpass=True).detach(),
            filters.values(highpass=False).detach(),
        ),
        "sample": lambda: (graphs.CSBM(9, n_features=2).sample(rng()).x,),
        "augment_graph": lambda: graphs.augment_graph(
            X, EDGES, drop_edge=0.0, drop_feature=0.0, generator=rng()
        ),
    }
    for name, call in calls.items():
        first = [part.clone() for part in call()]
        for part in call():
            part.zero_()
        assert all(map(torch.equal, call(), first)), name
