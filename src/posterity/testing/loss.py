"""Losses and regularisers: gradient, dtype, extremes, reduction, no side effects."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posterity.testing._agreement import accelerators, floats, global_state, placed, same, untouched
from posterity.testing._low_precision import check_low_precision

__all__ = ["check_loss"]


def check_loss(
    loss: nn.Module,
    *inputs: Any,
    batch_of_one: bool = True,
    extremes: float = 1e4,
    compiles: bool = True,
    symmetric: bool = False,
    detaches: bool = False,
) -> None:
    """Check a loss or regulariser: gradient, dtype, extremes, reduction, no side effects.

    Parameters
    ----------
    loss : nn.Module
        Called with the inputs; returns a scalar, or values a sample for
        ``reduction="none"``.
    *inputs
        Float64 tensors that require a gradient where the loss is differentiated, other
        tensors, or anything else it takes. First axes are the batch.
    batch_of_one : bool, default=True
        Whether a batch of one is defined; if not, it must raise ``ValueError``.
    extremes : float, default=1e4
        Scale at which value and gradient must still be finite.
    compiles : bool, default=True
        Whether to run it through ``torch.compile`` (traced, not code-generated).
    symmetric : bool, default=False
        Whether the order of the batch must not matter to the scalar; a loss with
        ``reduction`` is always tested.
    detaches : bool, default=False
        Whether it takes a part for a constant, as a target that no gradient enters: then its gradient is not
        compared with differences of its value, and the test of the paper must say what it is.
    """
    wants = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    assert wants and all(x.dtype == torch.float64 for x in wants), (
        "give float64 inputs that require a gradient"
    )
    frozen = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    before = global_state()
    value = loss(*inputs)
    untouched(before, "the loss")
    for kept, now in zip(frozen, inputs, strict=True):
        assert not isinstance(now, Tensor) or torch.equal(kept, now.detach()), "the loss changed its input"
    reduction = getattr(loss, "reduction", "mean")
    assert isinstance(value, Tensor), f"a loss returns a tensor, got {type(value).__name__}"
    assert reduction == "none" or value.shape == (), f"a loss is a scalar, got shape {tuple(value.shape)}"
    assert value.requires_grad, "the loss is cut off from its inputs"
    same(loss(*inputs), value, "two calls differ")
    try:
        if not detaches:
            torch.autograd.gradcheck(lambda *xs: loss(*merge(inputs, xs)), tuple(wants), atol=1e-6, rtol=1e-4)
    except RuntimeError as error:
        raise AssertionError(f"gradcheck in float64: {error}") from error

    for dtype in (torch.float32, torch.float64):
        got = loss(*floats(inputs, lambda x, to=dtype: x.detach().to(to)))
        assert got.dtype == dtype, f"the dtype follows the input: {dtype} gave {got.dtype}"
        if dtype == torch.float32:
            same(got.double(), value.detach(), "float32 agrees with float64", rtol=1e-3, atol=1e-4)
    check_low_precision(lambda part, *xs: part(*xs), loss, inputs, slack=4)

    one = [x[:1] if isinstance(x, Tensor) and x.ndim and len(x) == len(wants[0]) else x for x in inputs]
    if batch_of_one:
        assert torch.isfinite(loss(*one)).all(), "a batch of one is finite"
    else:
        try:
            loss(*one)
        except ValueError:
            pass
        else:
            raise AssertionError("a batch of one is not defined, but raised no ValueError")

    for scale in (extremes, 1 / extremes, 0.0):
        far = floats(inputs, lambda x, by=scale: x.detach().mul(by).requires_grad_(x.requires_grad))
        result = loss(*far)
        assert torch.isfinite(result).all(), f"finite with inputs scaled by {scale:g}"
        leaves = [x for x in far if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(result.sum(), leaves, allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in grads), f"gradient finite at scale {scale:g}"

    if hasattr(loss, "reduction"):
        each = copy.deepcopy(loss)
        each.reduction = "none"  # type: ignore[assignment]
        values = each(*inputs)
        for how in ("mean", "sum"):
            each.reduction = how  # type: ignore[assignment]
            same(each(*inputs), getattr(values, how)(), f'reduction="{how}" is the {how} of "none"')
    if symmetric:
        order = torch.randperm(len(wants[0]), generator=torch.Generator().manual_seed(1))
        batch = [x[order] if isinstance(x, Tensor) and x.ndim and len(x) == len(order) else x for x in inputs]
        same(loss(*batch), value, "the order of the batch matters")

    grads = torch.autograd.grad(value.sum(), wants)
    for device in accelerators():
        there = placed(device, inputs)
        far = copy.deepcopy(loss).to(device)(*there)
        assert far.device.type == device.type, f"on {device} the loss is on {far.device}"
        same(far.cpu(), value, f"{device} agrees with the CPU")
        theirs = torch.autograd.grad(
            far.sum(), [x for x in there if isinstance(x, Tensor) and x.requires_grad]
        )
        same([grad.cpu() for grad in theirs], list(grads), f"the gradient on {device}")

    again = pickle.loads(pickle.dumps(loss))
    same(again(*inputs), value, "pickling changes it")
    if compiles:
        compiled = torch.compile(loss, backend="eager")
        same(compiled(*inputs), value, "torch.compile changes it", rtol=1e-6, atol=1e-8)


def merge(inputs: Sequence[Any], new: Sequence[Tensor]) -> list[Any]:
    fresh = iter(new)
    return [next(fresh) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
