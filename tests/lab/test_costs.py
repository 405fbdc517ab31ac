import io
import time
from functools import partial

import pytest
import torch
from torch import nn

from posterity.lab.costs import saved_bytes, seconds_in_turns


def test_bytes_are_those_of_the_file_and_zeros_deflate():
    net = nn.Linear(200, 100)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert saved_bytes(net.state_dict()) == len(file.getvalue()) > 80_000
    full = saved_bytes(net.state_dict(), deflated=True)
    nn.init.zeros_(net.weight)
    assert saved_bytes(net.state_dict()) > 80_000 > 10 * saved_bytes(net.state_dict(), deflated=True)
    assert full > 60_000


def test_works_take_turns_after_a_round_that_is_not_counted():
    calls = []
    seconds = seconds_in_turns([partial(calls.append, "a"), lambda: (calls.append("b"), time.sleep(0.01))], 3)
    assert calls == ["a", "b"] * 4 and seconds.shape == (3, 2)
    assert seconds[:, 1].min() >= 0.01 and seconds[:, 0].min() == pytest.approx(0, abs=0.01)
