"""A run that is killed, whenever it is, loses nothing that was finished."""

import json
import random
import re
import subprocess
import sys
import time

from posterity.engine.store import Store

CLAIM = [
    sys.executable, "-m", "posterity", "run", "minibatch-kmeans", "--claim", "local_implies_global",
    "--set", "max_iter=3", "--set", "n_rows=300",
]  # fmt: skip
ENGINE = """
import sys
from posterity.engine.run import execute
from posterity.engine.store import Job, Store
jobs = [Job("plain", "slow", "plain_trials:slow", {"seconds": 0.02}, seed, "code") for seed in range(60)]
for job, outcome, known in execute(jobs, Store(), workers=1):
    if not known:
        print(f"seed {job.seed}: {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
"""


def killed(words, number, moments, latest):
    """Start a run, kill it and return the seeds that it said were finished."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = ""
    if number % 2:  # while it starts, or just after
        time.sleep(moments.uniform(0.0, latest))
    else:  # in the midst of its trials
        said = process.stderr.readline()
        time.sleep(moments.uniform(0.0, 0.3))
    process.kill()
    said += process.communicate()[1]
    return {int(seed) for seed in re.findall(r"seed (\d+): [\d.]+ s\n", said)}


def test_killed_at_twenty_random_moments_no_finished_trial_is_lost(jobs):
    """What was seen finished is stored, whatever is stored is whole, and the end is the same."""
    words, moments, finished = [sys.executable, "-c", ENGINE], random.Random(0), set()
    for number in range(20):
        finished |= killed(words, number, moments, latest=0.8)
        stored = Store().all()
        assert finished <= {job.seed for job, _ in stored}
        assert all(
            outcome.value == job.seed and not outcome.error and outcome.ended for job, outcome in stored
        )
    assert finished
    subprocess.run(words, capture_output=True, check=True)
    assert sorted((job.seed, outcome.value) for job, outcome in Store().all()) == [(k, k) for k in range(60)]


def test_a_claim_that_was_killed_goes_on_to_the_same_values():
    words, moments = [*CLAIM, "--seeds", "40", "--workers", "1"], random.Random(1)
    finished = killed(words, 0, moments, latest=0.0) | killed(words, 0, moments, latest=0.0)
    stored = len(Store().all())
    whole = subprocess.run([*CLAIM, "--seeds", "40", "--json"], capture_output=True, text=True, check=True)
    assert f"{stored} of 40 trials were stored" in whole.stderr
    (row,) = json.loads(whole.stdout)
    assert row["seeds"] == list(range(40))
    seed = min(finished)
    again = [*CLAIM, "--seeds", "1", "--first-seed", str(seed), "--json", "--quiet", "--fresh"]
    fresh = json.loads(subprocess.run(again, capture_output=True, text=True, check=True).stdout)[0]
    for arm, facts in fresh["arms"].items():
        assert facts["values"] == [row["arms"][arm]["values"][seed]]
