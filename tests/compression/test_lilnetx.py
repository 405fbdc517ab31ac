"""LilNetX: weights from integers, prices against brute force, smaller layers against whole ones."""

import copy
import io
import math
import pickle
import pickletools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posterity.compression import FactorizedPrior, LatentNet, slice_norm
from posterity.testing import check_instrument, check_layer


class Tied(nn.Module):
    """A head tied to an embedding, a layer in two places, attention, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.head(self.frozen(self.again(self.twice(self.encoder(self.embed(x))))))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, (3, 1), groups=3),
        nn.Flatten(), nn.Linear(6 * 2 * 4, 5),
    )  # fmt: skip


CASES = {
    "conv": (conv, torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(25, 4)), torch.ones(3, 2, 8)),
    "conv3d": (lambda: nn.Conv3d(1, 4, 2), torch.ones(2, 1, 3, 4, 4)),
    "linear": (lambda: nn.Linear(5, 6), torch.ones(2, 5)),
    "tied": (Tied, torch.arange(6).reshape(2, 3)),
}  # fmt: skip


def case(name: str, **options) -> tuple[nn.Module, LatentNet, Tensor]:
    torch.manual_seed(0)
    make, x = CASES[name]
    net = make()
    return net, LatentNet(net, **options), x


def rows(weight: Tensor) -> Tensor:
    return weight.detach().reshape(-1, math.prod(weight.shape[2:]))


def wild(channels: int) -> FactorizedPrior:
    """A density far from its start."""
    prior = FactorizedPrior(channels)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in prior.parameters():
            p.copy_(torch.randn(channels, generator=generator))
    return prior.double()


def by_formula(prior: FactorizedPrior, x: np.ndarray) -> np.ndarray:
    """Return F's logit as the paper writes it."""
    h, b, a = ([p.detach().numpy() for p in params] for params in (prior.h, prior.b, prior.a))
    for i in range(3):
        x = x * np.log1p(np.exp(h[i])) + b[i]
        x = x + np.tanh(x) * np.tanh(a[i])
    return x * np.log1p(np.exp(h[3])) + b[3]


def test_the_density_is_the_papers_increases_from_0_to_1_and_its_integers_sum_to_1():
    prior = wild(5)
    x = torch.linspace(-30, 30, 400, dtype=torch.float64)[:, None].expand(-1, 5)
    cdf = prior.cdf(x)
    torch.testing.assert_close(cdf, torch.from_numpy(1 / (1 + np.exp(-by_formula(prior, x.numpy())))))
    assert (cdf.diff(dim=0) >= 0).all()
    assert ((cdf > 0) & (cdf < 1)).any(0).all()
    far = torch.tensor([[-1e6], [1e6]], dtype=torch.float64).expand(-1, 5)
    torch.testing.assert_close(prior.cdf(far)[1] - prior.cdf(far)[0], torch.ones(5, dtype=torch.float64))
    q = torch.arange(-3000.0, 3001, dtype=torch.float64)[:, None].expand(-1, 5)
    np.testing.assert_allclose(prior.bits(q).neg().exp2().sum(0).detach(), 1, atol=1e-6)


def test_bits_keep_their_digits_in_both_tails_and_end_at_50():
    prior = wild(3)
    q = np.linspace(-60, 60, 121)[:, None].repeat(3, 1)
    low, high = by_formula(prior, q - 0.5), by_formula(prior, q + 0.5)
    # log(sigmoid(h) - sigmoid(l)) = log sigmoid(h) + log sigmoid(-l) + log(1 - e^(l - h))
    log = -np.logaddexp(0, -high) - np.logaddexp(0, low) + np.log(-np.expm1(low - high))
    want = np.clip(-log / math.log(2), 0, 50)
    assert (want == 50).any()
    np.testing.assert_allclose(prior.bits(torch.from_numpy(q)).detach(), want, rtol=1e-9)
    np.testing.assert_allclose(prior.float().bits(torch.from_numpy(q).float()).detach(), want, rtol=1e-3)
    far = torch.full((1, 3), 1e30, requires_grad=True)
    bits = prior.bits(far)
    assert (bits == 50).all()
    assert not torch.autograd.grad(bits.sum(), far)[0].isnan().any()


