"""Lowest states by halves against whole matrices of states and dimod's exact solver; a training step against a direct one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity._checks import needs
from posterity.combinatorial import QuAntLoss, QUBONet, ground_states, to_bits


def by_whole_products(couplings: Tensor) -> Tensor:
    """Return the lowest energies from products of all states with all states, of which the diagonal is taken."""
    n = couplings.shape[-1]
    states = to_bits(torch.arange(2**n), n).to(couplings)
    energy = torch.stack([(states @ a @ states.T).diagonal() for a in couplings])
    return energy.topk(2, dim=1, largest=False).values


def drawn(batch: int, n: int) -> Tensor:
    a = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0))
    return (a + a.mT) / 2


def main() -> None:
    nine = drawn(64, 9)
    torch.testing.assert_close(ground_states(nine, 2).energy, by_whole_products(nine), rtol=1e-4, atol=1e-4)
    race(
        "two lowest states of 9 bits, batch of 64, against products of all states with all",
        lambda: ground_states(nine, 2), lambda: by_whole_products(nine), target=20, rounds=7,
        why="At nine bits some thirty small calls and checks cost more than the sums; at sixteen they do not.",
    )  # fmt: skip

    dimod = needs("dimod", "combinatorial")
    sixteen = drawn(1, 16)
    model = dimod.BinaryQuadraticModel(
        sixteen[0].diagonal().numpy(), 2 * sixteen[0].triu(1).numpy(), 0.0, "BINARY"
    )
    race(
        "two lowest states of 16 bits, against dimod.ExactSolver",
        lambda: ground_states(sixteen, 2), lambda: dimod.ExactSolver().sample(model), target=20, rounds=3,
    )  # fmt: skip

    torch.manual_seed(0)
    x, bits = torch.randn(64, 256), torch.randint(2, (64, 8))
    net, direct, loss_fn = QUBONet(256, 8), QUBONet(256, 8, couplings="diagonal"), QuAntLoss()

    def step() -> None:
        loss_fn(net(x), bits).backward()

    def direct_step() -> None:
        F.binary_cross_entropy_with_logits(direct(x).diagonal(dim1=1, dim2=2), bits.float()).backward()

    race(
        "a training step, against one that says the bits directly",
        step,
        direct_step,
        target=0.5,
        rounds=101,
        why="The two lowest of 256 states for each of 64 instances cost about what a direct step does.",
    )


if __name__ == "__main__":
    main()
