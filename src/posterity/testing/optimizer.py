"""Optimisers: they converge, and keep every promise of ``torch.optim.Optimizer``."""

import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from posterity.testing._agreement import accelerators, global_state, same, untouched
from posterity.testing._low_precision import NARROW, relative_error

__all__ = ["check_optimizer"]

Make = Callable[[Any], Optimizer]


def check_optimizer(
    make: Make,
    *,
    gradient: bool = True,
    closure: bool = False,
    setting: tuple[str, Any] = ("lr", 0.0),
    steps: int = 2000,
    tol: float = 1e-2,
) -> None:
    """Check an optimiser: convergence, closures, groups, state, schedules, scaling, dtypes.

    Parameters
    ----------
    make : callable
        ``make(params)`` returns a new optimiser of these parameters or groups, with settings
        that suit curvatures up to 100; what it draws comes from a generator of its own.
    gradient : bool, default=True
        Whether it uses gradients. If not, its closure returns a loss without ``backward``.
    closure : bool, default=False
        Whether its step needs a closure; always so without gradients.
    setting : tuple of str and value, default=("lr", 0.0)
        A setting and another value of it, with which a group moves otherwise.
    steps : int, default=2000
        For convergence, while a schedule takes ``lr``, where there is one, to 0.
    tol : float, default=1e-2
        What is left of the starting loss of a quadratic and of Rosenbrock's valley, at most.
    """
    run = _Runner(make, gradient=gradient, closure=closure or not gradient)
    _converges(run, steps, tol)
    _closures(run)
    _groups(run, *setting)
    _round_trip(run)
    _options(run)
    _schedule(run)
    _dtypes(run)
    if gradient:
        _without_gradient(run)
        _refused(run)
        _scaling(run)
    for device in accelerators():
        here, there = run.path(3), run.path(3, device=device)
        for ours, theirs in zip(here, there, strict=True):
            assert theirs.device.type == device.type, f"on {device} parameters stay there"
            same(theirs.cpu(), ours, f"{device} agrees with the CPU", rtol=1e-4, atol=1e-6)


class _Runner:
    """Takes steps of an optimiser in the way that it wants them."""

    def __init__(self, make: Make, *, gradient: bool, closure: bool) -> None:
        self.make, self.gradient, self.closure = make, gradient, closure

    def step(self, optimizer: Optimizer, loss: Callable[[], Tensor], closure: bool | None = None) -> Any:
        def evaluate() -> Tensor:
            if not self.gradient:
                return loss().detach()
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value.detach()

        if self.closure if closure is None else closure:
            return optimizer.step(evaluate)
        evaluate()
        return optimizer.step()

    def path(
        self, n: int, *, dtype: torch.dtype = torch.float64, device: Any = "cpu", sign: float = 1.0, **option: Any
    ) -> list[Tensor]:  # fmt: skip
        """Return the parameters after n steps on the bowl, all groups with an option."""
        params = _start(dtype, device)
        optimizer = self.make([{"params": params, **option}])
        for _ in range(n):
            self.step(optimizer, lambda: sign * _bowl(params))
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == p.shape
                    and value.ndim
                    and value.is_floating_point()
                ):
                    narrow = torch.finfo(value.dtype).eps > torch.finfo(p.dtype).eps
                    assert not narrow, f"the state {name} of parameters in {p.dtype} is in {value.dtype}"
        return [p.detach() for p in params]


def _start(dtype: torch.dtype = torch.float64, device: Any = "cpu") -> list[Tensor]:
    """Return a vector, a matrix that is not contiguous, and a scalar."""
    values = ([1.0, -2.0, 0.5, 3.0], [[1.5, -0.75, 2.0], [0.25, 1.0, -1.25]], 2.5)
    made = [torch.tensor(each, dtype=dtype, device=device) for each in values]
    made[1] = made[1].T
    return [each.requires_grad_() for each in made]


def _bowl(params: Sequence[Tensor]) -> Tensor:
    """Return a quadratic with its least value 0 and curvatures from 1 to 20."""
    total = params[0].new_zeros(())
    for k, p in enumerate(params):
        curvature = torch.linspace(1, 20, p.numel(), dtype=p.dtype, device=p.device).reshape(p.shape)
        total = total + (curvature * (p - 0.125 * (k + 1)) ** 2).sum() / 2
    return total