def test_gradients_of_bits_are_those_of_differences():
    prior = wild(2)
    q = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    params = list(prior.parameters())

    def bits(q, *params):
        names = [name for name, _ in prior.named_parameters()]
        return torch.func.functional_call(Bits(prior), {f"prior.{n}": p for n, p in zip(names, params, strict=True)}, (q,))  # fmt: skip

    assert torch.autograd.gradcheck(bits, (q, *params))


class Bits(nn.Module):
    """Bits as a layer."""

    def __init__(self, prior: FactorizedPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, q: Tensor) -> Tensor:
        return self.prior.bits(q)


def test_the_density_conforms_as_a_layer(as_a_user):
    check_layer(Bits(FactorizedPrior(3)), torch.randn(6, 3), shape=(6, 3))


@pytest.mark.parametrize("ord", [1, 2, 3.5, math.inf])
def test_slice_norm_is_the_sum_of_norms_and_flat_at_zero(ord):
    weight = torch.randn(3, 2, 2, 4, dtype=torch.float64)
    weight[0, 1] = 0
    want = sum(np.linalg.norm(weight[i, j].numpy().ravel(), ord) for i in range(3) for j in range(2))
    assert float(slice_norm(weight, ord)) == pytest.approx(want)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(slice_norm(weight, ord), weight)
    assert (grad[0, 1] == 0).all()
    assert (grad[0, 0] != 0).any()
    assert float(slice_norm(weight.detach()[..., 0, 0])) == pytest.approx(
        float(weight.detach()[..., 0, 0].abs().sum())
    )


@pytest.mark.parametrize("name", CASES)
def test_weights_are_rounded_latents_times_the_decoder_of_their_kernel(name):
    net, lat, x = case(name)
    plain = lat.to_plain()
    assert type(plain) is type(net)
    for layer, latent in lat.latents().items():
        want = rows(latent).round() @ lat.decoder(layer)
        torch.testing.assert_close(rows(plain.get_submodule(layer).weight), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lat.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, LatentNet) for module in plain.modules())


def test_layers_of_one_kernel_size_share_a_decoder_and_linear_has_its_own():
    _, lat, _ = case("conv")
    assert lat.decoder("0") is lat.decoder("3")
    assert [tuple(lat.decoder(name).shape) for name in ("0", "5", "6", "8")] == [
        (9, 9),
        (1, 1),
        (3, 3),
        (1, 1),
    ]
    assert lat.decoder("5") is not lat.decoder("8")
    assert [prior.channels for prior in lat.priors.values()] == [9, 1, 3, 1]


def test_a_latent_slice_below_one_half_is_an_empty_kernel_and_is_counted():
    _, lat, _ = case("conv")
    latents = lat.latents()
    with torch.no_grad():
        for latent in latents.values():
            latent.fill_(1.2)
        latents["3"][2, 5] = 0.49
        latents["3"][:, 1] = -0.49
        latents["0"][7] = 0.3
        latents["8"][0] = 0
    plain = lat.to_plain()
    assert (plain[3].weight[2, 5] == 0).all()
    assert (plain[3].weight[2, 4] != 0).any()
    kernels = {"0": (8, 3), "3": (12, 8), "6": (6, 2)}
    slices = sum(a * b for a, b in kernels.values())
    total = sum(latent.numel() for latent in latents.values())
    found = lat.sparsity()
    assert found["slices"] == pytest.approx((1 + 12 + 3) / slices)
    assert found["in_channels"] == pytest.approx(1 / (3 + 8 + 2))
    assert found["out_channels"] == pytest.approx(1 / (8 + 12 + 6))
    assert found["weights"] == pytest.approx((9 * 16 + 48) / total)
    assert case("linear")[1].sparsity()["slices"] == 0


