"""The training loop: reproducible, resumable, leaves global state alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.lab.nets import TimeMLP, cnn, mlp
from posterity.lab.training import fit


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1


def squared(net, x, y):
    return F.mse_loss(net(x), y)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_it_fits_and_the_seed_decides(data):
    nets = [mlp(3, 1, width=16, dropout=0.1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(weights(nets[0]), weights(nets[2]))
    before = torch.get_rng_state()
    histories = [fit(net, squared, data, epochs=30, lr=1e-2, seed=5) for net in nets[:2]]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert histories[0].losses[-1] < 0.3 * histories[0].losses[0]
    assert histories[0].n_steps == 30


def test_steps_count_exactly_and_the_cosine_ends_at_zero(data):
    rates = []
    net = mlp(3, 1, seed=0)

    class Watched(torch.optim.SGD):
        def step(self, *words):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*words)

    history = fit(net, squared, data, steps=7, batch_size=20, lr=0.1, optimizer=Watched, schedule="cosine")
    assert history.n_steps == len(rates) == 7
    assert rates[0] == 0.1
    assert 0 < rates[-1] < 0.01


def test_a_resumed_run_is_the_run_that_never_stopped(data, tmp_path):
    whole, parts = (mlp(3, 1, width=8, dropout=0.2, seed=0) for _ in range(2))
    options = {
        "epochs": 12,
        "lr": 1e-2,
        "batch_size": 16,
        "schedule": "cosine",
        "validate": lambda net: squared(net, *data),
    }
    expected = fit(whole, squared, data, **options)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 30:
            raise Stop

    with pytest.raises(Stop):
        fit(parts, squared, data, checkpoint=tmp_path / "c.pt", callback=stop, **options)
    parts = mlp(3, 1, width=8, dropout=0.2, seed=3)
    history = fit(parts, squared, data, checkpoint=tmp_path / "c.pt", **options)
    assert torch.equal(weights(whole), weights(parts))
    assert history.losses == expected.losses
    assert history.best_epoch == expected.best_epoch


def test_early_stopping_restores_the_best_weights(data):
    net = mlp(3, 1, seed=0)
    seen = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    kept = []

    def validate(net):
        kept.append(weights(net))
        return next(seen)

    history = fit(net, squared, data, epochs=9, validate=validate, patience=2)
    assert history.validation == [3.0, 1.0, 2.0, 2.0]
    assert history.best_epoch == 1
    assert torch.equal(weights(net), kept[1])
    assert not net.training


def test_bfloat16_goes_through_fabric(data):
    pytest.importorskip("lightning_fabric")
    net = mlp(3, 1, width=16, seed=0)
    history = fit(net, squared, data, epochs=20, lr=1e-2, precision="bf16-mixed")
    assert history.losses[-1] < history.losses[0]
    assert net[1].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of epochs and steps"), ({"epochs": 1, "steps": 1}, "exactly one"),
        ({"epochs": 1, "patience": 1}, "patience needs validate"), ({"epochs": 1, "schedule": "x"}, "schedule must be"),
        ({"epochs": 1, "optimizer": "x"}, "optimizer must be"), ({"epochs": 9, "lr": 1e30, "optimizer": "sgd"}, "lower lr"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(data, as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        fit(mlp(3, 1), squared, data, **options)


def test_unequal_data_is_refused(data):
    with pytest.raises(ValueError, match="equal, positive lengths"):
        fit(nn.Linear(3, 1), squared, (data[0], data[1][:3]), epochs=1)


def test_backbones_have_their_shapes():
    assert cnn(3, 7, width=4)(torch.zeros(2, 3, 9, 9)).shape == (2, 7)
    assert TimeMLP((2, 3), width=8)(torch.zeros(5, 2, 3), torch.rand(5)).shape == (5, 2, 3)
