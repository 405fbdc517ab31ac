"""Feedback against loops over samples and positions, networks cut by hand, pairs one by one."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.lab.memory import peak_bytes
from posterity.testing import check_instrument, check_layer, check_loss
from posterity.transfer import (
    ContextAffine,
    MidVisionFeedback,
    context_contrast,
    contextual_consistency,
    expect_context,
    filter_logits,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def learned(n_contexts, channels, seed=0):
    """A layer away from its start."""
    layer = ContextAffine(n_contexts, channels).double()
    with torch.no_grad():
        layer.weight.copy_(randn(*layer.weight.shape, seed=seed))
        layer.bias.copy_(randn(*layer.bias.shape, seed=seed + 1))
    return layer


def by_loops(layer, x, shares):
    """What the equation says, sample by sample and position by position; what is missing to 1 is the identity."""
    flat, eye = x.flatten(2) if x.ndim > 2 else x[:, :, None], torch.eye(x.shape[1], dtype=x.dtype)
    out = torch.empty_like(flat)
    for i, s in itertools.product(range(len(x)), range(flat.shape[2])):
        h = flat[i, :, s]
        out[i, :, s] = (1 - shares[i].sum()) * (eye @ h)
        for e, share in enumerate(shares[i]):
            out[i, :, s] += share * (layer.weight[e] @ h + layer.bias[e])
    return out.view_as(x)


CONTEXT = torch.tensor([2, 0, -1, 1, 1, 2, 0])
HARD = torch.cat([torch.eye(3), torch.zeros(1, 3)])[CONTEXT].double()
SOFT = (
    torch.rand(7, 3, dtype=torch.float64, generator=rng(5)).softmax(1)
    * torch.linspace(0, 1, 7).double()[:, None]
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("casting", [False, True])
def test_a_new_layer_is_the_identity_bit_for_bit(dtype, casting):
    layer, x = ContextAffine(3, 5).to(dtype), randn(7, 5, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=casting):
        for context in (None, CONTEXT, CONTEXT.int(), SOFT.to(dtype), HARD.to(dtype)):
            out = layer(x, context)
            assert out.dtype == dtype
            assert torch.equal(out, x)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (7, 5, 2, 3)])
def test_is_the_loop_over_samples_and_positions(monkeypatch, shape, large):
    if large:
        monkeypatch.setattr("posterity.transfer.mid_vision_feedback.LARGE", 0)
    layer, x = learned(3, 5), randn(*shape).requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    for context, shares in ((CONTEXT, HARD), (HARD, HARD), (SOFT, SOFT)):
        out, expected = layer(x, context), by_loops(layer, x, shares)
        torch.testing.assert_close(out, expected)
        probe = randn(*shape, seed=9)
        for ours, theirs in zip(
            torch.autograd.grad((out * probe).sum(), leaves),
            torch.autograd.grad((expected * probe).sum(), leaves), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("large", [False, True])
def test_nothing_expected_is_the_identity_after_training_too(monkeypatch, large):
    if large:
        monkeypatch.setattr("posterity.transfer.mid_vision_feedback.LARGE", 0)
    layer, x = learned(3, 5), randn(7, 5, 4)
    assert torch.equal(layer(x), x)
    assert torch.equal(layer(x, torch.full((7,), -1)), x)
    assert torch.equal(layer(x, torch.zeros(7, 3, dtype=torch.float64)), x)
    assert torch.equal(layer(x, CONTEXT)[2], x[2])
    assert not torch.isclose(layer(x, CONTEXT)[[0, 1, 3, 4, 5, 6]], x[[0, 1, 3, 4, 5, 6]]).all()


def test_a_mixture_of_expectations_is_the_mixture_of_outputs():
    layer, x, full = learned(3, 5), randn(7, 5, 4), SOFT / SOFT.sum(1, keepdim=True).clamp_min(1e-9)
    full[0] = torch.tensor([0.2, 0.3, 0.5])
    outs = [layer(x, torch.full((7,), e)) for e in range(3)]
    mixed = sum(full[:, e, None, None] * out for e, out in enumerate(outs))
    torch.testing.assert_close(layer(x, full), mixed)


def test_one_position_is_a_vector_and_strides_do_not_matter():
    layer, x = learned(3, 5), randn(7, 5)
    torch.testing.assert_close(layer(x, CONTEXT), layer(x[..., None, None], CONTEXT)[..., 0, 0])
    turned = randn(7, 4, 5).transpose(1, 2)
    torch.testing.assert_close(layer(turned, CONTEXT), layer(turned.contiguous(), CONTEXT))


def test_many_samples_are_grouped_without_a_map_for_each():
    layer = ContextAffine(3, 64).requires_grad_(False)
    n = 2 + 2**22 // 64**2
    x, context = torch.randn(n, 64, 2, generator=rng()), torch.randint(-1, 3, (n,), generator=rng())
    assert peak_bytes(lambda: layer(x, context)) < 8 * x.nbytes


def test_a_sample_does_not_depend_on_its_batch():
    layer, x = learned(3, 5), randn(7, 5, 4)
    for flat in (x, x[:, :, 0]):
        for context in (CONTEXT, SOFT):
            every = torch.cat(
                [layer(flat[k : k + 2], context[k : k + 2]) for k in range(0, 7, 2)]
            )  # few: a map for each
            torch.testing.assert_close(every, layer(flat, context))


def test_an_empty_batch_stays_empty():
    assert ContextAffine(2, 3)(torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 3, 4)


@pytest.mark.parametrize("context", [CONTEXT, 0.9 * SOFT.float()], ids=["given", "shares"])
def test_the_layer_conforms_to_its_kind(as_a_user, context):
    layer = learned(3, 5).float()
    check_layer(layer, randn(7, 5, 2, 3, dtype=torch.float32), context, shape=(7, 5, 2, 3))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True),
            nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(16, 5),
        ).double()  # fmt: skip


def wrapped(seed=0):
    model = MidVisionFeedback(network(seed), {"0": 6, "2.0": 4}, n_contexts=3)
    for k, affine in enumerate(model.affines):
        affine.load_state_dict(learned(3, affine.channels, seed=20 + k).state_dict())
    return model


IMAGES = randn(7, 2, 4, 4)


@pytest.mark.parametrize("context", [None, CONTEXT, SOFT], ids=["none", "given", "shares"])
def test_wrapping_is_cutting_the_network_by_hand(context):
    model = wrapped()
    net, (first, second) = model.model, model.affines
    early = net[0](IMAGES)
    late = net[2][0](F.relu(first(early, context)))
    logits, features = model(IMAGES, context, return_features=True)
    torch.testing.assert_close(logits, net[4](F.relu(second(late, context)).flatten(1)))
    torch.testing.assert_close(model(IMAGES, context), logits)
    assert list(features) == ["0", "2.0"]
    torch.testing.assert_close(features["0"], early)  # although the ReLUs work in place
    torch.testing.assert_close(features["2.0"], late)
    if context is None:
        torch.testing.assert_close(logits, net(IMAGES))


def test_inserting_it_changes_nothing():
    net = network()
    model = MidVisionFeedback(net, {"0": 6}, n_contexts=2)
    assert model.model is net
    assert model.affines[0].weight.dtype == torch.float64  # that of the network
    for context in (None, torch.ones(7, dtype=torch.long), torch.full((7, 2), 0.5, dtype=torch.float64)):
        assert torch.equal(model(IMAGES, context), net(IMAGES))


class Tokens(nn.Module):
    """Gives tokens with channels last, as vision transformers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.embed(x).tanh().mean(1))


