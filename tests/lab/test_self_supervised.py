import numpy as np
import pytest
import torch

from posterity.engine.compare import curve_point
from posterity.lab.data import load_images
from posterity.lab.tasks import entries, get_task
from posterity.lab.tasks import self_supervised as task

SMALL = ("raw pixels", "PCA", "random encoder")


@pytest.fixture(scope="module")
def scores():
    """Figures of the cheap entries."""
    return {
        name: task._score(entries("self-supervised")[name].fit, 100, "digits", None, labels_per_class=5)
        for name in SMALL
    }


def test_every_entry_is_measured_by_probe_neighbours_and_labels(scores):
    for found in scores.values():
        metric, neighbours, *rest = found
        assert metric == "linear probe, 5 labels a class" and neighbours == "nearest neighbours"
        assert [curve_point(name)[2] for name in rest] == [1, 2, 5, 10, 20, 50]
        assert found[rest[2]] == found[metric]
        curve = [found[name] for name in rest]
        assert np.mean(np.diff(curve) > 0) > 0.7 and curve[-1] > 0.9
        assert all(0.1 < value <= 1 for value in found.values())


def test_the_supervised_network_learns_from_the_labels_of_the_probe_alone(monkeypatch):
    monkeypatch.setattr(task, "STEPS", 3)
    images = load_images("digits")
    x, y = torch.from_numpy(images.x[:80]), torch.from_numpy(images.y[:80])
    features = entries("self-supervised")["supervised, the probe's labels"].fit(x, 0)
    a, again = features(x[:20], y[:20], x), features(x[:20], y[:20], x)
    assert a.shape == (80, 64) and torch.equal(a, again)
    assert not torch.equal(features(x[:30], y[:30], x), a)


def test_too_few_images_are_refused_before_anything_is_trained():
    images = load_images("digits")
    few = type(images)(images.x[:100], images.y[:100], images.classes)
    get_task("self-supervised").needs(few, labels_per_class=3)
    with pytest.raises(ValueError, match="at least 300 images are needed for 10 labels of each of 10"):
        get_task("self-supervised").needs(few)
