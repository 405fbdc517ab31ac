"""Generation: held-out samples, balls around them, and samplers that are no networks."""

import numpy as np
import pytest
import torch

from posterity.lab.data import load_samples
from posterity.lab.tasks import generation as task


def test_density_and_coverage_count_balls_one_by_one():
    draws = torch.Generator().manual_seed(0)
    real, made = torch.randn(12, 2, generator=draws), torch.randn(9, 2, generator=draws) + 0.5
    radii = [sorted(float((a - b).norm()) for b in real)[3] for a in real]  # the first is itself
    inside = [[float((a - b).norm()) < radius for b in made] for a, radius in zip(real, radii, strict=True)]
    density, coverage = task.density_coverage(real, made, 3)
    assert density == pytest.approx(sum(map(sum, inside)) / (3 * 9))
    assert coverage == pytest.approx(sum(map(any, inside)) / 12)


def test_samples_of_the_same_law_are_dense_and_cover():
    draws = torch.Generator().manual_seed(0)
    density, coverage = task.density_coverage(*(torch.randn(2_000, 2, generator=draws) for _ in "ab"))
    assert density == pytest.approx(1, abs=0.05)
    assert coverage > 0.95
    assert task.density_coverage(torch.randn(99, 2, generator=draws), torch.full((50, 2), 90.0)) == (0, 0)


def test_a_fifth_is_held_out_and_what_is_made_is_laid_beside_it():
    seen = {}

    def fit(train, seed):
        seen["train"] = train
        return lambda n, draws: train[torch.randint(len(train), (n,), generator=draws)]

    found = task._score(fit, 3, "digits", None, samples=300)
    assert seen["train"].shape == (1438, 1, 8, 8)
    assert found["sliced Wasserstein distance"] < 0.15
    assert found["coverage"] > 0.8
    held = {x.tobytes() for x in load_samples("digits").x} - {x.numpy().tobytes() for x in seen["train"]}
    assert len(held) == 359


def test_a_mixture_gives_back_the_moments_of_a_gaussian():
    draws = torch.Generator().manual_seed(0)
    train = torch.randn(2_000, 2, generator=draws) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]) + 3
    made = task.gaussian_mixture(train, 0)(4_000, draws)
    torch.testing.assert_close(made.mean(0), train.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(made.T.cov(), train.T.cov(), atol=0.1, rtol=0)


def test_files_of_images_and_of_points_are_samples(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.full((60, 4, 4), 255, np.uint8))
    assert load_samples(str(tmp_path / "a.npz")).x.shape == (60, 1, 4, 4)
    assert (load_samples(str(tmp_path / "a.npz")).x == 1).all()
    (tmp_path / "b.csv").write_text("x,y\n" + "".join(f"{k},7\n" for k in range(30)))
    points = load_samples(str(tmp_path / "b.csv")).x
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(points.std(0), [1, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 16, 16)])
def test_the_network_fits_the_samples(shape):
    if len(shape) == 3 and shape[1] >= 16:
        pytest.importorskip("diffusers")
    net = task.network_for(torch.zeros(2, *shape), 0)
    found = net(torch.zeros(2, *shape), torch.zeros(2))
    assert getattr(found, "sample", found).shape == (2, *shape)
