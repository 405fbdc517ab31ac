"""A stacked ensemble against a loop over networks, and the kernel by layers against products of Jacobians."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.timing import race
from posterity.dynamics import NTKMLP, empirical_ntk, sphere_polynomial, train_ensemble

STEPS = 200


def make(seed: int) -> NTKMLP:
    return NTKMLP(6, 64, generator=torch.Generator().manual_seed(seed))


def one_by_one(x: Tensor, y: Tensor, x_test: Tensor, lr: float) -> Tensor:
    """Train eight networks in a loop, as one writes it, and return what they predict."""
    predictions = []
    for seed in range(8):
        net = make(seed)
        sgd = torch.optim.SGD(net.parameters(), lr=lr)
        with torch.no_grad():
            first, first_test = net(x), net(x_test)
        for _ in range(STEPS):
            loss = (net(x) - first - y).square().mean()
            if not loss.isfinite():
                raise RuntimeError
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        with torch.no_grad():
            predictions.append(net(x_test) - first_test)
    return torch.stack(predictions)


def by_jacobians(net: nn.Module, x: Tensor) -> Tensor:
    """Return the kernel as the tutorial of torch.func has it: Jacobians of all samples, then their products."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def one(p: dict[str, Tensor], point: Tensor) -> Tensor:
        return functional_call(net, p, (point[None],))[0]

    jacobian = vmap(jacrev(one), (None, 0))(params, x)
    parts = [j.flatten(2) for j in jacobian.values()]
    return torch.stack([torch.einsum("nap,map->nm", part, part) for part in parts]).sum(0)


def main() -> None:
    for n, target in ((20, 4), (80, 4)):
        x, y = sphere_polynomial(n + 500, 6, 2, generator=torch.Generator().manual_seed(0))
        data = x[:n], y[:n], x[n:]
        options = {"n_models": 8, "lr": 4.0, "n_steps": STEPS, "tol": 0.0}
        torch.testing.assert_close(
            train_ensemble(make, *data, **options).predictions,
            one_by_one(*data, lr=4.0),
            rtol=1e-2,
            atol=1e-3,
        )
        race(
            f"8 networks of width 64 on {n} points, {STEPS} steps, against a loop over them",
            lambda: train_ensemble(make, *data, **options),  # noqa: B023
            lambda: one_by_one(*data, lr=4.0),  # noqa: B023
            target=target, rounds=5,
        )  # fmt: skip
    net = NTKMLP(10, 256, generator=torch.Generator().manual_seed(0))
    x, _ = sphere_polynomial(500, 10, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(empirical_ntk(net, x), by_jacobians(net, x), rtol=1e-4, atol=1e-5)
    race(
        "kernel of 500 points, width 256, depth 3, by layers against vmap(jacrev)",
        lambda: empirical_ntk(net, x),
        lambda: by_jacobians(net, x),
        target=20, rounds=5,
    )  # fmt: skip


if __name__ == "__main__":
    main()
