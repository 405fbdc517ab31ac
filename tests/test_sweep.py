"""One claim over values of a parameter: what is refused, what is printed, how the report draws it."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from posterity.cli.sweeping import print_curve
from posterity.engine.discovery import claim_outlines
from posterity.engine.store import Job, Outcome
from posterity.engine.verdicts import direction
from posterity.papers import papers
from posterity.site.figures import sweep
from posterity.site.report import write_report

CLAIM = ["minibatch-kmeans", "--claim", "terminates"]
SMALL = [*CLAIM, "--set", "n_clusters=3", "--seeds", 2, "--workers", 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["esd", "--sweep", "n=1,2"], "--sweep needs exactly one paper and --claim"),
        ([*CLAIM, "esd", "--sweep", "n_rows=300,400"], "--claim needs exactly one paper"),
        ([*CLAIM, "--sweep", "n_rows=300,400", "--sweep", "n_rows=9,10"], "--sweep must be given once, got 2"),
        ([*CLAIM, "--sweep", "n_rows"], "--sweep must be name=value,value, got 'n_rows'"),
        ([*CLAIM, "--sweep", "=1,2"], "--sweep must be name=value,value, got '=1,2'"),
        ([*CLAIM, "--sweep", "data=digits,two-moons"], "a parameter other than data and target, got 'data'"),
        ([*CLAIM, "--sweep", "n_rows=300,,400"], "--sweep n_rows must have no empty value, got '300,,400'"),
        ([*CLAIM, "--sweep", "n_rows="], "--sweep n_rows must have no empty value, got ''"),
        ([*CLAIM, "--sweep", "n_rows=300"], "--sweep n_rows must have at least two values, got '300'"),
        ([*CLAIM, "--sweep", "n_rows=300,3_00"], "--sweep n_rows must have each value once, got 300 twice"),
        ([*CLAIM, "--set", "n_rows=9", "--sweep", "n_rows=300,400"], "n_rows must be in --sweep or in --set, not in both"),
        ([*CLAIM, "--sweep", "colour=1,2"], "takes no 'colour'"),
        ([*CLAIM, "--sweep", "n_rows=300,many"], "terminates: n_rows must be an integer, got 'many'"),
        ([*CLAIM, "--sweep", "n_clusters=2,0"], "terminates: n_clusters must be at least"),
        (["sampled-laplace", "--claim", "exact_algebra", "--sweep", "net=mlp,rnn"], "net must be one of mlp, cnn"),
        (["a-dgn", "--claim", "depth", "--sweep", "shallower=2,3"], "shallower is a list: use --set"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_one_line_and_exit_code_2_before_any_trial(command, words, said):
    code, out, err = command("run", *words)
    assert code == 2, (out, err)
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_a_sweep_gives_a_row_a_value_over_the_same_seeds_and_runs_none_twice(command):
    code, out, err = command("run", *SMALL, "--sweep", "n_rows=400,300", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["params"]["n_rows"] for row in rows] == [400, 300]
    assert all(row["params"]["n_clusters"] == 3 and row["seeds"] == [0, 1] for row in rows)
    assert "[4/4] minibatch-kmeans terminates n_rows=300 seed 1: " in err
    stored = json.loads(command("results", "--json")[1])
    assert sorted(map(json.dumps, stored)) == sorted(map(json.dumps, rows))
    code, out, err = command("run", *SMALL, "--sweep", "n_rows=400,300", "--strict")
    assert code == 0
    assert "4 of 4 trials were stored" in err
    lines = [line.split() for line in out.splitlines()]
    assert ["n_rows", "value", "verdict"] in lines
    assert [line[0] for line in lines if line[-1:] == ["holds"]] == ["400", "300"]
    code, out, _ = command("run", *SMALL[:-4], "--seeds", 2, "--sweep", "n_rows=300,400", "--json")
    assert [row["params"]["n_rows"] for row in json.loads(out)] == [300, 400]


def made(points, **facts):
    """Return rows of a claim: a row a value, with mean and half width of the interval."""
    rows = []
    for x, (mean, half) in points.items():
        ends = [None, None] if half is None else [mean - half, mean + half]
        values = [mean] if half is None else [mean - half / 4, mean + half / 4]
        value = {"mean": mean, "ci95": ends, "values": values}
        rows.append({"paper": "esd", "claim": "c", "says": "It helps.", "form": "comparison", "metric": "error", "better": "lower",
                     "arms": {"a": {**value, "values": [0.0] * len(values)}, "b": value}, "effect": value, "verdict": "holds",
                     "seeds": [0, 1], "seconds": 1.0, "data": None, "params": {"x": x}, **facts})  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ({100: (1, 0.5), 1: (3, 0.5)}, "effect falls from 3 at x=1 to 1 at x=100"),
        ({1: (-3, 0.5), 100: (1, 0.5)}, "effect rises from -3 at x=1 to 1 at x=100"),
        ({1: (1, 2), 100: (3, 0.5)}, "effect: no change beyond the intervals from x=1 to x=100"),
        ({1: (1, 0.1), 2: (5, 0.1), 3: (1, 0.1)},
         "effect is lowest, 1 at x=1, and highest, 5 at x=2; the ends do not differ beyond the intervals"),
        ({1: (1, None), 2: (5, None)}, "effect: whether it changes cannot be told from one seed"),
        ({"mlp": (1, 0.1), "cnn": (5, 0.1)}, ""),
        ({False: (1, 0.1), True: (5, 0.1)}, ""),
        ({1: (1, 0.1), 2: (float("nan"), 0.1)}, ""),
    ],
)  # fmt: skip
def test_the_direction_is_said_only_where_intervals_are_apart(points, said):
    assert direction(made(points), "x") == said


def test_the_table_has_a_line_a_value_and_the_direction_below(as_a_user, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    print_curve(made({1: (3, 0.5), 100: (1, 0.5)}), "x")
    *_, head, first, last, measure, said = capsys.readouterr().out.splitlines()
    assert head.split() == ["x", "a", "b", "b", "less", "a", "verdict"]
    assert first.split() == ["1", "3", "3", "3", "[2.5,", "3.5]", "holds"]
    assert last.split()[0] == "100"
    assert measure == "error; lower is better; 2 seeds a value, 2 s; data None"
    assert said == "effect falls from 3 at x=1 to 1 at x=100"


def test_the_chart_has_seeds_mean_and_interval_at_each_value_and_the_claimed_side():
    value = {"mean": 0.5, "ci95": [0.25, 0.75], "values": [0.25, 0.75]}
    one = {"mean": 0.5, "ci95": [None, None], "values": [0.5]}
    forms = [
        made({1: (3, 0.5), 10: (-2, 0.5), 100: (-3, 0.5)}),
        made({1: (0, 0), 2: (0, 0)}, form="bound", value=value, limit=1.0),
        made({1: (0, 0), 2: (0, 0)}, form="trend", value=one, range=[0.0, None]),
    ]
    for rows in forms:
        tree = ElementTree.fromstring(sweep("x", rows))
        means = [each for each in tree.iter("circle") if each.get("class") == "mean"]
        bars = [each for each in tree.iter("line") if each.get("class") == "interval"]
        assert len(means) == len(rows)
        assert len(bars) == (0 if rows is forms[2] else len(rows))
        assert float(tree.find("rect[@class='side']").get("height")) > 0
    tree = ElementTree.fromstring(sweep("x", forms[0]))
    places = [float(each.get("cx")) for each in tree.iter("circle") if each.get("class") == "mean"]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)  # powers of ten
    words = "".join(tree.itertext())
    assert (
        "b less a by x, mean and 95 % interval: 3 (2.5 to 3.5) at 1; " in words
        and "no difference at 0" in words
    )
    assert sweep("x", forms[0][:1]) == ""


def test_the_report_draws_settings_that_differ_in_one_number_once_above_them(tmp_path):
    paper = papers()["minibatch-kmeans"]
    outline = next(each for each in claim_outlines(paper) if each.name == "terminates")

    def group(**params):
        jobs = [
            Job(paper.slug, outline.name, "m:n", {**outline.defaults, **params}, seed, "c") for seed in (0, 1)
        ]
        return [(job, Outcome(0.1 * job.seed + 0.1, {}, {}, 1.5)) for job in jobs]

    groups = [group(n_rows=300), group(n_rows=400), group(n_rows=500, batch_size=8), group()]
    write_report(groups, tmp_path)
    page = (tmp_path / "papers" / "minibatch-kmeans.html").read_text()
    assert page.count('<section aria-label="terminates by n_rows"') == page.count("<section aria-label=") == 1
    assert page.index("terminates by n_rows") < page.index("--set n_rows=300")
    assert "Value: no change beyond the intervals from n_rows=300 to n_rows=400." in page
    assert "--set batch_size=8 --set n_rows=500</pre>" in page
