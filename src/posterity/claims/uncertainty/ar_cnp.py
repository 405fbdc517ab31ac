"""Claims about AR-CNP: the same model, deployed autoregressively, predicts jointly."""

import torch
from torch import nn

from posterity.claims import Count, Trial, bound, comparison
from posterity.lab import nets
from posterity.lab.data import FunctionData, Functions, Tasks, load_functions
from posterity.lab.training import fit_functions, per_target
from posterity.uncertainty import CNP, ConvCNP, ar_log_likelihood

SIZES = (3, 10, 20)  # context points of the test tasks
TARGETS = 30


def _trained(trial: Trial, source: FunctionData, steps: int, points_per_unit: int) -> nn.Module:
    """Return a model trained by its marginal likelihood, as ever: convolutional on the line."""
    if source.dim_x == 1:
        model = nets.weights(ConvCNP, source.dim_y, points_per_unit=points_per_unit, channels=(32,) * 5, kernel_size=9,
                             architecture="conv", seed=trial.seed)  # fmt: skip
    else:
        model = nets.weights(CNP, source.dim_x, source.dim_y, dim_hidden=128, seed=trial.seed)
    fit_functions(model, source, steps=steps, n_context=(0, 40), n_target=40, seed=trial.seed, lr=1e-3,
                  device=trial.device)  # fmt: skip
    return model


def _tests(trial: Trial, source: FunctionData, n_tasks: int) -> dict[int, Tasks]:
    return {
        n: source.tasks(n_tasks, n_context=(n, n), n_target=TARGETS, seed=trial.seed, held_out=True)
        for n in SIZES
    }


@comparison(
    paper="ar-cnp",
    says="The same trained model, deployed autoregressively, predicts jointly far better.",
    where="Bruinsma et al., Section 5",
    arms=("ConvCNP", "AR ConvCNP"),
    metric="joint log-likelihood a target, mean over 3, 10 and 20 context points",
    better="higher",
    smallest={"steps": 2, "n_tasks": 4, "points_per_unit": 4},
)
def joint_predictions(
    trial: Trial,
    data: Functions = "gp",
    steps: Count = 1000,
    n_tasks: Count = 128,
    points_per_unit: Count = 16,
) -> dict[str, float]:
    """Train one model and evaluate it twice; the exact Gaussian process is the ceiling.

    Nothing is trained for the second arm. Functions of inputs of more than one dimension
    (``data="digits"``) take a CNP in the place of the convolutional one. The paper trains
    100 epochs of 16,384 tasks at 64 points a unit.
    """
    source = load_functions(data, seed=trial.seed)
    model = _trained(trial, source, steps, points_per_unit)
    values: dict[str, list[float]] = {"ConvCNP": [], "AR ConvCNP": []}
    generator = torch.Generator().manual_seed(trial.seed)
    for n, tasks in _tests(trial, source, n_tasks).items():
        with torch.no_grad():
            alone = model.log_likelihood(**tasks.arguments)  # type: ignore[operator]
            joint = ar_log_likelihood(model, **tasks.arguments, generator=generator)
        for arm, value in zip(values, (alone, joint), strict=True):
            values[arm].append(per_target(value, tasks))
            trial.track(f"log-likelihood a target, {arm}", n, values[arm][-1])
        if tasks.joint is not None:
            trial.track("log-likelihood a target, exact", n, per_target(tasks.joint, tasks))
            trial.record(f"exact, {n} context points", per_target(tasks.joint, tasks))
    return {arm: sum(each) / len(each) for arm, each in values.items()}


@bound(
    paper="ar-cnp",
    says="On data of a Gaussian process no order of prediction beats the true joint density on average.",
    where="Bruinsma et al., Section 3",
    metric="largest mean gain over the exact joint log-density over orders, in standard errors",
    limit=1.0,
    smallest={"steps": 2, "n_tasks": 8, "points_per_unit": 4},
)
def never_above_the_truth(
    trial: Trial, steps: Count = 500, n_tasks: Count = 128, points_per_unit: Count = 16
) -> float:
    """Predict in random, left-to-right and given order; the gain is a mean over tasks.

    It is minus a Kullback-Leibler divergence, below 0 in expectation for every model.
    """
    source = load_functions("gp", seed=trial.seed)
    model = _trained(trial, source, steps, points_per_unit)
    generator = torch.Generator().manual_seed(trial.seed)
    largest = -float("inf")
    for n, tasks in _tests(trial, source, n_tasks).items():
        assert tasks.joint is not None
        for order in ("random", "left-to-right", "given"):
            with torch.no_grad():
                value = ar_log_likelihood(model, **tasks.arguments, order=order, generator=generator)
            gain = (value - tasks.joint) / TARGETS
            trial.track(f"gain a target, {order}", n, float(gain.mean()))
            largest = max(largest, float(gain.mean() / (gain.std() / len(gain) ** 0.5)))
    return largest
