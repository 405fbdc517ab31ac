"""QuAnt: learnt couplings between bits against learnt linear terms, and what an annealer makes of a QUBO."""

import math
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, bound, comparison
from posterity.combinatorial import (
    QuAntLoss,
    QUBONet,
    from_bits,
    ground_states,
    qubo_energy,
    registration_features,
    to_bits,
)
from posterity.lab.data import QUBO, Images, Matchings, load_images, load_matchings, load_qubo
from posterity.lab.nets import mlp, seeded

BATCH, SPARSITY = 64, 1e-3
BITS = 9  # of an angle
LEAST_POINTS = 4  # of an image, to be turned
MOST = 20  # bits of which all states are tried


@comparison(
    paper="quant",
    says="Learnt couplings between the bits solve what learnt linear terms cannot.",
    where="Section 4.1, graph matching",
    arms=("diagonal", "QuAnt"),
    metric="share of permutations found exactly",
    better="higher",
    smallest={"epochs": 1, "width": 8},
)
def matching(
    trial: Trial, data: Matchings = "random", epochs: Count = 15, width: Count = 78, lr: Positive = 1e-3
) -> dict[str, float]:
    """Find which node of one graph is which of another from how much each pair of matches changes a length.

    Both networks see the same instances in the same order, with the same rate, and differ in their last layer alone: one
    writes all couplings, the other those of a bit with itself, whose lowest state is found bit by bit. One of seven
    pairs is for the test. Recorded: a network as wide and deep that says the bits directly, by cross-entropy, which is nearly as good.
    """
    pairs = load_matchings(data, seed=trial.seed)
    n, k = pairs.permutations.shape
    order = np.random.default_rng(trial.seed).permutation(n)
    train, test = order[: n - math.ceil(n / 7)], order[n - math.ceil(n / 7) :]
    x = _standard(pairs.features, train)
    bits = to_bits(torch.from_numpy(pairs.permutations), math.ceil(math.log2(k))).flatten(1)
    found = _found(trial, x[train], bits[train], x[test], epochs=epochs, width=width, lr=lr, deep=True)
    shares = {name: float((answer == bits[test]).all(1).float().mean()) for name, answer in found.items()}
    trial.record("share found by saying the bits directly", shares.pop("direct"))
    return shares


def _enough_points(data: Any = None, **_: Any) -> None:
    if data is None:
        return
    n = sum(len(cloud) >= LEAST_POINTS for cloud in _clouds(data.x))
    if n < 10:
        raise ValueError(f"at least 10 images with {LEAST_POINTS} bright pixels or more are needed, has {n}")