def test_channels_may_be_last():
    with torch.random.fork_rng():
        model = MidVisionFeedback(Tokens().double(), {"embed": (6, -1)}, n_contexts=3)
    model.affines[0].load_state_dict(learned(3, 6).state_dict())
    x, net = randn(7, 9, 2), model.model
    logits, features = model(x, CONTEXT, return_features=True)
    tokens = net.embed(x)
    assert torch.equal(features["embed"], tokens.mT)
    by_token = torch.stack([model.affines[0](tokens[:, t], CONTEXT) for t in range(9)], 1)
    torch.testing.assert_close(logits, net.head(by_token.tanh().mean(1)))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("in the middle")


def test_no_hook_is_left_after_a_call_nor_after_an_error():
    model = wrapped()
    model(IMAGES, CONTEXT, return_features=True)
    assert hooks(model) == 0
    broken = MidVisionFeedback(nn.Sequential(*network(), Fails()), {"0": 6}, n_contexts=3)
    with pytest.raises(RuntimeError, match="in the middle"):
        broken(IMAGES, CONTEXT)
    with pytest.raises(ValueError, match="sites"):
        MidVisionFeedback(network(), {"0": 6, "2.0": 5}, 3)(IMAGES)
    assert hooks(broken) == 0


def test_a_state_dict_and_a_copy_hold_all():
    model, other = wrapped(0), wrapped(3)
    assert not torch.allclose(other(IMAGES, CONTEXT), model(IMAGES, CONTEXT))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES, CONTEXT), model(IMAGES, CONTEXT))
    assert {"affines.0.weight", "affines.1.bias", "model.2.0.weight"} <= set(model.state_dict())


