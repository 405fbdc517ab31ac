"""Decepticons: extraction against sums by hand, corrupted states, words read off a gradient, and bad input."""

import copy
import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.privacy import (
    AuditTransformer,
    ImprintProbe,
    audit_leakage,
    corrupt_transformer,
    extract_embeddings,
    imprint_bins,
    inspect_parameters,
    reconstruct,
)
from posterity.privacy.leakage_reconstruction import _gradients, _leaked_tokens, _word_fit
from posterity.testing import check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(vocab_size=60, max_len=12, seed=0, **options):
    options = {"d_ff": 256, "n_layers": 2} | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AuditTransformer(vocab_size, max_len, **options)


class Own(nn.Module):
    """A user's model: words scaled up, positions as a parameter, causal, norms that were trained, dropout."""

    def __init__(self, vocab_size, max_len, width=48, *, batch_first=True, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(1, max_len, width))
        layer = nn.TransformerEncoderLayer(width, 4, 512, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.Linear(width, vocab_size)
        self.batch_first = batch_first
        if tied:
            self.decoder.weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight *= 0.1
            for name, parameter in self.encoder.named_parameters():
                if "norm" in name:
                    parameter += 0.1 * torch.randn_like(parameter)

    def forward(self, tokens):
        x = 3 * self.embedding(tokens) + self.positions[:, : tokens.shape[1]]
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]))
        return self.decoder(x if self.batch_first else x.transpose(0, 1))


# Bins and what is alone in them.


def layer_gradient(h, delta, measured, edges):
    """Gradients of a layer whose rows measure one number: sums over what exceeds each threshold."""
    weight, bias = torch.zeros(len(edges), h.shape[1]).double(), torch.zeros(len(edges)).double()
    for k, edge in enumerate(edges):
        for t in range(len(h)):
            if measured[t] > edge:
                weight[k] += delta[t] * h[t]
                bias[k] += delta[t]
    return weight, bias


def test_extraction_returns_what_is_alone_in_its_bin_and_weighted_means_of_what_is_not():
    h = torch.randn(12, 7, dtype=torch.float64, generator=rng())
    delta = torch.randn(12, dtype=torch.float64, generator=rng(1))
    edges = torch.arange(-10.0, 10.0)
    measured = torch.tensor([-9.5, -3.2, -3.1, -0.5, 0.5, 2.1, 2.2, 2.3, 5.5, 7.5, 8.5, 12.0])
    alone, together = [0, 3, 4, 8, 9, 10, 11], [[1, 2], [5, 6, 7]]
    wanted = {measured[t].item(): h[t] for t in alone}
    for part in together:
        wanted[measured[part[0]].item()] = sum(delta[t] * h[t] for t in part) / sum(delta[t] for t in part)
    found = extract_embeddings(*layer_gradient(h, delta, measured, edges))
    assert len(found) == 9
    torch.testing.assert_close(
        found, torch.stack([wanted[k] for k in sorted(wanted)]), rtol=1e-10, atol=1e-10
    )


def test_those_with_the_largest_share_of_the_gradient_are_kept_in_their_order():
    h = torch.randn(5, 3, dtype=torch.float64, generator=rng())
    delta, measured = torch.tensor([1.0, -5.0, 0.1, 2.0, 0.5]).double(), torch.arange(5) + 0.5
    gradient = layer_gradient(h, delta, measured, torch.arange(5))
    for kept, rows in ((3, [0, 1, 3]), (1, [1]), (0, []), (9, range(5))):
        torch.testing.assert_close(extract_embeddings(*gradient, max_hits=kept), h[list(rows)])


def test_rounding_is_no_hit():
    weight, bias = torch.ones(4, 3), torch.tensor([1.0, 1.0 + 1e-6, 1.0, 1.0])
    assert len(extract_embeddings(weight, bias)) == 1
    assert len(extract_embeddings(weight.double(), bias.double())) == 3
    assert len(extract_embeddings(torch.zeros(4, 3), torch.zeros(4))) == 0


