"""Claims about the identity through a solver: projected it trains where it else collapses, for few calls."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from posterity.claims import Count, Several, Trial, comparison
from posterity.lab import nets
from posterity.lab.data import Images, load_images, split
from posterity.optimization import CombinatorialLayer, grid_shortest_path

RATES = (1e-4, 1e-3, 1e-2, 3e-2)  # of Adam, of which each arm takes its best on validation grids
STRENGTHS = (1.0, 5.0, 20.0)
SOLVE: Any = grid_shortest_path()


def _cheapest(costs: ndarray) -> ndarray:
    """Return cheapest paths; noise, or the black box's step, may have left costs below 0."""
    return SOLVE(np.maximum(costs, 0))


class _Grids:
    """Grids of images, the cost of a cell being its label + 1, with their cheapest paths.

    Those to train on, to choose by and to test on are made of images of their own.
    """

    def __init__(self, trial: Trial, data: str, side: int, n_train: int, n_test: int) -> None:
        images = load_images(data)
        self.x = torch.from_numpy(images.x).flatten(1).to(trial.device)
        label, generator = torch.from_numpy(images.y), torch.Generator().manual_seed(trial.seed)
        self.cells, self.costs, self.paths = [], [], []
        parts = split(len(label), (0.65, 0.15, 0.2), trial.seed)
        for rows, n in zip(parts, (n_train, n_test // 4 + 1, n_test), strict=True):
            drawn = torch.randint(len(rows), (n, side, side), generator=generator)
            self.cells.append(torch.as_tensor(rows)[drawn])
            self.costs.append((label[self.cells[-1]] + 1).double())
            self.paths.append(SOLVE(self.costs[-1]))

    def costs_by(self, net: nn.Module, part: int, some: Any = slice(None)) -> Tensor:
        """Return the costs that a network sees in grids of a part."""
        cells = self.cells[part][some]
        return net(self.x[cells.flatten()]).view(cells.shape)

    @torch.no_grad()
    def optimal(self, net: nn.Module, part: int) -> float:
        """Return the share of grids whose path by the network is a cheapest one."""
        costs, path = self.costs[part], SOLVE(self.costs_by(net, part)).cpu()
        return float(
            ((costs * path).sum((1, 2)) < (costs * self.paths[part]).sum((1, 2)) + 0.5).double().mean()
        )


def _best(
    trial: Trial, grids: _Grids, steps: int, arms: Iterable[tuple[CombinatorialLayer, float]]
) -> tuple[float, float, CombinatorialLayer]:
    """Train a network with each layer and rate; return the best by validation: test share, rate, layer."""
    found = []
    for layer, lr in arms:
        net = (
            nets.mlp(grids.x.shape[1], 1, width=64, depth=1, seed=trial.seed)
            .append(nn.Softplus())
            .to(trial.device)
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        batches = torch.Generator().manual_seed(trial.seed)
        for _ in range(steps):
            some = torch.randint(len(grids.cells[0]), (32,), generator=batches)
            decision = layer(grids.costs_by(net, 0, some))
            loss = (decision - grids.paths[0][some].to(decision)).square().sum((1, 2)).mean()  # Hamming
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append((grids.optimal(net, 1), grids.optimal(net, 2), lr, layer))
    return max(found, key=lambda each: each[0])[1:]


@comparison(
    paper="identity-projection",
    says="Projection is what makes the identity work: without it the costs collapse.",
    where="Sahoo et al., Section 4",
    arms=("identity", "identity + projection"),
    metric="share of test grids whose predicted path is a cheapest one",
    better="higher",
    smallest={"steps": 2, "n_train": 40, "n_test": 40},
)
def projection(
    trial: Trial,
    data: Images = "digits",
    side: Several = 6,
    n_train: Count = 400,
    n_test: Count = 1_000,
    steps: Count = 200,
) -> dict[str, float]:
    """Learn what images cost from the cheapest paths through grids of them.

    The cost of a cell is the label of its image, from 1; the network sees the images and the
    cells of the cheapest path. It has one hidden layer and its costs are positive; the loss is
    the Hamming distance of the paths. The arms share grids, initial weights, batches and
    steps, and each takes the best of four learning rates on grids kept apart. Without
    projection that is the smallest, at which the network is still about as it began. The
    records have the rates, and what margin noise does in place of projection.
    """
    grids = _Grids(trial, data, side, n_train, n_test)
    share = {}
    settings: dict[str, dict[str, Any]] = {
        "identity": {},
        "identity + projection": {"projection": "norm"},
        "identity + margin": {"noise": 0.5},
    }
    for arm, options in settings.items():
        layer = CombinatorialLayer(_cheapest, **options)
        with nets.seeded(trial.seed):  # the margin draws
            share[arm], lr, _ = _best(trial, grids, steps, ((layer, lr) for lr in RATES))
        trial.record(f"learning rate, {arm}", lr)
    trial.record("share, identity + margin", share.pop("identity + margin"))
    return share


@comparison(
    paper="identity-projection",
    says="For the same number of solver calls the identity learns more than black-box differentiation.",
    where="Sahoo et al., Section 5",
    arms=("blackbox + projection", "identity + projection"),
    metric="share of test grids whose predicted path is a cheapest one",
    better="higher",
    smallest={"calls": 2, "n_train": 40, "n_test": 40},
)
def per_solver_call(
    trial: Trial,
    data: Images = "digits",
    side: Several = 6,
    n_train: Count = 400,
    n_test: Count = 1_000,
    calls: Several = 60,
) -> dict[str, float]:
    """Spend so many calls of the solver, on a batch each, on training by either gradient.

    The identity takes a step a call; black-box differentiation solves again on the way back
    and takes half as many. Task, network and loss are those of ``projection``, and both project.
    Each arm takes the best of four learning rates on validation grids, and the black box also
    that of three strengths, so it is run three times as often. With calls in plenty
    (``calls=600``) both reach the same, and what is left is that the identity has no strength.
    """
    grids = _Grids(trial, data, side, n_train, n_test)

    def layers(**options: Any) -> list[tuple[CombinatorialLayer, float]]:
        return [(CombinatorialLayer(_cheapest, projection="norm", **options), lr) for lr in RATES]

    rivals = [each for strength in STRENGTHS for each in layers(gradient="blackbox", strength=strength)]
    blackbox, rate, layer = _best(trial, grids, calls // 2, rivals)
    identity, other, _ = _best(trial, grids, calls, layers())
    trial.record("learning rate, blackbox + projection", rate)
    trial.record("strength of the black box", layer.strength)
    trial.record("learning rate, identity + projection", other)
    return {"blackbox + projection": blackbox, "identity + projection": identity}
