"""Claims about bias and variance of single samples: aligned in wide networks, and tied to the spread by calibration."""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, bound, comparison, trend
from posterity.dynamics import BiasVariance, alignment, bias_variance, calibration_link
from posterity.lab.data import ImageData
from posterity.lab.data.labelled import Labelled, load_labelled
from posterity.lab.metrics import rank_correlation
from posterity.lab.nets import seeded

BATCH = 64
Width = Annotated[int, Between(1, 2048)]
Members = Annotated[int, Between(2, 256)]


def _enough(data: ImageData, **_: object) -> None:
    if len(data.y) < 40:
        raise ValueError(f"at least 40 inputs are needed, half of them to learn from, got {len(data.y)}")


def _halves(data: str, target: str | None, trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows and classes, a random half to learn from and the other: features standardised, pixels as they are."""
    found = load_labelled(data, target=target)
    x = torch.from_numpy(found.x.reshape(len(found.y), -1)).float()
    y = torch.from_numpy(np.asarray(found.y)).long()
    order = torch.from_numpy(np.random.default_rng(trial.seed).permutation(len(y)))
    train, test = order[: len(y) // 2], order[len(y) // 2 :]
    if found.x[0, 0].size == 1:
        mean, deviation = x[train].mean(0), x[train].std(0)
        x = (x - mean) / deviation.where(deviation > 1e-6, torch.ones(()))
    return tuple(part.to(trial.device) for part in (x[train], y[train], x[test], y[test]))  # type: ignore[return-value]


def _ensemble(
    trial: Trial, data: tuple[Tensor, Tensor, Tensor, Tensor], width: int, members: int, steps: int, lr: float
) -> BiasVariance:
    """Train networks with two hidden layers on bootstraps, all as one stack, and decompose their test loss."""
    x, y, x_test, y_test = data
    k = int(torch.cat([y, y_test]).max()) + 1
    with seeded(trial.seed):
        nets = [
            nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, k))
            for _ in range(members)
        ]  # fmt: skip
    params = {
        name: p.detach().to(trial.device).requires_grad_() for name, p in stack_module_state(nets)[0].items()
    }
    net = nets[0].to(trial.device)
    outputs = vmap(lambda params, x: functional_call(net, params, (x,)), in_dims=(0, 0))
    draw = torch.Generator().manual_seed(trial.seed)
    bootstraps = torch.randint(len(y), (members, len(y)), generator=draw)
    optimizer = torch.optim.Adam(params.values(), lr=lr)  # it works entry by entry: one for each member
    for _ in range(steps):
        rows = bootstraps.gather(1, torch.randint(len(y), (members, BATCH), generator=draw)).to(x.device)
        loss = (
            F.cross_entropy(outputs(params, x[rows]).flatten(0, 1), y[rows].flatten(), reduction="sum")
            / BATCH
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = outputs(params, x_test.expand(members, -1, -1))
    found = bias_variance(scores, y_test, from_logits=True)
    trial.record(f"accuracy of the mean, width {width}", found.correct.double().mean())
    return found


@comparison(
    paper="bias-variance",
    says="Squared bias and variance of a sample are aligned in over-parameterised networks, the more so the wider the network.",
    where="Chen et al., Sections 3 and 4",
    arms=("width 8", "width 128"),
    metric="distance from 1 of the slope of log variance on log squared bias, correctly classified test samples",
    better="lower",
    smallest={"steps": 40, "members": 4},
    check=_enough,
)
def aligned(
    trial: Trial, data: Labelled = "digits", target: str | None = None, members: Members = 16, steps: Count = 600,
    lr: Positive = 3e-3,
) -> dict[str, float]:  # fmt: skip
    """Train bootstrapped ensembles of both widths on a half of the data, and fit a line to the other half."""
    halves, slopes = _halves(data, target, trial), {}
    for width in (8, 128):
        found = _ensemble(trial, halves, width, members, steps, lr)
        line = alignment(found)
        slopes[f"width {width}"] = abs(line.slope - 1)
        for name in ("slope", "r2", "intercept", "log_ratio"):
            trial.record(f"{name}, width {width}", getattr(line, name))
    return slopes


@bound(
    paper="bias-variance",
    says="The variance of an ensemble stays below the squared bias that it would have if it were calibrated.",
    where="Chen et al., Section 4",
    metric="mean variance over mean expected squared bias",
    limit=1.0,
    smallest={"steps": 20, "members": 4},
    check=_enough,
)
def below_expected_bias(
    trial: Trial, data: Labelled = "digits", target: str | None = None, width: Width = 128, members: Members = 16,
    steps: Count = 600, lr: Positive = 3e-3,
) -> float:  # fmt: skip
    """Train a bootstrapped ensemble on a half of the data, and take both from its predictions of the other half."""
    found = _ensemble(trial, _halves(data, target, trial), width, members, steps, lr)
    return float(found.variance.mean() / calibration_link(found, n_bins=1).expected_bias2.mean())


@trend(
    paper="bias-variance",
    says="The spread of an ensemble tells without labels on which samples its error is large.",
    where="Chen et al., Section 4",
    metric="rank correlation over 15 bins of squared bias with what the spread says of it",
    low=0.9,
    smallest={"steps": 40, "members": 4},
    check=_enough,
)
def spread_tells_error(
    trial: Trial, data: Labelled = "digits", target: str | None = None, width: Width = 128, members: Members = 16,
    steps: Count = 600, lr: Positive = 3e-3, bins: Annotated[int, Between(3, 20)] = 15,
) -> float:  # fmt: skip
    """Train a bootstrapped ensemble on a half of the data, and sort the other half by expected squared bias."""
    found = _ensemble(trial, _halves(data, target, trial), width, members, steps, lr)
    link = calibration_link(found, n_bins=bins)
    trial.record("residual", link.residual)
    for expected, actual in zip(link.bin_expected.tolist(), link.bin_bias2.tolist(), strict=True):
        trial.track("squared bias", expected, actual)
    return rank_correlation(link.bin_expected, link.bin_bias2)
