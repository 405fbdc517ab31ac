"""Experts against a loop over tokens, the dense layer, known schedules, and models that nobody here wrote."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from posterity.compression import ExpertSchedule, SMoEDropout, convert_ffn, n_active, set_active, slim
from posterity.testing import check_instrument, check_layer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def experts(k=2, n_experts=4, d_out=None, seed=0, **options):
    return SMoEDropout(6, 5, n_experts, k, d_out=d_out, generator=seeded(seed), **options).double()


def by_loop(layer, x, k):
    """Equation 1 as it stands: each token, each of its experts; the first of equal logits."""
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = layer.router.weight @ token + layer.router.bias
        chosen = sorted(range(layer.n_experts), key=lambda e, r=logits: (-float(r[e]), e))[:k]
        weight = [torch.exp(logits[e] - logits.max()) for e in chosen]
        total = 0
        for e, s in zip(chosen, weight, strict=True):
            hidden = layer.activation(token @ layer.w1[e] + (0 if layer.b1 is None else layer.b1[e]))
            value = hidden @ layer.w2[e] + (0 if layer.b2 is None else layer.b2[e])
            total = total + s / sum(weight) * value
        out.append(total)
    return torch.stack(out).reshape(*x.shape[:-1], layer.d_out)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"bias": False, "d_out": 3, "activation": nn.SiLU()}])
def test_output_is_the_sum_over_the_selected_experts_of_each_token(k, options):
    layer, x = experts(k, **options), drawn(3, 5, 6)
    torch.testing.assert_close(layer(x), by_loop(layer, x, k), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0, 0]), by_loop(layer, x, k)[0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_of_equal_logits_the_lowest_index_is_chosen(k):
    layer, x = experts(k, n_experts=32), drawn(40, 6).round()
    with torch.no_grad():  # small integers, of which sums are exact: many are equal
        layer.router.weight.copy_((3 * layer.router.weight).round())
        layer.router.bias.zero_()
    torch.testing.assert_close(layer(x), by_loop(layer, x, k), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_the_layer_commutes_with_the_order_of_tokens(k):
    layer, x = experts(k), drawn(7, 5, 6)
    rows, places = torch.randperm(7, generator=seeded()), torch.randperm(5, generator=seeded())
    torch.testing.assert_close(layer(x[rows][:, places]), layer(x)[rows][:, places])
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))  # not contiguous


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("n_experts", [1, 4])
def test_equal_scores_and_all_experts_are_the_dense_layer(bias, n_experts):
    torch.manual_seed(0)
    dense = [nn.Linear(6, 20, bias=bias[0]).double(), nn.Linear(20, 3, bias=bias[1]).double()]
    layer = SMoEDropout.from_dense(*dense, n_experts, activation=F.relu)
    if n_experts > 1:  # one expert has score 1 whatever its logit
        nn.init.zeros_(layer.router.weight)
        nn.init.zeros_(layer.router.bias)
    x = drawn(9, 6)
    torch.testing.assert_close(layer(x), dense[1](dense[0](x).relu()), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == (
        sum(p.numel() for part in dense for p in part.parameters())
        + 7 * n_experts
        + bias[1] * 3 * (n_experts - 1)
    )


def test_from_dense_takes_over_dtype_mode_and_what_is_frozen():
    dense = nn.Linear(4, 8).bfloat16().eval(), nn.Linear(8, 4)
    dense[1].weight.requires_grad_(False)
    layer = SMoEDropout.from_dense(*dense, 2, generator=seeded())
    assert layer.k == 2
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == [
        "w2", "router.weight", "router.bias",
    ]  # fmt: skip
    with torch.no_grad():
        layer.w1.zero_()
    assert dense[0].weight.abs().sum() > 0, "a copy"


def test_the_router_is_frozen_and_kept():
    layer, x = experts(2), drawn(11, 6)
    layer(x).square().sum().backward()
    assert layer.router.weight.grad is None
    assert {"router.weight", "router.bias"} <= set(layer.state_dict())
    before = copy.deepcopy(layer.router)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert torch.equal(layer.router.weight, before.weight)
    assert torch.equal(experts(2).router.weight, before.weight), "the same generator, the same router"
    assert not torch.equal(experts(2, seed=1).router.weight, before.weight)
    other = experts(2, seed=1)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    assert "k" not in layer.state_dict()


@pytest.mark.parametrize(("d_model", "d_expert"), [(64, 9), (9, 64)])
def test_router_and_experts_start_as_linear_layers_do(d_model, d_expert):
    """Uniform to 1 / sqrt(inputs)."""
    layer = SMoEDropout(d_model, d_expert, 300, 1, d_out=5, generator=seeded())
    for name, fan_in in (("router.weight", d_model), ("router.bias", d_model), ("w1", d_model), ("b1", d_model),
                         ("w2", d_expert), ("b2", d_expert)):  # fmt: skip
        value = layer.get_parameter(name).detach() * fan_in**0.5
        assert 0.97 < value.abs().max() <= 1 + 1e-6
        assert abs(value.mean()) < 0.15
        assert value.std() == pytest.approx(3**-0.5, rel=0.1)


def test_unselected_experts_get_no_gradient():
    layer, x = experts(2, n_experts=6), drawn(1, 6)
    layer(x).square().sum().backward()
    chosen = set((x @ layer.router.weight.T + layer.router.bias)[0].topk(2).indices.tolist())
    for parameter in (layer.w1, layer.b1, layer.w2, layer.b2):
        moved = {e for e in range(6) if parameter.grad[e].abs().sum() > 0}
        assert moved == chosen


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_are_those_of_finite_differences(k):
    layer = SMoEDropout(3, 2, 4, k, activation=torch.tanh, generator=seeded()).double()
    x = drawn(3, 3).requires_grad_()
    names = ("w1", "b1", "w2", "b2")

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [getattr(layer, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, (x, *values))


def test_multiply_adds_are_those_of_the_active_experts_and_the_router():
    layer, x = SMoEDropout(32, 16, 8, 8, generator=seeded()), torch.randn(50, 32, generator=seeded())
    expert, router = 2 * 50 * 2 * 32 * 16, 2 * 50 * 32 * 8
    for k in range(1, 8):
        layer.k = k
        with FlopCounterMode(display=False) as counted:
            layer(x)
        assert counted.get_total_flops() == k * expert + router
    layer.k = 8
    with FlopCounterMode(display=False) as counted:
        layer(x)
    scored_bias = 2 * 50 * 8 * 32
    assert counted.get_total_flops() == 8 * expert + router + scored_bias


@pytest.mark.parametrize("k", [1, 2, 4])
def test_conforms_to_its_kind(as_a_user, k):
    layer, x = SMoEDropout(6, 5, 4, k, generator=seeded()), torch.randn(20, 6, generator=seeded())
    check_layer(layer, x, shape=(20, 6))
    check_layer(SMoEDropout(6, 5, 4, k, d_out=3, bias=False, generator=seeded()), x, shape=(20, 3))


def test_autocast_and_narrow_dtypes_route_as_float32():
    """Of 64 nearly equal experts bfloat16 would choose others, and be far off."""
    layer, x = SMoEDropout(6, 5, 64, 2, generator=seeded()), torch.randn(200, 6, generator=seeded())
    with torch.no_grad():
        layer.router.weight.mul_(1e-3)
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = layer(x)
    assert (low - exact).norm() < 0.02 * exact.norm()
    assert low.dtype == torch.float32


def test_empty_batch_and_batch_of_one():
    for k in (1, 4):
        layer = experts(k)
        empty = layer(torch.zeros(2, 0, 6, dtype=torch.float64))
        assert empty.shape == (2, 0, 6)
        empty.sum().backward()
        assert (layer.w1.grad == 0).all()
        assert layer(torch.zeros(6, dtype=torch.float64)).shape == (6,)


def test_dropout_acts_on_hidden_units_in_training_only():
    layer, x = experts(2, dropout=0.5), drawn(100, 6)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(100)]).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (mean - layer(x)).abs().mean() < 0.05


@pytest.mark.parametrize("k", [2, 4])
def test_a_learned_router_has_gradients_and_a_load_balance(k):
    layer, x = experts(k, learn_router=True), drawn(30, 6)
    layer(x)
    logits = x @ layer.router.weight.T + layer.router.bias
    load = torch.stack([(logits.topk(k).indices == e).sum() / (30 * k) for e in range(4)])
    torch.testing.assert_close(layer.balance_loss(), 4 * (load * logits.softmax(1).mean(0)).sum())
    copy.deepcopy(layer)  # though the balance has a graph
    pickle.loads(pickle.dumps(layer))
    layer.balance_loss().backward()
    slope = layer.router.weight.grad.abs().sum()
    assert (slope > 1e-6) == (k < 4), "all experts are an even load"
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.tensor([200.0, 0, 0, 0]))
        layer.k = 1
        layer(x)
    torch.testing.assert_close(layer.balance_loss(), torch.tensor(4.0).double())


def test_schedules_at_known_steps():
    linear = ExpertSchedule(400, 8, 16)
    assert [linear(t) for t in (0, 24, 25, 26, 75, 200, 399, 400, 900)] == [8, 8, 8, 9, 10, 12, 16, 16, 16]
    cosine = ExpertSchedule(300, 8, 16, mode="cosine")
    assert [cosine(t) for t in (0, 200, 300, 301)] == [8, 12, 16, 16]  # cos(pi / 3) = 1/2
    assert cosine(150) == 16 - round(8 * 0.5**0.5)
    for schedule in (linear, cosine, ExpertSchedule(7, 1, 5), ExpertSchedule(1, 3, 3, mode="cosine")):
        values = [schedule(t) for t in range(450)]
        assert all(a <= b for a, b in itertools.pairwise(values))
        assert {schedule.k_min, schedule.k_max} <= set(values)


class Mine(nn.Module):
    """What a user writes: a residual block of two layers defined in the other order."""

    def __init__(self, d=8, hidden=24):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(hidden, d), nn.GELU(), nn.Linear(d, hidden)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.down(self.act(self.up(x))))


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as GPT-2 has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj, self.act, self.dropout = (
            Conv1D(24, 8),
            Conv1D(8, 24),
            nn.SiLU(),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Intermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(8, 24), F.gelu

    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x))


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(24, 8), nn.LayerNorm(8)

    def forward(self, x, before):
        return self.norm(self.dense(x) + before)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.intermediate, self.output = Intermediate(), Output()

    def forward(self, x):
        return self.output(self.intermediate(x), x)


def encoder(activation="gelu", **options):
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True, activation=activation, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)


def decoder():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 24, batch_first=True)

        def forward(self, x):
            return self.layer(x, x)

    return Decoder()


MODELS = {
    "encoder": (encoder, 2),
    "encoder, norm first": (lambda: encoder(nn.ReLU(), norm_first=True), 2),
    "decoder": (decoder, 1),
    "sequential": (lambda: nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8), nn.Tanh()), 1),
    "two in one": (lambda: nn.Sequential(nn.Linear(8, 24), nn.PReLU(), nn.Dropout(0.2), nn.Linear(24, 8),
                                         nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)), 2),
    "own module": (Mine, 1),
    "GPT-2": (GPT, 1),
    "BERT": (Bert, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_with_equal_scores_is_the_model(name):
    """In both modes and without gradients, where torch's encoder has a fused path."""
    make, n_blocks = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 5, 8)
    converted = convert_ffn(model, 4, generator=seeded())
    assert len(n_active(converted)) == n_blocks
    assert converted(x).shape == model(x).shape
    for module in converted.modules():
        if isinstance(module, SMoEDropout):
            module.router.requires_grad_(False).weight.zero_()
            module.router.bias.zero_()
    model.eval()
    converted.eval()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert set_active(converted, 1) == n_blocks
    assert not torch.allclose(converted(x), model(x), rtol=1e-2, atol=1e-2)