def _valley(params: Sequence[Tensor]) -> Tensor:
    """Return Rosenbrock's function with a factor of 10: 4.84 + 1.94 at (-1.2, 1), 0 at (1, 1)."""
    x, y = params[0]
    return (1 - x) ** 2 + 10 * (y - x**2) ** 2


def _converges(run: _Runner, steps: int, tol: float) -> None:
    bend = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    for what, params, loss in (("a quadratic", _start(), _bowl), ("Rosenbrock's valley", [bend], _valley)):
        before = global_state()
        optimizer = run.make(params)
        schedule = None
        if "lr" in optimizer.defaults:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        start = loss(params).item()
        for _ in range(steps):
            run.step(optimizer, lambda loss=loss, params=params: loss(params))
            if schedule is not None:
                schedule.step()
        left = loss(params).item() / start
        assert left <= tol, f"it converges on {what}: {left:.2g} of the loss is left after {steps} steps"
        untouched(before, "the optimiser")


def _closures(run: _Runner) -> None:
    params = _start()
    optimizer = run.make(params)
    start = _bowl(params).item()
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with torch.no_grad():  # a training loop may be inside one: the closure is not
        value = run.step(optimizer, lambda: _seen(params, run.gradient), closure=True)
    assert value is not None, "step(closure) returns the closure's loss"
    fits = abs(float(value) - start) <= 1e-12 * start if run.gradient else float(value) <= start
    assert fits, f"step(closure) returns the loss of the first call, {start:.9g}, got {float(value):.9g}"
    assert len(calls) == 1, f"a step is one step to its hooks, they were called {len(calls)} times"
    if not run.closure:
        for ours, theirs in zip(params, run.path(1), strict=True):
            same(ours.detach(), theirs, "a step with a closure is the step without")
    else:
        _raises("closure", "a step without its closure", optimizer.step)


def _seen(params: Sequence[Tensor], gradient: bool) -> Tensor:
    assert torch.is_grad_enabled() or not gradient, "the closure is called with gradients enabled"
    return _bowl(params)


def _groups(run: _Runner, name: str, value: Any) -> None:
    def after(option: dict[str, Any], n: int = 8) -> tuple[list[Tensor], Optimizer]:
        params = _start()
        optimizer = run.make([{"params": params[:1]}, {"params": params[1:], **option}])
        for _ in range(n):
            run.step(optimizer, lambda: _bowl(params))
        return [p.detach() for p in params], optimizer

    plain, optimizer = after({})
    whole = run.path(8)
    for ours, theirs in zip(plain, whole, strict=True):
        same(ours, theirs, "two groups with the same settings are one")
    assert name in optimizer.param_groups[1], f"a group has its own {name}"
    other, optimizer = after({name: value})
    assert optimizer.param_groups[1][name] == value, f"a group keeps the {name} that it was given"
    assert any(not torch.equal(a, b) for a, b in zip(plain[1:], other[1:], strict=True)), (
        f"a group follows its own {name}"
    )
    if name == "lr" and value == 0:
        for ours, theirs in zip(other[1:], _start()[1:], strict=True):
            same(ours, theirs.detach(), "a group with lr 0 does not move")
    late = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [late]})
    for _ in range(64):
        run.step(optimizer, lambda: _bowl([late]))
    assert not torch.equal(late.detach(), torch.ones(3, dtype=torch.float64)), (
        "a group added in the middle of training moves"
    )


def _round_trip(run: _Runner) -> None:
    params = _start()
    optimizer = run.make([{"params": params[:1]}, {"params": params[1:]}])
    for _ in range(9):
        run.step(optimizer, lambda: _bowl(params))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twins = [p.detach().clone().requires_grad_() for p in params]
    for _ in range(9):
        run.step(optimizer, lambda: _bowl(params))
    file.seek(0)
    again = run.make([{"params": twins[:1]}, {"params": twins[1:]}])
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(9):
        run.step(again, lambda: _bowl(twins))
    for ours, theirs in zip(twins, params, strict=True):
        assert torch.equal(ours, theirs), "after a state_dict round trip in mid-training it goes on the same"


def _options(run: _Runner) -> None:
    defaults = run.make(_start()).defaults
    if "foreach" in defaults:
        for ours, theirs in zip(run.path(8, foreach=True), run.path(8, foreach=False), strict=True):
            same(ours, theirs, "foreach and the loop agree", rtol=1e-12, atol=1e-12)
    if "maximize" in defaults:
        for ours, theirs in zip(run.path(8, sign=-1.0, maximize=True), run.path(8), strict=True):
            same(ours, theirs, "to maximise the negative is to minimise")


