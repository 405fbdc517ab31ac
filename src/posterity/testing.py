"""Conformance checks by kind, for Posterity's methods and for anyone's.

Each check takes an object (or what makes one) and inputs, and raises ``AssertionError``
with the property that does not hold. They test what users of the kind rely on; what a
paper's mathematics promises is tested beside the paper. Where torch sees a CUDA device,
losses, layers, metrics, solvers, neural and generative processes must agree on it with
the CPU.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

__all__ = [
    "check_estimator",
    "check_generative",
    "check_graph_network",
    "check_layer",
    "check_loss",
    "check_metric",
    "check_neural_process",
    "check_solver",
]


def _same(actual: Any, expected: Any, what: str, **tolerances: float) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{what}: {text}", **tolerances)


def _floats(inputs: Sequence[Any], make: Callable[[Tensor], Tensor]) -> list[Any]:
    return [make(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def _leaves(inputs: Sequence[Any]) -> list[Any]:
    return _floats(inputs, lambda x: x.detach().clone().requires_grad_(x.requires_grad))


def _accelerators() -> list[torch.device]:
    """Return the devices beside the CPU on which a check is made again."""
    return [torch.device("cuda")] if torch.cuda.is_available() else []


def _on(device: torch.device, inputs: Sequence[Any]) -> list[Any]:
    return [
        x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
    ]


def _global_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_default_dtype()  # type: ignore[index]


def _untouched(before: tuple[Any, ...], what: str) -> None:
    after = _global_state()
    assert torch.equal(before[0], after[0]), f"{what} drew from torch's global generator: take a generator"
    assert np.array_equal(before[1], after[1]), (
        f"{what} drew from numpy's global generator: take random_state"
    )
    assert before[2] == after[2], f"{what} changed torch's default dtype"


def check_loss(
    loss: nn.Module,
    *inputs: Any,
    batch_of_one: bool = True,
    extremes: float = 1e4,
    compiles: bool = True,
    symmetric: bool = False,
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
    """
    wants = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    assert wants and all(x.dtype == torch.float64 for x in wants), (
        "give float64 inputs that require a gradient"
    )
    frozen = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    before = _global_state()
    value = loss(*inputs)
    _untouched(before, "the loss")
    for kept, now in zip(frozen, inputs, strict=True):
        assert not isinstance(now, Tensor) or torch.equal(kept, now.detach()), "the loss changed its input"
    reduction = getattr(loss, "reduction", "mean")
    assert isinstance(value, Tensor), f"a loss returns a tensor, got {type(value).__name__}"
    assert reduction == "none" or value.shape == (), f"a loss is a scalar, got shape {tuple(value.shape)}"
    assert value.requires_grad, "the loss is cut off from its inputs"
    _same(loss(*inputs), value, "two calls differ")
    try:
        torch.autograd.gradcheck(lambda *xs: loss(*_merge(inputs, xs)), tuple(wants), atol=1e-6, rtol=1e-4)
    except RuntimeError as error:
        raise AssertionError(f"gradcheck in float64: {error}") from error

    for dtype in (torch.float32, torch.float64):
        got = loss(*_floats(inputs, lambda x, to=dtype: x.detach().to(to)))
        assert got.dtype == dtype, f"the dtype follows the input: {dtype} gave {got.dtype}"
        if dtype == torch.float32:
            _same(got.double(), value.detach(), "float32 agrees with float64", rtol=1e-3, atol=1e-4)

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
        far = _floats(inputs, lambda x, by=scale: x.detach().mul(by).requires_grad_(x.requires_grad))
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
            _same(each(*inputs), getattr(values, how)(), f'reduction="{how}" is the {how} of "none"')
    if symmetric:
        order = torch.randperm(len(wants[0]), generator=torch.Generator().manual_seed(1))
        batch = [x[order] if isinstance(x, Tensor) and x.ndim and len(x) == len(order) else x for x in inputs]
        _same(loss(*batch), value, "the order of the batch matters")

    grads = torch.autograd.grad(value.sum(), wants)
    for device in _accelerators():
        there = _on(device, inputs)
        far = copy.deepcopy(loss).to(device)(*there)
        assert far.device.type == device.type, f"on {device} the loss is on {far.device}"
        _same(far.cpu(), value, f"{device} agrees with the CPU")
        theirs = torch.autograd.grad(
            far.sum(), [x for x in there if isinstance(x, Tensor) and x.requires_grad]
        )
        _same([grad.cpu() for grad in theirs], list(grads), f"the gradient on {device}")

    again = pickle.loads(pickle.dumps(loss))
    _same(again(*inputs), value, "pickling changes it")
    if compiles:
        compiled = torch.compile(loss, backend="eager")
        _same(compiled(*inputs), value, "torch.compile changes it", rtol=1e-6, atol=1e-8)


