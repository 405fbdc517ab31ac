"""Claims about LVA: the closed form moves a last layer further than gradient descent does, and none fits better."""

import copy
import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, bound, comparison
from posterity.lab import nets
from posterity.lab.data import (
    ImageData,
    Images,
    Table,
    TableData,
    dataset,
    load_images,
    load_table,
    table_encoder,
)
from posterity.lab.data.needs import require_task
from posterity.lab.data.splits import split
from posterity.lab.training import fit
from posterity.transfer import transfer_last_layer

RATES, CHECKED = (1e-1, 1e-2, 1e-3, 1e-4), 500  # of gradient descent; steps after which it is checked
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TEST = 1_000  # samples of the new domain to test on, where there are so many
LEAST = 100  # samples beside those of the new domain, half to test on and half to pretrain with
FITTED = 1e-20  # a loss that is rounding alone
PIXELS = 500_000  # of all adapting images together: a row of 200 numbers each
BLURS = (0.5, 0.9)  # of the old and the new camera, in pixels


class Domains(NamedTuple):
    """Samples of the old domain, of the new one, and of the new one to test on."""

    x: Tensor
    y: Tensor
    x_target: Tensor
    y_target: Tensor
    x_test: Tensor
    y_test: Tensor


@dataset(Table, "signal")
def signal(seed: int) -> TableData:
    """Return a sine of five half waves, 4,000 moments of [-1, 1]."""
    t = np.random.default_rng(seed).uniform(-1, 1, 4_000)
    return TableData(pd.DataFrame({"t": t}), np.sin(5 * math.pi * t), "regression")


@dataset(Table, "sensor")
def sensor(seed: int) -> TableData:
    """Return the total of three gases from the saturating responses of eight sensors, 4,000 rows."""
    rng = np.random.default_rng(seed)
    gases = rng.exponential(size=(4_000, 3))
    response = np.log1p(gases @ rng.exponential(size=(3, 8))) + 0.02 * rng.standard_normal((4_000, 8))
    table = pd.DataFrame(response, columns=[f"sensor {k + 1}" for k in range(8)])
    return TableData(table, gases.sum(1), "regression")


def _column(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32).reshape(len(values), -1)


