"""The command line as a person meets it: what it prints, how it ends, what it refuses."""

import json
import random
import re
import signal
import subprocess
import sys

import pytest

from posterity.cli import running
from posterity.engine.store import Store

FAST = ["minibatch-kmeans", "--claim", "local_implies_global", "--set", "max_iter=3", "--set", "n_rows=300"]


def test_list_filters_by_domain_and_by_what_is_there(command):
    code, out, _ = command("list", "--json")
    assert code == 0
    assert len(json.loads(out)) == 160
    _, out, _ = command("list", "--domain", "graphs", "--implemented", "--json")
    rows = json.loads(out)
    assert rows
    assert all(row["domain"] == "graphs" and row["implemented"] for row in rows)
    _, out, _ = command("list")
    assert len(out.splitlines()) == 160


@pytest.mark.parametrize(
    ("words", "slug"),
    [
        (["overconfident"], "esd"), (["calibration"], "esd"), (["callibration"], "esd"), (["rectified", "flow"], "rectified-flow"),
        (["missing", "values", "series"], "timesnet"), (["equal", "opportunity"], "fairee"), (["oversmoothing"], "a-dgn"),
    ],
)  # fmt: skip
def test_search_finds_by_problem_and_forgives_typos(command, words, slug):
    _, out, _ = command("search", *words, "--json")
    assert slug in [row["slug"] for row in json.loads(out)[:5]]


def test_search_that_finds_nothing_says_so(command):
    code, out, err = command("search", "zzzzqqqq")
    assert (code, out) == (0, "")
    assert "nothing found" in err


def test_show_gives_the_lines_needs_claims_and_citation(command):
    _, out, _ = command("show", "esd", "--json")
    shown = json.loads(out)
    assert "ESDLoss" in shown["lines"]
    assert set(shown["needs"]) == {"labels", "gpu", "extra"}
    assert shown["claims"][0]["says"]
    assert shown["cite"].startswith("@inproceedings")
    _, text, _ = command("show", "esd")
    for part in ("For:", "Use it", "Needs:", "Claims:", "Parity:", "Cite:"):
        assert part in text
    assert shown["parity"]["values"] > 3000
    assert "3,399 values of the authors' code (github.com/hee-suk-yoon/ESD), in float64" in text
    _, text, _ = command("show", "polygcl")
    assert re.search(r"inconclusive; about \d+ seeds would settle it, if the spread stays as seen", text)
    _, text, _ = command("show", "othello-world")
    assert "Not implemented yet." in text


def test_the_module_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "posterity", "cite", "esd"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("@inproceedings")


def test_run_prints_the_contracts_row_and_stores_it(command, tmp_path):
    code, out, err = command("run", *FAST, "--seeds", 2, "--first-seed", 7, "--json", "--quiet")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert list(row) == ["paper", "claim", "says", "form", "metric", "better", "arms", "effect", "verdict",
                         "seeds_to_settle", "seeds",
                         "seconds", "data", "params", "code"]  # fmt: skip
    assert row["seeds"] == [7, 8]
    assert row["params"]["max_iter"] == 3
    for arm in row["arms"].values():
        assert set(arm) == {"mean", "ci95", "values"}
        assert len(arm["values"]) == 2
    assert set(row["effect"]) == {"mean", "ci95"}
    assert json.loads(command("results", "--json")[1]) == [row]
    code, again, err = command("run", *FAST, "--seeds", 2, "--first-seed", 7, "--json")
    assert json.loads(again) == [row]
    assert "2 of 2 trials were stored" in err
    _, out, _ = command("results")
    assert "verdict:" in out
    code, out, err = command("run", *FAST, "--seeds", 1, "--strict")
    assert code == 3
    assert "inconclusive" in out
    assert "[1/1] minibatch-kmeans local_implies_global seed 0" in err