def _merge(inputs: Sequence[Any], new: Sequence[Tensor]) -> list[Any]:
    fresh = iter(new)
    return [next(fresh) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]


def check_layer(
    layer: nn.Module,
    *inputs: Any,
    shape: Sequence[int] | None = None,
    dead: Iterable[str] = (),
    **options: Any,
) -> None:
    """Check a layer or network: shape, gradients to every parameter, dtype, state_dict.

    Parameters
    ----------
    layer : nn.Module
    *inputs
        What it is called with; float tensors in the dtype of its parameters.
    shape : sequence of int, optional
        The shape of its output.
    dead : iterable of str
        Parameters that rightly get no gradient.
    **options
        Further keyword arguments of the call.
    """
    layer = copy.deepcopy(layer).eval()
    before = _global_state()
    out = layer(*inputs, **options)
    _untouched(before, "the layer in eval mode")
    assert isinstance(out, Tensor) and torch.isfinite(out).all(), "the output is a finite tensor"
    if shape is not None:
        assert out.shape == tuple(shape), f"the output has shape {tuple(shape)}, got {tuple(out.shape)}"
    _same(layer(*inputs, **options), out, "two calls in eval mode differ")

    probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    layer.zero_grad()
    (out * probe).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and name not in set(dead):
            reached = parameter.grad is not None and bool((parameter.grad != 0).any())
            assert reached, f"no gradient reaches {name}"

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    _same(twin(*inputs, **options), out, "a state_dict round trip changes the output")
    _same(pickle.loads(pickle.dumps(layer))(*inputs, **options), out, "pickling changes the output")

    double = copy.deepcopy(layer).double()
    got = double(*_floats(inputs, lambda x: x.detach().double()), **options)
    assert got.dtype == torch.float64, f"float64 in, float64 out, got {got.dtype}"
    _same(got.to(out.dtype), out.detach(), "float64 agrees with the dtype given", rtol=1e-3, atol=1e-4)
    for device in _accelerators():
        there = _on(device, _floats(inputs, lambda x: x.detach().double()))
        moved = {name: _on(device, [value])[0] for name, value in options.items()}
        far = copy.deepcopy(double).to(device)(*there, **moved)
        assert far.device.type == device.type, f"on {device} the output is on {far.device}"
        _same(far.cpu(), got, f"{device} agrees with the CPU")


