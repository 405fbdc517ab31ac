"""Linear bounds through an ODE solver: functions of the input that lie below and above each output.

A lower bound starts as a row of coefficients at the output and is carried backwards: through a
linear map exactly; through a ReLU on [l, u], by the chord u (x - l) / (u - l) from above and the
line 0 or x from below; through a Runge-Kutta step, stage by stage, from the last to the first.
Where several steps can follow, each gives a bound, g_1 and g_2, and one below both is needed.
With D = g_1 - g_2 in [l, u] on the node's box that is

    z = (-l g_1 + u g_2 + l u) / (u - l)    where l < 0 < u,                           (1)

g_2 plus the chord of min(D, 0); else it is the smaller of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from posterity._checks import finite, floating, has_shape, one_of
from posterity.robustness.boxes import (
    AFFINE,
    PLAIN,
    SLACK,
    Kinks,
    affine,
    between,
    check_box,
    exact,
    state_weight,
    through_layer,
    widen,
)
from posterity.robustness.neural_ode import NeuralODEBlock, TimeConv2d
from posterity.robustness.ode_solver import Step
from posterity.robustness.trajectory_graph import MAX_NODES, Exploration, Visit, explore

__all__ = ["LinearBounds", "aggregate_linear_bounds", "linear_bounds"]

MOST = 2**22  # numbers in one tensor of coefficients


@dataclass
class LinearBounds:
    """Bounds of linear functions of a network's output, on a box of inputs.

    Attributes
    ----------
    lower, upper : Tensor of shape (K,)
        What no input of the box passes.
    A_lower, A_upper : Tensor of shape (K, in)
        Coefficients of the flattened input: ``A_lower x + c_lower`` is nowhere in the box above
        the output, ``A_upper x + c_upper`` nowhere below it.
    c_lower, c_upper : Tensor of shape (K,)
    """

    lower: Float[Tensor, " K"]
    upper: Float[Tensor, " K"]
    A_lower: Float[Tensor, " K in"]
    c_lower: Float[Tensor, " K"]
    A_upper: Float[Tensor, " K in"]
    c_upper: Float[Tensor, " K"]


def aggregate_linear_bounds(
    A1: Float[Tensor, " K d"],
    c1: Float[Tensor, " K"],
    A2: Float[Tensor, " K d"],
    c2: Float[Tensor, " K"],
    lower: Float[Tensor, " d"],
    upper: Float[Tensor, " d"],
    *,
    kind: Literal["lower", "upper"],
) -> tuple[Float[Tensor, " K d"], Float[Tensor, " K"]]:
    """Return linear functions below the smaller, or above the greater, of two on a box, as (1).

    Parameters
    ----------
    A1 : Tensor of shape (K, d)
        Coefficients of K first functions.
    c1 : Tensor of shape (K,)
        Their constants.
    A2 : Tensor of shape (K, d)
        Coefficients of the second functions.
    c2 : Tensor of shape (K,)
        Their constants.
    lower, upper : Tensor of shape (d,)
        Corners of the box.
    kind : {"lower", "upper"}
        Below the minimum or above the maximum.

    Returns
    -------
    tuple of Tensor
        Coefficients (K, d) and constants (K,), in the dtype of ``A1``; exact but for rounding.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, a value is not finite or the box is empty.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4.3, linear constraint aggregation.

    Examples
    --------
    Below x and -x on [-1, 3]: their difference 2 x lies in [-2, 6].

    >>> import torch
    >>> from posterity.robustness import aggregate_linear_bounds
    >>> one, zero = torch.ones(1, 1), torch.zeros(1)
    >>> aggregate_linear_bounds(one, zero, -one, zero, torch.tensor([-1.0]), torch.tensor([3.0]), kind="lower")
    (tensor([[-0.5000]]), tensor([-1.5000]))
    """
    one_of("kind", kind, ("lower", "upper"))
    tensors = {"A1": A1, "c1": c1, "A2": A2, "c2": c2, "lower": lower, "upper": upper}
    for name, value in tensors.items():
        finite(name, floating(name, value))
    rows, d = has_shape("A1", A1, (None, None)).shape
    shapes = {"c1": (rows,), "A2": (rows, d), "c2": (rows,), "lower": (d,), "upper": (d,)}
    for name, shape in shapes.items():
        has_shape(name, tensors[name], shape, "A1")
        if tensors[name].device != A1.device:
            raise ValueError(f"{name} must be on the device of A1, {A1.device}, got {tensors[name].device}")
    first, offset, second, other, low, high = (value.double() for value in tensors.values())
    if not bool((low <= high).all()):
        raise ValueError("lower must be at most upper in every coordinate")
    sign = 1 if kind == "lower" else -1  # above the maximum is minus what is below the minimum of minus
    box = between(low, high)
    A, c = _below(sign * first, sign * offset, sign * second, sign * other, box.center, box.radius)
    return (sign * A).to(A1.dtype), (sign * c).to(A1.dtype)


def _below(
    A1: Tensor, c1: Tensor, A2: Tensor, c2: Tensor, center: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (1) for rows of flat coefficients; ``center`` and ``radius`` broadcast to them."""
    A, c = A1 - A2, c1 - c2
    middle, reach = (A * center).sum(-1) + c, (A.abs() * radius).sum(-1)
    low, high = middle - reach, middle + reach
    cross = (low < 0) & (high > 0)
    gap = torch.where(cross, high - low, 1)
    share = torch.where(cross, high / gap, (low >= 0) & (high > 0))  # of the second
    A = torch.where(share[..., None] == 1, A2, A1 - share[..., None] * A)
    c = torch.where(share == 1, c2, c1 - share * c + torch.where(cross, low * high / gap, 0))
    return A, c


