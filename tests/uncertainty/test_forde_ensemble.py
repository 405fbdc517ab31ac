"""FoRDE's ensemble: members in one call or one after the other, their statistics, dropout and predictions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.testing import check_layer
from posterity.uncertainty import FoRDELoss, RepulsiveEnsemble, input_gradient_repulsion


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def mlp(n_in=4, n_out=3, width=6, act=nn.Tanh):
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, width), act(), nn.Linear(width, n_out)).double()


def several(make, m, seed=0):
    torch.manual_seed(seed)
    return RepulsiveEnsemble(make, m)


def batch(n=7, d=4, c=3, seed=0):
    return normal(n, d, seed=seed), torch.randint(c, (n,), generator=rng(seed))


def grads(value, modules):
    parameters = list(modules.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def noop(*_):
    return None


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_stacked_members_and_a_loop_agree(act):
    ensemble, (x, y) = several(lambda: mlp(act=act).float(), 4), batch(20)
    x = x.float()
    together = FoRDELoss()(ensemble, x, y)
    outputs = ensemble(x)
    found = grads(together, ensemble)
    ensemble.members[2].register_forward_hook(noop)
    looped = FoRDELoss()(list(ensemble.members), x, y)
    torch.testing.assert_close(looped, together, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grads(looped, ensemble), found, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ensemble(x), outputs, atol=1e-6, rtol=1e-6)


CALLS = []


class Counted(nn.Module):
    def __init__(self, slope=1.0):
        super().__init__()
        self.layer, self.slope = nn.Linear(4, 3).double(), slope

    def forward(self, x):
        CALLS.append(1)
        return self.slope * self.layer(x).tanh()


def test_alike_members_are_called_once_and_a_number_apart_is_not_alike():
    (x, y) = batch()
    CALLS.clear()
    FoRDELoss()(several(Counted, 6), x, y)
    assert len(CALLS) == 1
    slopes = iter((1.0, 2.0))
    ensemble = several(lambda: Counted(next(slopes)), 2)
    want = torch.stack([member(x) for member in ensemble.members])
    torch.testing.assert_close(ensemble(x), want)


def with_statistics():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_batch_statistics_are_those_of_each_member_and_move_once():
    (x, y) = batch(12)
    ensemble = several(with_statistics, 3)
    value = FoRDELoss()(ensemble, x, y)
    for member in ensemble.members:
        assert int(member[1].num_batches_tracked) == 1
        torch.testing.assert_close(member[1].running_mean, 0.1 * member[0](x).mean(0).detach())
    gradients = []
    for member in ensemble.members:
        x = x.detach().requires_grad_()
        score = member(x).gather(1, y[:, None]).sum()
        gradients.append(torch.autograd.grad(score, x, create_graph=True)[0])
    fit = sum(F.cross_entropy(member(x), y) for member in ensemble.members)
    torch.testing.assert_close(value, fit + input_gradient_repulsion(torch.stack(gradients)))
    ensemble.eval()
    want = torch.stack([member(x) for member in ensemble.members])
    torch.testing.assert_close(ensemble(x), want)


def test_running_out_of_memory_is_said_and_no_reason_for_the_slow_loop(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("posterity.uncertainty.forde.vmap", full)
    ensemble, (x, y) = several(mlp, 3), batch()
    with pytest.raises(torch.OutOfMemoryError):
        FoRDELoss()(ensemble, x, y)


def test_dropout_differs_between_members():
    torch.manual_seed(0)
    ensemble = RepulsiveEnsemble(lambda: nn.Dropout(0.5), 3)
    masks = ensemble(torch.ones(50, 20)) > 0
    assert not torch.equal(masks[0], masks[1])


def test_the_mean_of_softmaxes():
    ensemble, (x, _) = several(mlp, 4), batch()
    want = sum(member(x).softmax(1) for member in ensemble.members) / 4
    torch.testing.assert_close(ensemble.predict_proba(x), want)


@pytest.mark.parametrize("make", [lambda: mlp().float(), lambda: with_statistics().float()])
def test_the_ensemble_conforms_to_its_kind(as_a_user, make):
    check_layer(several(make, 3), torch.randn(5, 4, generator=rng()), shape=(3, 5, 3))
