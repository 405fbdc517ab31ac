"""CANIFE: updates, the loss and crafting against gradients by brute force, on rows and on text; bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.privacy import (
    audit_round,
    canary_loss,
    canary_score,
    client_updates,
    craft_canary,
    craft_text_canary,
    empirical_epsilon,
    gaussian_epsilon,
)
from posterity.testing import check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(*layers, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(*(layer() for layer in layers))
    return made


def small(dtype=torch.float32):
    return network(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 3)).to(dtype)


def rows(n, seed=0, dtype=torch.float32):
    return torch.randn(n, 6, generator=rng(seed), dtype=dtype), torch.randint(
        3, (n,), generator=rng(seed + 1)
    )


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


# Updates.


@pytest.mark.parametrize("steps", [1, 3])
def test_updates_are_those_of_local_training_one_client_after_the_other(steps):
    model = small(torch.float64)
    clients = [rows(n, 10 * n, torch.float64) for n in (4, 4, 7, 4)]
    sent = client_updates(model, clients, lr=0.4, local_steps=steps, clip=0.3)
    for (x, y), update in zip(clients, sent, strict=True):
        local = copy.deepcopy(model)
        sgd = torch.optim.SGD(local.parameters(), lr=0.4)
        for _ in range(steps):
            sgd.zero_grad()
            F.cross_entropy(local(x), y).backward()
            sgd.step()
        way = flat(model) - flat(local)
        torch.testing.assert_close(update, way * min(1, 0.3 / float(way.norm())), rtol=1e-9, atol=1e-12)
    assert (sent.norm(dim=1) <= 0.3 * (1 + 1e-12)).all()


def test_short_updates_are_not_made_longer():
    sent = client_updates(small(), [rows(4)], clip=100.0)
    assert 0 < sent.norm() < 100
    torch.testing.assert_close(client_updates(small(), [rows(4)], clip=1e9), sent)


def test_parameters_come_in_order_without_frozen_ones_and_the_model_stays():
    model = network(
        lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), lambda: nn.Dropout(0.5), lambda: nn.Linear(8, 3)
    )
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    sent = client_updates(model, [rows(4), rows(4, 3)])
    assert sent.shape == (2, 8 + 16 + 27)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


class Branching(nn.Module):
    """What vmap cannot take: which way to go depends on numbers."""

    def __init__(self):
        super().__init__()
        self.inside = small()

    def forward(self, x):
        return self.inside(x) if x.sum() > -1e9 else x


def test_a_model_that_cannot_be_vectorised_gives_the_same():
    model = Branching()
    torch.testing.assert_close(
        client_updates(model, [rows(4), rows(4, 3)]), client_updates(model.inside, [rows(4), rows(4, 3)])
    )


def test_running_out_of_memory_is_said_and_no_reason_for_the_slow_loop():
    model = small()

    def too_large(module, args):
        try:
            float(args[0].detach().sum())  # which vmap refuses
        except RuntimeError as error:
            raise torch.OutOfMemoryError("out of memory") from error

    model.register_forward_pre_hook(too_large)
    with pytest.raises(torch.OutOfMemoryError):
        client_updates(model, [rows(4), rows(4, 3)])


# The loss, and crafting.


def test_the_loss_is_the_mean_square_of_projections_and_what_is_missing_of_the_norm():
    g, updates = (
        torch.randn(5, generator=rng(), dtype=torch.float64),
        torch.randn(7, 5, generator=rng(1), dtype=torch.float64),
    )
    along = [2.0 * float(g @ u) / float(g.norm()) for u in updates]
    expected = sum(a * a for a in along) / 7 + max(0, 9.0 - float(g.norm())) ** 2
    assert float(canary_loss(g, updates, clip=2.0, norm_floor=9.0)) == pytest.approx(expected, rel=1e-12)


def test_its_gradient_is_right_and_the_first_term_sees_no_length():
    g = torch.randn(5, generator=rng(), dtype=torch.float64, requires_grad=True)
    updates = torch.randn(7, 5, generator=rng(1), dtype=torch.float64)
    for floor in (0.0, 1.0, 9.0):
        assert torch.autograd.gradcheck(lambda g: canary_loss(g, updates, norm_floor=floor), g)  # noqa: B023
    for scale in (1e-30, 0.1, 1e30):
        torch.testing.assert_close(
            canary_loss(scale * g, updates, norm_floor=0.0), canary_loss(g, updates, norm_floor=0.0)
        )
    slope = torch.autograd.grad(canary_loss(g, updates, norm_floor=0.0), g)[0]
    assert abs(float(slope @ g.detach())) < 1e-12


class CanaryLoss(nn.Module):
    """The loss about a point, since the check also asks at 0, where there is none."""

    def forward(self, canary_grad, updates):
        return canary_loss(canary_grad + torch.arange(5).to(canary_grad), updates, norm_floor=9.0)


def test_the_loss_conforms_to_its_kind(as_a_user):
    updates = torch.randn(7, 5, generator=rng(1), dtype=torch.float64)
    g = torch.randn(5, generator=rng(), dtype=torch.float64, requires_grad=True)
    check_loss(CanaryLoss(), g, updates)


def craft(model, updates, x, y, **options):
    return craft_canary(model, updates, x, y, **{"n_steps": 30, "lr": 0.05, **options})


def audit(updates, canary, noise, n_tests=100, seed=0, **options):
    given = {"clip": 1.0, "clients_per_round": 20, "generator": rng(seed), **options}
    return audit_round(updates, canary, noise_multiplier=noise, n_tests=n_tests, **given)


UPDATES = client_updates(small(), [rows(4, seed) for seed in range(12)])
ROW, LABEL = torch.rand(1, 6, generator=rng(5)), torch.tensor([2])


def test_the_second_derivative_is_that_of_finite_differences():
    """One step of Adam goes against the sign of the slope of equation 1 in each number of the row."""
    model, updates, row = small(torch.float64), UPDATES.double(), ROW.double()

    def value(x):
        parts = torch.autograd.grad(F.cross_entropy(model(x), LABEL), list(model.parameters()))
        return float(canary_loss(torch.cat([g.reshape(-1) for g in parts]), updates, norm_floor=5.0))

    step = 1e-5 * torch.eye(6, dtype=torch.float64)
    slopes = torch.tensor([(value(row + d) - value(row - d)) / 2e-5 for d in step], dtype=torch.float64)
    moved = craft(model, updates, row, LABEL, n_steps=1, lr=0.1, norm_floor=5.0).x - row
    torch.testing.assert_close(moved[0], -0.1 * slopes.sign(), rtol=1e-5, atol=1e-5)


def test_clamping_batches_and_seeds():
    one, other = (
        craft(small(), UPDATES, ROW, LABEL, bounds=(0.4, 0.6), batch_size=3, generator=rng(7))
        for _ in range(2)
    )
    assert torch.equal(one.x, other.x)
    assert one.losses.shape == (30,)
    assert ((one.x >= 0.4) & (one.x <= 0.6)).all()
    assert torch.equal(one.initial_x, ROW)
    assert not torch.equal(one.losses, craft(small(), UPDATES, ROW, LABEL, bounds=(0.4, 0.6)).losses)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context):
    expected = craft(small(), UPDATES, ROW, LABEL).x
    with context():
        found = craft(small(), UPDATES.clone(), ROW.clone(), LABEL.clone())
        updates = client_updates(small(), [rows(4, seed) for seed in range(12)])
    torch.testing.assert_close(found.x, expected)
    torch.testing.assert_close(updates, UPDATES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits_are_computed_in_32_and_autocast_changes_nothing(dtype):
    narrow, clients = small(dtype), [rows(4, seed, dtype) for seed in range(4)]
    wide = [(x.float(), y) for x, y in clients]
    updates = client_updates(narrow.float(), wide)
    torch.testing.assert_close(client_updates(small(dtype), clients), updates)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(client_updates(narrow, wide), updates)
        found = craft(narrow, updates, ROW, LABEL)
        seen = audit(updates, found, 0.1, clients_per_round=2)
    plain = craft(narrow, updates, ROW, LABEL)
    torch.testing.assert_close((found.x, found.grad), (plain.x, plain.grad))
    torch.testing.assert_close(seen.scores_with, audit(updates, plain, 0.1, clients_per_round=2).scores_with)
    low = audit_round(
        updates.to(dtype), found, clip=1.0, noise_multiplier=0.1, clients_per_round=2, generator=rng()
    )
    high = audit_round(updates, found, clip=1.0, noise_multiplier=0.1, clients_per_round=2, generator=rng())
    torch.testing.assert_close(low.scores_with, high.scores_with, rtol=0.02, atol=0.02)


# Text.


class Reader(nn.Module):
    """Attention or a recurrent layer over embedded tokens: the fast kernels of both have no second derivative."""

    def __init__(self, kind):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.unused = nn.Embedding(11, 8)
        self.body = (
            nn.LSTM(8, 8, batch_first=True)
            if kind == "lstm"
            else nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        )
        self.out = nn.Linear(8, 2)

    def forward(self, ids):
        found = self.body(self.tokens(ids))
        return self.out((found[0] if isinstance(found, tuple) else found).mean(1))


def reader(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Reader(kind)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_text_is_crafted_through_mixtures_and_ends_in_tokens_with_an_exact_gradient(kind):
    model, draw = reader(kind), rng(3)
    clients = [
        (torch.randint(11, (5, 6), generator=draw), torch.randint(2, (5,), generator=draw)) for _ in range(10)
    ]
    updates = client_updates(model, clients)
    canary = craft_text_canary(
        model,
        updates,
        6,
        9,
        torch.tensor([1]),
        embedding="tokens",
        n_steps=60,
        norm_floor=0.0,
        generator=rng(1),
    )
    assert (canary.x.shape, canary.x.dtype) == ((1, 6), torch.int64)
    assert canary.x.max() < 9
    loss = F.cross_entropy(model.eval()(canary.x), canary.y)
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    exact = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), parts, strict=True)]
    torch.testing.assert_close(canary.grad, torch.cat([g.reshape(-1) for g in exact]), rtol=1e-4, atol=1e-6)
    assert canary.losses[-5:].mean() < 0.8 * canary.losses[:5].mean()
    with pytest.raises(ValueError, match="embedding must be one that model uses, 'unused' is not"):
        craft_text_canary(model, updates, 6, 9, torch.tensor([1]), embedding="unused", n_steps=1)


def test_a_mixture_of_one_token_has_that_tokens_gradient():
    model = reader("lstm").double()
    updates = torch.randn(4, sum(p.numel() for p in model.parameters()), generator=rng(), dtype=torch.float64)
    found = {
        round(float(craft_text_canary(
            model, updates, 1, 2, torch.tensor([1]), embedding="tokens", n_steps=1, temperature=1e-9, generator=rng(seed)
        ).losses[0]), 9)
        for seed in range(6)
    }  # fmt: skip
    expected = set()
    for token in (0, 1):
        loss = F.cross_entropy(model(torch.tensor([[token]])), torch.tensor([1]))
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), parts, strict=True)
        ]
        expected.add(round(float(canary_loss(torch.cat([g.reshape(-1) for g in parts]), updates)), 9))
    assert found == expected


# Bad input.


class Once(torch.autograd.Function):
    """What has one derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.clone()


