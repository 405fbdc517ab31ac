"""The lowest states of a QUBO: which bits make a quadratic form least.

``E(x) = x^T A x`` over x in {0, 1}^n, A symmetric: its diagonal is the linear part, since ``x_i^2 = x_i``, and a pair
contributes ``2 A_ij``. All ``2^n`` energies are one matrix product: with the bits cut into halves u and v,

    E = u^T A_uu u + v^T A_vv v + 2 u^T A_uv v = [2 A_uv^T u, E_u, 1] . [v, 1, E_v],

which costs n / 2 + 2 multiplications a state. Above twenty bits an annealer looks for them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import finite, floating, integer, needs
from posterity._precision import rounding, wide, widened
from posterity._random import seed_from

__all__ = ["GroundStates", "from_bits", "ground_states", "qubo_energy", "to_bits"]

MOST_BITS = 20  # of which all states are tried
STATES = 2**14  # at a time
SYMMETRIC = 1e-5  # relative difference of A_ij and A_ji
FEW = 8  # lowest states that are found one after the other


class GroundStates(NamedTuple):
    """The lowest states of each QUBO of a batch.

    Attributes
    ----------
    x : Tensor of shape (batch, k, n)
        Bits, 0 or 1, in the dtype of the couplings, lowest energy first; of equal ones the smaller integer.
    energy : Tensor of shape (batch, k)
    """

    x: Tensor
    energy: Tensor


@widened
def qubo_energy(couplings: Float[Tensor, "batch n n"], x: Tensor) -> Tensor:
    """Return the energies ``x^T A x`` of states, with gradients to the couplings.

    Parameters
    ----------
    couplings : Tensor of shape (batch, n, n)
        Symmetric or not.
    x : Tensor of shape (batch, n) or (batch, states, n)
        Bits of any dtype.

    Returns
    -------
    Tensor of shape (batch,) or (batch, states)
        In the dtype of the couplings.

    Examples
    --------
    >>> A = torch.tensor([[[-1.0, 2.0], [2.0, -1.0]]])
    >>> qubo_energy(A, torch.tensor([[[0, 0], [1, 0], [1, 1]]]))
    tensor([[ 0., -1.,  2.]])
    """
    _square(couplings)
    if x.ndim not in (2, 3) or (len(x), x.shape[-1]) != (len(couplings), couplings.shape[-1]):
        raise ValueError(
            f"x must be (batch, n) or (batch, states, n) for couplings {tuple(couplings.shape)}, got {tuple(x.shape)}"
        )
    states = x.to(couplings) if x.ndim == 3 else x.to(couplings)[:, None]
    energy = ((states @ couplings) * states).sum(-1)
    return energy if x.ndim == 3 else energy[:, 0]


@torch.no_grad()
def ground_states(
    couplings: Float[Tensor, "batch n n"],
    k: int = 2,
    *,
    solver: Literal["exhaustive", "anneal"] | Callable[..., Any] = "exhaustive",
    num_reads: int = 50,
    generator: torch.Generator | None = None,
) -> GroundStates:
    """Return the k lowest states of each QUBO, without gradients.

    Parameters
    ----------
    couplings : Tensor of shape (batch, n, n)
        Symmetric.
    k : int, default=2
        At most ``2**n``.
    solver : {"exhaustive", "anneal"} or callable, default="exhaustive"
        Trying all states, for up to 20 bits; simulated annealing by dwave-samplers, which may miss the lowest; or
        ``solver(couplings, k)``, which returns different states (batch, k, n) and anything, such as the energies of
        a quantum device. The energies of whatever comes back are computed here, and its states sorted by them.
    num_reads : int, default=50
        Runs of the annealer, of each QUBO. Where they end in fewer than k different states, the best is taken again
        with those bits flipped that cost least.
    generator : torch.Generator, optional
        Of the annealer; by default torch's global one.

    Returns
    -------
    GroundStates
        States and energies in the dtype of the couplings.

    Raises
    ------
    ValueError
        For couplings that are not square, symmetric, finite and floating, more than 20 bits to try, k above the number
        of states, or a solver that returns something else than k different states.

    Examples
    --------
    >>> found = ground_states(torch.tensor([[[-1.0, 2.0], [2.0, -1.5]]]), k=3)
    >>> found.x
    tensor([[[0., 1.],
             [1., 0.],
             [0., 0.]]])
    >>> found.energy
    tensor([[-1.5000, -1.0000,  0.0000]])
    """
    check_couplings(couplings)
    n = couplings.shape[-1]
    k, num_reads = integer("k", k, 1), integer("num_reads", num_reads, 1)
    if n < 63 and k > 2**n:
        raise ValueError(f"k must be at most {2**n}, the number of states of {n} bits, got {k}")
    if solver == "exhaustive" and n > MOST_BITS:
        raise ValueError(
            f'{n} bits have too many states to try them all, at most {MOST_BITS} have not: solver="anneal"'
        )
    if not callable(solver) and solver not in ("exhaustive", "anneal"):
        raise ValueError(f"solver must be 'exhaustive', 'anneal' or a function, got {solver!r}")
    exact = wide(couplings)
    with torch.autocast(couplings.device.type, enabled=False):
        if callable(solver):
            x = _solved(solver, couplings, k)
        elif solver == "anneal":
            x = _annealed(exact, k, num_reads, generator)
        else:
            which, energy = _lowest(exact, k)
            return GroundStates(to_bits(which, n).to(couplings), energy.to(couplings))
        energy = qubo_energy(exact, x)
        order = energy.argsort(dim=1, stable=True)
        x, energy = x.gather(1, order[..., None].expand_as(x)), energy.gather(1, order)
    return GroundStates(x.to(couplings), energy.to(couplings))


def to_bits(values: Int[Tensor, " *shape"], n_bits: int) -> Int[Tensor, "*shape bits"]:
    """Return the bits of integers, the most significant first.

    Parameters
    ----------
    values : Tensor of shape (...), integers
        From 0 to ``2**n_bits - 1``.
    n_bits : int
        At most 62.

    Returns
    -------
    Tensor of shape (..., n_bits), int64
        0 and 1.

    Examples
    --------
    >>> to_bits(torch.tensor([1, 6]), 3)
    tensor([[0, 0, 1],
            [1, 1, 0]])
    """
    n_bits = _width(n_bits)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"values must be integers, got {values.dtype}")
    values = values.long()
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < 2**n_bits):
        raise ValueError(
            f"values must be in 0..{2**n_bits - 1} for {n_bits} bits, got {int(values.min())} to {int(values.max())}"
        )
    return values[..., None] >> torch.arange(n_bits - 1, -1, -1, device=values.device) & 1


def from_bits(bits: Tensor) -> Tensor:
    """Return the integers of bits, the most significant first.

    Parameters
    ----------
    bits : Tensor of shape (..., n_bits)
        0 and 1 of any dtype.

    Returns
    -------
    Tensor of shape (...), int64
        From 0 to ``2**n_bits - 1``.

    Examples
    --------
    >>> from_bits(torch.tensor([[0, 0, 1], [1, 1, 0]]))
    tensor([1, 6])
    """
    if bits.ndim == 0:
        raise ValueError("bits must be (..., n_bits), got a number")
    n_bits = _width(bits.shape[-1])
    binary("bits", bits)
    return (bits.long() << torch.arange(n_bits - 1, -1, -1, device=bits.device)).sum(-1)


def check_couplings(couplings: Tensor) -> None:
    """Refuse couplings that are not square, symmetric, finite and floating."""
    _square(couplings)
    if not couplings.numel():
        return
    exact = wide(couplings)
    most, off = (
        exact.abs().amax((1, 2)),
        (exact - exact.mT).abs().amax((1, 2)),
    )  # NaN and infinity stay in the first
    if not (most < torch.inf).all():
        finite("couplings", couplings)
    if (off > rounding(couplings.dtype, SYMMETRIC) * most).any():
        raise ValueError(f"couplings must be symmetric, differ by {float(off.max()):.3g}: use (A + A.mT) / 2")


def binary(name: str, bits: Tensor) -> None:
    """Refuse what is not 0 or 1."""
    if not ((bits == 0) | (bits == 1)).all():
        raise ValueError(f"{name} must be 0 or 1")


def _square(couplings: Tensor) -> None:
    floating("couplings", couplings)
    if couplings.ndim != 3 or couplings.shape[1] != couplings.shape[2] or not couplings.shape[2]:
        raise ValueError(f"couplings must be (batch, n, n), got {tuple(couplings.shape)}")


def _width(n_bits: int) -> int:
    n_bits = integer("n_bits", n_bits, 1)
    if n_bits > 62:
        raise ValueError(f"n_bits must be at most 62, which an int64 holds, got {n_bits}")
    return n_bits


def _lowest(couplings: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k lowest states of all as integers (batch, k), and their energies: chunk by chunk, the best kept."""
    batch, n, _ = couplings.shape
    high = n // 2
    low_states = _states(n - high, couplings)
    high_states = _states(high, couplings)
    right = torch.cat(
        [
            low_states.expand(batch, -1, -1),
            low_states.new_ones(batch, len(low_states), 1),
            qubo_energy(couplings[:, high:, high:], low_states.expand(batch, -1, -1))[..., None],
        ],
        2,
    ).mT
    rows = max(1, min(STATES, 2**n) // len(low_states))
    best, which = couplings.new_empty(0), couplings.new_empty(0)
    for at in range(0, len(high_states), rows):
        u = high_states[at : at + rows].expand(batch, -1, -1)
        mixed = 2 * u @ couplings[:, :high, high:]
        own = ((u @ couplings[:, :high, :high]) * u).sum(2, keepdim=True)
        energy = (torch.cat([mixed, own, torch.ones_like(own)], 2) @ right).flatten(1)
        least, places = _least(energy, k)
        if at:
            least, order = _least(torch.cat([best, least], 1), k)
            places = torch.cat([which, places + at * len(low_states)], 1).gather(1, order)
        best, which = least, places
    return which, best


def _least(energy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k least of each row and their places; of equal ones those that come first. Spends what it is given."""
    k = min(k, energy.shape[1])
    if k > FEW:
        least, order = energy.sort(dim=1, stable=True)
        return least[:, :k], order[:, :k]
    least, places = [], []
    for _ in range(k):
        places.append(energy.argmin(1, keepdim=True))  # the first of the least
        least.append(energy.gather(1, places[-1]))
        energy.scatter_(1, places[-1], torch.inf)
    return torch.cat(least, 1), torch.cat(places, 1)


@cache
def _table(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (
        to_bits(torch.arange(2**n, device=device), n).to(dtype) if n else torch.zeros(1, 0).to(device, dtype)
    )


def _states(n: int, like: Tensor) -> Tensor:
    return _table(n, like.dtype, like.device)


def _solved(solver: Callable[..., Any], couplings: Tensor, k: int) -> Tensor:
    answer = solver(couplings, k)
    x = torch.as_tensor(
        answer[0] if isinstance(answer, tuple) and answer else answer, device=couplings.device
    )
    want = (len(couplings), k, couplings.shape[-1])
    if x.shape != want:
        raise ValueError(f"solver must return states {want}, got {tuple(x.shape)}")
    binary("the states of solver", x)
    same = (x[:, :, None] == x[:, None]).all(-1)
    if (same.sum((1, 2)) > k).any():
        raise ValueError("solver must return different states, returned one twice")
    return x.to(wide(couplings))


def _annealed(couplings: Tensor, k: int, num_reads: int, generator: torch.Generator | None) -> Tensor:
    """Return k different states of each by simulated annealing on a classical machine."""
    dimod, samplers = needs("dimod", "combinatorial"), needs("dwave.samplers", "combinatorial")
    sampler, found = samplers.SimulatedAnnealingSampler(), []
    n = couplings.shape[-1]
    for matrix in couplings.double().cpu():
        quadratic = (2 * matrix.triu(1)).numpy()
        model = dimod.BinaryQuadraticModel(matrix.diagonal().numpy(), quadratic, 0.0, "BINARY")
        drawn = sampler.sample(model, num_reads=num_reads, seed=seed_from(generator))
        states = torch.as_tensor(drawn.record.sample)[:, torch.as_tensor(list(drawn.variables)).argsort()]
        states = torch.unique(states, dim=0).to(matrix)
        energy = qubo_energy(matrix[None], states[None])[0]
        states = states[energy.argsort(stable=True)]
        while len(states) < k:
            states = _with_flips(matrix, states)
        found.append(states[:k])
    return torch.stack(found).to(couplings) if found else couplings.new_zeros(0, k, n)


def _with_flips(matrix: Tensor, states: Tensor) -> Tensor:
    """Return states and a new one: the cheapest that differs in one bit from one of them, the best first."""
    for state in states:
        flipped = (state - torch.eye(len(state)).to(matrix)).abs()
        new = ~(flipped[:, None] == states).all(2).any(1)
        if new.any():
            energy = qubo_energy(matrix[None], flipped[None])[0].masked_fill(~new, torch.inf)
            return torch.cat([states, flipped[energy.argmin()][None]])
    raise AssertionError("all states are among them")  # k is at most their number
