"""LVA against the pseudo-inverse by hand, brute-force patches, derivatives and bounds."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.transfer import (
    align_domains,
    layer_variation,
    transfer_bound,
    transfer_last_layer,
    transferal_residue,
)
from posterity.transfer.minimum_norm import _by_factor, _by_gram, _minimum_norm


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(*sizes, bias=True, act=nn.Tanh, seed=0):
    layers = [
        part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b, bias=bias), act())
    ]
    made = nn.Sequential(*layers[:-1]).double()
    for k, p in enumerate(made.parameters()):
        p.data = randn(*p.shape, seed=100 * seed + k) / p.shape[-1] ** 0.5
    return made


def with_ones(z):
    return torch.cat([z, torch.ones_like(z[:, :1])], dim=1)


# --- the change of a layer ---


def test_the_change_is_the_pseudo_inverse_times_what_the_labels_leave():
    model, x, y = net(3, 8, 2, bias=False), randn(30, 3), randn(30, 2, seed=1)
    z, q = model[:-1](x).detach(), (y - model(x)).detach()
    found = layer_variation(model, model[-1], x, y)
    torch.testing.assert_close(found.weight.T, torch.linalg.pinv(z) @ q, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.residual_norm, (q - z @ found.weight.T).norm())
    assert found.bias is None and found.rank == 8 and found.layers == ()


def test_afterwards_the_output_is_the_projection_of_the_labels_and_a_second_transfer_does_nothing():
    model, x, y = net(3, 8, 2, bias=False), randn(40, 3), randn(40, 2, seed=1)
    z = model[:-1](x).detach()
    transfer_last_layer(model, None, x, y)
    torch.testing.assert_close(model(x).detach(), z @ torch.linalg.lstsq(z, y).solution, rtol=0, atol=1e-9)
    again = layer_variation(model, None, x, y)
    assert again.weight.abs().max() < 1e-9
    torch.testing.assert_close(again.residual_norm, (model(x) - y).detach().norm())


def test_fewer_samples_than_latents_are_fitted_by_a_change_in_the_directions_that_they_have():
    model, x, y = net(3, 8, 2, bias=False), randn(5, 3), randn(5, 2, seed=1)
    z = model[:-1](x).detach()
    found = transfer_last_layer(model, None, x, y)
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=1e-8)
    beside = torch.eye(8).double() - torch.linalg.pinv(z) @ z
    assert (found.weight @ beside).abs().max() < 1e-10
    assert found.rank == 5 and found.residual_norm < 1e-8


def test_a_bias_is_solved_for_with_the_weight():
    model, x, y = net(3, 6, 2), randn(30, 3), randn(30, 2, seed=1)
    z, q = with_ones(model[:-1](x).detach()), (y - model(x)).detach()
    found, expected = layer_variation(model, None, x, y), torch.linalg.lstsq(z, q).solution
    torch.testing.assert_close(
        torch.cat([found.weight, found.bias[:, None]], 1).T, expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("n", [4, 30, 400])  # fewer than columns, some more, and enough for the Gram matrix
def test_a_ridge_is_its_formula_and_a_huge_one_changes_nothing(n):
    model, x, y = net(3, 6, 2), randn(n, 3), randn(n, 2, seed=1)
    z, q = with_ones(model[:-1](x).detach()), (y - model(x)).detach()
    found = layer_variation(model, None, x, y, ridge=0.3)
    expected = torch.linalg.solve(z.T @ z + 0.3 * torch.eye(7).double(), z.T @ q)
    dual = z.T @ torch.linalg.solve(z @ z.T + 0.3 * torch.eye(n).double(), q)
    torch.testing.assert_close(expected, dual, rtol=1e-8, atol=1e-8)
    got = torch.cat([found.weight, found.bias[:, None]], 1).T
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.residual_norm, (q - z @ got).norm(), rtol=1e-6, atol=0)
    assert layer_variation(model, None, x, y, ridge=1e9).weight.abs().max() < 1e-5


def patches_by_hand(x, layer):
    """Rows of a convolution: loops over images, places and the entries of a kernel."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    x = F.pad(x, (pw, pw, ph, ph))
    height, width = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    rows = []
    for image in x:
        for i in range(height):
            for j in range(width):
                rows.append([image[c, i * sh + a * dh, j * sw + b * dw]
                             for c in range(len(image)) for a in range(kh) for b in range(kw)])  # fmt: skip
    return torch.tensor(rows, dtype=x.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}]
)
def test_a_convolution_is_brute_force_over_its_patches(bias, options, monkeypatch):
    monkeypatch.setattr("posterity.transfer.affine_layer._PATCHES", 500)  # an image or two at once
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, (3, 2), bias=bias, **options)
    ).double()
    for k, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=k)
    x = randn(4, 1, 7, 8)
    y = randn(*model(x).shape, seed=9)
    z = patches_by_hand(model[:-1](x).detach(), model[-1])
    z = with_ones(z) if bias else z
    q = (y - model(x)).detach().permute(0, 2, 3, 1).reshape(-1, 3)
    expected = torch.linalg.lstsq(z, q).solution
    found = layer_variation(model, None, x, y)
    got = found.weight.flatten(1)
    got = torch.cat([got, found.bias[:, None]], 1) if bias else got
    torch.testing.assert_close(got.T, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{"padding": "same", "dilation": 2}, {"padding": "valid"},
                                     {"padding": (1, 2), "padding_mode": "circular"},
                                     {"padding": "same", "padding_mode": "reflect"}])  # fmt: skip