class OneDerivative(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = small()

    def forward(self, x):
        return Once.apply(self.inside(x))


class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return self.scores


D = UPDATES.shape[1]
G = torch.ones(D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: empirical_epsilon([], [1.0]), "scores_with must have at least one score, got none"),
        (lambda: empirical_epsilon([1.0], np.zeros(0)), "scores_without must have at least one score"),
        (lambda: empirical_epsilon([1.0], [0.0, math.nan]), "scores_without must not be NaN, score 1 is"),
        (lambda: empirical_epsilon([[1.0]], [0.0]), r"scores_with must be a vector of numbers, got float64 of shape \(1, 1\)"),
        (lambda: empirical_epsilon(["a"], [0.0]), "scores_with must be a vector of numbers"),
        (lambda: empirical_epsilon([1.0], [0.0], delta=1.0), r"delta must be in \[0, 1\), got 1.0"),
        (lambda: empirical_epsilon([1.0], [0.0], delta=-0.1), r"delta must be in \[0, 1\)"),
        (lambda: empirical_epsilon([1.0], [0.0], confidence=1), r"confidence must be in \(0, 1\)"),
        (lambda: empirical_epsilon([1.0], [0.0], threshold="half"), "threshold must be one of 'max'"),
        (lambda: empirical_epsilon([1.0], [0.0], threshold=math.nan), "threshold must be a number or 'max', got nan"),
        (lambda: gaussian_epsilon(-1.0, 0.1), "noise_multiplier must be at least 0, got -1.0"),
        (lambda: gaussian_epsilon(1.0, 1.0), r"delta must be in \[0, 1\)"),
        (lambda: gaussian_epsilon(1.0, 0.1, accountant="prv"), "accountant must be one of 'exact', 'rdp'"),
        (lambda: client_updates(small(), []), "clients must hold at least one"),
        (lambda: client_updates(small(), [rows(3), rows(0)]), "client 1 has 0 and 0"),
        (lambda: client_updates(small(), [rows(3)[0]]), r"clients must be tensors \(x, y\) each, client 0 is not"),
        (lambda: client_updates(small(), [(rows(3)[0], rows(4)[1])]), "client 0 has 3 and 4"),
        (lambda: client_updates(small(), [rows(3)], clip=0.0), "clip must be greater than 0"),
        (lambda: client_updates(small(), [rows(3)], lr=-1.0), "lr must be greater than 0"),
        (lambda: client_updates(small(), [rows(3)], local_steps=0), "local_steps must be an integer of at least 1"),
        (lambda: client_updates(small(), [(rows(3)[0] * math.nan, rows(3)[1])]), "that of client 0 is not"),
        (lambda: client_updates(small(), [(rows(3)[0], rows(3)[1] + 9)]), "model and loss_fn must take x and y"),
        (lambda: client_updates(small().requires_grad_(False), [rows(3)]), "model must have a parameter"),
        (lambda: client_updates(small(), [rows(3)], loss_fn=lambda out, y: out), "loss_fn must return a scalar"),
        (lambda: craft(small(), UPDATES[:, :-1], ROW, LABEL), rf"design_updates must have shape \(clients, {D}\), as model has parameters, got torch.float32 \(12, {D - 1}\)"),
        (lambda: craft(small(), UPDATES[:0], ROW, LABEL), "design_updates must have at least one row"),
        (lambda: craft(small(), UPDATES * math.nan, ROW, LABEL), "design_updates must be finite"),
        (lambda: craft(small(), UPDATES, rows(2)[0], LABEL), r"x must be one row \(1, ...\)"),
        (lambda: craft(small(), UPDATES, ROW * math.inf, LABEL), "x must be one row"),
        (lambda: craft(small(), UPDATES, ROW, LABEL[0]), "y must be the target of one row"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, batch_size=13), "batch_size must be at most 12"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, bounds=(1.0, 0.0)), "bounds must be two finite numbers"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, bounds=1.0), "bounds must be two numbers"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, norm_floor=-1.0), "norm_floor must be at least 0"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, clip=0), "clip must be greater than 0"),
        (lambda: craft(OneDerivative(), UPDATES, ROW, LABEL), "model must have second derivatives: .*once_differentiable"),
        (lambda: craft(Blind(), torch.ones(2, 3), ROW, LABEL), "model must have a gradient that depends on x"),
        (lambda: craft(small(), UPDATES, ROW, LABEL, loss_fn=lambda out, y: 0 * out.sum()), "canary_grad must not be zero: the model already fits the canary"),
        (lambda: craft_text_canary(small(), UPDATES, 3, 5, LABEL, embedding="0"), "embedding must be the name of an nn.Embedding of model, got '0'"),
        (lambda: craft_text_canary(reader("lstm"), torch.ones(2, 770), 3, 12, LABEL, embedding="tokens"), "vocab_size must be at most 11|design_updates"),
        (lambda: canary_loss(torch.zeros(4), torch.ones(2, 4)), "canary_grad must not be zero"),
        (lambda: canary_loss(torch.ones(4), torch.ones(2, 3)), r"updates must have shape \(any, 4\) for canary_grad, got \(2, 3\)"),
        (lambda: canary_loss(torch.ones(4), torch.ones(0, 4)), "updates must have at least one row"),
        (lambda: canary_loss(torch.ones(4), torch.ones(2, 4), clip=0.0), "clip must be greater than 0"),
        (lambda: canary_score(torch.full((4,), math.nan), torch.ones(4)), "canary_grad must be finite"),
        (lambda: canary_score(torch.ones(4), torch.ones(3)), r"aggregate must have shape \(4\) for canary_grad"),
        (lambda: canary_score(torch.ones(4), torch.ones(4), clip=-1.0), "clip must be greater than 0"),
        (lambda: audit(UPDATES, G, 0.3, clients_per_round=13), "clients_per_round must be at most 12"),
        (lambda: audit(UPDATES, G, 0.3, clients_per_round=0), "clients_per_round must be an integer of at least 1"),
        (lambda: audit(UPDATES, G[:-1], 0.3, clients_per_round=5), r"updates must have shape .* for canary"),
        (lambda: audit(UPDATES, G * 0, 0.3, clients_per_round=5), "the model already fits the canary"),
        (lambda: audit(UPDATES, G, -0.3), "noise_multiplier must be at least 0, got -0.3"),
        (lambda: audit(UPDATES, G, 0.3, 7, clients_per_round=5), "n_tests must be even, got 7"),
        (lambda: audit(UPDATES, G, 0.3, clip=0.1, clients_per_round=5), "updates must be clipped to clip=0.1, the longest has norm 1"),
        (lambda: audit(UPDATES, G, 0.3, delta=1.0, clients_per_round=5), r"delta must be in \[0, 1\)"),
        (lambda: audit(UPDATES * math.nan, G, 0.3, clients_per_round=5), "updates must be clipped to clip=1.0, the longest has norm nan"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