@pytest.mark.parametrize(
    ("mean", "std", "n"), [(0.0, 1.0, 4), (-0.1, 1.2, 4608), (3.0, 0.01, 1), (0.0, 50.0, 9)]
)
def test_bins_are_quantiles_above_one_that_is_below_all(mean, std, n):
    edges = imprint_bins(mean, std, n)
    assert edges.dtype == torch.float64 and edges[0] == min(-10, mean - 8 * std)
    wanted = [NormalDist(mean, std).inv_cdf(i / n) for i in range(1, n)]
    np.testing.assert_allclose(edges[1:], wanted, rtol=1e-12, atol=1e-12)
    assert (edges.diff() > 0).all()


def test_measurements_fall_into_bins_evenly():
    model = network(d_ff=64, n_layers=1)
    state, probe = corrupt_transformer(model, generator=rng())
    seen = []
    hook = state.encoder.layers[0].linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    state(torch.randint(60, (200, 12), generator=rng(1)))
    hook.remove()
    measured = (torch.cat(seen) @ probe.measurement).flatten().double()
    share = torch.bucketize(measured, probe.edges[1:]).float()
    assert abs(float(share.mean()) - 31.5) < 4 and measured.mean().item() == pytest.approx(
        probe.mean, abs=0.02
    )
    assert measured.std().item() == pytest.approx(probe.std, rel=0.05)
    w = probe.measurement[6:-1]
    assert (probe.measurement[:6] == 0).all() and probe.measurement[-1] == 0
    assert w.mean().item() == pytest.approx(0, abs=1e-6) and w.norm().item() == pytest.approx(1, abs=1e-6)


# The corrupted state.


