"""torch.compile, with breaks where values are read, runs each network forward and backward as it is."""

import pytest
import torch

from posterity import graphs

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])


def rng():
    return torch.Generator().manual_seed(0)


def encoded(net, x):
    eigvals, eigvecs = graphs.laplacian_eigs(EDGES, 4)
    return (
        net(eigvecs, eigvals)
        if isinstance(getattr(net, "_orig_mod", net), graphs.BasisNet)
        else net(eigvecs, eigvals, EDGES)
    )


NETWORKS = {
    "ADGN": (lambda: graphs.ADGN(3, 4, 2, 2), None),
    "ACMP": (lambda: graphs.ACMP(3, 4, 2, time=0.5).eval(), None),
    "AgentNet": (
        lambda: graphs.AgentNet(3, 4, 2, num_agents=2, num_steps=2).eval(),
        lambda net, x: net(x, EDGES, generator=rng()),
    ),
    "GCNEncoder": (lambda: graphs.GCNEncoder(3, 4, 2, num_layers=1), None),
    "HeterophilyGNN": (lambda: graphs.HeterophilyGNN(3, 4, 2, model="GT", num_layers=1, num_heads=2).eval(), None),
    "StableGCN": (lambda: graphs.StableGCN(3, 4, 2, 1), None),
    "GraphormerGD": (lambda: graphs.GraphormerGD(3, 4, num_layers=1, num_heads=2).eval(), None),
    "PolyGCL": (lambda: graphs.PolyGCL(3, 4, K=2).eval(), lambda net, x: net(x, x.flip(0), EDGES)),
    "SignNet": (lambda: graphs.SignNet(4, 4, 2, num_layers=1).eval(), encoded),
    "BasisNet": (lambda: graphs.BasisNet([1, 1, 1, 1], 4, 2).eval(), encoded),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compile(as_a_user, name):
    torch.manual_seed(0)
    make, call = NETWORKS[name]
    net, x = make(), torch.randn(4, 3, generator=rng())
    call = call or (lambda net, x: net(x, EDGES))
    want = call(net, x)
    want.sum().backward()
    slopes = {key: p.grad for key, p in net.named_parameters()}
    net.zero_grad()
    got = call(torch.compile(net, backend="eager"), x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.grad, slopes[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("generator", [None, rng()])
def test_draws_compile_for_any_size(as_a_user, generator):
    view = torch.compile(graphs.augment_graph, backend="eager", dynamic=True)
    x, edge_index = view(torch.ones(4, 3), EDGES, drop_edge=0.5, drop_feature=0.0, generator=generator)
    assert torch.equal(x, torch.ones(4, 3)) and edge_index.shape[0] == 2
    choose = torch.compile(graphs.straight_through_choice, backend="eager", dynamic=True)
    assert choose(torch.tensor([0.0, 90.0]), torch.zeros(2, dtype=torch.long), 1, generator=generator)[0] == 1