def test_the_maps_alone_can_be_trained():
    model = wrapped()
    model.model.requires_grad_(False)
    model(IMAGES, CONTEXT).square().sum().backward()
    assert all(p.grad is None for p in model.model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.affines.parameters())


def test_the_wrapper_conforms_to_a_layer(as_a_user):
    check_layer(wrapped().float(), IMAGES.float(), CONTEXT, shape=(7, 5))


def pairs_by_hand(features, context, per_location=False):
    values = []
    for i, j in itertools.combinations(range(len(features)), 2):
        if context[i] == context[j] or min(context[i], context[j]) < 0:
            continue
        a, b = (features[k].reshape(features.shape[1], -1) for k in (i, j))
        if not per_location:
            a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
        values.append(F.cosine_similarity(a, b, dim=0).abs().mean())
    return torch.stack(values)


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (7, 5, 2, 3)])
def test_the_contrast_is_the_mean_over_pairs_of_different_contexts(shape, per_location):
    features = randn(*shape)
    expected = pairs_by_hand(features, CONTEXT, per_location)
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        got = context_contrast(features, CONTEXT, per_location=per_location, reduction=reduction)
        torch.testing.assert_close(got, value)


def test_positions_are_averaged_before_the_cosine_or_after():
    """Features that cancel over positions: nothing is left of one, all of the other."""
    features = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, -1.0], [1e-3, 1e-3]]])
    context = torch.tensor([0, 1])
    assert context_contrast(features, context) < 1e-6
    torch.testing.assert_close(
        context_contrast(features, context, per_location=True), torch.tensor(1.0), atol=1e-5, rtol=0
    )


def test_no_contrast_where_contexts_are_orthogonal_or_there_is_one():
    features, context = torch.eye(4).double().repeat(2, 1)[:, :4], torch.tensor([0, 0, 1, 1] * 2)
    assert context_contrast(features, context) == 0
    for one in (torch.zeros(8), torch.tensor([0, -1] * 4), torch.full((8,), -1)):
        leaf = randn(8, 4).requires_grad_()
        for reduction in ("mean", "sum"):
            value = context_contrast(leaf, one.long(), reduction=reduction)
            assert value == 0
            (slope,) = torch.autograd.grad(value, leaf)
            assert (slope == 0).all()
        assert context_contrast(leaf, one.long(), reduction="none").shape == (0,)


def test_the_contrast_knows_neither_lengths_nor_names():
    features, lengths = randn(7, 5), 10.0 ** torch.arange(-3, 4).double()[:, None]
    value = context_contrast(features, CONTEXT)
    torch.testing.assert_close(context_contrast(lengths * features, CONTEXT), value)
    torch.testing.assert_close(context_contrast(-features, torch.tensor([0, 7, -1, 4, 4, 0, 7])), value)
    for far in (1e30, 1e-7):  # whose squares float32 cannot hold
        torch.testing.assert_close(context_contrast(far * features.float(), CONTEXT), value.float())


