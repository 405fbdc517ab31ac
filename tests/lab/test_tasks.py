"""Tasks: every entry on images and on features, and what the scores measure."""

import numpy as np
import pytest

from posterity.claims.uncertainty import cider, esd
from posterity.engine.compare import compare
from posterity.lab.tasks import entries, get_task, image_classification, task_names
from posterity.lab.tasks.imputation import hide


@pytest.fixture
def short(monkeypatch):
    """Let networks train for 20 epochs."""
    for module in (image_classification, cider, esd):
        monkeypatch.setattr(module, "image_epochs", lambda n: 20)


@pytest.fixture
def features(tmp_path, short):
    """Return a file of five classes that lie apart, as rows."""
    rng = np.random.default_rng(0)
    y = np.arange(150) % 5
    np.savez(tmp_path / "d.npz", x=3 * np.eye(12)[2 * y] + rng.normal(size=(150, 12)), y=y)
    return str(tmp_path / "d.npz")


@pytest.fixture
def images(tmp_path, short):
    """Return a file of images with a bright spot where their class has it."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 5
    x = 0.5 * np.eye(25)[3 * y] + 0.4 * rng.random((60, 25))
    np.savez(tmp_path / "i.npz", x=x.reshape(60, 5, 5), y=y)
    return str(tmp_path / "i.npz")


@pytest.mark.parametrize(
    "name", ["maximum softmax", "energy", "Mahalanobis", "10th nearest neighbour", "CIDER"]
)
def test_unknown_classes_score_higher(name, features):
    assert get_task("ood-detection").score(entries("ood-detection")[name].fit, 0, features, None) > 0.6


def test_unknown_images(images):
    for name in ("energy", "CIDER"):
        assert 0.3 < get_task("ood-detection").score(entries("ood-detection")[name].fit, 0, images, None) <= 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cross-entropy", "features"), ("temperature scaling", "features"), ("label smoothing", "features"),
     ("focal loss", "features"), ("ESD", "features"), ("ESD", "images")],
)  # fmt: skip
def test_probabilities_are_compared_with_outcomes(name, kind, request):
    seen = []

    def fit(train, seed):
        predict = entries("calibration")[name].fit(train, seed)
        return lambda x: seen.append(predict(x)) or seen[-1]

    error = get_task("calibration").score(fit, 0, request.getfixturevalue(kind), None)
    assert 0 <= error < 0.5
    np.testing.assert_allclose(seen[0].sum(1), 1, atol=1e-5)


def test_hidden_classes_are_never_trained_on(features):
    shown = []

    def fit(train, seed):
        shown.append(np.unique(train[1]))
        return lambda x: np.zeros(len(x))

    assert get_task("ood-detection").score(fit, 0, features, None) == 0.5
    assert shown[0].tolist() == [0, 1, 2]


def test_two_classes_leave_none_to_hide_which_is_said_before_any_trial(tmp_path):
    two = tmp_path / "two.npz"
    np.savez(two, x=np.random.default_rng(0).random((20, 4)), y=np.arange(20) % 2)
    with pytest.raises(ValueError, match="at least 3 classes of 5 inputs or more are needed, has 0 10, 1 10"):
        compare("ood-detection", data=str(two))
    assert compare("calibration", data=str(two))[0]


def test_an_entry_is_run_by_the_module_that_registers_it_however_often_jobs_are_made():
    for _ in range(2):
        jobs, _, _ = compare("node-classification", seeds=1)
        homes = {job.params["entry"]: job.params["home"] for job in jobs}
        assert homes["GCN"] == "posterity.lab.tasks.node_classification"
        assert homes["A-DGN"] == "posterity.claims.graphs.a_dgn"


@pytest.mark.parametrize("name", task_names())
def test_a_task_is_its_file_and_has_ordinary_choices(name):
    task = get_task(name)
    assert task.name == name
    assert not next(iter(entries(name).values())).paper
    with pytest.raises(ValueError, match=f"task must be one of .*{name}.*, got 'cooking'"):
        get_task("cooking")


@pytest.mark.parametrize("pattern", ["points", "blocks", "sensors"])
def test_a_quarter_is_hidden_whatever_the_pattern(pattern):
    hidden = hide((4_000, 6), pattern, 0)
    np.testing.assert_allclose(hidden.mean(), 0.25, atol=0.02)
    edges = np.diff(np.pad(hidden, ((1, 1), (0, 0))).astype(int), axis=0)
    starts, ends = (np.argwhere(sign == edges.T) for sign in (1, -1))
    lengths = (ends - starts)[:, 1]
    inside = (starts[:, 1] > 0) & (ends[:, 1] < 4_000)
    if pattern == "points":
        np.testing.assert_allclose(lengths.mean(), 4 / 3, rtol=0.1)  # a run is geometric
    elif pattern == "blocks":
        assert lengths[inside].min() == 12 and np.bincount(lengths[inside]).argmax() == 12
    else:
        assert lengths.tolist() == [1_000] * 6 and len(set(starts[:, 1].tolist())) > 1


def test_seasonal_means_know_a_season_and_survive_a_silent_sensor():
    hours = np.arange(960)
    series = np.stack([np.sin(2 * np.pi * hours / 24), np.cos(2 * np.pi * hours / 10)], axis=1)
    holes = series.copy()
    holes[100:300, 0] = holes[500:, 1] = np.nan
    fill = entries("imputation")["seasonal means"].fit(series, 0)
    np.testing.assert_allclose(fill(holes), series, atol=1e-9)
    assert np.isfinite(fill(np.full((50, 2), np.nan))).all()