def test_however_a_convolution_pads_labels_that_another_kernel_made_are_fitted(options):
    model = nn.Conv2d(2, 3, (2, 3), **options).double()
    other, x = copy.deepcopy(model), randn(6, 2, 6, 7)
    other.weight.data, other.bias.data = randn(3, 2, 2, 3, seed=1), randn(3, seed=2)
    transfer_last_layer(model, None, x, other(x).detach())
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.bias, other.bias, rtol=1e-8, atol=1e-8)


class Reshaped(nn.Module):
    """Ends in a reshape: predictions (n, steps), or (n,)."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.body, self.head = shape, nn.Linear(3, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x):
        return self.head(self.body(x).tanh()).reshape(len(x), *self.shape)


def test_a_sequence_is_its_rows_and_a_reshape_of_the_output_does_not_matter():
    model, x, y = net(3, 5, 2), randn(10, 4, 3), randn(10, 4, 2, seed=1)
    whole, flat = (
        layer_variation(model, None, x, y),
        layer_variation(model, None, x.flatten(0, 1), y.flatten(0, 1)),
    )
    torch.testing.assert_close(whole.weight, flat.weight, rtol=1e-10, atol=1e-10)
    model = Reshaped(4)
    y = randn(10, 4, seed=1)
    z, q = with_ones(model.body(x).tanh().detach().flatten(0, 1)), (y - model(x)).detach().reshape(-1, 1)
    found = layer_variation(model, model.head, x, y)
    torch.testing.assert_close(
        found.weight[0], torch.linalg.lstsq(z, q).solution[:-1, 0], rtol=1e-9, atol=1e-9
    )
    single = layer_variation(Reshaped(), None, randn(1, 3), randn(1, seed=1))
    assert single.rank == 1


@pytest.mark.parametrize("n", [25, 300])
@pytest.mark.parametrize("method", ["exact", "perturb"])
def test_the_batch_size_has_no_effect(n, method):
    model, x, y = net(3, 6, 2), randn(n, 3), randn(n, 2, seed=1)
    source = {"x": x + 0.1 * randn(n, 3, seed=2), "y": y}
    whole, parts = (
        layer_variation(model, None, x, y, method=method, batch_size=b, **source) for b in (1024, 7)
    )
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(whole.residual_norm, parts.residual_norm)


def test_only_the_weights_of_the_layer_change_and_subtracting_takes_them_back():
    model, x, y = net(3, 6, 2), randn(30, 3), randn(30, 2, seed=1)
    before = copy.deepcopy(model.state_dict())
    change = transfer_last_layer(model, None, x, y)
    after = model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"2.weight", "2.bias"}
    torch.testing.assert_close(after["2.weight"] - change.weight, before["2.weight"])
    torch.testing.assert_close(after["2.bias"] - change.bias, before["2.bias"])


def test_rounding_of_float32_latents_is_cut_off():
    """Two latents alike up to rounding: with the solver's own cut-off their difference would be blown up."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.7], [0.7 * (1 + 2e-7)]])
    x = torch.linspace(-1, 1, 200)[:, None]
    y = torch.sin(9 * x)
    usual, blown = layer_variation(model, None, x, y), layer_variation(model, None, x, y, rcond=0.0)
    assert usual.rank == 1 and usual.weight.abs().max() < 10
    assert blown.rank == 2 and blown.weight.abs().max() > 1e3
    assert layer_variation(net(3, 6, 2), None, randn(30, 3), randn(30, 2), rcond=1.0).rank <= 1


