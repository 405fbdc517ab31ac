"""Streams of tasks, what a learner keeps of them, and the measures of the field."""

import numpy as np
import pytest
import torch

from posterity.lab.continual import Body, ReplayLearner, experiences, kept, learn, require_experiences
from posterity.lab.data import load_images
from posterity.lab.tasks.continual import JointLearner, Setting


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def test_measures_by_hand():
    found = kept(np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.9, 0.6]]), np.array([0.1, 0.1, 0.2]))
    assert found.average == pytest.approx((0.5 + 0.9 + 0.6) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9)) / 2)
    assert found.backward == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.forward == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert kept(np.array([[0.7]])) == (0.7, 0, 0, 0)


@pytest.mark.parametrize("scenario", ["classes", "blurry", "domains"])
def test_every_image_is_in_one_task_and_the_seed_decides_which(digits, scenario):
    stream, again = (experiences(digits, scenario, 5, 0) for _ in range(2))
    assert sum(len(part.y) for part in stream) == len(digits.y) - 400
    assert all(torch.equal(a.x, b.x) for a, b in zip(stream, again, strict=True))
    other = experiences(digits, scenario, 5, 1)
    assert not torch.equal(stream[0].y[:20], other[0].y[:20])


def test_classes_come_in_turn_and_each_is_tested_once(digits):
    stream = experiences(digits, "classes", 3, 0)
    of_task = [set(part.y.tolist()) for part in stream]
    assert sorted(len(each) for each in of_task) == [3, 3, 4]
    assert set.union(*of_task) == set(range(10))
    assert [set(part.y_test.tolist()) for part in stream] == of_task


def test_a_blurry_stream_spreads_the_share_that_it_says(digits):
    stream = experiences(digits, "blurry", 5, 0, blur=0.5)
    at_home = sum(np.isin(part.y, part.y_test.unique()).sum() for part in stream)
    assert at_home / 1397 == pytest.approx(0.5 + 0.5 / 5, abs=0.04)
    whole = experiences(digits, "blurry", 5, 0, blur=0.0)
    assert all(set(part.y.tolist()) == set(part.y_test.tolist()) for part in whole)


def test_domains_show_the_same_test_images_at_other_angles(digits):
    stream = experiences(digits, "domains", 4, 0)
    assert torch.equal(stream[0].y_test, stream[3].y_test)
    torch.testing.assert_close(stream[3].x_test, torch.rot90(stream[0].x_test, 1, (2, 3)), atol=1e-5, rtol=0)
    assert len(set(stream[1].y.tolist())) == 10


class Recorder:
    def __init__(self):
        self.calls, self.seen = [], []

    def observe(self, x, y, task=None):
        self.calls.append((len(y), task))
        self.seen += y.tolist()

    def predict(self, x):
        return torch.full((len(x),), self.seen[-1])


def test_learning_shows_everything_once_in_order_and_tests_all_tasks_after_each(digits):
    stream, learner, after = experiences(digits, "classes", 5, 0), Recorder(), []
    accuracy = learn(learner, stream, after=after.append)
    assert learner.seen == torch.cat([part.y for part in stream]).tolist()
    assert max(n for n, _ in learner.calls) == 16
    assert [task for _, task in learner.calls] == sorted(task for _, task in learner.calls)
    assert after == [0, 1, 2, 3, 4]
    last = stream[2].y[-1]
    assert accuracy[2, 2] == pytest.approx(float((stream[2].y_test == last).double().mean()))
    assert accuracy.shape == (5, 5)
    assert (accuracy[2, [0, 1, 3, 4]] == 0).all()


def replay(memory_size, seed=0):
    torch.manual_seed(0)
    return ReplayLearner(Body(torch.nn.Linear(2, 3), 3), 4, memory_size=memory_size, seed=seed)


def test_a_reservoir_keeps_early_and_late_samples_alike():
    places = []
    for seed in range(200):
        learner = replay(10, seed)
        for k in range(50):
            learner._remember(torch.tensor([float(k)]), torch.tensor(0))
        places += [int(x) for x in learner.x]
    assert len(places) == 2000
    assert np.mean(places) == pytest.approx(24.5, abs=1.2)


def test_only_classes_that_came_are_predicted():
    learner = replay(5)
    learner.observe(torch.randn(6, 2), torch.tensor([1, 3, 1, 3, 3, 1]))
    assert set(learner.predict(100 * torch.randn(200, 2)).tolist()) == {1, 3}
    assert len(learner.x) == 5
    assert not replay(0).x


def test_joint_training_starts_again_only_when_something_new_came():
    learner = JointLearner(Setting(torch.zeros(1, 1, 2, 1), 2, 10), 0)
    x, y = torch.randn(40, 1, 2, 1), torch.arange(40) % 2
    x[:, 0, 0, 0] += 4 * y
    learner.observe(x, y)
    assert (learner.predict(x) == y).float().mean() > 0.9
    net = learner.net
    learner.predict(x)
    assert learner.net is net
    learner.observe(x, y)
    assert learner.net is None


def test_refuses_images_that_cannot_be_dealt_out(digits):
    with pytest.raises(ValueError, match="n_tasks must be at most the 10 classes, got 11"):
        require_experiences(digits, "classes", 11)
    require_experiences(digits, "domains", 11)
    few = type(digits)(digits.x[:40], digits.y[:40], digits.classes)
    with pytest.raises(ValueError, match=r"each class needs 6 images, .* has [0-5]"):
        require_experiences(few, "classes", 2)
    with pytest.raises(ValueError, match="200 tasks need 2400 images, has 1797"):
        require_experiences(digits, "domains", 200)