def test_several_papers_end_with_one_table(as_a_user, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    shared = {
        "says": "It helps.",
        "metric": "error",
        "better": "lower",
        "seeds": [0],
        "seconds": 1.0,
        "data": None,
    }
    value = {"mean": 0.5, "ci95": [0.25, 0.75]}
    rows = [{"paper": "esd", "claim": "one", "arms": {"a": value, "b": value}, "effect": value, "verdict": "holds", **shared},
            {"paper": "acmp", "claim": "two", "value": value, "limit": 1.0, "verdict": "fails", **shared}]  # fmt: skip
    running._print_rows(rows)
    *_, head, first, second = capsys.readouterr().out.splitlines()
    assert re.split("  +", head.strip()) == ["paper", "claim", "effect or value", "verdict"]
    assert first.split() == ["esd", "one", "0.5", "[0.25,", "0.75]", "holds"]
    assert second.split() == ["acmp", "two", "0.5", "[0.25,", "0.75]", "fails"]
    running._print_rows(rows[:1])
    assert "effect or value" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "say which papers"),
        (["run", "nope"], "unknown paper 'nope'"),
        (["run", "rectified-flwo"], "did you mean rectified-flow"),
        (["run", "othello-world"], "not implemented yet"),
        (["run", "esd", "--all"], "one of them"),
        (["run", "--domain", "cooking"], "domain must be one of transport"),
        (["run", "--domain", "language"], "no paper of language"),
        (["run", "esd", "--claim", "nope"], "claim of esd must be one of"),
        (["run", "esd", "fairee", "--claim", "calibration"], "--claim needs exactly one paper"),
        (["run", "esd", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["run", "esd", "--seeds", "many"], "--seeds"),
        (["run", "esd", "--first-seed", "-1"], "--first-seed must be at least 0"),
        (["run", "esd", "--workers", "0"], "--workers must be at least 1"),
        (["run", "esd", "--on", "mars"], "--on must be local, ray or ray://HOST:PORT, got 'mars'"),
        (["run", "esd", "--device", "tpu"], "--device must be cpu, cuda"),
        (["run", "esd", "--device", "cuda"], "this torch sees none"),
        (["run", "esd", "--set", "colour"], "--set must be name=value"),
        (["run", "esd", "--set", "colour=red"], "takes no 'colour'"),
        (["run", "esd", "--set", "data=digits"], "use --data"),
        (["run", "a-dgn", "--set", "n_sets=0"], "long_range: n_sets must be at least 1, got 0"),
        (["run", "quasi-sliced-wasserstein", "--set", "lr=nan"], "flow: lr must be greater than 0, got nan"),
        (["run", "a-dgn", "--set", "shallower=2,0"], "depth: shallower must be at least 1, got 0"),
        (["run", "tangos", "--set", "n_noise=few"], "n_noise must be an integer, got 'few'"),
        (["run", "tangos", "--data", "two-moons"], "data must be table: a name ("),
        (["run", "tangos", "--data", "missing.csv"], "which is no name and no file"),
        (["run", "tangos", "--data", "."], "got the folder ."),
        (["run", "tangos", "--data", "pyproject.toml"], "got the file pyproject.toml"),
        (["run", "tangos", "--data", "diabetes", "--target", "nope"], "target must be one of"),
        (["run", "minibatch-kmeans", "--claim", "terminates", "--target", "x"], "takes no 'target'"),
        (["run", "esd", "--set", "n_train=1700"], "digits: n_train must leave 101 of the 1797 images, so be at most 1696"),
        (["run", "esd", "--set", "n_train=9"], "n_train must be at least 30, got 9"),
        (["run", "forde", "--set", "n_train=1797"], "n_train must leave 1 of the 1797 images"),
        (["run", "sampled-laplace", "--set", "net=rnn"], "net must be one of mlp, cnn, got 'rnn'"),
        (["run", "gcn-stability", "--set", "n_test=900"], "n_train must leave 900 of the 1797 images"),
        (["run", "cider", "--set", "n_known=10"], "n_known must be less than the 10 classes, got 10"),
        (["run", "minibatch-kmeans", "--set", "n_clusters=300", "--set", "n_rows=300"], "less than the 300 different points"),
        (["run", "minibatch-kmeans", "--set", "epsilon=64"], "epsilon must be less than the 64 coordinates"),
        (["run", "rectified-flow", "--set", "network=unet"], "for points of 3,072 coordinates, those have 64"),
        (["run", "timesnet", "--set", "seq_len=1500"], "at least 7500 rows (windows of 1500 in the last fifth)"),
        (["run", "gmogp", "--set", "n_inputs=5"], "n_inputs must leave one of the 5 columns to predict, got 5"),
        (["run", "demd", "--set", "group=town"], "diabetes: group must be one of age, sex, bmi"),
        (["run", "fairee", "--set", "alpha=0"], "alpha must be in (0, 1), got 0"),
        (["run", "tangos", "--set", "n_rows=9"], "n_rows must be at least 10, got 9"),
        (["show", "nope"], "unknown paper"),
        (["cite", "nope"], "unknown paper"),
        (["vendor", "othello-world"], "not implemented yet"),
        (["results", "nope"], "unknown paper"),
        (["report"], "nothing to report"),
        (["compare", "cooking"], "task must be one of calibration"),
        (["compare", "node-classification", "--target", "x"], "takes no target"),
        (["compare", "tabular-regression", "--data", "nope"], "which is no name and no file"),
        (["new", "Bad Slug", "--domain", "graphs"], "slug must be lower-case"),
        (["new", "fine", "--domain", "cooking"], "domain must be one of"),
        (["new", "esd", "--domain", "graphs"], "belongs to uncertainty"),
        (["new", "fine", "--domain", "graphs", "--root", "/"], "must be a checkout"),
        (["list", "--domain", "cooking"], "domain must be one of"),
        (["list", "--colour"], "No such option"),
        (["cook"], "No such command"),
        (["search"], "Missing argument"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_exit_code_2(command, words, said):
    code, out, err = command(*words)
    assert code == 2, (out, err)
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_a_trial_that_raises_gives_exit_code_1_and_the_reason(command):
    settings = [word for each in ("steps=9", "n_samples=9", "lr=1e30") for word in ("--set", each)]
    code, out, err = command(
        "run", "rectified-flow", "--claim", "transport", *settings, "--seeds", 1, "--json"
    )
    assert code == 1
    assert json.loads(out)[0]["verdict"] == "error"
    assert "loss" in err


def test_ctrl_c_keeps_what_is_stored_and_says_how_to_go_on():
    words = ["run", *FAST, "--seeds", "500", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "posterity", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("[2/"):
            assert re.match(
                r"\[2/500, about \d+ (s|min) left\] minibatch-kmeans local_implies_global seed 1: ", line
            )
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = int(re.search(r"stopped; (\d+) of 500 trials are stored", err)[1])
    assert len(Store().all()) >= kept >= 2
    assert "posterity run minibatch-kmeans" in err


def test_new_writes_four_files_that_the_linter_passes_and_whose_tests_say_what_is_missing(command, tmp_path):
    (tmp_path / "src" / "posterity" / "papers").mkdir(parents=True)
    code, out, err = command("new", "brand-new", "--domain", "graphs", "--root", tmp_path)
    assert code == 0, err
    files = out.split()
    assert len(files) == 4
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I", "--line-length", "110", tmp_path],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if "No module named ruff" not in lint.stderr:
        assert lint.returncode == 0, lint.stdout
    code, _, err = command("new", "brand-new", "--domain", "graphs", "--root", tmp_path)
    assert code == 2
    assert "is there already" in err


def test_compare_ranks_entries_with_ties_and_intervals(command, tmp_path):
    table = tmp_path / "houses.csv"
    rng = random.Random(0)
    rows = [(rng.random(), rng.random(), rng.choice("xyz")) for _ in range(80)]
    table.write_text(
        "rooms;size;town;price\n" + "".join(f"{a};{b};{t};{3 * a - b + (t == 'x')}\n" for a, b, t in rows)
    )
    code, out, err = command(
        "compare", "tabular-regression", "--data", table, "--target", "price", "--seeds", 1, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert "separator ';'" in err
    assert "compare tabular-regression (gradient boosting) seed 0: " in err
    assert [row["rank"] for row in found] == sorted(row["rank"] for row in found)
    assert {"linear", "gradient boosting", "tuned MLP", "random forest"} <= {row["entry"] for row in found}
    assert "tangos" in {row["paper"] for row in found}
    assert found[0]["entry"] == "linear"
    code, out, err = command(
        "compare", "tabular-regression", "--data", table, "--target", "price", "--seeds", 1
    )
    assert code == 0 and "were stored and not run again" in err
    assert out.split()[:3] == ["rank", "entry", "paper"] and "= ties:" in out
    assert "linear, an ordinary choice, is enough as far as 1 seeds tell" in " ".join(out.split())
