"""Ray: the same numbers as locally, and a node that dies takes no trial with it."""

import threading
import time

import pytest

from posterity.engine.cluster import run_on_ray
from posterity.engine.local import run_local

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("ray")]


@pytest.fixture
def cluster(jobs):  # the nodes inherit the path that jobs sets
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def _nodes_left(count, patience=60.0):
    """Whether the head, which hears of a death late, comes to count so many living nodes."""
    until = time.monotonic() + patience
    while sum(node["Alive"] for node in ray.nodes()) != count:
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def test_numbers_are_the_same_and_a_lost_node_loses_nothing(cluster, jobs):
    todo = jobs("draw", 3)
    local = {job.seed: outcome.value for job, outcome in run_local(todo, workers=1)}
    there = {job.seed: outcome.value for job, outcome in run_on_ray(todo)}
    assert there == local

    def kill():
        time.sleep(4)
        cluster.remove_node(cluster.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = {job.seed: outcome for job, outcome in run_on_ray(jobs("slow", 6, seconds=2.0))}
    killer.join()
    assert {seed: outcome.value for seed, outcome in found.items()} == {seed: seed for seed in range(6)}
    assert _nodes_left(1), "the head has not noticed that a node is gone"

    (bad,) = [o for j, o in run_on_ray(jobs("troubled", 2, trouble="raises")) if j.seed == 1]
    assert "a seed that fails" in bad.error


def test_a_cluster_of_ones_own_ends_with_the_jobs_and_tells_of_a_trial_that_kills_its_process(jobs):
    assert not ray.is_initialized()
    found = {job.seed: outcome for job, outcome in run_on_ray(jobs("troubled", 2, trouble="dies"), workers=2)}
    assert found[0].value == 0.0 and "died with exit code -9" in found[1].error
    assert not ray.is_initialized()
    running = run_on_ray(jobs("slow", 1) + jobs("slow", 1, seconds=600.0), workers=2)
    assert next(running)[1].value == 0
    start = time.monotonic()
    running.close()  # the trial in flight is given up
    assert time.monotonic() - start < 60 and not ray.is_initialized()


def test_an_address_where_nobody_listens_is_said():
    with pytest.raises(ValueError, match="no Ray cluster at"):
        list(run_on_ray([], address="127.0.0.1:1"))
