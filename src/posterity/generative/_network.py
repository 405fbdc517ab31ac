"""Networks in time, as every process of this domain calls them: ``net(x, t, **cond)``.

x has shape (n, *shape); t has shape (n,), dtype and device of x, in [0, 1] and never rescaled: 0 at the source, 1 at
the data; the output is as x. The entries of ``cond`` have first dimension n. A U-Net of diffusers is taken as it is:
it gets its own clock, 999 at the source and 0 at the data, and what it returns is unpacked.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer
from posterity._random import draw_device

__all__ = [
    "Cond",
    "Net",
    "Samples",
    "call",
    "check_cond",
    "check_times",
    "from_source",
    "home",
    "normal",
    "starts",
    "steps",
    "uniform",
]

Net = Callable[..., Any]
Cond = Mapping[str, Tensor] | None
Samples = Float[Tensor, " n *shape"]

PATIENCE = 3.0  # seconds before a bar is shown


def check_cond(cond: Cond, n: int) -> None:
    """Refuse entries that are not of n samples."""
    for name, value in (cond or {}).items():
        if value.shape[:1] != (n,):
            raise ValueError(f"cond[{name!r}] must have first dimension {n}, got {tuple(value.shape)}")


def check_times(t: Any, n: int) -> None:
    """Refuse times that are not of n samples, or outside [0, 1]."""
    has_shape("t", floating("t", t), (n,), f"{n} samples")
    # Values are read on the CPU only, where that is free: an accelerator would have to wait.
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be in [0, 1], got values in [{t.min():g}, {t.max():g}]")


def call(net: Net, x: Tensor, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
    """Return what a network of this dtype says, in the dtype of x."""
    check_cond(cond, len(x))
    clock = (1000 * (1 - t) - 1).clamp_min(0) if _is_unet(net) else t
    said = net(x.to(dtype), clock.to(dtype), **(cond or {}))
    if not isinstance(said, Tensor):
        said = getattr(said, "sample", said)
    return has_shape("net(x, t)", said, x.shape, "x").to(x.dtype)


def _is_unet(net: Any) -> bool:
    """Return whether a network's second argument is a ``timestep``, as in diffusers, also where it is wrapped."""
    net = getattr(net, "_orig_mod", getattr(net, "module", net))
    if not isinstance(net, nn.Module) or type(net).forward is nn.Module.forward:
        return False
    return list(inspect.signature(type(net).forward).parameters)[2:3] == ["timestep"]


def home(net: Net, otherwise: Tensor) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device of the network's first floating parameter, if it has one."""
    parameters = net.parameters() if isinstance(net, nn.Module) else ()
    first = next((p for p in parameters if p.is_floating_point()), otherwise)
    return first.dtype, first.device


def uniform(size: int | Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return draws from [0, 1) on the device of ``like``, in float32 at least."""
    where, dtype = draw_device(generator, like.device), torch.promote_types(like.dtype, torch.float32)
    return torch.rand(size, dtype=dtype, device=where, generator=generator).to(like.device)


def normal(
    size: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Return standard normal draws, the same in every dtype up to rounding."""
    where, drawn = draw_device(generator, device), torch.promote_types(dtype, torch.float32)
    return torch.randn(size, dtype=drawn, device=where, generator=generator).to(device, dtype)


def from_source(
    source: Callable[..., Any], size: Sequence[int], dtype: torch.dtype, device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Return what a source of the user's, ``source(n, generator)``, draws: floats of this size."""
    x0 = floating("source", source(size[0], generator))
    return has_shape("source", x0, size, "shape").to(device, dtype)


def starts(
    net: Net, n: int | None, x0: Tensor | None, check: Callable[[str, Any], Tensor], draw: Callable[..., Tensor],
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Return where a sampler begins: ``check("x0", x0)``, or ``draw(n, dtype, device, generator)`` where the network is."""
    if (n is None) == (x0 is None):
        got = "neither" if n is None else "both"
        raise ValueError(f"exactly one of n and x0 must be given, got {got}")
    if x0 is not None:
        return check("x0", x0)
    return draw(integer("n", n, 1), *home(net, torch.empty(0)), generator)


def steps(n: int) -> Iterable[int]:
    """Yield 0 to n - 1; where somebody looks on, a bar is shown once they take longer than some seconds.

    Interrupting them is safe: a process holds nothing between its steps.
    """
    watched = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
    if not watched:
        return range(n)
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:  # it comes with the domain's extra
        return range(n)
    return tqdm(range(n), delay=PATIENCE, leave=False)
