"""GAINS: neural ODEs that provably keep their decision, and a loss that trains them to.

A decision is safe on the box of all inputs within epsilon when z_y - z_j > 0 on it for every other
class j. An ODE solver between input and z takes steps that depend on the input; here they come
from a discrete set, so that all trajectories together are a small graph, and bounds that follow
the graph are a proof. Training minimises, with w = weight epsilon / epsilon_target,

    (1 - w) CE(z, y) + w CE(worst z on the box, y) + gamma mean (u - l)^2,                (1)

where the worst logits and the widths u - l come from intervals carried along a few trajectories,
sampled near the one that the solver takes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import (
    at_least,
    class_indices,
    finite,
    floating,
    has_shape,
    integer,
    interval,
    one_of,
    within,
)
from posterity._precision import wide
from posterity._random import draw_device
from posterity.robustness.boxes import (
    Box,
    between,
    check_network,
    error_bounds,
    exact,
    state_weight,
    through_layer,
    through_step,
)
from posterity.robustness.linear_bounds import bound_network, lower_bounds, stops_of
from posterity.robustness.neural_ode import NeuralODEBlock
from posterity.robustness.ode_solver import GROW, KEEP, REJECT, ODESolution
from posterity.robustness.trajectory_graph import TooManyNodes

__all__ = ["Certificate", "CertifiedLoss", "certify", "certify_regression", "epsilon_schedule"]

Bounds = Literal["gains", "box"]


@dataclass
class Certificate:
    """What is proved of each sample.

    Attributes
    ----------
    verified : Tensor of shape (B,), bool
        Whether nothing within epsilon changes the decision. False says that there is no proof, not
        that there is an attack.
    margin : Tensor of shape (B,), float64
        A lower bound of what must stay positive; verified are those above 0. -inf where there
        is no bound: the trajectory graph has more than 5,000 nodes, or numbers overflow.
    """

    verified: Bool[Tensor, " B"]
    margin: Float[Tensor, " B"]


@torch.no_grad()
def certify(
    net: nn.Sequential,
    x: Float[Tensor, " B *shape"],
    y: Int[Tensor, " B"],
    epsilon: float,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    method: Bounds = "gains",
) -> Certificate:
    """Prove of each sample that no input within epsilon in each coordinate changes the decision for y.

    Parameters
    ----------
    net : nn.Sequential
        Of Linear, Conv2d, ReLU, Flatten, Identity, AdaptiveAvgPool2d(1) and `NeuralODEBlock`,
        in float32 or float64.
    x : Tensor of shape (B, ...)
        Inputs, within ``bounds``.
    y : Tensor of shape (B,)
        Their classes. A sample that is classified otherwise is not verified.
    epsilon : float
        Largest change of a coordinate, at least 0.
    bounds : tuple of float, default=(0.0, 1.0)
        What an input may be: the box is cut to it.
    method : {"gains", "box"}, default="gains"
        Linear bounds through the graph (the better of them and of boxes), or boxes alone: weaker,
        some times faster.

    Returns
    -------
    Certificate
        ``margin`` is a lower bound of the least z_y - z_j.

    Raises
    ------
    ValueError
        If a layer has no bounds, the network is in a narrow dtype, a block's h0 is not set, or an
        argument does not fit.

    Notes
    -----
    1. The proof is of ``net.double().eval()``, one sample at a time, with outward rounding of 1e-9.
       In float32 a network rounds, by some 1e-6 of its logits, and where an error lies on a
       threshold its solver may step otherwise than in float64. To rely on the proof, decide in
       float64. A network in bfloat16 or float16 is refused.
    2. Samples that reach the same step are bounded together, each with bounds of its own.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import certify
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))  # z_0 - z_1 = 2 x
    >>> x, y = torch.tensor([[0.3], [0.7]]), torch.tensor([0, 0])
    >>> certify(net, x, y, 0.5, bounds=(-1.0, 1.0)).margin.float()
    tensor([-0.4000,  0.4000])
    """
    one_of("method", method, ("gains", "box"))
    at_least("epsilon", epsilon, 0)
    twin = exact(net, _inputs(x, bounds), "x")
    classes = twin(x[:1].double()).shape[1]
    if classes < 2:
        raise ValueError(f"net must have at least 2 outputs, one a class, got {classes}")
    class_indices("y", y, len(x), classes)
    low, high = ((x.double() + shift).clamp(*map(float, bounds)) for shift in (-epsilon, epsilon))
    eye = torch.eye(classes, dtype=torch.float64, device=x.device)
    others = torch.stack([torch.arange(classes, device=x.device)[torch.arange(classes, device=x.device) != k]
                          for k in range(classes)])[y.long()]  # fmt: skip
    margin = _lower(twin, low, high, eye[y.long()][:, None] - eye[others], method).amin(1)
    return Certificate(margin > 0, margin)


@torch.no_grad()
def certify_regression(
    net: nn.Sequential,
    x: Float[Tensor, " B *shape"],
    y: Float[Tensor, " B out"],
    epsilon: float,
    *,
    nu: float = 0.1,
    delta: float = 0.01,
    method: Bounds = "gains",
) -> Certificate:
    """Prove of each sample that no input within epsilon makes the mean absolute error much larger.

    Parameters
    ----------
    net : nn.Sequential
        As for `certify`.
    x : Tensor of shape (B, ...)
        Inputs.
    y : Tensor of shape (B, out)
        Targets.
    epsilon : float
        Largest change of a coordinate, at least 0; the box is not cut.
    nu, delta : float, default=0.1, 0.01
        Allowed is an error below (1 + nu) times that at ``x``, plus delta; at least 0.
    method : {"gains", "box"}, default="gains"
        As for `certify`.

    Returns
    -------
    Certificate
        ``margin`` is what is allowed less an upper bound of the worst error.

    Raises
    ------
    ValueError
        As `certify`.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 5.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import certify_regression
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> _ = net[0].weight.data.fill_(1.0)
    >>> certify_regression(net, torch.tensor([[0.5]]), torch.tensor([[0.0]]), 0.25).margin.float()
    tensor([-0.1900])
    """
    one_of("method", method, ("gains", "box"))
    for name, value in (("epsilon", epsilon), ("nu", nu), ("delta", delta)):
        at_least(name, value, 0)
    twin = exact(net, _inputs(x), "x")
    floating("y", y)
    x = x.double()
    clean = torch.cat([twin(part) for part in x.split(256)])
    y = finite("y", has_shape("y", y, tuple(clean.shape), "the output of net")).double()
    eye = torch.eye(y.shape[1], dtype=torch.float64, device=x.device)
    rows = torch.cat([eye, -eye]).expand(len(x), -1, -1)
    low, high = _lower(twin, x - epsilon, x + epsilon, rows, method).chunk(2, 1)
    worst = torch.maximum(y - low, -high - y).mean(1)
    margin = (1 + nu) * (clean - y).abs().mean(1) + delta - worst
    return Certificate(margin > 0, margin)


def _lower(net: nn.Sequential, lower: Tensor, upper: Tensor, C: Tensor, method: Bounds) -> Tensor:
    """Return lower bounds (B, K) of rows of the output; -inf for samples whose graphs are too large."""
    value = lower.new_full(C.shape[:2], -float("inf"))
    for rows in torch.arange(len(lower), device=lower.device).split(
        max(1, min(64, 2**15 // lower[0].numel()))
    ):
        while len(rows):
            try:
                found = bound_network(net, lower[rows], upper[rows], linear=method == "gains")
            except TooManyNodes as error:
                large = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
                large[error.rows] = True
                rows = rows[~large]
                continue
            value[rows] = lower_bounds(found, C[rows], len(net), stops_of(net, method))[2]
            break
    return value


class CertifiedLoss(nn.Module):
    """The loss (1), with which a network learns decisions that can be proved.

    Let epsilon rise slowly from 0 to the target (`epsilon_schedule`); train for a little more than what
    will be certified, such as 0.11 for 0.1. The network must be in training mode for its blocks'
    first step sizes to follow.

    Parameters
    ----------
    weight : float, default=0.66
        Share of the worst case at the target, in [0, 1].
    gamma : float, default=0.01
        Weight of the widths, at least 0.
    n_trajectories : int, default=1
        How many trajectories are sampled; those that differ are averaged. The authors end with 4.
    q : float, default=0.15
        Chance of each other possible step than the solver's own, in [0, 0.5]; an attribute, so
        that it can be raised (the authors: to 0.33).
    generator : torch.Generator, optional
        Draws the trajectories; by default torch's global one.

    Raises
    ------
    ValueError
        If a parameter is out of range, the network has a layer without bounds or is in a narrow
        dtype, or the data do not fit.

    Notes
    -----
    1. Here a batch decides its steps by its mean error, as in the authors' training; proofs are
       of single samples.
    2. Rounding is not covered in training, so the loss itself proves nothing: use `certify`.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4.4.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import CertifiedLoss
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))  # worst: z_1 - z_0 = 0
    >>> loss = CertifiedLoss(weight=1.0, gamma=0.0)
    >>> loss(net, torch.tensor([[0.5]]), torch.tensor([0]), 0.5, epsilon_target=0.5).detach()
    tensor(0.6931)
    """

    def __init__(
        self, *, weight: float = 0.66, gamma: float = 0.01, n_trajectories: int = 1, q: float = 0.15,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = within("weight", weight, 0, 1)
        self.gamma = at_least("gamma", gamma, 0)
        self.n_trajectories = integer("n_trajectories", n_trajectories, 1)
        self.q = within("q", q, 0, 0.5)
        self.generator = generator

    def forward(
        self,
        net: nn.Sequential,
        x: Float[Tensor, " B *shape"],
        y: Int[Tensor, " B"],
        epsilon: float,
        *,
        epsilon_target: float,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch at ``epsilon``, at most ``epsilon_target``: a scalar."""
        check_network(net)
        at_least("epsilon_target", epsilon_target, 0, strict=True)
        within("epsilon", epsilon, 0, epsilon_target)
        dtype = _inputs(x, bounds).dtype
        example = next(net.parameters(), x)
        x = x.to(example.dtype)
        logits, references = x, {}
        for index, layer in enumerate(net):
            if isinstance(layer, NeuralODEBlock):
                references[index] = layer._solve(logits)
                logits = references[index].y
            else:
                logits = layer(logits)
        logits = wide(logits)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(f"net must return at least 2 logits a sample, got shape {tuple(logits.shape)}")
        class_indices("y", y, len(x), logits.shape[1])
        share = self.weight * epsilon / epsilon_target
        with torch.autocast(x.device.type, enabled=False):
            box = between(*((x + shift).clamp(*map(float, bounds)) for shift in (-epsilon, epsilon)))
            worst = self._worst(net, box, y.long(), references)
            loss = (1 - share) * F.cross_entropy(logits, y.long()) + share * worst[0] + self.gamma * worst[1]
        return loss.to(dtype)

    def _worst(self, net: nn.Sequential, box: Box, y: Tensor, references: dict[int, ODESolution]) -> Tensor:
        """Return cross-entropy of the worst logits and mean squared width, means over trajectories."""
        seen: dict[tuple[int, ...], Tensor] = {}
        for _ in range(self.n_trajectories if references else 1):
            now, actions = box, []
            *front, last = net if isinstance(net[-1], nn.Linear) else (*net, nn.Identity())
            for index, layer in enumerate(front):
                if isinstance(layer, NeuralODEBlock):
                    now, taken = self._along(layer, now, references[index])
                    actions += taken
                else:
                    now = through_layer(layer, now)
            if tuple(actions) in seen:
                continue
            n = now.center.shape[-1] if isinstance(last, nn.Identity) else len(state_weight(last))
            eye = torch.eye(n, dtype=now.center.dtype, device=now.center.device)
            rows = eye - eye[y][:, None]  # z_j - z_y
            above = torch.zeros_like(rows[..., 0])
            if isinstance(last, nn.Linear):
                above = above if last.bias is None else last.bias - last.bias[y][:, None]
                rows = last.weight - last.weight[y][:, None]
            reach = (rows.abs() @ now.radius[..., None])[..., 0]
            above = above + (rows @ now.center[..., None])[..., 0] + reach
            width = (2 * reach).square().sum() / (len(y) * (n - 1))
            seen[tuple(actions)] = torch.stack([F.cross_entropy(above, y), width])
        return torch.stack(list(seen.values())).mean(0)

    def _along(self, block: NeuralODEBlock, box: Box, reference: ODESolution) -> tuple[Box, list[int]]:
        """Return the box at the end of a sampled trajectory, and its actions."""
        control, tableau, step = block._control()
        ahead, taken = 0, []
        while step is not None:
            new, error, _ = through_step(block.func, step, box, tableau)
            least, most = (float(end.detach().mean()) for end in error_bounds(error, block.atol))
            if step.forced:
                possible = [KEEP]
            else:
                ways = {
                    GROW: least <= control.easy,
                    KEEP: least <= 1 and most > control.easy,
                    REJECT: most > 1,
                }
                possible = [action for action, can in ways.items() if can] or [KEEP]
            t, h = float(step.t), float(step.h)
            far = [
                abs(t - s) + abs(h - g) for s, g in zip(reference.times, reference.step_sizes, strict=True)
            ]
            wanted = reference.actions[far.index(min(far))]
            favoured = REJECT if ahead > 0 else GROW if ahead < 0 else wanted
            action = possible[0] if len(possible) == 1 else self._draw(possible, favoured)
            ahead += action - wanted
            taken.append(action)
            box = box if action == REJECT else new
            step = control.after(step, action)
        return box, taken

    def _draw(self, possible: list[int], favoured: int) -> int:
        chances = torch.tensor([1 - 2 * self.q if action == favoured else self.q for action in possible])
        if not chances.sum() > 0:  # q = 0 and the favoured action is not possible
            chances = torch.ones(len(possible))
        draw = torch.rand((), generator=self.generator, device=draw_device(self.generator)).cpu()
        share = (chances / chances.sum()).cumsum(0)
        return possible[min(int((share < draw).sum()), len(possible) - 1)]