def test_dead_features_have_no_contrast_and_no_gradient():
    leaf = torch.zeros(4, 3, requires_grad=True)
    value = context_contrast(leaf, torch.tensor([0, 1, 0, 1]))
    (slope,) = torch.autograd.grad(value, leaf)
    assert value == 0
    assert (slope == 0).all()
    short = torch.tensor([[1e-10, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(
        context_contrast(short, torch.tensor([0, 1])), torch.tensor(0.01)
    )  # 1e-10 / 1e-8


class Contrast(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options, self.reduction = options, "mean"

    def forward(self, features, context):
        return context_contrast(features, context, reduction=self.reduction, **self.options)


@pytest.mark.parametrize("options", [{}, {"per_location": True}], ids=["averages", "locations"])
def test_the_contrast_conforms_to_its_kind(as_a_user, options):
    check_loss(Contrast(**options), randn(7, 4, 3).requires_grad_(), CONTEXT, compiles=not options)


OF_CLASS = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [-math.inf, -1e4])
def test_a_filter_keeps_what_is_expected_bit_for_bit(dtype, fill):
    logits = randn(7, 5).to(dtype)
    out = filter_logits(logits, CONTEXT, OF_CLASS, fill=fill)
    assert out.dtype == dtype
    for i, c in itertools.product(range(7), range(5)):
        kept = CONTEXT[i] in (-1, OF_CLASS[c])
        assert out[i, c] == (logits[i, c] if kept else torch.tensor(fill, dtype=dtype))
    assert contextual_consistency(out.argmax(1), CONTEXT, OF_CLASS) == 1


def test_consistency_counts_the_samples_that_have_a_context():
    predictions = torch.tensor([2, 1, 0, 3, 0, 0, 4])  # right, wrong, not counted, right, wrong, wrong, right
    torch.testing.assert_close(contextual_consistency(predictions, CONTEXT, OF_CLASS), torch.tensor(0.5))
    assert contextual_consistency(predictions[:1], torch.tensor([-1]), OF_CLASS).isnan()


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("n_passes", [1, 3])
def test_a_predicted_context_is_that_of_the_pass_before(soft, n_passes):
    model = wrapped().eval()
    logits = model(IMAGES)
    for _ in range(n_passes):
        p = logits.softmax(1)
        shares = torch.stack([p[:, [0, 4]].sum(1), p[:, [1, 3]].sum(1), p[:, 2]], 1)
        expected = shares if soft else shares.argmax(1)
        logits = model(IMAGES, expected)
    got = expect_context(model, IMAGES, OF_CLASS, n_passes=n_passes, soft=soft)
    torch.testing.assert_close(got, (logits.detach(), expected.detach()))


class Output:
    def __init__(self, logits):
        self.logits = logits


class Named(nn.Module):
    """Gives its logits in an object, as transformers do."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return Output(self.net(x))


def test_logits_may_come_in_an_object():
    model = MidVisionFeedback(Named(), {"net.0": 6}, n_contexts=3)
    plain = MidVisionFeedback(model.model.net, {"0": 6}, n_contexts=3)
    torch.testing.assert_close(
        expect_context(model, IMAGES, OF_CLASS), expect_context(plain, IMAGES, OF_CLASS)
    )


def test_predicting_a_context_leaves_the_model_as_it_was(as_a_user):
    def look(model, x):  # autocast is the user's wish, which the model follows
        with torch.autocast("cpu", enabled=False):
            return expect_context(model, x, OF_CLASS)

    check_instrument(look, wrapped().float(), IMAGES.float())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.spare, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), nn.LSTM(3, 3)
        self.twin = self.layer

    def forward(self, x):
        return self.pair(self.layer(self.layer(x)))[0]


X, LAYER = torch.zeros(7, 5), ContextAffine(3, 5)
NET = MidVisionFeedback(network().float(), {"0": 6}, n_contexts=3)
PIXELS = IMAGES.float()


def twice(sites, x=X[:, :3]):
    return MidVisionFeedback(Twice(), sites, 2)(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContextAffine(0, 5), "n_contexts must be an integer of at least 1, got 0"),
        (lambda: ContextAffine(3, 2.5), "channels must be an integer of at least 1, got 2.5"),
        (lambda: LAYER(X[:, :4], CONTEXT), r"x must have channels = 5 at dimension 1, got shape \(7, 4\)"),
        (lambda: LAYER(X[0], CONTEXT), r"x must have channels = 5 at dimension 1, got shape \(5,\)"),
        (lambda: LAYER(X.long(), CONTEXT), "x must be a floating-point tensor, got dtype torch.int64"),
        (lambda: LAYER(None, CONTEXT), "x must be a floating-point tensor, got NoneType"),
        (lambda: LAYER(X, CONTEXT + 1), "context must be from -1 to 2, got values from 0 to 3"),
        (lambda: LAYER(X, CONTEXT - 1), "context must be from -1 to 2, got values from -2 to 1"),
        (lambda: LAYER(X, CONTEXT[:6]), r"context must have shape \(7\) for one class a sample, got \(6,\)"),
        (lambda: LAYER(X, CONTEXT > 0), "context must hold class indices, got torch.bool"),
        (lambda: LAYER(X, [0] * 7), "context must hold class indices, got list"),
        (lambda: LAYER(X, CONTEXT.float()), r"context must have shape \(7, 3\) for shares of the contexts a sample, got \(7,\)"),
        (lambda: LAYER(X, SOFT[:, :2]), r"context must have shape \(7, 3\)"),
        (lambda: LAYER(X, SOFT - 0.5), "context must have shares of at least 0, got NaN or a negative one"),
        (lambda: LAYER(X, SOFT * math.nan), "context must have shares of at least 0, got NaN"),
        (lambda: LAYER(X, SOFT * 1.001), "context must have shares that sum to at most 1 a sample, got 1.001"),
        (lambda: NET(PIXELS, CONTEXT[:6]), r"context must have shape \(7\)"),
        (lambda: NET(PIXELS, CONTEXT + 1), "context must be from -1 to 2"),
        (lambda: NET(None), "x must be a tensor with a row a sample, got NoneType"),
        (lambda: NET(PIXELS, return_features=1), "return_features must be one of False, True, got 1"),
        (lambda: MidVisionFeedback(None, {"0": 6}, 3), "model must be an nn.Module, got NoneType"),
        (lambda: MidVisionFeedback(network(), {}, 3), "sites must name at least one submodule and its channels, got {}"),
        (lambda: MidVisionFeedback(network(), ["0"], 3), "sites must name at least one submodule"),
        (lambda: MidVisionFeedback(network(), {"0": 6}, 0), "n_contexts must be an integer of at least 1, got 0"),
        (lambda: MidVisionFeedback(network(), {"0": 0}, 3), r"channels of sites\['0'\] must be an integer of at least 1, got 0"),
        (lambda: MidVisionFeedback(network(), {"0": (6, 2)}, 3), r"sites\['0'\]\[1\] must be one of 1, -1, got 2"),
        (lambda: MidVisionFeedback(network(), {"0": (6, 1, 1)}, 3), r"sites\['0'\] must be channels, or channels and their dimension"),
        (lambda: MidVisionFeedback(network(), {"2.00": 4}, 3), r"sites must be names of submodules of model, got '2.00'; close to it: '2.0'"),
        (lambda: MidVisionFeedback(network(), {"0": 5}, 3)(IMAGES), r"'0' should have 5 at dimension 1, gives shape \(7, 6, 4, 4\)"),
        (lambda: MidVisionFeedback(network(), {"0": (6, -1)}, 3)(IMAGES), "'0' should have 6 last, gives shape"),
        (lambda: twice({"layer": 3}), "sites must be used once in a pass of model, 'layer' is used again"),
        (lambda: twice({"spare": 3}), "sites must be used by model, 'spare' was not in this pass"),
        (lambda: twice({"layer": 3, "twin": 3}), "sites must be different submodules, 'layer' and 'twin' are the same"),
        (lambda: twice({"pair": 3}), "sites must give floating-point tensors, 'pair' gives tuple"),
        (lambda: context_contrast(X, CONTEXT[:6]), r"context must have shape \(7\)"),
        (lambda: context_contrast(X, SOFT), "context must hold class indices, got torch.float64"),
        (lambda: context_contrast(X, CONTEXT - 1), "context must be from -1, got values from -2 to 1"),
        (lambda: context_contrast(X + math.nan, CONTEXT), "features must be finite"),
        (lambda: context_contrast(X + math.inf, CONTEXT, per_location=True), "features must be finite"),
        (lambda: context_contrast(X[0], CONTEXT), r"features must have shape \(n, channels, \*spatial\)"),
        (lambda: context_contrast(X[:, :, None][..., :0], CONTEXT), "all but n at least 1"),
        (lambda: context_contrast(X.long(), CONTEXT), "features must be a floating-point tensor"),
        (lambda: context_contrast(X, CONTEXT, reduction="max"), "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        (lambda: context_contrast(X, CONTEXT, per_location=None), "per_location must be one of False, True, got None"),
        (lambda: filter_logits(X, CONTEXT, OF_CLASS[:4]), r"class_context must have shape \(5\) for logits, got \(4,\)"),
        (lambda: filter_logits(X, CONTEXT, torch.tensor([0, 1, 3, 1, 0])), "class_context must have a class of every context, got none of context 2"),
        (lambda: filter_logits(X, CONTEXT, OF_CLASS - 1), "class_context must be at least 0, got -1"),
        (lambda: filter_logits(X, CONTEXT, OF_CLASS.float()), "class_context must hold class indices, got torch.float32"),
        (lambda: filter_logits(X, CONTEXT, None), "class_context must be a tensor of a context a class, got NoneType"),
        (lambda: filter_logits(X, CONTEXT + 1, OF_CLASS), "context must be from -1 to 2, got values from 0 to 3"),
        (lambda: filter_logits(X, SOFT, OF_CLASS), "context must hold class indices, got torch.float64"),
        (lambda: filter_logits(X, None, OF_CLASS), "context must hold class indices, got NoneType"),
        (lambda: filter_logits(X[0], CONTEXT, OF_CLASS), r"logits must have shape \(any, any\)"),
        (lambda: filter_logits(X.long(), CONTEXT, OF_CLASS), "logits must be a floating-point tensor"),
        (lambda: filter_logits(X, CONTEXT, OF_CLASS, fill=math.nan), "fill must be a number, got nan"),
        (lambda: filter_logits(X.half(), CONTEXT, OF_CLASS, fill=-1e9), "fill must be a number that torch.float16 can hold"),
        (lambda: contextual_consistency(CONTEXT + 3, CONTEXT, OF_CLASS), "predictions must be in 0..4, got values from 2 to 5"),
        (lambda: contextual_consistency(X, CONTEXT, OF_CLASS), r"predictions must be a tensor of shape \(n,\)"),
        (lambda: contextual_consistency(CONTEXT + 1, CONTEXT[:3], OF_CLASS), r"context must have shape \(7\)"),
        (lambda: expect_context(network(), PIXELS, OF_CLASS), "model must be a MidVisionFeedback, got Sequential"),
        (lambda: expect_context(NET, PIXELS, OF_CLASS[:4]), r"logits of model must have shape \(any, 4\) for class_context, got \(7, 5\)"),
        (lambda: expect_context(NET, PIXELS, OF_CLASS.clamp_max(1)), "class_context must have a class of every context, got none of context 2"),
        (lambda: expect_context(NET, PIXELS, OF_CLASS + 1), "class_context must be in 0..2, got values from 1 to 3"),
        (lambda: expect_context(NET, PIXELS, OF_CLASS, n_passes=0), "n_passes must be an integer of at least 1, got 0"),
        (lambda: expect_context(NET, PIXELS, OF_CLASS, soft="yes"), "soft must be one of False, True, got 'yes'"),
        (lambda: expect_context(NET, PIXELS * math.nan, OF_CLASS), "model must give logits without NaN"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
