"""The task of optimisers: what is drawn, what a budget buys, which setting is kept, and what is measured."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.engine.compare import compare
from posterity.engine.discovery import entry_modules
from posterity.lab.data import ImageData, TextData, load_examples
from posterity.lab.nets import mlp
from posterity.lab.tasks import entries, get_task, optimizer
from posterity.lab.tasks.optimizer import Training

for module in entry_modules("optimizer"):
    __import__(module)
TASK = get_task("optimizer")


@pytest.fixture
def files(tmp_path):
    """Return files of rows in three classes that lie apart, of images, of a table and of a text."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    np.savez(tmp_path / "rows.npz", x=4 * np.eye(6)[2 * y] + rng.normal(size=(120, 6)), y=y)
    x = 0.5 * np.eye(64)[9 * y] + 0.4 * rng.random((120, 64))
    np.savez(tmp_path / "images.npz", x=x.reshape(120, 8, 8), y=y)
    pd.DataFrame({"a": rng.normal(size=80), "b": rng.normal(size=80), "kind": list("uv") * 40}).to_csv(
        tmp_path / "table.csv", index=False
    )
    (tmp_path / "text.txt").write_text(
        " ".join(rng.choice(["one", "two", "three", "four", "five", "six"], 400))
    )
    return tmp_path