def test_the_architecture_stays_and_the_model_too():
    model = network()
    before = copy.deepcopy(model.state_dict())
    state, probe = corrupt_transformer(model.train(), generator=rng())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert {n: p.shape for n, p in state.state_dict().items()} == {n: p.shape for n, p in before.items()}
    assert type(state) is type(model) and state.training and state is not model
    again, _ = corrupt_transformer(model, generator=rng())
    assert all(torch.equal(a, b) for a, b in zip(state.parameters(), again.parameters(), strict=True))
    assert isinstance(probe, ImprintProbe) and len(probe.edges) == 512


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_first_layer_writes_the_first_word_into_the_tag_and_all_layers_see_the_same(scale):
    """The attention of the first layer, by hand: columns v..2v-1 of the first word, in front."""
    model = network().double()
    state, probe = corrupt_transformer(model, sentence_weight=scale, generator=rng())
    seen = []
    for layer in state.encoder.layers:
        layer.linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.randint(60, (5, 12), generator=rng(1))
    state(tokens)
    x = model.embedding.weight[tokens] + model.positions.weight / model.positions.weight[:, 6:12].norm(
        dim=1, keepdim=True
    )
    x[..., :6] = scale * model.embedding.weight[tokens[:, :1], 6:12]
    torch.testing.assert_close(seen[0], F.layer_norm(x, (96,)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[1][..., :-1], seen[0][..., :-1], rtol=0, atol=5e-4)
    for layer in state.encoder.layers:
        assert (layer.linear1.weight == probe.measurement).all()
    edges = -torch.cat([layer.linear1.bias for layer in state.encoder.layers])
    torch.testing.assert_close(edges.detach(), probe.edges)


def test_a_gradient_of_the_state_holds_tokens_as_the_layer_saw_them():
    state, _ = corrupt_transformer(network().double(), generator=rng())
    tokens = torch.randint(60, (1, 12), generator=rng(1))
    seen = []
    hook = state.encoder.layers[0].linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    gradients = _gradients(state, tokens)
    hook.remove()
    state.encoder.layers[0].linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    state(tokens)
    parts = [
        [gradients[f"encoder.layers.{k}.linear1.{part}"] for k in range(2)] for part in ("weight", "bias")
    ]
    found = extract_embeddings(*(torch.cat(part) for part in parts), max_hits=12)
    nearest = torch.cdist(seen[-1][:-1], found).min(1).values  # the last has no gradient
    assert (nearest < 1e-3).sum() >= 10


def test_gradients_are_those_of_the_next_token():
    model, tokens = network(), torch.randint(60, (3, 7), generator=rng())
    found = _gradients(model.train(), tokens)
    loss = -model(tokens).log_softmax(2)[:, :-1].gather(2, tokens[:, 1:, None]).mean()
    for name, g in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


# Reading.


def test_of_random_words_almost_all_are_read():
    right = []
    for seed in range(3):
        model, tokens = (
            network(400, 16, seed, d_ff=1536, n_layers=3),
            torch.randint(400, (1, 16), generator=rng(seed)),
        )
        state, probe = corrupt_transformer(model, generator=rng(seed))
        report = audit_leakage(state, tokens, probe)
        right.append(report.token_accuracy)
        assert report.tokens.shape == (1, 16) and report.n_hits <= 16
        assert report.token_accuracy == (report.tokens == tokens).float().mean().item()
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"tied": True}])
def test_models_of_users_are_read_too_and_the_honest_state_is_not(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Own(200, 10, **options)
    tokens = torch.stack([torch.randperm(200, generator=rng(s))[:10] for s in range(4)])
    state, probe = corrupt_transformer(model, generator=rng())
    worst, honest = audit_leakage(state, tokens, probe), audit_leakage(model, tokens, probe)
    assert worst.token_accuracy > 0.7 > 0.25 > honest.token_accuracy
    assert worst.bag_accuracy >= worst.token_accuracy
    assert inspect_parameters(state).suspicious and not inspect_parameters(model).suspicious


def test_sequences_are_told_apart_in_any_order():
    state, probe = corrupt_transformer(network(300, 10, d_ff=1536), generator=rng())
    tokens = torch.stack([torch.randperm(300, generator=rng(s))[:10] for s in range(6)])
    one, other = audit_leakage(state, tokens, probe), audit_leakage(state, tokens.flip(0), probe)
    assert one.token_accuracy > 0.8
    assert one.token_accuracy == pytest.approx(other.token_accuracy, abs=0.1)
    found = reconstruct(state, _gradients(state, tokens), probe, n_sequences=6, length=10)
    assert found.tokens.shape == (6, 10) and found.sequence_of_hit.shape == (found.n_hits,)
    assert torch.bincount(found.sequence_of_hit, minlength=6).max() <= 10
    assert {tuple(row) for row in found.tokens.tolist()} == {tuple(row) for row in one.tokens.tolist()}


def test_reading_does_not_see_the_scale_of_the_gradient():
    state, probe = corrupt_transformer(network(300, 10), generator=rng())
    tokens = torch.randint(300, (2, 10), generator=rng())
    gradients = _gradients(state, tokens)
    one = reconstruct(state, gradients, probe, n_sequences=2, length=10)
    other = reconstruct(
        state, {n: 2.0**-9 * g for n, g in gradients.items()}, probe, n_sequences=2, length=10
    )
    assert torch.equal(one.tokens, other.tokens)
    clipped = audit_leakage(state, tokens, probe, clip=0.5)
    assert clipped.token_accuracy == audit_leakage(state, tokens, probe).token_accuracy


def test_a_word_correlates_by_one_with_what_it_makes_and_is_the_partial_correlation():
    words, places = (torch.randn(n, 9, dtype=torch.float64, generator=rng(n)) for n in (5, 3))
    centred = lambda x: x - x.mean(1, keepdim=True)  # noqa: E731
    seen = F.normalize(F.layer_norm(words[[4, 0, 2]] + places, (9,)), dim=1)
    fit = _word_fit(seen, F.normalize(centred(places), dim=1), centred(words))
    torch.testing.assert_close(fit[[0, 1, 2], [4, 0, 2]], torch.ones(3).double())
    for n, place in enumerate(places.numpy()):
        rest = [x - np.polyval(np.polyfit(place, x, 1), place) for x in (seen[n].numpy(), *words.numpy())]
        np.testing.assert_allclose(fit[n], np.corrcoef(rest)[0, 1:], atol=1e-10)
    assert (_word_fit(seen, F.normalize(centred(places), dim=1), torch.zeros(5, 9).double()) == 0).all()


def test_leaked_words_are_labels_as_often_as_they_were_and_inputs():
    labels, softmax = np.array([7, 7, 7, 2, 2, 5]), 1 / 40
    bias = torch.full((10,), softmax).double() - torch.bincount(torch.tensor(labels), minlength=10) / 6
    rows = torch.zeros(10, 3)
    rows[[7, 2, 5, 9]] = 1  # 9 is the first word of a sequence
    assert sorted(_leaked_tokens(rows, bias, 7, 1)) == [2, 2, 5, 7, 7, 7, 9]
    noisy = Counter(_leaked_tokens(torch.ones(10, 3), bias, 7, 1).tolist())  # noise reaches every row
    assert noisy.total() == 7 and noisy >= Counter([2, 2, 5, 7, 7, 7])
    assert sorted(_leaked_tokens(None, bias, 2, 1)) == [2, 7]


# The kind, and bad input.


def test_the_transformer_conforms_to_its_kind(as_a_user):
    model = network(20, 6, d_model=16, n_heads=2, d_ff=16)
    check_layer(model, torch.randint(20, (3, 5), generator=rng()), shape=(3, 5, 20))
    assert model.embedding.weight.abs().max() <= 0.1 and model.decoder.weight.abs().max() <= 0.1
    assert (model.decoder.bias == 0).all() and model.positions.weight.std().item() == pytest.approx(
        1, abs=0.3
    )


def test_auditing_works_without_gradients_in_inference_mode_and_under_autocast(as_a_user):
    tokens = torch.randint(300, (2, 10), generator=rng())
    wanted = None
    for mode in (
        torch.enable_grad(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with mode:
            state, probe = corrupt_transformer(network(300, 10), generator=rng())
            report = audit_leakage(state, tokens.clone(), probe)
        wanted = wanted or report
        assert torch.equal(report.tokens, wanted.tokens) and report.n_hits == wanted.n_hits
    assert wanted.token_accuracy > 0.7


MODEL = network()
STATE, PROBE = corrupt_transformer(MODEL, generator=rng())
TOKENS = torch.randint(60, (2, 6), generator=rng())
GRADIENTS = _gradients(STATE, TOKENS)


def changed(path, value):
    model = network(d_ff=16)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)
    return model


def layers(**options):
    layer = nn.TransformerEncoderLayer(96, 8, 16, batch_first=True, **options)
    return changed("encoder", nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def read(gradients=GRADIENTS, probe=PROBE, n_sequences=2, length=6):
    return reconstruct(STATE, gradients, probe, n_sequences=n_sequences, length=length)


class Shifted(AuditTransformer):
    def forward(self, tokens):
        return self.decoder(
            self.encoder(self.embedding(tokens) + self.positions.weight[1 : tokens.shape[1] + 1])
        )


BIAS = "encoder.layers.1.linear1.bias"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AuditTransformer(1, 5), "vocab_size must be an integer of at least 2"),
        (lambda: AuditTransformer(5, 1), "max_len must be an integer of at least 2"),
        (lambda: AuditTransformer(5, 5, d_model=10), "d_model must be a multiple of n_heads, 8, got 10"),
        (lambda: MODEL(TOKENS.float()), "tokens must hold integers, got torch.float32"),
        (lambda: MODEL(TOKENS + 60), r"tokens must be in 0\.\.59, got values from 60"),
        (lambda: MODEL(TOKENS.repeat(1, 3)), "tokens must have 1 to 12 positions, got 18"),
        (lambda: corrupt_transformer(MODEL, v_length=7), "v_length must be at most half of the 12 columns of a head, got 7"),
        (lambda: corrupt_transformer(MODEL, v_length=2), "v_length must be an integer of at least 3"),
        (lambda: corrupt_transformer(MODEL, softmax_skew=0.0), "softmax_skew must be greater than 0"),
        (lambda: corrupt_transformer(MODEL, backward_scale=-1.0), "backward_scale must be greater than 0"),
        (lambda: corrupt_transformer(MODEL, sentence_weight=0.0), "sentence_weight must be greater than 0"),
        (lambda: corrupt_transformer(MODEL, measurement_scale=math.nan), "measurement_scale must be greater than 0"),
        (lambda: corrupt_transformer(MODEL, calibration=TOKENS[:0]), "calibration must have at least 2 tokens"),
        (lambda: corrupt_transformer(MODEL, calibration=TOKENS[0]), r"calibration must have shape \(any, any\)"),
        (lambda: corrupt_transformer(MODEL, calibration=TOKENS - 1), r"calibration must be in 0\.\.59, got values from -1"),
        (lambda: corrupt_transformer(nn.Linear(2, 2)), "model must have embedding .* its embedding is NoneType"),
        (lambda: corrupt_transformer(changed("positions", None)), "its positions is NoneType"),
        (lambda: corrupt_transformer(changed("positions", nn.Embedding(5, 7))), r"positions of shape \(max_len, 96\)"),
        (lambda: corrupt_transformer(changed("decoder", nn.Linear(96, 60, bias=False))), "decoder has none"),
        (lambda: corrupt_transformer(changed("decoder", nn.Linear(96, 61))), "decode to its 60 tokens, decoder gives 61"),
        (lambda: corrupt_transformer(changed("encoder.layers.1.linear1", nn.Linear(96, 16, bias=False))),
         "model must have biases, encoder.layers.1.linear1 has none"),
        (lambda: corrupt_transformer(changed("encoder.layers.0.self_attn", nn.MultiheadAttention(96, 8, bias=False))),
         "model must have biases, encoder.layers.0.self_attn has none"),
        (lambda: corrupt_transformer(layers(norm_first=True)), "post-norm .* encoder.layers.0 is pre-norm"),
        (lambda: corrupt_transformer(layers(activation="gelu")), "ReLU layers, encoder.layers.0 has .*gelu"),
        (lambda: corrupt_transformer(network().bfloat16()), "must be float32 or float64, .* torch.bfloat16"),
        (lambda: corrupt_transformer(Shifted(60, 12), calibration=TOKENS), "the embeddings, times a constant, plus positions"),
        (lambda: imprint_bins(math.nan, 1.0, 4), "mean must be"),
        (lambda: imprint_bins(0.0, 0.0, 4), "std must be greater than 0"),
        (lambda: imprint_bins(0.0, 1.0, 0), "n_bins must be an integer of at least 1"),
        (lambda: imprint_bins(1e9, 1e-9, 99), "std must keep 99 thresholds around mean 1e\\+09 apart"),
        (lambda: extract_embeddings(torch.ones(3, 2), torch.ones(4)), r"bias_grad must have shape \(3\)"),
        (lambda: extract_embeddings(torch.ones(3, 2), torch.ones(3), max_hits=-1), "max_hits must be an integer"),
        (lambda: extract_embeddings(torch.full((3, 2), math.nan), torch.ones(3)), "weight_grad must be finite"),
        (lambda: read({n: g for n, g in GRADIENTS.items() if n != BIAS}), f"gradients must have {BIAS}, has none"),
        (lambda: read(GRADIENTS | {BIAS: torch.zeros(3)}), f"{BIAS} of gradients must have shape \\(256\\)"),
        (lambda: read(GRADIENTS | {BIAS: torch.full((256,), math.inf)}), f"{BIAS} of gradients must be finite"),
        (lambda: read(length=13), "length must be at most 12, the model's positions, got 13"),
        (lambda: read(length=1), "length must be an integer of at least 2"),
        (lambda: read(n_sequences=0), "n_sequences must be an integer of at least 1"),
        (lambda: read(probe=None), "probe must be an ImprintProbe of width 96, the model's, got NoneType"),
        (lambda: audit_leakage(STATE, TOKENS[:, :1], PROBE), "tokens must have 2 to 12 positions, got 1"),
        (lambda: audit_leakage(STATE, TOKENS[:0], PROBE), "tokens must have at least one sequence, got none"),
        (lambda: audit_leakage(STATE, TOKENS, PROBE, clip=0.0), "clip must be greater than 0"),
        (lambda: audit_leakage(STATE, TOKENS, PROBE, noise_multiplier=1.0), "clip must be given with noise"),
        (lambda: audit_leakage(STATE, TOKENS, PROBE, clip=1.0, noise_multiplier=-1.0), "noise_multiplier must be at least 0"),
        (lambda: audit_leakage(network().requires_grad_(False), TOKENS, PROBE), "model must have parameters that require"),
        (lambda: inspect_parameters(nn.ReLU()), "model must have an nn.Linear"),
        (lambda: inspect_parameters({}), "model must be an nn.Module, got dict"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
