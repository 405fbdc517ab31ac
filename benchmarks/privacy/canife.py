"""Race updates of all clients with a loop over them, test rounds by projections with whole sums, and time crafting.

Run from the repository root: ``python -m benchmarks.privacy.canife``.
"""

import copy
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.nets import mlp
from posterity.privacy import audit_round, client_updates, craft_canary


def one_by_one(model: nn.Module, clients: list[tuple[Tensor, Tensor]], clip: float = 1.0) -> Tensor:
    """Return the updates as a federation's program makes them: a copy, an optimiser and a step a client."""
    sent = []
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for x, y in clients:
        local = copy.deepcopy(model)
        sgd = torch.optim.SGD(local.parameters(), lr=1.0)
        F.cross_entropy(local(x), y).backward()
        sgd.step()
        way = before - torch.cat([p.detach().flatten() for p in local.parameters()])
        sent.append(way * min(1.0, clip / float(way.norm())))
    return torch.stack(sent)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, 8, 64, generator=generator), torch.randint(10, (200, 8), generator=generator)
    clients = list(zip(x, y, strict=True))
    net = mlp(64, 10, width=64, depth=1)
    updates = client_updates(net, clients)
    torch.testing.assert_close(updates, one_by_one(net, clients), rtol=1e-4, atol=1e-5)
    race("updates of 200 clients of 8 rows, against a loop",
         lambda: client_updates(net, clients), lambda: one_by_one(net, clients), target=20, rounds=7)  # fmt: skip

    start, label = torch.rand(1, 64, generator=generator), torch.tensor([3])
    began = time.perf_counter()
    canary = craft_canary(net, updates[:60], start, label, n_steps=400, lr=0.05)
    print(f"400 steps of crafting, 4.8k parameters: {time.perf_counter() - began:.2f} s (target under 3 s)")

    def rounds(sent: Tensor, canary_grad: Tensor, exact: bool, n_tests: int = 100):
        return lambda: audit_round(
            sent,
            canary_grad,
            clip=1.0,
            noise_multiplier=0.3,
            clients_per_round=50,
            n_tests=n_tests,
            exact=exact,
        )

    race("100 rounds of 50 of 140 clients, 4.8k parameters, against whole sums",
         rounds(updates[60:], canary.grad, False), rounds(updates[60:], canary.grad, True), target=5, rounds=7)  # fmt: skip
    wide = F.normalize(torch.randn(200, 100_000, generator=generator))
    g = torch.randn(100_000, generator=generator)
    race("1000 rounds of 50 of 200 clients, 100k parameters, against whole sums",
         rounds(wide, g, False, 1000), rounds(wide, g, True, 1000), target=100, rounds=2)  # fmt: skip
    race("100 rounds of them",
         rounds(wide, g, False), rounds(wide, g, True), target=20, rounds=3)  # fmt: skip


if __name__ == "__main__":
    main()
