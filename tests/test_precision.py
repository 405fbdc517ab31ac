"""Low precision: sums go on growing, squares do not overflow, and results have the input's dtype."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from posterity._precision import rounding, unit_rows, widened
from posterity.transport import (
    DEMDLoss,
    DEMDRegularizer,
    QuasiSlicedWasserstein,
    multimarginal_emd,
    soft_histogram,
    sphere_points,
)
from posterity.uncertainty import ESDLoss, ESDMetric, MMCELoss, SBECELoss, expected_squared_difference

NARROW = [torch.bfloat16, torch.float16]


class Pair(NamedTuple):
    value: Tensor
    count: int


def test_a_widened_function_sees_float32_and_returns_what_came():
    seen = []

    @widened
    def total(x, scale=1.0, other=None):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return Pair(x.sum() * scale, len(x))

    x = torch.full((1000,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    found = total(x, 2.0, other=x)
    assert seen == [(torch.float32, False)]
    assert (found.value.dtype, found.count) == (torch.bfloat16, 1000)
    found.value.backward()
    assert x.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert total(x.detach().float()).value.dtype == torch.float32
        assert seen[-1] == (torch.float32, False)
    assert total(x.detach().double()).value.dtype == torch.float64
    assert rounding(torch.float32, 1e-4) == 1e-4
    assert rounding(torch.bfloat16, 1e-4) == 2**-7


def scores(n=2000):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, 10, generator=generator)
    right = torch.rand(n, generator=generator) < 0.6
    return logits, torch.where(right, logits.argmax(1), torch.randint(10, (n,), generator=generator))


LOSSES = [ESDLoss(), ESDLoss(root=False), MMCELoss(), SBECELoss()]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_calibration_losses_are_those_of_the_rounded_logits(as_a_user, loss, dtype):
    logits, target = scores()
    low = logits.to(dtype).requires_grad_()
    value = loss(low, target)
    assert value.dtype == dtype
    torch.testing.assert_close(
        value.float(), loss(low.detach().float(), target), rtol=torch.finfo(dtype).eps, atol=0
    )
    value.backward()
    assert torch.isfinite(low.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            loss(logits, target), loss(logits.double(), target).float(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("dtype", NARROW)
def test_a_small_calibration_error_is_not_rounded_to_none(as_a_user, dtype):
    generator = torch.Generator().manual_seed(0)
    sure = torch.full((4000,), 0.9)
    right = torch.rand(4000, generator=generator) < 0.85
    exact = expected_squared_difference(sure.to(dtype).double(), right)
    assert float(expected_squared_difference(sure.to(dtype), right)) == pytest.approx(float(exact), rel=0.01)
    assert float(exact) < 0.088**2


@pytest.mark.parametrize("rounded", ["bfloat16", "three digits"])
def test_probabilities_that_were_rounded_are_no_logits(as_a_user, rounded):
    logits, target = scores(500)
    shares = logits.softmax(1)
    exact, metric = ESDMetric(), ESDMetric()
    exact.update(shares, target)
    metric.update(shares.bfloat16() if rounded == "bfloat16" else (1000 * shares).round() / 1000, target)
    assert float(metric.compute()) == pytest.approx(float(exact.compute()), abs=0.01)


@pytest.mark.parametrize("dtype", NARROW)
def test_histograms_of_many_scores_go_on_counting(as_a_user, dtype):
    groups = torch.arange(10_000) % 3
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + groups
    low = DEMDRegularizer()(values.to(dtype), groups)
    assert low.dtype == dtype
    assert float(low) == pytest.approx(float(DEMDRegularizer()(values, groups)), rel=0.01)
    histogram = soft_histogram(values.sigmoid().to(dtype).clamp_max(0.99), 10)
    assert histogram.dtype == dtype
    assert float(histogram.float().sum()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_that_sum_to_one_up_to_their_dtype_are_histograms(as_a_user, dtype):
    rows = torch.rand(5, 300, generator=torch.Generator().manual_seed(0)).softmax(1)
    low = rows.to(dtype)
    result = multimarginal_emd(low)
    assert result.value.dtype == result.potentials.dtype == result.masses.dtype == dtype
    exact = low.double() / low.double().sum(1, keepdim=True)
    assert float(DEMDLoss()(low)) == pytest.approx(float(DEMDLoss()(exact)), rel=0.02)
    with pytest.raises(ValueError, match="rows of one sum"):
        multimarginal_emd(torch.stack([low[0], 1.1 * low[1]]))


@pytest.mark.parametrize("dtype", NARROW)
def test_far_clouds_do_not_overflow(as_a_user, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 3, generator=generator).to(dtype) for _ in range(2))
    distance = QuasiSlicedWasserstein(50)
    value = distance(x, y + 3000)
    assert value.dtype == dtype
    assert float(value) == pytest.approx(float(distance(x.float(), (y + 3000).float())), rel=0.01)


@pytest.mark.parametrize("method", ["spiral", "gaussian", "distance"])
def test_what_is_kept_is_nobodys_and_serves_training_later(method):
    with torch.inference_mode():
        first = sphere_points(13, method, dtype=torch.float64).clone()
    points = sphere_points(13, method, dtype=torch.float64)
    points.mul_(0)
    again = sphere_points(13, method, dtype=torch.float64)
    assert torch.equal(again, first)
    cloud = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    QuasiSlicedWasserstein(13, method=method)(cloud, torch.zeros(20, 3)).backward()
    assert torch.isfinite(cloud.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_rows_are_those_of_normalize_and_no_square_overflows(dtype):
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    plain = torch.nn.functional.normalize(x, dim=1)
    assert torch.equal(unit_rows(x), plain) and torch.equal(unit_rows(x.T, 0), plain.T)
    far = 100 if dtype == torch.float32 else 900
    for power in (-far, far):
        assert torch.equal(unit_rows(x * 2.0**power), plain)
    assert unit_rows(torch.zeros(2, 3, dtype=dtype)).tolist() == [[0.0] * 3] * 2
    assert unit_rows(torch.zeros(2, 0, dtype=dtype)).shape == (2, 0)
