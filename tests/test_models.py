"""A user's model at rest, its constants, its samples at once; and early stopping: what papers share."""

import pytest
import torch
from torch import nn

from posterity._models import at_rest, by_sample, frozen, held, resize_buffers
from posterity._stopping import Best


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4))
    net[2].eval()
    net[0].bias.requires_grad_(False)
    return net


def test_modes_and_flags_are_as_before_also_after_an_error():
    net = network()
    for context in (at_rest, frozen, held):
        with pytest.raises(KeyError), context(net, len):
            assert net.training == (context is frozen)
            assert net[0].weight.requires_grad == (context is at_rest)
            raise KeyError
        assert [part.training for part in net] == [True, True, False]
        assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]


def test_samples_that_vmap_cannot_follow_go_one_by_one_and_lack_of_memory_is_said():
    x = torch.arange(6.0).reshape(3, 2)
    by_branch = by_sample(lambda row: {"sum": row.sum() if bool(row[0] > 1) else -row.sum()}, x)
    assert by_branch["sum"].tolist() == [-1.0, 5.0, 9.0]
    assert by_sample(lambda a, b: a @ b, x, x).tolist() == [1.0, 13.0, 41.0]

    def greedy(row):
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError):
        by_sample(greedy, x)


def test_buffers_take_the_shape_that_was_saved():
    module = nn.Module()
    module.register_buffer("seen", torch.zeros(0))
    resize_buffers(module, ["seen"], {"a.seen": torch.ones(2, 3, dtype=torch.float64)}, "a.")
    assert module.seen.shape == (2, 3) and module.seen.dtype == torch.float64
    resize_buffers(module, ["seen"], {}, "a.")
    assert module.seen.shape == (2, 3)


def test_the_best_weights_come_back_and_patience_ends():
    net = nn.Linear(1, 1, bias=False)
    best, scores = Best(net, 2), [3.0, 2.0, float("nan"), 2.0]
    ended = []
    for k, score in enumerate(scores):
        nn.init.constant_(net.weight, float(k))
        ended.append(best.stop(score))
    assert ended == [False, False, False, True] and best.score == 2.0
    best.restore()
    assert net.weight.item() == 1.0
    never = Best(net)
    assert not never.stop(float("nan"))
    never.restore()
    assert net.weight.item() == 1.0
