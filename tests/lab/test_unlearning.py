"""The task of unlearning: which rows go, what entries see, and how near to retraining is measured."""

import copy
from dataclasses import astuple

import numpy as np
import pytest
import torch

from posterity.claims.privacy import salun  # noqa: F401  which registers an entry
from posterity.engine.compare import compare
from posterity.lab.data.images import ImageData
from posterity.lab.nets import mlp
from posterity.lab.tasks import entries, get_task, unlearning
from posterity.lab.tasks.unlearning import four_figures, predictor, rows_to_forget
from posterity.privacy import unlearning_report

TASK = get_task("unlearning")
ENTRIES = [
    "doing nothing", "fine-tuning", "gradient ascent", "random labels", "retraining from elsewhere", "SalUn",
]  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Let networks train for 15 epochs."""
    monkeypatch.setattr(unlearning, "image_epochs", lambda n: 15)


@pytest.fixture
def features(tmp_path, short):
    """Return a file of three classes that lie apart, as rows."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    np.savez(tmp_path / "d.npz", x=4 * np.eye(6)[2 * y] + rng.normal(size=(120, 6)), y=y)
    return str(tmp_path / "d.npz")


@pytest.fixture
def images(tmp_path, short):
    """Return a file of images with a bright spot where their class has it."""
    rng = np.random.default_rng(0)
    y = np.arange(48) % 2
    x = 0.5 * np.eye(25)[3 * y] + 0.4 * rng.random((48, 25))
    np.savez(tmp_path / "i.npz", x=x.reshape(48, 5, 5), y=y)
    return str(tmp_path / "i.npz")


def test_entries_are_these():
    assert sorted(entries("unlearning")) == sorted(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_scored_and_a_class_is_hard_to_forget_by_doing_nothing(name, features):
    score = TASK.score(
        entries("unlearning")[name].fit, 0, features, None, measure="forgotten", forget="class", share=1.0
    )
    if name == "doing nothing":
        assert score > 90
    elif name == "retraining from elsewhere":
        assert score == 0
    else:
        assert 0 <= score <= 100


@pytest.mark.parametrize("name", ["random labels", "SalUn"])
def test_images_too(name, images):
    assert 0 <= TASK.score(entries("unlearning")[name].fit, 0, images, None, measure="membership") <= 100


def test_the_network_retrained_as_the_judge_does_has_no_distance_in_any_figure(features):
    def fit(train, seed):
        _, _, kept, n_classes = train
        return predictor(unlearning.train_network(kept, n_classes, seed))

    for measure in ("average", "retained", "forgotten", "test", "membership"):
        assert TASK.score(fit, 3, features, None, measure=measure) == 0


def test_the_average_is_of_the_four_distances_and_entries_may_change_what_they_get(features):
    def fit(train, seed):
        model, gone, kept, n_classes = train
        assert (len(gone[1]), len(kept[1]), n_classes) == (27, 63, 3)
        again = predictor(copy.deepcopy(model))
        for part in (*gone, *kept, *model.parameters()):
            part.detach().zero_()
        return lambda x: again(x) * [1, 0.2, 0.5]

    four = [
        TASK.score(fit, 0, features, None, measure=m) for m in ("retained", "forgotten", "test", "membership")
    ]
    assert TASK.score(fit, 0, features, None) == pytest.approx(np.mean(four)) and max(four) > 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rows_go_from_every_class_or_from_one(share):
    y = np.repeat([0, 1, 2, 3], [40, 40, 40, 1])
    gone, kept = rows_to_forget(y, "random", share, 0)
    assert np.array_equal(np.sort(np.concatenate([gone, kept])), np.arange(len(y)))
    assert np.ptp(np.bincount(y[gone], minlength=4)[:3]) <= 1 and len(gone) == round(share * len(y))
    seen = set()
    for seed in range(20):
        gone, kept = rows_to_forget(y, "class", share, seed)
        assert np.array_equal(np.sort(np.concatenate([gone, kept])), np.arange(len(y)))
        assert len(set(y[gone])) == 1 and len(gone) == round(40 * share)
        seen.add(y[gone[0]])
    assert seen == {0, 1, 2}


def test_the_figures_are_those_of_the_report_in_percent():
    rng = torch.Generator().manual_seed(0)
    net = mlp(4, 3, seed=0).eval()
    parts = [
        (torch.randn(n, 4, 1, 1, generator=rng), torch.randint(3, (n,), generator=rng)) for n in (20, 50, 30)
    ]
    ours = four_figures(predictor(net), *parts)
    error, *others = (100 * figure for figure in astuple(unlearning_report(net, *parts)))
    want = [100 - error, *others]
    assert [ours[name] for name in ("forgotten", "retained", "test", "membership")] == pytest.approx(want)


def test_noisy_digits_are_digits_with_noise():
    noisy, other = unlearning.noisy_digits(0), unlearning.noisy_digits(1)
    clean = unlearning.load_images("digits")
    assert np.array_equal(noisy.y, clean.y) and not np.array_equal(noisy.x, other.x)
    assert (noisy.x - clean.x).std() == pytest.approx(0.4, rel=0.01) and noisy.x.dtype == np.float32


def test_a_table_has_its_target_and_too_few_rows_are_refused_before_any_trial(tmp_path, short):
    rng = np.random.default_rng(0)
    rows = "\n".join(f"{a:.3f},{b:.3f},{'ny'[int(a > 0)]}" for a, b in rng.normal(size=(60, 2)))
    (tmp_path / "t.csv").write_text(f"a,b,kind\n{rows}\n")
    assert TASK.score(entries("unlearning")["doing nothing"].fit, 0, str(tmp_path / "t.csv"), "kind") >= 0
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(16, 2)), y=np.arange(16) % 2)
    np.savez(tmp_path / "many.npz", x=rng.normal(size=(120, 2)), y=np.arange(120) % 2)
    with pytest.raises(ValueError, match="at least 20 inputs are needed, to train on, to forget some"):
        compare("unlearning", data=str(tmp_path / "d.npz"))
    with pytest.raises(
        ValueError, match="share must let some of 90 rows be forgotten and two be kept, got 1"
    ):
        compare("unlearning", data=str(tmp_path / "many.npz"), settings={"share": "1.0"})
    compare("unlearning", data=str(tmp_path / "many.npz"), settings={"share": "1.0", "forget": "class"})
    few = ImageData(np.zeros((20, 2, 1, 1), np.float32), np.arange(20) % 2, ("a", "b"))
    unlearning.TASK.needs(few, share=0.3)