@dataclass
class BoundedNetwork:
    """A network's boxes on a batch: what comes to each layer, and the output; graphs of its blocks."""

    layers: list[nn.Module]
    boxes: list[tuple[Tensor, Tensor]]
    graphs: dict[int, Exploration]


def bound_network(
    net: nn.Sequential, lower: Tensor, upper: Tensor, max_nodes: int = MAX_NODES, *, linear: bool
) -> BoundedNetwork:
    """Return the boxes of a float64 network, before ReLUs and blocks intersected with linear bounds."""
    found = BoundedNetwork(list(net), [], {})
    box = between(lower, upper)
    maps, bent = 0, False  # one linear map alone is exact in interval arithmetic, two are not
    for index, layer in enumerate(net):
        box = widen(box, SLACK) if index else box
        lower, upper = (box.lower, box.upper) if index else (lower, upper)
        if linear and (bent or maps > 1) and isinstance(layer, (nn.ReLU, NeuralODEBlock)):
            found.boxes.append((lower, upper))
            size = lower[0].numel()
            rows = torch.eye(size, dtype=lower.dtype, device=lower.device).view(1, size, *lower.shape[1:])
            both = torch.cat([rows, -rows], 1).expand(len(lower), *(-1,) * lower.ndim)
            _, _, least = lower_bounds(found, both, index, [0])
            least, most = least[:, :size].view_as(lower), -least[:, size:].view_as(lower)
            lower, upper = torch.maximum(lower, least), torch.minimum(upper, most)
            found.boxes.pop()
            box = between(lower, upper)
        found.boxes.append((lower, upper))
        maps += isinstance(layer, (*AFFINE, nn.AdaptiveAvgPool2d))
        bent = bent or isinstance(layer, (nn.ReLU, NeuralODEBlock))
        if isinstance(layer, NeuralODEBlock):
            graph = explore(layer, lower, upper, max_nodes, keep=linear)
            found.graphs[index] = graph
            box = between(graph.lower, graph.upper)
        else:
            box = through_layer(layer, box, slack=SLACK)
    box = widen(box, SLACK)
    found.boxes.append((box.lower, box.upper))
    return found


