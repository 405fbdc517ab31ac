"""Masks and gradients against their formulas, budgets, plain and compact networks, and models that nobody here wrote."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.compression import HARP, pack_sparse, robust_loss
from posterity.testing import check_instrument, check_layer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def dense(*widths):
    torch.manual_seed(1)
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def by_sorting(score, share, granularity="weight"):
    """The mask from a full stable sort: the first in it go."""
    order = sorted(range(score.numel()), key=lambda i: abs(score.flatten()[i].item()))
    n = score.numel()
    gone = math.floor((1 - share) * n) if granularity == "weight" else n - max(1, round(share * n))
    mask = torch.ones(n, dtype=torch.float64)
    mask[order[:gone]] = 0
    return mask.view_as(score)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_masks_rates_and_gradients_are_those_of_the_formulas(granularity):
    net, x, y = convolutions().eval(), drawn(7, 2, 6, 6), torch.arange(7) % 3
    rate, alpha = 0.3, 0.2
    harp = HARP(net, rate, alpha=alpha, start=0.55, granularity=granularity)
    expected = ["0", "3", "7"] if granularity == "weight" else ["3", "7"]
    assert list(harp.scores()) == expected
    loss = F.cross_entropy(harp(x), y)
    loss.backward()
    masked, masks = copy.deepcopy(net), harp.masks()
    for name in expected:
        weight = net.get_submodule(name).weight.detach()
        k = alpha * rate + (1 - alpha * rate) * torch.sigmoid(harp.rate_logits()[name].detach())
        assert k.item() == pytest.approx(0.55, abs=1e-12)
        size = weight if granularity == "weight" else weight.abs().transpose(0, 1).flatten(1).sum(1)
        shape = weight.shape if granularity == "weight" else (1, weight.shape[1], *[1] * (weight.ndim - 2))
        fan_in = weight[0].numel()
        first = (math.sqrt(6 / fan_in) * size / size.abs().max()).view(shape)
        torch.testing.assert_close(harp.scores()[name].detach(), first)
        assert torch.equal(masks[name], by_sorting(first, k.item(), granularity))
        masked.get_submodule(name).weight.data *= masks[name]
    torch.testing.assert_close(F.cross_entropy(masked(x), y), loss)
    F.cross_entropy(masked(x), y).backward()
    for name in expected:
        weight = net.get_submodule(name).weight.detach()
        g = masked.get_submodule(name).weight.grad * weight
        if granularity == "channel":
            g = g.transpose(0, 1).flatten(1).sum(1).view(1, -1, *[1] * (weight.ndim - 2))
        torch.testing.assert_close(
            harp.scores()[name].grad, g * harp.scores()[name].detach().sign(), rtol=1e-7, atol=1e-10
        )
        s = torch.sigmoid(harp.rate_logits()[name].detach())
        chain = (1 - alpha * rate) * s * (1 - s)
        torch.testing.assert_close(harp.rate_logits()[name].grad, g.sum() * chain, rtol=1e-7, atol=1e-10)


def test_only_scores_rates_and_norms_learn_and_the_given_model_does_not():
    net = convolutions()
    net[1].bias.requires_grad_(False)
    harp = HARP(net, 0.1)
    learning = {name for name, p in harp.named_parameters() if p.requires_grad}
    assert learning == {f"_{kind}.{k}" for kind in ("scores", "logits") for k in range(3)} | {
        "model.1.weight"
    }
    harp(drawn(4, 2, 6, 6)).sum().backward()
    assert harp.model[0].weight.grad is None
    assert int(harp.model[1].num_batches_tracked) == 1
    assert int(net[1].num_batches_tracked) == 0
    assert all(p.grad is None for p in net.parameters())
    assert net[0].weight.requires_grad
    back = harp.to_plain()
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }


def test_without_pruning_the_network_is_the_given_one():
    net, x = convolutions(), drawn(4, 2, 6, 6)
    harp = HARP(net, 0.5)
    with torch.no_grad():
        for logit in harp.rate_logits().values():
            logit.fill_(50.0)
    assert torch.equal(harp(x), net(x))
    assert all(mask.all() for mask in harp.masks().values())


def test_rates_stay_in_their_range_and_the_budget_is_a_weighted_mean():
    net = dense(20, 30, 4).double()
    harp = HARP(net, 0.2, alpha=0.5, start={"0": 0.3, "2": 0.9})
    for value in (-50.0, 50.0):
        with torch.no_grad():
            harp.rate_logits()["0"].fill_(value)
        assert 0.1 <= harp.rates()["0"].item() <= 1
    with torch.no_grad():
        harp.rate_logits()["0"].fill_(math.log((0.3 - 0.1) / 0.9 / (1 - (0.3 - 0.1) / 0.9)))
    expected = (600 * 0.3 + 120 * 0.9) / 720
    assert harp.keep_rate().item() == pytest.approx(expected, abs=1e-12)
    assert harp.compression_loss().item() == pytest.approx(expected / 0.2 - 1, abs=1e-12)
    harp.compression_loss().backward()
    for name, n in (("0", 600), ("2", 120)):
        s = harp.rate_logits()[name].detach().sigmoid()
        assert harp.rate_logits()[name].grad.item() == pytest.approx(
            (n / 720 / 0.2 * 0.9 * s * (1 - s)).item()
        )
    inside = HARP(net, 0.4, start=0.3)
    inside.compression_loss().backward()
    assert inside.compression_loss() == 0
    assert all(r.grad == 0 for r in inside.rate_logits().values())


@pytest.mark.parametrize("start", [0.01, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_kept_numbers_and_nested_masks(start):
    net = dense(13, 17).double()
    with torch.no_grad():
        net[0].weight.copy_((3 * net[0].weight / net[0].weight.abs().max()).round())  # ties
    harp = HARP(net, 0.01, alpha=0.0, start=start)
    k, n = harp.rates()["0"].item(), 13 * 17
    mask = harp.masks()["0"]
    assert int(mask.sum()) == n - math.floor((1 - k) * n)
    assert torch.equal(mask, by_sorting(harp.scores()["0"].detach(), k))
    for _ in range(6):
        with torch.no_grad():
            harp.rate_logits()["0"].add_(0.7)
        more = harp.masks()["0"]
        assert bool((more >= mask).all())
        mask = more


def test_the_start_is_reached_from_above_and_fixed_rates_start_at_the_budget():
    net = dense(20, 30, 4)
    for rate, start in ((0.01, 0.1), (0.1, 0.1), (0.5, 0.75)):
        assert HARP(net, rate).keep_rate().item() == pytest.approx(start, rel=1e-5)
        assert HARP(net, rate, learn_rates=False).keep_rate().item() == pytest.approx(rate, rel=1e-5)
    flat = HARP(net, 0.5, start=0.05)  # the lowest that is allowed: its logit is finite, and can still move
    assert flat.rates()["0"].item() == pytest.approx(0.05 + 0.95 * 0.01, rel=1e-5)
    fixed = HARP(net, 0.2, learn_rates=False, learn_scores=False)
    assert not any(p.requires_grad for n, p in fixed.named_parameters())


def test_masks_are_made_once_a_step_and_anew_when_something_changes(monkeypatch):
    net, x, y = dense(10, 12, 3), torch.rand(8, 10, generator=seeded()), torch.arange(8) % 3
    harp = HARP(net, 0.2)
    made = []
    original = HARP._made
    monkeypatch.setattr(HARP, "_made", lambda self: made.append(1) or original(self))
    optimizer = torch.optim.SGD([p for p in harp.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        robust_loss(harp, x, y, n_steps=4).backward()
        optimizer.step()
        assert len(made) == step + 1
    before = harp.masks()["0"]
    harp.scores()["0"].data = harp.scores()["0"].detach().flip(0)
    assert torch.equal(
        harp.masks()["0"], by_sorting(harp.scores()["0"].detach(), harp.rates()["0"].item()).float()
    )
    assert not torch.equal(harp.masks()["0"], before)
    twin = copy.deepcopy(harp)
    with torch.no_grad():
        twin.rate_logits()["0"].fill_(9.0)
    assert twin.masks()["0"].sum() > harp.masks()["0"].sum()
    harp.load_state_dict(twin.state_dict())
    assert torch.equal(harp.masks()["0"], twin.masks()["0"])
    harp.masks()["0"].zero_()
    assert harp.masks()["0"].any(), "a copy"


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_it_conforms_to_its_kind(as_a_user, granularity):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(),
                        nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3))  # fmt: skip
    x = torch.rand(3, 2, 6, 6, generator=seeded())
    check_layer(HARP(net, 0.5, granularity=granularity), x, shape=(3, 3))


@pytest.mark.parametrize("look", ["to_plain", "to_compact"])
def test_the_given_model_is_left_alone(as_a_user, look):
    net, x = dense(6, 9, 8, 3), torch.rand(5, 6, generator=seeded())

    def result(model, x):
        harp = HARP(model, 0.5, granularity="channel")
        harp(x)
        small = getattr(harp, look)()
        return torch.cat([p.detach().flatten() for p in small.parameters()])

    check_instrument(result, net, x, chooses=True)


def test_the_plain_network_is_the_masked_one():
    net, x = convolutions(), drawn(4, 2, 6, 6)
    harp = HARP(net, 0.2).eval()
    plain = harp.to_plain()
    torch.testing.assert_close(plain(x), harp(x), rtol=1e-12, atol=1e-12)
    assert type(plain) is type(net)
    zeros = plain[0].weight[plain[0].weight == 0]
    assert len(zeros) and not torch.signbit(zeros).any()


class Tied(nn.Module):
    """One module in two places, a weight in two modules, a call by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.again = self.twice
        self.other.weight = self.twice.weight

    def forward(self, x, *, scale=1.0):
        return self.other(self.again(self.twice(self.first(x).relu()).relu()).relu()) * scale


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_shared_weights_have_one_mask(granularity):
    torch.manual_seed(0)
    net, x = Tied().double(), drawn(5, 6)
    before = net(x, scale=2.0)
    harp = HARP(net, 0.5, granularity=granularity)
    assert list(harp.scores()) == (["first", "twice"] if granularity == "weight" else ["twice"])
    plain = harp.to_plain()
    assert plain.other.weight is plain.twice.weight
    torch.testing.assert_close(harp(x, scale=2.0), plain(x, scale=2.0), rtol=1e-12, atol=1e-12)
    assert torch.equal(net(x, scale=2.0), before)
    if granularity == "channel":
        small = harp.to_compact()
        torch.testing.assert_close(small(x, scale=2.0), plain(x, scale=2.0), rtol=1e-12, atol=1e-12)
        assert small.again is small.twice
        assert small.other.layer.weight is small.twice.layer.weight
        assert harp.positions.tolist() == [15], "three times five rows"