def test_dropout_and_routers_of_a_converted_model_are_those_asked_for():
    model = nn.ModuleList([MODELS["two in one"][0](), encoder(dropout=0.25)])
    for part, p in zip(model[1].layers, (0.3, 0.4), strict=True):
        part.dropout.p = p  # that of the feed-forward layer, beside those of the residuals
    converted, again = (convert_ffn(model, 4, generator=seeded()) for _ in range(2))
    found = [module for module in converted.modules() if isinstance(module, SMoEDropout)]
    assert [layer.dropout for layer in found] == [0.2, 0.0, 0.3, 0.4]
    assert all(torch.equal(a, b) for a, b in zip(converted.parameters(), again.parameters(), strict=True))
    assert not torch.equal(
        found[0].router.weight, convert_ffn(model, 4, generator=seeded(1))[0][0].router.weight
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_padding_leaves_other_tokens_of_a_converted_encoder_as_they_are():
    torch.manual_seed(0)
    model, x = encoder().eval(), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    converted = convert_ffn(model, 4)
    for layer in converted.layers:
        nn.init.zeros_(layer.linear1.router.weight)
        nn.init.zeros_(layer.linear1.router.bias)
    got, expected = (net(x, src_key_padding_mask=mask) for net in (converted, model))
    torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


def test_layers_choose_blocks_by_name_or_function():
    model = nn.ModuleDict({"a": Mine(), "b": encoder()})
    assert list(n_active(convert_ffn(model, 3, layers=["b.layers.1"]))) == ["b.layers.1.linear1"]
    assert list(n_active(convert_ffn(model, 3, k=2, layers=lambda _, m: isinstance(m, Mine)))) == ["a.up"]


@pytest.mark.parametrize("name", ["encoder", "own module", "GPT-2"])
def test_converting_and_slimming_leave_the_model_alone(as_a_user, name):
    torch.manual_seed(0)
    model = MODELS[name][0]()

    def look(model):
        return [
            value.clone()
            for value in slim(convert_ffn(model, 4, generator=seeded()), 2).state_dict().values()
        ]

    check_instrument(look, model)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_slim_has_the_outputs_of_active_experts_and_is_refused_another_k(k):
    torch.manual_seed(0)
    model, x = convert_ffn(encoder(), 4).eval(), torch.randn(2, 5, 8)
    small = slim(model, k)
    assert set(n_active(model).values()) == {4}
    set_active(model, k)
    expected = model(x)
    assert torch.equal(small(x), expected)
    assert torch.equal(copy.deepcopy(small)(x), expected)
    assert small.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=rf"slim, layers.0.linear1 has k = {k} for good"):
        set_active(small, 1)


