"""The task of wrong labels, and the ranking of a user's own."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterity.claims.labels import cg_score
from posterity.engine.compare import compare
from posterity.lab.data import load_labelled
from posterity.lab.tasks import entries, get_task, image_classification, label_noise
from posterity.lab.tasks.label_noise import ranked

ORDINARY = (
    "10 nearest neighbours", "error of short trainings", "out-of-fold confidence", "out-of-fold logistic regression",
)  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a CSV file of three kinds that lie apart, the third row's kind wrong, the second's unknown."""
    monkeypatch.setattr(label_noise, "image_epochs", lambda n: 60)
    monkeypatch.setattr(image_classification, "image_epochs", lambda n: 20)
    rng = np.random.default_rng(0)
    kind = np.arange(90) % 3
    frame = pd.DataFrame(np.eye(3)[kind] * 6 + rng.normal(size=(90, 3)), columns=list("abc"))
    frame["kind"] = np.array(["ant", "bee", "cat"])[kind]
    frame.loc[1, "kind"] = None
    frame.loc[2, "kind"] = "ant"
    frame.to_csv(tmp_path / "t.csv", index=False)
    return str(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ORDINARY)
def test_every_ordinary_choice_finds_planted_labels(table, name):
    precision = get_task("label-noise").score(entries("label-noise")[name].fit, 0, table, "kind", share=0.2)
    assert precision > 0.7


def test_many_examples_are_scored_in_parts_with_their_share_of_each_class(monkeypatch):
    """Rows are their own number, so that a stand-in for the score tells which it was given together."""
    y, seen = np.arange(89) % 3, []

    def numbers(x, y, **_):
        seen.append(x[:, 0].astype(int))
        assert np.ptp(np.bincount(y, minlength=3)) <= 1  # each part has its share of each class
        return x[:, 0]

    monkeypatch.setattr(cg_score, "PART", 30)
    monkeypatch.setattr(cg_score, "cg_scores", numbers)
    x = np.arange(89.0)[:, None]
    np.testing.assert_array_equal(cg_score.suspicious((x, y), 0)(x), x[:, 0])
    assert sorted(map(len, seen)) == [29, 30, 30] and len(set(np.concatenate(seen))) == 89


def test_the_labels_that_an_entry_sees_are_wrong_as_often_as_is_set(table):
    seen = []

    def fit(train, seed):
        seen.append(train)
        return lambda x: np.zeros(len(x))

    assert get_task("label-noise").score(fit, 3, table, "kind", share=0.2) == pytest.approx(18 / 89)
    (x, y), truth = seen[0], load_labelled(table, target="kind").y
    assert (y != truth).sum() == 18
    np.testing.assert_allclose(x.std(0), 1, rtol=1e-5)


def test_neighbours_do_not_count_themselves_even_among_copies():
    x = np.zeros((24, 1, 1, 1), dtype=np.float32)
    alone = np.zeros(24, dtype=np.int64)
    alone[5] = 1
    suspicion = label_noise.neighbours_disagree((x, alone), 0)(x)
    assert suspicion[5] == 1 and np.all(np.delete(suspicion, 5) <= 0.1 + 1e-12)


def test_ranked_says_where_an_example_comes_from(tmp_path, table):
    examples = load_labelled(table, target="kind")
    first = ranked(examples, np.arange(89)).iloc[0]
    assert (first["rank"], first.example, first.label, first.suspicion) == (1, "90", "cat", 88)
    for name, shade in (("ant/x.png", 0), ("ant/deep/y.png", 90), ("bee/z.png", 255)):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), shade, dtype=np.uint8)).save(tmp_path / "p" / name)
    rows = ranked(load_labelled(str(tmp_path / "p")), np.array([1.0, 3.0, 2.0]))
    assert sorted(rows.example) == ["ant/deep/y.png", "ant/x.png", "bee/z.png"]
    assert rows.label[rows.example == "bee/z.png"].item() == "bee"
    arrays = ranked(load_labelled("digits"), -np.arange(1797))
    assert arrays.example[:2].tolist() == ["0", "1"]


def test_suspects_prints_the_wrong_row_first_as_csv_and_as_json(command, table):
    code, out, said = command(
        "suspects", "--data", table, "--target", "kind", "--method", ORDINARY[0], "--top", "2"
    )
    assert code == 0 and "1 rows without a target left out" in said
    lines = out.splitlines()
    assert lines[0] == "rank,example,label,suspicion" and len(lines) == 3
    assert lines[1].startswith("1,3,ant,")
    code, out, _ = command("suspects", "--data", table, "--target", "kind", "--method", ORDINARY[0], "--json")
    rows = json.loads(out)
    assert len(rows) == 89 and rows[0]["example"] == "3"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "wine", "--method", "guess"], "--method must be one of 10 nearest neighbours, .*, got 'guess'"),
        (["--data", "wine", "--target", "b"], "wine has its own classes, target is for a file; got 'b'"),
        (["--data", "cora"], "got 'cora', which is graph"),
        (["--data", "wine", "--set", "share=0.1"], "--set of suspects takes options of reading, .* got share"),
        (["--data", "nowhere.csv"], "data must be labelled"),
    ],
)  # fmt: skip
def test_suspects_refuses_in_one_line(command, words, message):
    code, out, said = command("suspects", *words)
    assert code == 2 and not out
    assert len(said.splitlines()) == 1
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": "0"}, "share must plant at least one wrong label among 178 and leave one, got 0.0"),
        ({"share": "2"}, "share must be at least 0 and at most 1, got 2.0"),
        ({"share": "many"}, "share must be a number, got 'many'"),
        ({"labels": "3"}, "label-noise takes no 'labels', it takes: share"),
    ],
)
def test_settings_of_a_task_are_refused_before_any_trial(given, message):
    with pytest.raises(ValueError, match=message):
        compare("label-noise", data="wine", settings=given)


def test_settings_of_a_task_are_part_of_its_trials():
    jobs = {
        text: compare("label-noise", data="wine", seeds=1, settings={"share": text})[0][0]
        for text in ("0.1", "0.2")
    }
    assert jobs["0.2"].params["settings"] == {"share": 0.2}
    assert jobs["0.1"].key != jobs["0.2"].key
    assert jobs["0.1"].key == compare("label-noise", data="wine", seeds=1)[0][0].key
    with pytest.raises(ValueError, match="node-classification takes no 'share', it takes: no setting"):
        compare("node-classification", settings={"share": "0.1"})