def epsilon_schedule(
    step: float, *, start: float, length: float, target: float, mid: float = 0.6, beta: float = 4.0
) -> float:
    """Return the epsilon of a step: 0, then a power of the time, then a line, then the target.

    Parameters
    ----------
    step : float
        Step or epoch.
    start : float
        Where the rise begins.
    length : float
        How long it takes, positive.
    target : float
        Last value, at least 0.
    mid : float, default=0.6
        Share of the length that is a power of the time, in (0, 1]; the line goes on with its slope.
    beta : float, default=4.0
        The power, at least 1.

    Returns
    -------
    float
        From 0 to ``target``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> from posterity.robustness import epsilon_schedule
    >>> [round(epsilon_schedule(k, start=10, length=10, target=0.1), 4) for k in (10, 13, 16, 18, 20, 30)]
    [0.0, 0.0017, 0.0273, 0.0636, 0.1, 0.1]
    """
    for name, value in (("step", step), ("start", start), ("target", target)):
        within(
            name,
            value,
            0 if name == "target" else -math.inf,
            math.inf,
            open_low=name != "target",
            open_high=True,
        )
    at_least("length", length, 0, strict=True)
    within("mid", mid, 0, 1, open_low=True)
    at_least("beta", beta, 1)
    done = (step - start) / length
    if done <= 0 or done >= 1:
        return float(target) if done >= 1 else 0.0
    at_mid = mid / (mid + beta * (1 - mid))  # so that value and slope agree there
    rise = at_mid * (min(done, mid) / mid) ** beta
    return float(target * (rise + max(done - mid, 0) * at_mid * beta / mid))


def _inputs(x: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """Return checked inputs."""
    floating("x", x)
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must have samples and features, got shape {tuple(x.shape)}")
    if x.device.type == "cpu":
        finite("x", x)
    if bounds is None:
        return x
    low, high = interval("bounds", bounds)
    if x.device.type == "cpu" and not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(
            f"x must lie in bounds, [{low}, {high}], got {float(x.min()):g} to {float(x.max()):g}"
        )
    return x
