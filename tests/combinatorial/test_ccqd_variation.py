"""Variation and owners by their definitions, and the critic that reads a policy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.combinatorial import PolicyCritic, iso_line, reassign_representations
from posterity.testing import check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# --- variation and owners ---


def test_offspring_without_noise_lie_on_the_line_one_z_for_all_weights():
    x, y = torch.randn(2, 50, 7, dtype=torch.float64, generator=rng())
    z = (iso_line(x, y, iso_sigma=0.0, line_sigma=0.3, generator=rng()) - x) / (y - x)
    torch.testing.assert_close(z, z[:, :1].expand(-1, 7))
    assert float(z[:, 0].std()) == pytest.approx(0.3, rel=0.4) and len(z[:, 0].unique()) == 50


def test_offspring_have_the_mean_and_variance_of_the_equation():
    n, iso, line = 20_000, 0.3, 0.5
    x, y = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.tensor([[1.0, 1.0, 2.5]]).double()
    drawn = iso_line(x.expand(n, -1), y.expand(n, -1), iso_sigma=iso, line_sigma=line, generator=rng())
    variance = iso**2 + line**2 * (y - x)[0] ** 2
    assert ((drawn.mean(0) - x[0]).abs() < 5 * (variance / n).sqrt()).all()
    assert ((drawn.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all()
    between = (drawn - drawn.mean(0)).T.cov()[1, 2]  # by the common z alone
    assert float(between) == pytest.approx(line**2 * 3 * 2, abs=0.1)


def test_equal_parents_leave_the_noise_of_each_weight():
    x = torch.ones(4, 3)
    want = x + 0.1 * torch.randn(4, 3, generator=rng())
    torch.testing.assert_close(iso_line(x, x, iso_sigma=0.1, line_sigma=5.0, generator=rng()), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offspring_in_low_precision_are_those_of_float32_rounded(dtype):
    x, y = torch.randn(2, 5, 9, generator=rng()).to(dtype)
    want = iso_line(x.float(), y.float(), generator=rng()).to(dtype)
    assert torch.equal(iso_line(x, y, generator=rng()), want)


@pytest.mark.parametrize("seed", range(30))
def test_representations_are_replaced_and_elites_dealt_out_as_defined(seed):
    draw = np.random.default_rng(seed)
    n, threshold = int(draw.integers(1, 7)), int(draw.integers(0, 3))
    owner = draw.choice(draw.permutation(n)[: draw.integers(1, n + 1)], draw.integers(1, 20))
    new, source = reassign_representations(
        torch.from_numpy(owner), n, threshold=threshold, generator=rng(seed)
    )
    counts = [sum(int(who) == i for who in owner) for i in range(n)]
    popular = counts.index(max(counts))
    assert source.tolist() == [popular if counts[i] <= threshold else i for i in range(n)]
    heirs = {i for i in range(n) if counts[i] <= threshold} | {popular}
    for before, after in zip(owner.tolist(), new.tolist(), strict=True):
        assert after in heirs if before == popular else after == before


def test_elites_of_the_most_popular_are_dealt_out_evenly():
    new, source = reassign_representations(torch.full((6000,), 2), 4, generator=rng())
    assert source.tolist() == [2] * 4
    assert (new.bincount(minlength=4) - 1500).abs().max() < 5 * math.sqrt(6000 * 3 / 16)


@pytest.mark.parametrize("owner", [torch.tensor([1, 0, 2, 1]), torch.tensor([], dtype=torch.long)])
def test_where_nothing_is_to_be_replaced_nothing_changes(owner):
    new, source = reassign_representations(owner, 3)
    assert torch.equal(new, owner) and source.tolist() == [0, 1, 2]


# --- the critic ---


def test_the_policy_critic_conforms_to_its_kind(as_a_user):
    torch.manual_seed(0)
    critic = PolicyCritic(3, 2, 4, hidden=(8, 8), encoder=(6, 5))
    obs, action, head = (torch.randn(*shape, generator=rng()) for shape in ((6, 3), (6, 2), (2, 5)))
    check_layer(critic, obs, action, head, shape=(6, 2))


def test_the_policy_critic_reads_the_rows_of_a_head_in_any_order():
    critic = PolicyCritic(3, 4, 5, hidden=(8,), encoder=(6, 6)).double()
    obs, action, head = (
        torch.randn(*s, generator=rng(), dtype=torch.float64) for s in ((7, 3), (7, 4), (4, 6))
    )
    value = critic(obs, action, head)
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(critic(obs, action, head[list(order)]), value)
    assert (critic(obs, action, head + 0.1) - value).abs().min() > 0
    batched = critic(obs.view(7, 1, 3), action.view(7, 1, 4), head)
    torch.testing.assert_close(batched[:, 0], value)
    assert (value[:, 0] - value[:, 1]).abs().min() > 0  # twins differ


def test_encoders_keep_their_last_layer_linear():
    critic = PolicyCritic(1, 1, 1, hidden=(1,), encoder=(1,))
    for twin in critic.twins:
        assert not any(isinstance(layer, nn.LeakyReLU) for layer in twin["encoder"])
    value = nn.Sequential(*critic.twins[0]["value"])
    seen = torch.tensor([[0.3, -0.2, critic.twins[0]["encoder"](torch.tensor([1.0, 2.0])).item()]])
    by_hand = value[2](F.leaky_relu(value[0](seen), 0.01))
    found = critic(seen[:, :1], seen[:, 1:2], torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(found[:, :1], by_hand)


def test_refuses_bad_arguments_by_name(as_a_user):
    x = torch.zeros(2, 3)
    for args, options, message in (
        ((x, x[:1]), {}, r"y must have shape \(2, 3\) for that of x"),
        ((x[0], x[0]), {}, "x must have shape"),
        ((x.long(), x), {}, "x must be a floating-point tensor"),
        ((x, x), {"iso_sigma": -1.0}, "iso_sigma must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            iso_line(*args, **options)
    for owner, n in ((torch.tensor([3]), 3), (torch.tensor([-1]), 3)):
        with pytest.raises(ValueError, match=r"owner must be in 0\.\.2"):
            reassign_representations(owner, n)
    with pytest.raises(ValueError, match="owner must hold integers"):
        reassign_representations(torch.zeros(2), 2)
    critic = PolicyCritic(3, 2, 4)
    head = torch.zeros(2, 5)
    for obs, action, last, message in (
        (x, x, head, "action must have 2 as last size"),
        (torch.zeros(2, 4), torch.zeros(2, 2), head, "obs must have 3 as last size"),
        (x, torch.zeros(1, 2), head, "action must have the batch of obs"),
        (x, torch.zeros(2, 2), head.T, r"head must have shape \(2, 5\)"),
        (x.long(), torch.zeros(2, 2), head, "obs must be a floating-point tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            critic(obs, action, last)
