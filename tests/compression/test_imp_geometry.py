"""Pruning in rounds, and the line between its levels: exact counts, starts bit for bit, barriers in closed form."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.compression import Level, error_barrier, iterative_pruning, magnitude_mask, perturb_state
from posterity.testing import check_instrument


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))


def data(seed=0, n=48):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


class Training:
    """Momentum and weight decay, which move zeros; keeps what each call begins with and what follows each step."""

    def __init__(self, steps=8, lr=0.1):
        self.steps, self.lr, self.starts, self.after, self.modes = steps, lr, [], [], []

    def __call__(self, model, start_step, after_step):
        self.starts.append((start_step, copy.deepcopy(model.state_dict())))
        self.modes.append(model.training)
        model.train()
        x, y = data()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.05)
        for step in range(start_step, self.steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            after_step(step + 1)
            self.after.append((len(self.starts) - 1, step + 1, copy.deepcopy(model.state_dict())))
        model.eval()


def brute(weights, kept, n):
    """Return the masks without the n smallest that are left, the first of equals first."""
    names = list(weights)
    every = [(abs(float(v)), k, j) for k, name in enumerate(names) for j, v in enumerate(weights[name].flatten())
             if kept[name].flatten()[j]]  # fmt: skip
    out = {name: kept[name].clone() for name in names}
    for _, k, j in sorted(every)[:n]:
        out[names[k]].view(-1)[j] = False
    return out


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_drop_exactly_the_smallest_and_are_nested(scope):
    net, mask, left = mlp(), None, {}
    weights = {name: p.detach() for name, p in net.named_parameters() if name.endswith("weight")}
    left = {name: torch.ones_like(p, dtype=torch.bool) for name, p in weights.items()}
    for _ in range(4):
        mask = magnitude_mask(net, 0.3, mask, scope=scope)
        groups = [[name] for name in weights] if scope == "layer" else [list(weights)]
        expected = {}
        for names in groups:
            n = math.ceil(0.3 * sum(int(left[name].sum()) for name in names))
            expected |= brute({k: weights[k] for k in names}, {k: left[k] for k in names}, n)
        assert list(mask) == list(weights)
        for name in weights:
            assert mask[name].dtype == torch.bool
            assert torch.equal(mask[name], expected[name])
            assert not (mask[name] & ~left[name]).any()
        left = expected


def test_equal_magnitudes_go_in_order_of_position():
    net = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 3))
    nn.init.ones_(net[0].weight)
    net[1].weight.data.copy_(torch.tensor([[-1.0], [0.5], [1.0]]))
    mask = magnitude_mask(net, 0.5)
    assert mask["0.weight"].tolist() == [[False, False, True]]
    assert mask["1.weight"].tolist() == [[True], [False], [True]]


@pytest.mark.parametrize(
    ("fraction", "n", "removed"), [(0.07, 100, 7), (0.2, 5, 1), (0.2, 6, 2), (0.29, 100, 29)]
)
def test_the_number_removed_is_the_share_rounded_up_of_the_decimal_that_was_written(fraction, n, removed):
    assert int((~magnitude_mask(nn.Linear(n, 1), fraction)["weight"]).sum()) == removed


def test_named_layers_are_pruned_and_other_masks_are_kept():
    net = mlp()
    other = torch.arange(24).view(3, 8) % 2
    mask = magnitude_mask(net, 0.5, {"4.weight": other.float()}, layers=["0"])
    assert list(mask) == ["0.weight", "4.weight"]
    assert int(mask["0.weight"].sum()) == 27
    assert torch.equal(mask["4.weight"], other.bool())


def test_a_weight_in_two_places_is_pruned_once_under_its_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.block = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.again, self.head = self.block, nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.again(self.block(self.embedding(x))))

    x, net = torch.arange(5), Tied()

    def train(model, start_step, after_step):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(start_step, 3):
            F.cross_entropy(model(x), x).backward()
            optimizer.step()
            after_step(step + 1)

    level = iterative_pruning(net, train, rounds=1, fraction=0.5)[1]
    assert sorted(level.mask) == ["block.weight", "embedding.weight"]
    net.load_state_dict(level.state)
    assert int((net.head.weight == 0).sum() + (net.block.weight == 0).sum()) == 18
    assert net.head.weight is net.embedding.weight
    moved = perturb_state(level.state, 0.1, mask=level.mask)
    assert torch.equal(moved["head.weight"], moved["embedding.weight"])
    assert not torch.equal(moved["block.weight"], level.state["block.weight"])


@pytest.mark.parametrize("rewind_step", [0, 3])
def test_levels_start_at_the_masked_snapshot_bit_for_bit_and_zeros_stay(rewind_step):
    net, train = mlp(), Training()
    initial = copy.deepcopy(net.state_dict())
    levels = iterative_pruning(net, train, rounds=3, fraction=0.4, rewind_step=rewind_step)
    assert [step for step, _ in train.starts] == [0, *[rewind_step] * 3]
    assert train.modes == [True] * 4, "each level has the mode of the model"
    dense = {step: state for level, step, state in train.after if level == 0} | {0: initial}
    total = left = 54 + 72 + 24
    for k, level in enumerate(levels):
        if k:
            left -= math.ceil(0.4 * left)
            assert sum(int(m.sum()) for m in level.mask.values()) == left
            previous = {name: levels[k - 1].state[name] for name in level.mask}
            removed = sum(int(m.sum()) for m in levels[k - 1].mask.values()) - left
            expected = brute(previous, levels[k - 1].mask, removed)
            assert all(torch.equal(level.mask[name], expected[name]) for name in expected)
        assert level.density == left / total
        for name, value in dense[rewind_step].items():
            masked = value * level.mask[name] if name in level.mask else value
            assert torch.equal(level.start[name], masked)
            if k:
                assert torch.equal(train.starts[k][1][name], masked)
    for k, _, state in train.after:
        assert all((state[name][~levels[k].mask[name]] == 0).all() for name in levels[k].mask)
    for k, level in enumerate(levels):
        last = [state for number, _, state in train.after if number == k][-1]
        assert all(torch.equal(level.state[name], last[name]) for name in last)
        assert not torch.equal(level.state["0.bias"], level.start["0.bias"]), "biases learn"
        for name, kept in level.mask.items():
            for state in (train.starts[k][1], level.start, level.state):
                assert not state[name][~kept].signbit().any(), "0.0, and not -0.0"
    assert all(torch.equal(net.state_dict()[name], initial[name]) for name in initial)


def test_what_moves_after_the_last_step_is_set_back():
    def train(model, start_step, after_step):
        after_step(start_step + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1.0)

    level = iterative_pruning(mlp(), train, rounds=1, fraction=0.5)[1]
    for name, kept in level.mask.items():
        assert torch.equal(level.state[name] != 0, kept)
        assert not level.state[name][~kept].signbit().any()


def test_no_round_gives_the_dense_level():
    train = Training()
    (level,) = iterative_pruning(mlp(), train, rounds=0)
    assert isinstance(level, Level)
    assert level.density == 1
    assert all(bool(kept.all()) for kept in level.mask.values())
    assert torch.equal(level.state["0.weight"], train.after[-1][2]["0.weight"])


def test_batch_norm_goes_back_too_and_is_never_masked():
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))
    x, y = data()

    def train(model, start_step, after_step):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(start_step, 5):
            F.cross_entropy(model(x[:, None]), y).backward()
            optimizer.step()
            after_step(step + 1)

    levels = iterative_pruning(net, train, rounds=1, rewind_step=2)
    assert sorted(levels[1].mask) == ["0.weight", "3.weight"]
    assert torch.equal(levels[1].start["1.running_mean"], levels[0].start["1.running_mean"])
    assert int(levels[1].start["1.num_batches_tracked"]) == 2
    assert int(levels[1].state["1.num_batches_tracked"]) == 5


def test_controls_draw_new_weights_or_go_on_from_where_they_are(monkeypatch):
    around = torch.random.get_rng_state()
    runs = {}
    for restart in ("reinitialise", "continue"):
        for seed in (1, 1, 2):
            torch.random.set_rng_state(around)
            train = Training()
            runs[restart, seed] = iterative_pruning(
                mlp(), train, rounds=1, restart=restart, generator=torch.Generator().manual_seed(seed)
            )
    first, same, other = runs["reinitialise", 1][1], runs["reinitialise", 1][1], runs["reinitialise", 2][1]
    assert torch.equal(first.start["0.weight"], same.start["0.weight"])
    assert not torch.equal(first.start["0.weight"], other.start["0.weight"])
    dense = runs["reinitialise", 1][0]
    for key in ("0.weight", "4.bias"):
        assert not torch.equal(first.start[key] != 0, torch.zeros_like(first.start[key], dtype=torch.bool))
        assert not (first.start[key] == dense.start[key]).logical_and(first.start[key] != 0).any()
    assert (first.start["0.weight"].abs() <= 6**-0.5).all(), "Linear draws within 1 / sqrt(fan_in)"
    dense, level = runs["continue", 1]
    assert torch.equal(level.start["0.weight"], dense.state["0.weight"] * level.mask["0.weight"])
    torch.random.set_rng_state(around)
    expected = mlp().state_dict()["0.weight"]
    after = torch.random.get_rng_state()
    net = mlp()
    assert torch.equal(net.state_dict()["0.weight"], expected)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    iterative_pruning(
        net, Training(), rounds=1, restart="reinitialise", generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(torch.random.get_rng_state(), after), "a generator leaves the global one alone"


@pytest.mark.parametrize("setting", [torch.no_grad, torch.inference_mode])
def test_pruning_trains_where_gradients_are_off(setting):
    with setting():
        level = iterative_pruning(mlp(), Training(), rounds=1)[1]
    assert not torch.equal(level.state["0.weight"], level.start["0.weight"])


def test_a_level_is_saved_and_runs_as_an_ordinary_state():
    net = mlp()
    level = iterative_pruning(net, Training(), rounds=1)[1]
    file = io.BytesIO()
    torch.save(level.state, file)
    file.seek(0)
    plain = mlp(seed=9)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(plain[0].weight == 0, ~level.mask["0.weight"])
    for tensor in (*level.mask.values(), *level.start.values(), *level.state.values()):
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad


def one(value):
    return {"weight": torch.tensor([[value]])}


def test_a_barrier_between_two_wells_is_one_high_and_a_convex_error_has_none():
    net = nn.Linear(1, 1, bias=False)
    wells = error_barrier(net, one(-1.0), one(1.0), lambda m: (m.weight**2 - 1) ** 2)
    assert (wells.height, wells.at) == (1.0, 0.5)
    np.testing.assert_allclose(wells.alphas, np.arange(11) / 10)
    np.testing.assert_allclose(wells.errors, ((2 * wells.alphas - 1) ** 2 - 1) ** 2, atol=1e-6)
    tilted = error_barrier(net, one(-1.0), one(2.0), lambda m: m.weight**2)
    assert (tilted.height, tilted.at) == (0.0, 0.0)
    there, back = (error_barrier(net, *ends, lambda m: m.weight.sin(), n_points=7)
                   for ends in ((one(0.0), one(3.0)), (one(3.0), one(0.0))))  # fmt: skip
    np.testing.assert_allclose(there.errors, back.errors[::-1], atol=1e-7)
    assert there.height == pytest.approx(back.height)
    assert there.at == pytest.approx(1 - back.at)


def test_ends_are_met_exactly_and_counters_are_those_of_the_nearer_end():
    net = nn.BatchNorm1d(3)
    a, b = copy.deepcopy(net.state_dict()), copy.deepcopy(net.state_dict())
    b |= {"weight": torch.rand(3), "running_mean": torch.rand(3), "num_batches_tracked": torch.tensor(7)}
    seen = []
    error_barrier(net, a, b, lambda m: seen.append(copy.deepcopy(m.state_dict())) or 0.0, n_points=5)
    for got, expected in ((seen[0], a), (seen[-1], b)):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    torch.testing.assert_close(seen[1]["running_mean"], 0.25 * b["running_mean"])
    assert [int(state["num_batches_tracked"]) for state in seen] == [0, 0, 7, 7, 7]


def test_recalibration_takes_averages_over_its_calls():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    x, _ = data()
    net(x + 5)  # statistics of before, which count no more
    seen = []

    def error(model):
        assert not any(part.training for part in model.modules())
        seen.append(
            (model[1].running_mean.clone(), model[1].momentum, model[0](x), model[3].running_var.clone())
        )
        return 0.0

    def recalibrate(model):
        for part in x.split(12):
            model(part)

    error_barrier(net, net.state_dict(), net.state_dict(), error, n_points=2, recalibrate=recalibrate)
    for mean, momentum, hidden, variance in seen:
        torch.testing.assert_close(mean, hidden.mean(0))
        assert momentum == 0.1
        torch.testing.assert_close(variance, torch.ones(4), rtol=0.2, atol=0), "dropout is off meanwhile"


def test_a_perturbation_has_the_norm_asked_for_and_moves_what_the_mask_names():
    state = {**mlp().state_dict(), "count": torch.tensor(3)}
    names = ["0.weight", "2.weight", "4.weight"]

    def norm(values):
        return math.sqrt(sum(float(v.double().square().sum()) for v in values))

    moved = perturb_state(state, 0.3, generator=torch.Generator().manual_seed(0))
    assert norm(moved[n] - state[n] for n in names) == pytest.approx(
        0.3 * norm(state[n] for n in names), rel=1e-5
    )
    assert all(torch.equal(moved[n], state[n]) for n in state if n not in names)
    ways = torch.cat([(moved[n] - state[n]).flatten() for n in names])
    assert abs(int((ways > 0).sum()) - 75) < 4 * 150**0.5 / 2, "of 150 entries, either way"
    assert 0.55 < float((ways.abs() < ways.square().mean().sqrt()).float().mean()) < 0.8, "0.68 of a Gaussian"
    mask = magnitude_mask(mlp(), 0.7)
    moved = perturb_state(state, 0.3, mask=mask)
    length = norm(moved[n] - state[n] for n in names)
    assert length == pytest.approx(0.3 * norm(state[n] * mask[n] for n in names), rel=1e-5)
    assert all(torch.equal(moved[n][~mask[n]], state[n][~mask[n]]) for n in names)
    assert all(torch.equal(v, state[n]) for n, v in perturb_state(state, 0.0).items())


def test_conforms_to_its_kind(as_a_user):
    x, y = data()
    other = mlp(seed=1).state_dict()
    check_instrument(lambda net, x: magnitude_mask(net, 0.3), mlp(), x, chooses=True)

    def barrier(net, x):
        ends = copy.deepcopy(net.state_dict()), {k: v.to(net[0].weight.dtype) for k, v in other.items()}
        return error_barrier(net, *ends, lambda net: error(net, x), n_points=3)

    @torch.autocast("cpu", enabled=False)  # the user's function says in what it computes
    def error(net, x):
        return F.cross_entropy(net(x).float(), y).item()

    check_instrument(lambda net, x: barrier(net, x).errors, mlp(), x, slack=256)


def ends_early(model, start_step, after_step):
    after_step(start_step + 1)


def to_nan(model, start_step, after_step):
    model[0].weight.data[0, 0] = math.nan
    after_step(start_step + 1)


def prune(train=ends_early, model=None, **settings):
    return iterative_pruning(mlp() if model is None else model, train, **{"rounds": 1, **settings})


def barrier(a, b, error=lambda _: 0.0, **settings):
    return error_barrier(nn.Linear(1, 1, bias=False), a, b, error, **settings)


BROKEN = nn.Linear(2, 2)
nn.init.constant_(BROKEN.weight, math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: magnitude_mask(mlp(), 0.0), r"fraction must be in \(0, 1\), got 0"),
        (lambda: magnitude_mask(mlp(), 1.0), r"fraction must be in \(0, 1\), got 1"),
        (lambda: magnitude_mask(mlp(), 0.5, scope="all"), "scope must be one of 'global', 'layer'"),
        (lambda: magnitude_mask(nn.ReLU(), 0.5), "model must have a layer of Linear, Conv1d"),
        (lambda: magnitude_mask(3, 0.5), "model must be an nn.Module, got int"),
        (lambda: magnitude_mask(BROKEN, 0.5), "model must have finite weights, 'weight' has NaN"),
        (lambda: magnitude_mask(mlp(), 0.5, layers=["7"]), "layers must name layers of the model, got '7'"),
        (lambda: magnitude_mask(mlp(), 0.5, {"7.weight": torch.ones(1)}), "mask must name prunable parameters, got '7.weight'"),
        (lambda: magnitude_mask(mlp(), 0.5, {"0.bias": torch.ones(9)}), "mask must name prunable parameters, got '0.bias'"),
        (lambda: magnitude_mask(mlp(), 0.5, {"0.weight": torch.ones(9)}), r"mask must have a tensor of shape \(9, 6\)"),
        (lambda: magnitude_mask(mlp(), 0.5, {"0.weight": torch.full((9, 6), 0.5)}), "mask must hold bools, or 0 and 1"),
        (lambda: magnitude_mask(nn.Linear(2, 2), 0.5, {"weight": torch.zeros(2, 2)}), "mask must leave a weight to prune"),
        (lambda: prune(rounds=-1), "rounds must be an integer of at least 0"),
        (lambda: prune(rewind_step=-1), "rewind_step must be an integer of at least 0"),
        (lambda: prune(fraction=1.5), "fraction must be in"),
        (lambda: prune(restart="reset"), "restart must be one of"),
        (lambda: prune(model=nn.Linear(1, 2), rounds=5, fraction=0.5), "round 3 finds none, the density after round 2 is 0"),
        (lambda: prune(model=BROKEN), "model must have finite weights"),
        (lambda: prune(lambda *_: None), "train must call after_step after every optimiser step, it never did at level 0"),
        (lambda: prune(rewind_step=4), "rewind_step must be reached by train, got 4: it ended after step 1, and no snapshot"),
        (lambda: prune(lambda m, s, after: after(7)), "train must call after_step with the number of steps done, 1 at level 0, got 7"),
        (lambda: prune(to_nan), "train must leave finite weights at level 0, '0.weight' has NaN"),
        (lambda: barrier(one(1.0), one(2.0), n_points=1), "n_points must be an integer of at least 2"),
        (lambda: barrier({}, one(1.0)), r"state_a must have the keys of model.state_dict\(\), lacks \['weight'\]"),
        (lambda: barrier(one(1.0), {"weight": torch.ones(2, 2)}), r"state_b must have shape \(1, 1\) for 'weight', got \(2, 2\)"),
        (lambda: barrier(one(1.0), one(math.nan)), "state_b must be finite, 'weight' has NaN"),
        (lambda: barrier(one(1.0), one(2.0), lambda _: None), "error must return a finite number, got None at alpha 0"),
        (lambda: barrier(one(1.0), one(2.0), lambda _: math.nan), "error must return a finite number, got nan"),
        (lambda: barrier(one(1.0), one(2.0), lambda _: torch.ones(2)), "error must return a finite number"),
        (lambda: perturb_state(one(1.0), -1.0), "scale must be at least 0, got -1"),
        (lambda: perturb_state(one(math.inf), 1.0), "state must have finite weights, 'weight'"),
        (lambda: perturb_state(one(1.0), 1.0, mask={"w": torch.ones(1)}), "mask must name .*, got 'w'"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_trained_before_the_rounds_are_known_to_find_weights(as_a_user):
    train = Training()
    with pytest.raises(ValueError, match="rounds must leave a weight"):
        iterative_pruning(mlp(), train, rounds=200)
    assert train.starts == []
