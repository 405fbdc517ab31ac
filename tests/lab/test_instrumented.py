"""Rows with an instrument: files as people have them, what is refused, and that simulated effects are the true ones."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from posterity.lab.data import Instrumented, check, load_instrumented, simulate_effects
from posterity.lab.data.instrumented import _random_function

PUBLIC = Path(os.environ.get("POSTERITY_DATA") or "../shared/data")
public = pytest.mark.skipif(not (PUBLIC / "causal").is_dir(), reason="the public files are not here")


def trial(n=200, **columns):
    rng = np.random.default_rng(0)
    z = np.arange(n) % 2
    a = (rng.random(n) < 0.2 + 0.6 * z).astype(int)
    whole = {
        "age": rng.integers(20, 60, n),
        "town": rng.choice(list("uvw"), n),
        "treatment": a,
        "instrument": z,
    }
    return pd.DataFrame({**whole, "outcome": rng.normal(size=n) + a, **columns})


@pytest.fixture
def written(tmp_path):
    def write(frame, query="", name="trial.csv", **how):
        path = tmp_path / name
        frame.to_parquet(path) if name.endswith("parquet") else frame.to_csv(path, index=False, **how)
        return f"{path}{query}"

    return write


@pytest.mark.parametrize("name", ["trial.csv", "trial.parquet"])
def test_columns_of_a_file_are_found_by_their_names(written, name):
    frame = trial()
    data = load_instrumented(written(frame, name=name))
    assert data.treatment.tolist() == frame["treatment"].tolist()
    assert data.instrument.tolist() == frame["instrument"].tolist()
    assert data.outcome == pytest.approx(frame["outcome"].to_numpy())
    assert list(data.X) == ["age", "town"]
    assert data.effect is None
    assert "true effects are not known" in data.note


def test_columns_are_those_that_the_options_name_and_two_values_are_codes(written):
    frame = trial().rename(columns={"treatment": "went", "instrument": "invited", "outcome": "score"})
    frame["went"] = frame["went"].map({0: "no", 1: "yes"})
    frame["invited"] += 1
    frame.loc[3, "score"] = np.nan
    data = load_instrumented(written(frame, "?treatment=went&instrument=invited&outcome=score"))
    assert data.treatment.tolist() == (frame["went"].drop(3) == "yes").tolist()
    assert data.instrument.tolist() == (frame["invited"].drop(3) - 1).tolist()
    for said in (
        "1 rows without one of the three left out",
        "treatment 'went', 1 is yes",
        "instrument 'invited', 1 is 2",
    ):
        assert said in data.note


def test_a_file_without_a_header_is_named_by_numbers(written):
    frame = trial()
    data = load_instrumented(written(frame, "?treatment=2&instrument=3&outcome=4", header=False))
    assert data.outcome == pytest.approx(frame["outcome"].to_numpy())
    with pytest.raises(ValueError, match=r"without a header, say treatment=.* not laid out as IHDP"):
        load_instrumented(written(frame, header=False))


REST = trial().drop(columns=["treatment", "instrument", "outcome"])


@pytest.mark.parametrize(
    ("change", "query", "message"),
    [
        ({}, "?treatment=went", "no column 'went', say data.treatment= and one of age, town, treatment"),
        ({}, "?treatment=instrument", "must be three columns"),
        ({}, "?effect=age", "'effect' is no option of reading it, those are .*treatment, instrument, outcome"),
        ({"instrument": np.arange(200) % 3}, "", "instrument 'instrument' must have two values, got 3: 0, 1, 2"),
        ({"treatment": np.linspace(0, 1, 200)}, "", "treatment 'treatment' must have two values, got 200: .*…"),
        ({"outcome": list("ab") * 100}, "", "outcome 'outcome' must hold finite numbers"),
        ({"outcome": np.nan}, "", "no row has a treatment"),
        ({"age": np.r_[np.inf, np.ones(199)]}, "", "column 'age' is infinite in row 1"),
        ({"instrument": 1}, "", "the instrument is always the same"),
        ({"treatment": 0}, "", "the treatment is always the same"),
        ({"outcome": 2.5}, "", "the outcome is always 2.5"),
        ({"age": 1, "town": "u"}, "", "no column beside treatment, instrument and outcome varies"),
        ({"treatment": np.arange(200) // 2 % 2}, "", "almost irrelevant: it moves the treatment of a share 0.000"),
        ({"treatment": np.where(np.arange(200) == 1, 0, np.arange(200) % 2)}, "", "instrument 1 and treatment 0 needs no row or at least 20, has 1"),
    ],
)  # fmt: skip
def test_what_no_effect_can_be_learned_from_is_refused_by_name(written, change, query, message):
    with pytest.raises(ValueError, match=rf"trial\.csv: .*{message}"):
        check(Instrumented, written(trial(**change), query))


def test_an_instrument_that_noise_could_make_is_refused_and_one_sided_compliance_is_not(written):
    rare = np.arange(400) % 10 < 5
    faint = trial(
        400,
        instrument=np.arange(400) % 2,
        treatment=np.where(np.arange(400) % 2 == 1, rare, np.arange(400) % 22 < 10).astype(int),
    )
    share = [faint["treatment"][faint["instrument"] == arm].mean() for arm in (0, 1)]
    assert 0.05 < abs(share[1] - share[0]) < 0.1
    with pytest.raises(ValueError, match=r"almost irrelevant.*F = [1-3]\.\d; at least 0.05 and F = 10"):
        check(Instrumented, written(faint))
    sided = trial(400)
    sided["treatment"] *= sided["instrument"]
    assert check(Instrumented, written(sided))


@public
def test_files_of_ihdp_and_files_like_them_give_their_covariates(monkeypatch, written):
    monkeypatch.setenv("POSTERITY_DATA", str(PUBLIC))
    raw = pd.read_csv(PUBLIC / "causal" / "ihdp" / "ihdp_npci_2.csv", header=None)
    data, like = load_instrumented("ihdp", seed=3), load_instrumented(written(raw, header=False), seed=3)
    first = raw.iloc[:, 5:11]
    np.testing.assert_allclose(data.X, (first - first.mean()) / first.std(ddof=0), atol=1e-9)
    np.testing.assert_array_equal(data.outcome, like.outcome)
    assert not np.array_equal(data.outcome, load_instrumented("ihdp", seed=4).outcome)
    assert "laid out as IHDP's files" in like.note
    other = raw.copy()
    other[[3, 4]] = raw[[4, 3]]
    with pytest.raises(ValueError, match="not laid out as IHDP"):
        load_instrumented(written(other, header=False))


@pytest.fixture(scope="module")
def one_person():
    """Return many copies of one person, so that means over rows are what the formulas say."""
    X = pd.DataFrame({"x": np.r_[np.zeros(6_000), np.ones(6_000)]})
    return simulate_effects(X, 5)


@pytest.mark.parametrize("half", [slice(0, 6_000), slice(6_000, None)])
def test_the_instrument_finds_the_simulated_effect_and_the_treated_do_not(one_person, half):
    """The Wald ratio of people alike is their effect; those who took the treatment differ by the confounder."""
    a, z, y = one_person.treatment[half], one_person.instrument[half], one_person.outcome[half]
    effect = one_person.effect[half]
    assert np.ptp(effect) == 0
    share = [a[z == arm].mean() for arm in (0, 1)]
    assert share[0] < 0.3 < 0.7 < share[1]
    wald = (y[z == 1].mean() - y[z == 0].mean()) / (share[1] - share[0])
    error = 4 * y.std() / (share[1] - share[0]) * np.sqrt(1 / (z == 0).sum() + 1 / (z == 1).sum())
    assert abs(wald - effect[0]) < error
    assert y[a == 1].mean() - y[a == 0].mean() > effect[0] + 0.2


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_random_functions_have_the_covariance_of_their_kernel(rough, d):
    rng = np.random.default_rng(0)
    x = np.zeros((4, d))
    x[:, 0] = [0.0, 0.3, 1.0, 3.0]
    draws = np.stack([_random_function(x, rng, rough=rough) for _ in range(600)])
    distance = np.abs(x[:, :1] - x[:, 0]) / d**0.5
    kernel = np.exp(-distance) if rough else np.exp(-(distance**2) / 2)
    np.testing.assert_allclose(draws.T @ draws / 600, kernel, atol=0.2)


def test_a_set_that_is_drawn_differs_by_seed_alone():
    first, again, other = (load_instrumented("gp", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.outcome, again.outcome) and not np.array_equal(first.outcome, other.outcome)
    assert first.X.shape == (6_000, 1)
