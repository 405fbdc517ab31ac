"""DFPC on networks of every shape: silenced channels are pruned ones, and scores are explicit matrices."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.compression import channel_saliencies, data_flow_couplings, prune_channels, shrink
from posterity.testing import check_instrument


def conv(a, b, k=3, **options):
    return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(b))


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem, self.a, self.b = conv(3, width), conv(width, width, stride=2), conv(width, width)
        self.short, self.c, self.d = conv(width, width, 1, stride=2), conv(width, width), conv(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = F.relu(self.b(self.a(x).relu_()) + self.short(x))
        y = self.d(F.relu(self.c(x)))
        y += x
        return self.head(y.relu().mean((2, 3)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(5 + 4 * k), nn.ReLU(), nn.Conv2d(5 + 4 * k, 4, 3, padding=1))
            for k in range(3)
        )
        self.down, self.head = nn.Conv2d(17, 8, 1), nn.Linear(8 * 16, 4)

    def forward(self, x):
        maps = [self.norm(self.stem(x))]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        x = F.avg_pool2d(self.down(torch.cat(maps, dim=-3)), 4)
        return self.head(x.flatten(1))


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.deep = conv(3, 6), conv(6, 12, 1), conv(12, 24, groups=12)
        self.gate, self.back = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 5, 1), nn.ReLU(), nn.Conv2d(5, 24, 1)),
            nn.Conv2d(24, 6, 1),
        )
        self.last, self.head = nn.PReLU(6), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        y = F.relu(self.deep(F.relu6(self.up(x))))
        x = x + self.back(y * self.gate(y).sigmoid())
        b, c = x.shape[:2]
        return self.head(self.last(x).amax((2, 3)).view(b, c))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 5), conv(5, 8), conv(8, 10)
        self.up, self.d, self.e, self.out = (
            nn.ConvTranspose2d(10, 6, 2, 2),
            conv(14, 8),
            conv(13, 5),
            nn.Conv2d(5, 2, 1),
        )

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = F.relu(self.c(F.max_pool2d(b, 2)))
        d = F.relu(self.d(torch.cat([self.up(c), b], 1)))
        d = F.interpolate(d, size=a.shape[-2:], mode="bilinear")
        return self.out(F.relu(self.e(torch.cat([d, a], 1))))


class Odd(nn.Module):
    """What cannot be pruned beside what can: groups, group norm, written sizes, attention, LSTM, splits."""

    def __init__(self):
        super().__init__()
        self.a, self.group, self.b = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.Conv2d(8, 12, 3, padding=1),
        )
        self.norm, self.c, self.shuffle, self.d = (
            nn.GroupNorm(3, 12),
            nn.Conv2d(12, 8, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(2, 6, 1),
        )
        self.e, self.f, self.g = nn.Conv2d(6, 6, 1), nn.Linear(3 * 256, 8), nn.Linear(8, 8)
        self.attend, self.lstm, self.h = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LSTM(8, 6, batch_first=True),
            nn.Linear(6, 8),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.d(self.shuffle(self.c(F.relu(self.norm(self.b(self.group(self.a(x))))))))
        one, two = self.e(x).chunk(2, 1)
        x = self.g(F.relu(self.f((one * two).reshape(-1, 3 * 256))))[:, None].repeat(1, 5, 1)
        x = x + self.attend(x, x, x)[0]
        return self.head(F.relu(self.h(self.lstm(x)[0][:, -1])))


class Words(nn.Module):
    """Embedding and output share their weight; the layers in between are applied twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down, self.out = (
            nn.Embedding(11, 6),
            nn.Linear(6, 9),
            nn.Linear(9, 6),
            nn.Linear(6, 11, bias=False),
        )
        self.out.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(x)))
        return self.out(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)

    def forward(self, x):
        return self.body(x.flatten(2).transpose(1, 2)[..., :1].expand(-1, -1, 8))


NETS = {
    "residual": Residual,
    "dense": Dense,
    "mobile": Mobile,
    "unet": UNet,
    "odd": Odd,
    "words": Words,
    "encoder": Encoder,
    "lenet": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.Conv2d(5, 6, 3), nn.Flatten(), nn.Linear(150, 7), nn.ReLU(), nn.Linear(7, 4)),
    "series": lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Flatten(2), nn.SiLU(), nn.ConvTranspose1d(6, 5, 3), nn.Flatten(), nn.Linear(320, 2)),
}  # fmt: skip