def test_zero_latents_and_a_perfect_fit_change_nothing():
    model = nn.Linear(3, 2, bias=False).double()
    found = layer_variation(model, None, torch.zeros(4, 3).double(), randn(4, 2))
    assert found.rank == 0 and found.weight.abs().max() == 0
    torch.testing.assert_close(found.residual_norm, randn(4, 2).norm())
    x = randn(50, 3)
    assert layer_variation(model, None, x, model(x).detach()).weight.abs().max() == 0


def test_both_ways_to_solve_agree_with_lapack_and_hard_cases_take_the_one_that_keeps_the_digits():
    z, q = randn(600, 5), randn(600, 2, seed=1)
    expected = torch.linalg.lstsq(z, q).solution
    parts = list(zip(z.split(37), q.split(37), strict=True))
    for found in (_by_gram(iter(parts), 1e-13, 0.0, False), _by_factor(iter(parts), 5, 1e-13, 0.0, False)):
        torch.testing.assert_close(found.change, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.residual_norm, (q - z @ expected).norm(), rtol=1e-10, atol=0)
    scale = torch.tensor([1, 1, 1, 1, 1e-7], dtype=torch.float64)
    parts = [(a * scale, b) for a, b in parts]
    assert _by_gram(iter(parts), 1e-13, 0.0, False) is None
    found = _minimum_norm(lambda: iter(parts), (600, 5), ridge=0.0, rcond=None, eps=2e-16)
    torch.testing.assert_close(found.change * scale[:, None], expected, rtol=1e-7, atol=1e-7)
    for far in (1e-160, 1e160):
        beyond = [(a * far, b) for a, b in parts]
        found = _minimum_norm(lambda: iter(beyond), (600, 5), ridge=0.0, rcond=1e-5, eps=2e-16)  # noqa: B023
        assert found.rank == 4 and found.change.isfinite().all()


# --- residue, alignment, several layers ---


def test_the_residue_is_new_labels_less_what_the_network_makes_of_the_shift():
    model, x, y = net(3, 6, 2), randn(20, 3), randn(20, 2, seed=1)
    xt, yt = x + 0.3 * randn(20, 3, seed=2), y + 0.3 * randn(20, 2, seed=3)
    exact = transferal_residue(model, x, y, xt, yt)
    with torch.no_grad():
        by_hand = (yt - y) - (model(xt) - model(x)) + (y - model(x))
    torch.testing.assert_close(exact, by_hand)
    assert torch.equal(exact, transferal_residue(model, None, None, xt, yt))
    slope = torch.stack(
        [torch.autograd.functional.jacobian(model, a) @ b for a, b in zip(x, xt - x, strict=True)]
    )
    with torch.no_grad():
        by_hand = (yt - y) - slope + (y - model(x))
    torch.testing.assert_close(transferal_residue(model, x, y, xt, yt, method="perturb"), by_hand)


def test_the_derivative_tends_to_the_difference_with_order_two_and_is_it_for_a_linear_network():
    model, x, y, way = net(3, 6, 2), randn(20, 3), randn(20, 2, seed=1), randn(20, 3, seed=2)
    gaps = []
    for h in (1e-2, 1e-3):
        both = [
            layer_variation(model, None, x + h * way, y, x=x, y=y, method=m).weight
            for m in ("exact", "perturb")
        ]
        gaps.append(float((both[0] - both[1]).norm()))
    assert 1.9 < math.log10(gaps[0] / gaps[1]) < 2.1
    linear = net(3, 6, 2, act=nn.Identity)
    both = [
        layer_variation(linear, None, x + way, y, x=x, y=y, method=m).weight for m in ("exact", "perturb")
    ]
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-8)