@torch.no_grad()
def test_torch_export_takes_a_slim_model_of_any_batch(as_a_user):
    torch.manual_seed(0)
    small = slim(convert_ffn(nn.TransformerEncoderLayer(8, 2, 24, batch_first=True), 4), 2).eval()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(small, (torch.randn(2, 5, 8),), dynamic_shapes=(free,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(torch.export.load(file).module()(x), small(x))


def test_torch_compile_takes_the_layer(as_a_user):
    layer, x = SMoEDropout(6, 5, 4, 2, generator=seeded()), torch.randn(20, 6, generator=seeded())
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def test_setting_k_out_of_range_for_one_layer_sets_none():
    model = nn.Sequential(SMoEDropout(4, 2, 8, 1), SMoEDropout(4, 2, 2, 1))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.2, the number of experts of 1, got 3"):
        set_active(model, 3)
    assert n_active(model) == {"0": 1, "1": 1}


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)


def shared():
    model = nn.ModuleList([Mine(), Mine()])
    model[1].up.weight = model[0].up.weight
    return model


LAYER, L = SMoEDropout(6, 5, 4, 2), nn.Linear


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SMoEDropout(6, 5, 4, 5), r"k must be in 1\.\.4, the number of experts, got 5"),
        (lambda: SMoEDropout(6, 5, 4, 0), "k must be an integer of at least 1, got 0"),
        (lambda: SMoEDropout(6, 5, 4, 1.5), "k must be an integer of at least 1, got 1.5"),
        (lambda: SMoEDropout(0, 5, 4, 1), "d_model must be an integer"),
        (lambda: SMoEDropout(6, 5, 4, 1, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: SMoEDropout(6, 5, 4, 1, activation="gelu"), "activation must be callable, got 'gelu'"),
        (lambda: LAYER(torch.zeros(3, 5)), r"x must have d_model = 6 features last, got \(3, 5\)"),
        (lambda: LAYER(torch.zeros(3, 6).long()), "x must be a floating-point tensor"),
        (lambda: LAYER(torch.zeros(3, 6).double()), "x must have the dtype of the layer, torch.float32, got torch.float64"),
        (lambda: LAYER.balance_loss(), "learn_router must be True"),
        (lambda: SMoEDropout(6, 5, 4, 1, learn_router=True).balance_loss(), "x must have gone through"),
        (lambda: SMoEDropout.from_dense(L(4, 8), L(6, 4), 2), "linear2 must have the outputs of linear1 as inputs, 8, got 6"),
        (lambda: SMoEDropout.from_dense(L(4, 8), nn.ReLU(), 2), "linear2 must be an nn.Linear, got ReLU"),
        (lambda: SMoEDropout.from_dense(L(4, 24), L(24, 4), 7), "n_experts must divide the 24 hidden units of linear1, got 7: 6 and 8 do"),
        (lambda: SMoEDropout.from_dense(L(4, 24), L(24, 4), 48), "got 48: 24 does"),
        (lambda: SMoEDropout.from_dense(L(4, 24), L(24, 4), 4, 5), r"k must be in 1\.\.4"),
        (lambda: convert_ffn(nn.Linear(4, 4), 2), "must have a feed-forward block, got none. Looked for: nn.TransformerEncoderLayer"),
        (lambda: convert_ffn(nn.Sequential(L(4, 8), nn.Softmax(-1), L(8, 4)), 2), "got none"),
        (lambda: convert_ffn(nn.Sequential(L(8, 8), nn.ReLU(), L(8, 4)), 2), "got none"),
        (lambda: convert_ffn("model", 2), "model must be an nn.Module, got str"),
        (lambda: convert_ffn(encoder(), 7), "n_experts must divide the 24 hidden units of layers.0, got 7: 6 and 8 do"),
        (lambda: convert_ffn(encoder(), 4, k=5), r"k must be in 1\.\.4"),
        (lambda: convert_ffn(encoder(), 4, layers=["layers.7"]), r"got 'layers.7': they are 'layers.0', 'layers.1'"),
        (lambda: convert_ffn(encoder(), 4, layers="layers.0"), "layers must be names of modules or a function"),
        (lambda: convert_ffn(encoder(), 4, layers=lambda *_: False), "that layers choose"),
        (lambda: convert_ffn(nn.ModuleList([Mine(), SwiGLU()]), 4), "got 1, a SwiGLU, which is gated"),
        (lambda: convert_ffn(shared(), 4), "must not share layers of a feed-forward block, got 0.up.weight and 1.up.weight"),
        (lambda: set_active(nn.Linear(2, 2), 1), "model must have an SMoEDropout layer"),
        (lambda: slim(LAYER, 5), r"k must be in 1\.\.4"),
        (lambda: ExpertSchedule(10, 4, 2), "k_min must be at most k_max = 2, got 4"),
        (lambda: ExpertSchedule(0, 1, 2), "n_steps must be an integer of at least 1"),
        (lambda: ExpertSchedule(10, 1, 2, mode="steps"), "mode must be one of"),
        (lambda: ExpertSchedule(10, 1, 2)(-1), "step must be an integer of at least 0, got -1"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
