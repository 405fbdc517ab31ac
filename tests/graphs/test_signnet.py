"""SignNet and BasisNet against brute force, and their invariances."""

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from posterity.graphs import (
    BasisNet,
    Equivariant1to1,
    Equivariant2to1,
    SignNet,
    eigenspaces,
    ign_2to1,
    laplacian_eigs,
)
from posterity.testing import check_graph_network, check_layer

PHI, RHO = ("gin", "deepsets", "mlp"), ("mlp", "sum", "transformer")
SPECIAL = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _same_weights():
    """Networks start from the same weights whichever tests ran before."""
    torch.manual_seed(0)


def edges_of(graph):
    pairs = torch.tensor(list(graph.edges), dtype=torch.long).reshape(-1, 2).T
    return torch.cat([pairs, pairs.flip(0)], 1)


def random_graph(n=9, seed=0):
    return edges_of(nx.gnp_random_graph(n, 0.4, seed=seed))


def random_orthogonal(d, generator, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0].to(dtype)


def trained(net):
    """Give a network weights, norms and statistics far from the initial ones, that let signals through."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            uniform = torch.rand(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.01 + 0.02 * uniform)
            elif name.endswith(("bias", "eps", "running_mean")):
                value.copy_(0.2 * uniform - 0.1)
            elif value.ndim == 1 and value.is_floating_point():
                value.copy_(0.5 + uniform)
            elif name.endswith("weight"):
                value.mul_(2)
    return net


class Rough(nn.Module):
    """A phi that is neither odd nor even."""

    def __init__(self, out):
        super().__init__()
        self.lin = nn.Linear(1, out)
        self.shapes = []

    def forward(self, v, edge_index, batch):
        self.shapes.append((v.shape, batch))
        return self.lin(v).sigmoid() + v


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("rho", RHO)
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_flips_change_nothing_in_training_or_not(phi, rho, norm):
    edges = random_graph()
    eigvals, eigvecs = (part.double() for part in laplacian_eigs(edges, 9, 6))
    net = trained(SignNet(6, 8, 4, phi=phi, rho=rho, norm=norm)).double()
    generator = torch.Generator().manual_seed(1)
    for mode in (True, False):
        net.train(mode)
        for _ in range(4):
            signs = torch.randint(0, 2, (6,), generator=generator) * 2.0 - 1
            got, expected = net(eigvecs * signs, eigvals, edges), net(eigvecs, eigvals, edges)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        moved = net(eigvecs.roll(1, 0), eigvals, edges)
        assert (moved - expected).abs().max() > 1e-3, "the eigenvectors do not matter"


def test_flips_change_nothing_for_modules_of_the_user():
    edges = random_graph()
    eigvals, eigvecs = laplacian_eigs(edges, 9, 6)
    batch = torch.zeros(9, dtype=torch.long)
    net = SignNet(6, 3, 4, phi=Rough(3), rho=nn.Linear(6 * 3 + 6, 4))
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1])
    flipped, plain = net(eigvecs * signs, eigvals, edges, batch), net(eigvecs, eigvals, edges, batch)
    torch.testing.assert_close(flipped, plain, **SPECIAL)
    assert [shape for shape, _ in net.phi.shapes] == [(9, 12, 1)] * 2
    assert net.phi.shapes[0][1] is batch
    both = net.phi.lin(eigvecs[..., None]).sigmoid() + net.phi.lin(-eigvecs[..., None]).sigmoid()
    torch.testing.assert_close(plain, net.rho(torch.cat([both.flatten(1), eigvals.expand(9, 6)], 1)))
    bare = SignNet(6, 3, 4, phi=Rough(3), rho=nn.Linear(6 * 3, 4), use_eigvals=False)
    assert bare(eigvecs, eigvals, edges).shape == (9, 4)


def naive_phi(net, v, A):
    """The built-in phi on one eigenvector by dense matrices, without norm."""
    phi, h = net.phi, v[:, None]
    for i, layer in enumerate(phi.layers):
        if phi.kind == "gin":
            z = layer((1 + phi.eps[i]) * h + A @ h).relu()
            h = z + h if i else z
        else:
            h = layer(h) + (phi.means[i](h.mean(0)) if phi.kind == "deepsets" else 0)
            h = h.relu() if i < 2 else h
    return h


@pytest.mark.parametrize("phi", PHI)
def test_signnet_is_its_formula_by_brute_force(phi):
    """On a directed graph with a repeated edge, so that sender and receiver are told apart."""
    edges = torch.tensor([[0, 1, 2, 2, 3, 4, 4], [1, 2, 0, 3, 4, 0, 0]])
    A = torch.zeros(6, 6, dtype=torch.float64)
    A.index_put_((edges[1], edges[0]), torch.ones(7, dtype=torch.float64), accumulate=True)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    eigvals = torch.rand(3, generator=generator, dtype=torch.float64)
    for rho in ("mlp", "sum"):
        net = trained(SignNet(3, 5, 2, phi=phi, norm=None, rho=rho, rho_layers=3)).double()
        z = [naive_phi(net, v[:, i], A) + naive_phi(net, -v[:, i], A) for i in range(3)]
        if rho == "mlp":
            expected = net.rho(torch.cat([*z, eigvals.expand(6, 3)], 1))
        else:
            expected = net.rho.mlp(sum(z) + sum(net.rho.embed(lam[None]) for lam in eigvals))
        got = net(v, eigvals, edges)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            *(torch.autograd.grad(out.square().sum(), [v, *net.parameters()]) for out in (got, expected)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        assert len([m for m in net.rho.modules() if isinstance(m, nn.Linear)]) == 3 + 2 * (rho == "sum")


def test_batch_norm_sees_both_signs_of_every_node_at_once():
    edges = random_graph()
    eigvals, eigvecs = laplacian_eigs(edges, 9, 4)
    net = SignNet(4, 8, 3, phi="mlp", num_layers=2)
    net(eigvecs, eigvals, edges)
    h = net.phi.layers[0](torch.cat([eigvecs, -eigvecs], 1).reshape(-1, 1)).relu()
    torch.testing.assert_close(net.phi.norms[0].running_mean, 0.1 * h.mean(0))
    torch.testing.assert_close(net.phi.norms[0].running_var, 0.9 + 0.1 * h.var(0))


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("rho", RHO)
@pytest.mark.parametrize("shared_eigvals", [True, False])
def test_a_batch_is_its_graphs_one_by_one(phi, rho, shared_eigvals):
    net = trained(SignNet(4, 8, 3, phi=phi, rho=rho)).eval()
    parts = []
    for n, seed in ((7, 1), (5, 2)):
        edges = random_graph(n, seed)
        parts.append((*laplacian_eigs(edges, n, 4), edges))
    if shared_eigvals:
        parts = [(parts[0][0], v, e) for _, v, e in parts]
    alone = torch.cat([net(v, w, e) for w, v, e in parts])
    eigvals = parts[0][0] if shared_eigvals else torch.stack([w for w, _, _ in parts])
    got = net(
        torch.cat([v for _, v, _ in parts]), eigvals,
        torch.cat([parts[0][2], parts[1][2] + 7], 1), torch.tensor([0] * 7 + [1] * 5),
    )  # fmt: skip
    torch.testing.assert_close(got, alone, **SPECIAL)


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("rho", ["sum", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(phi, rho, training):
    n, k = 5, 8
    edges = random_graph(n, 4)
    eigvals, eigvecs = laplacian_eigs(edges, n)
    exact, padded = SignNet(n, 8, 3, phi=phi, rho=rho), SignNet(k, 8, 3, phi=phi, rho=rho)
    trained(exact).train(training)
    padded.load_state_dict(exact.state_dict())
    padded.train(training)
    rest = torch.randn(k - n, generator=torch.Generator().manual_seed(0))
    got = padded(
        torch.cat([eigvecs, rest.expand(n, -1)], 1), torch.cat([eigvals, rest]),
        edges, mask=torch.arange(k) < n,
    )  # fmt: skip
    torch.testing.assert_close(got, exact(eigvecs, eigvals, edges), **SPECIAL)
    for (name, a), b in zip(exact.named_buffers(), padded.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}", **SPECIAL)


def test_what_is_masked_does_not_reach_a_flat_rho():
    edges = random_graph(5, 4)
    net = SignNet(6, 8, 3)
    mask = torch.tensor([True] * 4 + [False] * 2)
    v, w = torch.randn(5, 6), torch.rand(6)
    other_v, other_w = torch.where(mask, v, torch.randn(5, 6)), torch.where(mask, w, 9.0)
    torch.testing.assert_close(net(v, w, edges, mask=mask), net(other_v, other_w, edges, mask=mask))


def test_eigenvalues_count_only_where_they_are_asked_for():
    edges = random_graph()
    eigvals, eigvecs = laplacian_eigs(edges, 9, 4)
    for rho in RHO:
        for use in (True, False):
            net = SignNet(4, 8, 3, rho=rho, use_eigvals=use)
            changed = not torch.allclose(net(eigvecs, eigvals, edges), net(eigvecs, eigvals + 1, edges))
            assert changed == use


def test_signnet_is_not_invariant_to_a_basis_where_basisnet_is():
    edges = edges_of(nx.cycle_graph(8))
    eigvals, eigvecs = laplacian_eigs(edges, 8)
    turned = rotate(eigvecs, eigvals, torch.Generator().manual_seed(0))
    net = SignNet(8, 16, 4).eval()
    assert (net(turned, eigvals, edges) - net(eigvecs, eigvals, edges)).abs().max() > 1e-3


def test_dropout_leaves_training_even_in_the_eigenvectors():
    edges = random_graph()
    eigvals, eigvecs = laplacian_eigs(edges, 9, 4)
    for rho in RHO:
        net, outs = SignNet(4, 8, 3, rho=rho, dropout=0.5), []
        for sign in (1, -1):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                outs.append(net(sign * eigvecs, eigvals, edges))
        torch.testing.assert_close(outs[0], outs[1], **SPECIAL)
        assert not torch.allclose(outs[0], net(eigvecs, eigvals, edges))


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("rho", RHO)
def test_signnet_conforms_to_its_kind(as_a_user, phi, rho):
    edges = random_graph()
    eigvals, eigvecs = laplacian_eigs(edges, 9, 4)
    check_layer(trained(SignNet(4, 8, 3, phi=phi, rho=rho)), eigvecs, eigvals, edges, shape=(9, 3))


class OnFeatures(nn.Module):
    """SignNet as a graph network of its eigenvectors alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, edge_index, batch=None):
        return self.net(x, x.new_zeros(x.shape[1]), edge_index, batch)