def test_a_tied_weight_is_written_once_and_clustered_places_are_packed():
    one, two = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
    one.weight.data[50:] = 0
    two.weight = one.weight
    alone, both = pack_sparse(one), pack_sparse(nn.Sequential(one, two))
    assert len(both) < len(alone) + 200
    assert len(alone) < 4 * 5000 + 500  # a bitmap alone has 1,250


def untraceable(*_, **__):
    """Stands for what other libraries put in the place of a torch function: it looks at its arguments."""
    raise AssertionError


def test_compact_is_plain_with_fewer_parameters_and_runs_without_posterity(monkeypatch):
    net, x = convolutions().eval(), drawn(4, 2, 6, 6)
    harp = HARP(net, 0.4, granularity="channel").eval()
    with pytest.raises(ValueError, match="must have had an input"):
        harp.keep_rate()
    harp(x)
    assert harp.positions.tolist() == [4 * 4, 4]
    macs = [4 * 4 * 6 * 5 * 9, 4 * 5 * 3]
    rates = [r.item() for r in harp.rates().values()]
    expected = sum(m * r for m, r in zip(macs, rates, strict=True)) / sum(macs)
    assert harp.keep_rate().item() == pytest.approx(expected)
    plain, small = harp.to_plain(), harp.to_compact()
    torch.testing.assert_close(small(x), plain(x), rtol=1e-12, atol=1e-12)
    kept = harp.masks()["3"].flatten()
    assert small[3].layer.weight.shape == (5, int(kept.sum()), 3, 3)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    monkeypatch.setattr(torch, "index_select", untraceable)
    file = io.BytesIO()
    torch.save(small, file)
    assert b"posterity" not in file.getvalue()
    file.seek(0)
    for twin in (
        torch.load(file, weights_only=False),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert torch.equal(twin(x), small(x))
    monkeypatch.undo()
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))
    small(x).sum().backward()
    assert small[3].layer.weight.grad is not None


