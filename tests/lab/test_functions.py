"""Functions: exact densities, tasks that keep their points apart, a user's long table."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal

from posterity.lab.data import Functions, check, kind_of, load_functions, names
from posterity.lab.training import fit_functions, per_target
from posterity.uncertainty import CNP

SIZES = {"n_context": (2, 6), "n_target": 4}


@pytest.fixture
def table(tmp_path):
    """Return the path of 12 noisy parabolas of 5 to 16 points, and the frame."""
    rng = np.random.default_rng(0)
    rows = [
        {"function": f"f{k}", "x": x, "y1": k * x * x + 3, "y2": -x}
        for k in range(12)
        for x in rng.uniform(10, 30, 5 + k)
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "functions.csv", index=False)
    return tmp_path / "functions.csv", frame


@pytest.mark.parametrize("name", names(kind_of(Functions)))
def test_tasks_of_every_source(name):
    source = load_functions(name, seed=1)
    tasks = source.tasks(30, **SIZES, seed=3)
    assert tasks.x_context.shape == (30, 6, source.dim_x) and tasks.y_target.shape == (30, 4, source.dim_y)
    counts = tasks.context_mask.sum(1)
    assert counts.min() == 2 and counts.max() == 6 and tasks.target_mask.all()
    again = source.tasks(30, **SIZES, seed=3)
    other = source.tasks(30, **SIZES, seed=4)
    assert torch.equal(tasks.y_target, again.y_target) and not torch.equal(tasks.y_target, other.y_target)
    held = source.tasks(30, **SIZES, seed=3, held_out=True)
    assert not torch.equal(held.y_target, tasks.y_target)
    assert (held.joint is None) == (name in ("sawtooth", "digits"))
    for row in range(30):  # no target is in the context
        seen = tasks.x_context[row, : counts[row]]
        assert not (tasks.x_target[row][:, None] == seen[None]).all(-1).any()


def test_densities_are_those_of_the_process():
    tasks = load_functions("gp-paper").tasks(5, **SIZES, seed=0, held_out=True)
    source = load_functions("gp-paper")
    rng = torch.Generator().manual_seed(1)
    _, _, _, extra = source.draw(5, 10, True, rng)
    for row in range(5):
        n = int(tasks.context_mask[row].sum())
        x = torch.cat([tasks.x_context[row, :n], tasks.x_target[row]]).double()
        y = torch.cat([tasks.y_context[row, :n], tasks.y_target[row]]).double()[:, 0]
        lengthscale, scale = extra[row].tolist()
        gram = scale**2 * torch.exp(-((x - x.T) ** 2) / (2 * lengthscale**2)) + 4e-4 * torch.eye(len(x))
        whole = MultivariateNormal(torch.zeros_like(y), gram).log_prob(y)
        seen = MultivariateNormal(torch.zeros_like(y[:n]), gram[:n, :n]).log_prob(y[:n])
        assert float(tasks.joint[row]) == pytest.approx(float(whole - seen), abs=1e-4)
        weights = torch.linalg.solve(gram[:n, :n], gram[:n, n:]).T
        mean, variance = weights @ y[:n], gram.diagonal()[n:] - (weights * gram[n:, :n]).sum(1)
        alone = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y[n:]).sum()
        assert float(tasks.marginal[row]) == pytest.approx(float(alone), abs=1e-4)
    assert per_target(tasks.joint, tasks) == pytest.approx(float(tasks.joint.mean()) / 4)


@pytest.mark.parametrize(("name", "value"), [("gp", math.exp(-2)), ("gp-periodic", 1.0)])
def test_samples_have_the_kernels_covariance(name, value):
    """Two points half or one unit apart, over many draws, by their products."""
    source = load_functions(name)
    x, y, _, _ = source.draw(40_000, 2, False, torch.Generator().manual_seed(0))
    gap, product = (x[:, 0] - x[:, 1]).abs()[:, 0], (y[:, 0] * y[:, 1])[:, 0]
    near = (gap - (0.5 if name == "gp" else 1.0)).abs() < 0.05
    error = product[near].std() / math.sqrt(int(near.sum()))
    assert abs(float(product[near].mean()) - value) < 4 * float(error) + 0.02


def test_a_sawtooth_rises_or_falls_and_jumps():
    x, y, _, _ = load_functions("sawtooth").draw(50, 400, False, torch.Generator().manual_seed(0))
    assert y.min() >= 0 and y.max() < 1
    for row in range(50):
        order = x[row, :, 0].argsort()
        slope = y[row, order, 0].diff() / x[row, order, 0].diff()
        typical = slope[x[row, order, 0].diff() > 1e-3].median().abs()
        assert 1.9 < typical < 4.1


def test_digits_are_pixels_of_images_split_by_image():
    source = load_functions("digits", seed=0)
    tasks = source.tasks(20, n_context=(30, 30), n_target=34, seed=0)
    assert tasks.y_context.min() >= -0.5 and tasks.y_context.max() <= 0.5
    x = torch.cat([tasks.x_context, tasks.x_target], 1)
    assert all(len(each.unique(dim=0)) == 64 for each in x)


def test_a_users_table(table):
    path, frame = table
    source = load_functions(str(path), seed=0)
    assert (source.dim_x, source.dim_y) == (1, 2)
    assert "12 functions of 5 to 16 points" in source.note and "y standardised" in source.note
    tasks = source.tasks(200, n_context=(1, 20), n_target=20, seed=0)
    points = tasks.context_mask.sum(1) + tasks.target_mask.sum(1)
    assert points.min() >= 5 and points.max() <= 16 and tasks.target_mask.any(1).all()
    assert float(tasks.x_context[tasks.context_mask].abs().max()) <= 1.3
    model = CNP(1, 2, dim_hidden=8)
    fit_functions(model, source, steps=3, n_context=(1, 20), n_target=20, seed=0)
    held = source.tasks(3, n_context=(1, 4), n_target=20, seed=0, held_out=True)
    assert torch.isfinite(model.log_likelihood(**held.arguments)).all()
    seen, unseen = (
        {round(float(v), 4) for v in part.y_target[part.target_mask][:, 0]} for part in (tasks, held)
    )
    assert not seen & unseen
    frame.loc[3, "y1"] = np.nan
    frame = pd.concat([frame, pd.DataFrame([{"function": "lone", "x": 1.0, "y1": 0.0, "y2": 0.0}])])
    frame.to_parquet(path.with_suffix(".parquet"))
    note = check(Functions, str(path.with_suffix(".parquet")))
    assert "1 incomplete rows left out" in note and "1 functions of a single point left out" in note


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: f.rename(columns={"function": "curve"}),
            "need the columns function, x… and y…, has curve, x, y1, y2",
        ),
        (lambda f: f.drop(columns=["y1", "y2"]), "need the columns"),
        (lambda f: f.assign(x="a"), "column 'x' must hold numbers"),
        (lambda f: f.assign(y2=[np.inf, *f.y2[1:]]), "column 'y2' is infinite in row 1"),
        (lambda f: f[f.function.isin(["f1", "f2"])], "needs at least 5 functions of 2 points or more, has 2"),
    ],
)
def test_tables_that_are_none(table, change, says, command):
    path, frame = table
    change(frame).to_csv(path, index=False)
    with pytest.raises(ValueError, match=says):
        load_functions(str(path))
    code, _, err = command("run", "lbanp", "--claim", "bottleneck_suffices", "--data", str(path))
    assert code == 2 and "Traceback" not in err and path.name in err


def test_a_claim_runs_on_a_users_table(table, command):
    path, _ = table
    words = ("--data", str(path), "--seeds", "2", "--set", "steps=3", "--workers", "1", "--quiet", "--json")
    code, out, _ = command("run", "lbanp", "--claim", "bottleneck_suffices", *words)
    assert code == 0 and '"paper": "lbanp"' in out
