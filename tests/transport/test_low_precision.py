"""Low precision of transport where no conformance check goes, by paper."""

import pytest
import torch

from posterity.testing._low_precision import check_low_precision, relative_error
from posterity.transport import (
    QuasiSlicedWasserstein,
    SparseTransportRouter,
    project_sparse_simplex,
    sparse_transport,
)

NARROW = [torch.bfloat16, torch.float16]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [3, 200], ids=lambda k: f"sparse-ot-{k}")
def test_projections_of_long_rows_round_their_result_only(as_a_user, k):
    v, total = draw(4, 200).requires_grad_(), 1 + draw(4, seed=1).abs()
    check_low_precision(lambda v, s: project_sparse_simplex(v, k, total=s), None, (v, total), slack=2)


@pytest.mark.parametrize("solver", ["lbfgs", "adam"], ids=lambda name: f"sparse-ot-{name}")
@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_masses_that_sum_alike_up_to_their_dtype_are_transported(as_a_user, dtype, solver):
    a, b, cost = (x.to(dtype) for x in (draw(40).softmax(0), draw(30, seed=1).softmax(0), draw(40, 30).abs()))
    options = {"k": 40, "reg": 5.0, "solver": solver, "max_iter": 60}
    result = sparse_transport(a, b, cost, **options)
    assert {part.dtype for part in (result.value, result.plan, result.alpha)} == {dtype}
    a, b, cost = (x.double() for x in (a, b, cost))
    exact = sparse_transport(a * b.sum() / a.sum(), b, cost, **options)
    for ours, theirs in ((result.value, exact.value), (result.plan, exact.plan)):
        assert relative_error(ours, theirs) < 2 * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="equal sums"):
        sparse_transport(1.05 * a.to(dtype), b.to(dtype), cost.to(dtype), **options)


@pytest.mark.parametrize("dtype", NARROW, ids=["sparse-ot-bfloat16", "sparse-ot-float16"])
def test_tokens_go_to_the_experts_of_the_float32_router(as_a_user, dtype):
    torch.manual_seed(0)
    router, x = SparseTransportRouter(16, 4).to(dtype), draw(2, 40, 16).to(dtype)
    found = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router.float()(x.float())
    exact = router(x.float())
    assert torch.equal(found.dispatch, exact.dispatch)
    assert torch.equal(cast.dispatch, exact.dispatch)
    assert torch.equal(cast.combine, exact.combine)
    assert torch.equal(found.combine, exact.combine.to(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=["quasi-sliced-wasserstein-b", "quasi-sliced-wasserstein-f"])
def test_directions_are_not_rounded_with_the_clouds(as_a_user, dtype):
    distance = QuasiSlicedWasserstein(1)
    across = torch.stack([-distance.directions[0, 1], distance.directions[0, 0], torch.zeros(())])
    x, y = torch.zeros(1, 3, dtype=dtype), across[None].to(dtype)  # what is left of y along the direction
    exact = distance(x.float(), y.float())
    assert 0 < float(exact) < 0.01
    assert torch.equal(distance(x, y), exact.to(dtype))
