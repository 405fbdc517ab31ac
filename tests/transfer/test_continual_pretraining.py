"""Units, importance, soft masks and contrast of DAS against central differences, closed forms and surgery by hand."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.testing import check_instrument
from posterity.testing._low_precision import check_low_precision
from posterity.transfer import (
    Units,
    find_units,
    integration_loss,
    mask_tokens,
    merge_importance,
    normalize_importance,
    proxy_loss,
    soft_mask_gradients,
    unit_importance,
    unit_scales,
)

WORDS = 30


class Model(nn.Module):
    """Words, layers of torch, words: logits and hidden states."""

    def __init__(self, dropout=0.0, n_layers=2, hidden=12):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, hidden, dropout, batch_first=True) for _ in range(n_layers)
        )

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        return x @ self.words.weight.T, x


def made(make, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args, **options)


def texts(n=4, length=6, seed=0):
    ids = torch.randint(5, WORDS, (n, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def squared(model, batch):
    """A loss without chance: of predicting each token by itself."""
    logits = model(batch["input_ids"], batch["attention_mask"])[0]
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())


def transformers_models():
    import transformers as t

    sizes = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
    yield t.BertForMaskedLM(t.BertConfig(**sizes))
    yield t.RobertaForMaskedLM(t.RobertaConfig(**sizes))
    yield t.DistilBertForMaskedLM(t.DistilBertConfig(vocab_size=WORDS, dim=8, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=16))  # fmt: skip
    yield t.GPT2LMHeadModel(t.GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0))  # fmt: skip


@pytest.fixture(scope="module")
def known():
    """A model of each kind in eval mode, with a function that gives its hidden states."""
    found = [made(lambda: list(transformers_models()))][0]
    return [(m.eval(), lambda m, b: m(**b, output_hidden_states=True).hidden_states[-1]) for m in found] + [
        (made(Model, hidden=32).eval(), lambda m, b: m(**b)[1])
    ]


def test_every_layer_has_its_heads_and_neurons(known):
    for model, _ in known:
        assert [units.n_units for units in find_units(model)] == [2, 32, 8] * 2
        assert [units.n_units for units in find_units(model, ("output", "heads"))] == [8, 2] * 2
        assert all(units.width == {2: 8, 32: 32, 8: 8}[units.n_units] for units in find_units(model))


def projection_of(units):
    """Return the weight (d, d) of the projection behind heads, so that columns are inputs."""
    held = units.site.out_proj if isinstance(units.site, nn.MultiheadAttention) else units.site
    return held.weight.data.T if type(held).__name__ == "Conv1D" else held.weight.data


def test_no_scale_for_a_head_is_no_columns_of_its_projection(known):
    for model, hidden in known:
        units = find_units(model, ("heads",))
        with torch.no_grad():
            before = hidden(model, texts())
            with unit_scales(units, {units[0].name: torch.tensor([1.0, 0.0])}):
                scaled = hidden(model, texts())
            cut = copy.deepcopy(model)
            projection_of(find_units(cut, ("heads",))[0])[:, 4:] = 0
            torch.testing.assert_close(scaled, hidden(cut, texts()))
            assert not torch.allclose(scaled, before)
            assert torch.equal(hidden(model, texts()), before)


def test_a_neurons_scale_multiplies_its_row_of_weight_and_bias(known):
    for model, hidden in known:
        for kind in ("intermediate", "output"):
            units = find_units(model, (kind,))
            scale = torch.linspace(-1, 2, units[1].n_units)
            cut = copy.deepcopy(model)
            site = find_units(cut, (kind,))[1].site
            with torch.no_grad():
                with unit_scales(units, {units[1].name: scale}):
                    scaled = hidden(model, texts())
                site.bias *= scale
                site.weight *= scale if type(site).__name__ == "Conv1D" else scale[:, None]
                torch.testing.assert_close(scaled, hidden(cut, texts()), rtol=1e-4, atol=1e-5)


def test_scales_of_one_change_nothing_to_the_bit_and_leave_nothing_behind():
    model = made(Model).eval()
    units = find_units(model)
    ones = {each.name: torch.ones(each.n_units) for each in units}
    with torch.backends.mha.flags(enable_fastpath=False) if hasattr(torch.backends.mha, "flags") else torch.enable_grad():  # fmt: skip
        before = model(**texts())[0]
        with unit_scales(units, ones):
            inside = model(**texts())[0]
    assert torch.equal(inside, before)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with pytest.raises(AssertionError), unit_scales(units, ones):
        model.layers[0].self_attn(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    assert all("weight" not in vars(layer.self_attn.out_proj) for layer in model.layers)


def test_importance_is_the_slope_of_the_loss_in_each_scale():
    model = made(Model, n_layers=1).double()
    model.words.weight.grad = torch.ones_like(model.words.weight)
    units, batches = find_units(model), [texts(seed=0), texts(3, seed=1)]
    before = copy.deepcopy(model.state_dict())
    found = unit_importance(model, units, batches, squared)
    step = 1e-4
    for each in units:
        for i in range(each.n_units):
            ends = []
            for sign in (1, -1):
                scale = torch.ones(each.n_units).double()
                scale[i] += sign * step
                with torch.no_grad(), unit_scales(units, {each.name: scale}):
                    ends.append(sum(float(squared(model, batch)) for batch in batches) / 2)
            assert float(found[each.name][i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.words.weight.grad, torch.ones_like(model.words.weight))
    assert model.layers[0].linear1.weight.grad is None


def test_importance_is_an_instrument(as_a_user):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def look(net, x):
        layer = net[0]
        units = [Units("pairs", layer, "output", 2, (layer.weight, layer.bias), (net[2].weight,))]
        return unit_importance(net, units, [x, 2 * x], lambda net, x: net(x).float().square().mean())["pairs"]

    check_instrument(look, made(lambda: net), torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))


def test_normalized_importance_does_not_see_scale_sign_and_shift():
    r = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = normalize_importance({"a": r})["a"]
    by_hand = [abs(math.tanh((x - r.mean().item()) / math.sqrt(sum((y - r.mean().item()) ** 2 for y in r.tolist()) / 39))) for x in r.tolist()]  # fmt: skip
    torch.testing.assert_close(share, torch.tensor(by_hand, dtype=torch.float64))
    for a, b in itertools.product((-3.0, 1e-6, 1e200), (0.0, 5.0)):
        torch.testing.assert_close(normalize_importance({"a": a * r + b * a})["a"], share)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_normalized_importance_is_below_one_and_zero_where_all_are_alike(dtype):
    outlier = torch.zeros(4000, dtype=dtype)
    outlier[7] = 1e4
    share = normalize_importance({"a": outlier, "b": torch.full((5,), 0.1, dtype=dtype), "c": outlier[:1]})
    assert 0.99 < float(share["a"].max()) < 1
    assert share["a"].dtype == dtype
    assert not share["b"].any()
    assert not share["c"].any()


def test_merging_is_the_larger_of_each_whatever_the_order():
    a, b = ({"x": torch.rand(6, generator=torch.Generator().manual_seed(k))} for k in range(2))
    merged = merge_importance(a, b)["x"]
    assert merged.tolist() == [max(pair) for pair in zip(a["x"].tolist(), b["x"].tolist(), strict=True)]
    assert torch.equal(merged, merge_importance(b, a)["x"])
    assert torch.equal(merge_importance(a, a)["x"], a["x"])
    assert (merge_importance(a, b)["x"] >= a["x"]).all()


def listed(model, unit):
    """Return what belongs to head 1, intermediate neuron 3 and output neuron 2 of a first layer, as views."""
    if isinstance(model, Model):
        layer = model.layers[0]
        q = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        heads = [x[k : k + 4] for x in q for k in (4, 12, 20)] + [layer.self_attn.out_proj.weight[:, 4:]]
        return {"heads": heads, "intermediate": [layer.linear1.weight[3], layer.linear1.bias[3]],
                "output": [layer.linear2.weight[2], layer.linear2.bias[2]]}[unit]  # fmt: skip
    if hasattr(model, "transformer"):
        layer = model.transformer.h[0]
        q = layer.attn.c_attn
        heads = [x[..., k : k + 4] for x in (q.weight, q.bias) for k in (4, 12, 20)] + [layer.attn.c_proj.weight[4:]]  # fmt: skip
        return {"heads": heads, "intermediate": [layer.mlp.c_fc.weight[:, 3], layer.mlp.c_fc.bias[3]],
                "output": [layer.mlp.c_proj.weight[:, 2], layer.mlp.c_proj.bias[2]]}[unit]  # fmt: skip
    layer = model.roberta.encoder.layer[0]
    of = layer.attention.self
    heads = [x[4:] for part in (of.query, of.key, of.value) for x in (part.weight, part.bias)]
    return {"heads": [*heads, layer.attention.output.dense.weight[:, 4:]],
            "intermediate": [layer.intermediate.dense.weight[3], layer.intermediate.dense.bias[3]],
            "output": [layer.output.dense.weight[2], layer.output.dense.bias[2]]}[unit]  # fmt: skip


@pytest.mark.parametrize("kind", ["heads", "intermediate", "output"])
def test_importance_one_holds_the_listed_rows_and_columns_and_nothing_else(known, kind):
    chosen = {"heads": 1, "intermediate": 3, "output": 2}[kind]
    for model in (copy.deepcopy(known[k][0]) for k in (1, 3, 4)):
        units = find_units(model)
        none = {each.name: torch.zeros(each.n_units) for each in units}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        soft_mask_gradients(units, none)
        assert all((p.grad == 1).all() for p in model.parameters())
        name = next(each.name for each in units if each.name.endswith(kind))
        none[name][chosen] = 1.0
        before = [x.clone() for x in listed(model, kind)]
        steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(10):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            soft_mask_gradients(units, none)
            zeros = sum(int((p.grad == 0).sum()) for p in model.parameters())
            assert zeros == sum(x.numel() for x in before)
            steps.step()
        assert all(torch.equal(x, y) for x, y in zip(before, listed(model, kind), strict=True))


def test_gradients_are_multiplied_by_one_less_importance_and_frozen_ones_passed_over():
    layer = nn.Linear(2, 4)
    units = [Units("a", layer, "output", 2, (layer.weight, layer.bias), ())]
    layer.weight.grad = torch.ones(4, 2)
    soft_mask_gradients(units, {"a": torch.tensor([0.25, 0.5])})
    assert layer.weight.grad.tolist() == [[0.75, 0.75], [0.75, 0.75], [0.5, 0.5], [0.5, 0.5]]
    assert layer.bias.grad is None


def test_adam_undoes_masks_of_gradients_that_stay_the_same():
    """Why the trainer masks steps: a factor on all gradients of a parameter cancels in Adam."""
    ends = []
    for importance in (0.0, 0.9):
        layer = made(nn.Linear, 3, 4)
        units = [Units("a", layer, "output", 4, (layer.weight, layer.bias), ())]
        adam = torch.optim.Adam(layer.parameters(), lr=0.1, eps=0)
        for k in range(5):
            adam.zero_grad()
            layer(torch.full((1, 3), 1.0 + k)).square().sum().backward()
            soft_mask_gradients(units, {"a": torch.full((4,), importance)})
            adam.step()
        ends.append(layer.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_the_proxy_is_the_divergence_of_two_passes_over_tokens_that_are_no_padding():
    model, teacher = made(Model).double(), made(Model, seed=1).double()
    batch = texts()
    batch["attention_mask"][1, 3:] = 0
    u, v = (m.eval()(**batch)[1].detach().div(2.0).softmax(-1) for m in (teacher.train(), model))
    by_hand = sum(
        float((v[i, t] * (v[i, t] / u[i, t]).log()).sum())
        for i in range(4)
        for t in range(6)
        if batch["attention_mask"][i, t]
    )
    found = proxy_loss(model, batch, teacher=teacher, temperature=2.0)
    assert float(found) == pytest.approx(by_hand * 4 / 4, rel=1e-6)
    other = texts()["input_ids"].clone()
    other[1, 3:] = 7  # padding, of which nothing is read
    same = proxy_loss(model, {**batch, "input_ids": other}, teacher=teacher, temperature=2.0)
    torch.testing.assert_close(same, found)


def test_the_proxy_makes_dropout_and_leaves_the_mode():
    model = made(Model, dropout=0.2).eval()
    assert float(proxy_loss(model, texts())) > 0
    assert not any(module.training for module in model.modules())


def contrast_by_hand(a, p, n, t):
    def cos(x, y):
        return float(x @ y / x.norm() / y.norm())

    total = 0.0
    for i in range(len(a)):
        below = sum(math.exp(cos(a[i], p[j]) / t) for j in range(len(a)))
        below += sum(math.exp(cos(a[i], n[j]) / t) for j in range(len(a))) if n is not None else 0
        total -= math.log(math.exp(cos(a[i], p[i]) / t) / below)
    return total / len(a)


def test_a_loss_of_one_number_counts_with_dimensions_and_without():
    plain = unit_importance(LAYER, UNITS, [torch.ones(1, 2)], lambda m, x: m(x).sum())
    found = unit_importance(LAYER, UNITS, [torch.ones(1, 2)], lambda m, x: m(x).sum().reshape(1))
    assert torch.equal(found["a"], plain["a"])


def views(n=5, d=3):
    return torch.randn(3, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_contrast_is_that_of_its_definition(temperature):
    a, p, n = views()
    for negative in (None, n):
        found = integration_loss(a, p, negative, temperature=temperature)
        assert float(found) == pytest.approx(contrast_by_hand(a, p, negative, temperature), rel=1e-9)


def test_a_far_negative_hardly_counts_and_size_does_not():
    a = F.one_hot(torch.arange(3), 4).double()
    plain = integration_loss(a, a)
    assert abs(float(integration_loss(a, a, -a.sum(0).expand(3, 4)) - plain)) < 1e-6
    for size in (1e-30, 0.1, 1e30):  # whose squares are not numbers of float32
        torch.testing.assert_close(integration_loss(9 * a, size * a), plain)
        torch.testing.assert_close(
            integration_loss(size * a.float(), size * a.float()), integration_loss(a.float(), a.float())
        )


def test_the_contrast_in_low_precision(as_a_user):
    parts = [x.float().requires_grad_() for x in views()]
    check_low_precision(lambda *x: integration_loss(*x, temperature=0.5), None, parts, slack=64)


def test_hidden_tokens_are_as_many_and_of_the_kinds_as_they_should_be():
    ids = torch.randint(5, 1000, (400, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    inputs, labels = mask_tokens(ids, mask_token_id=4, vocab_size=1000, special_ids=(1,), generator=torch.Generator().manual_seed(1))  # fmt: skip
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[:, 0].any()
    n = int(chosen.sum())
    assert n == pytest.approx(0.15 * 400 * 49, rel=0.1)
    assert int((inputs[chosen] == 4).sum()) / n == pytest.approx(0.8, abs=0.03)
    assert int((inputs[chosen] == ids[chosen]).sum()) / n == pytest.approx(0.1, abs=0.03)


def test_where_chance_hides_nothing_one_token_of_each_row_is():
    ids = torch.tensor([[1, 7, 8, 9], [1, 1, 5, 6], [1, 1, 1, 1]])
    _, labels = mask_tokens(ids, mask_token_id=4, vocab_size=10, special_ids=[1], probability=1e-9)
    assert (labels != -100).sum(1).tolist() == [1, 1, 0]


LAYER = nn.Linear(2, 4)
UNITS = [Units("a", LAYER, "output", 2, (LAYER.weight, LAYER.bias), ())]
IDS = torch.tensor([[5, 6]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Units("a", LAYER, "output", 3, (LAYER.weight,), ()), "n_units must divide the width 4 of a, got 3"),
        (lambda: Units("a", LAYER, "middle", 2, (LAYER.weight,), ()), "at must be one of"),
        (lambda: Units("a", LAYER, "output", 2, (), ()), "must have a parameter"),
        (lambda: find_units(nn.Linear(2, 2)), "Linear has none"),
        (lambda: find_units(None), "model must be a torch module, got NoneType"),
        (lambda: find_units(LAYER, ("arms",)), "kinds must be one of 'heads'"),
        (lambda: find_units(LAYER, ()), "kinds must be some of heads"),
        (lambda: unit_scales(UNITS, {"b": torch.ones(2)}).__enter__(), "names of units, got 'b'"),
        (lambda: unit_scales(UNITS, {"a": torch.ones(3)}).__enter__(), r"must have shape \(2\)"),
        (lambda: unit_importance(LAYER, UNITS, [], lambda m, x: m(x).sum()), "at least one batch, got none"),
        (lambda: unit_importance(LAYER, [], [1], lambda m, x: m(x).sum()), r"at least one, got \[\]"),
        (lambda: unit_importance(LAYER, UNITS, [torch.ones(1, 2)], lambda m, x: m(x)), "loss_fn must return a scalar tensor"),
        (lambda: unit_importance(LAYER, UNITS, [torch.ones(1, 2)], lambda m, x: m(x).sum() / 0), "what loss_fn returns must be finite"),
        (lambda: unit_importance(LAYER, UNITS, [torch.ones(2, requires_grad=True)], lambda m, x: x.sum()), "depend on a unit"),
        (lambda: normalize_importance({"a": torch.tensor([math.nan, 1.0])}), "must be finite"),
        (lambda: normalize_importance({"a": torch.ones(2).long()}), "floating-point"),
        (lambda: merge_importance(), "at least one, got none"),
        (lambda: merge_importance({"a": torch.ones(2)}, {"b": torch.ones(2)}), "same names"),
        (lambda: soft_mask_gradients(UNITS, {"a": torch.ones(2)}), "call backward"),
        (lambda: soft_mask_gradients(UNITS, {}), "has none for 'a'"),
        (lambda: soft_mask_gradients(UNITS, {"a": torch.ones(3)}), r"must have shape \(2\)"),
        (lambda: soft_mask_gradients(UNITS, {"a": torch.tensor([0.5, 1.5])}), r"in \[0, 1\]"),
        (lambda: soft_mask_gradients(UNITS, {"a": torch.tensor([0.5, math.nan])}), r"in \[0, 1\]"),
        (lambda: proxy_loss(Model(), texts()), "model must have dropout"),
        (lambda: proxy_loss(Model(), texts(), temperature=0.0), "temperature must be greater than 0"),
        (lambda: proxy_loss(Model(), {"input_ids": torch.ones(2, 3)}), "input_ids must be integers, got torch.float32"),
        (lambda: proxy_loss(Model(), {}), "batch must have input_ids"),
        (lambda: integration_loss(torch.ones(1, 2), torch.ones(1, 2)), "at least 2 rows"),
        (lambda: integration_loss(torch.ones(2, 2), torch.ones(2, 3)), "positive must have shape"),
        (lambda: integration_loss(torch.ones(2, 2).long(), torch.ones(2, 2)), "anchor must be a floating"),
        (lambda: integration_loss(torch.ones(2, 2), torch.ones(2, 2), temperature=0.0), "temperature"),
        (lambda: mask_tokens(IDS, mask_token_id=4, vocab_size=6), r"input_ids must be in 0\.\.5, got values from 5 to 6"),
        (lambda: mask_tokens(IDS.float(), mask_token_id=4, vocab_size=9), "integers, got torch.float32"),
        (lambda: mask_tokens(IDS, mask_token_id=9, vocab_size=9), r"mask_token_id must be in 0\.\.8"),
        (lambda: mask_tokens(IDS, mask_token_id=4, vocab_size=9, probability=1.0), r"probability must be in \(0, 1\)"),
        (lambda: mask_tokens(IDS, mask_token_id=4, vocab_size=9, special_ids=(5, 6)), "neither special nor padding"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
