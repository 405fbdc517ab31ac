"""Canny's edges, which layouts and renders share, against a loop over pixels written from its definition."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from posterity.generative._canny import canny


def by_pixels(image, low, high):
    """Return the edges of an 8-bit grey image, one pixel after another, in whole numbers."""
    h, w = image.shape
    ext = np.pad(image.astype(int), 1, mode="edge")
    g = np.zeros((2, h, w), int)
    for i in range(h):
        for j in range(w):
            part = ext[i : i + 3, j : j + 3]
            g[0, i, j] = (part[:, 2] - part[:, 0]) @ [1, 2, 1]
            g[1, i, j] = (part[2] - part[0]) @ [1, 2, 1]
    size = np.pad(abs(g[0]) + abs(g[1]), 1)
    weak = np.zeros((h, w), bool)
    for i in range(h):
        for j in range(w):
            angle = math.degrees(math.atan2(g[1, i, j], g[0, i, j])) % 180
            m, here = size[i + 1, j + 1], size[i : i + 3, j : j + 3]
            if angle < 22.5 or angle > 157.5:
                ridge = m > here[1, 0] and m >= here[1, 2]
            elif 67.5 < angle < 112.5:
                ridge = m > here[0, 1] and m >= here[2, 1]
            elif angle < 90:
                ridge = m > here[0, 0] and m > here[2, 2]
            else:
                ridge = m > here[0, 2] and m > here[2, 0]
            weak[i, j] = ridge and m > low
    strong = weak & (size[1:-1, 1:-1] > high)
    return ndimage.binary_propagation(strong, np.ones((3, 3)), mask=weak)


@pytest.mark.parametrize("seed", range(3))
def test_edges_are_those_of_a_loop_over_pixels(seed):
    image = np.random.default_rng(seed).integers(0, 256, (24, 31)).astype(np.uint8)
    image[5:15, 8:20] = 40
    x = torch.from_numpy(image)[None, None] / 255
    ours = canny(x, low=300 / 255, high=500 / 255, sigma=None)
    np.testing.assert_array_equal(ours[0, 0].bool().numpy(), by_pixels(image, 300, 500))


@pytest.mark.parametrize("sigma", [None, 1.0])
def test_a_step_is_one_line_wherever_the_brightness_starts(sigma):
    x = torch.zeros(2, 3, 12, 12)
    x[0, :, :, 6:] = 0.5
    x[1, :, 6:] = 0.5
    found = canny(x, low=0.1, high=0.2, sigma=sigma)
    torch.testing.assert_close(found.sum((1, 2, 3)), torch.tensor([12.0, 12.0]))
    assert (found[0, 0].sum(1) == 1).all() and (found[1, 0].sum(0) == 1).all()
    torch.testing.assert_close(canny(x + 0.3, low=0.1, high=0.2, sigma=sigma), found)


def test_a_weak_edge_stays_where_it_touches_a_strong_one():
    x = torch.zeros(2, 1, 12, 12)
    x[:, :, :, 6:] = 0.05
    x[0, :, :, 6:] = torch.linspace(1, 0.05, 12)[:, None]
    found = canny(x, low=0.1, high=1.0, sigma=None)
    assert found[0, 0, 2:11, 6].all()
    assert found[1].sum() == 0


def test_images_of_one_batch_do_not_touch_and_the_steepest_channel_counts():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.cat([canny(image[None], low=1, high=2, sigma=0.7) for image in x])
    torch.testing.assert_close(canny(x, low=1, high=2, sigma=0.7), one_by_one)
    grey = torch.zeros(1, 3, 8, 8)
    grey[:, 1, :, 4:] = 1
    torch.testing.assert_close(
        canny(grey, low=1, high=2, sigma=None), canny(grey[:, 1:2], low=1, high=2, sigma=None)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_edges_keep_dtype_and_do_not_need_contiguous_images(dtype):
    x = torch.zeros(1, 1, 16, 8, dtype=dtype)
    x[..., :8, :] = 1
    found = canny(x.mT, low=1, high=2, sigma=1.0)
    assert found.dtype == dtype
    torch.testing.assert_close(found.mT, canny(x, low=1, high=2, sigma=1.0))
    assert canny(x[:0], low=1, high=2, sigma=None).shape == (0, 1, 16, 8)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, r"scale to \[0, 1\]"),
        (torch.zeros(3, 4, 4), {}, r"\(n, c, h, w\)"),
        (torch.full((1, 1, 4, 4), -1.0), {}, r"image must be in \[0, 1\]"),
        (torch.full((1, 1, 4, 4), math.nan), {}, "image must be finite"),
        (torch.zeros(1, 1, 4, 4), {"low": 3}, "low must be at most high"),
        (torch.zeros(1, 1, 4, 4), {"sigma": 0}, "sigma must be greater than 0"),
    ],
)
def test_bad_input_is_refused(images, settings, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        canny(images, **{"low": 1, "high": 2, "sigma": None} | settings)