def test_samples_are_paired_with_the_nearest_and_equal_sets_with_themselves():
    x, y = randn(30, 2, 3), randn(30, 4, seed=1)
    assert torch.equal(align_domains(x, y, x, y), torch.arange(30))
    assert torch.equal(
        align_domains(x.float() * 1e-3 + 100, y.float(), x.float() * 1e-3 + 100, y.float()), torch.arange(30)
    )
    assert torch.equal(align_domains(x[:, 0, 0], y[:, 0], x[:, 0, 0], y[:, 0]), torch.arange(30))
    xt, yt = randn(7, 2, 3, seed=2), randn(7, 4, seed=3)
    for p in (1, 2, 3.5, math.inf):
        d = [[float(np.linalg.norm((x[i] - xt[j]).flatten(), p) + np.linalg.norm(y[i] - yt[j], p)) for i in range(30)]
             for j in range(7)]  # fmt: skip
        assert align_domains(x, y, xt, yt, p=p).tolist() == np.argmin(d, axis=1).tolist()


def test_unpaired_domains_are_aligned_before_the_derivative():
    model, x, y = net(3, 6, 2), randn(30, 3), randn(30, 2, seed=1)
    xt, yt = x[5:15] + 0.01, y[5:15] + 0.01
    given = {"x": x, "y": y, "method": "perturb"}
    found = layer_variation(model, None, xt, yt, **given)
    pairs = layer_variation(model, None, xt, yt, x=x[5:15], y=y[5:15], method="perturb", align=False)
    assert torch.equal(found.weight, pairs.weight)
    order = torch.arange(9, -1, -1)
    turned = layer_variation(
        model, None, xt[order], yt[order], x=x[5:15], y=y[5:15], method="perturb", align=True
    )
    torch.testing.assert_close(turned.weight, pairs.weight)


def test_recurrent_layers_and_attention_have_a_derivative_too():
    class Recurrent(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.body = nn.LSTM(4, 4, batch_first=True) if kind == "lstm" else nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)  # fmt: skip
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            out = self.body(self.first(x))
            return self.head(out[0] if isinstance(out, tuple) else out)

    for kind in ("lstm", "attention"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Recurrent(kind).double()
        x, y = randn(6, 3, 4), randn(6, 3, 1, seed=1)
        gap = [transferal_residue(model, x, y, x + h * randn(6, 3, 4, seed=2), y, method="perturb")
               - transferal_residue(model, None, None, x + h * randn(6, 3, 4, seed=2), y) for h in (1e-2, 1e-3)]  # fmt: skip
        assert 1.8 < math.log10(float(gap[0].norm() / gap[1].norm())) < 2.2
        found = layer_variation(model, None, x, y, n_layers=2)
        assert found.residual_norm <= layer_variation(model, None, x, y).residual_norm


def test_running_out_of_memory_is_said_and_no_reason_for_the_slow_loop():
    model = net(3, 3, 1)

    def too_large(module, args):
        try:
            float(args[0].detach().sum())  # which vmap refuses
        except RuntimeError as error:
            raise torch.OutOfMemoryError("out of memory") from error

    model.register_forward_pre_hook(too_large)
    with pytest.raises(torch.OutOfMemoryError):
        layer_variation(model, None, randn(6, 3), randn(6, 1, seed=1), n_layers=2)


def test_two_layers_of_a_linear_network_take_the_least_step_that_explains_the_labels_to_first_order():
    """f = W2 W1 x: J by hand, the least step by pinv, then the last layer by pinv again."""
    model, x, y = net(3, 2, 2, act=nn.Identity, bias=False), randn(30, 3), randn(30, 2, seed=1)
    y = model(x).detach() + 1e-3 * y
    one, two = (model[k].weight.detach() for k in (0, 2))
    rows = []
    for a in x:
        z = one @ a
        for k in range(2):
            first = torch.outer(two[k], a).flatten()
            last = torch.zeros(2, 2, dtype=torch.float64)
            last[k] = z
            rows.append(torch.cat([first, last.flatten()]))
    step = torch.linalg.pinv(torch.stack(rows), rtol=1e-12) @ (y - model(x)).detach().flatten()
    moved = one + step[:6].view(2, 3)
    z = x @ moved.T
    last = two + step[6:].view(2, 2)
    last = last + (torch.linalg.pinv(z) @ (y - z @ last.T)).T
    found = layer_variation(model, None, x, y, n_layers=2)
    torch.testing.assert_close(one + found.layers[0].weight, moved, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(two + found.weight, last, rtol=1e-7, atol=1e-9)
    assert torch.equal(found.layers[1].weight, found.weight)


def test_more_layers_never_fit_worse_and_change_only_themselves(monkeypatch):
    model, x, y = net(3, 6, 6, 1), randn(60, 3), randn(60, 1, seed=1)
    single = layer_variation(model, None, x, y)
    double = copy.deepcopy(model)
    found = transfer_last_layer(double, None, x, y, n_layers=2, ridge=1e-3)
    assert len(found.layers) == 2 and found.residual_norm < single.residual_norm
    torch.testing.assert_close((double(x) - y).detach().norm(), found.residual_norm)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), double.parameters(), strict=True)]
    assert same == [True, True, False, False, False, False]
    monkeypatch.setattr("posterity.transfer.last_layers._DENSE", 0)  # now by products with J alone
    free = layer_variation(model, None, x, y, n_layers=2, ridge=1e-3)
    torch.testing.assert_close(free.layers[0].weight, found.layers[0].weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(free.residual_norm, found.residual_norm, rtol=1e-5, atol=0)


# --- the bound ---


def convolutions(seed):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.LeakyReLU(),
                          nn.Conv2d(2, 4, 2, groups=2, padding=1, padding_mode="circular"), nn.SELU(inplace=True),
                          nn.Flatten(), nn.Linear(64, 2)).double().eval()  # fmt: skip
    for k, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=100 * seed + k)
    model[1].running_var.fill_(0.25)
    return model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [lambda s: net(3, 8, 5, 2, seed=s), lambda s: net(3, 6, 1, act=nn.GELU, seed=s), convolutions])  # fmt: skip
