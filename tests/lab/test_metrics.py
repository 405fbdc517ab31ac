"""Metrics against independent libraries."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import multiclass_calibration_error

from posterity.lab.metrics import calibration_error, node_score, rank_correlation, sliced_wasserstein


def test_sliced_wasserstein_is_pots():
    ot = pytest.importorskip("ot")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 3, generator=generator), torch.randn(50, 3, generator=generator) + 1
    directions = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    directions = (directions / directions.norm(dim=0)).numpy()
    for a, b in ((x, y), (x, x + 0.5)):
        peer = ot.sliced_wasserstein_distance(a.double().numpy(), b.double().numpy(), projections=directions)
        assert sliced_wasserstein(a, b, n_directions=40, seed=7) == pytest.approx(peer, rel=1e-6)


def test_sliced_wasserstein_in_one_dimension_is_exact():
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [3.0], [4.0]])
    assert sliced_wasserstein(x, y) == pytest.approx(3.0)
    assert sliced_wasserstein(x, torch.cat([x, x])) == pytest.approx(0.0)


def test_calibration_error_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 4, generator=generator)
    target = torch.randint(4, (500,), generator=generator)
    probabilities = logits.softmax(1)
    peer = multiclass_calibration_error(probabilities, target, num_classes=4, n_bins=15)
    assert calibration_error(probabilities, target) == pytest.approx(float(peer), abs=1e-6)
    assert calibration_error(np.eye(3), np.arange(3)) == 0


def test_nodes_of_two_classes_are_scored_by_the_roc_curve():
    scores = torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0], [5.0, 6.1], [9.0, 0.0]])
    y, rows = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([True, True, True, True, False])
    assert node_score(scores, y, rows) == pytest.approx(3 / 4)  # of the 4 pairs, one is the wrong way round
    assert node_score(scores, y, torch.tensor([True, False, False, True, True])) == pytest.approx(2 / 3)
    three = torch.eye(3)[[0, 1, 2, 2]]
    assert node_score(three, torch.tensor([0, 1, 2, 0]), torch.ones(4, dtype=torch.bool)) == 0.75


def test_rank_correlation_is_scipys_and_nought_without_an_order():
    x, y = np.random.default_rng(0).standard_normal((2, 20))
    assert rank_correlation(x.tolist(), torch.from_numpy(y)) == stats.spearmanr(x, y).statistic
    assert rank_correlation([1, 2, 3], [5.0, 5.0, 5.0]) == rank_correlation([0, 0], [1, 2]) == 0.0