def test_the_gradient_passes_the_rounding_straight_through():
    _, lat, x = case("conv")
    plain = lat.eval().to_plain()
    lat(x).square().sum().backward()
    plain(x).square().sum().backward()
    for layer, latent in lat.latents().items():
        decoder = lat.decoder(layer)
        want = rows(plain.get_submodule(layer).weight.grad) @ decoder.T
        torch.testing.assert_close(rows(latent.grad), want.detach(), rtol=1e-3, atol=1e-3)
    want = rows(lat.latents()["6"]).round().T @ rows(plain[6].weight.grad)
    torch.testing.assert_close(lat.decoder("6").grad, want, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in lat.prior_parameters())
    assert {id(p) for p in lat.parameters()} == {
        id(p) for p in [*lat.network_parameters(), *lat.prior_parameters()]
    }


@pytest.mark.parametrize("name", CASES)
def test_starting_at_the_weights_with_fine_steps_changes_nothing(name):
    net, lat, x = case(name, start="weights", boundary=1e4)
    torch.testing.assert_close(lat.eval()(x), net.eval()(x), rtol=1e-3, atol=1e-3)
    _, coarse, _ = case(name, start="weights", boundary=2)
    for layer, latent in coarse.latents().items():
        group = [v for n, v in coarse.latents().items() if coarse.decoder(n) is coarse.decoder(layer)]
        assert max(float(v.detach().abs().max()) for v in group) == pytest.approx(2)
        torch.testing.assert_close(
            latent.detach() * coarse.decoder(layer)[0, 0], net.get_submodule(layer).weight
        )
    _, given, _ = case(name, start="weights", step=0.25)
    assert all(torch.equal(d, 0.25 * torch.eye(len(d))) for d in given.decoders.values())


@pytest.mark.parametrize("boundary", [1, 3, 10])
def test_a_random_start_has_the_spread_of_he(boundary):
    net = nn.Sequential(nn.Conv2d(40, 80, 3), nn.Conv2d(80, 50, 3, groups=2), nn.Conv2d(50, 100, 1), nn.Linear(300, 200), nn.Linear(200, 50))  # fmt: skip
    plain = LatentNet(net, boundary=boundary, generator=torch.Generator().manual_seed(0)).to_plain()
    for layer in plain:
        fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


def test_the_start_follows_its_generator_and_touches_no_other():
    before = torch.get_rng_state()
    lats = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        lat = LatentNet(CASES["conv"][0](), generator=generator) if not lats else LatentNet(lats[0].net, generator=generator)  # fmt: skip
        if not lats:
            before = torch.get_rng_state()
        lats.append(lat)
    lat.rate_loss(generator=torch.Generator().manual_seed(0))
    lat.to_compact()
    assert torch.equal(torch.get_rng_state(), before)
    for own, other in zip(*(each.parameters() for each in lats), strict=True):
        if own.ndim > 1:
            assert torch.equal(own, other)


def test_the_rate_is_bits_a_slice_noisy_in_training_and_rounded_in_evaluation():
    _, lat, _ = case("conv")
    n = sum(rows(latent).shape[0] for latent in lat.latents().values())
    total = 0.0
    for layer, latent in lat.latents().items():
        prior = lat.priors[next(group for group, names in lat._groups.items() if layer in names)]
        total += float(prior.bits(rows(latent).round()).sum().detach())
    assert float(lat.eval().rate_loss()) == pytest.approx(total / n, rel=1e-5)
    draws = torch.tensor([float(lat.train().rate_loss().detach()) for _ in range(40)])
    assert draws.std() > 0
    grid = torch.linspace(-0.5, 0.5, 41)[:-1] + 1 / 80  # the mean over noise, by quadrature
    total = 0.0
    for layer, latent in lat.latents().items():
        prior = lat.priors[next(group for group, names in lat._groups.items() if layer in names)]
        total += sum(float(prior.bits(rows(latent) + u).sum().detach()) for u in grid) / len(grid)
    assert abs(float(draws.mean()) - total / n) < 5 * float(draws.std()) / math.sqrt(40)
    lat.rate_loss().backward()
    assert all((p.grad != 0).any() for p in lat.prior_parameters())
    assert lat.decoder("0").grad is None