def test_signnet_conforms_to_graph_networks(as_a_user):
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    check_graph_network(OnFeatures(trained(SignNet(4, 8, 3))), x, random_graph(7, 1))


# ---- BasisNet


def rotate(eigvecs, eigvals, generator):
    group = eigenspaces(eigvals)
    parts = [eigvecs[:, group == j] for j in range(int(group.max()) + 1)]
    return torch.cat([p @ random_orthogonal(p.shape[1], generator, p.dtype) for p in parts], 1)


def spectrum(graph, dtype=torch.float32):
    eigvals, eigvecs = laplacian_eigs(edges_of(graph), len(graph))
    return eigvals.to(dtype), eigvecs.to(dtype), torch.bincount(eigenspaces(eigvals)).tolist()


GRAPHS = {
    "star": nx.star_graph(6), "grid": nx.convert_node_labels_to_integers(nx.grid_2d_graph(4, 4)),
    "lollipop": nx.lollipop_graph(5, 4), "cycle": nx.cycle_graph(9),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_rotating_every_basis_changes_nothing(name, shared, training):
    """In float64, where rounding is far below what distinguishes nodes.

    All nodes of a cycle look alike, so there is no variance to divide by, and each of three
    norms blows rounding up by eps^(-1/2) = 300.
    """
    eigvals, eigvecs, sizes = spectrum(GRAPHS[name], torch.float64)
    eigvecs = torch.linalg.qr(eigvecs)[0]
    assert max(sizes) > 1
    net = trained(BasisNet(sizes, 8, 4, shared=shared)).double().train(training)
    turned = rotate(eigvecs, eigvals, torch.Generator().manual_seed(2))
    assert (turned - eigvecs).abs().max() > 0.1
    out = net(eigvecs, eigvals)
    torch.testing.assert_close(net(turned, eigvals), out, rtol=0, atol=1e-8)
    if name != "cycle":
        assert out.std(0).max() > 1e-5, "the nodes look alike"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("use_eigvals", [True, False])
def test_basisnet_is_its_formula_on_dense_projectors(shared, use_eigvals):
    """A lollipop has eigenspaces of dimensions 1 and more that do not come in order."""
    eigvals, eigvecs, sizes = spectrum(nx.lollipop_graph(5, 4), torch.float64)
    assert sizes != sorted(sizes)
    net = trained(BasisNet(sizes, 6, 3, shared=shared, use_eigvals=use_eigvals)).double()
    for training in (False, True):
        net.train(training)
        starts = np.cumsum([0, *sizes])
        V = [eigvecs[:, starts[j] : starts[j + 1]] for j in range(len(sizes))]
        P = torch.stack([v @ v.T for v in V])[:, None]

        def phi(trunk, p):
            h = trunk.norms[0](trunk.first(p).relu())
            for i in range(2):
                h = trunk.norms[i + 1](trunk.layers[i](h).relu())
            a, b = trunk.inner, trunk.outer
            weigh = lambda lin, x: torch.einsum("oi,bin->bon", lin.weight, x) + lin.bias[:, None]  # noqa: E731
            return weigh(b, weigh(a, h).relu()).movedim(1, 2)  # (b, n, out)

        columns = [None] * len(sizes)
        if shared:
            for j, h in enumerate(phi(net.trunk, P)):
                columns[j] = net.heads[net.dims.index(sizes[j])](h)
        else:
            for d, trunk in zip(net.dims, net.heads, strict=True):
                members = [j for j, e in enumerate(sizes) if e == d]
                for j, h in zip(members, phi(trunk, P[members]), strict=True):
                    columns[j] = h
        assert [c.shape[1] for c in columns] == sizes
        z = torch.cat(columns + [eigvals.expand(9, 9)] * use_eigvals, 1)
        expected = net.rho(z)
        torch.testing.assert_close(net(eigvecs, eigvals), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_relabelling_the_nodes_relabels_the_output(shared):
    graph = nx.lollipop_graph(5, 4)
    eigvals, eigvecs, sizes = spectrum(graph)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    net = BasisNet(sizes, 8, 4, shared=shared)
    out = net(eigvecs, eigvals)
    torch.testing.assert_close(net(eigvecs[order], eigvals), out[order], **SPECIAL)
    assert (out[order] - out).abs().max() > 1e-3


def test_symmetric_nodes_get_equal_outputs():
    """No network of this kind can tell the two ends of a path apart."""
    edges = edges_of(nx.path_graph(6))
    eigvals, eigvecs = laplacian_eigs(edges, 6)
    outs = [SignNet(6, 8, 4, phi=phi, rho=rho)(eigvecs, eigvals, edges) for phi in PHI for rho in RHO]
    outs += [BasisNet([1] * 6, 8, 4, shared=shared)(eigvecs, eigvals) for shared in (True, False)]
    for out in outs:
        torch.testing.assert_close(out, out.flip(0), rtol=1e-4, atol=1e-4)
        assert (out[0] - out[2]).abs().max() > 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_basisnet_conforms_to_its_kind(as_a_user, shared):
    eigvals, eigvecs, sizes = spectrum(nx.lollipop_graph(5, 4))
    check_layer(trained(BasisNet(sizes, 12, 4, shared=shared)), eigvecs, eigvals, shape=(9, 4))


# ---- equivariant layers


def test_the_five_maps_are_those_by_hand_and_follow_the_nodes():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    ops, a = ign_2to1(p), p.numpy()
    ones = np.ones(5)
    expected = np.stack(
        [
            np.einsum("bcii->bci", a),
            np.einsum("bcii,j->bcj", a, ones) / 5,
            np.einsum("bcij->bci", a) / 5,
            np.einsum("bcij->bcj", a) / 5,
            np.einsum("bcij,k->bck", a, ones) / 25,
        ],
        2,
    )
    np.testing.assert_allclose(ops.numpy(), expected, atol=1e-12)
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(ign_2to1(p[..., order, :][..., order]), ops[..., order])


def test_of_a_projector_the_maps_have_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    eigvals = torch.tensor([0.0, 0.0, 0.4, 1.0, 1.0, 1.0], dtype=torch.float64)
    V = random_orthogonal(7, generator, torch.float64)[:, :6]
    parts = V[:, :2], V[:, 2:3], V[:, 3:]
    net = BasisNet([2, 1, 3], 4, 2).double()
    got = net._operations(V)
    torch.testing.assert_close(got, ign_2to1(torch.stack([v @ v.T for v in parts])[:, None]))
    for ops, v in zip(got[:, 0], parts, strict=True):
        s = v.sum(0)
        n, one = 7, torch.ones(7, dtype=torch.float64)
        closed = [(v * v).sum(1), v.shape[1] / n * one, v @ s / n, v @ s / n, s @ s / n**2 * one]
        torch.testing.assert_close(ops, torch.stack(closed))
    assert net(V, eigvals).shape == (7, 2)


def test_layers_mix_the_maps_by_their_coefficients():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 3, 5, 5, generator=generator)
    layer = trained(Equivariant2to1(3, 4))
    expected = torch.einsum("bcsn,cos->bon", ign_2to1(p), layer.coeffs) + layer.bias
    torch.testing.assert_close(layer(p), expected)
    x = torch.randn(2, 3, 5, generator=generator)
    one = trained(Equivariant1to1(3, 4))
    ops = torch.stack([x, x.mean(2, keepdim=True).expand_as(x)], 2)
    torch.testing.assert_close(one(x), torch.einsum("bcsn,cos->bon", ops, one.coeffs) + one.bias)
    assert layer.coeffs.shape == (3, 4, 5) and one.coeffs.shape == (3, 4, 2)
    assert layer.bias.shape == one.bias.shape == (1, 4, 1)


@pytest.mark.parametrize("make", [Equivariant2to1, Equivariant1to1])
def test_initial_coefficients_have_the_papers_spread(make):
    layer = make(60, 140)
    assert (layer.bias == 0).all()
    assert abs(float(layer.coeffs.detach().std()) / (2**0.5 / 200) - 1) < 0.03


def test_equivariant_layers_conform_to_their_kind(as_a_user):
    check_layer(Equivariant2to1(3, 4), torch.randn(2, 3, 5, 5), shape=(2, 4, 5))
    check_layer(Equivariant1to1(3, 4), torch.randn(2, 3, 5), shape=(2, 4, 5))


# ---- bad input

PATH = edges_of(nx.path_graph(3))
W, V3 = laplacian_eigs(PATH, 3)
ZERO = torch.zeros(3, dtype=torch.long)


def nan(v):
    v = v.clone()
    v[1, 1] = float("nan")
    return v


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SignNet(0, 8, 4), "k must be an integer of at least 1, got 0"),
        (lambda: SignNet(3, 0, 4), "hidden_channels must be"),
        (lambda: SignNet(3, 8, 0), "out_channels must be"),
        (lambda: SignNet(3, 8, 4, num_layers=0), "num_layers must be"),
        (lambda: SignNet(3, 8, 4, rho_layers=0), "rho_layers must be"),
        (lambda: SignNet(3, 8, 4, phi="gat"), "phi must be one of 'gin', 'deepsets', 'mlp', got 'gat'"),
        (lambda: SignNet(3, 8, 4, rho="max"), "rho must be one of 'mlp', 'sum', 'transformer', got 'max'"),
        (lambda: SignNet(3, 8, 4, norm="group"), "norm must be one of"),
        (lambda: SignNet(3, 8, 4, dropout=1.0), "dropout must be in"),
        (lambda: SignNet(3, 6, 4, rho="transformer"), "hidden_channels must be divisible by num_heads, got 6 and 4"),
        (lambda: SignNet(4, 8, 4)(V3, W, PATH), r"eigvecs must have shape \(any, 4\) for this network, got \(3, 3\)"),
        (lambda: SignNet(3, 8, 4)(V3.long(), W, PATH), "eigvecs must be a floating-point tensor"),
        (lambda: SignNet(3, 8, 4)(V3[0], W, PATH), r"eigvecs must have shape \(any, 3\)"),
        (lambda: SignNet(3, 8, 4)(V3, W[:2], PATH), r"eigvals must have shape \(3\) or \(graphs, 3\) for eigvecs, got \(2,\)"),
        (lambda: SignNet(3, 8, 4)(V3, W.expand(2, 3), PATH), "eigvals must have one row where batch is not given, got 2"),
        (lambda: SignNet(3, 8, 4)(nan(V3), W, PATH), "eigvecs must be finite, got NaN"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH.T), r"edge_index must have shape \(2, any\), got \(4, 2\)"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH - 1), r"edge_index must name nodes in 0\.\.2, got -1"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH, torch.tensor([0, 1, 0])), "batch must be sorted"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH, ZERO[:2]), r"batch must have shape \(3\) for eigvecs"),
        (lambda: SignNet(3, 8, 4)(V3, W[None], PATH, ZERO + 1), r"batch must name graphs in 0\.\.0 of eigvals, got 1"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH, torch.zeros(3)), "batch must hold integers"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH, ZERO - 1), "batch must not be negative, got -1"),
        (lambda: SignNet(3, 8, 4)(V3, W, PATH, mask=torch.ones(2).bool()), r"mask must have shape \(3\) for eigvals"),
        (lambda: SignNet(3, 8, 4, phi=Rough(5))(V3, W, PATH), r"phi\(v, edge_index, batch\) must have shape \(3, 6, 8\)"),
        (lambda: SignNet(3, 8, 4, rho=nn.Linear(27, 5))(V3, W, PATH), r"rho must have shape \(3, 4\)"),
        (lambda: BasisNet([], 8, 4), "multiplicities must name at least one eigenspace"),
        (lambda: BasisNet([1, 0], 8, 4), "multiplicities must be an integer of at least 1, got 0"),
        (lambda: BasisNet([1, 2], 0, 4), "hidden_channels must be"),
        (lambda: BasisNet([1, 2], 8, 4)(V3, W), r"multiplicities must be those of eigvals, \[1, 1, 1\], got \[1, 2\]"),
        (lambda: BasisNet([1, 1], 8, 4)(V3, W[:2]), r"eigvecs must have shape \(any, 2\)"),
        (lambda: BasisNet([1] * 3, 8, 4)(V3, W[:2]), r"eigvals must have shape \(3\) for the multiplicities, got \(2,\)"),
        (lambda: BasisNet([1] * 3, 8, 4)(nan(V3), W), "eigvecs must be finite"),
        (lambda: ign_2to1(torch.ones(1, 1, 2, 3)), r"p must have shape"),
        (lambda: ign_2to1(torch.ones(1, 2, 2)), r"p must have shape"),
        (lambda: Equivariant2to1(0, 3), "in_channels must be"),
        (lambda: Equivariant1to1(3, 0), "out_channels must be"),
        (lambda: Equivariant2to1(2, 3)(torch.ones(1, 1, 3, 3)), r"p must have shape \(any, 2, any, any\)"),
        (lambda: Equivariant1to1(2, 3)(torch.ones(1, 1, 3)), r"x must have shape \(any, 2, any\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