def small(n=90, budget=20):
    """Return a training of a linear model on three classes that lie apart."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = 3 * torch.eye(3)[y] + torch.randn(n, 3, generator=rng)
    part = (x[:, :, None, None], y)
    return Training((part, part), partial(mlp, 3, 3, width=4, depth=0, seed=1), budget, 5)


def test_every_optimiser_of_the_domain_stands_beside_the_ordinary_ones():
    ordinary = {name for name, each in entries("optimizer").items() if not each.paper}
    assert ordinary == {"SGD with momentum", "AdamW", "Muon"}
    papers = {each.paper for each in entries("optimizer").values() if each.paper}
    assert papers == {"sign-descent", "sam-sharpness", "gradient-free", "batch-size-scaling"}


@pytest.mark.parametrize("kind", ["rows.npz", "images.npz", "table.csv", "text.txt"])
def test_every_entry_is_scored_on_every_kind_of_examples(files, kind):
    target = "kind" if kind == "table.csv" else None
    for name, each in entries("optimizer").items():
        assert 0 <= TASK.score(each.fit, 0, str(files / kind), target, budget=3) < 1e6, name


def test_a_budget_counts_gradient_evaluations_and_a_dear_step_is_taken_less_often():
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure):
            steps.append(self.param_groups[0]["lr"])
            return super().step(closure)

    for cost, n in ((1.0, 20), (2.0, 10), (1 / 3, 60)):
        steps.clear()
        walk = small().tuned(lambda net, lr: Counting(net.parameters(), lr=lr), (0.1,) * 4, cost=cost)
        assert len(steps) == 4 * n and walk.losses[-1][0] == pytest.approx(20)
        assert steps[:n] == pytest.approx([0.1 * (1 - k / n) for k in range(n)])  # falls to 0
    with pytest.raises(ValueError, match="settings must be 4"):
        small().tuned(lambda net, lr: Counting(net.parameters(), lr=lr), (0.1,))


def test_the_setting_of_the_least_validation_loss_is_kept_and_is_gradient_descent_by_hand():
    train = small(64)  # one batch: the whole part
    rates = (1e-3, 1.0, 1e-2, 0.1)
    walk = train.tuned(lambda net, lr: torch.optim.SGD(net.parameters(), lr=lr), rates)
    (x, y), _ = train.parts
    net = train.make()
    for k in range(20):
        for p, g in zip(net.parameters(), torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())), strict=True):  # fmt: skip
            p.data -= (1 - k / 20) * g
    torch.testing.assert_close(walk.net(x), net(x), rtol=1e-4, atol=1e-5)
    assert walk.losses[-1][2] == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-4)
    assert [look[0] for look in walk.losses] == list(range(1, 21))


def test_a_search_gets_losses_without_gradients_and_entries_share_weights_and_batches():
    seen = []

    class Looking(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure):
            seen.append((closure().item(), self.param_groups[0]["params"][0].grad))

    train = small(200, budget=2)
    train.tuned(lambda net, _: Looking(net.parameters()), (1.0,) * 4, cost=1 / 3, gradient=False)
    assert all(grad is None for _, grad in seen) and len(seen) == 24
    assert [value for value, _ in seen[:6]] == [value for value, _ in seen[6:12]]
    assert len({value for value, _ in seen[:6]}) == 6  # batches differ


def test_measures_are_the_test_loss_and_when_a_linear_model_is_reached(files):
    path = str(files / "rows.npz")

    def given(net, losses):
        return lambda train, seed: optimizer.Walk(net, losses)

    class Sure(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3)

    losses = [(10.0, 0.1, 5.0), (20.0, 0.2, 1e-9), (30.0, 0.3, 1e-9)]
    assert TASK.score(given(Sure(), losses), 0, path, None) == pytest.approx(math.log(3), rel=1e-6)
    assert TASK.score(given(Sure(), losses), 0, path, None, measure="evaluations") == 20.0
    assert TASK.score(given(Sure(), losses), 0, path, None, measure="seconds") == 0.2
    assert (
        TASK.score(given(Sure(), losses[:1]), 0, path, None, measure="evaluations") == 10.0
    )  # never: all of it


def test_texts_are_cut_into_characters_each_told_its_successor(files):
    text = load_examples(str(files / "text.txt"))
    assert isinstance(text, TextData)
    parts, n, linear = optimizer._characters(text, 0)
    written = " ".join(text.vocabulary[k] for k in text.tokens)
    letters = sorted(set(written))
    assert n == len(letters)
    read = ["".join(letters[k] for k in x.flatten().tolist()) for x, _ in parts]
    told = ["".join(letters[k] for k in y.flatten().tolist()) for _, y in parts]
    assert written.startswith(read[0]) and all(a[1:] == b[:-1] for a, b in zip(read, told, strict=True))
    starts = [0, len(written) * 8 // 10, len(written) * 9 // 10]
    assert all(written[start:].startswith(a) for start, a in zip(starts, read, strict=True))
    # pairs of letters, counted with one more of each
    counts = {}
    for a, b in zip(written[: starts[1] - 1], written[1 : starts[1]], strict=True):
        counts[a, b] = counts.get((a, b), 0) + 1
    hand = 0.0
    for a, b in zip(read[1], told[1], strict=True):
        hand -= math.log((counts.get((a, b), 0) + 1) / (sum(counts.get((a, c), 0) for c in letters) + n))
    assert linear == pytest.approx(hand / len(read[1]), rel=1e-9)


def test_the_character_model_sees_no_later_character():
    torch.manual_seed(0)
    net = optimizer.CharacterModel(7)
    tokens = torch.randint(7, (2, 10))
    later = tokens.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 7
    out, moved = net(tokens), net(later)
    assert out.shape == (2, 7, 10)
    torch.testing.assert_close(moved[:, :, :6], out[:, :, :6])
    assert not torch.allclose(moved[:, :, 6:], out[:, :, 6:])


def test_names_are_those_of_images_tables_and_texts():
    assert isinstance(load_examples("digits"), ImageData) and isinstance(load_examples("wine"), ImageData)
    assert isinstance(load_examples("sklearn-descr"), TextData)


def test_bad_settings_and_a_target_of_what_has_none_are_refused(files):
    for settings, words in (
        ({"budget": "0"}, "budget"),
        ({"measure": "speed"}, "measure"),
        ({"rate": "1"}, "takes no 'rate'"),
    ):
        with pytest.raises(ValueError, match=words):
            compare("optimizer", settings=settings)
    with pytest.raises(ValueError, match="is text, target is for a table"):
        compare("optimizer", data=str(files / "text.txt"), target="kind")
    with pytest.raises(ValueError, match="no choice of a target"):
        compare("optimizer", data="sklearn-descr", target="kind")
    pd.DataFrame({"a": np.arange(5100.0), "price": np.arange(5100) // 5}).to_csv(
        files / "prices.csv", index=False
    )
    with pytest.raises(
        ValueError, match="at most 1000 classes are told apart, has 1020: is the target a number"
    ):
        compare("optimizer", data=str(files / "prices.csv"), target="price")
