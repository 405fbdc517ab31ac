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
    assert len([node for node in ray.nodes() if node["Alive"]]) == 1

    (bad,) = [o for j, o in run_on_ray(jobs("troubled", 2, trouble="raises")) if j.seed == 1]
    assert "a seed that fails" in bad.error


def test_an_address_where_nobody_listens_is_said():
    with pytest.raises(ValueError, match="no Ray cluster at"):
        list(run_on_ray([], address="127.0.0.1:1"))
