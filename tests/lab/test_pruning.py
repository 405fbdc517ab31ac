"""The task of pruning: what it counts, what it refuses, and that every entry keeps to its share."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from posterity.claims.compression import dfpc, harp, imp_geometry
from posterity.engine.compare import compare
from posterity.lab.nets import cnn
from posterity.lab.tasks import entries, get_task, pruning
from posterity.lab.tasks.pruning import left_of, weights_of

SCORE = get_task("pruning").score


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Return a file of images with a bright spot where their class has it; networks train for 4 epochs."""
    for module in (pruning, dfpc, harp, imp_geometry):
        monkeypatch.setattr(module, "image_epochs", lambda n: 4)
    rng = np.random.default_rng(0)
    y = np.arange(100) % 2
    x = 0.5 * np.eye(36)[9 * y] + 0.4 * rng.random((100, 36))
    np.savez(tmp_path / "i.npz", x=x.reshape(100, 6, 6), y=y)
    return str(tmp_path / "i.npz")


@pytest.mark.parametrize("of", ["weights", "multiply-adds"])
def test_entries_keep_to_their_share(of, images):
    for name, each in entries("pruning").items():
        if each.where.get("of", of) == of:
            found = SCORE(each.fit, 0, images, None, of=of, share=0.3)
            assert list(found) == ["test accuracy", "dense", "left", "bytes", "seconds"], name
            assert 0 < found["left"] < 0.31 and found["test accuracy"] > 0.4, name


def test_too_much_left_is_refused(images):
    with pytest.raises(ValueError, match=r"at most 0\.3 of the weights, left 1\.0000"):
        SCORE(lambda train, seed: train[0], 0, images, None, share=0.3)


def test_masks_do_not_compete_for_multiplications():
    names = [
        {job.params["entry"] for job in compare("pruning", seeds=1, settings={"of": of})[0]}
        for of in ("weights", "multiply-adds")
    ]
    assert names[0] - names[1] == {name for name, each in entries("pruning").items() if each.where}
    assert "IMP" in names[0]


def test_what_is_left():
    net, x = cnn(1, 3, width=4), torch.rand(1, 1, 8, 8)
    assert left_of(net, "weights", x) == 36 + 288 + 1152 + 48
    assert left_of(net, "multiply-adds", x) == 64 * 36 + 16 * 288 + 4 * 1152 + 48
    weights_of(net)[1].zero_()
    assert left_of(net, "weights", x) == 36 + 1152 + 48


def test_filters_that_go_are_those_of_lowest_score():
    torch.manual_seed(0)
    net, x = cnn(1, 3, width=4).eval(), torch.rand(2, 1, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    scores = [torch.arange(n) + 0.5 for n in (4, 8, 16)]
    small = pruning._without_filters(net, scores, 0.5, x[:1])
    silent = copy.deepcopy(net)
    for place, kept in ((3, small[0].out_channels), (6, small[3].out_channels), (11, small[6].out_channels)):
        weight = silent[place].weight.data
        weight[:, : weight.shape[1] - kept] = 0
    torch.testing.assert_close(small(x), silent(x))
    assert left_of(small, "multiply-adds", x[:1]) <= 0.5 * left_of(net, "multiply-adds", x[:1])
