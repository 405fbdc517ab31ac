"""What LVA leaves as it was, narrow dtypes, torch's modes, and the input that it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from posterity.testing import check_instrument
from posterity.transfer import (
    align_domains,
    layer_variation,
    transfer_bound,
    transfer_last_layer,
    transferal_residue,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    for k, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=k).float() / p.shape[-1] ** 0.5
    return model, randn(12, 3).float(), randn(12, 2, seed=1).float()


@pytest.mark.parametrize("options", [{}, {"method": "perturb"}, {"n_layers": 2, "ridge": 0.1}])
def test_functions_on_a_model_conform_to_their_kind(as_a_user, options):
    model, x, y = small()
    source = {"x": x + 0.1, "y": y} if options.get("method") else {}

    def look(net, x, y):
        shifted = {"x": x - 0.1, "y": y} if source else {}
        found = layer_variation(net, None, x, y, batch_size=5, **shifted, **options)
        layers = [part for each in found.layers for part in (each.weight, each.bias)]
        return found.weight, found.bias, found.residual_norm, found.rank, *layers

    check_instrument(look, model, x, y)


def test_residue_and_bound_conform_to_their_kind(as_a_user):
    model, x, y = small()
    check_instrument(lambda m, a, b: transferal_residue(m, a - 0.1, b, a, b, method="perturb"), model, x, y)
    check_instrument(lambda m, a, b: tuple(transfer_bound(m, None, a - 0.25, b, a, b + 0.5)), model, x, y)


def test_narrow_networks_are_moved_in_float32_and_rounded_once():
    model, x, y = small()
    model = model.bfloat16()
    wide = copy.deepcopy(model).float()
    change = transfer_last_layer(model, None, x, y)
    assert change.weight.dtype == torch.bfloat16 and change.residual_norm.dtype == torch.float32
    assert torch.equal(change.weight, layer_variation(wide, None, x, y).weight.bfloat16())
    assert model[0].weight.dtype == model[-1].weight.dtype == torch.bfloat16


def test_buffers_that_a_model_writes_stay_and_modes_come_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.drop, self.head = nn.Dropout(0.9), nn.Linear(3, 2)

        def forward(self, x):
            self.calls += 1
            return self.head(self.drop(x))

    model = Counting().train()
    model.head.eval()
    x, y = randn(20, 3).float(), randn(20, 2).float()
    a, b = (layer_variation(model, None, x, y).weight for _ in range(2))
    assert torch.equal(a, b) and model.calls == 0
    assert model.training and model.drop.training and not model.head.training


def test_tensors_of_inference_mode_and_graphs_are_taken():
    model, x, y = small()
    with torch.inference_mode():
        inputs, labels = x.clone(), y.clone()
    expected = layer_variation(model, None, x, y, x=x + 0.1, y=y, method="perturb", n_layers=2, ridge=1.0)
    found = layer_variation(
        model, None, inputs, labels, x=inputs + 0.1, y=labels, method="perturb", n_layers=2, ridge=1.0
    )
    assert torch.equal(found.weight, expected.weight)
    grown = layer_variation(model, None, (x + 0).requires_grad_(), (y + 0).requires_grad_())
    assert not grown.weight.requires_grad


# --- bad input ---


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.head(x))


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


X, Y = torch.zeros(4, 3), torch.zeros(4, 3)
LINEAR = nn.Linear(3, 3)
IMAGES = torch.zeros(4, 2, 5, 5)


@pytest.mark.parametrize(
    ("model", "layer", "x", "y", "options", "message"),
    [
        (LINEAR, nn.Linear(3, 3), X, Y, {}, "layer must be a part of model"),
        (nn.Sequential(LINEAR, nn.ReLU()), nn.ReLU(), X, Y, {}, "layer must be an nn.Linear or nn.Conv2d, got ReLU"),
        (nn.ReLU(), None, X, Y, {}, "layer must be an nn.Linear or nn.Conv2d, model has none"),
        (LINEAR, "head", X, Y, {}, "layer must be an nn.Linear or nn.Conv2d, got str"),
        (nn.ConvTranspose2d(2, 2, 1), None, IMAGES, IMAGES, {}, "layer must be an nn.Linear or nn.Conv2d, model has none"),
        (nn.Conv2d(2, 2, 1, groups=2), None, IMAGES, IMAGES, {}, "layer must be a convolution of one group, got groups=2"),
        (Twice(), None, X, Y, {}, "layer 'head' must be used once in a forward pass of model, was 2 times"),
        (nn.Sequential(LINEAR, nn.ReLU()), None, X, Y, {}, r"layer '0' must give the output of model, reshaped at most: it gives \(2, 3\)"),
        (nn.Sequential(LINEAR, nn.ReLU(inplace=True)), None, X[:1], Y[:1], {}, "must give the output of model"),
        (nn.Sequential(LINEAR, nn.Hardtanh()), None, X, Y, {}, "must give the output of model"),
        (nn.Sequential(LINEAR, nn.Linear(3, 2), nn.Linear(2, 3)), LINEAR, X, Y, {}, r"it gives \(2, 3\), from which model makes \(2, 3\)"),
        (tied(), None, X, Y, {}, "layer '1' must not share its weight, which Linear has as well"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), None, X, Y, {}, "must hold its weight as a parameter"),
        (nn.LazyLinear(3), None, X, Y, {}, "model must be initialised"),
        (lambda x: x, None, X, Y, {}, "model must be an nn.Module, got function"),
        (LINEAR, None, X, Y[:, :2], {}, r"y_target must have the shape of the prediction, \(4, 3\), got \(4, 2\)"),
        (LINEAR, None, X, Y[:3], {}, "y_target must have a row for each of the 4 of x_target, got 3"),
        (LINEAR, None, X[:0], Y[:0], {}, "x_target must be a real tensor with at least one row"),
        (LINEAR, None, None, Y, {}, "x_target must be a real tensor with at least one row, got NoneType"),
        (LINEAR, None, X, Y.long(), {}, "y_target must be a floating-point tensor, got dtype torch.int64: this is least squares"),
        (LINEAR, None, X + math.nan, Y, {}, "x_target must be finite"),
        (LINEAR, None, X, Y + math.inf, {}, "y_target must be finite"),
        (LINEAR, None, X, Y, {"x": X + math.inf, "y": Y}, "x must be finite"),
        (LINEAR, None, X, Y, {"method": "perturb"}, "x and y must be given for method='perturb'"),
        (LINEAR, None, X, Y, {"method": "perturb", "x": X}, "y must be a real tensor"),
        (LINEAR, None, X, Y, {"method": "perturb", "x": X[:3], "y": Y[:3], "align": False}, "x must have as many rows as x_target for align=False, got 3 and 4"),
        (LINEAR, None, X, Y, {"method": "perturb", "x": X[:, :2], "y": Y}, r"x must have rows like those of x_target, \(3,\), got \(2,\)"),
        (LINEAR, None, X, Y, {"method": "perturb", "x": X.long(), "y": Y}, "x must be a floating-point tensor"),
        (LINEAR, None, X, Y, {"method": "newton"}, "method must be one of 'exact', 'perturb'"),
        (LINEAR, None, X, Y, {"align": "yes"}, "align must be one of True, False, 'auto'"),
        (LINEAR, None, X, Y, {"ridge": -1.0}, "ridge must be at least 0"),
        (LINEAR, None, X, Y, {"rcond": 2.0}, r"rcond must be in \[0, 1\]"),
        (LINEAR, None, X, Y, {"n_layers": 0}, "n_layers must be an integer of at least 1"),
        (LINEAR, None, X, Y, {"n_layers": 2}, "n_layers must be at most 1, the affine layers of model up to layer, got 2"),
        (LINEAR, None, X, Y, {"batch_size": 0}, "batch_size must be an integer of at least 1"),
        (nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), None, X, Y, {}, "model must return a floating-point tensor, 2 samples first, got tuple"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name_before_any_change(as_a_user, model, layer, x, y, options, message):
    before = (
        copy.deepcopy(model.state_dict())
        if isinstance(model, nn.Module) and "Lazy" not in repr(model)
        else {}
    )
    for call in (layer_variation, transfer_last_layer):
        with pytest.raises(ValueError, match=message):
            call(model, layer, x, y, **options)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.two(5 * self.one(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transferal_residue(LINEAR, None, None, X, Y[:, :2]), "y_target must have the shape of the prediction"),
        (lambda: transferal_residue(LINEAR, None, None, X, Y, method="perturb"), "x and y must be given"),
        (lambda: transferal_residue(LINEAR, X, Y, X[:0], Y[:0]), "x_target must be a real tensor with at least one row"),
        (lambda: transferal_residue(LINEAR, X, Y, X + 1e38, Y), "model must give finite numbers"),
        (lambda: align_domains(X, Y, X, Y, p=0.5), "p must be at least 1"),
        (lambda: align_domains(X, Y, X, Y[:, :2]), r"y must have rows like those of y_target, \(2,\), got \(3,\)"),
        (lambda: align_domains(X, Y.long(), X, Y), "y must be a floating-point tensor"),
        (lambda: transfer_bound(LINEAR, None, X.long(), Y, X, Y), "x must be a floating-point tensor"),
        (lambda: transfer_bound(Hidden(), None, X + 1, Y, X, Y), r"what comes into 'two' \(Linear\) is not what 'one' gave"),
        (lambda: transfer_bound(nn.Sequential(nn.LayerNorm(3), LINEAR), None, X, Y, X, Y), "got LayerNorm '0', of which no slope is known"),
    ],
)  # fmt: skip
def test_the_other_functions_refuse_bad_input_by_name(as_a_user, call, message):
    LINEAR.weight.data.fill_(2.0)
    with pytest.raises(ValueError, match=message):
        call()
