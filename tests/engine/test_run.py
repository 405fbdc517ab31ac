"""Settings from the command line are typed, and comparisons are ranked with their failures."""

from typing import Annotated, Literal

import pytest

from posterity.claims import Between, Claim, Count, Positive, Share, trend
from posterity.engine import cluster, compare, plan, run, verdicts
from posterity.engine.discovery import Outline
from posterity.engine.store import Job, Outcome, Store
from posterity.lab.tasks import get_task
from posterity.papers import get


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3), ("1e-3", float, 1e-3), ("3", float, 3.0), ("yes", bool, True), ("False", bool, False),
        ("ecc", Literal["dist", "ecc"], "ecc"), ("2", Literal[1, 2], 2), ("(2, 8)", tuple[int, ...], [2, 8]),
        ("", tuple[int, ...], []), ("0.1,0.2", list[float], [0.1, 0.2]), ("none", int | None, None),
        ("4", int | None, 4), ("a.csv", Annotated[str, "kind"], "a.csv"),
    ],
)  # fmt: skip
def test_a_setting_becomes_what_the_signature_says(text, annotation, value):
    got = plan.typed("p", text, annotation)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "said"),
    [
        ("2.5", int, "p must be"), ("wide", float, "p must be"), ("maybe", bool, "p must be true or false"),
        ("near", Literal["dist", "ecc"], "p must be one of dist, ecc, got 'near'"),
        ("1,x", tuple[int, ...], "p must be"),
    ],
)  # fmt: skip
def test_another_text_is_refused_by_name(text, annotation, said):
    with pytest.raises(ValueError, match=said):
        plan.typed("p", text, annotation)


@pytest.mark.parametrize(
    ("value", "annotation", "said"),
    [
        (0, Count, "p must be at least 1, got 0"), ([2, 0], tuple[Count, ...], "p must be at least 1, got 0"),
        (1.5, Share, "p must be at least 0 and at most 1, got 1.5"), (float("nan"), Share, "at most 1, got nan"),
        (0.0, Positive, "p must be greater than 0, got 0.0"), (0, Count | None, "p must be at least 1"),
        (6, Annotated[int, Between(high=5)], "p must be at most 5, got 6"),
        (None, Count | None, ""), (1, Count, ""), (1.0, Share, ""), ((), tuple[Count, ...], ""), (-3.0, float, ""),
    ],
)  # fmt: skip
def test_a_number_out_of_the_range_that_its_annotation_gives_is_refused(value, annotation, said):
    def claim(trial, p=1):
        return 0.0

    claim.__annotations__["p"] = annotation
    made = trend(paper="esd", says="S.", metric="m", low=0)(claim)
    if not said:
        made.refuse({"p": value})
        return
    with pytest.raises(ValueError, match=f"claim: .*{said}"):
        made.refuse({"p": value})


def test_a_claims_own_check_and_number_of_seeds_count_before_any_trial(monkeypatch):
    def fits(low, high):
        if low > high:
            raise ValueError(f"low must be at most high, got {low} and {high}")

    @trend(paper="esd", says="S.", metric="m", low=0, seeds=9, check=fits)
    def claim(trial, low: int = 1, high: int = 2) -> float:
        return 0.0

    assert isinstance(claim, Claim)
    monkeypatch.setattr(plan, "load_claims", lambda paper: {"claim": claim})
    monkeypatch.setattr(plan, "claim_outlines", lambda paper: [Outline("claim", "trend", {}, {}, "")])
    monkeypatch.setattr(plan, "fingerprint", lambda module, name: "code")
    ((found,), _) = plan.plan_claims(get("esd"))
    assert [job.seed for job in found.jobs] == list(range(9))
    ((found,), _) = plan.plan_claims(get("esd"), seeds=2, first_seed=100)
    assert [job.seed for job in found.jobs] == [100, 101]
    with pytest.raises(ValueError, match="low must be at most high, got 3 and 2"):
        plan.plan_claims(get("esd"), settings={"low": "3"})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.1, 0.9, 1.2], "; about 5 seeds would settle it"),
        ([-1.0, 1.0], "; more than 1,000 seeds"),
        ([1.0, 1.1, 1.2], ""),
    ],
)
def test_an_inconclusive_row_says_how_many_seeds_would_settle_it(values, says):
    outline = Outline("c", "trend", {"says": "S.", "metric": "m", "low": 0.0}, {}, "")
    pairs = [(Job("p", "c", "", {}, seed, ""), Outcome(value=value)) for seed, value in enumerate(values)]
    row = verdicts.judge("p", outline, pairs)
    assert ("seeds_to_settle" in row) == (row["verdict"] == "inconclusive") == bool(says)
    assert verdicts.settling(row).startswith(says)