def check_graph_network(
    network: nn.Module, x: Tensor, edge_index: Tensor, *, level: str = "node", local: bool = True,
    dead: Iterable[str] = (), **options: Any,
) -> None:  # fmt: skip
    """Check a graph layer or network: what `check_layer` checks, and what graphs demand.

    Permuting nodes permutes (or, for ``level="graph"``, keeps) the output; the order of
    edges does not matter; graphs in a batch do not see each other; isolated nodes, no
    edges and a single node work.

    Parameters
    ----------
    network : nn.Module
        Called as ``network(x, edge_index)``, for ``level="graph"`` also with ``batch=``.
    x : Tensor of shape (nodes, features)
    edge_index : Tensor of shape (2, edges)
    level : {"node", "graph"}, default="node"
    local : bool, default=True
        Whether a node sees only what edges lead to; where all nodes of a graph see each
        other, graphs are kept apart by ``batch=``.
    dead : iterable of str
        As for `check_layer`.
    **options
        Of the call.
    """
    check_layer(network, x, edge_index, dead=dead, **options)
    network = copy.deepcopy(network).eval()
    n = len(x)
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        out = network(x, edge_index, **options)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        moved = network(x[order], place[edge_index], **options)
        _same(moved, out if level == "graph" else out[order], "permuting the nodes", **close)
        shuffle = torch.randperm(edge_index.shape[1], generator=torch.Generator().manual_seed(2))
        _same(network(x, edge_index[:, shuffle], **options), out, "the order of the edges matters", **close)
        assert not _close(network(x, edge_index[:, :0], **options), out), "the edges do not matter"

        two = torch.cat([x, x.flip(0)]), torch.cat([edge_index, n - 1 - edge_index + n], 1)
        if level == "graph" or not local:
            options["batch"] = torch.arange(2).repeat_interleave(n)
        both = network(*two, **options)
        options.pop("batch", None)
        alone = torch.cat([out, network(x.flip(0), n - 1 - edge_index, **options)])
        _same(both, alone, "graphs of a batch see each other", **close)

        isolated = network(torch.cat([x, x[:1]]), edge_index, **options)
        assert torch.isfinite(isolated).all(), "an isolated node is finite"
        if level == "node" and local:
            _same(isolated[:n], out, "an isolated node changes the others", **close)
        for size in (1, 3):
            bare = network(x[:size], edge_index[:, :0], **options)
            assert torch.isfinite(bare).all(), f"{size} nodes without edges are finite"


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def check_estimator(estimator: Any, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Check a scikit-learn estimator with scikit-learn's own suite, and a little more.

    Parameters
    ----------
    estimator : estimator
        An instance, small enough to be fitted a hundred times.
    expected_failures : mapping of str to str, optional
        Name of a check that cannot hold, and why. One that passes after all is an error.
    """
    from sklearn.base import clone
    from sklearn.utils import estimator_checks

    reasons = dict(expected_failures or {})
    assert all(reasons.values()), "each expected failure has its reason"
    results = estimator_checks.check_estimator(
        clone(estimator), expected_failed_checks=reasons or None, on_fail=None, on_skip=None
    )
    failed = [r for r in results if r["status"] == "failed"]
    assert not failed, "; ".join(f"{r['check_name']}: {r['exception']!r}" for r in failed)
    unreal = {r["check_name"] for r in results if r["status"] == "passed"} & set(reasons)
    assert not unreal, f"expected to fail, but pass: {sorted(unreal)}"


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
    before = _global_state()
    value = float(metric(*inputs))
    _untouched(before, "the metric")
    assert np.isfinite(value), f"the value is finite, got {value}"
    for device in _accelerators():
        far = float(metric(*_on(device, inputs)))
        assert abs(far - value) <= atol, f"on {device} {far}, on the CPU {value}"
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


def check_neural_process(model: nn.Module, *, dim_x: int, dim_y: int, latent: bool = False) -> None:
    """Check a neural process: sets without order, padding without effect, empty contexts.

    Parameters
    ----------
    model : nn.Module
        ``model(x_context, y_context, x_target, context_mask=)`` returns a ``Normal`` of
        shape (tasks, m, dim_y), or (samples, tasks, m, dim_y) for latent variables; with
        ``log_likelihood(x_context, y_context, x_target, y_target, context_mask=,
        target_mask=)`` of shape (tasks,), and ``loss`` of the same arguments.
    dim_x, dim_y : int
        Sizes of inputs and outputs.
    latent : bool, default=False
        Whether it draws latent variables, from a ``generator=`` that it takes.
    """
    model = copy.deepcopy(model).double().eval()
    rng = torch.Generator().manual_seed(0)
    close = {"rtol": 0.0, "atol": 1e-9}

    def draws() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(1)} if latent else {}

    def points(n: int, size: int) -> Tensor:
        return torch.randn(3, n, size, dtype=torch.float64, generator=rng)

    def predict(*args: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        out = model(*args, **masks, **draws())
        return out.loc, out.scale

    x, y, x_new, y_new = points(6, dim_x), points(6, dim_y), points(5, dim_x), points(5, dim_y)
    x_new[0, :2] = 5 * torch.tensor(
        [[-1.0], [1.0]]
    )  # beyond the context: a grid is the same with and without it
    before = _global_state()
    loc, scale = predict(x, y, x_new)
    _untouched(before, "the model in eval mode")
    assert loc.shape[-3:] == (3, 5, dim_y) and loc.ndim == 3 + latent, f"loc has shape {tuple(loc.shape)}"
    assert loc.dtype == torch.float64, f"float64 in, float64 out, got {loc.dtype}"
    assert bool((scale > 0).all()), "scales are positive"

    order = torch.randperm(6, generator=rng)
    _same(predict(x[:, order], y[:, order], x_new), (loc, scale), "the order of the context matters", **close)
    turn = torch.randperm(5, generator=rng)
    moved = loc[..., turn, :], scale[..., turn, :]
    _same(predict(x, y, x_new[:, turn]), moved, "permuting the targets", **close)
    for wild in (1e3, -1e3):
        more = (torch.cat([part, torch.full_like(part[:, :2], wild)], dim=1) for part in (x, y))
        real = torch.arange(8).expand(3, 8) < 6
        _same(predict(*more, x_new, context_mask=real), (loc, scale), "padding has an effect", **close)
    few = torch.arange(6) < torch.tensor([[4], [6], [0]])
    mixed = predict(x, y, x_new, context_mask=few)
    alone = predict(x[:, :4], y[:, :4], x_new)
    _same([part[..., 0, :, :] for part in mixed], [part[..., 0, :, :] for part in alone],
          "a masked task is not the task without the masked points", **close)  # fmt: skip
    empty = predict(x[:, :0], y[:, :0], x_new)
    assert all(torch.isfinite(part).all() for part in empty), "an empty context is finite"
    _same([part[..., 2, :, :] for part in mixed], [part[..., 2, :, :] for part in empty],
          "a masked context is not the empty context", **close)  # fmt: skip
    assert not _close(empty[0], loc), "the context does not matter"

    each = torch.distributions.Normal(loc, scale).log_prob(y_new)
    whole = each.sum((-2, -1))
    n_samples = {"n_samples": len(loc)} if latent else {}
    if latent:
        whole = whole.logsumexp(0) - np.log(len(loc))
    got = model.log_likelihood(x, y, x_new, y_new, **n_samples, **draws())
    assert got.shape == (3,), f"one log-likelihood a task, got shape {tuple(got.shape)}"
    _same(got, whole, "log_likelihood is the log-density of forward", **close)
    real = torch.arange(5) < torch.tensor([[5], [3], [1]])
    part = each.masked_fill(~real[..., None], 0).sum((-2, -1))
    part = part.logsumexp(0) - np.log(len(loc)) if latent else part
    wild_new = torch.where(real[..., None], y_new, 1e30), torch.where(real[..., None], x_new, 1e30)
    masked = model.log_likelihood(x, y, wild_new[1], wild_new[0], target_mask=real, **n_samples, **draws())
    _same(masked, part, "masked targets count", **close)
    if not latent:
        _same(model.loss(x, y, x_new, y_new), -whole.mean() / 5, "loss is the mean a target", **close)
        normalised = -(part / real.sum(1)).mean()
        _same(
            model.loss(x, y, *wild_new[::-1], target_mask=real), normalised, "loss of masked targets", **close
        )
    if not latent:  # a generator of another device draws other latent variables
        for device in _accelerators():
            there = _on(device, (x, y, x_new, y_new))
            far = copy.deepcopy(model).to(device)
            on = {"context_mask": few.to(device), "target_mask": real.to(device)}
            assert far.loss(*there).device.type == device.type, f"on {device} the loss is elsewhere"
            _same(far.loss(*there, **on).cpu(), model.loss(x, y, x_new, y_new, context_mask=few, target_mask=real),
                  f"{device} agrees with the CPU")  # fmt: skip
    model.train()
    model.zero_grad()
    value = model.loss(x, y, x_new, y_new, context_mask=few, target_mask=real, **draws())
    assert value.shape == (), f"a loss is a scalar, got shape {tuple(value.shape)}"
    value.backward()
    for name, parameter in model.named_parameters():
        good = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        assert good and bool((parameter.grad != 0).any()), f"no finite gradient reaches {name}"  # type: ignore[union-attr]


def check_solver(
    solve: Callable[..., Any],
    *inputs: Any,
    optimality: Callable[[Any], float],
    reference: float | None = None,
    tol: float = 1e-5,
    differentiable: bool = True,
) -> None:
    """Check a solver: its optimality conditions, a reference, its batch and its gradient.

    Parameters
    ----------
    solve : callable
        ``solve(*inputs)`` returns a result with ``.value``, ``.n_iter``, ``.converged``.
    *inputs
        Float64 tensors of one problem.
    optimality : callable
        Residual of the optimality conditions of a result, 0 at an optimum.
    reference : float, optional
        The optimal value by another solver.
    tol : float, default=1e-5
        For residual, reference and gradient.
    differentiable : bool, default=True
        Whether ``.value`` has gradients with respect to the inputs.
    """
    before = _global_state()
    result = solve(*inputs)
    _untouched(before, "the solver")
    for name in ("value", "n_iter", "converged"):
        assert hasattr(result, name), f"a result has .{name}"
    value = result.value
    assert isinstance(value, Tensor) and value.shape == (), f"one problem, one value, got {value}"
    assert bool(torch.as_tensor(result.converged).all()), "it converges"
    residual = float(optimality(result))
    assert residual <= tol, f"the optimality conditions hold to {tol:g}, residual {residual:g}"
    if reference is not None:
        gap = abs(float(value) - reference)
        assert gap <= tol * max(1, abs(reference)), (
            f"the reference value is {reference:.9g}, got {float(value):.9g}"
        )
    several = solve(*(torch.stack([x, x]) for x in inputs))
    _same(several.value, torch.stack([value, value]).detach(), "a batch of problems", rtol=tol, atol=tol)
    single = solve(*(x.float() for x in inputs)).value
    assert single.dtype == torch.float32, f"the dtype follows the input, float32 gave {single.dtype}"
    _same(single.double(), value.detach(), "float32 agrees with float64", rtol=1e-3, atol=1e-3)
    for device in _accelerators():
        far = solve(*_on(device, inputs)).value
        assert far.device.type == device.type, f"on {device} the value is on {far.device}"
        _same(far.detach().cpu(), value.detach(), f"{device} agrees with the CPU", rtol=tol, atol=tol)
    if differentiable:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = solve(*leaves).value
        grads = torch.autograd.grad(out, leaves)
        generator = torch.Generator().manual_seed(0)
        for k, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
            step = torch.randn(x.shape, dtype=x.dtype, generator=generator) * x.abs().clamp_min(1e-3)
            if float((x.sum() - 1).abs()) < 1e-9:  # a histogram: stay on the simplex
                step = step - x * step.sum()
            h = 1e-4
            ends = [
                solve(*(y + s * h * step if j == k else y for j, y in enumerate(inputs))).value
                for s in (1, -1)
            ]
            slope = float((ends[0] - ends[1]).detach() / (2 * h))
            got = float((grad * step).sum())
            assert abs(slope - got) <= 1e-3 * max(1.0, abs(slope)), (
                f"input {k}: the gradient gives {got:.6g} along a direction, differences {slope:.6g}"
            )


def check_generative(
    process: Any, net: nn.Module, target: Tensor, *, mean: Tensor | ndarray, std: Tensor | ndarray, n: int = 4000,
    atol: float = 0.1, **options: Any,
) -> None:  # fmt: skip
    """Check a generative process with an exact network: loss, moments, determinism, mode.

    Parameters
    ----------
    process : object
        With ``loss(net, x)`` and ``sample(net, n, generator=)``.
    net : nn.Module
        The exact solution for the target; it has at least one parameter.
    target : Tensor of shape (n, *shape)
        Samples of the target.
    mean, std : Tensor or ndarray
        The target's moments by coordinate.
    n : int, default=4000
        How many samples to draw.
    atol : float, default=0.1
        How far the sampled moments may be from them.
    **options
        Further keyword arguments of ``sample``.
    """

    def generator(seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    before = _global_state()
    loss = process.loss(net, target, generator=generator())
    mode = net.training
    samples = process.sample(net, n, generator=generator(), **options)
    _untouched(before, "the process with a generator")
    assert loss.shape == () and torch.isfinite(loss), f"the loss is a finite scalar, got {loss}"
    _same(process.loss(net, target, generator=generator()), loss, "one generator, two losses")
    (grad,) = torch.autograd.grad(loss, [next(net.parameters())], allow_unused=False)
    assert torch.isfinite(grad).all(), "the loss has a gradient for the network"
    assert samples.shape == (n, *target.shape[1:]), f"n samples of the shape, got {tuple(samples.shape)}"
    assert not samples.requires_grad, "samples carry no gradient"
    assert net.training == mode, "sampling changed the network's mode"
    assert torch.equal(process.sample(net, n, generator=generator(), **options), samples), (
        "one generator, two samples"
    )
    other = process.sample(net, n, generator=generator(1), **options)
    assert not torch.equal(other, samples), "the generator does not matter"
    _same(samples.mean(0), torch.as_tensor(mean).to(samples), "mean of the samples", rtol=0, atol=atol)
    _same(
        samples.std(0),
        torch.as_tensor(std).to(samples),
        "standard deviation of the samples",
        rtol=0,
        atol=atol,
    )
    for device in _accelerators():
        moved, far = copy.deepcopy(net).to(device), torch.Generator(device).manual_seed(0)
        theirs = process.sample(moved, n, generator=far, **options)
        assert theirs.device.type == device.type, f"on {device} the samples are on {theirs.device}"
        _same(theirs.mean(0).cpu(), torch.as_tensor(mean).to(samples), f"mean on {device}", rtol=0, atol=atol)
        assert process.loss(moved, target.to(device), generator=far).device.type == device.type
    double = copy.deepcopy(net).double()
    assert process.sample(double, 3, generator=generator(), **options).dtype == torch.float64, "float64 works"
