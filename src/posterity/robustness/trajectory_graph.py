"""The trajectory graph: every way that an adaptive solver can go from a box of inputs, in one pass.

A node is a step that may be tried, (t, h) and the state of the rules of the end; its box holds the
states of all inputs that come there. Its Runge-Kutta step is bounded once, and with it the error:
from [e_l, e_u] follows which of growing, keeping and rejecting can happen,

    grow: e_l <= f^-p,      keep: e_l <= 1 and e_u > f^-p,      reject: e_u > 1.           (1)

Boxes that meet at a node are joined. So the work is that of O(T^2 log^2 T) nodes, while the number
of trajectories, the paths of the graph, grows exponentially.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import integer
from posterity.robustness.boxes import (
    SLACK,
    Kinks,
    between,
    check_box,
    error_bounds,
    exact,
    through_layer,
    through_step,
    widen,
)
from posterity.robustness.neural_ode import NeuralODEBlock
from posterity.robustness.ode_solver import GROW, KEEP, REJECT, Step, Tableau, in_order

__all__ = ["TrajectoryGraph", "interval_bounds", "trajectory_graph"]

MAX_NODES = 5000


@dataclass
class TrajectoryGraph:
    """What a solver can do on a box of inputs.

    Attributes
    ----------
    nodes : list of Step
        Named tuples ``(t, h, clips, forced)`` in the order of time, times and sizes as exact
        fractions; the last is the end, with h = 0.
    edges : list of tuple of int
        Pairs of places in ``nodes``, from a step to one that may follow it.
    n_trajectories : int
        Number of paths from the first node to the last, exact.
    output_bounds : tuple of Tensor
        Least and greatest states at the end, each of shape (1, ...), float64.
    """

    nodes: list[Step]
    edges: list[tuple[int, int]]
    n_trajectories: int
    output_bounds: tuple[Float[Tensor, " 1 *shape"], Float[Tensor, " 1 *shape"]]


@dataclass
class Visit:
    """What is known of a node: samples that come there, their box, their moves.

    ``moves`` are the step that follows, whether this one was rejected, and for which rows.
    """

    rows: Tensor
    lower: Tensor
    upper: Tensor
    stages: list[Kinks]
    moves: list[tuple[Step | None, bool, Tensor]]


@dataclass
class Exploration:
    """The graphs of a batch, nodes that several samples reach once."""

    block: NeuralODEBlock
    tableau: Tableau
    visits: dict[Step, Visit]
    lower: Tensor
    upper: Tensor


class TooManyNodes(ValueError):
    """A graph that is too large; ``rows`` says of which samples."""

    def __init__(self, rows: list[int], max_nodes: int) -> None:
        super().__init__(
            f"max_nodes must be larger: the graphs of {len(rows)} sample(s) have more than {max_nodes} nodes; "
            "a smaller box or training with CertifiedLoss makes them smaller"
        )
        self.rows = rows


def explore(
    block: NeuralODEBlock, lower: Tensor, upper: Tensor, max_nodes: int, *, keep: bool
) -> Exploration:
    """Return the graphs of a batch of boxes of a float64 block, with each stage's kinks if kept."""
    control, tableau, first = block._control()
    n = len(lower)
    everyone = torch.arange(n, device=lower.device)
    waiting = {first: [(everyone, lower, upper)]}
    visits: dict[Step, Visit] = {}
    ends, counts = [], torch.zeros(n, dtype=torch.long, device=lower.device)
    for step in in_order(waiting):
        rows, low, high = _joined(waiting.pop(step), n)
        counts[rows] += 1
        small = counts[rows] <= max_nodes
        if not small.all():
            rows, low, high = rows[small], low[small], high[small]
            if not len(rows):
                continue
        new, error, stages = through_step(block.func, step, between(low, high), tableau, SLACK, keep=keep)
        new = widen(new, SLACK)
        least, most = error_bounds(error, block.atol, SLACK)
        # NaN is in no order: what is not excluded is possible
        if step.forced:
            possible = {KEEP: torch.ones_like(small[small])}
        else:
            possible = {
                GROW: ~(least > control.easy),
                KEEP: ~(least > 1) & ~(most <= control.easy),
                REJECT: ~(most <= 1),
            }
        moves: dict[tuple[Step | None, bool], Tensor] = {}
        for action, mask in possible.items():
            if mask.any():
                move = (control.after(step, action), action == REJECT)
                moves[move] = moves[move] | mask if move in moves else mask
        for (after, rejected), mask in moves.items():
            state = (low[mask], high[mask]) if rejected else (new.lower[mask], new.upper[mask])
            (ends if after is None else waiting.setdefault(after, [])).append((rows[mask], *state))
        visits[step] = Visit(rows, low, high, stages, [(*move, mask) for move, mask in moves.items()])
    assert not waiting, "a step was reached after it had been followed"
    if bool((counts > max_nodes).any()):
        raise TooManyNodes((counts > max_nodes).nonzero()[:, 0].tolist(), max_nodes)
    _, low, high = _joined(ends, n)
    return Exploration(block, tableau, visits, low, high)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and the hulls of their boxes, which may come in several parts."""
    if len(parts) == 1:
        return parts[0]
    example = parts[0][1]
    low = example.new_full((n, *example.shape[1:]), float("inf"))
    high, present = -low, torch.zeros(n, dtype=torch.bool, device=low.device)
    for rows, lower, upper in parts:
        low[rows], high[rows] = torch.minimum(low[rows], lower), torch.maximum(high[rows], upper)
        present[rows] = True
    rows = present.nonzero()[:, 0]
    return rows, low[rows], high[rows]


def trajectory_graph(
    block: NeuralODEBlock,
    lower: Float[Tensor, " 1 *shape"],
    upper: Float[Tensor, " 1 *shape"],
    *,
    max_nodes: int = MAX_NODES,
) -> TrajectoryGraph:
    """Return every way that the solver of a block can go from a box.

    Parameters
    ----------
    block : NeuralODEBlock
        As in eval mode, in float64; its h0 must be set.
    lower, upper : Tensor of shape (1, ...)
        Corners of the box of states at time 0.
    max_nodes : int, default=5000
        Give up beyond it.

    Returns
    -------
    TrajectoryGraph
        Steps, what can follow them, and bounds at the end.

    Raises
    ------
    ValueError
        If the box does not fit or is empty, the block is in a narrow dtype, or there are more nodes.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4.2.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import NeuralODEBlock, trajectory_graph
    >>> block = NeuralODEBlock(nn.Sequential(nn.Linear(1, 1)))
    >>> _ = block.h0.fill_(0.25), block.func[0].weight.data.fill_(-1.0), block.func[0].bias.data.zero_()
    >>> graph = trajectory_graph(block, torch.tensor([[0.999]]), torch.tensor([[1.001]]))
    >>> [(float(node.t), float(node.h)) for node in graph.nodes]
    [(0.0, 0.25), (0.25, 0.5), (0.75, 0.25), (1.0, 0.0)]
    >>> graph.n_trajectories
    1
    """
    if not isinstance(block, NeuralODEBlock):
        raise ValueError(f"block must be a NeuralODEBlock, got {type(block).__name__}")
    integer("max_nodes", max_nodes, 1)
    lower, upper = check_box(lower, upper, one=True)
    twin = exact(nn.Sequential(block, nn.Flatten()), lower, "lower")[0]
    found = explore(twin, lower, upper, max_nodes, keep=False)  # type: ignore[arg-type]
    nodes = list(found.visits)
    place = {step: k for k, step in enumerate(nodes)}
    edges = [
        (place[step], len(nodes) if after is None else place[after])
        for step, visit in found.visits.items()
        for after, _, _ in visit.moves
    ]
    paths = [1] + [0] * len(nodes)
    for start, end in edges:  # the nodes are in an order in which no edge goes back
        paths[end] += paths[start]
    end = Step(nodes[-1].t + nodes[-1].h, nodes[-1].h * 0)
    return TrajectoryGraph([*nodes, end], edges, paths[-1], (found.lower, found.upper))


@torch.no_grad()
def interval_bounds(
    net: nn.Sequential, lower: Float[Tensor, " batch *shape"], upper: Float[Tensor, " batch *shape"]
) -> tuple[Float[Tensor, " batch out"], Float[Tensor, " batch out"]]:
    """Return boxes that hold all outputs of a network on boxes, by interval arithmetic alone.

    Parameters
    ----------
    net : nn.Sequential
        Of Linear, Conv2d, ReLU, Flatten, Identity, AdaptiveAvgPool2d(1) and `NeuralODEBlock`,
        in float32 or float64; taken in eval mode and in float64.
    lower, upper : Tensor of shape (batch, ...)
        Corners of one box a sample.

    Returns
    -------
    tuple of Tensor
        Least and greatest outputs, each (batch, out), float64.

    Raises
    ------
    ValueError
        If a layer has no bounds, a box does not fit or is empty, or a trajectory graph has more
        than 5,000 nodes.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import interval_bounds
    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> low, high = interval_bounds(net, torch.zeros(1, 2), torch.ones(1, 2))
    >>> [round(float(end), 6) + 0 for end in (low, high)]
    [0.0, 1.0]
    """
    lower, upper = check_box(lower, upper)
    box = between(lower, upper)
    for layer in exact(net, lower, "lower"):
        if isinstance(layer, NeuralODEBlock):
            found = explore(layer, box.lower, box.upper, MAX_NODES, keep=False)
            box = between(found.lower, found.upper)
        else:
            box = through_layer(layer, box, slack=SLACK)
    box = widen(box, SLACK)
    return box.lower, box.upper
