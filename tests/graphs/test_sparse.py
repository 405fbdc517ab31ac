"""Products along edges against dense matrices, and their gradients against finite differences."""

import pytest
import torch

from posterity.graphs._sparse import (
    Adjacency,
    SparseMatrix,
    add_self_loops,
    copies,
    edge_dots,
    edge_pattern,
    gcn_adjacency,
    normalised,
    one_self_loop,
    sparse_product,
)

N = 6
EDGES = torch.tensor([[3, 0, 1, 4, 1, 2, 2, 3], [1, 1, 0, 4, 3, 2, 4, 1]])  # repeats, loops, 5 is alone
NONE = EDGES[:, :0]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(edges, weight, n=N):
    matrix = torch.zeros(n, n, dtype=weight.dtype)
    return matrix.index_put((edges[1], edges[0]), weight, accumulate=True)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("edges", [EDGES, NONE])
def test_a_product_is_that_of_the_dense_matrix_in_value_and_gradients(edges, sort):
    pattern = edge_pattern(*edges, N, sort=sort)
    ends = torch.stack([pattern.sender, pattern.receiver])
    if not sort:
        assert torch.equal(ends, edges)
    weight, x = normal(edges.shape[1], seed=1).requires_grad_(), normal(N, 3).requires_grad_()
    adjacency = Adjacency(pattern, weight)
    torch.testing.assert_close(adjacency.matrix.to_dense(), dense(ends, weight.detach()))
    torch.testing.assert_close(adjacency.transposed.to_dense(), dense(ends, weight.detach()).T)
    torch.testing.assert_close(sparse_product(adjacency, x), dense(ends, weight) @ x)
    assert torch.autograd.gradcheck(lambda w, x: sparse_product(Adjacency(pattern, w), x), (weight, x))
    q, k = normal(N, 3, seed=2).requires_grad_(), normal(N, 3, seed=3).requires_grad_()
    torch.testing.assert_close(edge_dots(pattern, q, k), (q[ends[0]] * k[ends[1]]).sum(1))
    assert torch.autograd.gradcheck(lambda q, k: edge_dots(pattern, q, k), (q, k))


def test_a_constant_matrix_needs_not_be_square():
    matrix = normal(4, 7) * (normal(4, 7, seed=1) > 0)
    x = normal(7, 2, seed=2).requires_grad_()
    sparse = SparseMatrix(matrix.to_sparse_csr())
    torch.testing.assert_close(sparse_product(sparse, x), matrix @ x)
    assert torch.autograd.gradcheck(lambda x: sparse_product(sparse, x), x)


def test_copies_stand_side_by_side():
    one = edge_pattern(*EDGES, N, sort=True)
    three, weight, x = copies(one, 3), normal(24, seed=1).requires_grad_(), normal(18, 2).requires_grad_()
    parts = [
        sparse_product(Adjacency(one, w), part) for w, part in zip(weight.split(8), x.split(N), strict=True)
    ]
    whole = sparse_product(Adjacency(three, weight), x)
    torch.testing.assert_close(whole, torch.cat(parts))
    grads = [torch.autograd.grad(out.square().sum(), (weight, x)) for out in (whole, torch.cat(parts))]
    torch.testing.assert_close(*grads)


def test_a_matrix_stays_when_the_callers_weights_change_in_place():
    weight, x = torch.ones(8), normal(N, 2).float().requires_grad_()
    adjacency = Adjacency(edge_pattern(*EDGES, N), weight)
    out = sparse_product(adjacency, x)
    weight.mul_(2)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, dense(EDGES, torch.ones(8)).sum(0)[:, None].expand(N, 2))


def test_self_loops_are_added_where_they_are_missing_or_made_one_a_node():
    weight = torch.arange(1.0, 9.0)
    sender, receiver, more, present = add_self_loops(*EDGES, weight, N)
    assert torch.equal(present[:8], torch.ones(8, dtype=torch.bool))
    assert present[8:].tolist() == [True, True, False, True, False, True]
    expected = dense(EDGES, weight) + torch.tensor([1.0, 1, 0, 1, 0, 1]).diag()
    torch.testing.assert_close(dense(torch.stack([sender, receiver]), more), expected)
    once = one_self_loop(EDGES, N)
    off = dense(EDGES, torch.ones(8))
    torch.testing.assert_close(dense(once, torch.ones(12)), off - off.diag().diag() + torch.eye(N))


@pytest.mark.parametrize("symmetric", [True, False])
def test_normalised_weights_are_those_of_the_dense_formula(symmetric):
    weight = normal(8, seed=4).abs().requires_grad_()
    matrix = dense(EDGES, weight)
    degree = matrix.sum(1)
    scale = torch.where(degree > 0, degree.clamp_min(1e-9), 1.0)
    row, column = scale.rsqrt()[:, None], torch.where(degree > 0, scale.rsqrt(), 0.0)
    expected = row * matrix * column if symmetric else matrix / scale[:, None]
    got = dense(EDGES, normalised(*EDGES, weight, N, symmetric=symmetric))
    torch.testing.assert_close(got, expected)
    probe = normal(N, N, seed=5)
    torch.testing.assert_close(
        *(torch.autograd.grad((out * probe).sum(), weight)[0] for out in (got, expected))
    )


def test_the_matrix_of_a_gcn_is_its_formula():
    A = dense(EDGES, torch.ones(8, dtype=torch.float64)).fill_diagonal_(1)
    scale = A.sum(1).rsqrt()
    got = gcn_adjacency(EDGES, N, torch.float64)
    torch.testing.assert_close(got.matrix.to_dense(), scale[:, None] * A * scale)
