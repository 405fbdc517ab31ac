"""FoRDE's claim on data as users have them."""

import math

import numpy as np

from posterity.claims import Trial
from posterity.claims.uncertainty.forde import corruption


def test_a_channel_without_spread_gives_no_nan(tmp_path):
    x = np.random.default_rng(0).random((60, 8, 8, 3), dtype=np.float32)
    x[..., 1] = 0.5
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(60) % 2)
    found = corruption(Trial(0), data=str(tmp_path / "images.npz"), n_train=40, n_models=2, width=8, epochs=1)
    assert all(math.isfinite(value) for value in found.values())