@comparison(
    paper="quant",
    says="Learnt couplings turn real shapes onto each other more exactly than learnt linear terms.",
    where="Section 4.2, point set registration",
    arms=("diagonal", "QuAnt"),
    metric="mean error of the angle, degrees",
    better="lower",
    check=_enough_points,
    smallest={"pairs": 64, "epochs": 1, "width": 8, "test_pairs": 32},
)
def registration(
    trial: Trial,
    data: Images = "digits",
    pairs: Count = 4000,
    test_pairs: Count = 500,
    epochs: Count = 80,
    width: Count = 78,
    lr: Positive = 2e-4,
    degrees: Annotated[float, Between(1.0, 180.0)] = 90.0,
    ordered: bool = True,
) -> dict[str, float]:
    """Find by what angle, from 0 to 90 degrees, the bright pixels of an image were turned.

    A pixel above 7/16 of the brightest of its image is a point; points have mean 0 and deviation 1. Images of the test are
    in no pair of the training. The rate suits the full couplings, which smaller and larger ones serve worse (at 1e-3 they end
    worse than the diagonal: the loss is also 0 for couplings that are 0); the diagonal is as good at 1e-3 and 3e-4. The angle has nine bits. Point i of both clouds is the same, as the published features
    take it; with ``ordered=False``, where nothing is known of that, the couplings have no advantage at this size, nor has
    any of the three networks learned much: an error of 16 to 22 degrees, of 22.5 by chance.
    """
    clouds = [cloud for cloud in _clouds(load_images(data).x) if len(cloud) >= LEAST_POINTS]
    rng = np.random.default_rng(trial.seed)
    order = rng.permutation(len(clouds))
    unseen = order[: max(1, len(clouds) // 4)]
    x_train, angle_train = _turned(clouds, rng.choice(order[len(unseen) :], pairs), degrees, ordered, rng)
    x_test, angle = _turned(clouds, rng.choice(unseen, test_pairs), degrees, ordered, rng)
    scale = np.arange(pairs)
    x = _standard(np.concatenate([x_train, x_test]), scale)
    bins = (angle_train / degrees * 2**BITS).long().clamp(max=2**BITS - 1)
    found = _found(
        trial, x[:pairs], to_bits(bins, BITS), x[pairs:], epochs=epochs, width=width, lr=lr, deep=False
    )
    errors = {
        name: float(((from_bits(answer) + 0.5) * degrees / 2**BITS - angle).abs().mean())
        for name, answer in found.items()
    }
    trial.record("error of saying the bits directly, degrees", errors.pop("direct"))
    return errors


def _few_bits(data: Any = None, **_: Any) -> None:
    if data is not None and len(data.matrix) > MOST:
        raise ValueError(
            f"at most {MOST} bits, of which all states are tried to know the least, has {len(data.matrix)}"
        )


@bound(
    paper="quant",
    says="A classical annealer finds the lowest state of a QUBO of a few bits.",
    where="Section 5, simulated annealing in the place of the device",
    metric="energy above the least, over that of a random state",
    limit=0.01,
    check=_few_bits,
    smallest={"num_reads": 2},
)
def annealing(trial: Trial, data: QUBO = "spin-glass", num_reads: Count = 50) -> float:
    """Ask a classical annealer for the lowest state of a QUBO, and all states for the truth.

    A matrix or a graph of the user's own (``.npz``) says whether the annealer can be trusted with it. The energy of the
    best of ``num_reads`` runs above the least is divided by that of a random state, on average, above the least.
    Recorded: the gap between the two lowest states, in the same unit, which tells how hard it is.
    """
    matrix = torch.from_numpy(load_qubo(data, seed=trial.seed).matrix)[None]
    lowest = ground_states(matrix, 2)
    drawn = ground_states(
        matrix, 1, solver="anneal", num_reads=num_reads, generator=torch.Generator().manual_seed(trial.seed)
    )
    least, second = lowest.energy[0].tolist()
    states = torch.randint(
        2, (1, 4096, matrix.shape[1]), generator=torch.Generator().manual_seed(trial.seed + 1)
    )
    spread = float(qubo_energy(matrix, states).mean()) - least
    trial.record("gap between the two lowest states", (second - least) / spread if spread else 0.0)
    return (float(drawn.energy[0, 0]) - least) / spread if spread else 0.0


def _found(
    trial: Trial, x: Tensor, bits: Tensor, x_test: Tensor, *, epochs: int, width: int, lr: float, deep: bool
) -> dict[str, Tensor]:
    """Return the bits that each of three networks finds for the test."""
    answers = {}
    for name in ("diagonal", "QuAnt"):
        couplings = "diagonal" if name == "diagonal" else "full"
        with seeded(trial.seed):
            net = QUBONet(x.shape[1], bits.shape[1], width=width, deep=deep, couplings=couplings)
        loss_fn = QuAntLoss()

        def objective(x: Tensor, bits: Tensor, net: QUBONet = net, loss_fn: QuAntLoss = loss_fn) -> Tensor:
            written, activity = net(x, return_activity=True)
            return loss_fn(written, bits) + SPARSITY * activity

        _train(trial.seed, net, objective, x, bits, epochs, lr)
        with torch.no_grad():
            answers[name] = torch.cat(
                [ground_states(net(part), 1).x[:, 0].long() for part in x_test.split(256)]
            )
    net = mlp(x.shape[1], bits.shape[1], width=width, depth=4 if deep else 2, seed=trial.seed)
    _train(
        trial.seed,
        net,
        lambda x, bits: F.binary_cross_entropy_with_logits(net(x), bits.float()),
        x,
        bits,
        epochs,
        lr,
    )
    with torch.no_grad():
        answers["direct"] = (net(x_test) > 0).long()
    return answers


def _train(
    seed: int, net: nn.Module, objective: Any, x: Tensor, bits: Tensor, epochs: int, lr: float
) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    n_batches = math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * n_batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            objective(x[rows], bits[rows]).backward()
            optimizer.step()
            schedule.step()


def _standard(features: ndarray, train: ndarray) -> Tensor:
    """Return features with mean 0 and deviation 1 over the training part, where they vary."""
    deviation = features[train].std(0)
    scaled = (features - features[train].mean(0)) / np.where(deviation > 0, deviation, 1)
    return torch.from_numpy(scaled.astype(np.float32))


def _clouds(x: ndarray) -> list[ndarray]:
    """Return the bright pixels of images as points with mean 0 and deviation 1."""
    clouds = []
    for image in np.asarray(x, dtype=np.float64).mean(1):
        image = image - image.min()
        points = np.argwhere(image > 7 / 16 * image.max()).astype(np.float32) if image.max() else []
        if len(points):
            points = points - points.mean(0)
            points = points / max(float(points.std()), 1e-6)
        clouds.append(points)
    return clouds


def _turned(
    clouds: list[ndarray], chosen: ndarray, degrees: float, ordered: bool, rng: np.random.Generator
) -> tuple[ndarray, Tensor]:
    """Return features of clouds and themselves turned, and the angles in degrees."""
    angles = torch.from_numpy(rng.uniform(0, degrees, len(chosen)))
    radians = torch.deg2rad(angles).float()
    turns = torch.stack([radians.cos(), -radians.sin(), radians.sin(), radians.cos()], 1).view(-1, 2, 2)
    features = []
    for which, turn in zip(chosen, turns, strict=True):
        template = torch.from_numpy(clouds[which])
        reference = template @ turn.T
        near = min(3, len(template))
        features.append(
            registration_features(template, reference, n_neighbors=near, ordered=ordered).flatten()
        )
    return torch.stack(features).numpy(), angles
