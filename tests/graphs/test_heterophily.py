"""Networks against dense formulas, and features against PyG and networkx."""

import networkx as nx
import pytest
import torch
from torch.nn import functional as F

from posterity.graphs import HeterophilyGNN, adjacency_features, heterophily, sgc_features
from posterity.testing import check_graph_network

MODELS = ["ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def both_ways(edges):
    return torch.cat([edges, edges.flip(0)], 1)


def dense(model, x, edges, heads):
    """Return a network's output from adjacency matrices, without residual blocks' code."""
    n = len(x)
    count = x.new_zeros(n, n)
    for u, v in edges.T.tolist():
        if u != v:
            count[v, u] += 1
    if model.model in ("GCN", "GAT", "GT"):
        count = count + torch.eye(n, dtype=x.dtype)

    def softmax(scores):  # (n, n), receiver by sender
        weight = count * (scores - scores.max()).exp()
        return weight / weight.sum(1, keepdim=True).clamp_min(1e-300)

    def feed_forward(m, x):
        return m.linear_2(F.gelu(m.linear_1(x)))

    def apply(m, x):
        if hasattr(m, "attn_query"):
            q, k, v = (part(x).view(n, heads, -1) for part in (m.attn_query, m.attn_key, m.attn_value))
            scores = torch.einsum("uhd,vhd->hvu", q, k) / q.shape[2] ** 0.5
            message = torch.stack([softmax(s) @ v[:, h] for h, s in enumerate(scores)], 1).reshape(n, -1)
            return m.output_linear(torch.cat([x, message], 1) if model.model == "GT-sep" else message)
        if hasattr(m, "attn_linear_u"):
            z = m.input_linear(x)
            u, v, split = m.attn_linear_u(z), m.attn_linear_v(z), z.view(n, -1, heads)
            message = [
                softmax(F.leaky_relu(u[None, :, h] + v[:, None, h], 0.2)) @ split[:, :, h]
                for h in range(heads)
            ]
            message = torch.stack(message, 2).reshape(n, -1)
            both = torch.cat([z, message], 1) if model.model == "GAT-sep" else message
            return feed_forward(m.feed_forward_module, both)
        if model.model == "GCN":
            scale = count.sum(1).rsqrt()
            return feed_forward(m.feed_forward_module, (scale[:, None] * count * scale) @ x)
        if model.model == "SAGE":
            mean = count / count.sum(1, keepdim=True).clamp_min(1)
            return feed_forward(m.feed_forward_module, torch.cat([x, mean @ x], 1))
        return feed_forward(m, x)

    x = F.gelu(model.input_linear(x))
    for block in model.residual_modules:
        inside = block.normalization(x)
        x = x + (
            feed_forward(block.module, inside)
            if hasattr(block.module, "linear_1")
            else apply(block.module, inside)
        )
    return model.output_linear(model.output_normalization(x))


@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("model", MODELS)
def test_networks_are_their_dense_formulas_in_value_and_gradients(model, norm):
    edges = torch.randint(9, (2, 30), generator=seeded(4))
    edges[:, :2] = 3  # self-loops
    edges = edges[:, edges[1] != 8]  # a node that nothing is sent to
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    net = HeterophilyGNN(
        3, 12, 2, model=model, num_layers=2, hidden_multiplier=1.5, num_heads=4, norm=norm, dropout=0.0
    ).double()
    results = []
    for out in (
        net(a := x.clone().requires_grad_(), edges),
        dense(net, b := x.clone().requires_grad_(), edges, 4),
    ):
        inputs = [a if out is not None and not results else b, *net.parameters()]
        loss = (out * torch.arange(18.0, dtype=torch.float64).view(9, 2)).sum()
        results.append([out, *torch.autograd.grad(loss, inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_a_node_without_senders_gets_no_message():
    net = HeterophilyGNN(3, 8, 2, dropout=0.0).double()
    x = torch.randn(2, 3, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(dense(net, x[:1], torch.zeros(2, 0), 1), net(x, torch.tensor([[0], [1]]))[:1])


def test_a_gcn_is_a_feed_forward_network_where_all_neighbours_look_alike():
    edges = both_ways(torch.tensor(list(nx.random_regular_graph(4, 10, seed=0).edges)).T)
    gcn, plain = (HeterophilyGNN(3, 16, 2, model=model, dropout=0.0).double() for model in ("GCN", "ResNet"))
    weights = gcn.state_dict()
    plain.load_state_dict(
        {name.replace("feed_forward_module.", ""): value for name, value in weights.items()}
    )
    x = torch.randn(1, 3, generator=seeded(), dtype=torch.float64).expand(10, 3)
    torch.testing.assert_close(gcn(x, edges), plain(x, edges))


@pytest.mark.parametrize("model", MODELS)
def test_self_loops_of_the_input_do_not_count(model):
    edges = torch.randint(9, (2, 30), generator=seeded(4))
    net = HeterophilyGNN(3, 16, 2, model=model).double().eval()
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    looped = torch.cat([edges, torch.arange(9).expand(2, 9), torch.arange(4).expand(2, 4)], 1)
    torch.testing.assert_close(net(x, looped), net(x, edges))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("model", MODELS[1:])
def test_conforms_to_its_kind(as_a_user, model, norm):
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2], [1, 4]]).T
    net = HeterophilyGNN(3, 16, 2, model=model, norm=norm)
    check_graph_network(net, torch.randn(5, 3, generator=seeded()), both_ways(edges))


FEED = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
DEEP = [f"feed_forward_module.{name}" for name in FEED]
GAT = [
    "input_linear.weight",
    "input_linear.bias",
    "attn_linear_u.weight",
    "attn_linear_u.bias",
    "attn_linear_v.weight",
    *DEEP,
]
GT = [
    f"{part}.{kind}"
    for part in ("attn_query", "attn_key", "attn_value", "output_linear")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        ("ResNet", [FEED]), ("GCN", [DEEP]), ("SAGE", [DEEP]), ("GAT", [GAT]), ("GAT-sep", [GAT]),
        ("GT", [GT, FEED]), ("GT-sep", [GT, FEED]),
    ],
)  # fmt: skip
def test_weights_are_named_as_the_published_ones(model, blocks):
    ends = ("weight", "bias")
    names = {
        f"{part}.{end}" for part in ("input_linear", "output_normalization", "output_linear") for end in ends
    }
    for i, block in enumerate(blocks * 2):
        names |= {f"residual_modules.{i}.normalization.{end}" for end in ends}
        names |= {f"residual_modules.{i}.module.{name}" for name in block}
    assert set(HeterophilyGNN(3, 16, 2, model=model, num_layers=2).state_dict()) == names


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_attention_weights_of_each_receiver_sum_to_1(scale):
    edges = torch.randint(9, (2, 40), generator=seeded(4))
    has_sender = torch.zeros(9).index_fill(0, edges[1, edges[0] != edges[1]], 1.0)
    graph = HeterophilyGNN(3, 8, 2, model="GAT-sep", num_heads=2)._graph(edges, 9, torch.float32)
    scores = (scale * torch.randn(len(graph.sender), generator=seeded())).requires_grad_()
    total = heterophily._attend(scores, torch.ones(18, 1), graph)[:, 0]
    torch.testing.assert_close(total, has_sender.repeat(2))
    (grad,) = torch.autograd.grad(total.sum(), scores)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_sgc_features_are_pygs_and_differentiable():
    nn_ = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor(list(nx.gnp_random_graph(9, 0.3, seed=1, directed=True).edges)).T
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    peer = nn_.SGConv(3, 3, K=4, bias=False).double()
    with torch.no_grad():
        peer.lin.weight.copy_(torch.eye(3))
    torch.testing.assert_close(sgc_features(x, edges, num_props=4), peer(x, edges))
    assert torch.autograd.gradcheck(lambda x: sgc_features(x, edges), x)


def test_adjacency_features_have_the_sender_as_row_and_no_loops():
    graph = nx.gnp_random_graph(9, 0.3, seed=1, directed=True)
    graph.add_edges_from([(2, 2), (0, 5)])
    edges = torch.tensor(list(graph.edges)).T
    graph.remove_edge(2, 2)
    expected = torch.from_numpy(nx.to_numpy_array(graph, nodelist=range(9))).float()
    assert torch.equal(adjacency_features(torch.cat([edges, edges], 1), 9), expected)


EDGES, X = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HeterophilyGNN(3, 12, 2, model="GAT"), "hidden_channels must be a multiple of num_heads, got 12 and 8"),
        (lambda: HeterophilyGNN(3, 12, 2, model="MLP"), "model must be one of 'ResNet', .*got 'MLP'"),
        (lambda: HeterophilyGNN(3, 8, 2, norm="group"), "norm must be one of 'layer', 'batch', None, got 'group'"),
        (lambda: HeterophilyGNN(0, 8, 2), "in_channels must be"), (lambda: HeterophilyGNN(3, 0, 2), "hidden_channels must be"),
        (lambda: HeterophilyGNN(3, 8, 0), "out_channels must be"), (lambda: HeterophilyGNN(3, 8, 2, num_layers=0), "num_layers must be"),
        (lambda: HeterophilyGNN(3, 8, 2, hidden_multiplier=0.1), "hidden_multiplier must be at least 0.125, got 0.1"),
        (lambda: HeterophilyGNN(3, 8, 2, model="GT", num_heads=0), "num_heads must be"), (lambda: HeterophilyGNN(3, 8, 2, dropout=1.0), "dropout must be"),
        (lambda: HeterophilyGNN(4, 8, 2)(X, EDGES), r"x must have shape \(any, 4\) for this network, got \(4, 3\)"),
        (lambda: HeterophilyGNN(3, 8, 2)(X, EDGES + 1), r"edge_index must name nodes in 0\.\.3 of x, got 4"),
        (lambda: HeterophilyGNN(3, 8, 2)(X.long(), EDGES), "x must be a floating-point tensor"),
        (lambda: sgc_features(X, EDGES, num_props=0), "num_props must be"), (lambda: sgc_features(X[0], EDGES), "x must have shape"),
        (lambda: sgc_features(X, EDGES + 1), "edge_index must name nodes"), (lambda: adjacency_features(EDGES, 3), "edge_index must name nodes"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