def _of_table(data: str, target: str | None, n_target: int, drift: float, seed: int) -> Domains:
    """Return the rows of a table, those of the new domain measured otherwise."""
    table = load_table(data, target=target, task="regression", seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(table.y))
    new, test, old = np.split(order, np.cumsum([n_target, min(TEST, (len(order) - n_target) // 2)]))
    if data == "signal":  # late by a random delay, louder and louder, and noisy
        t, y = table.X["t"].to_numpy(), table.y
        late = t + 0.05 * rng.normal(1.5, 0.8, len(t))
        loud = (1.4 + 0.4 * t) * y + 0.03 * rng.uniform(-1, 1, len(t))
        sides = [_column(part) for rows in (new, test) for part in (late[rows], loud[rows])]
        return Domains(_column(t[old]), _column(y[old]), *sides)
    encoder = table_encoder().fit(table.X.iloc[old])
    x = np.asarray(encoder.transform(table.X), dtype=float)
    y = (table.y - table.y[old].mean()) / (table.y[old].std() or 1.0)
    gain, offset = np.exp(drift * rng.standard_normal(x.shape[1])), drift * rng.standard_normal(x.shape[1])
    moved = x * gain + offset
    sides = [_column(part) for rows in (new, test) for part in (moved[rows], y[rows])]
    return Domains(_column(x[old]), _column(y[old]), *sides)


def _of_images(data: str, n_target: int, seed: int) -> Domains:
    """Return blurred images and sharp ones, those of the new domain blurred more."""
    sharp = load_images(data).x
    order = np.random.default_rng(seed).permutation(len(sharp))
    new, test, old = np.split(order, np.cumsum([n_target, min(TEST, (len(order) - n_target) // 2)]))
    sides = []
    for rows, blur in ((old, BLURS[0]), (new, BLURS[1]), (test, BLURS[1])):
        blurred = gaussian_filter(sharp[rows], sigma=(0, 0, blur, blur))
        sides += [torch.from_numpy(blurred), torch.from_numpy(sharp[rows])]
    return Domains(*sides)


def _pretrained(domains: Domains, steps: int, seed: int, lr: float, batch_size: int) -> nn.Sequential:
    """Return a network trained on the old domain, its last layer without bias as in the paper."""
    channels = domains.x.shape[1]
    with nets.seeded(seed):
        if domains.x.ndim == 4:
            net = nn.Sequential(nn.Conv2d(channels, 16, 9, padding=4), nn.ReLU(), nn.Conv2d(16, 8, 5, padding=2),
                                nn.ReLU(), nn.Conv2d(8, channels, 5, padding=2, bias=False))  # fmt: skip
        else:
            net = nn.Sequential(nn.Linear(channels, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                nn.Linear(64, 1, bias=False))  # fmt: skip
    fit(net, lambda net, x, y: F.mse_loss(net(x), y), (domains.x, domains.y), steps=steps, batch_size=batch_size, lr=lr,
        seed=seed)  # fmt: skip
    return net.requires_grad_(False)


@torch.no_grad()
def _error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(F.mse_loss(net(x), y))


def _latents(net: nn.Sequential, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the last layer's matrix multiplies, and what it should give: a row a sample or pixel, in float64."""
    latent, last = net[:-1](x), net[-1]
    if isinstance(last, nn.Conv2d):
        latent = F.unfold(latent, last.kernel_size, padding=2).mT.flatten(0, 1)
        y = y.flatten(2).mT.flatten(0, 1)
    return latent.double(), y.double()


def _descend(
    net: nn.Sequential, x: Tensor, y: Tensor, lr: float, steps: int
) -> Iterator[tuple[int, nn.Sequential]]:
    """Yield the network after every so many steps of Adam on its last layer.

    The gradient of the mean square comes from Z'Z and Z'Y, which is the same and takes less time.
    """
    latent, y = _latents(net, x, y)
    gram, right = latent.mT @ latent / y.numel(), latent.mT @ y / y.numel()
    net = copy.deepcopy(net)
    weight = net[-1].weight
    matrix = weight.double().flatten(1).mT.contiguous().requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=lr)
    for step in range(1, steps + 1):
        matrix.grad = 2 * (gram @ matrix.detach() - right)
        optimizer.step()
        if step % CHECKED == 0 or step == steps:
            weight.copy_(matrix.detach().mT.reshape(weight.shape))
            yield step, net


def _moved(net: nn.Sequential, x: Tensor, y: Tensor, ridge: float = 0.0) -> nn.Sequential:
    net = copy.deepcopy(net)
    transfer_last_layer(net, None, x, y, ridge=ridge)
    return net


def _compare(trial: Trial, net: nn.Sequential, domains: Domains, steps: int) -> dict[str, float]:
    """Return test errors; a fifth of the new samples chooses rate and steps, and the ridge, then all are used."""
    x, y = domains.x_target, domains.y_target
    kept, held = (torch.from_numpy(part) for part in split(len(x), (0.8, 0.2), trial.seed))
    tried = [(_error(found, x[held], y[held]), lr, step)
             for lr in RATES for step, found in _descend(net, x[kept], y[kept], lr, steps)]  # fmt: skip
    _, lr, length = min(tried)
    ridge = min((_error(_moved(net, x[kept], y[kept], r), x[held], y[held]), r) for r in RIDGES)[1]
    *_, (_, descended) = _descend(net, x, y, lr, length)
    found = {"gradient descent": descended, "no transfer": net, "lva": _moved(net, x, y),
             "lva + ridge": _moved(net, x, y, ridge)}  # fmt: skip
    for name, value in (("rate chosen", lr), ("steps chosen", length), ("ridge chosen", ridge)):
        trial.record(name, value)
    for arm in ("gradient descent", "lva", "lva + ridge"):
        trial.record(f"{arm}: error on the samples it saw", _error(found[arm], x, y))
    return {
        arm: _error(found[arm], domains.x_test, domains.y_test)
        for arm in ("gradient descent", "no transfer", "lva", "lva + ridge")
    }


def _rows(data: TableData, n_target: int, **_: Any) -> None:
    require_task(data.task, "regression")
    if len(data.y) < n_target + LEAST:
        raise ValueError(f"n_target must leave {LEAST} of {len(data.y)} rows, got {n_target}")


def _pictures(data: ImageData, n_target: int, **_: Any) -> None:
    if len(data.x) < n_target + LEAST:
        raise ValueError(f"n_target must leave {LEAST} of {len(data.x)} images, got {n_target}")
    size = n_target * data.x[0, 0].size
    if size > PIXELS:
        raise ValueError(
            f"n_target must give at most {PIXELS:,} pixels, got {size:,}: fewer or smaller images"
        )


@comparison(
    paper="layer-variational",
    says="The closed form, with a ridge, adapts a last layer better than gradient descent, at once.",
    where="Tseng et al., the experiment on time series",
    arms=("gradient descent", "no transfer", "lva", "lva + ridge"),
    metric="mean squared error on held-out samples of the new domain",
    better="lower",
    smallest={"n_target": 20, "pretraining": 10, "steps": 40},
    seeds=10,
    check=_rows,
)
def adapts(
    trial: Trial,
    data: Table = "signal",
    target: str | None = None,
    n_target: Annotated[int, Between(5)] = 500,
    drift: Positive = 0.3,
    pretraining: Count = 3_000,
    steps: Count = 3_000,
) -> dict[str, float]:
    """Train a network on one domain and move its last layer to another, by samples of that.

    All start from the same network, 64-64 with ReLU and a last layer without bias, and see the same samples, a fifth of
    which chooses: the rate of Adam (0.1 to 1e-4) and how long it runs (every 500 steps, up to ``steps``), or the ridge
    (0.001 to 10); then all samples are used. The new domain of "signal" is the official one, late by a random delay and
    louder with time. In a table, "sensor" or your own, columns change gain and offset, by exp(``drift`` N) and by
    ``drift`` N of their deviation; the target is standardised.

    Errors of no transfer, gradient descent, plain and with a ridge, means of eight seeds that are not those judged: with
    500 samples 1.03, 0.49, 0.37, 0.39; with 1,000, 1.02, 0.49, 0.37, 0.38; with 200, 1.03, 0.53, 0.48, 0.47, where the
    plain form loses on three seeds of eight; with 20, 1.04, 1.18, 2 to 500, 1.50. So the paper's "particularly
    advantageous when target data are sparse" does not hold here: with fewer samples than latents the plain change runs
    through them and far away between them, and none beats leaving the network alone. Much of the difference is that
    gradient descent has not arrived: with ``steps=30_000`` and 1,000 samples it is 0.47, ridge 0.40, over four seeds.
    On "sensor" with ``n_target=200`` the plain form fails on some seeds, with a ridge it does not.
    """
    domains = _of_table(data, target, n_target, drift, trial.seed)
    net = _pretrained(domains, pretraining, trial.seed, lr=3e-3, batch_size=200)
    return _compare(trial, net, domains, steps)


@comparison(
    paper="layer-variational",
    says="Where samples are many, the plain closed form, the paper's own, adapts a last layer better than gradient descent.",
    where="Tseng et al., the experiment on time series",
    arms=("gradient descent", "lva"),
    metric="mean squared error on held-out samples of the new domain",
    better="lower",
    smallest={"n_target": 20, "pretraining": 10, "steps": 40},
    seeds=10,
    check=_rows,
)
def as_published(
    trial: Trial,
    data: Table = "signal",
    target: str | None = None,
    n_target: Annotated[int, Between(5)] = 1_000,
    drift: Positive = 0.3,
    pretraining: Count = 3_000,
    steps: Count = 3_000,
) -> dict[str, float]:
    """Compare as `adapts` does, without a ridge; what says "many" is samples for each of the 64 latents.

    With 500 samples it wins by as much; with 200 it loses on three seeds of eight, and with 20 on all.
    """
    domains = _of_table(data, target, n_target, drift, trial.seed)
    net = _pretrained(domains, pretraining, trial.seed, lr=3e-3, batch_size=200)
    found = _compare(trial, net, domains, steps)
    return {arm: found[arm] for arm in ("gradient descent", "lva")}


@comparison(
    paper="layer-variational",
    says="A network that sharpens images is adapted to stronger blur better by the closed form, with a ridge, than by gradient descent.",
    where="Tseng et al., the experiment on image deblurring",
    arms=("gradient descent", "no transfer", "lva", "lva + ridge"),
    metric="mean squared error of restored images, pixels in [0, 1]",
    better="lower",
    smallest={"n_target": 10, "pretraining": 2, "steps": 40},
    check=_pictures,
)
def deblurs(
    trial: Trial,
    data: Images = "digits",
    n_target: Annotated[int, Between(5)] = 50,
    pretraining: Count = 400,
    steps: Count = 3_000,
) -> dict[str, float]:
    """Train three convolutions (9, 5 and 5 pixels wide, as the paper's) to undo a blur of 0.5 pixels, then one of 0.9.

    The last convolution is what moves: 200 numbers a channel, which every pixel of the new images is a row for. Tuning is
    that of `adapts`. Even
    few images are many rows, so that the ridge has nothing to do. Of your own images take as many as make 500,000 pixels
    at most.
    """
    domains = _of_images(data, n_target, trial.seed)
    net = _pretrained(domains, pretraining, trial.seed, lr=1e-3, batch_size=64)
    return _compare(trial, net, domains, steps)


@bound(
    paper="layer-variational",
    says="No gradient method on the last layer fits the samples better than the closed form.",
    where="Tseng et al., the solution by the pseudo-inverse",
    metric="training loss of the closed form over the lowest of Adam at four rates and of L-BFGS",
    limit=1.0,
    smallest={"n_target": 20, "pretraining": 10, "steps": 40},
    check=_rows,
)
def best_fit(
    trial: Trial,
    data: Table = "signal",
    target: str | None = None,
    n_target: Annotated[int, Between(5)] = 200,
    drift: Positive = 0.3,
    pretraining: Count = 3_000,
    steps: Count = 3_000,
) -> float:
    """Fit the samples of the new domain in float64, by each method, and compare the losses on them.

    Least squares has no lower loss, so only rounding could pass the limit; the record says how near each rival comes.
    """
    domains = _of_table(data, target, n_target, drift, trial.seed)
    net = _pretrained(domains, pretraining, trial.seed, lr=3e-3, batch_size=200).double()
    x, y = domains.x_target.double(), domains.y_target.double()
    ours = _error(_moved(net, x, y), x, y)
    rivals = {
        f"Adam, rate {lr:g}": [_error(found, x, y) for _, found in _descend(net, x, y, lr, steps)]
        for lr in RATES
    }
    rivals["L-BFGS"] = [_error(_quasi_newton(net, x, y, steps), x, y)]
    best = min(min(losses) for losses in rivals.values())
    for name, losses in rivals.items():
        trial.record(f"{name}: its loss over that of the closed form", min(losses) / max(ours, 1e-30))
    return round(ours / max(best, 1e-30), 9) if best > FITTED else 0.0


def _quasi_newton(net: nn.Sequential, x: Tensor, y: Tensor, steps: int) -> nn.Sequential:
    """Return the network after L-BFGS on its last layer."""
    (latent, values), net = _latents(net, x, y), copy.deepcopy(net)
    matrix = net[-1].weight.flatten(1).mT.contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS([matrix], max_iter=steps, tolerance_grad=0, tolerance_change=0, history_size=50,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.mse_loss(latent @ matrix, values)
        value.backward()
        return value

    optimizer.step(loss)
    net[-1].weight.copy_(matrix.detach().mT.reshape(net[-1].weight.shape))
    return net
