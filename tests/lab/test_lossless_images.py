"""Pictures and their codecs: what is read, what comes back, what an entry may not change."""

import numpy as np
import pytest
from PIL import Image

from posterity.claims.coding import fsar
from posterity.engine.compare import compare
from posterity.lab.data.pictures import load_pictures
from posterity.lab.tasks import entries, get_task

SCORE = get_task("lossless-images").score


@pytest.fixture
def folder(tmp_path):
    """Return a folder of pictures of several sizes and modes, one of them hidden."""
    rng = np.random.default_rng(0)
    for k in range(12):
        shape = (5 + k, 7, 3) if k % 2 else (1 + k, 9)
        (tmp_path / f"of {k % 3}").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
            tmp_path / f"of {k % 3}" / f"{k}.png"
        )
    (tmp_path / "._x.png").write_bytes(b"no image")
    return tmp_path


QUICK = [name for name, each in entries("lossless-images").items() if each.fit is not fsar.lossless]


@pytest.mark.parametrize("name", QUICK)
def test_codecs_give_back_every_picture(name, folder, tmp_path):
    fit = entries("lossless-images")[name].fit
    found = SCORE(fit, 0, str(folder), None)
    assert 24 < found["bits a pixel"] < 200  # noise, in small files
    assert found["MB/s in"] > 0 < found["MB/s out"]
    np.savez(tmp_path / "grey.npz", x=np.zeros((12, 1, 1), np.uint8))
    assert SCORE(fit, 0, str(tmp_path / "grey.npz"), None)["bits a pixel"] > 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 6), (2, 1, 6, 1), (2, 3, 9, 7)])
def test_errors_of_the_predictor_come_back(shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(fsar._from_errors(fsar._errors(x)), x)
    flat = np.full((1, 1, 4, 5), 7, np.uint8)
    assert fsar._errors(flat).reshape(-1)[1:].max() == 0  # nothing is new but the first


def test_an_entry_that_changes_a_pixel_is_refused(folder):
    def fit(train, seed):
        kept = []
        return lambda x: kept.append(x) or b"", lambda data: [*kept[0][:-1], kept[0][-1] ^ 1]

    with pytest.raises(ValueError, match="give back the pictures"):
        SCORE(fit, 0, str(folder), None)


def test_pictures_of_a_folder_have_the_channels_of_the_richest(folder):
    found = load_pictures(str(folder))
    assert len(found.pictures) == 12 and "12 pictures, in colour" in found.note
    assert {x.shape[0] for x in found.pictures} == {3}
    assert sorted(x.shape[1:] for x in found.pictures)[0] == (1, 9)


def test_the_bundled_tiles():
    tiles = load_pictures("photo-tiles").pictures
    assert len(tiles) == 120 and {x.shape for x in tiles} == {(3, 64, 64)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: np.savez(path / "p.npz", x=np.zeros((12, 4, 4))), "must be uint8"),
        (lambda path: np.savez(path / "p.npz", x=np.zeros((12, 4, 4, 2), np.uint8)), "1 or 3"),
        (lambda path: np.savez(path / "p.npz", x=np.zeros((3, 4, 4), np.uint8)), "at least 10 pictures"),
        (lambda path: np.savez(path / "p.npz", y=np.zeros(3)), "needs an array x"),
    ],
)
def test_what_is_no_set_of_pictures_is_refused(make, says, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=says):
        compare("lossless-images", data=str(tmp_path / "p.npz"))


def test_a_file_that_is_no_picture_is_named(folder):
    (folder / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image"):
        load_pictures(str(folder))
    (folder / "broken.png").unlink()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png must have 8 bits"):
        load_pictures(str(folder))
