"""Every claim of every paper: declared whole, run at its smallest setting, the same each time."""

import inspect
import math
import re
from typing import get_args

import pytest
import torch

from posterity.claims import Claim, Trial, bound, comparison, trend
from posterity.engine.discovery import claim_outlines, load_claims
from posterity.engine.worker import perform
from posterity.lab.data import Kind
from posterity.papers import papers

CLAIMS = [
    pytest.param(paper, name, id=f"{paper.slug}-{name}")
    for paper in papers().values()
    if paper.claims_file
    for name in [outline.name for outline in claim_outlines(paper)]
]


@pytest.mark.parametrize(("paper", "name"), CLAIMS)
def test_is_declared_whole(paper, name):
    claim = load_claims(paper)[name]
    (outline,) = [o for o in claim_outlines(paper) if o.name == name]
    assert claim.paper == paper.slug
    assert claim.says.endswith(".")
    assert claim.metric
    assert claim.run.__doc__
    assert outline.defaults == claim.defaults, "what the source says and what the code says"
    assert set(claim.smallest) <= set(claim.parameters)
    claim.refuse(claim.defaults)
    claim.refuse({**claim.defaults, **claim.smallest})
    for parameter in claim.parameters.values():
        said = repr(parameter.annotation)
        assert "Between" in said or not {"int", "float"} & set(re.findall(r"\w+", said)), (
            f"{parameter.name} says which numbers it may be: Count, Share, Positive, Between"
        )
        assert parameter.default is not inspect.Parameter.empty, f"{parameter.name} has a default"
        assert parameter.annotation is not inspect.Parameter.empty, f"{parameter.name} is annotated"
    if "data" in claim.parameters:
        assert any(isinstance(arg, Kind) for arg in get_args(claim.parameters["data"].annotation))


@pytest.mark.parametrize(("paper", "name"), CLAIMS)
def test_smallest_setting_runs_and_repeats(paper, name, as_a_user):
    claim = load_claims(paper)[name]
    job = {
        "call": f"{paper.claims}:{name}",
        "params": {**claim.defaults, **claim.smallest},
        "seed": 12345,
        "device": "cpu",
    }
    first = perform(job)
    assert not first["error"], first["error"]
    values = first["value"].values() if isinstance(first["value"], dict) else [first["value"]]
    assert all(math.isfinite(value) for value in values)
    if not claim.timed:
        assert perform(job)["value"] == first["value"], "one seed, one result"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device")
@pytest.mark.parametrize(("paper", "name"), CLAIMS)
def test_smallest_setting_runs_on_cuda(paper, name, as_a_user):
    claim = load_claims(paper)[name]
    value = claim(Trial(12345, device="cuda"), **{**claim.defaults, **claim.smallest})
    values = value.values() if isinstance(value, dict) else [value]
    assert all(math.isfinite(value) for value in values)


def declare(form, **facts):
    return form(paper="p", says="S.", metric="m", **facts)


def test_a_comparison_returns_its_arms_in_their_order():
    claim = declare(comparison, arms=("a", "b"), better="lower")(lambda trial: {"b": 1, "a": 2})
    assert isinstance(claim, Claim)
    with pytest.raises(ValueError, match="must return the arms"):
        claim(Trial(0))
    assert declare(bound, limit=1)(lambda trial: 0.5)(Trial(0)) == 0.5


@pytest.mark.parametrize("arms", [("a",), ("a", "a"), ()])
def test_a_comparison_needs_two_arms(arms):
    with pytest.raises(ValueError, match="two different names"):
        declare(comparison, arms=arms, better="lower")


def test_a_trend_has_its_range_the_right_way_round():
    with pytest.raises(ValueError, match="low must be at most high"):
        declare(trend, low=1, high=0)
    with pytest.raises(ValueError, match="low or high must be given"):
        declare(trend)
    assert declare(trend, low=0, high=1)(lambda trial: 0).range == (0, 1)


def test_a_trial_keeps_curves_records_and_pictures():
    trial = Trial(0)
    trial.track("loss", 1, 0.5)
    trial.track("loss", 2, 0.25)
    trial.record("accuracy", 0.9)
    assert trial.curves == {"loss": [(1.0, 0.5), (2.0, 0.25)]}
    assert trial.records == {"accuracy": 0.9}
    trial.picture("method", ("png", "a picture"))
    assert trial.pictures == {"method": ("png", "a picture")}