def make(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETS[name]()
        x = torch.rand(2, 3, 16, 16)
        if name == "words":
            x = torch.randint(11, (2, 7))
        if name == "series":
            x = torch.rand(2, 3, 64)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.data.uniform_(0.5, 1.5)
    return net.eval(), x


def prune(net, x, amount=0.4, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune_channels(net, x, amount, **options)


def silenced(net, small):
    """Return the full network with all that belongs to a removed channel set to 0."""
    full = copy.deepcopy(net)
    for name, sides in small.plan.items():
        module = full.get_submodule(name)
        if "out" not in sides:
            continue
        if isinstance(module, nn.Embedding):
            lost = sorted(set(range(module.embedding_dim)) - set(sides["out"]))
            module.weight.data[:, lost] = 0
            continue
        n = (
            len(module.bias)
            if getattr(module, "bias", None) is not None
            else getattr(module, "out_channels", 0) or len(module.weight)
        )
        lost = sorted(set(range(n)) - set(sides["out"]))
        axis = 1 if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d) else 0
        module.weight.data.index_fill_(axis, torch.tensor(lost, dtype=torch.long), 0)
        if getattr(module, "bias", None) is not None:
            module.bias.data[lost] = 0
    return full


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NETS),
        *((name, {"method": "l1", "n_steps": 3}) for name in ("residual", "mobile", "unet", "odd")),
    ],
)
def test_a_pruned_network_is_the_full_one_with_those_channels_silenced(name, options):
    net, x = make(name)
    before = copy.deepcopy(net.state_dict())
    small = prune(net, x, **options)
    torch.testing.assert_close(small.model(x), silenced(net, small)(x), rtol=1e-5, atol=1e-5)
    assert small.params[1] < small.params[0] and sum(map(len, small.kept)) < sum(
        c.n_channels for c in small.couplings
    )
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", NETS)
def test_a_pruned_network_saves_loads_copies_exports_and_says_its_shapes(name):
    net, x = make(name)
    small = prune(net, x, 0.5)
    expected = small.model(x)
    file = io.BytesIO()
    torch.save({"plan": small.plan, "state_dict": small.model.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    loaded = shrink(make(name, seed=1)[0], stored["plan"])
    loaded.load_state_dict(stored["state_dict"])
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert repr(loaded) == repr(small.model)
    torch.testing.assert_close(copy.deepcopy(small.model)(x), expected, rtol=0, atol=0)
    whole = io.BytesIO()
    torch.save(small.model, whole)
    whole.seek(0)
    torch.testing.assert_close(torch.load(whole, weights_only=False)(x), expected, rtol=0, atol=0)
    if name in ("mobile", "odd", "words", "encoder"):
        torch.testing.assert_close(torch.export.export(small.model, (x,)).module()(x), expected)
    for module in small.model.modules():  # what repr says is what is there
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


@pytest.mark.parametrize("name", ["dense", "unet", "odd", "encoder", "series"])
def test_pruning_all_leaves_one_channel_a_coupling_that_still_runs(name):
    net, x = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        couplings = data_flow_couplings(net, x)
    most = sum(c.n_channels - 1 for c in couplings)
    small = prune(net, x, most)
    assert [len(kept) for kept in small.kept] == [1] * len(couplings)
    torch.testing.assert_close(small.model(x), silenced(net, small)(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"amount must be at most {most} channels"):
        prune(net, x, most + 1)
    same = prune(net, x, 0)
    assert same.plan == {} and same.params[0] == same.params[1]
    torch.testing.assert_close(same.model(x), net(x), rtol=0, atol=0)


def test_couplings_of_residual_networks_are_those_by_hand():
    net, x = make("residual")
    found = {c.feeds: (c.reads, c.between, c.n_channels) for c in data_flow_couplings(net, x)}
    assert found == {
        ("stem.0",): (("a.0", "short.0"), ("stem.1",), 6),
        ("a.0",): (("b.0",), ("a.1",), 6),
        ("b.0", "short.0", "d.0"): (("c.0", "head"), ("b.1", "short.1", "d.1"), 6),
        ("c.0",): (("d.0",), ("c.1",), 6),
    }


def test_couplings_split_by_offset_where_maps_are_concatenated():
    net, x = make("dense")
    found = {c.feeds: (c.reads, c.n_channels) for c in data_flow_couplings(net, x)}
    assert found == {
        ("stem",): (("layers.0.2", "layers.1.2", "layers.2.2", "down"), 5),
        ("layers.0.2",): (("layers.1.2", "layers.2.2", "down"), 4),
        ("layers.1.2",): (("layers.2.2", "down"), 4),
        ("layers.2.2",): (("down",), 4),
        ("down",): (("head",), 8),
    }


def test_what_stays_is_told_in_one_warning_by_operation_and_layer():
    net, x = make("odd")
    with pytest.warns(UserWarning, match="channels stay") as caught:
        couplings = data_flow_couplings(net, x)
    (text,) = [str(w.message) for w in caught if "channels stay" in str(w.message)]
    for part in ("conv2d in 'group' (a)", "group_norm in 'norm' (b)", "pixel_shuffle in 'shuffle' (c)",
                 "chunk of channels in the model itself (e)", "repeat in the model itself (g)"):  # fmt: skip
        assert part in text
    assert [c.feeds for c in couplings] == [("d",), ("f",), ("h",)]


def unrolled(layer, shape):
    """Return the matrix of a layer without bias, (outputs, inputs), from an identity basis."""
    basis = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    layer = copy.deepcopy(layer).double()
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.zero_()
    return layer(basis).detach().flatten(1).T.abs()


def test_scores_are_the_explicit_matrices_of_a_chain_and_bound_what_is_measured():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, stride=2),
        nn.BatchNorm2d(5),
        nn.LeakyReLU(0.1),
        nn.Conv2d(5, 3, 3, padding=1),
    ).eval()
    norm = net[1]
    norm.weight.data.uniform_(-1, 1), norm.running_var.data.uniform_(0.5, 2)
    net[0].bias.data.zero_(), net[3].bias.data.zero_()
    x = torch.rand(1, 2, 6, 6)
    (score,) = channel_saliencies(net, x)
    a, b = unrolled(net[0], torch.Size((2, 6, 6))), unrolled(net[3], torch.Size((5, 3, 3)))
    scale = (norm.weight.double().abs() / (norm.running_var.double() + norm.eps).sqrt()).detach()
    expected = [scale[c] * (b[:, 9 * c : 9 * c + 9] @ a[9 * c : 9 * c + 9]).sum() for c in range(5)]
    torch.testing.assert_close(score, torch.stack(expected), rtol=1e-10, atol=0)
    inputs = 2 * torch.rand(64, 2, 6, 6) - 1
    with torch.no_grad():
        inner = net[:3](inputs)
        for c in range(5):
            lost = inner.clone()
            lost[:, c] = 0
            change = (net[3](inner) - net[3](lost)).abs().flatten(1).sum(1)
            assert (change <= score[c]).all() and (change > 1e-3 * score[c]).any()


def test_only_layers_that_come_later_read_what_a_residual_block_adds():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.two, self.head = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(27, 2)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.two(torch.sigmoid(self.one(x)))
            return self.head(F.max_pool2d(x, 2, 1, 0).flatten(1)) if x.shape[-1] == 4 else None

    net = Block().eval()
    stream, inner = channel_saliencies(net, torch.rand(1, 1, 4, 4))
    stem, one = unrolled(net.stem, torch.Size((1, 4, 4))), unrolled(net.one, torch.Size((3, 4, 4)))
    two, head = unrolled(net.two, torch.Size((4, 4, 4))), unrolled(net.head, torch.Size((27,)))
    windows = 4 * unrolled(nn.AvgPool2d(2, 1), torch.Size((3, 4, 4)))
    seen = head @ windows
    expected = [
        sum((m[:, 16 * c : 16 * c + 16] @ w[16 * c : 16 * c + 16]).sum() for m, w in ((one, stem), (seen, stem), (seen, two)))
        for c in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(stream, torch.stack(expected), rtol=1e-10, atol=0)
    expected = [0.25 * (two[:, 16 * c : 16 * c + 16] @ one[16 * c : 16 * c + 16]).sum() for c in range(4)]
    torch.testing.assert_close(inner, torch.stack(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AdaptiveMaxPool2d((2, 3)),
    ],
)
def test_the_bound_of_a_max_pool_is_the_sum_of_each_window(pool):
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), pool, nn.Conv2d(2, 1, 1, bias=False))
    x = torch.zeros(1, 1, 5, 7)
    score = (
        channel_saliencies(net, x)[0]
        / (net[0].weight.abs() * net[2].weight.abs().movedim(1, 0)).flatten().double()
    )
    pixels = torch.eye(35).reshape(35, 1, 5, 7)
    low = pool(pixels)  # 1 where a window holds the pixel
    torch.testing.assert_close(score, low.sum().double().expand(2), rtol=1e-6, atol=0)


