"""Against Decepticons: clipping and noise that stop it, and an inspection that tells its states apart."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from posterity.privacy import AuditTransformer, audit_leakage, corrupt_transformer, inspect_parameters
from posterity.privacy.leakage_reconstruction import _defended
from posterity.testing import check_private


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(vocab_size=60, max_len=12, seed=0, **options):
    options = {"d_ff": 256, "n_layers": 2} | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AuditTransformer(vocab_size, max_len, **options)


# Clipping and noise.


def test_noise_and_clipping_are_as_large_as_they_say():
    gradients = {"a": torch.full((400, 50), 3.0), "b": torch.zeros(30_000)}
    length = 3.0 * 20_000**0.5
    for clip in (1.0, 2 * length):
        found = _defended(gradients, clip, 0.0, None)
        torch.testing.assert_close(found["a"], gradients["a"] * min(1, clip / length))
        noisy = _defended(gradients, clip, 0.5, rng())
        drawn = torch.cat([((noisy[n] - found[n]) / clip).flatten() for n in "ab"])
        assert abs(drawn.std().item() - 0.5) < 0.01 and abs(drawn.mean().item()) < 0.01


def test_with_noise_of_the_clipped_norm_reading_falls_to_chance():
    draw = np.random.default_rng(0)
    state, probe = corrupt_transformer(network(400, 16, d_ff=512), generator=rng())
    tokens = torch.randint(400, (8, 16), generator=rng())
    assert audit_leakage(state, tokens, probe).token_accuracy > 0.7
    reports = [
        audit_leakage(state, tokens, probe, clip=1.0, noise_multiplier=1.0, generator=rng(s))
        for s in range(5)
    ]
    chance = []
    for _ in range(300):  # random words, sequences matched as the report matches them
        pair = draw.integers(0, 400, (2, 8, 16))
        right = (pair[0][:, None] == pair[1]).sum(2)
        chance.append(right[linear_sum_assignment(-right)].sum() / 128)
    error = np.std(chance) / len(reports) ** 0.5
    assert np.mean([report.token_accuracy for report in reports]) < np.mean(chance) + 4 * error


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_noise_is_that_of_a_gaussian_mechanism_and_half_of_it_is_caught(share):
    """One client's update or none at all, scored by the ratio of the two densities."""
    noise, delta = 1.0, 1e-2
    promise = next(
        e for e in np.arange(0, 9, 0.01)
        if norm.cdf(0.5 / noise - e * noise) - np.exp(e) * norm.cdf(-0.5 / noise - e * noise) <= delta
    )  # fmt: skip
    update = {"a": torch.full((2, 2), 30.0), "b": torch.tensor([-70.0])}
    direction = torch.cat([g.flatten() for g in update.values()])
    direction /= direction.norm()
    generator, scores = rng(), []
    for gradients in (update, {name: torch.zeros_like(g) for name, g in update.items()}):
        many = [_defended(gradients, 2.0, share * noise, generator) for _ in range(2_000)]
        scores.append([float(torch.cat([g.flatten() for g in each.values()]) @ direction) for each in many])
    if share == 1:
        found = check_private(*scores, epsilon=promise, delta=delta)
        assert found > 0.3 * promise
    else:
        with pytest.raises(AssertionError, match="promised"):
            check_private(*scores, epsilon=promise, delta=delta)


# The inspection.


def test_no_honest_state_is_suspicious_and_every_corrupted_one_is():
    for seed in range(20):
        model = network(seed=seed, d_model=24, n_heads=2, d_ff=16 * (1 + seed % 4), n_layers=1 + seed % 2)
        assert inspect_parameters(model).findings == []
        options = {"measurement_scale": 10.0 ** (seed % 3 - 1), "backward_scale": 10.0 ** (seed % 5 - 4)}
        report = inspect_parameters(corrupt_transformer(model, generator=rng(seed), **options)[0])
        assert report.suspicious
        assert [
            f for f in report.findings if f.startswith("encoder.layers.0.self_attn.in_proj_weight, query")
        ]
        for k in range(1 + seed % 2):
            assert [f for f in report.findings if f.startswith(f"encoder.layers.{k}.linear1.weight")]


def test_a_trained_model_is_not_suspicious():
    model = network(20, 8, d_model=32, n_heads=2, d_ff=32, n_layers=1)
    tokens = torch.arange(8).repeat(16, 1) + torch.arange(16)[:, None] % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss < 1
    assert not inspect_parameters(model).suspicious


def test_scores_are_what_they_say():
    """Ranks by numpy; equal rows, zeros and orders counted by hand."""
    net = nn.ModuleDict({"a": nn.Linear(7, 30), "q_proj": nn.Linear(4, 12), "adapter": nn.Linear(3, 20, bias=False),
                         "e": nn.Embedding(5, 4), "m": nn.MultiheadAttention(8, 2, kdim=5, vdim=6)})  # fmt: skip
    with torch.no_grad():
        net["a"].weight[:12] = net["a"].weight[0]
        net["a"].weight[25:] = 0
        net["a"].bias.copy_(torch.arange(30.0))
        net["q_proj"].bias.fill_(-5e3 * net["q_proj"].weight.norm())
        net["adapter"].weight.zero_()
        net["e"].weight[:, 1:] = 1
    report = inspect_parameters(net)
    assert report.scores["a.weight"]["equal rows"] == pytest.approx(12 / 25)
    assert report.scores["a.weight"]["rows that are zero"] == pytest.approx(5 / 30)
    assert report.scores["a.weight"]["sorted"] == 1
    values = np.linalg.svd(net["a"].weight.detach().double().numpy())[1]
    assert report.scores["a.weight"]["singular ratio"] == pytest.approx(values[1] / values[0], rel=1e-6)
    assert report.scores["e.weight"]["constant columns"] == 0.75
    assert {"m.q_proj_weight", "m.k_proj_weight", "m.v_proj_weight", "m.out_proj.weight"} <= set(
        report.scores
    )
    assert report.findings == ["q_proj.weight: its bias is 5e+03 times the norm of its weight"]
    with torch.no_grad():
        net["a"].weight[12:14] = net["a"].weight[0]
        net["m"].k_proj_weight.copy_(
            torch.arange(1.0, 9)[:, None] * torch.arange(1.0, 6)
        )  # 8 rows are too few
        net["m"].v_proj_weight[0, 0] = torch.nan
    findings = inspect_parameters(net).findings
    assert [f.partition(":")[0] for f in findings] == ["a.weight", "q_proj.weight", "m.v_proj_weight"]
