"""A run that is killed, whenever it is, loses nothing that was finished."""

import json
import random
import re
import subprocess
import sys
import time

import pytest

from posterity.engine.store import Store

RUN = [
    sys.executable, "-m", "posterity", "run", "minibatch-kmeans", "--claim", "local_implies_global",
    "--set", "max_iter=3", "--set", "n_rows=300",
]  # fmt: skip


@pytest.mark.timeout(480)
def test_killed_at_twenty_random_moments_no_finished_trial_is_lost():
    """What was seen finished is stored, whatever is stored is whole, and the end is the same."""
    words = [*RUN, "--seeds", "400", "--workers", "1"]
    moments = random.Random(0)
    finished = set()
    for number in range(20):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = ""
        if number % 2:  # while it starts, or just after
            time.sleep(moments.uniform(0.5, 4.0))
        else:  # in the midst of its trials
            said = process.stderr.readline()
            time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        said += process.communicate()[1]
        finished |= {int(seed) for seed in re.findall(r"seed (\d+): [\d.]+ s\n", said)}
        stored = Store().all()
        assert finished <= {job.seed for job, _ in stored}
        assert all(outcome.value and not outcome.error and outcome.ended for _, outcome in stored)
    assert finished
    whole = subprocess.run([*RUN, "--seeds", "400", "--json"], capture_output=True, text=True, check=True)
    assert f"{len(stored)} of 400 trials were stored" in whole.stderr
    (row,) = json.loads(whole.stdout)
    assert row["seeds"] == list(range(400))
    for seed in sorted(finished)[:2]:
        words = [*RUN, "--seeds", "1", "--first-seed", str(seed), "--json", "--quiet", "--fresh"]
        fresh = subprocess.run(words, capture_output=True, text=True, check=True)
        for arm, facts in json.loads(fresh.stdout)[0]["arms"].items():
            assert facts["values"] == [row["arms"][arm]["values"][seed]]