def test_scores_do_not_see_how_a_channel_is_scaled_and_follow_its_place():
    net, x = make("residual")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval(), module.bias.data.zero_()
    usual, norms = channel_saliencies(net, x), channel_saliencies(net, x, method="l1")
    scaled = copy.deepcopy(net)
    scaled.c[1].weight.data[2] *= 8  # the next layer reads it through ReLU
    scaled.d[0].weight.data[:, 2] /= 8
    scaled.c[0].weight.data[3] *= 4
    scaled.d[0].weight.data[:, 3] /= 4
    place = [c.feeds for c in data_flow_couplings(net, x)].index(("c.0",))
    torch.testing.assert_close(channel_saliencies(scaled, x)[place], usual[place], rtol=1e-6, atol=0)
    assert channel_saliencies(scaled, x, method="l1")[place][3] > 3 * norms[place][3]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    turned = copy.deepcopy(net)
    for tensor in (turned.c[0].weight, *turned.c[1].state_dict(keep_vars=True).values()):
        if tensor.ndim:
            tensor.data.copy_(tensor.data[order])
    turned.d[0].weight.data.copy_(turned.d[0].weight.data[:, order])
    torch.testing.assert_close(channel_saliencies(turned, x)[place], usual[place][order], rtol=1e-6, atol=0)


