"""Race the greedy choice with a solve for each candidate, and the kernel's gradient with autograd by pairs.

Run from the repository root: ``python -m benchmarks.robustness.ntba``.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.timing import race
from posterity.robustness import greedy_poisons, relu_ntk
from posterity.robustness.tangent_kernel import Tangent


def by_solves(
    k_dd: Tensor, k_da: Tensor, y_d: Tensor, k_pd: Tensor, k_pa: Tensor, k_pp: Tensor, y_p: Tensor,
    n_poisons: int, ridge: float,
) -> Tensor:  # fmt: skip
    """Choose poisons one by one: a new system for each candidate."""
    chosen: list[int] = []
    for _ in range(n_poisons):
        costs = []
        for j in range(len(k_pp)):
            rows = [*chosen, j]
            k = torch.cat(
                [torch.cat([k_dd, k_pd[rows].T], 1), torch.cat([k_pd[rows], k_pp[rows][:, rows]], 1)]
            )
            k.diagonal().add_(ridge)
            beta = torch.linalg.solve(k, torch.cat([y_d, y_p[rows]]))
            f = beta @ torch.cat([k_da, k_pa[rows]])
            costs.append(torch.inf if j in chosen else float((f - 1).clamp_max(0).square().sum()))
        chosen.append(costs.index(min(costs)))
    return torch.tensor(chosen)


def by_pairs(net: nn.Module, p: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient at p of the weighted kernel, by autograd through every entry."""
    theta = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}

    def gradients(point: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            functional_call(net, theta, (point[None],)).sum(), tuple(theta.values()), create_graph=True
        )

    total = torch.zeros((), dtype=p.dtype)
    leaf = p.clone().requires_grad_()
    for i in range(len(p)):
        for j in range(len(x)):
            pairs = zip(gradients(leaf[i]), gradients(x[j]), strict=True)
            total = total + weights[i, j] * sum((a * b).sum() for a, b in pairs)
    return torch.autograd.grad(total, leaf)[0]


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    n, candidates = 1000, 200
    d, p, a = draw(n, 64), draw(candidates, 64), draw(20, 64)
    y = draw(n).sign()
    given = (
        relu_ntk(d, d),
        relu_ntk(d, a),
        y,
        relu_ntk(p, d),
        relu_ntk(p, a),
        relu_ntk(p, p),
        torch.ones(candidates).double(),
    )
    torch.testing.assert_close(by_solves(*given, 2, ridge=0.1), greedy_poisons(*given, 2, ridge=0.1))
    race(
        f"greedy choice of 2 among {candidates}, n = {n}, against a solve each",
        lambda: greedy_poisons(*given, 2, ridge=0.1),
        lambda: by_solves(*given, 2, ridge=0.1),
        target=100, rounds=1,
    )  # fmt: skip

    n, poisons = 500, 10
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1)).double()
    x, p, weights = draw(n, 1, 8, 8), draw(poisons, 1, 8, 8), draw(poisons, n)
    tangent = Tangent(net, torch.float64)
    kept = tangent.keep(x)

    def ours() -> Tensor:
        leaf = p.clone().requires_grad_()
        return torch.autograd.grad((weights * tangent(leaf, kept)).sum(), leaf)[0]

    torch.testing.assert_close(by_pairs(net, p[:2], x[:20], weights[:2, :20]), _part(tangent, p, x, weights))
    race(
        f"gradient of {poisons} poisons through the tangent kernel, n = {n}, against autograd by pairs",
        ours, lambda: by_pairs(net, p, x, weights), target=10, rounds=1,
    )  # fmt: skip
    batched = _by_jacobians(net, p, x, weights)
    torch.testing.assert_close(batched, ours())
    race(
        "the same, against autograd through all gradients at once",
        ours, lambda: _by_jacobians(net, p, x, weights), target=1, rounds=5,
    )  # fmt: skip


def _part(tangent: Tangent, p: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    leaf = p[:2].clone().requires_grad_()
    return torch.autograd.grad((weights[:2, :20] * tangent(leaf, x[:20])).sum(), leaf)[0]


def _by_jacobians(net: nn.Module, p: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient as autograd gives it through torch.func's kernel of whole Jacobians."""
    theta = {name: value.detach() for name, value in net.named_parameters()}

    def jacobian(points: Tensor) -> Tensor:
        one = torch.func.grad(lambda theta, point: functional_call(net, theta, (point[None],)).reshape(()))
        return torch.cat([v.flatten(1) for v in torch.func.vmap(one, (None, 0))(theta, points).values()], 1)

    leaf = p.clone().requires_grad_()
    return torch.autograd.grad((weights * (jacobian(leaf) @ jacobian(x).T)).sum(), leaf)[0]


if __name__ == "__main__":
    main()