def lower_bounds(
    found: BoundedNetwork, C: Tensor, end: int, stops: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bounds below rows of what comes to layer ``end``.

    Parameters
    ----------
    found : BoundedNetwork
    C : Tensor of shape (n, K, ...)
        The rows of each sample.
    end : int
    stops : sequence of int
        Layers at whose boxes the bounds are also turned to numbers.

    Returns
    -------
    tuple of Tensor
        Flat coefficients of what comes to the last of the ``stops`` (n, K, d), constants (n, K), of
        the best slopes of the ReLUs; and the best numbers (n, K) of all stops and slopes.
    """
    widest = max(box[0].numel() for box in found.boxes[: end + 1])
    parts = []
    for rows in C.split(max(1, MOST // (3 * widest)), 1):
        A, c = (
            rows[:, None].expand(-1, 3, *(-1,) * (rows.ndim - 1)),
            rows.new_zeros(len(rows), 3, rows.shape[1]),
        )
        best, value = c.new_full((len(rows), rows.shape[1]), -float("inf")), c
        for index in range(end, min(stops) - 1, -1):
            if index < end:
                layer, box = found.layers[index], found.boxes[index]
                if isinstance(layer, nn.ReLU):
                    A, c = _back_relu(A, c, *box)
                elif isinstance(layer, NeuralODEBlock):
                    A, c = _back_graph(found.graphs[index], A, c)
                else:
                    A, c = _back_affine(layer, A, c, 0.0, box[0].shape[1:])
            if index in stops:
                value = _least(A.flatten(3), c, *found.boxes[index])
                value = torch.where(value.isfinite(), value, -float("inf"))  # overflow is no bound
                best = torch.maximum(best, value.amax(1))
        choice = value.argmax(1, keepdim=True)
        A = A.flatten(3)
        parts.append((A.take_along_dim(choice[..., None], 1)[:, 0], c.take_along_dim(choice, 1)[:, 0], best))
    A, c, best = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return A, c, best


def _least(A: Tensor, c: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the least value on a box of rows (n, 3, K, d), less what rounding may have done."""
    box = between(lower.flatten(1), upper.flatten(1))
    center, radius = (part[:, None, None] for part in box)
    size = (A.abs() * (center.abs() + radius)).sum(-1) + c.abs()
    return (A * center).sum(-1) - (A.abs() * radius).sum(-1) + c - SLACK * size


def _back_affine(
    layer: nn.Module, A: Tensor, c: Tensor, t: float, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Return coefficients of a linear layer's input, of this shape."""
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return (A / (shape[-1] * shape[-2])).expand(*A.shape[:-2], *shape[-2:]), c
    if isinstance(layer, PLAIN):
        return A.reshape(*A.shape[:3], *shape), c
    offset = affine(layer, t, A.new_zeros(1, *shape))[0]
    moved = (A * offset).flatten(3).sum(-1)
    c = c + moved - SLACK * (A.abs() * offset.abs()).flatten(3).sum(-1)
    weight = state_weight(layer)
    if weight.ndim == 2:
        return A @ weight, c
    flat = A.flatten(0, 2)
    if isinstance(layer, TimeConv2d):
        options = {"padding": layer.padding}
    else:
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    back = conv2d_input((len(flat), *shape), weight, flat, **options)
    return back.view(*A.shape[:3], *shape), c


def _back_relu(A: Tensor, c: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients of what comes to a ReLU, with three slopes of the line below it.

    By the axis after the samples: the slope of the smaller area, 0, and 1, where the ReLU bends.
    """
    on, bends = lower >= 0, (lower < 0) & (upper > 0)
    chord = torch.where(bends, upper / torch.where(bends, upper - lower, 1), on.to(A.dtype))
    below = torch.stack([on | (bends & (upper >= -lower)), on, on | bends], 1)[:, :, None]
    lift = torch.where(bends, -lower * chord, 0)[:, None, None]
    size = torch.maximum(lower.abs(), upper.abs())[:, None, None]
    negative = A.clamp_max(0)
    c = c + (negative * lift).flatten(3).sum(-1) - SLACK * (A.abs() * size).flatten(3).sum(-1)
    return torch.where(A > 0, A * below, negative * chord[:, None, None]), c


def _back_field(func: nn.Sequential, A: Tensor, c: Tensor, t: float, kinks: Kinks, shapes: list[torch.Size]):
    """Return coefficients of the state, of a row on the slopes at a stage."""
    left = len(kinks)
    for layer, shape in zip(reversed(list(func)), reversed(shapes), strict=True):
        if isinstance(layer, nn.ReLU):
            left -= 1
            A, c = _back_relu(A, c, *kinks[left])
        else:
            A, c = _back_affine(layer, A, c, t, shape)
    return A, c


def _back_step(
    graph: Exploration, step: Step, visit: Visit, mask: Tensor, A: Tensor, c: Tensor, shapes: list[torch.Size]
) -> tuple[Tensor, Tensor]:
    """Return coefficients of the state before a step, of rows on the state after it."""
    t, h = float(step.t), float(step.h)
    tableau, func = graph.tableau, graph.block.func
    weights = tableau.a[-1]
    slopes: list[Tensor | None] = [h * weight * A if weight else None for weight in weights]
    for stage in range(len(slopes) - 1, -1, -1):
        slope = slopes[stage]
        if slope is None:
            continue
        kinks = [(lower[mask], upper[mask]) for lower, upper in visit.stages[stage]]
        none = torch.zeros_like(c)
        state, moved = _back_field(func, slope, none, t + tableau.c[stage] * h, kinks, shapes)
        A, c = A + state, c + moved
        for earlier, weight in enumerate(tableau.a[stage - 1] if stage else ()):
            if weight:
                known, more = slopes[earlier], h * weight * state
                slopes[earlier] = more if known is None else known + more
    return A, c


def _back_graph(graph: Exploration, A: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients of a block's input, of rows on its output: below all trajectories."""
    x, shapes = graph.lower[:1], []
    for layer in graph.block.func:
        shapes.append(x.shape[1:])
        x = affine(layer, 0.0, x)
    known: dict[Step | None, tuple[Tensor, Tensor, Tensor]] = {
        None: (torch.arange(len(A), device=A.device), A, c)
    }
    first = next(iter(graph.visits))
    for step, visit in reversed(graph.visits.items()):
        candidates = []
        for after, rejected, mask in visit.moves:
            rows, A_after, c_after = known[after]
            place = torch.searchsorted(rows, visit.rows[mask])
            A, c = A_after[place], c_after[place]
            if not rejected:
                A, c = _back_step(graph, step, visit, mask, A, c, shapes)
            candidates.append((mask, A, c))
        known[step] = (visit.rows, *_folded(candidates, visit))
    _, A, c = known[first]
    return A, c


def _folded(candidates: list[tuple[Tensor, Tensor, Tensor]], visit: Visit) -> tuple[Tensor, Tensor]:
    """Return rows below all candidates on a node's box; each is for some of the samples."""
    if len(candidates) == 1:
        _, A, c = candidates[0]
        return A, c
    shape = candidates[0][1].shape
    n, flat = len(visit.rows), candidates[0][1].flatten(3).shape[-1]
    box = between(visit.lower.flatten(1), visit.upper.flatten(1))
    center, radius = (part[:, None, None] for part in box)
    size = center.abs() + radius
    many_A, many_c, many_least = [], [], []
    for mask, A, c in candidates:
        A = A.flatten(3)
        c = c - SLACK * ((A.abs() * size[mask]).sum(-1) + c.abs())
        least = (A * center[mask]).sum(-1) - (A.abs() * radius[mask]).sum(-1) + c
        sane = least.isfinite()  # what overflowed comes first and makes all NaN
        c, least = torch.where(sane, c, float("nan")), torch.where(sane, least, -float("inf"))
        full_A, full_c = A.new_zeros(n, *shape[1:3], flat), A.new_zeros(n, *shape[1:3])
        full_least = torch.full_like(full_c, float("inf"))  # a move that cannot happen comes last
        full_A[mask], full_c[mask], full_least[mask] = A, c, least
        many_A.append(full_A)
        many_c.append(full_c)
        many_least.append(full_least)
    A, c, least = torch.stack(many_A), torch.stack(many_c), torch.stack(many_least)
    if len(candidates) > 2 or not all(mask.all() for mask, _, _ in candidates):
        order = least.argsort(0)
        A, c, least = (
            A.take_along_dim(order[..., None], 0),
            c.take_along_dim(order, 0),
            least.take_along_dim(order, 0),
        )
    joined_A, joined_c = A[0], c[0]
    for k in range(1, len(candidates)):
        there = ~(least[k] == float("inf"))
        new_A, new_c = _below(joined_A, joined_c, A[k], c[k], center, radius)
        joined_A = torch.where(there[..., None], new_A, joined_A)
        joined_c = torch.where(there, new_c, joined_c)
    return joined_A.view(n, *shape[1:]), joined_c


@torch.no_grad()
def linear_bounds(
    net: nn.Sequential,
    lower: Float[Tensor, " 1 *shape"],
    upper: Float[Tensor, " 1 *shape"],
    *,
    C: Float[Tensor, " K out"] | None = None,
) -> LinearBounds:
    """Return linear functions of the input below and above the outputs of a network on a box.

    Parameters
    ----------
    net : nn.Sequential
        As for `interval_bounds`.
    lower, upper : Tensor of shape (1, ...)
        Corners of the box of one sample.
    C : Tensor of shape (K, out), optional
        Rows whose product with the output is bounded, by default each output itself.

    Returns
    -------
    LinearBounds
        In float64. Of three choices of slopes below the ReLUs, each row has the best; its
        ``lower`` and ``upper`` are also at least as good as what interval bounds say.

    Raises
    ------
    ValueError
        As `interval_bounds`; also if ``C`` does not fit or there is more than one sample.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4.3.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import linear_bounds
    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> _ = net[0].weight.data.fill_(1.0), net[0].bias.data.zero_()
    >>> bounds = linear_bounds(net, torch.tensor([[-1.0]]), torch.tensor([[3.0]]))
    >>> bounds.A_upper.float(), bounds.c_upper.float()  # the chord
    (tensor([[0.7500]]), tensor([0.7500]))
    """
    lower, upper = check_box(lower, upper, one=True)
    twin = exact(net, lower, "lower")
    out = twin(lower).shape[1]
    if C is None:
        C = torch.eye(out, device=lower.device)
    C = finite("C", has_shape("C", floating("C", C), (None, out), "the output of net")).detach().double()
    if not len(C):
        raise ValueError("C must have at least one row, got none")
    found = bound_network(twin, lower, upper, linear=True)
    k = len(C)
    A, c, best = lower_bounds(found, torch.cat([C, -C])[None], len(twin), stops_of(twin))
    A, c, best = A[0], c[0], best[0]
    return LinearBounds(best[:k], -best[k:], A[:k], c[:k], -A[k:], -c[k:])


def stops_of(net: nn.Sequential, method: str = "gains") -> list[int]:
    """Return at which layers' boxes bounds become numbers, the last first."""
    last = len(net) - 1 if isinstance(net[-1], AFFINE) else len(net)
    if method == "box":
        return [last]
    blocks = [index + 1 for index, layer in enumerate(net) if isinstance(layer, NeuralODEBlock)]
    return [last, *blocks[-1:], 0]