def _schedule(run: _Runner) -> None:
    params = _start()
    optimizer = run.make(params)
    if "lr" not in optimizer.defaults:
        return
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    run.step(optimizer, lambda: _bowl(params))
    schedule.step()
    held = [p.detach().clone() for p in params]
    assert not torch.equal(held[0], _start()[0].detach()), "the first step of a schedule moves"
    run.step(optimizer, lambda: _bowl(params))
    for ours, theirs in zip(params, held, strict=True):
        same(ours.detach(), theirs, "a schedule that sets lr to 0 stops it")


def _dtypes(run: _Runner) -> None:
    for dtype in (torch.float64, torch.float32, *NARROW):
        for casting in (None, torch.bfloat16):
            what = f"with parameters in {dtype}" + (f" under autocast to {casting}" if casting else "")
            try:
                with torch.autocast("cpu", dtype=casting) if casting else nullcontext():
                    got = run.path(3, dtype=dtype)
            except ValueError as error:
                if dtype in NARROW and str(dtype).removeprefix("torch.") in str(error):
                    continue
                raise AssertionError(f"{what} it is refused without a reason: {error}") from error
            for p, exact in zip(got, run.path(3), strict=True):
                assert p.dtype == dtype, f"{what} the parameters become {p.dtype}"
                off, allowed = relative_error(p, exact), 32 * torch.finfo(dtype).eps
                assert off <= allowed, f"{what} three steps are off by {off:.2g}, allowed {allowed:.2g}"


def _without_gradient(run: _Runner) -> None:
    params = _start()
    idle = [torch.ones(2, dtype=torch.float64, requires_grad=wanted) for wanted in (True, False)]
    optimizer = run.make([*params, *idle])
    for _ in range(3):
        run.step(optimizer, lambda: _bowl(params))
    for p in idle:
        assert torch.equal(p.detach(), torch.ones(2, dtype=torch.float64)), (
            "a parameter without gradient is left alone"
        )
    for ours, theirs in zip(params, run.path(3), strict=True):
        same(ours.detach(), theirs, "a parameter without gradient changes nothing for the others")


def _refused(run: _Runner) -> None:
    """Sparse gradients and complex parameters are handled as dense and real ones, or refused by name."""
    index = torch.tensor([0, 2, 2])

    def table(sparse: bool) -> Tensor:
        weight = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(4, 2).requires_grad_()
        optimizer = run.make([weight])
        run.step(optimizer, lambda: F.embedding(index, weight, sparse=sparse).square().sum() / 2)
        return weight.detach()

    def numbers(complex_: bool) -> Tensor:
        parts = torch.tensor([[1.0, 2.0], [-0.5, 1.5]], dtype=torch.float64)
        p = (torch.view_as_complex(parts.clone()) if complex_ else parts.clone()).requires_grad_()
        optimizer = run.make([p])
        run.step(optimizer, lambda: (p * p.conj()).real.sum() / 2)
        return torch.view_as_real(p.detach()) if complex_ else p.detach()

    for name, call in (("sparse", table), ("complex", numbers)):
        try:
            got = call(True)
        except (ValueError, RuntimeError) as error:
            if name not in str(error):
                raise AssertionError(f"{name} ones are refused by name, got: {error}") from error
        else:
            same(got, call(False), f"{name} ones are refused, or give the step of ordinary ones")


def _scaling(run: _Runner) -> None:
    """Training with a gradient scaler is training without; a step whose gradient overflowed is skipped."""
    if run.closure:  # GradScaler takes no closures
        return
    params = _start(torch.float32)
    optimizer = run.make(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(_bowl(params)).backward()
        scaler.step(optimizer)
        scaler.update()
    for ours, theirs in zip(params, run.path(3, dtype=torch.float32), strict=True):
        same(ours.detach(), theirs, "a gradient scaler changes nothing", rtol=1e-5, atol=1e-6)
    held = [p.detach().clone() for p in params]
    optimizer.zero_grad()
    scaler.scale(_bowl(params) * float("inf")).backward()
    scaler.step(optimizer)
    for ours, theirs in zip(params, held, strict=True):
        assert torch.equal(ours.detach(), theirs), "a scaler skips a step whose gradient overflowed"


def _raises(name: str, what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        if name not in str(error):
            raise AssertionError(f"{what} names {name}, got: {error}") from error
    else:
        raise AssertionError(f"{what} is refused")
