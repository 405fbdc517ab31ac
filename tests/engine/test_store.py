"""The store keeps finished trials whole, whoever writes and whatever is killed."""

import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from posterity.engine.store import Job, Outcome, Store

JOB = Job("paper", "claim", "module:name", {"steps": 3}, 0, "code")


def test_what_is_put_comes_back():
    store = Store()
    store.put(JOB, Outcome(value={"a": 0.1}, curves={"loss": [[1, 2.0]]}, records={"x": 1.0}, seconds=2.5))
    (found,) = store.get([JOB]).values()
    assert found.value == {"a": 0.1}
    assert found.curves == {"loss": [[1, 2.0]]}
    assert found.ended
    assert store.all() == [(JOB, found)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"code": "other"}, {"params": {"steps": 4}}, {"device": "cuda"},
                                    {"claim": "other"}])  # fmt: skip
def test_whatever_decides_the_numbers_is_part_of_the_key(change):
    store = Store()
    store.put(JOB, Outcome(value=1.0))
    assert not store.get([replace(JOB, **change)])


def test_the_time_limit_is_not():
    assert replace(JOB, time_limit=1.0).key == JOB.key


def test_an_error_is_kept_but_run_again_and_never_replaces_a_success():
    store = Store()
    store.put(JOB, Outcome(error="boom"))
    assert not store.get([JOB])
    assert store.all()[0][1].error == "boom"
    store.put(JOB, Outcome(value=1.0))
    store.put(JOB, Outcome(error="boom"))
    assert store.get([JOB])[JOB.key].value == 1.0


def test_forgetting_removes():
    store = Store()
    store.put(JOB, Outcome(value=1.0))
    store.forget([JOB])
    assert not store.all()


def test_two_processes_write_one_store(tmp_path):
    path = tmp_path / "trials.sqlite"
    script = (
        "import sys; from pathlib import Path; from posterity.engine.store import *\n"
        "who = int(sys.argv[2]); store = Store(Path(sys.argv[1]))\n"
        "for seed in range(60): store.put(Job('p', f'c{who}', 'm:n', {}, seed, 'x'), Outcome(value=float(who)))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), str(who)]) for who in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    found = Store(path).all()
    assert len(found) == 120
    assert all(outcome.value == float(job.claim[1]) for job, outcome in found)


def test_processes_that_open_a_new_store_at_the_same_moment_all_get_it(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from posterity.engine.store import Store\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "Store(Path(sys.argv[1]))"
    )
    for k in range(5):
        words = [sys.executable, "-c", script, str(tmp_path / f"{k}.sqlite"), str(time.time() + 0.4)]
        running = [subprocess.Popen(words) for _ in range(4)]
        assert [process.wait() for process in running] == [0] * 4


def test_a_store_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="POSTERITY_HOME"):
        Store(tmp_path / "file" / "trials.sqlite")
    (tmp_path / "broken.sqlite").write_text("this is not a database, and long enough to be read as one" * 100)
    with pytest.raises(ValueError, match="cannot be used"):
        Store(tmp_path / "broken.sqlite")
    assert sqlite3.sqlite_version
