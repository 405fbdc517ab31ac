"""Tangent kernels against finite differences, linear models and wide networks."""

import copy
import math

import pytest
import torch
from torch import nn

from posterity.robustness import empirical_ntk, relu_ntk
from posterity.robustness.tangent_kernel import Tangent


def net(*layers, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[make() for make in layers]).double()


def small():
    return net(lambda: nn.Linear(3, 9), nn.Tanh, lambda: nn.Linear(9, 1))  # 46 parameters


def convolutional():
    return net(
        lambda: nn.Conv2d(2, 3, 3), lambda: nn.BatchNorm2d(3), nn.SiLU, nn.Flatten, lambda: nn.Linear(12, 1)
    )


def flat(n_in=16, seed=0):
    return net(nn.Flatten, lambda: nn.Linear(n_in, 12), nn.Tanh, lambda: nn.Linear(12, 1), seed=seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_empirical_kernel_is_the_gram_matrix_of_finite_differences():
    model, x = small(), draw(6, 3)
    columns = []
    for parameter in model.parameters():
        for k in range(parameter.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = copy.deepcopy(model)
                dict(zip(model.parameters(), moved.parameters(), strict=True))[parameter].data.view(-1)[
                    k
                ] += step
                ends.append(moved(x)[:, 0])
            columns.append((ends[0] - ends[1]).detach() / 2e-5)
    jacobian = torch.stack(columns, 1)
    got = empirical_ntk(model, x, x[:4])
    torch.testing.assert_close(got, jacobian @ jacobian[:4].T, rtol=1e-7, atol=1e-7)


def test_the_empirical_kernel_is_symmetric_positive_and_the_same_in_chunks():
    model, x = convolutional().train(), draw(7, 2, 4, 4)
    whole = empirical_ntk(model, x, x)
    torch.testing.assert_close(whole, whole.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(whole).min() > -1e-9
    for size in (1, 3):
        torch.testing.assert_close(empirical_ntk(model, x, x, chunk_size=size), whole)
        torch.testing.assert_close(empirical_ntk(model, x[:2], x, chunk_size=size), whole[:2])
    assert model.training and int(model[1].num_batches_tracked) == 0


def test_of_a_linear_model_it_is_the_inner_product_and_one_for_the_bias():
    x = draw(5, 4)
    torch.testing.assert_close(empirical_ntk(nn.Linear(4, 1).double(), x, x), x @ x.T + 1)
    frozen = nn.Linear(4, 1).double()
    frozen.weight.requires_grad_(False)
    torch.testing.assert_close(empirical_ntk(frozen, x, x), torch.ones(5, 5).double())


@pytest.mark.parametrize("same", [False, True])
def test_gradients_of_kernels_are_those_of_finite_differences(same):
    x1, x2 = draw(3, 2, 4, 4).requires_grad_(), draw(2, 2, 4, 4, seed=1).requires_grad_()
    model, given = convolutional(), (x1,) if same else (x1, x2)
    for kernel in (lambda a, b: empirical_ntk(model, a, b, chunk_size=2), relu_ntk):
        assert torch.autograd.gradcheck(lambda *x: kernel(x[0], x[-1]), given, fast_mode=True)  # noqa: B023


def test_remembered_gradients_of_the_data_change_nothing():
    model, data, p = convolutional(), draw(6, 2, 4, 4), draw(2, 2, 4, 4, seed=1).requires_grad_()
    tangent = Tangent(model, torch.float64)
    kept = tangent.keep(data)
    assert tangent.kept is not None
    weights = draw(2, 6, seed=2)
    slopes = []
    for kernel, x in ((tangent, kept), (lambda a, b: empirical_ntk(model, a, b), data)):
        k = kernel(p, x)
        slopes.append(torch.autograd.grad((weights * k).sum(), p)[0])
        torch.testing.assert_close(k, empirical_ntk(model, p, data))
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_an_infinite_network_knows_an_input_by_its_norm(depth):
    x = draw(5, 4)
    k = relu_ntk(x, x, depth=depth)
    torch.testing.assert_close(k.diagonal(), (depth + 1) * x.square().mean(1))
    torch.testing.assert_close(relu_ntk(3 * x, x, depth=depth), 3 * k)  # homogeneous
    away = relu_ntk(-x, x, depth=depth).diagonal()
    opposite = {0: -1.0, 1: 0.0}  # c goes from -1 to 0, where t has lost all
    if depth in opposite:
        torch.testing.assert_close(away, opposite[depth] * x.square().mean(1))
    assert (relu_ntk(0 * x, x, depth=depth) == 0).all()


class Scaled(nn.Module):
    def __init__(self, n_in, n_out, gain, generator):
        super().__init__()
        self.weight, self.scale = (
            nn.Parameter(torch.randn(n_out, n_in, generator=generator)),
            gain / n_in**0.5,
        )

    def forward(self, x):
        return self.scale * (x @ self.weight.T)


@pytest.mark.parametrize(("depth", "width", "networks"), [(1, 8192, 1), (2, 256, 40)])
def test_wide_networks_have_the_kernel_of_an_infinite_one(depth, width, networks):
    generator, root, x = torch.Generator().manual_seed(1), math.sqrt(2), draw(4, 6).float()
    total = torch.zeros(4, 4)
    for _ in range(networks):
        layers = [Scaled(6, width, 1.0, generator)]
        for k in range(1, depth + 1):
            layers += [nn.ReLU(), Scaled(width, width if k < depth else 1, root, generator)]
        total += empirical_ntk(nn.Sequential(*layers), x, x) / networks
    limit = relu_ntk(x, x, depth=depth)
    assert float((total - limit).norm() / limit.norm()) < 0.03


def test_networks_of_narrow_weights_are_read_in_float32():
    x = draw(4, 16).bfloat16()
    low = flat().bfloat16()
    got, wide = empirical_ntk(low, x, x), empirical_ntk(copy.deepcopy(low).float(), x.float(), x.float())
    assert got.dtype == torch.bfloat16 and torch.equal(got, wide.bfloat16())