@pytest.mark.parametrize(("on", "address"), [("ray", None), ("ray://head:10001", "ray://head:10001")])
def test_ray_gets_what_is_not_stored(on, address, jobs, monkeypatch):
    first, second = jobs("draw", 2)
    store = Store()
    store.put(first, Outcome(value=1.0))
    asked = []

    def run_on_ray(missing, *, address, workers):
        asked.append((list(missing), address, workers))
        yield second, Outcome(value=2.0)

    monkeypatch.setattr(cluster, "run_on_ray", run_on_ray)
    found = [
        (job.seed, outcome.value, known) for job, outcome, known in run.execute([first, second], store, on=on)
    ]
    assert found == [(0, 1.0, True), (1, 2.0, False)]
    assert asked == [([second], address, None)]
    assert store.get([second])[second.key].value == 2.0


def test_trials_of_other_code_are_counted_and_not_shown():
    store = Store()
    store.put(
        Job("esd", "unbiased", "posterity.claims.uncertainty.esd:unbiased", {}, 0, "other"),
        Outcome(value=0.0),
    )
    assert verdicts.current(["esd"], store) == ([], 1)


def test_an_entry_that_fails_is_ranked_last_with_its_reason():
    values = {"a": [0.1, 0.2, 0.3], "b": [1.1, 1.2, 1.3]}
    pairs = [
        (Job("", "compare", "", {"entry": name}, seed, ""), Outcome(value=value))
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]
    pairs.append((Job("", "compare", "", {"entry": "c"}, 0, ""), Outcome(error="no")))
    rows = compare._rank(get_task("tabular-regression"), pairs, {"a": "", "b": "esd", "c": ""})
    assert [(row["rank"], row["entry"], row["paper"]) for row in rows] == [
        (1, "a", None),
        (2, "b", "esd"),
        (None, "c", None),
    ]
    assert rows[2]["error"] == "no"


def test_a_ranking_says_whether_the_ordinary_choice_is_enough():
    row = {"rank": 1, "entry": "A", "paper": "a"}
    plain = {"rank": 2, "entry": "GCN", "paper": None, "values": [0.8, 0.9]}
    failed = {"rank": None, "entry": "MLP", "paper": None, "error": "no"}
    assert "GCN, the best ordinary choice, is not enough: A did better" in compare.advice(
        [row, plain, failed]
    )
    assert "GCN, an ordinary choice, is enough as far as 2 seeds tell" in compare.advice(
        [row, {**plain, "rank": 1}]
    )
    assert "nothing to compare" in compare.advice([row, failed])


def test_a_reference_is_no_choice():
    bound = {"rank": 1, "entry": "not private", "paper": None, "reference": True, "values": [1.0, 1.0]}
    plain = {"rank": 2, "entry": "mean", "paper": None, "values": [0.0, 0.1]}
    better = {"rank": 2, "entry": "A", "paper": "a", "values": [0.8, 0.9]}
    assert "mean, an ordinary choice, is enough" in compare.advice([bound, plain])
    assert "mean, the best ordinary choice, is not enough: A did" in compare.advice(
        [bound, better, {**plain, "rank": 3}]
    )
    assert "nothing to compare" in compare.advice([bound, better])
