"""Grids of images, read again by Pillow."""

import base64
import io

import numpy as np
import pytest
import torch

from posterity.lab.contact_sheet import contact_sheet


def read(picture):
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(picture.png)))
    image.load()
    return np.asarray(image)


def test_small_images_are_enlarged_and_stand_row_by_row_with_a_line_between():
    images = torch.linspace(0, 1, 3).view(3, 1, 1).expand(3, 8, 8)
    sheet = read(picture := contact_sheet(images, columns=2))
    assert sheet.shape == (2 * 32 + 1, 2 * 32 + 1)
    assert (sheet[:32, :32] == 0).all()
    assert (sheet[:32, 33:] == 128).all()
    assert (sheet[33:, :32] == 255).all()
    assert picture.says == "3 images of 8 x 8 pixels in 2 rows"


def test_large_images_are_reduced_by_means_and_colours_kept():
    image = np.zeros((1, 3, 72, 72))
    image[:, 0, ::2] = 1
    sheet = read(contact_sheet(image))
    assert sheet.shape == (36, 36, 3)
    assert (sheet[..., 0] == 128).all()
    assert (sheet[..., 1:] == 0).all()


def test_what_is_outside_is_clipped_and_nan_is_black():
    image = np.array([[[-9.0, 9.0], [np.nan, 0.0]]])
    sheet = read(contact_sheet(image, low=-1, high=1))
    assert [sheet[0, 0], sheet[0, -1], sheet[-1, 0], sheet[-1, -1]] == [0, 255, 0, 128]


def test_only_as_many_as_have_room_are_shown():
    assert contact_sheet(torch.zeros(100, 3, 4, 4)).says == "16 images of 4 x 4 pixels in 2 rows"