def test_the_loss_stays_below_the_bound_and_the_residue_below_the_loss(make, seed):
    model = make(seed)
    shape = (20, 3) if isinstance(model[0], nn.Linear) else (20, 1, 6, 6)
    x = randn(*shape, seed=seed)
    y = model(x).detach() + 0.1
    for size in (0.01, 1.0, 30.0):
        xt = x + size * randn(*shape, seed=seed + 50)
        yt = y + size * randn(*y.shape, seed=seed + 60)
        found = transfer_bound(model, None, x, y, xt, yt)
        with torch.no_grad():
            loss, reaction = (model(xt) - yt).norm(), (model(xt) - model(x)).norm()
        assert loss <= found.bound and found.residue <= loss * (1 + 1e-12)
        assert reaction <= found.lipschitz * found.input_shift
        assert found.residue == pytest.approx(float(layer_variation(model, None, xt, yt).residual_norm))
        assert found.source_loss == pytest.approx(0.1 * y.numel() ** 0.5)


def test_the_terms_of_a_linear_chain_are_its_spectral_norms():
    model = net(3, 4, 2, act=nn.Identity, bias=False)
    found = transfer_bound(model, None, *(randn(5, n, seed=n + k) for k in (0, 10) for n in (3, 2)))
    by_hand = math.prod(float(np.linalg.norm(model[k].weight.detach().numpy(), 2)) for k in (0, 2))
    assert found.lipschitz == pytest.approx(by_hand)


@pytest.mark.parametrize("options", [{"stride": 1, "padding": 1}, {"stride": 2, "padding": 0, "dilation": 2}])
def test_a_convolution_is_steeper_than_its_matrix_nowhere(options):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.Flatten(), nn.LazyLinear(1)).double()
    x, y = randn(3, 2, 6, 7), randn(3, 1, seed=1)
    model(x)
    found = transfer_bound(model, None, x, y, x, y)
    unit = torch.eye(84).double().view(84, 2, 6, 7)
    with torch.no_grad():
        matrix = (model[0](unit) - model[0](torch.zeros_like(unit))).flatten(1)
        exact = torch.linalg.matrix_norm(matrix, 2) * model[2].weight.norm()
    assert exact <= found.lipschitz <= 3 * exact
