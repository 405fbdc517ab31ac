"""Race a landscape with a loop over copies and with the official way, and a held norm with a free one.

Run from the repository root: ``python -m benchmarks.dynamics.omnigrok``.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.timing import race
from posterity.dynamics import constrain_norm, reduced_landscape

ALPHAS = torch.logspace(-1, 1, 11).tolist()
STEPS = 40


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def norm_of(net: nn.Module) -> Tensor:
    return torch.sqrt(sum((p.detach() ** 2).sum() for p in net.parameters()))  # type: ignore[arg-type]


def walk(net: nn.Module, alpha: float, batches, loss_fn) -> nn.Module:
    """Train a copy at one norm, as it is usually written."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(alpha)
    norm = norm_of(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(net(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            now = norm_of(net)
            for p in net.parameters():
                p.mul_(norm / now)
    return net


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = mlp(64, 100, 100, 10)
    x, y = torch.rand(200, 64), torch.randint(10, (200,))
    hot = F.one_hot(y, 10).float()

    for size, target in ((32, 4), (200, 4)):

        def ours(size=size) -> object:
            return reduced_landscape(net, x, hot, x, hot, alphas=ALPHAS, n_steps=STEPS, batch_size=size)

        def loop(size=size) -> object:
            rows = [torch.randperm(200)[:size] for _ in range(STEPS)]
            return [walk(net, alpha, ((x[k], hot[k]) for k in rows), F.mse_loss) for alpha in ALPHAS]

        race(
            f"a landscape of 11 norms, batches of {size}, against a loop over copies",
            ours,
            loop,
            target=target,
            rounds=7,
        )

    x_test, y_test = torch.rand(1_500, 64), torch.randint(10, (1_500,))

    def official() -> object:
        """One network after the other, loaders of batches of 100, both losses and accuracies every 50 steps."""
        sets = TensorDataset(x, y), TensorDataset(x_test, y_test)
        loaders = [DataLoader(each, batch_size=100, shuffle=True) for each in sets]
        nets = []
        for alpha in ALPHAS:
            endless = (batch for _ in range(50) for batch in loaders[0])
            one_hot = ((a, F.one_hot(b, 10).float()) for a, b in endless)
            made = walk(net, alpha, (next(one_hot) for _ in range(50)), F.mse_loss)
            for loader in (*loaders, *loaders):  # before and after
                for a, b in loader:
                    with torch.no_grad():
                        out = made(a)
                        F.mse_loss(out, F.one_hot(b, 10).float()).item()
                        (out.argmax(1) == b).sum().item()
            nets.append(made)
        return nets

    hot_test = F.one_hot(y_test, 10).float()
    race("a landscape of 11 norms, batches of 100, evaluations too, against loops over a DataLoader",
         lambda: reduced_landscape(
             net, x, hot, x_test, hot_test, alphas=ALPHAS, n_steps=50, batch_size=100, select="best",
             metric=lambda out, y: (out.argmax(1) == y.argmax(1)).float().mean(),
         ), official, target=10, rounds=5)  # fmt: skip

    x, y = torch.rand(200, 64), torch.randint(10, (200,))  # the batch of the official MNIST run
    steps = []
    for held in (True, False):
        wide = mlp(64, 300, 250, 10)  # 97,260 parameters
        optimizer = torch.optim.Adam(wide.parameters(), lr=1e-3)
        if held:
            constrain_norm(optimizer)

        def step(wide=wide, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(wide(x), y).backward()
            optimizer.step()

        steps.append(step)
    race(
        "a step of Adam with the norm held, 97,260 parameters, against one without",
        *steps,
        target=1 / 1.1,
        rounds=101,
    )


if __name__ == "__main__":
    main()
