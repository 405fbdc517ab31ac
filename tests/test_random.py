"""Seeds: a block under one leaves torch as it was, on every device."""

import numpy as np
import pytest
import torch

from posterity._random import drawn_seed, seed_from, seeded


def test_a_seeded_block_draws_the_same_and_leaves_torch_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(3):
            drawn.append(torch.rand(2))
    assert torch.equal(*drawn)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(3)
        assert torch.equal(torch.rand(2), drawn[0])
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_come_from_what_draws():
    assert drawn_seed(0) == int(np.random.RandomState(0).randint(2**31 - 1))
    one, other = (seed_from(torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == other != seed_from(torch.Generator().manual_seed(6))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_that_is_named_is_the_one_that_is_seeded():
    states = [torch.cuda.get_rng_state(k) for k in (0, 1)]
    with seeded(3, "cuda:1"):
        pass
    assert all(torch.equal(torch.cuda.get_rng_state(k), state) for k, state in enumerate(states))