def test_the_slice_loss_leaves_kernels_of_one_entry_alone():
    _, lat, _ = case("conv")
    want = sum(float(slice_norm(lat.latents()[name])) for name in ("0", "3", "6"))
    assert float(lat.slice_loss()) == pytest.approx(want, rel=1e-5)
    assert float(case("linear")[1].slice_loss()) == 0


@pytest.mark.parametrize("name", CASES)
def test_skipping_zero_channels_changes_nothing(name):
    _, lat, x = case(name)
    with torch.no_grad():
        for latent in lat.latents().values():
            latent[::2] = 0.1
            latent[:, 1::2] = 0.2
            latent[-1, 0] = 1.0
    plain, compact = lat.to_plain().eval(), lat.to_compact().eval()
    torch.testing.assert_close(compact(x), plain(x), rtol=1e-5, atol=1e-6)
    small = [module for module in compact.modules() if type(module).__name__ == "CompactLayer"]
    assert len(small) == {"conv": 4, "conv1d": 2, "conv3d": 1, "linear": 1, "tied": 2}[name]
    if name == "conv1d":
        exported = torch.export.export(compact, (x,)).module()
        torch.testing.assert_close(exported(x), plain(x), rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(compact)
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(compact.state_dict())
    assert torch.equal(twin(x), compact(x))


def macs(net: nn.Module, x: Tensor) -> dict[str, int]:
    """Return the multiplications of each layer for a batch."""
    found = {}

    def count(name):
        def hook(module, args, out):
            found[name.removesuffix(".layer")] = out[:, 0].numel() * module.weight.numel()

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count(name))
    net(x)
    return found


def test_macs_fall_by_what_is_skipped():
    _, lat, x = case("conv")
    with torch.no_grad():
        for latent in lat.latents().values():
            latent.fill_(1.0)
        lat.latents()["3"][:4] = 0  # 8 of 12 outputs
        lat.latents()["3"][:, :2] = 0  # 6 of 8 inputs
        lat.latents()["5"][:, :4] = 0  # 8 of 12 inputs
        lat.latents()["8"][:] = 0  # of a layer of zeros one entry stays
    whole, less = macs(lat.to_plain().eval(), x), macs(lat.to_compact().eval(), x)
    assert less == whole | {
        "3": whole["3"] * 48 // 96,
        "5": whole["5"] * 8 // 12,
        "8": whole["8"] // (5 * 48),
    }


def untraceable(*_, **__):
    """Stands for what other libraries put in the place of a torch function: it looks at its arguments."""
    raise AssertionError


def test_results_are_ordinary_networks_that_need_no_posterity(monkeypatch):
    _, lat, x = case("conv")
    monkeypatch.setattr(torch, "index_select", untraceable)
    with torch.no_grad():
        lat.latents()["3"][:4] = 0
    for net in (
        lat.to_plain().eval(),
        lat.to_compact().eval(),
        LatentNet.decompress(conv(), lat.compress()).eval(),
    ):
        saved = pickle.dumps(net)
        named = [arg for _, arg, _ in pickletools.genops(saved) if isinstance(arg, str)]
        assert not any("posterity" in arg for arg in named)
        assert torch.equal(pickle.loads(saved)(x), net(x))


def test_a_latent_network_saves_copies_and_conforms(as_a_user):
    net, lat, x = case("conv")
    dead = [name for name, _ in lat.named_parameters() if name.startswith("priors")]
    check_layer(lat, x, shape=(4, 5), dead=dead)
    file = io.BytesIO()
    torch.save(lat.state_dict(), file)
    file.seek(0)
    torch.manual_seed(9)
    twin = LatentNet(net)
    assert twin.compress() != lat.compress()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.compress() == lat.compress()


