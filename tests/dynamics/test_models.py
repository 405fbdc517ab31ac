"""Instruments on networks of other kinds: attention, recurrence, control flow on values."""

import pytest
import torch
from torch import nn

from posterity._models import evaluating
from posterity.dynamics import (
    empirical_ntk,
    layer_probe,
    quasi_homogeneity_error,
    reduced_landscape,
    train_ensemble,
)
from posterity.testing import check_instrument

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of normalisation, of what vmap does slowly


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 2, 4)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cells(x.view(-1, 2, 4))[0][:, -1])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return torch.cat([(self.one if row[0] > 0 else self.other)(row)[None] for row in x])


def made(kind):
    torch.manual_seed(0)
    return kind(), torch.randn(6, 8), torch.arange(6) % 3


@pytest.mark.parametrize("kind", [Attention, Recurrent, Branching])
def test_a_tangent_kernel_is_the_product_of_jacobians_of_any_network(kind):
    net, x, _ = made(kind)
    net, x = net.double().eval(), x.double()
    params = list(net.parameters())
    with evaluating(net):
        rows = [
            torch.cat([part.flatten() for part in torch.autograd.grad(out, params, materialize_grads=True, allow_unused=True, retain_graph=True)])
            for each in x for out in net(each[None])[0]
        ]  # fmt: skip
    flat = torch.stack(rows).unflatten(0, (6, 3))
    full = torch.einsum("iap,jbp->ijab", flat, flat)
    torch.testing.assert_close(empirical_ntk(net, x, outputs="full"), full)
    torch.testing.assert_close(empirical_ntk(net, x, batch_size=2), full.diagonal(dim1=2, dim2=3).mean(-1))


@pytest.mark.parametrize("kind", [Attention, Recurrent, Branching])
def test_a_landscape_trains_any_network_one_by_one_and_says_so_where_it_must(kind):
    net, x, y = made(kind)
    alone = reduced_landscape(net, x, y, x, y, alphas=[0.5, 1.0], n_steps=3, vectorize=False)
    if kind is not Recurrent:
        together = reduced_landscape(net, x, y, x, y, alphas=[0.5, 1.0], n_steps=3)
        torch.testing.assert_close(together.train_loss, alone.train_loss, rtol=1e-5, atol=0)
        return
    with pytest.raises(ValueError, match="vectorize must be False"):
        reduced_landscape(net, x, y, x, y, alphas=[0.5, 1.0], n_steps=3)
    with pytest.raises(ValueError, match="vectorize must be False"):
        train_ensemble(lambda seed: net, x, x[:, :3], x, n_models=2, lr=1e-2, n_steps=2)


def test_attention_is_left_alone(as_a_user):
    net, x, y = made(Attention)
    rates = {name: float(name.startswith("head")) for name, _ in net.named_parameters()}
    check_instrument(lambda net, x: quasi_homogeneity_error(net, x, rates), net, x, chooses=True)
    check_instrument(
        lambda net, x: reduced_landscape(net, x, y.to(x.device), x, y.to(x.device), alphas=[0.5, 1.0], n_steps=2), net, x, chooses=True
    )  # fmt: skip


def test_the_ordinary_path_of_attention_is_for_the_look_alone():
    net, _, _ = made(Attention)
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        with pytest.raises(KeyError), evaluating(net):
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() == fast
    torch.backends.mha.set_fastpath_enabled(True)


def test_a_module_in_two_places_is_left_alone_by_all_instruments(as_a_user):
    torch.manual_seed(0)
    shared, norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
    net = nn.Sequential(shared, norm, nn.ReLU(), shared, norm, nn.Linear(8, 3))
    net[5].bias.requires_grad_(False)
    x, y = torch.randn(12, 8), torch.arange(12) % 3
    looks = (
        lambda net, x: empirical_ntk(net, x),
        lambda net, x: layer_probe(net, ["2"], x, y.to(x.device), x, y.to(x.device), k=3),
        lambda net, x: quasi_homogeneity_error(
            net, x, {name: float(name == "5.weight") for name, _ in net.named_parameters()}
        ),
        lambda net, x: reduced_landscape(
            net, x, y.to(x.device), x, y.to(x.device), alphas=[0.5, 1.0], n_steps=2
        ),
    )
    for look in looks:
        check_instrument(look, net, x, chooses=True)
