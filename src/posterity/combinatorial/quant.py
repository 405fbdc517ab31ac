"""QuAnt: a network that writes the QUBO whose lowest state is the answer, instead of a formula that derives it.

From the features of an instance the network makes couplings A of n bits; an annealer, a quantum device or plain trying finds
the bits x that make ``x^T A x`` least, and they are the answer. Trained on solved instances with bits x*:

    loss = mean of (E(x*) - E(x0)) - gap |E(x*) - E(x1)|,

x0 and x1 the lowest and second lowest state. The first term is never negative, and 0 exactly where x* is a lowest state;
the second opens a gap above it, so that a noisy annealer finds it. x0 and x1 are constants: no gradient goes through a
solver, and any solver serves. An answer of b bits needs b bits, where a derived QUBO needs one a possible assignment.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import wide, widened
from posterity.combinatorial.ground_states import binary, ground_states, qubo_energy

__all__ = ["QUBONet", "QuAntLoss", "matching_features", "registration_features"]

ANGLE_SCALES = (0.5, 0.2, 0.1, 0.1, 0.05)  # of the basis matrices of a registration; 0.1 twice, as published


class QUBONet(nn.Module):
    """Features of an instance to the couplings of its QUBO.

    A fully connected network whose last layer is made symmetric and goes through a sine, which keeps couplings in
    [-1, 1], the range of a device.

    Parameters
    ----------
    in_features : int
        Of an instance.
    n_bits : int
        Of the answer.
    width : int, default=78
        Of hidden layers.
    deep : bool, default=True
        Four hidden layers, the third of which sees the input again, instead of two.
    couplings : {"full", "diagonal"} or Tensor of shape (n_bits, n_bits), bool, default="full"
        Which there may be: all; no pairs, the baseline whose bits are each for itself; or those of a device's graph, in
        which the diagonal is True where a bit may have a linear part.

    Raises
    ------
    ValueError
        For sizes below 1 or a graph that is not square, symmetric and bool.

    References
    ----------
    Seelbach Benkner et al., ICLR 2023, Section 3 and the official code's networks.

    Examples
    --------
    >>> net = QUBONet(5, 3, width=8)
    >>> A = net(torch.randn(2, 5))
    >>> A.shape, bool((A == A.mT).all())
    (torch.Size([2, 3, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        n_bits: int,
        *,
        width: int = 78,
        deep: bool = True,
        couplings: Literal["full", "diagonal"] | Tensor = "full",
    ) -> None:
        super().__init__()
        self.in_features, self.n_bits = integer("in_features", in_features, 1), integer("n_bits", n_bits, 1)
        width = integer("width", width, 1)
        self.register_buffer("mask", _graph(couplings, n_bits), persistent=False)
        self.diagonal = isinstance(couplings, str) and couplings == "diagonal"
        self.first = nn.Linear(in_features, width)
        self.inner = nn.Linear(width, width) if deep else None
        self.again = nn.Linear(width + in_features, width) if deep else None
        self.last = nn.Linear(width, width)
        self.head = nn.Linear(width, n_bits if self.diagonal else n_bits**2)

    def forward(
        self, x: Float[Tensor, "batch features"], *, return_activity: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the couplings of a batch.

        Parameters
        ----------
        x : Tensor of shape (batch, in_features)
        return_activity : bool, default=False
            Whether to return also the sum over hidden layers of the mean of ``|h|``, a scalar, which the authors add to
            the loss with weight 0.001.

        Returns
        -------
        Tensor of shape (batch, n_bits, n_bits), or it and a scalar
            Symmetric, in [-1, 1].
        """
        floating("x", x)
        has_shape("x", x, (None, self.in_features))
        hidden = [torch.relu(self.first(x))]
        if self.inner is not None and self.again is not None:
            hidden.append(torch.relu(self.inner(hidden[-1])))
            hidden.append(torch.relu(self.again(torch.cat([hidden[-1], x.to(hidden[-1])], 1))))
        hidden.append(torch.relu(self.last(hidden[-1])))
        y = self.head(hidden[-1])
        if self.diagonal:
            couplings = torch.diag_embed(torch.sin(y))
        else:
            y = y.unflatten(1, (self.n_bits, self.n_bits))
            couplings = torch.sin(y + y.mT) * self.mask  # pyright: ignore[reportOperatorIssue]
        if not return_activity:
            return couplings
        return couplings, sum((wide(h).abs().mean() for h in hidden), start=wide(x).new_zeros(()))


class QuAntLoss(nn.Module):
    """Energy of the true bits above the lowest state, less a share of its gap to the second lowest.

    The gradient with respect to the couplings is ``x* x*^T - x0 x0^T - gap sign(E(x*) - E(x1)) (x* x*^T - x1 x1^T)``,
    over the batch. x1 is the second lowest of all states: where it is x* itself, the gap's term vanishes.

    Parameters
    ----------
    gap : float, default=0.01
        Weight of the gap, 0 or more.
    solver : {"exhaustive", "anneal"} or callable, default="exhaustive"
        Of `ground_states`, which finds x0 and x1.

    Raises
    ------
    ValueError
        For a negative gap, couplings that `ground_states` refuses, and bits that are not 0 or 1 or of another shape.

    References
    ----------
    Seelbach Benkner et al., ICLR 2023, the equation of Section 3.2; weights of the official code.

    Examples
    --------
    >>> A = torch.tensor([[[-1.0, 2.0], [2.0, -1.5]]])
    >>> loss = QuAntLoss(gap=0.1)
    >>> float(loss(A, torch.tensor([[1, 0]])))  # 0.5 above the lowest, and itself the second lowest
    0.5
    >>> round(float(loss(A, torch.tensor([[0, 1]]))), 6)  # the lowest, 0.5 below the second lowest
    -0.05
    """

    def __init__(
        self,
        gap: float = 0.01,
        *,
        solver: Literal["exhaustive", "anneal"] | Callable[..., Any] = "exhaustive",
    ) -> None:
        super().__init__()
        self.gap, self.solver = at_least("gap", gap, 0), solver

    def forward(self, couplings: Float[Tensor, "batch n n"], bits: Tensor) -> Float[Tensor, ""]:
        """Return the mean over a batch.

        Parameters
        ----------
        couplings : Tensor of shape (batch, n, n)
            Symmetric.
        bits : Tensor of shape (batch, n)
            The answers, 0 and 1 of any dtype.

        Returns
        -------
        Tensor
            Scalar, in the dtype of the couplings, computed in float32 at least.
        """
        floating("couplings", couplings)
        if couplings.ndim != 3 or not len(couplings):
            raise ValueError(f"couplings must be (batch, n, n), one or more, got {tuple(couplings.shape)}")
        if bits.shape != couplings.shape[:2]:
            raise ValueError(
                f"bits must be {tuple(couplings.shape[:2])}, as couplings are, got {tuple(bits.shape)}"
            )
        binary("bits", bits)
        with torch.autocast(couplings.device.type, enabled=False):
            exact = wide(couplings)
            with torch.no_grad():
                lowest = ground_states(exact, 2, solver=self.solver)
                states = torch.cat([bits.to(exact)[:, None], lowest.x], 1)
                above = qubo_energy(exact, states[:, 0]) - lowest.energy[:, 1]
                share = self.gap * above.sign()
                each = torch.stack([1 - share, -torch.ones_like(share), share], 1)
                slope = (
                    states * each[..., None]
                ).mT @ states  # of the energies, which are linear in the couplings
            return ((exact * slope).sum() / len(exact)).to(couplings.dtype)


@widened
def matching_features(d1: Float[Tensor, "batch k k"], d2: Float[Tensor, "batch k k"]) -> Tensor:
    """Return by how much each pair of matches changes a distance, the features of matching two graphs.

    Row ``i k + a``, column ``j k + b`` holds ``|d1[i, j] - d2[a, b]|``: what it costs that a is i and b is j. A
    one-hot QUBO of these k^2 rows has energy 0 at the true permutation p, ``d2[a, b] = d1[p[a], p[b]]``; the answer's
    own bits, ``to_bits(p, ceil(log2(k))).flatten(1)``, are k log k.

    Parameters
    ----------
    d1, d2 : Tensor of shape (batch, k, k)
        Distances between the points of both sides; need not be symmetric.

    Returns
    -------
    Tensor of shape (batch, k**4)
        Not negative.

    Raises
    ------
    ValueError
        If the shapes differ or are not (batch, k, k).

    Examples
    --------
    >>> d = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> matching_features(d, d).view(4, 4)[0]
    tensor([0., 1., 1., 0.])
    """
    floating("d1", d1)
    floating("d2", d2)
    if d1.ndim != 3 or d1.shape != d2.shape or d1.shape[1] != d1.shape[2] or not d1.shape[1]:
        raise ValueError(f"d1 and d2 must both be (batch, k, k), got {tuple(d1.shape)} and {tuple(d2.shape)}")
    return (d1[:, :, None, :, None] - d2[:, None, :, None, :]).abs().flatten(1)


@widened
def registration_features(
    template: Float[Tensor, "P 2"],
    reference: Float[Tensor, "Q 2"],
    *,
    n_neighbors: int = 3,
    ordered: bool = False,
) -> Float[Tensor, "21 21"]:
    """Return features of turning one cloud of points onto another, ``Phi Phi^T``.

    The first row of Phi holds the points of the template, each once a neighbour; row 1 + q holds ``-B_q y`` for their
    neighbours y in the reference, with twenty basis matrices B: the identity, a quarter turn and their negatives, each at
    the scales 0.5, 0.2, 0.1, 0.1, 0.05. An angle in a range has the bin ``floor(angle / (range / 2**n_bits))``, whose bits are
    the answer; rotations in space are three such networks, one an Euler angle, trained one after the other.

    Parameters
    ----------
    template : Tensor of shape (P, 2)
        Points that were turned.
    reference : Tensor of shape (Q, 2)
        What they were turned onto.
    n_neighbors : int, default=3
        Of each point.
    ordered : bool, default=False
        Whether point i of both is the same. Then the neighbours are looked up with it, as published: those of
        reference point i among the *template*, taken from the reference. By default they are the nearest points
        of the reference to each point of the template.

    Returns
    -------
    Tensor of shape (21, 21)
        Symmetric, positive semidefinite.

    Raises
    ------
    ValueError
        For other shapes, more neighbours than points, and clouds of different sizes where ``ordered``.

    Examples
    --------
    >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> float(registration_features(points, points, n_neighbors=1)[0, 0])  # three points of norm 1
    3.0
    """
    for name, points in (("template", template), ("reference", reference)):
        floating(name, points)
        has_shape(name, points, (None, 2))
    n_neighbors = integer("n_neighbors", n_neighbors, 1)
    if ordered and len(template) != len(reference):
        raise ValueError(
            f"template and reference must have as many points if they are ordered, got {len(template)} and {len(reference)}"
        )
    if not len(template) or n_neighbors > len(reference):
        raise ValueError(
            f"n_neighbors must be at most the points of reference, got {n_neighbors} for {len(template)} and {len(reference)} points"
        )
    apart = torch.cdist(reference, template) if ordered else torch.cdist(template, reference)
    nearest = apart.topk(n_neighbors, 1, largest=False).indices
    near = reference[nearest]  # P, neighbours, 2
    own = template[:, None].expand_as(near)
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).to(near)
    turns = torch.stack([sign * turn for sign in (1, -1) for turn in (torch.eye(2).to(near), quarter)])
    basis = (
        torch.tensor(ANGLE_SCALES, dtype=near.dtype, device=near.device)[None, :, None, None] * turns[:, None]
    ).flatten(0, 1)
    turned = torch.einsum("qij,pkj->qpki", basis, near)
    phi = torch.cat([own[None], -turned]).flatten(1)
    return phi @ phi.T


def _graph(couplings: Any, n_bits: int) -> Tensor:
    """Return which couplings there may be, as 0 and 1."""
    if isinstance(couplings, str) and couplings in ("full", "diagonal"):
        return torch.ones(n_bits, n_bits) if couplings == "full" else torch.eye(n_bits)
    if not isinstance(couplings, Tensor):
        raise ValueError(f"couplings must be 'full', 'diagonal' or a bool tensor, got {couplings!r}")
    if couplings.dtype != torch.bool:
        raise ValueError(f"couplings must be bool, True where there may be one, got {couplings.dtype}")
    has_shape("couplings", couplings, (n_bits, n_bits))
    if not torch.equal(couplings, couplings.T):
        raise ValueError("couplings must be symmetric: a pair is one coupling")
    return couplings.detach().clone().float()