def test_the_network_that_is_given_is_left_alone(as_a_user):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    def look(net: nn.Module, x: Tensor) -> Tensor:
        lat = LatentNet(net, start="weights", boundary=1000, generator=torch.Generator().manual_seed(0))
        lat(x)
        return torch.cat([p.detach().flatten() for p in lat.to_plain().parameters()])

    check_instrument(look, net, torch.randn(3, 1, 4, 4))


def test_keyword_arguments_hooks_and_modes_reach_the_network():
    net, lat, x = case("tied")
    torch.testing.assert_close(lat(x, scale=2.0), 2 * lat(x))
    seen = []
    lat.net.twice.register_forward_hook(lambda module, args, out: seen.append(module.training))
    lat.eval()(x)
    lat.train()(x)
    assert seen == [False, False, True, True]
    assert lat.net.embed.weight is lat.net.head.weight
    assert lat.net.frozen.weight.requires_grad
    assert not net.frozen.weight.requires_grad


def test_only_named_layers_are_decoded():
    net, lat, _ = case("conv", layers=["3", "8"])
    assert list(lat.latents()) == ["3", "8"]
    assert torch.equal(lat.to_plain()[0].weight, net[0].weight)
    assert torch.equal(LatentNet.decompress(net, lat.compress())[0].weight, net[0].weight)


def test_a_short_training_shrinks_the_file():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 12, generator=generator)
    y = (x[:, 0] > 0).long()
    lat = LatentNet(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 2)), generator=generator)
    before = lat.sizes()["latents"]
    optimizers = (
        torch.optim.Adam(lat.network_parameters(), 0.1),
        torch.optim.Adam(lat.prior_parameters(), 0.05),
    )
    for _ in range(60):
        loss = F.cross_entropy(lat(x), y) + 1.0 * lat.rate_loss(generator=generator)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert lat.sizes()["latents"] < 0.6 * before
    assert (lat(x).argmax(1) == y).float().mean() > 0.9


def test_the_start_is_as_small_as_the_paper_says():
    prior = FactorizedPrior(4000, generator=torch.Generator().manual_seed(0))
    for p in prior.parameters():
        assert float(p.detach().std()) == pytest.approx(0.01, rel=0.05)
    net = nn.Sequential(nn.Conv2d(30, 60, 3), nn.Conv2d(60, 15, 3), nn.Linear(80, 200))
    lat = LatentNet(net, boundary=4, generator=torch.Generator().manual_seed(0))
    ends = {name: float(latent.detach().round().abs().max()) for name, latent in lat.latents().items()}
    assert ends["0"] == ends["2"] == 4  # B + 1/2 of the layer of 60 outputs; for 15, four times the variance
    assert ends["1"] == round(math.sqrt(4 * (9**2 - 1) + 1) / 2)
    assert float(lat.decoder("2")) == pytest.approx(math.sqrt(24 / 200 / (9**2 - 1)))


def test_the_noise_of_training_is_uniform_between_halves(monkeypatch):
    lat = LatentNet(nn.Linear(100, 100))
    seen = []
    monkeypatch.setattr(FactorizedPrior, "bits", lambda self, q: seen.append(q.detach()) or q)
    lat.rate_loss(generator=torch.Generator().manual_seed(0))
    noise = seen[0].flatten() - lat.latents()[""].detach().flatten()
    assert noise.abs().max() <= 0.5 + 1e-5
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(math.sqrt(1 / 12), rel=0.03)


def test_a_network_of_zeros_is_where_it_starts():
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.weight)
    lat = LatentNet(net, start="weights")
    assert (lat.latents()[""] == 0).all()
    assert torch.equal(lat.to_plain().weight, net.weight)
