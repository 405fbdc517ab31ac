"""Worker processes: same numbers as in this process, and trouble stays with its trial."""

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from posterity.engine.local import run_local
from posterity.engine.worker import perform


def test_numbers_do_not_depend_on_workers_or_order(jobs):
    todo = jobs("draw", 4)
    one = {job.seed: outcome.value for job, outcome in run_local(todo, workers=1)}
    two = {job.seed: outcome.value for job, outcome in run_local(todo[::-1], workers=2)}
    assert one == two
    assert len(set(one.values())) == 4


def test_what_a_trial_tracks_comes_back(jobs):
    ((_, outcome),) = run_local(jobs("draw", 1), workers=1)
    assert outcome.curves == {"curve": [[1.0, 0.0]]}
    assert outcome.seconds > 0


@pytest.mark.parametrize(
    ("trouble", "limit", "said"),
    [
        ("raises", 120.0, "RuntimeError: a seed that fails"),
        ("hangs", 5.0, "time limit of 5 s"),
        ("eats", 120.0, "out of memory"),
        ("dies", 120.0, "died with exit code -9"),
    ],
)
def test_a_trial_in_trouble_is_reported_and_the_others_finish(jobs, monkeypatch, trouble, limit, said):
    monkeypatch.setenv("POSTERITY_MEMORY_LIMIT", str(8 << 30))
    found = {
        job.seed: outcome
        for job, outcome in run_local(jobs("troubled", 4, limit, trouble=trouble), workers=2)
    }
    assert said in found.pop(1).error
    assert {seed: outcome.value for seed, outcome in found.items()} == {0: 0.0, 2: 2.0, 3: 3.0}


def test_leaving_early_ends_the_workers(jobs):
    start = time.monotonic()
    for _ in run_local(jobs("slow", 1) + jobs("slow", 1, seconds=60.0), workers=2):
        break
    assert time.monotonic() - start < 30


def test_a_worker_serves_jobs_and_ends_with_its_parent_even_in_the_midst_of_a_trial(jobs):
    words = [sys.executable, "-m", "posterity.engine.worker"]
    worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for job in jobs("slow", 2, seconds=0.0):
        worker.stdin.write(json.dumps(asdict(job)) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["value"] == job.seed
    worker.stdin.write(json.dumps(asdict(jobs("slow", 1, seconds=600.0)[0])) + "\n")
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
    worker.stdout.close()


def test_no_jobs_no_workers():
    assert list(run_local([])) == []


def test_a_call_that_does_not_exist_is_an_error_of_its_trial():
    facts = {"call": "posterity.nowhere:f", "params": {}, "seed": 0, "device": "cpu"}
    assert "ModuleNotFoundError" in perform(facts)["error"]