def test_a_channel_that_nobody_reads_scores_nothing_and_goes_first_without_a_trace():
    net, x = make("residual")
    net = net.double()
    for layer in (net.c[0], net.head):
        layer.weight.data[:, 4] = 0
    place = [c.feeds for c in data_flow_couplings(net, x.double())].index(("b.0", "short.0", "d.0"))
    assert channel_saliencies(net, x.double())[place][4] == 0
    small = prune(net, x.double(), 1)
    assert small.kept[place].tolist() == [0, 1, 2, 3, 5]
    torch.testing.assert_close(small.model(x.double()), net(x.double()), rtol=1e-12, atol=1e-13)


def test_counts_equal_a_recount():
    net, x = make("lenet")
    small = prune(net, x, 0.3)
    assert small.params == tuple(sum(p.numel() for p in m.parameters()) for m in (net, small.model))
    for full, macs in zip((net, small.model), small.macs, strict=True):
        a, b, c, d = (full[k] for k in (0, 2, 4, 6))
        expected = a.weight.numel() * 14 * 14 + b.weight.numel() * 25 + c.weight.numel() + d.weight.numel()
        assert macs == expected


def test_options_keep_what_they_promise():
    net, x = make("unet")
    small = prune(net, x, 0.3, round_to=4, min_channels=3, ignore=["up"])
    for coupling, kept in zip(small.couplings, small.kept, strict=True):
        assert len(kept) >= 3 and (len(kept) % 4 == 0 or len(kept) == coupling.n_channels)
        assert not any(layer.startswith("up") for layer in coupling.feeds) or len(kept) == coupling.n_channels
    net, x = make("residual")
    small = prune(net, x, 7, scope="uncoupled")
    for coupling, kept in zip(small.couplings, small.kept, strict=True):
        assert len(coupling.feeds) == len(coupling.reads) == 1 or len(kept) == coupling.n_channels
    a, b = (prune(net, x, 0.3, method="random", generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert a.plan == b.plan
    some = data_flow_couplings(net, x)[2:0:-1]
    every = channel_saliencies(net, x)
    for one, other in zip(channel_saliencies(net, x, some), every[2:0:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_fine_tuning_is_called_after_each_step_on_a_smaller_network():
    net, x = make("residual")
    net.train()
    sizes = []

    def finetune(model):
        sizes.append(sum(p.numel() for p in model.parameters()))
        model(x).square().mean().backward()
        torch.optim.SGD(model.parameters(), 1e-3).step()

    small = prune(net, x, 0.5, n_steps=3, finetune=finetune)
    assert len(sizes) == 3 and sizes[0] > sizes[1] > sizes[2] == small.params[1]
    assert small.model.training and all(m.training for m in small.model.modules())
    again = shrink(net, small.plan)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.model.parameters()]


def test_keeps_frozen_parameters_ties_hooks_and_dtypes():
    net, x = make("residual")
    net.a[0].weight.requires_grad_(False)
    calls = []
    net.c.register_forward_hook(lambda *_: calls.append(1))
    small = prune(net.bfloat16(), x.bfloat16(), 0.4)
    assert not small.model.a[0].weight.requires_grad and small.model.b[0].weight.requires_grad
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    calls.clear()
    small.model(x.bfloat16())
    assert calls == [1]
    words, tokens = make("words")
    small = prune(words, tokens, 0.3).model
    assert small.out.weight is small.embed.weight and small.embed.embedding_dim == small.out.in_features


def test_conforms_to_its_kind(as_a_user):
    net, x = make("mobile")
    check_instrument(lambda net, x: torch.cat(channel_saliencies(net, x)), net, x)

    def pruned(net, x):
        small = prune_channels(net, x, 5, method="l1").model
        return torch.cat([p.detach().flatten() for p in small.parameters()])

    check_instrument(pruned, *make("lenet"), chooses=True)
