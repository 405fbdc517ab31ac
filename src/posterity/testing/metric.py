"""Metrics and scores: known values, invariance to order, batch against stream."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from posterity.testing._agreement import accelerators, floats, global_state, placed, untouched

__all__ = ["check_metric"]


def check_metric(
    metric: Callable[..., Any],
    *inputs: Any,
    known: Sequence[tuple[tuple[Any, ...], float]],
    streaming: Callable[[], Any] | None = None,
    permutation_invariant: bool = True,
    atol: float = 1e-6,
) -> None:
    """Check a metric or score: known values, invariance to order, batch against stream.

    Parameters
    ----------
    metric : callable
        ``metric(*inputs)`` returns a scalar.
    *inputs
        Tensors or arrays with equal first axes, at least four rows.
    known : sequence of (inputs, value)
        Cases whose value is known without this code; at least one.
    streaming : callable, optional
        Makes the torchmetrics form, updated with pieces of the same inputs.
    permutation_invariant : bool, default=True
        Whether the order of rows must not matter.
    atol : float, default=1e-6
    """
    assert known, "give a case whose value is known"
    for case, value in known:
        got = float(metric(*case))
        assert abs(got - value) <= atol, f"known value {value}, got {got}"
    before = global_state()
    value = float(metric(*inputs))
    untouched(before, "the metric")
    assert np.isfinite(value), f"the value is finite, got {value}"
    for device in accelerators():
        far = float(metric(*placed(device, inputs)))
        assert abs(far - value) <= atol, f"on {device} {far}, on the CPU {value}"
    for dtype in (torch.bfloat16, torch.float16):
        low = floats(inputs, lambda x, to=dtype: x.to(to))
        got, exact = float(metric(*low)), float(metric(*floats(low, torch.Tensor.double)))
        rounding = 4 * torch.finfo(dtype).eps * abs(exact)
        assert abs(got - exact) <= atol + rounding, (
            f"in {dtype} {got}, in float64 on the same numbers {exact}"
        )
    n = len(inputs[0])
    if permutation_invariant:
        order = np.random.default_rng(0).permutation(n)
        assert abs(float(metric(*(x[order] for x in inputs))) - value) <= atol, "the order of rows matters"
    if streaming is not None:
        for sizes in ((n,), (1, n - 1), (n // 2, n - n // 2), (1,) * n):
            stream = streaming()
            start = 0
            for size in sizes:
                stream.update(*(x[start : start + size] for x in inputs))
                start += size
            got = float(stream.compute())
            assert abs(got - value) <= atol, (
                f"in pieces of {sizes[:3]} the stream gives {got}, at once {value}"
            )
        stream.reset()
        stream.update(*inputs)
        assert abs(float(stream.compute()) - value) <= atol, "a reset stream remembers"