def test_attention_and_an_encoder_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    x = torch.randn(2, 7, 5, generator=seeded())
    harp = HARP(net, 0.3)
    assert "1.layers.1.self_attn.out_proj" in harp.scores()
    for mode in (True, False):
        torch.testing.assert_close(harp.train(mode)(x), harp.to_plain()(x), rtol=1e-5, atol=1e-5)
    channels = HARP(net, 0.5, granularity="channel")
    assert list(channels.scores()) == ["2"], "what attention and an encoder layer read themselves stays whole"
    with torch.no_grad():
        torch.testing.assert_close(
            channels.eval().to_compact()(x), channels.to_plain()(x), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(
        ValueError, match=r"'1\.layers\.0\.linear1', whose weight a TransformerEncoderLayer reads"
    ):
        HARP(net, 0.5, granularity="channel", layers=["1.layers.0.linear1"])


def test_a_network_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=24, max_position_embeddings=16, num_labels=3)  # fmt: skip
    net = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(20, (4, 6), generator=seeded())
    for granularity in ("weight", "channel"):
        harp = HARP(net, 0.3, granularity=granularity)
        out = harp(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        out.sum().backward()
        assert all(s.grad is not None for s in harp.scores().values())
        plain = harp.to_plain()
        torch.testing.assert_close(plain(input_ids=ids).logits, out, rtol=1e-5, atol=1e-5)
        assert type(plain) is type(net)
    torch.testing.assert_close(harp.to_compact()(input_ids=ids).logits, out, rtol=1e-5, atol=1e-5)
