"""The nuisance network against small layers one at a time; MRIV against econml, where that is installed."""

import importlib.util
import time

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.preprocessing import SplineTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.data import InstrumentedData, load_instrumented
from posterity.tabular import MRIV, MRIVNet, NuisanceNet


class Plain(nn.Module):
    """Two representations and seven heads, each a Sequential; losses one by one, as the official code has it."""

    def __init__(self, d: int) -> None:
        super().__init__()

        def layers(below: int, width: int, above: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(below, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, above)
            )  # fmt: skip

        self.inner = nn.ModuleList([layers(d, 10, 10) for _ in range(2)])
        self.heads = nn.ModuleList([layers(10, 30, 1) for _ in range(7)])

    def loss(self, x: Tensor, y: Tensor, a: Tensor, z: Tensor) -> Tensor:
        first, second = (net(x) for net in self.inner)
        pi, a1, a0, y1, y0, b1, b0 = (
            head(first if k < 3 else second)[:, 0] for k, head in enumerate(self.heads)
        )
        outcome = z * y1 + (1 - z) * y0
        taken = z * torch.sigmoid(a1) + (1 - z) * torch.sigmoid(a0)
        again = z * torch.sigmoid(b1) + (1 - z) * torch.sigmoid(b0)
        return (
            F.mse_loss(outcome, y) + F.binary_cross_entropy(taken, a) + F.binary_cross_entropy(again, a)
            + F.binary_cross_entropy(torch.sigmoid(pi), z)
        )  # fmt: skip


def epoch(net: nn.Module, data: tuple[Tensor, ...], **how: bool) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, **how)
    for rows in torch.randperm(len(data[0])).split(64):
        optimizer.zero_grad()
        net.loss(*(each[rows] for each in data)).backward()
        optimizer.step()


def against_econml(rows: InstrumentedData, n: int = 3_000) -> None:
    """Race MRIV with econml's doubly robust estimator of the same design, the same trees in both."""
    from econml.iv.dr import LinearIntentToTreatDRIV

    x, y, a, z = rows.X.to_numpy(), rows.outcome, rows.treatment, rows.instrument
    how = {"learning_rate": 0.05, "max_leaf_nodes": 8, "max_iter": 100, "min_samples_leaf": 50}
    splines = SplineTransformer(6, include_bias=False)

    def theirs() -> LinearIntentToTreatDRIV:
        peer = LinearIntentToTreatDRIV(
            model_y_xw=HistGradientBoostingRegressor(**how), model_t_xwz=HistGradientBoostingClassifier(**how),
            featurizer=splines, cv=3, random_state=0,
        )  # fmt: skip
        return peer.fit(y[:n], a[:n], Z=z[:n], X=x[:n], inference=None)

    def ours() -> MRIV:
        return MRIV(random_state=0).fit(x[:n], y[:n], treatment=a[:n], instrument=z[:n])

    race(
        f"MRIV on boosted trees, {n} rows, against econml's LinearIntentToTreatDRIV",
        ours,
        theirs,
        target=1,
        rounds=3,
    )
    for name, effect in (("MRIV", ours().predict(x[n:])), ("econml", theirs().effect(x[n:]))):
        print(f"  error of the effect, {name}: {np.sqrt(np.mean((effect - rows.effect[n:]) ** 2)):.3f}")


def main() -> None:
    torch.set_num_threads(1)
    rows = load_instrumented("gp", seed=100)
    x, y, a, z = (
        torch.as_tensor(np.array(each[:3_000]), dtype=torch.float32)
        for each in (rows.X, rows.outcome, rows.treatment, rows.instrument)
    )
    ours, plain = NuisanceNet(1), Plain(1)
    batch = (x[:64], y[:64], a[:64], z[:64])
    race(
        "loss and gradient of a batch of 64, against a layer at a time",
        lambda: ours.loss(*batch).backward(), lambda: plain.loss(*batch).backward(), target=2, rounds=301,
    )  # fmt: skip
    race(
        "an epoch of 3,000 rows, against a layer at a time",
        lambda: epoch(ours, (x, y, a, z), fused=True), lambda: epoch(plain, (x, y, a, z)), target=2, rounds=7,
    )  # fmt: skip
    given = {"treatment": a.numpy(), "instrument": z.numpy()}
    start = time.perf_counter()
    MRIVNet(max_epochs=30, random_state=0).fit(x, y, **given)
    print(f"MRIVNet, 3,000 rows, 30 epochs: {time.perf_counter() - start:.1f} s (target under 10 s)")
    if importlib.util.find_spec("econml"):  # a peer that is no dependency: pip install econml
        for seed in range(100, 104):
            against_econml(load_instrumented("gp", seed=seed))


if __name__ == "__main__":
    main()
